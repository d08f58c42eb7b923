"""Several runs' lists as one, and evaluated as anybody's."""

from __future__ import annotations

import json
import shutil

import polars as pl


def test_two_runs_become_one_system(in_process, tiny_run, tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        shutil.copytree(tiny_run, run)
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


def test_a_memory_beside_one_run(in_process, tiny_run, tmp_path):
    output, cache = tmp_path / "remembered.parquet", tmp_path / "cache"
    flags = ["--runs", str(tiny_run), "--k", "5", "--cache_dir", str(cache)]
    said = in_process("ensemble", None, *flags, "--memory_weight", "0.9", "--output", str(output))
    assert "by 1 model and a memory of weight 0.9" in said
    assert "item memory: decay=" in said and "validation NDCG@10" in said
    mixed = pl.read_parquet(output)
    own = pl.read_parquet(tiny_run / "recommendations" / "recommendations-*.parquet")
    assert set(mixed["row_id"]) == set(own["row_id"]) and mixed["rank"].max() == 5
    known = own.select("row_id", "item_id", model="score")
    both = mixed.join(known, on=["row_id", "item_id"], how="left")
    # What the model doesn't list comes from the memory, and what it lists lost or gained.
    assert both["model"].null_count() > 0
    assert (mixed["score"] <= 1e-6).all()
    seen = pl.read_parquet(tiny_run / "data" / "test.parquet").select("row_id", "seen_item_index")
    ids = pl.read_parquet(tiny_run / "data" / "catalog.parquet")["item_id"]
    seen = seen.explode("seen_item_index").drop_nulls()
    had = seen.select("row_id", ids.gather(seen["seen_item_index"]).alias("item_id"))
    assert mixed.join(had, on=["row_id", "item_id"], how="semi").is_empty()
    both = ["--memory_weight", "0.3", "--output", str(tmp_path / "both.parquet")]
    repeated = tmp_path / "again"
    shutil.copytree(tiny_run, repeated)
    two = ["--runs", str(tiny_run), str(repeated), *flags[2:], *both]
    assert "by 2 models and a memory of weight 0.3" in in_process("ensemble", None, *two)
    more = ["--output", str(tmp_path / "x.parquet")]
    assert "at least two run folders" in in_process("ensemble", None, *flags, *more, fails=True)
    lonely = [*flags, "--memory_power", "3", "--runs", str(tiny_run), str(repeated), *more]
    assert "set memory_weight" in in_process("ensemble", None, *lonely, fails=True)
    for name, value in (("weight", "1"), ("power", "0"), ("power", "inf")):
        wrong = ["--memory_weight", "0.5", f"--memory_{name}", value, *more]
        assert f"memory_{name}=" in in_process("ensemble", None, *flags, *wrong, fails=True)


def test_lists_that_a_memory_would_break(in_process, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    manifest = run / "recommendations" / "manifest.json"
    plain = json.loads(manifest.read_text())
    output = ["--output", str(tmp_path / "x.parquet"), "--k", "5"]
    flags = ["--runs", str(run), *output, "--memory_weight", "0.2"]
    two = ["--runs", str(tiny_run), str(run), *output]

    def told(change: dict) -> None:
        manifest.write_text(json.dumps({**plain, **change}))

    for rule in ("allow", "deny", "opt_out", "max_cosine", "sampler"):
        told({"config": {**plain["config"], rule: "a"}})
        assert f"made with {rule}, which a memory" in in_process(
            "ensemble", None, *flags, fails=True
        )
    told({"config": {**plain["config"], "normalizer": "full"}})
    assert "are no distribution over items" in in_process("ensemble", None, *flags, fails=True)
    assert "normalizer=" in in_process("ensemble", None, *two, fails=True)
    told({"inputs": {**plain["inputs"], "deny": "0" * 64}})
    assert "made with deny=" in in_process("ensemble", None, *two, fails=True)
    told({"inputs": {}})
    assert "holds no lists of a split" in in_process("ensemble", None, *flags, fails=True)
    told({})
    shard = next((run / "recommendations").glob("recommendations-*.parquet"))
    shard.write_bytes(shard.read_bytes() + b"more")
    assert "its manifest says" in in_process("ensemble", None, *two, fails=True)
    shutil.rmtree(run / "recommendations")
    assert "recommend" in in_process("ensemble", None, *flags, fails=True)
