"""Measured evidence: how much less likely an item gets when one history item is left out.

Leave-one-out occlusion (Zeiler & Fergus 2014; Li et al. 2016) at the level of history items: the
prompt is rendered again without the item, by the same renderer and template, and the same
recommended item is teacher-forced. Δ = log p(item | history) − log p(item | history without j), in
nats. It is a property of the model's score and needs no generated text. What it can't see: items
that only matter together (each Δ is small while another stays), and whatever the prompt cut off.

The list itself is searched again without each history item, by the engine, trie and filters that
made it: Δ rank says whether a fall in log-probability matters to what the user sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import CatalogueView
from genrec.modeling import encode_prompts
from genrec.reasoning import REASONING
from genrec.recommend import Recommender

# Scores of the engines agree up to this, so a smaller Δ is not told from none.
MIN_DELTA = 1e-3
UNLISTED = 0  # in place of a rank: the beam doesn't hold the item
_BLOCK = 512  # prompts rendered and scored together

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Evidence:
    """Leave-one-out measurements of lists; R rows, K items per list, H history positions.

    Attributes:
        log_probs: log p(item | shown history), (R, K); NaN where a list is shorter than K.
        deltas: fall when history position j is left out, (R, K, H); NaN behind a history's end.
            Position 0 is the oldest item that the prompt shows.
    """

    log_probs: FloatArray
    deltas: FloatArray

    def cited(self, n: int) -> IntArray:
        """Positions of the (up to) `n` largest Δ above `MIN_DELTA`, (R, K, n), padded with −1.

        The largest comes first; of equal ones the newer item comes first.
        """
        values = np.nan_to_num(self.deltas, nan=-np.inf)[..., ::-1]
        order = np.argsort(-values, axis=-1, kind="stable")[..., :n]
        best = np.take_along_axis(values, order, axis=-1)
        positions = np.where(best > MIN_DELTA, values.shape[-1] - 1 - order, -1)
        missing = n - positions.shape[-1]
        return np.pad(positions, ((0, 0), (0, 0), (0, missing)), constant_values=-1)


def torch_engine(recommender: Recommender) -> TorchEngine:
    """The recommender's engine, which has to be the one that can score given items.

    Raises:
        ValueError: it is another one.
    """
    if not isinstance(recommender.engine, TorchEngine):
        raise ValueError(
            f"evidence is measured by teacher forcing, which {type(recommender.engine).__name__} "
            "doesn't offer; load the run with engine='torch'"
        )
    return recommender.engine


def shown(recommender: Recommender, histories: Sequence[Sequence[int]]) -> list[IntArray]:
    """The part of each history that its prompt shows: the newest `max_history` items."""
    return [np.asarray(h, dtype=np.int64)[-recommender.max_history :] for h in histories]


def item_log_probs(
    recommender: Recommender,
    histories: Sequence[IntArray],
    items: IntArray,
    progress: Callable[[int], object] | None = None,
    behind: Sequence[Sequence[int]] | None = None,
) -> FloatArray:
    """Log-probability of given items after given histories.

    Args:
        recommender: the run.
        histories: shown histories of catalogue rows, one per row of `items`.
        items: catalogue rows, (n, m); −1 pads.
        progress: called with the number of prompts of each finished block.
        behind: token ids of a chain that stands between each prompt, then that of the reasoning
            family, and the item; None: the serving prompt and no chain.

    Returns:
        (n, m) in nats, NaN at padding.
    """
    engine = torch_engine(recommender)
    out = np.full(items.shape, np.nan)
    order = np.argsort([-len(h) for h in histories], kind="stable")  # alike lengths: little padding
    for start in range(0, len(order), _BLOCK):
        rows = order[start : start + _BLOCK]
        shown_items = [histories[row].tolist() for row in rows]
        if behind is None:
            tokens = encode_prompts(recommender.tokenizer, recommender.prompts(shown_items))
        else:
            prompts = recommender.family_prompts(REASONING, shown_items)
            tokens = encode_prompts(recommender.tokenizer, prompts)
            tokens = [[*own, *behind[row]] for own, row in zip(tokens, rows, strict=True)]
        block = items[rows]
        levels = engine.score(tokens, np.maximum(block, 0))
        # (rows, m, L); padding is scored as row 0 and thrown away
        out[rows] = np.where(block >= 0, levels.astype(np.float64).sum(-1), np.nan)
        if progress is not None:
            progress(len(rows))
    return out


def leave_one_out(
    recommender: Recommender,
    histories: Sequence[IntArray],
    items: IntArray,
    progress: Callable[[int], object] | None = None,
    behind: Sequence[Sequence[int]] | None = None,
) -> Evidence:
    """Measure every shown history position of every list.

    A history that holds an item twice loses one copy at a time. Nothing moves up from the part that
    the prompt had cut off.

    Args:
        recommender: the run.
        histories: shown histories (see `shown`), oldest first.
        items: recommended catalogue rows, (R, K); −1 pads.
        progress: called with the number of prompts of each finished block.
        behind: token ids of each list's chain, which stays as it is; see `item_log_probs`.
    """
    lengths = np.array([len(h) for h in histories], dtype=np.int64)
    full = item_log_probs(recommender, histories, items, progress, behind)
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths]) if len(row) else row
    without = [np.delete(histories[int(r)], p) for r, p in zip(row, position, strict=True)]
    own = None if behind is None else [behind[r] for r in row]
    scores = item_log_probs(recommender, without, items[row], progress, own)
    deltas = np.full((*items.shape, int(lengths.max(initial=0))), np.nan)
    deltas[row, :, position] = full[row] - scores
    return Evidence(full, deltas)


def prompts_to_score(histories: Sequence[IntArray]) -> int:
    """Number of prompts that `leave_one_out` scores, for a progress bar."""
    return len(histories) + int(sum(len(h) for h in histories))


@dataclass(frozen=True)
class JointEvidence:
    """Sets of history items that matter together, (R, K, n) each.

    Attributes:
        positions: in the order in which they were found; −1 pads.
        falls: fall of log p(item) when this and all before it are left out, nats; NaN at padding.
    """

    positions: IntArray
    falls: FloatArray

    @property
    def added(self) -> FloatArray:
        """What each position's loss added to the fall, (R, K, n); above `MIN_DELTA`."""
        return np.diff(self.falls, axis=-1, prepend=0)


def joint_evidence(
    recommender: Recommender,
    histories: Sequence[IntArray],
    items: IntArray,
    evidence: Evidence,
    n: int,
    progress: Callable[[int], object] | None = None,
) -> JointEvidence:
    """Up to `n` positions per item, each the one whose loss costs most, given what is gone already.

    Of history items that say nearly the same, the second costs little alone and much once the first
    is gone. Greedy: the first has the largest Δ, the next is the best one beside it; it ends where
    no further one lowers the log-probability by more than `MIN_DELTA`. Two that stand in for each
    other wholly stay unseen: to lose one of them changes nothing. Items of a list that have lost
    the same positions share their prompts.

    Args:
        recommender: the run.
        histories: shown histories.
        items: recommended catalogue rows, (R, K); −1 pads.
        evidence: of these lists.
        n: positions at most.
        progress: called with the number of prompts of each finished block.
    """
    first = evidence.cited(1)[..., 0]
    positions = np.full((*items.shape, n), -1, dtype=np.int64)
    falls = np.full((*items.shape, n), np.nan)
    positions[..., 0] = first
    found = first >= 0
    row, place = np.nonzero(found)
    falls[row, place, 0] = evidence.deltas[row, place, first[found]]
    for step in range(1, n):
        active = np.argwhere(positions[..., step - 1] >= 0)
        without: dict[tuple[int, tuple[int, ...]], int] = {}  # list, what is gone -> its prompt
        kept: list[IntArray] = []
        tried: list[list[tuple[int, int]]] = []  # (position, prompt) of each active item
        for r, k in active:
            gone = positions[r, k, :step].tolist()
            own = []
            for position in range(len(histories[r]) - 1, -1, -1):  # of equal ones the newer
                if position not in gone:
                    key = (int(r), tuple(sorted([*gone, position])))
                    if key not in without:
                        without[key] = len(kept)
                        kept.append(np.delete(histories[r], key[1]))
                    own.append((position, without[key]))
            tried.append(own)
        if not kept:
            break
        rows = np.array([key[0] for key in without], dtype=np.int64)
        scores = item_log_probs(recommender, kept, items[rows], progress)  # (prompts, K)
        for (r, k), own in zip(active, tried, strict=True):
            if own:
                fall = evidence.log_probs[r, k] - np.array([scores[at, k] for _, at in own])
                best = int(fall.argmax())
                if fall[best] - falls[r, k, step - 1] > MIN_DELTA:
                    positions[r, k, step], falls[r, k, step] = own[best][0], fall[best]
    return JointEvidence(positions, falls)


def choose_citations(
    recommender: Recommender,
    histories: Sequence[IntArray],
    items: IntArray,
    evidence: Evidence,
    n: int,
    joint: bool,
    progress: Callable[[int], object] | None = None,
) -> tuple[IntArray, FloatArray | None]:
    """What each chain cites: positions (R, K, n), and what each adds where they are chosen jointly.

    Args:
        recommender: the run.
        histories: shown histories.
        items: recommended catalogue rows, (R, K); −1 pads.
        evidence: of these lists.
        n: positions at most.
        joint: each beside those before it (`joint_evidence`), or by its own Δ (`Evidence.cited`).
        progress: called with the number of prompts of each finished block.
    """
    if not joint:
        return evidence.cited(n), None
    found = joint_evidence(recommender, histories, items, evidence, n, progress)
    return found.positions, found.added


@dataclass(frozen=True)
class Search:
    """How the lists that are explained were searched, so that a changed history is searched alike.

    Attributes:
        seen: catalogue rows that each list must not hold, or None; a user keeps them whatever is
            left out of the prompt, so that filters don't pass for evidence.
        view: the catalogue view, or None.
        beam_width: prefixes kept per level; ranks are known down to it.
    """

    seen: Sequence[IntArray] | None
    view: CatalogueView | None
    beam_width: int

    def lists(
        self,
        recommender: Recommender,
        rows: IntArray,
        histories: Sequence[IntArray],
        progress: Callable[[int], object] | None = None,
    ) -> IntArray:
        """Search histories in place of those of `rows`.

        Returns:
            Catalogue rows, best first, (len(rows), beam_width); −1 pads.
        """
        out = np.full((len(rows), self.beam_width), -1, dtype=np.int64)
        order = np.argsort([-len(h) for h in histories], kind="stable")
        for start in range(0, len(order), _BLOCK):
            block = order[start : start + _BLOCK]
            prompts = recommender.prompts([histories[i].tolist() for i in block])
            found = torch_engine(recommender).search(
                encode_prompts(recommender.tokenizer, prompts),
                self.beam_width,
                self.beam_width,
                None if self.seen is None else [self.seen[rows[i]] for i in block],
                self.view,
            )
            out[block] = found.items
            if progress is not None:
                progress(len(block))
        return out


def places(lists: IntArray, items: IntArray) -> IntArray:
    """Rank of given items in lists, from 1; `UNLISTED` where a list doesn't hold the item.

    Args:
        lists: catalogue rows, best first, (n, width); −1 pads.
        items: catalogue rows, (n, m); −1 pads.

    Returns:
        (n, m); `UNLISTED` at padding too.
    """
    same = (lists[:, None, :] == items[:, :, None]) & (items[:, :, None] >= 0)  # (n, m, width)
    return np.where(same.any(-1), same.argmax(-1) + 1, UNLISTED)


def ranks_left_out(
    recommender: Recommender,
    histories: Sequence[IntArray],
    items: IntArray,
    search: Search,
    progress: Callable[[int], object] | None = None,
) -> IntArray:
    """Rank of every item when one history item is left out.

    Args:
        recommender: the run.
        histories: shown histories.
        items: recommended catalogue rows, (R, K); −1 pads.
        search: as the lists were made.
        progress: called with the number of prompts of each finished block.

    Returns:
        (R, K, H) ranks from 1; `UNLISTED` where the beam no longer holds the item, so below
        ``search.beam_width`` or pruned, and behind a history's end.
    """
    lengths = np.array([len(h) for h in histories], dtype=np.int64)
    row = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths]) if len(row) else row
    without = [np.delete(histories[int(r)], p) for r, p in zip(row, position, strict=True)]
    ranks = np.full((*items.shape, int(lengths.max(initial=0))), UNLISTED, dtype=np.int64)
    if len(row):
        lists = search.lists(recommender, row, without, progress)
        ranks[row, :, position] = places(lists, items[row])
    return ranks
