"""Validation during training: what is measured, and which weights are kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.evaluation.validation import BeamValidation
from genrec.modeling import encode_prompts


@pytest.fixture
def world(tiny):
    semantic_ids = tiny.sids(20)
    model, tokenizer, token_ids = tiny.sid_lm(semantic_ids)
    trie = SidTrie.build(semantic_ids.codes)
    sids = semantic_ids.sids().to_list()
    prompts = encode_prompts(tokenizer, [f"Bought: {sids[i]}" for i in range(6)])

    def make(m) -> TorchEngine:
        return TorchEngine(m, trie, token_ids, tokenizer.pad_token_id)

    return model, make, prompts


def scramble(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_metrics_by_hand_of_what_is_served(world, tmp_path: Path):
    model, make, prompts = world
    served = make(model).search(prompts, 10, 50).items
    targets = served[np.arange(6), [0, 2, 9, 0, 0, 0]]
    listed = [set(row) for row in served]
    for row in (3, 4, 5):  # three misses
        targets[row] = next(i for i in range(20) if i not in listed[row])
    entry = BeamValidation(tmp_path, make, prompts, targets, None).measure(model, 7, 1.23456)
    assert entry["step"] == 7 and entry["epoch"] == 1.235
    assert entry["hr@10"] == pytest.approx(3 / 6)
    # Ranks 1, 3 and 10: 1 + 1/log2(4) + 1/log2(11), over 6 rows.
    assert entry["ndcg@10"] == pytest.approx((1 + 0.5 + 0.289065) / 6, abs=1e-5)
    assert json.loads((tmp_path / "validation.json").read_text()) == [entry]


def test_seen_items_are_filtered(world, tmp_path: Path):
    model, make, prompts = world
    served = make(model).search(prompts, 10, 50).items
    seen = [row[:9] for row in served]  # the tenth moves up to the first place
    entry = BeamValidation(tmp_path, make, prompts, served[:, 9], seen).measure(model, 1, 1.0)
    assert entry["ndcg@10"] == pytest.approx(1.0)


def test_the_weights_of_the_best_measurement_are_kept(world, tmp_path: Path):
    model, make, prompts = world
    states = {}
    for seed in (1, 2, 3):
        scramble(model, seed)
        states[seed] = weights(model).clone()
    targets = make(model).search(prompts, 1, 50).items[:, 0]  # seed 3's own best items
    validation = BeamValidation(tmp_path, make, prompts, targets, None)
    scores = []
    for step, seed in enumerate((1, 3, 2), start=1):
        scramble(model, seed)
        model.train()
        scores.append(validation.measure(model, step, float(step))["ndcg@10"])
        assert model.training and torch.equal(weights(model), states[seed])
    assert scores[1] == pytest.approx(1.0) and max(scores[0], scores[2]) < 1.0
    best = validation.restore_best(model)
    assert best is not None and best["step"] == 2
    assert torch.equal(weights(model), states[3])
    assert [e["step"] for e in validation.history] == [1, 2, 3]


def test_an_interrupted_run_goes_on_with_what_was_measured(world, tmp_path: Path):
    model, make, prompts = world
    scramble(model, 3)
    best_weights = weights(model).clone()
    targets = make(model).search(prompts, 1, 50).items[:, 0]
    first = BeamValidation(tmp_path, make, prompts, targets, None)
    first.measure(model, 1, 1.0)
    scramble(model, 1)
    first.measure(model, 2, 2.0)
    # Killed before step 2's checkpoint was written: step 2 is measured again, now worse.
    again = BeamValidation(tmp_path, make, prompts, targets, None)
    scramble(model, 2)
    again.measure(model, 2, 2.0)
    assert [e["step"] for e in again.history] == [1, 2]
    best = again.restore_best(model)
    assert best is not None and best["step"] == 1
    assert torch.equal(weights(model), best_weights)


@pytest.mark.parametrize("newer", ["better", "worse"])
def test_what_is_called_the_best_is_what_is_restored(world, tmp_path: Path, newer: str):
    """Also where the best measurement came after the checkpoint that a killed run resumes from."""
    model, make, prompts = world
    scramble(model, 3)
    targets = make(model).search(prompts, 1, 50).items[:, 0]
    first = BeamValidation(tmp_path, make, prompts, targets, None)
    scramble(model, 1)
    first.measure(model, 1, 1.0)
    scramble(model, 3)
    first.measure(model, 2, 2.0)  # the best; killed before its checkpoint
    again = BeamValidation(tmp_path, make, prompts, targets, None)
    scramble(model, 3 if newer == "better" else 2)
    again.measure(model, 2, 2.0)
    scramble(model, 5)
    again.measure(model, 3, 3.0)
    best = again.restore_best(model)
    assert best is not None
    items = make(model).search(prompts, 10, 50).items
    restored = np.mean(
        [
            1 / np.log2(2 + list(row).index(t)) if t in row else 0
            for row, t in zip(items, targets, strict=True)
        ]
    )
    assert restored == pytest.approx(best["ndcg@10"], abs=1e-5)
    assert best["ndcg@10"] == max(e["ndcg@10"] for e in again.history)


def test_only_trainable_weights_are_kept(world, tmp_path: Path):
    from safetensors.torch import load_file

    model, make, prompts = world
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    BeamValidation(tmp_path, make, prompts, np.zeros(6, dtype=int), None).measure(model, 1, 1.0)
    assert list(load_file(tmp_path / "best.safetensors")) == ["model.norm.weight"]


def test_nothing_measured_nothing_restored(world, tmp_path: Path):
    model, make, prompts = world
    validation = BeamValidation(tmp_path, make, prompts, np.zeros(6, dtype=int), None)
    before = weights(model).clone()
    assert validation.restore_best(model) is None and torch.equal(weights(model), before)


def test_when_it_measures(world, tmp_path: Path):
    model, make, prompts = world

    def steps(main: bool = True, **options) -> list[int]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        validation = BeamValidation(folder, make, prompts, np.zeros(6, dtype=int), None, **options)
        state = SimpleNamespace(global_step=0, epoch=0.0, is_world_process_zero=main)
        args, control = SimpleNamespace(), SimpleNamespace()
        validation.on_train_begin(args, state, control, model=model)
        for step in range(1, 7):
            state.global_step, state.epoch = step, step / 3
            validation.on_step_end(args, state, control, model=model)
            if step % 3 == 0:
                validation.on_epoch_end(args, state, control, model=model)
        return [e["step"] for e in validation.history]

    assert steps() == [3, 6]
    assert steps(every_steps=2) == [2, 4, 6]
    assert steps(every_steps=4, at_start=True) == [0, 4]
    assert steps(main=False, at_start=True) == []
