"""Evaluate: recommendations against what came next, beside baselines under the same rules.

    genrec evaluate --config recipes/configs/quickstart/evaluate.yaml --run_dir runs/quickstart
    genrec evaluate --run_dir runs/beauty --recommendations s0.csv s1.csv s2.csv \
        --system "my model" --output_dir results/my-model

The first form scores the recommend stage of the run; the second anybody's lists on the run's split:
Parquet or CSV with `user_id` or `row_id`, `item_id`, and `rank` (1 is best) or `score`. Several
files are training seeds of one system.

Baselines are fitted on the training rows, which is what the model saw, and tuned on the validation
rows; like the model they read the validation item as part of a test row's history. They are cached
by the hash of the split, beside the run or where GENREC_CACHE (or `--cache_dir`) says. They rank
all items, so beside lists of `recommend --allow` or `--deny` they are left out. SASRec and BERT4Rec
take hours on a CPU: `genrec baselines` trains them, and they join every table of that dataset that
looks into the same cache from then on (`--overwrite true` redoes one).

Writes report.html, metrics.json, per_user, slices and curves.parquet, examples.json and
baselines/*.parquet. Every evaluation on the test split is noted in `<run_dir>/test_reads.jsonl`.
Five minutes of CPU for Beauty, most of them for tuning baselines the first time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec.artifacts import (
    Manifest,
    Stage,
    load_manifest,
    read_json,
    read_shards,
    require,
    sha256_file,
    stage_folder,
    write_text,
)
from genrec.columns import (
    CATEGORIES,
    HISTORY,
    ITEM_ID,
    RANK,
    RELEVANT,
    ROW_ID,
    SEEN,
    TARGET,
    TRAIN_COUNT,
    USER_ID,
)
from genrec.config import check_choice, make_console, parse, run
from genrec.data.splits import read_split
from genrec.evaluation.baselines import DEVICES, UnfitData, item_users
from genrec.evaluation.beyond_accuracy import category_matrix
from genrec.evaluation.comparison import (
    Comparison,
    compare,
    comparison_table,
    describe_difference,
)
from genrec.evaluation.lists import (
    RecommendedLists,
    align,
    check_unseen,
    read_recommendations,
    read_sid_map,
    relevant_items,
)
from genrec.evaluation.pages import render_run_page
from genrec.evaluation.results import write_results
from genrec.evaluation.row_values import ItemFacts
from genrec.evaluation.run_notes import items_ranked
from genrec.evaluation.slices import gaps, make_slices, score_slices
from genrec.evaluation.suite import (
    BASELINES,
    FIT_ON,
    FITTED,
    TRAINED,
    SplitData,
    baseline,
    cache_folder,
    load_split_data,
    trained_folder,
    trained_seeds,
)
from genrec.generation.allow_lists import restricted_by, rows_allowed_then
from genrec.item_lists import ItemLists

logger = logging.getLogger("genrec.evaluate")

MAX_DEPTH = 100  # places of a list that are scored


@dataclass
class EvaluateArgs:
    """Settings of the evaluate stage."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    dataset: str | None = None  # name printed above the table; default: the run folder's
    system: str = "genrec"  # name of the scored system in the table
    # Anybody's lists, one file per training seed; default: the recommend stage's
    recommendations: list[str] | None = None
    output_dir: str | None = None  # where results of `recommendations` go (a new folder)
    split: str | None = None  # default: the recommend stage's, test for `recommendations`
    filter_seen: bool = True  # one rule per table: the recommend stage must have used the same
    ks: list[int] = field(default_factory=lambda: [5, 10])
    # SASRec and BERT4Rec join in without being named once `genrec baselines` has trained them.
    baselines: list[str] = field(default_factory=lambda: list(FITTED))
    training_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of SASRec and BERT4Rec
    # Of baselines; default: the variable GENREC_CACHE, else baselines-cache beside the run
    cache_dir: str | None = None
    device: str = "auto"  # where SASRec and BERT4Rec are trained: auto, cpu or cuda
    fit_on: str = "train"  # rows that popularity and kNN count: those the model trained on
    sid_map: str | None = None  # index.json whose shared semantic ids share credit, too
    samples: int = 1000  # bootstrap samples of the 95% intervals
    permutations: int = 10_000  # of the randomisation test
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        if self.split is not None:
            check_choice("split", self.split, ("valid", "test"))
        check_choice("fit_on", self.fit_on, FIT_ON)
        check_choice("device", self.device, DEVICES)
        if self.device == "cuda":  # torch is imported only to ask
            from genrec.evaluation.sequential import compute_device

            compute_device(self.device)
        check_fit_on(self.fit_on, self.split)
        for name in self.baselines:
            check_choice("baselines", name, BASELINES)
        if self.system in BASELINES:
            raise ValueError(f"system={self.system!r} is the name of a baseline; choose another")
        if not self.ks or min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            raise ValueError(f"ks={self.ks} must be distinct list lengths of at least 1")
        for name in ("samples", "permutations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.training_seeds or len(set(self.training_seeds)) < len(self.training_seeds):
            raise ValueError(f"training_seeds={self.training_seeds} must be distinct, at least one")
        if (self.recommendations is None) != (self.output_dir is None):
            raise ValueError("--recommendations FILE and --output_dir FOLDER belong together")


def check_fit_on(fit_on: str, split: str | None) -> None:
    """Raise ValueError where baselines would learn from the targets that they are scored on."""
    if fit_on != "train" and split == "valid":
        raise ValueError(f"fit_on={fit_on} holds the validation targets; use fit_on=train")


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
    check_fit_on(args.fit_on, made["split"])
    return str(made["split"])


def restriction(recommended: Manifest, catalog: pl.DataFrame) -> dict[str, Any] | None:
    """What an allow- or deny-list left of the catalogue; None where lists could hold every item.

    Returns:
        Hashes of the lists under their names, and how many ``items`` they leave: None where a
        list is gone or changed.
    """
    hashes = restricted_by(recommended)
    if not hashes:
        return None
    try:
        allowed = rows_allowed_then(recommended, catalog[ITEM_ID])
    except ValueError as error:
        logger.warning("how many items could be recommended isn't known: %s", error)
        allowed = None
    return {**hashes, "items": None if allowed is None else len(allowed)}


def evaluated_rows(split_rows: pl.DataFrame, source: Path, split: str) -> pl.DataFrame:
    """The split rows that the recommend stage was asked for (all, if it doesn't say)."""
    if not (source / "rows.parquet").exists():
        return split_rows
    asked = pl.read_parquet(source / "rows.parquet", columns=[ROW_ID], glob=False)
    rows = split_rows.join(asked, on=ROW_ID, how="semi", maintain_order="left")
    if rows.height != asked.height:
        raise ValueError(
            f"{asked.height - rows.height} rows of {source}/rows.parquet are not in the split "
            f"{split}: it was made for another dataset; rerun recommend"
        )
    return rows


def sid_numbers(args: EvaluateArgs, rows: pl.DataFrame, catalog: pl.DataFrame) -> np.ndarray | None:
    """A number per semantic id for every item, where `--sid_map` names a file."""
    if args.sid_map is None:
        return None
    if RELEVANT in rows.columns:
        raise ValueError(
            "--sid_map is for rows with one relevant item, and this split has several a row; "
            "leave it out"
        )
    return read_sid_map(args.sid_map, catalog)


def list_depth(tables: Sequence[pl.DataFrame], ks: list[int]) -> int:
    """How many places of the lists are scored: all that they have, up to `MAX_DEPTH`."""
    key = ROW_ID if all(ROW_ID in table.columns for table in tables) else USER_ID
    longest = [
        table[RANK].cast(pl.Int64, strict=False).max()
        if RANK in table.columns
        else table.group_by(key).len()["len"].max()
        for table in tables
        if key in table.columns
    ]
    known = [int(n) for n in longest if isinstance(n, int)]
    return max(max(ks), min([MAX_DEPTH, *known[:1], *known]))


def baseline_lists(
    args: EvaluateArgs, data: SplitData, restricted: dict[str, Any] | None = None
) -> tuple[dict[str, list[np.ndarray]], dict[str, Any], dict[str, str]]:
    """Lists of the chosen baselines per seed, their settings, and which could not run, and why.

    None is made where the lists that are scored were `restricted` to a part of the catalogue: a
    baseline ranks all of it, and what the two gain differs by that alone.
    """
    if restricted is not None:
        told = {"items": data.n_items, "restricted": restricted}
        given = " and ".join(f"--{name}" for name in ("allow", "deny") if name in restricted)
        reason = (
            f"the lists were restricted to {items_ranked(told)} "
            f"(recommend {given}), baselines rank all; to compare, rerun recommend without"
        )
        return {}, {}, dict.fromkeys(args.baselines, reason)
    cache = cache_folder(args.run_dir, args.cache_dir)
    seeds = dict.fromkeys(args.baselines, args.training_seeds)
    for name in TRAINED:
        if name in seeds:
            continue
        if (known := trained_seeds(name, data, cache)) is not None:
            seeds[name] = known  # `genrec baselines` has trained it: its lists cost seconds
        else:
            folder = trained_folder(data, cache)
            logger.info("%s is not trained in %s: `genrec baselines` trains it", name, folder)
    lists, settings, not_run = {}, {}, {}
    for name, training_seeds in seeds.items():
        try:
            found = baseline(name, data, cache, args.seed, training_seeds, args.device)
        except UnfitData as error:
            logger.warning("%s is left out: %s", name, error)
            not_run[name] = str(error)
            continue
        lists[name], settings[name] = found.lists, found.settings
    return lists, settings, not_run


def main() -> None:
    """Read the lists, make the baselines, score, write, print."""
    args = parse(EvaluateArgs)
    prepare = require(args.run_dir, "prepare")
    source = stage_folder(args.run_dir, "recommend")
    stage, inputs = None, {"prepare": prepare.content_hash}
    if args.recommendations is None:
        made = [s for s in ("embed",) if load_manifest(args.run_dir, s) is not None]
        stage = Stage(
            args.run_dir,
            "evaluate",
            asdict(args),
            inputs=["prepare", "recommend", *made],
            files={"sid_map": args.sid_map} if args.sid_map else None,
            ignore=["cache_dir", "device"],
        )
        split, folder, inputs = recommended_split(args, stage), stage.folder, stage.inputs
        if stage.is_done(args.overwrite):
            return
        tables = [read_shards(source, "recommendations")]
    else:
        split, folder = args.split or "test", Path(str(args.output_dir))
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"--output_dir {folder} is not empty; name a new folder")
        tables = [read_recommendations(path) for path in args.recommendations]
        for seed, path in enumerate(args.recommendations):
            inputs[f"recommendations {seed} ({Path(path).name})"] = sha256_file(path)

    catalog = pl.read_parquet(stage_folder(args.run_dir, "prepare") / "catalog.parquet", glob=False)
    split_rows = read_split(args.run_dir, split, "evaluate", system=args.system)
    rows = evaluated_rows(split_rows, source, split) if stage else split_rows
    sids = sid_numbers(args, rows, catalog)
    depth = list_depth(tables, args.ks)
    found = [align(table, rows, catalog, depth, split_rows) for table in tables]
    del tables  # of a million users a gigabyte
    if args.filter_seen:
        for one in found:
            check_unseen(one.items, ItemLists.from_column(rows[SEEN]))
    facts = read_json(stage_folder(args.run_dir, "prepare") / "split.json")
    data = load_split_data(args.run_dir, rows, split, depth, args.filter_seen, args.fit_on)
    restricted = restriction(stage.upstream["recommend"], catalog) if stage else None
    lists, settings, not_run = baseline_lists(args, data, restricted)
    lists[args.system] = [one.items for one in found]
    comparison, groups = scored(args, data, lists, catalog, sids)
    users_file = stage_folder(args.run_dir, "prepare") / "users.parquet"
    users = pl.read_parquet(users_file, glob=False) if users_file.exists() else None
    slicings = make_slices(rows, catalog, users)
    k = max(args.ks)
    results = {
        "dataset": args.dataset or Path(args.run_dir).resolve().name,
        "split": split,
        "split_sha256": prepare.outputs[f"{split}.parquet"]["sha256"],
        **{name: facts.get(name) for name in ("protocol", "tie_rule", "rating_rule")},
        **counts(rows, found),
        "items": catalog.height,
        "restricted": restricted,  # to what recommend's allow- and deny-list left
        "ks": args.ks,
        "depth": depth,
        "filter_seen": args.filter_seen,
        "fit_on": args.fit_on,
        "reference": args.system,
        "interval": "95% percentile bootstrap over users, and over training seeds where there are "
        "several; coverage, Gini: none",
        "test": "paired randomisation test over users (two-sided); p_holm adjusts for the systems",
        "samples": args.samples,
        "permutations": args.permutations,
        "seed": args.seed,
        "inputs": inputs,
        "data_run": str(args.run_dir),  # which notes the reads of its test split
        "baselines": settings,
        "not_run": not_run,
        "gaps": gaps(slicings, comparison.ranks, groups, k, samples=args.samples, seed=args.seed),
    }
    slices = score_slices(slicings, comparison.ranks, groups, k, args.samples, args.seed)
    write_results(folder, results, comparison, slices, slicings, lists, rows, catalog)
    page = render_run_page(folder, Path(args.run_dir) if stage else None, Path(args.run_dir))
    write_text(folder / "report.html", page)
    if stage is not None:
        flat = {metric: value.value for metric, value in comparison.metrics[args.system].items()}
        stage.finish(rows=rows.height, seed=args.seed, metrics=flat)
    show(args, comparison, results)
    print(f"page: {folder}/report.html; figures: metrics.json, *.parquet beside it")


def scored(
    args: EvaluateArgs,
    data: SplitData,
    lists: dict[str, list[np.ndarray]],
    catalog: pl.DataFrame,
    sids: np.ndarray | None,
) -> tuple[Comparison, np.ndarray]:
    """All metrics of all systems, and the user of each row as a number."""
    groups = data.rows[USER_ID].rank("dense").to_numpy().astype(np.int64) - 1
    comparison = compare(
        lists,
        relevant_items(data.rows),
        catalog.height,
        args.ks,
        reference=args.system,
        samples=args.samples,
        permutations=args.permutations,
        seed=args.seed,
        groups=groups,
        facts=ItemFacts(
            train_count=catalog[TRAIN_COUNT].to_numpy(),
            train_users=item_users(data.train, catalog.height),
            n_users=data.train[USER_ID].n_unique(),
            history=ItemLists.from_column(data.rows[HISTORY]),
            vectors=data.vectors,
            categories=category_matrix(catalog[CATEGORIES]),
            sid_of_item=sids,
        ),
    )
    return comparison, groups


def counts(rows: pl.DataFrame, found: Sequence[RecommendedLists]) -> dict[str, int]:
    """Rows, users, and what could not be scored (summed over seeds)."""
    relevant = pl.col(RELEVANT) if RELEVANT in rows.columns else pl.concat_list(TARGET)
    again = rows.select(relevant.list.set_intersection(pl.col(SEEN)).list.len().sum()).item()
    return {
        "rows": rows.height,
        "users": rows[USER_ID].n_unique(),
        "targets_seen_before": int(again),
        "rows_without_list": sum(one.rows_without_list for one in found),
        "unknown_items": sum(one.unknown_items for one in found),
        "ignored_lists": sum(one.ignored_lists for one in found),
        "tied_lists": sum(one.tied_lists for one in found),
    }


def show(args: EvaluateArgs, comparison: Comparison, results: dict[str, Any]) -> None:
    """Print the table and what has to be known to read it."""
    columns = [f"{metric}@{k}" for k in args.ks for metric in ("HR", "NDCG")]
    title = (
        f"{results['dataset']}, {results['split']}: {results['rows']:,} rows, "
        f"{items_ranked(results).removeprefix('all ')}, "
        f"seen items {'left out' if args.filter_seen else 'allowed'}"
    )
    console = make_console(markup=True)
    k = max(args.ks)
    console.print(comparison_table(comparison, [*columns, f"coverage@{k}"], title))
    notes = ["± is half of the 95% bootstrap interval"]
    if results["baselines"]:
        notes[0] += f"; popularity and kNN count {args.fit_on}"
    for name, how in results["baselines"].items():
        if "description" in how:
            notes.append(
                f"{name}: {how['description']} (best of {len(how['trials'])} trials on valid, "
                f"NDCG@10 {how['valid_ndcg@10']:.4f})"
            )
    left_out: dict[str, list[str]] = {}
    for name, reason in results["not_run"].items():
        left_out.setdefault(reason, []).append(name)
    notes += [
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} left out: {reason}"
        for reason, names in left_out.items()
    ]
    if (line := describe_difference(comparison, f"NDCG@{k}")) is not None:
        notes.append(line)
    counted = {
        "rows_without_list": "rows without a list: misses",
        "unknown_items": "recommended items that are not in the catalogue: misses",
        "ignored_lists": "lists of rows or users that are not evaluated: ignored",
        "tied_lists": "lists hold equal scores: those items stand in a seeded random order",
    }
    if args.filter_seen:
        counted["targets_seen_before"] = "targets were seen before: a miss for every system"
    notes += [f"{results[key]:,} {text}" for key, text in counted.items() if results[key]]
    console.print("\n".join(notes), markup=False)


if __name__ == "__main__":
    run(main)
