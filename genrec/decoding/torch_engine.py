"""In-process engine: the prompt is prefilled once, and all beams share its keys and values.

How, is told in `genrec.decoding.forward`. Works on unmodified Hugging Face decoders that attend by
such a mask over everything before, with or without adapters; a sliding window must hold the prompt
and its item. Not all do (ALiBi, chunked attention, recurrent models): each model is tried out once
against its own plain forward pass, and refused if the two differ.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from genrec.decoding.beam import (
    BeamResult,
    Beams,
    Normalizer,
    check_sid_token_ids,
    code_log_probs,
    finish,
    length_batches,
    normalize,
    search_in_batches,
    step,
    without_padding,
)
from genrec.decoding.forward import Forward, attention_reach, descend
from genrec.decoding.lm_head import WIDE, SidHead
from genrec.decoding.sampling import Draws, Sampler, check_sampler
from genrec.decoding.trie import CatalogueView, SidTrie
from genrec.decoding.trie_tensors import LevelFilter, TrieTensors

_SCORED_AT_ONCE = 1 << 24  # entries of a mask or a table of codes while items are scored
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
        config = model.config.get_text_config()
        layers = getattr(config, "layer_types", None) or []
        if other := set(layers) - {"full_attention", "sliding_attention"}:
            raise ValueError(
                f"the model has layers of {sorted(other)}; this engine needs full attention"
            )
        # Other names for windows, which a short trial can't see.
        local = [kind for kind in getattr(config, "attention_layers", ()) if kind != "global"]
        if local or getattr(config, "attention_chunk_size", None):
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
        prefilled: Forward | None = None,
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
            prefilled: the prompts, run already (see `branches`), with room for the beams.

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
            return self._search_batch(
                head, batch, k, width, tensors, filters, rows, sampler, prefilled
            )

        batches = self._batches(prompts) if prefilled is None else [np.arange(len(prompts))]
        return search_in_batches(
            search_batch, batches, tensors, k, beam_width, seen, progress, candidates
        )

    def branches(
        self,
        prompts: Sequence[Sequence[int]],
        branches: Sequence[Sequence[Sequence[int]]],
        width: int,
    ) -> Iterator[tuple[np.ndarray, list[list[int]], Forward]]:
        """Prompts with several texts behind each, run batch by batch; a prompt is prefilled once.

        Args:
            prompts: token ids, none empty.
            branches: texts behind each prompt, none empty; the same number for each prompt.
            width: beams that will be searched, or items that will be scored at once, behind a text.

        Yields:
            Rows of `prompts`; the prompt with each of its texts, prompt by prompt; and what
            `search` and `score` take as `prefilled` beside them, as often as they are called before
            the next batch.
        """
        longest = [[*p, *max(own, key=len)] for p, own in zip(prompts, branches, strict=True)]
        at_once = max(1, self.batch_size // max(map(len, branches), default=1))
        head, room = self._sid_head(), width * (self.trie.n_levels - 1)
        for rows in self._batches(longest, at_once):
            texts = [branches[row] for row in rows]
            whole = [[*prompts[row], *text] for row in rows for text in branches[row]]
            with torch.inference_mode(), _EvalMode(self.model):
                shared = [prompts[row] for row in rows]
                forward = Forward(head, shared, self.pad_token_id, room, texts)
            yield rows, whole, forward

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

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        items: np.ndarray,
        prefilled: Forward | None = None,
    ) -> np.ndarray:
        """Log-probabilities of given items, by teacher forcing over the shared prompt.

        Many items are scored part by part behind the same prefilled prompt, so memory is bounded.

        Args:
            prompts: token ids, one list per row.
            items: catalogue rows to score, (n, m); the same number for each prompt.
            prefilled: as in `search`.

        Returns:
            (n, m, L) float32 log-probability of each level; their sum is what `search` ranks by.
        """
        items = np.asarray(items)
        self.trie.check_items(items)
        tensors = self._filtered(None)
        head = self._sid_head()
        out = np.empty((*items.shape, self.trie.n_levels), dtype=np.float32)
        batches = self._batches(prompts) if prefilled is None else [np.arange(len(prompts))]
        if not items.shape[1]:
            return out
        for rows in batches:
            batch = [prompts[row] for row in rows.tolist()]
            out[rows] = self._score_batch(head, batch, items[rows], tensors, prefilled)
        return out

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and its item may have; None: no limit known."""
        return attention_reach(self.model)

    def _batches(
        self, prompts: Sequence[Sequence[int]], batch_size: int | None = None
    ) -> list[np.ndarray]:
        size = batch_size or self.batch_size
        return length_batches(prompts, self.trie.n_levels, self.context, size)

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
        forward: Forward | None = None,
    ) -> BeamResult:
        n_levels = self.trie.n_levels
        draws = None
        if sampler is not None:
            draws = Draws.start(sampler, n_levels, prompts, width, self.device)
        with _EvalMode(self.model):
            if forward is None:
                forward = Forward(head, prompts, self.pad_token_id, width * (n_levels - 1))
            forward.rewind()
            beams = Beams.start(len(prompts), self.device, draws)
            # Which decoded positions a beam sees, (U, B, decoded so far).
            ancestors: Tensor | None = None
            for level in range(n_levels):
                columns = head.open_columns(level, forward.states)
                users = None if filters is None else filters[level]
                beams = step(tensors, level, beams, columns, self.normalizer, users, width)
                if level + 1 < n_levels:
                    if (ended := without_padding(tensors, level, beams)) is not None:
                        beams = ended
                        break
                    ancestors = descend(ancestors, beams.parents)
                    forward.append(self.sid_ids[level][beams.codes], ancestors)
        return finish(tensors, beams, k, rows)

    @torch.inference_mode()
    def _score_batch(
        self,
        head: SidHead,
        prompts: list[Sequence[int]],
        items: np.ndarray,
        tensors: TrieTensors,
        forward: Forward | None,
    ) -> np.ndarray:
        below = self.trie.n_levels - 1
        at_once = min(items.shape[1], self._scored_at_once(len(prompts), max(map(len, prompts))))
        with _EvalMode(self.model):
            if forward is None:
                forward = Forward(head, prompts, self.pad_token_id, at_once * below)
            elif below:
                at_once = min(at_once, forward.room // below)
            parts = [
                self._score_part(forward, items[:, first : first + at_once], tensors)
                for first in range(0, items.shape[1], at_once)
            ]
        return np.concatenate(parts, axis=1)

    def _scored_at_once(self, users: int, prompt_length: int) -> int:
        """Items that may be scored together: each is a row of a mask that sees all before it."""
        each = _SCORED_AT_ONCE // users
        whole = not self._sid_head().split  # such a head gives logits over the vocabulary
        sizes = [len(ids) for ids in self.sid_ids if len(ids) <= WIDE]
        columns = self._embeddings.shape[0] if whole else max(sizes, default=1)
        below = self.trie.n_levels - 1
        # c items make a mask of c (P + c (L - 1)) entries.
        half = prompt_length / 2
        root = (math.sqrt(half**2 + below * each) - half) / below if below else each / prompt_length
        return max(1, min(int(root), each // columns))

    def _score_part(self, forward: Forward, items: np.ndarray, tensors: TrieTensors) -> np.ndarray:
        """Log-probabilities of some items behind the prompts, (U, m, L)."""
        n_levels, n_each = self.trie.n_levels, items.shape[1]
        leaf = self.trie.leaf_of_item[items]  # (U, m)
        out = torch.empty(*items.shape, n_levels, device=self.device)
        forward.rewind()
        ancestors: Tensor | None = None
        same = torch.arange(n_each, device=self.device).expand(items.shape)
        parent = torch.zeros(items.shape, dtype=torch.int64, device=self.device)
        for level in range(n_levels):
            node = torch.from_numpy(self.trie.node_of_leaf(level, leaf)).to(self.device)
            columns = forward.head.open_columns(level, forward.states)
            own = code_log_probs(tensors, level, parent, node, columns, self.normalizer)
            out[..., level] = own.masked_fill(tensors.ended(level, parent), 0.0)
            if level + 1 < n_levels:
                ancestors = descend(ancestors, same)
                codes = tensors.codes(level, node)
                forward.append(self.sid_ids[level][codes], ancestors)
            parent = node
        return out.cpu().numpy()


class _EvalMode:
    """Eval mode for a block; the model's own mode is restored (it may be in training).

    Looking is many times faster than setting, and served models need neither set nor restored.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.was_training = model, model.training

    def __enter__(self) -> None:
        if any(module.training for module in self.model.modules()):
            self.model.eval()

    def __exit__(self, *error: object) -> None:
        if self.was_training:
            self.model.train()
