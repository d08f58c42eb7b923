"""Commitments hide and bind; erasing takes one user's bytes out of the file and no other's."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import pytest

from genrec.audit.payloads import STORE, Sealed, erase_payloads, read_payloads, write_payloads


def payload(word: str) -> dict[str, Sealed]:
    contents = {"identity": {"user_id": word}, "input": [word] * 50, "chains": None}
    return {part: Sealed.new(content) for part, content in contents.items()}


@pytest.fixture
def store(tmp_path):
    written = {n: payload(f"secret-of-{'ann' if n % 2 else 'bob'}-{n}") for n in range(6)}
    write_payloads(tmp_path, written.values())
    return tmp_path, written


def test_commitments_bind_and_hide():
    one, two = Sealed.new({"a": 1}), Sealed.new({"a": 1})
    assert one.commitment != two.commitment  # equal contents can't be told
    assert one.commitment == Sealed(one.salt, {"a": 1}).commitment
    assert replace(one, content={"a": 2}).commitment != one.commitment
    assert replace(one, salt=two.salt).commitment == two.commitment
    assert len(one.salt) == len(one.commitment) == 64


def test_what_is_written_is_read(store):
    folder, written = store
    assert read_payloads(folder) == written
    write_payloads(folder, [written[0]])  # a new log replaces the store
    assert read_payloads(folder) == {0: written[0]}


def test_erasing_leaves_no_byte_and_no_other_user_changes(store):
    folder, written = store
    before = (folder / STORE).read_bytes()
    assert b"secret-of-ann-3" in before and written[3]["input"].salt.encode() in before
    assert erase_payloads(folder, [1, 3, 5]) == 3
    after = b"".join(p.read_bytes() for p in folder.iterdir())
    assert b"secret-of-ann" not in after and written[3]["input"].salt.encode() not in after
    assert read_payloads(folder) == {n: p for n, p in written.items() if n % 2 == 0}
    assert erase_payloads(folder, [1, 3, 5]) == 0 == erase_payloads(folder, [99])


def test_missing_and_damaged_stores(store):
    folder, _ = store
    with sqlite3.connect(folder / STORE) as connection:
        connection.execute("UPDATE payload SET content = '{' WHERE record = 2")
    connection.close()
    with pytest.raises(ValueError, match="of record 2"):
        read_payloads(folder)
    (folder / STORE).write_bytes(b"nonsense" * 1000)
    with pytest.raises(ValueError, match="can't be read"):
        read_payloads(folder)
    (folder / STORE).unlink()
    with pytest.raises(ValueError, match="is missing"):
        erase_payloads(folder, [1])
    assert not (folder / STORE).exists()
