"""The report page: one self-contained HTML file (see `genrec.page`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from markupsafe import Markup, escape

from genrec.artifacts import load_manifest, read_json, stage_folder
from genrec.audit.custody import HEAD, LogLine, log_lines
from genrec.audit.payloads import open_store
from genrec.audit.recorded import RecordedRun
from genrec.audit.records import base_name, open_record
from genrec.columns import ITEM_ID, ROW_ID, SCORE, TARGET, TITLE
from genrec.generation.non_profiling import CONTENT, POPULARITY, SHOWN
from genrec.page import display_text, environment

_CHECKS = {
    "citations_in_history": "Every cited item lies in the history that the prompt showed",
    "attributes_match": "Every claimed attribute stands in the catalogue",
    "score_difference": "The stored score was found again (within 0.001)",
    "target_leak": "No claim is true of the held-out item and of nothing in the history",
    "contradictions": "Nothing is both rested on and set aside, and no item is given two brands",
}
_FIGURES = {
    "citations_in_history": "Citations in the history",
    "attributes_match": "Claims true of the item",
    "evidence_agreement": "Citations among the largest Δ",
    "comprehensiveness": "Fall when the cited items are replaced by similar ones",
    "sufficiency": "Fall when all others are replaced (lower is better)",
    "stability": "Same citations under another wording of the prompt",
}
_CONTROLS = {
    "random": "Random",
    "newest": "Newest",
    "popular": "Most popular",
    "other_chain": "Another list's",
}


MAPPING = Path(__file__).with_name("mapping.md")


@dataclass(frozen=True)
class Sample:
    """What the page shows of a log.

    Attributes:
        records: with their payloads (`genrec.audit.records.opened`): first those of explained
            lists where a check failed, then those of other explained lists, then the rest.
        n_records: of the whole log.
        explained: records of explained lists.
        erased: records whose payload is gone.
        masked: personal data masked in all records, by kind.
        head: of the log.
    """

    records: list[dict[str, Any]]
    n_records: int
    explained: int
    erased: int
    masked: Mapping[str, int]
    head: Mapping[str, Any]


def read_sample(folder: Path | str, users: int) -> Sample:
    """Go through a log once, unverified, and take what the page shows.

    Args:
        folder: of the log.
        users: records to show.

    Raises:
        ValueError: log or store is missing or damaged.
    """
    masked: Counter[str] = Counter()
    found: list[list[LogLine]] = [[], [], []]
    counts = [0, 0, 0]
    for line in log_lines(folder):
        # A line is read only if it is needed. No text in a record can pass for these members:
        # quotes inside of it are escaped.
        failed, explained = (m in line.data for m in (b'"verdict":"failed"', b'"explained":true'))
        kind = 0 if failed else 1 if explained else 2
        counts[kind] += 1
        if len(found[kind]) < users:
            found[kind].append(line)
        if b'"masked":{}' not in line.data:
            masked.update(line.record()["masked"])
    chosen = [line for lines in found for line in lines][:users]
    with open_store(folder) as store:
        opened = [open_record(store, line.record()) for line in chosen]
        erased = sum(counts) - sum(1 for _ in store.records())
    head = read_json(Path(folder) / HEAD)
    return Sample(opened, sum(counts), counts[0] + counts[1], erased, masked, head)


def render_report(run: RecordedRun, sample: Sample) -> str:
    """The page."""
    explain = run.manifests.get("explain")
    cards = _cards(run, sample.records)
    widest = max(
        (e["delta"] for c in cards if not c["erased"] for i in c["items"] for e in i["evidence"]),
        default=1,
    )
    return (
        environment()
        .get_template("audit/report.html.jinja")
        .render(
            name=display_text(run.run_dir.resolve().name),
            facts=_facts(run),
            hashes=_hashes(run),
            evaluation=_evaluation(run),
            explain=explain.metrics if explain else None,
            explain_config=explain.config if explain else None,
            checks=_checks(explain.metrics) if explain else None,
            cards=cards,
            widest=widest,
            n_records=sample.n_records,
            n_explained=sample.explained,
            n_shards=len(sample.head["shards"]),
            erased=sample.erased,
            masked=sample.masked,
            time=sample.head["time"],
            head=sample.head,
            key_id=sample.head["key_id"],
            mapping=read_mapping(),
        )
    )


def read_mapping() -> dict[str, Any]:
    """``mapping.md``, which ships with the package: paragraphs, columns and rows of its table."""
    text = MAPPING.read_text(encoding="utf-8")
    blocks = [block for block in text.split("\n\n") if not block.startswith("#")]
    lines = [line.strip("| \n").split(" | ") for line in blocks[-1].splitlines()]
    columns, _, *rows = lines
    return {
        "paragraphs": [_inline(" ".join(block.split())) for block in blocks[:-1]],
        "columns": columns,
        "rows": [[_inline(cell) for cell in row] for row in rows],
    }


def _inline(text: str) -> Markup:
    """Markdown's bold and code, which is all that the mapping uses."""
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", html))


def _facts(run: RecordedRun) -> dict[str, str]:
    """What the run is, label by label."""
    split = read_json(stage_folder(run.source, "prepare") / "split.json")
    prepare, quantize = run.manifests["prepare"], run.manifests["quantize"]
    made, model = run.manifests["recommend"], run.manifests[run.model_stage]
    decoding = made.config
    sizes = [f"{split[n]:,} {n}" for n in ("users", "items", "interactions") if n in split]
    parameters, exact = model.metrics.get("parameters"), made.metrics.get("certified_share")
    over = {"full": "whole vocabulary", "level": "codes of a level", "trie": "trie"}
    facts = {
        "Data": f"{prepare.config.get('format', 'unknown format')}: {', '.join(sizes)}",
        "Split": f"{split.get('protocol', 'unknown')}; ties: {split.get('tie_rule', 'unknown')}; "
        + (
            "the lists are for a table of users"
            if run.rows is None
            else f"the lists answer the {run.split} rows"
        ),
        "History": f"a prompt shows at most the newest {prepare.config['max_history']} items",
        "Seen items": "left out of the lists" if decoding["filter_seen"] else "may be recommended",
        "Model": f"{run.model_stage} stage, {base_name(run)}"
        + (f", {parameters:,} parameters" if parameters else ""),
        "Semantic ids": f"{len(quantize.metrics.get('levels', []))} levels, {quantize.rows:,} "
        "items, no two share one",
        "Search": f"constrained beam search ({decoding['engine']}, {decoding['dtype']}), width "
        f"{decoding['beam_width']}, lists of {decoding['k']}",
        "Ordering": "by log-probability under the model alone, normalised over the "
        f"{over[decoding['normalizer']]}; no rule reorders the list afterwards",
        "Exact lists": "not stated"
        if exact is None
        else f"{exact:.1%} of all lists are proven to be the exact top of the allowed catalogue",
    }
    if apart := made.metrics.get("non_profiling_lists"):
        by_content = made.metrics.get("content_lists", 0)
        ways = [(apart - by_content, f"{POPULARITY}, the same list for all"), (by_content, CONTENT)]
        facts["Opted out"] = (
            f"{apart:,} lists of users who opted out of profiling use no history: "
            + "; ".join(f"{count:,} by {rule}" for count, rule in ways if count)
        )
    return {label: display_text(value, 300) for label, value in facts.items()}


def _hashes(run: RecordedRun) -> dict[str, str]:
    """Label -> full hash of what decided the lists."""
    prepare, quantize = run.manifests["prepare"].outputs, run.manifests["quantize"].outputs
    model = run.manifests[run.model_stage].outputs
    hashes = {
        "catalogue": prepare["catalog.parquet"]["sha256"],
        "semantic ids": quantize["items.parquet"]["sha256"],
        "prompts": run.prompts().sha256(),
    }
    if run.rows is None:
        hashes["table of users"] = run.manifests["recommend"].inputs["users"]
    else:
        hashes[f"{run.split} rows"] = prepare[f"{run.split}.parquet"]["sha256"]
    weights = {n: o["sha256"] for n, o in model.items() if n.endswith(".safetensors")}
    hashes |= {n: sha256 for n, sha256 in weights.items() if n.startswith("model/")}
    commit = run.manifests["recommend"].git_commit
    if commit:  # "+dirty" has to stay visible when the hash is cut
        hashes["code, with changes" if commit.endswith("+dirty") else "code"] = commit
    return hashes


def _evaluation(run: RecordedRun) -> dict[str, Any] | None:
    """The metrics table, if evaluate ran on these very lists."""
    manifest = load_manifest(run.run_dir, "evaluate")
    made = run.manifests["recommend"].content_hash
    if manifest is None or manifest.inputs.get("recommend") != made:
        return None
    metrics = read_json(stage_folder(run.run_dir, "evaluate") / "metrics.json")
    ours = manifest.config["system"]
    columns = [f"{m}@{k}" for k in manifest.config["ks"] for m in ("HR", "NDCG")]
    return {
        "dataset": display_text(metrics["dataset"]),
        "split": metrics["split"],
        "rows": metrics["rows"],
        "items": metrics["items"],
        "filter_seen": metrics["filter_seen"],
        "columns": columns,
        "systems": [
            {"name": display_text(name), "ours": name == ours, "values": [m[c] for c in columns]}
            for name, m in metrics["systems"].items()
        ],
        "differences": [
            {"name": display_text(name), "values": [m[c] for c in columns]}
            for name, m in metrics["differences"].items()
        ],
    }


def _checks(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the tables of checks, figures and thresholds."""
    verdicts = [
        {"label": label, **metrics["verdicts"][name]}
        for name, label in _CHECKS.items()
        if name in metrics["verdicts"]
    ]
    figures = [
        {
            "label": label,
            "n": figure["n"],
            "chain": figure["chain"],
            "controls": [figure["controls"].get(name) for name in _CONTROLS],
        }
        for name, label in _FIGURES.items()
        if (figure := metrics["figures"].get(name)) is not None
    ]
    return {
        "verdicts": verdicts,
        "figures": figures,
        "controls": list(_CONTROLS.values()),
        "thresholds": metrics["thresholds"],
        "slices": metrics["slices"],
        "counterfactuals": metrics["counterfactuals"],
    }


def _cards(run: RecordedRun, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is shown of each record."""
    titles = {i: display_text(t) for i, t in run.catalog.select(ITEM_ID, TITLE).iter_rows()}
    ids = run.catalog[ITEM_ID]
    targets = {}
    if run.rows is not None:
        wanted = [r[ROW_ID] for r in records if not r["erased"]]
        shown = run.rows.filter(pl.col(ROW_ID).is_in(wanted)).select(ROW_ID, TARGET)
        targets = {row: ids[target] for row, target in shown.iter_rows()}
    cards = []
    for record in records:
        if record["erased"]:
            cards.append({name: record[name] for name in ("record", "sha256", "erased")})
            continue
        history = [
            {"id": e[ITEM_ID], "title": titles[e[ITEM_ID]]} for e in record["input"]["history"]
        ]
        target = targets.get(record["row_id"])  # none of who opted out, nor in a table of users
        listed = [item[ITEM_ID] for item in record["items"]]
        shown = record["input"].get(SHOWN)
        cards.append(
            {
                "record": record["record"],
                "erased": False,
                "sha256": record["sha256"],
                "pseudonym": record["user"]["pseudonym"],
                "row_id": record["row_id"],
                "truncated": record["input"]["truncated"],
                "certified": record["certified"],
                "explained": record["commitments"]["chains"] is not None,
                "verdict": record["verdict"],
                "history": history,
                "profiling": record["ordering"]["mode"] == "profiling",
                "shown": None if shown is None else {"id": shown, "title": titles[shown]},
                "target": None if target is None else {"id": target, "title": titles[target]},
                "target_rank": listed.index(target) + 1 if target in listed else None,
                "items": [_item(item, titles, history) for item in record["items"]],
            }
        )
    return cards


def _item(
    item: Mapping[str, Any], titles: Mapping[Any, str], history: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    shown = {
        "rank": item["rank"],
        "id": item[ITEM_ID],
        "title": titles[item[ITEM_ID]],
        "sid": item["sid"],
        "score": item[SCORE],
        "explained": item["chain"] is not None,
        "evidence": [],
        "attributes": [],
        "said": [],
        "note": "",
    }
    if item["chain"] is None:
        return shown
    steps = {step["type"]: step for step in item["chain"]["steps"]}
    measured = steps["evidence"]["measured"]
    shown["evidence"] = [
        {"position": p, "title": history[p]["title"], "delta": delta}
        for p, delta in zip(measured["positions"], measured["deltas"], strict=True)
    ]
    if not shown["evidence"]:
        shown["note"] = display_text(steps["evidence"]["text"], 400)
    for name in ("preference", "set_aside", "counterfactual"):
        if name in steps:
            shown["said"].append(display_text(steps[name]["text"], 600))
    if "shared_attributes" in steps:
        shown["attributes"] = [
            {"name": s["attribute"], "value": display_text(s["value"]), "share": s["share"]}
            for s in steps["shared_attributes"]["measured"]["catalogue_shares"]
        ]
    return shown
