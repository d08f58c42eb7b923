"""LC-Rec's form: sequences and items as two JSON files."""

from __future__ import annotations

import ast
import json
import logging
import re
from pathlib import Path
from typing import Any

import polars as pl

from genrec.columns import BRAND, CATEGORIES, DESCRIPTION, ITEM_ID, PRICE, TITLE, USER_ID
from genrec.data.readers.files import existing, text_of
from genrec.data.readers.raw_data import RawData, checked, interaction_table
from genrec.data.readers.values import described_catalog, native_ids, text_ids

logger = logging.getLogger(__name__)

_BETWEEN = re.compile(r"""['"], ['"]""")
_FIELDS = (TITLE, BRAND, CATEGORIES, PRICE, DESCRIPTION)


def read_lcrec(
    inter_json: Path | str, item_json: Path | str, unknown_items: str = "raise"
) -> RawData:
    """Read LC-Rec's (Zheng et al. 2024) files: ``{"user": [item, ...]}`` and ``{"item": {...}}``.

    Items have title, description, brand and categories; any may be missing or "". Categories are a
    list, or names joined by "," without a space, so that "Clothing, Shoes & Jewelry" stays one.
    There are no timestamps: the order is that of the lists.

    Args:
        inter_json: the sequences, oldest first.
        item_json: the items.
        unknown_items: "raise", or "drop" interactions with items that the catalogue lacks.

    Raises:
        ValueError: files that aren't such objects, a user without items, or any fault named in
            `read_table`.
    """
    inter = _json_object(inter_json)
    for user, items in inter.items():
        if not isinstance(items, list) or not items:
            raise ValueError(
                f"{inter_json}: user {user!r} has {str(items)[:60]!r}; give a list of item ids, or "
                "remove the user"
            )
    table = pl.DataFrame(
        {
            USER_ID: list(inter),
            ITEM_ID: [[_id_text(item) for item in items] for items in inter.values()],
        },
        schema={USER_ID: pl.String, ITEM_ID: pl.List(pl.String)},
    ).explode(ITEM_ID)
    items = native_ids(table[ITEM_ID], inter_json, text=True)
    log = interaction_table(text_ids(table[USER_ID]), items)
    catalog = items_of(item_json)
    if catalog[ITEM_ID].dtype != log[ITEM_ID].dtype:
        log = log.with_columns(pl.col(ITEM_ID).cast(pl.String))
        catalog = catalog.with_columns(pl.col(ITEM_ID).cast(pl.String))
    return checked(log, catalog, None, unknown_items, inter_json, item_json)


def items_of(path: Path | str) -> pl.DataFrame:
    """The catalogue of a JSON object ``{"item": {title, description, brand, categories}}``.

    Lists that were written as text ("['a', 'b']") are read as lists; leftovers of markup in titles
    count as missing.
    """
    items = _json_object(path)
    for item, fields in items.items():
        if not isinstance(fields, dict):
            raise ValueError(
                f"{path}: item {item!r} has {str(fields)[:60]!r}; give an object with title, "
                "description, brand and categories"
            )
    table = pl.DataFrame(
        {
            ITEM_ID: list(items),
            **{
                name: [_cell(fields.get(name), name) for fields in items.values()]
                for name in _FIELDS
            },
        },
        schema=dict.fromkeys((ITEM_ID, *_FIELDS), pl.String),
    )
    ids = native_ids(table[ITEM_ID], path, text=True)
    names = {name: name for name in _FIELDS if table[name].null_count() < table.height}
    return described_catalog(table.with_columns(ids), Path(path), names)


def _json_object(path: Path | str) -> dict[str, Any]:
    path = existing(path)
    try:
        value = json.loads(text_of(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy or export it again") from error
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{path} must be a JSON object with one entry per id; it is not")
    return value


def _id_text(item: Any) -> str | None:
    """An id as text; what is neither text nor an integer is null, which is refused later."""
    return str(item) if isinstance(item, str | int) and not isinstance(item, bool) else None


def _cell(value: Any, name: str) -> str | None:
    """A value as text or as a JSON list, the form that `described_catalog` takes."""
    if isinstance(value, str) and value.startswith(("['", '["')):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            # A quote within a part that nobody escaped: the parts are still told apart.
            value = _BETWEEN.split(value.strip("[]").strip("'\""))
    if name == CATEGORIES and isinstance(value, str) and value:
        value = _split_at_commas(value)
    if isinstance(value, list | tuple):
        return json.dumps(list(value)) if value else None
    return None if value is None or value == "" else str(value)


def _split_at_commas(text: str) -> list[str]:
    """Names joined by ","; a comma that a space follows belongs to a name."""
    return text.replace(", ", "\0").replace(",", "\1").replace("\0", ", ").split("\1")
