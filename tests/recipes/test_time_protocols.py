"""Splits by time through the stages that read them: several rows per user, several targets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
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


def test_lists_are_scored_against_all_that_came_later(built: Path, recipe, tmp_path):
    """`evaluate` on a run that `prepare` cut by time, against sets and loops."""
    data, k = built / "data", 5
    rows = pl.read_parquet(data / "test.parquet")
    ids = pl.read_parquet(data / "catalog.parquet")["item_id"].to_list()
    several = "relevant_item_index" in rows.columns
    rng = np.random.default_rng(0)
    recall, precision, table = [], [], []
    for row in rows.iter_rows(named=True):
        seen = set(row["seen_item_index"])
        relevant = set(row["relevant_item_index"] if several else [row["target_item_index"]])
        free = [i for i in rng.permutation(len(ids)).tolist() if i not in seen]
        # Every second row lists some of what came later.
        known = [i for i in free if i in relevant][: 2 * (row["row_id"][-1] in "02468")]
        lists = [free[0], *known, *free[1:]]
        lists = list(dict.fromkeys(lists))[:k]
        table += [(row["row_id"], place, ids[i]) for place, i in enumerate(lists, start=1)]
        hit = [i in relevant for i in lists]
        recall.append(sum(hit) / len(relevant))
        at = [sum(hit[: n + 1]) / (n + 1) for n in range(k) if hit[n]]
        precision.append(sum(at) / len(relevant))
    path = tmp_path / "lists.parquet"
    schema = ["row_id", "rank", "item_id"]
    pl.DataFrame(table, schema=schema, orient="row").write_parquet(path)
    out = tmp_path / "results"
    recipe(
        "evaluate", built, "--recommendations", str(path), "--system", "mine",
        "--output_dir", str(out), "--ks", str(k), "--samples", "50", "--permutations", "50",
        "--baselines", "popularity", "sequential-kNN",
    )  # fmt: skip
    found = json.loads((out / "metrics.json").read_text())
    scores = found["systems"]["mine"]
    assert found["protocol"].startswith("time-cutoff" if several else "global-time")
    assert found["rows"] == rows.height and set(found["systems"]) > {"mine", "popularity"}
    assert np.mean(recall) > 0.05
    if several:
        assert max(rows["relevant_item_index"].list.len()) > 1
        assert scores[f"Recall@{k}"]["value"] == pytest.approx(np.mean(recall))
        assert scores[f"MAP@{k}"]["value"] == pytest.approx(np.mean(precision))
    assert scores[f"HR@{k}"]["value"] == pytest.approx(np.mean(np.array(recall) > 0))
    assert f"novelty@{k}" in scores and f"ild@{k}" in scores
