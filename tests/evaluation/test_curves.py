"""The picture of a training: what it shows, and that it can't hurt."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from genrec.evaluation import curves
from genrec.evaluation.curves import training_curves, write_curves
from genrec.evaluation.training_picture import CurvesPicture

VALIDATION = [
    {"step": step, "epoch": step / 10, "hr@10": 0.1 + step / 1000, "ndcg@10": 0.05 + step / 2000}
    for step in (10, 20, 30)
]
LOG = [
    {"step": step, "loss": 5 / step, "learning_rate": 1e-5 / step, "epoch": step / 10}
    for step in range(1, 31)
]


def words(path: Path) -> list[str]:
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    return [e.text or "" for e in root.iter() if e.tag.endswith("text")]


def test_what_is_drawn():
    log = [*LOG, {"step": 31, "loss": math.nan}, {"step": 32, "loss": math.inf, "epoch": 3.2}]
    found = {curve.key: curve for curve in training_curves(VALIDATION, log)}
    assert list(found) == ["validation", "loss", "learning-rate"]
    assert dict(found["validation"].points["ndcg@10"]) == pytest.approx(
        {10: 0.055, 20: 0.06, 30: 0.065}
    )
    assert found["loss"].points["loss"] == [(step, 5 / step) for step in range(1, 31)]
    assert found["loss"].left_out == 2 and found["learning-rate"].left_out == 0
    assert training_curves([], [{"step": 1, "loss": math.nan}]) == []


def test_rewards_share_a_panel():
    log = [
        {"step": 1, "reward": 0.3, "rewards/rule/mean": 0.2, "rewards/rule/std": 9.0,
         "rewards/rank/mean": 0.1, "entropy": 2.0, "loss": 0.0}
    ]  # fmt: skip
    found = {curve.key: curve for curve in training_curves([], log)}
    assert list(found) == ["reward", "rewards", "entropy", "loss"]
    assert found["rewards"].points == {"rule": [(1, 0.2)], "rank": [(1, 0.1)]}


def test_what_watches_a_reinforcement_learning_has_panels():
    log = [
        {"step": 1, "hits_per_group": 0.3, "groups_without_hit": 0.7, "zero_advantage": 0.6,
         "invalid": 0.0, "entropy": 2.0, "level_entropy/1": 3.0, "level_entropy/2": 1.0,
         "valid_mass/1": 0.9, "valid_mass/2": 0.8}
    ]  # fmt: skip
    found = {curve.key: curve for curve in training_curves([], log)}
    assert list(found) == ["hits-per-group", "groups-without-hit", "zero-advantage", "entropy",
        "level-entropy", "valid-mass", "invalid"]  # fmt: skip
    assert found["level-entropy"].points == {"level 1": [(1, 3.0)], "level 2": [(1, 1.0)]}
    assert found["valid-mass"].points == {"level 1": [(1, 0.9)], "level 2": [(1, 0.8)]}


def test_the_picture_stands_by_itself(tmp_path: Path):
    path = write_curves(tmp_path, "sft", VALIDATION, [*LOG, {"step": 31, "loss": math.nan}])
    assert path == tmp_path / "curves.svg"
    shown = words(path)
    for text in ("Supervised fine-tuning", "Validation metrics", "NDCG@10", "Learning rate",
        "Training loss (1 value is not finite)"):  # fmt: skip
        assert text in shown
    assert "1e−5" in shown and not any("0.00000" in text for text in shown)
    text = path.read_text(encoding="utf-8")
    assert "var(" not in text and "<script" not in text and "NaN" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["curves.svg"]
    before = path.read_bytes()
    write_curves(tmp_path, "sft", VALIDATION, [*LOG, {"step": 31, "loss": math.nan}])
    assert path.read_bytes() == before


def test_one_point_has_whole_steps(tmp_path: Path):
    path = write_curves(tmp_path, "sft", VALIDATION[:1], [])
    assert path is not None
    steps = [text for text in words(path) if text in ("9", "10", "11")]
    assert steps == ["9", "10", "11"]


def test_names_are_text(tmp_path: Path):
    log = [{"step": 1, "rewards/<script>alert(1)</script>/mean": 1.0}]
    path = write_curves(tmp_path, "<b>&", [], log)
    assert path is not None and "<script" not in path.read_text() and "<b>&" in words(path)


def test_a_failing_picture_is_a_warning(tmp_path: Path, monkeypatch, caplog):
    def full_disk(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(curves, "write_text", full_disk)
    picture = CurvesPicture(tmp_path, "sft", None)
    state = TrainerState(log_history=LOG, is_world_process_zero=True)
    with caplog.at_level(logging.WARNING):
        picture.on_train_end(TrainingArguments(str(tmp_path)), state, TrainerControl())
    assert "not drawn" in caplog.text and "no space left" in caplog.text
    assert not (tmp_path / "curves.svg").exists()


@pytest.mark.parametrize("main", [True, False])
def test_one_process_draws(tmp_path: Path, main: bool):
    picture = CurvesPicture(tmp_path, "grpo", None)
    state = TrainerState(log_history=LOG, is_world_process_zero=main)
    picture.on_train_end(TrainingArguments(str(tmp_path)), state, TrainerControl())
    assert (tmp_path / "curves.svg").exists() == main


def test_pages_load_neither_torch_nor_transformers():
    """They would cost an evaluation many seconds before its first line."""
    code = (
        "import sys, genrec.evaluation.pages, genrec.evaluation.suite;"
        "sys.exit(str({'torch', 'transformers'} & set(sys.modules)).replace('set()', ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "", done.stderr
