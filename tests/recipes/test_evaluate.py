"""The evaluate recipe as a user runs it, on a small run folder made by hand."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from genrec.artifacts import Stage, load_manifest, stage_folder, write_json, write_parquet
from genrec.columns import SEEN
from genrec.config import run as run_main
from genrec.data.splits import leave_one_out
from genrec.evaluation import suite
from genrec.evaluation.sequential import SequentialSettings
from genrec.metrics import RelevantRanks, gains

ROOT = Path(__file__).resolve().parent.parent.parent
N_ITEMS, N_USERS, K = 12, 40, 3
DAY = 86_400
# Without timestamps and item vectors, as `prepare` makes it.
POSSIBLE = ["random", "popularity", "item-kNN", "sequential-kNN", "EASE"]


def prepare(run: Path, seed: int = 0, timed: bool = False, users: bool = False) -> None:
    stage = Stage(run, "prepare", {"seed": seed})
    assert not stage.is_done()
    rng = np.random.default_rng(seed)
    length = rng.integers(3, 8, N_USERS)
    items = np.concatenate([rng.choice(N_ITEMS, n, replace=False) for n in length])
    times = np.concatenate([np.sort(rng.integers(0, 100 * DAY, n)) for n in length])
    log = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(100, 100 + N_USERS), length),
            "item_index": items.astype(np.int32),
            "timestamp": pl.Series(times if timed else [None] * len(items), dtype=pl.Int64),
            "position": np.concatenate([np.arange(n) for n in length]).astype(np.int32),
        }
    )
    splits = leave_one_out(log, N_ITEMS)
    catalog = pl.DataFrame(
        {
            "item_index": np.arange(N_ITEMS, dtype=np.int32),
            "item_id": [f"{seed}-{i:02}" for i in range(N_ITEMS)],
            "title": [f"Thing {i}" if i else None for i in range(N_ITEMS)],
            "categories": pl.Series([[f"Kind {i % 3}"] for i in range(N_ITEMS)]),
            "train_count": splits.train_count,
        }
    )
    write_parquet(stage.folder / "catalog.parquet", catalog)
    write_parquet(stage.folder / "interactions.parquet", log)
    for name in ("train", "valid", "test"):
        write_parquet(stage.folder / f"{name}.parquet", getattr(splits, name))
    if users:
        people = np.arange(100, 100 + N_USERS)
        table = pl.DataFrame({"user_id": people, "group": ["a", "b"] * (N_USERS // 2)})
        write_parquet(stage.folder / "users.parquet", table)
    split = {"protocol": "leave-one-out", "content_sha256": splits.sha256()}
    write_json(stage.folder / "split.json", split)
    stage.finish(rows=log.height)


def embed(run: Path) -> None:
    stage = Stage(run, "embed", {}, ["prepare"])
    assert not stage.is_done()
    vectors = np.random.default_rng(0).normal(size=(N_ITEMS, 4)).astype(np.float32)
    np.save(stage.folder / "item_embeddings.npy", vectors)
    stage.finish(rows=N_ITEMS)


def oracle(run: Path, k: int = K, place: int = 2, split: str = "test") -> pl.DataFrame:
    """Lists with the target in a place, behind the lowest unseen items; no seen items."""
    data = stage_folder(run, "prepare")
    rows = pl.read_parquet(data / f"{split}.parquet")
    catalog = pl.read_parquet(data / "catalog.parquet")
    lists = []
    for row in rows.iter_rows(named=True):
        target = row["target_item_index"]
        free = [i for i in range(N_ITEMS) if i != target and i not in row[SEEN]]
        items = [*free[: place - 1], target, *free[place - 1 :]][:k]
        lists += [(row["row_id"], row["user_id"], rank, i) for rank, i in enumerate(items, start=1)]
    schema = {"row_id": pl.String, "user_id": pl.Int64, "rank": pl.Int32, "item_index": pl.Int32}
    table = pl.DataFrame(lists, schema=schema, orient="row")
    return table.join(
        catalog.select("item_index", "item_id"), on="item_index", maintain_order="left"
    )


def recommend(run: Path, table: pl.DataFrame, rows: pl.DataFrame | None = None, **config) -> None:
    config = {"split": "test", "filter_seen": True, "k": K} | config
    files = {name: config[name] for name in ("allow", "deny") if name in config}
    stage = Stage(run, "recommend", config, inputs=["prepare"], files=files)
    stage.is_done(overwrite=True)
    half = table.height // 2
    write_parquet(stage.folder / "recommendations-00000.parquet", table[:half])
    write_parquet(stage.folder / "recommendations-00001.parquet", table[half:])
    if rows is not None:
        write_parquet(stage.folder / "rows.parquet", rows)
    stage.finish(rows=table.height)


def flags_of(run: Path, flags: tuple[str, ...]) -> list[str]:
    given = ["--run_dir", str(run), "--samples", "50", "--permutations", "99", *flags]
    return given if "--ks" in flags else [*given, "--ks", "1", "3"]


Done = subprocess.CompletedProcess[str]


def as_command(run: Path, *flags: str) -> Done:
    command = [sys.executable, str(ROOT / "recipes/evaluate.py"), *flags_of(run, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


@pytest.fixture(scope="module")
def recipe():
    """The recipe as a module: a process per test would mostly import."""
    spec = importlib.util.spec_from_file_location("evaluate_recipe", ROOT / "recipes/evaluate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def evaluate(recipe, monkeypatch):
    """Runs the recipe as its command line does, in this process."""

    def run(run_dir: Path, *flags: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags_of(run_dir, flags)])
        out, err, code = io.StringIO(), io.StringIO(), 0
        with redirect_stdout(out), redirect_stderr(err):
            try:
                run_main(recipe.main)
            except SystemExit as end:
                code = int(end.code or 0)
        return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    prepare(tmp_path / "run")
    return tmp_path / "run"


def reads(run: Path) -> list[dict]:
    path = run / "test_reads.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def fails(done: Done, message: str) -> None:
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1


# The recommend stage's lists. ---------------------------------------------------------------------


def test_whole_stage(run_dir):
    table = oracle(run_dir)
    recommend(run_dir, table, table.select("row_id").unique())
    done = as_command(run_dir, "--dataset", "hand-made shop")
    assert done.returncode == 0, done.stderr
    folder = stage_folder(run_dir, "evaluate")
    metrics = metrics_of(folder)
    ours = metrics["systems"]["genrec"]
    assert ours["HR@1"]["value"] == 0 and ours["HR@3"]["value"] == 1
    assert ours["NDCG@3"]["value"] == pytest.approx(1 / np.log2(3))
    assert ours["NDCG@3"]["low"] == pytest.approx(ours["NDCG@3"]["high"])  # rank 2 in every row
    assert metrics["rows"] == metrics["users"] == N_USERS
    assert metrics["split"] == "test" and metrics["filter_seen"] and metrics["depth"] == 3
    assert metrics["protocol"] == "leave-one-out" and metrics["reference"] == "genrec"
    systems = [*POSSIBLE, "genrec"]
    assert list(metrics["systems"]) == systems
    assert set(metrics["not_run"]) == {"recent-popularity", "content-kNN"}
    difference = metrics["differences"]["genrec - popularity"]["HR@3"]
    assert 0 < difference["low"] <= difference["value"] <= difference["high"]
    assert difference["p"] == pytest.approx(1 / 100)
    assert difference["p_holm"] == pytest.approx(5 / 100)  # all five differ as clearly
    assert metrics["baselines"]["item-kNN"]["chosen"]["lag_power"] is None

    per_user = pl.read_parquet(folder / "per_user.parquet")
    assert per_user.columns[:5] == ["row_id", "user_id", "system", "seed", "target_rank"]
    beyond = {f"{m}@{k}" for m in ("novelty", "popularity", "calibration") for k in (1, 3)}
    assert set(per_user.columns[5:]) == {*beyond, "history_popularity"}
    assert per_user.height == N_USERS * len(systems) and per_user["seed"].max() == 0
    for system in systems:  # every metric can be taken again from the table
        rank = per_user.filter(system=system)["target_rank"].to_numpy()
        again = gains(RelevantRanks.of_targets(rank), 3).mean()
        assert metrics["systems"][system]["NDCG@3"]["value"] == pytest.approx(again)
        bits = per_user.filter(system=system)["novelty@3"].mean()
        assert metrics["systems"][system]["novelty@3"]["value"] == pytest.approx(bits, rel=1e-6)

    test = pl.read_parquet(stage_folder(run_dir, "prepare") / "test.parquet")
    for name in POSSIBLE:
        lists = pl.read_parquet(folder / "baselines" / f"{name}.parquet")
        assert lists.columns == ["row_id", "user_id", "rank", "item_id", "item_index"]
        seen = lists.join(test, on="row_id").select(
            pl.col(SEEN).list.contains(pl.col("item_index"))
        )
        assert not seen.to_series().any()
    assert sorted(p.stem for p in (folder / "baselines").iterdir()) == sorted(POSSIBLE)
    slices = pl.read_parquet(folder / "slices.parquet")
    assert set(slices["system"].unique()) == set(systems)
    assert set(slices["metric"].unique()) == {"HR@3", "NDCG@3"}
    curves = pl.read_parquet(folder / "curves.parquet").filter(system="genrec")
    assert curves["recall"].to_list() == [0, 1, 1]
    shown = json.loads((folder / "examples.json").read_text())
    assert len(shown) == 10 and len(shown[0]["lists"]) == 2
    assert "hand-made shop" in (folder / "report.html").read_text()

    for text in ("hand-made shop, test: 40 rows, 12 items, seen items left out", "±", "NDCG@3"):
        assert text in done.stdout
    assert "item-kNN: neighbours=" in done.stdout or "item-kNN: decay=" in done.stdout
    assert "genrec − " in done.stdout
    assert "recent-popularity is left out: recent popularity needs timestamps" in done.stdout
    assert "content-kNN is left out: content-kNN needs item vectors" in done.stdout
    manifest = load_manifest(run_dir, "evaluate")
    assert set(manifest.inputs) == {"prepare", "recommend"}
    assert manifest.metrics["HR@3"] == 1
    [read] = reads(run_dir)
    hashes = load_manifest(run_dir, "prepare").outputs
    assert read["split_sha256"] == hashes["test.parquet"]["sha256"] and read["rows"] == N_USERS

    again = as_command(run_dir, "--dataset", "hand-made shop")  # complete: skipped, nothing read
    assert again.returncode == 0 and "skipped" in again.stderr and len(reads(run_dir)) == 1


def test_all_that_the_data_allow(tmp_path, evaluate):
    run = tmp_path / "run"
    prepare(run, timed=True, users=True)
    embed(run)
    recommend(run, oracle(run))
    done = evaluate(run)
    assert done.returncode == 0, done.stderr
    folder = stage_folder(run, "evaluate")
    metrics = metrics_of(folder)
    assert list(metrics["systems"]) == [*suite.FITTED, "genrec"] and metrics["not_run"] == {}
    beyond = {"coverage", "gini", "novelty", "popularity_lift", "ild", "calibration"}
    for found in metrics["systems"].values():
        assert {f"{name}@3" for name in beyond} <= set(found)
    assert set(metrics["gaps"]) == {"group"}
    assert set(metrics["gaps"]["group"]["genrec"]["HR@3"]) == {
        "value", "low", "high", "best", "worst", "p",
    }  # fmt: skip
    assert metrics["gaps"]["group"]["genrec"]["HR@3"]["value"] == 0
    families = pl.read_parquet(folder / "slices.parquet")["family"].unique()
    assert {"group", "time of the target", "history length"} <= set(families)
    assert set(load_manifest(run, "evaluate").inputs) == {"prepare", "recommend", "embed"}


def test_only_the_rows_that_were_asked_for(run_dir, evaluate):
    table = oracle(run_dir)
    asked = table.select("row_id").unique(maintain_order=True)[:11]
    without_one = table.filter(pl.col("row_id").is_in(asked["row_id"][1:].to_list()))
    recommend(run_dir, without_one, asked)
    done = evaluate(run_dir, "--baselines", "popularity")
    assert done.returncode == 0, done.stderr
    metrics = metrics_of(stage_folder(run_dir, "evaluate"))
    assert metrics["rows"] == 11 and metrics["rows_without_list"] == 1
    assert metrics["systems"]["genrec"]["HR@3"]["value"] == pytest.approx(10 / 11)
    assert "1 rows without a list" in done.stdout


def test_novelty_counts_users_not_how_often_they_came_back(run_dir, evaluate):
    data = stage_folder(run_dir, "prepare")
    train = pl.read_parquet(data / "train.parquet")
    had = {
        (user, item)
        for user, past, target in train.select(
            "user_id", "history_item_index", "target_item_index"
        ).iter_rows()
        for item in (*past, target)
    }
    users = np.bincount([item for _, item in had], minlength=N_ITEMS)
    catalog = pl.read_parquet(data / "catalog.parquet")
    catalog = catalog.with_columns(pl.col("train_count") * 5)  # everybody had them five times
    catalog.write_parquet(data / "catalog.parquet")
    path = data / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["outputs"]["catalog.parquet"]["bytes"] = (data / "catalog.parquet").stat().st_size
    path.write_text(json.dumps(manifest))
    table = oracle(run_dir)
    recommend(run_dir, table)
    assert evaluate(run_dir, "--baselines", "random").returncode == 0
    first = table.filter(rank=1)["item_index"].to_numpy()
    bits = -np.log2((users[first] + 1) / (train["user_id"].n_unique() + 1))
    found = metrics_of(stage_folder(run_dir, "evaluate"))["systems"]["genrec"]["novelty@1"]
    assert found["value"] == pytest.approx(bits.mean(), rel=1e-5)


def test_several_relevant_items_a_row(run_dir, evaluate):
    """As time-cutoff has them: every list holds the target second, and one of the others third."""
    path = stage_folder(run_dir, "prepare") / "test.parquet"
    rows, found = pl.read_parquet(path), oracle(run_dir)
    third = found.filter(rank=3).select("row_id", third="item_index")
    rows = rows.join(third, on="row_id", maintain_order="left").with_columns(
        pl.concat_list("target_item_index", "third").alias("relevant_item_index")
    )
    assert rows["third"].null_count() == 0
    rows.drop("third").write_parquet(path)
    folder = run_dir / "data" / "manifest.json"
    manifest = json.loads(folder.read_text())
    manifest["outputs"]["test.parquet"]["bytes"] = path.stat().st_size
    folder.write_text(json.dumps(manifest))
    recommend(run_dir, found)
    done = evaluate(run_dir, "--baselines", "popularity", "--ks", "2", "3")
    assert done.returncode == 0, done.stderr
    ours = metrics_of(stage_folder(run_dir, "evaluate"))["systems"]["genrec"]
    assert ours["Recall@2"]["value"] == 0.5 and ours["Recall@3"]["value"] == 1
    assert ours["MAP@3"]["value"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    per_user = pl.read_parquet(stage_folder(run_dir, "evaluate") / "per_user.parquet")
    assert per_user.filter(system="genrec")["hit_ranks"].to_list() == [[2, 3]] * N_USERS
    index = run_dir / "index.json"
    index.write_text(json.dumps({"0-00": ["<a_0>"]}))
    fails(
        evaluate(run_dir, "--sid_map", str(index), "--overwrite", "true"),
        "--sid_map is for rows with one relevant item",
    )


# Anybody's lists. ---------------------------------------------------------------------------------


def test_anybodys_lists(run_dir, tmp_path, evaluate):
    table = oracle(run_dir).select("user_id", "item_id", score=-pl.col("rank"))
    table = table.with_columns(
        item_id=pl.when(pl.int_range(pl.len()) == 0)
        .then(pl.lit("unheard-of"))
        .otherwise(pl.col("item_id"))
    )
    table.write_csv(tmp_path / "lists.csv")
    flags = ["--recommendations", str(tmp_path / "lists.csv"), "--system", "theirs"]
    done = evaluate(run_dir, *flags, "--output_dir", str(tmp_path / "out"), "--baselines", "random")
    assert done.returncode == 0, done.stderr
    metrics = metrics_of(tmp_path / "out")
    assert list(metrics["systems"]) == ["random", "theirs"] and metrics["unknown_items"] == 1
    assert metrics["systems"]["theirs"]["HR@3"]["value"] == 1
    assert set(metrics["inputs"]) == {"prepare", "recommendations 0 (lists.csv)"}
    assert (tmp_path / "out" / "report.html").exists()
    assert not stage_folder(run_dir, "evaluate").exists()
    assert [read["system"] for read in reads(run_dir)] == ["theirs"]
    refused = evaluate(run_dir, *flags, "--output_dir", str(tmp_path / "out"))
    fails(refused, "is not empty")


def test_several_files_are_training_seeds(run_dir, tmp_path, evaluate):
    paths = []
    for seed, (place, k) in enumerate([(1, 5), (2, 4), (3, 4)]):
        path = tmp_path / str(seed) / "lists.parquet"  # the same name in three folders
        path.parent.mkdir()
        oracle(run_dir, k, place).sample(fraction=1, shuffle=True, seed=0).write_parquet(path)
        paths.append(str(path))
    out = tmp_path / "out"
    done = evaluate(
        run_dir, "--recommendations", *paths, "--system", "ours", "--output_dir", str(out),
        "--baselines", "popularity",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = metrics_of(out)
    ours = metrics["systems"]["ours"]
    assert ours["HR@1"]["seeds"] == [1, 0, 0] and ours["HR@1"]["value"] == pytest.approx(1 / 3)
    assert ours["NDCG@3"]["seeds"] == pytest.approx([1, 1 / np.log2(3), 0.5])
    assert ours["HR@1"]["low"] == 0 and ours["HR@1"]["high"] > 0.6  # the seeds' spread alone
    assert metrics["systems"]["popularity"]["HR@1"]["seeds"] == [
        metrics["systems"]["popularity"]["HR@1"]["value"]
    ]
    assert metrics["depth"] == 4  # what all lists have
    assert len(metrics["inputs"]) == 4 and "ours (3 seeds)" in done.stdout
    per_user = pl.read_parquet(out / "per_user.parquet").filter(system="ours")
    places = per_user.group_by("seed", maintain_order=True).agg(pl.col("target_rank").unique())
    assert places.rows() == [(0, [1]), (1, [2]), (2, [3])]


def test_lists_of_the_validation_split(run_dir, tmp_path, evaluate):
    path, out = tmp_path / "lists.parquet", tmp_path / "out"
    oracle(run_dir, split="valid").write_parquet(path)
    flags = ["--recommendations", str(path), "--output_dir", str(out), "--split", "valid"]
    fails(evaluate(run_dir, *flags, "--fit_on", "train+valid"), "holds the validation targets")
    # Names are anybody's: markup in them is text.
    named = ["--system", "ours [/v2]", "--dataset", "shop [bold]"]
    done = evaluate(run_dir, *flags, "--baselines", "popularity", *named)
    assert done.returncode == 0, done.stderr
    assert "ours [/v2]" in done.stdout and "shop [bold], valid" in done.stdout
    assert metrics_of(out)["split"] == "valid" and reads(run_dir) == []


def test_missing_and_wrong_columns(run_dir, tmp_path, evaluate):
    path = tmp_path / "lists.parquet"
    oracle(run_dir).rename({"rank": "position"}).write_parquet(path)
    flags = ["--recommendations", str(path), "--output_dir", str(tmp_path / "out")]
    fails(evaluate(run_dir, *flags), "lack the columns ['rank or score']")
    fails(evaluate(run_dir, "--recommendations", str(path)), "belong together")
    fails(evaluate(run_dir, "--output_dir", str(tmp_path / "out")), "belong together")
    assert not (tmp_path / "out").exists()


# Semantic ids shared by items. --------------------------------------------------------------------


def test_shared_semantic_ids(run_dir, tmp_path, evaluate):
    recommend(run_dir, oracle(run_dir))
    index = tmp_path / "index.json"
    # Two items a SID.
    sids = {f"0-{i:02}": [f"<a_{i // 2}>", "<b_0>"] for i in range(N_ITEMS)}
    index.write_text(json.dumps({"someone else's": ["<a_0>"]}))
    fails(evaluate(run_dir, "--sid_map", str(index)), "knows none of the 12 item ids")
    assert not list(tmp_path.glob("baselines-cache/*"))  # refused before any long work
    index.write_text(json.dumps(sids))
    done = evaluate(run_dir, "--sid_map", str(index), "--baselines", "popularity")
    assert done.returncode == 0, done.stderr
    ours = metrics_of(stage_folder(run_dir, "evaluate"))["systems"]["genrec"]
    assert ours["SID-credit@3"]["value"] == 0.5 and ours["HR@3"]["value"] == 1
    assert "sid_map" in load_manifest(run_dir, "evaluate").inputs
    fails(evaluate(run_dir, "--sid_map", str(tmp_path / "nothing.json")), "nothing.json")


# Baselines and their cache. -----------------------------------------------------------------------


def test_the_second_evaluation_takes_the_baselines_from_the_cache(run_dir, evaluate, monkeypatch):
    recommend(run_dir, oracle(run_dir))
    assert evaluate(run_dir).returncode == 0
    first = metrics_of(stage_folder(run_dir, "evaluate"))
    fitted = suite.FITTED
    refusing = dict.fromkeys(fitted, lambda *_: pytest.fail("fitted again"))
    refusing |= {n: fitted[n] for n in first["not_run"]}
    monkeypatch.setattr(suite, "FITTED", refusing)
    done = evaluate(run_dir, "--overwrite", "true")
    assert done.returncode == 0, done.stderr
    second = metrics_of(stage_folder(run_dir, "evaluate"))
    assert second["systems"] == first["systems"] and second["baselines"] == first["baselines"]
    assert (run_dir / "evaluation.old-1" / "metrics.json").exists()
    # Another run on the same split, beside it, shares them; another cache folder doesn't.
    prepare(run_dir.parent / "sibling")
    recommend(run_dir.parent / "sibling", oracle(run_dir))
    assert evaluate(run_dir.parent / "sibling", "--seed", "0").returncode == 0
    with pytest.raises(pytest.fail.Exception, match="fitted again"):
        evaluate(run_dir, "--overwrite", "true", "--cache_dir", str(run_dir / "elsewhere"))


def test_trained_baselines_join_once_they_are_cached(run_dir, evaluate, monkeypatch, caplog):
    tiny = SequentialSettings(dim=8, layers=1, heads=1, max_epochs=1, patience=1)
    settings = {"SASRec": tiny, "BERT4Rec": replace(tiny, causal=False)}
    monkeypatch.setattr(SequentialSettings, "of", classmethod(lambda _, name: settings[name]))
    recommend(run_dir, oracle(run_dir))
    few = ["--baselines", "random", "--training_seeds", "4", "5", "--overwrite", "true"]
    with caplog.at_level("INFO"):
        done = evaluate(run_dir, *few)
    assert done.returncode == 0, done.stderr
    folder = stage_folder(run_dir, "evaluate")
    assert list(metrics_of(folder)["systems"]) == ["random", "genrec"]
    place = str(run_dir.parent / "baselines-cache")
    assert any("SASRec is not trained in " + place in line for line in caplog.messages)
    rows = pl.read_parquet(stage_folder(run_dir, "prepare") / "test.parquet")
    data = suite.load_split_data(run_dir, rows, "test", K, True)
    suite.baseline("SASRec", data, suite.cache_folder(run_dir), 0, [4, 5])
    done = evaluate(run_dir, *few)
    assert done.returncode == 0, done.stderr
    metrics = metrics_of(folder)
    assert list(metrics["systems"]) == ["random", "SASRec", "genrec"]
    assert len(metrics["systems"]["SASRec"]["HR@3"]["seeds"]) == 2
    assert "SASRec (2 seeds)" in done.stdout
    assert sorted(p.name for p in (folder / "baselines").iterdir()) == [
        "SASRec-seed-0.parquet", "SASRec-seed-1.parquet", "random.parquet",
    ]  # fmt: skip
    refused = evaluate(
        run_dir, "--baselines", "SASRec", "random", "--fit_on", "train+valid", "--overwrite", "true"
    )
    assert refused.returncode == 0 and "SASRec is left out: SASRec learns from" in refused.stdout
    assert set(metrics_of(folder)["not_run"]) == {"SASRec"}


# What is refused. ---------------------------------------------------------------------------------


def test_one_seen_rule_per_table(run_dir, evaluate):
    recommend(run_dir, oracle(run_dir), filter_seen=False)
    fails(
        evaluate(run_dir),
        "filter_seen=True here, but the recommend stage ran with filter_seen=False",
    )
    fails(evaluate(run_dir, "--split", "valid"), "a table has one rule")
    fails(evaluate(run_dir, "--filter_seen", "false", "--ks", "5"), "made lists of k=3")
    assert reads(run_dir) == []
    done = evaluate(run_dir, "--filter_seen", "false", "--baselines", "popularity")
    assert done.returncode == 0 and "seen items allowed" in done.stdout


def test_baselines_may_not_learn_from_the_targets(run_dir, evaluate):
    recommend(run_dir, oracle(run_dir, split="valid"), split="valid")
    for flags in ((), ("--split", "valid")):
        refused = evaluate(run_dir, "--fit_on", "train+valid", *flags)
        fails(refused, "fit_on=train+valid holds the validation targets; use fit_on=train")
    assert not stage_folder(run_dir, "evaluate").exists()
    assert evaluate(run_dir, "--baselines", "popularity").returncode == 0


def test_lists_out_of_a_part_of_the_catalogue_stand_alone(run_dir, tmp_path, evaluate):
    deny = tmp_path / "deny.txt"
    deny.write_text("0-00\n0-01\n0-02\n")
    table = oracle(run_dir).filter(pl.col("item_index") > 2)
    rank = pl.int_range(1, pl.len() + 1, dtype=pl.Int32).over("row_id").alias("rank")
    table = table.with_columns(rank)
    recommend(run_dir, table, deny=str(deny))
    done = evaluate(run_dir, "--baselines", "popularity", "EASE")
    assert done.returncode == 0, done.stderr
    folder = stage_folder(run_dir, "evaluate")
    metrics = metrics_of(folder)
    assert list(metrics["systems"]) == ["genrec"] and metrics["differences"] == {}
    sha256 = load_manifest(run_dir, "recommend").inputs["deny"]
    assert metrics["restricted"] == {"deny": sha256, "items": 9}
    reason = "left out: the lists were restricted to 9 of 12 items (recommend --deny)"
    assert f"popularity, EASE are {reason}" in done.stdout
    assert "40 rows, 9 of 12 items, seen items left out" in done.stdout
    assert not (folder / "baselines").exists() and "kNN count" not in done.stdout
    page = (folder / "report.html").read_text()
    assert "9 of 12 items ranked" in page and "all 12 items" not in page
    assert "9 of 12 items of the catalogue (what recommend&#39;s deny-list left)" in page
    assert reason in page
    deny.unlink()  # how many it named can't be told any more
    assert evaluate(run_dir, "--overwrite", "true").returncode == 0
    assert metrics_of(folder)["restricted"] == {"deny": sha256, "items": None}
    assert "some of 12 items ranked" in (folder / "report.html").read_text()
    recommend(run_dir, oracle(run_dir))
    assert evaluate(run_dir, "--baselines", "random", "--overwrite", "true").returncode == 0
    assert metrics_of(folder)["restricted"] is None
    assert "all 12 items ranked" in (folder / "report.html").read_text()


def test_lists_that_break_the_seen_rule(run_dir, evaluate):
    test = pl.read_parquet(stage_folder(run_dir, "prepare") / "test.parquet")
    catalog = pl.read_parquet(stage_folder(run_dir, "prepare") / "catalog.parquet")
    seen = test.select("row_id", pl.col(SEEN).list.first().alias("item_index"), rank=1)
    recommend(run_dir, seen.join(catalog, on="item_index"))
    fails(evaluate(run_dir), "40 of 40 lists hold items the user has seen already")


def test_recommendations_of_another_dataset(run_dir, tmp_path, evaluate):
    prepare(tmp_path / "other", seed=1)
    recommend(run_dir, oracle(tmp_path / "other"))
    fails(evaluate(run_dir), "made for another dataset")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--baselines", "bert4rec"], "baselines='bert4rec' is not known"),
        (["--fit_on", "test"], "fit_on='test' is not known"),
        (["--split", "train"], "split='train' is not known"),
        (["--ks", "0"], "ks=[0] must be"),
        (["--ks", "5", "5"], "ks=[5, 5] must be distinct"),
        (["--samples", "0"], "samples=0 must be at least 1"),
        (["--permutations", "0"], "permutations=0 must be at least 1"),
        (["--training_seeds", "1", "1"], "training_seeds=[1, 1] must be distinct"),
        (["--system", "random"], "is the name of a baseline"),
        (["--system", "SASRec"], "is the name of a baseline"),
        ([], "stage 'prepare' has not finished"),
    ],
)
def test_settings_are_checked_before_anything_is_read(tmp_path, evaluate, flags, message):
    fails(evaluate(tmp_path / "nothing", *flags), message)


def test_shipped_configs_hold_known_settings(recipe):
    paths = sorted((ROOT / "recipes/configs").glob("*/evaluate.yaml"))
    assert len(paths) >= 3
    for path in paths:
        recipe.EvaluateArgs(**yaml.safe_load(path.read_text()))
        assert "genrec evaluate --config" in path.read_text().splitlines()[0]


def test_list_depth_is_what_all_files_have(recipe):
    ranked = pl.DataFrame({"row_id": ["a", "a", "b"], "rank": [1, 2, 1]})
    scored = pl.DataFrame({"row_id": ["a"] * 5 + ["b"], "score": [0.5] * 6})
    assert recipe.list_depth([ranked], [1]) == 2
    assert recipe.list_depth([scored], [1]) == 5
    assert recipe.list_depth([ranked, scored], [1]) == 2
    assert recipe.list_depth([scored], [10]) == 10  # short lists are lists with misses
    long = pl.DataFrame({"row_id": ["a"] * 300, "rank": range(1, 301)})
    assert recipe.list_depth([long], [10]) == recipe.MAX_DEPTH
