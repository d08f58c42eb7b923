"""Product quantization: the vector is cut into parts, each with a codebook of its own.

PQ (Jegou, Douze and Schmid 2011); OPQ (Ge et al. 2013) rotates first, so that the parts carry alike
much. RPG and ActionPiece use the codes as an unordered set; as a SID their order is that of the
parts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from genrec.quantizers.kmeans import faiss_seed, fit_rows, kmeans
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

_OPQ_ROWS = 65_536  # the rotation is learned on at most so many vectors


@dataclass(frozen=True)
class ProductQuantizer:
    """A fitted product quantizer.

    Attributes:
        projection: what happens to vectors first.
        rotation: OPQ's orthonormal columns, (n_levels * part, latent_dim), or None: the latents are
            padded with zeros to a multiple of the levels.
        codebooks: per level (codebook_size, part).
        prices: what a balanced fit adds to the distances, one (codebook_size,) per level.
        seed: what it was fitted with.
    """

    kind: ClassVar[str] = "product"

    projection: Projection
    rotation: FloatArray | None
    codebooks: tuple[FloatArray, ...]
    prices: tuple[FloatArray, ...]
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
        rotate: bool = True,
    ) -> ProductQuantizer:
        """Fit; arguments and errors as in `ResidualKMeans.fit`.

        Args:
            vectors: item vectors, (n_items, dim), finite; may be a memory map.
            codebook_sizes: centroids of each part.
            seed: of the k-means++ starts, the rotation and the sample.
            n_init: restarts per part.
            max_fill: cap on a code's items, as a multiple of an even share.
            standardize: see `Projection.fit`.
            pca_dim: see `Projection.fit`.
            rotate: OPQ; False is plain PQ.
        """
        check_settings(codebook_sizes, n_init, max_fill)
        check_input(vectors)
        levels = len(codebook_sizes)
        rows = sample_rows(vectors, fit_rows(max(codebook_sizes)), seed)
        check_distinct(rows, codebook_sizes)
        projection = Projection.fit(vectors, standardize, pca_dim, seed)
        latents = projection.apply(rows)
        if latents.shape[1] < levels:
            raise ValueError(
                f"{levels} levels need vectors of at least {levels} dimensions, not "
                f"{latents.shape[1]}"
            )
        part = -(-latents.shape[1] // levels)
        rotation = _opq(latents[:_OPQ_ROWS], levels, part, seed) if rotate else None
        latents = _rotate(latents, rotation, levels * part)
        fitted = [
            kmeans(
                latents[:, at * part : (at + 1) * part], size, seed + 7919 * at, n_init, max_fill
            )
            for at, size in enumerate(codebook_sizes)
        ]
        codebooks, prices = zip(*fitted, strict=True)
        return cls(projection, rotation, codebooks, prices, seed)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes per level."""
        return tuple(len(codebook) for codebook in self.codebooks)

    @property
    def dim(self) -> int:
        """Dimensions of the vectors that it encodes."""
        return len(self.projection.mean)

    @property
    def part(self) -> int:
        """Dimensions of one level's part."""
        return self.codebooks[0].shape[1]

    def project(self, vectors: npt.NDArray[np.floating]) -> FloatArray:
        """Vectors (n, dim), projected and rotated, (n, n_levels * part) float32."""
        width = len(self.codebooks) * self.part
        return _rotate(self.projection.apply(vectors), self.rotation, width)

    def level_distances(self, latents: FloatArray, prefix: CodeArray, level: int) -> FloatArray:
        """Squared distances of one part to its codes, (n, codebook_size), whatever the prefix."""
        own = latents[:, level * self.part : (level + 1) * self.part]
        return squared_distances(own, self.codebooks[level])

    def level_costs(self, latents: FloatArray, prefix: CodeArray, level: int) -> FloatArray:
        """`level_distances`, which are in the units of the latents, (n, codebook_size)."""
        return self.level_distances(latents, prefix, level)

    def level_bias(self, level: int) -> FloatArray | None:
        """Prices of a level's codes; None if they are all zero."""
        return self.prices[level] if self.prices[level].any() else None

    def encode(self, vectors: npt.NDArray[np.floating]) -> CodeArray:
        """Codes of vectors (n, dim), (n, n_levels) int32."""
        return encode_by_levels(self, vectors)

    def reconstruct(self, codes: CodeArray) -> FloatArray:
        """The codes' centroids side by side, (n, n_levels * part)."""
        check_codes(codes, self.codebook_sizes)
        return np.hstack([book[codes[:, at]] for at, book in enumerate(self.codebooks)])

    def decode(self, codes: CodeArray) -> FloatArray:
        """Reconstructed vectors, (n, dim), in the space of the input."""
        latents = self.reconstruct(codes)
        width = len(self.projection.scale)
        latents = latents[:, :width] if self.rotation is None else latents @ self.rotation
        return self.projection.invert(latents)

    def save(self, path: Path | str) -> None:
        """Write one safetensors file."""
        tensors = self.projection.tensors()
        if self.rotation is not None:
            tensors["rotation"] = self.rotation
        for level, (codebook, price) in enumerate(zip(self.codebooks, self.prices, strict=True)):
            tensors |= {f"codebook.{level}": codebook, f"prices.{level}": price}
        about = {"kind": self.kind, "seed": self.seed, "n_levels": len(self.codebooks)}
        save_file(tensors, path, {"genrec": json.dumps(about)})

    @classmethod
    def load(cls, path: Path | str) -> ProductQuantizer:
        """Read what `save` wrote."""
        tensors, about = read_tensors(path, cls.kind)
        levels = range(about["n_levels"])
        return cls(
            Projection.from_tensors(tensors),
            tensors.get("rotation"),
            tuple(tensors[f"codebook.{level}"] for level in levels),
            tuple(tensors[f"prices.{level}"] for level in levels),
            about["seed"],
        )


def _opq(latents: FloatArray, levels: int, part: int, seed: int) -> FloatArray:
    """OPQ's rotation, (levels * part, latent_dim), learned by faiss."""
    import faiss

    opq = faiss.OPQMatrix(latents.shape[1], levels, levels * part)
    # Its inner product quantizer needs no more codes than there are vectors.
    bits = max(1, min(8, int(np.log2(len(latents)))))
    inner = faiss.ProductQuantizer(levels * part, levels, bits)
    inner.cp.seed = faiss_seed(seed)
    inner.cp.min_points_per_centroid = 1
    opq.pq = inner
    opq.niter = 20
    # faiss writes past its buffers (and crashes) with fewer rows than dimensions: repeat them.
    repeats = -(-max(latents.shape[1], levels * part) // len(latents))
    opq.train(np.tile(latents, (repeats, 1)))
    rotation = faiss.vector_to_array(opq.A).reshape(levels * part, latents.shape[1])
    return np.ascontiguousarray(rotation, dtype=np.float32)


def _rotate(latents: FloatArray, rotation: FloatArray | None, width: int) -> FloatArray:
    if rotation is not None:
        return latents @ rotation.T
    return np.pad(latents, ((0, 0), (0, width - latents.shape[1])))
