"""Titles as codes: the same tokens in prompts, completions and the trie."""

from __future__ import annotations

import tracemalloc

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AutoTokenizer

from genrec.decoding.item_tokens import item_tokens, prepare_tokenizer
from genrec.decoding.trie import SidTrie
from genrec.modeling import encode_prompts, encode_rows
from genrec.prompt_format import FRAME, declare_format, declare_titles, encode_text, title_end
from genrec.title_ids import TitleIds
from genrec.title_index import (
    END_CODE,
    check_title_tokens,
    title_index,
    write_title_tokens,
)

HOSTILE = [
    None, "", "hat", "hat", "HAT", "hat (2)", 'the "red" hat', "the 'red' hat", "<a_1><b_2> hat",
    "[hat][scarf]", "hat][", "hat\nscarf", "hat.", "hat. ", "</s>", "<|endoftext|>", "<|pad|>",
    "красная шапка", "帽" * 80, "🎩 hat", "ﬁne hat", "fine hat", "red wool hat " * 30, "12", "1 2",
    "item: hat", "Item i0", "\u202ehat", "e\u0301t\u00e9",
]  # fmt: skip
START = "Bought so far, oldest first: "


def title_ids(titles: list[str | None]) -> TitleIds:
    ids = [f"i{row}" for row in range(len(titles))]
    table = pl.DataFrame({"item_id": ids, "title": pl.Series(titles, dtype=pl.String)})
    return TitleIds.of_catalog(table, 120)[0]


@pytest.fixture(params=["byte level", "with bos", "no line break token", "lower case", "chat"])
def tokenizer(request, tiny):
    made = tiny.tokenizer(bos=request.param == "with bos")
    if request.param == "no line break token":
        made.backend_tokenizer.normalizer = normalizers.Prepend("▁")
    elif request.param == "lower case":
        made.backend_tokenizer.normalizer = normalizers.Lowercase()
    elif request.param == "chat":
        made.chat_template = "[INST] {{ messages[0]['content'] }} [/INST]{{ '\n' }}"
        assert declare_format(made, "chat") == "chat"
    return made


def path(trie: SidTrie, token_ids: list[list[int]], row: int) -> list[int]:
    codes = trie.codes()[row][: trie.path_lengths()[row]]
    return [token_ids[level][code] for level, code in enumerate(codes)]


def test_what_is_trained_is_what_the_trie_holds(tokenizer):
    """Every item's completion is its path; a prompt is a prefix of every longer history's row."""
    ids = title_ids(HOSTILE)
    before = len(tokenizer)
    prepare_tokenizer(tokenizer, ids)
    assert len(tokenizer) == before  # no token is added
    made = item_tokens(tokenizer, ids)
    paths = [path(made.trie, made.token_ids, row) for row in range(ids.n_items)]
    assert made.own == [] and made.last == {title_end(tokenizer)}
    sids = ids.sids().to_list()
    rows = encode_rows(tokenizer, [START] * len(sids), sids, made.last)
    (start,) = encode_prompts(tokenizer, [START])
    for row, own, labels in zip(rows["input_ids"], paths, rows["labels"], strict=True):
        assert row == start + own and labels == [-100] * len(start) + own
        assert own[-1] == title_end(tokenizer) not in own[:-1]
    # A whole history in one pass.
    order = np.random.default_rng(0).permutation(len(sids)).tolist()
    whole = encode_rows(tokenizer, [START], ["".join(sids[i] for i in order)], made.last)
    (tokens,) = whole["input_ids"]
    at = len(start)
    for n, item in enumerate(order):
        prompt = START + "".join(sids[i] for i in order[:n])
        assert encode_prompts(tokenizer, [prompt]) == [tokens[:at]]
        assert tokens[at : at + len(paths[item])] == paths[item]
        at += len(paths[item])
    assert at == len(tokens)


def test_text_between_and_behind_items(tokenizer):
    ids = title_ids(["red hat", "oak"])
    prepare_tokenizer(tokenizer, ids)
    made = item_tokens(tokenizer, ids)
    red, oak = (path(made.trie, made.token_ids, row) for row in (0, 1))
    plain = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("a ", ". b", " 3")]
    texts = ["a [red hat][oak]. b", "[oak] 3", "", ". b"]
    assert encode_text(tokenizer, texts) == [
        plain[0] + red + oak + plain[1], oak + plain[2], [], plain[1],
    ]  # fmt: skip
    # Text behind items ends in EOS, an item needs none, and a list of any length gets it.
    made_rows = encode_rows(tokenizer, ["a "] * 2, ["[oak] 3", "[oak]"], made.last, [False, True])
    assert [row[-1] for row in made_rows["input_ids"]] == [tokenizer.eos_token_id] * 2


def test_the_end_mark_is_declared_and_saved(tokenizer, tmp_path):
    end = declare_titles(tokenizer)
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert end == (line_break[0] if len(line_break) == 1 else tokenizer.eos_token_id)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert title_end(loaded) == end
    assert encode_prompts(loaded, ["a [hat]"]) == encode_prompts(tokenizer, ["a [hat]"])


def test_without_the_declaration_brackets_are_text(tiny):
    tokenizer = tiny.tokenizer()
    assert title_end(tokenizer) is None
    plain = tokenizer(["a [hat] b"], add_special_tokens=False)["input_ids"]
    assert (
        encode_text(tokenizer, ["a [hat] b"]) == encode_prompts(tokenizer, ["a [hat] b"]) == plain
    )


def test_tokenizers_that_cannot_end_a_title_are_refused(tiny):
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("▁")
    tokenizer.init_kwargs[FRAME] = ("user: ", " assistant: ")
    with pytest.raises(ValueError, match=r"ends the turns of a chat; use prompt_format=plain"):
        declare_titles(tokenizer)
    del tokenizer.init_kwargs[FRAME]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="EOS is missing"):
        declare_titles(tokenizer)


def test_a_title_that_begins_another_ends_in_the_end_mark(tiny):
    tokenizer = tiny.tokenizer()
    declare_titles(tokenizer)
    index = title_index(["red wool", "red wool hat", "oak"], tokenizer)
    trie = SidTrie.build(index.codes, END_CODE)
    short = int(index.lengths[0])
    assert (index.codes[0, :short] == index.codes[1, :short]).all()
    assert index.codes[0, short] == END_CODE != index.codes[1, short]
    # Below the shared title the trie offers the end mark and the longer title, no more.
    node = trie.node_of_leaf(short - 1, trie.leaf_of_item[0])
    children = slice(*trie.children[short][node : node + 2])
    assert set(trie.tokens[short][children]) == {END_CODE, index.codes[1, short]}
    assert trie.path_lengths().tolist() == (index.lengths + 1).tolist()


def test_one_long_title_costs_no_more_than_its_codes(tiny):
    tokenizer = tiny.tokenizer()
    declare_titles(tokenizer)
    names = [f"hat {row}" for row in range(600)] + ["oak " * 2000]
    tracemalloc.start()
    index = title_index(names, tokenizer)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert index.codes.nbytes > 2**22
    assert peak < 1.3 * index.codes.nbytes


def test_names_that_a_tokenizer_confuses_are_refused(tiny):
    tokenizer = tiny.tokenizer()
    declare_titles(tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents()]
    )
    with pytest.raises(ValueError, match=r"'cafe' and 'café' have the same tokens"):
        title_index(["cafe", "café"], tokenizer)
    for name in ("", "hat" + tokenizer.eos_token, "hat\n"):
        with pytest.raises(ValueError, match="special or added ones"):
            title_index(["oak", name], tokenizer)


def test_a_tokenizer_that_encodes_otherwise_than_in_training_is_refused(tiny, tmp_path):
    tokenizer = tiny.tokenizer()
    ids = title_ids(["Red hat", "oak"])
    prepare_tokenizer(tokenizer, ids)
    with pytest.raises(ValueError, match=r"title_tokens.parquet is missing"):
        item_tokens(tokenizer, ids, model=tmp_path)
    write_title_tokens(tmp_path, ids.names.to_list(), tokenizer)
    trained = item_tokens(tokenizer, ids, model=tmp_path)
    assert (trained.trie.codes() == item_tokens(tokenizer, ids).trie.codes()).all()
    # New items have no tokens to compare with.
    check_title_tokens(tmp_path, ["oak", "cork"], tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    check_title_tokens(tmp_path, ["oak", "cork"], tokenizer)
    with pytest.raises(ValueError, match=r"encodes 1 titles in another way.*'Red hat'"):
        item_tokens(tokenizer, ids, model=tmp_path)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=10))
@settings(deadline=None, max_examples=60)
def test_any_titles(tiny, titles: list[str]):
    tokenizer = tiny.tokenizer()
    ids = title_ids([title.encode(errors="ignore").decode() for title in titles])
    prepare_tokenizer(tokenizer, ids)
    made = item_tokens(tokenizer, ids)
    assert made.trie.n_items == len(titles)
    for row, encoded in enumerate(encode_text(tokenizer, ids.sids().to_list())):
        assert encoded == path(made.trie, made.token_ids, row)
