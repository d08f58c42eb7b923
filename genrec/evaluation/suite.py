"""All baselines by name, on one split, under one rule, cached by the hash of the split.

Every baseline is fitted on the same rows, tuned on the validation rows and asked for lists under
the same rule for seen items. What it made is kept in a cache folder, so that many runs on one
dataset share it:

    <cache>/<split hash>/<name>-<hash>/lists-<seed>.parquet, settings.json (written last)
    <cache>/<split hash>/<name>-tuned-<hash>.json   chosen settings, for any rows and list length
    <cache>/<split hash>/training-<n>-items-v<version>/   SASRec's and BERT4Rec's states: a killed
        training goes on from its own, and lists of trained models cost seconds

Longer than other modules: what a baseline is fitted on, tuned on and cached under has to be the
same for all, and is seen to be so in one place.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.artifacts import (
    load_manifest,
    read_json,
    sha256_bytes,
    sha256_json,
    stage_folder,
    write_json,
    write_parquet,
)
from genrec.columns import (
    HISTORY,
    ITEM_INDEX,
    RELEVANT,
    ROW_ID,
    SEEN,
    TARGET,
    TARGET_TIME,
    TIMESTAMP,
    USER_ID,
)
from genrec.data.splits import content_sha256
from genrec.embedding.vectors import content_vectors
from genrec.evaluation.baselines import (
    TRAINING_VERSION,
    UnfitData,
    item_counts,
    popularity,
    popularity_order,
    random_lists,
)
from genrec.evaluation.content import (
    CONTENT_KNN_GRID,
    ContentSettings,
    nearest_items,
    tune_content_knn,
)
from genrec.evaluation.knn import (
    ITEM_KNN_GRID,
    SELF_WEIGHTS,
    SEQUENTIAL_KNN_GRID,
    ItemKNN,
    KNNSettings,
    tune_knn,
)
from genrec.evaluation.linear import (
    EASE_GRID,
    EaseSettings,
    ease_weights,
    tune_ease,
    user_item_matrix,
)
from genrec.evaluation.profiles import recommend_by_similarity
from genrec.evaluation.recency import (
    WINDOWS_DAYS,
    WindowSettings,
    recent_popularity,
    training_events,
    tune_window,
)
from genrec.item_lists import ItemLists, no_items

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.integer]

FIT_ON = ("train", "train+valid")
# Raise it when a change makes other lists: cached ones are not used any more. For what SASRec and
# BERT4Rec learn there is `TRAINING_VERSION`.
VERSION = 3
MAX_TUNING_ROWS = 50_000  # validation rows that settings are chosen on: a seeded sample of more
LISTS = "items"

# Full-softmax transformers are tuned alike: the same number of trials, all else the same. (Not as
# much as the kNNs, whose trials cost seconds; an hour of training each allows no more.)
DROPOUTS = [0.5, 0.3]
TRAINED = ("SASRec", "BERT4Rec")


@dataclass(frozen=True)
class SplitData:
    """What a baseline may see.

    Attributes:
        train: rows that the model was trained on.
        valid: rows for choosing settings.
        rows: rows that lists are wanted for.
        interactions: the cleaned log, for times.
        n_items: size of the catalogue.
        vectors: item vectors without behaviour, for content-kNN, or None. ``# (n_items, dim)``
        filter_seen: leave out what a row has seen.
        fit_on: "train", or "train+valid" for the counts and neighbours that lists are made from.
        k: list length.
        content_hash: hash of the split's content.
    """

    train: pl.DataFrame
    valid: pl.DataFrame
    rows: pl.DataFrame
    interactions: pl.DataFrame
    n_items: int
    vectors: npt.NDArray | None
    filter_seen: bool
    fit_on: str
    k: int
    content_hash: str

    def seen(self, table: pl.DataFrame) -> ItemLists:
        """What must not be recommended, per row of `table`."""
        return ItemLists.from_column(table[SEEN]) if self.filter_seen else no_items(len(table))

    @property
    def fit_rows(self) -> pl.DataFrame:
        """Rows that final fits use. Settings are always chosen with `train` alone.

        A validation row with several relevant items is one that supervises all of them, in order.
        """
        if self.fit_on == "train":
            return self.train
        valid = self.valid
        if RELEVANT in valid.columns:  # supervised from the first on, as before
            earlier = pl.col(RELEVANT).list.head(pl.col(RELEVANT).list.len() - 1)
            valid = valid.with_columns(
                pl.col(HISTORY).list.concat(earlier), pl.col(RELEVANT).list.last().alias(TARGET)
            )
        return pl.concat([self.train, valid.select(self.train.columns)])

    def tuning_rows(self, seed: int) -> pl.DataFrame:
        """Validation rows that settings are chosen on."""
        if len(self.valid) <= MAX_TUNING_ROWS:
            return self.valid
        return self.valid.sample(MAX_TUNING_ROWS, seed=seed)

    @property
    def history(self) -> ItemLists:
        """Histories of `rows`."""
        return ItemLists.from_column(self.rows[HISTORY])

    @cached_property
    def interactions_hash(self) -> str:
        """Hash of what recent popularity reads of the log."""
        log = self.interactions.select(USER_ID, ITEM_INDEX, TIMESTAMP)
        return content_sha256({"interactions": log})

    @cached_property
    def vectors_hash(self) -> str | None:
        """Hash of the item vectors."""
        if self.vectors is None:
            return None
        return sha256_bytes(np.ascontiguousarray(self.vectors).tobytes())


def load_split_data(
    run_dir: Path | str,
    rows: pl.DataFrame,
    split: str,
    k: int,
    filter_seen: bool,
    fit_on: str = "train",
) -> SplitData:
    """What baselines may see of a run: its prepared tables, and item vectors where it has them.

    Args:
        run_dir: the run.
        rows: rows of `split` that lists are wanted for.
        split: "valid" or "test".
        k: list length.
        filter_seen: as in `SplitData`.
        fit_on: likewise.
    """
    data = stage_folder(run_dir, "prepare")
    train, valid = (pl.read_parquet(data / f"{n}.parquet", glob=False) for n in ("train", "valid"))
    vectors = None
    if load_manifest(run_dir, "embed") is not None:
        vectors = content_vectors(run_dir)
    facts = read_json(data / "split.json")
    known = facts.get("content_sha256") or facts.get("split_sha256")  # as older runs call it
    return SplitData(
        train=train,
        valid=valid,
        rows=rows,
        interactions=pl.read_parquet(data / "interactions.parquet", glob=False),
        n_items=pl.read_parquet(data / "catalog.parquet", glob=False).height,
        vectors=vectors,
        filter_seen=filter_seen,
        fit_on=fit_on,
        k=k,
        content_hash=known or content_sha256({"train": train, "valid": valid, split: rows}),
    )


def cache_folder(run_dir: Path | str, cache_dir: str | None = None) -> Path:
    """Where baselines are cached.

    `cache_dir`; without it the environment variable ``GENREC_CACHE``, one folder for all runs; and
    without that ``baselines-cache`` beside the run, which runs beside each other share.
    """
    if chosen := cache_dir or os.environ.get("GENREC_CACHE"):
        return Path(chosen)
    return Path(run_dir).resolve().parent / "baselines-cache"


@dataclass(frozen=True)
class BaselineLists:
    """What a baseline recommends.

    Attributes:
        lists: item indices, best first, per training seed. ``# (n_rows, k)`` each
        settings: how it was set: chosen values, grid, trials, seconds.
    """

    lists: list[IntArray]
    settings: dict[str, Any]


Trials = list[dict[str, Any]]
Made = tuple[IntArray, dict[str, Any]]  # lists ``(n_rows, k)`` and settings


def _chosen(file: Path, tune: Callable[[], tuple[Any, Trials]]) -> tuple[dict[str, Any], Trials]:
    """Settings and trials of an earlier call on this split, or `tune` and keep them.

    Settings don't depend on the rows and length of the lists, so all tables of a dataset share
    them.
    """
    if not file.exists():
        best, trials = tune()
        write_json(file, {"chosen": asdict(best), "trials": trials})
    found = read_json(file)
    return found["chosen"], found["trials"]


def _random(data: SplitData, seed: int, _: Path) -> Made:
    return random_lists(data.n_items, data.seen(data.rows), data.k, seed), {"seed": seed}


def _popularity(data: SplitData, seed: int, _: Path) -> Made:
    order = popularity_order(item_counts(data.fit_rows, data.n_items), seed)
    return popularity(order, data.seen(data.rows), data.k), {"counts": data.fit_on}


def _recent_popularity(data: SplitData, seed: int, file: Path) -> Made:
    events = training_events(data.train, data.interactions)

    def tune() -> tuple[WindowSettings, Trials]:
        valid = data.tuning_rows(seed)
        return tune_window(events, data.n_items, valid, data.seen(valid), seed=seed)

    chosen, trials = _chosen(file, tune)
    if data.fit_on != "train":
        events = training_events(data.fit_rows, data.interactions)
    when, days = data.rows[TARGET_TIME].to_numpy(), float(chosen["window_days"])
    lists = recent_popularity(events, data.n_items, when, data.seen(data.rows), data.k, days, seed)
    text = f"window_days={days:g}, counted up to each row's moment"
    return lists, _tuned(chosen, text, {"window_days": WINDOWS_DAYS}, trials)


def _grid(data: SplitData, grid: dict[str, list[float]]) -> dict[str, list[float]]:
    """Where repeats can be targets, how much an item speaks for itself is tuned, too."""
    return grid if data.filter_seen else {**grid, "self_weight": SELF_WEIGHTS}


def _fitted_knn(
    data: SplitData, seed: int, file: Path, lag_power: float | None
) -> tuple[ItemKNN, dict[str, Any]]:
    grid = _grid(data, ITEM_KNN_GRID if lag_power is None else SEQUENTIAL_KNN_GRID)

    def tune() -> tuple[KNNSettings, Trials]:
        start, valid = KNNSettings(lag_power=lag_power), data.tuning_rows(seed)
        seen = data.seen(valid)
        return tune_knn(data.train, valid, seen, data.n_items, start, grid, 10, seed)

    chosen, trials = _chosen(file, tune)
    best = KNNSettings(**chosen)
    told = _tuned(chosen, best.describe(), grid, trials)
    return ItemKNN(data.fit_rows, data.n_items, best, seed), told


def _knn(data: SplitData, seed: int, file: Path, lag_power: float | None) -> Made:
    model, told = _fitted_knn(data, seed, file, lag_power)
    return model.recommend(data.history, data.seen(data.rows), data.k), told


def tuned_memory(data: SplitData, cache: Path, seed: int = 0) -> tuple[ItemKNN, dict[str, Any]]:
    """Sequential-kNN itself, tuned as the baseline is, and what `baseline` tells of its settings.

    Args:
        data: the split and the rule.
        cache: cache folder; settings that the baseline was tuned to are found there.
        seed: of tie orders.
    """
    return _fitted_knn(data, seed, _tuning_file("sequential-kNN", data, cache, seed), 0.5)


def _item_knn(data: SplitData, seed: int, file: Path) -> Made:
    return _knn(data, seed, file, None)


def _sequential_knn(data: SplitData, seed: int, file: Path) -> Made:
    return _knn(data, seed, file, 0.5)


def _content_knn(data: SplitData, seed: int, file: Path) -> Made:
    if data.vectors is None:
        raise UnfitData(
            "content-kNN needs item vectors that hold content; run the embed stage first, with "
            "another method than collaborative"
        )
    grid = _grid(data, CONTENT_KNN_GRID)
    similarity = nearest_items(data.vectors, ContentSettings().neighbours)

    def tune() -> tuple[ContentSettings, Trials]:
        valid = data.tuning_rows(seed)
        return tune_content_knn(similarity, data.train, valid, data.seen(valid), grid, seed=seed)

    chosen, trials = _chosen(file, tune)
    best = ContentSettings(**chosen)
    order = popularity_order(item_counts(data.fit_rows, data.n_items), seed)
    weights = similarity.power(best.power)
    lists = recommend_by_similarity(
        weights, order, data.history, data.seen(data.rows), data.k, best.decay, best.self_weight
    )
    return lists, _tuned(chosen, best.describe(), grid, trials)


def _ease(data: SplitData, seed: int, file: Path) -> Made:
    grid = _grid(data, EASE_GRID)

    def tune() -> tuple[EaseSettings, Trials]:
        valid = data.tuning_rows(seed)
        return tune_ease(data.train, valid, data.seen(valid), data.n_items, grid, seed=seed)

    chosen, trials = _chosen(file, tune)
    best = EaseSettings(**chosen)
    order = popularity_order(item_counts(data.fit_rows, data.n_items), seed)
    weights = ease_weights(user_item_matrix(data.fit_rows, data.n_items), best.regularization)
    lists = recommend_by_similarity(
        weights, order, data.history, data.seen(data.rows), data.k, best.decay, best.self_weight
    )
    return lists, _tuned(chosen, best.describe(), grid, trials)


def _tuned(
    chosen: dict[str, Any], text: str, grid: dict[str, Any], trials: Trials
) -> dict[str, Any]:
    edges = [
        name for name, values in grid.items() if chosen[name] in (min(values), max(values))
    ]  # of two values always
    return {
        "chosen": chosen,
        "description": text,
        "at_grid_edge": edges,  # a wider grid might find better ones
        "grid": grid,
        "trials": trials,
        "valid_ndcg@10": max(trial["ndcg"] for trial in trials),
    }


FITTED: dict[str, Callable[[SplitData, int, Path], Made]] = {
    "random": _random,
    "popularity": _popularity,
    "recent-popularity": _recent_popularity,
    "item-kNN": _item_knn,
    "sequential-kNN": _sequential_knn,
    "content-kNN": _content_knn,
    "EASE": _ease,
}
BASELINES = (*FITTED, *TRAINED)
_GRIDS: dict[str, Any] = {
    "recent-popularity": WINDOWS_DAYS,
    "item-kNN": ITEM_KNN_GRID,
    "sequential-kNN": SEQUENTIAL_KNN_GRID,
    "content-kNN": CONTENT_KNN_GRID,
    "EASE": EASE_GRID,
    "SASRec": DROPOUTS,
    "BERT4Rec": DROPOUTS,
}


def baseline(
    name: str,
    data: SplitData,
    cache: Path,
    seed: int = 0,
    training_seeds: Sequence[int] = (0,),
    device: str = "auto",
) -> BaselineLists:
    """Lists of one baseline, from the cache if they are there.

    Args:
        name: one of `BASELINES`.
        data: the split and the rule.
        cache: cache folder.
        seed: of tie orders and random lists.
        training_seeds: SASRec and BERT4Rec are trained once for each.
        device: where they train: see `genrec.evaluation.sequential.DEVICES`.

    Raises:
        UnfitData: these data don't allow the baseline (no timestamps, no item vectors, too many
            items).
        ValueError: an unknown name, or a damaged cache.
    """
    if name not in BASELINES:
        raise ValueError(f"baseline {name!r} is not known; choose from {', '.join(BASELINES)}")
    folder = _folder(name, data, cache, seed, training_seeds)
    seeds = list(training_seeds) if name in TRAINED else [seed]
    if (folder / "settings.json").exists():
        logger.info("%s: taken from %s", name, folder)
        return BaselineLists(
            [_read(folder / f"lists-{s}.parquet", data) for s in seeds],
            read_json(folder / "settings.json"),
        )
    logger.info("%s: not in %s; fitting and tuning", name, folder.parent)
    started = time.perf_counter()
    if name in TRAINED:
        found = _train(name, data, trained_folder(data, cache), training_seeds, device)
    else:
        lists, settings = FITTED[name](data, seed, _tuning_file(name, data, cache, seed))
        found = BaselineLists([lists], settings)
    found.settings["seconds"] = round(time.perf_counter() - started, 1)
    # Of a million users gigabytes with 64 bits.
    found = replace(found, lists=[lists.astype(np.int32, copy=False) for lists in found.lists])
    for s, lists in zip(seeds, found.lists, strict=True):
        column = pl.Series(LISTS, lists, dtype=pl.Array(pl.Int32, data.k))
        write_parquet(folder / f"lists-{s}.parquet", data.rows.select(ROW_ID).with_columns(column))
    write_json(folder / "settings.json", found.settings)
    return found


def trained_seeds(name: str, data: SplitData, cache: Path) -> list[int] | None:
    """Training seeds for which SASRec or BERT4Rec is trained on this split; None if it isn't.

    Its lists then cost seconds, whatever the split, the rows and their length.
    """
    path = trained_record(name, data, cache)
    return list(read_json(path)["training_seeds"]) if path.exists() else None


def trained_record(name: str, data: SplitData, cache: Path) -> Path:
    """The file that says with which seeds and settings SASRec or BERT4Rec is trained."""
    return trained_folder(data, cache) / f"{name}{_rule(data)}.json"


def trained_state(identity: Mapping[str, Any], name: str, seed: int, data: SplitData) -> str:
    """Name of the file of a trained state; `identity` is that of its settings."""
    return f"{name}-{sha256_json(identity)[:12]}-{seed}{_rule(data)}.pt"


def trained_folder(data: SplitData, cache: Path) -> Path:
    """Where SASRec's and BERT4Rec's states of this split are kept."""
    name = f"training-{data.n_items}-items-v{TRAINING_VERSION}"
    return cache / data.content_hash[:16] / name


def _rule(data: SplitData) -> str:
    # The weights kept are those that are best under the rule.
    return "" if data.filter_seen else "-seen-allowed"


def _folder(
    name: str, data: SplitData, cache: Path, seed: int, training_seeds: Sequence[int]
) -> Path:
    key = _tuning_key(name, data, seed) | {
        "rows": sha256_bytes("\n".join(data.rows[ROW_ID].to_list()).encode()),
        "fit_on": data.fit_on,
        "k": data.k,
    }
    if data.fit_on != "train" and RELEVANT in data.valid.columns:
        key["fitted_to"] = RELEVANT  # lists that were fitted to first targets alone are others
    if name in TRAINED:
        from genrec.evaluation.sequential import SequentialSettings

        key |= {"training_seeds": list(training_seeds), **asdict(SequentialSettings.of(name))}
        key["training_version"] = TRAINING_VERSION
    return cache / data.content_hash[:16] / f"{name}-{sha256_json(key)[:12]}"


def _tuning_file(name: str, data: SplitData, cache: Path, seed: int) -> Path:
    tuned = f"{name}-tuned-{sha256_json(_tuning_key(name, data, seed))[:12]}.json"
    return cache / data.content_hash[:16] / tuned


def _tuning_key(name: str, data: SplitData, seed: int) -> dict[str, Any]:
    """What the choice of settings depends on, beside the split (whose hash names the folder)."""
    key: dict[str, Any] = {
        "name": name,
        "version": VERSION,
        "filter_seen": data.filter_seen,
        "seed": seed,
        "n_items": data.n_items,
        "grid": _GRIDS.get(name),
    }
    if name == "recent-popularity":
        key["interactions"] = data.interactions_hash
    if name == "content-kNN":
        key["vectors"] = data.vectors_hash
    return key


def _read(path: Path, data: SplitData) -> IntArray:
    table = pl.read_parquet(path, glob=False)
    if not table[ROW_ID].equals(data.rows[ROW_ID]):
        raise ValueError(f"{path} holds other rows than the split; delete the cache folder")
    return table[LISTS].to_numpy()


def _train(
    name: str, data: SplitData, folder: Path, training_seeds: Sequence[int], device: str
) -> BaselineLists:
    """Tune the dropout with the first seed, then train the other seeds with the better one."""
    from genrec.evaluation.sequential import (  # torch: only where it is needed
        SequentialSettings,
        Trained,
        compute_device,
        recommend_sequential,
        train_sequential,
    )

    if data.fit_on != "train":
        raise UnfitData(
            f"{name} learns from train and stops early on valid, so fit_on={data.fit_on!r} would "
            "show it its own validation targets; use fit_on=train"
        )
    start = SequentialSettings.of(name)
    seen = data.seen(data.valid)

    def train(settings: SequentialSettings, seed: int) -> Trained:
        file = folder / trained_state(settings.identity(), name, seed, data)
        return train_sequential(
            data.train, data.valid, seen, data.n_items, settings, seed, file, device
        )

    first, *others = training_seeds
    tried = {d: train(replace(start, dropout=d), first) for d in DROPOUTS}
    best = max(tried, key=lambda d: tried[d].best["ndcg@10"])
    settings = replace(start, dropout=best)
    runs = [tried[best], *(train(settings, seed) for seed in others)]
    found = _tuned(
        asdict(settings),
        f"{settings.describe()}, full softmax, {len(runs)} training seeds, epochs "
        + ", ".join(f"{run.best['epoch']:g} ({run.stopped})" for run in runs),
        {"dropout": DROPOUTS},
        [{"settings": {"dropout": d}, "ndcg": tried[d].best["ndcg@10"]} for d in DROPOUTS],
    )
    found["curves"] = [run.curve for run in runs]
    found["stopped"] = [run.stopped for run in runs]
    found["training_seconds"] = sum(e["seconds"] for run in runs for e in run.curve)
    done = {"training_seeds": list(training_seeds), "settings": asdict(settings)}
    write_json(folder / f"{name}{_rule(data)}.json", done)
    history, seen = data.history, data.seen(data.rows)
    models = (run.model.to(compute_device(device)) for run in runs)
    return BaselineLists(
        [recommend_sequential(model, history, seen, data.k) for model in models], found
    )
