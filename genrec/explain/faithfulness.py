"""How faithful a run's chains are: figures beside controls, thresholds, slices.

Means over chains with 95% bootstrap intervals; the chains of a list are drawn together, since they
share a history. A figure is compared with a control only over chains that have both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from genrec.chains import Chain
from genrec.evaluation.significance import Interval, bootstrap_means, interval
from genrec.explain.thresholds import (
    ALL_CONTROLS,
    FIGURES,
    NAMES,
    THRESHOLDS,
    VERDICTS,
    Threshold,
)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def summarize(
    chains: Sequence[Chain],
    thresholds: Sequence[str] = THRESHOLDS,
    history_lengths: Mapping[str, int] | None = None,
    samples: int = 1000,
    seed: int = 0,
    verdicts: Sequence[str] = VERDICTS,
) -> dict[str, Any]:
    """The figures of a run.

    Args:
        chains: with their checks.
        thresholds: rules, declared before the chains were made.
        history_lengths: shown history of each row, for the slices.
        samples: bootstrap samples.
        seed: of the draws.
        verdicts: checks whose share of passes is told.

    Returns:
        chains, lists, chains_without_support; verdicts: check -> {share, checked}; figures: name ->
        {chain, controls: {name: {value, gain}}, n} with intervals, a gain being positive where the
        chain does better; thresholds, each with its verdict; slices; sentence.
    """
    groups = np.unique([c.row_id for c in chains], return_inverse=True)[1]
    values = {name: np.array([_value(c, name) for c in chains]) for name in NAMES}
    means = _Means(values, groups, samples, seed)
    cites = [step is not None and bool(step.cited_item_ids)
             for step in (c.step("evidence") for c in chains)]  # fmt: skip
    report: dict[str, Any] = {
        "chains": len(chains),
        "lists": int(groups.max()) + 1,
        "chains_without_support": len(cites) - sum(cites),
        "verdicts": {name: _verdict(chains, name) for name in verdicts},
        "figures": {
            name: figure
            for name, better in FIGURES.items()
            if (figure := _figure(means, name, better)) is not None
        },
    }
    report["thresholds"] = [_judged(means, Threshold.parse(rule)) for rule in thresholds]
    report["slices"] = _slices(chains, values, groups, history_lengths or {}, samples, seed)
    return {**report, "sentence": sentence(report)}


@dataclass(frozen=True)
class _Means:
    """Means of columns, or of their differences, with intervals."""

    values: Mapping[str, FloatArray]
    groups: IntArray
    samples: int
    seed: int

    def of(self, left: str, right: str | None = None) -> tuple[Interval | None, int]:
        """Interval, and over how many chains; None if there are none."""
        column = self.values[left] - (0 if right is None else self.values[right])
        return _mean(column, self.groups, self.samples, self.seed)


def _mean(
    column: FloatArray, groups: IntArray, samples: int, seed: int
) -> tuple[Interval | None, int]:
    there = ~np.isnan(column)
    if not there.any():
        return None, 0
    part = np.unique(groups[there], return_inverse=True)[1]
    draws = bootstrap_means(column[there][:, None], samples, seed, part)[:, 0]
    return interval(float(column[there].mean()), draws), int(there.sum())


def _value(chain: Chain, name: str) -> float:
    check = chain.check(name)
    return np.nan if check is None or check.value is None else check.value


def _verdict(chains: Sequence[Chain], name: str) -> dict[str, Any]:
    made = [bool(c.passed) for chain in chains if (c := chain.check(name)) and c.value is not None]
    return {"share": float(np.mean(made)) if made else None, "checked": len(made)}


def _figure(means: _Means, name: str, better: int) -> dict[str, Any] | None:
    own, n = means.of(name)
    if own is None:
        return None
    controls = {}
    for control in ALL_CONTROLS:
        other = f"{name}_{control}"
        gain, compared = means.of(name, other) if better > 0 else means.of(other, name)
        value, _ = means.of(other)
        if gain is not None and value is not None:
            controls[control] = {"value": asdict(value), "gain": asdict(gain), "n": compared}
    return {"chain": asdict(own), "n": n, "controls": controls}


def _judged(means: _Means, threshold: Threshold) -> dict[str, Any]:
    measured, n = means.of(threshold.left, threshold.right)
    found = {} if measured is None else asdict(measured)
    return {"rule": threshold.rule, **found, "n": n, "verdict": threshold.verdict(measured)}


def _slices(
    chains: Sequence[Chain],
    values: Mapping[str, FloatArray],
    groups: IntArray,
    lengths: Mapping[str, int],
    samples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Comprehensiveness above random citations, and failed checks, by rank and history length."""
    rank = np.array([c.rank for c in chains])
    length = np.array([lengths.get(c.row_id, -1) for c in chains])
    masks = {
        "rank 1": rank == 1,
        "rank 2 to 5": (rank >= 2) & (rank <= 5),
        "rank 6 and below": rank >= 6,
        "1 to 4 history items": (length >= 1) & (length <= 4),
        "5 to 9 history items": (length >= 5) & (length <= 9),
        "10 or more history items": length >= 10,
    }
    failed = np.array([any(check.passed is False for check in c.checks) for c in chains])
    gains = values["comprehensiveness"] - values["comprehensiveness_random"]
    made = []
    for name, mask in masks.items():
        if mask.any():
            gain, n = _mean(gains[mask], groups[mask], samples, seed)
            made.append(
                {
                    "slice": name,
                    "chains": int(mask.sum()),
                    "failed": int(failed[mask].sum()),
                    "gain": None if gain is None else asdict(gain),
                    "compared": n,
                }
            )
    return made


def sentence(report: Mapping[str, Any]) -> str:
    """The erasure result in words."""
    figure = report["figures"].get("comprehensiveness")
    if figure is None or "random" not in figure["controls"]:
        return "No chain has enough uncited history items to compare with, so nothing was compared."
    control = figure["controls"]["random"]
    gain = Interval(**control["gain"])
    assert gain.low is not None and gain.high is not None
    verdict = "not distinguishable from 0"
    if gain.low > 0 or gain.high < 0:
        verdict = "above 0" if gain.low > 0 else "below 0"
    numbers = (gain.value, gain.low, gain.high)
    value, low, high = (f"{number:.2f}".replace("-", "−") for number in numbers)
    return (
        "Putting similar items in place of all cited ones lowers an item's log-probability by "
        f"{value} [{low}, {high}] more than doing so with as many random history items, {verdict} "
        f"({control['n']:,} of {report['chains']:,} chains; 95% bootstrap interval over lists)."
    )
