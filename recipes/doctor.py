"""Is this run healthy? Search, levels, prompts, fit, diversity and files, each with a verdict.

    genrec doctor --run_dir runs/quickstart

Examines a seeded sample of validation rows (never test), prints what was found, worst first, and
writes ``doctor.json`` into the run folder. Ends with status 1 if something is bad. What can't be
examined yet is named, never passed over.
"""

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from genrec.artifacts import FOLDERS, MANIFEST, require, stage_folder, write_json
from genrec.columns import HISTORY, TRAIN_COUNT
from genrec.config import check_choice, make_console, parse, run
from genrec.data.splits import read_split
from genrec.decoding.beam import default_beam_width
from genrec.evaluation.doctor import (
    Check,
    check_diversity,
    check_fit,
    check_legality,
    check_levels,
    check_lists,
    check_search,
    next_step,
    not_run,
    worst_first,
)
from genrec.evaluation.probes import (
    K,
    draw,
    first_rows,
    measure_fit,
    search_gap,
    teacher_forced,
    torch_engine,
)
from genrec.evaluation.run_checks import (
    check_curve,
    check_manifests,
    check_prompts,
    check_semantic_ids,
    stored_lists,
)
from genrec.recommend import MODEL_STAGES, Recommender
from genrec.title_ids import TitleIds

EXHAUSTIVE_STEPS = 10  # a row scored exhaustively takes about as long as ten others
OF_MODEL = (
    "model", "prompts", "legality", "levels", "fit", "search", "lists", "diversity",
)  # fmt: skip
STYLES = {"bad": "bold red", "look": "yellow", "not run": "magenta", "ok": "green"}


@dataclass
class DoctorArgs:
    """Settings of doctor."""

    run_dir: str = "runs/default"
    run: str | None = None  # short for run_dir
    rows: int = 200  # validation rows, and as many training rows, drawn by the seed
    exhaustive_rows: int = 50  # of them, rows for which the whole catalogue is scored
    seed: int = 0
    model_stage: str | None = None  # default: what recommend served, else grpo where complete
    beam_width: int | None = None  # try another than recommend's

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        self.run_dir = self.run or self.run_dir
        if self.model_stage is not None:
            check_choice("model_stage", self.model_stage, MODEL_STAGES)
        for name in ("rows", "exhaustive_rows", "beam_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


def examine(args: DoctorArgs) -> list[Check]:
    """All checks; those that need the model are not run where it doesn't load."""
    run_dir = args.run_dir
    files = check_manifests(run_dir)

    def guarded(names: Sequence[str], make: Callable[[], list[Check]]) -> list[Check]:
        try:
            return make()
        except Exception as error:
            if files.status != "bad":
                raise  # no broken file explains it
            return [not_run(name, f"{type(error).__name__}: {error}") for name in names]

    checks = [files]
    checks += guarded(["semantic ids"], lambda: [check_semantic_ids(run_dir)])
    checks += guarded(["validation curve"], lambda: [check_curve(run_dir)])
    served = served_settings(run_dir, args.model_stage)
    loaded = load(args, served)
    if isinstance(loaded, Recommender):
        return checks + guarded(OF_MODEL, lambda: examine_model(args, loaded, served))
    checks += guarded(["prompts"], lambda: [check_prompts(run_dir, None, None, None)])
    return [*checks, loaded, *(not_run(n, "the model did not load") for n in OF_MODEL[2:])]


def with_history(run_dir: str, split: str) -> pl.DataFrame:
    """Rows of a split but those of users of whom nothing is known yet."""
    rows = read_split(run_dir, split, "doctor")
    return rows.filter(pl.col(HISTORY).list.len() > 0)


def load(args: DoctorArgs, served: dict[str, Any]) -> Recommender | Check:
    """The run's model, or why there is none."""
    source = served.get("model_run") or args.run_dir  # a later catalogue is served by an old model
    if not any((stage_folder(source, s) / MANIFEST).exists() for s in MODEL_STAGES):
        command = f"genrec sft --config <its yaml> --run_dir {args.run_dir}"
        return not_run("model", "neither sft nor grpo has finished", command)
    stage, normalizer = args.model_stage or served.get("model_stage"), served.get("normalizer")
    try:
        model_run = served.get("model_run")
        return Recommender.load(args.run_dir, stage, "torch", normalizer, model_run=model_run)
    except Exception as error:  # whatever is broken in a run, the other checks still help
        value = f"{type(error).__name__}: {error}"
        advice = "mend what it names; if manifests or semantic ids are bad, those first"
        return Check("model", value, "bad", "nothing can be served", advice)


def examine_model(
    args: DoctorArgs, recommender: Recommender, served: dict[str, Any]
) -> list[Check]:
    """The checks that look at what the model does, in the order of `OF_MODEL`."""
    run_dir, engine = args.run_dir, torch_engine(recommender)
    rows = {split: with_history(run_dir, split) for split in ("valid", "train")}
    if empty := [split for split, table in rows.items() if table.is_empty()]:
        return [
            not_run(name, f"no row of {' and '.join(empty)} has a history") for name in OF_MODEL
        ]
    train_count = recommender.catalog[TRAIN_COUNT].to_numpy()
    rule = served.get("filter_seen", recommender.filter_seen)
    width = args.beam_width or served.get("beam_width") or default_beam_width(K)
    samples = {
        split: draw(recommender, table, args.rows, args.seed, rule) for split, table in rows.items()
    }
    few = first_rows(samples["valid"], args.exhaustive_rows)
    steps = 2 * sum(len(s.ids) for s in samples.values()) + EXHAUSTIVE_STEPS * len(few.ids)
    scores, fits, found = {}, {}, {}
    with tqdm(total=steps, unit="step", desc="doctor") as bar:
        for split, sample in samples.items():
            scores[split] = teacher_forced(engine, sample, train_count, bar.update)
            found[split] = engine.search(
                sample.ids, min(K, width), width, sample.seen, progress=bar.update
            )
            fits[split] = measure_fit(sample, scores[split], found[split].items, train_count)
        gap = search_gap(engine, few, width, args.seed, lambda n: bar.update(n * EXHAUSTIVE_STEPS))

    # The lists that were served, if they are of this model and beam; else those of the sample.
    if "k" in served and args.beam_width is None:
        k, source = served["k"], f"lists of recommend ({served['split']})"
        items, lengths, certified, n_prompts = stored_lists(run_dir, k)
    else:
        k, source = min(K, width), "lists of the sample"
        items, certified = found["valid"].items, found["valid"].certified
        lengths, n_prompts = (items >= 0).sum(1), len(set(samples["valid"].prompts))
    parameters = sum(p.numel() for p in engine.model.parameters())
    if isinstance(recommender.semantic_ids, TitleIds):
        why = "items are named by titles, whose tokens at one place have nothing in common"
        of_levels = [not_run(name, why) for name in ("legality", "levels")]
    else:
        of_levels = [
            check_legality(scores["valid"], loss_over(served.get("model_run") or run_dir)),
            check_levels(scores["valid"], scores["train"], args.seed),
        ]
    value = f"{recommender.model_stage}, {parameters:,} parameters, scores over {engine.normalizer}"
    return [
        Check("model", value, "ok", "it loads, with this map and these templates"),
        check_prompts(run_dir, recommender, samples["valid"], samples["train"]),
        *of_levels,
        check_fit(fits["train"], fits["valid"], args.seed),
        check_search(gap, run_dir),
        check_lists(certified, lengths, k, source),
        check_diversity(items, n_prompts, train_count, source),
    ]


def loss_over(run_dir: str) -> str:
    """What a SID token's probability competed with in sft (grpo goes on from there)."""
    return str(require(run_dir, "sft").config.get("loss_over", "vocabulary"))


def served_settings(run_dir: str, model_stage: str | None) -> dict[str, Any]:
    """Settings of a whole recommend stage made by the model under examination, else nothing."""
    try:
        settings = require(run_dir, "recommend").config
    except ValueError:
        return {}
    return settings if model_stage in (None, settings["model_stage"]) else {}


def show(run_dir: str, checks: list[Check], advice: str, console: Console) -> None:
    """Print the checks, worst first, and the next step."""
    table = Table(box=None, pad_edge=False, title=f"doctor: {run_dir}", title_justify="left")
    table.add_column("status", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("what was found", overflow="fold")
    for check in checks:
        text = Text(check.value)
        text.append(f"\n{check.meaning}", style="dim" if check.status == "ok" else "bold")
        if check.advice:
            text.append(f"\n→ {check.advice}", style="cyan")
        table.add_row(Text(check.status, style=STYLES[check.status]), Text(check.name), text)
    console.print(table)
    console.print(Text(f"\nnext: {advice}", style="bold"), soft_wrap=True)


def main() -> None:
    """Run the command."""
    args = parse(DoctorArgs)
    run_dir = Path(args.run_dir)
    if not any((stage_folder(run_dir, stage) / MANIFEST).exists() for stage in FOLDERS):
        raise ValueError(f"{run_dir} holds no finished stage; --run_dir must be a run's folder")
    ours = logging.getLogger("genrec")
    before = ours.level
    ours.setLevel(logging.WARNING)
    try:
        checks = worst_first(examine(args))
    finally:  # a program that called us goes on
        ours.setLevel(before)
    details = {check.name: check.details for check in checks}
    plain = [{k: v for k, v in asdict(check).items() if k != "details"} for check in checks]
    found = {
        "run": str(run_dir),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": args.rows,
        "seed": args.seed,
        "checks": plain,
        "details": details,
    }
    write_json(run_dir / "doctor.json", json.loads(json.dumps(found, default=float)))
    console = make_console(width=100)
    show(args.run_dir, checks, next_step(checks), console)
    if any(check.status == "bad" for check in checks):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
