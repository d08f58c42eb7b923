"""The server as a user starts and stops it: a process of its own, over a socket."""

from __future__ import annotations

import asyncio
import importlib.util
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from genrec.cli import recipes_folder, summaries

TOKEN = "0123456789abcdef0123"


@dataclass
class Server:
    """A running server."""

    url: str
    port: int
    process: subprocess.Popen[str]
    log: Path


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    shop = tiny.shop()
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(folder, shop, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def server(run, recipe_command, tmp_path_factory) -> Iterator[Server]:
    """A server with a view from a file, batches that wait for company, and a token."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "view.json").write_text('{"deny": [100, 101]}')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command, env = recipe_command(
        "serve", run, "--port", str(port), "--view_file", str(folder / "view.json"),
        "--max_wait_ms", "5000", "--max_batch", "4", "--timeout_s", "60",
        "--runs_root", str(run.parent),
    )  # fmt: skip
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            env=env | {"GENREC_ADMIN_TOKEN": TOKEN},
            stdout=stream,
            stderr=stream,
            text=True,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            for _ in range(1200):
                assert process.poll() is None, log.read_text()
                try:
                    httpx.get(f"{url}/health")
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield Server(url, port, process, log)
        finally:
            process.kill()
            process.wait()


def test_it_serves_the_run_and_its_view(server):
    health = httpx.get(f"{server.url}/health").json()
    assert health["status"] == "ready" and health["catalogue_items"] == 20
    assert (health["view"]["rule"], health["view"]["items"]) == ("deny", 18)
    body = {"requests": [{"history": [], "k": 20}] * 4}  # a full batch: it waits for no one
    made = httpx.post(f"{server.url}/recommend", json=body, timeout=60)
    for result in made.json()["results"]:
        assert {i["item_id"] for i in result["items"]} == set(range(102, 120))
    assert "server" not in made.headers
    admin = {"authorization": f"Bearer {TOKEN}"}
    made = httpx.post(f"{server.url}/admin/view", json={"all": True}, headers=admin, timeout=60)
    assert made.json()["view"]["items"] == 20
    assert httpx.post(f"{server.url}/admin/view", json={"all": True}).status_code == 401


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (b"Content-Length: 99999999999\r\n", b""),
        (b"Transfer-Encoding: chunked\r\n", b"ffffff\r\n" + b"x" * 400_000),
        (b"Content-Length: 400000\r\n", b"x" * 400_000),
    ],
    ids=["a length alone", "chunks without end", "a large body"],
)
def test_oversized_bodies_over_a_socket(server, head, body):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        start = b"POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        client.sendall(start + head + b"\r\n")
        try:
            client.sendall(body)
        except (ConnectionResetError, BrokenPipeError):
            pass  # it may hang up before it has read everything
        try:
            answer = client.recv(65536)
        except ConnectionResetError:
            answer = None  # so may the answer be lost with what was still on the way
    assert answer is None or answer.startswith(b"HTTP/1.1 413 "), answer
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_nonsense_over_a_socket(server):
    for sent in (b"\x00\xff" * 100 + b"\r\n\r\n", b"POST\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
            client.sendall(sent)
            assert client.recv(65536).startswith(b"HTTP/1.1 400 ")
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_sigterm_answers_what_is_queued(server):
    """The last test of this server: requests wait for company when the signal comes."""

    def ask(k: int) -> httpx.Response:
        return httpx.post(f"{server.url}/recommend", json={"history": [], "k": k}, timeout=60)

    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(ask, k) for k in (1, 2, 3)]
        while httpx.get(f"{server.url}/health").json()["queued_users"] < 3:
            assert not any(one.done() for one in waiting)
        server.process.send_signal(signal.SIGTERM)
        answers = [one.result() for one in waiting]
    assert [len(a.json()["items"]) for a in answers] == [1, 2, 3]
    assert server.process.wait(60) in (0, -signal.SIGTERM)
    log = server.log.read_text()
    assert "Finished server process" in log and "Traceback" not in log and TOKEN not in log


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_wait_ms", "inf"], "max_wait_ms=inf must be below timeout_s=10"),
        (["--max_wait_ms", "nan"], "max_wait_ms=nan must be finite"),
        (["--max_wait_ms", "500", "--timeout_s", "0.5"], "max_wait_ms=500.0 must be below"),
        (["--host", "no such host"], "host=no such host, port="),
        (["--port", "0"], "port=0 must lie between 1 and 65535"),
        (["--engine", "tpu"], "engine='tpu' is not known"),
        (["--max_model_len", "99"], "max_model_len is no setting of engine=torch"),
        (["--engine", "vllm", "--tensor_parallel_size", "0"], "tensor_parallel_size=0 must be"),
        (["--max_batch", "0"], "max_batch=0 must be above 0"),
        (["--max_queue", "3"], "max_requests=64 exceeds max_queue=3"),
        (["--max_connections", "0"], "max_connections=0 must be at least 1"),
        (["--view_file", "nowhere.json"], "view file nowhere.json does not exist"),
        (["--runs_root", "nowhere"], "runs_root=nowhere is no folder"),
        (["--admin_token_file", "nowhere"], "admin token file nowhere does not exist"),
        (["--run_dir", "nowhere"], "has not finished"),
    ],
)
def test_settings_that_cannot_work_end_with_one_line(in_process, run, flags, message):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = str(probe.getsockname()[1])
    flags = flags if "--port" in flags else [*flags, "--port", free]
    said = in_process("serve", run, *flags, fails=True)
    assert message in said and said.count("error: ") == 1 and "Traceback" not in said


def test_a_port_in_use_is_found_before_a_model_is_loaded(in_process, run, monkeypatch):
    import genrec.server.app

    def load(*_: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(genrec.server.app, "create_app", load)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = in_process("serve", run, "--port", str(port), fails=True)
    assert f"port={port} can't be listened at" in said and "in use" in said


def test_answers_do_not_wait_for_acknowledgements():
    """A body that is sent after its head would wait some 40 ms for the client's delayed ACK."""
    path = recipes_folder() / "serve.py"
    spec = importlib.util.spec_from_file_location("serve_recipe", path)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    sys.modules["serve_recipe"] = recipe
    spec.loader.exec_module(recipe)

    async def nodelay() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            own = writer.get_extra_info("socket")
            found.set_result(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        bound = recipe.bound_socket("127.0.0.1", 0)
        async with await asyncio.start_server(accept, sock=bound):
            _, writer = await asyncio.open_connection(*bound.getsockname())
            value = await asyncio.wait_for(found, 10)
            writer.close()
        return value

    assert asyncio.run(nodelay())


def test_a_short_token_is_refused(in_process, run, monkeypatch):
    monkeypatch.setenv("GENREC_ADMIN_TOKEN", "hunter2")
    said = in_process("serve", run, fails=True)
    assert "the admin token has 7 characters" in said and "hunter2" not in said


def test_a_missing_extra_is_named(in_process, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 'uvicorn; run: pip install "genrec[serve]"' in in_process("serve", run, fails=True)


def test_the_command_is_listed():
    assert summaries(recipes_folder())["serve"].startswith("Serve a run over HTTP")
