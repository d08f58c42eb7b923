"""Free text sampled from a causal LM in process, with a KV cache and settings of our own.

The constrained search answers with items; this answers with text, such as the reasoning in front of
an item. Nothing is read from the model's ``generation_config``. Each text draws from its own random
numbers, a function of (seed, prompt, number of the sample), so what a prompt gets does not depend
on which prompts it shares a batch with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from genrec.artifacts import sha256_bytes
from genrec.decoding.beam import length_batches
from genrec.decoding.forward import attention_reach

FinishReason = Literal["stop", "eos", "length"]
_COLDEST = 1e-30  # a lower temperature is zero in float32
_BLOCK = 256  # tokens whose weights are summed before one of them is looked for
_LIKELIEST = 1024  # tokens that are sorted first to find a nucleus
_CHECK_EVERY = 16  # tokens between two looks at the texts: each waits for the device


@dataclass(frozen=True)
class TextSampling:
    """How text is sampled.

    Attributes:
        temperature: logits are divided by it; 1 samples from the model's own distribution.
        top_p: only the fewest tokens whose probabilities reach this sum are drawn from (nucleus
            sampling, Holtzman et al. 2020); 1 keeps all.
        max_tokens: of a text; fewer where the model's context leaves fewer.
        seed: of the draws.

    Raises:
        ValueError: a setting is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (0 < self.temperature < float("inf")):
            raise ValueError(
                f"temperature={self.temperature} must be a positive number; near 0 the likeliest "
                "token is drawn"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")


@dataclass(frozen=True)
class SampledText:
    """One text.

    Attributes:
        token_ids: as sampled: up to the end of the stop text where that was written, without EOS.
        text: the tokens' text, without the stop text.
        finish_reason: "stop" (the stop text was written), "eos" (the model ended before it), or
            "length" (the limit was reached before it).
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason


def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    n_samples: int,
    stop_text: str,
    sampling: TextSampling,
    reserve: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> list[list[SampledText]]:
    """Sample texts behind each prompt until one holds `stop_text`.

    A prompt is prefilled once for all its samples. Special tokens other than EOS, and rows of the
    embedding that no token has, are never drawn. Two equal prompts get equal texts.

    Args:
        model: a causal LM with full attention (a sliding window limits prompt and text); used as it
            is and put into eval mode meanwhile.
        tokenizer: the model's.
        prompts: token ids, none empty.
        n_samples: texts per prompt.
        stop_text: ends a text.
        sampling: the settings.
        reserve: tokens of the context to be left free behind each text.
        batch_size: texts sampled together, at least one prompt's.
        progress: called with the number of prompts of each finished batch.

    Returns:
        `n_samples` texts per prompt, in order.

    Raises:
        ValueError: a prompt is empty or leaves no token of the context, no stop text, or the
            model's scores are NaN.
    """
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples} must be at least 1")
    if not stop_text:
        raise ValueError("the stop text is empty: every text would end at once")
    context = attention_reach(model)
    batches = length_batches(prompts, reserve + 1, context, max(1, batch_size // n_samples))
    forbidden = never_drawn(model, tokenizer)
    out: list[list[SampledText]] = [[] for _ in prompts]
    for rows in batches:
        batch = [list(prompts[row]) for row in rows]
        room = [
            sampling.max_tokens if context is None else context - len(prompt) - reserve
            for prompt in batch
        ]
        limits = np.repeat(np.minimum(room, sampling.max_tokens), n_samples)
        ends = _Ends(tokenizer, stop_text, limits)
        with _eval_mode(model):
            _sample_batch(model, batch, n_samples, sampling, forbidden, ends)
        for i, row in enumerate(rows):
            out[row] = [ends.found[i * n_samples + j] for j in range(n_samples)]
        if progress is not None:
            progress(len(rows))
    return out


class _Ends:
    """Finds out which texts have ended, and where."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_text: str, limits: np.ndarray
    ) -> None:
        self.tokenizer, self.stop_text, self.limits = tokenizer, stop_text, limits
        self.found: dict[int, SampledText] = {}

    def look(self, live: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Record the texts that ended.

        Args:
            live: numbers of the texts that were going on, (n,).
            tokens: all their tokens so far, (n, t).

        Returns:
            Places in `live` of those that still go on.
        """
        n_tokens = np.minimum(tokens.shape[1], self.limits[live])
        is_end = tokens == self.tokenizer.eos_token_id
        eos_at = np.where(is_end.any(axis=1), is_end.argmax(axis=1), tokens.shape[1])
        kept = [row[:n].tolist() for row, n in zip(tokens, np.minimum(n_tokens, eos_at))]  # noqa: B905
        going = []
        for place, (number, ids, text) in enumerate(zip(live, kept, self._texts(kept))):  # noqa: B905
            if self.stop_text in text:
                ids = self._up_to_stop(ids)
                text = self._texts([ids])[0].partition(self.stop_text)[0]
                self.found[int(number)] = SampledText(tuple(ids), text, "stop")
            elif eos_at[place] < n_tokens[place]:
                self.found[int(number)] = SampledText(tuple(ids), text, "eos")
            elif n_tokens[place] == self.limits[number]:
                self.found[int(number)] = SampledText(tuple(ids), text, "length")
            else:
                going.append(place)
        return np.array(going, dtype=np.int64)

    def _up_to_stop(self, ids: list[int]) -> list[int]:
        """The fewest of the first tokens whose text holds the stop text; once per text."""
        n = max(1, len(ids) - _CHECK_EVERY)  # at the last look it wasn't there
        while self.stop_text not in self._texts([ids[:n]])[0]:
            n += 1
        return ids[:n]

    def _texts(self, ids: list[list[int]]) -> list[str]:
        return self.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)


@torch.inference_mode()
def _sample_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    n_samples: int,
    sampling: TextSampling,
    forbidden: Tensor,
    ends: _Ends,
) -> None:
    """Sample until all texts of a batch are in `ends.found`. R texts, P prompt columns."""
    device = forbidden.device
    cache, visible, position, logits = _prefill(model, prompts, n_samples, device)
    longest = int(ends.limits.max())
    draws = torch.from_numpy(_draws(prompts, n_samples, sampling, longest)).to(device)
    tokens = torch.zeros(len(draws), longest, dtype=torch.int64, device=device)
    live = np.arange(len(draws))
    for step in range(longest):
        if step == 0 and torch.isnan(logits).any():
            raise ValueError("the model gave NaN scores; check its weights and dtype")
        tokens[:, step] = pick(logits, forbidden, draws[:, step], sampling)
        if (step + 1) % _CHECK_EVERY == 0 or step + 1 == ends.limits[live].min():
            going = ends.look(live, tokens[:, : step + 1].cpu().numpy())
            if len(going) == 0:
                return
            if len(going) < len(live):
                live, at = live[going], torch.from_numpy(going).to(device)
                tokens, draws, visible, position = (
                    t[at] for t in (tokens, draws, visible, position)
                )
                cache.batch_select_indices(at)
        written = torch.ones(len(live), step + 1, dtype=torch.bool, device=device)
        sees = torch.cat([visible, written], dim=1)  # (R, P + step + 1)
        mask = torch.zeros(sees.shape, dtype=model.dtype, device=device)
        mask = mask.masked_fill(~sees, torch.finfo(model.dtype).min)[:, None, None]
        logits = model(
            input_ids=tokens[:, step : step + 1],
            position_ids=position + step,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]


def _prefill(
    model: PreTrainedModel, prompts: list[list[int]], n_samples: int, device: torch.device
) -> tuple[DynamicCache, Tensor, Tensor, Tensor]:
    """Run each prompt once, right-padded, and repeat what follows from it for its samples.

    Returns:
        The cache of R texts, which prompt columns are real (R, P), the position of the first new
        token (R, 1), and the logits for it (R, V).
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    last, which = torch.unique(lengths - 1, return_inverse=True)
    cache = DynamicCache()  # not the config's: a window's layer would drop what padding pushes out
    out = model(
        input_ids=ids.to(device), past_key_values=cache, use_cache=True, logits_to_keep=last
    )
    logits = out.logits[torch.arange(len(prompts), device=device), which]
    cache.batch_repeat_interleave(n_samples)
    position = lengths.repeat_interleave(n_samples).unsqueeze(1)
    visible = torch.arange(ids.shape[1], device=device) < position
    return cache, visible, position, logits.repeat_interleave(n_samples, dim=0)


def pick(logits: Tensor, forbidden: Tensor, draws: Tensor, sampling: TextSampling) -> Tensor:
    """The token that each random number falls on.

    The numbers are looked up in the cumulative distribution over the vocabulary in token order.
    Weights are float32 and their sums float64, so that rounding moves a draw only where it falls on
    an edge. First the block of tokens is found and then the token in it: running sums are slow.

    Args:
        logits: (R, V), any float type.
        forbidden: tokens that are never drawn, (V,) bool.
        draws: uniform in [0, 1), (R,) float64.
        sampling: temperature and top_p.

    Returns:
        (R,) token ids.
    """
    rows, size = logits.shape
    width = -(-size // _BLOCK) * _BLOCK
    weights = torch.full((rows, width), -torch.inf, device=logits.device)
    weights[:, :size] = logits
    weights[:, :size].masked_fill_(forbidden, -torch.inf)
    weights -= weights.amax(-1, keepdim=True)  # else a low temperature overflows
    weights.div_(max(sampling.temperature, _COLDEST)).exp_()
    if sampling.top_p < 1:
        _keep_nucleus(weights, sampling.top_p)
    blocks = weights.view(rows, -1, _BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = _below(draws.unsqueeze(1) * sums[:, -1:], sums[:, -1:])
    block = torch.searchsorted(sums, target, right=True)  # (R, 1)
    before = sums.gather(1, (block - 1).clamp(min=0)).masked_fill(block == 0, 0.0)
    inside = blocks[torch.arange(rows, device=logits.device), block[:, 0]].cumsum(
        -1, dtype=torch.float64
    )
    place = torch.searchsorted(inside, _below(target - before, inside[:, -1:]), right=True)
    return (block * _BLOCK + place).squeeze(1)


def _below(values: Tensor, limit: Tensor) -> Tensor:
    """The values, or the number next below the limit where rounding took them up to it."""
    return torch.minimum(values, torch.nextafter(limit, torch.zeros_like(limit)))


def _keep_nucleus(weights: Tensor, top_p: float) -> None:
    """Zero all but the fewest largest weights whose share reaches `top_p`; of equals the first.

    In place, and sorts only as many of them as it takes. ``weights # (R, V)``
    """
    total = weights.sum(-1, keepdim=True, dtype=torch.float64)
    kept = min(_LIKELIEST, weights.shape[1])
    while True:
        ordered = weights.topk(kept, dim=-1).values
        sums = ordered.cumsum(-1, dtype=torch.float64)
        if kept == weights.shape[1] or bool((sums[:, -1:] >= top_p * total).all()):
            break
        kept = min(16 * kept, weights.shape[1])
    size = (sums - ordered < top_p * total).sum(-1, keepdim=True)  # of the nucleus, (R, 1)
    edge = ordered.gather(1, size - 1)
    equal = weights == edge
    room = size - (ordered > edge).sum(-1, keepdim=True)
    if bool((equal.sum(-1, keepdim=True) > room).any()):
        weights.masked_fill_(equal & (equal.cumsum(-1) > room), 0.0)
    weights.masked_fill_(weights < edge, 0.0)


def _draws(prompts: list[list[int]], n_samples: int, sampling: TextSampling, n: int) -> np.ndarray:
    """Uniform numbers, (prompts * n_samples, n) float64; a row's start does not depend on `n`."""
    out = np.empty((len(prompts) * n_samples, n))
    for i, prompt in enumerate(prompts):
        key = int(sha256_bytes(np.asarray(prompt, dtype="<i8").tobytes())[:16], 16)
        for j in range(n_samples):
            out[i * n_samples + j] = np.random.default_rng([sampling.seed, key, j]).random(n)
    return out


def never_drawn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Ids that are no text: padding rows of the embedding, special tokens but EOS. (V,) bool."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    forbidden = torch.arange(weight.shape[0]) >= len(tokenizer)
    special = [i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id]
    forbidden[torch.tensor(special, dtype=torch.int64)] = True
    return forbidden.to(weight.device)


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
