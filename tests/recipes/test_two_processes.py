"""Two processes over gloo: the launch path of several GPUs, on CPU."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from genrec.artifacts import FOLDERS, require

ROOT = Path(__file__).resolve().parents[2]


def launch(stage: str, run: Path, flags: list[str], env: dict[str, str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    config = str(ROOT / "recipes" / "accelerate" / "cpu-2.yaml")
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    command = [*start, "--main_process_port", port, str(ROOT / "recipes" / f"{stage}.py")]
    done = subprocess.run(
        [*command, "--run_dir", str(run), *flags], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_first_run_on_two_processes(stage, tiny_run, tiny_flags, recipe_command, tmp_path):
    run = tmp_path / "run"
    done = ["prepare", "embed", "quantize", "build_dataset"] + (["sft"] if stage == "grpo" else [])
    for name in done:
        shutil.copytree(tiny_run / FOLDERS[name], run / FOLDERS[name])
    env = {**os.environ, **recipe_command(stage, run)[1]}
    flags = [*tiny_flags[stage], "--max_steps", "2", "--eval_every_steps", "1"]
    launch(stage, run, flags, env)
    manifest = require(run, stage)
    assert manifest.config["training"]["world_size"] == 2
    assert manifest.metrics["best"] is not None
    assert (run / FOLDERS[stage] / "model" / "model.safetensors").is_file()
