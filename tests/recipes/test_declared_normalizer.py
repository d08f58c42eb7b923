"""The model's normaliser is followed by every recipe that ranks, and another one is on record."""

from __future__ import annotations

import json
import runpy
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from genrec.artifacts import Stage, load_manifest, read_shards, write_json
from genrec.audit.replay import load_replayer
from genrec.config import parse
from genrec.normalizers import NORMALIZERS
from genrec.recommend import Recommender

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FEW = ("--k", "4", "--beam_width", "20", "--max_rows", "6")


def make_run(tiny, run: Path, **about: object) -> Path:
    """Stages prepare … sft around a sharp random model that declares `about`."""
    shop = tiny.shop(n_users=14)
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.ndim > 1 else 1
    tiny.save_run(run, shop, model, tokenizer, **about)
    embed = Stage(run, "embed", {}, ["prepare"])  # explain puts similar items in others' places
    assert not embed.is_done()
    vectors = np.random.default_rng(0).normal(size=(len(shop.catalog), 8)).astype(np.float32)
    np.save(embed.folder / "item_embeddings.npy", vectors)
    embed.finish(rows=len(vectors))
    write_json(run / "data" / "split.json", {"protocol": "leave-one-out", "users": 14, "items": 20})
    return run


@pytest.fixture(scope="module")
def declares_trie(tiny, tmp_path_factory) -> Path:
    return make_run(tiny, tmp_path_factory.mktemp("trie") / "run", normalizer="trie")


@pytest.fixture
def copied(declares_trie, tmp_path: Path) -> Path:
    return shutil.copytree(declares_trie, tmp_path / "run")


def scores(run: Path) -> np.ndarray:
    """Exponentiated scores of a run's lists, in the order of rows and ranks."""
    table = read_shards(run / "recommendations", "recommendations").sort("row_id", "rank")
    return np.exp(table["score"].to_numpy())


def test_lists_explanations_and_replay_follow_the_model(in_process, copied: Path, caplog):
    said = in_process("recommend", copied, *FEW)
    assert "normalised over" not in said
    made = load_manifest(copied, "recommend")
    assert made is not None and made.config["normalizer"] == "trie" and made.notes == []
    recommender = Recommender.load(copied)
    rows = pl.read_parquet(copied / "recommendations" / "rows.parquet")["row_id"].to_list()
    split = pl.read_parquet(copied / "data" / "test.parquet").filter(pl.col("row_id").is_in(rows))
    prompts = recommender.prompts(split.sort("row_id")["history_item_index"].to_list())
    from genrec.modeling import encode_prompts

    items = read_shards(copied / "recommendations", "recommendations").sort("row_id", "rank")
    index = items["item_index"].to_numpy().reshape(6, 4)
    forced = recommender.engine.score(encode_prompts(recommender.tokenizer, prompts), index)
    assert scores(copied) == pytest.approx(np.exp(forced.sum(-1)).ravel(), abs=1e-4)

    in_process("explain", copied, "--num_rows", "2", "--samples", "20", "--k", "4")
    explained = load_manifest(copied, "explain")
    assert explained is not None and explained.config["normalizer"] == "trie"
    in_process("audit", copied)
    record = json.loads((copied / "audit" / "audit-00000.jsonl").read_text().splitlines()[0])
    assert record["decoding"]["normalizer"] == "trie"
    assert "normalised over the trie" in (copied / "audit" / "report.html").read_text()
    caplog.clear()
    loaded = load_replayer(copied, record)
    assert loaded.scorer.normalizer == "trie" and not caplog.records
    # Replay is of what the record says, whatever the model declares.
    record["decoding"]["normalizer"] = "level"
    assert load_replayer(copied, record).scorer.normalizer == "level"


def test_asking_for_another_one_is_on_record(in_process, copied: Path):
    said = in_process("recommend", copied, *FEW, "--normalizer", "full")
    assert "scores are normalised over full, the model declares trie" in said
    made = load_manifest(copied, "recommend")
    assert made is not None and made.config["normalizer"] == "full"
    assert any("the model declares trie" in note for note in made.notes)
    full = scores(copied)
    # Naming the model's own is the same as naming none; after other lists it asks.
    named = in_process("recommend", copied, *FEW, "--normalizer", "trie", fails=True)
    assert "normalizer='full' (now 'trie')" in named
    in_process("recommend", copied, *FEW, "--normalizer", "trie", "--overwrite", "true")
    in_process("recommend", copied, *FEW)  # complete, skipped
    assert len(list(copied.glob("recommendations*"))) == 2
    assert (scores(copied) > full).all()  # divided by less


def test_older_models_are_served_as_before(in_process, tiny, tmp_path: Path):
    run = make_run(tiny, tmp_path / "old")
    in_process("recommend", run, *FEW)
    made = load_manifest(run, "recommend")
    assert made is not None and made.config["normalizer"] == "full" and not made.notes


def test_doctor_and_trace_follow(in_process, copied: Path):
    with pytest.raises(SystemExit):  # a random model is no healthy run
        in_process("doctor", copied, "--rows", "6", "--exhaustive_rows", "2")
    checks = json.loads((copied / "doctor.json").read_text())["checks"]
    assert "scores over trie" in next(c["value"] for c in checks if c["name"] == "model")
    assert "scores over: trie" in in_process("trace", copied, "--user", "u1")


def test_what_is_refused(in_process, copied: Path):
    said = in_process("recommend", copied, *FEW, "--normalizer", "sum", fails=True)
    assert "normalizer='sum' is not known; choose one of full, level, trie" in said
    about = copied / "sft" / "model" / "genrec.json"
    about.write_text(about.read_text().replace('"trie"', '"tree"'))
    said = in_process("recommend", copied, *FEW, fails=True)
    assert "declares normalizer 'tree', which is none of full, level, trie" in said


# What training declares


@pytest.fixture(scope="module")
def sft() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(RECIPES / "sft.py")))


@pytest.fixture(scope="module")
def grpo() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(RECIPES / "grpo.py")))


def test_sft_declares_what_is_named_or_full_where_nothing_is_measured(sft):
    for name in NORMALIZERS:
        assert sft.decide(sft.named_normalizer(name), NORMALIZERS, None, None, 0).normalizer == name
    assert sft.named_normalizer("auto") is None
    choice = asdict(sft.decide(None, NORMALIZERS, None, None, 0))
    assert choice["normalizer"] == "full" and "eval_rows=0" in choice["rule"]
    # Trained over a level, the vocabulary's probabilities mean nothing: the level is the default.
    assert sft.decide(None, ("level", "trie"), None, None, 0).normalizer == "level"
    with pytest.raises(ValueError, match="normalizer='best' is not known; choose one of auto"):
        sft.SftArgs(normalizer="best")


def test_grpo_takes_one_for_all_and_says_what_it_changes(grpo, caplog, tmp_path: Path):
    assert grpo.chosen_normalizer("trie", "trie") == ("trie", []) and not caplog.records
    chosen, notes = grpo.chosen_normalizer("trie", "full")
    assert chosen == "trie" and notes[0] in caplog.text
    assert "declared normalizer full" in notes[0] and "its model declares trie" in notes[0]
    caplog.clear()
    assert grpo.chosen_normalizer(None, "full") == ("full", [])
    assert "can't be produced" in caplog.text
    with pytest.raises(ValueError, match="normalizer='sum' is not known"):
        grpo.GrpoArgs(normalizer="sum")
    assert grpo.GrpoArgs().normalizer == "trie"
    (tmp_path / "grpo.yaml").write_text("normalizer: null\n")
    assert parse(grpo.GrpoArgs, args=["--config", str(tmp_path / "grpo.yaml")]).normalizer is None
