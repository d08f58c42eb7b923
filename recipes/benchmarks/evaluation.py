"""Benchmark: `genrec evaluate` on a million users' lists, and agreement with ranx and RecTools.

    python recipes/benchmarks/evaluation.py            # 1,000,000 users x 50 items
    python recipes/benchmarks/evaluation.py --quick    # 50,000 users, under a minute
    python recipes/benchmarks/evaluation.py --rectools /path/to/venv/bin/python

A synthetic log of ten interactions per user becomes a run by `genrec prepare`; random item vectors
stand for its embed stage. Then the command that scores anybody's lists is timed as a user waits for
it, a process of its own from reading the Parquet file to the written page:

    genrec evaluate --recommendations lists.parquet --baselines popularity --ks 10 50

All it does is counted: reading, aligning by item id, the check for seen items, fitting popularity,
all metrics (accuracy, coverage, Gini, novelty, popularity lift, diversity over 64-dimensional
vectors, calibration over 50 categories), 1,000 bootstrap samples, 10,000 permutations against
popularity, slices, per-user tables, the page. `peak_gb` is that process's. Preparing and drawing
the lists are not counted. The lists are random (seeded), with targets planted at geometric ranks:
speed doesn't depend on how good they are.

Then the metrics alone, per user, against ranx (https://github.com/AmenRA/ranx) from arrays, its
fastest input: one relevant item a row, and five. With `--rectools`, a Python that has RecTools
(`pip install rectools` in an environment of its own), against RecTools' on the same lists.
`max_abs_diff` is the largest difference of any user's metric from any of them.

The last line is one JSON object. CPU only; needs the dev extra. Files lie below `--folder`
(default: a temporary one) while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from genrec.artifacts import Stage, stage_folder
from genrec.columns import ITEM_ID, RANK, SEEN, TARGET, USER_ID
from genrec.item_lists import ItemLists, contains
from genrec.metrics import (
    average_precisions,
    find_relevant,
    gains,
    hits,
    recalls,
    reciprocal_ranks,
    target_rank,
)

RECIPES = Path(__file__).resolve().parent.parent
KS = (10, 50)
EVENTS = 10  # interactions per user
BLOCK = 100_000  # users whose lists are drawn at once
RELEVANT = 5  # relevant items a row, where several are
METRICS = {
    "hit_rate": hits,
    "recall": recalls,
    "ndcg": gains,
    "mrr": reciprocal_ranks,
    "map": average_precisions,
}

IntArray = npt.NDArray[np.integer]


def stage(name: str, *flags: str) -> tuple[float, float]:
    """Run a recipe as a process of its own; its seconds and its peak memory in GB."""
    command = [sys.executable, "-P", str(RECIPES / f"{name}.py"), *flags]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"error: genrec {name} failed:\n{said.read()[-3000:]}")
    return seconds, used.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def distinct_items(n_rows: int, n_items: int, k: int, rng: np.random.Generator) -> IntArray:
    """`k` distinct items a row, popular ones more often. ``# (n_rows, k)`` int32."""
    gaps = rng.integers(1, max(2, n_items // (2 * k)), (n_rows, k), dtype=np.int32)
    start = (n_items * rng.random(n_rows) ** 2).astype(np.int32)  # skewed to the first items
    return (start[:, None] + np.cumsum(gaps, axis=1, dtype=np.int32)) % n_items


def make_run(folder: Path, n_users: int, n_items: int) -> Path:
    """A prepared run with item vectors."""
    rng = np.random.default_rng(0)
    items = distinct_items(n_users, n_items, EVENTS, rng)
    moment = np.sort(rng.integers(0, 365 * 86_400, (n_users, EVENTS)), axis=1)
    log = {"user_id": np.repeat(np.arange(n_users), EVENTS), "item_id": items.ravel() + 1}
    pl.DataFrame({**log, "time": moment.ravel() + 1_600_000_000}).write_parquet(
        folder / "log.parquet"
    )
    number = np.arange(n_items)
    pl.DataFrame(
        {
            "item_id": number + 1,
            "title": [f"Thing {i}" for i in number],
            "category": [f"Shop {i % 10} > Shelf {i % 40}" for i in number],
        }
    ).write_parquet(folder / "items.parquet")
    run_dir = folder / "run"
    stage(
        "prepare", "--run_dir", str(run_dir), "--format", "table",
        "--interactions", str(folder / "log.parquet"), "--items", str(folder / "items.parquet"),
        "--time_column", "time", "--category_column", "category", "--category_separator", ">",
    )  # fmt: skip
    catalog = pl.read_parquet(stage_folder(run_dir, "prepare") / "catalog.parquet")
    embed = Stage(run_dir, "embed", {"method": "random"}, ["prepare"])
    embed.is_done()
    vectors = rng.normal(size=(catalog.height, 64)).astype(np.float32)
    np.save(embed.folder / "item_embeddings.npy", vectors)
    embed.finish(rows=catalog.height)
    return run_dir


def write_lists(run_dir: Path, path: Path, k: int) -> int:
    """Lists of `k` unseen items for every test row, as another system would hand them in.

    A target stands at a geometric rank, outside the list in about a fifth of them.

    Returns:
        The number of lists.
    """
    data = stage_folder(run_dir, "prepare")
    ids = pl.read_parquet(data / "catalog.parquet", columns=[ITEM_ID])[ITEM_ID].to_numpy()
    rows = pl.read_parquet(data / "test.parquet", columns=[USER_ID, TARGET, SEEN])
    rng, n_items, writer = np.random.default_rng(1), len(ids), None
    for start in range(0, rows.height, BLOCK):
        part = rows[start : start + BLOCK]
        target, seen = part[TARGET].to_numpy(), ItemLists.from_column(part[SEEN])
        drawn = distinct_items(part.height, n_items, k + EVENTS, rng)
        keys = np.arange(part.height)[:, None] * n_items + drawn
        banned = contains(seen.keys(n_items), keys) | (drawn == target[:, None])
        free = np.argsort(banned, axis=1, kind="stable")[:, :k]
        lists = np.take_along_axis(drawn, free, axis=1)
        rank = rng.geometric(0.03, part.height) - 1
        lists[rank < k, rank[rank < k]] = target[rank < k]
        table = pa.table(
            {
                USER_ID: np.repeat(part[USER_ID].to_numpy(), k),
                ITEM_ID: ids[lists.ravel()],
                RANK: np.tile(np.arange(1, k + 1, dtype=np.int32), part.height),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()
    return rows.height


def per_user(lists: IntArray, relevant: IntArray) -> dict[str, npt.NDArray[np.float64]]:
    """Our metrics. ``relevant # (n_rows, n_relevant)``."""
    if relevant.shape[1] == 1:
        ranks = target_rank(lists, relevant[:, 0])
        return {f"{name}@{k}": metric(ranks, k) for k in KS for name, metric in METRICS.items()}
    offsets = np.arange(len(relevant) + 1) * relevant.shape[1]
    found = find_relevant(lists, ItemLists(relevant.ravel().astype(np.int64), offsets))
    return {f"{name}@{k}": metric(found, k) for k in KS for name, metric in METRICS.items()}


def apart(ours: dict[str, npt.NDArray[np.float64]], theirs: Any) -> float:
    """The largest difference of any user's metric."""
    return max(float(np.abs(ours[name] - np.asarray(theirs[name])).max()) for name in ours)


def against_ranx(lists: IntArray, relevant: IntArray) -> dict[str, float]:
    """Seconds of both on the same lists, and the largest difference of any user's metric."""
    try:
        import ranx
    except ImportError as error:
        raise SystemExit("error: this benchmark compares with ranx; pip install ranx") from error

    score = np.broadcast_to(np.arange(lists.shape[1], 0, -1), lists.shape)
    run = np.stack([lists, score], axis=2).astype(np.float64)
    qrels = np.stack([relevant, np.ones_like(relevant)], axis=2).astype(np.float64)
    names = [f"{name}@{k}" for k in KS for name in METRICS]
    ranx.evaluate(qrels[:10], run[:10], names)  # compiles
    started = time.perf_counter()
    theirs = ranx.evaluate(qrels, run, names, return_mean=False)
    theirs_seconds = time.perf_counter() - started
    started = time.perf_counter()
    ours = per_user(lists, relevant)
    seconds = time.perf_counter() - started
    return {"ranx": theirs_seconds, "ours": seconds, "apart": apart(ours, theirs)}


def against_rectools(python: str, lists: IntArray, relevant: IntArray) -> tuple[str, float]:
    """RecTools' version in the environment of `python`, and the largest difference to it."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "lists.npz", Path(folder) / "metrics.npz"
        np.savez(given, lists=lists, relevant=relevant, ks=KS)
        script = Path(__file__).with_name("rectools_metrics.py")
        done = subprocess.run(
            [python, "-P", str(script), str(given), str(made)], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"error: {python} {script.name}:\n{done.stderr[-3000:]}")
        return done.stdout.strip(), apart(per_user(lists, relevant), np.load(made))


def draw_relevant(lists: IntArray, n_items: int, n: int, rng: np.random.Generator) -> IntArray:
    """`n` relevant items a row, some of them in the list, of one the first often near its head."""
    k = lists.shape[1]
    rank = rng.geometric(0.03, len(lists)) - 1
    relevant = distinct_items(len(lists), n_items, n, rng)
    if n > 1:  # every second row: the rest stands in the list, too
        half = np.arange(len(lists)) % 2 == 0
        places = np.argsort(rng.random((int(half.sum()), k)), axis=1)[:, :n]
        relevant[half] = np.take_along_axis(lists[half], places, axis=1)
    inside = (rank < k) & (n == 1)
    relevant[inside, 0] = lists[inside, rank[inside]]
    return relevant


def agreement(users: int, n_items: int, k: int, rectools: str | None) -> dict[str, Any]:
    """Our metrics against theirs, with one and with several relevant items a row."""
    rng = np.random.default_rng(2)
    lists = distinct_items(users, n_items, k, rng)
    lists = rng.permuted(lists, axis=1)
    found, differences = {}, {}
    for n in (1, RELEVANT):
        relevant = draw_relevant(lists, n_items, n, rng)
        found[n] = against_ranx(lists, relevant)
        differences[f"ranx, {n} relevant"] = found[n]["apart"]
        if rectools is not None:
            version, difference = against_rectools(rectools, lists, relevant)
            differences[f"rectools {version}, {n} relevant"] = difference
    return {
        "ranx_version": metadata.version("ranx"),
        "ranx_users": users,
        "ranx_seconds": round(found[1]["ranx"], 2),
        "same_metrics_seconds": round(found[1]["ours"], 2),
        "differences": differences,
        "max_abs_diff": max(differences.values()),
    }


def main() -> None:
    """Make a run and lists, time the evaluation, compare metrics, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--ranx_users", type=int, default=200_000)
    parser.add_argument("--rectools", help="a Python that has RecTools")
    parser.add_argument("--folder", help="where files go; default: a temporary folder")
    parser.add_argument("--quick", action="store_true", help="50,000 users")
    args = parser.parse_args()
    users = min(args.users, 50_000) if args.quick else args.users
    checked = min(users, args.ranx_users)
    if args.k < max(KS) or args.items < 4 * args.k:
        raise SystemExit(f"error: --k must be at least {max(KS)}, --items at least 4 times --k")
    with (
        tqdm(total=4, desc=f"{users:,} users x {args.k}") as bar,
        tempfile.TemporaryDirectory(dir=args.folder) as temporary,
    ):
        folder = Path(temporary)
        run_dir = make_run(folder, users, args.items)
        bar.update()
        n_lists = write_lists(run_dir, folder / "lists.parquet", args.k)
        bar.update()
        seconds, peak = stage(
            "evaluate", "--run_dir", str(run_dir), "--system", "lists",
            "--recommendations", str(folder / "lists.parquet"),
            "--output_dir", str(folder / "results"), "--cache_dir", str(folder / "cache"),
            "--baselines", "popularity", "--ks", *map(str, KS),
        )  # fmt: skip
        metrics = json.loads((folder / "results" / "metrics.json").read_text())
        bar.update()
        compared = agreement(checked, args.items, args.k, args.rectools)
        bar.update()
    for name, value in metrics["systems"]["lists"].items():
        print(f"{name:22s} {value['value']:.5f}")
    print(f"differences of any user's metric: {compared['differences']}")
    result = {
        "users": n_lists,
        "items": metrics["items"],
        "k": args.k,
        "seconds": round(seconds, 2),
        "peak_gb": round(peak, 2),
        **compared,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
