"""Benchmark: what does a daily refresh (`sft --warm_start`) gain, and what does it forget?

    python recipes/benchmarks/refresh.py                 # two seeds; minutes to half an hour on CPU
    python recipes/benchmarks/refresh.py --quick         # a small shop, under a minute

The synthetic shop is cut at two moments with the time-cutoff protocol. A base model is trained on
what lies before the first one. Then, with what came since (later interactions, new users, items
that were released meanwhile; the SID map is extended), four ways to serve the later catalogue:

    none      the base model as it is
    warm      warm start without replay
    replay    warm start with `--replay_share` (0.3)
    anew      trained from zero on everything, with the base model's settings

Each is measured by NDCG@10 of constrained beam search over the whole later catalogue, scores over
the full vocabulary. Seen items are left out, and so are rows whose target the user had before
(consumables are bought again): finding them is no matter of what a model learned lately.

    later     the later test rows
    new       of these, targets that the base model's catalogue lacked
    old       the base run's test rows of users who are kept out of all later training: what a model
              knew about them and may have forgotten (others' old test rows are trained on by then)

Intervals are over rows, and over seeds where there are several (a seed is another shop and another
training); differences from `none` are paired by row. A synthetic shop: what is new there follows
the rules of what is old, apart from novelty's pull, so real catalogues will forget more or less
than this one. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import runpy
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec import modeling
from genrec.artifacts import read_json, require, stage_folder
from genrec.columns import ITEM_ID, ITEM_INDEX, PROMPT, RELEVANT, SEEN, TARGET, TIMESTAMP, USER_ID
from genrec.data.splits import read_split
from genrec.data.synthetic import DAYS, EPOCH, synthetic_shop
from genrec.decoding.beam import default_beam_width
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.evaluation.significance import bootstrap_means, interval
from genrec.metrics import gains, target_rank
from genrec.semantic_ids import SemanticIds

K = 10
WAYS = ("none", "warm", "replay", "anew")
FloatArray = npt.NDArray[np.float64]
RECIPES = Path(__file__).resolve().parents[1]
TABLES = (
    "--format table --interactions log.parquet --items items.parquet --time_column timestamp "
    "--brand_column brand --category_column categories --description_column description "
    "--protocol time-cutoff"
).split()
# Days before the end of the shop: of the base run, then of the later one.
BASE = {"valid_from": 200, "test_from": 180, "until": 140}
LATER = {"valid_from": 50, "test_from": 30, "until": 0}


@dataclass(frozen=True)
class Rows:
    """Rows that a model is measured on."""

    prompts: list[str]
    targets: npt.NDArray[np.int64]
    seen: list[npt.NDArray[np.int64]]


def moment(days_before_the_end: int) -> int:
    """Unix seconds of a day of the shop."""
    return EPOCH + (DAYS - days_before_the_end) * 86_400


def recipe(name: str, run_dir: Path, *flags: object) -> float:
    """Run a recipe in this process, so that heavy imports are made once; its seconds."""
    started = time.perf_counter()
    argv = [f"{name}.py", "--run_dir", str(run_dir), *map(str, flags)]
    with patch.object(sys, "argv", argv), redirect_stdout(io.StringIO()):
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    return time.perf_counter() - started


def make_runs(args: argparse.Namespace, folder: Path, seed: int) -> tuple[Path, Path, pl.Series]:
    """The base run with its model, the later run up to its rows, and the users kept out of it."""
    shop = synthetic_shop(args.users, args.items, seed)
    users = shop.interactions[USER_ID].unique().sort()
    kept_out = users.sample(fraction=args.kept_out, seed=seed).sort()
    for name, days in (("base", BASE), ("later", LATER)):
        log = shop.interactions.filter(pl.col(TIMESTAMP) < moment(days["until"]))
        if name == "later":
            gone = pl.col(USER_ID).is_in(kept_out.implode())
            log = log.filter(~gone | (pl.col(TIMESTAMP) < moment(BASE["valid_from"])))
        there = pl.col(ITEM_ID).is_in(log[ITEM_ID].unique().implode())
        (folder / name).mkdir(parents=True)
        log.write_parquet(folder / name / "log.parquet")
        shop.catalog.filter(there).write_parquet(folder / name / "items.parquet")
    base, later = folder / "base-run", folder / "later-run"
    for name, run_dir, days in (("base", base, BASE), ("later", later, LATER)):
        cuts = (
            "--valid_from",
            moment(days["valid_from"]),
            "--test_from",
            moment(days["test_from"]),
        )
        recipe("prepare", run_dir, *TABLES, "--data_dir", folder / name, *cuts)
        extend = ("--extend", base) if name == "later" else ()
        shape = ("--n_levels", 3, "--codebook_size", args.codebook_size)
        recipe("embed", run_dir, *(extend or ("--dim", 32)))
        recipe("quantize", run_dir, *(extend or shape), "--report_map", "pca")
        recipe("build_dataset", run_dir)
    return base, later, kept_out


def train(args: argparse.Namespace, run_dir: Path, seed: int, *flags: object) -> dict[str, Any]:
    """Train, and what it cost."""
    common = (
        "--size", args.size, "--vocab_size", 1000, "--seed", seed, "--eval_rows", args.eval_rows,
        "--per_device_train_batch_size", 16, "--report_to", "none", "--disable_tqdm", "true",
        "--save_strategy", "no", "--gradient_checkpointing", "false", "--normalizer", "full",
        "--bf16", "false", *(("--use_cpu", "true") if args.cpu else ()),
    )  # fmt: skip
    seconds = recipe("sft", run_dir, *common, *flags)
    made = require(run_dir, "sft")
    log = read_json(run_dir / "sft" / "log.json")
    return {
        "seconds": round(seconds, 1),
        "steps": max(entry["step"] for entry in log),
        "rows_an_epoch": made.rows,
        "best_step": made.metrics["best"]["step"],
        "refresh": {k: v for k, v in made.metrics.get("warm_start", {}).items() if k != "lineage"},
    }


def measured_rows(base: Path, later: Path, kept_out: pl.Series) -> dict[str, Rows]:
    """The rows of each measurement, with targets and seen items as rows of the later catalogue."""
    now, before = (
        pl.read_parquet(stage_folder(run, "prepare") / "catalog.parquet", glob=False)
        for run in (later, base)
    )
    test = read_split(later, "test", "benchmark").with_columns(_prompts(later))
    is_new = ~now[ITEM_ID].is_in(before[ITEM_ID].implode())
    new = test.explode(RELEVANT).with_columns(pl.col(RELEVANT).alias(TARGET))
    new = new.filter(pl.Series(is_new).gather(new[TARGET]))
    moved = before.select(ITEM_ID).join(
        now.select(ITEM_ID, ITEM_INDEX), ITEM_ID, "left", maintain_order="left"
    )
    place = moved[ITEM_INDEX].to_numpy()  # none is missing: the later log holds the earlier one
    old = read_split(base, "test", "benchmark").with_columns(_prompts(base))
    old = old.filter(pl.col(USER_ID).is_in(kept_out.implode()))
    same = np.arange(now.height)
    return {"later": _rows(test, same), "new": _rows(new, same), "old": _rows(old, place)}


def _prompts(run: Path) -> pl.Series:
    path = stage_folder(run, "build_dataset") / "test.parquet"
    return pl.read_parquet(path, columns=[PROMPT], glob=False)[PROMPT]


def _rows(table: pl.DataFrame, place: npt.NDArray[np.int64]) -> Rows:
    table = table.filter(~pl.col(SEEN).list.contains(pl.col(TARGET)))
    return Rows(
        table[PROMPT].to_list(),
        place[table[TARGET].to_numpy()].astype(np.int64),
        [place[np.array(items, dtype=np.int64)] for items in table[SEEN].to_list()],
    )


def ndcg(model_folder: Path, later: Path, rows: dict[str, Rows]) -> dict[str, FloatArray]:
    """NDCG@10 of each row of each measurement."""
    semantic_ids = SemanticIds.load(stage_folder(later, "quantize"))
    model, tokenizer, _ = modeling.load_model(model_folder, semantic_ids)
    engine = TorchEngine(
        model, trie=SidTrie.build(semantic_ids.codes), normalizer="full",
        sid_token_ids=modeling.sid_token_ids(tokenizer, semantic_ids),
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    found = {}
    for name, part in rows.items():
        if not part.prompts:  # a small shop may have no new item in its last days
            found[name] = np.zeros(0)
            continue
        prompts = modeling.encode_prompts(tokenizer, part.prompts)
        lists = engine.search(prompts, K, default_beam_width(K), part.seen).items
        found[name] = gains(target_rank(lists, part.targets), K)
    return found


def one_seed(
    args: argparse.Namespace, folder: Path, seed: int
) -> tuple[dict[str, dict[str, FloatArray]], dict[str, Any]]:
    """Train and measure all ways; NDCG of every row, and what each cost."""
    base, later, kept_out = make_runs(args, folder, seed)
    whole = ("--num_train_epochs", args.epochs, "--learning_rate", args.learning_rate)
    warm = (
        "--num_train_epochs", args.warm_epochs, "--learning_rate", args.warm_learning_rate,
        "--warm_start", base,
    )  # fmt: skip
    flags = {
        "warm": (*warm, "--replay_share", 0),
        "replay": (*warm, "--replay_share", args.replay_share),
        "anew": whole,
    }
    costs = {"base": train(args, base, seed, *whole)}
    rows = measured_rows(base, later, kept_out)
    found = {"none": ndcg(base / "sft" / "model", later, rows)}
    for way, settings in flags.items():
        run_dir = folder / way
        shutil.copytree(later, run_dir)
        costs[way] = train(args, run_dir, seed, *settings)
        found[way] = ndcg(run_dir / "sft" / "model", later, rows)
    sizes = {name: len(part.prompts) for name, part in rows.items()}
    return found, {"cost": costs, "rows": sizes}


def summary(seeds: list[dict[str, dict[str, FloatArray]]]) -> dict[str, dict[str, Any]]:
    """NDCG@10 of each way and measurement, and its paired difference from `none`."""
    table: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        table[way] = {}
        for name in seeds[0][way]:
            values = [np.concatenate([s[w][name] for s in seeds]) for w in (way, "none")]
            entry: dict[str, Any] = {
                "ndcg@10": _with_interval(values[0]),
                "seeds": [round(float(s[way][name].mean()), 4) if len(s[way][name]) else None
                    for s in seeds],
            }  # fmt: skip
            if way != "none":
                entry["minus_none"] = _with_interval(values[0] - values[1])
            table[way][name] = entry
    return table


def _with_interval(values: FloatArray) -> list[float] | None:
    """Mean and the ends of its 95% bootstrap interval over the rows of all seeds."""
    if not len(values):
        return None
    ends = interval(float(values.mean()), bootstrap_means(values[:, None])[:, 0])
    return [round(float(v), 4) for v in (ends.value, ends.low or 0.0, ends.high or 0.0)]


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--codebook_size", type=int, default=16)
    parser.add_argument("--kept_out", type=float, default=0.3, help="share of users kept out later")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--size", default="tiny", choices=modeling.SIZES)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--warm_epochs", type=float, default=4)
    parser.add_argument("--warm_learning_rate", type=float, default=1e-3)
    parser.add_argument("--replay_share", type=float, default=0.3)
    parser.add_argument("--eval_rows", type=int, default=200)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="a small shop, one seed, few epochs")
    args = parser.parse_args()
    if args.quick:
        args.users, args.items, args.codebook_size, args.seeds = 300, 160, 8, 1
        args.epochs, args.warm_epochs, args.eval_rows = 2, 1, 40
    if args.seeds < 1 or not 0 < args.kept_out < 1:
        parser.error("--seeds must be at least 1, and --kept_out in (0, 1)")
    return args


def main() -> None:
    """Train and measure with every seed, print."""
    args = arguments()
    logging.getLogger("genrec").setLevel(logging.ERROR)
    started = time.perf_counter()
    found, facts = [], []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory(prefix="refresh-") as folder:
            values, about = one_seed(args, Path(folder), seed)
        found.append(values)
        facts.append(about)
        for way in WAYS:
            means = {name: round(float(v.mean()), 4) for name, v in values[way].items() if len(v)}
            print(f"seed {seed} {way}: {means}", flush=True)
    table = summary(found)
    report = {
        "users": args.users, "items": args.items, "seeds": args.seeds, "size": args.size,
        "replay_share": args.replay_share, "ways": table, "runs": facts,
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip
    for way, measured in table.items():
        for name, entry in measured.items():
            print(f"{way:7s} {name:6s} {entry['ndcg@10']}  - none {entry.get('minus_none', '')}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
