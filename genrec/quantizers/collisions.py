"""Collision resolution: make codes bijective at the least added distortion, at fixed length.

A prefix holds as many items as the levels below it have codes. First, from the top down, items that
no longer fit below their prefix spill to the nearest sibling that has room; then, inside each
prefix in which codes are shared, the last level is reassigned by an optimal matching of items to
codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from genrec.quantizers.quality import collision_rate


@dataclass(frozen=True)
class CollisionReport:
    """What the resolution found and did.

    Attributes:
        rate_before: items that share a SID / items, before.
        identical_vectors: items whose vector equals another item's exactly.
        moved: items whose codes changed.
        spilled: those of them that changed above the last level.
        distortion_before: mean squared distance of the standardised vectors to their codes.
        distortion_after: the same afterwards.
    """

    rate_before: float
    identical_vectors: int
    moved: int
    spilled: int
    distortion_before: float
    distortion_after: float


def resolve_collisions(
    vectors: np.ndarray, codes: np.ndarray, codebooks: np.ndarray
) -> tuple[np.ndarray, CollisionReport]:
    """Codes in which no two items are alike.

    Args:
        vectors: vectors in the codebooks' space, (n_items, dim).
        codes: (n_items, n_levels).
        codebooks: (n_levels, codebook_size, dim), summed to reconstruct.

    Returns:
        The new codes and a report.

    Raises:
        ValueError: there are more items than SIDs.
    """
    n_levels, size = codebooks.shape[:2]
    if len(codes) > size**n_levels:
        raise ValueError(
            f"{len(codes)} items exceed the {size**n_levels} SIDs of {n_levels} levels x {size} "
            "codes; "
            "add a level or enlarge codebook_size"
        )
    new = codes.astype(np.int32).copy()
    for level in range(n_levels - 1):
        _spill(new, vectors, codebooks, level)
    spilled = (new[:, :-1] != codes[:, :-1]).any(axis=1)
    residual = vectors - _reconstruct(new[:, :-1], codebooks[:-1])
    for rows in _groups(new[:, :-1]):
        if len(np.unique(new[rows, -1])) < len(rows):
            cost = cdist(residual[rows], codebooks[-1], "sqeuclidean")
            new[rows, -1] = linear_sum_assignment(cost)[1]
    _, inverse, counts = np.unique(vectors, axis=0, return_inverse=True, return_counts=True)
    return new, CollisionReport(
        rate_before=collision_rate(codes),
        identical_vectors=int((counts[inverse.ravel()] > 1).sum()),
        moved=int((new != codes).any(axis=1).sum()),
        spilled=int(spilled.sum()),
        distortion_before=_distortion(vectors, codes, codebooks),
        distortion_after=_distortion(vectors, new, codebooks),
    )


def _spill(codes: np.ndarray, vectors: np.ndarray, codebooks: np.ndarray, level: int) -> None:
    """Move items between siblings at `level` until each sibling can hold its own, in place."""
    n_levels, size = codebooks.shape[:2]
    capacity = size ** (n_levels - 1 - level)
    for rows in _groups(codes[:, :level]):
        counts = np.bincount(codes[rows, level], minlength=size)
        if (counts <= capacity).all():
            continue
        residual = vectors[rows] - _reconstruct(codes[rows, :level], codebooks[:level])
        cost = cdist(residual, codebooks[level], "sqeuclidean")
        own = codes[rows, level].copy()
        for full in np.flatnonzero(counts > capacity):
            members = np.flatnonzero(own == full)
            # Those farthest from the centroid lose least by leaving.
            leaving = members[np.argsort(-cost[members, full], kind="stable")][
                : len(members) - capacity
            ]
            for member in leaving:
                room = np.where(counts < capacity, cost[member], np.inf)
                target = int(room.argmin())
                counts[full] -= 1
                counts[target] += 1
                own[member] = target
        moved = own != codes[rows, level]
        codes[rows, level] = own
        _reencode(codes, vectors, codebooks, rows[moved], level + 1)


def _reencode(
    codes: np.ndarray, vectors: np.ndarray, codebooks: np.ndarray, rows: np.ndarray, level: int
) -> None:
    """Nearest codes from `level` on for rows whose prefix has changed, in place."""
    residual = vectors[rows] - _reconstruct(codes[rows, :level], codebooks[:level])
    for lower in range(level, len(codebooks)):
        codes[rows, lower] = cdist(residual, codebooks[lower], "sqeuclidean").argmin(axis=1)
        residual = residual - codebooks[lower][codes[rows, lower]]


def _reconstruct(codes: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    if codes.shape[1] == 0:
        return np.zeros((len(codes), 1), dtype=np.float32)
    return codebooks[np.arange(codes.shape[1]), codes].sum(axis=1)


def _distortion(vectors: np.ndarray, codes: np.ndarray, codebooks: np.ndarray) -> float:
    return float(((vectors - _reconstruct(codes, codebooks)) ** 2).sum(axis=1).mean())


def _groups(prefix: np.ndarray) -> list[np.ndarray]:
    """Row numbers of each distinct prefix; one group if the prefix is empty."""
    if prefix.shape[1] == 0:
        return [np.arange(len(prefix))]
    order = np.lexsort(prefix.T[::-1])
    ordered = prefix[order]
    starts = np.flatnonzero((ordered[1:] != ordered[:-1]).any(axis=1)) + 1
    return np.split(order, starts)
