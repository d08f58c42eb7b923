"""An explained and audited run, made by the recipes' mains around a random model."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from genrec.audit.custody import HEAD, LOG, canonical, read_log, record_hash

_shared = runpy.run_path(str(Path(__file__).resolve().parents[1] / "explain" / "conftest.py"))


def make_audited_run(tiny, run: Path, **shop) -> Path:
    """Stages prepare … audit."""
    where = ["--run_dir", str(_shared["make_listed_run"](tiny, run, **shop))]
    _shared["call_recipe"]("explain", *where, "--num_rows", "6", "--k", "5", "--samples", "50")
    _shared["call_recipe"]("audit", *where, "--report_users", "5")
    return run


@pytest.fixture(scope="session")
def audited_run(tiny, tmp_path_factory) -> Path:
    """Of a shop with string ids, to be read only."""
    return make_audited_run(tiny, tmp_path_factory.mktemp("audited") / "run")


@pytest.fixture(scope="session")
def other_run(tiny, tmp_path_factory) -> Path:
    """Of another shop with integer ids, to be read only."""
    return make_audited_run(tiny, tmp_path_factory.mktemp("other") / "run", strings=False, seed=1)


@pytest.fixture
def copied(audited_run, tmp_path) -> Path:
    """The same run, to be spoiled."""
    return shutil.copytree(audited_run, tmp_path / "run")


class Log:
    """The log of a run, for tampering."""

    def __init__(self, run: Path) -> None:
        self.path, self.head_path = run / "audit" / LOG, run / "audit" / HEAD

    def records(self) -> list[dict]:
        return read_log(self.path.parent)

    def write(self, records: list[dict]) -> None:
        self.path.write_bytes(b"".join(canonical(r) + b"\n" for r in records))

    def edit(self, number: int, change: Callable[[dict], object], rehash: bool = False) -> None:
        records = self.records()
        change(records[number])
        if rehash:
            records[number]["sha256"] = record_hash(records[number])
        self.write(records)

    def recompute(self) -> None:
        """What an attacker without the key can do: hashes, numbers and the head's content."""
        records, previous = self.records(), "0" * 64
        for number, record in enumerate(records):
            record.update(record=number, previous_sha256=previous)
            record["sha256"] = previous = record_hash(record)
        self.write(records)
        head = json.loads(self.head_path.read_text())
        head.update(records=len(records), last_sha256=previous)
        self.head_path.write_text(json.dumps(head))


@pytest.fixture
def log(copied) -> Log:
    return Log(copied)
