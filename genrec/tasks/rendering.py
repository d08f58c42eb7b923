"""Rows -> text: the one function that makes prompts and completions, for all families at once.

Rows hold item indices and texts; what a family's prompt and completion may show of them is in
`genrec.tasks.families`, how it is worded in ``prompts/``. Everything here works on columns: at the
rates of `recipes/benchmarks/dataset.py` an epoch of millions of rows is rendered in a minute or so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from genrec.columns import (
    COMPLETION,
    DESCRIPTION,
    HISTORY_RATINGS,
    ITEM_ID,
    PROMPT,
    ROW_ID,
    TASK,
    TEMPLATE,
    TITLE,
)
from genrec.item_lists import ItemLists, list_series
from genrec.prompts import PromptRenderer, escape_series
from genrec.tasks.families import (
    FAMILIES,
    ITEM_DESCRIPTION,
    ITEM_TITLE,
    LISTED_SIDS,
    NUMBER,
    OWN_TEXT,
    RATED_SIDS,
    SEQUENTIAL,
    SIDS,
    TEXT,
    TITLED_SIDS,
    TITLES,
    Fields,
)
from genrec.tasks.sequential import check_template
from genrec.title_ids import ItemMap


@dataclass(frozen=True)
class ItemTexts:
    """What a prompt can show of the items, in catalogue order.

    Attributes:
        sids: SID strings, or bracketed titles of a title index.
        titles: escaped titles; "Item <id>" where the data have none.
        descriptions: escaped descriptions, null where there is none.
        has_title: whether the title is the item's own, and says something.
    """

    sids: pl.Series
    titles: pl.Series
    descriptions: pl.Series
    has_title: pl.Series

    @classmethod
    def of(cls, catalog: pl.DataFrame, semantic_ids: ItemMap) -> ItemTexts:
        """From ``catalog.parquet`` and the map, row for row."""
        titles = escape_series(catalog[TITLE])
        made_up = catalog.select(pl.col(TITLE) == pl.format("Item {}", ITEM_ID)).to_series()
        descriptions = escape_series(catalog[DESCRIPTION])
        named = pl.DataFrame({"text": descriptions}).select(
            pl.when(pl.col("text") != "").then(pl.col("text"))
        )
        return cls(semantic_ids.sids(), titles, named.to_series(), (titles != "") & ~made_up)


def render_rows(
    rows: pl.DataFrame,
    texts: ItemTexts,
    renderer: PromptRenderer,
    seed: int = 0,
    epoch: int = 0,
    n_templates: int | None = None,
    template: str | None = None,
) -> pl.DataFrame:
    """Add `template`, `prompt` and `completion`.

    Args:
        rows: row_id, task, and what the tasks' families need; lists hold item indices.
        texts: of the items.
        renderer: the templates.
        seed: of the draw of templates; see `PromptRenderer.pick_many`.
        epoch: of the training, from 0: another template for each.
        n_templates: draw from the first so many seen templates only.
        template: this one for all rows (serving, evaluation).

    Returns:
        The rows, in their order, with the three columns. A row's text depends on its own columns,
        the seed and the epoch, and on nothing else.

    Raises:
        ValueError: a template puts text behind the history of the sequential task, where the
            served prompt would be no prefix of the training row; or one that `render` refuses.
    """
    prompts = pl.Series(PROMPT, [None] * len(rows), dtype=pl.String)
    completions, templates = prompts.alias(COMPLETION), prompts.alias(TEMPLATE)
    parts = []
    numbered = rows.select(pl.int_range(pl.len(), dtype=pl.UInt32).alias("_at"), TASK)
    for (task,), places in numbered.group_by(TASK, maintain_order=True):
        family, at = FAMILIES[str(task)], places["_at"]
        mine = rows if len(at) == len(rows) else rows[at]
        named = (
            pl.repeat(template, len(mine), eager=True)
            if template
            else renderer.pick_many(family.name, mine[ROW_ID], seed, epoch, n_templates)
        )
        if family.name == SEQUENTIAL:
            for name in named.unique():
                check_template(renderer, name)
        prompt = _filled(mine, named, family.prompt, texts, renderer)
        completion = _filled(
            mine, f"{family.name}/completion/01", family.completion, texts, renderer
        )
        parts.append(
            pl.DataFrame({"_at": at, TEMPLATE: named, PROMPT: prompt, COMPLETION: completion})
        )
    if not parts:
        return rows.with_columns(templates, prompts, completions)
    made = pl.concat(parts).sort("_at").drop("_at")
    return rows.hstack(made)


def served_prompts(
    rows: pl.DataFrame, family: str, texts: ItemTexts, renderer: PromptRenderer
) -> pl.Series:
    """Prompts of one family as they are served, (rows,).

    Args:
        rows: what the family's prompt shows; lists hold item indices.
        family: its first seen template is rendered, which every setting of `n_templates` keeps.
        texts: of the items.
        renderer: the templates that the model was trained with.
    """
    template = renderer.names(family)[0]
    return _filled(rows, template, FAMILIES[family].prompt, texts, renderer).alias(PROMPT)


def served_completions(
    rows: pl.DataFrame, family: str, texts: ItemTexts, renderer: PromptRenderer
) -> pl.Series:
    """What follows the prompts of one family in training, (rows,).

    Args:
        rows: what the family's completion holds.
        family: its name.
        texts: of the items.
        renderer: the templates that the model was trained with.
    """
    fields = FAMILIES[family].completion
    made = _filled(rows, f"{family}/completion/01", fields, texts, renderer)
    return made.alias(COMPLETION)


def _filled(
    rows: pl.DataFrame,
    templates: pl.Series | str,
    fields: Fields,
    texts: ItemTexts,
    renderer: PromptRenderer,
) -> pl.Series:
    """The template, or each row's own, with the rows' fields in it. ``# (rows,)``."""
    own, untrusted = {}, {}
    for variable, (column, form) in fields.items():
        if form == TEXT:
            untrusted[variable] = rows[column]
        else:
            own[variable] = shown(rows, column, form, texts)
    if isinstance(templates, str):
        return renderer.render_many(templates, own, untrusted)
    return renderer.render_each(templates, own, untrusted)


def shown(rows: pl.DataFrame, column: str, form: str, texts: ItemTexts) -> pl.Series:
    """A column in the given form, one text a row; see `genrec.tasks.families`. ``# (rows,)``.

    Raises:
        ValueError: an item's title or description is asked for that has none.
    """
    if form == OWN_TEXT:
        return rows[column]
    if form == NUMBER:
        # Infinite and huge numbers are no whole ones here: they don't fit.
        whole = (pl.col(column) == pl.col(column).round()) & (pl.col(column).abs() < 2**53)
        text = pl.when(whole).then(pl.col(column).cast(pl.Int64, strict=False).cast(pl.String))
        return rows.select(text.otherwise(pl.col(column).round(2).cast(pl.String))).to_series()
    if form in (ITEM_TITLE, ITEM_DESCRIPTION):
        values = texts.titles if form == ITEM_TITLE else texts.descriptions
        found = values.gather(rows[column].list.first().cast(pl.UInt32))
        if found.null_count():
            raise ValueError(f"an item of column {column!r} has no {form}")
        return found
    lists = ItemLists.from_column(rows[column])
    items = pl.Series(lists.values.astype(np.uint32))
    if form == SIDS:
        return joined(texts.sids[items], lists, "")
    if form == LISTED_SIDS:
        return joined(texts.sids[items], lists, ", ")
    if form == TITLES:
        return joined(texts.titles[items], lists, "; ")
    parts = pl.DataFrame({"title": texts.titles[items], "sid": texts.sids[items]})
    if form == TITLED_SIDS:
        return joined(parts.select(pl.format("{} {}", "title", "sid")).to_series(), lists, "; ")
    assert form == RATED_SIDS, form
    ratings = rows[HISTORY_RATINGS].explode(keep_nulls=False, empty_as_null=False)
    rated = parts.with_columns(shown(ratings.to_frame("rating"), "rating", NUMBER, texts))
    return joined(rated.select(pl.format("{} {}", "sid", "rating")).to_series(), lists, "; ")


def joined(values: pl.Series, lists: ItemLists, separator: str) -> pl.Series:
    """Texts of each list in one text; empty for an empty list.

    Args:
        values: a text for each of `lists`' values. ``# (n_values,)``
        lists: which values belong together.
        separator: between two.
    """
    if values.null_count():
        return list_series(values, lists.offsets).list.join(separator)  # nulls are left out
    if separator and len(values):
        values = values + separator
    # The texts lie one after the other in memory: a list's text is a longer piece of the same.
    flat = values.to_arrow(compat_level=pl.CompatLevel.oldest())
    assert not flat.offset
    _, ends, letters = flat.buffers()
    offsets = np.frombuffer(ends, dtype=np.int64)[lists.offsets]
    whole = pa.LargeStringArray.from_buffers(len(lists), pa.py_buffer(offsets), letters)
    texts = pl.Series(values.name, whole, dtype=pl.String)
    return texts.str.head(-len(separator)) if separator else texts
