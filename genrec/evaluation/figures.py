"""Figures of the evaluation pages: small, readable on a telephone, in the page's colours.

Series differ by marker and line style (or filled and hollow bars) as well as by colour. All sizes
are CSS pixels: a figure is `WIDTH` wide, and the page scales it a little up or down.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from genrec.page import display_text, number
from genrec.svg import (
    CARD,
    FONT,
    INK,
    LINE,
    MARKED,
    QUIET,
    SERIES,
    SMALL,
    inline_svg,
    svg_style,
)

WIDTH = 360
MAX_LABEL = 125  # width of the names beside a figure's rows
MAX_POINTS = 300  # of a line; more can't be seen at this width

_FACES = ((SERIES[0], 0.4), CARD)  # bars: light enough for the interval to show, and hollow
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_DASHES: tuple[Any, ...] = (  # as Matplotlib takes them: on and off in line widths
    "-", (0, (4, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (8, 2)),
)  # fmt: skip
_STEPS = [1, 2, 5, 10]  # between ticks


@dataclass(frozen=True)
class Point:
    """A value with the interval that is drawn around it, if there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    def ends(self) -> list[float]:
        """Everything that an axis has to cover."""
        return [v for v in (self.value, self.low, self.high) if v is not None and math.isfinite(v)]

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Line:
    """A named line; `style` picks colour, marker and dashes (0 is the reference's)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int


@dataclass(frozen=True)
class Group:
    """Bars that belong together: a point per series, None where one is missing."""

    name: str
    note: str
    points: Sequence[Point | None]


def forest(key: str, label: str, rows: Sequence[tuple[str, Point]], axis: str) -> Markup:
    """Differences to a reference with their intervals; hollow where the interval covers 0.

    Args:
        key: distinguishes the figure on its page; letters, digits and hyphens.
        label: what the figure shows, for those who can't see it.
        rows: other system and difference, from top to bottom.
        axis: title of the axis.
    """
    step, left = 26, _label_width([name for name, _ in rows])
    with svg_style(key):
        figure, axes = _canvas(left + 10, 6, 14, 40, step * len(rows))
        _horizontal(axes, [*(point for _, point in rows), Point(0.0)], axis)
        axes.axvline(0, color=QUIET, linewidth=1.2)
        for i, (name, point) in enumerate(rows):
            y = step * (i + 0.5)
            _row_label(axes, name, "", y, left)
            _interval(axes, point, y, SERIES[0], 4)
            face = SERIES[0] if point.is_clear else CARD
            _dot(axes, point.value, y, SERIES[0], face, "o", 7, "difference")
        return inline_svg(figure, key, label)


def lines(
    key: str, label: str, drawn: Sequence[Line], x_axis: str, y_axis: str, zero: bool = True
) -> Markup:
    """Lines over a common axis, with a legend above.

    Args:
        key: see `forest`.
        label: see `forest`.
        drawn: the lines.
        x_axis: title of the horizontal axis.
        y_axis: title of the vertical axis.
        zero: the vertical axis starts at 0.
    """
    columns = 2 if all(_width(line.name) < WIDTH / 2 - 55 for line in drawn) else 1
    legend = 17 * math.ceil(len(drawn) / columns) + 4 if len(drawn) > 1 else 0
    with svg_style(key):
        figure, axes = _canvas(46, legend + 22, 12, 40, 190)
        for line in drawn:
            keep = max(1, math.ceil(len(line.x) / MAX_POINTS))
            colour, marker, dashes = _look(line.style)
            (artist,) = axes.plot(
                list(line.x)[::-keep][::-1], list(line.y)[::-keep][::-1],
                color=colour, linestyle=dashes, linewidth=2.2 if line.style == 0 else 1.6,
                marker=marker, markersize=5, markerfacecolor=CARD if line.style else colour,
                markevery=max(1, math.ceil(len(line.x) / keep / 10)), clip_on=False,
                zorder=4 if line.style == 0 else 3,
            )  # fmt: skip
            artist.set_gid(f"{MARKED}line")
        axes.grid(axis="y", color=LINE, linewidth=1)
        axes.spines["bottom"].set_visible(True)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))
        axes.margins(x=0.02)
        if len(places := {x for line in drawn for x in line.x}) == 1:
            (only,) = places  # else the ticks beside it would be fractions of a step
            axes.set_xlim(only - 1, only + 1)
        if zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(_fit(x_axis, 200), color=QUIET)
        height = figure.get_figheight() * 72
        top = 1 - (legend + 13) / height
        figure.text(8 / WIDTH, top, _fit(y_axis, WIDTH - 20), color=QUIET, va="baseline")
        if legend:
            _legend(figure, [_line_handle(line) for line in drawn], columns)
        return inline_svg(figure, key, label)


def bars(key: str, label: str, groups: Sequence[Group], series: Sequence[str], axis: str) -> Markup:
    """Horizontal bars with intervals: the first series filled, the second hollow.

    Args:
        key: see `forest`.
        label: see `forest`.
        groups: bars from top to bottom.
        series: one or two names.
        axis: title of the axis.
    """
    thick = 9
    wanted = _label_width([text for group in groups for text in (group.name, group.note)], WIDTH)
    above = wanted > MAX_LABEL  # long names stand above their bars instead of beside them
    step, left = (42, 10.0) if above else (34, max(wanted, 70.0) + 10)
    columns = 2 if all(_width(name) < WIDTH / 2 - 45 for name in series) else 1
    legend = 17 * math.ceil(len(series) / columns) + 6
    tall = len(groups) > 10  # then the axis is labelled at both ends
    with svg_style(key):
        figure, axes = _canvas(left, legend + 16 * tall, 14, 40, step * len(groups))
        axes.tick_params(labeltop=tall)
        points = [p for g in groups for p in g.points if p is not None]
        _horizontal(axes, [*points, Point(0.0)], axis)
        axes.axvline(0, color=QUIET, linewidth=1.2)
        for i, group in enumerate(groups):
            middle = step * (i + 0.5)
            if above:
                _label_above(axes, f"{group.name}, {group.note}", step * i + 9)
                middle += 7
            else:
                _row_label(axes, group.name, group.note, middle, left - 10)
            for j, point in enumerate(group.points):
                if point is None or not math.isfinite(point.value):
                    continue
                y = middle + thick * (j - (len(series) - 1) / 2)
                (bar,) = axes.barh(
                    y, point.value, thick - 1.5, linewidth=1.2, zorder=3,
                    facecolor=_FACES[min(j, 1)], edgecolor=SERIES[min(j, 1)],
                )  # fmt: skip
                bar.set_gid(f"{MARKED}bar")
                _interval(axes, point, y, INK, 2)
        handles = [
            Patch(
                facecolor=_FACES[min(j, 1)], edgecolor=SERIES[min(j, 1)],
                label=_fit(name, WIDTH - 40),
            )
            for j, name in enumerate(series)
        ]  # fmt: skip
        _legend(figure, handles, columns)
        return inline_svg(figure, key, label)


def dots(
    key: str, label: str, rows: Sequence[tuple[str, Point, Sequence[float]]], axis: str
) -> Markup:
    """One small dot per training seed, the mean as a bar across them, and its interval below.

    Args:
        key: see `forest`.
        label: see `forest`.
        rows: system, mean and interval, value of every seed; the first is the reference.
        axis: title of the axis.
    """
    step, left = 34, _label_width(["12 seeds", *(name for name, *_ in rows)])
    with svg_style(key):
        figure, axes = _canvas(left + 10, 6, 14, 40, step * len(rows))
        seen = [Point(v) for *_, seeds in rows for v in seeds]
        _horizontal(axes, [*seen, *(point for _, point, _ in rows)], axis)
        for i, (name, point, seeds) in enumerate(rows):
            y, colour = step * (i + 0.5), SERIES[0] if i == 0 else QUIET
            note = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
            _row_label(axes, name, note, y, left)
            _interval(axes, point, y + 7, INK, 2.5)
            axes.vlines(point.value, y - 9, y + 7, color=INK, linewidth=1.6, zorder=3)
            for value in seeds:
                _dot(axes, value, y - 3, colour, CARD, "o", 6, "seed")
        return inline_svg(figure, key, label)


def _canvas(
    left: float, top: float, right: float, bottom: float, height: float
) -> tuple[Figure, Axes]:
    """A figure whose plotting area is `height` px high inside margins in px."""
    full = top + height + bottom
    figure = Figure(figsize=(WIDTH / 72, full / 72))  # an SVG unit is 1/72 inch
    figure.patch.set_visible(False)
    box = (left / WIDTH, bottom / full, (WIDTH - left - right) / WIDTH, height / full)
    axes = figure.add_axes(box)
    axes.patch.set_visible(False)
    return figure, axes


def _horizontal(axes: Axes, points: Sequence[Point], title: str) -> None:
    """Rows from top to bottom in px, values from left to right."""
    ends = [v for point in points for v in point.ends()]
    low, high = min(ends), max(ends)
    room = 0.04 * (high - low) or 0.01
    axes.set_xlim(0 if low == 0 else low - room, 0 if high == 0 > low else high + room)
    axes.set_ylim(axes.bbox.height * 72 / axes.figure.dpi, 0)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))
    axes.grid(axis="x", color=LINE, linewidth=1)
    axes.set_xlabel(_fit(title, 200), color=QUIET)


def _row_label(axes: Axes, name: str, note: str, y: float, width: float) -> None:
    x = axes.get_xlim()[0]
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "annotation_clip": False}
    for text, down, size, colour in ((name, 6 if note else 0, FONT, INK), (note, -7, SMALL, QUIET)):
        if text:
            axes.annotate(
                _fit(text, width), (x, y), (-8, down), va="center", fontsize=size, color=colour,
                **place,
            )  # fmt: skip


def _label_above(axes: Axes, text: str, y: float) -> None:
    axes.annotate(
        _fit(text, WIDTH - 30), (axes.get_xlim()[0], y), (2, 0), textcoords="offset points",
        ha="left", va="center", color=INK, annotation_clip=False,
    )  # fmt: skip


def _interval(axes: Axes, point: Point, y: float, colour: str, cap: float) -> None:
    if point.low is None or point.high is None:
        return
    if not (math.isfinite(point.low) and math.isfinite(point.high)):
        return
    drawn = axes.hlines(y, point.low, point.high, color=colour, linewidth=1.4, zorder=4)
    drawn.set_gid(f"{MARKED}interval")
    axes.vlines([point.low, point.high], y - cap, y + cap, color=colour, linewidth=1.4, zorder=4)


def _dot(
    axes: Axes, x: float, y: float, edge: str, face: str, marker: str, size: float, kind: str
) -> None:
    (dot,) = axes.plot(
        [x], [y], marker=marker, markersize=size, markerfacecolor=face, markeredgecolor=edge,
        markeredgewidth=1.6, linestyle="", zorder=5, clip_on=False,
    )  # fmt: skip
    dot.set_gid(f"{MARKED}{kind}")


def _look(style: int) -> tuple[str, str, Any]:
    return (
        SERIES[style % len(SERIES)],
        _MARKERS[style % len(_MARKERS)],
        _DASHES[style % len(_DASHES)],
    )


def _line_handle(line: Line) -> Line2D:
    colour, marker, dashes = _look(line.style)
    return Line2D(
        [], [], color=colour, marker=marker, linestyle=dashes, label=_fit(line.name, WIDTH - 60),
        linewidth=2.2 if line.style == 0 else 1.6, markersize=5,
        markerfacecolor=CARD if line.style else colour,
    )  # fmt: skip


def _legend(figure: Figure, handles: Sequence[Line2D | Patch], columns: int) -> None:
    for handle in handles:
        name = str(handle.get_label())
        if name.startswith("_"):  # Matplotlib leaves such names out
            handle.set_label(f" {name}")
    figure.legend(
        handles=list(handles), loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=columns,
        handlelength=2.6, columnspacing=1.4, labelspacing=0.35, borderaxespad=0, borderpad=0.25,
        handletextpad=0.6,
    )  # fmt: skip


def _tick(value: float) -> str:
    """A tick label without trailing zeros: 0.05, 1,000, −0.02, 5e−6."""
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    if 0 < abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")
    text = number(value, 6)
    return text.rstrip("0").rstrip(".") if "." in text else text


def _width(text: str) -> float:
    """About how wide a text is, in px at `FONT`; on the wide side, since readers' fonts differ."""
    return FONT * sum(
        1.05
        if unicodedata.east_asian_width(c) in "WF" or c in "MW@%—"
        else 0.75
        if c.isupper()
        else 0.6
        for c in text
    )


def _label_width(names: Sequence[str], most: float = MAX_LABEL) -> float:
    return min(most, max((_width(display_text(name)) for name in names if name), default=0))


def _fit(text: str, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than `width`."""
    text = display_text(text)
    if _width(text) <= width:
        return text
    while text and _width(text) + FONT > width:
        text = text[:-1]
    return text.rstrip() + "…"
