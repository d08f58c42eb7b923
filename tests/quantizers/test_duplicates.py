"""Items with equal vectors: groups by hand, counts against NumPy's, bounds."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from genrec.quantizers import duplicates as module
from genrec.quantizers import quantizer as quantizer_module
from genrec.quantizers.duplicates import duplicate_report

VECTORS = np.array([[1, 0], [0, -0.0], [2, 2], [1, -0.0], [2, 2], [3, 0], [0, 0], [2, 2]])
CATALOG = pl.DataFrame(
    {
        "item_id": list("abcdefgh"),
        "title": ["Hat", "x", "Mug", "Hat", "Mug, blue", "Pan", None, "Mug"],
    }
)


def test_groups_by_hand():
    found = duplicate_report(VECTORS, CATALOG)
    assert found == {
        "items": 5, "groups": 2, "same_title": 1, "without_vector": 2,
        "listed": [
            {"items": 3, "item_ids": ["c", "e", "h"], "titles": ["Mug", "Mug, blue", "Mug"]},
            {"items": 2, "item_ids": ["a", "d"], "titles": ["Hat", "Hat"]},
        ],
        "without_vector_ids": ["b", "g"],
    }  # fmt: skip
    json.dumps(found)
    assert duplicate_report(VECTORS.astype(np.float16), CATALOG) == found
    untitled = duplicate_report(VECTORS, CATALOG.select("item_id"))
    assert untitled["same_title"] is None and untitled["listed"][1]["titles"] == []
    assert untitled["listed"][0]["item_ids"] == ["c", "e", "h"]


def test_no_title_is_not_the_same_title():
    catalog = CATALOG.with_columns(title=pl.lit(None, pl.String))
    found = duplicate_report(VECTORS, catalog)
    assert (found["groups"], found["same_title"]) == (2, 0)
    assert found["listed"][1]["titles"] == ["", ""]


def test_a_catalogue_without_duplicates():
    vectors = np.arange(1, 13, dtype=np.float32).reshape(6, 2)
    found = duplicate_report(vectors, CATALOG[:6])
    assert (found["items"], found["groups"], found["same_title"]) == (0, 0, 0)
    assert found["listed"] == found["without_vector_ids"] == []
    found = duplicate_report(np.zeros((6, 2), np.float32), CATALOG[:6])
    assert (found["items"], found["groups"], found["without_vector"]) == (0, 0, 6)


def test_all_are_counted_and_few_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantizer_module, "BLOCK_CELLS", 999)
    monkeypatch.setattr(module, "LISTED_GROUPS", 3)
    monkeypatch.setattr(module, "LISTED_ITEMS", 2)
    vectors = np.random.default_rng(0).integers(0, 2, (3000, 9)).astype(np.float32)
    catalog = pl.DataFrame({"item_id": np.arange(3000), "title": ["t" * 900] * 3000})
    found = duplicate_report(vectors, catalog)
    distinct, counts = np.unique(vectors, axis=0, return_counts=True)
    counts = counts[distinct.any(axis=1)]
    assert found["items"] == counts[counts > 1].sum()
    assert found["groups"] == found["same_title"] == (counts > 1).sum()
    assert found["without_vector"] == (~vectors.any(axis=1)).sum()
    assert [group["items"] for group in found["listed"]] == np.sort(counts)[::-1][:3].tolist()
    for group in found["listed"]:
        first, second = group["item_ids"]
        assert (vectors[first] == vectors[second]).all() and len(group["titles"][0]) == 300
    with pytest.raises(ValueError, match="2 vectors for 3000 items"):
        duplicate_report(vectors[:2], catalog)
