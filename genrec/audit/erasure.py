"""Erase a user: payloads go, the log stays as it is and still verifies.

That a payload is missing would be a finding; so each erasure is an entry, signed, in the anchor and
beside the log. It names record numbers and nothing of the user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrec.artifacts import read_json, stage_folder, write_bytes
from genrec.audit import anchor
from genrec.audit.canonical import canonical
from genrec.audit.custody import HEAD, OLD_LOG, read_log
from genrec.audit.keys import AuditKey, PublicKey
from genrec.audit.payloads import STORE, StoreError, erase_payloads, open_store

ERASURES = "erasures.jsonl"


@dataclass(frozen=True)
class Erasure:
    """What was erased.

    Attributes:
        records: numbers of the user's records.
        payloads: how many of them still had a payload, those of older states included.
        left: files that hold or may hold the user's data and can't be erased here, with the reason.
    """

    records: list[int]
    payloads: int
    left: dict[Path, str]


def erase(
    run_dir: Path | str, user_id: object, key: AuditKey, anchor_file: Path | str, time: str
) -> Erasure:
    """Erase all payloads of a user, also in older states of the log (``audit.old-*``).

    Pages that may show the user go first. An older state needs neither log nor key, since its store
    knows whose its payloads are; one that can't be read keeps none of the others from being erased.

    Args:
        run_dir: the run.
        user_id: as in the interactions.
        key: the one that made the pseudonyms.
        anchor_file: gets the entry.
        time: UTC, ISO 8601.

    Raises:
        ValueError: nothing is of that user, or the log was made under another key or is damaged.
    """
    folder, pseudonym = stage_folder(run_dir, "audit"), key.pseudonym(user_id)
    numbers = _numbers(folder, pseudonym, key.key_id)
    head = _head(folder)
    erased, left = 0, dict[Path, str]()
    for old in sorted(Path(run_dir).glob(f"{folder.name}.old-*")):
        erased += _erase_old(old, user_id, left)
    if not numbers and not erased:
        more = "".join(f"; {path}: {why}" for path, why in left.items())
        raise ValueError(
            f"no record of user {user_id!r} is in {folder}; ids are compared as text{more}"
        )
    _remove_pages(folder)
    erased += erase_payloads(folder, numbers)
    done = read_erasures(folder, head, key.public)
    if Path(anchor_file).is_file():
        done &= anchor.read_anchor(anchor_file, key.public).erased(head["log_id"], head["counter"])
    if set(numbers) - done:
        content = {"counter": head["counter"], "records": numbers}
        entry = anchor.append(
            anchor_file, anchor.ERASURE_KIND, head["log_id"], time, content, key, folder
        )
        before = (folder / ERASURES).read_bytes() if (folder / ERASURES).exists() else b""
        write_bytes(folder / ERASURES, before + canonical(entry) + b"\n")
    return Erasure(numbers, erased, left)


def _head(folder: Path) -> dict[str, Any]:
    """Head of the log, read before anything is erased: without one no erasure can be on record."""
    head = read_json(folder / HEAD)
    if not isinstance(head, dict) or not {"log_id", "counter"} <= head.keys():
        raise ValueError(f"{folder / HEAD} is no head of a log; restore it")
    return head


def _remove_pages(folder: Path) -> None:
    """Remove the page and what killed writers left of it."""
    for page in [folder / "report.html", *folder.glob(".report.html.*.partial")]:
        page.unlink(missing_ok=True)


def _erase_old(old: Path, user_id: object, left: dict[Path, str]) -> int:
    """Erase a user in a folder that was set aside; returns how many payloads there were.

    Args:
        old: the folder; it may be of a log that was never finished.
        user_id: of the user.
        left: gets what can't be erased.
    """
    try:
        _remove_pages(old)
    except OSError as error:
        left[old / "report.html"] = f"it can't be removed: {error}"
    if (old / OLD_LOG).is_file():
        left[old / OLD_LOG] = "it is of an older schema and holds the history in the log itself"
    if not (old / STORE).is_file():
        return 0
    try:
        with open_store(old) as store:
            numbers, unknown = store.records_of(user_id)
        if unknown:
            left[old / STORE] = f"payloads of records {unknown[:5]} don't say whose they are"
        return erase_payloads(old, numbers) if numbers else 0
    except (StoreError, OSError) as error:
        left[old / STORE] = str(error)
        return 0


def _numbers(folder: Path, pseudonym: str, key_id: str | None = None) -> list[int]:
    """Numbers of a user's records; with `key_id` all records must be made under that key."""
    numbers = []
    for record in read_log(folder):
        if key_id not in (None, record["user"]["key_id"]):
            raise ValueError(
                f"the log was made under key {record['user']['key_id']}, this key is {key_id}; "
                "name the right one with --key_file"
            )
        if record["user"]["pseudonym"] == pseudonym:
            numbers.append(record["record"])
    return numbers


def read_erasures(folder: Path | str, head: Mapping[str, Any], key: PublicKey) -> set[int]:
    """Numbers of the records whose erasure the file beside the log states for this very state.

    Entries that this key didn't sign, or of another log or state, count for nothing.
    """
    path, found = Path(folder) / ERASURES, set()
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            content = entry["content"]
            ours = (entry["log_id"], content["counter"]) == (head["log_id"], head["counter"])
            if ours and entry["kind"] == anchor.ERASURE_KIND and anchor.is_signed(entry, key):
                found |= set(content["records"])
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return found
