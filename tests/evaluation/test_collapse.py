"""When a training counts as collapsed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import TrainerControl, TrainerState

from genrec.artifacts import read_json
from genrec.evaluation.collapse import CollapseStop


def run(stop: CollapseStop, gains: list[float], every: int = 5) -> int | None:
    """Step at which a training with these measurements is stopped."""
    validation = SimpleNamespace(k=10, every_steps=every, history=[])
    stop.validation = cast(Any, validation)
    state, control = TrainerState(), TrainerControl()
    state.is_world_process_zero = True
    for step in range(every * len(gains)):
        state.global_step = step
        if step % every == 0:
            validation.history.append({"step": step, "ndcg@10": gains[step // every]})
        stop.on_step_end(cast(Any, None), state, control)
        if control.should_training_stop:
            return step
    return None


@pytest.mark.parametrize(
    ("gains", "stopped_at"),
    [
        ([0.10, 0.12, 0.11, 0.10, 0.095], None),
        ([0.10, 0.08, 0.08, 0.095, 0.08, 0.08], None),  # never three in a row
        ([0.10, 0.08, 0.05, 0.02, 0.01], 15),
        ([0.10, 0.20, 0.20, 0.089, 0.089, 0.089], 25),  # of the start, not of the best
        ([0.0, 0.0, 0.0, 0.0, 0.0], None),
    ],
)
def test_validation_below_its_start(tmp_path: Path, gains: list[float], stopped_at: int | None):
    stop = CollapseStop(tmp_path, None, tolerance=0.1, patience=3)
    assert run(stop, gains) == stopped_at
    assert (tmp_path / "stopped.json").exists() == (stopped_at is not None)
    if stopped_at is not None:
        written = read_json(tmp_path / "stopped.json")
        assert written == {"step": stopped_at, "reason": stop.reason}
        assert stop.reason and "below 0.09, 0.9 of its start 0.1" in stop.reason


def test_no_patience_never_stops(tmp_path: Path):
    assert run(CollapseStop(tmp_path, None, patience=0), [1.0, 0.0, 0.0, 0.0, 0.0]) is None


def test_entropy_collapses(tmp_path: Path):
    stop = CollapseStop(tmp_path, None, patience=2, entropy=0.1)
    state, control = TrainerState(), TrainerControl()
    state.is_world_process_zero = True
    for step, entropy in enumerate([1.0, 0.5, 0.09, 0.2, 0.09, 0.08]):
        state.global_step = step
        state.log_history += [{"step": step, "entropy": entropy}, {"step": step, "loss": 1.0}]
        stop.on_log(cast(Any, None), state, control)
        assert control.should_training_stop == (step == 5)
    assert stop.reason == "entropy of the policy 0.09, 0.08 below 0.1, 0.1 of its start 1"


@pytest.mark.parametrize("settings", [(-0.1, 3, 0.0), (1.1, 3, 0.0), (0.1, -1, 0.0), (0.1, 3, 1.0)])
def test_settings_that_cannot_be_used(tmp_path: Path, settings: tuple[float, int, float]):
    with pytest.raises(ValueError, match="stop_tolerance="):
        CollapseStop(tmp_path, None, *settings)
