"""A run with recommended lists, made by library calls around a random model.

`tests/audit` and the recipes' tests take `make_listed_run` and `call_recipe` from here by path.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.artifacts import Stage, stage_folder, write_json, write_parquet
from genrec.generation.jobs import GenerationJob, generate
from genrec.generation.users import SplitRows
from genrec.recommend import Recommender

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
MAX_HISTORY, K, BEAM = 5, 6, 12
HOSTILE = {
    0: "<script>alert(document.domain)</script>",
    1: "\"quoted\" 'title' & </bdi></ol><h1>",
    2: "abc \u202egnp.exe\u202c \u2066x",
    3: "A" * 10_000,
    4: "{{ 7 * 7 }} {% raw %} <a_1><b_2> \x00\x07 line\nbreak",
    5: "שלום ברוך הבא",
}


def make_listed_run(
    tiny,
    run: Path,
    strings: bool = True,
    seed: int = 0,
    split: str = "test",
    shard_size: int = 2048,
) -> Path:
    """Stages prepare … recommend of a shop with hostile titles and a random model."""
    shop = tiny.shop(n_users=14, n_items=20, strings=strings, seed=seed, max_history=MAX_HISTORY)
    titles = [HOSTILE.get(i, title) for i, title in enumerate(shop.catalog["title"])]
    brands = [[None, "Acme", "Bolt & <b>Co</b>", "Acme", "Cask"][i % 5] for i in range(20)]
    catalog = shop.catalog.with_columns(
        pl.Series("title", titles), pl.Series("brand", brands, dtype=pl.String)
    )
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids, seed=seed)
    for parameter in model.parameters():  # a sharper model, on which leaving things out shows
        parameter.data *= 2.5 if parameter.ndim > 1 else 1
    tiny.save_run(run, replace(shop, catalog=catalog), model, tokenizer, MAX_HISTORY)
    embed = Stage(run, "embed", {}, ["prepare"])
    assert not embed.is_done()
    vectors = np.random.default_rng(seed).normal(size=(20, 8)).astype(np.float32)
    np.save(embed.folder / "item_embeddings.npy", vectors)
    embed.finish(rows=20)
    write_json(run / "data" / "split.json", {"protocol": "leave-one-out", "users": 14, "items": 20})
    config = {
        "model_stage": "sft", "engine": "torch", "split": split, "k": K, "beam_width": BEAM,
        "normalizer": "full", "filter_seen": True, "dtype": "float32", "seed": 0,
    }  # fmt: skip
    stage = Stage(run, "recommend", config, ["prepare", "quantize", "build_dataset", "sft"])
    assert not stage.is_done()
    rows = pl.read_parquet(stage_folder(run, "prepare") / f"{split}.parquet")
    write_parquet(stage.folder / "rows.parquet", rows.select("row_id", "user_id"))
    job = GenerationJob(SplitRows(rows, True), stage.folder, K, BEAM, stage.fingerprint, shard_size)
    made = generate(Recommender.load(run), job)
    stage.finish(rows=made * K, metrics={"certified_share": 0.5})
    return run


def call_recipe(name: str, *args: str) -> None:
    """Run a recipe's file in this process, as its command line does."""
    before = sys.argv
    sys.argv = [str(RECIPES / f"{name}.py"), *args]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture(scope="session")
def listed_run(tiny, tmp_path_factory) -> Path:
    """Stages prepare … recommend, to be read only."""
    return make_listed_run(tiny, tmp_path_factory.mktemp("listed") / "run")


@pytest.fixture(scope="session")
def recommender(listed_run) -> Recommender:
    return Recommender.load(listed_run)


@pytest.fixture(scope="session")
def lists(listed_run) -> pl.DataFrame:
    table = pl.read_parquet(listed_run / "recommendations" / "recommendations-*.parquet")
    return table.sort("row_id", "rank")


@pytest.fixture(scope="session")
def split_rows(listed_run) -> pl.DataFrame:
    return pl.read_parquet(listed_run / "data" / "test.parquet").sort("row_id")


@pytest.fixture(scope="session")
def histories(split_rows) -> Sequence[np.ndarray]:
    return [np.array(h, dtype=np.int64) for h in split_rows["history_item_index"].to_list()]


@pytest.fixture(scope="session")
def items(lists) -> np.ndarray:
    return lists["item_index"].to_numpy().reshape(-1, K).astype(np.int64)
