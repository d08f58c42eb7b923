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
from pathlib import Path
from typing import Any

from genrec.audit.canonical import canonical

STORE = "payloads.sqlite"
PARTS = ("identity", "input", "chains")  # committed to one by one, so that one can be shown alone
_TABLE = """
CREATE TABLE payload (
    record INTEGER NOT NULL, part TEXT NOT NULL,
    salt TEXT NOT NULL, content TEXT NOT NULL, PRIMARY KEY (record, part)
)
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


def write_payloads(folder: Path | str, payloads: Iterable[Payload]) -> None:
    """Write the store of a new log; one that is there is replaced.

    Args:
        folder: of the log.
        payloads: of the records 0, 1, …
    """
    path = Path(folder) / STORE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with _connect(path, make=True) as connection:
        connection.execute(_TABLE)
        connection.executemany(
            "INSERT INTO payload VALUES (?, ?, ?, ?)",
            (
                (number, part, sealed.salt, canonical(sealed.content).decode("ascii"))
                for number, payload in enumerate(payloads)
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


def erase_payloads(folder: Path | str, records: Iterable[int]) -> int:
    """Delete the payloads of records; returns how many there were."""
    path = Path(folder) / STORE
    numbers = [(number,) for number in records]
    with _connect(path) as connection:
        query = "SELECT COUNT(*) FROM payload WHERE record = ? AND part = 'identity'"
        found = sum(connection.execute(query, number).fetchone()[0] for number in numbers)
        connection.executemany("DELETE FROM payload WHERE record = ?", numbers)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("VACUUM")  # free pages leave the file
    return found
