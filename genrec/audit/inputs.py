"""The exact input of lists, made again from their rows: what their payloads hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from genrec.artifacts import sha256_bytes
from genrec.audit.recorded import RecordedRun
from genrec.bundle.parts import ServedParts
from genrec.columns import CANDIDATES, HISTORY, ITEM_ID, SEEN, SID
from genrec.decoding.beam import BeamResult
from genrec.decoding.item_tokens import item_tokens
from genrec.decoding.trie import SidTrie
from genrec.generation.history_prompts import PromptEncoder, newest, prompts_of
from genrec.item_lists import ItemLists
from genrec.modeling import load_tokenizer
from genrec.prompts import PromptRenderer
from genrec.recommend import Recommender
from genrec.title_ids import load_map


class _NoEngine:
    """For a recommender that renders prompts alone: records need no weights."""

    def __init__(self, trie: SidTrie) -> None:
        self.trie = trie

    def search(self, *args: object, **options: object) -> BeamResult:
        raise AssertionError("records are made of lists that are there")


class InputMaker:
    """The exact input of lists, made again from their rows.

    Args:
        run: the finished stages.

    Attributes:
        semantic_ids: of the catalogue.
        trie: of their tokens, as the model's tokenizer knows them.
    """

    def __init__(self, run: RecordedRun) -> None:
        parts = ServedParts.of_run(run.source, run.model_stage)
        semantic_ids = self.semantic_ids = load_map(parts.semantic_ids)
        tokenizer, _ = load_tokenizer(parts.model, semantic_ids)
        self.trie = item_tokens(tokenizer, semantic_ids, parts.semantic_ids).trie
        self._recommender = Recommender(
            run.catalog,
            semantic_ids,
            PromptRenderer(parts.prompts),
            parts.template,
            tokenizer,
            _NoEngine(self.trie),
            parts.max_history,
            parts.model_stage,
        )
        self._encoder = PromptEncoder(self._recommender)
        self._ids = run.catalog[ITEM_ID]

    def make(self, rows: pl.DataFrame) -> tuple[list[dict[str, Any]], list[int]]:
        """Inputs of rows, for payloads, and how many items each user had before.

        Args:
            rows: as in `ListShard`.
        """
        n_items = len(self._ids)
        histories = ItemLists.from_column(rows[HISTORY])
        prompts = prompts_of(self._recommender, histories).to_list()
        tokens = self._encoder.encode(histories, prompts)
        shown = newest(histories, self._recommender.max_history)
        entries = [
            {ITEM_ID: item, SID: sid}
            for item, sid in zip(
                self._ids.gather(shown.values).to_list(),
                self._recommender.sids[shown.values].tolist(),
                strict=True,
            )
        ]
        seen = np.unique(ItemLists.from_column(rows[SEEN]).keys(n_items))
        had = np.unique(shown.keys(n_items))
        # In the order of the catalogue, which gives nothing of the history's order away.
        aside = np.setdiff1d(seen, had, assume_unique=True)
        before = np.bincount(np.union1d(seen, had) // n_items, minlength=len(rows)).tolist()
        aside_ids = self._ids.gather(aside % n_items).to_list()
        ends = np.cumsum(np.bincount(aside // n_items, minlength=len(rows))).tolist()
        bounds = shown.offsets.tolist()
        made = [
            {
                "history": entries[bounds[i] : bounds[i + 1]],
                "set_aside_item_ids": aside_ids[ends[i - 1] if i else 0 : ends[i]],
                "prompt": prompt,
                "prompt_sha256": sha256_bytes(prompt.encode()),
                "token_ids": token_ids,
            }
            for i, (prompt, token_ids) in enumerate(zip(prompts, tokens, strict=True))
        ]
        if CANDIDATES in rows.columns:
            allowed = ItemLists.from_column(rows[CANDIDATES])
            for i in np.flatnonzero(rows[CANDIDATES].is_not_null().to_numpy()):  # null: no limit
                given = made[i]
                own = np.unique(allowed.values[allowed.offsets[i] : allowed.offsets[i + 1]])
                given["candidate_item_ids"] = self._ids.gather(own).to_list()
        return made, before
