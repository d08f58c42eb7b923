"""Item-kNN: similarities of four users by hand, the search, and the bars on real data."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.columns import HISTORY, SEEN, TARGET
from genrec.data.cleaning import clean
from genrec.data.readers import RawData, read_movielens, read_sequences
from genrec.data.splits import Splits, leave_one_out
from genrec.evaluation.knn import (
    ITEM_KNN_GRID,
    SEQUENTIAL_KNN_GRID,
    ItemKNN,
    KNNSettings,
    tune_knn,
)
from genrec.item_lists import ItemLists, no_items
from genrec.metrics import hit_rate_at_k, ndcg_at_k

N_ITEMS = 5


def rows_of(*rows: tuple[str, list[int], int]) -> pl.DataFrame:
    return pl.DataFrame(
        [(user, history, target, 0) for user, history, target in rows],
        schema={
            "user_id": pl.String,
            "history_item_index": pl.List(pl.Int32),
            "target_item_index": pl.Int32,
            "supervise_from": pl.Int32,
        },
        orient="row",
    )


def lists_of(*rows: list[int]) -> ItemLists:
    return ItemLists.from_column(pl.Series(rows, dtype=pl.List(pl.Int32)))


# Users of the items: 0 {a, b, c}, 1 {a, b}, 2 {a, d}, 3 {c, d}; item 4 has none.
FOUR_USERS = rows_of(("a", [0, 1], 2), ("b", [0], 1), ("c", [0], 3), ("d", [2], 3))


def test_cosine_by_hand():
    knn = ItemKNN(FOUR_USERS, N_ITEMS, KNNSettings())
    expected = np.zeros((N_ITEMS, N_ITEMS))
    expected[0, 1] = expected[1, 0] = 2 / math.sqrt(3 * 2)
    expected[0, 2] = expected[2, 0] = 1 / math.sqrt(3 * 2)
    expected[0, 3] = expected[3, 0] = 1 / math.sqrt(3 * 2)
    expected[1, 2] = expected[2, 1] = 1 / 2
    expected[2, 3] = expected[3, 2] = 1 / 2
    np.testing.assert_allclose(knn.similarity.toarray(), expected)


def test_neighbours_and_shrinkage():
    knn = ItemKNN(FOUR_USERS, N_ITEMS, KNNSettings(neighbours=1, shrinkage=1.0))
    similarity = knn.similarity.toarray()
    assert similarity[0, 1] == pytest.approx(2 / (math.sqrt(6) + 1))
    assert (similarity > 0).sum(axis=1).tolist() == [1, 1, 1, 1, 0]


def test_decay_gives_the_last_item_the_full_weight():
    knn = ItemKNN(FOUR_USERS, N_ITEMS, KNNSettings(decay=0.5))
    # History 1, 3 (latest). Item 0: .5 * .816 + .408 = .816; item 2: .5 * .5 + .5 = .75.
    ranked = knn.recommend(lists_of([1, 3]), lists_of([1, 3]), 3)
    assert ranked.tolist() == [[0, 2, 4]]  # 4 by popularity: nothing else is left
    # Decay .1: item 0 .0816 + .408 = .490, item 2 .05 + .5 = .55: the order turns.
    assert knn.recommend(lists_of([1, 3]), lists_of([1, 3]), 2, decay=0.1).tolist() == [[2, 0]]


def test_seen_items_are_recommended_only_without_the_filter():
    knn = ItemKNN(FOUR_USERS, N_ITEMS, KNNSettings(decay=1.0))
    # From history 0, 2: 1 gets .816 + .5, 3 .408 + .5, 0 and 2 .408 each (0 is more popular).
    history = lists_of([0, 2])
    assert knn.recommend(history, history, 4).tolist() == [[1, 3, 4, -1]]
    assert knn.recommend(history, no_items(1), 4).tolist() == [[1, 3, 0, 2]]


def test_an_empty_history_falls_back_to_popularity():
    knn = ItemKNN(FOUR_USERS, N_ITEMS, KNNSettings())
    ranked = knn.recommend(lists_of([], [4]), no_items(2), 5)
    assert ranked[0].tolist() == knn.order.tolist() == ranked[1].tolist()
    assert ranked[0, 0] == 0 and ranked[0, -1] == 4


def test_lag_weights_by_hand():
    rows = rows_of(("a", [0, 1, 2], 3), ("b", [1], 0))
    knn = ItemKNN(rows, N_ITEMS, KNNSettings(lag_power=1.0, backward=0.25, window=2))
    s = knn.similarity.toarray()
    # Users per item: 0 and 1 two, 2 and 3 one. Pair 0 before 1 once (a), 1 before 0 once (b).
    assert s[0, 1] == pytest.approx((1 + 0.25) / 2) == s[1, 0]
    assert s[0, 2] == pytest.approx(0.5 / math.sqrt(2))  # lag 2, forwards
    assert s[2, 0] == pytest.approx(0.25 * 0.5 / math.sqrt(2))  # the same pair, backwards
    assert s[2, 3] == pytest.approx(1) and s[3, 2] == pytest.approx(0.25)
    assert s[0, 3] == 0 == s[3, 0]  # lag 3 is outside the window


def test_overlapping_windows_count_pairs_once():
    whole = rows_of(("a", [0, 1, 2], 3))
    first, second = rows_of(("a", [0, 1], 2)), rows_of(("a", [1, 2], 3))
    windows = pl.concat([first, second.with_columns(pl.lit(2, pl.Int32).alias("supervise_from"))])
    settings = KNNSettings(lag_power=1.0, window=1)
    one = ItemKNN(whole, N_ITEMS, settings).similarity.toarray()
    np.testing.assert_allclose(ItemKNN(windows, N_ITEMS, settings).similarity.toarray(), one)


def test_sparse_ranking_equals_dense_ranking_across_batches():
    rng = np.random.default_rng(3)
    sequences = [rng.choice(300, rng.integers(2, 9), replace=False).tolist() for _ in range(2300)]
    rows = rows_of(*[(f"u{i}", s[:-1], s[-1]) for i, s in enumerate(sequences)])
    knn = ItemKNN(rows, 300, KNNSettings(decay=0.8, neighbours=20))
    history = lists_of(*[s[:-1] for s in sequences])
    lists = knn.recommend(history, history, 7)
    similarity = knn.similarity.toarray()
    tie = np.argsort(knn.order)
    for i in range(0, 2300, 97):
        items = sequences[i][:-1]
        weights = 0.8 ** np.arange(len(items))[::-1]
        score = weights @ similarity[items]
        score[items] = -1
        expected = np.lexsort((tie, -score))[:7]
        np.testing.assert_allclose(score[lists[i]], score[expected])
        assert len(set(lists[i].tolist())) == 7 and not set(lists[i]) & set(items)


def test_tuning_picks_the_best_trial_and_tries_each_once():
    rows = rows_of(*[(f"u{i}", [i % 4, (i + 1) % 4], 4 + i % 4) for i in range(40)])
    valid = rows_of(*[(f"u{i}", [i % 4, (i + 1) % 4], 4 + i % 4) for i in range(40)])
    seen = ItemLists.from_column(valid[HISTORY])
    grid = {"shrinkage": [0.0, 2.0], "neighbours": [1, 8], "decay": [0.3, 1.0]}
    best, trials = tune_knn(rows, valid, seen, 8, KNNSettings(), grid, k=2)
    assert best in [KNNSettings(**trial["settings"]) for trial in trials]
    settings = [tuple(trial["settings"].items()) for trial in trials]
    assert len(set(settings)) == len(settings)
    lists = ItemKNN(rows, 8, best).recommend(seen, seen, 2)
    assert max(t["ndcg"] for t in trials) == ndcg_at_k(lists, valid[TARGET].to_numpy(), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decay": 0.0}, "decay=0.0"),
        ({"decay": 1.5}, "decay=1.5"),
        ({"neighbours": 0}, "neighbours=0"),
        ({"shrinkage": -1.0}, "shrinkage=-1.0"),
    ],
)
def test_impossible_settings_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(KNNSettings(), **changes)


def test_nothing_to_fit_or_tune_on_raises():
    with pytest.raises(ValueError, match="no rows to fit on"):
        ItemKNN(FOUR_USERS[:0], N_ITEMS, KNNSettings())
    with pytest.raises(ValueError, match="tuned on validation rows"):
        tune_knn(FOUR_USERS, FOUR_USERS[:0], no_items(0), N_ITEMS, KNNSettings(), {})


def split_of(raw: RawData) -> tuple[Splits, int]:
    data = clean(raw)
    return leave_one_out(data.interactions, data.catalog.height), data.catalog.height


def scores(splits: Splits, n_items: int, start: KNNSettings, grid: dict) -> tuple[float, float]:
    seen_valid, seen = (ItemLists.from_column(t[SEEN]) for t in (splits.valid, splits.test))
    best, _ = tune_knn(splits.train, splits.valid, seen_valid, n_items, start, grid)
    history = ItemLists.from_column(splits.test[HISTORY])
    lists = ItemKNN(splits.train, n_items, best).recommend(history, seen, 10)
    target = splits.test[TARGET].to_numpy().astype(np.int64)
    return hit_rate_at_k(lists, target, 10), ndcg_at_k(lists, target, 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cosine", "sequential"),
    [
        ("amazon2014-beauty", (0.065, 0.039), (0.085, 0.053)),
        ("movielens-100k", (0.167, 0.093), (0.21, 0.11)),
    ],
)
def test_knn_is_as_strong_as_it_should_be(genrec_data: Path, name, cosine, sequential):
    folder = genrec_data / name
    if name == "movielens-100k":
        splits, n_items = split_of(read_movielens(folder))
    else:
        splits, n_items = split_of(read_sequences(folder / "sequences.txt", folder / "items.jsonl"))
    for start, grid, bar in (
        (KNNSettings(), ITEM_KNN_GRID, cosine),
        (KNNSettings(lag_power=0.5), SEQUENTIAL_KNN_GRID, sequential),
    ):
        hit_rate, ndcg = scores(splits, n_items, start, grid)
        assert hit_rate >= bar[0] and ndcg >= bar[1]
        assert hit_rate < 1.2 * bar[0], "too good: does a target leak into the fit?"


def test_self_weight_lets_an_item_speak_for_itself():
    """With items allowed again, a heavy self weight puts the newest item of the history first."""
    history = ItemLists.from_column(pl.Series([[0, 1], [2]], dtype=pl.List(pl.Int32)))
    plain = ItemKNN(FOUR_USERS, N_ITEMS, KNNSettings())
    lists = plain.recommend(history, no_items(2), 1, self_weight=100.0)
    assert lists[:, 0].tolist() == [1, 2]
    same = ItemKNN(FOUR_USERS, N_ITEMS, KNNSettings(self_weight=100.0))
    assert (same.recommend(history, no_items(2), 1) == lists).all()
    assert (plain.recommend(history, history, 3, self_weight=100.0)[0] != 1).all()
