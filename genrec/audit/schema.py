"""The record's JSON Schema, ``record.schema.json``, and who checks against it.

The validator is compiled (jsonschema-rs): each record is checked before it is written, and that
must cost next to nothing beside the search that made its list.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema_rs

SCHEMA = 3  # of records and heads; 2 had records of explained lists alone, 1 no payloads apart
SCHEMA_FILE = Path(__file__).with_name("record.schema.json")


@cache
def _validator() -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))


@cache
def _validator_of_members() -> jsonschema_rs.Draft202012Validator:
    """The schema, which says nothing of members together, without asking for any of them."""
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return jsonschema_rs.Draft202012Validator({**schema, "required": []})


def _fit(members: Mapping[str, Any]) -> bool:
    """Whether some members of a record fit the schema."""
    try:
        return bool(_validator_of_members().is_valid(members))
    except (ValueError, RecursionError):
        return False


def problem(record: Mapping[str, Any]) -> str | None:
    """First thing that is wrong with a record, with its place; None: it fits the schema.

    A record of another version is named as such and looked at no further.
    """
    version = record.get("schema")
    if version != SCHEMA or isinstance(version, bool):
        said = "no schema version" if version is None else f"schema version {version!r}"
        return f"it has {said}, this genrec reads {SCHEMA}: check it with the version that wrote it"
    try:
        if _validator().is_valid(record):
            return None
        error = next(iter(_validator().iter_errors(record)))
    except (ValueError, RecursionError) as unfit:  # text that is no Unicode, too deep a nesting
        return f"it doesn't fit the schema: {unfit}"
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error.instance_path)
    return f"it doesn't fit the schema at ${place}: {error.message[:200]}"


def check(record: Mapping[str, Any], changed: Iterable[str] | None = None) -> None:
    """Refuse a record that doesn't fit, before it is written.

    Args:
        record: of the log.
        changed: where a record of the same members has passed: those whose values are others now.

    Raises:
        ValueError: with the record's number and the place in it.
    """
    if changed is not None and _fit({name: record[name] for name in changed}):
        return
    if wrong := problem(record):
        raise ValueError(f"record {record.get('record')}: {wrong}; no log was written")
