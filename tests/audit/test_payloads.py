"""Commitments hide and bind; erasing takes one user's bytes out of the file and no other's."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import pytest

from genrec.audit.payloads import STORE, Sealed, StoreError, erase_payloads, new_store, open_store


def payload(word: str) -> dict[str, Sealed]:
    contents = {"identity": {"user_id": word}, "input": [word] * 50, "chains": None}
    return {part: Sealed.new(content) for part, content in contents.items()}


def write(folder, payloads) -> None:
    with new_store(folder) as store:
        for number, one in payloads.items():
            store.add(number, one)


def read(folder) -> dict[int, dict[str, Sealed]]:
    with open_store(folder) as store:
        return {number: store.get(number) for number in list(store.records())}


@pytest.fixture
def store(tmp_path):
    written = {n: payload(f"secret-of-{'ann' if n % 2 else 'bob'}-{n}") for n in range(6)}
    del written[4]["chains"]  # of a list without explanation
    write(tmp_path, written)
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
    assert read(folder) == written
    with open_store(folder) as opened:
        assert [opened.get(n) for n in (6, -1, "1", 1 << 70, None)] == [None] * 5
    write(folder, {0: written[0]})  # a new log replaces the store
    assert read(folder) == {0: written[0]}


def test_erasing_leaves_no_byte_and_no_other_user_changes(store):
    folder, written = store
    before = (folder / STORE).read_bytes()
    assert b"secret-of-ann-3" in before and written[3]["input"].salt.encode() in before
    assert erase_payloads(folder, [1, 3, 5]) == 3
    after = b"".join(p.read_bytes() for p in folder.iterdir())
    assert b"secret-of-ann" not in after and written[3]["input"].salt.encode() not in after
    assert read(folder) == {n: p for n, p in written.items() if n % 2 == 0}
    assert erase_payloads(folder, [1, 3, 5]) == 0 == erase_payloads(folder, [99])


def test_missing_and_damaged_stores(store):
    folder, _ = store
    with sqlite3.connect(folder / STORE) as connection:
        connection.execute("UPDATE payload SET content = '{' WHERE record = 2")
    connection.close()
    with pytest.raises(StoreError, match="of record 2"):
        read(folder)
    (folder / STORE).write_bytes(b"nonsense" * 1000)
    with pytest.raises(ValueError, match="can't be read"):
        read(folder)
    (folder / STORE).unlink()
    with pytest.raises(ValueError, match="is missing"):
        erase_payloads(folder, [1])
    assert not (folder / STORE).exists()
