"""Residual k-means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from genrec.quantizers.residual_kmeans import ResidualKMeans


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 8)) * 3 + 5
    return (centres[rng.integers(0, 6, 200)] + rng.normal(size=(200, 8))).astype(np.float32)


def distortion(quantizer: ResidualKMeans, vectors: np.ndarray) -> float:
    return float(((vectors - quantizer.decode(quantizer.encode(vectors))) ** 2).sum(axis=1).mean())


def test_deterministic(vectors: np.ndarray):
    one, two = (ResidualKMeans.fit(vectors, 3, 8, seed=5) for _ in range(2))
    assert (one.codebooks == two.codebooks).all()
    assert (one.encode(vectors) == two.encode(vectors)).all()
    assert (ResidualKMeans.fit(vectors, 3, 8, seed=6).codebooks != one.codebooks).any()


def test_distortion_falls_with_every_level(vectors: np.ndarray):
    variance = float(((vectors - vectors.mean(0)) ** 2).sum(axis=1).mean())
    values = [variance] + [
        distortion(ResidualKMeans.fit(vectors, n, 8), vectors) for n in (1, 2, 3, 4)
    ]
    assert all(after < 0.9 * before for before, after in zip(values, values[1:], strict=False)), (
        values
    )


def test_one_centroid_per_distinct_vector_reconstructs_exactly(vectors: np.ndarray):
    few = np.repeat(vectors[:5], 3, axis=0)
    quantizer = ResidualKMeans.fit(few, 1, 5)
    assert distortion(quantizer, few) == pytest.approx(0.0, abs=1e-8)
    assert len(np.unique(quantizer.encode(few))) == 5


def test_each_level_takes_the_nearest_centroid(vectors: np.ndarray):
    quantizer = ResidualKMeans.fit(vectors, 2, 8)
    codes = quantizer.encode(vectors)
    residual = quantizer.standardize(vectors)
    for level in range(2):
        distance = ((residual[:, None] - quantizer.codebooks[level]) ** 2).sum(-1)
        assert (codes[:, level] == distance.argmin(1)).all()
        residual = residual - quantizer.codebooks[level][codes[:, level]]
    assert codes.dtype == np.int32 and codes.shape == (200, 2)


def test_scale_of_the_input_does_not_matter(vectors: np.ndarray):
    # Raw unit-norm embeddings are tiny; without standardising they collapse other quantizers.
    small = vectors * 1e-4 + 3
    a, b = ResidualKMeans.fit(vectors, 2, 8), ResidualKMeans.fit(small, 2, 8)
    used = [len(np.unique(q.encode(v)[:, 0])) for q, v in ((a, vectors), (b, small))]
    assert used == [8, 8]


def test_codebook_larger_than_the_distinct_items(vectors: np.ndarray):
    few = np.repeat(vectors[:5], 10, axis=0)
    message = "codebook_size=8 exceeds the 5 distinct item vectors; use at most 5"
    with pytest.raises(ValueError, match=message):
        ResidualKMeans.fit(few, 2, 8)
    assert ResidualKMeans.fit(few, 2, 5).encode(few).shape == (50, 2)  # the fix works


def test_saved_and_loaded_encodes_alike(vectors: np.ndarray, tmp_path: Path):
    quantizer = ResidualKMeans.fit(vectors, 2, 8)
    quantizer.save(tmp_path / "q.safetensors")
    back = ResidualKMeans.load(tmp_path / "q.safetensors")
    assert (back.encode(vectors) == quantizer.encode(vectors)).all()
    assert (back.decode(back.encode(vectors)) == quantizer.decode(quantizer.encode(vectors))).all()
