"""The whole line: every stage whose config lies in a folder, in order; what is done is skipped.

    genrec pipeline --configs quickstart --run_dir runs/quickstart
    genrec pipeline --configs my/configs --run_dir runs/mine --accelerate_args "--num_processes 4"
    genrec pipeline --configs beauty --run_dir runs/beauty --seeds 0 1 2

Each stage that is left to do is the recipe of its name in a process of its own. Killed and started
again, the line goes on where it stopped. Ends with one user's list and reasons, the metrics table
and the report page. With `--seeds` the models are trained once per seed in `<run_dir>/seed-<n>`, on
the same data and semantic ids, and compared as one system in `<run_dir>/comparison`.
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from genrec.artifacts import FOLDERS, MANIFEST, load_manifest, read_json, read_shards, stage_folder
from genrec.chains import Chain, read_chains
from genrec.columns import (
    HISTORY,
    ITEM_ID,
    RANK,
    ROW_ID,
    SCORE,
    TARGET_POSITION,
    TITLE,
    USER_ID,
)
from genrec.config import check_choice, parse, run
from genrec.data.splits import read_split

RECIPES = Path(__file__).resolve().parent
TRAINING = ("sft", "grpo")


@dataclass
class PipelineArgs:
    """Settings of the pipeline."""

    configs: str = "quickstart"  # a folder of <stage>.yaml, or a name below recipes/configs
    run_dir: str = "runs/quickstart"
    engine: str | None = None  # torch, vllm or vllm-inworker; default: what recommend.yaml says
    until: str | None = None  # stop after this stage
    overwrite_from: str | None = None  # redo this stage and all behind it; old folders are kept
    data_dir: str | None = None  # where relative dataset paths start; else here, then $GENREC_DATA
    accelerate_args: str | None = None  # launch sft and grpo by `accelerate launch <these>`
    seeds: list[int] | None = None  # training seeds: a run each, then a comparison of all

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is run."""
        if self.engine is not None:
            check_choice("engine", self.engine, ("torch", "vllm", "vllm-inworker"))
        if self.until is not None:
            check_choice("until", self.until, FOLDERS)
        if self.overwrite_from is not None:
            check_choice("overwrite_from", self.overwrite_from, FOLDERS)
        if self.seeds is not None and (not self.seeds or len(set(self.seeds)) < len(self.seeds)):
            raise ValueError(f"seeds={self.seeds} must be distinct, at least one")


def main() -> None:
    """Run the stages and show the result."""
    args = parse(PipelineArgs)
    folder = next(
        (f for f in (Path(args.configs), RECIPES / "configs" / args.configs) if f.is_dir()), None
    )
    if folder is None:
        known = sorted(f.parent.name for f in (RECIPES / "configs").glob("*/prepare.yaml"))
        raise ValueError(f"configs={args.configs!r} is no folder; shipped ones: {', '.join(known)}")
    stages = [stage for stage in FOLDERS if (folder / f"{stage}.yaml").is_file()]
    if args.until is not None:
        order = list(FOLDERS)
        stages = [s for s in stages if order.index(s) <= order.index(args.until)]
    if not stages:
        raise ValueError(f"{folder} holds no <stage>.yaml; the stages are {', '.join(FOLDERS)}")
    if args.seeds is not None and "sft" not in stages:
        raise ValueError(f"--seeds are for training, and {folder} holds no sft.yaml before the end")
    for stage in stages:  # a typo in the last file must not show after hours in the first stages
        check_config(stage, folder / f"{stage}.yaml")
    console = Console()
    whole = Path(args.run_dir)
    runs = [(whole, None)] if args.seeds is None else [(whole / f"seed-{n}", n) for n in args.seeds]
    for run_dir, seed in runs:
        if run_dir != runs[0][0]:
            take_over(runs[0][0], run_dir, stages)
        for number, stage in enumerate(stages, 1):
            label = "" if seed is None else f" (seed {seed})"
            console.rule(f"[bold]{number}/{len(stages)} {stage}{label}", align="left")
            run_stage(replace(args, run_dir=str(run_dir)), stage, folder / f"{stage}.yaml", seed)
    show(runs[0][0], console)
    if len(runs) > 1 and "evaluate" in stages:
        compare_runs([run_dir for run_dir, _ in runs], whole / "comparison")


def take_over(first: Path, run_dir: Path, stages: list[str]) -> None:
    """Give a run the first one's data and semantic ids: only training differs between seeds."""
    for stage in stages:
        source, target = stage_folder(first, stage), stage_folder(run_dir, stage)
        if stage in TRAINING:
            return
        if not (target / MANIFEST).exists():
            partial = target.with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)


def compare_runs(run_dirs: list[Path], folder: Path) -> None:
    """Run `compare` over the seeds; an earlier comparison is set aside."""
    if folder.exists():
        number = 1
        while (old := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(old)
    name = read_json(stage_folder(run_dirs[0], "evaluate") / "metrics.json")["reference"]
    command = [sys.executable, "-P", str(RECIPES / "compare.py"), "--output_dir", str(folder)]
    code = subprocess.run([*command, "--systems", *(f"{name}={d}" for d in run_dirs)]).returncode
    if code:
        raise SystemExit(code)


def check_config(stage: str, config: Path) -> None:
    """Parse a stage's YAML as the stage will, so that a mistake in it is found before any work."""
    recipe = runpy.run_path(str(RECIPES / f"{stage}.py"))
    types = [
        kind
        for name, kind in recipe.items()
        if isinstance(kind, type)
        and is_dataclass(kind)
        and (name.endswith("Args") or name in ("SFTConfig", "GRPOConfig"))
    ]
    try:
        parse(*types, args=["--config", str(config)])
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from error


def run_stage(args: PipelineArgs, stage: str, config: Path, seed: int | None = None) -> None:
    """Run one recipe; its failure ends the pipeline with its own message."""
    recipe = str(RECIPES / f"{stage}.py")
    flags = ["--config", str(config), "--run_dir", args.run_dir]
    if stage in TRAINING and seed is not None:
        flags += ["--seed", str(seed)]
    if stage == "recommend" and args.engine:
        flags += ["--engine", args.engine]
    order = list(FOLDERS)
    overwrite = args.overwrite_from and order.index(stage) >= order.index(args.overwrite_from)
    if overwrite:
        flags += ["--overwrite", "true"]
    if stage in ("prepare", "embed", "quantize") and args.data_dir:
        flags += ["--data_dir", args.data_dir]
    started = time.perf_counter()
    if (stage_folder(args.run_dir, stage) / MANIFEST).exists() and not overwrite:
        code = skip(recipe, flags)
    else:
        command = [sys.executable, "-P"]  # recipes must not shadow modules of the same name
        if stage in TRAINING and args.accelerate_args:
            command += ["-m", "accelerate.commands.launch", *shlex.split(args.accelerate_args)]
        # The other output is the progress bars and tables of the stage itself.
        unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
        code = subprocess.run([*command, recipe, *flags], env=unbuffered).returncode
    if code:
        sys.stderr.write(f"error: stage {stage} failed; mend it and run the same command again\n")
        raise SystemExit(code)
    sys.stdout.write(f"[{stage}: {time.perf_counter() - started:.0f} s]\n")
    sys.stdout.flush()


def skip(recipe: str, flags: list[str]) -> int:
    """Exit status of a complete stage, which says so or refuses other settings, here.

    It does no work, and in a process of its own it would import for seconds to say it.
    """
    own = sys.argv
    sys.argv = [recipe, *flags]
    try:
        runpy.run_path(recipe, run_name="__main__")
    except SystemExit as stopped:
        return int(stopped.code or 0)
    finally:
        sys.argv = own
    return 0


def show(run_dir: Path, console: Console) -> None:
    """Print what the run came to: times, one user's list with reasons, metrics, the report."""
    manifests = {stage: load_manifest(run_dir, stage) for stage in FOLDERS}
    console.rule("[bold]result", align="left")
    seconds = [f"{stage} {m.seconds:.0f} s" for stage, m in manifests.items() if m]
    console.print("Times: " + ", ".join(seconds), highlight=False)
    if recommend := manifests["recommend"]:
        show_list(run_dir, recommend.config["split"], console)
    if manifests["evaluate"]:
        show_metrics(run_dir, console)
    report = stage_folder(run_dir, "audit") / "report.html"
    page = stage_folder(run_dir, "evaluate") / "report.html"
    if manifests["evaluate"] and page.exists():
        console.print(Text(f"\nEvaluation page: {page}", style="bold"))
    if manifests["audit"] and report.exists():
        console.print(Text(f"Report page: {report}", style="bold"))


def show_list(run_dir: Path, split: str, console: Console) -> None:
    """One user's recommendations with titles and, where there is one, the reason for each."""
    lists = read_shards(stage_folder(run_dir, "recommend"), "recommendations")
    chains_path = stage_folder(run_dir, "explain") / "chains.jsonl"
    chains = read_chains(chains_path) if chains_path.exists() else []
    row_id = chains[0].row_id if chains else lists[ROW_ID][0]
    reasons = {chain.item_id: chain for chain in chains if chain.row_id == row_id}
    data = stage_folder(run_dir, "prepare")
    catalog = pl.read_parquet(data / "catalog.parquet", glob=False)
    titles = dict(catalog.select(ITEM_ID, TITLE).iter_rows())
    user = lists.filter(pl.col(ROW_ID) == row_id).sort(RANK)
    user_id = user[USER_ID][0]
    row = read_split(run_dir, split, "pipeline").filter(pl.col(ROW_ID) == row_id)
    history = row[HISTORY].item().to_list()
    had = row[TARGET_POSITION].item()
    console.print()
    console.print(Text(f"User {user_id} had {had} items, the last ones:", style="bold"))
    for item in history[-5:]:
        console.print(Text(f"  · {catalog[TITLE][item]}"))
    table = Table(title=Text(f"recommended to {user_id}"), title_justify="left", box=None)
    for name in ("#", "item", "score", "why"):
        table.add_column(name, justify="right" if name in ("#", "score") else "left")
    for item_id, rank, score in user.select(ITEM_ID, RANK, SCORE).iter_rows():
        why = reason(reasons[item_id], titles) if item_id in reasons else ""
        # Text, not markup: titles are other people's.
        table.add_row(str(rank), Text(titles[item_id]), f"{score:.2f}", Text(why))
    console.print(table)


def reason(chain: Chain, titles: dict[Any, str]) -> str:
    """The history items that speak most for a recommendation, as measured by leaving them out."""
    if not chain.cited_item_ids:
        return "no item of the history speaks for it"
    return "; ".join(titles[item] for item in chain.cited_item_ids[:2])


def show_metrics(run_dir: Path, console: Console) -> None:
    """The metrics table as evaluate stored it."""
    results = read_json(stage_folder(run_dir, "evaluate") / "metrics.json")
    systems = results["systems"]
    # What fits a terminal; metrics.json has the rest.
    columns = [c for c in next(iter(systems.values())) if c.startswith(("HR@", "NDCG@"))]
    rule = "seen items left out" if results["filter_seen"] else "seen items allowed"
    title = f"{results['dataset']}, {results['split']}: {results['rows']:,} rows, {rule}"
    table = Table(title=Text(title), title_justify="left", box=None)
    table.add_column("system", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    best = {c: max(systems[s][c]["value"] for s in systems) for c in columns}
    for system, values in systems.items():
        cells = []
        for column in columns:
            value, low, high = (values[column].get(key) for key in ("value", "low", "high"))
            text = f"{value:.4f}" + (f" ±{(high - low) / 2:.3f}" if low is not None else "")
            cells.append(Text(text, style="bold" if value == best[column] else ""))
        table.add_row(Text(system), *cells)
    console.print()
    console.print(table)


if __name__ == "__main__":
    run(main)
