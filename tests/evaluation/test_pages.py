"""The evaluation pages: structure, honesty of the words, missing parts, hostile text, a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from page_elements import Page

from genrec.evaluation.pages import MAX_BARS, render_comparison_page, render_run_page
from genrec.page import MAX_TITLE_CHARS


def score(value: float, low: float | None = None, high: float | None = None, seeds=None) -> dict:
    return {"value": value, "low": low, "high": high, "seeds": seeds or [value]}


def scores(base: float, seeds: list[float] | None = None) -> dict[str, Any]:
    """HR and NDCG around `base`, and two metrics beyond accuracy."""
    near = {"low": base - 0.05, "high": base + 0.05}
    found = {f"HR@{k}": score(base + 0.1, seeds=None, **near) for k in (5, 10)}
    found |= {f"NDCG@{k}": score(base, seeds=seeds, **near) for k in (5, 10)}
    return found | {"coverage@10": score(0.25), "gini@10": score(0.75), "novelty@10": score(3.5)}


def difference(value: float, low: float, high: float, p: float) -> dict[str, Any]:
    return {
        "value": value,
        "low": low,
        "high": high,
        "p": p,
        "p_holm": min(1, 2 * p),
        "seeds": None,
    }


def make_metrics(reference: str = "genrec", best: str = "item-kNN") -> dict[str, Any]:
    apart = {m: difference(-0.1, -0.2, -0.01, 0.03) for m in ("HR@10", "NDCG@10")}
    apart["novelty@10"] = difference(0.25, 0.125, 0.375, 0.002)
    gap = {**score(0.07, 0.01, 0.2), "best": "F", "worst": "M", "p": 0.3}
    random = {m: difference(0.3, 0.2, 0.4, 0.0001) for m in ("HR@10", "NDCG@10")}
    return {
        "dataset": "Tiny shop", "split": "test", "split_sha256": "ab" * 32,
        "protocol": "leave-one-out", "tie_rule": "file order", "rating_rule": "all ratings",
        "rows": 1200, "users": 1100, "items": 300, "filter_seen": True, "fit_on": "train",
        "ks": [5, 10], "depth": 12, "interval": "95% bootstrap", "samples": 50,
        "permutations": 200, "seed": 3, "targets_seen_before": 4, "rows_without_list": 0,
        "reference": reference,
        "baselines": {
            best: {"description": "neighbours=100", "trials": [{}, {}, {}], "seconds": 1.25},
            "random": {"seed": 0, "seconds": 0.0},
        },
        "not_run": {"SASRec": "it would take hours"},
        "systems": {
            "random": scores(0.1), reference: scores(0.4, [0.3, 0.4, 0.5]), best: scores(0.5),
        },
        "differences": {f"{reference} - {best}": apart, f"{reference} - random": random},
        "gaps": {"gender": {reference: {"NDCG@10": gap}}},
    }  # fmt: skip


def slices_table(reference: str, best: str, n_ages: int = 2) -> pl.DataFrame:
    families = {"gender": ["F", "M"], "age": [f"from {10 * i}" for i in range(n_ages)]}
    rows = [
        (family, name, place, 10 + 100 * place, 9, system, metric, 0.1, 0.05, 0.15)
        for family, names in families.items()
        for place, name in enumerate(names)
        for system in (reference, best, "random")
        for metric in ("HR@10", "NDCG@10")
        if (name, system) != ("M", best)  # a slice without a value
    ]
    names = [
        "family",
        "slice",
        "place",
        "rows",
        "users",
        "system",
        "metric",
        "value",
        "low",
        "high",
    ]
    return pl.DataFrame(rows, schema=names, orient="row")


def example(reference: str, best: str, title: str = "Oak tray", user: str = "u7") -> dict[str, Any]:
    item = {"item_id": "i1", "title": title}
    return {
        "row_id": "test-000007", "user_id": user,
        "history": [{**item, "categories": ["Tea", title]}], "targets": [item],
        "lists": {
            reference: [{"item_id": "i2", "title": "Pot", "hit": False}, {**item, "hit": True}],
            best: [{**item, "title": None, "hit": False}],
        },
    }  # fmt: skip


def make_run(
    folder: Path, reference="genrec", best="item-kNN", title="Oak tray", user="u7"
) -> Path:
    """A run folder with every file that the page can read."""
    evaluation = folder / "evaluation"
    evaluation.mkdir(parents=True)
    metrics = make_metrics(reference, best)
    (evaluation / "metrics.json").write_text(json.dumps(metrics))
    slices_table(reference, best).write_parquet(evaluation / "slices.parquet")
    curves = [(s, k, 0.01 * k, 0.005 * k) for s in metrics["systems"] for k in range(1, 13)]
    schema = ["system", "k", "recall", "ndcg"]
    pl.DataFrame(curves, schema=schema, orient="row").write_parquet(evaluation / "curves.parquet")
    examples = [example(reference, best, title, user), example(reference, best)]
    (evaluation / "examples.json").write_text(json.dumps(examples))
    read = {"time": "2026-01-02T03:04:05+00:00", "stage": "evaluate", "split": "test"}
    reads = [
        {**read, "split_sha256": "ab" * 32, "rows": 1200, "system": reference},
        {**read, "split_sha256": "cd" * 32, "rows": 9},
    ]
    lines = [json.dumps(r) for r in reads]
    (folder / "test_reads.jsonl").write_text("\n".join([*lines, '{"time": "2026', ""]))
    for stage in ("sft", "grpo"):
        (folder / stage).mkdir()
        steps = [
            {"step": s, "epoch": s / 10, "hr@10": s / 100, "ndcg@10": s / 200} for s in (10, 20)
        ]
        (folder / stage / "validation.json").write_text(json.dumps(steps))
    log = [{"loss": 3.0, "step": 5}, {"loss": 2.0, "step": 10}, {"train_loss": 2.5, "step": 10}]
    (folder / "sft" / "log.json").write_text(json.dumps(log))
    checks = [
        {"name": "beam", "value": 0.98765, "status": "ok", "meaning": "fine", "advice": ""},
        {"name": "codes", "value": "3 of 4", "status": "bad", "meaning": "few", "advice": "more"},
    ]
    (folder / "doctor.json").write_text(json.dumps({"checks": checks}))
    return folder


def make_comparison(reference: str = "genrec", best: str = "item-kNN") -> dict[str, Any]:
    metrics = make_metrics(reference, best)
    curve = {"k": [1, 2, 10], "recall": [0.1, 0.2, 0.3], "ndcg": [0.1, 0.15, 0.2]}
    return {
        **{key: value for key, value in metrics.items() if key != "gaps"},
        "curves": dict.fromkeys(metrics["systems"], curve),
        "runs": [
            {
                "system": reference, "folder": "runs/a", "value": 0.4, "reads": 2,
                "training": {"sft": [[10, 0.1], [20, 0.3]]},
            },
            {
                "system": reference, "folder": "runs/b", "value": 0.4, "reads": None,
                "training": {"sft": [[10, 0.2], [20, 0.25]], "grpo": [[5, 0.3]]},
            },
        ],
        "settings": [{"name": "sft: training.seed", "values": ["0", None]}],
        "notes": [f"runs of {reference} differ in more than the seed: sft: size"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def run_html(run_dir) -> str:
    return render_run_page(run_dir / "evaluation", run_dir)


@pytest.fixture(scope="module")
def comparison_html() -> str:
    return render_comparison_page(make_comparison(), slices_table("genrec", "item-kNN"))


@pytest.fixture(params=["run", "comparison"])
def html(request, run_html, comparison_html) -> str:
    return run_html if request.param == "run" else comparison_html


def check_structure(html: str) -> Page:
    """What must hold for every page, whatever is on it."""
    page = Page(html)
    assert html.startswith("<!doctype html>") and page.all("html") == [{"lang": "en"}]
    assert not any(page.all(tag) for tag in ("script", "iframe", "img", "object", "form"))
    links = [a["href"] for a in page.all("a") + page.all("link")]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not re.search(r"@import|https?:|javascript:", html) and "default-src 'none'" in html
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08]", html)
    assert all(not name.startswith("on") for _, a, _ in page.elements for name in a)

    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for tag in ("a", "use") for a in page.all(tag)]
    labels = [a["aria-labelledby"] for _, a, _ in page.elements if a.get("aria-labelledby")]
    assert set(targets) | set(labels) <= set(ids)

    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert len(page.all("main")) == 1 and len(page.all("nav")) == 1
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    named = [a for t, a, _ in page.elements if t == "table" or a.get("role") == "region"]
    assert all(a.get("aria-labelledby") or a.get("aria-label") for a in named)
    tables = [parents for tag, _, parents in page.elements if tag == "table"]
    scrolling = [a for a in page.all("div") if (a.get("class") or "").startswith("scroll")]
    assert len(scrolling) == len(tables) and all(a.get("tabindex") == "0" for a in scrolling)

    charts = page.all("figure", class_="chart")
    drawings = page.all("svg", role="img")
    assert len(charts) == len(drawings) and all(a["aria-label"].strip() for a in drawings)
    assert all("figure" in parents for tag, _, parents in page.elements if tag == "svg")
    return page


def test_structure(html):
    page = check_structure(html)
    assert len(page.all("svg")) > 3
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        assert svg.count("<path") > 1


def test_every_figure_is_drawn_in_full(run_html):
    page = Page(run_html)
    # 2 forests, 2 curves, 2 slice families, 2 validation figures and 1 loss
    assert len(page.all("svg")) == 9
    assert page.marked("difference") == 2 * 2
    assert page.marked("line") == 2 * 3 + 2 * 2 + 1
    assert page.marked("bar") == 2 * 2 - 1 + 2 * 2  # one slice lacks a value
    assert page.marked("interval") == page.marked("bar") + page.marked("difference")
    tables = [a.get("aria-label") for a in page.all("table")]
    for about in ("Recall by length of the list", "NDCG@10 by gender", "NDCG@10 by age"):
        assert about in tables
    assert len(page.all("details")) == 7  # the forests' numbers stand in the table below them


def test_a_comparison_shows_every_seed(comparison_html):
    page = Page(comparison_html)
    assert len(page.all("svg")) == 2 + 1 + 2 + 2 + 2  # forests, seeds, curves, slices, training
    assert "1: genrec" in page.text() and "2: genrec" in page.text()
    assert page.marked("seed") == 3 + 1 + 1  # of NDCG@10; HR@10 has one seed each, so no figure
    assert page.marked("line") == 2 * 3 + 3  # curves of three systems, trainings of two runs
    text = page.text()
    assert "3 systems from 2 runs on the same 1,200 test rows of 1,100 users" in text
    assert "Note: runs of genrec differ in more than the seed: sft: size" in text
    assert "sft: training.seed" in text and "runs/b" in text
    alone = make_comparison()
    for found in alone["systems"].values():
        found["NDCG@10"]["seeds"] = found["NDCG@10"]["seeds"][:1]
    alone["settings"] = []
    page = check_structure(render_comparison_page(alone))
    assert page.marked("seed") == 0 and "The manifests name no setting that differs." in page.text()


def test_tables_say_what_the_files_say(run_html):
    text = Page(run_html).text()
    table = text[text.index("Systems, best NDCG@10 first") :]
    assert table.index("item-kNN") < table.index("genrec (this model)") < table.index("random")
    assert "0.5000 (best)" in text and "0.4500 to 0.5500" in text
    assert "3 seeds" in text and "sd 0.1000" in text  # of 0.3, 0.4, 0.5
    assert "−0.1000" in text and "−0.2000 to −0.0100" in text and "p = 0.030" in text
    assert "p < 0.001" in text and "Holm 0.060" in text
    assert "nearer 0" not in text and "Share of the catalogue" in text  # only what was measured
    assert (
        "Gap of genrec in NDCG@10: 0.0700 (0.0100 to 0.2000), best for F, worst for M; p = 0.30."
        in text
    )
    assert "10 rows*" in text and "110 rows*" not in text and "Fewer than 20 rows" in text
    assert "neighbours=100; best of 3 settings tried on the validation rows" in text
    assert "4 targets were in the user's past" in text and "Missing lists" not in text
    assert "SASRec left out: it would take hours" in text
    assert "ab" * 32 in text


def test_differences_beyond_accuracy_have_a_table_of_their_own(run_html, comparison_html):
    for html in (run_html, comparison_html):
        accuracy, beyond = (
            re.search(rf'aria-labelledby="{key}-caption">\n<thead>.*?</table>', html, re.S).group()
            for key in ("differences", "beyond-differences")
        )
        assert "Novelty@10" in beyond and "+0.2500" in beyond and "NDCG" not in beyond
        assert "NDCG@10" in accuracy and "Novelty" not in accuracy
        assert "one side of 0" in Page(html).text()


def test_bold_means_that_the_interval_leaves_zero_out(run_dir, tmp_path):
    evaluation = tmp_path / "e"
    evaluation.mkdir()
    metrics = make_metrics()
    metrics["differences"]["genrec - random"]["HR@10"] = difference(0.0123, -0.1, 0.2, 0.6)
    (evaluation / "metrics.json").write_text(json.dumps(metrics))
    html = render_run_page(evaluation)
    assert "<strong>+0.0123</strong>" not in html and "+0.0123" in html
    assert "<strong>+0.3000</strong>" in html


def test_reads_and_checks(run_html):
    text = Page(run_html).text()
    assert "2 reads are noted in this run, 1 of them of the split of this page." in text
    assert "1 damaged line could not be read." in text
    assert "2026-01-02 03:04:05" in text and "another" in text
    assert text.index("✗ bad") < text.index("✓ ok") and "0.988" in text


def test_examples_mark_hits_in_words(run_html):
    page = Page(run_html)
    assert len(page.all("article")) == 2 and len(page.all("li", class_="found")) == 2
    text = page.text()
    assert text.count("✓ chosen next") == 2
    assert "genrec: rank 2; item-kNN: not in the list" in text and "(no title)" in text


@pytest.mark.parametrize(
    ("value", "low", "high", "p", "words"),
    [
        (0.1, 0.01, 0.2, 0.01, "is better than"),
        (-0.1, -0.2, -0.01, 0.01, "is worse than"),
        (0.1, -0.01, 0.2, 0.3, "is not distinguishable from"),
        (-0.1, -0.3, 0.0, 0.3, "is not distinguishable from"),
        (0.1, 0.01, 0.2, 0.08, "is on the edge of being distinguishable from"),
        (0.1, -0.01, 0.2, 0.04, "is on the edge of being distinguishable from"),
    ],
)
def test_the_verdict_is_no_better_than_interval_and_test(tmp_path, value, low, high, p, words):
    metrics = make_metrics()
    metrics["differences"]["genrec - item-kNN"]["NDCG@10"] = difference(value, low, high, p)
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    text = Page(render_run_page(tmp_path)).text()
    assert f"genrec {words} item-kNN, the best of 2 other systems: NDCG@10 0.4000 against" in text
    assert "covers the choice of users and the 3 training seeds" in text


def test_only_metrics_json_is_needed(tmp_path):
    metrics = make_metrics()
    for key in ("gaps", "users", "permutations", "targets_seen_before", "not_run"):
        del metrics[key]
    metrics["protocol"] = None
    metrics["systems"] = {
        "genrec": {m: f for m, f in scores(0.4).items() if "@10" in m and m[:2] in ("HR", "ND")}
    }
    for found in metrics["systems"]["genrec"].values():
        del found["seeds"]
    metrics |= {"differences": {}, "baselines": {}, "split": "valid"}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    page = check_structure(render_run_page(tmp_path))
    text = page.text()
    assert len(page.all("svg")) == 0 and not page.all("article")
    assert "there is nothing to compare it with" in text and "One training seed" in text
    assert "protocol not stated" in text and "None" not in text
    assert "These are valid rows" in text and "not stated" in text
    assert [a["href"] for a in page.all("a")] == ["#main", "#accuracy", "#measured"]
    empty = tmp_path / "run"
    empty.mkdir()
    assert render_run_page(tmp_path, empty) == render_run_page(tmp_path)
    with pytest.raises(ValueError, match="metrics.json; run: genrec evaluate"):
        render_run_page(empty)


def test_a_family_with_many_slices_keeps_them_in_the_table(run_dir, tmp_path):
    evaluation = shutil.copytree(run_dir / "evaluation", tmp_path / "evaluation")
    slices_table("genrec", "item-kNN", MAX_BARS + 5).write_parquet(evaluation / "slices.parquet")
    page = Page(render_run_page(evaluation))
    assert page.marked("bar") == 3 + 2 * MAX_BARS
    assert "5 smaller slices are only in the table." in page.text()
    assert page.text().count("from 0 ") == 1  # in the table, not in the figure
    assert page.text().count("from 280 ") == 2


def test_the_same_files_give_the_same_page(run_dir, run_html):
    assert render_run_page(run_dir / "evaluation", run_dir) == run_html


HOSTILE = "</script><img src=x onerror=alert(1)>\u202e{{ 7 * 7 }}\"' --> $x_{$"
LONG = "A" * 10_000


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("hostile")
    run = make_run(folder / "run", HOSTILE, LONG, HOSTILE, HOSTILE)
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    metrics |= {"dataset": HOSTILE, "protocol": HOSTILE, "tie_rule": LONG}
    metrics["baselines"][LONG] = {"description": HOSTILE, "x": LONG}
    metrics["gaps"]["gender"][HOSTILE]["NDCG@10"]["best"] = HOSTILE
    (run / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    table = pl.read_parquet(run / "evaluation" / "slices.parquet")
    table = table.with_columns(
        pl.col("slice").replace({"F": HOSTILE, "from 0": LONG}),
        pl.col("family").replace("age", HOSTILE),
    )
    table.write_parquet(run / "evaluation" / "slices.parquet")
    checks = [dict.fromkeys(("name", "value", "status", "meaning", "advice"), HOSTILE)]
    (run / "doctor.json").write_text(json.dumps({"checks": checks}))
    comparison = make_comparison(HOSTILE, LONG)
    comparison["notes"] = [HOSTILE, LONG]
    comparison["settings"] = [{"name": HOSTILE, "values": [LONG, HOSTILE]}]
    comparison["runs"][0]["folder"] = HOSTILE
    return {
        "run": render_run_page(run / "evaluation", run),
        "comparison": render_comparison_page(comparison),
    }


@pytest.mark.parametrize("which", ["run", "comparison"])
def test_hostile_text_stays_text(hostile, which):
    page = check_structure(hostile[which])
    shown = page.text()
    assert "</script><img src=x onerror=alert(1)>" in shown and "{{ 7 * 7 }}" in shown
    assert "A" * 401 not in hostile[which] and "A" * 50 in shown
    titles = [text for tag, text in page.texts if tag == "bdi"]
    assert max(map(len, titles)) <= MAX_TITLE_CHARS


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Reports the widths of the framed page, which has no scripts of its own.
FRAME = """<iframe src="{page}" style="border:0;width:{width}px;height:900px"></iframe>
<script>onload = () => {{
  const frame = document.querySelector("iframe").contentDocument;
  for (const d of frame.querySelectorAll("details")) d.open = true;
  const fonts = [...frame.querySelectorAll("svg text")].map(
    (t) => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a);
  const drawn = [...frame.querySelectorAll("svg")].map((s) => s.getBoundingClientRect());
  document.title = "width " + frame.documentElement.scrollWidth
    + " text " + Math.min(...fonts).toFixed(1)
    + " figures " + drawn.filter((r) => r.width > 50 && r.height > 20).length;
}}</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: nothing to render the page with")
def test_a_browser_finds_nothing_to_complain_about(hostile, run_html, tmp_path):
    def browse(path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--hide-scrollbars", "--allow-file-access-from-files", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", *flags, path.as_uri(),
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)

    noisy = tmp_path / "noisy.html"
    noisy.write_text("<script>console.error('seen')</script><div style='width:2000px'>x</div>")
    assert "CONSOLE" in browse(noisy).stderr  # silence below means something
    for name, html in {**hostile, "plain": run_html, "noisy": noisy.read_text()}.items():
        (tmp_path / f"{name}.html").write_text(html, encoding="utf-8")
        for width in (360, 1200):
            frame = tmp_path / "frame.html"
            frame.write_text(FRAME.format(page=f"{name}.html", width=width))
            done = browse(frame, "--window-size=1300,1000")
            found = re.search(
                r"<title>width (\d+) text ([\d.]+|Infinity) figures (\d+)", done.stdout
            )
            assert found is not None, done.stderr[-2000:]
            if name == "noisy":
                assert int(found[1]) > width
                continue
            assert "CONSOLE" not in done.stderr
            assert int(found[1]) == width, f"{name} scrolls sideways at {width} px"
            assert float(found[2]) >= 9, f"{name} has text of {found[2]} px at {width} px"
            assert found[2] != "Infinity", f"{name} has no text in its figures"
            assert int(found[3]) == html.count("<svg") > 0, f"{name} hides figures at {width} px"
