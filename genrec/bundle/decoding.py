"""``decoding.json`` of a bundle: how its model is served, checked before anything relies on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from genrec.artifacts import read_json
from genrec.normalizers import NORMALIZERS

DECODING = "decoding.json"
MODEL_STAGES = ("sft", "grpo")


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "normalizer": (lambda v: v in NORMALIZERS, f"must be one of {', '.join(NORMALIZERS)}"),
    "k": (_count, "must be an integer of at least 1"),
    "beam_width": (_count, "must be an integer of at least 1"),
    "filter_seen": (lambda v: isinstance(v, bool), "must be true or false"),
    "max_history": (_count, "must be an integer of at least 1"),
    "serving_template": (lambda v: isinstance(v, str) and v != "", "must name a template"),
    "model_stage": (lambda v: v in MODEL_STAGES, f"must be one of {', '.join(MODEL_STAGES)}"),
    "families": (_texts, "must be a list of names"),
    "trained_on_target": (
        lambda v: v is None or isinstance(v, bool),
        "must be true, false or null",
    ),
}


def read_decoding(folder: Path | str) -> dict[str, Any]:
    """Settings of serving of a bundle.

    Raises:
        ValueError: the file is missing or no JSON object, or a setting is missing or can't be.
    """
    path, fix = Path(folder) / DECODING, "restore it or export again"
    if not path.is_file():
        raise ValueError(f"{path} is missing; {fix}")
    decoding = read_json(path)
    if not isinstance(decoding, dict):
        raise ValueError(f"{path} holds no JSON object; {fix}")
    for name, (fits, rule) in _RULES.items():
        if name not in decoding:
            raise ValueError(f"{path} has no {name}; {fix}")
        if not fits(decoding[name]):
            raise ValueError(f"{path}: {name}={decoding[name]!r} {rule}; {fix}")
    if decoding["beam_width"] < decoding["k"]:
        raise ValueError(
            f"{path}: beam_width={decoding['beam_width']} must be at least k={decoding['k']}; {fix}"
        )
    return decoding
