"""The published datasets read to their published statistics (skipped where they aren't at hand)."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from genrec.data.cleaning import clean
from genrec.data.leaks import check_splits
from genrec.data.readers import RawData, read_movielens, read_sequences
from genrec.data.splits import Splits, leave_one_out
from genrec.data.time_splits import global_time, time_cutoff, unix_seconds


def test_beauty(genrec_data: Path):
    folder = genrec_data / "amazon2014-beauty"
    data = clean(read_sequences(folder / "sequences.txt", folder / "items.jsonl"))
    assert data.interactions["user_id"].n_unique() == 22_363
    assert data.catalog.height == 12_101
    assert data.interactions.height == 198_502
    assert data.tie_share is None
    assert data.catalog["item_id"].to_list() == list(range(1, 12_102))
    first = data.catalog.row(0, named=True)
    assert first["title"] == "OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce"
    assert first["brand"] == "OPI"
    assert first["categories"] == ["Beauty", "Makeup", "Nails", "Nail Polish"]
    assert not data.catalog["brand"].eq("Unknown").any()
    splits = leave_one_out(data.interactions, data.catalog.height)
    assert splits.test.height == splits.valid.height == 22_363
    assert splits.train_count.sum() == 198_502 - 2 * 22_363
    last = splits.test.row(0, named=True)
    assert (last["history_item_index"], last["target_item_index"]) == ([0, 1, 2, 3], 4)


def test_movielens_100k(genrec_data: Path):
    data = clean(read_movielens(genrec_data / "movielens-100k"), min_rating=0)
    assert data.interactions["user_id"].n_unique() == 943
    assert data.catalog.height == 1_682
    assert data.interactions.height == 100_000
    assert data.tie_share == pytest.approx(415 / 943)
    assert data.users is not None
    assert data.users.height == 943
    film = data.catalog.row(0, named=True)
    assert film["title"] == "Toy Story (1995)"
    assert film["categories"] == ["Animation", "Children's", "Comedy"]
    assert data.catalog["categories"].list.len().sum() == 2_891  # 2,893 marks, two "unknown"


def heights(splits: Splits) -> tuple[int, int, int]:
    return splits.train.height, splits.valid.height, splits.test.height


def test_movielens_100k_by_time(genrec_data: Path):
    data = clean(read_movielens(genrec_data / "movielens-100k"), min_rating=0)
    n_items = data.catalog.height
    splits = global_time(data.interactions, n_items)
    check_splits(splits.train, splits.valid, splits.test, data.interactions, "global-time", n_items)
    assert heights(splits) == (7_506, 9_885, 9_924)
    assert splits.dropped == {"valid_without_history": 116, "test_without_history": 76}
    assert splits.boundaries == {
        "valid_from": "1998-03-07T02:21:09+00:00",
        "test_from": "1998-03-31T22:11:49+00:00",
    }
    in_valid, in_test = 9_885 + 116, 9_924 + 76
    train = 100_000 - in_valid - in_test
    assert list(splits.shares.values()) == pytest.approx(
        [train / 100_000, in_valid / 100_000, in_test / 100_000]
    )
    assert splits.train_count.sum() == train
    assert splits.tied_test_targets == pytest.approx(0.521, abs=5e-4)

    moments = [unix_seconds(day) for day in ("1998-02-01", "1998-03-15")]
    splits = time_cutoff(data.interactions, n_items, *moments)
    check_splits(splits.train, splits.valid, splits.test, data.interactions, "time-cutoff", n_items)
    assert heights(splits) == (6_276, 101, 93)
    relevant = splits.test["relevant_item_index"].list.len()
    assert relevant.mean() == pytest.approx(21.34, abs=0.01)
    assert splits.dropped["test_without_history"] == 15_942
    held = relevant.sum() + splits.valid["relevant_item_index"].list.len().sum()
    assert splits.train_count.sum() + held + sum(splits.dropped.values()) == 100_000


def test_fashion_reviews_by_time(genrec_data: Path):
    """Real data where nearly every tie rule matters: users review everything on one day."""
    text = (genrec_data / "amazon2018-fashion-reviews" / "AMAZON_FASHION_5.json").read_text()
    reviews, at = [], 0
    while at < len(text.rstrip()):  # objects one after another
        at += len(text[at:]) - len(text[at:].lstrip())
        review, at = json.JSONDecoder().raw_decode(text, at)
        reviews.append((review["reviewerID"], review["asin"], review["unixReviewTime"]))
    log = pl.DataFrame(reviews, schema=["user_id", "item_id", "timestamp"], orient="row")
    log = log.with_columns(pl.lit(None, dtype=pl.Float64).alias("rating"))
    catalog = log.select(pl.col("item_id").unique(maintain_order=True))
    data = clean(RawData(log, catalog, None))
    assert data.interactions.height == 3_065
    splits = leave_one_out(data.interactions, 31)
    assert heights(splits) == (406, 395, 395)
    assert splits.tied_test_targets == pytest.approx(0.985, abs=5e-4)
    splits = global_time(data.interactions, 31)
    assert heights(splits) == (327, 270, 273)
    assert splits.shares["train"] == pytest.approx(0.7971, abs=5e-5)
    check_splits(splits.train, splits.valid, splits.test, data.interactions, "global-time", 31)
