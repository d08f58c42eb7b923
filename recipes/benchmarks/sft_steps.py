"""Benchmark: what does each step of a dataset's recipe bring? One is taken back at a time.

    python recipes/benchmarks/sft_steps.py --run_dir runs/beauty --configs recipes/configs/beauty
    python recipes/benchmarks/sft_steps.py --run_dir runs/beauty --arms recipe no-average --seeds 3
    python recipes/benchmarks/sft_steps.py --quick        # a synthetic shop, two arms, one epoch

`recipe` is the line of `--configs` as it is; every other arm changes what its name says and nothing
else. All have as many epochs (`--epochs`; default: the recipe's), and each its own best checkpoint
by the validation rows that it looks at. Scored on `--rows` validation rows, another sample;
intervals are over rows and seeds, differences from `recipe` are paired by row. With fewer epochs
than the recipe has, what keeps a model from learning rows by heart seems to bring less than it
does.

`--run_dir` is a run with prepare done and, for `embed`, the files of its config at hand. What is
finished in `--work_dir` is not run again, and a folder of other settings is refused. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from stages import config, genrec, keep_settings

from genrec.artifacts import (
    load_manifest,
    read_json,
    require,
    stage_folder,
    write_json,
    write_parquet,
)
from genrec.columns import RANK
from genrec.evaluation.rank_tables import compare_ranks, target_ranks
from genrec.metrics import gains, hits

K = 10
STAGES = ("embed", "quantize", "build_dataset", "sft")
TASKS = "--tasks sequential title_to_sid sid_to_title"
# arm -> stage -> what it gets on top of its config.
ARMS: dict[str, dict[str, str]] = {
    "recipe": {},
    "text-vectors": {"embed": "--collaborative none"},
    "codes-3x256": {"quantize": "--n_levels 3 --collisions minimal"},
    "rows-from-titles": {"sft": "--sid_init titles"},
    "rows-at-random": {"sft": "--sid_init random"},
    "loss-over-level": {"sft": "--loss_over level"},
    "loss-over-vocabulary": {"sft": "--loss_over vocabulary"},
    "last-item": {"build_dataset": "--sequential_mode last_item"},
    "more-tasks": {"build_dataset": TASKS},
    "size-tiny": {"sft": "--size tiny"},
    "size-base": {"sft": "--size base"},
    "hidden-dropout-.3": {"sft": "--hidden_dropout 0.3"},
    "weight-decay-.05": {"sft": "--weight_decay 0.05"},
    "no-average": {"sft": "--ema_decay 0"},
}
QUICK = ["recipe", "no-average"]


def trained(args: argparse.Namespace, arm: str, seed: int) -> Path:
    """The arm's run, trained."""
    run = args.work_dir / f"{arm}-{seed}"
    data = stage_folder(run, "prepare")
    if not data.exists():
        partial = data.with_name(f"{data.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(stage_folder(args.run_dir, "prepare"), partial)
        partial.rename(data)
    for stage in STAGES:
        own = ARMS[arm].get(stage, "").split()
        if stage == "sft":
            epochs = [] if args.epochs is None else ["--num_train_epochs", str(args.epochs)]
            own = ["--seed", str(seed), "--disable_tqdm", "true", *epochs, *args.sft, *own]
        genrec(stage, *config(args.configs, stage), "--run_dir", str(run), *own)
    return run


def ranks_of(args: argparse.Namespace, arm: str, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Rank of each row's target in the arm's lists (0: not in the list), and what training took."""
    ranks = args.work_dir / "ranks" / f"{arm}-{seed}.parquet"
    facts = ranks.with_suffix(".json")
    if ranks.exists():
        if (then := read_json(facts)["settings"]) != ARMS[arm]:
            raise SystemExit(f"{ranks} is of {then}, not of {ARMS[arm]}; delete it")
    else:
        run = trained(args, arm, seed)
        genrec(
            "recommend", *config(args.configs, "recommend"), "--run_dir", str(run),
            "--split", "valid", "--max_rows", str(args.rows),
        )  # fmt: skip
        manifest = load_manifest(run, "sft")
        assert manifest is not None
        said = {"seconds": manifest.seconds, "parameters": manifest.metrics["parameters"]}
        write_json(facts, {**said, "settings": ARMS[arm]})
        write_parquet(ranks, target_ranks(run, "valid"))
        shutil.rmtree(run)
    return pl.read_parquet(ranks)[RANK].to_numpy(), read_json(facts)


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run_dir", type=Path, help="run with prepare done")
    parser.add_argument("--configs", type=Path, default=Path("recipes/configs/beauty"))
    parser.add_argument("--work_dir", type=Path, default=Path("runs/sft-steps"))
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=6000, help="validation rows that are scored")
    parser.add_argument("--epochs", type=float, help="of every arm; default: its config's")
    parser.add_argument("--sft", default="", help="further settings of sft, in one string")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.sft = args.sft.split()
    return args


def check_settings(args: argparse.Namespace) -> None:
    """Refuse a work folder whose finished parts were made with other settings than these."""
    configs = {p.name: yaml.safe_load(p.read_text()) for p in sorted(args.configs.glob("*.yaml"))}
    now = {
        "configs": {name: configs.get(f"{name}.yaml") for name in (*STAGES, "recommend")},
        "data": require(args.run_dir, "prepare").content_hash, "rows": args.rows,
        "epochs": args.epochs, "sft": args.sft,
    }  # fmt: skip
    keep_settings(args.work_dir, now)


def quick(args: argparse.Namespace) -> None:
    """A shop of its own, a tiny model, one epoch."""
    args.work_dir = Path(tempfile.mkdtemp())
    args.run_dir, args.arms, args.seeds = args.work_dir / "shop", QUICK, 1
    args.configs, args.epochs, args.rows = args.work_dir / "configs", 1, 200
    args.configs.mkdir()
    shop = ["--n_users", "250", "--n_items", "120"]
    genrec("prepare", "--run_dir", str(args.run_dir), "--format", "synthetic", *shop)
    small = {
        "embed": {"dim": 32},
        "quantize": {"codebook_size": 32},
        "build_dataset": {"tasks": ["sequential"]},
        "sft": {
            "size": "tiny", "per_device_train_batch_size": 24, "eval_rows": 100,
            "learning_rate": 2e-3, "ema_decay": 0.9, "use_cpu": True, "bf16": False,
            "report_to": "none", "gradient_checkpointing": False,
        },
    }  # fmt: skip
    for stage, values in small.items():
        (args.configs / f"{stage}.yaml").write_text(yaml.safe_dump(values))


def main() -> None:
    """Run what is missing, then summarise."""
    args = arguments()
    if args.quick:
        quick(args)
    elif args.run_dir is None:
        raise SystemExit("--run_dir is needed: a run with prepare done (or --quick)")
    if "recipe" not in args.arms:
        raise SystemExit("--arms must name recipe, which the others are compared with")
    check_settings(args)
    found: dict[str, list[np.ndarray]] = {arm: [] for arm in args.arms}
    facts: dict[str, dict[str, Any]] = {}
    for seed in range(args.seeds):  # every arm once before any twice
        for arm in args.arms:
            ranks, facts[arm] = ranks_of(args, arm, seed)
            found[arm].append(ranks)
            ndcg, hit = gains(ranks, K).mean(), hits(ranks, K).mean()
            print(f"{arm}, seed {seed}: NDCG@{K} {ndcg:.4f}, HR@{K} {hit:.4f}", flush=True)
    table = compare_ranks(found, "recipe", K)
    report = {
        "rows": len(found["recipe"][0]),
        "seeds": args.seeds,
        "epochs": args.epochs,
        "arms": {arm: {**table[arm], **facts[arm]} for arm in args.arms},
    }
    write_json(args.work_dir / "steps.json", report)
    if args.quick:
        shutil.rmtree(args.work_dir)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
