"""Instruction rows in files and in memory: what `build_dataset` writes and `sft` trains on.

A file's row is complete: prompt and completion (of epoch 0) as TRL takes them, and the columns that
they were rendered from, so that any other epoch can be rendered, and audited, from the file alone.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq

from genrec.columns import (
    CANDIDATES,
    COMPLETION,
    HISTORY_ITEMS,
    HISTORY_RATINGS,
    INTENTION,
    PREFERENCE,
    PROMPT,
    QUERY,
    RATING,
    ROW_ID,
    SET_ASIDE,
    SHOWN,
    STEPS,
    TARGET_KIND,
    TARGETS,
    TASK,
    TEMPLATE,
    TEXT_ORIGIN,
    USER_ID,
)
from genrec.item_lists import ItemLists, list_series
from genrec.prompts import PromptRenderer
from genrec.tasks.families import FAMILIES
from genrec.tasks.rendering import ItemTexts, render_rows

ITEM_LISTS = (TARGETS, HISTORY_ITEMS, CANDIDATES, SHOWN, SET_ASIDE)
COMMON = (ROW_ID, USER_ID, TASK, TARGET_KIND, TARGETS, HISTORY_ITEMS)
RENDERED = (TEMPLATE, PROMPT, COMPLETION)
_DISTINCT = (ROW_ID, PROMPT)


def gathered(lists: pl.Series, values: pl.Series) -> pl.Series:
    """A list column with each item replaced by its value; nulls stay.

    Args:
        lists: lists of row numbers of `values`.
        values: one for each item.
    """
    items = ItemLists.from_column(lists)
    flat = values.gather(pl.Series(items.values.astype(np.uint32)))
    return _where_known(lists, list_series(flat, items.offsets))


def _where_known(before: pl.Series, lists: pl.Series) -> pl.Series:
    """The lists, null where they were null before."""
    if not before.null_count():
        return lists.alias(before.name)
    frame = pl.DataFrame({"known": before.is_not_null(), "list": lists})
    return frame.select(pl.when("known").then("list").alias(before.name)).to_series()


class RowWriter:
    """Writes instruction rows to one Parquet file, chunk by chunk: memory stays flat.

    A table is compressed in a thread of its own while the next one is made: compressing takes
    about as long as all the rest.

    Args:
        path: of the file; it is there, whole, only after `close`.
        families: whose rows come; they say which columns the file has.
        item_ids: the user's item ids in catalogue order.
        user_id: type of the user column.
    """

    def __init__(
        self, path: Path, families: list[str], item_ids: pl.Series, user_id: pl.DataType
    ) -> None:
        self._path, self._partial = path, path.with_name(path.name + ".partial")
        self._item_ids = item_ids
        self.schema = schema(families, item_ids.dtype, user_id)
        self._writer: pq.ParquetWriter | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="row-writer")
        self._pending: Future[None] | None = None
        self.rows = 0

    def write(self, rows: pl.DataFrame) -> None:
        """Append rendered rows; lists hold item indices."""
        lists = [gathered(rows[c], self._item_ids) for c in ITEM_LISTS if c in rows.columns]
        rows = rows.with_columns(lists)
        absent = [
            pl.lit(None, dtype=kind).alias(n)
            for n, kind in self.schema.items()
            if n not in rows.columns
        ]
        rows = rows.with_columns(absent).select(
            [pl.col(name).cast(kind) for name, kind in self.schema.items()]
        )
        table = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
        if self._writer is None:
            # Texts that no two rows share gain nothing from a dictionary and cost two passes.
            repeated = [name for name in self.schema if name not in _DISTINCT]
            self._writer = pq.ParquetWriter(
                self._partial, table.schema, compression="zstd", use_dictionary=repeated
            )
        self._wait()
        self._pending = self._thread.submit(self._writer.write_table, table)
        self.rows += len(rows)

    def _wait(self) -> None:
        """Until the table before is written; raises what its thread did."""
        if self._pending is not None:
            self._pending.result()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is None:
            self.write(pl.DataFrame(schema=self.schema))
        assert self._writer is not None
        self._wait()
        self._thread.shutdown()
        self._writer.close()
        self._partial.replace(self._path)


def schema(
    families: list[str], item_id: pl.DataType, user_id: pl.DataType
) -> dict[str, pl.DataType]:
    """Columns of a file with rows of these families."""
    kinds: dict[str, pl.DataType] = {
        ROW_ID: pl.String(), USER_ID: user_id, TASK: pl.String(), TARGET_KIND: pl.String(),
        TARGETS: pl.List(item_id), HISTORY_ITEMS: pl.List(item_id),
    }  # fmt: skip
    kinds |= {name: pl.String() for name in RENDERED}
    for name in families:
        for column in FAMILIES[name].columns:
            if column in ITEM_LISTS:
                kinds[column] = pl.List(item_id)
            elif column == RATING:
                kinds[column] = pl.Float64()
            else:
                kinds[column] = pl.String()
        if name == "rating":
            kinds[HISTORY_RATINGS] = pl.List(pl.Float64)
        if {INTENTION, QUERY, PREFERENCE} & set(FAMILIES[name].columns):
            kinds[TEXT_ORIGIN] = pl.String()
        if FAMILIES[name].steps:
            kinds[STEPS] = pl.List(step_slots(item_id))
    return kinds


def step_slots(item_id: pl.DataType) -> pl.Struct:
    """A reasoning step: its type, its text, the items it cites, the attribute it claims of them."""
    texts = {name: pl.String() for name in ("type", "text", "claimed_kind", "claimed_value")}
    return pl.Struct({**texts, "cited_item_ids": pl.List(item_id)})


@dataclass(frozen=True)
class InstructionRows:
    """Rows in memory, ready to be rendered for any epoch.

    Attributes:
        table: the columns of the file without the rendered ones; lists hold item indices.
        texts: of the items.
        renderer: the templates.
        seed: of the draw of templates, as the file was made with.
        n_templates: seen templates that are used of each family, None for all.
    """

    table: pl.DataFrame
    texts: ItemTexts
    renderer: PromptRenderer
    seed: int
    n_templates: int | None

    @classmethod
    def read(
        cls,
        path: Path,
        item_ids: pl.Series,
        texts: ItemTexts,
        renderer: PromptRenderer,
        seed: int,
        n_templates: int | None,
    ) -> InstructionRows:
        """Read what `RowWriter` wrote.

        Raises:
            ValueError: a row names an item that the catalogue lacks.
        """
        scan = pl.scan_parquet(path, glob=False)
        table = scan.drop(*RENDERED, STEPS, TEXT_ORIGIN, strict=False).collect()
        places = pl.DataFrame({"id": item_ids}).with_row_index("index")
        for column in [table[name] for name in ITEM_LISTS if name in table.columns]:
            ids = column.explode(keep_nulls=False, empty_as_null=False)
            found = pl.DataFrame({"id": ids}).join(places, "id", "left", maintain_order="left")
            if found["index"].null_count():
                odd = ids.filter(found["index"].is_null())[0]
                raise ValueError(f"{path}: {column.name} holds {odd!r}, which is no item")
            lengths = column.list.len().fill_null(0).to_numpy().astype(np.int64)
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            lists = list_series(found["index"].cast(pl.Int32), offsets)
            table = table.with_columns(_where_known(column, lists))
        return cls(table, texts, renderer, seed, n_templates)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.table)

    def render(self, rows: npt.NDArray[np.int64], epochs: npt.NDArray[np.int64]) -> pl.DataFrame:
        """Template, prompt and completion of rows, each for its epoch. ``# (rows, 3)``."""
        parts = []
        for epoch in np.unique(epochs):
            at = np.flatnonzero(epochs == epoch)
            part = render_rows(
                self.table[rows[at]], self.texts, self.renderer, self.seed, int(epoch),
                self.n_templates,
            )  # fmt: skip
            parts.append(part.select(pl.Series("_at", at), *RENDERED))
        return pl.concat(parts).sort("_at").drop("_at")
