"""Vectors that the user brings."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from genrec.embedding.vectors import load_vectors


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32"])
def test_rows_are_kept_in_order_as_float32(tmp_path: Path, dtype: str):
    array = np.arange(6).reshape(3, 2).astype(dtype)
    np.save(tmp_path / "v.npy", array)
    loaded = load_vectors(tmp_path / "v.npy", 3)
    assert loaded.dtype == np.float32 and (loaded == array).all()


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
        "text": (np.array([["a", "b"]] * 3), "dtype <U1"),
        "complex": (np.ones((3, 2), dtype=complex), "dtype complex128"),
    }
    for name, (array, message) in cases.items():
        np.save(f"{name}.npy", array)
        with pytest.raises(ValueError, match=message) as error:
            load_vectors(f"{name}.npy", 3)
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
            load_vectors(f"{name}.npy", 3)
    assert not Path("pwned").exists()
