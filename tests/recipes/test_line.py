"""The whole line, from a shop to its evaluation, by command lines as users write them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from genrec.artifacts import FOLDERS, load_manifest, require, sha256_file
from genrec.data.splits import leave_one_out
from genrec.semantic_ids import SemanticIds

UPSTREAM = {
    "prepare": set(),
    "embed": {"prepare"},
    "quantize": {"prepare", "embed"},
    "build_dataset": {"prepare", "quantize"},
    "sft": {"prepare", "embed", "quantize", "build_dataset"},
    "grpo": {"prepare", "quantize", "build_dataset", "sft"},
    "recommend": {"prepare", "quantize", "build_dataset", "grpo"},
    "evaluate": {"prepare", "embed", "recommend"},
}
BEFORE_SFT = ("data", "embeddings", "semantic_ids", "dataset")


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in folder.rglob("*")
    }


def test_every_stage_says_what_it_read_and_wrote(tiny_run: Path):
    for stage, upstream in UPSTREAM.items():
        manifest = require(tiny_run, stage)
        assert set(manifest.inputs) == upstream
        for name in upstream:
            read = load_manifest(tiny_run, name)
            assert read is not None and manifest.inputs[name] == read.content_hash
        folder = tiny_run / FOLDERS[stage]
        for name, output in manifest.outputs.items():
            assert sha256_file(folder / name) == output["sha256"], name
        assert manifest.rows > 0 and manifest.versions["genrec"]
        assert not (folder / "in_progress.json").exists()
        assert not list(folder.rglob("*.partial"))
        assert not {"run_dir", "overwrite"} & set(manifest.config)


def test_the_run_holds_together(tiny_run: Path):
    catalog = pl.read_parquet(tiny_run / "data" / "catalog.parquet")
    ids = SemanticIds.load(tiny_run / "semantic_ids")
    assert ids.item_ids.to_list() == catalog["item_id"].to_list()
    assert np.load(tiny_run / "embeddings" / "item_embeddings.npy").shape == (len(catalog), 16)
    index = json.loads((tiny_run / "semantic_ids" / "index.json").read_text())
    assert ["".join(t) for t in index.values()] == ids.sids().to_list()
    test = pl.read_parquet(tiny_run / "data" / "test.parquet")
    lists = pl.read_parquet(tiny_run / "recommendations" / "recommendations-*.parquet")
    assert len(list((tiny_run / "recommendations").glob("recommendations-*"))) == -(
        -len(test) // 50
    )
    assert len(lists) == 10 * len(test) and set(lists["row_id"]) == set(test["row_id"])
    seen = dict(test.select("row_id", "seen_item_index").iter_rows())
    assert not any(
        item in seen[row] for row, item in lists.select("row_id", "item_index").iter_rows()
    )
    metrics = json.loads((tiny_run / "evaluation" / "metrics.json").read_text())
    assert {"genrec", "popularity"} <= set(metrics["systems"])


def test_the_rows_that_train_hold_no_later_item(tiny_run: Path):
    data = tiny_run / "data"
    log = pl.read_parquet(data / "interactions.parquet")
    rows = pl.read_parquet(tiny_run / "dataset" / "train.parquet").filter(
        pl.col("task") == "sequential"
    )
    sequences = dict(log.group_by("user_id", maintain_order=True).agg("item_id").iter_rows())
    sids = SemanticIds.load(tiny_run / "semantic_ids")
    sid_of = dict(zip(sids.item_ids, sids.sids(), strict=True))
    for row in rows.iter_rows(named=True):
        training = sequences[row["user_id"]][:-2]
        text = row["prompt"] + row["completion"]
        training = training or sequences[row["user_id"]]  # fewer than three: all of it
        assert text[text.index("<") :] in "".join(sid_of[i] for i in training)


def test_rl_rows_know_only_what_came_before(tiny_run: Path):
    log = pl.read_parquet(tiny_run / "data" / "interactions.parquet")
    sequences = dict(log.group_by("user_id", maintain_order=True).agg("item_index").iter_rows())
    rl = pl.read_parquet(tiny_run / "dataset" / "rl.parquet")
    assert rl["row_id"].n_unique() == len(rl) > 50
    sids = SemanticIds.load(tiny_run / "semantic_ids").sids()
    for row in rl.iter_rows(named=True):
        sequence = sequences[row["user_id"]]
        training = sequence[:-2] if len(sequence) > 2 else sequence
        assert row["target_item_index"] == training[-1]
        assert row["seen_item_index"] == sorted(set(training[:-1]))
        assert row["prompt"].endswith(sids[training[-2]])


def test_users_without_held_out_items_train_rl_like_the_others(tiny, tmp_path: Path):
    """Two interactions: one is the history, one the target, and nothing else was seen."""
    lengths = [2, 1, 5, 3]
    log = pl.DataFrame(
        {
            "user_id": np.repeat(["two", "one", "five", "three"], lengths),
            "item_index": pl.Series([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3], dtype=pl.Int32),
            "timestamp": pl.Series([None] * 11, dtype=pl.Int64),
            "position": pl.Series([p for n in lengths for p in range(n)], dtype=pl.Int32),
        }
    )
    log.write_parquet(tmp_path / "interactions.parquet")
    path = Path(__file__).resolve().parents[2] / "recipes" / "build_dataset.py"
    spec = importlib.util.spec_from_file_location("build_dataset", path)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe  # dataclasses look their module up
    spec.loader.exec_module(recipe)
    train = leave_one_out(log, 7).train
    rl = recipe.rl_rows(train, tmp_path)
    got = {r["user_id"]: (r["seen_item_index"], r["target_item_index"]) for r in rl.to_dicts()}
    assert got == {"two": ([0], 1), "five": ([3, 4], 5)}  # the others have no history


@pytest.mark.parametrize(
    "stage", [pytest.param(s, marks=pytest.mark.slow if s == "grpo" else ()) for s in UPSTREAM]
)
def test_a_rerun_skips_and_touches_nothing(recipe, tiny_run: Path, tiny_flags, stage: str):
    before = state(tiny_run)
    done = recipe(stage, tiny_run, *tiny_flags[stage])
    assert "complete, skipped" in done.stderr
    assert state(tiny_run) == before


def test_changed_settings_are_refused(recipe, tiny_run: Path):
    before = state(tiny_run)
    done = recipe("quantize", tiny_run, "--n_levels", "2", "--codebook_size", "8", fails=True)
    assert "n_levels=3 (now 2)" in done.stderr and "--overwrite true" in done.stderr
    assert state(tiny_run) == before


def test_stages_of_other_data_are_refused(recipe, copied_run, tiny_flags):
    run = copied_run(*BEFORE_SFT)
    recipe("prepare", run, *tiny_flags["prepare"], "--seed", "1", "--overwrite", "true")
    for stage in ("build_dataset", "recommend"):
        done = recipe(stage, run, fails=True)
        assert "was built from 'prepare'" in done.stderr or "has not finished" in done.stderr
    done = recipe("build_dataset", run, fails=True)
    for part in (
        str(run / "data" / "manifest.json"),
        "manifest.json was built from",
        "--overwrite true",
    ):
        assert part in done.stderr
    assert (run / "data.old-1" / "manifest.json").exists()
    assert not (run / "dataset.old-1").exists()


def test_a_catalogue_smaller_than_the_codebook(recipe, copied_run):
    run = copied_run("data", "embeddings")
    done = recipe("quantize", run, "--codebook_size", "256", fails=True)
    assert "codebook_size=256 exceeds the 60 distinct item vectors; use at most 60" in done.stderr
    assert not (run / "semantic_ids" / "manifest.json").exists()
    recipe("quantize", run, "--codebook_size", "60", "--n_levels", "2")
    assert sorted(p.name for p in run.iterdir()) == ["data", "embeddings", "semantic_ids"]


def rows_in_mode(recipe, copied_run, tiny_run: Path, mode: str):
    """A run with rows of another mode, these rows, and the sequential ones of whole histories."""
    run = copied_run("data", "embeddings", "semantic_ids")
    recipe("build_dataset", run, "--sequential_mode", mode, "--tasks", "sequential")
    made, all_rows = (
        pl.read_parquet(folder / "dataset" / "train.parquet") for folder in (run, tiny_run)
    )
    return run, made, all_rows.filter(pl.col("task") == "sequential")


def test_per_item_rows_supervise_the_same_interactions(recipe, copied_run, tiny_run: Path):
    run, per_item, whole = rows_in_mode(recipe, copied_run, tiny_run, "per_item")
    n_levels = 3
    n_supervised = whole["completion"].str.count_matches("<").sum() // n_levels
    assert len(per_item) == n_supervised > len(whole)
    assert (per_item["completion"].str.count_matches("<") == n_levels).all()
    counts = pl.read_parquet(run / "data" / "catalog.parquet")["train_count"].sum()
    assert len(per_item) == counts
    for name in ("valid", "test", "rl"):  # what is measured doesn't depend on how one trains
        same = [
            pl.read_parquet(folder / "dataset" / f"{name}.parquet") for folder in (run, tiny_run)
        ]
        assert same[0].equals(same[1])


def test_last_item_rows_supervise_the_newest_item_of_each_row(recipe, copied_run, tiny_run: Path):
    _, last, whole = rows_in_mode(recipe, copied_run, tiny_run, "last_item")
    assert last["row_id"].equals(whole["row_id"])
    assert (last["completion"].str.count_matches("<") == 3).all()  # one item of three levels
    assert (whole["completion"].str.count_matches("<") > 3).any()
    for short, long in zip(last.iter_rows(named=True), whole.iter_rows(named=True), strict=True):
        assert short["prompt"].endswith(long["completion"][: -len(short["completion"])])
        assert long["completion"].endswith(short["completion"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_lora_on_a_local_model(
    recipe, copied_run, tiny, tiny_flags, tmp_path: Path, precision: str
):
    base = tmp_path / "base"
    tokenizer = tiny.tokenizer()
    tiny.lm(512, tied=True, context=256).save_pretrained(base)  # more rows than tokens, as Qwen's
    tokenizer.save_pretrained(base)
    run = copied_run(*BEFORE_SFT)
    flags = [
        *tiny_flags["sft"], "--model_name_or_path", str(base), "--use_lora", "true",
        "--sid_init", "titles", "--lora_rank", "4", "--max_steps", "4",
    ]  # fmt: skip
    if precision == "bfloat16":  # as the shipped config
        flags += "--dtype bfloat16 --bf16 true --gradient_checkpointing true".split()
    recipe("sft", run, *flags)
    manifest = require(run, "sft")
    assert {"model/genrec.json", "adapter/adapter_config.json", "log.json"} <= set(manifest.outputs)
    about = json.loads((run / "sft" / "model" / "genrec.json").read_text())
    ids = SemanticIds.load(run / "semantic_ids")
    choice = manifest.metrics["normalizer"]
    assert about == {
        "semantic_ids_sha256": ids.sha256, "stage": "sft", "base": "base",
        "normalizer": choice["normalizer"], "normalizer_choice": choice,
    }  # fmt: skip

    from genrec.modeling import load_base, load_model, sid_token_ids
    from genrec.recommend import Recommender

    model, loaded_tokenizer, _ = load_model(run / "sft" / "model", ids)
    old, new = (
        m.get_input_embeddings().weight.detach() for m in (load_base(str(base), precision), model)
    )
    assert len(old) == len(new) == 512
    old, new = old.float(), new.float()
    stored = load_file(run / "sft" / "model" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {getattr(torch, precision)}
    moved = (old != new).any(1).nonzero().flatten().tolist()
    assert moved == sorted(t for level in sid_token_ids(loaded_tokenizer, ids) for t in level)
    made = Recommender.load(run, batch_size=8).recommend([ids.item_ids[0]], k=5)
    assert len(made) == 5


def test_qlora_says_what_it_was_trained_on(recipe, copied_run, tiny, tiny_flags, tmp_path: Path):
    pytest.importorskip("bitsandbytes", reason="genrec[quant] is not installed")
    base = tmp_path / "base"
    tiny.lm(512).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    run = copied_run(*BEFORE_SFT)
    flags = [
        *tiny_flags["sft"], "--model_name_or_path", str(base), "--use_lora", "true",
        "--load_in_4bit", "true", "--use_dora", "true", "--sid_init", "titles", "--max_steps", "4",
        "--eval_every_steps", "2",
    ]  # fmt: skip
    recipe("sft", run, *flags)
    manifest = require(run, "sft")
    about = json.loads((run / "sft" / "model" / "genrec.json").read_text())
    told = about["trained_on_quantized_base"]
    assert told == manifest.metrics["trained_on_quantized_base"]
    assert told["quantization"] == "nf4" and told["merged_into"] == "the unquantised base"
    gap = told["merged_against_trained"]
    assert 0 < gap["kl"] < 0.5 and 0 < gap["mean_logit"] < gap["max_logit"] < 10
    assert told["ndcg@10_trained"] == manifest.metrics["best"]["ndcg@10"]
    # What is declared and served is measured on the merged model.
    measured = manifest.metrics["normalizer"]["measured"]["full"]
    assert told["ndcg@10_merged"] == measured["ndcg@10"]
    assert any("trained on a 4-bit base" in note for note in manifest.notes)

    from safetensors.torch import load_file

    from genrec.recommend import Recommender

    weights = load_file(run / "sft" / "model" / "model.safetensors")
    assert {str(w.dtype) for w in weights.values()} == {"torch.float32"}
    ids = SemanticIds.load(run / "semantic_ids")
    made = Recommender.load(run, batch_size=8).recommend([ids.item_ids[0]], k=5)
    assert len(made) == 5


@pytest.mark.slow
def test_a_chat_model_is_trained_reinforced_and_served_in_its_format(
    recipe, copied_run, tiny, tiny_flags, tmp_path: Path
):
    from genrec.modeling import encode_prompts, load_tokenizer

    base = tmp_path / "base"
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = "<|user|>{{ messages[0].content }}<|assistant|>"
    tokenizer.save_pretrained(base)
    tiny.lm(512).save_pretrained(base)
    run = copied_run(*BEFORE_SFT)
    flags = [*tiny_flags["sft"], "--model_name_or_path", str(base), "--sid_init", "titles"]
    few = ["--max_steps", "4", "--eval_every_steps", "2"]
    recipe("sft", run, *flags, *few, "--prompt_format", "chat")
    recipe("grpo", run, *tiny_flags["grpo"], "--max_steps", "1")
    ids = SemanticIds.load(run / "semantic_ids")
    start = "Bought so far, oldest first: "
    for stage in ("sft", "grpo"):
        loaded, _ = load_tokenizer(run / stage / "model", ids)
        (made,) = encode_prompts(loaded, [start + ids.sids()[0]])
        assert loaded.decode(made) == f"<|user|>{start}<|assistant|>{ids.sids()[0]}"
    assert require(run, "sft").metrics["best"]["ndcg@10"] >= 0
    recipe("recommend", run, *tiny_flags["recommend"])
    assert require(run, "recommend").rows == 10 * len(pl.read_parquet(run / "data/test.parquet"))


def test_base_models_that_cannot_be_used_are_refused(
    in_process, copied_run, tiny_run, tiny, tiny_flags, tmp_path: Path
):
    from genrec.modeling import save_model

    run = copied_run(*BEFORE_SFT)
    bare = tmp_path / "bare"
    tiny.lm(512).save_pretrained(bare)
    said = in_process("sft", run, *tiny_flags["sft"], "--model_name_or_path", str(bare), fails=True)
    assert f"{bare} has no tokenizer" in said
    foreign, stranger = tmp_path / "foreign", tiny.sids(12)
    model, tokenizer, _ = tiny.sid_lm(stranger)
    save_model(model, tokenizer, stranger, foreign, {"stage": "sft"})
    said = in_process(
        "sft", run, *tiny_flags["sft"], "--model_name_or_path", str(foreign), fails=True
    )
    assert f"was trained on SID map {stranger.sha256[:12]}" in said and "does not extend" in said
    for wrong in (
        ["--load_in_4bit", "true"], ["--use_dora", "true"], ["--prompt_format", "chat"],
    ):  # fmt: skip
        said = in_process("sft", run, *tiny_flags["sft"], *wrong, fails=True)
        assert f"{wrong[0][2:]} " in said and " needs " in said
    assert not (run / "sft" / "manifest.json").exists()


def test_a_model_too_short_for_the_histories_is_refused(
    recipe, copied_run, tiny, tiny_flags, tmp_path
):
    base = tmp_path / "base"
    tiny.lm(512, context=32).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    run = copied_run(*BEFORE_SFT)
    flags = [*tiny_flags["sft"], "--model_name_or_path", str(base)]
    done = recipe("sft", run, *flags, fails=True)
    assert "holds 32" in done.stderr and "max_history" in done.stderr


def test_one_normaliser_from_training_to_serving(tiny_run: Path):
    """sft chooses on validation; grpo, whose rollouts are over the trie, declares that anew."""
    from genrec.normalizers import NORMALIZERS, declared_normalizer
    from genrec.recommend import Recommender

    sft, grpo, lists = (require(tiny_run, stage) for stage in ("sft", "grpo", "recommend"))
    choice = sft.metrics["normalizer"]
    assert choice["rows"] == 40 and set(choice["measured"]) == set(NORMALIZERS)
    assert declared_normalizer(tiny_run / "sft" / "model") == choice["normalizer"]
    best = {key: value for key, value in sft.metrics["best"].items() if "@" in key}
    assert choice["measured"]["full"] == best  # sft validates under full while it trains
    assert grpo.config["normalizer"] == "trie" == grpo.metrics["normalizer"]["normalizer"]
    assert grpo.metrics["normalizer"]["declared_by_sft"] == choice["normalizer"]
    assert [n for n in grpo.notes if "declares trie" in n] or choice["normalizer"] == "trie"
    best = {key: value for key, value in grpo.metrics["best"].items() if "@" in key}
    assert grpo.metrics["normalizer"]["measured"]["trie"] == best
    assert declared_normalizer(tiny_run / "grpo" / "model") == "trie"
    assert lists.config["normalizer"] == "trie" and not lists.notes
    assert Recommender.load(tiny_run).engine.normalizer == "trie"


def test_the_served_model_takes_a_history_of_max_history(tiny_run: Path):
    """Also where no user of the training data had such a long one."""
    from genrec.recommend import Recommender

    recommender = Recommender.load(tiny_run)
    ids = recommender.catalog["item_id"].to_list()
    assert recommender.max_history == 20
    assert len(recommender.recommend(ids[:20], k=5)) == 5
    for template in recommender.renderer.names("sequential"):
        recommender.template = template
        assert len(recommender.recommend(ids[:20], k=5)) == 5


def test_the_model_of_a_stranger_is_refused(recipe, tiny_run: Path, copied_run):
    run = copied_run("data", "embeddings", "semantic_ids", "dataset", "sft")
    recipe("quantize", run, "--codebook_size", "8", "--seed", "5", "--overwrite", "true")
    done = recipe("recommend", run, "--model_stage", "sft", fails=True)
    assert "was built from 'quantize'" in done.stderr


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        ("embed", ["--method", "bert"], "method='bert' is not known; choose one of"),
        ("embed", ["--method", "npy"], "method=npy needs `vectors`"),
        ("embed", ["--dim", "0"], "dim=0 must be a positive integer"),
        ("quantize", ["--codebook_size", "1"], "codebook_size=1 must be an integer of at least 2"),
        ("build_dataset", ["--tasks", "title_to_sid"], "must include 'sequential'"),
        ("build_dataset", ["--sequential_mode", "x"], "sequential_mode='x' is not known"),
        (
            "recommend",
            ["--k", "30", "--beam_width", "20"],
            "k=30 must lie between 1 and beam_width=20",
        ),
        ("recommend", ["--split", "train"], "split='train' is not known"),
    ],
)
def test_settings_are_checked_before_anything_is_read(
    recipe, tmp_path: Path, stage: str, flags: list[str], message: str
):
    done = recipe(stage, tmp_path / "absent", *flags, fails=True)
    assert message in done.stderr
    assert not (tmp_path / "absent").exists()
