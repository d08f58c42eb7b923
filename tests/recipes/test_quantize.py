"""The quantize stage, run as a user runs it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.artifacts import require
from genrec.data.synthetic import synthetic_shop
from genrec.quantizers.loading import load_quantizer
from genrec.semantic_ids import SemanticIds

MAP = ["--report_map", "pca"]
ONE_LEVEL = ["--n_levels", "1", "--codebook_size", "8", *MAP]
SMALL = ["--n_levels", "3", "--codebook_size", "8", *MAP]


@pytest.fixture(scope="module")
def embedded(recipe, tmp_path_factory) -> Path:
    """A run with prepare and embed done, text and behaviour fused."""
    run = tmp_path_factory.mktemp("embedded") / "run"
    recipe("prepare", run, *"--format synthetic --n_users 60 --n_items 90".split())
    flags = "--dim 12 --collaborative cooccurrence --collaborative_dim 8".split()
    recipe("embed", run, *flags)
    return run


@pytest.fixture
def shop(embedded: Path, tmp_path: Path) -> Path:
    shutil.copytree(embedded, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def quantize(in_process) -> Callable[..., str]:
    return partial(in_process, "quantize")


def quality(run: Path) -> dict:
    return json.loads((run / "semantic_ids" / "quality.json").read_text())


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("residual-kmeans", SMALL),
        ("residual-kmeans", [*SMALL, "--max_fill", "1.5", "--normalize_residuals", "true"]),
        ("residual-kmeans", [*SMALL, "--standardize", "whiten", "--pca_dim", "6"]),
        ("hierarchical-kmeans", SMALL),
        ("product", SMALL),
        ("rqvae", [*SMALL, "--epochs", "2"]),
        ("rqvae", [*"--preset grid-rvq --epochs 2 --codebook_sizes 8 8 8".split(), *MAP]),
        ("random", SMALL),
        ("sequential", SMALL),
        ("collaborative", ["--branching", "4", "--leaf_size", "16", *MAP]),
        ("independent", MAP),
        ("semantic", MAP),
        ("hybrid", ["--branching", "4", "--leaf_size", "16", *MAP]),
    ],
)
def test_every_method_gives_a_complete_map(quantize, shop: Path, method: str, flags: list[str]):
    said = quantize(shop, "--method", method, *flags)
    folder = shop / "semantic_ids"
    ids = SemanticIds.load(folder)
    assert ids.n_items == 90 and len(np.unique(ids.codes, axis=0)) == 90
    manifest = require(shop, "quantize")
    assert "max_title_bytes" not in manifest.config  # a setting of method=title alone
    assert manifest.metrics["method"] == method and f"{ids.sids()[0]}" in said
    report = quality(shop)
    assert report["collision_rate"] == 0 and len(report["levels"]) == ids.n_levels
    assert 0 <= report["vector_neighbours"] <= 1 and 0 <= report["copurchase_neighbours"] <= 1
    assert report["neighbours"]["held_out"]["pairs"] > 0
    assert set(report["duplicates"]) == {"vectors", "text"}
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    shapes = {  # what the flags say, and for the others what the shop gives
        "collaborative": lambda s: s[:-1] == (5,) * (len(s) - 1) and s[-1] >= 16,
        "independent": lambda s: s == (99,),  # 90 items and a tenth to spare
        "semantic": lambda s: len(s) >= 2 and s[0] < 90,
        "hybrid": lambda s: s[:-1] == (5,) * (len(s) - 1) and s[-1] == 99,
    }
    assert shapes.get(method, lambda s: s == (8, 8, 8))(ids.codebook_sizes), ids.codebook_sizes
    quantizer = folder / "quantizer.safetensors"
    assert quantizer.exists() == (method in ("residual-kmeans", "hierarchical-kmeans", "product",
        "rqvae"))  # fmt: skip
    assert (report["reconstruction"] is not None) == quantizer.exists()
    assert (folder / "history.json").exists() == (method == "rqvae")
    if method == "rqvae":
        history = json.loads((folder / "history.json").read_text())
        assert [row["epoch"] for row in history] == report["training"]["epoch"] == [1, 2]
        assert "Perplexity by epoch" in page
    if quantizer.exists():
        assert ids.quantizer_sha256 == manifest.outputs["quantizer.safetensors"]["sha256"]
        codes = load_quantizer(quantizer).encode(
            np.load(shop / "embeddings" / "item_embeddings.npy")
        )
        kept = (codes == ids.codes).all(axis=1)
        assert kept.sum() == 90 - report["collisions"]["moved"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "rqvae", "--max_fill", "1.5"], "max_fill is no setting of method=rqvae"),
        (["--method", "random", "--collisions", "suffix"], "collisions is no setting of method="),
        (
            ["--method", "product", "--normalize_residuals", "false"],
            "normalize_residuals is no setting of method=product, but of residual-kmeans",
        ),
        (["--device", "cuda"], "device is no setting of method=residual-kmeans, but of rqvae"),
        (["--preset", "tiger"], "preset is no setting of method=residual-kmeans, but of rqvae"),
        (["--method", "rqvae", "--rqvae_options", "patience"], "must read name=value"),
        (["--method", "rqvae", "--rqvae_options", "speed=3"], "speed: no such setting"),
    ],
)
def test_what_a_method_would_overlook_is_refused(quantize, shop: Path, flags, message: str):
    assert message in quantize(shop, *flags, fails=True)


def test_options_of_an_rqvae_reach_it(quantize, shop: Path):
    options = ["--rqvae_options", "gradient=ema", "dead_code_reset=true", "latent_dim=4"]
    quantize(shop, "--method", "rqvae", *SMALL, "--epochs", "2", *options)
    found = load_quantizer(shop / "semantic_ids" / "quantizer.safetensors").settings
    assert (found.gradient, found.dead_code_reset, found.latent_dim) == ("ema", True, 4)


def test_room_for_later_items_is_a_setting(quantize, shop: Path):
    flags = ["--n_levels", "1", "--codebook_size", "8", "--collisions", "item-token", *MAP]
    quantize(shop, *flags, "--spare", "1")
    assert SemanticIds.load(shop / "semantic_ids").codebook_sizes == (8, 180)


def test_another_quantizer_places_no_new_items(
    quantize, embedded: Path, shop: Path, tmp_path: Path
):
    quantize(shop, *SMALL)
    later = shutil.copytree(embedded, tmp_path / "later")
    path = shop / "semantic_ids" / "quantizer.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + bytes(4))
    said = quantize(later, "--extend", str(shop), fails=True)
    assert "is not the quantizer that gave this map its codes" in said


@pytest.fixture(scope="module")
def smaller(embedded: Path, recipe, tmp_path_factory) -> Path:
    """The shop before its last twelve items came, in the same space of vectors."""
    folder = tmp_path_factory.mktemp("smaller")
    tables = folder / "tables"
    shop = synthetic_shop(n_users=60, n_items=90, seed=0)
    tables.mkdir()
    shop.interactions.write_parquet(tables / "log.parquet")
    ids = pl.read_parquet(embedded / "data" / "catalog.parquet")["item_id"]
    shop.catalog.filter(pl.col("item_id").is_in(ids[:78].implode())).write_parquet(
        tables / "items.parquet"
    )
    flags = (
        "--format table --interactions log.parquet --items items.parquet --time_column timestamp "
        "--unknown_items drop --brand_column brand --category_column categories"
    ).split()
    recipe("prepare", folder / "run", *flags, "--data_dir", str(tables))
    recipe("embed", folder / "run", "--extend", str(embedded))
    return folder / "run"


GROWING = [
    ("residual-kmeans", SMALL),
    ("hierarchical-kmeans", SMALL),
    ("product", SMALL),
    ("rqvae", [*SMALL, "--epochs", "2"]),
    ("residual-kmeans", [*SMALL, "--collisions", "suffix"]),
    ("residual-kmeans", [*ONE_LEVEL, "--collisions", "item-token", "--spare", "0.2"]),
    ("random", SMALL),
    ("sequential", SMALL),
    ("collaborative", ["--branching", "4", "--leaf_size", "16", "--spare", "0.2", *MAP]),
    ("independent", ["--spare", "0.2", *MAP]),
    ("semantic", ["--spare", "3", *MAP]),
    ("hybrid", ["--branching", "4", "--leaf_size", "16", "--spare", "0.2", *MAP]),
]


@pytest.mark.parametrize(("method", "flags"), GROWING)
def test_every_map_grows(
    quantize, embedded: Path, smaller: Path, tmp_path: Path, method: str, flags: list[str]
):
    old_run, later = (
        shutil.copytree(run, tmp_path / name)
        for run, name in ((smaller, "old"), (embedded, "later"))
    )
    quantize(old_run, "--method", method, *flags)
    quantize(later, "--extend", str(old_run), *MAP)
    old, new = (SemanticIds.load(run / "semantic_ids") for run in (old_run, later))
    codes, known = old.known_codes(new.item_ids)
    assert (old.n_items, known.sum(), new.n_items) == (78, 78, 90)
    assert (new.codes[known] == codes[known]).all() and new.descends_from(old.sha256)
    assert new.codebook_sizes == old.codebook_sizes
    assert require(later, "quantize").metrics["method"] == method
    if method == "semantic":  # new items stand in the category that old ones have under its name
        categories = pl.read_parquet(later / "data" / "catalog.parquet")["categories"]
        firsts = {}
        for path, code in zip(categories.to_list(), new.codes.tolist(), strict=True):
            firsts.setdefault(tuple(path), set()).add(tuple(code[:-1]))
        assert all(len(found) == 1 for found in firsts.values())


def test_an_imported_map_grows_by_its_items_vectors(
    quantize, embedded: Path, smaller: Path, tmp_path: Path
):
    old_run, later = (
        shutil.copytree(run, tmp_path / name)
        for run, name in ((smaller, "old"), (embedded, "later"))
    )
    quantize(old_run, *SMALL)
    index = shutil.copy(old_run / "semantic_ids" / "index.json", tmp_path / "index.json")
    again = ["--method", "import", "--index", str(index), "--overwrite", "true", *MAP]
    quantize(old_run, *again)
    quantize(later, "--extend", str(old_run), *MAP)
    old, new = (SemanticIds.load(run / "semantic_ids") for run in (old_run, later))
    codes, known = old.known_codes(new.item_ids)
    assert (new.codes[known] == codes[known]).all() and (~known).sum() == 12
    vectors = np.load(later / "embeddings" / "item_embeddings.npy")
    means = np.stack([vectors[known][codes[known, 0] == c].mean(axis=0) for c in range(8)])
    nearest = ((vectors[~known, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (new.codes[~known, 0] == nearest).mean() > 0.9


def test_beyond_the_spare_tokens_a_map_does_not_grow(
    quantize, embedded: Path, smaller: Path, tmp_path: Path
):
    old_run, later = (
        shutil.copytree(run, tmp_path / name)
        for run, name in ((smaller, "old"), (embedded, "later"))
    )
    flags = [*ONE_LEVEL, "--collisions", "item-token"]
    quantize(old_run, *flags, "--spare", "0.153")  # 12 of 78: just enough
    quantize(later, "--extend", str(old_run), *MAP)
    quantize(old_run, *flags, "--spare", "0.14", "--overwrite", "true")
    said = quantize(later, "--extend", str(old_run), "--overwrite", "true", *MAP, fails=True)
    assert "spare" in said


def test_too_many_items_are_found_before_the_fit(quantize, shop: Path, monkeypatch):
    monkeypatch.setattr("genrec.quantizers.residual_kmeans.ResidualKMeans.fit", None)
    said = quantize(shop, "--n_levels", "2", "--codebook_size", "4", fails=True)
    assert "90 items exceed the 16 SIDs of 4 x 4 codes" in said


def test_a_preset_keeps_its_own_shape(quantize, shop: Path):
    said = quantize(
        shop, "--method", "rqvae", "--preset", "tiger", "--epochs", "1", *MAP, fails=True
    )
    assert "codebook_size=256 exceeds the 90 distinct item vectors" in said


def test_letter_needs_the_collaborative_part(quantize, recipe, shop: Path):
    recipe("embed", shop, "--dim", "12", "--overwrite", "true")
    said = quantize(shop, "--method", "rqvae", "--preset", "letter", "--epochs", "1", fails=True)
    assert "needs collaborative vectors" in said


@pytest.mark.parametrize("collisions", ["minimal", "sinkhorn", "suffix", "item-token"])
def test_collisions_are_resolved_by_every_way(quantize, shop: Path, collisions: str):
    said = quantize(
        shop, "--n_levels", "2", "--codebook_size", "16", "--collisions", collisions, *MAP
    )
    ids, report = SemanticIds.load(shop / "semantic_ids"), quality(shop)["collisions"]
    appended = collisions in ("suffix", "item-token")
    assert ids.n_levels == (3 if appended else 2)
    assert report["method"] == collisions and report["rate_before"] > 0
    assert (report["moved"] == 0) == appended
    added = report["distortion_after"] / report["distortion_before"] - 1
    assert (f"which adds {added:.2%} to the distortion" in said) == (not appended)
    assert len(quality(shop)["reconstruction"]["after_level"]) == 2


def test_equal_items_are_reported_first(quantize, shop: Path, tmp_path: Path):
    path = shop / "embeddings" / "item_embeddings.npy"
    vectors = np.load(path)
    vectors[[4, 7]], vectors[[5, 6, 8]] = vectors[3], 0
    np.save(path, vectors)
    said = quantize(shop, *SMALL)
    line = "vectors: 3 items equal another (1 groups, 0 of one title), 3 have none"
    assert said.startswith(line)
    report = quality(shop)
    ids = SemanticIds.load(shop / "semantic_ids").item_ids.to_list()
    found = report["duplicates"]["vectors"]
    assert found["listed"][0]["item_ids"] == [ids[3], ids[4], ids[7]]
    assert found["without_vector_ids"] == [ids[5], ids[6], ids[8]]
    assert report["collision_rate"] == 0
    assert ids[7] in (shop / "semantic_ids" / "report.html").read_text()
    quantize(shop, "--method", "independent", "--overwrite", "true", *MAP)
    assert quality(shop)["duplicates"] == report["duplicates"]


def test_uneven_codes_are_named_with_the_setting_to_change(quantize, shop: Path):
    assert "used unevenly" not in quantize(shop, *SMALL, "--max_fill", "1.5")
    vectors = np.load(shop / "embeddings" / "item_embeddings.npy")
    vectors[12:] = vectors[0] + 0.02 * vectors[12:]
    np.save(shop / "embeddings" / "item_embeddings.npy", vectors)
    said = quantize(shop, *SMALL, "--codebook_size", "12", "--overwrite", "true")
    assert "level 1 has the perplexity of" in said and "max_fill: 1.5" in said
    assert "normalize_residuals" not in said  # it is on
    uneven = ["--normalize_residuals", "false", "--overwrite", "true"]
    said = quantize(shop, *SMALL, "--codebook_size", "12", *uneven)
    assert "normalize_residuals: true" in said


def test_residuals_are_normalised_where_a_level_sees_them(quantize, shop: Path):
    quantize(shop, *SMALL)
    assert require(shop, "quantize").config["normalize_residuals"] is True
    assert load_quantizer(shop / "semantic_ids" / "quantizer.safetensors").norms is not None
    one = [*ONE_LEVEL, "--collisions", "item-token", "--overwrite", "true"]
    quantize(shop, *one)  # as it was before there was this default
    assert require(shop, "quantize").config["normalize_residuals"] is False
    assert load_quantizer(shop / "semantic_ids" / "quantizer.safetensors").norms is None


def test_an_index_file_goes_round(quantize, shop: Path, tmp_path: Path):
    quantize(shop, *SMALL)
    first = SemanticIds.load(shop / "semantic_ids")
    index = tmp_path / "index.json"
    shutil.copy(shop / "semantic_ids" / "index.json", index)
    said = quantize(shop, "--method", "import", "--index", str(index), "--overwrite", "true", *MAP)
    assert (SemanticIds.load(shop / "semantic_ids").codes == first.codes).all()
    assert "0.0% of the items shared a SID, now none; 0 moved" in said
    shared = json.loads(index.read_text())
    keys = list(shared)
    shared[keys[0]] = shared[keys[1]]
    index.write_text(json.dumps(shared))
    said = quantize(shop, "--method", "import", "--index", str(index), "--overwrite", "true", *MAP)
    report = quality(shop)["collisions"]
    assert (report["groups"], report["moved"]) == (1, 1) and report["rate_before"] == 2 / 90
    row = SemanticIds.load(shop / "semantic_ids")
    given = first.codes[[1, 1, *range(2, 90)]]
    moved = (row.codes != given).any(axis=1)
    assert moved.sum() == 1 and (row.codes[moved, :2] == given[1, :2]).all()  # the prefix stays
    assert report["shared_items"] == [row.item_ids[:2].to_list()]
    again = [*"--method import --overwrite true --index".split(), str(index), *MAP]
    said = quantize(shop, *again, "--import_collisions", "refuse", fails=True)
    assert "2 items share a SID" in said and keys[0] in said and keys[1] in said
    del shared[keys[5]]
    index.write_text(json.dumps(shared))
    said = quantize(
        shop, "--method", "import", "--index", str(index), "--overwrite", "true", fails=True
    )
    assert "lacks 1 items of the catalogue" in said
    quantize(shop, *again, "--import_missing", "place")
    placed = SemanticIds.load(shop / "semantic_ids")
    assert quality(shop)["collisions"]["placed"] == 1
    kept = np.delete(np.arange(90), 5)
    assert (placed.codes[kept] == row.codes[kept]).all()


def test_too_small_a_space_is_refused_and_a_tight_one_named(quantize, shop: Path):
    said = quantize(shop, "--n_levels", "2", "--codebook_size", "8", *MAP, fails=True)
    assert "90 items exceed the 64 SIDs of 8 x 8 codes; use" in said
    said = quantize(shop, "--n_levels", "2", "--codebook_size", "16", *MAP)
    assert "16 x 16 codes give 2.8 SIDs an item, fewer than 50" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "kmeans"], "method='kmeans'"),
        (["--codebook_size", "1"], "codebook_size=1"),
        (["--codebook_size", "500"], "exceeds the 90 distinct item vectors"),
        (["--method", "import"], "needs `index`"),
        (["--max_fill", "0.5", "--codebook_size", "8"], "max_fill=0.5"),
        (["--pca_dim", "400", "--codebook_size", "8"], "pca_dim=400"),
        (["--method", "rqvae", "--preset", "vqgan"], "preset='vqgan'"),
        (["--extend", "nowhere"], "extend=nowhere"),
    ],
)
def test_bad_settings_are_refused(quantize, shop: Path, flags: list[str], message: str):
    assert message in quantize(shop, *flags, fails=True)
    assert not (shop / "semantic_ids" / "manifest.json").exists()
