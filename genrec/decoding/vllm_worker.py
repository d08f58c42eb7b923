"""Constrained beam search inside vLLM's worker: its weights, attention and KV cache, no requests.

The prompts of a batch are prefilled once. From then on every beam is a sequence of its own whose
block table begins with the prompt's whole blocks, which all of a user's beams share, and goes on
with private blocks: a copy of the prompt's last, partial block, and the decoded tokens behind it.
Between levels each beam takes over its parent's private blocks; nothing else is ever copied.

This drives vLLM's V1 model runner through its internals, without the scheduler: blocks are simply
taken from the cache's beginning, which is right only while vLLM has no request of its own.
`InWorkerEngine` sees to that. What is used of the internals is checked before it is used. Longer
than other modules: all that depends on those internals is in this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from genrec.decoding.beam import (
    BeamResult,
    Beams,
    Normalizer,
    code_log_probs,
    finish,
    normalize,
    step,
)
from genrec.decoding.trie_tensors import LevelFilter, TrieTensors
from genrec.decoding.vllm_engine import vllm

try:
    from vllm.forward_context import set_forward_context
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import FullAttentionSpec
except ImportError as error:
    raise RuntimeError(
        f"vLLM {vllm.__version__} lacks internals that the in-worker engine needs ({error}); use "
        "the step engine (engine='vllm')"
    ) from error

_FIRST_BLOCK = 1  # vLLM keeps block 0 for padding
_LOGITS_AT_ONCE = 1 << 26  # of the full vocabulary, in fp32: 256 MiB
_RUNNER = ("model", "kv_caches", "attn_groups", "kv_cache_config", "vllm_config", "device")
_GROUP = ("get_metadata_builder", "layer_names", "kv_cache_spec")
_METADATA = (
    "query_start_loc",
    "query_start_loc_cpu",
    "seq_lens",
    "num_reqs",
    "num_actual_tokens",
    "max_query_len",
    "max_seq_len",
    "block_table_tensor",
    "slot_mapping",
    "causal",
)


class CacheLimits(NamedTuple):
    """Size of the KV cache that a search may use, in blocks, and of a block, in tokens."""

    n_blocks: int
    block_size: int

    def blocks(self, prompt_length: int, beams: int, decoded: int) -> int:
        """Most blocks that a prompt and its beams take.

        Args:
            prompt_length: tokens of the prompt, or of a longer one.
            beams: prefixes kept per level.
            decoded: tokens of each beam that go through the model (levels − 1).
        """
        prompt = -(-prompt_length // self.block_size)
        return prompt + beams * _private_blocks(self.block_size, self.block_size - 1, decoded)


def _private_blocks(block_size: int, tail: int, decoded: int) -> int:
    """Blocks that hold a prompt's last `tail` tokens and `decoded` more."""
    return -(-(tail + decoded) // block_size) if decoded else 0


class Job(NamedTuple):
    """A batch of users.

    Attributes:
        prompts: token ids.
        sid_ids: per level the token id of each code.
        normalizer: of the scores.
        tensors: the trie and its view.
        plain_head: as `SearchWorker.genrec_start` found.
    """

    prompts: Sequence[Sequence[int]]
    sid_ids: list[Tensor]
    normalizer: Normalizer
    tensors: TrieTensors
    plain_head: bool


class SearchWorker:
    """What vLLM adds to its worker class (`worker_extension_cls`): called by `collective_rpc`."""

    model_runner: Any

    @torch.inference_mode()
    def genrec_start(self) -> tuple[CacheLimits, bool]:
        """Check the internals and the model.

        Returns:
            How much cache there is, and whether the logits are nothing but hidden states times the
            head's rows, so that some of them can be computed alone.

        Raises:
            RuntimeError: this vLLM or this model isn't one that the engine was written for.
        """
        model = PagedModel(self.model_runner)
        return model.limits, model.has_plain_head()

    @torch.inference_mode()
    def genrec_search(
        self, job: Job, k: int, width: int, filters: list[LevelFilter] | None, rows: np.ndarray
    ) -> BeamResult:
        """Search a batch; see `InWorkerEngine.search`."""
        levels = len(job.sid_ids)
        batch = PagedBatch(PagedModel(self.model_runner), job.prompts, width, levels - 1)
        beams = Beams.start(len(job.prompts), job.tensors.device)
        hidden = batch.prefill()
        for level in range(levels):
            columns = batch.model.columns(hidden, level, job)
            users = None if filters is None else filters[level]
            beams = step(job.tensors, level, beams, columns, job.normalizer, users, width)
            if level + 1 < levels:
                hidden = batch.extend(job.sid_ids[level][beams.codes], beams.parents)
        return finish(job.tensors, beams, k, rows)

    @torch.inference_mode()
    def genrec_score(self, job: Job, leaf: np.ndarray) -> np.ndarray:
        """Log-probabilities of leaves, (U, m, L); see `InWorkerEngine.score`."""
        tensors, levels, (users, n_leaves) = job.tensors, len(job.sid_ids), leaf.shape
        out = torch.empty(users, n_leaves, levels, device=tensors.device)
        batch = PagedBatch(PagedModel(self.model_runner), job.prompts, n_leaves, levels - 1)
        parents = torch.zeros(users, n_leaves, dtype=torch.int64, device=tensors.device)
        same = torch.arange(n_leaves, device=tensors.device).expand(users, -1)
        hidden = batch.prefill()
        for level in range(levels):
            nodes = torch.from_numpy(tensors.trie.node_of_leaf(level, leaf)).to(tensors.device)
            columns = batch.model.columns(hidden, level, job)
            out[..., level] = code_log_probs(
                tensors, level, parents, nodes, columns, job.normalizer
            )
            if level + 1 < levels:
                codes = tensors.codes(level, nodes)
                hidden = batch.extend(job.sid_ids[level][codes], same)
            parents = nodes
        return out.cpu().numpy()


class Queries(NamedTuple):
    """Tokens to run through the model: n sequences, T tokens one after another.

    Attributes:
        tokens: (T,).
        positions: of the tokens in their sequences, rising by one within each, (T,).
        slots: where in the KV cache each token goes, (T,).
        starts: first token of each sequence and an end mark, (n + 1,).
        table: cache blocks of each sequence, (n, blocks) int32.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    starts: Tensor
    table: Tensor


class PagedModel:
    """vLLM's model with its paged attention, without its scheduler.

    Args:
        runner: the worker's model runner (V1).

    Raises:
        RuntimeError: this vLLM or this model isn't one that the engine was written for.
    """

    def __init__(self, runner: Any) -> None:
        _check_internals(runner)
        _check_model(runner)
        (self.group,) = runner.attn_groups[0]
        self.runner, self.device = runner, runner.device
        self.caches: list[Tensor] = runner.kv_caches
        self.max_tokens: int = runner.vllm_config.scheduler_config.max_num_batched_tokens
        blocks = runner.kv_cache_config.num_blocks
        self.limits = CacheLimits(blocks - _FIRST_BLOCK, self.group.kv_cache_spec.block_size)

    def run(self, queries: Queries) -> Tensor:
        """Hidden states of each sequence's last token, (n, hidden size).

        Keys and values of all tokens are in the cache afterwards.
        """
        total = len(queries.tokens)
        parts = range(0, total, self.max_tokens)
        return torch.cat([self._run(queries, at, min(at + self.max_tokens, total)) for at in parts])

    def _run(self, queries: Queries, start: int, stop: int) -> Tensor:
        """Run tokens start..stop; a sequence may be cut by either."""
        starts = queries.starts
        first = int((starts[1:] <= start).sum())
        last = int((starts[:-1] < stop).sum())
        bounds = (starts[first : last + 1].clamp(start, stop) - start).to(torch.int32)
        ends = bounds[1:].to(torch.int64) - 1
        # The kernels take their inputs to be contiguous and check nothing.
        tokens = queries.tokens[start:stop].to(torch.int32).contiguous()
        positions = queries.positions[start:stop].contiguous()
        slots = queries.slots[start:stop].contiguous()
        lengths = (positions[ends] + 1).to(torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=bounds,
            query_start_loc_cpu=bounds.cpu(),
            seq_lens=lengths,
            num_reqs=last - first,
            num_actual_tokens=stop - start,
            max_query_len=int((bounds[1:] - bounds[:-1]).max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=queries.table[first:last].contiguous(),
            slot_mapping=slots,
            causal=True,
        )
        metadata = self.group.get_metadata_builder().build(0, common)  # 0: no common prefix
        names = self.group.layer_names
        with set_forward_context(
            dict.fromkeys(names, metadata),
            self.runner.vllm_config,
            num_tokens=stop - start,
            slot_mapping=dict.fromkeys(names, slots),
        ):
            hidden = self.runner.model(
                input_ids=tokens,
                positions=positions,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
        return hidden[ends[starts[first + 1 : last + 1] <= stop]]

    def columns(self, hidden: Tensor, level: int, job: Job) -> Tensor:
        """`normalize`'s columns of a level, (U, B, codebook_size), from hidden states (U, B, d).

        The whole vocabulary is computed only where the normaliser asks for it.
        """
        ids, rows = job.sid_ids[level], hidden.flatten(0, 1)
        if job.plain_head and job.normalizer != "full":
            logits = F.linear(rows.float(), self.runner.model.lm_head.weight[ids].float())
            columns = normalize(logits, torch.arange(len(ids), device=ids.device), job.normalizer)
        else:
            size = self.runner.vllm_config.model_config.get_vocab_size()
            compute = self.runner.model.compute_logits
            parts = rows.split(max(1, _LOGITS_AT_ONCE // size))
            columns = torch.cat([normalize(compute(part), ids, job.normalizer) for part in parts])
        return columns.unflatten(0, hidden.shape[:2])

    def has_plain_head(self) -> bool:
        """Whether the logits are hidden states times ``lm_head.weight``, tried out on two rows."""
        weight = getattr(getattr(self.runner.model, "lm_head", None), "weight", None)
        config = self.runner.vllm_config.model_config
        size = config.get_vocab_size()
        if not isinstance(weight, Tensor) or weight.dim() != 2 or len(weight) < size:
            return False
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(2, weight.shape[1], generator=generator).to(self.device, config.dtype)
        whole = self.runner.model.compute_logits(hidden).float()
        parts = F.linear(hidden.float(), weight[:size].float())
        near = 1e-4 * whole.abs().max()
        return whole.shape == parts.shape and bool(((whole - parts).abs() <= near).all())

    def copy_blocks(self, source: Tensor, target: Tensor) -> None:
        """Copy cache blocks in every layer."""
        for cache in self.caches if len(target) else ():
            cache.index_copy_(0, target, cache.index_select(0, source))

    def clear_blocks(self, blocks: Tensor) -> None:
        """Zero cache blocks in every layer."""
        for cache in self.caches if len(blocks) else ():
            cache.index_fill_(0, blocks, 0)


class PagedBatch:
    """The KV cache of a batch of prompts and their beams.

    Each user has `width` rows of private blocks, one row per beam, any beam in any row: the first
    child of a beam stays where its parent was, and only the others are copied, into rows whose
    beams have died. Blocks of a prompt follow each other, and block j of all rows lie together, so
    that the place of each is arithmetic.

    Shapes: U users, B beams.

    Args:
        model: vLLM's.
        prompts: token ids.
        width: most beams that there will ever be.
        decoded: tokens per beam that will be appended.
    """

    def __init__(
        self, model: PagedModel, prompts: Sequence[Sequence[int]], width: int, decoded: int
    ) -> None:
        self.model, self.width, self.depth = model, width, 0
        size, device = model.limits.block_size, model.device
        lengths = np.array([len(prompt) for prompt in prompts])
        tokens = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts])
        self.tokens = torch.from_numpy(tokens).to(device)
        self.lengths = torch.from_numpy(lengths).to(device)  # (U,)
        self.whole, self.tail = self.lengths // size, self.lengths % size  # blocks, tokens
        ends = np.cumsum(-(-lengths // size))
        self.first = _FIRST_BLOCK + torch.from_numpy(np.append(0, ends[:-1])).to(device)
        self.private = _FIRST_BLOCK + int(ends[-1])  # the first private block
        self.n_private = _private_blocks(size, int((lengths % size).max()), decoded)
        self.n_rows = len(prompts) * width
        if int(ends[-1]) + self.n_rows * self.n_private > model.limits.n_blocks:
            raise RuntimeError(
                f"{len(prompts)} prompts with {width} beams each don't fit into the KV cache of "
                f"{model.limits.n_blocks} blocks"
            )
        self.rows = torch.zeros(len(prompts), 0, dtype=torch.int64, device=device)  # (U, B)

    def prefill(self) -> Tensor:
        """Run the prompts.

        Returns:
            Hidden states of their last tokens, (U, 1, hidden size).
        """
        size, device = self.model.limits.block_size, self.model.device
        starts = F.pad(self.lengths.cumsum(0), (1, 0))
        user = torch.arange(len(self.lengths), device=device).repeat_interleave(self.lengths)
        positions = torch.arange(len(self.tokens), device=device) - starts[user]
        # What isn't written yet is masked, but the kernels read it, and zero times NaN is NaN.
        self.model.clear_blocks(torch.arange(_FIRST_BLOCK, self.private, device=device))
        slots = (self.first[user] + positions // size) * size + positions % size
        blocks = torch.arange(int((-(-self.lengths // size)).max()), device=device)
        # A short prompt's row goes on with blocks of others, which its length keeps out.
        table = (self.first.unsqueeze(1) + blocks).clamp(max=self.private - 1).to(torch.int32)
        return self.model.run(Queries(self.tokens, positions, slots, starts, table)).unsqueeze(1)

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Append a token to each beam.

        Args:
            tokens: (U, B).
            parents: which beam of the step before each continues, (U, B); without meaning after
                the prompts.

        Returns:
            Hidden states, (U, B, hidden size).
        """
        size, (users, beams) = self.model.limits.block_size, tokens.shape
        if self.depth:
            self._follow(parents)
        else:
            self._leave_the_prompts(beams)
        filled = self.tail + self.depth  # private tokens so far, (U,)
        at = self._block(filled.unsqueeze(1) // size, self.rows)  # (U, B)
        self.model.clear_blocks(at[filled % size == 0].flatten())
        slots = at * size + (filled % size).unsqueeze(1)
        positions = (self.lengths + self.depth).unsqueeze(1).expand(-1, beams)
        starts = torch.arange(users * beams + 1, device=tokens.device)
        self.depth += 1
        queries = Queries(
            tokens.flatten(), positions.flatten(), slots.flatten(), starts, self._table()
        )
        return self.model.run(queries).unflatten(0, (users, beams))

    def _leave_the_prompts(self, beams: int) -> None:
        """Give each beam a row, and in it the partial last block of its prompt."""
        users = torch.arange(len(self.lengths), device=self.lengths.device).unsqueeze(1)
        slots = torch.arange(beams, device=self.lengths.device)
        self.rows = users * self.width + slots
        has = self.tail > 0
        source = (self.first + self.whole)[has].repeat_interleave(beams)
        self.model.copy_blocks(source, self._block(0, self.rows[has].flatten()))

    def _follow(self, parents: Tensor) -> None:
        """Give each beam a row with its parent's private blocks in it."""
        beams, size = parents.shape[1], self.model.limits.block_size
        order = torch.arange(beams, device=parents.device).expand_as(parents)
        source = self.rows.gather(1, parents)
        earliest = torch.full_like(self.rows, beams)
        earliest.scatter_reduce_(1, parents, order, "amin")  # a beam's first child
        moves = earliest.gather(1, parents) != order  # (U, B)
        offset = torch.arange(len(parents), device=parents.device).unsqueeze(1) * self.width
        taken = torch.zeros(len(parents), self.width, dtype=torch.uint8, device=parents.device)
        taken.scatter_(1, source - offset, 1)
        free = taken.argsort(dim=1, stable=True) + offset  # the free rows first
        target = free.gather(1, (moves.cumsum(1) - 1).clamp(min=0))
        self.rows = torch.where(moves, target, source)
        used = self.tail + self.depth
        for block in range(self.n_private):
            which = moves & (used > block * size).unsqueeze(1)
            self.model.copy_blocks(
                self._block(block, source[which]), self._block(block, target[which])
            )

    def _block(self, index: int | Tensor, rows: Tensor) -> Tensor:
        """Cache block that is number `index` of the private ones in each row."""
        return self.private + index * self.n_rows + rows

    def _table(self) -> Tensor:
        """Block tables of all beams, (U * B, blocks) int32."""
        blocks = torch.arange(int(self.whole.max()) + self.n_private, device=self.rows.device)
        own = (blocks - self.whole.unsqueeze(1)).unsqueeze(1)  # (U, 1, blocks)
        shared = (self.first.unsqueeze(1) + blocks).unsqueeze(1)
        private = self._block(own.clamp(0, self.n_private - 1), self.rows.unsqueeze(-1))
        return torch.where(own < 0, shared, private).flatten(0, 1).to(torch.int32)


def _check_internals(runner: Any) -> None:
    """Raise RuntimeError unless vLLM has all that is used here."""
    groups = getattr(runner, "attn_groups", None)
    group = groups[0][0] if groups and groups[0] else None
    known = {field.name for field in fields(CommonAttentionMetadata)}
    missing = [f"{type(runner).__name__}.{name}" for name in _RUNNER if not hasattr(runner, name)]
    missing += [f"AttentionGroup.{name}" for name in _GROUP if not hasattr(group, name)]
    missing += [f"CommonAttentionMetadata.{name}" for name in _METADATA if name not in known]
    if not missing and not hasattr(runner.model, "compute_logits"):
        missing = [f"{type(runner.model).__name__}.compute_logits"]
    if missing:
        raise RuntimeError(
            f"vLLM {vllm.__version__} lacks internals that the in-worker engine needs: "
            f"{', '.join(missing)}; use the step engine (engine='vllm')"
        )


def _check_model(runner: Any) -> None:
    """Raise RuntimeError for what this engine was neither written for nor tested with."""
    config, groups = runner.vllm_config, runner.attn_groups
    parallel, spec = config.parallel_config, groups[0][0].kv_cache_spec
    wrong = None
    if runner.device.type != "cpu":
        wrong = f"device {runner.device}: it has run on CPU only"
    elif parallel.world_size > 1 or parallel.data_parallel_size > 1:
        wrong = f"{parallel.world_size} workers: it searches in one"
    elif len(groups) != 1 or len(groups[0]) != 1 or type(spec) is not FullAttentionSpec:
        wrong = "a model whose layers don't all have plain full attention"
    elif spec.sliding_window or spec.attention_chunk_size or spec.non_causal:
        wrong = "a model with windowed, chunked or non-causal attention"
    elif getattr(groups[0][0], "kernel_block_size", None) is not None:  # new in vLLM 0.32
        wrong = "attention kernels with blocks of another size than the cache's"
    elif any(len(cache) != runner.kv_cache_config.num_blocks for cache in runner.kv_caches):
        wrong = "a KV cache whose first axis isn't its blocks"
    elif config.model_config.is_multimodal_model or config.model_config.uses_mrope:
        wrong = "a multimodal model"
    elif config.lora_config is not None or config.speculative_config is not None:
        wrong = "adapters or speculative decoding: merge the adapter"
    if wrong is not None:
        raise RuntimeError(
            f"the in-worker engine doesn't support {wrong}; use the step engine (engine='vllm')"
        )
