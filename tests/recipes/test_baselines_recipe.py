"""`genrec baselines`: one table of all baselines, from a cache that evaluate finds."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from genrec.artifacts import Stage, write_json, write_parquet
from genrec.cli import recipes_folder
from genrec.data.splits import leave_one_out
from genrec.evaluation import suite
from genrec.evaluation.sequential import SequentialSettings
from genrec.evaluation.suite import load_split_data

RECIPE = recipes_folder() / "baselines.py"
N_ITEMS, N_USERS = 15, 30
DAY = 86_400


@pytest.fixture(scope="module")
def module() -> dict[str, Any]:
    return runpy.run_path(str(RECIPE), run_name="baselines")


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A prepared run without timestamps or item vectors."""
    run = tmp_path / "run"
    stage = Stage(run, "prepare", {})
    stage.is_done()
    rng = np.random.default_rng(0)
    length = rng.integers(4, 9, N_USERS)
    items = np.concatenate([rng.choice(N_ITEMS, n, replace=False) for n in length])
    log = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(N_USERS), length),
            "item_index": items.astype(np.int32),
            "timestamp": pl.Series([None] * len(items), dtype=pl.Int64),
            "position": np.concatenate([np.arange(n) for n in length]).astype(np.int32),
        }
    )
    splits = leave_one_out(log, N_ITEMS)
    write_parquet(stage.folder / "catalog.parquet", pl.DataFrame({"item_index": range(N_ITEMS)}))
    write_parquet(stage.folder / "interactions.parquet", log)
    for name in ("train", "valid", "test"):
        write_parquet(stage.folder / f"{name}.parquet", getattr(splits, name))
    write_json(stage.folder / "split.json", {"content_sha256": splits.sha256()})
    stage.finish(rows=log.height)
    return run


@pytest.fixture
def baselines(module, monkeypatch, capsys):
    """Runs the recipe as the command line does; gives what it printed."""

    def run(run_dir: Path, *flags: str) -> str:
        argv = [str(RECIPE), "--run_dir", str(run_dir), "--samples", "20", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        module["main"]()
        return capsys.readouterr().out

    return run


def reads(run: Path) -> list[dict]:
    path = run / "test_reads.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def values(text: str, system: str) -> list[float]:
    """Figures of a system's line in the printed table."""
    line = next(x for x in text.splitlines() if x.strip().startswith(f"{system} "))
    return [float(word) for word in line.split() if word.count(".") == 1 and word[0] in "01"]


def test_validation_is_the_default_and_test_is_noted(run_dir, baselines):
    some = ["--baselines", "popularity", "item-kNN", "--k", "8"]
    text = baselines(run_dir, *some)
    assert "run, valid: 30 rows, seen items left out" in text and reads(run_dir) == []
    for column in ("HR@5", "NDCG@5", "HR@8", "NDCG@8"):
        assert column in text
    assert "popularity: nothing to tune" in text and "item-kNN: decay=" in text
    assert f"cached in {run_dir.parent / 'baselines-cache'}" in text
    text = baselines(run_dir, *some, "--split", "test", "--dataset", "a shop")
    assert "a shop, test: 30 rows" in text
    [read] = reads(run_dir)
    assert (read["stage"], read["systems"]) == ("baselines", ["popularity", "item-kNN"])


def test_the_figures_are_those_of_the_lists(run_dir, baselines, monkeypatch):
    cache = run_dir.parent / "elsewhere"
    text = baselines(run_dir, "--baselines", "popularity", "--k", "3", "--cache_dir", str(cache))
    rows = pl.read_parquet(run_dir / "data" / "valid.parquet")
    data = load_split_data(run_dir, rows, "valid", 3, True)
    monkeypatch.setattr(suite, "FITTED", {"popularity": lambda *_: pytest.fail("fitted again")})
    lists = suite.baseline("popularity", data, cache).lists[0]
    rank = (lists == rows["target_item_index"].to_numpy()[:, None]).argmax(axis=1) + 1
    hit = (lists == rows["target_item_index"].to_numpy()[:, None]).any(axis=1)
    expected = [hit.mean(), (hit / np.log2(rank + 1)).mean()]
    assert 0 < expected[0] < 1 and values(text, "popularity") == pytest.approx(expected, abs=6e-5)


def test_all_relevant_items_of_a_row_count(run_dir, baselines):
    text = baselines(run_dir, "--baselines", "popularity", "--k", "3")
    path = run_dir / "data" / "valid.parquet"
    rows = pl.read_parquet(path)
    everything = pl.lit(pl.Series([list(range(N_ITEMS))])).first().cast(pl.List(pl.Int32))
    rows.with_columns(everything.alias("relevant_item_index")).write_parquet(path)
    manifest = json.loads((run_dir / "data" / "manifest.json").read_text())
    manifest["outputs"]["valid.parquet"]["bytes"] = path.stat().st_size
    (run_dir / "data" / "manifest.json").write_text(json.dumps(manifest))
    several = baselines(run_dir, "--baselines", "popularity", "--k", "3")
    assert values(several, "popularity") == [1, 1] != values(text, "popularity")


def test_what_cannot_run_is_named_beside_the_rest(run_dir, baselines):
    text = baselines(run_dir, "--baselines", "recent-popularity", "content-kNN", "random")
    assert "recent-popularity is left out: recent popularity needs timestamps" in text
    assert "content-kNN is left out: content-kNN needs item vectors" in text
    assert values(text, "random")
    with pytest.raises(ValueError, match="no baseline could run: recent-popularity is left out"):
        baselines(run_dir, "--baselines", "recent-popularity")


def test_models_are_trained_once_per_seed_and_both_splits_share_them(
    run_dir, baselines, monkeypatch
):
    tiny = SequentialSettings(dim=8, layers=1, heads=1, max_epochs=1, patience=1)
    settings = {"SASRec": tiny, "BERT4Rec": replace(tiny, causal=False)}
    monkeypatch.setattr(SequentialSettings, "of", classmethod(lambda _, name: settings[name]))
    flags = ["--baselines", "SASRec", "BERT4Rec", "--training_seeds", "0", "1", "2"]
    text = baselines(run_dir, *flags)
    assert "SASRec (3 seeds)" in text and "BERT4Rec (3 seeds)" in text
    assert "full softmax, 3 training seeds" in text
    states = {
        p.name: p.stat().st_mtime_ns
        for p in (run_dir.parent / "baselines-cache").glob("*/training*/*.pt")
    }
    assert len(states) == 2 * 4  # two dropouts for the first seed, one for the others
    baselines(run_dir, *flags, "--split", "test")
    after = {
        p.name: p.stat().st_mtime_ns
        for p in (run_dir.parent / "baselines-cache").glob("*/training*/*.pt")
    }
    assert after == states
    monkeypatch.setattr(suite, "_train", lambda *_: pytest.fail("trained again"))
    assert baselines(run_dir, *flags) == text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--baselines", "SasRec"], "baselines='SasRec' is not known"),
        (["--split", "train"], "split='train' is not known"),
        (["--fit_on", "everything"], "fit_on='everything' is not known"),
        (["--fit_on", "train+valid"], "holds the validation targets; use --split test"),
        (["--device", "gpu"], "device='gpu' is not known"),
        (["--k", "0"], "k=0 must be at least 1"),
        (["--samples", "0"], "samples=0 must be at least 1"),
        (["--training_seeds", "2", "2"], r"training_seeds=\[2, 2\] must be distinct"),
    ],
)
def test_settings_are_checked_before_anything_is_read(tmp_path, baselines, flags, message):
    with pytest.raises(ValueError, match=message):
        baselines(tmp_path / "nothing", *flags)


def test_a_gpu_that_is_not_there_is_missed_before_anything_is_read(
    tmp_path, baselines, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="device=cuda, but torch finds no GPU"):
        baselines(tmp_path / "nothing", "--device", "cuda")


def test_as_a_command(run_dir):
    command = [sys.executable, str(RECIPE), "--run_dir", str(run_dir.parent / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "stage 'prepare' has not finished" in done.stderr
