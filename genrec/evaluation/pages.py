"""The evaluation pages: a run's results, and several runs beside each other.

One self-contained HTML file each (see `genrec.page`), made from the files that evaluate and compare
write. Parts whose file is missing are left out. Every figure's numbers stand in a table, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from genrec.artifacts import read_json
from genrec.evaluation import figures
from genrec.evaluation.figures import Group, Point
from genrec.evaluation.page_parts import (
    by_value,
    chart,
    curve_charts,
    difference_table,
    draw_curves,
    forest_charts,
    meanings,
    metrics_table,
    p_text,
    point_text,
    seed_charts,
    short_name,
    verdict,
)
from genrec.evaluation.run_notes import (
    baseline_settings,
    doctor_checks,
    example_cards,
    items_ranked,
    protocol_facts,
    run_curves,
    split_reads,
    training_charts,
)
from genrec.evaluation.slices import MIN_ROWS
from genrec.page import display_text, environment

MAX_BARS = 24  # slices drawn per family


def render_run_page(folder: Path, run_dir: Path | None = None, data_run: Path | None = None) -> str:
    """The page of one evaluation.

    Args:
        folder: what evaluate wrote: ``metrics.json`` and, where there, ``slices.parquet``,
            ``curves.parquet`` and ``examples.json``.
        run_dir: the run, for the training curves, the test split's reads and the doctor's checks;
            None leaves these out.
        data_run: the run whose split somebody else's lists answer, for the reads; default
            `run_dir`.

    Raises:
        ValueError: ``metrics.json`` is missing or damaged.
    """
    if not (folder / "metrics.json").is_file():
        raise ValueError(f"{folder} holds no metrics.json; run: genrec evaluate")
    metrics, data_run = read_json(folder / "metrics.json"), data_run or run_dir
    reference, systems = metrics["reference"], metrics["systems"]
    primary = f"NDCG@{max(metrics['ks'])}"
    ranked = by_value(systems, primary)
    best = next((name for name in ranked if name != reference), None)
    differences = _by_other(metrics["differences"], reference)
    template = environment().get_template("evaluation/run.html.jinja")
    return template.render(
        metrics=metrics,
        min_rows=MIN_ROWS,
        reference=short_name(reference),
        primary=primary,
        verdict=verdict(reference, best, primary, systems, differences),
        accuracy=metrics_table(systems, reference, ranked),
        beyond=metrics_table(systems, reference, ranked, max(metrics["ks"])),
        meanings=meanings(systems),
        differences=difference_table(differences, ranked),
        differences_beyond=difference_table(differences, ranked, max(metrics["ks"])),
        forests=forest_charts(differences, ranked, reference, max(metrics["ks"])),
        curves=curve_charts(folder / "curves.parquet", reference, ranked),
        slices=_slices(pl.read_parquet(path, glob=False), metrics, best, primary)
        if (path := folder / "slices.parquet").is_file()
        else [],
        training=training_charts(run_dir) if run_dir else [],
        examples=example_cards(folder / "examples.json", reference),
        ranked=items_ranked(metrics),
        facts=protocol_facts(metrics),
        baselines=baseline_settings(metrics["baselines"], metrics.get("not_run", {})),
        reads=split_reads(data_run / "test_reads.jsonl", metrics["split_sha256"])
        if data_run
        else None,
        checks=doctor_checks(run_dir / "doctor.json") if run_dir else [],
    )


def render_comparison_page(
    comparison: Mapping[str, Any], slices: pl.DataFrame | None = None
) -> str:
    """The page of several runs on the same rows.

    Args:
        comparison: what ``genrec compare`` writes to ``comparison.json``: ``systems`` and
            ``differences`` as in ``metrics.json``; ``curves``, system -> k, recall, ndcg; ``runs``,
            the folders in the order of the systems; ``settings``, what differs between them;
            ``notes``; and what was held equal, under the names of ``metrics.json``.
        slices: result of `score_slices`, or None.
    """
    reference, systems = comparison["reference"], comparison["systems"]
    k = max(comparison["ks"])
    primary = f"NDCG@{k}"
    ranked = by_value(systems, primary)
    best = next((name for name in ranked if name != reference), None)
    differences = _by_other(comparison["differences"], reference)
    first = [reference, *(name for name in ranked if name != reference)]
    curves = comparison["curves"]
    template = environment().get_template("evaluation/comparison.html.jinja")
    return template.render(
        comparison=comparison,
        reference=short_name(reference),
        primary=primary,
        verdict=verdict(reference, best, primary, systems, differences),
        accuracy=metrics_table(systems, reference, ranked),
        beyond=metrics_table(systems, reference, ranked, k),
        meanings=meanings(systems),
        differences=difference_table(differences, ranked),
        differences_beyond=difference_table(differences, ranked, k),
        forests=forest_charts(differences, ranked, reference, k),
        curves=draw_curves({name: curves[name] for name in ranked if name in curves}, reference),
        seeds=seed_charts(systems, first, k),
        slices=[] if slices is None else _slices(slices, comparison, best, primary),
        min_rows=MIN_ROWS,
        training=run_curves(comparison["runs"]),
        ranked=items_ranked(comparison),
        facts=protocol_facts(comparison),
        baselines=baseline_settings(comparison["baselines"], {}),
    )


def _by_other(differences: Mapping[str, Any], reference: str) -> dict[str, Any]:
    """Differences under the other system's name instead of ``reference - other``."""
    return {name.removeprefix(f"{reference} - "): found for name, found in differences.items()}


def _slices(
    table: pl.DataFrame, metrics: Mapping[str, Any], best: str | None, primary: str
) -> list[dict[str, Any]]:
    """A figure per family of slices: the reference and the best other system."""
    shown = [name for name in (metrics["reference"], best) if name is not None]
    table = table.filter(pl.col("system").is_in(shown))
    measured = [m for m in (primary, primary.replace("NDCG", "HR")) if m in table["metric"]]
    families = []
    for i, ((family,), part) in enumerate(table.group_by("family", maintain_order=True)):
        points = {
            (row["slice"], row["system"], row["metric"]): Point(
                row["value"], row["low"], row["high"]
            )
            for row in part.iter_rows(named=True)
        }
        kinds = part.sort("place").unique("slice", keep="first", maintain_order=True)
        sizes = list(kinds.select("slice", "rows", "users").iter_rows())
        gaps = metrics.get("gaps", {}).get(family, {})
        families.append(
            {
                **_slice_chart(f"slice-{i}", str(family), sizes, points, shown, measured),
                "family": display_text(family, 60),
                "small": any(rows < MIN_ROWS for _, rows, _ in sizes),
                "hidden": max(0, len(sizes) - MAX_BARS),
                "gaps": [
                    {
                        "system": short_name(name),
                        **gap,
                        "p_text": p_text(gap.get("p")),
                        "best": display_text(gap["best"], 60),
                        "worst": display_text(gap["worst"], 60),
                    }
                    for name in shown
                    if (gap := gaps.get(name, {}).get(primary)) is not None
                ],
            }
        )
    return families


def _slice_chart(
    key: str,
    family: str,
    sizes: Sequence[tuple[Any, int, int]],
    points: Mapping[tuple[Any, str, str], Point],
    shown: Sequence[str],
    measured: Sequence[str],
) -> dict[str, Any]:
    largest = sorted(sizes, key=lambda size: -size[1])[:MAX_BARS]
    groups = [
        Group(
            str(name),
            f"{rows:,} {'row' if rows == 1 else 'rows'}{'*' if rows < MIN_ROWS else ''}",
            [points.get((name, system, measured[0])) for system in shown],
        )
        for name, rows, users in sizes
        if (name, rows, users) in largest
    ]
    names = [short_name(system) for system in shown]
    about = f"{measured[0]} by {display_text(family, 60)}"
    label = f"{about}, {' and '.join(names)}, {len(groups)} slices with 95% intervals"
    columns = ["Slice", "Rows", "Users", *(f"{m}, {name}" for m in measured for name in names)]
    rows = [
        [
            display_text(name, 60), f"{rows:,}", f"{users:,}",
            *(point_text(points.get((name, system, m))) for m in measured for system in shown),
        ]
        for name, rows, users in sizes
    ]  # fmt: skip
    svg = figures.bars(key, label, groups, names, measured[0])
    return chart(key, f"{measured[0]} with 95% intervals", svg, columns, rows, about)
