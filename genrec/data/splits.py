"""Train, validation and test rows from ordered user sequences."""

from __future__ import annotations

import logging
from dataclasses import dataclass

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
    TARGET_TIME,
    TIMESTAMP,
    USER_ID,
)

logger = logging.getLogger(__name__)

PROTOCOL = "leave-one-out"
MIN_EVALUATED = 3  # one item to test, one to validate, one to learn from

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Splits:
    """Split rows, and what the split says of the items.

    Attributes:
        train: row_id, user_id, history_item_index, target_item_index, supervise_from,
            target_timestamp.
        valid: the same columns and `seen_item_index`.
        test: the same columns as `valid`.
        train_count: interactions of each catalogue item in the training part, shape (n_items,).
        train_only_users: users with fewer than three interactions, who are in `train` only.
    """

    train: pl.DataFrame
    valid: pl.DataFrame
    test: pl.DataFrame
    train_count: npt.NDArray[np.int32]
    train_only_users: int


def leave_one_out(interactions: pl.DataFrame, n_items: int, max_history: int = 20) -> Splits:
    """Hold out each user's last item for test and the last but one for validation.

    The training sequence s (the rest) is cut into windows of at most ``max_history + 1`` items. The
    first is ``s[:max_history + 1]`` and supervises all of its items; each following one ends
    ``max(1, max_history // 2)`` items later (the last at the end of s) and supervises only the
    items that no earlier window did, so that every interaction is a target exactly once. A row
    supervises ``history + [target]`` from position ``supervise_from`` on.

    A valid or test row has the last `max_history` items before its target as history (for test:
    train and validation), and all earlier ones in `seen_item_index`. Users with fewer than three
    interactions are in train only.

    Args:
        interactions: the cleaned log (`CleanData.interactions`): users in blocks, ordered by
            position.
        n_items: rows of the catalogue.
        max_history: items that a history holds at most.

    Raises:
        ValueError: `max_history` below 1.
    """
    if max_history < 1:
        raise ValueError(f"max_history={max_history} must be at least 1")
    position = interactions[POSITION].to_numpy().astype(np.int64)
    start = np.flatnonzero(position == 0)  # (users,)
    length = np.diff(np.append(start, len(position)))
    assert (position == np.arange(len(position)) - np.repeat(start, length)).all()
    evaluated = length >= MIN_EVALUATED
    train_length = np.where(evaluated, length - 2, length)
    train_only = int((~evaluated).sum())
    if train_only:
        logger.info(
            "%d of %d users have fewer than %d interactions: train only",
            train_only, len(start), MIN_EVALUATED,
        )  # fmt: skip
    in_train = position < np.repeat(train_length, length)
    items = interactions[ITEM_INDEX].to_numpy()
    count = np.bincount(items[in_train], minlength=n_items).astype(np.int32)

    first, end, supervised = _windows(train_length, max_history)
    owner = np.repeat(np.arange(len(start)), _window_counts(train_length, max_history))
    train = _rows("train", interactions, start[owner] + first, start[owner] + end - 1, supervised)
    held_out = []
    for name, back in (("valid", 2), ("test", 1)):
        begin = start[evaluated]
        target = begin + length[evaluated] - back
        history = np.maximum(begin, target - max_history)
        rows = _rows(name, interactions, history, target, target - history)
        seen = _distinct_lists(items, begin, target, n_items).alias(SEEN)
        held_out.append(rows.with_columns(seen))
    return Splits(train, held_out[0], held_out[1], count, train_only)


def _window_counts(length: IntArray, max_history: int) -> IntArray:
    step = max(1, max_history // 2)
    beyond = np.maximum(0, length - (max_history + 1))
    return 1 + -(-beyond // step)


def _windows(length: IntArray, max_history: int) -> tuple[IntArray, IntArray, IntArray]:
    """Windows of each training sequence, as offsets into it.

    Returns:
        First item, end (exclusive) and first supervised place within the window, shape (windows,).
    """
    step, size = max(1, max_history // 2), max_history + 1
    counts = _window_counts(length, max_history)
    sequence_length = np.repeat(length, counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    end = np.minimum(sequence_length, size + number * step)
    first = np.maximum(0, end - size)
    supervised_before = np.where(number == 0, 0, size + (number - 1) * step)
    return first, end, supervised_before - np.where(number == 0, 0, first)


def _rows(
    split: str,
    interactions: pl.DataFrame,
    begin: IntArray,
    target: IntArray,
    supervise_from: IntArray,
) -> pl.DataFrame:
    """Split rows from places in the log: history is [begin, target), all of one user."""
    items = interactions[ITEM_INDEX].to_numpy()
    number = pl.Series(np.arange(len(target))).cast(pl.String).str.zfill(6)
    return pl.DataFrame(
        [
            (f"{split}-" + number).alias(ROW_ID),
            interactions[USER_ID].gather(target),
            _lists(items, begin, target).alias(HISTORY),
            pl.Series(TARGET, items[target], dtype=pl.Int32),
            pl.Series(SUPERVISE_FROM, supervise_from, dtype=pl.Int32),
            interactions[TIMESTAMP].gather(target).alias(TARGET_TIME),
        ]
    )


def _lists(values: npt.NDArray[np.int32], begin: IntArray, end: IntArray) -> pl.Series:
    """List column whose entry i is ``values[begin[i]:end[i]]``, without a loop over rows."""
    return _list_column(values[_places(begin, end)], end - begin)


def _distinct_lists(
    values: npt.NDArray[np.int32], begin: IntArray, end: IntArray, n_values: int
) -> pl.Series:
    """Like `_lists`, each entry sorted and without repetitions."""
    owner = np.repeat(np.arange(len(begin)), end - begin)
    # One sort over (row, value) pairs: far faster than np.unique or a unique per list.
    keys = np.sort(owner * n_values + values[_places(begin, end)])
    keys = keys[np.diff(keys, prepend=-1) > 0]
    return _list_column(keys % n_values, np.bincount(keys // n_values, minlength=len(begin)))


def _places(begin: IntArray, end: IntArray) -> IntArray:
    lengths = end - begin
    before = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(begin - before, lengths)


def _list_column(flat: npt.NDArray[np.integer], lengths: IntArray) -> pl.Series:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat.astype(np.int32)))
    return pl.Series(lists, dtype=pl.List(pl.Int32))
