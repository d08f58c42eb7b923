"""Audit records: for each list, what went in, what decided, and what came out.

Every list that recommend made has a record, also that of a user who opted out of profiling. A list
that is not in explain's sample has no chains, and its record says so. A record names users by
pseudonym and files by hash. What replay needs and the record must not hold (user id, history,
prompt, chains that cite the history) is its payload, which can be erased. The recommended items
stay in the record, and those of a list by content tell what was on show: treat it as pseudonymous
data.

Longer than other modules: a record is written and opened again by what stands here side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import polars as pl

import genrec
from genrec.artifacts import (
    ABOUT,
    FOLDERS,
    load_manifest,
    read_json,
    require,
    sha256_bytes,
    sha256_file,
    sha256_json,
    stage_folder,
)
from genrec.audit.custody import Made, read_log
from genrec.audit.erasure import ERASURES
from genrec.audit.inputs import InputMaker
from genrec.audit.keys import AuditKey
from genrec.audit.payloads import STORE, Payload, Sealed, Store, open_store
from genrec.audit.pii import Finder, mask
from genrec.audit.recorded import EARLIER, ListShard, RecordedRun
from genrec.audit.schema import SCHEMA
from genrec.chains import Chain
from genrec.columns import (
    CERTIFIED,
    ITEM_ID,
    LEVEL_LOG_PROBS,
    PROMPT_SHA256,
    RANK,
    ROW_ID,
    SCORE,
    SID,
    USER_ID,
)
from genrec.embedding.vectors import content_file
from genrec.explain.thresholds import VERDICTS
from genrec.generation.non_profiling import (
    CONTENT,
    NON_PROFILING,
    POPULARITY,
    SHOWN,
    counts_sha256,
)

_DECISIVE = {
    "prepare": ("catalog.parquet",),
    "quantize": ("items.parquet", "semantic_ids.json"),
}
ENVIRONMENT = "environment.txt"  # in the log's folder
# Of the log's folder, what erasing changes: the stage's manifest doesn't list it.
UNLISTED = (STORE, ERASURES, "report.html")
_ITEM = (RANK, ITEM_ID, SID, SCORE, LEVEL_LOG_PROBS)
_NO_INPUT: dict[str, Any] = {"history": [], "set_aside_item_ids": []}


def artifact_hashes(run: RecordedRun) -> dict[str, str]:
    """Path below the run -> SHA-256 of each file that decided or explains the lists.

    Of the lists themselves each record names its own file alone: naming all of them in all records
    would make a log's size grow with the square of its lists.
    """
    splits = () if run.rows is None else (f"{run.split}.parquet",)
    chosen = {
        **_DECISIVE,
        "prepare": (*_DECISIVE["prepare"], *splits),
        "build_dataset": (f"prompts/{run.template}.jinja",),
    }
    hashes = {}
    for stage, manifest in run.manifests.items():
        for name, output in manifest.outputs.items():
            is_model = stage == run.model_stage and name.startswith("model/")
            is_list = stage == "recommend" and name == "rows.parquet"
            is_chain = stage == "explain" and name != "config.yaml"
            if is_model or is_list or is_chain or name in chosen.get(stage, ()):
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


def base_name(run: RecordedRun) -> str:
    """What the weights began as; `grpo` hands on what `sft` noted in ``genrec.json``."""
    about = read_json(stage_folder(run.source, run.model_stage) / "model" / ABOUT)
    base = str(about["base"])
    if base.startswith("scratch-"):
        return f"from scratch, size {base.removeprefix('scratch-')}"
    return base


def _base_model(run: RecordedRun) -> dict[str, Any]:
    """Name of what was fine-tuned, and the hash of its files where they are at hand."""
    trained = load_manifest(run.source, "sft")
    path = trained.config.get("model_name_or_path") if trained else None
    files = sorted(Path(path).glob("*")) if path else []
    weights = [p for p in files if p.suffix in (".safetensors", ".json")]
    sha256 = _combined({p.name: sha256_file(p) for p in weights})
    return {"name": base_name(run), "sha256": sha256}


def _artefacts(run: RecordedRun, maker: InputMaker) -> dict[str, Any]:
    made = run.manifests["recommend"]
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
        "sid_map_sha256": maker.semantic_ids.sha256,
        "trie_sha256": maker.trie.sha256,
        "dataset_sha256": run.manifests["build_dataset"].content_hash,
        "prompts_sha256": run.prompts().sha256(),
        "files": artifact_hashes(run),
    }


def run_facts(run: RecordedRun, maker: InputMaker) -> dict[str, Any]:
    """The parts that all records of a run share: run, artefacts and decoding.

    Args:
        run: the finished stages.
        maker: has read what the prompts are made of.
    """
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
        "artefacts": _artefacts(run, maker),
        "ordering": {
            "mode": "profiling",
            "rule": "log-probability under the model",
            "data_sha256": None,
        },
        "decoding": {
            "engine": engine,
            "engine_version": made.versions.get(engine),  # None: the stage didn't note it
            "hardware": made.machine,
            "mode": "constrained beam search" if not config.get("sampler") else "drawn",
            "dtype": config["dtype"],
            "k": config["k"],
            "beam_width": config["beam_width"],
            "normalizer": config["normalizer"],
            "seed": config.get("seed"),  # nothing was drawn where there is none
            "filter_seen": config["filter_seen"],
        },
    }


def filters(run: RecordedRun) -> list[dict[str, Any]]:
    """Every rule that kept items out of the lists; how many, where it differs by user, later.

    Args:
        run: the finished stages.
    """
    made = run.manifests["recommend"]
    found: list[dict[str, Any]] = []

    def add(name: str, rule: str, sha256: str | None = None) -> None:
        found.append({"name": name, "rule": rule, "removed_items": None, "sha256": sha256})

    if made.config["filter_seen"]:
        also = made.config.get("exclude_column")
        rule = "items that the user had before are left out"
        add("seen", rule + (f", and those of the table's column {also!r}" if also else ""))
    elif also := made.config.get("exclude_column"):
        add("exclude", f"items of the table's column {also!r} are left out")
    if only := made.config.get("candidates_column"):
        add("candidates", f"only the items of the table's column {only!r}")
    rules = {"allow": "only the items of a file", "deny": "not the items of a file"}
    for name, rule in rules.items():
        if made.config.get(name) is not None:
            add(name, rule, made.inputs.get(name))
    if shaping := _shaping(made.config):
        add("shaping", shaping)
    return found


def _shaping(config: Mapping[str, Any]) -> str:
    """How lists were drawn or shaped, in words; empty for those of the plain search."""
    names = ["one_per_title", "title_variant", "max_per_category", "boosts", "max_cosine"]
    if config.get("sampler") == "levels":
        names = ["sampler", "temperature", "top_p"]
    elif config.get("sampler"):
        names = ["sampler"]
    elif config.get("max_per_category") is not None:
        names.append("category_depth")
    if config.get("memory_weight"):
        names += ["memory_weight", "memory_power"]
    unset = ("None", "False", "[]")  # not by value: a depth of 0 is set
    stated = {name: config[name] for name in names if str(config.get(name)) not in unset}
    return ", ".join(f"{name}={value}" for name, value in stated.items())


def build_records(
    run: RecordedRun, key: AuditKey, time: str, find: Finder | None = None
) -> Iterator[Made]:
    """Records of all lists with their payloads, one by one, for `custody.write_log`.

    Args:
        run: the finished stages.
        key: makes the pseudonyms.
        time: UTC time of recording, ISO 8601.
        find: finds personal data in the chains' texts beside the patterns.

    Raises:
        ValueError: a list was made from another prompt than its history gives now, or see
            `RecordedRun.shards`.
    """
    maker, rules = InputMaker(run), filters(run)
    facts = run_facts(run, maker)
    for shard in run.shards():
        path = f"{FOLDERS['recommend']}/{shard.name}"
        sha256 = run.manifests["recommend"].outputs[shard.name]["sha256"]
        files = {**facts["artefacts"]["files"], path: sha256}
        shared = {**facts, "time": time, "artefacts": {**facts["artefacts"], "files": files}}
        yield from _records(run, shard, shared, maker, rules, key, find)
    if (lists := run.non_profiling()) is not None:
        yield from _non_profiling_records(run, lists, {**facts, "time": time}, rules, key)


def _records(
    run: RecordedRun,
    shard: ListShard,
    shared: Mapping[str, Any],
    maker: InputMaker,
    rules: list[dict[str, Any]],
    key: AuditKey,
    find: Finder | None,
) -> Iterator[Made]:
    """Records of a file's lists; `shared` is what they have in common."""
    rows, (inputs, before) = shard.rows, maker.make(shard.rows)
    lists = shard.lists
    counts = lists[ROW_ID].rle().struct.field("len").cast(pl.Int64)
    stops = counts.cum_sum()
    first = lists[(stops - counts).to_list()]
    items = [
        {RANK: rank, ITEM_ID: item, SID: sid, SCORE: score, LEVEL_LOG_PROBS: levels,
         "explained": False}
        for rank, item, sid, score, levels in zip(
            *(lists[column].to_list() for column in _ITEM), strict=True
        )
    ]  # fmt: skip
    no_checks, key_id = _counts([]), key.key_id
    none_masked: dict[str, int] = {}
    for row_id, user, earlier, given, n_before, stop, count, prompt_sha256, certified in zip(
        rows[ROW_ID].to_list(),
        rows[USER_ID].to_list(),
        rows[EARLIER].to_list(),
        inputs,
        before,
        stops.to_list(),
        counts.to_list(),
        first[PROMPT_SHA256].to_list(),
        first[CERTIFIED].to_list(),
        strict=True,
    ):
        if not given["prompt_sha256"].startswith(prompt_sha256):
            raise ValueError(
                f"row {row_id}: its list was made from prompt {prompt_sha256}, its history gives "
                f"{given['prompt_sha256'][:16]}; rerun recommend and what follows it"
            )
        own = items[stop - count : stop]
        payload = {
            "identity": Sealed.new({USER_ID: user, ROW_ID: row_id}),
            "input": Sealed.new(given),
        }
        removed = {"seen": n_before}
        if "candidate_item_ids" in given:
            removed["candidates"] = len(run.catalog) - len(given["candidate_item_ids"])
        checks, verdict, masked = no_checks, "not checked", none_masked
        if explained := run.chains.get(row_id):
            chains = _chains(own, explained)
            known = [*(item[ITEM_ID] for item in own), *(e[ITEM_ID] for e in given["history"])]
            masked, checks = mask_chains(chains, known, find), _counts(chains)
            verdict = _verdict(checks)
            payload["chains"] = Sealed.new(chains)
        commitments = {part: sealed.commitment for part, sealed in payload.items()}
        record = {
            **shared,
            "user": {"pseudonym": key.pseudonym(user), "key_id": key_id},
            "filters": [
                {**rule, "removed_items": removed[rule["name"]]}
                if rule["name"] in removed
                else rule
                for rule in rules
                if rule["name"] != "candidates" or rule["name"] in removed
            ],
            "input": {
                "split": run.split,
                "template": run.template,
                "history_items": len(given["history"]),
                "truncated": earlier - len(given["history"]),
                "set_aside_items": len(given["set_aside_item_ids"]),
                "prompt_tokens": len(given["token_ids"]),
            },
            "commitments": {"chains": None, **commitments},
            "items": own,
            "certified": certified,
            "checks": checks,
            "verdict": verdict,
            "masked": masked,
        }
        yield record, payload


def _non_profiling_records(
    run: RecordedRun,
    lists: pl.DataFrame,
    shared: Mapping[str, Any],
    rules: list[dict[str, Any]],
    key: AuditKey,
) -> Iterator[Made]:
    """Records of lists that use no history: one list for all, or one for each item on show."""
    made = run.manifests["recommend"].outputs[NON_PROFILING]
    catalogue = f"{FOLDERS['prepare']}/catalog.parquet"
    decisive = catalogue, f"{FOLDERS['audit']}/{ENVIRONMENT}"
    files = {name: shared["artefacts"]["files"][name] for name in decisive}
    files[f"{FOLDERS['recommend']}/{NON_PROFILING}"] = made["sha256"]
    alike: dict[str, str] = {}  # file of the vectors -> hash
    if lists[SHOWN].count():
        name = content_file(run.source)
        assert name is not None, "recommend makes no list by content without them"
        alike[f"{FOLDERS['embed']}/{name}"] = require(run.source, "embed").outputs[name]["sha256"]
    rests_on = {
        POPULARITY: (counts_sha256(run.catalog), files),
        CONTENT: (next(iter(alike.values()), None), files | alike),
    }
    of_rule = {
        rule: {
            "artefacts": {**shared["artefacts"], "files": named},
            "ordering": {"mode": "non-profiling", "rule": rule, "data_sha256": data},
        }
        for rule, (data, named) in rests_on.items()
    }
    shared = {
        **shared,
        "decoding": None,
        "filters": [rule for rule in rules if rule["name"] != "seen"],
        "input": {
            "split": run.split,
            "template": None,
            "history_items": 0,
            "truncated": 0,
            "set_aside_items": 0,
            "prompt_tokens": 0,
        },
        "certified": True,  # by the rule, which leaves no choice
        "checks": _counts([]),
        "verdict": "not checked",
        "masked": {},
    }
    key_id = key.key_id
    firsts = lists.unique(ROW_ID, keep="first", maintain_order=True)
    items: dict[Any, list[dict[str, Any]]] = {}  # by the item on show: such lists are the same
    for shown, row_id in firsts.unique(SHOWN).select(SHOWN, ROW_ID).iter_rows():
        own = lists.filter(pl.col(ROW_ID) == row_id).select(RANK, ITEM_ID, SID, SCORE)
        items[shown] = [
            {**item, LEVEL_LOG_PROBS: [], "explained": False} for item in own.iter_rows(named=True)
        ]
    for user, row_id, shown in firsts.select(USER_ID, ROW_ID, SHOWN).iter_rows():
        payload = {"identity": Sealed.new({USER_ID: user, ROW_ID: row_id})}
        if shown is not None:
            payload["input"] = Sealed.new({**_NO_INPUT, SHOWN: shown})
        commitments = {"identity": None, "input": None, "chains": None}
        record = {
            **shared,
            **of_rule[POPULARITY if shown is None else CONTENT],
            "user": {"pseudonym": key.pseudonym(user), "key_id": key_id},
            "commitments": commitments | {part: s.commitment for part, s in payload.items()},
            "items": items[shown],
        }
        yield record, payload


def opened(record: Mapping[str, Any], payload: Payload | None) -> dict[str, Any]:
    """A record together with its payload, as replay and report read it.

    Args:
        record: from the log.
        payload: None if it was erased.

    Returns:
        A copy with `erased`; where it is False also with `row_id`, `user_id`, the exact input
        beside the counts, and `chain` of each item (None where it was not explained).
    """
    if payload is None:
        return {**record, "erased": True}
    chains = payload["chains"].content if "chains" in payload else [None] * len(record["items"])
    items = [{**i, "chain": c} for i, c in zip(record["items"], chains, strict=True)]
    given = {**record["input"], **(payload["input"].content if "input" in payload else _NO_INPUT)}
    return {**record, **payload["identity"].content, "input": given, "items": items,
            "erased": False}  # fmt: skip


def open_record(store: Store, record: Mapping[str, Any]) -> dict[str, Any]:
    """`opened` with the payload from a store.

    Raises:
        ValueError: the payload is damaged or lacks a part.
    """
    try:
        return opened(record, store.get(record["record"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"record {record.get('record')!r} and its payload don't fit ({error!r}); check the "
            "log with: genrec audit verify"
        ) from error


def read_opened(
    folder: Path | str, wanted: Container[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Records of a log one by one, unverified, with those payloads that are left.

    Args:
        folder: of the log.
        wanted: numbers of the records; None: all.

    Raises:
        ValueError: log or store is missing or damaged, or a payload lacks a part.
    """
    with open_store(folder) as store:
        for record in read_log(folder):
            number = record.get("record")
            if wanted is None or (isinstance(number, int) and number in wanted):
                yield open_record(store, record)


def mask_chains(
    chains: list[dict[str, Any] | None], item_ids: Sequence[object], find: Finder | None = None
) -> dict[str, int]:
    """Mask personal data in the steps' texts, in place; returns how many of each kind.

    Claimed attributes stay: they are the catalogue's, and checks compare them with it.
    """
    counts: Counter[str] = Counter()
    for chain in chains:
        for step in chain["steps"] if chain else ():
            step["text"], found = mask(step["text"], item_ids, find)
            counts.update(found)
    return dict(counts)


def _chains(
    items: list[dict[str, Any]], explained: Mapping[Any, Chain]
) -> list[dict[str, Any] | None]:
    """A chain or None for each item of a list; the items are marked."""
    chains = []
    for item in items:
        chain = explained.get(item[ITEM_ID])
        item["explained"] = chain is not None
        chains.append(None if chain is None else chain.to_json())
    return chains


def _counts(chains: list[dict[str, Any] | None]) -> dict[str, dict[str, int]]:
    """Per check with a verdict: how many chains passed, failed, or didn't define it."""
    counts = {name: {"passed": 0, "failed": 0, "undefined": 0} for name in VERDICTS}
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
