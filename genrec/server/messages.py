"""Error messages: bounded, printable, and in the words of the request rather than of a library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SHOWN = 5  # values or problems in one message
_WIDTH = 80  # characters of a value

# What pydantic says about Python, said about JSON.
_WORDS = {
    "missing": "is missing",
    "model_attributes_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "list_type": "must be a list",
    "int_type": "must be an integer",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
}


def shorten(values: Sequence[Any], shown: int = _SHOWN) -> str:
    """A few values as text of bounded length, printable whatever they hold."""
    parts = [repr(value) for value in values[:shown]]
    return ", ".join(part if len(part) <= _WIDTH else part[: _WIDTH - 1] + "…" for part in parts)


def validation_message(errors: Sequence[Any]) -> str:
    """Problems that pydantic found, in one line."""
    parts = [_problem(error) for error in errors[:_SHOWN]]
    rest = len(errors) - len(parts)
    return "; ".join(parts) + (f"; and {rest} more" if rest else "")


def _problem(error: Any) -> str:
    if error["type"] == "json_invalid":
        why = error.get("ctx", {}).get("error", "")
        at = [part for part in error["loc"] if isinstance(part, int)]
        return f"the body is not valid JSON: {why}" + (f" (character {at[0]})" if at else "")
    place = _place(error["loc"]) or "the body"
    text = error["msg"].removeprefix("Value error, ")
    text = _WORDS.get(error["type"], text[0].lower() + text[1:])
    if error["type"] == "value_error":  # our own words; they have what is needed
        return f"{place}: {text}"
    value = error.get("input")
    if isinstance(value, bool | int | float | str):
        text += f", not {shorten([value])}"
    return f"{place} {text}" if error["type"] in _WORDS else f"{place}: {text}"


def _place(loc: Sequence[int | str]) -> str:
    """Where in a body: ``requests[3].history[0]``."""
    names = list(loc[1:] if loc[:1] == ("body",) else loc)
    if names[:1] in (["one"], ["many"]):  # which form the body has
        names = names[1:]
    place = ""
    for name in names:
        if isinstance(name, int):
            place += f"[{name}]"
        else:
            place += f".{name}" if place else name
    return place
