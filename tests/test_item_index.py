"""Item ids -> catalogue rows."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

import genrec.item_index
from genrec.item_index import ItemIndex


@pytest.mark.parametrize("many", [1, 1000], ids=["join", "search"])
@pytest.mark.parametrize("kind", [pl.Int64, pl.String])
def test_it_finds_what_a_dictionary_finds(kind, many: int, monkeypatch):
    monkeypatch.setattr(genrec.item_index, "_MANY", many)
    rng = np.random.default_rng(0)
    ids = pl.Series(rng.permutation(200)[:120]).cast(pl.Int64).cast(kind)
    asked = pl.Series(rng.integers(-5, 210, 300)).cast(kind)
    wanted = {item: row for row, item in enumerate(ids)}
    assert ItemIndex(ids).rows(asked).tolist() == [wanted.get(item, -1) for item in asked]
    assert ItemIndex(ids).rows(asked[:0]).tolist() == []


def test_python_values_of_any_type():
    odd = [None, [1], (5,), float("nan"), float("inf"), 2**70, -(2**70), 5.5, 4, b"b"]
    numbers, names = ItemIndex(pl.Series([5, 3, 9])), ItemIndex(pl.Series(["b", "a", "c"]))
    assert numbers.rows_of_values([3, 9, 5]).tolist() == [1, 2, 0]
    assert numbers.rows_of_values([np.int64(9), 3.0, "3", *odd]).tolist() == [2, 1] + [-1] * 11
    assert names.rows_of_values(["c", "b", "z", "\ud800", *odd]).tolist() == [2, 0] + [-1] * 12
    assert names.rows_of_values(["\ud800"]).tolist() == [-1]
    assert numbers.rows_of_values([]).tolist() == []
    for one in ("a", b"a"):  # Polars would take it for the name of an empty column
        with pytest.raises(ValueError, match="is one id; items are given as a list"):
            names.rows_of_values(one)
