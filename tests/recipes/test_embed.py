"""The embed stage, by command lines as users write them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.artifacts import Stage, load_manifest, require, write_parquet
from genrec.embedding.vectors import content_vectors
from genrec.evaluation.suite import load_split_data


@pytest.fixture(scope="module")
def prepared(recipe, tmp_path_factory) -> Path:
    """A run with the prepare stage alone."""
    run = tmp_path_factory.mktemp("prepared") / "run"
    recipe("prepare", run, *"--format synthetic --n_users 12 --n_items 60".split())
    return run


@pytest.fixture
def embed(in_process) -> Callable[..., str]:
    return partial(in_process, "embed")


@pytest.fixture
def shop(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "run")
    return tmp_path / "run"


def vectors(run: Path, name: str = "item") -> np.ndarray:
    return np.load(run / "embeddings" / f"{name}_embeddings.npy")


def test_text_and_behaviour_are_fused_and_the_text_is_kept(embed, shop: Path):
    flags = "--dim 8 --collaborative cooccurrence --collaborative_dim 6".split()
    said = embed(shop, *flags, "--collaborative_weight", "0.25")
    assert "60 item vectors of 14 dimensions (lsa + cooccurrence)" in said
    manifest = require(shop, "embed")
    assert manifest.metrics["method"] == "lsa" and set(manifest.metrics["zero_rows"]) == {
        "text", "collaborative", "fused",
    }  # fmt: skip
    fused, text = vectors(shop), vectors(shop, "text")
    assert fused.shape == (60, 14) and text.shape == (60, 8)
    assert (content_vectors(shop) == text).all()
    valid = pl.read_parquet(shop / "data" / "valid.parquet")
    assert (load_split_data(shop, valid, "valid", 5, True).vectors == text).all()  # content-kNN
    assert {"lsa.safetensors", "lsa.json", "fusion.safetensors"} <= set(manifest.outputs)
    alone = vectors(shop, "collaborative")
    assert alone.shape == (60, 6) and np.linalg.norm(alone, axis=1).max() == pytest.approx(1)
    known = pl.read_parquet(shop / "data" / "catalog.parquet")["train_count"].to_numpy() > 0
    assert 0 < (~known).sum() < 40
    share = (fused[:, 8:] ** 2).sum(1)
    assert (share[~known] == 0).all() and not alone[~known].any()
    known = share > 0  # not the items, either, that stand alone in their only sequence
    assert known.sum() > 30 and share[known] == pytest.approx(0.25, abs=1e-4)
    assert np.linalg.norm(fused, axis=1) == pytest.approx(1, abs=1e-4)
    centred = text - text.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    assert fused[known, :8] == pytest.approx(centred[known] * 0.75**0.5, abs=1e-5)


def test_held_out_rows_are_not_looked_at(embed, shop: Path):
    """Other validation and test rows, same vectors."""
    flags = "--method collaborative --collaborative cooccurrence --collaborative_dim 6".split()
    embed(shop, *flags)
    first = vectors(shop)
    valid = pl.read_parquet(shop / "data" / "valid.parquet")
    assert load_split_data(shop, valid, "valid", 5, True).vectors is None
    assert content_vectors(shop) is None and not (shop / "embeddings/text_embeddings.npy").exists()
    shutil.rmtree(shop / "embeddings")
    for name in ("valid", "test"):
        (shop / "data" / f"{name}.parquet").write_bytes(
            b"x" * (shop / "data" / f"{name}.parquet").stat().st_size
        )
    embed(shop, *flags)
    assert (vectors(shop) == first).all()
    assert not (shop / "test_reads.jsonl").exists()


def test_sasrec_gives_its_item_table(embed, shop: Path):
    flags = "--method collaborative --collaborative sasrec --collaborative_dim 8".split()
    embed(shop, *flags, "--collaborative_epochs", "2")
    found = vectors(shop)
    known = pl.read_parquet(shop / "data" / "catalog.parquet")["train_count"].to_numpy() > 0
    assert (~known).any()
    assert found.shape == (60, 8)
    assert np.linalg.norm(found, axis=1) == pytest.approx(known.astype(float), abs=1e-5)
    assert (found == vectors(shop, "collaborative")).all()  # LETTER's signal
    files = {"item_embeddings.npy", "collaborative_embeddings.npy", "config.yaml"}
    assert set(require(shop, "embed").outputs) == files


def test_files_are_aligned_by_id_and_content_decides(embed, shop: Path, tmp_path: Path):
    ids = pl.read_parquet(shop / "data" / "catalog.parquet")["item_id"].to_list()
    rows = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    order = np.random.default_rng(1).permutation(60)
    np.save(tmp_path / "v.npy", rows[order])
    (tmp_path / "ids.json").write_text(json.dumps([ids[i] for i in order]))
    flags = ["--method", "npy", "--vectors", str(tmp_path / "v.npy")]
    said = embed(shop, *flags, "--vector_ids", str(tmp_path / "ids.json"))
    assert (vectors(shop) == rows).all() and "row order is trusted" not in said
    said = embed(shop, *flags, "--overwrite", "true")
    assert (vectors(shop) == rows[order]).all()
    assert "row order is trusted" in said and repr(str(ids[0])) in said
    embed(
        shop, "--dim", "8", "--collaborative", "file", "--overwrite", "true",
        "--collaborative_vectors", str(tmp_path / "v.npy"),
        "--collaborative_ids", str(tmp_path / "ids.json"), "--fused_dim", "4",
    )  # fmt: skip
    assert vectors(shop).shape == (60, 4) and vectors(shop, "text").shape == (60, 8)
    (tmp_path / "ids.json").write_text(json.dumps(["?", *ids[1:]]))
    said = embed(
        shop, *flags, "--vector_ids", str(tmp_path / "ids.json"), "--overwrite", "true",
        fails=True,
    )  # fmt: skip
    assert f"no vector for 1 of the 60 items, such as {str(ids[0])!r}" in said


def test_a_language_model_encodes_in_shards_that_go(embed, shop: Path, tiny, tmp_path: Path):
    tokenizer, base = tiny.tokenizer(), tmp_path / "base"
    tiny.lm(len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    flags = ["--method", "lm", "--model_name_or_path", str(base), "--device", "cpu"]
    embed(shop, *flags, "--shard_size", "16", "--pooling", "last")
    first = vectors(shop)
    assert first.shape == (60, 32) and np.linalg.norm(first, axis=1) == pytest.approx(1, abs=1e-5)
    manifest = require(shop, "embed")
    assert "model/model.safetensors" in manifest.inputs
    assert set(manifest.outputs) == {"item_embeddings.npy", "encoded.json", "config.yaml"}
    # Neither the place of the model nor the size of batches and shards is another result.
    moved = base.rename(tmp_path / "moved")
    flags[3] = str(moved)
    embed(shop, *flags, "--pooling", "last", "--batch_size", "3")
    assert load_manifest(shop, "embed") == manifest
    # Another model under the same name is.
    tiny.lm(len(tokenizer), seed=1).save_pretrained(moved)
    said = embed(shop, *flags, "--pooling", "last", fails=True)
    assert "input 'model/model.safetensors'" in said


def test_texts_stay_encoded_when_the_fusion_changes(
    embed, shop: Path, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from genrec.embedding import lm_pooling

    tokenizer, base = tiny.tokenizer(), tmp_path / "base"
    tiny.lm(len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    encode, calls = lm_pooling.lm_vectors, []

    def counted(texts, *args, **settings):
        calls.append(len(texts))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return encode(texts, *args, **settings)

    monkeypatch.setattr(lm_pooling, "lm_vectors", counted)
    flags = ["--method", "lm", "--model_name_or_path", str(base), "--device", "cpu"]
    flags += ["--collaborative", "cooccurrence", "--collaborative_dim", "6", "--shard_size", "16"]
    stop = 3
    with pytest.raises((KeyboardInterrupt, SystemExit)):  # killed in the third of four shards
        embed(shop, *flags)
    stop = 0
    embed(shop, *flags, "--collaborative_weight", "0.3")
    assert calls == [16, 16, 16, 16, 12]  # two shards were kept, though other settings came
    text, fused = vectors(shop, "text"), vectors(shop)
    embed(shop, *flags, "--collaborative_weight", "0.6", "--overwrite", "true")
    embed(shop, *flags, "--fused_dim", "5", "--overwrite", "true")
    assert len(calls) == 5 and vectors(shop).shape == (60, 5)
    assert (vectors(shop, "text") == text).all()
    embed(shop, *flags[:6], "--overwrite", "true")
    assert len(calls) == 5 and (vectors(shop) == text).all()  # the same, now all there is
    embed(shop, *flags, "--collaborative_weight", "0.3", "--overwrite", "true")
    assert len(calls) == 5 and (vectors(shop) == fused).all()
    # Another text, way of pooling or model is another key.
    embed(shop, *flags, "--text_fields", "title", "--overwrite", "true")
    embed(shop, *flags, "--pooling", "last", "--overwrite", "true")
    assert sum(calls[5:]) == 120 and (vectors(shop, "text") != text).any()
    tiny.lm(len(tokenizer), seed=1).save_pretrained(base)
    lm_pooling._load.cache_clear()  # as in another process
    embed(shop, *flags, "--overwrite", "true")
    assert sum(calls[5:]) == 180 and (vectors(shop, "text") != text).any()


@pytest.fixture
def later(prepared: Path, tmp_path: Path) -> Path:
    """A later catalogue: in another order, five items left, one has a new text, three are new.

    The first new one has the title of an item that stayed.
    """
    catalog = pl.read_parquet(prepared / "data" / "catalog.parquet")
    texts = ["title", "brand", "categories", "description"]
    twin = catalog[[20]].with_columns(item_id=pl.lit("N1"))
    odd = twin.with_columns(
        pl.lit("N2").alias("item_id"), pl.lit("Zzyzx").alias("title"),
        *(pl.lit(None).cast(catalog.schema[name]).alias(name) for name in texts[1:]),
    )  # fmt: skip
    third = catalog[[3]].with_columns(item_id=pl.lit("N3"))
    stayed = (
        catalog[5:]
        .reverse()
        .with_columns(
            pl.when(pl.col("item_index") == 9)
            .then(pl.lit("Renamed"))
            .otherwise("title")
            .alias("title")
        )
    )
    stage = Stage(tmp_path / "next", "prepare", {})
    assert not stage.is_done()
    write_parquet(stage.folder / "catalog.parquet", pl.concat([twin, stayed, odd, third]))
    stage.finish(rows=58)
    return tmp_path / "next"


def test_a_later_catalogue_keeps_the_space(embed, shop: Path, later: Path, tmp_path: Path):
    embed(shop, *"--dim 8 --collaborative cooccurrence --collaborative_dim 6 --seed 3".split())
    text, alone, fused = (vectors(shop, n) for n in ("text", "collaborative", "item"))
    said = embed(later, "--extend", str(shop), "--dim", "30")
    assert "55 kept, 3 new, 5 gone, 1 text changed" in said
    assert "not heard, since vectors share a space: dim=30" in said
    made = require(later, "embed")
    assert made.config["dim"] == 8 and made.config["seed"] == 3
    assert made.metrics["extended"] == {"kept": 55, "new": 3, "gone": 5, "text_changed": 1}
    for before, name in ((text, "text"), (alone, "collaborative"), (fused, "item")):
        assert (vectors(later, name)[1:56] == before[5:][::-1]).all(), name
    twin, odd, gone = (vectors(later, "text")[i] for i in (0, 56, 57))
    assert twin == pytest.approx(text[20], abs=1e-6) and not odd.any()
    assert gone == pytest.approx(text[3], abs=1e-6)  # an item that left would be the same again
    assert not vectors(later, "collaborative")[[0, 56, 57]].any()
    new = vectors(later)[[0, 56, 57]]
    assert np.linalg.norm(new, axis=1) == pytest.approx([1, 0, 1], abs=1e-5)
    assert not new[:, 8:].any() and new[0, :8] @ fused[20, :8] == pytest.approx(0.5**0.5, abs=1e-4)
    # The later run is extended like the first, and the same again.
    third = tmp_path / "third"
    shutil.copytree(later / "data", third / "data")
    embed(third, "--extend", str(later))
    assert (vectors(third) == vectors(later)).all()
    made = require(third, "embed")
    assert embed(third, "--extend", str(later)) == "" and require(third, "embed") == made


def test_new_items_have_no_behaviour(embed, shop: Path, later: Path, tmp_path: Path):
    np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(size=(60, 4)))
    flags = ["--collaborative", "file", "--collaborative_vectors", str(tmp_path / "table.npy")]
    embed(shop, "--method", "collaborative", *flags)
    said = embed(later, "--extend", str(shop))  # the table is not asked for again
    assert "of the items have a zero row (collaborative)" in said
    assert (vectors(later)[1:56] == vectors(shop)[5:][::-1]).all()
    assert not vectors(later)[[0, 56, 57]].any()
    assert (vectors(later) == vectors(later, "collaborative")).all()
    embed(shop, "--dim", "8", *flags, "--fused_dim", "5", "--overwrite", "true")
    embed(later, "--extend", str(shop), "--overwrite", "true")
    assert vectors(later).shape == (58, 5)
    assert (vectors(later)[1:56] == vectors(shop)[5:][::-1]).all()
    assert vectors(later)[[0, 57]].any(1).all()


def test_only_the_same_encoder_extends(embed, shop: Path, later: Path, tiny, tmp_path: Path):
    tokenizer, base = tiny.tokenizer(), tmp_path / "base"
    tiny.lm(len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    flags = ["--model_name_or_path", str(base), "--device", "cpu"]
    embed(shop, "--method", "lm", *flags)
    said = embed(later, "--extend", str(shop), fails=True)
    assert "method=lm needs `model_name_or_path`" in said
    embed(later, "--extend", str(shop), *flags)
    found, before = vectors(later), vectors(shop)
    assert (found[1:56] == before[5:][::-1]).all()
    assert found[0] == pytest.approx(before[20], abs=1e-5)
    assert not list((later / "embeddings").glob("shards*"))
    tiny.lm(len(tokenizer), seed=1).save_pretrained(base)
    said = embed(later, "--extend", str(shop), *flags, "--overwrite", "true", fails=True)
    assert "is not the model that embedded" in said and "its files differ" in said
    assert load_manifest(later, "embed") is not None


def test_a_later_catalogue_of_brought_vectors(embed, shop: Path, later: Path, tmp_path: Path):
    rows = np.arange(300, dtype=np.float32).reshape(60, 5)
    np.save(tmp_path / "v.npy", rows)
    embed(shop, "--method", "npy", "--vectors", str(tmp_path / "v.npy"))
    np.save(tmp_path / "w.npy", -np.ones((4, 5), dtype=np.float32) * [[1], [2], [3], [4]])
    flags = ["--extend", str(shop), "--vectors", str(tmp_path / "w.npy")]
    assert "needs `vector_ids`" in embed(later, *flags, fails=True)
    (tmp_path / "ids.txt").write_text("N3\nN1\nN2\nelsewhere\n")
    embed(later, *flags, "--vector_ids", str(tmp_path / "ids.txt"))
    assert vectors(later)[[0, 56, 57], 0].tolist() == [-2, -3, -1]
    assert (vectors(later)[1:56] == rows[5:][::-1]).all()
    (tmp_path / "ids.txt").write_text("N3\nN1\nN5\nelsewhere\n")
    said = embed(
        later, *flags, "--vector_ids", str(tmp_path / "ids.txt"), "--overwrite", "true", fails=True
    )
    assert "no vector for 1 of the 3 items, such as 'N2'" in said
    assert "is this run itself" in embed(shop, "--extend", str(shop), fails=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--method lm", "method=lm needs `model_name_or_path`"),
        ("--method sentence-transformers", "needs `model_name_or_path`, a folder or Hub name"),
        ("--method collaborative", "method=collaborative needs `collaborative`"),
        ("--collaborative file", "collaborative=file needs `collaborative_vectors`"),
        ("--collaborative als", "collaborative='als' is not known"),
        ("--collaborative_weight 1", "collaborative_weight=1.0 must lie in (0, 1)"),
        ("--pooling max", "pooling='max' is not known"),
        ("--dtype int8", "dtype='int8' is not known"),
        ("--fused_dim 0", "fused_dim=0 must be a positive integer"),
        ("--method npy --vectors absent.npy", "absent.npy not found"),
    ],
)
def test_settings_are_checked_before_anything_is_read(
    embed, tmp_path: Path, flags: str, message: str
):
    assert message in embed(tmp_path / "absent", *flags.split(), fails=True)
    assert not (tmp_path / "absent").exists()
