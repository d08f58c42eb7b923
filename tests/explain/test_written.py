"""Checks of chains that a model wrote, on true and false chains put in its mouth."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from genrec.decoding.free_text import SampledText
from genrec.explain.evidence import item_log_probs
from genrec.explain.faithfulness import summarize
from genrec.explain.thresholds import WRITTEN_THRESHOLDS, WRITTEN_VERDICTS
from genrec.explain.written import check_written
from genrec.reasoning import (
    decision_marker,
    marker_ids,
    read_lists,
    search_with_chains,
)

_reasoning = runpy.run_path(str(Path(__file__).resolve().parents[1] / "test_reasoning_mode.py"))
MAX_HISTORY, K = _reasoning["MAX_HISTORY"], 4
HISTORIES = [[0, 2, 4, 6], [1, 3, 5, 7, 9], [8, 10, 12]]


@pytest.fixture(scope="module")
def world(tiny):
    """(recommender, lists): each list rests on the true chain of its history and a false one."""
    shop = tiny.shop(max_history=MAX_HISTORY)
    model, tokenizer, token_ids = tiny.sid_lm(shop.semantic_ids)
    model = tiny.lm(len(tokenizer), context=1024)
    for parameter in model.parameters():
        parameter.data *= 2.0 if parameter.ndim > 1 else 1.0
    recommender = _reasoning["recommender_of"](shop, model, tokenizer, token_ids)
    marker = decision_marker(recommender.renderer)
    end = tuple(marker_ids(tokenizer, marker))

    def said(text: str) -> SampledText:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return SampledText((*ids, *end), text, "stop")

    rows = _reasoning["taught_rows"](shop, HISTORIES)
    texts = [c.partition(marker)[0] for c in rows["completion"].to_list()]
    assert len(texts) == len(HISTORIES)
    chains = [[said(own), said(texts[(i + 1) % 3])] for i, own in enumerate(texts)]
    prompts = recommender.family_prompts("reasoning_recommendation", HISTORIES)
    ids = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    merged = search_with_chains(recommender.engine, ids, chains, K, 12)
    lists = read_lists(chains, merged, HISTORIES, recommender._chain_reader, False, False)
    return recommender, lists, end


@pytest.fixture(scope="module")
def checked(world):
    recommender, lists, _ = world
    vectors = np.random.default_rng(0).normal(size=(len(recommender.catalog), 6))
    histories = [np.array(h) for h in HISTORIES]
    return check_written(
        recommender, ["r0", "r1", "r2"], histories, lists, [None, 0, 1], vectors,
        np.arange(len(recommender.catalog)), draws=2,
    )  # fmt: skip


def places(lists):
    return [(row, place) for row, own in enumerate(lists) for place in range(len(own.item_ids))]


def test_a_false_chain_fails_and_a_true_one_passes(world, checked):
    _, lists, _ = world
    kinds = set()
    for (row, place), chain in zip(places(lists), checked, strict=True):
        true = lists[row].merged.chain[place] == 0
        kinds.add(bool(true))
        assert chain.check("steps_read").passed
        assert chain.check("citations_in_history").passed == true
        assert chain.check("citations_exist").passed
        if true:
            assert chain.check("claims_true").passed and chain.check("contradictions").passed
            assert chain.check("target_leak").passed in (True, None)
    assert kinds == {True, False}


def test_support_is_what_plain_scores_say(world, checked):
    recommender, lists, end = world
    for (row, place), chain in list(zip(places(lists), checked, strict=True))[::2]:
        own, history = lists[row], np.array(HISTORIES[row])
        item = np.array([[own.merged.items[place]]])
        tokens = own.chains[own.merged.chain[place]].token_ids

        def score(behind, item=item, history=history):
            return float(item_log_probs(recommender, [history], item, behind=[behind])[0, 0])

        none = score(end)
        assert chain.check("chain_support").value == pytest.approx(score(tokens) - none, abs=1e-4)
        half = (*tokens[: (len(tokens) - len(end)) // 2], *end)
        found = chain.check("chain_support_truncated").value
        assert found == pytest.approx(score(half) - none, abs=1e-4)
        # Another user's best chain: one of the two others'.
        best = [
            max(score(c.token_ids) for c in lists[other].chains) - none
            for other in range(3)
            if other != row
        ]
        found = chain.check("chain_support_other_chain").value
        assert min(abs(found - b) for b in best) < 1e-4


def test_erasure_is_of_citations_in_the_history(world, checked):
    """Erasure is defined where a chain cites some of the history, and not all of it."""
    recommender, lists, _ = world
    seen = 0
    for (row, _), chain in zip(places(lists), checked, strict=True):
        value = chain.check("comprehensiveness").value
        cited = {i for s in chain.steps if s.type in ("evidence", "preference", "intent")
                 for i in s.cited_item_ids}  # fmt: skip
        mine = cited & {recommender.catalog["item_id"][i] for i in HISTORIES[row]}
        # Not defined where no citation is in the history, or all of the history is cited.
        assert (value is None) == (len(mine) in (0, len(HISTORIES[row])))
        seen += value is not None
        agreement = chain.check("evidence_agreement").value
        assert (agreement is None) == (not mine)
    assert seen


def test_stability_compares_the_chains_of_a_list(world, checked):
    _, lists, _ = world
    for (row, _), chain in zip(places(lists), checked, strict=True):
        # The false chain cites nothing of this history, so nothing is common.
        assert chain.check("stability").value == 0
        assert 0 <= chain.check("stability_random").value <= 1, row


def test_the_summary_names_every_verdict(checked):
    report = summarize(
        checked, WRITTEN_THRESHOLDS, {"r0": 4, "r1": 5, "r2": 3}, 50, verdicts=WRITTEN_VERDICTS
    )
    assert set(report["verdicts"]) == set(WRITTEN_VERDICTS)
    assert 0 < report["verdicts"]["citations_in_history"]["share"] < 1
    assert [t["rule"] for t in report["thresholds"]] == WRITTEN_THRESHOLDS
    assert report["figures"]["chain_support"]["controls"].keys() == {"truncated", "other_chain"}


def test_one_list_has_no_other_user(world):
    recommender, lists, _ = world
    vectors = np.random.default_rng(0).normal(size=(len(recommender.catalog), 6))
    counts = np.arange(len(recommender.catalog))
    found = check_written(
        recommender, ["r0"], [np.array(HISTORIES[0])], lists[:1], [None], vectors, counts, draws=1
    )
    assert all(c.check("chain_support_other_chain").value is None for c in found)
    assert all(c.check("citations_in_history_other_chain").value is None for c in found)
    assert check_written(recommender, [], [], [], [], vectors, counts) == []
