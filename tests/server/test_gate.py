"""The gate as plain ASGI: bodies that lie, stall, or never end; tokens; counting."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

import pytest

from genrec.server.gate import Gate, authorised
from genrec.server.monitoring import Monitoring
from genrec.server.settings import ServerSettings, read_admin_token

TOKEN = "0123456789abcdef0123"
JSON = (b"content-type", b"application/json")


class Inner:
    """The app behind the gate: repeats the body and notes what it received."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []

    async def __call__(self, scope, receive, send) -> None:
        if scope["method"] == "POST":
            self.received.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def call(
    headers: Iterable[tuple[bytes, bytes]] = (JSON,),
    messages: Iterable[dict[str, Any]] = ({"type": "http.request", "body": b"{}"},),
    path: str = "/recommend",
    method: str = "POST",
    root_path: str = "",
    **settings: Any,
) -> tuple[int | None, str, Inner, str]:
    """Send messages through a gate: status, detail, the app behind, the metrics."""
    monitoring, inner, sent = Monitoring(lambda: 0, lambda: 0), Inner(), []
    values = {"max_body_bytes": 10, "max_admin_body_bytes": 20, "admin_token": TOKEN, **settings}
    gate = Gate(inner, ServerSettings("run", **values), monitoring)
    rest = iter(messages)

    async def receive() -> dict[str, Any]:
        message = next(rest, None)
        if message is None:
            await asyncio.Event().wait()  # the client sends nothing more
        return message

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": method, "path": path, "root_path": root_path,
        "headers": list(headers), "client": ("test", 1),
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(gate(scope, receive, send), 20))
    if not sent:
        return None, "", inner, monitoring.text().decode()
    detail = json.loads(sent[1]["body"]).get("detail", "")
    if sent[0]["status"] != 200:
        assert (b"connection", b"close") in sent[0]["headers"]
    return sent[0]["status"], detail, inner, monitoring.text().decode()


def chunks(*parts: bytes) -> list[dict[str, Any]]:
    return [
        {"type": "http.request", "body": part, "more_body": i < len(parts) - 1}
        for i, part in enumerate(parts)
    ]


def test_a_body_passes_whole_and_once():
    status, _, inner, text = call(messages=chunks(b"123", b"", b"4567", b"890"))
    assert status == 200
    assert inner.received == [{"type": "http.request", "body": b"1234567890", "more_body": False}]
    assert 'genrec_requests_total{path="/recommend",status="200"} 1.0' in text


def test_a_body_is_counted_not_believed():
    status, detail, inner, _ = call(messages=chunks(b"123456", b"78901"))
    assert (status, inner.received) == (413, [])
    assert detail == "the body is larger than this server's limit of 10 bytes"
    short = (b"content-length", b"3")  # a lie that a careless server in front lets through
    assert call([JSON, short], chunks(b"12345678901"))[0] == 413
    endless = ({"type": "http.request", "body": b"x", "more_body": True} for _ in range(10**9))
    assert call(messages=endless)[0] == 413


@pytest.mark.parametrize(
    ("length", "status"), [(b"11", 413), (b"9" * 5000, 413), (b"-1", 400), (b"1e1", 400)]
)
def test_a_declared_length_is_enough_to_refuse(length, status):
    assert call([JSON, (b"content-length", length)], messages=())[0] == status


def test_a_body_that_stalls():
    part = [{"type": "http.request", "body": b"{", "more_body": True}]
    status, detail, inner, _ = call(messages=part, body_timeout_s=0.02)
    assert (status, inner.received) == (408, [])
    assert detail == "the body did not arrive within 0.02 s"


def test_a_client_that_leaves_while_sending():
    part = {"type": "http.request", "body": b"{", "more_body": True}
    status, _, inner, text = call(messages=[part, {"type": "http.disconnect"}])
    assert status is None and inner.received == []
    assert 'genrec_requests_total{path="/recommend",status="499"} 1.0' in text


def test_only_json_bodies_and_no_body_without_need():
    assert call(headers=())[0] == 415
    assert call([(b"content-type", b"text/json")])[0] == 415
    assert call([(b"content-type", b"Application/JSON ; charset=utf-8")])[0] == 200
    assert call(headers=(), messages=(), method="GET", path="/health")[0] == 200


ADMIN = (b"authorization", b"Bearer " + TOKEN.encode())


@pytest.mark.parametrize(
    "header",
    [
        b"", b"Bearer", b"Bearer ", TOKEN.encode(), b"Basic " + TOKEN.encode(),
        b"Bearer " + TOKEN[:-1].encode(), b"Bearer " + TOKEN.encode() + b"x",
        b"Bearer " + TOKEN.upper().encode(), b"Bearer \xff\xfe", b"Bearer x " + TOKEN.encode(),
    ],
)  # fmt: skip
def test_admin_paths_need_the_token_before_their_body_is_read(header):
    def unread():
        raise AssertionError("the body was asked for")
        yield

    for path, root in (
        ("/admin", ""), ("/admin/view", ""), ("/admin/x", ""), ("/shop/admin/view", "/shop"),
    ):  # fmt: skip
        status, detail, inner, _ = call(
            [JSON, (b"authorization", header)], unread(), path=path, root_path=root
        )
        assert (status, inner.received) == (401, [])
        assert detail == "this endpoint needs the admin's bearer token" and TOKEN not in detail
    assert not authorised(header, TOKEN) and not authorised(header.decode("latin-1"), TOKEN)


def test_the_admin_may_send_more():
    body = chunks(b"x" * 20)
    assert call([JSON, ADMIN], body, path="/admin/view")[0] == 200
    assert call([JSON, ADMIN], chunks(b"x" * 21), path="/admin/view")[0] == 413
    assert call([JSON, ADMIN], body, path="/recommend")[0] == 413
    assert call([JSON, ADMIN], body, path="/administrator")[0] == 413
    assert call([JSON], body, path="/admin/view", admin_token=None)[0] == 413
    assert authorised(f"bearer {TOKEN}", TOKEN) and authorised(ADMIN[1], TOKEN)
    assert not authorised(None, TOKEN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_batch": 0}, "max_batch=0 must be above 0"),
        ({"timeout_s": float("nan")}, "timeout_s=nan must be above 0"),
        ({"max_wait_ms": -1}, "max_wait_ms=-1 must be at least 0"),
        ({"max_queue": 10}, "max_requests=64 exceeds max_queue=10"),
        ({"max_requests": 1025, "max_queue": 2000}, "max_requests=1025 exceeds 1024"),
        ({"beam_width": 50}, "beam_width=50 must be at least max_k=100"),
        ({"admin_token": "short"}, "the admin token has 5 characters; it needs at least 16"),
        ({"admin_token": "ä" * 20}, "printable ASCII"),
        ({"admin_token": "two words, both long"}, "holds a space"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        ServerSettings("run", **settings)


def test_where_the_token_comes_from(monkeypatch, tmp_path):
    monkeypatch.delenv("GENREC_ADMIN_TOKEN", raising=False)
    assert read_admin_token() is None
    monkeypatch.setenv("GENREC_ADMIN_TOKEN", "")
    assert read_admin_token() is None
    monkeypatch.setenv("GENREC_ADMIN_TOKEN", TOKEN)
    assert read_admin_token() == TOKEN
    (tmp_path / "token").write_text(TOKEN[::-1] + "\n")
    assert read_admin_token(tmp_path / "token") == TOKEN[::-1]  # the file wins
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match="has 0 characters"):
        read_admin_token(tmp_path / "empty")  # never silently without a token
    with pytest.raises(ValueError, match="does not exist"):
        read_admin_token(tmp_path / "missing")
    assert TOKEN not in repr(ServerSettings("run", admin_token=TOKEN))
