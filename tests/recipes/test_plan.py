"""`genrec plan` for a named model and for a run."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from genrec.artifacts import Stage
from genrec.planning import HARDWARE, SHAPES, Hardware, Workload, estimate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plan(monkeypatch, capsys):
    """Runs the recipe in this process and gives what it printed."""

    def call(*flags: str, fails: bool = False) -> str:
        path = ROOT / "recipes" / "plan.py"
        monkeypatch.setattr(sys, "argv", [str(path), *flags])
        monkeypatch.delenv("GENREC_DEBUG", raising=False)
        if fails:
            with pytest.raises(SystemExit) as stopped:
                runpy.run_path(str(path), run_name="__main__")
            assert stopped.value.code == 2
        else:
            runpy.run_path(str(path), run_name="__main__")
        said = capsys.readouterr()
        return said.out + said.err

    return call


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("tiny") / "run"
    shop = tiny.shop()
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(run, shop, model, tokenizer, normalizer="trie")
    return run


def test_a_named_model(plan):
    said = plan(
        "--model", "qwen3-0.6b", "--n_items", "1000", "--prompt_tokens", "300", "--n_users",
        "5000000", "--price_per_hour", "2", "--devices", "4", "--k", "30",
    )  # fmt: skip
    work = Workload(100, (256,) * 3, 300, 1000, 5_000_000)
    made = estimate(SHAPES["qwen3-0.6b"], work, HARDWARE["h100-80"], devices=4)
    assert "Estimate (a roofline, nothing was run)" in said and "40% of its peaks assumed" in said
    assert "596.0 M parameters, bfloat16" in said and "h100-80 x 4" in said
    assert f"{made.users_per_s:,.1f} users/s a device" in said
    assert f"{made.hours:,.2f} hours" in said and f" {made.hours * 8:,.2f} " in said
    assert "Measured: give --run_dir of a run" in said


def test_a_run_and_its_measured_rate(plan, run_dir: Path):
    flags = ["--run_dir", str(run_dir), "--hardware", "cpu", "--dtype", "float32"]
    said = plan(*flags, "--n_users", "7200")
    assert "3 levels, 20 items" in said and "Measured: no lists of this run were timed" in said
    assert "set --price_per_hour" in said
    assert "scores over trie" in said and "normaliser" in said  # what its model declares
    assert "scores over level" in plan(*flags, "--normalizer", "level")
    for name in ("n_items", "prompt_tokens"):
        assert f"{name}=0" in plan(*flags, f"--{name}", "0", fails=True)
    stage = Stage(run_dir, "recommend", {"engine": "torch", "dtype": "float32", "beam_width": 9})
    assert not stage.is_done()
    stage.finish(rows=0, metrics={"users_per_s": 2.0})
    said = plan(*flags, "--n_users", "7200")
    one = said.replace("\n", " ")
    assert "Measured: 2.0 users/s a process, engine torch, float32, B = 9, on " in one
    assert "1.00 hours with 1 process" in one
    four = plan(*flags, "--n_users", "7200", "--devices", "4").replace("\n", " ")
    assert "0.25 hours with 4 processes" in four
    assert not (run_dir / "test_reads.jsonl").exists()  # prompts are those of validation rows


def test_own_hardware(plan):
    flags = ["--model", "qwen3-0.6b", "--n_items", "9", "--prompt_tokens", "50"]
    own = "--hardware own --memory 4 --bandwidth 100 --tflops 10".split()
    own += ["--tflops_float32", "2"]
    device = Hardware(4e9, 1e11, {"bfloat16": 1e13, "float32": 2e12})
    work = Workload(50, (256,) * 3, 50, 9, 1_000_000)
    made = estimate(SHAPES["qwen3-0.6b"], work, device)
    said = plan(*flags, *own)
    assert f"{made.largest_batch:,} users in 90%" in said
    assert f"{made.users_per_s:,.1f} users/s" in said
    work = replace(work, head_columns="all")
    made = estimate(SHAPES["qwen3-0.6b"], work, device)
    said = plan(*flags, *own[:-2], "--engine", "vllm-inworker")
    assert f"{made.users_per_s:,.1f} users/s" in said and "vllm-inworker" in said
    for left_out in ("memory", "bandwidth", "tflops", "tflops_float32"):
        at = own.index(f"--{left_out}")
        said = plan(*flags, *own[:at], *own[at + 2 :], fails=True)
        assert f"--hardware own needs --{left_out}" in said
    said = plan(*flags, *own, "--memory", "1", fails=True)
    assert "exceed 90% of the device's 1 GB" in said


WHOLE = "--model qwen3-4b --prompt_tokens 9 --n_items 9".split()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --run_dir, or --model"),
        (["--model", "gpt-9"], "model='gpt-9' is no known shape"),
        (["--model", "qwen3-4b"], "--prompt_tokens is needed without --run_dir"),
        (["--model", "qwen3-4b", "--prompt_tokens", "9"], "--n_items is needed"),
        (["--model", "qwen3-4b", "--hardware", "tpu"], "hardware='tpu' is not known"),
        (["--model", "qwen3-4b", "--k", "20", "--beam_width", "5"], "k=20 must lie between 1 and"),
        (["--model", "qwen3-4b", "--tflops", "-1"], "--prompt_tokens is needed"),
        ([*WHOLE, "--tflops", "-1"], "tflops=-1.0 must be above 0"),
        (["--model", "qwen3-4b", "--price_per_hour", "-1"], "price_per_hour=-1.0 must be at least"),
        (["--model", ""], "model is empty"),
        ([*WHOLE, "--engine", "vllm"], "engine=vllm makes a request of each beam and level"),
        ([*WHOLE, "--engine", "tpu"], "engine='tpu' is not known"),
        (["--model", "qwen3-4b", "--n_items", "0"], "n_items=0 must be at least 1"),
        (["--model", "qwen3-4b", "--prompt_tokens", "nan"], "prompt_tokens=nan must be at least 1"),
        ([*WHOLE, "--prompt_tokens", "1e300"], "prompt_tokens=1e+300 must be at most"),
        ([*WHOLE, "--memory", "inf"], "memory=inf must lie between"),
        ([*WHOLE, "--tflops", "1e-320"], "must lie between 1e-06 and"),
        ([*WHOLE, "--devices", "9" * 400], "must be at most 1,000,000"),
        (["--run_dir", "/nowhere"], "stage 'sft' has not finished"),
    ],
)
def test_bad_settings(plan, flags: list[str], message: str):
    assert message in plan(*flags, fails=True)
