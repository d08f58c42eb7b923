"""The moving average of the weights: its values, swapping, checkpoints."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from genrec.averaging import WeightAverage, trainable


def state(step: int, folder) -> tuple[SimpleNamespace, SimpleNamespace]:
    return (
        SimpleNamespace(output_dir=str(folder)),
        SimpleNamespace(global_step=step, is_world_process_zero=True),
    )


def call(average: WeightAverage, event: str, step: int, model: nn.Module, folder) -> None:
    args, at = state(step, folder)
    getattr(average, event)(args, at, None, model=model)


def test_it_follows_quickly_at_first_and_slowly_later(tmp_path):
    model, average = nn.Linear(1, 1, bias=False), WeightAverage(0.5)
    with torch.no_grad():
        model.weight.fill_(0.0)
    call(average, "on_train_begin", 0, model, tmp_path)
    expected = 0.0
    for step, value in enumerate((1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0), 1):
        with torch.no_grad():
            model.weight.fill_(value)
        call(average, "on_step_end", step, model, tmp_path)
        kept = min(0.5, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * value
        with average.applied(model):
            assert model.weight.item() == pytest.approx(expected, rel=1e-6)
        assert model.weight.item() == value
    assert kept == 0.5


def test_small_steps_are_not_rounded_away_in_16_bits(tmp_path):
    model, average = nn.Linear(1, 1, bias=False).to(torch.bfloat16), WeightAverage(0.999)
    with torch.no_grad():
        model.weight.fill_(1.0)
    call(average, "on_train_begin", 0, model, tmp_path)
    with torch.no_grad():
        model.weight.fill_(1.25)
    for step in range(10_000, 13_000):
        call(average, "on_step_end", step, model, tmp_path)
    with average.applied(model):
        assert model.weight.item() == pytest.approx(1.25 - 0.25 * 0.999**3000, abs=4e-3)
        assert model.weight.dtype == torch.bfloat16
    average.save(tmp_path)
    again = WeightAverage(0.999)
    (tmp_path / "checkpoint-7").mkdir()
    average.save(tmp_path / "checkpoint-7")
    call(again, "on_train_begin", 7, model, tmp_path)
    assert torch.equal(again._average["weight"], average._average["weight"])


def test_the_models_own_weights_come_back_after_an_error(tmp_path):
    model, average = nn.Linear(2, 2), WeightAverage(0.9)
    call(average, "on_train_begin", 0, model, tmp_path)
    with torch.no_grad():
        model.weight.add_(1.0)
    own = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="stopped"), average.applied(model):
        assert not torch.equal(model.weight, own)
        raise RuntimeError("stopped")
    assert torch.equal(model.weight, own)
    average.put_into(model)
    assert not torch.equal(model.weight, own)


def test_a_resumed_average_goes_on_where_it_was(tmp_path):
    model, average = nn.Linear(3, 2), WeightAverage(0.9)
    model.bias.requires_grad_(False)
    call(average, "on_train_begin", 0, model, tmp_path)
    with torch.no_grad():
        model.weight.mul_(3.0)
    call(average, "on_step_end", 1, model, tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    average.save(tmp_path / "checkpoint-1")
    again = WeightAverage(0.9)
    call(again, "on_train_begin", 1, model, tmp_path)
    other = nn.Linear(3, 2)
    other.bias.requires_grad_(False)
    again.put_into(other)
    average.put_into(model)
    assert torch.equal(model.weight, other.weight)
    assert set(trainable(model)) == {"weight"}  # frozen weights are not averaged
