"""From a table of recommendations, ours or anybody's, to item lists that can be scored.

Items are mapped to catalogue rows by joining on the item id. What cannot be mapped is never
dropped silently: an unknown item keeps its place in the list as `EMPTY` (it cannot hit), a row
without a list is a list of `EMPTY` (a miss), and both are counted.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.artifacts import read_json
from genrec.columns import ITEM_ID, ITEM_INDEX, RANK, RELEVANT, ROW_ID, SCORE, TARGET, USER_ID
from genrec.item_lists import ItemLists
from genrec.metrics import EMPTY, check_lists

logger = logging.getLogger(__name__)

_ROWS = 1 << 16  # lists looked through at once for seen items
_PIECE = 1 << 23  # recommendations looked up at once


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

    items: npt.NDArray[np.int32]
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
        return pl.read_parquet(path, glob=False)
    if path.suffix in (".csv", ".tsv"):
        # As text: an id "0012" that became the number 12 would match nothing.
        separator = "\t" if path.suffix == ".tsv" else ","
        return pl.read_csv(path, separator=separator, infer_schema=False, glob=False)
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
            dataset or split, ranks are not 1, 2, …, or an item stands twice among a list's first k.
    """
    key = _key(table, split_rows)
    order = RANK if RANK in table.columns else SCORE
    _require_columns(table, [key, ITEM_ID, order])
    types = {key: split_rows[key].dtype, ITEM_ID: catalog[ITEM_ID].dtype}
    types[order] = pl.Int64() if order == RANK else pl.Float64()
    extra = [ITEM_INDEX] if ITEM_INDEX in table.columns else []
    table = table.select(key, ITEM_ID, order, *extra)
    for name, dtype in types.items():
        table = _cast(table, name, dtype)
    # From here on numbers, also for what the split and the catalogue don't know, behind the others:
    # a table of a million lists, joined as it is, would be in memory several times.
    ids = catalog.sort(ITEM_INDEX)[ITEM_ID]
    lists, strangers = _numbers(table[key], split_rows[key])
    item, ghosts = _numbers(table[ITEM_ID], ids)
    place, tied = _places(table, order, lists, item, len(ids) + ghosts)
    _check_origin(table, lists, item, split_rows.height, strangers, len(ids))
    row_of = np.full(split_rows.height + strangers, -1, dtype=np.int64)
    row_of[_numbers(rows[key], split_rows[key])[0]] = np.arange(rows.height)
    row = row_of[lists]
    kept = (row >= 0) & (place < k)
    row, place, item = row[kept], place[kept], item[kept]
    items = np.full((rows.height, k), EMPTY, dtype=np.int32)
    items[row, place] = item
    _check_distinct(items, table, lists, np.flatnonzero(kept))
    unknown = item >= len(ids)
    items[row[unknown], place[unknown]] = EMPTY
    evaluated = int(np.count_nonzero(np.bincount(row, minlength=rows.height)))
    found = RecommendedLists(
        items=items,
        unknown_items=int(unknown.sum()),
        rows_without_list=rows.height - evaluated,
        ignored_lists=len(np.unique(lists)) - evaluated,
        tied_lists=len(np.unique(row[tied[kept]])),
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


def _numbers(column: pl.Series, known: pl.Series) -> tuple[npt.NDArray[np.int32], int]:
    """Places of values in `known`; others are numbered behind those, in their own order.

    Returns:
        Numbers ``# (n_values,)``, and how many distinct values are not in `known`.
    """
    numbers = np.empty(len(column), dtype=np.int32)
    for start in range(0, len(column), _PIECE):
        part = _looked_up(column.slice(start, _PIECE), known)
        numbers[start : start + len(part)] = part
    strange = numbers < 0
    if not strange.any():
        return numbers, 0
    rest = column.filter(pl.Series(strange))
    strangers = rest.unique().sort()
    numbers[strange] = len(known) + _looked_up(rest, strangers)
    return numbers, len(strangers)


def _looked_up(values: pl.Series, known: pl.Series) -> npt.NDArray[np.int32]:
    places = pl.DataFrame({"value": known, "place": np.arange(len(known), dtype=np.int32)})
    found = values.to_frame("value").join(places, on="value", how="left", maintain_order="left")
    return found["place"].fill_null(-1).to_numpy()


def _check_distinct(
    items: npt.NDArray[np.int32],
    table: pl.DataFrame,
    lists: npt.NDArray[np.int32],
    kept: npt.NDArray[np.int64],
) -> None:
    """Raise ValueError if a row of `items` holds one twice; `kept` are their rows of the table."""
    try:
        check_lists(items)
    except ValueError:
        part = pl.DataFrame({"at": kept, "list": lists[kept], ITEM_ID: table[ITEM_ID][kept]})
        again = part.filter(pl.struct("list", ITEM_ID).is_duplicated())
        key, value, *_ = table.row(again["at"][0])
        raise ValueError(
            f"{table.columns[0]} {key!r} is recommended item {value!r} more than once; "
            "items of a list must be distinct"
        ) from None


def _places(
    table: pl.DataFrame,
    order: str,
    lists: npt.NDArray[np.int32],
    item: npt.NDArray[np.int32],
    n_items: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Place of each item in its list, 0 for the best, and whether another has its score."""
    length = np.bincount(lists)
    first = np.concatenate([[0], np.cumsum(length)])
    if order == RANK:
        rank = table[RANK].to_numpy()
        wrong = (rank < 1) | (rank > length[lists])
        filled = np.zeros(len(table), dtype=bool)
        filled[(first[lists] + rank - 1)[~wrong]] = True
        if wrong.any() or not filled.all():
            _refuse_ranks(table, lists, np.flatnonzero(wrong), first, filled)
        return (rank - 1).astype(np.int32), np.zeros(len(table), dtype=bool)
    lot = np.random.default_rng(0).permutation(n_items)[item]
    entries = pl.DataFrame({"list": lists, "score": table[SCORE], "lot": lot})
    at = entries.select(
        pl.arg_sort_by("list", "score", "lot", descending=[False, True, False])
    ).to_series().to_numpy()  # fmt: skip
    place, tied = np.empty(len(table), dtype=np.int32), np.zeros(len(table), dtype=bool)
    place[at] = np.arange(len(table)) - first[lists[at]]
    score = table[SCORE].to_numpy()
    alike = (lists[at][1:] == lists[at][:-1]) & (score[at][1:] == score[at][:-1])
    tied[at[1:][alike]] = tied[at[:-1][alike]] = True
    return place, tied


def _refuse_ranks(
    table: pl.DataFrame,
    lists: npt.NDArray[np.int32],
    wrong: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    filled: npt.NDArray[np.bool_],
) -> NoReturn:
    """Say of one list with wrong ranks what is wrong."""
    if len(wrong):
        number = int(lists[wrong[0]])
    else:  # no rank is too large, so one stands twice, and one is missing
        number = int(np.searchsorted(first, np.flatnonzero(~filled)[0], side="right")) - 1
    its = table.filter(pl.Series(lists == number)).sort(RANK)
    place = int((its[RANK].to_numpy() != np.arange(1, its.height + 1)).argmax())
    raise ValueError(
        f"the ranks of {its.columns[0]} {its[0, 0]!r} are not 1, 2, 3, … (rank {its[RANK][place]} "
        f"stands in place {place + 1}); renumber them, or give a score column instead"
    )


def _check_origin(
    table: pl.DataFrame,
    lists: npt.NDArray[np.int32],
    item: npt.NDArray[np.int32],
    n_rows: int,
    strangers: int,
    n_items: int,
) -> None:
    key = table.columns[0]
    known = np.count_nonzero(np.bincount(lists, minlength=n_rows)[:n_rows])
    # Users without a row in the split are normal in other systems' output; unknown row ids are not.
    if strangers and (key == ROW_ID or not known):
        example = table[key][int(np.argmax(lists >= n_rows))]
        raise ValueError(
            f"{strangers} of {known + strangers} {key} values of the recommendations are not in "
            f"the split, for example {example!r}: they were made for another dataset or split"
        )
    if len(item) and item.min() >= n_items:
        raise ValueError(
            f"none of the recommended items is in the catalogue, for example "
            f"{table[ITEM_ID][0]!r}: the recommendations were made for another dataset"
        )
    if ITEM_INDEX in table.columns:
        given = table[ITEM_INDEX].cast(pl.Int64).fill_null(-1).to_numpy()
        index = np.where(item < n_items, item, -1)
        if len(wrong := np.flatnonzero(given != index)):
            at = int(wrong[0])
            own = int(index[at]) if index[at] >= 0 else None
            raise ValueError(
                f"item {table[ITEM_ID][at]!r} has item_index {table[ITEM_INDEX][at]} in the "
                f"recommendations and {own} in the catalogue: they were made for "
                "another dataset; rerun recommend"
            )


def check_unseen(items: npt.NDArray[np.integer], seen: ItemLists) -> None:
    """Raise ValueError if a list holds an item that its row has seen already.

    Args:
        items: item indices. ``# (n_rows, k)``
        seen: seen items of each row.
    """
    again = 0
    for start in range(0, len(items), _ROWS):
        block = items[start : start + _ROWS]
        part = seen.take(np.arange(start, start + len(block)))
        again += int(part.met_by(block).sum())
    if again:
        raise ValueError(
            f"{again} of {len(items)} lists hold items the user has seen "
            "already, but filter_seen is true; filter the lists, or evaluate with "
            "--filter_seen false"
        )
