"""The values of single columns: ids, numbers, prices, categories, text."""

from __future__ import annotations

import ast
import html
import json
import logging
from pathlib import Path
from typing import Any

import polars as pl

from genrec.columns import BRAND, CATEGORIES, DESCRIPTION, PRICE, TITLE
from genrec.data.readers.raw_data import PLAIN_INTEGER

logger = logging.getLogger(__name__)

ID_TYPES = ("auto", "integer", "string")
# HTML element names hold no underscore, so `<a_12>` is text and stays.
_TAG = r"(?s)</?[A-Za-z][A-Za-z0-9]*(?:\s[^<>]*)?/?>|<!--.*?-->"
_ENTITY = r"&#?[A-Za-z0-9]{2,31};?"
# Runs of blanks and control characters, and single ones other than a space (each space by itself
# would match too often to be fast).
_BLANK = r"[\s\x00-\x1f\x7f]{2,}|[^\S ]|[\x00-\x1f\x7f]"
# What crawlers of Amazon took for a title: a keywords tag, cut at its end (the title with brand and
# model, or just the department, which is no title), or a piece of script.
_TAG_END = r'"\s*/>$'
_SCRIPT = "getTime("


def text_ids(ids: pl.Series, id_type: str = "auto") -> pl.Series:
    """Text as Int64 if every id is a plain integer, unless `id_type` is "string"."""
    if id_type != "string" and bool(ids.drop_nulls().str.contains(PLAIN_INTEGER).all()):
        return ids.cast(pl.Int64)
    return ids


def native_ids(
    ids: pl.Series, path: Path | str, id_type: str = "auto", text: bool = False, first_row: int = 1
) -> pl.Series:
    """Ids as Int64 or String.

    Args:
        ids: the column.
        path: the file, for messages.
        id_type: one of ID_TYPES.
        text: the file's columns are all text, so that plain integers become integers.
        first_row: number of the column's first row, for messages.

    Raises:
        ValueError: null or empty ids, other types, ids that can't be had as `id_type`.
    """
    missing = ids.is_null()
    if ids.dtype in (pl.Categorical, pl.Enum):
        ids = ids.cast(pl.String)
    if ids.dtype == pl.String:
        missing |= ids == ""
    if missing.any():
        row = int(missing.arg_true()[0]) + first_row
        raise ValueError(
            f"{path} row {row}: {ids.name!r} is null ({missing.sum()} such rows); "
            "fill it in or remove the rows"
        )
    if ids.dtype.is_integer():
        if ids.cast(pl.Int64, strict=False).null_count():
            raise ValueError(f"{path}: {ids.name!r} holds ids beyond 63 bits; make them strings")
        ids = ids.cast(pl.Int64)
    elif ids.dtype != pl.String:
        raise ValueError(
            f"{path}: {ids.name!r} holds {ids.dtype}; ids are integers or strings, cast them"
        )
    elif text:
        ids = text_ids(ids, id_type)
    if id_type == "string":
        return ids.cast(pl.String)
    if id_type == "integer" and ids.dtype == pl.String:
        wrong = ids.filter(~ids.str.contains(PLAIN_INTEGER))
        if len(wrong):
            raise ValueError(
                f"{path}: {ids.name!r} holds {wrong[0]!r}, which is not a plain integer; "
                "set id_type: string"
            )
        return ids.cast(pl.Int64)
    return ids


def numbers(column: pl.Series, path: Path | str, name: str, first_row: int = 1) -> pl.Series:
    """A number column as Float64; text that is no finite number raises, null stays null."""
    if column.dtype == pl.String:
        column = column.str.strip_chars()
        column = column.set(column == "", None)
    values = column.cast(pl.Float64, strict=False)
    bad = column.is_not_null() & ~values.is_finite().fill_null(False)
    if bad.any():
        row = int(bad.arg_true()[0])
        raise ValueError(
            f"{path} row {row + first_row}: {column.name} {column[row]!r} is not a finite number; "
            "correct it or leave it empty"
        )
    return values.alias(name)


def weights(column: pl.Series, path: Path | str, name: str) -> pl.Series:
    """Numbers of 0 or more as Float64; null stays null."""
    values = numbers(column, path, name)
    if (values < 0).any():
        row = int((values < 0).arg_true()[0])
        raise ValueError(
            f"{path} row {row + 1}: {column.name} {values[row]} is below 0; correct it"
        )
    return values


def prices(column: pl.Series, path: Path | str) -> pl.Series:
    """Prices as Float64 from numbers or text like "$1,299.00"; what is no price raises."""
    if column.dtype == pl.String:
        text, cleaned = _price_text(column)
        bad = text.is_not_null() & cleaned.is_null()
        if bad.any():
            row = int(bad.arg_true()[0])
            raise ValueError(
                f"{path} row {row + 1}: {column.name} {column[row]!r} is not a price; "
                "write it as 12.99"
            )
        column = cleaned.alias(column.name)
    return weights(column, path, PRICE)


def prices_or_null(column: pl.Series, path: Path | str) -> pl.Series:
    """Prices of crawled pages: text that isn't one price is null, counted in a warning.

    So are "from 12.99" and "$5.99 - $9.99": the price isn't known. A blank or a dash is no price
    and isn't counted.
    """
    text, values = _price_text(column)
    values = values.set((values < 0) | ~values.is_finite(), None)
    empty = text.str.contains(r"^(?:[-–—]|None|null)$").fill_null(True)
    unread = text.filter(values.is_null() & ~empty)
    if len(unread):
        logger.warning(
            "%s: %d of %d prices aren't one number (for example %r); they are left empty",
            path, len(unread), len(column), unread[0][:60],
        )  # fmt: skip
    return values.alias(PRICE)


def _price_text(column: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Price text without currency and thousands' commas, and its value or null."""
    text = column.str.strip_chars().str.replace(r"^(?:[$€£¥]|USD|EUR|GBP)\s*", "")
    text = text.str.replace(r"\s*(?:[$€£¥]|USD|EUR|GBP)$", "")
    # Only commas that part thousands: "12,99" is left to fail rather than to become 1299.
    grouped = text.str.contains(r"^\d{1,3}(,\d{3})+(\.\d+)?$").fill_null(False)
    text = text.zip_with(~grouped, text.str.replace_all(",", ""))
    text = text.set(text == "", None)
    return text, text.cast(pl.Float64, strict=False)


def categories(column: pl.Series, path: Path | str, separator: str | None = None) -> pl.Series:
    """Category paths as lists of names, from lists, lists of lists (the first counts) or text."""
    cell, kind = pl.col(column.name), column.dtype
    if isinstance(kind, pl.List):
        cell = cell.list.first() if isinstance(kind.inner, pl.List) else cell
    elif kind == pl.String:
        written = _written_lists(column)
        plain = column.set(pl.Series([row is not None for row in written], dtype=pl.Boolean), None)
        separator = separator or _found_separator(plain, path)
        cell = cell.str.split(separator) if separator else pl.concat_list(cell)
        lists = pl.Series(written, dtype=pl.List(pl.String))
        cell = pl.when(lists.is_not_null()).then(lists).otherwise(cell)
    elif kind != pl.Null:
        raise ValueError(f"{path}: {column.name!r} holds {kind}; categories are text or lists")
    name = pl.element().str.strip_chars()
    named = name.filter(name.is_not_null() & (name != ""))
    paths = cell.cast(pl.List(pl.String)).list.eval(named).alias(CATEGORIES)
    return column.to_frame().select(paths).to_series()


def _written_lists(column: pl.Series) -> list[list[str] | None]:
    """Lists that were written as text, as pandas' `to_csv` does; None where a cell is none."""
    read: dict[str, list[str] | None] = {}
    for text in column.filter(column.str.contains(r"^\s*\[.*\]\s*$")).unique().to_list():
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue  # brackets of a name
        if value and all(isinstance(part, list) for part in value):
            value = value[0]
        if all(isinstance(part, str) for part in value):
            read[text] = value
    return [read.get(text) for text in column.to_list()] if read else [None] * len(column)


def _found_separator(column: pl.Series, path: Path | str) -> str | None:
    found = [s for s in (">", "|") if column.str.contains(s, literal=True).any()]
    how = f"split at {found[0]!r}" if found else "not split"
    logger.info("%s: %r %s; category_separator overrides it", path, column.name, how)
    return found[0] if found else None


def texts(column: pl.Series, name: str) -> pl.Series:
    """Text without space around it; blank text is null."""
    text = column.cast(pl.String).str.strip_chars()
    return text.set(text == "", None).alias(name)


def plain_texts(column: pl.Series, name: str, max_chars: int | None = None) -> pl.Series:
    """Text of web pages: no tags, entities unescaped, runs of blanks one space, blank text null.

    Args:
        column: the text.
        name: of the result.
        max_chars: characters that are kept; None keeps all.
    """
    text = column.cast(pl.String)
    marked = text.str.contains("<", literal=True).fill_null(False).arg_true()
    text = text.scatter(marked, text.gather(marked).str.replace_all(_TAG, " "))
    escaped = text.str.contains(_ENTITY).fill_null(False).arg_true()
    if len(escaped):  # few rows, and the standard library knows all 2,231 names
        plain = text.gather(escaped).map_elements(html.unescape, return_dtype=pl.String)
        text = text.scatter(escaped, plain.str.replace_all(_TAG, " "))
    text = text.str.replace_all(_BLANK, " ").str.strip_chars()
    if max_chars is not None:
        text = text.str.slice(0, max_chars).str.strip_chars_end()
    return text.set(text == "", None).alias(name)


def plain_titles(column: pl.Series, path: Path | str) -> pl.Series:
    """Titles as `plain_texts`; leftovers of markup are cut off.

    Where nothing but a department's name or a script is left the title counts as missing, with a
    warning.
    """
    titles = plain_texts(column, TITLE)
    cut = titles.str.contains(_TAG_END).fill_null(False)
    rest = titles.str.replace(_TAG_END, "")
    junk = (cut & ~rest.str.contains(",", literal=True)) | titles.str.contains(
        _SCRIPT, literal=True
    ).fill_null(False)
    if junk.any():
        logger.warning(
            "%s: %d of %d titles are leftovers of markup (for example %r); taken as missing",
            path, junk.sum(), len(titles), titles.filter(junk)[0][:60],
        )  # fmt: skip
    return rest.set(junk, None)


def json_lists(column: pl.Series) -> pl.Series:
    """Cells that are JSON lists of text, else text, as lists; of nested lists the first counts.

    '["a", "b"]' and '[["a", "b"], ["c"]]' become ["a", "b"], 'text' becomes ["text"], null stays.
    """
    kinds = column.drop_nulls()
    if not kinds.str.starts_with("[").any():
        cell = pl.col(column.name)
        wrapped = pl.when(cell.is_not_null()).then(pl.concat_list(cell)).alias(column.name)
        return column.to_frame().select(wrapped).to_series()
    for prefix, kind in (('[["', pl.List(pl.List(pl.String))), ('["', pl.List(pl.String))):
        if len(kinds) and bool((kinds.str.starts_with(prefix) | (kinds == "[]")).all()):
            try:
                lists = column.str.json_decode(kind)
                return lists.list.first() if prefix == '[["' else lists
            except pl.exceptions.PolarsError:
                break  # cells of several kinds: one at a time
    cells = [None if cell is None else _json_list(cell) for cell in column.to_list()]
    return pl.Series(column.name, cells, dtype=pl.List(pl.String))


def _json_list(cell: str) -> list[str]:
    if not cell.startswith("["):
        return [cell]
    try:
        value: Any = json.loads(cell)
    except (ValueError, RecursionError):
        return [cell]
    if value and isinstance(value[0], list):
        value = value[0]
    return [str(part) for part in value if part is not None]


def described_catalog(items: pl.DataFrame, path: Path | str, names: dict[str, str]) -> pl.DataFrame:
    """Catalogue columns of crawled pages, whose values are text or JSON lists of text.

    Args:
        items: text columns; `item_id` is taken as it is.
        path: the file, for messages.
        names: column name of each of title, brand, categories, price, description that there is.
    """
    columns = [items["item_id"]]
    if TITLE in names:
        columns.append(plain_titles(items[names[TITLE]], path))
    if BRAND in names:
        columns.append(plain_texts(items[names[BRAND]], BRAND))
    if CATEGORIES in names:
        lists = json_lists(items[names[CATEGORIES]])
        columns.append(_plain_paths(lists))
    if PRICE in names:
        columns.append(prices_or_null(items[names[PRICE]], path))
    if DESCRIPTION in names:
        joined = json_lists(items[names[DESCRIPTION]]).list.join(" ")
        columns.append(plain_texts(joined, DESCRIPTION))
    return pl.DataFrame(columns)


def _plain_paths(lists: pl.Series) -> pl.Series:
    """Lists of names as `plain_texts`; blank names go, and so do lists that have none."""
    row = pl.Series("row", range(len(lists)), dtype=pl.UInt32)
    filled = (lists.list.len() > 0).fill_null(False)
    kept = pl.DataFrame([row.filter(filled), lists.filter(filled).alias(CATEGORIES)])
    names = kept.explode(CATEGORIES)
    grouped = (
        names.with_columns(plain_texts(names[CATEGORIES], CATEGORIES))
        .filter(pl.col(CATEGORIES).is_not_null())
        .group_by("row", maintain_order=True)
        .agg(pl.col(CATEGORIES))
    )
    return row.to_frame().join(grouped, on="row", how="left", maintain_order="left")[CATEGORIES]
