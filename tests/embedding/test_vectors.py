"""Vectors that the user brings."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file

from genrec.artifacts import Stage
from genrec.embedding import vectors
from genrec.embedding.vectors import content_vectors, copy_vectors, load_vectors

ITEMS = pl.Series("item_id", [7, 9, 12])
ROWS = np.arange(10, dtype=np.float32).reshape(5, 2)
IDS = [12, 5, 7, 8, 9]  # rows of ROWS for the items: 2, 4, 0


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32"])
def test_rows_are_kept_in_order_as_float32(tmp_path: Path, dtype: str, caplog):
    array = np.arange(6).reshape(3, 2).astype(dtype)
    np.save(tmp_path / "v.npy", array)
    loaded = load_vectors(tmp_path / "v.npy", ITEMS)
    assert loaded.dtype == np.float32 and (loaded == array).all()
    assert "row order is trusted" in caplog.text and "'7', '9', '12'" in caplog.text


def test_bfloat16_from_both_formats(tmp_path: Path):
    table = torch.tensor([[1.0, -2.5], [3.140625, 0.0], [1e30, -1e-20]], dtype=torch.bfloat16)
    bits = table.view(torch.int16).numpy()
    np.save(tmp_path / "v.npy", bits.view("V2"))
    save_file({"table": table, "bias": torch.zeros(3)}, tmp_path / "v.safetensors")
    for name in ("v.npy", "v.safetensors"):
        assert (load_vectors(tmp_path / name, ITEMS) == table.float().numpy()).all()


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_what_is_no_plain_matrix_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nan, inf = np.ones((3, 2)), np.ones((3, 2))
    nan[1, 0], inf[2, 1] = np.nan, np.inf
    cases = {
        "rows": (np.ones((2, 2)), "has 2 rows, the catalogue has 3 items"),
        "nan": (nan, "1 rows hold NaN or inf, the first is row 1"),
        "inf": (inf, "the first is row 2"),
        "huge": (np.full((3, 2), 1e300), "3 rows hold NaN or inf"),  # overflows float32
        "flat": (np.ones(3), r"shape \(3,\)"),
        "cube": (np.ones((3, 2, 2)), r"shape \(3, 2, 2\)"),
        "thin": (np.ones((3, 0)), r"shape \(3, 0\)"),
        "text": (np.array([["a", "b"]] * 3), "dtype <U1"),
        "complex": (np.ones((3, 2), dtype=complex), "dtype complex128"),
        "record": (np.ones((3, 2), dtype=[("a", "i2")]), "dtype"),
    }
    for name, (array, message) in cases.items():
        np.save(f"{name}.npy", array)
        with pytest.raises(ValueError, match=message) as error:
            load_vectors(f"{name}.npy", ITEMS)
        assert f"{name}.npy" in str(error.value)
    np.save("object.npy", np.array([[Bomb()]], dtype=object), allow_pickle=True)
    Path("pickle.npy").write_bytes(pickle.dumps(Bomb()))
    np.savez("zip.npy.npz", a=np.ones((3, 2)))
    Path("zip.npy.npz").rename("zip.npy")
    Path("empty.npy").write_bytes(b"")
    np.save("short.npy", np.ones((3, 2)))
    Path("short.npy").write_bytes(Path("short.npy").read_bytes()[:-8])
    for name in ("object", "pickle", "zip", "empty", "short"):
        with pytest.raises(ValueError, match=f"{name}.npy is not a plain .npy array"):
            load_vectors(f"{name}.npy", ITEMS)
    for name, what in (("v.parquet", "a Parquet"), ("v.safetensors", "a safetensors")):
        Path(name).write_bytes(b"nonsense, and enough of it")
        with pytest.raises(ValueError, match=f"{name} is not {what} file"):
            load_vectors(name, ITEMS)
    save_file({"a": torch.ones(3, 2), "b": torch.ones(3, 2)}, "two.safetensors")
    with pytest.raises(ValueError, match="exactly one table"):
        load_vectors("two.safetensors", ITEMS)
    with pytest.raises(ValueError, match="v.csv must end in"):
        load_vectors("v.csv", ITEMS)
    assert not Path("pwned").exists()


def write_ids(folder: Path, kind: str, ids: list) -> Path:
    path = folder / f"ids.{kind}"
    if kind == "npy":
        np.save(path, np.array(ids))
    elif kind == "txt":
        path.write_text("\n".join(map(str, ids)) + "\n")
    elif kind == "json":
        path.write_text(json.dumps(ids))
    else:
        pl.DataFrame({"item_id": ids, "other": 1}).write_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["npy", "txt", "json", "parquet"])
@pytest.mark.parametrize("strings", [False, True])
def test_rows_are_brought_into_the_order_of_the_catalogue(
    tmp_path: Path, kind: str, strings: bool, caplog
):
    caplog.set_level(logging.INFO)
    np.save(tmp_path / "v.npy", ROWS)
    ids = write_ids(tmp_path, kind, [str(i) for i in IDS] if strings else IDS)
    for items in (ITEMS, ITEMS.cast(pl.String)):
        assert load_vectors(tmp_path / "v.npy", items, ids).tolist() == ROWS[[2, 4, 0]].tolist()
    assert "2 rows of items that the catalogue lacks are ignored" in caplog.text
    assert "trusted" not in caplog.text


def test_a_copy_is_what_saving_the_loaded_rows_would_write(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(vectors, "_ROWS_AT_ONCE", 2)  # of three items
    np.save(tmp_path / "v.npy", ROWS.astype(np.float16))
    ids = write_ids(tmp_path, "json", IDS)
    loaded = load_vectors(tmp_path / "v.npy", ITEMS, ids)
    np.save(tmp_path / "saved.npy", loaded)
    copied = copy_vectors(tmp_path / "v.npy", ITEMS, tmp_path / "copy.npy", ids)
    assert isinstance(copied, np.memmap) and (copied == loaded).all()
    assert (tmp_path / "copy.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()
    # A copy that can't be whole isn't there, and one of before stays.
    broken = ROWS.copy()
    broken[[2, 4], 1] = np.nan, np.inf  # rows of the items 1 and 2
    broken[0] = np.nan
    np.save(tmp_path / "v.npy", broken)
    for call in (
        lambda: load_vectors(tmp_path / "v.npy", ITEMS, ids),
        lambda: copy_vectors(tmp_path / "v.npy", ITEMS, tmp_path / "copy.npy", ids),
        lambda: copy_vectors(tmp_path / "v.npy", ITEMS, tmp_path / "new.npy", ids),
    ):
        with pytest.raises(ValueError, match="3 rows hold NaN or inf, the first is row 0"):
            call()
    assert (tmp_path / "copy.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()
    assert not list(tmp_path.glob("new*")) and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kind", [pl.List(pl.Float64), pl.Array(pl.Float32, 2)])
def test_a_table_of_ids_and_vectors(tmp_path: Path, kind):
    path = tmp_path / "v.parquet"
    vectors = pl.Series(ROWS.tolist()).cast(kind)
    pl.DataFrame({"item_id": IDS, "title": "x", "vector": vectors}).write_parquet(path)
    assert load_vectors(path, ITEMS).tolist() == ROWS[[2, 4, 0]].tolist()
    with pytest.raises(ValueError, match="brings its own ids"):
        load_vectors(path, ITEMS, path)
    pl.DataFrame({"item_id": [7, 9, 12], "v": [[1.0], [1.0, 2.0], [3.0]]}).write_parquet(path)
    with pytest.raises(ValueError, match="must all have the same length"):
        load_vectors(path, ITEMS)
    pl.DataFrame({"item_id": [7, 9, 12], "v": [[1.0], [None], [3.0]]}).write_parquet(path)
    with pytest.raises(ValueError, match="1 rows hold NaN or inf"):
        load_vectors(path, ITEMS)
    pl.DataFrame({"id": [7, 9, 12], "v": [[1.0], [2.0], [3.0]]}).write_parquet(path)
    with pytest.raises(ValueError, match="item_id and one list column are needed"):
        load_vectors(path, ITEMS)


@pytest.mark.parametrize(
    ("kind", "ids", "message"),
    [
        ("txt", [12, 5, 7, 8], "5 rows, but 4 ids"),
        ("txt", [12, 5, 7, 8, 8], "1 ids name several rows, such as '8'"),
        ("txt", [12, "", 7, 8, 9], "1 rows without an item id"),
        ("txt", [1, 2, 3, 4, 7], r"no vector for 2 of the 3 items, such as '9', '12' \(it has"),
        ("txt", ["012", "07", "09", 1, 2], "no vector for 3 of the 3 items"),
        ("json", [12.0, 5.0, 7.0, 8.0, 9.0], "must hold a list"),
        ("json", [True, 5, 7, 8, 9], "must hold a list"),
        ("npy", [12.0, 5.0, 7.0, 8.0, 9.0], "dtype float64"),
        ("parquet", [12.0, 5.0, 7.0, 8.0, 9.0], "ids of type Float64"),
        ("parquet", [12, None, 7, 8, 9], "1 rows without an item id"),
    ],
)
def test_ids_that_do_not_fit_are_refused(tmp_path: Path, kind: str, ids: list, message: str):
    np.save(tmp_path / "v.npy", ROWS)
    with pytest.raises(ValueError, match=message):
        load_vectors(tmp_path / "v.npy", ITEMS, write_ids(tmp_path, kind, ids))


@pytest.mark.parametrize(
    ("method", "text", "expected"),
    [("lsa", False, 0), ("lsa", True, 1), ("collaborative", False, None)],
)
def test_content_is_what_holds_no_behaviour(tmp_path: Path, method, text, expected):
    stage = Stage(tmp_path, "prepare", {})
    stage.is_done()
    stage.finish(rows=1)
    with pytest.raises(ValueError, match="stage 'embed' has not finished"):
        content_vectors(tmp_path)
    stage = Stage(tmp_path, "embed", {"method": method}, ["prepare"])
    stage.is_done()
    np.save(stage.folder / "item_embeddings.npy", np.full((3, 2), 0.0))
    if text:
        np.save(stage.folder / "text_embeddings.npy", np.full((3, 2), 1.0))
    stage.finish(rows=3)
    found = content_vectors(tmp_path)
    assert found is None if expected is None else (found == expected).all()
