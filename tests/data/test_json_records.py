"""JSON records in pieces: every form gives the same rows; faults name their line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data.readers.json_records import LINES, LITERALS, OBJECTS, json_chunks, json_form

RECORDS = [
    {"id": "a", "n": 5.0, "tags": ["x", 'q"'], "more": {"k": [1]}},
    {"id": "b\n]} {", "n": "5", "tags": None},
    {"n": 1441324800000, "id": "é😀", "tags": "text"},
]
EXPECTED = [
    ("a", "5", '["x", "q\\""]'), ("b\n]} {", "5", None), ("é😀", "1441324800000", "text"),
]  # fmt: skip
FIELDS = ("id", "n", "tags")


def read(path: Path, chunk_bytes: int = 1 << 20) -> list[tuple]:
    form = json_form(path)
    frames = list(json_chunks(path, form, FIELDS, chunk_bytes))
    return pl.concat(frames).rows()


def forms() -> dict[str, tuple[str, str]]:
    one_a_line = [json.dumps(r) for r in RECORDS]
    return {
        "lines": ("\n".join(one_a_line), LINES),
        "blank lines": ("\n\n" + "\r\n\n".join(one_a_line) + "\n", LINES),
        "literals": ("\n".join(repr(r) for r in RECORDS) + "\n", LITERALS),
        "pretty": ("\n".join(json.dumps(r, indent=2) for r in RECORDS) + "\n", OBJECTS),
        "together": ("".join(one_a_line), OBJECTS),
        "array": (json.dumps(RECORDS), OBJECTS),
        "pretty array": (json.dumps(RECORDS, indent=1), OBJECTS),
    }


@pytest.mark.parametrize("name", forms())
@pytest.mark.parametrize("how", ["plain", "mark", "gz"])
def test_every_form_gives_the_same_rows(tmp_path, name, how):
    text, kind = forms()[name]
    path = tmp_path / ("r.json.gz" if how == "gz" else "r.json")
    data = (b"\xef\xbb\xbf" if how == "mark" else b"") + text.encode()
    path.write_bytes(gzip.compress(data) if how == "gz" else data)
    assert json_form(path).kind == kind
    assert json_form(path).first["id"] == "a"
    assert read(path) == EXPECTED


@given(st.lists(st.text(max_size=30), min_size=1, max_size=20), st.integers(1, 64))
@settings(max_examples=40, deadline=None)
def test_pieces_of_any_size_lose_nothing(tmp_path_factory, values, chunk_bytes):
    values = [v.encode("utf-8", "ignore").decode() for v in values]
    path = tmp_path_factory.mktemp("r") / "r.jsonl"
    path.write_text("\n".join(json.dumps({"id": v}) for v in values))
    assert [row[0] for row in read(path, chunk_bytes)] == values


def test_a_long_object_across_blocks(tmp_path):
    path = tmp_path / "r.json"
    long = {"id": "x" * 500_000, "n": 1}
    path.write_text(json.dumps([long, {"id": "é" * 100_000}, long], indent=1, ensure_ascii=False))
    assert [len(row[0]) for row in read(path)] == [500_000, 100_000, 500_000]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a"}\n\n{"id": \n', r"r.json: line 3 is not a JSON object .*'{\"id\":'; correct"),
        ('{"id": "a"}\n[1]\n', r"line 2 is not a JSON object \(it is no object\)"),
        ('{"id": "a"}\n{"id": "x\x00y"}\n', r"line 2 is not a JSON object \(Invalid control"),
        ('{"id": "a"}\n{"id": 1}{"id": 2}\n', r"line 2 is not a JSON object \(Extra data"),
        ("{'id': 'a'}\n{'id': open('x')}\n", r"line 2 is neither a Python literal nor a JSON"),
        ("{'id': 'a'}\n{'id': 'x\n", r"line 2 is neither a Python literal"),
        ('{\n "id": "a"\n}\n{\n "id": bad\n}\n', r"record that begins on line 4 is not a JSON"),
        ('[{"id": "a"}, 7]', r"begins on line 1 is not a JSON object \(it is no object\): '7\]"),
        ('[{"id": "a"}, {"id": "b"', r"begins on line 1 is not a JSON object"),
        ("[]", "it has no records"),
        ("\n \n", "it has no records"),
        ("", "r.json is empty"),
        ("hello", "begins on line 1 is not a JSON object"),
    ],
)
def test_faults_name_their_line(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_bytes_that_are_not_utf_8(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"id": "a"}\n{"id": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        read(path)
    path.write_bytes(b'[{"id": "a"}, {"id": "\xff"}]')
    with pytest.raises(ValueError, match="r.jsonl is not utf-8 near offset 0"):
        read(path)


def test_a_gzip_file_cut_short(tmp_path):
    path = tmp_path / "r.jsonl.gz"
    data = gzip.compress("\n".join(json.dumps({"id": str(i)}) for i in range(999)).encode())
    path.write_bytes(data[:-40])
    with pytest.raises(ValueError, match=r"r.jsonl.gz is not a complete gzip file"):
        read(path)
    path.write_bytes(b"plain text")
    with pytest.raises(ValueError, match=r"r.jsonl.gz is not a complete gzip file"):
        read(path)
