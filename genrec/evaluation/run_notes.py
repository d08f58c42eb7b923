"""What a run's page shows beside its scores: training, lists to look at, the rules, the reads.

Each function reads one optional file and returns what the template prints, all text made safe to
show (see `genrec.page.display_text`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from genrec.artifacts import read_json
from genrec.evaluation.curves import STAGES, Curve, training_curves
from genrec.evaluation.page_parts import chart
from genrec.page import display_text, number

MAX_ROWS = 60  # of a training curve's table
MAX_TARGETS = 10  # of an example
SHOWN_CHARS = 60  # of names and ids
_COUNTED = {
    "targets_seen_before": (
        "Seen targets",
        "targets were in the user's past; where seen items are left out they are misses for all",
    ),
    "rows_without_list": ("Missing lists", "rows had no list: misses"),
    "unknown_items": ("Unknown items", "recommended items are not in the catalogue: misses"),
    "ignored_lists": ("Ignored lists", "lists belong to rows or users that are not evaluated"),
    "tied_lists": ("Equal scores", "lists hold equal scores, whose items stand in a random order"),
}
_STATUS = {"ok": ("✓", "ok"), "look": ("!", "look"), "bad": ("✗", "bad")}


def training_charts(run_dir: Path) -> list[dict[str, Any]]:
    """Validation metrics and training loss (or reward) of the stages that left them."""
    charts = []
    for stage, title in STAGES.items():
        found = {
            curve.key: curve
            for curve in training_curves(
                _json(run_dir / stage / "validation.json") or [],
                _json(run_dir / stage / "log.json") or [],
            )
        }
        # The loss of GRPO says nothing beside its reward; what else is logged is in the picture.
        for key in ("validation", "reward" if "reward" in found else "loss"):
            if key in found:
                charts.append(_training_chart(f"{stage}-{key}", title, found[key]))
    return charts


def run_curves(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Several runs' validation NDCG@10 while they trained, one chart per stage.

    Args:
        runs: ``system`` and ``training``, stage -> (step, value), of each.
    """
    charts = []
    for stage, title in STAGES.items():
        points = {
            f"{number}: {run['system']}": [(int(step), float(value)) for step, value in found]
            for number, run in enumerate(runs, start=1)
            if (found := run["training"].get(stage))
        }
        if points:
            curve = Curve("validation", "validation NDCG@10 of each run", "NDCG@10", points)
            charts.append(_training_chart(f"{stage}-validation", title, curve))
    return charts


def _training_chart(key: str, stage: str, curve: Curve) -> dict[str, Any]:
    drawn, caption = curve.lines, f"{stage}: {curve.title}"
    steps = sorted({step for line in drawn for step in line.x})
    steps = steps[:: math.ceil(len(steps) / MAX_ROWS)]
    at = [dict(zip(line.x, line.y, strict=True)) for line in drawn]
    rows = [[f"{step:,}", *(number(values.get(step)) for values in at)] for step in steps]
    names = [line.name for line in drawn]
    return chart(key, caption, curve.draw(key, caption), ["Step", *names], rows)


def example_cards(path: Path, reference: str) -> list[dict[str, Any]]:
    """Histories, what came next, and the lists, from ``examples.json``."""
    cards = []
    for example in _json(path) or []:
        lists = {
            system: [{**_item(item), "hit": bool(item["hit"])} for item in items]
            for system, items in example["lists"].items()
        }
        cards.append(
            {
                "user": display_text(example["user_id"], SHOWN_CHARS),
                "row": display_text(example["row_id"], SHOWN_CHARS),
                "history": [_item(item) for item in example["history"]],
                "targets": [_item(item) for item in example["targets"][:MAX_TARGETS]],
                "more_targets": max(0, len(example["targets"]) - MAX_TARGETS),
                "lists": [
                    {
                        "system": display_text(system, SHOWN_CHARS),
                        "ours": system == reference,
                        "items": items,
                        "ranks": [i + 1 for i, item in enumerate(items) if item["hit"]],
                    }
                    for system, items in lists.items()
                ],
            }
        )
    return cards


def _item(item: Mapping[str, Any]) -> dict[str, Any]:
    categories = item.get("categories") or []
    title = item.get("title")
    return {
        "title": display_text(title) if title is not None else "(no title)",
        "id": display_text(item["item_id"], SHOWN_CHARS),
        "categories": display_text(", ".join(map(str, categories)), 90) if categories else "",
    }


def items_ranked(metrics: Mapping[str, Any]) -> str:
    """Out of how many items the lists were made: all, or what an allow- or deny-list left."""
    of_all, restricted = f"{metrics['items']:,} items", metrics.get("restricted")
    if restricted is None:
        return f"all {of_all}"
    left = restricted["items"]
    return f"{'some' if left is None else f'{left:,}'} of {of_all}"


def protocol_facts(metrics: Mapping[str, Any]) -> dict[str, str]:
    """How it was measured, label by label."""

    def said(key: str) -> str:
        return str(metrics.get(key) or "not stated")

    counted = f"{metrics['rows']:,} rows"
    counted += f" of {metrics['users']:,} users" if "users" in metrics else ""
    restricted = metrics.get("restricted") or {}
    lists = " and the ".join(f"{name}-list" for name in ("allow", "deny") if name in restricted)
    left = f" (what recommend's {lists} left)" if lists else ""
    facts = {
        "Dataset": said("dataset"),
        "Split": f"{metrics['split']}, {said('protocol')}; {counted}",
        "Order in time": said("tie_rule"),
        "Ratings": said("rating_rule"),
        "Ranked": f"{items_ranked(metrics)} of the catalogue{left}, no sampled negatives",
        "Seen items": "left out of every list"
        if metrics["filter_seen"]
        else "may be recommended again",
        "Baselines": f"fitted on the {said('fit_on')} rows"
        if not restricted
        else "left out: they rank all items",
        "Intervals": f"{said('interval')}; {metrics['samples']:,} samples",
        "p-values": f"paired randomisation test, {metrics['permutations']:,} draws of signs, "
        "two-sided, 0.05 taken as the limit"
        if "permutations" in metrics
        else "none",
        "Random seed": f"{metrics['seed']} (intervals and tests)",
    }
    for key, (label, text) in _COUNTED.items():
        if metrics.get(key):
            facts[label] = f"{metrics[key]:,} {text}"
    return {label: display_text(text, 400) for label, text in facts.items()}


def baseline_settings(
    baselines: Mapping[str, Mapping[str, Any]], not_run: Mapping[str, str]
) -> list[dict[str, str]]:
    """Name, settings in words and seconds of every baseline, and why others are missing."""
    rows = []
    for name, how in baselines.items():
        parts = [str(how["description"])] if how.get("description") else []
        known = ("description", "seconds", "trials", "grid", "chosen")
        parts += [
            f"{key.replace('_', ' ')} {number(value, 4) if isinstance(value, float) else value}"
            for key, value in how.items()
            if key not in known and not isinstance(value, dict | list)
        ]
        if isinstance(how.get("trials"), list):
            parts.append(f"best of {len(how['trials'])} settings tried on the validation rows")
        if edges := how.get("at_grid_edge"):
            names = ", ".join(map(str, edges))
            parts.append(f"at the edge of what was tried: {names} (wider trials might find better)")
        seconds = how.get("seconds")
        rows.append(
            {
                "name": display_text(name, SHOWN_CHARS),
                "settings": display_text("; ".join(parts) or "no settings", 400),
                "seconds": "–" if seconds is None else f"{seconds:,.1f}",
            }
        )
    for name, reason in not_run.items():
        text = display_text(f"left out: {reason}", 400)
        rows.append({"name": display_text(name, SHOWN_CHARS), "settings": text, "seconds": "–"})
    return rows


def split_reads(path: Path, split_sha256: str) -> dict[str, Any] | None:
    """Every noted read of the test split; None where none was noted.

    Lines that can't be read (a writer was killed) are counted, not hidden.
    """
    if not path.is_file():
        return None
    rows, damaged = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            read = json.loads(line)
            rows.append(
                {
                    "time": display_text(str(read["time"])[:19].replace("T", " ")),
                    "stage": display_text(read["stage"], 30),
                    "system": display_text(read.get("system") or "–", SHOWN_CHARS),
                    "rows": f"{read['rows']:,}",
                    "same": read["split_sha256"] == split_sha256,
                    "sha256": display_text(read["split_sha256"], 64),
                }
            )
        except (ValueError, KeyError, TypeError):
            damaged += 1
    return {"rows": rows, "damaged": damaged, "same": sum(row["same"] for row in rows)}


def doctor_checks(path: Path) -> list[dict[str, str]]:
    """The doctor's checks, worst first."""
    checks = (_json(path) or {}).get("checks", [])
    order = ["bad", "look"]
    checks = sorted(
        checks, key=lambda c: order.index(c["status"]) if c["status"] in order else len(order)
    )
    rows = []
    for check in checks:
        mark, kind = _STATUS.get(check["status"], ("–", "none"))
        value = check.get("value")
        rows.append(
            {
                "name": display_text(check["name"], 80),
                "value": number(value, 3) if isinstance(value, float) else _plain(value),
                "status": f"{mark} {display_text(check['status'], 20)}",
                "kind": kind,
                "meaning": _plain(check.get("meaning"), 400),
                "advice": _plain(check.get("advice"), 400),
            }
        )
    return rows


def _plain(value: object, max_chars: int = 80) -> str:
    return "–" if value in (None, "") else display_text(value, max_chars)


def _json(path: Path) -> Any:
    return read_json(path) if path.is_file() else None
