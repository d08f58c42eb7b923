"""Matplotlib's drawings as inline SVG that fits a page.

Text stays text, colours become the page's CSS variables (so that one figure serves light, dark and
print), ids that nothing refers to are dropped and the others get the figure's key, so that figures
of one page cannot collide. No scripts, style sheets, metadata or dates: the same values give the
same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from genrec.page import display_text

FONT, SMALL = 12, 11  # px

# Colours that stand for CSS variables until the drawing is done.
INK, QUIET, LINE, CARD = "#0101fa", "#0101fb", "#0101fc", "#0101fd"
SERIES = [f"#0202f{i}" for i in range(8)]
MARKED = "mark-"  # gid of an artist -> class of its group
_VARIABLES = {
    INK: "var(--ink)",
    QUIET: "var(--quiet)",
    LINE: "var(--line)",
    CARD: "var(--card)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)},
}
_HEX = re.compile(r"#[0-9a-f]{6}\b")
_DECIMALS = re.compile(r"(\.\d\d)\d+")
_FONT_FAMILY = re.compile(r"font-family: [^;]*; ?")
_DROPPED = ("metadata", "style", "clipPath")  # nothing is drawn outside its axes
_NUMERIC = {"d", "x", "y", "transform", "width", "height", "points"}


@contextmanager
def svg_style(key: str) -> Iterator[None]:
    """Matplotlib's defaults, whatever the user's are, with ours on top."""
    ours: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": key, "text.parse_math": False,
        "font.size": FONT, "axes.labelsize": FONT, "legend.fontsize": FONT,
        "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "text.color": INK,
        "axes.edgecolor": QUIET, "axes.labelcolor": QUIET, "xtick.color": QUIET,
        "ytick.color": QUIET, "axes.axisbelow": True, "axes.facecolor": CARD,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "axes.spines.bottom": False, "xtick.major.size": 0, "ytick.major.size": 0,
        "xtick.major.pad": 6, "legend.frameon": False,
    }  # fmt: skip
    with matplotlib.rc_context(), warnings.catch_warnings():
        # The page's fonts draw the text; the font that measures it may lack glyphs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(ours)
        yield


def inline_svg(figure: Figure, key: str, label: str) -> Markup:
    """The drawing as an inline SVG element.

    Args:
        figure: drawn under `svg_style`, in the colours of this module.
        key: distinguishes the figure on its page; letters, digits and hyphens.
        label: what the figure shows, for those who can't see it.
    """
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", metadata=nothing)
    root = _clean(ElementTree.fromstring(stream.getvalue()), key)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib |= {"viewBox": box, "role": "img", "aria-label": display_text(label, 400)}
    root.attrib["class"] = "plot"
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _clean(root: ElementTree.Element, key: str) -> ElementTree.Element:
    """Names without namespaces, unique ids, page colours, no style sheet and no metadata."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in _DROPPED:
                parent.remove(child)
    links = [v[1:] for e in root.iter() for n, v in e.attrib.items() if n.endswith("href")]
    ids = {name: f"{key}-{i}" for i, name in enumerate(dict.fromkeys(links))}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        name = attributes.pop("id", "")
        if name in ids:
            attributes["id"] = ids[name]
        elif name.startswith(MARKED):
            attributes["class"] = name.removeprefix(MARKED)
        attributes.pop("clip-path", None)
        if "rotate(-0 " in attributes.get("transform", ""):
            attributes.pop("transform")
        element.attrib.clear()
        element.attrib |= {n: _value(n, v, ids) for n, v in attributes.items()}
        if element.tag != "text" and not (element.text or "").strip():
            element.text = None
        element.tail = None
    return root


def _value(name: str, value: str, ids: Mapping[str, str]) -> str:
    """An attribute's value with the page's ids, colours and fonts, and two decimals."""
    if name == "href":
        return f"#{ids[value[1:]]}"
    if name == "style":
        return _HEX.sub(lambda found: _VARIABLES[found[0]], _FONT_FAMILY.sub("", value))
    return _DECIMALS.sub(r"\1", value) if name in _NUMERIC else value
