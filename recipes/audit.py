"""Recommended lists -> tamper-evident records and a report; verify, replay, prove, erase them.

    genrec audit --config recipes/configs/quickstart/audit.yaml --run_dir runs/quickstart
    genrec audit keygen --key_file /secure/audit.key
    genrec audit verify --run_dir runs/quickstart --report verified.json
    genrec audit replay --run_dir runs/quickstart --record 0 [--engine vllm]
    genrec audit report --run_dir runs/quickstart
    genrec audit prove --run_dir runs/quickstart --record 0 --output proof.json
    genrec audit check --proof proof.json --public_key runs/quickstart.custody/audit.pub
    genrec audit erase --run_dir runs/quickstart --user U
    genrec audit --run_dir lists/today --source_run runs/mine    # lists of `recommend --users`

The first form writes into ``audit/``: shards of records (``audit-00000.jsonl`` …, each a hash
chain), ``head.json`` (the signed Merkle root over them), ``payloads.sqlite`` (user ids, histories,
prompts, chains; records hold salted commitments to them), ``environment.txt`` and ``report.html``.
There is a record for every list that recommend made; those of explained lists hold their chains.
Lists for a table of users lie apart from the run that made them: the verbs then take that run as
`source_run`, and the table must still be what it was. Shaped or drawn lists and those under allow
or deny have records, too, but can't be replayed from them.

Key and anchor lie outside the run folder: `<run_dir>.custody/audit.key`, made if absent, and
``heads.jsonl`` beside it, unless --key_file and --anchor_file name other places. The anchor lists
every head that was signed, which is how an older log that was put back is found out. Keep both
where those who can write the run can't.

`verify` and `check` exit with status 1 on any finding, `replay` if a list isn't reproduced; a
record whose user was erased is said to be so and counts as neither. `erase` exits with status 1 if
a file is left that holds or may hold the user's data, and names it; who was erased stays so when
the log is made again under the same key, and under another one it is refused.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from genrec.artifacts import (
    Stage,
    load_manifest,
    read_json,
    require,
    stage_folder,
    write_json,
    write_text,
)
from genrec.config import check_choice, parse, run

if TYPE_CHECKING:
    from genrec.audit.keys import AuditKey
    from genrec.audit.recorded import RecordedRun


@dataclass
class AuditArgs:
    """Settings of the audit stage."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    source_run: str | None = None  # run that lists for a table of users were made from
    key_file: str | None = None  # default: <run_dir>.custody/audit.key, made if absent
    anchor_file: str | None = None  # default: heads.jsonl beside the key
    shard_size: int = 10_000  # records per file
    report_users: int = 20  # lists shown in report.html, explained ones first; the log holds all
    # A spaCy pipeline, installed or a folder: Presidio masks names and places in chains, too.
    presidio_model: str | None = None
    presidio_language: str = "en"  # of the texts

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        if self.report_users < 0:
            raise ValueError(f"report_users={self.report_users} must be at least 0")
        if self.shard_size < 1:
            raise ValueError(f"shard_size={self.shard_size} must be at least 1")


@dataclass
class KeygenSettings:
    """Settings of `genrec audit keygen`."""

    run_dir: str = "runs/default"
    key_file: str | None = None  # default: <run_dir>.custody/audit.key


@dataclass
class VerifySettings:
    """Settings of `genrec audit verify`."""

    run_dir: str = "runs/default"
    key_file: str | None = None  # default: <run_dir>.custody/audit.key
    public_key: str | None = None  # its public half, enough for all but the pseudonyms
    anchor_file: str | None = None  # default: heads.jsonl beside the key
    log_only: bool = False  # neither payloads nor artefact files
    source_run: str | None = None  # run that lists for a table of users were made from
    report: str | None = None  # JSON file to write the findings to


@dataclass
class ReplaySettings:
    """Settings of `genrec audit replay`."""

    run_dir: str = "runs/default"
    record: int | None = None  # number of the record
    record_id: str | None = None  # or its id
    all: bool = False  # every record
    source_run: str | None = None  # run that lists for a table of users were made from
    engine: str = "torch"  # that searches again: torch, vllm or vllm-inworker
    gpu_memory_utilization: float | None = None  # of vllm: share of a GPU, or on CPU of the memory

    def __post_init__(self) -> None:
        """Exactly one of the three must be given."""
        check_choice("engine", self.engine, ("torch", "vllm", "vllm-inworker"))
        share = self.gpu_memory_utilization
        if share is not None and (self.engine != "vllm" or not 0 < share <= 1):
            raise ValueError(
                f"gpu_memory_utilization={share} must lie in (0, 1], and is for engine=vllm"
            )
        if (self.record is not None) + (self.record_id is not None) + self.all != 1:
            raise ValueError("name one record with --record N or --record_id ID, or take --all")


@dataclass
class ReportSettings:
    """Settings of `genrec audit report`."""

    run_dir: str = "runs/default"
    source_run: str | None = None  # run that lists for a table of users were made from
    report_users: int = 20


@dataclass
class ProveSettings:
    """Settings of `genrec audit prove`."""

    run_dir: str = "runs/default"
    record: int = 0  # number of the record
    reveal: list[str] = field(default_factory=list)  # of the payload: identity, input, chains
    output: str | None = None  # default: print it


@dataclass
class CheckSettings:
    """Settings of `genrec audit check`."""

    proof: str = "proof.json"
    public_key: str = "audit.pub"


@dataclass
class EraseSettings:
    """Settings of `genrec audit erase`."""

    run_dir: str = "runs/default"
    user: str | None = None  # user id
    source_run: str | None = None  # run that lists for a table of users were made from
    key_file: str | None = None  # default: <run_dir>.custody/audit.key
    anchor_file: str | None = None  # default: heads.jsonl beside the key
    report_users: int = 20

    def __post_init__(self) -> None:
        """A user must be named."""
        if self.user is None:
            raise ValueError("name the user whose payloads are to go: --user U")


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def custody(
    run_dir: str, key_file: str | None, anchor_file: str | None = None
) -> tuple[Path, Path]:
    """Where key and anchor lie; both must be outside the run folder."""
    from genrec.audit.anchor import ANCHOR
    from genrec.audit.keys import KEY, check_outside, custody_folder

    key = check_outside(key_file or custody_folder(run_dir) / KEY, run_dir, "key_file")
    return key, check_outside(anchor_file or key.with_name(ANCHOR), run_dir, "anchor_file")


def the_key(args: AuditArgs, path: Path) -> AuditKey:
    """The key that signs; a new one only where no log exists that an old one signed."""
    from genrec.audit.erasure import check_erasures
    from genrec.audit.keys import AuditKey

    if path.exists():
        return AuditKey.load(path)
    if load_manifest(args.run_dir, "audit") is not None and not args.overwrite:
        raise ValueError(
            f"{path} does not exist, but a log was signed already; restore the key, or make a new "
            "log under a new key with --overwrite true"
        )
    check_erasures(stage_folder(args.run_dir, "audit"), None)
    key = AuditKey.create(path)
    print(f"made key {key.key_id} in {path}: keep it away from those who can write the run")
    return key


def keygen() -> None:
    """Make a key pair."""
    args = parse(KeygenSettings, args=sys.argv[2:])
    from genrec.audit.keys import AuditKey, public_path

    path, _ = custody(args.run_dir, args.key_file)
    if path.exists():
        raise ValueError(f"{path} exists; a key is never overwritten: name another --key_file")
    key = AuditKey.create(path)
    print(f"made key {key.key_id}: secret {path}, public {public_path(path)}")


def write() -> None:
    """Run the stage."""
    args = parse(AuditArgs)
    recommend = require(args.run_dir, "recommend")
    from genrec.audit.custody import next_state, write_log
    from genrec.audit.erasure import erased_users, note_erasure, without_erased
    from genrec.audit.recorded import RecordedRun, check_source, source_of
    from genrec.audit.records import ENVIRONMENT, UNLISTED, build_records, environment
    from genrec.audit.schema import SCHEMA

    source = source_of(args.run_dir, recommend, args.source_run)
    check_source(args.run_dir, recommend, source)
    inputs, hashes = ["recommend"], {}
    of_source = ["prepare", "quantize", "build_dataset", recommend.config["model_stage"]]
    if args.source_run is None:
        inputs = [*of_source, *inputs]
        if load_manifest(args.run_dir, "explain") is not None:
            inputs.append("explain")
    else:
        hashes = {f"source_run/{s}": require(source, s).content_hash for s in of_source}
    key_path, anchor_path = custody(args.run_dir, args.key_file, args.anchor_file)
    key = the_key(args, key_path)
    config = {**asdict(args), "key_id": key.key_id, "schema": SCHEMA}
    ignore = ["key_file", "anchor_file", "report_users", "source_run"]
    find = None
    if args.presidio_model is None:
        ignore += ["presidio_model", "presidio_language"]
    else:
        from genrec.audit.presidio import presidio_finder

        find = presidio_finder(args.presidio_model, args.presidio_language)
    stage = Stage(args.run_dir, "audit", config, inputs, ignore=ignore, hashes=hashes)
    state = next_state(stage.folder, anchor_path, key.public)
    erased, gone = erased_users(stage.folder, anchor_path, key, state[0]), dict[int, str]()
    if stage.is_done(args.overwrite):
        return
    time, recorded = now(), RecordedRun.load(args.run_dir, args.source_run)
    write_text(stage.folder / ENVIRONMENT, environment())
    lists = tqdm(build_records(recorded, key, time, find), unit="record", total=recorded.n_rows)
    made = without_erased(lists, erased, gone)
    head = write_log(stage.folder, made, key, anchor_path, state, time, args.shard_size)
    if gone:
        users = sorted(set(gone.values()))
        note_erasure(stage.folder, head, list(gone), users, key, anchor_path, time)
    render(recorded, args.report_users)
    root, records = head["merkle_root"], head["records"]
    metrics = {"merkle_root": root, "key_id": key.key_id, "log_id": head["log_id"]}
    stage.finish(rows=records, metrics=metrics, skip=UNLISTED)
    print(
        f"{records:,} records, {len(recorded.chains):,} of them explained, {len(gone):,} of erased "
        f"users without payload, Merkle root {root}, anchored in {anchor_path}\n"
        f"open {stage.folder}/report.html"
    )


def render(recorded: RecordedRun, users: int) -> Path:
    """Write the page from the log as it is now."""
    from genrec.audit.report import read_sample, render_report

    folder = stage_folder(recorded.run_dir, "audit")
    write_text(folder / "report.html", render_report(recorded, read_sample(folder, users)))
    return folder / "report.html"


def report() -> None:
    """Write the page again, of as many lists as asked for."""
    args = parse(ReportSettings, args=sys.argv[2:])
    require(args.run_dir, "audit")
    from genrec.audit.recorded import RecordedRun

    print(f"open {render(RecordedRun.load(args.run_dir, args.source_run), args.report_users)}")


def verify() -> None:
    """Verify a log; exit status 1 on any finding."""
    args = parse(VerifySettings, args=sys.argv[2:])
    from genrec.audit.verify import verify as verify_log

    found = verify_log(
        args.run_dir, args.key_file, args.public_key, args.anchor_file, args.log_only,
        args.source_run,
    )  # fmt: skip
    if args.report:
        write_json(args.report, found.to_json())
    for finding in found.findings:
        print(finding)
    if found.findings:
        print(f"NOT verified: {len(found.findings)} findings in {found.records:,} records")
        raise SystemExit(1)
    around = (
        "payloads and artefact files not looked at"
        if args.log_only
        else f"payloads as committed to ({found.erased:,} erased), {found.files} files unchanged"
    )
    print(
        f"OK: {found.records:,} records in {found.shards} shards, chains and numbering whole, head "
        f"signed by key {found.key_id} and anchored, {around}; Merkle root "
        f"{found.head['merkle_root']}"
    )


def replay() -> None:
    """Replay one record or all; exit status 1 if a list isn't reproduced."""
    args = parse(ReplaySettings, args=sys.argv[2:])
    from genrec.audit.custody import HEAD
    from genrec.audit.recorded import source_of
    from genrec.audit.records import read_opened
    from genrec.audit.replay import ERASED, Replayer, load_replayer
    from genrec.audit.replay import replay as replay_record
    from genrec.audit.verify import hashes_now, named_files

    folder = stage_folder(args.run_dir, "audit")
    source = source_of(args.run_dir, require(args.run_dir, "recommend"), args.source_run)
    replayer: Replayer | None = None
    current: dict[str, str | None] = {}
    results, total, found = [], int(read_json(folder / HEAD)["records"]), 0
    wanted = None if args.record is None else [args.record]
    share = args.gpu_memory_utilization
    options = None if share is None else {"gpu_memory_utilization": share}
    for record in tqdm(read_opened(folder, wanted), unit="record", disable=not args.all):
        if args.record_id not in (None, record.get("record_id")):
            continue
        found += 1
        if record["erased"]:
            print(f"record {record['record']}: {ERASED}")
            continue
        replayer = replayer or load_replayer(source, record, args.engine, options)
        current |= hashes_now(args.run_dir, named_files(record) - current.keys(), source)
        results.append(replay_record(record, replayer, current))
    if not found:
        asked = f"record={args.record}" if args.record_id is None else args.record_id
        raise ValueError(f"{asked} is not in the log; it has 0..{total - 1}")
    for result in results:
        print(result)
    levels = [result.level for result in results]
    if len(results) > 1:
        counts = ", ".join(f"{levels.count(x)} {x}" for x in dict.fromkeys(levels))
        passed = sum(result.passed for result in results)
        print(f"{passed:,} of {len(results):,} records reproduced: {counts}")
    if not all(result.passed for result in results):
        raise SystemExit(1)


def prove() -> None:
    """Write the inclusion proof of one record."""
    args = parse(ProveSettings, args=sys.argv[2:])
    from genrec.audit.proofs import prove as make_proof

    proof = make_proof(stage_folder(args.run_dir, "audit"), args.record, args.reveal)
    if args.output is None:
        print(json.dumps(proof, indent=2))
        return
    write_json(args.output, proof)
    print(f"proof of record {args.record} in {args.output}; check it with the public key alone")


def check() -> None:
    """Check an inclusion proof; exit status 1 if it doesn't hold."""
    args = parse(CheckSettings, args=sys.argv[2:])
    from genrec.audit.keys import PublicKey
    from genrec.audit.proofs import check_proof

    if not Path(args.proof).is_file():
        raise ValueError(f"there is no proof at {args.proof}; name one with --proof")
    proof, key = read_json(args.proof), PublicKey.load(args.public_key)
    for wrong in (found := check_proof(proof, key)):
        print(wrong)
    if found:
        raise SystemExit(1)
    record, head = proof["record"], proof["head"]
    shown = ", ".join(proof.get("payload", {})) or "nothing"
    print(
        f"OK: record {record['record']} of {head['records']:,} in log {head['log_id']}, state "
        f"{head['counter']}, signed by key {key.key_id}; of its payload it shows {shown}"
    )


def erase() -> None:
    """Erase a user's payloads and show the page without them; exit status 1 if anything is left."""
    args = parse(EraseSettings, args=sys.argv[2:])
    from genrec.audit.erasure import erase as erase_user
    from genrec.audit.keys import AuditKey
    from genrec.audit.recorded import RecordedRun

    key_path, anchor_path = custody(args.run_dir, args.key_file, args.anchor_file)
    folder = stage_folder(args.run_dir, "audit")
    done = erase_user(args.run_dir, args.user, AuditKey.load(key_path), anchor_path, now())
    print(f"erased {done.payloads} payloads of {len(done.records)} records: {done.records}")
    try:
        render(RecordedRun.load(args.run_dir, args.source_run), args.report_users)
    except (ValueError, OSError) as error:
        print(f"{folder}/report.html is removed; it can't be made again: {error}")
    print(
        "the stages that the log was made from (data, dataset, recommendations, explanations, "
        "evaluation) still hold this user's rows: rebuild or delete them"
    )
    for path, why in done.left.items():
        print(f"NOT erased: {path}: {why}; restore it and erase again, or delete it")
    if done.left:
        raise SystemExit(1)


def main() -> None:
    """Dispatch on the first argument."""
    verbs = {
        "keygen": keygen,
        "verify": verify,
        "replay": replay,
        "report": report,
        "prove": prove,
        "check": check,
        "erase": erase,
    }
    first = sys.argv[1] if len(sys.argv) > 1 else "--"
    if not first.startswith("-") and first not in verbs:
        raise ValueError(f"{first!r} is no verb of audit; use {', '.join(verbs)}, or none")
    verbs.get(first, write)()


if __name__ == "__main__":
    run(main)
