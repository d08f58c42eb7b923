"""RecBole's atomic files: .inter, .item and .user, whose headers carry the types."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from genrec.columns import (
    BRAND,
    CATEGORIES,
    DESCRIPTION,
    ITEM_ID,
    PRICE,
    RATING,
    TIMESTAMP,
    TITLE,
    USER_ID,
)
from genrec.data.readers.files import collect, existing, scan_text
from genrec.data.readers.raw_data import (
    RawData,
    checked,
    ids_alone,
    interaction_table,
    require_unique,
)
from genrec.data.readers.times import times
from genrec.data.readers.values import (
    native_ids,
    numbers,
    plain_texts,
    plain_titles,
    prices_or_null,
    text_ids,
)

logger = logging.getLogger(__name__)

TYPES = ("token", "token_seq", "float", "float_seq")
# What RecBole's published datasets call things; the first that a file has counts.
_USERS = (USER_ID, "session_id", "uid")
_ITEMS = (ITEM_ID, "iid", "asin", "business_id")
_TIMES = (TIMESTAMP, "time")
_RATINGS = (RATING, "stars")
_CATALOG = {
    TITLE: ("title", "name", "movie_title", "item_name", "product_name", "business_name", "tracks"),
    CATEGORIES: ("class", "categories", "category", "genre", "genres", "sales_type"),
    BRAND: ("brand", "store"),
    PRICE: ("price",),
    DESCRIPTION: ("description", "abstract"),
}


def recbole_files(source: Path | str) -> dict[str, Path]:
    """The files that are read, by role: interactions and, where they are there, items and users.

    Args:
        source: an .inter file, or a folder that holds one; the .item and .user files bear its name.

    Raises:
        ValueError: no .inter file, or several.
    """
    source = Path(source)
    if source.is_dir():
        found = sorted(source.glob("*.inter"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise ValueError(
                f"{source} must hold one .inter file, it has {names}; give the path of one"
            )
        source = found[0]
    files = {"interactions": existing(source)}
    for role, suffix in (("items", ".item"), ("users", ".user")):
        if (path := source.with_suffix(suffix)).is_file():
            files[role] = path
    return files


def read_recbole(source: Path | str, unknown_items: str = "raise") -> RawData:
    """Read RecBole's atomic files: tab-separated, with ``name:type`` headers.

    Of the interactions user_id (or session_id), item_id, timestamp and rating are read; of the
    items the usual names of title, categories (class, genre, sales_type ...), brand, price and
    description; of the users everything. A token_seq of categories is split at commas if it has
    some ("Food, Coffee"), else at spaces, as RecBole does ("Comedy Drama"). Without an .item file
    the catalogue is the item ids alone.

    Args:
        source: an .inter file, or the folder that holds it.
        unknown_items: "raise", or "drop" interactions with items that the .item file lacks.

    Raises:
        ValueError: a missing file, a header without types, no user or item column, prepared
            sequences (item_id_list), null ids, or numbers that can't be read.
    """
    files = recbole_files(source)
    path = files["interactions"]
    table, _ = _atomic(path, (*_USERS, *_ITEMS, *_TIMES, *_RATINGS, "item_id_list"))
    if "item_id_list" in table.columns:
        raise ValueError(
            f"{path} holds prepared sequences (item_id_list); give the .inter file with one "
            "interaction a row"
        )
    moments, ratings = _named(table, _TIMES), _named(table, _RATINGS)
    log = interaction_table(
        native_ids(_required(table, _USERS, path), path, text=True),
        native_ids(_required(table, _ITEMS, path), path, text=True),
        () if moments is None else times(moments, path),
        None if ratings is None else numbers(ratings, path, RATING),
    )
    if "items" in files:
        catalog, items_path = _catalog(files["items"]), files["items"]
        if catalog[ITEM_ID].dtype != log[ITEM_ID].dtype:  # "12" beside "X1": text in both
            catalog = catalog.with_columns(pl.col(ITEM_ID).cast(pl.String))
            log = log.with_columns(pl.col(ITEM_ID).cast(pl.String))
    else:
        catalog, items_path = ids_alone(log[ITEM_ID]), path
    users = _users(files["users"], log[USER_ID].dtype) if "users" in files else None
    return checked(log, catalog, users, unknown_items, path, items_path)


def _atomic(path: Path, wanted: Iterable[str] | None = None) -> tuple[pl.DataFrame, dict[str, str]]:
    """Columns of an atomic file as text, by their plain names, and the columns' types."""
    scanned = scan_text(existing(path), "\t", quotes=False)
    heads = scanned.collect_schema().names()
    kinds: dict[str, str] = {}
    for head in heads:
        name, _, kind = head.strip().rpartition(":")
        if not name or ":" in name or kind not in TYPES:
            raise ValueError(
                f"{path}: header {head!r} is not name:type; types are {', '.join(TYPES)}, "
                "fields are separated by tabs"
            )
        kinds[name] = kind
    if len(kinds) < len(heads):
        raise ValueError(f"{path}: a column is named twice: {', '.join(heads)}; rename one")
    names = dict(zip(heads, kinds, strict=True))
    chosen = [head for head in heads if wanted is None or names[head] in set(wanted)]
    if not chosen:
        raise ValueError(f"{path} has none of the columns {wanted}; it has {', '.join(heads)}")
    table = collect(scanned, path, chosen)
    return table.rename({head: names[head] for head in chosen}), kinds


def _named(table: pl.DataFrame, names: Iterable[str]) -> pl.Series | None:
    return next((table[name] for name in names if name in table.columns), None)


def _required(table: pl.DataFrame, names: tuple[str, ...], path: Path) -> pl.Series:
    column = _named(table, names)
    if column is None:
        raise ValueError(
            f"{path} has no column {names[0]!r} (nor {', '.join(names[1:])}); rename the header "
            f"to {names[0]}:token"
        )
    return column


def _catalog(path: Path) -> pl.DataFrame:
    table, kinds = _atomic(path)
    ids = native_ids(_required(table, _ITEMS, path), path, text=True)
    columns = [ids.alias(ITEM_ID)]
    for name, names in _CATALOG.items():
        if (column := _named(table, names)) is None:
            continue
        if name == TITLE:
            columns.append(plain_titles(column, path))
        elif name == CATEGORIES:
            columns.append(_sequence(column, kinds[column.name]))
        elif name == PRICE:
            columns.append(prices_or_null(column, path))
        else:
            columns.append(plain_texts(column, name))
    return pl.DataFrame(columns)


def _sequence(column: pl.Series, kind: str) -> pl.Series:
    """Names of a token_seq cell; a plain token is one name."""
    cell = pl.col(column.name).str.strip_chars()
    if kind == "token":
        names = pl.concat_list(cell)
    else:
        # "['Food', 'Coffee']" and "'Food', 'Coffee'" occur in published files. Of a column that
        # has commas a cell without one is one name, which may hold a blank.
        commas = bool(column.str.contains(",", literal=True).any())
        listed = cell.str.contains(r"^[\['\"]") | pl.lit(commas)
        bare = cell.str.strip_chars("[]")
        names = pl.when(listed).then(bare.str.split(",")).otherwise(cell.str.split(" "))
    part = pl.element().str.strip_chars().str.replace(r"""^(['"])(.*)['"]$""", "${2}")
    filled = part.filter(part.is_not_null() & (part != ""))
    return column.to_frame().select(names.list.eval(filled).alias(CATEGORIES)).to_series()


def _users(path: Path, kind: pl.DataType) -> pl.DataFrame:
    table, kinds = _atomic(path)
    ids = _required(table, _USERS, path)
    columns = [native_ids(ids, path, "string" if kind == pl.String else "auto", text=True)]
    if columns[0].dtype != kind:
        raise ValueError(
            f"{path}: user ids are text (for example {columns[0][0]!r}), those of the .inter file "
            "are integers; use the files of one dataset"
        )
    require_unique(columns[0], f"{path}: user ids", "keep one row per user")
    columns[0] = columns[0].alias(USER_ID)
    for column in table.drop(ids.name).get_columns():
        kind_of = kinds[column.name]
        if kind_of == "float":
            columns.append(numbers(column, path, column.name))
        elif kind_of.endswith("_seq"):
            split = column.str.split(" ")
            columns.append(split.cast(pl.List(pl.Float64)) if kind_of == "float_seq" else split)
        else:
            columns.append(text_ids(column))
    return pl.DataFrame(columns)
