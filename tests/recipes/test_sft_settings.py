"""Settings of sft that can't work are refused before any work."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "sft.py"


@pytest.fixture(scope="module")
def sft():
    return runpy.run_path(str(RECIPE))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_over": "catalogue"}, "loss_over"),
        ({"hidden_dropout": 1.0}, "hidden_dropout=1.0 must be at least 0 and below 1"),
        ({"ema_decay": -0.1}, "ema_decay=-0.1 must be"),
        ({"teachers": ["t"], "teacher_weight": 0.0}, "teacher_weight=0.0 must be above 0"),
        ({"teachers": ["t"], "teacher_weight": 1.1}, "teacher_weight=1.1 must be"),
        ({"loss_over": "trie", "normalizer": "full"}, "normalizer=full with loss_over=trie.*trie"),
        ({"loss_over": "level", "normalizer": "full"}, "use level or trie"),
        ({"loss_over": "trie", "normalizer": "level"}, "normalizer=level with loss_over=trie"),
        ({"model_name_or_path": "m", "dropout": 0.1}, "settings of a model from scratch"),
        ({"model_name_or_path": "m", "hidden_dropout": 0.1}, "settings of a model from scratch"),
    ],
)
def test_settings_that_cannot_work(sft, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        sft["SftArgs"](**settings)


def test_settings_that_can(sft):
    args = sft["SftArgs"](loss_over="level", normalizer="trie", hidden_dropout=0.3, ema_decay=0.999)
    assert (args.loss_over, args.normalizer, args.hidden_dropout) == ("level", "trie", 0.3)
    assert sft["SftArgs"](loss_over="trie", normalizer="auto").ema_decay == 0.0


def test_chains_are_learned_over_the_vocabulary_alone(sft):
    check = sft["check_families"]
    counts = [{"sequential": 10}, {"sequential": 10, "reasoning_evidence": 3}]
    check("vocabulary", counts)
    check("trie", [{"sequential": 10, "reasoning_evidence": 0, "title_to_sid": 4}])
    with pytest.raises(ValueError, match="loss_over=trie with reasoning_evidence: chains cite"):
        check("trie", counts)
