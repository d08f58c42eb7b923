"""Lists for users who opted out of profiling: the most popular items, the same for everybody.

Nothing of such a user decides the list: no history, and not the filter of seen items either, which
would need one. It rests on how often each catalogue item occurs in the training part, all users
together, and on what `allow` and `deny` leave.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from genrec.artifacts import sha256_json
from genrec.columns import (
    ITEM_ID,
    ITEM_INDEX,
    RANK,
    ROW_ID,
    SCORE,
    SID,
    TRAIN_COUNT,
    USER_ID,
)
from genrec.generation.allow_lists import read_ids
from genrec.item_lists import IntArray

NON_PROFILING = "non-profiling.parquet"  # in the folder of lists
RULE = "popularity in the training part, ties in the order of the catalogue"


def popular_items(catalog: pl.DataFrame, k: int, allowed: IntArray | None = None) -> IntArray:
    """The k most popular catalogue rows, best first; fewer where less is allowed.

    Args:
        catalog: ``catalog.parquet``.
        k: length of the list.
        allowed: catalogue rows that may be recommended at all, ascending; None: all.
    """
    rows = np.arange(len(catalog)) if allowed is None else allowed
    counts = catalog[TRAIN_COUNT].to_numpy()[rows]
    return rows[np.argsort(-counts.astype(np.int64), kind="stable")][:k]


def counts_sha256(catalog: pl.DataFrame) -> str:
    """Hash of what such lists rest on: item ids and their counts, row for row."""
    return sha256_json([catalog[ITEM_ID].to_list(), catalog[TRAIN_COUNT].to_list()])


def non_profiling_lists(
    rows: pl.DataFrame, catalog: pl.DataFrame, sids: pl.Series, items: IntArray
) -> pl.DataFrame:
    """Table of such lists: row_id, user_id, rank, item_id, item_index, sid, score.

    Args:
        rows: row_id and user_id of those who get one.
        catalog: ``catalog.parquet``.
        sids: semantic ids of the catalogue, row for row.
        items: from `popular_items`; `score` is their number of training interactions.
    """
    shown = pl.DataFrame(
        {
            RANK: np.arange(1, len(items) + 1, dtype=np.int32),
            ITEM_ID: catalog[ITEM_ID].gather(items),
            ITEM_INDEX: items.astype(np.int32),
            SID: sids.gather(items),
            SCORE: catalog[TRAIN_COUNT].gather(items).cast(pl.Float64),
        }
    )
    return rows.select(ROW_ID, USER_ID).join(shown, how="cross", maintain_order="left_right")


def opted_out(users: pl.Series, path: Path | str) -> pl.Series:
    """Which users a file of opt-outs names; ids are compared as text.

    Args:
        users: user ids of the rows.
        path: one user id a line, or a table with a user_id column.

    Returns:
        True where lists must use no history. ``# (rows,)``

    Raises:
        ValueError: no such file, or it names none of these users: an opt-out that is overlooked
            would be worse than an error.
    """
    named = read_ids(path, USER_ID, "user").cast(pl.String)
    chosen = users.cast(pl.String).is_in(named.implode())
    if not chosen.any():
        raise ValueError(
            f"{path} names {len(named):,} users, and none of them is in this split (ids look like "
            f"{users[0]!r}); name the right file, or leave --opt_out away"
        )
    return chosen
