"""Benchmark: optimizer steps of reinforcement learning, genrec's rollouts against generate().

    python recipes/benchmarks/rl.py --quick            # made up, under a minute
    python recipes/benchmarks/rl.py --size small --n_items 13000 --num_generations 16
    python recipes/benchmarks/rl.py --run_dir runs/beauty   # prompts, catalogue and model of a run

One process, the same model, prompts, batch and reward in turns; a figure is the median over rounds
of optimizer steps per second, generation included. The first step of each trainer is not counted.

- `ours`: BeamGRPOTrainer, each prompt prefilled once and searched over the trie, log-probabilities
  over the trie.
- `hf`: TRL's GRPOTrainer as peers use it: generate() from `num_generations` copies of each prompt,
  with a `prefix_allowed_tokens_fn` that looks prefixes up in a dict, sampling at temperature 1, and
  log-probabilities over the whole vocabulary. Its completions are checked to be items.
- `hf-beam`: the same with beam search in generate(), what ReRe's rollouts are. Timed with `--beam`:
  it is slower still.

`ratio` is ours over hf. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from genrec import modeling
from genrec.artifacts import stage_folder
from genrec.columns import ITEM_ID, PROMPT, TARGET
from genrec.decoding.trie import SidTrie
from genrec.rewards import CompletedItems, prefix_reward, rule_reward
from genrec.rollouts import BeamGRPOTrainer
from genrec.semantic_ids import SemanticIds

_WORDS = ("red wool hat", "blue wool scarf", "steel tea pot", "oak tea tray", "cork yoga mat")
_ROWS = 256  # prompts that are trained on


class Setting:
    """Catalogue, tokenizer, prompts and targets; made up, or a run's."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        rng = np.random.default_rng(0)
        if args.run_dir:
            rows = pl.read_parquet(stage_folder(args.run_dir, "build_dataset") / "rl.parquet")
            rows = rows.head(_ROWS)
            self.semantic_ids = SemanticIds.load(stage_folder(args.run_dir, "quantize"))
            self.tokenizer = modeling.load_model(
                stage_folder(args.run_dir, "sft") / "model", self.semantic_ids, "float32"
            )[1]
            self.prompts, targets = rows[PROMPT].to_list(), rows[TARGET].to_numpy()
        else:
            codes = np.unique(rng.integers(0, 64, (args.n_items, 3)), axis=0).astype(np.int32)
            ids = pl.Series(ITEM_ID, np.arange(len(codes)))
            self.semantic_ids = SemanticIds(ids, codes, (64,) * 3)
            self.tokenizer = modeling.train_tokenizer([*_WORDS, "Bought so far: "], 400)
            modeling.add_sid_tokens(self.tokenizer, self.semantic_ids)
            sids = self.semantic_ids.sids()
            histories = rng.integers(0, len(codes), (_ROWS, args.history))
            self.prompts = [
                "Bought so far: " + "".join(sids.gather(pl.Series(h)).to_list()) for h in histories
            ]
            targets = rng.integers(0, len(codes), _ROWS)
        self.token_ids = modeling.sid_token_ids(self.tokenizer, self.semantic_ids)
        self.trie = SidTrie.build(self.semantic_ids.codes)
        codes = self.semantic_ids.codes[targets]
        levels = [np.asarray(ids)[codes[:, level]] for level, ids in enumerate(self.token_ids)]
        self.rows = Dataset.from_dict(
            {"prompt": self.prompts, "target_sid_ids": np.stack(levels, 1).tolist()}
        )
        encoded = modeling.encode_prompts(self.tokenizer, self.prompts)
        self.longest = max(map(len, encoded))
        self.children = allowed_tokens(self.semantic_ids.codes, self.token_ids, self.tokenizer)

    def model(self) -> PreTrainedModel:
        """The same model each time."""
        if self.args.run_dir:
            folder = stage_folder(self.args.run_dir, "sft") / "model"
            return modeling.load_model(folder, self.semantic_ids, "float32")[0]
        context = -(-(self.longest + 16) // 64) * 64
        model = modeling.from_scratch(self.args.size, len(self.tokenizer), context, seed=0)
        modeling.resize_embeddings(model, self.tokenizer)
        return model


def allowed_tokens(
    codes: np.ndarray, token_ids: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> dict[tuple[int, ...], list[int]]:
    """Prefix of SID tokens -> the tokens that may follow, EOS behind a whole SID."""
    found: dict[tuple[int, ...], set[int]] = {}
    assert isinstance(tokenizer.eos_token_id, int)
    for row in codes.tolist():
        tokens = [token_ids[level][code] for level, code in enumerate(row)]
        for level, token in enumerate([*tokens, tokenizer.eos_token_id]):
            found.setdefault(tuple(tokens[:level]), set()).add(token)
    return {prefix: sorted(tokens) for prefix, tokens in found.items()}


class GeneratingTrainer(GRPOTrainer):
    """TRL's trainer, its generate() constrained by a function of the prefix."""

    def __init__(self, setting: Setting, beam: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._setting, self._beam = setting, beam

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, fields: Any, num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], None]:  # fmt: skip
        tokenizer, n_levels = self._setting.tokenizer, self._setting.trie.n_levels
        prompts = prompt_ids[::num_generations] if self._beam else prompt_ids
        padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        padded = padded.to(self.accelerator.device)
        start, children = padded["input_ids"].shape[1], self._setting.children

        def allowed(_: int, ids: torch.Tensor) -> list[int]:
            return children.get(tuple(ids[start:].tolist()), [tokenizer.pad_token_id])

        how: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0}
        if self._beam:
            how = {"do_sample": False, "num_beams": num_generations}
            how["num_return_sequences"] = num_generations
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            was_training = model.training
            model.eval()
            with torch.no_grad():
                made = model.generate(
                    **padded, max_new_tokens=n_levels + 1, prefix_allowed_tokens_fn=allowed,
                    pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **how,
                )  # fmt: skip
            model.train(was_training)
        return made[:, start : start + n_levels + 1].tolist(), None


class Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def steps_per_second(args: argparse.Namespace, setting: Setting, name: str, folder: str) -> float:
    """One round: optimizer steps per second, without the first."""
    items, clock = CompletedItems(setting.trie, setting.token_ids), Clock()
    invalid: list[float] = []

    def checked(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        invalid.append(float((items(completion_ids) < 0).mean()))
        return rule_reward(completion_ids, **kwargs)

    config = GRPOConfig(
        output_dir=folder, max_steps=args.steps + 1, num_generations=args.num_generations,
        per_device_train_batch_size=args.num_generations * args.prompts_per_step,
        max_completion_length=setting.trie.n_levels + 1, learning_rate=1e-5, beta=0.0,
        loss_type="dr_grpo", use_cpu=args.device == "cpu", bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=100,
        disable_tqdm=True, seed=0,
    )  # fmt: skip
    common: dict[str, Any] = {
        "model": setting.model(), "args": config, "reward_funcs": [checked, prefix_reward],
        "train_dataset": setting.rows, "processing_class": setting.tokenizer,
    }  # fmt: skip
    trainer: GRPOTrainer
    if name == "ours":
        trainer = BeamGRPOTrainer(
            trie=setting.trie, sid_token_ids=setting.token_ids,
            beam_width=args.num_generations, **common,
        )  # fmt: skip
    else:
        trainer = GeneratingTrainer(setting, beam=name == "hf-beam", **common)
    trainer.add_callback(clock)
    trainer.train()
    assert not any(invalid), f"{name} made completions that are no item"
    return args.steps / (clock.ends[-1] - clock.ends[0])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run_dir", type=Path)
    parser.add_argument("--size", default="small")
    parser.add_argument("--n_items", type=int, default=10_000)
    parser.add_argument("--history", type=int, default=20, help="items in a made-up prompt")
    parser.add_argument("--num_generations", type=int, default=16)
    parser.add_argument("--prompts_per_step", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beam", action="store_true", help="time generate()'s beam search, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.size, args.n_items, args.history = "tiny", 500, 8
        args.num_generations, args.prompts_per_step, args.steps, args.rounds = 8, 4, 2, 1
    setting = Setting(args)
    names = ["ours", "hf", *(["hf-beam"] if args.beam else [])]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                speeds[name].append(steps_per_second(args, setting, name, folder))
            print(f"round {number + 1}: {name} {speeds[name][-1]:.3f} steps/s", flush=True)
    median = {name: statistics.median(found) for name, found in speeds.items()}
    result = {
        "benchmark": "rl", "quick": args.quick, "steps_per_s_ours": median["ours"],
        "steps_per_s_hf": median["hf"], "ratio": median["ours"] / median["hf"],
        "num_generations": args.num_generations, "prompts_per_step": args.prompts_per_step,
        "prompt_tokens": setting.longest, "items": setting.semantic_ids.n_items,
        "size": "run" if args.run_dir else args.size, "device": args.device,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    if args.beam:
        result["steps_per_s_hf_beam"] = median["hf-beam"]
        result["ratio_beam"] = median["ours"] / median["hf-beam"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
