"""Recommender: a run folder or a bundle in, ranked catalogue items out.

Longer than other modules: loading, its checks and every way of asking belong to one class, which is
what users of the library meet.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl

from genrec.artifacts import read_json, sha256_bytes, stage_folder
from genrec.bundle.files import is_bundle
from genrec.bundle.parts import DEFAULT_K, ServedParts
from genrec.bundle.parts import MODEL_STAGES as MODEL_STAGES
from genrec.bundle.serving_base import with_adapter
from genrec.chain_reader import ChainReader
from genrec.columns import (
    CERTIFIED,
    HISTORY_ITEMS,
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
from genrec.decoding.beam import BeamResult, default_beam_width
from genrec.decoding.free_text import TextSampling
from genrec.decoding.item_tokens import item_tokens
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import CatalogueView, SidTrie
from genrec.item_index import ItemIndex
from genrec.modeling import ABOUT, encode_prompts, load_model, load_tokenizer
from genrec.normalizers import Normalizer, resolve_normalizer
from genrec.prompts import PromptRenderer, escape_text
from genrec.reasoning import (
    REASONING,
    ReasonedList,
    decision_marker,
    read_lists,
    sample_chains,
    search_with_chains,
)
from genrec.semantic_ids import SemanticIds
from genrec.sid_texts import SidTexts
from genrec.tasks.families import FAMILIES, SEQUENTIAL
from genrec.tasks.sequential import history_prompt
from genrec.title_ids import ItemMap, TitleIds, load_map

ENGINES = ("torch", "vllm", "vllm-inworker")
TITLES_ON_TORCH = (
    "engine={engine}: items that are named by titles are searched by engine=torch alone yet; use "
    "it, or a map of semantic ids (genrec quantize --method residual-kmeans)"
)
QUERY_SEARCH, JOINT_SEARCH = "query_search", "intention_search"
BY_PROFILE = "preference_recommendation"


class Engine(Protocol):
    """What a decoding engine offers (see `genrec.decoding.torch_engine.TorchEngine.search`)."""

    trie: SidTrie

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
        semantic_ids: the map, row for row.
        renderer: the templates that the run was trained with.
        template: the serving template.
        tokenizer: the model's, with SID tokens.
        engine: a decoding engine over the same map.
        max_history: items of a history that the prompt keeps (the newest).
        model_stage: which stage the model came from.
        filter_seen: the rule under which it was validated.
        k: length of lists that are asked for without one.
        beam_width: search width of lists of at most `k` items; None: by their length.
        families: task families that the model was trained on by sft. (grpo goes on with one
            alone, the sequential family or, with chains, the reasoning one, and may wear the others
            down.)
        trained_on_target: whether the reasoning chains that it learned from saw the answer, as the
            run recorded it; None where it did not.
    """

    def __init__(
        self,
        catalog: pl.DataFrame,
        semantic_ids: ItemMap,
        renderer: PromptRenderer,
        template: str,
        tokenizer: Any,
        engine: Engine,
        max_history: int,
        model_stage: str,
        filter_seen: bool = True,
        k: int = DEFAULT_K,
        beam_width: int | None = None,
        families: Collection[str] = (SEQUENTIAL,),
        trained_on_target: bool | None = None,
    ) -> None:
        self.catalog, self.semantic_ids = catalog, semantic_ids
        self.renderer, self.template, self.tokenizer = renderer, template, tokenizer
        self.engine, self.max_history, self.model_stage = engine, max_history, model_stage
        self.filter_seen, self.k, self.beam_width = filter_seen, k, beam_width
        self.families, self.trained_on_target = frozenset(families), trained_on_target
        self.sids = SidTexts(semantic_ids)
        self._index = ItemIndex(catalog[ITEM_ID])

    @classmethod
    def load(
        cls,
        run_dir: Path | str,
        stage: str | None = None,
        engine: str = "torch",
        normalizer: Normalizer | None = None,
        dtype: Any = "float32",
        batch_size: int = 64,
        model_run: Path | str | None = None,
        engine_options: Mapping[str, Any] | None = None,
    ) -> Recommender:
        """Load a run folder, or a bundle that `genrec export` made of one.

        Args:
            run_dir: the run or bundle.
            stage: "sft" or "grpo"; by default grpo where it is complete, else sft. A bundle has
                one.
            engine: "torch" (in process), "vllm" (requests) or "vllm-inworker" (its fast path).
            normalizer: of the scores: full vocabulary, level or trie; default: what the model
                declares. Another one is logged as a warning.
            dtype: of the weights.
            batch_size: users decoded together.
            model_run: run that the model comes from, with its tokenizer, templates and length of
                histories; `run_dir` then gives the catalogue and a SID map that extends the
                model's. None: `run_dir`.
            engine_options: further settings of a vLLM engine, such as tensor_parallel_size,
                gpu_memory_utilization or max_model_len: the keyword arguments of
                `genrec.decoding.vllm_engine.VllmEngine` or
                `genrec.decoding.vllm_inworker.InWorkerEngine`. They change no list.

        Raises:
            ValueError: an engine has no such option, a stage is missing, broken, or was built from
                other inputs, the map does not extend the model's, or a bundle isn't what was
                exported.
        """
        if engine not in ENGINES:
            raise ValueError(f"engine={engine!r} is not known; choose one of {', '.join(ENGINES)}")
        options = dict(engine_options or {})
        if options and engine == "torch":
            raise ValueError(
                f"engine_options ({', '.join(options)}) are those of vLLM; leave them out with "
                "engine='torch'"
            )
        if is_bundle(run_dir):
            if model_run is not None:
                raise ValueError(f"{run_dir} is a bundle and holds its model; leave model_run out")
            parts = ServedParts.of_bundle(run_dir, stage)
        else:
            parts = ServedParts.of_run(run_dir, stage, model_run)
        semantic_ids = load_map(parts.semantic_ids)
        if engine != "torch" and isinstance(semantic_ids, TitleIds):
            raise ValueError(TITLES_ON_TORCH.format(engine=engine))
        catalog = pl.read_parquet(parts.catalog, glob=False)
        if not catalog[ITEM_ID].equals(semantic_ids.item_ids):
            raise ValueError(
                f"{parts.catalog} and the SID map in {parts.semantic_ids} hold other items; "
                "restore both, or rerun quantize"
            )
        if model_run is not None:
            check_descent(run_dir, semantic_ids, model_run, parts.model)
        if parts.adapter is not None and engine == "vllm-inworker":
            raise ValueError(
                f"{run_dir} keeps its adapter apart, which engine='vllm-inworker' doesn't put on a "
                "model; use engine='vllm', or export without serving_base"
            )
        tokenizer, _ = load_tokenizer(parts.model, semantic_ids)
        written = item_tokens(tokenizer, semantic_ids, parts.semantic_ids, parts.model)
        trie, token_ids = written.trie, written.token_ids
        scores = resolve_normalizer(normalizer, parts.model)
        built: Engine
        if engine == "vllm":
            from genrec.decoding.vllm_engine import VllmEngine

            _check_options(VllmEngine, options)
            built = VllmEngine(
                parts.model,
                trie,
                token_ids,
                scores,
                batch_size,
                dtype=dtype,
                lora=parts.adapter,
                **options,
            )
        elif engine == "vllm-inworker":
            from genrec.decoding.vllm_inworker import InWorkerEngine

            _check_options(InWorkerEngine, options)
            built = InWorkerEngine(
                parts.model, trie, token_ids, scores, batch_size, dtype=dtype, **options
            )
        else:
            model, _, _ = load_model(parts.model, semantic_ids, dtype)
            if parts.adapter is not None:
                model = with_adapter(model, parts.adapter)
            pad = tokenizer.pad_token_id
            pad = tokenizer.eos_token_id if pad is None else pad
            built = TorchEngine(model, trie, token_ids, pad, scores, batch_size)
        return cls(
            catalog,
            semantic_ids,
            PromptRenderer(parts.prompts),
            parts.template,
            tokenizer,
            built,
            parts.max_history,
            parts.model_stage,
            parts.filter_seen,
            parts.k,
            parts.beam_width,
            parts.families,
            parts.trained_on_target,
        )

    def too_long(self, prompt: str) -> str | None:
        """Why a prompt doesn't fit the model; None where it does, or no limit is known."""
        needed = len(encode_prompts(self.tokenizer, [prompt])[0]) + self.engine.trie.n_levels
        context = getattr(self.engine, "context", None)
        if context is None or needed <= context:
            return None
        return f"with its item it needs {needed} tokens, and the model holds {context}"

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

    def known_rows(self, item_ids: Sequence[Any]) -> tuple[list[int], list[Any]]:
        """Catalogue rows of the item ids that the catalogue has, and the ids that it lacks."""
        rows = self._index.rows_of_values(item_ids)
        return rows[rows >= 0].tolist(), [item_ids[at] for at in np.flatnonzero(rows < 0)]

    def rows_of(self, item_ids: Sequence[Any]) -> list[int]:
        """Catalogue rows of item ids.

        Raises:
            ValueError: an id is not in the catalogue.
        """
        rows, unknown = self.known_rows(item_ids)
        if unknown:
            known = self.catalog[ITEM_ID][0]
            raise ValueError(
                f"{len(unknown)} items of the history are not in the catalogue, the first is "
                f"{unknown[0]!r} (ids look like {known!r}); leave them out"
            )
        return rows

    def recommend(
        self,
        history: Sequence[Any],
        k: int | None = None,
        filter_seen: bool | None = None,
        beam_width: int | None = None,
    ) -> list[Recommendation]:
        """The k best items after a history of item ids, oldest first (empty: nobody known).

        Args:
            history: the user's item ids.
            k: length of the list; default 10, or the bundle's.
            filter_seen: leave out items of the history; default: the rule of the run.
            beam_width: prefixes kept per level; default `default_beam_width`, or for lists no
                longer than its own the bundle's.
        """
        k = self.k if k is None else k
        width = beam_width or self.width_of(k)
        rows = self.rows_of(history)
        prompt = self.prompts([rows])
        filter_seen = self.filter_seen if filter_seen is None else filter_seen
        seen = [np.array(rows, dtype=np.int64)] if filter_seen else None
        result = self.engine.search(encode_prompts(self.tokenizer, prompt), k, width, seen)
        return self.recommendations(result, 0)

    def check_length(self, k: int) -> None:
        """Raise ValueError if a list of k items is longer than the catalogue."""
        if k > len(self.catalog):
            raise ValueError(
                f"k={k:,} exceeds the {len(self.catalog):,} items of the catalogue; use at most "
                "that"
            )

    def width_of(self, k: int) -> int:
        """Search width of a list of k items: the bundle's, else `default_beam_width`."""
        return (self.beam_width if k <= self.k else None) or default_beam_width(k)

    def recommendations(self, result: BeamResult, row: int) -> list[Recommendation]:
        """One row of a search's result as items of the catalogue; padding is left out."""
        titles = self.catalog[TITLE]
        ids = self.catalog[ITEM_ID]
        sids = self.sids[np.maximum(result.items[row], 0)]
        return [
            Recommendation(
                rank + 1,
                ids[int(item)],
                titles[int(item)],
                float(result.scores[row, rank]),
                sids[rank],
                tuple(float(x) for x in result.level_log_probs[row, rank]),
            )
            for rank, item in enumerate(result.items[row])
            if item >= 0
        ]

    def search(
        self,
        query: str,
        k: int = 10,
        history: Sequence[Any] | None = None,
        filter_seen: bool = False,
        beam_width: int | None = None,
    ) -> list[Recommendation]:
        """The k best items for a query in words (joint search: with a history as well).

        One model searches and recommends (Penha et al. 2025). Without a history the prompt is that
        of the family `query_search`, with one that of `intention_search`. The query is untrusted
        text: it is escaped and cut as in training, so no part of it can become a SID token.

        Args:
            query: what is looked for.
            k: length of the list.
            history: the user's item ids, oldest first, perhaps none yet; None: a search that knows
                no user.
            filter_seen: leave out items of the history. A searcher may look for what they have.
            beam_width: prefixes kept per level; default `default_beam_width`.

        Raises:
            ValueError: the model was not trained on that family, the query says nothing, or an item
                is unknown.
        """
        family = QUERY_SEARCH if history is None else JOINT_SEARCH
        self.require_family(family)
        if not escape_text(query):
            raise ValueError(f"query={query!r} says nothing; give some words")
        rows = self.rows_of(history or [])
        (prompt,) = self.family_prompts(family, [rows], [query])
        seen = [np.array(rows, dtype=np.int64)] if filter_seen else None
        result = self.engine.search(
            encode_prompts(self.tokenizer, [prompt]), k, beam_width or self.width_of(k), seen
        )
        return self.recommendations(result, 0)

    @staticmethod
    def search_family(rows: Sequence[int]) -> str:
        """The family of a query beside these catalogue rows: without any it is a plain search."""
        return JOINT_SEARCH if len(rows) else QUERY_SEARCH

    def search_prompt(self, query: str, rows: Sequence[int]) -> str:
        """Prompt of a query beside a history of catalogue rows, oldest first."""
        return self.family_prompts(self.search_family(rows), [rows], [query])[0]

    def recommend_by_profile(
        self,
        history: Sequence[Any],
        profile: str,
        k: int = 10,
        filter_seen: bool | None = None,
        beam_width: int | None = None,
    ) -> list[Recommendation]:
        """The k best items for a user whose taste is told in words beside the history.

        The words are the user's to edit, as in language-based factorisation (LFM) and LangPTune:
        another text gives another list. They are untrusted, and escaped and cut as in training.

        Args:
            history: the user's item ids, oldest first.
            profile: the taste, in the words of training rows or any others.
            k: length of the list.
            filter_seen: leave out items of the history; default: the rule of the run.
            beam_width: prefixes kept per level; default `default_beam_width`.

        Raises:
            ValueError: the model was not trained on that family, the profile says nothing, the
                history is shorter than any it was trained on, or an item is unknown.
        """
        self.require_family(BY_PROFILE)
        if not escape_text(profile):
            raise ValueError(f"profile={profile!r} says nothing; give some words")
        rows = self.rows_of(history)
        if len(rows) < (least := FAMILIES[BY_PROFILE].least_history):
            raise ValueError(
                f"the history has {len(rows)} items, and profiles were learned beside {least} or "
                "more; use `search`"
            )
        (prompt,) = self.family_prompts(BY_PROFILE, [rows], [profile])
        rule = self.filter_seen if filter_seen is None else filter_seen
        seen = [np.array(rows, dtype=np.int64)] if rule else None
        result = self.engine.search(
            encode_prompts(self.tokenizer, [prompt]), k, beam_width or self.width_of(k), seen
        )
        return self.recommendations(result, 0)

    def recommend_with_chains(
        self,
        history: Sequence[Any],
        k: int = 10,
        n_chains: int = 4,
        sampling: TextSampling | None = None,
        filter_seen: bool | None = None,
        beam_width: int | None = None,
        exact: bool = False,
    ) -> ReasonedList:
        """The k best items after a history, each with the reasoning that led to it.

        See `genrec.reasoning` for what is sampled, how lists are merged and what the scores are.

        Args:
            history: the user's item ids, oldest first.
            k: length of the list, and of each chain's.
            n_chains: chains that are sampled.
            sampling: temperature, top_p, limit and seed; default: the model's own distribution.
            filter_seen: leave out items of the history; default: the rule of the run.
            beam_width: prefixes kept per level; default `default_beam_width`.
            exact: score each candidate under every chain.

        Raises:
            ValueError: the model was not trained to reason, runs on another engine than torch, the
                history is shorter than any it was trained on, or holds an unknown item.
        """
        rows = self.rows_of(history)
        filter_seen = self.filter_seen if filter_seen is None else filter_seen
        seen = [np.array(rows, dtype=np.int64)] if filter_seen else None
        return self.reason([rows], k, n_chains, sampling, seen, beam_width, exact)[0]

    def reason(
        self,
        histories: Sequence[Sequence[int]],
        k: int,
        n_chains: int,
        sampling: TextSampling | None = None,
        seen: Sequence[np.ndarray] | None = None,
        beam_width: int | None = None,
        exact: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> list[ReasonedList]:
        """`recommend_with_chains` for many histories of catalogue rows, in one search.

        Args:
            histories: catalogue rows, oldest first.
            k: as there, and so for the arguments that are left out here.
            n_chains: as there.
            sampling: as there.
            seen: catalogue rows that each list must not hold, or None.
            beam_width: as there.
            exact: as there.
            progress: called with the number of histories whose chains are finished.

        Raises:
            ValueError: as there.
        """
        self.require_family(REASONING)
        engine = self.writing_engine()
        least = FAMILIES[REASONING].least_history
        if short := [i for i, history in enumerate(histories) if len(history) < least]:
            raise ValueError(
                f"history {short[0]} has {len(histories[short[0]])} items, and chains were learned "
                f"from {least} or more: there is nothing to reason from; use `recommend`"
            )
        beam_width = beam_width or self.width_of(k)
        if not 1 <= k <= beam_width:  # before minutes of sampling
            raise ValueError(f"k={k} must lie between 1 and beam_width={beam_width}")
        if not len(histories):
            return []
        shown = [list(history)[-self.max_history :] for history in histories]
        ids = encode_prompts(self.tokenizer, self.family_prompts(REASONING, shown))
        marker = decision_marker(self.renderer)
        sampling = sampling or TextSampling()
        chains = sample_chains(engine, self.tokenizer, ids, n_chains, marker, sampling, progress)
        merged = search_with_chains(engine, ids, chains, k, beam_width, seen, exact=exact)
        return read_lists(chains, merged, shown, self._chain_reader, exact, self.trained_on_target)

    def family_prompts(
        self,
        family: str,
        histories: Sequence[Sequence[int]],
        texts: Sequence[str] | None = None,
    ) -> list[str]:
        """Prompts of a family that shows a history of SIDs, a text, or both, as in training.

        Args:
            family: its first seen template is rendered, which every setting of `n_templates` keeps.
            histories: catalogue rows, oldest first; the newest `max_history` are shown.
            texts: untrusted text of each prompt, where the family shows one.
        """
        (template, *_) = self.renderer.names(family)
        columns = {column: variable for variable, (column, _) in FAMILIES[family].prompt.items()}
        told = columns.keys() - {HISTORY_ITEMS}
        prompts = []
        for i, history in enumerate(histories):
            sids = "".join(self.sids[list(history)[-self.max_history :]].tolist())
            own = {columns[HISTORY_ITEMS]: sids} if HISTORY_ITEMS in columns else {}
            untrusted = {columns[c]: texts[i] for c in told} if texts is not None else {}
            prompts.append(self.renderer.render(template, own, untrusted))
        return prompts

    @cached_property
    def _chain_reader(self) -> ChainReader:
        assert isinstance(self.semantic_ids, SemanticIds), "titles are refused before"
        return ChainReader.of_run(self.semantic_ids, self.catalog, self.renderer.folder)

    def writing_engine(self) -> TorchEngine:
        """The engine, where it can sample text.

        Raises:
            ValueError: it is one of vLLM's.
        """
        if not isinstance(self.engine, TorchEngine):
            raise ValueError(
                f"texts and chains are sampled in process, which {type(self.engine).__name__} "
                "doesn't offer; load the run with engine='torch'"
            )
        return self.engine

    def require_family(self, family: str) -> None:
        """Raise ValueError if the model was not trained on a task family."""
        if isinstance(self.semantic_ids, TitleIds) and FAMILIES[family].steps:
            raise ValueError(
                "items are named by titles (quantize --method title), and chains cite semantic "
                "ids; use `recommend`, or train on a map of semantic ids"
            )
        if family not in self.families:
            raise ValueError(
                f"the model was not trained on {family!r} (but on "
                f"{', '.join(sorted(self.families)) or 'nothing that the run recorded'}); build "
                f"the dataset with --tasks {SEQUENTIAL} {family} (or all), then run sft again"
            )

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
                SID: pl.Series(self.sids[item].tolist(), dtype=pl.String),
                SCORE: result.scores[row, rank],
                LEVEL_LOG_PROBS: pl.Series(result.level_log_probs[row, rank]).arr.to_list(),
                CERTIFIED: result.certified[row],
                PROMPT_SHA256: hashes[row],
            }
        )


def _check_options(engine: type, options: Mapping[str, Any]) -> None:
    """Raise ValueError if an engine doesn't take an option, or takes it from elsewhere."""
    parameters = inspect.signature(engine).parameters.values()
    known = [
        p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("dtype", "lora")
    ]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(
            f"engine_options name {unknown[0]!r}, which {engine.__name__} doesn't take; it takes "
            f"{', '.join(known)}"
        )


def check_descent(
    run_dir: Path | str, semantic_ids: ItemMap, model_run: Path | str, model: Path
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
