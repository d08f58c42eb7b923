"""Sequential recommendation: the user's history of SIDs -> the next item's SID (LC-Rec, P5, TIGER).

A prompt ends with the history, so the row that trains a whole history in one causal pass
continues exactly like the prompt that is served: prompt(history) is a prefix of every later row.
"""

from __future__ import annotations

import polars as pl

from genrec.columns import (
    HISTORY,
    HISTORY_ITEMS,
    ROW_ID,
    SUPERVISE_FROM,
    TARGET,
    TARGET_KIND,
    TARGET_POSITION,
    TARGETS,
    TASK,
    USER_ID,
)
from genrec.prompts import PromptRenderer
from genrec.tasks.families import FAMILIES, SEQUENTIAL


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


def check_template(renderer: PromptRenderer, template: str) -> None:
    """Raise ValueError as `history_prompt` would for some history."""
    for history in ([], ["<a_1><b_2>"], ["<a_1><b_2>", "<a_3><b_4>"]):
        history_prompt(renderer, template, history)


def explode(rows: pl.DataFrame) -> pl.DataFrame:
    """Split rows that supervise several items -> one row per supervised item.

    Row ids gain the position, ``train-000003#2``; a `target_position` is moved along.
    """
    index = pl.col("_position")
    behind = pl.col(HISTORY).list.len().cast(pl.Int32)
    moved = [pl.col(TARGET_POSITION) - pl.col("_behind") + index.cast(pl.Int32)]
    return (
        rows.with_columns(
            _items=pl.concat_list(HISTORY, TARGET),
            _behind=behind,
            _position=pl.int_ranges(pl.col(SUPERVISE_FROM), pl.col(HISTORY).list.len() + 1),
        )
        .explode("_position")
        .with_columns(
            (pl.col(ROW_ID) + "#" + index.cast(pl.String)).alias(ROW_ID),
            pl.col("_items").list.head(index).alias(HISTORY),
            pl.col("_items").list.get(index).alias(TARGET),
            index.cast(pl.Int32).alias(SUPERVISE_FROM),
            *(moved if TARGET_POSITION in rows.columns else []),
        )
        .drop("_items", "_position", "_behind")
    )


def newest_alone(rows: pl.DataFrame) -> pl.DataFrame:
    """The same rows, of which each supervises its target alone and shows all items before it."""
    return rows.with_columns(pl.col(HISTORY).list.len().cast(pl.Int32).alias(SUPERVISE_FROM))


def sequential_rows(split: pl.DataFrame) -> pl.DataFrame:
    """Instruction rows of split rows, not yet rendered.

    The items before `supervise_from` are the history that the prompt shows; the targets are all
    items from there to the row's target.

    Args:
        split: split rows (see `genrec.columns`).

    Returns:
        row_id, user_id, task, target_kind, targets and history; lists hold item indices.
    """
    items = pl.concat_list(HISTORY, TARGET)
    start = pl.col(SUPERVISE_FROM)
    return split.select(
        ROW_ID,
        USER_ID,
        pl.lit(SEQUENTIAL).alias(TASK),
        pl.lit(FAMILIES[SEQUENTIAL].target_kind).alias(TARGET_KIND),
        items.list.slice(start).alias(TARGETS),
        items.list.head(start).alias(HISTORY_ITEMS),
    )
