"""Order, duplicates, thresholds, k-core and numbering of the catalogue."""

from __future__ import annotations

import logging

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data import cleaning
from genrec.data.readers import SUBSECOND, RawData


def log_of(rows: list[tuple], **more: list) -> pl.DataFrame:
    """Rows of (user, item, time, rating)."""
    schema = {
        "user_id": pl.String,
        "item_id": pl.String,
        "timestamp": pl.Int64,
        "rating": pl.Float64,
    }
    table = pl.DataFrame([(*row, None, None)[:4] for row in rows], schema=schema, orient="row")
    return table.with_columns([pl.Series(name, values) for name, values in more.items()])


def pairs(table: pl.DataFrame) -> list[tuple[str, str]]:
    return list(table.select("user_id", "item_id").iter_rows())


def raw(rows: list[tuple], items: str = "abcdef", users: pl.DataFrame | None = None) -> RawData:
    catalog = pl.DataFrame({"item_id": list(items), "title": [f"T{i}" for i in items]})
    return RawData(interactions=log_of(rows), catalog=catalog, users=users)


def test_order_is_time_then_file_order_and_users_keep_their_first_appearance():
    log = log_of([("z", "a", 5), ("b", "b", 1), ("z", "c", 5), ("z", "d", 2), ("b", "e", 0)])
    ordered = cleaning.order_interactions(log)
    assert pairs(ordered) == [("z", "d"), ("z", "a"), ("z", "c"), ("b", "e"), ("b", "b")]
    assert ordered["position"].to_list() == [0, 1, 2, 0, 1]


def test_order_uses_what_is_finer_than_a_second():
    log = log_of([("u", "late", 7), ("u", "early", 7)], **{SUBSECOND: [900_000, 100_000]})
    assert [item for _, item in pairs(cleaning.order_interactions(log))] == ["early", "late"]
    assert cleaning.last_two_tie_share(cleaning.order_interactions(log)) == 0.0


def test_without_times_the_file_order_counts():
    log = log_of([("u", "c"), ("v", "a"), ("u", "a"), ("u", "b")])
    assert pairs(cleaning.order_interactions(log)) == [
        ("u", "c"), ("u", "a"), ("u", "b"), ("v", "a"),
    ]  # fmt: skip


def test_some_times_missing_is_refused():
    with pytest.raises(ValueError, match="1 of 2 interactions have no timestamp"):
        cleaning.order_interactions(log_of([("u", "a", 3), ("u", "b", None)]))


def test_exact_duplicates_go_but_repeats_stay():
    log = log_of([("u", "a", 1, 5.0), ("u", "a", 1, 4.0), ("u", "a", 2), ("v", "a", 1)])
    kept = cleaning.drop_duplicates(log)
    assert kept["timestamp"].to_list() == [1, 2, 1]
    assert kept["rating"][0] == 5.0  # the first one is kept
    untimed = log_of([("u", "a"), ("u", "a")])
    assert cleaning.drop_duplicates(untimed).height == 2


def test_of_exact_duplicates_the_heaviest_is_kept_and_the_first_of_those():
    log = log_of(
        [("u", "a", 1), ("u", "b", 1), ("u", "a", 1), ("u", "a", 1), ("u", "b", 1), ("u", "a", 2)],
        weight=[0.2, 1.0, 1.0, 1.0, 0.5, 0.1],
        event=["view", "buy", "buy", "gift", "cart", "view"],
    )
    kept = cleaning.drop_duplicates(log)
    assert kept.select("item_id", "event", "timestamp").rows() == [
        ("b", "buy", 1), ("a", "buy", 1), ("a", "view", 2),
    ]  # fmt: skip
    untimed = log.with_columns(timestamp=pl.lit(None, dtype=pl.Int64))
    assert cleaning.drop_duplicates(untimed).height == 6


def test_optional_columns_stay_with_their_rows():
    log = log_of(
        [("u", "c", 3), ("v", "a", 5), ("u", "a", 1), ("u", "b", 2)],
        review=["third", "other", None, "second"],
        query=["q3", "q", "q1", "q2"],
        event=["view", "buy", "buy", "view"],
    )
    catalog = pl.DataFrame({"item_id": list("abc"), "title": list("ABC")})
    made = cleaning.clean(RawData(log, catalog, None), event_weights={"view": 0.5, "buy": 1.0})
    assert made.interactions.columns == [
        "user_id", "item_id", "item_index", "timestamp", "rating", "position", "event", "weight",
        "review", "query",
    ]  # fmt: skip
    assert made.interactions.select("item_id", "position", "event", "weight", "review").rows() == [
        ("a", 0, "buy", 1.0, None), ("b", 1, "view", 0.5, "second"), ("c", 2, "view", 0.5, "third"),
        ("a", 0, "buy", 1.0, "other"),
    ]  # fmt: skip
    fewer = cleaning.clean(RawData(log, catalog, None), event_weights={"view": 0.0, "*": 1.0})
    assert pairs(fewer.interactions) == [("v", "a"), ("u", "a")]
    assert fewer.dropped == {"zero_weight": 2}


def test_the_mean_of_the_ratings_is_taken_in_the_order_of_time():
    """In file order the 5 would come first, and the 3 would lie below the mean."""
    rows = [("u", "a", 9, 5.0), ("u", "b", 1, 3.0), ("u", "c", 2, 2.0), ("u", "c", 2, 2.0)]
    made = cleaning.clean(raw(rows), rating_rule="above-user-mean")
    assert pairs(made.interactions) == [("u", "b"), ("u", "a")]
    assert made.dropped == {"duplicates": 1, "below_user_mean": 1}
    assert made.interactions["position"].to_list() == [0, 1]
    with pytest.raises(ValueError, match="min_rating belongs to rating_rule: at-least"):
        cleaning.clean(raw(rows), rating_rule="at-least")


def test_collapse_keeps_the_first_of_consecutive_repeats():
    log = log_of([("u", i, t) for t, i in enumerate("aabba")] + [("v", "a", 9), ("v", "a", 10)])
    collapsed = cleaning.collapse_repeats(cleaning.order_interactions(log))
    assert pairs(collapsed) == [("u", "a"), ("u", "b"), ("u", "a"), ("v", "a")]
    assert collapsed["position"].to_list() == [0, 1, 2, 0]


def test_k_core_is_iterated():
    # Dropping z (1 purchase) leaves item c with 1, which then leaves user w with 1.
    log = log_of(
        [("u", "a"), ("u", "b"), ("v", "a"), ("v", "b"), ("w", "a"), ("w", "c"), ("z", "c")]
    )
    core = cleaning.k_core(log, min_user=2, min_item=2)
    assert pairs(core) == [("u", "a"), ("u", "b"), ("v", "a"), ("v", "b")]
    assert cleaning.k_core(log).height == log.height
    with pytest.raises(ValueError, match="min_user=3, min_item=3 leaves nothing of 7"):
        cleaning.k_core(log, 3, 3)
    with pytest.raises(ValueError, match="min_item=0 must be at least 1"):
        cleaning.k_core(log, 1, 0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("abcde")), min_size=1),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_k_core_is_the_largest_one(rows, min_user, min_item):
    log = log_of(rows)
    left = rows
    while True:  # the definition, one interaction at a time
        users, items = [u for u, _ in left], [i for _, i in left]
        keep = [
            (u, i) for u, i in left if users.count(u) >= min_user and items.count(i) >= min_item
        ]
        if keep == left:
            break
        left = keep
    if left:
        assert pairs(cleaning.k_core(log, min_user, min_item)) == left
    else:
        with pytest.raises(ValueError, match="leaves nothing"):
            cleaning.k_core(log, min_user, min_item)


def test_tie_share_counts_users_whose_last_two_share_a_time():
    log = log_of(
        [("u", "a", 1), ("u", "b", 2), ("u", "c", 2), ("v", "a", 1), ("v", "b", 3), ("w", "a", 1)]
    )
    assert cleaning.last_two_tie_share(log) == 0.5  # w has one interaction only
    assert cleaning.last_two_tie_share(log_of([("u", "a"), ("u", "b")])) is None


def test_catalogue_is_sorted_and_completed(caplog):
    table = pl.DataFrame(
        {"item_id": [30, 4, 7], "title": [" Lamp ", None, "  "], "brand": ["", "B", None]}
    )
    with caplog.at_level(logging.WARNING):
        catalog = cleaning.index_catalog(table)
    assert catalog["item_id"].to_list() == [4, 7, 30]
    assert catalog["item_index"].to_list() == [0, 1, 2]
    assert catalog["title"].to_list() == ["Item 4", "Item 7", "Lamp"]
    assert catalog["brand"].to_list() == ["B", None, None]
    assert catalog["categories"].to_list() == [[], [], []]
    assert catalog.schema["price"] == pl.Float64
    assert catalog["description"].null_count() == 3
    assert "2 of 3 items have no title" in caplog.text


def test_clean_numbers_everything_and_says_what_it_dropped():
    users = pl.DataFrame({"user_id": ["x", "v", "u"], "age": [1, 2, 3]})
    rows = [
        ("u", "c", 3),
        ("u", "a", 1),
        ("u", "a", 1),
        ("v", "a", 5),
        ("v", "c", 6),
        ("w", "b", 1),
    ]
    data = cleaning.clean(raw(rows, users=users), min_user=2)
    assert pairs(data.interactions) == [("u", "a"), ("u", "c"), ("v", "a"), ("v", "c")]
    assert data.interactions["item_index"].to_list() == [0, 2, 0, 2]
    assert data.interactions["position"].to_list() == [0, 1, 0, 1]
    assert data.dropped == {"duplicates": 1, "k_core": 1}
    assert data.catalog.height == 6  # no k-core on items: those without purchases stay
    assert data.users is not None
    assert data.users["user_id"].to_list() == ["u", "v"]
    assert data.users["age"].to_list() == [3, 2]
    assert data.interactions.columns == [
        "user_id", "item_id", "item_index", "timestamp", "rating", "position",
    ]  # fmt: skip
    smaller = cleaning.clean(raw(rows), min_item=2)
    assert smaller.catalog["item_id"].to_list() == ["a", "c"]


def test_sample_of_users_is_the_same_for_a_seed():
    rows = [(f"u{i:02d}", item, t) for i in range(40) for t, item in enumerate("abc")]
    data = cleaning.clean(raw(rows))
    one, two = (cleaning.sample_users(data, 10, seed=3) for _ in range(2))
    assert one.interactions.equals(two.interactions)
    assert one.interactions["user_id"].n_unique() == 10
    assert one.interactions.height == 30
    assert one.catalog.equals(data.catalog)
    assert one.dropped["limit_users"] == 90
    other = cleaning.sample_users(data, 10, seed=4)
    assert set(other.interactions["user_id"]) != set(one.interactions["user_id"])
    assert cleaning.sample_users(data, 40) is data
    with pytest.raises(ValueError, match="limit_users=0"):
        cleaning.sample_users(data, 0)
