"""The explain, audit and trace recipes as a user runs them, on a run around a random model."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sqlite3
import stat
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.artifacts import Stage, load_manifest
from genrec.audit.records import read_opened
from genrec.audit.replay import load_replayer, replay
from genrec.audit.verify import hashes_now, named_files
from genrec.chains import read_chains

_shared = runpy.run_path(str(Path(__file__).resolve().parents[1] / "explain" / "conftest.py"))
make_listed_run, call = _shared["make_listed_run"], _shared["call_recipe"]
EXPLAIN = ("--num_rows", "5", "--samples", "50")


@pytest.fixture(scope="module")
def listed(tiny, tmp_path_factory) -> Path:
    """Stages prepare … recommend, read only."""
    return make_listed_run(tiny, tmp_path_factory.mktemp("listed") / "run", strings=False)


@pytest.fixture(scope="module")
def finished(listed, tmp_path_factory) -> Path:
    """Explained and audited, read only."""
    run = shutil.copytree(listed, tmp_path_factory.mktemp("finished") / "run")
    call("explain", "--run_dir", str(run), *EXPLAIN)
    call("audit", "--run_dir", str(run))
    return run


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    shutil.copytree(custody(finished), tmp_path / "run.custody")
    return shutil.copytree(finished, tmp_path / "run")


def custody(run: Path) -> Path:
    """Where key and anchor of a run lie."""
    return run.with_name(f"{run.name}.custody")


def refused(capsys, name: str, *args: str) -> str:
    """Error line of a recipe that must end with status 2."""
    with pytest.raises(SystemExit) as stop:
        call(name, *args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("error: ") == 1
    return error


def test_explain_writes_chains_and_evidence(finished):
    chains = read_chains(finished / "explanations" / "chains.jsonl")
    evidence = pl.read_parquet(finished / "explanations" / "evidence.parquet")
    manifest = load_manifest(finished, "explain")
    assert manifest is not None and manifest.rows == len(chains) == 5 * 6
    upstream = {"prepare", "embed", "quantize", "build_dataset", "sft", "recommend"}
    assert set(manifest.inputs) == upstream and manifest.config["normalizer"] == "full"
    assert {c.rationale_origin for c in chains} == {"template"}
    rows = dict(
        pl.read_parquet(finished / "data" / "test.parquet")
        .select("row_id", "history_item_index")
        .iter_rows()
    )
    ids = pl.read_parquet(finished / "data" / "catalog.parquet")["item_id"]
    assert evidence.columns == [
        "row_id", "rank", "item_id", "position", "history_item_id", "delta", "rank_without",
        "cited",
    ]  # fmt: skip
    assert len(evidence) == sum(6 * len(rows[r]) for r in {c.row_id for c in chains})
    for row_id, position, item in evidence.select(
        "row_id", "position", "history_item_id"
    ).iter_rows():
        assert ids[rows[row_id][position]] == item
    keys = ["row_id", "item_id"]
    cited = {
        k: v
        for *k, v in evidence.filter("cited").group_by(keys).len().iter_rows()
        for k in [tuple(k)]
    }
    for chain in chains:
        step = chain.step("evidence")
        assert step is not None and len(step.measured["positions"]) == cited.get(
            (chain.row_id, chain.item_id), 0
        )
        deltas = evidence.filter(row_id=chain.row_id, item_id=chain.item_id).sort("position")[
            "delta"
        ]
        positions, added = step.measured["positions"], step.measured["deltas"]
        assert step.measured["joint"] and min(added, default=1) > 0.001
        if positions:  # the first is the costliest by itself, the next ones beside it
            assert deltas[positions[0]] == added[0] == max(deltas)
    assert manifest.metrics["verdicts"]["score_difference"] == {"share": 1.0, "checked": 30}
    rules = [t["rule"] for t in manifest.metrics["thresholds"]]
    assert rules == manifest.config["thresholds"] and "target_leak <= 0" in rules
    sets = pl.read_parquet(finished / "explanations" / "counterfactuals.parquet")
    assert sets["rank"].to_list() == [1] * sets.height  # the first item of each list
    assert sets.height == sum(bool(len(rows[r])) for r in {c.row_id for c in chains})
    assert manifest.metrics["counterfactuals"]["found"] == sets["found"].sum() > 0
    told = [c for c in chains if c.step("counterfactual")]
    assert len(told) == sets.height and {c.rank for c in told} == {1}


def test_the_same_settings_give_the_same_bytes(finished, copied):
    path = copied / "explanations" / "manifest.json"
    before = path.stat().st_mtime_ns
    call("explain", "--run_dir", str(copied), *EXPLAIN)
    call("audit", "--run_dir", str(copied))
    assert path.stat().st_mtime_ns == before  # skipped
    assert not (copied / "audit.old-1").exists()
    call("explain", "--run_dir", str(copied), *EXPLAIN, "--overwrite", "true")
    for name in ("chains.jsonl", "evidence.parquet", "counterfactuals.parquet"):
        old, new = (run / "explanations" / name for run in (finished, copied))
        assert old.read_bytes() == new.read_bytes()


def test_named_users_are_explained_too(listed, tmp_path):
    run = shutil.copytree(listed, tmp_path / "run")
    rows = pl.read_parquet(run / "recommendations" / "rows.parquet")
    last = rows.row(-1, named=True)
    call(
        "explain", "--run_dir", str(run), "--num_rows", "1", "--users", last["user_id"], "--k", "2"
    )
    chains = read_chains(run / "explanations" / "chains.jsonl")
    assert last["row_id"] in {c.row_id for c in chains} and {c.rank for c in chains} == {1, 2}


def test_citations_by_single_effects(listed, tmp_path):
    run = shutil.copytree(listed, tmp_path / "run")
    call("explain", "--run_dir", str(run), *EXPLAIN, "--selection", "single")
    evidence = pl.read_parquet(run / "explanations" / "evidence.parquet")
    for chain in read_chains(run / "explanations" / "chains.jsonl"):
        step = chain.step("evidence")
        own = evidence.filter(row_id=chain.row_id, item_id=chain.item_id).sort("position")["delta"]
        assert [own[p] for p in step.measured["positions"]] == step.measured["deltas"]
        assert all(np.diff(step.measured["deltas"]) <= 0) and not step.measured["joint"]
        agreement = chain.check("evidence_agreement").value
        assert agreement == 1 if step.measured["positions"] else agreement is None


def test_sets_that_were_not_found_are_not_said_to_be_absent(listed, tmp_path):
    run = shutil.copytree(listed, tmp_path / "run")
    call("explain", "--run_dir", str(run), *EXPLAIN, "--counterfactual_size", "1")
    call("audit", "--run_dir", str(run))
    manifest = load_manifest(run, "explain")
    assert manifest is not None
    told = manifest.metrics["counterfactuals"]
    assert told["most"] == 1 and 0 < told["found"] < told["items"]
    page = (run / "audit" / "report.html").read_text()
    assert f"leave the list when some history items are gone ({told['found']} without 1)" in page
    assert "For the others the search found none of at most 1, which is no proof" in page
    texts = {
        step.text
        for chain in read_chains(run / "explanations" / "chains.jsonl")
        if (step := chain.step("counterfactual"))
    }
    assert any("greedy search found no set of at most 1 history item " in text for text in texts)
    assert "small set" not in page and not any("small set" in text for text in texts)


def test_bad_explain_input(capsys, listed, tmp_path):
    error = refused(capsys, "explain", "--run_dir", str(listed), "--users", "nobody")
    assert "['nobody'] have no list" in error and "e.g. of users u" in error
    error = refused(capsys, "explain", "--run_dir", str(listed), "--k", "0")
    assert "k=0 must be at least 1" in error
    error = refused(capsys, "explain", "--run_dir", str(listed), "--thresholds", "precision > 0")
    assert "names 'precision', which isn't measured" in error
    error = refused(capsys, "explain", "--run_dir", str(tmp_path / "none"))
    assert "has not finished" in error and "genrec recommend" in error
    assert not (listed / "explanations").exists()


def test_audit_without_what_it_needs(capsys, listed, tmp_path):
    shutil.copytree(listed / "data", tmp_path / "run" / "data")
    error = refused(capsys, "audit", "--run_dir", str(tmp_path / "run"))
    assert "stage 'recommend' has not finished" in error
    assert not custody(tmp_path / "run").exists() and not (tmp_path / "run" / "audit").exists()
    error = refused(capsys, "audit", "verfy", "--run_dir", str(listed))
    assert "'verfy' is no verb of audit; use keygen, verify, replay" in error
    assert "does not exist" in refused(capsys, "audit", "verify", "--run_dir", str(listed))


def test_verify_and_its_exit_status(capsys, copied, tmp_path):
    call("audit", "verify", "--run_dir", str(copied))
    assert "OK: 14 records in 1 shards, chains and numbering whole" in capsys.readouterr().out
    path = copied / "audit" / "audit-00000.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:-2]) + b"\n")
    report = tmp_path / "verified.json"
    with pytest.raises(SystemExit) as stop:
        call("audit", "verify", "--run_dir", str(copied), "--report", str(report))
    said = capsys.readouterr().out
    assert stop.value.code == 1 and "record 13 is cut off at its end" in said
    found = json.loads(report.read_text())
    assert not found["verified"] and found["findings"][0]["line"] == 14
    assert found["findings"][0]["kind"] == "truncation" and "NOT verified: " in said


def test_prove_check_erase_and_report(capsys, copied, tmp_path):
    proof, where = tmp_path / "proof.json", ("--run_dir", str(copied))
    call("audit", "prove", *where, "--record", "2", "--reveal", "input", "--output", str(proof))
    shown = ("--proof", str(proof), "--public_key", str(custody(copied) / "audit.pub"))
    call("audit", "check", *shown)
    assert "OK: record 2 of 14 in log" in capsys.readouterr().out
    row = pl.read_parquet(copied / "data" / "test.parquet")
    chains = read_chains(copied / "explanations" / "chains.jsonl")
    first = sorted({chain.row_id for chain in chains})[0]
    user = row.filter(pl.col("row_id") == first)["user_id"][0]
    call("audit", "erase", *where, "--user", str(user))
    asked = pl.read_parquet(copied / "recommendations" / "rows.parquet")["row_id"].to_list()
    number = str(asked.index(first))
    assert f"erased 1 payloads of 1 records: [{number}]" in capsys.readouterr().out
    page = (copied / "audit" / "report.html").read_text()
    assert first not in page and "The user was erased" in page
    call("audit", "verify", *where)
    assert "(1 erased)" in capsys.readouterr().out
    call("audit", "replay", *where, "--record", number)
    assert f"record {number}: erased: its payload is gone" in capsys.readouterr().out
    call("audit", "report", *where, "--report_users", "2")
    assert (copied / "audit" / "report.html").read_text().count("<article") == 2
    proof.write_text(proof.read_text().replace('"beam_width": 12', '"beam_width": 13'))
    with pytest.raises(SystemExit) as stop:
        call("audit", "check", *shown)
    assert stop.value.code == 1 and "match its hash" in capsys.readouterr().out
    assert "name the user" in refused(capsys, "audit", "erase", *where)


def test_what_erase_can_not_reach_is_named(capsys, copied):
    """A page that shows the user is gone whatever else can't be erased."""
    old = shutil.copytree(copied / "audit", copied / "audit.old-1")
    (old / "payloads.sqlite").write_bytes(b"nonsense" * 1000)
    user = pl.read_parquet(copied / "recommendations" / "rows.parquet")["user_id"][0]
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            call("audit", "erase", "--run_dir", str(copied), "--user", str(user))
        said = capsys.readouterr().out
        assert stop.value.code == 1 and "payloads of 1 records: [0]" in said
        assert f"NOT erased: {old / 'payloads.sqlite'}: " in said and "can't be read" in said
        assert not (old / "report.html").exists()
        assert "The user was erased" in (copied / "audit" / "report.html").read_text()
    shutil.rmtree(old)
    call("audit", "erase", "--run_dir", str(copied), "--user", str(user))


def test_an_erased_user_stays_erased_when_the_log_is_made_again(capsys, copied, tmp_path):
    where, again = ("--run_dir", str(copied)), ("--overwrite", "true")
    asked = pl.read_parquet(copied / "recommendations" / "rows.parquet")
    row, user = asked.row(0)
    assert row.encode() in (copied / "audit" / "payloads.sqlite").read_bytes()
    call("audit", "erase", *where, "--user", str(user))
    for size in ("5", "6"):
        call("audit", *where, "--shard_size", size, *again)
        assert "1 of erased users without payload" in capsys.readouterr().out
        assert row.encode() not in (copied / "audit" / "payloads.sqlite").read_bytes()
        page = (copied / "audit" / "report.html").read_text()
        assert row not in page and "1 of these records were erased" in page
        call("audit", "verify", *where)
        assert "OK: 14 records" in (said := capsys.readouterr().out) and "(1 erased)" in said
        for old in copied.glob("audit.old-*"):  # the anchor knows without them
            shutil.rmtree(old)
    call("audit", "erase", *where, "--user", str(user))
    assert "erased 0 payloads of 1 records: [0]" in capsys.readouterr().out
    # Under another key the user can't be known again.
    other = ("--key_file", str(tmp_path / "other" / "audit.key"))
    assert "were erased under key" in refused(capsys, "audit", *where, *other, *again)
    assert not (tmp_path / "other").exists() and not (copied / "audit.old-1").exists()
    (copied / "audit" / "erasures.jsonl").unlink()
    call("audit", *where, *other, *again)
    assert " 0 of erased users" in capsys.readouterr().out


def test_keys_inside_the_run_are_refused(capsys, listed, copied, tmp_path):
    for verb in ((), ("keygen",)):
        inside = ("--run_dir", str(copied), "--key_file", str(copied / "audit.key"))
        error = refused(capsys, "audit", *verb, *inside)
        assert "lies inside the run folder" in error and not (copied / "audit.key").exists()
    error = refused(capsys, "audit", "--run_dir", str(copied), "--anchor_file",
                    str(copied / "heads.jsonl"))  # fmt: skip
    assert "anchor_file=" in error and "lies inside the run folder" in error
    key = tmp_path / "safe" / "audit.key"
    call("audit", "keygen", "--run_dir", str(copied), "--key_file", str(key))
    assert "made key" in capsys.readouterr().out and key.with_suffix(".pub").is_file()
    again = refused(capsys, "audit", "keygen", "--run_dir", str(copied), "--key_file", str(key))
    assert "a key is never overwritten" in again


def test_replay_and_its_exit_status(capsys, copied):
    call("audit", "replay", "--run_dir", str(copied), "--record", "0")
    assert "record 0: reproduced, same" in capsys.readouterr().out
    call("audit", "replay", "--run_dir", str(copied), "--all")
    assert "14 of 14 records reproduced" in capsys.readouterr().out
    path = copied / "audit" / "audit-00000.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[1]["items"].reverse()
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    with pytest.raises(SystemExit) as stop:
        call("audit", "replay", "--run_dir", str(copied), "--all")
    said = capsys.readouterr().out
    assert stop.value.code == 1
    assert "record 1: NOT reproduced, same set" in said and "13 of 14 records reproduced" in said
    for flags in ((), ("--record", "0", "--all")):
        assert "name one record" in refused(capsys, "audit", "replay", *flags)
    error = refused(capsys, "audit", "replay", "--run_dir", str(copied), "--record", "14")
    assert "record=14 is not in the log; it has 0..13" in error
    call("audit", "replay", "--run_dir", str(copied), "--record-id", records[0]["record_id"])
    assert "record 0: reproduced" in capsys.readouterr().out


def test_the_key_stays_outside_the_run(capsys, finished, copied, tmp_path):
    assert stat.S_IMODE((custody(finished) / "audit.key").stat().st_mode) == 0o600
    manifest = load_manifest(finished, "audit")
    assert manifest is not None and set(manifest.outputs) == {
        "audit-00000.jsonl", "head.json", "environment.txt", "config.yaml",
    }  # fmt: skip
    secret = (custody(finished) / "audit.key").read_text().strip().encode()
    assert not any(secret in p.read_bytes() for p in finished.rglob("*") if p.is_file())
    (custody(copied) / "audit.key").unlink()
    error = refused(capsys, "audit", "--run_dir", str(copied))
    assert "a log was signed already" in error and not (custody(copied) / "audit.key").exists()
    key = tmp_path / "safe" / "k"
    call("audit", "--run_dir", str(copied), "--key_file", str(key), "--overwrite", "true")
    call("audit", "verify", "--run_dir", str(copied), "--key_file", str(key))
    assert (copied / "audit.old-1" / "audit-00000.jsonl").exists()


def test_an_older_log_put_back_is_a_rollback(capsys, copied):
    call("audit", "--run_dir", str(copied), "--shard_size", "2", "--overwrite", "true")
    call("audit", "verify", "--run_dir", str(copied))
    assert "14 records in 7 shards" in capsys.readouterr().out
    shutil.rmtree(copied / "audit")
    shutil.move(copied / "audit.old-1", copied / "audit")
    with pytest.raises(SystemExit):
        call("audit", "verify", "--run_dir", str(copied))
    assert "rollback: head.json: it is state 1 of" in capsys.readouterr().out


def test_a_rebuilt_upstream_stage_is_refused(capsys, copied):
    manifest = copied / "recommendations" / "manifest.json"
    value = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**value, "content_hash": "0" * 64}))
    error = refused(capsys, "audit", "--run_dir", str(copied))
    assert "was built from 'recommend'" in error and "genrec explain" in error


def test_users_who_opted_out_of_profiling(capsys, listed, tmp_path):
    """Their lists use nothing of theirs, each has a record, and a replay is without the model."""
    run, out = shutil.copytree(listed, tmp_path / "run"), tmp_path / "opted-out.csv"
    split = pl.read_parquet(run / "data" / "test.parquet")
    users = split["user_id"].to_list()
    pl.DataFrame({"user_id": [users[2], users[5], "u999"]}).write_csv(out)
    again = ("--run_dir", str(run), "--k", "6", "--beam_width", "12", "--overwrite", "true")
    call("recommend", *again, "--opt_out", str(out))
    assert "2 lists by popularity for users who opted out" in capsys.readouterr().out
    folder = run / "recommendations"
    asked = pl.read_parquet(folder / "rows.parquet")
    assert asked.height == 12 and not {users[2], users[5]} & set(asked["user_id"])
    catalog = pl.read_parquet(run / "data" / "catalog.parquet")
    counts = dict(catalog.select("item_id", "train_count").iter_rows())
    order = sorted(
        catalog["item_id"], key=lambda i: (-counts[i], catalog["item_id"].to_list().index(i))
    )
    lists = pl.read_parquet(folder / "non-profiling.parquet")
    for (user,), part in lists.partition_by("user_id", as_dict=True).items():
        assert user in (users[2], users[5]) and part["rank"].to_list() == [1, 2, 3, 4, 5, 6]
        assert part["item_id"].to_list() == order[:6]
        assert part["score"].to_list() == [counts[i] for i in order[:6]]
    call("explain", "--run_dir", str(run), "--num_rows", "3", "--samples", "20")
    call("audit", "--run_dir", str(run), "--report_users", "14")
    *others, one, two = map(json.loads, (run / "audit" / "audit-00000.jsonl").open())
    assert {r["ordering"]["mode"] for r in others} == {"profiling"} and len(others) == 12
    for record in (one, two):
        assert record["ordering"]["mode"] == "non-profiling" and record["decoding"] is None
        assert record["ordering"]["rule"].startswith("popularity") and record["filters"] == []
        assert record["commitments"]["input"] is None and record["commitments"]["identity"]
        assert record["input"]["history_items"] == record["input"]["prompt_tokens"] == 0
        assert set(record["artefacts"]["files"]) == {
            "data/catalog.parquet", "audit/environment.txt", "recommendations/non-profiling.parquet"
        }  # fmt: skip
    with sqlite3.connect(run / "audit" / "payloads.sqlite") as store:
        parts = store.execute("SELECT part FROM payload WHERE record >= 12").fetchall()
    store.close()
    assert parts == [("identity",), ("identity",)]  # nothing of theirs but who they are
    page = (run / "audit" / "report.html").read_text()
    assert page.count("this user opted out of profiling") == 2
    assert "2 lists of users who opted out of profiling use no history: 2 by popularity" in page
    assert page.count("Chosen next:") == 12
    capsys.readouterr()
    call("audit", "verify", "--run_dir", str(run))
    call("audit", "replay", "--run_dir", str(run), "--all")
    said = capsys.readouterr().out
    assert "record 13: reproduced, same bytes; by popularity, without a model" in said
    assert "14 of 14 records reproduced" in said
    call("audit", "replay", "--run_dir", str(run), "--record", "12")
    path = run / "data" / "catalog.parquet"
    catalog.with_columns(pl.col("train_count").reverse()).write_parquet(path)
    found = replay(
        next(read_opened(run / "audit", [12])),
        load_replayer(run, one),
        hashes_now(run, named_files(one)),
    )
    assert not found.passed and not found.prompt_matches
    assert found.changed_files == ["data/catalog.parquet"] and "; the counts differ" in str(found)


def test_lists_by_content_for_users_who_opted_out(capsys, listed, tmp_path):
    """The item on show decides alone; the record commits to it, and replay finds a changed one."""
    run, out = shutil.copytree(listed, tmp_path / "run"), tmp_path / "opted-out.csv"
    users = pl.read_parquet(run / "data" / "test.parquet")["user_id"].to_list()
    catalog = pl.read_parquet(run / "data" / "catalog.parquet")
    shown = catalog["item_id"][3]
    table = pl.DataFrame({"user_id": [users[2], users[5]], "item_id": [shown, None]})
    table.write_csv(out)
    again = ("--run_dir", str(run), "--k", "6", "--beam_width", "12", "--overwrite", "true")
    call("recommend", *again, "--opt_out", str(out))
    assert "1 lists by popularity and 1 by content for users" in capsys.readouterr().out
    lists = pl.read_parquet(run / "recommendations" / "non-profiling.parquet")
    own = lists.filter(pl.col("user_id") == users[2])
    vectors = np.load(run / "embeddings" / "item_embeddings.npy").astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = vectors @ vectors[3]
    cosines[3] = -2
    assert own["item_index"].to_list() == np.argsort(-cosines, kind="stable")[:6].tolist()
    np.testing.assert_allclose(own["score"], np.sort(cosines)[::-1][:6], atol=2e-6)
    assert own["shown_item_id"].unique().to_list() == [shown]
    call("audit", "--run_dir", str(run), "--report_users", "14")
    *_, one, two = map(json.loads, (run / "audit" / "audit-00000.jsonl").open())
    assert one["ordering"]["rule"].startswith("cosine") and one["commitments"]["input"]
    assert two["ordering"]["rule"].startswith("popularity") and not two["commitments"]["input"]
    assert set(one["artefacts"]["files"]) - set(two["artefacts"]["files"]) == {
        "embeddings/item_embeddings.npy"
    }
    assert "shown_item_id" not in json.dumps(one)  # what the user looked at is payload
    (opened,) = read_opened(run / "audit", [12])
    assert opened["input"]["shown_item_id"] == shown and opened["input"]["history"] == []
    page = (run / "audit" / "report.html").read_text()
    assert page.count("The list goes by content alone: the items most alike the one on show") == 1
    assert "1 by popularity in the training part" in page
    assert "1 by cosine of content vectors" in page
    capsys.readouterr()
    call("audit", "verify", "--run_dir", str(run))
    call("audit", "replay", "--run_dir", str(run), "--all")
    said = capsys.readouterr().out
    assert "record 12: reproduced, same bytes; by content, without a model" in said
    assert "14 of 14 records reproduced" in said
    np.save(run / "embeddings" / "item_embeddings.npy", vectors[::-1].astype(np.float32))
    current = hashes_now(run, named_files(one))
    found = replay(next(read_opened(run / "audit", [12])), load_replayer(run, one), current)
    assert not found.passed and found.changed_files == ["embeddings/item_embeddings.npy"]
    assert "; the vectors differ" in str(found)
    pl.DataFrame({"user_id": [users[2]], "item_id": ["nothing"]}).write_csv(out)
    assert "1 items on show are not in" in refused(
        capsys, "recommend", *again, "--opt_out", str(out)
    )


def test_opt_outs_that_can_not_be_followed_are_errors(capsys, listed, tmp_path):
    run, out = shutil.copytree(listed, tmp_path / "run"), tmp_path / "opted-out.txt"
    again = ("--run_dir", str(run), "--overwrite", "true", "--opt_out", str(out))
    assert "is not a file; name a list of user ids" in refused(capsys, "recommend", *again)
    out.write_text("nobody\n")
    error = refused(capsys, "recommend", *again)
    assert "names 1 users, and none of them is in this split (ids look like" in error
    users = pl.read_parquet(run / "data" / "test.parquet")["user_id"].to_list()
    out.write_text("".join(f"{user}\n" for user in users))
    assert "nobody is left to list" in refused(capsys, "recommend", *again)
    table = ("--users", "u.csv", "--output_dir", str(tmp_path / "lists"))
    assert "opt_out is for a split" in refused(capsys, "recommend", *again, *table)


def user_lists(listed, folder, *flags, rows=3):
    """Lists of the run `listed` for a CSV of users, below `folder`."""
    catalog = pl.read_parquet(listed / "data" / "catalog.parquet")
    ids = catalog["item_id"].cast(pl.String).to_list()
    table = pl.DataFrame({
        "user_id": ["ann", "bob", "cy"],
        "history": [" ".join(ids[:3]), "", ids[5]],
        "never": [ids[7], ids[8], ""],
        "only": [" ".join(ids[3:15]), " ".join(ids[3:15]), None],  # null: all
    })[:rows]  # fmt: skip
    table.write_csv(folder / "users.csv")
    out = folder / "today"
    call("recommend", "--run_dir", str(listed), "--users", str(folder / "users.csv"),
        "--output_dir", str(out), "--k", "4", "--beam_width", "20", "--shard_size", "2",
        *flags)  # fmt: skip
    return out


def test_lists_for_a_table_of_users_have_records_that_replay(capsys, listed, tmp_path):
    wishes = ("--exclude_column", "never", "--candidates_column", "only")
    out = user_lists(listed, tmp_path, *wishes)
    made = ("--run_dir", str(out), "--source_run", str(listed))
    assert "--source_run RUN" in refused(capsys, "audit", "--run_dir", str(out))
    call("audit", *made)
    records = list(read_opened(out / "audit"))
    assert [r["user_id"] for r in records] == ["ann", "bob", "cy"]
    names = [[f["name"] for f in r["filters"]] for r in records]
    assert names == [["seen", "candidates"], ["seen", "candidates"], ["seen"]]
    assert "the table's column 'never'" in records[0]["filters"][0]["rule"]
    # Three items of a history and one that is named; twelve of twenty items are allowed.
    removed = [[f["removed_items"] for f in r["filters"]] for r in records]
    assert removed == [[4, 8], [1, 8], [1]]
    assert [r["input"]["history_items"] for r in records] == [3, 0, 1]
    assert {r["input"]["split"] for r in records} == {"users"}
    assert "data/test.parquet" not in records[0]["artefacts"]["files"]
    assert not list(out.rglob(".users.parquet"))
    page = (out / "audit" / "report.html").read_text()
    assert "the lists are for a table of users" in page and "Chosen next" not in page
    call("audit", "verify", *made)
    call("audit", "replay", *made, "--all")
    assert "3 of 3 records reproduced" in capsys.readouterr().out
    call("audit", "erase", *made, "--user", "ann")
    call("audit", "verify", *made)
    assert "(1 erased)" in capsys.readouterr().out
    # What the lists were made from is another, or the table is.
    other = shutil.copytree(listed, tmp_path / "other")
    manifest = other / "data" / "manifest.json"
    value = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**value, "content_hash": "0" * 64}))
    again = ("--run_dir", str(out), "--overwrite", "true")
    error = refused(capsys, "audit", *again, "--source_run", str(other))
    assert "were not made from" in error and "stage prepare is another" in error
    (tmp_path / "users.csv").write_text("user_id,history\n")
    assert "users.csv was changed" in refused(capsys, "audit", *again, "--source_run", str(listed))


def test_shaped_lists_have_records_that_say_why_they_can_not_be_replayed(capsys, listed, tmp_path):
    out = user_lists(listed, tmp_path, "--max_per_category", "1", "--category_depth", "0", rows=1)
    made = ("--run_dir", str(out), "--source_run", str(listed))
    call("audit", *made)
    (record,) = read_opened(out / "audit")
    assert record["filters"][1]["rule"] == "max_per_category=1, category_depth=0"
    call("audit", "verify", *made)
    error = refused(capsys, "audit", "replay", *made, "--record", "0")
    assert "made under the rules ['shaping']" in error
    error = refused(capsys, "audit", "--run_dir", str(listed), "--source_run", str(out))
    assert "drop --source_run" in error


def test_trace_of_the_first_explained_user(capsys, finished):
    call("trace", "--run_dir", str(finished))
    said = capsys.readouterr().out
    first = read_chains(finished / "explanations" / "chains.jsonl")[0]
    assert first.row_id in said and re.search(r"record \d+ of 14, sha256", said)
    for part in (
        "1. The user's rows", "Bought so far, oldest first:", "token ids:", "trie: 20 items",
"EQUAL to the stored list", "prompt hash equal",
        "[decision] Rank 1", "wording: template", "score_difference",
        "not there yet, left out below: evaluate",
    ):  # fmt: skip
        assert part in said, part
    assert re.search(r"level 3: \d+ of 20 prefixes survive", said)
    assert max(map(len, said.splitlines())) <= 100
    assert "\u202e" not in said and "\x07" not in said


def test_trace_says_when_the_stored_list_is_another(capsys, copied):
    (path,) = (copied / "recommendations").glob("recommendations-*.parquet")
    table = pl.read_parquet(path)
    table.with_columns(pl.col("item_index").reverse().over("row_id")).write_parquet(path)
    manifest = copied / "recommendations" / "manifest.json"
    value = json.loads(manifest.read_text())
    value["outputs"][path.name]["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(value))
    call("trace", "--run_dir", str(copied))
    assert "DIFFERENT from the stored list" in capsys.readouterr().out


def test_trace_follows_an_allow_list(capsys, listed, tmp_path):
    run = tmp_path / "run"
    for folder in ("data", "embeddings", "semantic_ids", "dataset", "sft"):
        shutil.copytree(listed / folder, run / folder)
    ids = pl.read_parquet(run / "data" / "catalog.parquet")["item_id"]
    allow = tmp_path / "allow.txt"
    allow.write_text("\n".join(map(str, ids[3:12])))
    wanted = ("--k", "3", "--beam_width", "12", "--allow", str(allow))
    call("recommend", "--run_dir", str(run), *wanted)
    capsys.readouterr()
    call("trace", "--run_dir", str(run), "--user", "u3")
    said = capsys.readouterr().out
    assert "EQUAL to the stored list" in said and "left 9 of 20 items" in said
    assert re.search(r"level 3: \d of 20 prefixes survive \(1\d excluded\)", said)
    allow.write_text("\n".join(map(str, ids[3:13])))
    call("trace", "--run_dir", str(run), "--user", "u3")
    said = " ".join(capsys.readouterr().out.split())
    assert "stored list: not compared" in said and "was changed since" in said
    assert "to the stored list" not in said and "DIFFERENT" not in said
    allow.unlink()
    call("trace", "--run_dir", str(run), "--user", "u3")
    assert "is no file any more" in " ".join(capsys.readouterr().out.split())


def test_trace_of_a_run_that_is_not_finished(capsys, listed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(listed / "data", run / "data")
    call("trace", "--run_dir", str(run), "--user", "u3")
    said = capsys.readouterr().out
    assert "left out below: embed, quantize, build_dataset, sft, recommend" in said
    assert "target" in said and "user u3" in said
    call("trace", "--run_dir", str(listed), "--user", "u3")
    said = capsys.readouterr().out
    assert "left out below: evaluate, explain, audit" in said and "EQUAL" in said


@pytest.mark.parametrize(
    ("extra", "shown"),
    [
        (
            {},
            # 1/log2(3 + 1) = .5 for one of three seeds; rank 11 is behind the ten that count.
            ["genrec           HR@10 0.33   NDCG@10 0.1667   rank 3; –; 11",
             "popularity       HR@10 1.00   NDCG@10 1.0000   rank 1",
             "(rank of the target for each training seed; – is not in the list)"],
        ),
        (
            # Two of two at the ranks 3 and 7: (1/2 + 1/3) / (1 + 1/log2(3)) = .5110.
            {"hit_ranks": [[11], [3, 7], [], [1, 2]], "n_relevant": [2] * 4},
            ["genrec           HR@10 0.33   NDCG@10 0.1703   rank 3, 7; –; 11",
             "popularity       HR@10 1.00   NDCG@10 1.0000   rank 1, 2",
             "(ranks of the 2 relevant items for each training seed; – is not in the list)"],
        ),
    ],
)  # fmt: skip
def test_trace_shows_a_systems_ranks_of_all_seeds(capsys, copied, extra, shown):
    row = read_chains(copied / "explanations" / "chains.jsonl")[0].row_id
    stage = Stage(copied, "evaluate", {"ks": [5, 10]}, ["prepare", "recommend"])
    assert not stage.is_done()
    columns = {
        "row_id": [row] * 4,
        "system": ["genrec"] * 3 + ["popularity"],
        "seed": [2, 0, 1, 0],
        "target_rank": [11, 3, 0, 1],
    }
    pl.DataFrame({**columns, **extra}).write_parquet(stage.folder / "per_user.parquet")
    stage.finish(rows=1)
    call("trace", "--run_dir", str(copied))
    said = capsys.readouterr().out.split("5. This user's metrics (evaluate)")[1]
    assert [line.strip() for line in said.splitlines()[1:4]] == shown


def test_trace_of_an_unknown_user(capsys, finished):
    error = refused(capsys, "trace", "--run_dir", str(finished), "--user", "nobody")
    assert "user 'nobody' has no row in the test split; users look like u" in error
