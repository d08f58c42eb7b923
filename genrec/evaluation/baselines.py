"""Baselines without a training run, random and popularity, and the arrays that baselines share.

All are fitted on split rows (`history`, `target`, `supervise_from`), so that they work on every
split protocol and count exactly what a model trained on the same rows sees. All return
`(n_rows, k)` arrays of item indices, padded with `EMPTY`. The item-kNN baselines: `knn.py`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.columns import HISTORY, SUPERVISE_FROM, TARGET, USER_ID
from genrec.item_lists import ItemLists, contains
from genrec.metrics import EMPTY

IntArray = npt.NDArray[np.int64]

BATCH_ROWS = 1024  # rows scored, or items compared, at once: bounds the memory
_CELLS = 1 << 22  # candidates looked at in a block of rows, when lists are filled up

DEVICES = ("auto", "cpu", "cuda")  # where SASRec and BERT4Rec train
# Raise it when a change makes other weights of those: trained states are not used any more. Here,
# since a look into the cache must not cost the import of torch.
TRAINING_VERSION = 1


class UnfitData(ValueError):
    """A baseline cannot be made from these data (no timestamps, no vectors, too many items)."""


def training_sequences(rows: pl.DataFrame) -> ItemLists:
    """History and target of each split row as one sequence, oldest first."""
    return ItemLists.from_column(rows.select(pl.concat_list(HISTORY, TARGET)).to_series())


def supervised_positions(rows: pl.DataFrame, sequences: ItemLists) -> IntArray:
    """Flat positions that a row supervises: every interaction once, whatever the windows."""
    place = np.arange(len(sequences.values)) - sequences.offsets[sequences.rows]
    return np.flatnonzero(place >= rows[SUPERVISE_FROM].to_numpy()[sequences.rows])


def item_counts(rows: pl.DataFrame, n_items: int) -> IntArray:
    """Interactions per item in split rows, each counted once. ``# (n_items,)``."""
    sequences = training_sequences(rows)
    return np.bincount(sequences.values[supervised_positions(rows, sequences)], minlength=n_items)


def item_users(rows: pl.DataFrame, n_items: int) -> IntArray:
    """Distinct users who have each item in split rows, however often. ``# (n_items,)``."""
    sequences = training_sequences(rows)
    users = rows[USER_ID].rank("dense").to_numpy().astype(np.int64) - 1
    pairs = np.unique(users[sequences.rows] * n_items + sequences.values)
    return np.bincount(pairs % n_items, minlength=n_items)


def popularity_order(counts: npt.NDArray[np.integer], seed: int = 0) -> IntArray:
    """Item indices from the most to the least popular, ties in a seeded random order.

    Args:
        counts: interactions per item. ``# (n_items,)``
        seed: seed of the permutation that breaks ties.

    Returns:
        Item indices. ``# (n_items,)``
    """
    shuffled = np.random.default_rng(seed).permutation(len(counts))
    return shuffled[np.argsort(-counts[shuffled], kind="stable")]


def fill_from_order(lists: IntArray, order: IntArray, seen: ItemLists) -> IntArray:
    """Fill the empty slots at the end of lists with the first unused items of `order`.

    Args:
        lists: item indices, `EMPTY` only at the end. ``# (n_rows, k)``
        order: item indices, best first: all, or the first ``2 k + longest seen`` of them.
        seen: items that must not be used, per row.

    Returns:
        The filled lists; `EMPTY` remains where the catalogue is used up. ``# (n_rows, k)``
    """
    filled, k = lists.copy(), lists.shape[1]
    n_items = 1 + max(int(ids.max(initial=0)) for ids in (lists, order, seen.values))
    place_of = np.full(n_items, len(order))
    place_of[order] = np.arange(len(order))
    short = np.flatnonzero((lists == EMPTY).any(axis=1))
    width = 2 * k + seen.lengths[short]
    by_width = np.argsort(width, kind="stable")  # one long history must not widen other rows
    short, width = short[by_width], np.minimum(width[by_width], len(order))
    start = 0
    while start < len(short):
        cells = np.arange(1, BATCH_ROWS + 1)[: len(short) - start] * width[start:][:BATCH_ROWS]
        rows = short[start : start + max(1, int(np.searchsorted(cells, _CELLS, side="right")))]
        start += len(rows)
        part, banned = lists[rows], seen.take(rows)
        # As many candidates as can be needed: a full list behind every used item.
        candidates = order[: 2 * k + int(banned.lengths.max())]
        free = np.ones((len(rows), len(candidates)), dtype=bool)
        listed, column = np.nonzero(part != EMPTY)
        for row, items in ((listed, part[listed, column]), (banned.rows, banned.values)):
            place = place_of[items]
            near = place < len(candidates)
            free[row[near], place[near]] = False
        have = (part != EMPTY).sum(axis=1)
        place = have[:, None] + np.cumsum(free, axis=1, dtype=np.int32) - 1
        row, column = np.nonzero(free & (place < k))
        filled[rows[row], place[row, column]] = candidates[column]
    return filled


def popularity(order: IntArray, seen: ItemLists, k: int) -> IntArray:
    """The `k` most popular items that a row has not seen.

    Args:
        order: result of `popularity_order`. ``# (n_items,)``
        seen: items to leave out, per row (`no_items` for none).
        k: list length.

    Returns:
        Item indices, padded with `EMPTY`. ``# (n_rows, k)``
    """
    return fill_from_order(np.full((len(seen), k), EMPTY, dtype=np.int32), order, seen)


def random_lists(n_items: int, seen: ItemLists, k: int, seed: int = 0) -> IntArray:
    """`k` distinct items a row, drawn uniformly from those it has not seen.

    Args:
        n_items: size of the catalogue.
        seen: items to leave out, per row (`no_items` for none); each at most once.
        k: list length.
        seed: seed of the draws.

    Returns:
        Item indices, padded with `EMPTY` where fewer than `k` are left. The first places do not
        depend on `k`. ``# (n_rows, k)``
    """
    rng = np.random.default_rng(seed)
    n_rows = len(seen)
    lists = np.full((n_rows, k), EMPTY, dtype=np.int64)
    seen_keys = seen.keys(n_items)
    # Place by place, so that a longer list begins with the shorter one.
    for column in range(k):
        todo = np.flatnonzero(n_items - seen.lengths > column)
        while len(todo):
            drawn = rng.integers(0, n_items, len(todo))
            bad = contains(seen_keys, todo * n_items + drawn)
            bad |= (lists[todo, :column] == drawn[:, None]).any(axis=1)
            lists[todo[~bad], column] = drawn[~bad]
            todo = todo[bad]
    return lists
