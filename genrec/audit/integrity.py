"""Integrity of a log by itself: lines, schema, hashes, chains, numbers, root, signature, anchor.

Nothing here trusts the log: any JSON may stand in it. Two views are laid over each other. What the
log says of itself (own hash, link, number) locates an edit, a deletion or a swap at its line. What
was signed (head, anchor) tells whether the log as a whole is the one that was written, and the
anchored hashes of its records locate what somebody recomputed. A log is checked shard by shard, so
memory holds the records of one. Longer than other modules: the checks build on each other's
findings and are read in one place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from genrec.audit.anchor import HEAD_KIND, Anchor, read_anchor
from genrec.audit.canonical import canonical
from genrec.audit.custody import (
    HEAD,
    genesis,
    head_is_signed,
    leaves_file,
    log_lines,
    record_hash,
    shard_entry,
    shard_name,
    shard_number,
    shard_paths,
    shards_root,
    strange_names,
)
from genrec.audit.keys import PublicKey
from genrec.audit.schema import SCHEMA, problem

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        kind: edit, insertion, deletion, reordering, truncation, forgery, rollback, schema, head,
            key, anchor, payload or file.
        text: what, in one line.
        file: that it stands in, by its name; None where it concerns the whole log.
        line: of the file, from 1; None where it concerns all of it.
    """

    kind: str
    text: str
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        """As printed."""
        place = [self.file] if self.file else []
        place += [f"line {self.line}"] if self.line is not None else []
        return f"{self.kind}: " + (f"{', '.join(place)}: " if place else "") + self.text

    def to_json(self) -> dict[str, Any]:
        """As reported."""
        return asdict(self)


@dataclass(frozen=True)
class Line:
    """One line that holds a JSON object."""

    file: str
    number: int
    record: dict[str, Any]

    @cached_property
    def sha256(self) -> str:
        """Hash that the record has, whatever it says."""
        return record_hash(self.record)


@dataclass
class LogState:
    """What was read of a log, and everything that is wrong with it."""

    records: int = 0  # lines that hold a record
    shards: int = 0  # files that hold them
    head: dict[str, Any] = field(default_factory=dict)
    anchor: Anchor | None = None  # None: not looked at
    findings: list[Finding] = field(default_factory=list)

    def find(self, kind: str, text: str, file: str | None = None, line: int | None = None) -> None:
        """Add a finding."""
        self.findings.append(Finding(kind, text, file, line))

    def found_in(self, file: str, line: int | None = None) -> bool:
        """Whether anything was found in a file, or at one of its lines."""
        return any(f.file == file and line in (None, f.line) for f in self.findings)


def check_log(
    folder: Path | str,
    key: PublicKey | None,
    anchor_file: Path | str | None,
    visit: Callable[[LogState, Line], None] | None = None,
) -> LogState:
    """Check a log.

    Args:
        folder: of shards and head.
        key: None if there is none: nothing that is signed can be checked, which is a finding.
        anchor_file: None leaves the anchor out, and then a rollback can't be seen.
        visit: called with each record after its shard was checked; it may add findings.

    Raises:
        ValueError: there is no log, or one of another schema.
    """
    state, folder = LogState(), Path(folder)
    paths = shard_paths(folder)
    by_shard = {n: path for path in paths if (n := shard_number(path.name)) is not None}
    for name in strange_names(folder):
        state.find("insertion", "no name of a shard", name)
    state.head = _read_head(folder / HEAD, state)
    shards = _stated_shards(state.head)
    anchored, leaves = None, None
    if key is not None:
        _check_signature(state, key)
        if anchor_file is not None:
            anchored = _check_anchor(state, folder, Path(anchor_file), key)
    if anchored is not None and anchor_file is not None:
        leaves = leaves_file(anchor_file, anchored)
    anchored_shards = anchored["shards"] if anchored else []
    first, start = 0, 0
    for shard in sorted({*by_shard, *range(max(len(shards), len(anchored_shards)))}):
        stated = shards[shard].get("records") if shard < len(shards) else 0
        stated = stated if isinstance(stated, int) else None
        lines: list[Line] = []
        if shard not in by_shard and shard < len(shards):
            tail = shard > max(by_shard, default=-1)
            text = f"the shard is missing; it held {stated} records"
            state.find("truncation" if tail else "deletion", text, shard_name(shard))
        elif shard in by_shard:
            lines = _read_shard(by_shard[shard], state)
            _check_shard(state, shard, lines, first, stated)
            if state.head:
                _check_root(state, shard, lines, shards[shard] if shard < len(shards) else None)
        first += stated if stated is not None else len(lines)
        if leaves is not None and shard < len(anchored_shards):
            _check_leaves(state, leaves, start, anchored_shards[shard], lines)
            start += anchored_shards[shard]["records"]
        state.records += len(lines)
        state.shards += bool(lines)
        for line in lines if visit else ():
            visit(state, line)  # type: ignore[misc]
    _check_whole(state, shards)
    state.findings.sort(key=lambda f: (f.file or "", f.line or 0))
    return state


def _read_head(path: Path, state: LogState) -> dict[str, Any]:
    try:
        head = json.loads(path.read_bytes())
        if not isinstance(head, dict):
            raise ValueError("it is no JSON object")
        canonical(head)
    except (OSError, ValueError, RecursionError) as error:
        state.find("head", f"it can't be read: {error}", HEAD)
        return {}
    if head.get("schema") != SCHEMA:
        text = f"it has schema version {head.get('schema')!r}, this genrec reads {SCHEMA}"
        state.find("schema", text, HEAD)
    return head


def _stated_shards(head: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    shards = head.get("shards")
    return [s for s in shards if isinstance(s, Mapping)] if isinstance(shards, list) else []


def _read_shard(path: Path, state: LogState) -> list[Line]:
    """Lines of a shard that hold a JSON object."""
    *raw, rest = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(raw, start=1):
        try:
            record = json.loads(line)
            same = isinstance(record, dict) and canonical(record) == line
        except (ValueError, RecursionError) as error:
            state.find("edit", f"not a JSON record: {error}", path.name, number)
            continue
        if not same:
            state.find("edit", "not one JSON object in canonical form", path.name, number)
        if isinstance(record, dict):
            found.append(Line(path.name, number, record))
            if same and (wrong := problem(record)):
                state.find("schema", wrong, path.name, number)
    if rest:
        text = "the last line is cut off: it has no line end"
        state.find("truncation", text, path.name, len(raw) + 1)
    return found


def _check_shard(
    state: LogState, shard: int, lines: Sequence[Line], first: int, stated: int | None
) -> None:
    """Own hashes, numbers and links of one shard.

    Args:
        state: gets the findings.
        shard: its number.
        lines: as read.
        first: number that its first record must have.
        stated: records that the head says it has; None if it doesn't say.
    """
    for line in lines:
        if line.record.get("sha256") != line.sha256:
            text = "its content doesn't match its own hash: it was changed"
            state.find("edit", text, line.file, line.number)
    in_order = _check_numbers(state, lines, first)
    log_id = state.head.get("log_id") or (lines[0].record.get("log_id") if lines else None)
    previous: object = genesis(log_id, shard)
    for line, ordered in zip(lines, in_order, strict=True):
        # Out of order, the link is broken too; the order has been said already.
        if ordered and line.record.get("previous_sha256") != previous:
            text = "it doesn't follow the line before it: the previous hash differs"
            state.find("edit", text, line.file, line.number)
        previous = line.record.get("sha256")
    if stated is None:
        return
    numbers = [line.record.get("record") for line in lines]
    cut = (max(_last(numbers), first - 1) + 1, first + stated - 1)
    if len(lines) < stated and cut[0] <= cut[1]:
        text = f"{_named(*cut)} cut off at its end"
        state.find("truncation", text, shard_name(shard), len(lines) + 1)
    elif len(lines) > stated:
        text = f"it has {len(lines)} records, the head states {stated}: records were added"
        state.find("insertion", text, shard_name(shard))


def _check_numbers(state: LogState, lines: Sequence[Line], first: int) -> list[bool]:
    """Numbers of a shard's records; returns for each line whether it stands where it belongs."""
    numbers = [line.record.get("record") for line in lines]
    whole = all(isinstance(n, int) for n in numbers)
    places = list(range(first, first + len(numbers)))
    if whole and numbers != places and sorted(numbers) == places:  # type: ignore[type-var]
        for line, number, place in zip(lines, numbers, places, strict=True):
            if number != place:
                text = f"it is record {number}, record {place} belongs here"
                state.find("reordering", text, line.file, line.number)
        # Behind a swap the link is broken as well.
        return [
            n == p and (i == 0 or numbers[i - 1] == places[i - 1])
            for i, (n, p) in enumerate(zip(numbers, places, strict=True))
        ]
    present, expected, in_order = set(map(repr, numbers)), first, []
    for line, number in zip(lines, numbers, strict=True):
        in_order.append(number == expected)
        if not isinstance(number, int):
            text = f"it has number {number!r}, record {expected} belongs here"
            state.find("edit", text, line.file, line.number)
            expected += 1
            continue
        if number != expected:
            gap = range(expected, min(number, expected + 10**6))  # a forged number may be any
            gone = [n for n in gap if str(n) not in present]
            if gone:
                text = f"{_named(gone[0], gone[-1])} missing before it"
                state.find("deletion", text, line.file, line.number)
            else:
                kind = "insertion" if numbers.count(number) > 1 else "reordering"
                text = f"it is record {number}, record {expected} belongs here"
                state.find(kind, text, line.file, line.number)
        expected = number + 1
    return in_order


def _last(numbers: Sequence[object]) -> int:
    return max((n for n in numbers if isinstance(n, int)), default=-1)


def _named(first: int, last: int) -> str:
    return f"record {first} is" if first == last else f"records {first} to {last} are"


def _check_root(
    state: LogState, shard: int, lines: Sequence[Line], stated: Mapping[str, Any] | None
) -> None:
    """Root of a shard against what the head states of it (None: nothing)."""
    hashes = [str(line.record.get("sha256")) for line in lines]
    sound = hashes and all(map(_SHA256.fullmatch, hashes))
    if sound and shard_entry(shard, hashes) != stated and not state.found_in(shard_name(shard)):
        text = "its records are not those whose root the head states"
        state.find("forgery", text, shard_name(shard))


def _check_whole(state: LogState, shards: Sequence[Mapping[str, Any]]) -> None:
    """Number of records, and the root over all shards, against what the head states."""
    head = state.head
    if not head:
        return
    if head.get("records") != state.records and not state.findings:
        text = f"it states {head.get('records')!r} records, the log has {state.records}"
        state.find("forgery", text, HEAD)
    if shards_root(shards) != head.get("merkle_root"):
        state.find("forgery", "its shards don't give its Merkle root", HEAD)


def _check_signature(state: LogState, key: PublicKey) -> None:
    head = state.head
    if not head:
        return
    if head.get("key_id") != key.key_id:
        text = f"it names key {head.get('key_id')!r}, this key is {key.key_id!r}"
        state.find("key", f"{text}: another key, or a forged head", HEAD)
    if not head_is_signed(head, key):
        state.find("forgery", "its signature is not valid under this key", HEAD)


def _check_anchor(
    state: LogState, folder: Path, path: Path, key: PublicKey
) -> dict[str, Any] | None:
    """The head that was anchored last; None if there is none, or this log is an older state."""
    state.anchor = read_anchor(path, key)
    for wrong in state.anchor.problems:
        state.find("anchor", wrong)
    log_id = state.head.get("log_id")
    if not isinstance(log_id, str):  # a forger may have taken it out
        log_id = _anchored_id(folder, state.anchor)
    latest = state.anchor.latest_head(log_id)
    if latest is None:
        state.find("anchor", f"no head of log {log_id!r} stands in {path}")
        return None
    anchored: dict[str, Any] = latest["content"]
    head = state.head
    # Whoever takes the head away before a rewrite gives the next log another id, or the id of some
    # other log; the folder tells all the same.
    last = state.anchor.last_head_in(latest.get("folder")) or latest
    newest = latest if last["log_id"] == latest["log_id"] else last
    same = newest is latest and head.get("counter") == anchored["counter"]
    if head_is_signed(head, key) and not same:
        other = f"log {newest['log_id']}, " if newest is not latest else ""
        state.find(
            "rollback",
            f"it is state {head.get('counter')} of {head.get('time')}, {other}state "
            f"{newest['content']['counter']} was signed on {newest['time']}: an older log was put "
            "back",
            HEAD,
        )
        return None
    if head and head != anchored:
        text = f"it is not the head that was anchored as entry {latest['number']} on "
        state.find("forgery", text + str(latest["time"]), HEAD)
    return anchored


def _anchored_id(folder: Path, known: Anchor) -> str | None:
    """First log id that a record names and the anchor knows."""
    heads = {entry["log_id"] for entry in known.entries if entry["kind"] == HEAD_KIND}
    for line in log_lines(folder):
        try:
            log_id = line.record().get("log_id")
        except ValueError:
            continue
        if isinstance(log_id, str) and log_id in heads:
            return log_id
    return None


def _read_leaves(path: Path, start: int, size: int) -> list[str]:
    """`size` hashes from number `start` on; fewer or none where the file lacks them."""
    width = 65  # a hash and its line end
    try:
        with open(path, "rb") as stream:
            stream.seek(start * width)
            return stream.read(size * width).decode("ascii").split("\n")[:-1]
    except (OSError, ValueError):
        return []


def _check_leaves(
    state: LogState, path: Path, first: int, entry: Mapping[str, Any], lines: Sequence[Line]
) -> None:
    """Locate what only the anchored hashes of the records can: a shard that was recomputed.

    Args:
        state: gets the findings.
        path: of the leaves.
        first: number of the shard's first record.
        entry: what the anchored head states of the shard.
        lines: the shard as read.
    """
    shard = entry["shard"]
    hashes = [line.sha256 for line in lines]
    if hashes and shard_entry(shard, hashes) == entry:
        return  # as anchored; the leaves only locate what isn't
    truth = _read_leaves(path, first, entry["records"])
    sound = len(truth) == entry["records"] and all(map(_SHA256.fullmatch, truth))
    if not sound or shard_entry(shard, truth) != entry:
        if not state.found_in(shard_name(shard)):
            text = "its records are not those that were anchored"
            state.find("forgery", text, shard_name(shard))
        return
    known, there = set(truth), set(hashes)
    strange = [n for n, sha256 in enumerate(hashes) if sha256 not in known]
    for n in strange:
        if not state.found_in(lines[n].file, lines[n].number):
            text = "it is sound in itself, but not a record that was anchored: recomputed"
            state.find("forgery", text, lines[n].file, lines[n].number)
    gone = [first + n for n, sha256 in enumerate(truth) if sha256 not in there]
    if len(gone) > len(strange) and not state.found_in(shard_name(shard)):
        text = f"{_named(gone[0], gone[-1])} among those that were anchored and missing"
        state.find("deletion", text, shard_name(shard))
    if not state.found_in(shard_name(shard)):
        text = "its records are those that were anchored, in another order"
        state.find("reordering", text, shard_name(shard))
