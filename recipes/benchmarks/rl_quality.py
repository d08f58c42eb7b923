"""Benchmark: does reinforcement learning make recommendations better than more SFT would?

    python recipes/benchmarks/rl_quality.py --run_dir runs/beauty --configs recipes/configs/beauty
    python recipes/benchmarks/rl_quality.py --run_dir runs/beauty --configs recipes/configs/beauty \
        --arms sft rl more-sft --split test
    python recipes/benchmarks/rl_quality.py --quick        # a synthetic shop, two arms, few steps

Each seed has one SFT model (`sft`), trained on all rows by the shipped config, and every RL arm
starts from it. Its RL rows, each user's last training interaction, are among what it has learned.
`more-sft` is SFT with as much time as `sft` and `rl` took together, its best checkpoint chosen on
validation like every other. `sft-reduced` never saw the targets of the RL rows, and `rl-reduced`
starts there, with the supervised loss on them added. The further arms change one thing of `rl`.

Choose on validation rows (the default); `--split test` reads the test rows, for the arms that were
chosen. Intervals are over rows and seeds, differences from `sft` are paired by row. What is
finished in `--work_dir` is not run again. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
import yaml
from stages import config, genrec

from genrec.artifacts import load_manifest, stage_folder, write_json, write_parquet
from genrec.columns import RANK
from genrec.evaluation.rank_tables import compare_ranks, target_ranks
from genrec.metrics import gains, hits

K = 10
RESERVED = ["--reserve_last", "true"]
# arm -> what grpo gets on top of its config; the first three are no RL.
ARMS: dict[str, list[str]] = {
    "sft": [],
    "more-sft": [],
    "sft-reduced": [],
    "rl": [],
    "rl-reduced": "--sft_weight 0.5 --learning_rate 2e-4 --max_steps 1400".split(),
    "rl-sft-loss-alone": "--reward_weights 0 0 --sft_weight 0.5".split(),
    "rl-rule": ["--rewards", "rule"],
    "rl-rule-prefix": ["--rewards", "rule", "prefix"],
    "rl-rule-rank-prefix": ["--rewards", "rule", "rank", "prefix"],
    "rl-sample": ["--rollouts", "sample"],
    "rl-gumbel": ["--rollouts", "gumbel"],
    "rl-dynamic": ["--rollouts", "dynamic"],
    "rl-full-vocabulary": ["--normalizer", "full"],
    "rl-level-credit": ["--credit", "level"],
    "rl-listwise": ["--loss", "listwise"],
    "rl-sdpo": ["--loss", "sdpo", "--beta", "0.1"],
}
QUICK = ["sft", "rl"]


def linked(source: Path, run: Path, stages: tuple[str, ...]) -> None:
    """Finished stages of another run, without copying their files (a stage never changes them)."""
    for stage in stages:
        if not stage_folder(run, stage).exists():
            made, there = stage_folder(source, stage), stage_folder(run, stage)
            partial = there.with_name(f"{there.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(made, partial, copy_function=os.link)
            partial.rename(there)


def supervised(args: argparse.Namespace, seed: int, run: Path, *more: str, rows: list[str]) -> None:
    """Stages up to sft."""
    linked(args.run_dir, run, ("prepare", "embed", "quantize"))
    at = ["--run_dir", str(run)]
    genrec("build_dataset", *config(args.configs, "build_dataset"), *at, *rows)
    genrec(
        "sft", *config(args.configs, "sft"), *at, "--seed", str(seed), "--disable_tqdm", "true",
        *more,
    )  # fmt: skip


def seconds(run: Path, stage: str) -> float:
    """Time that a finished stage took."""
    manifest = load_manifest(run, stage)
    assert manifest is not None, f"{stage} of {run} has not finished"
    return manifest.seconds


def epochs_for(args: argparse.Namespace, seed: int) -> float:
    """Epochs of SFT that take as long as SFT and RL together."""
    path = args.configs / "sft.yaml"
    planned = yaml.safe_load(path.read_text())["num_train_epochs"] if path.exists() else 3
    planned = args.epochs or planned
    first, second = args.work_dir / f"sft-{seed}", args.work_dir / f"rl-{seed}"
    if load_manifest(second, "grpo") is None:
        make(args, "rl", seed)
    return planned * (1 + seconds(second, "grpo") / seconds(first, "sft"))


def make(args: argparse.Namespace, arm: str, seed: int) -> Path:
    """The arm's run, trained."""
    run = args.work_dir / f"{arm}-{seed}"
    epochs = ["--num_train_epochs", str(args.epochs)] if args.epochs else []
    if arm in ("sft", "sft-reduced"):
        rows = RESERVED if arm == "sft-reduced" else []
        supervised(args, seed, run, *epochs, *args.sft, rows=rows)
    elif arm == "more-sft":
        longer = ["--num_train_epochs", f"{epochs_for(args, seed):.2f}"]
        supervised(args, seed, run, *longer, *args.sft, rows=[])
    else:
        base = make(args, "sft-reduced" if arm == "rl-reduced" else "sft", seed)
        linked(base, run, ("prepare", "embed", "quantize", "build_dataset", "sft"))
        at = ["--run_dir", str(run), "--seed", str(seed), "--disable_tqdm", "true"]
        genrec("grpo", *config(args.configs, "grpo"), *at, *args.grpo, *ARMS[arm])
    return run


def ranks_of(args: argparse.Namespace, arm: str, seed: int) -> np.ndarray:
    """Rank of each row's target in the arm's lists (0: not in the list)."""
    path = args.work_dir / "ranks" / f"{arm}-{seed}-{args.split}.parquet"
    if not path.exists():
        run = make(args, arm, seed)
        rows = [] if args.split == "test" else ["--max_rows", str(args.rows)]
        genrec(
            "recommend", *config(args.configs, "recommend"), "--run_dir", str(run),
            "--split", args.split, "--overwrite", "true", *rows,
        )  # fmt: skip
        write_parquet(path, target_ranks(run, args.split))
        shutil.rmtree(stage_folder(run, "recommend"))
    return pl.read_parquet(path)[RANK].to_numpy()


def facts(args: argparse.Namespace, arm: str) -> dict[str, object]:
    """What the first seed's training says of itself."""
    run = args.work_dir / f"{arm}-0"
    stage = "sft" if arm in ("sft", "more-sft", "sft-reduced") else "grpo"
    found: dict[str, object] = {"seconds": round(seconds(run, stage), 1)}
    before = stage_folder(run, "grpo") / "before.json"
    if stage == "grpo" and before.exists():
        found["before"] = json.loads(before.read_text())
    return found


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run_dir", type=Path, help="run with prepare, embed and quantize done")
    parser.add_argument("--configs", type=Path, default=Path("recipes/configs/beauty"))
    parser.add_argument("--work_dir", type=Path, default=Path("runs/rl-quality"))
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=["sft", "rl", "more-sft"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=("valid", "test"), default="valid")
    parser.add_argument("--rows", type=int, default=6000, help="validation rows that are scored")
    parser.add_argument("--epochs", type=float, help="of sft; default: its config's")
    parser.add_argument("--sft", default="", help="further settings of sft, in one string")
    parser.add_argument("--grpo", default="", help="further settings of grpo, in one string")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.sft, args.grpo = args.sft.split(), args.grpo.split()
    return args


def quick(args: argparse.Namespace) -> None:
    """A shop of its own, a tiny model, few steps."""
    args.work_dir = Path(tempfile.mkdtemp())
    args.run_dir, args.arms, args.seeds, args.rows = args.work_dir / "shop", QUICK, 1, 200
    args.configs, args.epochs = args.work_dir, 2
    shop = ["--n_users", "250", "--n_items", "120"]
    genrec("prepare", "--run_dir", str(args.run_dir), "--format", "synthetic", *shop)
    genrec("embed", "--run_dir", str(args.run_dir), "--dim", "32")
    genrec("quantize", "--run_dir", str(args.run_dir), "--codebook_size", "32")
    common = "--use_cpu true --bf16 false --report_to none --gradient_checkpointing false"
    sft = "--size tiny --per_device_train_batch_size 24 --learning_rate 2e-3 --eval_rows 100"
    args.sft = f"{common} {sft} --save_strategy epoch --save_total_limit 1".split()
    grpo = "--num_generations 8 --per_device_train_batch_size 64 --max_steps 10 --beam_width 16"
    args.grpo = f"{common} {grpo} --eval_rows 100 --eval_every_steps 5 --save_steps 5".split()


def main() -> None:
    """Run what is missing, then summarise."""
    args = arguments()
    if args.quick:
        quick(args)
    elif args.run_dir is None:
        raise SystemExit("--run_dir is needed: a run with quantize done (or --quick)")
    if "sft" not in args.arms:
        raise SystemExit("--arms must name sft, which the others are compared with")
    found: dict[str, list[np.ndarray]] = {arm: [] for arm in args.arms}
    for seed in range(args.seeds):  # every arm once before any twice
        for arm in args.arms:
            ranks = ranks_of(args, arm, seed)
            found[arm].append(ranks)
            ndcg, hit = gains(ranks, K).mean(), hits(ranks, K).mean()
            print(f"{arm}, seed {seed}: NDCG@{K} {ndcg:.4f}, HR@{K} {hit:.4f}", flush=True)
    table = compare_ranks(found, "sft", K)
    report = {
        "split": args.split,
        "rows": len(found["sft"][0]),
        "seeds": args.seeds,
        "arms": {arm: {**table[arm], **facts(args, arm)} for arm in args.arms},
    }
    write_json(args.work_dir / f"{args.split}.json", report)
    if args.quick:
        shutil.rmtree(args.work_dir)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
