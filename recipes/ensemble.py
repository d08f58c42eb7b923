"""Lists of several runs -> one list each, by the mean of the models' probabilities.

    genrec ensemble --runs runs/mine/seed-0 runs/mine/seed-1 --output lists/both.parquet
    genrec evaluate --run_dir runs/mine/seed-0 --recommendations lists/both.parquet --system both

With `memory_weight` a memory of the training rows speaks beside them, or beside a single model:
sequential-kNN, tuned on validation as the baseline is (kNN-LM, Khandelwal et al. 2020). It costs a
sparse product, and the first time the baseline's tuning, which is kept. On Beauty it brought more
than two further seeds, on Industrial nothing: choose its weight on validation lists, of the length
that is mixed later (`recipes/benchmarks/memory.py`).

    genrec ensemble --runs runs/mine --memory_weight 0.2 --output lists/remembered.parquet

The runs are of one split; their models and semantic ids may differ. Make their lists longer than
the ensemble's (`recommend --k 50`): what a model doesn't list has no probability from it. Nothing
that exists is overwritten. `evaluate` needs an `--output_dir` of its own, too.
"""

import logging
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import polars as pl

from genrec.artifacts import read_shards, stage_folder, write_parquet
from genrec.columns import ITEM_ID, ROW_ID, SEEN
from genrec.config import parse, run
from genrec.data.splits import read_split
from genrec.evaluation.ensembles import Memory, check_runs, mixture
from genrec.evaluation.item_memory import ItemMemory, memory_lists, memory_of_run
from genrec.generation.memory import POWER, check_power, check_weight
from genrec.item_lists import ItemLists, no_items

logger = logging.getLogger("genrec.ensemble")


@dataclass
class EnsembleArgs:
    """Settings of ensemble."""

    runs: list[str] = field(default_factory=list)  # run folders with recommendations
    memory_weight: float = 0.0  # of an item memory beside the models; then one run is enough
    memory_power: float = POWER  # its probabilities go by score ** power
    cache_dir: str | None = None  # of baselines' settings; default: as in evaluate
    output: str = ""  # a Parquet file that doesn't exist yet
    k: int = 10  # length of the lists

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_weight(self.memory_weight)
        check_power(self.memory_power)
        fewest = 1 if self.memory_weight else 2
        if len(self.runs) < fewest or len({Path(r).resolve() for r in self.runs}) < len(self.runs):
            number = "a run folder" if fewest == 1 else "at least two run folders"
            raise ValueError(f"runs={self.runs} must name {number}, each once")
        if not self.memory_weight and (self.memory_power != POWER or self.cache_dir):
            raise ValueError("memory_power and cache_dir are of a memory: set memory_weight, too")
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1")
        if not self.output.endswith(".parquet"):
            raise ValueError(f"output={self.output!r} must name a .parquet file")
        if Path(self.output).exists():
            raise ValueError(f"{self.output} exists; name another file")


def check_lengths(lengths: list[int], k: int) -> None:
    """Lists that are long enough."""
    if min(lengths) < k:
        raise ValueError(f"a run has lists of {min(lengths)}, fewer than k={k}")
    if min(lengths) < 3 * k:
        logger.warning(
            "a run's lists have %d items: make them three times as long as the ensemble's %d",
            min(lengths), k,
        )  # fmt: skip


def item_memory(args: EnsembleArgs, split: str, filter_seen: bool) -> Memory:
    """The memory of the first run's data, which all runs share; tuned when it is first asked."""
    run_dir = args.runs[0]

    @cache
    def fitted() -> tuple[ItemMemory, pl.DataFrame, pl.Series]:
        memory, told = memory_of_run(run_dir, filter_seen, args.cache_dir, args.memory_power)
        print(f"item memory: {told}")
        rows = read_split(run_dir, split, "ensemble", systems=["item memory"])
        catalog = pl.read_parquet(stage_folder(run_dir, "prepare") / "catalog.parquet", glob=False)
        return memory, rows, catalog[ITEM_ID]

    def remembered(row_ids: pl.Series) -> pl.DataFrame:
        memory, rows, item_ids = fitted()
        some = rows.filter(pl.col(ROW_ID).is_in(row_ids.implode()))
        seen = ItemLists.from_column(some[SEEN]) if filter_seen else no_items(len(some))
        return memory_lists(memory, some, seen, item_ids)

    return remembered


def main() -> None:
    """Run the command."""
    args = parse(EnsembleArgs)
    told = check_runs(args.runs, args.memory_weight > 0)
    check_lengths([config["k"] for config in told], args.k)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    lists = [read_shards(stage_folder(r, "recommend"), "recommendations") for r in args.runs]
    memory = None
    if args.memory_weight:
        memory = item_memory(args, told[0]["split"], told[0]["filter_seen"])
    mixed = mixture(lists, args.k, memory, args.memory_weight)
    write_parquet(output, mixed)
    n_rows = mixed["row_id"].n_unique()
    models = "1 model" if len(args.runs) == 1 else f"{len(args.runs)} models"
    beside = f" and a memory of weight {args.memory_weight:g}" if args.memory_weight else ""
    print(f"{n_rows:,} lists of {args.k} by {models}{beside}: {output}")


if __name__ == "__main__":
    run(main)
