"""Validation in reasoning mode: NDCG@k of lists that are merged from several sampled chains."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from genrec.decoding.beam import default_beam_width
from genrec.decoding.free_text import TextSampling
from genrec.decoding.torch_engine import TorchEngine
from genrec.evaluation.validation import BeamValidation
from genrec.metrics import gains, hits, target_rank
from genrec.reasoning import sample_chains, search_with_chains


class ReasoningValidation(BeamValidation):
    """Measures the model as `genrec reason` serves it, with the same random numbers each time.

    Args:
        tokenizer: the model's.
        marker: of `genrec.reasoning.decision_marker`.
        n_chains: per prompt.
        sampling: of the chains.
        **kwargs: as `BeamValidation` takes them; prompts are those of
            `genrec.reasoning.REASONING`.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        marker: str,
        n_chains: int,
        sampling: TextSampling,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.tokenizer, self.marker = tokenizer, marker
        self.n_chains, self.sampling = n_chains, sampling

    def per_row(self, engine: TorchEngine) -> tuple[np.ndarray, np.ndarray]:
        """HR@k and NDCG@k of each row's merged list. ``# (rows,)`` each."""
        chains = sample_chains(
            engine, self.tokenizer, self.prompts, self.n_chains, self.marker, self.sampling
        )
        width = default_beam_width(self.k)
        lists = search_with_chains(engine, self.prompts, chains, self.k, width, self.seen)
        items = np.full((len(lists), self.k), -1, dtype=np.int64)
        for row, found in enumerate(lists):
            items[row, : len(found.items)] = found.items
        rank = target_rank(items, self.targets)
        return hits(rank, self.k), gains(rank, self.k)
