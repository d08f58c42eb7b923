"""Erasure tests of what chains cite, by another perturbation than the one that chose it.

Citations that were picked by leaving items out look good when items are left out again. Here the
history keeps its length: an erased item is replaced by one of its nearest neighbours in the run's
item vectors. With m = log p(item | history), as in ERASER (DeYoung et al. 2020, arXiv 1911.03429)
with log-probabilities (nats) in place of class probabilities:

- comprehensiveness = m(history) − m(cited items replaced); high if what is cited matters;
- sufficiency = m(history) − m(all other items replaced); near or below 0 if it is enough.

A neighbour carries much of what the item said, so both are smaller than with deletion. What that
costs the chain it costs the controls too, which are measured beside it with as many items each:

- random: drawn from the whole history, cited ones included (a chain that cites nearly all of a
  short history can't be far from it);
- newest: the last ones, which a next-item model may rest on whatever it is asked;
- popular: those that most training users had;
- other_chain: the places, counted from the newest, that another list's chain of the same rank
  cites; if citations say nothing of this item, those do as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from genrec.explain.evidence import FloatArray, IntArray, item_log_probs
from genrec.explain.thresholds import CONTROLS
from genrec.recommend import Recommender

CHAIN = "chain"
NEIGHBOURS = 20  # a replacement is one of the so many nearest that qualify
_BLOCK_CELLS = 1 << 24  # similarities held at once: 64 MiB


def control_sets(
    cited: IntArray,
    lengths: IntArray,
    popularity: Sequence[IntArray],
    seed: int,
    users: IntArray | None = None,
) -> dict[str, IntArray]:
    """As many history positions as each chain cites, chosen without looking at the chain.

    Args:
        cited: positions, (R, K, n); −1 pads.
        lengths: of the shown histories, (R,).
        popularity: training count of each shown history item, per list.
        seed: of the draws.
        users: number of each list's user, from 0; default: each has one list. Another list's chain
            is that of another user.

    Returns:
        Positions of each control, (R, K, n); −1 pads.
    """
    rng = np.random.default_rng(seed)
    n_lists, n_items, most = cited.shape
    sets = {name: np.full_like(cited, -1) for name in CONTROLS}
    other = others(np.arange(n_lists) if users is None else users, rng)
    for row in range(n_lists):
        length, theirs = int(lengths[row]), int(other[row])
        popular = np.lexsort([-np.arange(length), -popularity[row]])  # of equal ones the newer
        for place in range(n_items):
            n = int((cited[row, place] >= 0).sum())
            if n == 0:
                continue
            random = rng.permutation(length)
            sets["random"][row, place, :n] = random[:n]
            sets["newest"][row, place, :n] = np.arange(length)[::-1][:n]
            sets["popular"][row, place, :n] = popular[:n]
            ages = lengths[theirs] - 1 - cited[theirs, place][cited[theirs, place] >= 0]
            moved = (length - 1 - ages)[ages < length][:n]
            fill = random[~np.isin(random, moved)][: n - len(moved)]
            sets["other_chain"][row, place, :n] = np.concatenate([moved, fill])
    return sets


def others(users: IntArray, rng: np.random.Generator) -> IntArray:
    """For each list the first list of another user; its own where there is one user only.

    Users stand in a random circle, and each gets the lists of the one before.

    Args:
        users: number of each list's user, from 0, (n,).
        rng: for the circle.
    """
    found, first, which = np.unique(users, return_index=True, return_inverse=True)
    circle = rng.permutation(len(found))
    before = np.empty(len(found), dtype=np.int64)
    before[circle] = np.roll(circle, 1)
    return first[before[which]]


def replacements(
    vectors: np.ndarray,
    histories: Sequence[IntArray],
    items: IntArray,
    draws: int,
    seed: int,
) -> list[IntArray]:
    """Similar items to put in place of each history item.

    Args:
        vectors: of the catalogue, (n_items, dim).
        histories: shown histories.
        items: recommended catalogue rows, (R, K); −1 pads.
        draws: replacements per history item.
        seed: of the draws.

    Returns:
        Per list catalogue rows, (history length, draws): each drawn from the `NEIGHBOURS` nearest
        items by cosine that are neither in the history nor in the list. −1 where there is none.
    """
    rng = np.random.default_rng(seed)
    wanted = np.unique(np.concatenate([np.zeros(0, np.int64), *histories]))
    # So many that enough are left when those of history and list are taken out.
    longest = max((len(h) for h in histories), default=0)
    keep = min(len(vectors), NEIGHBOURS + longest + items.shape[1])
    nearest = _nearest(vectors, wanted, keep)
    made = []
    for history, listed in zip(histories, items, strict=True):
        banned = np.concatenate([history, listed[listed >= 0]])
        own = np.full((len(history), draws), -1, dtype=np.int64)
        for position, near in enumerate(nearest[np.searchsorted(wanted, history)]):
            free = near[~np.isin(near, banned)][:NEIGHBOURS]
            if len(free):
                own[position] = rng.choice(free, draws, replace=len(free) < draws)
        made.append(own)
    return made


def _nearest(vectors: np.ndarray, rows: IntArray, keep: int) -> IntArray:
    """The `keep` nearest items of given rows, nearest first. ``# (len(rows), keep)``."""
    unit = vectors.astype(np.float32)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    out = np.empty((len(rows), keep), dtype=np.int64)
    batch = max(1, _BLOCK_CELLS // max(1, len(unit)))
    for start in range(0, len(rows), batch):
        similarity = unit[rows[start : start + batch]] @ unit.T
        top = np.argpartition(-similarity, keep - 1, axis=1)[:, :keep]
        order = np.argsort(-np.take_along_axis(similarity, top, axis=1), axis=1, kind="stable")
        out[start : start + batch] = np.take_along_axis(top, order, axis=1)
    return out


@dataclass(frozen=True)
class Erased:
    """Erasure tests of one way to cite, in nats, (R, K); NaN where not defined.

    Not defined: at padding, where nothing is cited, and where the whole history is.
    """

    comprehensiveness: FloatArray
    sufficiency: FloatArray


def erase(
    recommender: Recommender,
    histories: Sequence[IntArray],
    items: IntArray,
    log_probs: FloatArray,
    sets: Mapping[str, IntArray],
    similar: Sequence[IntArray],
    progress: Callable[[int], object] | None = None,
    start: Callable[[int], object] | None = None,
    behind: Sequence[Sequence[int]] | None = None,
) -> dict[str, Erased]:
    """Replace, or keep alone, the positions of each set.

    Chains of a list that erase the same positions share a prompt, so controls cost little.

    Args:
        recommender: the run.
        histories: shown histories.
        items: recommended catalogue rows, (R, K); −1 pads.
        log_probs: log p(item | shown history), (R, K).
        sets: name -> positions, (R, K, n); −1 pads.
        similar: of `replacements`; the mean over its draws counts.
        progress: called with the number of prompts of each finished block.
        start: called with the number of prompts before the first.
        behind: token ids of each list's chain, which stays as it is.
    """
    prompts: dict[tuple[int, int, int], int] = {}  # list, erased positions as bits, draw -> prompt
    kept: list[IntArray] = []
    places: list[tuple[int, int, int, int]] = []  # set, kind, list, place
    used: list[list[int]] = []  # prompts of each of them
    names = list(sets)
    for number, name in enumerate(names):
        defined = (items >= 0) & (sets[name] >= 0).any(-1)
        for row, place in zip(*np.nonzero(defined), strict=True):
            history, chosen = histories[row], sets[name][row, place]
            bits = sum(1 << int(p) for p in chosen[chosen >= 0])
            everything = (1 << len(history)) - 1
            if bits == everything:
                continue
            for kind, erased in ((0, bits), (1, everything ^ bits)):
                own = []
                for draw in range(similar[row].shape[1]):
                    key = (int(row), erased, draw)
                    if key not in prompts:
                        prompts[key] = len(kept)
                        kept.append(_replaced(history, erased, similar[row][:, draw]))
                    own.append(prompts[key])
                places.append((number, kind, int(row), int(place)))
                used.append(own)
    out = np.full((len(names), 2, *items.shape), np.nan)
    if kept:
        if start is not None:
            start(len(kept))
        row = np.array([key[0] for key in prompts], dtype=np.int64)
        chains = None if behind is None else [behind[r] for r in row]
        scores = item_log_probs(recommender, kept, items[row], progress, chains)  # (prompts, K)
        at, mine = np.array(places, dtype=np.int64).T, np.array(used, dtype=np.int64)
        means = scores[mine, at[3][:, None]].mean(axis=1)
        out[tuple(at)] = log_probs[at[2], at[3]] - means
    return {name: Erased(out[i, 0], out[i, 1]) for i, name in enumerate(names)}


def _replaced(history: IntArray, erased: int, similar: IntArray) -> IntArray:
    """The history with items replaced; where no replacement exists the item is left out."""
    gone = np.array([erased >> p & 1 for p in range(len(history))], dtype=bool)
    changed = np.where(gone, similar, history)
    return changed[changed >= 0]
