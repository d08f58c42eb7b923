"""The synthetic shop: same seed same shop, complete rows, and a task that can be learned."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from scipy import sparse

from genrec.data.cleaning import clean
from genrec.data.splits import Splits, leave_one_out
from genrec.data.synthetic import synthetic_shop


def hit_rates(splits: Splits, n_items: int, k: int = 10) -> dict[str, float]:
    """HR@k of random, popularity and recency-weighted item-kNN, seen items filtered."""
    # A training row's supervised items, over all rows, are the training log.
    rows = splits.train.select(
        pl.col("user_id"),
        pl.concat_list("history_item_index", "target_item_index")
        .list.slice(pl.col("supervise_from"))
        .alias("item"),
    ).explode("item")
    user = (rows["user_id"].rank("dense").cast(pl.Int64) - 1).to_numpy()
    item = rows["item"].to_numpy()
    bought = sparse.csr_matrix((np.ones(len(item)), (user, item)), shape=(user.max() + 1, n_items))
    bought.data[:] = 1.0
    together = (bought.T @ bought).toarray()
    np.fill_diagonal(together, 0.0)
    norm = np.sqrt(np.maximum(np.asarray(bought.sum(axis=0)).ravel(), 1.0))
    similarity = together / (norm[:, None] * norm[None, :])
    popularity = splits.train_count.astype(np.float64)
    rng = np.random.default_rng(0)
    hits = {"random": 0, "popularity": 0, "knn": 0}
    columns = ("history_item_index", "target_item_index", "seen_item_index")
    for history, target, seen in splits.test.select(columns).iter_rows():
        decay = 0.6 ** np.arange(len(history))[::-1]
        scores = {
            "random": rng.random(n_items),
            "popularity": popularity.copy(),
            "knn": decay @ similarity[history],
        }
        for name, score in scores.items():
            score[seen] = -np.inf
            hits[name] += int(target in np.argpartition(-score, k)[:k])
    return {name: count / splits.test.height for name, count in hits.items()}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_knn_beats_popularity_beats_random_on_every_seed(seed):
    raw = synthetic_shop(n_users=1200, n_items=400, seed=seed)
    data = clean(raw)
    splits = leave_one_out(data.interactions, data.catalog.height)
    rates = hit_rates(splits, data.catalog.height)
    assert rates["popularity"] > 1.8 * rates["random"], rates
    assert rates["knn"] > 1.8 * rates["popularity"], rates
    assert rates["knn"] < 0.5, rates  # learnable, not trivial


def test_same_seed_same_shop():
    one, two, other = (synthetic_shop(80, 150, seed) for seed in (5, 5, 6))
    assert one.interactions.equals(two.interactions)
    assert one.catalog.equals(two.catalog)
    assert not one.catalog.equals(other.catalog)


def test_rows_are_complete_and_titles_unique():
    raw = synthetic_shop(300, 1000, seed=3)
    catalog = raw.catalog
    assert catalog.height == 1000
    assert catalog.null_count().sum_horizontal()[0] == 0
    assert catalog["title"].n_unique() == catalog["item_id"].n_unique() == 1000
    assert (catalog["categories"].list.len() == 3).all()
    assert (catalog["price"] > 0).all()
    assert raw.interactions.null_count().sum_horizontal()[0] == 0
    assert raw.interactions["item_id"].is_in(catalog["item_id"].implode()).all()
    assert raw.interactions["user_id"].n_unique() == 300
    assert raw.interactions["rating"].is_between(1, 5).all()
    assert raw.interactions["timestamp"].is_sorted()


def test_shape_of_the_default_shop():
    data = clean(synthetic_shop())
    log = data.interactions
    lengths = log.group_by("user_id").len()["len"]
    assert 10 < lengths.mean() < 15
    counts = np.sort(np.bincount(log["item_index"].to_numpy(), minlength=600))[::-1]
    assert 0.25 < counts[:60].sum() / counts.sum() < 0.5  # long tail: the top tenth
    splits = leave_one_out(log, data.catalog.height)
    assert (splits.train_count == 0).sum() >= 5  # cold items
    repeats = 1 - log.select("user_id", "item_id").n_unique() / log.height
    assert 0.05 < repeats < 0.25  # refills
    gaps = log.select(pl.col("timestamp").diff().over("user_id")).to_series().drop_nulls()
    assert 0.3 < (gaps < 6 * 3600).mean() < 0.7  # sessions


@pytest.mark.parametrize("n_items", [10, 60])
def test_shops_smaller_than_the_list_of_types_work(n_items):
    raw = synthetic_shop(30, n_items, seed=1)
    assert raw.catalog.height == n_items
    assert raw.interactions.height > 60


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="n_users=0"):
        synthetic_shop(0, 100)
    with pytest.raises(ValueError, match="n_items=9 must be at least 10"):
        synthetic_shop(10, 9)
