"""Tables with a column mapping: CSV, TSV, JSON Lines, Parquet files and folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from genrec.columns import (
    BRAND,
    DESCRIPTION,
    EVENT,
    ITEM_ID,
    QUERY,
    RATING,
    REVIEW,
    SUMMARY,
    TITLE,
    USER_ID,
    WEIGHT,
)
from genrec.data.readers.files import collect, is_plain_text, read_columns, scan_file
from genrec.data.readers.raw_data import (
    PLAIN_INTEGER,
    RawData,
    check_option,
    checked,
    ids_alone,
    interaction_table,
    require_unique,
)
from genrec.data.readers.times import times
from genrec.data.readers.values import (
    ID_TYPES,
    categories,
    native_ids,
    numbers,
    prices,
    texts,
    weights,
)


@dataclass(frozen=True)
class TableMapping:
    """Which column is what; the arguments of `read_table` explain each. None: there is none."""

    user_column: str = USER_ID
    item_column: str = ITEM_ID
    time_column: str | None = None
    rating_column: str | None = None
    event_column: str | None = None
    weight_column: str | None = None
    summary_column: str | None = None
    review_column: str | None = None
    query_column: str | None = None
    items_item_column: str | None = None
    title_column: str | None = TITLE
    brand_column: str | None = None
    category_column: str | None = None
    category_separator: str | None = None
    price_column: str | None = None
    description_column: str | None = None
    users_user_column: str | None = None
    id_type: str = "auto"

    def __post_init__(self) -> None:
        """Check the one setting that isn't a column."""
        check_option("id_type", self.id_type, ID_TYPES)

    def of_interactions(self) -> dict[str, str | None]:
        """Settings of the interactions' columns and what they name."""
        names = "user item time rating event weight summary review query".split()
        return {f"{name}_column": getattr(self, f"{name}_column") for name in names}

    def of_items(self) -> dict[str, str | None]:
        """Settings of the catalogue's columns and what they name."""
        names = "title brand category price description".split()
        return {
            "items_item_column": self.items_item_column or self.item_column,
            **{f"{name}_column": getattr(self, f"{name}_column") for name in names},
        }


def read_table(
    interactions_path: Path | str,
    items_path: Path | str | None = None,
    users_path: Path | str | None = None,
    *,
    user_column: str = USER_ID,
    item_column: str = ITEM_ID,
    time_column: str | None = None,
    rating_column: str | None = None,
    event_column: str | None = None,
    weight_column: str | None = None,
    summary_column: str | None = None,
    review_column: str | None = None,
    query_column: str | None = None,
    items_item_column: str | None = None,
    title_column: str | None = TITLE,
    brand_column: str | None = None,
    category_column: str | None = None,
    category_separator: str | None = None,
    price_column: str | None = None,
    description_column: str | None = None,
    users_user_column: str | None = None,
    id_type: str = "auto",
    unknown_items: str = "raise",
    encoding: str = "utf-8",
) -> RawData:
    """Read CSV, TSV, JSON Lines (also gzipped) or Parquet tables, by file ending.

    A folder stands for all .parquet files below it, in order of name. Only the columns that are
    named are read, so that a wide log needs no more memory than a narrow one.

    Args:
        interactions_path: one interaction a row.
        items_path: the catalogue; None makes one of the item ids alone.
        users_path: user attributes, all of whose columns are kept; None for none.
        user_column: user id in the interactions.
        item_column: item id in the interactions.
        time_column: ISO-8601 text (UTC unless it says otherwise), dates, or numbers in s, ms, us or
            ns (told apart by magnitude, and logged); None if the file is ordered but has no times.
        rating_column: a number; None for implicit feedback.
        event_column: kind of the interaction: view, cart, purchase, ...
        weight_column: weight of the interaction, a number of 0 or more.
        summary_column: headline of the review.
        review_column: body of the review.
        query_column: the search that led to the interaction.
        items_item_column: item id in the catalogue; None if named as in the interactions.
        title_column: item title.
        brand_column: item brand.
        category_column: category path, general to specific: a list, or text with a separator.
        category_separator: separator of such text; None finds ">" or "|", and logs it.
        price_column: a number, or text like "$1,299.00".
        description_column: item description.
        users_user_column: user id in the users file; None if named as in the interactions.
        id_type: "integer" or "string" makes both tables' item ids that ("string" the user ids,
            too); "auto" keeps what they are.
        unknown_items: "raise", or "drop" interactions with items that the catalogue lacks.
        encoding: of the text files.

    Raises:
        ValueError: an empty or unreadable file, bytes that aren't `encoding`, a missing column,
            null ids, ids of two types, an item twice in the catalogue, an unknown item, or a time,
            rating, weight or price that can't be read. The message names the value, its row and
            the fix.
    """
    mapping = TableMapping(
        user_column=user_column,
        item_column=item_column,
        time_column=time_column,
        rating_column=rating_column,
        event_column=event_column,
        weight_column=weight_column,
        summary_column=summary_column,
        review_column=review_column,
        query_column=query_column,
        items_item_column=items_item_column,
        title_column=title_column,
        brand_column=brand_column,
        category_column=category_column,
        category_separator=category_separator,
        price_column=price_column,
        description_column=description_column,
        users_user_column=users_user_column,
        id_type=id_type,
    )
    source = Path(interactions_path)
    wanted = mapping.of_interactions()
    log = interactions_of(
        read_columns(scan_file(source, encoding), source, wanted), source, mapping
    )
    if items_path is None:
        catalog = ids_alone(log[ITEM_ID])
    else:
        scanned = scan_file(items_path, encoding)
        items = read_columns(scanned, items_path, mapping.of_items())
        catalog = catalog_of(items, items_path, mapping)
    users = None
    if users_path is not None:
        people = collect(scan_file(users_path, encoding), users_path)
        users = users_of(people, users_path, mapping, log[USER_ID].dtype)
    return checked(log, catalog, users, unknown_items, source, items_path or source)


def interactions_of(table: pl.DataFrame, path: Path | str, mapping: TableMapping) -> pl.DataFrame:
    """The interactions in raw form, from a table as it was read."""
    text, id_type = is_plain_text(path), mapping.id_type
    user_type = "string" if id_type == "string" else "auto"
    extra: list[pl.Series] = []
    if mapping.event_column:
        extra.append(texts(table[mapping.event_column], EVENT))
    if mapping.weight_column:
        extra.append(weights(table[mapping.weight_column], path, WEIGHT).alias(WEIGHT))
    for column, name in (
        (mapping.summary_column, SUMMARY),
        (mapping.review_column, REVIEW),
        (mapping.query_column, QUERY),
    ):
        if column:
            extra.append(texts(table[column], name))
    return interaction_table(
        native_ids(table[mapping.user_column], path, user_type, text),
        native_ids(table[mapping.item_column], path, id_type, text),
        times(table[mapping.time_column], path) if mapping.time_column else (),
        numbers(table[mapping.rating_column], path, RATING) if mapping.rating_column else None,
        extra,
    )


def catalog_of(items: pl.DataFrame, path: Path | str, mapping: TableMapping) -> pl.DataFrame:
    """The catalogue in raw form, from a table as it was read."""
    names: Mapping[str, str | None] = mapping.of_items()
    ids = items[str(names["items_item_column"])]
    columns = [native_ids(ids, path, mapping.id_type, is_plain_text(path)).alias(ITEM_ID)]
    for name, column in ((TITLE, mapping.title_column), (BRAND, mapping.brand_column)):
        if column is not None:
            columns.append(items[column].cast(pl.String).alias(name))
    if mapping.category_column is not None:
        paths = items[mapping.category_column]
        columns.append(categories(paths, path, mapping.category_separator))
    if mapping.price_column is not None:
        columns.append(prices(items[mapping.price_column], path))
    if mapping.description_column is not None:
        columns.append(items[mapping.description_column].cast(pl.String).alias(DESCRIPTION))
    return pl.DataFrame(columns)


def users_of(
    table: pl.DataFrame, path: Path | str, mapping: TableMapping, kind: pl.DataType
) -> pl.DataFrame:
    """User attributes with ids of the interactions' type; text that is all numbers becomes them."""
    name = mapping.users_user_column or mapping.user_column
    if name not in table.columns:
        raise ValueError(
            f"{path} has no column {name!r} (users_user_column); it has {', '.join(table.columns)}"
        )
    ids = native_ids(
        table[name], path, "string" if kind == pl.String else "auto", is_plain_text(path)
    )
    if ids.dtype != kind:
        raise ValueError(
            f"{path}: {name!r} holds strings (for example {ids[0]!r}), the interactions "
            "hold integer user ids; set id_type: string"
        )
    require_unique(ids, f"{path}: user ids", "keep one row per user")
    return pl.DataFrame(
        [ids.alias(USER_ID), *(attribute(column) for column in table.drop(name).get_columns())]
    )


def attribute(column: pl.Series) -> pl.Series:
    """A text column as Int64 or Float64 if all of it is numbers, else as it is.

    Numbers are written without leading zeros: those of postcodes, telephones and cards are names.
    """
    if column.dtype != pl.String:
        return column
    known = column.drop_nulls()
    if known.str.contains(PLAIN_INTEGER).all():
        return column.cast(pl.Int64)
    decimal = known.str.contains(r"^-?(?:0|[1-9]\d{0,14})(?:\.\d+)?$")
    return column.cast(pl.Float64) if decimal.all() else column
