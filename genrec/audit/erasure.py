"""Erase a user: payloads go, the log stays as it is and still verifies.

That a payload is missing would be a finding; so each erasure is an entry, signed, in the anchor and
beside the log. It names record numbers and pseudonyms, which are in the records too, and nothing
else of the user. By the pseudonyms a log that is made again leaves out what was erased before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genrec.artifacts import read_json, stage_folder, write_bytes
from genrec.audit import anchor
from genrec.audit.canonical import canonical
from genrec.audit.custody import HEAD, OLD_LOG, Made, read_log
from genrec.audit.keys import AuditKey, PublicKey
from genrec.audit.payloads import STORE, StoreError, erase_payloads, open_store

ERASURES = "erasures.jsonl"
USERS = "pseudonyms"  # member of an erasure; those of earlier versions lack it


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
    for old in _old_folders(folder):
        erased += _erase_old(old, user_id, left)
    if not numbers and not erased:
        more = "".join(f"; {path}: {why}" for path, why in left.items())
        raise ValueError(
            f"no record of user {user_id!r} is in {folder}; ids are compared as text{more}"
        )
    _remove_pages(folder)
    erased += erase_payloads(folder, numbers)
    for entries in (_signed(folder, key.public), _anchored(anchor_file, key.public)):
        stated = _of_state(entries, head)
        on_record = {number for content in stated for number in content["records"]}
        if set(numbers) - on_record or not any(pseudonym in c.get(USERS, ()) for c in stated):
            note_erasure(folder, head, numbers, [pseudonym], key, anchor_file, time)
            break
    return Erasure(numbers, erased, left)


def note_erasure(
    folder: Path | str,
    head: Mapping[str, Any],
    numbers: list[int],
    pseudonyms: list[str],
    key: AuditKey,
    anchor_file: Path | str,
    time: str,
) -> None:
    """Put an erasure on record: an entry in the anchor, and the same one beside the log.

    Args:
        folder: of the log.
        head: of the log.
        numbers: of the records whose payloads are gone.
        pseudonyms: of their users.
        key: signs.
        anchor_file: gets the entry.
        time: UTC, ISO 8601.

    Raises:
        ValueError: the anchor is damaged.
    """
    content = {"counter": head["counter"], "records": numbers, USERS: pseudonyms}
    entry = anchor.append(
        anchor_file, anchor.ERASURE_KIND, head["log_id"], time, content, key, folder
    )
    path = Path(folder) / ERASURES
    before = path.read_bytes() if path.exists() else b""
    write_bytes(path, before + canonical(entry) + b"\n")


def erased_users(
    folder: Path | str, anchor_file: Path | str, key: AuditKey, log_id: str
) -> set[str]:
    """Pseudonyms of users who were erased and must stay so when the log is made again.

    They stand in the anchor, and beside the log and its older states. Of an erasure that an earlier
    version noted, without pseudonyms, the records tell whose they are, as long as they are there.

    Args:
        folder: of the log that is to be made again.
        anchor_file: of the log.
        key: that it is going to be signed with.
        log_id: that it is going to have.

    Raises:
        ValueError: an erased user can't be known again, because the erasure was made under another
            key, or because the records that it names are gone.
    """
    folder = Path(folder)
    check_erasures(folder, key.key_id)
    folders = [folder, *_old_folders(folder)]
    entries = [entry for one in folders for entry in _signed(one, key.public)]
    if Path(anchor_file).is_file():
        known = anchor.read_anchor(anchor_file, key.public)
        entries += known.erasures(log_id, anchor.folder_hash(folder))
    found: set[str] = set()
    for entry in entries:
        found |= set(entry["content"].get(USERS) or _looked_up(folders, entry))
    return found


def check_erasures(folder: Path | str, key_id: str | None) -> None:
    """Refuse to make a log again under another key than that of the erasures in it.

    Args:
        folder: of the log.
        key_id: None: a new key.

    Raises:
        ValueError: there are such erasures.
    """
    for one in [Path(folder), *_old_folders(Path(folder))]:
        for entry in _entries(one / ERASURES):
            if entry.get("key_id") not in (None, key_id):
                raise ValueError(
                    f"{one / ERASURES} names users who were erased under key {entry['key_id']}; "
                    "under another one they can't be known again, and their payloads would be "
                    "written anew. Use that key, or delete this file once they are gone from the "
                    "stages that the log is made from"
                )


def without_erased(made: Iterable[Made], users: Set[str], gone: dict[int, str]) -> Iterator[Made]:
    """Records as they are, and payloads of those alone who were not erased.

    Args:
        made: for `custody.write_log`.
        users: pseudonyms of those who were (see `erased_users`).
        gone: gets number and pseudonym of each record without its payload.
    """
    for number, (record, payload) in enumerate(made):
        pseudonym = record["user"]["pseudonym"]
        if pseudonym in users:
            gone[number] = pseudonym
        yield record, {} if pseudonym in users else payload


def _old_folders(folder: Path) -> list[Path]:
    """Older states of a log, as they were set aside."""
    return sorted(folder.parent.glob(f"{folder.name}.old-*"))


def _looked_up(folders: Iterable[Path], entry: Mapping[str, Any]) -> set[str]:
    """Pseudonyms in the records that an erasure names by number."""
    content = entry["content"]
    state, numbers = (entry["log_id"], content["counter"]), set(content["records"])
    for folder in folders:
        head = read_json(folder / HEAD) if (folder / HEAD).is_file() else {}
        if (head.get("log_id"), head.get("counter")) == state:
            own = [record for record in read_log(folder) if record["record"] in numbers]
            if len(own) == len(numbers):
                return {record["user"]["pseudonym"] for record in own}
    raise ValueError(
        f"records {sorted(numbers)[:5]} in state {state[1]} of log {state[0]} were erased on "
        f"{entry['time']}, and no folder holds that state, which alone tells whose they are: their "
        "payloads would be written anew. Put it back beside the log as audit.old-1, or name "
        "another --anchor_file once they are gone from the stages that the log is made from"
    )


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
    stated = _of_state(_signed(folder, key), head)
    return {number for content in stated for number in content["records"]}


def _entries(path: Path) -> list[dict[str, Any]]:
    """What looks like an erasure, signed or not."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            if entry["kind"] == anchor.ERASURE_KIND:
                found.append(entry)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return found


def _signed(folder: Path | str, key: PublicKey) -> list[dict[str, Any]]:
    """Erasures in the file beside a log that this key signed."""
    return [e for e in _entries(Path(folder) / ERASURES) if anchor.is_signed(e, key)]


def _anchored(anchor_file: Path | str, key: PublicKey) -> list[dict[str, Any]]:
    known = anchor.read_anchor(anchor_file, key).entries
    return [entry for entry in known if entry["kind"] == anchor.ERASURE_KIND]


def _of_state(entries: Iterable[Mapping[str, Any]], head: Mapping[str, Any]) -> list[Any]:
    """What erasures in this very state of a log state."""
    state = head.get("log_id"), head.get("counter")
    return [e["content"] for e in entries if (e["log_id"], e["content"]["counter"]) == state]
