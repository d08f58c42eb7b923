"""Foreign recommendation tables: what is mapped, counted and refused."""

from __future__ import annotations

import json
import logging

import numpy as np
import polars as pl
import pytest

from genrec.evaluation.lists import (
    align,
    check_unseen,
    read_recommendations,
    read_sid_map,
    relevant_items,
)
from genrec.item_lists import ItemLists

CATALOG = pl.DataFrame({"item_index": [0, 1, 2, 3], "item_id": ["007", "7", "x", "y"]}).cast(
    {"item_index": pl.Int32}
)
ROWS = pl.DataFrame({"row_id": ["test-0", "test-1", "test-2"], "user_id": [10, 20, 30]})


def table(**columns) -> pl.DataFrame:
    return pl.DataFrame(columns)


def aligned(given: pl.DataFrame, k: int = 2, rows: pl.DataFrame = ROWS):
    return align(given, rows, CATALOG, k, ROWS)


def test_ranks_order_the_lists_and_what_is_unknown_or_absent_is_a_counted_miss():
    found = aligned(
        table(
            row_id=["test-1", "test-0", "test-0", "test-1", "test-1"],
            item_id=["y", "x", "ghost", "7", "007"],
            rank=[2, 2, 1, 1, 3],
        )
    )
    assert found.items.tolist() == [[-1, 2], [1, 3], [-1, -1]]
    assert (found.unknown_items, found.rows_without_list, found.ignored_lists) == (1, 1, 0)


def test_equal_scores_favour_nobody_by_their_place_in_the_file():
    """A file of candidates often names the target first; it must not rank first for that."""
    ids = pl.Series("item_id", [f"i{n:03d}" for n in range(200)])
    catalog = pl.DataFrame({"item_id": ids, "item_index": np.arange(200, dtype=np.int32)})
    rows = pl.DataFrame({"row_id": ["a", "b"], "user_id": ["u", "v"]})

    def lists(order):
        part = pl.DataFrame({"item_id": ids.gather(order)}).with_columns(score=pl.lit(0.5))
        return pl.concat([part.with_columns(row_id=pl.lit(r)) for r in ("a", "b")])

    found = align(lists(np.arange(200)), rows, catalog, 200, rows)
    again = align(lists(np.random.default_rng(1).permutation(200)), rows, catalog, 200, rows)
    assert (found.items == again.items).all() and found.tied_lists == 2
    assert (found.items[0] != np.arange(200)).mean() > 0.9


def test_scores_rank_by_user():
    found = aligned(
        table(
            user_id=["30", "30", "30", "10", "99"],
            item_id=["x", "y", "7", "7", "x"],
            score=["0.5", "2", "0.25", "-1e-3", "1"],
        ),
        k=3,
    )
    assert found.items.tolist() == [[1, -1, -1], [-1, -1, -1], [3, 2, 1]]
    assert found.ignored_lists == 1  # user 99 has no row
    assert found.tied_lists == 0


def test_rows_that_are_not_evaluated_are_ignored():
    given = table(row_id=["test-0", "test-2"], item_id=["x", "y"], rank=[1, 1])
    found = aligned(given, rows=ROWS[1:])
    assert found.items.tolist() == [[-1, -1], [3, -1]]
    assert (found.rows_without_list, found.ignored_lists) == (1, 1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": ["x"], "rank": [1]}, "one of row_id, user_id is needed"),
        ({"user_id": [10], "item": ["x"], "rank": [1]}, r"lack the columns \['item_id'\]"),
        ({"user_id": [10], "item_id": ["x"]}, r"lack the columns \['rank or score'\]"),
        ({"user_id": ["ten"], "item_id": ["x"], "rank": [1]}, "holds 'ten', which is no Int64"),
        ({"user_id": [10], "item_id": [None], "rank": [1]}, "1 nulls"),
        ({"user_id": [None], "item_id": ["x"], "rank": [1]}, "1 nulls"),
        ({"user_id": [10], "item_id": ["x"], "rank": ["first"]}, "holds 'first', which is no"),
        ({"user_id": [10], "item_id": ["x"], "score": [float("nan")]}, "holds 1 NaN"),
        ({"user_id": [10], "item_id": ["x"], "rank": [0]}, "not 1, 2, 3"),
        ({"user_id": [10], "item_id": ["x"], "rank": [2]}, "not 1, 2, 3"),
        ({"user_id": [10] * 2, "item_id": ["x", "x"], "score": [1, 2]}, "item 'x' more than once"),
        ({"user_id": [10] * 2, "item_id": ["x", "y"], "rank": [1, 1]}, "not 1, 2, 3"),
        ({"user_id": [10] * 2, "item_id": ["x", "x"], "rank": [1, 2]}, "item 'x' more than once"),
        ({"user_id": [1, 2], "item_id": ["x", "x"], "rank": [1, 1]}, "another dataset or split"),
        ({"row_id": ["valid-0"], "item_id": ["x"], "rank": [1]}, "another dataset or split"),
        ({"user_id": [10], "item_id": ["ghost"], "rank": [1]}, "none of the recommended items"),
        (
            {"user_id": [10], "item_id": ["x"], "item_index": [1], "rank": [1]},
            "item_index 1 in the recommendations and 2 in the catalogue",
        ),
    ],
)
def test_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        aligned(table(**columns))


def test_users_with_several_rows_need_row_ids():
    rows = ROWS.with_columns(pl.Series("user_id", [10, 10, 30]))
    given = table(user_id=[10], item_id=["x"], rank=[1])
    with pytest.raises(ValueError, match="give the recommendations a row_id column"):
        align(given, rows, CATALOG, 2, rows)


def test_csv_keeps_leading_zeros(tmp_path):
    path = tmp_path / "lists.csv"
    path.write_text("user_id,item_id,rank\n10,007,1\n10,7,2\n")
    assert aligned(read_recommendations(path)).items[0].tolist() == [0, 1]
    for wrong, message in ((tmp_path / "no.csv", "does not exist"), (tmp_path, "does not exist")):
        with pytest.raises(ValueError, match=message):
            read_recommendations(wrong)
    (tmp_path / "lists.json").write_text("[]")
    with pytest.raises(ValueError, match="must end in"):
        read_recommendations(tmp_path / "lists.json")


def test_seen_items_in_a_list_break_the_rule():
    seen = ItemLists.from_column(pl.Series([[1, 2], []], dtype=pl.List(pl.Int32)))
    check_unseen(np.array([[0, 3], [1, 2]]), seen)
    check_unseen(np.array([[0, -1], [-1, -1]]), seen)
    with pytest.raises(ValueError, match="1 of 2 lists hold items the user has seen"):
        check_unseen(np.array([[0, 2], [1, 2]]), seen)


def test_unsorted_ranks_and_what_lies_behind_k():
    given = table(user_id=[20] * 4, item_id=["x", "7", "y", "007"], rank=[3, 1, 2, 4])
    found = aligned(given, k=2)
    assert found.items.tolist() == [[-1, -1], [1, 3], [-1, -1]]
    deep = table(user_id=[20] * 3, item_id=["x", "7", "ghost"], rank=[1, 2, 3])
    assert aligned(deep, k=2).unknown_items == 0  # unknown, but behind the places that count
    assert aligned(deep, k=3).unknown_items == 1


def test_a_row_id_is_preferred_to_a_user_id():
    given = table(
        row_id=["test-2"], user_id=[10], item_id=["x"], rank=[1], score=[0.1], note=["mine"]
    )
    assert aligned(given).items.tolist() == [[-1, -1], [-1, -1], [2, -1]]


def test_integer_items_given_as_text_and_text_items_given_as_integers():
    catalog = CATALOG.with_columns(pl.Series("item_id", [5, 6, 7, 8]))
    given = table(user_id=["10", "10"], item_id=["8", "5"], rank=["1", "2"])
    assert align(given, ROWS, catalog, 2, ROWS).items[0].tolist() == [3, 0]
    found = aligned(table(user_id=[10], item_id=[7], rank=[1]))
    assert found.items[0].tolist() == [1, -1]  # "7", not "007"
    with pytest.raises(ValueError, match="holds 'x', which is no Int64"):
        align(table(user_id=[10], item_id=["x"], rank=[1]), ROWS, catalog, 2, ROWS)


def test_a_table_without_lists():
    none = table(user_id=[10], item_id=["x"], rank=[1]).clear()
    found = aligned(none)
    assert (found.items == -1).all() and found.rows_without_list == 3 and found.ignored_lists == 0


def test_what_could_not_be_scored_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        aligned(table(user_id=[10, 10, 99], item_id=["x", "ghost", "y"], rank=[1, 2, 1]))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "1 recommended items are not in the catalogue",
        "2 rows have no list",
        "1 lists belong to rows or users that are not evaluated",
    ]


def test_tab_separated_files(tmp_path):
    path = tmp_path / "lists.tsv"
    path.write_text("row_id\titem_id\tscore\ntest-1\tx\t1e-3\ntest-1\t007\t2\n")
    assert aligned(read_recommendations(path)).items[1].tolist() == [0, 2]


# Maps of semantic ids. ----------------------------------------------------------------------------


def sid_map(tmp_path, index, catalog: pl.DataFrame = CATALOG) -> list[int]:
    path = tmp_path / "index.json"
    path.write_text(json.dumps(index))
    return read_sid_map(path, catalog).tolist()


def test_items_of_one_sid_get_one_number(tmp_path, caplog):
    index = {"y": ["<a_1>", "<b_2>"], "007": ["<a_1>", "<b_3>"], "7": ["<a_1>", "<b_2>"]}
    with caplog.at_level(logging.WARNING):
        found = sid_map(tmp_path, {**index, "stranger": ["<a_9>", "<b_9>"]})
    assert found[1] == found[3] and len({found[0], found[1], found[2]}) == 3  # x is alone
    assert sorted(set(found)) == [0, 1, 2]  # numbers have no holes
    assert "1 items have no semantic id" in caplog.text


def test_codes_are_compared_one_by_one(tmp_path):
    found = sid_map(tmp_path, {"007": [1, 12], "7": [11, 2], "x": [1, 12], "y": [1, 1, 2]})
    assert found[0] == found[2] and len(set(found)) == 3


def test_integer_item_ids_are_found_by_their_text(tmp_path):
    catalog = CATALOG.with_columns(pl.Series("item_id", [5, 6, 7, 8]))
    found = sid_map(tmp_path, {"5": ["<a_0>"], "6": ["<a_0>"], "7": ["<a_1>"], "8": []}, catalog)
    assert found[0] == found[1] and len(set(found)) == 3


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([["<a_1>"]], "must hold"),
        ({"x": "<a_1><b_2>"}, "must hold"),
        ({"stranger": ["<a_1>"]}, "knows none of the 4 item ids"),
        ({}, "knows none of the 4 item ids"),
    ],
)
def test_other_files_are_refused(tmp_path, index, message):
    with pytest.raises(ValueError, match=message):
        sid_map(tmp_path, index)


# What counts as a hit. ----------------------------------------------------------------------------


def test_relevant_items_are_the_target_or_all_of_a_row():
    rows = pl.DataFrame({"target_item_index": pl.Series([2, 0], dtype=pl.Int32)})
    single = relevant_items(rows)
    assert isinstance(single, np.ndarray) and single.dtype == np.int64 and single.tolist() == [2, 0]
    lists = pl.Series("relevant_item_index", [[2, 1], [0]], dtype=pl.List(pl.Int32))
    several = relevant_items(rows.with_columns(lists))
    assert several.values.tolist() == [2, 1, 0] and several.lengths.tolist() == [2, 1]
