"""Items that no quantizer can tell apart: those with equal vectors, and those without one.

Looked for before codes are given, so that one knows which collisions are the catalogue's own: a
product listed twice, a text without words. The resolution of collisions still gives each such item
a SID of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.columns import ITEM_ID, TITLE
from genrec.quantizers.quantizer import row_blocks

LISTED_GROUPS, LISTED_ITEMS = 100, 10
_MAX_TEXT = 300  # characters of a title that are kept


def duplicate_report(vectors: npt.NDArray[np.floating], catalog: pl.DataFrame) -> dict[str, Any]:
    """Groups of items whose vectors are equal in float32, and items whose vector is zero.

    Args:
        vectors: (n_items, dim), any float type; may be a memory map.
        catalog: row i is item i; its ``title``, where there is one, tells products listed twice
            from items that the vectors can't tell apart.

    Returns:
        ``items`` that have another's vector, in ``groups``, of which ``same_title`` have one title
        (None without titles); ``without_vector``, items whose vector is zero, which count as no
        group. All are counted; ``listed`` names the `LISTED_GROUPS` largest groups, the first ones
        of the catalogue among equals: their number of ``items``, and the first `LISTED_ITEMS`
        ``item_ids`` and ``titles``; ``without_vector_ids`` are as few. JSON can hold it.

    Raises:
        ValueError: not one row per item.
    """
    if len(vectors) != len(catalog):
        raise ValueError(f"{len(vectors)} vectors for {len(catalog)} items; one each is needed")
    hashes, zero = _row_hashes(vectors)
    _, first, group, counts = np.unique(
        hashes, return_index=True, return_inverse=True, return_counts=True
    )
    rows = np.flatnonzero((counts[group] > 1) & ~zero)
    own = group[rows]
    rows = rows[np.lexsort((rows, first[own], -counts[own]))]  # the largest group first
    starts = np.flatnonzero(np.diff(group[rows], prepend=-1))
    listed = rows[: starts[LISTED_GROUPS]] if len(starts) > LISTED_GROUPS else rows
    ids = catalog[ITEM_ID]
    titles = catalog[TITLE].cast(pl.String) if TITLE in catalog.columns else None
    same_title = None
    if titles is not None:
        named = pl.DataFrame({"group": group[rows], "title": titles[rows]}).group_by("group")
        of_one = (pl.col("title").n_unique() == 1) & (pl.col("title").null_count() == 0)
        same_title = int(named.agg(of_one)["title"].sum())
    return {
        "items": len(rows),
        "groups": len(starts),
        "same_title": same_title,
        "without_vector": int(zero.sum()),
        "listed": [
            {
                "items": len(members),
                "item_ids": ids[members[:LISTED_ITEMS]].to_list(),
                "titles": []
                if titles is None
                else titles[members[:LISTED_ITEMS]].fill_null("").str.slice(0, _MAX_TEXT).to_list(),
            }
            for members in np.split(listed, starts[1:LISTED_GROUPS])
            if len(members)
        ],
        "without_vector_ids": ids[np.flatnonzero(zero)[:LISTED_GROUPS]].to_list(),
    }


def _row_hashes(
    vectors: npt.NDArray[np.floating],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """A 64-bit hash of each row in float32, and which rows are zero, (n_items,) both.

    Python's hash of a row's bytes is four times as fast as what NumPy or Polars have for rows, and
    no sort of whole rows is needed.
    """
    hashes = np.empty(len(vectors), dtype=np.int64)
    zero = np.empty(len(vectors), dtype=np.bool_)
    for block in row_blocks(*vectors.shape):
        # Plus zero, so that -0.0 is 0.0.
        rows = np.ascontiguousarray(vectors[block], dtype=np.float32) + 0.0
        hashes[block] = [hash(row.tobytes()) for row in rows]
        zero[block] = ~rows.any(axis=1)
    return hashes, zero
