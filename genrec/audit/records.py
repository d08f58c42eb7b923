"""Audit records: for each explained list, what went in, what decided, and what came out.

A record names users by pseudonym and files by hash. It does hold the history's item ids, because
replay needs them: treat the log as personal data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from transformers import AutoTokenizer

from genrec.artifacts import FOLDERS, Manifest, read_shards, require, sha256_bytes, stage_folder
from genrec.audit.custody import SCHEMA, AuditKey
from genrec.chains import Chain, read_chains
from genrec.columns import (
    CERTIFIED,
    HISTORY,
    ITEM_ID,
    LEVEL_LOG_PROBS,
    PROMPT_SHA256,
    RANK,
    ROW_ID,
    SCORE,
    SEEN,
    SID,
    TARGET_POSITION,
    USER_ID,
)
from genrec.data.splits import read_split
from genrec.modeling import encode_prompts
from genrec.prompts import PromptRenderer
from genrec.semantic_ids import SemanticIds
from genrec.tasks.sequential import history_prompt

_DECISIVE = {
    "prepare": ("catalog.parquet",),
    "quantize": ("items.parquet", "semantic_ids.json"),
}
_LISTED = ("citations_in_history", "attributes_match", "score_difference")


@dataclass(frozen=True)
class ExplainedRun:
    """The finished stages of a run that its records are made from.

    Attributes:
        run_dir: the run.
        manifests: of every stage on the way, by name.
        rows: explained split rows, by row id: user, history (catalogue rows), seen items.
        lists: recommendations of these rows, sorted by row and rank.
        chains: by (row id, item id).
        catalog: ``catalog.parquet``.
    """

    run_dir: Path
    manifests: Mapping[str, Manifest]
    rows: pl.DataFrame
    lists: pl.DataFrame
    chains: Mapping[tuple[str, Any], Chain]
    catalog: pl.DataFrame

    @classmethod
    def load(cls, run_dir: Path | str) -> ExplainedRun:
        """Read a run; every stage up to explain must be complete and unbroken."""
        explain, recommend = require(run_dir, "explain"), require(run_dir, "recommend")
        model_stage = recommend.config["model_stage"]
        stages = ("prepare", "quantize", "build_dataset", model_stage)
        manifests = {stage: require(run_dir, stage) for stage in stages}
        chains = read_chains(stage_folder(run_dir, "explain") / "chains.jsonl")
        wanted = pl.DataFrame({ROW_ID: pl.Series([c.row_id for c in chains], dtype=pl.String)})
        split = read_split(run_dir, recommend.config["split"], "audit")
        lists = read_shards(stage_folder(run_dir, "recommend"), "recommendations")
        return cls(
            Path(run_dir),
            {**manifests, "recommend": recommend, "explain": explain},
            split.join(wanted, on=ROW_ID, how="semi").sort(ROW_ID),
            lists.join(wanted, on=ROW_ID, how="semi").sort(ROW_ID, RANK),
            {(chain.row_id, chain.item_id): chain for chain in chains},
            pl.read_parquet(stage_folder(run_dir, "prepare") / "catalog.parquet"),
        )

    @property
    def split(self) -> str:
        """Split that the lists answer."""
        return str(self.manifests["recommend"].config["split"])

    @property
    def model_stage(self) -> str:
        """Stage that the model came from."""
        return str(self.manifests["recommend"].config["model_stage"])

    @property
    def template(self) -> str:
        """Serving template."""
        return str(self.manifests["build_dataset"].metrics["serving_template"])

    def prompts(self) -> PromptRenderer:
        """The run's own copy of the templates."""
        return PromptRenderer(stage_folder(self.run_dir, "build_dataset") / "prompts")


def artifact_hashes(run: ExplainedRun) -> dict[str, str]:
    """Path below the run folder -> SHA-256 of each file that decided or explains the lists."""
    chosen = {
        **_DECISIVE,
        "prepare": (*_DECISIVE["prepare"], f"{run.split}.parquet"),
        "build_dataset": (f"prompts/{run.template}.jinja",),
    }
    hashes = {}
    for stage, manifest in run.manifests.items():
        for name, output in manifest.outputs.items():
            is_model = stage == run.model_stage and name.startswith("model/")
            is_list = stage in ("recommend", "explain") and name != "config.yaml"
            if is_model or is_list or name in chosen.get(stage, ()):
                hashes[f"{FOLDERS[stage]}/{name}"] = output["sha256"]
    return hashes


def run_facts(run: ExplainedRun) -> dict[str, Any]:
    """The parts that all records of a run share: run, artefacts and decoding."""
    made = run.manifests["recommend"]
    config = made.config
    engine = str(config["engine"])
    return {
        "schema": SCHEMA,
        "run": {
            "name": run.run_dir.resolve().name,
            "fingerprints": {s: m.fingerprint for s, m in run.manifests.items()},
        },
        "artefacts": {
            "git_commit": made.git_commit,
            "versions": made.versions,
            "model_stage": run.model_stage,
            "sid_map_sha256": SemanticIds.load(stage_folder(run.run_dir, "quantize")).sha256,
            "prompts_sha256": run.prompts().sha256(),
            "files": artifact_hashes(run),
        },
        "decoding": {
            "engine": engine,
            "engine_version": made.versions.get(engine),  # None: the stage didn't note it
            "mode": "constrained beam search",
            "dtype": config["dtype"],
            "k": config["k"],
            "beam_width": config["beam_width"],
            "normalizer": config["normalizer"],
            "seed": config["seed"],
            "filter_seen": config["filter_seen"],
            "filter_rule": "items that the user had before are left out"
            if config["filter_seen"]
            else "no item is left out",
        },
    }


def inputs(run: ExplainedRun) -> list[dict[str, Any]]:
    """The input part of each record, in the order of `run.rows`."""
    semantic_ids = SemanticIds.load(stage_folder(run.run_dir, "quantize"))
    renderer = run.prompts()
    tokenizer = AutoTokenizer.from_pretrained(stage_folder(run.run_dir, run.model_stage) / "model")
    sids, ids = semantic_ids.sids().to_list(), run.catalog[ITEM_ID].to_list()
    limit = run.manifests["prepare"].config["max_history"]
    histories = [h[-limit:] for h in run.rows[HISTORY].to_list()]
    prompts = [history_prompt(renderer, run.template, [sids[i] for i in h]) for h in histories]
    tokens = encode_prompts(tokenizer, prompts)
    earlier = run.rows[TARGET_POSITION].to_list()  # interactions before the target
    return [
        {
            "split": run.split,
            "template": run.template,
            "history": [{ITEM_ID: ids[i], SID: sids[i]} for i in history],
            "truncated": count - len(history),
            "set_aside_item_ids": [ids[i] for i in sorted(set(seen) - set(history))],
            "prompt_sha256": sha256_bytes(prompt.encode()),
            "prompt_tokens": len(row),
            "tokens_sha256": sha256_bytes(str(row).encode()),
        }
        for history, seen, prompt, row, count in zip(
            histories, run.rows[SEEN].to_list(), prompts, tokens, earlier, strict=True
        )
    ]


def build_records(run: ExplainedRun, key: AuditKey, time: str) -> list[dict[str, Any]]:
    """One record per explained list, not yet numbered or chained (see `custody.seal`).

    Args:
        run: the finished stages.
        key: makes the pseudonyms.
        time: UTC time of recording, ISO 8601.

    Raises:
        ValueError: a list was made from another prompt than its history gives now.
    """
    shared = run_facts(run)
    by_row = run.lists.partition_by(ROW_ID, as_dict=True, include_key=True)
    records = []
    users, row_ids = run.rows[USER_ID].to_list(), run.rows[ROW_ID].to_list()
    for user, row_id, given in zip(users, row_ids, inputs(run), strict=True):
        table = by_row[(row_id,)]
        if not given["prompt_sha256"].startswith(table[PROMPT_SHA256][0]):
            raise ValueError(
                f"row {row_id}: its list was made from prompt {table[PROMPT_SHA256][0]}, its "
                f"history gives {given['prompt_sha256'][:16]}; rerun recommend and explain"
            )
        items = _items(run, row_id, table)
        records.append(
            {
                **shared,
                "time": time,
                "row_id": row_id,
                "user": {"pseudonym": key.pseudonym(user), "key_id": key.key_id},
                "input": given,
                "items": items,
                "certified": bool(table[CERTIFIED][0]),
                "checks": _verdicts([item["chain"] for item in items]),
            }
        )
    return records


def _items(run: ExplainedRun, row_id: str, table: pl.DataFrame) -> list[dict[str, Any]]:
    columns = (RANK, ITEM_ID, SID, SCORE, LEVEL_LOG_PROBS)
    items = []
    for values in table.select(columns).iter_rows(named=True):
        chain = run.chains.get((row_id, values[ITEM_ID]))
        items.append({**values, "chain": None if chain is None else chain.to_json()})
    return items


def _verdicts(chains: list[dict[str, Any] | None]) -> dict[str, dict[str, int]]:
    """Per check with a verdict: how many chains passed, failed, or didn't define it."""
    counts = {name: {"passed": 0, "failed": 0, "undefined": 0} for name in _LISTED}
    for chain in chains:
        for check in chain["checks"] if chain else ():
            if check["name"] in counts:
                verdict = {True: "passed", False: "failed", None: "undefined"}[check["passed"]]
                counts[check["name"]][verdict] += 1
    return counts
