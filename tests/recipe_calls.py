"""Recipes called in the process of a test."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def run(name: str, run_dir: Path, *flags: object) -> None:
    """A recipe in this process, so that torch is imported once; its errors come out as they are."""
    path = str(RECIPES / f"{name}.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, "--run_dir", str(run_dir), *map(str, flags)])
        patch.setenv("GENREC_DEBUG", "1")
        runpy.run_path(path, run_name="__main__")
