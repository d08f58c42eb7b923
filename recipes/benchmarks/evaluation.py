"""Benchmark: a full evaluation of a million users' lists, and agreement with ranx.

    python recipes/benchmarks/evaluation.py            # 1,000,000 users x 50 items
    python recipes/benchmarks/evaluation.py --quick    # 50,000 users, under a minute

Times what `genrec evaluate` computes for one system: hit ranks, accuracy metrics at 10 and 50,
coverage, Gini, novelty, popularity lift, diversity over 64-dimensional vectors and calibration over
50 categories, all intervals from 1,000 bootstrap samples; then the paired comparison with a second
system (10,000 permutations). In the same run ranx (https://github.com/AmenRA/ranx) scores a part of
the same lists from arrays, its fastest input, and both are compared user by user.

The lists are random (seeded), with targets planted at geometric ranks: speed and agreement don't
depend on how good they are. The last line is one JSON object. CPU only; needs the dev extra.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from importlib import metadata
from typing import Any

import numpy as np
import polars as pl
from tqdm import tqdm

from genrec.evaluation.beyond_accuracy import category_matrix
from genrec.evaluation.comparison import ItemFacts, compare, compare_ranks
from genrec.item_lists import ItemLists
from genrec.metrics import RelevantRanks, gains, hits, reciprocal_ranks, target_rank

KS = (10, 50)
HISTORY = 8  # items per user


def random_lists(
    n_users: int, n_items: int, k: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct items per user, popular ones more often, and a target that some lists hold.

    Returns:
        Lists int32 ``(n_users, k)`` and targets ``(n_users,)``.
    """
    gaps = rng.integers(1, max(2, n_items // (2 * k)), (n_users, k), dtype=np.int32)
    start = (n_items * rng.random(n_users) ** 2).astype(np.int32)  # skewed to the first items
    lists = (start[:, None] + np.cumsum(gaps, axis=1, dtype=np.int32)) % n_items
    rank = rng.geometric(0.03, n_users) - 1
    inside = rank < k
    target = rng.integers(0, n_items, n_users)
    target[inside] = lists[np.flatnonzero(inside), rank[inside]]
    return lists, target


def peak_gb() -> float:
    """Largest resident memory of this process so far, in GB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1e9 if sys.platform == "darwin" else 1e6)


def make_facts(n_users: int, n_items: int, rng: np.random.Generator) -> ItemFacts:
    """Counts, histories, vectors and categories."""
    labels = pl.Series([[f"c{i % 40}", f"d{i % 10}"] for i in range(n_items)])
    history = rng.integers(0, n_items, n_users * HISTORY)
    return ItemFacts(
        train_count=np.bincount(history, minlength=n_items),
        n_users=n_users,
        history=ItemLists(history, np.arange(n_users + 1) * HISTORY),
        vectors=rng.normal(size=(n_items, 64)).astype(np.float32),
        categories=category_matrix(labels),
    )


def against_ranx(lists: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    """Seconds of both on the same lists, and the largest difference of any user's metric."""
    try:
        import ranx
    except ImportError as error:
        raise SystemExit("error: this benchmark compares with ranx; pip install ranx") from error

    k = lists.shape[1]
    score = np.broadcast_to(np.arange(k, 0, -1), lists.shape)
    run = np.stack([lists, score], axis=2).astype(np.float64)
    qrels = np.stack([target, np.ones_like(target)], axis=1).astype(np.float64)[:, None, :]
    names = [f"{m}@{cut}" for cut in KS for m in ("hit_rate", "ndcg", "mrr")]
    ranx.evaluate(qrels[:10], run[:10], names)  # compiles
    started = time.perf_counter()
    theirs = ranx.evaluate(qrels, run, names, return_mean=False)
    seconds_ranx = time.perf_counter() - started
    started = time.perf_counter()
    rank = target_rank(lists, target)
    ours = {
        f"{name}@{cut}": function(rank, cut)
        for cut in KS
        for name, function in (("hit_rate", hits), ("ndcg", gains), ("mrr", reciprocal_ranks))
    }
    seconds = time.perf_counter() - started
    apart = {name: float(np.abs(ours[name] - np.asarray(theirs[name])).max()) for name in names}
    return {
        "ranx_version": metadata.version("ranx"),
        "ranx_users": len(lists),
        "ranx_seconds": round(seconds_ranx, 2),
        "same_metrics_seconds": round(seconds, 2),
        "max_abs_diff": max(apart.values()),
    }


def main() -> None:
    """Make lists, time the evaluation, compare with ranx, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--ranx_users", type=int, default=200_000)
    parser.add_argument("--quick", action="store_true", help="50,000 users")
    args = parser.parse_args()
    users = min(args.users, 50_000) if args.quick else args.users
    if args.k < max(KS) or args.items < 4 * args.k:
        raise SystemExit(f"error: --k must be at least {max(KS)}, --items at least 4 times --k")
    rng = np.random.default_rng(0)
    lists, target = random_lists(users, args.items, args.k, rng)
    other = np.roll(lists, 1, axis=1)  # the same items, each a place lower: a close competitor
    facts = make_facts(users, args.items, rng)
    seconds: dict[str, float] = {}
    with tqdm(total=3, desc=f"{users:,} users x {args.k}") as bar:
        started = time.perf_counter()
        found = compare({"A": [lists]}, target, args.items, KS, facts=facts)
        seconds["metrics and intervals"] = time.perf_counter() - started
        bar.update()
        started = time.perf_counter()
        ranks = {
            "A": found.ranks["A"],
            "B": [RelevantRanks.of_targets(target_rank(other, target))],
        }
        paired = compare_ranks(ranks, KS, reference="A")
        seconds["paired comparison"] = time.perf_counter() - started
        bar.update()
        peak = peak_gb()  # before ranx adds its own
        checked = min(users, args.ranx_users)
        agreement = against_ranx(lists[:checked], target[:checked])
        bar.update()
    for name, value in found.metrics["A"].items():
        width = "" if value.half_width is None else f" ±{value.half_width:.5f}"
        print(f"{name:22s} {value.value:.5f}{width}")
    print(f"A - B, NDCG@10: {paired.differences['B']['NDCG@10']}")
    print({name: round(value, 1) for name, value in seconds.items()})
    result = {
        "users": users,
        "items": args.items,
        "k": args.k,
        "seconds": round(sum(seconds.values()), 2),
        "seconds_metrics": round(seconds["metrics and intervals"], 2),
        "seconds_paired": round(seconds["paired comparison"], 2),
        "peak_gb": round(peak, 2),
        **agreement,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
