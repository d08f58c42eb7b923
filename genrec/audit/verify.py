"""Verify a log: lines, hashes, chain, numbering, signed head, and the files that it names.

Nothing here trusts the log: any JSON may stand in it. Verification reads and never writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from genrec.artifacts import FOLDERS, load_manifest, sha256_file, stage_folder
from genrec.audit.custody import (
    DEFAULT_KEY,
    GENESIS,
    HEAD,
    LOG,
    AuditKey,
    canonical,
    head_is_signed,
    record_hash,
)
from genrec.columns import ROW_ID, USER_ID

_STAGES = {folder: stage for stage, folder in FOLDERS.items()}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        line: of ``audit.jsonl``, from 1; None where it concerns the whole log.
        text: what.
    """

    line: int | None
    text: str

    def __str__(self) -> str:
        """As printed."""
        return self.text if self.line is None else f"line {self.line}: {self.text}"


@dataclass(frozen=True)
class Verification:
    """Outcome: what was looked at, and every finding."""

    records: int
    files: int
    key_id: str | None
    last_sha256: str
    findings: list[Finding]


def verify(run_dir: Path | str, key_file: Path | str | None = None) -> Verification:
    """Verify the log of a run.

    Args:
        run_dir: the run.
        key_file: the key that signed it; default ``<run_dir>/audit.key``.

    Raises:
        ValueError: there is no audit folder at all.
    """
    folder = stage_folder(run_dir, "audit")
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; run: genrec audit --run_dir {run_dir}")
    findings: list[Finding] = []
    records = _read(folder / LOG, findings)
    last = _check_chain(records, findings)
    key = _load_key(Path(key_file or Path(run_dir) / DEFAULT_KEY), findings)
    _check_head(folder / HEAD, len(records), last, key, findings)
    files = _check_files(Path(run_dir), records, findings)
    if key is not None:
        _check_pseudonyms(Path(run_dir), records, key, findings)
    findings.sort(key=lambda finding: finding.line or 0)
    return Verification(len(records), files, key.key_id if key else None, last, findings)


def _read(path: Path, findings: list[Finding]) -> list[tuple[int, dict[str, Any]]]:
    """Lines that hold a JSON object in its canonical form, with their numbers."""
    if not path.is_file():
        findings.append(Finding(None, f"{path} is missing"))
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        findings.append(Finding(len(lines) + 1, "the last line is cut off: it has no line end"))
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            same = isinstance(record, dict) and canonical(record) == line
        except (ValueError, RecursionError) as error:
            findings.append(Finding(number, f"not a JSON record: {error}"))
            continue
        if not same:
            findings.append(Finding(number, "not one JSON object in canonical form"))
        if isinstance(record, dict):
            records.append((number, record))
    return records


def _check_chain(records: list[tuple[int, dict[str, Any]]], findings: list[Finding]) -> str:
    """Own hashes, links and numbers; returns the hash of the last record."""
    previous = GENESIS
    for place, (line, record) in enumerate(records):
        if record.get("sha256") != record_hash(record):
            findings.append(Finding(line, "its content doesn't match its own hash: it was changed"))
        if record.get("previous_sha256") != previous:
            findings.append(
                Finding(line, "it doesn't follow the line before it: the previous hash differs")
            )
        if record.get("record") != place:
            text = f"it is record {record.get('record')!r}, record {place} belongs here"
            findings.append(Finding(line, text))
        previous = str(record.get("sha256"))
    return previous


def _load_key(path: Path, findings: list[Finding]) -> AuditKey | None:
    try:
        return AuditKey.load(path)
    except ValueError as error:
        findings.append(Finding(None, f"the signature was not checked: {error}"))
        return None


def _check_head(
    path: Path, records: int, last: str, key: AuditKey | None, findings: list[Finding]
) -> None:
    try:
        head = json.loads(path.read_bytes())
        if not isinstance(head, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        findings.append(Finding(None, f"{path} can't be read: {error}"))
        return
    if head.get("records") != records:
        text = f"{LOG} has {records} records, the head states {head.get('records')!r}"
        findings.append(Finding(None, f"{text}: records were cut off or added"))
    if head.get("last_sha256") != last:
        findings.append(Finding(None, "the last record's hash is not the one that the head states"))
    if key is None:
        return
    if head.get("key_id") != key.key_id:
        text = f"the head names key {head.get('key_id')!r}, this key is {key.key_id!r}"
        findings.append(Finding(None, f"{text}: another key, or a forged head"))
    try:
        signed = head_is_signed(head, key)
    except ValueError:
        signed = False
    if not signed:
        findings.append(Finding(None, "the head's signature is not valid under this key"))


def _check_files(
    run_dir: Path, records: list[tuple[int, dict[str, Any]]], findings: list[Finding]
) -> int:
    """Hash each named file once and compare with manifest and records; returns their number."""
    stated: dict[tuple[str, str], list[int]] = {}
    for line, record in records:
        files = _at(record, "artefacts", "files")
        if not isinstance(files, Mapping) or not files:
            findings.append(Finding(line, "it names no artefact files"))
            continue
        for name, sha256 in files.items():
            stated.setdefault((name, str(sha256)), []).append(line)
    current = current_hashes(run_dir, [record for _, record in records])
    for name in sorted(current):
        if problem := _against_manifest(run_dir, name, current[name]):
            findings.append(Finding(None, problem))
    for (name, sha256), lines in sorted(stated.items()):
        if sha256 != current[name]:
            now = (current[name] or "absent")[:12]
            more = f" (and {len(lines) - 1} more lines)" if len(lines) > 1 else ""
            text = f"{name} was {sha256[:12]} when the list was made and is {now} now{more}"
            findings.append(Finding(lines[0], text))
    return len(current)


def current_hashes(
    run_dir: Path | str, records: Sequence[Mapping[str, Any]]
) -> dict[str, str | None]:
    """SHA-256 now of each file that records name; None if it is absent or lies outside the run."""
    named = [_at(record, "artefacts", "files") for record in records]
    names = {name for files in named if isinstance(files, Mapping) for name in files}
    return {name: _current_hash(Path(run_dir).resolve(), name) for name in sorted(names)}


def _current_hash(root: Path, name: str) -> str | None:
    try:
        path = (root / name).resolve()
        inside = path.is_relative_to(root) and path.is_file()
    except (ValueError, OSError):  # a name that no file can have
        return None
    return sha256_file(path) if inside else None


def _against_manifest(run_dir: Path, name: str, sha256: str | None) -> str | None:
    folder, _, inner = name.partition("/")
    if folder not in _STAGES:
        return f"{name} lies in no stage folder of the run"
    try:
        manifest = load_manifest(run_dir, _STAGES[folder])
    except (ValueError, TypeError) as error:
        return f"the manifest of {folder} can't be read: {error}"
    if manifest is None:
        return f"{folder} has no manifest"
    output = manifest.outputs.get(inner)
    if output is None or output["sha256"] != sha256:
        return f"{name} doesn't match {folder}/manifest.json"
    return None


def _check_pseudonyms(
    run_dir: Path,
    records: list[tuple[int, dict[str, Any]]],
    key: AuditKey,
    findings: list[Finding],
) -> None:
    """Each record's pseudonym must belong to the user of its row.

    Only ids are read and no targets, so this is no reading of the test rows that is to be noted.
    """
    users: dict[str, object] = {}
    for split in ("valid", "test"):
        path = stage_folder(run_dir, "prepare") / f"{split}.parquet"
        if path.exists():
            users |= dict(pl.read_parquet(path, columns=[ROW_ID, USER_ID]).iter_rows())
    for line, record in records:
        row_id = record.get("row_id")
        if not isinstance(row_id, str) or row_id not in users:
            findings.append(Finding(line, f"row {row_id!r} is not in this run's splits"))
        elif _at(record, "user", "pseudonym") != key.pseudonym(users[row_id]):
            findings.append(
                Finding(line, f"its pseudonym is not that of {row_id}'s user under this key")
            )


def _at(record: Mapping[str, Any], *names: str) -> Any:
    value: Any = record
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
