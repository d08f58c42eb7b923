"""Title <-> SID rows."""

from __future__ import annotations

import polars as pl
import pytest

from genrec.prompts import MAX_TEXT_CHARS, PromptRenderer
from genrec.tasks.item_index import SID_TO_TITLE, TITLE_TO_SID, item_index_rows
from genrec.tasks.sequential import sequential_rows


@pytest.fixture(scope="module")
def renderer() -> PromptRenderer:
    return PromptRenderer()


def catalog_of(tiny, titles: list[str], strings: bool = False):
    semantic_ids = tiny.sids(len(titles), strings=strings)
    return pl.DataFrame({"item_id": semantic_ids.item_ids, "title": titles}), semantic_ids


@pytest.mark.parametrize("strings", [False, True])
def test_each_item_once_in_both_directions(tiny, renderer, strings: bool):
    catalog, semantic_ids = catalog_of(tiny, [f"Thing {i}" for i in range(9)], strings)
    sids = semantic_ids.sids().to_list()
    made = {}
    for family in (TITLE_TO_SID, SID_TO_TITLE):
        rows = made[family] = item_index_rows(family, catalog, semantic_ids, renderer, pl.String())
        assert rows["row_id"].n_unique() == 9
        assert rows["target_item_id"].to_list() == semantic_ids.item_ids.to_list()
        assert rows["user_id"].null_count() == 9 and rows.schema["user_id"] == pl.String
        assert set(rows["template"].str.split("/").list.get(1)) == {"seen"}
        for i, (prompt, completion) in enumerate(rows.select("prompt", "completion").iter_rows()):
            shown, asked = (f"Thing {i}", sids[i])[:: 1 if family == TITLE_TO_SID else -1]
            assert shown in prompt and asked not in prompt
            assert completion == asked


def test_titles_that_do_not_say_which_item_is_meant_are_left_out(tiny, renderer):
    long = "x" * MAX_TEXT_CHARS
    titles = [
        "Hat",
        "Hat",
        "Scarf",
        "Tea <pot>",
        "Tea ‹pot›",
        "Mat\u200b",
        "Mat",
        long + "1",
        long + "2",
    ]
    catalog, semantic_ids = catalog_of(tiny, titles)
    rows = item_index_rows(TITLE_TO_SID, catalog, semantic_ids, renderer, pl.Int64())
    assert rows["target_item_id"].to_list() == [102]
    assert len(item_index_rows(SID_TO_TITLE, catalog, semantic_ids, renderer, pl.Int64())) == 9


def test_an_empty_title_names_no_item(tiny, renderer):
    catalog, semantic_ids = catalog_of(tiny, ["Hat", "\u200b"])
    for family in (TITLE_TO_SID, SID_TO_TITLE):
        rows = item_index_rows(family, catalog, semantic_ids, renderer, pl.Int64())
        assert rows["target_item_id"].to_list() == [100]


def test_hostile_titles_cannot_forge_tokens(tiny, renderer):
    from genrec.modeling import add_sid_tokens

    catalog, semantic_ids = catalog_of(tiny, ["<a_1><b_2><c_3>", "<|endoftext|> {{ 7*7 }}", "Hat"])
    tokenizer = tiny.tokenizer()
    sid_ids = {t for level in add_sid_tokens(tokenizer, semantic_ids) for t in level}
    special = set(tokenizer.all_special_ids)
    for family, n_sids in ((TITLE_TO_SID, 0), (SID_TO_TITLE, 3)):
        rows = item_index_rows(family, catalog, semantic_ids, renderer, pl.Int64())
        for prompt, completion in rows.select("prompt", "completion").iter_rows():
            ids = [tokenizer(text)["input_ids"] for text in (prompt, completion)]
            assert sum(t in sid_ids for t in ids[0]) == n_sids
            assert sum(t in sid_ids for t in ids[1]) == 3 - n_sids
            assert not special & set(ids[0] + ids[1])


def test_families_concatenate(tiny, renderer):
    shop = tiny.shop()
    sequential = sequential_rows(shop.splits.train, shop.semantic_ids, renderer)
    dtype = sequential.schema["user_id"]
    parts = [
        item_index_rows(f, shop.catalog, shop.semantic_ids, renderer, dtype)
        for f in (TITLE_TO_SID, SID_TO_TITLE)
    ]
    table = pl.concat([sequential, *parts])
    assert table["row_id"].n_unique() == len(table)


def test_templates_follow_row_and_seed(tiny, renderer):
    catalog, semantic_ids = catalog_of(tiny, [f"Thing {i}" for i in range(30)])

    def templates(seed: int, n: int | None = None) -> dict:
        rows = item_index_rows(SID_TO_TITLE, catalog, semantic_ids, renderer, pl.Int64(), seed, n)
        return dict(rows.select("row_id", "template").iter_rows())

    assert templates(0) == templates(0) != templates(1)
    assert len(set(templates(0).values())) == 5 and len(set(templates(0, 2).values())) == 2
