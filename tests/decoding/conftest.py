"""Tiny catalogues and models, and the reference that every engine is held against."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 96
FIRST_TEXT_TOKEN = 60
N_CODES = 6


def _sid_token_ids(n_levels: int, n_codes: int = N_CODES) -> list[list[int]]:
    """Tokens of each level's codes: in no order, so that code and token order differ."""
    ids = np.random.default_rng(3).permutation(FIRST_TEXT_TOKEN)
    if n_levels * n_codes > len(ids):  # levels may share tokens; only codes of one level may not
        return [ids[:n_codes].tolist()] * n_levels
    return ids[: n_levels * n_codes].reshape(n_levels, n_codes).tolist()


@lru_cache
def _tiny_model(kind: str = "qwen3", seed: int = 0, context: int = 128) -> PreTrainedModel:
    """Random decoder with peaked logits; qwen3 ties its embeddings, llama doesn't."""
    torch.manual_seed(seed)
    size = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=context,
        initializer_range=0.3,
    )
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=False))
    return Qwen3ForCausalLM(Qwen3Config(**size, tie_word_embeddings=True))


def _random_codes(seed: int, n_items: int, n_levels: int, n_codes: int = N_CODES) -> np.ndarray:
    """At most `n_items` distinct SIDs in no order, with unevenly used codes."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, rng.integers(1, n_codes + 1, n_levels), (n_items, n_levels))
    codes = np.unique(codes, axis=0)
    return codes[rng.permutation(len(codes))]


def _random_prompts(seed: int, n: int, longest: int = 20) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [
        rng.integers(FIRST_TEXT_TOKEN, VOCAB, rng.integers(1, longest + 1)).tolist()
        for _ in range(n)
    ]


def _exhaustive(
    model: PreTrainedModel,
    prompts: list[list[int]],
    codes: np.ndarray,
    sid_ids: list[list[int]],
    normalizer: str,
) -> np.ndarray:
    """Level log-probabilities of every item, (n, items, L): a plain forward pass per prompt."""
    n_items, n_levels = codes.shape
    out = np.empty((len(prompts), n_items, n_levels), dtype=np.float32)
    legal = [  # per level and item: the codes that may follow the item's prefix
        [np.unique(codes[(codes[:, :level] == row[:level]).all(1), level]) for row in codes]
        for level in range(n_levels)
    ]
    for i, prompt in enumerate(prompts):
        ids = [prompt + [sid_ids[level][c] for level, c in enumerate(row)] for row in codes]
        with torch.no_grad():
            logits = model(torch.tensor(ids)).logits.float()
        for level in range(n_levels):
            at = logits[:, len(prompt) - 1 + level]
            for item, row in enumerate(codes):
                over = {
                    "full": range(at.shape[1]),
                    "level": sid_ids[level],
                    "trie": [sid_ids[level][c] for c in legal[level][item]],
                }[normalizer]
                chosen = at[item, sid_ids[level][row[level]]]
                out[i, item, level] = chosen - at[item, list(over)].logsumexp(0)
    return out


class Reference:
    """Bundle of the factories, so that a test needs one fixture."""

    sid_token_ids: Callable[..., list[list[int]]] = staticmethod(_sid_token_ids)
    tiny_model: Callable[..., PreTrainedModel] = staticmethod(_tiny_model)
    random_codes: Callable[..., np.ndarray] = staticmethod(_random_codes)
    random_prompts: Callable[..., list[list[int]]] = staticmethod(_random_prompts)
    exhaustive: Callable[..., np.ndarray] = staticmethod(_exhaustive)

    @staticmethod
    def ranking(scores: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Items by (score descending, SID ascending), (n, items)."""
        by_sid = np.lexsort(codes.T[::-1])
        order = np.argsort(-scores[:, by_sid], axis=1, kind="stable")
        return by_sid[order]

    @staticmethod
    def assert_same_lists(
        items: np.ndarray, scores: np.ndarray, true_scores: np.ndarray, tolerance: float
    ) -> None:
        """The lists are a true top k, up to swaps of items whose scores are within `tolerance`.

        Args:
            items: lists, (n, k), −1 at padding.
            scores: their scores, (n, k).
            true_scores: of all items, (n, items), −inf where an item is not allowed.
            tolerance: largest difference of two scores that count as equal.
        """
        k = items.shape[1]
        best = -np.sort(-true_scores, axis=1)[:, :k]
        best = np.pad(best, ((0, 0), (0, k - best.shape[1])), constant_values=-np.inf)
        assert ((items == -1) == np.isneginf(best)).all()
        real = items >= 0
        own = np.take_along_axis(true_scores, np.where(real, items, 0), axis=1)
        # Each item has its own score, and the list the best scores that are to be had.
        assert np.abs(own[real] - scores[real]).max(initial=0) <= tolerance
        assert np.abs(best[real] - scores[real]).max(initial=0) <= tolerance
        assert np.isneginf(scores[~real]).all()
        assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in items)
        assert (scores[:, :-1] >= scores[:, 1:]).all()


@pytest.fixture(scope="session")
def reference() -> type[Reference]:
    """Factories and the exhaustive reference."""
    return Reference
