"""Explained lists -> tamper-evident records and a report page; verify and replay them.

    genrec audit --config recipes/configs/quickstart/audit.yaml --run_dir runs/quickstart
    genrec audit verify --run_dir runs/quickstart
    genrec audit replay --run_dir runs/quickstart --record 0

The first form writes ``audit/audit.jsonl`` (a hash-chained record per explained list),
``audit/head.json`` (their number and last hash, signed) and ``audit/report.html``. The key,
`<run_dir>/audit.key` unless --key_file names another, is made if absent. Keep it, and a copy of
head.json as an anchor, where those who can write the run can't: with the key a log can be forged,
and an older log with its own valid head looks sound to whoever has no anchor. Records hold item
ids of histories under pseudonyms, so treat them as personal data.

`verify` exits with status 1 on any finding, `replay` if a list isn't reproduced.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from genrec.artifacts import Stage, load_manifest, require, stage_folder, write_text
from genrec.config import parse, run

if TYPE_CHECKING:
    from genrec.audit.custody import AuditKey


@dataclass
class AuditArgs:
    """Settings of the audit stage."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    key_file: str | None = None  # default: <run_dir>/audit.key, made if absent
    report_users: int = 20  # lists shown in report.html; audit.jsonl holds all explained ones

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        if self.report_users < 0:
            raise ValueError(f"report_users={self.report_users} must be at least 0")


@dataclass
class VerifySettings:
    """Settings of `genrec audit verify`."""

    run_dir: str = "runs/default"
    key_file: str | None = None  # default: <run_dir>/audit.key


@dataclass
class ReplaySettings:
    """Settings of `genrec audit replay`."""

    run_dir: str = "runs/default"
    record: int | None = None  # number of the record
    all: bool = False  # every record

    def __post_init__(self) -> None:
        """Exactly one of the two must be given."""
        if (self.record is None) == (not self.all):
            raise ValueError("name one record with --record N, or take --all")


def the_key(args: AuditArgs) -> AuditKey:
    """The key that signs; a new one only where no log exists that an old one signed."""
    from genrec.audit.custody import DEFAULT_KEY, AuditKey

    path = Path(args.key_file or Path(args.run_dir) / DEFAULT_KEY)
    if path.exists():
        return AuditKey.load(path)
    if load_manifest(args.run_dir, "audit") is not None and not args.overwrite:
        raise ValueError(
            f"{path} does not exist, but a log was signed already; restore the key, or make a new "
            "log under a new key with --overwrite true"
        )
    key = AuditKey.create(path)
    print(f"made key {key.key_id} in {path}: keep it away from those who can write the run")
    return key


def write() -> None:
    """Run the stage."""
    args = parse(AuditArgs)
    made = require(args.run_dir, "recommend").config
    if made.get("model_run"):
        raise ValueError(
            f"the lists of {args.run_dir} were made by the model of {made['model_run']}; records "
            "name files of one run folder, by hash, and replay needs them there: audit lists of "
            "the model's own run, or train a model in this one"
        )
    model_stage = made["model_stage"]
    require(args.run_dir, "explain")
    from genrec.audit.custody import seal, write_log
    from genrec.audit.records import ExplainedRun, build_records
    from genrec.audit.report import render_report

    key = the_key(args)
    config = {**asdict(args), "key_id": key.key_id}
    inputs = ["prepare", "quantize", "build_dataset", model_stage, "recommend", "explain"]
    stage = Stage(args.run_dir, "audit", config, inputs, ignore=["key_file"])
    if stage.is_done(args.overwrite):
        return
    explained = ExplainedRun.load(args.run_dir)
    time = datetime.now(UTC).isoformat(timespec="seconds")
    sealed = seal(build_records(explained, key, time))
    write_log(stage.folder, sealed, key)
    write_text(
        stage.folder / "report.html", render_report(explained, sealed, key, args.report_users)
    )
    last = sealed[-1]["sha256"]
    stage.finish(rows=len(sealed), metrics={"last_sha256": last, "key_id": key.key_id})
    print(
        f"{len(sealed):,} records, last hash {last}\n"
        f"keep a copy of {stage.folder}/head.json elsewhere; open {stage.folder}/report.html"
    )


def verify() -> None:
    """Verify a log; exit status 1 on any finding."""
    args = parse(VerifySettings, args=sys.argv[2:])
    from genrec.audit.verify import verify as verify_log

    found = verify_log(args.run_dir, args.key_file)
    for finding in found.findings:
        print(finding)
    if found.findings:
        print(f"NOT verified: {len(found.findings)} findings in {found.records:,} records")
        raise SystemExit(1)
    print(
        f"OK: {found.records:,} records, chain and numbering whole, head signed by key "
        f"{found.key_id}, {found.files} files unchanged; last hash {found.last_sha256}"
    )


def replay() -> None:
    """Replay one record or all; exit status 1 if a list isn't reproduced."""
    args = parse(ReplaySettings, args=sys.argv[2:])
    from genrec.audit.custody import read_log
    from genrec.audit.replay import load_recommender
    from genrec.audit.replay import replay as replay_record
    from genrec.audit.verify import current_hashes

    log = read_log(stage_folder(args.run_dir, "audit"))
    if not args.all and not 0 <= args.record < len(log):
        raise ValueError(f"record={args.record} is not in the log; it has 0..{len(log) - 1}")
    records = log if args.all else [log[args.record]]
    recommender = load_recommender(args.run_dir, records[0])
    current = current_hashes(args.run_dir, records)
    results = []
    for record in tqdm(records, unit="record", disable=len(records) < 20):
        results.append(replay_record(record, recommender, current))
    for result in results:
        print(result)
    levels = [result.level for result in results]
    if len(results) > 1:
        counts = ", ".join(f"{levels.count(x)} {x}" for x in dict.fromkeys(levels))
        passed = sum(result.passed for result in results)
        print(f"{passed:,} of {len(results):,} records reproduced: {counts}")
    if not all(result.passed for result in results):
        raise SystemExit(1)


def main() -> None:
    """Dispatch on the first argument."""
    verbs = {"verify": verify, "replay": replay}
    first = sys.argv[1] if len(sys.argv) > 1 else "--"
    if not first.startswith("-") and first not in verbs:
        raise ValueError(f"{first!r} is no verb of audit; use verify, replay, or none")
    verbs.get(first, write)()


if __name__ == "__main__":
    run(main)
