"""The one constrained beam search, shared by every engine.

An engine only says how likely each child of each live beam is; selection, ties, filters, the
account of what was pruned and the final list are made here, so that engines can differ in speed
alone. A sampler (`genrec.decoding.sampling`) takes the place of selection and of nothing else.

Shapes: U users, B beams, M children per beam, L levels. Longer than other modules: a step, its ties
and what it cuts off are one account, which is kept in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genrec.decoding.sampling import Draws, Sample, gather_samples
from genrec.decoding.trie import SidTrie
from genrec.decoding.trie_tensors import LevelFilter, TrieTensors
from genrec.normalizers import NORMALIZERS as NORMALIZERS
from genrec.normalizers import Normalizer as Normalizer

_LOW_WORD = (1 << 32) - 1
_CHILDREN_AT_ONCE = 1 << 22  # bounds the memory of a step; some ten arrays of this size


def default_beam_width(k: int) -> int:
    """Search width for a list of k items: the next of 50, 100, 200, 400, … from 2k on.

    Wide enough that the top k rarely changes beyond it, and of so few values that users who ask for
    lists of different lengths can be searched together.
    """
    width = 50
    while width < 2 * k:
        width *= 2
    return width


def check_sid_token_ids(
    sid_token_ids: Sequence[Sequence[int]], trie: SidTrie, vocab_size: int
) -> None:
    """Check the tokens of a trie's codes against it and against a model.

    Raises:
        ValueError: a level is missing, a code has no token, or a token is not in the vocabulary.
    """
    if len(sid_token_ids) != trie.n_levels:
        raise ValueError(f"{len(sid_token_ids)} levels of SID tokens for a trie of {trie.n_levels}")
    for level, (ids, codes) in enumerate(zip(sid_token_ids, trie.tokens, strict=True)):
        if codes.max() >= len(ids):
            raise ValueError(
                f"level {level} has code {codes.max()} but only {len(ids)} token ids; was the "
                "model trained on another SID map?"
            )
        unique = np.unique(np.asarray(ids))
        if len(unique) != len(ids) or unique[0] < 0 or unique[-1] >= vocab_size:
            raise ValueError(
                f"token ids of level {level} repeat or lie outside the model's vocabulary of "
                f"{vocab_size}"
            )


@dataclass(frozen=True)
class BeamResult:
    """Recommended lists; row i belongs to prompt i.

    Attributes:
        items: catalogue rows by falling score, (n, k) int64; −1 where fewer than k exist. With a
            sampler in the order of drawing, and with replacement perhaps repeated.
        scores: summed log-probabilities, (n, k) float32; −inf at padding.
        level_log_probs: their summands, (n, k, L) float32.
        certified: whether no pruned prefix could have led to a better item, (n,): the list then is
            the exact top k. Scores only fall along a path, which is the proof. False for a sampler.
        sample: what a sampler knows of its lists; None without one.
        pruned: score of the best prefix that was ever cut off, (n,) float32, −inf if none was; None
            for lists that are no search's own.
    """

    items: np.ndarray
    scores: np.ndarray
    level_log_probs: np.ndarray
    certified: np.ndarray
    sample: Sample | None = None
    pruned: np.ndarray | None = None

    def cut(self, k: int) -> BeamResult:
        """The lists that the same search gives for a smaller k, `certified` included.

        Raises:
            ValueError: k is not within 1 … the length of these lists, or they were drawn.
        """
        longest = self.items.shape[1]
        if not 1 <= k <= longest:
            raise ValueError(f"k={k} must lie between 1 and the {longest} items of these lists")
        if self.sample is not None:
            raise ValueError("lists that a sampler drew can't be cut; draw k items")
        certified = self.certified  # what holds for a long list holds for its beginning
        if self.pruned is not None:
            certified = (self.pruned < self.scores[:, k - 1]) | (self.pruned == -np.inf)
        return BeamResult(
            self.items[:, :k],
            self.scores[:, :k],
            self.level_log_probs[:, :k],
            certified,
            pruned=self.pruned,
        )


@dataclass(frozen=True)
class Beams:
    """Live prefixes of a batch, best first.

    Attributes:
        nodes: trie nodes of the last level, (U, B).
        codes: their codes, (U, B).
        parents: which beam of the level before each came from, (U, B).
        scores: (U, B), −inf where dead.
        level_log_probs: (U, B, levels so far).
        pruned: best score that was ever cut off, (U,).
        draws: noise and state of a sampler; None for the best-first search.
    """

    nodes: Tensor
    codes: Tensor
    parents: Tensor
    scores: Tensor
    level_log_probs: Tensor
    pruned: Tensor
    draws: Draws | None = None

    @classmethod
    def start(cls, users: int, device: torch.device, draws: Draws | None = None) -> Beams:
        """One empty prefix per user."""
        zero = torch.zeros(users, 1, dtype=torch.int64, device=device)
        scores = torch.zeros(users, 1, device=device)
        pruned = torch.full((users,), -torch.inf, device=device)
        return cls(zero, zero, zero, scores, torch.zeros(users, 1, 0, device=device), pruned, draws)

    def users(self, rows: slice) -> Beams:
        """The beams of some users."""
        tensors = {name: getattr(self, name)[rows] for name in _TENSORS}
        return Beams(**tensors, draws=None if self.draws is None else self.draws.users(rows))

    @classmethod
    def together(cls, parts: Sequence[Beams]) -> Beams:
        """Beams of several groups of users, one after another."""
        if len(parts) == 1:
            return parts[0]
        tensors: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS
        }
        draws = [part.draws for part in parts if part.draws is not None]
        return cls(**tensors, draws=Draws.together(draws) if draws else None)


_TENSORS = tuple(item.name for item in fields(Beams) if item.name != "draws")


def normalize(logits: Tensor, sid_ids: Tensor, normalizer: Normalizer) -> Tensor:
    """Log-probabilities of one level's codes from next-token logits.

    Args:
        logits: (..., vocabulary), any float type; computed in fp32.
        sid_ids: token ids of the level's codes, (codebook_size,).
        normalizer: "full" divides by the whole vocabulary, "level" by the level's codes. ("trie"
            needs the children: see `child_log_probs`; here it leaves the logits as they are.)

    Returns:
        (..., codebook_size) float32.
    """
    logits = logits.float()
    columns = logits[..., sid_ids]
    if normalizer == "full":
        return columns - logits.logsumexp(-1, keepdim=True)
    return columns.log_softmax(-1) if normalizer == "level" else columns


def child_log_probs(
    columns: Tensor, codes: Tensor, exists: Tensor, normalizer: Normalizer
) -> Tensor:
    """Log-probabilities of children from `normalize`'s columns.

    Args:
        columns: (U, B, codebook_size).
        codes: code of each child, (U, B, M).
        exists: (U, B, M); over these (the unfiltered trie) "trie" renormalises.
        normalizer: as in `normalize`.

    Returns:
        (U, B, M), −inf where no child exists.
    """
    picked = columns.gather(-1, codes).masked_fill(~exists, -torch.inf)
    return picked.log_softmax(-1) if normalizer == "trie" else picked


def code_log_probs(
    tensors: TrieTensors,
    level: int,
    parents: Tensor,
    nodes: Tensor,
    columns: Tensor,
    normalizer: Normalizer,
) -> Tensor:
    """Log-probability of one given child of each parent, as a search scores it, (U, B).

    Args:
        tensors: the trie.
        level: level of the children.
        parents: nodes above it, (U, B); zeros at level 0.
        nodes: the children, (U, B).
        columns: `normalize`'s, (U, B, codebook_size).
        normalizer: as in `normalize`.
    """
    if normalizer != "trie":  # the siblings don't matter
        return columns.gather(-1, tensors.codes(level, nodes).unsqueeze(-1)).squeeze(-1)
    child, exists = tensors.expand(level, parents)
    log_probs = child_log_probs(columns, tensors.codes(level, child), exists, normalizer)
    return log_probs.gather(-1, (nodes - child[..., 0]).unsqueeze(-1)).squeeze(-1)


def step(
    tensors: TrieTensors,
    level: int,
    beams: Beams,
    columns: Tensor,
    normalizer: Normalizer,
    users: LevelFilter | None,
    width: int,
) -> Beams:
    """One level of the search: children, their scores, filters, selection.

    A few users at a time where codebooks are wide, so that memory stays bounded; a user's beams
    never depend on who else is in the batch.

    Args:
        tensors: the trie and its view.
        level: level of the children.
        beams: the prefixes to extend; at level 0 the root.
        columns: `normalize`'s log-probabilities of the level's codes, (U, B, codebook_size).
        normalizer: as in `normalize`.
        users: the users' filters at this level, or None.
        width: beams to keep.
    """
    n_users, n_beams = beams.nodes.shape
    at_once = max(1, _CHILDREN_AT_ONCE // (n_beams * tensors.widest[level]))
    parts = []
    for first in range(0, n_users, at_once):
        part = beams.users(slice(first, first + at_once))
        nodes = part.nodes if level else torch.zeros_like(part.nodes)
        child, exists = tensors.expand(level, nodes)
        log_probs = child_log_probs(
            columns[first : first + at_once], tensors.codes(level, child), exists, normalizer
        )
        allowed = tensors.allowed(level, child, users, first)
        log_probs = log_probs.masked_fill(~allowed, -torch.inf)
        parts.append(advance(tensors, level, part, child, log_probs, width))
    return Beams.together(parts)


def advance(
    tensors: TrieTensors, level: int, beams: Beams, child: Tensor, log_probs: Tensor, width: int
) -> Beams:
    """Keep each user's best children, or those that the beams' sampler draws.

    Args:
        tensors: the trie.
        level: level of the children.
        beams: the prefixes they extend.
        child: child ids, (U, B, M), distinct per user where their score is finite.
        log_probs: (U, B, M), −inf for what doesn't exist or isn't allowed.
        width: beams to keep.

    Returns:
        At most `width` beams, ordered by (score descending, SID ascending), or as drawn.
    """
    users, n_beams, n_child = child.shape
    end_code = tensors.trie.end_code
    if end_code is not None and level > 0:
        # After an end mark the only child is another one: it is padding, not a choice.
        ended = (beams.codes == end_code).unsqueeze(-1) & torch.isfinite(log_probs)
        log_probs = log_probs.masked_fill(ended, 0.0)
    scores = (beams.scores.unsqueeze(-1) + log_probs).flatten(1)  # (U, B*M)
    flat = child.flatten(1)
    pruned, draws = beams.pruned, None
    if beams.draws is None:
        keep = min(width + 1, scores.shape[1])
        top = rank_key(scores, flat).topk(keep, dim=1).indices
        best = scores.gather(1, top)
    else:
        top, draws = beams.draws.choose(level, child, log_probs, width)
        keep = top.shape[1]
        out = draws.log_probs == -torch.inf  # what top-p leaves out has a score, but is not drawn
        best = scores.gather(1, top).masked_fill(out, -torch.inf)
    if keep > width:
        if (
            level + 1 < tensors.trie.n_levels
        ):  # a whole item that is cut off ranks below the kept ones
            pruned = torch.maximum(pruned, best[:, width])
        top, best = top[:, :width], best[:, :width]
    parents = top // n_child
    nodes = flat.gather(1, top)
    history = beams.level_log_probs.gather(
        1, parents.unsqueeze(-1).expand(-1, -1, beams.level_log_probs.shape[-1])
    )
    own = log_probs.flatten(1).gather(1, top)
    return Beams(
        nodes,
        tensors.codes(level, nodes),
        parents,
        best,
        torch.cat([history, own.unsqueeze(-1)], dim=-1),
        pruned,
        draws,
    )


def without_padding(tensors: TrieTensors, level: int, beams: Beams) -> Beams | None:
    """The beams of the last level, where every live one has its end mark; None where one goes on.

    The padding that is left is forced and costs nothing, so one long title in the catalogue doesn't
    make every search as deep. (A sampler goes all the way: its noise is drawn level by level.)

    Args:
        tensors: the trie.
        level: of the beams.
        beams: prefixes.
    """
    end_code = tensors.trie.end_code
    if end_code is None or beams.draws is not None:
        return None
    if bool((torch.isfinite(beams.scores) & (beams.codes != end_code)).any()):
        return None
    left = tensors.trie.n_levels - beams.level_log_probs.shape[-1]
    return replace(
        beams,
        nodes=tensors.first_leaves(level, beams.nodes),
        level_log_probs=F.pad(beams.level_log_probs, (0, left)),
    )


def rank_key(scores: Tensor, nodes: Tensor) -> Tensor:
    """Int64 whose order is (score ascending, SID descending): exact where a float top-k isn't.

    NaN ranks first, whatever its sign, so that it surfaces in `finish` and isn't quietly cut off.

    Args:
        scores: any shape, float.
        nodes: node ids of one level, the same shape.
    """
    # Adding 0.0 folds −0.0 into 0.0.
    bits = (
        (scores.float().masked_fill(scores.isnan(), torch.inf) + 0.0)
        .view(torch.int32)
        .to(torch.int64)
    )
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered * (1 << 32) + (_LOW_WORD - nodes)


def finish(tensors: TrieTensors, beams: Beams, k: int, prompt_rows: np.ndarray) -> BeamResult:
    """The final lists of a batch after the last level.

    Args:
        tensors: the trie.
        beams: prefixes of the last level.
        k: items per list.
        prompt_rows: what an error message calls each prompt, (U,).

    Raises:
        ValueError: a user has no item left at all, or the model's scores are NaN.
    """
    scores = beams.scores[:, :k]
    # A sampler spreads a NaN over what competed with it.
    drawn = scores if beams.draws is None else beams.draws.log_probs
    if torch.isnan(scores).any() or torch.isnan(drawn).any():
        raise ValueError("the model gave NaN scores; check its weights and dtype")
    empty = torch.isinf(scores[:, 0])
    if empty.any():
        raise ValueError(
            f"prompt {prompt_rows[int(empty.nonzero()[0])]} has no allowed item left: its filters "
            "exclude the whole catalogue view"
        )
    live = torch.isfinite(scores)
    items = torch.where(live, tensors.items(beams.nodes[:, :k]), -1)
    # A list shorter than k is complete only if nothing was pruned; otherwise nothing pruned may
    # reach its last item (a pruned prefix of equal score could lead to an item that wins the tie).
    last = torch.where(live.all(1) & torch.tensor(scores.shape[1] == k), scores[:, -1], -torch.inf)
    certified = (beams.pruned < last) | (beams.pruned == -torch.inf)
    if beams.draws is not None:
        certified = torch.zeros_like(certified)
    missing = k - scores.shape[1]
    return BeamResult(
        np.pad(items.cpu().numpy(), ((0, 0), (0, missing)), constant_values=-1),
        np.pad(scores.cpu().numpy(), ((0, 0), (0, missing)), constant_values=-np.inf),
        np.pad(
            beams.level_log_probs[:, :k].cpu().numpy(),
            ((0, 0), (0, missing), (0, 0)),
            constant_values=-np.inf,
        ),
        certified.cpu().numpy(),
        None if beams.draws is None else beams.draws.sample(k),
        beams.pruned.cpu().numpy(),
    )


def length_batches(
    prompts: Sequence[Sequence[int]], n_levels: int, context: int | None, batch_size: int
) -> list[np.ndarray]:
    """Row numbers of the users decoded together, after a check of all prompts.

    Longest first, so that a lack of memory shows at once.

    Raises:
        ValueError: a prompt is empty, or too long for the context or a sliding window (None: no
            limit known).
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    if len(lengths) == 0:
        return []
    if lengths.min() == 0:
        raise ValueError(f"prompt {int(lengths.argmin())} is empty")
    longest = int(lengths.max()) + n_levels
    if context is not None and longest > context:
        raise ValueError(
            f"prompt {int(lengths.argmax())} with its item needs {longest} tokens, the model's "
            f"sliding window or context holds {context}; lower max_history"
        )
    order = np.argsort(-lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def search_in_batches(
    search_batch: Callable[[np.ndarray, list[LevelFilter] | None], BeamResult],
    batches: list[np.ndarray],
    tensors: TrieTensors,
    k: int,
    beam_width: int,
    seen: Sequence[np.ndarray] | None,
    progress: Callable[[int], object] | None,
    candidates: Sequence[np.ndarray | None] | None = None,
) -> BeamResult:
    """Run an engine's search batch by batch and put the lists back into the prompts' order.

    Args:
        search_batch: searches the given rows under the given filters, one per level.
        batches: from `length_batches`.
        tensors: the trie and its view.
        k: items per list; at most `beam_width`.
        beam_width: prefixes kept per level.
        seen: catalogue rows that each user must not get, one entry per prompt, or None.
        progress: called with the number of users of each finished batch.
        candidates: the only catalogue rows that each user may get, one entry per prompt (None: no
            limit for this one), or None.

    Raises:
        ValueError: k or a list's length is wrong, or a user has no item left.
    """
    if not 1 <= k <= beam_width:
        raise ValueError(f"k={k} must lie between 1 and beam_width={beam_width}")
    n, levels = sum(map(len, batches)), tensors.trie.n_levels
    if seen is not None and len(seen) != n:
        raise ValueError(f"seen has {len(seen)} entries for {n} prompts")
    if candidates is not None and len(candidates) != n:
        raise ValueError(f"candidates has {len(candidates)} entries for {n} prompts")
    items = np.full((n, k), -1, dtype=np.int64)
    scores = np.full((n, k), -np.inf, dtype=np.float32)
    level_log_probs = np.full((n, k, levels), -np.inf, dtype=np.float32)
    certified = np.zeros(n, dtype=bool)
    pruned = np.full(n, -np.inf, dtype=np.float32)
    samples: list[Sample] = []
    for rows in batches:
        filters = tensors.exclusions(
            None if seen is None else [np.asarray(seen[r]) for r in rows],
            None if candidates is None else [candidates[r] for r in rows],
        )
        result = search_batch(rows, filters)
        items[rows], scores[rows] = result.items, result.scores
        level_log_probs[rows], certified[rows] = result.level_log_probs, result.certified
        pruned[rows] = result.pruned
        if result.sample is not None:
            samples.append(result.sample)
        if progress is not None:
            progress(len(rows))
    sample = gather_samples(samples, np.concatenate(batches)) if samples else None
    return BeamResult(items, scores, level_log_probs, certified, sample, pruned)
