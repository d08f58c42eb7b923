"""An optimizer step is the same, however its batch is split over passes or processes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from test_two_processes import launch

from genrec.artifacts import FOLDERS

N_STEPS = 5
# Adam divides by the root of a squared gradient: rounding of tiny gradients moves weights by up to
# a learning rate of 3e-3 a step. A wrong weighting of tokens moves them by whole steps.
TOLERANCE = 3e-4


def trained(run: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    log = json.loads((run / "sft" / "log.json").read_text())
    return [e["loss"] for e in log if "loss" in e], load_file(
        run / "sft" / "model" / "model.safetensors"
    )


def assert_same(one: Path, other: Path) -> None:
    (losses, weights), (other_losses, other_weights) = trained(one), trained(other)
    assert len(losses) == N_STEPS and losses[0] > losses[-1]
    np.testing.assert_allclose(losses, other_losses, rtol=1e-4)
    assert weights.keys() == other_weights.keys()
    for name, value in weights.items():
        assert (value - other_weights[name]).abs().max() < TOLERANCE, name


@pytest.fixture(scope="module")
def whole(tiny_run, tiny_flags, recipe, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run whose steps are one pass over 16 rows, and the flags that all runs here have."""
    run = tmp_path_factory.mktemp("whole") / "run"
    for name in ("prepare", "embed", "quantize", "build_dataset"):
        shutil.copytree(tiny_run / FOLDERS[name], run / FOLDERS[name])
    flags = [
        *tiny_flags["sft"], "--max_steps", str(N_STEPS), "--eval_rows", "0", "--logging_steps", "1",
        "--save_strategy", "no",
    ]  # fmt: skip
    rows = pl.read_parquet(run / FOLDERS["build_dataset"] / "train.parquet")
    labels = rows["completion"].str.len_bytes()
    assert labels.max() > 5 * labels.min()  # with equal rows a wrong mean of means would pass
    recipe("sft", run, *flags, "--per_device_train_batch_size", "16")
    return run, flags


@pytest.fixture
def fresh(whole, tmp_path: Path) -> Path:
    """The same run before sft."""
    shutil.copytree(whole[0], tmp_path / "run", ignore=shutil.ignore_patterns("sft"))
    return tmp_path / "run"


def test_sixteen_rows_at_once_equal_four_times_four(whole, fresh: Path, recipe):
    split = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4"]
    recipe("sft", fresh, *whole[1], *split)
    assert_same(whole[0], fresh)


def test_sixteen_rows_at_once_equal_eight_on_each_of_two_processes(
    whole, fresh: Path, recipe_command
):
    env = {**os.environ, **recipe_command("sft", fresh)[1]}
    launch("sft", fresh, [*whole[1], "--per_device_train_batch_size", "8"], env)
    manifest = json.loads((fresh / "sft" / "manifest.json").read_text())
    assert manifest["config"]["training"]["world_size"] == 2
    assert_same(whole[0], fresh)
