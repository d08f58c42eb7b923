"""Audit records: for each explained list, what went in, what decided, and what came out.

A record names users by pseudonym and files by hash. What replay needs and the record must not hold
(user id, history, prompt, chains that cite the history) is its payload, which can be erased. The
recommended items stay in the record: treat it as pseudonymous data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl
from transformers import AutoTokenizer

import genrec
from genrec.artifacts import (
    ABOUT,
    FOLDERS,
    Manifest,
    load_manifest,
    read_json,
    read_shards,
    require,
    sha256_bytes,
    sha256_file,
    sha256_json,
    stage_folder,
)
from genrec.audit.custody import SCHEMA, read_log
from genrec.audit.erasure import ERASURES
from genrec.audit.keys import AuditKey
from genrec.audit.payloads import STORE, Payload, Sealed, read_payloads
from genrec.audit.pii import mask
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
from genrec.decoding.item_tokens import item_tokens
from genrec.modeling import encode_prompts
from genrec.prompts import PromptRenderer
from genrec.tasks.sequential import history_prompt
from genrec.title_ids import load_map

_DECISIVE = {
    "prepare": ("catalog.parquet",),
    "quantize": ("items.parquet", "semantic_ids.json"),
}
ENVIRONMENT = "environment.txt"  # in the log's folder
# Of the log's folder, what erasing changes: the stage's manifest doesn't list it.
UNLISTED = (STORE, ERASURES, "report.html")
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
    hashes[f"{FOLDERS['audit']}/{ENVIRONMENT}"] = sha256_bytes(environment().encode())
    return hashes


def _combined(hashes: Mapping[str, str]) -> str | None:
    """One hash over named hashes; None of none."""
    return sha256_json(dict(sorted(hashes.items()))) if hashes else None


@cache
def package_sha256() -> str:
    """Hash over the files of the package that runs now."""
    root = Path(genrec.__file__).parent
    kinds = (".py", ".jinja", ".json", ".md", ".css")
    files = sorted(p for p in root.rglob("*") if p.suffix in kinds and p.is_file())
    return sha256_json({p.relative_to(root).as_posix(): sha256_file(p) for p in files})


@cache
def environment() -> str:
    """Installed packages now, one ``name==version`` a line: the lock file of the recording."""
    found = {(str(d.name).lower(), d.version) for d in metadata.distributions() if d.name}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found))


def base_name(run: ExplainedRun) -> str:
    """What the weights began as; `grpo` hands on what `sft` noted in ``genrec.json``."""
    about = read_json(stage_folder(run.run_dir, run.model_stage) / "model" / ABOUT)
    base = str(about["base"])
    if base.startswith("scratch-"):
        return f"from scratch, size {base.removeprefix('scratch-')}"
    return base


def _base_model(run: ExplainedRun) -> dict[str, Any]:
    """Name of what was fine-tuned, and the hash of its files where they are at hand."""
    trained = load_manifest(run.run_dir, "sft")
    path = trained.config.get("model_name_or_path") if trained else None
    files = sorted(Path(path).glob("*")) if path else []
    weights = [p for p in files if p.suffix in (".safetensors", ".json")]
    sha256 = _combined({p.name: sha256_file(p) for p in weights})
    return {"name": base_name(run), "sha256": sha256}


def _artefacts(run: ExplainedRun) -> dict[str, Any]:
    made, quantize = run.manifests["recommend"], stage_folder(run.run_dir, "quantize")
    semantic_ids = load_map(quantize)
    tokenizer = AutoTokenizer.from_pretrained(stage_folder(run.run_dir, run.model_stage) / "model")
    model = {n: o["sha256"] for n, o in run.manifests[run.model_stage].outputs.items()}
    packages = environment()
    return {
        "code": {"git_commit": made.git_commit, "package_sha256": package_sha256()},
        "versions": made.versions,
        "lockfile": {
            "packages": packages.count("\n"),
            "sha256": sha256_bytes(packages.encode()),
        },
        "model_stage": run.model_stage,
        "base_model": _base_model(run),
        "model_sha256": _combined({n: h for n, h in model.items() if n.startswith("model/")}),
        "adapter_sha256": _combined({n: h for n, h in model.items() if n.startswith("adapter/")}),
        "tokenizer_sha256": model.get("model/tokenizer.json"),
        "catalogue_sha256": run.manifests["prepare"].outputs["catalog.parquet"]["sha256"],
        "sid_map_sha256": semantic_ids.sha256,
        "trie_sha256": item_tokens(tokenizer, semantic_ids, quantize).trie.sha256,
        "dataset_sha256": run.manifests["build_dataset"].content_hash,
        "prompts_sha256": run.prompts().sha256(),
        "files": artifact_hashes(run),
    }


def run_facts(run: ExplainedRun) -> dict[str, Any]:
    """The parts that all records of a run share: run, artefacts and decoding."""
    made = run.manifests["recommend"]
    config = made.config
    engine = str(config["engine"])
    return {
        "schema": SCHEMA,
        "made_at": made.finished_at,
        "run": {
            "name": run.run_dir.resolve().name,
            "fingerprints": {s: m.fingerprint for s, m in run.manifests.items()},
        },
        "artefacts": _artefacts(run),
        "decoding": {
            "engine": engine,
            "engine_version": made.versions.get(engine),  # None: the stage didn't note it
            "hardware": made.machine,
            "mode": "constrained beam search",
            "dtype": config["dtype"],
            "k": config["k"],
            "beam_width": config["beam_width"],
            "normalizer": config["normalizer"],
            "seed": config["seed"],
            "filter_seen": config["filter_seen"],
        },
    }


def filters(run: ExplainedRun, n_seen: int) -> list[dict[str, Any]]:
    """Every rule that kept items out of a list.

    Args:
        run: the finished stages.
        n_seen: distinct items that the user of the list had before.
    """
    made = run.manifests["recommend"]
    found: list[dict[str, Any]] = []
    if made.config["filter_seen"]:
        rule = "items that the user had before are left out"
        found.append({"name": "seen", "rule": rule, "removed_items": n_seen, "sha256": None})
    rules = {"allow": "only the items of a file", "deny": "not the items of a file"}
    for name, rule in rules.items():
        if made.config.get(name) is not None:
            sha256 = made.inputs.get(name)
            found.append({"name": name, "rule": rule, "removed_items": None, "sha256": sha256})
    return found


def inputs(run: ExplainedRun) -> list[dict[str, Any]]:
    """The exact input of each list, in the order of `run.rows`; it belongs into the payload."""
    semantic_ids = load_map(stage_folder(run.run_dir, "quantize"))
    renderer = run.prompts()
    tokenizer = AutoTokenizer.from_pretrained(stage_folder(run.run_dir, run.model_stage) / "model")
    sids, ids = semantic_ids.sids().to_list(), run.catalog[ITEM_ID].to_list()
    limit = run.manifests["prepare"].config["max_history"]
    histories = [h[-limit:] for h in run.rows[HISTORY].to_list()]
    prompts = [history_prompt(renderer, run.template, [sids[i] for i in h]) for h in histories]
    tokens = encode_prompts(tokenizer, prompts)
    return [
        {
            "history": [{ITEM_ID: ids[i], SID: sids[i]} for i in history],
            "set_aside_item_ids": [ids[i] for i in sorted(set(seen) - set(history))],
            "prompt": prompt,
            "prompt_sha256": sha256_bytes(prompt.encode()),
            "token_ids": [int(token) for token in row],
        }
        for history, seen, prompt, row in zip(
            histories, run.rows[SEEN].to_list(), prompts, tokens, strict=True
        )
    ]


def build_records(
    run: ExplainedRun, key: AuditKey, time: str
) -> list[tuple[dict[str, Any], Payload]]:
    """One record per explained list with its payload, not yet numbered or chained.

    Args:
        run: the finished stages.
        key: makes the pseudonyms.
        time: UTC time of recording, ISO 8601.

    Returns:
        (record, payload) per list, for `custody.seal` and `payloads.write_payloads`.

    Raises:
        ValueError: a list was made from another prompt than its history gives now.
    """
    shared = run_facts(run)
    by_row = run.lists.partition_by(ROW_ID, as_dict=True, include_key=True)
    made: list[tuple[dict[str, Any], Payload]] = []
    users, row_ids = run.rows[USER_ID].to_list(), run.rows[ROW_ID].to_list()
    earlier = run.rows[TARGET_POSITION].to_list()  # interactions before the target
    for user, row_id, count, given in zip(users, row_ids, earlier, inputs(run), strict=True):
        table = by_row[(row_id,)]
        if not given["prompt_sha256"].startswith(table[PROMPT_SHA256][0]):
            raise ValueError(
                f"row {row_id}: its list was made from prompt {table[PROMPT_SHA256][0]}, its "
                f"history gives {given['prompt_sha256'][:16]}; rerun recommend and explain"
            )
        items, chains = _items(run, row_id, table)
        known = [*(item[ITEM_ID] for item in items), *(e[ITEM_ID] for e in given["history"])]
        masked = mask_chains(chains, known)
        checks = _counts(chains)
        payload = {
            "identity": Sealed.new({USER_ID: user, ROW_ID: row_id}),
            "input": Sealed.new(given),
            "chains": Sealed.new(chains),
        }
        before = {e[ITEM_ID] for e in given["history"]} | set(given["set_aside_item_ids"])
        record = {
            **shared,
            "time": time,
            "user": {"pseudonym": key.pseudonym(user), "key_id": key.key_id},
            "filters": filters(run, len(before)),
            "input": {
                "split": run.split,
                "template": run.template,
                "history_items": len(given["history"]),
                "truncated": count - len(given["history"]),
                "set_aside_items": len(given["set_aside_item_ids"]),
                "prompt_tokens": len(given["token_ids"]),
            },
            "commitments": {part: sealed.commitment for part, sealed in payload.items()},
            "items": items,
            "certified": bool(table[CERTIFIED][0]),
            "checks": checks,
            "verdict": _verdict(checks),
            "masked": masked,
        }
        made.append((record, payload))
    return made


def opened(record: Mapping[str, Any], payload: Payload | None) -> dict[str, Any]:
    """A record together with its payload, as replay and report read it.

    Args:
        record: from the log.
        payload: None if it was erased.

    Returns:
        A copy with `erased`; where it is False also with `row_id`, `user_id`, the exact input
        beside the counts, and `chain` of each item.
    """
    if payload is None:
        return {**record, "erased": True}
    chains = payload["chains"].content
    items = [{**i, "chain": c} for i, c in zip(record["items"], chains, strict=True)]
    given = {**record["input"], **payload["input"].content}
    return {**record, **payload["identity"].content, "input": given, "items": items,
            "erased": False}  # fmt: skip


def read_opened(folder: Path | str) -> list[dict[str, Any]]:
    """All records of a log, unverified, with those payloads that are left.

    Raises:
        ValueError: log or store is missing or damaged, or a payload lacks a part.
    """
    payloads = read_payloads(folder)
    found = []
    for record in read_log(folder):
        try:
            found.append(opened(record, payloads.get(record["record"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"record {record.get('record')!r} and its payload don't fit ({error!r}); check the "
                "log with: genrec audit verify"
            ) from error
    return found


def mask_chains(chains: list[dict[str, Any] | None], item_ids: Sequence[object]) -> dict[str, int]:
    """Mask personal data in the steps' texts, in place; returns how many of each kind.

    Claimed attributes stay: they are the catalogue's, and checks compare them with it.
    """
    counts: Counter[str] = Counter()
    for chain in chains:
        for step in chain["steps"] if chain else ():
            step["text"], found = mask(step["text"], item_ids)
            counts.update(found)
    return dict(counts)


def _items(
    run: ExplainedRun, row_id: str, table: pl.DataFrame
) -> tuple[list[dict[str, Any]], list[dict[str, Any] | None]]:
    """The list, and a chain or None for each of its items."""
    columns = (RANK, ITEM_ID, SID, SCORE, LEVEL_LOG_PROBS)
    items, chains = [], []
    for values in table.select(columns).iter_rows(named=True):
        chain = run.chains.get((row_id, values[ITEM_ID]))
        items.append({**values, "explained": chain is not None})
        chains.append(None if chain is None else chain.to_json())
    return items, chains


def _counts(chains: list[dict[str, Any] | None]) -> dict[str, dict[str, int]]:
    """Per check with a verdict: how many chains passed, failed, or didn't define it."""
    counts = {name: {"passed": 0, "failed": 0, "undefined": 0} for name in _LISTED}
    for chain in chains:
        for check in chain["checks"] if chain else ():
            if check["name"] in counts:
                verdict = {True: "passed", False: "failed", None: "undefined"}[check["passed"]]
                counts[check["name"]][verdict] += 1
    return counts


def _verdict(checks: Mapping[str, Mapping[str, int]]) -> str:
    if any(count["failed"] for count in checks.values()):
        return "failed"
    return "passed" if any(count["passed"] for count in checks.values()) else "not checked"
