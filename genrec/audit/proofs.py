"""Inclusion proofs: one record shown to be part of a signed log, without any other record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from genrec.artifacts import read_json
from genrec.audit import merkle
from genrec.audit.canonical import canonical
from genrec.audit.custody import (
    HEAD,
    head_is_signed,
    leaf,
    read_log,
    record_hash,
    shard_entry,
    signed_part,
)
from genrec.audit.keys import PublicKey
from genrec.audit.payloads import PARTS, Sealed, open_store
from genrec.audit.schema import problem

KIND = "genrec audit proof"


def prove(folder: Path | str, record: int, reveal: Iterable[str] = ()) -> dict[str, Any]:
    """Proof that a record is in the log that the head was signed for.

    Args:
        folder: of the log.
        record: its number.
        reveal: parts of the payload to show along; the record's commitments prove them.

    Raises:
        ValueError: no such record or part, a payload that was erased, or a log that doesn't give
            its head's root, for which no proof can hold.
    """
    head = read_json(Path(folder) / HEAD)
    entries: list[dict[str, Any]] = []
    found: dict[str, Any] | None = None
    for shard, group in groupby(read_log(folder), key=lambda r: r["shard"]):
        hashes: list[str] = []
        for one in group:
            if found is None and one.get("record") == record:
                found, own, place, shard_place = one, hashes, len(hashes), len(entries)
            hashes.append(one["sha256"])
        entries.append(shard_entry(shard, hashes))
    if found is None:
        count = sum(entry["records"] for entry in entries)
        raise ValueError(f"record={record} is not in the log; it has 0..{count - 1}")
    tops = [merkle.leaf_hash(canonical(entry)) for entry in entries]
    if merkle.root(tops) != head.get("merkle_root"):
        raise ValueError(
            f"the records in {folder} don't give the root that its head states; look for what was "
            "changed with: genrec audit verify"
        )
    proof = {
        "kind": KIND,
        "record": found,
        "place": place,
        "path": merkle.path([leaf(sha256) for sha256 in own], place),
        "shard": entries[shard_place],
        "shard_place": shard_place,
        "n_shards": len(entries),
        "shard_path": merkle.path(tops, shard_place),
        "head": signed_part(head),
    }
    parts = list(reveal)
    if parts:
        proof["payload"] = _revealed(folder, record, parts)
    return proof


def _revealed(folder: Path | str, record: int, parts: list[str]) -> dict[str, Any]:
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise ValueError(f"reveal={sorted(unknown)[0]!r} is no part; use {', '.join(PARTS)}")
    with open_store(folder) as store:
        payload = store.get(record)
    if payload is None:
        raise ValueError(f"record {record} has no payload to reveal: it was erased")
    if absent := [part for part in parts if part not in payload]:
        raise ValueError(f"record {record} commits to no {absent[0]}: there is none to reveal")
    return {p: {"salt": payload[p].salt, "content": payload[p].content} for p in parts}


def check_proof(proof: Any, key: PublicKey) -> list[str]:
    """What is wrong with a proof, from the inside out; nothing means that it holds.

    Args:
        proof: any JSON value that is said to be a proof.
        key: the public key that the log is said to be signed with.
    """
    if not isinstance(proof, Mapping) or proof.get("kind") != KIND:
        return [f"it is no proof: its kind is not {KIND!r}"]
    try:
        return _check(proof, key)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"it is no whole proof: {error!r}"]


def _check(proof: Mapping[str, Any], key: PublicKey) -> list[str]:
    record, shard, head = proof["record"], proof["shard"], proof["head"]
    found = []
    if wrong := problem(record):
        found.append(f"the record: {wrong}")
    if record["sha256"] != record_hash(record):
        found.append("the record's content doesn't match its hash")
    own = merkle.root_from_path(
        leaf(record["sha256"]), proof["place"], shard["records"], proof["path"]
    )
    if own != shard["root"] or record["shard"] != shard["shard"]:
        found.append("the record is not in the shard whose root is stated")
    top = merkle.root_from_path(
        merkle.leaf_hash(canonical(shard)),
        proof["shard_place"],
        proof["n_shards"],
        proof["shard_path"],
    )
    if top != head["merkle_root"] or record["log_id"] != head["log_id"]:
        found.append("the shard is not in the log whose root is signed")
    if not head_is_signed(head, key):
        found.append(f"the signature is not valid under key {key.key_id}")
    for part, shown in proof.get("payload", {}).items():
        if Sealed(shown["salt"], shown["content"]).commitment != record["commitments"][part]:
            found.append(f"the {part} shown is not what the record commits to")
    return found
