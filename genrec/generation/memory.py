"""A memory beside the model in batch generation: lists by the mixture of both.

What `genrec ensemble` does with finished lists of a split is done here for anybody's users, under
their filters, and exactly: the few items that the memory alone brings are scored by the model, too,
in a second search that can only find them. So every item of a list has the model's log-probability,
and the list's order is that of ``(1 - weight) * model + weight * memory`` (kNN-LM, Khandelwal et
al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from genrec.decoding.beam import BeamResult
from genrec.item_lists import IntArray, ItemLists, contains
from genrec.metrics import EMPTY

POWER = 2.0  # of a memory's scores, by default
Search = Callable[[Sequence[Sequence[int]], int, int, list[np.ndarray]], BeamResult]


@dataclass(frozen=True)
class Permitted:
    """What may be listed beside the rule for seen items.

    Attributes:
        allowed: of all users; None: all items. ``# (n_items,)``
        candidates: the only items of some users; None: nobody has such.
        limited: whose they are. ``# (n_rows,)``
    """

    allowed: npt.NDArray[np.bool_] | None = None
    candidates: ItemLists | None = None
    limited: npt.NDArray[np.bool_] | None = None

    def cells(self, rows: IntArray, items: IntArray, n_items: int) -> npt.NDArray[np.bool_]:
        """Whether each row may have the item beside it. ``# (n,)``."""
        may = np.ones(len(items), dtype=bool) if self.allowed is None else self.allowed[items]
        if self.candidates is not None and self.limited is not None:
            own = contains(self.candidates.keys(n_items), rows * n_items + items)
            may &= own | ~self.limited[rows]
        return may


@dataclass(frozen=True)
class Remembered:
    """Items of rows, each row's by falling probability.

    Attributes:
        rows: ascending. ``# (n,)``
        items: catalogue rows, distinct within a row. ``# (n,)``
        log_probs: ``# (n,)``
    """

    rows: IntArray
    items: IntArray
    log_probs: npt.NDArray[np.float64]


class Memory(Protocol):
    """What knows items to follow a history without the model."""

    def best(
        self, history: ItemLists, seen: ItemLists, permitted: Permitted | None = None
    ) -> Remembered:
        """See `genrec.evaluation.item_memory.ItemMemory.best`."""
        ...


def check_weight(weight: float) -> None:
    """Raise ValueError where a weight leaves nothing to the model, or is none."""
    if not 0 <= weight < 1:
        raise ValueError(f"memory_weight={weight} must be at least 0 and below 1")


def check_power(power: float) -> None:
    """Raise ValueError where no probabilities come of a power."""
    if not 0 < power < math.inf:
        raise ValueError(f"memory_power={power} must be above 0, and finite")


def beside(
    found: BeamResult,
    remembered: Remembered,
    prompts: Sequence[Sequence[int]],
    k: int,
    n_items: int,
    search: Search,
) -> BeamResult:
    """The search's candidates, and behind them the memory's own, with the model's scores.

    Args:
        found: candidates of the search, (n, m).
        remembered: what the memory knows of the same rows.
        prompts: of the rows.
        k: so many of what the memory alone brings can be listed at most, the most probable ones.
        n_items: of the catalogue.
        search: (prompts, k, beam width, candidates of each) -> their scores.

    Returns:
        Lists of m + k places, the last k by no order; nothing in them is called exact.
    """
    width = found.items.shape[1]
    keys = np.arange(len(found.items))[:, None] * n_items + found.items
    listed = np.sort(keys[found.items != EMPTY])
    new = ~contains(listed, remembered.rows * n_items + remembered.items)
    rows, items = remembered.rows[new], remembered.items[new]
    place = np.arange(len(rows)) - np.searchsorted(rows, rows)
    rows, items = rows[place < k], items[place < k]
    shape = (len(found.items), width + k)
    every = np.full(shape, EMPTY, dtype=np.int64)
    scores = np.full(shape, -np.inf, dtype=np.float32)
    levels = np.full((*shape, found.level_log_probs.shape[2]), -np.inf, dtype=np.float32)
    every[:, :width], scores[:, :width] = found.items, found.scores
    levels[:, :width] = found.level_log_probs
    owners, starts = np.unique(rows, return_index=True)
    if len(owners):
        own = np.split(items, starts[1:])
        more = search([prompts[row] for row in owners], k, k, own)
        every[owners, width:], scores[owners, width:] = more.items, more.scores
        levels[owners, width:] = more.level_log_probs
    return BeamResult(every, scores, levels, np.zeros(len(every), dtype=bool))


def log_mixture(
    items: IntArray,
    scores: npt.NDArray[np.floating],
    remembered: Remembered,
    weight: float,
    n_items: int,
) -> npt.NDArray[np.float64]:
    """Log of the mixture of model and memory for each item of a list.

    A row of which the memory knows nothing is the model's alone.

    Args:
        items: catalogue rows, −1 at padding. ``# (n, m)``
        scores: the model's log-probabilities, −inf at padding. ``# (n, m)``
        remembered: what the memory knows of these rows.
        weight: its part.
        n_items: of the catalogue.

    Returns:
        ``# (n, m)``, −inf at padding.
    """
    keys = remembered.rows * n_items + remembered.items
    order = np.argsort(keys)
    wanted = np.arange(len(items))[:, None] * n_items + items
    own = np.full(items.shape, -np.inf)
    if len(keys):
        at = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
        hit = (keys[order][at] == wanted) & (items != EMPTY)
        own[hit] = remembered.log_probs[order][at][hit]
    known = np.zeros((len(items), 1), dtype=bool)
    known[remembered.rows] = True
    mixed = np.logaddexp(np.log1p(-weight) + scores, np.log(weight) + own)
    return np.where(known, mixed, scores.astype(np.float64))
