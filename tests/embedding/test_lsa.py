"""LSA item vectors."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from genrec.embedding.lsa import item_texts, lsa_vectors

TEXTS = [
    "red wool hat", "blue wool hat", "red wool scarf", "steel tea pot", "oak tea tray",
    "steel tea tray", "cork yoga mat", "blue yoga mat",
]  # fmt: skip


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
            "title": ["Hat", "Pot"],
            "categories": [["Shop", "Hats"], None],
            "brand": [None, "Acme"],
            "description": ["Warm", None],
        }
    )
    assert item_texts(catalog) == ["Hat. Shop, Hats. Warm", "Pot. Acme"]
