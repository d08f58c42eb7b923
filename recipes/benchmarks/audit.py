"""How surely is tampering with an audit log found, what does keeping the log cost, is it true?

    python recipes/benchmarks/audit.py --out /tmp/audit
    python recipes/benchmarks/audit.py --quick
    python recipes/benchmarks/audit.py --out /tmp/audit --run_dir runs/beauty  # any finished run

Logs are made of invented lists by the writer that the audit stage uses, each with its own key and
anchor, and then tampered with in six ways, at random places: edit, deletion, reordering,
truncation, an attacker without the key who changes records and recomputes every hash and root, and
rollback to an older log that was signed. `detected` counts those that verification has a finding
for, `located` those where a finding names the file and line (of a deletion or a cut: where it was);
untouched logs give the false alarms. What was tampered with stays below ``<out>/tampered``.

With --run_dir the log of all lists of that run is written into a copy of it, ``<out>/run``.
`write_overhead` is the time of that (from reading the run to the anchored head) for each list over
the time that generating a list takes, which is measured on `generated` lists in the same process,
half of them before and half of them after the log, since other work on the machine slows both down;
`write_overhead_cpu` is the same in processor time. Then `replays` records are drawn and replayed:
on torch and, where vLLM can be imported, on its step engine. `same_list` counts for each engine the
lists that came out the same; `replay` holds more, also the largest |Δ log-prob| in nats, in the
search and by teacher forcing on torch, one list at a time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import polars as pl

from genrec.artifacts import load_manifest, machine, stage_folder, write_json, write_text
from genrec.audit.canonical import canonical
from genrec.audit.custody import (
    HEAD,
    genesis,
    next_state,
    record_hash,
    shard_entry,
    shard_paths,
    shards_root,
    write_log,
)
from genrec.audit.integrity import check_log
from genrec.audit.keys import AuditKey
from genrec.audit.payloads import Payload, Sealed
from genrec.audit.schema import SCHEMA
from genrec.columns import ROW_ID, USER_ID

NOW = "2026-01-01T00:00:00+00:00"
KINDS = ("edit", "deletion", "reordering", "truncation", "recomputed", "rollback")


@dataclass
class Settings:
    """Settings of the benchmark."""

    out: str = "/tmp/genrec-audit-benchmark"  # its folders are made anew
    tamperings: int = 1000
    untouched: int = 200  # logs that must not be found fault with
    records: int = 24  # per log that is tampered with
    shard_size: int = 10
    throughput_records: int = 2000
    k: int = 10  # items per list
    seed: int = 0
    run_dir: str | None = None  # write its log and replay some of it
    generated: int = 512  # lists that generation is timed on
    replays: int = 200  # records
    gpu_memory_utilization: float = 0.3  # of vLLM: share of a GPU, or on CPU of the memory
    quick: bool = False

    def __post_init__(self) -> None:
        """Reject what can't be tampered with, and shrink for a quick look."""
        if self.records < 4 or self.shard_size < 2:
            raise ValueError("records must be at least 4 and shard_size at least 2")
        if self.quick:
            self.tamperings, self.untouched, self.throughput_records = 60, 12, 300


def invented(number: int, key: AuditKey, rng: random.Random, k: int) -> tuple[dict, Payload]:
    """A record with its payload, as the audit stage would make of some list."""
    ids = rng.sample(range(100_000), k + 8)
    scores = sorted((-rng.uniform(1, 20) for _ in range(k)), reverse=True)
    items = [
        {
            "rank": rank,
            "item_id": f"B{item:09d}",
            "sid": f"<a_{item % 256}><b_{item % 251}><c_{item % 241}>",
            "score": score,
            "level_log_probs": [score / 2, score / 3, score / 6],
            "explained": True,
        }
        for rank, (item, score) in enumerate(zip(ids, scores, strict=False), start=1)
    ]
    history = [{"item_id": f"B{item:09d}", "sid": f"<a_{item % 256}>"} for item in ids[k:]]
    chains = [
        {"item_id": item["item_id"], "steps": [{"type": "decision", "text": f"rank {n}"}]}
        for n, item in enumerate(items, start=1)
    ]
    payload = {
        "identity": Sealed.new({"user_id": f"u{number}", "row_id": f"u{number}-0"}),
        "input": Sealed.new({"history": history, "set_aside_item_ids": [], "prompt": "x" * 200}),
        "chains": Sealed.new(chains),
    }
    one = "1" * 64
    artefacts = {f"{name}_sha256": one for name in (
        "model", "adapter", "tokenizer", "catalogue", "sid_map", "trie", "dataset", "prompts",
    )}  # fmt: skip
    record = {
        "schema": SCHEMA,
        "time": NOW,
        "made_at": NOW,
        "user": {"pseudonym": key.pseudonym(f"u{number}"), "key_id": key.key_id},
        "run": {"name": "invented", "fingerprints": {"sft": one}},
        "artefacts": {
            "code": {"git_commit": None, "package_sha256": one},
            "versions": {"torch": "2.9"},
            "lockfile": {"packages": 100, "sha256": one},
            "model_stage": "sft",
            "base_model": {"name": "from scratch", "sha256": None},
            **artefacts,
            "files": {f"sft/model/{n}.safetensors": one for n in range(10)},
        },
        "ordering": {"mode": "profiling", "rule": "invented", "data_sha256": None},
        "decoding": {
            "engine": "torch",
            "engine_version": "2.9",
            "hardware": "none",
            "mode": "constrained beam search",
            "dtype": "float32",
            "k": k,
            "beam_width": 50,
            "normalizer": "full",
            "seed": 0,
            "filter_seen": True,
        },
        "filters": [{"name": "seen", "rule": "left out", "removed_items": 8, "sha256": None}],
        "input": {
            "split": "test",
            "template": "invented",
            "history_items": 8,
            "truncated": 0,
            "set_aside_items": 0,
            "prompt_tokens": 40,
        },
        "commitments": {part: sealed.commitment for part, sealed in payload.items()},
        "items": items,
        "certified": True,
        "checks": {"score_difference": {"passed": k, "failed": 0, "undefined": 0}},
        "verdict": "passed",
        "masked": {},
    }
    return record, payload


def make_log(folder: Path, made: list[tuple[dict, Payload]], key: AuditKey, size: int) -> Path:
    """Write a log as the audit stage does; returns its anchor, beside the log's folder."""
    anchor_file = folder.with_name(f"{folder.name}.custody") / "heads.jsonl"
    state = next_state(folder, anchor_file, key.public)
    write_log(folder, made, key, anchor_file, state, NOW, size)
    return anchor_file


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Records of a shard."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def put(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a shard."""
    path.write_bytes(b"".join(canonical(record) + b"\n" for record in records))


def change(record: dict[str, Any], rng: random.Random) -> None:
    """Something that an interested party might want to change."""
    items = record["items"]
    rng.choice(
        (
            lambda: items[rng.randrange(len(items))].update(score=-0.5),
            lambda: items[0].update(item_id="B999999999"),
            lambda: record.update(time="2020-01-01T00:00:00+00:00"),
            lambda: record.update(verdict="failed"),
            lambda: record["user"].update(pseudonym="0" * 64),
            lambda: record["artefacts"].update(model_sha256="2" * 64),
            lambda: record["commitments"].update(input="3" * 64),
            lambda: record["decoding"].update(beam_width=1),
        )
    )()


Place = tuple[str, int]  # file and line that a finding should name


def edit(folder: Path, rng: random.Random) -> Place:
    """Change one record; half of the time its own hash is mended."""
    path = rng.choice(shard_paths(folder))
    records = lines_of(path)
    at = rng.randrange(len(records))
    before = canonical(records[at])
    while canonical(records[at]) == before:
        change(records[at], rng)
    if rng.random() < 0.5:
        records[at]["sha256"] = record_hash(records[at])
    put(path, records)
    return path.name, at + 1


def deletion(folder: Path, rng: random.Random) -> Place:
    """Take records out, not at the end of their shard."""
    path = rng.choice([p for p in shard_paths(folder) if len(lines_of(p)) > 2])
    records = lines_of(path)
    at = rng.randrange(len(records) - 1)
    count = rng.randint(1, min(3, len(records) - 1 - at))
    put(path, records[:at] + records[at + count :])
    return path.name, at + 1


def reordering(folder: Path, rng: random.Random) -> Place:
    """Swap two records of a shard."""
    path = rng.choice([p for p in shard_paths(folder) if len(lines_of(p)) > 1])
    records = lines_of(path)
    one, two = sorted(rng.sample(range(len(records)), 2))
    records[one], records[two] = records[two], records[one]
    put(path, records)
    return path.name, one + 1


def truncation(folder: Path, rng: random.Random) -> Place:
    """Cut records off a shard's end, or a whole shard, or a line in its middle."""
    path = rng.choice(shard_paths(folder))
    lines = path.read_bytes().splitlines(keepends=True)
    how = rng.randrange(3)
    if how == 0:
        last = shard_paths(folder)[-1]
        last.unlink()
        return last.name, 0  # the file; it has no line
    keep = rng.randrange(len(lines))
    rest = lines[keep][: rng.randrange(1, len(lines[keep]) - 1)] if how == 1 else b""
    path.write_bytes(b"".join(lines[:keep]) + rest)
    return path.name, keep + 1


def recomputed(folder: Path, rng: random.Random) -> Place:
    """Change a record, or take the last one out, and mend every hash, root and count."""
    paths = shard_paths(folder)
    path = rng.choice(paths)
    records = lines_of(path)
    at = rng.randrange(len(records))
    before = canonical(records[at])
    while canonical(records[at]) == before:
        change(records[at], rng)
    put(path, records)
    recompute(folder)
    return path.name, at + 1


def recompute(folder: Path) -> None:
    """All that can be computed without the key; the signature stays the old one."""
    head = json.loads((folder / HEAD).read_bytes())
    shards, number = [], 0
    for shard, path in enumerate(shard_paths(folder)):
        records, previous = lines_of(path), genesis(head["log_id"], shard)
        for record in records:
            record.update(record=number, shard=shard, previous_sha256=previous)
            record.update(record_id=f"{head['log_id']}-{number}")
            record["sha256"] = previous = record_hash(record)
            number += 1
        put(path, records)
        shards.append(shard_entry(shard, [record["sha256"] for record in records]))
    head.update(records=number, shards=shards, merkle_root=shards_root(shards))
    write_json(folder / HEAD, head)


def rollback(folder: Path, rng: random.Random) -> Place:
    """Put the older log back whose head the key did sign."""
    older = folder.with_name(f"{folder.name}.older")
    shutil.rmtree(folder)
    older.rename(folder)
    return HEAD, 0


TAMPER: dict[str, Callable[[Path, random.Random], Place]] = {
    "edit": edit,
    "deletion": deletion,
    "reordering": reordering,
    "truncation": truncation,
    "recomputed": recomputed,
    "rollback": rollback,
}


def attack(folder: Path, kind: str, args: Settings, rng: random.Random) -> dict[str, Any]:
    """Make a log, tamper with it, and look whether and where that is found."""
    key = AuditKey(rng.randbytes(32))
    made = [invented(n, key, rng, args.k) for n in range(args.records)]
    if kind == "rollback":  # an older state: the same log before its last records
        make_log(folder, made[: rng.randint(1, len(made) - 1)], key, args.shard_size)
        shutil.copytree(folder, folder.with_name(f"{folder.name}.older"))
    anchor_file = make_log(folder, made, key, args.shard_size)
    sound = not check_log(folder, key.public, anchor_file).findings
    file, line = TAMPER[kind](folder, rng)
    findings = check_log(folder, key.public, anchor_file).findings
    places = {(f.file, f.line or 0) for f in findings}
    # A swap or a mended hash may show at the next line, at which the chain breaks.
    located = any((file, n) in places for n in (line, line + 1))
    result = {
        "kind": kind,
        "place": [file, line],
        "sound_before": sound,
        "detected": bool(findings),
        "located": located,
        "findings": [f.to_json() for f in findings],
    }
    write_json(folder.with_name(f"{folder.name}.findings.json"), result)
    return result


def throughput(folder: Path, args: Settings, rng: random.Random) -> dict[str, float]:
    """Speed of a log of invented lists, and its time over that of the same as plain JSON lines."""
    key = AuditKey(rng.randbytes(32))
    made = [invented(n, key, rng, args.k) for n in range(args.throughput_records)]
    started, cpu = time.perf_counter(), time.process_time()
    make_log(folder / "log", made, key, 10_000)
    ours, cpu = time.perf_counter() - started, time.process_time() - cpu
    started = time.perf_counter()
    plain = [
        json.dumps({**r, "payload": {part: s.content for part, s in p.items()}}) for r, p in made
    ]
    write_text(folder / "plain.jsonl", "\n".join(plain))
    theirs = time.perf_counter() - started
    started = time.perf_counter()
    anchor_file = folder / "log.custody" / "heads.jsonl"
    assert not check_log(folder / "log", key.public, anchor_file).findings
    checked = time.perf_counter() - started
    n = args.throughput_records
    size = sum(path.stat().st_size for path in (folder / "log").iterdir())
    return {
        "records_per_s": round(n / ours, 1),
        "plain_records_per_s": round(n / theirs, 1),
        "times_plain_json": round(ours / theirs, 2),
        "write_ms_per_record": round(1000 * ours / n, 3),
        "write_cpu_ms_per_record": round(1000 * cpu / n, 3),  # what other processes don't change
        "verified_per_s": round(n / checked, 1),
        "bytes_per_record": round(size / n),
    }


class Clock:
    """Adds up wall and processor seconds of what runs inside of it."""

    def __init__(self) -> None:
        """At zero."""
        self.wall, self.cpu = 0.0, 0.0

    def __enter__(self) -> None:
        """Start."""
        self._began = time.perf_counter(), time.process_time()

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self.wall += time.perf_counter() - self._began[0]
        self.cpu += time.process_time() - self._began[1]


def write_run(run: Path, args: Settings, rng: random.Random) -> dict[str, Any]:
    """Write the log of a run and time it beside generation of some of its lists.

    Args:
        run: a copy.
        args: `generated` says how many lists.
        rng: chooses them.
    """
    from genrec.audit.recorded import RecordedRun
    from genrec.audit.records import ENVIRONMENT, build_records, environment
    from genrec.generation.jobs import GenerationJob, generate
    from genrec.generation.users import SplitRows
    from genrec.recommend import Recommender

    manifest = load_manifest(run, "recommend")
    assert manifest is not None
    made = manifest.config
    split = pl.read_parquet(stage_folder(run, "prepare") / f"{made['split']}.parquet", glob=False)
    asked = pl.read_parquet(stage_folder(run, "recommend") / "rows.parquet", glob=False)
    split = asked.select(ROW_ID).join(split, on=ROW_ID, how="left", maintain_order="left")
    chosen = rng.sample(range(len(split)), min(args.generated, len(split)))
    halves = [h for h in (chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]) if h]
    recommender = Recommender.load(
        run, made["model_stage"], "torch", made["normalizer"], made["dtype"], 64
    )
    generation, writing = Clock(), Clock()

    def generate_half(number: int) -> None:
        rows = SplitRows(split[sorted(halves[number])], made["filter_seen"])
        folder = run.with_name(f"generated-{number}")
        job = GenerationJob(rows, folder, made["k"], made["beam_width"], "benchmark")
        with generation:
            generate(recommender, job)

    generate_half(0)
    key, folder = AuditKey(rng.randbytes(32)), stage_folder(run, "audit")
    anchor_file = run.with_name(f"{run.name}.custody") / "heads.jsonl"
    with writing:
        recorded = RecordedRun.load(run)
        write_text(folder / ENVIRONMENT, environment())
        state = next_state(folder, anchor_file, key.public)
        head = write_log(folder, build_records(recorded, key, NOW), key, anchor_file, state, NOW)
    if len(halves) > 1:
        generate_half(1)
    records, size = head["records"], sum(p.stat().st_size for p in folder.iterdir())
    assert not check_log(folder, key.public, anchor_file).findings
    each = writing.wall / records, generation.wall / len(chosen)
    return {
        "records": records,
        "records_per_s": round(1 / each[0], 1),
        "write_seconds": round(writing.wall, 2),
        "write_cpu_seconds": round(writing.cpu, 2),
        "generated": len(chosen),
        "generated_per_s": round(1 / each[1], 1),
        "generation_seconds_then": manifest.seconds,  # of all lists, when the run was made
        "write_overhead": round(each[0] / each[1], 4),
        "write_overhead_cpu": round((writing.cpu / records) / (generation.cpu / len(chosen)), 4),
        "bytes_per_record": round(size / records),
        "users": asked[USER_ID].n_unique(),
    }


def replay_run(run: Path, args: Settings, rng: random.Random) -> dict[str, Any]:
    """Replay some records of a run's log on each engine that is here.

    Args:
        run: with its log.
        args: `replays` says how many records.
        rng: chooses them.
    """
    from genrec.audit.records import read_opened
    from genrec.audit.replay import LEVELS, load_replayer, replay
    from genrec.audit.verify import hashes_now, named_files

    folder = stage_folder(run, "audit")
    total = json.loads((folder / HEAD).read_bytes())["records"]
    wanted = set(rng.sample(range(total), min(args.replays, total)))
    records = [record for record in read_opened(folder, wanted) if not record["erased"]]
    current = hashes_now(run, set().union(*map(named_files, records)))
    found: dict[str, Any] = {"replayed": len(records), "same_list": {}, "replay": {}}
    engines = ["torch", *(["vllm"] if importlib.util.find_spec("vllm") else [])]
    for engine in engines:
        share = {"gpu_memory_utilization": args.gpu_memory_utilization}
        options = share if engine == "vllm" else None
        replayer, began = load_replayer(run, records[0], engine, options), time.perf_counter()
        results = [replay(record, replayer, current) for record in records]
        seconds = time.perf_counter() - began
        for result in results:
            if not result.passed or result.level not in LEVELS[:2]:
                print(result)
        reached = [LEVELS.index(result.level) for result in results]
        found["same_list"][engine] = sum(level <= 1 for level in reached)
        found["replay"][engine] = {
            "made_by": sorted({result.made_by for result in results}),
            "same_bytes": sum(level == 0 for level in reached),
            "same_list": sum(level <= 1 for level in reached),
            "same_set": sum(level <= 2 for level in reached),
            "reproduced": sum(result.passed for result in results),
            "search_difference": max(result.search_difference or 0 for result in results),
            "forced_difference": max(result.forced_difference or 0 for result in results),
            "seconds": round(seconds, 1),
        }
    return found


def of_run(args: Settings, out: Path, rng: random.Random) -> dict[str, Any]:
    """What a run adds to the summary; the run itself stays as it is."""
    if args.run_dir is None:
        return {"replayed": None, "same_list": None, "write_overhead": None}
    unneeded = shutil.ignore_patterns("audit", "*.old-*", "checkpoints")
    run = Path(shutil.copytree(args.run_dir, out / "run", ignore=unneeded))
    return {**write_run(run, args, rng), **replay_run(run, args, rng)}


def main() -> None:
    """Tamper, write, replay, and say what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for item in fields(Settings):
        if item.name == "quick":
            parser.add_argument("--quick", action="store_true")
        else:
            caster = type(item.default) if isinstance(item.default, int | float) else str
            parser.add_argument(f"--{item.name}", type=caster, default=item.default)
    args = Settings(**vars(parser.parse_args()))
    out, rng = Path(args.out), random.Random(args.seed)
    for name in ("tampered", "clean", "throughput", "run", "run.custody", "generated-0",
                 "generated-1"):  # fmt: skip
        shutil.rmtree(out / name, ignore_errors=True)
    detected: Counter[str] = Counter()
    located: Counter[str] = Counter()
    total: Counter[str] = Counter()
    alarms = 0
    for number in range(args.tamperings):
        kind = KINDS[number % len(KINDS)]
        result = attack(out / "tampered" / f"{number:04d}-{kind}", kind, args, rng)
        total[kind] += 1
        detected[kind] += result["detected"]
        located[kind] += result["located"]
        alarms += not result["sound_before"]
    for number in range(args.untouched):
        key = AuditKey(rng.randbytes(32))
        made = [invented(n, key, rng, args.k) for n in range(rng.randint(1, args.records))]
        anchor_file = make_log(out / "clean" / f"{number:04d}", made, key, args.shard_size)
        alarms += bool(check_log(out / "clean" / f"{number:04d}", key.public, anchor_file).findings)
    print(f"{'kind':<12}{'tampered':>9}{'detected':>9}{'located':>9}")
    for kind in total:
        print(f"{kind:<12}{total[kind]:>9}{detected[kind]:>9}{located[kind]:>9}")
    untouched = args.untouched + args.tamperings  # each log is looked at before it is changed
    print(f"{alarms} false alarms on {untouched} untouched logs; kept in {out / 'tampered'}")
    summary = {
        "tampered": total.total(),
        "detected": detected.total(),
        "located": located.total(),
        "untouched": untouched,
        "false_alarms": alarms,
        **throughput(out / "throughput", args, rng),
        **of_run(args, out, rng),
        "machine": machine(),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
