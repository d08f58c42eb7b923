"""Residual k-means: level l clusters what levels 0 … l-1 left over.

The quantizer of OneRec (Zhou et al. 2025) and GREAM; GRID (Ju et al. 2025) compares it with RQ-VAE.
k-means++ on all data (or a large sample), where GRID stops after 30 steps on a buffer. With a cap
on how full a code may get it is the balanced variant that OneRec and MiniOneRec use.

GRID's normalised residuals: what a level leaves over is scaled to unit length before the next level
clusters it. Items of dense and of sparse regions then use the lower codebooks alike, which raises
their perplexity and lowers collisions at no cost to level 1; on Amazon Beauty (3 x 256, fused
vectors) from 36 and 29 to 229 and 233 codes, and from 31.5% to 9.7% of the items. To decode, the
length that was divided out is estimated by its mean below each code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from genrec.quantizers.kmeans import fit_rows, kmeans, nearest_codes
from genrec.quantizers.projection import Kind, Projection, sample_rows
from genrec.quantizers.quantizer import (
    CodeArray,
    FloatArray,
    check_codes,
    check_distinct,
    check_input,
    check_settings,
    encode_by_levels,
    read_tensors,
    squared_distances,
)


@dataclass(frozen=True)
class ResidualKMeans:
    """A fitted residual quantizer.

    Attributes:
        projection: what happens to vectors first.
        codebooks: centroids, one array (codebook_size, latent_dim) per level.
        prices: what a balanced fit adds to the distances, one (codebook_size,) per level.
        norms: mean length of what each code leaves over, one (codebook_size,) per level but the
            last; None if residuals aren't normalised.
        seed: what it was fitted with.
    """

    kind: ClassVar[str] = "residual-kmeans"

    projection: Projection
    codebooks: tuple[FloatArray, ...]
    prices: tuple[FloatArray, ...]
    norms: tuple[FloatArray, ...] | None
    seed: int

    @classmethod
    def fit(
        cls,
        vectors: npt.NDArray[np.floating],
        codebook_sizes: tuple[int, ...],
        seed: int = 0,
        n_init: int = 1,
        max_fill: float | None = None,
        standardize: Kind = "scale",
        pca_dim: int | None = None,
        normalize_residuals: bool = True,
    ) -> ResidualKMeans:
        """Fit level by level.

        Args:
            vectors: item vectors, (n_items, dim), finite; may be a memory map.
            codebook_sizes: centroids per level.
            seed: of the k-means++ starts and the sample.
            n_init: restarts per level; the lowest inertia wins.
            max_fill: cap on a code's items at each level, as a multiple of an even share; the
                perplexity of a level then is at least codebook_size / max_fill. None: no cap.
            standardize: see `Projection.fit`.
            pca_dim: see `Projection.fit`.
            normalize_residuals: scale what a level leaves over to unit length, for the next one.

        Raises:
            ValueError: wrong shape, NaN or inf, fewer distinct vectors than codes, bad settings.
        """
        check_settings(codebook_sizes, n_init, max_fill)
        check_input(vectors)
        rows = sample_rows(vectors, fit_rows(max(codebook_sizes)), seed)
        check_distinct(rows, codebook_sizes)
        projection = Projection.fit(vectors, standardize, pca_dim, seed)
        normalize_residuals = normalize_residuals and len(codebook_sizes) > 1
        residual = projection.apply(rows)
        codebooks, prices, norms = [], [], []
        for level, size in enumerate(codebook_sizes):
            centroids, price = kmeans(residual, size, seed + 7919 * level, n_init, max_fill)
            codes = nearest_codes(residual, centroids, price)
            residual = residual - centroids[codes]
            codebooks.append(centroids)
            prices.append(price)
            if normalize_residuals:
                residual, length = _unit(residual)
                norms.append(_mean_by_code(length, codes, size))
        kept = tuple(norms[:-1]) if normalize_residuals else None
        return cls(projection, tuple(codebooks), tuple(prices), kept, seed)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes per level."""
        return tuple(len(codebook) for codebook in self.codebooks)

    @property
    def dim(self) -> int:
        """Dimensions of the vectors that it encodes."""
        return len(self.projection.mean)

    def project(self, vectors: npt.NDArray[np.floating]) -> FloatArray:
        """Vectors (n, dim) in the space of the codebooks, (n, latent_dim) float32."""
        return self.projection.apply(vectors)

    def level_distances(self, latents: FloatArray, prefix: CodeArray, level: int) -> FloatArray:
        """Squared distances of the residuals to the codes of `level`, (n, codebook_size).

        Below the first level they are in units of the residual's length if that is normalised.
        """
        residual = latents
        for above in range(level):
            residual = residual - self.codebooks[above][prefix[:, above]]
            if self.norms is not None:
                residual, _ = _unit(residual)
        return squared_distances(residual, self.codebooks[level])

    def level_costs(self, latents: FloatArray, prefix: CodeArray, level: int) -> FloatArray:
        """Squared error of the latents if `level` were the last, (n, codebook_size).

        Where residuals are normalised this isn't `level_distances`: lengths count again, as the
        means that `reconstruct` puts in their place.
        """
        if self.norms is None:
            return self.level_distances(latents, prefix, level)
        made, length = self._walk(prefix)
        # |rest - length * code|^2 = length^2 * |rest / length - code|^2, and lengths may be 0.
        costs = (latents - made) @ (-2.0 * self.codebooks[level].T)
        costs += length * (self.codebooks[level] ** 2).sum(axis=1)
        return length * costs + ((latents - made) ** 2).sum(axis=1, keepdims=True)

    def level_bias(self, level: int) -> FloatArray | None:
        """Prices of a level's codes; None if they are all zero."""
        return self.prices[level] if self.prices[level].any() else None

    def encode(self, vectors: npt.NDArray[np.floating]) -> CodeArray:
        """Codes of vectors (n, dim), (n, n_levels) int32."""
        return encode_by_levels(self, vectors)

    def reconstruct(self, codes: CodeArray) -> FloatArray:
        """Sum of the codes' centroids, (n, latent_dim)."""
        check_codes(codes, self.codebook_sizes)
        return self._walk(codes)[0]

    def _walk(self, prefix: CodeArray) -> tuple[FloatArray, FloatArray]:
        """Latents that the first codes stand for, and the length of the next codebook's vectors.

        Args:
            prefix: codes of the first levels, (n, up to n_levels).

        Returns:
            (n, latent_dim) and (n, 1); the length is 1 unless residuals are normalised.
        """
        latents = np.zeros((len(prefix), self.codebooks[0].shape[1]), dtype=np.float32)
        length = np.ones((len(prefix), 1), dtype=np.float32)
        for level in range(prefix.shape[1]):
            latents += length * self.codebooks[level][prefix[:, level]]
            if self.norms is not None and level < len(self.norms):
                length = length * self.norms[level][prefix[:, level], None]
        return latents, length

    def decode(self, codes: CodeArray) -> FloatArray:
        """Reconstructed vectors, (n, dim), in the space of the input."""
        return self.projection.invert(self.reconstruct(codes))

    def save(self, path: Path | str) -> None:
        """Write one safetensors file."""
        tensors = self.projection.tensors()
        for level, (codebook, price) in enumerate(zip(self.codebooks, self.prices, strict=True)):
            tensors |= {f"codebook.{level}": codebook, f"prices.{level}": price}
        tensors |= {f"norms.{level}": norms for level, norms in enumerate(self.norms or ())}
        about = {
            "kind": self.kind,
            "seed": self.seed,
            "n_levels": len(self.codebooks),
            "normalize_residuals": self.norms is not None,
        }
        save_file(tensors, path, {"genrec": json.dumps(about)})

    @classmethod
    def load(cls, path: Path | str) -> ResidualKMeans:
        """Read what `save` wrote."""
        tensors, about = read_tensors(path, cls.kind)
        levels = range(about["n_levels"])
        return cls(
            Projection.from_tensors(tensors),
            tuple(tensors[f"codebook.{level}"] for level in levels),
            tuple(tensors[f"prices.{level}"] for level in levels),
            tuple(tensors[f"norms.{level}"] for level in levels[:-1])
            if about["normalize_residuals"]
            else None,
            about["seed"],
        )


def _unit(rows: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Rows of unit length (n, dim), zero ones left as they are, and their lengths (n,)."""
    length = np.linalg.norm(rows, axis=1)
    return rows / np.where(length > 0, length, 1.0)[:, None], length


def _mean_by_code(values: FloatArray, codes: npt.NDArray[np.integer], size: int) -> FloatArray:
    """Mean of each code's values, (size,); the mean of all where a code has none."""
    counts = np.bincount(codes, minlength=size)
    sums = np.bincount(codes, weights=values, minlength=size)
    return np.where(counts > 0, sums / np.maximum(counts, 1), values.mean()).astype(np.float32)
