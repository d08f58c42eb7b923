"""Rows for reinforcement learning: one per user, at the end of the training part.

A model that has been trained on these very targets has little to find: its groups hit at once, or
never will. `without_reserved` leaves them out of supervised fine-tuning's rows.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from genrec.columns import (
    FUTURE,
    HISTORY,
    ITEM_INDEX,
    POSITION,
    ROW_ID,
    SEEN,
    SUPERVISE_FROM,
    TARGET,
    TARGET_POSITION,
    USER_ID,
)

_LENGTH = pl.col("_items").list.len().cast(pl.Int64)


def rl_rows(train: pl.DataFrame, data: Path, window: int = 1) -> pl.DataFrame:
    """Split rows for RL, one per user; all before the target is seen.

    The target is the user's last training interaction; with a window of w the w-th last one, so
    that w training items are known to come (fewer where the history would be empty).

    Args:
        train: the training rows.
        data: folder with ``interactions.parquet``.
        window: items of `future_item_index`, the target included; none is of validation or test.
    """
    last = train.group_by(USER_ID, maintain_order=True).last()
    last = last.filter(pl.col(HISTORY).list.len() > 0)
    last = last.with_columns(_items=pl.concat_list(HISTORY, TARGET))
    at = pl.max_horizontal(_LENGTH - window, pl.lit(1))  # the target's place
    last = last.with_columns(
        pl.col("_items").list.slice(at).alias(FUTURE),
        pl.col("_items").list.head(at).alias(HISTORY),
        pl.col("_items").list.get(at).alias(TARGET),
        at.cast(pl.Int32).alias(SUPERVISE_FROM),
        (pl.col(TARGET_POSITION) - (_LENGTH - 1 - at)).cast(pl.Int32).alias(TARGET_POSITION),
        pl.col(ROW_ID).str.replace("train", "rl"),
    ).drop("_items")
    moment = last.select(USER_ID, pl.col(TARGET_POSITION).cast(pl.Int64).alias("_moment"))
    earlier = (
        pl.scan_parquet(data / "interactions.parquet", glob=False)
        .join(moment.lazy(), on=USER_ID)
        # Without validation, test and the RL target itself.
        .filter(pl.col(POSITION) < pl.col("_moment"))
        .group_by(USER_ID)
        .agg(pl.col(ITEM_INDEX).unique().sort().alias(SEEN))
        .collect()
    )
    rows = last.drop(SEEN, strict=False)
    rows = rows.join(earlier, on=USER_ID, how="left", maintain_order="left")
    return rows.with_columns(pl.col(SEEN).fill_null([]))


def without_reserved(split: pl.DataFrame, rl: pl.DataFrame) -> pl.DataFrame:
    """Training rows cut before each user's RL target: neither learned nor shown from there on.

    Args:
        split: training rows.
        rl: of `rl_rows`, of the same users.

    Returns:
        The rows; those that supervise nothing any more are dropped.
    """
    reserved = rl.select(USER_ID, pl.col(TARGET_POSITION).cast(pl.Int64).alias("_reserved"))
    cut = (pl.col(TARGET_POSITION).cast(pl.Int64) - pl.col("_reserved") + 1).clip(lower_bound=0)
    rows = split.join(reserved, on=USER_ID, how="left", maintain_order="left")
    rows = rows.with_columns(
        _items=pl.concat_list(HISTORY, TARGET), _cut=cut.fill_null(0)
    ).with_columns(_at=_LENGTH - 1 - pl.col("_cut"))
    rows = rows.filter(pl.col("_at") >= pl.col(SUPERVISE_FROM))
    at = pl.col("_at")
    return rows.with_columns(
        pl.col("_items").list.head(at).alias(HISTORY),
        pl.col("_items").list.get(at).alias(TARGET),
        (pl.col(TARGET_POSITION) - pl.col("_cut")).cast(pl.Int32).alias(TARGET_POSITION),
    ).drop("_items", "_cut", "_at", "_reserved")
