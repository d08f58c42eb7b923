"""Validation during training: NDCG@k of constrained beam search on a sample of validation rows."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from genrec.artifacts import read_json, write_json
from genrec.averaging import WeightAverage, trainable
from genrec.columns import SEEN, TARGET, USER_ID
from genrec.decoding.beam import default_beam_width
from genrec.decoding.torch_engine import TorchEngine
from genrec.metrics import gains, hits, target_rank
from genrec.modeling import encode_prompts
from genrec.sharding import require_whole

logger = logging.getLogger(__name__)


class BeamValidation(TrainerCallback):
    """Measures the model as it will be served, and keeps the weights of the best measurement.

    Runs at the start (optional), at the end of each epoch, or every `every_steps` optimizer steps.
    The trainable parameters of the best one lie in ``best.safetensors`` beside ``validation.json``;
    an interrupted training goes on with both. With `log_to`, the trainer's log and its trackers
    (TensorBoard, …) get each measurement as ``eval_hr@10`` and ``eval_ndcg@10``.

    Args:
        folder: where they go.
        make_engine: builds an engine around the model in training.
        prompts: token ids of the validation prompts.
        targets: catalogue row of each target.
        seen: catalogue rows to leave out, per prompt, or None.
        k: list length of the metrics.
        every_steps: measure every so many steps instead of every epoch.
        at_start: measure before the first step, too.
        users: number of each prompt's user, where a user has several. ``# (prompts,)``
        average: measure, and keep, the average of the weights instead of the weights.
    """

    def __init__(
        self,
        folder: Path | str,
        make_engine: Callable[[Any], TorchEngine],
        prompts: list[list[int]],
        targets: np.ndarray,
        seen: list[np.ndarray] | None,
        k: int = 10,
        every_steps: int | None = None,
        at_start: bool = False,
        users: np.ndarray | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        self.folder, self.make_engine, self.average = Path(folder), make_engine, average
        self.prompts, self.targets, self.seen, self.k = prompts, np.asarray(targets), seen, k
        self.every_steps, self.at_start, self.users = every_steps, at_start, users
        self.seconds = 0.0  # that measuring took, of this process alone
        self.logs_now = False  # while the trainer's callbacks get a measurement
        self._trainer: Trainer | None = None
        path = self.folder / "validation.json"
        self.history: list[dict[str, Any]] = read_json(path) if path.exists() else []

    @classmethod
    def of_split(
        cls,
        folder: Path | str,
        make_engine: Callable[[Any], TorchEngine],
        tokenizer: PreTrainedTokenizerBase,
        rows: pl.DataFrame,
        prompts: pl.Series,
        n_rows: int,
        seed: int,
        filter_seen: bool,
        every_steps: int | None = None,
        at_start: bool = False,
        average: WeightAverage | None = None,
    ) -> BeamValidation:
        """Validate on a seeded sample of a split.

        Args:
            folder: as above.
            make_engine: as above.
            tokenizer: encodes the prompts.
            rows: the split's rows, with targets and seen items.
            prompts: their rendered prompts, row for row.
            n_rows: size of the sample.
            seed: of the sample.
            filter_seen: leave out the items that a user has, as recommend will.
            every_steps: as above.
            at_start: as above.
            average: as above.
        """
        sample = np.random.default_rng(seed).permutation(len(rows))[:n_rows]
        seen = [np.array(items) for items in rows[SEEN].gather(sample).to_list()]
        return cls(
            folder,
            make_engine,
            encode_prompts(tokenizer, prompts.gather(sample).to_list()),
            rows[TARGET].gather(sample).to_numpy(),
            seen if filter_seen else None,
            every_steps=every_steps,
            at_start=at_start,
            users=rows[USER_ID].gather(sample).rank("dense").to_numpy(),
            average=average,
        )

    def log_to(self, trainer: Trainer) -> None:
        """Log each measurement through a trainer, so that its trackers get it."""
        self._trainer = trainer

    def summary(self) -> dict[str, int | float]:
        """Size of the sample, how often it was measured, and how long that took.

        `best` is the best measurement; seconds are those since the last resumption.
        """
        return {
            "validation_rows": len(self.prompts),
            "measurements": len(self.history),
            "validation_seconds": round(self.seconds, 1),
        }

    def per_row(self, engine: TorchEngine) -> tuple[np.ndarray, np.ndarray]:
        """HR@k and NDCG@k of every validation row as `engine` ranks them. ``# (rows,)`` each."""
        items = engine.search(self.prompts, self.k, default_beam_width(self.k), self.seen).items
        rank = target_rank(items, self.targets)
        return hits(rank, self.k), gains(rank, self.k)

    def measure(self, model: nn.Module, step: int, epoch: float) -> dict[str, Any]:
        """Measure now; record the result and, if it is the best so far, the weights.

        Raises:
            ValueError: the model holds only shards of its weights.
        """
        require_whole(model, "validation")
        began = time.perf_counter()
        with self.average.applied(model) if self.average else nullcontext():
            entry = self._measure(model, step, epoch)
        self.seconds += time.perf_counter() - began
        return entry

    def _measure(self, model: nn.Module, step: int, epoch: float) -> dict[str, Any]:
        hit, gain = self.per_row(self.make_engine(model))
        entry = {
            "step": step,
            "epoch": round(epoch, 3),
            f"hr@{self.k}": float(np.mean(hit)),
            f"ndcg@{self.k}": float(np.mean(gain)),
        }
        metric = f"ndcg@{self.k}"
        best = max((e[metric] for e in self.history), default=-1.0)
        # A resumed run measures the steps behind its checkpoint again. A better entry of the lost
        # part stays: the kept weights may be its own.
        before = [e for e in self.history if e["step"] == step and e[metric] >= entry[metric]]
        others = [e for e in self.history if e["step"] != step]
        self.history = sorted([*others, *(before or [entry])], key=lambda e: e["step"])
        logger.info("validation: %s", entry)
        if entry[metric] > best:
            trained = {n: p.detach().cpu().contiguous() for n, p in trainable(model).items()}
            partial = self.folder / "best.safetensors.partial"
            save_file(trained, partial)
            partial.replace(self.folder / "best.safetensors")
        write_json(self.folder / "validation.json", self.history)
        return entry

    def restore_best(self, model: nn.Module) -> dict[str, Any] | None:
        """Put the best weights back into the model; None if nothing was measured."""
        path = self.folder / "best.safetensors"
        if not path.exists():
            return None
        parameters = trainable(model)
        saved = load_file(path)
        assert saved.keys() == parameters.keys(), "best.safetensors belongs to another model"
        with torch.no_grad():
            for name, value in saved.items():
                parameters[name].copy_(value)
        return max(self.history, key=lambda e: e[f"ndcg@{self.k}"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the untrained model, where asked for."""
        if self.at_start and state.global_step == 0:
            self._measure_now(state, control, kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure every `every_steps` steps."""
        if self.every_steps and state.global_step % self.every_steps == 0:
            self._measure_now(state, control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure at the end of an epoch."""
        if not self.every_steps:
            self._measure_now(state, control, kwargs["model"])

    def _measure_now(self, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        if not state.is_world_process_zero:
            return
        entry = self.measure(model, state.global_step, state.epoch or 0.0)
        if self._trainer is None:
            return
        logs = {f"eval_{name}": entry[name] for name in entry if name not in ("step", "epoch")}
        # The handler takes a log of its own for the one that is due at this step, which would then
        # be left out. And TRL's own `log` would mix the training metrics of the moment into ours.
        due, self.logs_now = control.should_log, True
        try:
            Trainer.log(self._trainer, logs)
        finally:
            control.should_log, self.logs_now = due, False
