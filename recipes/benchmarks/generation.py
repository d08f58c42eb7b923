r"""Benchmark: batch generation for a million users: input and output, memory, kills.

    python recipes/benchmarks/generation.py            # 1,000,000 users, an engine that pretends
    python recipes/benchmarks/generation.py --quick    # 20,000 users, one kill, under a minute
    python recipes/benchmarks/generation.py --run_dir runs/mine --users 100000 --folder results/g \
        --seconds 1800  # with a run's model, half an hour at a time

Everything but the search is the real thing: users are read from a Parquet file in windows and
checked, their prompts rendered and tokenised, the lists written in shards. Without a run the search
is replaced by lists that follow from the prompt alone, so that the rest shows: its users/s bound
those of any engine, they are no rate of recommending. The process is killed with SIGKILL three
times, at a quarter, a half and three quarters of its shards, started again each time, and the
table is compared row by row with that of a run that nothing disturbed.

With a run whose model is slow, `seconds` ends a segment; the same command goes on in the same
`folder`, and what it reports is what was made, never extrapolated. Peak memory is that of the
process that makes the lists. The last line is one JSON object. CPU; Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from genrec.artifacts import sha256_json, write_json, write_parquet
from genrec.columns import ITEM_ID, TITLE
from genrec.decoding.beam import BeamResult
from genrec.decoding.trie import CatalogueView, SidTrie
from genrec.generation.jobs import GenerationJob, check_users, generate
from genrec.generation.shards import ShardInfo
from genrec.generation.users import UserTable
from genrec.item_lists import list_series
from genrec.modeling import add_sid_tokens, train_tokenizer
from genrec.prompts import PromptRenderer
from genrec.recommend import Recommender
from genrec.semantic_ids import SemanticIds

N_ITEMS, CODES, LEVELS = 20_000, 64, 3
KILLS = (0.25, 0.5, 0.75)  # of the shards


class PretendingEngine:
    """Lists that follow from a prompt's tokens alone, in the form of a real engine's.

    Args:
        trie: the catalogue.
    """

    def __init__(self, trie: SidTrie) -> None:
        self.trie = trie

    def search(
        self,
        prompts: Sequence[Sequence[int]],
        k: int,
        beam_width: int,
        seen: Sequence[np.ndarray] | None = None,
        view: CatalogueView | None = None,
        progress: Callable[[int], object] | None = None,
        candidates: Sequence[np.ndarray | None] | None = None,
    ) -> BeamResult:
        """K distinct items for each prompt; filters are not followed."""
        start = np.array([sum(prompt) * 7919 + len(prompt) for prompt in prompts])
        items = (start[:, None] + 37 * np.arange(k)) % self.trie.n_items  # distinct: 37*k < items
        steps = -np.arange(1, k + 1, dtype=np.float32) / k
        level_log_probs = np.repeat(steps[:, None], self.trie.n_levels, 1)[None]
        level_log_probs = np.repeat(level_log_probs, len(prompts), 0)  # (users, k, levels)
        if progress is not None:
            progress(len(prompts))
        certified = np.ones(len(prompts), dtype=bool)
        return BeamResult(items, level_log_probs.sum(2), level_log_probs, certified)


def pretending_recommender() -> Recommender:
    """A shop of 20,000 items, a trained tokenizer, and the engine above."""
    rng = np.random.default_rng(0)
    numbers = rng.permutation(CODES**LEVELS)[:N_ITEMS]
    codes = np.stack(np.unravel_index(numbers, (CODES,) * LEVELS), axis=1).astype(np.int32)
    ids = pl.Series(ITEM_ID, [f"item-{i:06d}" for i in range(N_ITEMS)])
    semantic_ids = SemanticIds(ids, codes, (CODES,) * LEVELS)
    tokenizer = train_tokenizer(["Bought so far, oldest first: "], 300)
    add_sid_tokens(tokenizer, semantic_ids)
    catalog = pl.DataFrame([ids, ids.alias(TITLE)])
    engine = PretendingEngine(SidTrie.build(codes))
    return Recommender(
        catalog, semantic_ids, PromptRenderer(), "sequential/seen/01", tokenizer, engine, 20, "sft"
    )


def write_users(path: Path, n_users: int, ids: pl.Series) -> None:
    """Users with geometric histories (mean about 9 items, some empty), in row groups."""
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.geometric(0.1, n_users) - 1, 60)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = ids.gather((len(ids) * rng.random(offsets[-1]) ** 2).astype(np.uint32))
    users = pl.Series("user_id", np.arange(n_users))
    write_parquet(path, pl.DataFrame([users, list_series(items.alias("history"), offsets)]))


def peak_mb() -> int:
    """Largest resident memory of this process; `getrusage` would count its parent's, too."""
    status = Path("/proc/self/status").read_text()
    return round(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)  # type: ignore[index]


def make(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One call of the job in this process: check, resume, write; says what it made."""
    recommender = Recommender.load(args.run_dir) if args.run_dir else pretending_recommender()
    ids = recommender.catalog[ITEM_ID]
    users = UserTable(args.folder / "users.parquet", ids)
    fingerprint = sha256_json([str(args.run_dir), args.users, args.k, args.beam_width])
    job = GenerationJob(users, folder, args.k, args.beam_width, fingerprint, args.shard_size)
    started = time.perf_counter()
    check_users(job, len(ids))
    checked = time.perf_counter()
    todo = job.missing()
    found = time.perf_counter()
    made: list[ShardInfo] = []

    class Over(Exception):
        """The segment's time is over."""

    done = users.n_rows - job.n_users(todo)
    with tqdm(total=users.n_rows, initial=done, unit="user", mininterval=1) as bar:

        def finished(info: ShardInfo, _: float | None) -> None:
            made.append(info)
            bar.update(info.stop - info.start)
            if args.seconds and time.perf_counter() - found > args.seconds:
                raise Over

        try:
            generate(recommender, job, todo, None, finished)
        except Over:
            pass
    seconds = time.perf_counter() - found
    return {
        "made": sum(info.stop - info.start for info in made),
        "left": len(job.absent()),
        "seconds": round(seconds, 2),
        "seconds_check": round(checked - started, 2),
        "seconds_resume": round(found - checked, 2),
        "peak_mb": peak_mb(),
    }


def run_in_process(args: argparse.Namespace, folder: Path, kill_at: int | None) -> dict[str, Any]:
    """Run `make` in a process of its own; `kill_at` kills it once that many shards are there."""
    said = folder.with_suffix(".json")
    command = [sys.executable, __file__, "--work", str(folder), "--folder", str(args.folder)]
    for name in ("users", "k", "beam_width", "shard_size", "seconds"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--run_dir", args.run_dir] if args.run_dir else []
    process = subprocess.Popen(command, start_new_session=True)
    try:
        while process.poll() is None:
            time.sleep(0.02)
            if kill_at is not None and len(list(folder.glob("recommendations-*"))) >= kill_at:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return {}
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise SystemExit(f"error: the run ended with status {process.returncode}")
    result: dict[str, Any] = json.loads(said.read_text())
    return result


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Whether two folders hold the same shards, by bytes and by table; rows and doubles."""
    names = [sorted(p.name for p in f.glob("recommendations-*")) for f in (first, second)]
    alike = names[0] == names[1]
    rows, lists = 0, 0
    for name in names[0] if alike else []:
        ours, theirs = pl.read_parquet(first / name), pl.read_parquet(second / name)
        alike &= ours.equals(theirs) and (first / name).read_bytes() == (second / name).read_bytes()
        rows += ours.height
        lists += ours.select("row_id").n_unique()
    return {"identical": alike, "shards": len(names[0]), "rows": rows, "lists": lists}


def main() -> None:
    """Write the users, make the lists undisturbed and under fire, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--beam_width", type=int, default=50)
    parser.add_argument("--shard_size", type=int, default=2048)
    parser.add_argument("--run_dir", default=None, help="a run with a real model")
    parser.add_argument("--seconds", type=float, default=0, help="end after so long (0: never)")
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary one")
    parser.add_argument("--quick", action="store_true", help="20,000 users")
    parser.add_argument("--work", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        write_json(args.work.with_suffix(".json"), make(args, args.work))
        return
    if args.quick:
        args.users = min(args.users, 20_000)
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary)
        args.folder.mkdir(parents=True, exist_ok=True)
        ids = (
            pl.read_parquet(Path(args.run_dir) / "data" / "catalog.parquet")[ITEM_ID]
            if args.run_dir
            else pl.Series(ITEM_ID, [f"item-{i:06d}" for i in range(N_ITEMS)])
        )
        if not (args.folder / "users.parquet").exists():
            write_users(args.folder / "users.parquet", args.users, ids)
        whole, killed = args.folder / "whole", args.folder / "killed"
        for folder in (whole, killed):
            folder.mkdir(exist_ok=True)
        first = run_in_process(args, whole, None)
        result: dict[str, Any] = {
            "engine": "torch" if args.run_dir else "pretending",
            "users": args.users,
            "k": args.k,
            "users_made_by_this_call": first["made"],
            "users_per_s": round(first["made"] / first["seconds"], 1) if first["made"] else None,
            "peak_mb": first["peak_mb"],
            "seconds": first["seconds"],
            "seconds_check": first["seconds_check"],
            "shards_left": first["left"],
        }
        if not first["left"]:
            n_shards = -(-args.users // args.shard_size)
            shares = KILLS[1:2] if args.quick else KILLS
            ends = [
                run_in_process(args, killed, max(1, round(share * n_shards))) for share in shares
            ]
            last = run_in_process(args, killed, None)
            result |= {
                "kills": sum(not end for end in ends),
                "users_made_after_last_kill": last["made"],
                "seconds_resume": last["seconds_resume"],
                "peak_mb_resumed": last["peak_mb"],
                **compare(whole, killed),
            }
            sizes = [p.stat().st_size for p in whole.glob("recommendations-*")]
            result["output_mb"] = round(sum(sizes) / 1e6, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
