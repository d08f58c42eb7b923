"""The model card of a bundle, in the form of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from genrec.bundle.training_card import hub_base
from genrec.page import number
from genrec.tasks.card_readme import escaped, markdown_table

TO_FILL_IN = "**to be filled in before the model is passed on**"


def model_card(
    manifest: Mapping[str, Any], decoding: Mapping[str, Any], license: str | None = None
) -> str:
    """The card as Markdown with the front matter that the hub reads.

    Args:
        manifest: of the bundle, without its files.
        decoding: settings of serving.
        license: of the model; None: marked as to be filled in.
    """
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": license or "unknown",
        "tags": ["recommendation", "generative-recommendation", "semantic-ids", "genrec"],
    }
    if base := hub_base(manifest["base"]):
        front["base_model"] = base
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)
    lines = [
        f"# {escaped(manifest['name'])}", "",
        f"A generative recommender over {manifest['items']:,} items, made by genrec: a prompt",
        "shows what a user had, the model answers with the semantic id of an item, and constrained",
        "beam search keeps the answers inside the catalogue.", "",
        *_serving(decoding, manifest["adapter_apart"]), *_facts(manifest, decoding),
        *_figures(manifest), *_licence(manifest, license),
    ]  # fmt: skip
    return f"---\n{head}---\n\n" + "\n".join(lines).rstrip() + "\n"


def _serving(decoding: Mapping[str, Any], adapter_apart: bool) -> list[str]:
    model = ["`model/` alone is a plain checkpoint with its tokenizer, for transformers and vLLM;"]
    if adapter_apart:
        model = [
            "`model/` is the base with rows for the SID tokens, `adapter/` the LoRA adapter on it",
            "in PEFT's format, which vLLM loads too: together they are the trained model;",
        ]
    return [
        "## Use", "",
        "```python",
        "from genrec.recommend import Recommender", "",
        'recommender = Recommender.load("path/to/this/folder")',
        "recommender.recommend(history=[...])  # item ids, oldest first",
        "```", "",
        *model,
        "without the constrained search its answers need not be items. `genrec export --verify",
        "path/to/this/folder` hashes every file.", "",
        "| setting | value |", "| --- | --- |",
        *(f"| {escaped(name)} | {escaped(str(value))} |" for name, value in decoding.items()), "",
    ]  # fmt: skip


def _facts(manifest: Mapping[str, Any], decoding: Mapping[str, Any]) -> list[str]:
    dtype = manifest["dtype"]
    weights = f"{dtype['stored']}"
    if dtype["stored"] != dtype["trained"]:
        weights += (
            f", rounded from the {dtype['trained']} they were trained in: lists can differ from "
            "those of the run"
        )
    parameters = manifest["parameters"]
    facts = {
        "Base model": manifest["base"] or "not recorded",
        "Stage": manifest["model_stage"],
        "Parameters": f"{parameters:,}" if parameters else "not recorded",
        "Weights": weights,
        "Scores normalised over": decoding["normalizer"],
        "Catalogue, SHA-256": manifest["catalog_sha256"],
        "Data (prepare), content hash": manifest["sources"]["prepare"]["content_hash"],
        "SID map, SHA-256": manifest["sid_map_sha256"],
        "Prompts, SHA-256": manifest["prompts_sha256"],
        "Code of the export": manifest["git_commit"]
        or f"genrec {manifest['versions'].get('genrec')}",
    }
    return [
        "## How it was made", "",
        *(f"- {label}: {escaped(str(value))}" for label, value in facts.items()), "",
        "The bundle holds the catalogue's ids, titles, brands, categories, prices and counts of",
        "training interactions; no user, history or interaction is in it.", "",
    ]  # fmt: skip


def _figures(manifest: Mapping[str, Any]) -> list[str]:
    lines = ["## Figures", ""]
    best, found = manifest["validation"], manifest["evaluation"]
    if best:
        values = ", ".join(
            f"{name.upper()} {number(value)}" for name, value in best.items() if "@" in name
        )
        lines += [f"Best on a sample of the validation rows during training: {values}.", ""]
    if found:
        lines += [
            f"On the {escaped(found['split'])} rows ({found['rows']:,}; {found['items']:,} items; "
            f"seen items {'left out' if found['filter_seen'] else 'may be listed'}; scores over "
            f"{escaped(found['normalizer'])}), with 95% bootstrap intervals:", "",
        ]  # fmt: skip
        rows = [
            [name, number(v["value"]), f"{number(v['low'])} to {number(v['high'])}"]
            for name, v in found["metrics"].items()
        ]
        lines += markdown_table(["metric", "value", "interval"], rows)
        if manifest["dtype"]["stored"] != manifest["dtype"]["trained"]:
            lines += ["They were measured before the weights were rounded.", ""]
    if not best and not found:
        lines += ["None: the run was neither validated nor evaluated with this model.", ""]
    return lines


def _licence(manifest: Mapping[str, Any], license: str | None) -> list[str]:
    base = escaped(str(manifest["base"]))
    scratch = str(manifest["base"]).startswith("scratch-")
    return [
        "## Licence and limits", "",
        f"- Licence of the model: {escaped(license) if license else TO_FILL_IN}",
        *([] if scratch else [f"- Licence of the base model ({base}): {TO_FILL_IN}"]),
        f"- Licence of the data, and whether a model of them may be passed on: {TO_FILL_IN}",
        f"- Intended use, and what it must not be used for: {TO_FILL_IN}",
        "- Recommends what the training data made likely; who is rare in them is served worse.",
    ]  # fmt: skip
