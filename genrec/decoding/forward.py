"""A batch of prompts on its way through a Hugging Face decoder, with many beams behind each.

All beams of a row are query positions of one sequence. Keys and values are appended in place to
memory that is taken once per batch, and a 4-D mask of ancestors says what each beam sees, so
nothing is reordered or copied between levels. (Inside a layer, transformers repeats the keys and
values of grouped-query attention for its kernel.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from genrec.decoding.lm_head import SidHead


def attention_reach(model: PreTrainedModel) -> int | None:
    """Longest sequence over which a model attends to all that is before; None: no limit known.

    That is the context, or the sliding window of a model whose layers have one: within it such
    layers are like any others.
    """
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None) if "sliding_attention" in layers else None
    limits = [getattr(config, "max_position_embeddings", None), window]
    return min((limit for limit in limits if limit), default=None)


class Forward:
    """A batch on its way through the model: the prompts, then one token per beam and level.

    Attributes:
        states: what `SidHead.columns` takes, (U, 1, …) after the prompts, (U, B, …) behind.
        room: tokens that may be appended behind the prompts.
    """

    def __init__(
        self,
        head: SidHead,
        prompts: Sequence[Sequence[int]],
        pad_token_id: int,
        room: int,
        branches: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> None:
        """Run the prompts, right-padded: causality alone keeps padding out; no mask is needed.

        Args:
            head: the model.
            prompts: token ids.
            pad_token_id: fills short ones.
            room: tokens that will be appended at most.
            branches: texts that go on from each prompt, none empty and equally many for each: each
                of them becomes a row, and a prompt's rows share what was computed of the prompt.
        """
        ids, lengths = _padded(prompts, pad_token_id)
        device = head.sid_ids[0].device
        ids, lengths = ids.to(device), lengths.to(device)
        self.head, self.dtype, self.room = head, head.model.dtype, room
        self.next_position = lengths.unsqueeze(1)  # (U, 1)
        self.visible = torch.arange(ids.shape[1], device=device) < self.next_position  # (U, P)
        longest = max((len(text) for own in branches or () for text in own), default=0)
        layer = partial(_AppendedLayer, ids.shape[1] + longest + room)
        self.cache = Cache(layer_class_to_replicate=cast(Any, layer))
        self.states = head.states(
            last=self.next_position[:, 0] - 1,
            input_ids=ids,
            past_key_values=self.cache,
            use_cache=True,
        )
        if branches is not None:
            self._branch(branches, pad_token_id)
        self._start = self.next_position, self.states

    def _branch(self, branches: Sequence[Sequence[Sequence[int]]], pad_token_id: int) -> None:
        """Make a row of each text behind its prompt, and run the texts."""
        n_each = len(branches[0])
        ids, lengths = _padded([text for own in branches for text in own], pad_token_id)
        ids, lengths = (x.to(self.visible.device) for x in (ids, lengths))
        for layer in self._layers:
            layer.batch_repeat_interleave(n_each)
        position = self.next_position.repeat_interleave(n_each, 0)
        visible = self.visible.repeat_interleave(n_each, 0)
        at = torch.arange(ids.shape[1], device=ids.device)
        before = visible.unsqueeze(1).expand(-1, len(at), -1)
        itself = (at <= at.unsqueeze(1)).expand(len(ids), -1, -1)
        self.states = self.head.states(
            last=lengths - 1,
            input_ids=ids,
            position_ids=position + at,
            attention_mask=self._mask(torch.cat([before, itself], dim=-1)),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.visible = torch.cat([visible, at < lengths.unsqueeze(1)], dim=1)
        self.next_position = position + lengths.unsqueeze(1)

    @property
    def _layers(self) -> list[_AppendedLayer]:
        return cast("list[_AppendedLayer]", self.cache.layers)

    def _mask(self, sees: Tensor) -> Tensor:
        """What is added to attention scores, (U, 1, Q, K), from what each query sees, (U, Q, K)."""
        mask = torch.zeros(sees.shape, dtype=self.dtype, device=sees.device)
        return mask.masked_fill_(~sees, torch.finfo(self.dtype).min).unsqueeze(1)

    def rewind(self) -> None:
        """Forget what was appended behind the prompts (and their branches)."""
        self.next_position, self.states = self._start
        for layer in self._layers:
            layer.rewind(self.visible.shape[1])

    def append(self, ids: Tensor, ancestors: Tensor) -> None:
        """One more token per beam.

        Args:
            ids: tokens, (U, B).
            ancestors: decoded columns that each beam sees, itself included, (U, B, D) bool.
        """
        n_beams = ids.shape[1]
        sees = torch.cat([self.visible.unsqueeze(1).expand(-1, n_beams, -1), ancestors], dim=-1)
        self.states = self.head.states(
            input_ids=ids,
            position_ids=self.next_position.expand(-1, n_beams),
            attention_mask=self._mask(sees),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.next_position = self.next_position + 1


def _padded(texts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, (n, longest), and their lengths, (n,)."""
    lengths = np.array([len(text) for text in texts])
    padded = np.full((len(texts), int(lengths.max())), pad_token_id, dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(texts)
    return torch.from_numpy(padded), torch.from_numpy(lengths)


class _AppendedLayer(DynamicLayer):
    """One layer's keys and values in memory of a known size; growing copies nothing.

    Args:
        room: positions that it must hold.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.length = room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory."""
        self.dtype, self.device = key_states.dtype, key_states.device
        users, heads = key_states.shape[:2]
        self._all_keys = key_states.new_empty(users, heads, self.room, key_states.shape[-1])
        self._all_values = value_states.new_empty(users, heads, self.room, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append, and return all so far, (U, heads, length, head_dim) each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self._all_keys[:, :, self.length : end] = key_states
        self._all_values[:, :, self.length : end] = value_states
        return self.rewind(end)

    def rewind(self, length: int) -> tuple[Tensor, Tensor]:
        """Hold that many positions from now on; returns them."""
        keys, values = self._all_keys[:, :, :length], self._all_values[:, :, :length]
        self.length, self.keys, self.values = length, keys, values
        return keys, values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._all_keys = self._all_keys.repeat_interleave(repeats, 0)
        self._all_values = self._all_values.repeat_interleave(repeats, 0)
        self.rewind(self.length)


def descend(ancestors: Tensor | None, parents: Tensor) -> Tensor:
    """Visibility of decoded columns for the next beams: their parent's, plus themselves."""
    users, width = parents.shape
    own = torch.eye(width, dtype=torch.bool, device=parents.device).expand(users, -1, -1)
    if ancestors is None:
        return own
    inherited = ancestors.gather(1, parents.unsqueeze(-1).expand(-1, -1, ancestors.shape[-1]))
    return torch.cat([inherited, own], dim=-1)
