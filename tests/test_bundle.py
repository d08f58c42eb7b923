"""Bundles: the lists of the run, nothing of its users, and no changed file is served."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from genrec.adapters import lora_config
from genrec.artifacts import sha256_file
from genrec.bundle.card import TO_FILL_IN, model_card
from genrec.bundle.files import card_was_edited, is_bundle, read_manifest, verify_bundle
from genrec.bundle.writing import ExportSettings, write_bundle
from genrec.decoding.trie import SidTrie
from genrec.modeling import load_model, sid_token_ids
from genrec.recommend import Recommender
from genrec.semantic_ids import SemanticIds


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A finished run whose model declares "trie"; read only."""
    folder = tmp_path_factory.mktemp("run") / "shop"
    shop = tiny.shop()
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    for parameter in model.parameters():  # a sharper model: lists depend on the history
        parameter.data *= 2.5 if parameter.ndim > 1 else 1
    tiny.save_run(folder, shop, model, tokenizer, normalizer="trie")
    return folder


@pytest.fixture(scope="module")
def bundle(run: Path, tmp_path_factory) -> Path:
    """Its bundle; read only."""
    return write_bundle(run, tmp_path_factory.mktemp("bundles") / "one", ExportSettings())


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle, tmp_path / "copy")


def lists(recommender: Recommender, k: int = 8) -> list:
    """What it recommends after each of some histories, to the last bit of the scores."""
    ids = recommender.catalog["item_id"].to_list()
    histories = [[], ids[:1], ids[3:9], ids[:9:-1]]
    return [recommender.recommend(history, k, beam_width=25) for history in histories]


def test_lists_are_those_of_the_run(run: Path, bundle: Path):
    ours, theirs = Recommender.load(run), Recommender.load(bundle)
    made = lists(ours)
    assert made == lists(theirs)
    assert len({tuple(r.item_id for r in row) for row in made}) > 1
    for name in ("template", "max_history", "filter_seen", "model_stage"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.engine.normalizer == theirs.engine.normalizer == "trie"
    assert ours.renderer.sha256() == theirs.renderer.sha256()
    assert Recommender.load(bundle, "sft").model_stage == "sft"


def test_it_can_be_moved_and_needs_no_run(bundle: Path, tmp_path: Path):
    moved = shutil.copytree(bundle, tmp_path / "elsewhere [1] *" / "b")
    assert lists(Recommender.load(moved)) == lists(Recommender.load(bundle))


def test_the_manifest_names_every_file(run: Path, bundle: Path):
    manifest = read_manifest(bundle)
    files = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert files == manifest["files"].keys() | {"manifest.json"}
    for name, stated in manifest["files"].items():
        assert sha256_file(bundle / name) == stated["sha256"], name
        assert (bundle / name).stat().st_size == stated["bytes"]
    assert manifest["sid_map_sha256"] == SemanticIds.load(run / "semantic_ids").sha256
    assert manifest["catalog_sha256"] == sha256_file(run / "data" / "catalog.parquet")
    assert manifest["dtype"] == {"trained": "float32", "stored": "float32"}
    assert {"sft", "prepare", "quantize", "build_dataset"} == manifest["sources"].keys()
    for name in ("model.safetensors", "config.json", "tokenizer.json", "genrec.json"):
        assert (bundle / "model" / name).read_bytes() == (run / "sft/model" / name).read_bytes()
    assert verify_bundle(bundle) == [] and not card_was_edited(bundle)
    assert not [p for p in bundle.parent.iterdir() if p != bundle], "nothing half-built is left"
    assert os.stat(bundle).st_mode & 0o777 == 0o777 & ~umask()


def test_the_trie_comes_with_it(bundle: Path, monkeypatch):
    """Built anew it would cost every server's start what quantize spent once."""
    monkeypatch.setattr(SidTrie, "build", None)
    assert Recommender.load(bundle).recommend([], 3)
    assert read_manifest(bundle)["files"].keys() >= {"semantic_ids/trie/trie.json"}


def umask() -> int:
    """Bits that new folders lack."""
    bits = os.umask(0)
    os.umask(bits)
    return bits


def test_no_user_is_in_it(run: Path, bundle: Path):
    users = pl.read_parquet(run / "data" / "interactions.parquet")["user_id"].unique()
    for path in bundle.rglob("*.parquet"):
        table = pl.read_parquet(path)
        assert "user_id" not in table.columns and "history_item_index" not in table.columns
    for path in (bundle / "manifest.json", bundle / "README.md", bundle / "decoding.json"):
        words = set(re.findall(r"\w+", path.read_text()))
        assert not words & set(users)
    catalog = pl.read_parquet(bundle / "catalog.parquet")
    assert catalog.columns == [
        "item_index", "item_id", "title", "brand", "categories", "price", "train_count",
    ]  # fmt: skip
    assert catalog.equals(pl.read_parquet(run / "data" / "catalog.parquet")[catalog.columns])


def test_decoding_settings_are_the_defaults_of_who_loads_it(run: Path, tmp_path: Path):
    settings = ExportSettings(k=3, beam_width=12)
    loaded = Recommender.load(write_bundle(run, tmp_path / "b", settings))
    decoding = json.loads((tmp_path / "b" / "decoding.json").read_text())
    assert decoding == {
        "normalizer": "trie", "k": 3, "beam_width": 12, "filter_seen": True,
        "filter_rule": "items of the history are left out", "max_history": 6,
        "serving_template": "sequential/seen/01", "model_stage": "sft", "families": [],
        "trained_on_target": None,
    }  # fmt: skip
    assert loaded.recommend([]) == Recommender.load(run).recommend([], 3, beam_width=12)
    assert len(loaded.recommend([], 15)) == 15  # longer than its own lists: the width grows
    assert len(Recommender.load(run).recommend([])) == 10
    write_bundle(run, tmp_path / "long", ExportSettings(k=40))
    assert json.loads((tmp_path / "long" / "decoding.json").read_text())["beam_width"] == 100


def test_model_is_a_plain_checkpoint(bundle: Path, run: Path):
    ids = SemanticIds.load(run / "semantic_ids")
    ours, tokenizer, _ = load_model(run / "sft" / "model", ids)
    theirs = AutoModelForCausalLM.from_pretrained(bundle / "model", dtype="float32").eval()
    read = AutoTokenizer.from_pretrained(bundle / "model")
    text = f"Bought so far: {ids.sids()[3]}"
    tokens = tokenizer(text)["input_ids"]
    assert read(text)["input_ids"] == tokens
    with torch.no_grad():
        logits = [m(torch.tensor([tokens])).logits for m in (ours, theirs)]
    assert torch.equal(*logits)


def test_adapters_are_merged(tiny, tmp_path: Path):
    """The bundle of a LoRA run has the logits of base and adapter together."""
    from peft import get_peft_model

    shop = tiny.shop()
    base, tokenizer, token_ids = tiny.sid_lm(shop.semantic_ids)
    adapted = get_peft_model(base, lora_config(base, token_ids, rank=2, alpha=4)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        tokens = torch.tensor([tokenizer(shop.semantic_ids.sids()[0])["input_ids"]])
        expected = adapted(tokens).logits
        with adapted.disable_adapter():
            assert not torch.allclose(adapted(tokens).logits, expected, atol=1e-2)
    tiny.save_run(tmp_path / "run", shop, adapted, tokenizer)
    made = write_bundle(tmp_path / "run", tmp_path / "b", ExportSettings())
    assert not list(made.rglob("adapter*"))
    merged = AutoModelForCausalLM.from_pretrained(made / "model", dtype="float32").eval()
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, expected, atol=1e-4)
    assert lists(Recommender.load(made)) == lists(Recommender.load(tmp_path / "run"))


def test_smaller_weights_are_stored_and_said_so(run: Path, tmp_path: Path):
    made = write_bundle(run, tmp_path / "b", ExportSettings(dtype="bfloat16"))
    assert read_manifest(made)["dtype"] == {"trained": "float32", "stored": "bfloat16"}
    weights = made / "model" / "model.safetensors"
    assert weights.stat().st_size < 0.6 * (run / "sft/model/model.safetensors").stat().st_size
    assert "lists can differ" in (made / "README.md").read_text()
    assert verify_bundle(made) == []
    ids = SemanticIds.load(run / "semantic_ids")
    rounded, _, _ = load_model(made / "model", ids, "float32")
    full, tokenizer, _ = load_model(run / "sft" / "model", ids, "float32")
    for ours, theirs in zip(full.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(ours.bfloat16().float(), theirs)
    assert sid_token_ids(tokenizer, ids)
    assert len(Recommender.load(made).recommend([], 5)) == 5
    same = write_bundle(run, tmp_path / "same", ExportSettings(dtype="float32"))
    assert (same / "model/model.safetensors").read_bytes() == (
        run / "sft/model/model.safetensors"
    ).read_bytes()


def test_the_card_marks_what_is_to_be_filled_in(run: Path, bundle: Path, tmp_path: Path):
    import yaml

    text = (bundle / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "unknown" and front["library_name"] == "transformers"
    assert text.count(TO_FILL_IN) == 4
    manifest = read_manifest(bundle)
    for sha256 in ("catalog_sha256", "sid_map_sha256", "prompts_sha256"):
        assert manifest[sha256] in text
    assert "neither validated nor evaluated" in text
    licensed = write_bundle(run, tmp_path / "b", ExportSettings(license="apache-2.0"))
    text = (licensed / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
    assert text.count(TO_FILL_IN) == 3


def test_the_card_names_a_base_of_the_hub_and_its_licence(bundle: Path):
    import yaml

    decoding = json.loads((bundle / "decoding.json").read_text())
    for base, on_hub in (("Qwen/Qwen3-0.6B", True), ("/home/me/base", False), ("me`|x", False)):
        text = model_card({**read_manifest(bundle), "base": base}, decoding)
        assert (yaml.safe_load(text.split("---")[1]).get("base_model") == base) == on_hub
        assert "Licence of the base model" in text and "me`|x" not in text
    scratch = model_card({**read_manifest(bundle), "base": "scratch-tiny"}, decoding)
    assert "Licence of the base model" not in scratch


def test_an_edited_card_is_no_finding(copied: Path):
    card = copied / "README.md"
    card.write_text(card.read_text().replace(TO_FILL_IN, "Apache-2.0"))
    assert verify_bundle(copied) == [] and card_was_edited(copied)
    assert len(Recommender.load(copied).recommend([], 3)) == 3
    card.unlink()
    assert verify_bundle(copied) == ["README.md is missing"]
    with pytest.raises(ValueError, match="README.md is missing"):
        Recommender.load(copied)


# Refusals


def flip(path: Path) -> None:
    """Change one byte in the middle, at the same size."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "name",
    [
        "decoding.json", "catalog.parquet", "semantic_ids/items.parquet", "model/tokenizer.json",
        "semantic_ids/semantic_ids.json", "model/config.json", "model/genrec.json",
        "prompts/sequential/seen/01.jinja",
    ],
)  # fmt: skip
def test_a_changed_file_is_refused(copied: Path, name: str):
    flip(copied / name)
    with pytest.raises(ValueError, match=re.escape(f"{name} was changed")):
        Recommender.load(copied)
    (problem,) = verify_bundle(copied)
    assert name in problem


def test_weights_are_checked_by_size_when_loaded_and_whole_by_verify(copied: Path):
    weights = copied / "model" / "model.safetensors"
    flip(weights)
    Recommender.load(copied)
    assert verify_bundle(copied) == [
        "model/model.safetensors was changed (same size, another SHA-256)"
    ]
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors has \d+ bytes, its manifest says"):
        Recommender.load(copied)


def test_missing_and_added_files_are_refused(copied: Path):
    (copied / ".gitattributes").write_text("hidden files are nobody's business")
    assert verify_bundle(copied) == []
    (copied / "model" / "adapter_config.json").write_text("{}")  # transformers would load it
    with pytest.raises(ValueError, match="adapter_config.json is not one of its files"):
        Recommender.load(copied)
    (copied / "model" / "adapter_config.json").unlink()
    (copied / "catalog.parquet").unlink()
    with pytest.raises(ValueError, match="catalog.parquet is missing"):
        Recommender.load(copied)


def test_a_foreign_sid_map_is_refused_even_with_its_hashes(copied: Path, tiny):
    """Who also rewrites the manifest still meets the model, which knows its map."""
    own = SemanticIds.load(copied / "semantic_ids")
    foreign = SemanticIds(own.item_ids, np.roll(own.codes, 1, axis=0), own.codebook_sizes)
    foreign.save(copied / "semantic_ids")
    with pytest.raises(ValueError, match="semantic_ids/.* was changed|semantic_ids/.* has "):
        Recommender.load(copied)
    restate(copied)
    with pytest.raises(ValueError, match="does not extend it"):
        Recommender.load(copied)


def test_a_grown_sid_map_without_its_catalogue_is_refused(copied: Path):
    own = SemanticIds.load(copied / "semantic_ids")
    taken = {tuple(row) for row in own.codes.tolist()}
    free = next(c for c in np.ndindex(*own.codebook_sizes) if c not in taken)
    own.extend(pl.Series([999]), np.array([free])).save(copied / "semantic_ids")
    restate(copied)
    with pytest.raises(ValueError, match="hold other items"):
        Recommender.load(copied)


def restate(folder: Path, whole: bool = True) -> None:
    """Make the manifest state what is there now."""
    manifest = json.loads((folder / "manifest.json").read_text())
    about = json.loads((folder / "semantic_ids" / "semantic_ids.json").read_text())
    manifest["sid_map_sha256"] = about["sha256"]
    for name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert not whole or verify_bundle(folder) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": -3}, "k=-3 must be an integer of at least 1"),
        ({"k": True}, "k=True must be an integer"),
        ({"beam_width": "9"}, "beam_width='9' must be an integer of at least 1"),
        ({"k": 60}, "beam_width=50 must be at least k=60"),
        ({"families": None}, "families=None must be a list of names"),
        ({"families": [1]}, r"families=\[1\] must be a list"),
        ({"normalizer": []}, "normalizer=.* must be one of full, level, trie"),
        ({"filter_seen": 1}, "filter_seen=1 must be true or false"),
        ({"max_history": 0}, "max_history=0 must be"),
        ({"serving_template": ""}, "serving_template='' must name"),
        ({"model_stage": "dpo"}, "model_stage='dpo' must be one of sft, grpo"),
        ({"trained_on_target": "no"}, "trained_on_target='no' must be true, false or null"),
        ({}, "has no normalizer"),
        (None, "holds no JSON object"),
    ],
)
def test_settings_of_serving_that_cannot_be(copied: Path, change: dict | None, message: str):
    """Whoever also rewrites the manifest still can't have them served."""
    path = copied / "decoding.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps({**old, **change} if change else change))
    restate(copied, whole=False)
    with pytest.raises(ValueError, match=rf"decoding.json:? {message}"):
        Recommender.load(copied)
    (problem,) = verify_bundle(copied)
    assert re.search(message, problem)


@pytest.mark.parametrize("name", ["decoding.json", "README.md", "catalog.parquet"])
def test_a_manifest_must_name_what_serving_needs(copied: Path, name: str):
    manifest = read_manifest(copied)
    del manifest["files"][name]
    (copied / name).unlink()
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert verify_bundle(copied) == [f"its manifest lacks {name}"]
    with pytest.raises(ValueError, match=f"its manifest lacks {name}"):
        Recommender.load(copied)


def test_the_manifest_names_another_map(copied: Path):
    manifest = read_manifest(copied)
    (copied / "manifest.json").write_text(json.dumps({**manifest, "sid_map_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="semantic_ids.json is a map with .* says 000000000000"):
        Recommender.load(copied)
    (problem,) = verify_bundle(copied)
    assert (
        "semantic_ids/semantic_ids.json" in problem and manifest["sid_map_sha256"][:12] in problem
    )


@pytest.mark.parametrize("start", [0, 9])
def test_weights_without_their_header(copied: Path, start: int):
    """Seen at loading although weights aren't hashed there."""
    weights = copied / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[start : start + 4] = b"\xff" * 4
    weights.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="model.safetensors has a damaged header"):
        Recommender.load(copied)


def test_a_bundle_is_no_part_of_a_stage_or_of_a_bundle(run: Path, copied: Path, tmp_path: Path):
    for target in (run / "sft/b", run / "sft/model/deep/b", run / "grpo", run / "data/../sft/b"):
        with pytest.raises(ValueError, match="the folder of stage '(sft|grpo)'"):
            write_bundle(run, target, ExportSettings())
    (tmp_path / "link").symlink_to(run / "sft")
    with pytest.raises(ValueError, match="the folder of stage 'sft'"):
        write_bundle(run, tmp_path / "link" / "b", ExportSettings())
    for target in (copied / "b", copied / "model" / "b"):
        with pytest.raises(ValueError, match="lies in the bundle"):
            write_bundle(run, target, ExportSettings())
    assert verify_bundle(copied) == []


def test_a_manifest_that_is_none(copied: Path, run: Path, tmp_path: Path):
    assert is_bundle(copied) and not is_bundle(run) and not is_bundle(run / "sft")
    for folder in (run, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is no bundle"):
            read_manifest(folder)
    whole = json.loads((copied / "manifest.json").read_text())
    for change, message in (
        ({"schema_version": 99}, "schema_version 99"),
        ({"files": None}, "is damaged"),
        ({"files": {"a": 1}}, "is damaged"),
        ({"sid_map_sha256": None}, "is damaged: sid_map_sha256"),
        ({"name": None}, "is damaged: name"),
        ({"model_stage": 1}, "is damaged: model_stage"),
        ({"files": {"a": {"sha256": "0", "bytes": "1"}}}, "is damaged: files"),
    ):
        (copied / "manifest.json").write_text(json.dumps({**whole, **change}))
        with pytest.raises(ValueError, match=message):
            Recommender.load(copied)
    outside = {**whole["files"], "../run/secret": {"sha256": "0" * 64, "bytes": 1}}
    (copied / "manifest.json").write_text(json.dumps({**whole, "files": outside}))
    with pytest.raises(ValueError, match="lies outside"):
        Recommender.load(copied)
    (copied / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Recommender.load(copied)


def test_nothing_is_overwritten(run: Path, bundle: Path, tmp_path: Path):
    for target in (tmp_path / "empty", tmp_path / "file"):
        target.mkdir() if target.name == "empty" else target.write_text("mine")
        with pytest.raises(ValueError, match="exists, and a bundle never overwrites"):
            write_bundle(run, target, ExportSettings())
    assert (tmp_path / "file").read_text() == "mine" and not list((tmp_path / "empty").iterdir())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="never overwrites"):
        write_bundle(run, tmp_path / "link", ExportSettings())


def test_a_failed_export_leaves_nothing(run: Path, tmp_path: Path, monkeypatch):
    from genrec.bundle import writing

    def full_disk(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "model_card", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_bundle(run, tmp_path / "b", ExportSettings())
    assert not list(tmp_path.iterdir())


def test_what_export_refuses_of_a_run(run: Path, tiny, tmp_path: Path):
    with pytest.raises(ValueError, match="stage 'grpo' has not finished"):
        write_bundle(run, tmp_path / "b", ExportSettings(model_stage="grpo"))
    with pytest.raises(ValueError, match="stage 'sft' has not finished"):
        write_bundle(tmp_path / "nothing", tmp_path / "b", ExportSettings())
    with pytest.raises(ValueError, match="k=30 must lie between 1 and beam_width=20"):
        write_bundle(run, tmp_path / "b", ExportSettings(k=30, beam_width=20))
    changed = shutil.copytree(run, tmp_path / "changed")
    flip(changed / "sft" / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors was changed since 'sft' finished"):
        write_bundle(changed, tmp_path / "b", ExportSettings())
    assert not (tmp_path / "b").exists()


def test_how_a_bundle_can_not_be_loaded(run: Path, bundle: Path):
    with pytest.raises(ValueError, match="holds the model of 'sft'; leave stage out"):
        Recommender.load(bundle, "grpo")
    with pytest.raises(ValueError, match="leave model_run out"):
        Recommender.load(bundle, model_run=run)
    with pytest.raises(ValueError, match="a later catalogue needs the run"):
        Recommender.load(run, model_run=bundle)


def test_a_later_catalogue_with_an_old_model(run: Path, tiny, tmp_path: Path):
    """The bundle of a run that another run's model serves has the later items."""
    from genrec.artifacts import Stage, write_parquet

    old = SemanticIds.load(run / "semantic_ids")
    catalog = pl.read_parquet(run / "data" / "catalog.parquet")
    new = catalog[:1].with_columns(item_id=pl.lit(999), item_index=pl.lit(20, pl.Int32))
    later = tmp_path / "later"
    stage = Stage(later, "prepare", {"max_history": 2})
    assert not stage.is_done()
    write_parquet(
        stage.folder / "catalog.parquet", pl.concat([catalog, new], how="vertical_relaxed")
    )
    stage.finish(rows=1)
    stage = Stage(later, "quantize", {}, ["prepare"])
    assert not stage.is_done()
    taken = {tuple(row) for row in old.codes.tolist()}
    free = next(c for c in np.ndindex(*old.codebook_sizes) if c not in taken)
    ids = pl.read_parquet(stage.folder.parent / "data" / "catalog.parquet")["item_id"]
    old.successor(ids, np.concatenate([old.codes, [free]])).save(stage.folder)
    stage.finish(rows=21)
    made = write_bundle(later, tmp_path / "b", ExportSettings(model_run=run))
    served = Recommender.load(made)
    assert lists(served) == lists(Recommender.load(later, model_run=run))
    assert 999 in {r.item_id for r in served.recommend([], 21)} and served.max_history == 6
