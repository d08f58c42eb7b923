"""The dataset card for people: a page (see `genrec.page`) and a Hugging Face dataset card.

Both are made from the dictionary of `genrec.tasks.card.dataset_card` alone, so that a stored
``card.json`` gives the same page again. All that comes from the data is shown as text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from genrec.page import display_text, environment, number
from genrec.svg import INK, LINE, MARKED, QUIET, SERIES, SMALL, inline_svg, svg_style
from genrec.tasks.families import INTERACTION, ITEM, SPLIT_ROW

MAX_TEXT = 2_000  # characters of a prompt or completion on the page

_WIDTH = 360  # px, as wide as a telephone
_SID = re.compile(r"(<a_\d+>(?:<(?!a_)[a-z]+_\d+>)*)")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")
_UNITS = {SPLIT_ROW: "history", INTERACTION: "interaction", ITEM: "catalogue item"}
_ASKS = {
    "sids": "SIDs", "sid and title": "SID and title", "history": "SIDs of a history",
    "chain": "a step of reasoning", "chain and sid": "reasoning, then a SID",
    "rating": "a rating", "text": "a text",
}  # fmt: skip
_DATA = {
    "users": "Users", "items": "Items", "interactions": "Interactions", "density": "Density",
    "mean_length": "Interactions per user, mean", "median_length": "Interactions per user, median",
    "protocol": "Split",
}  # fmt: skip
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip


def render_card_page(card: Mapping[str, Any]) -> str:
    """The page.

    Args:
        card: from `genrec.tasks.card.dataset_card`, or read back from its JSON.
    """
    lengths = card["lengths"]
    return (
        environment()
        .get_template("tasks/card.html.jinja")
        .render(
            name=display_text(card["name"]),
            n_rows=card["rows"],
            others=_others(card),
            summary=_summary(card),
            families=_family_rows(card),
            switched_off=card["switched_off"],
            overall=_chart("all", "All rows", lengths, lengths["overall"], 130)
            if lengths
            else None,
            charts=[
                _chart(f"length-{i + 1}", name, lengths, part, 70)
                for i, (name, part) in enumerate(lengths["families"].items())
            ]
            if lengths
            else [],
            lengths=_length_table(card),
            tokenizer=_tokenizer(card),
            complete=lengths and lengths["overall"]["measured"] == card["rows"],
            origins=_origin_table(card),
            leaks=_leak_table(card),
            reasoning=_reasoning(card),
            examples=[_example(example) for example in card["examples"]],
            made=_made(card),
            data=_data_facts(card),
            prompts_sha256=card["prompts_sha256"],
            counted=COUNTED,
            origin_words=ORIGINS,
            leak_words=LEAKS,
        )
    )


def _others(card: Mapping[str, Any]) -> str:
    """Rows of the other splits in words."""
    words = {"valid": "validation", "test": "test", "rl": "RL"}
    parts = [f"{card['splits'][s]:,} {word}" for s, word in words.items() if s in card["splits"]]
    return ", ".join(parts)


def _summary(card: Mapping[str, Any]) -> list[str]:
    """The few sentences that stand on top."""
    on = [family for family in card["families"] if family["rows"]]
    said = []
    if on:
        largest = max(on, key=lambda family: family["rows"])
        said.append(
            f"{_families(len(on))}; the largest, {largest['name']}, holds "
            f"{_percent(largest['share'])} of the rows."
        )
    if empty := [family["name"] for family in card["families"] if not family["rows"]]:
        said.append(f"On, but without any row: {', '.join(empty)}.")
    if off := len(card["switched_off"]):
        said.append(f"{_families(off)} switched off, since the data lack what they need.")
    if lengths := card["lengths"]:
        part = lengths["overall"]
        said.append(
            f"Half of the rows have up to {part['p50']:,} tokens, 95% up to {part['p95']:,}; the "
            f"longest that was measured has {part['longest']:,}. An epoch has about "
            f"{_round(lengths['tokens'])} tokens."
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
    return f"{value:,}"


def _percent(share: float) -> str:
    """A share in percent; small ones keep two digits."""
    percent = 100 * share
    if 0 < percent < 0.001:
        return "<0.001%"
    return f"{number(percent, 1 if percent >= 0.1 or percent == 0 else 3)}%"


def _asks(kind: str) -> str:
    return _ASKS.get(kind, kind)


def _words(names: Sequence[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in names) or "–"


def _family_rows(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per family, with the length of its bar."""
    widest = max((family["share"] for family in card["families"]), default=0) or 1
    return [
        {
            "name": family["name"],
            "unit": _UNITS[family["unit"]],
            "shows": _words(family["prompt"]),
            "asks": _asks(family["target_kind"]),
            "rows": f"{family['rows']:,}",
            "share": _percent(family["share"]),
            "width": f"{100 * family['share'] / widest:.1f}",
            "templates": f"{family['templates']:,}",
        }
        for family in card["families"]
    ]


Table = dict[str, list[Any]]  # columns and rows of text


def _length_table(card: Mapping[str, Any]) -> Table:
    columns = ["Family", "p50", "p95", "Longest", "Mean", "Of it completion", "Measured"]
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


def _tokenizer(card: Mapping[str, Any]) -> str:
    return (
        display_text(card["lengths"]["tokenizer"] or "one that was not named")
        if card["lengths"]
        else ""
    )


def _origin_table(card: Mapping[str, Any]) -> Table:
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


def _leak_table(card: Mapping[str, Any]) -> Table:
    rows = [
        [family["name"], _UNITS[family["unit"]], _words(family["shows_target"]),
            _asks(family["target_kind"])]
        for family in card["families"]
        if family["shows_target"]
    ]  # fmt: skip
    return {"columns": ["Family", "A row is made of", "Shown of the target", "Asked"], "rows": rows}


def _reasoning(card: Mapping[str, Any]) -> dict[str, str] | None:
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


def _example(example: Mapping[str, Any]) -> dict[str, Any]:
    def items(name: str) -> list[dict[str, str]]:
        return [
            {"title": display_text(item["title"]), "sid": item["sid"]} for item in example[name]
        ]

    origin = example["text_origin"]
    return {
        "family": example["family"],
        "asks": _asks(example["target_kind"]),
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


def _made(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    most = card["n_templates"]
    return [
        ("Seed", str(card["seed"])),
        (
            "Templates",
            "all seen ones" if most is None else f"the first {most} seen ones per family",
        ),
        ("Serving template", display_text(card["serving_template"])),
    ]


def _data_facts(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Statistics of the prepared data that have a name here; the rest is in the JSON."""
    return [
        (label, _value(card["data"][key])) for key, label in _DATA.items() if key in card["data"]
    ]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else display_text(value)


def _chart(
    key: str, name: str, lengths: Mapping[str, Any], part: Mapping[str, Any], height: int
) -> dict[str, Any]:
    said = (
        f"half up to {part['p50']:,} tokens, 95% up to {part['p95']:,}, longest {part['longest']:,}"
    )
    svg = _draw(key, f"Rows of {name} by length: {said}", lengths["edges"], part, height)
    return {"key": key, "name": name, "said": said, "svg": svg}


def _draw(
    key: str, label: str, edges: Sequence[int], part: Mapping[str, Any], height: int
) -> Markup:
    """A histogram of lengths as shares of the rows, with lines at p50 and p95.

    The axis is logarithmic, and the same for all families: they compare at a glance.
    """
    top, left, right, bottom = 22, 44, 32, 38
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
        axes.yaxis.set_major_locator(MaxNLocator(3 if height > 100 else 2))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        axes.set_xlabel(
            "tokens of prompt and completion (logarithmic)", color=QUIET, fontsize=SMALL
        )
        return inline_svg(figure, key, label)


def render_readme(card: Mapping[str, Any]) -> str:
    """The card as Markdown with the front matter that the Hugging Face hub and datasets read.

    Rows of different kinds have different columns, and a configuration has one set of columns: so
    training rows, the held-out rows and the rows for RL are a configuration each.
    """
    groups = {"train": ["train"], "held_out": ["valid", "test"], "rl": ["rl"]}
    splits = {"valid": "validation"}
    configs = [
        {
            "config_name": name,
            **({"default": True} if name == "train" else {}),
            "data_files": [
                {"split": splits.get(s, s), "path": f"{s}.parquet"}
                for s in parts
                if s in card["splits"]
            ],
        }
        for name, parts in groups.items()
        if any(s in card["splits"] for s in parts)
    ]
    size = next((word for most, word in _SIZES if card["rows"] < most), "n>1B")
    front = {
        "pretty_name": display_text(card["name"]),
        "task_categories": ["text-generation"],
        "size_categories": [size],
        "tags": ["recommendation", "generative-recommendation", "semantic-ids", "instruction-data"],
        "configs": configs,
    }
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n\n" + "\n".join(_readme_lines(card)).rstrip() + "\n"


def _readme_lines(card: Mapping[str, Any]) -> list[str]:
    """The same facts as on the page, but for the examples."""
    lines = [
        f"# Instruction data of {_escaped(card['name'])}", "",
        "Prompts and completions that teach a language model to recommend items by semantic ids",
        "(SIDs), made by genrec. The figures and ten rows with titles are in `report.html`, all",
        "numbers in `card.json`, the templates in `prompts/`.", "",
        f"{card['rows']:,} training rows" + (f"; {others} rows." if (others := _others(card)) else "."),
        *(_escaped(text) for text in _summary(card)), "",
        "## Families", "",
    ]  # fmt: skip
    columns = [
        "Family",
        "A row is made of",
        "Prompt shows",
        "Asks for",
        "Rows",
        "Share",
        "Templates",
    ]
    keys = ("name", "unit", "shows", "asks", "rows", "share", "templates")
    lines += _markdown(columns, [[row[key] for key in keys] for row in _family_rows(card)])
    if card["switched_off"]:
        lines += ["Switched off:", ""]
        lines += [f"- {_escaped(n)}: {_escaped(why)}" for n, why in card["switched_off"].items()]
        lines.append("")
    if card["lengths"]:
        lines += [
            "## Length in tokens",
            "",
            f"Tokenizer: {_escaped(_tokenizer(card))}. {COUNTED}",
            "",
        ]
        lines += _markdown(**_length_table(card))
    if (origins := _origin_table(card))["rows"]:
        lines += ["## Who wrote the texts", "", ORIGINS, "", *_markdown(**origins)]
    lines += ["## What prompts know of their targets", "", LEAKS, ""]
    if (leaks := _leak_table(card))["rows"]:
        lines += _markdown(**leaks)
    if reasoning := _reasoning(card):
        lines += [
            f"Reasoning rows ({_escaped(reasoning['families'])}): rationale_origin "
            f"`{reasoning['origin'].replace('`', '')}`, trained_on_target "
            f"`{reasoning['trained_on_target']}`. {reasoning['words']}", "",
        ]  # fmt: skip
    facts = [*_made(card), ("Prompts, SHA-256", card["prompts_sha256"]), *_data_facts(card)]
    lines += ["## How it was made", "", *(f"- {label}: {_escaped(v)}" for label, v in facts), ""]
    return lines


COUNTED = (
    "Prompt and completion are counted as they are trained on, encoded apart, without marks of "
    "beginning and end; a SID token counts one."
)
ORIGINS = (
    "Queries, intentions and preferences come from the data, from rules, or from a language model "
    "(llm: and its name). Rows without such a text are not counted."
)
LEAKS = (
    "Rows are made from the training part of the split, and a prompt can show only the fields that "
    "its family lists. They hold what the user had before the target, but for the fields below, "
    "which show something of the target by definition. Validation, test and RL prompts are of the "
    "sequential family and show the history alone."
)


def _escaped(text: str) -> str:
    """Untrusted text for Markdown: no markup of either kind."""
    return _MARKDOWN.sub(r"\\\1", html.escape(display_text(text, 400), quote=False))


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table."""
    lines = [columns, ["---"] * len(columns), *([_escaped(cell) for cell in row] for row in rows)]
    head = [_escaped(cell) for cell in lines[0]]
    return [f"| {' | '.join(cells)} |" for cells in (head, *lines[1:])] + [""]
