"""Faithfulness checks of chains: two that must hold, and erasure tests that are measured.

Erasure follows ERASER (DeYoung et al. 2020, arXiv 1911.03429), with log-probabilities of the fixed
item (nats) in place of class probabilities:

- comprehensiveness = log p(item | history) − log p(item | history without all cited items); high
  if what is cited matters;
- sufficiency = log p(item | history) − log p(item | cited items alone); near or below 0 if what is
  cited is enough.

Each stands beside the same with as many uncited items drawn at random. Cited items were chosen by
leaving out one at a time, so a chain that cites one item repeats that measurement here; the test is
whether the effect holds jointly, and how far it is from that of other items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from genrec.chains import Chain, Check
from genrec.evaluation.significance import Interval, bootstrap_means, interval
from genrec.explain.assemble import Attributes
from genrec.explain.evidence import FloatArray, IntArray, item_log_probs
from genrec.recommend import Recommender

MAX_SCORE_DIFFERENCE = 1e-3  # |stored score − score measured again|, in float32
ERASURES = (
    "comprehensiveness",
    "comprehensiveness_random",
    "sufficiency",
    "sufficiency_random",
)


@dataclass(frozen=True)
class Erasure:
    """Erasure tests of lists, (R, K) each, in nats; NaN where not defined.

    Not defined: at padding, where nothing is cited, and (for the random ones) where the history has
    fewer uncited items than cited ones.
    """

    comprehensiveness: FloatArray
    comprehensiveness_random: FloatArray
    sufficiency: FloatArray
    sufficiency_random: FloatArray


def erasure(
    recommender: Recommender,
    histories: Sequence[IntArray],
    items: IntArray,
    log_probs: FloatArray,
    cited: IntArray,
    seed: int,
    draws: int = 3,
    progress: Callable[[int], object] | None = None,
) -> Erasure:
    """Drop, or keep only, the cited items of each chain, and as many uncited ones.

    Args:
        recommender: the run.
        histories: shown histories.
        items: recommended catalogue rows, (R, K); −1 pads.
        log_probs: log p(item | shown history), (R, K).
        cited: positions, (R, K, n); −1 pads.
        seed: of the random sets.
        draws: random sets per chain; their mean counts.
        progress: called with the number of prompts of each finished block.
    """
    rng = np.random.default_rng(seed)
    chains: list[tuple[int, int]] = []
    kinds: list[int] = []
    kept: list[IntArray] = []
    for r, j in zip(*np.nonzero((items >= 0) & (cited >= 0).any(-1)), strict=True):
        history, picked = histories[r], cited[r, j][cited[r, j] >= 0]
        sets = [(0, picked)]
        uncited = np.setdiff1d(np.arange(len(history)), picked)
        if len(uncited) >= len(picked):
            sets += [(1, rng.choice(uncited, len(picked), replace=False)) for _ in range(draws)]
        for kind, positions in sets:
            chains += [(r, j)] * 2
            kinds += [kind, 2 + kind]
            kept += [np.delete(history, positions), history[np.sort(positions)]]
    out = np.full((4, *items.shape), np.nan)
    if not chains:
        return Erasure(*(out[i] for i in (0, 1, 2, 3)))
    row, place = np.array(chains, dtype=np.int64).T
    single = items[row, place][:, None]
    falls = log_probs[row, place] - item_log_probs(recommender, kept, single, progress)[:, 0]
    sums, counts = np.zeros(out.shape), np.zeros(out.shape)
    np.add.at(sums, (np.array(kinds), row, place), falls)
    np.add.at(counts, (np.array(kinds), row, place), 1)
    np.divide(sums, counts, out=out, where=counts > 0)
    return Erasure(*(out[i] for i in (0, 1, 2, 3)))


def prompts_to_score(histories: Sequence[IntArray], cited: IntArray, draws: int) -> int:
    """Number of prompts that `erasure` scores, for a progress bar."""
    n_cited = (cited >= 0).sum(-1)  # (R, K)
    lengths = np.array([len(h) for h in histories])[:, None]
    return int(
        2 * (n_cited > 0).sum() + 2 * draws * ((n_cited > 0) & (lengths >= 2 * n_cited)).sum()
    )


def citations_in_history(chain: Chain, history_item_ids: Sequence[Any]) -> Check:
    """Share of cited items that lie in the shown history; it must be 1 (None: nothing is cited)."""
    cited = chain.cited_item_ids
    if not cited:
        return Check("citations_in_history", None)
    known = set(history_item_ids)
    share = sum(item in known for item in cited) / len(cited)
    return Check("citations_in_history", share, share == 1)


def attributes_match(chain: Chain, attributes: Attributes) -> Check:
    """Share of claimed attributes that the catalogue supports; it must be 1 (None: no claims)."""
    claims = [
        (item, name, value)
        for step in chain.steps
        for item, values in step.claimed_attributes.items()
        for name, value in values.items()
    ]
    if not claims:
        return Check("attributes_match", None)
    rows = attributes.rows
    right = sum(i in rows and attributes.has(rows[i], name, value) for i, name, value in claims)
    return Check("attributes_match", right / len(claims), right == len(claims))


def score_reproduced(stored: float, measured: float) -> Check:
    """|stored score − score measured again|; at most `MAX_SCORE_DIFFERENCE`."""
    difference = abs(stored - measured)
    return Check("score_difference", difference, difference <= MAX_SCORE_DIFFERENCE)


def erasure_checks(erased: Erasure, row: int, place: int) -> list[Check]:
    """The erasure measurements of one chain; they have no threshold."""
    values = [float(getattr(erased, name)[row, place]) for name in ERASURES]
    return [
        Check(name, None if np.isnan(value) else value)
        for name, value in zip(ERASURES, values, strict=True)
    ]


def check_all(
    chains: Sequence[Chain],
    attributes: Attributes,
    histories: Sequence[IntArray],
    log_probs: FloatArray,
    erased: Erasure,
    scores: Sequence[float],
) -> list[Chain]:
    """Chains with the outcomes of all checks.

    Args:
        chains: in list order, as `genrec.explain.assemble.assemble` gives them.
        attributes: of the catalogue.
        histories: shown histories, one per list.
        log_probs: measured with the whole history, (R, K).
        erased: erasure tests of the same lists.
        scores: stored score of each chain's item.
    """
    ids = attributes.item_ids
    checked = []
    row, place, current = -1, 0, None
    for chain, score in zip(chains, scores, strict=True):
        row, place = (row, place + 1) if chain.row_id == current else (row + 1, 0)
        current = chain.row_id
        checks = (
            citations_in_history(chain, [ids[i] for i in histories[row]]),
            attributes_match(chain, attributes),
            score_reproduced(score, float(log_probs[row, place])),
            *erasure_checks(erased, row, place),
        )
        checked.append(replace(chain, checks=checks))
    return checked


def summarize(chains: Sequence[Chain], samples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Means over chains with 95% bootstrap intervals; the chains of a list are drawn together.

    Args:
        chains: with their checks.
        samples: bootstrap samples.
        seed: of the draws.

    Returns:
        Counts, pass rates, the erasure means over the chains that have a random counterpart, and
        their paired differences. What no chain defines is left out.
    """
    groups = np.unique([c.row_id for c in chains], return_inverse=True)[1]
    table = np.array([[_value(c, name) for name in ERASURES] for c in chains], dtype=np.float64)
    table = np.column_stack([table, table[:, 0] - table[:, 1], table[:, 3] - table[:, 2]])
    compared = ~np.isnan(table).any(axis=1)
    supported = np.array([bool(c.cited_item_ids) for c in chains])
    report: dict[str, Any] = {
        "chains": len(chains),
        "lists": int(groups.max()) + 1,
        "chains_without_support": int((~supported).sum()),
        "chains_compared": int(compared.sum()),
    }
    for name in ("citations_in_history", "attributes_match", "score_difference"):
        made = [
            bool(c.passed) for chain in chains if (c := chain.check(name)) and c.value is not None
        ]
        report[f"{name}_passed"] = float(np.mean(made)) if made else None
        report[f"{name}_checked"] = len(made)
    if compared.any():
        part = np.unique(groups[compared], return_inverse=True)[1]
        draws = bootstrap_means(table[compared], samples, seed, part)
        means = table[compared].mean(axis=0)
        names = (*ERASURES, "comprehensiveness_gain", "sufficiency_gain")
        for i, name in enumerate(names):
            report[name] = asdict(interval(float(means[i]), draws[:, i]))
    return {**report, "sentence": sentence(report)}


def _value(chain: Chain, name: str) -> float:
    check = chain.check(name)
    return np.nan if check is None or check.value is None else check.value


def sentence(report: dict[str, Any]) -> str:
    """The erasure result in words."""
    if "comprehensiveness" not in report:
        return "No chain has enough uncited history items to compare with, so nothing was compared."
    c, r, g = (
        Interval(**report[name])
        for name in ("comprehensiveness", "comprehensiveness_random", "comprehensiveness_gain")
    )
    assert g.low is not None and g.high is not None
    verdict = "not distinguishable from 0"
    if g.low > 0 or g.high < 0:
        verdict = "above 0" if g.low > 0 else "below 0"
    number = {
        name: f"{value:.2f}".replace("-", "−")
        for name, value in (
            ("c", c.value),
            ("r", r.value),
            ("g", g.value),
            ("l", g.low),
            ("h", g.high),
        )
    }
    return (
        f"Leaving out all cited items lowers an item's log-probability by {number['c']} on "
        f"average, leaving out as many random uncited ones by {number['r']}: a difference of "
        f"{number['g']} [{number['l']}, {number['h']}], {verdict} "
        f"({report['chains_compared']:,} of {report['chains']:,} chains; 95% bootstrap interval "
        "over lists)."
    )
