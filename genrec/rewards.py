"""Verifiable rewards in TRL's signature: plain functions of completions and dataset columns.

The target travels with the row (`target_sid_ids`, `target_item_index`, `future_item_index`), so two
rows that share a prompt keep their own targets. Rollouts come as contiguous groups of
`num_generations` completions of one row, best first; in reasoning mode the items behind one chain
are such a group, and the chain is cut off before completions come here. What completions mean is
looked up for a whole batch at once in the trie (`CompletedItems`); nothing assumes a number of
levels or equal codebooks.

A function's name is what TRL logs it as: ``rewards/<name>/mean``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from genrec.decoding.trie import SidTrie

RewardFunction = Callable[..., list[float]]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

PREFIX_CAP = 0.95  # what everything but the last level pays


class CompletedItems:
    """Completions as catalogue rows.

    Args:
        trie: of the SID map.
        sid_token_ids: per level the token id of each code.
    """

    def __init__(self, trie: SidTrie, sid_token_ids: Sequence[Sequence[int]]) -> None:
        self.n_levels, self.n_items = trie.n_levels, trie.n_items
        self._items = trie.items
        self._tokens = [np.asarray(ids, dtype=np.int64) for ids in sid_token_ids]
        largest = max(int(ids.max()) for ids in self._tokens)
        # Of each token its code, a level apart: a token of another level is no code of this one.
        self._codes = np.full((trie.n_levels, largest + 2), -1, dtype=np.int64)
        self._edges: list[IntArray] = []  # ascending: parent * codebook size + code
        for level, ids in enumerate(self._tokens):
            self._codes[level, ids] = np.arange(len(ids))
            parent = np.repeat(
                np.arange(len(trie.children[level]) - 1), np.diff(trie.children[level])
            )
            self._edges.append(parent * len(ids) + trie.tokens[level])

    def __call__(self, completion_ids: Sequence[Sequence[int]]) -> IntArray:
        """Catalogue row of each completion, −1 where its first tokens are no item's SID.

        Args:
            completion_ids: token ids; what follows the SID (EOS) is ignored.

        Returns:
            ``# (completions,)``
        """
        tokens = sid_matrix(completion_ids, self.n_levels)
        known = np.where((tokens < 0) | (tokens >= self._codes.shape[1]), -1, tokens)
        node = np.zeros(len(tokens), dtype=np.int64)
        valid = np.ones(len(tokens), dtype=bool)
        for level, edges in enumerate(self._edges):
            code = self._codes[level][known[:, level]]  # −1 reads the spare last column
            valid &= code >= 0
            key = node * len(self._tokens[level]) + code
            at = np.minimum(np.searchsorted(edges, key), len(edges) - 1)
            valid &= edges[at] == key
            node = np.where(valid, at, 0)
        return np.where(valid, self._items[node], -1)


def sid_matrix(completion_ids: Sequence[Sequence[int]], n_levels: int) -> IntArray:
    """The first `n_levels` tokens of each completion, −1 behind one that ends sooner.

    Returns:
        ``# (completions, n_levels)``
    """
    if all(len(ids) >= n_levels for ids in completion_ids):
        made = np.array([ids[:n_levels] for ids in completion_ids], dtype=np.int64)
        return made.reshape(len(completion_ids), n_levels)
    padded = np.full((len(completion_ids), n_levels), -1, dtype=np.int64)
    for row, ids in enumerate(completion_ids):
        padded[row, : min(len(ids), n_levels)] = ids[:n_levels]
    return padded


def matched_levels(
    completion_ids: Sequence[Sequence[int]], target_sid_ids: Sequence[Sequence[int]]
) -> IntArray:
    """Levels of the target that a completion has right before its first mistake. ``# (n,)``.

    Raises:
        ValueError: not one target per completion.
    """
    if len(completion_ids) != len(target_sid_ids):
        raise ValueError(
            f"{len(completion_ids)} completions and {len(target_sid_ids)} targets; each completion "
            "has a target of its own"
        )
    targets = np.array(target_sid_ids, dtype=np.int64).reshape(len(target_sid_ids), -1)
    same = sid_matrix(completion_ids, targets.shape[1]) == targets
    return np.cumprod(same, axis=1).sum(axis=1)


def rule_reward(
    completion_ids: list[list[int]], target_sid_ids: list[list[int]], **kwargs: Any
) -> list[float]:
    """1.0 where the completion is the row's target item, else 0.0 (ReRe's rule reward).

    Semantic ids are bijective, so equal SID tokens mean the same item.

    Failure mode: sparse. A group without a hit teaches nothing, and most groups have none.

    Args:
        completion_ids: token ids of each completion; what follows the SID (EOS) is ignored.
        target_sid_ids: SID token ids of the row's target.
        **kwargs: other columns, unused.
    """
    if not completion_ids:
        return []
    matched = matched_levels(completion_ids, target_sid_ids)
    return (matched == len(target_sid_ids[0])).astype(float).tolist()


def make_rank_reward(num_generations: int) -> RewardFunction:
    """ReRe's rank reward for groups of `num_generations` items sorted by score.

    A miss at rank i (from 0) gets −(1 / log2(i + 2)) / Σ_j 1 / log2(j + 2): the more confident the
    miss, the larger the penalty. A hit gets 0. In a group without a hit all rewards are 0.

    Failure mode: without that gate the reward teaches nothing but to flatten the list (seen as a
    collapse in reproductions); with it, it still says nothing of which item is right.

    Raises:
        ValueError: the completions aren't whole groups.
    """
    discounts = 1 / np.log2(np.arange(num_generations) + 2)
    penalties = -discounts / discounts.sum()

    def rank_reward(
        completion_ids: list[list[int]], target_sid_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        hits = in_groups(rule_reward(completion_ids, target_sid_ids), num_generations) > 0
        gate = hits.any(axis=1, keepdims=True)
        return np.where(gate & ~hits, penalties, 0.0).ravel().tolist()

    return rank_reward


def in_groups(values: Sequence[float], num_generations: int) -> FloatArray:
    """Values of completions, a row per group.

    Raises:
        ValueError: the completions aren't whole groups.
    """
    if len(values) % num_generations:
        raise ValueError(
            f"{len(values)} completions are no whole groups of {num_generations}; make "
            "per_device_train_batch_size x steps_per_generation a multiple of num_generations"
        )
    return np.asarray(values, dtype=np.float64).reshape(-1, num_generations)


def prefix_reward(
    completion_ids: list[list[int]], target_sid_ids: list[list[int]], **kwargs: Any
) -> list[float]:
    """Graded by the levels m of L that match the target's SID from its beginning.

    1 where all do, else min(0.95, √(m / (L − 1))): for L = 5 levels .5, .707, .866, .95 and 1, the
    residual-sensitive reward of GREAM (Hong et al. 2025, arXiv 2510.20815); for L = 3 .707, .95, 1.
    The values for L ≠ 5 are this formula's, not the paper's.

    Failure mode: siblings of the target earn nearly as much as the target, the more so the fewer
    levels there are, and a policy that never hits lives well on the right branch. Weigh it below
    the rule reward, and least with two levels, where a sibling is any item of the same first code.
    """
    if not completion_ids:
        return []
    matched, n_levels = matched_levels(completion_ids, target_sid_ids), len(target_sid_ids[0])
    graded = np.minimum(PREFIX_CAP, np.sqrt(matched / max(n_levels - 1, 1)))
    if n_levels == 1:
        graded = np.zeros(len(matched))
    return np.where(matched == n_levels, 1.0, graded).tolist()


def make_similarity_reward(
    name: str, vectors: npt.NDArray[np.floating], items: CompletedItems
) -> RewardFunction:
    """Cosine of the vectors of the completion's item and of the target, max(0, v·t / (|v|·|t|)).

    With text vectors it is a semantic reward, with vectors of behaviour a collaborative one: both
    pay for a plausible item that the user happened not to take. 1 for the target itself, 0 for what
    is no item and where a vector is zero.

    Failure mode: of vectors that all point one way (unit-norm text embeddings often do) every item
    earns about the same, and noise decides; near-duplicates of the target earn as much as it. Of
    collaborative vectors, popular items lie near everything and are learned by heart: beside them
    keep the rule reward the largest.

    Args:
        name: of the reward in logs, "semantic" or "collaborative".
        vectors: row i is catalogue row i. ``# (n_items, dim)``
        items: reads completions.

    Returns:
        A reward that reads the column `target_item_index`.

    Raises:
        ValueError: not one vector per item.
    """
    if vectors.ndim != 2 or len(vectors) != items.n_items:
        raise ValueError(
            f"vectors of shape {vectors.shape} for {items.n_items} items; row i must be "
            "catalogue row i"
        )
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norm > 0, norm, 1)

    def similarity(
        completion_ids: list[list[int]], target_item_index: list[int], **kwargs: Any
    ) -> list[float]:
        made, target = items(completion_ids), np.asarray(target_item_index, dtype=np.int64)
        cosine = np.einsum("nd,nd->n", unit[made], unit[target])
        return np.where(made >= 0, np.clip(cosine, 0, 1), 0.0).tolist()

    similarity.__name__ = f"{name}_reward"
    return similarity


def make_future_reward(items: CompletedItems, window: int, discount: float) -> RewardFunction:
    """A hit on any of the user's next `window` training items: discount^j for the j-th, from 0.

    The target itself is j = 0 and earns 1; an item that comes twice earns by its first coming. The
    idea is REG4Rec's multi-step reward: what the user takes a little later is no mistake.

    Failure mode: `future_item_index` must be made of training rows alone (build_dataset does so):
    one item of validation or test in it, and the test is trained on. A wide window with little
    discount pays for the user's staple items and blurs what comes next.

    Args:
        items: reads completions.
        window: items that count, the target included.
        discount: in (0, 1].

    Returns:
        A reward that reads the column `future_item_index`, each row's items in their order, the
        target first.

    Raises:
        ValueError: a window or discount that can't be one.
    """
    if window < 1 or not 0 < discount <= 1:
        raise ValueError(f"window={window} must be at least 1 and discount={discount} in (0, 1]")

    def future_reward(
        completion_ids: list[list[int]], future_item_index: list[list[int]], **kwargs: Any
    ) -> list[float]:
        made = items(completion_ids)
        future = sid_matrix(future_item_index, max(map(len, future_item_index), default=0))
        same = (future[:, :window] == made[:, None]) & (made >= 0)[:, None]
        earned = same * discount ** np.arange(same.shape[1])
        return earned.max(axis=1, initial=0.0).tolist()

    return future_reward


NOVELTY_ON = ("hits", "beside")


def make_novelty_reward(
    items: CompletedItems, counts: npt.NDArray[np.integer], num_generations: int, on: str = "hits"
) -> RewardFunction:
    """Self-information of an item's popularity, in [0, 1], where it can't be farmed.

    I(i) = −log2((c_i + 1) / Σ_j (c_j + 1)), divided by the largest I of the catalogue, with c the
    interactions of the training part. ``on="hits"`` pays it for the target alone, so that a rare
    hit is worth more than a popular one; ``on="beside"`` pays it to every valid item of a group
    that has a hit (self-information as novelty: Zhou et al. 2010, PNAS 107:4511).

    Failure mode: paid for any item it is earned by recommending what nobody wants. "beside" is
    bounded by that gate, yet within a group it still prefers rare misses: keep its weight small.

    Args:
        items: reads completions.
        counts: training interactions of each item. ``# (n_items,)``
        num_generations: size of a group.
        on: "hits" or "beside".

    Raises:
        ValueError: another `on`, or not one count per item.
    """
    if on not in NOVELTY_ON:
        raise ValueError(f"on={on!r} must be one of {', '.join(NOVELTY_ON)}")
    if len(counts) != items.n_items:
        raise ValueError(f"{len(counts)} counts for {items.n_items} items")
    smoothed = np.asarray(counts, dtype=np.float64) + 1
    information = -np.log2(smoothed / smoothed.sum())
    worth = information / max(float(information.max()), math.ulp(1.0))

    def novelty_reward(
        completion_ids: list[list[int]], target_sid_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        made = items(completion_ids)
        paid = in_groups(rule_reward(completion_ids, target_sid_ids), num_generations) > 0
        if on == "beside":
            paid = np.broadcast_to(paid.any(axis=1, keepdims=True), paid.shape)
        return np.where(paid.ravel() & (made >= 0), worth[made], 0.0).tolist()

    return novelty_reward
