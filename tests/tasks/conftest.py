"""A small shop whose data allow every task family, and all that rows are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.columns import REVIEW
from genrec.data.splits import Splits, leave_one_out
from genrec.prompts import PromptRenderer
from genrec.semantic_ids import SemanticIds
from genrec.tasks.attributes import AttributeIndex, item_attributes
from genrec.tasks.families import FAMILIES, INTERACTION, SEQUENTIAL, switched_off
from genrec.tasks.noise import ItemDraw
from genrec.tasks.rendering import ItemTexts, render_rows
from genrec.tasks.rows import InteractionLog, Sources, interaction_rows, item_rows
from genrec.tasks.sequential import sequential_rows
from genrec.tasks.texts import item_intentions, item_queries, review_aspects, written_renderer

N_ITEMS = 16
COLOURS, THINGS = ("red", "blue", "green", "grey"), ("hat", "scarf", "kettle", "teapot")
REVIEWS = ("Lovely colour and very soft.", "The fabric tore, poor quality.", "Works. Easy to use.",
    "Smells odd; the size is tight.", None)  # fmt: skip
SUMMARIES = ("Great", "Bad", "Fine for the price", None)
QUERIES = ("warm hat", "tea for two", None)

Event = tuple[int, float | None, str | None, str | None, str | None]  # item, rating, review, …

RENDERER, WORDING = PromptRenderer(), written_renderer()


def catalogue(
    tiny, strings: bool = False, item_ids: list | None = None
) -> tuple[pl.DataFrame, SemanticIds]:
    """16 items; the fourth has no title, the sixth no description, two share their title."""
    semantic_ids = tiny.sids(N_ITEMS, strings=strings)
    if item_ids is not None:
        semantic_ids = replace(semantic_ids, item_ids=pl.Series("item_id", item_ids))
    ids = semantic_ids.item_ids
    titles = [f"{COLOURS[i % 4]} {THINGS[i // 4]} {'ABCDE'[i % 5]}" for i in range(N_ITEMS)]
    titles[3], titles[8] = f"Item {ids[3]}", titles[7]
    about = [f"A {COLOURS[i % 4]} thing that item {i} alone is." for i in range(N_ITEMS)]
    table = pl.DataFrame(
        {
            "item_index": pl.Series(range(N_ITEMS), dtype=pl.Int32),
            "item_id": ids,
            "title": titles,
            "brand": [f"Maker {i % 3}" for i in range(N_ITEMS)],
            "categories": [["Shop", "Clothing" if i < 8 else "Kitchen", THINGS[i // 4]]
                for i in range(N_ITEMS)],
            "price": [5.0 + i for i in range(N_ITEMS)],
            "description": [None if i == 5 else text for i, text in enumerate(about)],
        }
    )  # fmt: skip
    return table, semantic_ids


def log_of(events: list[list[Event]], catalog: pl.DataFrame, users: list | None = None):
    """Interactions, a list for each user."""
    users = [f"u{i}" for i in range(len(events))] if users is None else users
    flat = [event for user in events for event in user]
    index = pl.Series("item_index", [event[0] for event in flat], dtype=pl.Int32)
    lengths = [len(user) for user in events]
    return pl.DataFrame(
        {
            "user_id": [u for u, n in zip(users, lengths, strict=True) for _ in range(n)],
            "item_id": catalog["item_id"].gather(index),
            "item_index": index,
            "timestamp": pl.Series([None] * len(flat), dtype=pl.Int64),
            "rating": pl.Series([event[1] for event in flat], dtype=pl.Float64),
            "position": pl.Series([p for n in lengths for p in range(n)], dtype=pl.Int32),
            "review": pl.Series([event[2] for event in flat], dtype=pl.String),
            "summary": pl.Series([event[3] for event in flat], dtype=pl.String),
            "query": pl.Series([event[4] for event in flat], dtype=pl.String),
        }
    )


def random_events(seed: int, n_users: int = 12) -> list[list[Event]]:
    """Users who like a kind of things, of 4 to 11 interactions."""
    rng = np.random.default_rng(seed)

    def event(kind: int) -> Event:
        item = int(rng.integers(4 * kind, 4 * kind + 4) if rng.random() < 0.7 else rng.integers(16))
        texts = [pool[rng.integers(len(pool))] for pool in (REVIEWS, SUMMARIES, QUERIES)]
        return (item, float(rng.integers(1, 6)), *texts)

    return [
        [event(int(kind)) for _ in range(rng.integers(4, 12))]
        for kind in rng.integers(0, 4, n_users)
    ]


@dataclass(frozen=True)
class World:
    """A catalogue, a log, its split and what rows are made of."""

    catalog: pl.DataFrame
    log: pl.DataFrame
    semantic_ids: SemanticIds
    splits: Splits
    sources: Sources
    renderer: PromptRenderer = RENDERER

    def rows(self, split: pl.DataFrame, families: list[str] | None = None, **shares: float):
        """Rows of those families that the data allow, rendered for epoch 0: a table for each."""
        names = list(FAMILIES) if families is None else families
        off = switched_off(names, self.sources.has())
        names = [name for name in names if name not in off]
        names = [name for name in names if FAMILIES[name].unit == INTERACTION]
        tables = list(interaction_rows(split, names, self.sources, shares))
        if families is None or SEQUENTIAL in families:
            tables.append(sequential_rows(split))
        return {t["task"][0]: self.render(t) for t in tables if len(t)}

    def items(self, family: str) -> pl.DataFrame:
        """Rows of a family that is made of items."""
        return self.render(item_rows(FAMILIES[family], self.sources, self.log["user_id"].dtype))

    def render(self, rows: pl.DataFrame, **more) -> pl.DataFrame:
        return render_rows(rows, self.sources.texts, self.renderer, self.sources.seed, **more)


class Worlds:
    """Makes worlds; a fixture, since tests are no package to import from."""

    def __init__(self, tiny, folder: Path) -> None:
        self._tiny, self._folder, self._made = tiny, folder, 0
        self.random_events = random_events

    def catalogue(self, *args, **more) -> tuple[pl.DataFrame, SemanticIds]:
        return catalogue(self._tiny, *args, **more)

    def of(
        self,
        events: list[list[Event]],
        catalog: pl.DataFrame | None = None,
        strings: bool = False,
        item_ids: list | None = None,
        users: list | None = None,
        columns: tuple[str, ...] = ("review", "summary", "query"),
        max_history: int = 4,
        seed: int = 0,
    ) -> World:
        """Everything from the events of each user, as the recipe makes it."""
        table, semantic_ids = catalogue(self._tiny, strings, item_ids)
        table = table if catalog is None else catalog
        log = log_of(events, table, users)
        log = log.drop({"review", "summary", "query"} - set(columns))
        self._made += 1
        path = self._folder / f"interactions-{self._made}.parquet"
        log.write_parquet(path)
        splits = leave_one_out(log, N_ITEMS, max_history)
        last = splits.train.group_by("user_id").agg(pl.col("target_position").max().alias("last"))
        training = log.join(last, on="user_id").filter(pl.col("position") <= pl.col("last"))
        attributes = item_attributes(table)
        aspects = review_aspects(
            training if REVIEW in log.columns else training.clear().drop("rating")
        )
        sources = Sources(
            texts=ItemTexts.of(table, semantic_ids),
            item_ids=semantic_ids.item_ids,
            draw=ItemDraw(splits.train_count),
            log=InteractionLog.of(path),
            attributes=AttributeIndex.build(attributes, N_ITEMS),
            intentions=item_intentions(table, attributes, WORDING, aspects, seed),
            queries=item_queries(table, attributes, WORDING, seed),
            aspects=aspects,
            wording=WORDING,
            seed=seed,
        )
        return World(table, log, semantic_ids, splits, sources)


@pytest.fixture(scope="session")
def worlds(tiny, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """Factory of small worlds."""
    return Worlds(tiny, tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="session")
def world(worlds: Worlds) -> World:
    """A world whose data allow every family; read only."""
    return worlds.of(random_events(0))
