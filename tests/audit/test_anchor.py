"""The append-only list of heads: what it answers, and that no change of it goes unseen."""

from __future__ import annotations

import json

import pytest

from genrec.audit.anchor import append, folder_hash, is_signed, read_anchor, signed
from genrec.audit.canonical import canonical
from genrec.audit.keys import AuditKey

KEY, OTHER = AuditKey(b"a" * 32), AuditKey(b"b" * 32)
TIME = "2026-01-01T00:00:00+00:00"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "deep" / "heads.jsonl"
    for log, counter in (("one", 1), ("two", 1), ("one", 2)):
        append(path, "head", log, TIME, {"counter": counter}, KEY, tmp_path / log)
    for records in ([3, 5], [7]):
        content = {"counter": 2, "records": records}
        append(path, "erasure", "one", TIME, content, KEY, tmp_path / "one")
    return path


def test_signed_values():
    value = signed({"x": 1}, KEY)
    assert is_signed(value, KEY.public) and not is_signed(value, OTHER.public)
    assert not is_signed({**value, "x": 2}, KEY.public)
    assert not is_signed({**value, "more": 0}, KEY.public)
    assert not is_signed({**value, "signature": None}, KEY.public)
    assert not is_signed({**value, "x": float("nan")}, KEY.public)


def test_what_it_answers(path):
    anchor = read_anchor(path, KEY.public)
    assert anchor.problems == [] and [e["number"] for e in anchor.entries] == [0, 1, 2, 3, 4]
    head = anchor.latest_head("one")
    assert head is not None and head["content"]["counter"] == 2
    assert anchor.latest_head("three") is None
    assert anchor.last_head_in(folder_hash(path.parents[1] / "x" / ".." / "one")) == head
    assert anchor.last_head_in(folder_hash("three")) is None is anchor.last_head_in(None)
    assert anchor.erased("one", 2) == {3, 5, 7}
    assert anchor.erased("one", 1) == anchor.erased("two", 2) == set()


def test_every_change_is_found(path):
    lines = path.read_bytes().splitlines(keepends=True)
    edited = json.loads(lines[1])
    edited["content"]["counter"] = 9
    resigned = signed({k: v for k, v in edited.items() if k not in ("key_id", "signature")}, OTHER)
    cases = {
        "line 2: its signature": [lines[0], canonical(edited) + b"\n", *lines[2:]],
        "line 2: signed by key": [lines[0], canonical(resigned) + b"\n", *lines[2:]],
        "line 2: entry 2 doesn't follow": [lines[0], *lines[2:]],
        "line 1: entry 1 doesn't follow": [lines[1], lines[0], *lines[2:]],
        "line 2: not": [lines[0], b"[" * 9, b"\n"],
        "line 2: not a JSON object": [lines[0], b"7\n"],
        "line 5: cut off": [*lines[:-1], lines[-1][:-9]],
    }
    for text, changed in cases.items():
        path.write_bytes(b"".join(changed))
        anchor = read_anchor(path, KEY.public)
        assert len(anchor.problems) == 1 and text in anchor.problems[0]
        with pytest.raises(ValueError, match="can't be continued"):
            append(path, "head", "one", TIME, {"counter": 3}, KEY, "one")
        assert path.read_bytes() == b"".join(changed)
    path.unlink()
    assert "is missing" in read_anchor(path, KEY.public).problems[0]
