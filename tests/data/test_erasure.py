"""Opt-out lists: what is on them leaves every table, and nothing names what was on them."""

from __future__ import annotations

import logging
from pathlib import Path

import polars as pl
import pytest

from genrec.data.erasure import Erased, erase, read_ids
from genrec.data.readers import RawData


def raw(integers: bool = False, given: bool = False) -> RawData:
    def ids(values):
        return [int(v) for v in values] if integers else list(values)

    users, items = ids("112233"), ids("787978")
    log = pl.DataFrame({"user_id": users, "item_id": items}).with_columns(
        pl.lit(None, dtype=pl.Int64).alias("timestamp"),
        pl.lit(None, dtype=pl.Float64).alias("rating"),
    )
    catalog = pl.DataFrame({"item_id": ids("789"), "title": ["T7", "T8", "T9"]})
    people = pl.DataFrame({"user_id": ids("123"), "age": [20, 30, 40]})
    tables = None
    if given:
        row = {"user_id": ids("112"), "history": [ids("7"), ids("78"), ids("8")],
               "item_id": ids("879"), "timestamp": [1, 2, 3]}  # fmt: skip
        tables = {name: pl.DataFrame(row) for name in ("train", "valid", "test")}
    return RawData(log, catalog, people, tables)


@pytest.mark.parametrize("integers", [False, True])
def test_users_leave_the_log_and_the_user_table(integers: bool):
    left, found = erase(raw(integers), users=pl.Series(["2", "9"]))
    assert [str(u) for u in left.interactions["user_id"]] == ["1", "1", "3", "3"]
    assert left.users is not None
    assert left.users["age"].to_list() == [20, 40]
    assert left.catalog.height == 3
    assert found == {"users": Erased(listed=2, matched=1, interactions=2)}


def test_items_leave_the_log_and_the_catalogue():
    left, found = erase(raw(), items=pl.Series(["7"]))
    assert left.interactions["item_id"].to_list() == ["8", "9", "8"]
    assert left.catalog["item_id"].to_list() == ["8", "9"]
    assert found == {"items": Erased(1, 1, 3)}


def test_both_lists_count_what_each_took():
    _, found = erase(raw(), users=pl.Series(["1"]), items=pl.Series(["7"]))
    assert found == {"users": Erased(1, 1, 2), "items": Erased(1, 1, 2)}


def test_given_rows_lose_users_targets_and_history_items():
    left, found = erase(raw(given=True), items=pl.Series(["7"]))
    assert left.given is not None
    train = left.given["train"]
    assert train["user_id"].to_list() == ["1", "2"]  # the row whose target was 7 is gone
    assert train["history"].to_list() == [[], ["8"]]
    assert found["items"].interactions == 3  # a row of each part
    left, _ = erase(raw(given=True, integers=True), users=pl.Series(["1"]))
    assert left.given is not None
    assert left.given["test"]["user_id"].to_list() == [2]


def test_nothing_that_is_listed_is_logged(caplog):
    with caplog.at_level(logging.DEBUG):
        erase(raw(), users=pl.Series(["2", "nobody-x"]))
    assert "1 of 2 ids match nothing" in caplog.text
    assert "nobody-x" not in caplog.text


def test_padded_ids_of_a_database_are_erased_too():
    data = raw(given=True)
    padded = pl.col("user_id") + "    "
    data = RawData(
        data.interactions.with_columns(padded),
        data.catalog,
        data.users.with_columns(padded) if data.users is not None else None,
        {name: table.with_columns(padded) for name, table in (data.given or {}).items()},
    )
    left, found = erase(data, users=pl.Series(["2"]))
    assert left.interactions["user_id"].str.strip_chars().to_list() == ["1", "1", "3", "3"]
    assert left.users is not None and left.users["age"].to_list() == [20, 40]
    assert left.given is not None and found["users"].matched == 1
    assert left.given["train"]["user_id"].to_list() == ["1    ", "1    "]


def test_an_id_is_the_whole_id():
    """ "1" is not "11", and no pattern either."""
    left, found = erase(raw(), users=pl.Series(["11", ".", "01", "1 "]))
    assert left.interactions.height == 6
    assert found["users"].matched == 0


def test_erasing_everything_is_refused():
    with pytest.raises(ValueError, match="leave no interactions"):
        erase(raw(), users=pl.Series(["1", "2", "3"]))


def test_no_list_no_report():
    tables = raw()
    assert erase(tables) == (tables, {})


def test_lists_in_every_form(tmp_path: Path):
    text = tmp_path / "gone.txt"
    text.write_bytes("\ufeffa1\r\n  b2 \r\n\r\na1\r\nTürü x\r\n".encode())
    assert read_ids(text, ["user_id"]).to_list() == ["a1", "b2", "Türü x"]
    (tmp_path / "none.txt").write_text("\n\n")
    assert read_ids(tmp_path / "none.txt", ["user_id"]).to_list() == []
    table = tmp_path / "gone.csv"
    table.write_text("when,customer\n2024,007\n2025,7\n2025,7\n")
    assert read_ids(table, ["customer", "user_id"]).to_list() == ["007", "7"]
    pl.DataFrame({"user_id": [3, 3, 4], "customer": ["x", "y", "z"]}).write_parquet(
        tmp_path / "gone.parquet"
    )
    assert read_ids(tmp_path / "gone.parquet", ["user_id", "customer"]).to_list() == ["3", "4"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids.json", b"[1]", "must end in .txt, .csv, .parquet"),
        ("ids.csv", b"who\nsecret-1\n", "has no column customer or user_id; its 1 columns"),
        ("ids.csv", b"user_id,x\nsecret-1,2\n,3\n", "1 of 2 ids are missing"),
        ("ids.txt", b"secret-1\n\xff\xfe", "can't be read as .txt"),
        ("ids.parquet", b"secret-1", "can't be read as .parquet"),
        ("ids.csv", b"", "can't be read as .csv"),
    ],
)
def test_lists_that_cannot_be_read_are_not_quoted(tmp_path: Path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_ids(path, ["customer", "user_id"])
    assert "secret-1" not in str(caught.value)
