"""The lint recipe as a user runs it."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from genrec.artifacts import Stage, write_json, write_parquet
from genrec.cli import recipes_folder, summaries
from genrec.data.cleaning import clean
from genrec.data.lint import lint_run_tables
from genrec.data.splits import SPLITS, leave_one_out
from genrec.data.synthetic import synthetic_shop


def lint(*args: str) -> None:
    before = sys.argv
    sys.argv = ["lint.py", *args]
    try:
        runpy.run_path(str(recipes_folder() / "lint.py"), run_name="__main__")
    finally:
        sys.argv = before


def prepared(run: Path, spoil: bool = False) -> Path:
    """A prepared run of the synthetic shop; spoilt: items numbered as the log meets them."""
    data = clean(synthetic_shop(150, 60, 0))
    log, catalog = data.interactions, data.catalog
    if spoil:
        met = log["item_index"].unique(maintain_order=True).to_list()
        new = {item: number for number, item in enumerate(met)}
        column = log["item_index"].replace_strict(new, return_dtype=log.schema["item_index"])
        log, catalog = log.with_columns(column), catalog.head(len(met))
    splits = leave_one_out(log, catalog.height)
    stage = Stage(run, "prepare", {"spoil": spoil})
    assert not stage.is_done()
    write_parquet(stage.folder / "interactions.parquet", log)
    write_parquet(stage.folder / "catalog.parquet", catalog)
    for name in SPLITS:
        write_parquet(stage.folder / f"{name}.parquet", getattr(splits, name))
    write_json(stage.folder / "split.json", {"protocol": "leave-one-out"})
    stage.finish(rows=log.height, seed=0, metrics={})
    assert lint_run_tables(log, catalog, splits.train, splits.valid, splits.test, "leave-one-out")
    return run


def test_a_sound_run_is_printed_worst_first(tmp_path, capsys):
    run = prepared(tmp_path / "run")
    before = sorted(path.name for path in run.rglob("*"))
    lint("--run_dir", str(run))
    out = capsys.readouterr().out
    places = [out.index(text) for text in ("repeated test targets", "item ids against first")]
    assert places == sorted(places)  # "look" before "ok"
    assert "for example: user 'U" in out and out.splitlines()[1].startswith("look")
    assert "\nbad" not in out and "\nok" in out
    assert sorted(path.name for path in run.rglob("*")) == sorted([*before, "test_reads.jsonl"])
    note = json.loads((run / "test_reads.jsonl").read_text())
    assert (note["stage"], note["split"]) == ("lint", "test")


def test_bad_data_end_with_status_1(tmp_path, capsys):
    run = prepared(tmp_path / "run", spoil=True)
    with pytest.raises(SystemExit) as stop:
        lint("--run_dir", str(run))
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("bad") and "item ids against" in lines[1]


def test_a_run_that_is_not_prepared(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        lint("--run_dir", str(tmp_path / "nowhere"))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error


def test_the_command_lists_it():
    assert summaries(recipes_folder())["lint"].startswith("What in the data or its split makes")
