"""Flat lists of items against plain Python lists."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrec.item_lists import ItemLists, contains, no_items

N_ITEMS = 6
ROWS = st.lists(st.lists(st.integers(0, N_ITEMS - 1), max_size=5), min_size=1, max_size=6)


def lists_of(*rows: list[int] | None) -> ItemLists:
    return ItemLists.from_column(pl.Series(rows, dtype=pl.List(pl.Int32)))


def back(lists: ItemLists) -> list[list[int]]:
    ends = zip(lists.offsets[:-1], lists.offsets[1:], strict=True)
    return [lists.values[a:b].tolist() for a, b in ends]


@given(ROWS)
def test_round_trip_and_facts(rows):
    lists = lists_of(*rows)
    assert back(lists) == rows and len(lists) == len(rows)
    assert lists.lengths.tolist() == [len(row) for row in rows]
    assert lists.rows.tolist() == [i for i, row in enumerate(rows) for _ in row]
    assert lists.values.dtype == lists.offsets.dtype == np.int64


@given(ROWS, st.data())
def test_take_in_any_order_and_repeated(rows, data):
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    taken = lists_of(*rows).take(np.array(picked, dtype=np.int64))
    assert back(taken) == [rows[i] for i in picked]


@given(ROWS)
def test_matrix_counts_repeats_and_leaves_the_lists_alone(rows):
    lists = lists_of(*rows)
    expected = [[row.count(item) for item in range(N_ITEMS)] for row in rows]
    assert lists.matrix(N_ITEMS).toarray().tolist() == expected
    assert back(lists) == rows  # SciPy sorts indices in place where it shares them


@given(ROWS)
def test_keys_and_membership(rows):
    keys = lists_of(*rows).keys(N_ITEMS)
    assert (np.diff(keys) >= 0).all()
    asked = np.arange(len(rows) * N_ITEMS).reshape(len(rows), N_ITEMS)
    expected = [[item in row for item in range(N_ITEMS)] for row in rows]
    assert contains(keys, asked).tolist() == expected


def test_nulls_are_empty_lists_but_null_items_are_refused():
    assert back(lists_of([1], None, [], [2, 2])) == [[1], [], [], [2, 2]]
    assert back(lists_of()) == []
    with pytest.raises(AssertionError, match="null items"):
        lists_of([1, None])


def test_slices_of_a_column_are_read_from_their_own_start():
    column = pl.Series([[1, 2], [3], [], [4]], dtype=pl.List(pl.Int64))
    assert back(ItemLists.from_column(column[1:])) == [[3], [], [4]]


def test_no_items_filters_nothing():
    none = no_items(3)
    assert back(none) == [[], [], []]
    assert not contains(none.keys(4), np.arange(12).reshape(3, 4)).any()
    assert contains(np.array([2, 5]), np.array([[6, 5], [2, 0]])).tolist() == [
        [False, True],
        [True, False],
    ]
