"""Draws that rows need: candidates to choose from, and noise in a history.

All draws are functions of (row_id, seed): the same rows give the same draws on every machine, in
every order and chunk. What is drawn for different purposes is independent (`KEEP` … `NOISE`): else
the rows that a cap keeps would also draw from one end of the catalogue.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.columns import CANDIDATES, HISTORY_ITEMS, ROW_ID, SET_ASIDE, SHOWN, TARGETS
from genrec.item_lists import ItemLists, contains, list_series
from genrec.prompts import row_hashes

IntArray = npt.NDArray[np.int64]


# Purposes of draws.
KEEP, TEXT_CHOICE, CANDIDATE, NOISE = range(4)

_STEP = np.uint64(0x9E3779B97F4A7C15)
_MOST = 1 << 16  # numbers of a row for one purpose


def uniform(row_ids: pl.Series, seed: int, n: int, purpose: int) -> npt.NDArray[np.float64]:
    """`n` uniform numbers in [0, 1) for each row, from (row_id, seed, purpose). ``# (rows, n)``."""
    assert n <= _MOST
    with np.errstate(over="ignore"):
        steps = np.arange(1, n + 1, dtype=np.uint64) + np.uint64(purpose * _MOST)
        state = row_hashes(row_ids, seed)[:, None] + steps * _STEP
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keep_about(row_ids: pl.Series, seed: int, share: float) -> npt.NDArray[np.bool_]:
    """Which rows to keep so that about a share of them is left. ``# (rows,)``."""
    return uniform(row_ids, seed, 1, KEEP)[:, 0] < share


class ItemDraw:
    """Draws items by how often they occur in training.

    Args:
        train_count: interactions of each item in the training part. ``# (n_items,)``
        power: of the counts; 0 draws all trained items alike, 1 by popularity.
    """

    def __init__(self, train_count: npt.NDArray[np.int64], power: float = 0.75) -> None:
        weight = np.where(train_count > 0, np.maximum(train_count, 1) ** power, 0.0)
        if not weight.any():
            weight = np.ones(len(train_count))
        self._upto = np.cumsum(weight) / weight.sum()

    def items(self, uniform: npt.NDArray[np.float64]) -> IntArray:
        """Items of uniform numbers, in their shape."""
        found = np.searchsorted(self._upto, uniform, side="right")
        return np.minimum(found, len(self._upto) - 1).astype(np.int64)


def add_candidates(rows: pl.DataFrame, draw: ItemDraw, n: int, seed: int) -> pl.DataFrame:
    """Column `candidates`: the target among others that are not the target, in random order.

    Args:
        rows: row_id and targets (the first one counts).
        draw: where the others come from.
        n: candidates of a row at most; an item that was drawn twice is there once.
        seed: of the draw.
    """
    target = rows[TARGETS].list.first().to_numpy().astype(np.int64)
    numbers = uniform(rows[ROW_ID], seed, 2 * n, CANDIDATE)
    items = draw.items(numbers[:, : n - 1])
    items = np.concatenate([target[:, None], items], axis=1)  # (rows, n)
    again = np.zeros(items.shape, dtype=bool)
    for column in range(1, n):  # a loop over the few candidates, not over rows
        again[:, column] = (items[:, :column] == items[:, column, None]).any(axis=1)
    order = np.argsort(numbers[:, n : 2 * n], axis=1)
    items, again = np.take_along_axis(items, order, 1), np.take_along_axis(again, order, 1)
    return rows.with_columns(_lists(items[~again], (~again).sum(axis=1)).alias(CANDIDATES))


def add_noise(
    rows: pl.DataFrame, n_items: int, seed: int, share: float = 0.2, most: int = 4
) -> pl.DataFrame:
    """Columns `shown` (the history with foreign items in it) and `set_aside` (those items).

    A history of n items gets ``max(1, round(share * n))`` of them, `most` at most, at random
    places; none of them is in the history, so a history of nearly all items may get fewer.

    All items of the catalogue are drawn alike, as LLM4DSR does (Wang et al. 2024). Drawing by
    training counts would let a row's target, which is counted, into its prompt.

    Args:
        rows: row_id and history.
        n_items: items of the catalogue.
        seed: of the draw.
        share: foreign items per item of the history.
        most: foreign items of a row at most.
    """
    history = ItemLists.from_column(rows[HISTORY_ITEMS])
    lengths = history.lengths
    wanted = np.clip(np.round(share * lengths), 1, most).astype(np.int64)
    numbers = uniform(rows[ROW_ID], seed, 2 * most, NOISE)
    items = (numbers[:, :most] * n_items).astype(np.int64)
    known = contains(history.keys(n_items), np.arange(len(rows))[:, None] * n_items + items)
    used = (np.arange(most) < wanted[:, None]) & ~known
    for column in range(1, most):
        twice = (items[:, :column] == items[:, column, None]) & used[:, :column]
        used[:, column] &= ~twice.any(axis=1)
    # Real items keep their places 0, 1, …; a foreign one stands before the place it drew.
    places = numbers[:, most:] * (lengths[:, None] + 1)
    row = np.concatenate([history.rows, np.nonzero(used)[0]])
    own = np.arange(len(history.values)) - history.offsets[history.rows]
    place = np.concatenate([own + 0.5, np.floor(places[used])])
    value = np.concatenate([history.values, items[used]])
    foreign = np.repeat([False, True], [len(history.values), int(used.sum())])
    order = np.lexsort((place, row))
    row, value, foreign = row[order], value[order], foreign[order]
    total = lengths + used.sum(axis=1)
    return rows.with_columns(
        _lists(value, total).alias(SHOWN),
        _lists(value[foreign], used.sum(axis=1)).alias(SET_ASIDE),
    )


def _lists(values: IntArray, lengths: IntArray) -> pl.Series:
    return list_series(pl.Series(values, dtype=pl.Int32), np.concatenate([[0], np.cumsum(lengths)]))
