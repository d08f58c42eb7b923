"""Benchmark: constrained beam search, genrec's engines against what else there is.

    python recipes/benchmarks/decoding.py --quick                         # one catalogue, one width
    python recipes/benchmarks/decoding.py                                 # 12k, 100k, 1M items
    python recipes/benchmarks/decoding.py --vllm true --catalogues 12000  # where vLLM is installed
    python recipes/benchmarks/decoding.py --device cuda --shape 0.5b --dtype bfloat16 --prompt 300

One process, a model with random weights (speed and exactness don't depend on training), random
prompts. Engines and tables are built beforehand; all get the same prompts in turns, `--rounds`
times; a figure is the median.

- `torch`: genrec's engine, scores over the full vocabulary; `torch-level`: over the level's codes.
- `floor`: the forward passes that `torch` makes, and nothing else: no trie, no scores, no search.
- `hf-prefix`: transformers' beam search with `prefix_allowed_tokens_fn`; `hf-dict`: the same with a
  logits processor that looks prefixes up in a Python dict, the usual way in published code.
- `vllm-step`, `vllm-inworker`: genrec's engines on vLLM; `vllm-beam`: vLLM's own beam search, which
  can't be constrained: the share of catalogue items among its results is in `valid`.

Beside the timings: `valid` is the share of results that are catalogue items (of genrec's engines
also: that the user doesn't have), over `--valid_users` lists as well; of those, a sample is scored
again by plain forward passes (`rescored_max_abs_diff`). `step_cost` is a whole
search without its model (children, filters, selection) from 10k to 10M items, and the trie's build
time and size; `step_cost_item_tokens` the same where 256 clusters of very unequal size are followed
by a token for each item, with the most children that a cluster has and those that a user's beams
have together. Raw lists go to `--out_dir`, so that validity can be counted again. vLLM engines stay
alive to the end, since they share a process: one catalogue at a time. Top-level ratios are medians
over the catalogues at width 20 (or the widths given), `users_per_s` those of the first. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from genrec import modeling
from genrec.artifacts import write_json, write_parquet
from genrec.decoding.beam import Beams, Normalizer, length_batches, step
from genrec.decoding.forward import Forward
from genrec.decoding.lm_head import SidHead
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.decoding.trie_tensors import TrieTensors, look_up

K = 10
LEVELS, CODES = 4, 256
TEXT_TOKENS = 2000  # of the small shapes; the large ones have their own vocabulary
HISTORY = 20  # seen items per user
CACHE_BYTES = 1 << 30  # of each vLLM engine's keys and values
# hidden, layers, heads, key-value heads, head size, feed-forward, vocabulary: Qwen2.5's sizes.
LARGE = {
    "0.5b": (896, 24, 14, 2, 64, 4864, 151_936),
    "1.5b": (1536, 28, 12, 2, 128, 8960, 151_936),
}
Lists = np.ndarray  # (users, K, LEVELS) codes; −1 where a result is no SID, or no item at all


@dataclass
class Setting:
    """What all engines are measured on."""

    codes: np.ndarray  # (items, LEVELS)
    trie: SidTrie
    model: Any
    sid_ids: list[list[int]]
    prompts: list[list[int]]
    seen: list[np.ndarray]
    width: int
    batch: int

    @property
    def n_users(self) -> int:
        """Number of prompts."""
        return len(self.prompts)

    def part(self, n: int) -> Setting:
        """The first n users."""
        return Setting(
            self.codes, self.trie, self.model, self.sid_ids, self.prompts[:n], self.seen[:n],
            self.width, self.batch,
        )  # fmt: skip


def random_codes(n_items: int, seed: int = 0) -> np.ndarray:
    """Distinct SIDs, (n_items, LEVELS), crowded towards small codes as real ones are."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((0, LEVELS), dtype=np.int32)
    while len(rows) < n_items:
        more = (CODES * rng.beta(0.8, 1.6, (2 * n_items, LEVELS))).astype(np.int32)
        rows = np.unique(np.concatenate([rows, more]), axis=0)
    return rows[rng.permutation(len(rows))[:n_items]]


def item_token_codes(n_items: int, seed: int = 0) -> np.ndarray:
    """256 clusters of log-normal sizes, then a token that only this item has, (n_items, 2)."""
    rng = np.random.default_rng(seed)
    share = rng.lognormal(0.0, 1.0, CODES)
    clusters = rng.choice(CODES, n_items, p=share / share.sum())
    return np.stack([clusters, rng.permutation(n_items)], axis=1).astype(np.int32)


class SharedColumns:
    """Log-probabilities of a level whose codes are too many for a table: they share its columns.

    Args:
        table: (U, B, a power of two).
        n_codes: of the level.
    """

    def __init__(self, table: torch.Tensor, n_codes: int) -> None:
        self.table = table.flatten()
        self.size = table.shape[-1]
        self.shape = torch.Size([*table.shape[:-1], n_codes])

    def pick(self, rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """As `genrec.decoding.beam.Columns` says."""
        return look_up(self.table, rows.unsqueeze(1) * self.size + (codes & (self.size - 1)))


def build_model(args: argparse.Namespace) -> tuple[Any, list[list[int]]]:
    """A decoder with random weights and the ids of its SID tokens."""
    n_text = LARGE[args.shape][-1] if args.shape in LARGE else TEXT_TOKENS
    vocab = -(-(n_text + LEVELS * CODES) // 64) * 64
    if args.shape in LARGE:
        hidden, layers, heads, kv_heads, head_dim, feed_forward, _ = LARGE[args.shape]
        torch.manual_seed(0)
        model: Any = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
                intermediate_size=feed_forward, tie_word_embeddings=True,
                max_position_embeddings=4096,
            )
        )  # fmt: skip
    else:
        model = modeling.from_scratch(args.shape, vocab, 1024, 0)
    model = model.to(args.device, getattr(torch, args.dtype)).eval()
    ids = n_text + np.arange(LEVELS * CODES).reshape(LEVELS, CODES)
    return model, ids.tolist()


class TorchEngines:
    """genrec's engine for each normaliser, and the model's head: built once per catalogue."""

    def __init__(self, setting: Setting) -> None:
        self.by_normalizer = {
            normalizer: TorchEngine(
                setting.model, setting.trie, setting.sid_ids, 0, normalizer, setting.batch
            )
            for normalizer in ("full", "level")
        }
        ids = [torch.tensor(ids).to(setting.model.device) for ids in setting.sid_ids]
        self.head = SidHead(setting.model, ids, "full")

    def run(self, setting: Setting, normalizer: Normalizer = "full") -> np.ndarray:
        """Lists of genrec's engine, (users, K) catalogue rows."""
        engine = self.by_normalizer[normalizer]
        return engine.search(setting.prompts, K, setting.width, setting.seen).items

    def floor(self, setting: Setting) -> None:
        """The forward passes of `run` over the full vocabulary, with any tokens for beams."""
        device, head = setting.model.device, self.head
        own = torch.eye(setting.width, dtype=torch.bool, device=device)
        with torch.inference_mode():
            for rows in length_batches(setting.prompts, LEVELS, None, setting.batch):
                batch = [setting.prompts[row] for row in rows]
                forward = Forward(head, batch, 0, setting.width * (LEVELS - 1))
                head.columns(0, forward.states)
                for level in range(1, LEVELS):
                    ids = head.sid_ids[level - 1][:1].expand(len(rows), setting.width)
                    forward.append(ids, own.expand(len(rows), -1, -1).repeat(1, 1, level))
                    head.columns(level, forward.states)
        if device.type == "cuda":
            torch.cuda.synchronize()


def lists_of(setting: Setting, found: np.ndarray) -> Lists:
    """Codes of what an engine found: tokens, or items, of which those that the user has are −1."""
    if found.ndim == 3:
        return codes_of(found, setting.sid_ids)
    bad = found < 0
    for row, gone in enumerate(setting.seen[: len(found)]):
        bad[row] |= np.isin(found[row], gone)
    return np.where(bad[..., None], -1, setting.codes[found])


class PrefixTable:
    """Token prefix -> allowed next tokens, as a Python dict."""

    def __init__(self, setting: Setting) -> None:
        columns = [np.array(ids)[setting.codes[:, i]] for i, ids in enumerate(setting.sid_ids)]
        sets: dict[tuple[int, ...], set[int]] = {}
        for tokens in zip(*(column.tolist() for column in columns), strict=True):
            for level in range(LEVELS):
                sets.setdefault(tokens[:level], set()).add(tokens[level])
        self.after = {prefix: sorted(allowed) for prefix, allowed in sets.items()}


class DictProcessor(LogitsProcessor):
    """Masks each beam by a dict look-up, as published constrained decoders do."""

    def __init__(self, table: PrefixTable, prompt_length: int) -> None:
        self.table, self.prompt_length = table, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Log-probabilities with −inf on what may not follow."""
        scores = scores.log_softmax(-1)
        mask = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            mask[row, self.table.after[tuple(ids)]] = 0
        return scores + mask


def run_hf(setting: Setting, table: PrefixTable, how: str) -> np.ndarray:
    """Beam search of transformers, left-padded, in batches; seen items are not filtered.

    Returns:
        (users, K, LEVELS) tokens.
    """
    found = []
    device = setting.model.device
    for start in range(0, setting.n_users, setting.batch):
        part = setting.prompts[start : start + setting.batch]
        longest = max(map(len, part))
        ids = torch.zeros(len(part), longest, dtype=torch.int64)
        for row, prompt in enumerate(part):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        real = torch.arange(longest) >= longest - torch.tensor([len(p) for p in part])[:, None]
        options: dict[str, Any] = {}
        if how == "prefix":
            options["prefix_allowed_tokens_fn"] = lambda _, sent, cut=longest: table.after[
                tuple(sent[cut:].tolist())
            ]
        else:
            options["logits_processor"] = LogitsProcessorList([DictProcessor(table, longest)])
        with torch.inference_mode():
            out = setting.model.generate(
                ids.to(device), attention_mask=real.long().to(device), num_beams=setting.width,
                num_return_sequences=K, max_new_tokens=LEVELS, min_new_tokens=LEVELS,
                do_sample=False, length_penalty=0.0, early_stopping=True, pad_token_id=0,
                eos_token_id=None, **options,
            )  # fmt: skip
        found.append(out[:, longest:].cpu().numpy().reshape(len(part), K, LEVELS))
    return np.concatenate(found)


def codes_of(tokens: np.ndarray, sid_ids: list[list[int]]) -> Lists:
    """Codes of token tuples, −1 where a token is no code of its level."""
    flat = np.full(max(map(max, sid_ids)) + 1, -1)
    out = np.empty_like(tokens)
    for level, ids in enumerate(sid_ids):
        flat[:] = -1
        flat[ids] = np.arange(len(ids))
        inside = (tokens[..., level] >= 0) & (tokens[..., level] < len(flat))
        out[..., level] = np.where(inside, flat[np.where(inside, tokens[..., level], 0)], -1)
    return out


def shares(lists: Lists, trie_keys: np.ndarray) -> tuple[float, float]:
    """Share of results that are catalogue items, and of lists without a repeated one."""
    keys = sid_keys(lists)
    valid = np.isin(keys, trie_keys) & (lists >= 0).all(-1)
    distinct = [len(np.unique(row)) == len(row) for row in keys]
    return float(valid.mean()), float(np.mean(distinct))


def sid_keys(codes: np.ndarray) -> np.ndarray:
    """One integer per SID."""
    return np.ravel_multi_index(tuple(np.moveaxis(codes + 1, -1, 0)), (CODES + 1,) * LEVELS)


class VllmEngines:
    """genrec's vLLM engines and vLLM's own beam search on one saved model, in turns."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        from genrec.decoding.vllm_engine import VllmEngine
        from genrec.decoding.vllm_inworker import InWorkerEngine

        setting.model.save_pretrained(folder)
        options: dict[str, Any] = {"batch_size": setting.batch, "dtype": "float32"}
        options |= {"max_model_len": 256, "kv_cache_memory_bytes": CACHE_BYTES}
        self.step = VllmEngine(folder, setting.trie, setting.sid_ids, **options)
        self.inworker = InWorkerEngine(folder, setting.trie, setting.sid_ids, **options)
        import vllm

        # Its own beam search asks for a tokenizer, and reads only the end token from it.
        words = {str(token): token for token in range(setting.model.config.vocab_size)}
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), eos_token="1"
        ).save_pretrained(folder)
        self.own = vllm.LLM(
            str(folder), dtype="float32", max_model_len=256, block_size=32, max_logprobs=128,
            generation_config="vllm", enable_prefix_caching=True, kv_cache_memory_bytes=CACHE_BYTES,
        )  # fmt: skip

    def run(self, setting: Setting, engine: Any) -> np.ndarray:
        """One of genrec's two, on a cold prefix cache: (users, K) catalogue rows."""
        engine.llm.reset_prefix_cache()
        found = engine.search(setting.prompts, K, setting.width, setting.seen)
        return cast(np.ndarray, found.items)

    def run_own(self, setting: Setting) -> np.ndarray:
        """Beam search of vLLM itself, unconstrained, for it takes no constraint: tokens."""
        from vllm.sampling_params import BeamSearchParams

        params = BeamSearchParams(
            beam_width=setting.width, max_tokens=LEVELS, ignore_eos=True, length_penalty=0.0
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in setting.prompts]
        self.own.reset_prefix_cache()
        outputs = self.own.beam_search(prompts, params)
        return np.array([[s.tokens[-LEVELS:] for s in out.sequences[:K]] for out in outputs])


def engines_of(
    args: argparse.Namespace, ours: TorchEngines, table: PrefixTable, served: VllmEngines | None
) -> dict[str, tuple[Callable[[Setting], Any], int]]:
    """Name -> how to run it, and users per round."""
    engines: dict[str, tuple[Callable[[Setting], Any], int]] = {
        "torch": (ours.run, args.users),
        "torch-level": (lambda s: ours.run(s, "level"), args.users),
        "floor": (ours.floor, args.users),
        "hf-prefix": (lambda s: run_hf(s, table, "prefix"), args.slow_users),
        "hf-dict": (lambda s: run_hf(s, table, "dict"), args.slow_users),
    }
    if served is not None:
        engines |= {
            "vllm-step": (lambda s: served.run(s, served.step), args.users),
            "vllm-inworker": (lambda s: served.run(s, served.inworker), args.users),
            "vllm-beam": (served.run_own, args.users),
        }
    return engines


def measure(
    setting: Setting, engines: dict[str, tuple[Callable[[Setting], Any], int]], rounds: int
) -> tuple[dict[str, float], dict[str, Lists]]:
    """Median users/s of each engine, and the lists of its last round.

    Args:
        setting: what is measured.
        engines: name -> (run, users per round); slow ones get fewer.
        rounds: all engines once per round, in an order drawn anew: caches are not left warm for one
            and cold for another.
    """
    times: dict[str, list[float]] = {name: [] for name in engines}
    lists = {}
    rng = np.random.default_rng(3)
    for run, _ in engines.values():
        run(setting.part(2))
    for _ in range(rounds):
        for name in rng.permutation(list(engines)).tolist():
            run, users = engines[name]
            part = setting.part(users)
            started = time.perf_counter()
            made = run(part)
            times[name].append(part.n_users / (time.perf_counter() - started))
            if made is not None:
                lists[name] = lists_of(part, made)
    return {name: statistics.median(values) for name, values in times.items()}, lists


def step_cost(codes: np.ndarray, users: int, width: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a whole search without its model, and what the trie costs.

    Args:
        codes: of the items, (n_items, n_levels).
        users: searched together.
        width: of the beam.
        rounds: a figure is the median of so many.
    """
    n_items, n_levels = len(codes), codes.shape[1]
    started = time.perf_counter()
    trie = SidTrie.build(codes)
    build = time.perf_counter() - started
    rng = np.random.default_rng(1)
    started = time.perf_counter()
    view = trie.view(rng.random(n_items) < 0.5)
    filtered = TrieTensors(trie, view, torch.device("cpu"))
    view_ms = 1e3 * (time.perf_counter() - started)
    free = TrieTensors(trie, None, torch.device("cpu"))
    columns: list[torch.Tensor | SharedColumns] = []
    for level in range(n_levels):
        n_codes = int(codes[:, level].max()) + 1
        table = torch.randn(users, width if level else 1, CODES if n_codes <= CODES else 4096)
        table = table.log_softmax(-1)
        columns.append(table if n_codes <= CODES else SharedColumns(table, n_codes))
    seen = [rng.integers(0, n_items, HISTORY) for _ in range(users)]
    times: dict[str, list[float]] = {"plain": [], "view and seen": []}
    children = 0
    for _ in range(rounds):
        for name, tensors, gone in (("plain", free, None), ("view and seen", filtered, seen)):
            started = time.perf_counter()
            filters = tensors.exclusions(gone)
            beams, followed = Beams.start(users, torch.device("cpu")), []
            for level in range(n_levels):
                followed.append(beams.nodes.numpy())
                of_users = None if filters is None else filters[level]
                beams = step(tensors, level, beams, columns[level], "full", of_users, width)
            times[name].append(1e3 * (time.perf_counter() - started))
            if name == "plain":
                counts = [
                    np.diff(start)[at] for start, at in zip(trie.children, followed, strict=True)
                ]
                children = sum(int(count.sum()) for count in counts)
    found = {f"{name}, ms": round(statistics.median(t), 2) for name, t in times.items()}
    return found | {
        "build_s": round(build, 3), "view_ms": round(view_ms, 2),
        "bytes_per_item": round(trie.nbytes / n_items, 1),
        "widest": max(free.widest), "children_per_user": round(children / users),
    }  # fmt: skip


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=[*modeling.SIZES, *LARGE], default="tiny")
    parser.add_argument("--catalogues", type=int, nargs="+", default=[12_000, 100_000, 1_000_000])
    parser.add_argument("--widths", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--prompt", type=int, default=117, help="tokens of the longest prompt")
    parser.add_argument("--users", type=int, default=96, help="users a round, fast engines")
    parser.add_argument("--slow_users", type=int, default=32, help="users a round, the others")
    parser.add_argument("--batch", type=int, default=32, help="of every engine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--valid_users", type=int, default=10_000)
    parser.add_argument("--step_items", type=int, nargs="*", default=[10**n for n in (4, 5, 6, 7)])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--peak_tflops", type=float, help="of the device: adds flop_fraction")
    parser.add_argument("--vllm", choices=("true", "false"), default="false")
    parser.add_argument("--out_dir", type=Path, help="default: runs/decoding, unless --quick")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.catalogues, args.widths, args.step_items = [12_000], [20], [10_000, 100_000]
        args.users, args.slow_users, args.valid_users = 32, 8, 256
    elif args.out_dir is None:
        args.out_dir = Path("runs/decoding")
    if args.vllm == "true" and len(args.catalogues) > 1:
        parser.error("--vllm true takes one of --catalogues: its engines share a process")
    return args


def flops_per_user(model: Any, prompt: float, width: int) -> float:
    """Multiply-adds times two of the tokens that any search must run: prompt and live beams."""
    weights = sum(p.numel() for p in model.parameters()) - model.lm_head.weight.numel()
    head = model.lm_head.weight.numel()
    tokens, scored = prompt + (LEVELS - 1) * width, 1 + (LEVELS - 1) * width
    return 2.0 * (weights * tokens + head * scored)


def main() -> None:
    """Measure, write, print."""
    args = arguments()
    model, sid_ids = build_model(args)
    rng = np.random.default_rng(2)
    n_text = min(map(min, sid_ids))
    lengths = rng.integers(args.prompt // 2, args.prompt + 1, max(args.users, args.valid_users))
    prompts = [rng.integers(2, n_text, n).tolist() for n in lengths]
    rows: list[dict[str, Any]] = []
    raw: list[pl.DataFrame] = []
    scratch = Path(tempfile.mkdtemp())
    valid: dict[str, float] = {}
    distinct: dict[str, float] = {}
    for n_items in args.catalogues:
        codes = random_codes(n_items)
        trie, keys = SidTrie.build(codes), sid_keys(codes)
        seen = [rng.integers(0, n_items, HISTORY) for _ in prompts]
        setting = Setting(codes, trie, model, sid_ids, prompts[: args.users], seen, 0, args.batch)
        ours, table = TorchEngines(setting), PrefixTable(setting)
        served = VllmEngines(setting, scratch / str(n_items)) if args.vllm == "true" else None
        for width in args.widths:
            setting.width = width
            engines = engines_of(args, ours, table, served)
            speed, lists = measure(setting, engines, args.rounds)
            row: dict[str, Any] = {"items": n_items, "width": width}
            row["users_per_s"] = {name: round(value, 2) for name, value in speed.items()}
            row["floor_fraction"] = round(speed["torch"] / speed["floor"], 3)
            row["torch_vs_hf_prefix"] = round(speed["torch"] / speed["hf-prefix"], 2)
            row["torch_vs_dict"] = round(speed["torch"] / speed["hf-dict"], 2)
            if served is not None:
                best = speed["vllm-beam"]
                row["vllm_vs_vllm_beam"] = {
                    name: round(speed[name] / best, 2) for name in ("vllm-step", "vllm-inworker")
                }
            if args.peak_tflops:
                flops = flops_per_user(model, float(lengths[: args.users].mean()), width)
                row["flop_fraction"] = round(speed["torch"] * flops / args.peak_tflops / 1e12, 4)
            for name, made in lists.items():
                label = f"{name}, {n_items}, {width}"
                valid[label], distinct[label] = shares(made, keys)
                raw.append(raw_table(made, name, n_items, width))
            rows.append(row)
            print(json.dumps(row), flush=True)
    setting.width, setting.prompts = 20, prompts[: args.valid_users]
    many = lists_of(setting, ours.run(setting))
    rescored = rescore(setting, ours.by_normalizer["full"], many[:50])
    valid["torch, many users"], distinct["torch, many users"] = shares(many, keys)
    raw.append(raw_table(many, "torch, many users", args.catalogues[-1], 20))
    steps = {n: step_cost(random_codes(n), 32, 20, args.rounds) for n in args.step_items}
    skewed = {n: step_cost(item_token_codes(n), 32, 20, args.rounds) for n in args.step_items}
    shutil.rmtree(scratch)
    report = summary(args, rows, valid, distinct, steps, len(many))
    report["step_cost_item_tokens"] = skewed
    report["rescored_max_abs_diff"] = rescored
    if args.out_dir is not None:
        write_parquet(args.out_dir / "lists.parquet", pl.concat(raw))
        write_json(args.out_dir / "decoding.json", report)
    print(json.dumps(report))


def rescore(setting: Setting, engine: TorchEngine, lists: Lists) -> float:
    """Largest difference between the engine's scores and plain forward passes over whole SIDs."""
    prompts, seen = setting.prompts[: len(lists)], setting.seen[: len(lists)]
    scores = engine.search(prompts, K, setting.width, seen).scores
    tokens = np.stack([np.array(ids)[lists[..., i]] for i, ids in enumerate(setting.sid_ids)], -1)
    worst = 0.0
    for prompt, own, score in zip(prompts, tokens.tolist(), scores, strict=True):
        ids = torch.tensor([prompt + sid for sid in own], device=setting.model.device)
        with torch.inference_mode():
            logits = setting.model(ids).logits[:, len(prompt) - 1 : -1].float().log_softmax(-1)
        plain = logits.gather(-1, ids[:, len(prompt) :, None]).sum((1, 2)).cpu().numpy()
        worst = max(worst, float(np.abs(plain - score).max()))
    return worst


def raw_table(lists: Lists, engine: str, n_items: int, width: int) -> pl.DataFrame:
    """Lists as a table: engine, catalogue, width, user, rank and codes."""
    users, k = lists.shape[:2]
    return pl.DataFrame(
        {
            "user": np.repeat(np.arange(users), k),
            "rank": np.tile(np.arange(1, k + 1), users),
            "codes": lists.reshape(-1, LEVELS).astype(np.int32),
        }
    ).with_columns(engine=pl.lit(engine), items=n_items, width=width)


def summary(
    args: argparse.Namespace,
    rows: list[dict[str, Any]],
    valid: dict[str, float],
    distinct: dict[str, float],
    steps: dict[int, dict[str, float]],
    n_checked: int,
) -> dict[str, Any]:
    """The report; see the module."""
    usual = [row for row in rows if row["width"] == 20] or rows
    ours = [name for name in valid if not name.startswith("vllm-beam")]

    def median(name: str) -> float:
        return statistics.median(row[name] for row in usual)

    report = {
        "users_per_s": usual[0]["users_per_s"],
        "torch_vs_hf_prefix": median("torch_vs_hf_prefix"),
        "torch_vs_dict": median("torch_vs_dict"),
        "vllm_vs_vllm_beam": usual[0].get("vllm_vs_vllm_beam"),
        "floor_fraction": median("floor_fraction"),
        "valid": min(valid[name] for name in ours),
        "distinct": min(distinct[name] for name in ours),
        "valid_by_engine": valid,
        "users_checked": n_checked,
        "settings": rows,
        "step_cost": steps,
        "shape": args.shape,
        "device": args.device,
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    return report


if __name__ == "__main__":
    main()
