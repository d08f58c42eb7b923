"""What a record is about but must not hold: user id, history, prompt, texts; erasable per user.

A record holds commitments only, SHA-256 over 32 random bytes (the salt) and the canonical content.
Whoever has the salt can prove what the content was; without it a commitment can't be guessed, not
even of a history of one item. Erasing a user deletes contents and salts, and leaves every record,
hash and signature as it was.

The store is one SQLite file. ``secure_delete`` overwrites what is deleted, inside that file;
copies, backups and what the file system keeps of old blocks are beyond it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from genrec.audit.canonical import canonical
from genrec.columns import USER_ID

STORE = "payloads.sqlite"
PARTS = ("identity", "input", "chains")  # committed to one by one, so that one can be shown alone
_TABLE = """
CREATE TABLE payload (
    record INTEGER NOT NULL, part TEXT NOT NULL,
    salt TEXT NOT NULL, content TEXT NOT NULL, PRIMARY KEY (record, part)
) WITHOUT ROWID
"""


@dataclass(frozen=True)
class Sealed:
    """A part of a payload with the salt of its commitment."""

    salt: str  # 64 hexadecimal digits
    content: Any  # JSON value

    @classmethod
    def new(cls, content: Any) -> Sealed:
        """With a fresh salt."""
        return cls(secrets.token_hex(32), content)

    @cached_property
    def data(self) -> bytes:
        """Canonical form of the content: what is committed to, and what is stored."""
        return canonical(self.content)

    @property
    def commitment(self) -> str:
        """What the record holds: SHA-256 of salt and canonical content, 64 hexadecimal digits."""
        return hashlib.sha256(bytes.fromhex(self.salt) + self.data).hexdigest()


Payload = Mapping[str, Sealed]  # by part; a part that the record doesn't commit to is left out


class StoreError(ValueError):
    """A store is missing or damaged."""


class Store:
    """An open store.

    Args:
        path: of the file.
        connection: to it.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path, self._connection = path, connection

    def add(self, record: int, payload: Payload) -> None:
        """Store the payload of a record."""
        self._connection.executemany(
            "INSERT INTO payload VALUES (?, ?, ?, ?)",
            [
                (record, p, sealed.salt, sealed.data.decode("ascii"))
                for p, sealed in payload.items()
            ],
        )

    def get(self, record: object) -> dict[str, Sealed] | None:
        """Payload of a record; None if there is none.

        Raises:
            StoreError: a part of it is damaged, or not stored in the form that `add` gives it, in
                which a second value could hide.
        """
        if not isinstance(record, int) or not 0 <= record < 1 << 63:  # any JSON may ask
            return None
        query = "SELECT part, salt, content FROM payload WHERE record = ?"
        found = {}
        for part, salt, content in self._connection.execute(query, (record,)):
            try:
                sealed = Sealed(str(salt), json.loads(content))
                if (salt, content) != (bytes.fromhex(sealed.salt).hex(), sealed.data.decode()):
                    raise ValueError("it is not in canonical form")
            except (ValueError, TypeError, RecursionError) as error:
                raise StoreError(f"{self._path}: {part} of record {record}: {error}") from error
            found[str(part)] = sealed
        return found or None

    def strange_tables(self) -> list[str]:
        """What the file holds beside the table of payloads, or in its place."""
        query = "SELECT type, name, sql FROM sqlite_master ORDER BY name"
        return [
            f"{kind} {name}"
            for kind, name, sql in self._connection.execute(query)
            if (kind, name, str(sql).split()) != ("table", "payload", _TABLE.split())
        ]

    def records(self) -> Iterator[int]:
        """Numbers of the records that have a payload, in order."""
        query = "SELECT DISTINCT record FROM payload ORDER BY record"
        return (number for (number,) in self._connection.execute(query))

    def records_of(self, user_id: object) -> tuple[list[int], list[int]]:
        """Numbers of the records whose payload is a user's, and of those that don't say whose.

        No key is needed, other than to find a user in the log. Ids are compared as text.
        """
        query = (
            "SELECT record, MAX(CASE part WHEN 'identity' THEN content END) FROM payload "
            "GROUP BY record"
        )
        found, unknown = [], []
        for number, content in self._connection.execute(query):
            try:
                if str(json.loads(content)[USER_ID]) == str(user_id):
                    found.append(number)
            except (ValueError, TypeError, KeyError, RecursionError):
                unknown.append(number)
        return found, unknown


@contextmanager
def _connect(path: Path, make: bool = False) -> Iterator[sqlite3.Connection]:
    if not make and not path.is_file():
        raise StoreError(f"{path} is missing; restore it, or look at the log without payloads")
    try:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA secure_delete = ON")
            with connection:  # a transaction
                yield connection
    except sqlite3.DatabaseError as error:
        raise StoreError(f"{path} can't be read: {error}; restore it") from error


@contextmanager
def new_store(folder: Path | str) -> Iterator[Store]:
    """The store of a new log, to be filled in one transaction; one that is there is replaced."""
    path = Path(folder) / STORE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with _connect(path, make=True) as connection:
        connection.execute(_TABLE)
        yield Store(path, connection)


@contextmanager
def open_store(folder: Path | str) -> Iterator[Store]:
    """The store of a log, to be read.

    Raises:
        StoreError: there is no store, or it is damaged (also where that shows later).
    """
    path = Path(folder) / STORE
    with _connect(path) as connection:
        yield Store(path, connection)


def erase_payloads(folder: Path | str, records: Iterable[int]) -> int:
    """Delete the payloads of records; returns how many there were."""
    path = Path(folder) / STORE
    numbers = [(number,) for number in records]
    with _connect(path) as connection:
        query = "SELECT COUNT(*) FROM payload WHERE record = ? AND part = 'identity'"
        found = sum(connection.execute(query, number).fetchone()[0] for number in numbers)
        connection.executemany("DELETE FROM payload WHERE record = ?", numbers)
    try:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("VACUUM")  # free pages leave the file
    except sqlite3.DatabaseError as error:
        raise StoreError(
            f"{path}: the payloads are deleted, but it can't be made smaller: {error}"
        ) from error
    return found
