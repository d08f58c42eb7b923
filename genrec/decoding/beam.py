"""The one constrained beam search, shared by every engine.

An engine only says how likely each child of each live beam is; selection, ties, filters, the
account of what was pruned and the final list are made here, so that engines can differ in speed
alone. A sampler (`genrec.decoding.sampling`) takes the place of selection and of nothing else.

Shapes: U users, B beams, R rows (some of the U * B beams), M children per beam, L levels. Longer
than other modules: a step, its ties and what it cuts off are one account, kept in one place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genrec.decoding.sampling import Draws, Sample, gather_samples
from genrec.decoding.trie import SidTrie
from genrec.decoding.trie_tensors import LevelFilter, TrieTensors, look_up
from genrec.normalizers import NORMALIZERS as NORMALIZERS
from genrec.normalizers import Normalizer as Normalizer

_LOW_WORD = (1 << 32) - 1


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
        """One empty prefix per user; of a sampler with replacement one per draw."""
        shape = (users, 1 if draws is None else draws.log_probs.shape[1])
        zero = torch.zeros(shape, dtype=torch.int64, device=device)
        scores = torch.zeros(shape, device=device)
        pruned = torch.full((users,), -torch.inf, device=device)
        return cls(zero, zero, zero, scores, torch.zeros(*shape, 0, device=device), pruned, draws)


class Columns(Protocol):
    """`normalize`'s columns of a level that are computed where they are asked for.

    Attributes:
        shape: (U, B, codebook_size); B is 1 where all beams go on from the prompt.
    """

    @property
    def shape(self) -> torch.Size: ...  # noqa: D102

    def pick(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Entries of codes (R, M) in rows (R,) of the flattened (U, B), (R, M) float32."""
        ...


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
    beyond = torch.zeros_like(exists, dtype=columns.dtype).masked_fill(~exists, -torch.inf)
    return _over_children(columns.gather(-1, codes), beyond, normalizer)


def _over_children(picked: Tensor, beyond: Tensor, normalizer: Normalizer) -> Tensor:
    picked = picked + beyond
    return picked.log_softmax(-1) if normalizer == "trie" else picked


def _pick(columns: Tensor | Columns, rows: Tensor, n_beams: int, codes: Tensor) -> Tensor:
    """Columns of codes (R, M) behind beams (R,), numbers in the flattened (U, n_beams)."""
    _, states, n_codes = columns.shape
    rows = rows // (n_beams // states)  # one state for all beams, or one for each
    if not isinstance(columns, Tensor):
        return columns.pick(rows, codes)
    if columns.numel() <= torch.iinfo(codes.dtype).max:  # narrow arithmetic is much the faster
        rows = rows.to(codes.dtype)
    return look_up(columns.flatten(), rows.unsqueeze(1) * n_codes + codes)


def code_log_probs(
    tensors: TrieTensors,
    level: int,
    parents: Tensor,
    nodes: Tensor,
    columns: Tensor | Columns,
    normalizer: Normalizer,
) -> Tensor:
    """Log-probability of one given child of each parent, as a search scores it, (U, B).

    Args:
        tensors: the trie.
        level: level of the children.
        parents: nodes above it, (U, B); zeros at level 0.
        nodes: the children, (U, B).
        columns: `normalize`'s, (U, B or 1, codebook_size).
        normalizer: as in `normalize`.
    """
    n_beams = nodes.shape[1]
    above, own = parents.flatten(), nodes.flatten()
    if normalizer != "trie":  # the siblings don't matter
        rows = torch.arange(len(own), device=own.device)
        found = _pick(columns, rows, n_beams, tensors.codes(level, own).unsqueeze(1))
        return found.view(nodes.shape)
    out = torch.empty(len(own), device=own.device)
    for rows, length in tensors.blocks(level, above, torch.ones_like(own, dtype=torch.bool)):
        child, codes, beyond = tensors.children(level, above[rows], length)
        log_probs = _over_children(_pick(columns, rows, n_beams, codes), beyond, normalizer)
        out[rows] = log_probs.gather(1, own[rows].unsqueeze(1) - child[:, :1]).squeeze(1)
    return out.view(nodes.shape)


def step(
    tensors: TrieTensors,
    level: int,
    beams: Beams,
    columns: Tensor | Columns,
    normalizer: Normalizer,
    users: LevelFilter | None,
    width: int,
) -> Beams:
    """One level of the search: children, their scores, filters, selection.

    Where nodes have children in unequal numbers, or there are very many, beams are expanded block
    by block (see `TrieTensors.blocks`), and of each only the best children go on to `advance`: more
    than can be kept of all come from none. A user's beams never depend on who else is in the batch.

    Args:
        tensors: the trie and its view.
        level: level of the children.
        beams: the prefixes to extend; at level 0 the root.
        columns: `normalize`'s log-probabilities of the level's codes, (U, B or 1, codebook_size).
        normalizer: as in `normalize`.
        users: the users' filters at this level, or None.
        width: beams to keep.
    """
    shape, draws = beams.nodes.shape, beams.draws
    nodes = (beams.nodes if level else torch.zeros_like(beams.nodes)).flatten()
    scores = beams.scores.flatten()

    def children(rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        child, codes, beyond = tensors.children(level, nodes[rows], length)
        log_probs = _over_children(_pick(columns, rows, shape[1], codes), beyond, normalizer)
        closed = tensors.closed(level, child, users, rows // shape[1])
        return child, log_probs if closed is None else log_probs + closed

    blocks = tensors.blocks(level, nodes, scores != -torch.inf)
    if len(blocks) == 1 and len(blocks[0][0]) == len(nodes):
        child, log_probs = children(*blocks[0])
        return advance(
            tensors, level, beams, child.view(*shape, -1), log_probs.view(*shape, -1), width
        )
    child, log_probs, *drawn = (
        values.view(*shape, -1)
        for values in _best_children(children, blocks, level, scores, draws, width)
    )
    return advance(tensors, level, beams, child, log_probs, width, drawn)


def _best_children(
    children: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    blocks: list[tuple[Tensor, int]],
    level: int,
    scores: Tensor,
    draws: Draws | None,
    width: int,
) -> list[Tensor]:
    """Of each beam the children that may live on: no more than `width`, and the best cut off.

    Args:
        children: child ids and log-probabilities, (R, M) each, of a block.
        blocks: rows and lengths, from `TrieTensors.blocks`.
        level: level of the children.
        scores: of the beams, (U * B,).
        draws: of a sampler, or None.
        width: beams to keep.

    Returns:
        Child ids and log-probabilities, and what `Draws.perturbed` gives of them where a sampler
        draws, (U * B, K) each; −inf where there are fewer.
    """
    keep = width + 1 if draws is None else draws.kept(width)
    keep = min(keep, max((length for _, length in blocks), default=1))
    types = [torch.float32] if draws is None else [torch.float32, torch.float64, torch.float64]
    best = [torch.zeros(len(scores), keep, dtype=torch.int64, device=scores.device)]
    best += [torch.full_like(best[0], -torch.inf, dtype=dtype) for dtype in types]
    for rows, length in blocks:
        child, log_probs = children(rows, length)
        found = [child, log_probs]
        if draws is not None:
            found += draws.perturbed(level, rows, child, log_probs)
        if length > keep:
            if draws is None:
                top = best_in_rows(scores[rows].unsqueeze(1) + log_probs, child, keep)
            else:
                top = found[-1].topk(keep, dim=1).indices
            found = [values.gather(1, top) for values in found]
        for whole, part in zip(best, found, strict=True):
            whole[rows, : part.shape[1]] = part.to(whole.dtype)
    return best


def best_in_rows(scores: Tensor, nodes: Tensor, keep: int) -> Tensor:
    """Places of each row's best by (score descending, SID ascending), in no order, (R, keep).

    Args:
        scores: (R, M).
        nodes: ids, (R, M).
        keep: how many, at most M.
    """
    if keep == scores.shape[1] or scores.device.type != "cpu":  # `any` would wait for a GPU
        return rank_key(scores, nodes).topk(keep, dim=1).indices
    values, top = scores.topk(keep + 1, dim=1)
    tied = (values[:, -2] == values[:, -1]) & (values[:, -1] != -torch.inf)
    if not tied.any():  # almost always, and a float's top k costs half of the exact key's
        return top[:, :keep]
    return rank_key(scores, nodes).topk(keep, dim=1).indices


def advance(
    tensors: TrieTensors,
    level: int,
    beams: Beams,
    child: Tensor,
    log_probs: Tensor,
    width: int,
    drawn: Sequence[Tensor] = (),
) -> Beams:
    """Keep each user's best children, or those that the beams' sampler draws.

    Args:
        tensors: the trie.
        level: level of the children.
        beams: the prefixes they extend.
        child: child ids, (U, B, M), distinct per user where their score is finite.
        log_probs: (U, B, M), −inf for what doesn't exist or isn't allowed.
        width: beams to keep.
        drawn: of a sampler's beams, where these are not all children: what `Draws.perturbed` gave
            of all of them, (U, B, M) each.

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
        top = best_in_rows(scores, flat, keep)
        key = rank_key(scores.gather(1, top), flat.gather(1, top))
        top = top.gather(1, key.argsort(dim=1, descending=True))
        best = scores.gather(1, top)
    else:
        if not drawn:
            rows = torch.arange(users * n_beams, device=child.device)
            made = beams.draws.perturbed(level, rows, child.flatten(0, 1), log_probs.flatten(0, 1))
            drawn = [values.view(child.shape) for values in made]
        prefixes, perturbed = drawn
        top, draws = beams.draws.choose(prefixes, perturbed, width)
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
    nodes = flat.gather(1, top).long()
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
    # What a dead prefix once scored is nobody's.
    level_log_probs = beams.level_log_probs[:, :k].masked_fill(~live.unsqueeze(-1), -torch.inf)
    missing = k - scores.shape[1]
    return BeamResult(
        np.pad(items.cpu().numpy(), ((0, 0), (0, missing)), constant_values=-1),
        np.pad(scores.cpu().numpy(), ((0, 0), (0, missing)), constant_values=-np.inf),
        np.pad(
            level_log_probs.cpu().numpy(),
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
