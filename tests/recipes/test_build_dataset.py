"""The build_dataset recipe as users run it: every family, caps, chosen rows, kills and restarts."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.artifacts import Stage, load_manifest, write_parquet
from genrec.data.cleaning import clean
from genrec.data.readers import RawData, read_movielens
from genrec.data.splits import SPLITS, leave_one_out
from genrec.data.synthetic import synthetic_shop
from genrec.semantic_ids import SemanticIds
from genrec.tasks.families import FAMILIES, INTERACTION, ITEM
from genrec.tasks.sequential import explode

ROOT = Path(__file__).resolve().parents[2]
ALL = ["--tasks", "all"]
WORDS = ("soft fabric", "poor quality", "easy to use", "smells of roses", "fits well")


def prepared(run: Path, raw: RawData) -> Path:
    """The stages prepare and quantize, made by library calls."""
    data = clean(raw, min_rating=0 if raw.interactions["rating"].null_count() == 0 else None)
    n_items = data.catalog.height
    splits = leave_one_out(data.interactions, n_items, max_history=8)
    stage = Stage(run, "prepare", {"max_history": 8})
    assert not stage.is_done()
    write_parquet(stage.folder / "interactions.parquet", data.interactions)
    counts = pl.Series("train_count", splits.train_count)
    write_parquet(stage.folder / "catalog.parquet", data.catalog.with_columns(counts))
    for name in SPLITS:
        write_parquet(stage.folder / f"{name}.parquet", getattr(splits, name))
    stage.finish(rows=data.interactions.height)
    size = 1
    while size**3 < n_items:
        size += 1
    every = np.stack(np.unravel_index(np.arange(size**3), (size,) * 3), axis=1).astype(np.int32)
    codes = every[np.random.default_rng(0).permutation(size**3)[:n_items]]
    stage = Stage(run, "quantize", {}, ["prepare"])
    assert not stage.is_done()
    SemanticIds(data.catalog["item_id"], codes, (size,) * 3).save(stage.folder)
    stage.finish(rows=n_items)
    return run


def with_texts(n_users: int = 40, changed: bool = False) -> RawData:
    """The synthetic shop with ratings, reviews and queries; `changed`: other held-out ones."""
    raw = synthetic_shop(n_users, 30, 1)
    log, n = raw.interactions, raw.interactions.height
    rng = np.random.default_rng(0)
    words = [[WORDS[i] for i in rng.integers(0, len(WORDS), n)] for _ in range(3)]
    log = log.with_columns(
        pl.Series("rating", rng.integers(1, 6, n).astype(float)),
        pl.Series("review", words[0]),
        pl.Series("summary", words[1]),
        pl.Series("query", words[2]),
    )
    if changed:
        left = pl.int_range(pl.len()).reverse().over("user_id")
        held = (left < 2) & (pl.len().over("user_id") >= 3)
        others = log["item_id"].unique().sort().to_list()
        log = log.with_columns(
            pl.when(held).then(pl.lit(others[0])).otherwise("item_id").alias("item_id"),
            pl.when(held).then(pl.lit(1.0)).otherwise("rating").alias("rating"),
            *[pl.when(held).then(pl.lit("later " + c)).otherwise(c).alias(c)
              for c in ("review", "summary", "query")],
        )  # fmt: skip
    return RawData(log, raw.catalog, None)


def build(run: Path, *flags: str) -> Path:
    """Run the recipe in this process; the dataset's folder."""
    before = sys.argv
    sys.argv = ["build_dataset.py", "--run_dir", str(run), *flags]
    try:
        runpy.run_path(str(ROOT / "recipes" / "build_dataset.py"), run_name="__main__")
    finally:
        sys.argv = before
    return run / "dataset"


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A prepared shop without reviews; copy it before writing."""
    return prepared(tmp_path_factory.mktemp("shop") / "run", synthetic_shop(60, 40, 0))


@pytest.fixture(scope="module")
def rich(tmp_path_factory) -> Path:
    """A prepared shop with everything; copy it before writing."""
    return prepared(tmp_path_factory.mktemp("rich") / "run", with_texts())


@pytest.fixture(scope="module")
def built(rich, tmp_path_factory) -> Path:
    """The dataset of `rich` with all families; read only."""
    return build(shutil.copytree(rich, tmp_path_factory.mktemp("built") / "run"), *ALL)


@pytest.fixture
def run_of(tmp_path):
    return lambda run, name="run": Path(shutil.copytree(run, tmp_path / name))


def rows_of(folder: Path, name: str = "train") -> pl.DataFrame:
    return pl.read_parquet(folder / f"{name}.parquet")


def counts(rows: pl.DataFrame) -> dict[str, int]:
    return dict(rows["task"].value_counts().iter_rows())


def test_all_families_that_the_synthetic_shop_allows(shop, run_of, capsys):
    run = run_of(shop)
    folder = build(run, *ALL)
    rows = rows_of(folder)
    assert set(rows["task"]) == set(FAMILIES) - {"review_summary", "explanation"}
    metrics = load_manifest(run, "build_dataset").metrics
    assert metrics["switched_off"] == {
        "review_summary": "the data have no review texts and no review summaries",
        "explanation": "the data have no review texts",
    }
    assert metrics["trained_on_target"] is False and metrics["rationale_origin"] == "template"
    assert metrics["rows_per_task"] == counts(rows)
    assert "direct: " in capsys.readouterr().out
    assert rows["row_id"].n_unique() == len(rows)
    assert not rows.select("prompt", "completion", "template").null_count().sum_horizontal()[0]
    data = run / "data"
    supervised = explode(pl.read_parquet(data / "train.parquet"))
    assert counts(rows)["direct"] == counts(rows)["query_search"] == len(supervised)
    assert counts(rows)["sequential"] == pl.read_parquet(data / "train.parquet").height
    catalog = pl.read_parquet(data / "catalog.parquet")
    assert counts(rows)["sid_to_title"] == catalog.height
    known = set(catalog["item_id"])
    for column in ("targets", "history", "candidates", "shown", "set_aside"):
        assert set(rows[column].explode().drop_nulls()) <= known
    # The templates that made them lie beside them.
    for name in rows["template"].unique():
        assert (folder / "prompts" / f"{name}.jinja").is_file()
    assert not list(folder.glob("*.partial"))


def test_data_with_everything_build_every_family(built):
    rows = rows_of(built)
    assert set(rows["task"]) == set(FAMILIES)
    assert load_manifest(built.parent, "build_dataset").metrics["switched_off"] == {}
    queries = rows.filter(pl.col("task") == "query_search")
    assert set(queries["text_origin"]) == {"data"} and set(queries["query"]) <= set(WORDS)


def test_what_is_held_out_changes_no_byte_of_the_training_rows(built, tmp_path):
    other = prepared(tmp_path / "other", with_texts(changed=True))
    one, two = built, build(other, *ALL)
    assert not rows_of(one, "test").equals(rows_of(two, "test"))
    assert (one / "train.parquet").read_bytes() == (two / "train.parquet").read_bytes()
    assert rows_of(one, "valid")["prompt"].equals(rows_of(two, "valid")["prompt"])
    assert rows_of(one, "rl").equals(rows_of(two, "rl"))


def test_two_builds_are_the_same_and_seeds_differ(built, rich, run_of):
    first, again = built, build(run_of(rich, "a"), *ALL)
    other = build(run_of(rich, "b"), *ALL, "--seed", "1")
    for name in ("train", "valid", "test", "rl"):
        assert (first / f"{name}.parquet").read_bytes() == (again / f"{name}.parquet").read_bytes()
    one, two = rows_of(first), rows_of(other)
    for column in ("template", "shown", "candidates"):
        assert not one[column].equals(two[column])


def test_held_out_rows_have_one_template_and_their_own_target(shop, run_of):
    run = run_of(shop)
    folder = build(run)
    assert set(rows_of(folder)["task"]) == {"sequential", "title_to_sid", "sid_to_title"}
    ids = pl.read_parquet(run / "data" / "catalog.parquet")["item_id"]
    for split in ("valid", "test"):
        rows, source = rows_of(folder, split), pl.read_parquet(run / "data" / f"{split}.parquet")
        assert set(rows["template"]) == {"sequential/seen/01"}
        assert rows["row_id"].equals(source["row_id"])
        targets = [[ids[i]] for i in source["target_item_index"]]
        assert rows["targets"].to_list() == targets
        histories = [[ids[i] for i in h] for h in source["history_item_index"]]
        assert rows["history"].to_list() == histories
    rl, train = rows_of(folder, "rl"), pl.read_parquet(run / "data" / "train.parquet")
    last = train.group_by("user_id", maintain_order=True).last()
    last = last.filter(pl.col("history_item_index").list.len() > 0)
    assert rl["user_id"].equals(last["user_id"])
    assert rl["target_item_index"].equals(last["target_item_index"])


def test_per_item_supervises_what_whole_histories_do(shop, run_of):
    whole = rows_of(build(run_of(shop, "a")))
    single = rows_of(build(run_of(shop, "b"), "--sequential_mode", "per_item"))
    whole, single = (t.filter(pl.col("task") == "sequential") for t in (whole, single))
    assert len(single) > len(whole)
    assert (single["targets"].list.len() == 1).all()

    def supervised(rows: pl.DataFrame) -> list[tuple]:
        """(user, items before, item) of every supervised item, as far as the row shows."""
        return sorted(
            (user, (*history, *targets[:i]), targets[i])
            for user, history, targets in rows.select("user_id", "history", "targets").iter_rows()
            for i in range(len(targets))
        )

    assert supervised(whole) == supervised(single)
    assert whole["completion"].str.len_chars().sum() == single["completion"].str.len_chars().sum()


def test_max_rows(built, rich, run_of):
    run, whole = run_of(rich), rows_of(built)
    limits = ["--max_rows", "*=100", "direct=30", "sid_to_title=10", "denoising=0"]
    rows = rows_of(build(run, *ALL, *limits))
    found = counts(rows)
    assert "denoising" not in found and found["sid_to_title"] < 25
    assert 10 < found["direct"] < 60
    for name, family in FAMILIES.items():
        if family.unit == INTERACTION and name not in ("direct", "denoising"):
            assert found[name] < 160, name
    joined = rows.join(whole, on="row_id", suffix="_whole")
    assert len(joined) == len(rows)  # the same rows, fewer of them
    for column in ("prompt", "completion"):
        assert joined[column].equals(joined[column + "_whole"].alias(column))


def test_rows_to_keep(built, rich, run_of, tmp_path):
    run = run_of(rich)
    ids = pl.read_parquet(run / "data" / "train.parquet")["row_id"]
    keep = tmp_path / "keep.parquet"
    ids.gather_every(3).to_frame().write_parquet(keep)
    rows = rows_of(build(run, *ALL, "--keep_rows", str(keep)))
    kept = set(ids.gather_every(3))
    of_split = rows.filter(
        ~pl.col("task").is_in([n for n, f in FAMILIES.items() if f.unit == ITEM])
    )
    assert set(of_split["row_id"].str.split(":").list.last().str.split("#").list.first()) <= kept
    assert set(rows.filter(pl.col("task") == "sequential")["row_id"]) == kept
    whole = rows_of(built).filter(pl.col("row_id").is_in(rows["row_id"].implode()))
    assert whole.sort("row_id").equals(rows.sort("row_id"))  # others were dropped, none changed


def test_fewer_templates_and_own_ones(shop, run_of, tmp_path):
    folder = build(run_of(shop, "a"), "--n_templates", "1")
    assert set(rows_of(folder)["template"].str.slice(-7)) == {"seen/01"}
    own = tmp_path / "prompts"
    shutil.copytree(ROOT / "prompts", own)
    (own / "sequential" / "seen" / "01.jinja").write_text("My own list: {{ history }}")
    folder = build(run_of(shop, "b"), "--prompts_dir", str(own))
    assert rows_of(folder, "test")["prompt"].str.starts_with("My own list: ").all()
    copied = folder / "prompts" / "sequential" / "seen" / "01.jinja"
    assert copied.read_text() == "My own list: {{ history }}"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tasks", "sequential", "rating2"], "rating2"),
        (["--tasks", "title_to_sid"], "must include 'sequential'"),
        (["--max_rows", "direct"], "should read family=number"),
        (["--max_rows", "nothing=3"], "nothing"),
        (["--max_rows", "direct=nan"], "should read family=number"),
        (["--n_templates", "0"], "n_templates=0 must be at least 1"),
        (["--sequential_mode", "both"], "both"),
    ],
)
def test_settings_that_cannot_work(shop, run_of, in_process, capsys, flags, said: str):
    run = run_of(shop)
    assert said in in_process("build_dataset", run, *flags, fails=True)
    assert not (run / "dataset").exists()


def test_a_template_that_cannot_be_served(shop, run_of, in_process, tmp_path):
    own = tmp_path / "prompts"
    shutil.copytree(ROOT / "prompts", own)
    (own / "sequential" / "seen" / "02.jinja").write_text("{{ history }} What next?")
    run = run_of(shop)
    assert "must end with the history" in in_process(
        "build_dataset", run, "--prompts_dir", str(own), fails=True
    )
    assert not (run / "dataset" / "train.parquet").exists()


def test_killed_and_started_again(tmp_path, recipe_command, run_of):
    run = prepared(tmp_path / "killed", with_texts(800))
    whole = run_of(run, "whole")
    command, env = recipe_command("build_dataset", run, *ALL)
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env,
        start_new_session=True,
    )  # fmt: skip
    partial = run / "dataset" / "train.parquet.partial"
    try:
        deadline = time.monotonic() + 120
        while not (partial.exists() and partial.stat().st_size > 10_000):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert partial.exists()
    assert (
        not list((run / "dataset").glob("*.parquet"))
        and load_manifest(run, "build_dataset") is None
    )
    one, two = build(run, *ALL), build(whole, *ALL)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert (one / "train.parquet").read_bytes() == (two / "train.parquet").read_bytes()
    assert not list(one.glob("*.partial"))


def test_movielens_100k(genrec_data: Path, tmp_path):
    run = prepared(tmp_path / "run", read_movielens(genrec_data / "movielens-100k"))
    folder = build(run, *ALL, "--max_rows", "*=3000", "sequential=1000000")
    off = load_manifest(run, "build_dataset").metrics["switched_off"]
    assert set(off) == {
        "description_to_sid", "text_to_sid", "sid_to_description", "sid_to_text",
        "review_summary", "explanation",
    }  # fmt: skip
    found = counts(rows_of(folder))
    assert set(found) == set(FAMILIES) - set(off)
    assert found["sid_to_title"] == 1_682
    assert found["title_to_sid"] == 1_646  # 18 titles are there twice
    assert all(2_000 < found[n] < 3_400 for n in found if FAMILIES[n].unit == INTERACTION)
    ratings = rows_of(folder).filter(pl.col("task") == "rating")
    assert set(ratings["completion"]) == {"1", "2", "3", "4", "5"}
