"""Figures: what is drawn, where, and that nothing in them can leave the picture."""

from __future__ import annotations

import math
import re
import warnings
from xml.etree import ElementTree

import matplotlib
import pytest

from genrec.evaluation.figures import (
    MAX_POINTS,
    WIDTH,
    Group,
    Line,
    Point,
    bars,
    dots,
    forest,
    lines,
)

HOSTILE = "</text></svg><script>alert(1)</script> $\\frac{x$ \u202e<!-- -->"


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def marked(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [e for e in root.iter("g") if e.attrib.get("class") == kind]


def numbers(group: ElementTree.Element) -> list[tuple[float, float]]:
    """Corners of all paths of a group."""
    pairs = [re.findall(r"(-?[\d.]+) (-?[\d.]+)", p.attrib["d"]) for p in group.iter("path")]
    return [(float(x), float(y)) for found in pairs for x, y in found]


def texts(root: ElementTree.Element) -> list[str]:
    return [e.text or "" for e in root.iter("text")]


def all_kinds(key: str = "a", name: str = "one") -> list[str]:
    return [
        forest(key, name, [(name, Point(0.1, 0.0, 0.2)), ("b", Point(-0.1, -0.2, -0.05))], name),
        lines(key, name, [Line(name, [1, 2], [0.1, 0.2], 0), Line("b", [1], [0], 1)], name, name),
        bars(key, name, [Group(name, name, [Point(0.1, 0, 0.3), None])], [name, "b"], name),
        dots(key, name, [(name, Point(0.1, 0.0, 0.2), [0.1, 0.12]), ("b", Point(0), [0])], name),
    ]  # fmt: skip


def test_a_figure_says_what_it_is_and_carries_no_baggage():
    for svg in all_kinds():
        root = parsed(svg)
        assert root.attrib["role"] == "img" and root.attrib["aria-label"] == "one"
        assert root.attrib["viewBox"].split()[:3] == ["0", "0", str(WIDTH)]
        assert not re.search(r"#[0-9a-fA-F]{6}|https?:|<\?xml|<!|url\(|font-family", svg)
        assert {e.tag for e in root.iter()} <= {"svg", "g", "path", "text", "use", "defs"}
        assert set(re.findall(r"var\(--([\w-]+)\)", svg)) <= {
            "ink", "quiet", "line", "card", *(f"series-{i}" for i in range(8)),
        }  # fmt: skip
        sizes = [float(s) for s in re.findall(r"font-size: ([\d.]+)px", svg)]
        assert min(sizes) >= 11


def test_the_same_values_give_the_same_bytes_whatever_the_users_settings():
    first = all_kinds()
    with matplotlib.rc_context(
        {"font.size": 30, "svg.fonttype": "path", "text.usetex": False, "axes.grid": True}
    ):
        before = dict(matplotlib.rcParams)
        assert all_kinds() == first
        assert dict(matplotlib.rcParams) == before


def test_ids_of_two_figures_never_meet():
    def ids(svgs):
        found = [e.attrib["id"] for svg in svgs for e in parsed(svg).iter() if "id" in e.attrib]
        assert len(found) == len(set(found))
        return set(found)

    for one, other in zip(all_kinds("a"), all_kinds("b"), strict=True):
        assert not ids([one]) & ids([other])
        for svg in (one, other):
            links = {e.attrib["href"] for e in parsed(svg).iter("use")}
            assert links <= {f"#{i}" for i in ids([svg])}


def test_hostile_names_are_text():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svgs = [
            *all_kinds(name=HOSTILE),
            *all_kinds(name="映画の推薦 שלום"),
            *all_kinds(name="_hidden"),
        ]
    for svg in svgs:
        assert "<script" not in svg and "\u202e" not in svg and "<!--" not in svg
        parsed(svg)
    assert any("</te" in text for text in texts(parsed(svgs[0])))  # shown as it is, but cut
    assert any("_hidden" in text for text in texts(parsed(svgs[9])))  # in the legend, too
    long = all_kinds(name="x" * 10_000)
    assert all("x" * 100 not in text for svg in long for text in texts(parsed(svg)))


def test_bars_are_as_long_as_their_values():
    groups = [
        Group("F", "7 rows", [Point(0.1, 0.05, 0.15), Point(0.2)]),
        Group("M", "", [Point(0.3), None]),
    ]
    root = parsed(bars("a", "x", groups, ["ours", "theirs"], "NDCG@10"))
    drawn = [numbers(bar) for bar in marked(root, "bar")]
    assert len(drawn) == 3  # None is left out
    width = [max(x for x, _ in bar) - min(x for x, _ in bar) for bar in drawn]
    assert width[1] / width[0] == pytest.approx(2, rel=1e-3)
    assert width[2] / width[0] == pytest.approx(3, rel=1e-3)
    (interval,) = (numbers(g) for g in marked(root, "interval"))
    reach = [(x - min(x for x, _ in drawn[0])) / width[0] for x, _ in interval]
    assert reach == pytest.approx([0.5, 1.5], rel=1e-2)
    assert {"F", "7 rows", "M", "ours", "theirs", "NDCG@10"} <= set(texts(root))
    middle = [sum(y for _, y in bar) / len(bar) for bar in drawn]
    assert middle[0] < middle[1] < middle[2]  # from top to bottom
    assert all(0 <= x <= WIDTH for bar in drawn for x, _ in bar)


def test_a_forest_is_hollow_where_the_interval_covers_zero():
    rows = [
        ("clear", Point(0.2, 0.1, 0.3)),
        ("covers", Point(0.1, -0.1, 0.3)),
        ("none", Point(-0.1)),
    ]
    root = parsed(forest("a", "x", rows, "difference"))
    assert {"difference", "clear", "covers", "none", "0"} <= set(texts(root))
    points = [use for g in marked(root, "difference") for use in g.iter("use")]
    fill = [re.search(r"fill: (var\([^)]*\))", p.attrib["style"])[1] for p in points]
    assert fill == ["var(--series-0)", "var(--card)", "var(--card)"]
    x = [float(p.attrib["x"]) for p in points]
    assert x[2] < x[1] < x[0] and (x[0] - x[1]) * 2 == pytest.approx(x[1] - x[2], abs=0.1)
    assert len(marked(root, "interval")) == 2
    below = texts(parsed(forest("a", "x", [("b", Point(-0.4, -0.5, -0.3))], "difference")))
    assert "−0.4" in below and "0" in below  # a true minus, and 0 always in sight


def test_lines_keep_their_last_point_and_differ_without_colour():
    long = Line("long", list(range(1000)), [1.0] * 999 + [2.0], 0)
    others = [Line(f"s{i}", [0, 999], [0.5, 0.6], i) for i in range(1, 5)]
    root = parsed(lines("a", "x", [long, *others], "step", "loss"))
    drawn = marked(root, "line")
    assert len(drawn) == 5
    path = next(p for p in drawn[0].iter("path") if "fill: none" in p.attrib["style"])
    corners = re.findall(r"[ML] ([\d.]+) ([\d.]+)", path.attrib["d"])
    assert len(corners) <= MAX_POINTS
    assert float(corners[-1][1]) < float(corners[0][1])  # the last value is higher
    dashes = [
        re.search(r"stroke-dasharray: ([^;]+)", p.attrib["style"])
        for g in drawn for p in g.iter("path") if "fill: none" in p.attrib["style"]
    ]  # fmt: skip
    assert len({d[1] if d else "solid" for d in dashes}) == 5
    markers = [next(g.iter("defs")).find("path").attrib["d"] for g in drawn]
    assert len(set(markers)) == 5
    alone = texts(parsed(lines("a", "x", [long], "step", "loss")))
    assert "long" not in alone and "loss" in alone  # a single line needs no legend


def test_dots_show_every_seed():
    rows = [("a", Point(0.2, 0.1, 0.3), [0.15, 0.2, 0.25]), ("b", Point(0.1), [0.1])]
    root = parsed(dots("a", "x", rows, "NDCG@10"))
    seeds = [use for g in marked(root, "seed") for use in g.iter("use")]
    x = [float(s.attrib["x"]) for s in seeds]
    assert len(x) == 4 and x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.05)
    assert {"3 seeds", "1 seed"} <= set(texts(root))


def test_values_that_are_missing_draw_nothing():
    nan = math.nan
    groups = [Group("F", "", [Point(nan, nan, nan), Point(0.0, 0.0, 0.0)])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = parsed(bars("a", "x", groups, ["a", "b"], "y"))
    assert len(marked(root, "bar")) == 1
    assert "nan" not in ElementTree.tostring(root, encoding="unicode").lower()


def test_long_names_stand_above_their_bars():
    name = "2014-01-02 – 2014-03-04"
    groups = [Group(name, "236 rows", [Point(0.1), Point(0.2)]), Group("b", "1 row", [Point(0.3)])]
    root = parsed(bars("a", "x", groups, ["ours", "theirs"], "NDCG@10"))
    assert {f"{name}, 236 rows", "b, 1 row"} <= set(texts(root))  # in full
    above = next(float(e.attrib["y"]) for e in root.iter("text") if (e.text or "").startswith(name))
    tops = [min(y for _, y in numbers(bar)) for bar in marked(root, "bar")]
    assert above < tops[0] < tops[1] < tops[2]
