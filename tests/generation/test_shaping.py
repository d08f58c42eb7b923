"""Rules of batch generation: drawn and shaped lists against the plain search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from genrec.decoding.sampling import GumbelTopK, LevelSampling
from genrec.decoding.torch_engine import TorchEngine
from genrec.generation.shaping import ListMaker, ListRules, caps_and_weights, parse_boosts
from genrec.modeling import encode_prompts
from genrec.recommend import Recommender


@pytest.fixture(scope="module")
def world(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recommender, list]:
    """A recommender over 20 items of five titles and two kinds, and prompts."""
    run = tmp_path_factory.mktemp("run")
    shop = tiny.shop()
    titles = [f"{title.rsplit(' no ', 1)[0]}" for title in shop.catalog["title"]]
    shop = type(shop)(
        shop.catalog.with_columns(title=pl.Series(titles)),
        shop.interactions, shop.semantic_ids, shop.splits,
    )  # fmt: skip
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(run, shop, model, tokenizer)
    recommender = Recommender.load(run, normalizer="trie")
    prompts = encode_prompts(tokenizer, recommender.prompts([[i, 2 * i] for i in range(8)]))
    return recommender, prompts


def made(world: tuple[Recommender, list], rules: ListRules, k: int = 5, width: int = 20, **more):
    recommender, prompts = world
    maker = ListMaker(recommender.engine, recommender.catalog, rules)
    return maker.search(prompts, k, width, **more)


def test_without_rules_it_is_the_search(world):
    recommender, prompts = world
    plain, ours = recommender.engine.search(prompts, 5, 20), made(world, ListRules())
    assert (ours.items == plain.items).all() and (ours.scores == plain.scores).all()
    assert (ours.certified == plain.certified).all() and ListRules().plain


def test_one_of_each_title_and_of_each_kind(world):
    recommender, prompts = world
    titles = recommender.catalog["title"].to_numpy()
    kinds = recommender.catalog["categories"].list.get(-1).to_numpy()
    whole = recommender.engine.search(prompts, 20, 20)
    ours = made(world, ListRules(one_per_title=True))
    for row, items in enumerate(ours.items):
        best = [
            i
            for n, i in enumerate(whole.items[row])
            if titles[i] not in titles[whole.items[row][:n]]
        ]
        assert items.tolist() == best[:5]  # five titles
    capped = made(world, ListRules(max_per_category=2))
    for items in capped.items:
        assert (items[4:] == -1).all() and (items[:4] >= 0).all()  # two kinds, two of each
        assert sorted(kinds[items[:4]].tolist()) == ["Kind 0"] * 2 + ["Kind 1"] * 2
    # Scores and their summands are the search's, and nothing is called exact.
    for result in (ours, capped):
        real = result.items >= 0
        at = [{int(i): n for n, i in enumerate(row)} for row in whole.items]
        for row, items in enumerate(result.items):
            own = [at[row][int(i)] for i in items[real[row]]]
            assert (result.scores[row][real[row]] == whole.scores[row][own]).all()
            levels = whole.level_log_probs[row][own]
            assert (result.level_log_probs[row][real[row]] == levels).all()
        assert np.isneginf(result.level_log_probs[~real]).all() and not result.certified.any()


def test_of_near_duplicates_by_vector_the_best_is_kept(world, tmp_path):
    recommender, prompts = world
    n_items = len(recommender.catalog)
    vectors = np.eye(3, dtype=np.float32)[np.arange(n_items) % 3]  # three kinds of equal items
    np.save(tmp_path / "vectors.npy", vectors)
    rules = ListRules(max_cosine=0.9, vectors=tmp_path / "vectors.npy")
    whole = recommender.engine.search(prompts, n_items, n_items).items
    for row, items in zip(whole, made(world, rules).items, strict=True):
        best = [int(row[row % 3 == kind][0]) for kind in range(3)]
        assert sorted(items[:3].tolist()) == sorted(best) and (items[3:] == -1).all()
    np.save(tmp_path / "vectors.npy", vectors[1:])
    with pytest.raises(ValueError, match=f"{n_items - 1} rows for {n_items} items"):
        made(world, rules)


def test_boosts_reorder_and_filters_hold(world):
    recommender, prompts = world
    kinds = recommender.catalog["categories"].list.get(-1).to_numpy()
    seen = [np.array([i, 2 * i]) for i in range(8)]
    ours = made(world, ListRules(boosts=(("Kind 1", 1e9),)), seen=seen)
    for items, gone in zip(ours.items, seen, strict=True):
        assert set(kinds[items]) == {"Kind 1"} and not set(items) & set(gone)
    with pytest.raises(ValueError, match="no item is labelled 'Kind 7'"):
        made(world, ListRules(boosts=(("Kind 7", 2.0),)))


def test_boosts_of_the_command_line():
    assert parse_boosts(["Hats=2", "A=B=0.5", "=x=1"]) == (("Hats", 2), ("A=B", 0.5), ("=x", 1))
    assert parse_boosts([]) == ()
    for bad in (["Hats"], ["Hats="], ["=2"], ["Hats=two"], ["Hats=nan"], ["Hats=1", "Hats=2"]):
        with pytest.raises(ValueError, match="should read category=factor") as said:
            parse_boosts(bad)
        assert "family" not in str(said.value)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (ListRules(one_per_title=True, title_variant="("), r"title_variant='\('"),
        (ListRules(max_per_category=1, category_depth=9), "category_depth=9: .* beyond every"),
        (ListRules(boosts=(("Kind 7", 2.0),)), "boosts, .*depth=-1: no item is labelled 'Kind 7'"),
    ],
)
def test_rules_that_the_catalogue_lacks_are_named_by_their_setting(world, rules, message):
    with pytest.raises(ValueError, match=message):
        caps_and_weights(world[0].catalog, rules)


@pytest.mark.parametrize("sampler", [GumbelTopK(3), LevelSampling(2.0, 0.9, seed=3)])
def test_drawn_lists_are_the_samplers(world, sampler):
    recommender, prompts = world
    ours = made(world, ListRules(sampler))
    plain = recommender.engine.search(prompts, 5, 20, sampler=sampler)
    assert (ours.items == plain.items).all() and ours.sample is not None


def test_drawing_needs_the_torch_engine(world):
    recommender, _ = world

    class Other:
        trie = recommender.engine.trie

    assert isinstance(recommender.engine, TorchEngine)
    with pytest.raises(ValueError, match="Other doesn't offer"):
        ListMaker(Other(), recommender.catalog, ListRules(GumbelTopK()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_per_category": 0}, "max_per_category=0"),
        ({"boosts": (("a", 0.0),)}, "boost a=0.0"),
        ({"boosts": (("a", float("inf")),)}, "finite factor"),
        ({"title_variant": "x"}, "needs one_per_title"),
        ({"sampler": GumbelTopK(), "one_per_title": True}, "either drawn"),
        ({"max_cosine": 1.0, "vectors": Path("v.npy")}, "max_cosine=1.0 must lie in"),
        ({"max_cosine": 0.9}, "belong together"),
    ],
)
def test_rules_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ListRules(**settings)
