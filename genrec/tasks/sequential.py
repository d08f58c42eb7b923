"""Sequential recommendation: the user's history of SIDs -> the next item's SID (LC-Rec, P5, TIGER).

A prompt ends with the history, so the row that trains a whole history in one causal pass
continues exactly like the prompt that is served: prompt(history) is a prefix of every later row.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa

from genrec.columns import (
    COMPLETION,
    HISTORY,
    HISTORY_ITEM_IDS,
    PROMPT,
    ROW_ID,
    SUPERVISE_FROM,
    TARGET,
    TARGET_ITEM_ID,
    TASK,
    TEMPLATE,
    USER_ID,
)
from genrec.prompts import PromptRenderer
from genrec.semantic_ids import SemanticIds

FAMILY = "sequential"


def history_prompt(renderer: PromptRenderer, template: str, sids: list[str]) -> str:
    """Prompt for a history of SID strings, oldest first (empty for a user without history).

    Raises:
        ValueError: the template puts text after the history, or text that depends on it before;
            then a whole history can't be trained in one pass and the served prompt would be no
            prefix of the training row.
    """
    history = "".join(sids)
    prompt = renderer.render(template, sids={"history": history})
    if prompt != renderer.render(template, sids={"history": ""}) + history:
        raise ValueError(
            f"template {template!r} must end with the history, behind text that is always the same"
        )
    return prompt


def explode(rows: pl.DataFrame) -> pl.DataFrame:
    """Split rows that supervise several items -> one row per supervised item.

    Row ids gain the position, ``train-000003#2``.
    """
    index = pl.col("_position")
    items = pl.concat_list(HISTORY, TARGET)
    return (
        rows.with_columns(
            _items=items,
            _position=pl.int_ranges(pl.col(SUPERVISE_FROM), pl.col(HISTORY).list.len() + 1),
        )
        .explode("_position")
        .with_columns(
            (pl.col(ROW_ID) + "#" + index.cast(pl.String)).alias(ROW_ID),
            pl.col("_items").list.head(index).alias(HISTORY),
            pl.col("_items").list.get(index).alias(TARGET),
            index.cast(pl.Int32).alias(SUPERVISE_FROM),
        )
        .drop("_items", "_position")
    )


def sequential_rows(
    split: pl.DataFrame,
    semantic_ids: SemanticIds,
    renderer: PromptRenderer,
    template: str | None = None,
    seed: int = 0,
    n_templates: int | None = None,
) -> pl.DataFrame:
    """Instruction rows of split rows.

    The prompt holds the items before `supervise_from`; the completion holds the SIDs of all items
    from there to the target.

    Args:
        split: split rows (see `genrec.columns`).
        semantic_ids: the SID map.
        renderer: the templates.
        template: this one for all rows (serving, evaluation); by default drawn per row.
        seed: of the draw.
        n_templates: draw from the first so many templates only.

    Returns:
        row_id, user_id, task, template, prompt, completion, target_item_id, history_item_ids.
    """
    sids = np.array(semantic_ids.sids().to_list(), dtype=object)
    prompts, completions, templates = [], [], []
    columns = (ROW_ID, HISTORY, TARGET, SUPERVISE_FROM)
    for row_id, history, target, start in split.select(columns).iter_rows():
        name = template or renderer.pick(FAMILY, row_id, seed, n_templates)
        items = sids[[*history, target]]
        templates.append(name)
        prompts.append(history_prompt(renderer, name, items[:start].tolist()))
        completions.append("".join(items[start:]))
    history_ids = _history_item_ids(split[HISTORY], semantic_ids.item_ids)
    return pl.DataFrame(
        {
            ROW_ID: split[ROW_ID],
            USER_ID: split[USER_ID],
            TASK: pl.repeat(FAMILY, len(split), eager=True),
            TEMPLATE: templates,
            PROMPT: prompts,
            COMPLETION: completions,
            TARGET_ITEM_ID: semantic_ids.item_ids.gather(split[TARGET]),
            HISTORY_ITEM_IDS: history_ids,
        },
        schema_overrides={TEMPLATE: pl.String, PROMPT: pl.String, COMPLETION: pl.String},
    )


def _history_item_ids(history: pl.Series, item_ids: pl.Series) -> pl.Series:
    """List column of item ids for a list column of item indices."""
    offsets = np.concatenate([[0], np.cumsum(history.list.len().to_numpy())]).astype(np.int64)
    flat = item_ids.gather(history.list.explode(keep_nulls=False, empty_as_null=False))
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), flat.to_arrow())
    return pl.Series(lists, dtype=pl.List(item_ids.dtype))
