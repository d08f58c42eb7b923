"""Stops a reinforcement learning that has collapsed; the best model stays what it was."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from genrec.artifacts import write_json
from genrec.evaluation.validation import BeamValidation

logger = logging.getLogger(__name__)

STOPPED = "stopped.json"


class CollapseStop(TrainerCallback):
    """Ends a training that only gets worse, and writes ``stopped.json`` with the reason.

    Two signs, each for `patience` values in a row: validation NDCG@k below (1 − tolerance) times
    the first measurement, and the policy's mean entropy over the trie below `entropy` times the
    first one that was logged. Both are read from what is recorded anyway, so a resumed training
    goes on counting. `BeamValidation` has kept the weights of the best measurement.

    Add it behind the validation whose measurements it reads.

    Args:
        folder: of the stage.
        validation: what measures; None: entropy alone is watched.
        tolerance: part of the start's NDCG that may be lost, in [0, 1].
        patience: values in a row; 0 never stops.
        entropy: part of the start's entropy that must be left, in [0, 1).

    Attributes:
        reason: why it stopped; None if it did not.
    """

    def __init__(
        self,
        folder: Path | str,
        validation: BeamValidation | None,
        tolerance: float = 0.1,
        patience: int = 3,
        entropy: float = 0.02,
    ) -> None:
        self.check(tolerance, patience, entropy)
        self.folder, self.validation = Path(folder), validation
        self.tolerance, self.patience, self.entropy = tolerance, patience, entropy
        self.reason: str | None = None

    @staticmethod
    def check(tolerance: float, patience: int, entropy: float) -> None:
        """Raise ValueError for settings that can't be used."""
        if not 0 <= tolerance <= 1 or not 0 <= entropy < 1 or patience < 0:
            raise ValueError(
                f"stop_tolerance={tolerance} must lie in [0, 1], stop_entropy={entropy} in "
                f"[0, 1), and stop_patience={patience} must be 0 or more"
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Look at the validation, where one is due."""
        if self.validation is None or not self.patience or not self.validation.every_steps:
            return
        if state.global_step % self.validation.every_steps:
            return
        metric = f"ndcg@{self.validation.k}"
        values = [float(entry[metric]) for entry in self.validation.history]
        reason = self._low(values, 1 - self.tolerance, f"validation {metric}")
        # Only the main process measures; all have to stop together.
        (reason,) = broadcast_object_list([reason])
        self._stop(reason, state, control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Look at the entropy, which is the same in every process."""
        if not self.patience:
            return
        logged = [float(e["entropy"]) for e in state.log_history if e.get("entropy") is not None]
        self._stop(self._low(logged, self.entropy, "entropy of the policy"), state, control)

    def _low(self, values: Sequence[float], share: float, name: str) -> str | None:
        """Why to stop, if the last values all lie below a share of the first."""
        if len(values) <= self.patience:
            return None
        floor, last = share * values[0], values[-self.patience :]
        if not all(value < floor for value in last):
            return None
        shown = ", ".join(f"{value:.4g}" for value in last)
        return f"{name} {shown} below {floor:.4g}, {share:.4g} of its start {values[0]:.4g}"

    def _stop(self, reason: str | None, state: TrainerState, control: TrainerControl) -> None:
        if reason is None or self.reason is not None:
            return
        self.reason, control.should_training_stop = reason, True
        logger.warning("the training collapsed and stops at step %d: %s", state.global_step, reason)
        if state.is_world_process_zero:
            write_json(self.folder / STOPPED, {"step": state.global_step, "reason": reason})
