"""The dataset card: counts and lengths by hand, sampling, hostile text, a browser, a Hub reader."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from page_elements import Page

from genrec.page import MAX_TITLE_CHARS
from genrec.tasks import card as card_module
from genrec.tasks.card import (
    CardFacts,
    dataset_card,
    sampled_rows,
    sampled_texts,
    weighted_quantile,
    write_card,
)
from genrec.tasks.card_page import MAX_TEXT, render_card_page
from genrec.tasks.card_readme import render_readme

SIDS = [f"<a_{i}><b_{i % 2}>" for i in range(5)]
ITEMS = pl.DataFrame(
    {
        "item_id": [f"i{i}" for i in range(5)],
        "title": ["red hat", "blue scarf", "tea pot", "tea tray", "yoga mat"],
        "sid": SIDS,
    }
)
FACTS = CardFacts(
    name="tiny shop",
    counts={"sequential": 3, "title_to_sid": 2, "query_search": 4, "reasoning_intent": 0},
    switched_off={"rating": "the data have no ratings"},
    seed=3,
    n_templates=None,
    serving_template="sequential/seen/01",
    prompts_sha256="ab" * 32,
    data={"users": 7, "density": 0.06304669, "boundaries": {}, "protocol": "leave-one-out"},
    tokenizer="words",
)
SCHEMA = {
    "row_id": pl.String, "user_id": pl.Int64, "task": pl.String, "target_kind": pl.String,
    "targets": pl.List(pl.String), "history": pl.List(pl.String), "template": pl.String,
    "prompt": pl.String, "completion": pl.String, "text_origin": pl.String,
}  # fmt: skip


def count_words(texts):
    """Words and SID tokens; a closing bracket ends a word."""
    return [len(text.replace(">", "> ").split()) for text in texts]


def row(task: str, number: int, prompt: str, completion: str, **more: Any) -> dict[str, Any]:
    kind = {"sequential": "sids", "title_to_sid": "sids", "query_search": "sids"}[task]
    defaults = {
        "row_id": f"{task}:{number}", "user_id": number, "task": task, "target_kind": kind,
        "targets": ["i4"], "history": [], "template": f"{task}/seen/01", "prompt": prompt,
        "completion": completion, "text_origin": None,
    }  # fmt: skip
    return defaults | more


def rows() -> pl.DataFrame:
    """Lengths: sequential 7, 7 and 3; title_to_sid 6 and 8; query_search 4, 5, 6 and 7."""
    history = SIDS[0] + SIDS[1]
    table = [
        row("title_to_sid", 0, "Id of red hat:", SIDS[0], targets=["i0"]),
        row("sequential", 0, f"Next {history}", SIDS[4], history=["i0", "i1"]),
        row("query_search", 0, "Find tea", SIDS[2], text_origin="data"),
        row("query_search", 1, "Find tea pot", SIDS[2], text_origin="rule"),
        row("sequential", 1, f"Then {history}", SIDS[2], history=["i0", "i1"],
            template="sequential/seen/02"),
        row("query_search", 2, "Find tea pot now", SIDS[2], text_origin="rule"),
        row("query_search", 3, "Find a red tea pot", SIDS[2], text_origin="rule"),
        row("sequential", 2, "Start", SIDS[3], targets=["i3"]),
        row("title_to_sid", 1, "Id of a blue scarf is:", SIDS[1], targets=["i1"]),
    ]  # fmt: skip
    return pl.DataFrame(table, schema=SCHEMA)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished stage, but for its card; row groups of two rows."""
    rows().write_parquet(tmp_path / "train.parquet", row_group_size=2)
    held_out = rows().filter(task="sequential").drop("text_origin")
    for split in ("valid", "test"):
        held_out.write_parquet(tmp_path / f"{split}.parquet")
    more = pl.lit([], dtype=pl.List(pl.Int32)).alias("seen_item_index")
    held_out.head(2).with_columns(more).write_parquet(tmp_path / "rl.parquet")
    return tmp_path


@pytest.fixture
def card(folder: Path) -> dict[str, Any]:
    return write_card(folder, FACTS, ITEMS, count_words)


def family(card: dict[str, Any], name: str) -> dict[str, Any]:
    return next(family for family in card["families"] if family["name"] == name)


def test_counts_by_hand(card):
    assert card["rows"] == 9
    assert card["splits"] == {"train": 9, "valid": 3, "test": 3, "rl": 2}
    assert [f["name"] for f in card["families"]] == [
        "sequential", "title_to_sid", "query_search", "reasoning_intent"]  # fmt: skip
    assert [f["rows"] for f in card["families"]] == [3, 2, 4, 0]
    assert [f["templates"] for f in card["families"]] == [2, 1, 1, 0]
    assert family(card, "query_search")["share"] == pytest.approx(4 / 9)
    assert family(card, "query_search")["text_origin"] == {"rule": 3, "data": 1}
    assert family(card, "query_search")["shows_target"] == ["query"]
    assert family(card, "sequential")["text_origin"] == {}
    assert card["text_origin"] == {"rule": 3, "data": 1}
    assert (card["rationale_origin"], card["trained_on_target"]) == ("template", False)


def test_lengths_by_hand(card):
    lengths = card["lengths"]
    found = {n: (p["p50"], p["p95"], p["longest"]) for n, p in lengths["families"].items()}
    assert found == {
        "sequential": (7, 7, 7), "title_to_sid": (6, 8, 8), "query_search": (5, 7, 7),
    }  # fmt: skip
    # All: 3 4 5 6 6 7 7 7 8.
    overall = lengths["overall"]
    assert (overall["p50"], overall["p95"], overall["longest"]) == (6, 8, 8)
    assert lengths["tokens"] == 53 and overall["mean"] == pytest.approx(53 / 9)
    assert overall["mean_completion"] == 2 and overall["measured"] == 9
    assert lengths["edges"] == [3, 4, 5, 6, 7, 8, 10]
    assert overall["histogram"] == [1, 1, 1, 2, 3, 1]
    assert lengths["families"]["sequential"]["histogram"] == [1, 0, 0, 0, 2, 0]


def test_families_weigh_as_many_rows_as_they_have(tmp_path, monkeypatch):
    monkeypatch.setattr(card_module, "MEASURED_ROWS", 2)
    table = [row("sequential", i, "one two three", SIDS[0]) for i in range(8)]
    table += [row("title_to_sid", i, "one", SIDS[0]) for i in range(2)]
    pl.DataFrame(table, schema=SCHEMA).write_parquet(tmp_path / "train.parquet")
    facts = replace(FACTS, counts={"sequential": 8, "title_to_sid": 2})
    lengths = dataset_card(tmp_path, facts, ITEMS, count_words)["lengths"]
    overall = lengths["overall"]
    assert overall["measured"] == 4
    assert overall["p50"] == 5  # of 4 measured rows, two have 3 tokens and two have 5
    assert overall["mean"] == pytest.approx((8 * 5 + 2 * 3) / 10) and lengths["tokens"] == 46
    assert overall["histogram"] == [2, 0, 8] and lengths["edges"] == [3, 4, 5, 6]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=1), st.floats(0.01, 1))
@settings(max_examples=50, deadline=None)
def test_a_weight_counts_as_so_many_rows(pairs, share):
    lengths, weights = (np.array(part) for part in zip(*pairs, strict=True))
    expected = np.quantile(np.repeat(lengths, weights), share, method="inverted_cdf")
    assert weighted_quantile(lengths, weights / 3, share) == expected


def test_a_counter_that_does_not_know_sids_is_refused(folder):
    with pytest.raises(ValueError, match="which is 2 SID tokens; add the SID tokens"):
        write_card(folder, FACTS, ITEMS, lambda texts: [len(text) for text in texts])
    assert not (folder / "card.json").exists()


def test_a_file_with_other_rows_than_were_counted_is_an_error(folder):
    with pytest.raises(AssertionError, match="other rows"):
        write_card(folder, replace(FACTS, counts={"sequential": 3}), ITEMS)


# Sampling.


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(0, 12),
    st.integers(-5, 5),
)
@settings(max_examples=40, deadline=None)
def test_sampled_rows(tmp_path_factory, tasks, group_rows, most, seed):
    path = tmp_path_factory.mktemp("rows") / "train.parquet"
    table = pl.DataFrame({"task": tasks, "number": range(len(tasks))})

    def sample(size: int) -> pl.DataFrame:
        table.write_parquet(path, row_group_size=size)
        parts = list(sampled_rows(path, ["number", "task"], {"a": most, "b": 3, "d": 1}, seed))
        assert all(len(part) for part in parts)
        empty = table.clear().select("number", "task")
        return pl.concat([empty, *(part.select("number", "task") for part in parts)])

    found = sample(group_rows)
    assert found["number"].is_sorted() and found["number"].is_unique().all()
    assert found.join(table, ["number", "task"], "semi").height == found.height
    counts = dict(found["task"].value_counts().iter_rows())
    expected = {"a": min(most, tasks.count("a")), "b": min(3, tasks.count("b"))}
    assert counts == {name: n for name, n in expected.items() if n}
    # How the file is cut into groups changes nothing.
    assert sample(100).equals(found)


def test_sampled_rows_of_a_large_group_come_batch_by_batch(tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    table = pl.DataFrame({"task": ["a", "b"] * 500, "number": range(1000)})
    table.write_parquet(path, row_group_size=1000)
    wanted = {"a": 100, "b": 1000}
    whole = pl.concat(sampled_rows(path, ["number"], wanted, 0))
    monkeypatch.setattr(card_module, "_BATCH_ROWS", 7)
    assert pl.concat(sampled_rows(path, ["number"], wanted, 0)).equals(whole)
    drawn = whole["number"].filter(whole["number"] % 2 == 0).to_numpy()
    assert len(drawn) == 100 and 380 < drawn.mean() < 620  # from all over the file
    other = pl.concat(sampled_rows(path, ["number"], wanted, 1))
    assert not other.equals(whole)


def test_sampled_texts(folder):
    texts = sampled_texts(folder / "train.parquet", 100, 0)
    table = rows()
    assert sorted(texts) == sorted([*table["prompt"], *table["completion"]])
    assert len(sampled_texts(folder / "train.parquet", 1, 0)) == 2 * 3


def test_examples_carry_titles_and_spread_over_the_families(card):
    examples = card["examples"]
    names = [example["family"] for example in examples]
    assert names == ["sequential"] * 3 + ["title_to_sid"] * 2 + ["query_search"] * 3
    first = next(e for e in examples if e["row_id"] == "sequential:0")
    assert first["prompt"] == f"Next {SIDS[0]}{SIDS[1]}" and first["completion"] == SIDS[4]
    assert first["history"] == [
        {"item_id": "i0", "title": "red hat", "sid": SIDS[0]},
        {"item_id": "i1", "title": "blue scarf", "sid": SIDS[1]},
    ]
    assert [item["title"] for item in first["targets"]] == ["yoga mat"]


def test_long_histories_show_their_end_and_many_families_a_choice(tmp_path, monkeypatch):
    monkeypatch.setattr(card_module, "EXAMPLES", 2)
    items = ["i0", "i1", "i2", "i3"] * 4
    table = [
        row("sequential", 0, "x", SIDS[4], history=items, targets=items),
        row("title_to_sid", 0, "x", SIDS[4]),
        row("query_search", 0, "x", SIDS[4]),
    ]
    pl.DataFrame(table, schema=SCHEMA).write_parquet(tmp_path / "train.parquet")
    facts = replace(FACTS, counts=dict.fromkeys(("sequential", "title_to_sid", "query_search"), 1))
    card = dataset_card(tmp_path, facts, ITEMS)
    assert [example["family"] for example in card["examples"]] == ["sequential", "query_search"]
    first = card["examples"][0]
    assert [e["item_id"] for e in first["history"]] == items[-10:] and first["n_history"] == 16
    assert [e["item_id"] for e in first["targets"]] == items[:10] and first["n_targets"] == 16
    text = CardPage(render_card_page(card)).text()
    assert "6 earlier, then" in text and "and 6 more." in text


# What people read.


class CardPage(Page):
    """A page that may allow line breaks inside of names."""

    def handle_starttag(self, tag, attrs):
        if tag != "wbr":
            super().handle_starttag(tag, attrs)


def check_structure(html: str) -> CardPage:
    page = CardPage(html)
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for tag in ("a", "use") for a in page.all(tag)]
    labels = [a["aria-labelledby"] for _, a, _ in page.elements if a.get("aria-labelledby")]
    assert set(targets) | set(labels) <= set(ids)
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert len(page.all("main")) == 1 and len(page.all("nav")) == 1
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    tables, scrolling = page.all("table"), page.all("div", class_="scroll")
    assert len(scrolling) == len(tables) and all(a.get("tabindex") == "0" for a in scrolling)
    drawings = page.all("svg", role="img")
    assert len(page.all("figure", class_="chart")) == len(drawings) == len(page.all("svg"))
    assert all(a["aria-label"].strip() for a in drawings)
    assert not page.all("script") and not page.all("img")
    assert "http://" not in re.sub(r"<svg.*?</svg>", "", html, flags=re.S)
    return page


def test_the_page_shows_every_part(card, folder):
    html = (folder / "report.html").read_text("utf-8")
    page = check_structure(html)
    assert page.marked("lengths") == 4  # all rows, three families
    text = page.text()
    assert "9 training rows; 3 validation, 3 test, 2 RL rows." in text
    assert "On, but without any row: reasoning_intent." in text
    assert "1 family switched off" in text and "the data have no ratings" in text
    assert "95% up to 8; the longest that was measured has 8." in text
    assert "All rows together have about 53 tokens. " in text and "Every row was measured" in text
    assert re.search(r"query_search 4 44\.4% +interaction query a SID 1", text)
    assert re.search(r"query_search 4 75\.0% 25\.0%", text)  # rule, data
    assert re.search(r"title_to_sid catalogue item title a SID", text)  # what it shows
    assert "Trained on targetno. Their chains were made" in text
    assert "red hat <a_0><b_0>" in text and "0.063" in text and "leave-one-out" in text
    assert render_card_page(json.loads((folder / "card.json").read_text("utf-8"))) == html


def test_the_same_rows_give_the_same_bytes(card, folder):
    names = ("card.json", "report.html", "README.md")
    before = [(folder / name).read_bytes() for name in names]
    write_card(folder, FACTS, ITEMS, count_words)
    assert [(folder / name).read_bytes() for name in names] == before


def test_parts_without_data_are_left_out(folder):
    table = rows().filter(task="sequential").drop("text_origin")
    table.write_parquet(folder / "train.parquet")
    facts = replace(FACTS, counts={"sequential": 3}, switched_off={}, data={}, tokenizer="")
    card = write_card(folder, facts, ITEMS)
    page = check_structure((folder / "report.html").read_text("utf-8"))
    hrefs = [a["href"] for a in page.all("a")]
    assert hrefs == ["#main", "#families", "#leaks", "#examples", "#made"]
    assert "None" not in page.text().replace("oldest first None.", "")
    assert "No family of this dataset shows any." in page.text()
    assert card["lengths"] is None and card["rationale_origin"] is None


def test_no_rows_at_all(folder):
    rows().clear().write_parquet(folder / "train.parquet")
    card = write_card(folder, replace(FACTS, counts={"sequential": 0}), ITEMS, count_words)
    assert card["rows"] == 0 and card["examples"] == [] and card["lengths"] is None
    page = check_structure((folder / "report.html").read_text("utf-8"))
    assert "On, but without any row: sequential." in page.text()


HOSTILE = "</pre></script><img src=x onerror=alert(1)>\u202e{{ 7 * 7 }}\"' --> | `$x_{$\n---\n# big"


@pytest.fixture
def hostile(folder: Path) -> Path:
    """Markup in every text that comes from the data or from settings, and very long words."""
    table = rows().with_columns(
        prompt=pl.col("prompt") + HOSTILE + "W" * 9000,
        completion=pl.lit(HOSTILE + "漢" * 3000),
        text_origin=pl.when(pl.col("task") == "query_search").then(pl.lit("llm:" + HOSTILE)),
        row_id=pl.col("row_id") + HOSTILE,
    )
    table.write_parquet(folder / "train.parquet")
    titles = [HOSTILE, "A" * 9000, "", "漢" * 90, "mat"]
    facts = replace(
        FACTS, name=HOSTILE + "B" * 900, tokenizer=HOSTILE, data={"protocol": HOSTILE, "users": 3}
    )
    items = ITEMS.with_columns(title=pl.Series(titles))
    write_card(folder, facts, items, count_words)
    return folder


def test_hostile_text_stays_text(hostile):
    html = (hostile / "report.html").read_text("utf-8")
    page = check_structure(html)
    shown = page.text()
    assert "</script><img src=x onerror=alert(1)>" in shown and "{{ 7 * 7 }}" in shown
    assert "A" * MAX_TITLE_CHARS not in html and "A" * 50 in shown and "\u202e" not in html
    assert "W" * MAX_TEXT not in html and "W" * 500 in shown
    examples = json.loads((hostile / "card.json").read_text("utf-8"))["examples"]
    assert all(HOSTILE + "W" * 9000 in example["prompt"] for example in examples)


def test_hostile_text_stays_text_in_markdown(hostile):
    text = (hostile / "README.md").read_text("utf-8")
    _, front, body = text.split("---\n", 2)
    assert "onerror" in yaml.safe_load(front)["pretty_name"]
    assert "<img" not in body and "\u202e" not in body
    heads = [line for line in body.splitlines() if line.startswith("#")]
    assert len(heads) == 6  # the title and five sections
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in body.splitlines() if line[:1] == "|"]
    assert set(widths) == {8, 4, 5}  # 7 columns twice, 3 and 4: no cell breaks its table


def test_the_readme_tells_the_same_facts(card, folder):
    text = (folder / "README.md").read_text("utf-8")
    assert text == render_readme(json.loads((folder / "card.json").read_text("utf-8")))
    for line in (
        "| sequential | history | history | SIDs, one after the other | 3 | 33.3% | 2 |",
        "| All rows | 6 | 8 | 8 | 5.9 | 2.0 | 9 |",
        "| query\\_search | 4 | 75.0% | 25.0% |",
        "| title\\_to\\_sid | catalogue item | title | a SID |",
        "- rating: the data have no ratings",
        "- Seed: 3",
    ):
        assert line in text


def test_the_folder_loads_as_a_dataset(card, folder):
    datasets = pytest.importorskip("datasets")
    sizes = {("train", "train"): 9, ("held_out", "validation"): 3, ("held_out", "test"): 3,
        ("rl", "rl"): 2}  # fmt: skip
    for (name, split), size in sizes.items():
        cache = str(folder / "cache")
        loaded = datasets.load_dataset(str(folder), name, split=split, cache_dir=cache)
        assert len(loaded) == size
    assert list(datasets.load_dataset(str(folder), cache_dir=str(folder / "cache"))) == ["train"]


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Reports what the framed page, which has no scripts of its own, looks like.
FRAME = """<iframe src="{page}" style="border:0;width:{width}px;height:900px"></iframe>
<script>onload = () => {{
  const frame = document.querySelector("iframe").contentDocument;
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
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_finds_nothing_to_complain_about(hostile, width):
    frame = hostile / "frame.html"
    frame.write_text(FRAME.format(page="report.html", width=width))
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync",
        "--no-first-run", "--disable-background-networking", "--disable-component-update",
        "--hide-scrollbars", "--allow-file-access-from-files", "--enable-logging=stderr",
        f"--user-data-dir={hostile / 'profile'}", "--dump-dom", "--window-size=1300,1000",
        frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    found = re.search(r"<title>width (\d+) text ([\d.]+) cut (\d+)", done.stdout)
    assert found is not None, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    assert int(found[1]) == width, f"the page scrolls sideways at {width} px"
    assert float(found[2]) >= 9, f"the page has text of {found[2]} px at {width} px"
    assert found[3] == "0", f"the page cuts {found[3]} texts of figures at {width} px"
