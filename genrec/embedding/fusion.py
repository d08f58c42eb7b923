"""Fusion of several vectors per item, such as text and behaviour, into one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from sklearn.decomposition import TruncatedSVD

logger = logging.getLogger(__name__)

FUSION_FILE = "fusion.safetensors"

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Fusion:
    """Concatenation of centred unit vectors, so that cosines mix by weight.

    Each part is centred by the mean of its non-zero rows, its rows are scaled to unit length and
    then by the square root of the weight. The inner product of two items is then the weighted mean
    of their cosines in the parts, and every row has unit length.

    A zero row of a part says that the part knows nothing of the item (a cold item has no
    behaviour). It stays zero there, and the item's other parts are scaled up to unit length:
    else cold items would lie near the origin, closer to each other than any two known ones, and
    k-means would give them one code because they are unknown, not because they are alike.

    Attributes:
        means: of each part's non-zero rows. ``# (dim_i,)`` each
        weights: of each part, above 0, of any sum. ``# (n_parts,)``
        axes: principal axes that are kept (lengths then fall below one), or None.
            ``# (dim, sum of dim_i)``
    """

    means: tuple[FloatArray, ...]
    weights: npt.NDArray[np.float64]
    axes: FloatArray | None = None

    @classmethod
    def fit(
        cls,
        parts: Sequence[tuple[npt.NDArray[np.floating], float]],
        dim: int | None = None,
        seed: int = 0,
    ) -> Fusion:
        """Means and axes of a catalogue.

        Args:
            parts: (vectors, weight) pairs; vectors (n_items, dim_i).
            dim: principal axes of the result that are kept; None: all.
            seed: of the randomised SVD behind `dim`.

        Raises:
            ValueError: no parts, different row counts, a weight that is not positive, or `dim` out
                of range.
        """
        vectors = [np.asarray(part, dtype=np.float32) for part, _ in parts]
        weights = np.array([weight for _, weight in parts], dtype=np.float64)
        if not (np.isfinite(weights).all() and (weights > 0).all()):
            raise ValueError(
                f"weights {weights.tolist()} must be positive; leave out unwanted parts"
            )
        whole = cls(tuple(_mean_of_known(part) for part in vectors), weights)
        fused = whole.fuse(vectors)
        if dim is None:
            return whole
        if not 1 <= dim <= min(fused.shape):
            raise ValueError(
                f"fused_dim={dim} must lie between 1 and {min(fused.shape)} (the smaller of items "
                "and dimensions)"
            )
        # Not centred again: the parts are, and a row without any part stays zero.
        svd = TruncatedSVD(dim, random_state=seed).fit(fused)
        return cls(whole.means, weights, svd.components_.astype(np.float32))

    def fuse(self, parts: Sequence[npt.NDArray[np.floating]]) -> FloatArray:
        """Fuse items of this catalogue or a later one.

        Args:
            parts: vectors of each part, (n, dim_i).

        Returns:
            (n, sum of dim_i) or (n, dim). A row is zero only if all its parts are.

        Raises:
            ValueError: no parts, or different row counts.
        """
        if not parts or len({len(vectors) for vectors in parts}) > 1:
            raise ValueError(
                f"parts have {[len(vectors) for vectors in parts]} rows; one row per item is "
                "needed in each"
            )
        pairs = zip(parts, self.means, strict=True)
        units = [_centred_unit(np.asarray(part, dtype=np.float32), mean) for part, mean in pairs]
        known = np.stack([unit.any(axis=1) for unit in units], axis=1)  # (n, n_parts)
        share = known * self.weights
        total = share.sum(axis=1, keepdims=True)
        share = np.sqrt(share / np.where(total > 0, total, 1)).astype(np.float32)
        fused = np.concatenate([unit * share[:, [i]] for i, unit in enumerate(units)], axis=1)
        lacking, empty = (~known).sum(axis=0).tolist(), int((~known.any(axis=1)).sum())
        logger.info("rows without a part: %s; without any: %d", lacking, empty)
        return fused if self.axes is None else fused @ self.axes.T

    def save(self, folder: Path) -> None:
        """Write `FUSION_FILE`."""
        tensors: dict[str, npt.NDArray[Any]] = {
            f"mean_{i}": mean for i, mean in enumerate(self.means)
        }
        tensors["weights"] = self.weights
        if self.axes is not None:
            tensors["axes"] = np.ascontiguousarray(self.axes)
        save_file(tensors, folder / FUSION_FILE)

    @classmethod
    def load(cls, folder: Path) -> Fusion:
        """Read what `save` wrote."""
        stored = load_file(folder / FUSION_FILE)
        means = tuple(stored[f"mean_{i}"] for i in range(len(stored["weights"])))
        return cls(means, stored["weights"], stored.get("axes"))


def _mean_of_known(vectors: FloatArray) -> FloatArray:
    """Mean of the rows that are not zero, (dim,)."""
    known = int(vectors.any(axis=1).sum())
    return (vectors.sum(axis=0, dtype=np.float64) / max(known, 1)).astype(np.float32)


def _centred_unit(vectors: FloatArray, mean: FloatArray) -> FloatArray:
    """Non-zero rows minus the mean, of unit length; what was zero or equals the mean is zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    centred = np.where(length > 0, vectors - mean, 0)
    left = np.linalg.norm(centred, axis=1, keepdims=True)
    told_apart = left > 1e-6 * np.maximum(length, np.linalg.norm(mean))
    return np.where(told_apart, centred / np.maximum(left, 1e-30), 0).astype(np.float32)
