r"""How much memory, time and money will lists for N users take? An estimate, before anything runs.

    genrec plan --model qwen3-0.6b --n_items 1000000 --n_users 10000000 --hardware h100-80
    genrec plan --run_dir runs/mine --hardware l4-24 --price_per_hour 0.8 --devices 4
    genrec plan --model models/mine --hardware own --tflops 150 --tflops_float32 40 \
        --bandwidth 900 --memory 48

`model` is a named shape or a folder with a Hugging Face config.json. With `run_dir` the model, the
semantic ids, the catalogue and the length of prompts (of validation rows) are that run's, and where
its lists were made, the rate that was measured stands beside the estimate. Formulae:
genrec/planning.py. CPU only, seconds; nothing is written.
"""

from dataclasses import dataclass, replace
from typing import Any

import polars as pl
from rich.table import Table

from genrec.artifacts import load_manifest, require, stage_folder
from genrec.columns import HISTORY
from genrec.config import check_choice, make_console, parse, run
from genrec.data.splits import read_split
from genrec.decoding.beam import default_beam_width
from genrec.modeling import encode_prompts, load_tokenizer
from genrec.normalizers import NORMALIZERS, declared_normalizer
from genrec.planning import (
    BYTES,
    HARDWARE,
    MEMORY_SHARE,
    SHAPES,
    Estimate,
    Hardware,
    ModelShape,
    Workload,
    estimate,
    find_shape,
)
from genrec.prompts import PromptRenderer
from genrec.semantic_ids import SemanticIds
from genrec.tasks.sequential import history_prompt

SAMPLE = 512  # validation rows whose prompts are measured


@dataclass
class PlanArgs:
    """Settings of plan."""

    run_dir: str | None = None  # a run, for all that isn't given here
    model: str | None = None  # a named shape, or a folder with config.json
    model_stage: str | None = None  # sft or grpo; default: grpo where it is complete
    k: int = 10
    beam_width: int | None = None  # default: the next of 50, 100, 200, … from 2k on
    codebook_sizes: list[int] | None = None  # one per level; default 256 256 256
    normalizer: str | None = None  # default: what the run's model declares, else full
    dtype: str = "bfloat16"
    prompt_tokens: float | None = None  # mean length; needed without a run
    n_items: int | None = None  # needed without a run
    n_users: int = 1_000_000
    hardware: str = "h100-80"  # a named device, or own (with the three below)
    memory: float | None = None  # GB, of one device
    bandwidth: float | None = None  # GB/s
    tflops: float | None = None  # peak in `dtype`, dense
    tflops_float32: float | None = None  # that in float32, in which the torch engine scores items
    price_per_hour: float | None = None  # of one device, in your currency
    devices: int = 1
    utilisation: float = 0.4  # share of the peaks that is reached; an assumption
    batch_size: int | None = None  # users decoded together; default the most that fit, up to 64
    engine: str = "torch"  # torch or vllm-inworker

    def __post_init__(self) -> None:
        """Reject settings that can't work."""
        if self.normalizer is not None:
            check_choice("normalizer", self.normalizer, NORMALIZERS)
        check_choice("dtype", self.dtype, BYTES)
        check_choice("hardware", self.hardware, (*HARDWARE, "own"))
        check_engine(self.engine)
        if self.model_stage is not None:
            check_choice("model_stage", self.model_stage, ("sft", "grpo"))
        for name in ("run_dir", "model"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty; name a folder, or leave --{name} out")
        if self.run_dir is None and self.model is None:
            raise ValueError(f"give --run_dir, or --model: a folder or one of {', '.join(SHAPES)}")
        if self.k < 1 or (self.beam_width is not None and self.beam_width < self.k):
            raise ValueError(f"k={self.k} must lie between 1 and beam_width={self.beam_width}")
        check_own_hardware(self)
        for name in ("prompt_tokens", "n_items", "n_users", "batch_size", "devices"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.price_per_hour is not None and not self.price_per_hour >= 0:
            raise ValueError(f"price_per_hour={self.price_per_hour} must be at least 0")


def check_engine(engine: str) -> None:
    """Reject an engine that the estimate is not for."""
    if engine == "vllm":
        raise ValueError(
            "engine=vllm makes a request of each beam and level, whose overhead decides its rate "
            "and no roofline tells; plan --engine vllm-inworker, or make lists for some users with "
            "it: --run_dir then shows the measured rate"
        )
    check_choice("engine", engine, ("torch", "vllm-inworker"))


def check_own_hardware(args: PlanArgs) -> None:
    """Reject a device of one's own without the peaks that the estimate needs."""
    if args.hardware != "own":
        return
    for name in ("memory", "bandwidth", "tflops"):
        if getattr(args, name) is None:
            raise ValueError(f"--hardware own needs --{name}")
    if args.engine == "torch" and args.dtype != "float32" and args.tflops_float32 is None:
        raise ValueError(
            f"--hardware own needs --tflops_float32: with {args.dtype} the torch engine still "
            "scores items in float32"
        )


def facts_of_run(args: PlanArgs) -> dict[str, Any]:
    """What the run knows: model, codebook sizes, items, mean tokens of a prompt."""
    if args.run_dir is None:
        return {}
    stage = args.model_stage or ("grpo" if load_manifest(args.run_dir, "grpo") else "sft")
    require(args.run_dir, stage)
    ids = SemanticIds.load(stage_folder(args.run_dir, "quantize"))
    folder = stage_folder(args.run_dir, stage) / "model"
    facts = {
        "model": str(folder),
        "codebook_sizes": ids.codebook_sizes,
        "n_items": ids.n_items,
        "normalizer": declared_normalizer(folder),
    }
    if args.prompt_tokens is not None:
        return facts
    rows = read_split(args.run_dir, "valid", "plan")
    rows = rows.sample(min(SAMPLE, len(rows)), seed=0)
    dataset, data = require(args.run_dir, "build_dataset"), require(args.run_dir, "prepare")
    renderer = PromptRenderer(stage_folder(args.run_dir, "build_dataset") / "prompts")
    template, sids = dataset.metrics["serving_template"], ids.sids()
    newest = rows.select(pl.col(HISTORY).list.tail(data.config["max_history"]))[HISTORY]
    prompts = [history_prompt(renderer, template, sids.gather(h).to_list()) for h in newest]
    tokens = encode_prompts(load_tokenizer(folder, ids)[0], prompts)
    return facts | {"prompt_tokens": sum(map(len, tokens)) / len(tokens)}


def make_hardware(args: PlanArgs) -> Hardware:
    """The named device with what was given instead."""
    device = HARDWARE.get(args.hardware) or Hardware(0, 0, {})
    if args.memory is not None:
        device = replace(device, memory=args.memory * 1e9)
    if args.bandwidth is not None:
        device = replace(device, bandwidth=args.bandwidth * 1e9)
    for dtype, peak in (("float32", args.tflops_float32), (args.dtype, args.tflops)):
        if peak is not None:
            device = replace(device, flops={**device.flops, dtype: peak * 1e12})
    return replace(device, price=args.price_per_hour)


def make_workload(args: PlanArgs, facts: dict[str, Any]) -> Workload:
    """What is asked of the model, from the settings and else from the run."""
    defaults = {"codebook_sizes": (256, 256, 256), "normalizer": "full"} | facts
    found: dict[str, Any] = {}
    for name in ("codebook_sizes", "normalizer", "prompt_tokens", "n_items"):
        value = getattr(args, name)
        found[name] = defaults.get(name) if value is None else value
    for name, value in found.items():
        if value is None:
            raise ValueError(f"--{name} is needed without --run_dir")
    return Workload(
        beam_width=default_beam_width(args.k) if args.beam_width is None else args.beam_width,
        n_users=args.n_users,
        dtype=args.dtype,
        # In vLLM's worker the full normaliser is that of all logits, in the model's dtype.
        head_columns="all"
        if args.engine != "torch" and found["normalizer"] == "full"
        else "needed",
        **found,
    )


def lines(
    args: PlanArgs, model: ModelShape, work: Workload, made: Estimate
) -> list[tuple[str, str]]:
    """What is printed: name and value."""
    each = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in made.per_user.items())
    many = f" x {args.devices}" if args.devices > 1 else ""
    cost = "set --price_per_hour" if made.cost is None else f"{made.cost:,.2f}"
    return [
        ("model", f"{model.parameters / 1e6:,.1f} M parameters, {args.dtype}"),
        (
            "work",
            f"{work.n_users:,} users, {work.prompt_tokens:,.0f} prompt tokens, B = "
            f"{work.beam_width}, {work.levels} levels, {work.n_items:,} items, scores over "
            f"{work.normalizer}",
        ),
        ("engine", args.engine),
        ("device", f"{args.hardware}{many}, {args.utilisation:.0%} of its peaks assumed"),
        ("weights", f"{made.weights / 1e9:,.2f} GB"),
        ("trie", f"{made.trie / 1e6:,.1f} MB at most"),
        ("per user", f"{sum(made.per_user.values()) / 1e6:,.1f} MB ({each})"),
        ("normaliser", f"{made.normaliser / 1e6:,.1f} MB a batch, for logits of the vocabulary"),
        ("largest batch", f"{made.largest_batch:,} users in {MEMORY_SHARE:.0%} of the memory"),
        ("per user", f"{made.flops_per_user / 1e9:,.2f} GFLOP"),
        (
            "rate",
            f"{made.users_per_s:,.1f} users/s a device, {made.batch} users a batch, limited by "
            f"{made.bound}",
        ),
        ("time", f"{made.hours:,.2f} hours"),
        ("cost", cost),
    ]


def measured(args: PlanArgs) -> str:
    """The rate of one process that made the run's own lists; else why there is none."""
    manifest = None if args.run_dir is None else load_manifest(args.run_dir, "recommend")
    rate = None if manifest is None else manifest.metrics.get("users_per_s")
    if manifest is None or not rate:
        return "no lists of this run were timed" if args.run_dir else "give --run_dir of a run"
    config = manifest.config
    return (
        f"{rate:,.1f} users/s a process, engine {config.get('engine')}, {config.get('dtype')}, B = "
        f"{config.get('beam_width')}, on {manifest.machine}; at that rate "
        f"{args.n_users / rate / 3600 / args.devices:,.2f} hours with {args.devices} "
        f"process{'es' if args.devices > 1 else ''}"
    )


def main() -> None:
    """Run the command."""
    args = parse(PlanArgs)
    facts = facts_of_run(args)
    model = find_shape(facts["model"] if args.model is None else args.model)
    work = make_workload(args, facts)
    made = estimate(
        model, work, make_hardware(args), args.utilisation, args.batch_size, args.devices
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in lines(args, model, work, made):
        table.add_row(name, value)
    console = make_console(width=100)
    console.print("Estimate (a roofline, nothing was run):")
    console.print(table)
    console.print(f"Measured: {measured(args)}")


if __name__ == "__main__":
    run(main)
