"""Prompts of many histories are those of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.generation.history_prompts import PromptEncoder, newest, prompts_of
from genrec.item_lists import ItemLists
from genrec.modeling import add_sid_tokens, encode_prompts
from genrec.prompts import PromptRenderer
from genrec.recommend import Recommender

MAX_HISTORY = 6


@pytest.fixture(scope="module")
def shop(tiny):
    return tiny.shop(max_history=MAX_HISTORY)


def recommender_of(shop, tokenizer, prompts: Path | None = None) -> Recommender:
    """One that makes prompts and needs no engine."""
    template = "sequential/seen/01" if prompts is None else "sequential/seen/a"
    return Recommender(
        shop.catalog, shop.semantic_ids, PromptRenderer(prompts), template, tokenizer, None,
        MAX_HISTORY, "sft",
    )  # fmt: skip


def lists_of(histories: list[list[int]]) -> ItemLists:
    return ItemLists.from_column(pl.Series(histories, dtype=pl.List(pl.Int64)))


def test_the_newest_of_lists():
    kept = newest(lists_of([[1, 2, 3], [], [4], [5, 6]]), 2)
    assert kept.values.tolist() == [2, 3, 4, 5, 6] and kept.offsets.tolist() == [0, 2, 2, 3, 5]
    assert newest(lists_of([[], []]), 2).offsets.tolist() == [0, 0, 0]


def some_histories() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 20, n).tolist() for n in (0, 1, 5, 6, 7, 30, 0, 6)]


def test_texts_of_many_are_those_of_each(shop):
    recommender = recommender_of(shop, None)
    for histories in (some_histories(), [[], []], [[3]]):
        made = prompts_of(recommender, lists_of(histories))
        assert made.to_list() == recommender.prompts(histories)


@pytest.mark.parametrize("bos", [False, True])
def test_token_ids_of_many_are_those_of_the_tokenizer(tiny, shop, bos: bool):
    tokenizer = tiny.tokenizer(bos)
    add_sid_tokens(tokenizer, shop.semantic_ids)
    recommender, histories = recommender_of(shop, tokenizer), some_histories()
    wanted = encode_prompts(tokenizer, recommender.prompts(histories))
    made = PromptEncoder(recommender).encode(lists_of(histories), ["not read"] * len(histories))
    assert made == wanted
    assert all(type(i) is int for row in made for i in row)
    assert bos == (made[0][0] == tokenizer.bos_token_id)


def test_a_tokenizer_that_joins_sid_tokens_is_asked_each_time(tiny, shop):
    _, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)

    class Joining:
        """Begins a prompt with another token where SID tokens end it."""

        bos_token_id = None
        init_kwargs = tokenizer.init_kwargs

        def __call__(self, texts, **options):
            ids = tokenizer(texts, **options)["input_ids"]
            moved = [[7, *row] if len(row) > 1 and text.endswith(">") else row
                     for text, row in zip(texts, ids, strict=True)]  # fmt: skip
            return {"input_ids": moved}

    recommender = recommender_of(shop, Joining())
    prompts = recommender.prompts([[1, 2]])
    made = PromptEncoder(recommender).encode(lists_of([[1, 2]]), prompts)
    assert made == encode_prompts(recommender.tokenizer, prompts)
    assert made[0][0] == 7


@pytest.mark.parametrize("text", ["{{ history }}, and then", "{{ history|length }}{{ history }}"])
def test_a_template_that_does_not_end_with_the_history(shop, tmp_path: Path, text: str):
    folder = tmp_path / "prompts" / "sequential" / "seen"
    folder.mkdir(parents=True)
    (folder / "a.jinja").write_text(text)
    recommender = recommender_of(shop, None, tmp_path / "prompts")
    with pytest.raises(ValueError, match="must end with the history"):
        prompts_of(recommender, lists_of([[1, 2]]))
