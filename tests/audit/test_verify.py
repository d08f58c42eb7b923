"""Verification finds every kind of tampering, and nothing in a sound log."""

from __future__ import annotations

import json
import shutil

import pytest

from genrec.audit.custody import AuditKey
from genrec.audit.verify import verify


def findings(run, key=None) -> str:
    return "\n".join(map(str, verify(run, key).findings))


def test_a_sound_log_has_no_findings(audited_run, tmp_path):
    found = verify(audited_run)
    assert found.findings == [] and found.records == 6 and found.files > 10
    moved = shutil.copytree(audited_run, tmp_path / "elsewhere")
    key = shutil.move(moved / "audit.key", tmp_path / "kept.key")
    assert verify(moved, key).findings == []


def test_an_edited_line(copied, log):
    log.edit(2, lambda r: r["items"][0].update(score=-0.1))
    assert findings(copied) == "line 3: its content doesn't match its own hash: it was changed"
    log.edit(2, lambda r: None, rehash=True)  # the editor mends the line's own hash
    assert "line 4: it doesn't follow the line before it" in findings(copied)


def test_a_deleted_last_line(copied, log):
    log.write(log.records()[:-1])
    text = findings(copied)
    assert "has 5 records, the head states 6: records were cut off or added" in text
    assert "not the one that the head states" in text


def test_swapped_lines(copied, log):
    records = log.records()
    log.write([records[0], records[2], records[1], *records[3:]])
    text = findings(copied)
    assert "line 2: it is record 2, record 1 belongs here" in text
    assert all(f"line {n}: it doesn't follow the line before it" in text for n in (2, 3, 4))


def test_a_deleted_and_a_doubled_line(copied, log):
    records = log.records()
    log.write(records[:2] + records[3:])
    assert "line 3: it is record 3, record 2 belongs here" in findings(copied)
    log.write([*records, records[-1]])
    assert "line 7: it is record 5, record 6 belongs here" in findings(copied)


@pytest.mark.parametrize("cut", [False, True])
def test_a_recomputed_chain_fails_without_the_key(copied, log, cut):
    records = log.records()
    records[1]["items"][0]["item_id"] = records[1]["items"][1]["item_id"]
    log.write(records[:-1] if cut else records)
    log.recompute()
    assert findings(copied) == "the head's signature is not valid under this key"


def test_a_wrong_and_an_absent_key(copied, tmp_path):
    AuditKey.create(tmp_path / "other.key")
    text = findings(copied, tmp_path / "other.key")
    assert "another key, or a forged head" in text and "signature is not valid" in text
    assert text.count("its pseudonym is not that of") == 6
    (copied / "audit.key").unlink()
    assert "the signature was not checked: there is no key at" in findings(copied)
    assert not (copied / "audit.key").exists()


def test_a_head_signed_by_another_key_under_the_old_name(copied, log):
    head = json.loads(log.head_path.read_text())
    log.head_path.write_text(json.dumps({**head, "signature": AuditKey(b"x" * 32).sign(b"")}))
    assert findings(copied) == "the head's signature is not valid under this key"
    for broken in ("", "[]", "{}"):
        log.head_path.write_text(broken)
        assert findings(copied)
    log.head_path.unlink()
    assert "head.json can't be read" in findings(copied)


def test_a_changed_file_names_the_file(copied):
    path = copied / "data" / "catalog.parquet"
    path.write_bytes(path.read_bytes() + b"x")
    (copied / "sft" / "model" / "tokenizer.json").unlink()
    text = findings(copied)
    assert "data/catalog.parquet doesn't match data/manifest.json" in text
    assert "line 1: data/catalog.parquet was" in text and "(and 5 more lines)" in text
    assert "sft/model/tokenizer.json was" in text and "is absent now" in text


def test_a_rebuilt_stage_is_found_although_its_manifest_fits(copied):
    """File and manifest both changed: only the record still knows the old hash."""
    path = copied / "explanations" / "chains.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    from genrec.artifacts import sha256_file

    manifest = copied / "explanations" / "manifest.json"
    value = json.loads(manifest.read_text())
    value["outputs"]["chains.jsonl"]["sha256"] = sha256_file(path)
    manifest.write_text(json.dumps(value))
    assert findings(copied).startswith("line 1: explanations/chains.jsonl was")


def test_another_runs_log(other_run, copied):
    other = other_run
    for name in ("audit", "audit.key"):
        source, target = other / name, copied / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    text = findings(copied)
    assert "data/catalog.parquet was" in text and "sft/model/model.safetensors was" in text
    assert "signature" not in text  # it is a sound log, of another run


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"nonsense",
        b"[1]",
        b'{"a": 1}',
        b'{"a":NaN}',
        b"[" * 100_000,
        b"\xff\xfe",
        b"null",
        b'{"a":1}',
    ],
)
def test_any_bytes_in_the_log_are_findings_not_crashes(copied, log, line):
    log.path.write_bytes(log.path.read_bytes() + line + b"\n")
    assert "line 7: " in findings(copied)


def test_a_cut_line_and_missing_files(copied, log):
    log.path.write_bytes(log.path.read_bytes()[:-20])
    assert "line 6: the last line is cut off" in findings(copied)
    log.path.unlink()
    assert "audit.jsonl is missing" in findings(copied)
    shutil.rmtree(copied / "audit")
    with pytest.raises(ValueError, match="does not exist; run: genrec audit"):
        verify(copied)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a\0b", "data", "x" * 5000])
def test_names_outside_the_run_are_never_read(copied, log, name):
    (copied.parent / "outside").write_text("x")
    log.edit(0, lambda r: r["artefacts"]["files"].update({name: "0" * 64}))
    assert "is absent now" in findings(copied)


@pytest.mark.parametrize("value", [None, 3, {}, {"files": [1]}, {"files": {}}])
def test_a_record_without_artefacts(copied, log, value):
    log.edit(0, lambda r: r.update(artefacts=value))
    assert "line 1: it names no artefact files" in findings(copied)
