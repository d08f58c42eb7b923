"""Titles as ids: token codes with an end mark."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.decoding.trie import SidTrie
from genrec.prompts import escape_text
from genrec.quantizers.title_index import TitleIndex, title_index


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny.tokenizer()


def build(tokenizer, titles: list[str | None], max_tokens: int = 24, escape=escape_text):
    item_ids = [f"i{row}" for row in range(len(titles))]
    return title_index(titles, item_ids, tokenizer, max_tokens, escape)


def check(index: TitleIndex, tokenizer, max_tokens: int = 24) -> None:
    """What must hold of every title index."""
    assert index.codes.dtype == np.int32
    assert index.lengths.max() <= max_tokens
    assert index.codes.shape == (len(index.texts), index.lengths.max() + 1)
    for text, row, length in zip(index.texts, index.codes, index.lengths, strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == row[:length].tolist()
        assert length > 0 and (row[:length] != index.end_id).all()
        assert (row[length:] == index.end_id).all()
    assert (SidTrie.build(index.codes).codes() == index.codes).all()  # distinct rows


def test_a_title_that_begins_another_ends_in_the_end_mark(tokenizer):
    index = build(tokenizer, ["red wool", "red wool hat", "oak"])
    check(index, tokenizer)
    assert index.texts == ("red wool", "red wool hat", "oak")
    assert index.end_id == tokenizer.eos_token_id
    short = index.lengths[0]
    assert (index.codes[0, :short] == index.codes[1, :short]).all()
    assert index.codes[0, short] == index.end_id != index.codes[1, short]
    trie = SidTrie.build(index.codes)
    # Below the shared title the trie offers the end mark and the longer title, no more.
    node = trie.node_of_leaf(int(short) - 1, trie.leaf_of_item[0])
    children = slice(*trie.children[int(short)][node : node + 2])
    assert set(trie.tokens[int(short)][children].tolist()) == {
        index.end_id, int(index.codes[1, short]),
    }  # fmt: skip


def test_equal_titles_are_numbered_in_catalogue_order(tokenizer):
    titles = ["tea pot", "tea pot", "tea pot (2)", " tea  pot", "tea pot (3)", None, "item i5"]
    index = build(tokenizer, titles)
    check(index, tokenizer)
    # Row 1 takes "(2)" before row 2 asks for it, so appended items change no earlier text.
    assert index.texts[:5] == ("tea pot", "tea pot (2)", "tea pot (2) (2)", "tea pot (3)",
        "tea pot (3) (2)")  # fmt: skip
    assert index.texts[5:] == ("item i5", "item i5 (2)")
    assert index.numbered == (1, 2, 3, 4, 6)
    assert (index.untitled, index.shortened) == ((5,), ())


def test_missing_titles_are_called_by_the_item_id(tokenizer):
    index = build(tokenizer, [None, "", "  \n", "\u200b", "hat"])
    check(index, tokenizer)
    assert index.texts == ("item i0", "item i1", "item i2", "item i3", "hat")
    assert index.untitled == (0, 1, 2, 3)
    hostile = title_index([None], ["<a_1>"], tokenizer, 24, escape_text)
    assert hostile.texts == ("item ‹a_1›",)


def test_long_titles_are_cut_and_told_apart(tokenizer):
    titles = ["red wool hat " * 9 + end for end in ("a", "b", "c")] + ["帽" * 50]
    index = build(tokenizer, titles, max_tokens=12)
    check(index, tokenizer, 12)
    assert index.shortened == (0, 1, 2, 3)
    assert index.numbered == (1, 2)
    assert index.texts[1].endswith(" (2)") and index.texts[2].endswith(" (3)")
    assert index.texts[3] == "帽" * 4  # three bytes each: no character is left in pieces
    with pytest.raises(ValueError, match="raise max_tokens"):
        build(tokenizer, titles, max_tokens=2)


def test_hundreds_of_equal_titles(tokenizer):
    index = build(tokenizer, ["hat"] * 300)
    check(index, tokenizer)
    assert index.texts[299] == "hat (300)"


def test_sid_and_special_tokens_cannot_be_titles(tiny):
    _, tokenizer, token_ids = tiny.sid_lm(tiny.sids(5))
    titles = ["<a_1><b_2> hat", "</s> hat", tokenizer.eos_token, "hat <c_1>"]
    index = build(tokenizer, titles)
    check(index, tokenizer)
    sid_ids = {token for level in token_ids for token in level}
    assert sid_ids.isdisjoint(index.codes.ravel().tolist())
    for title in ("<a_1> hat", "hat" + tokenizer.eos_token):
        with pytest.raises(ValueError, match=r"special, SID or unknown .*escape_text"):
            build(tokenizer, ["oak", title], escape=str)


def test_a_tokenizer_that_begins_texts_with_bos_adds_none(tiny):
    index = build(tokenizer := tiny.tokenizer(bos=True), ["red hat", "oak"])
    check(index, tokenizer)
    assert tokenizer.bos_token_id not in index.codes[:, 0]


def test_hostile_arguments(tiny, tokenizer):
    for titles, item_ids, max_tokens in [([], [], 9), (["a"], [], 9), (["a"], [1], 0)]:
        with pytest.raises(ValueError, match="one title per item"):
            title_index(titles, item_ids, tokenizer, max_tokens, escape_text)
    endless = tiny.tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no EOS token"):
        build(endless, ["hat"])


@given(st.lists(st.one_of(st.none(), st.text(max_size=12), st.sampled_from(["hat", "hat (2)"])),
    min_size=1, max_size=12), st.integers(10, 16))  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_any_titles(tokenizer, titles: list[str | None], max_tokens: int):
    index = build(tokenizer, titles, max_tokens)
    check(index, tokenizer, max_tokens)
    first = build(tokenizer, titles[: len(titles) // 2 + 1], max_tokens)
    assert index.texts[: len(first.texts)] == first.texts  # appending changes no earlier title
