"""MiniOneRec's rows: given splits, and the interactions that the training rows imply."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import polars as pl
import pytest

from genrec.data.readers import minionerec_files, read_minionerec
from genrec.data.readers.minionerec import implied_interactions

ITEMS = {
    str(i): {"title": f"T{i}", "description": f"['d{i}']", "brand": "", "categories": ""}
    for i in range(6)
}
ITEMS["5"]["title"] = 'Industrial & Scientific" />'
HEAD = (
    "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid"
).split(",")


def rows_csv(path: Path, rows: list[tuple[str, str, str]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(HEAD)
        for user, history, target in rows:
            writer.writerow([user, "['a \"b\", c']", "x", history, target, "['<a_1>']", "<a_2>"])


def release(folder: Path) -> Path:
    (folder / "items.json").write_text(json.dumps(ITEMS))
    rows_csv(folder / "train.csv", [("A1", "[0]", "1"), ("A1", "[0, 1]", "0"), ("7", "[4]", "2")])
    rows_csv(folder / "valid.csv", [("A1", "[0, 1, 0]", "3")])
    rows_csv(folder / "test.csv", [("7", "[]", "3"), ("A1", "['0', '3']", "5")])
    times = 'row,user_id,timestamp,history_timestamp\n0,7,500,[]\n1,A1,600,"[1, 2]"\n'
    (folder / "test_times.csv").write_text(times)
    return folder


def test_given_rows_and_catalogue(tmp_path):
    raw = read_minionerec(release(tmp_path))
    assert raw.given is not None
    assert list(raw.given) == ["train", "valid", "test"]
    assert raw.given["train"].schema == {
        "user_id": pl.String, "history": pl.List(pl.Int64), "item_id": pl.Int64,
        "timestamp": pl.Int64,
    }  # fmt: skip
    assert raw.given["train"].rows() == [
        ("A1", [0], 1, None), ("A1", [0, 1], 0, None), ("7", [4], 2, None),
    ]  # fmt: skip
    assert raw.given["valid"].rows() == [("A1", [0, 1, 0], 3, None)]
    assert raw.given["test"].rows() == [("7", [], 3, 500), ("A1", [0, 3], 5, 600)]
    assert raw.interactions.select("user_id", "item_id").rows() == [
        ("A1", 0), ("A1", 1), ("A1", 0), ("7", 4), ("7", 2),
    ]  # fmt: skip
    assert raw.catalog.select("item_id", "title", "description").rows() == [
        *((i, f"T{i}", f"d{i}") for i in range(5)), (5, None, "d5"),
    ]  # fmt: skip


def test_training_rows_as_json_lines(tmp_path):
    (release(tmp_path) / "train.csv").unlink()
    lines = [
        {"user_id": "A1", "history": [4, 0], "target": 1, "timestamp": 10},
        {"user_id": "A1", "history": [4, 0, 1], "target": 4, "timestamp": 20},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / "train_partial.jsonl").write_text(text)
    assert minionerec_files(tmp_path)["train"] == tmp_path / "train_partial.jsonl"
    raw = read_minionerec(tmp_path)
    assert raw.given is not None
    assert raw.given["train"].rows() == [("A1", [4, 0], 1, 10), ("A1", [4, 0, 1], 4, 20)]
    assert raw.interactions.select("user_id", "item_id", "timestamp").rows() == [
        ("A1", 4, 10), ("A1", 0, 10), ("A1", 1, 10), ("A1", 4, 20),
    ]  # fmt: skip


def test_what_training_rows_imply():
    rows = pl.DataFrame(
        [
            ("u", [1, 1, 2], 3, 10),
            ("u", [2, 3], 3, 20),  # bought again
            ("u", [3, 9], 2, 30),  # 9 was never a target: it is new with this row; 2 again
            ("v", [3], 3, 30),
            ("v", [3, 3], 3, 30),  # the same user, item and time: one interaction
        ],
        schema={
            "user_id": pl.String, "history": pl.List(pl.Int64), "item_id": pl.Int64,
            "timestamp": pl.Int64,
        },
        orient="row",
    )  # fmt: skip
    assert implied_interactions(rows).select("user_id", "item_id", "timestamp").rows() == [
        ("u", 1, 10), ("u", 2, 10), ("u", 3, 10), ("u", 3, 20), ("u", 9, 30), ("u", 2, 30),
        ("v", 3, 30),
    ]  # fmt: skip
    # Held-out rows add nothing: the implied log is a function of the training rows alone.
    assert implied_interactions(rows.head(1)).height == 3


def test_files_by_name_or_by_folder(tmp_path):
    (tmp_path / "flat").mkdir()
    flat = release(tmp_path / "flat")
    nested = tmp_path / "nested"
    for role in ("train", "valid", "test"):
        (nested / role).mkdir(parents=True)
        (flat / f"{role}.csv").rename(nested / role / "Industrial_5_2016-10-2018-11.csv")
    (flat / "test_times.csv").rename(nested / "test" / "Industrial_5_2016-10-2018-11_times.csv")
    (nested / "index").mkdir()
    (flat / "items.json").rename(nested / "index" / "Industrial.item.json")
    files = minionerec_files(nested)
    assert sorted(files) == ["items", "test", "test_times", "train", "valid"]
    raw = read_minionerec(**{r: files[r] for r in ("train", "valid", "test", "items")})
    assert raw.given is not None
    assert raw.given["test"]["timestamp"].to_list() == [500, 600]
    rows_csv(nested / "valid" / "Office.csv", [("A1", "[0]", "1")])
    with pytest.raises(ValueError, match=r"several files for valid: Industrial.*, Office.csv"):
        read_minionerec(nested)


def test_missing_files_are_named(tmp_path):
    (release(tmp_path) / "train.csv").unlink()
    with pytest.raises(
        ValueError, match=r"the train file is missing .*train.csv, train.jsonl.*giv"
    ):
        read_minionerec(tmp_path)
    with pytest.raises(ValueError, match=r"train.csv does not exist"):
        read_minionerec(tmp_path, train=tmp_path / "train.csv")
    with pytest.raises(ValueError, match=r"the train file is missing \(no folder\)"):
        read_minionerec()
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        read_minionerec(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("history", "target", "message"),
    [
        ("[0, 1", "1", r"valid.csv row 1: history_item_id '\[0, 1' is not a list of ids"),
        ("__import__('os')", "1", "is not a list of ids"),
        ("[[0]]", "1", "is not a list of ids"),
        ("{'a': 1}", "1", "is not a list of ids"),
        ("", "1", "row 1: the history is null"),
        ("[0]", "99", "valid.csv has 1 items that .*items.json lacks: '99'"),
        ("[98, 99]", "1", "valid.csv has 2 items that .* lacks: '98', '99'"),
        ("[0]", "", "row 1: 'item_id' is null"),
    ],
)
def test_rows_with_faults(tmp_path, history, target, message):
    rows_csv(release(tmp_path) / "valid.csv", [("A1", history, target)])
    with pytest.raises(ValueError, match=message):
        read_minionerec(tmp_path)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ("row,user_id,timestamp\n0,7,500\n", "test_times.csv has 1 rows, the file beside it 2"),
        ("row,user_id,timestamp\n0,7,500\n1,B,600\n", "row 2 is of user 'B'.*has 'A1' there"),
        ("row,user_id,timestamp\n0,7,500\n1,A1,soon\n", "timestamps must be whole seconds"),
        ("row,user_id,timestamp\n0,7,500\n1,A1,\n", "timestamps must be whole seconds"),
        ("row,user,timestamp\n0,7,500\n1,A1,600\n", "has no column 'user_id'"),
    ],
)
def test_sidecars_that_do_not_fit(tmp_path, times, message):
    (release(tmp_path) / "test_times.csv").write_text(times)
    with pytest.raises(ValueError, match=message):
        read_minionerec(tmp_path)


def test_industrial(genrec_data: Path):
    folder = genrec_data / "amazon2018-industrial"
    raw = read_minionerec(folder)
    assert raw.given is not None
    heights = {name: table.height for name, table in raw.given.items()}
    assert heights == {"train": 9_957, "valid": 4_532, "test": 4_533}
    assert raw.catalog.height == 3_686
    assert raw.catalog["item_id"].to_list() == list(range(3_686))
    # 27 titles are a department's name, five more end in markup.
    assert raw.catalog["title"].null_count() == 27
    assert not raw.catalog["title"].str.contains('" />', literal=True).any()
    assert "categories" not in raw.catalog.columns  # "" throughout
    assert not raw.catalog["description"].str.contains(r"^\[|', '|'\]$").any()
    assert raw.catalog["description"].null_count() == 232
    given = raw.given
    assert given["train"]["timestamp"].max() < given["valid"]["timestamp"].min() == 1_495_152_000
    assert given["test"]["timestamp"].min() == 1_511_049_600
    assert max(table["history"].list.len().max() for table in given.values()) == 10
    assert raw.interactions.height == 12_336
    assert raw.interactions["user_id"].n_unique() == 2_625
    assert raw.interactions["timestamp"].null_count() == 0
