"""The prepare recipe, run as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml

from genrec.data.splits import content_sha256

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs"

LOG = "customer,sku,ordered_at,stars\n" + "".join(
    f"c{user},A{(user + place) % 6},2024-01-{place + 1:02d}T12:00:00Z,{3 + place % 3}\n"
    for user in range(8)
    for place in range(6)
)
ITEMS = "sku,name,maker,category,price,text\n" + "".join(
    f'A{i},Thing {i},Maker,Shop > Kind {i % 2},"$1,{i}00.00",About thing {i}\n' for i in range(7)
)
OWN = ["--config", str(CONFIGS / "own-csv" / "prepare.yaml")]


def prepare(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    settings.pop("GENREC_DEBUG", None)
    command = [sys.executable, str(ROOT / "recipes" / "prepare.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=180)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "orders.csv").write_text(LOG)
    (folder / "products.csv").write_text(ITEMS)
    return folder


def test_own_csv_from_start_to_rerun(shop: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    base = [*OWN, "--data_dir", str(shop), "--run_dir", str(run_dir)]
    first = prepare(*base)
    assert first.returncode == 0, first.stderr
    assert "interactions" in first.stdout and "48" in first.stdout
    data = run_dir / "data"
    catalog = pl.read_parquet(data / "catalog.parquet")
    assert catalog.columns == [
        "item_index", "item_id", "title", "brand", "categories", "price", "description",
        "train_count",
    ]  # fmt: skip
    assert catalog["item_index"].to_list() == list(range(7))
    assert catalog["price"].to_list() == [1000.0 + 100 * i for i in range(7)]
    assert catalog["categories"][1].to_list() == ["Shop", "Kind 1"]
    assert catalog["train_count"].sum() == 32
    log = pl.read_parquet(data / "interactions.parquet")
    assert log.row(0) == ("c0", "A0", 0, 1704110400, 3.0, 0)
    splits = {n: pl.read_parquet(data / f"{n}.parquet") for n in ("train", "valid", "test")}
    assert {n: t.height for n, t in splits.items()} == {"train": 8, "valid": 8, "test": 8}
    assert splits["test"].schema["seen_item_index"] == pl.List(pl.Int32)
    assert splits["test"].row(0, named=True)["history_item_index"] == [0, 1, 2, 3, 4]
    split = json.loads((data / "split.json").read_text())
    assert split["protocol"] == "leave-one-out"
    assert split["tie_rule"] == "timestamp, then file order"
    assert split["rating_rule"] == "interactions rated 1 or more, as implicit feedback"
    assert (split["users"], split["items"], split["interactions"]) == (8, 7, 48)
    assert split["tie_share_of_last_two"] == 0.0
    assert split["boundaries"] == split["dropped_by_split"] == {}
    metrics = json.loads((data / "manifest.json").read_text())["metrics"]
    assert split["split_sha256"] == metrics["split_sha256"] == content_sha256(splits)

    manifest = (data / "manifest.json").read_bytes()
    again = prepare(*base)
    assert again.returncode == 0
    assert "skipped" in again.stderr
    assert (data / "manifest.json").read_bytes() == manifest

    other = prepare(*base, "--max_history", "3")
    assert other.returncode == 2
    assert "made with other max_history=20 (now 3)" in other.stderr
    assert (data / "manifest.json").read_bytes() == manifest

    forced = prepare(*base, "--max_history", "3", "--overwrite", "true")
    assert forced.returncode == 0, forced.stderr
    assert (run_dir / "data.old-1" / "manifest.json").read_bytes() == manifest
    assert pl.read_parquet(data / "test.parquet")["history_item_index"].list.len().max() == 3

    # Where the files lie is no setting: moved ones with the same content are the same data.
    moved = shop.rename(tmp_path / "moved")
    elsewhere = [*OWN, "--data_dir", str(moved), "--run_dir", str(run_dir), "--max_history", "3"]
    assert "skipped" in prepare(*elsewhere).stderr


def test_bad_input_ends_with_one_line_and_loses_nothing(shop: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    base = [*OWN, "--data_dir", str(shop), "--run_dir", str(run_dir)]
    assert prepare(*base).returncode == 0
    before = {p.name: p.read_bytes() for p in (run_dir / "data").iterdir()}

    (shop / "orders.csv").write_text(LOG + "c9,NOPE,2024-02-01,5\n")
    refused = prepare(*base)
    assert refused.returncode == 2
    assert "input 'interactions'" in refused.stderr
    assert {p.name: p.read_bytes() for p in (run_dir / "data").iterdir()} == before

    bad = prepare(*base, "--overwrite", "true")
    assert bad.returncode == 2
    error = [line for line in bad.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "lacks: 'NOPE'" in error[0] and "unknown_items: drop" in error[0]
    assert "Traceback" not in bad.stderr
    kept = [f for f in run_dir.iterdir() if (f / "manifest.json").exists()]
    assert any({p.name: p.read_bytes() for p in folder.iterdir()} == before for folder in kept)

    dropped = prepare(*base, "--overwrite", "true", "--unknown_items", "drop")
    assert dropped.returncode == 0, dropped.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "csv"], "format='csv' is not known; choose one of synthetic, sequences"),
        (["--format", "table"], "format='table' needs interactions: <path>"),
        (["--max_history", "0"], "max_history=0 must be at least 1"),
        (["--n_users", "50", "--expect_users", "51"], "the data have 50 users, expect_users=51"),
        (["--format", "table", "--interactions", "none.csv"], "none.csv not found"),
        (["--protocol", "random"], "protocol='random' is not known; choose one of leave-one-out"),
        (
            ["--protocol", "global-time", "--split_shares", "0.9", "0.2", "0.1"],
            "split_shares=[0.9, 0.2, 0.1] must be three positive numbers",
        ),
        (["--split_shares", "0.6", "0.2", "0.2"], "split_shares belongs to protocol: global-time"),
        (["--test_from", "2022-01-01"], "test_from belongs to protocol: time-cutoff"),
        (["--protocol", "time-cutoff"], "protocol='time-cutoff' needs valid_from: <date>"),
        (
            ["--protocol", "time-cutoff", "--valid_from", "May", "--test_from", "2023-01-01"],
            "'May' is no time; give an ISO date",
        ),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, args: list[str], message: str):
    result = prepare("--run_dir", str(tmp_path / "run"), *args)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "run" / "data" / "manifest.json").exists()


def test_own_csv_in_one_order_by_time(shop: Path, tmp_path: Path):
    """Eight users buy at noon on six days: 48 interactions, and each day is one second."""
    run_dir = tmp_path / "run"
    base = [*OWN, "--data_dir", str(shop), "--run_dir", str(run_dir), "--protocol", "global-time"]
    made = prepare(*base)
    assert made.returncode == 0, made.stderr
    split = json.loads((run_dir / "data" / "split.json").read_text())
    assert split["protocol"] == "global-time"
    # 80% end within day 5, 90% within day 6: both boundaries move to the start of their day.
    assert split["boundaries"] == {
        "valid_from": "2024-01-05T12:00:00+00:00",
        "test_from": "2024-01-06T12:00:00+00:00",
    }
    assert split["shares"] == {"train": 4 / 6, "valid": 1 / 6, "test": 1 / 6}
    assert "the second that a boundary names belongs to the later period" in split["tie_rule"]
    assert split["dropped_by_split"] == {"valid_without_history": 0, "test_without_history": 0}
    assert (split["test_rows"], split["test_users"]) == (8, 8)
    # The fifth and sixth of items (user + place) % 6: nobody bought one before.
    assert split["repeated_test_targets"] == split["cold_test_targets"] == 0.0
    for text in ("2024-01-05T12:00:00+00:00", "66.67%", split["split_sha256"][:40]):
        assert text in made.stdout

    other = prepare(*base, "--split_shares", "0.6", "0.2", "0.2")
    assert other.returncode == 2
    assert "split_shares=[0.8, 0.1, 0.1] (now [0.6, 0.2, 0.2])" in other.stderr


def test_own_csv_with_cutoff_dates(shop: Path, tmp_path: Path):
    config = tmp_path / "prepare.yaml"
    text = (CONFIGS / "own-csv" / "prepare.yaml").read_text()
    # A bare date is a date to YAML, not text.
    dates = "valid_from: 2024-01-04\ntest_from: 2024-01-05T00:00:00\ntest_until: '2024-01-07'\n"
    config.write_text(text + "protocol: time-cutoff\n" + dates)
    run_dir = tmp_path / "run"
    base = ["--config", str(config), "--data_dir", str(shop), "--run_dir", str(run_dir)]
    made = prepare(*base)
    assert made.returncode == 0, made.stderr
    split = json.loads((run_dir / "data" / "split.json").read_text())
    assert split["boundaries"] == {
        "valid_from": "2024-01-04T00:00:00+00:00",
        "test_from": "2024-01-05T00:00:00+00:00",
        "test_until": "2024-01-07T00:00:00+00:00",
    }
    assert split["relevant_per_test_row"] == 2.0
    test = pl.read_parquet(run_dir / "data" / "test.parquet")
    assert test["relevant_item_index"].to_list()[0] == [4, 5]
    assert test["history_item_index"].to_list()[0] == [0, 1, 2, 3]
    # The same moments written otherwise are the same settings.
    same = prepare(*base, "--valid_from", "1704326400", "--test_from", "2024-01-05T01:00:00+01:00")
    assert "skipped" in same.stderr, same.stderr


def test_data_without_times_are_not_split_by_time(tmp_path: Path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id\n" + "".join(f"u{i % 3},{i}\n" for i in range(12)))
    files = ["--format", "table", "--interactions", str(path), "--run_dir", str(tmp_path / "r")]
    result = prepare(*files, "--protocol", "global-time")
    assert result.returncode == 2
    assert "protocol='global-time' needs timestamps" in result.stderr
    assert "use protocol: leave-one-out" in result.stderr


def test_nothing_to_test_on_is_refused(tmp_path: Path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id\na,1\na,2\nb,1\n")
    result = prepare(
        "--format", "table", "--interactions", str(path), "--run_dir", str(tmp_path / "r")
    )
    assert result.returncode == 2
    assert "no user has 3 interactions" in result.stderr


def test_quickstart_and_a_sample_of_its_users(tmp_path: Path):
    config = ["--config", str(CONFIGS / "quickstart" / "prepare.yaml")]
    result = prepare(*config, "--run_dir", str(tmp_path), "--limit_users", "100")
    assert result.returncode == 0, result.stderr
    log = pl.read_parquet(tmp_path / "data" / "interactions.parquet")
    assert log["user_id"].n_unique() == 100
    assert pl.read_parquet(tmp_path / "data" / "catalog.parquet").height == 600


@pytest.mark.parametrize("name", ["beauty", "movielens-100k"])
def test_published_datasets(name: str, genrec_data: Path, tmp_path: Path):
    config = CONFIGS / name / "prepare.yaml"
    result = prepare(
        "--config", str(config), "--run_dir", str(tmp_path), GENREC_DATA=str(genrec_data)
    )
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "data" / "manifest.json").read_text())["metrics"]
    expected = yaml.safe_load(config.read_text())
    for key in ("users", "items", "interactions"):
        assert metrics[key] == expected[f"expect_{key}"]


def test_every_config_opens_with_its_command():
    configs = sorted(CONFIGS.glob("*/prepare.yaml"))
    assert len(configs) >= 4
    for config in configs:
        relative = config.relative_to(ROOT).as_posix()
        assert f"genrec prepare --config {relative}" in config.read_text().splitlines()[0]
