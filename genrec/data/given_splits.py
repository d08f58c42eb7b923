"""Protocol `given`: the dataset brings its training, validation and test rows.

MiniOneRec's and ReRe's releases are such rows, (user, history, target), without an interaction log.
They stay as they are, in their order. What the training rows say of who did what before makes a log
for everything that reads one; held-out rows add nothing to it.

A row's *place* is how many interactions the user had before its target, as far as the rows tell. A
history shorter than the longest of all rows is taken to be whole, so its length is the place. The
longest ones may have been cut: they count on from their length, one place per row, in the order of
train, valid, test. Where rows of a user are missing, the true number is larger.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import polars as pl

from genrec.columns import (
    HISTORY,
    ITEM_ID,
    ITEM_INDEX,
    POSITION,
    ROW_ID,
    SEEN,
    SUPERVISE_FROM,
    TARGET,
    TARGET_POSITION,
    TARGET_TIME,
    TIMESTAMP,
    USER_ID,
)
from genrec.data.split_rows import IntArray, ItemArray, check_history, list_column
from genrec.data.splits import GIVEN, SPLITS, Splits
from genrec.data.time_splits import iso_time

logger = logging.getLogger(__name__)

ITEMS = "history"  # of the given tables: item ids, oldest first
IMPLIED = "implied by the training rows"
_PLACE = "_place"


def target_places(given: Mapping[str, pl.DataFrame]) -> dict[str, IntArray]:
    """Place of each row's target in its user's interactions, by the rule above.

    Args:
        given: tables "train", "valid" and "test" with user_id, history and item_id.
    """
    rows = pl.concat(
        [
            given[name].select(USER_ID, pl.col(ITEMS).list.len().fill_null(0).cast(pl.Int64))
            for name in SPLITS
        ]
    )
    length = pl.col(ITEMS)
    longest = length == length.max()
    count = longest.cast(pl.Int64).cum_sum().over(USER_ID)
    place = rows.select(pl.when(longest).then(length + count - 1).otherwise(length))
    ends = np.cumsum([given[name].height for name in SPLITS])[:-1]
    parts = np.split(place.to_series().to_numpy().astype(np.int64), ends)
    return dict(zip(SPLITS, parts, strict=True))


def implied_log(given: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """The interactions that the training rows tell of, each once.

    Args:
        given: see `target_places`.

    Returns:
        user_id, item_id, timestamp and position; users in the order of their first training row.
        An interaction that only histories show has the time of the user's next one whose time is
        known, which is at or after its own. Times are all null where rows have none, or where they
        don't ascend.
    """
    return _placed_log(given["train"], target_places(given)["train"]).drop(_PLACE)


def _placed_log(train: pl.DataFrame, place: IntArray) -> pl.DataFrame:
    """`implied_log`, and the place that each interaction has by the training rows."""
    train = train.with_columns(pl.Series(_PLACE, place), pl.col(ITEMS).fill_null([]))
    train = train.with_row_index("_row").with_columns(
        pl.col("_row").min().over(USER_ID).alias("_user"),
        (pl.col(_PLACE) - pl.col(ITEMS).list.len().cast(pl.Int64)).alias("_first"),
    )
    columns = ("_user", USER_ID, _PLACE, ITEM_ID, TIMESTAMP)
    met = (
        train.filter(pl.col(ITEMS).list.len() > 0)
        .select("_user", USER_ID, pl.col(ITEMS).alias(ITEM_ID), _PLACE, "_first")
        .with_columns(pl.int_ranges("_first", _PLACE).alias(_PLACE))
        .explode(ITEM_ID, _PLACE)
        .with_columns(pl.lit(None, dtype=pl.Int64).alias(TIMESTAMP))
    )
    # A target tells its time, so it goes before what histories say of the same place.
    log = (
        pl.concat([train.select(columns), met.select(columns)])
        .unique(["_user", _PLACE], keep="first", maintain_order=True)
        .sort("_user", _PLACE)
    )
    time = log.select(pl.col(TIMESTAMP).fill_null(strategy="backward").over("_user")).to_series()
    falls = (time.diff() < 0) & (log["_user"] == log["_user"].shift(1))
    if time.null_count() or falls.any():
        time = pl.Series(TIMESTAMP, [None], dtype=pl.Int64).new_from_index(0, log.height)
    # Numbered anew, since rows that lost an erased item may leave places out.
    number = pl.int_range(pl.len()).over("_user").cast(pl.Int32)
    return log.select(USER_ID, ITEM_ID, time.alias(TIMESTAMP), number.alias(POSITION), _PLACE)


def given_splits(
    given: Mapping[str, pl.DataFrame],
    interactions: pl.DataFrame,
    catalog: pl.DataFrame,
    max_history: int = 20,
    min_history: int = 1,
) -> Splits:
    """Split rows of given rows, in their order.

    A training row supervises its target alone, since the items of its history are targets of rows
    of their own, or are meant to be none. Seen items are the distinct ones of the row's history as
    it was given; the history is then cut to its last `max_history` items. Held-out rows with fewer
    than `min_history` are dropped.

    Args:
        given: tables "train", "valid" and "test" with user_id, history, item_id and timestamp.
        interactions: `implied_log` of them with item_index; counted for `train_count`.
        catalog: item_id and item_index.
        max_history: items that a history holds at most.
        min_history: items that a held-out row's history must have had.

    Raises:
        ValueError: a length out of range, an item that the catalogue lacks, or a part that is
            empty.
    """
    check_history(max_history, min_history)
    places = target_places(given)
    # A training row's target stands in the log, so its position is that of the log.
    log = _placed_log(given["train"], places["train"]).select(USER_ID, _PLACE, POSITION)
    rows = given["train"].select(USER_ID, pl.Series(_PLACE, places["train"]))
    found = rows.join(log, on=[USER_ID, _PLACE], how="left", maintain_order="left")[POSITION]
    places["train"] = found.to_numpy().astype(np.int64)
    tables, dropped = {}, {}
    for name in SPLITS:
        rows = _split_rows(name, given[name], places[name], catalog, max_history)
        if name != "train":
            length = given[name][ITEMS].list.len().fill_null(0)
            dropped[f"{name}_without_history"] = int((length == 0).sum())
            if min_history > 1:
                dropped[f"{name}_short_history"] = int(
                    ((length > 0) & (length < min_history)).sum()
                )
            rows = rows.filter(length >= min_history)
        if rows.is_empty():
            raise ValueError(
                f"the {name} part of the given split has no rows"
                + (f" with a history of {min_history} or more" if name != "train" else "")
                + "; bring its file, or lower min_history"
            )
        tables[name] = rows.drop(SEEN) if name == "train" else rows
    for reason, count in dropped.items():
        if count:
            logger.info("%s: %s: %d", GIVEN, reason, count)
    held = pl.concat([tables["valid"][USER_ID], tables["test"][USER_ID]]).unique()
    trained = tables["train"][USER_ID].unique()
    total = sum(table.height for table in tables.values())
    starts = {f"{name}_from": tables[name][TARGET_TIME] for name in ("valid", "test")}
    return Splits(
        tables["train"],
        tables["valid"],
        tables["test"],
        np.bincount(interactions[ITEM_INDEX].to_numpy(), minlength=catalog.height).astype(np.int32),
        len(trained) - int(trained.is_in(held.implode()).sum()),
        protocol=GIVEN,
        boundaries={
            name: iso_time(int(time.to_numpy().min()))
            for name, time in starts.items()
            if time.null_count() == 0
        },
        shares={name: table.height / total for name, table in tables.items()},
        dropped=dropped,
    )


def _split_rows(
    name: str, table: pl.DataFrame, place: IntArray, catalog: pl.DataFrame, max_history: int
) -> pl.DataFrame:
    length = table[ITEMS].list.len().fill_null(0).to_numpy().astype(np.int64)
    flat = table[ITEMS].list.explode(keep_nulls=False, empty_as_null=False)
    items = _indices(name, flat, catalog)
    end = np.cumsum(length)
    kept = np.minimum(length, max_history)
    number = pl.Series(np.arange(table.height)).cast(pl.String).str.zfill(6)
    seen = list_column(items, end - length, end).list.unique().list.sort()
    return pl.DataFrame(
        [
            (f"{name}-" + number).alias(ROW_ID),
            table[USER_ID],
            list_column(items, end - kept, end).alias(HISTORY),
            pl.Series(TARGET, _indices(name, table[ITEM_ID], catalog), dtype=pl.Int32),
            pl.Series(SUPERVISE_FROM, kept, dtype=pl.Int32),
            table[TIMESTAMP].cast(pl.Int64).alias(TARGET_TIME),
            pl.Series(TARGET_POSITION, place, dtype=pl.Int32),
            seen.alias(SEEN),
        ]
    )


def _indices(name: str, item_ids: pl.Series, catalog: pl.DataFrame) -> ItemArray:
    """Catalogue rows of item ids."""
    wanted = pl.DataFrame({ITEM_ID: item_ids})
    found = wanted.join(
        catalog.select(ITEM_ID, ITEM_INDEX), on=ITEM_ID, how="left", maintain_order="left"
    )[ITEM_INDEX]
    if (missing := found.is_null()).any():
        raise ValueError(
            f"the {name} rows hold item {item_ids[int(missing.arg_true()[0])]!r}, which the "
            "catalogue lacks; add it there, or remove those rows"
        )
    return found.to_numpy().astype(np.int32)
