"""Checks find planted errors; erasure equals brute force; aggregates equal hand counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from genrec.chains import Chain, Check, Step
from genrec.explain import checks
from genrec.explain.assemble import Attributes, assemble
from genrec.explain.evidence import item_log_probs, leave_one_out


@pytest.fixture(scope="module")
def measured(recommender, histories, items):
    evidence = leave_one_out(recommender, histories, items)
    cited = evidence.cited(2)
    erased = checks.erasure(recommender, histories, items, evidence.log_probs, cited, seed=0)
    return evidence, cited, erased


@pytest.fixture(scope="module")
def chains(recommender, lists, histories, measured):
    evidence, cited, erased = measured
    attributes = Attributes.from_catalog(recommender.catalog)
    made = assemble(attributes, lists, histories, evidence, cited)
    scores = lists["score"].to_list()
    return checks.check_all(made, attributes, histories, evidence.log_probs, erased, scores)


def test_erasure_is_brute_force(recommender, histories, items, measured):
    evidence, cited, erased = measured
    found = 0
    for row, place in zip(*np.nonzero((cited >= 0).any(-1)), strict=True):
        history, picked = histories[row], cited[row, place][cited[row, place] >= 0]
        one = items[row : row + 1, place : place + 1]
        sets = {
            "comprehensiveness": np.delete(history, picked),
            "sufficiency": history[sorted(picked)],
        }
        for name, kept in sets.items():
            fall = evidence.log_probs[row, place] - item_log_probs(recommender, [kept], one)[0, 0]
            assert getattr(erased, name)[row, place] == pytest.approx(fall, abs=1e-4)
        enough = len(history) - len(picked) >= len(picked)
        assert np.isfinite(erased.comprehensiveness_random[row, place]) == enough
        assert np.isfinite(erased.sufficiency_random[row, place]) == enough
        if len(picked) == 1:  # the same prompt as in the leave-one-out measurement
            delta = evidence.deltas[row, place, picked[0]]
            assert erased.comprehensiveness[row, place] == pytest.approx(delta, abs=1e-4)
        found += enough
    assert found > 5
    nothing = ~(cited >= 0).any(-1)
    assert nothing.any() and np.isnan(erased.comprehensiveness[nothing]).all()


def test_random_sets_are_uncited_seeded_and_the_other_ones(recommender, histories, items, measured):
    """With exactly one uncited item, the random set can only be that one."""
    evidence, _, _ = measured
    row = next(i for i, h in enumerate(histories) if len(h) >= 2)
    history, one = histories[row][:2], items[row : row + 1, :1]
    full = item_log_probs(recommender, [history], one)
    cited = np.array([[[1]]])
    made = checks.erasure(recommender, [history], one, full, cited, seed=0, draws=2)
    without = item_log_probs(recommender, [history[1:]], one)
    assert made.comprehensiveness_random[0, 0] == pytest.approx((full - without)[0, 0], abs=1e-5)
    assert made.sufficiency_random[0, 0] == pytest.approx(made.comprehensiveness[0, 0], abs=1e-5)
    cited = evidence.cited(1)
    runs = [
        checks.erasure(recommender, histories, items, evidence.log_probs, cited, seed, 1)
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(
        runs[0].comprehensiveness_random, runs[1].comprehensiveness_random
    )
    assert (
        np.nanmax(np.abs(runs[0].comprehensiveness_random - runs[2].comprehensiveness_random)) > 0
    )
    np.testing.assert_allclose(runs[0].comprehensiveness, runs[2].comprehensiveness, atol=1e-5)


def test_progress_counts_all_prompts(recommender, histories, items, measured):
    evidence, cited, _ = measured
    done: list[int] = []
    checks.erasure(
        recommender, histories, items, evidence.log_probs, cited, 0, draws=2, progress=done.append
    )
    assert sum(done) == checks.prompts_to_score(histories, cited, 2)


def test_sound_chains_pass(chains):
    for chain in chains:
        for name in ("citations_in_history", "attributes_match"):
            assert chain.check(name).passed in (True, None)
        assert chain.check("score_difference").passed
    assert any(c.check("attributes_match").passed for c in chains)


def test_planted_errors_fail(chains, recommender, histories, lists):
    attributes = Attributes.from_catalog(recommender.catalog)
    chain = next(c for c in chains if c.check("attributes_match").passed)
    row = lists["row_id"].unique(maintain_order=True).to_list().index(chain.row_id)
    history = [attributes.item_ids[i] for i in histories[row]]
    foreign = next(i for i in attributes.item_ids if i not in history)
    lie = Step("evidence", "because", (chain.cited_item_ids[0], foreign))
    check = checks.citations_in_history(replace(chain, steps=(lie,)), history)
    assert (check.value, check.passed) == (0.5, False)
    for claims in ({foreign: {"brand": "Nobody"}}, {"no such item": {"brand": "Acme"}}):
        lie = Step("shared_attributes", "same brand", claimed_attributes=claims)
        check = checks.attributes_match(replace(chain, steps=(*chain.steps, lie)), attributes)
        assert check.value < 1 and check.passed is False
    assert checks.score_reproduced(-2.0, -2.002).passed is False
    quiet = Step("decision", "rank 1")
    assert checks.citations_in_history(replace(chain, steps=(quiet,)), history).passed is None
    assert checks.attributes_match(replace(chain, steps=(quiet,)), attributes).value is None


def one(row: str, rank: int, values: tuple[float | None, ...], cites: bool = True) -> Chain:
    made = tuple(Check(n, v) for n, v in zip(checks.ERASURES, values, strict=True))
    step = Step("evidence", "x", (1,) if cites else ())
    verdicts = (Check("citations_in_history", 1.0 if cites else None, True if cites else None),)
    return Chain(row, 5, rank, (step,), "template", False, verdicts + made)


def test_summary_is_the_hand_count():
    chains = [
        one("a", 1, (3.0, 1.0, 0.5, 2.0)),
        one("a", 2, (1.0, 0.0, 0.5, 1.0)),
        one("b", 1, (2.0, None, 0.0, None)),
        one("b", 2, (None,) * 4, cites=False),
        one("c", 1, (2.0, 2.0, 0.2, 0.2)),
    ]
    report = checks.summarize(chains, samples=200)
    counts = ("chains", "lists", "chains_without_support", "chains_compared")
    assert [report[name] for name in counts] == [5, 3, 1, 3]
    assert (
        report["citations_in_history_passed"] == 1 and report["citations_in_history_checked"] == 4
    )
    assert report["attributes_match_passed"] is None
    assert report["comprehensiveness"]["value"] == pytest.approx(2.0)
    assert report["comprehensiveness_random"]["value"] == pytest.approx(1.0)
    assert report["comprehensiveness_gain"]["value"] == pytest.approx(1.0)
    assert report["sufficiency_gain"]["value"] == pytest.approx((1.5 + 0.5 + 0.0) / 3)
    gain = report["comprehensiveness_gain"]
    assert gain["low"] == pytest.approx(0.0) and gain["high"] == pytest.approx(
        1.5
    )  # a list at a time
    assert "by 2.00" in report["sentence"] and "not distinguishable from 0" in report["sentence"]


def test_nothing_to_compare_is_said():
    report = checks.summarize([one("a", 1, (None,) * 4, cites=False)])
    assert "comprehensiveness" not in report and report["chains_without_support"] == 1
    assert "nothing was compared" in report["sentence"]
