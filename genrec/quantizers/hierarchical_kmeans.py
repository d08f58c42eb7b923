"""Hierarchical k-means: each cluster is clustered again; a code means something below its prefix.

The tree index of generative retrieval (DSI: Tay et al. 2022). A cluster with no more distinct
vectors than codes gives each of them its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tqdm.auto import tqdm

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

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HierarchicalKMeans:
    """A fitted tree of clusters.

    The nodes of a level are numbered parent by parent, so a node's children are a range.

    Attributes:
        projection: what happens to vectors first.
        sizes: most children of a node at each level.
        centroids: per level (n_nodes, latent_dim).
        prices: per level (n_nodes,): what a balanced fit adds to the distances.
        children: per level l the first node of level l below each node of level l-1 and an end
            mark, (n_nodes of level l-1 + 1,); level 0 has one parent, the root.
        seed: what it was fitted with.
    """

    kind: ClassVar[str] = "hierarchical-kmeans"

    projection: Projection
    sizes: tuple[int, ...]
    centroids: tuple[FloatArray, ...]
    prices: tuple[FloatArray, ...]
    children: tuple[IntArray, ...]
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
        progress: bool = True,
    ) -> HierarchicalKMeans:
        """Fit the tree; arguments and errors as in `ResidualKMeans.fit`.

        All vectors go down the tree, so that the lowest clusters have as many as there are; but the
        centroids of a large cluster are those of a seeded sample of it, and no more vectors than
        that are held at once. `max_fill` caps each cluster's share of its parent, in the sample.
        """
        check_settings(codebook_sizes, n_init, max_fill)
        check_input(vectors)
        rows = sample_rows(vectors, fit_rows(codebook_sizes[0]), seed)
        check_distinct(rows, codebook_sizes[:1])
        projection = Projection.fit(vectors, standardize, pca_dim, seed)
        del rows

        def latents_of(items: IntArray) -> FloatArray:
            return projection.apply(np.asarray(vectors[items], dtype=np.float32))

        groups = [np.arange(len(vectors))]
        centroids, prices, children = [], [], []
        for level, size in enumerate(codebook_sizes):
            below, parts, costs, counts = [], [], [], []
            label = f"level {level + 1} of {len(codebook_sizes)}"
            for group in tqdm(groups, desc=label, disable=not progress or len(groups) < 100):
                part, price, codes = _cluster(
                    latents_of, group, size, seed + level, n_init, max_fill
                )
                order = np.argsort(codes, kind="stable")
                ends = np.cumsum(np.bincount(codes, minlength=len(part)))
                below += np.split(group[order], ends[:-1])
                parts.append(part)
                costs.append(price)
                counts.append(len(part))
            groups = below
            centroids.append(np.concatenate(parts))
            prices.append(np.concatenate(costs))
            children.append(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
        return cls(
            projection,
            tuple(codebook_sizes),
            tuple(centroids),
            tuple(prices),
            tuple(children),
            seed,
        )

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes per level."""
        return self.sizes

    @property
    def dim(self) -> int:
        """Dimensions of the vectors that it encodes."""
        return len(self.projection.mean)

    def project(self, vectors: npt.NDArray[np.floating]) -> FloatArray:
        """Vectors (n, dim) in the space of the centroids, (n, latent_dim) float32."""
        return self.projection.apply(vectors)

    def level_distances(self, latents: FloatArray, prefix: CodeArray, level: int) -> FloatArray:
        """Squared distances to the children of each row's prefix, (n, codebook_size).

        A code without a cluster may be used if all others are taken; it stands for its deepest
        ancestor that exists and counts as farther than every existing sibling.
        """
        return self._distances(latents, prefix, level, priced=False)

    def level_costs(self, latents: FloatArray, prefix: CodeArray, level: int) -> FloatArray:
        """`level_distances`, which are in the units of the latents, (n, codebook_size)."""
        return self.level_distances(latents, prefix, level)

    def level_bias(self, level: int) -> FloatArray | None:
        """None: prices differ from parent to parent, see `encode`."""
        return None

    def encode(self, vectors: npt.NDArray[np.floating]) -> CodeArray:
        """Codes of vectors (n, dim), (n, n_levels) int32."""
        return encode_by_levels(_Priced(self), vectors)

    def reconstruct(self, codes: CodeArray) -> FloatArray:
        """Centroid of the deepest cluster on the way, (n, latent_dim)."""
        check_codes(codes, self.codebook_sizes)
        level, node = self._deepest(codes)
        latents = np.zeros((len(codes), self.centroids[0].shape[1]), dtype=np.float32)
        for depth, centroids in enumerate(self.centroids):
            at = level == depth
            latents[at] = centroids[node[at]]
        return latents

    def decode(self, codes: CodeArray) -> FloatArray:
        """Reconstructed vectors, (n, dim), in the space of the input."""
        return self.projection.invert(self.reconstruct(codes))

    def save(self, path: Path | str) -> None:
        """Write one safetensors file."""
        tensors: dict[str, npt.NDArray[np.generic]] = dict(self.projection.tensors())
        for level in range(len(self.sizes)):
            tensors[f"centroids.{level}"] = self.centroids[level]
            tensors[f"prices.{level}"] = self.prices[level]
            tensors[f"children.{level}"] = self.children[level]
        about = {"kind": self.kind, "seed": self.seed, "sizes": list(self.sizes)}
        save_file(tensors, path, {"genrec": json.dumps(about)})

    @classmethod
    def load(cls, path: Path | str) -> HierarchicalKMeans:
        """Read what `save` wrote."""
        tensors, about = read_tensors(path, cls.kind)
        levels = range(len(about["sizes"]))
        return cls(
            Projection.from_tensors(tensors),
            tuple(about["sizes"]),
            tuple(tensors[f"centroids.{level}"] for level in levels),
            tuple(tensors[f"prices.{level}"] for level in levels),
            tuple(tensors[f"children.{level}"] for level in levels),
            about["seed"],
        )

    def _deepest(self, prefix: CodeArray) -> tuple[IntArray, IntArray]:
        """Level (-1: the root) and node of the deepest cluster on the way of each prefix."""
        level = np.full(len(prefix), -1, dtype=np.int64)
        node = np.zeros(len(prefix), dtype=np.int64)
        for depth in range(prefix.shape[1]):
            live = np.flatnonzero(level == depth - 1)
            first, end = self.children[depth][node[live]], self.children[depth][node[live] + 1]
            child = first + prefix[live, depth]
            inside = child < end
            node[live[inside]] = child[inside]
            level[live[inside]] = depth
        return level, node

    def _distances(
        self, latents: FloatArray, prefix: CodeArray, level: int, priced: bool
    ) -> FloatArray:
        depth, node = self._deepest(prefix)
        distances = np.zeros((len(latents), self.sizes[level]), dtype=np.float32)
        complete = depth == level - 1
        order = np.flatnonzero(complete)[np.argsort(node[complete], kind="stable")]
        nodes, starts = np.unique(node[order], return_index=True)
        groups = np.split(order, starts[1:]) if len(order) else []
        for parent, rows in zip(nodes, groups, strict=True):
            first, end = self.children[level][parent], self.children[level][parent + 1]
            found = squared_distances(latents[rows], self.centroids[level][first:end])
            distances[rows, end - first :] = 2 * found.max(axis=1, keepdims=True) + 1.0
            distances[rows, : end - first] = found
            if priced:
                distances[rows, : end - first] += self.prices[level][first:end]
                distances[rows, end - first :] = np.inf
        for above in range(-1, level - 1):  # below a code that has no cluster all codes are alike
            rows = np.flatnonzero(~complete & (depth == above))
            own = self.centroids[above][node[rows]] if above >= 0 else 0.0
            distances[rows] = ((latents[rows] - own) ** 2).sum(axis=1, keepdims=True)
        return distances


class _Priced:
    """A tree whose distances hold the prices of its nodes: what encoding goes by."""

    def __init__(self, tree: HierarchicalKMeans) -> None:
        self.codebook_sizes, self.dim = tree.codebook_sizes, tree.dim
        self.project, self.level_bias = tree.project, tree.level_bias
        self._tree = tree

    def level_distances(self, latents: FloatArray, prefix: CodeArray, level: int) -> FloatArray:
        return self._tree._distances(latents, prefix, level, priced=True)


def _cluster(
    latents_of: Callable[[IntArray], FloatArray],
    group: IntArray,
    size: int,
    seed: int,
    n_init: int,
    max_fill: float | None,
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Centroids and prices of the parts of a group of items, none empty, and each item's part.

    Each distinct vector is a part of its own if they are few.
    """
    most = fit_rows(size)
    fitted = group
    if len(group) > most:
        fitted = np.sort(np.random.default_rng(seed).choice(group, most, replace=False))
    rows = latents_of(fitted)
    if len(rows) <= 4 * size:
        distinct, codes = np.unique(rows, axis=0, return_inverse=True)
        if len(distinct) <= size:
            return distinct, np.zeros(len(distinct), dtype=np.float32), codes.ravel()
    centroids, prices = kmeans(rows, size, seed, n_init, max_fill)
    codes = np.empty(len(group), dtype=np.int64)
    for start in range(0, len(group), most):
        if len(group) > most:
            rows = latents_of(group[start : start + most])
        codes[start : start + most] = nearest_codes(rows, centroids, prices)
    # Where many rows are identical, k-means leaves centroids that no row is nearest to.
    used, codes = np.unique(codes, return_inverse=True)
    return centroids[used], prices[used], codes
