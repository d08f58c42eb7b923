"""A request's own candidates, and a query beside its history."""

from __future__ import annotations

import numpy as np
import pytest
from fastapi.testclient import TestClient

from genrec.decoding.beam import default_beam_width
from genrec.modeling import encode_prompts
from genrec.recommend import Recommender
from genrec.server.app import create_app
from genrec.server.serving import load_run
from genrec.server.settings import ServerSettings


def items(answer: dict) -> list:
    return [item["item_id"] for item in answer["items"]]


@pytest.fixture(scope="module")
def client(world):
    with TestClient(world.app(max_candidates=5)) as client:
        yield client


def post(client, body: dict, status: int = 200) -> dict:
    made = client.post("/recommend", json=body)
    assert made.status_code == status, made.text
    return made.json()


def test_candidates_are_all_that_may_be_in_the_list(client, world):
    """Each of a batch has its own, or none; scores are those of the whole catalogue."""
    ids, recommender = world.ids, world.recommenders["a"]
    requests = [
        {"history": ids[:3], "candidates": [ids[40], ids[1], ids[9], ids[40]], "k": 4},
        {"history": ids[:3], "k": 4},
        {"history": [], "candidates": [ids[7]], "exclude": [ids[8]], "k": 4},
        {"history": ids[:3], "candidates": [ids[0], ids[50]], "filter_seen": False, "k": 4},
    ]
    made = post(client, {"requests": requests})["results"]
    assert set(items(made[0])) == {ids[40], ids[9]} and items(made[2]) == [ids[7]]
    assert items(made[1]) == [r.item_id for r in recommender.recommend(ids[:3], 4)]
    assert set(items(made[3])) == {ids[0], ids[50]}
    rows = recommender.rows_of(ids[:3])
    prompts = encode_prompts(recommender.tokenizer, recommender.prompts([rows]))
    whole = recommender.engine.search(prompts, 60, 60)
    scores = dict(zip(whole.items[0].tolist(), whole.scores[0].tolist(), strict=True))
    for item in made[0]["items"]:
        assert item["score"] == pytest.approx(scores[ids.index(item["item_id"])], abs=1e-4)


def test_candidates_that_can_not_be(client, world):
    ids = world.ids
    for body, status, message in (
        ({"candidates": ids[:6]}, 422, "candidates has 6 items, more than this server's limit of"),
        ({"candidates": [ids[0], "zzz"]}, 422, "candidates: 1 items are not in the catalogue"),
        ({"candidates": []}, 409, "the candidates leave none of the 60 items"),
        ({"candidates": ids[:2], "exclude": ids[:2]}, 409, "the candidates leave none"),
        ({"candidates": "all"}, 422, "candidates"),
    ):
        assert message in post(client, {"history": [], **body}, status)["detail"]
    dropped = {"history": [], "candidates": [ids[3], "zzz"], "unknown_items": "drop"}
    made = post(client, dropped)
    assert items(made) == [ids[3]] and made["dropped_items"] == ["zzz"]
    only = {"history": [], "candidates": ["zzz"], "unknown_items": "drop"}
    post(client, only, 409)  # dropped, they don't become all


def test_candidates_lie_in_the_view(world):
    with TestClient(world.app()) as client:
        client.post("/admin/view", json={"allow": world.ids[:10]}, headers=world.admin)
        made = post(client, {"history": [], "candidates": [world.ids[9], world.ids[10]]})
        assert items(made) == [world.ids[9]]
        post(client, {"history": [], "candidates": [world.ids[10]]}, 409)


@pytest.fixture(scope="module")
def searching(tiny, tmp_path_factory):
    """A client of a model that was trained to search, and its recommender."""
    run, shop = tmp_path_factory.mktemp("searching") / "run", tiny.shop()
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    families = ("sequential", "query_search", "intention_search")
    tiny.save_run(run, shop, model, tokenizer, 6, families)
    with TestClient(create_app(load_run, ServerSettings(str(run), timeout_s=60.0))) as client:
        yield client, Recommender.load(run)


def test_a_query_beside_a_history_or_alone(searching):
    client, recommender = searching
    ids = recommender.catalog["item_id"].to_list()
    query = "red <a_1> hat"
    requests = [
        {"history": ids[:2], "query": query, "k": 5},
        {"history": [], "query": query, "k": 5},
        {"history": ids[:2], "k": 5},
        {"history": ids[:2], "query": query, "filter_seen": True, "candidates": ids[:9], "k": 5},
    ]
    made = [items(answer) for answer in post(client, {"requests": requests})["results"]]
    joint = [r.item_id for r in recommender.search(query, 5, ids[:2])]
    assert made[0] == joint
    assert made[1] == [r.item_id for r in recommender.search(query, 5)]
    assert made[2] == [r.item_id for r in recommender.recommend(ids[:2], 5)]
    assert len(made[3]) == 5 and set(made[3]) <= set(ids[2:9])
    width = default_beam_width(5)
    assert joint == [r.item_id for r in recommender.search(query, 5, ids[:2], beam_width=width)]
    assert len({tuple(row) for row in made}) == 4
    assert np.unique(made[3]).size == 5


def test_queries_that_can_not_be(client, searching):
    said = post(client, {"history": [], "query": "hat"}, 422)["detail"]
    assert "query: the model was not trained on 'query_search'" in said
    said = post(client, {"requests": [{"history": [], "query": "hat"}]}, 422)["detail"]
    assert said.startswith("requests[0].query: ")
    ids = searching[1].catalog["item_id"].to_list()
    long = "Привет мир как дела " * 40  # few characters, many tokens
    said = post(searching[0], {"history": ids[:3], "query": long}, 422)["detail"]
    assert said.startswith("query: beside the history with its item it needs ")
    assert said.endswith("; shorten it")
    for query in ("", "x" * 1025, 7, " \n"):
        assert "query" in post(searching[0], {"history": [], "query": query}, 422)["detail"]
