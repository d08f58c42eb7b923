"""Prompts that are too long are found before a model is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from genrec.bundle.parts import ServedParts
from genrec.decoding.item_tokens import prepare_tokenizer
from genrec.generation.jobs import GenerationJob, check_users, generate
from genrec.generation.prompt_lengths import PromptLengths, context_of
from genrec.generation.users import SplitRows
from genrec.item_lists import ItemLists
from genrec.modeling import encode_prompts
from genrec.recommend import Recommender
from genrec.title_ids import TitleIds

HISTORIES = [[], [3], [5, 1, 2], [7] * 9, [19, 0, 4, 4, 8, 9]]


@pytest.fixture(scope="module", params=["codes", "titles"])
def run_dir(request, tiny, tmp_path_factory) -> Path:
    run, shop = tmp_path_factory.mktemp("run"), tiny.shop(max_history=6)
    if request.param == "codes":
        model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    else:
        tokenizer = tiny.tokenizer()
        shop = replace(shop, semantic_ids=TitleIds.of_catalog(shop.catalog, 40)[0])
        prepare_tokenizer(tokenizer, shop.semantic_ids)
        model = tiny.lm(len(tokenizer), context=512)
    tiny.save_run(run, shop, model, tokenizer, 6)
    return run


def test_the_limit_is_the_engine_s(run_dir: Path):
    """One token less than a prompt and its item need is too little, for check and engine alike."""
    parts, recommender = ServedParts.of_run(run_dir), Recommender.load(run_dir)
    lists = ItemLists.from_column(pl.Series(HISTORIES, dtype=pl.List(pl.Int64)))
    prompts = encode_prompts(recommender.tokenizer, recommender.prompts(HISTORIES))
    needed = [len(ids) + recommender.engine.trie.n_levels for ids in prompts]
    assert PromptLengths(parts, max(needed)).first_too_long(lists) is None
    assert PromptLengths(parts, None).first_too_long(lists) is None
    for context in {n - 1 for n in needed}:
        first = next(row for row, n in enumerate(needed) if n > context)
        assert PromptLengths(parts, context).first_too_long(lists) == (first, needed[first])
    config = recommender.engine.model.config
    assert context_of(parts.model) == config.max_position_embeddings
    config.max_position_embeddings = needed[3]
    recommender.recommend([recommender.catalog["item_id"][7]] * 9)
    config.max_position_embeddings = needed[3] - 1
    with pytest.raises(ValueError, match=f"needs {needed[3]} tokens"):
        recommender.recommend([recommender.catalog["item_id"][7]] * 9)


def test_users_are_checked_for_it(run_dir: Path, tmp_path: Path):
    rows = pl.read_parquet(run_dir / "data" / "test.parquet")[:5].with_columns(
        pl.Series("history_item_index", HISTORIES, dtype=pl.List(pl.Int32))
    )
    job = GenerationJob(SplitRows(rows, False), tmp_path, 2, 5, "f" * 64, 2)
    parts = ServedParts.of_run(run_dir)
    lists = ItemLists.from_column(rows["history_item_index"])
    row, tokens = PromptLengths(parts, 1).first_too_long(lists)
    assert row == 0
    seen: list[int] = []
    check_users(job, 20, PromptLengths(parts, 1000), seen.append)
    assert seen == [2, 2, 1]
    check_users(job, 20, PromptLengths(parts, 1000), seen.append)
    assert len(seen) == 3  # kept
    limit = PromptLengths(parts, tokens + 1)  # another max_model_len: checked again
    with pytest.raises(ValueError, match=r"\(row [23]\) with its item needs \d+ tokens, .* holds"):
        check_users(job, 20, limit)
    assert not list(tmp_path.glob("recommendations-*"))
    generate(Recommender.load(run_dir), job)


def test_context_of_an_engine(tmp_path: Path):
    config = {"model_type": "qwen3", "max_position_embeddings": 777}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_of(tmp_path) == context_of(tmp_path, "vllm") == 777
    assert context_of(tmp_path, "vllm", 300) == 300
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_of(tmp_path) == 777 and context_of(tmp_path, "vllm") is None
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    text = json.dumps({"base_model_name_or_path": str(tmp_path)})
    (adapter / "adapter_config.json").write_text(text)
    assert context_of(adapter) == 777
