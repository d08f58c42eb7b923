"""Verify a run's log: its integrity, its payloads, and the files that it names.

`genrec.audit.integrity` checks the log by itself; this module holds it against what lies around it.
Verification reads and never writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from genrec.artifacts import FOLDERS, Manifest, load_manifest, sha256_file, stage_folder
from genrec.audit.anchor import ANCHOR
from genrec.audit.erasure import read_erasures
from genrec.audit.integrity import Finding, Line, LogState, check_log
from genrec.audit.keys import KEY, AuditKey, PublicKey, custody_folder, public_path
from genrec.audit.payloads import PARTS, STORE, Sealed, Store, StoreError, open_store
from genrec.audit.recorded import source_of
from genrec.columns import ROW_ID, USER_ID

SPLITS = ("valid", "test")
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
    source_run: Path | str | None = None,
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
        source_run: the run that the lists were made from; for lists of a table of users.

    Raises:
        ValueError: there is no log, or one of another schema, or `source_run` is missing.
    """
    folder = stage_folder(run_dir, "audit")
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; run: genrec audit --run_dir {run_dir}")
    key_path = Path(key_file or custody_folder(run_dir) / KEY)
    trouble: list[Finding] = []
    secret = _secret(key_path, public_key, trouble)
    public = secret.public if secret else _public(key_path, public_key, trouble)
    beside = Path(public_key) if public_key and not key_file else key_path
    anchor_path = anchor_file or beside.with_name(ANCHOR)
    if log_only:
        state = check_log(folder, public, anchor_path)
        state.findings += trouble
        return _verification(state, public)
    source = source_of(run_dir, _lists_manifest(run_dir), source_run)
    splits = stage_folder(source, "prepare") if source_run is None else None
    around = _Around(splits, folder, public, secret)
    try:
        with open_store(folder) as store:
            state = check_log(folder, public, anchor_path, partial(around.visit, store))
            around.check_strays(state, store)
    except StoreError as error:  # the log is looked at all the same
        around = _Around(splits, folder, public, secret)
        state = check_log(folder, public, anchor_path, partial(around.visit, None))
        state.find("payload", str(error), STORE)
    files = _check_files(Path(run_dir), source, state, around.stated)
    state.findings += trouble
    return _verification(state, public, around.erased, files)


def _lists_manifest(run_dir: Path | str) -> Manifest | None:
    """Manifest of the lists; None where it is lost or damaged, as the files' check will say."""
    try:
        return load_manifest(run_dir, "recommend")
    except (ValueError, TypeError):
        return None


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


def _verification(
    state: LogState, public: PublicKey | None, erased: int = 0, files: int = 0
) -> Verification:
    key_id = public.key_id if public else None
    return Verification(
        state.records, state.shards, erased, files, key_id, state.head, state.findings
    )


class _Around:
    """Holds records against what lies around the log, one by one.

    Each payload must give its record's commitments, or be erased on record. Of the splits (None:
    the lists are for a table of users) only ids are read and no targets, so this is no reading of
    the test rows that is to be noted.

    Attributes:
        stated: (file, hash) -> the first line that names it so, and how many do.
        erased: records whose payload was erased, with an entry that says so.
    """

    def __init__(
        self, splits: Path | None, folder: Path, public: PublicKey | None, secret: AuditKey | None
    ) -> None:
        self.stated: dict[tuple[str, str], tuple[Line, int]] = {}
        self.erased = 0
        self._folder, self._public, self._secret = folder, public, secret
        self._gone: set[int] | None = None  # numbers that an erasure names
        self._numbers: set[int] = set()
        self._users: dict[str, object] = {}
        named = [] if splits is None or not secret else [splits / f"{s}.parquet" for s in SPLITS]
        for path in named:
            if path.exists():
                self._users |= dict(
                    pl.read_parquet(path, columns=[ROW_ID, USER_ID], glob=False).iter_rows()
                )

    def visit(self, store: Store | None, state: LogState, line: Line) -> None:
        """Look at a record, and without a store only at the files that it names."""
        files = _at(line.record, "artefacts", "files")
        if isinstance(files, Mapping):  # the schema has said so where it isn't
            for name, sha256 in files.items():
                first, count = self.stated.get((name, str(sha256)), (line, 0))
                self.stated[name, str(sha256)] = first, count + 1
        if store is None:
            return
        if self._gone is None:
            self._gone = self._erasures(state)
        number = line.record.get("record")
        payload, fresh = None, isinstance(number, int) and number not in self._numbers
        if isinstance(number, int) and fresh:
            self._numbers.add(number)
            try:
                payload = store.get(number)
            except StoreError as error:
                state.find("payload", str(error), line.file, line.number)
                return
        if payload is None and number in self._gone:
            self.erased += fresh
        elif payload is None:
            text = "its payload is missing, and no erasure is on record"
            state.find("payload", text, line.file, line.number)
        elif number in self._gone:
            text = "its payload is there although it was erased: an older store was put back"
            state.find("payload", text, line.file, line.number)
        else:
            _check_payload(state, line, payload, self._users, self._secret)

    def _erasures(self, state: LogState) -> set[int]:
        if self._public is None:
            return set()
        gone = read_erasures(self._folder, state.head, self._public)
        if state.anchor is not None:
            gone |= state.anchor.erased(state.head.get("log_id"), state.head.get("counter"))
        return gone

    def check_strays(self, state: LogState, store: Store) -> None:
        """Find payloads of no record, and what is no payload."""
        strays = list(islice((n for n in store.records() if n not in self._numbers), 5))
        if strays:
            state.find("payload", f"it holds payloads of no record: {strays}", STORE)
        if strange := store.strange_tables():
            state.find("payload", f"it holds more than payloads: {', '.join(strange)}", STORE)


def _check_payload(
    state: LogState,
    line: Line,
    payload: Mapping[str, Sealed],
    users: Mapping[str, object],
    secret: AuditKey | None,
) -> None:
    for part in PARTS:
        stated = _at(line.record, "commitments", part)
        if (payload[part].commitment if part in payload else None) != stated:
            text = f"the {part} in its payload is not what the record commits to"
            state.find("payload", text, line.file, line.number)
            return
    if strange := sorted(set(payload) - set(PARTS)):
        text = f"its payload has a part {strange[0]!r} that no record commits to"
        state.find("payload", text, line.file, line.number)
    if secret is None or "identity" not in payload:
        return
    identity = payload["identity"].content
    user = _at(identity, USER_ID)
    if _at(line.record, "user", "pseudonym") != secret.pseudonym(user):
        text = "its pseudonym is not that of its payload's user under this key"
        state.find("payload", text, line.file, line.number)
    elif users and (row := _at(identity, ROW_ID)) not in users:
        state.find("payload", f"row {row!r} is not in this run's splits", line.file, line.number)
    elif users and users[str(row)] != user:
        state.find("payload", f"row {row!r} is another user's", line.file, line.number)


def _check_files(
    run_dir: Path,
    source: Path,
    state: LogState,
    stated: Mapping[tuple[str, str], tuple[Line, int]],
) -> int:
    """Hash each named file once and compare with manifest and records; returns their number."""
    current = hashes_now(run_dir, {name for name, _ in stated}, source)
    for name in sorted(current):
        if wrong := _against_manifest(_root(run_dir, source, name), name, current[name]):
            state.find("file", wrong)
    for (name, sha256), (line, count) in sorted(stated.items(), key=lambda kv: kv[0]):
        if sha256 != current[name]:
            now = (current[name] or "absent")[:12]
            more = f" (and {count - 1} more records)" if count > 1 else ""
            text = f"{name} was {sha256[:12]} when the list was made and is {now} now{more}"
            state.find("file", text, line.file, line.number)
    return len(current)


def hashes_now(
    run_dir: Path | str, names: Iterable[str], source_run: Path | str | None = None
) -> dict[str, str | None]:
    """SHA-256 now of each named file; None if it is absent or lies outside the run.

    Args:
        run_dir: where lists and log lie.
        names: of the files, as records hold them.
        source_run: the run that the lists were made from; None: `run_dir`.
    """
    here, source = Path(run_dir), Path(run_dir if source_run is None else source_run)
    return {
        name: _current_hash(_root(here, source, name).resolve(), name) for name in sorted(names)
    }


def _root(run_dir: Path, source: Path, name: str) -> Path:
    """Folder that a file's name starts from: lists and log lie beside each other."""
    own = FOLDERS["recommend"], FOLDERS["audit"], FOLDERS["explain"]
    return run_dir if name.partition("/")[0] in own else source


def named_files(record: Mapping[str, Any]) -> set[str]:
    """Files that a record names; none where its form is broken."""
    files = _at(record, "artefacts", "files")
    return set(files) if isinstance(files, Mapping) else set()


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
