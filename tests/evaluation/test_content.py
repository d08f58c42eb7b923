"""Content-kNN: nearest items against brute force, and items that nobody has had yet."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from genrec.evaluation import content
from genrec.evaluation.baselines import UnfitData
from genrec.evaluation.content import ContentSettings, nearest_items, tune_content_knn
from genrec.evaluation.profiles import recommend_by_similarity
from genrec.item_lists import ItemLists


def lists_of(*rows: list[int]) -> ItemLists:
    return ItemLists.from_column(pl.Series(rows, dtype=pl.List(pl.Int32)))


def rows_of(*rows: tuple[list[int], int]) -> pl.DataFrame:
    return pl.DataFrame(
        [(f"u{i}", history, target, 0) for i, (history, target) in enumerate(rows)],
        schema={
            "user_id": pl.String,
            "history_item_index": pl.List(pl.Int32),
            "target_item_index": pl.Int32,
            "supervise_from": pl.Int32,
        },
        orient="row",
    )


@pytest.mark.parametrize("batch", [1024, 16])
def test_nearest_items_equal_brute_force(monkeypatch, batch):
    monkeypatch.setattr(content, "BATCH_ROWS", batch)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(45, 6)) * rng.uniform(0.1, 5, (45, 1))
    vectors[11] = 0  # an item without text
    found = nearest_items(vectors, 5).toarray()
    for item in range(45):
        cosine = np.array(
            [
                v @ vectors[item] / max(np.linalg.norm(v) * np.linalg.norm(vectors[item]), 1e-12)
                for v in vectors
            ]
        )
        cosine[item] = -1
        nearest = np.argsort(-cosine)[:5]
        expected = np.zeros(45)
        expected[nearest] = np.maximum(cosine[nearest], 0)
        np.testing.assert_allclose(found[item], expected, atol=1e-6)
    assert not found[11].any() and not found[:, 11].any()


def test_more_neighbours_than_items():
    vectors = np.array([[1.0, 0], [1, 1], [-1, 0]])
    found = nearest_items(vectors, 200).toarray()
    np.testing.assert_allclose(found, [[0, 0.5**0.5, 0], [0.5**0.5, 0, 0], [0, 0, 0]], atol=1e-6)


def test_an_item_without_interactions_is_recommended():
    # Items 0 to 4 are popular; 5 has none, but is next to item 0.
    rows = rows_of(*[([0, 1, 2], 3)] * 9, ([1], 4))
    vectors = np.eye(6) + 0.01
    vectors[5] = vectors[0] * 2 + 0.001
    weights = nearest_items(vectors, 3).power(4)
    order = np.array([3, 2, 1, 0, 4, 5])  # cold items come last
    found = recommend_by_similarity(weights, order, lists_of([2, 0]), lists_of([2, 0]), 2, 0.6)
    assert found[0, 0] == 5
    best, trials = tune_content_knn(
        nearest_items(vectors, 200),
        rows,
        rows_of(([2, 0], 5), ([0], 5)),
        lists_of([2, 0], [0]),
        k=1,
    )
    assert max(trial["ndcg"] for trial in trials) == 1 and best in [
        ContentSettings(**trial["settings"]) for trial in trials
    ]


def test_tuning_finds_the_planted_power():
    # Item 3 is half like item 0 (cosine .5) and item 4 like item 1 alone (cosine .6), the older
    # item of the history. Decay 1 and power 1: 4 wins; a strong decay: 3 wins.
    vectors = np.zeros((5, 6))
    vectors[0, 0] = vectors[1, 1] = vectors[2, 2] = 1
    vectors[3, [0, 3]] = [0.5, 0.75**0.5]
    vectors[4, [1, 4]] = [0.6, 0.8]
    rows = rows_of(([0], 1), ([2], 0))
    history = lists_of([1, 0])
    grid = {"power": [1.0], "decay": [0.2, 1.0]}
    for target, decay in ((3, 0.2), (4, 1.0)):
        valid = rows_of(([1, 0], target))
        best, _ = tune_content_knn(nearest_items(vectors, 200), rows, valid, history, grid, k=1)
        assert best.decay == decay


def test_self_weight_brings_back_items_of_the_history():
    weights = nearest_items(np.eye(4), 3)
    found = recommend_by_similarity(
        weights, np.arange(4), lists_of([3, 2]), lists_of([]), 2, 0.5, self_weight=0.1
    )
    assert found.tolist() == [[2, 3]]


def test_catalogues_too_large_to_compare_all_pairs_are_refused(monkeypatch):
    monkeypatch.setattr(content, "MAX_ITEMS", 4)
    assert nearest_items(np.eye(4) + 1, 2).nnz == 8
    with pytest.raises(UnfitData, match="all pairs of 5 items; it is meant for at most 4: leave"):
        nearest_items(np.eye(5), 2)


def test_no_validation_rows():
    rows = rows_of(([0], 1))
    with pytest.raises(ValueError, match="content-kNN is tuned on validation rows"):
        tune_content_knn(nearest_items(np.eye(2), 1), rows, rows[:0], lists_of())
    assert ContentSettings().describe() == "neighbours=200, power=4, decay=0.6, self_weight=0"
