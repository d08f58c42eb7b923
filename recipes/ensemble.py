"""Lists of several runs -> one list each, by the mean of the models' probabilities.

    genrec ensemble --runs runs/mine/seed-0 runs/mine/seed-1 --output lists/both.parquet
    genrec evaluate --run_dir runs/mine/seed-0 --recommendations lists/both.parquet --system both

With `memory_weight` a memory of the training rows speaks beside them, or beside a single model:
sequential-kNN, tuned on validation as the baseline is (kNN-LM, Khandelwal et al. 2020). It costs a
sparse product and often brings more than another seed; choose weight and power on validation lists.

    genrec ensemble --runs runs/mine --memory_weight 0.2 --output lists/remembered.parquet

The runs are of one split; their models and semantic ids may differ. Make their lists longer than
the ensemble's (`recommend --k 50`): what a model doesn't list has no probability from it. Nothing
that exists is overwritten. `evaluate` needs an `--output_dir` of its own, too.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from genrec.artifacts import load_manifest, read_shards, require, stage_folder, write_parquet
from genrec.columns import ITEM_ID, ROW_ID
from genrec.config import parse, run
from genrec.data.splits import read_split
from genrec.evaluation.ensembles import mixture
from genrec.evaluation.item_memory import memory_lists
from genrec.evaluation.suite import cache_folder, load_split_data, tuned_memory

logger = logging.getLogger("genrec.ensemble")


@dataclass
class EnsembleArgs:
    """Settings of ensemble."""

    runs: list[str] = field(default_factory=list)  # run folders with recommendations
    memory_weight: float = 0.0  # of an item memory beside the models; then one run is enough
    memory_power: float = 2.0  # its probabilities go by score ** power
    cache_dir: str | None = None  # of baselines' settings; default: as in evaluate
    output: str = ""  # a Parquet file that doesn't exist yet
    k: int = 10  # length of the lists

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        if not 0 <= self.memory_weight < 1:
            raise ValueError(f"memory_weight={self.memory_weight} must be at least 0 and below 1")
        if not self.memory_power > 0:
            raise ValueError(f"memory_power={self.memory_power} must be above 0")
        fewest = 1 if self.memory_weight else 2
        if len(self.runs) < fewest or len({Path(r).resolve() for r in self.runs}) < len(self.runs):
            number = "a run folder" if fewest == 1 else "at least two run folders"
            raise ValueError(f"runs={self.runs} must name {number}, each once")
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1")
        if not self.output.endswith(".parquet"):
            raise ValueError(f"output={self.output!r} must name a .parquet file")
        if Path(self.output).exists():
            raise ValueError(f"{self.output} exists; name another file")


def check_runs(runs: list[str], k: int) -> None:
    """Lists of one split, with the same rule for seen items, long enough."""
    told = []
    for folder in runs:
        manifest = load_manifest(folder, "recommend")
        if manifest is None:
            raise ValueError(f"{folder} has no finished recommendations; run recommend first")
        told.append((manifest.inputs["prepare"], manifest.config))
    for folder, (data, config) in zip(runs[1:], told[1:], strict=True):
        for name in ("split", "filter_seen"):
            if config[name] != told[0][1][name]:
                raise ValueError(
                    f"{folder} was made with {name}={config[name]}, {runs[0]} with "
                    f"{told[0][1][name]}; they can't be mixed"
                )
        if data != told[0][0]:
            raise ValueError(f"{folder} and {runs[0]} are of different data; they can't be mixed")
    shortest = min(config["k"] for _, config in told)
    if shortest < k:
        raise ValueError(f"a run has lists of {shortest}, fewer than k={k}")
    if shortest < 3 * k:
        logger.warning(
            "a run's lists have %d items: make them three times as long as the ensemble's %d",
            shortest, k,
        )  # fmt: skip


def remembered(args: EnsembleArgs, row_ids: pl.Series) -> pl.DataFrame:
    """Lists of the item memory for the rows that the models have lists for."""
    run_dir = args.runs[0]
    config = require(run_dir, "recommend").config
    rows = read_split(run_dir, config["split"], "ensemble", systems=["item memory"])
    rows = rows.filter(pl.col(ROW_ID).is_in(row_ids.implode()))
    data = load_split_data(run_dir, rows, config["split"], args.k, config["filter_seen"])
    memory, told = tuned_memory(data, cache_folder(run_dir, args.cache_dir))
    print(f"item memory: {told['description']} (validation NDCG@10 {told['valid_ndcg@10']:.4f})")
    catalog = pl.read_parquet(stage_folder(run_dir, "prepare") / "catalog.parquet", glob=False)
    return memory_lists(memory, rows, data.seen(rows), catalog[ITEM_ID], args.memory_power)


def main() -> None:
    """Run the command."""
    args = parse(EnsembleArgs)
    check_runs(args.runs, args.k)
    lists = [read_shards(stage_folder(r, "recommend"), "recommendations") for r in args.runs]
    memory = remembered(args, lists[0][ROW_ID].unique()) if args.memory_weight else None
    mixed = mixture(lists, args.k, memory, args.memory_weight)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(output, mixed)
    n_rows = mixed["row_id"].n_unique()
    models = "1 model" if len(args.runs) == 1 else f"{len(args.runs)} models"
    beside = f" and a memory of weight {args.memory_weight:g}" if args.memory_weight else ""
    print(f"{n_rows:,} lists of {args.k} by {models}{beside}: {output}")


if __name__ == "__main__":
    run(main)
