"""Curves of a training: what was logged and measured, as charts of a page or as one picture.

``curves.svg`` in a stage's folder is drawn anew after every validation and at the end. It is a help
for whoever watches the training, so nothing that goes wrong with it ends the training.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from genrec.artifacts import write_text
from genrec.evaluation import figures
from genrec.evaluation.figures import Line
from genrec.page import display_text, number, stylesheet

logger = logging.getLogger(__name__)

CURVES = "curves.svg"
STAGES = {"sft": "Supervised fine-tuning", "grpo": "Reinforcement learning (GRPO)"}

# Series of the trainer's log that say how a training goes, in the order of their panels. A name
# that ends in a slash stands for all that begin with it.
LOGGED = (
    "reward", "rewards/", "hits_per_group", "groups_without_hit", "frac_reward_zero_std",
    "zero_advantage", "entropy", "level_entropy/", "valid_mass/", "invalid", "kl", "sft_loss",
    "loss", "learning_rate", "grad_norm", "mean_token_accuracy",
)  # fmt: skip
_AXES = {"learning_rate": "learning rate", "grad_norm": "norm of the gradient",
    "mean_token_accuracy": "token accuracy", "frac_reward_zero_std": "share of groups",
    "rewards/": "reward", "kl": "KL divergence", "hits_per_group": "hits",
    "groups_without_hit": "share of groups", "zero_advantage": "share of groups",
    "level_entropy/": "entropy", "valid_mass/": "probability",
    "invalid": "share of completions"}  # fmt: skip
_TITLES = {"learning_rate": "learning rate", "grad_norm": "gradient norm",
    "mean_token_accuracy": "training token accuracy", "loss": "training loss",
    "frac_reward_zero_std": "groups without a difference in reward",
    "kl": "distance from the reference", "rewards/": "rewards by function",
    "sft_loss": "supervised loss on the targets",
    "entropy": "entropy of the policy", "hits_per_group": "hits per group",
    "groups_without_hit": "groups without a hit",
    "zero_advantage": "groups without an advantage",
    "level_entropy/": "entropy by level of the SID",
    "valid_mass/": "probability of what the trie allows, by level",
    "invalid": "completions that are no item"}  # fmt: skip
_VARIABLE = re.compile(r"var\((--[\w-]+)\)")
_BOX = re.compile(r'viewBox="0 0 ([\d.]+) ([\d.]+)"')
_MARGIN, _GAP, _HEAD, _TITLE = 16, 28, 40, 24  # px


@dataclass(frozen=True)
class Curve:
    """What one chart shows.

    Attributes:
        key: distinguishes it among those of the stage.
        title: what it is.
        axis: title of the vertical axis.
        points: name of each line -> its (step, value), finite ones alone.
        left_out: values that are not finite, such as a loss of NaN.
    """

    key: str
    title: str
    axis: str
    points: Mapping[str, list[tuple[int, float]]]
    left_out: int = 0

    @property
    def lines(self) -> list[Line]:
        """As `genrec.evaluation.figures.lines` takes them."""
        return [
            Line(
                display_text(name.upper() if "@" in name else name, 30),
                [step for step, _ in found],
                [value for _, value in found],
                i,
            )
            for i, (name, found) in enumerate(self.points.items())
        ]

    def draw(self, key: str, title: str) -> Markup:
        """The chart as inline SVG.

        Args:
            key: distinguishes it on its page.
            title: begins its description.
        """
        drawn = self.lines
        label = "; ".join(
            f"{line.name} from {number(line.y[0])} at step {line.x[0]:,} "
            f"to {number(line.y[-1])} at step {line.x[-1]:,}"
            for line in drawn
        )
        lowest = min(min(line.y) for line in drawn)
        return figures.lines(
            key, f"{title}: {label}", drawn, "training step", self.axis, zero=lowest >= 0
        )


def training_curves(
    validation: Sequence[Mapping[str, Any]], log: Sequence[Mapping[str, Any]]
) -> list[Curve]:
    """Charts of a training: validation metrics first, then `LOGGED`; those that have values.

    Args:
        validation: entries of ``validation.json``.
        log: entries of ``log.json`` (the trainer's ``log_history``).
    """
    measured = list(dict.fromkeys(n for v in validation for n in v if n not in ("step", "epoch")))
    curves = [_curve("validation", "validation metrics", "metric", validation, measured)]
    there = list(dict.fromkeys(name for entry in log for name in entry))
    for name in LOGGED:
        names = [name] if name in there else []
        if name.endswith("/"):
            names = [n for n in there if n.startswith(name)]
            if name == "rewards/":  # the spread within a group is another matter than the mean
                names = [n for n in names if n.endswith("/mean")]
        key = name.rstrip("/").replace("_", "-")
        title = _TITLES.get(name, f"training {name}")
        curves.append(_curve(key, title, _AXES.get(name, name), log, names))
    return [curve for curve in curves if curve.points]


def _curve(
    key: str, title: str, axis: str, entries: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Curve:
    points, left_out = {}, 0
    for name in names:
        found = [(e["step"], e[name]) for e in entries if "step" in e and _is_number(e.get(name))]
        finite = [(step, float(value)) for step, value in found if math.isfinite(value)]
        left_out += len(found) - len(finite)
        if finite:
            points[_line_name(name)] = finite
    return Curve(key, title, axis, points, left_out)


def _line_name(name: str) -> str:
    prefix, slash, rest = name.partition("/")
    if slash and rest.isdigit():
        return f"level {rest}"
    return name.removeprefix("rewards/").removesuffix("/mean")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def curves_picture(title: str, curves: Sequence[Curve]) -> str:
    """All charts in one SVG file that any viewer shows: two columns, fixed light colours.

    Args:
        title: stands on top.
        curves: at least one chart.
    """
    panels = [(curve, curve.draw(f"c{i}", curve.title)) for i, curve in enumerate(curves)]
    columns = min(2, len(panels))
    width = 2 * _MARGIN + columns * figures.WIDTH + (columns - 1) * _GAP
    top, body = float(_HEAD + _MARGIN), []
    for start in range(0, len(panels), columns):
        row = panels[start : start + columns]
        tallest = max(_size(svg)[1] for _, svg in row)
        for place, (curve, svg) in enumerate(row):
            left = _MARGIN + place * (figures.WIDTH + _GAP)
            note = ""
            if curve.left_out:
                values = "value is" if curve.left_out == 1 else "values are"
                note = f" ({curve.left_out:,} {values} not finite)"
            head = escape(display_text(curve.title[:1].upper() + curve.title[1:] + note, 70))
            body.append(f'<text x="{left + 8}" y="{top:g}" class="title">{head}</text>')
            wide, tall = _size(svg)
            # Lower ends meet, so that the steps of neighbours stand at one height.
            at = top + _TITLE / 2 + tallest - tall
            place_of = f'<svg x="{left}" y="{at:g}" width="{wide:g}" height="{tall:g}" '
            body.append(place_of + str(svg).removeprefix("<svg "))
        top += _TITLE + tallest + _GAP
    height = top - _GAP
    text = "".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img">',
            f"<title>{escape(display_text(title))}</title>",
            "<style>text { font-family: system-ui, 'Segoe UI', Roboto, sans-serif; } "
            ".heading { font-size: 18px; font-weight: 600; fill: var(--ink); } "
            ".title { font-size: 13px; font-weight: 600; fill: var(--ink); }</style>",
            f'<rect width="{width:g}" height="{height:g}" fill="var(--card)"/>',
            f'<text x="{_MARGIN + 8}" y="30" class="heading">{escape(display_text(title))}</text>',
            *body,
            "</svg>\n",
        ]
    )
    colours = _light_colours()
    # href of a file of its own needs its namespace; on pages the HTML parser knows it.
    text = text.replace(" href=", " xlink:href=")
    return _VARIABLE.sub(lambda found: colours[found[1]], text)


def _size(svg: str) -> tuple[float, float]:
    found = _BOX.search(svg)
    assert found is not None, "a chart's drawing says how large it is"
    return float(found[1]), float(found[2])


def _light_colours() -> dict[str, str]:
    """The page's variables on white; viewers of pictures don't know variables."""
    light = stylesheet().partition("}")[0]
    return dict(re.findall(r"(--[\w-]+): *(#[0-9a-fA-F]+);", light))


def write_curves(
    folder: Path | str,
    stage: str,
    validation: Sequence[Mapping[str, Any]],
    log: Sequence[Mapping[str, Any]],
) -> Path | None:
    """Draw ``curves.svg`` into a stage's folder, atomically; None where there is nothing to draw.

    Whatever fails is a warning: no training ends for its picture.
    """
    path = Path(folder) / CURVES
    try:
        curves = training_curves(validation, log)
        if not curves:
            return None
        write_text(path, curves_picture(STAGES.get(stage, stage), curves))
    except Exception as error:
        logger.warning("the training curves were not drawn (%s): %s", path, error)
        return None
    return path
