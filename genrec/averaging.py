"""Exponential moving average of the weights: what is validated and served, beside what is trained.

The average of many noisy steps generalises better than the last of them (Polyak averaging; Izmailov
et al. 2018 give the picture), at the price of a second copy of the trainable weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

AVERAGE = "average.safetensors"


class WeightAverage(TrainerCallback):
    """Averages the trainable weights after each optimizer step.

    The trainer puts it into each checkpoint (`save`), from which a resumed training goes on.

    Early on the average follows quickly: of step t it keeps at most (1 + t) / (10 + t). It is kept
    in float32: a thousandth of a step would be rounded away in 16 bits.

    Args:
        decay: share of the average that a step keeps, in (0, 1). 0.999 averages some 1,000 steps.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._average: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from the weights, or from the checkpoint that the training goes on from."""
        parameters = trainable(kwargs["model"])
        if any(hasattr(p, "full_tensor") for p in parameters.values()):
            raise ValueError("ema_decay needs unsharded weights: leave it out with FSDP")
        self._average = {
            name: p.detach().to(torch.float32, copy=True) for name, p in parameters.items()
        }
        if state.global_step:
            assert args.output_dir is not None
            saved = load_file(Path(args.output_dir) / f"checkpoint-{state.global_step}" / AVERAGE)
            for name, value in self._average.items():
                value.copy_(saved[name])

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move towards the weights of this step."""
        step = state.global_step
        moved = 1 - min(self.decay, (1 + step) / (10 + step))
        parameters = trainable(kwargs["model"])
        values = [parameters[name].detach().float() for name in self._average]
        torch._foreach_lerp_(list(self._average.values()), values, moved)

    def save(self, folder: Path | str) -> None:
        """Write the average into a checkpoint's folder."""
        path = Path(folder) / AVERAGE
        partial = path.with_suffix(".partial")
        save_file(self._average, partial)
        partial.replace(path)

    @contextmanager
    @torch.no_grad()
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the average for weights; its own come back afterwards."""
        parameters = trainable(model)
        own = {name: parameters[name].detach().clone() for name in self._average}
        self.put_into(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in own.items():
                    parameters[name].copy_(value)

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Overwrite the model's weights by the average."""
        parameters = trainable(model)
        for name, value in self._average.items():
            parameters[name].copy_(value)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, without the prefixes of wrappers that aren't part of it."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[name.removeprefix("module.").removeprefix("_orig_mod.")] = parameter
    return found
