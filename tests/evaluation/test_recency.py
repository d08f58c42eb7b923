"""Recent popularity: which events count, and that none of the future does."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data.splits import leave_one_out
from genrec.evaluation import recency
from genrec.evaluation.baselines import popularity_order
from genrec.evaluation.recency import DAY, recent_popularity, training_events, tune_window
from genrec.item_lists import ItemLists, no_items


def lists_of(*rows: list[int]) -> ItemLists:
    return ItemLists.from_column(pl.Series(rows, dtype=pl.List(pl.Int32)))


def log_of(*users: list[tuple[int, int]]) -> pl.DataFrame:
    """A cleaned log of (item, second) pairs per user."""
    return pl.DataFrame(
        [
            (f"u{u}", item, second, place)
            for u, events in enumerate(users)
            for place, (item, second) in enumerate(events)
        ],
        schema={
            "user_id": pl.String,
            "item_index": pl.Int32,
            "timestamp": pl.Int64,
            "position": pl.Int32,
        },
        orient="row",
    )


def pairs(events: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    return list(zip(*(part.tolist() for part in events), strict=True))


# Events of training. ------------------------------------------------------------------------------


def test_training_events_are_those_of_the_training_part():
    log = log_of([(0, 10), (1, 20), (2, 30), (3, 40)], [(1, 5), (0, 25), (4, 35), (2, 36)])
    splits = leave_one_out(log, 5)
    found = training_events(splits.train, log)
    assert pairs(found) == [(5, 1), (10, 0), (20, 1), (25, 0)]
    both = pl.concat([splits.train, splits.valid.select(splits.train.columns)])
    assert sorted(pairs(training_events(both, log))) == [
        (5, 1), (10, 0), (20, 1), (25, 0), (30, 2), (35, 4),
    ]  # fmt: skip


def test_overlapping_windows_and_repeated_items_count_each_interaction_once():
    # Item 7 three times in training, and once more as the test target.
    events = [(7, 1), (1, 2), (7, 3), (2, 4), (3, 5), (7, 6), (4, 7), (5, 8), (7, 9)]
    log = log_of(events)
    splits = leave_one_out(log, 8, max_history=2)
    assert splits.train.height > 2
    assert pairs(training_events(splits.train, log)) == [(t, i) for i, t in events[:-2]]


@settings(max_examples=40)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=9),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 4),
)
def test_training_events_equal_the_training_part_of_any_log(users, max_history):
    users = [sorted(events, key=lambda event: event[1]) for events in users]
    log = log_of(*users)
    splits = leave_one_out(log, 5, max_history)
    expected = sorted(
        (second, item)
        for events in users
        for item, second in (events[:-2] if len(events) >= 3 else events)
    )
    found = training_events(splits.train, log)
    assert sorted(pairs(found)) == expected
    assert (np.diff(found[0]) >= 0).all()


def test_data_without_times_are_refused():
    log = log_of([(0, 10), (1, 20), (2, 30), (3, 40)])
    splits = leave_one_out(log, 5)
    untimed = splits.train.with_columns(pl.lit(None, pl.Int64).alias("target_timestamp"))
    with pytest.raises(ValueError, match="needs timestamps, and the data have none"):
        training_events(untimed, log)
    with pytest.raises(ValueError, match="needs timestamps"):
        training_events(splits.train[:0], log)


# Lists. -------------------------------------------------------------------------------------------


def test_the_window_slides_by_hand():
    day = np.array([0, 1, 1, 5, 5, 5, 9]) * DAY
    events = (day, np.array([0, 1, 1, 2, 2, 0, 3]))
    when = np.array([2, 6, 6, 10]) * DAY
    found = recent_popularity(events, 4, when, lists_of([], [], [2], []), 1, window_days=3)
    assert found[:, 0].tolist() == [1, 2, 0, 3]
    # Everything up to then: at day 10 items 0, 1 and 2 have two each, and 3 one.
    found = recent_popularity(events, 4, when[3:], no_items(1), 4, window_days=365)
    assert set(found[0, :3].tolist()) == {0, 1, 2} and found[0, 3] == 3


def test_an_event_of_the_same_second_does_not_count():
    events = (np.array([100, 200, 200]), np.array([0, 1, 1]))
    found = recent_popularity(events, 2, np.array([200, 201]), no_items(2), 1, 1000)
    assert found[:, 0].tolist() == [0, 1]


def test_before_the_first_event_the_order_is_seeded():
    events = (np.array([100]), np.array([0]))
    found = recent_popularity(events, 50, np.array([50]), no_items(1), 5, 1, seed=4)
    assert found[0].tolist() == popularity_order(np.zeros(50, dtype=int), 4)[:5].tolist()


@pytest.mark.parametrize("steps", [1, 3, 400])
def test_nothing_at_or_after_a_rows_moment_changes_its_list(monkeypatch, steps):
    """Also where many rows share one moment of counting."""
    monkeypatch.setattr(recency, "_STEPS", steps)
    rng, later = np.random.default_rng(0), 0
    for _ in range(60):
        seconds, items = np.sort(rng.integers(0, 40, 25)), rng.integers(0, 6, 25)
        when = rng.integers(0, 45, 8)  # often the very second of an event
        arguments = (6, when * DAY, no_items(8), 6, float(rng.choice([1, 5, 100])))
        before = recent_popularity((seconds * DAY, items), *arguments)
        for row in range(8):
            changed = items.copy()
            future = seconds >= when[row]
            changed[future] = rng.integers(0, 6, future.sum())
            after = recent_popularity((seconds * DAY, changed), *arguments)
            assert before[row].tolist() == after[row].tolist()
            later += (before != after).any()
    # The same events matter to later rows; under a single step all rows count to the first's.
    assert later == 0 if steps == 1 else later > 50


def test_with_a_step_per_row_the_counts_are_exact():
    rng = np.random.default_rng(0)
    seconds = np.sort(rng.integers(0, 50 * DAY, 400))
    items = rng.integers(0, 9, 400)
    when = rng.integers(0, 55 * DAY, 60)  # fewer rows than steps
    found = recent_popularity((seconds, items), 9, when, no_items(60), 9, 7, seed=1)
    for moment, items_of_row in zip(when, found, strict=True):
        # Behind the last event the window ends with it: else a late row would have no counts.
        end = min(moment, seconds[-1] + 1)
        count = np.bincount(items[(seconds < end) & (seconds >= end - 7 * DAY)], minlength=9)
        ever = np.bincount(items[seconds < end], minlength=9)
        seeded = {item: i for i, item in enumerate(np.random.default_rng(1).permutation(9))}
        expected = sorted(range(9), key=lambda i: (-count[i], -ever[i], seeded[i]))  # noqa: B023
        assert items_of_row.tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_lists_equal_those_of_counting_anew_at_every_moment(data):
    """Also where seen items reach far into the order, and where a window holds no event."""
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    n_items, n_rows, k = int(rng.integers(1, 40)), int(rng.integers(1, 30)), int(rng.integers(1, 5))
    seconds = np.sort(rng.integers(0, 60 * DAY, int(rng.integers(1, 80))))
    items = (n_items * rng.random(len(seconds)) ** 3).astype(np.int64)
    when, days = rng.integers(-DAY, 70 * DAY, n_rows), float(rng.choice([1, 7, 365]))
    seen = lists_of(*[rng.permutation(n_items)[: rng.integers(0, 12)].tolist() for _ in when])
    found = recent_popularity((seconds, items), n_items, when, seen, k, days, seed=3)
    for row, moment in enumerate(when):
        end = min(moment, seconds[-1] + 1)
        count = np.bincount(items[(seconds < end) & (seconds >= end - days * DAY)], minlength=40)
        order = popularity_order(np.bincount(items[seconds < end], minlength=n_items), 3)
        banned = set(seen.take(np.array([row])).values.tolist())
        left = [i for i in sorted(order.tolist(), key=lambda i: -count[i]) if i not in banned]  # noqa: B023
        assert found[row].tolist() == (left + [-1] * k)[:k]


# Tuning. ------------------------------------------------------------------------------------------


def test_the_window_is_chosen_on_validation_rows():
    # Item 0 was popular all year, item 1 in the last three days: what people take up now.
    old, new = np.arange(300), 355 + np.arange(6) / 2
    seconds = (np.concatenate([old, new]) * DAY).astype(np.int64)
    items = np.repeat([0, 1], [300, 6])
    valid = pl.DataFrame({"target_timestamp": [358 * DAY] * 4, "target_item_index": [1] * 4})
    best, trials = tune_window((seconds, items), 3, valid, no_items(4), k=1)
    assert [trial["settings"]["window_days"] for trial in trials] == recency.WINDOWS_DAYS
    assert {t["settings"]["window_days"]: t["ndcg"] for t in trials}[365] == 0
    days = next(t["settings"]["window_days"] for t in trials if t["ndcg"] == 1)
    assert best.window_days == days
    # Where several items are relevant, one that is not the first counts as well.
    several = pl.Series("relevant_item_index", [[2, 1]] * 4, dtype=pl.List(pl.Int32))
    later = valid.with_columns(target_item_index=pl.lit(2)).with_columns(several)
    found, trials = tune_window((seconds, items), 3, later, no_items(4), k=1)
    assert found == best and max(t["ndcg"] for t in trials) == 1
    with pytest.raises(ValueError, match="tuned on validation rows, and there are none"):
        tune_window((seconds, items), 3, valid[:0], no_items(0))
