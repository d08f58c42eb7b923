"""Counterfactuals: the fewest history items without which an item would not have been recommended.

Finding a smallest set is NP-complete in general (arXiv 2508.03606), so the search is greedy: the
history item whose loss costs the recommended item most log-probability, given what is gone already,
goes next, until the item is no longer in the list. Then every item that turns out not to be needed
is put back, so that the set is minimal: putting back any one of it restores the recommendation. It
need not be the smallest.

Both questions are asked of the model: log-probabilities by teacher forcing, and whether the item is
listed by the same search over the same trie under the same filters that made the list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from genrec.explain.evidence import UNLISTED, IntArray, Search, item_log_probs, places
from genrec.recommend import Recommender


@dataclass(frozen=True)
class Counterfactual:
    """What would have to be gone from a history for an item to leave the list.

    Attributes:
        row: number of the list.
        place: of the item in it, from 0.
        positions: history positions to leave out, in the order in which they were found; if not
            `found`, those that were tried.
        found: whether the item leaves the list without them.
        log_prob: of the item without them, nats.
        rank: of the item without them; `UNLISTED` if the beam doesn't hold it.
        replaced_by: catalogue row that is first in the list then; −1 if nothing is.
        searches: lists that were searched.
    """

    row: int
    place: int
    positions: tuple[int, ...]
    found: bool
    log_prob: float
    rank: int
    replaced_by: int
    searches: int


def counterfactuals(
    recommender: Recommender,
    histories: Sequence[IntArray],
    items: IntArray,
    search: Search,
    k: int,
    n_items: int = 1,
    most: int = 10,
    progress: Callable[[int], object] | None = None,
) -> list[Counterfactual]:
    """A minimal set for each of the first items of each list, all lists step by step together.

    Args:
        recommender: the run.
        histories: shown histories.
        items: recommended catalogue rows, (R, K); −1 pads.
        search: as the lists were made.
        k: length of the list that the item has to leave.
        n_items: items of each list that are looked at, from the top.
        most: items that may be left out; a set that would need more is not found.
        progress: called with the number of items whose set is finished.

    Returns:
        One entry per list with a history and item, in that order. A set that was not found says
        how far the item fell.
    """
    pairs = [
        (row, place)
        for row in range(len(items))
        for place in range(min(n_items, items.shape[1]))
        if items[row, place] >= 0 and len(histories[row])
    ]
    gone: list[list[int]] = [[] for _ in pairs]
    state = [_Found(np.nan, UNLISTED, -1, False)] * len(pairs)
    searches = [0] * len(pairs)
    active = list(range(len(pairs)))

    def look(chosen: Sequence[int], sets: Sequence[Sequence[int]]) -> list[_Found]:
        """Search the lists of some pairs without given positions."""
        rows = np.array([pairs[i][0] for i in chosen], dtype=np.int64)
        kept = [np.delete(histories[r], list(s)) for r, s in zip(rows, sets, strict=True)]
        targets = np.array([items[pairs[i]] for i in chosen], dtype=np.int64)
        lists = search.lists(recommender, rows, kept)
        ranks = places(lists, targets[:, None])[:, 0]
        scores = item_log_probs(recommender, kept, targets[:, None])[:, 0]
        for i in chosen:
            searches[i] += 1
        return [
            _Found(float(score), int(rank), int(first), bool(rank == UNLISTED or rank > k))
            for score, rank, first in zip(scores, ranks, lists[:, 0], strict=True)
        ]

    while active:
        _leave_out_one_more(recommender, histories, items, pairs, gone, active)
        for i, found in zip(active, look(active, [gone[i] for i in active]), strict=True):
            state[i] = found
        before = len(active)
        active = [
            i
            for i in active
            if not state[i].left and len(gone[i]) < min(most, len(histories[pairs[i][0]]))
        ]
        if progress is not None:
            progress(before - len(active))
    _put_back(gone, state, look)
    return [
        Counterfactual(
            row, place, tuple(own), now.left, now.log_prob, now.rank, now.first, searches[i]
        )
        for i, ((row, place), own, now) in enumerate(zip(pairs, gone, state, strict=True))
    ]


@dataclass(frozen=True)
class _Found:
    """Where an item stands without some history items."""

    log_prob: float
    rank: int
    first: int
    left: bool


def _leave_out_one_more(
    recommender: Recommender,
    histories: Sequence[IntArray],
    items: IntArray,
    pairs: Sequence[tuple[int, int]],
    gone: list[list[int]],
    active: Sequence[int],
) -> None:
    """Add to each active set the position whose loss costs its item most; of equals the newer."""
    owners, tried, kept, targets = [], [], [], []
    for i in active:
        row = pairs[i][0]
        for position in range(len(histories[row]) - 1, -1, -1):
            if position not in gone[i]:
                owners.append(i)
                tried.append(position)
                kept.append(np.delete(histories[row], [*gone[i], position]))
                targets.append(items[pairs[i]])
    scores = item_log_probs(recommender, kept, np.array(targets, dtype=np.int64)[:, None])[:, 0]
    best: dict[int, int] = {}
    for at, owner in enumerate(owners):
        if owner not in best or scores[at] < scores[best[owner]]:
            best[owner] = at
    for owner, at in best.items():
        gone[owner].append(tried[at])


def _put_back(
    gone: list[list[int]],
    state: list[_Found],
    look: Callable[[Sequence[int], Sequence[Sequence[int]]], list[_Found]],
) -> None:
    """Put back what isn't needed, the oldest finding first, until all that is left is."""
    # The last one was needed: without it the item was still listed.
    todo = {i: own[:-1] for i, own in enumerate(gone) if state[i].left and len(own) > 1}
    while todo:
        chosen, fewer = list(todo), set()
        while chosen:
            back = [todo[i].pop(0) for i in chosen]
            sets = [[p for p in gone[i] if p != b] for i, b in zip(chosen, back, strict=True)]
            for i, own, found in zip(chosen, sets, look(chosen, sets), strict=True):
                if found.left:
                    gone[i], state[i] = own, found
                    fewer.add(i)
            chosen = [i for i in chosen if todo[i]]
        # Effects need not be monotone: in a smaller set another item may be free to come back.
        todo = {i: list(gone[i]) for i in sorted(fewer) if len(gone[i]) > 1}
