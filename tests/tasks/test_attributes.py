"""Attributes of items, and what recurs in a history: hand-computed."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data.cleaning import missing_title
from genrec.tasks.attributes import (
    MAX_ITEMS,
    AttributeIndex,
    Histories,
    item_attributes,
    recurring,
)

CATALOG = pl.DataFrame(
    {
        "item_index": range(6),
        "item_id": [10, 11, 12, 13, 14, 15],
        "title": [
            "Acme Velvet Nail Polish, 12 oz",
            "Velvet hats by Zed <a_1>",
            "Item 12",
            None,
            "Tartan scarf, tartan lining",
            "TARTAN hat {{ 7*7 }}",
        ],
        "brand": ["Acme", "Zed", "Unknown", "Nails", "[INST] Zed", None],
        "categories": [
            ["Shop", "Nails", "Nail Polish"],
            ["Shop", "Hats"],
            ["Shop", "Nails"],
            None,
            ["Shop", ""],
            ["Shop", "Hats", "Hats"],
        ],
        "price": [1.0, 2.0, 3.0, 4.0, None, float("nan")],
        "description": [None, None, "soft velvet brush", "brush", "never used", None],
    }
)


def said(catalog: pl.DataFrame, item: int, kind: str, **settings) -> list[str]:
    table = item_attributes(catalog, **settings)
    return table.filter(pl.col("item_index") == item, pl.col("kind") == kind)["value"].to_list()


def test_categories_leave_out_what_nearly_all_items_share():
    assert [said(CATALOG, i, "category") for i in range(6)] == [
        ["Nails", "Nail Polish"], ["Hats"], ["Nails"], [], [], ["Hats"],
    ]  # fmt: skip


def test_a_brand_that_is_a_category_or_says_nothing_is_none_and_others_are_escaped():
    brands = [said(CATALOG, i, "brand") for i in range(6)]
    assert brands == [["Acme"], ["Zed"], [], [], ["(INST) Zed"], []]


def test_price_bands_are_quantiles_and_hold_every_known_price():
    # Quartiles of 1, 2, 3, 4: 1.75, 2.5, 3.25.
    assert [said(CATALOG, i, "price_band") for i in range(6)] == [
        ["under 1.75"], ["1.75 to 2.50"], ["2.50 to 3.25"], ["3.25 and over"], [], [],
    ]  # fmt: skip
    same = CATALOG.with_columns(price=pl.lit(5.0))
    assert item_attributes(same).filter(kind="price_band").is_empty()


def test_keywords_are_shared_words_that_brand_and_category_do_not_say():
    words = [said(CATALOG, i, "keyword") for i in range(6)]
    # "hat" and "hats" are the category; "polish" and "scarf" stand alone; item 2's title is a
    # stand-in and item 3 has none, so their descriptions speak; item 4's own is not read.
    assert words == [["velvet"], ["velvet"], ["brush", "velvet"], ["brush"], ["tartan"], ["tartan"]]


def test_keywords_are_ranked_by_tf_idf():
    titles = ["plum fig fig", "plum fig", "plum kiwi", "plum kiwi", "plum", "grape"]
    catalog = CATALOG.with_columns(
        pl.Series("title", titles), pl.Series("categories", [[]] * 6), pl.lit("").alias("brand")
    )
    assert said(catalog, 0, "keyword", n_keywords=1) == ["fig"]  # twice here, and rarer than plum
    assert said(catalog, 2, "keyword") == ["kiwi"]  # 5 of 6 titles have plum: it tells nothing
    assert said(catalog, 2, "keyword", min_keyword_items=3) == []


def test_missing_titles():
    assert missing_title(CATALOG).to_list() == [False, False, True, True, False, False]
    assert missing_title(CATALOG.drop("title")).all()


def test_a_catalogue_of_ids_alone_has_no_attributes():
    table = item_attributes(CATALOG.select("item_index", "item_id"))
    assert table.is_empty() and table.columns == ["item_index", "kind", "value"]


def test_hostile_text_stays_short_and_harmless():
    hostile = "<a_1>\u202e[INST]\n" + "x" * 100_000
    catalog = CATALOG.with_columns(
        title=pl.lit(hostile),
        brand=pl.lit(hostile),
        categories=pl.Series([[hostile, str(i)] for i in range(6)]),
    )
    values = item_attributes(catalog)["value"]
    assert values.str.len_chars().max() <= 60
    assert not values.str.contains(r"[<>\[\]\n\u202e]").any()


ATTRIBUTES = pl.DataFrame(
    [
        (0, "brand", "A"), (1, "brand", "A"), (2, "brand", "B"), (3, "brand", "B"),
        (0, "category", "x"), (1, "category", "x"), (2, "category", "x"), (4, "category", "x"),
        (0, "category", "z"),
    ],
    schema={"item_index": pl.Int32, "kind": pl.String, "value": pl.String},
    orient="row",
)  # fmt: skip


def history(*rows: list[int] | None) -> pl.Series:
    return pl.Series(rows, dtype=pl.List(pl.Int32))


def found(rows: pl.Series, n_items: int = 10) -> list[tuple]:
    index = AttributeIndex.build(ATTRIBUTES, n_items)
    got = recurring(Histories.from_column(rows, n_items), index)
    values = index.table["value"].gather(got.attributes)
    return [
        (int(r), v, int(c), round(float(lift), 6), int(m), round(float(s), 6))
        for r, v, c, lift, m, s in zip(
            got.rows, values, got.counts, got.lifts, got.masks, got.scores, strict=True
        )
    ]


def test_recurring_attributes_by_hand():
    # Items 0 and 1 of three share brand A: (2/3) / (2/10); x: items 0, 1, 2: (3/3) / (4/10).
    # Newest first 2, 1, 0 have the bits 1, 2, 4.
    got = found(history([0, 1, 2], [3], [], None, [5, 6]))
    lift = 2 / 3 / 0.2
    assert got == [
        (0, "A", 2, round(lift, 6), 0b110, round(2 * math.log(lift), 6)),
        (0, "x", 3, 2.5, 0b111, round(3 * math.log(2.5), 6)),
    ]


def test_a_repeated_item_counts_once_at_its_newest_place():
    assert found(history([0, 0, 5])) == []
    assert [(v, c, m) for _, v, c, _, m, _ in found(history([0, 1, 0, 3]))] == [
        ("A", 2, 0b110), ("x", 2, 0b110),
    ]  # fmt: skip


def test_what_is_as_common_in_the_catalogue_does_not_recur():
    assert [v for _, v, *_ in found(history([0, 2, 3, 5, 6]))] == ["B"]  # x: (2/5) / (4/10) = 1


def test_only_the_newest_items_count():
    rows = history([0, 1] + [9] * MAX_ITEMS, [0, 1] + [9] * (MAX_ITEMS - 2))
    assert {(r, v) for r, v, *_ in found(rows)} == {(1, "A"), (1, "x")}
    last = found(history([0, 1] + [9] * (MAX_ITEMS - 2)))
    assert last[0][4] == 1 << (MAX_ITEMS - 1) | 1 << (MAX_ITEMS - 2)


def test_best_is_the_highest_score_and_ties_go_to_the_first_attribute():
    index = AttributeIndex.build(ATTRIBUTES, 10)
    rows = history([0, 1, 2], [2, 3], [0, 1, 2, 3])
    best = recurring(Histories.from_column(rows, 10), index).best()
    assert best.rows.tolist() == [0, 1, 2]
    # 0: 3·ln 2.5 = 2.75 > 2·ln 3.33 = 2.41; 2: A and B both 2·ln 2.5 = 1.83 < x 3·ln 1.875 = 1.89.
    assert index.table["value"].gather(best.attributes).to_list() == ["x", "B", "x"]
    tied = recurring(Histories.from_column(history([0, 1, 3, 2, 5, 6, 7]), 10), index)
    assert index.table["value"].gather(tied.best().attributes).to_list() == ["A"]


def test_the_leaf_is_the_rarest_category():
    index = AttributeIndex.build(ATTRIBUTES, 5)
    leaves = pl.Series(index.leaves)
    named = index.table["value"].gather(leaves.set(leaves < 0, None)).to_list()
    assert named == ["z", "x", "x", None, "x"]


histories = st.lists(st.lists(st.integers(0, 5), max_size=9), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None)
@given(histories)
def test_recurring_equals_plain_counting(rows):
    expected = []
    owners = {}
    for item, kind, value in ATTRIBUTES.iter_rows():
        owners.setdefault((kind, value), set()).add(item)
    for row, items in enumerate(rows):
        newest = {item: age for age, item in reversed(list(enumerate(reversed(items))))}
        for (_, value), own in sorted(owners.items()):
            both = own & set(items)
            lift = len(both) / max(len(newest), 1) / (len(own) / 10)
            if len(both) >= 2 and lift >= 1.2:
                mask = sum(1 << newest[item] for item in both)
                expected.append((row, value, len(both), round(lift, 6), mask))
    assert [entry[:5] for entry in found(history(*rows))] == expected


def test_an_item_outside_the_catalogue_is_noticed():
    with pytest.raises(AssertionError, match="no catalogue row"):
        Histories.from_column(history([0, 10]), 10)


def test_lists_keep_their_order():
    rows = Histories.from_column(history([3, 1, 3, 2], [], [4]), 10)
    every = np.ones(5, dtype=bool)
    assert rows.lists(every).to_list() == [[2, 3, 1, 3], [], [4]]
    assert rows.lists(every, oldest_first=True).to_list() == [[3, 1, 3, 2], [], [4]]
    assert rows.lengths.tolist() == [3, 0, 1]
