"""Reading a split of a run: the only way, and every reading of test leaves a line."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest

from genrec.artifacts import Stage, sha256_file, write_parquet
from genrec.data.splits import TEST_READS, read_split


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose prepare stage holds splits of 3, 2 and 1 rows."""
    run = tmp_path / "run [1]"  # brackets are a pattern to some readers
    stage = Stage(run, "prepare", {})
    assert not stage.is_done()
    for name, rows in (("train", 3), ("valid", 2), ("test", 1)):
        table = pl.DataFrame({"row_id": [f"{name}-{i}" for i in range(rows)]})
        write_parquet(stage.folder / f"{name}.parquet", table)
    stage.finish(rows=6)
    return run


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / TEST_READS).read_text().splitlines()]


def test_only_test_is_noted(run: Path):
    assert read_split(run, "train", "sft")["row_id"].to_list() == ["train-0", "train-1", "train-2"]
    assert read_split(run, "valid", "sft").height == 2
    assert not (run / TEST_READS).exists()
    assert read_split(run, "test", "recommend", model_stage="grpo").height == 1
    assert read_split(str(run), "test", "evaluate", system="SASRec").height == 1
    first, second = lines(run)
    time = datetime.fromisoformat(first.pop("time"))
    assert time.utcoffset() is not None and time.microsecond == 0
    assert first == {
        "stage": "recommend",
        "split": "test",
        "split_sha256": sha256_file(run / "data" / "test.parquet"),
        "rows": 1,
        "model_stage": "grpo",
    }
    assert (second["stage"], second["system"]) == ("evaluate", "SASRec")


def test_lines_of_readers_at_once_stay_whole(run: Path):
    long = "x" * 3000
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: read_split(run, "test", f"reader-{i}", note=long), range(40)))
    found = lines(run)
    assert {line["stage"] for line in found} == {f"reader-{i}" for i in range(40)}
    assert all(line["note"] == long for line in found)


def test_unfinished_or_damaged_prepare_is_refused(run: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="stage 'prepare' has not finished"):
        read_split(tmp_path / "none", "test", "recommend")
    with pytest.raises(ValueError, match="split='tset' is not known; choose one of train"):
        read_split(run, "tset", "recommend")
    (run / "data" / "test.parquet").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="its manifest says"):
        read_split(run, "test", "recommend")
    assert not (run / TEST_READS).exists()


def test_no_rows_without_the_line(run: Path):
    (run / TEST_READS).mkdir()  # what can't be written to
    with pytest.raises(ValueError, match="test rows are read only where that is noted"):
        read_split(run, "test", "recommend")
    assert read_split(run, "valid", "sft").height == 2
