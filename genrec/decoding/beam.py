"""The one constrained beam search, shared by every engine.

An engine only says how likely each child of each live beam is; selection, ties, filters, the
account of what was pruned and the final list are made here, so that engines can differ in speed
alone.

Shapes: U users, B beams, M children per beam, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genrec.decoding.trie import CatalogueView, SidTrie

Normalizer = Literal["full", "level", "trie"]
NORMALIZERS: tuple[Normalizer, ...] = ("full", "level", "trie")
_LOW_WORD = (1 << 32) - 1


def default_beam_width(k: int) -> int:
    """Search width for a list of k items: wide enough that the top k rarely changes beyond it."""
    return max(2 * k, 50)


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
        items: catalogue rows by falling score, (n, k) int64; −1 where fewer than k exist.
        scores: summed log-probabilities, (n, k) float32; −inf at padding.
        level_log_probs: their summands, (n, k, L) float32.
        certified: whether no pruned prefix could have led to a better item, (n,): the list then is
            the exact top k. Scores only fall along a path, which is the proof.
        pruned: score of the best prefix that was ever cut off, (n,) float32, −inf if none was; None
            for lists that are no search's own.
    """

    items: np.ndarray
    scores: np.ndarray
    level_log_probs: np.ndarray
    certified: np.ndarray
    pruned: np.ndarray | None = None

    def cut(self, k: int) -> BeamResult:
        """The lists that the same search gives for a smaller k, `certified` included.

        Raises:
            ValueError: k is not within 1 … the length of these lists.
        """
        longest = self.items.shape[1]
        if not 1 <= k <= longest:
            raise ValueError(f"k={k} must lie between 1 and the {longest} items of these lists")
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


class TrieTensors:
    """A trie and a view on it as tensors of one device, with lookups for whole batches."""

    def __init__(self, trie: SidTrie, view: CatalogueView | None, device: torch.device) -> None:
        """Copy the arrays to `device`; without a view every item is allowed."""
        self.trie = trie
        self.view = view or trie.everything()
        if self.view.trie is not trie:
            raise ValueError("the view belongs to another trie")
        self.device = device
        self.tokens = [torch.from_numpy(t).to(device, torch.int64) for t in trie.tokens]
        self.child_start = [torch.from_numpy(c).to(device, torch.int64) for c in trie.children]
        self.alive = [torch.from_numpy(c > 0).to(device) for c in self.view.counts]
        self.items = torch.from_numpy(trie.items).to(device)
        self.widest = [trie.max_children(level) for level in range(trie.n_levels)]

    def expand(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Children of `nodes` in the unfiltered trie.

        Args:
            level: level of the children.
            nodes: parents, (U, B); any value where a beam is dead (its children are masked later).

        Returns:
            Child ids (U, B, M), ascending, and which of them exist (U, B, M).
        """
        start = self.child_start[level][nodes]  # (U, B)
        stop = self.child_start[level][nodes + 1]
        child = start.unsqueeze(-1) + torch.arange(self.widest[level], device=self.device)
        exists = child < stop.unsqueeze(-1)
        return child.clamp_(max=len(self.tokens[level]) - 1), exists

    def allowed(self, level: int, child: Tensor, dead: Tensor | None) -> Tensor:
        """Which children the view and the users' exclusions leave, (U, B, M).

        Args:
            level: level of the children.
            child: ids, (U, B, M).
            dead: sorted keys ``user * n_nodes + node`` of this level, or None.
        """
        allowed = self.alive[level][child]
        if dead is not None and len(dead):
            users = torch.arange(child.shape[0], device=self.device).view(-1, 1, 1)
            key = users * len(self.tokens[level]) + child
            at = torch.searchsorted(dead, key).clamp_(max=len(dead) - 1)
            allowed = allowed & (dead[at] != key)
        return allowed

    def exclusions(self, seen: list[np.ndarray] | None) -> list[Tensor] | None:
        """Per level the dead keys of a batch of users, each with an array of excluded rows."""
        if seen is None or not any(len(items) for items in seen):
            return None
        rows = np.repeat(np.arange(len(seen)), [len(items) for items in seen])
        dead = self.view.exclude(rows, np.concatenate(seen))
        return [torch.from_numpy(keys).to(self.device) for keys in dead]


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
    """

    nodes: Tensor
    codes: Tensor
    parents: Tensor
    scores: Tensor
    level_log_probs: Tensor
    pruned: Tensor

    @classmethod
    def start(cls, users: int, device: torch.device) -> Beams:
        """One empty prefix per user."""
        zero = torch.zeros(users, 1, dtype=torch.int64, device=device)
        scores = torch.zeros(users, 1, device=device)
        pruned = torch.full((users,), -torch.inf, device=device)
        return cls(zero, zero, zero, scores, torch.zeros(users, 1, 0, device=device), pruned)


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


def advance(
    tensors: TrieTensors, level: int, beams: Beams, child: Tensor, log_probs: Tensor, width: int
) -> Beams:
    """Keep each user's best children.

    Args:
        tensors: the trie.
        level: level of the children.
        beams: the prefixes they extend.
        child: child ids, (U, B, M), distinct per user where their score is finite.
        log_probs: (U, B, M), −inf for what doesn't exist or isn't allowed.
        width: beams to keep.

    Returns:
        At most `width` beams, ordered by (score descending, SID ascending).
    """
    users, n_beams, n_child = child.shape
    end_code = tensors.trie.end_code
    if end_code is not None and level > 0:
        # After an end mark the only child is another one: it is padding, not a choice.
        ended = (beams.codes == end_code).unsqueeze(-1) & torch.isfinite(log_probs)
        log_probs = log_probs.masked_fill(ended, 0.0)
    scores = (beams.scores.unsqueeze(-1) + log_probs).flatten(1)  # (U, B*M)
    flat = child.flatten(1)
    keep = min(width + 1, scores.shape[1])
    top = rank_key(scores, flat).topk(keep, dim=1).indices
    best = scores.gather(1, top)
    pruned = beams.pruned
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
        tensors.tokens[level][nodes],
        parents,
        best,
        torch.cat([history, own.unsqueeze(-1)], dim=-1),
        pruned,
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
    if torch.isnan(scores).any():
        raise ValueError("the model gave NaN scores; check its weights and dtype")
    empty = torch.isinf(scores[:, 0])
    if empty.any():
        raise ValueError(
            f"prompt {prompt_rows[int(empty.nonzero()[0])]} has no allowed item left: its filters "
            "exclude the whole catalogue view"
        )
    live = torch.isfinite(scores)
    items = torch.where(live, tensors.items[beams.nodes[:, :k]], -1)
    # A list shorter than k is complete only if nothing was pruned; otherwise nothing pruned may
    # reach its last item (a pruned prefix of equal score could lead to an item that wins the tie).
    last = torch.where(live.all(1) & torch.tensor(scores.shape[1] == k), scores[:, -1], -torch.inf)
    certified = (beams.pruned < last) | (beams.pruned == -torch.inf)
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
        pruned=beams.pruned.cpu().numpy(),
    )


def length_batches(
    prompts: Sequence[Sequence[int]], n_levels: int, context: int | None, batch_size: int
) -> list[np.ndarray]:
    """Row numbers of the users decoded together, after a check of all prompts.

    Longest first, so that a lack of memory shows at once.

    Raises:
        ValueError: a prompt is empty, or too long for the context (None: no limit known).
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
            f"context holds {context}; lower max_history"
        )
    order = np.argsort(-lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def search_in_batches(
    search_batch: Callable[[np.ndarray, list[Tensor] | None], BeamResult],
    batches: list[np.ndarray],
    tensors: TrieTensors,
    k: int,
    beam_width: int,
    seen: Sequence[np.ndarray] | None,
    progress: Callable[[int], object] | None,
) -> BeamResult:
    """Run an engine's search batch by batch and put the lists back into the prompts' order.

    Args:
        search_batch: searches the given rows under the given per-level dead keys.
        batches: from `length_batches`.
        tensors: the trie and its view.
        k: items per list; at most `beam_width`.
        beam_width: prefixes kept per level.
        seen: catalogue rows that each user must not get, one entry per prompt, or None.
        progress: called with the number of users of each finished batch.
    """
    if not 1 <= k <= beam_width:
        raise ValueError(f"k={k} must lie between 1 and beam_width={beam_width}")
    n, levels = sum(map(len, batches)), tensors.trie.n_levels
    if seen is not None and len(seen) != n:
        raise ValueError(f"seen has {len(seen)} entries for {n} prompts")
    items = np.full((n, k), -1, dtype=np.int64)
    scores = np.full((n, k), -np.inf, dtype=np.float32)
    level_log_probs = np.full((n, k, levels), -np.inf, dtype=np.float32)
    certified = np.zeros(n, dtype=bool)
    pruned = np.full(n, -np.inf, dtype=np.float32)
    for rows in batches:
        dead = tensors.exclusions(None if seen is None else [np.asarray(seen[r]) for r in rows])
        result = search_batch(rows, dead)
        items[rows], scores[rows] = result.items, result.scores
        level_log_probs[rows], certified[rows] = result.level_log_probs, result.certified
        pruned[rows] = result.pruned
        if progress is not None:
            progress(len(rows))
    return BeamResult(items, scores, level_log_probs, certified, pruned=pruned)
