"""Settings of sft that can't work are refused before any work."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from trl import SFTConfig

from genrec.config import check_resuming, check_trackers, training_fingerprint
from genrec.sft_trainer import check_training

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "sft.py"


@pytest.fixture(scope="module")
def sft():
    return runpy.run_path(str(RECIPE))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_over": "catalogue"}, "loss_over"),
        ({"hidden_dropout": 1.0}, "hidden_dropout=1.0 must be at least 0 and below 1"),
        ({"ema_decay": -0.1}, "ema_decay=-0.1 must be"),
        ({"teachers": ["t"], "teacher_weight": 0.0}, "teacher_weight=0.0 must be above 0"),
        ({"teachers": ["t"], "teacher_weight": 1.1}, "teacher_weight=1.1 must be"),
        ({"loss_over": "trie", "normalizer": "full"}, "normalizer=full with loss_over=trie.*trie"),
        ({"loss_over": "level", "normalizer": "full"}, "use level or trie"),
        ({"loss_over": "trie", "normalizer": "level"}, "normalizer=level with loss_over=trie"),
        ({"model_name_or_path": "m", "dropout": 0.1}, "settings of a model from scratch"),
        ({"model_name_or_path": "m", "hidden_dropout": 0.1}, "settings of a model from scratch"),
        ({"warm_start": "r", "dropout": 0.1}, "dropout is the earlier model's"),
        ({"warm_start": "r", "use_lora": True, "load_in_4bit": True}, "load_in_4bit with warm_st"),
        ({"prompt_format": "chat"}, "prompt_format chat needs model_name_or_path"),
        ({"caps": ["rating=0.5"]}, "caps: rating=0.5 must be a whole number of rows"),
        ({"eval_rows": -1}, "eval_rows=-1 must be at least 0"),
        ({"eval_every_steps": 0}, "eval_every_steps=0 must be at least 1"),
        ({"vocab_size": -3}, "vocab_size=-3 must be at least 300"),
    ],
)
def test_settings_that_cannot_work(sft, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        sft["SftArgs"](**settings)


@pytest.mark.parametrize(
    ("settings", "loss_over", "message"),
    [
        ({"dataloader_num_workers": 2}, "trie", "dataloader_num_workers=2 must be 0"),
        ({"max_length": 64}, "trie", "max_length=64: rows are cut nowhere"),
        ({"completion_only_loss": False}, "vocabulary", "prompts are never learned here"),
        ({"train_sampling_strategy": "sequential"}, "trie", "choose one of random, group_by_len"),
        ({"label_smoothing_factor": 0.1}, "trie", "leaves out loss_over=trie and teachers"),
        ({"label_smoothing_factor": 0.1}, "taught", "leaves out .* teachers"),
        ({"loss_type": "dft"}, "taught", "teachers have no label"),
    ],
)
def test_trl_s_settings_that_would_do_nothing(tmp_path, settings: dict, loss_over: str, message):
    def check(**values) -> None:
        training = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **values)
        taught = loss_over == "taught"
        check_training(training, "vocabulary" if taught else loss_over, taught)

    check()
    with pytest.raises(ValueError, match=message):
        check(**settings)


def test_trl_s_settings_that_do_something(tmp_path):
    for values in (
        {"label_smoothing_factor": 0.1}, {"loss_type": "dft"}, {"max_length": None},
        {"train_sampling_strategy": "group_by_length"},
    ):  # fmt: skip
        training = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **values)
        check_training(training, "vocabulary", False)


def test_settings_that_would_break_a_resumption(tmp_path):
    def made(**values) -> SFTConfig:
        return SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **values)

    check_resuming(made())
    with pytest.raises(ValueError, match="goes on by itself"):
        check_resuming(made(resume_from_checkpoint="/nowhere/checkpoint-7"))
    with pytest.raises(ValueError, match="would go on as another training"):
        check_resuming(made(save_only_model=True))
    plain, dropping = (training_fingerprint(made(dataloader_drop_last=d)) for d in (False, True))
    assert dropping == {**plain, "dataloader_drop_last": True}


def test_trackers_that_are_not_installed(tmp_path, monkeypatch):
    from transformers import integrations

    def made(*names: str) -> SFTConfig:
        return SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=list(names))

    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["trackio"])
    check_trackers(made("trackio"))
    check_trackers(made("none"))
    with pytest.raises(ValueError, match="report_to=wandb: .* or choose of trackio, none"):
        check_trackers(made("trackio", "wandb"))


def test_settings_that_can(sft):
    args = sft["SftArgs"](loss_over="level", normalizer="trie", hidden_dropout=0.3, ema_decay=0.999)
    assert (args.loss_over, args.normalizer, args.hidden_dropout) == ("level", "trie", 0.3)
    assert sft["SftArgs"](loss_over="trie", normalizer="auto").ema_decay == 0.0


def test_chains_are_learned_over_the_vocabulary_alone(sft):
    check = sft["check_families"]
    counts = [{"sequential": 10}, {"sequential": 10, "reasoning_evidence": 3}]
    check("vocabulary", counts)
    check("trie", [{"sequential": 10, "reasoning_evidence": 0, "title_to_sid": 4}])
    with pytest.raises(ValueError, match="loss_over=trie with reasoning_evidence: chains cite"):
        check("trie", counts)
