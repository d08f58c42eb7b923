"""Grounding: distances and popularity by hand, filters inside the search, encoders of a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from genrec import grounding
from genrec.artifacts import Stage, write_parquet
from genrec.embedding.lsa import fit_lsa, item_texts
from genrec.grounding import TextGrounder

# Four items on a line, and one without a vector.
VECTORS = np.array([[1.0, 0], [2, 0], [4, 0], [5, 0], [0, 0]])
COUNTS = np.array([0, 10, 5, 10, 3])


def at(*places: float) -> TextGrounder:
    """Texts are encoded as places on the line, in order."""
    return TextGrounder(lambda texts: np.array([[p, 0] for p in places]), VECTORS, COUNTS)


def test_distances_by_hand():
    made = at(1.5, 4.4).ground(["a", "b"], 5)
    # From 1.5: .5 .5 2.5 3.5, and the empty item as far as the farthest; ties by catalogue row.
    assert made.items.tolist() == [[0, 1, 2, 3, 4], [2, 3, 1, 0, 4]]
    assert made.distances == pytest.approx(
        np.array([[0.5, 0.5, 2.5, 3.5, 3.5], [0.4, 0.6, 2.4, 3.4, 3.4]]), abs=1e-5
    )
    assert made.known.all()
    assert at(1.5).ground(["a"], 1).items.tolist() == [[0]]


def test_popularity_by_hand():
    made = at(1.5).ground(["a"], 5, popularity=1.0)
    # (D - .5) / 3: 0 0 2/3 1 1; over 1 + P: 1 2 1.5 2 1.3.
    assert made.items.tolist() == [[0, 1, 2, 3, 4]]
    assert made.distances[0] == pytest.approx([0, 0, 4 / 9, 1 / 2, 1 / 1.3], abs=1e-5)
    # The farthest, popular one overtakes a nearer one: 2/3 / 1.5^8 against 1 / 2^8.
    made = at(1.5).ground(["a"], 5, popularity=8.0)
    assert made.items.tolist() == [[0, 1, 3, 2, 4]]
    assert made.distances[0, 2:4] == pytest.approx([2.0**-8, 2 / 3 / 1.5**8], rel=1e-4)
    # Filters change no distance, also where the nearest item, which sets the scale, is filtered.
    filtered = at(1.5).ground(["a"], 5, popularity=8.0, seen=[np.array([0, 1])])
    assert filtered.items.tolist() == [[3, 2, 4, -1, -1]]
    assert filtered.distances[0, :3] == pytest.approx(made.distances[0, 2:])


def test_popularity_does_not_count_where_all_are_alike():
    same = TextGrounder(lambda texts: np.array([[1.5, 0]]), VECTORS, np.full(5, 7))
    weighted = same.ground(["a"], 5, popularity=3.0)
    assert weighted.items.tolist() == same.ground(["a"], 5).items.tolist()


def test_filters_are_inside_the_search():
    made = at(1.5, 1.5, 1.5).ground(
        ["a", "b", "c"], 3, seen=[np.array([0]), np.array([], int), np.array([1, 2, 2, 3])],
        allowed=np.array([3, 2, 1, 4]),
    )  # fmt: skip
    assert made.items.tolist() == [[1, 2, 3], [1, 2, 3], [4, -1, -1]]
    assert np.isinf(made.distances[2, 1:]).all()
    everything = at(1.5).ground(["a"], 3, seen=[np.arange(5)])
    assert everything.items.tolist() == [[-1, -1, -1]] and everything.known.all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_never_fewer_than_k_while_k_are_allowed(data):
    n, dim = data.draw(st.integers(1, 12)), 3
    whole = st.integers(-3, 3).map(float)
    vectors = data.draw(arrays(np.float64, (n, dim), elements=whole))
    queries = data.draw(arrays(np.float64, (2, dim), elements=whole))
    counts = data.draw(arrays(np.int64, n, elements=st.integers(0, 5)))
    rows = st.lists(st.integers(0, n - 1), max_size=n)
    seen = [np.array(data.draw(rows), dtype=int) for _ in range(2)]
    allowed = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n)))
    k, gamma = data.draw(st.integers(1, n + 2)), data.draw(st.sampled_from([0.0, 1.0, 4.0]))
    made = TextGrounder(lambda texts: queries, vectors, counts).ground(
        ["a", "b"], k, gamma, seen, allowed
    )
    for row in range(2):
        left = sorted(set(allowed.tolist()) - set(seen[row].tolist()))
        found = made.items[row][made.items[row] >= 0].tolist()
        if not made.known[row]:
            assert not found and not queries[row].any()
            continue
        assert len(found) == min(k, len(left)) == len(set(found)) and set(found) <= set(left)
        distance = np.linalg.norm(queries[row] - vectors, axis=1)
        real = vectors.any(axis=1)
        distance[~real] = distance[real].max(initial=0)
        if gamma:
            low, high = distance.min(), distance.max()
            distance = (distance - low) / ((high - low) or 1)
            share = counts / (counts.sum() or 1)
            spread = share.max() - share.min()
            distance /= (1 + (share - share.min()) / (spread or 1)) ** gamma
        best = sorted(distance[left])[: len(found)]
        assert made.distances[row, : len(found)] == pytest.approx(best, abs=2e-3)
        assert distance[found] == pytest.approx(best, abs=2e-3)


def test_blocks_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    vectors, queries = rng.normal(size=(50, 8)), rng.normal(size=(23, 8))
    grounder = TextGrounder(lambda texts: queries, vectors, rng.integers(0, 9, 50))
    seen = [rng.integers(0, 50, 5) for _ in range(23)]
    whole = grounder.ground(["x"] * 23, 7, 2.0, seen)
    monkeypatch.setattr(grounding, "_BLOCK", 120)
    parts = grounder.ground(["x"] * 23, 7, 2.0, seen)
    assert (parts.items == whole.items).all()
    assert parts.distances == pytest.approx(whole.distances, abs=1e-5)


def test_bad_arguments():
    grounder = at(1.5)
    for settings_, message in (
        ({"k": 0}, "k=0 must be at least 1"),
        ({"k": 2, "popularity": -1.0}, "popularity=-1.0 must be a number of at least 0"),
        ({"k": 2, "popularity": float("nan")}, "popularity=nan must be"),
        ({"k": 2, "seen": []}, "seen has 0 entries for 1 texts"),
        ({"k": 2, "allowed": np.array([], int)}, "the allow-list is empty"),
        ({"k": 2, "allowed": np.array([5])}, r"catalogue rows 5..5 were given; there are 0..4"),
        ({"k": 2, "seen": [np.array([-1])]}, r"catalogue rows -1..-1 were given"),
    ):
        with pytest.raises(ValueError, match=message):
            grounder.ground(["a"], **settings_)
    with pytest.raises(ValueError, match="shape .* for 4 items; one row per item"):
        TextGrounder(lambda texts: VECTORS, VECTORS, COUNTS[:4])
    none = TextGrounder(lambda texts: VECTORS[:0], VECTORS, COUNTS).ground([], 3)
    assert none.items.shape == (0, 3)


def save_embedded(
    run: Path, catalog: pl.DataFrame, config: dict, inputs: dict | None = None
) -> Path:
    """prepare and embed stages around LSA vectors of the catalogue's text."""
    stage = Stage(run, "prepare", {})
    assert not stage.is_done()
    write_parquet(stage.folder / "catalog.parquet", catalog)
    stage.finish(rows=len(catalog))
    local = ["device", "batch_size", *(["model_name_or_path"] if inputs else [])]  # as embed does
    stage = Stage(run, "embed", config, ["prepare"], files=inputs or {}, ignore=local)
    assert not stage.is_done()
    lsa, vectors = fit_lsa(item_texts(catalog), 8)
    lsa.save(stage.folder)
    np.save(stage.folder / "item_embeddings.npy", vectors)
    stage.finish(rows=len(vectors))
    return run


def test_a_run_with_lsa(tiny, tmp_path):
    catalog = tiny.shop().catalog
    grounder = TextGrounder.load(save_embedded(tmp_path / "run", catalog, {"method": "lsa"}))
    texts = item_texts(catalog)
    made = grounder.ground([texts[7], "steel tea pot", "zzz qqq", ""], 5)
    # LSA knows no single letters, so two items have the same text; ties go by catalogue row.
    assert made.items[0, :2].tolist() == [2, 7]
    assert made.distances[0, :2] == pytest.approx(np.zeros(2), abs=1e-3)
    assert made.known.tolist() == [True, True, False, False]
    titles = catalog["title"].to_list()
    assert all("tea" in titles[i] for i in made.items[1, :4])
    assert (made.items[2:] == -1).all()
    with pytest.raises(ValueError, match="prompt=.query: . and .* don't go with LSA"):
        TextGrounder.load(tmp_path / "run", prompt="query: ")


def test_runs_without_a_text_encoder_are_refused(tiny, tmp_path):
    catalog = tiny.shop().catalog
    for method in ("npy", "collaborative"):
        run = save_embedded(tmp_path / method, catalog, {"method": method})
        with pytest.raises(ValueError, match=f"method={method}, which can't encode a text; embed"):
            TextGrounder.load(run)
    with pytest.raises(ValueError, match="stage 'embed' has not finished"):
        TextGrounder.load(tmp_path / "nothing")


def test_a_run_with_a_language_model(tiny, tmp_path):
    """The run's own settings are used, another prompt where it is given, and the same files."""
    from genrec.embedding.lm_pooling import lm_vectors

    catalog = tiny.shop().catalog
    tokenizer = tiny.tokenizer()
    folder = tmp_path / "model"
    tiny.lm(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings_ = {
        "model_name_or_path": str(folder), "max_length": 40, "normalize": True, "dtype": "float32",
        "batch_size": 4, "prompt": "item: ", "pooling": "last", "device": None,
    }  # fmt: skip
    files = {
        f"model/{p.name}": p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")
    }
    run = save_embedded(tmp_path / "run", catalog, {"method": "lm", **settings_}, files)
    with pytest.raises(ValueError, match="a local model, whose folder a run does not record; give"):
        TextGrounder.load(run)
    encode = TextGrounder.load(run, model_name_or_path=str(folder)).encode
    assert np.array_equal(encode(["tea pot"]), lm_vectors(["tea pot"], **settings_))
    asked = TextGrounder.load(run, "query: ", str(folder)).encode(["tea pot"])
    assert np.array_equal(asked, lm_vectors(["tea pot"], **{**settings_, "prompt": "query: "}))
    assert not np.allclose(asked, encode(["tea pot"]))
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    with pytest.raises(ValueError, match="config.json is missing or is not the file that embedded"):
        TextGrounder.load(run, model_name_or_path=str(folder))
    named = save_embedded(tmp_path / "named", catalog, {"method": "lm", **settings_})
    with pytest.raises(ValueError, match="model_name_or_path='other' did not embed the items"):
        TextGrounder.load(named, model_name_or_path="other")
    assert TextGrounder.load(named).encode(["tea"]).shape == (1, 32)
