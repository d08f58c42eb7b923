"""Values of crawled pages: text, titles, prices, lists."""

from __future__ import annotations

import logging

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from genrec.data.readers.values import (
    categories,
    described_catalog,
    json_lists,
    plain_texts,
    plain_titles,
    prices_or_null,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<b>Big</b> <br/>dog<!-- x\ny --> ", "Big dog"),
        ("Tom &amp; Jerry&#39;s &quot;show&#34; &eacute;", 'Tom & Jerry\'s "show" é'),
        ("&lt;br&gt;new", "new"),  # escaped tags are tags
        ("a &amp;lt; b", "a &lt; b"),  # unescaped once
        ("x < y > z <3 <a_12>", "x < y > z <3 <a_12>"),  # no tags: they are escaped in prompts
        ('<a href="x">link</a>\u00a0\t\n end\x00', "link end"),
        (" <p> ", None),
        ("", None),
        (None, None),
        ("R&D & co & AT&T;", "R&D & co & AT&T;"),
    ],
)
def test_plain_texts(text, expected):
    assert plain_texts(pl.Series([text], dtype=pl.String), "t").to_list() == [expected]


@given(st.lists(st.none() | st.text(max_size=60), max_size=8))
def test_plain_texts_hold_no_line_breaks_and_keep_their_places(values):
    values = [v if v is None else v.encode("utf-8", "ignore").decode() for v in values]
    column = pl.Series("x", values, dtype=pl.String)
    result = plain_texts(column, "t", 20)
    assert len(result) == len(column)
    assert not result.str.contains(r"[\n\r\t\x00]").any()
    assert (result.str.len_chars().fill_null(1).is_between(1, 20)).all()
    # Each cell by itself gives what it gives among the others.
    alone = [plain_texts(column[i : i + 1], "t", 20)[0] for i in range(len(column))]
    assert result.to_list() == alone


def test_titles_that_are_leftovers(caplog):
    titles = [
        'Industrial & Scientific" />', 'Glue, 25 mL,Boss,RFX7" />', "var x = new Date().getTime()",
        'Monitor 27"', None,
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        result = plain_titles(pl.Series(titles), "items.json")  # type: ignore[arg-type]
    assert result.to_list() == [None, "Glue, 25 mL,Boss,RFX7", None, 'Monitor 27"', None]
    assert "items.json: 2 of 5 titles are leftovers" in caplog.text


def test_prices_or_null(caplog):
    cells = [
        "$1,299.00", "12.99", "0", "from 12.99", "$5.99 - $9.99", "—", "", None, "-3", "12,99",
        ".a-box-inner{color:red}", "inf", "None",
    ]  # fmt: skip
    with caplog.at_level(logging.WARNING):
        result = prices_or_null(pl.Series("price", cells), "meta.json")  # type: ignore[arg-type]
    assert result.to_list() == [1299.0, 12.99, 0.0, *[None] * 10]
    assert "6 of 13 prices aren't one number (for example 'from 12.99')" in caplog.text


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (['["a", "b"]', "[]", None], [["a", "b"], [], None]),
        (['[["a", "b"], ["c"]]', "[]"], [["a", "b"], None]),
        (["text", None], [["text"], None]),
        (
            ['["a"]', "text", '[["n", 1, null]]', "[x", '["bad'],
            [["a"], ["text"], ["n", "1"], ["[x"], ['["bad']],
        ),
        ([None], [None]),
    ],
)  # fmt: skip
def test_json_lists(cells, expected):
    assert json_lists(pl.Series("c", cells, dtype=pl.String)).to_list() == expected


def test_described_catalog_keeps_rows_apart():
    items = pl.DataFrame(
        {
            "item_id": ["1", "2", "3", "4"],
            "t": ["<b>A</b>", "B", None, "D"],
            "c": ['["Tom &amp; Co", " "]', "[]", None, '["<br>"]'],
            "d": ['["one", "<p>two"]', "three", None, "[]"],
        }
    )
    names = {"title": "t", "categories": "c", "description": "d"}
    assert described_catalog(items, "f", names).rows() == [  # type: ignore[arg-type]
        ("1", "A", ["Tom & Co"], "one two"), ("2", "B", None, "three"), ("3", None, None, None),
        ("4", "D", None, None),
    ]  # fmt: skip


def test_categories_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="'c' holds Int64; categories are text or lists"):
        categories(pl.Series("c", [1]), "items.parquet")
