"""What batch generation will need: memory, users/s and cost, estimated before anything is run.

Counts floating-point operations and bytes of constrained beam search as the engines do it: the
prompt is prefilled once per user, and all beams share its keys and values. Time is a roofline
(Williams et al. 2009): each phase takes the longer of its arithmetic and its memory traffic, both
at a stated share of the hardware's peak (float32's where the engine computes in it). Overheads
(tokenising, masks, kernel launches, writing) are in that share and nowhere else: an estimate, to be
replaced by a measured rate.

Longer than other modules, since the formulae refer to each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MEMORY_SHARE = 0.9  # of an accelerator's memory that is planned with
LOGITS_AT_ONCE = 1 << 26  # of the full vocabulary, for a whole batch: genrec.decoding.lm_head's
WIDE = 1024  # codes of a level from which on only children's columns are computed: the same's
MOST_DEVICES = 1_000_000
_MOST_SIZE = 1 << 31  # of anything in a config.json


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with gated feed-forward layers (Llama, Qwen, Mistral, …).

    Attributes:
        layers: number of blocks.
        hidden: width.
        heads: query heads.
        kv_heads: key and value heads (fewer under grouped-query attention).
        head_dim: width of a head.
        intermediate: width of the feed-forward layer.
        vocab: tokens.
        tied: the head shares the embedding's weights.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool

    @property
    def block_parameters(self) -> int:
        """Weights of all blocks that each token is multiplied with.

        Per block ``h·a + 2·h·c + a·h`` (queries, keys and values, output; a = heads·head_dim,
        c = kv_heads·head_dim) and ``3·h·i`` (gate, up, down). Biases and norms are left out.
        """
        own, shared = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.hidden * own + 2 * self.hidden * shared
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def parameters(self) -> int:
        """All weights: the blocks, the embedding, and a head that is not tied to it."""
        return self.block_parameters + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def kv_numbers(self) -> int:
        """Numbers that one token adds to the cache: ``2·layers·kv_heads·head_dim``."""
        return 2 * self.layers * self.kv_heads * self.head_dim


# Of the published configurations.
SHAPES = {
    "qwen3-0.6b": ModelShape(28, 1024, 16, 8, 128, 3072, 151936, True),
    "qwen3-1.7b": ModelShape(28, 2048, 16, 8, 128, 6144, 151936, True),
    "qwen3-4b": ModelShape(36, 2560, 32, 8, 128, 9728, 151936, True),
    "qwen3-8b": ModelShape(36, 4096, 32, 8, 128, 12288, 151936, False),
    "qwen2.5-0.5b": ModelShape(24, 896, 14, 2, 64, 4864, 151936, True),
    "qwen2.5-1.5b": ModelShape(28, 1536, 12, 2, 128, 8960, 151936, True),
    "llama-3.2-1b": ModelShape(16, 2048, 32, 8, 64, 8192, 128256, True),
    "llama-3.1-8b": ModelShape(32, 4096, 32, 8, 128, 14336, 128256, False),
}


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        memory: bytes.
        bandwidth: bytes per second from that memory.
        flops: peak floating-point operations per second (dense) by dtype.
        price: of an hour, in whatever currency; None: not known.
    """

    memory: float
    bandwidth: float
    flops: Mapping[str, float]
    price: float | None = None


def _device(gb: float, gb_per_s: float, half: float, single: float) -> Hardware:
    """From GB, GB/s and TFLOP/s with 16 and 32 bits."""
    flops = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}
    return Hardware(gb * 1e9, gb_per_s * 1e9, flops)


# Peaks of the vendors' data sheets, dense, without sparsity; float32 on the plain (not TF32) units.
# "cpu" is no product but an order of magnitude: a server socket of 32 cores with AVX-512.
HARDWARE = {
    "h200-141": _device(141, 4800, 989, 67),
    "h100-80": _device(80, 3350, 989, 67),
    "a100-80": _device(80, 2039, 312, 19.5),
    "l4-24": _device(24, 300, 121, 30.3),
    "cpu": _device(128, 200, 2, 2),
}


@dataclass(frozen=True)
class Workload:
    """What is asked of the model.

    Attributes:
        beam_width: B, prefixes kept per level.
        codebook_sizes: codes of each of the L levels.
        prompt_tokens: P, mean length of a prompt.
        n_items: size of the catalogue.
        n_users: lists to make.
        normalizer: "full" needs a logit for each token of the vocabulary, "level" and "trie" for
            the level's codes alone.
        dtype: of the weights and the cache.
        head_columns: "needed" counts the columns that the normaliser needs, in float32 as the torch
            engine computes them whatever the dtype; "all" the whole vocabulary in any case and in
            the dtype, for an engine that computes all of it.
    """

    beam_width: int
    codebook_sizes: Sequence[int]
    prompt_tokens: float
    n_items: int
    n_users: int
    normalizer: str = "full"
    dtype: str = "bfloat16"
    head_columns: str = "needed"

    def __post_init__(self) -> None:
        """Reject what can't be.

        Raises:
            ValueError: a number below its least or beyond any that is real, or more items than
                semantic ids.
        """
        for name, value, most in (
            ("beam_width", self.beam_width, 10**6),
            ("prompt_tokens", self.prompt_tokens, 10**7),
            ("n_items", self.n_items, 10**11),
            ("n_users", self.n_users, 10**12),
            ("codebook_sizes", min(self.codebook_sizes, default=0), 10**7),
            ("codebook_sizes", max(self.codebook_sizes, default=0), 10**7),
        ):
            if not value >= 1:
                raise ValueError(f"{name}={value} must be at least 1")
            if value > most:
                raise ValueError(f"{name}={value} must be at most {most:,}")
        if self.dtype not in BYTES:
            raise ValueError(f"dtype={self.dtype!r} is not known; choose one of {', '.join(BYTES)}")
        if self.n_items > math.prod(self.codebook_sizes):
            raise ValueError(
                f"n_items={self.n_items} exceeds the {math.prod(self.codebook_sizes)} semantic ids "
                f"of codebook_sizes={list(self.codebook_sizes)}"
            )

    @property
    def levels(self) -> int:
        """L."""
        return len(self.codebook_sizes)

    def beams(self, level: int) -> int:
        """Prefixes alive behind `level`: B, or all that there are."""
        return min(self.beam_width, self.n_items, math.prod(self.codebook_sizes[: level + 1]))

    def columns(self, level: int, vocab: int) -> int:
        """Logits per position from which `level` is chosen."""
        if self.normalizer == "full" or self.head_columns == "all":
            return vocab
        return self.picked(level)

    def picked(self, level: int) -> int:
        """Columns held per position: the level's, or of a wide one those of a prefix's children.

        "level" sums over all of them. Children are reckoned as twice their mean number, since a
        search prefers prefixes with many, and rows are made longer than they are; where they are
        very unequal it is more.
        """
        codes = self.codebook_sizes[level]
        if codes <= WIDE or self.normalizer == "level":
            return codes
        nodes = [min(self.n_items, math.prod(self.codebook_sizes[:n])) for n in (level, level + 1)]
        return min(codes, 2 * math.ceil(nodes[1] / nodes[0]))


@dataclass(frozen=True)
class Phase:
    """One forward pass for one user: the prompt, or one decoded level.

    Attributes:
        flops: floating-point operations.
        traffic: bytes read of the user's cache.
        in_float32: those of the operations that are computed in float32 whatever the dtype.
    """

    flops: float
    traffic: float
    in_float32: float = 0.0


def phases(model: ModelShape, work: Workload) -> list[Phase]:
    """The L forward passes of one user.

    Prefill: ``2·W·P`` for the weights W of the blocks, ``2·layers·a·P²`` for causal attention (a
    query sees half the prompt on average; 4 operations per key and number), and ``2·h·columns``
    for the logits of the last token. Then for each of the L-1 further levels with b beams:
    ``2·W·b``, ``4·layers·a·b·(P + decoded)``, where every beam attends over all decoded positions
    of its user (the mask decides), and ``2·h·columns·b``. Each level reads the user's cache once.
    """
    width = model.layers * model.heads * model.head_dim
    prompt, size = work.prompt_tokens, BYTES[work.dtype]
    head = 2 * model.hidden * work.columns(0, model.vocab)
    exact = float(work.head_columns == "needed")
    blocks = 2 * model.block_parameters * prompt + 2 * width * prompt**2
    found = [Phase(blocks + head, 0.0, exact * head)]
    decoded = 0
    for level in range(1, work.levels):
        beams = work.beams(level - 1)
        decoded += beams
        seen = prompt + decoded
        head = 2 * model.hidden * work.columns(level, model.vocab) * beams
        flops = 2 * model.block_parameters * beams + 4 * width * beams * seen + head
        found.append(Phase(flops, model.kv_numbers * size * seen, exact * head))
    return found


def trie_bytes(work: Workload) -> int:
    """Upper bound of the trie's arrays on the device.

    Level l has ``min(n_items, product of the codebook sizes up to l)`` nodes at most, each with a
    code, a first child and an alive bit (4 + 4 + 1 bytes); each item has its row (4 bytes).
    """
    sizes = work.codebook_sizes
    nodes = [min(work.n_items, math.prod(sizes[: level + 1])) for level in range(work.levels)]
    return 9 * sum(nodes) + 4 * work.n_items


def user_bytes(model: ModelShape, work: Workload) -> dict[str, float]:
    """Memory of one user of a batch.

    ``kv``: ``kv_numbers·bytes`` for the prompt and every decoded position, P + Σ beams (at most
    (L-1)·B). ``logits``: the widest level's beams × codes (`Workload.picked`) in float32, before
    and after they are normalised; of an engine that computes every column, beams × vocabulary, once
    in the model's dtype and once in float32. ``activations``: of one block, the larger of P and B
    tokens × (2·intermediate + 4·hidden). ``mask``: beams × (P + decoded).
    """
    size = BYTES[work.dtype]
    beams = [work.beams(level) for level in range(work.levels - 1)]
    positions = work.prompt_tokens + sum(beams)
    if work.head_columns == "all":
        logits = max([1, *beams]) * model.vocab * (size + 4)
    else:
        logits = max(n * work.picked(level) for level, n in enumerate([1, *beams])) * 8
    tokens = max(work.prompt_tokens, max(beams, default=1))
    return {
        "kv": model.kv_numbers * size * positions,
        "logits": logits,
        "activations": tokens * (2 * model.intermediate + 4 * model.hidden) * size,
        "mask": max(beams, default=1) * positions * size,
    }


def normaliser_bytes(model: ModelShape, work: Workload, users: int) -> int:
    """Memory of a batch in which the full normaliser is summed; 0 for the others.

    Logits of the whole vocabulary, in the model's dtype and in float32, of as many beams at a time
    as make `LOGITS_AT_ONCE`. (An engine that computes every column holds them per user.)
    """
    if work.normalizer != "full" or work.head_columns == "all":
        return 0
    beams = max([1, *(work.beams(level) for level in range(work.levels - 1))])
    return min(users * beams * model.vocab, LOGITS_AT_ONCE) * (BYTES[work.dtype] + 4)


@dataclass(frozen=True)
class Estimate:
    """The plan for one device.

    Attributes:
        weights: bytes of the model.
        trie: bytes of the trie.
        per_user: bytes of one user of a batch, by kind.
        normaliser: bytes of the batch in which the full normaliser is summed.
        largest_batch: users that fit together.
        batch: users per batch that the rate is for.
        flops_per_user: operations of one user.
        users_per_s: estimated rate of one device.
        bound: which side of the roofline decides most of the time: "compute" or "bandwidth".
        hours: for all users on all devices.
        cost: hours × price × devices; None without a price.
    """

    weights: int
    trie: int
    per_user: dict[str, float]
    normaliser: int
    largest_batch: int
    batch: int
    flops_per_user: float
    users_per_s: float
    bound: str
    hours: float
    cost: float | None


def estimate(
    model: ModelShape,
    work: Workload,
    hardware: Hardware,
    utilisation: float = 0.4,
    batch: int | None = None,
    devices: int = 1,
) -> Estimate:
    """Memory, rate and cost of a workload.

    A batch of U users takes, per phase, ``max(U·flops / (peak·u), (weights + U·traffic) /
    (bandwidth·u))`` seconds with u the utilisation: the weights are read once per pass. Operations
    in float32 are divided by its own peak.

    Args:
        model: sizes of the decoder.
        work: what is asked of it.
        hardware: one device.
        utilisation: share of both peaks that is reached, in (0, 1].
        batch: users decoded together; None: the most that fit, up to 64.
        devices: that share the users.

    Raises:
        ValueError: the model doesn't fit, the batch doesn't, or a setting can't be.
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation={utilisation} must lie in (0, 1]")
    if not 1 <= devices <= MOST_DEVICES:
        raise ValueError(
            f"devices={devices} must be at least 1"
            if devices < 1
            else f"devices={devices} must be at most {MOST_DEVICES:,}"
        )
    passes = phases(model, work)
    _check_hardware(hardware, work.dtype, any(phase.in_float32 for phase in passes))
    weights, trie = model.parameters * BYTES[work.dtype], trie_bytes(work)
    per_user = user_bytes(model, work)
    each, one = sum(per_user.values()), normaliser_bytes(model, work, 1)
    room = MEMORY_SHARE * hardware.memory - weights - trie
    # The normaliser's memory grows with the batch up to its limit: whichever holds more users.
    full = normaliser_bytes(model, work, LOGITS_AT_ONCE)
    largest = max(math.floor(room / (each + one)), math.floor((room - full) / each))
    if largest < 1:
        raise ValueError(
            f"weights ({weights / 1e9:.1f} GB), trie ({trie / 1e9:.1f} GB) and one user "
            f"({(each + one) / 1e9:.2f} GB) exceed {MEMORY_SHARE:.0%} of the device's "
            f"{hardware.memory / 1e9:.0f} GB; take a larger device, a smaller model or dtype, or a "
            "smaller beam_width"
        )
    users = min(largest, 64) if batch is None else batch
    if not 1 <= users <= largest:
        raise ValueError(f"batch={users} must lie between 1 and the {largest} users that fit")
    seconds = limited = 0.0
    for phase in passes:
        compute = (phase.flops - phase.in_float32) / hardware.flops[work.dtype]
        if phase.in_float32:
            compute += phase.in_float32 / hardware.flops["float32"]
        compute *= users / utilisation
        moving = (weights + users * phase.traffic) / (hardware.bandwidth * utilisation)
        seconds += max(compute, moving)
        limited += max(compute, moving) if compute >= moving else 0.0
    rate = users / seconds
    hours = work.n_users / (rate * devices) / 3600
    return Estimate(
        weights=weights,
        trie=trie,
        per_user=per_user,
        normaliser=normaliser_bytes(model, work, users),
        largest_batch=largest,
        batch=users,
        flops_per_user=sum(phase.flops for phase in passes),
        users_per_s=rate,
        bound="compute" if limited >= seconds / 2 else "bandwidth",
        hours=hours,
        cost=None if hardware.price is None else hours * hardware.price * devices,
    )


def _check_hardware(hardware: Hardware, dtype: str, in_float32: bool) -> None:
    """Raise ValueError unless the peaks are numbers that a device can have."""
    stated = [
        ("memory", hardware.memory / 1e9, "GB"),
        ("bandwidth", hardware.bandwidth / 1e9, "GB/s"),
        ("tflops", hardware.flops.get(dtype, 0) / 1e12, "TFLOP/s"),
    ]
    if in_float32 and dtype != "float32":
        stated.append(("tflops_float32", hardware.flops.get("float32", 0) / 1e12, "TFLOP/s"))
    for name, value, unit in stated:
        if not 0 < value:
            raise ValueError(f"{name}={value} must be above 0 ({unit})")
        if not 1e-6 <= value <= 1e9:
            raise ValueError(f"{name}={value} must lie between 1e-06 and 1e+09 {unit}")
    if hardware.price is not None and not 0 <= hardware.price <= 1e9:
        raise ValueError(f"price={hardware.price} of an hour must lie between 0 and 1e+09")


def shape_of_config(config: Mapping[str, Any], source: object = "the config") -> ModelShape:
    """Sizes from a Hugging Face ``config.json``.

    Args:
        config: its content.
        source: what messages call it.

    Raises:
        ValueError: a size is missing or can't be, or the model has experts, whose arithmetic is
            another.
    """
    config = config.get("text_config", config)
    if not isinstance(config, Mapping):
        raise ValueError(f"{source}: text_config={config!r} is no JSON object")
    if any("expert" in key and config[key] for key in config):
        raise ValueError(f"{source} has experts; this estimate is for dense decoders")

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name)
        if value is None and default is not None:
            return default
        if name not in config:
            raise ValueError(
                f"{source} has no {name}: it describes no decoder of the Llama kind; name one of "
                f"{', '.join(SHAPES)}"
            )
        if type(value) is not int or not 1 <= value < _MOST_SIZE:
            raise ValueError(
                f"{source}: {name}={value!r} must be an integer of at least 1 and below "
                f"{_MOST_SIZE}; restore the file"
            )
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    if config.get("head_dim") is None and hidden < heads:
        raise ValueError(
            f"{source}: num_attention_heads={heads} exceeds hidden_size={hidden}, and it has no "
            "head_dim; restore the file"
        )
    return ModelShape(
        layers=size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // heads),
        intermediate=size("intermediate_size"),
        vocab=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def find_shape(name: str) -> ModelShape:
    """Sizes by a name of `SHAPES`, or of a folder with ``config.json``, or of such a file.

    Raises:
        ValueError: neither.
    """
    if name.lower() in SHAPES:
        return SHAPES[name.lower()]
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"model={name!r} is no known shape and no folder with a config.json; known are "
            f"{', '.join(SHAPES)}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object")
    return shape_of_config(config, path)
