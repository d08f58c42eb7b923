"""S3-Rec's form: one line of item ids per user, and the items as JSON Lines."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from genrec.columns import BRAND, CATEGORIES, ITEM_ID, TITLE, USER_ID
from genrec.data.readers.files import existing, read_columns, scan_file, text_of
from genrec.data.readers.raw_data import RawData, checked, interaction_table, require_unique
from genrec.data.readers.values import categories, native_ids, text_ids


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
    parts = (
        pl.DataFrame({"line": text_of(existing(sequences_path)).splitlines()})
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
    require_unique(table[USER_ID], f"{sequences_path}: user ids", "write one line per user")
    table = table.explode(ITEM_ID)
    log = interaction_table(text_ids(table[USER_ID]), text_ids(table[ITEM_ID]))
    wanted = {name: name for name in (ITEM_ID, TITLE, CATEGORIES, "attributes")}
    items = read_columns(scan_file(items_path), items_path, wanted)
    brand = pl.col("attributes").list.first()
    catalog = items.select(
        native_ids(items[ITEM_ID], items_path).alias(ITEM_ID),
        pl.col(TITLE),
        pl.when(brand != "Unknown").then(brand).alias(BRAND),
        categories(items[CATEGORIES], items_path).alias(CATEGORIES),
    )
    return checked(log, catalog, None, unknown_items, sequences_path, items_path)
