"""`report_to`: trackers get the validation figures, too, and no training loss is lost for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("tensorboard")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value), from all event files below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((e.step, e.value) for e in events.Scalars(tag))
    return found


@pytest.mark.parametrize(("stage", "every", "steps"), [("sft", 3, [3, 6]), ("grpo", 2, [0, 2])])
def test_tensorboard_gets_the_validation(
    stage, every, steps, copied_run, in_process, tiny_flags, monkeypatch, tmp_path
):
    done = ["data", "embeddings", "semantic_ids", "dataset"] + ["sft"] * (stage == "grpo")
    run = copied_run(*done)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    flags = " ".join(tiny_flags[stage]).replace("--report_to none", "--report_to tensorboard")
    flags = flags.replace("--max_steps 12", "--max_steps 6")
    in_process(
        stage, run, *flags.split(), "--eval_every_steps", str(every), "--logging_steps", "1"
    )  # fmt: skip
    measured = json.loads((run / stage / "validation.json").read_text())
    assert [entry["step"] for entry in measured] == steps
    events = scalars(tmp_path / "events")
    for metric in ("hr@10", "ndcg@10"):
        wanted = [(entry["step"], entry[metric]) for entry in measured]
        assert [step for step, _ in events[f"eval/{metric}"]] == steps
        assert events[f"eval/{metric}"] == [(s, pytest.approx(v, abs=1e-6)) for s, v in wanted]
    log = json.loads((run / stage / "log.json").read_text())
    # Logging the validation must not swallow the training log of the same step.
    losses = [entry["step"] for entry in log if "loss" in entry]
    assert losses == list(range(1, steps[-1] + 1))
    assert [entry["step"] for entry in log if "eval_ndcg@10" in entry] == steps
    assert not any("loss" in entry for entry in log if "eval_ndcg@10" in entry)
    assert [step for step, _ in events["train/loss"]] == losses
    assert (run / stage / "curves.svg").stat().st_size > 1000
