"""Every shipped YAML parses into the settings of its recipe, and opens with its launch command."""

import runpy
import sys
from pathlib import Path

import pytest
import yaml

from genrec.config import parse

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*/*.yaml"))
TRAINERS = {"sft": "SFTConfig", "grpo": "GRPOConfig"}


def settings_types(stage: str) -> list[type]:
    """The dataclasses that a recipe parses."""
    module = runpy.run_path(str(ROOT / "recipes" / f"{stage}.py"))
    own = [v for k, v in module.items() if k.endswith("Args")]
    own = [
        v for v in own if hasattr(v, "__dataclass_fields__") and "run_dir" in v.__dataclass_fields__
    ]
    assert len(own) == 1
    return own + ([module[TRAINERS[stage]]] if stage in TRAINERS else [])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_config_parses(path, tmp_path):
    types = settings_types(path.stem)
    extra = ["--output_dir", str(tmp_path)] if path.stem in TRAINERS else []
    if path.parent.name == "lora":  # the base model is named on the command line
        extra += ["--model_name_or_path", "some/model", "--use_cpu", "true"]
    parsed = parse(*types, args=["--config", str(path), *extra])
    first = parsed[0] if isinstance(parsed, tuple) else parsed
    for key, value in yaml.safe_load(path.read_text()).items():
        if hasattr(first, key):
            assert getattr(first, key) == value


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_config_says_how_to_run_it(path):
    head = path.read_text().splitlines()[:3]
    command = head[0]
    assert command.startswith("# ")
    assert path.relative_to(ROOT).as_posix() in command
    assert f"genrec {path.stem} " in command or f"recipes/{path.stem}.py " in command
    assert any("Hardware:" in line for line in head)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")))
def test_accelerate_config_loads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1


def test_parse_leaves_argv_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--nonsense", "1"])
    assert parse(*settings_types("embed"), args=[]).method == "lsa"
