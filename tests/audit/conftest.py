"""An explained and audited run, made by the recipes' mains around a random model."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

_shared = runpy.run_path(str(Path(__file__).resolve().parents[1] / "explain" / "conftest.py"))


def make_audited_run(tiny, run: Path, **shop) -> Path:
    """Stages prepare … audit; key and anchor beside the run."""
    where = ["--run_dir", str(_shared["make_listed_run"](tiny, run, **shop))]
    _shared["call_recipe"]("explain", *where, "--num_rows", "6", "--k", "5", "--samples", "50")
    _shared["call_recipe"]("audit", *where, "--report_users", "5", "--shard_size", "4")
    return run


def copy_run(run: Path, to: Path) -> Path:
    """A run with its custody folder, to be spoiled."""
    shutil.copytree(run.with_name(f"{run.name}.custody"), to.with_name(f"{to.name}.custody"))
    return shutil.copytree(run, to)


@pytest.fixture(scope="session")
def audited_run(tiny, tmp_path_factory) -> Path:
    """Of a shop with string ids, to be read only."""
    return make_audited_run(tiny, tmp_path_factory.mktemp("audited") / "run")


@pytest.fixture(scope="session")
def other_run(tiny, tmp_path_factory) -> Path:
    """Of another shop with integer ids, to be read only."""
    return make_audited_run(tiny, tmp_path_factory.mktemp("other") / "run", strings=False, seed=1)


@pytest.fixture
def copied(audited_run, tmp_path) -> Path:
    """The same run, to be spoiled."""
    return copy_run(audited_run, tmp_path / "run")
