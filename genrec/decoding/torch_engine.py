"""In-process engine: the prompt is prefilled once, and all beams share its keys and values.

All beams of a user are query positions of one sequence. Keys and values are appended in place to
memory that is taken once per batch, and a 4-D mask of ancestors says what each beam sees, so
nothing is reordered or copied between levels. (Inside a layer, transformers repeats the keys and
values of grouped-query attention for its kernel.)

Works on unmodified Hugging Face decoders that attend by such a mask over everything before, with or
without adapters. Not all do (ALiBi, local windows, recurrent models): each model is tried out once
against its own plain forward pass, and refused if the two differ.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from genrec.decoding.beam import (
    BeamResult,
    Beams,
    Normalizer,
    check_sid_token_ids,
    child_log_probs,
    finish,
    length_batches,
    normalize,
    search_in_batches,
    step,
    without_padding,
)
from genrec.decoding.lm_head import SidHead
from genrec.decoding.sampling import Draws, Sampler, check_sampler
from genrec.decoding.trie import CatalogueView, SidTrie
from genrec.decoding.trie_tensors import LevelFilter, TrieTensors

_TRIED: weakref.WeakSet[Any] = weakref.WeakSet()  # models whose tree attention was tried out


class TorchEngine:
    """Constrained beam search and exact scoring with a Hugging Face causal LM.

    Args:
        model: any decoder that takes a 4-D attention mask and a cache; used as it is (device,
            dtype, adapters) and put into eval mode while an engine call runs.
        trie: trie of the SID map that the model was trained on (or of a descendant).
        sid_token_ids: per level the token id of each code, (codebook_size,) each.
        pad_token_id: fills short prompts; never attended to.
        normalizer: of the scores, over the unfiltered trie (see `genrec.decoding.beam`).
        batch_size: users decoded together; prompts are sorted by length first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trie: SidTrie,
        sid_token_ids: Sequence[Sequence[int]],
        pad_token_id: int,
        normalizer: Normalizer = "full",
        batch_size: int = 64,
    ) -> None:
        self.model, self.trie = model, trie
        self.pad_token_id, self.normalizer, self.batch_size = pad_token_id, normalizer, batch_size
        check_sid_token_ids(sid_token_ids, trie, self._embeddings.shape[0])
        self.sid_ids = [torch.tensor(ids, device=self.device) for ids in sid_token_ids]
        self._tensors = TrieTensors(trie, None, self.device)
        self._head: SidHead | None = None
        window = getattr(model.config, "sliding_window", None)
        layers = getattr(model.config, "layer_types", None) or []
        if other := set(layers) - {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"the model has layers of {sorted(other)}; this engine needs full attention"
            )
        if window and (not layers or "sliding_attention" in layers):
            raise ValueError(
                f"the model attends through a sliding window of {window}; this engine's ancestor "
                "mask needs full attention (set use_sliding_window=false if prompts fit the window)"
            )
        # Other names for windows, which a short trial can't see.
        local = [kind for kind in getattr(model.config, "attention_layers", ()) if kind != "global"]
        if local or getattr(model.config, "attention_chunk_size", None):
            raise ValueError(
                "the model has local or chunked attention; this engine's ancestor mask needs full "
                "attention"
            )

    @property
    def device(self) -> torch.device:
        """Where the model lies now."""
        return self._embeddings.device

    @property
    def _embeddings(self) -> Tensor:
        return cast(Tensor, self.model.get_input_embeddings().weight)

    def search(
        self,
        prompts: Sequence[Sequence[int]],
        k: int,
        beam_width: int,
        seen: Sequence[np.ndarray] | None = None,
        view: CatalogueView | None = None,
        progress: Callable[[int], object] | None = None,
        candidates: Sequence[np.ndarray | None] | None = None,
        sampler: Sampler | None = None,
    ) -> BeamResult:
        """The k best items for each prompt, or k items that are drawn.

        Args:
            prompts: token ids, one list per user, none empty.
            k: items per list; at most `beam_width`.
            beam_width: prefixes kept per level. A sampler keeps k, which is exact for it.
            seen: catalogue rows that each user must not get, or None.
            view: catalogue view that holds for all users, or None.
            progress: called with the number of users of each finished batch.
            candidates: the only catalogue rows that each user may get (None: all), or None.
            sampler: what to draw (see `genrec.decoding.sampling`), or None: the best items.

        Returns:
            Lists in the order of `prompts`.
        """
        tensors = self._filtered(view)
        head = self._sid_head()
        if sampler is not None:
            check_sampler(sampler, self.normalizer, self.trie.n_levels)
        width = beam_width if sampler is None else k

        def search_batch(rows: np.ndarray, filters: list[LevelFilter] | None) -> BeamResult:
            batch = [prompts[row] for row in rows]
            return self._search_batch(head, batch, k, width, tensors, filters, rows, sampler)

        return search_in_batches(
            search_batch, self._batches(prompts), tensors, k, beam_width, seen, progress, candidates
        )

    def _sid_head(self) -> SidHead:
        """The head, looked at once: whether it can be taken apart doesn't change."""
        if self._head is None or self._head.normalizer != self.normalizer:
            with _EvalMode(self.model):
                self._head = SidHead(self.model, self.sid_ids, self.normalizer)
                if self.model not in _TRIED:
                    self._try_out(self._head)
                    _TRIED.add(self.model)
        return self._head

    @torch.inference_mode()
    def _try_out(self, head: SidHead) -> None:
        """Compare a small tree of beams with plain forward passes over its paths.

        Raises:
            ValueError: they differ: the model doesn't attend by mask, position and cache alone.
        """
        some = [int(ids[i % len(ids)]) for i in range(4) for ids in self.sid_ids]
        prompts = [(some * 8)[:7], (some[::-1] * 8)[:3]]  # of unequal length
        first = torch.tensor([some[:1] + some[-1:]] * 2, device=self.device)
        then = torch.tensor([some[-1:] + some[1:2]] * 2, device=self.device)
        own = torch.eye(2, dtype=torch.bool, device=self.device).expand(2, -1, -1)
        swapped = own.flip(1)  # each goes on from the other's place
        try:
            forward = Forward(head, prompts, self.pad_token_id, 4)
            forward.append(first, own)
            forward.append(then, torch.cat([swapped, own], dim=-1))
            made = head.columns(0, forward.states)
            paths = [
                [*prompt, int(first[0, 1 - beam]), int(then[0, beam])]
                for prompt in prompts
                for beam in (0, 1)
            ]
            plain = [
                self.model(input_ids=torch.tensor([p], device=self.device), use_cache=False).logits
                for p in paths
            ]
        except (TypeError, RuntimeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(
                f"{type(self.model).__name__} can't be decoded by this engine: it fails on a cache "
                f"and a 4-D attention mask ({error})"
            ) from error
        last = torch.stack([logits[0, -1] for logits in plain]).view(2, 2, -1)
        true = normalize(last, self.sid_ids[0], self.normalizer)
        half = self.model.dtype in (torch.bfloat16, torch.float16)
        near = (0.1 if half else 1e-3) * max(1.0, float(true.abs().max()))
        if not bool(((made - true).abs() <= near).all()) and not bool(true.isnan().any()):
            raise ValueError(
                f"{type(self.model).__name__} can't be decoded by this engine: over a tree of "
                f"beams its log-probabilities differ by {float((made - true).abs().max()):.2g} "
                "from a plain forward pass; it doesn't attend by mask and position over all that "
                "is before"
            )

    def _filtered(self, view: CatalogueView | None) -> TrieTensors:
        """The trie's tensors under a view; those of the last one are kept."""
        if self._tensors.device != self.device:
            self._tensors = TrieTensors(self.trie, view, self.device)
        else:
            self._tensors = self._tensors.through(view)
        return self._tensors

    def score(self, prompts: Sequence[Sequence[int]], items: np.ndarray) -> np.ndarray:
        """Log-probabilities of given items, by teacher forcing over the shared prompt.

        Args:
            prompts: token ids, one list per row.
            items: catalogue rows to score, (n, m); the same number for each prompt.

        Returns:
            (n, m, L) float32 log-probability of each level; their sum is what `search` ranks by.
        """
        items = np.asarray(items)
        self.trie.check_items(items)
        tensors = self._filtered(None)
        head = self._sid_head()
        out = np.empty((*items.shape, self.trie.n_levels), dtype=np.float32)
        for rows in self._batches(prompts):
            out[rows] = self._score_batch(
                head, [prompts[row] for row in rows], items[rows], tensors
            )
        return out

    def _batches(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        context = getattr(self.model.config, "max_position_embeddings", None)
        return length_batches(prompts, self.trie.n_levels, context, self.batch_size)

    @torch.inference_mode()
    def _search_batch(
        self,
        head: SidHead,
        prompts: list[Sequence[int]],
        k: int,
        width: int,
        tensors: TrieTensors,
        filters: list[LevelFilter] | None,
        rows: np.ndarray,
        sampler: Sampler | None = None,
    ) -> BeamResult:
        n_levels = self.trie.n_levels
        draws = None
        if sampler is not None:
            draws = Draws.start(sampler, n_levels, prompts, self.device)
        with _EvalMode(self.model):
            forward = Forward(head, prompts, self.pad_token_id, width * (n_levels - 1))
            beams = Beams.start(len(prompts), self.device, draws)
            # Which decoded positions a beam sees, (U, B, decoded so far).
            ancestors: Tensor | None = None
            for level in range(n_levels):
                columns = head.columns(level, forward.states)
                users = None if filters is None else filters[level]
                beams = step(tensors, level, beams, columns, self.normalizer, users, width)
                if level + 1 < n_levels:
                    if (ended := without_padding(tensors, level, beams)) is not None:
                        beams = ended
                        break
                    ancestors = _descend(ancestors, beams.parents)
                    forward.append(self.sid_ids[level][beams.codes], ancestors)
        return finish(tensors, beams, k, rows)

    @torch.inference_mode()
    def _score_batch(
        self, head: SidHead, prompts: list[Sequence[int]], items: np.ndarray, tensors: TrieTensors
    ) -> np.ndarray:
        n_levels, n_each = self.trie.n_levels, items.shape[1]
        leaf = self.trie.leaf_of_item[items]  # (U, m)
        nodes = [
            torch.from_numpy(self.trie.node_of_leaf(level, leaf)).to(self.device)
            for level in range(n_levels)
        ]
        out = torch.empty(*items.shape, n_levels, device=self.device)
        with _EvalMode(self.model):
            forward = Forward(head, prompts, self.pad_token_id, n_each * (n_levels - 1))
            ancestors: Tensor | None = None
            same = torch.arange(n_each, device=self.device).expand(items.shape)
            for level in range(n_levels):
                parent = nodes[level - 1] if level else torch.zeros_like(nodes[0])
                child, exists = tensors.expand(level, parent)
                columns = head.columns(level, forward.states).expand(-1, n_each, -1)
                log_probs = child_log_probs(
                    columns, tensors.codes(level, child), exists, self.normalizer
                )
                at = nodes[level] - child[..., 0]
                own = log_probs.gather(-1, at.unsqueeze(-1)).squeeze(-1)
                out[..., level] = own.masked_fill(tensors.ended(level, parent), 0.0)
                if level + 1 < n_levels:
                    ancestors = _descend(ancestors, same)
                    codes = tensors.codes(level, nodes[level])
                    forward.append(self.sid_ids[level][codes], ancestors)
        return out.cpu().numpy()


class Forward:
    """A batch on its way through the model: the prompts, then one token per beam and level.

    Attributes:
        states: what `SidHead.columns` takes, (U, 1, …) after the prompts, (U, B, …) behind.
    """

    def __init__(
        self, head: SidHead, prompts: Sequence[Sequence[int]], pad_token_id: int, room: int
    ) -> None:
        """Run the prompts, right-padded: causality alone keeps padding out; no mask is needed.

        Args:
            head: the model.
            prompts: token ids.
            pad_token_id: fills short ones.
            room: tokens that will be appended at most.
        """
        lengths = np.array([len(prompt) for prompt in prompts])
        padded = np.full((len(prompts), int(lengths.max())), pad_token_id, dtype=np.int64)
        padded[np.arange(padded.shape[1]) < lengths[:, None]] = np.concatenate(prompts)
        device = head.sid_ids[0].device
        ids = torch.from_numpy(padded).to(device)
        self.head, self.dtype = head, head.model.dtype
        self.next_position = torch.from_numpy(lengths).to(device).unsqueeze(1)  # (U, 1)
        self.visible = torch.arange(ids.shape[1], device=device) < self.next_position  # (U, P)
        layer = partial(_AppendedLayer, ids.shape[1] + room)
        self.cache = Cache(layer_class_to_replicate=cast(Any, layer))
        self.states = head.states(
            last=self.next_position[:, 0] - 1,
            input_ids=ids,
            past_key_values=self.cache,
            use_cache=True,
        )

    def append(self, ids: Tensor, ancestors: Tensor) -> None:
        """One more token per beam.

        Args:
            ids: tokens, (U, B).
            ancestors: decoded columns that each beam sees, itself included, (U, B, D) bool.
        """
        n_beams = ids.shape[1]
        sees = torch.cat([self.visible.unsqueeze(1).expand(-1, n_beams, -1), ancestors], dim=-1)
        mask = torch.zeros(sees.shape, dtype=self.dtype, device=ids.device)
        mask = mask.masked_fill(~sees, torch.finfo(self.dtype).min).unsqueeze(1)  # (U, 1, B, P + D)
        self.states = self.head.states(
            input_ids=ids,
            position_ids=self.next_position.expand(-1, n_beams),
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.next_position = self.next_position + 1


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
        self.length = end
        self.keys, self.values = self._all_keys[:, :, :end], self._all_values[:, :, :end]
        return self.keys, self.values


def _descend(ancestors: Tensor | None, parents: Tensor) -> Tensor:
    """Visibility of decoded columns for the next beams: their parent's, plus themselves."""
    users, width = parents.shape
    own = torch.eye(width, dtype=torch.bool, device=parents.device).expand(users, -1, -1)
    if ancestors is None:
        return own
    inherited = ancestors.gather(1, parents.unsqueeze(-1).expand(-1, -1, ancestors.shape[-1]))
    return torch.cat([inherited, own], dim=-1)


class _EvalMode:
    """Eval mode for a block; the model's own mode is restored (it may be in training)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.was_training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        self.model.train(self.was_training)
