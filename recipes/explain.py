"""Why each item is in its list: measured evidence, chains, and checks of the chains.

    genrec explain --config recipes/configs/quickstart/explain.yaml --run_dir runs/quickstart

Leaves out one shown history item at a time and scores the same recommended items again. The words
around the numbers come from a template (rationale_origin=template), not from the model. Writes
``explanations/chains.jsonl`` (a chain per recommended item) and ``explanations/evidence.parquet``
(a row per recommended item and history position).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from tqdm import tqdm

from genrec.artifacts import Stage, read_shards, require, stage_folder, write_parquet
from genrec.chains import write_chains
from genrec.columns import (
    HISTORY,
    ITEM_ID,
    ITEM_INDEX,
    POSITION,
    RANK,
    ROW_ID,
    SCORE,
    USER_ID,
)
from genrec.config import check_choice, parse, run
from genrec.data.splits import read_split

if TYPE_CHECKING:
    from genrec.explain.assemble import Attributes
    from genrec.explain.evidence import Evidence, IntArray

WEIGHTS = ("float32", "bfloat16", "float16")


@dataclass
class ExplainArgs:
    """Settings of the explain stage."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    num_rows: int = 100  # lists to explain: a deterministic sample of those that recommend made
    users: list[str] = field(default_factory=list)  # explained beside the sample
    k: int = 10  # items per list to explain, from the top; a shorter list is explained whole
    n_cited: int = 3  # history items that a chain cites at most
    random_draws: int = 3  # random sets per chain that the cited one is compared with
    dtype: str | None = None  # of the weights; default: recommend's
    samples: int = 1000  # bootstrap samples of the 95% intervals
    batch_size: int = 64  # prompts scored together
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        if self.dtype is not None:
            check_choice("dtype", self.dtype, WEIGHTS)
        if self.num_rows < 0 or (self.num_rows == 0 and not self.users):
            raise ValueError(f"num_rows={self.num_rows} must be at least 1, or name some users")
        for name in ("k", "n_cited", "random_draws", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def chosen_rows(asked: pl.DataFrame, args: ExplainArgs) -> pl.DataFrame:
    """The rows to explain, in the order of their row ids: a sample, and all rows of `users`."""
    users = asked[USER_ID].cast(pl.String)
    if unknown := sorted(set(args.users) - set(users)):
        raise ValueError(
            f"users {unknown} have no list; recommend made lists for {asked.height} rows, e.g. of "
            f"users {', '.join(users.head(3))}"
        )
    sample = asked.sample(min(args.num_rows, asked.height), seed=args.seed)[ROW_ID]
    picked = pl.col(ROW_ID).is_in(sample.implode()) | users.is_in(args.users)
    return asked.filter(picked).sort(ROW_ID)


def item_matrix(lists: pl.DataFrame) -> IntArray:
    """Recommended catalogue rows, (lists, k); −1 pads."""
    row = lists[ROW_ID].rle_id().to_numpy()
    place = lists.select(pl.int_range(pl.len()).over(ROW_ID).alias("place"))["place"].to_numpy()
    items = np.full((int(row.max()) + 1, int(place.max()) + 1), -1, dtype=np.int64)
    items[row, place] = lists[ITEM_INDEX].to_numpy()
    return items


def evidence_table(
    attributes: Attributes,
    lists: pl.DataFrame,
    histories: list[IntArray],
    evidence: Evidence,
    cited: IntArray,
) -> pl.DataFrame:
    """Every measured Δ: row_id, rank, item_id, position, history_item_id, delta, cited."""
    row = lists[ROW_ID].rle_id().to_numpy()
    place = lists.select(pl.int_range(pl.len()).over(ROW_ID).alias("place"))["place"].to_numpy()
    deltas = evidence.deltas[row, place]  # (items, H)
    at, position = np.nonzero(~np.isnan(deltas))
    flat = np.array([histories[r][p] for r, p in zip(row[at], position, strict=True)], dtype=int)
    is_cited = (cited[row[at], place[at]] == position[:, None]).any(-1)
    return (
        lists[at]
        .select(ROW_ID, RANK, ITEM_ID)
        .with_columns(
            pl.Series(POSITION, position, dtype=pl.Int32),
            pl.Series("history_item_id", attributes.item_ids, dtype=lists[ITEM_ID].dtype)
            .gather(flat)
            .alias("history_item_id"),
            pl.Series("delta", deltas[at, position]),
            pl.Series("cited", is_cited, dtype=pl.Boolean),
        )
    )


def main() -> None:
    """Run the stage."""
    args = parse(ExplainArgs)
    recommended = require(args.run_dir, "recommend")
    made, model_run = recommended.config, recommended.config.get("model_run")
    settings = {**asdict(args), "normalizer": made["normalizer"]}
    settings["dtype"] = args.dtype or made["dtype"]
    inputs, of_model = ["prepare", "quantize", "recommend"], ["build_dataset", made["model_stage"]]
    hashes = {}
    if model_run is None:
        inputs += of_model
    else:
        hashes = {f"model_run/{s}": require(model_run, s).content_hash for s in of_model}
        if not hashes.items() <= recommended.inputs.items():
            raise ValueError(
                f"the model of {model_run} is not the one that made the lists; rerun recommend"
            )
    stage = Stage(args.run_dir, "explain", settings, inputs, ignore=["batch_size"], hashes=hashes)
    source = stage_folder(args.run_dir, "recommend")
    rows = chosen_rows(pl.read_parquet(source / "rows.parquet"), args)
    if stage.is_done(args.overwrite):
        return
    table = read_shards(source, "recommendations").filter(pl.col(RANK) <= args.k)
    lists = table.join(rows.select(ROW_ID), on=ROW_ID, how="semi").sort(ROW_ID, RANK)
    if lists[ROW_ID].n_unique() < rows.height:
        raise ValueError(
            f"{rows.height - lists[ROW_ID].n_unique()} rows have no list; rerun recommend"
        )
    split = read_split(args.run_dir, made["split"], "explain").select(ROW_ID, HISTORY)
    split = rows.join(split, on=ROW_ID, how="left", maintain_order="left")

    from genrec.explain import checks
    from genrec.explain.assemble import Attributes, assemble
    from genrec.explain.evidence import leave_one_out, prompts_to_score, shown
    from genrec.recommend import Recommender

    recommender = Recommender.load(
        args.run_dir,
        made["model_stage"],
        "torch",  # whatever made the lists: evidence needs teacher forcing
        made["normalizer"],
        settings["dtype"],
        args.batch_size,
        model_run,
    )
    attributes = Attributes.from_catalog(recommender.catalog)
    histories = shown(recommender, split[HISTORY].to_list())
    items = item_matrix(lists)
    total = prompts_to_score(histories)
    with tqdm(total=total, unit="prompt", desc="leave one out") as bar:
        evidence = leave_one_out(recommender, histories, items, bar.update)
    cited = evidence.cited(args.n_cited)
    total = checks.prompts_to_score(histories, cited, args.random_draws)
    with tqdm(total=total, unit="prompt", desc="erase sets") as bar:
        erased = checks.erasure(
            recommender,
            histories,
            items,
            evidence.log_probs,
            cited,
            args.seed,
            args.random_draws,
            bar.update,
        )
    chains = assemble(attributes, lists, histories, evidence, cited)
    chains = checks.check_all(
        chains, attributes, histories, evidence.log_probs, erased, lists[SCORE].to_list()
    )
    write_chains(stage.folder / "chains.jsonl", chains)
    write_parquet(
        stage.folder / "evidence.parquet",
        evidence_table(attributes, lists, histories, evidence, cited),
    )
    metrics = checks.summarize(chains, args.samples, args.seed)
    stage.finish(rows=len(chains), seed=args.seed, metrics=metrics)
    print(
        f"{len(chains):,} chains of {len(rows):,} lists; {metrics['chains_without_support']:,} "
        f"have no supporting history item\n{metrics['sentence']}"
    )


if __name__ == "__main__":
    run(main)
