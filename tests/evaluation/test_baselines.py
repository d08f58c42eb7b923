"""Random and popularity lists, by hand."""

from __future__ import annotations

import tracemalloc

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrec.evaluation import baselines
from genrec.evaluation.baselines import (
    fill_from_order,
    item_counts,
    item_users,
    popularity,
    popularity_order,
    random_lists,
)
from genrec.item_lists import ItemLists, no_items


def lists_of(*rows: list[int]) -> ItemLists:
    return ItemLists.from_column(pl.Series(rows, dtype=pl.List(pl.Int32)))


def split_rows(*rows: tuple[str, list[int], int, int]) -> pl.DataFrame:
    return pl.DataFrame(
        rows,
        schema={
            "user_id": pl.String,
            "history_item_index": pl.List(pl.Int32),
            "target_item_index": pl.Int32,
            "supervise_from": pl.Int32,
        },
        orient="row",
    )


def test_item_lists_keep_empty_lists():
    lists = lists_of([3, 1], [], [2])
    assert lists.values.tolist() == [3, 1, 2]
    assert lists.lengths.tolist() == [2, 0, 1]
    assert lists.rows.tolist() == [0, 0, 2]
    taken = lists.take(np.array([2, 1, 0]))
    assert taken.values.tolist() == [2, 3, 1] and taken.lengths.tolist() == [1, 0, 2]
    nulls = ItemLists.from_column(pl.Series([[1], None], dtype=pl.List(pl.Int32)))
    assert nulls.lengths.tolist() == [1, 0]


def test_counts_take_every_interaction_once_though_windows_overlap():
    # One user, sequence 0 1 2 3 1, as two windows; the second repeats 1 2 3 as context.
    rows = split_rows(("u", [0, 1, 2], 3, 0), ("u", [1, 2, 3], 1, 3))
    assert item_counts(rows, 5).tolist() == [1, 2, 1, 1, 0]


def test_users_of_an_item_are_counted_once_though_they_come_back():
    # u: 0 1 1 1 2, as two windows; v: 1 0.
    rows = split_rows(("u", [0, 1, 1], 1, 0), ("u", [1, 1, 1], 2, 3), ("v", [1], 0, 0))
    assert item_users(rows, 4).tolist() == [2, 2, 1, 0]
    assert item_counts(rows, 4).tolist() == [2, 4, 1, 0]
    assert item_users(rows[:0], 4).tolist() == [0, 0, 0, 0]


def test_popularity_by_hand():
    order = popularity_order(np.array([1, 5, 3, 4]))
    assert order.tolist() == [1, 3, 2, 0]
    seen = lists_of([], [1], [1, 3, 2], [0, 1, 2, 3])
    assert popularity(order, seen, 2).tolist() == [[1, 3], [3, 2], [0, -1], [-1, -1]]


def test_equal_counts_are_not_ordered_by_index():
    order = popularity_order(np.zeros(200, dtype=int), seed=1)
    assert sorted(order.tolist()) == list(range(200))
    assert abs(np.corrcoef(order, np.arange(200))[0, 1]) < 0.3
    assert (order == popularity_order(np.zeros(200, dtype=int), seed=1)).all()


def test_fill_keeps_what_is_there_and_adds_no_item_twice():
    lists = np.array([[2, -1, -1], [3, 0, 1], [-1, -1, -1]])
    filled = fill_from_order(lists, np.array([2, 0, 3, 1]), lists_of([0], [], [1]))
    assert filled.tolist() == [[2, 3, 1], [3, 0, 1], [2, 0, 3]]
    assert lists[0].tolist() == [2, -1, -1]


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 99), st.data())
def test_random_lists_are_distinct_unseen_and_as_long_as_possible(n_items, k, seed, data):
    item_sets = st.lists(st.integers(0, n_items - 1), unique=True)
    seen = data.draw(st.lists(item_sets, min_size=1, max_size=5))
    lists = random_lists(n_items, lists_of(*seen), k, seed)
    for row, banned in zip(lists.tolist(), seen, strict=True):
        items = [item for item in row if item >= 0]
        assert len(items) == min(k, n_items - len(banned)) == len(set(items))
        assert not set(items) & set(banned) and max(items, default=0) < n_items
        assert row[len(items) :] == [-1] * (k - len(items))


def test_random_lists_are_uniform_and_seeded():
    lists = random_lists(10, no_items(20_000), 3, seed=0)
    assert (lists == random_lists(10, no_items(20_000), 3, seed=0)).all()
    for place in range(3):
        share = np.bincount(lists[:, place], minlength=10) / 20_000
        assert share == pytest.approx(0.1, abs=0.01)  # 0.1 ± 0.002, 5 sigma


def test_one_long_history_costs_no_memory_for_the_rows_beside_it():
    n_items, rng = 60_000, np.random.default_rng(0)
    seen = [rng.permutation(n_items)[:50_000].tolist(), *([item] for item in range(999))]
    order, banned = rng.permutation(n_items), lists_of(*seen)
    tracemalloc.start()
    lists = popularity(order, banned, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6  # 1,000 rows as wide as the longest are 400 MB
    first, used = lists[0].tolist(), set(seen[0])
    assert first == [item for item in order.tolist() if item not in used][:5]


@pytest.mark.parametrize("cells", [1, 100, 10**6])
def test_popularity_beyond_one_batch_matches_a_loop(monkeypatch, cells):
    monkeypatch.setattr(baselines, "_CELLS", cells)
    rng = np.random.default_rng(0)
    order = rng.permutation(30)
    seen = [rng.choice(30, rng.integers(0, 29), replace=False).tolist() for _ in range(2500)]
    lists = popularity(order, lists_of(*seen), 5)
    for row, banned in zip(lists, seen, strict=True):
        expected = [item for item in order if item not in banned][:5]
        assert row.tolist() == expected + [-1] * (5 - len(expected))
