"""Is this run healthy? What goes wrong in generative recommenders, measured, with a verdict each.

Every check says what was found, what it means and what to do. Here are the verdicts on what the
model does (measured in `genrec.evaluation.probes`); those on the run's files are in
`genrec.evaluation.run_checks`. The rows are a seeded sample of the validation split (and of
training rows, to compare); the test split's targets are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from genrec.evaluation.probes import SCORE_TOLERANCE, WIDER, Fit, K, LevelScores, SearchGap
from genrec.evaluation.significance import bootstrap_means, interval
from genrec.metrics import coverage_at_k, hits

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Status = Literal["ok", "look", "bad", "not run"]
Verdict = tuple[Status, str, str]  # status, meaning, advice

SAMPLES = 1000  # of each bootstrap interval

# Search. Of the exhaustive top 10, beams of 10, 20 and 50 found .58, .88 and .996 on 12k items
# (.54, .86 and .99 on 1.7k): below .97 a wider beam pays, below .8 it is far too narrow.
RECALL_LOOK, RECALL_BAD = 0.97, 0.8
FILTERED_LOOK = 0.05  # targets that the filter makes impossible: repeats matter in this data

# Levels. With fewer rows that had a choice, a level's figures are chance.
MIN_CHOICES = 20
# Legality. Trained models put .91 to .995 on allowed codes (12k and 1.7k items, 3 levels); GRPO on
# full-vocabulary log-probabilities fell to .24-.40 on a toy, untrained models put next to nothing.
MASS_LOOK, MASS_BAD = 0.8, 0.5
_TINY = 1e-300  # a level's probability may underflow where it was never trained
# Fit. Of what a model gains over popularity on training rows, all (1.7k items) and .41 to .51 (12k
# items, by the draw) carried over to validation rows in two trained models. The latter's last two
# levels gain next to nothing on new rows, which is worth a look.
CARRIED_LOOK = 0.6

# Diversity. Lists of popular items alone put nearly all places on 10 items; two trained models put
# .10 and .11 (6 and 2 times these items' share of training). A small catalogue is concentrated by
# nature, hence the ratio.
DISTINCT_LOOK, DISTINCT_BAD = 0.5, 0.1  # distinct lists / distinct prompts
CONCENTRATION_LOOK, CONCENTRATION_BAD = 0.2, 0.5  # share of all places that 10 items take …
CONCENTRATION_RATIO = 3.0  # … if that is also so many times their share of the training part

# Lists. Certificates are a lower bound: at beam 50 and 12k items .47 of the lists carry one while
# .96 are exact, so a low share alone is only worth a look.
CERTIFIED_LOOK = 0.2
SHORT_BAD = 0.05

# What to mend first: a cause stands before what it causes. Of things to look at, those that move
# quality stand first.
CAUSES = (
    "manifests", "semantic ids", "model", "prompts", "legality", "levels", "fit",
    "validation curve", "search", "lists", "diversity",
)  # fmt: skip
WORTH = (
    "fit", "validation curve", "levels", "legality", "search", "diversity", "prompts",
    "semantic ids", "lists", "manifests", "model",
)  # fmt: skip
_SEVERITY: dict[Status, int] = {"bad": 0, "look": 1, "not run": 2, "ok": 3}


@dataclass(frozen=True)
class Check:
    """One verdict.

    Attributes:
        name: one of `CAUSES`.
        value: what was found, in a line.
        status: ok, look (worth a look), bad, or not run (with the reason as `value`).
        meaning: what it says about the run.
        advice: what to do; empty where nothing is to be done.
        details: the numbers behind it.
    """

    name: str
    value: str
    status: Status
    meaning: str = ""
    advice: str = ""
    details: dict[str, Any] = field(default_factory=dict)


def next_step(checks: Sequence[Check]) -> str:
    """The single most useful thing to do now."""
    for status, order in (("bad", CAUSES), ("look", WORTH), ("not run", CAUSES)):
        ranked = sorted(
            (c for c in checks if c.status == status and c.advice),
            key=lambda c: order.index(c.name),
        )
        if ranked:
            return f"{ranked[0].name}: {ranked[0].advice}"
    return "nothing to mend"


def worst_first(checks: Sequence[Check]) -> list[Check]:
    """Bad, look, not run, ok; within one status as they came."""
    return sorted(checks, key=lambda c: _SEVERITY[c.status])


def not_run(name: str, reason: str, advice: str = "") -> Check:
    """A check that could not be made."""
    return Check(name, reason, "not run", "nothing is known about it", advice)


def check_search(gap: SearchGap, run_dir: Path | str) -> Check:
    """Whether the beam finds what the model ranks highest."""
    ours, best = hits(gap.beam_rank, K), hits(gap.exhaustive_rank, K)
    lost, recall = int(((best > 0) & (ours == 0)).sum()), float(gap.recall.mean())
    filtered = float((gap.exhaustive_rank == 0).mean())
    details = {
        "rows": len(ours), "beam_width": gap.beam_width, f"recall@{K}": recall,
        "equal_lists": float(gap.equal.mean()), f"hr@{K}_beam": float(ours.mean()),
        f"hr@{K}_exhaustive": float(best.mean()), "hits_exhaustive": int(best.sum()),
        "hits_lost": lost, "items_scored": gap.scored, "items": gap.n_items,
        "largest_difference": gap.difference, "filtered_targets": filtered,
        "beam_rank": gap.beam_rank.tolist(), "exhaustive_rank": gap.exhaustive_rank.tolist(),
    }  # fmt: skip
    value = (
        f"beam {gap.beam_width} finds {recall:.1%} of the exhaustive top {K}, "
        f"{gap.equal.mean():.0%} of {len(ours)} lists are equal; HR@{K} {ours.mean():.3f}, "
        f"exhaustive {best.mean():.3f}; {lost} of {best.sum():.0f} hits lost"
    )
    if gap.scored < gap.n_items:
        value += (
            f" (against {gap.scored:,} sampled of {gap.n_items:,} items and the list of a {WIDER} "
            "times wider beam: what is lost is a lower bound)"
        )
    verdict: Verdict = ("ok", "the lists are what the model ranks highest", "")
    wider = f"genrec recommend --run_dir {run_dir} --beam_width {4 * gap.beam_width}"
    if filtered > FILTERED_LOOK:
        value += f"; the filter removes {filtered:.0%} of the targets"
        meaning = "people come back to what they had, and the filter makes that impossible"
        verdict = ("look", meaning, "rerun sft and recommend with --filter_seen false")
    if recall < RECALL_LOOK:
        verdict = ("look", "a wider beam finds better items", wider)
    if recall < RECALL_BAD:
        verdict = ("bad", "the lists are the beam's, not the model's", wider)
    if not gap.difference <= SCORE_TOLERANCE:
        value += f"; scores differ by {gap.difference:.1e}"
        meaning = "search and teacher forcing give one item different scores: a defect"
        verdict = ("bad", meaning, "report it, with doctor.json")
    return Check("search", value, *verdict, details)


def _intervals(names: Sequence[str], means: FloatArray, draws: FloatArray) -> dict[str, Any]:
    """Name -> [mean, low, high] of the columns of `bootstrap_means`."""
    bounds = [interval(m, column) for m, column in zip(means, draws.T, strict=True)]
    return {n: [b.value, b.low, b.high] for n, b in zip(names, bounds, strict=True)}


def check_levels(valid: LevelScores, train: LevelScores, seed: int) -> Check:
    """Whether every level learned more than which codes are frequent after the true prefix.

    Only rows whose prefix leaves a choice count. Gains are in nats, the model's log-probability
    minus that of the training frequencies; their majority code is the constant guess.
    """
    levels: list[dict[str, Any]] = []
    for level in range(valid.log_probs.shape[1]):
        entry = {"valid": _level(valid, level, seed), "train": _level(train, level, seed)}
        if entry["valid"] and entry["train"]:
            levels.append({"level": level + 1, **entry})
    if not levels:
        return not_run("levels", f"fewer than {MIN_CHOICES} rows had a choice", "raise --rows")
    value = "; ".join(
        f"level {e['level']}: {e['valid']['accuracy'][0]:.0%} right, constant guess "
        f"{e['valid']['majority'][0]:.0%}, log p {e['valid']['log_prob'][0]:.2f}, gain "
        f"{e['valid']['gain'][0]:+.2f}"
        for e in levels
    )
    # Learned nothing: surely no likelier on training rows, nor more often right.
    nothing = [
        str(e["level"])
        for e in levels
        if e["train"]["gain"][2] <= 0 and e["train"]["accuracy_gain"][1] <= 0
    ]
    weak = [str(e["level"]) for e in levels if e["valid"]["gain"][1] <= 0]
    verdict: Verdict = ("ok", "every level learned from the history", "")
    if weak:
        meaning = f"on new rows level {', '.join(weak)} is no surer than the code frequencies"
        advice = "try other vectors (embed) or a smaller codebook_size, or more dropout in sft"
        verdict = ("look", meaning, advice)
    if nothing:
        meaning = f"level {', '.join(nothing)} learned nothing, not even on training rows"
        advice = "train sft longer or with a higher learning_rate; check the SID map and token ids"
        verdict = ("bad", meaning, advice)
    return Check("levels", value, *verdict, {"levels": levels})


def _level(scores: LevelScores, level: int, seed: int) -> dict[str, Any]:
    """Means of one level with their intervals; empty if too few rows had a choice."""
    own = scores.choices[:, level] > 1
    if own.sum() < MIN_CHOICES:
        return {}
    parts = (scores.log_probs, scores.prior_log_probs, scores.correct, scores.prior_correct)
    ours, prior, right, majority = (part[own, level] for part in parts)
    values = np.column_stack([ours, right, majority, ours - prior, right - majority])
    names = ("log_prob", "accuracy", "majority", "gain", "accuracy_gain")
    draws = bootstrap_means(values, SAMPLES, seed)
    return {"rows": int(own.sum()), **_intervals(names, values.mean(0), draws)}


def check_legality(scores: LevelScores, loss_over: str = "vocabulary") -> Check:
    """Whether the model, left alone, would produce what the trie allows.

    Left alone among what its loss had compete: the whole vocabulary, or one level's codes. A loss
    over the allowed codes alone says nothing of others, so there nothing is checked.

    Args:
        scores: of validation rows.
        loss_over: sft's setting: vocabulary, level or trie.
    """
    legal, level = scores.legal_mass.mean(0), scores.level_mass.mean(0)
    details = {"legal_mass": legal.tolist(), "level_mass": level.tolist()}
    if loss_over == "trie":
        why = "loss_over=trie trains no probability of codes that the trie rules out"
        return replace(not_run("legality", why), details=details)
    if loss_over == "level":
        # Of each row: means of both would count rows by what was never trained.
        legal = (scores.legal_mass / np.maximum(scores.level_mass, _TINY)).mean(0)
        details["legal_mass_of_level"] = legal.tolist()
    value = f"probability on allowed codes {' / '.join(f'{m:.3f}' for m in legal)}"
    if loss_over == "level":
        value += ", among the codes of the level"
    else:
        value += f", on any code of the level {' / '.join(f'{m:.3f}' for m in level)}"
    verdict: Verdict = ("ok", "the model speaks in semantic ids by itself", "")
    advice = "check the prompts, then train sft longer; grpo needs normalizer trie"
    if legal.min() < MASS_LOOK:
        verdict = ("look", "the trie has to correct the model often", advice)
    if legal.min() < MASS_BAD:
        meaning = "it doesn't know which codes belong together: undertrained"
        if loss_over != "level" and level[legal.argmin()] < MASS_BAD:
            meaning = "it expects other tokens: undertrained, or the wrong prompt or token ids"
        verdict = ("bad", meaning, advice)
    return Check("legality", value, *verdict, details)


def check_fit(train: Fit, valid: Fit, seed: int) -> Check:
    """Training rows against validation rows, each against a guess by popularity.

    The guess takes out that the rows of one split may be easier: what is compared is the gain.
    """
    tables = {}
    for fit in (train, valid):
        gain, lead = fit.levels.sum(1) - fit.prior, fit.hits - fit.popular_hits
        tables[id(fit)] = np.column_stack([gain, fit.hits, lead, fit.popular_hits, fit.levels])
    ours, theirs = tables[id(train)], tables[id(valid)]
    names = ["gain", f"hr@{K}", f"hr@{K}_lead", f"hr@{K}_popular"]
    names += [f"log_prob_{level + 1}" for level in range(train.levels.shape[1])]
    # Other draws for the other rows: the two samples are not paired.
    draws = bootstrap_means(ours, SAMPLES, seed), bootstrap_means(theirs, SAMPLES, seed + 1)
    details = {
        "train": _intervals(names, ours.mean(0), draws[0]),
        "valid": _intervals(names, theirs.mean(0), draws[1]),
        "gap": _intervals(names, ours.mean(0) - theirs.mean(0), draws[0] - draws[1]),
    }
    value = "; ".join(
        f"{name} rows: {part['gain'][0]:+.2f} nats an item over popularity, HR@{K} "
        f"{part[names[1]][0]:.3f} (popularity {part[names[3]][0]:.3f})"
        for name, part in (("training", details["train"]), ("validation", details["valid"]))
    )
    low, high = details["gap"]["gain"][1:]
    value += f"; gap {details['gap']['gain'][0]:.2f} [{low:.2f}, {high:.2f}]"
    return Check("fit", value, *_fit_verdict(details), details)


def _fit_verdict(found: dict[str, dict[str, Any]]) -> Verdict:
    train, valid = found["train"], found["valid"]
    longer = "rerun sft with more epochs, smaller batches or a higher learning_rate"
    if train["gain"][1] <= 0:
        meaning = "underfitting: even training rows are predicted no better than by popularity"
        return "bad", meaning, longer
    if valid["gain"][2] < 0:
        meaning = "overfitting: on new rows the model is worse than popularity"
        return "bad", meaning, "rerun sft with fewer epochs, more dropout and weight_decay"
    carried = valid["gain"][0] / train["gain"][0]
    if found["gap"]["gain"][1] > 0 and carried < CARRIED_LOOK:
        meaning = (
            f"overfitting: of what was gained {max(0.0, carried):.0%} carries over to new rows"
        )
        return "look", meaning, "rerun sft with more dropout or weight_decay, or a smaller model"
    if train[f"hr@{K}_lead"][1] <= 0:
        meaning = "underfitting: training rows are hardly hit more often than by popularity"
        return "look", meaning, longer
    return "ok", "what was learned carries over to new rows", ""


def check_diversity(
    lists: IntArray, n_prompts: int, train_count: npt.NDArray[np.integer], source: str
) -> Check:
    """Whether lists depend on the history, and how much of the catalogue they show.

    Args:
        lists: catalogue rows, −1 pads. ``# (n_lists, k)``
        n_prompts: distinct prompts behind them.
        train_count: training interactions of each catalogue row.
        source: where the lists come from.
    """
    top = lists[:, :K]
    distinct = min(1.0, len(np.unique(top, axis=0)) / n_prompts)
    shown = np.bincount(top[top >= 0], minlength=len(train_count))
    share, train = (float(np.sort(n)[-K:].sum() / max(1, n.sum())) for n in (shown, train_count))
    coverage = coverage_at_k(top, len(train_count), top.shape[1])
    possible = min(1.0, top.size / len(train_count))
    value = (
        f"{distinct:.0%} distinct lists; coverage@{top.shape[1]} {coverage:.1%} of at most "
        f"{possible:.0%}; {K} items take {share:.1%} of the places ({train:.1%} in training); "
        f"{len(lists):,} {source}"
    )
    crowded = share > CONCENTRATION_RATIO * train
    advice = "train sft longer, and see levels and fit"
    verdict: Verdict = ("ok", "lists follow the history", "")
    if distinct < DISTINCT_LOOK or (crowded and share > CONCENTRATION_LOOK):
        verdict = ("look", "lists hardly depend on the history", advice)
    if distinct < DISTINCT_BAD or (crowded and share > CONCENTRATION_BAD):
        verdict = ("bad", "everybody gets the same: the history is ignored", advice)
    details = {
        "lists": len(lists), "distinct": distinct, "coverage": coverage,
        "possible_coverage": possible, "top_10_share": share, "top_10_share_training": train,
        "source": source,
    }  # fmt: skip
    return Check("diversity", value, *verdict, details)


def check_lists(certified: npt.NDArray[np.bool_], lengths: IntArray, k: int, source: str) -> Check:
    """Share of provably exact lists, and of lists shorter than asked for."""
    short, share = float((lengths < k).mean()), float(certified.mean())
    value = f"{share:.0%} provably exact, {short:.1%} shorter than {k}; {len(lengths):,} {source}"
    verdict: Verdict = ("ok", "lists are full; those without a proof may be exact, too", "")
    if share < CERTIFIED_LOOK:
        meaning = "few lists carry a proof; whether that matters, the search check says"
        verdict = ("look", meaning, "raise recommend's beam_width")
    if short:
        advice = "raise recommend's beam_width or lower k; a tight filter empties lists, too"
        verdict = ("look", "some users don't get a full list", advice)
        if short > SHORT_BAD:
            verdict = ("bad", "many users don't get a full list", advice)
    details = {"certified": share, "short": short, "k": k, "source": source}
    return Check("lists", value, *verdict, details)
