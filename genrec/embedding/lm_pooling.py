"""Item vectors pooled from the hidden states of any Hugging Face language model.

The mean over tokens (Sentence-BERT) or the last token's state, which is the only one of a causal
model that has read the whole text (Neelakantan et al. 2022; E5-Mistral; Qwen3-Embedding).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

POOLINGS = ("mean", "last")


def lm_vectors(
    texts: Sequence[str],
    model_name_or_path: str,
    pooling: str = "mean",
    batch_size: int = 16,
    device: str | None = None,
    dtype: str = "float32",
    prompt: str | None = None,
    max_length: int | None = None,
    normalize: bool = True,
    progress: bool = False,
) -> npt.NDArray[np.float32]:
    """Vectors of texts from the last hidden states of a causal or encoder language model.

    Texts are batched by length and padded on the right, whatever the tokenizer prefers: positions
    then count from each text's own start, so a text's vector does not depend on its batch.

    Args:
        texts: one per item; a blank one gets a zero row.
        model_name_or_path: anything that ``AutoModel`` loads, except encoder-decoders.
        pooling: "mean" over a text's tokens, or its "last" token.
        batch_size: texts per forward pass.
        device: "cpu", "cuda:1", …; None: CUDA where there is one.
        dtype: of the weights: "float32", "bfloat16" or "float16"; pooling is always float32.
        prompt: text put before each of `texts`.
        max_length: tokens that are read of a text; None: 512, or the model's limit if less.
        normalize: scale rows to unit length.
        progress: show a progress bar.

    Returns:
        (n_texts, hidden_size) float32.

    Raises:
        ValueError: an unknown pooling, no such model, or a `max_length` beyond the model's.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling={pooling!r} is not known; choose one of {', '.join(POOLINGS)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, model = _load(model_name_or_path, device, dtype)
    limit = _limit(tokenizer, model, max_length)
    tokens = [
        tokenizer(f"{prompt or ''}{text}", truncation=True, max_length=limit)["input_ids"]
        if text.strip()
        else []
        for text in texts
    ]
    vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    order = sorted((i for i, ids in enumerate(tokens) if ids), key=lambda i: -len(tokens[i]))
    for start in tqdm(range(0, len(order), batch_size), disable=not progress, desc="encode"):
        rows = order[start : start + batch_size]  # longest first: memory runs out at once or never
        ids, mask = _right_padded([tokens[i] for i in rows], tokenizer.pad_token_id or 0)
        with torch.inference_mode():
            states = model(input_ids=ids.to(device), attention_mask=mask.to(device))
            vectors[rows] = pool(states.last_hidden_state, mask.to(device), pooling).cpu().numpy()
    if normalize:
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector per text from its tokens' states; padding may be on either side.

    Args:
        hidden: ``# (batch, length, dim)``
        mask: 1 for tokens, 0 for padding; at least one token each. ``# (batch, length)``
        pooling: one of `POOLINGS`.

    Returns:
        ``# (batch, dim)`` float32
    """
    hidden = hidden.float()
    if pooling == "last":
        places = torch.arange(mask.shape[1], device=mask.device)
        last = (places * mask).argmax(dim=1)  # (batch,)
        return hidden[torch.arange(len(hidden), device=mask.device), last]
    # Not a product with the mask: states of padding may be NaN.
    kept = hidden.masked_fill(mask[..., None] == 0, 0.0)
    return kept.sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _right_padded(tokens: list[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.full((len(tokens), max(map(len, tokens))), padding)
    mask = torch.zeros_like(ids)
    for row, found in enumerate(tokens):
        ids[row, : len(found)] = torch.tensor(found)
        mask[row, : len(found)] = 1
    return ids, mask


def _limit(tokenizer: Any, model: Any, max_length: int | None) -> int:
    """Tokens to read of a text. Tokenizers say 10^30 where they know no limit."""
    places = getattr(model.config, "max_position_embeddings", None)
    most = min(tokenizer.model_max_length, places or tokenizer.model_max_length)
    if max_length is not None and max_length > most:
        raise ValueError(f"max_length={max_length} exceeds the {most} tokens that the model reads")
    return max_length or min(512, most)


@lru_cache(maxsize=1)  # shards ask for the same model again and again
def _load(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, dtype=getattr(torch, dtype))
    except OSError as error:
        raise ValueError(
            f"model_name_or_path={name!r} can't be loaded ({str(error).splitlines()[0]}); give a "
            "folder that holds the model, or a Hub name on a machine that reaches the Hub"
        ) from error
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder; method=lm takes a causal or an encoder model, and "
            "method=sentence-transformers takes models such as Sentence-T5"
        )
    logger.info("%s: %s on %s, %s", name, type(model).__name__, device, dtype)
    return tokenizer, model.eval().to(device)
