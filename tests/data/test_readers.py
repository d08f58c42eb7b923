"""Readers: every format, and the message of every kind of bad input."""

from __future__ import annotations

import gzip
import json
import logging
from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pytest

from genrec.data.cleaning import clean
from genrec.data.readers import SUBSECOND, read_sequences, read_table

LOG = "user_id,item_id,time,stars\nu1,7,100,5\nu2,9,300,3.5\nu1,9,200,\n"
ITEMS = "item_id,title,maker,path,price\n9,Tent,North,Out > Camp,$1,249.00\n".replace(
    "$1,249.00", '"$1,249.00"'
)
ITEMS += '7,"Lamp, small",,Home>Light > ,12.5\n'


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def tables(tmp_path: Path, log: str = LOG, items: str = ITEMS) -> tuple[Path, Path]:
    return write(tmp_path, "log.csv", log), write(tmp_path, "items.csv", items)


def times_of(tmp_path: Path, values: list[str]) -> pl.DataFrame:
    text = "user_id,item_id,t\n" + "".join(f'u,a,"{v}"\n' for v in values)
    path = write(tmp_path, "times.csv", text)
    return read_table(path, time_column="t").interactions


# Good input


def test_csv_with_a_mapping(tmp_path):
    raw = read_table(
        *tables(tmp_path),
        time_column="time",
        rating_column="stars",
        brand_column="maker",
        category_column="path",
        price_column="price",
    )
    assert raw.interactions.columns == ["user_id", "item_id", "timestamp", "rating"]
    assert raw.interactions.rows() == [
        ("u1", 7, 100, 5.0), ("u2", 9, 300, 3.5), ("u1", 9, 200, None),
    ]  # fmt: skip
    assert raw.catalog.rows() == [
        (9, "Tent", "North", ["Out", "Camp"], 1249.0),
        (7, "Lamp, small", None, ["Home", "Light"], 12.5),
    ]
    assert raw.users is None


@pytest.mark.parametrize(
    "ending", ["tsv", "csv.gz", "tsv.gz", "jsonl", "jsonl.gz", "ndjson", "parquet"]
)
def test_formats_by_file_ending(tmp_path, ending):
    table = pl.DataFrame({"user_id": ["u", "v"], "item_id": ["a", "b"], "when": [10, 20]})
    path = tmp_path / f"log.{ending}"
    if ending == "parquet":
        table.write_parquet(path)
    elif "json" in ending:
        write(tmp_path, path.name, table.write_ndjson())
    else:
        write(tmp_path, path.name, table.write_csv(separator="\t" if "tsv" in ending else ","))
    raw = read_table(path, time_column="when")
    assert raw.interactions.select("user_id", "item_id", "timestamp").rows() == table.rows()
    assert raw.catalog["item_id"].to_list() == ["a", "b"]


def test_ids_with_leading_zeros_stay_text(tmp_path):
    path = write(tmp_path, "log.csv", "user_id,item_id\n007,1\n8,2\n")
    raw = read_table(path)
    assert raw.interactions["user_id"].to_list() == ["007", "8"]
    assert raw.interactions["item_id"].to_list() == [1, 2]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = write(tmp_path, "log.csv", b"\xef\xbb\xbfuser_id,item_id\nu,a\n")
    assert read_table(path).interactions["user_id"].to_list() == ["u"]


def test_category_lists_and_separators(tmp_path):
    log = write(tmp_path, "log.csv", "user_id,item_id\nu,1\n")
    lines = [{"item_id": 1, "title": "A", "c": ["x", None, " y "]}, {"item_id": 2, "c": None}]
    items = write(tmp_path, "items.jsonl", "\n".join(json.dumps(line) for line in lines))
    raw = read_table(log, items, category_column="c")
    assert clean(raw).catalog["categories"].to_list() == [["x", "y"], []]
    for text, separator, expected in (
        ("a|b|c", None, ["a", "b", "c"]),
        ("a > b|c", None, ["a", "b|c"]),  # ">" is looked for first
        ("a/b", "/", ["a", "b"]),
        ("a, b", None, ["a, b"]),
    ):
        items = write(tmp_path, "items.csv", f'item_id,title,c\n1,A,"{text}"\n')
        raw = read_table(log, items, category_column="c", category_separator=separator)
        assert raw.catalog["categories"].to_list() == [expected]


def test_category_lists_that_were_written_as_text(tmp_path):
    """As pandas' `to_csv` writes them."""
    log = write(tmp_path, "log.csv", "user_id,item_id\nu,1\nu,2\nu,3\nu,4\nu,5\n")
    cells = ["['Outdoor', 'B > C']", "[['A', 'B'], ['C']]", "[Sale] > Tents", "[]", "[{[]: 1}]"]
    lines = [f'{n},T{n},"{cell}"' for n, cell in enumerate(cells, 1)]
    items = write(tmp_path, "items.csv", "item_id,title,c\n" + "\n".join(lines) + "\n")
    raw = read_table(log, items, category_column="c")
    expected = [["Outdoor", "B > C"], ["A", "B"], ["[Sale]", "Tents"], [], ["[{[]: 1}]"]]
    assert raw.catalog["categories"].to_list() == expected


def test_postcodes_and_cards_stay_as_they_are_written(tmp_path):
    lines = "u1,01234,49123456789012345678,1.50,inf\nu9,99999,1,2,3\n"
    users = write(tmp_path, "users.csv", "user_id,zip,card,score,group\n" + lines)
    raw = read_table(*tables(tmp_path), users)
    assert raw.users is not None
    assert raw.users.rows()[0] == ("u1", "01234", "49123456789012345678", 1.5, "inf")


def test_users_keep_all_columns_and_numbers_become_numbers(tmp_path):
    users = write(tmp_path, "users.csv", "user_id,age,plan,score\nu1,30,free,1.5\nu9,,pro,2\n")
    raw = read_table(*tables(tmp_path), users)
    assert raw.users is not None
    assert raw.users.rows() == [("u1", 30, "free", 1.5), ("u9", None, "pro", 2.0)]
    cleaned = clean(raw).users
    assert cleaned is not None
    assert cleaned["user_id"].to_list() == ["u1"]


@pytest.mark.parametrize(
    ("values", "seconds", "micros"),
    [
        (["1700000000", "1700000001"], [1700000000, 1700000001], None),
        (["1700000000000", "1700000001000"], [1700000000, 1700000001], None),
        (["1700000000250", "1700000001000"], [1700000000, 1700000001], [250_000, 0]),
        (["1700000000000007"], [1700000000], [7]),
        (["1700000000000007000"], [1700000000], [7]),
        (["1700000000.5", "1700000001"], [1700000000, 1700000001], [500_000, 0]),
        (["1.7e9"], [1700000000], None),
        (["2023-11-14T22:13:20Z", "2023-11-14 22:13:21"], [1700000000, 1700000001], None),
        (["2023-11-14T23:13:20+01:00", "2023-11-14T22:13:20.25"], [1700000000] * 2, [0, 250_000]),
        (["2023-11-15T00:13+0200", "2023-11-14"], [1699999980, 1699920000], None),
        (["-86400"], [-86400], None),
    ],
)
def test_times(tmp_path, values, seconds, micros):
    log = times_of(tmp_path, values)
    assert log["timestamp"].to_list() == seconds
    assert (log[SUBSECOND].to_list() if SUBSECOND in log.columns else None) == micros


def test_the_unit_of_times_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        times_of(tmp_path, ["1700000000000"])
    assert "'t' read as ms: 2023-11-14 22:13:20 to 2023-11-14 22:13:20" in caplog.text


def test_parquet_dates_and_zones(tmp_path):
    moment = datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    for values, expected in (
        ([moment], 1700000000),
        ([date(2023, 11, 14)], 1699920000),
        ([moment.replace(tzinfo=None)], 1700000000),
    ):
        path = tmp_path / "log.parquet"
        pl.DataFrame({"user_id": [1], "item_id": [1], "t": values}).write_parquet(path)
        assert read_table(path, time_column="t").interactions["timestamp"].to_list() == [expected]


def test_latin_1_has_to_be_named(tmp_path):
    path = write(tmp_path, "log.csv", "user_id,item_id\nJosé,a\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"log.csv is not utf-8: byte 0xe9 at offset 19.*encoding: lat"
    ):
        read_table(path)
    assert read_table(path, encoding="latin-1").interactions["user_id"].to_list() == ["José"]
    with pytest.raises(ValueError, match="encoding='utf-9' is not known"):
        read_table(path, encoding="utf-9")


def test_offset_of_a_bad_byte_beyond_the_first_block(tmp_path):
    # A two-byte letter lies across the border of the 1 MiB blocks that are read.
    head = b"user_id,item_id\n"
    good = head + b"u,a\n" * 10
    good += b"x" * ((1 << 20) - 1 - len(good)) + "é".encode() + b",a\n"
    path = write(tmp_path, "log.csv", good + b"\xff,a\n")
    with pytest.raises(ValueError, match=f"byte 0xff at offset {len(good)};"):
        read_table(path)


# Bad input


def test_missing_column_names_the_closest(tmp_path):
    with pytest.raises(ValueError) as caught:
        read_table(*tables(tmp_path), user_column="userid")
    assert str(caught.value).endswith(
        "log.csv has no column 'userid' (user_column); it has user_id, item_id, time, stars; "
        "did you mean user_column: user_id?"
    )
    with pytest.raises(ValueError, match=r"items.csv has no column 'item' \(items_item_column\)"):
        read_table(*tables(tmp_path), items_item_column="item")
    with pytest.raises(ValueError, match=r"no column 'zzzz' \(brand_column\).*; set brand_column"):
        read_table(*tables(tmp_path), brand_column="zzzz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", "", "log.csv is empty"),
        ("log.csv", "user_id,item_id\n", "log.csv is empty: it has no rows"),
        ("log.csv.gz", "", "log.csv.gz is empty"),
        ("log.jsonl", "\n", "log.jsonl can't be read as jsonl"),
        ("log.xlsx", "x", "log.xlsx has an ending that is not known; use .csv"),
        ("log", "x", "log has an ending that is not known"),
        ("log.csv", "user_id,item_id\nu,a,b,c\n", "log.csv can't be read as csv"),
        ("log.jsonl", '{"user_id": 1\n', "log.jsonl can't be read as jsonl"),
        ("log.parquet", "PAR1", "log.parquet can't be read as parquet"),
        ("log.csv", "user_id,item_id\nu,a\n,b\n", "row 2: 'user_id' is null.*fill it in or remove"),
        ("log.csv", "user_id,item_id\nu,\n", "row 1: 'item_id' is null"),
        ("log.jsonl", '{"user_id": 1.5, "item_id": 1}\n', "'user_id' holds Float64; ids are"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        read_table(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"none.csv does not exist"):
        read_table(tmp_path / "none.csv")


def test_a_gzip_file_cut_short(tmp_path):
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(LOG.encode() * 50)[:-20])
    with pytest.raises(ValueError, match=r"log.csv.gz is not a complete gzip file"):
        read_table(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["100", "soon", "300"], r"row 2: t 'soon' is not a time \(1 such rows\); use ISO-8601"),
        (["2024-01-01", "2024-02-30"], "row 2: t '2024-02-30' is not a time"),
        (["2024-01-01", "01/02/2024"], "row 2: t '01/02/2024' is not a time"),
        (["100", ""], "row 2: t None is not a time|row 2: t '' is not a time"),
        (["100", "nan"], "row 2: t 'nan' is not a time"),
        (["100", "1e30"], "row 2: t '1e30' is not a time"),
        (["20240131", "20240201"], "looks like YYYYMMDD.*YYYY-MM-DD"),
        (["20200101120000", "20200102235959"], "looks like YYYYMMDDHHMMSS.*THH:MM:SS"),
        (["202001011200", "202001022359"], "looks like YYYYMMDDHHMM .*THH:MM:SS"),
        (["1700000000000", "1700000000"], r"mixes units.*'1700000000000' \(ms\), row 2 holds '170"),
    ],
)
def test_times_that_cannot_be_read(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        times_of(tmp_path, values)


def test_ratings_and_prices_that_cannot_be_read(tmp_path):
    log = LOG.replace("3.5", "good")
    with pytest.raises(ValueError, match="row 2: stars 'good' is not a finite number"):
        read_table(*tables(tmp_path, log=log), rating_column="stars")
    for price, message in (
        ('"12,99"', "row 2: price '12,99' is not a price"),
        ("-3", r"row 2: price -3.0 is below 0"),
        ("call us", "row 2: price 'call us' is not a price"),
    ):
        items = ITEMS.replace("12.5", price)
        with pytest.raises(ValueError, match=message):
            read_table(*tables(tmp_path, items=items), price_column="price")


def test_unknown_items(tmp_path):
    log = LOG + "".join(f"u3,{i},400,1\n" for i in range(20, 28))
    files = tables(tmp_path, log=log)
    with pytest.raises(ValueError) as caught:
        read_table(*files)
    assert "8 interactions of" in str(caught.value)
    assert "have 8 items" in str(caught.value)
    assert "lacks: 20, 21, 22, 23, 24 and 3 more; add them" in str(caught.value)
    assert str(caught.value).endswith("set unknown_items: drop")
    left = read_table(*files, unknown_items="drop")
    assert left.interactions.height == 3 and clean(left).dropped["unknown_items"] == 8
    with pytest.raises(
        ValueError, match="unknown_items='ignore' is not known; choose one of raise"
    ):
        read_table(*files, unknown_items="ignore")
    strangers = tables(tmp_path, log="user_id,item_id\nu,1\n")
    with pytest.raises(ValueError, match="no item of .* check that both use the same ids"):
        read_table(*strangers, unknown_items="drop")


def test_an_item_twice_in_the_catalogue(tmp_path):
    items = ITEMS + "7,Other,,,1\n"
    with pytest.raises(
        ValueError, match="item ids must be unique, 7 occur more than once; keep one"
    ):
        read_table(*tables(tmp_path, items=items))


def test_a_user_twice_in_the_users(tmp_path):
    users = write(tmp_path, "users.csv", "user_id,age\nu1,3\nu1,4\n")
    with pytest.raises(ValueError, match="user ids must be unique, 'u1'"):
        read_table(*tables(tmp_path), users)


def test_ids_of_two_types_have_to_be_reconciled(tmp_path):
    log, _ = tables(tmp_path)
    mixed = write(tmp_path, "mixed.csv", "item_id,title\n7,A\n9,B\nX1,C\n")
    with pytest.raises(ValueError) as caught:
        read_table(log, mixed)
    assert "item ids are integers in" in str(caught.value)
    assert "(for example 'X1'); set id_type: string to compare them as text" in str(caught.value)
    assert "id_type: integer" not in str(caught.value)
    raw = read_table(log, mixed, id_type="string")
    assert raw.interactions["item_id"].to_list() == ["7", "9", "9"]
    with pytest.raises(ValueError, match="'X1', which is not a plain integer; set id_type: string"):
        read_table(log, mixed, id_type="integer")

    typed = write(tmp_path, "items.jsonl", '{"item_id": "7", "title": "A"}\n{"item_id": "9"}\n')
    with pytest.raises(ValueError, match="or id_type: integer to compare them as numbers"):
        read_table(log, typed)
    assert read_table(log, typed, id_type="integer").catalog["item_id"].to_list() == [7, 9]
    with pytest.raises(ValueError, match="id_type='number' is not known"):
        read_table(log, typed, id_type="number")


# Sequences


def sequences(tmp_path: Path, text: str) -> tuple[Path, Path]:
    items = [
        {"item_id": 1, "title": "A", "categories": [["x", "y"], ["z"]], "attributes": ["B", "y"]},
        {"item_id": 2, "title": "C", "categories": [], "attributes": ["Unknown"]},
        {"item_id": 3, "title": "D", "categories": [["x"]], "attributes": []},
    ]
    lines = "\n".join(json.dumps(item) for item in items)
    return write(tmp_path, "sequences.txt", text), write(tmp_path, "items.jsonl", lines)


def test_sequences(tmp_path):
    raw = read_sequences(*sequences(tmp_path, "1 2 1 2\n\n2  3\n"))
    assert raw.interactions.select("user_id", "item_id").rows() == [(1, 2), (1, 1), (1, 2), (2, 3)]
    assert raw.interactions["timestamp"].null_count() == 4
    catalog = clean(raw).catalog
    assert catalog["brand"].to_list() == ["B", None, None]
    assert catalog["categories"].to_list() == [["x", "y"], [], ["x"]]
    assert clean(raw).interactions["item_id"].to_list() == [2, 1, 2, 3]  # a repeat is kept


def test_sequences_zipped_and_marked(tmp_path):
    lines, items = sequences(tmp_path, "")
    for path in (
        write(tmp_path, "s.txt.gz", "1 2 1\n"), write(tmp_path, "m.txt", b"\xef\xbb\xbf1 2 1\n")
    ):  # fmt: skip
        raw = read_sequences(path, items)
        assert raw.interactions.select("user_id", "item_id").rows() == [(1, 2), (1, 1)]
    with pytest.raises(ValueError, match="sequences.txt is empty"):
        read_sequences(lines, items)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2\n7\n", "line 2: '7' has a user but no items"),
        ("1 2\n1 3\n", "user ids must be unique, '1' occur"),
        ("\n", "sequences.txt is empty"),
        ("1 2 9\n", "1 interactions .* have 1 items that .* lacks: 9"),
    ],
)
def test_bad_sequences(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_sequences(*sequences(tmp_path, text))


def test_semicolon_file_says_so(tmp_path):
    path = tmp_path / "orders.csv"
    path.write_text("user_id;item_id\n1;2\n")
    with pytest.raises(ValueError, match="separated by ';'"):
        read_table(path)


# Optional columns


def test_event_weight_review_and_query(tmp_path):
    text = (
        "user_id,item_id,kind,w,head,body,q\n"
        'u,a, cart ,0.5,Good,"He said ""wow"",\nthen left",red shoes\n'
        "u,b,,,, ,\n"
    )
    raw = read_table(
        write(tmp_path, "log.csv", text),
        event_column="kind",
        weight_column="w",
        summary_column="head",
        review_column="body",
        query_column="q",
    )
    named = raw.interactions.drop("user_id", "item_id", "timestamp", "rating")
    assert named.schema == {
        "event": pl.String, "weight": pl.Float64, "summary": pl.String, "review": pl.String,
        "query": pl.String,
    }  # fmt: skip
    assert named.rows() == [
        ("cart", 0.5, "Good", 'He said "wow",\nthen left', "red shoes"),
        (None, None, None, None, None),
    ]
    with pytest.raises(ValueError, match="row 1: w -0.5 is below 0"):
        read_table(write(tmp_path, "log.csv", text.replace("0.5", "-0.5")), weight_column="w")
    with pytest.raises(ValueError, match=r"no column 'event' \(event_column\)"):
        read_table(tmp_path / "log.csv", event_column="event")


# Folders, and files that are wide


def test_a_folder_of_parquet_files(tmp_path):
    folder = tmp_path / "log [1]"  # brackets are a pattern to some readers
    for day, users in (("2024-01-02", [3]), ("2024-01-01", [1, 2])):
        part = folder / f"date={day}"
        part.mkdir(parents=True)
        ids = {"user_id": users, "item_id": [u * 10 for u in users]}
        pl.DataFrame(ids).write_parquet(part / "part-0.parquet")
    (folder / "_temporary").mkdir()
    (folder / "_temporary" / "x.parquet").write_text("not one")
    (folder / ".hidden.parquet").write_text("not one")
    raw = read_table(folder, time_column="date")
    assert raw.interactions.select("user_id", "item_id", "timestamp").rows() == [
        (1, 10, 1704067200), (2, 20, 1704067200), (3, 30, 1704153600),
    ]  # fmt: skip
    bad = folder / "date=2024-01-03"
    bad.mkdir()
    pl.DataFrame({"user_id": ["x"], "item_id": [1]}).write_parquet(bad / "p.parquet")
    with pytest.raises(ValueError, match="same columns and types"):
        read_table(folder)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"has no \.parquet files"):
        read_table(tmp_path / "none")


def test_only_the_named_columns_are_read(tmp_path):
    # A column that can't be decoded is no matter if nobody names it.
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user_id": [1], "item_id": [2], "blob": [b"x"]}).write_parquet(path)
    assert read_table(path).interactions.columns == ["user_id", "item_id", "timestamp", "rating"]


# Hostile text


def test_nul_bytes_and_utf_16(tmp_path):
    path = write(tmp_path, "log.csv", b"user_id,item_id\nu\x00,a\n")
    with pytest.raises(ValueError, match=r"log.csv holds a NUL byte within offsets 0 to 21"):
        read_table(path)
    path = write(tmp_path, "log.csv", "user_id,item_id\nJosé,a\n".encode("utf-16"))
    with pytest.raises(ValueError, match="log.csv is not utf-8: byte 0xff at offset 0"):
        read_table(path)
    assert read_table(path, encoding="utf-16").interactions["user_id"].to_list() == ["José"]


def test_a_bad_json_line_is_named(tmp_path):
    good = '{"user_id": "u", "item_id": "a"}\n'
    for bad in ('{"user_id": "u"', "[1]", '{"user_id": NaN}', '{"user_id": "\x01"}'):
        path = write(tmp_path, "log.jsonl", good * 2 + "\n" + bad + "\n" + good)
        with pytest.raises(ValueError, match=r"log.jsonl can't be read as jsonl: line 4 is not a"):
            read_table(path)
    path = write(tmp_path, "log.jsonl.gz", b"\xef\xbb\xbf" + good.encode())
    assert read_table(path).interactions["user_id"].to_list() == ["u"]


def test_empty_ids_and_huge_ids(tmp_path):
    path = write(tmp_path, "log.jsonl", '{"user_id": "u", "item_id": ""}\n')
    with pytest.raises(ValueError, match="row 1: 'item_id' is null"):
        read_table(path)
    path = tmp_path / "log.parquet"
    ids = pl.Series([1 << 63], dtype=pl.UInt64)
    pl.DataFrame({"user_id": ids, "item_id": ids}).write_parquet(path)
    with pytest.raises(ValueError, match="'user_id' holds ids beyond 63 bits"):
        read_table(path)
    for huge in (1 << 100, -(1 << 100)):
        ids = pl.Series([huge], dtype=pl.Int128)
        pl.DataFrame({"user_id": ids, "item_id": ids}).write_parquet(path)
        with pytest.raises(ValueError, match="'user_id' holds ids beyond 63 bits"):
            read_table(path)


@pytest.mark.parametrize(
    ("values", "seconds", "micros"),
    [
        ([-100_000_000_001], [-100_000_001], [999_000]),  # before 1970 fractions count forward
        ([0, 1_700_000_000_000_000_000], [0, 1_700_000_000], None),
        ([1_700_000_000_000_001_999], [1_700_000_000], [1]),
    ],
)
def test_integer_times_in_parquet(tmp_path, values, seconds, micros):
    path = tmp_path / "log.parquet"
    ids = list(range(len(values)))
    pl.DataFrame({"user_id": ids, "item_id": ids, "t": values}).write_parquet(path)
    log = read_table(path, time_column="t").interactions
    assert log["timestamp"].to_list() == seconds
    assert (log[SUBSECOND].to_list() if SUBSECOND in log.columns else None) == micros
