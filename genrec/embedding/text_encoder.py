"""Item vectors from any sentence-transformers model, by name or from a local folder.

Reimers and Gurevych, "Sentence-BERT", EMNLP 2019. Needs the extra `text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def encode_texts(
    texts: Sequence[str],
    model_name_or_path: str,
    batch_size: int = 64,
    device: str | None = None,
    dtype: str = "float32",
    prompt: str | None = None,
    max_length: int | None = None,
    normalize: bool = True,
    progress: bool = False,
) -> npt.NDArray[np.float32]:
    """Sentence vectors of texts; the library sorts them by length, so padding is little.

    Args:
        texts: one per item. A blank one gets a zero row: it says nothing about its item, and the
            model would give all such items the same vector.
        model_name_or_path: a sentence-transformers model on the Hub, or its folder.
        batch_size: texts per forward pass.
        device: "cpu", "cuda:1", …; None: an accelerator where there is one.
        dtype: of the weights: "float32", "bfloat16" or "float16".
        prompt: text put before each of `texts`, such as "passage: " for E5.
        max_length: tokens that are read of a text; None: the model's own limit.
        normalize: scale rows to unit length.
        progress: show a progress bar.

    Returns:
        (n_texts, dim) float32.

    Raises:
        ValueError: the extra is not installed, or there is no such model.
    """
    model = _load(model_name_or_path, device, dtype, max_length)
    found = model.encode(
        [text if text.strip() else "" for text in texts],
        prompt=prompt,
        batch_size=batch_size,
        normalize_embeddings=normalize,
        show_progress_bar=progress,
        convert_to_numpy=True,
    )
    vectors = np.array(found, dtype=np.float32).reshape(len(texts), -1)
    vectors[[not text.strip() for text in texts]] = 0
    return vectors


@lru_cache(maxsize=1)  # shards ask for the same model again and again
def _load(name: str, device: str | None, dtype: str, max_length: int | None) -> SentenceTransformer:
    import torch

    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(
            'sentence-transformers is not installed; run: pip install "genrec[text]"'
        ) from error
    try:
        model = SentenceTransformer(
            name, device=device, model_kwargs={"dtype": getattr(torch, dtype)}
        )
    except OSError as error:
        raise ValueError(
            f"model_name_or_path={name!r} can't be loaded ({str(error).splitlines()[0]}); give a "
            "folder that holds the model, or a Hub name on a machine that reaches the Hub"
        ) from error
    if max_length is not None:
        limit = model.max_seq_length
        if limit is not None and max_length > limit:
            raise ValueError(
                f"max_length={max_length} exceeds the {limit} tokens that {name} reads"
            )
        model.max_seq_length = max_length
    return model
