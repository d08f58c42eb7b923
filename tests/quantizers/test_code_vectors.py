"""A vector for each code of any SID map."""

from __future__ import annotations

import numpy as np
import pytest

from genrec.quantizers.code_vectors import code_vectors
from genrec.quantizers.residual_kmeans import ResidualKMeans


def test_two_levels_by_hand():
    vectors = np.array([[0, 0], [2, 0], [10, 4], [12, 8]], dtype=np.float32)  # mean (6, 3)
    codes = np.array([[0, 0], [0, 1], [2, 0], [2, 1]], dtype=np.int32)
    first, second = code_vectors(vectors, codes, (3, 2))
    # Centred: (-6, -3), (-4, -3), (4, 1), (6, 5); means of codes 0 and 2, and nobody has 1.
    assert first.tolist() == [[-5, -3], [0, 0], [5, 3]]
    # Left over: (-1, 0), (1, 0), (-1, -2), (1, 2); codes 0 and 1 take every other.
    assert second.tolist() == [[-1, -1], [1, 1]]
    assert first.dtype == second.dtype == np.float32


def test_they_are_about_the_centroids_of_residual_kmeans():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(8, 6)) * 5
    vectors = (centres[rng.integers(0, 8, 500)] + rng.normal(size=(500, 6))).astype(np.float32)
    quantizer = ResidualKMeans.fit(vectors, (8, 8), normalize_residuals=False)
    found = code_vectors(vectors, quantizer.encode(vectors), (8, 8))
    for mine, book in zip(found, quantizer.codebooks, strict=True):
        assert mine == pytest.approx(book * quantizer.projection.scale, abs=0.3)


def test_means_of_all_codes_explain_the_vectors_of_their_items():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 4, (60, 3)).astype(np.int32)
    vectors = rng.normal(size=(60, 5)).astype(np.float32)
    books = code_vectors(vectors.astype(np.float16), codes, (4, 4, 4))
    left = vectors - vectors.mean(axis=0)
    for level, book in enumerate(books):
        before = (left**2).sum()
        left = left - book[codes[:, level]]
        assert (left**2).sum() < before
        for code in range(4):  # nothing is left over on average
            assert left[codes[:, level] == code].mean(axis=0) == pytest.approx(0, abs=2e-3)


def test_bad_input():
    codes = np.array([[0, 1], [1, 0]], dtype=np.int32)
    with pytest.raises(ValueError, match="3 vectors for 2 rows of codes"):
        code_vectors(np.zeros((3, 2), np.float32), codes, (2, 2))
    with pytest.raises(ValueError, match="outside its codebook"):
        code_vectors(np.zeros((2, 2), np.float32), codes, (2, 1))
    with pytest.raises(ValueError, match="has 3 levels"):
        code_vectors(np.zeros((2, 2), np.float32), codes, (2, 2, 2))
