"""Base models and SID tokens: build, extend, encode, save and load.

A model folder holds a plain Hugging Face checkpoint with its tokenizer (adapters merged), which
transformers and vLLM load as they are, and ``genrec.json``: the SID map it was trained on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from genrec.artifacts import ABOUT, read_json, write_json
from genrec.prompt_format import chat_frame, encode_chat, encode_text
from genrec.semantic_ids import SemanticIds
from genrec.sharding import require_whole
from genrec.title_ids import ItemMap, TitleIds
from genrec.title_index import write_title_tokens

logger = logging.getLogger(__name__)

PAD, EOS = "<|pad|>", "<|endoftext|>"
TRAINER_STATE = "trainer_state.json"
RESIZED = 1e-9**0.5  # of the old rows' spread: transformers draws with 1e-9 of their variance

# From-scratch Qwen3 shapes: (hidden, layers, heads, feed-forward).
SIZES = {"tiny": (96, 2, 3, 256), "small": (128, 3, 4, 384), "base": (256, 6, 8, 768)}


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer trained on `texts`; every byte is known, so no text is lost."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def from_scratch(
    size: str, vocab_size: int, max_length: int, seed: int, dropout: float = 0.0
) -> PreTrainedModel:
    """Randomly initialised Qwen3 decoder.

    Args:
        size: a key of `SIZES`.
        vocab_size: of the tokenizer, SID tokens included or added later.
        max_length: longest sequence in tokens.
        seed: of the weights.
        dropout: on attention weights while training.
    """
    hidden, layers, heads, feed_forward = SIZES[size]
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=feed_forward,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=hidden // heads,
            max_position_embeddings=max_length,
            tie_word_embeddings=True,
            attention_dropout=dropout,
            initializer_range=hidden**-0.5 * 0.5,
        )
    )


def load_base(name_or_path: str, dtype: str, **kwargs: Any) -> PreTrainedModel:
    """Any Hugging Face causal LM, local or from the hub.

    Args:
        name_or_path: folder or hub name.
        dtype: "float32", "bfloat16", "float16" or "auto".
        **kwargs: passed to ``from_pretrained`` (revision, quantization_config, …).

    Raises:
        ValueError: there is no such model.
    """
    with _named(name_or_path):
        return AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, **kwargs)


@contextmanager
def _named(name_or_path: str) -> Iterator[None]:
    """Say what a model could not be found by; transformers' own error tells no path."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # of the system: a disk's, a network's
            raise
        said = str(error).strip().splitlines()
        raise ValueError(
            f"{name_or_path} can't be loaded ({said[0] if said else type(error).__name__}); name a "
            "folder that holds a model, or one on the Hugging Face hub, which needs a connection"
        ) from error


def add_sid_tokens(
    tokenizer: PreTrainedTokenizerBase, semantic_ids: SemanticIds
) -> list[list[int]]:
    """Add the SID tokens to a tokenizer (once) and return their ids, per level (codebook_size,).

    They are ordinary tokens (``special=False``: special ones vanish when TRL decodes completions),
    matched before any normalisation, so that no look-alike text becomes one.
    """
    tokens = semantic_ids.tokens()
    tokenizer.add_tokens(
        [AddedToken(t, special=False, normalized=False, lstrip=False, rstrip=False) for t in tokens]
    )
    return sid_token_ids(tokenizer, semantic_ids)


def sid_token_ids(tokenizer: PreTrainedTokenizerBase, semantic_ids: SemanticIds) -> list[list[int]]:
    """Token ids of the SID tokens, per level (codebook_size,).

    Raises:
        ValueError: the tokenizer lacks them or splits one.
    """
    tokens = semantic_ids.tokens()
    encoded = tokenizer(tokens, add_special_tokens=False)["input_ids"]
    broken = [token for token, ids in zip(tokens, encoded, strict=True) if len(ids) != 1]
    if broken:
        raise ValueError(
            f"the tokenizer has no token {broken[0]} ({len(broken)} of {len(tokens)} SID tokens "
            "are missing); the model was not trained on this SID map"
        )
    flat = [ids[0] for ids in encoded]
    ends = np.cumsum(semantic_ids.codebook_sizes)
    return [
        flat[end - size : end] for end, size in zip(ends, semantic_ids.codebook_sizes, strict=True)
    ]


def resize_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grow the embedding to the tokenizer, in whole blocks of 64 rows, never below what it has."""
    rows = _weight(model.get_input_embeddings()).shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)


@torch.no_grad()
def initialize_from_codebooks(
    model: PreTrainedModel,
    token_ids: list[list[int]],
    codebooks: Sequence[np.ndarray],
    n_old: int,
    seed: int,
    only: Sequence[np.ndarray] | None = None,
) -> None:
    """Set SID rows to their centroids, randomly rotated into the hidden size.

    Close codes then start close. The rows get the mean and spread of the model's own rows: the
    default resize makes new rows that are all alike, which trains far worse.

    Args:
        model: already resized.
        token_ids: per level, (codebook_size,).
        codebooks: a vector per code, (codebook_size, dim) per level; see
            `genrec.quantizers.code_vectors`.
        n_old: rows that existed before the SID tokens.
        seed: of the rotation.
        only: per level, which codes to set, (codebook_size,) booleans; None: all.
    """
    hidden = _weight(model.get_input_embeddings()).shape[1]
    dim = codebooks[0].shape[-1]
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(
        torch.randn(max(dim, hidden), max(dim, hidden), generator=generator)
    )
    for level, ids in enumerate(token_ids):
        rows = torch.from_numpy(codebooks[level]).float() @ rotation[:dim, :hidden]
        _write_rows(model, ids, rows, n_old, None if only is None else only[level])


@torch.no_grad()
def initialize_from_titles(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[list[int]],
    semantic_ids: SemanticIds,
    titles: Sequence[str],
    n_old: int,
    seed: int,
    only: Sequence[np.ndarray] | None = None,
) -> None:
    """Set each SID row to the mean of the text-token rows of the titles of its items.

    For pretrained models: the rows start in a region that the model knows, norm-matched. Codes of
    no item get a random row of the same spread.

    Args:
        model: already resized.
        tokenizer: with SID tokens.
        token_ids: per level, (codebook_size,).
        semantic_ids: the SID map.
        titles: one per item, escaped.
        n_old: rows that existed before the SID tokens.
        seed: of the random rows.
        only: as in `initialize_from_codebooks`.
    """
    weight = _weight(model.get_input_embeddings())[:n_old].float().cpu()
    encoded = tokenizer(list(titles), add_special_tokens=False)["input_ids"]
    item = np.repeat(np.arange(len(encoded)), [len(ids) for ids in encoded])
    token = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])
    shape = (len(encoded), n_old)
    counts = scipy.sparse.csr_matrix((np.ones(len(item), np.float32), (item, token)), shape=shape)
    item_rows = torch.from_numpy(counts @ weight.numpy())
    item_tokens = torch.from_numpy(np.bincount(item, minlength=len(encoded))).float()
    generator = torch.Generator().manual_seed(seed)
    for level, ids in enumerate(token_ids):
        rows = torch.randn(len(ids), weight.shape[1], generator=generator)
        code = torch.from_numpy(semantic_ids.codes[:, level]).long()
        n_tokens = torch.zeros(len(ids)).index_add_(0, code, item_tokens)
        used = n_tokens > 0
        means = torch.zeros_like(rows).index_add_(0, code, item_rows)[used]
        means /= n_tokens[used].unsqueeze(-1)
        # What all titles have in common says nothing of a code, and would drown what differs.
        means -= means.mean(0)
        rows[used] = means / means.std().clamp(min=1e-6)
        # A little noise keeps codes with the same titles apart.
        rows += 0.1 * torch.randn(rows.shape, generator=generator)
        _write_rows(model, ids, rows, n_old, None if only is None else only[level])


@torch.no_grad()
def initialize_around_mean(
    model: PreTrainedModel,
    token_ids: list[list[int]],
    n_old: int,
    seed: int,
    spread: float = 1.0,
    only: Sequence[np.ndarray] | None = None,
) -> None:
    """Set SID rows to normal draws around the mean of the old rows: they know nothing of items.

    What the other ways are compared with. With the old rows' spread it is what is commonly done by
    hand (Hewitt 2021), with `RESIZED` of it what transformers' own resize does.

    Args:
        model: already resized.
        token_ids: per level, (codebook_size,).
        n_old: rows that existed before the SID tokens.
        seed: of the draws.
        spread: of the new rows, as a share of the old ones'.
        only: as in `initialize_from_codebooks`.
    """
    hidden = _weight(model.get_input_embeddings()).shape[1]
    generator = torch.Generator().manual_seed(seed)
    for level, ids in enumerate(token_ids):
        rows = torch.randn(len(ids), hidden, generator=generator)
        _write_rows(model, ids, rows, n_old, None if only is None else only[level], spread)


def _write_rows(
    model: PreTrainedModel,
    ids: list[int],
    rows: torch.Tensor,
    n_old: int,
    only: np.ndarray | None = None,
    spread: float = 1.0,
) -> None:
    """Write rows into the input embedding (and an untied head), with the old rows' moments."""
    chosen = np.arange(len(ids)) if only is None else np.flatnonzero(only)
    weights = [_weight(model.get_input_embeddings())]
    head = model.get_output_embeddings()
    if head is not None and _weight(head).data_ptr() != weights[0].data_ptr():
        weights.append(_weight(head))
    rows = rows - rows.mean(0)
    rows = rows / rows.std().clamp(min=1e-6)
    for weight in weights:
        old = weight[:n_old].float()
        fitted = rows.to(weight.device) * (spread * old.std(0).mean()) + old.mean(0)
        at = torch.tensor([ids[code] for code in chosen], dtype=torch.long, device=weight.device)
        weight[at] = fitted[torch.from_numpy(chosen).to(weight.device)].to(weight.dtype)


def _weight(module: torch.nn.Module | None) -> torch.Tensor:
    """The weight matrix of an embedding or a head."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise ValueError(f"{type(module).__name__} has no weight matrix; is this a causal LM?")
    return weight


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered prompts, in the format that the tokenizer declares.

    Plain prompts get the tokenizer's BOS if it has one and uses it; a chat's frame has its own.
    """
    if frame := chat_frame(tokenizer):
        return encode_chat(tokenizer, prompts, frame)
    ids = encode_text(tokenizer, prompts)
    start = bos_prefix(tokenizer)
    return [start + row for row in ids] if start else ids


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """``[bos]`` for tokenizers that begin every text with it, else nothing."""
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos] if begins else []


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    sid_ids: set[int],
    open_ended: Sequence[bool] | None = None,
) -> dict[str, list[list[int]]]:
    """Training rows: ``input_ids`` and ``labels`` (−100 on the prompt).

    Prompt and completion are encoded apart and joined, so the served prompt is a token prefix of
    the row. A completion that ends in text gets EOS; one of SIDs has a fixed length and needs none,
    and titles of a title index have an end mark each.

    Args:
        tokenizer: with the SID tokens.
        prompts: rendered prompts.
        completions: what is to be learned.
        sid_ids: ids of the SID tokens, or of the end mark behind titles.
        open_ended: rows whose SIDs are a list of any length: they get EOS, too.
    """
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    completion_ids = encode_text(tokenizer, completions)
    ends = open_ended if open_ended is not None else [False] * len(prompts)
    for prompt, completion, has_end in zip(
        encode_prompts(tokenizer, prompts), completion_ids, ends, strict=True
    ):
        fixed = bool(completion) and completion[-1] in sid_ids and not has_end
        end = [] if fixed else [tokenizer.eos_token_id]
        rows["input_ids"].append(prompt + completion + end)
        rows["labels"].append([-100] * len(prompt) + completion + end)
    return rows


def last_checkpoint(folder: Path | str) -> str | None:
    """Newest complete checkpoint of a Transformers trainer below `folder`, None without one.

    The trainer writes a checkpoint in place, its state last: a killed one may lack parts.
    """
    states = Path(folder).glob(f"checkpoint-*/{TRAINER_STATE}")
    steps = [path.parent for path in states if _is_json(path)]
    newest = max(steps, key=lambda path: int(path.name.split("-")[-1]), default=None)
    return None if newest is None else str(newest)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:  # cut off while it was written
        return False
    return True


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    semantic_ids: ItemMap,
    folder: Path | str,
    about: dict[str, Any],
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a serving checkpoint: adapters merged, tokenizer, and what it was trained on.

    Args:
        model: with adapters or without.
        tokenizer: its own.
        semantic_ids: the SID map it was trained on.
        folder: where it goes.
        about: further content of ``genrec.json``.
        weights: of the model, by name, where it holds only shards (see `genrec.sharding`).

    Raises:
        ValueError: the model holds shards, and no weights are given.
    """
    if weights is None:
        require_whole(model, "saving a model")
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    model.save_pretrained(str(folder), state_dict=weights)
    tokenizer.save_pretrained(folder)
    if isinstance(semantic_ids, TitleIds):
        write_title_tokens(folder, semantic_ids.names.to_list(), tokenizer)
    write_json(Path(folder) / ABOUT, {"semantic_ids_sha256": semantic_ids.sha256, **about})


def load_tokenizer(
    folder: Path | str, semantic_ids: ItemMap
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """Tokenizer of a model folder; refuses a SID map that isn't the model's or a descendant of it.

    Returns:
        The tokenizer, and the content of ``genrec.json``.

    Raises:
        ValueError: the folder holds no genrec model, or it was trained on another SID map.
    """
    if not (Path(folder) / ABOUT).exists():
        raise ValueError(
            f"{folder} has no {ABOUT}: it is not a model that genrec trained; run sft first"
        )
    about = read_json(Path(folder) / ABOUT)
    if not semantic_ids.descends_from(about["semantic_ids_sha256"]):
        raise ValueError(
            f"the model in {folder} was trained on SID map {about['semantic_ids_sha256'][:12]}, "
            f"this one is {semantic_ids.sha256[:12]} and does not extend it; use the model's own "
            "map or rerun sft"
        )
    return AutoTokenizer.from_pretrained(folder), about


def base_tokenizer(name_or_path: str, semantic_ids: ItemMap) -> PreTrainedTokenizerBase:
    """Tokenizer of a model to be fine-tuned, its own or genrec's.

    Raises:
        ValueError: it has none; or it is a model that genrec trained on a foreign SID map, whose
            rows would be taken for those of other items.
    """
    if (Path(name_or_path) / ABOUT).exists():
        return load_tokenizer(name_or_path, semantic_ids)[0]
    with _named(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    # Without any file of a tokenizer, transformers makes an empty one of the model's kind.
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"{name_or_path} has no tokenizer; a model is fine-tuned with its own: put the "
            "tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights"
        )
    return tokenizer


def load_model(
    folder: Path | str, semantic_ids: ItemMap, dtype: str = "float32", device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Model folder in eval mode, on `device` (default: a GPU where there is one).

    Returns:
        The model, its tokenizer, and the content of ``genrec.json``.

    Raises:
        ValueError: as `load_tokenizer`.
    """
    tokenizer, about = load_tokenizer(folder, semantic_ids)
    model = load_base(str(folder), dtype).eval()
    if device or torch.cuda.is_available():
        model = model.to(device or "cuda")
    return model, tokenizer, about
