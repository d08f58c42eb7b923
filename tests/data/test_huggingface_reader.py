"""Hugging Face datasets: saved folders and folders of data files, no network."""

from __future__ import annotations

from pathlib import Path

import pytest

from genrec.data.readers import read_huggingface

datasets = pytest.importorskip("datasets")
LOG = {"who": ["u", "v", "u"], "what": [7, 9, 9], "when": [100, 300, 200], "blob": [[1], [2], [3]]}
ITEMS = {"what": [9, 7], "name": ["Tent", "Lamp"]}
MAPPING = {
    "user_column": "who", "item_column": "what", "time_column": "when", "title_column": "name",
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    log = datasets.Dataset.from_dict(LOG)
    # A selection is a list of indices over the same Arrow file.
    parts = {"train": log, "late": log.select([2, 1])}
    datasets.DatasetDict(parts).save_to_disk(folder / "log")
    datasets.Dataset.from_dict(ITEMS, split="train").save_to_disk(folder / "items")
    return folder


def test_a_saved_dataset(saved):
    raw = read_huggingface(saved / "log", "train", items_path=saved / "items", **MAPPING)
    assert raw.interactions.rows() == [
        ("u", 7, 100, None), ("v", 9, 300, None), ("u", 9, 200, None),
    ]  # fmt: skip
    assert raw.catalog.rows() == [(9, "Tent"), (7, "Lamp")]
    late = read_huggingface(saved / "log", "late", **MAPPING)
    assert late.interactions["timestamp"].to_list() == [200, 300]
    assert late.catalog["item_id"].to_list() == [9]


def test_catalogue_and_users_from_files(saved, tmp_path):
    (tmp_path / "items.csv").write_text("what,name\n7,A\n9,B\n")
    (tmp_path / "users.csv").write_text("who,age\nu,30\n")
    raw = read_huggingface(
        saved / "log",
        "train",
        items_path=tmp_path / "items.csv",
        users_path=tmp_path / "users.csv",
        **MAPPING,
    )
    assert raw.catalog["title"].to_list() == ["A", "B"]
    assert raw.users is not None
    assert raw.users.rows() == [("u", 30)]


def test_a_folder_of_data_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("who,what,when\nu,7,100\nv,9,300\n")
    raw = read_huggingface(tmp_path / "data", "train[:1]", **MAPPING)
    assert raw.interactions.rows() == [("u", 7, 100, None)]
    with pytest.raises(ValueError, match=r"can't be loaded: .*corresponds to no data"):
        read_huggingface(tmp_path / "data", "train[:0]", **MAPPING)
    with pytest.raises(ValueError, match=r"split 'test'\) can't be loaded: .*; check the name"):
        read_huggingface(tmp_path / "data", "test", **MAPPING)


def test_what_cannot_be_read(saved, tmp_path):
    with pytest.raises(ValueError, match="has no split 'test'; it has train, late"):
        read_huggingface(saved / "log", "test", **MAPPING)
    with pytest.raises(ValueError, match="is the split 'train', not 'test'"):
        read_huggingface(saved / "items", "test", item_column="what", user_column="name")
    with pytest.raises(ValueError, match="has no subsets; drop 'small'"):
        read_huggingface(saved / "log", "train", "small", **MAPPING)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="can't be loaded .*save it again with save_to_disk"):
        read_huggingface(tmp_path, "train", **MAPPING)
    with pytest.raises(ValueError, match=r"no column 'user_id' \(user_column\); it has who, what"):
        read_huggingface(saved / "log", "train")
    with pytest.raises(TypeError, match="no_column"):
        read_huggingface(saved / "log", "train", no_column="x")
    with pytest.raises(ValueError, match="can't be loaded"):
        read_huggingface(tmp_path / "nothing-here", "train", **MAPPING)
