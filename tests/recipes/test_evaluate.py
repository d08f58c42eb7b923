"""The evaluate recipe as a user runs it, on a small run folder made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from genrec.artifacts import Stage, load_manifest, stage_folder, write_json, write_parquet
from genrec.columns import SEEN
from genrec.data.splits import leave_one_out

ROOT = Path(__file__).resolve().parent.parent.parent
N_ITEMS, N_USERS, K = 12, 40, 3


def prepare(run: Path, seed: int = 0) -> None:
    stage = Stage(run, "prepare", {"seed": seed})
    assert not stage.is_done()
    rng = np.random.default_rng(seed)
    length = rng.integers(3, 8, N_USERS)
    items = np.concatenate([rng.choice(N_ITEMS, n, replace=False) for n in length])
    log = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(100, 100 + N_USERS), length),
            "item_index": items.astype(np.int32),
            "timestamp": pl.Series([None] * len(items), dtype=pl.Int64),
            "position": np.concatenate([np.arange(n) for n in length]).astype(np.int32),
        }
    )
    splits = leave_one_out(log, N_ITEMS)
    catalog = pl.DataFrame(
        {
            "item_index": np.arange(N_ITEMS, dtype=np.int32),
            "item_id": [f"{seed}-{i:02}" for i in range(N_ITEMS)],
            "train_count": splits.train_count,
        }
    )
    write_parquet(stage.folder / "catalog.parquet", catalog)
    for name in ("train", "valid", "test"):
        write_parquet(stage.folder / f"{name}.parquet", getattr(splits, name))
    write_json(stage.folder / "split.json", {"protocol": "leave-one-out"})
    stage.finish(rows=log.height)


def oracle(run: Path, k: int = K) -> pl.DataFrame:
    """Lists with the target second, behind the lowest unseen item; no seen items."""
    data = stage_folder(run, "prepare")
    test = pl.read_parquet(data / "test.parquet")
    catalog = pl.read_parquet(data / "catalog.parquet")
    lists = []
    for row in test.iter_rows(named=True):
        target = row["target_item_index"]
        free = [i for i in range(N_ITEMS) if i != target and i not in row[SEEN]]
        items = [free[0], target, *free[1:]][:k]
        lists += [(row["row_id"], row["user_id"], rank, i) for rank, i in enumerate(items, start=1)]
    schema = {"row_id": pl.String, "user_id": pl.Int64, "rank": pl.Int32, "item_index": pl.Int32}
    table = pl.DataFrame(lists, schema=schema, orient="row")
    return table.join(catalog.select("item_index", "item_id"), on="item_index")


def recommend(run: Path, table: pl.DataFrame, rows: pl.DataFrame | None = None, **config) -> None:
    config = {"split": "test", "filter_seen": True, "k": K} | config
    stage = Stage(run, "recommend", config, inputs=["prepare"])
    stage.is_done(overwrite=True)
    half = table.height // 2
    write_parquet(stage.folder / "recommendations-00000.parquet", table[:half])
    write_parquet(stage.folder / "recommendations-00001.parquet", table[half:])
    if rows is not None:
        write_parquet(stage.folder / "rows.parquet", rows)
    stage.finish(rows=table.height)


def evaluate(run: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "recipes/evaluate.py"), "--run_dir", str(run)]
    command += ["--samples", "50", *flags]
    if "--ks" not in flags:
        command += ["--ks", "1", "3"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    prepare(tmp_path / "run")
    return tmp_path / "run"


def reads(run: Path) -> list[dict]:
    path = run / "test_reads.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_whole_stage(run_dir):
    table = oracle(run_dir)
    recommend(run_dir, table, table.select("row_id").unique())
    done = evaluate(run_dir, "--dataset", "hand-made shop")
    assert done.returncode == 0, done.stderr
    folder = stage_folder(run_dir, "evaluate")
    metrics = json.loads((folder / "metrics.json").read_text())
    ours = metrics["systems"]["genrec"]
    assert ours["HR@1"]["value"] == 0 and ours["HR@3"]["value"] == 1
    assert ours["NDCG@3"]["value"] == pytest.approx(1 / np.log2(3))
    assert ours["NDCG@3"]["low"] == pytest.approx(ours["NDCG@3"]["high"])  # rank 2 in every row
    assert metrics["rows"] == N_USERS and metrics["split"] == "test" and metrics["filter_seen"]
    systems = ["random", "popularity", "item-kNN", "sequential-kNN", "genrec"]
    assert list(metrics["systems"]) == systems
    difference = metrics["differences"]["genrec - popularity"]["HR@3"]
    assert 0 < difference["low"] <= difference["value"] <= difference["high"]
    assert metrics["baselines"]["item-kNN"]["chosen"]["lag_power"] is None

    per_user = pl.read_parquet(folder / "per_user.parquet")
    assert per_user.columns == ["row_id", "user_id", "system", "target_rank"]
    assert per_user.height == N_USERS * len(systems)
    hit_rate = per_user.filter(system="popularity").select(pl.col("target_rank").is_between(1, 3))
    assert hit_rate.mean().item() == metrics["systems"]["popularity"]["HR@3"]["value"]

    test = pl.read_parquet(stage_folder(run_dir, "prepare") / "test.parquet")
    for name in systems[:-1]:
        lists = pl.read_parquet(folder / "baselines" / f"{name}.parquet")
        assert lists.columns == ["row_id", "user_id", "rank", "item_id", "item_index"]
        seen = lists.join(test, on="row_id").select(
            pl.col(SEEN).list.contains(pl.col("item_index"))
        )
        assert not seen.to_series().any()

    for text in ("hand-made shop, test: 40 rows, 12 items, seen items left out", "±", "NDCG@3"):
        assert text in done.stdout
    assert "item-kNN: decay=" in done.stdout and "genrec − " in done.stdout
    manifest = load_manifest(run_dir, "evaluate")
    assert set(manifest.inputs) == {"prepare", "recommend"}
    assert manifest.metrics["HR@3"] == 1
    [read] = reads(run_dir)
    hashes = load_manifest(run_dir, "prepare").outputs
    assert read["split_sha256"] == hashes["test.parquet"]["sha256"] and read["rows"] == N_USERS

    again = evaluate(run_dir, "--dataset", "hand-made shop")  # complete: skipped, nothing is read
    assert again.returncode == 0 and "skipped" in again.stderr and len(reads(run_dir)) == 1


def test_only_the_rows_that_were_asked_for(run_dir):
    table = oracle(run_dir)
    asked = table.select("row_id").unique(maintain_order=True)[:11]
    without_one = table.filter(pl.col("row_id").is_in(asked["row_id"][1:].to_list()))
    recommend(run_dir, without_one, asked)
    done = evaluate(run_dir, "--baselines", "popularity")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((stage_folder(run_dir, "evaluate") / "metrics.json").read_text())
    assert metrics["rows"] == 11 and metrics["rows_without_list"] == 1
    assert metrics["systems"]["genrec"]["HR@3"]["value"] == pytest.approx(10 / 11)
    assert "1 rows without a list" in done.stdout


def test_anybodys_lists(run_dir, tmp_path):
    table = oracle(run_dir).select("user_id", "item_id", score=-pl.col("rank"))
    table = table.with_columns(
        item_id=pl.when(pl.int_range(pl.len()) == 0)
        .then(pl.lit("unheard-of"))
        .otherwise(pl.col("item_id"))
    )
    table.write_csv(tmp_path / "lists.csv")
    flags = ["--recommendations", str(tmp_path / "lists.csv"), "--system", "theirs"]
    done = evaluate(run_dir, *flags, "--output_dir", str(tmp_path / "out"), "--baselines", "random")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics["systems"]) == ["random", "theirs"] and metrics["unknown_items"] == 1
    assert metrics["systems"]["theirs"]["HR@3"]["value"] == 1
    assert set(metrics["inputs"]) == {"prepare", "recommendations"}
    assert not stage_folder(run_dir, "evaluate").exists()
    assert [read["system"] for read in reads(run_dir)] == ["theirs"]
    refused = evaluate(run_dir, *flags, "--output_dir", str(tmp_path / "out"))
    assert refused.returncode == 2 and "is not empty" in refused.stderr


def fails(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_one_seen_rule_per_table(run_dir):
    recommend(run_dir, oracle(run_dir), filter_seen=False)
    fails(
        evaluate(run_dir),
        "filter_seen=True here, but the recommend stage ran with filter_seen=False",
    )
    fails(evaluate(run_dir, "--split", "valid"), "a table has one rule")
    fails(evaluate(run_dir, "--filter_seen", "false", "--ks", "5"), "made lists of k=3")
    assert reads(run_dir) == []
    done = evaluate(run_dir, "--filter_seen", "false", "--baselines", "popularity")
    assert done.returncode == 0 and "seen items allowed" in done.stdout


def test_lists_that_break_the_seen_rule(run_dir):
    test = pl.read_parquet(stage_folder(run_dir, "prepare") / "test.parquet")
    catalog = pl.read_parquet(stage_folder(run_dir, "prepare") / "catalog.parquet")
    seen = test.select("row_id", pl.col(SEEN).list.first().alias("item_index"), rank=1)
    recommend(run_dir, seen.join(catalog, on="item_index"))
    fails(evaluate(run_dir), "40 of 40 lists hold items the user has seen already")


def test_recommendations_of_another_dataset(run_dir, tmp_path):
    prepare(tmp_path / "other", seed=1)
    recommend(run_dir, oracle(tmp_path / "other"))
    fails(evaluate(run_dir), "made for another dataset")


def test_missing_and_wrong_columns(run_dir, tmp_path):
    path = tmp_path / "lists.parquet"
    oracle(run_dir).rename({"rank": "position"}).write_parquet(path)
    flags = ["--recommendations", str(path), "--output_dir", str(tmp_path / "out")]
    fails(evaluate(run_dir, *flags), "lack the columns ['rank or score']")
    fails(evaluate(run_dir, "--recommendations", str(path)), "belong together")
    assert not (tmp_path / "out").exists()


def test_settings_are_checked_before_anything_is_read(tmp_path):
    for flags, message in (
        (["--baselines", "bert4rec"], "baselines='bert4rec' is not known"),
        (["--fit_on", "test"], "fit_on='test' is not known"),
        (["--ks", "0"], "ks=[0] must be"),
        (["--system", "random"], "is the name of a baseline"),
    ):
        fails(evaluate(tmp_path / "nothing", *flags), message)
    fails(evaluate(tmp_path / "nothing"), "stage 'prepare' has not finished")


def test_shipped_configs_hold_known_settings():
    sys.path.insert(0, str(ROOT / "recipes"))
    try:
        from evaluate import EvaluateArgs
    finally:
        sys.path.remove(str(ROOT / "recipes"))
    paths = sorted((ROOT / "recipes/configs").glob("*/evaluate.yaml"))
    assert len(paths) >= 3
    for path in paths:
        EvaluateArgs(**yaml.safe_load(path.read_text()))
        assert "genrec evaluate --config" in path.read_text().splitlines()[0]
