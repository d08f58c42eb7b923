"""How much history: `min_history` of held-out rows and the step between training windows."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data.leaks import check_splits
from genrec.data.splits import leave_one_out
from genrec.data.time_splits import global_time, time_cutoff


def log_of(lengths: dict[str, int], starts: dict[str, int] | None = None) -> pl.DataFrame:
    """Users with 0, 1, 2, … as items, one a second from their start on."""
    rows = [
        (user, place, (starts or {}).get(user, 0) + place, place)
        for user, length in lengths.items()
        for place in range(length)
    ]
    schema = {"user_id": pl.String, "item_index": pl.Int32, "timestamp": pl.Int64,
              "position": pl.Int32}  # fmt: skip
    return pl.DataFrame(rows, schema=schema, orient="row")


def test_leave_one_out_trains_on_users_who_are_too_short_to_be_evaluated():
    log = log_of({"a": 3, "b": 4, "c": 5})
    splits = leave_one_out(log, 5, min_history=2)
    assert splits.test["user_id"].to_list() == ["b", "c"]
    assert splits.valid["target_position"].to_list() == [2, 3]
    assert splits.train_only_users == 1
    assert splits.train_count.tolist() == [3, 3, 2, 0, 0]  # all of a, two of b, three of c
    check_splits(splits.train, splits.valid, splits.test, log, "leave-one-out", 5)
    default = leave_one_out(log, 5)
    assert default.sha256() == leave_one_out(log, 5, min_history=1).sha256()
    assert default.test.height == 3


def test_global_time_drops_rows_with_less_history():
    # a lasts from 0 to 9, b from 6 to 9; validation starts at 6, test at 8.
    log = log_of({"a": 10, "b": 4}, {"b": 6})
    settings_of = {"n_items": 10, "shares": (0.5, 0.25, 0.25)}
    every, longer = (global_time(log, min_history=n, **settings_of) for n in (1, 3))
    assert every.valid.select("user_id", "target_position").rows() == [
        ("a", 6), ("a", 7), ("b", 1),
    ]  # fmt: skip
    assert every.test.filter(user_id="b")["target_position"].to_list() == [2, 3]
    assert longer.valid["user_id"].to_list() == ["a", "a"]
    assert longer.test.filter(user_id="b")["target_position"].to_list() == [3]
    assert longer.dropped == {
        "valid_without_history": every.dropped["valid_without_history"],
        "test_without_history": 0, "valid_short_history": 1, "test_short_history": 1,
    }  # fmt: skip
    assert longer.train.equals(every.train)
    check_splits(longer.train, longer.valid, longer.test, log, "global-time", 10)


def test_time_cutoff_evaluates_users_with_enough_history():
    log = log_of({"a": 10, "b": 6}, {"b": 4})
    every, longer = (time_cutoff(log, 10, 6, 8, min_history=n) for n in (1, 3))
    assert every.valid["target_position"].to_list() == [6, 2]
    assert longer.valid["target_position"].to_list() == [6]
    assert longer.test["target_position"].to_list() == [8, 4]
    assert longer.dropped["valid_short_history"] == 2  # b's items of the period
    assert "valid_short_history" not in every.dropped
    check_splits(longer.train, longer.valid, longer.test, log, "time-cutoff", 10)


def test_a_step_of_one_gives_every_later_item_the_longest_history():
    splits = leave_one_out(log_of({"a": 8}), 8, max_history=3, window_step=1)
    assert splits.train["history_item_index"].to_list() == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert splits.train["supervise_from"].to_list() == [0, 3, 3]
    assert splits.train["target_item_index"].to_list() == [3, 4, 5]
    half = leave_one_out(log_of({"a": 12}), 12, max_history=4, window_step=2)
    assert half.sha256() == leave_one_out(log_of({"a": 12}), 12, max_history=4).sha256()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 9), st.data())
def test_every_training_interaction_is_supervised_once_whatever_the_step(lengths, longest, data):
    step = data.draw(st.integers(1, longest))
    log = log_of({f"u{n}": length for n, length in enumerate(lengths)})
    splits = leave_one_out(log, 40, longest, window_step=step)
    found = []
    for row in splits.train.iter_rows(named=True):
        items = [*row["history_item_index"], row["target_item_index"]]
        assert len(items) <= longest + 1
        found += [(row["user_id"], item) for item in items[row["supervise_from"] :]]
    expected = [
        (f"u{n}", item)
        for n, length in enumerate(lengths)
        for item in range(length if length < 3 else length - 2)
    ]
    assert found == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_history": 0}, "min_history=0 must be at least 1"),
        ({"max_history": 0}, "max_history=0 must be at least 1"),
        ({"window_step": 0}, "window_step=0 must lie in 1..max_history=20"),
        ({"window_step": 21}, "window_step=21 must lie in 1..max_history=20"),
    ],
)
def test_lengths_out_of_range(values: dict, message: str):
    log = log_of({"a": 10, "b": 10})
    for make in (
        lambda: leave_one_out(log, 10, **values),
        lambda: global_time(log, 10, **values),
        lambda: time_cutoff(log, 10, 4, 8, **values),
    ):
        with pytest.raises(ValueError, match=message):
            make()
