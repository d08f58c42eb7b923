"""Allow- and deny-lists fail closed."""

from __future__ import annotations

import gzip
from pathlib import Path

import polars as pl
import pytest

from genrec.generation.allow_lists import allowed_rows, read_ids

NUMBERS = pl.Series("item_id", [30, 10, 20])
NAMES = pl.Series("item_id", ["c", "a", "b b"])


def text(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_lines_and_tables(tmp_path: Path):
    lines = text(tmp_path / "allow.txt", "\ufeff20\n\n 30 \r\n20\n")
    assert allowed_rows(NUMBERS, lines, None).tolist() == [0, 2]
    assert allowed_rows(NAMES, text(tmp_path / "names", "b b\n"), None).tolist() == [2]
    table = tmp_path / "allow.parquet"
    pl.DataFrame({"item_id": pl.Series([10, None, 20], dtype=pl.Int32)}).write_parquet(table)
    assert allowed_rows(NUMBERS, table, None).tolist() == [1, 2]
    assert allowed_rows(NUMBERS, text(tmp_path / "a.csv", "item_id\n10\n"), None).tolist() == [1]


def test_gzip_other_bytes_and_wide_numbers(tmp_path: Path):
    (tmp_path / "deny.txt.gz").write_bytes(gzip.compress("\ufeff20\n30\n".encode()))
    assert allowed_rows(NUMBERS, None, tmp_path / "deny.txt.gz").tolist() == [1]
    (tmp_path / "deny.csv.gz").write_bytes(gzip.compress(b"item_id\n20\n"))
    assert allowed_rows(NUMBERS, None, tmp_path / "deny.csv.gz").tolist() == [0, 1]
    (tmp_path / "bad.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="bad.txt is not utf-8: byte 0xe9 at offset 0"):
        read_ids(tmp_path / "bad.txt")
    wide = pl.DataFrame({"item_id": pl.Series([20, 1 << 63], dtype=pl.UInt64)})
    wide.write_parquet(tmp_path / "wide.parquet")
    with pytest.raises(ValueError, match="wide.parquet .*holds an id beyond 63 bits"):
        allowed_rows(NUMBERS, None, tmp_path / "wide.parquet")
    with pytest.raises(ValueError, match="the first is '9223372036854775808'"):
        allowed_rows(NUMBERS, None, text(tmp_path / "wide.txt", str(1 << 63)))


def test_deny_lists_take_away(tmp_path: Path):
    deny, allow = text(tmp_path / "deny", "10"), text(tmp_path / "allow", "10\n20\n")
    assert allowed_rows(NUMBERS, None, deny).tolist() == [0, 2]
    assert allowed_rows(NUMBERS, allow, deny).tolist() == [2]
    assert allowed_rows(NUMBERS, None, None) is None
    with pytest.raises(ValueError, match="denies every item"):
        allowed_rows(NUMBERS, deny, deny)
    with pytest.raises(ValueError, match="denies every item"):
        allowed_rows(NUMBERS, None, text(tmp_path / "all", "10\n20\n30"))


def test_bad_lists(tmp_path: Path):
    for content in ("", "\n \n"):
        with pytest.raises(ValueError, match="names no item"):
            read_ids(text(tmp_path / "empty.txt", content))
    with pytest.raises(ValueError, match="does not exist"):
        read_ids(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match=r"2 items .* the first is '40' \(ids look like 30\)"):
        allowed_rows(NUMBERS, text(tmp_path / "a", "10\n40\n010"), None)
    with pytest.raises(ValueError, match="1 items are not in the catalogue, the first is 'z'"):
        allowed_rows(NAMES, None, text(tmp_path / "d", "z"))
    table = tmp_path / "t.parquet"
    pl.DataFrame({"item": [1]}).write_parquet(table)
    with pytest.raises(ValueError, match="no column 'item_id'"):
        read_ids(table)
    pl.DataFrame({"item_id": [1]}).write_parquet(table)
    with pytest.raises(ValueError, match="holds ids of type Int64, the catalogue String"):
        allowed_rows(NAMES, table, None)
    pl.DataFrame({"item_id": [None]}, schema={"item_id": pl.Int64}).write_parquet(table)
    with pytest.raises(ValueError, match="names no item"):
        allowed_rows(NUMBERS, table, None)
