"""Opt-out and erasure: listed users and items leave the data before anything is computed from them.

Nothing here writes or logs an id: what is reported are counts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import polars as pl

from genrec.columns import ITEM_ID, USER_ID
from genrec.data.given_splits import ITEMS
from genrec.data.readers import RawData

logger = logging.getLogger(__name__)

_ENDINGS = (".txt", ".csv", ".parquet")


@dataclass(frozen=True)
class Erased:
    """What an erasure list took away.

    Attributes:
        listed: distinct ids of the list.
        matched: those that the data held.
        interactions: interactions that went (of given splits: rows).
    """

    listed: int
    matched: int
    interactions: int


def read_ids(path: Path | str, columns: Iterable[str]) -> pl.Series:
    """Distinct ids of an erasure list, as text.

    Args:
        path: .txt with one id a line, or .csv or .parquet with one of `columns`.
        columns: names that the column of ids may have, in order of preference.

    Raises:
        ValueError: another ending, a file that can't be read, no such column, or a missing id.
    """
    path, columns = Path(path), list(dict.fromkeys(columns))
    ending = path.suffix.lower()
    if ending not in _ENDINGS:
        raise ValueError(f"{path} must end in {', '.join(_ENDINGS)}")
    try:
        if ending == ".txt":
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            ids = pl.Series("id", lines, dtype=pl.String)
            return ids.str.strip_chars().replace("", None).drop_nulls().unique(maintain_order=True)
        if ending == ".csv":
            table = pl.read_csv(path, infer_schema=False, glob=False)
        else:
            table = pl.read_parquet(path, glob=False)
    except (UnicodeDecodeError, pl.exceptions.PolarsError) as error:
        # Polars' messages may quote the file, and with it an id.
        raise ValueError(
            f"{path} can't be read as {ending} ({type(error).__name__}); write UTF-8 text with one "
            "id a line, or a table with a column of ids"
        ) from None
    name = next((name for name in columns if name in table.columns), None)
    if name is None:
        raise ValueError(
            f"{path} has no column {' or '.join(columns)}; its {len(table.columns)} columns are "
            "named otherwise"
        )
    ids = table[name].cast(pl.String).str.strip_chars()
    if missing := int((ids.is_null() | (ids == "")).sum()):
        raise ValueError(f"{path}: {missing} of {len(ids)} ids are missing; remove those rows")
    return ids.unique(maintain_order=True)


def erase(
    raw: RawData, users: pl.Series | None = None, items: pl.Series | None = None
) -> tuple[RawData, dict[str, Erased]]:
    """Remove users with all that they did, and items with all that was done with them.

    Ids are compared as text, without blanks around them (a database may pad them). Items leave the
    catalogue and, in given splits, the histories; rows whose target they are go.

    Args:
        raw: tables as read.
        users: ids from `read_ids`; None for none.
        items: likewise.

    Returns:
        The tables that are left, and counts for "users" and "items" where a list was given.

    Raises:
        ValueError: nothing is left.
    """
    found: dict[str, Erased] = {}
    for kind, column, ids in (("users", USER_ID, users), ("items", ITEM_ID, items)):
        if ids is None:
            continue
        before = _rows(raw)
        known = _known(raw, column)
        matched = known.filter(known.is_in(ids.implode()))
        raw = _without(raw, column, ids)
        found[kind] = Erased(len(ids), len(matched), before - _rows(raw))
        logger.info("erase_%s: %s", kind, asdict(found[kind]))
        if unmatched := len(ids) - len(matched):
            logger.warning(
                "erase_%s: %d of %d ids match nothing in the data; check how they are written",
                kind, unmatched, len(ids),
            )  # fmt: skip
    if found and (_rows(raw) == 0 or raw.catalog.is_empty()):
        raise ValueError("erase_users and erase_items leave no interactions; check the lists")
    return raw, found


def _rows(raw: RawData) -> int:
    if raw.given is not None:
        return sum(table.height for table in raw.given.values())
    return raw.interactions.height


def _known(raw: RawData, column: str) -> pl.Series:
    """Distinct ids of all tables, as text."""
    tables = [raw.interactions, raw.catalog, raw.users, *(raw.given or {}).values()]
    parts = [t[column].cast(pl.String) for t in tables if t is not None and column in t.columns]
    return pl.concat([part.str.strip_chars().unique() for part in parts]).unique().drop_nulls()


def _without(raw: RawData, column: str, ids: pl.Series) -> RawData:
    stays = ~pl.col(column).cast(pl.String).str.strip_chars().is_in(ids.implode())
    given = raw.given
    if given is not None:
        given = {name: table.filter(stays) for name, table in given.items()}
        if column == ITEM_ID:
            item = pl.element()
            text = item.cast(pl.String).str.strip_chars()
            others = pl.col(ITEMS).list.filter(~text.is_in(ids.to_list()))
            given = {name: table.with_columns(others) for name, table in given.items()}
    return replace(
        raw,
        interactions=raw.interactions.filter(stays),
        catalog=raw.catalog.filter(stays) if column == ITEM_ID else raw.catalog,
        users=raw.users.filter(stays) if column == USER_ID and raw.users is not None else raw.users,
        given=given,
    )
