"""Split weights: refused where they would be read as whole, gathered where they are saved."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from genrec import sharding
from genrec.evaluation.validation import BeamValidation
from genrec.modeling import load_model, save_model


def settings(zero: int | None = None, fsdp: bool | None = None) -> SimpleNamespace:
    plugin = None if zero is None else SimpleNamespace(zero_stage=zero)
    return SimpleNamespace(deepspeed_plugin=plugin, fsdp=fsdp)


@pytest.fixture
def split(tiny, tmp_path: Path):
    """A model split by FSDP2 over a group of one process, a whole copy of it, and its parts."""
    semantic_ids = tiny.sids(10)
    model, tokenizer, _ = tiny.sid_lm(semantic_ids)
    whole, _, _ = tiny.sid_lm(semantic_ids)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        yield model, whole, tokenizer, semantic_ids
    finally:
        distributed.destroy_process_group()


def test_what_splits_weights(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert sharding.sharding_of(settings()) is None
    assert sharding.sharding_of(settings(zero=2)) is None  # gradients and optimizer alone
    assert sharding.sharding_of(settings(zero=3)) == "ZeRO-3"
    assert sharding.sharding_of(settings(fsdp=True)) == "FSDP"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding.sharding_of(settings()) == "FSDP"


def test_settings_that_need_whole_weights_are_refused(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    for fine in (settings(), settings(zero=2)):
        sharding.check_sft(fine, use_lora=True, eval_rows=500, loss_over="trie")
        sharding.check_grpo(fine)
    for split in (settings(zero=3), settings(fsdp=True)):
        sharding.check_sft(split, use_lora=False, eval_rows=0, loss_over="vocabulary")
        with pytest.raises(ValueError, match="teachers under"):
            sharding.check_sft(
                split, use_lora=False, eval_rows=0, loss_over="vocabulary", taught=True
            )
        with pytest.raises(ValueError, match="ema_decay under"):
            sharding.check_sft(
                split, use_lora=False, eval_rows=0, loss_over="vocabulary", averaged=True
            )
        with pytest.raises(ValueError, match="use_lora under (ZeRO-3|FSDP): SID rows"):
            sharding.check_sft(split, use_lora=True, eval_rows=0, loss_over="vocabulary")
        with pytest.raises(ValueError, match="eval_rows=5 under .*; set eval_rows to 0"):
            sharding.check_sft(split, use_lora=False, eval_rows=5, loss_over="vocabulary")
        if sharding.sharding_of(split) == "ZeRO-3":
            with pytest.raises(ValueError, match="loss_over=trie under ZeRO-3: the head is split"):
                sharding.check_sft(split, use_lora=False, eval_rows=0, loss_over="trie")
        else:
            sharding.check_sft(split, use_lora=False, eval_rows=0, loss_over="trie")
        with pytest.raises(ValueError, match="grpo under .* rollouts search with whole weights"):
            sharding.check_grpo(split)


def test_split_models_are_neither_saved_nor_measured_as_if_whole(split, tmp_path: Path):
    model, whole, tokenizer, semantic_ids = split
    assert sharding.is_sharded(model) and not sharding.is_sharded(whole)
    folder = tmp_path / "model"
    with pytest.raises(ValueError, match="saving a model needs whole weights"):
        save_model(model, tokenizer, semantic_ids, folder, {})
    assert not folder.exists()

    def engine(model):
        raise AssertionError("nothing is searched")

    validation = BeamValidation(tmp_path, engine, [[1]], np.array([0]), None)
    with pytest.raises(ValueError, match="validation needs whole weights"):
        validation.measure(model, 1, 0.1)
    assert not (tmp_path / "validation.json").exists()


def test_gathered_weights_are_the_whole_model(split, tmp_path: Path):
    model, whole, tokenizer, semantic_ids = split

    def get_state_dict(wrapped):  # what accelerate does under FSDP2
        return get_model_state_dict(
            wrapped, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
        )

    trainer = SimpleNamespace(
        model=model, model_wrapped=model, accelerator=SimpleNamespace(get_state_dict=get_state_dict)
    )
    weights = sharding.gathered(trainer)
    assert weights is not None
    save_model(model, tokenizer, semantic_ids, tmp_path / "model", {}, weights)
    loaded, _, _ = load_model(tmp_path / "model", semantic_ids)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, whole(ids).logits)
    trainer.model = whole
    assert sharding.gathered(trainer) is None
    assert os.listdir(tmp_path / "model")
