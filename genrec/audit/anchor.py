"""The anchor: an append-only list of signed statements, kept outside the run folder.

Two kinds stand in it: the head of every log that was written, and every erasure. Each entry holds
its number, the hash of the entry before it and a signature. A log that was put back to an older
state has a valid signature; that a newer head was signed since, only the anchor knows. Whoever can
cut the anchor's tail as well can hide that, so let nobody who writes runs write here, or copy it.

An entry also names the folder that its log was written into, by a hash: what was signed for one
folder are the states of one log, also where the log's id was lost with its head. Entries of earlier
versions name none. So once a run was moved and another is made in its place under the same anchor,
the one that was moved is taken for an older state, until its log is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrec.audit.canonical import canonical
from genrec.audit.keys import AuditKey, PublicKey

ANCHOR = "heads.jsonl"
HEAD_KIND, ERASURE_KIND = "head", "erasure"
_FIRST = "0" * 64  # "previous hash" of the first entry


def signed(content: Mapping[str, Any], key: AuditKey) -> dict[str, Any]:
    """`content` with the key's id and its signature over all of it."""
    named = {**content, "key_id": key.key_id}
    return {**named, "signature": key.sign(canonical(named))}


def is_signed(value: Mapping[str, Any], key: PublicKey) -> bool:
    """Whether `value` carries this key's signature."""
    content = {name: inner for name, inner in value.items() if name != "signature"}
    try:
        return key.verifies(value.get("signature"), canonical(content))
    except (ValueError, RecursionError):
        return False


def entry_hash(entry: Mapping[str, Any]) -> str:
    """SHA-256 of a whole entry, its signature too."""
    return hashlib.sha256(canonical(entry)).hexdigest()


@dataclass(frozen=True)
class Anchor:
    """What an anchor file says, and what is wrong with it (`problems`)."""

    entries: list[dict[str, Any]]
    problems: list[str]

    def latest_head(self, log_id: object) -> dict[str, Any] | None:
        """Newest head of a log."""
        heads = [e for e in self.entries if e["kind"] == HEAD_KIND and e["log_id"] == log_id]
        return max(heads, key=lambda entry: entry["content"]["counter"], default=None)

    def last_head_in(self, folder: object) -> dict[str, Any] | None:
        """Head that was signed last for a folder (see `folder_hash`); None: none that names it."""
        heads = [e for e in self.entries if e["kind"] == HEAD_KIND and e.get("folder") == folder]
        return heads[-1] if heads and folder is not None else None

    def erasures(self, log_id: object, folder: object) -> list[dict[str, Any]]:
        """Erasures in a log, whatever its state, and in others that were in its folder."""
        named = [entry for entry in self.entries if entry["kind"] == ERASURE_KIND]
        return [e for e in named if e["log_id"] == log_id or e.get("folder") == folder]

    def erased(self, log_id: object, counter: object) -> set[int]:
        """Numbers of the records of one state of a log whose payload was erased."""
        return {
            number
            for entry in self.entries
            if entry["kind"] == ERASURE_KIND and entry["log_id"] == log_id
            if entry["content"]["counter"] == counter
            for number in entry["content"]["records"]
        }


def folder_hash(folder: Path | str) -> str:
    """What entries name a log's folder by: SHA-256 of its absolute path."""
    named = ["genrec audit folder", str(Path(folder).resolve())]
    return hashlib.sha256(canonical(named)).hexdigest()


def append(
    path: Path | str,
    kind: str,
    log_id: str,
    time: str,
    content: Mapping[str, Any],
    key: AuditKey,
    folder: Path | str,
) -> dict[str, Any]:
    """Add a signed entry and return it.

    Args:
        path: of the anchor.
        kind: `HEAD_KIND` or `ERASURE_KIND`.
        log_id: of the log.
        time: UTC, ISO 8601.
        content: what is stated.
        key: signs.
        folder: of the log.

    Raises:
        ValueError: the file is damaged or was changed, so that nothing can be added to it.
    """
    path = Path(path)
    anchor = read_anchor(path, key.public) if path.exists() else Anchor([], [])
    if anchor.problems:
        raise ValueError(f"{path} can't be continued: {anchor.problems[0]}; restore it from a copy")
    before = anchor.entries
    entry = signed(
        {
            "kind": kind,
            "number": len(before),
            "time": time,
            "log_id": log_id,
            "folder": folder_hash(folder),
            "content": dict(content),
            "previous_sha256": entry_hash(before[-1]) if before else _FIRST,
        },
        key,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as stream:
        stream.write(canonical(entry) + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    return entry


def read_anchor(path: Path | str, key: PublicKey) -> Anchor:
    """Read and check an anchor: lines, numbers, chain and signatures.

    Entries from the first problem on are left out: what follows can't be trusted.
    """
    path = Path(path)
    if not path.is_file():
        return Anchor([], [f"{path} is missing"])
    *lines, rest = path.read_bytes().split(b"\n")
    entries: list[dict[str, Any]] = []
    previous = _FIRST
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            wrong = _problem(entry, number, previous, key)
        except (ValueError, RecursionError, TypeError, KeyError) as error:
            wrong = f"not an entry ({error!r})"
        if wrong:
            return Anchor(entries, [f"{path}, line {number + 1}: {wrong}"])
        entries.append(entry)
        previous = entry_hash(entry)
    problems = [f"{path}, line {len(lines) + 1}: cut off, it has no line end"] if rest else []
    return Anchor(entries, problems)


def _problem(entry: dict[str, Any], number: int, previous: str, key: PublicKey) -> str | None:
    if not isinstance(entry, dict):
        return "not a JSON object"
    if entry.get("key_id") != key.key_id:
        return f"signed by key {entry.get('key_id')!r}, this key is {key.key_id!r}"
    if not is_signed(entry, key):
        return "its signature is not valid: it was changed or forged"
    if entry["number"] != number or entry["previous_sha256"] != previous:
        return f"entry {entry['number']} doesn't follow the one before it"
    return None
