"""Windows and lists from places in the log, against plain Python."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data import split_rows
from genrec.data.split_rows import UserSequences, list_column, train_counts

N_ITEMS = 7
SEQUENCES = st.lists(
    st.lists(st.integers(0, N_ITEMS - 1), min_size=1, max_size=9), min_size=1, max_size=6
)


def log_of(sequences: list[list[int]]) -> pl.DataFrame:
    rows = [(f"u{u}", i, p) for u, items in enumerate(sequences) for p, i in enumerate(items)]
    table = pl.DataFrame(rows, schema=["user_id", "item_index", "position"], orient="row")
    kinds = {"item_index": pl.Int32, "position": pl.Int32}
    return table.cast(kinds).with_columns(timestamp=pl.col("position").cast(pl.Int64))


@pytest.fixture(params=[1, 4, 1 << 22])
def block(request, monkeypatch):
    monkeypatch.setattr(split_rows, "_BLOCK", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    "sequences", [[[1]], [[0, 0, 0], [0, 1, 0]], [[5, 6, 5], [5], [6, 6, 1, 6]], [[3, 2, 1, 0]] * 5]
)
def test_first_meetings_in_blocks_of_users(sequences):
    log = UserSequences.of(log_of(sequences))
    expected = [item not in items[:i] for items in sequences for i, item in enumerate(items)]
    assert log.first_meetings(N_ITEMS).tolist() == expected
    assert log.first_meetings(N_ITEMS).tolist() == expected  # the second time, too


@settings(deadline=None)
@given(SEQUENCES)
def test_first_meetings_of_any_log(sequences):
    log = UserSequences.of(log_of(sequences))
    expected = [item not in items[:i] for items in sequences for i, item in enumerate(items)]
    assert log.first_meetings(N_ITEMS).tolist() == expected


def test_keys_that_leave_no_room_for_a_place_are_sorted_otherwise():
    keys = np.array([1 << 61, 3, 1 << 61, 3, 0])
    assert sorted(split_rows._first_places(keys)) == [0, 1, 4]
    assert split_rows._first_places(keys[:0]).tolist() == []


@settings(deadline=None)
@given(SEQUENCES, st.data())
def test_train_counts_and_lists(sequences, data):
    log = UserSequences.of(log_of(sequences))
    length = [data.draw(st.integers(0, len(items))) for items in sequences]
    trained = [item for items, n in zip(sequences, length, strict=True) for item in items[:n]]
    counted = train_counts(log, np.array(length), N_ITEMS)
    assert counted.tolist() == [trained.count(item) for item in range(N_ITEMS)]
    assert counted.dtype == np.int32
    end = log.start + np.array(length)
    for sort, way in ((False, list), (True, sorted)):
        column = list_column(log.items, log.start, end, sort=sort)
        expected = [way(items[:n]) for items, n in zip(sequences, length, strict=True)]
        assert column.to_list() == expected and column.dtype == pl.List(pl.Int32)


@pytest.mark.parametrize(
    ("users", "positions", "times"),
    [
        ("aab", [0, 1, 1], [0, 1, 2]),  # a block that doesn't begin
        ("aba", [0, 1, 0], [0, 1, 2]),  # two users in a block
        ("aba", [0, 0, 1], [0, 1, 2]),  # a block in two parts
        ("aba", [0, 0, 0], [0, 1, 2]),
        ("aaa", [0, 2, 1], [0, 1, 2]),
        ("aaa", [0, 1, 1], [0, 1, 2]),
        ("aaa", [1, 2, 3], [0, 1, 2]),
        ("aaa", [0, 1, 2], [0, 2, 1]),  # back in time
    ],
)
def test_a_log_out_of_order_is_refused(users, positions, times):
    table = pl.DataFrame(
        {"user_id": list(users), "item_index": [1, 2, 3], "position": positions, "timestamp": times}
    )
    with pytest.raises(ValueError, match="one block per user"):
        UserSequences.of(table)


def test_time_may_start_again_with_the_next_user():
    table = pl.DataFrame(
        {
            "user_id": ["a", "a", "b"],
            "item_index": [1, 2, 3],
            "position": [0, 1, 0],
            "timestamp": [5, 5, 1],
        }
    )
    log = UserSequences.of(table)
    assert log.start.tolist() == [0, 2] and log.length.tolist() == [2, 1]
    assert log.owner.tolist() == [0, 0, 1]
