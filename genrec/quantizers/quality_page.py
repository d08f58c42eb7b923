"""The page of a SID map's quality: one self-contained HTML file (see `genrec.page`).

It is made from the dictionary of `quality_report` alone, so that a stored ``quality.json`` gives
the same page again. Parts that the report lacks are left out; a figure's numbers stand in a table.
In this order: the page, the findings on top of it, its tables, its figures. They are one long file
because all of them read the same dictionary.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, MaxNLocator

from genrec.artifacts import write_text
from genrec.page import display_text, environment, number
from genrec.svg import CARD, INK, LINE, MARKED, QUIET, SERIES, SMALL, inline_svg, svg_style

SHOWN_CODES = 30  # of the first level; the rest is folded
SHOWN_TWINS = 20  # groups of equal items
MAX_CODES = 500
MAX_FIGURES = 8  # levels whose use is drawn
MAP_GROUPS = 8  # as many as there are colours

# Rules of thumb behind the findings, each a share.
UNEVEN, COLLAPSED = 0.5, 0.1  # perplexity / codes
LARGEST = 0.05  # items of one first code
ALONE = 0.95  # items that a shorter SID tells apart already
LOST = 0.5  # variance that the codes don't explain
FAR = 0.2  # nearest neighbours that share the first code
WITHOUT = 0.01  # items without a vector
LIFT = 2.0  # of co-purchased items over chance
PURER = 0.05  # purity above chance

_WIDTH = 360  # px, as wide as a telephone
_WIDE = "MWmw@%—"  # letters that count twice
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_STATUS = {"bad": "✗", "look": "!", "ok": "✓"}
_PARTS = {"vectors": "The vectors", "text": "The text vectors"}
_ATTRIBUTES = {"categories": "Category", "brand": "Brand"}


def write_quality_page(
    path: Path | str, report: Mapping[str, Any], name: str = "this catalogue"
) -> None:
    """Write the page atomically; see `render_quality_page`."""
    write_text(path, render_quality_page(report, name))


def render_quality_page(report: Mapping[str, Any], name: str = "this catalogue") -> str:
    """The page.

    Args:
        report: from `quality_report`, or read back from its JSON.
        name: of the dataset or run, as the heading shows it.
    """
    codes = report["first_codes"] or []
    rows = [_code_row(entry) for entry in codes[:MAX_CODES]]
    return (
        environment()
        .get_template("quantizers/quality.html.jinja")
        .render(
            name=display_text(name),
            n_items=report["n_items"],
            shape=_shape([level["size"] for level in report["levels"]]),
            findings=findings(report),
            duplicates=_duplicate_table(report["duplicates"]),
            twins=_twins(report["duplicates"]),
            levels=_level_table(report),
            usage=_usage_charts(report),
            use=_use_table(report["items_by_code"]),
            training=_training(report["training"]),
            prefixes=_prefix_table(report),
            collisions=_collision_facts(report),
            attributes=_attribute_table(report["attributes"]),
            compared=_compared(report["attributes"]),
            neighbours=_neighbour_table(report["neighbours"]),
            measured=_measured(report["neighbours"]),
            codes=rows[:SHOWN_CODES],
            more_codes=rows[SHOWN_CODES:],
            unlisted=max(0, len(codes) - MAX_CODES),
            map=_map(report),
        )
    )


def findings(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """What stands out and what to do about it: ``status``, ``mark``, ``text``, ``advice``.

    Worst first. The limits are rules of thumb (the constants of this module), not tests.
    """
    found = [
        *_duplicate_findings(report),
        *_collision_findings(report),
        *_level_findings(report),
        *_meaning_findings(report),
    ]
    order = list(_STATUS)
    return [
        {"status": status, "mark": _STATUS[status], "text": text, "advice": advice}
        for status, text, advice in sorted(found, key=lambda f: order.index(f[0]))
    ]


Finding = tuple[str, str, str]  # status, what was found, what to do


def _duplicate_findings(report: Mapping[str, Any]) -> list[Finding]:
    """Of the vectors that were quantized, and of the texts' where they have duplicates alone."""
    found: list[Finding] = []
    for name, words in _PARTS.items():
        part = (report["duplicates"] or {}).get(name)
        if part is None:
            continue
        if part["items"] and not found:
            text = (
                f"{words} of {part['items']:,} items equal another’s, in {part['groups']:,} groups."
            )
            advice = "Merge those that are one product; else tell them apart in their texts."
            found.append(("look", text, advice))
        if part["without_vector"] and name == "vectors":
            share = part["without_vector"] / report["n_items"]
            text = f"{part['without_vector']:,} items have no vector: their codes are arbitrary."
            advice = "Give them a text (text_fields), or behaviour (collaborative)."
            found.append(("bad" if share > WITHOUT else "look", text, advice))
    return found


def _collision_findings(report: Mapping[str, Any]) -> list[Finding]:
    rate = report["collision_rate"]
    before = (report["collisions"] or {}).get("rate_before")
    if rate > 0:
        text = f"{_percent(rate)} of the items share their SID with another item."
        advice = "Resolve the collisions, or such items can’t be told apart in a list."
        return [("bad", text, advice)]
    text = "Every item has a SID of its own."
    if before:
        text = f"Every item has a SID of its own; {_percent(before)} shared one before resolution."
    return [("ok", text, "")]


def _level_findings(report: Mapping[str, Any]) -> list[Finding]:
    found: list[Finding] = []
    n_items, levels = report["n_items"], report["levels"]
    alone, needed = _levels_needed(report)
    if needed is not None:
        text = f"After {_tokens(needed)} {_percent(alone[needed])} of the items stand alone."
        advice = (
            f"{_tokens(needed)} per item (n_levels={needed}) would nearly do and decode faster."
        )
        found.append(("look", text, advice))
    uneven = uneven_levels(report)
    if uneven:
        parts = [
            f"level {place + 1} has the perplexity of {number(levels[place]['perplexity'], 0)} of "
            f"{levels[place]['size']:,} codes ({levels[place]['used']:,} used)"
            for place in uneven
        ]
        advice = (
            "A balanced quantizer uses codes alike; so do centred or whitened vectors, or a "
            "smaller codebook_size."
        )
        worst = min(_evenness(levels[place], n_items) for place in uneven)
        status = "bad" if worst < COLLAPSED else "look"
        found.append((status, f"Codes are used unevenly: {', '.join(parts)}.", advice))
    elif needed != 0:
        found.append(("ok", "The levels use their codes evenly.", ""))
    largest = levels[0]["largest_share"]
    if largest > max(LARGEST, 10 / levels[0]["size"]):
        text = f"The most frequent first code holds {_percent(largest)} of the items."
        found.append(("look", text, "See below what they have in common; balancing splits them."))
    return found


def uneven_levels(report: Mapping[str, Any]) -> list[int]:
    """Levels, from 0, whose perplexity is below `UNEVEN` of their codes (or of fewer items).

    Levels below prefixes of one item each don't count, nor does one of suffixes: they have nothing
    to tell apart.
    """
    levels = report["levels"][: _levels_needed(report)[1]]
    if (report["collisions"] or {}).get("method") == "suffix":
        levels = levels[: len(report["levels"]) - 1]
    return [at for at, level in enumerate(levels) if _evenness(level, report["n_items"]) < UNEVEN]


def _evenness(level: Mapping[str, Any], n_items: int) -> float:
    return level["perplexity"] / min(level["size"], n_items)


def _levels_needed(report: Mapping[str, Any]) -> tuple[list[float], int | None]:
    """Share of the items that stand alone after 0, 1, … codes, and how many codes are enough."""
    alone = [0.0, *(prefix["alone"] / report["n_items"] for prefix in report["prefixes"])]
    # A level below prefixes of one item each has nothing left to tell apart.
    levels = range(len(report["levels"]))
    return alone, next((n for n in levels if alone[n] >= ALONE), None)


def _meaning_findings(report: Mapping[str, Any]) -> list[Finding]:
    found: list[Finding] = []
    kept = report["reconstruction"] or {}
    if (error := kept.get("decoded")) is not None:
        text = f"The codes explain {_percent(1 - error)} of the variance of the vectors."
        advice = "More levels or larger codebooks keep more of them." if error > LOST else ""
        if len(kept["after_level"]) < len(report["levels"]):
            # What is coarse is meant so: the last level tells items apart whatever they are like.
            text = f"The codes above the last level explain {_percent(1 - error)} of the variance."
            advice = ""
        found.append(("look" if advice else "ok", text, advice))
    kinds = (
        ("vector", "of an item’s nearest vectors share its first code", FAR, None),
        (
            "copurchase",
            "of the items bought together with an item share its first code",
            None,
            LIFT,
        ),
        ("held_out", "of the next, held-out items share the last one’s first code", None, LIFT),
    )
    for kind, words, least, least_lift in kinds:
        part = report["neighbours"][kind]
        if part is None or part["same_code"][0] is None:
            continue
        share, lift = part["same_code"][0], part["lift"][0]
        text = f"{_percent(share)} {words}; by chance {_percent(part['chance'][0])} would."
        poor = (least is not None and share < least) or (
            least_lift is not None and lift is not None and lift < least_lift
        )
        advice = (
            "The first level says little of what is alike: fewer first codes, or vectors whose "
            "neighbours make sense."
            if kind == "vector"
            else "The first level says little of what users choose: add collaborative signal to "
            "the vectors."
        )
        found.append(("look" if poor else "ok", text, advice if poor else ""))
    for column, part in (report["attributes"] or {}).items():
        first = part["prefixes"][0]
        text = (
            f"{_ATTRIBUTES[column]}: {_percent(first['purity'])} of the items are of their first "
            f"code’s most frequent one, against {_percent(first['chance'])} in random groups."
        )
        poor = first["purity"] - first["chance"] < PURER
        advice = "First codes don’t follow it: do the vectors know of it?" if poor else ""
        found.append(("look" if poor else "ok", text, advice))
    return found


def _tokens(n: int) -> str:
    return "1 token" if n == 1 else f"{n} tokens"


def _percent(share: float | None) -> str:
    """A share in percent; small ones keep two digits."""
    if share is None:
        return "–"
    percent = 100 * share
    digits = 1 if percent >= 0.1 or percent == 0 else 3
    if 0 < percent < 0.001:
        return "<0.001%"
    return f"{number(percent, digits)}%"


def _shape(sizes: Sequence[int]) -> str:
    if len(set(sizes)) == 1:
        return f"{len(sizes)} {'level' if len(sizes) == 1 else 'levels'} of {sizes[0]:,} codes"
    return f"{len(sizes)} levels of " + ", ".join(f"{size:,}" for size in sizes) + " codes"


Table = dict[str, list[Any]]  # columns and rows of text


def _level_table(report: Mapping[str, Any]) -> Table:
    errors = list((report["reconstruction"] or {}).get("after_level", ()))
    shown = bool(errors)
    errors += [None] * (len(report["levels"]) - len(errors))  # a level that describes nothing
    columns = ["Level", "Codes", "Used", "Perplexity", "Gini", "Largest code"]
    rows = []
    for place, level in enumerate(report["levels"]):
        even = level["perplexity"] / level["size"]
        row = [
            f"{place + 1}", f"{level['size']:,}", f"{level['used']:,}",
            f"{number(level['perplexity'], 1)} ({_percent(even)})", number(level["gini"], 3),
            _percent(level["largest_share"]),
        ]  # fmt: skip
        rows.append(row + ([_percent(errors[place])] if shown else []))
    return {"columns": columns + (["Not explained"] if shown else []), "rows": rows}


def _use_table(items_by_code: Sequence[Sequence[int]]) -> Table:
    """Items per code at some places of the order by use."""
    places = {"Most used": 0.0, "10% from the top": 0.1, "Median": 0.5, "90%": 0.9, "Least": 1.0}
    rows = []
    for place, counts in enumerate(items_by_code):
        at = [counts[min(round(share * len(counts)), len(counts) - 1)] for share in places.values()]
        rows.append([f"{place + 1}", *(f"{count:,}" for count in at)])
    return {"columns": ["Level", *places], "rows": rows}


def _prefix_table(report: Mapping[str, Any]) -> Table:
    rows = [
        [
            _first_codes(prefix["length"]), f"{prefix['distinct']:,}",
            number(prefix["mean_items"], 2), f"{prefix['max_items']:,}",
            f"{prefix['alone']:,} ({_percent(prefix['alone'] / report['n_items'])})",
        ]
        for prefix in report["prefixes"]
    ]  # fmt: skip
    columns = ["Prefix", "Different ones", "Items each, mean", "Most items", "Items alone"]
    return {"columns": columns, "rows": rows}


def _first_codes(length: int) -> str:
    return "First code" if length == 1 else f"First {length} codes"


def _collision_facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = report["collisions"] or {}
    names = {
        "moved": "Items whose codes were changed",
        "spilled": "Of them above the last level",
    }
    facts = [("Items that share a SID", _percent(report["collision_rate"]))]
    if "rate_before" in found:
        facts.append(("The same before resolution", _percent(found["rate_before"])))
    facts += [(label, f"{found[key]:,}") for key, label in names.items() if key in found]
    if "distortion_before" in found:
        before, after = found["distortion_before"], found["distortion_after"]
        text = number(before)
        if after != before:
            more = _percent((after - before) / before) if before > 0 else "–"
            text += f", then {number(after)} ({more} more)"
        facts.append(("Mean squared distance of the latents to their codes", text))
    return facts


def _duplicate_table(duplicates: Mapping[str, Any] | None) -> Table:
    """Counts of each kind of vectors; no rows where there is nothing to tell."""
    rows = [
        [
            _PARTS[name], f"{part['items']:,}", f"{part['groups']:,}",
            "–" if part["same_title"] is None else f"{part['same_title']:,}",
            f"{part['without_vector']:,}",
        ]
        for name in _PARTS
        if (part := (duplicates or {}).get(name)) is not None
        and (part["items"] or part["without_vector"])
    ]  # fmt: skip
    columns = ["Equal in", "Items", "Groups", "Groups of one title", "Items without any"]
    return {"columns": columns, "rows": rows}


def _twins(duplicates: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The largest groups of equal items, by their texts where these are kept apart."""
    parts = [part for name in reversed(_PARTS) if (part := (duplicates or {}).get(name))]
    listed: list[Any] = next((part["listed"] for part in parts if part["listed"]), [])
    return [
        {
            "items": f"{group['items']:,}",
            "ids": ", ".join(display_text(item, 40) for item in group["item_ids"]),
            "titles": list(dict.fromkeys(map(display_text, group["titles"]))),
            "more": group["items"] - len(group["item_ids"]),
        }
        for group in listed[:SHOWN_TWINS]
    ]


def _attribute_table(attributes: Mapping[str, Any] | None) -> Table:
    rows = [
        [
            f"{_ATTRIBUTES[column]}, {_first_codes(p['length']).lower()}", f"{p['groups']:,}",
            _percent(p["purity"]), _percent(p["chance"]),
            number(p["adjusted_mutual_information"], 3),
        ]
        for column, part in (attributes or {}).items()
        for p in part["prefixes"]
    ]  # fmt: skip
    columns = ["Attribute and prefix", "Groups", "Purity", "By chance", "Adj. mutual information"]
    return {"columns": columns, "rows": rows}


def _compared(attributes: Mapping[str, Any] | None) -> list[str]:
    words = []
    for column, part in (attributes or {}).items():
        what = "Brands are the most frequent ones"
        if column == "categories":
            steps = "the first step" if part["depth"] == 1 else f"{part['depth']} steps"
            what = f"Categories are paths cut after {steps}"
        words.append(f"{what}: {part['values']:,} values, {part['items']:,} items compared.")
    return words


def _neighbour_table(neighbours: Mapping[str, Any]) -> Table:
    names = {"vector": "Nearest vectors", "copurchase": "Bought together", "held_out": "Next item"}
    parts = {kind: part for kind in names if (part := neighbours[kind]) is not None}
    columns = ["Prefix"]
    for kind in parts:
        columns += [names[kind], "By chance", "Lift"]
    rows = []
    for place in range(len(next(iter(parts.values()))["same_code"]) if parts else 0):
        row = [_first_codes(place + 1)]
        for part in parts.values():
            lift = part["lift"][place]
            row += [_percent(part["same_code"][place]), _percent(part["chance"][place])]
            row.append(
                "–" if lift is None else f"× {lift:,.0f}" if lift >= 100 else f"× {lift:.1f}"
            )
        rows.append(row)
    return {"columns": columns, "rows": rows}


def _measured(neighbours: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the neighbours are, term by term."""
    facts = []
    if (part := neighbours["vector"]) is not None:
        of = "a sample of items" if part["sampled"] else "items"
        text = f"Mean share of the 10 nearest by cosine, over {part['items']:,} {of}."
        facts.append(("Nearest vectors", text))
    if (part := neighbours["copurchase"]) is not None:
        text = (
            "Mean share of the 10 items with the most users in common in training, over "
            f"{part['items']:,} items. The map may have been fitted on these."
        )
        facts.append(("Bought together", text))
    if (part := neighbours["held_out"]) is not None:
        text = (
            f"Share of {part['pairs']:,} pairs of an item and the one that came next outside of "
            "training; by chance: the same items paired at random."
        )
        facts.append(("Next item", text))
    return facts


def _code_row(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "code": f"{entry['code']:,}",
        "items": f"{entry['items']:,}",
        "label": _label(entry["words"], 4),
        "examples": [display_text(title) for title in entry["examples"]],
    }


def _label(words: Sequence[str], most: int) -> str:
    return ", ".join(display_text(word, 20) for word in words[:most]) or "(no words)"


def _training(curves: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """An RQ-VAE's training: two drawings and a table of some epochs."""
    if curves is None:
        return None
    epochs, levels = curves["epoch"], range(len(curves["perplexity"][0]))
    perplexity = {f"level {n + 1}": [row[n] for row in curves["perplexity"]] for n in levels}
    error = curves["reconstruction"]
    even = ", ".join(
        f"{name} from {values[0]:.0f} to {values[-1]:.0f}" for name, values in perplexity.items()
    )
    labels = (
        f"Reconstruction error by epoch, from {error[0]:.3g} to {error[-1]:.3g}",
        f"Perplexity by epoch: {even}",
    )
    charts = [
        {
            "key": "training-error", "caption": "Reconstruction error",
            "svg": _draw_curves("training-error", labels[0], epochs, {"": error}),
        },
        {
            "key": "training-perplexity", "caption": "Perplexity",
            "svg": _draw_curves("training-perplexity", labels[1], epochs, perplexity),
        },
    ]  # fmt: skip
    places = np.linspace(0, len(epochs) - 1, min(5, len(epochs))).round().astype(int).tolist()
    rows = [
        [
            f"{epochs[at]:,}", f"{curves['total'][at]:.4g}", f"{error[at]:.4g}",
            _percent(curves["collision_rate"][at]),
            *(number(values[at], 1) for values in perplexity.values()),
        ]
        for at in sorted({*places, epochs.index(curves["kept"])})
    ]  # fmt: skip
    columns = ["Epoch", "Loss", "Reconstruction", "Items that share a SID"]
    columns += [f"Perplexity, {name}" for name in perplexity]
    return {
        "charts": charts, "columns": columns, "rows": rows,
        "epochs": curves["epochs"], "kept": curves["kept"],
    }  # fmt: skip


def _draw_curves(
    key: str, label: str, epochs: Sequence[int], curves: Mapping[str, Sequence[float]]
) -> Markup:
    """Lines over epochs, named below where there are several."""
    named = [name for name in curves if name]
    legend = 17 * ((min(len(named), len(SERIES)) + 2) // 3)
    with svg_style(key):
        figure, axes = _canvas(52, 10, 12, 40 + legend, 130)
        for i, (name, values) in enumerate(list(curves.items())[: len(SERIES)]):
            (artist,) = axes.plot(
                epochs, values, color=SERIES[i], linewidth=1.5, label=name or "_", zorder=3,
                marker="o" if len(epochs) == 1 else "",
            )  # fmt: skip
            artist.set_gid(f"{MARKED}curve")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color=LINE, linewidth=1)
        axes.spines["bottom"].set_visible(True)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.set_xlabel("epochs", color=QUIET)
        if named:
            figure.legend(
                loc="lower left", bbox_to_anchor=(0.0, 0.0), ncols=3, handlelength=1,
                columnspacing=1, labelspacing=0.35, borderaxespad=0, borderpad=0.25,
                handletextpad=0.4, fontsize=SMALL,
            )  # fmt: skip
        return inline_svg(figure, key, label)


def _usage_charts(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    charts = []
    for place, counts in enumerate(report["items_by_code"][:MAX_FIGURES]):
        level = report["levels"][place]
        label = (
            f"Items per code of level {place + 1}, most used first: from {counts[0]:,} down to "
            f"{counts[-1]:,}, {level['used']:,} of {level['size']:,} codes used"
        )
        svg = _draw_usage(f"use-{place + 1}", label, counts)
        charts.append({"key": f"use-{place + 1}", "caption": f"Level {place + 1}", "svg": svg})
    return charts


def _draw_usage(key: str, label: str, counts: Sequence[int]) -> Markup:
    """Sorted items per code as one filled outline, with a line at even use."""
    size = len(counts)
    keep = np.unique(np.linspace(0, size - 1, min(size, 300)).round().astype(int))
    edges = np.append(keep, size)
    even = sum(counts) / size
    with svg_style(key):
        figure, axes = _canvas(46, 22, 12, 40, 130)
        drawn = axes.stairs(
            np.asarray(counts)[keep], edges, fill=True, facecolor=(SERIES[0], 0.4),
            edgecolor=SERIES[0], linewidth=1.2, zorder=3,
        )  # fmt: skip
        drawn.set_gid(f"{MARKED}use")
        axes.axhline(even, color=INK, linewidth=1.2, linestyle=(0, (4, 2)), zorder=4)
        axes.annotate(
            f"if all were used alike: {number(even, 1 if even < 10 else 0)}", (size, even),
            (0, 4), textcoords="offset points", ha="right", va="bottom", fontsize=SMALL, color=INK,
        )  # fmt: skip
        axes.set_xlim(0, size)
        axes.set_ylim(0, 1.02 * max(counts[0], 1.4 * even))
        axes.grid(axis="y", color=LINE, linewidth=1)
        axes.spines["bottom"].set_visible(True)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("codes, most used first", color=QUIET)
        figure.text(8 / _WIDTH, 1 - 13 / (22 + 40 + 130), "items per code", color=QUIET)
        return inline_svg(figure, key, label)


def _canvas(
    left: float, top: float, right: float, bottom: float, height: float
) -> tuple[Figure, Axes]:
    """A figure whose plotting area is `height` px high inside margins in px."""
    full = top + height + bottom
    figure = Figure(figsize=(_WIDTH / 72, full / 72))  # an SVG unit is 1/72 inch
    figure.patch.set_visible(False)
    box = (left / _WIDTH, bottom / full, (_WIDTH - left - right) / _WIDTH, height / full)
    axes = figure.add_axes(box)
    axes.patch.set_visible(False)
    return figure, axes


def _map(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The map and the table of its groups."""
    drawn = report["map"]
    if drawn is None:
        return None
    code = np.array(drawn["code"])
    found, counts = np.unique(code, return_counts=True)
    largest = [int(c) for c in found[np.argsort(-counts, kind="stable")][:MAP_GROUPS]]
    about = {entry["code"]: entry for entry in report["first_codes"] or []}
    words = {c: about[c]["words"] if c in about else [] for c in largest}
    method = {"tsne": "t-SNE", "pca": "principal axes"}[drawn["method"]]
    label = (
        f"{drawn['items']:,} item vectors in two dimensions ({method}), coloured by first code; "
        f"the largest groups: {'; '.join(_label(words[c], 2) for c in largest)}"
    )
    points = np.array([drawn["x"], drawn["y"]]).T
    rows = [
        [
            f"{c}: {_label(words[c], 4)}", f"{int((code == c).sum()):,}",
            f"{about[c]['items']:,}" if c in about else "–",
        ]
        for c in largest
    ]  # fmt: skip
    columns = ["First code", "On the map", "In the catalogue"]
    return {
        "svg": _draw_map("map", label, points, code, {c: _label(words[c], 2) for c in largest}),
        "method": method,
        "items": drawn["items"],
        "sampled": drawn["sampled"],
        "groups": len(largest),
        "columns": columns,
        "rows": rows,
    }


def _draw_map(
    key: str, label: str, points: np.ndarray, code: np.ndarray, groups: Mapping[int, str]
) -> Markup:
    """Points in grey, the named groups in their colours and shapes, names on top and below."""
    side = _WIDTH - 16.0
    low, high = points.min(axis=0), points.max(axis=0)
    height = max(side * float(high[1] - low[1]), 120.0)
    names = {group: _cut(f"{group}: {name}", 24) for group, name in groups.items()}
    legend = 17 * ((len(groups) + 1) // 2) + 12
    with svg_style(key):
        figure, axes = _canvas(8, 12, 8, legend + 8, height)
        # One unit is as long in both directions.
        middle = (low + high) / 2
        axes.set_xlim(middle[0] - 0.5, middle[0] + 0.5)
        axes.set_ylim(middle[1] - height / side / 2, middle[1] + height / side / 2)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.add_patch(_specks(points[~np.isin(code, list(groups))]))
        handles, centres = [], []
        for i, group in enumerate(groups):
            own = points[code == group]
            look: dict[str, Any] = {
                "marker": _MARKERS[i], "linestyle": "", "markerfacecolor": SERIES[i],
                "markeredgewidth": 0,
            }  # fmt: skip
            (artist,) = axes.plot(*own.T, markersize=4, zorder=3, clip_on=False, **look)
            artist.set_gid(f"{MARKED}group")
            handles.append(Line2D([], [], markersize=7, label=names[group], **look))
            centres.append(own[_densest(own)])
        _place_names(axes, centres, [_cut(name, 24) for name in groups.values()], side)
        figure.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0.0, 0.0), ncols=2, handlelength=1,
            columnspacing=1, labelspacing=0.35, borderaxespad=0, borderpad=0.25,
            handletextpad=0.4, fontsize=SMALL,
        )  # fmt: skip
        return inline_svg(figure, key, label)


def _specks(points: np.ndarray) -> PathPatch:
    """Dots as one outline of strokes without length: a tenth of the bytes of as many markers."""
    if not len(points):
        points = np.full((1, 2), -1.0)
    outline = Outline(
        np.repeat(points, 2, axis=0), np.tile([Outline.MOVETO, Outline.LINETO], len(points))
    )
    outline.should_simplify = False
    specks = PathPatch(
        outline, facecolor="none", edgecolor=QUIET, linewidth=2.6, alpha=0.4, capstyle="round"
    )
    specks.set_gid(f"{MARKED}others")
    return specks


def _densest(points: np.ndarray) -> int:
    """The point with the least median distance to the others: inside the group's main cluster."""
    apart = np.linalg.norm(points[:, None] - points[None, :500], axis=2)
    return int(np.median(apart, axis=1).argmin())


def _place_names(
    axes: Axes, centres: Sequence[np.ndarray], names: Sequence[str], side: float
) -> None:
    """Each name on its cluster, moved down or up where it would cover another.

    Args:
        axes: in which one unit is `side` px long.
        centres: where the names belong.
        names: what to write.
        side: see above.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[float, float, float]] = []  # x, y and half the width
    high = 17 / side
    for centre, name in sorted(zip(centres, names, strict=True), key=lambda pair: -pair[0][1]):
        half = (_cells(name) * 6.4 + 8) / side / 2
        x = min(max(float(centre[0]), left + half), right - half)
        wanted = float(centre[1])
        free = (
            y
            for y in (wanted + step * high / 2 for step in sorted(range(-40, 41), key=abs))
            if bottom <= y <= top
            and all(abs(x - a) >= half + w or abs(y - b) >= high for a, b, w in taken)
        )
        y = next(free, wanted)
        taken.append((x, y, half))
        axes.text(
            x, y, name, ha="center", va="center", fontsize=SMALL, color=INK, zorder=5,
            bbox={"facecolor": CARD, "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
        )  # fmt: skip


def _cells(text: str) -> int:
    """About how wide a text is, in letters of usual width; readers' fonts differ."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" or c in _WIDE else 1 for c in text)


def _cut(text: str, most: int) -> str:
    """The text, with an ellipsis where it is wider than `most` cells."""
    if _cells(text) <= most:
        return text
    while _cells(text) >= most:
        text = text[:-1]
    return text.rstrip(" ,") + "…"
