"""The published datasets read to their published statistics (skipped where they aren't at hand)."""

from __future__ import annotations

from pathlib import Path

import pytest

from genrec.data.cleaning import clean
from genrec.data.readers import read_movielens_100k, read_sequences
from genrec.data.splits import leave_one_out


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
    data = clean(read_movielens_100k(genrec_data / "movielens-100k"), min_rating=0)
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
