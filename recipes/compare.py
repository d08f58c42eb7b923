"""Compare: evaluated runs beside each other on the same rows, training seeds taken together.

    genrec compare --systems tiny=runs/tiny-0 tiny=runs/tiny-1 small=runs/small \
        --output_dir results/sizes
    genrec compare --systems genrec=runs/beauty SASRec=results/sasrec --reference SASRec \
        --output_dir results/beauty

Each NAME=FOLDER names a run that `genrec evaluate` has finished, or the folder that it wrote for
somebody's lists. Runs under one NAME are training seeds of one system. All must be evaluated on the
same rows under the same rules; the baselines, which are then the same, are shown once.

Writes comparison.html (open it in a browser), comparison.json, comparison.parquet and
slices.parquet. It reads what
evaluate wrote and no split. CPU only, seconds.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec.artifacts import write_json, write_parquet, write_text
from genrec.columns import USER_ID
from genrec.config import make_console, parse, run
from genrec.evaluation.comparison import (
    Comparison,
    compare_ranks,
    comparison_table,
    describe_difference,
    with_values,
)
from genrec.evaluation.evaluated_runs import (
    all_scores,
    check_comparable,
    differing_settings,
    gather,
    load_evaluated,
    mean_over_seeds,
    noted_reads,
    notes_on_seeds,
    other_vectors,
    rank_curves,
)
from genrec.evaluation.pages import render_comparison_page
from genrec.evaluation.row_values import RowValues
from genrec.evaluation.slices import score_slices
from genrec.metrics import gains

logger = logging.getLogger("genrec.compare")

# What the evaluations say of data and rules, the same in all that may be compared.
HELD_EQUAL = (
    "dataset", "split", "split_sha256", "protocol", "tie_rule", "rating_rule", "rows", "users",
    "items", "restricted", "filter_seen", "ks", "targets_seen_before",
)  # fmt: skip


@dataclass
class CompareArgs:
    """Settings of compare."""

    systems: list[str] = field(default_factory=list)  # NAME=FOLDER each; one NAME: its seeds
    output_dir: str | None = None  # a new folder
    reference: str | None = None  # the others are compared with it; default: the first NAME
    samples: int = 1000  # bootstrap samples of the 95% intervals
    permutations: int = 10_000  # draws of the randomisation test
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        if not self.systems:
            raise ValueError("--systems is empty; name at least one NAME=FOLDER")
        if self.output_dir is None:
            raise ValueError("--output_dir is missing; name a new folder")
        for entry in self.systems:
            name, equals, folder = entry.partition("=")
            if not (name.strip() and equals and folder):
                raise ValueError(f"--systems {entry!r} must have the form NAME=FOLDER")
        names = [name for name, _ in self.named()]
        if self.reference is not None and self.reference not in names:
            raise ValueError(
                f"reference={self.reference!r} is not among the systems {', '.join(names)}"
            )
        for setting, value in (("samples", self.samples), ("permutations", self.permutations)):
            if value < 1:
                raise ValueError(f"{setting}={value} must be at least 1")

    def named(self) -> list[tuple[str, Path]]:
        """Name and folder of every run."""
        pairs = (entry.partition("=") for entry in self.systems)
        return [(name.strip(), Path(folder)) for name, _, folder in pairs]


def long_table(results: dict[str, Any]) -> pl.DataFrame:
    """One row per system and metric: value, interval, seeds, and the difference to it."""
    reference, rows = results["reference"], []
    for system, metrics in results["systems"].items():
        apart = results["differences"].get(f"{reference} - {system}", {})
        for metric, found in metrics.items():
            difference = apart.get(metric, {})
            rows.append(
                {
                    "system": system,
                    "metric": metric,
                    **{key: found[key] for key in ("value", "low", "high")},
                    "seeds": list(found.get("seeds") or [found["value"]]),
                    "difference": difference.get("value"),
                    "difference_low": difference.get("low"),
                    "difference_high": difference.get("high"),
                    "p": difference.get("p"),
                    "p_holm": difference.get("p_holm"),
                }
            )
    number = dict.fromkeys(
        ("value", "low", "high", "difference", "difference_low", "difference_high", "p", "p_holm"),
        pl.Float64,
    )
    return pl.DataFrame(rows, schema_overrides={**number, "seeds": pl.List(pl.Float64)})


def main() -> None:
    """Read the evaluations, check that they may be compared, compare, write, print."""
    args = parse(CompareArgs)
    output = Path(str(args.output_dir))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output_dir {output} is not an empty folder; name a new one")
    runs = [load_evaluated(name, folder) for name, folder in args.named()]
    check_comparable(runs)
    ranks, values, notes = gather(runs)
    reference = args.reference or runs[0].system
    first = runs[0].metrics
    groups = runs[0].rows[USER_ID].rank("dense").to_numpy().astype(np.int64) - 1
    found = compare_ranks(
        ranks, first["ks"], reference, args.samples, args.permutations, args.seed, groups
    )
    settings = differing_settings(runs)
    if other_vectors(settings):  # means of lists measured by other yardsticks aren't to be compared
        values = {name: [without_diversity(run) for run in own] for name, own in values.items()}
    found = with_values(found, values, args.samples, args.seed, groups)
    notes += notes_on_seeds(runs, settings)
    for note in notes:
        logger.warning("%s", note)
    k = max(first["ks"])
    depth = min(one.metrics.get("depth", k) for one in runs)
    results = {
        **{key: first[key] for key in HELD_EQUAL if key in first},
        "fit_on": " / ".join(sorted({str(run.metrics.get("fit_on")) for run in runs})),
        "baselines": {
            name: how
            for run in reversed(runs)
            for name, how in run.metrics["baselines"].items()
            if name in ranks
        },
        "depth": depth,
        "interval": "95% percentile bootstrap over users and, where there are several, seeds",
        "samples": args.samples,
        "permutations": args.permutations,
        "seed": args.seed,
        "reference": reference,
        "systems": all_scores(runs, found),
        "differences": {
            f"{reference} - {name}": {metric: asdict(value) for metric, value in metrics.items()}
            for name, metrics in found.differences.items()
        },
        "curves": rank_curves(ranks, depth),
        "runs": [
            {
                "system": one.system,
                "folder": str(one.folder),
                "value": mean_over_seeds(one.own, gains, k),
                "reads": noted_reads(one),
                "training": one.training,
            }
            for one in runs
        ],
        "settings": settings,
        "notes": notes,
    }
    slices = score_slices(runs[0].slicings, ranks, groups, k, args.samples, args.seed)
    page = render_comparison_page(json.loads(json.dumps(results, default=str)), slices)
    write_json(output / "comparison.json", results)
    write_parquet(output / "comparison.parquet", long_table(results))
    write_parquet(output / "slices.parquet", slices)
    write_text(output / "comparison.html", page)
    show(found, results)
    print(f"details: {output}/comparison.html, comparison.json, *.parquet")


def without_diversity(values: RowValues) -> RowValues:
    """All values but the diversity of lists."""
    return {name: value for name, value in values.items() if not name.startswith("ild@")}


def show(found: Comparison, results: dict[str, Any]) -> None:
    """Print the table and the sentence on the reference."""
    columns = [f"{metric}@{k}" for k in results["ks"] for metric in ("HR", "NDCG")]
    title = f"{results['dataset']}, {results['split']}: {results['rows']:,} rows"
    console = make_console(markup=True)
    console.print(comparison_table(found, columns, title))
    if (line := describe_difference(found, f"NDCG@{max(results['ks'])}")) is not None:
        console.print(line, markup=False)


if __name__ == "__main__":
    run(main)
