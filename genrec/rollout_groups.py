"""How a group of rollouts is made of what the search gives: the beam, samples, or a choice of them.

- "beam": the best items under the policy (ReRe). Distinct and the same each time; no sample of the
  policy, so advantages are those of its best items, not of what it would draw.
- "sample": independent draws from the policy over the trie. Unbiased for the policy gradient; a
  sure policy draws the same item again and again, and such groups teach nothing.
- "gumbel": distinct items, an exact sample without replacement (Gumbel top-k; see
  `genrec.decoding.sampling`). Rare items are drawn more often than the policy would, and the
  gradient isn't reweighted for it.
- "dynamic": ReRe's dynamic sampling: more draws than a group holds, of which distinct items are
  kept, hits first. It looks at the target, which a rollout may, since rewards do too.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from genrec.decoding.sampling import GumbelTopK, LevelSampling, Sampler

Rollouts = Literal["beam", "sample", "gumbel", "dynamic"]
ROLLOUTS: tuple[Rollouts, ...] = ("beam", "sample", "gumbel", "dynamic")
DISTINCT: tuple[Rollouts, ...] = ("beam", "gumbel")  # never the same item twice in a group

IntArray = npt.NDArray[np.int64]


def check_rollouts(rollouts: Rollouts, normalizer: str, oversample: float) -> None:
    """Raise ValueError for a choice that can't be drawn."""
    if rollouts == "gumbel" and normalizer != "trie":
        raise ValueError(
            f"rollouts: gumbel with normalizer {normalizer}: a sample without replacement needs a "
            "distribution over items; use normalizer: trie, or rollouts: sample"
        )
    if not 1 < oversample < math.inf:
        raise ValueError(
            f"oversample={oversample} must be above 1: it is what dynamic sampling chooses from"
        )


def sampler_of(rollouts: Rollouts, seed: int) -> Sampler | None:
    """What draws, or None for the beam.

    Args:
        rollouts: the choice.
        seed: of this batch; another one draws anew.
    """
    if rollouts == "beam":
        return None
    if rollouts == "gumbel":
        return GumbelTopK(seed)
    return LevelSampling(replacement=True, seed=seed)


def n_drawn(rollouts: Rollouts, num_generations: int, oversample: float) -> int:
    """Items that are drawn for a group of `num_generations`."""
    if rollouts == "dynamic":
        return math.ceil(num_generations * oversample)
    return num_generations


def batch_seed(seed: int, step: int, process: int, attempt: int) -> int:
    """A sampler's seed of its own for every batch, reproducible after a resume."""
    words = np.random.SeedSequence([seed, step, process, attempt]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def chosen(items: IntArray, targets: IntArray, num_generations: int) -> IntArray:
    """Dynamic sampling's choice among draws: the hit, then distinct items as drawn, then repeats.

    Args:
        items: catalogue rows in the order of drawing, (groups, draws); −1 where nothing was drawn.
        targets: each group's target, (groups,).
        num_generations: items to keep.

    Returns:
        Places of those kept, (groups, num_generations).
    """
    repeats = (items[:, :, None] == items[:, None, :]) & np.tri(items.shape[1], k=-1, dtype=bool)
    again = repeats.any(2)
    hit = (items == targets[:, None]) & ~again
    preference = np.where(hit, 0, np.where(items < 0, 3, np.where(again, 2, 1)))
    return np.argsort(preference, axis=1, kind="stable")[:, :num_generations]


def best_first(
    items: IntArray, scores: npt.NDArray[np.floating], places: IntArray | None = None
) -> IntArray:
    """Items of groups by falling score, (groups, G); ties keep their order.

    Args:
        items: (groups, n).
        scores: log-probabilities, (groups, n).
        places: which of them are the group's, (groups, G); None: all.
    """
    if places is not None:
        items = np.take_along_axis(items, places, 1)
        scores = np.take_along_axis(scores, places, 1)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(items, order, 1)
