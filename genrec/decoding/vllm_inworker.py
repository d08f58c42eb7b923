"""In-worker engine: the whole search runs inside vLLM's worker, without a request per beam.

The opt-in fast path beside `genrec.decoding.vllm_engine`: vLLM's weights, attention and paged KV
cache, the one search of `genrec.decoding.beam`, and nothing of vLLM's scheduler, sampler or request
handling (see `genrec.decoding.vllm_worker`). It is written against vLLM's internals, so every
version, model and device that it wasn't tested with is refused: it has run on CPU only, in one
process, with models of plain full attention.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from genrec.decoding.beam import (
    BeamResult,
    Normalizer,
    check_sid_token_ids,
    search_in_batches,
)
from genrec.decoding.trie import CatalogueView, SidTrie
from genrec.decoding.trie_tensors import LevelFilter, TrieTensors
from genrec.decoding.vllm_engine import (
    CPU_BLOCK_SIZE,
    check_settings,
    prepare_environment,
    prompt_batches,
    vllm,
)
from genrec.decoding.vllm_worker import CacheLimits, Job, SearchWorker

_MORE_CACHE = "raise kv_cache_memory_bytes (or VLLM_CPU_KVCACHE_SPACE)"
_WORKER = f"{SearchWorker.__module__}.{SearchWorker.__qualname__}"


class InWorkerEngine:
    """Constrained beam search and scoring inside vLLM; the same results as `TorchEngine`.

    One engine owns one `vllm.LLM`, in this process. Its KV cache is used without vLLM's knowledge:
    a search while a request of another caller is unfinished is refused.

    Args:
        model_dir: merged Hugging Face checkpoint; no tokenizer is read.
        trie: trie of the SID map that the model was trained on (or of a descendant).
        sid_token_ids: per level the token id of each code, (codebook_size,) each.
        normalizer: of the scores, over the unfiltered trie (see `genrec.decoding.beam`).
        batch_size: users decoded together, or as many as the KV cache holds.
        dtype: of weights and activations; the head always computes in float32, since bfloat16
            logits tie.
        kv_cache_memory_bytes: size of the KV cache; VLLM_CPU_KVCACHE_SPACE (GiB) is the other way
            to say it.
        max_model_len: longest prompt plus item, in tokens; the model's own limit by default.
        max_num_batched_tokens: tokens that go through the model at once; bounds the memory of
            activations.
        seed: vLLM's; the search itself is deterministic.

    Raises:
        RuntimeError: this version of vLLM, this model or this device isn't supported.
        ValueError: an argument or the environment is wrong.
    """

    def __init__(
        self,
        model_dir: str | Path,
        trie: SidTrie,
        sid_token_ids: Sequence[Sequence[int]],
        normalizer: Normalizer = "full",
        batch_size: int = 64,
        *,
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
        kv_cache_memory_bytes: int | None = None,
        max_model_len: int | None = None,
        max_num_batched_tokens: int = 4096,
        seed: int = 0,
    ) -> None:
        check_settings(model_dir, normalizer, batch_size)
        on_cpu = prepare_environment(kv_cache_memory_bytes)
        _check_place(on_cpu)
        self.trie, self.normalizer, self.batch_size = trie, normalizer, batch_size
        self.llm = vllm.LLM(
            str(model_dir),
            skip_tokenizer_init=True,
            generation_config="vllm",
            worker_extension_cls=_WORKER,
            hf_overrides={"head_dtype": "float32"},
            enable_prefix_caching=False,  # it would remember blocks that a search overwrites
            block_size=CPU_BLOCK_SIZE,
            dtype=dtype,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=16,  # of requests, which there are none; sizes vLLM's buffers
            enforce_eager=True,  # what it compiles for the CPU was no faster
            seed=seed,
        )
        config = self.llm.llm_engine.vllm_config
        if config.use_v2_model_runner:
            raise RuntimeError("vLLM chose its V2 model runner; this engine needs the V1 runner")
        self.context: int = config.model_config.max_model_len
        self.vocab_size: int = config.model_config.get_vocab_size()
        check_sid_token_ids(sid_token_ids, trie, self.vocab_size)
        self.limits: CacheLimits
        self.limits, self.plain_head = self._call("genrec_start")
        self.device: torch.device = config.device_config.device
        self.sid_ids = [torch.tensor(ids, device=self.device) for ids in sid_token_ids]
        self._tensors = TrieTensors(trie, None, self.device)

    def search(
        self,
        prompts: Sequence[Sequence[int]],
        k: int,
        beam_width: int,
        seen: Sequence[np.ndarray] | None = None,
        view: CatalogueView | None = None,
        progress: Callable[[int], object] | None = None,
        candidates: Sequence[np.ndarray | None] | None = None,
    ) -> BeamResult:
        """The k best items for each prompt.

        Args:
            prompts: token ids, one list per user, none empty.
            k: items per list; at most `beam_width`.
            beam_width: prefixes kept per level.
            seen: catalogue rows that each user must not get, or None.
            view: catalogue view that holds for all users, or None.
            progress: called with the number of users of each finished batch.
            candidates: the only catalogue rows that each user may get (None: all), or None.

        Returns:
            Lists in the order of `prompts`.

        Raises:
            ValueError: an argument is wrong, a user has no item left, or one user's beams don't fit
                into the KV cache.
            RuntimeError: vLLM has unfinished requests.
        """
        self._tensors = tensors = self._tensors.through(view)

        def search_batch(rows: np.ndarray, filters: list[LevelFilter] | None) -> BeamResult:
            job = self._job([prompts[row] for row in rows], tensors)
            found: BeamResult = self._call("genrec_search", job, k, beam_width, filters, rows)
            return found

        batches = self._batches(prompts, beam_width)
        return search_in_batches(
            search_batch, batches, tensors, k, beam_width, seen, progress, candidates
        )

    def score(self, prompts: Sequence[Sequence[int]], items: np.ndarray) -> np.ndarray:
        """Log-probabilities of given items, by teacher forcing over the shared prompt.

        Args:
            prompts: token ids, one list per row.
            items: catalogue rows to score, (n, m); the same number for each prompt.

        Returns:
            (n, m, L) float32 log-probability of each level; their sum is what `search` ranks by.

        Raises:
            ValueError, RuntimeError: as `search`.
        """
        items = np.asarray(items)
        self.trie.check_items(items)
        tensors = self._tensors.through(None)
        out = np.empty((*items.shape, self.trie.n_levels), dtype=np.float32)
        at_once = min(max(items.shape[1], 1), self._most_beams(prompts))
        batches = self._batches(prompts, at_once)
        for first in range(0, items.shape[1], at_once):
            leaf = self.trie.leaf_of_item[items[:, first : first + at_once]]
            for rows in batches:
                job = self._job([prompts[row] for row in rows], tensors)
                found = self._call("genrec_score", job, leaf[rows])
                out[rows, first : first + at_once] = found
        self.trie.clear_padding(items, out)
        return out

    def _job(self, prompts: list[Sequence[int]], tensors: TrieTensors) -> Job:
        return Job(prompts, self.sid_ids, self.normalizer, tensors, self.plain_head)

    def _call(self, method: str, *args: Any) -> Any:
        """Run a method of `SearchWorker` in the one worker."""
        if self.llm.llm_engine.has_unfinished_requests():
            raise RuntimeError(
                "vLLM has unfinished requests, whose KV cache a search would overwrite; let them "
                "finish, or give them an LLM of their own"
            )
        (result,) = self.llm.collective_rpc(method, args=args)
        return result

    def _batches(self, prompts: Sequence[Sequence[int]], beams: int) -> list[np.ndarray]:
        """Rows of the users decoded together: at most as many as the KV cache holds."""
        if len(prompts) and beams > (most := self._most_beams(prompts)):
            raise ValueError(
                f"the KV cache of {self.limits.n_blocks} blocks holds {most} beams of the longest "
                f"prompt, beam_width={beams} wants more; {_MORE_CACHE}, or lower beam_width"
            )
        longest = max(map(len, prompts), default=0)
        needed = self.limits.blocks(longest, beams, self.trie.n_levels - 1)
        batch_size = min(self.batch_size, self.limits.n_blocks // max(needed, 1))
        return prompt_batches(
            prompts, self.trie.n_levels, self.context, batch_size, self.vocab_size
        )

    def _most_beams(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many beams of the longest prompt the KV cache holds; at least one."""
        longest, decoded = max(map(len, prompts), default=0), self.trie.n_levels - 1
        prompt = self.limits.blocks(longest, 0, decoded)
        each = self.limits.blocks(longest, 1, decoded) - prompt
        most = (self.limits.n_blocks - prompt) // max(each, 1)
        if most < 1:
            raise ValueError(
                f"a prompt of {longest} tokens needs {prompt + each} blocks of the KV cache, which "
                f"has {self.limits.n_blocks}; {_MORE_CACHE}"
            )
        return most


def _check_place(on_cpu: bool) -> None:
    """Raise unless vLLM will run on the CPU and inside this process."""
    if not on_cpu:
        raise RuntimeError(
            "the in-worker engine has run on CPU only and refuses other devices; use the step "
            "engine (engine='vllm')"
        )
    value = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"]
    if value != "0":
        raise ValueError(
            f"VLLM_ENABLE_V1_MULTIPROCESSING={value}: the in-worker engine needs vLLM's worker in "
            "its own process; unset it"
        )
