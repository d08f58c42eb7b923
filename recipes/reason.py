"""One user's list with the reasoning that led to it: chains are sampled, then items searched.

    genrec reason --run_dir runs/mine --user U01223 --chains 4

Needs a model that was trained on the family `reasoning_recommendation` (build_dataset --tasks
sequential reasoning_recommendation). Prints the list, in which each item names its chain, and every
chain with what is true of it: whether its steps could be read, the items that it cites exist and
lie in the history, and its claims agree with the catalogue. That is all that is claimed for a
chain: true citations say nothing of the quality of its reasoning, least of all that of a small
model trained from scratch. Writes nothing but the note that the test rows were read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from genrec.columns import HISTORY, ITEM_ID, ROW_ID, SEEN, TITLE, USER_ID
from genrec.config import check_choice, parse, run
from genrec.data.splits import read_split
from genrec.prompts import escape_text

if TYPE_CHECKING:
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

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_choice("split", self.split, ("valid", "test"))
        if self.model_stage is not None:
            check_choice("model_stage", self.model_stage, ("sft", "grpo"))
        for name in ("k", "chains"):
            if getattr(self, name) < 1:
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
    mine = rows.filter(pl.col(USER_ID).cast(pl.String) == args.user)
    if mine.is_empty():
        raise ValueError(
            f"user {args.user!r} has no row in the {args.split} split; users look like "
            f"{', '.join(rows[USER_ID].cast(pl.String).head(3))}"
        )
    return mine.sort(length, descending=True, maintain_order=True).row(0, named=True)


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
    if args.k > len(recommender.catalog):
        raise ValueError(
            f"k={args.k:,} exceeds the {len(recommender.catalog):,} items of the catalogue; use at "
            "most that"
        )
    row = user_row(args, FAMILIES[REASONING].least_history)
    rule = recommender.filter_seen if args.filter_seen is None else args.filter_seen
    seen = [np.array(row[SEEN], dtype=np.int64)] if rule else None
    (made,) = recommender.reason(
        [row[HISTORY]], args.k, args.chains, sampling, seen, args.beam_width, args.exact
    )
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=120)
    console.print(Text(f"{row[ROW_ID]}, user {row[USER_ID]}; history, oldest first:"))
    for item in row[HISTORY][-recommender.max_history :]:
        title = escape_text(recommender.catalog[TITLE][item], 60)
        sid, item_id = recommender.sids[item], recommender.catalog[ITEM_ID][item]
        console.print(Text(f"  {item_id}  {title}  {sid}"))
    show_list(console, recommender, made)
    show_chains(console, made)


if __name__ == "__main__":
    run(main)
