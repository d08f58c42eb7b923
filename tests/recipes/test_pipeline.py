"""What the pipeline shows at its end; `test_readme.py` runs the whole command."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
make_listed_run = runpy.run_path(str(ROOT / "tests" / "explain" / "conftest.py"))["make_listed_run"]
show_list = runpy.run_path(str(ROOT / "recipes" / "pipeline.py"))["show_list"]


def make_run(tiny, run: Path, split: str) -> dict[str, Any]:
    """A run whose titles are item indices; returns the split row of the list that is shown."""
    make_listed_run(tiny, run, split=split)
    path = run / "data" / "catalog.parquet"
    catalog = pl.read_parquet(path)
    catalog.with_columns(title=pl.col("item_index").cast(pl.String)).write_parquet(path)
    accept(run, path)
    lists = pl.read_parquet(run / "recommendations" / "recommendations-*.parquet")
    rows = pl.read_parquet(run / "data" / f"{split}.parquet")
    return rows.filter(row_id=lists["row_id"][0]).row(0, named=True)


def accept(run: Path, path: Path) -> None:
    """Let the manifest agree with a changed file, as if it had been prepared like this."""
    manifest = run / "data" / "manifest.json"
    said = json.loads(manifest.read_text())
    said["outputs"][path.name]["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(said))


def shown(run: Path, split: str) -> tuple[str, list[int]]:
    """The line that counts the history, and the items below it."""
    console = Console(width=200, highlight=False)
    with console.capture() as capture:
        show_list(run, split, console)
    lines = capture.get().splitlines()
    return lines[1], [int(line[4:]) for line in lines if line.startswith("  · ")]


def test_until_ends_there_also_where_that_stage_has_no_file(in_process, tmp_path):
    configs, run = tmp_path / "configs", tmp_path / "run[1]"
    configs.mkdir()
    shop = "format: synthetic\nn_users: 60\nn_items: 40\n"
    for stage, text in {
        "prepare": shop, "embed": "dim: 4\n", "quantize": "n_levels: 2\ncodebook_size: 8\n",
        "build_dataset": "tasks: [sequential]\n",
    }.items():  # fmt: skip
        (configs / f"{stage}.yaml").write_text(text)
    in_process("pipeline", run, "--configs", str(configs), "--until", "prune")
    assert {p.name for p in run.iterdir() if p.is_dir()} == {"data", "embeddings", "semantic_ids"}
    # A run folder is no pattern.
    other = tmp_path / "run1" / "data"
    other.mkdir(parents=True)
    (other / "catalog.parquet").write_bytes(b"no table")
    in_process("pipeline", run, "--configs", str(configs))
    assert (run / "dataset" / "train.parquet").exists()


@pytest.mark.parametrize("split", ["test", "valid"])
def test_the_history_ends_before_the_target(tiny, tmp_path, split):
    row = make_run(tiny, tmp_path, split)
    said, history = shown(tmp_path, split)
    assert said == f"User {row['user_id']} had {row['target_position']} items, the last ones:"
    assert history == row["history_item_index"][-5:]


def test_a_target_in_the_middle_of_the_log(tiny, tmp_path):
    """Splits by time have such rows, and several of one user."""
    row = make_run(tiny, tmp_path, "test")
    path = tmp_path / "data" / "test.parquet"
    mine, other = pl.col("row_id") == row["row_id"], pl.col("row_id") + "-b"
    log = pl.read_parquet(tmp_path / "data" / "interactions.parquet")
    items = log.filter(user_id=row["user_id"]).sort("position")["item_index"].to_list()
    place = pl.when(mine).then(2).otherwise("target_position").cast(pl.Int32)
    rows = pl.read_parquet(path)
    earlier = [
        items[:2] if row_id == row["row_id"] else history
        for row_id, history in rows.select("row_id", "history_item_index").iter_rows()
    ]
    histories = pl.Series("history_item_index", earlier, dtype=pl.List(pl.Int32))
    moved = rows.with_columns(histories, target_position=place)
    pl.concat([rows.with_columns(row_id=other), moved]).write_parquet(path)
    accept(tmp_path, path)
    assert row["target_position"] == len(items) - 1 > 2
    said, history = shown(tmp_path, "test")
    assert said == f"User {row['user_id']} had 2 items, the last ones:"
    assert history == items[:2]


@pytest.mark.slow
def test_seeds_are_trained_on_the_same_data_and_compared(tmp_path, recipe, tiny_flags):
    """`--seeds 0 1`: two runs that differ in training alone, and one system in the comparison."""
    configs = tmp_path / "configs"
    configs.mkdir()
    for stage in ("prepare", "embed", "quantize", "build_dataset", "sft", "recommend", "evaluate"):
        flags = tiny_flags[stage]
        values = dict(zip([f.removeprefix("--") for f in flags[::2]], flags[1::2], strict=True))
        values.pop("seed", None)
        text = "".join(f"{key}: {value}\n" for key, value in values.items())
        (configs / f"{stage}.yaml").write_text(text or "seed: 0\n")
    run = tmp_path / "runs"
    recipe("pipeline", run, "--configs", str(configs), "--seeds", "0", "1")
    one, two = (run / f"seed-{n}" for n in (0, 1))
    for stage in ("data", "embeddings", "semantic_ids", "dataset"):
        manifests = [(r / stage / "manifest.json").read_bytes() for r in (one, two)]
        assert manifests[0] == manifests[1]
    seeds = [json.loads((r / "sft" / "manifest.json").read_text())["seed"] for r in (one, two)]
    assert seeds == [0, 1]
    weights = [(r / "sft" / "model" / "model.safetensors").read_bytes() for r in (one, two)]
    assert weights[0] != weights[1]
    found = json.loads((run / "comparison" / "comparison.json").read_text())
    assert len(found["systems"]["genrec"]["NDCG@10"]["seeds"]) == 2
    again = recipe("pipeline", run, "--configs", str(configs), "--seeds", "0", "1")
    assert "complete, skipped" in again.stderr
    assert (run / "comparison.old-1").is_dir()  # nothing is overwritten


def test_seeds_must_be_distinct(tmp_path, recipe):
    done = recipe("pipeline", tmp_path / "run", "--seeds", "1", "1", fails=True)
    assert "seeds=[1, 1] must be distinct" in done.stderr
