"""Lists without profiling, by hand: most popular first, nothing of a user in them."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from genrec.generation.non_profiling import (
    ContentNeighbours,
    counts_sha256,
    non_profiling_lists,
    opted_out,
    popular_items,
    shows_items,
)

CATALOG = pl.DataFrame(
    {"item_id": ["a", "b", "c", "d"], "train_count": pl.Series([2, 7, 0, 2], dtype=pl.Int32)}
)
SIDS = pl.Series(["<a_0>", "<a_1>", "<a_2>", "<a_3>"])


def test_most_popular_first_and_ties_in_the_order_of_the_catalogue():
    assert popular_items(CATALOG, 3).tolist() == [1, 0, 3]
    assert popular_items(CATALOG, 9).tolist() == [1, 0, 3, 2]
    assert popular_items(CATALOG, 2, np.array([0, 2, 3])).tolist() == [0, 3]


NONE_SHOWN = np.array([-1, -1])


def test_everybody_gets_the_same_table():
    rows = pl.DataFrame({"row_id": ["r2", "r1"], "user_id": [5, 9]})
    table = non_profiling_lists(rows, NONE_SHOWN, CATALOG, SIDS, 2)
    assert table.rows() == [
        ("r2", 5, 1, "b", 1, "<a_1>", 7.0, None),
        ("r2", 5, 2, "a", 0, "<a_0>", 2.0, None),
        ("r1", 9, 1, "b", 1, "<a_1>", 7.0, None),
        ("r1", 9, 2, "a", 0, "<a_0>", 2.0, None),
    ]


@pytest.fixture
def vectors(tmp_path):
    """a, b and d at 0, 60 and 90 degrees; c has no text."""
    path = tmp_path / "text.npy"
    angles = np.radians([0, 60, 0, 90])
    table = np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[1], [3], [0], [2]]
    np.save(path, table.astype(np.float32))
    return path


def test_items_most_alike_the_one_on_show(vectors):
    rows = pl.DataFrame({"row_id": ["r1", "r2", "r3", "r4"], "user_id": [1, 2, 3, 4]})
    table = non_profiling_lists(rows, np.array([0, -1, 2, 3]), CATALOG, SIDS, 2, vectors=vectors)
    assert table.rows() == [
        ("r1", 1, 1, "b", 1, "<a_1>", 0.5, "a"),  # cos 60
        ("r1", 1, 2, "d", 3, "<a_3>", 0.0, "a"),  # cos 90; c has no content, a is on show itself
        ("r2", 2, 1, "b", 1, "<a_1>", 7.0, None),
        ("r2", 2, 2, "a", 0, "<a_0>", 2.0, None),
        ("r3", 3, 1, "b", 1, "<a_1>", 7.0, None),  # nothing is like c
        ("r3", 3, 2, "a", 0, "<a_0>", 2.0, None),
        ("r4", 4, 1, "b", 1, "<a_1>", 0.866025, "d"),  # cos 30
        ("r4", 4, 2, "a", 0, "<a_0>", 0.0, "d"),
    ]
    some = non_profiling_lists(
        rows, np.array([0, 0, -1, -1]), CATALOG, SIDS, 5, np.array([0, 2, 3]), vectors
    )
    assert some.group_by("row_id", maintain_order=True).agg("item_id")["item_id"].to_list() == [
        ["d"], ["d"], ["a", "d", "c"], ["a", "d", "c"]
    ]  # fmt: skip
    nothing_left = non_profiling_lists(
        rows, np.array([0, -1, 3, 0]), CATALOG, SIDS, 2, np.array([0, 2]), vectors
    )  # of a, only a and c are left, which is like nothing: everybody has a list all the same
    assert nothing_left["row_id"].unique(maintain_order=True).to_list() == ["r1", "r2", "r3", "r4"]
    of_first = nothing_left.filter(pl.col("row_id") == "r1")
    assert of_first["item_id"].to_list() == ["a", "c"]
    assert of_first["shown_item_id"].to_list() == [None, None]
    with pytest.raises(ValueError, match="need vectors made from the items' texts"):
        non_profiling_lists(rows, np.array([0, -1, -1, -1]), CATALOG, SIDS, 2)


def test_equal_items_stand_in_the_order_of_the_catalogue(tmp_path):
    table = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    table[[40, 7, 23]] = table[11] * np.float32([[1], [3], [0.1]])
    np.save(tmp_path / "v.npy", table)
    rows, cosines = ContentNeighbours(tmp_path / "v.npy").nearest(11, 49)
    assert rows[:3].tolist() == [7, 23, 40] and cosines[:3].tolist() == [1.0, 1.0, 1.0]
    assert sorted(rows.tolist()) == [r for r in range(50) if r != 11]
    few = ContentNeighbours(tmp_path / "v.npy").nearest(11, 2)[0]
    assert few.tolist() == [7, 23]  # of three equal ones
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines, (unit @ unit[11])[rows], atol=1e-6)


def test_the_hash_is_of_ids_and_counts():
    other = CATALOG.with_columns(pl.col("train_count") + 1)
    renamed = CATALOG.with_columns(pl.col("item_id") + "x")
    titled = CATALOG.with_columns(pl.lit("t").alias("title"))
    hashes = [counts_sha256(catalog) for catalog in (CATALOG, other, renamed, titled)]
    assert len(set(hashes)) == 3 and hashes[0] == hashes[3]


def test_who_is_named(tmp_path, caplog):
    text, table, ids = tmp_path / "out.txt", tmp_path / "out.csv", CATALOG["item_id"]
    text.write_text("7\n\n 12 \n")
    chosen, shown = opted_out(pl.Series([12, 1, 7]), text, ids)
    assert chosen.to_list() == [True, False, True] and shown.tolist() == [-1, -1, -1]
    assert not shows_items(text)
    table.write_text("user_id,since\nu1,2025\n")
    assert opted_out(pl.Series(["u0", "u1"]), table, ids)[0].to_list() == [False, True]
    with pytest.raises(ValueError, match="names 1 users, and none of them is in this split"):
        opted_out(pl.Series(["x"]), table, ids)
    table.write_text('user_id,since\n"u1 ",2025\n u9,2025\n')  # as a spreadsheet pads them
    assert opted_out(pl.Series(["u0", " u1"]), table, ids)[0].to_list() == [False, True]
    assert "1 of 2 users are in none of these rows" in caplog.text
    text.write_text("\n")
    with pytest.raises(ValueError, match="names no user"):
        opted_out(pl.Series(["x"]), text, ids)


def test_what_is_on_show(tmp_path):
    path, ids = tmp_path / "out.csv", CATALOG["item_id"]
    path.write_text("user_id,item_id\nu1,d\nu2,\nu1,d\nu3,a\n")  # a pair may repeat
    chosen, shown = opted_out(pl.Series(["u3", "u0", "u2", "u1", "u1"]), path, ids)
    assert chosen.to_list() == [True, False, True, True, True]
    assert shown.tolist() == [0, -1, -1, 3, 3] and shows_items(path)
    path.write_text('user_id,item_id\n"u1",""\nu2,  d \nu3,\nu3,a\nu0,\nu0,\n')
    chosen, shown = opted_out(pl.Series(["u0", "u1", "u2", "u3"]), path, ids)
    assert chosen.all() and shown.tolist() == [-1, -1, 3, 0]
    other, numbers = tmp_path / "out.parquet", pl.Series([10, 20])
    for items in ([20, None], [20.0, None], [20.0, float("nan")]):
        pl.DataFrame({"user_id": [1, 2], "item_id": items}).write_parquet(other)
        found = opted_out(pl.Series([1, 2]), other, numbers)
        assert found[0].all() and found[1].tolist() == [1, -1]
    pl.DataFrame({"user_id": [1], "item_id": [[20]]}).write_parquet(other)
    with pytest.raises(ValueError, match=r"item_id holds List\(Int64\); one item can be on show"):
        opted_out(pl.Series([1]), other, numbers)
    pl.DataFrame({"user_id": [1], "item_id": [20.5]}).write_parquet(other)
    with pytest.raises(ValueError, match="one is '20.5'"):
        opted_out(pl.Series([1]), other, numbers)
    path.write_text("user_id,item_id\nu1,d\nu1,a\n")
    with pytest.raises(ValueError, match="names user 'u1' with more than one item_id"):
        opted_out(pl.Series(["u1"]), path, ids)
    path.write_text("user_id,item_id\nu1,<b>\n")
    with pytest.raises(ValueError, match="1 items on show are not in the catalogue, one is '<b>'"):
        opted_out(pl.Series(["u1"]), path, ids)
