"""Splits by time: one global order cut at shares, or cut-off dates.

A leave-one-out test target of one user can lie before a training interaction of another, so a model
may know what was popular later. Here nothing that trains is later than anything that validates, and
nothing that validates is later than anything that tests.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from datetime import UTC, date, datetime

import numpy as np
import polars as pl

from genrec.columns import RELEVANT, USER_ID
from genrec.data.split_rows import (
    IntArray,
    UserSequences,
    check_history,
    held_out_rows,
    list_column,
    places,
    train_counts,
    train_rows,
)
from genrec.data.splits import GLOBAL_TIME, LEAVE_ONE_OUT, TIME_CUTOFF, Splits

logger = logging.getLogger(__name__)

SHARES = (0.8, 0.1, 0.1)  # MiniOneRec's


def unix_seconds(moment: date | str | int) -> int:
    """Seconds since the epoch of an ISO date or time (UTC where it names no zone), or of itself.

    A date is the start of its day. Fractions of a second are cut off.

    Raises:
        ValueError: text that is neither.
    """
    if isinstance(moment, int):
        return moment
    if isinstance(moment, str):
        # Four digits are a year and eight a compact date, 20210131, but not seconds.
        if re.fullmatch(r"\d+", moment) and len(moment) not in (4, 8):
            return int(moment)
        try:
            moment = datetime.fromisoformat(moment)
        except ValueError:
            raise ValueError(
                f"{moment!r} is no time; give an ISO date (2021-01-31), an ISO time "
                "(2021-01-31T12:00:00+01:00, UTC without a zone), or unix seconds (1612051200)"
            ) from None
    if not isinstance(moment, datetime):
        moment = datetime(moment.year, moment.month, moment.day)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return math.floor(moment.timestamp())


def iso_time(seconds: int) -> str:
    """ISO time in UTC of seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def global_time(
    interactions: pl.DataFrame,
    n_items: int,
    max_history: int = 20,
    shares: Sequence[float] = SHARES,
    min_history: int = 1,
    window_step: int | None = None,
) -> Splits:
    """Cut one global order of all interactions into train, valid and test periods.

    The order is by time. Interactions of the second that a cut falls into all go to the later
    period, so no tie rule decides the period of an interaction, and the actual shares differ a
    little. Every interaction of the valid or test period is a row of its own (users can have
    several): its history and seen items are all that the user had before it by time, then file
    order, those of the same period included, as in MiniOneRec. (MiniOneRec cuts the order of the
    rows that have a history, not that of all interactions.) Rows without a history, or with one
    shorter than `min_history`, are dropped.

    Args:
        interactions: the cleaned log, with timestamps.
        n_items: rows of the catalogue.
        max_history: items that a history holds at most.
        shares: of train, valid and test; three positive numbers that sum to 1.
        min_history: interactions that a user needs before a held-out target.
        window_step: see `genrec.data.split_rows.train_rows`.

    Raises:
        ValueError: no timestamps, shares that can't be, or a part that stays empty.
    """
    check_history(max_history, min_history)
    check_shares(shares)
    log, time = _timed(interactions, GLOBAL_TIME)
    cuts = [round(len(time) * share) for share in (shares[0], shares[0] + shares[1])]
    cuts = [min(cut, len(time) - 1) for cut in cuts]
    valid_from, test_from = (int(t) for t in np.partition(time, cuts)[cuts])
    if time.min() == valid_from or valid_from == test_from:
        raise ValueError(
            f"shares {list(shares)} put both ends of a period into one second "
            f"({iso_time(valid_from)}), because so many interactions share it; choose other shares "
            f"or protocol: {TIME_CUTOFF}"
        )
    had = np.arange(len(time)) - log.start[log.owner]
    has_history = had >= min_history
    in_test = time >= test_from
    in_valid = (time >= valid_from) & ~in_test
    target = np.flatnonzero(in_test & has_history)
    dropped = {
        "valid_without_history": int((in_valid & (had == 0)).sum()),
        "test_without_history": int((in_test & (had == 0)).sum()),
    }
    if min_history > 1:
        short = (had > 0) & ~has_history
        dropped["valid_short_history"] = int((in_valid & short).sum())
        dropped["test_short_history"] = int((in_test & short).sum())
    assert log.moment is not None, "there are times"
    train_length = _before(log, time, valid_from)
    return _finish(
        GLOBAL_TIME,
        log,
        train_rows(log, train_length, max_history, window_step),
        held_out_rows("valid", log, np.flatnonzero(in_valid & has_history), n_items, max_history),
        held_out_rows("test", log, target, n_items, max_history),
        train_counts(log, train_length, n_items),
        {"valid_from": valid_from, "test_from": test_from},
        [int((~in_valid & ~in_test).sum()), int(in_valid.sum()), int(in_test.sum())],
        dropped,
        log.moment[target] == log.moment[target - 1],
    )


def time_cutoff(
    interactions: pl.DataFrame,
    n_items: int,
    valid_from: int,
    test_from: int,
    test_until: int | None = None,
    max_history: int = 20,
    min_history: int = 1,
    window_step: int | None = None,
) -> Splits:
    """Freeze histories at two moments and ask what comes in the period after each.

    Train is what lies before `valid_from`. A user with interactions in ``[valid_from, test_from)``
    and something before it is one row of valid, with the history as it was at `valid_from`; the
    same for test in ``[test_from, test_until)`` with all before `test_from`. The target is the
    period's first item, `relevant_item_index` has all of its distinct items in the order of time.

    Args:
        interactions: the cleaned log, with timestamps.
        n_items: rows of the catalogue.
        valid_from: unix seconds.
        test_from: unix seconds.
        test_until: unix seconds; later interactions are dropped. None: no end.
        max_history: items that a history holds at most.
        min_history: interactions that a user needs before a period to be evaluated on it.
        window_step: see `genrec.data.split_rows.train_rows`.

    Raises:
        ValueError: no timestamps, moments that aren't ascending, or a part that stays empty.
    """
    check_history(max_history, min_history)
    log, time = _timed(interactions, TIME_CUTOFF)
    end = int(time.max()) + 1 if test_until is None else test_until
    if test_until is not None and test_until <= test_from or test_from <= valid_from:
        raise ValueError(
            "valid_from < test_from < test_until must hold, not "
            + ", ".join(iso_time(t) for t in (valid_from, test_from, test_until) if t is not None)
        )
    assert log.moment is not None, "there are times"
    before = [_before(log, time, moment) for moment in (valid_from, test_from, end)]
    dropped = {}
    tied = np.zeros(0, dtype=bool)
    tables = []
    for split, first, last in (
        ("valid", before[0], before[1]),
        ("test", before[1], before[2]),
    ):
        chosen = (last > first) & (first >= min_history)
        begin, stop = (log.start + first)[chosen], (log.start + last)[chosen]
        rows = held_out_rows(split, log, begin, n_items, max_history)
        relevant = _distinct_lists(log, begin, stop, n_items)
        tables.append(rows.with_columns(relevant.alias(RELEVANT)))
        dropped[f"{split}_without_history"] = int((last - first)[first == 0].sum())
        if min_history > 1:
            short = (first > 0) & (first < min_history)
            dropped[f"{split}_short_history"] = int((last - first)[short].sum())
        repeats = int((stop - begin).sum() - relevant.list.len().sum())
        dropped[f"{split}_repeats_in_period"] = repeats
        following = np.minimum(begin + 1, len(time) - 1)
        tied = (begin + 1 < stop) & (log.moment[following] == log.moment[begin])
    dropped["after_test_until"] = len(time) - int(before[2].sum())
    boundaries = {"valid_from": valid_from, "test_from": test_from}
    if test_until is not None:
        boundaries["test_until"] = test_until
    return _finish(
        TIME_CUTOFF,
        log,
        train_rows(log, before[0], max_history, window_step),
        tables[0],
        tables[1],
        train_counts(log, before[0], n_items),
        boundaries,
        [int(n) for n in np.diff([0, *(b.sum() for b in before)])],
        dropped,
        tied,
    )


def check_shares(shares: Sequence[float]) -> None:
    """Raise ValueError unless these are three positive numbers that sum to 1."""
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(
            f"split_shares={list(shares)} must be three positive numbers (train, valid, test) that "
            "sum to 1, such as 0.8 0.1 0.1"
        )


def _timed(interactions: pl.DataFrame, protocol: str) -> tuple[UserSequences, IntArray]:
    log = UserSequences.of(interactions)
    if log.time is None:
        raise ValueError(
            f"protocol={protocol!r} needs timestamps, and these interactions have only an order; "
            f"use protocol: {LEAVE_ONE_OUT}, or name the file's time column"
        )
    return log, log.time


def _before(log: UserSequences, time: IntArray, moment: int) -> IntArray:
    """Interactions of each user before a moment, (users,)."""
    return np.bincount(log.owner[time < moment], minlength=len(log.start))


def _distinct_lists(log: UserSequences, begin: IntArray, end: IntArray, n_items: int) -> pl.Series:
    """Distinct items of disjoint ranges of places, each range in its order."""
    place = places(begin, end)
    row = np.repeat(np.arange(len(begin)), end - begin)
    first = np.unique(row * n_items + log.items[place], return_index=True)[1]
    first.sort()
    stop = np.cumsum(np.bincount(row[first], minlength=len(begin)))
    return list_column(log.items[place[first]], np.concatenate([[0], stop[:-1]]), stop)


def _finish(
    protocol: str,
    log: UserSequences,
    train: pl.DataFrame,
    valid: pl.DataFrame,
    test: pl.DataFrame,
    train_count: np.ndarray,
    boundaries: dict[str, int],
    interactions: list[int],
    dropped: dict[str, int],
    tied: np.ndarray,
) -> Splits:
    """Put the parts together, unless one of them is empty."""
    moments = {name: iso_time(moment) for name, moment in boundaries.items()}
    for name, table in (("train", train), ("valid", valid), ("test", test)):
        if table.height == 0:
            assert log.time is not None
            span = f"{iso_time(int(log.time.min()))} to {iso_time(int(log.time.max()))}"
            rule = "" if name == "train" else " by a user who had something before"
            raise ValueError(
                f"{protocol} with {moments} leaves {name} empty: it holds no interaction{rule}; "
                f"the data reach from {span}; move the boundaries, or use {LEAVE_ONE_OUT}"
            )
    held = pl.concat([valid[USER_ID], test[USER_ID]]).unique()
    trained = train[USER_ID].unique()
    train_only = len(trained) - int(trained.is_in(held.implode()).sum())
    for reason, count in dropped.items():
        if count:
            logger.info("%s: %s: %d of %d", protocol, reason, count, len(log.items))
    return Splits(
        train,
        valid,
        test,
        train_count,
        train_only,
        protocol=protocol,
        boundaries=moments,
        shares={
            name: count / len(log.items)
            for name, count in zip(("train", "valid", "test"), interactions, strict=True)
        },
        dropped=dropped,
        tied_test_targets=float(tied.mean()),
    )
