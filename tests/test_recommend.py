"""Recommender and batch generation on a run folder made by library calls."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.artifacts import Stage, write_parquet
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.modeling import encode_prompts
from genrec.recommend import Recommender

MAX_HISTORY = 6


@pytest.fixture(scope="module", params=[False, True], ids=["integer ids", "string ids"])
def world(request, tiny, tmp_path_factory):
    """(run folder, shop, recommender)"""
    run = tmp_path_factory.mktemp("run")
    shop = tiny.shop(strings=request.param, max_history=MAX_HISTORY)
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(run, shop, model, tokenizer, MAX_HISTORY)
    return run, shop, Recommender.load(run)


def test_a_list_by_the_contract(world):
    _, shop, recommender = world
    ids = shop.catalog["item_id"].to_list()
    history = [ids[3], ids[0], ids[3], ids[7]]
    made = recommender.recommend(history, k=5)
    assert [r.rank for r in made] == [1, 2, 3, 4, 5]
    assert len({r.item_id for r in made}) == 5 and not {r.item_id for r in made} & set(history)
    sids = shop.semantic_ids.sids().to_list()
    for r in made:
        row = ids.index(r.item_id)
        assert type(r.item_id) is type(ids[0])
        assert r.title == shop.catalog["title"][row] and r.sid == sids[row]
        assert len(r.level_log_probs) == 3
        assert r.score == pytest.approx(sum(r.level_log_probs), abs=1e-5)
    assert [r.score for r in made] == sorted((r.score for r in made), reverse=True)


def test_scores_are_those_of_a_plain_forward_pass(world):
    import torch

    _, shop, recommender = world
    ids = shop.catalog["item_id"].to_list()
    made = recommender.recommend(ids[:2], k=20, filter_seen=False)
    assert len(made) == 20  # the whole catalogue
    sids = shop.semantic_ids.sids().to_list()
    (prompt,) = encode_prompts(
        recommender.tokenizer, [f"Bought so far, oldest first: {sids[0]}{sids[1]}"]
    )
    for r in made[:3]:
        tokens = recommender.tokenizer(r.sid)["input_ids"]
        with torch.no_grad():
            logits = recommender.engine.model(torch.tensor([prompt + tokens])).logits[0]
        steps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        expected = steps[torch.arange(3), torch.tensor(tokens)]
        assert r.level_log_probs == pytest.approx(expected.tolist(), abs=1e-4)


def test_seen_items_are_filtered_or_not(world):
    _, shop, recommender = world
    ids = shop.catalog["item_id"].to_list()
    best = recommender.recommend([ids[5]], k=20, filter_seen=False)
    assert {r.item_id for r in best} == set(ids)
    filtered = recommender.recommend([ids[5]], k=20)
    assert {r.item_id for r in filtered} == set(ids) - {ids[5]}
    # A filter masks; it changes no score.
    scores = {r.item_id: r.score for r in best}
    assert all(r.score == pytest.approx(scores[r.item_id], abs=1e-5) for r in filtered)
    # Items that the prompt no longer shows are filtered as well.
    long = ids[:12]
    assert not {r.item_id for r in recommender.recommend(long, k=8)} & set(long)
    assert len(recommender.recommend(ids[:-1], k=5)) == 1
    with pytest.raises(ValueError, match="no allowed item left"):
        recommender.recommend(ids, k=5)


def test_unknown_items_and_ids_of_the_other_type(world):
    _, shop, recommender = world
    first = shop.catalog["item_id"][0]
    other = str(first) + "x" if isinstance(first, str) else str(first)
    with pytest.raises(
        ValueError, match=r"1 items of the history are not in the catalogue"
    ) as error:
        recommender.recommend([first, other])
    assert repr(other) in str(error.value) and f"ids look like {first!r}" in str(error.value)
    assert recommender.known_rows([other, first, other, first]) == ([0, 0], [other, other])
    assert recommender.known_rows([]) == ([], [])


def test_nobody_known_and_long_histories(world):
    _, shop, recommender = world
    ids = shop.catalog["item_id"].to_list()
    assert len(recommender.recommend([], k=4)) == 4
    long = [ids[i % 10] for i in range(200)]
    assert recommender.prompts([list(range(10)) * 3]) == recommender.prompts([[4, 5, 6, 7, 8, 9]])
    assert recommender.recommend(long, k=3, filter_seen=False) == recommender.recommend(
        long[-MAX_HISTORY:], k=3, filter_seen=False
    )
    other = recommender.recommend(long[-MAX_HISTORY + 1 :], k=3, filter_seen=False)
    assert other != recommender.recommend(long, k=3, filter_seen=False)


def test_k_and_width(world):
    _, _, recommender = world
    with pytest.raises(ValueError, match="k=10 must lie between 1 and beam_width=5"):
        recommender.recommend([], k=10, beam_width=5)
    with pytest.raises(ValueError, match="k=0 must lie between"):
        recommender.recommend([], k=0)


def test_what_load_refuses(world, tiny, tmp_path: Path):
    run, *_ = world
    with pytest.raises(ValueError, match="engine='triton' is not known; choose one of torch, vllm"):
        Recommender.load(run, engine="triton")
    with pytest.raises(ValueError, match="stage='embed' is not known; choose one of sft, grpo"):
        Recommender.load(run, stage="embed")
    with pytest.raises(ValueError, match="stage 'grpo' has not finished"):
        Recommender.load(run, stage="grpo")
    with pytest.raises(ValueError, match="stage 'sft' has not finished"):
        Recommender.load(tmp_path)
    shop = tiny.shop(n_items=12)
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(tmp_path, shop, model, tokenizer)
    weights = next((tmp_path / "sft" / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{weights.name} has .* bytes, its manifest says"):
        Recommender.load(tmp_path)


def test_options_of_an_engine(world, monkeypatch):
    """They reach the engine by name; one that it doesn't have is refused before anything starts."""
    run, _, _ = world
    made = {}

    class Built:
        def __init__(
            self, model, trie, ids, scores, batch_size, *, dtype, max_model_len=None, lora=None
        ):
            made.update(dtype=dtype, max_model_len=max_model_len)

    for engine, module, name in (
        ("vllm", "vllm_engine", "VllmEngine"), ("vllm-inworker", "vllm_inworker", "InWorkerEngine"),
    ):  # fmt: skip
        stub = types.ModuleType(f"genrec.decoding.{module}")
        setattr(stub, name, Built)
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
        Recommender.load(run, engine=engine, engine_options={"max_model_len": 77})
        assert made == {"dtype": "float32", "max_model_len": 77}
        Recommender.load(run, engine=engine)
        assert made["max_model_len"] is None
        for bad in ("dtype", "tensor_size"):
            with pytest.raises(ValueError, match=f"name '{bad}', which Built doesn't take; it ta"):
                Recommender.load(run, engine=engine, engine_options={bad: 2})
    with pytest.raises(ValueError, match=r"engine_options \(max_model_len\) are those of vLLM"):
        Recommender.load(run, engine_options={"max_model_len": 77})


@pytest.fixture
def later(world, tmp_path: Path) -> Path:
    """A run without a model: its catalogue is another order of some items and two new ones."""
    _, shop, _ = world
    old = shop.semantic_ids
    names = ["n1", "n2"] if old.item_ids.dtype == pl.String else [901, 902]
    rows = [7, 3, 0, 12]
    ids = pl.concat([pl.Series("item_id", names), old.item_ids.gather(rows)])
    used = {tuple(codes) for codes in old.codes.tolist()}
    free = [c for c in np.ndindex(4, 4, 4) if c not in used]
    codes = np.concatenate([np.array([free[0], free[-1]]), old.codes[rows]])
    catalog = pl.DataFrame({"item_id": ids, "title": [f"title {i}" for i in range(6)]})
    stage = Stage(tmp_path / "later", "prepare", {"max_history": 2})
    assert not stage.is_done()
    write_parquet(stage.folder / "catalog.parquet", catalog)
    stage.finish(rows=6)
    stage = Stage(tmp_path / "later", "quantize", {}, ["prepare"])
    assert not stage.is_done()
    old.successor(ids, codes).save(stage.folder)
    stage.finish(rows=6)
    return tmp_path / "later"


def test_a_model_of_another_run_serves_a_later_catalogue(world, later: Path):
    run, shop, recommender = world
    new = Recommender.load(later, model_run=run)
    ids = new.catalog["item_id"].to_list()
    assert new.max_history == MAX_HISTORY and new.model_stage == "sft"
    history = [ids[2], ids[4], ids[3]]
    assert new.prompts([new.rows_of(history)]) == recommender.prompts(
        [recommender.rows_of(history)]
    )  # rows differ, SIDs don't
    made = new.recommend(history, k=6, filter_seen=False)
    assert {r.item_id for r in made} == set(ids)
    before = {r.item_id: r for r in recommender.recommend(history, k=20, filter_seen=False)}
    for r in made:
        if r.item_id in before:
            assert r.sid == before[r.item_id].sid
            assert r.score == pytest.approx(before[r.item_id].score, abs=1e-4)
    assert len({r.item_id for r in made} - set(before)) == 2
    assert {r.item_id for r in new.recommend(ids[:2], k=4)} == set(ids[2:])


def test_a_model_of_another_run_must_know_the_map(world, later: Path, tiny, tmp_path: Path):
    run, shop, _ = world
    with pytest.raises(ValueError, match="stage 'sft' has not finished"):
        Recommender.load(later)
    with pytest.raises(ValueError, match=f"{later}/sft has no manifest.json"):
        Recommender.load(run, model_run=later)
    other = tiny.shop(n_items=12, seed=5)
    model, tokenizer, _ = tiny.sid_lm(other.semantic_ids)
    tiny.save_run(tmp_path / "other", other, model, tokenizer)
    with pytest.raises(ValueError, match="does not extend the one that the model in") as error:
        Recommender.load(later, model_run=tmp_path / "other")
    for name in (later / "semantic_ids", tmp_path / "other" / "sft" / "model"):
        assert str(name) in str(error.value)
    items = later / "semantic_ids" / "items.parquet"
    items.write_bytes(items.read_bytes()[:-1])
    with pytest.raises(ValueError, match="items.parquet has .* bytes, its manifest says"):
        Recommender.load(later, model_run=run)


def test_prompt_of_serving_is_that_of_evaluation(world):
    from genrec.tasks.rendering import ItemTexts, render_rows
    from genrec.tasks.sequential import sequential_rows

    _, shop, recommender = world
    texts = ItemTexts.of(shop.catalog, shop.semantic_ids)
    rows = render_rows(
        sequential_rows(shop.splits.test), texts, recommender.renderer,
        template=recommender.template,
    )  # fmt: skip
    assert (
        recommender.prompts(shop.splits.test["history_item_index"].to_list())
        == rows["prompt"].to_list()
    )


def test_the_engine_is_the_one_declared(world):
    run, shop, _ = world
    trie = Recommender.load(run, normalizer="trie")
    assert isinstance(trie.engine, TorchEngine) and trie.engine.normalizer == "trie"
    assert np.array_equal(trie.engine.trie.codes(), SidTrie.build(shop.semantic_ids.codes).codes())
    made = trie.recommend([], k=20)
    assert sum(np.exp(r.score) for r in made) == pytest.approx(1.0, abs=1e-4)
