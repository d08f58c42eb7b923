"""Lists for anybody's users: tables, parts, filters, kills, damage."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

import genrec.artifacts
import genrec.generation.users
from genrec.artifacts import Stage, load_manifest, read_json, require
from genrec.audit.records import read_opened
from genrec.engine_options import engine_options
from genrec.generation.users import UserTable
from genrec.recommend import Recommender

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "recommend.py"
FLAGS = "--k 4 --beam_width 10 --shard_size 4".split()
MAX_HISTORY = 6


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory) -> Path:
    """A run with a random model, made by library calls; read only."""
    run = tmp_path_factory.mktemp("tiny") / "run"
    shop = tiny.shop(strings=True, max_history=MAX_HISTORY)
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(run, shop, model, tokenizer, MAX_HISTORY)
    return run


@pytest.fixture(scope="module")
def users(run_dir, tmp_path_factory) -> Path:
    """22 users with histories of 0 to 9 items."""
    ids = pl.read_parquet(run_dir / "data" / "catalog.parquet")["item_id"]
    lists = [[ids[(3 * u + i) % 20] for i in range(u % 10)] for u in range(22)]
    path = tmp_path_factory.mktemp("users") / "users.parquet"
    pl.DataFrame({"user_id": [f"u{u}" for u in range(22)], "history": lists}).write_parquet(path)
    return path


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "recommendations").glob("recomm*.parquet")}


def lists_of(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "recommendations" / "recommendations-*.parquet")


def test_users_of_a_table(in_process, run_dir, users, tmp_path: Path):
    before = sorted(run_dir.rglob("*"))
    flags = [*FLAGS, "--users", str(users), "--output_dir", str(tmp_path / "out")]
    said = in_process("recommend", run_dir, *flags)
    assert "22 lists of 4 by the sft model on torch" in said
    assert sorted(run_dir.rglob("*")) == before  # nor was the test split read
    manifest = require(tmp_path / "out", "recommend")
    assert manifest.rows == 88 and manifest.metrics["users"] == 22
    assert manifest.metrics["without_history"] == 3 and manifest.metrics["unknown_items"] == 0
    assert {"users", "run_dir/sft", "run_dir/prepare"} <= set(manifest.inputs)
    assert len(shards(tmp_path / "out")) == 6
    table = lists_of(tmp_path / "out")
    recommender = Recommender.load(run_dir)
    for row in pl.read_parquet(users)[[0, 7, 21]].iter_rows(named=True):
        mine = table.filter(pl.col("user_id") == row["user_id"])
        served = recommender.recommend(row["history"], 4, beam_width=10)
        assert mine["item_id"].to_list() == [r.item_id for r in served]
        assert mine["score"].to_list() == pytest.approx([r.score for r in served], abs=1e-5)
    assert "lists of 4" not in in_process("recommend", run_dir, *flags)  # skipped
    assert require(tmp_path / "out", "recommend") == manifest
    more = pl.read_parquet(users)[:21]
    more.write_parquet(tmp_path / "users.parquet")
    flags[flags.index(str(users))] = str(tmp_path / "users.parquet")
    said = in_process("recommend", run_dir, *flags, fails=True)
    assert "was made with other" in said and "input 'users'" in said


def test_rules_for_lists(in_process, run_dir, users, tmp_path: Path):
    def lists(name: str, *more: str) -> pl.DataFrame:
        flags = [*FLAGS, "--users", str(users), "--output_dir", str(tmp_path / name), *more]
        in_process("recommend", run_dir, *flags)
        return lists_of(tmp_path / name)

    catalog = pl.read_parquet(run_dir / "data" / "catalog.parquet")
    kinds = catalog.select("item_id", kind=pl.col("categories").list.get(-1))
    capped = lists("capped", "--max_per_category", "1").join(kinds, "item_id")
    assert capped.group_by("user_id", "kind").len()["len"].max() == 1
    boosted = lists("boosted", "--boosts", "Kind 1=1e12").join(kinds, "item_id")
    assert set(boosted["kind"]) == {"Kind 1"}
    embed = Stage(run_dir, "embed", {}, ["prepare"])
    assert not embed.is_done()
    np.save(embed.folder / "item_embeddings.npy", np.ones((len(catalog), 4), dtype=np.float32))
    embed.finish(rows=len(catalog))
    unlike = lists("unlike", "--max_cosine", "0.99")  # all resemble the best
    assert unlike.group_by("user_id").len()["len"].to_list() == [1] * 22
    assert "run_dir/embed" in require(tmp_path / "unlike", "recommend").inputs
    assert "run_dir/embed" not in require(tmp_path / "capped", "recommend").inputs
    drawn = lists("drawn", "--sampler", "levels", "--temperature", "3", "1", "1", "--seed", "1")
    again = lists("again", "--sampler", "levels", "--temperature", "3", "1", "1", "--seed", "2")
    assert drawn["item_id"].to_list() != again["item_id"].to_list()
    for flags, message in (
        (["--sampler", "gumbel"], "are for --users"),
        (["--one_per_title", "true"], "are for --users"),
        (["--temperature", "2"], "belong to sampler=levels"),
        (["--sampler", "some"], "sampler='some' is not known"),
        (["--boosts", "Kind 1"], "boosts"),
    ):
        assert message in in_process("recommend", run_dir, *FLAGS, *flags, fails=True)


def test_a_memory_beside_the_model(in_process, tiny_run, tmp_path: Path):
    run_dir, folder, users = tiny_run, tmp_path / "lists", tmp_path / "users.parquet"
    ids = pl.read_parquet(run_dir / "data" / "catalog.parquet")["item_id"]
    lists = [[ids[(3 * u + i) % len(ids)] for i in range(u % 10)] for u in range(22)]
    pl.DataFrame({"user_id": [f"u{u}" for u in range(22)], "history": lists}).write_parquet(users)
    flags = [*FLAGS, "--users", str(users), "--output_dir", str(folder), "--normalizer", "trie"]
    mixed = [*flags, "--memory_weight", "0.6", "--cache_dir", str(tmp_path / "cache")]
    said = in_process("recommend", run_dir, *mixed)
    assert "item memory: decay=" in said and "22 lists of 4" in said
    config = require(folder, "recommend").config
    assert (config["memory_weight"], config["memory_power"]) == (0.6, 2.0)
    table = lists_of(folder)
    assert table.group_by("user_id").len()["len"].to_list() == [4] * 22
    alone = [str(tmp_path / "plain") if flag == str(folder) else flag for flag in flags]
    in_process("recommend", run_dir, *alone)
    plain = lists_of(tmp_path / "plain")
    assert "memory_weight" not in require(tmp_path / "plain", "recommend").config
    keys = ["user_id", "item_id"]
    both = table.join(plain, keys)
    assert both["score"].to_list() == pytest.approx(both["score_right"].to_list(), abs=1e-5)
    moved = table.join(plain, keys, how="anti")
    assert 0 < len(both) and 10 < len(moved)
    # Whoever has no history gets the model's own.
    nobody = pl.read_parquet(users).filter(pl.col("history").list.len() == 0)["user_id"]
    assert moved.filter(pl.col("user_id").is_in(nobody.implode())).is_empty()
    # Records say so, and that they can't be replayed.
    source = ["--source_run", str(run_dir)]
    in_process("audit", folder, *source)
    (first, *_) = read_opened(folder / "audit")
    rules = {rule["name"]: rule["rule"] for rule in first["filters"]}
    assert rules["shaping"] == "memory_weight=0.6, memory_power=2.0"
    in_process("audit", None, "verify", "--run_dir", str(folder), *source)
    again = ["replay", "--run_dir", str(folder), *source, "--record", "0"]
    said = in_process("audit", None, *again, fails=True)
    assert "made under the rules ['shaping']" in said
    other = [*mixed[: mixed.index("0.6")], "0.5", *mixed[mixed.index("0.6") + 1 :]]
    assert "was made with other" in in_process("recommend", run_dir, *other, fails=True)
    for more, message in (
        ([*FLAGS, "--memory_weight", "0.2"], "memory_weight is for --users"),
        ([*mixed, "--normalizer", "full"], "memory_weight needs normalizer=trie"),
        ([*mixed, "--memory_weight", "1"], "memory_weight=1.0 must be at least 0"),
        ([*mixed, "--memory_power", "0"], "memory_power=0.0 must be above 0"),
        ([*flags, "--memory_power", "3"], "set memory_weight, too"),
        ([*mixed, "--sampler", "gumbel"], "either drawn"),
    ):
        assert message in in_process("recommend", run_dir, *more, fails=True)


def test_rules_are_checked_before_users_are_read(
    in_process, run_dir, users, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(UserTable, "__init__", None)  # reading would fail otherwise
    flags = [*FLAGS, "--users", str(users), "--output_dir", str(tmp_path / "out")]
    for more, message in (
        (["--sampler", "gumbel", "--normalizer", "full"], "sampler=gumbel needs normalizer=trie"),
        (["--sampler", "levels", "--temperature", "1", "2"], "has 2 numbers for 3 levels"),
        (["--sampler", "levels", "--top_p", "1", "1", "1", "1"], "has 4 numbers for 3 levels"),
        (["--sampler", "levels", "--engine", "vllm"], "sampler=levels needs engine=torch, not"),
        (["--boosts", "a=b=2"], "no item is labelled 'a=b'"),
        (["--max_per_category", "1", "--category_depth", "5"], "category_depth=5: "),
        (["--one_per_title", "true", "--title_variant", "("], "title_variant='('"),
    ):
        assert message in in_process("recommend", run_dir, *flags, *more, fails=True)
    assert not (tmp_path / "out").exists()


def test_text_files_and_unknown_items(in_process, run_dir, users, tmp_path: Path):
    table = pl.read_parquet(users).with_columns(pl.col("history").list.join("|"))
    changed = table.with_columns(
        pl.when(pl.col("user_id") == "u5").then(pl.col("history") + "|gone")
        .otherwise(pl.col("history")).alias("history")
    )  # fmt: skip
    changed.write_csv(tmp_path / "users.csv")
    out = tmp_path / "out"
    flags = [*FLAGS, "--users", str(tmp_path / "users.csv"), "--output_dir", str(out)]
    flags += ["--list_separator", "|"]
    said = in_process("recommend", run_dir, *flags, fails=True)
    assert "row 6: 'history' of user 'u5' holds 'gone', which is not in the catalogue" in said
    assert not shards(out)
    said = in_process("recommend", run_dir, *flags, "--unknown_items", "drop")
    assert "1 items that the catalogue lacks are left out of the rows of 1 users" in said
    assert require(out, "recommend").metrics["unknown_items"] == 1
    assert not list((out / "recommendations").glob(".*"))  # the Parquet copy is gone
    in_process(
        "recommend", run_dir, *FLAGS, "--users", str(users), "--output_dir", str(tmp_path / "b")
    )
    assert_frame_equal(lists_of(out), lists_of(tmp_path / "b"))


def test_parts_in_any_order(in_process, run_dir, users, tmp_path: Path, monkeypatch):
    flags = [*FLAGS, "--users", str(users), "--output_dir"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    in_process("recommend", run_dir, *flags, str(whole))
    said = in_process("recommend", run_dir, *flags, str(parts), "--shard", "3/3")
    assert "part 3/3 is done; the stage is not: 4 of 6 shards are missing, the first is " in said
    assert "recommendations-0000000000-0000000003.parquet" in said
    assert load_manifest(parts, "recommend") is None
    progress = read_json(parts / "recommendations" / "progress-3of3.json")
    assert (progress["users"], progress["done"], progress["eta_s"]) == (6, 6, 0)
    monkeypatch.setattr(genrec.generation.users, "sha256_file", None)  # hashed once for all parts
    said = in_process("recommend", run_dir, *flags, str(parts), "--shard", "1/3")
    assert "2 of 6 shards are missing" in said
    said = in_process("recommend", run_dir, *flags, str(parts), "--shard", "2/3")
    assert "22 lists of 4" in said
    assert shards(parts) == shards(whole)
    made = require(parts, "recommend")
    assert made.metrics["users"] == made.metrics["timed_users"] == 22
    timed = [read_json(p) for p in (parts / "recommendations").glob("progress-*of3.json")]
    seconds = sum(part["timed_seconds"] for part in timed)
    assert made.metrics["users_per_s"] == pytest.approx(22 / seconds, abs=0.1)
    assert not [name for name in made.outputs if name.startswith("progress")]
    said = in_process("recommend", run_dir, *flags, str(parts), "--shard", "4/3", fails=True)
    assert "the part must lie between 1 and 3" in said
    again = [*flags, str(parts), "--shard", "1/3", "--overwrite", "true"]
    assert "--overwrite with --shard" in in_process("recommend", run_dir, *again, fails=True)


def test_a_part_with_other_settings_is_refused(in_process, run_dir, users, tmp_path: Path):
    out = tmp_path / "out"
    flags = [*FLAGS, "--users", str(users), "--output_dir", str(out), "--shard"]
    in_process("recommend", run_dir, *flags, "1/2")
    kept = shards(out)
    said = in_process("recommend", run_dir, *flags, "2/2", "--k", "3", fails=True)
    assert "is being written with other k=4 (now 3); give all parts the same settings" in said
    assert shards(out) == kept and not list(out.glob("recommendations.old-*"))
    (out / "recommendations" / "in_progress.json").write_text("{")
    said = in_process("recommend", run_dir, *flags, "2/2", fails=True)
    assert "doesn't say of which run; move it away" in said and shards(out) == kept
    in_process("recommend", run_dir, *flags[:-1])  # alone, the whole job mends it
    assert require(out, "recommend").rows == 88


def test_a_folder_that_another_run_takes(in_process, run_dir, users, tmp_path: Path, monkeypatch):
    """A part must not write into it, nor call itself done."""
    import genrec.generation.jobs

    out = tmp_path / "out" / "recommendations"
    flags = [*FLAGS, "--users", str(users), "--output_dir", str(out.parent), "--shard", "1/2"]
    real = genrec.generation.jobs.write_shard

    def and_lose(path, table, info):
        made = real(path, table, info)
        path.unlink()
        return made

    with monkeypatch.context() as patched:
        patched.setattr(genrec.generation.jobs, "write_shard", and_lose)
        said = in_process("recommend", run_dir, *flags, fails=True)
    assert (
        "3 finished shards of part 1/2 are gone or damaged" in said
        and "part 1/2 is done" not in said
    )

    def and_take(path, table, info):
        made = real(path, table, info)
        state = {"fingerprint": "e" * 64, "config": {}}
        (out / "in_progress.json").write_text(json.dumps(state))
        return made

    monkeypatch.setattr(genrec.generation.jobs, "write_shard", and_take)
    said = in_process("recommend", run_dir, *flags, fails=True)
    assert "now belongs to a run of other settings or inputs (eeeeeeeeeeee, this one is" in said
    assert len(shards(out.parent)) == 1


def test_allow_and_deny_lists(in_process, run_dir, users, tmp_path: Path):
    ids = pl.read_parquet(run_dir / "data" / "catalog.parquet")["item_id"].to_list()
    allow, deny = tmp_path / "allow.txt", tmp_path / "deny.txt"
    allow.write_text("\n".join(ids[:14]))
    deny.write_text(f"{ids[0]}\n{ids[1]}\n")
    out = ["--output_dir", str(tmp_path / "out")]
    flags = [*FLAGS, "--users", str(users), "--allow", str(allow), "--deny", str(deny)]
    in_process("recommend", run_dir, *flags, *out)
    made = require(tmp_path / "out", "recommend")
    assert set(lists_of(tmp_path / "out")["item_id"]) <= set(ids[2:14])
    assert {"allow", "deny"} <= set(made.inputs)
    allow.write_text("\n".join(ids[:15]))
    said = in_process("recommend", run_dir, *flags, *out, fails=True)
    assert "input 'allow'" in said
    for content, message in (
        ("", "names no item"),
        (ids[0], "denies every item"),
        ("zzz", "1 items are not in the catalogue, the first is 'zzz'"),
    ):
        allow.write_text(content)
        said = in_process(
            "recommend", run_dir, *flags, "--output_dir", str(tmp_path / "n"), fails=True
        )
        assert message in said
    assert not (tmp_path / "n").exists()
    flags[flags.index(str(allow))] = str(tmp_path / "absent")
    said = in_process("recommend", run_dir, *flags, *out, fails=True)
    assert "absent is not a file; name a list of item ids" in said


def test_damage_and_strangers(in_process, run_dir, users, tmp_path: Path):
    out = tmp_path / "out"
    flags = [*FLAGS, "--users", str(users), "--output_dir", str(out)]
    in_process("recommend", run_dir, *flags, "--shard", "1/2")
    whole = shards(out)
    first, second, _ = sorted(out.glob("recommendations/recommendations-*"))
    first.write_bytes(first.read_bytes()[:100])
    said = in_process("recommend", run_dir, *flags)
    assert f"{first.name} is damaged" in said and "22 lists of 4" in said
    assert whole.items() <= shards(out).items()
    made = require(out, "recommend")
    assert not [name for name in made.outputs if name.startswith("damaged")]
    (out / "recommendations" / "manifest.json").unlink()
    in_progress = {"fingerprint": made.fingerprint, "config": made.config}
    (out / "recommendations" / "in_progress.json").write_text(json.dumps(in_progress))
    second.write_bytes(first.read_bytes())
    said = in_process("recommend", run_dir, *flags, fails=True)
    assert f"{second.name} is of another run: it has rows 0 to 3" in said
    assert second.read_bytes() == first.read_bytes()


def test_other_bad_settings(in_process, run_dir, users, tmp_path: Path):
    out = ["--users", str(users), "--output_dir", str(tmp_path / "out")]
    for flags in (["--users", str(users)], ["--output_dir", str(tmp_path / "out")]):
        said = in_process("recommend", run_dir, *FLAGS, *flags, fails=True)
        assert "--users and --output_dir belong together" in said
    for flags, message in (
        (["--users", str(tmp_path / "no.parquet")], "no.parquet does not exist"),
        (["--users", str(users), "--max_rows", "3"], "max_rows samples a split"),
        (["--users", str(users), "--history_column", "h"], "no column 'h' (history_column)"),
        (["--executor", "spark"], "executor='spark' is not known; choose one of local, ray"),
        (["--unknown_items", "skip"], "unknown_items='skip' is not known"),
        (["--num_actors", "0"], "num_actors=0 must be at least 1"),
        (["--cpus_per_actor", "0"], "cpus_per_actor=0 must be at least 1"),
        (["--tensor_parallel_size", "2"], "tensor_parallel_size is no setting of engine=torch"),
        (
            ["--engine", "vllm-inworker", "--gpu_memory_utilization", "0.5"],
            "gpu_memory_utilization is no setting of engine=vllm-inworker",
        ),
        (["--engine", "vllm", "--max_model_len", "0"], "max_model_len=0 must be at least 1"),
        (["--engine", "vllm", "--gpu_memory_utilization", "nan"], "must lie in (0, 1]"),
        (["--executor", "ray", "--gpus_per_actor", "2"], "with tensor_parallel_size=1: an engine"),
        (["--batch_size", "0"], "batch_size=0 must be at least 1"),
        (["--seed", "-1"], "seed=-1 must lie between 0 and"),
        (["--gpus_per_actor", "nan"], "gpus_per_actor=nan must be a number of at least 0"),
        (["--k", "10000000000", "--beam_width", "20000000000"], "exceeds the 20 items of the"),
        (["--model_run", ""], "--model_run is empty"),
        (["--users", ""], "--users is empty"),
        (["--output_dir", ""], "--output_dir is empty"),
        (["--output_dir", str(run_dir)], "lies in --run_dir"),
        (["--output_dir", str(run_dir / "x" / ".." / "lists")], "lies in --run_dir"),
        (["--users", str(users.parent), "--output_dir", str(users.parent)], "lies in --users"),
        (["--users", str(users.parent), "--output_dir", str(users.parent / "a")], "in --users"),
        (["--shard_size", "0"], "shard_size=0 must be at least 1"),
        (["--shard", "x"], "shard='x' must have the form i/n"),
    ):
        said = in_process("recommend", run_dir, *FLAGS, *out, *flags, fails=True)
        assert message in said
    assert not shards(tmp_path / "out")
    inside = tmp_path / "out" / "recommendations" / "users.parquet"
    inside.parent.mkdir(parents=True, exist_ok=True)
    inside.write_bytes(users.read_bytes())
    out[1] = str(inside)
    said = in_process("recommend", run_dir, *FLAGS, *out, fails=True)
    assert "where lists are written; move it" in said and inside.exists()
    said = in_process("recommend", run_dir, *FLAGS, "--max_rows", "0", fails=True)
    assert "max_rows=0 must be at least 1" in said


def test_a_prompt_too_long_is_found_before_the_model_is_loaded(
    in_process, run_dir, users, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(Recommender, "load", None)
    flags = [*FLAGS, "--users", str(users), "--output_dir", str(tmp_path / "out")]
    flags += ["--engine", "vllm", "--max_model_len", "25"]
    said = in_process("recommend", run_dir, *flags, fails=True)
    assert "with its item needs 28 tokens, the model's context holds 25; shorten" in said


def test_settings_of_the_engine_are_no_others_of_the_lists():
    recipe = runpy.run_path(str(RECIPE))
    args = recipe["RecommendArgs"](engine="vllm", tensor_parallel_size=2, max_model_len=512)
    assert engine_options(args) == {"tensor_parallel_size": 2, "max_model_len": 512}
    assert {"tensor_parallel_size", "gpu_memory_utilization", "max_model_len"} < set(recipe["HOW"])
    args = recipe["RecommendArgs"](
        engine="vllm", tensor_parallel_size=2, executor="ray", gpus_per_actor=2
    )
    assert args.gpus_per_actor == recipe["gpus_of_an_actor"](args) == 2
    args = recipe["RecommendArgs"](engine="vllm", tensor_parallel_size=2, executor="ray")
    assert recipe["gpus_of_an_actor"](args) == 2
    assert recipe["gpus_of_an_actor"](recipe["RecommendArgs"](executor="ray")) is None


def test_with_16_bits_the_size_of_batches_is_a_setting_of_the_lists(
    in_process, run_dir, users, tmp_path: Path
):
    for dtype, refused in (("float32", False), ("bfloat16", True)):
        flags = [*FLAGS, "--users", str(users), "--output_dir", str(tmp_path / dtype)]
        flags += ["--dtype", dtype, "--shard"]
        in_process("recommend", run_dir, *flags, "1/2", "--batch_size", "4")
        said = in_process("recommend", run_dir, *flags, "2/2", "--batch_size", "3", fails=refused)
        assert ("is being written with other batch_size=4 (now 3)" in said) is refused
        assert (load_manifest(tmp_path / dtype, "recommend") is None) is refused


def test_a_beam_wider_than_the_catalogue(in_process, run_dir, users, tmp_path: Path):
    for name, width in (("all", "20"), ("wider", "100000000000")):
        flags = ["--k", "20", "--beam_width", width, "--users", str(users), "--output_dir"]
        in_process("recommend", run_dir, *flags, str(tmp_path / name))
    assert_frame_equal(lists_of(tmp_path / "wider"), lists_of(tmp_path / "all"))


def test_a_full_disk(in_process, run_dir, users, tmp_path: Path, monkeypatch):
    """The third shard finds no space; what was finished stays, and the same command goes on."""
    import genrec.generation.shards

    out, real = tmp_path / "out", genrec.generation.shards.write_bytes
    flags = [*FLAGS, "--users", str(users), "--output_dir", str(out)]

    def full(path: Path, data: bytes) -> None:
        if len(shards(out)) == 2:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(genrec.generation.shards, "write_bytes", full)
    said = in_process("recommend", run_dir, *flags, fails=True)
    assert "can't be written (No space left on device): the disk is full" in said
    kept = shards(out)
    assert len(kept) == 2
    assert read_json(out / "recommendations" / "progress.json")["done"] == 8
    monkeypatch.setattr(genrec.generation.shards, "write_bytes", real)
    assert "22 lists of 4" in in_process("recommend", run_dir, *flags)
    assert kept.items() <= shards(out).items() and len(shards(out)) == 6


def test_a_table_that_changes_meanwhile(in_process, run_dir, users, tmp_path: Path, monkeypatch):
    """Replaced after its last row was read: the lists are whole, but of which table?"""
    import genrec.generation.jobs

    path, real = tmp_path / "users.parquet", genrec.generation.jobs.write_shard
    path.write_bytes(users.read_bytes())

    def and_replace(*args):
        pl.read_parquet(users).reverse().write_parquet(path)
        return real(*args)

    monkeypatch.setattr(genrec.generation.jobs, "write_shard", and_replace)
    flags = [*FLAGS, "--users", str(path), "--output_dir", str(tmp_path / "out")]
    said = in_process("recommend", run_dir, *flags, fails=True)
    assert "users.parquet was changed while it was read; start again with a file that" in said
    assert load_manifest(tmp_path / "out", "recommend") is None


@pytest.mark.slow
def test_the_ray_executor_makes_the_same_files(in_process, recipe, run_dir, users, tmp_path: Path):
    flags = [*FLAGS, "--users", str(users), "--output_dir"]
    in_process("recommend", run_dir, *flags, str(tmp_path / "local"))
    ray = ["--executor", "ray", "--num_actors", "2"]
    done = recipe("recommend", run_dir, *flags, str(tmp_path / "ray"), *ray)
    assert "22 lists of 4" in done.stdout
    assert shards(tmp_path / "ray") == shards(tmp_path / "local")
    manifests = [require(tmp_path / name, "recommend") for name in ("ray", "local")]
    assert manifests[0].content_hash == manifests[1].content_hash
    assert manifests[0].fingerprint == manifests[1].fingerprint


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed(in_process, recipe_command, run_dir, users, tmp_path: Path, kills: int):
    """kill -9 at some moments of a run: the files are those of a run that nothing disturbed."""
    table, copies = pl.read_parquet(users), 6 * kills + 2
    many = pl.concat([table.with_columns(pl.col("user_id") + f"-{i}") for i in range(copies)])
    many.write_parquet(tmp_path / "many.parquet")
    flags = [*FLAGS, "--users", str(tmp_path / "many.parquet"), "--batch_size", "4"]
    in_process("recommend", run_dir, *flags, "--output_dir", str(tmp_path / "whole"))
    killed = tmp_path / "killed"
    command, env = recipe_command("recommend", run_dir, *flags, "--output_dir", str(killed))
    done = [0]
    for _ in range(kills):
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 300
        while len(shards_named(killed)) < done[-1] + 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        done.append(len(shards_named(killed)))
    assert done == sorted(set(done)) and done[-1] < len(shards(tmp_path / "whole"))
    assert load_manifest(killed, "recommend") is None
    kept = shards(killed)
    in_process("recommend", run_dir, *flags, "--output_dir", str(killed))
    assert kept.items() <= shards(killed).items()
    assert shards(killed) == shards(tmp_path / "whole")
    assert_frame_equal(lists_of(killed), lists_of(tmp_path / "whole"))
    manifests = [require(folder, "recommend") for folder in (killed, tmp_path / "whole")]
    assert manifests[0].content_hash == manifests[1].content_hash


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program answers to it."""


def test_killed_where_no_shard_is_made(in_process, run_dir, users, tmp_path: Path):
    """What lies half-done in the folder then is made again, and nothing of it stays."""
    table = pl.read_parquet(users).with_columns(pl.col("history").list.join(" "))
    table.write_csv(tmp_path / "users.csv")
    flags = [*FLAGS, "--users", str(tmp_path / "users.csv"), "--output_dir"]
    in_process("recommend", run_dir, *flags, str(tmp_path / "whole"))
    whole = require(tmp_path / "whole", "recommend")
    sink, write = pl.LazyFrame.sink_parquet, genrec.artifacts.write_bytes

    def half_a_copy(frame: pl.LazyFrame, path: Path, **options: Any) -> None:
        sink(frame, path, **options)
        path.write_bytes(path.read_bytes()[:50])
        raise Killed

    def half_a_check(path: Path, data: bytes) -> None:
        if path.name != "input_check.json":
            return write(path, data)
        path.with_name(f".{path.name}.77.partial").write_bytes(data[:9])
        raise Killed

    def stop(*args: Any, **options: Any) -> None:
        raise Killed

    for number, (name, replaced) in enumerate(
        {
            "polars.LazyFrame.sink_parquet": half_a_copy,
            "genrec.generation.jobs.count_allowed": stop,  # while the users are checked
            "genrec.artifacts.write_bytes": half_a_check,
            "genrec.artifacts.Stage.finish": stop,  # behind the last shard
        }.items()
    ):
        out = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(name, replaced)
            in_process("recommend", run_dir, *flags, str(out))
        assert load_manifest(out, "recommend") is None
        in_process("recommend", run_dir, *flags, str(out))
        made = require(out, "recommend")
        assert made.content_hash == whole.content_hash and made.metrics["timed_users"] == 22
        left = [path.name for path in (out / "recommendations").iterdir()]
        assert not [name for name in left if "partial" in name or name[0] == "."]


def shards_named(folder: Path) -> list[Path]:
    return list((folder / "recommendations").glob("recommendations-*.parquet"))
