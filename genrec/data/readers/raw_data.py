"""The raw form that every reader returns, and the checks that every reader makes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from genrec.columns import ITEM_ID, RATING, TIMESTAMP, USER_ID

logger = logging.getLogger(__name__)

SUBSECOND = (
    "subsecond"  # microseconds within the second, only where the source is finer than seconds
)
UNKNOWN_ITEMS = ("raise", "drop")
PLAIN_INTEGER = r"^(0|-?[1-9]\d{0,17})$"
_SHOWN = 5  # bad values that an error lists


@dataclass(frozen=True)
class RawData:
    """Tables as read, not yet cleaned, ordered or numbered.

    Attributes:
        interactions: user_id, item_id, timestamp (Int64 seconds or null), rating (Float64 or null),
            in file order; `subsecond` too where the source is finer than seconds. Only where the
            source has them: event (String), weight (Float64), summary and review (String; headline
            and body of the review), query (String; the search that led to the interaction).
        catalog: item_id and any of title, brand, categories, price, description.
        users: user_id and attribute columns, or None.
        given: the rows of a dataset whose split is fixed: "train", "valid" and "test" tables of
            user_id, history (list of item ids, oldest first), item_id (the target) and timestamp
            (of the target; Int64 seconds or null), in file order. `interactions` then holds what
            the training rows imply.
        unknown: interactions that were dropped since the catalogue lacks their items.
    """

    interactions: pl.DataFrame
    catalog: pl.DataFrame
    users: pl.DataFrame | None
    given: Mapping[str, pl.DataFrame] | None = None
    unknown: int = 0


def interaction_table(
    users: pl.Series,
    items: pl.Series,
    times: Iterable[pl.Series] = (),
    ratings: pl.Series | None = None,
    extra: Iterable[pl.Series] = (),
) -> pl.DataFrame:
    """Put the columns of interactions together; no times or ratings become null columns."""
    timed = list(times) or [nulls(TIMESTAMP, pl.Int64, len(users))]
    rated = nulls(RATING, pl.Float64, len(users)) if ratings is None else ratings
    return pl.DataFrame([users.alias(USER_ID), items.alias(ITEM_ID), *timed, rated, *extra])


def ids_alone(items: pl.Series) -> pl.DataFrame:
    """A catalogue of the item ids alone, in order of first appearance."""
    return items.alias(ITEM_ID).unique(maintain_order=True).to_frame()


def nulls(name: str, kind: type[pl.DataType], length: int) -> pl.Series:
    """A column of nulls."""
    return pl.Series(name, [None], dtype=kind).new_from_index(0, length)


def check_option(name: str, value: str, options: Iterable[str]) -> None:
    """Raise if a setting isn't one of its choices."""
    if value not in options:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(options)}")


def require_unique(ids: pl.Series, what: str, fix: str) -> None:
    """Raise if an id occurs twice."""
    if ids.n_unique() == len(ids):
        return
    repeated = ids.filter(ids.is_duplicated()).unique(maintain_order=True)
    raise ValueError(f"{what} must be unique, {listed(repeated)} occur more than once; {fix}")


def listed(values: pl.Series) -> str:
    """The first few values, for an error message."""
    shown = ", ".join(repr(v) for v in values.head(_SHOWN).to_list())
    return shown + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")


def checked(
    interactions: pl.DataFrame,
    catalog: pl.DataFrame,
    users: pl.DataFrame | None,
    unknown_items: str,
    interactions_path: Path | str,
    items_path: Path | str,
) -> RawData:
    """Raise if the tables don't fit together; drop unknown items if that was asked for.

    Raises:
        ValueError: item ids of two types, an item twice in the catalogue, unknown items, or no
            interaction left without them.
    """
    check_option("unknown_items", unknown_items, UNKNOWN_ITEMS)
    for table, column, path in (
        (interactions, USER_ID, interactions_path),
        (interactions, ITEM_ID, interactions_path),
        (catalog, ITEM_ID, items_path),
    ):
        if missing := table[column].null_count():
            row = int(table[column].is_null().arg_true()[0]) + 1
            raise ValueError(
                f"{path}: {column} is missing ({missing} such rows, the first is row {row} of "
                f"{table.height}); fill it in or remove the rows"
            )
    if users is not None:
        require_unique(users[USER_ID], "user ids of the users' table", "keep one row per user")
    mine, theirs = interactions[ITEM_ID], catalog[ITEM_ID]
    if mine.dtype != theirs.dtype:
        kinds = {pl.Int64: "integers", pl.String: "strings"}
        odd = mine if mine.dtype == pl.String else theirs
        plain = odd.filter(~odd.str.contains(PLAIN_INTEGER))
        raise ValueError(
            f"item ids are {kinds[type(mine.dtype)]} in {interactions_path} and "
            f"{kinds[type(theirs.dtype)]} in {items_path} "
            f"(for example {(plain if len(plain) else odd)[0]!r}); "
            "set id_type: string to compare them as text"
            + ("" if len(plain) else ", or id_type: integer to compare them as numbers")
        )
    require_unique(theirs, f"{items_path}: item ids", "keep one row per item")
    known = mine.is_in(theirs.implode())
    if not known.all():
        unknown = mine.filter(~known)
        ids = unknown.unique(maintain_order=True)
        if unknown_items == "raise":
            raise ValueError(
                f"{len(unknown)} interactions of {interactions_path} have {len(ids)} items "
                f"that {items_path} lacks: {listed(ids)}; add them to the "
                "catalogue, or set unknown_items: drop"
            )
        interactions = interactions.filter(known)
        logger.warning("unknown_items: dropped %d interactions, %d items", len(unknown), len(ids))
        if interactions.height == 0:
            raise ValueError(
                f"no item of {interactions_path} is in {items_path} (first: {listed(ids)}); "
                "check that both use the same ids"
            )
    dropped = len(mine) - interactions.height
    return RawData(interactions=interactions, catalog=catalog, users=users, unknown=dropped)
