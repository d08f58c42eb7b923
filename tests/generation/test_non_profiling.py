"""Lists without profiling, by hand: most popular first, nothing of a user in them."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from genrec.generation.non_profiling import (
    counts_sha256,
    non_profiling_lists,
    opted_out,
    popular_items,
)

CATALOG = pl.DataFrame(
    {"item_id": ["a", "b", "c", "d"], "train_count": pl.Series([2, 7, 0, 2], dtype=pl.Int32)}
)
SIDS = pl.Series(["<a_0>", "<a_1>", "<a_2>", "<a_3>"])


def test_most_popular_first_and_ties_in_the_order_of_the_catalogue():
    assert popular_items(CATALOG, 3).tolist() == [1, 0, 3]
    assert popular_items(CATALOG, 9).tolist() == [1, 0, 3, 2]
    assert popular_items(CATALOG, 2, np.array([0, 2, 3])).tolist() == [0, 3]


def test_everybody_gets_the_same_table():
    rows = pl.DataFrame({"row_id": ["r2", "r1"], "user_id": [5, 9]})
    table = non_profiling_lists(rows, CATALOG, SIDS, popular_items(CATALOG, 2))
    assert table.rows() == [
        ("r2", 5, 1, "b", 1, "<a_1>", 7.0),
        ("r2", 5, 2, "a", 0, "<a_0>", 2.0),
        ("r1", 9, 1, "b", 1, "<a_1>", 7.0),
        ("r1", 9, 2, "a", 0, "<a_0>", 2.0),
    ]


def test_the_hash_is_of_ids_and_counts():
    other = CATALOG.with_columns(pl.col("train_count") + 1)
    renamed = CATALOG.with_columns(pl.col("item_id") + "x")
    titled = CATALOG.with_columns(pl.lit("t").alias("title"))
    hashes = [counts_sha256(catalog) for catalog in (CATALOG, other, renamed, titled)]
    assert len(set(hashes)) == 3 and hashes[0] == hashes[3]


def test_who_is_named(tmp_path):
    text, table = tmp_path / "out.txt", tmp_path / "out.csv"
    text.write_text("7\n\n 12 \n")
    assert opted_out(pl.Series([12, 1, 7]), text).to_list() == [True, False, True]
    table.write_text("user_id,since\nu1,2025\n")
    assert opted_out(pl.Series(["u0", "u1"]), table).to_list() == [False, True]
    with pytest.raises(ValueError, match="names 1 users, and none of them is in this split"):
        opted_out(pl.Series(["x"]), table)
    text.write_text("\n")
    with pytest.raises(ValueError, match="names no user"):
        opted_out(pl.Series(["x"]), text)
