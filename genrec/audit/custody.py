"""Custody of the log: shards, hash chains, one Merkle root, and the signed head over it.

Records lie in shards, ``audit-00000.jsonl`` and so on. Each record holds the hash of the one before
it in its shard and its own, which shows edits, insertions, swaps and deletions. The records of a
shard are the leaves of a Merkle tree, the shards those of another, and ``head.json`` states its
root under an Ed25519 signature, which shows a cut tail and a log that somebody recomputed. That the
whole folder was put back to an older signed state shows in the anchor (see `genrec.audit.anchor`).

A log is written and read record by record: of a log of any length, memory holds the hashes of one
shard and what is said of each shard.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
import secrets
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from genrec.artifacts import read_json, write_json, writing
from genrec.audit import anchor, merkle
from genrec.audit.canonical import canonical, canonical_each
from genrec.audit.keys import AuditKey, PublicKey
from genrec.audit.payloads import Payload, new_store
from genrec.audit.schema import SCHEMA, check

HEAD = "head.json"
OLD_LOG = "audit.jsonl"  # of schema 1
SHARD_SIZE = 10_000
_SHARDS = "audit-*.jsonl"
_SHARD = re.compile(r"audit-([0-9]{5,})\.jsonl")


def shard_name(shard: int) -> str:
    """File of a shard."""
    return f"audit-{shard:05d}.jsonl"


def shard_number(name: str) -> int | None:
    """Number of a shard by the name of its file; None of any other name.

    A number has one name: were audit-000000.jsonl shard 0 too, one file could hide another.
    """
    match = _SHARD.fullmatch(name)
    return int(match[1]) if match and name == shard_name(int(match[1])) else None


def record_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record without its own hash."""
    content = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(canonical(content)).hexdigest()


def genesis(log_id: object, shard: int) -> str:
    """First link of a shard's chain: no shard fits another log or another place."""
    return hashlib.sha256(canonical(["genrec audit shard", log_id, shard])).hexdigest()


Made = tuple[Mapping[str, Any], Payload]  # a record without number, ids and hashes; its payload


@dataclass(frozen=True)
class SealedLine:
    """A record as it is written.

    Attributes:
        number: of the record.
        shard: that it belongs to.
        sha256: of the record.
        data: canonical JSON and a line end.
        payload: of the record.
    """

    number: int
    shard: int
    sha256: str
    data: bytes
    payload: Payload


def seal(made: Iterable[Made], log_id: str, shard_size: int = SHARD_SIZE) -> Iterator[SealedLine]:
    """Number records from 0, deal them out to shards in order, check them and chain each shard.

    A value that is the very object which the record before had there is checked and brought into
    canonical form once: what all records of a run share costs nothing. So no value may change once
    its record was handed over.

    Args:
        made: the records.
        log_id: of the log.
        shard_size: records per shard.

    Yields:
        Each record with `log_id`, `record_id`, `record`, `shard` and both hashes, in canonical
        form.

    Raises:
        ValueError: a record doesn't fit the schema.
    """
    previous = ""
    fields: Set[str] = frozenset()
    encoded: dict[str, tuple[Any, bytes]] = {}
    for number, (content, payload) in enumerate(made):
        shard = number // shard_size
        record = {
            **content,
            "log_id": log_id,
            "record_id": f"{log_id}-{number}",
            "record": number,
            "shard": shard,
            "previous_sha256": previous if number % shard_size else genesis(log_id, shard),
        }
        same_members = record.keys() == fields
        if not same_members:
            fields, names = frozenset(record), sorted(record)
            place = bisect(names, "sha256")
        changed = [n for n in names if n not in encoded or encoded[n][0] is not record[n]]
        for name, data in zip(changed, canonical_each([record[n] for n in changed]), strict=True):
            encoded[name] = record[name], b'"%b":%b' % (name.encode("ascii"), data)
        members = [encoded[name][1] for name in names]
        before, behind = b",".join(members[:place]), b",".join(members[place:])
        record["sha256"] = previous = hashlib.sha256(b"{%b,%b}" % (before, behind)).hexdigest()
        check(record, changed if same_members else None)
        data = b'{%b,"sha256":"%b",%b}\n' % (before, previous.encode(), behind)
        yield SealedLine(number, shard, previous, data, payload)


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
    shards: Sequence[Mapping[str, Any]], key: AuditKey, state: tuple[str, int], time: str
) -> dict[str, Any]:
    """Signed statement of a whole log.

    Args:
        shards: `shard_entry` of each.
        key: signs.
        state: id of the log, the same in all its states, and counter of the state, from 1; each
            rewrite of the log takes the next.
        time: UTC, ISO 8601.

    Returns:
        The head. All but `shards` is signed, and `shards` is what the signed root is over: so a
        proof of one record needs no more than the signed part.
    """
    content = {
        "schema": SCHEMA,
        "log_id": state[0],
        "counter": state[1],
        "time": time,
        "records": sum(entry["records"] for entry in shards),
        "merkle_root": shards_root(shards),
    }
    return {**anchor.signed(content, key), "shards": list(shards)}


def signed_part(head: Mapping[str, Any]) -> dict[str, Any]:
    """A head without its list of shards."""
    return {name: value for name, value in head.items() if name != "shards"}


def head_is_signed(head: Mapping[str, Any], key: PublicKey) -> bool:
    """Whether a head carries this key's signature (its shards are not looked at)."""
    return anchor.is_signed(signed_part(head), key)


def next_state(folder: Path | str, anchor_file: Path | str, key: PublicKey) -> tuple[str, int]:
    """(log id, counter) of the log that is to be written into `folder`.

    A rewrite keeps the id of what it replaces, so that the anchor tells which state is the newest.
    Where the head is gone, also since a rewrite was killed, the anchor knows what the folder held.

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
    if not isinstance(head, dict) or not isinstance(head.get("log_id"), str):
        last = known.last_head_in(anchor.folder_hash(folder))
        head = last["content"] if last else {"log_id": secrets.token_hex(6)}
    latest = known.latest_head(head["log_id"])
    counter = latest["content"]["counter"] if latest else head.get("counter", 0)
    return head["log_id"], int(counter) + 1


def leaves_file(anchor_file: Path | str, head: Mapping[str, Any]) -> Path:
    """Where the hashes of an anchored log's records lie, beside the anchor, one a line.

    They need no signature of their own: they must give the signed root.
    """
    return Path(anchor_file).with_name(f"{head['log_id']}-{head['counter']}.leaves")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's search for circles of objects, a sixth of the time of writing a log.

    Records have no circles, but each search looks at the hundreds of thousands of objects of a
    shard of lists. Once a shard `write_log` searches after all, and what was there before the log
    (torch and transformers alone are half a second's worth) is frozen meanwhile, out of its sight.
    """
    was_enabled, others = gc.isenabled(), gc.get_freeze_count()
    gc.disable()
    if not others:  # what somebody else froze can't be told apart again
        gc.freeze()
    try:
        yield
    finally:
        if not others:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


def write_log(
    folder: Path | str,
    made: Iterable[Made],
    key: AuditKey,
    anchor_file: Path | str,
    state: tuple[str, int],
    time: str,
    shard_size: int = SHARD_SIZE,
) -> dict[str, Any]:
    """Write shards (canonical JSON lines), payloads, leaves, head and, last, the anchor's entry.

    Args:
        folder: of the log; a log that is there is replaced.
        made: the records, in order; drawn as they are written (see `seal`).
        key: signs.
        anchor_file: outside the run folder.
        state: from `next_state`.
        time: UTC, ISO 8601.
        shard_size: records per file.

    Returns:
        The head.

    Raises:
        ValueError: a record doesn't fit the schema. No head is written then, and without one
            there is no log.
    """
    folder, named = Path(folder), {"log_id": state[0], "counter": state[1]}
    for old in [*folder.glob(_SHARDS), folder / HEAD]:
        old.unlink(missing_ok=True)
    shards: list[dict[str, Any]] = []
    leaves_path = leaves_file(anchor_file, named)
    with new_store(folder) as store, writing(leaves_path) as leaves, _no_collection():
        for shard, group in groupby(seal(made, state[0], shard_size), lambda line: line.shard):
            hashes = []
            with writing(folder / shard_name(shard)) as stream:
                for line in group:
                    stream.write(line.data)
                    hashes.append(line.sha256)
                    store.add(line.number, line.payload)
            leaves.write("".join(f"{sha256}\n" for sha256 in hashes).encode())
            shards.append(shard_entry(shard, hashes))
            gc.collect()
    head = make_head(shards, key, state, time)
    write_json(folder / HEAD, head)
    anchor.append(anchor_file, anchor.HEAD_KIND, state[0], time, head, key, folder)
    return head


def shard_paths(folder: Path | str) -> list[Path]:
    """Shards that are there, in order: all that verification checks, and nothing else.

    Raises:
        ValueError: the folder holds a log of schema 1, or none.
    """
    folder = Path(folder)
    numbers = (shard_number(path.name) for path in folder.glob(_SHARDS))
    paths = [folder / shard_name(shard) for shard in sorted(n for n in numbers if n is not None)]
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


def strange_names(folder: Path | str) -> list[str]:
    """Files that look like shards, but have no shard's name; nothing reads them."""
    names = sorted(path.name for path in Path(folder).glob(_SHARDS))
    return [name for name in names if shard_number(name) is None]


@dataclass(frozen=True)
class LogLine:
    """A line of a shard.

    Attributes:
        path: of the shard.
        number: of the line, from 1.
        data: its bytes, with the line end unless it was cut off.
    """

    path: Path
    number: int
    data: bytes

    def record(self) -> dict[str, Any]:
        """The record.

        Raises:
            ValueError: the line is no JSON object.
        """
        try:
            record = json.loads(self.data)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}, line {self.number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{self.path}, line {self.number} is no JSON object")
        return record


def log_lines(folder: Path | str) -> Iterator[LogLine]:
    """Whole lines of a log, one by one.

    Raises:
        ValueError: there is no log, or one of schema 1.
    """
    for path in shard_paths(folder):
        with open(path, "rb") as stream:
            for number, data in enumerate(stream, start=1):
                if data.endswith(b"\n"):
                    yield LogLine(path, number, data)


def read_log(folder: Path | str) -> Iterator[dict[str, Any]]:
    """Records of a log as they stand, one by one, unverified and without their payloads.

    Raises:
        ValueError: there is no log, one of schema 1, or a line is no JSON object.
    """
    return (line.record() for line in log_lines(folder))
