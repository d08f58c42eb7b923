"""Every shipped YAML parses into the settings of its recipe, and opens with its launch command."""

import runpy
import sys
from pathlib import Path

import pytest
import yaml

from genrec.config import parse
from genrec.tasks.mixing import named_rows

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
    if path.parent.name in ("lora", "qlora"):  # the base model is named on the command line
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


ACCELERATE = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.stem)
def test_accelerate_config_loads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    command, hardware = path.read_text().splitlines()[:2]
    assert command.startswith(f"# accelerate launch --config_file recipes/accelerate/{path.name} ")
    assert hardware.startswith("# Hardware: ")


def launched(path: Path) -> dict[str, str]:
    """The environment that accelerate's launcher gives each process."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = ["--config_file", str(path), "x.py"]
    args, defaults, _ = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(arguments)
    )
    if not args.use_deepspeed:
        return prepare_multi_gpu_env(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(args)[1]


def test_fsdp2_config_becomes_its_plugin(monkeypatch):
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import StateDictType

    env = launched(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")
    assert env["ACCELERATE_USE_FSDP"] == "true" and env["ACCELERATE_MIXED_PRECISION"] == "bf16"
    monkeypatch.setattr("os.environ", env)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert not plugin.cpu_ram_efficient_loading


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_config_becomes_its_plugin(stage: int, monkeypatch):
    from accelerate.utils import DeepSpeedPlugin

    env = launched(ROOT / "recipes" / "accelerate" / f"deepspeed-zero{stage}.yaml")
    assert env["ACCELERATE_USE_DEEPSPEED"] == "true"
    monkeypatch.setattr("os.environ", env)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage and plugin.zero3_init_flag is False
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == stage
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"
    assert plugin.zero3_save_16bit_model == (stage == 3)


def test_parse_leaves_argv_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--nonsense", "1"])
    assert parse(*settings_types("embed"), args=[]).method == "lsa"


def test_the_stages_of_the_reasoning_config_name_the_families_that_are_built():
    folder = ROOT / "recipes" / "configs" / "reasoning"
    built = yaml.safe_load((folder / "build_dataset.yaml").read_text())["tasks"]
    settings = yaml.safe_load((folder / "sft.yaml").read_text())
    weights = named_rows("weights", settings["weights"])
    assert set(weights) == set(built)
    assert {len(row) for row in weights.values()} == {settings["num_train_epochs"]}
    assert settings["loss_over"] == "vocabulary"  # chains cite SIDs amid text
