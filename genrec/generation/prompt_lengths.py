"""How long users' prompts will be, known from the model's files before it is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from genrec.bundle.parts import ServedParts
from genrec.generation.history_prompts import newest
from genrec.item_lists import ItemLists
from genrec.modeling import encode_prompts, load_tokenizer
from genrec.prompts import PromptRenderer
from genrec.tasks.sequential import history_prompt
from genrec.title_ids import ItemMap, TitleIds, load_map
from genrec.title_index import title_index


@dataclass(frozen=True)
class PromptLengths:
    """Lengths of prompts, and what the context holds.

    Attributes:
        parts: where the model, its tokenizer and templates lie.
        context: tokens of a prompt with the item behind it; None: no limit is known.
    """

    parts: ServedParts
    context: int | None

    @cached_property
    def _map(self) -> ItemMap:
        return load_map(self.parts.semantic_ids)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.parts.model, self._map)[0]

    def _prompt(self, names: list[str]) -> str:
        renderer = PromptRenderer(self.parts.prompts)
        return history_prompt(renderer, self.parts.template, names)

    @cached_property
    def _tokens(self) -> tuple[int, np.ndarray, int]:
        """Tokens of the text before a history, of each item in one, and of the item behind it."""
        (start,) = encode_prompts(self._tokenizer, [self._prompt([])])
        ids = self._map
        if isinstance(ids, TitleIds):  # each tokenised once
            written = self._tokenizer(ids.sids().to_list(), add_special_tokens=False)["input_ids"]
            items = np.array([len(tokens) for tokens in written])
            decoded = title_index(ids.names.to_list(), self._tokenizer).codes.shape[1]
            return len(start), items, decoded
        return len(start), np.full(ids.n_items, ids.n_levels), ids.n_levels

    def first_too_long(self, histories: ItemLists) -> tuple[int, int] | None:
        """The first history whose prompt doesn't fit, and the tokens that it needs.

        Args:
            histories: catalogue rows, oldest first; the newest `max_history` count.

        Returns:
            Its number and tokens with the item behind it; None: all fit.
        """
        if self.context is None:
            return None
        start, items, decoded = self._tokens
        kept = newest(histories, self.parts.max_history)
        sums = np.concatenate([[0], np.cumsum(items[kept.values])])
        needed = start + np.diff(sums[kept.offsets]) + decoded
        # Text that meets text may become fewer tokens: what seems too long is tokenised in full.
        for row in np.flatnonzero(needed > self.context):
            history = kept.values[kept.offsets[row] : kept.offsets[row + 1]]
            names = self._names[history.tolist()].tolist()
            (tokens,) = encode_prompts(self._tokenizer, [self._prompt(names)])
            if (exact := len(tokens) + decoded) > self.context:
                return int(row), exact
        return None

    @cached_property
    def _names(self) -> np.ndarray:
        return self._map.sids().to_numpy()


def context_of(model: Path | str, engine: str = "torch", limit: int | None = None) -> int | None:
    """Tokens that an engine's context holds.

    Args:
        model: folder of a model or an adapter.
        engine: of `genrec.recommend.ENGINES`.
        limit: max_model_len of a vLLM engine, if it is set.

    Returns:
        None where it isn't stated: by the model, or for vLLM, which scales positions by itself.
    """
    if limit is not None:
        return limit
    folder = Path(model)
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        folder = about["base_model_name_or_path"]
    config = AutoConfig.from_pretrained(str(folder))
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if engine != "torch" and isinstance(scaling, dict) and scaling.get("factor"):
        return None
    context: int | None = getattr(config, "max_position_embeddings", None)
    return context
