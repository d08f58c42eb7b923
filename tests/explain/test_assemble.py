"""The wording and the claims of chains."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from genrec.explain.assemble import (
    Attributes,
    assemble,
    counterfactual_step,
    decision_step,
    evidence_step,
    preference_step,
    set_aside_step,
    shared_attributes_step,
)
from genrec.explain.counterfactuals import Counterfactual
from genrec.explain.evidence import leave_one_out


@pytest.fixture(scope="module")
def shop() -> Attributes:
    return Attributes.from_catalog(
        pl.DataFrame(
            {
                "item_id": [10, 11, 12, 13],
                "title": ["Tent", "Mat <a_1>", "Mug", "Lamp\u202e"],
                "brand": ["Acme", "Acme", None, "Bolt"],
                "categories": [["All", "Camp", "Sleep"], ["All", "Camp"], ["All"], []],
            },
            schema_overrides={"categories": pl.List(pl.String)},
        )
    )


def test_shared_is_what_both_have_and_not_most_of_the_catalogue(shop):
    assert shop.shared(0, 1) == {"brand": "Acme", "categories": ["Camp"]}  # "All" is too common
    assert shop.shared(0, 2) == {} and shop.shared(2, 2) == {}
    assert shop.shares["categories", "All"] == 0.75


@pytest.mark.parametrize(
    ("item", "attribute", "value", "right"),
    [
        (0, "brand", "Acme", True), (2, "brand", "Acme", False), (2, "brand", None, True),
        (0, "categories", ["Camp", "Sleep"], True), (1, "categories", ["Sleep"], False),
        (0, "categories", "Camp", False), (0, "colour", "red", False),
    ],
)  # fmt: skip
def test_claims_are_held_against_the_catalogue(shop, item, attribute, value, right):
    assert shop.has(item, attribute, value) is right


def test_evidence_cites_what_was_measured(shop):
    history, deltas = np.array([1, 0, 1]), np.array([0.25, -0.5, 1.5])
    cited = np.array([2, 0])
    step = evidence_step(shop, history, cited, deltas[cited], -3.5)
    assert step.cited_item_ids == (11,)  # bought twice, cited once
    assert step.measured["positions"] == [2, 0] and step.measured["deltas"] == [1.5, 0.25]
    assert "without “Mat ‹a_1›” it falls by 1.50" in step.text and "−3.50" in step.text
    joint = evidence_step(shop, history, np.array([2, 1]), np.array([1.5, 0.2]), -3.5, joint=True)
    assert "it falls by 1.50; without “Tent” as well by another 0.20" in joint.text


def test_no_support_is_said_plainly(shop):
    none = np.array([], dtype=np.int64)
    step = evidence_step(shop, np.array([0, 1]), none, np.array([]), -2.0)
    assert step.text.startswith("No single history item supports this item")
    assert not step.cited_item_ids and step.measured["positions"] == []
    empty = evidence_step(shop, none, none, np.array([]), -2.0)
    assert empty.text.startswith("The prompt showed no history")
    assert shared_attributes_step(shop, 0, np.array([0, 1]), none) is None


def test_shared_attributes_name_the_cited_items(shop):
    step = shared_attributes_step(shop, 0, np.array([2, 1, 3]), np.array([1, 0, 2]))
    assert step.cited_item_ids == (11,)
    both = {"brand": "Acme", "categories": ["Camp"]}
    assert dict(step.claimed_attributes) == {11: both, 10: both}
    assert "“Mat ‹a_1›”: brand Acme, category Camp" in step.text
    assert step.measured["catalogue_shares"][0] == {
        "attribute": "brand",
        "value": "Acme",
        "share": 0.5,
    }
    assert shared_attributes_step(shop, 2, np.array([0]), np.array([0])) is None


def test_decision_says_whether_the_list_is_exact():
    assert "proven to be the exact top" in decision_step(1, -2.0, [-1.5, -0.5], True).text
    step = decision_step(4, -2.0, [-1.5, -0.5], False)
    assert "not proven" in step.text and "(−1.50 + −0.50)" in step.text and "Rank 4" in step.text


def test_preference_is_what_most_support_comes_from(shop):
    history, deltas = np.array([0, 1, 3]), np.array([1.0, 0.5, 2.0])
    step = preference_step(shop, history, deltas)
    # Bolt's item supports most, but alone; "Camp" and "Acme" are shared by two, equally rare.
    assert step.cited_item_ids == (10, 11)
    assert step.measured["support"] == 1.5
    assert step.measured["support_share"] == pytest.approx(1.5 / 3.5)
    (name,) = {n for claim in step.claimed_attributes.values() for n in claim}
    assert all(shop.has(shop.rows[i], n, v) for i, c in step.claimed_attributes.items()
               for n, v in c.items())  # fmt: skip
    kind = "brand Acme" if name == "brand" else "category Camp"
    assert f"43% of the measured support comes from history items of {kind}" in step.text
    assert preference_step(shop, np.array([0, 3]), np.array([1.0, 1.0])) is None
    assert preference_step(shop, history, np.array([1.0, 0.0, 1.0])) is None
    assert preference_step(shop, np.array([0, 0]), np.array([1.0, 1.0])) is None  # one item twice


def test_set_aside_names_what_speaks_against(shop):
    history, deltas = np.array([0, 1, 2, 3]), np.array([-0.5, -1.25, 0.3, 0.2])
    step = set_aside_step(shop, history, deltas, np.array([2]))
    assert step.cited_item_ids == (11, 10) and step.measured["deltas"] == [-1.25, -0.5]
    assert "without “Mat ‹a_1›” the log-probability would rise by 1.25" in step.text
    # The tent is cited beside others, or its other copy supports: it can't be set aside as well.
    assert set_aside_step(shop, history, deltas, np.array([2, 0])).cited_item_ids == (11,)
    again = np.array([0, 1, 2, 0])
    assert set_aside_step(shop, again, deltas, np.array([2])).cited_item_ids == (11,)
    assert set_aside_step(shop, history, np.abs(deltas), np.array([2])) is None


def test_counterfactuals_in_words(shop):
    history = np.array([0, 1, 2])
    both = Counterfactual(0, 0, (1, 0), True, -7.5, 14, 3, 4)
    step = counterfactual_step(shop, history, both, 10)
    assert step.cited_item_ids == (11, 10) and step.measured["first_then"] == 13
    assert step.text.startswith("Without “Mat ‹a_1›” and “Tent” it would not be in the list of 10")
    assert "at rank 14" in step.text and "any one of them back it would" in step.text
    gone = counterfactual_step(shop, history, Counterfactual(0, 0, (2,), True, -9.0, 0, -1, 1), 5)
    assert "below everything that the search kept" in gone.text
    assert gone.measured["rank"] is None and gone.measured["first_then"] is None
    stays = counterfactual_step(shop, history, Counterfactual(0, 0, (0,), False, -2.0, 2, 0, 1), 5)
    assert "stays in the list of 5, at rank 2" in stays.text and not stays.measured["found"]
    # A greedy search that finds none proves nothing of other sets.
    assert "greedy search found no set of at most 1 history item that carries it" in stays.text
    tried = Counterfactual(0, 0, (0, 2), False, -2.0, 2, 0, 2)
    assert "at most 2 history items" in counterfactual_step(shop, history, tried, 5).text


def test_chains_of_a_run(recommender, lists, histories, items):
    evidence = leave_one_out(recommender, histories, items)
    cited = evidence.cited(2)
    attributes = Attributes.from_catalog(recommender.catalog)
    chains = assemble(attributes, lists, histories, evidence, cited)
    keys = lists.select("row_id", "rank", "item_id").rows()
    assert [(c.row_id, c.rank, c.item_id) for c in chains] == keys
    assert {c.rationale_origin for c in chains} == {"template"}
    assert not any(c.trained_on_target for c in chains)
    supported = [c for c in chains if c.step("evidence").cited_item_ids]
    assert len(chains) > len(supported) > 10
    ids = recommender.catalog["item_id"]
    by_row = {row: i for i, row in enumerate(lists["row_id"].unique(maintain_order=True))}
    for chain in supported:
        step, row = chain.step("evidence"), by_row[chain.row_id]
        for position, delta in zip(
            step.measured["positions"], step.measured["deltas"], strict=True
        ):
            assert ids[int(histories[row][position])] in chain.cited_item_ids
            assert delta == evidence.deltas[row, chain.rank - 1, position] > 0
