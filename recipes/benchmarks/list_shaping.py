"""Benchmark: what diversity, caps and boosts cost a finished model.

    python recipes/benchmarks/list_shaping.py --run_dir runs/quickstart
    python recipes/benchmarks/list_shaping.py --quick        # a synthetic shop, under a minute

Lists of ten for validation rows, under the run's rule for seen items: by beam search, by Gumbel
top-k, by sampling with temperatures and top-p per level, and by shaping the beam's candidates
(near-duplicates by title and by item vectors, a cap per category, boosts of the largest category
and of the tail). Each with HR@10, NDCG@10, coverage, diversity inside a list (mean cosine distance
of the item vectors), the share of distinct lists, the mean list length, and its NDCG less the
beam's with a 95% bootstrap interval, paired over users. Sampled lists are ranked by score; "as
drawn" keeps the order of drawing. Scores are normalised over the trie, where items have
probabilities.

`--run_dir` is a run with embed and sft (or grpo) done; its test rows are not read. CPU or GPU, as
the model is loaded. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import runpy
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from tqdm import tqdm

from genrec.artifacts import require, stage_folder
from genrec.cli import recipes_folder
from genrec.columns import CATEGORIES, HISTORY, RELEVANT, ROW_ID, SEEN, TARGET, TITLE, TRAIN_COUNT
from genrec.columns import USER_ID as USER
from genrec.data.splits import read_split
from genrec.decoding.beam import BeamResult, default_beam_width
from genrec.decoding.sampling import GumbelTopK, LevelSampling, Sampler
from genrec.decoding.torch_engine import TorchEngine
from genrec.evaluation.beyond_accuracy import intra_list_diversity
from genrec.evaluation.significance import bootstrap_means, interval
from genrec.item_lists import ItemLists
from genrec.list_shaping import (
    Candidates,
    Cap,
    boosted,
    capped,
    category_at,
    numbered,
    title_groups,
    without_similar,
    without_variants,
)
from genrec.metrics import RelevantRanks, coverage_at_k, find_relevant, gains, hits, target_rank
from genrec.modeling import encode_prompts
from genrec.recommend import Recommender

K = 10
IntArray = npt.NDArray[np.integer]
QUICK: dict[str, list[str]] = {
    "prepare": "--format synthetic --n_users 200 --n_items 150".split(),
    "embed": "--dim 32".split(),
    "quantize": "--n_levels 3 --codebook_size 16 --report_map pca".split(),
    "build_dataset": "--tasks sequential --sequential_mode whole_history --n_templates 1".split(),
    "sft": "--size tiny --vocab_size 500 --eval_rows 0 --max_steps 40 --learning_rate 3e-3 "
    "--filter_seen false --per_device_train_batch_size 8 --use_cpu true --bf16 false "
    "--gradient_checkpointing false --report_to none --save_strategy no --seed 0".split(),
}


@dataclass(frozen=True)
class Shop:
    """What all systems are measured on.

    Attributes:
        relevant: where the right answers come from: targets, or lists of them.
        users: number of each row's user, whose rows are drawn together. ``# (n_rows,)``
        vectors: of the items. ``# (n_items, dim)``
        catalog: ``catalog.parquet``.
    """

    relevant: IntArray | ItemLists
    users: IntArray
    vectors: npt.NDArray[np.float32]
    catalog: pl.DataFrame

    def ranks(self, lists: IntArray) -> IntArray | RelevantRanks:
        """Where the right answers stand."""
        if isinstance(self.relevant, ItemLists):
            return find_relevant(lists, self.relevant)
        return target_rank(lists, self.relevant)


def quick_run(folder: Path) -> Path:
    """A trained run on a synthetic shop, made by the recipes, in this process to import once."""
    for stage, options in QUICK.items():
        sys.argv = [stage, "--run_dir", str(folder), *options]
        with contextlib.redirect_stdout(sys.stderr):
            runpy.run_path(str(recipes_folder() / f"{stage}.py"), run_name="__main__")
    return folder


def load(
    args: argparse.Namespace,
) -> tuple[TorchEngine, Shop, list[list[int]], list[np.ndarray] | None]:
    """The engine, the rows, their prompts, and the items that each must not get."""
    require(args.run_dir, "embed")
    recommender = Recommender.load(args.run_dir, normalizer="trie")
    engine = recommender.engine
    assert isinstance(engine, TorchEngine)
    rows = read_split(args.run_dir, "valid", "benchmark")
    rows = rows.sample(min(args.rows, rows.height), seed=args.seed).sort(ROW_ID)
    prompts = encode_prompts(recommender.tokenizer, recommender.prompts(rows[HISTORY].to_list()))
    seen = None
    if recommender.filter_seen:
        seen = [np.array(s, dtype=np.int64) for s in rows[SEEN].to_list()]
    relevant: IntArray | ItemLists = rows[TARGET].to_numpy().astype(np.int64)
    if RELEVANT in rows.columns:
        relevant = ItemLists.from_column(rows[RELEVANT])
    vectors = np.load(stage_folder(args.run_dir, "embed") / "item_embeddings.npy")
    users = numbered(rows[USER])[0]
    return engine, Shop(relevant, users, vectors, recommender.catalog), prompts, seen


def samplers(n_levels: int, seed: int) -> dict[str, Sampler]:
    """Name -> sampler; all draw distinct items."""
    rest = [1.0] * (n_levels - 1)
    found: dict[str, Sampler] = {"Gumbel top-k": GumbelTopK(seed)}
    for t in (0.5, 0.7, 1.5):
        found[f"temperature {t:g}"] = LevelSampling(t, seed=seed)
    found["temperature 2 at level 1"] = LevelSampling([2.0, *rest], seed=seed)
    found["temperature 2 at the last level"] = LevelSampling([*rest, 2.0], seed=seed)
    for p in (0.9, 0.5):
        found[f"top-p {p:g}"] = LevelSampling(top_p=p, seed=seed)
    return found


def by_score(result: BeamResult) -> IntArray:
    """A drawn list in the order in which it would be shown."""
    return Candidates.of(result.items, result.scores).items


def shaped(
    wide: Candidates, shop: Shop, args: argparse.Namespace
) -> Iterator[tuple[str, Candidates]]:
    """Name and candidates of every way to shape the beam's list."""
    categories = numbered(category_at(shop.catalog[CATEGORIES], args.depth))[0]
    counts = shop.catalog[TRAIN_COUNT].to_numpy()
    tail = counts <= np.median(counts)
    one_each = without_variants(wide, title_groups(shop.catalog[TITLE], args.ignore))
    yield "one of each title", one_each
    for cosine in args.max_cosine:
        yield f"cosine at most {cosine:g}", without_similar(wide, shop.vectors, cosine)
    yield f"at most {args.cap} of a category", capped(wide, [Cap(categories, args.cap)])
    largest = np.bincount(categories[categories >= 0]).argmax()
    of_it = np.where(categories == largest, np.log(2.0), 0.0)
    yield "largest category boosted x2", boosted(wide, of_it)
    for factor in (1.5, 3.0):
        yield f"tail boosted x{factor:g}", boosted(wide, np.where(tail, np.log(factor), 0.0))


def measured(shop: Shop, lists: IntArray, base: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Figures of one system; `base` is the beam's NDCG per row."""
    ranks = shop.ranks(lists)
    ndcg = gains(ranks, K)
    draws = bootstrap_means((ndcg - base)[:, None], groups=shop.users)
    cost = interval(float((ndcg - base).mean()), draws[:, 0])
    return {
        "hr@10": round(float(hits(ranks, K).mean()), 4),
        "ndcg@10": round(float(ndcg.mean()), 4),
        "ndcg_minus_beam": [round(float(x or 0.0), 4) for x in (cost.value, cost.low, cost.high)],
        "coverage": round(coverage_at_k(lists, len(shop.vectors), K), 4),
        "diversity": round(float(np.nanmean(intra_list_diversity(lists, shop.vectors, K))), 4),
        "distinct_lists": round(len(np.unique(lists, axis=0)) / len(lists), 4),
        "items": round(float((lists >= 0).sum(axis=1).mean()), 2),
    }


def show(table: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    names = ("hr@10", "ndcg@10", "coverage", "diversity", "distinct_lists", "items")
    print(f"{'lists':32s}" + "".join(f"{n:>15s}" for n in names) + "   NDCG@10 - beam [95%]")
    for system, found in table.items():
        value, low, high = found["ndcg_minus_beam"]
        cells = "".join(f"{found[name]:15.4f}" for name in names)
        print(f"{system:32s}{cells}   {value:+.4f} [{low:+.4f}, {high:+.4f}]")


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run_dir", type=Path, help="run with embed and sft done")
    parser.add_argument("--rows", type=int, default=2000, help="validation rows, a seeded sample")
    parser.add_argument("--beam_width", type=int, default=50, help="candidates that are shaped")
    parser.add_argument("--max_cosine", type=float, nargs="+", default=[0.95, 0.8])
    parser.add_argument("--ignore", help="part of a title that names the variant, a regex")
    parser.add_argument("--cap", type=int, default=3, help="items of a category in a list")
    parser.add_argument("--depth", type=int, default=-1, help="of the category in its path")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a synthetic shop, a model of seconds")
    args = parser.parse_args()
    if not args.quick and args.run_dir is None:
        parser.error("--run_dir is needed: a run with embed and sft done (or --quick)")
    if args.rows < 1 or args.beam_width < K:
        parser.error(f"--rows must be at least 1 and --beam_width at least {K}")
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All systems on one run."""
    engine, shop, prompts, seen = load(args)
    width = max(args.beam_width, default_beam_width(K))
    table: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}

    def search(name: str, k: int, sampler: Sampler | None = None) -> BeamResult:
        with tqdm(total=len(prompts), desc=name, unit="user", leave=False) as bar:
            started = time.perf_counter()
            result = engine.search(prompts, k, width, seen, progress=bar.update, sampler=sampler)
            seconds[name] = round(time.perf_counter() - started, 2)
        return result

    beam = search("beam", width)
    wide = Candidates.of(beam.items, beam.scores)
    base = gains(shop.ranks(wide.top(K).items), K)
    table["beam"] = measured(shop, wide.top(K).items, base)
    for name, sampler in samplers(engine.trie.n_levels, args.seed).items():
        result = search(name, K, sampler)
        if isinstance(sampler, GumbelTopK):
            table[f"{name}, as drawn"] = measured(shop, result.items, base)
        table[name] = measured(shop, by_score(result), base)
    for name, candidates in shaped(wide, shop, args):
        table[name] = measured(shop, candidates.top(K).items, base)
    show(table)
    return {"rows": len(prompts), "items": len(shop.vectors), "beam_width": width,
        "filter_seen": seen is not None, "lists": table, "search_seconds": seconds}  # fmt: skip


def main() -> None:
    """Make or load a run, measure, print."""
    args = arguments()
    started = time.perf_counter()
    if args.quick:
        with tempfile.TemporaryDirectory(prefix="genrec-") as folder:
            args.run_dir, args.ignore = quick_run(Path(folder) / "shop"), ",[^,]*$"
            args.depth, args.rows = 0, 150
            report = measure(args)
    else:
        report = measure(args)
    print(json.dumps(report | {"seconds": round(time.perf_counter() - started, 1)}))


if __name__ == "__main__":
    main()
