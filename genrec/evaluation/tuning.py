"""Choosing a baseline's settings on validation rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from genrec.item_lists import ItemLists
from genrec.metrics import RelevantRanks, find_relevant, gains, target_rank

IntArray = npt.NDArray[np.int64]

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings")


def relevant_ranks(lists: IntArray, relevant: IntArray | ItemLists) -> IntArray | RelevantRanks:
    """Where each row's target, or all its relevant items, stand in its list.

    Args:
        lists: item indices, best first. ``# (n_rows, k)``
        relevant: result of `genrec.evaluation.lists.relevant_items`.
    """
    if isinstance(relevant, ItemLists):
        return find_relevant(lists, relevant)
    return target_rank(lists, relevant)


def mean_ndcg(lists: IntArray, relevant: IntArray | ItemLists, k: int) -> float:
    """NDCG@k over all rows: what settings are chosen by (arguments as of `relevant_ranks`)."""
    return float(gains(relevant_ranks(lists, relevant), k).mean())


def coordinate_search(
    start: Settings,
    grid: Mapping[str, Sequence[float]],
    score: Callable[[Settings], float],
    passes: int = 3,
) -> tuple[Settings, list[dict[str, Any]]]:
    """Set one setting after the other to its best value of `grid`, the others held.

    Args:
        start: a frozen dataclass, the settings to start from.
        grid: setting -> the values to try.
        score: what to maximise; called once per distinct settings.
        passes: most passes over all settings; it ends when one changes nothing.

    Returns:
        The best settings, and every trial as ``{"settings", "ndcg"}`` in the order tried.
    """
    scores = {start: score(start)}
    best = start
    for _ in range(passes):
        before = best
        for name, values in grid.items():
            for value in values:
                trial = _with(best, name, value)
                if trial not in scores:
                    scores[trial] = score(trial)
                    logger.debug("%s: %.4f", trial, scores[trial])
            best = max((_with(best, name, v) for v in values), key=scores.__getitem__)
        if best == before:
            break
    trials = [{"settings": asdict(key), "ndcg": v} for key, v in scores.items()]  # type: ignore[call-overload]
    return best, trials


def _with(settings: Settings, name: str, value: float) -> Settings:
    changed: dict[str, Any] = {name: value}
    return replace(settings, **changed)  # type: ignore[type-var]
