"""Lists for users who opted out of profiling: nothing of such a user decides them.

Neither a history, nor the filter of seen items, which would need one. Where the table of opt-outs
names the item on show (the page that the list will stand on), the list holds the items most alike
it in content; otherwise the most popular ones, the same for everybody. Content is the embed stage's
vectors without behaviour (of vectors that were given to it, whoever made them must know that they
hold none), popularity how often each item occurs in the training part, all users together. Both
keep to what `allow` and `deny` leave.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
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
from genrec.generation.allow_lists import read_table
from genrec.item_lists import IntArray

logger = logging.getLogger(__name__)

NON_PROFILING = "non-profiling.parquet"  # in the folder of lists
POPULARITY = "popularity in the training part, ties in the order of the catalogue"
CONTENT = (
    "cosine of content vectors with the item on show, rounded to six decimals, ties in the order "
    "of the catalogue"
)
SHOWN = "shown_item_id"
_ROWS_AT_ONCE = 1 << 16  # of vectors that are held in float64


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


class ContentNeighbours:
    """Items most alike a given one, by the cosine of their vectors.

    Args:
        vectors: ``.npy`` of the catalogue's content vectors, (n_items, dim).
    """

    def __init__(self, vectors: Path | str) -> None:
        self._vectors = np.load(vectors, mmap_mode="r")
        self._length = np.concatenate([np.linalg.norm(part, axis=1) for part in self._parts()])

    def _parts(self) -> Iterator[npt.NDArray[np.float64]]:
        for at in range(0, len(self._vectors), _ROWS_AT_ONCE):
            yield self._vectors[at : at + _ROWS_AT_ONCE].astype(np.float64)

    def known(self, item: int) -> bool:
        """Whether the item has content: without a vector it is like nothing."""
        return bool(self._length[item] > 0)

    def nearest(
        self, item: int, k: int, allowed: IntArray | None = None
    ) -> tuple[IntArray, npt.NDArray[np.float64]]:
        """The k nearest other catalogue rows, best first; fewer where less is allowed.

        In float64, and rounded to what float32 vectors tell: a list comes out the same beside
        other lists and on another machine.

        Args:
            item: catalogue row of the item on show.
            k: length of the list.
            allowed: catalogue rows that may be recommended at all, ascending; None: all.

        Returns:
            Catalogue rows and their cosines.
        """
        own = self._vectors[item].astype(np.float64)
        products = np.concatenate([part @ own for part in self._parts()])
        lengths = np.maximum(self._length * self._length[item], 1e-300)
        cosines = np.round(products / lengths, 6) + 0.0  # no −0.0
        rows = np.arange(len(cosines)) if allowed is None else allowed
        rows = rows[(rows != item) & (self._length[rows] > 0)]
        if k < len(rows):  # ties with the last one stay, and are sorted out below
            least = np.partition(cosines[rows], len(rows) - k)[len(rows) - k]
            rows = rows[cosines[rows] >= least]
        best = rows[np.argsort(-cosines[rows], kind="stable")][:k]
        return best, cosines[best]


def counts_sha256(catalog: pl.DataFrame) -> str:
    """Hash of what such lists rest on: item ids and their counts, row for row."""
    return sha256_json([catalog[ITEM_ID].to_list(), catalog[TRAIN_COUNT].to_list()])


def non_profiling_lists(
    rows: pl.DataFrame,
    shown: IntArray,
    catalog: pl.DataFrame,
    sids: pl.Series,
    k: int,
    allowed: IntArray | None = None,
    vectors: Path | str | None = None,
) -> pl.DataFrame:
    """Table of such lists: row_id, user_id, rank, item_id, item_index, sid, score, shown_item_id.

    Args:
        rows: row_id and user_id of those who get one.
        shown: catalogue row of the item on show for each of them, −1: none. ``# (rows,)``
        catalog: ``catalog.parquet``.
        sids: semantic ids of the catalogue, row for row.
        k: length of the lists.
        allowed: catalogue rows that may be recommended at all, ascending; None: all.
        vectors: ``.npy`` of the catalogue's content vectors; needed where an item is on show.

    Returns:
        `score` is the cosine with the item on show. Without one, and where no other allowed item
        has content, or that one has none (no shown_item_id is stated then), it is the item's number
        of training interactions.

    Raises:
        ValueError: an item is on show, and there are no vectors.
    """
    counts = catalog[TRAIN_COUNT].to_numpy().astype(np.float64)
    popular = popular_items(catalog, k, allowed)
    made = {-1: (popular, counts[popular])}
    shown = shown.copy()
    if (shown >= 0).any():
        if vectors is None:
            raise ValueError("lists by content need vectors made from the items' texts")
        neighbours = ContentNeighbours(vectors)
        for item in np.unique(shown[shown >= 0]).tolist():
            best, cosines = neighbours.nearest(item, k, allowed)
            if neighbours.known(item) and len(best):
                made[item] = best, cosines
            else:
                shown[shown == item] = -1
    parts = [
        pl.DataFrame(
            {
                "_shown": np.full(len(best), item),
                RANK: np.arange(1, len(best) + 1, dtype=np.int32),
                ITEM_ID: catalog[ITEM_ID].gather(best),
                ITEM_INDEX: best.astype(np.int32),
                SID: sids.gather(best),
                SCORE: scores,
            }
        )
        for item, (best, scores) in made.items()
    ]
    given = pl.Series(np.maximum(shown, 0))
    rows = rows.select(
        ROW_ID,
        USER_ID,
        pl.Series("_shown", shown),
        pl.when(pl.Series(shown >= 0)).then(catalog[ITEM_ID].gather(given)).alias(SHOWN),
    )
    lists = rows.join(pl.concat(parts), on="_shown", maintain_order="left_right")
    return lists.select(ROW_ID, USER_ID, RANK, ITEM_ID, ITEM_INDEX, SID, SCORE, SHOWN)


def shows_items(path: Path | str) -> bool:
    """Whether a file of opt-outs names items on show.

    Raises:
        ValueError: no such file, or it names no user.
    """
    return bool(_named(path)[ITEM_ID].count())


def _named(path: Path | str) -> pl.DataFrame:
    """Users and items on show as text, each pair once; null where a user has no item."""
    table = read_table(path, USER_ID, "user", optional=ITEM_ID)
    items = table[ITEM_ID]
    if items.dtype.is_float() and bool((items.fill_nan(None).drop_nulls() % 1 == 0).all()):
        items = items.fill_nan(None).cast(pl.Int64)  # whole numbers beside missing ones
    if items.dtype.is_nested():
        raise ValueError(f"{path}: {ITEM_ID} holds {items.dtype}; one item can be on show")
    items = items.cast(pl.String).str.strip_chars().replace("", None)
    users = table[USER_ID].cast(pl.String).str.strip_chars()
    named = pl.DataFrame([users.alias(USER_ID), items.alias(ITEM_ID)])
    named = named.unique(maintain_order=True)
    return named.filter(pl.col(ITEM_ID).is_not_null() | (pl.len().over(USER_ID) == 1))


def opted_out(
    users: pl.Series, path: Path | str, catalog_ids: pl.Series
) -> tuple[pl.Series, IntArray]:
    """Which users a file of opt-outs names, and what is on show for them; ids compared as text.

    Args:
        users: user ids of the rows.
        path: one user id a line, or a table with a user_id column; its column item_id, if there is
            one, names the item that is on show where the user's list will stand (empty: none).
        catalog_ids: ids of the catalogue, row for row.

    Returns:
        True where lists must use no history, and the catalogue row of the item on show, −1 where
        none is. ``# (rows,) each``

    Raises:
        ValueError: no such file, or it names none of these users: an opt-out that is overlooked
            would be worse than an error. Or an item that is not in the catalogue, or two for one
            user.
    """
    named = _named(path)
    twice = named.filter(pl.col(USER_ID).is_duplicated())
    if len(twice):
        raise ValueError(f"{path} names user {twice[USER_ID][0]!r} with more than one {ITEM_ID}")
    found = users.cast(pl.String).str.strip_chars().alias(USER_ID).to_frame()
    found = found.join(
        named.with_columns(_named=True), on=USER_ID, how="left", maintain_order="left"
    )
    chosen = found["_named"].fill_null(False)
    if not chosen.any():
        raise ValueError(
            f"{path} names {len(named):,} users, and none of them is in this split (ids look like "
            f"{users[0]!r}); name the right file, or leave --opt_out away"
        )
    if strangers := len(named) - named[USER_ID].is_in(found[USER_ID].implode()).sum():
        logger.warning(
            "%s: %d of %d users are in none of these rows; see how ids are written if they should",
            path, strangers, len(named),
        )  # fmt: skip
    index = catalog_ids.cast(pl.String).alias(ITEM_ID).to_frame().with_row_index("_row")
    unknown = named.join(index, on=ITEM_ID, how="anti").filter(pl.col(ITEM_ID).is_not_null())
    if len(unknown):
        raise ValueError(
            f"{path}: {len(unknown):,} items on show are not in the catalogue, one is "
            f"{unknown[ITEM_ID].sort()[0]!r} (ids look like {catalog_ids[0]!r})"
        )
    rows = found.join(index, on=ITEM_ID, how="left", maintain_order="left")["_row"]
    return chosen, rows.cast(pl.Int64).fill_null(-1).to_numpy()
