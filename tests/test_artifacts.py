"""Stage folders: what is skipped, refused, resumed, set aside, and never lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from genrec import artifacts
from genrec.artifacts import (
    IN_PROGRESS,
    MANIFEST,
    Stage,
    folder_fingerprint,
    load_manifest,
    read_json,
    require,
    stage_folder,
    write_bytes,
    write_json,
    write_parquet,
    write_text,
)


def build(run: Path, name: str = "prepare", inputs=(), text: str = "content", **config) -> Stage:
    """A finished stage with one output file."""
    stage = Stage(run, name, config, inputs)
    assert not stage.is_done()
    write_text(stage.folder / "table.txt", text)
    stage.finish(rows=1)
    return stage


def line(run: Path) -> None:
    build(run, "prepare")
    build(run, "embed", ["prepare"])
    build(run, "quantize", ["prepare", "embed"])


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_same_settings_are_skipped_and_nothing_is_touched(tmp_path: Path):
    build(tmp_path, k=3)
    before = files(tmp_path)
    assert Stage(tmp_path, "prepare", {"k": 3, "run_dir": "x", "overwrite": True}).is_done()
    assert files(tmp_path) == before


def test_content_of_another_run_is_an_input(tmp_path: Path):
    def stage(sha256: str) -> Stage:
        return Stage(tmp_path, "recommend", {}, hashes={"model_run/sft": sha256})

    first = stage("a" * 64)
    assert not first.is_done()
    assert first.finish(rows=0).inputs == {"model_run/sft": "a" * 64}
    assert stage("a" * 64).is_done()
    assert require(tmp_path, "recommend").rows == 0  # it names no stage of this run
    with pytest.raises(ValueError, match="other input 'model_run/sft'"):
        stage("b" * 64).is_done()


def test_ignored_settings_and_moved_files_are_no_change(tmp_path: Path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("same")
    run = tmp_path / "run"
    first = Stage(
        run, "prepare", {"path": "a.csv"}, files={"log": tmp_path / "a.csv"}, ignore=["path"]
    )
    assert not first.is_done()
    first.finish(rows=0)
    moved = {"log": tmp_path / "b.csv"}
    assert Stage(run, "prepare", {"path": "b.csv"}, files=moved, ignore=["path"]).is_done()
    (tmp_path / "b.csv").write_text("other")
    with pytest.raises(ValueError, match="input 'log'"):
        Stage(run, "prepare", {"path": "b.csv"}, files=moved, ignore=["path"]).is_done()


def test_changed_settings_are_refused_naming_key_and_both_values(tmp_path: Path):
    build(tmp_path, k=3, same=1, gone="x")
    before = files(tmp_path)
    with pytest.raises(ValueError) as error:
        Stage(tmp_path, "prepare", {"k": 4, "same": 1, "new": [1]}).is_done()
    for part in ("k=3 (now 4)", "gone='x' (now None)", "new=None (now [1])", "--overwrite true"):
        assert part in str(error.value)
    assert "same" not in str(error.value)
    assert files(tmp_path) == before


def test_a_tuple_in_the_settings_equals_the_list_that_json_makes_of_it(tmp_path: Path):
    build(tmp_path, ks=(5, 10), k=1)
    with pytest.raises(ValueError) as error:
        Stage(tmp_path, "prepare", {"ks": (5, 10), "k": 2}).is_done()
    assert "ks=" not in str(error.value)


def test_overwrite_keeps_the_old_folder_under_new_names(tmp_path: Path):
    for number in range(3):
        stage = Stage(tmp_path, "prepare", {"n": number})
        assert not stage.is_done(overwrite=number > 0)
        write_text(stage.folder / "table.txt", f"content {number}")
        stage.finish(rows=1)
    texts = [p.read_text() for p in sorted(tmp_path.glob("data*/table.txt"))]
    assert sorted(texts) == ["content 0", "content 1", "content 2"]
    assert (tmp_path / "data" / "table.txt").read_text() == "content 2"
    assert (tmp_path / "data.old-1" / MANIFEST).exists()


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path: Path):
    run = tmp_path / "run"
    code = (
        "import sys, time; from genrec.artifacts import Stage; "
        f"stage = Stage({str(run)!r}, 'prepare', {{}}); assert not stage.is_done(); "
        "(stage.folder / 'half').write_text('mine'); print('ready', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        for settings in ({}, {"seed": 1}):  # the same would resume it, others would set it aside
            with pytest.raises(ValueError, match="another process is writing .*/data; wait"):
                Stage(run, "prepare", settings).is_done()
        assert not Stage(run, "prepare", {}).is_done(alone=False)  # a process of the same job
        assert (run / "data" / "half").read_text() == "mine"
        assert [path.name for path in run.iterdir()] == ["data"]
    finally:
        other.kill()
        other.wait()
    mine = Stage(run, "prepare", {"seed": 1})
    assert not mine.is_done() and (run / "data.old-1" / "half").exists()
    assert not Stage(run, "prepare", {"seed": 1}).is_done()  # this process may begin again
    mine.finish(rows=0)
    assert str(mine.folder.absolute()) not in artifacts._HELD


def test_upstream_rebuilt_names_both_files_and_the_command(tmp_path: Path):
    line(tmp_path)
    require(tmp_path, "quantize")
    stage = Stage(tmp_path, "prepare", {})
    assert not stage.is_done(overwrite=True)
    write_text(stage.folder / "table.txt", "other content")
    stage.finish(rows=1)
    with pytest.raises(ValueError) as error:
        require(tmp_path, "quantize")
    for part in (
        str(tmp_path / "embeddings" / MANIFEST) + " was built from 'prepare'",
        str(tmp_path / "data" / MANIFEST),
        f"genrec embed --config <its yaml> --run_dir {tmp_path} --overwrite true",
    ):
        assert part in str(error.value).replace(
            str(tmp_path / "semantic_ids"), str(tmp_path / "embeddings")
        ).replace("genrec quantize", "genrec embed")
    with pytest.raises(ValueError, match="was built from"):
        Stage(tmp_path, "build_dataset", {}, ["quantize"])  # the next stage, too, at once


def test_rebuilt_with_the_same_content_is_no_change(tmp_path: Path):
    line(tmp_path)
    stage = Stage(tmp_path, "prepare", {})
    assert not stage.is_done(overwrite=True)
    write_text(stage.folder / "table.txt", "content")
    stage.finish(rows=1)
    require(tmp_path, "quantize")


def test_a_stage_that_has_not_finished_is_named_with_its_command(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"data has no manifest.json: stage 'prepare'.*genrec prepare"
    ):
        Stage(tmp_path, "embed", {}, ["prepare"])
    assert not stage_folder(tmp_path, "embed").exists()


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_truncated_or_missing_output(tmp_path: Path, damage: str):
    build(tmp_path)
    path = tmp_path / "data" / "table.txt"
    path.write_text("cont") if damage == "truncate" else path.unlink()
    with pytest.raises(
        ValueError, match=r"table.txt has (4|None) bytes, its manifest says 7"
    ) as error:
        Stage(tmp_path, "embed", {}, ["prepare"])
    assert "genrec prepare" in str(error.value)
    with pytest.raises(ValueError, match="its manifest says 7"):
        Stage(tmp_path, "prepare", {}).is_done()  # not "complete, skipped"
    assert not Stage(tmp_path, "prepare", {}).is_done(overwrite=True)  # the fix that it names


def test_partial_folder_of_other_settings_is_set_aside(tmp_path: Path):
    stage = Stage(tmp_path, "sft", {"lr": 1})
    assert not stage.is_done()
    write_text(stage.folder / "checkpoint.txt", "hours of work")
    other = Stage(tmp_path, "sft", {"lr": 2})
    assert not other.is_done()
    assert not (other.folder / "checkpoint.txt").exists()
    assert (tmp_path / "sft.old-1" / "checkpoint.txt").read_text() == "hours of work"


def test_partial_folder_of_the_same_settings_is_resumed_also_under_overwrite(tmp_path: Path):
    build(tmp_path, "sft", lr=1)
    stage = Stage(tmp_path, "sft", {"lr": 1})
    assert not stage.is_done(overwrite=True)
    write_text(stage.folder / "checkpoint.txt", "hours of work")  # and killed here
    for overwrite in (True, False):
        again = Stage(tmp_path, "sft", {"lr": 1})
        assert not again.is_done(overwrite)
        assert (again.folder / "checkpoint.txt").read_text() == "hours of work"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sft", "sft.old-1"]


def test_files_that_are_not_ours_stay_where_they_are(tmp_path: Path):
    """A project's own ``data`` folder is often named like the stage's."""
    mine = tmp_path / "data" / "mine.csv"
    mine.parent.mkdir()
    mine.write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds mine\.csv, which no stage wrote"):
            Stage(tmp_path, "prepare", {}, files={"log": mine}).is_done(overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["data"] and mine.read_text() == "precious"


def test_what_a_stage_reads_is_not_set_aside_under_it(tmp_path: Path):
    stage = build(tmp_path)
    mine = stage.folder / "mine.csv"
    mine.write_text("precious")
    again = Stage(tmp_path, "prepare", {"other": 1}, files={"log": mine})
    with pytest.raises(ValueError, match="is read by this stage and lies in"):
        again.is_done(overwrite=True)
    assert mine.exists() and (stage.folder / MANIFEST).exists()


def test_a_folder_in_which_nothing_was_written_yet_is_not_kept(tmp_path: Path):
    for n in range(3):
        assert not Stage(tmp_path, "prepare", {"n": n}).is_done()
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"schema_version": 1}', '{"schema_version": 99}', "3"]
)
def test_damaged_manifest_is_an_error_that_overwrite_mends(tmp_path: Path, content: str):
    stage = build(tmp_path)
    (stage.folder / MANIFEST).write_text(content)
    for call in (
        lambda: load_manifest(tmp_path, "prepare"),
        lambda: Stage(tmp_path, "embed", {}, ["prepare"]),
        lambda: Stage(tmp_path, "prepare", {}).is_done(),
    ):
        with pytest.raises(ValueError, match=MANIFEST) as error:
            call()
        assert "rerun" in str(error.value)
    again = Stage(tmp_path, "prepare", {})
    assert not again.is_done(overwrite=True)
    assert (tmp_path / "data.old-1" / MANIFEST).read_text() == content


def test_manifest_says_what_is_in_the_folder(tmp_path: Path):
    build(tmp_path)
    stage = Stage(tmp_path, "embed", {"dim": 2, "ks": (1, 2)}, ["prepare"])
    assert not stage.is_done()
    assert (stage.folder / IN_PROGRESS).exists()
    write_text(stage.folder / "a" / "b.txt", "text")
    write_text(stage.folder / "checkpoints" / "big.bin", "x")
    write_text(stage.folder / ".c.txt.77.partial", "left by a killed writer")
    manifest = stage.finish(rows=7, seed=3, metrics={"x": 1.5}, notes=["n"], skip=["checkpoints"])
    assert sorted(manifest.outputs) == ["a/b.txt", "config.yaml"]
    digest = "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"  # SHA-256 of "text"
    assert manifest.outputs["a/b.txt"] == {"sha256": digest, "bytes": 4}
    assert not list(stage.folder.glob(".*.partial"))
    assert not (stage.folder / IN_PROGRESS).exists()
    read = load_manifest(tmp_path, "embed")
    assert read is not None
    assert (read.rows, read.seed, read.metrics, read.notes) == (7, 3, {"x": 1.5}, ["n"])
    assert read.inputs == {"prepare": require(tmp_path, "prepare").content_hash}
    assert read.versions["genrec"] and read.versions["polars"]
    assert read.content_hash == manifest.content_hash
    write_text(stage.folder / "checkpoints" / "big.bin", "changed")
    require(tmp_path, "embed")  # what is skipped isn't checked either


@pytest.mark.parametrize("writer", ["bytes", "json", "parquet"])
def test_a_failed_write_leaves_the_old_bytes(tmp_path: Path, writer: str, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def broken(*_: object) -> None:
        raise OSError("disk full")

    if writer == "json":
        # A value that fails half-way must not have opened the file yet.
        loop: list = []
        loop.append(loop)
        with pytest.raises(ValueError):
            write_json(path, loop)
    else:
        monkeypatch.setattr(artifacts.os, "replace", broken)
        with pytest.raises(OSError, match="disk full"):
            if writer == "bytes":
                write_bytes(path, b"new")
            else:
                write_parquet(path, pl.DataFrame({"a": [1]}))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_readers_never_see_half_a_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    seen = []
    replace = os.replace
    monkeypatch.setattr(
        artifacts.os, "replace", lambda *a: (seen.append(json.loads(path.read_text())), replace(*a))
    )
    write_json(path, {"a": 2})
    assert seen == [{"a": 1}] and json.loads(path.read_text()) == {"a": 2}


@pytest.mark.parametrize("damaged", ["", "{", "[]", "{}", '{"fingerprint": "x", "config": 1}'])
def test_a_damaged_note_of_work_in_progress_is_no_dead_end(tmp_path: Path, damaged: str):
    """What it was of can't be known: the work is set aside, parts of a shared one are refused."""
    stage = Stage(tmp_path, "prepare", {"n": 1})
    assert not stage.is_done()
    (stage.folder / "half").write_text("x")
    (stage.folder / "in_progress.json").write_text(damaged)
    with pytest.raises(ValueError, match="holds half and doesn't say of which run"):
        stage.check_shared()
    assert not stage.is_done()
    assert (tmp_path / "data.old-1" / "half").exists() and not (stage.folder / "half").exists()
    stage.check_shared()
    with pytest.raises(ValueError, match=r"is being written with other n=1 \(now 2\)"):
        Stage(tmp_path, "prepare", {"n": 2}).check_shared()
    assert folder_fingerprint(stage.folder) == stage.fingerprint
    stage.finish(rows=1)
    assert folder_fingerprint(stage.folder) == stage.fingerprint
    assert folder_fingerprint(tmp_path) is None


def test_a_bundle_is_no_run(tmp_path):
    """What is said must not make anybody run a stage inside of it."""
    write_json(tmp_path / "manifest.json", {"kind": "genrec-bundle"})
    for stage in ("sft", "quantize"):
        with pytest.raises(ValueError, match="is a bundle; this command needs a run") as told:
            require(tmp_path, stage)
        assert "overwrite" not in str(told.value)


def test_bytes_that_are_no_text_are_no_json(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="a.json is not valid JSON .*restore it or rerun"):
        read_json(tmp_path / "a.json")
