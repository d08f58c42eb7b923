"""LSA item vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.embedding.lsa import LSA, fit_lsa, item_texts

TEXTS = [
    "red wool hat", "blue wool hat", "red wool scarf", "steel tea pot", "oak tea tray",
    "steel tea tray", "cork yoga mat", "blue yoga mat",
]  # fmt: skip


def lsa_vectors(texts: list[str], dim: int, seed: int = 0) -> np.ndarray:
    return fit_lsa(texts, dim, seed)[1]


def test_deterministic_unit_rows_that_know_what_is_alike():
    vectors = lsa_vectors(TEXTS, 4, seed=3)
    assert vectors.shape == (8, 4) and vectors.dtype == np.float32
    assert (vectors == lsa_vectors(TEXTS, 4, seed=3)).all()
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(8), abs=1e-5)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[3]
    assert near > 0.5 > far


def test_equal_texts_get_equal_vectors_and_unknown_terms_a_zero_row():
    vectors = lsa_vectors([*TEXTS, "red wool hat", "unheardof"], 4)
    assert vectors[8] == pytest.approx(vectors[0], abs=1e-6)
    assert (vectors[9] == 0).all() and np.isfinite(vectors).all()


def test_later_items_get_vectors_in_the_same_space(tmp_path: Path):
    fitted, vectors = fit_lsa(TEXTS, 4)
    fitted.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lsa.json", "lsa.safetensors"]
    loaded = LSA.load(tmp_path)
    assert loaded.terms == fitted.terms and "tea tray" in loaded.terms
    assert loaded.components.shape == (4, len(loaded.terms))
    assert loaded.encode(TEXTS) == pytest.approx(vectors, abs=1e-6)
    # Alone, in another order, with words that nobody had: nothing of that moves a vector.
    assert loaded.encode([TEXTS[5]])[0] == pytest.approx(vectors[5], abs=1e-6)
    new = loaded.encode(["red wool hat unheardof", "unheardof", ""])
    assert new[0] == pytest.approx(vectors[0], abs=1e-6) and not new[1:].any()
    # By hand: two known terms, each once, idf = ln((1 + 8) / (1 + n)) + 1.
    idf = {"blue": np.log(9 / 3) + 1, "tea": np.log(9 / 4) + 1}
    row = sum(idf[t] * loaded.components[:, loaded.terms.index(t)] for t in idf)
    assert loaded.encode(["blue tea"])[0] == pytest.approx(row / np.linalg.norm(row), abs=1e-5)


def test_too_many_dimensions_names_the_limit():
    with pytest.raises(
        ValueError, match="dim=96 exceeds what 8 items with .* terms allow; use at most 7"
    ):
        lsa_vectors(TEXTS, 96)
    assert lsa_vectors(TEXTS, 7).shape == (8, 7)


@pytest.mark.parametrize(
    "texts", [["red hat", "blue mat", "oak tray"], ["", "", ""], ["a b", "a b"]]
)
def test_no_shared_terms(texts: list[str]):
    with pytest.raises(ValueError, match=f"no term occurs in two of the {len(texts)} item texts"):
        lsa_vectors(texts, 2)


def test_item_texts_leave_out_what_is_missing():
    catalog = pl.DataFrame(
        {
            "item_id": [7, 8, 9],
            "title": ["Hat", "Pot", "Item 9"],  # the last one stands in for a title
            "categories": [["Shop", "Hats"], None, None],
            "brand": [None, "Acme", None],
            "description": ["Warm", None, None],
        }
    )
    assert item_texts(catalog) == ["Hat. Shop, Hats. Warm", "Pot. Acme", ""]


def test_item_texts_for_language_models():
    catalog = pl.DataFrame(
        {
            "item_id": ["a", "b", "c"],
            "title": ["Hat ", None, None],
            "categories": [["Shop", "Hats"], [], ["Shop"]],
            "brand": ["Acme", None, " "],
            "description": ["Warm", None, None],
        },
        schema_overrides={"categories": pl.List(pl.String)},
    )
    assert item_texts(catalog, labelled=True) == [
        "Hat. Shop > Hats. Brand: Acme. Warm.",
        "",
        "Shop.",
    ]
    assert item_texts(catalog, ["brand", "title"], labelled=True) == ["Brand: Acme. Hat.", "", ""]
    assert item_texts(catalog, ["title", "brand"], labelled=True) == ["Hat. Brand: Acme", "", ""]
    for fields in ([], ["title", "title"], ["price"]):
        with pytest.raises(ValueError, match="must name some of title, categories"):
            item_texts(catalog, fields)
