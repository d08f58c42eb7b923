"""Foreign recommendation tables: what is mapped, counted and refused."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from genrec.evaluation.lists import align, check_unseen, read_recommendations
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


def test_scores_rank_by_user_with_ties_in_file_order():
    found = aligned(
        table(
            user_id=["30", "30", "30", "10", "99"],
            item_id=["x", "y", "7", "7", "x"],
            score=["0.5", "2", "0.5", "-1e-3", "1"],
        ),
        k=3,
    )
    assert found.items.tolist() == [[1, -1, -1], [-1, -1, -1], [3, 2, 1]]
    assert found.ignored_lists == 1  # user 99 has no row


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
        ({"user_id": [10], "item_id": ["x"], "rank": [2]}, "not 1, 2, 3"),
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
    check_unseen(np.array([[0, 3], [1, 2]]), seen, 4)
    check_unseen(np.array([[0, -1], [-1, -1]]), seen, 4)
    with pytest.raises(ValueError, match="1 of 2 lists hold items the user has seen"):
        check_unseen(np.array([[0, 2], [1, 2]]), seen, 4)
