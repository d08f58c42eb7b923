"""Leave-one-out evidence against plain forward passes, and the search's surviving prefixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genrec.explain.evidence import (
    MIN_DELTA,
    Evidence,
    item_log_probs,
    joint_evidence,
    leave_one_out,
    prompts_to_score,
    shown,
)
from genrec.explain.prefixes import surviving_prefixes
from genrec.modeling import encode_prompts


def plain_log_prob(recommender, history: list[int], item: int) -> float:
    """One forward pass over prompt and SID, no cache, no batch."""
    sids = recommender.semantic_ids.sids().to_list()
    prompt = "Bought so far, oldest first: " + "".join(sids[i] for i in history)
    tokens = recommender.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = recommender.tokenizer(sids[item], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = recommender.engine.model(torch.tensor([tokens + answer])).logits[0]
    log_probs = logits.log_softmax(-1)
    return sum(float(log_probs[len(tokens) + i - 1, t]) for i, t in enumerate(answer))


@pytest.fixture(scope="module")
def evidence(recommender, histories, items):
    return leave_one_out(recommender, histories, items)


def test_deltas_are_those_of_plain_forward_passes(recommender, histories, items, evidence):
    longest = max(len(h) for h in histories)
    assert evidence.deltas.shape == (len(histories), items.shape[1], longest)
    for row in (0, 3, len(histories) - 1):
        history = histories[row].tolist()
        for place in (0, items.shape[1] - 1):
            item = int(items[row, place])
            full = plain_log_prob(recommender, history, item)
            assert evidence.log_probs[row, place] == pytest.approx(full, abs=1e-4)
            for j in range(len(history)):
                without = plain_log_prob(recommender, history[:j] + history[j + 1 :], item)
                assert evidence.deltas[row, place, j] == pytest.approx(full - without, abs=2e-4)
        assert np.isnan(evidence.deltas[row, :, len(history) :]).all()
    assert np.nanmax(evidence.deltas) > 0.05  # the model does react, or nothing above is tested


def test_scores_are_the_stored_ones(lists, items, evidence):
    stored = lists["score"].to_numpy().reshape(items.shape)
    np.testing.assert_allclose(evidence.log_probs, stored, atol=1e-4)


def test_short_lists_and_empty_histories(recommender, histories, items):
    part = items[:3].copy()
    part[1, 2:] = -1
    short = [histories[0], histories[1], histories[0][:0]]
    made = leave_one_out(recommender, short, part)
    assert np.isnan(made.log_probs[1, 2:]).all() and np.isnan(made.deltas[1, 2:]).all()
    assert np.isfinite(made.log_probs[2]).all() and np.isnan(made.deltas[2]).all()
    whole = leave_one_out(recommender, [histories[1]], items[1:2])
    np.testing.assert_allclose(made.log_probs[1, :2], whole.log_probs[0, :2], atol=1e-5)
    assert (made.cited(3)[2] == -1).all()
    only_empty = leave_one_out(recommender, [histories[0][:0]], part[:1])
    assert only_empty.deltas.shape == (1, items.shape[1], 0)
    assert (only_empty.cited(2) == -1).all() and only_empty.cited(2).shape[-1] == 2


def test_cited_are_the_largest_above_the_tolerance():
    nan = np.nan
    deltas = np.array([[[0.5, 2.0, MIN_DELTA, 0.7, -1.0], [0.3, 0.1, 0.3, nan, nan]]])
    cited = Evidence(np.zeros((1, 2)), deltas).cited(3)
    assert cited.tolist() == [[[1, 3, 0], [2, 0, 1]]]  # of equal ones the newer first
    assert Evidence(np.zeros((1, 2)), deltas).cited(7)[0, 0].tolist() == [1, 3, 0, -1, -1, -1, -1]
    nothing = Evidence(np.zeros((1, 1)), np.array([[[-0.1, 0.0, MIN_DELTA / 2]]]))
    assert (nothing.cited(3) == -1).all()


def test_progress_counts_all_prompts(recommender, histories, items):
    done: list[int] = []
    leave_one_out(recommender, histories[:4], items[:4], done.append)
    assert sum(done) == prompts_to_score(histories[:4])


def test_shown_is_what_the_prompt_keeps(recommender):
    long = list(range(12))
    assert shown(recommender, [long, []])[0].tolist() == long[-recommender.max_history :]
    assert recommender.prompts([long]) == recommender.prompts([shown(recommender, [long])[0]])


def test_another_engine_is_refused(recommender, histories, items, monkeypatch):
    monkeypatch.setattr(recommender, "engine", object())
    with pytest.raises(ValueError, match="load the run with engine='torch'"):
        item_log_probs(recommender, histories[:1], items[:1])


def test_surviving_prefixes_are_those_of_the_search(recommender, split_rows):
    row = split_rows.row(2, named=True)
    codes, width = recommender.semantic_ids.codes, 5
    prompt = encode_prompts(recommender.tokenizer, recommender.prompts([row["history_item_index"]]))
    seen = np.array(row["seen_item_index"])
    levels = surviving_prefixes(recommender.engine, prompt[0], codes, seen, width)
    result = recommender.engine.search(prompt, width, width, [seen])
    assert codes[result.items[0]].tolist() == levels[-1].codes.tolist()
    np.testing.assert_allclose(levels[-1].log_probs, result.scores[0], atol=1e-5)
    # Level by level: the best children of what survived, by the scores of one of their items.
    allowed = np.setdiff1d(np.arange(len(codes)), seen)
    scores = recommender.engine.score(prompt, np.arange(len(codes))[None])[0].cumsum(-1)
    alive = {()}
    for depth, level in enumerate(levels, start=1):
        best = {tuple(codes[i, :depth]): scores[i, depth - 1] for i in allowed}
        kept = sorted((p for p in best if p[:-1] in alive), key=lambda p: -best[p])[:width]
        assert [tuple(p) for p in level.codes] == kept
        assert level.n_prefixes == len(np.unique(codes[:, :depth], axis=0))
        assert level.n_prefixes - level.n_excluded == len(best)
        alive = set(kept)


def test_joint_sets_are_greedy_by_brute_force(recommender, histories, items, evidence):
    made = joint_evidence(recommender, histories, items, evidence, 3)
    assert made.positions.shape == made.falls.shape == (*items.shape, 3)
    np.testing.assert_array_equal(made.positions[..., 0], evidence.cited(1)[..., 0])
    lengths = []
    for row in range(0, len(histories), 3):
        history = histories[row].tolist()
        for place in (0, items.shape[1] - 1):
            item, gone, before = int(items[row, place]), [], 0.0
            full = plain_log_prob(recommender, history, item)
            for step in range(3):
                falls = {
                    p: full - plain_log_prob(
                        recommender, [h for i, h in enumerate(history) if i not in (*gone, p)], item
                    )
                    for p in range(len(history)) if p not in gone
                }  # fmt: skip
                best = max(falls.values(), default=-1.0)
                found = int(made.positions[row, place, step])
                if found < 0:  # nothing adds more than the least that counts
                    assert best - before < MIN_DELTA + 2e-4
                    assert np.isnan(made.falls[row, place, step:]).all()
                    break
                assert falls[found] == pytest.approx(best, abs=2e-4)
                assert made.falls[row, place, step] == pytest.approx(best, abs=2e-4)
                assert made.added[row, place, step] == pytest.approx(best - before, abs=4e-4)
                gone.append(found)
                before = best
            lengths.append(len(gone))
    assert max(lengths) == 3 and min(lengths) < 3


def test_whole_substitutes_are_not_seen_and_partial_ones_are():
    """What the docstring says of the greedy way."""

    class Alike:
        def prompts(self, histories):
            return histories

    import genrec.explain.evidence as module

    def scores(_, histories, items, *more):
        """1 and 2 say the same, 3 a little of its own, 4 nearly what 5 says."""
        value = [
            (1 in h or 2 in h) * 5.0 + (3 in h) * 0.1 + (4 in h or 5 in h) * 3.0 + (5 in h) * 0.5
            for h in map(list, histories)
        ]
        return np.repeat(np.array(value)[:, None], items.shape[1], axis=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "item_log_probs", scores)
        history, items = [np.array([1, 2, 3])], np.array([[9]])
        evidence = leave_one_out(Alike(), history, items)
        assert evidence.cited(2).tolist() == [[[2, -1]]]  # by themselves only the helper counts
        made = joint_evidence(Alike(), history, items, evidence, 3)
        assert made.positions.tolist() == [[[2, -1, -1]]]
        history = [np.array([1, 3])]
        evidence = leave_one_out(Alike(), history, items)
        made = joint_evidence(Alike(), history, items, evidence, 3)
        assert made.positions.tolist() == [[[0, 1, -1]]]
        assert made.falls[0, 0, :2] == pytest.approx([5.0, 5.1])
        history = [np.array([4, 5, 3])]
        evidence = leave_one_out(Alike(), history, items)
        assert evidence.deltas[0, 0].tolist() == pytest.approx([0.0, 0.5, 0.1])
        made = joint_evidence(Alike(), history, items, evidence, 3)
        assert made.positions.tolist() == [[[1, 0, 2]]]
        assert made.added[0, 0] == pytest.approx([0.5, 3.0, 0.1])
