"""Daily refresh end to end: yesterday's model, trained on over today's data and catalogue."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from recipe_calls import run
from safetensors.torch import load_file
from transformers import AutoTokenizer

from genrec.artifacts import load_manifest, read_json, require
from genrec.data.synthetic import synthetic_shop
from genrec.evaluation.validation import BeamValidation
from genrec.recommend import Recommender
from genrec.semantic_ids import SemanticIds
from genrec.warm_start import EarlierModel, unseen_codes

TABLES = (
    "--format table --interactions log.parquet --items items.parquet --time_column timestamp "
    "--unknown_items drop --protocol time-cutoff"
).split()
TRAIN = (
    "--use_cpu true --bf16 false --report_to none --disable_tqdm true --size tiny --vocab_size 400 "
    "--gradient_checkpointing false --seed 0 --eval_rows 30 --per_device_train_batch_size 16 "
    "--learning_rate 3e-3 --save_strategy no --logging_steps 1"
).split()


def prepare(folder: Path, until: str | None, valid: str, test: str) -> Path:
    """Tables of the shop as they were at a day."""
    shop = synthetic_shop(n_users=150, n_items=160, seed=2)
    log = shop.interactions
    if until is not None:
        log = log.filter(pl.col("timestamp") < datetime.fromisoformat(until).timestamp())
    sold = pl.col("item_id").is_in(log["item_id"].unique().implode())
    log.write_parquet(folder / "log.parquet")
    shop.catalog.filter(sold).write_parquet(folder / "items.parquet")
    run("prepare", folder / "run", *TABLES, "--data_dir", folder, "--valid_from", valid,
        "--test_from", test)  # fmt: skip
    return folder / "run"


@pytest.fixture(scope="module")
def yesterday(tmp_path_factory) -> Path:
    folder = prepare(
        tmp_path_factory.mktemp("yesterday"), "2023-07-01T00:00Z", "2023-05-01", "2023-06-01"
    )
    run("embed", folder, "--dim", 8)
    run("quantize", folder, *"--n_levels 3 --codebook_size 8 --report_map pca".split())
    run("build_dataset", folder)
    run("sft", folder, *TRAIN, *"--max_steps 8 --eval_every_steps 8".split())
    return folder


@pytest.fixture(scope="module")
def today(yesterday: Path, tmp_path_factory) -> Path:
    """Today's run up to its rows."""
    folder = prepare(tmp_path_factory.mktemp("today"), None, "2023-10-15", "2023-11-15")
    run("embed", folder, "--extend", yesterday)
    run("quantize", folder, "--extend", yesterday, "--report_map", "pca")
    run("build_dataset", folder)
    return folder


@pytest.fixture
def fresh(today: Path, tmp_path: Path) -> Path:
    """A copy of today's run that a test may train in."""
    return shutil.copytree(today, tmp_path / "fresh")


STEPS = "--max_steps 6 --eval_every_steps 3".split()


def test_refresh(yesterday: Path, fresh: Path):
    run("sft", fresh, "--warm_start", yesterday, *TRAIN, *STEPS)
    made, old = require(fresh, "sft"), load_manifest(yesterday, "sft")
    assert old is not None
    # It began with yesterday's model: step 0 is what that model scores on today's catalogue.
    first = read_json(fresh / "sft" / "validation.json")[0]
    shown = Recommender.load(fresh, model_run=yesterday, normalizer="full")
    split = pl.read_parquet(fresh / "data" / "valid.parquet")
    prompts = pl.read_parquet(fresh / "dataset" / "valid.parquet")["prompt"]
    validation = BeamValidation.of_split(
        fresh, lambda m: shown.engine, shown.tokenizer, split, prompts, 30, 0, True
    )
    hit, gain = validation.per_row(shown.engine)
    assert first["step"] == 0 and first["hr@10"] == pytest.approx(hit.mean())
    assert first["ndcg@10"] == pytest.approx(gain.mean(), abs=1e-6)
    # The tokenizer is yesterday's.
    names = [run_dir / "sft" / "model" for run_dir in (yesterday, fresh)]
    vocabularies = [AutoTokenizer.from_pretrained(name).get_vocab() for name in names]
    assert vocabularies[0] == vocabularies[1]
    # What was trained, and from where, is in the manifest, the model and its card.
    facts = made.metrics["warm_start"]
    before, now = (
        pl.read_parquet(run_dir / "data" / "interactions.parquet") for run_dir in (yesterday, fresh)
    )
    cuts = [
        datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()
        for day in ("2023-05-01", "2023-10-15")
    ]
    trained = [int((t["timestamp"] < c).sum()) for t, c in zip((before, now), cuts, strict=True)]
    assert facts["new_interactions"] == trained[1] - trained[0] > 0
    assert (
        facts["new_items"] == require(fresh, "quantize").rows - require(yesterday, "quantize").rows
    )
    assert facts["new_items"] > 0 and facts["gone_interactions"] == facts["known_held_out"] == 0
    share = facts["replayed_rows"] / (facts["new_rows"] + facts["replayed_rows"])
    assert share == pytest.approx(0.3, abs=0.5 / made.rows)
    assert made.rows == facts["new_rows"] + facts["replayed_rows"]
    about = read_json(names[1] / "genrec.json")
    ids = [SemanticIds.load(run_dir / "semantic_ids") for run_dir in (yesterday, fresh)]
    assert about["semantic_ids_sha256"] == ids[1].sha256 and about["base"] == "scratch-tiny"
    entry = {
        "run": "run", "stage": "sft", "content_hash": old.content_hash,
        "semantic_ids_sha256": ids[0].sha256, "seed": 0,
    }  # fmt: skip
    assert about["lineage"] == facts["lineage"] == [entry]
    assert made.inputs["warm_start/sft"] == old.content_hash
    card = (names[1] / "README.md").read_text()
    assert old.content_hash in card and str(yesterday.parent) not in card
    # Tomorrow's lineage names both.
    tomorrow = fresh.parent / "tomorrow"
    shutil.copytree(fresh / "semantic_ids", tomorrow / "semantic_ids")
    lineage = EarlierModel.of_run(fresh, tomorrow).lineage
    assert lineage[0] == entry and lineage[1]["content_hash"] == made.content_hash


def test_only_the_training_part_is_trained_on(yesterday: Path, fresh: Path, monkeypatch):
    """Every row that is rendered for the trainer is a piece of the training part."""
    from genrec.training_data import EpochRows

    taken: list[pl.DataFrame] = []
    original = EpochRows._encoded

    def spy(self, rows, epochs):
        taken.append(self._rows.table[rows])
        return original(self, rows, epochs)

    monkeypatch.setattr(EpochRows, "_encoded", spy)
    run("sft", fresh, "--warm_start", yesterday, *TRAIN, *STEPS)
    rows = pl.concat(taken).filter(pl.col("task") == "sequential")
    log = pl.read_parquet(fresh / "data" / "interactions.parquet")
    end = datetime(2023, 10, 15, tzinfo=UTC).timestamp()
    parts = log.filter(pl.col("timestamp") < end).group_by("user_id").agg("item_index")
    sequence = dict(parts.iter_rows())
    assert len(rows) > 50
    for user, had, wanted in rows.select("user_id", "history", "targets").iter_rows():
        whole, piece = sequence[user], had + wanted
        assert any(whole[i : i + len(piece)] == piece for i in range(len(whole)))


def test_another_model_is_another_training(yesterday: Path, fresh: Path, tmp_path: Path):
    flags = [*TRAIN, *"--max_steps 1 --eval_rows 0".split()]
    run("sft", fresh, "--warm_start", yesterday, *flags)
    made = require(fresh, "sft")
    moved = shutil.copytree(yesterday, tmp_path / "moved")
    run("sft", fresh, "--warm_start", moved, *flags)  # the same model elsewhere: skipped
    assert require(fresh, "sft") == made
    manifest = moved / "sft" / "manifest.json"
    found = load_manifest(moved, "sft")
    assert found is not None
    manifest.write_text(manifest.read_text().replace(found.content_hash, "0" * 64))
    with pytest.raises(ValueError, match="made with other input 'warm_start/sft'"):
        run("sft", fresh, "--warm_start", moved, *flags)
    with pytest.raises(ValueError, match="made with other replay_share=0.3"):
        run("sft", fresh, "--warm_start", yesterday, "--replay_share", 0.2, *flags)
    with pytest.raises(ValueError, match="input 'warm_start/prepare'"):
        run("sft", fresh, *flags)


def test_strangers_are_refused(yesterday: Path, fresh: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="is this run itself"):
        run("sft", fresh, *TRAIN, "--warm_start", fresh)
    with pytest.raises(ValueError, match="has not finished"):
        run("sft", fresh, *TRAIN, "--warm_start", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="leave model_name_or_path out"):
        run("sft", fresh, *TRAIN, "--warm_start", yesterday, "--model_name_or_path", "gpt2")
    with pytest.raises(ValueError, match=r"replay_share=1.0 must lie in \[0, 1\)"):
        run("sft", fresh, *TRAIN, "--warm_start", yesterday, "--replay_share", "1")
    with pytest.raises(ValueError, match="warm_start_stage='dpo' is not known"):
        run("sft", fresh, *TRAIN, "--warm_start", yesterday, "--warm_start_stage", "dpo")
    narrow = shutil.copytree(yesterday, tmp_path / "narrow")
    manifest = narrow / "sft" / "manifest.json"
    told = json.loads(manifest.read_text())
    told["config"]["loss_over"] = "trie"
    manifest.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="was trained over trie.*use loss_over=trie"):
        run("sft", fresh, *TRAIN, "--warm_start", narrow)
    run("quantize", fresh, "--overwrite", "true",
        *"--n_levels 3 --codebook_size 8 --report_map pca --seed 9".split())  # fmt: skip
    run("build_dataset", fresh, "--overwrite", "true")
    with pytest.raises(ValueError) as error:
        run("sft", fresh, "--warm_start", yesterday, *TRAIN)
    for part in (
        f"the SID map in {fresh / 'semantic_ids'}",
        f"the model in {yesterday / 'sft' / 'model'} was trained on",
        f"genrec quantize --run_dir {fresh} --extend {yesterday} --overwrite true",
    ):
        assert part in str(error.value)
    assert not (fresh / "sft").exists()


def test_an_interrupted_refresh_goes_on(yesterday: Path, fresh: Path, tmp_path: Path, monkeypatch):
    whole = shutil.copytree(fresh, tmp_path / "whole")
    flags = [
        "--warm_start",
        yesterday,
        *TRAIN,
        *STEPS,
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
    ]
    run("sft", whole, *flags)
    original = BeamValidation.measure

    def die(self, model, step, epoch):
        if step == 3:
            raise KeyboardInterrupt
        return original(self, model, step, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(BeamValidation, "measure", die)
        with pytest.raises(KeyboardInterrupt):
            run("sft", fresh, *flags)
    assert (fresh / "sft" / "checkpoints" / "checkpoint-2").is_dir()
    assert not (fresh / "sft" / "manifest.json").exists()
    run("sft", fresh, *flags)
    measured = [read_json(folder / "sft" / "validation.json") for folder in (whole, fresh)]
    assert measured[0] == measured[1] and [e["step"] for e in measured[0]] == [0, 3, 6]
    weights = [load_file(f / "sft" / "model" / "model.safetensors") for f in (whole, fresh)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    log = json.loads((fresh / "sft" / "log.json").read_text())
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 7))


def test_codes_that_nobody_had():
    old = SemanticIds(pl.Series(["a", "b"]), np.array([[0, 1], [1, 1]]), (4, 3))
    left = old.successor(pl.Series(["b"]), np.array([[1, 1]]))  # a is reserved
    now = left.successor(pl.Series(["b", "c", "d"]), np.array([[1, 1], [3, 1], [0, 2]]))
    found = unseen_codes(now, left)
    assert [level.tolist() for level in found] == [
        [False, False, False, True], [False, False, True]
    ]  # fmt: skip
    assert not any(level.any() for level in unseen_codes(old, old))
