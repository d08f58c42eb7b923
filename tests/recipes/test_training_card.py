"""The model card beside a trained model: its hashes, what it doesn't tell, what it survives."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from genrec.artifacts import MANIFEST, Stage, read_json, require, write_json
from genrec.bundle.files import verify_bundle
from genrec.bundle.training_card import hub_base, shown_base, training_card
from genrec.bundle.writing import ExportSettings, write_bundle
from genrec.prompts import PromptRenderer
from genrec.semantic_ids import SemanticIds

BEFORE = {"sft": ["prepare", "quantize", "build_dataset"]}
BEFORE["grpo"] = [*BEFORE["sft"], "sft"]


def front_of(text: str) -> dict:
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert head is not None
    return yaml.safe_load(head[1])


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_hashes_are_those_of_the_manifests(stage: str, tiny_run: Path):
    text = (tiny_run / stage / "model" / "README.md").read_text()
    front = front_of(text)
    assert front["library_name"] == "transformers" and stage in front["tags"]
    assert "license" not in front and "base_model" not in front  # from scratch
    prepare, dataset = require(tiny_run, "prepare"), require(tiny_run, "build_dataset")
    ids = SemanticIds.load(tiny_run / "semantic_ids")
    for label, value in {
        "Split rows": prepare.metrics["content_sha256"],
        "Catalogue": prepare.outputs["catalog.parquet"]["sha256"],
        "Prepared data, content": prepare.content_hash,
        "SID map": ids.sha256,
        "Prompts": PromptRenderer(tiny_run / "dataset" / "prompts").sha256(),
        "Training rows, content": dataset.content_hash,
    }.items():
        assert f"- {label}: {value}\n" in text
    made = require(tiny_run, stage)
    best = {key: value for key, value in made.metrics["best"].items() if "@" in key}
    assert len(best) == 2
    for name, value in best.items():
        assert f"| {name.upper()} | {value:.4f} |" in text
    assert "40 validation rows" in text
    assert made.metrics["validation_rows"] == 40
    n = made.metrics["measurements"]
    assert n == len(read_json(tiny_run / stage / "validation.json")) and f"of {n} meas" in text
    assert f"- Parameters: {made.metrics['parameters']:,}\n" in text
    steps = made.config["training"]["max_steps"]
    assert f"- Optimizer steps: {steps}\n" in text
    assert f"over {prepare.metrics['items']:,} items" in text
    assert f"- Interactions: {prepare.metrics['interactions']:,}\n" in text
    assert str(tiny_run.parent) not in text and "/tmp" not in text
    assert made.outputs["model/README.md"]["bytes"] == len(text.encode())
    if stage == "grpo":
        assert require(tiny_run, "sft").content_hash in text


def test_it_is_a_part_of_the_bundle(tiny_run: Path, tmp_path: Path):
    bundle = write_bundle(tiny_run, tmp_path / "bundle", ExportSettings())
    assert "model/README.md" in read_json(bundle / MANIFEST)["files"]
    card = bundle / "model" / "README.md"
    assert card.read_bytes() == (tiny_run / "grpo" / "model" / "README.md").read_bytes()
    assert verify_bundle(bundle) == []
    card.write_text(card.read_text().replace("chat model", "chat-model"))
    assert verify_bundle(bundle) == ["model/README.md was changed (same size, another SHA-256)"]


def test_names_from_outside_stay_text(tiny_run: Path, tmp_path: Path):
    run = tmp_path / "<img src=x> | `run` {{ 7*7 }}\n# head"
    for folder in ("data", "semantic_ids", "dataset", "embeddings", "sft"):
        shutil.copytree(tiny_run / folder, run / folder)
    about = read_json(run / "sft" / "model" / "genrec.json")
    evil = "a/b](javascript:alert(1)) <script>\n---\nlicense: mit"
    write_json(run / "sft" / "model" / "genrec.json", {**about, "base": evil})
    stage = Stage(run, "sft", {}, BEFORE["sft"])
    config = {"format": "table", "interactions": "/home/alice/secret/<b>log</b>.csv"}
    stage.upstream["prepare"] = replace(stage.upstream["prepare"], config=config)
    metrics = require(tiny_run, "sft").metrics
    ids = SemanticIds.load(run / "semantic_ids")
    text = training_card(stage, ids, {"Seed": "0"}, metrics, True)
    assert set(front_of(text)) == {"library_name", "pipeline_tag", "tags"}
    for bad in ("<script>", "<img", "<b>", "](java", "/home", "alice", "secret", "{{"):
        assert bad not in text
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert len([line for line in heads if line.startswith("# ")]) == 1
    assert "49" not in heads[0] and text.count("\n---\n") == 1


def test_nothing_measured_is_said(tiny_run: Path):
    stage = Stage(tiny_run, "sft", {}, BEFORE["sft"])
    ids = SemanticIds.load(tiny_run / "semantic_ids")
    made = require(tiny_run, "sft").metrics
    metrics = {"parameters": made["parameters"], "best": None, "normalizer": made["normalizer"]}
    text = training_card(stage, ids, {"Seed": "0"}, metrics, True)
    assert "nothing was validated" in text and "| metric |" not in text


def test_a_local_base_shows_its_name_alone(tmp_path: Path, monkeypatch):
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    assert shown_base(str(tmp_path / "models" / "qwen")) == "qwen"
    assert shown_base("/not/here/qwen") == "qwen"
    monkeypatch.chdir(tmp_path)
    assert shown_base("models/qwen") == "qwen" and hub_base("qwen") is None
    assert shown_base("Qwen/Qwen3-0.6B") == hub_base("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert shown_base("scratch-tiny") == "scratch-tiny"
