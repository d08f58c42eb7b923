"""What a record is about but must not hold: user id, history, prompt, texts; erasable per user.

A record holds commitments only, SHA-256 over 32 random bytes (the salt) and the canonical content.
Whoever has the salt can prove what the content was; without it a commitment can't be guessed, not
even of a history of one item. Erasing a user deletes contents and salts, and leaves every record,
hash and signature as it was.

The store is one SQLite file. ``secure_delete`` overwrites what is deleted, inside that file: copies,
backups and what the file system keeps of old blocks are beyond it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrec.audit.canonical import canonical

STORE = "payloads.sqlite"
PARTS = ("identity", "input", "chains")  # committed to one by one, so that one can be shown alone
_TABLE = """
CREATE TABLE payload (
    record INTEGER NOT NULL, part TEXT NOT NULL, pseudonym TEXT NOT NULL,
    salt TEXT NOT NULL, content TEXT NOT NULL, PRIMARY KEY (record, part)
);
CREATE INDEX of_user ON payload (pseudonym);
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

    @property
    def commitment(self) -> str:
        """What the record holds: SHA-256 of salt and canonical content, 64 hexadecimal digits."""
        return hashlib.sha256(bytes.fromhex(self.salt) + canonical(self.content)).hexdigest()


Payload = Mapping[str, Sealed]  # by part


@contextmanager
def _connect(path: Path, make: bool = False) -> Iterator[sqlite3.Connection]:
    if not make and not path.is_file():
        raise ValueError(f"{path} is missing; restore it, or look at the log without payloads")
    try:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA secure_delete = ON")
            with connection:  # a transaction
                yield connection
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} can't be read: {error}; restore it") from error


def write_payloads(folder: Path | str, payloads: Iterable[tuple[int, str, Payload]]) -> None:
    """Write the store of a new log; one that is there is replaced.

    Args:
        folder: of the log.
        payloads: (record number, pseudonym, payload).
    """
    path = Path(folder) / STORE
    path.unlink(missing_ok=True)
    with _connect(path, make=True) as connection:
        connection.executescript(_TABLE)
        connection.executemany(
            "INSERT INTO payload VALUES (?, ?, ?, ?, ?)",
            (
                (number, part, pseudonym, sealed.salt, canonical(sealed.content).decode("ascii"))
                for number, pseudonym, payload in payloads
                for part, sealed in payload.items()
            ),
        )


def read_payloads(folder: Path | str) -> dict[int, dict[str, Sealed]]:
    """All payloads by record number.

    Raises:
        ValueError: there is no store, or it is damaged.
    """
    found: dict[int, dict[str, Sealed]] = {}
    path = Path(folder) / STORE
    with _connect(path) as connection:
        rows = connection.execute("SELECT record, part, salt, content FROM payload")
        for number, part, salt, content in rows:
            try:
                sealed = Sealed(str(salt), json.loads(content))
                bytes.fromhex(sealed.salt)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: {part} of record {number}: {error}") from error
            found.setdefault(number, {})[str(part)] = sealed
    return found


def erase_payloads(folder: Path | str, pseudonym: str) -> list[int]:
    """Delete all payloads of a user; returns the numbers of the records that had one."""
    path = Path(folder) / STORE
    with _connect(path) as connection:
        query = "SELECT DISTINCT record FROM payload WHERE pseudonym = ? ORDER BY record"
        numbers = [row[0] for row in connection.execute(query, (pseudonym,))]
        connection.execute("DELETE FROM payload WHERE pseudonym = ?", (pseudonym,))
    if numbers:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("VACUUM")  # free pages leave the file
    return numbers
