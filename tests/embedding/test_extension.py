"""Vectors of a later catalogue."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.artifacts import Stage, write_parquet
from genrec.embedding.extension import Extension
from genrec.embedding.vectors import VECTORS

OLD = np.array([[0.0, 1], [2, 3], [4, 5]], dtype=np.float32)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Items a, b, c."""
    stage = Stage(tmp_path / "old", "prepare", {})
    assert not stage.is_done()
    write_parquet(stage.folder / "catalog.parquet", pl.DataFrame({"item_id": ["a", "b", "c"]}))
    stage.finish(rows=3)
    stage = Stage(tmp_path / "old", "embed", {}, ["prepare"])
    assert not stage.is_done()
    np.save(stage.folder / VECTORS, OLD)
    (stage.folder / "lsa.json").write_text("{}")
    stage.finish(rows=3)
    return tmp_path / "old"


def test_known_rows_stay_and_new_ones_stand_between_them(run: Path):
    old = Extension.of(run, pl.Series(["c", "new", "a", "newer"]))
    assert old.row_of.tolist() == [2, -1, 0, -1]
    assert old.is_new.tolist() == [False, True, False, True] and old.n_gone == 1
    table = old.grown(VECTORS, np.array([[9.0, 9], [8, 8]]))
    assert table.tolist() == [[4, 5], [9, 9], [0, 1], [8, 8]] and table.dtype == np.float32
    # c's text stayed, a's changed; b left and the others are new.
    assert old.changed(["A", "B", "C"], ["C", "x", "A2", "y"]) == 1


def test_nothing_new(run: Path):
    old = Extension.of(run, pl.Series(["b"]))
    assert old.grown(VECTORS, np.empty((0, 2))).tolist() == [[2, 3]] and old.n_gone == 2


def test_pieces_are_carried_on(run: Path, tmp_path: Path):
    old = Extension.of(run, pl.Series(["a"]))
    old.carry(["lsa.json"], tmp_path)
    assert (tmp_path / "lsa.json").read_text() == "{}"
    with pytest.raises(ValueError, match="has no fusion.safetensors: it was embedded before"):
        old.carry(["fusion.safetensors"], tmp_path)
    with pytest.raises(ValueError, match="has no text_embeddings.npy"):
        old.rows("text_embeddings.npy")


def test_what_is_refused(run: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="item ids are Int64, those of .* are String; prepare"):
        Extension.of(run, pl.Series([1, 2]))
    with pytest.raises(ValueError, match="new items' vectors have 3 dimensions, .* has 2"):
        Extension.of(run, pl.Series(["a", "n"])).grown(VECTORS, np.ones((1, 3)))
    with pytest.raises(ValueError, match="stage 'embed' has not finished"):
        Extension.of(tmp_path, pl.Series(["a"]))
