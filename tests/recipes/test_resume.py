"""Killed with SIGKILL and started again: nothing is lost, doubled or different."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from recipe_calls import run
from safetensors.torch import load_file

from genrec.artifacts import require
from genrec.evaluation.training_picture import CurvesPicture

N_STEPS = 24


def kill_when(ready: Callable[[], bool], command: list[str], env: dict[str, str]) -> None:
    """Start a command and kill it, without any chance to clean up, once `ready` says so."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=env,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not ready():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline, "it never got there"
            time.sleep(0.005)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file()}


def test_sft_resumes_and_equals_an_uninterrupted_run(
    recipe, recipe_command, tiny_flags, copied_run, tmp_path: Path
):
    """On one CPU thread in fp32, resumed training is bit for bit the uninterrupted one."""
    whole = copied_run("data", "embeddings", "semantic_ids", "dataset")
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    flags = [
        *tiny_flags["sft"], "--max_steps", str(N_STEPS), "--save_steps", "4", "--dropout", "0.1",
        "--eval_every_steps", "4", "--lr_scheduler_type", "cosine", "--logging_steps", "1",
        "--hidden_dropout", "0.1", "--ema_decay", "0.9", "--loss_over", "trie",
    ]  # fmt: skip
    recipe("sft", whole, *flags)
    checkpoints = killed / "sft" / "checkpoints"
    kill_when(
        lambda: bool(list(checkpoints.glob("checkpoint-*/trainer_state.json"))),
        *recipe_command("sft", killed, *flags),
    )
    assert not (killed / "sft" / "manifest.json").exists()
    reached = max(int(p.name.split("-")[1]) for p in checkpoints.glob("checkpoint-*"))
    assert reached < N_STEPS
    with pytest.raises(ValueError, match="stage 'sft' has not finished"):
        require(killed, "sft")  # what comes next can't mistake it for a finished one
    cut = checkpoints / f"checkpoint-{N_STEPS + 1}"  # as if killed while it wrote a checkpoint
    cut.mkdir()
    (cut / "model.safetensors").write_bytes(b"half")
    before = {
        p.parent.name: p.stat().st_mtime_ns
        for p in checkpoints.glob("checkpoint-*/trainer_state.json")
    }
    recipe("sft", killed, *flags)
    # It went on instead of starting again: the checkpoints from before are the same files.
    after = {
        p.parent.name: p.stat().st_mtime_ns
        for p in checkpoints.glob("checkpoint-*/trainer_state.json")
    }
    assert before.items() <= after.items()
    assert not (killed / "sft.old-1").exists()

    logs = [json.loads((run / "sft" / "log.json").read_text()) for run in (whole, killed)]
    steps = [[e["step"] for e in log if "loss" in e] for log in logs]
    assert steps[0] == steps[1] and steps[1][-1] == N_STEPS
    losses = [[e["loss"] for e in log if "loss" in e] for log in logs]
    assert losses[0] == losses[1]
    measured = [
        json.loads((run / "sft" / "validation.json").read_text()) for run in (whole, killed)
    ]
    assert measured[0] == measured[1]
    weights = [load_file(run / "sft" / "model" / "model.safetensors") for run in (whole, killed)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


@pytest.mark.parametrize("four_bit", [False, True], ids=["lora", "qlora"])
def test_adapters_go_on_as_if_nothing_had_happened(
    copied_run, tiny, tiny_flags, tmp_path: Path, monkeypatch, four_bit: bool
):
    """Also in the precision that they were trained in, which PEFT's loading changes."""
    if four_bit:
        pytest.importorskip("bitsandbytes", reason="genrec[quant] is not installed")
    base = tmp_path / "base"
    tiny.lm(512).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)
    whole = copied_run("data", "embeddings", "semantic_ids", "dataset")
    killed = tmp_path / "killed"
    shutil.copytree(whole, killed)
    flags = [
        *tiny_flags["sft"], "--model_name_or_path", str(base), "--use_lora", "true",
        "--load_in_4bit", str(four_bit).lower(), "--max_steps", "6", "--save_steps", "2",
        "--eval_rows", "0", "--logging_steps", "1", "--ema_decay", "0.5",
    ]  # fmt: skip
    run("sft", whole, *flags)
    original = CurvesPicture.on_log

    def die(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt
        return original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CurvesPicture, "on_log", die)
        with pytest.raises(KeyboardInterrupt):
            run("sft", killed, *flags)
    assert (killed / "sft" / "checkpoints" / "checkpoint-4").is_dir()
    run("sft", killed, *flags)
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        ours, theirs = (load_file(folder / "sft" / name) for folder in (whole, killed))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key


def test_recommend_goes_on_at_the_next_shard(
    recipe, recipe_command, tiny_run: Path, copied_run, tiny_flags
):
    run = copied_run("data", "embeddings", "semantic_ids", "dataset", "sft", "grpo")
    flags = [*tiny_flags["recommend"], "--shard_size", "5", "--batch_size", "5"]
    folder = run / "recommendations"
    kill_when(
        lambda: len(list(folder.glob("recommendations-*.parquet"))) >= 3,
        *recipe_command("recommend", run, *flags),
    )
    finished = {n: v for n, v in files(folder).items() if n.startswith("recommendations-")}
    rows = pl.read_parquet(run / "data" / "test.parquet")
    n_shards = -(-len(rows) // 5)
    assert 3 <= len(finished) < n_shards
    with pytest.raises(ValueError, match="stage 'recommend' has not finished"):
        require(run, "recommend")
    (folder / ".recommendations-00099.parquet.1.partial").write_bytes(b"left by the killed writer")

    recipe("recommend", run, *flags)
    resumed = files(folder)
    assert {n: resumed[n] for n in finished} == finished  # bytes and times
    assert len([n for n in resumed if n.startswith("recommendations-")]) == n_shards
    assert not [n for n in resumed if n.endswith(".partial")]
    table = pl.read_parquet(folder / "recommendations-*.parquet")
    assert len(table) == 10 * len(rows)
    assert table.select("row_id", "rank").is_duplicated().sum() == 0

    whole = run / "whole"
    folder.rename(whole)
    recipe("recommend", run, *flags)
    for name, (content, _) in files(folder).items():
        if name.endswith(".parquet"):
            assert content == resumed[name][0], name
    require(run, "recommend")
