"""Order and duplicates of a log, against plain Python; what is done in chunks and packed keys."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data import cleaning
from genrec.data.readers import SUBSECOND

ROWS = st.lists(
    st.tuples(
        st.sampled_from([3, 10**6, -5, 1 << 62]),  # users
        st.integers(0, 2),  # items
        st.sampled_from([0, 7, -3, 1 << 40, 1 << 61]),  # seconds
        st.integers(0, 1),  # microseconds
        st.sampled_from([None, 1.0, 2.0]),  # weights
    ),
    min_size=1,
    max_size=15,
)


def log_of(rows: list[tuple[int, int, int, int, float | None]], text: bool) -> pl.DataFrame:
    names = ["user_id", "item_id", "timestamp", SUBSECOND, "rating"]
    kinds = dict(zip(names, [pl.Int64] * 4 + [pl.Float64], strict=True))
    log = pl.DataFrame(rows, schema=kinds, orient="row")
    return log.with_columns(pl.col("user_id").cast(pl.String)) if text else log


@settings(deadline=None)
@given(ROWS, st.booleans())
def test_ordered_by_first_appearance_time_and_file(rows, text):
    log = log_of(rows, text)
    ordered = cleaning.order_interactions(log)
    users = [row[0] for row in rows]
    expected = sorted(range(len(rows)), key=lambda i: (users.index(users[i]), *rows[i][2:4], i))
    assert ordered.drop("position").equals(log[expected])
    owner = [users[i] for i in expected]
    assert ordered["position"].to_list() == [i - owner.index(u) for i, u in enumerate(owner)]
    assert ordered["position"].dtype == pl.Int32


@settings(deadline=None)
@given(ROWS, st.booleans())
def test_duplicates_of_ordered_rows_are_those_of_any_rows(rows, weighted):
    log = log_of(rows, text=False)
    if weighted:
        log = log.with_columns(weight=pl.col("rating").fill_null(0.5))
    ordered = cleaning.order_interactions(log)
    assert cleaning.drop_duplicates_of_ordered(ordered).equals(cleaning.drop_duplicates(ordered))


def test_a_log_without_repetitions_is_not_copied():
    log = log_of([(1, 1, 5, 0, 1.0), (1, 2, 5, 0, 1.0), (2, 1, 5, 0, 1.0)], text=False)
    ordered = cleaning.order_interactions(log)
    assert cleaning.drop_duplicates_of_ordered(ordered) is ordered


def test_rows_without_times_are_kept_in_the_order_of_the_file():
    log = pl.DataFrame(
        {"user_id": ["b", "a", "b"], "item_id": [1, 1, 1], "timestamp": [None] * 3},
        schema_overrides={"timestamp": pl.Int64},
    )
    ordered = cleaning.order_interactions(log)
    assert ordered["user_id"].to_list() == ["b", "b", "a"]
    assert cleaning.drop_duplicates_of_ordered(ordered).height == 3


@pytest.mark.parametrize("kind", [np.uint32, np.int64])
def test_packed_sort_equals_numpys_stable_one(kind):
    keys = np.random.default_rng(0).integers(0, 50, 5000).astype(kind)
    assert np.array_equal(cleaning._stable_order(keys), np.argsort(keys, kind="stable"))
    if kind is np.int64:  # too wide to be packed, and negative
        wide = np.array([1 << 62, -(1 << 62), 0, 1 << 62])
        assert cleaning._stable_order(wide).tolist() == [1, 2, 0, 3]
        assert (
            cleaning._stable_order(keys - 10**6).tolist()
            == np.argsort(keys, kind="stable").tolist()
        )


def test_chunks_make_no_difference(monkeypatch):
    rng = np.random.default_rng(0)
    log = pl.DataFrame(
        {
            "user_id": rng.integers(0, 30, 500),
            "item_id": rng.integers(0, 5, 500),
            "timestamp": rng.integers(0, 9, 500),
            "rating": rng.random(500),
        }
    )
    whole = cleaning.order_interactions(log)
    monkeypatch.setattr(cleaning, "_CHUNK", 7)
    assert cleaning.order_interactions(log).equals(whole)
