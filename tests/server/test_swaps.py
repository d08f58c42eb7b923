"""Exchange of view and model while requests go on, who may do it, and what is refused."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import shutil
import threading
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

import genrec.server.app as app_module
from genrec.artifacts import Stage, write_parquet
from genrec.server.app import create_app
from genrec.server.requests import read_view
from genrec.server.serving import ViewRule, load_run, path_below


def run(app: FastAPI, test: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """Run a test with many requests at once; no server between, so nothing hides an exception."""

    lost: list[dict[str, Any]] = []  # exceptions that nobody retrieved

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
        ):
            await asyncio.wait_for(test(client), 60)
            gc.collect()

    asyncio.run(main())
    assert not lost


def endpoints(app: FastAPI) -> Any:
    return next(r for r in app.routes if r.path == "/recommend").endpoint.__self__


def test_views(world):
    ids = world.ids
    with TestClient(world.app(), headers=world.admin) as client:
        recommend = {"history": [], "k": 60}

        def served() -> tuple[set[int], dict[str, Any]]:
            answer = client.post("/recommend", json=recommend).json()
            return {i["item_id"] for i in answer["items"]}, answer["view"]

        scores = {
            i["item_id"]: i["score"]
            for i in client.post("/recommend", json=recommend).json()["items"]
        }
        made = client.post("/admin/view", json={"allow": [*ids[:5], ids[0]]})
        assert made.status_code == 200 and made.json()["view"]["items"] == 5
        items, allow = served()
        assert items == set(ids[:5]) and allow == made.json()["view"]
        assert (allow["rule"], allow["version"]) == ("allow", 2)
        for item in client.post("/recommend", json=recommend).json()["items"]:
            assert item["score"] == pytest.approx(scores[item["item_id"]], abs=1e-4)
        gone = client.post("/recommend", json={"history": ids[:5]})
        assert gone.status_code == 409 and "none of the 5 items" in gone.text
        client.post("/admin/view", json={"deny": ids[:5]})
        assert served()[0] == set(ids[5:])
        client.post("/admin/view", json={"all": True})
        items, everything = served()
        assert items == set(ids) and (everything["rule"], everything["version"]) == ("all", 4)
        # The hash is that of the rule, whatever the order.
        again = client.post("/admin/view", json={"allow": ids[4::-1]}).json()["view"]
        assert again["sha256"] == allow["sha256"] != everything["sha256"]


def test_the_hash_of_a_rule():
    """Of its kind and its set of ids, made once."""
    rules = [
        ViewRule(), ViewRule("allow"), ViewRule("deny"), ViewRule("deny", (1,)),
        ViewRule("deny", (-1,)), ViewRule("deny", (1, 2)), ViewRule("deny", ("1",)),
        ViewRule("deny", ("1", 2)), ViewRule("deny", ("ab", "c")), ViewRule("deny", ("a", "bc")),
        ViewRule("deny", ("ä", "")), ViewRule("deny", ("ä",)), ViewRule("deny", (1 << 62,)),
    ]  # fmt: skip
    assert len({rule.sha256 for rule in rules}) == len(rules)
    for rule in rules:
        assert ViewRule(rule.kind, (*rule.item_ids[::-1], *rule.item_ids)).sha256 == rule.sha256
        assert rule.sha256 is rule.sha256


@pytest.mark.parametrize("path", ["/admin/view", "/admin/model"])
def test_a_body_of_the_admin_is_read_off_the_loop(world, monkeypatch, path):
    """A view of a million items takes a second to read; the others are answered meanwhile."""
    reading, answered = threading.Event(), threading.Event()
    original = app_module.view_rule

    def slow(body):
        reading.set()
        assert answered.wait(20)
        return original(body)

    monkeypatch.setattr(app_module, "view_rule", slow)
    body = (
        {"allow": world.ids[:3]}
        if path == "/admin/view"
        else {"run_dir": "b", "view": {"all": True}}
    )

    async def test(client: httpx.AsyncClient) -> None:
        swap = asyncio.create_task(client.post(path, json=body, headers=world.admin))
        assert await asyncio.to_thread(reading.wait, 20)
        made = await client.post("/recommend", json={"history": [], "k": 1})
        assert made.status_code == 200 and made.json()["view"]["version"] == 1
        answered.set()
        assert (await swap).json()["view"]["version"] == 2

    run(world.app(), test)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not valid JSON"),
        (b"", "the body is not valid JSON"),
        (b'{"all": "\xff"}', "the body is not valid JSON"),
        (b'{"allow": ["\\ud800"]}', "the body is not valid JSON"),
        (b'{"allow": [9223372036854775808]}', "must fit into 64 bits"),
        (b"[" * 100_000, "the body is not valid JSON"),
    ],
)
def test_bodies_that_are_no_view(world, body, message):
    headers = {**world.admin, "content-type": "application/json"}
    with TestClient(world.app(), headers=headers) as client:
        made = client.post("/admin/view", content=body)
        assert made.status_code == 422 and len(made.text) < 400
        assert message in made.json()["detail"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"allow": []}, "the allow-list leaves no item that could be recommended"),
        ({"allow": [100, 7, "100"]}, "2 items of the allow-list are not in the catalogue, among"),
        ({"deny": [7]}, "1 items of the deny-list are not in the catalogue, among them 7"),
        ({"allow": list(range(1000, 9000))}, "8000 items .* among them 1000, 1001, 1002, 1003"),
        ({}, 'give exactly one of "allow", "deny" and "all"'),
        ({"allow": [100], "all": True}, "give exactly one"),
        ({"all": False}, "all: input should be True, not False"),
        ({"allow": [None]}, r"allow\[0\]: an id is a string or an integer"),
        ({"allow": 100}, "allow must be a list, not 100"),
        ({"permit": [100]}, "unknown field 'permit'; known: allow, deny, all"),
    ],
)
def test_views_that_are_refused(world, body, message):
    with TestClient(world.app(), headers=world.admin) as client:
        made = client.post("/admin/view", json=body)
        assert made.status_code == 422 and len(made.text) < 400
        assert re.search(message, made.json()["detail"]), made.text
        everything = client.post("/admin/view", json={"deny": world.ids})
        assert everything.status_code == 422 and "leaves no item" in everything.text
        assert client.get("/health").json()["view"]["version"] == 1


def test_no_token_no_admin(world):
    with TestClient(world.app(admin_token=None)) as client:
        for path in ("/admin/view", "/admin/model", "/admin"):
            for headers in ({}, world.admin, {"authorization": "Bearer None"}):
                assert client.post(path, json={"all": True}, headers=headers).status_code == 404
        assert not [p for p in client.get("/openapi.json").json()["paths"] if "admin" in p]
    with TestClient(world.app()) as client:
        for path in ("/admin/view", "/admin/model", "/admin/view/", "/admin"):
            refused = client.post(path, json={"all": True})
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
        # Without the gate in front the route itself still asks.
        with pytest.raises(Exception, match="bearer token"):
            asyncio.run(endpoints(client.app).require_admin(httpx.Request("POST", "/admin/view")))
        assert client.get("/health").json()["view"]["version"] == 1


def test_a_model_is_exchanged_and_the_view_stays(world):
    ids = world.ids
    with TestClient(world.app(), headers=world.admin) as client:
        client.post("/admin/view", json={"allow": ids[:9]})
        made = client.post("/admin/model", json={"run_dir": "b"})
        assert made.status_code == 200, made.text
        answer = client.post("/recommend", json={"history": ids[:2], "k": 9}).json()
        assert answer["model"] == made.json()["model"] and answer["model"]["version"] == 2
        assert (answer["view"]["rule"], answer["view"]["version"]) == ("allow", 2)
        want = world.recommenders["b"].recommend(ids[:2], k=60)
        want = [r.item_id for r in want if r.item_id in ids[:9]]
        assert [i["item_id"] for i in answer["items"]] == want
        old = weakref.ref(endpoints(client.app).serving.current.recommender.engine)
        back = client.post("/admin/model", json={"run_dir": str(world.root / "a")})  # absolute
        gc.collect()
        assert old() is None  # nothing keeps the memory of a model that serves no more
        assert back.json()["model"]["version"] == 3
        health = client.get("/health").json()
        assert health["model"] == back.json()["model"] and health["catalogue_items"] == 60


def test_a_view_that_the_new_catalogue_lacks_refuses_the_swap(world):
    with TestClient(world.app(), headers=world.admin) as client:
        client.post("/admin/view", json={"deny": world.ids[:7]})
        made = client.post("/admin/model", json={"run_dir": "strings"})
        assert made.status_code == 422
        assert "7 items of the deny-list are not in the catalogue, among them 100" in made.text
        assert client.get("/health").json()["model"]["version"] == 1
        assert client.post("/recommend", json={"history": world.ids[:1]}).is_success
        # A new view that comes with it takes effect at the same moment.
        body = {"run_dir": "strings", "view": {"allow": ["i101", "i102"]}}
        made = client.post("/admin/model", json=body)
        assert made.status_code == 200 and made.json()["catalogue_items"] == 20
        answer = client.post("/recommend", json={"history": ["i103"]}).json()
        assert {i["item_id"] for i in answer["items"]} == {"i101", "i102"}
        assert (answer["model"]["version"], answer["view"]["version"]) == (2, 3)
        assert client.post("/recommend", json={"history": [100]}).status_code == 422


def test_a_later_catalogue_with_the_old_model(world, copy_run):
    later = world.root / "later"
    copy_run("later")
    for name in ("sft", "dataset", "data", "semantic_ids"):
        shutil.rmtree(later / name)
    old = world.recommenders["a"].semantic_ids
    rows = [5, 9, 3]
    used = {tuple(codes) for codes in old.codes.tolist()}
    free = next(codes for codes in np.ndindex(4, 4, 4) if codes not in used)
    ids = pl.concat([old.item_ids.gather(rows), pl.Series("item_id", [900])])
    stage = Stage(later, "prepare", {"max_history": 2})
    assert not stage.is_done()
    titles = [f"title {i}" for i in range(4)]
    write_parquet(stage.folder / "catalog.parquet", pl.DataFrame({"item_id": ids, "title": titles}))
    stage.finish(rows=4)
    stage = Stage(later, "quantize", {}, ["prepare"])
    assert not stage.is_done()
    old.successor(ids, np.concatenate([old.codes[rows], [free]])).save(stage.folder)
    stage.finish(rows=4)
    with TestClient(world.app(), headers=world.admin) as client:
        alone = client.post("/admin/model", json={"run_dir": "later"})
        assert alone.status_code == 422 and "stage 'sft' has not finished" in alone.text
        before = client.get("/health").json()["model"]
        made = client.post("/admin/model", json={"run_dir": "later", "model_run": "a"})
        assert made.status_code == 200 and made.json()["model"]["sha256"] == before["sha256"]
        answer = client.post("/recommend", json={"history": [900]}).json()
        assert {i["item_id"] for i in answer["items"]} == set(ids[:3])


def test_models_that_cannot_be_loaded(world, copy_run):
    cut = copy_run("cut")
    weights = next((cut / "sft" / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4])
    with TestClient(world.app(), headers=world.admin) as client:
        for name, message in (("cut", "its manifest says"), ("b/sft", "has not finished")):
            made = client.post("/admin/model", json={"run_dir": name})
            assert made.status_code == 422 and message in made.text
        for body in ({}, {"run_dir": ""}, {"run_dir": 3}, {"run_dir": "a" * 1025}, {"path": "a"}):
            assert client.post("/admin/model", json=body).status_code == 422
        assert client.get("/health").json()["model"]["version"] == 1
        assert client.post("/recommend", json={"history": []}).is_success
        metrics = client.get("/metrics").text
        assert 'genrec_swaps_total{outcome="refused",what="model"} 2.0' in metrics
    with TestClient(world.app(runs_root=None), headers=world.admin) as client:
        made = client.post("/admin/model", json={"run_dir": "b"})
        assert made.status_code == 422 and "without a root folder of runs" in made.text


def test_any_error_of_a_load_leaves_the_old_model(world):
    def load(run_dir: str, model_run: str | None) -> Any:
        if run_dir.endswith("b"):
            raise MemoryError("no room for the second model")
        return load_run(run_dir, model_run)

    with TestClient(create_app(load, world.settings()), headers=world.admin) as client:
        made = client.post("/admin/model", json={"run_dir": "b"})
        assert made.status_code == 422
        assert "MemoryError: no room for the second model" in made.text
        assert client.post("/recommend", json={"history": []}).json()["model"]["version"] == 1
        assert client.post("/admin/model", json={"run_dir": "a"}).json()["model"]["version"] == 2


def test_paths_that_lead_out(world, copy_run, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    linked, partly, inside = copy_run("linked"), copy_run("partly"), copy_run("inside")
    shutil.copytree(linked / "sft", outside / "sft")
    shutil.rmtree(linked / "sft")
    (linked / "sft").symlink_to(outside / "sft")
    weights = next((partly / "sft" / "model").glob("*.safetensors"))
    weights.rename(outside / "weights")
    weights.symlink_to(outside / "weights")
    config = inside / "sft" / "model" / "config.json"
    config.unlink()
    config.symlink_to(world.root / "a" / "sft" / "model" / "config.json")
    # In two steps: to a folder within the root, from there out of it.
    twice, step = copy_run("twice"), copy_run("step")
    shutil.rmtree(twice / "dataset")
    (step / "more").mkdir()
    (step / "more" / "prompts").symlink_to(outside)
    (twice / "dataset").symlink_to(step / "more")
    escape, circle = world.root / "escape", world.root / "circle"
    escape.symlink_to(outside)
    circle.symlink_to(circle)
    try:
        names = ["..", ".", "", "/", "/etc", "../" + tmp_path.name, str(outside), "a/../..", "none",
                 "a\0b", "x" * 5000, "escape", "circle", "~", "a/data/catalog.parquet"]  # fmt: skip
        for name in names:
            with pytest.raises(ValueError, match="is no run folder below the runs' root") as error:
                path_below(world.root, name)
            assert len(str(error.value)) < 200
        for name, link in (
            ("linked", "linked/sft"), ("partly", "partly/sft/model/"),
            ("twice", "step/more/prompts"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"{link}.* links to a place outside"):
                path_below(world.root, name)
        assert path_below(world.root, "inside") == inside  # a link within the root may stay
        assert path_below(world.root, "a/../b") == world.root / "b"
        with TestClient(world.app(), headers=world.admin) as client:
            for name in ("..", "escape", "linked", "a\0b", "\ud800"):
                sent = json.dumps({"run_dir": name}).encode()
                made = client.post(
                    "/admin/model", content=sent, headers={"content-type": "application/json"}
                )
                assert made.status_code == 422, made.text
    finally:
        escape.unlink()
        circle.unlink()


def test_requests_during_swaps_see_one_model_and_one_view(world):
    """Views and models change all the time: nothing fails, nothing is mixed, both are seen."""
    ids = world.ids
    views = {"all": set(ids), "allow": set(ids[:30]), "deny": set(ids[30:])}
    bodies = {"all": {"all": True}, "allow": {"allow": ids[:30]}, "deny": {"deny": ids[:30]}}
    full = {
        name: [r.item_id for r in world.recommenders[name].recommend([ids[0]], 60, False)]
        for name in "ab"
    }
    app = world.app(max_batch=8)
    seen: set[tuple[str, str]] = set()

    async def test(client: httpx.AsyncClient) -> None:
        name_of = {(await client.get("/health")).json()["model"]["sha256"]: "a"}
        stop = asyncio.Event()

        async def ask() -> None:
            while not stop.is_set():
                body = {"history": [ids[0]], "k": 5, "filter_seen": False}
                made = await client.post("/recommend", json={"requests": [body, body]})
                assert made.status_code == 200, made.text
                answer = made.json()
                model = name_of.get(answer["model"]["sha256"], "b")
                rule = answer["view"]["rule"]
                seen.add((model, rule))
                want = [i for i in full[model] if i in views[rule]][:5]
                for result in answer["results"]:
                    assert [i["item_id"] for i in result["items"]] == want, (model, rule)

        asking = [asyncio.create_task(ask()) for _ in range(6)]
        for step in range(4):
            rule = ("allow", "deny", "all")[step % 3]
            made = await client.post("/admin/view", json=bodies[rule], headers=world.admin)
            assert made.status_code == 200
            if step == 1:
                run_dir = {"run_dir": "b"}
                made = await client.post("/admin/model", json=run_dir, headers=world.admin)
                assert made.status_code == 200
            while (made.json()["model"]["sha256"] in name_of, rule) not in {
                (model == "a", rule) for model, rule in seen
            }:
                assert not any(task.done() for task in asking)
                await asyncio.sleep(0.002)
        stop.set()
        await asyncio.gather(*asking)

    run(app, test)
    assert {model for model, _ in seen} == {"a", "b"}
    assert {rule for _, rule in seen} == {"all", "allow", "deny"}


def test_the_old_model_serves_while_the_new_one_loads(world):
    """Requests during a load, and one that began before the swap and ends after it."""
    loading, go, decoding, answer = (threading.Event() for _ in range(4))

    def load(run_dir: str, model_run: str | None) -> Any:
        if run_dir.endswith("b"):
            loading.set()
            assert go.wait(20)
        return load_run(run_dir, model_run)

    app = create_app(load, world.settings(max_wait_ms=0))
    batcher = endpoints(app).batcher
    decode = batcher._decode

    def slow(jobs):
        decoding.set()
        assert answer.wait(20)
        return decode(jobs)

    async def test(client: httpx.AsyncClient) -> None:
        swap = asyncio.create_task(
            client.post("/admin/model", json={"run_dir": "b"}, headers=world.admin)
        )
        assert await asyncio.to_thread(loading.wait, 20)
        made = await client.post("/recommend", json={"history": []})
        assert made.json()["model"]["version"] == 1
        second = await client.post("/admin/model", json={"run_dir": "b"}, headers=world.admin)
        assert second.status_code == 409 and "another model is being loaded" in second.text
        # A view is not kept waiting, and the new model gets it.
        view = {"allow": world.ids[:4]}
        made = await client.post("/admin/view", json=view, headers=world.admin)
        assert made.json()["model"]["version"] == 1 and made.json()["view"]["version"] == 2
        batcher._decode = slow
        early = asyncio.create_task(client.post("/recommend", json={"history": []}))
        assert await asyncio.to_thread(decoding.wait, 20)
        go.set()
        swapped = (await swap).json()
        assert swapped["model"]["version"] == 2 and swapped["view"]["items"] == 4
        late = asyncio.create_task(client.post("/recommend", json={"history": []}))
        await asyncio.sleep(0.01)
        answer.set()
        assert (await early).json()["model"]["version"] == 1
        assert (await late).json()["model"]["version"] == 2

    run(app, test)


def test_overload_timeouts_and_clients_that_leave(world):
    entered, answer = threading.Event(), threading.Event()
    app = world.app(max_queue=3, max_requests=2, max_batch=1, max_wait_ms=0, timeout_s=0.3)
    batcher = endpoints(app).batcher
    decode, decoded = batcher._decode, []

    def slow(jobs):
        decoded.extend(job.k for job in jobs)
        entered.set()
        assert answer.wait(20)
        return decode(jobs)

    batcher._decode = slow

    async def test(client: httpx.AsyncClient) -> None:
        def post(k: int) -> asyncio.Task[httpx.Response]:
            return asyncio.create_task(client.post("/recommend", json={"history": [], "k": k}))

        inside = post(1)
        assert await asyncio.to_thread(entered.wait, 20)
        waiting = [post(k) for k in (2, 3, 4)]
        while batcher.waiting < 3:
            await asyncio.sleep(0.001)
        full = await client.post("/recommend", json={"history": [], "k": 5})
        assert full.status_code == 503 and full.headers["retry-after"] == "1"
        assert "3 users wait, the queue takes 3" in full.text
        assert (await client.get("/health")).json()["queued_users"] == 3
        for late in (inside, *waiting):
            made = await late
            assert made.status_code == 504 and "no answer within 0.3 s" in made.text
        assert batcher.waiting == 0
        answer.set()
        made = await client.post("/recommend", json={"history": [], "k": 6})
        assert made.status_code == 200 and decoded == [1, 6]  # nobody decoded in vain

    run(app, test)


def test_a_client_that_leaves_takes_its_users_along(world):
    entered, answer, left = threading.Event(), threading.Event(), asyncio.Event()
    app = world.app(max_batch=1, max_wait_ms=0)
    batcher = endpoints(app).batcher
    decode = batcher._decode

    def slow(jobs):
        entered.set()
        assert answer.wait(20)
        return decode(jobs)

    batcher._decode = slow

    async def main() -> None:
        sent = []
        body = json.dumps({"requests": [{"history": []}] * 3}).encode()
        messages = iter([{"type": "http.request", "body": body}])

        async def receive() -> dict[str, Any]:
            message = next(messages, None)
            if message is None:
                await left.wait()
                return {"type": "http.disconnect"}
            return message

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": "/recommend", "raw_path": b"/recommend", "query_string": b"", "root_path": "",
            "scheme": "http", "headers": headers, "client": ("t", 1), "server": ("t", 80),
        }  # fmt: skip
        async with app.router.lifespan_context(app):
            call = asyncio.create_task(app(scope, receive, send))
            assert await asyncio.to_thread(entered.wait, 20)
            assert batcher.waiting == 2
            left.set()
            await call
            assert batcher.waiting == 0 and sent[0]["status"] == 499
            answer.set()
        text = endpoints(app).monitoring.text().decode()
        assert 'genrec_requests_total{path="/recommend",status="499"} 1.0' in text
        assert "genrec_users_total 1.0" in text

    asyncio.run(main())


def test_view_files(tmp_path: Path):
    file = tmp_path / "view.json"
    file.write_text('{"deny": ["ä", 3]}')
    assert read_view(file) == ViewRule("deny", ("ä", 3))
    for text, message in (
        ("{", "not valid JSON"),
        ('{"deny": [1], "allow": [2]}', "exactly one"),
        ("[]", "must be a JSON object"),
        ('{"allow": [1.5]}', "an id is a string or an integer"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_view(file)
    with pytest.raises(ValueError, match="does not exist"):
        read_view(tmp_path / "missing.json")
