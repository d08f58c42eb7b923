"""Prune: score the training rows on a small surrogate and keep a share of them (DEALRec).

    genrec prune --run_dir runs/beauty --shares 0.1 0.3
    genrec prune --run_dir runs/beauty --methods dealrec random --shares 0.1
    genrec build_dataset --run_dir runs/beauty \
        --keep_rows runs/beauty/pruning/kept-dealrec-0.1.parquet

Needs the prepare stage alone. Trains SASRec on the training rows (validation rows only decide when
it stops; test rows are never read), and writes `<run_dir>/pruning/`: scores.parquet (row_id,
influence, effort, loss, score) and kept-<method>-<share>.parquet (row_id), both in the order of
train.parquet. CPU only: for 100,000 interactions the surrogate takes minutes and so do the scores.

Whether a method beats a random draw of the same size depends on the data and on the share: measure
it (recipes/benchmarks/pruning.py) before relying on it.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field

import polars as pl

from genrec.artifacts import Stage, stage_folder, write_parquet
from genrec.columns import ROW_ID, SEEN
from genrec.config import check_choice, parse, run
from genrec.data.splits import read_split
from genrec.evaluation.sequential import SequentialSettings, train_sequential
from genrec.evaluation.surrogate import score_rows
from genrec.item_lists import ItemLists
from genrec.tasks.pruning import METHODS, budget_of, select

logger = logging.getLogger("genrec.prune")


@dataclass
class PruneArgs:
    """Settings of the prune stage."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    methods: list[str] = field(default_factory=lambda: ["dealrec"])  # of METHODS
    shares: list[float] = field(default_factory=lambda: [0.1])  # of the training rows to keep
    effort_weight: float = 0.5  # of effort against influence in the score
    groups: int = 50  # score intervals that dealrec's draws cover
    damping: float = 0.01  # added to the Hessian; grows where it isn't positive definite
    curvature_rows: int = 2000  # rows that the Hessian is estimated on
    # The surrogate
    dim: int = 64
    layers: int = 2
    dropout: float = 0.3
    max_epochs: int = 50
    patience: int = 3
    seed: int = 0  # of the surrogate and of the draws

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        for name in ("methods", "shares"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values} must be distinct, at least one")
        for method in self.methods:
            check_choice("methods", method, METHODS)
        for share in self.shares:
            budget_of(share, 1)
        if not self.effort_weight >= 0:
            raise ValueError(f"effort_weight={self.effort_weight} must be at least 0")
        if not self.damping > 0:
            raise ValueError(f"damping={self.damping} must be above 0")
        for name in ("groups", "curvature_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self.surrogate()

    def surrogate(self) -> SequentialSettings:
        """Hyper-parameters of the surrogate."""
        return SequentialSettings(
            dim=self.dim,
            layers=self.layers,
            dropout=self.dropout,
            max_epochs=self.max_epochs,
            patience=self.patience,
        )


def main() -> None:
    """Run the stage."""
    args = parse(PruneArgs)
    stage = Stage(args.run_dir, "prune", asdict(args), ["prepare"])
    if stage.is_done(args.overwrite):
        return
    train = read_split(args.run_dir, "train", "prune")
    valid = read_split(args.run_dir, "valid", "prune")
    catalog = pl.scan_parquet(stage_folder(args.run_dir, "prepare") / "catalog.parquet", glob=False)
    n_items = int(catalog.select(pl.len()).collect().item())
    checkpoint = stage.folder / "surrogate.pt"  # a killed run goes on from its last measurement
    trained = train_sequential(
        train, valid, ItemLists.from_column(valid[SEEN]), n_items, args.surrogate(), args.seed,
        checkpoint,
    )  # fmt: skip
    table, facts = score_rows(
        trained.model, train, args.effort_weight, args.damping, args.curvature_rows, seed=args.seed
    )
    write_parquet(stage.folder / "scores.parquet", table)
    columns = {name: table[name].to_numpy() for name in table.columns if name != ROW_ID}
    kept_rows = {}
    for method in args.methods:
        for share in args.shares:
            kept = select(method, columns, share, args.seed, args.groups)
            name = f"kept-{method}-{share:g}.parquet"
            write_parquet(stage.folder / name, table.select(ROW_ID)[kept])
            kept_rows[name] = len(kept)
            print(f"{stage.folder / name}: {len(kept):,} of {table.height:,} rows")
    checkpoint.unlink(missing_ok=True)
    metrics = {"surrogate": trained.best, "influence": facts, "kept_rows": kept_rows}
    stage.finish(rows=table.height, seed=args.seed, metrics=metrics)


if __name__ == "__main__":
    run(main)
