"""The page of a SID map's quality: findings, figures, missing parts, hostile text, a browser."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from page_elements import Page

from genrec.item_lists import ItemLists
from genrec.page import MAX_TITLE_CHARS
from genrec.quantizers.duplicates import duplicate_report
from genrec.quantizers.quality import CURVE_POINTS, quality_report, training_curves
from genrec.quantizers.quality_page import (
    MAP_GROUPS,
    MAX_CODES,
    MAX_FIGURES,
    SHOWN_CODES,
    findings,
    render_quality_page,
    uneven_levels,
    write_quality_page,
)
from genrec.quantizers.residual_kmeans import ResidualKMeans

WORDS = "lamp mat pot hat tea bag rug cup pan fan bed toy".split()


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """Everything: 240 items around 12 centres."""
    rng = np.random.default_rng(7)
    kind = np.arange(240) % 12
    vectors = ((rng.normal(size=(12, 6)) * 3)[kind] + rng.normal(size=(240, 6))).astype(np.float32)
    frame = pl.DataFrame(
        {
            "title": [f"{WORDS[k]} number {i}" for i, k in enumerate(kind)],
            "categories": [["Shop", f"Kind {k}"] for k in kind],
            "brand": [f"Brand {i % 7}" for i in range(240)],
        }
    )
    quantizer = ResidualKMeans.fit(vectors, (16, 8))
    items = np.arange(240).reshape(20, 12).T.ravel()  # every user keeps to one kind
    train = ItemLists(items, np.arange(0, 241, 4))
    return quality_report(
        quantizer.encode(vectors), (16, 8), vectors, frame, train, quantizer,
        {
            "rate_before": 0.25, "moved": 1234, "spilled": 2,
            "distortion_before": 0.5, "distortion_after": 0.51,
        },
        ([0, 1, 2], [12, 13, 15]),
        {"vectors": duplicate_report(vectors, frame.with_columns(item_id=pl.Series(range(240))))},
        map_method="pca",
    )  # fmt: skip


def trained(report: dict[str, Any], epochs: int = 3) -> dict[str, Any]:
    """The report with an RQ-VAE's training."""
    history = [
        {
            "epoch": n + 1, "total": 9.0 / (n + 1), "reconstruction": 6.0 / (n + 1),
            "collision_rate": 0.5 / (n + 1), "perplexity": [4.0 + n, 3.0], "kept": n == 1,
        }
        for n in range(epochs)
    ]  # fmt: skip
    return report | {"training": training_curves(history)}


def check_structure(html: str) -> Page:
    page = Page(html)
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for tag in ("a", "use") for a in page.all(tag)]
    labels = [a["aria-labelledby"] for _, a, _ in page.elements if a.get("aria-labelledby")]
    assert set(targets) | set(labels) <= set(ids)
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert len(page.all("main")) == 1 and len(page.all("nav")) == 1
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    tables = page.all("table")
    scrolling = page.all("div", class_="scroll")
    assert len(scrolling) == len(tables) and all(a.get("tabindex") == "0" for a in scrolling)
    assert all(a.get("aria-labelledby") for a in [*tables, *scrolling])
    drawings = page.all("svg", role="img")
    assert len(page.all("figure", class_="chart")) == len(drawings) == len(page.all("svg"))
    assert all(a["aria-label"].strip() for a in drawings)
    assert not page.all("script") and not page.all("img")
    assert "http://" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.S)
    return page


def test_the_page_shows_every_part(report, tmp_path):
    write_quality_page(tmp_path / "quality.html", report, "Tiny shop")
    html = (tmp_path / "quality.html").read_text("utf-8")
    page = check_structure(html)
    assert len(page.all("svg")) == 2 + 1
    groups = len(page.all("g", class_="group"))
    assert groups == MAP_GROUPS and len(page.all("g", class_="others")) == 1
    assert len(page.all("g", class_="use")) == 2
    text = page.text()
    assert "Semantic ids of Tiny shop" in text and "240 items, 2 levels of 16, 8 codes." in text
    level = report["levels"][0]
    assert f"{level['perplexity']:.1f} ({100 * level['perplexity'] / 16:.1f}%)" in text
    share = report["neighbours"]["vector"]["same_code"][0]
    assert f"First code {100 * share:.1f}%" in text
    assert "The same before resolution 25.0%" in text or "resolution25.0%" in text
    assert "0.5000, then 0.5100 (2.0% more)" in text
    assert "Equal items" not in text and "Training" not in text
    assert "1,234" in text and "over 240 items" in text and "Share of 3 pairs" in text
    assert "Categories are paths cut after 2 steps: 12 values, 240 items compared." in text
    # Read back from JSON, the report gives the same page.
    assert render_quality_page(json.loads(json.dumps(report)), "Tiny shop") == html


def test_equal_items_are_named():
    frame = pl.DataFrame({"item_id": [f"i{n}" for n in range(30)], "title": ["Mug"] * 30})
    vectors = np.arange(30, dtype=np.float32)[:, None].repeat(2, axis=1)
    vectors[:13], vectors[13] = 5, 0
    fused = vectors + 100 * np.arange(1, 31)[:, None]
    found = {"vectors": duplicate_report(fused, frame), "text": duplicate_report(vectors, frame)}
    report = quality_report(np.arange(30)[:, None], (30,), duplicates=found)
    look = statuses(report)["look"]
    assert look == ["The text vectors of 13 items equal another’s, in 1 groups."]
    page = check_structure(render_quality_page(report))
    text = page.text()
    assert "i0, i1, i2, i3, i4, i5, i6, i7, i8, i9 and 3 more 13 Mug" in text
    assert "The text vectors 13 1 1 1" in text
    bare = quality_report(np.arange(30)[:, None], (30,), duplicates={"vectors": found["text"]})
    assert statuses(bare)["bad"] == ["1 items have no vector: their codes are arbitrary."]


def test_a_training_is_drawn(report):
    page = check_structure(render_quality_page(trained(report)))
    assert len(page.all("svg")) == 2 + 1 + 2 and len(page.all("g", class_="curve")) == 3
    text = page.text()
    assert "3 epochs; the weights after epoch 2 are kept." in text
    assert "2 4.5 3 25.0% 5.0 3.0" in text  # an epoch of the table
    labels = [a["aria-label"] for a in page.all("svg")]
    assert "Perplexity by epoch: level 1 from 4 to 6, level 2 from 3 to 3" in labels
    check_structure(render_quality_page(trained(report, 2)))
    curves = trained(report, 9000)["training"]
    assert len(curves["epoch"]) == len(curves["perplexity"]) == CURVE_POINTS + 1
    assert (curves["epochs"], curves["kept"], curves["epoch"][-1]) == (9000, 2, 9000)
    assert 2 in curves["epoch"]


def test_suffixes_and_item_tokens_are_no_uneven_level(report):
    codes = np.stack([np.arange(400) % 20, np.arange(400) // 20 % 4, np.arange(400) // 80], 1)
    assert uneven_levels(quality_report(codes, (20, 4, 90))) == [2]
    suffix = quality_report(codes, (20, 4, 90), collisions={"method": "suffix"})
    assert uneven_levels(suffix) == [] and statuses(suffix)["look"] == []
    left = {"after_level": [0.9, 0.8], "decoded": 0.8}
    assert any(
        text == "The codes above the last level explain 20.0% of the variance."
        for text in statuses(suffix | {"reconstruction": left})["ok"]
    )
    text = Page(render_quality_page(suffix | {"reconstruction": left})).text()
    assert "90.0% 2 4 4 4.0 (100.0%)" in text and "–" in text


def test_a_page_of_codes_alone():
    page = check_structure(render_quality_page(quality_report(np.array([[0], [1]]), (2,))))
    assert len(page.all("svg")) == 1
    hrefs = [a["href"] for a in page.all("a")]
    assert hrefs == ["#main", "#levels", "#prefixes"]
    text = page.text()
    assert "None" not in text and "nan" not in text and "1 level of 2 codes" in text


def statuses(report: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"bad": [], "look": [], "ok": []}
    for finding in findings(report):
        found[finding["status"]].append(finding["text"])
        assert bool(finding["advice"]) == (finding["status"] != "ok")
    return found


def test_an_even_map_has_nothing_to_complain_about():
    codes = np.stack(np.meshgrid(range(32), range(32)), axis=-1).reshape(-1, 2)[::2]
    found = statuses(quality_report(codes, (32, 32)))
    assert found["bad"] == found["look"] == []
    assert found["ok"] == ["Every item has a SID of its own.", "The levels use their codes evenly."]


def test_findings_name_the_level_and_put_the_worst_first():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 64, 2000)
    codes = np.stack([first, np.where(rng.random(2000) < 0.98, 0, rng.integers(0, 64, 2000))], 1)
    report = quality_report(codes, (64, 64))
    marks = [finding["mark"] for finding in findings(report)]
    assert marks == ["✗", "✗"]
    collided, uneven = (finding["text"] for finding in findings(report))
    assert "share their SID with another item" in collided
    assert "level 2 has the perplexity of" in uneven and "level 1" not in uneven


def test_a_level_too_many_is_named_and_not_called_uneven():
    codes = np.zeros((1000, 3), dtype=int)
    codes[:, 0], codes[:, 1] = np.arange(1000) % 32, np.arange(1000) // 32
    look = statuses(quality_report(codes, (32, 32, 32)))["look"]
    assert look == ["After 2 tokens 100.0% of the items stand alone."]
    codes[:600, 0] = 0
    assert any("most frequent first code holds" in t for t in statuses(
        quality_report(codes, (32, 32, 32)))["look"])  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("reconstruction", "decoded"), 0.6, "The codes explain 40.0% of the variance"),
        (("neighbours", "vector", "same_code"), [0.1, 0.0], "10.0% of an item’s nearest vectors"),
        (("neighbours", "copurchase", "lift"), [1.5, None], "of the items bought together"),
        (("neighbours", "held_out", "lift"), [0.9, None], "of the next, held-out items"),
    ],
)
def test_limits_turn_a_finding(report, path, value, words):
    assert any(words.split("0%")[-1] in text for text in statuses(report)["ok"])
    changed = copy.deepcopy(report)
    part = changed
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    assert any(words in text for text in statuses(changed)["look"])


def test_categories_that_codes_do_not_follow_are_a_finding(report):
    look = statuses(report)["look"]
    assert any(text.startswith("Brand: ") for text in look)  # brands were given out in turn
    assert not any(text.startswith("Category: ") for text in look)


def test_many_levels_and_codes_are_folded():
    rng = np.random.default_rng(0)
    codes = np.concatenate([np.arange(700)[:, None], rng.integers(0, 4, (700, 12))], axis=1)
    frame = pl.DataFrame({"title": [f"thing {i}" for i in range(700)]})
    report = quality_report(codes, (700, *[4] * 12), catalog=frame)
    page = check_structure(render_quality_page(report))
    assert len(page.all("svg")) == MAX_FIGURES
    rows = [1 for tag, a, parents in page.elements if tag == "tr" and "details" in parents]
    assert len(rows) == MAX_CODES - SHOWN_CODES + 1  # and the head
    assert "200 still smaller ones are only in the JSON file." in page.text()


HOSTILE = "</script><img src=x onerror=alert(1)>\u202e{{ 7 * 7 }}\"' --> $x_{$"


@pytest.fixture(scope="module")
def hostile(report) -> str:
    """As if somebody had written markup, and very long words, into the stored report, too."""
    changed = copy.deepcopy(report)
    changed = trained(changed, 40)
    twins = {"items": 9, "item_ids": [HOSTILE, "W" * 500], "titles": [HOSTILE, "漢" * 900]}
    changed["duplicates"]["vectors"] |= {"items": 9, "groups": 2, "listed": [twins] * 300}
    for i, entry in enumerate(changed["first_codes"]):
        entry["words"] = [HOSTILE, "W" * 500, "漢" * 90][i % 3 :]
        entry["examples"] = [HOSTILE, "A" * 9000, ""]
    return render_quality_page(changed, HOSTILE + "B" * 9000)


def test_hostile_text_stays_text(hostile):
    page = check_structure(hostile)
    shown = page.text()
    assert "</script><img src=x onerror=alert(1)>" in shown and "{{ 7 * 7 }}" in shown
    assert "A" * MAX_TITLE_CHARS not in hostile and "A" * 50 in shown and "\u202e" not in hostile
    assert max(len(text) for tag, text in page.texts if tag == "bdi") <= MAX_TITLE_CHARS


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Reports the widths of the framed page, which has no scripts of its own.
FRAME = """<iframe src="{page}" style="border:0;width:{width}px;height:900px"></iframe>
<script>onload = () => {{
  const frame = document.querySelector("iframe").contentDocument;
  for (const d of frame.querySelectorAll("details")) d.open = true;
  const texts = [...frame.querySelectorAll("svg text")];
  const fonts = texts.map((t) => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a);
  const cut = texts.filter((t) => {{
    const box = t.getBoundingClientRect(), own = t.ownerSVGElement.getBoundingClientRect();
    return box.left < own.left - 2 || box.right > own.right + 2;
  }}).length;
  document.title = "width " + frame.documentElement.scrollWidth
    + " text " + Math.min(...fonts).toFixed(1) + " cut " + cut;
}}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: nothing to render the page with")
def test_a_browser_finds_nothing_to_complain_about(report, hostile, tmp_path):
    def browse(path: Path) -> subprocess.CompletedProcess[str]:
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--hide-scrollbars", "--allow-file-access-from-files", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", "--window-size=1300,1000",
            path.as_uri(),
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)

    for name, html in {"plain": render_quality_page(report), "hostile": hostile}.items():
        (tmp_path / f"{name}.html").write_text(html, encoding="utf-8")
        for width in (360, 1200):
            frame = tmp_path / "frame.html"
            frame.write_text(FRAME.format(page=f"{name}.html", width=width))
            done = browse(frame)
            found = re.search(r"<title>width (\d+) text ([\d.]+) cut (\d+)", done.stdout)
            assert found is not None, done.stderr[-2000:]
            assert "CONSOLE" not in done.stderr
            assert int(found[1]) == width, f"{name} scrolls sideways at {width} px"
            assert float(found[2]) >= 9, f"{name} has text of {found[2]} px at {width} px"
            assert found[3] == "0", f"{name} cuts {found[3]} texts of figures at {width} px"
