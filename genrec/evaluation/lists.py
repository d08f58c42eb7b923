"""From a table of recommendations, ours or anybody's, to item lists that can be scored.

Items are mapped to catalogue rows by joining on the item id. What cannot be mapped is never
dropped silently: an unknown item keeps its place in the list as `EMPTY` (it cannot hit), a row
without a list is a list of `EMPTY` (a miss), and both are counted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.artifacts import read_json
from genrec.columns import ITEM_ID, ITEM_INDEX, RANK, RELEVANT, ROW_ID, SCORE, TARGET, USER_ID
from genrec.item_lists import ItemLists, contains
from genrec.metrics import EMPTY

logger = logging.getLogger(__name__)

_ROWS = 1 << 16  # lists looked through at once for seen items


@dataclass(frozen=True)
class RecommendedLists:
    """Lists aligned with split rows, and what the table held that could not be scored.

    Attributes:
        items: item indices, best first. ``# (n_rows, k)``
        unknown_items: places among the first k whose item the catalogue does not know.
        rows_without_list: split rows for which the table has no list.
        ignored_lists: lists of users or rows that are not evaluated.
        tied_lists: evaluated lists in which scores are equal, so that a rule decides.
    """

    items: npt.NDArray[np.int64]
    unknown_items: int
    rows_without_list: int
    ignored_lists: int
    tied_lists: int = 0


def read_recommendations(path: Path | str) -> pl.DataFrame:
    """Read one Parquet or CSV file of recommendations (CSV columns stay text until joined).

    Raises:
        ValueError: the file does not exist or is of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"recommendations file {path} does not exist")
    if path.suffix == ".parquet":
        return pl.read_parquet(path)
    if path.suffix in (".csv", ".tsv"):
        # As text: an id "0012" that became the number 12 would match nothing.
        return pl.read_csv(
            path, separator="\t" if path.suffix == ".tsv" else ",", infer_schema=False
        )
    raise ValueError(f"{path} must end in .parquet, .csv or .tsv")


def relevant_items(rows: pl.DataFrame) -> npt.NDArray[np.int64] | ItemLists:
    """What counts as a hit in each split row: its target, or all its relevant items.

    Protocols with several relevant items a row (time-cutoff) have a column for them.
    """
    if RELEVANT in rows.columns:
        return ItemLists.from_column(rows[RELEVANT])
    return rows[TARGET].to_numpy().astype(np.int64)


def read_sid_map(path: Path | str, catalog: pl.DataFrame) -> npt.NDArray[np.int64]:
    """A number per semantic id for every catalogue row, from an ``index.json``.

    The form that LC-Rec, LETTER and MiniOneRec share: ``{"item id": ["<a_1>", "<b_7>", …], …}``.
    Items may share a SID here; items that the file lacks get one of their own.

    Raises:
        ValueError: the file has another form, or knows no item of the catalogue.
    """
    index = read_json(path)
    if not isinstance(index, dict) or not all(isinstance(v, list) for v in index.values()):
        raise ValueError(f'{path} must hold {{"item id": ["<a_1>", …], …}}')
    sids = pl.DataFrame(
        {ITEM_ID: list(index), "sid": [" ".join(map(str, tokens)) for tokens in index.values()]},
        schema={ITEM_ID: pl.String, "sid": pl.String},
    )
    ids = catalog.select(pl.col(ITEM_ID).cast(pl.String))
    named = ids.join(sids, on=ITEM_ID, how="left", maintain_order="left")
    if (missing := named["sid"].null_count()) == catalog.height:
        raise ValueError(f"{path} knows none of the {catalog.height} item ids of the catalogue")
    if missing:
        logger.warning("%d items have no semantic id in %s: each counts as its own", missing, path)
    own = named.with_columns(pl.col("sid").fill_null("item " + pl.col(ITEM_ID)))
    return own["sid"].rank("dense").to_numpy().astype(np.int64) - 1


def align(
    table: pl.DataFrame, rows: pl.DataFrame, catalog: pl.DataFrame, k: int, split_rows: pl.DataFrame
) -> RecommendedLists:
    """Bring a table of recommendations into the order of the rows that are evaluated.

    Args:
        table: one row per recommended item: `row_id` or `user_id`, `item_id`, and `rank` (1 is
            best) or `score` (highest is best, ties in a seeded random order of the items: that of
            the table may put the targets first, as files of candidates do).
        rows: split rows to evaluate, with `row_id` and `user_id`.
        catalog: catalogue with `item_id` and `item_index`.
        k: list length; items behind it are dropped.
        split_rows: all rows of the split, a superset of `rows`; lists of rows that are there but
            are not evaluated are counted, lists of rows that are not there belong elsewhere.

    Raises:
        ValueError: a column is missing, ids are of another type, the lists belong to another
            dataset or split, ranks are not 1, 2, …, or a list holds an item twice.
    """
    key = _key(table, split_rows)
    order = RANK if RANK in table.columns else SCORE
    _require_columns(table, [key, ITEM_ID, order])
    types = {key: split_rows[key].dtype, ITEM_ID: catalog[ITEM_ID].dtype}
    types[order] = pl.Int64() if order == RANK else pl.Float64()
    extra = [ITEM_INDEX] if ITEM_INDEX in table.columns else []
    picked = table.select(key, ITEM_ID, order, *extra)
    for name, dtype in types.items():
        picked = _cast(picked, name, dtype)
    # Numbers for ids; null where the catalogue or the split doesn't know them.
    known_items = catalog.select(ITEM_ID, pl.col(ITEM_INDEX).alias("_index"))
    picked = picked.join(known_items, on=ITEM_ID, how="left", maintain_order="left")
    numbers = split_rows.select(key).with_row_index("_split")
    picked = picked.join(numbers, on=key, how="left", maintain_order="left")
    _check_distinct(picked, key, catalog.height)
    lists = _ranked(picked, key, order)
    del picked  # a copy of every row
    _check_origin(lists, key, bool(extra))
    place = rows.select(key).with_row_index("_row")
    known = lists.join(place, on=key, how="inner").filter(pl.col("_place") < k)
    items = np.full((rows.height, k), EMPTY, dtype=np.int64)
    items[known["_row"].to_numpy(), known["_place"].to_numpy()] = (
        known["_index"].fill_null(EMPTY).to_numpy()
    )
    evaluated = known["_row"].n_unique()
    found = RecommendedLists(
        items=items,
        unknown_items=known["_index"].null_count(),
        rows_without_list=rows.height - evaluated,
        ignored_lists=lists[key].n_unique() - evaluated,
        tied_lists=known.filter(pl.col("_tied"))["_row"].n_unique(),
    )
    for count, what in (
        (found.unknown_items, "recommended items are not in the catalogue: counted as misses"),
        (found.rows_without_list, "rows have no list: counted as misses"),
        (found.ignored_lists, "lists belong to rows or users that are not evaluated: ignored"),
        (found.tied_lists, "lists hold equal scores: those items stand in a random order"),
    ):
        if count:
            logger.warning("%d %s", count, what)
    return found


def _key(table: pl.DataFrame, split_rows: pl.DataFrame) -> str:
    if ROW_ID in table.columns:
        return ROW_ID
    if USER_ID not in table.columns:
        raise ValueError(
            f"recommendations have the columns {table.columns}; one of row_id, user_id is needed"
        )
    if (several := split_rows.height - split_rows[USER_ID].n_unique()) > 0:
        raise ValueError(
            f"{several} rows of the split share a user, so user_id does not say which row a list "
            "is for; give the recommendations a row_id column"
        )
    return USER_ID


def _require_columns(table: pl.DataFrame, names: list[str]) -> None:
    if missing := [name for name in names if name not in table.columns]:
        wanted = ["rank or score" if name == SCORE else name for name in missing]
        raise ValueError(
            f"recommendations lack the columns {wanted}; they have {table.columns}; needed are "
            "row_id or user_id, item_id, and rank or score"
        )


def _cast(table: pl.DataFrame, name: str, dtype: pl.DataType) -> pl.DataFrame:
    column = table[name]
    if column.null_count():
        raise ValueError(f"column {name} of the recommendations has {column.null_count()} nulls")
    cast = column.cast(dtype, strict=False)
    if cast.null_count():
        example = column.filter(cast.is_null())[0]
        raise ValueError(
            f"column {name} of the recommendations holds {example!r}, which is no {dtype}; "
            "use the identifiers of the prepared dataset"
        )
    if cast.dtype == pl.Float64 and (unknown := int(cast.is_nan().sum())):
        raise ValueError(
            f"column {name} of the recommendations holds {unknown} NaN, which have no place in an "
            "order; leave those items out"
        )
    return table.with_columns(cast)


def _check_distinct(table: pl.DataFrame, key: str, n_items: int) -> None:
    numbered = pl.col("_split").is_not_null() & pl.col("_index").is_not_null()
    known = table.filter(numbered).select(
        pl.col("_split").cast(pl.Int64) * n_items + pl.col("_index")
    )
    codes = np.sort(known.to_series().to_numpy())  # a tenth of the memory of a check by ids
    twice = pl.struct(key, ITEM_ID).is_duplicated()
    rest = table.filter(~numbered)
    if not (codes[1:] == codes[:-1]).any() and not rest.select(twice).to_series().any():
        return
    example = table.filter(twice).row(0, named=True)
    raise ValueError(
        f"{key} {example[key]!r} is recommended item {example[ITEM_ID]!r} more than once; "
        "items of a list must be distinct"
    )


def _ranked(table: pl.DataFrame, key: str, order: str) -> pl.DataFrame:
    """Add `_place`, 0 for the best item of a list, and `_tied`, whether another has its score."""
    items = table[ITEM_ID].unique().sort()
    lot = np.random.default_rng(0).permutation(len(items))
    drawn = pl.DataFrame([items, pl.Series("_lot", lot)])
    table = (
        table.join(drawn, on=ITEM_ID, how="left", maintain_order="left")
        .sort([order, "_lot"], descending=[order == SCORE, False])
        .with_columns(
            pl.int_range(pl.len()).over(key).alias("_place"),
            (pl.len().over(key, order) > 1).alias("_tied"),
        )
        .drop("_lot")
    )
    if order == RANK and (wrong := table.filter(pl.col(RANK) != pl.col("_place") + 1)).height:
        example = wrong.row(0, named=True)
        raise ValueError(
            f"the ranks of {key} {example[key]!r} are not 1, 2, 3, … (rank {example[RANK]} stands "
            f"in place {example['_place'] + 1}); renumber them, or give a score column instead"
        )
    return table


def _check_origin(lists: pl.DataFrame, key: str, has_index: bool) -> None:
    strangers = lists.filter(pl.col("_split").is_null()).select(key).unique(maintain_order=True)
    found = lists[key].n_unique()
    # Users without a row in the split are normal in other systems' output; unknown row ids are not.
    if strangers.height and (key == ROW_ID or strangers.height == found):
        raise ValueError(
            f"{strangers.height} of {found} {key} values of the recommendations are not in the "
            f"split, for example {strangers[key][0]!r}: they were made for another dataset or split"
        )
    if lists.height and lists["_index"].null_count() == lists.height:
        raise ValueError(
            f"none of the recommended items is in the catalogue, for example "
            f"{lists[ITEM_ID][0]!r}: the recommendations were made for another dataset"
        )
    if has_index:
        wrong = lists.filter(pl.col("_index").ne_missing(pl.col(ITEM_INDEX)))
        if wrong.height:
            example = wrong.row(0, named=True)
            raise ValueError(
                f"item {example[ITEM_ID]!r} has item_index {example[ITEM_INDEX]} in the "
                f"recommendations and {example['_index']} in the catalogue: they were made for "
                "another dataset; rerun recommend"
            )


def check_unseen(items: npt.NDArray[np.int64], seen: ItemLists, n_items: int) -> None:
    """Raise ValueError if a list holds an item that its row has seen already.

    Args:
        items: item indices. ``# (n_rows, k)``
        seen: seen items of each row.
        n_items: size of the catalogue.
    """
    known, again = seen.keys(n_items), 0
    for start in range(0, len(items), _ROWS):
        block = items[start : start + _ROWS]
        rows = np.arange(start, start + len(block))[:, None]
        met = contains(known, rows * n_items + block) & (block != EMPTY)
        again += int(met.any(axis=1).sum())
    if again:
        raise ValueError(
            f"{again} of {len(items)} lists hold items the user has seen "
            "already, but filter_seen is true; filter the lists, or evaluate with "
            "--filter_seen false"
        )
