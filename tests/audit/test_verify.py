"""Verification of a run: its log, payloads and files; and erasing a user."""

from __future__ import annotations

import json
import shutil
import sqlite3

import pytest

from genrec.artifacts import read_json, sha256_file
from genrec.audit.anchor import read_anchor, signed
from genrec.audit.canonical import canonical
from genrec.audit.custody import read_log
from genrec.audit.erasure import ERASURES, erase, erased_users
from genrec.audit.keys import AuditKey, public_path
from genrec.audit.payloads import STORE
from genrec.audit.records import read_opened
from genrec.audit.verify import verify

TIME = "2026-01-01T00:00:00+00:00"


def findings(run, *where, **more) -> str:
    return "\n".join(map(str, verify(run, *where, **more).findings))


def custody(run):
    return run.with_name(f"{run.name}.custody")


def test_a_sound_log_has_no_findings(audited_run, tmp_path):
    found = verify(audited_run)
    assert found.findings == [] and found.records == 14 and found.shards == 4
    assert found.files > 10 and found.erased == 0
    report = found.to_json()
    assert report["verified"] and report["head"]["counter"] == 1
    json.dumps(report)
    public = shutil.copy(custody(audited_run) / "audit.pub", tmp_path / "given.pub")
    shutil.copy(custody(audited_run) / "heads.jsonl", tmp_path / "heads.jsonl")
    moved = shutil.copytree(audited_run, tmp_path / "elsewhere")
    assert findings(moved, public_key=public) == ""
    (moved / "audit" / STORE).unlink()
    shutil.rmtree(moved / "sft")
    assert findings(moved, public_key=public, log_only=True) == ""
    assert "payloads.sqlite is missing" in findings(moved, public_key=public)


def test_an_absent_and_a_wrong_key(copied, tmp_path):
    AuditKey.create(tmp_path / "other.key")
    shutil.copy(custody(copied) / "heads.jsonl", tmp_path / "heads.jsonl")
    text = findings(copied, tmp_path / "other.key")
    assert "another key, or a forged head" in text and "signature is not valid" in text
    assert "heads.jsonl, line 1: signed by key" in text
    assert text.count("its pseudonym is not that of its payload's user") == 14
    shutil.rmtree(custody(copied))
    assert "neither signature nor anchor was checked: there is no public key" in findings(copied)
    assert not custody(copied).exists()
    shutil.rmtree(copied / "audit")
    with pytest.raises(ValueError, match="does not exist; run: genrec audit"):
        verify(copied)


def test_changed_payloads(copied):
    chains = [r["record"] for r in read_opened(copied / "audit") if r["commitments"]["chains"]]
    (explained, second, *_), (plain, other, *_) = chains, sorted(set(range(14)) - set(chains))
    with sqlite3.connect(copied / "audit" / STORE) as connection:
        change = "UPDATE payload SET content = '[]' WHERE record = ? AND part = 'chains'"
        connection.execute(change, (explained,))
        connection.execute("DELETE FROM payload WHERE record = ?", (plain,))
        connection.execute("DELETE FROM payload WHERE record = ? AND part = 'chains'", (second,))
        connection.execute("INSERT INTO payload VALUES (99, 'input', '00', '1')")
        connection.execute("INSERT INTO payload VALUES (?, 'chains', '00', '[]')", (other,))
    connection.close()
    text = findings(copied)
    for number in (explained, second, other):
        place = f"audit-{number // 4:05d}.jsonl, line {number % 4 + 1}: "
        assert f"{place}the chains in its payload is not what" in text
    place = f"audit-{plain // 4:05d}.jsonl, line {plain % 4 + 1}: "
    assert f"{place}its payload is missing, and no erasure is on record" in text
    assert "holds payloads of no record: [99]" in text and text.count("\n") == 4


def test_nothing_hides_beside_what_records_commit_to(copied):
    with sqlite3.connect(copied / "audit" / STORE) as connection:
        connection.execute("CREATE TABLE notes AS SELECT * FROM payload WHERE record < 3")
        connection.execute("INSERT INTO payload VALUES (1, 'mood', '00', '[]')")
        for number, change in {
            2: 'content = \'{"user_id":"false",\' || SUBSTR(content, 2)',  # the last one counts
            5: "content = ' ' || content",
            6: "salt = UPPER(salt) || ' '",
            7: "content = '{'",
            8: "content = CAST(content AS BLOB)",
        }.items():
            where = f"record = {number} AND part = 'identity'"
            connection.execute(f"UPDATE payload SET {change} WHERE {where}")
    connection.close()
    found = verify(copied).findings
    assert {f.text for f in found if f.file == STORE} == {
        "it holds more than payloads: table notes"
    }
    text = "\n".join(map(str, found))
    assert (
        "audit-00000.jsonl, line 2: its payload has a part 'mood' that no record commits to" in text
    )
    for number in (2, 5, 6, 7, 8):
        place = f"audit-{number // 4:05d}.jsonl, line {number % 4 + 1}: "
        why = f"{copied / 'audit' / STORE}: identity of record {number}: "
        assert f"{place}{why}" in text
        assert (f"{why}it is not in canonical form" in text) == (number != 7)
    assert len(found) == 7
    with sqlite3.connect(copied / "audit" / STORE) as connection:
        connection.execute("DROP TABLE notes")
        connection.execute("ALTER TABLE payload ADD COLUMN more TEXT")
    connection.close()
    assert "it holds more than payloads: table payload" in findings(copied)


def test_a_changed_file_names_the_file(copied):
    path = copied / "data" / "catalog.parquet"
    path.write_bytes(path.read_bytes() + b"x")
    (copied / "sft" / "model" / "tokenizer.json").unlink()
    text = findings(copied)
    assert "data/catalog.parquet doesn't match data/manifest.json" in text
    assert "line 1: data/catalog.parquet was" in text and "(and 13 more records)" in text
    assert "sft/model/tokenizer.json was" in text and "is absent now" in text


def test_a_rebuilt_stage_is_found_although_its_manifest_fits(copied):
    """File and manifest both changed: only the record still knows the old hash."""
    path = copied / "explanations" / "chains.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    manifest = copied / "explanations" / "manifest.json"
    value = json.loads(manifest.read_text())
    value["outputs"]["chains.jsonl"]["sha256"] = sha256_file(path)
    manifest.write_text(json.dumps(value))
    assert findings(copied).startswith(
        "file: audit-00000.jsonl, line 1: explanations/chains.jsonl was"
    )


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a\0b", "data", "x" * 5000])
def test_names_outside_the_run_are_never_read(copied, name):
    (copied.parent / "outside").write_text("x")
    path = copied / "audit" / "audit-00000.jsonl"
    first, *rest = path.read_text().splitlines()
    record = json.loads(first)
    record["artefacts"]["files"][name] = "0" * 64
    path.write_text("\n".join([json.dumps(record), *rest, ""]))
    assert "is absent now" in findings(copied)


def test_erasing_a_user_leaves_the_rest_verifiable(copied):
    key = AuditKey.load(custody(copied) / "audit.key")
    anchor_file = custody(copied) / "heads.jsonl"
    before = list(read_log(copied / "audit"))
    kept = shutil.copy(copied / "audit" / STORE, copied.parent / "kept.sqlite")
    (record,) = read_opened(copied / "audit", [2])
    old = shutil.copytree(copied / "audit", copied / "audit.old-1")
    (copied / "audit.old-2").mkdir()
    (copied / "audit.old-2" / "audit.jsonl").write_text("{}\n")
    done = erase(copied, record["user_id"], key, anchor_file, TIME)
    assert done.records == [2] and done.payloads == 2  # the older state's too
    assert list(done.left) == [copied / "audit.old-2" / "audit.jsonl"]
    assert not (old / "report.html").exists()
    found = verify(copied)
    assert found.findings == [] and found.erased == 1 and list(read_log(copied / "audit")) == before
    opened = list(read_opened(copied / "audit"))
    assert [r["erased"] for r in opened] == [n == 2 for n in range(14)] and "row_id" not in opened[
        2
    ]
    for path in (copied / "audit").iterdir():
        if path.name not in ("report.html", "manifest.json"):
            assert record["input"]["prompt"].encode() not in path.read_bytes()
    assert str(record["user_id"]) not in anchor_file.read_text()
    # Once more changes nothing; the entry stands once.
    assert erase(copied, record["user_id"], key, anchor_file, TIME).payloads == 0
    assert len(read_anchor(anchor_file, key.public).entries) == 2
    # Without the entry beside the log the anchor still knows; the store put back is found.
    (copied / "audit" / ERASURES).unlink()
    assert findings(copied) == ""
    shutil.copy(kept, copied / "audit" / STORE)
    assert "its payload is there although it was erased" in findings(copied)


def test_older_states_are_erased_without_their_log_or_key(copied):
    """Of a state whose writer was killed no shard is there, and others were made under a lost key.

    What can't be read is named and keeps nothing else from being erased.
    """
    key = AuditKey.load(custody(copied) / "audit.key")
    (record,) = read_opened(copied / "audit", [2])
    killed = shutil.copytree(copied / "audit", copied / "audit.old-1")
    for path in [*killed.glob("audit-*.jsonl"), killed / "head.json"]:
        path.unlink()
    (killed / ".report.html.7.partial").write_text(str(record["user_id"]))
    damaged = shutil.copytree(killed, copied / "audit.old-2")
    (damaged / STORE).write_bytes(b"nonsense" * 1000)
    foreign = shutil.copytree(copied / "audit", copied / "audit.old-3")
    log = foreign / "audit-00000.jsonl"
    log.write_text(log.read_text().replace(record["user"]["pseudonym"], "f" * 64))
    with sqlite3.connect(foreign / STORE) as connection:
        connection.execute("DELETE FROM payload WHERE record = 5 AND part = 'identity'")
    connection.close()
    for again in (False, True):
        done = erase(copied, record["user_id"], key, custody(copied) / "heads.jsonl", TIME)
        assert done.payloads == (0 if again else 3) and done.records == [2]
        assert list(done.left) == [damaged / STORE, foreign / STORE]
        assert "can't be read: file is not a database" in done.left[damaged / STORE]
        assert "records [5] don't say whose they are" in done.left[foreign / STORE]
        assert not list(copied.glob("audit*/*report.html*"))
        assert findings(copied) == ""
    for folder in (copied / "audit", killed, foreign):
        assert record["input"]["prompt"].encode() not in (folder / STORE).read_bytes()
    with pytest.raises(ValueError, match="no record of user 'nobody' .*old-2.*can't be read"):
        erase(copied, "nobody", key, custody(copied) / "heads.jsonl", TIME)


def test_a_user_of_older_states_alone_is_erased(copied):
    old = shutil.copytree(copied / "audit", copied / "audit.old-1")
    with sqlite3.connect(old / STORE) as connection:
        content = '{"row_id":"gone-0","user_id":"gone"}'
        where = "part = 'identity' AND record = 3"
        connection.execute(f"UPDATE payload SET content = ? WHERE {where}", (content,))
    connection.close()
    key = AuditKey.load(custody(copied) / "audit.key")
    done = erase(copied, "gone", key, custody(copied) / "heads.jsonl", TIME)
    assert (done.records, done.payloads, done.left) == ([], 1, {}) and findings(copied) == ""
    assert b"gone-0" not in (old / STORE).read_bytes()
    assert key.pseudonym("gone") in erased_users(
        copied / "audit", custody(copied) / "heads.jsonl", key, "of no log"
    )


def test_who_was_erased_is_known_from_the_anchor_or_from_beside_the_log(copied):
    key, anchor_file = AuditKey.load(custody(copied) / "audit.key"), custody(copied) / "heads.jsonl"
    folder, log_id = copied / "audit", read_json(copied / "audit" / "head.json")["log_id"]
    first, second, *_ = read_opened(folder)
    for record in (first, second):
        erase(copied, record["user_id"], key, anchor_file, TIME)
    both = {record["user"]["pseudonym"] for record in (first, second)}
    assert erased_users(folder, anchor_file, key, log_id) == both
    assert erased_users(folder, copied.parent / "none.jsonl", key, log_id) == both
    folder.rename(copied / "audit.old-1")
    assert erased_users(folder, copied.parent / "none.jsonl", key, log_id) == both
    other = AuditKey(b"x" * 32)
    with pytest.raises(
        ValueError, match=f"old-1/erasures.jsonl names .* erased under key {key.key_id}"
    ):
        erased_users(folder, copied.parent / "none.jsonl", other, log_id)
    shutil.rmtree(copied / "audit.old-1")
    assert erased_users(folder, anchor_file, key, "another") == both  # in this folder
    assert erased_users(copied / "elsewhere", anchor_file, key, log_id) == both  # of this log
    assert erased_users(copied / "elsewhere", anchor_file, key, "another") == set()


def test_an_erasure_without_pseudonyms_is_traced_by_its_records(copied):
    """As earlier versions noted it."""
    key, anchor_file = AuditKey.load(custody(copied) / "audit.key"), custody(copied) / "heads.jsonl"
    log_id = read_json(copied / "audit" / "head.json")["log_id"]
    (record,) = read_opened(copied / "audit", [2])
    erase(copied, record["user_id"], key, anchor_file, TIME)
    *lines, last = anchor_file.read_bytes().splitlines(keepends=True)
    entry = json.loads(last)
    bare = {n: v for n, v in entry.items() if n not in ("folder", "key_id", "signature")}
    bare["content"] = {n: v for n, v in entry["content"].items() if n != "pseudonyms"}
    anchor_file.write_bytes(b"".join([*lines, canonical(signed(bare, key)) + b"\n"]))
    (copied / "audit" / ERASURES).unlink()
    assert findings(copied) == ""
    old = (copied / "audit").rename(copied / "audit.old-1")
    wanted = {record["user"]["pseudonym"]}
    assert erased_users(copied / "audit", anchor_file, key, log_id) == wanted
    shutil.rmtree(old)
    with pytest.raises(
        ValueError, match=r"records \[2\] in state 1 of log .* name another --anchor"
    ):
        erased_users(copied / "audit", anchor_file, key, log_id)


def test_who_can_not_be_erased(copied, tmp_path):
    key, anchor_file = AuditKey.load(custody(copied) / "audit.key"), custody(copied) / "heads.jsonl"
    with pytest.raises(ValueError, match="no record of user 'nobody'"):
        erase(copied, "nobody", key, anchor_file, TIME)
    with pytest.raises(ValueError, match="was made under key .* name the right one"):
        erase(copied, "u1", AuditKey(b"x" * 32), anchor_file, TIME)
    assert findings(copied) == ""


def test_a_forged_erasure_counts_for_nothing(copied):
    with sqlite3.connect(copied / "audit" / STORE) as connection:
        connection.execute("DELETE FROM payload WHERE record = 0")
    connection.close()
    head = json.loads((copied / "audit" / "head.json").read_bytes())
    entry = {"kind": "erasure", "log_id": head["log_id"], "signature": "0" * 128,
             "content": {"counter": 1, "records": [0]}}  # fmt: skip
    (copied / "audit" / ERASURES).write_text(json.dumps(entry) + "\n{}\nnonsense\n")
    assert "line 1: its payload is missing, and no erasure is on record" in findings(copied)
    assert public_path(custody(copied) / "audit.key").is_file()
