"""Benchmark: latency and throughput of `genrec serve` under load, and swaps that nobody notices.

    python recipes/benchmarks/serving.py --quick                  # a small shop, random weights
    python recipes/benchmarks/serving.py --run_dir runs/quickstart

Starts two real servers on loopback, one that batches and one that doesn't (`--max_batch 1`), and
sends each the same requests from 1, 8 and 32 clients that each wait for their answer, in turns
(`direct_p50_ms`: `Recommender.recommend` in this process, in the same turns). Then, under load, the
batching server's view and model are swapped (for `swap_run`; by default the run is loaded once
more); every answer is checked against the view that it names. Clients and servers share the
machine's cores. Without `run_dir` a run of 2,000 items is built with random weights: speed doesn't
depend on what a model has learned. The last line is one JSON object; the exit status is 1 if any
request failed. Needs the serve extra and httpx.
"""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec.artifacts import Stage, require, stage_folder, write_parquet
from genrec.columns import ITEM_ID, TITLE
from genrec.config import parse, run
from genrec.data.synthetic import synthetic_shop
from genrec.modeling import add_sid_tokens, from_scratch, save_model, train_tokenizer
from genrec.prompts import default_folder
from genrec.recommend import Recommender
from genrec.semantic_ids import SemanticIds

SERVE = Path(__file__).resolve().parent.parent / "serve.py"
TOKEN = "a-token-for-this-benchmark"


@dataclass
class ServingArgs:
    """Settings of the benchmark."""

    run_dir: str | None = None  # default: a small run with random weights
    swap_run: str | None = None  # run to swap to, beside run_dir; default: run_dir once more
    clients: list[int] = field(default_factory=lambda: [1, 8, 32])  # concurrency levels
    requests: int = 400  # per level, server and repeat
    seconds: float = 30.0  # at most, per level, server and repeat
    repeats: int = 5
    k: int = 10
    quick: bool = False  # 1 repeat of 120 requests
    seed: int = 0


@dataclass
class Load:
    """What a run of requests gave."""

    seconds: float
    latencies: list[float]  # of those that succeeded
    failed: int
    wrong: int  # an item that the named view forbids
    models: set[int]
    views: set[int]


def build_run(run_dir: Path, n_items: int, seed: int) -> None:
    """A finished run over the synthetic shop with random SIDs and weights."""
    catalog = synthetic_shop(n_users=1, n_items=n_items, seed=0).catalog
    rng = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(rng.permutation(64**3)[: len(catalog)], (64,) * 3), axis=1)
    semantic_ids = SemanticIds(catalog[ITEM_ID], codes, (64, 64, 64))
    tokenizer = train_tokenizer(catalog[TITLE].to_list(), 1000)
    add_sid_tokens(tokenizer, semantic_ids)
    model = from_scratch("small", len(tokenizer), 256, seed)
    stages = ["prepare", "quantize", "build_dataset", "sft"]
    for i, name in enumerate(stages):
        stage = Stage(run_dir, name, {"max_history": 20, "seed": seed}, stages[:i])
        if stage.is_done():
            raise ValueError(f"{run_dir} holds a run already; give another folder")
        if name == "prepare":
            write_parquet(stage.folder / "catalog.parquet", catalog)
        elif name == "quantize":
            semantic_ids.save(stage.folder)
        elif name == "build_dataset":
            shutil.copytree(default_folder(), stage.folder / "prompts")
        else:
            save_model(model, tokenizer, semantic_ids, stage.folder / "model", {"stage": name})
        template = {"serving_template": "sequential/seen/01"}
        stage.finish(rows=0, metrics=template if name == "build_dataset" else {})


@contextmanager
def server(run_dir: Path, root: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server process and its address; ended with SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(SERVE), "--run_dir", str(run_dir), "--runs_root", str(root)]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--max_queue", "4096", "--timeout_s", "60", *flags],
        env={**os.environ, "GENREC_ADMIN_TOKEN": TOKEN},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait(60)


@asynccontextmanager
async def client_of(url: str, process: subprocess.Popen[bytes]) -> AsyncIterator[Any]:
    """A client of a server that has come up."""
    import httpx

    limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        for _ in range(1800):
            if process.poll() is not None:
                raise ValueError(f"the server ended with status {process.returncode}; run {SERVE}")
            try:
                await client.get("/health")
                break
            except httpx.TransportError:
                await asyncio.sleep(0.1)
        yield client


def make_bodies(run_dir: Path, n: int, k: int, seed: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """Request bodies with random histories, and the item ids."""
    ids = pl.read_parquet(stage_folder(run_dir, "prepare") / "catalog.parquet")[ITEM_ID].to_list()
    longest = require(run_dir, "prepare").config["max_history"]
    rng = np.random.default_rng(seed)
    bodies = [
        {
            "history": [ids[i] for i in rng.integers(0, len(ids), rng.integers(1, longest + 1))],
            "k": k,
        }
        for _ in range(n)
    ]
    return bodies, ids


async def send(
    client: Any,
    bodies: list[dict[str, Any]],
    clients: int,
    seconds: float,
    denied: set[Any],
    until: asyncio.Event | None = None,
) -> Load:
    """Send bodies from a number of clients that wait for each answer.

    Args:
        client: of one server.
        bodies: once each; again from the start where `until` is given.
        clients: requests in flight.
        seconds: no request starts later.
        denied: items that must not come under a deny view.
        until: send until it is set.
    """
    started = time.perf_counter()
    load = Load(0.0, [], 0, 0, set(), set())
    rest = iter(bodies) if until is None else iter(bodies * 1000)

    async def one_client() -> None:
        for body in rest:
            now = time.perf_counter()
            if now - started > seconds or (until is not None and until.is_set()):
                return
            answer = await client.post("/recommend", json=body)
            if answer.status_code != 200:
                load.failed += 1
                continue
            load.latencies.append(time.perf_counter() - now)
            made = answer.json()
            load.models.add(made["model"]["version"])
            load.views.add(made["view"]["version"])
            items = {item["item_id"] for item in made["items"]}
            load.wrong += made["view"]["rule"] == "deny" and bool(items & denied)

    await asyncio.gather(*(one_client() for _ in range(clients)))
    load.seconds = time.perf_counter() - started
    return load


async def batches(client: Any) -> tuple[float, float]:
    """Engine calls and users so far, by the server's own count."""
    text = (await client.get("/metrics")).text
    found = [
        re.search(rf"^genrec_batch_users_{what} (\S+)$", text, re.M) for what in ("count", "sum")
    ]
    return tuple(float(match[1]) for match in found if match)  # type: ignore[return-value]


def summary(loads: list[Load]) -> dict[str, Any]:
    """Latencies of all repeats together, the median repeat's throughput."""
    ms = np.array([latency for load in loads for latency in load.latencies]) * 1000
    speed = [len(load.latencies) / load.seconds for load in loads]
    return {
        "p50_ms": round(float(np.percentile(ms, 50)), 1),
        "p99_ms": round(float(np.percentile(ms, 99)), 1),
        "requests_per_s": round(float(np.median(speed)), 1),
        "requests": len(ms),
        "failed": sum(load.failed for load in loads),
        "wrong": sum(load.wrong for load in loads),
    }


def alone(recommender: Recommender, bodies: list[dict[str, Any]]) -> list[float]:
    """Milliseconds of each request without a server, in this process."""
    took = []
    for body in bodies:
        started = time.perf_counter()
        recommender.recommend(body["history"], body["k"])
        took.append((time.perf_counter() - started) * 1000)
    return took


async def swaps(
    client: Any, bodies: list[dict[str, Any]], denied: list[Any], swap_run: Path
) -> dict[str, Any]:
    """Swap the view and then the model while 8 clients send."""
    done = asyncio.Event()
    sending = asyncio.create_task(send(client, bodies, 8, 300, set(denied), until=done))
    headers = {"authorization": f"Bearer {TOKEN}"}
    took = {}
    for path, body in (
        ("/admin/view", {"deny": denied}),
        ("/admin/model", {"run_dir": str(swap_run.resolve())}),
    ):
        await asyncio.sleep(1)
        started = time.perf_counter()
        made = await client.post(path, json=body, headers=headers)
        if made.status_code != 200:
            raise ValueError(f"{path} was refused: {made.text}")
        took[f"{path.split('/')[-1]}_seconds"] = round(time.perf_counter() - started, 3)
    await asyncio.sleep(1)
    done.set()
    load = await sending
    return {**summary([load]), **took, "models": sorted(load.models), "views": sorted(load.views)}


async def measure(args: ServingArgs, run_dir: Path, swap_run: Path) -> dict[str, Any]:
    """Both servers, all levels, then the swaps."""
    bodies, ids = make_bodies(run_dir, args.requests, args.k, args.seed)
    denied = ids[: max(1, len(ids) // 20)]
    root = run_dir.resolve().parent
    levels: dict[str, Any] = {}
    recommender, direct = Recommender.load(run_dir), []
    with server(run_dir, root) as on, server(run_dir, root, "--max_batch", "1") as off:
        async with client_of(*on) as batching, client_of(*off) as single:
            servers = {"batching": batching, "no_batching": single}
            for client in servers.values():
                await send(client, bodies[:20], 4, args.seconds, set())  # warm up
            for clients in args.clients:
                loads: dict[str, list[Load]] = {name: [] for name in servers}
                before = await batches(batching)
                for _ in range(args.repeats):
                    for name, client in servers.items():
                        loads[name].append(await send(client, bodies, clients, args.seconds, set()))
                    direct += alone(recommender, bodies[:20])
                after = await batches(batching)
                level = {name: summary(many) for name, many in loads.items()}
                mean = (after[1] - before[1]) / (after[0] - before[0])
                level["batching"]["mean_batch"] = round(mean, 2)
                levels[str(clients)] = level
                print(f"{clients} clients: {level}", flush=True)
            swapped = await swaps(batching, bodies, denied, swap_run)
            print(f"swaps under load: {swapped}", flush=True)
    every = [*(one for level in levels.values() for one in level.values()), swapped]
    return {
        "items": len(ids),
        "k": args.k,
        "cores": os.cpu_count(),
        "direct_p50_ms": round(float(np.median(direct)), 1),
        "clients": levels,
        "swap": swapped,
        "failed": sum(one["failed"] for one in every),
        "wrong": sum(one["wrong"] for one in every),
    }


def main() -> None:
    """Run the benchmark."""
    args = parse(ServingArgs)
    if args.quick:
        args.requests, args.repeats = min(args.requests, 120), 1
    with tempfile.TemporaryDirectory() as folder:
        if args.run_dir is None:
            run_dir, swap_run = Path(folder) / "a", Path(folder) / "b"
            for seed, path in enumerate((run_dir, swap_run)):
                build_run(path, 500 if args.quick else 2000, seed)
        else:
            run_dir = Path(args.run_dir)
            swap_run = run_dir if args.swap_run is None else Path(args.swap_run)
            require(run_dir, "sft")
        result = asyncio.run(measure(args, run_dir, swap_run))
    print(json.dumps(result))
    if result["failed"] or result["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
