"""Reading a quantizer's file without knowing its kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from genrec.quantizers.hierarchical_kmeans import HierarchicalKMeans
from genrec.quantizers.loading import load_quantizer
from genrec.quantizers.product import ProductQuantizer
from genrec.quantizers.residual_kmeans import ResidualKMeans


@pytest.mark.parametrize("kind", [ResidualKMeans, HierarchicalKMeans, ProductQuantizer])
def test_the_kind_is_found(kind, tmp_path: Path):
    vectors = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    quantizer = kind.fit(vectors, (4, 3))
    quantizer.save(tmp_path / "quantizer")
    back = load_quantizer(str(tmp_path / "quantizer"))
    assert type(back) is kind and back.codebook_sizes == (4, 3)
    assert (back.encode(vectors) == quantizer.encode(vectors)).all()


@pytest.mark.parametrize("metadata", [None, {"genrec": "{}"}, {"other": "x"}])
def test_other_tensors_are_no_quantizer(tmp_path: Path, metadata):
    save_file({"a": np.zeros(2)}, tmp_path / "other", metadata)
    with pytest.raises(ValueError, match=r"other holds no quantizer that is known \(kind None\)"):
        load_quantizer(tmp_path / "other")


def test_a_kind_of_the_future(tmp_path: Path):
    about = {"genrec": json.dumps({"kind": "lattice"})}
    save_file({"a": np.zeros(2)}, tmp_path / "new", about)
    with pytest.raises(ValueError, match="kind 'lattice'"):
        load_quantizer(tmp_path / "new")


@pytest.mark.parametrize("load", [load_quantizer, ResidualKMeans.load])
def test_damaged_and_missing_files(tmp_path: Path, load):
    path = tmp_path / "quantizer"
    path.write_text("hello")
    with pytest.raises(ValueError, match="quantizer is no safetensors file, or a damaged one"):
        load(path)
    ResidualKMeans.fit(np.eye(4, dtype=np.float32), (2,)).save(path)
    path.write_bytes(path.read_bytes()[:-20])  # a copy that was cut off
    with pytest.raises(ValueError, match="no safetensors file, or a damaged one"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
