"""Whether items that belong together share the beginning of their codes.

Two kinds of belonging: being near in the space of the item vectors, and being bought by the same
users. Both are measured as the share of an item's neighbours that have its first codes, beside what
chance alone would give.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from genrec.item_lists import ItemLists
from genrec.metrics import EMPTY
from genrec.quantizers.quantizer import check_finite, check_input

IntArray = npt.NDArray[np.int64]

ALL_QUERIES_ITEMS = 100_000  # larger catalogues are measured on a seeded sample
SAMPLED_QUERIES = 10_000
FEWEST_QUERIES = 2_000  # of the largest catalogues
_PAIRS_SEARCHED = 10_000_000_000  # queries times items; more are minutes of work for no more digits
_INDEX_ROWS = 131_072  # vectors indexed at once, which bounds the memory of the search
_QUERY_ROWS = 8_192
_PAIRS = 20_000_000  # item pairs counted at once
_PAIR_ROWS = 65_536


@dataclass(frozen=True)
class Neighbours:
    """The nearest items of some items.

    Attributes:
        items: whose neighbours these are, ascending, (n_queries,).
        nearest: their neighbours, the nearest first, padded with `EMPTY`, (n_queries, k).
        sampled: whether `items` is a sample of those that could have been asked for.
    """

    items: IntArray
    nearest: IntArray
    sampled: bool = False


def nearest_vectors(
    vectors: npt.NDArray[np.floating], k: int = 10, queries: IntArray | None = None, seed: int = 0
) -> Neighbours:
    """Exact cosine neighbours, by faiss's inner-product index in blocks of bounded memory.

    Args:
        vectors: (n_items, dim), any float type; may be a memory map. Zero vectors have no direction
            and neither have nor are neighbours.
        k: neighbours per item, the item itself left out.
        queries: whose neighbours are sought; None takes all items, and above `ALL_QUERIES_ITEMS`
            items a seeded sample of `SAMPLED_QUERIES`, of millions of items fewer, but no fewer
            than `FEWEST_QUERIES`.
        seed: of that sample.

    Raises:
        ValueError: wrong shape, NaN or inf, k below 1, or a query outside the catalogue.
    """
    check_input(vectors)
    n_items = len(vectors)
    _check_k(k)
    sampled = queries is None and n_items > ALL_QUERIES_ITEMS
    if queries is None:
        queries = np.arange(n_items)
        if sampled:
            n_queries = min(SAMPLED_QUERIES, max(FEWEST_QUERIES, _PAIRS_SEARCHED // n_items))
            queries = np.random.default_rng(seed).choice(n_items, n_queries, replace=False)
    items = np.unique(np.asarray(queries, dtype=np.int64))
    if len(items) and (items[0] < 0 or items[-1] >= n_items):
        raise ValueError(
            f"queries lie between {items[0]} and {items[-1]}; they are rows of the {n_items} "
            "vectors, from 0"
        )
    unit = _unit_rows(vectors[items])
    directed = unit.any(axis=1)
    items, unit = items[directed], unit[directed]
    ids = np.full((len(items), k), EMPTY, dtype=np.int64)
    scores = np.full((len(items), k), -np.inf, dtype=np.float32)
    for start in range(0, n_items, _INDEX_ROWS):
        _search_block(vectors, start, unit, items, scores, ids)
    return Neighbours(items, ids, sampled)


def _search_block(
    vectors: npt.NDArray[np.floating],
    start: int,
    unit: npt.NDArray[np.float32],
    items: IntArray,
    scores: npt.NDArray[np.float32],
    ids: IntArray,
) -> None:
    """Merge one block of the catalogue into the best `scores` and `ids` so far, in place."""
    import faiss

    k = ids.shape[1]
    block = np.arange(start, min(start + _INDEX_ROWS, len(vectors)))
    rows = np.asarray(vectors[start : block[-1] + 1], dtype=np.float32)
    check_finite(rows, start)
    rows = _unit_rows(rows)
    directed = rows.any(axis=1)
    block = block[directed]
    if not len(block):
        return
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows[directed])
    for first in range(0, len(items), _QUERY_ROWS):
        part = slice(first, first + _QUERY_ROWS)
        found, at = index.search(unit[part], min(k + 1, len(block)))
        near = block[at]
        found[near == items[part, None]] = -np.inf  # the item itself
        every = np.concatenate([scores[part], found], axis=1)
        every_id = np.concatenate([ids[part], near], axis=1)
        best = np.lexsort((every_id, -every), axis=1)[:, :k]
        scores[part] = np.take_along_axis(every, best, axis=1)
        ids[part] = np.where(
            np.isfinite(scores[part]), np.take_along_axis(every_id, best, axis=1), EMPTY
        )


def _unit_rows(rows: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Rows of length 1 (zero rows stay), float32."""
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    # The largest entry first: squares of very large or very small numbers leave float32.
    peak = np.abs(rows).max(axis=1, keepdims=True)
    rows = rows / np.where(peak > 0, peak, 1)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(length > 0, length, 1)


def co_purchases(sequences: ItemLists, n_items: int, k: int = 10) -> Neighbours:
    """The items that most users have in common with an item.

    Args:
        sequences: each user's items in the training split; an item counts once per user.
        n_items: size of the catalogue.
        k: neighbours per item; the lower index wins a tie. Items without any are left out.

    Raises:
        ValueError: k below 1, or an item outside the catalogue.
    """
    _check_k(k)
    values = sequences.values
    if len(values) and (values.min() < 0 or values.max() >= n_items):
        raise ValueError(
            f"sequences hold items {values.min()} to {values.max()}; the catalogue's rows are 0 to "
            f"{n_items - 1}"
        )
    items: list[IntArray] = []
    nearest: list[IntArray] = []
    for start, counts in common_users(sequences, n_items):
        found, best = _most_common(counts, start, k)
        items.append(found)
        nearest.append(best)
    return Neighbours(np.concatenate(items), np.concatenate(nearest))


def common_users(sequences: ItemLists, n_items: int) -> Iterator[tuple[int, sp.csr_matrix]]:
    """How many users each two items have in common, some items at a time, in bounded memory.

    Args:
        sequences: each user's items; an item counts once per user.
        n_items: size of the catalogue.

    Yields:
        The first of the items and their counts, ``# (n_block, n_items)`` int32, the number of an
        item's own users among them.
    """
    bought = sequences.matrix(n_items).astype(np.int32)  # (n_users, n_items)
    bought.data[:] = 1
    buyers = bought.T.tocsr()  # (n_items, n_users)
    # An upper bound of the pairs that each item makes: what its buyers bought, in sum.
    pairs = np.cumsum(buyers @ np.diff(bought.indptr).astype(np.int64))
    start = 0
    while start < n_items:
        before = pairs[start - 1] if start else 0
        stop = int(np.searchsorted(pairs, before + _PAIRS, side="right"))
        stop = min(max(stop, start + 1), start + _PAIR_ROWS, n_items)
        yield start, buyers[start:stop] @ bought
        start = stop


def _most_common(counts: sp.csr_matrix, start: int, k: int) -> tuple[IntArray, IntArray]:
    """Items that have neighbours and the `k` largest entries of their rows, self left out."""
    n_items = counts.shape[1]
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    columns, values = counts.indices.astype(np.int64), counts.data.astype(np.int64)
    other = columns != rows + start
    rows, columns, values = rows[other], columns[other], values[other]
    if not len(rows):
        return np.empty(0, dtype=np.int64), np.empty((0, k), dtype=np.int64)
    # One sort of one key (row, falling count, item) is far cheaper than sorting by three.
    most = int(values.max())
    key = np.sort((rows * (most + 1) + (most - values)) * n_items + columns)
    rows, columns = key // n_items // (most + 1), key % n_items
    found, first = np.unique(rows, return_index=True)
    place = np.arange(len(rows)) - np.repeat(first, np.diff([*first, len(rows)]))
    best = place < k
    nearest = np.full((len(found), k), EMPTY, dtype=np.int64)
    nearest[np.searchsorted(found, rows[best]), place[best]] = columns[best]
    return found + start, nearest


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k={k} must be at least 1 neighbour per item")


def prefix_groups(codes: npt.NDArray[np.integer]) -> IntArray:
    """Which items share their first codes.

    Args:
        codes: (n_items, n_levels).

    Returns:
        (n_items, n_levels): items with the same number in column `l` share their first `l + 1`
        codes; numbers are 0 … number of distinct prefixes - 1.
    """
    groups = np.zeros(codes.shape, dtype=np.int64)
    prefix = np.zeros(len(codes), dtype=np.int64)
    for level in range(codes.shape[1]):
        code = codes[:, level].astype(np.int64)
        low = int(code.min(initial=0))
        width = int(code.max(initial=0)) - low + 1
        prefix = np.unique(prefix * width + code - low, return_inverse=True)[1]
        groups[:, level] = prefix
    return groups


def neighbour_preservation(
    codes: npt.NDArray[np.integer], neighbours: Neighbours
) -> dict[str, Any]:
    """Mean over items of the share of their neighbours that have the same first codes.

    Args:
        codes: (n_items, n_levels).
        neighbours: from `nearest_vectors` or `co_purchases`; an item that has fewer than k counts
            with those that it has.

    Returns:
        ``same_code``: a share per prefix length 1 … n_levels; ``chance``: the share of all pairs of
        different items that have the same prefix; ``lift``: their ratio, None where chance is 0;
        ``items``: how many items have neighbours. Shares are None if no item has one.
    """
    groups = prefix_groups(codes)
    known = neighbours.nearest != EMPTY
    weight = known / np.maximum(known.sum(axis=1, keepdims=True), 1)
    items = int(known.any(axis=1).sum())
    same: list[float | None] = []
    chance = []
    for level in range(codes.shape[1]):
        group = groups[:, level]
        match = group[neighbours.nearest] == group[neighbours.items][:, None]
        same.append(float((match * weight).sum() / items) if items else None)
        sizes = np.bincount(group).astype(np.float64)
        pairs = len(codes) * (len(codes) - 1.0)
        chance.append(float((sizes * (sizes - 1)).sum() / pairs) if pairs else 0.0)
    return {"same_code": same, "chance": chance, "lift": _lift(same, chance), "items": items}


def pair_preservation(
    codes: npt.NDArray[np.integer], first: npt.ArrayLike, second: npt.ArrayLike
) -> dict[str, Any]:
    """Share of pairs of items that have the same first codes.

    For pairs that the codes can't have been fitted to, such as every user's last training item
    and validation target.

    Args:
        codes: (n_items, n_levels).
        first: one item per pair, (n_pairs,).
        second: the other one, (n_pairs,).

    Returns:
        As `neighbour_preservation`, but ``pairs`` for their number, and ``chance`` is what pairing
        the same items at random would give: popular items are frequent on both sides. Pairs of an
        item with itself say nothing about the codes and are left out of both.

    Raises:
        ValueError: lengths differ, or an item lies outside the catalogue.
    """
    a, b = np.asarray(first, dtype=np.int64), np.asarray(second, dtype=np.int64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"pairs have shapes {a.shape} and {b.shape}; both need to be (n_pairs,)")
    both = np.concatenate([a, b])
    if len(both) and (both.min() < 0 or both.max() >= len(codes)):
        raise ValueError(
            f"pairs hold items {both.min()} to {both.max()}; the catalogue's rows are 0 to "
            f"{len(codes) - 1}"
        )
    a, b = a[a != b], b[a != b]
    groups = prefix_groups(codes)
    repeats = _meetings(a, b, len(codes))
    others = len(a) ** 2 - repeats
    same: list[float | None] = []
    chance = []
    for level in range(codes.shape[1]):
        group = groups[:, level]
        same.append(float((group[a] == group[b]).mean()) if len(a) else None)
        met = _meetings(group[a], group[b], len(codes)) - repeats
        chance.append(met / others if others else 0.0)
    return {"same_code": same, "chance": chance, "lift": _lift(same, chance), "pairs": len(a)}


def _meetings(a: IntArray, b: IntArray, size: int) -> float:
    """How many of the len(a) * len(b) combinations are of equal numbers below `size`."""
    left, right = (np.bincount(x, minlength=size).astype(np.float64) for x in (a, b))
    return float(left @ right)


def _lift(same: list[float | None], chance: list[float]) -> list[float | None]:
    return [None if s is None or c == 0 else s / c for s, c in zip(same, chance, strict=True)]
