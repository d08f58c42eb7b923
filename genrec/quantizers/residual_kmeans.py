"""Residual k-means: level l clusters what levels 0 … l-1 left over.

The quantizer of OneRec (Zhou et al. 2025) and GREAM; GRID (Ju et al. 2025) compares it with RQ-VAE.
Clusters by scikit-learn with k-means++ on all data, where GRID stops after 30 steps on a buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from sklearn.cluster import KMeans, MiniBatchKMeans

# Above this many items Lloyd's passes over all of them stop paying; mini-batches take over.
_MINI_BATCH_ITEMS = 200_000
_ENCODE_ROWS = 65_536


@dataclass(frozen=True)
class ResidualKMeans:
    """A fitted residual quantizer.

    Attributes:
        mean: subtracted from every vector, (dim,).
        scale: every vector is divided by it afterwards; one number, so that directions of little
            variance are not blown up.
        codebooks: centroids, (n_levels, codebook_size, dim).
    """

    mean: np.ndarray
    scale: float
    codebooks: np.ndarray

    @classmethod
    def fit(
        cls, vectors: np.ndarray, n_levels: int, codebook_size: int, seed: int = 0, n_init: int = 1
    ) -> ResidualKMeans:
        """Fit level by level.

        Args:
            vectors: item vectors, (n_items, dim), finite.
            n_levels: tokens per item.
            codebook_size: centroids per level.
            seed: of the k-means++ initialisation.
            n_init: restarts per level; the lowest inertia wins.

        Raises:
            ValueError: the codebook has more entries than there are distinct items.
        """
        distinct = len(np.unique(vectors, axis=0))
        if codebook_size > distinct:
            raise ValueError(
                f"codebook_size={codebook_size} exceeds the {distinct} distinct item vectors; "
                f"use at most {distinct}"
            )
        mean = vectors.mean(axis=0)
        scale = float((vectors - mean).std()) or 1.0
        residual = ((vectors - mean) / scale).astype(np.float32)
        codebooks = []
        for level in range(n_levels):
            kind = KMeans if len(vectors) <= _MINI_BATCH_ITEMS else MiniBatchKMeans
            kmeans = kind(codebook_size, n_init=n_init, random_state=seed + level).fit(residual)
            centroids = kmeans.cluster_centers_.astype(np.float32)
            residual = residual - centroids[_nearest(residual, centroids)]
            codebooks.append(centroids)
        return cls(mean.astype(np.float32), scale, np.stack(codebooks))

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes of shape (n, n_levels), int32."""
        residual = self.standardize(vectors)
        codes = np.empty((len(vectors), len(self.codebooks)), dtype=np.int32)
        for level, centroids in enumerate(self.codebooks):
            codes[:, level] = _nearest(residual, centroids)
            residual = residual - centroids[codes[:, level]]
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Reconstructed vectors, (n, dim), in the space of the input."""
        levels = np.arange(codes.shape[1])
        return self.codebooks[levels, codes].sum(axis=1) * self.scale + self.mean

    def standardize(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors in the space of the codebooks, (n, dim) float32."""
        return ((vectors - self.mean) / self.scale).astype(np.float32)

    def save(self, path: Path | str) -> None:
        """Write one safetensors file."""
        tensors = {"mean": self.mean, "codebooks": self.codebooks, "scale": np.array([self.scale])}
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path | str) -> ResidualKMeans:
        """Read what `save` wrote."""
        tensors = load_file(path)
        return cls(tensors["mean"], float(tensors["scale"][0]), tensors["codebooks"])


def _nearest(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Index of the nearest centroid per row, (n,) int32; the lower index wins a tie."""
    half = 0.5 * (centroids**2).sum(axis=1)
    nearest = np.empty(len(rows), dtype=np.int32)
    for start in range(0, len(rows), _ENCODE_ROWS):  # bounds the distance matrix
        block = rows[start : start + _ENCODE_ROWS]
        nearest[start : start + _ENCODE_ROWS] = np.argmin(half - block @ centroids.T, axis=1)
    return nearest
