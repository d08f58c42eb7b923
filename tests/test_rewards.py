"""Rewards by hand."""

from __future__ import annotations

import pytest

from genrec.rewards import make_rank_reward, rule_reward

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
