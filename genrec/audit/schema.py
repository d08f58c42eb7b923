"""The record's JSON Schema, ``record.schema.json``, and who checks against it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from genrec.audit.custody import SCHEMA

SCHEMA_FILE = Path(__file__).with_name("record.schema.json")


@cache
def _validator() -> Draft202012Validator:
    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def problem(record: Mapping[str, Any]) -> str | None:
    """First thing that is wrong with a record, with its place; None: it fits the schema.

    A record of another version is named as such and looked at no further.
    """
    version = record.get("schema")
    if version != SCHEMA or isinstance(version, bool):
        said = "no schema version" if version is None else f"schema version {version!r}"
        return f"it has {said}, this genrec reads {SCHEMA}: check it with the version that wrote it"
    error = next(_validator().iter_errors(record), None)
    if error is None:
        return None
    return f"it doesn't fit the schema at {error.json_path}: {error.message[:200]}"


def check(record: Mapping[str, Any]) -> None:
    """Refuse a record that doesn't fit, before it is written.

    Raises:
        ValueError: with the record's number and the place in it.
    """
    if wrong := problem(record):
        raise ValueError(f"record {record.get('record')}: {wrong}; nothing was written")
