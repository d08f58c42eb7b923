"""Canonical JSON: `json` defines it, whoever writes it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from genrec.audit.canonical import canonical


def defined(value) -> bytes:
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


FLOATS = st.floats(allow_nan=False, allow_infinity=False) | st.builds(
    lambda digits, place: digits * 10.0**place,
    st.integers(-(10**17), 10**17),
    st.integers(-25, 10),
)
LEAVES = st.none() | st.booleans() | st.integers() | FLOATS | st.text()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12
)


@settings(deadline=None)
@given(VALUES)
@example({"b": 1, "a": "é\x7f\x1f\ud800", "\U0001f600": 1e16, "\uffff": 1e-5})
@example([1e15, 1e16, 1e17, 123456789012345678.0, 1e22, 1e100, -0.0, 5e-324, 1.7e308])
@example([0.0001, 0.00001234, 0.000123, 1e-4, 1e-5, 9.999e-5, -1e-5])
@example([2**63, -(2**63), 2**64, 2**100, True, None, "null", "e-1", '\\"/\b\f\n\r\t'])
def test_it_is_what_json_writes(value):
    assert canonical(value) == defined(value)


def test_floats_of_all_sizes():
    for place in range(-40, 40):
        for digits in (1.0, -1.5, 1.2345678901234567, 9.007199254740993):
            assert canonical([digits * 10.0**place]) == defined([digits * 10.0**place])


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_number_that_json_lacks(number):
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": [number]})


def test_nothing_else_is_turned_into_json():
    @dataclass
    class Point:
        x: int = 1

    for value in (Point(), {1, 2}, b"x", object()):
        with pytest.raises(TypeError):
            canonical([value])
    assert canonical({2: "a", 10: "b"}) == defined({2: "a", 10: "b"})  # keys become text alike
