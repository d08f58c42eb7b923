"""Over what a model's scores are normalised: declared once with the model, the same everywhere.

A score is the log-probability of an item's SID tokens. "full" divides by the whole vocabulary at
each level and is the model's true conditional, "level" divides by the level's codes, "trie" by the
codes that continue to an item of the catalogue. The three can order items differently, so a model
folder says which one it was chosen or trained for, and rollouts, validation, lists, evidence and
replay follow it. Another one can be asked for; then the log and the manifest say so.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from genrec.artifacts import ABOUT, read_json

logger = logging.getLogger(__name__)

Normalizer = Literal["full", "level", "trie"]
NORMALIZERS: tuple[Normalizer, ...] = ("full", "level", "trie")


def declared_normalizer(model_dir: Path | str) -> Normalizer:
    """The normaliser that a model declares in its ``genrec.json``.

    Models that were saved before there was a declaration were measured and served under "full".

    Args:
        model_dir: folder of the model.

    Raises:
        ValueError: the folder holds no genrec model, or its declaration is none that exists.
    """
    path = Path(model_dir) / ABOUT
    if not path.exists():
        raise ValueError(
            f"{model_dir} has no {ABOUT}: it is not a model that genrec trained; run sft first"
        )
    about = read_json(path)
    if not isinstance(about, dict):
        raise ValueError(f"{path} is damaged; restore it or rerun the model's stage")
    declared = about.get("normalizer", "full")
    if declared not in NORMALIZERS:
        raise ValueError(
            f"{path} declares normalizer {declared!r}, which is none of {', '.join(NORMALIZERS)}; "
            "restore the file or rerun the model's stage"
        )
    return declared


def mismatch(asked: str, declared: str) -> str | None:
    """What to say where scores are taken over something else than the model declares."""
    if asked == declared:
        return None
    return (
        f"scores are normalised over {asked}, the model declares {declared}: lists can differ from "
        "those that it was validated with"
    )


def resolve_normalizer(asked: Normalizer | None, model_dir: Path | str) -> Normalizer:
    """`asked`, or where that is None what the model declares; a difference is logged.

    Raises:
        ValueError: as `declared_normalizer`.
    """
    declared = declared_normalizer(model_dir)
    if asked is None:
        return declared
    if warning := mismatch(asked, declared):
        logger.warning("%s (%s)", warning, model_dir)
    return asked
