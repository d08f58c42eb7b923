"""Benchmark: does pruning the training rows beat a random draw of as many?

    python recipes/benchmarks/pruning.py --run_dir runs/movielens-100k
    python recipes/benchmarks/pruning.py --quick        # a synthetic shop, under a minute

SASRec is trained on all rows and every row is scored by it (`genrec prune` does the same); then
SASRec is trained anew on what each method keeps: dealrec, random, highest loss, highest effort,
highest influence. All trainings get the same number of optimizer steps at most and the same
settings; dealrec and random draw anew with every seed. A third of the validation users decides
when a training stops, the other two thirds are what the figures are about: NDCG@10 over the whole
catalogue, seen items left out. Intervals are over users and seeds, differences from random are
paired by user.

A SASRec, not an LLM, is trained on the kept rows, so this says what the scores are worth to the
model that made them, the most favourable case. `--run_dir` is a prepared run; its test rows are not
read. CPU only. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from tqdm import tqdm

from genrec.artifacts import stage_folder
from genrec.columns import HISTORY, ROW_ID, SEEN, TARGET
from genrec.data.cleaning import clean
from genrec.data.splits import leave_one_out, read_split
from genrec.data.synthetic import synthetic_shop
from genrec.evaluation.sequential import (
    SequentialSettings,
    recommend_sequential,
    train_sequential,
)
from genrec.evaluation.significance import bootstrap_means, interval, resample_seeds
from genrec.evaluation.surrogate import score_rows
from genrec.item_lists import ItemLists
from genrec.metrics import gains, target_rank
from genrec.tasks.pruning import METHODS, select

K = 10
MEASUREMENTS = 12  # of a training, at most
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Setup:
    """Data and budget of all trainings.

    Attributes:
        train: all training rows.
        stopping: validation rows that decide when a training stops.
        scored: validation rows of the figures.
        n_items: size of the catalogue.
        settings: hyper-parameters, but for the number of epochs.
        steps: most optimizer steps of a training.
    """

    train: pl.DataFrame
    stopping: pl.DataFrame
    scored: pl.DataFrame
    n_items: int
    settings: SequentialSettings
    steps: int

    def settings_for(self, n_rows: int) -> SequentialSettings:
        """Epochs that give `n_rows` the common number of steps and of measurements."""
        per_epoch = -(-n_rows // self.settings.batch_size)
        every = max(1, round(self.steps / MEASUREMENTS / per_epoch))
        return replace(
            self.settings,
            epochs_per_measurement=every,
            max_epochs=max(every, self.steps // per_epoch // every * every),
        )


def load(args: argparse.Namespace) -> Setup:
    """The tables of `--run_dir`, or of a synthetic shop."""
    if args.quick:
        data = clean(synthetic_shop(n_users=400, n_items=200))
        splits = leave_one_out(data.interactions, data.catalog.height)
        train, valid, n_items = splits.train, splits.valid, data.catalog.height
    else:
        train = read_split(args.run_dir, "train", "benchmark")
        valid = read_split(args.run_dir, "valid", "benchmark")
        catalog = stage_folder(args.run_dir, "prepare") / "catalog.parquet"
        n_items = pl.read_parquet(catalog, columns=["item_index"], glob=False).height
    order = np.random.default_rng(0).permutation(valid.height)
    third = valid.height // 3
    settings = SequentialSettings(
        dim=args.dim, layers=args.layers, dropout=0.3, batch_size=args.batch_size, patience=4
    )
    return Setup(
        train, valid[np.sort(order[:third])], valid[np.sort(order[third:])], n_items, settings,
        args.steps,
    )  # fmt: skip


def train_on(setup: Setup, rows: pl.DataFrame, seed: int) -> Any:
    """SASRec on `rows`, stopped by the stopping users."""
    return train_sequential(
        rows, setup.stopping, ItemLists.from_column(setup.stopping[SEEN]), setup.n_items,
        setup.settings_for(rows.height), seed,
    ).model  # fmt: skip


def ndcg(setup: Setup, model: Any) -> FloatArray:
    """NDCG@10 of each scored row. ``# (n_rows,)``."""
    lists = recommend_sequential(
        model,
        ItemLists.from_column(setup.scored[HISTORY]),
        ItemLists.from_column(setup.scored[SEEN]),
        K,
    )
    return gains(target_rank(lists, setup.scored[TARGET].to_numpy()), K)


def summary(seeds: list[FloatArray], random: list[FloatArray]) -> dict[str, Any]:
    """Mean with interval, and the paired difference from random."""
    n_seeds = len(seeds)
    values = np.stack([c for s, r in zip(seeds, random, strict=True) for c in (s, s - r)], axis=1)
    spread = resample_seeds(bootstrap_means(values).reshape(-1, n_seeds, 2), 0)
    means = values.mean(axis=0).reshape(n_seeds, 2)
    found: dict[str, Any] = {}
    for at, name in enumerate(("ndcg@10", "minus_random")):
        ends = interval(float(means[:, at].mean()), spread[:, at])
        found[name] = np.round([ends.value, ends.low, ends.high], 4).tolist()
    found["seeds"] = means[:, 0].round(4).tolist()
    return found


def correlations(scores: pl.DataFrame) -> dict[str, float]:
    """Rank correlations of the scores: how far the methods choose alike."""
    pairs = [("influence", "effort"), ("influence", "loss"), ("effort", "loss"),
        ("score", "influence"), ("score", "effort")]  # fmt: skip
    ranked = scores.select(pl.corr(a, b, method="spearman").alias(f"{a}~{b}") for a, b in pairs)
    return {name: round(float(value), 3) for name, value in ranked.row(0, named=True).items()}


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run_dir", type=Path, help="run with prepare done")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.02, 0.1, 0.3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of a training")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--effort_weight", type=float, default=0.5)
    parser.add_argument("--groups", type=int, default=50)
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--quick", action="store_true", help="a synthetic shop, fewer steps")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.dim, args.layers = min(args.steps, 80), 32, 1
    elif args.run_dir is None:
        parser.error("--run_dir is needed: a run with prepare done (or --quick)")
    if args.seeds < 1 or not all(0 < share <= 1 for share in args.shares):
        parser.error("--seeds must be at least 1, and every share in (0, 1]")
    if "random" not in args.methods:
        args.methods.append("random")  # what the others are compared with
    return args


def main() -> None:
    """Score the rows, train on what each method keeps, print."""
    args = arguments()
    logging.getLogger("genrec").setLevel(logging.ERROR)  # its warnings that a cap was reached
    started = time.perf_counter()
    setup = load(args)
    found: dict[str, list[FloatArray]] = {"all": []}
    trainings = args.seeds * (1 + len(args.shares) * len(args.methods))
    with tqdm(total=trainings, desc="trainings") as bar:

        def measure(label: str, model: Any) -> None:
            found.setdefault(label, []).append(ndcg(setup, model))
            bar.update()
            tqdm.write(f"{label}: NDCG@{K} {found[label][-1].mean():.4f}")

        surrogate = train_on(setup, setup.train, 0)
        measure("all", surrogate)
        clock = time.perf_counter()
        scores, facts = score_rows(surrogate, setup.train, args.effort_weight, args.damping)
        scoring = time.perf_counter() - clock
        columns = {name: scores[name].to_numpy() for name in scores.columns if name != ROW_ID}
        for seed in range(args.seeds):
            if seed:
                measure("all", train_on(setup, setup.train, seed))
            for share in args.shares:
                for method in args.methods:
                    kept = select(method, columns, share, seed, args.groups)
                    measure(f"{method} {share:g}", train_on(setup, setup.train[kept], seed))
    table = {
        f"{share:g}": {
            method: summary(found[f"{method} {share:g}"], found[f"random {share:g}"])
            for method in args.methods
        }
        for share in args.shares
    }
    report = {
        "train_rows": setup.train.height,
        "scored_rows": setup.scored.height,
        "items": setup.n_items,
        "seeds": args.seeds,
        "steps": setup.steps,
        "all_rows_ndcg@10": round(float(np.mean(found["all"])), 4),
        "shares": table,
        "rank_correlations": correlations(scores),
        "influence": facts,
        "scoring_seconds": round(scoring, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }
    for share, methods in table.items():
        for method, values in methods.items():
            print(f"{share:>5} {method:10s} {values['ndcg@10']}  - random {values['minus_random']}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
