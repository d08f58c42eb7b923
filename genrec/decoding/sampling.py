"""Samplers over the trie: items drawn from the model instead of its best ones.

A sampler walks the trie from the root and splits each node's probability over its allowed children:
the softmax of their log-probabilities, after temperature and top-p where it has them. The product
along the path is the distribution over items that is sampled; it sums to one. Three cases:

- normaliser "trie", nothing filtered, temperature 1, top-p 1: it is the model's declared
  distribution over items.
- items are filtered (view, seen): every node renormalises over its allowed children, as in drawing
  one code after the other with a mask. This is **not** the declared distribution conditioned on
  the allowed items, whose odds along a path would count what is filtered deep below it; that one
  can't be had without scoring every item.
- normaliser "full" or "level": their log-probabilities don't sum to one over items (some mass is on
  codes that no item has), so they declare no distribution to sample from. `GumbelTopK` refuses
  them. `LevelSampling` is defined node by node and takes them: the constant cancels, and it draws
  as under "trie".

What is drawn never changes what is reported: `BeamResult.scores` are the plain log-probabilities of
the declared normaliser, and `Sample.log_probs` those of the distribution that was sampled.

**Without replacement** is a stochastic beam search (Kool, van Hoof and Welling 2019, "Stochastic
Beams and Where to Find Them", algorithm 1): log-probabilities are perturbed by Gumbel noise, a
node's perturbed value is the largest below it, and the items with the k largest are a sample
without replacement, in the order of drawing. Top-down, children are drawn given their maximum, so
the k best prefixes of a level suffice: a beam of k is exact, wider ones change nothing. Deviation:
the root's value is drawn, too, not set to 0; the k-th value and all weights from it depend on it.

**Noise** is counted, not streamed: a SplitMix64 hash (Steele, Lea and Flood 2014) of seed, prompt,
level, node and, with replacement, number of the draw. So a row's draw depends on neither its batch
nor its place in it nor the beam's width, equal prompts draw alike under one seed, and CPU and CUDA
use the same bits. Equal lists need equal scores, as everywhere: fp32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import softplus

FloatArray = npt.NDArray[np.float64]

MIN_TEMPERATURE = 1e-3  # below it is the greedy path in all but name, and floats overflow


@dataclass(frozen=True)
class GumbelTopK:
    """k distinct items, an exact sample without replacement from the model.

    Needs the "trie" normaliser. The sampler that importance weights are made for (`weights`).

    Attributes:
        seed: of the noise, 0 to 2^63 - 1; another seed draws anew.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        """Reject a seed that isn't one."""
        _check_seed(self.seed)


@dataclass(frozen=True)
class LevelSampling:
    """Items drawn code by code, with a temperature and top-p of their own for every level.

    A high temperature at the first level and a low one below varies the coarse kind of item and
    stays with the best of each kind; at the last level it varies items of one kind (TIGER, Rajput
    et al. 2023, on diversity).

    Attributes:
        temperature: log-probabilities of a level's allowed children are divided by it; one number,
            or one per level, each at least 0.001. Towards 0 the first item is the greedy path.
        top_p: after temperature, a node keeps its most probable children, fewest whose
            probabilities sum to at least this; one number, or one per level, in (0, 1]. Ties go to
            the smaller code.
        replacement: draw independently, so that items may repeat; False draws without replacement
            (Gumbel top-k over the tempered distribution). If top-p leaves fewer than k items, the
            list is shorter.
        seed: of the noise, 0 to 2^63 - 1; another seed draws anew.
    """

    temperature: float | Sequence[float] = 1.0
    top_p: float | Sequence[float] = 1.0
    replacement: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject values that can't be used at any depth."""
        _check_seed(self.seed)
        for value in _numbers("temperature", self.temperature):
            if not MIN_TEMPERATURE <= value < math.inf:
                raise ValueError(
                    f"temperature={self.temperature!r} must be finite and at least "
                    f"{MIN_TEMPERATURE}; for the best items use no sampler"
                )
        for value in _numbers("top_p", self.top_p):
            if not 0 < value <= 1:
                raise ValueError(f"top_p={self.top_p!r} must lie in (0, 1]; 1 keeps every child")


Sampler = GumbelTopK | LevelSampling


@dataclass(frozen=True)
class Sample:
    """What a sampler knows of the lists that it drew, row for row.

    Attributes:
        log_probs: log-probability of each item under the distribution that was sampled, (n, k)
            float64; −inf at padding.
        keys: perturbed log-probabilities, falling along a row, (n, k) float64; −inf at padding.
            None with replacement.
        threshold: the largest perturbed log-probability of an item outside the list (kappa), (n,)
            float64; −inf where every item that could be drawn is in it. None with replacement.
    """

    log_probs: FloatArray
    keys: FloatArray | None = None
    threshold: FloatArray | None = None

    def weights(self) -> FloatArray:
        """Importance weights, (n, k): for any f, Σ weight·f estimates E[f] without bias.

        ``p / P(key > kappa)``, the Horvitz-Thompson estimator of Kool et al. (2019), with p of the
        distribution that was sampled; multiply by ``exp(scores - log_probs)`` for the mean under
        the declared normaliser. 0 at padding.

        Raises:
            ValueError: the sample is one with replacement (every draw then weighs 1 / k).
        """
        if self.threshold is None:
            raise ValueError("draws with replacement have no threshold; each of k weighs 1 / k")
        real = np.isfinite(self.log_probs)
        p = np.where(real, self.log_probs, 0.0)
        kappa = self.threshold[:, None]
        margin = p - kappa
        # P(Gumbel(p) > kappa) = 1 − exp(−exp(margin)): 1 where kappa is −inf, and where it is tiny,
        # exp(margin) itself, which leaves exp(kappa).
        inclusion = np.log(-np.expm1(-np.exp(np.clip(margin, -30.0, 30.0))))
        weight = np.exp(np.where(margin < -30.0, kappa, p - inclusion))
        return np.where(real, weight, 0.0)


@dataclass(frozen=True)
class Draws:
    """Noise and state of a sampler during a search, U users and B beams.

    Attributes:
        temperatures: one per level.
        top_ps: one per level.
        streams: where each user's noise starts, (U,) int64.
        log_probs: of the prefixes under the sampled distribution, (U, B) float64. With replacement
            each draw is a beam from the root on.
        keys: their perturbed values, (U, B) float64; None with replacement.
        cut: the largest perturbed value cut off so far, (U,) float64; None with replacement.
    """

    temperatures: tuple[float, ...]
    top_ps: tuple[float, ...]
    streams: Tensor
    log_probs: Tensor
    keys: Tensor | None
    cut: Tensor | None

    @classmethod
    def start(
        cls,
        sampler: Sampler,
        n_levels: int,
        prompts: Sequence[Sequence[int]],
        width: int,
        device: torch.device,
    ) -> Draws:
        """State at the root.

        Args:
            sampler: what to draw.
            n_levels: depth of the trie.
            prompts: token ids; they and the seed determine the noise.
            width: prefixes that are drawn per level; with replacement the number of draws.
            device: where the search runs.

        Raises:
            ValueError: the sampler has settings for another number of levels.
        """
        level = sampler if isinstance(sampler, LevelSampling) else LevelSampling()
        temperatures = _per_level("temperature", level.temperature, n_levels)
        top_ps = _per_level("top_p", level.top_p, n_levels)
        streams = torch.from_numpy(streams_of(sampler.seed, prompts)).to(device)
        roots = width if level.replacement else 1
        zero = torch.zeros(len(prompts), roots, dtype=torch.float64, device=device)
        if level.replacement:
            return cls(temperatures, top_ps, streams, zero, None, None)
        root = gumbel(mix(streams)).unsqueeze(1)
        cut = torch.full_like(zero[:, 0], -torch.inf)
        return cls(temperatures, top_ps, streams, zero, root, cut)

    def perturbed(
        self, level: int, beams: Tensor, child: Tensor, log_probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the children of some beams are drawn by.

        Args:
            level: level of the children.
            beams: which of the flattened (U, B), (R,).
            child: node ids of all their children, (R, M).
            log_probs: log-probabilities given the parents, (R, M), −inf where not allowed.

        Returns:
            Log-probabilities of the prefixes under the sampled distribution, and those perturbed:
            the largest are drawn. (R, M) float64 each, −inf where not allowed.
        """
        n_beams = self.log_probs.shape[1]
        split = split_of(log_probs, self.temperatures[level], self.top_ps[level])
        prefixes = self.log_probs.flatten()[beams].unsqueeze(1) + split
        streams = mix(self.streams + _signed((level + 1) * _LEVEL))[beams // n_beams]
        if self.keys is None:  # every beam is a draw with noise of its own
            streams = mix(streams + (beams % n_beams + 1) * _DRAW)
        noisy = prefixes + gumbel(hash_nodes(streams.unsqueeze(1), child.long()))
        if self.keys is None:
            return prefixes, noisy
        return prefixes, given_maximum(noisy, self.keys.flatten()[beams].unsqueeze(1))

    def choose(self, log_probs: Tensor, perturbed: Tensor, width: int) -> tuple[Tensor, Draws]:
        """Draw among the children of all beams.

        Args:
            log_probs: of the prefixes, as `perturbed` gives them, (U, B, M).
            perturbed: from there, too, (U, B, M).
            width: prefixes to draw.

        Returns:
            What was drawn as positions in the flattened children, (U, at most `width`), and the
            state that goes with it.
        """
        _, n_beams, n_child = perturbed.shape
        if self.keys is None or self.cut is None:  # each draw takes one child of its beam
            first = torch.arange(0, n_beams * n_child, n_child, device=perturbed.device)
            top = first + perturbed.argmax(-1)  # (U, B)
            return top, replace(self, log_probs=log_probs.flatten(1).gather(1, top))
        keys = perturbed.flatten(1)
        keep = min(width + 1, keys.shape[1])
        best, top = keys.topk(keep, dim=1)  # continuous: ties are among the dead alone
        cut = self.cut
        if keep > width:
            cut = torch.maximum(cut, best[:, width])
            best, top = best[:, :width], top[:, :width]
        drawn = log_probs.flatten(1).gather(1, top)
        return top, replace(self, log_probs=drawn, keys=best, cut=cut)

    def kept(self, width: int) -> int:
        """How many of one beam's children matter where `width` prefixes are drawn."""
        return 1 if self.keys is None else width + 1

    def sample(self, k: int) -> Sample:
        """The account of the first `k` drawn, after the last level; (U, k), padded with −inf."""
        missing = k - min(k, self.log_probs.shape[1])

        def padded(values: Tensor) -> FloatArray:
            return np.pad(
                values[:, :k].cpu().numpy(), ((0, 0), (0, missing)), constant_values=-np.inf
            )

        if self.keys is None or self.cut is None:
            return Sample(padded(self.log_probs))
        # Of a wider beam the next prefix is the best one outside the list.
        threshold = self.keys[:, k] if self.keys.shape[1] > k else self.cut
        return Sample(padded(self.log_probs), padded(self.keys), threshold.cpu().numpy())


def check_sampler(sampler: Sampler, normalizer: str, n_levels: int) -> None:
    """Raise ValueError if a sampler can't be used with a normaliser and a depth."""
    if isinstance(sampler, GumbelTopK) and normalizer != "trie":
        raise ValueError(
            f"GumbelTopK samples from the model's distribution over items, and normalizer="
            f"{normalizer!r} declares none (its scores don't sum to one over items); build the "
            "engine with normalizer='trie', or use LevelSampling()"
        )
    if isinstance(sampler, LevelSampling):
        _per_level("temperature", sampler.temperature, n_levels)
        _per_level("top_p", sampler.top_p, n_levels)


def gather_samples(parts: Sequence[Sample], rows: np.ndarray) -> Sample:
    """Samples of batches as one, in the prompts' order.

    Args:
        parts: of one sampler, at least one.
        rows: row of each list of the parts, one part after the other, (n,).
    """
    order = np.argsort(rows, kind="stable")
    log_probs = np.concatenate([part.log_probs for part in parts])[order]
    keys = [part.keys for part in parts if part.keys is not None]
    thresholds = [part.threshold for part in parts if part.threshold is not None]
    if not keys:
        return Sample(log_probs)
    return Sample(log_probs, np.concatenate(keys)[order], np.concatenate(thresholds)[order])


def split_of(log_probs: Tensor, temperature: float, top_p: float) -> Tensor:
    """How a sampler splits a node's probability over its children.

    Args:
        log_probs: of the children, (..., M), ascending codes, −inf where not allowed; any constant
            may be added per node.
        temperature: they are divided by it, then renormalised.
        top_p: then only the most probable children are kept (see `LevelSampling`) and renormalised.

    Returns:
        Log-probabilities, (..., M) float64, that sum to one over the last axis, or −inf throughout
        where no child is allowed; NaN beside a NaN.
    """
    nobody = (log_probs == -torch.inf).all(-1, keepdim=True)
    split = (log_probs.double() / temperature).log_softmax(-1)
    if top_p < 1:
        ordered, order = split.sort(dim=-1, descending=True, stable=True)
        mass = ordered.exp()
        outside = mass.cumsum(-1) - mass >= top_p  # those above already hold it
        outside = torch.zeros_like(outside).scatter_(-1, order, outside)
        split = split.masked_fill(outside, -torch.inf).log_softmax(-1)
    return split.masked_fill(nobody, -torch.inf)


def given_maximum(noisy: Tensor, maximum: Tensor) -> Tensor:
    """Gumbel variables, shifted as if their maximum had been known.

    With Z the largest of G along the last axis and T the wanted one, each becomes
    ``-log(exp(-T) - exp(-Z) + exp(-G))``, computed by the stable form in the appendix of Kool et
    al. (2019), so that nothing overflows; the largest becomes T exactly.

    Args:
        noisy: independent Gumbel variables, (..., M) float64; −inf for what can't be.
        maximum: what their maximum shall be, (..., 1).

    Returns:
        (..., M), at most `maximum`; −inf where `noisy` is.
    """
    dead = (noisy == -torch.inf) | (maximum == -torch.inf)
    noisy = noisy.masked_fill(dead, 0.0)
    largest = noisy.masked_fill(dead, -torch.inf).amax(-1, keepdim=True)
    below = (noisy - largest).masked_fill(dead, -1.0)  # <= 0
    # log(1 - exp(below)); an error of 1e-16 in it is one of 1e-16 in the result.
    v = maximum.masked_fill(maximum == -torch.inf, 0.0) - noisy + (-torch.expm1(below)).log()
    shifted = maximum - softplus(v, threshold=40.0)
    return shifted.masked_fill(dead, -torch.inf)


def _signed(word: int) -> int:
    """An unsigned 64-bit number as int64 holds it; torch's int64 products wrap alike."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


# SplitMix64: state + n * golden ratio, mixed.
_GOLDEN = _signed(0x9E3779B97F4A7C15)
# Odd numbers that keep levels and draws apart before mixing.
_LEVEL = _signed(0xD1342543DE82EF95)
_DRAW = _signed(0xAF251AF3B0F025B5)


def mix(state: Tensor) -> Tensor:
    """SplitMix64's mixing of int64 words, any shape."""
    state = (state ^ _shift(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shift(state, 31)


def _shift(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def hash_nodes(streams: Tensor, nodes: Tensor) -> Tensor:
    """Random words: output number `nodes` of the generators that start at `streams`."""
    return mix(streams + (nodes + 1) * _GOLDEN)


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel variables from random int64 words: float64, finite, −3.6 to 36.8."""
    uniform = (_shift(words, 12).double() + 0.5) * 2.0**-52  # never 0, never 1
    return -(-uniform.log()).log()


def streams_of(seed: int, prompts: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    """Where each prompt's noise starts, (n,): a BLAKE2 hash of the seed and the token ids."""
    salt = seed.to_bytes(8, "little")
    words = [
        hashlib.blake2b(np.asarray(prompt, dtype="<i8").tobytes(), digest_size=8, salt=salt)
        for prompt in prompts
    ]
    return np.frombuffer(b"".join(word.digest() for word in words), dtype="<i8").astype(np.int64)


def _check_seed(seed: int) -> None:
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed={seed!r} must be an integer from 0 to 2^63 - 1")


def _numbers(name: str, value: float | Sequence[float]) -> tuple[float, ...]:
    """A setting as numbers; ValueError for what is none."""
    given = (value,) if isinstance(value, int | float) else value
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ValueError(f"{name}={value!r} must be a number, or one per level")
    if any(isinstance(x, bool) or not isinstance(x, int | float) for x in given):
        raise ValueError(f"{name}={value!r} must be a number, or one per level")
    return tuple(float(x) for x in given)


def _per_level(name: str, value: float | Sequence[float], n_levels: int) -> tuple[float, ...]:
    numbers = _numbers(name, value)
    if isinstance(value, int | float):
        return numbers * n_levels
    if len(numbers) != n_levels:
        raise ValueError(
            f"{name}={value!r} has {len(numbers)} numbers for {n_levels} levels; give one, or one "
            "per level"
        )
    return numbers
