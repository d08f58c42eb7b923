"""The split linter: sound splits pass, and each way to leak is found and named."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl
import pytest

from genrec.data.leaks import check_splits
from genrec.data.splits import leave_one_out
from genrec.data.time_splits import global_time, time_cutoff

N_ITEMS = 12
# Users a (12 items, one a day), b (6, from day 5 on), c (6, from day 6 on, item 0 again).
ITEMS = {"a": list(range(12)), "b": [3, 1, 4, 1, 5, 9], "c": [0, 2, 0, 6, 0, 7]}
START = {"a": 0, "b": 5, "c": 6}


@dataclass
class Case:
    """A split whose tables a test may spoil."""

    protocol: str
    log: pl.DataFrame
    tables: dict[str, pl.DataFrame]

    def check(self, n_items: int = N_ITEMS) -> None:
        check_splits(**self.tables, interactions=self.log, protocol=self.protocol, n_items=n_items)

    def put(self, split: str, row: int, **values) -> None:
        """Replace values of one row."""
        table = self.tables[split]
        for name, value in values.items():
            column = table[name].to_list()
            column[row] = value
            table = table.with_columns(pl.Series(name, column, dtype=table.schema[name]))
        self.tables[split] = table


def case(protocol: str) -> Case:
    log = pl.DataFrame(
        [
            {"user_id": u, "item_index": i, "timestamp": START[u] + place, "position": place}
            for u, items in ITEMS.items()
            for place, i in enumerate(items)
        ],
        schema_overrides={"item_index": pl.Int32, "position": pl.Int32},
    )
    splits = {
        "leave-one-out": lambda: leave_one_out(log, N_ITEMS, 4),
        "global-time": lambda: global_time(log, N_ITEMS, 4, (0.6, 0.2, 0.2)),
        "time-cutoff": lambda: time_cutoff(log, N_ITEMS, 7, 9, max_history=4),
    }[protocol]()
    tables = {"train": splits.train, "valid": splits.valid, "test": splits.test}
    return Case(protocol, log, tables)


PROTOCOLS = ("leave-one-out", "global-time", "time-cutoff")


@pytest.fixture(params=PROTOCOLS)
def any_case(request) -> Case:
    return case(request.param)


def test_sound_splits_pass(any_case: Case):
    any_case.check()
    assert any_case.tables["test"].height >= 3


def test_repeated_row_ids(any_case: Case):
    any_case.put("valid", 0, row_id=any_case.tables["train"]["row_id"][0])
    with pytest.raises(ValueError, match="2 rows share a row_id, for example 'train-000000'"):
        any_case.check()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("target_item_index", 12),
        ("target_item_index", -1),
        ("history_item_index", [1, 99]),
        ("seen_item_index", [-5]),
        ("seen_item_index", None),
    ],
)
def test_items_outside_the_catalogue(any_case: Case, column: str, value):
    any_case.put("test", 1, **{column: value})
    wrong = value[-1] if isinstance(value, list) else value
    message = f"'test-000001'.*{column} holds {wrong}, which is no row of the catalogue of 12"
    with pytest.raises(ValueError, match=message):
        any_case.check()


def test_a_history_that_holds_the_target(any_case: Case):
    row = any_case.tables["test"].row(0, named=True)
    # a's target is later than every item of the history and new to a.
    assert row["user_id"] == "a"
    target = row["target_item_index"]
    any_case.put("test", 0, history_item_index=[*row["history_item_index"][1:], target])
    with pytest.raises(ValueError, match=rf"'test-000000' \(user 'a'\).*item {target}.*first had"):
        any_case.check()


def test_a_history_that_looks_one_item_ahead(any_case: Case):
    """All items in their order, but one place too late."""
    row = any_case.tables["valid"].row(0, named=True)
    position = row["target_position"]
    ahead = ITEMS["a"][position - 3 : position + 1]
    any_case.put("valid", 0, history_item_index=ahead)
    with pytest.raises(ValueError, match=f"'valid-000000'.*holds item {ahead[-1]}.*first had"):
        any_case.check()


def test_a_history_in_another_order(any_case: Case):
    history = any_case.tables["test"]["history_item_index"][0].to_list()
    any_case.put("test", 0, history_item_index=history[::-1])
    with pytest.raises(ValueError, match=f"last items before the target are .{history[0]}, "):
        any_case.check()


def test_a_history_of_somebody_else(any_case: Case):
    table = any_case.tables["test"]
    b = table["user_id"].to_list().index("b")
    width = len(table["history_item_index"][b])
    any_case.put("test", b, history_item_index=[11] * width)
    with pytest.raises(ValueError, match="user 'b'.*item 11.*the user never had it"):
        any_case.check()


def test_a_history_longer_than_the_past(any_case: Case):
    any_case.put("train", 0, history_item_index=[0, 1, 2, 3, 4, 5, 6])
    with pytest.raises(ValueError, match="'train-000000'.*its history holds 7 items"):
        any_case.check()


def test_seen_items_that_hold_the_target(any_case: Case):
    row = any_case.tables["test"].row(0, named=True)
    any_case.put("test", 0, seen_item_index=[*row["seen_item_index"], row["target_item_index"]])
    with pytest.raises(ValueError, match="seen_item_index holds item.*did not have before.*first"):
        any_case.check()


def test_seen_items_that_swap_one_for_a_later_one(any_case: Case):
    """The number of items stays right."""
    row = any_case.tables["test"].row(0, named=True)
    seen = [*row["seen_item_index"][1:], row["target_item_index"]]
    any_case.put("test", 0, seen_item_index=seen)
    with pytest.raises(ValueError, match="seen_item_index holds item"):
        any_case.check()


def test_seen_items_that_lack_one_or_repeat_one(any_case: Case):
    sound = any_case.tables["test"]
    seen = sound["seen_item_index"][0].to_list()
    any_case.put("test", 0, seen_item_index=seen[1:])
    with pytest.raises(ValueError, match="'test-000000'.*lacks item 0, which the user had before"):
        any_case.check()
    any_case.tables["test"] = sound
    any_case.put("test", 0, seen_item_index=[seen[1], *seen[1:]])
    with pytest.raises(ValueError, match="holds an item twice"):
        any_case.check()


def test_a_target_that_stands_elsewhere_in_the_log(any_case: Case):
    any_case.put("test", 0, target_item_index=3)
    with pytest.raises(ValueError, match="its target is item 3 at .*, the log has item"):
        any_case.check()


def test_a_target_of_another_time(any_case: Case):
    any_case.put("train", 0, target_timestamp=10**9)
    with pytest.raises(ValueError, match="its target is item .* at 1000000000, the log has item"):
        any_case.check()


def test_a_stranger_and_a_place_that_is_not_there(any_case: Case):
    any_case.put("test", 0, target_position=12)
    with pytest.raises(ValueError, match="target_position 12 is outside its 12 items"):
        any_case.check()
    any_case.put("test", 0, user_id="z")
    with pytest.raises(ValueError, match="'z'.*the user is not in the interactions"):
        any_case.check()


def held_out_as_train(made: Case, split: str) -> None:
    """Append a held-out row to the training rows."""
    row = made.tables[split][:1].select(made.tables["train"].columns)
    row = row.with_columns(pl.lit("train-000099").alias("row_id"))
    made.tables["train"] = pl.concat([made.tables["train"], row])


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_training_row_that_supervises_a_held_out_target(any_case: Case, split: str):
    held_out_as_train(any_case, split)
    with pytest.raises(ValueError, match="train row 'train-000099'.*holds out position"):
        any_case.check()


def test_a_row_that_is_evaluated_twice():
    made = case("global-time")
    again = made.tables["test"][:1].with_columns(pl.lit("test-000099").alias("row_id"))
    made.tables["test"] = pl.concat([made.tables["test"], again])
    with pytest.raises(ValueError, match="'test-000000' and 'test-000099' evaluate the same"):
        made.check()


def test_leave_one_out_holds_out_the_last_places():
    made = case("leave-one-out")
    made.tables["valid"], made.tables["test"] = (
        made.tables["test"].with_columns(pl.col("row_id").str.replace("test", "x")),
        made.tables["valid"],
    )
    with pytest.raises(ValueError, match="its target is not the user's last but one interaction"):
        made.check()


def test_leave_one_out_is_no_split_by_time():
    made = case("leave-one-out")
    made.protocol = "global-time"
    with pytest.raises(ValueError, match="its target is of second .*, but valid starts at second"):
        made.check()


def test_a_training_user_who_is_not_evaluated_may_not_come_later():
    """Only time tells: the user has no held-out row."""
    made = case("global-time")
    start = made.tables["valid"]["target_timestamp"].min()
    late = {"user_id": "d", "item_index": 1, "timestamp": start, "position": 0}
    made.log = pl.concat([made.log, pl.DataFrame([late], schema=made.log.schema)])
    row = {
        "row_id": "train-000099", "user_id": "d", "history_item_index": [], "target_item_index": 1,
        "supervise_from": 0, "target_timestamp": start, "target_position": 0,
    }  # fmt: skip
    schema = made.tables["train"].schema
    made.tables["train"] = pl.concat([made.tables["train"], pl.DataFrame([row], schema=schema)])
    with pytest.raises(ValueError, match="'train-000099'.*but valid starts at second"):
        made.check()


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        ("test", lambda r: r[::-1], "must begin with the target"),
        ("test", lambda r: [*r, r[0]], "holds an item twice"),
        ("test", lambda r: [*r, 0], "holds item 0, which is not of the row's period"),
        ("valid", lambda r: [*r, 9], "holds item 9, which is not of the row's period"),
        ("test", lambda r: [], "must begin with the target"),
    ],
)
def test_relevant_items_of_another_period(split: str, change, message: str):
    made = case("time-cutoff")
    relevant = made.tables[split]["relevant_item_index"][0].to_list()
    assert made.tables[split]["user_id"][0] == "a" and len(relevant) > 1
    made.put(split, 0, relevant_item_index=change(relevant))
    with pytest.raises(ValueError, match=f"'{split}-000000'.*relevant_item_index.*{message}"):
        made.check()


def test_relevant_items_belong_to_the_time_cutoff():
    made = case("time-cutoff")
    made.tables["test"] = made.tables["test"].drop("relevant_item_index")
    with pytest.raises(ValueError, match="relevant_item_index belongs to time-cutoff"):
        made.check()
    with pytest.raises(ValueError, match="protocol='random' is not known"):
        Case("random", made.log, made.tables).check()


def test_blocks_of_rows_find_the_same(any_case: Case, monkeypatch):
    """Large splits are checked block by block; the row that is named is the right one."""
    monkeypatch.setattr("genrec.data.split_rows._BLOCK", 3)
    any_case.check()
    again = case(any_case.protocol)
    assert all(again.tables[name].equals(any_case.tables[name]) for name in again.tables)
    last = any_case.tables["test"].height - 1
    row = any_case.tables["test"].row(last, named=True)
    history = list(row["history_item_index"])
    history[-1] = 11
    any_case.put("test", last, history_item_index=history)
    with pytest.raises(ValueError, match=f"'{row['row_id']}'.*holds item 11"):
        any_case.check()
    any_case.put("test", last, history_item_index=row["history_item_index"])
    any_case.put("test", last, seen_item_index=sorted({*row["seen_item_index"], 10} - {0}))
    with pytest.raises(ValueError, match=f"'{row['row_id']}'.*seen_item_index"):
        any_case.check()


def test_ids_may_be_integers(any_case: Case):
    numbers = {"a": 7, "b": 3, "c": 5}
    change = pl.col("user_id").replace_strict(numbers, return_dtype=pl.Int64)
    tables = {name: table.with_columns(change) for name, table in any_case.tables.items()}
    made = Case(any_case.protocol, any_case.log.with_columns(change), tables)
    made.check()
    made.put("test", 0, target_position=0)
    with pytest.raises(ValueError, match=r"\(user 7\)"):
        made.check()
