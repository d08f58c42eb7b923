"""The rl side of build_dataset and grpo, run as a user runs them, on copies of the tiny run."""

from __future__ import annotations

import json

import polars as pl
import pytest

CPU = (
    "--use_cpu true --bf16 false --report_to none --disable_tqdm true --save_strategy no "
    "--gradient_checkpointing false --seed 0 --eval_rows 20 --max_steps 2 --num_generations 4 "
    "--per_device_train_batch_size 8 --beam_width 8 --eval_every_steps 2 --learning_rate 1e-4"
).split()
BEFORE = ("data", "embeddings", "semantic_ids", "dataset", "sft")


def test_reserved_targets_are_in_no_row_of_sft(copied_run, in_process):
    run = copied_run("data", "embeddings", "semantic_ids")
    in_process(
        "build_dataset", run, "--reserve_last", "true", "--rl_window", "2",
        "--tasks", "sequential", "direct", "title_to_sid",
    )  # fmt: skip
    log = pl.read_parquet(run / "data" / "interactions.parquet")
    sequences = dict(log.group_by("user_id", maintain_order=True).agg("item_id").iter_rows())
    index = dict(log.select("item_index", "item_id").unique().iter_rows())
    rl = pl.read_parquet(run / "dataset" / "rl.parquet")
    future = dict(rl.select("user_id", "future_item_index").iter_rows())
    rows = pl.read_parquet(run / "dataset" / "train.parquet")
    for user, items in sequences.items():
        training = items[:-2] if len(items) > 2 else items
        left = training[: len(training) - len(future.get(user, []))]
        if user in future:
            reserved = [index[item] for item in future[user]]
            assert reserved == training[len(left) :] and len(reserved) <= 2
        own = rows.filter(pl.col("user_id") == user)
        told = own.filter(pl.col("task") == "sequential")
        learned = [item for targets in told["targets"] for item in targets]
        # All but the first item, which has no history; nothing from the RL target on.
        assert learned == left[len(left) - len(learned) :]
        for history in own["history"].drop_nulls().to_list():
            n = len(history)
            assert any(left[at : at + n] == history for at in range(len(left) - n + 1))


@pytest.mark.slow
def test_objectives_and_rewards_run_through(copied_run, in_process, tiny_flags):
    run = copied_run(*BEFORE[:3])
    in_process("build_dataset", run, "--rl_window", "2", "--reserve_last", "true")
    in_process("sft", run, *tiny_flags["sft"], "--max_steps", "2")
    said = in_process(
        "grpo", run, *CPU, "--rewards", "rule", "prefix", "novelty", "future",
        "--reward_weights", "1", "0.2", "0.1", "0.5", "--future_window", "2",
        "--rollouts", "dynamic", "--credit", "level", "--pass_at_k", "2",
        "--filter_groups", "true", "--resample", "1",
    )  # fmt: skip
    before = json.loads((run / "grpo" / "before.json").read_text())
    assert sum(before["hits_per_group"].values()) == before["rows"] > 0
    assert "before training, of" in said
    log = json.loads((run / "grpo" / "log.json").read_text())
    entry = next(e for e in log if "valid_mass/1" in e)
    assert entry["invalid"] == 0
    assert {"rewards/novelty_reward/mean", "rewards/future_reward/mean"} <= set(entry)
    metrics = json.loads((run / "grpo" / "manifest.json").read_text())["metrics"]
    assert metrics["stopped"] is None


@pytest.mark.slow
def test_reasoning_mode_runs_through_and_is_served(copied_run, in_process, tiny_flags):
    """From the rows of the family to `genrec reason`; LoRA on the merged SFT model."""
    run = copied_run(*BEFORE[:3])
    in_process("build_dataset", run, "--tasks", "sequential", "reasoning_recommendation")
    in_process("sft", run, *tiny_flags["sft"], "--max_steps", "2", "--eval_rows", "5")
    flags = ["--chains", "2", "--max_chain_tokens", "12", "--eval_rows", "5", "--before_rows", "4"]
    in_process(
        "grpo", run, *CPU, *flags, "--rewards", "rule", "rank", "format", "citations", "claims",
        "--reward_weights", "1", "1", "0.5", "0.2", "0.2", "--temperature", "0.9",
        "--use_lora", "true", "--beta", "0.01", "--credit", "level", "--logging_steps", "1",
    )  # fmt: skip
    log = json.loads((run / "grpo" / "log.json").read_text())
    entry = next(e for e in log if "chains/length" in e)
    assert entry["invalid"] == 0 and 0 < entry["chains/length"] <= 12
    assert {f"rewards/{name}_reward/mean" for name in ("format", "citations", "claims")} <= {*entry}
    assert abs(entry["kl"]) < 1e-6  # the reference is the SFT model
    manifest = json.loads((run / "grpo" / "manifest.json").read_text())
    assert manifest["metrics"]["best"] is not None
    rows = pl.read_parquet(run / "dataset" / "rl.parquet")
    assert 0 < manifest["rows"] <= (rows["history"].list.len() >= 2).sum()
    said = in_process("reason", run, "--chains", "2", "--max_tokens", "12", "--k", "3")
    assert "Chain 2 (" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--rewards", "rule", "format"],
            "format only tell the chains of a prompt apart",
        ),
        (["--chains", "2"], "not trained on 'reasoning_recommendation'"),
        (["--chains", "3"], "chains=3 with num_generations=4"),
        (["--chains", "2", "--resample", "1"], "resample: 1 with chains=2"),
        (["--chain_value", "worst"], "chain_value"),
        (["--temperature", "0.5"], "temperature=0.5: beam rollouts"),
        (["--rewards", "future", "--future_window", "3"], "exceeds build_dataset's rl_window=1"),
        (["--rewards", "rule", "--reward_weights", "1", "2"], "one weight per reward"),
        (["--rewards", "rule", "rule"], "must name at least one, each once"),
        (["--rewards", "collaborative"], "has no such vectors"),
        (["--rollouts", "random"], "rollouts"),
        (["--loss", "sdpo"], "loss: sdpo with beta=0.0"),
        (["--stop_tolerance", "2"], "stop_tolerance=2.0"),
    ],
)
def test_settings_are_refused_before_a_model_is_loaded(copied_run, in_process, flags, message):
    run = copied_run(*BEFORE)
    assert message in in_process("grpo", run, *CPU, *flags, fails=True)
