"""Ranking metrics over item indices: plain NumPy functions, one relevant item per row.

Lists are `(n_rows, k_max)` arrays of catalogue rows, best first. `EMPTY` marks a slot without a
catalogue item (the tail of a short list, or a recommended item that the catalogue does not know):
it never hits and never moves the items behind it. Items are compared by index, never by text, so
two items with the same title stay two items.

Everything follows from `target_rank`; the per-row functions take its result, the `*_at_k`
functions take the lists and return the mean.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer]
FloatArray = npt.NDArray[np.float64]

EMPTY = -1


def check_lists(recommended: IntArray) -> None:
    """Raise ValueError unless `recommended` holds item lists without duplicates.

    Args:
        recommended: item indices, best first; `EMPTY` for slots without an item.
            ``# (n_rows, k_max)``

    Raises:
        ValueError: another shape or type, an index below `EMPTY`, or an item twice in one list.
    """
    if recommended.ndim != 2 or not np.issubdtype(recommended.dtype, np.integer):
        raise ValueError(
            f"recommended has shape {recommended.shape} and type {recommended.dtype}; "
            "it must be an integer array (n_rows, k_max)"
        )
    if recommended.size == 0:
        return
    if (lowest := int(recommended.min())) < EMPTY:
        raise ValueError(f"recommended holds {lowest}; item indices start at 0, {EMPTY} is empty")
    ordered = np.sort(recommended, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY)).any(axis=1)
    if twice.any():
        row = int(np.flatnonzero(twice)[0])
        raise ValueError(
            f"{int(twice.sum())} lists hold an item twice, the first in row {row} "
            f"({recommended[row].tolist()}); items of a list must be distinct"
        )


def check_k(k: int, k_max: int) -> None:
    """Raise ValueError unless ``1 <= k <= k_max``."""
    if not 1 <= k <= k_max:
        raise ValueError(
            f"k={k} must be between 1 and the list length {k_max}; recommend more items or lower k"
        )


def target_rank(recommended: IntArray, target: IntArray) -> npt.NDArray[np.int64]:
    """Rank of each row's target in its list, from 1; 0 where it is absent.

    Args:
        recommended: item indices, best first. ``# (n_rows, k_max)``
        target: the item that came next. ``# (n_rows,)``

    Returns:
        Ranks. ``# (n_rows,)``

    Raises:
        ValueError: the shapes differ, a list holds an item twice, or a target is no item index.
    """
    check_lists(recommended)
    if target.shape != recommended.shape[:1] or not np.issubdtype(target.dtype, np.integer):
        raise ValueError(
            f"target has shape {target.shape} and type {target.dtype}; "
            f"it must be an integer array ({recommended.shape[0]},)"
        )
    if target.size and (lowest := int(target.min())) < 0:
        raise ValueError(
            f"target holds {lowest}; every row needs a target that is in the catalogue"
        )
    hit = recommended == target[:, None]  # (n_rows, k_max)
    if hit.shape[1] == 0:
        return np.zeros(len(target), dtype=np.int64)
    return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0).astype(np.int64)


def hits(rank: IntArray, k: int) -> FloatArray:
    """1 where the target is among the first `k`, else 0.

    Args:
        rank: result of `target_rank`. ``# (n_rows,)``
        k: list length that counts.

    Returns:
        Hit rate per row. ``# (n_rows,)``
    """
    return ((rank >= 1) & (rank <= k)).astype(np.float64)


def gains(rank: IntArray, k: int) -> FloatArray:
    """NDCG@k per row with one relevant item: ``1 / log2(rank + 1)``, 0 outside the first `k`.

    The ideal list has the target first, so its gain is 1 and no further normalisation is needed
    (Järvelin and Kekäläinen 2002, binary relevance).
    """
    return np.where(hits(rank, k) > 0, 1.0 / np.log2(np.maximum(rank, 1) + 1.0), 0.0)


def reciprocal_ranks(rank: IntArray, k: int) -> FloatArray:
    """``1 / rank`` per row, 0 outside the first `k`."""
    return np.where(hits(rank, k) > 0, 1.0 / np.maximum(rank, 1), 0.0)


def _rank_within(recommended: IntArray, target: IntArray, k: int) -> npt.NDArray[np.int64]:
    rank = target_rank(recommended, target)
    check_k(k, recommended.shape[1])
    if not len(rank):
        raise ValueError("there are no rows; a mean over no rows is not defined")
    return rank


def hit_rate_at_k(recommended: IntArray, target: IntArray, k: int) -> float:
    """Share of rows whose target is among the first `k` (with one target: Recall@k)."""
    return float(hits(_rank_within(recommended, target, k), k).mean())


def ndcg_at_k(recommended: IntArray, target: IntArray, k: int) -> float:
    """Mean of `gains` over the rows."""
    return float(gains(_rank_within(recommended, target, k), k).mean())


def mrr_at_k(recommended: IntArray, target: IntArray, k: int) -> float:
    """Mean of `reciprocal_ranks` over the rows."""
    return float(reciprocal_ranks(_rank_within(recommended, target, k), k).mean())


def coverage_at_k(recommended: IntArray, n_items: int, k: int) -> float:
    """Share of the catalogue that appears among the first `k` of any list.

    Args:
        recommended: item indices, best first. ``# (n_rows, k_max)``
        n_items: size of the catalogue.
        k: list length that counts.

    Raises:
        ValueError: an index is no row of the catalogue.
    """
    check_lists(recommended)
    check_k(k, recommended.shape[1])
    if n_items < 1:
        raise ValueError(f"n_items={n_items} must be at least 1")
    if recommended.size and (highest := int(recommended.max())) >= n_items:
        raise ValueError(f"recommended holds {highest}, but the catalogue has {n_items} items")
    shown = np.unique(recommended[:, :k])
    return int((shown != EMPTY).sum()) / n_items
