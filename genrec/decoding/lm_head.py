"""The LM head, as far as a constrained search needs it: one level's columns and their normaliser.

A level has a few hundred codes, a vocabulary some 150,000 tokens. Where the score is normalised
over the level or the trie, only the level's columns are computed; over the full vocabulary the
normaliser is summed in blocks, so that no (beams x vocabulary) matrix is ever held in fp32. Both
are computed in fp32 whatever the model's dtype: bfloat16 logits tie, and a normaliser of rounded
logits would make log-probabilities positive.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from genrec.decoding.beam import Normalizer, normalize

logger = logging.getLogger(__name__)

_LOGITS_AT_ONCE = 1 << 26  # of the full vocabulary, in fp32: 256 MiB
_TOKENS_AT_ONCE = 1 << 14  # rows of a half-precision head that are held in fp32
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative; half precision: see below


class SidHead:
    """Hidden states in, log-probabilities of a level's codes out.

    A model that is a decoder and a plain linear head is taken apart, which is checked against the
    model's own logits once. Any other (a head wrapped by an adapter, capped or scaled logits,
    sharded weights) is asked for its logits as a whole.

    Args:
        model: any causal LM.
        sid_ids: per level the token id of each code, (codebook_size,).
        normalizer: of the scores.
    """

    def __init__(
        self, model: PreTrainedModel, sid_ids: list[Tensor], normalizer: Normalizer
    ) -> None:
        self.model, self.sid_ids, self.normalizer = model, sid_ids, normalizer
        self._decoder: nn.Module | None = None
        self._head: nn.Linear | None = None
        if parts := _taken_apart(model):
            self._decoder, self._head = parts

    @property
    def split(self) -> bool:
        """Whether hidden states are enough, and the model's own logits aren't needed."""
        return self._head is not None

    def states(self, last: Tensor | None = None, **inputs: Any) -> Tensor:
        """A forward pass.

        Args:
            last: keep only this position of each row, (U,); None keeps all.
            **inputs: of the model.

        Returns:
            Hidden states (U, T, d) where the model is `split`, else logits (U, T, V).
        """
        if self._decoder is not None:
            states = cast(Tensor, self._decoder(**inputs).last_hidden_state)
            if last is None:
                return states
            return states[torch.arange(len(last), device=last.device), last].unsqueeze(1)
        if last is None:
            return cast(Tensor, self.model(**inputs).logits)
        ends, which = torch.unique(last, return_inverse=True)
        logits = self.model(**inputs, logits_to_keep=ends).logits
        return cast(Tensor, logits[torch.arange(len(last), device=last.device), which].unsqueeze(1))

    def columns(self, level: int, states: Tensor) -> Tensor:
        """Log-probabilities of a level's codes, (U, B, codebook_size) float32.

        As `genrec.decoding.beam.normalize` defines them: "trie" leaves the logits as they are.

        Args:
            level: the level.
            states: from `states`, (U, B, d or V).
        """
        if self._head is None:
            return normalize(states, self.sid_ids[level], self.normalizer)
        ids = self.sid_ids[level]
        weight, bias = self._head.weight, self._head.bias
        columns = F.linear(
            states.float(), weight[ids].float(), None if bias is None else bias[ids].float()
        )
        if self.normalizer == "full":
            return columns - self._log_sum(states)
        return columns.log_softmax(-1) if self.normalizer == "level" else columns

    def _log_sum(self, states: Tensor) -> Tensor:
        """Log of the summed exponentials over the vocabulary, (U, B, 1)."""
        head = self._head
        assert head is not None
        weight, bias = head.weight, head.bias
        tokens = len(weight) if weight.dtype == torch.float32 else _TOKENS_AT_ONCE
        rows = max(1, _LOGITS_AT_ONCE // min(tokens, len(weight)))
        sums = []
        for part in states.flatten(0, -2).split(rows):
            blocks = [
                F.linear(
                    part.float(),
                    weight[at : at + tokens].float(),
                    None if bias is None else bias[at : at + tokens].float(),
                ).logsumexp(-1)
                for at in range(0, len(weight), tokens)
            ]
            sums.append(blocks[0] if len(blocks) == 1 else torch.stack(blocks).logsumexp(0))
        return torch.cat(sums).view(*states.shape[:-1], 1)


def _taken_apart(model: PreTrainedModel) -> tuple[nn.Module, nn.Linear] | None:
    """The decoder below the head, and the head, if the logits are just the one after the other."""
    # A PEFT model's adapters sit inside its base model's layers.
    base = cast(Any, model)
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    plain = type(head) is nn.Linear and type(head.weight) in (nn.Parameter, Tensor)
    if decoder is None or decoder is base or not plain:
        return None
    assert isinstance(head, nn.Linear)
    ids = torch.arange(2).unsqueeze(0).to(head.weight.device)
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits.float()
        parts = head(decoder(input_ids=ids, use_cache=False).last_hidden_state).float()
    scale = whole.abs().max()
    near = _TOLERANCE.get(head.weight.dtype, 2e-2) * scale
    if whole.shape != parts.shape or not bool(((whole - parts).abs() <= near).all()):
        if bool(torch.isnan(whole).any()):  # a broken model: the search says so
            return decoder, head
        logger.info(
            "%s does more to its logits than a linear head; they are computed whole",
            type(base).__name__,
        )
        return None
    return decoder, head
