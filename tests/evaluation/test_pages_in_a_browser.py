"""The evaluation pages as people meet them: in the dark, on paper, by keyboard, read aloud."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from test_pages import make_comparison, make_run, slices_table

from genrec.evaluation.pages import render_comparison_page, render_run_page

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH: nothing to render the page with"
)

# Texts whose contrast with what lies behind them is below that of WCAG AA, as [ratio, text].
# Behind a figure's text is the figure's ground: labels don't stand on bars.
FAINT = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (c) => {
    const [r, g, b] = c.slice(0, 3).map((v) => v / 255).map(
      (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement, text = texts.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.closest("style, title, desc")) continue;
    const style = getComputedStyle(element);
    const colour = rgba(element.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(colour), light(behind(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push([Math.round(ratio * 100) / 100, text.slice(0, 40)]);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as made:
        yield made


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    run = make_run(folder / "run")
    compared = render_comparison_page(make_comparison(), slices_table("genrec", "item-kNN"))
    made = {"run": render_run_page(run / "evaluation", run), "comparison": compared}
    for name, html in made.items():
        (folder / f"{name}.html").write_text(html, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture(params=["run", "comparison"])
def shown(request, browser, pages):
    browser.do("Emulation.setEmulatedMedia", media="", features=[])
    browser.open(pages[request.param])
    yield browser
    assert browser.said == []


def scheme(browser: Browser, name: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": name}]
    browser.do("Emulation.setEmulatedMedia", media="screen", features=features)


@pytest.mark.parametrize("name", ["light", "dark"])
def test_all_texts_stand_out(shown, name):
    scheme(shown, name)
    shown.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    ground = shown.value("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(246, 247, 249)", "dark": "rgb(18, 22, 28)"}[name]
    assert shown.value(FAINT) == []
    # The measure itself sees a faint text.
    shown.value(
        "document.querySelector('h1').style.color = getComputedStyle(document.body).backgroundColor"
    )
    assert shown.value(FAINT)


def test_paper_shows_every_figure_and_no_text_is_cut_off(shown):
    figures = "[...document.querySelectorAll('svg')].filter(e => e.checkVisibility()).length"
    on_screen = shown.value(figures)
    shown.do("Emulation.setEmulatedMedia", media="print", features=[])
    assert shown.value(figures) == on_screen > 0
    assert shown.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    # What scrolls on a screen is shown whole on paper, as wide as the paper is.
    shown.do(
        "Emulation.setDeviceMetricsOverride", width=720, height=1000, deviceScaleFactor=1,
        mobile=False,
    )  # fmt: skip
    cut = """[...document.querySelectorAll('.scroll')].filter(e => e.checkVisibility())
        .filter(e => getComputedStyle(e).overflowX !== 'visible').length"""
    assert shown.value(cut) == 0
    beyond = """[...document.querySelectorAll('body *')].filter(e => e.checkVisibility())
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.tagName + ' ' + e.textContent.trim().slice(0, 40))"""
    assert shown.value(beyond) == []
    assert shown.value(FAINT) == []
    shown.do("Emulation.clearDeviceMetricsOverride")
    printed = base64.b64decode(shown.do("Page.printToPDF")["data"])
    assert printed.startswith(b"%PDF") and printed.count(b"/Type /Page\n") >= 2


def test_the_keyboard_reaches_everything(shown):
    """Links, scrolling tables and the tables behind figures, in their order, and one sees where."""
    wanted = shown.value(
        """[...document.querySelectorAll('a[href], summary, [tabindex="0"]')]
        .filter(e => e.checkVisibility()).map((e, i) => { e.dataset.at = i; return i; })"""
    )
    reached = []
    for _ in wanted:
        shown.press("Tab")
        reached.append(int(shown.value("document.activeElement.dataset.at ?? -1")))
        assert shown.value("getComputedStyle(document.activeElement).outlineStyle") != "none"
        if shown.value("document.activeElement.tagName") == "SUMMARY":
            shown.press("Enter")
            assert shown.value("document.activeElement.parentElement.open")
            table = "document.activeElement.parentElement.querySelector('table').checkVisibility()"
            assert shown.value(table)
            shown.press("Enter")
    assert reached == wanted and len(wanted) > 15


def test_a_screen_reader_finds_names(shown):
    shown.do("Accessibility.enable")
    nodes = shown.do("Accessibility.getFullAXTree")["nodes"]
    roles: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            name = node.get("name", {}).get("value", "")
            roles.setdefault(node["role"]["value"], []).append(name)
    for role in ("image", "table", "region", "heading", "link", "navigation"):
        assert roles[role] and all(name.strip() for name in roles[role]), role
    assert len(roles["main"]) == 1
    assert roles["columnheader"] and roles["rowheader"]
