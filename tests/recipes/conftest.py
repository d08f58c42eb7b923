"""One finished tiny run, made by the recipes as a user runs them."""

from __future__ import annotations

import io
import logging
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from genrec.cli import main

ROOT = Path(__file__).resolve().parents[2]
CPU = (
    "--use_cpu true --bf16 false --report_to none --disable_tqdm true "
    "--gradient_checkpointing false --seed 0 --eval_rows 40"
)
_FLAGS = {
    "prepare": "--format synthetic --n_users 120 --n_items 60",
    "embed": "--dim 16",
    "quantize": "--n_levels 3 --codebook_size 8",
    "build_dataset": "",
    "sft": f"{CPU} --size tiny --vocab_size 400 --max_steps 12 --learning_rate 3e-3 "
    "--per_device_train_batch_size 16 --eval_every_steps 6 --logging_steps 3 --save_steps 6",
    "grpo": f"{CPU} --max_steps 2 --num_generations 4 --per_device_train_batch_size 8 "
    "--beam_width 8 --eval_every_steps 2 --learning_rate 1e-4 --save_strategy no",
    "recommend": "--k 10 --beam_width 20 --shard_size 50",
    "evaluate": "--samples 50",
}
# Flags of each stage of `tiny_run`, in the order of the line.
TINY = {name: flags.split() for name, flags in _FLAGS.items()}

Recipe = Callable[..., subprocess.CompletedProcess[str]]


def environment() -> dict[str, str]:
    """Environment of a recipe: this checkout, offline, one thread."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("GENREC_DEBUG", None)
    return env


def command(name: str, run_dir: Path, *args: str) -> list[str]:
    """Command line of a recipe."""
    return [sys.executable, str(ROOT / "recipes" / f"{name}.py"), "--run_dir", str(run_dir), *args]


def as_if_alone(main: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    """What a program says and how it exits, without a process of its own, which would import long.

    Its log goes to its errors, as it would there.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    root, log = logging.getLogger(), logging.StreamHandler(err)
    log.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    around = dict(os.environ)  # libraries write into it, and later processes would inherit that
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.delenv("GENREC_DEBUG", raising=False)
        before = root.level
        root.setLevel(logging.INFO)
        root.addHandler(log)
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            root.removeHandler(log)
            root.setLevel(before)
            for name in os.environ.keys() - around.keys():
                del os.environ[name]
            os.environ.update(around)
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


def run_recipe(
    name: str, run_dir: Path, *args: str, fails: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a recipe to its end; `fails` says that it must refuse with one line and status 2."""
    done = as_if_alone(lambda: run_here(name, run_dir, *args))
    if fails:
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        assert [line[:7] for line in done.stderr.splitlines()].count("error: ") == 1, done.stderr
    else:
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """Runs a recipe as its command line does: ``recipe(name, run_dir, *flags, fails=False)``."""
    return run_recipe


@pytest.fixture(scope="session")
def genrec() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the ``genrec`` command on words, in this process."""

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["genrec", *words])
            return as_if_alone(main)

    return call


def run_here(name: str, run_dir: Path | None, *flags: str) -> None:
    """Run a recipe in this process; it exits as it would in one of its own."""
    path = ROOT / "recipes" / f"{name}.py"
    at = [] if run_dir is None else ["--run_dir", str(run_dir)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *at, *flags])
        runpy.run_path(str(path), run_name="__main__")


@pytest.fixture
def in_process(monkeypatch, capsys, caplog) -> Callable[..., str]:
    """Runs a recipe in this process, so that heavy imports are made once; gives all that it said.

    ``in_process(name, run_dir, *flags, fails=False)``; None: a recipe without a run folder.
    """

    def call(name: str, run_dir: Path | None, *flags: str, fails: bool = False) -> str:
        monkeypatch.delenv("GENREC_DEBUG", raising=False)
        caplog.clear()
        if fails:
            with pytest.raises(SystemExit) as stopped:
                run_here(name, run_dir, *flags)
            assert stopped.value.code == 2
        else:
            run_here(name, run_dir, *flags)
        said = capsys.readouterr()
        return said.out + said.err + caplog.text

    return call


@pytest.fixture(scope="session")
def recipe_command() -> Callable[..., tuple[list[str], dict[str, str]]]:
    """Command line and environment of a recipe, for tests that start it themselves."""
    return lambda name, run_dir, *args: (command(name, run_dir, *args), environment())


@pytest.fixture(scope="session")
def tiny_flags() -> dict[str, list[str]]:
    """Flags of each stage of `tiny_run`."""
    return TINY


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a whole run, from prepare to evaluate, on a shop of 120 users; read only."""
    folder = tmp_path_factory.mktemp("tiny_run") / "run"
    for name, flags in TINY.items():
        run_here(name, folder, *flags)
    return folder


@pytest.fixture
def copied_run(tiny_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies the named stage folders of `tiny_run`, so that a test may write into them."""

    def copy(*folders: str) -> Path:
        for name in folders:
            shutil.copytree(tiny_run / name, tmp_path / "run" / name)
        return tmp_path / "run"

    return copy
