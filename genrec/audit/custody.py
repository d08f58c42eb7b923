"""Custody of the log: key, canonical bytes, hash chain and signed head.

Every record holds the hash of the one before it and its own, which shows edits, insertions, swaps
and deletions inside the log. It doesn't show a cut tail, nor a log that somebody recomputed from
the edit on; therefore ``head.json`` states the number of records and the last hash under an HMAC.
Whoever holds the key can still rewrite everything: keep the key, and a copy of the head (an
anchor), away from the run.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genrec.artifacts import write_json, write_text

logger = logging.getLogger(__name__)

SCHEMA = 1
LOG, HEAD = "audit.jsonl", "head.json"
DEFAULT_KEY = "audit.key"
GENESIS = "0" * 64  # "previous hash" of the first record
_HEX_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class AuditKey:
    """A 256-bit secret; what is signed and what is pseudonymised never share a derivation."""

    secret: bytes = field(repr=False)

    def _mac(self, purpose: str, data: bytes) -> str:
        return hmac.new(self.secret, purpose.encode() + b"\0" + data, hashlib.sha256).hexdigest()

    @property
    def key_id(self) -> str:
        """Name of the key that gives nothing of it away."""
        return self._mac("genrec audit key id", b"")[:16]

    def pseudonym(self, user_id: object) -> str:
        """HMAC-SHA256 of a user id: unlike a plain hash it can't be found by trying ids."""
        return self._mac("genrec audit pseudonym", str(user_id).encode())

    def sign(self, data: bytes) -> str:
        """HMAC-SHA256 signature of a head."""
        return self._mac("genrec audit head", data)

    @classmethod
    def load(cls, path: Path | str) -> AuditKey:
        """Read a key file (64 hexadecimal digits).

        Raises:
            ValueError: the file is absent or holds no key.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"there is no key at {path}; name the one that signed the log with --key_file"
            )
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        if not _HEX_KEY.fullmatch(text):
            raise ValueError(f"{path} holds no key: it must be 64 lower-case hexadecimal digits")
        if path.stat().st_mode & 0o077:
            logger.warning("%s can be read by others; run: chmod 600 %s", path, path)
        return cls(bytes.fromhex(text))

    @classmethod
    def create(cls, path: Path | str) -> AuditKey:
        """Make a key and write it, readable by its owner alone; an existing file stays."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        key = cls(secrets.token_bytes(32))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(key.secret.hex() + "\n")
        return key


def canonical(value: Mapping[str, Any]) -> bytes:
    """The one byte form of a JSON object: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def record_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record without its own hash."""
    content = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(canonical(content)).hexdigest()


def seal(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Number records from 0 and chain them; returns new records with both hashes."""
    sealed: list[dict[str, Any]] = []
    previous = GENESIS
    for number, record in enumerate(records):
        chained = {**record, "record": number, "previous_sha256": previous}
        previous = record_hash(chained)
        sealed.append({**chained, "sha256": previous})
    return sealed


def make_head(sealed: list[dict[str, Any]], key: AuditKey) -> dict[str, Any]:
    """Signed statement of how many records there are and what the last one's hash is."""
    content = {
        "schema": SCHEMA,
        "records": len(sealed),
        "last_sha256": sealed[-1]["sha256"] if sealed else GENESIS,
        "key_id": key.key_id,
    }
    return {**content, "signature": key.sign(canonical(content))}


def head_is_signed(head: Mapping[str, Any], key: AuditKey) -> bool:
    """Whether a head carries this key's signature."""
    content = {name: value for name, value in head.items() if name != "signature"}
    return hmac.compare_digest(
        str(head.get("signature")).encode(), key.sign(canonical(content)).encode()
    )


def write_log(folder: Path | str, sealed: list[dict[str, Any]], key: AuditKey) -> None:
    """Write ``audit.jsonl`` (canonical JSON lines), then ``head.json``."""
    lines = [canonical(record).decode("ascii") + "\n" for record in sealed]
    write_text(Path(folder) / LOG, "".join(lines))
    write_json(Path(folder) / HEAD, make_head(sealed, key))


def read_log(folder: Path | str) -> list[dict[str, Any]]:
    """Records of a log as they stand, unverified.

    Raises:
        ValueError: there is no log, or a line is no JSON object.
    """
    path = Path(folder) / LOG
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist; run: genrec audit --run_dir {Path(folder).parent}"
        )
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} is no JSON object")
        records.append(record)
    return records
