"""Advantages of groups of rollouts: what is done to TRL's own before the loss sees them.

Shapes: B completions in contiguous groups of G, L levels. Each function takes and gives plain
tensors; `genrec.rollouts` calls them behind `_generate_and_score_completions`. A group is never
split over processes, so what is said of a group is computed where it lies.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

ChainValue = Literal["mean", "best"]
CHAIN_VALUES: tuple[ChainValue, ...] = ("mean", "best")

_EPSILON = 1e-4  # TRL's, beside a standard deviation


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


def tree_advantages(
    rewards: Tensor, n_chains: int, n_items: int, value: ChainValue = "mean", scaled: bool = False
) -> tuple[Tensor, Tensor]:
    """Credit per level of a tree of C chains with B items behind each.

    With r_cb the reward of item b behind chain c, the chain's own rewards included:

        V_c = mean_b r_cb  (or max_b r_cb with value "best")
        chain advantage  A_c  = V_c − mean_c' V_c'
        item advantage   A_cb = r_cb − mean_b' r_cb'

    so a chain is compared with the other chains of its prompt, and an item with the other items
    behind its own chain: what the chain made likely is neither credited to the item nor blamed on
    it. A reward that all items of a chain share, such as one of its form, is in V_c and cancels in
    A_cb. With "mean" and without scaling A_c + A_cb = r_cb − mean r, GRPO's advantage: nothing is
    paid twice. Scaled, A_c is divided by the standard deviation of the prompt's C values + 1e-4,
    A_cb by that of the chain's B rewards + 1e-4.

    The idea is that of recommenders that roll out several items behind each chain (OneRec-Think,
    GREAM, REG4Rec); the formula is ours.

    Dead cases: with one chain its advantage is 0, and so are all where all rewards are equal.

    Failure mode: V_c is the mean over few items. "best" pays a chain for one lucky item and doesn't
    see what else it led to. Scaled, a tiny difference between chains counts like a large one.

    Args:
        rewards: a prompt's chains one after the other, each chain's items too, (N,).
        n_chains: C.
        n_items: B.
        value: what a chain is worth.
        scaled: whether to divide by standard deviations.

    Returns:
        Of each completion its chain's advantage, and its item's, (N,) each.
    """
    tree = rewards.double().view(-1, n_chains, n_items)
    values = tree.mean(2) if value == "mean" else tree.amax(2)
    chains, items = _centred(values, scaled), _centred(tree, scaled)
    chains = chains.unsqueeze(2).expand_as(tree)
    return chains.flatten().to(rewards.dtype), items.flatten().to(rewards.dtype)


def _centred(values: Tensor, scaled: bool) -> Tensor:
    """Values less their mean over the last dimension, which may be scaled."""
    centred = values - values.mean(-1, keepdim=True)
    if not scaled or values.shape[-1] == 1:
        return centred
    return centred / (values.std(-1, keepdim=True) + _EPSILON)


def without_difference(rewards: Tensor, num_generations: int) -> Tensor:
    """Which groups' rewards are all the same, (groups,) bool: they have no advantages.

    Args:
        rewards: (B,), what advantages are made of.
        num_generations: G.
    """
    grouped = rewards.view(-1, num_generations)
    return torch.isclose(grouped, grouped[:, :1], rtol=1e-5, atol=1e-7).all(1)
