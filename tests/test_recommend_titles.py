"""Recommender over a title index: hostile titles, exact scores, later catalogues, bundles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from genrec.bundle.files import verify_bundle
from genrec.bundle.writing import ExportSettings, write_bundle
from genrec.decoding.item_tokens import prepare_tokenizer
from genrec.generation.history_prompts import PromptEncoder, prompts_of
from genrec.item_lists import ItemLists
from genrec.modeling import encode_prompts, encode_rows
from genrec.prompt_format import title_end
from genrec.recommend import Recommender
from genrec.title_ids import TitleIds

HOSTILE = ["red hat", "red hat", "red", "red hat][oak", "<a_1><b_2>", "", 'oak "tray"', "帽" * 9,
    "red hat (2)", "oak tray\n"]  # fmt: skip


def titled(shop, titles: list[str]):
    catalog = shop.catalog.with_columns(title=pl.Series([*titles, *shop.catalog["title"]][:20]))
    ids, _ = TitleIds.of_catalog(catalog, 40)
    return replace(shop, catalog=catalog, semantic_ids=ids)


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """(run folder, shop, recommender)"""
    run = tmp_path_factory.mktemp("run")
    shop = titled(tiny.shop(), HOSTILE)
    tokenizer = tiny.tokenizer()
    prepare_tokenizer(tokenizer, shop.semantic_ids)
    model = tiny.lm(len(tokenizer), context=512)
    tiny.save_run(run, shop, model, tokenizer, 6, ("sequential", "query_search"))
    return run, shop, Recommender.load(run)


def plain_scores(recommender: Recommender, prompt: str) -> list[float]:
    """Log-probability of every item's title and end mark by one plain forward pass each."""
    model, tokenizer = recommender.engine.model, recommender.tokenizer
    scores = []
    for sid in recommender.semantic_ids.sids():
        rows = encode_rows(tokenizer, [prompt], [sid], {title_end(tokenizer)})
        ids, labels = (torch.tensor(rows[name]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            steps = model(ids).logits[0, :-1].log_softmax(-1)
        learned = labels[0, 1:] >= 0
        wanted = ids[0, 1:][learned]
        scores.append(float(steps[learned].gather(1, wanted[:, None]).sum()))
    return scores


def test_lists_are_the_best_titles_by_their_exact_scores(world):
    _, shop, recommender = world
    ids = shop.catalog["item_id"].to_list()
    history = [ids[3], ids[0], ids[4]]
    made = recommender.recommend(history, k=17)
    assert {r.item_id for r in made} == set(ids) - set(history)  # each once, seen ones left out
    prompt = "Bought so far, oldest first: [red hat)(oak][red hat][‹a_1›‹b_2›]"
    assert recommender.prompts([[3, 0, 4]]) == [prompt]
    truth = plain_scores(recommender, prompt)
    sids = recommender.semantic_ids.sids()
    for r in made:
        row = ids.index(r.item_id)
        assert r.score == pytest.approx(truth[row], abs=2e-4)
        assert r.score == pytest.approx(sum(r.level_log_probs), abs=1e-4)
        assert (r.title, r.sid) == (shop.catalog["title"][row], sids[row])
    assert [r.score for r in made] == sorted((r.score for r in made), reverse=True)


def test_a_narrow_beam_is_exact_where_it_says_so(world):
    _, _, recommender = world
    ids = encode_prompts(recommender.tokenizer, recommender.prompts([[1], [2, 5]]))
    whole = recommender.engine.search(ids, 20, 20)
    assert whole.certified.all()
    narrow = recommender.engine.search(ids, 2, 12)
    assert (narrow.items[narrow.certified] == whole.items[narrow.certified, :2]).all()


def test_many_prompts_at_once_are_the_same(world):
    run, _, _ = world
    recommender = Recommender.load(run)
    histories = [[], [3], [1, 2, 3, 4, 5, 6, 7, 8]]
    lists = ItemLists.from_column(pl.Series(histories, dtype=pl.List(pl.Int64)))
    prompts = prompts_of(recommender, lists)
    assert prompts.to_list() == recommender.prompts(histories)
    encoded = PromptEncoder(recommender).encode(lists, prompts.to_list())
    assert encoded == encode_prompts(recommender.tokenizer, prompts.to_list())


def test_a_query_finds_titles_and_chains_are_refused(world):
    run, shop, _ = world
    recommender = Recommender.load(run)
    found = recommender.search("hat][oak", k=20)
    assert {r.item_id for r in found} == set(shop.catalog["item_id"])
    with pytest.raises(ValueError, match="chains cite semantic ids; use `recommend`"):
        recommender.recommend_with_chains(shop.catalog["item_id"].to_list()[:3])


@pytest.mark.parametrize("engine", ["vllm", "vllm-inworker"])
def test_engines_that_cannot_are_refused(world, engine: str):
    with pytest.raises(ValueError, match=rf"engine={engine}: .*engine=torch alone"):
        Recommender.load(world[0], engine=engine)


def test_a_later_catalogue_is_served_by_the_model(world, tiny, tmp_path):
    run, shop, _ = world
    rows = [7, 0, 1, 2, 3]  # item 4 and others left; new ones follow
    catalog = shop.catalog[rows + [9, 10, 11]].with_columns(
        item_id=pl.Series([*shop.catalog["item_id"].gather(rows), 900, 901, 902]),
        title=pl.Series(["new name"] * 5 + ["red hat", "‹a_1›‹b_2›", "cork mat"]),
        item_index=pl.Series(range(8), dtype=pl.Int32),
    )
    grown, _, kept = shop.semantic_ids.successor(catalog)
    assert kept == 5
    assert grown.names.to_list() == [
        "帽" * 9, "red hat", "red hat (2)", "red", "red hat)(oak", "red hat (3)",
        "‹a_1›‹b_2› (2)", "cork mat",
    ]  # fmt: skip
    later = replace(shop, catalog=catalog, semantic_ids=grown)
    tokenizer = tiny.tokenizer()
    prepare_tokenizer(tokenizer, grown)
    tiny.save_run(tmp_path / "later", later, tiny.lm(len(tokenizer)), tokenizer)
    recommender = Recommender.load(tmp_path / "later", model_run=run)
    before = {r.item_id: r.score for r in Recommender.load(run).recommend([100, 101], k=18)}
    now = {r.item_id: r.score for r in recommender.recommend([100, 101], k=6)}
    assert now.keys() == {102, 103, 107, 900, 901, 902}
    for item in (102, 103, 107):
        assert now[item] == pytest.approx(before[item], abs=1e-4)
    with pytest.raises(ValueError, match=r"SID map .* does not extend"):
        Recommender.load(run, model_run=tmp_path / "later")


def test_a_bundle_gives_the_same_lists(world, tmp_path: Path):
    run, _, _ = world
    recommender = Recommender.load(run)
    target = write_bundle(run, tmp_path / "bundle", ExportSettings())
    assert verify_bundle(target) == []
    served = Recommender.load(target)
    assert served.recommend([103, 100], k=10) == recommender.recommend([103, 100], k=10)
    (target / "model" / "title_tokens.parquet").unlink()
    with pytest.raises(ValueError, match=r"title_tokens.parquet is missing"):
        Recommender.load(target)
