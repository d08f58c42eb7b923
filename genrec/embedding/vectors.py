"""Item vectors that the user brings."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def load_vectors(path: Path | str, n_items: int) -> np.ndarray:
    """Read a ``.npy`` of shape (n_items, dim) as float32; row i belongs to catalogue row i.

    Raises:
        ValueError: the file isn't a plain 2-D float array with a row per item, or holds NaN or inf.
    """
    try:
        vectors = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a plain .npy array: {error}") from error
    if not isinstance(vectors, np.ndarray):
        raise ValueError(f"{path} is not a plain .npy array: it is an archive of several (.npz)")
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        raise ValueError(
            f"{path} has shape {vectors.shape} and dtype {vectors.dtype}; a float (items, dim) is "
            "needed"
        )
    if len(vectors) != n_items:
        raise ValueError(
            f"{path} has {len(vectors)} rows, the catalogue has {n_items} items; row i must be "
            "catalogue row i"
        )
    with np.errstate(over="ignore"):  # what float32 can't hold becomes inf and is refused below
        vectors = vectors.astype(np.float32)
    check_vectors(vectors, str(path))
    return vectors


def check_vectors(vectors: np.ndarray, name: str) -> None:
    """Raise ValueError if a row holds NaN or inf, naming the first one."""
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{name}: {int(bad.sum())} rows hold NaN or inf, the first is row {int(bad.argmax())}"
        )
