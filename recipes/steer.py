"""A user's taste in words, edited: the profile, the list that it gives, and what an edit changes.

    genrec steer --run_dir runs/mine --user U01223
    genrec steer --run_dir runs/mine --user U01223 --profile "Is drawn to the brand Acme."

Needs a model that was trained on the family `preference_recommendation` (build_dataset --tasks
sequential preference_recommendation). The profile is what recurs in the user's history more than in
the catalogue, worded as in training rows; --profile puts your text in its place, and both lists are
shown, with the ranks of before. How far a small model follows an edit is for you to see here: it
follows words that it was trained on. Prints and writes nothing but the note that the test rows were
read. CPU; seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from genrec.columns import HISTORY, ITEM_ID, ROW_ID, TITLE, USER_ID
from genrec.config import check_choice, make_console, parse, run
from genrec.data.splits import read_split, rows_of_user
from genrec.prompts import escape_text

if TYPE_CHECKING:
    from genrec.recommend import Recommendation, Recommender


@dataclass
class SteerArgs:
    """Settings of steer."""

    run_dir: str = "runs/default"
    user: str | None = None  # default: the first row of the split that has a profile
    profile: str | None = None  # your text in place of the one from the history
    split: str = "test"
    k: int = 10
    filter_seen: bool | None = None  # default: the rule under which the model was validated
    beam_width: int | None = None  # default: the next of 50, 100, 200, … from 2k on
    model_stage: str | None = None  # sft or grpo; default: grpo where it is complete

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_choice("split", self.split, ("valid", "test"))
        if self.model_stage is not None:
            check_choice("model_stage", self.model_stage, ("sft", "grpo"))
        if self.profile is not None and not escape_text(self.profile):
            raise ValueError(f"profile={self.profile!r} says nothing; give some words")
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1")
        if self.beam_width is not None and self.beam_width < self.k:
            raise ValueError(f"beam_width={self.beam_width} must be at least k={self.k}")


def profiles(recommender: Recommender, rows: pl.DataFrame) -> pl.Series:
    """What recurs in each row's history, in the words of training rows; null where nothing does."""
    from genrec.tasks.attributes import AttributeIndex, item_attributes
    from genrec.tasks.texts import history_preferences, run_wording

    wording = run_wording(recommender.renderer.folder)
    catalog = recommender.catalog
    index = AttributeIndex.build(item_attributes(catalog), len(catalog))
    shown = rows[HISTORY].list.tail(recommender.max_history)
    return history_preferences(shown, index, wording, rows[ROW_ID])


def chosen_row(args: SteerArgs, recommender: Recommender) -> tuple[dict[str, Any], str | None]:
    """The row, and the profile that its history gives."""
    rows = read_split(args.run_dir, args.split, "steer")
    if args.user is not None:
        mine = rows_of_user(rows, args.user, args.split)
        rows = mine.sort(pl.col(HISTORY).list.len(), descending=True, maintain_order=True).head(1)
    found = profiles(recommender, rows)
    if args.user is None:
        there = found.is_not_null()
        if not there.any():
            raise ValueError(
                f"no history of the {args.split} split has anything that recurs; name a --user and "
                "a --profile"
            )
        rows, found = rows.filter(there), found.filter(there)
    return rows.row(0, named=True), found[0]


def show(console: Console, title: str, made: list[Recommendation], before: dict[Any, int]) -> None:
    """A list; where there is one before it, the rank that each item had there."""
    console.print()
    console.print(Text(title, style="bold"))
    table = Table(box=None, pad_edge=False)
    for name in ("rank", *(["before"] if before else []), "item_id", "title", "log p"):
        right = name not in ("item_id", "title")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for own in made:
        was = [str(before.get(own.item_id, "new"))] if before else []
        shown = Text(escape_text(own.title, 60))
        table.add_row(str(own.rank), *was, Text(str(own.item_id)), shown, f"{own.score:.3f}")
    console.print(table)


def main() -> None:
    """Print the profile and the lists."""
    args = parse(SteerArgs)
    from genrec.recommend import BY_PROFILE, Recommender

    recommender = Recommender.load(args.run_dir, args.model_stage)
    recommender.require_family(BY_PROFILE)  # before a reading of test rows is noted
    recommender.check_length(args.k)
    row, own = chosen_row(args, recommender)
    if own is None and args.profile is None:
        raise ValueError("nothing recurs in this user's history; give a --profile")
    history = [recommender.catalog[ITEM_ID][int(item)] for item in row[HISTORY]]

    def listed(profile: str) -> list[Recommendation]:
        return recommender.recommend_by_profile(
            history, profile, args.k, args.filter_seen, args.beam_width
        )

    console = make_console()
    console.print(Text(f"{row[ROW_ID]}, user {row[USER_ID]}; history, oldest first:"))
    for item in row[HISTORY][-recommender.max_history :]:
        console.print(Text(f"  {escape_text(recommender.catalog[TITLE][int(item)], 70)}"))
    before: dict[Any, int] = {}
    if own is not None:
        made = listed(own)
        show(console, f"Profile from the history: {own}", made, {})
        before = {r.item_id: r.rank for r in made}
    if args.profile is not None:
        made = listed(args.profile)
        show(console, f"Edited profile: {escape_text(args.profile)}", made, before)
        if before:
            kept = sum(r.item_id in before for r in made)
            moved = sum(before.get(r.item_id) not in (None, r.rank) for r in made)
            console.print(
                Text(f"{kept} of {len(made)} items stay, {moved} of them at another rank")
            )


if __name__ == "__main__":
    run(main)
