"""The endpoints through FastAPI's test client: lists, limits, bad input, metrics."""

from __future__ import annotations

import importlib
import json
import re
import sys

import numpy as np
import pytest
from fastapi.testclient import TestClient

from genrec.artifacts import load_manifest
from genrec.decoding.beam import default_beam_width
from genrec.modeling import encode_prompts
from genrec.server.schema import Health, RecommendResponse, RecommendResponses


@pytest.fixture(scope="module")
def client(world):
    with TestClient(world.app(), raise_server_exceptions=False) as client:
        yield client


def alone(world, history, k, filter_seen=True, exclude=(), run="a", width=None):
    """One user's items and whether they are certified, by an engine call of their own."""
    recommender = world.recommenders[run]
    rows = recommender.rows_of(history)
    gone = np.array([*(rows if filter_seen else []), *recommender.rows_of(exclude)], dtype=int)
    prompts = encode_prompts(recommender.tokenizer, recommender.prompts([rows]))
    result = recommender.engine.search(prompts, k, width or default_beam_width(k), [gone])
    return recommender.recommendations(result, 0), bool(result.certified[0])


def check_list(answer, items, certified) -> None:
    """A response holds exactly this list; float32 sums may differ in the last bits by batch."""
    assert [i["rank"] for i in answer["items"]] == [r.rank for r in items]
    for name in ("item_id", "title", "sid"):
        assert [i[name] for i in answer["items"]] == [getattr(r, name) for r in items]
    for got, want in zip(answer["items"], items, strict=True):
        assert got["score"] == pytest.approx(want.score, abs=1e-4)
        assert got["level_log_probs"] == pytest.approx(want.level_log_probs, abs=1e-4)
    assert answer["certified"] is certified


@pytest.mark.parametrize("run", ["a", "strings"])
def test_a_list_is_that_of_the_recommender(world, run):
    recommender = world.recommenders[run]
    ids = recommender.catalog["item_id"].to_list()
    history = [ids[3], ids[0], ids[3], ids[7]]
    with TestClient(world.app(run)) as client:
        body = {"history": history, "k": 5, "user_id": "Zoë ☂"}
        made = client.post("/recommend", json=body)
        assert made.status_code == 200
        answer = made.json()
        RecommendResponse.model_validate(answer, strict=True, extra="forbid")
        check_list(
            answer, recommender.recommend(history, k=5), alone(world, history, 5, run=run)[1]
        )
        assert all(type(i["item_id"]) is type(ids[0]) for i in answer["items"])
        assert answer["user_id"] == "Zoë ☂" and answer["dropped_items"] == []
        manifest = load_manifest(world.root / run, "sft")
        assert manifest is not None
        assert answer["model"] == {
            "version": 1, "sha256": manifest.content_hash, "stage": "sft",
            "semantic_ids_sha256": recommender.semantic_ids.sha256,
        }  # fmt: skip
        view = answer["view"]
        assert (view["version"], view["rule"], view["items"]) == (1, "all", len(ids))
        unfiltered = client.post("/recommend", json={**body, "filter_seen": False}).json()
        check_list(unfiltered, *alone(world, history, 5, filter_seen=False, run=run))
        exclude = [i["item_id"] for i in answer["items"][:2]]
        without = client.post("/recommend", json={**body, "exclude": exclude}).json()
        check_list(without, *alone(world, history, 5, exclude=exclude, run=run))
        nobody = client.post("/recommend", json={"history": []}).json()
        check_list(nobody, *alone(world, [], 10, run=run))
        assert nobody["user_id"] is None


def test_a_batch_changes_nobodys_list(client, world):
    """Different k, search widths, histories and filters in one call, each as if it came alone."""
    ids, rng = world.ids, np.random.default_rng(0)
    requests = []
    for k in (1, 3, 10, 25, 30, 30, 60, 7):
        history = [ids[i] for i in rng.integers(0, 60, rng.integers(0, 9))]
        exclude = [ids[i] for i in rng.integers(0, 60, 3)]
        requests.append({"history": history, "k": k, "exclude": exclude, "user_id": k})
        requests.append({"history": history[:2], "k": k, "filter_seen": False})
    answer = client.post("/recommend", json={"requests": requests}).json()
    RecommendResponses.model_validate(answer, strict=True, extra="forbid")
    assert len(answer["results"]) == 16
    for request, result in zip(requests, answer["results"], strict=True):
        want = alone(
            world, request["history"], request["k"], request.get("filter_seen", True),
            request.get("exclude", ()),
        )  # fmt: skip
        check_list(result, *want)
        assert result["user_id"] == request.get("user_id")


def test_lists_of_many_lengths_share_a_batch(world):
    """The width has few values, so users who ask for 26 to 50 items are searched together."""
    app = world.app(max_batch=25)
    (route,) = (r for r in app.routes if r.path == "/recommend")
    batcher = route.endpoint.__self__.batcher
    decode, batches = batcher._decode, []

    def watched(jobs):
        batches.append([job.k for job in jobs])
        return decode(jobs)

    batcher._decode = watched
    requests = [{"history": world.ids[k % 7 : 7], "k": k} for k in range(26, 51)]
    with TestClient(app) as client:
        results = client.post("/recommend", json={"requests": requests}).json()["results"]
    assert batches == [list(range(26, 51))]
    for request, result in zip(requests[::6], results[::6], strict=True):
        check_list(result, *alone(world, request["history"], request["k"]))
        rows = world.recommenders["a"].recommend(request["history"], request["k"])
        assert [i["item_id"] for i in result["items"]] == [r.item_id for r in rows]


def test_certified_is_that_of_the_own_k_and_width(world):
    """With a narrow search some lists are proven and others not, whatever their neighbours ask."""
    histories = [world.ids[:n] for n in (1, 2, 51, 53)]  # of the last two hardly an item is left
    requests = [{"history": history, "k": k} for history in histories for k in (1, 5, 14)]
    with TestClient(world.app(beam_width=14, max_k=14)) as client:
        results = client.post("/recommend", json={"requests": requests}).json()["results"]
    want = [alone(world, r["history"], r["k"], width=14) for r in requests]
    for result, (items, certified) in zip(results, want, strict=True):
        check_list(result, items, certified)
    assert {certified for _, certified in want} == {True, False}


def test_one_user_more_or_less_filters(world):
    ids = world.ids
    with TestClient(world.app()) as client:
        few = client.post("/recommend", json={"history": ids[:-2], "k": 10}).json()
        assert {i["item_id"] for i in few["items"]} == set(ids[-2:])
        for body in ({"history": ids}, {"history": ids[:30], "exclude": ids[30:]}):
            none = client.post("/recommend", json=body)
            assert none.status_code == 409
            assert "leave none of the 60 items that may be recommended now" in none.text
        seen = client.post("/recommend", json={"history": ids, "filter_seen": False})
        assert seen.status_code == 200
        batch = client.post("/recommend", json={"requests": [{"history": []}, {"history": ids}]})
        assert batch.status_code == 409 and "requests[1].history" in batch.text


def test_unknown_items(client, world):
    body = {"history": ["nope", world.ids[0], 7], "exclude": [world.ids[1], "100"], "k": 3}
    refused = client.post("/recommend", json=body)
    assert refused.status_code == 422
    assert refused.json()["detail"].startswith(
        "history: 2 items are not in the catalogue, among them 'nope', 7 (ids look like 100)"
    )
    dropped = client.post("/recommend", json={**body, "unknown_items": "drop"}).json()
    assert dropped["dropped_items"] == ["nope", 7, "100"]
    check_list(dropped, *alone(world, [world.ids[0]], 3, exclude=[world.ids[1]]))
    nobody = {"history": ["x"], "unknown_items": "drop", "k": 3}
    check_list(client.post("/recommend", json=nobody).json(), *alone(world, [], 3))


BAD = [
    ("", 422, "the body is missing"),
    ("null", 422, "the body is missing"),
    ("{", 422, r"not valid JSON: .* \(character 1\)"),
    ('{"history": [100]', 422, "not valid JSON"),
    ("[]", 422, "the body must be a JSON object"),
    ("3", 422, "the body must be a JSON object"),
    ("{}", 422, "history is missing"),
    ('{"requests": []}', 422, "requests: list should have at least 1 item"),
    ('{"requests": [3]}', 422, r"requests\[0\] must be a JSON object"),
    ('{"requests": {"history": []}}', 422, "requests must be a list"),
    ('{"requests": [{"requests": []}]}', 422, r"requests\[0\]: unknown field 'requests'"),
    ('{"requests": [{"history": []}], "k": 3}', 422, "unknown field 'k'; known: requests"),
    ('{"history": [], "K": 3}', 422, "unknown field 'K'; known: history, k"),
    ('{"history": null}', 422, "history must be a list"),
    ('{"history": "100"}', 422, "history must be a list, not '100'"),
    ('{"history": {"0": 100}}', 422, "history must be a list"),
    ('{"history": [null]}', 422, r"history\[0\]: an id is a string or an integer, this is null"),
    ('{"history": [100, true]}', 422, r"history\[1\]: .* this is a boolean"),
    ('{"history": [100.0]}', 422, r"history\[0\]: .* this is a number with a fraction"),
    ('{"history": [1e999]}', 422, r"history\[0\]: .* this is a number with a fraction"),
    ('{"history": [NaN]}', 422, r"history\[0\]: .* this is a number with a fraction"),
    ('{"history": [[100]]}', 422, r"history\[0\]: .* this is a list"),
    ('{"history": [{}]}', 422, r"history\[0\]: .* this is an object"),
    ('{"history": [9223372036854775808]}', 422, "must fit into 64 bits"),
    ('{"history": [-9223372036854775808]}', 422, "not in the catalogue"),
    ('{"history": [' + "9" * 5000 + "]}", 400, "can't be read as JSON: .*4300 digits"),
    ('{"history": ["\\ud800"]}', 422, "half a surrogate pair"),
    ('{"history": [], "user_id": "\\udfff"}', 422, "user_id: .* half a surrogate pair"),
    ('{"history": [], "user_id": 1.5}', 422, "user_id: an id is a string or an integer"),
    ('{"history": [], "user_id": "' + "u" * 257 + '"}', 422, "257 characters are too many"),
    ('{"history": [], "k": 0}', 422, "k: input should be greater than or equal to 1, not 0"),
    ('{"history": [], "k": -1}', 422, "not -1"),
    ('{"history": [], "k": 101}', 422, "k=101 exceeds this server's limit of 100"),
    ('{"history": [], "k": 1e3}', 422, "k must be an integer, not 1000.0"),
    ('{"history": [], "k": "3"}', 422, "k must be an integer, not '3'"),
    ('{"history": [], "k": true}', 422, "k must be an integer, not True"),
    ('{"history": [], "k": NaN}', 422, "k must be an integer, not nan"),
    ('{"history": [], "k": Infinity}', 422, "k must be an integer, not inf"),
    ('{"history": [], "k": null}', 422, "k must be an integer"),
    ('{"history": [], "k": ' + "9" * 400 + "}", 422, "exceeds this server's limit"),
    ('{"history": [], "filter_seen": 1}', 422, "filter_seen must be true or false, not 1"),
    ('{"history": [], "filter_seen": "no"}', 422, "filter_seen must be true or false, not 'no'"),
    ('{"history": [], "unknown_items": "skip"}', 422, "should be 'error' or 'drop', not 'skip'"),
    ('{"history": [], "exclude": 5}', 422, "exclude must be a list, not 5"),
    ("[" * 100_000, 400, "can't be read as JSON: .*recursion"),
    ('{"history": ' * 15_000, 400, "can't be read as JSON: .*recursion"),
    ('{"history": ' + "[" * 500 + "]" * 500 + "}", 422, r"history\[0\]: .* this is a list"),
    (b"\xff\xfe", 422, "not valid JSON"),
    (b"\xff\xfe\x00", 400, "can't be read as JSON: .*codec can't decode"),
    (b'{"history": ["\xff"]}', 400, "can't be read as JSON: .*codec can't decode"),
]


@pytest.mark.parametrize(("body", "status", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_bodies(client, body, status, message):
    made = client.post("/recommend", content=body, headers={"content-type": "application/json"})
    assert made.status_code == status, made.text
    assert list(made.json()) == ["detail"] and len(made.text) < 700
    assert re.search(message, made.json()["detail"]), made.text
    assert "Traceback" not in made.text and ".py" not in made.text


def test_errors_repeat_only_a_bounded_piece(client):
    for body in (
        {"history": ["z" * 50_000]},
        {"history": [f"{'z' * 1000}{i}" for i in range(100)]},
        {"history": [], "z" * 50_000: 1},
        {"history": [], **{f"field{i}": 1 for i in range(9000)}},
        {"history": [], "k": "z" * 50_000},
        {"history": [], "k": 10**4000},
        {"requests": [{"history": []}] * 10_000},
        {"history": [None] * 40_000},
        {"requests": [{"history": [], "unknown_items": "z" * 2000}] * 60},
        {"history": ["\x00\x1b[31m\u202e"]},
    ):
        made = client.post("/recommend", json=body)
        assert made.status_code == 422 and len(made.text) < 1000, made.text
        assert "z" * 90 not in made.text and "\x1b" not in made.text and "\u202e" not in made.text


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", None, "json"])
def test_only_json_is_read(client, media):
    headers = {} if media is None else {"content-type": media}
    made = client.post("/recommend", content=b'{"history": []}', headers=headers)
    assert made.status_code == 415 and "Content-Type: application/json" in made.text
    charset = {"content-type": "application/json; charset=utf-8"}
    assert client.post("/recommend", content=b'{"history": []}', headers=charset).is_success


def test_limits_that_a_server_sets(world):
    limits = dict(max_history=3, max_exclude=2, max_requests=2, max_k=4, max_body_bytes=400)
    with TestClient(world.app(**limits)) as client:
        one = {"history": world.ids[:3], "exclude": world.ids[:2], "k": 4}
        assert client.post("/recommend", json=one).is_success
        assert client.post("/recommend", json={"requests": [one] * 2}).is_success
        for body, message in (
            ({**one, "k": 5}, "k=5 exceeds this server's limit of 4"),
            ({**one, "history": world.ids[:4]}, "history has 4 items, more than this server's"),
            ({**one, "exclude": world.ids[:3]}, "exclude has 3 items, more than this server's"),
            ({"requests": [one] * 3}, "3 requests in one call exceed this server's limit of 2"),
            ({"requests": [one, {**one, "k": 9}]}, "requests[1].k=9 exceeds"),
        ):
            made = client.post("/recommend", json=body)
            assert made.status_code == 422 and message in made.json()["detail"], made.text
        padded = json.dumps(one).ljust(400).encode()
        for content, status in ((padded, 200), (padded + b" ", 413)):
            for sent in (content, iter([content[:100], content[100:]])):  # the second is chunked
                made = client.post(
                    "/recommend", content=sent, headers={"content-type": "application/json"}
                )
                assert made.status_code == status, made.text
        assert "larger than this server's limit of 400 bytes" in made.text


def test_what_fails_inside_is_not_told(world, caplog):
    app = world.app()
    with TestClient(app, raise_server_exceptions=False) as client:
        route = next(r for r in app.routes if r.path == "/recommend")
        batcher = route.endpoint.__self__.batcher

        def broken(jobs):
            raise RuntimeError("secret of the engine")

        decode, batcher._decode = batcher._decode, broken
        made = client.post("/recommend", json={"history": []})
        assert made.status_code == 500
        assert made.json() == {"detail": "internal error; the server's log says more"}
        batcher._decode = decode
        assert client.post("/recommend", json={"history": []}).is_success
        metrics = client.get("/metrics").text
    assert 'genrec_requests_total{path="/recommend",status="500"} 1.0' in metrics


def test_health_index_and_wrong_paths(client, world):
    health = client.get("/health")
    assert health.status_code == 200
    state = Health.model_validate(health.json(), strict=True, extra="forbid")
    assert state.status == "ready" and state.catalogue_items == 60 and state.queued_users == 0
    assert state.uptime_s >= 0 and state.model.version == 1
    assert state.model.semantic_ids_sha256 == world.recommenders["a"].semantic_ids.sha256
    assert client.get("/").json()["docs"] == "/docs"
    assert client.get("/nope").json() == {"detail": "Not Found"}
    assert client.get("/recommend").status_code == 405
    assert "access-control-allow-origin" not in client.get(
        "/health", headers={"origin": "https://example.com"}
    ).headers  # fmt: skip
    assert client.options(
        "/recommend",
        headers={"origin": "https://example.com", "access-control-request-method": "POST"},
    ).status_code == 405  # fmt: skip


def test_the_description_has_every_endpoint(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/recommend", "/health", "/metrics", "/admin/view", "/admin/model"}
    assert set(paths["/recommend"]["post"]["responses"]) == {
        "200", "400", "409", "413", "422", "503", "504"
    }  # fmt: skip
    view, model = (
        paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for path in ("/admin/view", "/admin/model")
    )
    assert set(view["properties"]) == {"allow", "deny", "all"}
    place = model["properties"]["view"]["anyOf"][0]["$ref"]
    found = client.get("/openapi.json").json()
    for step in place.removeprefix("#/").split("/"):
        found = found[step.replace("~1", "/")]
    assert found == view


def test_metrics_count_what_happened(world):
    with TestClient(world.app(max_batch=4, max_wait_ms=0)) as client:
        for _ in range(3):
            client.post("/recommend", json={"history": []})
        client.post("/recommend", json={"requests": [{"history": []}] * 6})
        client.post("/recommend", json={"history": ["x"]})
        client.get("/secret/path")
        client.post("/admin/view", json={"allow": world.ids[:7]}, headers=world.admin)
        client.post("/admin/view", json={"allow": [1]}, headers=world.admin)
        made = client.get("/metrics")
    assert made.headers["content-type"].startswith("text/plain; version=")
    lines = made.text.splitlines()
    for line in (
        'genrec_requests_total{path="/recommend",status="200"} 4.0',
        'genrec_requests_total{path="/recommend",status="422"} 1.0',
        'genrec_requests_total{path="other",status="404"} 1.0',
        'genrec_request_seconds_count{path="/recommend"} 5.0',
        "genrec_batch_users_count 5.0",  # 1, 1, 1, 4, 2
        "genrec_batch_users_sum 9.0",
        'genrec_batch_users_bucket{le="1.0"} 3.0',
        'genrec_batch_users_bucket{le="2.0"} 4.0',
        "genrec_users_total 9.0",
        "genrec_queue_users 0.0",
        "genrec_view_items 7.0",
        'genrec_swaps_total{outcome="done",what="view"} 1.0',
        'genrec_swaps_total{outcome="refused",what="view"} 1.0',
    ):
        assert line in lines, line
    assert "secret" not in made.text


def test_a_run_that_cannot_serve_is_refused_at_once(world, tiny, tmp_path):
    with pytest.raises(ValueError, match="stage 'sft' has not finished"):
        world.app("nowhere")
    shop = tiny.shop()
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(tmp_path, shop, model, tokenizer, max_history=200)  # 600 tokens, a context of 256
    with pytest.raises(ValueError, match="context holds 256; lower max_history"):
        world.app(tmp_path)


@pytest.mark.parametrize("name", ["fastapi", "prometheus_client"])
def test_a_missing_package_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "genrec.server.app")
    with pytest.raises(ImportError, match=f'needs {name}; run: pip install "genrec.serve."'):
        importlib.import_module("genrec.server.app")
