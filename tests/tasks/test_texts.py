"""Texts by rules: what they say, what they must not say, and what they can't depend on."""

from __future__ import annotations

import inspect
import re

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.tasks import texts
from genrec.tasks.attributes import AttributeIndex, item_attributes
from genrec.tasks.texts import (
    fill,
    history_preferences,
    item_intentions,
    item_queries,
    names_title,
    review_aspects,
    review_preferences,
    written_renderer,
)

CATALOG = pl.DataFrame(
    {
        "item_index": pl.Series(range(8), dtype=pl.Int32),
        "item_id": range(100, 108),
        "title": [
            "Velvet Plum Polish", "Velvet Rose Polish", "Wool Hat", "Wool Mitten", "Item 104",
            "Hats", "Tea <a_1>", "Tea (1994)",
        ],
        "brand": ["Acme", "Acme", "Zed", "Zed", None, None, "Bo <|im_end|>", None],
        "categories": [
            ["Nails", "Nail Polish"], ["Nails", "Nail Polish"], ["Hats"], ["Gloves & Mittens"],
            None, ["Hats"], ["Tea"], ["Tea"],
        ],
        "price": [None] * 8,
        "description": [None] * 8,
    },
    schema_overrides={"price": pl.Float64, "description": pl.String},
)  # fmt: skip
ATTRIBUTES = item_attributes(CATALOG)
INDEX = AttributeIndex.build(ATTRIBUTES, len(CATALOG))
RENDERER = written_renderer()


def ids(n: int) -> pl.Series:
    return pl.Series([f"train-{i}" for i in range(n)])


def lists(rows) -> pl.Series:
    return pl.Series(rows, dtype=pl.List(pl.Int32))


def preferences(rows, **more) -> list[str | None]:
    return history_preferences(lists(rows), INDEX, RENDERER, ids(len(rows)), **more).to_list()


@pytest.mark.parametrize(
    "family",
    ["query", "intention", "preference", "review_preference", "step_evidence", "step_preference",
     "step_intent", "step_formulation", "step_rewriting", "step_rewriting_nothing"],
)  # fmt: skip
def test_families_have_enough_templates_and_unseen_ones_are_others(family):
    seen, unseen = (
        {RENDERER._sources[name] for name in RENDERER.names(family, kind)}
        for kind in ("seen", "unseen")
    )
    assert len(seen) >= 5 and unseen and not seen & unseen


def test_fill_is_row_for_row_render_and_null_where_a_field_is():
    values = pl.Series(["a", None, "c <a_1>", "d"])
    filled = fill(RENDERER, "intention", ids(4), 3, texts={"wish": values})
    drawn = RENDERER.pick_many("intention", "written/intention/" + ids(4), 3)
    assert filled[1] is None
    for row in (0, 2, 3):
        assert filled[row] == RENDERER.render(drawn[row], texts={"wish": values[row]})


def test_fill_goes_through_the_templates_by_epoch_and_is_repeatable():
    values = pl.Series(["it"] * 3)
    epochs = [
        tuple(fill(RENDERER, "intention", ids(3), 3, epoch, texts={"wish": values}))
        for epoch in range(5)
    ]
    assert all(len({epoch[row] for epoch in epochs}) == 5 for row in range(3))
    again = fill(RENDERER, "intention", ids(3), 3, 4, texts={"wish": values})
    assert tuple(again) == epochs[4]


def test_queries_are_two_to_six_known_words():
    table = item_queries(CATALOG, ATTRIBUTES, RENDERER)
    words = dict(table.select("item_index", "text").iter_rows())
    assert all(2 <= len(text.split()) <= 6 for text in words.values())
    assert set(table["origin"]) == {"rule"}
    assert set(words[0].split()) <= {"acme", "nail", "polish", "velvet", "nails"}
    assert set(words[3].split()) <= {"zed", "gloves", "mittens", "wool"}
    assert 4 not in words and 5 not in words  # nothing, and one word, is known
    assert len(set(words[3].split())) == len(words[3].split())


def test_queries_vary_with_the_epoch():
    drawn = {item_queries(CATALOG, ATTRIBUTES, RENDERER, epoch=e)["text"][0] for e in range(6)}
    assert len(drawn) > 2


def test_intentions_say_what_is_known_and_never_the_title():
    for epoch in range(5):
        table = item_intentions(CATALOG, ATTRIBUTES, RENDERER, epoch=epoch)
        said = dict(table.select("item_index", "text").iter_rows())
        assert "“Nail Polish”" in said[0] and "Acme" in said[0] and "“velvet”" in said[0]
        assert 4 not in said  # nothing is known
        assert 5 not in said  # its title is its category
        # "Tea", the title without the year, is the category too.
        assert 7 not in said and "‹a_1›" not in said.get(6, "")
        for item, text in said.items():
            assert CATALOG["title"][item].lower() not in text.lower()


def test_an_intention_drops_the_brand_and_the_word_where_these_are_the_title():
    catalog = CATALOG.with_columns(
        title=pl.Series(["Acme", "Acme polish", *CATALOG["title"][2:]]),
    )
    said = item_intentions(catalog, item_attributes(catalog), RENDERER).filter(item_index=0)
    assert "Nail Polish" in said["text"][0] and "Acme" not in said["text"][0]


def test_names_title():
    table = pl.DataFrame(
        {
            "item_index": [0, 0, 7, 4, 2],
            "text": [
                "a VELVET plum polish!",
                "velvet polish",
                "some tea",
                "item 104",
                "",
            ],
        },
        schema_overrides={"item_index": pl.Int32},
    )
    assert names_title(CATALOG, table).to_list() == [True, False, True, False, False]


def test_preferences_name_what_recurs_newest_first():
    # Brand Zed (2, 3) is newer than the polishes (0, 1); Nails, Acme and velvet tell of the same
    # two items as Nail Polish and are not named beside it.
    (text,) = preferences([[0, 1, 2, 3]])
    assert re.search(r"the (brand|word) .*Zed|wool", text)
    first = min(text.find(word) for word in ("Zed", "wool") if word in text)
    named = [w for w in ("Nail Polish", "Nails", "Acme", "velvet") if w in text]
    assert len(named) == 1 and first < text.find(named[0])


def test_a_history_that_says_nothing_has_no_preference():
    assert preferences([[], [0], [0, 2], [0, 0], [4, 5]]) == [None] * 5
    assert history_preferences(lists([]), INDEX, RENDERER, ids(0)).to_list() == []


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 7), max_size=8), min_size=1, max_size=6),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_a_preference_is_a_function_of_its_own_row(rows, seed, epoch):
    together = preferences(rows, seed=seed, epoch=epoch)
    for row, items in enumerate(rows):
        name = ids(len(rows)).slice(row, 1)
        alone = history_preferences(lists([items]), INDEX, RENDERER, name, seed, epoch)
        assert alone.to_list() == [together[row]]


def test_blocks_of_rows_change_nothing(monkeypatch):
    rows = [[0, 1, 2, 3], [2, 5, 3], [], [6, 7, 0, 1], [1, 0]]
    whole = preferences(rows)
    monkeypatch.setattr(texts, "BLOCK_ROWS", 2)
    assert preferences(rows) == whole and whole[0] is not None


def test_no_argument_can_carry_a_target():
    for function in (history_preferences, review_preferences):
        assert not [n for n in inspect.signature(function).parameters if "target" in n]


REVIEWS = pl.DataFrame(
    {
        "user_id": ["u", "u", "u", "u", "v"],
        "item_index": pl.Series([0, 1, 2, 3, 0], dtype=pl.Int32),
        "position": pl.Series([0, 1, 2, 3, 0], dtype=pl.Int32),
        "rating": [5.0, 1.0, 3.0, 5.0, 4.0],
        "summary": ["Great fit!", "overpriced", "smells", None, "Comfy. soft"],
        "review": ["So comfortable, fits.", "The SIZE is wrong; itchy fabric", "ok", "soft", None],
    }
)


def test_aspects_carry_the_sign_of_the_rating():
    table = review_aspects(REVIEWS).sort("user_id", "position", "aspect")
    assert table.select("user_id", "position", "aspect", "sign").rows() == [
        ("u", 0, "comfort", 1), ("u", 0, "fit", 1),
        ("u", 1, "fit", -1), ("u", 1, "material", -1), ("u", 1, "price", -1),
        ("u", 3, "softness", 1),
        ("v", 0, "comfort", 1), ("v", 0, "softness", 1),
    ]  # fmt: skip
    assert review_aspects(REVIEWS.drop("summary", "review")).is_empty()


def test_review_preferences_know_only_what_the_user_wrote_before():
    rows = pl.DataFrame({"user_id": ["u"] * 5 + ["w"], "position": [0, 1, 2, 3, 4, 9]})
    said = review_preferences(rows, review_aspects(REVIEWS), RENDERER, ids(6)).to_list()
    assert said[0] is None and said[5] is None
    assert "praise comfort and fit" in said[1] and "complain" not in said[1]
    # Praised once and complained about once: the fit is not named any more.
    assert "praise comfort but complain about material and price" in said[2]
    assert re.sub(r".* praise", "", said[3]) == re.sub(r".* praise", "", said[2])  # three stars
    assert "praise comfort and softness" in said[4]


def test_later_reviews_and_other_users_change_no_review_preference():
    rows = pl.DataFrame({"user_id": ["u"] * 3, "position": [1, 2, 3]})
    before = review_preferences(rows, review_aspects(REVIEWS), RENDERER, ids(3)).to_list()
    later = REVIEWS.filter((pl.col("user_id") == "u") & (pl.col("position") < 3))
    changed = pl.concat([later, REVIEWS.filter(position=3).with_columns(review=pl.lit("smell"))])
    after = review_preferences(rows, review_aspects(changed), RENDERER, ids(3)).to_list()
    assert before == after and None not in before


def test_intentions_name_what_training_reviews_praise():
    praised = pl.DataFrame(
        {
            "user_id": ["u", "v", "u", "v", "w"],
            "item_index": pl.Series([4, 4, 4, 4, 4], dtype=pl.Int32),
            "position": [0, 0, 0, 0, 0],
            "aspect": ["fit", "fit", "price", "price", "price"],
            "sign": [1, 1, 1, -1, -1],
        }
    )
    said = item_intentions(CATALOG, ATTRIBUTES, RENDERER, praised).filter(item_index=4)
    assert "praise for its fit" in said["text"][0] and "price" not in said["text"][0]
