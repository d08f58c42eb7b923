"""Rows of a split, built from places in the ordered log: windows, histories, seen items."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from genrec.columns import (
    HISTORY,
    ITEM_INDEX,
    POSITION,
    ROW_ID,
    SEEN,
    SUPERVISE_FROM,
    TARGET,
    TARGET_POSITION,
    TARGET_TIME,
    TIMESTAMP,
    USER_ID,
)
from genrec.data.readers.raw_data import SUBSECOND

_BLOCK = 1 << 22  # list entries that are worked on at once

IntArray = npt.NDArray[np.int64]
ItemArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class UserSequences:
    """The cleaned log as arrays; a *place* is a row of the log.

    Attributes:
        users: user_id of each interaction.
        items: item index of each interaction.
        time: timestamps, or None where the data have only an order.
        moment: the same, in microseconds where the data have them: what tells two interactions of
            one second apart.
        owner: number of the user (order of first appearance) of each interaction.
        start: first place of each user, shape (users,).
        length: interactions of each user.
    """

    users: pl.Series
    items: ItemArray
    time: IntArray | None
    moment: IntArray | None
    owner: IntArray
    start: IntArray
    length: IntArray

    @classmethod
    def of(cls, interactions: pl.DataFrame) -> UserSequences:
        """From `CleanData.interactions`.

        Raises:
            ValueError: users don't lie in blocks that are ordered by position and time.
        """
        # Compared with the row before, never with columns made for it: these may be 100M rows.
        position, users = interactions[POSITION].to_numpy(), interactions[USER_ID]
        begins = position == 0
        start = np.flatnonzero(begins)
        length = np.diff(np.append(start, len(position)))
        follows = position[1:] == position[:-1] + 1
        follows &= (users[1:] == users[:-1]).to_numpy()
        time, moment = None, None
        if len(position) and interactions[TIMESTAMP].null_count() == 0:
            time = interactions[TIMESTAMP].to_numpy().astype(np.int64, copy=False)
            follows &= time[1:] >= time[:-1]
            moment = time
            if SUBSECOND in interactions.columns:
                moment = time * 1_000_000 + interactions[SUBSECOND].fill_null(0).to_numpy()
        ordered = bool(begins[:1].all() and (begins[1:] | follows).all())
        ordered = ordered and users.gather(start).n_unique() == len(start)
        if not ordered:
            raise ValueError(
                "the interactions must lie in one block per user, ordered by position and time; "
                "sort them with genrec.data.cleaning.order_interactions"
            )
        items = interactions[ITEM_INDEX].to_numpy().astype(np.int32, copy=False)
        owner = np.repeat(np.arange(len(start)), length)
        return cls(users, items, time, moment, owner, start, length)

    def first_meetings(self, n_items: int) -> npt.NDArray[np.bool_]:
        """Whether an interaction is its user's first one with the item.

        Args:
            n_items: rows of the catalogue.
        """
        assert int(self.items.max(initial=0)) < max(n_items, 1), "no catalogue row"
        return self._first

    @cached_property
    def _first(self) -> npt.NDArray[np.bool_]:
        # Validation and test rows both ask, and so does the check of their leaks.
        first = np.zeros(len(self.items), dtype=bool)
        n_items = int(self.items.max(initial=0)) + 1
        for users in row_blocks(self.length):
            begin = int(self.start[users.start])
            block = slice(begin, int(self.start[users.stop - 1] + self.length[users.stop - 1]))
            keys = (self.owner[block] - users.start) * n_items + self.items[block]
            first[begin + _first_places(keys)] = True
        return first


def _first_places(keys: IntArray) -> IntArray:
    """Where each distinct key (none negative) stands first: ``np.unique``'s index, unsorted."""
    bits = len(keys).bit_length()
    if not len(keys) or int(keys.max()).bit_length() + bits > 63:
        return np.unique(keys, return_index=True)[1]
    packed = keys << bits
    packed |= np.arange(len(keys))
    packed.sort()
    new = np.diff(packed >> bits, prepend=-1) != 0
    return packed[new] & ((1 << bits) - 1)


def check_history(max_history: int, min_history: int = 1) -> None:
    """Raise ValueError if a history could hold nothing."""
    for name, value in (("max_history", max_history), ("min_history", min_history)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def train_counts(log: UserSequences, train_length: IntArray, n_items: int) -> ItemArray:
    """Interactions of each item among each user's first `train_length` ones, (n_items,)."""
    counts = np.zeros(n_items, dtype=np.int64)
    for users in row_blocks(train_length):
        begin = log.start[users]
        trained = log.items[places(begin, begin + train_length[users])]
        counts += np.bincount(trained, minlength=n_items)
    return counts.astype(np.int32)


def train_rows(
    log: UserSequences, train_length: IntArray, max_history: int, window_step: int | None = None
) -> pl.DataFrame:
    """Windows over each user's first `train_length` interactions.

    The training sequence s is cut into windows of at most ``max_history + 1`` items. The first is
    ``s[:max_history + 1]`` and supervises all of its items; each following one ends
    `window_step` items later (the last at the end of s) and supervises only the items that no
    earlier window did, so that every interaction is a target exactly once. A row supervises
    ``history + [target]`` from position ``supervise_from`` on. A smaller step makes more rows, and
    the items that they supervise see longer histories.

    Args:
        log: the sequences.
        train_length: length of each user's s; 0 gives no window.
        max_history: items that a history holds at most.
        window_step: from 1 to `max_history`; None: half of it.

    Raises:
        ValueError: `window_step` out of range.
    """
    step = max(1, max_history // 2) if window_step is None else window_step
    if not 1 <= step <= max_history:
        raise ValueError(
            f"window_step={window_step} must lie in 1..max_history={max_history}, so that every "
            "window overlaps the one before it"
        )
    users = np.flatnonzero(train_length)
    length = train_length[users]
    first, end, supervised = _windows(length, max_history, step)
    counts = _window_counts(length, max_history, step)
    begin = log.start[users[np.repeat(np.arange(len(users)), counts)]]
    return _rows("train", log, begin + first, begin + end - 1, supervised)


def held_out_rows(
    split: str, log: UserSequences, target: IntArray, n_items: int, max_history: int
) -> pl.DataFrame:
    """Rows of targets at given places; history and seen items are what the user had before.

    `seen_item_index` is by far the largest column: it grows with the rows times their users'
    distinct earlier items, and only it (4 bytes an entry) and one block of it are in memory.
    """
    begin = log.start[log.owner[target]]
    history = np.maximum(begin, target - max_history)
    rows = _rows(split, log, history, target, target - history)
    first = log.first_meetings(n_items)
    before = np.zeros(len(first) + 1, dtype=np.int64)
    np.cumsum(first, out=before[1:])
    # Distinct earlier items are the first meetings before the target: no sort over all entries.
    seen = list_column(log.items[first], before[begin], before[target], sort=True)
    return rows.with_columns(seen.alias(SEEN))


def _window_counts(length: IntArray, max_history: int, step: int) -> IntArray:
    beyond = np.maximum(0, length - (max_history + 1))
    return 1 + -(-beyond // step)


def _windows(length: IntArray, max_history: int, step: int) -> tuple[IntArray, IntArray, IntArray]:
    """Windows of each training sequence, as offsets into it.

    Returns:
        First item, end (exclusive) and first supervised place within the window, shape (windows,).
    """
    size = max_history + 1
    counts = _window_counts(length, max_history, step)
    sequence_length = np.repeat(length, counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    end = np.minimum(sequence_length, size + number * step)
    first = np.maximum(0, end - size)
    supervised_before = np.where(number == 0, 0, size + (number - 1) * step)
    return first, end, supervised_before - np.where(number == 0, 0, first)


def _rows(
    split: str,
    log: UserSequences,
    begin: IntArray,
    target: IntArray,
    supervise_from: IntArray,
) -> pl.DataFrame:
    """Split rows from places in the log: history is [begin, target), all of one user."""
    number = pl.Series(np.arange(len(target))).cast(pl.String).str.zfill(6)
    if log.time is None:
        time = pl.repeat(None, len(target), dtype=pl.Int64, eager=True)
    else:
        time = pl.Series(log.time[target], dtype=pl.Int64)
    position = target - log.start[log.owner[target]]
    return pl.DataFrame(
        [
            (f"{split}-" + number).alias(ROW_ID),
            log.users.gather(target).alias(USER_ID),
            list_column(log.items, begin, target).alias(HISTORY),
            pl.Series(TARGET, log.items[target], dtype=pl.Int32),
            pl.Series(SUPERVISE_FROM, supervise_from, dtype=pl.Int32),
            time.alias(TARGET_TIME),
            pl.Series(TARGET_POSITION, position, dtype=pl.Int32),
        ]
    )


def list_column(values: ItemArray, begin: IntArray, end: IntArray, sort: bool = False) -> pl.Series:
    """List column whose entry i is ``values[begin[i]:end[i]]``, without a loop over rows.

    Args:
        values: where entries come from, none negative.
        begin: first place of each entry, shape (rows,).
        end: end (exclusive) of each entry.
        sort: sort each entry.
    """
    parts = []
    for block in row_blocks(end - begin):
        lengths = (end - begin)[block]
        flat = values[places(begin[block], end[block])]
        if sort:
            # One sort of (row, value) keys: much faster than a sort per list.
            keys = np.repeat(np.arange(len(lengths)) << 32, lengths)
            keys |= flat
            keys.sort()
            flat = keys.astype(np.int32)  # the lower half
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))
        parts.append(pl.Series(lists, dtype=pl.List(pl.Int32)))
    return pl.concat(parts) if parts else pl.Series([], dtype=pl.List(pl.Int32))


def row_blocks(lengths: IntArray) -> Iterator[slice]:
    """Slices of rows whose lists hold about `_BLOCK` entries together (or one long list)."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        done = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _BLOCK, side="right")))
        yield slice(start, stop)
        start = stop


def places(begin: IntArray, end: IntArray) -> IntArray:
    """All of ``begin[i] … end[i] - 1``, one range after another."""
    lengths = end - begin
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(begin - before, lengths)
