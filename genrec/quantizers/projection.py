"""What happens to item vectors before they are quantized: centring, scaling, PCA, whitening.

Raw unit-length text vectors share one large mean direction, which collapses an RQ-VAE under every
optimizer; centring is therefore part of every kind but "none".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA

from genrec.quantizers.quantizer import (
    FINITE,
    LARGEST,
    FloatArray,
    check_finite,
    check_input,
    row_blocks,
)

Kind = Literal["none", "scale", "standard", "whiten"]
KINDS: tuple[Kind, ...] = ("none", "scale", "standard", "whiten")

FIT_ROWS = 500_000  # statistics of a larger catalogue come from a seeded sample
_PREFIX = "projection."


@dataclass(frozen=True)
class Projection:
    """An affine map into the space that is quantized: ``((x - mean) @ matrix) / scale``.

    Attributes:
        mean: subtracted from every vector, (dim,).
        matrix: orthonormal columns, (dim, latent_dim), or None for the identity.
        scale: divides every latent dimension, (latent_dim,).
    """

    mean: FloatArray
    matrix: FloatArray | None
    scale: FloatArray

    @classmethod
    def fit(
        cls,
        vectors: npt.NDArray[np.floating],
        kind: Kind = "scale",
        pca_dim: int | None = None,
        seed: int = 0,
    ) -> Projection:
        """Fit to vectors (n, dim), or to a seeded sample of `FIT_ROWS` of them.

        Args:
            vectors: any float type; may be a memory map.
            kind: "scale" divides by one number, so that directions of little variance are not
                blown up; "standard" divides each dimension by its own deviation (a constant one
                stays as it is); "whiten" rotates to the principal axes and divides each by its
                deviation; "none" changes nothing.
            pca_dim: keep that many principal axes; None keeps all.
            seed: of the sample and the randomised PCA.

        Raises:
            ValueError: unknown kind, `pca_dim` out of range, NaN or inf, wrong shape.
        """
        if kind not in KINDS:
            raise ValueError(f"standardize={kind!r} is none of {', '.join(KINDS)}")
        check_input(vectors)
        rows = sample_rows(vectors, FIT_ROWS, seed, LARGEST)
        dim = rows.shape[1]
        if pca_dim is not None and not 1 <= pca_dim <= min(rows.shape):
            raise ValueError(
                f"pca_dim={pca_dim} must lie between 1 and {min(rows.shape)} (the smaller of items "
                "and dimensions)"
            )
        if kind == "none" and pca_dim is None:
            return cls(np.zeros(dim, np.float32), None, np.ones(dim, np.float32))
        mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        matrix, latents = None, rows - mean
        if pca_dim is not None or kind == "whiten":
            kept = pca_dim or min(rows.shape)
            matrix = np.ascontiguousarray(
                PCA(kept, random_state=seed).fit(latents).components_.T, dtype=np.float32
            )
            latents = latents @ matrix
        return cls(mean, matrix, _scale(latents, kind))

    def apply(self, vectors: npt.NDArray[np.floating]) -> FloatArray:
        """Latents of vectors (n, dim), (n, latent_dim) float32."""
        latents = vectors - self.mean
        if self.matrix is not None:
            latents = latents @ self.matrix
        return (latents / self.scale).astype(np.float32, copy=False)

    def invert(self, latents: FloatArray) -> FloatArray:
        """Vectors of latents (n, latent_dim), (n, dim); what PCA dropped stays at the mean."""
        vectors = latents * self.scale
        if self.matrix is not None:
            vectors = vectors @ self.matrix.T
        return (vectors + self.mean).astype(np.float32, copy=False)

    def tensors(self) -> dict[str, FloatArray]:
        """The arrays by name, for a quantizer's file."""
        arrays = {"mean": self.mean, "scale": self.scale}
        if self.matrix is not None:
            arrays["matrix"] = self.matrix
        return {_PREFIX + name: np.ascontiguousarray(array) for name, array in arrays.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, FloatArray]) -> Projection:
        """Take back what `tensors` gave."""
        return cls(
            tensors[_PREFIX + "mean"], tensors.get(_PREFIX + "matrix"), tensors[_PREFIX + "scale"]
        )


def sample_rows(
    vectors: npt.NDArray[np.floating], most: int, seed: int, largest: float = FINITE
) -> FloatArray:
    """All rows, or a seeded sample of `most` of them in their order, as float32.

    Raises:
        ValueError: any row, of the sample or not, holds NaN, inf or a value beyond `largest`.
    """
    for block in row_blocks(*vectors.shape):
        check_finite(np.asarray(vectors[block], dtype=np.float32), block.start, largest)
    if len(vectors) > most:
        picked = np.random.default_rng(seed).choice(len(vectors), most, replace=False)
        vectors = vectors[np.sort(picked)]  # sorted: a memory map is then read forwards
    return np.asarray(vectors, dtype=np.float32)


def _scale(latents: FloatArray, kind: Kind) -> FloatArray:
    dim = latents.shape[1]
    if kind == "scale":
        return np.full(dim, float(latents.std()) or 1.0, dtype=np.float32)
    if kind == "none":
        return np.ones(dim, dtype=np.float32)
    deviation = latents.std(axis=0)
    # What is constant but for rounding would be blown up to noise of unit size. Rounding of float32
    # vectors leaves some 1e-6 of the largest deviation along axes that hold nothing.
    constant = deviation <= 1e-4 * max(float(deviation.max(initial=0.0)), 1e-12)
    return np.where(constant, 1.0, deviation).astype(np.float32)
