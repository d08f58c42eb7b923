"""Readers: from the files people have to one raw form, `RawData`.

Every reader checks what it read before anything is computed from it: no null ids, no item twice in
the catalogue, no interaction with an item that the catalogue lacks. Ids are kept as they are given:
an id column of a text file becomes integers only if every value is a plain integer ("7", not
"007").

Longer than other modules because each kind of column (ids, times, prices, categories) needs its own
reading and its own error message; the sections are: readers, files, columns, times, checks.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

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

logger = logging.getLogger(__name__)

SUBSECOND = (
    "subsecond"  # microseconds within the second, only where the source is finer than seconds
)
UNKNOWN_ITEMS = ("raise", "drop")
ID_TYPES = ("auto", "integer", "string")
_PLAIN_INTEGER = r"^(0|-?[1-9]\d{0,17})$"
_SHOWN = 5  # bad values that an error lists
_BLOCK = 1 << 20

_GENRES = (
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|"
    "Film-Noir|Horror|Musical|Mystery|Romance|Sci-Fi|Thriller|War|Western"
).split("|")


@dataclass(frozen=True)
class RawData:
    """Tables as read, not yet cleaned, ordered or numbered.

    Attributes:
        interactions: user_id, item_id, timestamp (Int64 seconds or null), rating (Float64 or null),
            in file order; `subsecond` too where the source is finer than seconds.
        catalog: item_id and any of title, brand, categories, price, description.
        users: user_id and attribute columns, or None.
    """

    interactions: pl.DataFrame
    catalog: pl.DataFrame
    users: pl.DataFrame | None


def read_sequences(
    sequences_path: Path | str, items_path: Path | str, unknown_items: str = "raise"
) -> RawData:
    """Read the S3-Rec form: ``user item item ...`` lines, oldest first, and JSON Lines items.

    Of `categories` (a list of paths) the first path is taken; the first of `attributes` is the
    brand, "Unknown" meaning none. There are no timestamps: the order is that of the line.

    Args:
        sequences_path: the sequences.
        items_path: item_id, title, categories, attributes; one JSON object a line.
        unknown_items: "raise", or "drop" interactions with items that the catalogue lacks.

    Raises:
        ValueError: a line without items, a user on two lines, or any fault named in `read_table`.
    """
    source = _text_source(_existing(sequences_path), "utf-8")
    text = source if isinstance(source, bytes) else source.read_bytes()
    parts = (
        pl.DataFrame({"line": text.decode("utf-8").splitlines()})
        .with_row_index("number", offset=1)
        .with_columns(pl.col("line").str.extract_all(r"\S+").alias("parts"))
        .filter(pl.col("parts").list.len() > 0)
    )
    short = parts.filter(pl.col("parts").list.len() < 2)
    if short.height:
        raise ValueError(
            f"{sequences_path} line {short['number'][0]}: {short['line'][0]!r} has a user but no "
            "items; write 'user item item ...' or remove the line"
        )
    table = parts.select(
        pl.col("parts").list.first().alias(USER_ID), pl.col("parts").list.slice(1).alias(ITEM_ID)
    )
    if table.height == 0:
        raise ValueError(f"{sequences_path} is empty: it has no user lines")
    _require_unique(table[USER_ID], f"{sequences_path}: user ids", "write one line per user")
    table = table.explode(ITEM_ID)
    log = pl.DataFrame(
        {USER_ID: _text_ids(table[USER_ID], "auto"), ITEM_ID: _text_ids(table[ITEM_ID], "auto")}
    ).with_columns(
        pl.lit(None, dtype=pl.Int64).alias(TIMESTAMP), pl.lit(None, dtype=pl.Float64).alias(RATING)
    )
    items = _read_any(Path(items_path), "utf-8")
    _require_columns(items, items_path, {c: c for c in (ITEM_ID, TITLE, CATEGORIES, "attributes")})
    brand = pl.col("attributes").list.first()
    catalog = items.select(
        _native_ids(items[ITEM_ID], items_path, "auto").alias(ITEM_ID),
        pl.col(TITLE),
        pl.when(brand != "Unknown").then(brand).alias(BRAND),
        _categories(items[CATEGORIES], items_path, None).alias(CATEGORIES),
    )
    return _checked(log, catalog, None, unknown_items, sequences_path, items_path)


def read_movielens_100k(folder: Path | str, min_rating: float | None = None) -> RawData:
    """Read MovieLens 100K: GroupLens' own files, or a UTF-8 copy with header lines.

    Args:
        folder: holds u.data, u.item and u.user.
        min_rating: keep ratings of at least this; None keeps all 100,000 as implicit feedback.

    Returns:
        Raw tables; genres (without "unknown") are the categories; users have age, gender and
        occupation.

    Raises:
        ValueError: a file is missing or its rows have another number of fields.
    """
    folder = Path(folder)
    data = _movielens_rows(folder / "u.data", "\t", 4)
    items = _movielens_rows(folder / "u.item", "|", 5 + len(_GENRES))
    people = _movielens_rows(folder / "u.user", "|", 5)
    log = data.select(
        pl.col("f0").cast(pl.Int64).alias(USER_ID),
        pl.col("f1").cast(pl.Int64).alias(ITEM_ID),
        pl.col("f3").cast(pl.Int64).alias(TIMESTAMP),
        pl.col("f2").cast(pl.Float64).alias(RATING),
    )
    if min_rating is not None:
        log = log.filter(pl.col(RATING) >= min_rating)
    genres = [
        pl.when(pl.col(f"f{5 + i}") == "1").then(pl.lit(name))
        for i, name in enumerate(_GENRES)
        if i > 0
    ]
    catalog = items.select(
        pl.col("f0").cast(pl.Int64).alias(ITEM_ID),
        pl.col("f1").str.strip_chars().alias(TITLE),
        pl.concat_list(genres).list.drop_nulls().alias(CATEGORIES),
    )
    users = people.select(
        pl.col("f0").cast(pl.Int64).alias(USER_ID),
        pl.col("f1").cast(pl.Int64).alias("age"),
        pl.col("f2").alias("gender"),
        pl.col("f3").alias("occupation"),
    )
    return _checked(log, catalog, users, "raise", folder / "u.data", folder / "u.item")


def read_table(
    interactions_path: Path | str,
    items_path: Path | str | None = None,
    users_path: Path | str | None = None,
    *,
    user_column: str = USER_ID,
    item_column: str = ITEM_ID,
    time_column: str | None = None,
    rating_column: str | None = None,
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
    """Read CSV, TSV, Parquet or JSON Lines tables (the text ones also gzipped), by file ending.

    Args:
        interactions_path: one interaction a row.
        items_path: the catalogue; None makes one of the item ids alone.
        users_path: user attributes, all of whose columns are kept; None for none.
        user_column: user id in the interactions.
        item_column: item id in the interactions.
        time_column: ISO-8601 text (UTC unless it says otherwise), dates, or numbers in s, ms, us or
            ns (told apart by magnitude, and logged); None if the file is ordered but has no times.
        rating_column: a number; None for implicit feedback.
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
            rating or price that can't be read. The message names the value, its row and the fix.
    """
    _check_option("id_type", id_type, ID_TYPES)
    source = Path(interactions_path)
    table = _read_any(source, encoding)
    wanted = {
        "user_column": user_column,
        "item_column": item_column,
        "time_column": time_column,
        "rating_column": rating_column,
    }
    _require_columns(table, source, wanted)
    columns = [
        _native_ids(table[user_column], source, id_type if id_type == "string" else "auto").alias(
            USER_ID
        ),
        _native_ids(table[item_column], source, id_type).alias(ITEM_ID),
        *(
            _times(table[time_column], source)
            if time_column
            else [_nulls(TIMESTAMP, pl.Int64, table)]
        ),
        _numbers(table[rating_column], source, RATING)
        if rating_column
        else _nulls(RATING, pl.Float64, table),
    ]
    log = pl.DataFrame(columns)
    if items_path is None:
        catalog = log.select(pl.col(ITEM_ID).drop_nulls().unique(maintain_order=True))
    else:
        items_path = Path(items_path)
        items = _read_any(items_path, encoding)
        attributes = {
            "items_item_column": items_item_column or item_column,
            "title_column": title_column,
            "brand_column": brand_column,
            "category_column": category_column,
            "price_column": price_column,
            "description_column": description_column,
        }
        _require_columns(items, items_path, attributes)
        catalog = _catalog(items, items_path, attributes, category_separator, id_type)
    users = None
    if users_path is not None:
        users = _users(
            Path(users_path), users_user_column or user_column, log[USER_ID].dtype, encoding
        )
    return _checked(log, catalog, users, unknown_items, source, items_path or source)


# Reading files -----------------------------------------------------------------------------------


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    return path


def _open_text(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _text_source(path: Path, encoding: str) -> Path | bytes:
    """The file itself if it is plain UTF-8 (Polars maps it), else its text as UTF-8 bytes."""
    try:
        codec = codecs.lookup(encoding)
    except LookupError as error:
        raise ValueError(
            f"encoding={encoding!r} is not known; try utf-8, latin-1 or cp1252"
        ) from error
    decoder, place = codec.incrementaldecoder(), 0
    keep = codec.name != "utf-8" or path.suffix == ".gz"
    text: list[str] = []
    try:
        with _open_text(path) as stream:
            while True:
                block = stream.read(_BLOCK)
                pending = len(decoder.getstate()[0])
                decoded = decoder.decode(block, final=not block)
                if keep:
                    text.append(decoded)
                if not block:
                    break
                place += len(block)
    except UnicodeDecodeError as error:
        where = place - pending + error.start
        raise ValueError(
            f"{path} is not {encoding}: byte 0x{error.object[error.start]:02x} at offset {where}; "
            "save it as UTF-8, or name its encoding, for example encoding: latin-1"
        ) from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}); copy it again") from error
    return "".join(text).encode() if keep else path


def _read_any(path: Path, encoding: str) -> pl.DataFrame:
    """Read a table by its file ending; text columns of CSV and TSV stay text."""
    _existing(path)
    endings = [s.lower() for s in path.suffixes]
    ending = endings[-2] if endings[-1:] == [".gz"] and len(endings) > 1 else "".join(endings[-1:])
    readers = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": "", ".parquet": ""}
    if ending not in readers or (ending == ".parquet" and endings[-1] == ".gz"):
        raise ValueError(
            f"{path} has an ending that is not known; use .csv, .tsv, .jsonl or .ndjson (also "
            "with .gz), or .parquet"
        )
    try:
        if ending == ".parquet":
            table = pl.read_parquet(path)
        elif source := _text_source(path, encoding):
            if readers[ending]:
                table = pl.read_csv(source, separator=readers[ending], infer_schema=False)
            else:
                table = pl.read_ndjson(source, infer_schema_length=None)
        else:
            table = pl.DataFrame()
    except pl.exceptions.NoDataError:
        table = pl.DataFrame()
    except pl.exceptions.PolarsError as error:
        reason = str(error).strip().splitlines()[0]
        if readers[ending]:
            reason += "; look for a stray quote or separator there"
        raise ValueError(f"{path} can't be read as {ending[1:]}: {reason}") from error
    if table.height == 0:
        raise ValueError(f"{path} is empty: it has no rows")
    return table


def _movielens_rows(path: Path, separator: str, n_fields: int) -> pl.DataFrame:
    """Rows of one MovieLens file as text columns f0, f1, ...; a header line is left out."""
    with _open_text(_existing(path)) as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # GroupLens' own files
    header = not text.split(separator, 1)[0].strip().isdigit()
    try:
        table = pl.read_csv(
            text.encode(),
            separator=separator,
            has_header=False,
            skip_rows=int(header),
            quote_char=None,
            infer_schema=False,
        )
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} can't be read: {str(error).splitlines()[0]}") from error
    if table.width != n_fields:
        raise ValueError(
            f"{path} has {table.width} fields a row, MovieLens 100K has {n_fields}; "
            "use the files of the ml-100k release"
        )
    return table.rename({name: f"f{i}" for i, name in enumerate(table.columns)})


# Columns -----------------------------------------------------------------------------------------


def _check_option(name: str, value: str, options: Iterable[str]) -> None:
    if value not in options:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(options)}")


def _require_columns(
    table: pl.DataFrame, path: Path | str, wanted: Mapping[str, str | None]
) -> None:
    for setting, name in wanted.items():
        if name is not None and name not in table.columns:
            close = difflib.get_close_matches(name, table.columns, 1, cutoff=0.4)
            hint = f"; did you mean {setting}: {close[0]}?" if close else f"; set {setting}"
            if len(table.columns) == 1 and (found := set(table.columns[0]) & set(";|\t")):
                hint = (
                    f"; the file looks separated by {found.pop()!r}: save it with commas, or with "
                    "tabs as .tsv"
                )
            raise ValueError(
                f"{path} has no column {name!r} ({setting}); it has "
                f"{', '.join(table.columns)}{hint}"
            )


def _require_unique(ids: pl.Series, what: str, fix: str) -> None:
    repeated = ids.filter(ids.is_duplicated()).unique(maintain_order=True)
    if len(repeated):
        raise ValueError(f"{what} must be unique, {_listed(repeated)} occur more than once; {fix}")


def _listed(values: pl.Series) -> str:
    shown = ", ".join(repr(v) for v in values.head(_SHOWN).to_list())
    return shown + (f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else "")


def _nulls(name: str, kind: pl.DataType | type[pl.DataType], like: pl.DataFrame) -> pl.Series:
    return pl.Series(name, [None], dtype=kind).new_from_index(0, like.height)


def _text_ids(ids: pl.Series, id_type: str) -> pl.Series:
    if id_type != "string" and bool(ids.drop_nulls().str.contains(_PLAIN_INTEGER).all()):
        return ids.cast(pl.Int64)
    return ids


def _native_ids(ids: pl.Series, path: Path | str, id_type: str) -> pl.Series:
    """Ids as Int64 or String; raises on null ids, on other types and if `id_type` can't be had."""
    if ids.null_count():
        row = int(ids.is_null().arg_true()[0]) + 1
        raise ValueError(
            f"{path} row {row}: {ids.name!r} is null ({ids.null_count()} such rows); "
            "fill it in or remove the rows"
        )
    if ids.dtype in (pl.Categorical, pl.Enum):
        ids = ids.cast(pl.String)
    text_file = str(path).removesuffix(".gz").endswith((".csv", ".tsv"))
    if ids.dtype.is_integer():
        ids = ids.cast(pl.Int64)
    elif ids.dtype != pl.String:
        raise ValueError(
            f"{path}: {ids.name!r} holds {ids.dtype}; ids are integers or strings, cast them"
        )
    elif text_file:
        ids = _text_ids(ids, id_type)
    if id_type == "string":
        return ids.cast(pl.String)
    if id_type == "integer" and ids.dtype == pl.String:
        wrong = ids.filter(~ids.str.contains(_PLAIN_INTEGER))
        if len(wrong):
            raise ValueError(
                f"{path}: {ids.name!r} holds {wrong[0]!r}, which is not a plain integer; "
                "set id_type: string"
            )
        return ids.cast(pl.Int64)
    return ids


def _numbers(column: pl.Series, path: Path | str, name: str) -> pl.Series:
    """A number column as Float64; text that is no finite number raises, null stays null."""
    if column.dtype == pl.String:
        column = column.str.strip_chars()
        column = column.set(column == "", None)
    values = column.cast(pl.Float64, strict=False)
    bad = column.is_not_null() & ~values.is_finite().fill_null(False)
    if bad.any():
        row = int(bad.arg_true()[0])
        raise ValueError(
            f"{path} row {row + 1}: {column.name} {column[row]!r} is not a finite number; "
            "correct it or leave it empty"
        )
    return values.alias(name)


def _prices(column: pl.Series, path: Path | str) -> pl.Series:
    if column.dtype == pl.String:
        text = column.str.strip_chars().str.replace(r"^(?:[$€£¥]|USD|EUR|GBP)\s*", "")
        text = text.str.replace(r"\s*(?:[$€£¥]|USD|EUR|GBP)$", "")
        # Only commas that part thousands: "12,99" is left to fail rather than to become 1299.
        grouped = text.str.contains(r"^\d{1,3}(,\d{3})+(\.\d+)?$").fill_null(False)
        text = text.zip_with(~grouped, text.str.replace_all(",", ""))
        text = text.zip_with((text != "").fill_null(True), pl.Series([None], dtype=pl.String))
        cleaned = text.cast(pl.Float64, strict=False)
        bad = text.is_not_null() & cleaned.is_null()
        if bad.any():
            row = int(bad.arg_true()[0])
            raise ValueError(
                f"{path} row {row + 1}: {column.name} {column[row]!r} is not a price; "
                "write it as 12.99"
            )
        column = cleaned.alias(column.name)
    values = _numbers(column, path, PRICE)
    if (values < 0).any():
        row = int((values < 0).arg_true()[0])
        raise ValueError(
            f"{path} row {row + 1}: {column.name} {values[row]} is below 0; correct it"
        )
    return values


def _categories(column: pl.Series, path: Path | str, separator: str | None) -> pl.Series:
    """Category paths as lists of names, from lists, lists of lists (the first counts) or text."""
    cell, kind = pl.col(column.name), column.dtype
    if isinstance(kind, pl.List):
        cell = cell.list.first() if isinstance(kind.inner, pl.List) else cell
    elif kind == pl.String:
        separator = separator or _found_separator(column, path)
        cell = cell.str.split(separator) if separator else pl.concat_list(cell)
    elif kind != pl.Null:
        raise ValueError(f"{path}: {column.name!r} holds {kind}; categories are text or lists")
    name = pl.element().str.strip_chars()
    named = name.filter(name.is_not_null() & (name != ""))
    paths = cell.cast(pl.List(pl.String)).list.eval(named).alias(CATEGORIES)
    return column.to_frame().select(paths).to_series()


def _found_separator(column: pl.Series, path: Path | str) -> str | None:
    found = [s for s in (">", "|") if column.str.contains(s, literal=True).any()]
    how = f"split at {found[0]!r}" if found else "not split"
    logger.info("%s: %r %s; category_separator overrides it", path, column.name, how)
    return found[0] if found else None


def _catalog(
    items: pl.DataFrame,
    path: Path,
    names: Mapping[str, str | None],
    separator: str | None,
    id_type: str,
) -> pl.DataFrame:
    columns = [_native_ids(items[str(names["items_item_column"])], path, id_type).alias(ITEM_ID)]
    for name, setting in ((TITLE, "title_column"), (BRAND, "brand_column")):
        if (column := names[setting]) is not None:
            columns.append(items[column].cast(pl.String).alias(name))
    if (column := names["category_column"]) is not None:
        columns.append(_categories(items[column], path, separator))
    if (column := names["price_column"]) is not None:
        columns.append(_prices(items[column], path))
    if (column := names["description_column"]) is not None:
        columns.append(items[column].cast(pl.String).alias(DESCRIPTION))
    return pl.DataFrame(columns)


def _users(path: Path, user_column: str, kind: pl.DataType, encoding: str) -> pl.DataFrame:
    table = _read_any(path, encoding)
    _require_columns(table, path, {"users_user_column": user_column})
    ids = _native_ids(table[user_column], path, "string" if kind == pl.String else "auto")
    if ids.dtype != kind:
        raise ValueError(
            f"{path}: {user_column!r} holds strings (for example {ids[0]!r}), the interactions "
            "hold integer user ids; set id_type: string"
        )
    _require_unique(ids, f"{path}: user ids", "keep one row per user")
    columns = [ids.alias(USER_ID)]
    for column in table.drop(user_column).get_columns():
        number = column.cast(pl.Float64, strict=False) if column.dtype == pl.String else None
        if number is None or number.null_count() > column.null_count():
            columns.append(column)
        else:
            whole = bool(column.drop_nulls().str.contains(_PLAIN_INTEGER).all())
            columns.append(column.cast(pl.Int64) if whole else number)
    return pl.DataFrame(columns)


# Times -------------------------------------------------------------------------------------------

_UNITS = (("s", 1e11, 1_000_000), ("ms", 1e14, 1_000), ("us", 1e17, 1), ("ns", float("inf"), 0))
_ISO = (
    r"^\s*(?P<date>\d{4}-\d{2}-\d{2})"
    r"(?:[T ](?P<hm>\d{2}:\d{2})(?::(?P<s>\d{2})(?:[.,](?P<f>\d+))?)?)?"
    r"\s*(?P<zone>Z|z|UTC|[+-]\d{2}:?\d{2})?\s*$"
)


def _times(column: pl.Series, path: Path | str) -> list[pl.Series]:
    """Times as seconds since the epoch, and the microseconds beyond them if there are any."""
    if column.dtype in (pl.Date, pl.Datetime):
        micros, how = column.cast(pl.Datetime("us")).cast(pl.Int64), "dates"
        _refuse_times(column, micros.is_null(), path)
    elif column.dtype.is_numeric():
        micros, how = _numeric_times(column, column, path)
    elif column.dtype == pl.String:
        whole = column.str.strip_chars().cast(pl.Int64, strict=False)
        real = column.str.strip_chars().cast(pl.Float64, strict=False)
        if 2 * real.null_count() <= len(column):
            micros, how = _numeric_times(real if whole.null_count() else whole, column, path)
        else:
            micros, how = _iso_times(column), "ISO-8601 text, UTC where no zone is given"
            _refuse_times(column, micros.is_null(), path)
    else:
        raise ValueError(
            f"{path}: {column.name!r} holds {column.dtype}; use numbers, dates or ISO-8601 text"
        )
    seconds = (micros // 1_000_000).alias(TIMESTAMP)
    fraction = (micros % 1_000_000).alias(SUBSECOND)
    span = pl.Series([seconds.min(), seconds.max()]).cast(pl.Int64) * 1_000_000
    first, last = span.cast(pl.Datetime("us")).to_list()
    logger.info("%s: %r read as %s: %s to %s", path, column.name, how, first, last)
    return [seconds, fraction] if (fraction != 0).any() else [seconds]


def _numeric_times(numbers: pl.Series, shown: pl.Series, path: Path | str) -> tuple[pl.Series, str]:
    real = numbers.cast(pl.Float64)
    usable = real.is_finite() & (real.abs() < 9e18)  # the rest doesn't fit 64 bits
    _refuse_times(shown, ~usable.fill_null(False), path)
    whole, size = numbers.cast(pl.Int64), real.abs()
    # YYYYMMDD would pass for seconds in 1970.
    month, day = whole // 100 % 100, whole % 100
    dates = whole.is_between(19_000_101, 21_001_231)
    if (dates & month.is_between(1, 12) & day.is_between(1, 31)).all():
        raise ValueError(
            f"{path}: {shown.name!r} looks like YYYYMMDD ({shown[0]!r}); write dates as YYYY-MM-DD"
        )
    top = int(size.arg_max() or 0)
    number = next(i for i, (_, limit, _) in enumerate(_UNITS) if size[top] < limit)
    unit, _, factor = _UNITS[number]
    # Far below the unit's range, but not 0: written in the unit before it.
    strays = (size > 0) & (size < (_UNITS[number - 1][1] / 10 if number else 0))
    if strays.any():
        row = int(strays.arg_true()[0])
        raise ValueError(
            f"{path}: {shown.name!r} mixes units: the largest is {shown[top]!r} ({unit}), row "
            f"{row + 1} holds {shown[row]!r}; write all of them in seconds"
        )
    if numbers.dtype.is_float() and factor:
        return (real * factor).round().cast(pl.Int64), unit
    return (whole * factor if factor else whole // 1_000), unit


def _iso_times(column: pl.Series) -> pl.Series:
    """Microseconds since the epoch of ISO-8601 text; null where it can't be read."""
    part = pl.col("text").str.extract_groups(_ISO).struct
    zone = part.field("zone").str.replace(r"^(?:Z|z|UTC)$", "+00:00").fill_null("+00:00")
    text = pl.format(
        "{}T{}:{}.{}{}",
        part.field("date"),
        part.field("hm").fill_null("00:00"),
        part.field("s").fill_null("00"),
        part.field("f").fill_null("0").str.slice(0, 6).str.pad_end(6, "0"),
        zone.str.replace(r"^([+-]\d{2})(\d{2})$", "${1}:${2}"),
    )
    parsed = text.str.to_datetime(
        "%Y-%m-%dT%H:%M:%S%.f%:z", time_unit="us", time_zone="UTC", strict=False
    )
    frame = pl.DataFrame({"text": column})
    return frame.select(parsed.cast(pl.Int64)).to_series()


def _refuse_times(column: pl.Series, bad: pl.Series, path: Path | str) -> None:
    if bad.any():
        row = int(bad.arg_true()[0])
        raise ValueError(
            f"{path} row {row + 1}: {column.name} {column[row]!r} is not a time "
            f"({int(bad.sum())} such rows); use ISO-8601 text like "
            "2024-01-31T12:00:00Z or numbers in s, ms or us"
        )


# Checks ------------------------------------------------------------------------------------------


def _checked(
    interactions: pl.DataFrame,
    catalog: pl.DataFrame,
    users: pl.DataFrame | None,
    unknown_items: str,
    interactions_path: Path | str,
    items_path: Path | str,
) -> RawData:
    """Raise if the tables don't fit together; drop unknown items if that was asked for."""
    _check_option("unknown_items", unknown_items, UNKNOWN_ITEMS)
    mine, theirs = interactions[ITEM_ID], catalog[ITEM_ID]
    if mine.dtype != theirs.dtype:
        kinds = {pl.Int64: "integers", pl.String: "strings"}
        odd = mine if mine.dtype == pl.String else theirs
        plain = odd.filter(~odd.str.contains(_PLAIN_INTEGER))
        raise ValueError(
            f"item ids are {kinds[type(mine.dtype)]} in {interactions_path} and "
            f"{kinds[type(theirs.dtype)]} in {items_path} "
            f"(for example {(plain if len(plain) else odd)[0]!r}); "
            "set id_type: string to compare them as text"
            + ("" if len(plain) else ", or id_type: integer to compare them as numbers")
        )
    _require_unique(theirs, f"{items_path}: item ids", "keep one row per item")
    unknown = mine.filter(~mine.is_in(theirs.implode()))
    if len(unknown):
        ids = unknown.unique(maintain_order=True)
        if unknown_items == "raise":
            raise ValueError(
                f"{len(unknown)} interactions of {interactions_path} have {len(ids)} items "
                f"that {items_path} lacks: {_listed(ids)}; add them to the "
                "catalogue, or set unknown_items: drop"
            )
        interactions = interactions.filter(pl.col(ITEM_ID).is_in(theirs.implode()))
        logger.warning("unknown_items: dropped %d interactions, %d items", len(unknown), len(ids))
        if interactions.height == 0:
            raise ValueError(
                f"no item of {interactions_path} is in {items_path} (first: {_listed(ids)}); "
                "check that both use the same ids"
            )
    return RawData(interactions=interactions, catalog=catalog, users=users)
