"""Losses over the items of a group, beside GRPO's: listwise cross entropy, and S-DPO.

Both take the policy's log-probability of whole items, Σ_l log π(c_l | c_<l, prompt), over the trie.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Literal["grpo", "listwise", "sdpo"]
LOSSES: tuple[Loss, ...] = ("grpo", "listwise", "sdpo")


def listwise_loss(log_probs: Tensor, rewards: Tensor, temperature: float) -> Tensor:
    """Cross entropy of the policy over a group's items, with the rewards as target distribution.

    −Σ_i t_i log q_i, with q = softmax(log π) over the items of the group and t = softmax(r / τ):
    ListNet's top-one loss (Cao et al. 2007) with the policy's log-probabilities as scores. Groups
    whose rewards are all the same have no target and are left out; the mean is over the others.

    Failure mode: it moves probability within a group only. What lies outside is held by nothing, so
    items that no beam holds may rise; beta > 0 holds them. A large τ asks for a flat list.

    Args:
        log_probs: of items, (groups, G); distinct ones.
        rewards: (groups, G).
        temperature: τ; at .1 a hit of reward 1 takes all but G − 1 parts in e^10.

    Returns:
        The loss, a scalar; 0 with a zero gradient where no group has a difference.
    """
    target = (rewards / temperature).softmax(-1)
    each = -(target * log_probs.log_softmax(-1)).sum(-1)
    differs = ~torch.isclose(rewards, rewards[:, :1], rtol=1e-5, atol=1e-7).all(1)
    return (each * differs).sum() / differs.sum().clamp(min=1)


def sdpo_loss(log_probs: Tensor, reference: Tensor, chosen: Tensor, beta: float) -> Tensor:
    """Softmax-DPO: the target against all other items of its group at once.

    −log σ(−log Σ_d exp(β (Δ_d − Δ_p))), Δ = log π − log π_ref, p the chosen item and d the others
    (Chen et al. 2024, "On Softmax Direct Preference Optimization for Recommendation", arXiv
    2406.09215, equation 10), which is −log softmax(β Δ)_p: a cross entropy. Deviation: rejected
    items are the policy's own confident misses instead of random ones.

    Failure mode: as with DPO, only the margin counts: both log-probabilities may fall together.

    Args:
        log_probs: of items, (groups, G).
        reference: the same of the frozen model that training started from.
        chosen: exactly one item per group, (groups, G) bool.
        beta: β.

    Raises:
        ValueError: a group has no chosen item, or several.
    """
    if not bool((chosen.sum(1) == 1).all()):
        raise ValueError("each group of S-DPO has exactly one chosen item, its target")
    margin = beta * (log_probs - reference)
    return F.cross_entropy(margin, chosen.long().argmax(1))
