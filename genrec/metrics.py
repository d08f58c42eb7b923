"""Ranking metrics over item indices: plain NumPy functions, one or several relevant items a row.

Lists are `(n_rows, k_max)` arrays of catalogue rows, best first. `EMPTY` marks a slot without a
catalogue item (the tail of a short list, or a recommended item that the catalogue does not know):
it never hits and never moves the items behind it. Items are compared by index, never by text, so
two items with the same title stay two items.

Everything follows from where the relevant items stand. `target_rank` finds the one target of a row,
`find_relevant` all of several; the per-row functions (`hits`, `recalls`, `gains`, …) take the
result of either, and the `*_at_k` functions take lists and targets and return the mean.
With one relevant item a row Recall is the hit rate, and average precision the reciprocal rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genrec.item_lists import ItemLists

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
    block = max(1, (1 << 22) // recommended.shape[1])  # the sorted copy stays small
    n_twice, first = 0, -1
    for start in range(0, len(recommended), block):
        ordered = np.sort(recommended[start : start + block], axis=1)
        twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY)).any(axis=1)
        if twice.any():
            first = start + int(np.flatnonzero(twice)[0]) if first < 0 else first
            n_twice += int(twice.sum())
    if n_twice:
        raise ValueError(
            f"{n_twice} lists hold an item twice, the first in row {first} "
            f"({recommended[first].tolist()}); items of a list must be distinct"
        )


def check_k(k: int, k_max: int) -> None:
    """Raise ValueError unless ``1 <= k <= k_max``."""
    if not 1 <= k <= k_max:
        raise ValueError(
            f"k={k} must be between 1 and the list length {k_max}; recommend more items or lower k"
        )


def check_catalogue(recommended: IntArray, n_items: int) -> None:
    """Raise ValueError unless every index is a row of a catalogue of `n_items`."""
    if n_items < 1:
        raise ValueError(f"n_items={n_items} must be at least 1")
    if recommended.size and (highest := int(recommended.max())) >= n_items:
        raise ValueError(f"recommended holds {highest}, but the catalogue has {n_items} items")


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
    row, place = np.nonzero(recommended == target[:, None])
    rank = np.zeros(len(target), dtype=np.int64)
    rank[row] = place + 1
    return rank


@dataclass(frozen=True)
class RelevantRanks:
    """Where the relevant items of each row stand.

    Attributes:
        row: row of each relevant item that was recommended, ascending. ``# (n_hits,)``
        rank: its rank in the list, from 1, ascending within a row. ``# (n_hits,)``
        n_relevant: relevant items per row, recommended or not; at least 1. ``# (n_rows,)``
    """

    row: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]
    n_relevant: npt.NDArray[np.int64]

    @classmethod
    def of_targets(cls, rank: IntArray) -> RelevantRanks:
        """From the result of `target_rank`: one relevant item in every row."""
        row = np.flatnonzero(rank > 0)
        return cls(row, rank[row].astype(np.int64), np.ones(len(rank), dtype=np.int64))

    def within(self, k: int) -> npt.NDArray[np.bool_]:
        """Which of the found items stand among the first `k`. ``# (n_hits,)``."""
        return self.rank <= k

    def sums(self, values: FloatArray, k: int) -> FloatArray:
        """Per row, the sum of one value per found item within `k`. ``# (n_rows,)``."""
        kept = self.within(k)
        n_rows = len(self.n_relevant)
        return np.bincount(self.row[kept], values[kept], minlength=n_rows).astype(np.float64)

    def first(self) -> npt.NDArray[np.int64]:
        """Rank of the best placed relevant item per row, 0 where there is none. ``# (n_rows,)``."""
        rank = np.zeros(len(self.n_relevant), dtype=np.int64)
        rank[self.row[::-1]] = self.rank[::-1]  # the first of a row is written last
        return rank


def find_relevant(recommended: IntArray, relevant: ItemLists) -> RelevantRanks:
    """Find several relevant items per row.

    Args:
        recommended: item indices, best first. ``# (n_rows, k_max)``
        relevant: the items that count as hits, distinct, at least one per row.

    Raises:
        ValueError: the numbers of rows differ, a row has no relevant item or has one twice, or a
            list holds an item twice.
    """
    check_lists(recommended)
    if len(relevant) != len(recommended):
        raise ValueError(f"{len(recommended)} lists, but relevant items for {len(relevant)} rows")
    if (empty := np.flatnonzero(relevant.lengths == 0)).size:
        raise ValueError(f"row {empty[0]} has no relevant item; leave such rows out")
    if relevant.values.size and int(relevant.values.min()) < 0:
        raise ValueError("a relevant item is outside the catalogue; leave it out of its row")
    keys = relevant.keys(int(relevant.values.max(initial=0)) + 1)
    if (np.diff(keys) == 0).any():
        raise ValueError("a row has a relevant item twice; relevant items must be distinct")
    # One pass over the lists per relevant item of the longest row, over ever fewer rows.
    order = np.argsort(-relevant.lengths, kind="stable")
    rows, ranks = [], []
    for place in range(int(relevant.lengths.max(initial=0))):
        part = order[: np.searchsorted(-relevant.lengths[order], -place, side="left")]
        wanted = relevant.values[relevant.offsets[part] + place]
        row, column = np.nonzero(recommended[part] == wanted[:, None])
        rows.append(part[row])
        ranks.append(column + 1)
    row, rank = np.concatenate([*rows, []]), np.concatenate([*ranks, []])
    by_row = np.lexsort((rank, row))
    return RelevantRanks(
        row[by_row].astype(np.int64), rank[by_row].astype(np.int64), relevant.lengths
    )


def _found(ranks: IntArray | RelevantRanks) -> RelevantRanks:
    return ranks if isinstance(ranks, RelevantRanks) else RelevantRanks.of_targets(ranks)


def hits(ranks: IntArray | RelevantRanks, k: int) -> FloatArray:
    """1 where a relevant item is among the first `k`, else 0.

    Args:
        ranks: result of `target_rank` ``# (n_rows,)`` or of `find_relevant`.
        k: list length that counts.

    Returns:
        Hit rate per row. ``# (n_rows,)``
    """
    first = ranks.first() if isinstance(ranks, RelevantRanks) else ranks
    return ((first >= 1) & (first <= k)).astype(np.float64)


def recalls(ranks: IntArray | RelevantRanks, k: int) -> FloatArray:
    """Share of a row's relevant items that are among the first `k`. ``# (n_rows,)``."""
    found = _found(ranks)
    return found.sums(np.ones(len(found.row)), k) / found.n_relevant


def gains(ranks: IntArray | RelevantRanks, k: int) -> FloatArray:
    """NDCG@k per row: ``sum of 1 / log2(rank + 1)`` over that of the best list of `k` items.

    Binary relevance (Järvelin and Kekäläinen 2002). The best list has ``min(k, n_relevant)``
    relevant items at its head; with one relevant item it gains 1.
    """
    found = _found(ranks)
    ideal = np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))  # (k,)
    gained = found.sums(1.0 / np.log2(found.rank + 1.0), k)
    return gained / ideal[np.minimum(found.n_relevant, k) - 1]


def reciprocal_ranks(ranks: IntArray | RelevantRanks, k: int) -> FloatArray:
    """``1 / rank`` of the best placed relevant item, 0 outside the first `k`. ``# (n_rows,)``."""
    first = ranks.first() if isinstance(ranks, RelevantRanks) else ranks
    return np.where(hits(first, k) > 0, 1.0 / np.maximum(first, 1), 0.0)


def average_precisions(ranks: IntArray | RelevantRanks, k: int) -> FloatArray:
    """Average precision at `k` per row: precision at each relevant item's rank, over `n_relevant`.

    Divided by all relevant items, also where they are more than `k`, as TREC, RecTools and ranx do.
    ``# (n_rows,)``
    """
    found = _found(ranks)
    starts = np.searchsorted(found.row, found.row, side="left")
    count = np.arange(len(found.row)) - starts + 1  # relevant items up to this one
    return found.sums(count / found.rank, k) / found.n_relevant


def shared_sid_credit(
    recommended: IntArray, target: IntArray, sid_of_item: IntArray, k: int
) -> FloatArray:
    """Hit rate that a system earns whose lists are semantic ids shared by several items.

    Such a system names a SID; whoever resolves it must pick one of the items behind it. A row gets
    ``1 / (items that share the target's SID)`` if that SID is among the first `k` distinct SIDs of
    its list: the chance that a random pick is right. Comparing SID strings would give 1, and with
    a bijective map all three (string, item, shared) agree.

    Args:
        recommended: item indices, best first; any item of a SID stands for it. ``# (n_rows, k)``
        target: the item that came next. ``# (n_rows,)``
        sid_of_item: a number per SID for every catalogue row. ``# (n_items,)``
        k: distinct SIDs that count.

    Returns:
        Credit per row, in [0, 1]. ``# (n_rows,)``
    """
    check_lists(recommended)
    check_catalogue(recommended, len(sid_of_item))
    check_k(k, recommended.shape[1])
    sharing = np.bincount(sid_of_item)[sid_of_item]  # (n_items,)
    sids = np.where(recommended == EMPTY, EMPTY, sid_of_item[recommended])
    # Places before the target's SID that repeat an earlier SID do not count.
    new = np.ones(sids.shape, dtype=bool)
    for column in range(1, sids.shape[1]):
        new[:, column] = (sids[:, :column] != sids[:, column : column + 1]).all(axis=1)
    new |= sids == EMPTY  # an empty slot takes its place, as in every metric
    place = np.cumsum(new, axis=1)  # (n_rows, k_max): rank among distinct SIDs
    found = (sids == sid_of_item[target][:, None]) & new & (place <= k)
    return found.any(axis=1) / sharing[target]


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


def exposures(recommended: IntArray, n_items: int, k: int) -> npt.NDArray[np.int64]:
    """How many of the lists show each item among their first `k`. ``# (n_items,)``.

    Raises:
        ValueError: an index is no row of the catalogue, or `k` doesn't fit.
    """
    check_catalogue(recommended, n_items)
    check_k(k, recommended.shape[1])
    shown = recommended[:, :k].ravel()
    return np.bincount(shown[shown != EMPTY], minlength=n_items)


def coverage_at_k(recommended: IntArray, n_items: int, k: int) -> float:
    """Share of the catalogue that appears among the first `k` of any list."""
    return coverage(exposures(recommended, n_items, k))


def gini_at_k(recommended: IntArray, n_items: int, k: int) -> float:
    """Gini coefficient of the items' exposure, see `gini`."""
    return gini(exposures(recommended, n_items, k))


def coverage(shown: IntArray) -> float:
    """Share of the catalogue that is shown at all; `shown` is the result of `exposures`."""
    return float(np.count_nonzero(shown) / len(shown))


def gini(shown: IntArray) -> float:
    """Gini coefficient of the items' exposure: 0 all alike, towards 1 a single item.

    Over the whole catalogue, items that are never shown included. NaN if nothing is shown.

    Args:
        shown: result of `exposures`. ``# (n_items,)``
    """
    n_items = len(shown)
    shown = np.sort(shown).astype(np.float64)
    if shown.sum() == 0:
        return float("nan")
    place = 2.0 * np.arange(1, n_items + 1) - n_items - 1
    return float((place @ shown) / (n_items * shown.sum()))
