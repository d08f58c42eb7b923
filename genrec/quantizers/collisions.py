"""Collision resolution: make codes bijective, at fixed length, with the least added distortion.

Four ways, all of which end with one SID per item:

- "minimal": inside each prefix in which codes are shared, the last level is matched to the items at
  the least total distance (Kuhn 1955). Where a prefix has more items than codes, those that lose
  least move to the nearest sibling prefix with room first.
- "sinkhorn": items that share a SID are spread over the last level's codes by optimal transport, in
  rounds, as LC-Rec (Zheng et al. 2024) and LETTER do; what is left is resolved as above.
- "suffix": one level is appended that numbers the items of each SID, as TIGER (Rajput et al. 2023)
  does; nothing moves, but every item gets one token more, and that token describes nothing.
- "item-token": one level is appended on which every item has a token of its own, as in the hybrid
  indexing of Hua et al. (2023): the levels above say what items have in common, the last one can
  learn what each is alone. The vocabulary grows with the catalogue. For catalogues of up to some
  100,000 items and few interactions it ranks better than codes alone (README, "Which index").

Items with equal vectors collide whatever the quantizer: `duplicates` tells of them beforehand. New
items of a living catalogue are placed around the SIDs that are taken (`place_items`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from genrec.quantizers.item_indexes import (
    INDEPENDENT,
    independent_index,
    later_numbers,
    next_codes,
    numbers_in_groups,
)
from genrec.quantizers.quality import collision_rate, row_ids, shared_rows
from genrec.quantizers.quantizer import (
    BLOCK_CELLS,
    CodeArray,
    FloatArray,
    Quantizer,
    check_capacity,
    check_codes,
    check_input,
    row_blocks,
)

logger = logging.getLogger(__name__)

Method = Literal["minimal", "sinkhorn", "suffix", "item-token"]
METHODS: tuple[Method, ...] = ("minimal", "sinkhorn", "suffix", "item-token")
IntArray = npt.NDArray[np.int64]

_SINKHORN_ROUNDS, _SINKHORN_STEPS, _SINKHORN_EPSILON = 20, 50, 0.003  # LC-Rec's


@dataclass(frozen=True)
class CollisionReport:
    """What the resolution found and did.

    Attributes:
        method: one of `METHODS`.
        rate_before: items that share a SID / items, before.
        groups: SIDs that were shared.
        largest_group: most items that shared one SID.
        moved: items whose codes changed.
        spilled: those of them that changed above the last level.
        distortion_before: mean squared distance of the latents to what their codes stand for.
        distortion_after: the same afterwards.
    """

    method: str
    rate_before: float
    groups: int
    largest_group: int
    moved: int
    spilled: int
    distortion_before: float
    distortion_after: float


def resolve_collisions(
    quantizer: Quantizer,
    vectors: npt.NDArray[np.floating],
    codes: npt.NDArray[np.integer],
    method: Method = "minimal",
    seed: int = 0,
    spare: float = 0.1,
) -> tuple[CodeArray, tuple[int, ...], CollisionReport]:
    """Codes in which no two items are alike.

    Args:
        quantizer: what gave the codes.
        vectors: its input, (n_items, dim); may be a memory map.
        codes: (n_items, n_levels).
        method: see the module.
        seed: of the order in which "suffix" numbers items, and in which items with equal vectors
            get codes: that of the rows would often tell who was bought after whom.
        spare: of "item-token": tokens kept for later items, as a share of the items.

    Returns:
        The new codes (n_items, n_levels; one level more for "suffix" and "item-token"), their
        codebook sizes, and a report.

    Raises:
        ValueError: there are more items than SIDs, or shapes disagree.
    """
    sizes = quantizer.codebook_sizes
    if method not in METHODS:
        raise ValueError(f"collisions={method!r} is none of {', '.join(METHODS)}")
    check_codes(codes, sizes)
    check_input(vectors, quantizer.dim)
    if len(codes) != len(vectors):
        raise ValueError(f"{len(codes)} rows of codes for {len(vectors)} vectors")
    old = np.ascontiguousarray(codes, dtype=np.int32)
    if method == "suffix":
        suffix = later_numbers(np.empty((0, len(sizes) + 1), np.int32), old, seed)
        new = np.column_stack([old, suffix]).astype(np.int32)
        # Twice the room that is needed today, for the items of tomorrow.
        new_sizes = (*sizes, 2 * (int(new[:, -1].max()) + 1))
    elif method == "item-token":
        tokens = independent_index(len(old), spare)
        new = np.column_stack([old, tokens.codes])
        new_sizes = (*sizes, *tokens.codebook_sizes)
    else:
        check_capacity(len(codes), sizes)
        new, new_sizes = old.copy(), sizes
        state = _Placement(quantizer, vectors, new, n_fixed=0, seed=seed)
        if method == "sinkhorn":
            state.spread_by_sinkhorn()
        state.make_distinct()
    assert not shared_rows(new).any()
    return new, new_sizes, _report(quantizer, vectors, old, new, method)


def place_items(
    quantizer: Quantizer,
    vectors: npt.NDArray[np.floating],
    taken: npt.NDArray[np.integer],
    codebook_sizes: tuple[int, ...],
    item_tokens: bool = False,
    seed: int = 0,
    wanted: npt.NDArray[np.integer] | None = None,
) -> CodeArray:
    """Codes of new items, none of them taken, none shared, nothing else moved.

    Args:
        quantizer: what the taken codes come from.
        vectors: the new items', (n_new, dim).
        taken: codes that are in use or reserved, distinct, (n_taken, n_levels).
        codebook_sizes: the map's: the quantizer's, and a level of suffixes or item tokens if it
            has one.
        item_tokens: the last level holds item tokens, see `has_item_tokens`.
        seed: of the order in which suffixes, and the codes of equal vectors, are dealt.
        wanted: codes that the items shall have as far as they are free, (n_new, n_levels); default:
            the quantizer's. Not for maps with a level of suffixes or item tokens.

    Returns:
        (n_new, n_levels) int32.

    Raises:
        ValueError: no room is left, taken codes repeat, or shapes disagree.
    """
    sizes = quantizer.codebook_sizes
    check_codes(taken, codebook_sizes)
    if shared_rows(np.asarray(taken)).any():
        raise ValueError("taken codes share a SID; resolve that map first")
    if len(vectors) == 0:
        return np.empty((0, len(codebook_sizes)), dtype=np.int32)
    if codebook_sizes[:-1] == sizes:
        encoded, old = quantizer.encode(vectors), np.asarray(taken)
        if item_tokens:
            tokens = next_codes(INDEPENDENT, old[:, -1:], codebook_sizes[-1:], len(vectors))
            return np.column_stack([encoded, tokens]).astype(np.int32)
        suffix = later_numbers(old, encoded, seed)
        if (full := suffix >= codebook_sizes[-1]).any():
            raise ValueError(
                f"{int(full.sum())} new items have no suffix left among the {codebook_sizes[-1]} "
                "of their SID; quantize the whole catalogue anew"
            )
        return np.column_stack([encoded, suffix]).astype(np.int32)
    if codebook_sizes != sizes:
        raise ValueError(
            f"the map has codebooks of {codebook_sizes}, the quantizer of {sizes}; they don't "
            "belong together"
        )
    check_capacity(len(taken) + len(vectors), sizes)
    own = quantizer.encode(vectors) if wanted is None else wanted
    codes = np.concatenate([taken, own]).astype(np.int32)
    _Placement(quantizer, vectors, codes, len(taken), seed).make_distinct()
    assert not shared_rows(codes).any()
    return codes[len(taken) :]


def has_item_tokens(codes: npt.NDArray[np.integer], codebook_sizes: tuple[int, ...]) -> bool:
    """Whether the last level of a map gives every item a token of its own.

    A suffix level has room for the items of one SID only, and repeats from SID to SID.
    """
    last = codes[:, -1]
    return codebook_sizes[-1] >= len(last) and len(np.unique(last)) == len(last)


def _report(
    quantizer: Quantizer,
    vectors: npt.NDArray[np.floating],
    old: CodeArray,
    new: CodeArray,
    method: str,
) -> CollisionReport:
    counts = np.bincount(row_ids(old))
    kept = new[:, : old.shape[1]]
    changed = kept != old
    moved = np.flatnonzero(changed.any(axis=1))
    before = after = 0.0
    for block in row_blocks(len(old), quantizer.dim):
        before += _distortion(quantizer, vectors[block], old[block])
    for block in row_blocks(len(moved), quantizer.dim):
        rows = moved[block]
        after += _distortion(quantizer, vectors[rows], kept[rows])
        after -= _distortion(quantizer, vectors[rows], old[rows])
    return CollisionReport(
        method=method,
        rate_before=collision_rate(old),
        groups=int((counts > 1).sum()),
        largest_group=int(counts.max()),
        moved=len(moved),
        spilled=int(changed[:, :-1].any(axis=1).sum()),
        distortion_before=before / len(old),
        distortion_after=(before + after) / len(old),
    )


def _distortion(quantizer: Quantizer, vectors: npt.NDArray[np.floating], codes: CodeArray) -> float:
    latents = quantizer.project(np.asarray(vectors, dtype=np.float32))
    return float(((latents - quantizer.reconstruct(codes)) ** 2).sum(dtype=np.float64))


@dataclass
class _Placement:
    """Codes while they are made distinct, in place.

    The first `n_fixed` rows of `codes` don't move; `vectors` are those of the rows after them. Of
    items that are alike, those that come first in a seeded order choose first.
    """

    quantizer: Quantizer
    vectors: npt.NDArray[np.floating]
    codes: CodeArray
    n_fixed: int
    seed: int

    def make_distinct(self) -> None:
        """Spill what doesn't fit below its prefix, from the top down; then match the last level."""
        for level in range(self.codes.shape[1] - 1):
            self._spill(level)
        self._match_last_level()

    def _blocks(self, n_rows: int, level: int) -> Iterator[slice]:
        """Slices of rows whose vectors, and whose costs at `level`, may be held at once."""
        width = max(self.quantizer.dim, self.quantizer.codebook_sizes[level])
        return row_blocks(n_rows, width)

    def _latents(self, rows: IntArray) -> FloatArray:
        """Latents of rows, none of them fixed."""
        vectors = np.asarray(self.vectors[rows - self.n_fixed], dtype=np.float32)
        return self.quantizer.project(vectors)

    def _costs(self, rows: IntArray, level: int) -> FloatArray:
        """What the codes of `level` below their prefixes cost rows, none of them fixed."""
        return self.quantizer.level_costs(self._latents(rows), self.codes[rows, :level], level)

    def _groups_of(self, ids: IntArray, wanted: npt.NDArray[np.bool_]) -> list[IntArray]:
        """Rows of each group whose id is wanted, in the seeded order."""
        rows = np.random.default_rng(self.seed).permutation(np.flatnonzero(wanted[ids]))
        rows = rows[np.argsort(ids[rows], kind="stable")]
        return np.split(rows, np.flatnonzero(np.diff(ids[rows])) + 1) if len(rows) else []

    def _match_last_level(self) -> None:
        """Give the items of each prefix distinct last codes at the least total distance."""
        codes, sizes = self.codes, self.quantizer.codebook_sizes
        last = len(sizes) - 1
        prefixes = row_ids(codes[:, :last])
        shared = np.zeros(prefixes.max() + 1, dtype=bool)
        shared[prefixes[shared_rows(codes)]] = True
        most = max(1, BLOCK_CELLS // max(self.quantizer.dim, sizes[last]))
        for batch in _batches(self._groups_of(prefixes, shared), most):
            rows = np.concatenate(batch)
            distances = self._costs(rows[rows >= self.n_fixed], last)
            at = 0
            for group in batch:
                free = group[group >= self.n_fixed]
                cost = distances[at : at + len(free)]
                at += len(free)
                # The codes of fixed items are not to be had.
                taken = codes[group[group < self.n_fixed], last]
                if not len(taken):
                    codes[free, last] = _match(cost)
                    continue
                left = np.delete(np.arange(sizes[last]), taken)
                codes[free, last] = left[_match(np.delete(cost, taken, axis=1))]

    def _spill(self, level: int) -> None:
        """Move items between siblings at `level` until each sibling can hold its own."""
        codes, sizes = self.codes, self.quantizer.codebook_sizes
        capacity = math.prod(sizes[level + 1 :])
        nodes = row_ids(codes[:, : level + 1])
        over = np.bincount(nodes) > capacity
        if not over.any():
            return
        parents = row_ids(codes[:, :level])
        crowded = np.zeros(parents.max() + 1, dtype=bool)
        crowded[parents[over[nodes]]] = True
        for rows in self._groups_of(parents, crowded):
            own = codes[rows, level].copy()
            counts = np.bincount(own, minlength=sizes[level])
            leaving = []
            for full in np.flatnonzero(counts > capacity):
                members = np.flatnonzero((own == full) & (rows >= self.n_fixed))
                cost = np.empty(len(members), dtype=np.float32)
                for block in self._blocks(len(members), level):
                    cost[block] = self._costs(rows[members[block]], level)[:, full]
                # Those farthest from the centroid lose least by leaving.
                surplus = counts[full] - capacity
                leaving.append(members[np.argsort(-cost, kind="stable")][:surplus])
                counts[full] = capacity
            movers = np.concatenate(leaving)
            room = np.maximum(capacity - counts, 0)
            codes[rows[movers], level] = self._fill(rows[movers], level, room)
            self._reencode(rows[movers], level + 1)

    def _fill(self, rows: IntArray, level: int, room: IntArray) -> IntArray:
        """Code of each row, none used more often than it has room; cheap rows choose first.

        Costs are computed anew for the rows that a round leaves over: all rows' costs to all codes
        are never held at once.
        """
        left = room.copy()
        chosen = np.full(len(rows), -1, dtype=np.int64)
        waiting = np.arange(len(rows))
        while len(waiting):
            assert left.sum() >= len(waiting), "the prefix above has room by construction"
            wanted = np.empty(len(waiting), dtype=np.int64)
            cost = np.empty(len(waiting), dtype=np.float32)
            for block in self._blocks(len(waiting), level):
                costs = np.where(left > 0, self._costs(rows[waiting[block]], level), np.inf)
                wanted[block] = costs.argmin(axis=1)
                cost[block] = costs.min(axis=1)
            order = np.lexsort((cost, wanted))
            accepted = order[numbers_in_groups(wanted, order)[order] < left[wanted[order]]]
            chosen[waiting[accepted]] = wanted[accepted]
            left -= np.bincount(wanted[accepted], minlength=len(left))
            waiting = np.delete(waiting, accepted)
        return chosen

    def _reencode(self, rows: IntArray, level: int) -> None:
        """Nearest codes from `level` on, as in encoding, for rows whose prefix has changed."""
        width = max(self.quantizer.dim, *self.quantizer.codebook_sizes[level:])
        for part in row_blocks(len(rows), width):
            block = rows[part]
            latents = self._latents(block)
            for lower in range(level, self.codes.shape[1]):
                prefix = self.codes[block, :lower]
                distances = self.quantizer.level_distances(latents, prefix, lower)
                self.codes[block, lower] = distances.argmin(axis=1)

    def spread_by_sinkhorn(self) -> None:
        """LC-Rec's rounds: colliding items are mapped uniformly to the last level's codes."""
        last, sizes = self.codes.shape[1] - 1, self.quantizer.codebook_sizes
        for _ in range(_SINKHORN_ROUNDS):
            rows = np.flatnonzero(shared_rows(self.codes))
            if not len(rows):
                return
            # A plan takes some six times the memory of its costs.
            for part in row_blocks(len(rows), 6 * max(self.quantizer.dim, sizes[last])):
                block = rows[part]
                plan = uniform_plan(self._costs(block, last))
                self.codes[block, last] = plan.argmax(axis=1)


def _match(cost: FloatArray) -> IntArray:
    """Column of each row in the cheapest assignment without repeats."""
    n, width = cost.shape
    if n == 1:
        return cost.argmin(axis=1)
    if 4 * n < width:  # a row never needs more than its n cheapest columns
        cheapest = np.argpartition(cost, n, axis=1)[:, :n]
        columns = np.unique(cheapest)
        return columns[linear_sum_assignment(cost[:, columns])[1]]
    return linear_sum_assignment(cost)[1]


def _batches(groups: list[IntArray], most: int) -> list[list[IntArray]]:
    """Groups together, at most `most` rows at once (or one larger group)."""
    batches: list[list[IntArray]] = []
    held = most
    for group in groups:
        if held + len(group) > most or not batches:
            batches.append([])
            held = 0
        batches[-1].append(group)
        held += len(group)
    return batches


def uniform_plan(
    distances: FloatArray, epsilon: float = _SINKHORN_EPSILON, steps: int = _SINKHORN_STEPS
) -> FloatArray:
    """Entropic transport of rows to columns, all columns alike full (Cuturi 2013), (n, size).

    Distances are centred and scaled to [-1, 1] first, as in LC-Rec, so that `epsilon` doesn't
    depend on their unit. Computed on logarithms, where a small epsilon can't underflow.
    """
    low, high = float(distances.min()), float(distances.max())
    middle, half = (low + high) / 2, max((high - low) / 2, 1e-12)
    log_plan = -((distances - middle) / half).astype(np.float64) / epsilon
    n, size = log_plan.shape
    for _ in range(steps):
        log_plan -= _logsumexp(log_plan, 0) + np.log(size)
        log_plan -= _logsumexp(log_plan, 1) + np.log(n)
    return np.exp(log_plan + np.log(n)).astype(np.float32)


def _logsumexp(values: npt.NDArray[np.float64], axis: int) -> npt.NDArray[np.float64]:
    top = values.max(axis=axis, keepdims=True)
    return top + np.log(np.exp(values - top).sum(axis=axis, keepdims=True))
