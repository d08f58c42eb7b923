"""Recommender: a run folder in, ranked catalogue items out; and batch generation in shards."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl

from genrec.artifacts import (
    load_manifest,
    read_json,
    require,
    sha256_bytes,
    stage_folder,
    write_parquet,
)
from genrec.columns import (
    CERTIFIED,
    HISTORY,
    ITEM_ID,
    ITEM_INDEX,
    LEVEL_LOG_PROBS,
    PROMPT_SHA256,
    RANK,
    ROW_ID,
    SCORE,
    SID,
    TITLE,
    USER_ID,
)
from genrec.decoding.beam import BeamResult, Normalizer, default_beam_width
from genrec.decoding.trie import CatalogueView, SidTrie
from genrec.modeling import ABOUT, encode_prompts, load_model, load_tokenizer, sid_token_ids
from genrec.prompts import PromptRenderer
from genrec.semantic_ids import SemanticIds
from genrec.tasks.sequential import history_prompt

logger = logging.getLogger(__name__)

ENGINES = ("torch", "vllm", "vllm-inworker")
MODEL_STAGES = ("sft", "grpo")


class Engine(Protocol):
    """What a decoding engine offers (see `genrec.decoding.torch_engine.TorchEngine.search`)."""

    def search(
        self,
        prompts: Sequence[Sequence[int]],
        k: int,
        beam_width: int,
        seen: Sequence[np.ndarray] | None = None,
        view: CatalogueView | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> BeamResult:
        """The k best items for each prompt."""
        ...


@dataclass(frozen=True)
class Recommendation:
    """One item of a list; `score` is the sum of `level_log_probs`."""

    rank: int
    item_id: Any
    title: str
    score: float
    sid: str
    level_log_probs: tuple[float, ...]


class Recommender:
    """A trained run, ready to recommend.

    Args:
        catalog: ``catalog.parquet``.
        semantic_ids: the SID map, row for row.
        renderer: the templates that the run was trained with.
        template: the serving template.
        tokenizer: the model's, with SID tokens.
        engine: a decoding engine over the same map.
        max_history: items of a history that the prompt keeps (the newest).
        model_stage: which stage the model came from.
        filter_seen: the rule under which it was validated.
    """

    def __init__(
        self,
        catalog: pl.DataFrame,
        semantic_ids: SemanticIds,
        renderer: PromptRenderer,
        template: str,
        tokenizer: Any,
        engine: Engine,
        max_history: int,
        model_stage: str,
        filter_seen: bool = True,
    ) -> None:
        self.catalog, self.semantic_ids = catalog, semantic_ids
        self.renderer, self.template, self.tokenizer = renderer, template, tokenizer
        self.engine, self.max_history, self.model_stage = engine, max_history, model_stage
        self.filter_seen = filter_seen
        self.sids = np.array(semantic_ids.sids().to_list(), dtype=object)
        self._row_of = dict(zip(catalog[ITEM_ID].to_list(), range(len(catalog)), strict=True))

    @classmethod
    def load(
        cls,
        run_dir: Path | str,
        stage: str | None = None,
        engine: str = "torch",
        normalizer: Normalizer = "full",
        dtype: Any = "float32",
        batch_size: int = 64,
        model_run: Path | str | None = None,
    ) -> Recommender:
        """Load a run folder.

        Args:
            run_dir: the run.
            stage: "sft" or "grpo"; by default grpo where it is complete, else sft.
            engine: "torch" (in process), "vllm" (requests) or "vllm-inworker" (its fast path).
            normalizer: of the scores; full vocabulary, level or trie.
            dtype: of the weights.
            batch_size: users decoded together.
            model_run: run that the model comes from, with its tokenizer, templates and length of
                histories; `run_dir` then gives the catalogue and a SID map that extends the
                model's. None: `run_dir`.

        Raises:
            ValueError: a stage is missing, broken, or was built from other inputs, or the map does
                not extend the model's.
        """
        if engine not in ENGINES:
            raise ValueError(f"engine={engine!r} is not known; choose one of {', '.join(ENGINES)}")
        if stage is not None and stage not in MODEL_STAGES:
            raise ValueError(
                f"stage={stage!r} is not known; choose one of {', '.join(MODEL_STAGES)}"
            )
        source = run_dir if model_run is None else model_run
        stage = stage or ("grpo" if load_manifest(source, "grpo") else "sft")
        trained = require(source, stage)
        data = require(source, "prepare")
        dataset = require(source, "build_dataset")
        require(run_dir, "quantize")
        semantic_ids = SemanticIds.load(stage_folder(run_dir, "quantize"))
        trie = SidTrie.build(semantic_ids.codes)
        folder = stage_folder(source, stage) / "model"
        if model_run is not None:
            _check_descent(run_dir, semantic_ids, model_run, folder)
        built: Engine
        if engine == "vllm":
            from genrec.decoding.vllm_engine import VllmEngine

            tokenizer, _ = load_tokenizer(folder, semantic_ids)
            token_ids = sid_token_ids(tokenizer, semantic_ids)
            built = VllmEngine(folder, trie, token_ids, normalizer, batch_size, dtype=dtype)
        elif engine == "vllm-inworker":
            from genrec.decoding.vllm_inworker import InWorkerEngine

            tokenizer, _ = load_tokenizer(folder, semantic_ids)
            token_ids = sid_token_ids(tokenizer, semantic_ids)
            built = InWorkerEngine(folder, trie, token_ids, normalizer, batch_size, dtype=dtype)
        else:
            from genrec.decoding.torch_engine import TorchEngine

            model, tokenizer, _ = load_model(folder, semantic_ids, dtype)
            token_ids = sid_token_ids(tokenizer, semantic_ids)
            pad = tokenizer.pad_token_id
            pad = tokenizer.eos_token_id if pad is None else pad
            built = TorchEngine(model, trie, token_ids, pad, normalizer, batch_size)
        return cls(
            pl.read_parquet(stage_folder(run_dir, "prepare") / "catalog.parquet"),
            semantic_ids,
            PromptRenderer(stage_folder(source, "build_dataset") / "prompts"),
            dataset.metrics["serving_template"],
            tokenizer,
            built,
            data.config["max_history"],
            stage,
            trained.config.get("filter_seen", True),
        )

    def prompts(self, histories: Sequence[Sequence[int]]) -> list[str]:
        """Rendered prompts of histories of catalogue rows, oldest first."""
        return [
            history_prompt(
                self.renderer, self.template, self.sids[list(h)[-self.max_history :]].tolist()
            )
            if len(h)
            else history_prompt(self.renderer, self.template, [])
            for h in histories
        ]

    def rows_of(self, item_ids: Sequence[Any]) -> list[int]:
        """Catalogue rows of item ids.

        Raises:
            ValueError: an id is not in the catalogue.
        """
        unknown = [item for item in item_ids if item not in self._row_of]
        if unknown:
            known = next(iter(self._row_of))
            raise ValueError(
                f"{len(unknown)} items of the history are not in the catalogue, the first is "
                f"{unknown[0]!r} (ids look like {known!r}); leave them out"
            )
        return [self._row_of[item] for item in item_ids]

    def recommend(
        self,
        history: Sequence[Any],
        k: int = 10,
        filter_seen: bool | None = None,
        beam_width: int | None = None,
    ) -> list[Recommendation]:
        """The k best items after a history of item ids, oldest first (empty: nobody known).

        Args:
            history: the user's item ids.
            k: length of the list.
            filter_seen: leave out items of the history; default: the rule of the run.
            beam_width: prefixes kept per level; default max(2k, 50).
        """
        rows = self.rows_of(history)
        prompt = self.prompts([rows])
        filter_seen = self.filter_seen if filter_seen is None else filter_seen
        seen = [np.array(rows, dtype=np.int64)] if filter_seen else None
        result = self.engine.search(
            encode_prompts(self.tokenizer, prompt), k, beam_width or default_beam_width(k), seen
        )
        titles = self.catalog[TITLE]
        ids = self.catalog[ITEM_ID]
        return [
            Recommendation(
                rank + 1,
                ids[int(item)],
                titles[int(item)],
                float(result.scores[0, rank]),
                str(self.sids[item]),
                tuple(float(x) for x in result.level_log_probs[0, rank]),
            )
            for rank, item in enumerate(result.items[0])
            if item >= 0
        ]

    def table(self, rows: pl.DataFrame, prompts: Sequence[str], result: BeamResult) -> pl.DataFrame:
        """Long table of lists: one row per recommended item (see `genrec.columns`)."""
        row, rank = np.nonzero(result.items >= 0)
        item = result.items[row, rank]
        hashes = np.array([sha256_bytes(p.encode()) for p in prompts])
        return pl.DataFrame(
            {
                ROW_ID: rows[ROW_ID].gather(row),
                USER_ID: rows[USER_ID].gather(row),
                RANK: (rank + 1).astype(np.int32),
                ITEM_ID: self.catalog[ITEM_ID].gather(item),
                ITEM_INDEX: item.astype(np.int32),
                SID: self.semantic_ids.sids().gather(item),
                SCORE: result.scores[row, rank],
                LEVEL_LOG_PROBS: pl.Series(result.level_log_probs[row, rank]).arr.to_list(),
                CERTIFIED: result.certified[row],
                PROMPT_SHA256: hashes[row],
            }
        )


def _check_descent(
    run_dir: Path | str, semantic_ids: SemanticIds, model_run: Path | str, model: Path
) -> None:
    """Raise ValueError unless the run's map extends the one that the other run's model knows."""
    if (model / ABOUT).exists():
        trained_on = read_json(model / ABOUT)["semantic_ids_sha256"]
        if not semantic_ids.descends_from(trained_on):
            raise ValueError(
                f"the SID map in {stage_folder(run_dir, 'quantize')} ({semantic_ids.sha256[:12]}) "
                f"does not extend the one that the model in {model} was trained on "
                f"({trained_on[:12]}); make it with: genrec quantize --run_dir {run_dir} "
                f"--extend {model_run} --overwrite true"
            )


def generate(
    recommender: Recommender,
    rows: pl.DataFrame,
    folder: Path | str,
    k: int,
    beam_width: int,
    seen: pl.Series | None,
    shard_size: int = 2048,
    progress: Callable[[int], object] | None = None,
) -> int:
    """Lists for all split rows, one Parquet shard after another; finished shards are kept.

    A shard is written whole under its final name, so after a kill the next call goes on where this
    one stopped and nothing is lost or doubled.

    Args:
        recommender: the run.
        rows: split rows.
        folder: where ``recommendations-00000.parquet``, … go.
        k: items per list.
        beam_width: prefixes kept per level.
        seen: list column of catalogue rows that each row must not get, or None.
        shard_size: split rows per shard.
        progress: called with the number of rows of each finished batch.

    Returns:
        Number of lists generated by this call.
    """
    done = 0
    for shard, start in enumerate(range(0, len(rows), shard_size)):
        path = Path(folder) / f"recommendations-{shard:05d}.parquet"
        part = rows.slice(start, shard_size)
        if path.exists():
            logger.info("%s is there, skipped", path.name)
            if progress is not None:
                progress(len(part))
            continue
        prompts = recommender.prompts(part[HISTORY].to_list())
        excluded = None
        if seen is not None:
            excluded = [
                np.asarray(s, dtype=np.int64) for s in seen.slice(start, shard_size).to_list()
            ]
        ids = encode_prompts(recommender.tokenizer, prompts)
        result = recommender.engine.search(ids, k, beam_width, excluded, progress=progress)
        write_parquet(path, recommender.table(part, prompts, result))
        done += len(part)
    return done
