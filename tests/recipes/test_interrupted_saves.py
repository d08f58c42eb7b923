"""A full disk, or SIGTERM, in the middle of a checkpoint: the one before stays good."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from genrec.artifacts import FOLDERS
from genrec.modeling import last_checkpoint

ROOT = Path(__file__).resolve().parents[2]
EVERY, N_STEPS = 2, 6
CUT = 4  # the step whose checkpoint is not finished

# Runs a recipe and ends it by SIGTERM between two files of checkpoint CUT, or in the middle of one.
TERMINATED = f"""
import os, runpy, signal, sys
from transformers import Trainer, TrainerState

def end():
    os.kill(os.getpid(), signal.SIGTERM)

def save_rng_state(self, folder, save=Trainer._save_rng_state):
    if where == "between" and self.state.global_step == {CUT}:
        end()
    save(self, folder)

def save_to_json(self, path, save=TrainerState.save_to_json):
    save(self, path)
    if where == "within" and self.global_step == {CUT}:
        with open(path, "r+") as stream:
            stream.truncate(100)
        end()

where = sys.argv.pop(1)
Trainer._save_rng_state, TrainerState.save_to_json = save_rng_state, save_to_json
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def training_flags(tiny_flags: dict[str, list[str]]) -> list[str]:
    return [
        *tiny_flags["sft"], "--max_steps", str(N_STEPS), "--save_steps", str(EVERY),
        "--logging_steps", "1", "--eval_every_steps", str(EVERY), "--dropout", "0.1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny_run, tiny_flags, recipe, tmp_path_factory) -> Path:
    """An uninterrupted training."""
    run = tmp_path_factory.mktemp("whole") / "run"
    for name in ("prepare", "embed", "quantize", "build_dataset"):
        shutil.copytree(tiny_run / FOLDERS[name], run / FOLDERS[name])
    recipe("sft", run, *training_flags(tiny_flags))
    return run


@pytest.fixture
def fresh(whole: Path, tmp_path: Path) -> Path:
    """The same run before sft."""
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("sft"))
    return tmp_path / "run"


def assert_good_and_resumed(run: Path, whole: Path, recipe, flags: list[str]) -> None:
    """Checkpoint EVERY is the last whole one, and a rerun from it ends as `whole`."""
    checkpoints = run / "sft" / "checkpoints"
    assert last_checkpoint(checkpoints) == str(checkpoints / f"checkpoint-{EVERY}")
    assert not (run / "sft" / "manifest.json").exists()
    state = checkpoints / f"checkpoint-{EVERY}" / "trainer_state.json"
    before = state.stat().st_mtime_ns
    recipe("sft", run, *flags)
    assert state.stat().st_mtime_ns == before  # it went on there instead of starting again
    ends = [load_file(r / "sft" / "model" / "model.safetensors") for r in (run, whole)]
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    logs = [json.loads((r / "sft" / "log.json").read_text()) for r in (run, whole)]
    losses = [[e["loss"] for e in log if "loss" in e] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == N_STEPS


@pytest.mark.parametrize("where", ["between", "within"])
def test_sigterm_while_a_checkpoint_is_written(
    where: str, whole: Path, fresh: Path, recipe, recipe_command, tiny_flags
):
    flags = training_flags(tiny_flags)
    command, env = recipe_command("sft", fresh, *flags)
    done = subprocess.run(
        [sys.executable, "-c", TERMINATED, where, *command[1:]],
        env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == -signal.SIGTERM, done.stderr[-2000:]
    assert (fresh / "sft" / "checkpoints" / f"checkpoint-{CUT}").is_dir()
    assert_good_and_resumed(fresh, whole, recipe, flags)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_the_disk_fills_up_while_a_checkpoint_is_written(
    file: str, whole: Path, fresh: Path, in_process, recipe, tiny_flags, monkeypatch
):
    save = Trainer._save_checkpoint

    def on_a_full_disk(self, *args, **kwargs):
        folder = Path(self.args.output_dir) / f"checkpoint-{CUT}"
        if self.state.global_step == CUT:
            folder.mkdir()
            (folder / file).symlink_to("/dev/full")  # the system's own ENOSPC, by any writer
        save(self, *args, **kwargs)

    flags = training_flags(tiny_flags)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", on_a_full_disk)
        said = in_process("sft", fresh, *flags, fails=True)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "the disk is full or can't be written to" in line
    assert "free some space and run the same command again" in line
    shutil.rmtree(fresh / "sft" / "checkpoints" / f"checkpoint-{CUT}")  # the device, not a disk
    if file == "optimizer.pt":  # the rerun is the same after each
        assert_good_and_resumed(fresh, whole, recipe, flags)
