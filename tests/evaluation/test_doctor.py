"""Every verdict on what the model does has a case in which it is given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from genrec.evaluation import doctor
from genrec.evaluation.doctor import Check
from genrec.evaluation.probes import Fit, LevelScores, SearchGap


def gap_of(recall: float, equal: float = 1.0, beam=(1, 0), exhaustive=(1, 30)) -> SearchGap:
    return SearchGap(50, np.full(2, recall), np.full(2, equal), np.array(beam),
                     np.array(exhaustive), 0.0, 100, 100)  # fmt: skip


def test_search_verdicts():
    status = {r: doctor.check_search(gap_of(r), "R").status for r in (1.0, 0.9, 0.5)}
    assert status == {1.0: "ok", 0.9: "look", 0.5: "bad"}
    lost = doctor.check_search(gap_of(1.0, beam=(0, 0), exhaustive=(1, 30)), "R")
    assert lost.details["hits_lost"] == 1 and lost.details["hr@10_exhaustive"] == 0.5


def levels_of(gains, right=0.5, majority=0.2, n: int = 60, choices: int = 5) -> LevelScores:
    """Scores whose gain over the prior is `gains` per level, with some spread."""
    rng = np.random.default_rng(0)
    shape = (n, len(gains))
    prior = np.full(shape, -2.0)
    ours = prior + np.array(gains) + rng.normal(0, 0.1, shape)
    order = np.tile(np.arange(n)[:, None] / n, (1, len(gains)))
    return LevelScores(ours, (order < right) * 1.0, np.full(shape, 0.9), np.full(shape, 0.95),
                       np.full(shape, float(choices)), prior, (order < majority) * 1.0)  # fmt: skip


def test_levels_verdicts():
    good = levels_of([1.0, 0.5])
    assert doctor.check_levels(good, good, 0).status == "ok"
    weak = doctor.check_levels(levels_of([1.0, -0.3]), good, 0)
    assert weak.status == "look" and "level 2 is no surer" in weak.meaning
    dead = levels_of([1.0, -0.3], right=0.2)
    check = doctor.check_levels(dead, dead, 0)
    assert check.status == "bad" and "level 2 learned nothing" in check.meaning
    # A constant guess by the code frequencies is what "nothing" means.
    constant = replace(good, log_probs=good.prior_log_probs, correct=good.prior_correct)
    assert "level 1, 2 learned nothing" in doctor.check_levels(constant, constant, 0).meaning
    assert check.details["levels"][0]["valid"]["majority"][0] == pytest.approx(0.2)
    forced = levels_of([1.0], choices=1)
    assert doctor.check_levels(forced, forced, 0).status == "not run"


def test_legality_verdicts():
    scores = levels_of([1.0, 1.0])
    assert doctor.check_legality(scores).status == "ok"
    masses = np.array([[0.9, 0.7]] * 60)
    assert doctor.check_legality(replace(scores, legal_mass=masses)).status == "look"
    masses[:, 1] = 0.3
    check = doctor.check_legality(replace(scores, legal_mass=masses))
    assert check.status == "bad" and "which codes belong together" in check.meaning
    check = doctor.check_legality(replace(scores, legal_mass=masses, level_mass=masses))
    assert "expects other tokens" in check.meaning


def test_legality_is_measured_over_what_the_loss_had_compete():
    scores = levels_of([1.0, 1.0])
    # Of the level's codes the allowed ones have .9; the rest of the vocabulary has nearly all.
    level = np.where(np.arange(60)[:, None] % 2, 0.02, 0.001) * np.ones((60, 2))
    scores = replace(scores, level_mass=level, legal_mass=level * [0.9, 0.9])
    assert doctor.check_legality(scores).status == "bad"
    check = doctor.check_legality(scores, "level")
    assert check.status == "ok" and check.value.endswith(
        "0.900 / 0.900, among the codes of the level"
    )
    assert check.details["legal_mass_of_level"] == pytest.approx([0.9, 0.9])
    check = doctor.check_legality(replace(scores, legal_mass=level * [0.9, 0.3]), "level")
    assert check.status == "bad" and "which codes belong together" in check.meaning
    check = doctor.check_legality(scores, "trie")
    assert check.status == "not run" and "loss_over=trie" in check.value and not check.advice
    assert doctor.next_step([check]) == "nothing to mend"
    nothing = np.zeros((60, 2))  # it underflows
    check = doctor.check_legality(replace(scores, level_mass=nothing, legal_mass=nothing), "level")
    assert check.status == "bad"


def fit_of(gain: float, hit: float, popular: float = 0.0, n: int = 100, seed: int = 0) -> Fit:
    levels = np.random.default_rng(seed).normal(gain / 2, 0.2, (n, 2)) - 3
    place = np.arange(n) / n
    return Fit(levels, np.full(n, -6.0), (place < hit) * 1.0, (place < popular) * 1.0)


def test_fit_verdicts():
    def verdict(train: Fit, valid: Fit) -> tuple[str, str]:
        check = doctor.check_fit(train, valid, 0)
        return check.status, check.meaning.split(":")[0]

    assert verdict(fit_of(2, 0.3), fit_of(1.8, 0.2, seed=1))[0] == "ok"
    assert verdict(fit_of(2, 0.3), fit_of(0.5, 0.1, seed=1)) == ("look", "overfitting")
    assert verdict(fit_of(2, 0.3), fit_of(-1, 0.1, seed=1)) == ("bad", "overfitting")
    assert verdict(fit_of(0, 0.1), fit_of(0, 0.1, seed=1)) == ("bad", "underfitting")
    weak = fit_of(0.5, 0.1, popular=0.1)
    assert verdict(weak, weak) == ("look", "underfitting")
    gap = doctor.check_fit(fit_of(2, 0.3), fit_of(0.5, 0.1, seed=1), 0).details["gap"]
    assert gap["gain"][0] == pytest.approx(1.5, abs=0.1)
    assert gap["gain"][1] < gap["gain"][0] < gap["gain"][2]
    assert gap["hr@10"][0] == pytest.approx(0.2)


def test_diversity_verdicts():
    rng = np.random.default_rng(0)
    count = np.full(1000, 5)
    varied = np.array([rng.permutation(1000)[:10] for _ in range(50)])
    check = doctor.check_diversity(varied, 50, count, "lists")
    shown = len(np.unique(varied))
    assert check.status == "ok" and check.details["coverage"] == shown / 1000
    assert check.details["top_10_share_training"] == pytest.approx(0.01)
    same = np.tile(np.arange(10), (50, 1))
    check = doctor.check_diversity(same, 50, count, "lists")
    assert check.status == "bad" and check.details["distinct"] == 1 / 50
    assert check.details["top_10_share"] == 1.0
    assert doctor.check_diversity(same, 1, count, "lists").status == "bad"  # by concentration alone
    # Popular items in another order: distinct lists, yet everybody gets the same.
    shuffled = np.array([rng.permutation(10) for _ in range(50)])
    assert doctor.check_diversity(shuffled, 50, count, "lists").status == "bad"
    # A catalogue of ten items can't do otherwise.
    assert doctor.check_diversity(shuffled, 50, np.full(10, 5), "lists").status == "ok"
    half = np.concatenate([varied[:15], same[:35]])
    assert doctor.check_diversity(half, 50, np.full(1000, 5), "lists").status == "bad"
    assert doctor.check_diversity(half[:20], 20, np.full(1000, 5), "lists").status == "look"


def test_lists_verdicts():
    full = np.full(100, 10)
    certified = np.arange(100) < 50
    assert doctor.check_lists(certified, full, 10, "lists").status == "ok"
    assert doctor.check_lists(certified & False, full, 10, "lists").status == "look"
    short = full.copy()
    short[0] = 9
    assert doctor.check_lists(certified, short, 10, "lists").status == "look"
    short[:10] = 0
    check = doctor.check_lists(certified, short, 10, "lists")
    assert check.status == "bad" and check.details["short"] == 0.1


def test_next_step_is_the_cause_not_the_symptom():
    def check(name: str, status: doctor.Status) -> Check:
        return Check(name, "", status, "", "" if status == "ok" else f"mend {name}")

    symptoms = [check("diversity", "bad"), check("fit", "look"), check("prompts", "bad")]
    assert doctor.next_step(symptoms) == "prompts: mend prompts"
    assert doctor.next_step([check("manifests", "look"), check("fit", "look")]) == "fit: mend fit"
    assert doctor.next_step([check("model", "not run"), check("fit", "ok")]) == "model: mend model"
    assert doctor.next_step([check("fit", "ok")]) == "nothing to mend"
    order = [c.status for c in doctor.worst_first([check("fit", "ok"), *symptoms])]
    assert order == ["bad", "bad", "look", "ok"]
    assert sorted(doctor.CAUSES) == sorted(doctor.WORTH)
