"""build_dataset with queries, intentions and preferences that a model wrote."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import polars as pl
import pytest

WRITTEN = ("intention_search", "query_search", "preference_recommendation")


@pytest.fixture
def endpoint():
    """A chat-completions endpoint that answers "wish <number>", and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["messages"][-1]["content"])
            answer = {"role": "assistant", "content": f"wish {len(asked)} <a_1>"}
            choice = {"index": 0, "message": answer, "finish_reason": "stop"}
            reply = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
            data = json.dumps({**reply, "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()


def test_an_endpoint_writes_and_is_asked_once(in_process, copied_run, endpoint):
    pytest.importorskip("openai")
    url, asked = endpoint
    run = copied_run("data", "embeddings", "semantic_ids")
    flags = ["--tasks", "sequential", *WRITTEN, "--max_rows", "*=150", "--overwrite", "true"]
    llm = ["--writer", "openai", "--writer_model", "fake", "--writer_url", url]
    in_process("build_dataset", run, *flags, *llm)
    rows = pl.read_parquet(run / "dataset" / "train.parquet")
    for task, column in zip(WRITTEN, ("intention", "query", "preference"), strict=True):
        mine = rows.filter(pl.col("task") == task)
        assert len(mine) > 20
        assert set(mine["text_origin"]) == {"llm:fake"}
        assert mine[column].str.contains(r"^wish \d+ ‹a_1›$").all()
        assert all(c in p for c, p in mine.select(column, "prompt").iter_rows())
    card = json.loads((run / "dataset" / "card.json").read_text())
    assert "llm:fake" in json.dumps(card)
    # What is asked about a row is its history, which holds no target; nothing is asked twice.
    assert len(asked) == len(set(asked))
    before = len(asked)
    again = run / "dataset" / "train.parquet"
    first = again.read_bytes()
    in_process("build_dataset", run, *flags, *llm)
    assert len(asked) == before
    assert again.read_bytes() == first


def test_settings_of_the_writer_are_checked(in_process, copied_run):
    run = copied_run("data", "semantic_ids")
    for flags, message in (
        (["--writer", "openai", "--writer_url", "http://x/v1"], "name the model"),
        (["--writer_model", "m"], "name the model"),
        (["--writer", "openai", "--writer_model", "m"], "writer_url"),
        (["--writer", "local", "--writer_model", "m", "--writer_url", "http://x"], "writer_url"),
    ):
        assert message in in_process("build_dataset", run, *flags, fails=True)
