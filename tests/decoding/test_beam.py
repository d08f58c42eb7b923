"""The shared search: selection, ties, pruning bound, filters; fed by hand, without a model."""

from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.decoding.beam import (
    BeamResult,
    Beams,
    advance,
    check_sid_token_ids,
    child_log_probs,
    default_beam_width,
    finish,
    normalize,
    rank_key,
)
from genrec.decoding.trie import SidTrie
from genrec.decoding.trie_tensors import TrieTensors

CPU = torch.device("cpu")


def search(
    codes: np.ndarray,
    edge: list[np.ndarray],
    k: int,
    width: int,
    seen: list[np.ndarray] | None = None,
    allow: np.ndarray | None = None,
) -> BeamResult:
    """Beam search where node n of level l has log-probability ``edge[l][user, n]``."""
    trie = SidTrie.build(codes)
    tensors = TrieTensors(trie, None if allow is None else trie.allow(allow), CPU)
    dead = tensors.exclusions(seen)
    users = len(edge[0])
    beams = Beams.start(users, CPU)
    for level in range(trie.n_levels):
        child, exists = tensors.expand(
            level, beams.nodes if level else torch.zeros(users, 1).long()
        )
        allowed = tensors.allowed(level, child, None if dead is None else dead[level]) & exists
        table = torch.as_tensor(edge[level], dtype=torch.float32)
        log_probs = table.unsqueeze(1).expand(-1, child.shape[1], -1).gather(2, child)
        beams = advance(
            tensors, level, beams, child, log_probs.masked_fill(~allowed, -torch.inf), width
        )
    return finish(tensors, beams, k, np.arange(users))


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, list[np.ndarray]]:
    """A catalogue and log-probabilities in quarters, so that exact ties abound."""
    n_levels = draw(st.integers(1, 4))
    rows = draw(st.sets(st.tuples(*[st.integers(0, 3)] * n_levels), min_size=1, max_size=30))
    codes = np.array(draw(st.permutations(sorted(rows))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sizes = [len(tokens) for tokens in SidTrie.build(codes).tokens]
    return codes, [-rng.integers(0, 4, (3, size)) / 4 for size in sizes]


def exhaustive(codes: np.ndarray, edge: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of all items and items in order of (score descending, SID ascending)."""
    trie = SidTrie.build(codes)
    scores = sum(
        table[:, trie.node_of_leaf(level, trie.leaf_of_item)] for level, table in enumerate(edge)
    )
    return scores, np.argsort(-scores[:, trie.items], axis=1, kind="stable")


@given(problems())
@settings(deadline=None, max_examples=60)
def test_full_width_is_exhaustive_and_ties_go_to_the_smaller_sid(problem: tuple):
    codes, edge = problem
    scores, order = exhaustive(codes, edge)
    result = search(codes, edge, len(codes), len(codes))
    items = SidTrie.build(codes).items[order]
    assert (result.items == items).all()
    assert (result.scores == np.take_along_axis(scores, items, axis=1)).all()
    assert np.allclose(result.level_log_probs.sum(-1), result.scores)
    assert result.certified.all()


@given(problems(), st.integers(1, 6), st.integers(0, 6))
@settings(deadline=None, max_examples=150)
def test_a_certified_list_is_the_exact_top_k(problem: tuple, k: int, wider: int):
    codes, edge = problem
    _, order = exhaustive(codes, edge)
    result = search(codes, edge, k, k + wider)
    want = SidTrie.build(codes).items[order][:, :k]
    want = np.pad(want, ((0, 0), (0, k - want.shape[1])), constant_values=-1)
    assert (result.items == want)[result.certified].all()


@given(problems(), st.integers(1, 6), st.integers(0, 6), st.integers(1, 6))
@settings(deadline=None, max_examples=150)
def test_cutting_a_list_is_searching_for_a_shorter_one(
    problem: tuple, k: int, wider: int, shorter: int
):
    codes, edge = problem
    long, shorter = search(codes, edge, k, k + wider), min(k, shorter)
    cut, want = long.cut(shorter), search(codes, edge, shorter, k + wider)
    for name in ("items", "scores", "level_log_probs", "certified", "pruned"):
        assert np.array_equal(getattr(cut, name), getattr(want, name)), name


def test_cut_lists_of_unknown_origin_and_bad_lengths():
    edge = [np.log(np.array([[0.5, 0.3, 0.2]]))]
    made = search(np.array([[0], [1], [2]]), edge, 3, 3)
    for certified in (True, False):
        told = BeamResult(
            made.items, made.scores, made.level_log_probs, np.array([certified])
        )  # no search's own: nothing is known about what was cut off
        assert told.cut(2).certified.tolist() == [certified]
        assert told.cut(2).items.tolist() == [[0, 1]]
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k={k} must lie between 1 and the 3 items"):
            made.cut(k)


@given(problems(), st.data())
@settings(deadline=None, max_examples=60)
def test_filters_remove_items_and_change_no_score(problem: tuple, data: st.DataObject):
    codes, edge = problem
    rows = st.integers(0, len(codes) - 1)
    allow = np.array(data.draw(st.lists(rows, min_size=1)))
    seen = [np.array(data.draw(st.lists(rows)), dtype=int) for _ in range(3)]
    left = [sorted(set(allow) - set(gone)) for gone in seen]
    if not all(left):
        with pytest.raises(ValueError, match=f"prompt {[len(x) for x in left].index(0)} has no"):
            search(codes, edge, 5, len(codes), seen, allow)
        return
    everything = search(codes, edge, len(codes), len(codes))
    result = search(codes, edge, len(codes), len(codes), seen, allow)
    for user, items in enumerate(left):
        keep = np.isin(everything.items[user], items)
        assert (result.items[user, : len(items)] == everything.items[user, keep]).all()
        assert (result.scores[user, : len(items)] == everything.scores[user, keep]).all()
        assert (result.items[user, len(items) :] == -1).all()
        assert np.isneginf(result.scores[user, len(items) :]).all()


def test_by_hand():
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    edge = [np.log([[0.6, 0.4]]), np.log([[0.5, 0.5, 0.9, 0.1]])]  # items: .30 .30 .36 .04
    wide = search(codes, edge, 2, 2)
    assert wide.items.tolist() == [[2, 0]]
    assert wide.scores == pytest.approx(np.log([[0.36, 0.30]]))
    assert wide.level_log_probs[0, 0] == pytest.approx(np.log([0.4, 0.9]))
    assert wide.certified.tolist() == [True]
    narrow = search(codes, edge, 1, 1)  # keeps code 0 and misses the best item: .4 was pruned
    assert narrow.items.tolist() == [[0]]
    assert narrow.certified.tolist() == [False]


def test_a_pruned_prefix_that_can_tie_is_not_certified():
    # The pruned prefix 0 leads to item 0 with score −1, which ties with the list's item 1 and has
    # the smaller SID: the exact list is [0].
    result = search(
        np.array([[0, 0], [1, 0]]), [np.array([[-1, -0.5]]), np.array([[0, -0.5]])], 1, 1
    )
    assert result.items.tolist() == [[1]]
    assert result.certified.tolist() == [False]


def test_pruning_what_is_filtered_costs_no_certificate():
    codes = np.array([[0, 0], [1, 0], [2, 0]])
    edge = [np.array([[-1.0, -2.0, -3.0]]), np.zeros((1, 3))]
    assert search(codes, edge, 2, 2, [np.array([0])]).items.tolist() == [[1, 2]]
    assert search(codes, edge, 2, 2, [np.array([0])]).certified.all()
    assert search(codes, edge, 2, 2, [np.array([0, 1])]).items.tolist() == [[2, -1]]
    assert search(codes, edge, 2, 2, [np.array([0, 1])]).certified.all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("level", [0, 1])
def test_nan_of_either_sign_surfaces(sign: float, level: int):
    codes = np.array([[0, 0], [1, 0], [2, 0], [3, 0]])
    edge = [np.array([[-1.0, -2.0, -3.0, -4.0]]), np.zeros((1, 4))]
    edge[level][0, 1] = np.copysign(np.nan, sign)
    with pytest.raises(ValueError, match="NaN"):
        search(codes, edge, 2, 2)


@given(st.lists(st.tuples(st.floats(width=32, allow_nan=False), st.integers(0, 9)), min_size=1))
@settings(deadline=None)
def test_rank_key_orders_by_score_then_sid(pairs: list[tuple[float, int]]):
    scores, nodes = (torch.tensor(column) for column in zip(*pairs, strict=True))
    key = rank_key(scores.float(), nodes).tolist()
    for a, (x, m) in zip(key, pairs, strict=True):
        for b, (y, n) in zip(key, pairs, strict=True):
            assert (a > b) == (x > y or (x == y and m < n))


def test_normalizers_by_hand():
    logits = torch.log(torch.tensor([[4.0, 1.0, 2.0, 1.0, 2.0]]))
    sid_ids = torch.tensor([4, 1, 3])  # weights 2 1 1 of 10
    assert normalize(logits, sid_ids, "full").exp().tolist() == [pytest.approx([0.2, 0.1, 0.1])]
    assert normalize(logits, sid_ids, "level").exp().tolist() == [pytest.approx([0.5, 0.25, 0.25])]
    columns = normalize(logits, sid_ids, "trie")[None]
    codes, exists = torch.tensor([[[0, 2, 2]]]), torch.tensor([[[True, True, False]]])
    got = child_log_probs(columns, codes, exists, "trie").exp()
    assert got.flatten().tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    half = normalize(logits.bfloat16(), sid_ids, "full")
    assert half.dtype == torch.float32


def test_the_default_width():
    assert [default_beam_width(k) for k in (1, 25, 26, 50, 51, 100, 101)] == [
        50, 50, 100, 100, 200, 200, 400
    ]  # fmt: skip


def test_a_view_of_another_trie_is_refused():
    codes = np.array([[0, 0], [1, 0]])
    with pytest.raises(ValueError, match="another trie"):
        TrieTensors(SidTrie.build(codes), SidTrie.build(codes).everything(), CPU)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 1]], "1 levels of SID tokens for a trie of 2"),
        ([[0, 1], [2]], "level 1 has code 1 but only 1"),
        ([[0, 1], [2, 2]], "level 1 repeat"),
        ([[0, 1], [2, 9]], "vocabulary of 9"),
        ([[-1, 1], [2, 3]], "level 0"),
    ],
)
def test_sid_tokens_that_do_not_fit_are_refused(ids: list[list[int]], message: str):
    trie = SidTrie.build(np.array([[0, 0], [1, 1]]))
    check_sid_token_ids([[0, 1], [2, 3]], trie, 9)
    with pytest.raises(ValueError, match=message):
        check_sid_token_ids(ids, trie, 9)


def test_a_missing_vllm_names_the_extras(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "genrec.decoding.vllm_engine", raising=False)
    with pytest.raises(ImportError, match=r"genrec\[vllm\].*genrec\[vllm-cpu\]"):
        importlib.import_module("genrec.decoding.vllm_engine")


def test_following_an_items_codes_ends_at_its_leaf():
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, (3, 5, 40), (60, 3)), axis=0)
    trie = SidTrie.build(codes)
    tensors, given = TrieTensors(trie, None, CPU), torch.from_numpy(codes)
    nodes = torch.zeros(len(codes), dtype=torch.long)
    for level in range(3):
        above, own = nodes, given[:, level]
        nodes, found = tensors.follow(level, above, own)
        assert found.all() and torch.equal(tensors.codes(level, nodes), own)
        (found_of,) = tensors.siblings(level, above, nodes)
        rows, child_codes, exists, place = found_of
        assert torch.equal(rows, torch.arange(len(codes)))
        assert exists.gather(1, place).all()
        assert torch.equal(child_codes.gather(1, place).squeeze(1), own)
    assert torch.equal(tensors.items(nodes), torch.arange(len(codes)))
    # A code that no item has there isn't found, whatever lies beside it.
    root = torch.zeros(1, dtype=torch.long)
    for missing in (-1, 3, 9):
        assert not tensors.follow(0, root, torch.tensor([missing]))[1].any()


def test_followed_codes_are_found_among_children_that_do_not_exist():
    """Codes of nodes of few and of many children, also those that only the next node has."""
    rng = np.random.default_rng(1)
    many = np.stack([np.full(300, 0), rng.permutation(1000)[:300]], axis=1)
    few = np.array([[1, 5], [2, 7], [2, 9], [3, 0]])
    codes = np.concatenate([many, few])
    tensors = TrieTensors(SidTrie.build(codes), None, CPU)
    assert len(tensors._row_lengths[1]) > 1  # several rectangles
    nodes, wanted = (each.flatten() for each in torch.meshgrid(
        torch.arange(4), torch.arange(-1, 1001), indexing="ij"
    ))  # fmt: skip
    child, found = tensors.follow(1, nodes, wanted)
    items = {tuple(row) for row in codes.tolist()}
    pairs = zip(nodes.tolist(), wanted.tolist(), strict=True)
    assert found.tolist() == [pair in items for pair in pairs]
    assert torch.equal(tensors.codes(1, child[found]), wanted[found])
    known, at = nodes[found], child[found]
    seen = torch.zeros(len(known), dtype=torch.bool)
    for rows, child_codes, exists, place in tensors.siblings(1, known, at):
        assert torch.equal(child_codes.gather(1, place).squeeze(1), wanted[found][rows])
        assert torch.equal(exists.sum(1), torch.tensor([300, 1, 2, 1])[known[rows]])
        seen[rows] = True
    assert seen.all()
