"""Alignment of text and SIDs: title -> SID and SID -> title (LC-Rec's item <-> index tasks).

Here the target is the item that the prompt names, by definition; only the declared field is shown.
"""

from __future__ import annotations

import polars as pl

from genrec.columns import (
    COMPLETION,
    HISTORY_ITEM_IDS,
    ITEM_ID,
    PROMPT,
    ROW_ID,
    TARGET_ITEM_ID,
    TASK,
    TEMPLATE,
    TITLE,
    USER_ID,
)
from genrec.prompts import PromptRenderer, escape_text
from genrec.semantic_ids import SemanticIds

TITLE_TO_SID = "title_to_sid"
SID_TO_TITLE = "sid_to_title"


def item_index_rows(
    family: str,
    catalog: pl.DataFrame,
    semantic_ids: SemanticIds,
    renderer: PromptRenderer,
    user_id_dtype: pl.DataType,
    seed: int = 0,
    n_templates: int | None = None,
) -> pl.DataFrame:
    """Instruction rows of one direction, one per catalogue item; `user_id` is null.

    Titles that several items share are left out of title -> SID: they don't say which one is meant.
    Titles count as they are shown, escaped; one of which nothing is left is in neither direction.

    Args:
        family: `TITLE_TO_SID` or `SID_TO_TITLE`.
        catalog: ``catalog.parquet``.
        semantic_ids: the SID map, row for row.
        renderer: the templates.
        user_id_dtype: type of the (null) user column, so that families can be concatenated.
        seed: of the template draw.
        n_templates: draw from the first so many templates only.
    """
    titles = pl.Series(TITLE, [escape_text(t) for t in catalog[TITLE]], dtype=pl.String)
    table = catalog.select(ITEM_ID).with_columns(titles, semantic_ids.sids().alias("sid"))
    table = table.filter(pl.col(TITLE) != "")
    if family == TITLE_TO_SID:
        table = table.filter(~pl.col(TITLE).is_duplicated())
    templates, prompts, completions = [], [], []
    for item_id, title, sid in table.iter_rows():
        template = renderer.pick(family, f"{family}-{item_id}", seed, n_templates)
        templates.append(template)
        if family == TITLE_TO_SID:
            prompts.append(renderer.render(template, texts={"title": title}))
            completions.append(sid)
        else:
            prompts.append(renderer.render(template, sids={"sid": sid}))
            completions.append(title)
    return pl.DataFrame(
        {
            ROW_ID: [f"{family}-{item_id}" for item_id in table[ITEM_ID]],
            USER_ID: pl.Series([None] * len(table), dtype=user_id_dtype),
            TASK: pl.repeat(family, len(table), eager=True),
            TEMPLATE: templates,
            PROMPT: prompts,
            COMPLETION: completions,
            TARGET_ITEM_ID: table[ITEM_ID],
            HISTORY_ITEM_IDS: pl.Series([[]] * len(table), dtype=pl.List(table[ITEM_ID].dtype)),
        },
        schema_overrides={TEMPLATE: pl.String, PROMPT: pl.String, COMPLETION: pl.String},
    )
