"""The one byte form of JSON that is hashed, signed and committed to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import orjson

# Made once: `json.dumps` would make one for each value.
_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
)
_OPTIONS = orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_SUBCLASS
_OPTIONS |= orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME


def canonical(value: Any) -> bytes:
    """Sorted keys, no spaces, ASCII, no NaN, numbers as Python's `repr` writes them.

    `json` defines the form. orjson, ten times as fast, writes it wherever its output shows that
    the two write the same.

    Raises:
        ValueError: NaN, an infinity, or a circle.
        TypeError: no JSON value.
    """
    data = _written(value)
    if _lost(data, value) or _may_differ(data):
        return _ENCODER.encode(value).encode("ascii")
    return data


def canonical_each(values: Sequence[Any]) -> list[bytes]:
    """`canonical` of several values, looked over together, which is cheaper.

    Raises:
        ValueError: NaN, an infinity, or a circle.
        TypeError: no JSON value.
    """
    made = [_written(value) for value in values]
    lost = any(_lost(data, value) for data, value in zip(made, values, strict=True))
    if lost or _may_differ(b",".join(made)):
        return [canonical(value) for value in values]
    return made


def _written(value: Any) -> bytes:
    """What orjson writes; nothing where it can't."""
    try:
        return orjson.dumps(value, option=_OPTIONS)
    except orjson.JSONEncodeError:  # an integer beyond 64 bits, a lone surrogate, too deep
        return b""


def _lost(data: bytes, value: Any) -> bool:
    """Whether orjson didn't write it, or wrote null for NaN or an infinity."""
    return not data or (b"null" in data and orjson.loads(data) != value)


def _may_differ(data: bytes) -> bool:
    """Whether `json` might write it otherwise: texts, or numbers with an exponent or nearly.

    Escapes are the same in both; those of quotes and of themselves would hide where texts end. An
    exponent of `repr` has two digits and a sign, and it begins below 0.0001 and at 1e16.
    """
    if not data.isascii() or b"\x7f" in data or b'\\"' in data or b"\\\\" in data:
        return True
    outside = b"".join(data.split(b'"')[::2])  # of texts
    return (
        b"0.0000" in outside
        or b"e-" in outside
        or b"e1" in outside
        or b"e2" in outside
        or b"e3" in outside
    )
