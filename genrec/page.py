"""The look that all pages of genrec share: one HTML file, without scripts and without network.

All text from catalogues, users and settings is untrusted. Templates escape everything; characters
that steer the display (controls, direction overrides) are removed here, long texts are cut, and a
content security policy forbids whatever would slip through.
"""

from __future__ import annotations

import math
import re
import unicodedata
from functools import cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

MAX_TITLE_CHARS = 140
_SPACE = re.compile(r"\s+")


def display_text(text: object, max_chars: int = MAX_TITLE_CHARS) -> str:
    """Untrusted text for display: one line, no control or direction characters, bounded.

    Markup characters stay; the template escapes them.
    """
    cut = str(text)[: 4 * max_chars]
    kept = "".join(
        " " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c
        for c in cut
        if unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cn")
    )
    kept = _SPACE.sub(" ", kept).strip()
    shortened = len(kept) > max_chars or len(str(text)) > len(cut)
    return kept[: max_chars - 1].rstrip() + "…" if shortened else kept or "(no text)"


def number(value: float | None, digits: int = 4, sign: bool = False) -> str:
    """A number for reading: true minus sign, a dash where there is none.

    Args:
        value: None and NaN count as missing.
        digits: digits behind the point.
        sign: also show a plus sign.
    """
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    if not text.strip("+-0."):  # rounds to zero, which has no sign
        text = text.lstrip("+-")
    return text.replace("-", "−")


def short_hash(value: str | None) -> str:
    """The beginning of a hash, enough to compare by eye."""
    return str(value)[:12] if value else "–"


@cache
def environment() -> Environment:
    """Templates of the package, with the filters that pages use.

    Templates are named by their path inside the package (``audit/report.html.jinja``) and extend
    ``page.html.jinja``, which brings the head, the style sheet and the landmarks.
    """
    made = Environment(
        loader=PackageLoader("genrec", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["text"] = display_text
    made.filters["number"] = number
    made.filters["short"] = short_hash
    made.filters["thousands"] = lambda value: f"{value:,}"
    made.globals["stylesheet"] = Markup(stylesheet())
    return made


@cache
def stylesheet() -> str:
    """The shared style sheet (``page.css``)."""
    return resources.files("genrec").joinpath("page.css").read_text("utf-8")
