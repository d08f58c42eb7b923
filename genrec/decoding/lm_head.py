"""The LM head, as far as a constrained search needs it: one level's columns and their normaliser.

A level has a few hundred codes, a vocabulary some 150,000 tokens. Where the score is normalised
over the level or the trie, only the level's columns are computed; over the full vocabulary the
normaliser is summed in blocks, so that no (beams x vocabulary) matrix is ever held in fp32. Both
are computed in fp32 whatever the model's dtype: bfloat16 logits tie, and a normaliser of rounded
logits would make log-probabilities positive. A level whose codes are as many as the items (item
tokens) is never computed whole: a beam's children are few of them (`HeadColumns`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from genrec.decoding.beam import Columns, Normalizer, normalize

warnings.filterwarnings("ignore", "Sparse CSR tensor support")  # torch calls it a beta

logger = logging.getLogger(__name__)

_LOGITS_AT_ONCE = 1 << 26  # of the full vocabulary, in fp32: 256 MiB
_TOKENS_AT_ONCE = 1 << 14  # rows of a half-precision head that are held in fp32
WIDE = 1024  # codes of a level from which on its columns are computed where they are asked for
_FEW = 32  # a column alone costs as much as so many in a matrix product
_NUMBERS_AT_ONCE = 1 << 22  # of head rows that are gathered, or of a wide level's columns
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
        self._spans = [rows_of(ids.tolist()) for ids in sid_ids]
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
        weight, bias = self._rows(level)
        columns = F.linear(states.float(), weight.float(), bias)
        if self.normalizer == "full":
            return columns - self._log_sum(states, self._head.weight, self._head.bias)
        return columns.log_softmax(-1) if self.normalizer == "level" else columns

    def open_columns(self, level: int, states: Tensor) -> Tensor | Columns:
        """`columns`, where the level has many codes computed only where they are asked for.

        Args:
            level: the level.
            states: from `states`, (U, B, d or V).
        """
        n_codes = len(self.sid_ids[level])
        if self._head is None or n_codes <= WIDE:
            return self.columns(level, states)
        n_logits = states.shape[:-1].numel() * n_codes
        if self.normalizer == "level" and n_logits <= _LOGITS_AT_ONCE:
            return self.columns(level, states)  # all of them are needed anyway
        rows, log_sum = self._rows(level), None
        if self.normalizer != "trie":
            over = rows if self.normalizer == "level" else (self._head.weight, self._head.bias)
            log_sum = self._log_sum(states, *over).flatten()
        shape = torch.Size([*states.shape[:-1], n_codes])
        return HeadColumns(shape, states.flatten(0, -2).float(), *rows, log_sum)

    def _rows(self, level: int) -> tuple[Tensor, Tensor | None]:
        """The head's weight and bias of a level's codes; without a copy where they lie together."""
        head, span = self._head, self._spans[level]
        assert head is not None
        at = self.sid_ids[level] if span is None else span
        return head.weight[at], None if head.bias is None else head.bias[at].float()

    @staticmethod
    def _log_sum(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Log of the summed exponentials over all logits, (U, B, 1)."""
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


@dataclass(frozen=True)
class HeadColumns:
    """A wide level's columns, computed where they are asked for.

    Attributes:
        shape: (U, B, codebook_size).
        states: (U * B, d) float32.
        weight: of the head, (codebook_size, d).
        bias: (codebook_size,) float32, or None.
        log_sum: the logarithm of the normaliser, (U * B,); None where logits stay as they are.
    """

    shape: torch.Size
    states: Tensor
    weight: Tensor
    bias: Tensor | None
    log_sum: Tensor | None

    def pick(self, rows: Tensor, codes: Tensor) -> Tensor:
        """Entries of codes (R, M) in rows (R,), (R, M) float32.

        Each as a scalar product of its own; where they are no small part of the level, from a
        product with all of the head's rows, a few beams at a time.
        """
        length = codes.shape[1]
        if length * _FEW > len(self.weight):
            made, numbers = self._of_all, len(self.weight)
        elif self.weight.dtype == torch.float32 and self.weight.device.type == "cpu":
            made, numbers = self._sampled, 1
        else:
            made, numbers = self._gathered, length * self.weight.shape[1]
        at_once = max(1, _NUMBERS_AT_ONCE // numbers)
        parts = zip(rows.split(at_once), codes.split(at_once), strict=True)
        logits = torch.cat([made(self.states[part], own) for part, own in parts])
        if self.bias is not None:
            logits = logits + self.bias[codes]
        return logits if self.log_sum is None else logits - self.log_sum[rows].unsqueeze(1)

    def _of_all(self, states: Tensor, codes: Tensor) -> Tensor:
        return F.linear(states, self.weight.float()).gather(1, codes.long())

    def _sampled(self, states: Tensor, codes: Tensor) -> Tensor:
        """By a kernel that computes chosen entries of a product, and gathers nothing."""
        starts = torch.arange(0, codes.numel() + 1, codes.shape[1], dtype=codes.dtype)
        zero = torch.zeros(codes.numel())
        size = (len(codes), len(self.weight))
        chosen = torch.sparse_csr_tensor(
            starts, codes.flatten(), zero, size, check_invariants=False
        )
        made = torch.sparse.sampled_addmm(chosen, states, self.weight.t(), beta=0.0)
        return made.values().view(codes.shape)

    def _gathered(self, states: Tensor, codes: Tensor) -> Tensor:
        rows = F.embedding(codes, self.weight).float()  # (R, M, d)
        return torch.bmm(rows, states.unsqueeze(-1)).squeeze(-1)


def rows_of(ids: Sequence[int]) -> slice | None:
    """Tokens of a level as a slice, which copies nothing: those added together lie side by side."""
    first = ids[0]
    together = list(ids) == list(range(first, first + len(ids)))
    return slice(first, first + len(ids)) if together else None


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
