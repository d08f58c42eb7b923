"""LC-Rec's inter.json and item.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from genrec.data.readers import read_lcrec

ITEMS = {
    "0": {"title": "Mic &amp; Stand.", "description": "", "brand": "Blue",
          "categories": "Musical Instruments,Clothing, Shoes & Jewelry,Mics"},
    "1": {"title": "Cable", "description": ["USB", "to MIDI"], "brand": "",
          "categories": ["A", "B"]},
    "10": {"title": "", "description": "['one', \"it's two\"]", "categories": ""},
    "11": {"title": "[New] cup", "description": "['5' wide', 'a 3 in rim']"},
}  # fmt: skip


def files(folder: Path, inter: object, items: object = ITEMS) -> tuple[Path, Path]:
    paths = folder / "x.inter.json", folder / "x.item.json"
    for path, value in zip(paths, (inter, items), strict=True):
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return paths


def test_sequences_and_items(tmp_path):
    raw = read_lcrec(*files(tmp_path, {"0": [1, 0, 1], "7": [10]}))
    log = raw.interactions
    assert log.select("user_id", "item_id").rows() == [(0, 1), (0, 0), (0, 1), (7, 10)]
    assert log["timestamp"].null_count() == 4
    assert raw.catalog.select("item_id", "title", "brand", "categories", "description").rows() == [
        (0, "Mic & Stand.", "Blue",
         ["Musical Instruments", "Clothing, Shoes & Jewelry", "Mics"], None),
        (1, "Cable", None, ["A", "B"], "USB to MIDI"),
        (10, None, None, None, "one it's two"),
        (11, "[New] cup", None, None, "5' wide a 3 in rim"),
    ]  # fmt: skip


def test_ids_that_are_text(tmp_path):
    items = {"B01": {"title": "x"}, "2": {"title": "y"}}
    raw = read_lcrec(*files(tmp_path, {"u": ["2"]}, items))
    assert raw.interactions.select("user_id", "item_id").rows() == [("u", "2")]
    assert raw.catalog["item_id"].to_list() == ["B01", "2"]


@pytest.mark.parametrize(
    ("inter", "items", "message"),
    [
        ({"0": []}, ITEMS, r"user '0' has '\[\]'; give a list of item ids"),
        ({"0": "1 2"}, ITEMS, "user '0' has '1 2'"),
        ({"0": [None]}, ITEMS, "row 1: 'item_id' is null"),
        ({"0": [1.5]}, ITEMS, "row 1: 'item_id' is null"),
        ({"0": [99]}, ITEMS, "1 interactions .* lacks: 99"),
        ([1], ITEMS, "must be a JSON object"),
        ("{'0': [1]}", ITEMS, "x.inter.json is not JSON"),
        ({"0": [1]}, {"1": "title"}, "item '1' has 'title'; give an object"),
        ({"0": [1]}, '{"1": {"title": "x"}', "x.item.json is not JSON"),
    ],
)
def test_faults(tmp_path, inter, items, message):
    with pytest.raises(ValueError, match=message):
        read_lcrec(*files(tmp_path, inter, items))
