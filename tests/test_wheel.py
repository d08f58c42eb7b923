"""The wheel works by itself: installed into an empty environment, used from an empty folder."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Bin folder of an environment that holds the wheel and, by a path file, its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("genrec-*.whl")
    venv.create(folder / "env", with_pip=False)
    site = next((folder / "env" / "lib").glob("python*/site-packages"))
    # Path files inside that folder are not followed, so an editable genrec there stays invisible.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = folder / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    subprocess.run([*install, str(wheel)], check=True)
    return python.parent


def test_wheel_runs_recipes_from_an_empty_folder(installed, tmp_path):
    def call(*args: str) -> str:
        command = [str(installed / "genrec"), *args]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [str(installed / "python"), "-c", "import genrec; print(genrec.__file__)"]
    path = subprocess.run(where, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert path.startswith(str(installed.parent)), "the wheel's package is the one that is tested"
    assert "build_dataset" in call("--help")
    sizes = ["--n_users", "60", "--n_items", "40"]
    configs = Path(path.strip()).parent / "bundled" / "recipes" / "configs" / "quickstart"
    run = ["--run_dir", "runs/a"]
    call("prepare", "--config", str(configs / "prepare.yaml"), *run, *sizes)
    call("embed", "--config", str(configs / "embed.yaml"), *run, "--dim", "8")
    call("quantize", "--config", str(configs / "quantize.yaml"), *run, "--codebook_size", "8")
    call("build_dataset", "--config", str(configs / "build_dataset.yaml"), *run)
    assert (tmp_path / "runs/a/dataset/manifest.json").is_file()
    assert (tmp_path / "runs/a/dataset/prompts/sequential/seen/01.jinja").is_file()


def test_unknown_command_is_refused(installed, tmp_path):
    command = [str(installed / "genrec"), "sfy"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "known: " in done.stderr and "sft" in done.stderr
