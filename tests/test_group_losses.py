"""Losses over groups, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from genrec.group_losses import listwise_loss, sdpo_loss


def test_listwise_loss_by_hand():
    # q = (1/2, 1/4, 1/4) of what the group holds; r / tau = (ln 2, 0, 0): t = (1/2, 1/4, 1/4).
    log_probs = torch.tensor([[0.2, 0.1, 0.1]]).log()
    rewards = torch.tensor([[1.0, 0.0, 0.0]])
    got = listwise_loss(log_probs, rewards, 1 / math.log(2))
    assert got.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4), abs=1e-6)


def test_listwise_loss_leaves_out_groups_without_a_difference():
    log_probs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rewards = torch.tensor([[0.0, 1, 0, 0], [0.3] * 4, [0.0] * 4])
    loss = listwise_loss(log_probs, rewards, 0.1)
    torch.testing.assert_close(loss, listwise_loss(log_probs[:1], rewards[:1], 0.1))
    loss.backward()
    gradient = log_probs.grad
    assert gradient is not None
    # q - t: towards the hit, away from the others, and nothing in the groups left out.
    assert gradient[0, 1] < 0 and (gradient[0, [0, 2, 3]] > 0).all()
    assert (gradient[1:] == 0).all()
    alone = listwise_loss(log_probs[1:], rewards[1:], 0.1)
    assert alone.item() == 0.0 and alone.requires_grad


def test_sdpo_loss_is_the_papers_closed_form():
    generator = torch.Generator().manual_seed(1)
    policy, reference = (torch.randn(2, 4, generator=generator) for _ in range(2))
    chosen = torch.tensor([[False, True, False, False], [True, False, False, False]])
    expected = []
    for group in range(2):
        delta = (policy - reference)[group]
        p = delta[chosen[group]].item()
        inner = sum(math.exp(0.5 * (d - p)) for d in delta[~chosen[group]].tolist())
        expected.append(-math.log(1 / (1 + math.exp(math.log(inner)))))
    got = sdpo_loss(policy, reference, chosen, 0.5)
    assert got.item() == pytest.approx(sum(expected) / 2, abs=1e-6)
    # Where the policy is the reference, every item is as likely: log G.
    assert sdpo_loss(policy, policy, chosen, 0.5).item() == pytest.approx(math.log(4), abs=1e-6)


@pytest.mark.parametrize("n_chosen", [0, 2])
def test_sdpo_needs_one_chosen_item(n_chosen: int):
    chosen = torch.arange(4).unsqueeze(0) < n_chosen
    with pytest.raises(ValueError, match="exactly one chosen item"):
        sdpo_loss(torch.zeros(1, 4), torch.zeros(1, 4), chosen, 0.1)
