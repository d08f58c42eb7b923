"""Vectors from behaviour."""

from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data.splits import leave_one_out
from genrec.data.time_splits import global_time, time_cutoff
from genrec.embedding import collaborative
from genrec.embedding.collaborative import (
    cooccurrence,
    cooccurrence_vectors,
    item_table_vectors,
    ppmi,
    training_histories,
)
from genrec.item_lists import ItemLists


def lists(*rows: list[int]) -> ItemLists:
    return ItemLists.from_column(pl.Series(rows, dtype=pl.List(pl.Int64)))


def as_rows(found: ItemLists) -> list[list[int]]:
    return [found.values[a:b].tolist() for a, b in itertools.pairwise(found.offsets)]


def test_counts_by_hand():
    found = cooccurrence(lists([0, 1, 2], [2, 0], [3], []), 5).toarray()
    expected = np.zeros((5, 5))
    expected[0, 1] = expected[1, 2] = 1
    expected[0, 2] = 0.5 + 1
    assert found == pytest.approx(expected + expected.T)
    near = cooccurrence(lists([0, 1, 2], [2, 0], [3], []), 5, window=1).toarray()
    expected[0, 2] = 1
    assert near == pytest.approx(expected + expected.T)
    assert cooccurrence(lists([], [1]), 3).nnz == 0


@given(st.lists(st.lists(st.integers(0, 5), max_size=7), max_size=6), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_counts_equal_the_plain_loop_however_they_are_blocked(rows: list[list[int]], window: int):
    expected = np.zeros((6, 6))
    for row in rows:
        for i, j in itertools.combinations(range(len(row)), 2):
            if row[i] != row[j] and j - i <= window:
                expected[row[i], row[j]] += 1 / (j - i)
                expected[row[j], row[i]] += 1 / (j - i)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collaborative, "_BLOCK_PAIRS", 3)
        found = cooccurrence(lists(*rows), 6, window).toarray()
    assert found == pytest.approx(expected, abs=1e-5)


def test_ppmi_by_hand():
    counts = np.array([[0, 3.0, 1], [3, 0, 0], [1, 0, 0]])
    import scipy.sparse as sp

    plain = ppmi(sp.csr_matrix(counts), 1.0).toarray()
    # P(0,1) = 3/8, P(0) = 4/8, P(1) = 3/8; P(0,2) = 1/8, P(2) = 1/8: all pairs twice as often
    assert plain == pytest.approx(np.log(2) * (counts > 0), abs=1e-6)
    smooth = ppmi(sp.csr_matrix(counts), 0.75).toarray()
    total = 4**0.75 + 3**0.75 + 1
    assert smooth[0, 1] == pytest.approx(np.log((3 / 4) / (3**0.75 / total)), abs=1e-6)
    assert smooth[2, 0] == pytest.approx(np.log(1 / (4**0.75 / total)), abs=1e-6)
    # Where items 1 and 2 meet once among many, less than by chance: no negative entries.
    counts[1, 2] = counts[2, 1] = 0.1
    counts[2, 0] = counts[0, 2] = 50
    assert ppmi(sp.csr_matrix(counts), 1.0).toarray()[1, 2] == 0


def groups(n: int = 40) -> ItemLists:
    """Sequences inside {0..4} or {5..9}, item 10 always alone, item 11 never."""
    rng = np.random.default_rng(0)
    rows = [(rng.permutation(5)[:4] + 5 * (i % 2)).tolist() for i in range(n)]
    return lists(*rows, [10], [10, 10])


def test_items_that_stand_together_get_near_vectors_and_strangers_none():
    vectors = cooccurrence_vectors(groups(), 12, 4, seed=1)
    assert vectors.shape == (12, 4) and vectors.dtype == np.float32
    cosine = vectors @ vectors.T
    inside, across = cosine[:5, :5], cosine[:5, 5:10]
    assert inside.min() > 0.5 > np.abs(across).max()
    assert np.linalg.norm(vectors[:10], axis=1) == pytest.approx(1, abs=1e-5)
    assert (vectors[10:] == 0).all()
    assert (vectors == cooccurrence_vectors(groups(), 12, 4, seed=1)).all()


def test_what_the_kept_components_do_not_describe_is_zero_not_noise():
    rows = [[0, 1, 2, 3, 4]] * 50 + [[5, 6]]
    vectors = cooccurrence_vectors(lists(*rows), 7, 1)
    described = np.linalg.norm(vectors, axis=1)
    # One component holds one of the two blocks; the other block has no direction at all.
    assert sorted(described.round(4).tolist()) in ([0.0] * 5 + [1.0] * 2, [0.0] * 2 + [1.0] * 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 13}, "collaborative_dim=13 must lie between 1 and the 12 items"),
        ({"dim": 0}, "collaborative_dim=0"),
        ({"window": 0}, "collaborative_window=0 must be at least 1"),
        ({"smoothing": 0.0}, "smoothing=0.0"),
        ({"sequences": lists([1], [2, 2])}, "nothing collaborative to learn"),
    ],
)
def test_settings_out_of_range(change: dict, message: str):
    given_ = {"sequences": groups(), "n_items": 12, "dim": 4, **change}
    with pytest.raises(ValueError, match=message):
        cooccurrence_vectors(**given_)


def shop_log(seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    length = rng.integers(1, 15, 25)
    time = np.concatenate([np.sort(rng.choice(1000, n, replace=False)) for n in length])
    return pl.DataFrame(
        {
            "user_id": np.repeat([f"u{i}" for i in range(25)], length),
            "item_index": rng.integers(0, 9, length.sum()).astype(np.int32),
            "timestamp": time,
            "position": np.concatenate([np.arange(n) for n in length]).astype(np.int32),
        }
    )


@pytest.mark.parametrize("max_history", [1, 2, 3, 20])
@pytest.mark.parametrize("protocol", ["leave-one-out", "global-time", "time-cutoff"])
def test_histories_are_the_training_part_of_the_log(protocol: str, max_history: int):
    log = shop_log()
    if protocol == "leave-one-out":
        splits = leave_one_out(log, 9, max_history)
        kept = pl.col("position") < pl.when(pl.len() >= 3).then(pl.len() - 2).otherwise(pl.len())
        train = log.filter(kept.over("user_id"))
    elif protocol == "global-time":
        splits = global_time(log, 9, max_history)
        from genrec.data.time_splits import unix_seconds

        train = log.filter(pl.col("timestamp") < unix_seconds(splits.boundaries["valid_from"]))
    else:
        splits = time_cutoff(log, 9, 600, 800, None, max_history)
        train = log.filter(pl.col("timestamp") < 600)
    expected = train.group_by("user_id", maintain_order=True).agg("item_index")["item_index"]
    shuffled = splits.train.sample(fraction=1.0, shuffle=True, seed=1)
    for rows in (splits.train, shuffled):
        assert sorted(as_rows(training_histories(rows))) == sorted(expected.to_list())


def test_given_rows_bring_what_stands_before_their_first_target():
    rows = pl.DataFrame(
        {
            "user_id": ["a", "b", "a"],
            "history_item_index": pl.Series([[1, 2], [7], [1, 2, 3]], dtype=pl.List(pl.Int32)),
            "target_item_index": pl.Series([3, 8, 4], dtype=pl.Int32),
            "supervise_from": pl.Series([2, 1, 3], dtype=pl.Int32),
            "target_position": pl.Series([2, 1, 3], dtype=pl.Int32),
        }
    )
    assert sorted(as_rows(training_histories(rows[::-1]))) == [[1, 2, 3, 4], [7, 8]]


def test_item_table_rows_of_untrained_items_say_nothing():
    table = np.array([[3.0, 4], [1, 0], [0, 0]])
    found = item_table_vectors(table, np.array([True, False, True]))
    assert found.dtype == np.float32
    assert found == pytest.approx(np.array([[0.6, 0.8], [0, 0], [0, 0]]))
    with pytest.raises(ValueError, match="a row per item"):
        item_table_vectors(table, np.array([True, False]))
