"""Benchmark: adapters and SID rows against training all weights, from one pretrained base.

    python recipes/benchmarks/lora.py --quick                       # a synthetic shop, one seed
    python recipes/benchmarks/lora.py --run_dir runs/beauty --work_dir runs/lora

A small Qwen3 decoder is pretrained here, on the texts of the run's catalogue alone (titles,
categories, descriptions): it knows the words and no user. From it, with the same rows, epochs and
seeds, `sft` trains

- `full`: all weights, SID rows started from item vectors;
- `lora`: rank-16 adapters on all linear layers and the SID rows, started likewise;
- `full titles`, `lora titles`: SID rows started from title tokens; `… random`: at random, with the
  spread of the other rows; `… resized`: as transformers' resize leaves them, all alike.

Each way has the learning rate that suits it (`--lr_full`, `--lr_lora`), picked on validation by the
caller. Scored on validation users against the whole catalogue; differences from `full` are paired
by user and seed. `--run_dir` is a run with build_dataset done. What is finished in `--work_dir` is
not run again. The last line is one JSON object.
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
from datasets import Dataset
from stages import genrec
from trl import SFTConfig, SFTTrainer

from genrec import modeling
from genrec.artifacts import read_json, stage_folder, write_json, write_parquet
from genrec.columns import RANK
from genrec.embedding.lsa import item_texts
from genrec.evaluation.rank_tables import compare_ranks, target_ranks
from genrec.metrics import gains

K = 10
LORA = ["--use_lora", "true", "--lora_rank", "16", "--lora_alpha", "32"]
INITS = {"": "codebooks", " titles": "titles", " random": "random", " resized": "resized"}
WAYS = {
    f"{kind}{name}": ["--sid_init", init, *flags]
    for kind, flags in (("full", []), ("lora", LORA))
    for name, init in INITS.items()
}
INPUTS = ("prepare", "embed", "quantize", "build_dataset")


def pretrain(run_dir: Path, folder: Path, size: str, epochs: float) -> float:
    """A base model that has read the catalogue, saved in `folder`; returns its mean loss."""
    done = folder / "pretraining.json"
    if done.exists():
        return float(read_json(done)["loss"])
    catalog = pl.read_parquet(stage_folder(run_dir, "prepare") / "catalog.parquet")
    texts = item_texts(catalog, labelled=True)
    tokenizer = modeling.train_tokenizer(texts, 2000)
    model = modeling.from_scratch(size, len(tokenizer), 512, seed=0)
    rows = tokenizer(texts, truncation=True, max_length=96)["input_ids"]
    settings = SFTConfig(
        output_dir=str(folder / "checkpoints"), num_train_epochs=epochs, learning_rate=2e-3,
        per_device_train_batch_size=32, use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, max_length=None,
        lr_scheduler_type="cosine", logging_steps=20, seed=0,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
    loss = float(trainer.train().training_loss)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    write_json(done, {"loss": loss})
    return loss


def train_and_score(
    args: argparse.Namespace, base: Path, way: str, seed: int
) -> tuple[pl.DataFrame, int]:
    """Rank of each validation row's target (0: not in the list), and how many weights moved."""
    name = f"{way.replace(' ', '-')}-{seed}"
    ranks = args.work_dir / "ranks" / f"{name}.parquet"
    moved = args.work_dir / "ranks" / f"{name}.json"
    if ranks.exists():
        return pl.read_parquet(ranks), int(read_json(moved)["trained"])
    run = args.work_dir / "runs" / name
    for stage in INPUTS:
        shutil.copytree(
            stage_folder(args.run_dir, stage), stage_folder(run, stage), dirs_exist_ok=True
        )
    rate = args.lr_lora if way.startswith("lora") else args.lr_full
    genrec("sft", "--run_dir", str(run), "--model_name_or_path", str(base), *WAYS[way],
        "--eval_rows", "0", "--num_train_epochs", str(args.epochs), "--learning_rate", str(rate),
        "--per_device_train_batch_size", "24", "--train_sampling_strategy", "group_by_length",
        "--lr_scheduler_type", "cosine", "--warmup_steps", "50", "--weight_decay", "0.05",
        "--loss_over", "trie", "--use_cpu", "true", "--bf16", "false", "--report_to", "none",
        "--save_strategy", "no", "--gradient_checkpointing", "false", "--seed", str(seed),
    )  # fmt: skip
    genrec("recommend", "--run_dir", str(run), "--split", "valid", "--max_rows", str(args.rows),
        "--beam_width", "30", "--filter_seen", str(args.filter_seen).lower())  # fmt: skip
    scored = target_ranks(run, "valid")
    trained = trained_weights(run, way)
    write_json(moved, {"trained": trained})
    write_parquet(ranks, scored)
    shutil.rmtree(run)
    return scored, trained


def trained_weights(run: Path, way: str) -> int:
    """Number of trained parameters."""
    if not way.startswith("lora"):
        manifest = read_json(stage_folder(run, "sft") / "manifest.json")
        return int(manifest["metrics"]["parameters"])
    from safetensors import safe_open

    path = stage_folder(run, "sft") / "adapter" / "adapter_model.safetensors"
    with safe_open(path, framework="np") as file:  # the whole embedding lies in it, too
        trained = [key for key in file.keys() if "lora_" in key or "trainable_tokens" in key]
        return sum(int(np.prod(file.get_slice(key).get_shape())) for key in trained)


def quick_run(folder: Path) -> Path:
    """A small synthetic shop, ready to be trained on."""
    run_dir = folder / "run"
    for stage, flags in {
        "prepare": "--format synthetic --n_users 400 --n_items 200",
        "embed": "--dim 32",
        "quantize": "--n_levels 3 --codebook_size 32 --report_map pca",
        "build_dataset": "--tasks sequential --sequential_mode whole_history --n_templates 1",
    }.items():
        genrec(stage, "--run_dir", str(run_dir), *flags.split())
    return run_dir


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run_dir", type=Path, help="a run with build_dataset done")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/lora"))
    ways = ["full", "full titles", "lora", "lora titles"]
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=ways)
    parser.add_argument("--size", choices=list(modeling.SIZES), default="tiny")
    parser.add_argument("--pretraining_epochs", type=float, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--rows", type=int, default=6000, help="validation rows that are scored")
    parser.add_argument("--lr_full", type=float, default=1.5e-3)
    parser.add_argument("--lr_lora", type=float, default=4e-3)
    parser.add_argument("--filter_seen", action="store_true", help="leave out what users have")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, then summarise."""
    args = arguments()
    if args.quick:
        args.work_dir = Path(tempfile.mkdtemp())
        args.run_dir, args.ways = quick_run(args.work_dir), ["full", "lora"]
        args.seeds, args.epochs, args.rows, args.pretraining_epochs = 1, 1, 200, 1
    elif args.run_dir is None:
        raise SystemExit("--run_dir is needed: a run with build_dataset done (or --quick)")
    if "full" not in args.ways:
        args.ways = ["full", *args.ways]
    base = args.work_dir / "base"
    base.mkdir(parents=True, exist_ok=True)
    loss = pretrain(args.run_dir, base, args.size, args.pretraining_epochs)
    found: dict[str, list[np.ndarray]] = {way: [] for way in args.ways}
    trained: dict[str, int] = {}
    for seed in range(args.seeds):
        for way in args.ways:
            ranks, trained[way] = train_and_score(args, base, way, seed)
            found[way].append(ranks[RANK].to_numpy())
            print(f"{way} seed {seed}: NDCG@{K} {gains(found[way][-1], K).mean():.4f}", flush=True)
    table: dict[str, dict[str, Any]] = {**compare_ranks(found, "full", K)}
    for way, row in table.items():
        row["trained_weights"] = trained[way]
        print(f"{way:12} {row}")
    print(
        json.dumps(
            {"table": table, "seeds": args.seeds, "rows": len(found["full"][0]),
             "pretraining_loss": round(loss, 3), "size": args.size}
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
