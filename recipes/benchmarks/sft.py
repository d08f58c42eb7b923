"""Benchmark: supervised fine-tuning, genrec's trainer against TRL's own at its best settings.

    python recipes/benchmarks/sft.py --quick                    # a synthetic shop, few steps
    python recipes/benchmarks/sft.py --run_dir runs/beauty      # rows of a run, build_dataset done
    python recipes/benchmarks/sft.py --run_dir runs/beauty --size small --batch_size 64

One process, the same model from the same seed, the same rows (whole histories, every item learned
in one pass) in batches of the same size, taken in turns for `--rounds` rounds of `--steps`
optimizer steps each; a figure is the median of the rounds. A supervised item is one SID that a loss
is taken over.

- `trl`: SFTTrainer with rows tokenized beforehand, no gradient checkpointing, rows of similar
  length together. `trl-compiled`: the same under torch.compile, every batch padded to one length,
  since new lengths compile anew; its first round, in which it compiles, is not counted.
  `trl-packed`: rows packed to the longest row's length.
- `ours-vocabulary`, `ours-level`, `ours-trie`: genrec's trainer, rows rendered and tokenized while
  it trains, by what a SID token's loss is normalised over. `ours-vocabulary` is the loss of `trl`.

`ratio` is `ours-vocabulary` (the same loss) over the fastest of TRL's, `ratio_level` and
`ratio_trie` the others. `mfu` are the model's floating point operations per second (6 per weight
and token, attention left out, the whole vocabulary counted for all) over what a matrix product
reaches here: how fast it would be if nothing but a plain model's arithmetic took time. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from genrec import modeling
from genrec.artifacts import stage_folder
from genrec.columns import TASK
from genrec.decoding.trie import SidTrie
from genrec.prompts import PromptRenderer
from genrec.semantic_ids import SemanticIds
from genrec.sft_trainer import EpochTrainer
from genrec.supervised_head import LossOver, use_supervised_head
from genrec.tasks.instruction_rows import InstructionRows
from genrec.tasks.mixing import plan
from genrec.tasks.rendering import ItemTexts
from genrec.training_data import EpochRows, estimated_lengths, sample_texts

OURS: tuple[LossOver, ...] = ("vocabulary", "level", "trie")
TRL = ("trl", "trl-compiled", "trl-packed")


class Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


class Setting:
    """Rows and token ids of a run."""

    def __init__(self, run_dir: Path, vocab_size: int) -> None:
        data, dataset = stage_folder(run_dir, "prepare"), stage_folder(run_dir, "build_dataset")
        self.semantic_ids = SemanticIds.load(stage_folder(run_dir, "quantize"))
        texts = ItemTexts.of(pl.read_parquet(data / "catalog.parquet"), self.semantic_ids)
        rows = InstructionRows.read(
            dataset / "train.parquet", self.semantic_ids.item_ids, texts,
            PromptRenderer(dataset / "prompts"), 0, 1,
        )  # fmt: skip
        words = [*texts.titles.to_list(), *sample_texts(dataset / "train.parquet")]
        self.tokenizer = modeling.train_tokenizer(words, vocab_size)
        self.token_ids = modeling.add_sid_tokens(self.tokenizer, self.semantic_ids)
        self.sids = {token for level in self.token_ids for token in level}
        self.trie = SidTrie.build(self.semantic_ids.codes)
        lengths = estimated_lengths(dataset / "train.parquet")
        self.make_rows = lambda: EpochRows(
            rows, plan(rows.table[TASK], 1, {}, {}, 0), lengths, self.tokenizer, self.sids
        )
        epoch = self.make_rows()
        self.encoded = epoch.__getitems__(range(len(epoch)))
        self.longest = max(len(row["input_ids"]) for row in self.encoded)
        last = set(self.token_ids[-1])
        labels = [sum(token in last for token in row["labels"]) for row in self.encoded]
        self.items_per_row = float(np.mean(labels))
        self.tokens_per_row = float(np.mean([len(row["input_ids"]) for row in self.encoded]))


def settings(args: argparse.Namespace, folder: str, **more: Any) -> SFTConfig:
    """TRL's settings, the same for all but for `more`."""
    values: dict[str, Any] = {
        "output_dir": folder, "max_steps": args.steps, "learning_rate": 1e-3,
        "per_device_train_batch_size": args.batch_size, "use_cpu": args.device == "cpu",
        "bf16": args.bf16, "gradient_checkpointing": False, "report_to": "none",
        "save_strategy": "no", "logging_steps": 10, "disable_tqdm": True, "seed": 0,
        "train_sampling_strategy": "group_by_length", "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True}, 
    }  # fmt: skip
    return SFTConfig(**{**values, **more})


def trainer_of(args: argparse.Namespace, setting: Setting, name: str, folder: str) -> SFTTrainer:
    """A trainer around a new model."""
    context = -(-(setting.longest + 64) // 64) * 64
    model = modeling.from_scratch(args.size, len(setting.tokenizer), context, seed=0)
    modeling.resize_embeddings(model, setting.tokenizer)
    common: dict[str, Any] = {"model": model, "processing_class": setting.tokenizer}
    if name.startswith("ours"):
        trainer: SFTTrainer = EpochTrainer(
            setting.make_rows(), None, args=settings(args, folder), **common
        )
        over = next(loss for loss in OURS if name == f"ours-{loss}")
        use_supervised_head(model, setting.token_ids, over, setting.trie)
        return trainer
    rows = Dataset.from_list(setting.encoded)
    more: dict[str, Any] = {}
    if name == "trl-compiled":
        more = {"torch_compile": True, "pad_to_multiple_of": setting.longest}
    if name == "trl-packed":
        # TRL packs whole datasets only, to rows that are all full: similar lengths are moot.
        more = {
            "packing": True, "max_length": setting.longest, "dataset_kwargs": None,
            "train_sampling_strategy": "random",
        }  # fmt: skip
    return SFTTrainer(train_dataset=rows, args=settings(args, folder, **more), **common)


Round = tuple[float, float, list[float]]


def run(args: argparse.Namespace, setting: Setting, name: str) -> Round:
    """One round: items per second, tokens per second, and seconds of each step."""
    clock = Clock()
    seen = {"items": 0, "tokens": 0}
    last = torch.tensor(sorted(setting.token_ids[-1]))
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(args, setting, name, folder)
        trainer.add_callback(clock)
        collate: Callable[[Any], Any] = trainer.data_collator
        warm = args.warm_steps

        def count(rows: Any) -> Any:
            batch = collate(rows)
            if len(clock.ends) >= warm:
                seen["items"] += int(torch.isin(batch["labels"], last).sum())
                mask = batch.get("attention_mask")
                seen["tokens"] += int(mask.sum()) if mask is not None else batch["labels"].numel()
            return batch

        trainer.data_collator = count
        trainer.train()
    steps = np.diff(clock.ends[warm - 1 :])
    # The loader is a batch ahead of the step that is timed; over many steps that evens out.
    seconds = float(steps.sum())
    return seen["items"] / seconds, seen["tokens"] / seconds, steps.tolist()


def peak_flops(device: str, bf16: bool) -> float:
    """Floating point operations per second of a large matrix product."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(4):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 4 * 2 * 1024**3 / best


def quick_run(folder: Path) -> Path:
    """A synthetic shop, ready to be trained on."""
    run_dir = folder / "run"
    for stage, flags in {
        "prepare": "--format synthetic --n_users 2000 --n_items 600",
        "embed": "--dim 32",
        "quantize": "--n_levels 3 --codebook_size 64",
        "build_dataset": "--tasks sequential --sequential_mode whole_history --n_templates 1",
    }.items():
        command = [sys.executable, "-c", "from genrec.cli import main; main()", stage]
        subprocess.run(
            [*command, "--run_dir", str(run_dir), *flags.split()], check=True, capture_output=True
        )
    return run_dir


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run_dir", type=Path, help="a run with build_dataset done")
    parser.add_argument("--size", choices=list(modeling.SIZES), default="tiny")
    parser.add_argument("--vocab_size", type=int, default=2000, help="text tokens")
    parser.add_argument("--batch_size", type=int, default=24)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm_steps", type=int, default=10, help="steps before the clock starts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", nargs="*", help="of the names above")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure, print a table and one JSON object."""
    args = arguments()
    logging.disable(logging.INFO)
    names = [*TRL, *(f"ours-{loss}" for loss in OURS)]
    if args.quick:
        args.run_dir = quick_run(Path(tempfile.mkdtemp()))
        args.steps, args.warm_steps, args.rounds = 16, 4, 1
        names.remove("trl-compiled")  # compiling alone takes longer
    elif args.run_dir is None:
        raise SystemExit("--run_dir is needed: a run with build_dataset done (or --quick)")
    names = [name for name in names if not args.only or name in args.only]
    setting = Setting(args.run_dir, args.vocab_size)
    peak = peak_flops(args.device, args.bf16)
    found: dict[str, list[Round]] = {name: [] for name in names}
    for turn in range(args.rounds + 1):
        for name in names:
            if turn == 0 and name != "trl-compiled":
                continue  # the round in which it compiles
            result = run(args, setting, name)
            if turn:
                found[name].append(result)
            print(f"round {turn} {name}: {result[0]:,.0f} items/s", flush=True)
    weights = sum(p.numel() for p in modeling.from_scratch(args.size, 64, 64, 0).parameters())
    weights -= 64 * modeling.SIZES[args.size][0]  # without the embedding
    head = (len(setting.tokenizer)) * modeling.SIZES[args.size][0]
    table = {}
    for name, rounds in found.items():
        tokens = statistics.median(r[1] for r in rounds)
        table[name] = {
            "items_per_s": round(statistics.median(r[0] for r in rounds), 1),
            "ms_per_step": round(1e3 * statistics.median(s for r in rounds for s in r[2]), 2),
            "mfu": round(6 * (weights + head) * tokens / peak, 4),
        }
        print(f"{name:16} {table[name]}")
    speed = {name: row["items_per_s"] for name, row in table.items()}
    tuned = max((speed[name] for name in names if name in TRL), default=None)
    ours = {loss: speed.get(f"ours-{loss}") for loss in OURS}

    def ratio(value: float | None) -> float | None:
        return round(value / tuned, 3) if value and tuned else None

    print(
        json.dumps(
            {
                "items_per_s_ours": ours["vocabulary"],
                "items_per_s_trl_tuned": tuned,
                "ratio": ratio(ours["vocabulary"]),
                "ratio_level": ratio(ours["level"]),
                "ratio_trie": ratio(ours["trie"]),
                "mfu": {name: row["mfu"] for name, row in table.items()},
                "table": table,
                "size": args.size,
                "vocabulary": len(setting.tokenizer),
                "tokens_per_row": round(setting.tokens_per_row, 1),
                "items_per_row": round(setting.items_per_row, 1),
                "batch_size": args.batch_size,
                "gflops_peak": round(peak / 1e9, 1),
                "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            }
        )
    )


if __name__ == "__main__":
    main()
