"""Tables and charts that the evaluation pages share, made from scores and differences.

Scores are the dictionaries of ``metrics.json``: system -> metric -> value, low, high, seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup

from genrec.evaluation import figures
from genrec.evaluation.figures import Line, Point
from genrec.page import display_text, number

ACCURACY = ("HR", "Recall", "NDCG", "MRR", "MAP")
# Metric -> (name, arrow and word for the header, what it says).
BEYOND = {
    "SID-match": (
        "SID match",
        "what string comparison reports",
        "Hit rate if a shared semantic id counted as a hit for every item behind it, as "
        "tables that compare SID strings have it. At least the hit rate by item.",
    ),
    "SID-credit": (
        "SID credit",
        "higher: more right",
        "The same, but a SID shared by n items earns 1/n: the chance that picking one of them is "
        "right. Equal to SID match where no two items share a SID.",
    ),
    "coverage": (
        "Coverage",
        "higher: more of the catalogue",
        "Share of the catalogue that appears in at least one list. Higher is better, as long as "
        "accuracy holds: random lists cover nearly everything.",
    ),
    "gini": (
        "Gini",
        "lower: more even",
        "How unevenly the places in the lists are spread over the catalogue: 0 if all items are "
        "shown equally often, near 1 if a few take all. Lower is better.",
    ),
    "novelty": (
        "Novelty",
        "higher: less known",
        "How unexpected an item is, in bits: −log2 of the share of users who had it in training. "
        "One bit more means half as many. Higher is better, as long as accuracy holds.",
    ),
    "ild": (
        "Diversity",
        "higher: more varied",
        "Mean cosine distance between the items of one list (intra-list diversity). Higher is "
        "better, as long as accuracy holds.",
    ),
    "popularity_lift": (
        "Popularity lift",
        "nearer 0: true to the user",
        "How much more popular the lists are than the histories: 0 is as popular, 0.5 half as much "
        "again, below 0 less popular. Nearer to 0 is better.",
    ),
    "calibration": (
        "Miscalibration",
        "lower: closer to the history",
        "How far the mix of categories in a list is from that in the history (Kullback-Leibler "
        "divergence in nats; 0 is the same mix). Lower is better.",
    ),
}


def chart(
    key: str,
    caption: str,
    svg: Markup,
    columns: Sequence[str] = (),
    rows: Iterable[Sequence[str]] = (),
    about: str | None = None,
) -> dict[str, Any]:
    """A figure and its numbers.

    Args:
        key: distinguishes it on its page.
        caption: stands above it.
        svg: the drawing.
        columns: headings of its table; none if the numbers stand in a table elsewhere.
        rows: the first cell of each heads it.
        about: name of the table; default: the caption.
    """
    return {
        "key": key,
        "caption": caption,
        "svg": svg,
        "columns": list(columns),
        "rows": list(rows),
        "about": about or caption,
    }


def by_value(systems: Mapping[str, Any], metric: str) -> list[str]:
    """Names of the systems, best first."""
    return sorted(systems, key=lambda name: -systems[name][metric]["value"])


def short_name(system: object) -> str:
    """A system's name as pages show it."""
    return display_text(system, 60)


def verdict(
    reference: str,
    best: str | None,
    metric: str,
    systems: Mapping[str, Any],
    differences: Mapping[str, Any],
) -> dict[str, Any]:
    """What the first sentence says of the reference and the best other system.

    Interval and test have to agree before one is called better than the other.
    """
    found = systems[reference][metric]
    seeds = len(found.get("seeds") or [0])
    said = {"reference": short_name(reference), "metric": metric, "found": found, "seeds": seeds}
    if best is None or metric not in differences.get(best, {}):
        return {**said, "other": None}
    apart = differences[best][metric]
    p, interval_clear = apart.get("p"), Point(0, apart["low"], apart["high"]).is_clear
    if p is not None and interval_clear != (p < 0.05):
        words = "is on the edge of being distinguishable from"
    elif not interval_clear:
        words = "is not distinguishable from"
    else:
        words = "is better than" if apart["value"] > 0 else "is worse than"
    theirs = systems[best][metric]
    share = apart["value"] / theirs["value"] if theirs["value"] else None
    return {
        **said,
        "other": short_name(best),
        "theirs": theirs,
        "others": len(systems) - 1,
        "words": words,
        "apart": apart,
        "share": share,
        "p": p_text(p),
    }


def p_text(p: float | None) -> str:
    """A p-value in words that fit behind a value."""
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def metrics_table(
    systems: Mapping[str, Any], reference: str, order: Sequence[str], k: int | None = None
) -> dict[str, Any]:
    """Systems by metrics: accuracy (the best of a column marked), or everything else at `k`."""
    accuracy = k is None
    columns = _metrics({name: systems[name] for name in order}, k)
    values = {
        c: [f["value"] for name in order if (f := systems[name].get(c)) is not None]
        for c in columns
    }
    rows = []
    for name in order:
        found = systems[name]
        seeds = max((len(found[c].get("seeds") or [0]) for c in columns if c in found), default=1)
        cells = [_cell(found.get(c), max(values[c]) if accuracy else None) for c in columns]
        rows.append(
            {"name": short_name(name), "ours": name == reference, "seeds": seeds, "cells": cells}
        )
    return {"columns": [_heading(c) for c in columns], "rows": rows}


def _metrics(scores: Mapping[str, Mapping[str, Any]], k: int | None) -> list[str]:
    """Metrics of accuracy that some system has, or where `k` is given all others at it."""
    every = dict.fromkeys(metric for found in scores.values() for metric in found)
    return [
        metric
        for metric in every
        if (metric.partition("@")[0] in ACCURACY) == (k is None)
        and (k is None or metric.endswith(f"@{k}"))
    ]


def _heading(metric: str) -> dict[str, str]:
    base, _, k = metric.partition("@")
    name, direction, _ = BEYOND.get(base, (base, "", ""))
    return {"name": f"{name}@{k}" if k else name, "direction": direction}


def _cell(found: Mapping[str, Any] | None, best: float | None) -> dict[str, Any] | None:
    if found is None:
        return None
    seeds = found.get("seeds") or []
    spread = statistics.stdev(seeds) if len(seeds) > 1 else None
    return {**found, "sd": spread, "best": best is not None and found["value"] == best}


def meanings(systems: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and explanation of every metric beyond accuracy that some system has."""
    there = {metric.partition("@")[0] for found in systems.values() for metric in found}
    return [(name, text) for base, (name, _, text) in BEYOND.items() if base in there]


def difference_table(
    differences: Mapping[str, Any], order: Sequence[str], k: int | None = None
) -> dict[str, Any]:
    """Reference minus each other system, best other first: accuracy, or everything else at `k`."""
    names = [name for name in order if name in differences]
    columns = _metrics({name: differences[name] for name in names}, k)
    rows = []
    for name in names:
        cells = [
            {
                **found,
                "p": p_text(found.get("p")),
                "holm": p_text(found.get("p_holm")),
                "leaves_zero_out": Point(0, found["low"], found["high"]).is_clear,
            }
            if (found := differences[name].get(metric))
            else None
            for metric in columns
        ]
        rows.append({"name": short_name(name), "cells": cells})
    headings = [_heading(c)["name"] for c in columns]
    return {"columns": headings, "rows": rows if columns else []}


def forest_charts(
    differences: Mapping[str, Any], order: Sequence[str], reference: str, k: int
) -> list[dict[str, Any]]:
    """Forest plots of the paired differences in NDCG and HR at the longest cut-off."""
    charts = []
    for metric in (f"NDCG@{k}", f"HR@{k}"):
        rows = [
            (name, Point(found["value"], found["low"], found["high"]))
            for name in order
            if (found := differences.get(name, {}).get(metric)) is not None
        ]
        if not rows:
            continue
        caption = f"{metric}: {short_name(reference)} minus each other system"
        label = "; ".join(
            f"{short_name(name)} {point_text(point, sign=True)}" for name, point in rows
        )
        key = f"forest-{metric.partition('@')[0].lower()}"
        svg = figures.forest(key, f"{caption}: {label}", rows, f"difference in {metric}")
        charts.append(chart(key, caption, svg))
    return charts


def point_text(point: Point | None, sign: bool = False) -> str:
    """A value and its interval in one line."""
    if point is None:
        return "–"
    text = number(point.value, sign=sign)
    if point.low is None or point.high is None:
        return text
    return f"{text} ({number(point.low, sign=sign)} to {number(point.high, sign=sign)})"


def curve_charts(path: Path, reference: str, order: Sequence[str]) -> list[dict[str, Any]]:
    """Recall and NDCG at every list length, read from ``curves.parquet``."""
    if not path.is_file():
        return []
    table = pl.read_parquet(path, glob=False).sort("k")
    found = {
        str(name): part
        for (name,), part in table.group_by("system", maintain_order=True)
        if name in order
    }
    return draw_curves(
        {
            name: {column: found[name][column].to_list() for column in ("k", "recall", "ndcg")}
            for name in order
            if name in found
        },
        reference,
    )


def draw_curves(curves: Mapping[str, Any], reference: str) -> list[dict[str, Any]]:
    """Figures of ``{system: {"k": […], "recall": […], "ndcg": […]}}``."""
    if not curves:
        return []
    others = [name for name in curves if name != reference]
    style = {name: i + 1 for i, name in enumerate(others)} | {reference: 0}
    charts = []
    for column, title in (("recall", "Recall"), ("ndcg", "NDCG")):
        drawn = [Line(name, c["k"], c[column], style[name]) for name, c in curves.items()]
        caption = f"{title} by length of the list"
        ends = ", ".join(f"{short_name(line.name)} {number(line.y[-1])}" for line in drawn)
        label = f"{caption}; at a length of {drawn[0].x[-1]:g}: {ends}"
        svg = figures.lines(column, label, drawn, "length of the list", title)
        lengths = sorted({k for line in drawn for k in line.x})
        at = [dict(zip(line.x, line.y, strict=True)) for line in drawn]
        rows = [[f"{k:g}", *(number(values.get(k)) for values in at)] for k in lengths]
        charts.append(
            chart(column, caption, svg, ["Length", *(short_name(n) for n in curves)], rows)
        )
    return charts


def seed_charts(systems: Mapping[str, Any], order: Sequence[str], k: int) -> list[dict[str, Any]]:
    """A dot per training seed, where some system has several."""
    charts = []
    for metric in (f"NDCG@{k}", f"HR@{k}"):
        found = {name: systems[name][metric] for name in order if metric in systems[name]}
        seeds = {name: f.get("seeds") or [f["value"]] for name, f in found.items()}
        if max(map(len, seeds.values()), default=0) < 2:
            continue
        rows = [
            (name, Point(f["value"], f["low"], f["high"]), seeds[name]) for name, f in found.items()
        ]
        caption = f"{metric} of every training seed, mean and 95% interval"
        label = "; ".join(
            f"{short_name(name)} {', '.join(map(number, seeds[name]))}" for name in found
        )
        key = f"seeds-{metric.partition('@')[0].lower()}"
        svg = figures.dots(key, f"{caption}: {label}", rows, metric)
        columns = ["System", "Seeds", "Mean (95% interval)", "Every seed"]
        numbers = [
            [
                short_name(name), str(len(values)), point_text(point),
                ", ".join(number(value) for value in values),
            ]
            for name, point, values in rows
        ]  # fmt: skip
        charts.append(chart(key, caption, svg, columns, numbers))
    return charts
