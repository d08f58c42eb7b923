"""RecBole's atomic files."""

from __future__ import annotations

from pathlib import Path

import pytest

from genrec.data.readers import read_recbole, recbole_files

INTER = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "1\t10\t4.0\t9.7830e8\n2\t20\t3.5\t978300761\n"
)
ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    '10\tSay "Hi" &amp; Go\t1995\tComedy Drama\n'
    "20\tHeat\t1996\t\n"
)
USER = (
    "user_id:token\tage:token\tgender:token\tscore:float\ttastes:token_seq\tpoint:float_seq\n"
    "1\t24\tM\t1.5\ta b\t0.5 1\n2\t\tF\t\tc\t2\n"
)


def files(
    folder: Path, inter: str = INTER, item: str | None = ITEM, user: str | None = USER
) -> Path:
    for suffix, text in (("inter", inter), ("item", item), ("user", user)):
        if text is not None:
            (folder / f"ml.{suffix}").write_text(text)
    return folder


def test_a_folder_of_three_files(tmp_path):
    raw = read_recbole(files(tmp_path))
    assert raw.interactions.rows() == [(1, 10, 978300000, 4.0), (2, 20, 978300761, 3.5)]
    assert raw.catalog.rows() == [(10, 'Say "Hi" & Go', ["Comedy", "Drama"]), (20, "Heat", None)]
    assert raw.users is not None
    assert raw.users.rows() == [
        (1, 24, "M", 1.5, ["a", "b"], [0.5, 1.0]), (2, None, "F", None, ["c"], [2.0]),
    ]  # fmt: skip
    assert set(recbole_files(tmp_path / "ml.inter")) == {"interactions", "items", "users"}


def test_interactions_alone_of_sessions(tmp_path):
    inter = "session_id:token\titem_id:token\n007\ta\n8\tb\n"
    raw = read_recbole(files(tmp_path, inter, None, None) / "ml.inter")
    assert raw.interactions.select("user_id", "item_id").rows() == [("007", "a"), ("8", "b")]
    assert (
        raw.interactions["timestamp"].null_count() == raw.interactions["rating"].null_count() == 2
    )
    assert raw.catalog.rows() == [("a",), ("b",)]


def test_amazon_and_yelp_items(tmp_path):
    item = (
        "item_id:token\tsales_type:token\tcategories:token_seq\ttitle:token\tprice:float\tbrand:token\n"
        "10\tBooks\t'Sports & Outdoors', 'Golf'\tClub\t12.5\tAce\n"
        "20\tBooks\tFood, Ice Cream\tCone\t\t\n"
    )
    raw = read_recbole(files(tmp_path, item=item, user=None))
    assert raw.catalog.rows() == [
        (10, "Club", ["Sports & Outdoors", "Golf"], "Ace", 12.5),
        (20, "Cone", ["Food", "Ice Cream"], None, None),
    ]
    item = "item_id:token\tsales_type:token\n10\tToys & Games\n20\t\nX1\tBooks\n"
    raw = read_recbole(files(tmp_path, item=item, user=None))
    assert raw.catalog.rows() == [("10", ["Toys & Games"]), ("20", []), ("X1", ["Books"])]
    assert raw.interactions["item_id"].to_list() == ["10", "20"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inter": INTER.replace("rating:float", "rating")}, "header 'rating' is not name:type"),
        ({"inter": INTER.replace(":float", ":int")}, "header 'rating:int' is not name:type; types"),
        ({"inter": INTER.replace("\t", ",")}, "is not name:type.*separated by tabs"),
        ({"inter": INTER.replace("user_id", "who")}, "has no column 'user_id'"),
        ({"inter": INTER.replace("rating:float", "item_id_list:token_seq")}, "prepared sequences"),
        ({"inter": INTER.replace("4.0", "good")}, "row 1: rating 'good' is not a finite number"),
        ({"inter": INTER.replace("2\t20", "2\t")}, "row 2: 'item_id' is null"),
        ({"inter": INTER.replace("\t3.5", "\t3.5\t7\t7\t7")}, "can't be read as inter"),
        ({"inter": INTER.splitlines()[0] + "\n"}, "ml.inter is empty: it has no rows"),
        ({"inter": INTER.replace("rating", "item_id")}, "a column is named twice"),
        ({"item": ITEM + "20\tAgain\t1\tx\n"}, "item ids must be unique, 20 occur"),
        ({"item": ITEM.replace("20\t", "30\t")}, "lacks: 20"),
        ({"user": USER.replace("2\t\tF", "x\t\tF")}, "user ids are text"),
        ({"user": USER.replace("2\t\tF", "1\t\tF")}, "user ids must be unique, 1 occur"),
    ],
)
def test_files_with_faults(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_recbole(files(tmp_path, **change))


def test_which_file_is_meant(tmp_path):
    with pytest.raises(ValueError, match="must hold one .inter file, it has none"):
        read_recbole(tmp_path)
    files(tmp_path)
    (tmp_path / "other.inter").write_text(INTER)
    with pytest.raises(ValueError, match=r"it has ml.inter, other.inter; give the path of one"):
        read_recbole(tmp_path)
    assert read_recbole(tmp_path / "other.inter").catalog.columns == ["item_id"]
