"""Lists with the reasoning that led to them: chains are sampled, then items searched.

    genrec reason --run_dir runs/mine --user U01223 --chains 4
    genrec reason --run_dir runs/mine --rows 200 --output_dir runs/mine-reasoned

Needs a model that was trained on the family `reasoning_recommendation` (build_dataset --tasks
sequential reasoning_recommendation). The first form prints one user's list, in which each item
names its chain, and every chain with what is true of it: whether its steps could be read, the items
that it cites exist and lie in the history, and its claims agree with the catalogue. True citations
say nothing of the quality of the reasoning, least of all that of a small model trained from
scratch.

The second form measures how faithful the chains of a sample of rows are: beside these checks,
whether what they cite mattered (replacement by similar items, against random, newest, popular and
another user's citations), and whether items depend on their chain at all (against none, half of it
and another user's). Writes ``lists.parquet``, ``chains.jsonl`` and ``faithfulness.json`` with the
verdicts on `thresholds`, which are declared here, before the run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from genrec.artifacts import stage_folder, write_json, write_parquet
from genrec.chains import write_chains
from genrec.columns import (
    HISTORY,
    ITEM_ID,
    RANK,
    ROW_ID,
    SCORE,
    SEEN,
    TARGET,
    TITLE,
    USER_ID,
)
from genrec.config import check_choice, make_console, parse, run
from genrec.data.splits import read_split, rows_of_user
from genrec.embedding.vectors import VECTORS
from genrec.explain.thresholds import (
    ALL_CONTROLS,
    WRITTEN_THRESHOLDS,
    WRITTEN_VERDICTS,
    Threshold,
)
from genrec.metrics import EMPTY, gains, hits, target_rank
from genrec.prompts import escape_text

if TYPE_CHECKING:
    from genrec.decoding.free_text import TextSampling
    from genrec.reasoning import ReasonedList
    from genrec.recommend import Recommender


@dataclass
class ReasonArgs:
    """Settings of reason."""

    run_dir: str = "runs/default"
    user: str | None = None  # default: the first row of the split with enough history
    split: str = "test"
    k: int = 10
    chains: int = 4
    temperature: float = 1.0
    top_p: float = 0.9  # 1 (and temperature 1): the model's own distribution
    max_tokens: int = 256  # of a chain
    exact: bool = False  # score every item of the list under every chain
    filter_seen: bool | None = None  # default: the rule under which the model was validated
    beam_width: int | None = None  # default: the next of 50, 100, 200, … from 2k on
    model_stage: str | None = None  # sft or grpo; default: grpo where it is complete
    seed: int = 0
    # Many rows, measured.
    rows: int | None = None  # a deterministic sample of so many rows with enough history
    output_dir: str | None = None  # where their lists, chains and figures go; a new folder
    replacement_draws: int = 3  # similar items that are tried in place of each erased one
    thresholds: list[str] = field(default_factory=lambda: list(WRITTEN_THRESHOLDS))
    samples: int = 1000  # bootstrap samples of the 95% intervals

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_choice("split", self.split, ("valid", "test"))
        if self.model_stage is not None:
            check_choice("model_stage", self.model_stage, ("sft", "grpo"))
        if (self.rows is None) != (self.output_dir is None):
            raise ValueError("rows and output_dir belong together; give both, or --user")
        if self.rows is not None and self.user is not None:
            raise ValueError("give --user, or --rows for a sample")
        if self.output_dir is not None and Path(self.output_dir).exists():
            raise ValueError(f"output_dir={self.output_dir} exists; name a new folder")
        for rule in self.thresholds:
            Threshold.parse(rule)
        for name in ("k", "chains", "rows", "replacement_draws", "samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.beam_width is not None and self.beam_width < self.k:
            raise ValueError(f"beam_width={self.beam_width} must be at least k={self.k}")


def user_row(args: ReasonArgs, least: int) -> dict[str, Any]:
    """The user's row with the longest history, or the first with at least `least` items."""
    rows = read_split(args.run_dir, args.split, "reason")
    length = pl.col(HISTORY).list.len()
    if args.user is None:
        found = rows.filter(length >= least)
        if found.is_empty():
            raise ValueError(f"no row of the {args.split} split has {least} history items")
        return found.row(0, named=True)
    mine = rows_of_user(rows, args.user, args.split)
    return mine.sort(length, descending=True, maintain_order=True).row(0, named=True)


def sampled_rows(args: ReasonArgs, least: int) -> pl.DataFrame:
    """The rows to measure: a deterministic sample of those with enough history."""
    rows = read_split(args.run_dir, args.split, "reason")
    rows = rows.filter(pl.col(HISTORY).list.len() >= least)
    if rows.is_empty():
        raise ValueError(f"no row of the {args.split} split has {least} history items")
    return rows.sample(min(args.rows or 1, rows.height), seed=args.seed).sort(ROW_ID)


def measure(args: ReasonArgs, recommender: Recommender, sampling: TextSampling, least: int) -> None:
    """Reason for many rows; write lists, chains and figures."""
    from genrec.evaluation.baselines import item_counts
    from genrec.explain.faithfulness import summarize
    from genrec.explain.written import check_written

    rows = sampled_rows(args, least)
    rule = recommender.filter_seen if args.filter_seen is None else args.filter_seen
    histories = rows[HISTORY].to_list()
    seen = [np.array(s, dtype=np.int64) for s in rows[SEEN].to_list()] if rule else None
    with tqdm(total=len(rows), unit="row", desc="reason") as bar:
        made = recommender.reason(
            histories, args.k, args.chains, sampling, seen, args.beam_width, args.exact, bar.update
        )
    shown = [np.array(h[-recommender.max_history :], dtype=np.int64) for h in histories]
    train = pl.read_parquet(stage_folder(args.run_dir, "prepare") / "train.parquet", glob=False)
    with tqdm(unit="prompt", desc="check") as bar:
        chains = check_written(
            recommender, rows[ROW_ID].to_list(), shown, made, rows[TARGET].to_list(),
            np.load(stage_folder(args.run_dir, "embed") / VECTORS, mmap_mode="r"),
            item_counts(train, len(recommender.catalog)), args.replacement_draws, args.seed,
            bar.update,
        )  # fmt: skip
    lengths = dict(zip(rows[ROW_ID].to_list(), map(len, shown), strict=True))
    found = summarize(chains, args.thresholds, lengths, args.samples, args.seed, WRITTEN_VERDICTS)
    target = rows[TARGET].to_list()
    rank = target_rank(_padded([own.merged.items for own in made], args.k), np.array(target))
    found["lists_metrics"] = {f"HR@{args.k}": float(hits(rank, args.k).mean()),
                              f"NDCG@{args.k}": float(gains(rank, args.k).mean())}  # fmt: skip
    found["settings"] = asdict(args)
    folder = Path(str(args.output_dir))
    write_parquet(folder / "lists.parquet", lists_table(rows, made))
    write_chains(folder / "chains.jsonl", chains)
    write_json(folder / "faithfulness.json", found)
    show_figures(found, folder)


def _padded(lists: list[np.ndarray], k: int) -> np.ndarray:
    out = np.full((len(lists), k), EMPTY, dtype=np.int64)
    for row, own in enumerate(lists):
        out[row, : len(own)] = own[:k]
    return out


def lists_table(rows: pl.DataFrame, made: list[ReasonedList]) -> pl.DataFrame:
    """A row per listed item: the list's row and user, rank, item, score, number of its chain."""
    lengths = [len(own.item_ids) for own in made]
    repeated = np.repeat(np.arange(len(made)), lengths)
    return rows.select(ROW_ID, USER_ID)[repeated].with_columns(
        pl.Series(RANK, np.concatenate([np.arange(n) + 1 for n in lengths]), dtype=pl.Int32),
        pl.Series(ITEM_ID, [item for own in made for item in own.item_ids]),
        pl.Series(SCORE, np.concatenate([own.merged.scores for own in made])),
        pl.Series("chain", np.concatenate([own.merged.chain for own in made])),
        pl.Series(
            "chain_text", [own.chains[c].text for own in made for c in own.merged.chain.tolist()]
        ),
    )


def show_figures(found: dict[str, Any], folder: Path) -> None:
    """Verdicts, figures beside controls, thresholds."""
    console = make_console()
    console.print(f"{found['chains']:,} chains of {found['lists']:,} lists")
    for name, own in found["verdicts"].items():
        if own["share"] is not None:
            console.print(f"  {name:<24} {own['share']:.1%} of {own['checked']:,}")
    table = Table(box=None, pad_edge=False)
    names = ["figure", "chain", *(n.replace("_", " ") for n in ALL_CONTROLS)]
    for name in names:
        table.add_column(name, justify="left" if name == "figure" else "right")
    for name, figure in found["figures"].items():
        values = [figure["chain"], *((figure["controls"].get(c) or {}).get("value")
                                     for c in ALL_CONTROLS)]  # fmt: skip
        table.add_row(name, *("–" if v is None else f"{v['value']:.3f}" for v in values))
    console.print(table)
    for threshold in found["thresholds"]:
        console.print(f"  {threshold['verdict']:>12}: {threshold['rule']}")
    console.print(f"chains and figures in {folder}")


def show_list(console: Console, recommender: Recommender, made: ReasonedList) -> None:
    """The list; a score is a log-probability with the chains summed out."""
    table = Table(box=None, pad_edge=False)
    score = "log p" if made.exact else "log p ≥"
    for name in ("rank", "item_id", "title", score, "chain", "proposed by"):
        right = name not in ("item_id", "title")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    merged = made.merged
    for place, (item, row) in enumerate(zip(made.item_ids, merged.items.tolist(), strict=True)):
        table.add_row(
            str(place + 1),
            Text(str(item)),
            Text(escape_text(recommender.catalog[TITLE][row], 60)),
            f"{merged.scores[place]:.3f}",
            str(merged.chain[place] + 1),
            f"{merged.n_proposed[place]} of {len(made.chains)}",
        )
    console.print(table)


def show_chains(console: Console, made: ReasonedList) -> None:
    """Every chain, its finish reason and its checks. Model text may hold anything."""
    verdicts = {True: "yes", False: "NO", None: "–"}
    for number, chain in enumerate(made.chains):
        n_items = int((made.merged.chain == number).sum())
        console.print()
        head = f"Chain {number + 1} ({chain.finish_reason}), for {n_items} items of the list"
        console.print(Text(head, style="bold cyan"))
        for step in chain.steps:
            console.print(Text(f"  {step.type}: {_line(step.text)}"))
        for part in chain.unread:
            console.print(Text(f"  not a step: {_line(part)}", style="yellow"))
        checks = ", ".join(f"{c.name} {verdicts[c.passed]}" for c in chain.checks)
        console.print(Text(f"  {checks}"))


def _line(text: str) -> str:
    """On one line, without control characters; SIDs stay as they are."""
    return "".join(c if c.isprintable() else " " for c in text)


def main() -> None:
    """Print the list and its chains."""
    args = parse(ReasonArgs)
    from genrec.decoding.free_text import TextSampling
    from genrec.reasoning import REASONING
    from genrec.recommend import Recommender
    from genrec.tasks.families import FAMILIES

    sampling = TextSampling(args.temperature, args.top_p, args.max_tokens, args.seed)
    recommender = Recommender.load(args.run_dir, args.model_stage)
    recommender.require_family(REASONING)  # before a reading of test rows is noted
    recommender.check_length(args.k)
    if args.rows is not None:
        measure(args, recommender, sampling, FAMILIES[REASONING].least_history)
        return
    row = user_row(args, FAMILIES[REASONING].least_history)
    rule = recommender.filter_seen if args.filter_seen is None else args.filter_seen
    seen = [np.array(row[SEEN], dtype=np.int64)] if rule else None
    (made,) = recommender.reason(
        [row[HISTORY]], args.k, args.chains, sampling, seen, args.beam_width, args.exact
    )
    console = make_console()
    console.print(Text(f"{row[ROW_ID]}, user {row[USER_ID]}; history, oldest first:"))
    for item in row[HISTORY][-recommender.max_history :]:
        title = escape_text(recommender.catalog[TITLE][item], 60)
        sid, item_id = recommender.sids[item], recommender.catalog[ITEM_ID][item]
        console.print(Text(f"  {item_id}  {title}  {sid}"))
    show_list(console, recommender, made)
    show_chains(console, made)


if __name__ == "__main__":
    run(main)
