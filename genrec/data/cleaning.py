"""Cleaning of the interaction log: feedback rules, duplicates, order, k-core, item indices.

The order rule is one for every dataset: a user's interactions are ordered by timestamp, and those
of the same moment keep their order in the file. Data without timestamps keep the file's order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.columns import (
    BRAND,
    CATEGORIES,
    DESCRIPTION,
    EVENT,
    ITEM_ID,
    ITEM_INDEX,
    POSITION,
    PRICE,
    QUERY,
    RATING,
    REVIEW,
    SUMMARY,
    TIMESTAMP,
    TITLE,
    USER_ID,
    WEIGHT,
)
from genrec.data.feedback import (
    ABOVE_USER_MEAN,
    ALL,
    effective_rating_rule,
    filter_above_user_mean,
    filter_rating,
    weigh_events,
)
from genrec.data.given_splits import implied_log
from genrec.data.readers import SUBSECOND, RawData

logger = logging.getLogger(__name__)

TIE_RULE = "timestamp, then file order"
TIE_RULE_WITHOUT_TIME = "file order (the data have no timestamps)"

# Kept in the cleaned log, row by row, where the source has them.
OPTIONAL_COLUMNS = (EVENT, WEIGHT, SUMMARY, REVIEW, QUERY)

_CHUNK = 1 << 20  # rows that are worked on at once

CATALOG_SCHEMA = {
    TITLE: pl.String(),
    BRAND: pl.String(),
    CATEGORIES: pl.List(pl.String()),
    PRICE: pl.Float64(),
    DESCRIPTION: pl.String(),
}


@dataclass(frozen=True)
class CleanData:
    """The cleaned tables.

    Attributes:
        interactions: user_id, item_id, item_index, timestamp, rating, position, and those of
            `OPTIONAL_COLUMNS` that the source has; sorted by user (order of first appearance), then
            position. Of a given split: what its training rows imply.
        catalog: item_index, item_id, title, brand, categories, price, description; row i has
            item_index i.
        users: attributes of the users that are left, or None.
        tie_share: share of users whose last two interactions have the same time; None without
            timestamps.
        dropped: interactions that each rule took away.
        given: the tables of a given split, see `RawData.given`, or None.
    """

    interactions: pl.DataFrame
    catalog: pl.DataFrame
    users: pl.DataFrame | None
    tie_share: float | None
    dropped: dict[str, int] = field(default_factory=dict)
    given: Mapping[str, pl.DataFrame] | None = None


def drop_duplicates(interactions: pl.DataFrame) -> pl.DataFrame:
    """Drop repetitions of the same user, item and time.

    The one of the highest weight is kept, of several the first in the file. Rows without a time are
    kept: there a repetition may be a second purchase.
    """
    key = [USER_ID, ITEM_ID, *_time_columns(interactions)]
    if WEIGHT in interactions.columns:
        heaviest = pl.col(WEIGHT) == pl.col(WEIGHT).max().over(key)
        interactions = interactions.filter(heaviest | pl.col(TIMESTAMP).is_null())
    return interactions.filter(pl.struct(key).is_first_distinct() | pl.col(TIMESTAMP).is_null())


def drop_duplicates_of_ordered(interactions: pl.DataFrame) -> pl.DataFrame:
    """`drop_duplicates` for ordered rows, looking at those alone whose time their user has twice.

    Those are few, and a table without repetitions is returned as it is, not copied: at a hundred
    million interactions that is most of the time and memory of finding duplicates.
    """
    key = [USER_ID, *_time_columns(interactions)]
    again = np.ones(max(interactions.height - 1, 0), dtype=bool)
    for name in key:
        column = interactions[name]
        again &= (column[1:] == column[:-1]).fill_null(False).to_numpy()
    tied = np.zeros(interactions.height, dtype=bool)
    tied[1:] |= again
    tied[:-1] |= again
    rows = np.flatnonzero(tied)
    names = [n for n in (*key, ITEM_ID, WEIGHT) if n in interactions.columns]
    part = interactions.select(names)[rows].with_columns(pl.Series("_row", rows))
    kept = drop_duplicates(part)["_row"].to_numpy()
    if len(kept) == len(rows):
        return interactions
    tied[kept] = False
    return interactions.filter(~tied)


def order_interactions(interactions: pl.DataFrame) -> pl.DataFrame:
    """Sort by user (order of first appearance), time, file order; add `position`.

    Raises:
        ValueError: some interactions have a time and others don't.
    """
    without = interactions[TIMESTAMP].null_count()
    if 0 < without < interactions.height:
        raise ValueError(
            f"{without} of {interactions.height} interactions have no timestamp, so they can't be "
            "ordered; fill them in, drop those rows, or leave the time column unset (file order)"
        )
    rows = np.arange(interactions.height, dtype=np.uint32)
    # The last key first: each sort keeps the order of the one before among equals.
    keys = [] if without else [interactions[name] for name in _time_columns(interactions)[::-1]]
    for key in (*keys, _first_rows(interactions[USER_ID])):
        rows = rows[_stable_order(_at(key, rows).to_numpy())]
    return _number(pl.DataFrame([_at(column, rows) for column in interactions.get_columns()]))


def _first_rows(ids: pl.Series) -> pl.Series:
    """The row where each row's id stands first: it orders ids by first appearance."""
    low, high = (ids.min(), ids.max()) if ids.dtype.is_integer() and len(ids) else (0, -1)
    assert isinstance(low, int) and isinstance(high, int)
    if not 0 <= high - low < 4 * len(ids) + _CHUNK:
        frame = ids.to_frame("id").with_row_index("row")
        return frame.select(pl.col("row").min().over("id")).to_series()
    # Integers that lie close together: a table of all of them is many times as fast.
    values, table = ids.to_numpy(), np.full(high - low + 1, len(ids), dtype=np.uint32)
    first = np.empty(len(ids), dtype=np.uint32)
    for begin in range(0, len(ids), _CHUNK):
        part = values[begin : begin + _CHUNK] - low
        np.minimum.at(table, part, np.arange(begin, begin + len(part), dtype=np.uint32))
    for begin in range(0, len(ids), _CHUNK):
        first[begin : begin + _CHUNK] = table[values[begin : begin + _CHUNK] - low]
    return pl.Series(first)


def _at(column: pl.Series, rows: npt.NDArray[np.uint32]) -> pl.Series:
    """``column.gather(rows)``; for plain numbers in chunks, which is several times as fast."""
    if not column.dtype.is_numeric() or column.null_count():
        return column.gather(pl.Series(rows))
    values = column.to_numpy()
    found = np.empty(len(rows), dtype=values.dtype)
    for begin in range(0, len(rows), _CHUNK):
        found[begin : begin + _CHUNK] = values[rows[begin : begin + _CHUNK]]
    return pl.Series(column.name, found)


def _stable_order(keys: np.ndarray) -> npt.NDArray[np.uint32]:
    """``np.argsort(keys, kind="stable")`` as uint32, several times as fast in half of the memory.

    Key and place share 64 bits, which are sorted in place by value.
    """
    if not len(keys):
        return np.empty(0, dtype=np.uint32)
    low, bits = int(keys.min()), len(keys).bit_length()
    if (int(keys.max()) - low).bit_length() + bits > 64:
        return np.argsort(keys, kind="stable").astype(np.uint32)
    packed = np.empty(len(keys), dtype=np.uint64)
    np.subtract(keys, low, out=packed, casting="unsafe")
    packed <<= np.uint64(bits)
    packed |= np.arange(len(keys), dtype=np.uint32)
    packed.sort()
    packed &= np.uint64((1 << bits) - 1)
    return packed.astype(np.uint32)


def collapse_repeats(interactions: pl.DataFrame) -> pl.DataFrame:
    """Keep the first of consecutive interactions of a user with one item; expects ordered rows."""
    changed = (pl.col(ITEM_ID) != pl.col(ITEM_ID).shift(1)) | (
        pl.col(USER_ID) != pl.col(USER_ID).shift(1)
    )
    return _number(interactions.filter(changed.fill_null(True)))


def k_core(interactions: pl.DataFrame, min_user: int = 1, min_item: int = 1) -> pl.DataFrame:
    """Drop users and items with too few interactions until all that are left have enough.

    Args:
        interactions: the log; row order is kept.
        min_user: interactions that a user needs; 1 is off.
        min_item: interactions that an item needs; 1 is off.

    Raises:
        ValueError: a threshold below 1, or nothing is left.
    """
    for name, value in (("min_user", min_user), ("min_item", min_item)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1 (1 keeps everything)")
    if min_user == 1 and min_item == 1:
        return interactions
    users = _codes(interactions[USER_ID])
    items = _codes(interactions[ITEM_ID])
    rows = np.arange(interactions.height)
    while True:
        enough = (np.bincount(users[rows])[users[rows]] >= min_user) & (
            np.bincount(items[rows])[items[rows]] >= min_item
        )
        if enough.all():
            break
        rows = rows[enough]
        if len(rows) == 0:
            raise ValueError(
                f"k-core with min_user={min_user}, min_item={min_item} leaves nothing of "
                f"{interactions.height} interactions; lower them"
            )
    return interactions[rows]


def last_two_tie_share(interactions: pl.DataFrame) -> float | None:
    """Share of users with two or more interactions whose last two have the same time.

    There the tie rule, not the clock, decides which one is the test target.

    Returns:
        The share, or None where the data have no timestamps or no such user.
    """
    if interactions.height == 0 or interactions[TIMESTAMP].null_count():
        return None
    # Users lie in blocks: where one ends, his last two interactions stand beside each other.
    user = interactions[USER_ID]
    ends = np.append(np.flatnonzero((user[1:] != user[:-1]).to_numpy()), len(user) - 1)
    ends = ends[np.diff(ends, prepend=-1) >= 2]
    if not len(ends):
        return None
    times = interactions.select(_time_columns(interactions))
    same = [(times[ends][name] == times[ends - 1][name]).to_numpy() for name in times.columns]
    return float(np.all(same, axis=0).mean())


def sample_users(data: CleanData, n_users: int, seed: int = 0) -> CleanData:
    """Keep a random sample of users, the same for the same seed; the catalogue stays whole."""
    if n_users < 1:
        raise ValueError(f"limit_users={n_users} must be at least 1")
    tables = {"log": data.interactions} if data.given is None else data.given
    users = pl.concat([table[USER_ID] for table in tables.values()]).unique(maintain_order=True)
    if n_users >= len(users):
        return data
    chosen = np.sort(np.random.default_rng(seed).choice(len(users), n_users, replace=False))
    keep = users[chosen].implode()
    interactions = data.interactions.filter(pl.col(USER_ID).is_in(keep))
    given = data.given
    return replace(
        data,
        interactions=interactions,
        users=None if data.users is None else data.users.filter(pl.col(USER_ID).is_in(keep)),
        tie_share=last_two_tie_share(interactions),
        dropped={**data.dropped, "limit_users": data.interactions.height - interactions.height},
        given=None
        if given is None
        else {name: table.filter(pl.col(USER_ID).is_in(keep)) for name, table in given.items()},
    )


def clean(
    raw: RawData,
    min_rating: float | None = None,
    min_user: int = 1,
    min_item: int = 1,
    collapse: bool = False,
    rating_rule: str | None = None,
    event_weights: Mapping[str, float] | None = None,
) -> CleanData:
    """Clean the log and number the catalogue.

    In this order: event weights, rating threshold, order, exact duplicates, ratings above the
    user's mean (optional), consecutive repeats (optional), k-core. A k-core on items takes the
    dropped items out of the catalogue, too; without it, items that nobody bought stay, so that they
    can be recommended by their content. A given split is not cleaned, since its rows are what is
    compared with others: its log is what its training rows imply.

    Args:
        raw: tables from a reader or from `synthetic_shop`.
        min_rating: keep interactions rated at least this; None keeps all.
        min_user: interactions that a user needs (k-core).
        min_item: interactions that an item needs (k-core).
        collapse: keep one of consecutive interactions with the same item.
        rating_rule: one of `genrec.data.feedback.RATING_RULES`; None is at-least where `min_rating`
            is given, else all.
        event_weights: see `genrec.data.feedback.weigh_events`.

    Raises:
        ValueError: a rule that the data can't satisfy; see the functions of this module and of
            `genrec.data.feedback`.
    """
    dropped = {"unknown_items": raw.unknown} if raw.unknown else {}
    rule = effective_rating_rule(rating_rule, min_rating)
    log = raw.interactions
    steps: dict[str, Callable[[pl.DataFrame], pl.DataFrame]] = {
        "zero_weight": lambda t: weigh_events(t, event_weights),
        "min_rating": lambda t: filter_rating(t, min_rating),
        "order": order_interactions,
        "duplicates": drop_duplicates_of_ordered,
        "below_user_mean": filter_above_user_mean if rule == ABOVE_USER_MEAN else lambda t: t,
        "consecutive_repeats": collapse_repeats if collapse else lambda t: t,
        "k_core": lambda t: k_core(t, min_user, min_item),
    }
    if raw.given is not None:
        if rule != ALL or event_weights is not None or collapse or max(min_user, min_item) > 1:
            raise ValueError(
                "a given split is taken as it is: leave rating_rule, min_rating, event_weights, "
                "collapse_repeats and the k-core unset"
            )
        log = implied_log(raw.given).with_columns(pl.lit(None, dtype=pl.Float64).alias(RATING))
        steps = {}
    for name, step in steps.items():
        before = log.height
        log = step(log)
        if before != log.height:
            dropped[name] = before - log.height
            logger.info("%s: dropped %d of %d interactions", name, before - log.height, before)
    # Places are numbered again, since the k-core takes rows out.
    log = _number(log)
    kept = raw.catalog
    if min_item > 1:
        kept = kept.join(log.select(ITEM_ID).unique(), on=ITEM_ID, how="semi")
        logger.info("k_core: %d of %d catalogue items left", kept.height, raw.catalog.height)
    catalog = index_catalog(kept)
    users = raw.users
    if users is not None:
        # In the log's order, and only those who are left.
        order = log.select(pl.col(USER_ID).unique(maintain_order=True))
        users = order.join(users, on=USER_ID, how="inner", maintain_order="left")
    share = last_two_tie_share(log)
    # One column is joined and added: to join the log would copy all of it.
    numbers = catalog.select(ITEM_ID, ITEM_INDEX)
    index = log.select(ITEM_ID).join(numbers, on=ITEM_ID, how="left", maintain_order="left")
    log = log.with_columns(index[ITEM_INDEX])
    assert log[ITEM_INDEX].null_count() == 0, "readers check that every item is in the catalogue"
    optional = [name for name in (SUBSECOND, *OPTIONAL_COLUMNS) if name in log.columns]
    log = log.select(USER_ID, ITEM_ID, ITEM_INDEX, TIMESTAMP, RATING, POSITION, *optional)
    return CleanData(log, catalog, users, share, dropped, raw.given)


def index_catalog(catalog: pl.DataFrame) -> pl.DataFrame:
    """Sort the catalogue by item_id and number it; attributes that it lacks become null.

    Missing or blank titles become "Item <item_id>", with a warning that counts them.
    """
    absent = [
        pl.lit(None, dtype=kind).alias(name)
        for name, kind in CATALOG_SCHEMA.items()
        if name not in catalog.columns
    ]
    table = catalog.with_columns(absent).sort(ITEM_ID)
    table = table.with_columns([pl.col(name).cast(kind) for name, kind in CATALOG_SCHEMA.items()])
    table = table.with_columns(
        pl.col(CATEGORIES).fill_null(pl.lit([], dtype=pl.List(pl.String))),
        *[_blank_to_null(name) for name in (TITLE, BRAND, DESCRIPTION)],
    )
    if untitled := table[TITLE].null_count():
        logger.warning(
            "%d of %d items have no title; they get 'Item <item_id>'", untitled, table.height
        )
    fallback = pl.format("Item {}", pl.col(ITEM_ID).cast(pl.String))
    table = table.with_columns(pl.col(TITLE).fill_null(fallback)).with_row_index(ITEM_INDEX)
    return table.select(pl.col(ITEM_INDEX).cast(pl.Int32), pl.col(ITEM_ID), *CATALOG_SCHEMA)


def missing_title(catalog: pl.DataFrame) -> pl.Series:
    """Which items have no title of their own: null, blank, or the stand-in ``Item <item_id>``."""
    if TITLE not in catalog.columns:
        return pl.repeat(True, catalog.height, dtype=pl.Boolean, eager=True)
    title = catalog[TITLE].cast(pl.String).str.strip_chars()
    return title.is_null() | (title == "") | (title == "Item " + catalog[ITEM_ID].cast(pl.String))


def _blank_to_null(name: str) -> pl.Expr:
    text = pl.col(name).str.strip_chars()
    return pl.when(text != "").then(text).alias(name)


def _number(ordered: pl.DataFrame) -> pl.DataFrame:
    """Set `position` in a log whose users lie in blocks."""
    user = ordered[USER_ID]
    start = np.append(0, np.flatnonzero((user[1:] != user[:-1]).to_numpy()) + 1).astype(np.int32)
    lengths = np.diff(np.append(start, ordered.height))
    place = np.arange(ordered.height, dtype=np.int32)
    place -= np.repeat(start, lengths) if ordered.height else place
    return ordered.with_columns(pl.Series(POSITION, place, dtype=pl.Int32))


def _time_columns(interactions: pl.DataFrame) -> list[str]:
    return [name for name in (TIMESTAMP, SUBSECOND) if name in interactions.columns]


def _codes(column: pl.Series) -> np.ndarray:
    return (column.rank("dense").cast(pl.Int64) - 1).to_numpy()
