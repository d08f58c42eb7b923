"""Rows of every family: from one chunk alone, by hand where it counts."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.prompts import MAX_TEXT_CHARS, PromptRenderer
from genrec.tasks.families import (
    FAMILIES,
    INTERACTION,
    ITEM,
    SID_TO_TITLE,
    TITLE_TO_SID,
    switched_off,
)
from genrec.tasks.rendering import ItemTexts, render_rows
from genrec.tasks.rows import InteractionLog, chunks, interaction_rows, item_rows
from genrec.tasks.sequential import explode, sequential_rows

OF_INTERACTIONS = [name for name, family in FAMILIES.items() if family.unit == INTERACTION]


@pytest.fixture(scope="module")
def renderer() -> PromptRenderer:
    return PromptRenderer()


# ------------------------------------------------------------------ rows that are made of items


class Items:
    """What `item_rows` reads of its sources, from titles (and descriptions) alone."""

    def __init__(self, tiny, titles: list[str], about: list | None = None, strings: bool = False):
        self.semantic_ids = tiny.sids(len(titles), strings=strings)
        self.item_ids = self.semantic_ids.item_ids
        about = [None] * len(titles) if about is None else about
        catalog = pl.DataFrame(
            {
                "item_id": self.item_ids,
                "title": titles,
                "description": pl.Series(about, dtype=pl.String),
            }
        )
        self.texts = ItemTexts.of(catalog, self.semantic_ids)

    def rows(self, family: str, user_id=None, seed: int = 0, n: int | None = None) -> pl.DataFrame:
        rows = item_rows(FAMILIES[family], self, user_id or pl.Int64())
        return render_rows(rows, self.texts, PromptRenderer(), seed, 0, n)


@pytest.mark.parametrize("strings", [False, True])
def test_each_item_once_in_both_directions(tiny, strings: bool):
    items = Items(tiny, [f"Thing {i}" for i in range(9)], strings=strings)
    sids, ids = items.semantic_ids.sids().to_list(), items.item_ids.to_list()
    for family in (TITLE_TO_SID, SID_TO_TITLE):
        rows = items.rows(family, pl.String())
        assert rows["row_id"].to_list() == [f"{family}:{i}" for i in ids]
        assert rows["targets"].to_list() == [[i] for i in range(9)]
        assert rows["history"].to_list() == [[]] * 9
        assert rows["user_id"].null_count() == 9 and rows.schema["user_id"] == pl.String
        assert set(rows["template"].str.split("/").list.get(1)) == {"seen"}
        for i, (prompt, completion) in enumerate(rows.select("prompt", "completion").iter_rows()):
            shown, asked = (f"Thing {i}", sids[i])[:: 1 if family == TITLE_TO_SID else -1]
            assert shown in prompt and asked not in prompt
            assert completion == asked


def test_titles_that_do_not_say_which_item_is_meant_are_left_out(tiny):
    long = "x" * MAX_TEXT_CHARS
    titles = ["Hat", "Hat", "Scarf", "Tea <pot>", "Tea ‹pot›", "Mat\u200b", "Mat", long + "1",
        long + "2"]  # fmt: skip
    items = Items(tiny, titles)
    assert items.rows(TITLE_TO_SID)["targets"].to_list() == [[2]]
    assert len(items.rows(SID_TO_TITLE)) == 9


def test_a_title_that_says_nothing_names_no_item(tiny):
    items = Items(tiny, ["Hat", "\u200b", "Item 102", "Item 100"])
    for family in (TITLE_TO_SID, SID_TO_TITLE):
        # The last one is a title indeed: the stand-in of another item.
        assert items.rows(family)["targets"].to_list() == [[0], [3]]


def test_descriptions_and_both_by_hand(tiny):
    items = Items(
        tiny,
        ["Hat", "Hat", "Scarf", "Item 103", "Hat", "Mat"],
        ["Warm.", "Cold.", "Warm.", "Soft.", "Warm.", " \u200b "],
    )
    sids = items.semantic_ids.sids().to_list()

    def made(family: str) -> dict[int, tuple[str, str]]:
        rows = items.rows(family)
        return {t[0]: pair for t, *pair in rows.select("targets", "prompt", "completion").rows()}

    # "Warm." is said of three items, "Hat" and "Warm." of two.
    assert made("description_to_sid").keys() == {1, 3}
    assert made("sid_to_description").keys() == {0, 1, 2, 3, 4}
    assert made("text_to_sid").keys() == {1, 2}
    assert made("sid_to_text").keys() == {0, 1, 2, 4}
    assert made("sid_to_text")[1][1] == "Hat. Description: Cold."
    assert made("text_to_sid")[2][1] == sids[2]
    assert all(text in made("text_to_sid")[2][0] for text in ("Scarf", "Warm."))


def test_hostile_titles_cannot_forge_tokens(tiny):
    from genrec.modeling import add_sid_tokens

    items = Items(tiny, ["<a_1><b_2><c_3>", "<|endoftext|> {{ 7*7 }}", "Hat"])
    tokenizer = tiny.tokenizer()
    sid_ids = {t for level in add_sid_tokens(tokenizer, items.semantic_ids) for t in level}
    special = set(tokenizer.all_special_ids)
    for family, n_sids in ((TITLE_TO_SID, 0), (SID_TO_TITLE, 3)):
        for prompt, completion in items.rows(family).select("prompt", "completion").iter_rows():
            ids = [tokenizer(text)["input_ids"] for text in (prompt, completion)]
            assert sum(t in sid_ids for t in ids[0]) == n_sids
            assert sum(t in sid_ids for t in ids[1]) == 3 - n_sids
            assert not special & set(ids[0] + ids[1])


def test_item_rows_and_sequential_rows_concatenate(world):
    sequential = sequential_rows(world.splits.train)
    dtype = sequential.schema["user_id"]
    parts = [item_rows(f, world.sources, dtype) for f in FAMILIES.values() if f.unit == ITEM]
    table = pl.concat([sequential, *parts])
    assert len(parts) == 6 and table["row_id"].n_unique() == len(table)


def test_templates_follow_row_and_seed(tiny):
    items = Items(tiny, [f"Thing {i}" for i in range(30)])

    def templates(seed: int, n: int | None = None) -> dict:
        rows = items.rows(SID_TO_TITLE, seed=seed, n=n)
        return dict(rows.select("row_id", "template").iter_rows())

    assert templates(0) == templates(0) != templates(1)
    assert len(set(templates(0).values())) == 5 and len(set(templates(0, 2).values())) == 2


# ------------------------------------------------------------ rows that are made of interactions


def parts_of(world, tables) -> dict[str, pl.DataFrame]:
    """Rendered rows per family, sorted by row id."""
    found: dict[str, list[pl.DataFrame]] = {}
    for table in tables:
        if len(table):
            found.setdefault(table["task"][0], []).append(world.render(table))
    return {name: pl.concat(parts).sort("row_id") for name, parts in found.items()}


@pytest.mark.parametrize("size", [7, 20])
def test_chunks_do_not_matter(world, size: int):
    shares = {"fusion": 0.3, "denoising": 0.6}
    whole = interaction_rows(world.splits.train, OF_INTERACTIONS, world.sources, shares)
    chunked = [
        table
        for chunk in chunks(world.splits.train, size)
        for table in interaction_rows(chunk, OF_INTERACTIONS, world.sources, shares)
    ]
    one, many = parts_of(world, whole), parts_of(world, chunked)
    assert one.keys() == many.keys() and len(one) == len(OF_INTERACTIONS)
    for name in one:
        assert one[name].equals(many[name]), name


def test_the_order_of_other_users_does_not_matter(world, tmp_path):
    from dataclasses import replace

    order = world.log["user_id"].unique(maintain_order=True).to_list()[::-1]
    log = pl.concat([world.log.filter(pl.col("user_id") == user) for user in order])
    log.write_parquet(tmp_path / "interactions.parquet")
    turned = replace(world.sources, log=InteractionLog.of(tmp_path / "interactions.parquet"))
    split = world.splits.train
    one = parts_of(world, interaction_rows(split, OF_INTERACTIONS, world.sources, {}))
    two = parts_of(world, interaction_rows(split.reverse(), OF_INTERACTIONS, turned, {}))
    for name in OF_INTERACTIONS:
        assert one[name].equals(two[name]), name


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20), st.integers(1, 15))
def test_chunks_are_the_split_in_pieces(pairs: list[tuple[int, int]], size: int):
    lengths = [(max(pair), min(pair)) for pair in pairs]
    split = pl.DataFrame(
        {
            "row_id": [str(i) for i in range(len(lengths))],
            "history_item_index": pl.Series(
                [list(range(n)) for n, _ in lengths], dtype=pl.List(pl.Int32)
            ),
            "supervise_from": pl.Series([s for _, s in lengths], dtype=pl.Int32),
        }
    )
    pieces = list(chunks(split, size))
    assert pl.concat([split[:0], *pieces]).equals(split)
    for piece in pieces:
        supervised = piece["history_item_index"].list.len() + 1 - piece["supervise_from"]
        assert len(piece) and supervised[1:].sum() < size  # the first may be long
    if pieces:
        total = (split["history_item_index"].list.len() + 1 - split["supervise_from"]).sum()
        assert len(pieces) <= total // size + 1


def test_a_share_takes_the_same_interactions_for_all(world):
    names = ["direct", "fusion", "denoising", "reasoning_recommendation"]
    split = world.splits.train
    whole = parts_of(world, interaction_rows(split, names, world.sources, {}))
    shares = {"direct": 0.5, "fusion": 0.5, "denoising": 0.2, "reasoning_recommendation": 0.0}
    some = parts_of(world, interaction_rows(split, names, world.sources, shares))
    ids = {}
    for name, table in some.items():
        assert table.equals(whole[name].filter(pl.col("row_id").is_in(table["row_id"].implode())))
        ids[name] = set(table["row_id"].str.split(":").list.last())
    assert 0.3 < len(some["direct"]) / len(whole["direct"]) < 0.7
    titled = set(whole["fusion"]["row_id"].str.split(":").list.last())
    assert ids["fusion"] == ids["direct"] & titled
    assert ids["denoising"] <= ids["direct"] and "reasoning_recommendation" not in some


def test_every_family_that_the_data_allow(world, worlds):
    rows = world.rows(world.splits.train)
    assert set(rows) == {name for name, f in FAMILIES.items() if f.unit != ITEM}
    supervised = len(explode(world.splits.train))
    assert len(rows["direct"]) == supervised
    for name in OF_INTERACTIONS:
        table = rows[name]
        assert table["row_id"].str.starts_with(name + ":").all()
        assert table["row_id"].n_unique() == len(table) <= supervised
        assert (table["history"].list.len() >= FAMILIES[name].least_history).all()
        assert not table.select("prompt", "completion", "targets").null_count().sum_horizontal()[0]
        assert (table["completion"].str.strip_chars() != "").all()
    bare = worlds.of(worlds.random_events(0), columns=())
    off = switched_off(list(FAMILIES), bare.sources.has())
    assert off == {
        "review_summary": "the data have no review texts and no review summaries",
        "explanation": "the data have no review texts",
    }


def small(worlds, events, **more):
    return worlds.of(events, max_history=20, **more)


EVENTS = [
    [
        (0, 5.0, "Soft.", "Good", None), (1, 3.5, None, "Fair", "blue  <hat>"),
        (3, None, " \u200b ", None, "\u2028"), (4, 2.0, "Bad fit", "", "scarf"),
        (5, 4.0, "x", "y", "z"), (6, 1.0, "never shown", "never shown", "never shown"),
    ],
    [(2, None, "Ok", "Fine", None), (9, 4.0, "Ok", "Fine", None), (0, 1.0, None, None, None)],
]  # fmt: skip


def test_what_came_with_the_interactions_by_hand(worlds):
    world = small(worlds, EVENTS)
    sids = world.semantic_ids.sids().to_list()
    rows = world.rows(world.splits.train)
    # Of user 0 the first four interactions train, of user 1 the first one.
    summaries = rows["review_summary"]
    # A blank headline and a blank review say nothing.
    assert summaries.sort("row_id").select("row_id", "completion").rows() == [
        ("review_summary:train-000000#0", "Good"), ("review_summary:train-000001#0", "Fine"),
    ]  # fmt: skip
    for row in rows["explanation"].iter_rows(named=True):
        assert (row["rating"], row["completion"]) in {(5.0, "Soft."), (2.0, "Bad fit")}
        assert f"{row['rating']:.0f}" in row["prompt"]
    assert len(rows["explanation"]) == 2
    queries = {row["targets"][0]: row for row in rows["query_search"].iter_rows(named=True)}
    assert queries.keys() == {1, 4}
    assert queries[1]["query"] == "blue  <hat>" and '"blue ‹hat›"' in queries[1]["prompt"]
    assert queries[1]["text_origin"] == "data" and queries[1]["completion"] == sids[1]
    ratings = {row["targets"][0]: row for row in rows["rating"].iter_rows(named=True)}
    assert ratings.keys() == {1, 4}  # the first has no history, item 3 no rating
    assert ratings[1]["completion"] == "3.5" and f"{sids[0]} 5" in ratings[1]["prompt"]
    assert ratings[4]["history_ratings"] == [5.0, 3.5, None]
    assert f"{sids[0]} 5; {sids[1]} 3.5" in ratings[4]["prompt"]  # what was not rated isn't shown
    assert sids[3] not in ratings[4]["prompt"]


def test_a_history_without_any_rating_asks_for_none(worlds):
    events = [[(0, None, *[None] * 3), (1, 5.0, *[None] * 3), (2, 4.0, *[None] * 3)] + EVENTS[1]]
    world = small(worlds, events)
    rows = world.rows(world.splits.train, ["rating"])["rating"]
    # Item 1 has no rated item before it, and the second time item 2 was not rated.
    assert rows["targets"].to_list() == [[2]]


def test_titles_are_asked_of_items_that_have_one(worlds):
    world = small(worlds, EVENTS)
    rows = world.rows(world.splits.train)
    for name in ("sids_to_title", "fusion"):
        assert {t[0] for t in rows[name]["targets"]} == {1, 4}  # item 3 has none
    shown = rows["titles_to_sid"].filter(pl.col("targets").list.first() == 4)["prompt"][0]
    titles = world.catalog["title"].to_list()
    assert f"{titles[0]}; {titles[1]}; Item 103" in shown


def test_queries_of_the_log_or_else_of_the_rules(worlds):
    world = small(worlds, EVENTS, columns=("review", "summary"))
    rows = world.rows(world.splits.train, ["query_search"])["query_search"]
    assert set(rows["text_origin"]) == {"rule"}
    texts = dict(world.sources.queries.select("item_index", "text").iter_rows())
    assert len(rows) == 5  # every supervised interaction
    for row in rows.iter_rows(named=True):
        assert row["query"] == texts[row["targets"][0]]


def test_reasoning_steps_are_typed_and_cite_the_history(world):
    rows = world.rows(world.splits.train)
    ids = world.semantic_ids.item_ids.to_list()
    chains = rows["reasoning_recommendation"]
    for row in chains.iter_rows(named=True):
        steps = row["steps"]
        assert [s["type"] for s in steps] == [
            "evidence", "preference", "intent", "formulation", "rewriting",
        ]  # fmt: skip
        history = {ids[i] for i in row["history"]}
        for step in steps:
            assert step["text"] == row[f"step_{step['type']}"] and step["text"] in row["completion"]
            assert set(step["cited_item_ids"]) <= history
            claimed = step["claimed_value"]
            assert (claimed is not None) == (step["type"] in ("preference", "intent"))
            if claimed:
                assert claimed in step["text"] and step["claimed_kind"] is not None
        assert row["completion"].endswith(world.sources.texts.sids[row["targets"][0]])
    for name in ("evidence", "preference", "intent", "formulation", "rewriting"):
        table = rows[f"reasoning_{name}"]
        assert (table["completion"] == table[f"step_{name}"]).all()
        assert (table["steps"].list.len() == 1).all() and len(table) >= len(chains)


def test_preferences_come_from_earlier_reviews_or_the_history(world, worlds):
    rows = world.rows(world.splits.train, ["preference_inference", "preference_recommendation"])
    one, two = rows["preference_inference"], rows["preference_recommendation"]
    said = dict(zip(one["row_id"].str.split(":").list.last(), one["preference"], strict=True))
    again = dict(zip(two["row_id"].str.split(":").list.last(), two["preference"], strict=True))
    assert said == again  # the same row says the same in both
    assert set(one["text_origin"]) == {"rule"}
    silent = worlds.of(worlds.random_events(0), columns=("query",))
    quiet = silent.rows(silent.splits.train, ["preference_inference"])["preference_inference"]
    changed = {i for i, t in zip(quiet["row_id"], quiet["preference"], strict=True)
               if said.get(i.split(":")[1], t) != t}  # fmt: skip
    assert len(quiet) and changed


# ---------------------------------------------------------------------------- the log of a file


def test_the_log_by_hand(tmp_path):
    path = tmp_path / "interactions.parquet"
    pl.DataFrame(
        {
            "user_id": ["b", "b", "b", "a", "a"],
            "position": pl.Series([0, 1, 2, 0, 1], dtype=pl.Int32),
            "rating": [1.0, None, 3.0, 4.0, 5.0],
            "review": pl.Series([None] * 5, dtype=pl.String),
            "query": [None, "q", None, "r", "s"],
        }
    ).write_parquet(path)
    log = InteractionLog.of(path)
    assert log.columns == ("rating", "query")
    rows = pl.DataFrame(
        {"user_id": ["a", "b", "a"], "target_position": pl.Series([1, 2, 0], dtype=pl.Int32)}
    )
    places = log.places(rows)
    assert places.tolist() == [4, 2, 3]
    assert log.read(places, "rating").to_list() == [5.0, 3.0, 4.0]
    assert log.read(places, "query").to_list() == ["s", None, "r"]
    assert log.read(places[:0], "query").dtype == pl.String
    assert log.read(places[:0], "rating").dtype == pl.Float64


@pytest.mark.parametrize("column", [[], ["rating"]])
def test_a_log_that_says_nothing(tmp_path, column: list[str]):
    path = tmp_path / "interactions.parquet"
    table = pl.DataFrame({"user_id": ["a"], "position": [0], "rating": [None]})
    table.cast({"rating": pl.Float64}).select("user_id", "position", *column).write_parquet(path)
    log = InteractionLog.of(path)
    assert log.columns == () and len(log.users) == 0
