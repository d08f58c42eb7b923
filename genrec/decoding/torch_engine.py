"""In-process engine: the prompt is prefilled once, and all beams share its keys and values.

All beams of a user are query positions of one sequence. Keys and values are only ever appended, and
a 4-D mask of ancestors says what each beam sees, so nothing is copied or reordered between levels.
Works on unmodified Hugging Face decoders, with or without adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from genrec.decoding.beam import (
    BeamResult,
    Beams,
    Normalizer,
    TrieTensors,
    advance,
    check_sid_token_ids,
    child_log_probs,
    finish,
    length_batches,
    normalize,
    search_in_batches,
)
from genrec.decoding.sampling import Draws, Sampler, check_sampler
from genrec.decoding.trie import CatalogueView, SidTrie


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
            sampler: what to draw (see `genrec.decoding.sampling`), or None: the best items.

        Returns:
            Lists in the order of `prompts`.
        """
        tensors = TrieTensors(self.trie, view, self.device)
        if sampler is not None:
            check_sampler(sampler, self.normalizer, self.trie.n_levels)
        width = beam_width if sampler is None else k

        def search_batch(rows: np.ndarray, dead: list[Tensor] | None) -> BeamResult:
            batch = [prompts[row] for row in rows]
            return self._search_batch(batch, k, width, tensors, dead, rows, sampler)

        batches = self._batches(prompts)
        return search_in_batches(search_batch, batches, tensors, k, beam_width, seen, progress)

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
        tensors = TrieTensors(self.trie, None, self.device)
        out = np.empty((*items.shape, self.trie.n_levels), dtype=np.float32)
        for rows in self._batches(prompts):
            out[rows] = self._score_batch([prompts[row] for row in rows], items[rows], tensors)
        return out

    def _batches(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        context = getattr(self.model.config, "max_position_embeddings", None)
        return length_batches(prompts, self.trie.n_levels, context, self.batch_size)

    @torch.inference_mode()
    def _search_batch(
        self,
        prompts: list[Sequence[int]],
        k: int,
        width: int,
        tensors: TrieTensors,
        dead: list[Tensor] | None,
        rows: np.ndarray,
        sampler: Sampler | None = None,
    ) -> BeamResult:
        draws = None
        if sampler is not None:
            draws = Draws.start(sampler, self.trie.n_levels, prompts, self.device)
        with _EvalMode(self.model):
            cache, visible, lengths, logits = self._prefill(prompts)
            beams = Beams.start(len(prompts), self.device, draws)
            logits = logits.unsqueeze(1)  # (U, 1, V)
            # Which decoded positions a beam sees, (U, B, decoded so far).
            ancestors: Tensor | None = None
            for level in range(self.trie.n_levels):
                nodes = beams.nodes if level else torch.zeros_like(beams.nodes)
                child, exists = tensors.expand(level, nodes)
                columns = normalize(logits, self.sid_ids[level], self.normalizer)
                log_probs = child_log_probs(
                    columns, tensors.tokens[level][child], exists, self.normalizer
                )
                allowed = tensors.allowed(level, child, None if dead is None else dead[level])
                log_probs = log_probs.masked_fill(~allowed, -torch.inf)
                beams = advance(tensors, level, beams, child, log_probs, width)
                if level + 1 < self.trie.n_levels:
                    ancestors = _descend(ancestors, beams.parents)
                    ids = self.sid_ids[level][beams.codes]
                    logits = self._forward(ids, lengths + level, visible, ancestors, cache)
        return finish(tensors, beams, k, rows)

    @torch.inference_mode()
    def _score_batch(
        self, prompts: list[Sequence[int]], items: np.ndarray, tensors: TrieTensors
    ) -> np.ndarray:
        n_levels = self.trie.n_levels
        leaf = self.trie.leaf_of_item[items]  # (U, m)
        nodes = [
            torch.from_numpy(self.trie.node_of_leaf(level, leaf)).to(self.device)
            for level in range(n_levels)
        ]
        out = torch.empty(*items.shape, n_levels, device=self.device)
        with _EvalMode(self.model):
            cache, visible, lengths, logits = self._prefill(prompts)
            logits = logits.unsqueeze(1).expand(-1, items.shape[1], -1)
            ancestors: Tensor | None = None
            same = torch.arange(items.shape[1], device=self.device).expand(items.shape)
            for level in range(n_levels):
                parent = nodes[level - 1] if level else torch.zeros_like(nodes[0])
                child, exists = tensors.expand(level, parent)
                columns = normalize(logits, self.sid_ids[level], self.normalizer)
                log_probs = child_log_probs(
                    columns, tensors.tokens[level][child], exists, self.normalizer
                )
                at = nodes[level] - child[..., 0]
                out[..., level] = log_probs.gather(-1, at.unsqueeze(-1)).squeeze(-1)
                if level + 1 < n_levels:
                    ancestors = _descend(ancestors, same)
                    ids = self.sid_ids[level][tensors.tokens[level][nodes[level]]]
                    logits = self._forward(ids, lengths + level, visible, ancestors, cache)
        return out.cpu().numpy()

    def _prefill(self, prompts: list[Sequence[int]]) -> tuple[DynamicCache, Tensor, Tensor, Tensor]:
        """Run the prompts, right-padded: causality alone keeps padding out, so no mask is needed.

        Returns:
            The cache, which prompt columns are real (U, P), the lengths (U, 1), last logits (U, V).
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids = torch.full((len(prompts), int(lengths.max())), self.pad_token_id)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.as_tensor(prompt)
        ids, lengths = ids.to(self.device), lengths.to(self.device)
        ends, which = torch.unique(lengths - 1, return_inverse=True)
        cache = DynamicCache(config=self.model.config)
        # Logits only where some prompt ends.
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=ends)
        logits = out.logits[torch.arange(len(prompts), device=self.device), which]
        visible = torch.arange(ids.shape[1], device=self.device) < lengths.unsqueeze(1)
        return cache, visible, lengths.unsqueeze(1), logits

    def _forward(
        self, ids: Tensor, position: Tensor, visible: Tensor, ancestors: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Logits (U, B, V) after one more token per beam.

        Args:
            ids: tokens, (U, B).
            position: their position, (U, 1).
            visible: real prompt columns, (U, P).
            ancestors: decoded columns that each beam sees, itself included, (U, B, D) bool.
            cache: keys and values so far.
        """
        users, n_beams = ids.shape
        sees = torch.cat([visible.unsqueeze(1).expand(-1, n_beams, -1), ancestors], dim=-1)
        dtype = self.model.dtype
        mask = torch.zeros(sees.shape, dtype=dtype, device=self.device)
        mask = mask.masked_fill(~sees, torch.finfo(dtype).min).unsqueeze(1)  # (U, 1, B, P + D)
        return self.model(
            input_ids=ids,
            position_ids=position.expand(-1, n_beams),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).logits


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
