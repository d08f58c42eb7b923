"""What pages share: numbers for reading, escaping, and colours that can be told apart."""

from __future__ import annotations

import re

import pytest

from genrec.page import environment, number, short_hash, stylesheet


@pytest.mark.parametrize(
    ("value", "digits", "sign", "shown"),
    [
        (0.12345, 4, False, "0.1235"), (-0.5, 2, False, "−0.50"), (0.5, 2, True, "+0.50"),
        (-0.00001, 4, True, "0.0000"), (0.0, 1, False, "0.0"), (None, 4, False, "–"),
        (float("nan"), 4, False, "–"), (12345.678, 1, False, "12345.7"),
    ],
)  # fmt: skip
def test_number(value, digits, sign, shown):
    assert number(value, digits, sign) == shown


def test_short_hash():
    assert short_hash("a" * 64) == "a" * 12
    assert short_hash(None) == short_hash("") == "–"


def test_templates_escape_and_refuse_what_is_missing():
    made = environment().from_string("<p title='{{ x }}'>{{ x }}</p>")
    assert made.render(x="</p><script>'") == (
        "<p title='&lt;/p&gt;&lt;script&gt;&#39;'>&lt;/p&gt;&lt;script&gt;&#39;</p>"
    )
    with pytest.raises(Exception, match="'y' is undefined"):
        environment().from_string("{{ y }}").render()


def test_every_page_brings_the_policy_and_the_style():
    page = environment().from_string(
        '{% extends "page.html.jinja" %}{% block title %}a & b{% endblock %}'
        '{% block main %}<p>{{ "<i>" }}</p>{% endblock %}'
    )
    text = page.render()
    assert "default-src 'none'" in text and stylesheet() in text
    assert "<p>&lt;i&gt;</p>" in text and 'href="#main"' in text
    assert not re.search(r"url\(|@import|https?:", stylesheet())


def variables(text: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", text))


def linear(colour: str) -> list[float]:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    return [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2."""
    weights = (0.2126, 0.7152, 0.0722)
    light = [sum(w * c for w, c in zip(weights, linear(x), strict=True)) for x in (one, other)]
    return (max(light) + 0.05) / (min(light) + 0.05)


def schemes() -> dict[str, dict[str, str]]:
    css = stylesheet()
    dark, printed = css.index("prefers-color-scheme: dark"), css.index("@media print")
    light = variables(css[:dark])
    return {
        "light": light,
        "dark": light | variables(css[dark : css.index("* {", dark)]),
        "print": light | variables(css[printed:]),
    }


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_text_and_figures_stand_out(scheme):
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    colours = schemes()[scheme]
    for text in ("ink", "quiet", "accent", "ok", "bad", "series-1"):  # series-1 marks "look"
        assert contrast(colours[text], colours["card"]) >= 4.5, text
    assert contrast(colours["quiet"], colours["page"]) >= 4.5
    assert contrast(colours["quiet"], colours["mark"]) >= 4.5
    series = [name for name in colours if name.startswith("series-")]
    assert len(series) == 8
    for name in series:
        assert contrast(colours[name], colours["card"]) >= 3, name


# Viénot, Brettel and Mollon 1999: what is left of linear red, green and blue.
DICHROMATS = {
    "protan": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    "deutan": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
}


@pytest.mark.parametrize("kind", DICHROMATS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_first_two_series_differ_without_red_and_green(scheme, kind):
    """Bars show these two; lines also differ by marker and dashes."""
    one, other = (linear(schemes()[scheme][f"series-{i}"]) for i in (0, 1))
    seen = [
        [sum(m * c for m, c in zip(row, colour, strict=True)) for row in DICHROMATS[kind]]
        for colour in (one, other)
    ]
    assert max(abs(a - b) for a, b in zip(*seen, strict=True)) > 0.25
