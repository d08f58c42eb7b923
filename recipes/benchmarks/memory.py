"""Benchmark: what an item memory beside a model brings, and beside SASRec in the same way.

    genrec recommend --config … --run_dir runs/mine --split valid --k 50
    python recipes/benchmarks/memory.py --runs runs/mine --weights 0.1 0.2 0.3 --powers 2 3
    python recipes/benchmarks/memory.py --quick             # a synthetic shop, under a minute

Mixes the lists of each run (seeds of one system) with sequential-kNN as `genrec ensemble` does, for
each weight and power, and scores the rows that the runs have lists for. Choose on lists of
validation rows, on which the memory itself is tuned as well, so what they promise is a little too
much; then look at test rows with what was chosen, and lists of the same length. Where the cache
holds a trained SASRec (`genrec baselines --baselines SASRec`), its lists of the same length are
mixed with the same memory: a gain that every model has is no merit of this one. Differences are
paired by row, with 95% bootstrap intervals over rows and seeds; "model" and "SASRec" are alone, and
"… minus SASRec" has both with the same memory, seed by seed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from stages import genrec

from genrec.artifacts import read_json, read_shards, stage_folder
from genrec.columns import HISTORY, ITEM_ID, RANK, RELEVANT, ROW_ID, SCORE, TARGET, USER_ID
from genrec.data.splits import read_split
from genrec.evaluation.ensembles import check_runs, mixture
from genrec.evaluation.item_memory import ItemMemory, memory_lists
from genrec.evaluation.rank_tables import compare_ranks
from genrec.evaluation.suite import (
    SplitData,
    cache_folder,
    load_split_data,
    trained_record,
    trained_state,
    tuned_memory,
)
from genrec.item_lists import ItemLists
from genrec.metrics import EMPTY

K = 10
SASREC = "SASRec"


def sasrec_lists(data: SplitData, cache: Path, item_ids: pl.Series, k: int) -> list[pl.DataFrame]:
    """Lists with log-probabilities of each SASRec that the cache holds, in the order of seeds."""
    from genrec.evaluation.sequential import SequentialSettings, list_sequential, train_sequential

    record = trained_record(SASREC, data, cache)
    if not record.exists():
        return []
    known = read_json(record)
    settings, made = SequentialSettings(**known["settings"]), []
    for seed in known["training_seeds"]:
        state = record.parent / trained_state(settings.identity(), SASREC, seed, data)
        if not state.exists():
            raise SystemExit(f"{state} is gone; run genrec baselines --overwrite true, or move on "
                             "without SASRec by another --cache_dir")  # fmt: skip
        trained = train_sequential(
            data.train, data.valid, data.seen(data.valid), data.n_items, settings, seed, state
        )
        history = ItemLists.from_column(data.rows[HISTORY])
        items, scores = list_sequential(trained.model, history, data.seen(data.rows), k)
        row, place = np.nonzero(items != EMPTY)
        made.append(
            pl.DataFrame(
                [
                    data.rows[ROW_ID].gather(row),
                    data.rows[USER_ID].gather(row),
                    item_ids.gather(items[row, place]).alias(ITEM_ID),
                    pl.Series(SCORE, scores[row, place]),
                ]
            )
        )
    return made


def ranks(lists: pl.DataFrame, targets: pl.DataFrame) -> np.ndarray:
    """Where each row's target stands, 0 outside the list. ``# (rows,)``."""
    found = targets.join(lists, [ROW_ID, ITEM_ID], "left", maintain_order="left")
    return found[RANK].fill_null(0).to_numpy()


def _of_rows(lists: pl.DataFrame, row_ids: pl.Series) -> pl.DataFrame:
    return lists.filter(pl.col(ROW_ID).is_in(row_ids.implode()))


def ranked(lists: pl.DataFrame) -> pl.DataFrame:
    """A model's first `K` alone."""
    order = lists.sort([ROW_ID, SCORE, ITEM_ID], descending=[False, True, False])
    place = pl.int_range(1, pl.len() + 1).over(ROW_ID).alias(RANK)
    return order.with_columns(place).filter(pl.col(RANK) <= K)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The table of all mixtures."""
    config = check_runs(args.runs, with_memory=True)[0]
    lists = [read_shards(stage_folder(r, "recommend"), "recommendations") for r in args.runs]
    rows = read_split(args.runs[0], config["split"], "benchmark", systems=["item memory"])
    if RELEVANT in rows.columns:
        raise SystemExit("rows with several relevant items are not scored here")
    rows = rows.filter(pl.col(ROW_ID).is_in(lists[0][ROW_ID].unique().implode()))
    data = load_split_data(args.runs[0], rows, config["split"], K, config["filter_seen"])
    cache = cache_folder(args.runs[0], args.cache_dir)
    memory, told = tuned_memory(data, cache)
    catalog = pl.read_parquet(stage_folder(args.runs[0], "prepare") / "catalog.parquet")
    item_ids = catalog[ITEM_ID]
    targets = rows.select(ROW_ID, item_ids.gather(rows[TARGET].cast(pl.UInt32)).alias(ITEM_ID))
    beside = sasrec_lists(data, cache, item_ids, int(config["k"]))
    systems = {"model": lists, **({SASREC: beside} if beside else {})}
    found = {name: {name: [ranks(ranked(one), targets) for one in seeds]}
             for name, seeds in systems.items()}  # fmt: skip
    for power in args.powers:
        remembered = memory_lists(ItemMemory(memory, power), rows, data.seen(rows), item_ids)
        of_rows = partial(_of_rows, remembered)
        for name, seeds in systems.items():
            for weight in args.weights:
                mixed = [mixture([one], K, of_rows, weight) for one in seeds]
                label = f"{name}, weight {weight:g}, power {power:g}"
                found[name][label] = [ranks(one, targets) for one in mixed]
        found["model"]["memory"] = [ranks(ranked(remembered), targets)] * len(lists)
    tables = {name: compare_ranks(table, name, K) for name, table in found.items()}
    for label, theirs in found.get(SASREC, {}).items():
        own = label.replace(SASREC, "model")
        both = {label: theirs, own: found["model"][own]}
        tables[f"{own} minus {SASREC}"] = compare_ranks(both, label, K)
    return {
        "split": config["split"],
        "rows": len(rows),
        "memory": told["description"],
        "tables": tables,
    }


def quick(args: argparse.Namespace, folder: Path) -> None:
    """A shop of its own and a tiny model of one epoch."""
    run = folder / "run"
    for stage, flags in {
        "prepare": "--format synthetic --n_users 200 --n_items 100",
        "embed": "--dim 16",
        "quantize": "--n_levels 2 --codebook_size 16 --report_map pca",
        "build_dataset": "--tasks sequential --sequential_mode whole_history --n_templates 1",
        "sft": "--size tiny --num_train_epochs 1 --eval_rows 0 --save_strategy no --use_cpu true "
        "--bf16 false --report_to none --gradient_checkpointing false --loss_over trie",
        "recommend": "--split valid --k 30 --beam_width 30",
    }.items():
        genrec(stage, "--run_dir", str(run), *flags.split())
    args.runs, args.weights, args.powers = [run], [0.2], [2.0]


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--runs", type=Path, nargs="*", help="seeds of one system, with lists of 50"
    )
    parser.add_argument("--weights", type=float, nargs="*", default=[0.1, 0.2, 0.3])
    parser.add_argument("--powers", type=float, nargs="*", default=[2.0])
    parser.add_argument("--cache_dir", help="of baselines; default: as in evaluate")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            quick(args, Path(folder))
        elif not args.runs:
            raise SystemExit("--runs is needed: run folders with recommendations (or --quick)")
        report = measure(args)
    for table in report["tables"].values():
        for name, row in table.items():
            print(f"{name:40} {json.dumps(row)}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
