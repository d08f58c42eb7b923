"""The report page: structure, hostile text, and a browser that has nothing to complain about."""

from __future__ import annotations

import base64
import re

import pytest
from browser import CHROMIUM, Browser
from page_elements import Page

from genrec.artifacts import read_json
from genrec.audit.payloads import STORE, erase_payloads
from genrec.audit.recorded import RecordedRun
from genrec.audit.records import read_opened
from genrec.audit.report import MAPPING, read_mapping, read_sample, render_report
from genrec.page import MAX_TITLE_CHARS, display_text


@pytest.fixture(scope="module")
def html(audited_run) -> str:
    return (audited_run / "audit" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_it_is_one_self_contained_page(html, page):
    assert html.startswith("<!doctype html>") and page.all("html") == [{"lang": "en"}]
    assert not page.all("script") and not page.all("iframe") and not page.all("img")
    links = [a["href"] for a in page.all("a")] + [a["href"] for a in page.all("link")]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert not re.search(r"url\(|@import|https?:", html)
    names = {
        attributes.get("name") or attributes.get("http-equiv") for attributes in page.all("meta")
    }
    assert {"viewport", "color-scheme", "Content-Security-Policy"} <= names
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_links_and_labels_lead_somewhere(page):
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for a in page.all("a") if a["href"].startswith("#")]
    assert len([t for t in targets if re.fullmatch(r"r\d+-h\d+", t)]) > 5  # evidence
    labels = [a["aria-labelledby"] for _, a, _ in page.elements if a.get("aria-labelledby")]
    assert set(targets) | set(labels) <= set(ids)


def test_headings_tables_and_landmarks(page):
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    assert len(page.all("main")) == 1 and len(page.all("nav")) == 1
    assert all(a.get("scope") in ("col", "row", "rowgroup") for a in page.all("th"))
    assert all(a.get("aria-labelledby") for a in page.all("table"))
    scrolling = [a for _, a, _ in page.elements if a.get("class") == "scroll"]
    assert scrolling and all(a.get("tabindex") == "0" for a in scrolling)  # reachable by keyboard


def test_what_it_says(page, html, audited_run):
    assert "size unknown" not in html and "sft stage, tiny" in html
    text = " ".join(page.pieces())
    records = list(read_opened(audited_run / "audit"))
    assert len(page.all("article")) == 5  # --report_users 5
    assert "14 lists on record, 6 of them explained" in text
    shown = [r for r in records if r["commitments"]["chains"]][:5]  # explained lists come first
    for record in shown:
        assert f'id="record-{record["record"]}"' in html and record["sha256"][:12] in text
        assert record["user"]["pseudonym"][:12] in text
        for place in range(len(record["input"]["history"])):
            assert f'id="r{record["record"]}-h{place}"' in html
    assert read_json(audited_run / "audit" / "head.json")["merkle_root"] in text
    assert "4 shards" in text
    assert "They are not the model’s reasoning" in text and "origin: template" in text
    assert "Not measured: the evaluate stage has not run" in text
    assert "Not explained: beyond the explained top 5." in text
    assert "genrec audit verify" in text
    users = {f"u{i}" for i in range(14)}
    assert not users & set(re.findall(r"[\w]+", text))


def test_the_mapping_is_the_file_that_ships(page):
    mapping = read_mapping()
    assert len(mapping["columns"]) == 5 and len(mapping["rows"]) == 10
    assert all(len(row) == 5 for row in mapping["rows"])
    text = " ".join(page.pieces())
    assert "Not legal advice." in text and "**" not in text and "`" not in text
    for article in ("Art. 27(1)", "Art. 37", "Art. 38", "Art. 40(4)", "2024/436", "2025/2050"):
        assert article in text and article in MAPPING.read_text(encoding="utf-8")


def test_an_erased_record_is_a_card_without_content(copied):
    first, second = [r for r in read_opened(copied / "audit") if r["commitments"]["chains"]][:2]
    erase_payloads(copied / "audit", [second["record"]])
    page = Page(render_report(RecordedRun.load(copied), read_sample(copied / "audit", 2)))
    text = " ".join(page.pieces())
    assert "The user was erased" in text and "1 of these records were erased" in text
    assert first["row_id"] in text and second["row_id"] not in text


def test_what_the_page_shows_of_a_log(copied):
    """Failures first, then what else is explained, then the rest; each in the log's order."""
    records = list(read_opened(copied / "audit"))
    explained = [r["record"] for r in records if r["commitments"]["chains"]]
    plain = [r["record"] for r in records if not r["commitments"]["chains"]]
    failed = explained[3]
    for path in (copied / "audit").glob("audit-*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(
            line.replace('"verdict":"passed"', '"verdict":"failed"').replace(
                '"masked":{}', '"masked":{"email":2}')
            if f'"record":{failed},' in line else line for line in lines
        ))  # fmt: skip
    sample = read_sample(copied / "audit", 8)
    order = [failed, *(n for n in explained if n != failed), *plain]
    assert [r["record"] for r in sample.records] == order[:8]
    assert (sample.n_records, sample.explained, sample.erased) == (14, 6, 0)
    assert sample.masked == {"email": 2}
    html = render_report(RecordedRun.load(copied), sample)
    assert html.count("A check of its explanations failed.") == 1
    assert html.count("it is not in the sample of the explain stage") == 2
    (copied / "audit" / STORE).unlink()
    with pytest.raises(ValueError, match="is missing; restore it"):
        read_sample(copied / "audit", 8)


@pytest.fixture(scope="module")
def hostile(audited_run) -> str:
    """A page that shows every list, and so every hostile title."""
    return render_report(RecordedRun.load(audited_run), read_sample(audited_run / "audit", 100))


def test_hostile_titles_stay_text(hostile):
    page = Page(hostile)
    assert not page.all("script") and len(page.all("h1")) == 1 and len(page.all("b")) == 0
    shown = page.pieces("bdi")
    assert "<script>alert(document.domain)</script>" in shown
    assert "\"quoted\" 'title' & </bdi></ol><h1>" in shown
    assert "{{ 7 * 7 }} {% raw %} <a_1><b_2> line break" in shown
    assert "שלום ברוך הבא" in shown
    assert max(map(len, shown)) <= MAX_TITLE_CHARS
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08]", hostile)
    assert "A" * 200 not in hostile and all(
        "on" != name[:2] for _, a, _ in page.elements for name in a
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u202eb\u2066c\u200b", "abc"),
        ("  2\n\tlines\u2028x ", "2 lines x"),
        ("", "(no text)"), ("\u200b", "(no text)"), (None, "None"), (7, "7"),
        ("é" * 20, "é" * 9 + "…"), ("\ud800x", "x"), ("x" * 10, "x" * 10),
        ("x" * 11, "x" * 9 + "…"),
        ("\u200b" * 100 + "x", "…"),
    ],
)  # fmt: skip
def test_display_text(text, shown):
    assert display_text(text, 10) == shown


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on PATH: nothing to render the page with"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser that is known to hear what a bad page does."""
    folder = tmp_path_factory.mktemp("browser")
    with Browser(folder / "profile") as made:
        noisy = folder / "noisy.html"
        noisy.write_text("<script>console.error('seen'); alert(1)</script>")
        made.open(noisy)
        heard = [message["method"] for message in made.said]
        assert "Runtime.consoleAPICalled" in heard and "Page.javascriptDialogOpening" in heard
        made.said.clear()
        yield made


@pytest.fixture
def shown(browser, hostile, tmp_path):
    """A browser with the page of hostile titles."""
    page = tmp_path / "report.html"
    page.write_text(hostile, encoding="utf-8")
    browser.do("Emulation.setEmulatedMedia", media="", features=[])
    browser.open(page)
    yield browser
    assert browser.said == []  # nothing said, whatever was done with it
    assert browser.value("location.href") == page.as_uri() or "#" in browser.value("location.href")


@needs_browser
def test_hostile_titles_do_nothing_in_a_browser(shown):
    for tag in ("script", "img", "iframe", "object", "form", "b", "i"):
        assert shown.value(f"document.getElementsByTagName('{tag}').length") == 0, tag
    assert shown.value("document.querySelectorAll('article').length") == 14
    assert shown.value("document.querySelectorAll('h1').length") == 1
    titles = shown.value("[...document.querySelectorAll('bdi')].map(e => e.textContent)")
    assert "<script>alert(document.domain)</script>" in titles
    attributes = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    assert not [name for name in shown.value(attributes) if name.startswith("on")]


@needs_browser
def test_every_record_opens_by_keyboard_alone(shown):
    """Tab leads to each record's line; Enter and the space bar open and close it."""
    active = "document.activeElement.closest('summary')?.closest('article')?.id ?? null"
    is_open = "document.activeElement.parentElement.open"
    wanted = shown.value("[...document.querySelectorAll('article')].map(e => e.id)")
    opened: list[str] = []
    for _ in range(600):
        shown.press("Tab")
        if (record := shown.value(active)) is None:
            continue
        assert record not in opened, "the focus went around before all were reached"
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert shown.value(outline) != "none"  # one sees where one is
        before = shown.value(is_open)
        for key, state in (("Enter", not before), ("Space", before)):
            shown.press(key)
            assert shown.value(is_open) is state, (record, key)
        if not before:
            shown.press("Enter")
        content = f"document.querySelector('#{record} ol.list').checkVisibility()"
        assert shown.value(content), record
        opened.append(record)
        if len(opened) == len(wanted):
            break
    assert opened == wanted and len(opened) == 14


@needs_browser
def test_print_shows_all_records_and_dark_is_dark(shown, tmp_path):
    lists = "[...document.querySelectorAll('article ol.list')]"
    visible = f"{lists}.filter(e => e.checkVisibility()).length"
    colour = "getComputedStyle(document.body).backgroundColor"
    assert shown.value("document.querySelectorAll('details.record[open]').length") == 1
    assert shown.value(visible) == 1  # the others are closed on the screen
    assert shown.value(colour) == "rgb(246, 247, 249)"
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    shown.do("Emulation.setEmulatedMedia", media="screen", features=dark)
    assert shown.value(colour) == "rgb(18, 22, 28)"
    for width in (420, 1400):
        shown.screenshot(shot := tmp_path / f"dark-{width}.png", width, 1600)
        assert shot.stat().st_size > 20_000
        wide = "document.documentElement.scrollWidth > innerWidth"
        assert not shown.value(wide)  # nothing has to be scrolled sideways
    shown.do("Emulation.setEmulatedMedia", media="print", features=[])
    assert shown.value(visible) == 14 and shown.value(colour) == "rgb(255, 255, 255)"
    printed = base64.b64decode(shown.do("Page.printToPDF")["data"])
    assert printed.startswith(b"%PDF") and len(printed) > 30_000
