"""The dataset card as a page (see `genrec.page`).

It is made from the dictionary of `genrec.tasks.card.dataset_card` alone, so that a stored
``card.json`` gives the same page again. All that comes from the data is shown as text. The tables
and sentences also serve `genrec.tasks.card_readme`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from genrec.page import display_text, environment, number
from genrec.svg import INK, LINE, MARKED, QUIET, SERIES, SMALL, inline_svg, svg_style
from genrec.tasks.families import INTERACTION, ITEM, SPLIT_ROW

MAX_TEXT = 2_000  # characters of a prompt or completion on the page

_WIDTH = 360  # px, as wide as a telephone
_SID = re.compile(r"(<a_\d+>(?:<(?!a_)[a-z]+_\d+>)*)")
_UNITS = {SPLIT_ROW: "history", INTERACTION: "interaction", ITEM: "catalogue item"}
_ASKS = {
    "sids": "a SID", "title": "a title", "description": "a description",
    "title and description": "a title and a description", "sid and title": "a SID and a title",
    "history": "SIDs of a history", "chain": "a step of reasoning",
    "chain and sid": "reasoning, then a SID", "rating": "a rating", "text": "a text",
}  # fmt: skip
_DATA = {
    "users": "Users", "items": "Items", "interactions": "Interactions", "density": "Density",
    "mean_length": "Interactions per user, mean", "median_length": "Interactions per user, median",
    "protocol": "Split",
}  # fmt: skip

COUNTED = (
    "Prompt and completion are counted as they are trained on, encoded apart, without marks of "
    "beginning and end; a SID token counts one."
)
ORIGINS = (
    "Queries, intentions and preferences come from the data, from rules, or from a language model "
    "(llm: and its name). Rows without such a text are not counted."
)
LEAKS = (
    "Rows of histories and interactions are made from the training part of the split, rows of "
    "items from the catalogue. A prompt can show only the fields that its family lists. They hold "
    "what the user had before the target, but for the fields below, which show something of the "
    "target by definition. Validation, test and RL prompts are of the sequential family and show "
    "the history alone."
)


def render_card_page(card: Mapping[str, Any]) -> str:
    """The page.

    Args:
        card: from `genrec.tasks.card.dataset_card`, or read back from its JSON.
    """
    lengths = card["lengths"]
    kinds = {family["name"]: _asks(family) for family in card["families"]}
    return (
        environment()
        .get_template("tasks/card.html.jinja")
        .render(
            name=display_text(card["name"]),
            n_rows=card["rows"],
            others=other_splits(card),
            summary=summary(card),
            families=family_rows(card),
            switched_off=card["switched_off"],
            charts=_charts(card["lengths"]),
            lengths=length_table(card),
            tokenizer=tokenizer_name(card),
            measured_rows=lengths and lengths["most_per_family"],
            complete=lengths and lengths["overall"]["measured"] == card["rows"],
            origins=origin_table(card),
            leaks=leak_table(card),
            reasoning=reasoning_facts(card),
            examples=[_example(example, kinds[example["family"]]) for example in card["examples"]],
            made=settings(card),
            data=data_facts(card),
            prompts_sha256=card["prompts_sha256"],
            counted=COUNTED,
            origin_words=ORIGINS,
            leak_words=LEAKS,
        )
    )


def other_splits(card: Mapping[str, Any]) -> str:
    """Rows of the other splits in words."""
    words = {"valid": "validation", "test": "test", "rl": "RL"}
    parts = [f"{card['splits'][s]:,} {word}" for s, word in words.items() if s in card["splits"]]
    return ", ".join(parts)


def summary(card: Mapping[str, Any]) -> list[str]:
    """The few sentences that stand on top."""
    on = [family for family in card["families"] if family["rows"]]
    said = []
    if on:
        first, largest = on[0], max(on, key=lambda family: family["rows"])
        words = f"{_families(len(on))}. The largest, {largest['name']}, holds "
        words += f"{_percent(largest['share'])} of the rows"
        if first is not largest and first["unit"] == SPLIT_ROW:
            words += f"; {first['name']}, the one that is served, {_percent(first['share'])}"
        said.append(f"{words}.")
    if empty := [family["name"] for family in card["families"] if not family["rows"]]:
        said.append(f"On, but without any row: {', '.join(empty)}.")
    if off := len(card["switched_off"]):
        said.append(f"{_families(off)} switched off, since the data lack what they need.")
    if lengths := card["lengths"]:
        part = lengths["overall"]
        said.append(
            f"Half of the rows have up to {part['p50']:,} tokens, 95% up to {part['p95']:,}; the "
            f"longest that was measured has {part['longest']:,}. All rows together have "
            f"about {_round(lengths['tokens'])} tokens."
        )
    if card["keep_rows"]:
        said.append("Training rows were chosen beforehand (keep_rows).")
    return said


def _families(count: int) -> str:
    return f"{count} {'family' if count == 1 else 'families'}"


def _round(value: int) -> str:
    """A large number with three digits."""
    for size, word in ((10**9, " billion"), (10**6, " million")):
        if value >= size:
            return f"{value / size:.3g}{word}"
    return f"{float(f'{value:.3g}'):,.0f}"


def _percent(share: float) -> str:
    """A share in percent; small ones keep two digits."""
    percent = 100 * share
    if 0 < percent < 0.001:
        return "<0.001%"
    return f"{number(percent, 1 if percent >= 0.1 or percent == 0 else 3)}%"


def _asks(family: Mapping[str, Any]) -> str:
    """What the completion is; a history in one pass asks for item after item."""
    if family["unit"] == SPLIT_ROW:
        return "SIDs, one after the other"
    return _ASKS.get(family["target_kind"], family["target_kind"])


def _words(names: Sequence[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in names) or "–"


def family_rows(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per family, with the length of its bar."""
    widest = max((family["share"] for family in card["families"]), default=0) or 1
    return [
        {
            "name": family["name"],
            "unit": _UNITS[family["unit"]],
            "shows": _words(family["prompt"]),
            "asks": _asks(family),
            "rows": f"{family['rows']:,}",
            "share": _percent(family["share"]),
            "width": f"{100 * family['share'] / widest:.1f}",
            "templates": f"{family['templates']:,}",
        }
        for family in card["families"]
    ]


Table = dict[str, list[Any]]  # columns and rows of text


def length_table(card: Mapping[str, Any]) -> Table:
    """Quantiles in tokens, of all rows and of each family."""
    columns = ["Family", "p50", "p95", "Longest", "Mean", "Mean of completion", "Rows measured"]
    lengths = card["lengths"] or {"families": {}}
    parts = dict(lengths["families"])
    if parts:
        parts = {"All rows": lengths["overall"], **parts}
    rows = [
        [
            name, f"{part['p50']:,}", f"{part['p95']:,}", f"{part['longest']:,}",
            number(part["mean"], 1), number(part["mean_completion"], 1), f"{part['measured']:,}",
        ]
        for name, part in parts.items()
    ]  # fmt: skip
    return {"columns": columns, "rows": rows}


def tokenizer_name(card: Mapping[str, Any]) -> str:
    """Which tokenizer measured the lengths; empty if none did."""
    lengths = card["lengths"]
    return display_text(lengths["tokenizer"] or "not named") if lengths else ""


def origin_table(card: Mapping[str, Any]) -> Table:
    """Shares of rows by the origin of their text: families in rows, origins in columns."""
    origins = list(card["text_origin"])
    total = sum(card["text_origin"].values())
    parts = {f["name"]: (f["text_origin"], f["rows"]) for f in card["families"] if f["text_origin"]}
    if len(parts) > 1:
        parts = {"All of them": (card["text_origin"], total), **parts}
    rows = [
        [name, f"{n:,}", *(_percent(counts.get(origin, 0) / n) for origin in origins)]
        for name, (counts, n) in parts.items()
    ]
    return {"columns": ["Family", "Rows", *map(display_text, origins)], "rows": rows}


def leak_table(card: Mapping[str, Any]) -> Table:
    """What prompts show of their targets, family by family."""
    rows = [
        [family["name"], _UNITS[family["unit"]], _words(family["shows_target"]),
            _asks(family)]
        for family in card["families"]
        if family["shows_target"]
    ]  # fmt: skip
    return {"columns": ["Family", "Made of", "Shown of the target", "Asks for"], "rows": rows}


def reasoning_facts(card: Mapping[str, Any]) -> dict[str, str] | None:
    """What reasoning rows are, None without any."""
    names = [family["name"] for family in card["families"] if family["reasoning"]]
    if not names:
        return None
    saw = card["trained_on_target"]
    return {
        "families": ", ".join(names),
        "origin": display_text(card["rationale_origin"]),
        "trained_on_target": "yes" if saw else "no",
        "words": "Their chains were made with the target in sight: what they explain was known."
        if saw
        else "Their chains were made from the history and the catalogue, without the target.",
    }


def _example(example: Mapping[str, Any], asks: str) -> dict[str, Any]:
    def items(name: str) -> list[dict[str, str]]:
        return [
            {"title": display_text(item["title"]), "sid": item["sid"]} for item in example[name]
        ]

    origin = example["text_origin"]
    return {
        "family": example["family"],
        "asks": asks,
        "row_id": display_text(example["row_id"]),
        "template": display_text(example["template"]),
        "origin": display_text(origin) if origin else "",
        "prompt": _pieces(example["prompt"]),
        "completion": _pieces(example["completion"]),
        "history": items("history"),
        "earlier": example["n_history"] - len(example["history"]),
        "targets": items("targets"),
        "further": example["n_targets"] - len(example["targets"]),
    }


def _pieces(text: str) -> list[tuple[bool, str]]:
    """The text in pieces: SIDs (True), which a line must not break, and what is between them."""
    parts = _SID.split(display_text(text, MAX_TEXT)) if text else ["(nothing)"]
    return [(place % 2 == 1, part) for place, part in enumerate(parts) if part]


def settings(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Seed and templates."""
    most = card["n_templates"]
    return [
        ("Seed", str(card["seed"])),
        (
            "Templates",
            "all seen ones" if most is None else f"the first {most} seen ones per family",
        ),
        ("Serving template", display_text(card["serving_template"])),
    ]


def data_facts(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Statistics of the prepared data that have a name here; the rest is in the JSON."""
    return [
        (label, _value(card["data"][key])) for key, label in _DATA.items() if key in card["data"]
    ]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else display_text(value)


def _charts(lengths: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Of all rows, then of each family."""
    if not lengths:
        return []
    parts = {"All rows": lengths["overall"], **lengths["families"]}
    return [_chart(f"length-{i}", n, lengths, part) for i, (n, part) in enumerate(parts.items())]


def _chart(
    key: str, name: str, lengths: Mapping[str, Any], part: Mapping[str, Any]
) -> dict[str, Any]:
    said = f"p50 {part['p50']:,}, p95 {part['p95']:,}, longest {part['longest']:,} tokens"
    svg = _draw(key, f"Rows of {name} by length: {said}", lengths["edges"], part)
    return {"key": key, "name": name, "said": said, "svg": svg}


def _draw(key: str, label: str, edges: Sequence[int], part: Mapping[str, Any]) -> Markup:
    """A histogram of lengths as shares of the rows, with lines at p50 and p95.

    The axis is logarithmic, and the same for all families: they compare at a glance.
    """
    top, left, right, bottom, height = 22, 44, 32, 38, 80
    full = top + height + bottom
    shares = np.asarray(part["histogram"], dtype=float) / max(sum(part["histogram"]), 1)
    places = np.log2(edges)
    with svg_style(key):
        figure = Figure(figsize=(_WIDTH / 72, full / 72))  # an SVG unit is 1/72 inch
        figure.patch.set_visible(False)
        box = (left / _WIDTH, bottom / full, (_WIDTH - left - right) / _WIDTH, height / full)
        axes = figure.add_axes(box)
        axes.patch.set_visible(False)
        drawn = axes.stairs(
            shares, places, fill=True, facecolor=(SERIES[0], 0.4), edgecolor=SERIES[0],
            linewidth=1.2, zorder=3,
        )  # fmt: skip
        drawn.set_gid(f"{MARKED}lengths")
        for quantile, style, side, shift in (
            ("p50", "-", "right", -4),
            ("p95", (0, (4, 2)), "left", 4),
        ):
            at = np.log2(max(part[quantile], 1))
            axes.axvline(at, color=INK, linewidth=1.2, linestyle=style, zorder=4)
            axes.annotate(
                quantile, (at, 1), (shift, 2), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha=side, va="bottom", fontsize=SMALL, color=INK,
            )  # fmt: skip
        axes.set_xlim(places[0], places[-1])
        axes.set_ylim(0, 1.06 * shares.max() or 1)
        axes.grid(axis="y", color=LINE, linewidth=1)
        axes.spines["bottom"].set_visible(True)
        powers = np.arange(np.ceil(places[0]), np.floor(places[-1]) + 1)
        axes.set_xticks(powers[:: max(1, len(powers) // 6)] if len(powers) > 1 else places)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{2**value:,.0f}"))
        axes.yaxis.set_major_locator(MaxNLocator(2))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        axes.set_xlabel(
            "tokens of prompt and completion (logarithmic)", color=QUIET, fontsize=SMALL
        )
        return inline_svg(figure, key, label)
