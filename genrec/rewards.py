"""Verifiable rewards in TRL's signature: plain functions of completions and dataset columns.

The target travels with the row (`target_sid_ids`), so two rows that share a prompt keep their own
targets. Rollouts come as contiguous groups of `num_generations` completions of one row, best first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

RewardFunction = Callable[..., list[float]]


def rule_reward(
    completion_ids: list[list[int]], target_sid_ids: list[list[int]], **kwargs: Any
) -> list[float]:
    """1.0 where the completion is the row's target item, else 0.0 (ReRe's rule reward).

    Semantic ids are bijective, so equal SID tokens mean the same item.

    Args:
        completion_ids: token ids of each completion; what follows the SID (EOS) is ignored.
        target_sid_ids: SID token ids of the row's target.
        **kwargs: other columns, unused.
    """
    pairs = zip(completion_ids, target_sid_ids, strict=True)
    return [float(list(ids[: len(target)]) == list(target)) for ids, target in pairs]


def make_rank_reward(num_generations: int) -> RewardFunction:
    """ReRe's rank reward for groups of `num_generations` items sorted by score.

    A miss at rank i (from 0) gets −(1 / log2(i + 2)) / Σ_j 1 / log2(j + 2): the more confident the
    miss, the larger the penalty. A hit gets 0. In a group without a hit all rewards are 0: without
    that gate the reward teaches nothing but to flatten the list (seen as a collapse in
    reproductions).

    Raises:
        ValueError: the completions aren't whole groups.
    """
    discounts = [1 / math.log2(rank + 2) for rank in range(num_generations)]
    penalties = [-discount / sum(discounts) for discount in discounts]

    def rank_reward(
        completion_ids: list[list[int]], target_sid_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        hits = rule_reward(completion_ids, target_sid_ids)
        if len(hits) % num_generations:
            raise ValueError(
                f"{len(hits)} completions are no whole groups of {num_generations}; make "
                "per_device_train_batch_size x steps_per_generation a multiple of num_generations"
            )
        rewards: list[float] = []
        for start in range(0, len(hits), num_generations):
            group = hits[start : start + num_generations]
            gate = any(group)
            pairs = zip(group, penalties, strict=True)
            rewards += [penalty if gate and not hit else 0.0 for hit, penalty in pairs]
        return rewards

    return rank_reward
