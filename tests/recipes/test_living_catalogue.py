"""A catalogue that lives: items leave, come and return; SIDs stay and an old model serves all."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from recipe_calls import run

from genrec.artifacts import load_manifest, read_shards, require
from genrec.data.synthetic import synthetic_shop
from genrec.evaluation.run_checks import check_manifests, check_semantic_ids
from genrec.recommend import Recommender
from genrec.semantic_ids import SemanticIds

TABLES = (
    "--format table --interactions log.parquet --items items.parquet --time_column timestamp "
    "--unknown_items drop --brand_column brand --category_column categories"
).split()


def prepare(folder: Path, items: list[str]) -> Path:
    """Tables of a shop that has these items alone."""
    shop = synthetic_shop(n_users=80, n_items=60, seed=1)
    tables = folder / "tables"
    tables.mkdir(parents=True)
    shop.interactions.write_parquet(tables / "log.parquet")
    shop.catalog.filter(pl.col("item_id").is_in(items)).write_parquet(tables / "items.parquet")
    run("prepare", folder / "run", *TABLES, "--data_dir", str(tables))
    return folder / "run"


def sid_of(run_dir: Path) -> dict[str, str]:
    ids = SemanticIds.load(run_dir / "semantic_ids")
    return dict(zip(ids.item_ids, ids.sids(), strict=True))


@pytest.fixture(scope="module")
def items() -> dict[str, list[str]]:
    """Six items leave, six come, and of those that left two return."""
    every = sorted(synthetic_shop(n_users=80, n_items=60, seed=1).catalog["item_id"])
    gone, new = every[3::10], every[7::10]
    return {"every": every, "gone": gone, "new": new, "returned": gone[:2]}


@pytest.fixture(scope="module")
def first(items, tiny_flags, tmp_path_factory) -> Path:
    """A run with a model, of the shop without the items that are still to come."""
    folder = prepare(
        tmp_path_factory.mktemp("first"), [i for i in items["every"] if i not in items["new"]]
    )
    run("embed", folder, *"--dim 8 --collaborative cooccurrence --collaborative_dim 6".split())
    run("quantize", folder, *"--n_levels 3 --codebook_size 8 --report_map pca".split())
    run("build_dataset", folder)
    flags = " ".join(tiny_flags["sft"]).replace("--max_steps 12", "--max_steps 4")
    run("sft", folder, *flags.split())
    return folder


@pytest.fixture(scope="module")
def second(first: Path, items, tmp_path_factory) -> Path:
    """The later catalogue: embedded and quantized as an extension, without a model."""
    folder = prepare(
        tmp_path_factory.mktemp("second"), [i for i in items["every"] if i not in items["gone"]]
    )
    run("embed", folder, "--extend", str(first))
    run("quantize", folder, "--extend", str(first), "--report_map", "pca")
    return folder


def test_sids_stay_are_reserved_and_come_back(first: Path, second: Path, items, tmp_path: Path):
    before, after = sid_of(first), sid_of(second)
    assert len(before) == len(after) == 54
    kept = set(before) & set(after)
    assert len(kept) == 48 and all(after[item] == before[item] for item in kept)
    assert set(after) - kept == set(items["new"])
    assert not {after[item] for item in items["new"]} & set(before.values())
    assert len(set(after.values())) == 54
    old, ids = (SemanticIds.load(r / "semantic_ids") for r in (first, second))
    assert ids.descends_from(old.sha256) and not old.descends_from(ids.sha256)
    assert ids.reserved is not None and sorted(ids.reserved["item_id"]) == items["gone"]

    absent = set(items["gone"]) - set(items["returned"]) | {items["new"][0]}
    folder = prepare(tmp_path, [i for i in items["every"] if i not in absent])
    run("embed", folder, "--extend", str(second))
    run("quantize", folder, "--extend", str(second), "--report_map", "pca")
    third = sid_of(folder)
    assert all(third[item] == before[item] for item in items["returned"])
    assert all(third[item] == after[item] for item in set(third) & set(after))
    ids = SemanticIds.load(folder / "semantic_ids")
    assert ids.version == 3 and ids.descends_from(old.sha256)
    assert ids.reserved is not None and set(ids.reserved["item_id"]) == absent
    # The model of the first run serves it, too, over two generations.
    made = Recommender.load(folder, model_run=first).recommend([], k=55, beam_width=55)
    assert {r.item_id for r in made} == set(third)


def test_an_old_model_recommends_from_the_new_catalogue(first: Path, second: Path, items):
    flags = "--k 54 --beam_width 54 --filter_seen false --split valid".split()
    run("recommend", second, "--model_run", str(first), *flags)
    lists = read_shards(second / "recommendations", "recommendations")
    sids = sid_of(second)
    for row in lists.partition_by("row_id"):  # wide enough for the whole catalogue
        assert set(row["item_id"]) == set(sids) and len(row) == 54
    assert not set(lists["item_id"]) & set(items["gone"])
    assert all(sids[item] == sid for item, sid in lists.select("item_id", "sid").iter_rows())
    made, model = require(second, "recommend"), load_manifest(first, "sft")
    assert model is not None and made.inputs["model_run/sft"] == model.content_hash
    assert set(made.inputs) == {"prepare", "quantize", "model_run/sft", "model_run/build_dataset"}
    assert made.config["model_run"] == str(first)
    run("recommend", second, "--model_run", str(first), *flags)  # skipped
    assert require(second, "recommend") == made
    # Wherever both catalogues have the history and the item, the score is the same.
    old, new = Recommender.load(first), Recommender.load(second, model_run=first)
    assert old.prompts([[]]) == new.prompts([[]]) and new.max_history == old.max_history
    history = [item for item in sid_of(first) if item in sids][:3]
    scores = [
        {r.item_id: r.score for r in recommender.recommend(history, k=51, beam_width=60)}
        for recommender in (old, new)
    ]
    both = set(scores[0]) & set(scores[1])
    assert len(both) == 45 and set(scores[1]) >= set(items["new"])
    assert [scores[0][i] for i in both] == pytest.approx([scores[1][i] for i in both], abs=1e-4)
    # New items stand in prompts, too, as tokens that the model knows.
    tokens = new.tokenizer(new.sids[new.rows_of(items["new"][:1])[0]])["input_ids"]
    assert len(tokens) == 3
    assert {r.item_id for r in new.recommend(items["new"], k=48)} == set(sids) - set(items["new"])
    assert check_manifests(second).status == "ok" and check_semantic_ids(second).status != "bad"


def test_another_model_is_another_input(first: Path, second: Path, tmp_path: Path):
    """And the same model at another place is still the same list."""
    later, model = tmp_path / "later", tmp_path / "model"
    for name in ("data", "embeddings", "semantic_ids"):
        shutil.copytree(second / name, later / name)
    shutil.copytree(first, model)
    flags = "--k 5 --split valid --max_rows 3".split()
    run("recommend", later, "--model_run", str(model), *flags)
    manifest = model / "sft" / "manifest.json"
    found = load_manifest(model, "sft")
    assert found is not None
    manifest.write_text(manifest.read_text().replace(found.content_hash, "0" * 64))
    with pytest.raises(ValueError, match="made with other input 'model_run/sft'"):
        run("recommend", later, "--model_run", str(model), *flags)


def test_strangers_are_refused(first: Path, second: Path, tmp_path: Path):
    later = tmp_path / "later"
    for name in ("data", "embeddings"):
        shutil.copytree(second / name, later / name)
    run("quantize", later, *"--n_levels 3 --codebook_size 8 --report_map pca --seed 9".split())
    with pytest.raises(ValueError) as error:
        run("recommend", later, "--model_run", str(first))
    for part in (
        f"the SID map in {later / 'semantic_ids'}",
        f"the model in {first / 'sft' / 'model'} was trained on",
        f"genrec quantize --run_dir {later} --extend {first} --overwrite true",
    ):
        assert part in str(error.value)
    # Nor the other way round: an old map lacks what a later model may have learned.
    old = SemanticIds.load(first / "semantic_ids")
    assert not old.descends_from(SemanticIds.load(second / "semantic_ids").sha256)
    with pytest.raises(ValueError, match="is this run itself"):
        run("quantize", first, "--extend", str(first), "--overwrite", "true")
    assert load_manifest(first, "quantize") is not None


def test_audit_says_why_it_cannot(first: Path, second: Path, tmp_path: Path):
    later = tmp_path / "later"
    for name in ("data", "embeddings", "semantic_ids"):
        shutil.copytree(second / name, later / name)
    run("recommend", later, "--model_run", str(first), *"--k 5 --split valid --max_rows 3".split())
    with pytest.raises(
        ValueError, match=f"made by the model of {first}; records name files of one"
    ):
        run("audit", later)
    assert not (later / "audit.key").exists() and not (later / "audit").exists()


def test_vectors_of_the_second_run_are_of_the_first_ones_space(first: Path, second: Path, items):
    rows = [
        dict(zip(pl.read_parquet(r / "data/catalog.parquet")["item_id"], v, strict=True))
        for r in (first, second)
        for v in [np.load(r / "embeddings/item_embeddings.npy")]
    ]
    both = set(rows[0]) & set(rows[1])
    assert len(both) == 48 and all((rows[0][item] == rows[1][item]).all() for item in both)
    assert all(np.linalg.norm(rows[1][item]) == pytest.approx(1, abs=1e-4) for item in items["new"])
    assert not any(rows[1][item][8:].any() for item in items["new"])  # they have no behaviour
