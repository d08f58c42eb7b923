"""Amazon's review datasets of 2014, 2018 and 2023, with or without their metadata."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import polars as pl

from genrec.columns import (
    BRAND,
    CATEGORIES,
    DESCRIPTION,
    ITEM_ID,
    PRICE,
    RATING,
    REVIEW,
    SUMMARY,
    TIMESTAMP,
    TITLE,
    USER_ID,
)
from genrec.data.readers.files import (
    collect,
    existing,
    is_plain_text,
    require_columns,
    scan_file,
)
from genrec.data.readers.json_records import JsonForm, json_chunks, json_form
from genrec.data.readers.raw_data import (
    UNKNOWN_ITEMS,
    RawData,
    check_option,
    checked,
    ids_alone,
    interaction_table,
)
from genrec.data.readers.times import log_span, milliseconds, refuse_times
from genrec.data.readers.values import described_catalog, native_ids, numbers, plain_texts

logger = logging.getLogger(__name__)

AMAZON_VERSIONS = ("auto", "2014", "2018", "2023")
_OLD = {
    USER_ID: "reviewerID", ITEM_ID: "asin", RATING: "overall", TIMESTAMP: "unixReviewTime",
    SUMMARY: "summary", REVIEW: "reviewText",
}  # fmt: skip
_NEW = {
    USER_ID: "user_id", ITEM_ID: "parent_asin", RATING: "rating", TIMESTAMP: "timestamp",
    SUMMARY: "title", REVIEW: "text",
}  # fmt: skip
_TEXTS = (SUMMARY, REVIEW)


def read_amazon(
    reviews: Path | str,
    metadata: Path | str | None = None,
    *,
    version: str = "auto",
    unknown_items: str = "raise",
    max_text_chars: int = 2000,
) -> RawData:
    """Read Amazon reviews (McAuley et al.) and, if given, the products' metadata.

    Reviews of 2014 and 2018 (reviewerID, asin, overall, summary, reviewText, unixReviewTime), of
    2023 (user_id, parent_asin, rating, title, text, timestamp in milliseconds) and 2023's plain CSV
    files (user_id, parent_asin, rating, timestamp; "0core" and its like); also gzipped. JSON may be
    one object a line, objects one after another, or one array; 2014's metadata lines are Python
    literals. The files are read in pieces, so that what is held is the result: per review some 70
    bytes and its text (`max_text_chars=0` leaves the texts out).

    In titles, descriptions, headlines and reviews, tags are stripped, entities unescaped and runs
    of blanks made one space. The catalogue is all of the metadata; a product that occurs twice in
    it (2018 has such) counts once, as first met. Prices that aren't one number are left empty. A
    product without categories gets its main category. Items are `parent_asin` in 2023, whose
    variants share their reviews.

    Args:
        reviews: the review file, .json, .jsonl or .csv, also with .gz.
        metadata: the metadata file; None makes a catalogue of the item ids alone.
        version: one of AMAZON_VERSIONS; "auto" goes by the fields.
        unknown_items: "raise", or "drop" reviews of items that the metadata lacks.
        max_text_chars: characters kept of a headline and of a review; 0 keeps neither.

    Raises:
        ValueError: a file that is neither form, fields of another version, a bad record (with its
            line), a review without user, item or time.
    """
    check_option("version", version, AMAZON_VERSIONS)
    check_option("unknown_items", unknown_items, UNKNOWN_ITEMS)
    if max_text_chars < 0:
        raise ValueError(f"max_text_chars={max_text_chars} must be at least 0")
    path = existing(reviews)
    if is_plain_text(path):
        if version not in ("auto", "2023"):
            raise ValueError(
                f"{path}: CSV files are those of version 2023, not {version}; for a table of "
                "ratings add a header line and use format: table"
            )
        log = _read_ratings(path)
    else:
        log = _read_reviews(path, version, max_text_chars)
    if metadata is None:
        return checked(log, ids_alone(log[ITEM_ID]), None, unknown_items, path, path)
    catalog = _read_metadata(existing(metadata))
    return checked(log, catalog, None, unknown_items, path, metadata)


def _read_ratings(path: Path) -> pl.DataFrame:
    scanned = scan_file(path)
    wanted = {name: _NEW[name] for name in (USER_ID, ITEM_ID, RATING, TIMESTAMP)}
    names = scanned.collect_schema().names()
    require_columns(names, path, {f"column of {n}": column for n, column in wanted.items()})
    table = collect(scanned, path, list(wanted.values()))
    return _log(_numbered(table, path, wanted, 1), path, milli=True)


def _read_reviews(path: Path, version: str, max_text_chars: int) -> pl.DataFrame:
    form = json_form(path)
    fields, milli = _review_fields(form, version, path)
    if max_text_chars == 0:
        fields = {name: field for name, field in fields.items() if name not in _TEXTS}
    return _log(pl.concat(_review_chunks(path, form, fields, max_text_chars)), path, milli)


def _review_fields(form: JsonForm, version: str, path: Path) -> tuple[dict[str, str], bool]:
    """Field names of a review file, and whether its times are milliseconds."""
    found = None
    for fields, names in ((_OLD, ("2014", "2018")), (_NEW, ("2023",))):
        if fields[USER_ID] in form.first and fields[ITEM_ID] in form.first:
            found = fields, names
    if found is None:
        raise ValueError(
            f"{path} holds no Amazon reviews: its first record has {', '.join(form.first)}; "
            f"reviews have {_OLD[USER_ID]} and {_OLD[ITEM_ID]} (2014, 2018) or {_NEW[USER_ID]} and "
            f"{_NEW[ITEM_ID]} (2023)"
        )
    if version != "auto" and version not in found[1]:
        raise ValueError(
            f"{path} has the fields of version {' or '.join(found[1])}, not {version}; "
            f"set version: {found[1][0]} or auto"
        )
    return dict(found[0]), found[0] is _NEW


def _review_chunks(
    path: Path, form: JsonForm, fields: dict[str, str], max_text_chars: int
) -> Iterator[pl.DataFrame]:
    first_row = 1
    for chunk in json_chunks(path, form, list(fields.values())):
        table = _numbered(chunk, path, fields, first_row)
        first_row += chunk.height
        yield table.with_columns(
            plain_texts(chunk[fields[name]], name, max_text_chars)
            for name in _TEXTS
            if name in fields
        )


def _numbered(
    chunk: pl.DataFrame, path: Path, fields: dict[str, str], first_row: int
) -> pl.DataFrame:
    """Ids as text, rating and time (Int64, in the file's unit) as numbers."""
    moment = chunk[fields[TIMESTAMP]]
    values = moment.cast(pl.Int64, strict=False)
    refuse_times(moment, values.is_null(), path, "correct it or remove the review", first_row)
    return pl.DataFrame(
        [
            native_ids(chunk[fields[USER_ID]], path, "string", first_row=first_row).alias(USER_ID),
            native_ids(chunk[fields[ITEM_ID]], path, "string", first_row=first_row).alias(ITEM_ID),
            values.alias(TIMESTAMP),
            numbers(chunk[fields[RATING]], path, RATING, first_row),
        ]
    )


def _log(table: pl.DataFrame, path: Path, milli: bool) -> pl.DataFrame:
    moments = milliseconds(table[TIMESTAMP]) if milli else [table[TIMESTAMP]]
    log_span(moments[0], path, TIMESTAMP, "ms" if milli else "s")
    texts = [table[name] for name in _TEXTS if name in table.columns]
    return interaction_table(table[USER_ID], table[ITEM_ID], moments, table[RATING], texts)


def _read_metadata(path: Path) -> pl.DataFrame:
    form = json_form(path)
    key = next((name for name in ("parent_asin", "asin") if name in form.first), None)
    if key is None:
        raise ValueError(
            f"{path} holds no Amazon metadata: its first record has {', '.join(form.first)}, "
            "neither asin nor parent_asin"
        )
    # The same thing under the names of the three versions; the first that is filled in counts.
    fields = {
        TITLE: ("title",),
        BRAND: ("brand", "store"),
        CATEGORIES: ("categories", "category"),
        "main": ("main_category", "main_cat"),
        PRICE: ("price",),
        DESCRIPTION: ("description",),
    }
    wanted = [key, *(field for names in fields.values() for field in names)]
    pieces, first_row = [], 1
    for chunk in json_chunks(path, form, wanted):
        ids = native_ids(chunk[key], path, "string", first_row=first_row).alias(ITEM_ID)
        first_row += chunk.height
        filled = {name: [_filled(field) for field in names] for name, names in fields.items()}
        pieces.append(
            chunk.select(ids, *(pl.coalesce(some).alias(name) for name, some in filled.items()))
        )
    records = pl.concat(pieces)
    table = records.unique(ITEM_ID, keep="first", maintain_order=True)
    if records.height > table.height:
        logger.warning(
            "%s: %d of %d records repeat an item; the first counts",
            path, records.height - table.height, records.height,
        )  # fmt: skip
    return _described(table, path)


def _filled(field: str) -> pl.Expr:
    return pl.when(~pl.col(field).is_in(["", "[]", '[""]', "[[]]"])).then(pl.col(field))


def _described(table: pl.DataFrame, path: Path) -> pl.DataFrame:
    names = {name: name for name in (TITLE, BRAND, CATEGORIES, PRICE, DESCRIPTION)}
    catalog = described_catalog(table, path, names)
    main = plain_texts(table["main"], "main")
    return catalog.with_columns(
        pl.coalesce(CATEGORIES, pl.when(main.is_not_null()).then(pl.concat_list(main))).alias(
            CATEGORIES
        )
    )
