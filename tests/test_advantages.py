"""Advantages by hand, and by enumeration."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from genrec.advantages import (
    level_advantages,
    pass_at_k_advantages,
    tree_advantages,
    with_pass_at_k_bonus,
    without_difference,
)


def test_pass_at_k_of_four_items_by_hand():
    hits = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    # One hit, k = 2: rho = 1 - 3/6 = .5, sigma .5; a hit (.5)/.5 = 1, a miss (.5 - 2/3)/.5 = -1/3.
    # Three hits: every pair holds one, rho = 1.
    got = pass_at_k_advantages(hits, 2)
    torch.testing.assert_close(got[0], torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))
    assert (got[1:] == 0).all()


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_mean_over_all_draws(k: int):
    n = 5
    for n_hits in range(n + 1):
        hits = torch.arange(n) < n_hits
        draws = list(combinations(range(n), k))
        reward = torch.tensor([float(hits[list(draw)].any()) for draw in draws])
        mean, std = reward.mean(), reward.std(unbiased=False)
        got = pass_at_k_advantages(hits.unsqueeze(0), k)[0]
        if std == 0:
            assert (got == 0).all()
            continue
        holds = torch.tensor([[item in draw for draw in draws] for item in range(n)]).float()
        each = (holds * ((reward - mean) / std)).sum(1) / holds.sum(1)
        torch.testing.assert_close(got, each)
        assert abs(float(got.sum())) < 1e-5


def test_the_bonus_is_added_to_trls_advantages():
    own = torch.tensor([1.5, -0.5, -0.5, -0.5])
    hits = torch.tensor([[True, False, False, False]])
    got = with_pass_at_k_bonus(own, hits, 2, 0.5)
    torch.testing.assert_close(got, torch.tensor([2.0, -0.5 - 1 / 6, -0.5 - 1 / 6, -0.5 - 1 / 6]))


@pytest.mark.parametrize("k", [0, 5])
def test_k_must_fit_the_group(k: int):
    with pytest.raises(ValueError, match=f"pass_at_k={k} must lie between 1 and the 4 items"):
        pass_at_k_advantages(torch.zeros(1, 4, dtype=torch.bool), k)


def test_a_levels_credit_is_what_its_prefix_decided():
    # Two items share their first code with the hit, one of them its second, too.
    codes = torch.tensor([[1, 1, 1], [1, 1, 2], [1, 2, 1], [2, 1, 1]])
    own = torch.tensor([3.0, -1.0, -1.0, -1.0])
    got = level_advantages(own, codes, 4)
    third = 1 / 3  # V(1) = (3 - 1 - 1) / 3, V(1, 1) = 1
    expected = [
        [third, 1 - third, 2],
        [third, 1 - third, -2],  # right until the last level
        [third, -1 - third, 0],  # wrong at the second; then nothing was left to decide
        [-1, 0, 0],
    ]
    torch.testing.assert_close(got, torch.tensor(expected))
    torch.testing.assert_close(got.sum(1), own)


def test_groups_have_credits_of_their_own_and_codes_any_size():
    rng = torch.Generator().manual_seed(0)
    codes = torch.stack(
        [torch.randint(3, (12,), generator=rng), torch.randint(13_312, (12,), generator=rng)], 1
    )
    own = torch.randn(12, generator=rng)
    got = level_advantages(own, codes, 4)
    for group in range(3):
        at = slice(4 * group, 4 * group + 4)
        torch.testing.assert_close(got[at], level_advantages(own[at], codes[at], 4))
        for item in range(4):
            alike = codes[at][:, 0] == codes[at][item, 0]
            assert got[at][item, 0].item() == pytest.approx(own[at][alike].mean().item(), abs=1e-6)
    torch.testing.assert_close(got.sum(1), own)


def test_groups_without_a_difference():
    rewards = torch.tensor([0.1] * 3 + [0.0, 0.0, 1e-3] + [0.0] * 3 + [1.0, 1.0, 0.0])
    assert without_difference(rewards, 3).tolist() == [True, False, True, False]


def test_a_tree_of_two_chains_with_two_items_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.2, 0.2])
    chains, items = tree_advantages(rewards, 2, 2)
    # V = .5 and .2, their mean .35.
    torch.testing.assert_close(chains, torch.tensor([0.15, 0.15, -0.15, -0.15]))
    torch.testing.assert_close(items, torch.tensor([0.5, -0.5, 0.0, 0.0]))
    torch.testing.assert_close(chains + items, rewards - rewards.mean())  # nothing is paid twice
    best, same = tree_advantages(rewards, 2, 2, "best")
    torch.testing.assert_close(best, torch.tensor([0.4, 0.4, -0.4, -0.4]))
    torch.testing.assert_close(same, items)
    chains, items = tree_advantages(rewards, 2, 2, scaled=True)
    # The deviation of (.5, .2) is .3 / sqrt 2, that of (1, 0) is 1 / sqrt 2.
    a, b = 0.15 / (0.3 / 2**0.5 + 1e-4), 0.5 / (0.5**0.5 + 1e-4)
    torch.testing.assert_close(chains, torch.tensor([a, a, -a, -a]))
    torch.testing.assert_close(items, torch.tensor([b, -b, 0.0, 0.0]))


def test_a_reward_of_the_chain_moves_the_chain_alone():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.3, 0.1, 0.5], [0.0] * 6]).flatten()
    plain = tree_advantages(rewards, 3, 2)
    bonus = torch.tensor([0.7, 0.1, 0.4, 0.0, 0.0, 0.0]).repeat_interleave(2)
    paid = tree_advantages(rewards + bonus, 3, 2)
    torch.testing.assert_close(paid[1], plain[1])
    expected = plain[0] + torch.tensor([0.3, -0.3, 0.0, 0, 0, 0]).repeat_interleave(2)
    torch.testing.assert_close(paid[0], expected)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("value", ["mean", "best"])
def test_dead_trees(value: str, scaled: bool):
    chains, items = tree_advantages(torch.full((12,), 0.3), 3, 2, value, scaled)
    assert (chains == 0).all() and (items == 0).all()
    chains, items = tree_advantages(torch.tensor([1.0, 0.0, 0.0]), 1, 3, value, scaled)
    assert (chains == 0).all() and items[0] > 0 > items[1]
