"""The map of a title index: one name for each item, append-only."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.artifacts import read_json, write_json
from genrec.prompts import escape_text
from genrec.semantic_ids import MAP_FILE, SemanticIds
from genrec.title_ids import TitleIds, load_map, unique_titles


def catalog(titles: list[str | None], first: int = 0) -> pl.DataFrame:
    ids = [f"i{first + row}" for row in range(len(titles))]
    return pl.DataFrame({"item_id": ids, "title": pl.Series(titles, dtype=pl.String)})


def named(titles: list[str | None], max_bytes: int = 60):
    table = catalog(titles)
    return unique_titles(table["title"], table["item_id"], max_bytes)


def test_equal_titles_are_numbered_in_catalogue_order():
    made = named(["tea pot", "tea pot", "tea pot (2)", " tea  pot", "Tea Pot", None, "item I5"])
    # Row 1 takes "(2)" before row 2 asks for it, so appended items change no earlier name.
    assert made.names == ["tea pot", "tea pot (2)", "tea pot (2) (2)", "tea pot (3)",
        "Tea Pot (4)", "Item i5", "item I5 (2)"]  # fmt: skip
    assert (made.numbered, made.untitled, made.shortened) == ([1, 2, 3, 4, 6], [5], [])
    assert named(["hat"] * 300).names[299] == "hat (300)"


def test_names_that_some_tokenizers_cannot_tell_apart_are_numbered():
    assert named(["ﬁne hat", "fine hat", "Ｆine hat"]).names == [
        "ﬁne hat", "fine hat (2)", "Ｆine hat (3)",
    ]  # fmt: skip


def test_items_without_a_title_are_called_by_their_id():
    made = named([None, "", "  \n", "\u200b", "hat"])
    assert made.names == ["Item i0", "Item i1", "Item i2", "Item i3", "hat"]
    assert made.untitled == [0, 1, 2, 3]
    ids = pl.Series(["<a_1>]"])
    assert unique_titles(pl.Series([None], dtype=pl.String), ids, 60).names == ["Item ‹a_1›)"]


def test_long_titles_are_cut_between_characters_and_told_apart():
    made = named(["red wool hat " * 9 + end for end in "abc"] + ["帽" * 50], max_bytes=20)
    assert made.names == ["red wool hat red woo", "red wool hat red (2)", "red wool hat red (3)",
        "帽" * 6]  # fmt: skip
    assert made.shortened == [0, 1, 2, 3] and made.numbered == [1, 2]
    with pytest.raises(ValueError, match="max_bytes=15 must be at least 16"):
        named(["hat"], max_bytes=15)


def test_nothing_in_a_title_can_look_like_another_item():
    titles = ["hat][scarf", "[hat]", "<a_1><b_2>", "［hat］", "hat\nscarf", "</s>", "hat\x00"]
    ids, _ = TitleIds.of_catalog(catalog(titles), 60)
    for sid in ids.sids():
        assert sid[0] == "[" and sid[-1] == "]"
        assert not set("[]<>\n\x00") & set(sid[1:-1])
    assert ids.sids().n_unique() == len(titles)


def test_a_saved_map_is_the_same_and_a_changed_one_is_refused(tmp_path):
    ids, _ = TitleIds.of_catalog(catalog(["hat", "scarf", None]), 60)
    ids.save(tmp_path)
    loaded = load_map(tmp_path)
    assert isinstance(loaded, TitleIds)
    assert loaded.sha256 == ids.sha256 and loaded.sids().to_list() == [
        "[hat]", "[scarf]", "[Item i2]",
    ]  # fmt: skip
    table = pl.read_parquet(tmp_path / "items.parquet")
    table.with_columns(title=pl.Series(["hat", "cap", "Item i2"])).write_parquet(
        tmp_path / "items.parquet"
    )
    with pytest.raises(ValueError, match="doesn't match semantic_ids.json"):
        load_map(tmp_path)


def test_maps_of_codes_load_as_before_and_code_readers_refuse_titles(tmp_path, tiny):
    tiny.sids(5).save(tmp_path / "codes")
    assert isinstance(load_map(tmp_path / "codes"), SemanticIds)
    assert "kind" not in read_json(tmp_path / "codes" / "semantic_ids.json")
    TitleIds.of_catalog(catalog(["hat"]), 60)[0].save(tmp_path / "titles")
    with pytest.raises(ValueError, match=r"can't be done with titles yet.*residual-kmeans"):
        SemanticIds.load(tmp_path / "titles")


@pytest.mark.parametrize(
    ("names", "message"),
    [(["hat", "hat"], "names repeat"), (["hat", "a]"], "not escaped"), (["hat", ""], "is empty"),
     (["hat", None], "missing"), (["hat"], "1 names for 2 items")],
)  # fmt: skip
def test_wrong_maps_are_refused(names, message: str):
    with pytest.raises(ValueError, match=message):
        TitleIds(pl.Series("item_id", ["a", "b"]), pl.Series("title", names), 60)


def test_a_later_catalogue_keeps_names_and_gives_none_away(tmp_path):
    first, _ = TitleIds.of_catalog(catalog(["hat", "scarf", "hat"]), 60)
    # i1 left, i0 has another title now, i3 to i5 are new and ask for names that are taken.
    later = pl.DataFrame(
        {"item_id": ["i4", "i2", "i0", "i3", "i5"], "title": ["scarf", "x", "cap", "hat", "cap"]}
    )
    grown, made, kept = first.successor(later)
    assert grown.names.to_list() == ["scarf (2)", "hat (2)", "hat", "hat (3)", "cap"]
    assert kept == 2 and made.numbered == [0, 1]
    assert grown.version == 2 and grown.descends_from(first.sha256)
    assert not first.descends_from(grown.sha256)
    grown.save(tmp_path)
    again = load_map(tmp_path)
    assert isinstance(again, TitleIds) and again.ancestors == (first.sha256,)
    saved = read_json(tmp_path / MAP_FILE)
    write_json(tmp_path / MAP_FILE, {**saved, "ancestors": ["0" * 64]})  # a stranger's hash
    with pytest.raises(ValueError, match="version, ancestors or quantizer_sha256 of"):
        load_map(tmp_path)
    back, _, kept = again.successor(pl.concat([catalog(["x"], 1), later]))
    assert back.names.to_list()[0] == "scarf" and kept == 6 and back.reserved is None
    with pytest.raises(ValueError, match=r"item ids are Int64, the map's are String"):
        first.successor(pl.DataFrame({"item_id": [1], "title": ["hat"]}))


@given(st.lists(st.one_of(st.none(), st.text(max_size=30), st.sampled_from(["hat", "hat (2)"])),
    min_size=1, max_size=12), st.integers(16, 40))  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_any_titles(titles: list[str | None], max_bytes: int):
    table = catalog([None if t is None else t.encode(errors="ignore").decode() for t in titles])
    ids, made = TitleIds.of_catalog(table, max_bytes)  # checks that names are distinct and escaped
    for name in ids.names:
        assert len(name.encode()) <= max_bytes and escape_text(name) == name
    half = len(titles) // 2 + 1
    assert TitleIds.of_catalog(table[:half], max_bytes)[1].names == made.names[:half]
    parts, _, kept = TitleIds.of_catalog(table[:half], max_bytes)[0].successor(table)
    assert parts.names.to_list() == made.names and kept == min(half, len(titles))
