"""A vector for each code of any SID map, from the vectors of the items that have it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from genrec.quantizers.projection import Projection
from genrec.quantizers.quantizer import LARGEST, CodeArray, FloatArray, check_codes
from genrec.quantizers.residual_kmeans import ResidualKMeans


def code_vectors(
    vectors: npt.NDArray[np.floating], codes: CodeArray, codebook_sizes: Sequence[int]
) -> list[FloatArray]:
    """Mean, per code, of what the levels above leave of its items' vectors.

    For residual k-means these are about its centroids; but they exist for every map, imported or
    without a quantizer, and in the space of any vectors.

    Args:
        vectors: item vectors, (n_items, dim).
        codes: (n_items, n_levels).
        codebook_sizes: number of codes per level.

    Returns:
        One array (codebook_size, dim) per level; zero for codes that no item has.
    """
    check_codes(codes, tuple(codebook_sizes))
    if len(vectors) != len(codes):
        raise ValueError(f"{len(vectors)} vectors for {len(codes)} rows of codes")
    residual = np.asarray(vectors, dtype=np.float32)
    residual = residual - residual.mean(axis=0)
    found = []
    for level, size in enumerate(codebook_sizes):
        own = codes[:, level]
        member = sp.csr_matrix(
            (np.ones(len(own), np.float32), (own, np.arange(len(own)))), shape=(size, len(own))
        )
        counts = np.bincount(own, minlength=size)[:, None]
        means = (member @ residual / np.maximum(counts, 1)).astype(np.float32)
        residual = residual - means[own]
        found.append(means)
    return found


def quantizer_of_codes(
    vectors: npt.NDArray[np.floating], codes: CodeArray, codebook_sizes: Sequence[int]
) -> ResidualKMeans:
    """A quantizer for a map that came without one: its codebooks are `code_vectors`.

    Items find the codes of those most like them. It encodes to no code that no item has, since a
    model has not learned any; where items must be told apart such codes are free to be taken.

    Args:
        vectors: item vectors, (n_items, dim).
        codes: (n_items, n_levels).
        codebook_sizes: number of codes per level.
    """
    means = code_vectors(vectors, codes, codebook_sizes)
    prices = tuple(
        np.where(np.bincount(codes[:, level], minlength=size) > 0, 0, LARGEST).astype(np.float32)
        for level, size in enumerate(codebook_sizes)
    )
    centre = np.asarray(vectors, dtype=np.float32).mean(axis=0)
    projection = Projection(centre, None, np.ones(len(centre), np.float32))
    return ResidualKMeans(projection, tuple(means), prices, None, 0)
