"""Verify a run's log: its integrity, its payloads, and the files that it names.

`genrec.audit.integrity` checks the log by itself; this module holds it against what lies around it.
Verification reads and never writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from genrec.artifacts import FOLDERS, load_manifest, sha256_file, stage_folder
from genrec.audit.anchor import ANCHOR
from genrec.audit.erasure import read_erasures
from genrec.audit.integrity import Finding, Line, LogState, check_log
from genrec.audit.keys import KEY, AuditKey, PublicKey, custody_folder, public_path
from genrec.audit.payloads import PARTS, STORE, Sealed, read_payloads
from genrec.columns import ROW_ID, USER_ID

_STAGES = {folder: stage for stage, folder in FOLDERS.items()}


@dataclass(frozen=True)
class Verification:
    """Outcome: what was looked at, and every finding.

    Attributes:
        records: lines that hold a record.
        shards: files that hold them.
        erased: records whose payload was erased, with an entry that says so.
        files: artefact files that were hashed.
        key_id: of the key that was verified with; None: there was none.
        head: what the log says of itself.
        findings: everything that is wrong; none means verified.
    """

    records: int
    shards: int
    erased: int
    files: int
    key_id: str | None
    head: Mapping[str, Any]
    findings: list[Finding]

    def to_json(self) -> dict[str, Any]:
        """The report that ``verify --report`` writes."""
        named = ("log_id", "counter", "time", "merkle_root")
        return {
            "verified": not self.findings,
            "records": self.records,
            "shards": self.shards,
            "erased": self.erased,
            "files": self.files,
            "key_id": self.key_id,
            "head": {name: self.head.get(name) for name in named},
            "findings": [finding.to_json() for finding in self.findings],
        }


def verify(
    run_dir: Path | str,
    key_file: Path | str | None = None,
    public_key: Path | str | None = None,
    anchor_file: Path | str | None = None,
    log_only: bool = False,
) -> Verification:
    """Verify the log of a run.

    Args:
        run_dir: the run.
        key_file: the key that signed it; default ``<run_dir>.custody/audit.key``. Only with it are
            pseudonyms held against user ids.
        public_key: its public half, enough for everything else; default: beside `key_file`.
        anchor_file: default ``heads.jsonl`` beside the key.
        log_only: look at the log alone, without payloads and artefact files: for whoever was
            handed no more than that.

    Raises:
        ValueError: there is no log, or one of another schema.
    """
    folder = stage_folder(run_dir, "audit")
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; run: genrec audit --run_dir {run_dir}")
    key_path = Path(key_file or custody_folder(run_dir) / KEY)
    trouble: list[Finding] = []
    secret = _secret(key_path, public_key, trouble)
    public = secret.public if secret else _public(key_path, public_key, trouble)
    beside = Path(public_key) if public_key and not key_file else key_path
    state = check_log(folder, public, anchor_file or beside.with_name(ANCHOR))
    state.findings += trouble
    erased, files = 0, 0
    if not log_only:
        erased = _check_payloads(state, Path(run_dir), folder, public, secret)
        files = _check_files(Path(run_dir), state)
    return Verification(
        len(state.lines),
        len({line.file for line in state.lines}),
        erased,
        files,
        public.key_id if public else None,
        state.head,
        state.findings,
    )


def _secret(path: Path, public_key: Path | str | None, trouble: list[Finding]) -> AuditKey | None:
    """The secret key if it is at hand; verifying needs it for pseudonyms alone."""
    if not path.exists() or public_key is not None:
        return None
    try:
        return AuditKey.load(path)
    except ValueError as error:
        trouble.append(Finding("key", f"the signature was not checked: {error}"))
        return None


def _public(path: Path, public_key: Path | str | None, trouble: list[Finding]) -> PublicKey | None:
    if trouble:
        return None
    try:
        return PublicKey.load(public_key or public_path(path))
    except ValueError as error:
        trouble.append(Finding("key", f"neither signature nor anchor was checked: {error}"))
        return None


def _check_payloads(
    state: LogState, run_dir: Path, folder: Path, public: PublicKey | None, secret: AuditKey | None
) -> int:
    """Each record's payload must give its commitments, or be erased on record; counts the latter.

    Of the splits only ids are read and no targets, so this is no reading of the test rows that is
    to be noted.
    """
    try:
        payloads = read_payloads(folder)
    except ValueError as error:
        state.find("payload", str(error), STORE)
        return 0
    erased = set()
    if public is not None:
        erased = read_erasures(folder, state.head, public)
        if state.anchor is not None:
            log = state.head.get("log_id"), state.head.get("counter")
            erased |= state.anchor.erased(*log)
    users: dict[str, object] = {}
    for split in ("valid", "test"):
        path = stage_folder(run_dir, "prepare") / f"{split}.parquet"
        if path.exists():
            users |= dict(pl.read_parquet(path, columns=[ROW_ID, USER_ID]).iter_rows())
    gone = 0
    for line in state.lines:
        number = line.record.get("record")
        payload = payloads.pop(number, None) if isinstance(number, int) else None
        if payload is None and number in erased:
            gone += 1
        elif payload is None:
            text = "its payload is missing, and no erasure is on record"
            state.find("payload", text, line.file, line.number)
        elif number in erased:
            text = "its payload is there although it was erased: an older store was put back"
            state.find("payload", text, line.file, line.number)
        else:
            _check_payload(state, line, payload, users, secret)
    if payloads:
        state.find("payload", f"it holds payloads of no record: {sorted(payloads)[:5]}", STORE)
    return gone


def _check_payload(
    state: LogState,
    line: Line,
    payload: Mapping[str, Sealed],
    users: Mapping[str, object],
    secret: AuditKey | None,
) -> None:
    for part in PARTS:
        stated = _at(line.record, "commitments", part)
        if part not in payload or payload[part].commitment != stated:
            text = f"the {part} in its payload is not what the record commits to"
            state.find("payload", text, line.file, line.number)
            return
    identity = payload["identity"].content
    if secret is None:
        return
    user = _at(identity, USER_ID)
    if _at(line.record, "user", "pseudonym") != secret.pseudonym(user):
        text = "its pseudonym is not that of its payload's user under this key"
        state.find("payload", text, line.file, line.number)
    elif users and (row := _at(identity, ROW_ID)) not in users:
        state.find("payload", f"row {row!r} is not in this run's splits", line.file, line.number)
    elif users and users[str(row)] != user:
        state.find("payload", f"row {row!r} is another user's", line.file, line.number)


def _check_files(run_dir: Path, state: LogState) -> int:
    """Hash each named file once and compare with manifest and records; returns their number."""
    stated: dict[tuple[str, str], list[Line]] = {}
    for line in state.lines:
        files = _at(line.record, "artefacts", "files")
        if isinstance(files, Mapping):  # the schema has said so where it isn't
            for name, sha256 in files.items():
                stated.setdefault((name, str(sha256)), []).append(line)
    current = current_hashes(run_dir, [line.record for line in state.lines])
    for name in sorted(current):
        if wrong := _against_manifest(run_dir, name, current[name]):
            state.find("file", wrong)
    for (name, sha256), lines in sorted(stated.items()):
        if sha256 != current[name]:
            now = (current[name] or "absent")[:12]
            more = f" (and {len(lines) - 1} more records)" if len(lines) > 1 else ""
            text = f"{name} was {sha256[:12]} when the list was made and is {now} now{more}"
            state.find("file", text, lines[0].file, lines[0].number)
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


def _at(record: Any, *names: str) -> Any:
    value = record
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
