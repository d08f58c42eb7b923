"""Custody of the log: shards, hash chains, one Merkle root, and the signed head over it.

Records lie in shards, ``audit-00000.jsonl`` and so on. Each record holds the hash of the one before
it in its shard and its own, which shows edits, insertions, swaps and deletions. The records of a
shard are the leaves of a Merkle tree, the shards those of another, and ``head.json`` states its
root under an Ed25519 signature, which shows a cut tail and a log that somebody recomputed. That the
whole folder was put back to an older signed state shows in the anchor (see `genrec.audit.anchor`).
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from genrec.artifacts import read_json, write_json, write_text
from genrec.audit import anchor, merkle
from genrec.audit.canonical import canonical
from genrec.audit.keys import AuditKey, PublicKey

SCHEMA = 2  # of records and heads; 1 had neither shards nor payloads of their own
HEAD = "head.json"
OLD_LOG = "audit.jsonl"  # of schema 1
SHARD_SIZE = 10_000


def shard_name(shard: int) -> str:
    """File of a shard."""
    return f"audit-{shard:05d}.jsonl"


def record_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record without its own hash."""
    content = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(canonical(content)).hexdigest()


def genesis(log_id: object, shard: int) -> str:
    """First link of a shard's chain: no shard fits another log or another place."""
    return hashlib.sha256(canonical(["genrec audit shard", log_id, shard])).hexdigest()


def seal(
    records: Iterable[Mapping[str, Any]], log_id: str, shard_size: int = SHARD_SIZE
) -> list[dict[str, Any]]:
    """Number records from 0, deal them out to shards in order, and chain each shard.

    Args:
        records: without number, ids and hashes.
        log_id: of the log.
        shard_size: records per shard.

    Returns:
        New records with `log_id`, `record_id`, `record`, `shard` and both hashes.
    """
    sealed: list[dict[str, Any]] = []
    previous = ""
    for number, record in enumerate(records):
        shard = number // shard_size
        chained = {
            **record,
            "log_id": log_id,
            "record_id": f"{log_id}-{number}",
            "record": number,
            "shard": shard,
            "previous_sha256": genesis(log_id, shard) if number % shard_size == 0 else previous,
        }
        previous = record_hash(chained)
        sealed.append({**chained, "sha256": previous})
    return sealed


def leaf(sha256: str) -> str:
    """Merkle leaf of a record, by its hash."""
    return merkle.leaf_hash(bytes.fromhex(sha256))


def shard_entry(shard: int, hashes: Sequence[str]) -> dict[str, Any]:
    """What the head knows of a shard; its canonical bytes are a leaf of the upper tree."""
    return {
        "shard": shard,
        "records": len(hashes),
        "last_sha256": hashes[-1],
        "root": merkle.root([leaf(sha256) for sha256 in hashes]),
    }


def shards_root(shards: Iterable[Mapping[str, Any]]) -> str:
    """Root of the upper tree."""
    return merkle.root([merkle.leaf_hash(canonical(entry)) for entry in shards])


def make_head(
    sealed: Sequence[Mapping[str, Any]], key: AuditKey, log_id: str, counter: int, time: str
) -> dict[str, Any]:
    """Signed statement of a whole log.

    Args:
        sealed: its records.
        key: signs.
        log_id: of the log, the same in all its states.
        counter: of the state, from 1; each rewrite of the log takes the next.
        time: UTC, ISO 8601.

    Returns:
        The head. All but `shards` is signed, and `shards` is what the signed root is over: so a
        proof of one record needs no more than the signed part.
    """
    shards = [
        shard_entry(shard, [record["sha256"] for record in group])
        for shard, group in groupby(sealed, key=lambda record: record["shard"])
    ]
    content = {
        "schema": SCHEMA,
        "log_id": log_id,
        "counter": counter,
        "time": time,
        "records": len(sealed),
        "merkle_root": shards_root(shards),
    }
    return {**anchor.signed(content, key), "shards": shards}


def signed_part(head: Mapping[str, Any]) -> dict[str, Any]:
    """A head without its list of shards."""
    return {name: value for name, value in head.items() if name != "shards"}


def head_is_signed(head: Mapping[str, Any], key: PublicKey) -> bool:
    """Whether a head carries this key's signature (its shards are not looked at)."""
    return anchor.is_signed(signed_part(head), key)


def next_state(folder: Path | str, anchor_file: Path | str, key: PublicKey) -> tuple[str, int]:
    """(log id, counter) of the log that is to be written into `folder`.

    A rewrite keeps the id of what it replaces, so that the anchor tells which state is the newest.

    Raises:
        ValueError: the anchor is damaged or another key's, so that no head can be added to it.
    """
    known = anchor.Anchor([], [])
    if Path(anchor_file).is_file():
        known = anchor.read_anchor(anchor_file, key)
    if known.problems:
        raise ValueError(
            f"{known.problems[0]}: no head can be added; restore it, or name another --anchor_file"
        )
    path = Path(folder) / HEAD
    head = read_json(path) if path.is_file() else None
    log_id = head.get("log_id") if isinstance(head, dict) else None
    if not isinstance(head, dict) or not isinstance(log_id, str):
        return secrets.token_hex(6), 1
    latest = known.latest_head(log_id)
    return log_id, int(latest["content"]["counter"] if latest else head.get("counter", 0)) + 1


def leaves_file(anchor_file: Path | str, head: Mapping[str, Any]) -> Path:
    """Where the hashes of an anchored log's records lie, beside the anchor.

    They need no signature of their own: they must give the signed root.
    """
    return Path(anchor_file).with_name(f"{head['log_id']}-{head['counter']}.leaves")


def write_log(
    folder: Path | str,
    sealed: Sequence[Mapping[str, Any]],
    key: AuditKey,
    anchor_file: Path | str,
    state: tuple[str, int],
    time: str,
) -> dict[str, Any]:
    """Write shards (canonical JSON lines), head, leaves and, last, the anchor's new entry.

    Args:
        folder: of the log.
        sealed: from `seal`, checked against the schema by whoever made them.
        key: signs.
        anchor_file: outside the run folder.
        state: from `next_state`; its id is the one that the records were sealed with.
        time: UTC, ISO 8601.

    Returns:
        The head.
    """
    log_id, counter = state
    for shard, group in groupby(sealed, key=lambda record: record["shard"]):
        lines = [canonical(record).decode("ascii") + "\n" for record in group]
        write_text(Path(folder) / shard_name(shard), "".join(lines))
    head = make_head(sealed, key, log_id, counter, time)
    write_json(Path(folder) / HEAD, head)
    write_text(leaves_file(anchor_file, head), "".join(f"{r['sha256']}\n" for r in sealed))
    anchor.append(anchor_file, anchor.HEAD_KIND, log_id, time, head, key)
    return head


def shard_paths(folder: Path | str) -> list[Path]:
    """Shards that are there, in order.

    Raises:
        ValueError: the folder holds a log of schema 1, or none.
    """
    folder = Path(folder)
    paths = sorted(folder.glob("audit-*.jsonl"))
    if not paths and (folder / OLD_LOG).is_file():
        raise ValueError(
            f"{folder / OLD_LOG} is a log of schema 1, this genrec reads {SCHEMA}: verify it with "
            "the version that wrote it, and make a new one: genrec audit --run_dir "
            f"{folder.parent} --overwrite true (the old folder is kept)"
        )
    if not paths and not (folder / HEAD).is_file():
        raise ValueError(
            f"{folder / shard_name(0)} does not exist; run: genrec audit --run_dir {folder.parent}"
        )
    return paths


def read_log(folder: Path | str) -> list[dict[str, Any]]:
    """Records of a log as they stand, unverified and without their payloads.

    Raises:
        ValueError: there is no log, one of another schema, or a line is no JSON object.
    """
    records = []
    for path in shard_paths(folder):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number} is no JSON object")
            records.append(record)
    return records
