"""Settings: what a typo, a wrong type or a missing file leads to."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors import SafetensorError
from trl import SFTConfig

from genrec.config import check_choice, dataset_path, parse, run, training_fingerprint

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    run_dir: str = "runs/default"
    overwrite: bool = False
    k: int = 10
    beam_width: int = 50
    rate: float = 0.5
    limit: int | None = None
    tasks: list[str] = field(default_factory=lambda: ["a", "b"])
    kind: str = "x"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("x", "y"))
        for task in self.tasks:
            check_choice("tasks", task, ("a", "b"))
        if not 1 <= self.k <= self.beam_width:
            raise ValueError(f"k={self.k} must lie between 1 and {self.beam_width}")


def yaml_file(folder: Path, text: str) -> list[str]:
    path = folder / "c.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_defaults_yaml_and_flags_in_that_order(tmp_path: Path):
    config = yaml_file(tmp_path, "k: 3\nrate: 2\noverwrite: true\ntasks: [b]\nlimit: 7\n")
    args = parse(Args, args=[*config, "--k", "4"])
    assert (args.k, args.rate, args.overwrite, args.tasks, args.limit) == (4, 2, True, ["b"], 7)
    assert (args.beam_width, args.kind) == (50, "x")
    assert parse(Args, args=["--tasks", "b", "a"]).tasks == ["b", "a"]
    assert parse(Args, args=[f"--config={config[1]}"]).k == 3
    assert parse(Args, args=[*config, "--limit", "2", "--overwrite", "false"]).overwrite is False


def test_unknown_key_in_yaml_with_a_suggestion(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"c.yaml has unknown keys: 'beam_widht' \(did you mean 'beam_width'\?\)"
    ):
        parse(Args, args=yaml_file(tmp_path, "beam_widht: 3\n"))


@pytest.mark.parametrize("flag", [["--beam_widht", "3"], ["--beam", "3"], ["stray"]])
def test_unknown_flag(flag: list[str]):
    with pytest.raises((ValueError, SystemExit)) as error:
        parse(Args, args=flag)
    assert flag[0].lstrip("-") in str(error.value) or error.value.code == 2


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("k: [1, 2]", ["k=[1, 2]", "int"]),
        ("k: 1.5", ["k=1.5", "int"]),
        ("k: true", ["k=True", "int"]),
        ("k:", ["k=None", "int"]),
        ("rate: [1]", ["rate=[1]", "float"]),
        ("overwrite: 3", ["overwrite=3", "bool"]),
        ("kind: 3", ["kind=3", "str"]),
        ("kind: {a: 1}", ["kind={'a': 1}", "str"]),
        ("tasks: a", ["tasks='a'", "list"]),
        ("tasks: [1]", ["tasks=[1]", "list"]),
        ("tasks: {a: b}", ["tasks={'a': 'b'}", "list"]),
        ("limit: 1.5", ["limit=1.5", "int"]),
    ],
)
def test_wrong_type_from_yaml(tmp_path: Path, text: str, parts: list[str]):
    with pytest.raises(ValueError) as error:
        parse(Args, args=yaml_file(tmp_path, text))
    assert all(part in str(error.value) for part in parts), error.value


def test_yaml_null_where_none_is_allowed(tmp_path: Path):
    assert parse(Args, args=yaml_file(tmp_path, "limit:")).limit is None


def test_wrong_choice_names_the_options(tmp_path: Path):
    with pytest.raises(ValueError, match="kind='z' is not known; choose one of x, y"):
        parse(Args, args=yaml_file(tmp_path, "kind: z"))


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text", "", "3"])
def test_yaml_that_is_no_mapping(tmp_path: Path, text: str):
    with pytest.raises(ValueError, match=r"c.yaml must hold `key: value` lines"):
        parse(Args, args=yaml_file(tmp_path, text))


def test_broken_missing_and_forgotten_yaml(tmp_path: Path):
    with pytest.raises(ValueError, match="is not valid YAML"):
        parse(Args, args=yaml_file(tmp_path, "a: [1"))
    with pytest.raises(ValueError, match=r"none.yaml does not exist"):
        parse(Args, args=["--config", "none.yaml"])
    with pytest.raises(ValueError, match="needs a YAML file"):
        parse(Args, args=["--config"])


def test_training_settings_are_parsed_beside_ours(tmp_path: Path):
    config = yaml_file(tmp_path, "k: 3\nlearning_rate: 1e-3\nuse_cpu: true\nbf16: false\n")
    args, training = parse(Args, SFTConfig, args=[*config, "--max_steps", "5"])
    assert (args.k, training.learning_rate, training.max_steps) == (3, 1e-3, 5)


def test_training_fingerprint_holds_what_changes_weights_alone():
    def fingerprint(**changes):
        return training_fingerprint(SFTConfig(use_cpu=True, bf16=False, **changes))

    base = fingerprint(output_dir="a")
    same = fingerprint(
        output_dir="b", logging_steps=3, save_steps=7, report_to="none", run_name="r"
    )
    assert same == base
    for change in ({"learning_rate": 1e-9}, {"seed": 5}, {"max_steps": 3}, {"weight_decay": 0.1}):
        assert fingerprint(output_dir="a", **change) != base, change


def test_dataset_lookup(tmp_path: Path, monkeypatch):
    data, flag, here = tmp_path / "data", tmp_path / "flag", tmp_path / "here"
    for folder in (data, flag, here):
        folder.mkdir()
    (data / "log.csv").write_text("")
    monkeypatch.chdir(here)
    monkeypatch.delenv("GENREC_DATA", raising=False)
    with pytest.raises(ValueError, match="log.csv not found .*set --data_dir or GENREC_DATA"):
        dataset_path("log.csv")
    monkeypatch.setenv("GENREC_DATA", str(data))
    assert dataset_path("log.csv") == data / "log.csv"
    with pytest.raises(ValueError, match="flag"):  # an explicit folder isn't widened silently
        dataset_path("log.csv", str(flag))
    (flag / "log.csv").write_text("")
    assert dataset_path("log.csv", str(flag)) == flag / "log.csv"
    (here / "log.csv").write_text("")
    assert dataset_path("log.csv").resolve() == here / "log.csv"
    assert dataset_path(str(data / "log.csv")) == data / "log.csv"
    with pytest.raises(ValueError, match="absent"):
        dataset_path("/absent/log.csv", str(flag))


def said_by_run(error: Exception, capsys, monkeypatch) -> str:
    """What a recipe tells its user about an error, with status 2."""
    monkeypatch.delenv("GENREC_DEBUG", raising=False)

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    return str(capsys.readouterr().err)


@pytest.mark.parametrize("error", [ValueError("k=3 is wrong"), FileNotFoundError("no such file")])
def test_run_ends_user_mistakes_with_one_line_and_status_2(error: Exception, capsys, monkeypatch):
    monkeypatch.delenv("GENREC_DEBUG", raising=False)

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"
    monkeypatch.setenv("GENREC_DEBUG", "1")
    with pytest.raises(type(error)):
        run(main)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "a/b"), "a/b can't be read or written (Perm"),
        (IsADirectoryError(21, "Is a directory", b"a"), "a can't be read or written (Is a dir"),
        (FileNotFoundError(2, "No such file", "x"), "x can't be read or written (No such file)"),
        (ImportError('needs Ray: pip install "genrec[ray]"'), 'needs Ray: pip install "genrec[r'),
    ],
)
def test_run_says_which_file_or_extra(error: Exception, said: str, capsys, monkeypatch):
    shown = said_by_run(error, capsys, monkeypatch)
    assert shown.startswith(f"error: {said}") and shown.count("\n") == 1


@pytest.mark.parametrize(
    "error", [KeyError("ours"), ImportError("cannot import name 'x'"), BrokenPipeError(32, "pipe")]
)
def test_run_keeps_the_traceback_of_a_defect(error: Exception):
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        run(main)


def test_a_recipe_ends_with_status_2_and_one_line(tmp_path: Path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("GENREC_DEBUG", None)
    config = yaml_file(tmp_path, "methd: lsa\n")
    command = [sys.executable, str(ROOT / "recipes" / "embed.py"), *config]
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [f"error: {config[1]} has unknown keys: 'methd' (did you mean 'method'?)"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "checkpoint-4/optimizer.pt"),
        # As safetensors and PyTorch say it.
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
    ids=["system", "quota", "safetensors", "torch"],
)
def test_run_says_that_the_disk_is_full(error: Exception, capsys, monkeypatch):
    said = said_by_run(error, capsys, monkeypatch)
    assert said.startswith("error: the disk is full") and said.count("\n") == 1
    assert "goes on at its last whole checkpoint" in said


def test_every_recipe_config_has_known_keys_only():
    """A renamed setting must not leave a shipped YAML behind."""
    import ast

    import yaml
    from trl import GRPOConfig

    trainers = {"sft": SFTConfig, "grpo": GRPOConfig}
    checked = 0
    for path in sorted((ROOT / "recipes" / "configs").glob("*/*.yaml")):
        recipe = ROOT / "recipes" / f"{path.stem}.py"
        if not recipe.exists():
            continue
        known = {
            node.target.id
            for node in ast.walk(ast.parse(recipe.read_text()))
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        known |= set(getattr(trainers.get(path.stem), "__dataclass_fields__", ()))
        assert set(yaml.safe_load(path.read_text())) <= known, path
        checked += 1
    assert checked >= 8
