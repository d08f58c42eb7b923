"""Query -> items of the catalogue, by the model or by grounding the text; with a history, both.

    genrec search --run_dir runs/quickstart --query "red wool hat"
    genrec search --run_dir runs/quickstart --query "red wool hat" --history SKU10482 SKU10007
    genrec search --run_dir runs/quickstart --query "red wool hat" --ground true
    genrec search --run_dir runs/quickstart --write true --history SKU10482 SKU10007

The model answers if it was trained on the family `query_search`; with `history` (item ids, oldest
first) the search is a joint one and needs `intention_search` (build_dataset --tasks). `ground`
needs no model: it finds the items whose text vectors lie nearest to the text (BIGRec), by the
encoder of the embed stage. `write` takes a history and no query: the model writes the title of what
comes next (family `sids_to_title`), and that is grounded. Prints a table and writes nothing. CPU;
seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from rich.table import Table
from rich.text import Text

from genrec.artifacts import require, stage_folder
from genrec.columns import ITEM_ID, TITLE
from genrec.config import check_choice, make_console, parse, run
from genrec.prompts import escape_text


@dataclass
class SearchArgs:
    """Settings of search."""

    run_dir: str = "runs/default"
    query: str = ""
    history: list[str] | None = None  # item ids, oldest first; with it the search is a joint one
    k: int = 10
    filter_seen: bool = False  # leave out items of the history
    ground: bool = False  # nearest items by text vectors, without the model
    write: bool = False  # the model writes the query: a title that should follow the history
    popularity: float = 0.0  # ground: exponent by which popular items come nearer; 0: none
    text_prompt: str | None = None  # ground: put before the query, such as "query: " for E5
    model_name_or_path: str | None = None  # ground: the local model that embedded the items
    model_stage: str | None = None  # sft or grpo; default: grpo where it is complete
    beam_width: int | None = None  # default: the next of 50, 100, 200, … from 2k on

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        if self.write and (self.query or self.ground or not self.history):
            raise ValueError(
                "write: the model writes the text, from a history; give --history, and leave query "
                "and ground out"
            )
        if not self.write and not escape_text(self.query):
            raise ValueError(f"query={self.query!r} says nothing; give some words")
        if self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1")
        if self.beam_width is not None and self.beam_width < self.k:
            raise ValueError(f"beam_width={self.beam_width} must be at least k={self.k}")
        if self.model_stage is not None:
            check_choice("model_stage", self.model_stage, ("sft", "grpo"))
        of_text = (self.text_prompt, self.model_name_or_path)
        if not (self.ground or self.write) and (
            self.popularity or any(x is not None for x in of_text)
        ):
            raise ValueError(
                "popularity, text_prompt and model_name_or_path belong to --ground true or --write "
                "true"
            )


def item_ids(catalog: pl.DataFrame, given: list[str]) -> list[Any]:
    """Ids of the command line as the catalogue has them, which may be numbers.

    Raises:
        ValueError: one is not in the catalogue.
    """
    known = dict(zip(catalog[ITEM_ID].cast(pl.String), catalog[ITEM_ID], strict=True))
    if unknown := [item for item in given if item not in known]:
        raise ValueError(
            f"history names {unknown[0]!r}, which is not in the catalogue (ids look like "
            f"{', '.join(list(known)[:3])})"
        )
    return [known[item] for item in given]


def grounded(args: SearchArgs, catalog: pl.DataFrame, history: list[Any]) -> Table:
    """The nearest items."""
    from genrec.grounding import TextGrounder

    places = [catalog[ITEM_ID].index_of(item) for item in history] if args.filter_seen else []
    seen = [np.array(places, dtype=np.int64)]
    grounder = TextGrounder.load(args.run_dir, args.text_prompt, args.model_name_or_path)
    found = grounder.ground([args.query], args.k, args.popularity, seen)
    if not found.known[0]:
        raise ValueError(
            f"the encoder of {args.run_dir} knows no word of {args.query!r}; use words of the "
            "catalogue, or search with the model"
        )
    return nearest(args, catalog, found.items[0], found.distances[0])


def written(args: SearchArgs, catalog: pl.DataFrame, history: list[Any]) -> tuple[str, Table]:
    """What the model writes, and the items nearest to it."""
    from genrec.grounding import TextGrounder
    from genrec.recommend import Recommender
    from genrec.recommend_in_words import recommend_in_words

    grounder = TextGrounder.load(args.run_dir, args.text_prompt, args.model_name_or_path)
    (made,) = recommend_in_words(
        Recommender.load(args.run_dir, args.model_stage),
        grounder,
        [history],
        args.k,
        popularity=args.popularity,
        filter_seen=args.filter_seen,
    )
    if not len(made.items):
        raise ValueError(
            f"the model wrote {escape_text(made.text)!r}, of which the encoder of {args.run_dir} "
            "knows no word; train it longer on sids_to_title"
        )
    return made.text, nearest(args, catalog, made.items, made.distances)


def nearest(
    args: SearchArgs, catalog: pl.DataFrame, items: np.ndarray, distances: np.ndarray
) -> Table:
    """Grounded items; −1 is none."""
    table = heading("distance" if not args.popularity else "rescaled distance")
    for rank, (item, distance) in enumerate(zip(items, distances, strict=True)):
        if item >= 0:
            add(table, rank + 1, catalog[ITEM_ID][int(item)], catalog[TITLE][int(item)], distance)
    return table


def searched(args: SearchArgs, history: list[Any] | None) -> Table:
    """The model's items."""
    from genrec.recommend import Recommender

    recommender = Recommender.load(args.run_dir, args.model_stage)
    table = heading("log p")
    n_items = len(recommender.catalog)  # more prefixes there aren't
    width = min(
        recommender.width_of(args.k) if args.beam_width is None else args.beam_width, n_items
    )
    for r in recommender.search(args.query, args.k, history, args.filter_seen, width):
        add(table, r.rank, r.item_id, r.title, r.score)
    return table


def heading(measure: str) -> Table:
    """An empty table."""
    table = Table(box=None, pad_edge=False)
    for name in ("rank", "item_id", "title", measure):
        right = name in ("rank", measure)
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    return table


def add(table: Table, rank: int, item: Any, title: str, value: float) -> None:
    """One item; its title may hold anything."""
    table.add_row(str(rank), Text(str(item)), Text(escape_text(title, 70)), f"{value:.3f}")


def main() -> None:
    """Print the list."""
    args = parse(SearchArgs)
    require(args.run_dir, "prepare")
    catalog = pl.read_parquet(stage_folder(args.run_dir, "prepare") / "catalog.parquet", glob=False)
    if args.k > len(catalog):
        raise ValueError(
            f"k={args.k:,} exceeds the {len(catalog):,} items of the catalogue; use at most that"
        )
    history = None if args.history is None else item_ids(catalog, args.history)
    query, how = args.query, "by the model"
    if args.write:
        query, table = written(args, catalog, history or [])
        how = "written by the model, nearest by text"
    elif args.ground:
        table, how = grounded(args, catalog, history or []), "nearest by text"
    else:
        table = searched(args, history)
    console = make_console()
    joint = f", after {len(history)} items" if history is not None and not args.ground else ""
    console.print(Text(f"“{escape_text(query)}”, {how}{joint}"))
    console.print(table)


if __name__ == "__main__":
    run(main)
