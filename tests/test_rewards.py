"""Rewards by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from genrec.decoding.trie import SidTrie
from genrec.rewards import (
    CompletedItems,
    make_future_reward,
    make_novelty_reward,
    make_rank_reward,
    make_similarity_reward,
    prefix_reward,
    rule_reward,
)

A, B, C, D = [1, 5], [1, 6], [2, 5], [2, 6]
EOS = 0


def ended(*items: list[int]) -> list[list[int]]:
    return [[*item, EOS] for item in items]


def test_rule_reward_is_the_exact_item():
    assert rule_reward(ended(A, B, C, A), [A] * 4) == [1.0, 0.0, 0.0, 1.0]
    assert rule_reward([[1, 5], [1]], [A, A]) == [1.0, 0.0]  # without EOS; cut short
    assert rule_reward([[5, 1, EOS]], [A]) == [0.0]


def test_rank_reward_of_a_group_of_four():
    # 1/log2(2..5) = 1, .63093, .5, .43068; their sum is 2.56161.
    penalty = [-0.390380, -0.246302, -0.195190, -0.168128]
    reward = make_rank_reward(4)
    for hit, target in enumerate((A, B, C, D)):
        expected = [0.0 if rank == hit else penalty[rank] for rank in range(4)]
        got = reward(ended(A, B, C, D), [target] * 4)
        assert got == pytest.approx(expected, abs=1e-6)
    assert sum(penalty) == pytest.approx(-1.0, abs=1e-5)


def test_rank_reward_of_a_group_without_a_hit_is_zero():
    reward = make_rank_reward(2)
    got = reward(ended(B, C, A, B), [D, D, B, B])
    assert got[:2] == [0.0, 0.0]
    assert got[2] < 0 and got[3] == 0.0


def test_targets_belong_to_rows_even_where_prompts_are_the_same():
    prompts = ["same"] * 4
    completions, targets = ended(A, B, A, B), [A, A, B, B]
    assert rule_reward(completions, targets, prompts=prompts) == [1.0, 0.0, 0.0, 1.0]
    rank = make_rank_reward(2)(completions, targets, prompts=prompts)
    assert rank[0] == 0.0 and rank[1] < 0 and rank[2] < 0 and rank[3] == 0.0


def test_an_incomplete_group_is_refused():
    with pytest.raises(ValueError, match="3 completions are no whole groups of 2"):
        make_rank_reward(2)(ended(A, B, C), [A] * 3)
    with pytest.raises(ValueError):
        rule_reward(ended(A, B), [A])


# A hybrid index: two codes, then an item token of its own; item 3's first code is of no other item.
CODES = np.array([[0, 0], [0, 1], [1, 2], [2, 3]])
TOKENS = [[10, 11, 12], [20, 21, 22, 23]]
ITEMS = [[10, 20], [10, 21], [11, 22], [12, 23]]


@pytest.fixture
def completed() -> CompletedItems:
    return CompletedItems(SidTrie.build(CODES), TOKENS)


def test_completions_as_catalogue_rows(completed: CompletedItems):
    other = [[10, 22, EOS], [20, 10, EOS], [10], [], [99, 20, EOS], [-1, -1], [10, 10, 20], [0, 0]]
    assert completed([*ended(*ITEMS), *other]).tolist() == [0, 1, 2, 3] + [-1] * 8
    assert completed([]).tolist() == []


@pytest.mark.parametrize("sizes", [(256, 13_312), (4, 4, 4), (3,), (300,) * 9])
def test_completions_of_any_shape_of_index(sizes: tuple[int, ...]):
    rng = np.random.default_rng(0)
    codes = np.stack([rng.integers(0, size, 500) for size in sizes], 1)
    if len(sizes) == 2:
        codes[:, 1] = rng.permutation(sizes[1])[:500]  # an item token
    codes = np.unique(codes, axis=0)
    codes = codes[rng.permutation(len(codes))]
    first = np.concatenate([[7], 7 + np.cumsum(sizes)])
    tokens = [list(range(a, b)) for a, b in pairwise(first)]
    made = (codes + first[:-1]).tolist()
    lookup = CompletedItems(SidTrie.build(codes), tokens)
    assert (lookup(ended(*made)) == np.arange(len(codes))).all()
    known = {tuple(row) for row in codes.tolist()}
    others = np.stack([rng.integers(0, size, 500) for size in sizes], 1)
    expected = [tuple(row) in known for row in others.tolist()]
    assert ((lookup((others + first[:-1]).tolist()) >= 0) == expected).all()


def test_prefix_reward_has_the_papers_grades_at_five_levels():
    target = [1, 2, 3, 4, 5]
    made = [[*target[:m], *[9] * (5 - m), EOS] for m in range(6)]
    made.append([9, 2, 3, 4, 5, EOS])  # right behind a mistake counts nothing
    got = prefix_reward(made, [target] * 7)
    assert got == pytest.approx([0, 0.5, 0.707107, 0.866025, 0.95, 1, 0], abs=1e-6)


def test_prefix_reward_at_other_depths():
    # sqrt(1/2), sqrt(2/2) capped; sqrt(1/1) capped; nothing below one level; sqrt(m/3).
    assert prefix_reward([[1, 9, 9], [1, 2, 9], [1, 2, 3]], [[1, 2, 3]] * 3) == pytest.approx(
        [0.707107, 0.95, 1], abs=1e-6
    )
    assert prefix_reward([[1, 9], [1, 2], [9, 2]], [[1, 2]] * 3) == [0.95, 1, 0]
    assert prefix_reward([[1], [2]], [[1]] * 2) == [1, 0]
    graded = prefix_reward([[1, 9, 9, 9], [1, 2, 9, 9], [1, 2, 3]], [[1, 2, 3, 4]] * 3)
    assert graded == pytest.approx([0.577350, 0.816497, 0.95], abs=1e-6)
    assert prefix_reward([], []) == [] == rule_reward([], [])


def test_similarity_reward_is_the_cosine(completed: CompletedItems):
    vectors = np.array([[3.0, 4.0], [0.0, 2.0], [-3.0, -4.0], [0.0, 0.0]])
    semantic = make_similarity_reward("semantic", vectors, completed)
    assert semantic.__name__ == "semantic_reward"
    made = [*ended(*ITEMS), [10, 22, EOS]]
    # (3, 4)·(0, 1) / 5 = .8; opposite and zero vectors earn nothing, nor does what is no item.
    assert semantic(made, target_item_index=[0] * 5) == pytest.approx([1, 0.8, 0, 0, 0])
    assert semantic(made[:2], target_item_index=[1, 0]) == pytest.approx([0.8, 0.8])
    with pytest.raises(ValueError, match=r"shape \(3, 2\) for 4 items"):
        make_similarity_reward("semantic", vectors[:3], completed)


def test_future_reward_counts_the_window_with_its_discount(completed: CompletedItems):
    future = [[1, 2, 1, 3]] * 5
    made = [*ended(*ITEMS), [10, 22, EOS]]
    reward = make_future_reward(completed, window=4, discount=0.5)
    assert reward(made, future_item_index=future) == [0, 1, 0.5, 0.125, 0]
    near = make_future_reward(completed, window=2, discount=0.5)
    assert near(made, future_item_index=future) == [0, 1, 0.5, 0, 0]
    # Rows of other lengths, and of their own.
    own = reward(ended(ITEMS[2], ITEMS[2], ITEMS[2]), future_item_index=[[2], [0, 2], [0]])
    assert own == [1, 0.5, 0]
    for window, discount in ((0, 0.5), (2, 0.0), (2, 1.5)):
        with pytest.raises(ValueError, match="window=|discount="):
            make_future_reward(completed, window, discount)


def test_novelty_reward_is_earned_on_or_beside_a_hit_alone(completed: CompletedItems):
    counts = np.array([7, 3, 1, 1])  # + 1: 8, 4, 2, 2 of 16: 1, 2, 3 and 3 bits
    hits = make_novelty_reward(completed, counts, 2)
    beside = make_novelty_reward(completed, counts, 2, "beside")
    made = ended(ITEMS[1], ITEMS[2], ITEMS[2], ITEMS[3])
    targets = [ITEMS[1]] * 2 + [ITEMS[0]] * 2  # the second group misses: rare items earn nothing
    assert hits(made, target_sid_ids=targets) == pytest.approx([2 / 3, 0, 0, 0])
    assert beside(made, target_sid_ids=targets) == pytest.approx([2 / 3, 1, 0, 0])
    with pytest.raises(ValueError, match="on='all' must be one of hits, beside"):
        make_novelty_reward(completed, counts, 2, "all")
    with pytest.raises(ValueError, match="3 counts for 4 items"):
        make_novelty_reward(completed, counts[:3], 2)
    with pytest.raises(ValueError, match="no whole groups of 2"):
        hits(made[:3], target_sid_ids=targets[:3])
