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

from genrec.artifacts import stage_folder, write_bytes
from genrec.audit import anchor
from genrec.audit.canonical import canonical
from genrec.audit.custody import HEAD, OLD_LOG, read_log
from genrec.audit.keys import AuditKey, PublicKey
from genrec.audit.payloads import STORE, erase_payloads

ERASURES = "erasures.jsonl"


@dataclass(frozen=True)
class Erasure:
    """What was erased.

    Attributes:
        records: numbers of the user's records.
        payloads: how many of them still had a payload, those of older states included.
        left: files that hold the user's data in a form that can't be erased here.
    """

    records: list[int]
    payloads: int
    left: list[Path]


def erase(
    run_dir: Path | str, user_id: object, key: AuditKey, anchor_file: Path | str, time: str
) -> Erasure:
    """Erase all payloads of a user, also in older states of the log (``audit.old-*``).

    Args:
        run_dir: the run.
        user_id: as in the interactions.
        key: the one that made the pseudonyms.
        anchor_file: gets the entry.
        time: UTC, ISO 8601.

    Raises:
        ValueError: no record is of that user, or the log was made under another key.
    """
    folder, pseudonym = stage_folder(run_dir, "audit"), key.pseudonym(user_id)
    numbers = _numbers(folder, pseudonym, key.key_id)
    if not numbers:
        raise ValueError(f"no record of user {user_id!r} is in {folder}; ids are compared as text")
    erased = erase_payloads(folder, numbers)
    head = json.loads((folder / HEAD).read_bytes())
    done = read_erasures(folder, head, key.public)
    if Path(anchor_file).is_file():
        done &= anchor.read_anchor(anchor_file, key.public).erased(head["log_id"], head["counter"])
    if set(numbers) - done:
        content = {"counter": head["counter"], "records": numbers}
        entry = anchor.append(anchor_file, anchor.ERASURE_KIND, head["log_id"], time, content, key)
        before = (folder / ERASURES).read_bytes() if (folder / ERASURES).exists() else b""
        write_bytes(folder / ERASURES, before + canonical(entry) + b"\n")
    left = []
    for old in sorted(Path(run_dir).glob(f"{folder.name}.old-*")):
        if (old / STORE).is_file():
            erased += erase_payloads(old, _numbers(old, pseudonym))
        elif (old / OLD_LOG).is_file():
            left.append(old / OLD_LOG)
        (old / "report.html").unlink(missing_ok=True)
    return Erasure(numbers, erased, left)


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
