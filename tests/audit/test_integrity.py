"""Logs of invented lists: sound ones are let be, and each tampering is found at its place."""

from __future__ import annotations

import gc
import json
import random
import runpy
import shutil
import sys
import weakref
from pathlib import Path

import pytest

from genrec.audit.anchor import read_anchor, signed
from genrec.audit.canonical import canonical
from genrec.audit.custody import (
    HEAD,
    leaves_file,
    make_head,
    next_state,
    read_log,
    record_hash,
    seal,
    shard_entry,
    shard_name,
    write_log,
)
from genrec.audit.integrity import check_log
from genrec.audit.keys import AuditKey
from genrec.audit.proofs import check_proof, prove

_BENCHMARK = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks" / "audit.py"
KEY = AuditKey(b"k" * 32)
N, SIZE = 10, 4


@pytest.fixture(scope="module")
def bench():
    """The benchmark's module: it invents records, writes logs and tampers with them."""
    return runpy.run_path(str(_BENCHMARK), run_name="audit_benchmark")


@pytest.fixture(scope="module")
def made(bench):
    rng = random.Random(1)
    return [bench["invented"](n, KEY, rng, 3) for n in range(N)]


@pytest.fixture
def log(bench, made, tmp_path):
    """(folder, anchor) of a log of three shards."""
    return tmp_path / "audit", bench["make_log"](tmp_path / "audit", made, KEY, SIZE)


def said(log, key=KEY.public, anchor=True) -> str:
    return "\n".join(map(str, check_log(log[0], key, log[1] if anchor else None).findings))


def shard(log, number: int) -> Path:
    return log[0] / shard_name(number)


def records(log, number: int) -> list[dict]:
    return [json.loads(line) for line in shard(log, number).read_bytes().splitlines()]


def put(log, number: int, lines: list[dict]) -> None:
    shard(log, number).write_bytes(b"".join(canonical(line) + b"\n" for line in lines))


def test_a_sound_log_has_no_findings(log):
    state = check_log(log[0], KEY.public, log[1])
    assert state.findings == [] and (state.records, state.shards) == (N, 3)
    assert [len(records(log, n)) for n in range(3)] == [4, 4, 2]
    assert [r["record"] for r in read_log(log[0])] == list(range(N))
    assert said(log, anchor=False) == ""
    leaves_file(log[1], state.head).unlink()  # they only locate
    assert said(log) == ""


def test_chains_and_numbers(made):
    shared = {name: made[0][0][name] for name in ("schema", "artefacts", "decoding", "time")}
    made = [({**record, **shared}, payload) for record, payload in made]  # the same objects
    made[7][0]["artefacts"] = {**shared["artefacts"], "model_stage": "grpo"}
    lines = list(seal(made, "a" * 12, SIZE))
    sealed = [json.loads(line.data) for line in lines]
    assert [line.data for line in lines] == [canonical(record) + b"\n" for record in sealed]
    assert [{name: r[name] for name in made[0][0]} for r in sealed] == [r for r, _ in made]
    assert [line.number for line in lines] == [r["record"] for r in sealed] == list(range(N))
    assert [line.payload for line in lines] == [payload for _, payload in made]
    assert [r["shard"] for r in sealed] == [0] * 4 + [1] * 4 + [2] * 2
    for before, after in zip(sealed, sealed[1:], strict=False):
        chained = after["previous_sha256"] == before["sha256"]
        assert chained == (before["shard"] == after["shard"])
    assert len({sealed[n]["previous_sha256"] for n in (0, 4, 8)}) == 3
    assert all(r["sha256"] == record_hash(r) for r in sealed)


def test_records_are_let_go_once_they_are_written(made, tmp_path):
    """A log of any length is written in the memory of a few records and a shard's hashes."""

    class Token:
        """Lives as long as the record that holds it."""

    class User(dict):
        token: Token

    alive: weakref.WeakSet[Token] = weakref.WeakSet()

    def drawn():
        for number in range(60):
            content, payload = made[number % N]
            user = User(content["user"])
            user.token = Token()
            alive.add(user.token)
            assert len(alive) <= 3
            yield {**content, "user": user}, payload

    write_log(tmp_path / "a", drawn(), KEY, tmp_path / "heads.jsonl", ("a" * 12, 1), "now", 25)
    assert gc.isenabled() and gc.get_freeze_count() == 0  # as it was before
    assert check_log(tmp_path / "a", KEY.public, tmp_path / "heads.jsonl").records == 60


@pytest.mark.parametrize(
    "change, says",
    [
        ({"verdict": "fine"}, r"at \$\.verdict: "),
        ({"verdict": None}, r"at \$\.verdict: "),
        ({"verdict": ...}, '"verdict" is a required property'),
        ({"mood": "fine"}, "'mood' was unexpected"),
        ({"input": {"split": "\ud800"}}, "fit the schema: "),
        ({"schema": 2}, "schema version 2"),
    ],
)
def test_a_record_that_does_not_fit_leaves_no_log(change, says, made, tmp_path):
    """Of a record that follows others only what differs from the one before is checked."""
    shared = {name: made[0][0][name] for name in ("schema", "artefacts", "decoding", "time")}
    made = [({**record, **shared}, payload) for record, payload in made]
    unfit = {name: v for name, v in {**made[5][0], **change}.items() if v is not ...}
    wrong = [*made[:5], (unfit, made[5][1])]
    folder, anchor_file = tmp_path / "audit", tmp_path / "heads.jsonl"
    with pytest.raises(ValueError, match=f"record 5: .*({says}).*; no log was written"):
        write_log(folder, wrong, KEY, anchor_file, ("a" * 12, 1), "now", SIZE)
    assert not (folder / HEAD).exists() and not anchor_file.exists()
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.glob("*.leaves"))


def test_an_edited_line(log):
    lines = records(log, 1)
    lines[2]["items"][0]["score"] = -0.1
    put(log, 1, lines)
    place = "edit: audit-00001.jsonl, line 3: "
    assert said(log) == f"{place}its content doesn't match its own hash: it was changed"
    lines[2]["sha256"] = record_hash(lines[2])  # the editor mends the line's own hash
    put(log, 1, lines)
    assert "edit: audit-00001.jsonl, line 4: it doesn't follow the line before it" in said(log)
    assert "forgery: audit-00001.jsonl, line 3: it is sound in itself" in said(log)


def test_deleted_doubled_and_swapped_lines(log):
    lines = records(log, 1)
    put(log, 1, [lines[0], *lines[3:]])
    assert said(log) == "deletion: audit-00001.jsonl, line 2: records 5 to 6 are missing before it"
    put(log, 1, [lines[2], lines[1], lines[0], lines[3]])
    text = said(log)
    assert "reordering: audit-00001.jsonl, line 1: it is record 6, record 4 belongs here" in text
    assert "line 3: it is record 4, record 6 belongs here" in text and text.count("\n") == 1
    put(log, 1, [*lines, lines[3]])
    assert "insertion: audit-00001.jsonl, line 5: it is record 7, record 8 belongs here" in said(
        log
    )


def test_cut_tails(log):
    whole = shard(log, 2).read_bytes()
    put(log, 2, records(log, 2)[:1])
    assert said(log) == "truncation: audit-00002.jsonl, line 2: record 9 is cut off at its end"
    shard(log, 2).write_bytes(whole[:-20])
    assert "line 2: the last line is cut off: it has no line end" in said(log)
    shard(log, 2).unlink()
    assert said(log) == "truncation: audit-00002.jsonl: the shard is missing; it held 2 records"
    shard(log, 0).unlink()
    assert "deletion: audit-00000.jsonl: the shard is missing; it held 4 records" in said(log)


@pytest.mark.parametrize("name", ["audit-000000.jsonl", "audit-٠٠٠٠٠.jsonl", "audit-0.jsonl",
                                  "audit-copy.jsonl"])  # fmt: skip
def test_no_second_name_of_a_shard_hides_the_first(log, name):
    (log[0] / name).write_bytes(shard(log, 0).read_bytes())
    assert said(log) == f"insertion: {name}: no name of a shard"
    assert [r["record"] for r in read_log(log[0])] == list(range(N))  # as verified, each once
    lines = records(log, 0)
    lines[1]["verdict"] = "failed"
    put(log, 0, lines)
    assert "edit: audit-00000.jsonl, line 2: its content doesn't match its own hash" in said(log)
    assert [r["verdict"] for r in read_log(log[0])].count("failed") == 1


def test_a_shard_that_was_taken_out_of_the_head_too(bench, log):
    shard(log, 2).unlink()
    bench["recompute"](log[0])
    text = said(log)
    assert "deletion: audit-00002.jsonl: records 8 to 9 are among those that were anchored" in text
    assert "signature is not valid" in text


def test_whoever_recomputes_everything_needs_the_key(bench, log):
    lines = records(log, 0)
    lines[1]["verdict"] = "failed"
    put(log, 0, lines)
    bench["recompute"](log[0])
    text = said(log)
    assert "forgery: head.json: its signature is not valid under this key" in text
    assert "forgery: audit-00000.jsonl, line 2: it is sound in itself" in text
    assert "signature is not valid" in said(log, anchor=False)
    other = AuditKey(b"x" * 32)
    state = (lines[0]["log_id"], 1)
    entries = [shard_entry(n, [r["sha256"] for r in records(log, n)]) for n in range(3)]
    (log[0] / HEAD).write_bytes(canonical(make_head(entries, other, state, "now")))
    assert "another key, or a forged head" in said(log)
    leaves_file(log[1], {"log_id": state[0], "counter": 1}).unlink()
    assert "its records are not those that were anchored" in said(log)


def test_an_older_log_that_was_signed(bench, made, log):
    older = shutil.copytree(log[0], log[0].with_name("older"))
    more = [*made, bench["invented"](N, KEY, random.Random(2), 3)]
    assert next_state(log[0], log[1], KEY.public)[1] == 2
    with pytest.raises(ValueError, match="no head can be added; restore it, or name another"):
        next_state(log[0], log[1], AuditKey(b"x" * 32).public)
    bench["make_log"](log[0], more, KEY, SIZE)
    assert said(log) == ""
    assert len({entry["log_id"] for entry in read_anchor(log[1], KEY.public).entries}) == 1
    put_back = (older, log[1])
    assert said(put_back).startswith("rollback: head.json: it is state 1 of ")
    assert said(put_back, anchor=False) == ""  # the signature alone can't tell
    log[1].unlink()
    assert "is missing" in said(log) and "no head of log" in said(log)


@pytest.mark.parametrize("lost", ["head", "folder", "killed", "foreign head"])
def test_an_older_log_put_back_is_found_although_the_id_was_lost(bench, made, log, lost):
    """What a folder held before stands in the anchor, whatever is taken out of the folder."""
    older = shutil.copytree(log[0], log[0].with_name("older"))
    log_id = next_state(log[0], log[1], KEY.public)[0]
    head = json.loads((log[0] / HEAD).read_bytes())
    (log[0] / HEAD).unlink()
    if lost == "folder":
        shutil.rmtree(log[0])
    elif lost == "killed":  # the folder was set aside, and no head is there yet
        log[0].rename(log[0].with_name("audit.old-1"))
        log[0].mkdir()
    elif lost == "foreign head":
        (log[0] / HEAD).write_text(json.dumps({**head, "log_id": "b" * 12}))
    state = next_state(log[0], log[1], KEY.public)
    assert state == ((log_id, 2) if lost != "foreign head" else ("b" * 12, 2))
    write_log(log[0], made[:5], KEY, log[1], state, "2026-01-02", SIZE)
    assert said(log) == ""
    assert said((older, log[1])).startswith("rollback: head.json: it is state 1 of ")


def test_a_log_whose_anchor_names_no_folder(bench, made, log):
    """As earlier versions wrote it; the head's id is what a rewrite goes on from."""
    (entry,) = read_anchor(log[1], KEY.public).entries
    bare = {n: v for n, v in entry.items() if n not in ("folder", "key_id", "signature")}
    log[1].write_bytes(canonical(signed(bare, KEY)) + b"\n")
    assert said(log) == ""
    older = shutil.copytree(log[0], log[0].with_name("older"))
    bench["make_log"](log[0], made, KEY, SIZE)
    assert said(log) == "" and said((older, log[1])).startswith("rollback: head.json: it is state")
    (log[0] / HEAD).unlink()
    assert next_state(log[0], log[1], KEY.public) == (entry["log_id"], 3)


def test_missing_key_and_head(log):
    assert said(log, key=None) == ""  # verify says that nothing signed was checked
    for broken in (b"", b"[]", b"{}", b"[" * 100_000, b'{"a": NaN}'):
        (log[0] / HEAD).write_bytes(broken)
        assert said(log)
    (log[0] / HEAD).unlink()
    assert "head: head.json: it can't be read" in said(log)


@pytest.mark.parametrize(
    "line", [b"", b"nonsense", b"[1]", b'{"a": 1}', b'{"a":NaN}', b"[" * 100_000, b"\xff\xfe",
             b"null", b'{"a":1}', b'{"record":1000000000000,"schema":3}', b'{"schema":1}'],
)  # fmt: skip
def test_any_bytes_in_the_log_are_findings_not_crashes(log, line):
    shard(log, 2).write_bytes(shard(log, 2).read_bytes() + line + b"\n")
    assert "audit-00002.jsonl, line 3: " in said(log)


def test_other_schemas_are_said_to_be_such(log):
    lines = records(log, 0)
    lines[0] = {**lines[0], "schema": 4}
    put(log, 0, lines)
    assert "schema: audit-00000.jsonl, line 1: it has schema version 4" in said(log)
    for path in log[0].glob("audit-*.jsonl"):
        path.unlink()
    (log[0] / HEAD).unlink()
    with pytest.raises(ValueError, match="does not exist; run: genrec audit"):
        check_log(log[0], KEY.public, log[1])
    (log[0] / "audit.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="is a log of schema 1, this genrec reads 3.*--overwrite"):
        check_log(log[0], KEY.public, log[1])


@pytest.mark.parametrize("kind", ["edit", "deletion", "reordering", "truncation", "recomputed",
                                  "rollback"])  # fmt: skip
def test_random_tamperings_are_found_and_located(bench, tmp_path, kind):
    rng = random.Random(kind)
    args = bench["Settings"](records=9, shard_size=4, k=2)
    for number in range(3):
        result = bench["attack"](tmp_path / f"{number}", kind, args, rng)
        assert result["sound_before"] and result["detected"] and result["located"], result


def test_the_benchmark_says_what_it_found(bench, tmp_path, monkeypatch, capsys):
    sizes = ["--tamperings", "6", "--untouched", "2", "--throughput_records", "5"]
    monkeypatch.setattr(sys, "argv", ["audit.py", "--out", str(tmp_path), "--records", "5", *sizes,
                                      "--shard_size", "3"])  # fmt: skip
    bench["main"]()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tampered"] == found["detected"] == 6 and found["false_alarms"] == 0
    assert found["replayed"] is None and found["same_list"] is None
    assert found["records_per_s"] > 0 and found["times_plain_json"] > 0
    assert len(list((tmp_path / "tampered").glob("*.findings.json"))) == 6


@pytest.mark.parametrize("number", [0, 3, 4, 9])
def test_a_proof_needs_no_other_record(log, number):
    proof = json.loads(canonical(prove(log[0], number, ["input"])))
    assert check_proof(proof, KEY.public) == []
    assert "u" + str(number) not in json.dumps(proof)  # the identity is not revealed
    text = json.dumps(proof)
    others = [r["sha256"] for r in read_log(log[0]) if r["record"] not in (number, number - 1)]
    last = proof["shard"]["last_sha256"]
    assert not any(sha256 in text for sha256 in others if sha256 != last)


def test_no_changed_proof_holds(log):
    def wrong(**changes) -> str:
        return "; ".join(check_proof({**proof, **changes}, KEY.public))

    proof = json.loads(canonical(prove(log[0], 5, ["input", "chains"])))
    changed = {**proof["record"], "verdict": "failed"}
    assert "doesn't match its hash" in wrong(record=changed)
    assert "not in the shard" in wrong(record={**changed, "sha256": record_hash(changed)})
    assert "not in the shard" in wrong(record=list(read_log(log[0]))[4])
    assert "not in the log" in wrong(shard={**proof["shard"], "records": 3})
    assert "signature is not valid" in wrong(head={**proof["head"], "records": 99})
    shown = {**proof["payload"]["input"], "content": {"history": []}}
    assert "the input shown is not what" in wrong(payload={"input": shown})
    assert "no whole proof" in wrong(path=[]) and "no whole proof" in wrong(record=None)
    assert "it is no proof" in check_proof([], KEY.public)[0]
    assert "signature is not valid" in check_proof(proof, AuditKey(b"x" * 32).public)[0]


def test_what_can_not_be_proven_is_refused(log):
    with pytest.raises(ValueError, match=r"record=99 is not in the log; it has 0..9"):
        prove(log[0], 99)
    with pytest.raises(ValueError, match="reveal='all' is no part"):
        prove(log[0], 0, ["all"])
    put(log, 0, records(log, 0)[:-1])
    with pytest.raises(ValueError, match="don't give the root"):
        prove(log[0], 0)
