"""Baselines: every baseline on a run's split in one command, cached for all later evaluations.

    genrec baselines --run_dir runs/beauty --dataset "Amazon 2014 Beauty"
    genrec baselines --run_dir runs/beauty --baselines SASRec BERT4Rec --training_seeds 0 1 2

Needs the prepare stage alone (content-kNN also embed). Popularity, kNN and EASE take minutes;
SASRec and BERT4Rec, full softmax over the catalogue, take an hour per training seed on one CPU core
for Beauty, and use a GPU where there is one. They are checkpointed after every measurement: a
killed run goes on where it was, on another device too.

The table shows validation by default, so that choices can be made on it; `--split test` notes its
reading in `<run_dir>/test_reads.jsonl`. What was tuned and learned serves both splits, lists of
any length, and every later `genrec evaluate` that looks into the same cache: of a run beside this
one, or of any run where GENREC_CACHE (or `--cache_dir`) names one folder.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np

from genrec.artifacts import require, stage_folder
from genrec.columns import USER_ID
from genrec.config import check_choice, make_console, parse, run
from genrec.data.splits import read_split
from genrec.evaluation.baselines import DEVICES, UnfitData
from genrec.evaluation.comparison import compare, comparison_table
from genrec.evaluation.lists import relevant_items
from genrec.evaluation.suite import (
    BASELINES,
    FIT_ON,
    baseline,
    cache_folder,
    load_split_data,
)

logger = logging.getLogger("genrec.baselines")


@dataclass
class BaselinesArgs:
    """Settings of the command; they must match evaluate's for its cache to be found."""

    run_dir: str = "runs/default"
    dataset: str | None = None  # name printed above the table; default: the run folder's
    baselines: list[str] = field(default_factory=lambda: list(BASELINES))
    split: str = "valid"
    filter_seen: bool = True
    k: int = 10  # list length
    training_seeds: list[int] = field(default_factory=lambda: [0, 1, 2])  # of SASRec and BERT4Rec
    fit_on: str = "train"
    # Default: the environment variable GENREC_CACHE, or baselines-cache beside the run folder
    cache_dir: str | None = None
    device: str = "auto"  # of SASRec and BERT4Rec: auto, cpu or cuda
    samples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        for name in self.baselines:
            check_choice("baselines", name, BASELINES)
        check_choice("split", self.split, ("valid", "test"))
        check_choice("fit_on", self.fit_on, FIT_ON)
        check_choice("device", self.device, DEVICES)
        if self.device == "cuda":  # torch is imported only to ask
            from genrec.evaluation.sequential import compute_device

            compute_device(self.device)
        if self.fit_on != "train" and self.split == "valid":
            raise ValueError("fit_on=train+valid holds the validation targets; use --split test")
        for name in ("k", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.training_seeds or len(set(self.training_seeds)) < len(self.training_seeds):
            raise ValueError(f"training_seeds={self.training_seeds} must be distinct, at least one")


def main() -> None:
    """Make or find the lists, score them, print the table."""
    args = parse(BaselinesArgs)
    require(args.run_dir, "prepare")
    rows = read_split(args.run_dir, args.split, "baselines", systems=args.baselines)
    data = load_split_data(args.run_dir, rows, args.split, args.k, args.filter_seen, args.fit_on)
    cache = cache_folder(args.run_dir, args.cache_dir)
    lists, notes = {}, []
    for name in dict.fromkeys(args.baselines):
        try:
            found = baseline(name, data, cache, args.seed, args.training_seeds, args.device)
        except UnfitData as error:
            notes.append(f"{name} is left out: {error}")
            continue
        lists[name] = found.lists
        notes.append(f"{name}: {found.settings.get('description', 'nothing to tune')}")
    if not lists:
        raise ValueError("no baseline could run: " + "; ".join(notes))
    comparison = compare(
        lists,
        relevant_items(rows),
        data.n_items,
        sorted({min(5, args.k), args.k}),
        samples=args.samples,
        seed=args.seed,
        groups=rows[USER_ID].rank("dense").to_numpy().astype(np.int64) - 1,
    )
    columns = [f"{m}@{k}" for k in sorted({min(5, args.k), args.k}) for m in ("HR", "NDCG")]
    rule = "left out" if args.filter_seen else "allowed"
    name = args.dataset or stage_folder(args.run_dir, "prepare").resolve().parent.name
    title = f"{name}, {args.split}: {rows.height:,} rows, seen items {rule}"
    console = make_console(markup=True)
    console.print(comparison_table(comparison, columns, title))
    console.print("\n".join([*notes, f"cached in {cache}"]), markup=False)


if __name__ == "__main__":
    run(main)
