"""Split rows and the catalogue -> instruction rows of every family, not yet rendered.

Rows of a chunk of split rows are made from that chunk alone, so a dataset of any size is built in
flat memory. Columns that a prompt shows are functions of what the user had before the target; the
few that are not are declared by their family (`shows_target`) and show one field of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from genrec.columns import (
    CANDIDATES,
    HISTORY,
    HISTORY_ITEMS,
    HISTORY_RATINGS,
    INTENTION,
    ITEM_INDEX,
    POSITION,
    PREFERENCE,
    QUERY,
    RATING,
    REVIEW,
    ROW_ID,
    SET_ASIDE,
    SHOWN,
    STEPS,
    SUMMARY,
    TARGET,
    TARGET_KIND,
    TARGET_POSITION,
    TARGETS,
    TASK,
    TEXT_ORIGIN,
    USER_ID,
)
from genrec.item_lists import list_series
from genrec.prompts import PromptRenderer, says_something
from genrec.tasks.attributes import AttributeIndex
from genrec.tasks.families import (
    FAMILIES,
    HAS_ATTRIBUTES,
    HAS_DESCRIPTIONS,
    HAS_INTENTIONS,
    HAS_PREFERENCES,
    HAS_QUERIES,
    HAS_RATINGS,
    HAS_REVIEWS,
    HAS_SUMMARIES,
    HAS_TITLES,
    INTERACTION,
    ITEM,
    STEP_TEXTS,
    Family,
)
from genrec.tasks.instruction_rows import COMMON, gathered
from genrec.tasks.noise import KEEP, TEXT_CHOICE, ItemDraw, add_candidates, add_noise, uniform
from genrec.tasks.reasoning import reasoning_slots, step_texts
from genrec.tasks.rendering import ItemTexts
from genrec.tasks.sequential import explode
from genrec.tasks.texts import RULE, history_preferences, review_preferences

IntArray = npt.NDArray[np.int64]

N_CANDIDATES = 10
_ROWS_READ = 1 << 16  # split rows
_LOG_COLUMNS = (RATING, REVIEW, SUMMARY, QUERY)


@dataclass(frozen=True)
class InteractionLog:
    """What came with each interaction, read from ``interactions.parquet`` as it is needed.

    Attributes:
        path: of the file; users in blocks, ordered by position.
        columns: of `_LOG_COLUMNS`, those that hold something.
        users: user_id and `start`, the place of the user's first interaction; sorted by user_id.
    """

    path: Path
    columns: tuple[str, ...]
    users: pl.DataFrame

    @classmethod
    def of(cls, path: Path) -> InteractionLog:
        """Look at the file."""
        log = pl.scan_parquet(path, glob=False)
        there = [c for c in _LOG_COLUMNS if c in log.collect_schema().names()]
        holds = log.select(pl.col(c).is_not_null().any() for c in there).collect(engine="streaming")
        known = holds.row(0) if there else ()
        columns = tuple(c for c, holds in zip(there, known, strict=True) if holds)
        starts = log.select(USER_ID, POSITION).with_row_index("start").filter(pl.col(POSITION) == 0)
        users = (starts if columns else starts.head(0)).select(USER_ID, "start")
        return cls(path, columns, users.collect(engine="streaming").sort(USER_ID))

    def places(self, rows: pl.DataFrame) -> IntArray:
        """Place of each row's target in the log."""
        # Not a join: that would hash all users anew for each chunk of rows.
        at = self.users[USER_ID].search_sorted(rows[USER_ID])
        assert self.users[USER_ID][at].equals(rows[USER_ID]), "a row's user has no interactions"
        return self.users["start"][at].to_numpy() + rows[TARGET_POSITION].to_numpy().astype(
            np.int64
        )

    def read(self, places: IntArray, column: str) -> pl.Series:
        """Values of a column at places of the log, which should lie near each other."""
        if not len(places):
            return pl.Series(column, [], dtype=pl.String if column != RATING else pl.Float64)
        low, high = int(places.min()), int(places.max()) + 1
        part = pl.scan_parquet(self.path, glob=False).select(column).slice(low, high - low)
        return part.collect()[column].gather(pl.Series(places - low, dtype=pl.UInt32))

    def of_histories(self, rows: pl.DataFrame, column: str) -> pl.Series:
        """What came with the interactions of each history, oldest first, (rows,) of lists.

        Args:
            rows: user_id, target_position, and as `HISTORY_ITEMS` the items right before it.
            column: of `columns`.
        """
        lengths = rows[HISTORY_ITEMS].list.len().to_numpy().astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        begin = np.repeat(self.places(rows) - lengths - offsets[:-1], lengths)
        values = self.read(begin + np.arange(offsets[-1]), column)
        return list_series(values, offsets)


@dataclass(frozen=True)
class Sources:
    """What rows are made of, beside the split rows.

    Attributes:
        texts: of the items, and their SIDs.
        item_ids: the user's item ids in catalogue order.
        draw: where candidates come from.
        log: ratings, reviews and queries of the interactions.
        attributes: of the catalogue.
        intentions: item_index, text, origin.
        queries: item_index, text, origin; used where the log has no queries.
        aspects: what the training reviews praise and complain about (`review_aspects`).
        wording: templates of texts that rows hold (`genrec.tasks.texts.written_renderer`).
        preferences: preferences of histories by an LLM: (row ids, histories) -> row_id, text,
            origin; None leaves them to the rules.
        seed: of all draws.
    """

    texts: ItemTexts
    item_ids: pl.Series
    draw: ItemDraw
    log: InteractionLog
    attributes: AttributeIndex
    intentions: pl.DataFrame
    queries: pl.DataFrame
    aspects: pl.DataFrame
    wording: PromptRenderer
    seed: int
    preferences: Callable[[pl.Series, pl.Series], pl.DataFrame] | None = None

    def has(self) -> dict[str, bool]:
        """For each of `genrec.tasks.families.NEEDS`, whether the data have it."""
        attributes, reviews = len(self.attributes.values) > 0, REVIEW in self.log.columns
        return {
            HAS_TITLES: bool(self.texts.has_title.any()),
            HAS_DESCRIPTIONS: bool(self.texts.descriptions.is_not_null().any()),
            HAS_RATINGS: RATING in self.log.columns,
            HAS_REVIEWS: reviews,
            HAS_SUMMARIES: SUMMARY in self.log.columns,
            HAS_QUERIES: QUERY in self.log.columns or len(self.queries) > 0,
            HAS_INTENTIONS: len(self.intentions) > 0,
            HAS_ATTRIBUTES: attributes,
            HAS_PREFERENCES: attributes or len(self.aspects) > 0,
        }


def read_chunks(path: Path, n_interactions: int = 50_000) -> Iterator[pl.DataFrame]:
    """`chunks` of the split rows in a file, which is read bit by bit: no table of all rows is made.

    Args:
        path: ``train.parquet`` of the prepare stage.
        n_interactions: that a chunk supervises, about; fewer where a bit ends.
    """
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS_READ):
            part = pl.from_arrow(pa.Table.from_batches([batch]))
            assert isinstance(part, pl.DataFrame)
            yield from chunks(part, n_interactions)


def chunks(split: pl.DataFrame, n_interactions: int = 50_000) -> Iterator[pl.DataFrame]:
    """Slices of split rows that supervise about so many interactions each."""
    if split.is_empty():
        return
    supervised = split[HISTORY].list.len().cast(pl.Int64) + 1 - split["supervise_from"]
    number = (supervised.cum_sum() - 1) // n_interactions
    starts = np.flatnonzero(np.diff(number.to_numpy(), prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(split)], strict=True):
        yield split[int(start) : int(end)]


def interaction_rows(
    split: pl.DataFrame, families: Sequence[str], sources: Sources, shares: Mapping[str, float]
) -> Iterator[pl.DataFrame]:
    """Rows of the families that are made of single interactions, a table per family.

    Args:
        split: a chunk of split rows.
        families: names.
        sources: the rest.
        shares: share of the interactions that a family takes, 1 where it is not named; the same
            interactions for all families of one share.
    """
    chosen = [FAMILIES[name] for name in families if FAMILIES[name].unit == INTERACTION]
    if not chosen:
        return
    base = explode(split).rename({HISTORY: HISTORY_ITEMS})
    base = base.with_columns(pl.concat_list(TARGET).alias(TARGETS))
    base = base.with_columns(pl.Series("_draw", uniform(base[ROW_ID], sources.seed, 1, KEEP)[:, 0]))
    base = base.sort("_draw")  # a smaller share is then the head of a larger one
    columns = _Columns(base, sources, chosen, shares)
    for family in chosen:
        yield columns.rows(family)


class _Columns:
    """Columns of a chunk, each made once, for as many rows as any family takes."""

    def __init__(
        self,
        base: pl.DataFrame,
        sources: Sources,
        families: Sequence[Family],
        shares: Mapping[str, float],
    ) -> None:
        self._base, self._sources = base, sources
        self._counts = {
            f.name: int((base["_draw"] < shares.get(f.name, 1.0)).sum()) for f in families
        }
        self._needed: dict[str, int] = {}
        for family in families:
            for column in family.columns:
                most = max(self._needed.get(column, 0), self._counts[family.name])
                self._needed[column] = most
        self._made: dict[str, pl.Series] = {}

    def rows(self, family: Family) -> pl.DataFrame:
        """Rows of a family: those that have all that it needs."""
        count = self._counts[family.name]
        wanted = [name for name in family.columns if name not in family.steps]
        if family.name == "rating":
            wanted.append(HISTORY_RATINGS)
        table = self._base.head(count).with_columns(
            self._column(name).head(count).alias(name) for name in (*wanted, *family.steps)
        )
        if origins := [name for name in wanted if name in _WRITTEN]:
            origin = self._column(_ORIGIN_OF + origins[0]).head(count)
            table = table.with_columns(origin.alias(TEXT_ORIGIN))
        if family.steps:
            steps = [self._column(_SLOTS_OF + name).head(count) for name in family.steps]
            table = table.with_columns(_side_by_side(steps).alias(STEPS))
        if family.target_kind in ("title", "sid and title"):
            named = self._sources.texts.has_title.gather(table[TARGET].cast(pl.UInt32))
            table = table.filter(named)
        known = [pl.col(name).is_not_null() for name in (*wanted, *family.steps)]
        known.append(pl.col(HISTORY_ITEMS).list.len() >= family.least_history)
        if HISTORY_RATINGS in wanted:  # unrated items are not shown
            known.append(pl.col(HISTORY_RATINGS).list.drop_nulls().list.len() > 0)
        if SET_ASIDE in wanted:  # no noise was found: nothing is asked
            known.append(pl.col(SET_ASIDE).list.len() > 0)
        more = [name for name in (TEXT_ORIGIN, STEPS) if name in table.columns]
        complete = table.select(pl.all_horizontal(known)).to_series()
        table = table.with_columns(
            (family.name + ":" + pl.col(ROW_ID)).alias(ROW_ID),
            pl.lit(family.name).alias(TASK),
            pl.lit(family.target_kind).alias(TARGET_KIND),
        ).select(*COMMON, *wanted, *family.steps, *more)
        return table if complete.all() else table.filter(complete)

    def _column(self, name: str) -> pl.Series:
        if name not in self._made:
            count = max(self._needed.get(name, 0), self._needed.get(_MADE_WITH.get(name, ""), 0))
            self._make(name, self._base.head(count))
        return self._made[name]

    def _make(self, name: str, rows: pl.DataFrame) -> None:
        """Make a column, and those that come with it."""
        sources, seed = self._sources, self._sources.seed
        if name == CANDIDATES:
            table = add_candidates(rows, sources.draw, N_CANDIDATES, seed)
            self._made[name] = table[CANDIDATES]
        elif name in (SHOWN, SET_ASIDE):
            table = add_noise(rows, len(sources.item_ids), seed)
            self._made |= {column: table[column] for column in (SHOWN, SET_ASIDE)}
        elif name == HISTORY_RATINGS:
            self._made[name] = sources.log.of_histories(rows, RATING)
        elif name in sources.log.columns:
            values = sources.log.read(sources.log.places(rows), name)
            if name != RATING:
                values = values.set(~says_something(values), None)
            self._made[name] = values
            self._made[_ORIGIN_OF + name] = pl.repeat("data", len(rows), eager=True)
        elif name in (INTENTION, QUERY):
            texts = sources.intentions if name == INTENTION else sources.queries
            text, origin = _text_of_target(rows, texts, seed)
            self._made |= {name: text, _ORIGIN_OF + name: origin}
        elif name == PREFERENCE:
            self._make_preferences(rows)
        elif name in STEP_TEXTS:
            self._make_steps(rows)
        else:
            raise AssertionError(f"nothing makes column {name!r}")

    def _make_preferences(self, rows: pl.DataFrame) -> None:
        """From the user's own earlier reviews where they say something, else from the history.

        What an LLM wrote goes before both.
        """
        sources, ids = self._sources, rows[ROW_ID]
        seed, wording = sources.seed, sources.wording
        made = history_preferences(rows[HISTORY_ITEMS], sources.attributes, wording, ids, seed)
        if len(sources.aspects):
            moments = rows.select(USER_ID, pl.col(TARGET_POSITION).alias(POSITION))
            said = review_preferences(moments, sources.aspects, wording, ids, seed)
            made = said.zip_with(said.is_not_null(), made)
        table = pl.DataFrame({ROW_ID: ids, "rule": made, "by": RULE})
        if sources.preferences is not None:
            written = sources.preferences(ids, rows[HISTORY_ITEMS])
            table = table.join(written, on=ROW_ID, how="left", maintain_order="left")
            table = table.with_columns(
                pl.coalesce("text", "rule").alias("rule"), pl.coalesce("origin", "by").alias("by")
            )
        self._made |= {PREFERENCE: table["rule"], _ORIGIN_OF + PREFERENCE: table["by"]}

    def _make_steps(self, rows: pl.DataFrame) -> None:
        """Texts and typed slots of the reasoning steps."""
        sources = self._sources
        slots = reasoning_slots(rows[HISTORY_ITEMS], sources.attributes)
        worded = step_texts(
            slots, sources.wording, rows[ROW_ID], sources.seed, sids=sources.texts.sids
        )
        for column in STEP_TEXTS:
            step = column.removeprefix("step_")
            self._made[column] = worded[step]
            self._made[_SLOTS_OF + column] = _typed(step, worded[step], slots, sources.item_ids)


def _side_by_side(columns: Sequence[pl.Series]) -> pl.Series:
    """``pl.concat_list``; a hundred times as fast for structs."""
    rows, n = len(columns[0]), len(columns)
    if not rows:
        return pl.Series([], dtype=pl.List(columns[0].dtype))
    order = np.arange(n) * rows + np.arange(rows)[:, None]
    below = pl.concat([column.alias("") for column in columns])
    return below.gather(pl.Series(order.ravel())).reshape((rows, n)).arr.to_list()


_WRITTEN = (INTENTION, QUERY, PREFERENCE)  # columns of text that somebody wrote
_ORIGIN_OF, _SLOTS_OF = "origin of ", "slots of "
_MADE_WITH = {HISTORY_RATINGS: RATING}  # needed by as many rows as that one
_CITED = {"evidence": "evidence_items", "preference": "evidence_items",
    "intent": "intent_items", "rewriting": "kept_items"}  # fmt: skip


def _typed(step: str, text: pl.Series, slots: pl.DataFrame, item_ids: pl.Series) -> pl.Series:
    """A step as typed slots, row by row (`genrec.tasks.instruction_rows.step_slots`)."""
    nothing = pl.Series([None], dtype=pl.String).new_from_index(0, len(text))
    claims = {
        f"claimed_{part}": slots[f"{step}_{part}"] if f"{step}_{part}" in slots.columns else nothing
        for part in ("kind", "value")
    }
    if step in _CITED:
        cited = gathered(slots[_CITED[step]], item_ids)
    else:
        cited = pl.Series([[]], dtype=pl.List(item_ids.dtype)).new_from_index(0, len(text))
    columns = {"text": text, **claims, "cited_item_ids": cited}
    frame = pl.DataFrame(columns).with_columns(pl.lit(step).alias("type"))
    return frame.select(pl.struct("type", *columns)).to_series()


def _text_of_target(
    rows: pl.DataFrame, texts: pl.DataFrame, seed: int
) -> tuple[pl.Series, pl.Series]:
    """One of the texts that the target has, drawn by row, and its origin; null without one.

    Args:
        rows: row_id and target.
        texts: item_index, text and origin.
        seed: of the draw.
    """
    texts = texts.drop_nulls("text").sort(ITEM_INDEX, maintain_order=True)
    counts = texts.group_by(ITEM_INDEX, maintain_order=True).len()
    counts = counts.with_columns((pl.col("len").cum_sum() - pl.col("len")).alias("start"))
    mine = rows.select(pl.col(TARGET).alias(ITEM_INDEX)).join(
        counts.with_columns(pl.col(ITEM_INDEX).cast(pl.Int32)),
        ITEM_INDEX, "left", maintain_order="left",
    )  # fmt: skip
    numbers = uniform(rows[ROW_ID], seed, 1, TEXT_CHOICE)[:, 0]
    place = mine["start"] + pl.Series(numbers) * mine["len"]
    at = place.floor().cast(pl.UInt32)
    return texts["text"].gather(at), texts["origin"].gather(at)


def item_rows(family: Family, sources: Sources, user_id: pl.DataType) -> pl.DataFrame:
    """Rows of a family that is made of catalogue items, one per item.

    Texts that several items share are not asked back: they don't say which one is meant. Texts
    count as they are shown, escaped; an item of whose texts nothing is left has no row.

    Args:
        family: one whose unit is an item.
        sources: texts and ids of the items.
        user_id: type of the (null) user column.
    """
    assert family.unit == ITEM
    texts = sources.texts
    table = pl.DataFrame(
        {
            "item": np.arange(len(texts.sids), dtype=np.int32),
            "id": sources.item_ids,
            "title": texts.titles,
            "description": texts.descriptions,
            "named": texts.has_title,
        }
    )
    variables = {*family.prompt, *family.completion}
    if "title" in variables:
        table = table.filter("named")
    if "description" in variables:
        table = table.filter(pl.col("description").is_not_null())
    if shown := [name for name in ("title", "description") if name in family.prompt]:
        table = table.filter(~pl.struct(shown).is_duplicated())
    return table.select(
        pl.format("{}:{}", pl.lit(family.name), "id").alias(ROW_ID),
        pl.lit(None, dtype=user_id).alias(USER_ID),
        pl.lit(family.name).alias(TASK),
        pl.lit(family.target_kind).alias(TARGET_KIND),
        pl.concat_list("item").alias(TARGETS),
        pl.lit([], dtype=pl.List(pl.Int32)).alias(HISTORY_ITEMS),
    )
