"""Several runs' lists as one, and evaluated as anybody's."""

from __future__ import annotations

import json
import shutil

import polars as pl


def test_two_runs_become_one_system(in_process, tiny_run, tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        for name in ("data", "recommendations"):
            shutil.copytree(tiny_run / name, run / name)
    output = tmp_path / "lists" / "both.parquet"
    flags = ["--runs", str(runs[0]), str(runs[1]), "--output", str(output), "--k", "5"]
    said = in_process("ensemble", None, *flags)
    assert "lists of 5 by 2 models" in said and "have 10 items" in said
    mixed = pl.read_parquet(output).sort("row_id", "rank")
    own = pl.read_parquet(runs[0] / "recommendations" / "recommendations-*.parquet")
    own = own.filter(pl.col("rank") <= 5).sort("row_id", "rank")
    # Of two equal models the mixture is the model.
    assert mixed.select("row_id", "item_id", "rank").equals(own.select("row_id", "item_id", "rank"))
    assert "exists; name another file" in in_process("ensemble", None, *flags, fails=True)
    again = [*flags[:4], str(tmp_path / "more.parquet"), "--k", "11"]
    assert "lists of 10, fewer than k=11" in in_process("ensemble", None, *again, fails=True)
    manifest = runs[1] / "recommendations" / "manifest.json"
    told = json.loads(manifest.read_text())
    told["config"]["filter_seen"] = not told["config"]["filter_seen"]
    manifest.write_text(json.dumps(told))
    other = [*flags[:4], str(tmp_path / "more.parquet")]
    assert "they can't be mixed" in in_process("ensemble", None, *other, fails=True)
    same = ["--runs", str(runs[0]), str(runs[0]), "--output", str(tmp_path / "x.parquet")]
    assert "each once" in in_process("ensemble", None, *same, fails=True)
