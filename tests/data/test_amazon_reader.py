"""Amazon 2014, 2018 and 2023: reviews, plain CSV and metadata in their published forms."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import polars as pl
import pytest

from genrec.data.readers import SUBSECOND, read_amazon

OLD = [
    {
        "reviewerID": "A1", "asin": "0000031852", "reviewerName": "J", "helpful": [0, 0],
        "reviewText": "He said &quot;wow&quot;<br />and\tleft", "overall": 5.0,
        "summary": "Loved it", "unixReviewTime": 1370131200, "reviewTime": "06 2, 2013",
    },
    {"reviewerID": "A2", "asin": "B01", "overall": 3, "unixReviewTime": 1370131201, "vote": "2"},
]  # fmt: skip
NEW = [
    {
        "rating": 4.0, "title": "Such a lovely scent", "text": "x" * 50, "images": [],
        "asin": "B00YQ6X8EO", "parent_asin": "P1", "user_id": "AGKH", "timestamp": 1588687728923,
        "helpful_vote": 0, "verified_purchase": True,
    },
    {"rating": 1, "title": "", "text": None, "parent_asin": "P2", "user_id": "AGKH",
     "timestamp": 1588687729000},
]  # fmt: skip
META_2014 = [
    {
        "asin": "0000031852", "title": "Girls' Ballet &amp; Tutu", "price": 3.17,
        "brand": "Coxlures",
        "related": {"also_bought": ["B00"]}, "salesRank": {"Toys & Games": 211836},
        "categories": [["Sports & Outdoors", "Dance"], ["Girls"]],
        "description": "It's \"soft\"\n",
    },
    {"asin": "B01", "categories": [["Sports & Outdoors"]]},
]  # fmt: skip
META_2018 = [
    {"asin": "0000031852", "title": "Tutu", "brand": "Cox", "price": "$1,299.00", "feature": [],
     "category": ["Clothing, Shoes & Jewelry", "Girls"], "description": ["<b>Soft</b>", "Pink"]},
    {"asin": "B01", "title": "var aPageStart = (new Date()).getTime();", "price": "$5.99 - $9.99",
     "category": [], "main_cat": "All Beauty", "description": []},
    {"asin": "B01", "title": "a second record", "category": [], "description": []},
]  # fmt: skip
META_2023 = [
    {"main_category": "All Beauty", "title": "Brush", "price": 12.99, "store": "Howard",
     "categories": [], "description": ["a", "b"], "details": {"UPC": "1"}, "parent_asin": "P1"},
    {"main_category": None, "title": "Comb", "price": "from 12.99", "store": None,
     "categories": ["Hair", "Combs"], "description": [], "details": {}, "parent_asin": "P2"},
]  # fmt: skip


def lines(folder: Path, name: str, records: list[dict], how=json.dumps) -> Path:
    path = folder / name
    data = "".join(how(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["r.json", "r.json.gz", "r.jsonl"])
@pytest.mark.parametrize("version", ["auto", "2014", "2018"])
def test_reviews_of_2014_and_2018(tmp_path, name, version):
    raw = read_amazon(lines(tmp_path, name, OLD), version=version)
    assert raw.interactions.columns == [
        "user_id", "item_id", "timestamp", "rating", "summary", "review",
    ]  # fmt: skip
    assert raw.interactions.rows() == [
        ("A1", "0000031852", 1370131200, 5.0, "Loved it", 'He said "wow" and left'),
        ("A2", "B01", 1370131201, 3.0, None, None),
    ]
    assert raw.catalog.rows() == [("0000031852",), ("B01",)]


def test_ids_of_digits_stay_text(tmp_path):
    records = [{**OLD[0], "asin": "31852", "reviewerID": "7"}]
    raw = read_amazon(lines(tmp_path, "r.json", records))
    assert raw.interactions.select("user_id", "item_id").rows() == [("7", "31852")]


def test_reviews_of_2023(tmp_path):
    raw = read_amazon(lines(tmp_path, "r.jsonl", NEW), max_text_chars=10)
    assert raw.interactions.rows(named=True) == [
        {"user_id": "AGKH", "item_id": "P1", "timestamp": 1588687728, SUBSECOND: 923_000,
         "rating": 4.0, "summary": "Such a lov", "review": "x" * 10},
        {"user_id": "AGKH", "item_id": "P2", "timestamp": 1588687729, SUBSECOND: 0,
         "rating": 1.0, "summary": None, "review": None},
    ]  # fmt: skip
    bare = read_amazon(lines(tmp_path, "r.jsonl", NEW), max_text_chars=0)
    assert not {"summary", "review"} & set(bare.interactions.columns)


@pytest.mark.parametrize("name", ["r.csv", "r.csv.gz"])
def test_plain_csv_of_2023(tmp_path, name):
    text = "user_id,parent_asin,rating,timestamp,history\nU,0007,5.0,1588687728923,\n"
    text += "U,P,1.0,1588687729000,0007\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if "gz" in name else text.encode())
    raw = read_amazon(tmp_path / name)
    assert raw.interactions.rows() == [
        ("U", "0007", 1588687728, 923_000, 5.0), ("U", "P", 1588687729, 0, 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize("how", [repr, json.dumps])
def test_metadata_of_2014(tmp_path, how):
    reviews = lines(tmp_path, "r.json", OLD)
    raw = read_amazon(reviews, lines(tmp_path, "meta.json.gz", META_2014, how))
    assert raw.catalog.columns == [
        "item_id", "title", "brand", "categories", "price", "description",
    ]  # fmt: skip
    assert raw.catalog.rows() == [
        ("0000031852", "Girls' Ballet & Tutu", "Coxlures", ["Sports & Outdoors", "Dance"], 3.17,
         "It's \"soft\""),
        ("B01", None, None, ["Sports & Outdoors"], None, None),
    ]  # fmt: skip


def test_metadata_of_2018_and_2023(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        raw = read_amazon(lines(tmp_path, "r.json", OLD), lines(tmp_path, "meta.json", META_2018))
    assert raw.catalog.rows() == [
        ("0000031852", "Tutu", "Cox", ["Clothing, Shoes & Jewelry", "Girls"], 1299.0, "Soft Pink"),
        ("B01", None, None, ["All Beauty"], None, None),
    ]  # fmt: skip
    assert "1 of 3 records repeat an item" in caplog.text
    assert "1 of 2 prices aren't one number (for example '5.99 - $9.99')" in caplog.text
    assert "1 of 2 titles are leftovers" in caplog.text
    raw = read_amazon(lines(tmp_path, "r.jsonl", NEW), lines(tmp_path, "m.jsonl", META_2023))
    assert raw.catalog.rows() == [
        ("P1", "Brush", "Howard", ["All Beauty"], 12.99, "a b"),
        ("P2", "Comb", None, ["Hair", "Combs"], None, None),
    ]


def test_items_that_the_metadata_lacks(tmp_path):
    files = lines(tmp_path, "r.json", OLD), lines(tmp_path, "meta.json", META_2018[:1])
    with pytest.raises(ValueError, match=r"1 interactions .* lacks: 'B01'.*unknown_items: drop"):
        read_amazon(*files)
    assert read_amazon(*files, unknown_items="drop").interactions.height == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unixReviewTime": None}, r"row 2: unixReviewTime None is not a time \(1 such"),
        ({"unixReviewTime": "06 2, 2013"}, r"row 2: unixReviewTime '06 2, 2013' is not a time"),
        ({"asin": None}, "row 2: 'asin' is null"),
        ({"reviewerID": ""}, "row 2: 'reviewerID' is null"),
        ({"overall": "good"}, "row 2: overall 'good' is not a finite number"),
    ],
)
def test_reviews_with_faults(tmp_path, change, message):
    path = lines(tmp_path, "r.json", [OLD[0], {**OLD[1], **change}])
    with pytest.raises(ValueError, match=message):
        read_amazon(path)


def test_rows_are_numbered_across_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("genrec.data.readers.json_records._BATCH", 2)
    records = [OLD[0]] * 4 + [{**OLD[1], "asin": None}]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(records, indent=1))
    with pytest.raises(ValueError, match="row 5: 'asin' is null"):
        read_amazon(path)


def test_settings_and_files_that_do_not_fit(tmp_path):
    old, new = lines(tmp_path, "old.json", OLD), lines(tmp_path, "new.jsonl", NEW)
    for arguments, message in (
        ({"version": "2023"}, r"old.json has the fields of version 2014 or 2018, not 2023; set"),
        ({"version": "2020"}, "version='2020' is not known; choose one of auto, 2014"),
        ({"max_text_chars": -1}, "max_text_chars=-1 must be at least 0"),
        ({"unknown_items": "keep"}, "unknown_items='keep' is not known"),
        ({"metadata": tmp_path / "none.json"}, "none.json does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            read_amazon(old, **arguments)
    with pytest.raises(ValueError, match="has the fields of version 2023, not 2018"):
        read_amazon(new, version="2018")
    meta = lines(tmp_path, "meta.json", META_2018)
    with pytest.raises(ValueError, match="meta.json holds no Amazon reviews: its first record has"):
        read_amazon(meta)
    other = lines(tmp_path, "other.json", [{"id": 1}])
    with pytest.raises(ValueError, match="other.json holds no Amazon metadata.*neither asin nor"):
        read_amazon(old, other)
    ratings = tmp_path / "ratings.csv"
    ratings.write_text("A1,B1,5.0,1370131200\n")
    with pytest.raises(ValueError, match="has no column 'user_id'|is empty"):
        read_amazon(ratings)
    with pytest.raises(ValueError, match="CSV files are those of version 2023, not 2014"):
        read_amazon(ratings, version="2014")


def test_fashion(genrec_data: Path):
    path = genrec_data / "amazon2018-fashion-reviews" / "AMAZON_FASHION_5.json"
    raw = read_amazon(path)
    log = raw.interactions
    assert log.height == 3_176
    assert log["user_id"].n_unique() == 406
    assert raw.catalog.height == log["item_id"].n_unique() == 31
    # 68 records repeat another in all fields; without variant and votes 88 do.
    assert log.height - log.unique().height == 88
    assert log.unique(["user_id", "item_id", "timestamp"]).height == 3_065
    first = log.row(0, named=True)
    assert first["summary"] == "Five Stars"
    assert first["review"] == "Great product and price!"
    assert log["rating"].is_in([1.0, 2.0, 3.0, 4.0, 5.0]).all()
    assert (log["review"].null_count(), log["summary"].null_count()) == (16, 0)
    assert log["review"].str.len_chars().max() == 1_365
    assert isinstance(log.schema["timestamp"], pl.Int64)
