"""The picture of a training that is drawn while it runs.

Apart from `curves.py`, which pages use too: a page must not cost the import of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from genrec.evaluation.curves import write_curves
from genrec.evaluation.validation import BeamValidation


class CurvesPicture(TrainerCallback):
    """Draws ``curves.svg`` after each validation and at the end of a training.

    Args:
        folder: the stage's.
        stage: "sft" or "grpo".
        validation: what measures; None draws at the end alone.
    """

    def __init__(self, folder: Path | str, stage: str, validation: BeamValidation | None) -> None:
        self.folder, self.stage, self.validation = Path(folder), stage, validation

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw if what was logged is a validation."""
        if self.validation is not None and self.validation.logs_now:
            self._draw(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the whole training."""
        self._draw(state)

    def _draw(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            measured = self.validation.history if self.validation else []
            write_curves(self.folder, self.stage, measured, state.log_history)
