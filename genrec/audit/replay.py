"""Replay a record: the same prompt, the same search, the same list?

Two independent tests. The search is run again with the recorded settings, on the engine that made
the list or on another. And the recorded items are teacher-forced on torch, one prompt at a time,
which tests the recorded log-probabilities without depending on the search or on which users were
batched together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec.artifacts import FOLDERS, sha256_bytes, stage_folder
from genrec.columns import ITEM_ID, LEVEL_LOG_PROBS, SCORE, TRAIN_COUNT
from genrec.decoding.torch_engine import TorchEngine
from genrec.embedding.vectors import content_file
from genrec.generation.non_profiling import (
    SHOWN,
    ContentNeighbours,
    counts_sha256,
    popular_items,
)
from genrec.modeling import encode_prompts
from genrec.recommend import Recommender

EPSILON = 1e-3  # |Δ log-prob| that engines and batch layouts may differ by, in float32
ERASED = "erased: its payload is gone, so it can't be replayed; its hash and place still verify"
# Best first; a list that misses all of them is "different".
LEVELS = ("same bytes", "same ordered list", "same set", "within epsilon", "different")


@dataclass(frozen=True)
class Replay:
    """What one replay found.

    Attributes:
        record: number of the record.
        level: one of `LEVELS`. "same bytes": prompt, order and every log-probability bit; "same
            ordered list" and "same set": of items; "within epsilon": another set, but the
            recorded log-probabilities hold; "different": none of these.
        prompt_matches: the rebuilt prompt has the recorded hash; of a list without profiling: the
            counts or vectors that it rests on have.
        changed_files: recorded files that are absent or have other bytes now.
        search_difference: largest |Δ log-prob| of the same items in both lists, nats; None if none.
        forced_difference: largest |Δ log-prob| of the recorded items under teacher forcing. Both
            are None for a list without profiling, which no model made.
        swaps_within_epsilon: all places whose item changed have scores within `EPSILON`.
        made_by: engine that made the list.
        engine: engine of this replay. Another one promises the same list within `EPSILON` alone,
            in float32.
    """

    record: int
    level: str
    prompt_matches: bool
    changed_files: list[str]
    search_difference: float | None
    forced_difference: float | None
    swaps_within_epsilon: bool
    made_by: str
    engine: str

    @property
    def passed(self) -> bool:
        """Whether the record is reproduced: nothing but swaps within `EPSILON` may differ."""
        return (
            self.prompt_matches
            and not self.changed_files
            and self.level in LEVELS[:4]
            and self.swaps_within_epsilon
            and (self.forced_difference is None or self.forced_difference <= EPSILON)
            and (self.search_difference is None or self.search_difference <= EPSILON)
        )

    def __str__(self) -> str:
        """One line."""
        line = (
            f"record {self.record}: {'reproduced' if self.passed else 'NOT reproduced'}, "
            f"{self.level}; "
        )
        if self.forced_difference is None:
            line += f"by {self.engine}, without a model"
        else:
            search = "–" if self.search_difference is None else f"{self.search_difference:.1e}"
            line += (
                f"largest |Δ log-prob| {search} in the search, {self.forced_difference:.1e} "
                f"teacher-forced (ε {EPSILON:g})"
            )
        if self.engine != self.made_by:
            line += f"; made by {self.made_by}, replayed on {self.engine}"
        if not self.prompt_matches:
            line += (
                "; the prompt differs"
                if self.forced_difference is not None
                else f"; the {'counts' if self.engine == 'popularity' else 'vectors'} differ"
            )
        if self.changed_files:
            line += f"; changed since: {', '.join(self.changed_files)}"
        return line


@dataclass(frozen=True)
class Replayer:
    """A run as its records say that it was served.

    Attributes:
        engine: name of the engine that searches.
        recommender: with that engine, one user at a time.
        scorer: scores given items, on torch.
        source: the run.
    """

    engine: str
    recommender: Recommender
    scorer: TorchEngine
    source: Path

    @cached_property
    def content(self) -> tuple[str, ContentNeighbours]:
        """Name of the file of content vectors, and what is alike by them.

        Raises:
            ValueError: the run has none.
        """
        if (name := content_file(self.source)) is None:
            raise ValueError(f"the items of {self.source} have no vectors made from texts")
        neighbours = ContentNeighbours(stage_folder(self.source, "embed") / name)
        return f"{FOLDERS['embed']}/{name}", neighbours


def load_replayer(
    run_dir: Path | str,
    record: Mapping[str, Any],
    engine: str = "torch",
    engine_options: Mapping[str, Any] | None = None,
) -> Replayer:
    """The run as a record says it was served.

    Args:
        run_dir: the run.
        record: any of its log.
        engine: that searches: "torch", "vllm" or "vllm-inworker". With one of vLLM the weights are
            loaded twice, as torch scores the recorded items.
        engine_options: of an engine of vLLM (see `Recommender.load`).
    """
    made, stage = record["decoding"] or {}, record["artefacts"]["model_stage"]

    def load(name: str, options: Mapping[str, Any] | None = None) -> Recommender:
        how = made.get("normalizer"), made.get("dtype", "float32")
        return Recommender.load(run_dir, stage, name, *how, batch_size=1, engine_options=options)

    recommender = load(engine, engine_options)
    scorer = recommender.engine if engine == "torch" else load("torch").engine
    assert isinstance(scorer, TorchEngine)
    return Replayer(engine, recommender, scorer, Path(run_dir))


def replay(
    record: Mapping[str, Any], replayer: Replayer, current: Mapping[str, str | None]
) -> Replay:
    """Replay one record.

    Args:
        record: with its payload, from `genrec.audit.records.opened`.
        replayer: from `load_replayer` for a record with the same settings.
        current: hashes now, from `genrec.audit.verify.hashes_now`.

    Raises:
        ValueError: the payload was erased, the list was made under a filter that replay doesn't
            have, or the record names items that the catalogue lacks or has not a record's fields.
    """
    if record.get("erased"):
        raise ValueError(f"record {record.get('record')!r}: {ERASED}")
    try:
        _check_filters(record)
        if record["ordering"]["mode"] == "non-profiling":
            return _replay_rule(record, replayer, current)
        return _replay(record, replayer, current)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"record {record.get('record')!r} lacks what replay needs ({error!r}); "
            "check the log with: genrec audit verify"
        ) from error


def _check_filters(record: Mapping[str, Any]) -> None:
    others = [f["name"] for f in record["filters"] if f["name"] not in ("seen", "candidates")]
    if others:
        raise ValueError(
            f"record {record['record']}: its list was made under the rules {others}, which no "
            "record holds all of; replay knows the filter of seen items and a user's candidates"
        )


def _changed(record: Mapping[str, Any], current: Mapping[str, str | None]) -> list[str]:
    files = record["artefacts"]["files"].items()
    return [name for name, sha256 in files if current.get(name) != sha256]


def _replay_rule(
    record: Mapping[str, Any], replayer: Replayer, current: Mapping[str, str | None]
) -> Replay:
    """Order the catalogue again by what the record says that its list rests on."""
    catalog, k = replayer.recommender.catalog, len(record["items"])
    shown = record["input"].get(SHOWN)
    if shown is None:
        rule, data = "popularity", counts_sha256(catalog)
        items = popular_items(catalog, k)
        scores = catalog[TRAIN_COUNT].gather(items).cast(pl.Float64).to_list()
    else:
        rule, (name, neighbours) = "content", replayer.content
        data = current.get(name) or ""
        (item,) = replayer.recommender.rows_of([shown])
        items, cosines = neighbours.nearest(int(item), k)
        scores = cosines.tolist()
    ids = catalog[ITEM_ID].gather(items).to_list()
    stated = [item[ITEM_ID] for item in record["items"]]
    level = LEVELS[4]
    if ids == stated:
        same = scores == [item[SCORE] for item in record["items"]]
        level = LEVELS[0] if same else LEVELS[1]
    elif set(ids) == set(stated):
        level = LEVELS[2]
    # The data that the rule orders stand in the place of a prompt.
    same_data = record["ordering"]["data_sha256"] == data
    exact = level == LEVELS[0]
    return Replay(
        int(record["record"]), level, same_data, _changed(record, current), None, None, exact,
        rule, rule,
    )  # fmt: skip


def _replay(
    record: Mapping[str, Any], replayer: Replayer, current: Mapping[str, str | None]
) -> Replay:
    given, made, recommender = record["input"], record["decoding"], replayer.recommender
    history = recommender.rows_of([entry[ITEM_ID] for entry in given["history"]])
    recommender.template = given["template"]
    prompt = recommender.prompts([history])
    ids = encode_prompts(recommender.tokenizer, prompt)
    prompt_matches = sha256_bytes(prompt[0].encode()) == given["prompt_sha256"]
    seen = None
    if made["filter_seen"]:
        aside = recommender.rows_of(given["set_aside_item_ids"])
        seen = [np.unique(np.array([*history, *aside], dtype=np.int64))]
    candidates = None
    if "candidate_item_ids" in given:
        only = recommender.rows_of(given["candidate_item_ids"])
        candidates = [np.array(only, dtype=np.int64)]
    k, width = made["k"], made["beam_width"]
    result = recommender.engine.search(ids, k, width, seen, candidates=candidates)
    listed = result.items[0] >= 0
    found = result.items[0][listed]
    levels = result.level_log_probs[0][listed]
    stated = np.array(recommender.rows_of([item[ITEM_ID] for item in record["items"]]))
    scores = np.array([item[SCORE] for item in record["items"]], dtype=np.float64)
    stated_levels = np.array([item[LEVEL_LOG_PROBS] for item in record["items"]], dtype=np.float32)
    forced = replayer.scorer.score(ids, stated[None])[0]  # (k, L)
    forced_difference = float(np.abs(forced - stated_levels).max())
    again = dict(zip(found.tolist(), levels, strict=True))
    differences = [
        float(np.abs(again[item] - level).max())
        for item, level in zip(stated.tolist(), stated_levels, strict=True)
        if item in again
    ]
    same_scores = len(found) == len(stated) and bool(
        (np.abs(result.scores[0][listed] - scores) <= EPSILON).all()
    )
    same_bytes = prompt_matches and np.array_equal(levels, stated_levels)
    return Replay(
        int(record["record"]),
        _level(found, stated, same_bytes, forced_difference),
        prompt_matches,
        _changed(record, current),
        max(differences, default=None),
        forced_difference,
        np.array_equal(found, stated) or same_scores,
        str(made["engine"]),
        replayer.engine,
    )


def _level(found: np.ndarray, stated: np.ndarray, same_bytes: bool, forced: float) -> str:
    if np.array_equal(found, stated):
        return LEVELS[0] if same_bytes else LEVELS[1]
    if set(found.tolist()) == set(stated.tolist()):
        return LEVELS[2]
    return LEVELS[3] if forced <= EPSILON else LEVELS[4]
