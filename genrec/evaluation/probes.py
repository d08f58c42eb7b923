"""What the doctor measures: the model on sampled rows, by search, teacher forcing and exhaustion.

Rows are a seeded sample of a split. What the figures mean `genrec.evaluation.doctor` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor
from transformers import DynamicCache

from genrec.columns import HISTORY, ROW_ID, SEEN, TARGET
from genrec.decoding.beam import normalize
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.metrics import hits, target_rank
from genrec.modeling import encode_prompts
from genrec.recommend import Recommender

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

K = 10  # list length of every measurement, the field's usual one

# Two ways to score an item may differ by this in fp32, as two engines may.
SCORE_TOLERANCE = 1e-3
SCORED_ITEMS = 100_000  # larger catalogues are sampled; 12k items take a core .5 s a row
SAMPLED_ITEMS = 2_000
WIDER = 10  # … and searched with a beam so many times as wide
_LOGIT_CELLS = 1 << 26  # logits of one block of prefixes: 256 MiB in fp32


@dataclass(frozen=True)
class Sample:
    """Rows under examination.

    Attributes:
        row_ids: of the split rows.
        histories: catalogue rows, oldest first.
        targets: catalogue row that came next. ``# (n_rows,)``
        seen: what the filter leaves out of each list; None without a filter.
        prompts: as serving renders them.
        ids: their token ids.
    """

    row_ids: list[str]
    histories: list[list[int]]
    targets: IntArray
    seen: list[IntArray] | None
    prompts: list[str]
    ids: list[list[int]]


@dataclass(frozen=True)
class LevelScores:
    """Targets scored under the true prefix, next to a guess by popularity.

    All ``# (n_rows, n_levels)``; probabilities of codes are among the codes that the trie allows.

    Attributes:
        log_probs: of the target's code.
        correct: whether it is the likeliest allowed code.
        legal_mass: probability, of the whole vocabulary, on the allowed codes.
        level_mass: the same on all codes of the level.
        choices: number of allowed codes.
        prior_log_probs: of the target's code by training frequency (add-one) after that prefix.
        prior_correct: whether it is the most frequent one.
    """

    log_probs: FloatArray
    correct: FloatArray
    legal_mass: FloatArray
    level_mass: FloatArray
    choices: FloatArray
    prior_log_probs: FloatArray
    prior_correct: FloatArray


@dataclass(frozen=True)
class Fit:
    """How well rows are predicted, by the model and by popularity; all per row.

    Attributes:
        levels: log-probability of the target's codes. ``# (n_rows, n_levels)``
        prior: log-probability of the target by popularity. ``# (n_rows,)``
        hits: whether the target is in the model's top 10.
        popular_hits: whether it is among the 10 most popular items that the filter leaves.
    """

    levels: FloatArray
    prior: FloatArray
    hits: FloatArray
    popular_hits: FloatArray


@dataclass(frozen=True)
class SearchGap:
    """Beam search held against the scores of the whole catalogue, on the same rows.

    Attributes:
        beam_width: of the search.
        recall: share of the exhaustive top 10 that the beam has in its own. ``# (n_rows,)``
        equal: whether the two lists are equal up to ties.
        beam_rank: rank of the target in the beam, 0 where it is not there.
        exhaustive_rank: rank of the target in the catalogue, 0 where the filter removes it.
        difference: largest |Δ log-probability| of one item, searched and scored.
        scored: items scored per row; fewer than the catalogue if it is large.
        n_items: size of the catalogue.
    """

    beam_width: int
    recall: FloatArray
    equal: FloatArray
    beam_rank: IntArray
    exhaustive_rank: IntArray
    difference: float
    scored: int
    n_items: int


def draw(
    recommender: Recommender, rows: pl.DataFrame, n_rows: int, seed: int, filter_seen: bool
) -> Sample:
    """Seeded sample of split rows with their serving prompts.

    Training rows have no column of what was seen before: their history stands for it.

    Raises:
        ValueError: there are no rows.
    """
    if rows.is_empty():
        raise ValueError("the split has no rows to examine")
    picked = rows[np.random.default_rng(seed).permutation(len(rows))[:n_rows]]
    histories = picked[HISTORY].to_list()
    seen = picked[SEEN].to_list() if SEEN in picked.columns else histories
    prompts = recommender.prompts(histories)
    return Sample(
        picked[ROW_ID].to_list(),
        histories,
        picked[TARGET].to_numpy().astype(np.int64),
        [np.asarray(s, dtype=np.int64) for s in seen] if filter_seen else None,
        prompts,
        encode_prompts(recommender.tokenizer, prompts),
    )


def first_rows(sample: Sample, n: int) -> Sample:
    """The first rows of a sample."""
    seen = None if sample.seen is None else sample.seen[:n]
    return Sample(
        sample.row_ids[:n], sample.histories[:n], sample.targets[:n], seen, sample.prompts[:n],
        sample.ids[:n],
    )  # fmt: skip


def torch_engine(recommender: Recommender) -> TorchEngine:
    """The run's engine, which must score given items and show its model.

    Raises:
        ValueError: it is another one.
    """
    if not isinstance(recommender.engine, TorchEngine):
        raise ValueError(
            f"the model is examined by teacher forcing, which {type(recommender.engine).__name__} "
            "doesn't offer; load the run with engine='torch'"
        )
    return recommender.engine


@torch.inference_mode()
def teacher_forced(
    engine: TorchEngine,
    sample: Sample,
    train_count: npt.NDArray[np.integer],
    progress: Callable[[int], object] | None = None,
) -> LevelScores:
    """Scores of the targets' codes by a plain forward pass over prompt + target.

    Nothing of the engine's search takes part, so that the two can disagree.

    Args:
        engine: the run's.
        sample: rows.
        train_count: training interactions of each catalogue row, for the guess by popularity.
        progress: called with 1 after each row.
    """
    trie, n_levels = engine.trie, engine.trie.n_levels
    tokens = [ids.cpu().numpy() for ids in engine.sid_ids]
    codes = trie.codes()[sample.targets]  # (n_rows, n_levels)
    counts = _node_counts(trie, train_count)
    out = np.zeros((7, len(sample.targets), n_levels))
    for row, (prompt, target) in enumerate(zip(sample.ids, sample.targets, strict=True)):
        forced = [int(tokens[level][codes[row, level]]) for level in range(n_levels - 1)]
        ids = torch.tensor([[*prompt, *forced]], device=engine.device)
        logits = engine.model(input_ids=ids, use_cache=False, logits_to_keep=n_levels).logits[0]
        leaf, parent = trie.leaf_of_item[target], 0
        for level in range(n_levels):
            start, stop = trie.children[level][parent : parent + 2]
            parent = int(trie.node_of_leaf(level, leaf))
            at = parent - start
            columns = normalize(logits[level], engine.sid_ids[level], "full").cpu().numpy()
            allowed = columns[trie.tokens[level][start:stop]].astype(np.float64)
            mass = np.logaddexp.reduce(allowed)
            prior = counts[level][start:stop]
            out[:, row, level] = (
                allowed[at] - mass, allowed.argmax() == at,
                np.exp(mass), np.exp(np.logaddexp.reduce(columns.astype(np.float64))),
                stop - start, np.log(prior[at] / prior.sum()), prior.argmax() == at,
            )  # fmt: skip
        if progress is not None:
            progress(1)
    return LevelScores(*out)


def _node_counts(trie: SidTrie, train_count: npt.NDArray[np.integer]) -> list[FloatArray]:
    """Training interactions below each node of each level, plus one."""
    before = np.concatenate([[0.0], np.cumsum(train_count[trie.items])])
    return [before[starts[1:]] - before[starts[:-1]] + 1 for starts in trie.leaves]


@torch.inference_mode()
def exhaustive_scores(engine: TorchEngine, prompt: Sequence[int]) -> npt.NDArray[np.float32]:
    """Score of every catalogue row after one prompt, by teacher forcing over distinct prefixes.

    The prompt is run once. A block of prefixes is then one forward pass over the part of the trie
    above them, in which every node sees the prompt, its ancestors and itself: an item costs as much
    as the nodes it doesn't share.

    Args:
        engine: the run's.
        prompt: token ids.

    Returns:
        Summed log-probability under the engine's normaliser. ``# (n_items,)``
    """
    trie, model = engine.trie, engine.model
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([list(prompt)], device=engine.device)
    logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    scores = [np.empty(len(tokens), dtype=np.float32) for tokens in trie.tokens]
    scores[0][:] = _children(engine, 0, 0, 1, logits[0])
    deepest = trie.n_levels - 2  # the last level is read off, never put in
    n_prefixes = len(trie.tokens[deepest]) if deepest >= 0 else 0
    block = min(512, max(32, _LOGIT_CELLS // logits.shape[-1]))
    for first in range(0, n_prefixes, block):
        last = min(first + block, n_prefixes)
        spans, tree_ids, position, sees = _subtree(engine, deepest, first, last)
        past = torch.ones(len(sees), len(prompt), dtype=torch.bool, device=engine.device)
        visible = torch.cat([past, sees], dim=1)
        mask = torch.zeros(visible.shape, dtype=model.dtype, device=engine.device)
        mask = mask.masked_fill(~visible, torch.finfo(model.dtype).min)
        logits = model(
            input_ids=tree_ids[None],
            position_ids=position[None] + len(prompt),
            attention_mask=mask[None, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[0]  # (nodes, vocabulary)
        row = 0
        for level, (a, b) in enumerate(spans):
            children = trie.children[level + 1][a : b + 1]
            own = _children(engine, level + 1, a, b, logits[row : row + b - a])
            above = np.repeat(scores[level][a:b], np.diff(children))
            scores[level + 1][children[0] : children[-1]] = above + own
            row += b - a
        cache.crop(-len(tree_ids))
    out = np.empty(trie.n_items, dtype=np.float32)
    out[trie.items] = scores[-1]
    return out


def _subtree(
    engine: TorchEngine, deepest: int, first: int, last: int
) -> tuple[list[tuple[int, int]], Tensor, Tensor, Tensor]:
    """The trie above nodes [first, last) of level `deepest`, as one sequence.

    Returns:
        Per level the range of nodes; token ids, depth and visibility of all nodes, level by level.
        ``# (nodes,), (nodes,), (nodes, nodes)``
    """
    trie = engine.trie
    ends = trie.leaves[deepest][[first, last]] - np.array([0, 1])  # first and last leaf
    spans = [
        (int(a), int(b) + 1)
        for a, b in (trie.node_of_leaf(level, ends) for level in range(deepest + 1))
    ]
    starts = np.cumsum([0, *(b - a for a, b in spans)])
    sees = torch.zeros(starts[-1], starts[-1], dtype=torch.bool)
    for level, (a, b) in enumerate(spans):
        for above in range(level + 1):
            ancestor = trie.node_of_leaf(above, trie.leaves[level][a:b]) - spans[above][0]
            rows = torch.arange(starts[level], starts[level + 1])
            sees[rows, torch.from_numpy(ancestor + starts[above])] = True
    ids = [
        engine.sid_ids[level][torch.from_numpy(trie.tokens[level][a:b]).long().to(engine.device)]
        for level, (a, b) in enumerate(spans)
    ]
    depth = np.repeat(np.arange(deepest + 1), np.diff(starts))
    return spans, torch.cat(ids), torch.from_numpy(depth).to(engine.device), sees.to(engine.device)


def _children(
    engine: TorchEngine, level: int, first: int, last: int, logits: Tensor
) -> npt.NDArray[np.float32]:
    """Log-probabilities of all children (of `level`) of nodes [first, last), from their logits."""
    trie = engine.trie
    ends = trie.children[level][first : last + 1]
    counts = np.diff(ends)
    columns = normalize(logits, engine.sid_ids[level], engine.normalizer).cpu().numpy()
    parent = np.repeat(np.arange(last - first), counts)
    own = columns[parent, trie.tokens[level][ends[0] : ends[-1]]]
    if engine.normalizer == "trie":
        own -= np.repeat(np.logaddexp.reduceat(own, ends[:-1] - ends[0]), counts)
    if level and trie.end_code is not None:  # padding behind an end mark costs nothing
        own[np.repeat(trie.tokens[level - 1][first:last] == trie.end_code, counts)] = 0
    return own


def sampled_scores(
    engine: TorchEngine, prompt: Sequence[int], items: IntArray
) -> npt.NDArray[np.float32]:
    """As `exhaustive_scores`, for some items; the others are −inf. ``items # (n,)``."""
    out = np.full(engine.trie.n_items, -np.inf, dtype=np.float32)
    for block in np.array_split(items, -(-len(items) // 256)):
        out[block] = engine.score([prompt], block[None])[0].sum(-1)
    return out


def search_gap(
    engine: TorchEngine,
    sample: Sample,
    beam_width: int,
    seed: int,
    progress: Callable[[int], object] | None = None,
    limit: int = SCORED_ITEMS,
) -> SearchGap:
    """Search each row with the beam, and rank the whole catalogue by its scores.

    Above `limit` items, a seeded sample of the catalogue is scored together with the target, the
    beam's list and the list of a `WIDER` times wider beam.
    """
    trie = engine.trie
    found = engine.search(sample.ids, beam_width, beam_width, sample.seen)
    k, rng = min(K, trie.n_items), np.random.default_rng(seed)
    some = np.arange(trie.n_items)
    wider = found.items
    if trie.n_items > limit:
        some = np.sort(rng.choice(trie.n_items, min(SAMPLED_ITEMS, limit), replace=False))
        wider = engine.search(sample.ids, k, WIDER * beam_width, sample.seen).items
    recall, equal, rank, difference, scored = [], [], [], 0.0, len(some)
    for row, prompt in enumerate(sample.ids):
        beam = found.items[row][found.items[row] >= 0]
        if trie.n_items > limit:
            also = np.concatenate([beam, wider[row][wider[row] >= 0], sample.targets[[row]]])
            scores = sampled_scores(engine, prompt, np.union1d(some, also))
        else:
            scores = exhaustive_scores(engine, prompt)
        gaps = np.abs(scores[beam] - found.scores[row][: len(beam)])
        difference = max(difference, float(gaps.max(initial=0.0)))
        if sample.seen is not None:
            scores[sample.seen[row]] = -np.inf
        order = np.lexsort((trie.leaf_of_item, -scores))
        best = order[:k][np.isfinite(scores[order[:k]])]
        # An item as good as the last of the list, up to rounding, is no loss.
        kept = (scores[beam[:k]] >= scores[best[-1]] - SCORE_TOLERANCE / 10).sum()
        recall.append(min(1.0, float(kept / len(best))))
        equal.append(float(kept >= len(best)))
        target = sample.targets[row]
        finite = np.isfinite(scores[target])
        rank.append(int(np.flatnonzero(order == target)[0]) + 1 if finite else 0)
        if progress is not None:
            progress(1)
    return SearchGap(
        beam_width, np.array(recall), np.array(equal), target_rank(found.items, sample.targets),
        np.array(rank), difference, scored, trie.n_items,
    )  # fmt: skip


def measure_fit(
    sample: Sample,
    scores: LevelScores,
    items: IntArray,
    train_count: npt.NDArray[np.integer],
) -> Fit:
    """Fit of the model to a sample, from its teacher-forced scores and its lists (n_rows, K)."""
    popular = np.argsort(-train_count, kind="stable")
    guess = np.full((len(sample.targets), K), -1)
    for row in range(len(guess)):
        seen = () if sample.seen is None else sample.seen[row]
        left = popular[: K + len(seen)]
        left = left[~np.isin(left, seen)][:K]
        guess[row, : len(left)] = left
    return Fit(
        scores.log_probs,
        scores.prior_log_probs.sum(1),
        hits(target_rank(items, sample.targets), K),
        hits(target_rank(guess, sample.targets), K),
    )
