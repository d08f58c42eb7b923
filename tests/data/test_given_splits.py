"""Given rows: places, the log that training rows imply, split rows, and the check for leaks."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given as property_of
from hypothesis import settings
from hypothesis import strategies as st

from genrec.data.cleaning import clean, sample_users
from genrec.data.given_splits import given_splits, implied_log, target_places
from genrec.data.leaks import check_splits
from genrec.data.readers import RawData
from genrec.data.splits import Splits

SCHEMA = {"user_id": pl.String, "history": pl.List(pl.String), "item_id": pl.String,
    "timestamp": pl.Int64}  # fmt: skip
# Histories were cut at 3 items. u has all of its rows, w none of train, v misses one.
ROWS = {
    "train": [("u", "a", "b", 1), ("v", "c", "a", 1), ("u", "ab", "c", 2), ("u", "abc", "d", 3)],
    "valid": [("u", "bcd", "a", 5), ("v", "cab", "c", 5), ("w", "d", "e", 6)],
    "test": [("u", "cda", "e", 7), ("v", "abc", "b", 8), ("v", "abc", "b", 8)],
}


def tables_of(rows: dict[str, list[tuple]] | None = None) -> dict[str, pl.DataFrame]:
    """Rows of (user, letters of the history, target, time)."""
    return {
        name: pl.DataFrame(
            [(u, list(h), t, time) for u, h, t, time in part], schema=SCHEMA, orient="row"
        )
        for name, part in (rows or ROWS).items()
    }


def raw(rows: dict[str, list[tuple]] | None = None) -> RawData:
    log = pl.DataFrame(schema={"user_id": pl.String, "item_id": pl.String, "timestamp": pl.Int64,
        "rating": pl.Float64})  # fmt: skip
    return RawData(log, pl.DataFrame({"item_id": list("abcde")}), None, tables_of(rows))


def splits_of(rows: dict[str, list[tuple]] | None = None, **settings: int) -> Splits:
    data = clean(raw(rows))
    assert data.given is not None
    return given_splits(data.given, data.interactions, data.catalog, **settings)


def check(splits: Splits, n_items: int = 5) -> None:
    check_splits(splits.train, splits.valid, splits.test, pl.DataFrame(), "given", n_items)


def test_a_place_is_the_length_of_a_whole_history_and_counts_on_from_the_longest():
    places = target_places(tables_of())
    assert places["train"].tolist() == [1, 1, 2, 3]
    assert places["valid"].tolist() == [4, 3, 1]
    assert places["test"].tolist() == [5, 4, 5]


def assert_targets_stand_in_the_log(splits: Splits, log: pl.DataFrame) -> None:
    """Who reads the log at a training row's position finds its target."""
    there = splits.train.join(
        log, left_on=["user_id", "target_position"], right_on=["user_id", "position"], how="left",
        maintain_order="left",
    )  # fmt: skip
    assert there["item_index"].equals(splits.train["target_item_index"], check_names=False)


def test_the_training_rows_imply_a_log_and_held_out_rows_add_nothing():
    log = implied_log(tables_of())
    assert list(log.iter_rows()) == [
        ("u", "a", 1, 0), ("u", "b", 1, 1), ("u", "c", 2, 2), ("u", "d", 3, 3),
        ("v", "c", 1, 0), ("v", "a", 1, 1),
    ]  # fmt: skip
    other = {**ROWS, "valid": ROWS["valid"][:1], "test": [("w", "cde", "e", 9)]}
    assert implied_log(tables_of(other)).equals(log)


def test_times_of_the_log_are_known_for_all_or_for_none():
    rows = {**ROWS, "train": [("u", "a", "b", 3), ("u", "ab", "c", 2)]}
    assert implied_log(tables_of(rows))["timestamp"].to_list() == [None] * 3
    rows = {**ROWS, "train": [("u", "a", "b", None), ("u", "ab", "c", 2)]}
    assert implied_log(tables_of(rows))["timestamp"].to_list() == [2, 2, 2]
    rows = {**ROWS, "train": [("u", "a", "b", 1), ("u", "ab", "c", None)]}
    assert implied_log(tables_of(rows))["timestamp"].to_list() == [None] * 3


def test_places_that_are_missing_are_closed():
    rows = {**ROWS, "train": [("u", "", "b", 1), ("u", "abd", "c", 4)]}
    log = implied_log(tables_of(rows))
    assert log["item_id"].to_list() == ["b", "b", "d", "c"]
    assert log["position"].to_list() == [0, 1, 2, 3]
    # As if an item had been erased from between: u's row of three items had four.
    rows = {**ROWS, "train": [("u", "", "b", 1), ("v", "abcd", "e", 3), ("u", "cd", "e", 4)]}
    rows["train"][0:0] = [("u", "abcd", "a", 2)]
    splits = splits_of(rows)
    assert_targets_stand_in_the_log(splits, clean(raw(rows)).interactions)


def test_rows_stay_as_they_are_given():
    splits = splits_of()
    assert splits.protocol == "given"
    assert splits.train.columns == [
        "row_id", "user_id", "history_item_index", "target_item_index", "supervise_from",
        "target_timestamp", "target_position",
    ]  # fmt: skip
    assert splits.train.row(3) == ("train-000003", "u", [0, 1, 2], 3, 3, 3, 3)
    assert splits.test["row_id"].to_list() == ["test-000000", "test-000001", "test-000002"]
    assert splits.valid.row(0, named=True) == {
        "row_id": "valid-000000", "user_id": "u", "history_item_index": [1, 2, 3],
        "target_item_index": 0, "supervise_from": 3, "target_timestamp": 5, "target_position": 4,
        "seen_item_index": [1, 2, 3],
    }  # fmt: skip
    assert splits.train.schema["history_item_index"] == pl.List(pl.Int32)
    assert splits.train_count.tolist() == [2, 1, 2, 1, 0]
    assert splits.train_only_users == 0
    assert splits.shares == {"train": 0.4, "valid": 0.3, "test": 0.3}
    assert splits.boundaries == {
        "valid_from": "1970-01-01T00:00:05+00:00", "test_from": "1970-01-01T00:00:07+00:00",
    }  # fmt: skip
    check(splits)
    assert_targets_stand_in_the_log(splits, clean(raw()).interactions)


def test_a_history_is_cut_but_what_was_seen_is_not():
    rows = {**ROWS, "test": [("u", "aac", "e", 7)]}
    splits = splits_of(rows, max_history=2)
    row = splits.test.row(0, named=True)
    assert (row["history_item_index"], row["supervise_from"]) == ([0, 2], 2)
    assert (row["seen_item_index"], row["target_position"]) == ([0, 2], 5)
    assert splits.train["history_item_index"].to_list() == [[0], [2], [0, 1], [1, 2]]
    assert splits.train["supervise_from"].to_list() == [1, 1, 2, 2]
    check(splits)


def test_held_out_rows_need_a_history():
    rows = {**ROWS, "valid": [*ROWS["valid"], ("x", "", "a", 6)]}
    splits = splits_of(rows)
    assert splits.dropped == {"valid_without_history": 1, "test_without_history": 0}
    assert splits.valid["row_id"].to_list() == ["valid-000000", "valid-000001", "valid-000002"]
    splits = splits_of(rows, min_history=2)
    assert splits.dropped == {
        "valid_without_history": 1, "valid_short_history": 1, "test_without_history": 0,
        "test_short_history": 0,
    }  # fmt: skip
    assert splits.valid["row_id"].to_list() == ["valid-000000", "valid-000001"]
    with pytest.raises(ValueError, match="valid part .* no rows with a history of 9 or more"):
        splits_of(rows, min_history=9)


def test_times_may_be_missing():
    rows = {name: [(u, h, t, None) for u, h, t, _ in part] for name, part in ROWS.items()}
    splits = splits_of(rows)
    assert splits.boundaries == {}
    assert splits.train["target_timestamp"].null_count() == 4
    check(splits)


def test_an_item_that_the_catalogue_lacks():
    rows = {**ROWS, "valid": [("u", "az", "b", 5)]}
    with pytest.raises(ValueError, match="the valid rows hold item 'z', which the catalogue lacks"):
        splits_of(rows)


def test_given_rows_are_not_cleaned():
    for rule in ({"min_rating": 3.0}, {"min_user": 2}, {"collapse": True}, {"event_weights": {}}):
        with pytest.raises(ValueError, match="a given split is taken as it is"):
            clean(raw(), **rule)


def test_a_sample_of_users_is_one_of_all_parts():
    data = sample_users(clean(raw()), 1, seed=0)
    assert data.given is not None
    users = pl.concat([table["user_id"] for table in data.given.values()]).unique()
    assert len(users) == 1
    assert set(data.interactions["user_id"]) <= set(users)


SEQUENCES = st.lists(
    st.lists(st.sampled_from("abcde"), min_size=2, max_size=9), min_size=1, max_size=5
)


@settings(max_examples=50, deadline=None)
@property_of(SEQUENCES, st.integers(2, 4))
def test_places_and_log_are_those_of_the_sequences_that_rows_were_cut_from(sequences, cut):
    """With all rows at hand nothing is guessed."""
    rows: dict[str, list[tuple]] = {"train": [], "valid": [], "test": []}
    true: dict[str, list[int]] = {"train": [], "valid": [], "test": []}
    for user, items in enumerate(sequences):
        for place in range(1, len(items)):
            part = ("train", "valid", "test")[max(0, place - len(items) + 3)]
            history = "".join(items[max(0, place - cut) : place])
            rows[part].append((f"u{user}", history, items[place], place))
            true[part].append(place)
    tables = tables_of(rows)
    assert {n: p.tolist() for n, p in target_places(tables).items()} == true
    log = implied_log(tables)
    for user, items in enumerate(sequences):
        mine = log.filter(pl.col("user_id") == f"u{user}")
        expected = items[:-2] if len(items) > 3 else []
        assert mine["item_id"].to_list() == expected
        assert mine["position"].to_list() == list(range(len(expected)))


def put(splits: Splits, name: str, row: int, **values) -> None:
    """Replace values of one row."""
    table = getattr(splits, name)
    for column, value in values.items():
        changed = table[column].to_list()
        changed[row] = value
        table = table.with_columns(pl.Series(column, changed, dtype=table.schema[column]))
    object.__setattr__(splits, name, table)


@pytest.mark.parametrize(
    ("name", "row", "values", "message"),
    [
        ("valid", 0, {"row_id": "train-000000"}, "2 rows share a row_id"),
        ("test", 1, {"target_item_index": 5}, "'test-000001'.*target_item_index holds 5"),
        ("test", 1, {"history_item_index": [1, -1, 0]}, "history_item_index holds -1"),
        ("train", 2, {"supervise_from": 0}, "'train-000002'.*supervised from 0, but holds .* of 2"),
        ("train", 3, {"target_timestamp": 5}, "'train-000003'.*of second 5, but valid starts"),
        ("valid", 2, {"target_timestamp": 8}, "'valid-000002'.*of second 8, but test starts"),
        ("test", 0, {"seen_item_index": [0, 2]}, "'test-000000'.*lacks item 3 of its history"),
        ("test", 0, {"seen_item_index": [0, 2, 3, 3]}, "holds an item twice"),
    ],
)  # fmt: skip
def test_rows_that_leak(name: str, row: int, values: dict, message: str):
    splits = splits_of()
    put(splits, name, row, **values)
    with pytest.raises(ValueError, match=message):
        check(splits)


def test_a_validation_target_of_the_second_in_which_test_starts_is_a_cut_between_rows():
    splits = splits_of()
    put(splits, "valid", 2, target_timestamp=7)
    check(splits)


@pytest.mark.parametrize("held_out", ["valid", "test"])
def test_a_training_row_that_is_a_held_out_row(held_out: str):
    rows = {name: [(u, h, t, None) for u, h, t, _ in part] for name, part in ROWS.items()}
    rows["train"] = [*rows["train"], rows[held_out][1]]
    with pytest.raises(ValueError, match=f"'train-000004'.*row '{held_out}-000001' evaluates"):
        check(splits_of(rows))
    # The same choice after the same history at another time is another interaction.
    again = {**ROWS, "train": [*ROWS["train"], (*ROWS[held_out][1][:3], 4)]}
    check(splits_of(again))


def test_industrial(genrec_data: Path):
    """The published rows as they are; nothing in the 27% of training rows leaks."""
    from genrec.data.readers import read_minionerec

    folder = genrec_data / "amazon2018-industrial"
    data = clean(read_minionerec(folder, train=folder / "train_partial.jsonl"))
    assert data.given is not None
    splits = given_splits(data.given, data.interactions, data.catalog)
    assert (splits.train.height, splits.valid.height, splits.test.height) == (9_957, 4_532, 4_533)
    assert data.catalog.height == 3_686
    check(splits, 3_686)
    assert_targets_stand_in_the_log(splits, data.interactions)
    assert splits.boundaries == {
        "valid_from": "2017-05-19T00:00:00+00:00", "test_from": "2017-11-19T00:00:00+00:00",
    }  # fmt: skip
    cold = (splits.train_count[splits.test["target_item_index"].to_numpy()] == 0).mean()
    assert cold == pytest.approx(0.1209, abs=5e-5)
    assert data.interactions["user_id"].n_unique() == 2_625
