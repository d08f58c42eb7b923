"""Is this run healthy? What goes wrong in generative recommenders, measured, with a verdict each.

Every check says what was found, what it means and what to do. The rows are a seeded sample of the
validation split (and of training rows, to compare); the test split's targets are never read.

Longer than most files, so that a verdict can be judged beside its measurement and its threshold:
thresholds; results; what is on disk; what the model does; verdicts on it; lists; prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor
from transformers import DynamicCache

from genrec.artifacts import (
    FOLDERS,
    IN_PROGRESS,
    Manifest,
    load_manifest,
    package_versions,
    read_json,
    require,
    rerun_command,
    sha256_file,
    stage_folder,
)
from genrec.columns import (
    CERTIFIED,
    COMPLETION,
    HISTORY,
    ITEM_INDEX,
    PROMPT,
    PROMPT_SHA256,
    RANK,
    ROW_ID,
    SEEN,
    TARGET,
    TASK,
    TEMPLATE,
)
from genrec.decoding.beam import normalize
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.evaluation.significance import bootstrap_means, interval
from genrec.metrics import coverage_at_k, hits, target_rank
from genrec.modeling import ABOUT, encode_prompts, encode_rows, sid_token_ids
from genrec.prompts import PromptRenderer
from genrec.quantizers.quality import collision_rate, level_usage
from genrec.recommend import MODEL_STAGES, Recommender
from genrec.semantic_ids import SemanticIds
from genrec.tasks.sequential import FAMILY, history_prompt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Status = Literal["ok", "look", "bad", "not run"]
Verdict = tuple[Status, str, str]  # status, meaning, advice

K = 10  # list length of every measurement, the field's usual one
SAMPLES = 1000  # of each bootstrap interval

# Search. Of the exhaustive top 10, beams of 10, 20 and 50 found .58, .88 and .996 on 12k items
# (.54, .86 and .99 on 1.7k): below .97 a wider beam pays, below .8 it is far too narrow. Two ways
# to score an item may differ by 1e-3 in fp32, as two engines may.
RECALL_LOOK, RECALL_BAD = 0.97, 0.8
SCORE_TOLERANCE = 1e-3
SCORED_ITEMS = 100_000  # larger ones are sampled; 12k items take a core .5 s a row
SAMPLED_ITEMS = 2_000
WIDER = 10  # … and searched with a beam so many times as wide
FILTERED_LOOK = 0.05  # targets that the filter makes impossible: repeats matter in this data
_LOGIT_CELLS = 1 << 26  # logits of one block of prefixes: 256 MiB in fp32

# Levels. With fewer rows that had a choice, a level's figures are chance.
MIN_CHOICES = 20
# Legality. Trained models put .91 to .995 on allowed codes (12k and 1.7k items, 3 levels); GRPO on
# full-vocabulary log-probabilities fell to .24-.40 on a toy, untrained models put next to nothing.
MASS_LOOK, MASS_BAD = 0.8, 0.5
# Fit. Of what a model gains over popularity on training rows, all (1.7k items) and .41 to .51 (12k
# items, by the draw) carried over to validation rows in two trained models. The latter's last two
# levels gain next to nothing on new rows, which is worth a look.
CARRIED_LOOK = 0.6

# Validation curve. NDCG@10 of 500 to 1,500 rows moves by some percent of itself by chance.
RISING = 0.02
LONG_PAST = 0.5  # the best measurement lies in the first half of the steps …
FALLEN = 0.9  # … and the last is worse than this share of it

# Diversity. Lists of popular items alone put nearly all places on 10 items; two trained models put
# .10 and .11 (6 and 2 times these items' share of training). A small catalogue is concentrated by
# nature, hence the ratio.
DISTINCT_LOOK, DISTINCT_BAD = 0.5, 0.1  # distinct lists / distinct prompts
CONCENTRATION_LOOK, CONCENTRATION_BAD = 0.2, 0.5  # share of all places that 10 items take …
CONCENTRATION_RATIO = 3.0  # … if that is also so many times their share of the training part

# Semantic ids. Uniform use would give a first-level code 1 / codebook_size of the items.
USED_LOOK = 0.5  # of the first level's codes
LARGEST_LOOK, LARGEST_BAD = 0.05, 0.3
LARGEST_RATIO = 5.0  # … and so many times the uniform share
# Lists. Certificates are a lower bound: at beam 50 and 12k items .47 of the lists carry one while
# .96 are exact, so a low share alone is only worth a look.
CERTIFIED_LOOK = 0.2
SHORT_BAD = 0.05

# What to mend first: a cause stands before what it causes. Of things to look at, those that move
# quality stand first.
CAUSES = (
    "manifests", "semantic ids", "model", "prompts", "legality", "levels", "fit",
    "validation curve", "search", "lists", "diversity",
)  # fmt: skip
WORTH = (
    "fit", "validation curve", "levels", "legality", "search", "diversity", "prompts",
    "semantic ids", "lists", "manifests", "model",
)  # fmt: skip
_SEVERITY: dict[Status, int] = {"bad": 0, "look": 1, "not run": 2, "ok": 3}


@dataclass(frozen=True)
class Check:
    """One verdict.

    Attributes:
        name: one of `CAUSES`.
        value: what was found, in a line.
        status: ok, look (worth a look), bad, or not run (with the reason as `value`).
        meaning: what it says about the run.
        advice: what to do; empty where nothing is to be done.
        details: the numbers behind it.
    """

    name: str
    value: str
    status: Status
    meaning: str = ""
    advice: str = ""
    details: dict[str, Any] = field(default_factory=dict)


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


def next_step(checks: Sequence[Check]) -> str:
    """The single most useful thing to do now."""
    for status, order in (("bad", CAUSES), ("look", WORTH), ("not run", CAUSES)):
        ranked = sorted(
            (c for c in checks if c.status == status and c.advice),
            key=lambda c: order.index(c.name),
        )
        if ranked:
            return f"{ranked[0].name}: {ranked[0].advice}"
    return "nothing to mend"


def worst_first(checks: Sequence[Check]) -> list[Check]:
    """Bad, look, not run, ok; within one status as they came."""
    return sorted(checks, key=lambda c: _SEVERITY[c.status])


def not_run(name: str, reason: str, advice: str = "") -> Check:
    """A check that could not be made."""
    return Check(name, reason, "not run", "nothing is known about it", advice)


# ---------------------------------------------------------------- what is on disk

_FITTING: Verdict = ("ok", "every file is the one its stage wrote, from what lies there", "")


def check_manifests(run_dir: Path | str) -> Check:
    """Whether every finished stage is whole, matches its inputs, and was made by one set of code.

    `genrec.artifacts.require` compares sizes and recorded hashes; here every file is read, too.
    """
    broken: dict[str, str] = {}
    versions: dict[str, dict[str, str]] = {}
    unfinished = [s for s in FOLDERS if (stage_folder(run_dir, s) / IN_PROGRESS).exists()]
    for stage in FOLDERS:
        try:
            if load_manifest(run_dir, stage) is None:
                continue
            manifest = require(run_dir, stage)
        except ValueError as error:
            broken[stage] = str(error)
            continue
        versions[stage] = manifest.versions
        if changed := _changed_files(run_dir, stage, manifest):
            broken[stage] = f"{', '.join(changed)} changed since the stage finished"
    mixed, now = {}, package_versions()
    for package in sorted({name for found in versions.values() for name in found}):
        found = sorted({v[package] for v in versions.values() if package in v})
        # A package that isn't here now can't change what is done from here on.
        if found != [now.get(package, found[0])]:
            mixed[package] = f"{' and '.join(found)} (now {now.get(package, 'absent')})"
    details = {"broken": broken, "unfinished": unfinished, "mixed_versions": mixed}
    stages = len({*versions, *broken})
    value, verdict = f"{stages} finished stages", _FITTING
    if unfinished or mixed:
        value += f"; unfinished: {', '.join(unfinished)}" if unfinished else ""
        value += "".join(f"; {name} {found}" for name, found in mixed.items())
        verdict = (
            "look",
            "stages made by different code (or half made) may not fit together, nor with this one",
            "finish what is unfinished; serve and rerun in the environment of the stages",
        )
    if broken:
        value += f"; broken: {', '.join(broken)}"
        stage = next(stage for stage in FOLDERS if stage in broken)
        meaning = f"what is served was not made from what lies there ({broken[stage]})"
        verdict = ("bad", meaning, f"restore the files, or {rerun_command(run_dir, stage)}")
    return Check("manifests", value, *verdict, details)


def _changed_files(run_dir: Path | str, stage: str, manifest: Manifest) -> list[str]:
    folder = stage_folder(run_dir, stage)
    return [n for n, o in manifest.outputs.items() if sha256_file(folder / n) != o["sha256"]]


def check_semantic_ids(run_dir: Path | str) -> Check:
    """Collisions, used codes, collapse of the first level, and whether models know this map."""
    folder, name = stage_folder(run_dir, "quantize"), "semantic ids"
    if not (folder / "items.parquet").exists():
        return not_run(name, "quantize has not finished", f"genrec quantize --run_dir {run_dir}")
    again = rerun_command(run_dir, "quantize")
    codes = pl.read_parquet(folder / "items.parquet").sort(ITEM_INDEX)["codes"].to_numpy()
    sizes = np.array(read_json(folder / "semantic_ids.json")["codebook_sizes"])
    # Read without SemanticIds, which refuses what is to be measured here.
    known = np.clip(codes, 0, sizes - 1)
    usage, collisions = level_usage(known, sizes.tolist()), collision_rate(codes)
    largest = float(np.bincount(known[:, 0]).max() / len(codes))
    used = " / ".join(f"{u['used']} of {u['size']}" for u in usage)
    value = f"{collisions:.1%} collide; used codes {used}; largest first code holds {largest:.1%}"
    verdict: Verdict = ("ok", "every item has a SID of its own, spread over the codes", "")
    uniform = LARGEST_RATIO / sizes[0]
    if largest > max(LARGEST_LOOK, uniform) or usage[0]["used"] < USED_LOOK * usage[0]["size"]:
        advice = f"a smaller codebook_size, or other vectors, then {again}"
        verdict = ("look", "the first level is used unevenly", advice)
    if largest > max(LARGEST_BAD, uniform):
        advice = f"standardise the vectors or use more restarts (n_init), then {again}"
        verdict = ("bad", "the codebook collapsed: the first level says little", advice)
    try:
        if strangers := _strangers(run_dir, SemanticIds.load(folder)):
            value += f"; not the map of {', '.join(strangers)}"
            advice = f"restore the model's map, or {rerun_command(run_dir, strangers[0])}"
            verdict = ("bad", "the model's tokens stand for other items than the map says", advice)
    except ValueError as error:  # collisions, codes outside their codebook, a changed file
        verdict = ("bad", str(error), f"restore the map, or {again}")
    details = {"collision_rate": collisions, "levels": usage, "largest_first_code": largest}
    return Check(name, value, *verdict, details)


def _strangers(run_dir: Path | str, semantic_ids: SemanticIds) -> list[str]:
    """Model stages that were trained on another map."""
    about = {s: stage_folder(run_dir, s) / "model" / ABOUT for s in MODEL_STAGES}
    return [
        stage
        for stage, path in about.items()
        if path.exists() and not semantic_ids.descends_from(read_json(path)["semantic_ids_sha256"])
    ]


def check_curve(run_dir: Path | str) -> Check:
    """Whether validation was still rising when training ended, or had long stopped."""
    name, curves = "validation curve", {}
    for stage in MODEL_STAGES:
        path = stage_folder(run_dir, stage) / "validation.json"
        if path.exists() and (entries := read_json(path)):
            curves[stage] = [(entry["step"], entry[f"ndcg@{K}"]) for entry in entries]
    if "sft" not in curves:
        return not_run(name, "sft has no validation.json", "train sft with eval_rows above 0")
    steps, values = np.array(curves["sft"], dtype=np.float64).T
    at = int(values.argmax())
    value = f"best NDCG@{K} {values[at]:.4f} at step {steps[at]:.0f} of {steps[-1]:.0f}"
    value += f", last {values[-1]:.4f}" if at < len(values) - 1 else ""
    verdict = _curve_verdict(steps, values, at)
    if "grpo" in curves:
        before, after = curves["grpo"][0][1], max(v for _, v in curves["grpo"])
        value += f"; grpo {before:.4f} → {after:.4f}"
        if verdict[0] == "ok" and after <= before * (1 + RISING):
            advice = "rerun grpo with more max_steps or a higher learning_rate, or serve sft"
            verdict = ("look", "grpo moved validation by no more than chance", advice)
    return Check(name, value, *verdict, {"ndcg": curves})


def _curve_verdict(steps: FloatArray, values: FloatArray, at: int) -> Verdict:
    if values[at] == 0:
        advice = "check prompts, learning_rate and the number of epochs, then rerun sft"
        return "bad", "no validation target was ever in the top 10: nothing was learned", advice
    if len(values) == 1:
        return (
            "look",
            "one measurement says nothing of the course",
            "rerun sft measuring more often",
        )
    if at == len(values) - 1 and values[at] > values[:-1].max() * (1 + RISING):
        meaning = "still rising when training ended: it was cut short"
        return "look", meaning, "rerun sft with more num_train_epochs"
    if steps[at] < LONG_PAST * steps[-1] and values[-1] < FALLEN * values[at]:
        meaning = "the best was long past when training ended (its weights are the ones kept)"
        return "look", meaning, "rerun sft with a lower learning_rate, more dropout or fewer epochs"
    return "ok", "training ended about where validation stopped rising", ""


# ---------------------------------------------------------------- what the model does


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


# ---------------------------------------------------------------- verdicts on it


def check_search(gap: SearchGap, run_dir: Path | str) -> Check:
    """Whether the beam finds what the model ranks highest."""
    ours, best = hits(gap.beam_rank, K), hits(gap.exhaustive_rank, K)
    lost, recall = int(((best > 0) & (ours == 0)).sum()), float(gap.recall.mean())
    filtered = float((gap.exhaustive_rank == 0).mean())
    details = {
        "rows": len(ours), "beam_width": gap.beam_width, f"recall@{K}": recall,
        "equal_lists": float(gap.equal.mean()), f"hr@{K}_beam": float(ours.mean()),
        f"hr@{K}_exhaustive": float(best.mean()), "hits_exhaustive": int(best.sum()),
        "hits_lost": lost, "items_scored": gap.scored, "items": gap.n_items,
        "largest_difference": gap.difference, "filtered_targets": filtered,
        "beam_rank": gap.beam_rank.tolist(), "exhaustive_rank": gap.exhaustive_rank.tolist(),
    }  # fmt: skip
    value = (
        f"beam {gap.beam_width} finds {recall:.1%} of the exhaustive top {K}, "
        f"{gap.equal.mean():.0%} of {len(ours)} lists are equal; HR@{K} {ours.mean():.3f}, "
        f"exhaustive {best.mean():.3f}; {lost} of {best.sum():.0f} hits lost"
    )
    if gap.scored < gap.n_items:
        value += (
            f" (against {gap.scored:,} sampled of {gap.n_items:,} items and the list of a {WIDER} "
            "times wider beam: what is lost is a lower bound)"
        )
    verdict: Verdict = ("ok", "the lists are what the model ranks highest", "")
    wider = f"genrec recommend --run_dir {run_dir} --beam_width {4 * gap.beam_width}"
    if filtered > FILTERED_LOOK:
        value += f"; the filter removes {filtered:.0%} of the targets"
        meaning = "people come back to what they had, and the filter makes that impossible"
        verdict = ("look", meaning, "rerun sft and recommend with --filter_seen false")
    if recall < RECALL_LOOK:
        verdict = ("look", "a wider beam finds better items", wider)
    if recall < RECALL_BAD:
        verdict = ("bad", "the lists are the beam's, not the model's", wider)
    if not gap.difference <= SCORE_TOLERANCE:
        value += f"; scores differ by {gap.difference:.1e}"
        meaning = "search and teacher forcing give one item different scores: a defect"
        verdict = ("bad", meaning, "report it, with doctor.json")
    return Check("search", value, *verdict, details)


def _intervals(names: Sequence[str], means: FloatArray, draws: FloatArray) -> dict[str, Any]:
    """Name -> [mean, low, high] of the columns of `bootstrap_means`."""
    bounds = [interval(m, column) for m, column in zip(means, draws.T, strict=True)]
    return {n: [b.value, b.low, b.high] for n, b in zip(names, bounds, strict=True)}


def check_levels(valid: LevelScores, train: LevelScores, seed: int) -> Check:
    """Whether every level learned more than which codes are frequent after the true prefix.

    Only rows whose prefix leaves a choice count. Gains are in nats, the model's log-probability
    minus that of the training frequencies; their majority code is the constant guess.
    """
    levels: list[dict[str, Any]] = []
    for level in range(valid.log_probs.shape[1]):
        entry = {"valid": _level(valid, level, seed), "train": _level(train, level, seed)}
        if entry["valid"] and entry["train"]:
            levels.append({"level": level + 1, **entry})
    if not levels:
        return not_run("levels", f"fewer than {MIN_CHOICES} rows had a choice", "raise --rows")
    value = "; ".join(
        f"level {e['level']}: {e['valid']['accuracy'][0]:.0%} right, constant guess "
        f"{e['valid']['majority'][0]:.0%}, log p {e['valid']['log_prob'][0]:.2f}, gain "
        f"{e['valid']['gain'][0]:+.2f}"
        for e in levels
    )
    # Learned nothing: surely no likelier on training rows, nor more often right.
    nothing = [
        str(e["level"])
        for e in levels
        if e["train"]["gain"][2] <= 0 and e["train"]["accuracy_gain"][1] <= 0
    ]
    weak = [str(e["level"]) for e in levels if e["valid"]["gain"][1] <= 0]
    verdict: Verdict = ("ok", "every level learned from the history", "")
    if weak:
        meaning = f"on new rows level {', '.join(weak)} is no surer than the code frequencies"
        advice = "try other vectors (embed) or a smaller codebook_size, or more dropout in sft"
        verdict = ("look", meaning, advice)
    if nothing:
        meaning = f"level {', '.join(nothing)} learned nothing, not even on training rows"
        advice = "train sft longer or with a higher learning_rate; check the SID map and token ids"
        verdict = ("bad", meaning, advice)
    return Check("levels", value, *verdict, {"levels": levels})


def _level(scores: LevelScores, level: int, seed: int) -> dict[str, Any]:
    """Means of one level with their intervals; empty if too few rows had a choice."""
    own = scores.choices[:, level] > 1
    if own.sum() < MIN_CHOICES:
        return {}
    parts = (scores.log_probs, scores.prior_log_probs, scores.correct, scores.prior_correct)
    ours, prior, right, majority = (part[own, level] for part in parts)
    values = np.column_stack([ours, right, majority, ours - prior, right - majority])
    names = ("log_prob", "accuracy", "majority", "gain", "accuracy_gain")
    draws = bootstrap_means(values, SAMPLES, seed)
    return {"rows": int(own.sum()), **_intervals(names, values.mean(0), draws)}


def check_legality(scores: LevelScores) -> Check:
    """Whether the model, left alone, would produce what the trie allows."""
    legal, level = scores.legal_mass.mean(0), scores.level_mass.mean(0)
    value = (
        f"probability on allowed codes {' / '.join(f'{m:.3f}' for m in legal)}, on any code of the "
        f"level {' / '.join(f'{m:.3f}' for m in level)}"
    )
    verdict: Verdict = ("ok", "the model speaks in semantic ids by itself", "")
    advice = "check the prompts, then train sft longer; grpo needs normalizer trie"
    if legal.min() < MASS_LOOK:
        verdict = ("look", "the trie has to correct the model often", advice)
    if legal.min() < MASS_BAD:
        meaning = "it doesn't know which codes belong together: undertrained"
        if level[legal.argmin()] < MASS_BAD:
            meaning = "it expects other tokens: undertrained, or the wrong prompt or token ids"
        verdict = ("bad", meaning, advice)
    details = {"legal_mass": legal.tolist(), "level_mass": level.tolist()}
    return Check("legality", value, *verdict, details)


def check_fit(train: Fit, valid: Fit, seed: int) -> Check:
    """Training rows against validation rows, each against a guess by popularity.

    The guess takes out that the rows of one split may be easier: what is compared is the gain.
    """
    tables = {}
    for fit in (train, valid):
        gain, lead = fit.levels.sum(1) - fit.prior, fit.hits - fit.popular_hits
        tables[id(fit)] = np.column_stack([gain, fit.hits, lead, fit.popular_hits, fit.levels])
    ours, theirs = tables[id(train)], tables[id(valid)]
    names = ["gain", f"hr@{K}", f"hr@{K}_lead", f"hr@{K}_popular"]
    names += [f"log_prob_{level + 1}" for level in range(train.levels.shape[1])]
    # Other draws for the other rows: the two samples are not paired.
    draws = bootstrap_means(ours, SAMPLES, seed), bootstrap_means(theirs, SAMPLES, seed + 1)
    details = {
        "train": _intervals(names, ours.mean(0), draws[0]),
        "valid": _intervals(names, theirs.mean(0), draws[1]),
        "gap": _intervals(names, ours.mean(0) - theirs.mean(0), draws[0] - draws[1]),
    }
    value = "; ".join(
        f"{name} rows: {part['gain'][0]:+.2f} nats an item over popularity, HR@{K} "
        f"{part[names[1]][0]:.3f} (popularity {part[names[3]][0]:.3f})"
        for name, part in (("training", details["train"]), ("validation", details["valid"]))
    )
    low, high = details["gap"]["gain"][1:]
    value += f"; gap {details['gap']['gain'][0]:.2f} [{low:.2f}, {high:.2f}]"
    return Check("fit", value, *_fit_verdict(details), details)


def _fit_verdict(found: dict[str, dict[str, Any]]) -> Verdict:
    train, valid = found["train"], found["valid"]
    longer = "rerun sft with more epochs, smaller batches or a higher learning_rate"
    if train["gain"][1] <= 0:
        meaning = "underfitting: even training rows are predicted no better than by popularity"
        return "bad", meaning, longer
    if valid["gain"][2] < 0:
        meaning = "overfitting: on new rows the model is worse than popularity"
        return "bad", meaning, "rerun sft with fewer epochs, more dropout and weight_decay"
    carried = valid["gain"][0] / train["gain"][0]
    if found["gap"]["gain"][1] > 0 and carried < CARRIED_LOOK:
        meaning = (
            f"overfitting: of what was gained {max(0.0, carried):.0%} carries over to new rows"
        )
        return "look", meaning, "rerun sft with more dropout or weight_decay, or a smaller model"
    if train[f"hr@{K}_lead"][1] <= 0:
        meaning = "underfitting: training rows are hardly hit more often than by popularity"
        return "look", meaning, longer
    return "ok", "what was learned carries over to new rows", ""


def check_diversity(
    lists: IntArray, n_prompts: int, train_count: npt.NDArray[np.integer], source: str
) -> Check:
    """Whether lists depend on the history, and how much of the catalogue they show.

    Args:
        lists: catalogue rows, −1 pads. ``# (n_lists, k)``
        n_prompts: distinct prompts behind them.
        train_count: training interactions of each catalogue row.
        source: where the lists come from.
    """
    top = lists[:, :K]
    distinct = min(1.0, len(np.unique(top, axis=0)) / n_prompts)
    shown = np.bincount(top[top >= 0], minlength=len(train_count))
    share, train = (float(np.sort(n)[-K:].sum() / max(1, n.sum())) for n in (shown, train_count))
    coverage = coverage_at_k(top, len(train_count), top.shape[1])
    possible = min(1.0, top.size / len(train_count))
    value = (
        f"{distinct:.0%} distinct lists; coverage@{top.shape[1]} {coverage:.1%} of at most "
        f"{possible:.0%}; {K} items take {share:.1%} of the places ({train:.1%} in training); "
        f"{len(lists):,} {source}"
    )
    crowded = share > CONCENTRATION_RATIO * train
    advice = "train sft longer, and see levels and fit"
    verdict: Verdict = ("ok", "lists follow the history", "")
    if distinct < DISTINCT_LOOK or (crowded and share > CONCENTRATION_LOOK):
        verdict = ("look", "lists hardly depend on the history", advice)
    if distinct < DISTINCT_BAD or (crowded and share > CONCENTRATION_BAD):
        verdict = ("bad", "everybody gets the same: the history is ignored", advice)
    details = {
        "lists": len(lists), "distinct": distinct, "coverage": coverage,
        "possible_coverage": possible, "top_10_share": share, "top_10_share_training": train,
        "source": source,
    }  # fmt: skip
    return Check("diversity", value, *verdict, details)


def check_lists(certified: npt.NDArray[np.bool_], lengths: IntArray, k: int, source: str) -> Check:
    """Share of provably exact lists, and of lists shorter than asked for."""
    short, share = float((lengths < k).mean()), float(certified.mean())
    value = f"{share:.0%} provably exact, {short:.1%} shorter than {k}; {len(lengths):,} {source}"
    verdict: Verdict = ("ok", "lists are full; those without a proof may be exact, too", "")
    if share < CERTIFIED_LOOK:
        meaning = "few lists carry a proof; whether that matters, the search check says"
        verdict = ("look", meaning, "raise recommend's beam_width")
    if short:
        advice = "raise recommend's beam_width or lower k; a tight filter empties lists, too"
        verdict = ("look", "some users don't get a full list", advice)
        if short > SHORT_BAD:
            verdict = ("bad", "many users don't get a full list", advice)
    details = {"certified": share, "short": short, "k": k, "source": source}
    return Check("lists", value, *verdict, details)


def stored_lists(
    run_dir: Path | str, k: int
) -> tuple[IntArray, IntArray, npt.NDArray[np.bool_], int]:
    """Lists of the recommend stage.

    Returns:
        Items ``# (n_rows, K)``, lengths and certificates ``# (n_rows,)``, distinct prompts. Rows
        that were asked for and have no list are empty ones.
    """
    folder = stage_folder(run_dir, "recommend")
    columns = [ROW_ID, RANK, ITEM_INDEX, CERTIFIED, PROMPT_SHA256]
    table = pl.scan_parquet(folder / "recommendations-*.parquet").select(columns).collect()
    place = pl.read_parquet(folder / "rows.parquet").select(ROW_ID).with_row_index("_row")
    table = table.join(place, on=ROW_ID)
    items = np.full((len(place), max(K, k)), -1, dtype=np.int64)
    rows = table["_row"].to_numpy()
    items[rows, table[RANK].to_numpy() - 1] = table[ITEM_INDEX].to_numpy()
    certified = np.zeros(len(place), dtype=bool)
    certified[rows] = table[CERTIFIED].to_numpy()
    return items[:, :K], (items >= 0).sum(1), certified, table[PROMPT_SHA256].n_unique()


def check_prompts(
    run_dir: Path | str, recommender: Recommender | None, valid: Sample | None, train: Sample | None
) -> Check:
    """Whether serving renders what was trained on, and no prompt holds its answer.

    Without a recommender (the model didn't load) only the templates are compared.
    """
    name, folder = "prompts", stage_folder(run_dir, "build_dataset")
    manifest = load_manifest(run_dir, "build_dataset")
    if manifest is None:
        command = f"genrec build_dataset --run_dir {run_dir}"
        return not_run(name, "build_dataset has not finished", command)
    again = f"{rerun_command(run_dir, 'build_dataset')}, then retrain"
    now, then = PromptRenderer(folder / "prompts").sha256(), manifest.metrics.get("prompts_sha256")
    details: dict[str, Any] = {"templates_sha256": {"trained": then, "now": now}}
    if then not in (None, now):
        value = f"templates were {then[:12]} in training, they are {now[:12]} now"
        meaning = "the model is asked in words that it was not trained on"
        return Check(
            name, value, "bad", meaning, f"restore {folder / 'prompts'}, or {again}", details
        )
    if recommender is None or valid is None or train is None:
        return not_run(name, "the templates are unchanged, but the model did not load")
    missing = [n for n in ("train", "valid") if not (folder / f"{n}.parquet").exists()]
    if missing:
        return not_run(name, f"{folder} lacks {', '.join(missing)}.parquet", again)
    rows = pl.read_parquet(folder / "train.parquet").filter(pl.col(TASK) == FAMILY)
    compared, broken = _not_prefix(recommender, train, rows)
    served = float((rows[TEMPLATE] == recommender.template).sum() / max(1, len(rows)))
    problems = {
        "prompts differ from the stored ones": _stored_differ(valid, folder),
        "training rows don't go on from the served prompt": broken,
        "prompts hold their target": _leaks(recommender, valid),
        "training rows were found": "no" if compared == 0 else 0,
        f"training rows use the serving template {recommender.template}": 0 if served else "no",
    }
    details |= {"problems": problems, "compared": compared, "serving_template_share": served}
    value = (
        f"{len(valid.prompts)} prompts equal the stored ones, {compared} training rows go on from "
        f"them, none holds its target; {served:.0%} of training is the serving template"
    )
    verdict: Verdict = ("ok", "training and serving see the same text", "")
    if wrong := [f"{count} {what}" for what, count in problems.items() if count]:
        value = "; ".join(wrong)
        verdict = ("bad", "training and serving don't see the same text, or see the answer", again)
    return Check(name, value, *verdict, details)


def _stored_differ(sample: Sample, folder: Path) -> int:
    """Rows whose prompt is not the one that build_dataset stored."""
    stored = pl.read_parquet(folder / "valid.parquet", columns=[ROW_ID, PROMPT])
    prompt_of = dict(stored.filter(pl.col(ROW_ID).is_in(sample.row_ids)).iter_rows())
    pairs = zip(sample.row_ids, sample.prompts, strict=True)
    return sum(prompt_of.get(row_id) != prompt for row_id, prompt in pairs)


def _not_prefix(recommender: Recommender, sample: Sample, rows: pl.DataFrame) -> tuple[int, int]:
    """Training rows compared, and how many are not the served prompt's tokens + the target's.

    The prompt is rendered with the row's own template: templates may be several.
    """
    tokenizer = recommender.tokenizer
    level_ids = sid_token_ids(tokenizer, recommender.semantic_ids)
    sid_set = {token for ids in level_ids for token in ids}
    codes = recommender.semantic_ids.codes[sample.targets].tolist()
    # With a training row per item, its id carries the target's place in the history.
    ids = zip(sample.row_ids, sample.histories, strict=True)
    names = [(row_id, f"{row_id}#{len(history)}") for row_id, history in ids]
    wanted = rows.filter(pl.col(ROW_ID).is_in([name for pair in names for name in pair]))
    made = {row[ROW_ID]: row for row in wanted.iter_rows(named=True)}
    compared = wrong = 0
    for pair, history, target in zip(names, sample.histories, codes, strict=True):
        if (row := made.get(pair[0]) or made.get(pair[1])) is None:
            continue  # a dataset may hold a part of the rows
        sids = recommender.sids[history].tolist()
        prompt = history_prompt(recommender.renderer, row[TEMPLATE], sids)
        served = encode_prompts(tokenizer, [prompt])[0]
        served += [level_ids[level][code] for level, code in enumerate(target)]
        row_ids = encode_rows(tokenizer, [row[PROMPT]], [row[COMPLETION]], sid_set)["input_ids"][0]
        compared, wrong = compared + 1, wrong + (row_ids != served)
    return compared, wrong


def _leaks(recommender: Recommender, sample: Sample) -> int:
    """Prompts that hold the SID of a target which the history doesn't hold."""
    triples = zip(sample.prompts, sample.targets, sample.histories, strict=True)
    return sum(
        recommender.sids[target] in prompt and target not in history
        for prompt, target, history in triples
    )
