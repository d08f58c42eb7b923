"""Lists of several runs -> one list each, by the mean of the models' probabilities.

    genrec ensemble --runs runs/mine/seed-0 runs/mine/seed-1 --output lists/both.parquet
    genrec evaluate --run_dir runs/mine/seed-0 --recommendations lists/both.parquet --system both

The runs are of one split; their models and semantic ids may differ. Make their lists longer than
the ensemble's (`recommend --k 50`): what a model doesn't list has no probability from it. Nothing
that exists is overwritten. `evaluate` needs an `--output_dir` of its own, too.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path

from genrec.artifacts import load_manifest, read_shards, stage_folder, write_parquet
from genrec.config import parse, run
from genrec.evaluation.ensembles import mixture

logger = logging.getLogger("genrec.ensemble")


@dataclass
class EnsembleArgs:
    """Settings of ensemble."""

    runs: list[str] = field(default_factory=list)  # run folders with recommendations, two or more
    output: str = ""  # a Parquet file that doesn't exist yet
    k: int = 10  # length of the lists

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        if len(self.runs) < 2 or len({Path(r).resolve() for r in self.runs}) < len(self.runs):
            raise ValueError(f"runs={self.runs} must name at least two run folders, each once")
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


def main() -> None:
    """Run the command."""
    args = parse(EnsembleArgs)
    check_runs(args.runs, args.k)
    lists = [read_shards(stage_folder(r, "recommend"), "recommendations") for r in args.runs]
    mixed = mixture(lists, args.k)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(output, mixed)
    n_rows = mixed["row_id"].n_unique()
    print(f"{n_rows:,} lists of {args.k} by {len(args.runs)} models: {output}")


if __name__ == "__main__":
    run(main)
