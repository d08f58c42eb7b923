"""Evaluated runs as `genrec compare` reads them: ranks, rules, and the settings behind them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.artifacts import load_manifest, read_json, stage_folder
from genrec.columns import ROW_ID, USER_ID
from genrec.evaluation.comparison import Comparison
from genrec.evaluation.curves import STAGES, training_curves
from genrec.evaluation.results import ROW_SLICES
from genrec.evaluation.row_values import COLUMNS, HISTORY_POPULARITY, RowValues
from genrec.evaluation.slices import Slicing, read_slicings
from genrec.metrics import RelevantRanks, gains, recalls

Ranks = list[RelevantRanks]  # one entry per training seed
Values = list[RowValues]

VALIDATED = "ndcg@10"  # what stages measure while they train
# What makes scores comparable. (Older evaluations don't say to what lists were restricted.)
SAME = ("split_sha256", "split", "filter_seen", "ks", "restricted")
# Stages whose settings decide a run's lists.
_STAGES = ("prepare", "embed", "quantize", "build_dataset", "sft", "grpo", "recommend")


@dataclass(frozen=True)
class Evaluated:
    """One evaluated run: its scores, and the rank of every row's target.

    Attributes:
        system: the name it was given.
        folder: as given.
        metrics: content of ``metrics.json``.
        rows: row ids and user ids, in the order of the row ids.
        ranks: system of the evaluation -> where the relevant items stand, one entry per seed.
        values: the same systems -> what rows' lists are like beyond accuracy, one entry per seed.
        slicings: which slices the rows are in; none where an older genrec evaluated.
        training: stage -> (step, NDCG@10 on validation rows), of the stages that measured it.
    """

    system: str
    folder: Path
    metrics: dict[str, Any]
    rows: pl.DataFrame
    ranks: dict[str, Ranks]
    values: dict[str, Values]
    slicings: list[Slicing]
    training: dict[str, list[tuple[int, float]]]

    @property
    def own(self) -> Ranks:
        """Ranks of the system that was evaluated, not of a baseline."""
        return self.ranks[self.metrics["reference"]]

    @property
    def baselines(self) -> dict[str, Ranks]:
        """Ranks of everything else."""
        return {name: r for name, r in self.ranks.items() if name != self.metrics["reference"]}

    def up_to(self, depth: int) -> Evaluated:
        """The same with lists cut to `depth` places, so that runs with longer ones compare."""
        ranks = {
            name: [
                RelevantRanks(r.row[r.within(depth)], r.rank[r.within(depth)], r.n_relevant)
                for r in found
            ]
            for name, found in self.ranks.items()
        }
        return replace(self, ranks=ranks)


def load_evaluated(system: str, folder: Path) -> Evaluated:
    """Read what evaluate left in a run, or in a folder of its own.

    Raises:
        ValueError: there is no evaluation, it is an older genrec's, or it lacks rows.
    """
    source = next(
        (f for f in (stage_folder(folder, "evaluate"), folder) if (f / "metrics.json").is_file()),
        None,
    )
    if source is None:
        raise ValueError(f"{folder} holds no evaluation; run: genrec evaluate --run_dir {folder}")
    metrics = read_json(source / "metrics.json")
    table = pl.read_parquet(source / "per_user.parquet", glob=False)
    if "reference" not in metrics or "seed" not in table.columns:
        raise ValueError(f"{source} was written by an older genrec; rerun its evaluation")
    table = table.sort(ROW_ID)
    rows = table.select(ROW_ID, USER_ID).unique(ROW_ID, keep="first", maintain_order=True)
    ranks: dict[str, Ranks] = {}
    values: dict[str, Values] = {}
    for (name,), part in table.group_by("system", maintain_order=True):
        seeds = [one for _, one in sorted(part.group_by("seed"), key=lambda pair: pair[0])]
        if any(not one[ROW_ID].equals(rows[ROW_ID]) for one in seeds):
            raise ValueError(f"{source}/per_user.parquet lacks rows of {name}; rerun evaluate")
        ranks[str(name)] = [_relevant_ranks(one) for one in seeds]
        values[str(name)] = [_row_values(one) for one in seeds]
    slices = source / ROW_SLICES
    slicings = (
        read_slicings(
            rows.select(ROW_ID).join(
                pl.read_parquet(slices, glob=False), on=ROW_ID, how="left", maintain_order="left"
            )
        )
        if slices.is_file()
        else []
    )
    training = {stage: found for stage in STAGES if (found := _validated(folder / stage))}
    return Evaluated(system, folder, metrics, rows, ranks, values, slicings, training)


def _validated(folder: Path) -> list[tuple[int, float]]:
    """Step and value of a stage's validations."""
    path = folder / "validation.json"
    entries = read_json(path) if path.is_file() else []
    for curve in training_curves(entries, []):
        for name, points in curve.points.items():
            if name.lower() == VALIDATED:
                return points
    return []


def _relevant_ranks(table: pl.DataFrame) -> RelevantRanks:
    """One seed's rows of ``per_user.parquet``: one target each, or several (then with columns)."""
    if "hit_ranks" not in table.columns:
        return RelevantRanks.of_targets(table["target_rank"].to_numpy())
    hits = table.select("hit_ranks").with_row_index("row").explode("hit_ranks").drop_nulls()
    return RelevantRanks(
        hits["row"].to_numpy().astype(np.int64),
        hits["hit_ranks"].to_numpy().astype(np.int64),
        table["n_relevant"].to_numpy().astype(np.int64),
    )


def _row_values(table: pl.DataFrame) -> RowValues:
    """One seed's values beyond accuracy; an evaluation by an older genrec has none."""
    names = [c for c in table.columns if c.partition("@")[0] in (*COLUMNS, HISTORY_POPULARITY)]
    return {name: table[name].fill_null(float("nan")).to_numpy() for name in names}


def _same(one: Ranks, other: Ranks) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.row, b.row) and np.array_equal(a.rank, b.rank)
        for a, b in zip(one, other, strict=True)
    )


def check_comparable(runs: Sequence[Evaluated]) -> None:
    """Raise ValueError unless all runs were evaluated on the same rows under the same rules."""
    first = runs[0]
    for other in runs[1:]:
        for key in SAME:
            ours, theirs = first.metrics.get(key), other.metrics.get(key)
            if ours != theirs:
                raise ValueError(
                    f"{first.folder} has {key}={ours}, {other.folder} has {key}={theirs}; "
                    "evaluate both on the same split under the same rules"
                )
        if not first.rows[ROW_ID].equals(other.rows[ROW_ID]):
            raise ValueError(
                f"{first.folder} was evaluated on {first.rows.height:,} rows, {other.folder} on "
                f"{other.rows.height:,} that are not the same; evaluate both on all rows"
            )
    folders = [run.folder.resolve() for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(f"{run.folder} is named twice; each run counts once")


def gather(
    runs: Sequence[Evaluated],
) -> tuple[dict[str, Ranks], dict[str, Values], list[str]]:
    """Ranks and values per system: seeds under their name, baselines once.

    A baseline whose lists are not the same in all runs that have it is no common ground, and is
    left out: content-kNN reads each run's own vectors, others may have been fitted to other rows.
    Of one that was trained with more seeds in one run than in another the common ones count.

    Returns:
        Ranks, values beyond accuracy, and what the reader has to know of the baselines.

    Raises:
        ValueError: a run is named like a baseline.
    """
    depth = min(int(run.metrics["depth"]) for run in runs)
    runs = [run.up_to(depth) for run in runs]
    ranks: dict[str, Ranks] = {}
    values: dict[str, Values] = {}
    for run in runs:
        ranks[run.system] = [*ranks.get(run.system, []), *run.own]
        own = run.values[run.metrics["reference"]]
        values[run.system] = [*values.get(run.system, []), *own]
    notes = []
    for name in dict.fromkeys(name for run in runs for name in run.baselines):
        having = [run for run in runs if name in run.baselines]
        if name in ranks:
            raise ValueError(
                f"--systems {name}=…: {name!r} is a baseline in {having[0].folder}; choose another"
            )
        found = [run.baselines[name] for run in having]
        seeds = min(map(len, found))
        other = [
            r for r, f in zip(having, found, strict=True) if not _same(found[0][:seeds], f[:seeds])
        ]
        if other:
            notes.append(
                f"{name} is left out: its lists in {having[0].folder} and {other[0].folder} are "
                "not the same, so it was made from other vectors, rows or settings"
            )
            continue
        if seeds < max(map(len, found)):
            notes.append(f"{name} counts with the {seeds} training seeds that all runs have")
        ranks[name] = found[0][:seeds]
        values[name] = having[0].values[name][:seeds]
    rules = {str(run.metrics.get("fit_on")) for run in runs if run.baselines}
    if len(rules) > 1:
        notes.append(f"baselines were fitted to different parts: {', '.join(sorted(rules))}")
    return ranks, values, notes


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as ``a.b.c`` -> JSON text."""
    if isinstance(value, dict):
        parts = [_flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items()]
        return {name: text for part in parts for name, text in part.items()}
    return {prefix: value if isinstance(value, str) else json.dumps(value, default=str)}


def differing_settings(runs: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Settings that are not the same in all runs, in the order of the line.

    Returns:
        ``{"name": "sft: training.seed", "values": one per run, None where there is none}`` each.
    """
    rows = []
    for stage in _STAGES:
        found = [load_manifest(run.folder, stage) for run in runs]
        there = ["made" if manifest else None for manifest in found]
        if len(set(there)) > 1:
            rows.append({"name": stage, "values": there})
        settings = [_flat(manifest.config) if manifest else None for manifest in found]
        keys = dict.fromkeys(key for s in settings if s is not None for key in s)
        for key in keys:
            values = [None if s is None else s.get(key) for s in settings]
            if len({v for v, s in zip(values, settings, strict=True) if s is not None}) > 1:
                rows.append({"name": f"{stage}: {key}", "values": values})
    return rows


def notes_on_seeds(runs: Sequence[Evaluated], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the reader has to know where runs of one name are no plain repetitions."""
    notes = []
    for name in dict.fromkeys(run.system for run in runs):
        own = [i for i, run in enumerate(runs) if run.system == name]
        changed = [s["name"] for s in settings if len({s["values"][i] for i in own}) > 1]
        if other := [key for key in changed if "seed" not in key]:
            more = f" and {len(other) - 3} more" if len(other) > 3 else ""
            notes.append(
                f"runs of {name} differ in more than the seed: {', '.join(other[:3])}{more}"
            )
        pairs = itertools.combinations(own, 2)
        if any(_same(runs[i].own, runs[j].own) for i, j in pairs):
            notes.append(f"two runs of {name} have the same lists: one may be a copy of the other")
    if other_vectors(settings):
        notes.append(
            "the runs have other item vectors: diversity is measured in each run's own, and "
            "doesn't compare between them"
        )
    return notes


def other_vectors(settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the runs' item vectors, in which diversity is measured, differ."""
    return any(s["name"].startswith("embed: ") for s in settings)


def all_scores(runs: Sequence[Evaluated], done: Comparison) -> dict[str, dict[str, Any]]:
    """Scores of every system: those of `done`, and from the evaluations what ranks don't tell.

    The latter are means over a system's runs, without an interval where there are several.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(run.system, []).append(run.metrics["systems"][run.metrics["reference"]])
        for name in run.baselines:
            if name in done.metrics:  # else its lists differ between the runs
                found.setdefault(name, [run.metrics["systems"][name]])
    systems = {}
    for name, scores in found.items():
        systems[name] = {metric: asdict(v) for metric, v in done.metrics[name].items()}
        shared = set.intersection(*(set(score) for score in scores)) - set(systems[name])
        for metric in (m for m in scores[0] if m in shared):
            if len(scores) == 1:
                systems[name][metric] = scores[0][metric]
                continue
            values = [v for score in scores for v in score[metric].get("seeds") or []]
            mean = float(np.mean(values))
            systems[name][metric] = {"value": mean, "low": None, "high": None, "seeds": values}
    return systems


def rank_curves(ranks: Mapping[str, Ranks], depth: int) -> dict[str, dict[str, list[float]]]:
    """Recall and NDCG at every list length up to `depth`, mean over rows and seeds."""
    lengths = range(1, depth + 1)
    return {
        name: {
            "k": [float(k) for k in lengths],
            "recall": [mean_over_seeds(runs, recalls, k) for k in lengths],
            "ndcg": [mean_over_seeds(runs, gains, k) for k in lengths],
        }
        for name, runs in ranks.items()
    }


def mean_over_seeds(
    runs: Ranks, per_row: Callable[[RelevantRanks, int], npt.NDArray[np.float64]], k: int
) -> float:
    """Mean of a metric at `k` over rows and seeds."""
    return float(np.mean([per_row(one, k).mean() for one in runs]))


def noted_reads(run: Evaluated) -> int | None:
    """How often a read of this test split was noted; None where no notes are found.

    They lie in the run, or for somebody else's lists in the run whose split these answer.
    """
    folders = [run.folder, *([Path(d)] if (d := run.metrics.get("data_run")) else [])]
    notes = (folder / "test_reads.jsonl" for folder in folders)
    if (path := next((p for p in notes if p.is_file()), None)) is None:
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    return sum(run.metrics["split_sha256"] in line for line in text.splitlines())
