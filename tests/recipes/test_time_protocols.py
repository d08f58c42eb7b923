"""Splits by time through the stages that read them: several rows per user, several targets."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

FLAGS = {
    "global-time": ["--protocol", "global-time"],
    "time-cutoff": ["--protocol", "time-cutoff", "--valid_from", "2023-06-01",
        "--test_from", "2023-09-01"],
}  # fmt: skip


@pytest.fixture(scope="module", params=list(FLAGS))
def built(request, recipe, tiny_flags, tmp_path_factory) -> Path:
    """Stages prepare … build_dataset, read only."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    recipe("prepare", run, *tiny_flags["prepare"], *FLAGS[request.param])
    for stage in ("embed", "quantize", "build_dataset"):
        recipe(stage, run, *tiny_flags[stage])
    return run


def test_every_split_row_has_its_prompt(built: Path):
    for split in ("valid", "test"):
        rows = pl.read_parquet(built / "data" / f"{split}.parquet")
        made = pl.read_parquet(built / "dataset" / f"{split}.parquet")
        assert made["row_id"].to_list() == rows["row_id"].to_list()
        assert made["history"].list.len().equals(rows["history_item_index"].list.len())
    lines = (built / "test_reads.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == ["build_dataset"]


def test_rl_rows_end_with_the_training_period(built: Path):
    """Their target is the user's last training item; nothing later is in what was seen."""
    train = pl.read_parquet(built / "data" / "train.parquet")
    log = pl.read_parquet(built / "data" / "interactions.parquet")
    until = pl.read_parquet(built / "data" / "valid.parquet")["target_timestamp"].min()
    rl = pl.read_parquet(built / "dataset" / "rl.parquet")
    assert rl.height > 50 and rl["user_id"].n_unique() == rl.height
    assert rl.height < train["user_id"].n_unique() <= 120  # less those with one item
    for row in rl.iter_rows(named=True):
        mine = log.filter((pl.col("user_id") == row["user_id"]) & (pl.col("timestamp") < until))
        items = mine.sort("position")["item_index"].to_list()
        assert row["target_item_index"] == items[-1]
        assert row["seen_item_index"] == sorted(set(items[:-1]))
