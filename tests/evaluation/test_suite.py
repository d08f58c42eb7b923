"""All baselines on one split: the rules they share, and the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.artifacts import Stage, read_json, stage_folder, write_json, write_parquet
from genrec.columns import SEEN
from genrec.data.splits import content_sha256, leave_one_out
from genrec.data.time_splits import time_cutoff
from genrec.evaluation import linear, suite
from genrec.evaluation import sequential as sequential_module
from genrec.evaluation.baselines import UnfitData, item_counts
from genrec.evaluation.recency import training_events
from genrec.evaluation.sequential import SequentialSettings
from genrec.evaluation.suite import (
    BASELINES,
    FIT_ON,
    FITTED,
    TRAINED,
    SplitData,
    baseline,
    cache_folder,
    load_split_data,
    trained_seeds,
)
from genrec.metrics import check_lists

N_ITEMS, N_USERS, K = 14, 40, 4
DAY = 86_400
TINY = SequentialSettings(
    dim=8, layers=1, heads=1, learning_rate=1e-2, batch_size=32, max_epochs=2, patience=1
)


def log_of(seed: int = 0, n_items: int = N_ITEMS) -> pl.DataFrame:
    """A log with times; the last two items have no interaction."""
    rng = np.random.default_rng(seed)
    length = rng.integers(4, 9, N_USERS)
    items = np.concatenate([rng.choice(n_items - 2, n, replace=False) for n in length])
    times = np.concatenate([np.sort(rng.integers(0, 400 * DAY, n)) for n in length])
    return pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(N_USERS), length),
            "item_index": items.astype(np.int32),
            "timestamp": times,
            "position": np.concatenate([np.arange(n) for n in length]).astype(np.int32),
        }
    )


def split_data(seed: int = 0, **changes) -> SplitData:
    log = log_of(seed)
    splits = leave_one_out(log, N_ITEMS)
    data = SplitData(
        train=splits.train,
        valid=splits.valid,
        rows=splits.test,
        interactions=log,
        n_items=N_ITEMS,
        vectors=np.random.default_rng(seed).normal(size=(N_ITEMS, 5)),
        filter_seen=True,
        fit_on="train",
        k=K,
        content_hash=splits.sha256(),
    )
    return replace(data, **changes)


@pytest.fixture
def tiny_transformers(monkeypatch) -> None:
    """Two epochs of a very small model."""
    settings = {"SASRec": TINY, "BERT4Rec": replace(TINY, causal=False)}
    monkeypatch.setattr(SequentialSettings, "of", classmethod(lambda _, name: settings[name]))


def is_cached(
    name: str, data: SplitData, cache: Path, seed: int = 0, training_seeds: list[int] | None = None
) -> bool:
    """Whether `baseline` would find its lists in the cache."""
    folder = suite._folder(name, data, cache, seed, training_seeds or [0])
    return (folder / "settings.json").exists()


def refuse_to_fit(monkeypatch) -> None:
    """From here on, only the cache can answer."""
    failing = dict.fromkeys(FITTED, lambda *_: pytest.fail("fitted again"))
    monkeypatch.setattr(suite, "FITTED", failing)
    monkeypatch.setattr(suite, "_train", lambda *_: pytest.fail("trained again"))


# Lists. -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filter_seen", [True, False])
@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_makes_whole_lists_under_the_rule(
    tmp_path, tiny_transformers, name, filter_seen
):
    data = split_data(filter_seen=filter_seen)
    found = baseline(name, data, tmp_path, training_seeds=[0, 3])
    assert len(found.lists) == (2 if name in TRAINED else 1)
    for lists in found.lists:
        assert lists.shape == (N_USERS, K) and np.issubdtype(lists.dtype, np.integer)
        check_lists(lists)
        assert ((lists >= 0) & (lists < N_ITEMS)).all()
        again = [
            bool(set(row.tolist()) & set(seen))
            for row, seen in zip(lists, data.rows[SEEN].to_list(), strict=True)
        ]
        assert not any(again) if filter_seen else any(again)
    assert found.settings["seconds"] >= 0
    if name not in ("random", "popularity"):
        assert found.settings["valid_ndcg@10"] == max(t["ndcg"] for t in found.settings["trials"])
        assert found.settings["description"]
    if "kNN" in name:  # repeats may be right answers where they are allowed
        assert ("self_weight" in found.settings["grid"]) == (not filter_seen)


def test_seeds_of_training_differ_and_are_tuned_once(tmp_path, tiny_transformers):
    found = baseline("SASRec", split_data(), tmp_path, training_seeds=[0, 3])
    assert (found.lists[0] != found.lists[1]).any()
    assert [t["settings"]["dropout"] for t in found.settings["trials"]] == suite.DROPOUTS
    assert found.settings["chosen"]["dropout"] in suite.DROPOUTS
    assert len(found.settings["curves"]) == len(found.settings["stopped"]) == 2
    assert "full softmax, 2 training seeds" in found.settings["description"]
    assert trained_seeds("SASRec", split_data(), tmp_path) == [0, 3]
    assert trained_seeds("BERT4Rec", split_data(), tmp_path) is None
    assert trained_seeds("SASRec", split_data(filter_seen=False), tmp_path) is None
    states = sorted(p.name for p in tmp_path.glob("*/training*/*.pt"))
    assert len(states) == 3  # two dropouts of seed 0, the better one of seed 3
    # One more seed trains that seed alone.
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/training*/*.pt")}
    more = baseline("SASRec", split_data(), tmp_path, training_seeds=[0, 3, 4])
    assert (more.lists[0] == found.lists[0]).all() and (more.lists[1] == found.lists[1]).all()
    assert len(list(tmp_path.glob("*/training*/*.pt"))) == 4
    assert all(p.stat().st_mtime_ns == then for p, then in before.items())


def test_fit_on_valid_too_counts_validation_targets_but_tunes_without_them(tmp_path):
    data = split_data()
    both = replace(data, fit_on="train+valid")
    counts = item_counts(both.fit_rows, N_ITEMS) - item_counts(data.fit_rows, N_ITEMS)
    target = data.valid["target_item_index"].to_numpy()
    assert counts.tolist() == np.bincount(target, minlength=N_ITEMS).tolist()
    for name in ("popularity", "recent-popularity", "item-kNN", "EASE"):
        one, two = (baseline(name, d, tmp_path) for d in (data, both))
        assert (one.lists[0] != two.lists[0]).any(), name
        assert one.settings.get("chosen") == two.settings.get("chosen")
        assert one.settings.get("trials") == two.settings.get("trials")


def test_fit_on_valid_too_counts_every_relevant_item_of_a_row(tmp_path):
    """As time-cutoff has them: the validation period's items of a user, the target first."""
    log = log_of()
    moment = int(log["timestamp"].quantile(0.5)), int(log["timestamp"].quantile(0.8))
    splits = time_cutoff(log, N_ITEMS, *moment)
    data = split_data(train=splits.train, valid=splits.valid, rows=splits.test)
    relevant = data.valid["relevant_item_index"]
    assert relevant.list.len().max() > 1
    both = replace(data, fit_on="train+valid")
    counts = item_counts(both.fit_rows, N_ITEMS) - item_counts(data.fit_rows, N_ITEMS)
    held = relevant.explode()
    assert counts.tolist() == np.bincount(held, minlength=N_ITEMS).tolist()
    rows = both.fit_rows[len(data.train) :]
    assert rows["row_id"].equals(data.valid["row_id"])
    for row, own in zip(rows.iter_rows(named=True), data.valid.iter_rows(named=True), strict=True):
        sequence = [*row["history_item_index"], row["target_item_index"]]
        assert sequence == own["history_item_index"] + own["relevant_item_index"]
    # The clock of recent popularity goes up to the end of the validation period.
    seconds, items = training_events(both.fit_rows, log)
    period = log.filter(pl.col("timestamp").is_between(*moment, closed="left"))
    of_valid = period.join(data.valid.select("user_id"), on="user_id", how="semi")
    assert sorted(seconds[seconds >= moment[0]]) == sorted(of_valid["timestamp"])
    assert len(items) == len(seconds) and of_valid.height == len(held)
    for name in ("popularity", "recent-popularity", "item-kNN", "EASE"):
        one, two = (baseline(name, d, tmp_path) for d in (data, both))
        assert one.settings.get("chosen") == two.settings.get("chosen")
        if name == "popularity":
            assert (one.lists[0] != two.lists[0]).any()


def test_settings_are_tuned_once_for_all_rows_and_lengths(tmp_path, monkeypatch):
    data = split_data()
    names = ("recent-popularity", "item-kNN", "sequential-kNN", "content-kNN", "EASE")
    valid = replace(data, rows=data.valid, k=10)
    made = {name: baseline(name, valid, tmp_path).settings for name in names}
    with monkeypatch.context() as patch:
        for tune in ("tune_window", "tune_knn", "tune_content_knn", "tune_ease"):
            patch.setattr(suite, tune, lambda *_, **__: pytest.fail("tuned again"))
        for other in (
            data,
            replace(data, rows=data.rows[:7], k=3),
            replace(data, fit_on=FIT_ON[1]),
        ):
            for name in names:
                found = baseline(name, other, tmp_path)
                assert found.lists[0].shape == (other.rows.height, other.k)
                for key in ("chosen", "trials", "at_grid_edge", "description"):
                    assert found.settings[key] == made[name][key]
    # The lists are those of settings that were tuned for them alone.
    for name in names:
        alone = baseline(name, data, tmp_path / "other").lists[0]
        assert (baseline(name, data, tmp_path).lists[0] == alone).all(), name


@pytest.mark.parametrize("change", ["rule", "seed", "hash", "vectors"])
def test_other_data_or_rules_are_tuned_anew(tmp_path, monkeypatch, change):
    data, calls, tune = split_data(), [], suite.tune_content_knn

    def counted(*arguments, **more):
        calls.append(1)
        return tune(*arguments, **more)

    monkeypatch.setattr(suite, "tune_content_knn", counted)
    baseline("content-kNN", data, tmp_path)
    other = CHANGES[change](data) if change in CHANGES else data
    baseline("content-kNN", other, tmp_path, seed=int(change == "seed"))
    assert len(calls) == 2


def test_neighbours_are_compared_once(tmp_path, monkeypatch):
    calls, nearest = [], suite.nearest_items

    def counted(*arguments):
        calls.append(1)
        return nearest(*arguments)

    monkeypatch.setattr(suite, "nearest_items", counted)
    monkeypatch.setattr("genrec.evaluation.content.nearest_items", counted)
    baseline("content-kNN", split_data(), tmp_path)
    assert len(calls) == 1


def test_a_value_at_the_edge_of_its_grid_is_said_so():
    trials = [{"settings": {}, "ndcg": 0.1}]
    grid = {"dropout": [0.5, 0.3], "decay": [0.2, 0.4, 0.6], "power": [1, 2, 3]}
    chosen = {"dropout": 0.3, "decay": 0.4, "power": 3}
    assert suite._tuned(chosen, "", grid, trials)["at_grid_edge"] == ["dropout", "power"]


# What these data do not allow. --------------------------------------------------------------------


def refused(name: str, data: SplitData, cache: Path, message: str, unfit: bool = True) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        baseline(name, data, cache)
    # What the data do not allow is left out of a table; every other mistake ends it.
    assert isinstance(caught.value, UnfitData) == unfit
    assert not is_cached(name, data, cache)


def test_baselines_that_cannot_run_say_why(tmp_path, monkeypatch):
    data = split_data()
    no_times = {
        part: getattr(data, part).with_columns(pl.lit(None, pl.Int64).alias("target_timestamp"))
        for part in ("train", "valid", "rows")
    }
    refused("recent-popularity", replace(data, **no_times), tmp_path, "needs timestamps")
    refused("content-kNN", replace(data, vectors=None), tmp_path, "run the embed stage first")
    refused(
        "perceptron",
        data,
        tmp_path,
        "baseline 'perceptron' is not known; choose from random",
        False,
    )
    for name in TRAINED:
        refused(name, replace(data, fit_on="train+valid"), tmp_path, "its own validation targets")
    monkeypatch.setattr(linear, "MAX_ITEMS", N_ITEMS - 1)
    refused("EASE", data, tmp_path, f"meant for at most {N_ITEMS - 1} items")
    nothing = replace(data, valid=data.valid[:0])
    for name in [*FITTED, *TRAINED]:
        if name not in ("random", "popularity"):
            with pytest.raises(ValueError, match="validation rows, and there are none"):
                baseline(name, nothing, tmp_path)


# Cache. -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASELINES)
def test_the_second_call_comes_from_the_cache(tmp_path, tiny_transformers, monkeypatch, name):
    data, seeds = split_data(), [5, 1]
    assert not is_cached(name, data, tmp_path, 7, seeds)
    first = baseline(name, data, tmp_path, 7, seeds)
    assert is_cached(name, data, tmp_path, 7, seeds)
    refuse_to_fit(monkeypatch)
    second = baseline(name, split_data(), tmp_path, 7, seeds)
    assert len(first.lists) == len(second.lists)
    for one, two in zip(first.lists, second.lists, strict=True):
        assert one.dtype == two.dtype and (one == two).all()
    plain = tmp_path / "settings.json"
    write_json(plain, first.settings)
    assert second.settings == read_json(plain)  # what metrics.json will say is the same


def test_empty_slots_and_lists_of_one_survive_the_cache(tmp_path):
    for k in (1, N_ITEMS):
        data = split_data(k=k)
        one, two = (baseline("popularity", data, tmp_path).lists[0] for _ in range(2))
        assert (one == two).all() and one.shape == (N_USERS, k)
    assert (one == -1).any()  # the catalogue is used up


CHANGES = {
    "rows": lambda data: replace(data, rows=data.rows[1:]),
    "order of rows": lambda data: replace(data, rows=data.rows[::-1]),
    "split": lambda data: replace(data, rows=data.valid),
    "rule": lambda data: replace(data, filter_seen=False),
    "depth": lambda data: replace(data, k=K + 1),
    "fit_on": lambda data: replace(data, fit_on="train+valid"),
    "vectors": lambda data: replace(data, vectors=data.vectors[::-1]),
    "hash": lambda data: replace(data, content_hash="0" * 64),
    "catalogue": lambda data: replace(
        data, n_items=N_ITEMS + 1, vectors=np.append(data.vectors, data.vectors[:1], axis=0)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_makes_other_lists_is_a_cache_miss(tmp_path, change):
    data = split_data()
    baseline("content-kNN", data, tmp_path)
    other = CHANGES[change](data)
    assert is_cached("content-kNN", data, tmp_path)
    assert not is_cached("content-kNN", other, tmp_path)
    found = baseline("content-kNN", other, tmp_path).lists[0]
    assert found.shape == (other.rows.height, other.k)
    assert is_cached("content-kNN", data, tmp_path) and is_cached("content-kNN", other, tmp_path)
    assert not is_cached("content-kNN", data, tmp_path, seed=1)
    assert not is_cached("item-kNN", data, tmp_path)


def test_only_content_knn_depends_on_vectors(tmp_path):
    data = split_data()
    baseline("popularity", data, tmp_path)
    assert is_cached("popularity", replace(data, vectors=None), tmp_path)


def test_other_training_seeds_are_a_cache_miss_but_not_for_fitted_baselines(
    tmp_path, tiny_transformers
):
    data = split_data()
    for name in ("SASRec", "popularity"):
        baseline(name, data, tmp_path, training_seeds=[0])
    assert not is_cached("SASRec", data, tmp_path, training_seeds=[0, 1])
    assert is_cached("popularity", data, tmp_path, training_seeds=[0, 1])


def test_a_killed_run_leaves_nothing_that_is_taken_for_whole(tmp_path, monkeypatch):
    data = split_data()
    whole = baseline("popularity", data, tmp_path / "other")

    def killed(*_):
        raise KeyboardInterrupt

    # After the lists, before the settings that make the entry whole.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(suite, "write_json", killed)
        baseline("popularity", data, tmp_path)
    [left] = tmp_path.glob("*/popularity-*/lists-0.parquet")
    assert not is_cached("popularity", data, tmp_path)
    write_parquet(left, pl.DataFrame({"row_id": ["nonsense"]}))  # whatever is there is replaced
    again = baseline("popularity", data, tmp_path)
    assert (again.lists[0] == whole.lists[0]).all() and is_cached("popularity", data, tmp_path)


def test_training_goes_on_where_it_was_killed(tmp_path, tiny_transformers, monkeypatch):
    data = split_data()
    whole = baseline("BERT4Rec", data, tmp_path / "other", training_seeds=[0, 1])
    train, calls = sequential_module.train_sequential, []

    def killed(*arguments, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sequential_module, "train_sequential", killed)
        baseline("BERT4Rec", data, tmp_path, training_seeds=[0, 1])
    states = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/training*/*.pt")}
    assert len(states) == 2  # both dropouts of the first seed
    again = baseline("BERT4Rec", data, tmp_path, training_seeds=[0, 1])
    assert all(p.stat().st_mtime_ns == then for p, then in states.items())
    for one, two in zip(whole.lists, again.lists, strict=True):
        assert (one == two).all()


def test_another_version_of_training_leaves_old_weights_alone(
    tmp_path, tiny_transformers, monkeypatch
):
    data = split_data()
    baseline("SASRec", data, tmp_path, training_seeds=[0])
    old = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/training*/*")}
    for module in (suite, sequential_module):
        monkeypatch.setattr(module, "TRAINING_VERSION", suite.TRAINING_VERSION + 1)
    assert not is_cached("SASRec", data, tmp_path)
    assert trained_seeds("SASRec", data, tmp_path) is None
    baseline("SASRec", data, tmp_path, training_seeds=[0])
    assert len(list(tmp_path.glob("*/training*/*"))) == 2 * len(old)
    assert all(p.stat().st_mtime_ns == then for p, then in old.items())


def test_rules_for_seen_items_do_not_share_a_training_state(tmp_path, tiny_transformers):
    """Early stopping looks at lists made under the rule."""
    data = split_data()
    baseline("SASRec", data, tmp_path)
    allowed = replace(data, filter_seen=False)
    alone = baseline("SASRec", allowed, tmp_path / "alone")
    behind = baseline("SASRec", allowed, tmp_path)
    assert behind.settings["trials"] == alone.settings["trials"]
    assert (behind.lists[0] == alone.lists[0]).all()


def test_rows_of_another_split_in_the_cache_are_refused(tmp_path):
    data = split_data()
    baseline("popularity", data, tmp_path)
    [path] = tmp_path.glob("*/popularity-*/lists-0.parquet")
    write_parquet(path, pl.read_parquet(path)[::-1])
    with pytest.raises(ValueError, match="holds other rows than the split; delete the cache") as e:
        baseline("popularity", data, tmp_path)
    assert not isinstance(e.value, UnfitData)  # a damaged cache is not passed over in silence


@pytest.mark.parametrize("name", [n for n in BASELINES if n not in TRAINED])
def test_longer_lists_begin_with_the_shorter_ones(tmp_path, name):
    short, long = (baseline(name, split_data(k=k), tmp_path).lists[0] for k in (2, 7))
    assert (long[:, :2] == short).all()


def test_settings_are_chosen_on_a_sample_of_very_many_rows(tmp_path, monkeypatch):
    data = split_data()
    assert data.tuning_rows(0) is data.valid
    monkeypatch.setattr(suite, "MAX_TUNING_ROWS", 10)
    sample = data.tuning_rows(0)
    assert sample.height == 10 and sample.equals(data.tuning_rows(0))
    assert not sample.equals(data.tuning_rows(1))
    assert sample.join(data.valid, on="row_id", how="semi").height == 10
    for name in ("recent-popularity", "item-kNN", "content-kNN", "EASE"):
        assert baseline(name, data, tmp_path).lists[0].shape == (N_USERS, K)


# Reading a run. -----------------------------------------------------------------------------------


def run_of(folder: Path, with_hash: bool = True, vectors: np.ndarray | None = None) -> Path:
    stage = Stage(folder, "prepare", {})
    stage.is_done()
    data = split_data()
    write_parquet(stage.folder / "catalog.parquet", pl.DataFrame({"item_index": range(N_ITEMS)}))
    write_parquet(stage.folder / "interactions.parquet", data.interactions)
    for name, table in (("train", data.train), ("valid", data.valid), ("test", data.rows)):
        write_parquet(stage.folder / f"{name}.parquet", table)
    split = {"protocol": "leave-one-out"} | (
        {"content_sha256": data.content_hash} if with_hash else {}
    )
    write_json(stage.folder / "split.json", split)
    stage.finish(rows=0)
    if vectors is not None:
        stage = Stage(folder, "embed", {}, ["prepare"])
        stage.is_done()
        np.save(stage.folder / "item_embeddings.npy", vectors)
        stage.finish(rows=len(vectors))
    return folder


def test_what_baselines_see_of_a_run(tmp_path):
    expected = split_data()
    run = run_of(tmp_path / "run", vectors=expected.vectors)
    found = load_split_data(run, expected.rows, "test", K, True)
    for name in ("train", "valid", "rows", "interactions"):
        assert getattr(found, name).equals(getattr(expected, name)), name
    assert (found.vectors == expected.vectors).all() and found.n_items == N_ITEMS
    assert (found.content_hash, found.k, found.fit_on) == (expected.content_hash, K, "train")
    assert load_split_data(run_of(tmp_path / "b"), expected.rows, "test", K, True).vectors is None


def test_one_cache_for_all_runs_where_the_environment_names_it(tmp_path, monkeypatch):
    monkeypatch.delenv("GENREC_CACHE", raising=False)
    assert cache_folder(tmp_path / "run") == tmp_path.resolve() / "baselines-cache"
    assert cache_folder(tmp_path / "run", "elsewhere") == Path("elsewhere")
    monkeypatch.setenv("GENREC_CACHE", str(tmp_path / "shared"))
    assert cache_folder(tmp_path / "run") == tmp_path / "shared"
    assert cache_folder(tmp_path / "beauty" / "seed-0") == tmp_path / "shared"
    assert cache_folder(tmp_path / "run", "elsewhere") == Path("elsewhere")


def test_runs_without_a_kept_hash_get_one_of_their_rows(tmp_path):
    rows = split_data().rows
    run = run_of(tmp_path / "run", with_hash=False)
    found = load_split_data(run, rows, "test", K, True).content_hash
    data = stage_folder(run, "prepare")
    tables = {n: pl.read_parquet(data / f"{n}.parquet") for n in ("train", "valid", "test")}
    assert found == content_sha256(tables)
    assert load_split_data(run, rows[1:], "test", K, True).content_hash != found
