"""Splits by time: hand-computed rows, and the properties that make them honest."""

from __future__ import annotations

from datetime import date, datetime

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from genrec.columns import (
    HISTORY,
    RELEVANT,
    ROW_ID,
    SEEN,
    SUPERVISE_FROM,
    TARGET,
    TARGET_POSITION,
    TARGET_TIME,
    USER_ID,
)
from genrec.data.leaks import check_splits
from genrec.data.splits import Splits
from genrec.data.time_splits import global_time, time_cutoff, unix_seconds

DAY = 86_400
N_ITEMS = 7
# Of each user the (time, item) pairs in order.
Events = dict[str, list[tuple[int, int]]]


def log_of(events: Events) -> pl.DataFrame:
    rows = [
        {"user_id": user, "item_index": item, "timestamp": time, "position": place}
        for user, pairs in events.items()
        for place, (time, item) in enumerate(pairs)
    ]
    return pl.DataFrame(rows, schema_overrides={"item_index": pl.Int32, "position": pl.Int32})


def short(rows: pl.DataFrame) -> list[tuple[str, list[int], int]]:
    return list(rows.select(USER_ID, HISTORY, TARGET).iter_rows())


SHOP: Events = {
    "a": [(1, 0), (2, 1), (7, 2), (8, 0), (9, 3)],
    "b": [(3, 4), (5, 5)],
    "c": [(4, 1), (6, 6)],
    "d": [(10, 2)],
}


def test_global_time_by_hand():
    # 10 interactions at seconds 1..10: 6 train, 2 validate (7, 8), 2 test (9, 10).
    splits = global_time(log_of(SHOP), N_ITEMS, max_history=2, shares=(0.6, 0.2, 0.2))
    assert short(splits.train) == [("a", [0], 1), ("b", [4], 5), ("c", [1], 6)]
    assert splits.train[SUPERVISE_FROM].to_list() == [0, 0, 0]
    # Rows of one user follow each other; the history knows what the same period brought before.
    assert short(splits.valid) == [("a", [0, 1], 2), ("a", [1, 2], 0)]
    assert splits.valid[SEEN].to_list() == [[0, 1], [0, 1, 2]]
    assert short(splits.test) == [("a", [2, 0], 3)]  # d has nothing before
    assert splits.test[SEEN].to_list() == [[0, 1, 2]]
    assert splits.test[TARGET_POSITION].to_list() == [4]
    assert splits.test[TARGET_TIME].to_list() == [9]
    assert splits.dropped == {"valid_without_history": 0, "test_without_history": 1}
    assert splits.boundaries == {
        "valid_from": "1970-01-01T00:00:07+00:00",
        "test_from": "1970-01-01T00:00:09+00:00",
    }
    assert splits.shares == {"train": 0.6, "valid": 0.2, "test": 0.2}
    assert splits.train_count.tolist() == [1, 2, 0, 0, 1, 1, 1]
    assert splits.train_only_users == 2  # b and c
    assert splits.tied_test_targets == 0.0
    assert RELEVANT not in splits.test.columns
    ids = pl.concat([splits.train[ROW_ID], splits.valid[ROW_ID], splits.test[ROW_ID]])
    assert ids.n_unique() == len(ids)


def test_a_boundary_moves_to_the_start_of_its_second():
    # Eight interactions, so 6 + 1 + 1 at .75/.125/.125, but the seventh shares its second with the
    # sixth and fifth: all three go to the later period.
    events: Events = {
        "a": [(1, 0), (2, 1), (5, 2), (9, 3)],
        "b": [(3, 0), (4, 1), (5, 2), (5, 4)],
    }
    splits = global_time(log_of(events), N_ITEMS, shares=(0.75, 0.125, 0.125))
    assert splits.shares == {"train": 0.5, "valid": 0.375, "test": 0.125}
    assert splits.train[TARGET_TIME].max() == 4
    assert short(splits.valid) == [("a", [0, 1], 2), ("b", [0, 1], 2), ("b", [0, 1, 2], 4)]
    assert short(splits.test) == [("a", [0, 1, 2], 3)]
    # b's two of one second: file order says which one is history.
    tied = global_time(
        log_of({**events, "b": [(3, 0), (4, 1), (6, 2), (9, 4), (9, 5)]}),
        N_ITEMS,
        shares=(0.5, 0.1, 0.4),
    )
    assert short(tied.test)[-1] == ("b", [0, 1, 2, 4], 5)
    assert tied.tied_test_targets == pytest.approx(1 / tied.test.height)


def test_time_cutoff_by_hand():
    events: Events = {
        "a": [(1, 0), (2, 1), (3, 0), (10, 2), (11, 3), (12, 2), (20, 0), (21, 0), (21, 5)],
        "b": [(1, 4), (20, 6), (30, 1)],
        "c": [(10, 1), (11, 1)],  # nothing before valid, nothing in test
        "d": [(20, 1)],  # nothing before test
        "e": [(1, 1), (2, 2)],  # train only
    }
    splits = time_cutoff(log_of(events), N_ITEMS, 10, 20, 30, max_history=4)
    assert short(splits.train) == [("a", [0, 1], 0), ("b", [], 4), ("e", [1], 2)]
    # Frozen at second 10 and 20, whatever the period brings.
    assert short(splits.valid) == [("a", [0, 1, 0], 2)]
    assert splits.valid[RELEVANT].to_list() == [[2, 3]]
    assert short(splits.test) == [("a", [0, 2, 3, 2], 0), ("b", [4], 6)]
    assert splits.test[RELEVANT].to_list() == [[0, 5], [6]]
    assert splits.test[SEEN].to_list() == [[0, 1, 2, 3], [4]]
    assert splits.test[TARGET_POSITION].to_list() == [6, 1]
    assert splits.dropped == {
        "valid_without_history": 2,
        "valid_repeats_in_period": 1,
        "test_without_history": 1,
        "test_repeats_in_period": 1,
        "after_test_until": 1,
    }
    assert splits.shares == {"train": 6 / 17, "valid": 5 / 17, "test": 5 / 17}
    assert splits.train_only_users == 1
    assert splits.boundaries["test_until"] == "1970-01-01T00:00:30+00:00"
    # Without an end, b's last one counts too, and 21, 21 of a never decided a target.
    open_end = time_cutoff(log_of(events), N_ITEMS, 10, 20)
    assert open_end.test[RELEVANT].to_list() == [[0, 5], [6, 1]]
    assert open_end.dropped["after_test_until"] == 0
    assert open_end.tied_test_targets == 0.0
    assert open_end.boundaries.keys() == {"valid_from", "test_from"}


def test_a_tie_in_the_first_second_after_the_cutoff_is_counted():
    events: Events = {"a": [(1, 0), (5, 1), (9, 2), (9, 3)], "b": [(1, 0), (9, 2), (10, 3)]}
    splits = time_cutoff(log_of(events), N_ITEMS, 5, 9)
    assert splits.tied_test_targets == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda log: global_time(log, 7, shares=(0.8, 0.2)), "three positive numbers"),
        (lambda log: global_time(log, 7, shares=(0.8, 0.3, 0.1)), "sum to 1"),
        (lambda log: global_time(log, 7, shares=(1.0, 0.0, 0.0)), "three positive numbers"),
        (lambda log: global_time(log, 7, max_history=0), "max_history=0 must be at least 1"),
        (lambda log: global_time(log, 7, shares=(0.01, 0.49, 0.5)), "one second"),
        (lambda log: time_cutoff(log, 7, 9, 9), "valid_from < test_from < test_until"),
        (lambda log: time_cutoff(log, 7, 5, 9, 8), "valid_from < test_from < test_until"),
        (lambda log: time_cutoff(log, 7, 0, 5), "leaves train empty"),
        (lambda log: time_cutoff(log, 7, 5, 90), "leaves test empty.*data reach from 1970"),
        (lambda log: time_cutoff(log, 7, 10, 11), "leaves valid empty"),
    ],
)
def test_settings_that_give_no_split(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(log_of(SHOP))


def test_everything_in_one_second_cannot_be_cut():
    log = log_of({"a": [(5, 0), (5, 1)], "b": [(5, 2), (5, 3)]})
    with pytest.raises(ValueError, match="so many interactions share it"):
        global_time(log, N_ITEMS)


@pytest.mark.parametrize("protocol", ["global-time", "time-cutoff"])
def test_data_without_times_name_the_protocol_that_works(protocol: str):
    log = log_of(SHOP).with_columns(pl.lit(None, dtype=pl.Int64).alias("timestamp"))
    with pytest.raises(ValueError, match=f"'{protocol}' needs timestamps.*leave-one-out"):
        global_time(log, 7) if protocol == "global-time" else time_cutoff(log, 7, 5, 9)


def test_a_log_out_of_order_is_refused():
    with pytest.raises(ValueError, match="one block per user, ordered by position and time"):
        global_time(log_of({"a": [(5, 0), (3, 1), (9, 2)]}), N_ITEMS)


@pytest.mark.parametrize(
    ("moment", "seconds"),
    [
        ("1970-01-02", DAY),
        (date(1970, 1, 2), DAY),
        (datetime(1970, 1, 2, 1), DAY + 3600),
        ("1970-01-02T00:00:00+01:00", DAY - 3600),
        ("1970-01-01T00:00:01.9Z", 1),
        ("20210131", 1_612_051_200),
        ("1612051200", 1_612_051_200),
        (500, 500),
    ],
)
def test_moments(moment, seconds: int):
    assert unix_seconds(moment) == seconds


@pytest.mark.parametrize("moment", ["2021", "yesterday", "", "2021-13-01", "31.01.2021"])
def test_text_that_is_no_moment(moment: str):
    with pytest.raises(ValueError, match="is no time; give an ISO date"):
        unix_seconds(moment)


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, N_ITEMS - 1)), min_size=1, max_size=25)
logs = st.lists(st.tuples(st.integers(0, 20), pairs), min_size=2, max_size=5).map(
    lambda users: {
        f"u{i}": list(
            zip(
                (start + np.cumsum([gap for gap, _ in events])).tolist(),
                [item for _, item in events],
                strict=True,
            )
        )
        for i, (start, events) in enumerate(users)
    }
)


def made(call) -> Splits:
    """The split, where these data give one."""
    try:
        return call()
    except ValueError as error:
        assert "leaves" in str(error) or "one second" in str(error)
        assume(False)
        raise


def supervised(splits: Splits, events: Events) -> set[tuple[str, int]]:
    """(user, place) of every training target, each seen once and in its true context."""
    places: set[tuple[str, int]] = set()
    for user, history, target, start, position in splits.train.select(
        USER_ID, HISTORY, TARGET, SUPERVISE_FROM, TARGET_POSITION
    ).iter_rows():
        window = [*history, target]
        begin = position - len(history)
        assert [item for _, item in events[user][begin : position + 1]] == window
        new = {(user, place) for place in range(begin + start, position + 1)}
        assert new and not new & places
        places |= new
    return places


def check_context(rows: pl.DataFrame, events: Events, max_history: int) -> None:
    """History and seen items are what the user had before the target's place, and all of it."""
    for row in rows.iter_rows(named=True):
        before = [item for _, item in events[row[USER_ID]][: row[TARGET_POSITION]]]
        assert before and row[HISTORY] == before[-max_history:]
        assert row[SEEN] == sorted(set(before))
        assert events[row[USER_ID]][row[TARGET_POSITION]] == (row[TARGET_TIME], row[TARGET])
        assert row[SUPERVISE_FROM] == len(row[HISTORY])


@settings(max_examples=60, deadline=None)
@given(
    events=logs,
    max_history=st.integers(1, 6),
    shares=st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.4, 0.2, 0.4)]),
)
def test_global_time_uses_every_interaction_once(events, max_history, shares):
    log = log_of(events)
    splits = made(lambda: global_time(log, N_ITEMS, max_history, shares))
    check_splits(splits.train, splits.valid, splits.test, log, "global-time", N_ITEMS)
    trained = supervised(splits, events)
    held = [
        {(u, p) for u, p in rows.select(USER_ID, TARGET_POSITION).iter_rows()}
        for rows in (splits.valid, splits.test)
    ]
    assert [len(places) for places in held] == [splits.valid.height, splits.test.height]
    for rows in (splits.valid, splits.test):
        check_context(rows, events, max_history)
    dropped = {(u, 0) for u in events} - trained - held[0] - held[1]
    assert len(dropped) == sum(splits.dropped.values())
    parts = [trained, *held, dropped]
    everything = [(u, p) for u, sequence in events.items() for p in range(len(sequence))]
    assert sorted(place for part in parts for place in part) == sorted(everything)
    assert splits.train_count.sum() == len(trained)
    times = [sorted(events[u][p][0] for u, p in part) for part in parts[:3]]
    assert times[0][-1] < times[1][0] and times[1][-1] < times[2][0]
    without = splits.dropped
    counts = (len(trained), len(held[0]), len(held[1]))
    missing = (0, without["valid_without_history"], without["test_without_history"])
    for share, count, lost in zip(splits.shares.values(), counts, missing, strict=True):
        assert share * log.height == pytest.approx(count + lost)


@settings(max_examples=60, deadline=None)
@given(
    events=logs,
    max_history=st.integers(1, 6),
    cuts=st.lists(st.integers(1, 38), min_size=2, max_size=3, unique=True).map(sorted),
)
def test_time_cutoff_uses_every_interaction_once(events, max_history, cuts):
    # Somebody who is there in every second, so that no period is empty.
    events = {**events, "anchor": [(second, second % N_ITEMS) for second in range(40)]}
    log = log_of(events)
    splits = time_cutoff(log, N_ITEMS, *cuts, max_history=max_history)
    check_splits(splits.train, splits.valid, splits.test, log, "time-cutoff", N_ITEMS)
    trained = supervised(splits, events)
    assert trained == {
        (u, p) for u, seq in events.items() for p, (t, _) in enumerate(seq) if t < cuts[0]
    }
    until = cuts[2] if len(cuts) > 2 else 10**9
    for rows, start, stop in (
        (splits.valid, cuts[0], cuts[1]),
        (splits.test, cuts[1], until),
    ):
        check_context(rows, events, max_history)
        expected = {}
        for user, sequence in events.items():
            period = [item for time, item in sequence if start <= time < stop]
            if period and sequence[0][0] < start:
                expected[user] = list(dict.fromkeys(period))
        assert dict(rows.select(USER_ID, RELEVANT).iter_rows()) == expected
        assert rows[RELEVANT].list.first().to_list() == rows[TARGET].to_list()
    relevant = sum(rows[RELEVANT].list.len().sum() for rows in (splits.valid, splits.test))
    assert len(trained) + relevant + sum(splits.dropped.values()) == log.height
