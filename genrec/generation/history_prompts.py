"""Prompts of many histories at once: their texts and their token ids."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import polars as pl

from genrec.item_lists import ItemLists, list_series
from genrec.modeling import encode_prompts, sid_token_ids
from genrec.recommend import Recommender
from genrec.title_ids import TitleIds

logger = logging.getLogger(__name__)


def newest(lists: ItemLists, n: int) -> ItemLists:
    """The last `n` entries of each list."""
    kept = np.minimum(lists.lengths, n)
    offsets = np.concatenate([[0], np.cumsum(kept)])
    at = np.arange(offsets[-1]) + np.repeat(lists.offsets[1:] - offsets[1:], kept)
    return ItemLists(lists.values[at], offsets)


def prompts_of(recommender: Recommender, histories: ItemLists) -> pl.Series:
    """Prompts of many histories at once: the same texts as `Recommender.prompts` gives.

    Args:
        recommender: the run.
        histories: catalogue rows, oldest first.

    Raises:
        ValueError: the template doesn't end with the history.
    """
    kept = newest(histories, recommender.max_history)
    sids = pl.Series("sid", recommender.sids[kept.values].tolist(), dtype=pl.String)
    history = list_series(sids, kept.offsets).list.join("")
    prompts = recommender.renderer.render_many(recommender.template, sids={"history": history})
    (start,) = recommender.prompts([[]])
    if not (prompts == start + history).all():
        raise ValueError(
            f"template {recommender.template!r} must end with the history, behind text that is "
            "always the same"
        )
    return prompts


class PromptEncoder:
    """Token ids of the prompts of many histories, without a tokenizer's work for each.

    SID tokens are split off before a tokenizer sees any other text, so a prompt's ids are those of
    its beginning and then one id per SID token. Whether this holds for a tokenizer is tried on
    histories of all lengths first; where it doesn't, each prompt is tokenised.

    Args:
        recommender: the run.
    """

    def __init__(self, recommender: Recommender) -> None:
        self._recommender = recommender
        ids = recommender.semantic_ids
        self._plain = False
        if isinstance(ids, TitleIds):  # each of its titles is encoded once in a batch anyway
            return
        codes = ids.codes
        levels = sid_token_ids(recommender.tokenizer, ids)
        each = [np.asarray(ids)[codes[:, level]] for level, ids in enumerate(levels)]
        self._tokens = np.stack(each, axis=1)  # (n_items, n_levels)
        (self._start,) = encode_prompts(recommender.tokenizer, recommender.prompts([[]]))
        rng = np.random.default_rng(0)
        tried = [
            rng.integers(0, len(codes), n).tolist() for n in range(recommender.max_history + 1)
        ]
        column = pl.Series(tried, dtype=pl.List(pl.Int64))
        self._plain = self._join(ItemLists.from_column(column)) == encode_prompts(
            recommender.tokenizer, recommender.prompts(tried)
        )
        if not self._plain:
            logger.info("the tokenizer joins SID tokens with other text: prompts take it in full")

    def encode(self, histories: ItemLists, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt.

        Args:
            histories: catalogue rows, oldest first.
            prompts: the same, rendered.
        """
        if not self._plain:
            return encode_prompts(self._recommender.tokenizer, prompts)
        return self._join(histories)

    def _join(self, histories: ItemLists) -> list[list[int]]:
        kept = newest(histories, self._recommender.max_history)
        ends = kept.offsets * self._tokens.shape[1]
        flat = self._tokens[kept.values].ravel().tolist()
        return [self._start + flat[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
