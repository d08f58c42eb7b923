"""Evaluate: recommendations against what came next, beside baselines under the same rules.

    genrec evaluate --config recipes/configs/quickstart/evaluate.yaml --run_dir runs/quickstart
    genrec evaluate --run_dir runs/beauty --recommendations lists.csv --system SASRec \
        --output_dir results/sasrec

The first form scores the recommend stage of the run; the second anybody's lists on the run's split:
Parquet or CSV with `user_id` or `row_id`, `item_id`, and `rank` (1 is best) or `score`.

Writes metrics.json, per_user.parquet and baselines/*.parquet. Baselines are fitted on the training
rows, which is what the model saw, and tuned on the validation rows; like the model they read the
validation item as part of a test row's history. Every evaluation on the test split is noted in
`<run_dir>/test_reads.jsonl`. CPU only; two minutes for Beauty.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console

from genrec.artifacts import (
    Manifest,
    Stage,
    read_shards,
    require,
    sha256_file,
    stage_folder,
    write_json,
    write_parquet,
)
from genrec.columns import HISTORY, ITEM_ID, ITEM_INDEX, RANK, ROW_ID, SEEN, TARGET, USER_ID
from genrec.config import check_choice, parse, run
from genrec.evaluation import baselines as b
from genrec.evaluation.baselines import ItemLists
from genrec.evaluation.comparison import (
    Comparison,
    compare,
    comparison_table,
    describe_difference,
)
from genrec.evaluation.knn import (
    ITEM_KNN_GRID,
    SELF_WEIGHTS,
    SEQUENTIAL_KNN_GRID,
    ItemKNN,
    KNNSettings,
    tune_knn,
)
from genrec.evaluation.lists import align, check_unseen, read_recommendations

logger = logging.getLogger("genrec.evaluate")

BASELINES = ("random", "popularity", "item-kNN", "sequential-kNN")
FIT_ON = ("train", "train+valid")


@dataclass
class EvaluateArgs:
    """Settings of the evaluate stage."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    dataset: str | None = None  # name printed above the table; default: the run folder's
    system: str = "genrec"  # name of the scored system in the table
    recommendations: str | None = None  # anybody's lists; default: the recommend stage's
    output_dir: str | None = None  # where results of `recommendations` go (a new folder)
    split: str | None = None  # default: the recommend stage's, test for `recommendations`
    filter_seen: bool = True  # one rule per table: the recommend stage must have used the same
    ks: list[int] = field(default_factory=lambda: [5, 10])
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    fit_on: str = "train"  # rows that popularity and kNN count: those the model trained on
    samples: int = 1000  # bootstrap samples of the 95% intervals
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        if self.split is not None:
            check_choice("split", self.split, ("valid", "test"))
        check_choice("fit_on", self.fit_on, FIT_ON)
        for name in self.baselines:
            check_choice("baselines", name, BASELINES)
        if self.system in self.baselines:
            raise ValueError(f"system={self.system!r} is the name of a baseline; choose another")
        if not self.ks or min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            raise ValueError(f"ks={self.ks} must be distinct list lengths of at least 1")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1")
        if (self.recommendations is None) != (self.output_dir is None):
            raise ValueError("--recommendations FILE and --output_dir FOLDER belong together")


def recommended_split(args: EvaluateArgs, stage: Stage) -> str:
    """Split of the recommend stage, once its settings are seen to match this table's."""
    made = stage.upstream["recommend"].config
    for name, wanted in (("filter_seen", args.filter_seen), ("split", args.split)):
        if name not in made:
            raise ValueError(f"the recommend stage's manifest has no {name}; rerun recommend")
        if wanted is not None and made[name] != wanted:
            raise ValueError(
                f"{name}={wanted} here, but the recommend stage ran with {name}={made[name]}; "
                f"a table has one rule: set --{name} {str(made[name]).lower()}, or rerun recommend"
            )
    if isinstance(depth := made.get("k"), int) and depth < max(args.ks):
        raise ValueError(f"ks={args.ks}, but recommend made lists of k={depth}; rerun it with more")
    return str(made["split"])


def note_test_read(run_dir: str, prepare: Manifest, rows: int, system: str) -> None:
    """Append a line to test_reads.jsonl: how often the test split was looked at is a result."""
    line = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "stage": "evaluate",
        "split": "test",
        "split_sha256": prepare.outputs["test.parquet"]["sha256"],
        "rows": rows,
        "system": system,
    }
    with open(Path(run_dir) / "test_reads.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def baseline_lists(
    args: EvaluateArgs, data: Path, rows: pl.DataFrame, n_items: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Lists of the chosen baselines for `rows`, and how each was set."""
    train, valid = (pl.read_parquet(data / f"{name}.parquet") for name in ("train", "valid"))
    fit = train
    if args.fit_on == "train+valid":
        fit = pl.concat([train, valid.select(train.columns)])

    def seen(table: pl.DataFrame) -> ItemLists:
        return ItemLists.from_column(table[SEEN]) if args.filter_seen else b.no_items(len(table))

    k, banned = max(args.ks), seen(rows)
    lists: dict[str, np.ndarray] = {}
    settings: dict[str, Any] = {}
    for name in args.baselines:
        started = time.perf_counter()
        if name == "random":
            lists[name] = b.random_lists(n_items, banned, k, args.seed)
            settings[name] = {"seed": args.seed}
        elif name == "popularity":
            order = b.popularity_order(b.item_counts(fit, n_items), args.seed)
            lists[name] = b.popularity(order, banned, k)
            settings[name] = {"counts": args.fit_on}
        else:
            sequential = name == "sequential-kNN"
            start = KNNSettings(lag_power=0.5 if sequential else None)
            grid = dict(SEQUENTIAL_KNN_GRID if sequential else ITEM_KNN_GRID)
            if not args.filter_seen:  # then repeats can be targets, for kNN as for the model
                grid["self_weight"] = SELF_WEIGHTS
            # Always tuned with train rows only: train+valid would hold the validation targets.
            best, trials = tune_knn(train, valid, seen(valid), n_items, start, grid, 10, args.seed)
            history = ItemLists.from_column(rows[HISTORY])
            lists[name] = ItemKNN(fit, n_items, best, args.seed).recommend(history, banned, k)
            settings[name] = {
                "chosen": asdict(best),
                "description": best.describe(),
                "fit_on": args.fit_on,
                "grid": grid,
                "trials": trials,
                "valid_ndcg@10": max(trial["ndcg"] for trial in trials),
            }
        settings[name]["seconds"] = round(time.perf_counter() - started, 1)
    return lists, settings


def long_table(lists: np.ndarray, rows: pl.DataFrame, catalog: pl.DataFrame) -> pl.DataFrame:
    """Item lists as one row per recommended item."""
    row, place = np.nonzero(lists >= 0)
    index = lists[row, place]
    return (
        rows[row]
        .select(ROW_ID, USER_ID)
        .with_columns(
            pl.Series(RANK, place + 1, dtype=pl.Int32),
            catalog[ITEM_ID].gather(index),
            pl.Series(ITEM_INDEX, index, dtype=pl.Int32),
        )
    )


def evaluated_rows(split_rows: pl.DataFrame, source: Path, split: str) -> pl.DataFrame:
    """The split rows that the recommend stage was asked for (all, if it doesn't say)."""
    if not (source / "rows.parquet").exists():
        return split_rows
    asked = pl.read_parquet(source / "rows.parquet", columns=[ROW_ID])
    rows = split_rows.join(asked, on=ROW_ID, how="semi", maintain_order="left")
    if rows.height != asked.height:
        raise ValueError(
            f"{asked.height - rows.height} rows of {source}/rows.parquet are not in the split "
            f"{split}: it was made for another dataset; rerun recommend"
        )
    return rows


def write(
    folder: Path,
    results: dict[str, Any],
    comparison: Comparison,
    lists: dict[str, np.ndarray],
    rows: pl.DataFrame,
    catalog: pl.DataFrame,
) -> None:
    """Write the baselines' lists, the rank of every target, and the metrics."""
    for name, items in lists.items():
        write_parquet(folder / "baselines" / f"{name}.parquet", long_table(items, rows, catalog))
    ranks = [
        rows.select(ROW_ID, USER_ID).with_columns(
            pl.lit(name).alias("system"), pl.Series("target_rank", rank, dtype=pl.Int32)
        )
        for name, rank in comparison.ranks.items()
    ]
    write_parquet(folder / "per_user.parquet", pl.concat(ranks))
    scores = {
        name: {metric: asdict(value) for metric, value in metrics.items()}
        for name, metrics in comparison.metrics.items()
    }
    differences = {
        f"{comparison.reference} - {name}": {m: asdict(value) for m, value in metrics.items()}
        for name, metrics in comparison.differences.items()
    }
    write_json(folder / "metrics.json", {**results, "systems": scores, "differences": differences})


def main() -> None:
    """Read the lists, make the baselines, score, write, print."""
    args = parse(EvaluateArgs)
    prepare = require(args.run_dir, "prepare")
    data = stage_folder(args.run_dir, "prepare")
    source = stage_folder(args.run_dir, "recommend")
    stage, inputs = None, {"prepare": prepare.content_hash}
    if args.recommendations is None:
        stage = Stage(args.run_dir, "evaluate", asdict(args), inputs=["prepare", "recommend"])
        split, folder, inputs = recommended_split(args, stage), stage.folder, stage.inputs
        if stage.is_done(args.overwrite):
            return
        table = read_shards(source, "recommendations")
    else:
        split, folder = args.split or "test", Path(str(args.output_dir))
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"--output_dir {folder} is not empty; name a new folder")
        table = read_recommendations(args.recommendations)
        inputs["recommendations"] = sha256_file(args.recommendations)

    catalog = pl.read_parquet(data / "catalog.parquet")
    split_rows = pl.read_parquet(data / f"{split}.parquet")
    rows = evaluated_rows(split_rows, source, split) if stage else split_rows
    if split == "test":
        note_test_read(args.run_dir, prepare, rows.height, args.system)
    found = align(table, rows, catalog, max(args.ks), split_rows)
    if args.filter_seen:
        check_unseen(found.items, ItemLists.from_column(rows[SEEN]), catalog.height)
    lists, settings = baseline_lists(args, data, rows, catalog.height)
    comparison = compare(
        {**lists, args.system: found.items},
        rows[TARGET].to_numpy().astype(np.int64),
        catalog.height,
        args.ks,
        reference=args.system,
        samples=args.samples,
        seed=args.seed,
        groups=rows[USER_ID].rank("dense").to_numpy().astype(np.int64) - 1,
    )
    results = {
        "dataset": args.dataset or Path(args.run_dir).name,
        "split": split,
        "split_sha256": prepare.outputs[f"{split}.parquet"]["sha256"],
        "rows": rows.height,
        "items": catalog.height,
        "filter_seen": args.filter_seen,
        "fit_on": args.fit_on,
        "targets_seen_before": int(
            rows.select(pl.col(SEEN).list.contains(pl.col(TARGET)).sum()).item()
        ),
        "rows_without_list": found.rows_without_list,
        "unknown_items": found.unknown_items,
        "ignored_lists": found.ignored_lists,
        "interval": "95% percentile bootstrap over users; coverage has none",
        "samples": args.samples,
        "seed": args.seed,
        "inputs": inputs,
        "baselines": settings,
    }
    write(folder, results, comparison, lists, rows, catalog)
    if stage is not None:
        flat = {metric: value.value for metric, value in comparison.metrics[args.system].items()}
        stage.finish(rows=rows.height, seed=args.seed, metrics=flat)
    show(args, comparison, results)
    print(f"details: {folder}/metrics.json, per_user.parquet, baselines/")


def show(args: EvaluateArgs, comparison: Comparison, results: dict[str, Any]) -> None:
    """Print the table and what has to be known to read it."""
    columns = [f"{metric}@{k}" for k in args.ks for metric in ("HR", "NDCG")]
    title = (
        f"{results['dataset']}, {results['split']}: {results['rows']:,} rows, "
        f"{results['items']:,} items, seen items {'left out' if args.filter_seen else 'allowed'}"
    )
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)  # a log file has no width to adapt to
    k = max(args.ks)
    console.print(comparison_table(comparison, [*columns, f"coverage@{k}"], title))
    notes = [f"± is half of the 95% bootstrap interval; popularity and kNN count {args.fit_on}"]
    for name, how in results["baselines"].items():
        if "description" in how:
            notes.append(
                f"{name}: {how['description']} (best of {len(how['trials'])} trials on valid, "
                f"NDCG@10 {how['valid_ndcg@10']:.4f})"
            )
    if (line := describe_difference(comparison, f"NDCG@{k}")) is not None:
        notes.append(line)
    counted = {
        "rows_without_list": "rows without a list: misses",
        "unknown_items": "recommended items that are not in the catalogue: misses",
        "ignored_lists": "lists of rows or users that are not evaluated: ignored",
    }
    if args.filter_seen:
        counted["targets_seen_before"] = "targets were seen before: a miss for every system"
    notes += [f"{results[key]:,} {text}" for key, text in counted.items() if results[key]]
    console.print("\n".join(notes))


if __name__ == "__main__":
    run(main)
