"""A title index from prepare to evaluate, run as a user runs it."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

from genrec.artifacts import read_json, read_shards
from genrec.columns import ITEM_INDEX, PROMPT, RANK, ROW_ID, SCORE, SEEN
from genrec.modeling import encode_rows
from genrec.prompt_format import title_end
from genrec.recommend import Recommender

ROOT = Path(__file__).resolve().parents[2]
CPU = "--use_cpu true --bf16 false --report_to none"
TRAINING = (
    f"{CPU} --disable_tqdm true --gradient_checkpointing false --seed 0 "
    "--eval_rows 10 --size tiny --vocab_size 600 --max_steps 6 --learning_rate 3e-3 "
    "--per_device_train_batch_size 16 --save_strategy no --eval_every_steps 6 --normalizer full"
)
FLAGS = {
    "prepare": "--format synthetic --n_users 60 --n_items 30",
    "embed": "--dim 8",
    "quantize": "--method title --max_title_bytes 16",
    "build_dataset": "--tasks all",
    "sft": f"{TRAINING} --caps *=20 sequential=100",
    "recommend": "--k 5 --beam_width 30 --max_rows 12",
    "evaluate": "--samples 20 --permutations 50 --baselines popularity --ks 5",
    "explain": "--num_rows 2 --k 2 --samples 20 --replacement_draws 1",
    "audit": "",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run; read only."""
    folder = tmp_path_factory.mktemp("titles") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, flags in FLAGS.items():
            path = str(ROOT / "recipes" / f"{name}.py")
            patch.setattr(sys, "argv", [path, "--run_dir", str(folder), *flags.split()])
            runpy.run_path(path, run_name="__main__")
    return folder


def test_nothing_is_added_and_families_that_say_nothing_are_off(run):
    card = read_json(run / "dataset" / "card.json")
    off = card["switched_off"]
    assert "by their titles already" in off["title_to_sid"]
    assert "named by titles" in off["reasoning_recommendation"]
    assert {f["name"] for f in card["families"]} >= {"sequential", "query_search", "denoising"}
    titles = read_json(run / "semantic_ids" / "quality.json")["titles"]
    assert titles["longest_bytes"] <= 16 and titles["shortened"] > 0 and titles["numbered"] > 0
    recommender = Recommender.load(run)
    assert "genrec.json" in {p.name for p in (run / "sft" / "model").iterdir()}
    assert not any("<a_" in token for token in recommender.tokenizer.get_vocab())
    assert "titles of items, written out" in (run / "sft" / "model" / "README.md").read_text()


def test_lists_are_items_unseen_distinct_and_exactly_scored(run):
    recommender = Recommender.load(run)
    model, tokenizer = recommender.engine.model, recommender.tokenizer
    table = read_shards(run / "recommendations", "recommendations")
    split = pl.read_parquet(run / "data" / "test.parquet")
    seen = dict(split.select(ROW_ID, SEEN).iter_rows())
    stored = pl.read_parquet(run / "dataset" / "test.parquet", columns=[ROW_ID, PROMPT])
    prompt_of = dict(stored.iter_rows())
    sids = recommender.semantic_ids.sids()
    assert table[ROW_ID].n_unique() == 12
    for (row_id,), made in table.sort(ROW_ID, RANK).group_by(ROW_ID, maintain_order=True):
        items = made[ITEM_INDEX].to_list()
        assert len(set(items)) == len(items) == 5 and set(items) <= set(range(len(sids)))
        assert not set(items) & set(seen[row_id])
        rows = encode_rows(
            tokenizer, [prompt_of[row_id]] * len(sids), sids.to_list(), {title_end(tokenizer)}
        )
        truth = []
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
            with torch.no_grad():
                steps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            wanted = torch.tensor(labels[1:])
            learned = wanted >= 0
            truth.append(float(steps[learned].gather(1, wanted[learned][:, None]).sum()))
        for item, score in zip(items, made[SCORE], strict=True):
            assert score == pytest.approx(truth[item], abs=1e-3)
        others = [x for item, x in enumerate(truth) if item not in {*items, *seen[row_id]}]
        assert max(others) <= made[SCORE].min() + 1e-3  # the beam is as wide as the catalogue


def test_evaluate_scored_them(run):
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert metrics["rows"] == 12 and metrics["unknown_items"] == 0
    assert set(metrics["systems"]) == {"genrec", "popularity"}


def test_trace_and_replay_make_the_stored_lists_again(run, in_process, monkeypatch):
    rows = pl.read_parquet(run / "recommendations" / "rows.parquet")
    said = in_process("trace", run, "--user", str(rows["user_id"][0]))
    assert "EQUAL to the stored list" in said and "prompt hash equal" in said
    path = str(ROOT / "recipes" / "audit.py")
    monkeypatch.setattr(sys, "argv", [path, "replay", "--run_dir", str(run), "--all"])
    runpy.run_path(path, run_name="__main__")  # exits with status 1 if a list isn't reproduced


def test_doctor_looks_at_titles(run, in_process):
    flags = ("--rows", "10", "--exhaustive_rows", "3")
    try:
        in_process("doctor", run, *flags)
    except SystemExit as stopped:  # a model of six steps is bad
        assert stopped.code == 1
    found = {c["name"]: c for c in read_json(run / "doctor.json")["checks"]}
    for name in ("manifests", "semantic ids", "model", "prompts", "search", "lists"):
        assert found[name]["status"] in ("ok", "look"), found[name]
    assert found["prompts"]["status"] == "ok"
    assert "titles as names" in found["semantic ids"]["value"]
    assert {found["levels"]["status"], found["legality"]["status"]} == {"not run"}


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("sft", f"{CPU} --loss_over level --overwrite true", "use loss_over=vocabulary"),
        ("grpo", CPU, "can't be done with titles yet"),
        ("recommend", "--engine vllm --overwrite true", "by engine=torch alone"),
        ("reason", "--user {user}", "chains cite semantic ids"),
        ("quantize", "--method title --max_title_bytes 3", "must be at least 16"),
    ],
)
def test_what_cannot_work_yet_is_refused(run, in_process, name: str, flags: str, message: str):
    before = sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file())
    user = pl.read_parquet(run / "data" / "test.parquet")["user_id"][0]
    said = in_process(name, run, *flags.format(user=user).split(), fails=True)
    assert message in said
    assert sorted((p, p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file()) == before


def test_templates_with_brackets_are_refused(run, in_process, tmp_path):
    shutil.copytree(run / "dataset" / "prompts", tmp_path / "prompts")
    (tmp_path / "prompts" / "sequential" / "seen" / "01.jinja").write_text("[log] {{ history }}")
    flags = ("--prompts_dir", str(tmp_path / "prompts"), "--overwrite", "true")
    said = in_process("build_dataset", run, *flags, fails=True)
    assert "template 'sequential/seen/01' holds [ or ]" in said
