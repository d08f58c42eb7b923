"""Checks of single chains find planted errors; array figures equal hand counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from genrec.chains import Chain, Step
from genrec.explain import checks
from genrec.explain.assemble import Attributes, assemble
from genrec.explain.erasure import CHAIN, Erased
from genrec.explain.evidence import leave_one_out

NAN = np.nan


@pytest.fixture(scope="module")
def shop() -> Attributes:
    return Attributes.from_catalog(
        pl.DataFrame(
            {
                "item_id": [10, 11, 12, 13],
                "title": ["Tent", "Mat", "Mug", "Lamp"],
                "brand": ["Acme", "Acme", None, "Bolt"],
                "categories": [["Camp", "Sleep"], ["Camp"], ["Camp", "Cook"], []],
            },
            schema_overrides={"categories": pl.List(pl.String)},
        )
    )


def chain(*steps: Step, item: int = 10) -> Chain:
    return Chain("r", item, 1, steps, "before", False)


def test_citations_outside_the_history_fail():
    cites = chain(Step("evidence", "x", (11, 12)), Step("intent", "y", (12,)))
    assert checks.citations_in_history(cites, [11, 12, 13]).passed
    half = checks.citations_in_history(cites, [12])
    assert (half.value, half.passed) == (0.5, False)
    assert checks.citations_in_history(chain(Step("decision", "x")), [1]).value is None


def test_false_claims_fail(shop):
    true = Step("evidence", "x", claimed_attributes={10: {"brand": "Acme"}})
    assert checks.attributes_match(chain(true), shop).passed
    for claims in ({13: {"brand": "Acme"}}, {"no such item": {"brand": "Acme"}}):
        lie = Step("intent", "x", claimed_attributes=claims)
        found = checks.attributes_match(chain(true, lie), shop)
        assert (found.value, found.passed) == (0.5, False)


def test_a_leaked_target_is_found(shop):
    """Bolt is the target's brand and nobody's in the history."""
    said = Step("intent", "x", claimed_attributes={11: {"brand": "Bolt", "categories": ["Camp"]}})
    found = checks.target_leak(chain(said), shop.has_value, np.array([1, 2]), 3)
    assert (found.value, found.passed) == (0.5, False)
    assert checks.target_leak(
        chain(said), shop.has_value, np.array([1, 3]), 3
    ).passed  # the history has it
    cook = Step("intent", "x", claimed_attributes={11: {"categories": ["Cook", "Camp"]}})
    assert checks.target_leak(chain(cook), shop.has_value, np.array([0, 1]), 2).value == 0.5
    assert checks.target_leak(
        chain(cook), shop.has_value, np.array([0, 1]), 3
    ).passed  # false, but no leak
    assert checks.target_leak(chain(cook), shop.has_value, np.array([0]), None).value is None
    assert (
        checks.target_leak(chain(Step("intent", "x")), shop.has_value, np.array([0]), 2).value
        is None
    )


def test_contradictions_are_counted():
    both = chain(Step("evidence", "x", (11, 12)), Step("set_aside", "y", (12, 13)))
    assert (checks.contradictions(both).value, checks.contradictions(both).passed) == (1, False)
    written = chain(
        Step("evidence", "x", (11,)),
        Step("rewriting", "y", (12,), measured={"set_aside_item_ids": [11]}),
    )
    assert checks.contradictions(written).value == 1
    brands = chain(
        Step("preference", "x", claimed_attributes={11: {"brand": "Acme"}}),
        Step("intent", "y", claimed_attributes={11: {"brand": "Bolt", "categories": ["a"]}}),
        Step("decision", "z", claimed_attributes={11: {"categories": ["b"]}}),
    )
    assert checks.contradictions(brands).value == 1
    fine = chain(Step("evidence", "x", (11,)), Step("set_aside", "y", (13,)))
    assert checks.contradictions(fine).passed


def test_score_differences_fail():
    assert checks.score_reproduced(-2.0, -2.0005).passed
    assert checks.score_reproduced(-2.0, -2.002).passed is False


def test_agreement_counts_the_largest_deltas():
    deltas = np.array([[[0.5, 2.0, 1.0, NAN], [0.0, 0.0, 0.0, NAN]]])
    chosen = np.array([[[1, 0], [2, -1]]])
    assert checks.agreement(chosen, deltas).tolist() == [[0.5, 1.0]]  # of equal ones the newest
    nothing = checks.agreement(np.full((1, 2, 2), -1), deltas)
    assert np.isnan(nothing).all()


def test_overlap_is_jaccard():
    first = np.array([[[0, 1, -1], [-1, -1, -1], [2, -1, -1]]])
    second = np.array([[[1, 2], [-1, -1], [-1, -1]]])
    found = checks.overlap(first, second)
    assert found[0, 0] == pytest.approx(1 / 3) and np.isnan(found[0, 1]) and found[0, 2] == 0


def test_check_all_puts_every_figure_in_its_chain(recommender, lists, histories, items, split_rows):
    attributes = Attributes.from_catalog(recommender.catalog)
    evidence = leave_one_out(recommender, histories, items)
    cited = evidence.cited(2)
    made = assemble(attributes, lists, histories, evidence, cited)
    numbers = np.arange(items.size, dtype=float).reshape(items.shape)
    holes = np.where(numbers == 3, NAN, numbers)
    tested = checks.TriedCitations(
        {CHAIN: cited},
        {CHAIN: Erased(holes, numbers + 0.5), "random": Erased(numbers + 1000, numbers + 2000)},
        {CHAIN: checks.agreement(cited, evidence.deltas)},
    )
    measured = (evidence.log_probs, tested, {CHAIN: np.full(items.shape, NAN)})
    targets = split_rows["target_item_index"].to_list()
    scores = lists["score"].to_list()
    found = checks.check_all(made, attributes, histories, targets, *measured, scores)
    for number, own in enumerate(found):
        value = own.check("comprehensiveness").value
        assert value is None if number == 3 else value == number
        assert own.check("sufficiency").value == number + 0.5
        assert own.check("comprehensiveness_random").value == number + 1000
        assert own.check("sufficiency_random").value == number + 2000
        assert own.check("stability").value is None
        for name in ("citations_in_history", "attributes_match", "target_leak"):
            assert own.check(name).passed in (True, None)
        assert own.check("score_difference").passed and own.check("contradictions").passed
        agreement = own.check("evidence_agreement").value
        assert agreement == 1 if own.step("evidence").cited_item_ids else agreement is None
    # Another user's chain cites what isn't here, now and then at least.
    theirs = [c.check("citations_in_history_other_chain").value for c in found]
    assert min(v for v in theirs if v is not None) < 1
    shifted = [s + 1 for s in scores]
    wrong = checks.check_all(made, attributes, histories, targets, *measured, shifted)
    assert not any(c.check("score_difference").passed for c in wrong)
    alone = checks.check_all(
        made[:6], attributes, histories[:1], targets[:1], *measured, scores[:6]
    )
    assert alone[0].check("citations_in_history_other_chain").value is None
    assert replace(alone[0], checks=()) == made[0]
