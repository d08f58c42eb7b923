"""Advantages of groups of rollouts: what is done to TRL's own before the loss sees them.

Shapes: B completions in contiguous groups of G, L levels. Each function takes and gives plain
tensors; `genrec.rollouts` calls them behind `_generate_and_score_completions`. A group is never
split over processes, so what is said of a group is computed where it lies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pass_at_k_advantages(hits: Tensor, k: int) -> Tensor:
    """Advantages of the reward "at least one of k items of the group is a hit", in closed form.

    With n items and m misses in a group, the chance that k items drawn from it hold a hit is
    ρ = 1 − C(m, k) / C(n, k), its deviation σ = √(ρ (1 − ρ)). A hit gets (1 − ρ) / σ; a miss gets
    (1 − ρ − C(m − 1, k − 1) / C(n − 1, k − 1)) / σ, since a draw that holds it fails unless one of
    the k − 1 others hits. All are 0 where σ is: no hit, or so many that no draw misses. They sum to
    zero over a group. (Chen et al. 2025, "Pass@k Training", arXiv 2508.10751, analytical form.)

    Failure mode: it says nothing of rank. It is large where hits are few and vanishes where they
    are many, so alone it stops improving what is found already: it is a bonus beside others.

    Args:
        hits: whether each item is one, (groups, G) bool.
        k: size of a draw, 1 to G.

    Returns:
        (groups, G) float32.

    Raises:
        ValueError: k is larger than a group, or below 1.
    """
    n = hits.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass_at_k={k} must lie between 1 and the {n} items of a group")
    # Of each number of misses: chances and advantages; a group is then a lookup.
    of_hit, of_miss = [], []
    for misses in range(n + 1):
        rho = 1 - math.comb(misses, k) / math.comb(n, k)
        sigma = math.sqrt(rho * (1 - rho))
        beside = math.comb(misses - 1, k - 1) / math.comb(n - 1, k - 1) if misses else 0.0
        of_hit.append((1 - rho) / sigma if sigma else 0.0)
        of_miss.append((1 - rho - beside) / sigma if sigma else 0.0)
    table = torch.tensor([of_miss, of_hit], dtype=torch.float32, device=hits.device)
    return table[hits.long(), (~hits).sum(1, keepdim=True)]


def with_pass_at_k_bonus(advantages: Tensor, hits: Tensor, k: int, weight: float) -> Tensor:
    """``A_i + weight · A_i^pass@k``: TRL's own with the bonus of GREAM's SRPO.

    With ``scale_rewards: group`` and weight 1 it is GREAM's advantage (Hong et al. 2025, arXiv
    2510.20815, bonus-calibrated group advantage estimation: z-scored rewards plus pass@k; their
    code takes k = 4). Deviations: the weight is a setting, a hit is the exact item whatever the
    rewards are, and a group without a variance in hits gets no bonus instead of 0 / 1e-6.

    Args:
        advantages: TRL's, (B,).
        hits: (B,) bool.
        k: as in `pass_at_k_advantages`; the group's size comes with `hits` as (groups, G).
        weight: of the bonus.
    """
    bonus = pass_at_k_advantages(hits, k).to(advantages.dtype)
    return advantages + weight * bonus.view(-1)


def level_advantages(advantages: Tensor, codes: Tensor, num_generations: int) -> Tensor:
    """Credit per level: what a level's choice changed in the value of the prefix.

    The value of a prefix is the mean advantage of the group's items below it, that of the root 0;
    level l of item i gets V(c_1 … c_l) − V(c_1 … c_{l−1}). The credits of an item sum to its
    advantage, so nothing is paid twice. Where the group has a single item below a prefix, what
    follows was decided and gets 0; siblings of a hit are blamed at the level where they part from
    it, not for the prefix that they share with it.

    Failure mode: values are means over few items, of a beam over its best ones alone. A level that
    the group doesn't vary is never taught; keep a wide group.

    Args:
        advantages: (B,).
        codes: any number that tells a level's tokens apart, (B, L).
        num_generations: G.

    Returns:
        (B, L); row sums are the advantages.
    """
    n_levels = codes.shape[1]
    grouped = advantages.view(-1, num_generations)  # (g, G)
    parts = codes.view(-1, num_generations, n_levels)
    same = torch.ones(
        len(parts), num_generations, num_generations, dtype=torch.bool, device=codes.device
    )
    value, credits = torch.zeros_like(grouped), []
    for level in range(n_levels):
        column = parts[..., level]
        same = same & (column.unsqueeze(2) == column.unsqueeze(1))  # (g, G, G): one prefix
        weight = same.to(advantages.dtype)
        below = (weight @ grouped.unsqueeze(2)).squeeze(2) / weight.sum(2)
        credits.append(below - value)
        value = below
    return torch.stack(credits, -1).view(-1, n_levels)


def without_difference(rewards: Tensor, num_generations: int) -> Tensor:
    """Which groups' rewards are all the same, (groups,) bool: they have no advantages.

    Args:
        rewards: (B,), what advantages are made of.
        num_generations: G.
    """
    grouped = rewards.view(-1, num_generations)
    return torch.isclose(grouped, grouped[:, :1], rtol=1e-5, atol=1e-7).all(1)
