"""Why each item is in its list: measured evidence, chains, and checks of the chains.

    genrec explain --config recipes/configs/quickstart/explain.yaml --run_dir runs/quickstart

Leaves out one shown history item at a time, scores the same recommended items again (Δ log-prob)
and searches the list again (Δ rank). For the first items of each list it finds a minimal set of
history items without which they would not be listed. What the chains cite is then tested by another
perturbation, replacement by similar items, beside random, newest, popular and another list's
citations (`genrec.explain.erasure`); `thresholds` are declared here, before the run, and every one
of them is reported, met or not. The words around the numbers come from a template
(rationale_origin=template), not from the model.

Writes ``explanations/chains.jsonl`` (a chain per recommended item), ``evidence.parquet`` (a row per
recommended item and history position) and ``counterfactuals.parquet``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

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
    SEEN,
    TARGET,
    USER_ID,
)
from genrec.config import check_choice, parse, run
from genrec.data.splits import read_split
from genrec.embedding.vectors import VECTORS
from genrec.evaluation.baselines import item_counts
from genrec.explain.thresholds import THRESHOLDS, Threshold
from genrec.generation.allow_lists import allowed_rows

if TYPE_CHECKING:
    from genrec.explain.assemble import Attributes
    from genrec.explain.counterfactuals import Counterfactual
    from genrec.explain.evidence import Evidence, IntArray, Search
    from genrec.recommend import Recommender

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
    selection: str = "joint"  # each the costliest beside those before it; single: by its own Δ
    replacement_draws: int = 3  # similar items that are tried in place of each erased one
    counterfactual_items: int = 1  # of each list, from the top; 0: none
    counterfactual_size: int = 10  # history items of such a set at most
    stability_lists: int = 25  # lists whose evidence is measured under another wording too; 0: none
    thresholds: list[str] = field(default_factory=lambda: list(THRESHOLDS))  # see the report
    dtype: str | None = None  # of the weights; default: recommend's
    samples: int = 1000  # bootstrap samples of the 95% intervals
    batch_size: int = 64  # prompts scored together
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_choice("selection", self.selection, ("joint", "single"))
        if self.dtype is not None:
            check_choice("dtype", self.dtype, WEIGHTS)
        if self.num_rows < 0 or (self.num_rows == 0 and not self.users):
            raise ValueError(f"num_rows={self.num_rows} must be at least 1, or name some users")
        for name in (
            "k", "n_cited", "replacement_draws", "counterfactual_size", "samples", "batch_size"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("counterfactual_items", "stability_lists"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        for rule in self.thresholds:
            Threshold.parse(rule)


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
    ranks: IntArray,
    cited: IntArray,
) -> pl.DataFrame:
    """Every measured Δ, a row per listed item and history position.

    `rank_without` is null where the beam no longer holds the item.
    """
    row = lists[ROW_ID].rle_id().to_numpy()
    place = lists.select(pl.int_range(pl.len()).over(ROW_ID).alias("place"))["place"].to_numpy()
    deltas, below = evidence.deltas[row, place], ranks[row, place]  # (items, H)
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
            pl.Series("rank_without", below[at, position], dtype=pl.Int32).replace(0, None),
            pl.Series("cited", is_cited, dtype=pl.Boolean),
        )
    )


def counterfactual_table(
    attributes: Attributes,
    row_ids: list[str],
    histories: list[IntArray],
    items: IntArray,
    found: list[Counterfactual],
    dtype: pl.DataType,
) -> pl.DataFrame:
    """One row per item that was looked at."""
    ids = attributes.item_ids
    columns = {
        ROW_ID: pl.Series([row_ids[c.row] for c in found], dtype=pl.String),
        RANK: pl.Series([c.place + 1 for c in found], dtype=pl.Int32),
        ITEM_ID: pl.Series([ids[items[c.row, c.place]] for c in found], dtype=dtype),
        "found": pl.Series([c.found for c in found], dtype=pl.Boolean),
        "positions": pl.Series([list(c.positions) for c in found], dtype=pl.List(pl.Int32)),
        "history_item_ids": pl.Series(
            [[ids[histories[c.row][p]] for p in c.positions] for c in found], dtype=pl.List(dtype)
        ),
        "log_prob": pl.Series([c.log_prob for c in found], dtype=pl.Float64),
        "rank_without": pl.Series([c.rank or None for c in found], dtype=pl.Int32),
        "first_then": pl.Series(
            [None if c.replaced_by < 0 else ids[c.replaced_by] for c in found], dtype=dtype
        ),
        "searches": pl.Series([c.searches for c in found], dtype=pl.Int32),
    }
    return pl.DataFrame(columns)


def as_searched(made: dict[str, Any], split: pl.DataFrame, recommender: Recommender) -> Search:
    """The filters and the width under which the lists were made."""
    from genrec.explain.evidence import Search

    catalog = recommender.catalog
    allowed = allowed_rows(catalog[ITEM_ID], made.get("allow"), made.get("deny"))
    view = None if allowed is None else recommender.engine.trie.allow(allowed)
    seen = None
    if made["filter_seen"]:
        seen = [np.unique(np.array(s, dtype=np.int64)) for s in split[SEEN].to_list()]
    return Search(seen, view, min(made["beam_width"], len(catalog)))


def other_wording(recommender: Recommender, args: ExplainArgs, source: str) -> str | None:
    """Another template of those that the model learned from, for the stability of evidence."""
    family = recommender.template.split("/")[0]
    n_templates = require(source, "build_dataset").config.get("n_templates")
    learned = recommender.renderer.names(family)[:n_templates]
    return next((name for name in learned if name != recommender.template), None)


def cited_when_worded(
    template: str,
    recommender: Recommender,
    histories: list[IntArray],
    items: IntArray,
    n_cited: int,
    joint: bool,
) -> IntArray:
    """What chains would cite if the prompt were worded by another template, (R, K, n)."""
    from genrec.explain.evidence import choose_citations, leave_one_out, prompts_to_score

    own, recommender.template = recommender.template, template
    total = prompts_to_score(histories)
    with tqdm(total=total, unit="prompt", desc=f"worded as {template}") as bar:
        evidence = leave_one_out(recommender, histories, items, bar.update)
    cited, _ = choose_citations(recommender, histories, items, evidence, n_cited, joint)
    recommender.template = own
    return cited


def main() -> None:
    """Run the stage."""
    args = parse(ExplainArgs)
    recommended = require(args.run_dir, "recommend")
    made, model_run = recommended.config, recommended.config.get("model_run")
    settings = {**asdict(args), "normalizer": made["normalizer"]}
    settings["dtype"] = args.dtype or made["dtype"]
    inputs = ["prepare", "embed", "quantize", "recommend"]
    of_model = ["build_dataset", made["model_stage"]]
    hashes = {}
    if model_run is None:
        inputs += of_model
    else:
        hashes = {f"model_run/{s}": require(model_run, s).content_hash for s in of_model}
        if not hashes.items() <= recommended.inputs.items():
            raise ValueError(
                f"the model of {model_run} is not the one that made the lists; rerun recommend"
            )
    files = {name: made[name] for name in ("allow", "deny") if made.get(name) is not None}
    stage = Stage(
        args.run_dir, "explain", settings, inputs, files, ignore=["batch_size"], hashes=hashes
    )
    if changed := [name for name in files if stage.inputs[name] != recommended.inputs.get(name)]:
        raise ValueError(
            f"{files[changed[0]]} has changed since recommend read it as --{changed[0]}; restore "
            "it, or rerun recommend"
        )
    source = stage_folder(args.run_dir, "recommend")
    rows = chosen_rows(pl.read_parquet(source / "rows.parquet", glob=False), args)
    if stage.is_done(args.overwrite):
        return
    table = read_shards(source, "recommendations").filter(pl.col(RANK) <= args.k)
    lists = table.join(rows.select(ROW_ID), on=ROW_ID, how="semi").sort(ROW_ID, RANK)
    if lists[ROW_ID].n_unique() < rows.height:
        raise ValueError(
            f"{rows.height - lists[ROW_ID].n_unique()} rows have no list; rerun recommend"
        )
    split = read_split(args.run_dir, made["split"], "explain").select(ROW_ID, HISTORY, SEEN, TARGET)
    split = rows.join(split, on=ROW_ID, how="left", maintain_order="left")

    from genrec.explain import checks
    from genrec.explain.assemble import Attributes, assemble
    from genrec.explain.counterfactuals import counterfactuals
    from genrec.explain.evidence import (
        choose_citations,
        leave_one_out,
        prompts_to_score,
        ranks_left_out,
        shown,
    )
    from genrec.explain.faithfulness import summarize
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
    lengths = np.array([len(h) for h in histories], dtype=np.int64)
    items = item_matrix(lists)
    search, joint = as_searched(made, split, recommender), args.selection == "joint"
    with tqdm(total=prompts_to_score(histories), unit="prompt", desc="leave one out") as bar:
        evidence = leave_one_out(recommender, histories, items, bar.update)
    with tqdm(total=int(lengths.sum()), unit="list", desc="search again") as bar:
        ranks = ranks_left_out(recommender, histories, items, search, bar.update)
    with tqdm(unit="prompt", desc="choose citations") as bar:
        cited, added = choose_citations(
            recommender, histories, items, evidence, args.n_cited, joint, bar.update
        )
    train = pl.read_parquet(stage_folder(args.run_dir, "prepare") / "train.parquet", glob=False)
    counts = item_counts(train, len(recommender.catalog))
    vectors = np.load(stage_folder(args.run_dir, "embed") / VECTORS, mmap_mode="r")
    with tqdm(unit="prompt", desc="erase sets") as bar:
        tested = checks.try_citations(
            recommender, histories, items, evidence, cited, counts, vectors,
            args.replacement_draws, args.seed, progress=bar.update, start=bar.reset,
        )  # fmt: skip
    with tqdm(unit="item", desc="counterfactuals") as bar:
        found = counterfactuals(
            recommender, histories, items, search, min(args.k, made["k"]),
            args.counterfactual_items, args.counterfactual_size, bar.update,
        )  # fmt: skip
    wording = other_wording(recommender, args, model_run or args.run_dir)
    some = min(args.stability_lists, len(histories)) if wording else 0
    again = np.full_like(cited, -1)
    if wording and some:
        again[:some] = cited_when_worded(
            wording, recommender, histories[:some], items[:some], args.n_cited, joint
        )
    measured = np.arange(len(items))[:, None] < some
    stability = {
        name: np.where(measured, checks.overlap(own, again), np.nan)
        for name, own in tested.sets.items()
    }
    by_place = {(c.row, c.place): c for c in found}
    shorter = min(args.k, made["k"])
    chains = assemble(attributes, lists, histories, evidence, cited, by_place, shorter, added)
    chains = checks.check_all(
        chains, attributes, histories, split[TARGET].to_list(), evidence.log_probs, tested,
        stability, lists[SCORE].to_list(),
    )  # fmt: skip
    write_chains(stage.folder / "chains.jsonl", chains)
    write_parquet(
        stage.folder / "evidence.parquet",
        evidence_table(attributes, lists, histories, evidence, ranks, cited),
    )
    row_ids = lists[ROW_ID].unique(maintain_order=True).to_list()
    of_items = counterfactual_table(
        attributes, row_ids, histories, items, found, lists[ITEM_ID].dtype
    )
    write_parquet(stage.folder / "counterfactuals.parquet", of_items)
    shown_items = dict(zip(row_ids, lengths.tolist(), strict=True))
    metrics = summarize(chains, args.thresholds, shown_items, args.samples, args.seed)
    metrics["counterfactuals"] = of_counterfactuals(of_items, args.counterfactual_size)
    metrics["wording"] = wording if some else None
    stage.finish(rows=len(chains), seed=args.seed, metrics=metrics)
    print(
        f"{len(chains):,} chains of {len(rows):,} lists; {metrics['chains_without_support']:,} "
        f"have no supporting history item\n{metrics['sentence']}"
    )
    for threshold in metrics["thresholds"]:
        print(f"{threshold['verdict']:>12}: {threshold['rule']}")


def of_counterfactuals(table: pl.DataFrame, most: int) -> dict[str, Any]:
    """How many were found, how large they are, and how large they could be `most`."""
    sizes = table.filter("found")["positions"].list.len()
    return {
        "items": len(table),
        "found": len(sizes),
        "size": {str(n): int(count) for n, count in sizes.value_counts().sort("positions").rows()},
        "most": most,
        "searches": int(table["searches"].sum()),
    }


if __name__ == "__main__":
    run(main)
