"""Item lists from item-to-item weights and a recency-decayed profile of each history.

The step that item-kNN, content-kNN and EASE share: a row's score for an item is the sum over its
history of ``decay ** age * weight``, the last item having age 0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from genrec.evaluation.baselines import BATCH_ROWS, fill_from_order
from genrec.item_lists import ItemLists, contains
from genrec.metrics import EMPTY

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.floating]


def places(order: IntArray) -> IntArray:
    """Place of each item in an order of all items: the smaller one wins a tie. ``# (n_items,)``."""
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return place


def decayed_profiles(history: ItemLists, n_items: int, decay: float) -> sp.csr_matrix:
    """``decay ** age`` per row and item, summed where an item repeats. ``# (n_rows, n_items)``."""
    age = history.offsets[1:][history.rows] - 1 - np.arange(len(history.values))
    cells = (decay ** age.astype(np.float64), (history.rows, history.values))
    return sp.csr_matrix(cells, shape=(len(history), n_items))


def recommend_by_similarity(
    similarity: sp.csr_matrix | FloatArray,
    order: IntArray,
    history: ItemLists,
    seen: ItemLists,
    k: int,
    decay: float,
    self_weight: float = 0.0,
) -> IntArray:
    """The `k` items of highest score for each history, filled up from `order`.

    Args:
        similarity: weight of a history item (row) for an item (column). If it is sparse, items
            without a weight are not scored and only `order` can bring them in.
            ``# (n_items, n_items)``
        order: all items, the most popular first; it also breaks ties.
        history: items of each row, oldest first.
        seen: items to leave out, per row (`no_items` for none).
        k: list length.
        decay: weight of a history item is ``decay ** age``.
        self_weight: how much an item of the history speaks for itself.

    Returns:
        Item indices, padded with `EMPTY` where the catalogue is used up. ``# (n_rows, k)``
    """
    n_items, tie = similarity.shape[0], places(order)
    lists = np.full((len(history), k), EMPTY, dtype=np.int64)
    for start in range(0, len(history), BATCH_ROWS):
        batch = np.arange(start, min(start + BATCH_ROWS, len(history)))
        banned = seen.take(batch)
        profile = decayed_profiles(history.take(batch), n_items, decay)
        if not sp.issparse(similarity):
            profile = profile.astype(similarity.dtype)  # else all scores would be doubled in width
        scores = profile @ similarity + self_weight * profile
        if sp.issparse(scores):
            row, place, column = _best_sparse(scores.tocsr(), banned, tie, k)
        else:
            row, place, column = _best_dense(np.asarray(scores), banned, tie, k)
        lists[start + row, place] = column
    return fill_from_order(lists, order, seen)


def _best_sparse(
    scores: sp.csr_matrix, banned: ItemLists, tie: IntArray, k: int
) -> tuple[IntArray, IntArray, IntArray]:
    scores.eliminate_zeros()
    n_rows, n_items = scores.shape
    row = np.repeat(np.arange(n_rows), np.diff(scores.indptr))
    keys = row * n_items + scores.indices
    scores.data[contains(banned.keys(n_items), keys)] = -np.inf
    row, place, column, _ = best_entries(scores, tie, k)
    return row, place, column


def _best_dense(
    scores: FloatArray, banned: ItemLists, tie: IntArray, k: int
) -> tuple[IntArray, IntArray, IntArray]:
    scores[banned.rows, banned.values] = -np.inf
    k = min(k, scores.shape[1])
    column = np.argpartition(scores, -k, axis=1)[:, -k:]
    value = np.take_along_axis(scores, column, axis=1)
    # A partition keeps any of the items that tie for the last place (all of them, for a history
    # that says nothing): those rows are chosen again, by the order of ties.
    last = value.min(axis=1)
    tied = ((scores >= last[:, None]).sum(axis=1) > k) & (last > -np.inf)
    for row in np.flatnonzero(tied):
        able = np.flatnonzero(scores[row] >= last[row])
        column[row] = able[np.lexsort((tie[able], -scores[row, able]))[:k]]
    value = np.take_along_axis(scores, column, axis=1)
    by_score = np.lexsort((tie[column], -value), axis=1)
    column = np.take_along_axis(column, by_score, axis=1)
    value = np.take_along_axis(value, by_score, axis=1)
    row, place = np.nonzero(value > -np.inf)
    return row, place, column[row, place]


def best_entries(
    scores: sp.csr_matrix, tie: IntArray, k: int
) -> tuple[IntArray, IntArray, IntArray, npt.NDArray[np.float64]]:
    """The `k` highest finite entries of each row, as (row, place in the row, column, value)."""
    lengths = np.diff(scores.indptr)
    rows = np.repeat(np.arange(scores.shape[0]), lengths)
    columns, values = scores.indices, scores.data
    if len(values) and lengths.max() > k:
        # Most entries are far from the best k: cut them off by the k-th value, keeping all ties.
        padded = np.full((len(lengths), int(lengths.max())), -np.inf)
        padded[rows, np.arange(len(values)) - scores.indptr[rows]] = values
        padded.partition(padded.shape[1] - k, axis=1)
        keep = values >= padded[rows, padded.shape[1] - k]
        rows, columns, values = rows[keep], columns[keep], values[keep]
    finite = values > -np.inf
    rows, columns, values = rows[finite], columns[finite], values[finite]
    order = np.lexsort((tie[columns], -values, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    starts = np.searchsorted(rows, np.arange(len(lengths)))
    place = np.arange(len(rows)) - starts[rows]
    best = place < k
    return rows[best], place[best], columns[best].astype(np.int64), values[best]
