"""Split rows + semantic ids + prompts -> instruction rows.

    genrec build_dataset --config recipes/configs/quickstart/build_dataset.yaml

Writes ``dataset/{train,rl,valid,test}.parquet`` with row_id, user_id, task, template, prompt,
completion, target_item_id and history_item_ids, and a copy of the templates, so that the run
explains itself.
"""

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import polars as pl

from genrec.artifacts import Stage, stage_folder, write_parquet
from genrec.columns import (
    COMPLETION,
    HISTORY,
    ITEM_INDEX,
    POSITION,
    PROMPT,
    ROW_ID,
    SEEN,
    SUPERVISE_FROM,
    TARGET,
    TASK,
    USER_ID,
)
from genrec.config import check_choice, parse, run
from genrec.data.splits import read_split
from genrec.prompts import PromptRenderer
from genrec.semantic_ids import SemanticIds
from genrec.tasks.item_index import SID_TO_TITLE, TITLE_TO_SID, item_index_rows
from genrec.tasks.sequential import FAMILY, explode, sequential_rows

TASKS = (FAMILY, TITLE_TO_SID, SID_TO_TITLE)
MODES = ("whole_history", "per_item")


@dataclass
class DatasetArgs:
    """Settings of the build_dataset stage."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    tasks: list[str] = field(default_factory=lambda: list(TASKS))
    # whole_history: a row per user, every item of the history is supervised in one causal pass.
    # per_item: a row per supervised item.
    sequential_mode: str = "whole_history"
    n_templates: int | None = None  # use the first so many seen templates per family; default all
    item_rows: int | None = None  # at most so many rows per item<->index family; default all items
    prompts_dir: str | None = None  # your own templates; default: genrec's
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_choice("sequential_mode", self.sequential_mode, MODES)
        for task in self.tasks:
            check_choice("tasks", task, TASKS)
        if FAMILY not in self.tasks:
            raise ValueError(f"tasks={self.tasks} must include {FAMILY!r}: it is what is served")
        if self.n_templates is not None and self.n_templates < 1:
            raise ValueError(f"n_templates={self.n_templates} must be at least 1")


def rl_rows(
    train: pl.DataFrame,
    data: Path,
    semantic_ids: SemanticIds,
    renderer: PromptRenderer,
    serving: str,
) -> pl.DataFrame:
    """One RL row per user: the last training interaction, with what was bought before it."""
    # How many of a user's interactions are in training, whatever the protocol holds out.
    supervised = pl.col(HISTORY).list.len().cast(pl.Int64) + 1 - pl.col(SUPERVISE_FROM)
    trained = train.group_by(USER_ID).agg(supervised.sum().alias("_trained"))
    last = train.group_by(USER_ID, maintain_order=True).last()
    last = last.filter(pl.col(HISTORY).list.len() > 0)
    last = last.with_columns(pl.col(HISTORY).list.len().cast(pl.Int32).alias(SUPERVISE_FROM))
    earlier = (
        pl.read_parquet(data / "interactions.parquet")
        .join(trained, on=USER_ID)
        # Without validation, test and the RL target itself.
        .filter(pl.col(POSITION) < pl.col("_trained") - 1)
        .group_by(USER_ID)
        .agg(pl.col(ITEM_INDEX).unique().sort().alias(SEEN))
    )
    rows = sequential_rows(last, semantic_ids, renderer, serving).with_columns(
        last[ROW_ID].str.replace("train", "rl").alias(ROW_ID), last[TARGET]
    )
    return rows.join(earlier, on=USER_ID, how="left", maintain_order="left").with_columns(
        pl.col(SEEN).fill_null([])
    )


def main() -> None:
    """Run the stage."""
    args = parse(DatasetArgs)
    renderer = PromptRenderer(args.prompts_dir)
    config = {**asdict(args), "prompts_sha256": renderer.sha256()}
    ignore = ["prompts_dir"]
    stage = Stage(args.run_dir, "build_dataset", config, ["prepare", "quantize"], ignore=ignore)
    if stage.is_done(args.overwrite):
        return
    data = stage_folder(args.run_dir, "prepare")
    semantic_ids = SemanticIds.load(stage_folder(args.run_dir, "quantize"))
    catalog = pl.read_parquet(data / "catalog.parquet")
    train = read_split(args.run_dir, "train", "build_dataset")
    rows = explode(train) if args.sequential_mode == "per_item" else train
    parts = [sequential_rows(rows, semantic_ids, renderer, None, args.seed, args.n_templates)]
    for family in (TITLE_TO_SID, SID_TO_TITLE):
        if family in args.tasks:
            part = item_index_rows(
                family, catalog, semantic_ids, renderer, parts[0]["user_id"].dtype, args.seed,
                args.n_templates,
            )  # fmt: skip
            if args.item_rows is not None and args.item_rows < len(part):
                part = part.sample(args.item_rows, seed=args.seed)
            parts.append(part)
    table = pl.concat(parts)
    write_parquet(stage.folder / "train.parquet", table)
    serving = renderer.names(FAMILY)[0]
    for split in ("valid", "test"):
        split_rows = read_split(args.run_dir, split, "build_dataset")
        write_parquet(
            stage.folder / f"{split}.parquet",
            sequential_rows(split_rows, semantic_ids, renderer, serving),
        )
    write_parquet(
        stage.folder / "rl.parquet", rl_rows(train, data, semantic_ids, renderer, serving)
    )
    shutil.copytree(renderer.folder, stage.folder / "prompts", dirs_exist_ok=True)
    counts = dict(table.group_by(TASK).len().sort(TASK).iter_rows())
    metrics = {
        "rows_per_task": counts,
        "serving_template": serving,
        "prompts_sha256": renderer.sha256(),
    }
    stage.finish(rows=len(table), seed=args.seed, metrics=metrics)
    print("; ".join(f"{task}: {count:,} rows" for task, count in counts.items()))
    for row in table.group_by(TASK, maintain_order=True).head(1).iter_rows(named=True):
        print(f"  [{row[TASK]}] {row[PROMPT][:120]!r} -> {row[COMPLETION][:60]!r}")


if __name__ == "__main__":
    run(main)
