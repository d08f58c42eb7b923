"""Product quantization, plain and rotated."""

from __future__ import annotations

import math

import numpy as np
import pytest

from genrec.quantizers.product import ProductQuantizer
from genrec.quantizers.projection import Projection


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Correlated, with most of the variance in the first dimensions."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(10, 10)) * 0.7 ** np.arange(10)
    return (rng.normal(size=(400, 10)) @ mix.T + 4).astype(np.float32)


def error(quantizer: ProductQuantizer, vectors: np.ndarray) -> float:
    return float(((vectors - quantizer.decode(quantizer.encode(vectors))) ** 2).sum())


def test_parts_by_hand():
    quantizer = ProductQuantizer(
        Projection(np.zeros(3, np.float32), None, np.ones(3, np.float32)),
        None,
        (np.array([[0, 0], [4, 4]], np.float32), np.array([[1, 0], [5, 0], [9, 0]], np.float32)),
        (np.zeros(2, np.float32), np.array([0, 30, 0], np.float32)),
        seed=0,
    )
    # Three dimensions, two parts of two: the last is padded with zero.
    rows = np.array([[1, 1, 8], [3, 4, 2]], dtype=np.float32)
    assert quantizer.project(rows).tolist() == [[1, 1, 8, 0], [3, 4, 2, 0]]
    nothing = np.zeros((2, 1), np.int32)
    assert quantizer.level_distances(quantizer.project(rows), nothing, 1).tolist() == [
        [49, 9, 1],
        [1, 9, 49],
    ]
    assert quantizer.level_bias(0) is None and quantizer.level_bias(1) is not None
    codes = quantizer.encode(rows)
    assert codes.tolist() == [[0, 2], [1, 0]]
    assert quantizer.reconstruct(codes).tolist() == [[0, 0, 9, 0], [4, 4, 1, 0]]
    assert quantizer.decode(codes).tolist() == [[0, 0, 9], [4, 4, 1]]
    assert quantizer.codebook_sizes == (2, 3)


def test_plain_parts_are_clustered_apart(vectors: np.ndarray):
    # Codes of a level depend on its own dimensions alone.
    quantizer = ProductQuantizer.fit(vectors, (8, 8), rotate=False, standardize="none")
    other = vectors.copy()
    other[:, 5:] = 0
    codes = quantizer.encode(vectors)
    assert (quantizer.encode(other)[:, 0] == codes[:, 0]).all()
    assert (quantizer.encode(other)[:, 1] != codes[:, 1]).any()


@pytest.mark.parametrize(("dim", "levels"), [(10, 2), (10, 3), (10, 4), (5, 3), (4, 4), (7, 1)])
@pytest.mark.parametrize("rotate", [True, False])
def test_any_number_of_levels(vectors: np.ndarray, dim: int, levels: int, rotate: bool):
    rows = vectors[:, :dim]
    quantizer = ProductQuantizer.fit(rows, (16,) * levels, rotate=rotate)
    assert quantizer.part == math.ceil(dim / levels)
    if rotate:
        # Orthonormal columns: lengths are kept, also where zeros are padded.
        assert quantizer.rotation is not None
        assert quantizer.rotation.shape == (levels * quantizer.part, dim)
        assert quantizer.rotation.T @ quantizer.rotation == pytest.approx(np.eye(dim), abs=1e-4)
    latents = quantizer.project(rows)
    lengths = np.linalg.norm(quantizer.projection.apply(rows), axis=1)
    assert np.linalg.norm(latents, axis=1) == pytest.approx(lengths, rel=1e-4)
    made = quantizer.reconstruct(quantizer.encode(rows))
    # No rotation can add error on the way back.
    scale = quantizer.projection.scale[0]
    assert error(quantizer, rows) <= ((latents - made) ** 2).sum() * scale**2 * (1 + 1e-3)


def test_a_rotation_lowers_the_error(vectors: np.ndarray):
    # Nearly all variance lies in two directions that plain PQ puts into one part.
    rng = np.random.default_rng(1)
    rows = np.zeros((400, 8), np.float32)
    rows[:, :2] = rng.normal(size=(400, 2)) * 5
    rows += rng.normal(size=rows.shape).astype(np.float32) * 0.2
    plain, turned = (ProductQuantizer.fit(rows, (8,) * 4, rotate=r) for r in (False, True))
    assert error(turned, rows) < 0.6 * error(plain, rows)


def test_more_levels_than_dimensions(vectors: np.ndarray):
    with pytest.raises(ValueError, match="4 levels need vectors of at least 4 dimensions, not 3"):
        ProductQuantizer.fit(vectors[:, :3], (8,) * 4)
    with pytest.raises(ValueError, match="4 levels need vectors of at least 4 dimensions, not 2"):
        ProductQuantizer.fit(vectors, (8,) * 4, pca_dim=2)
    assert ProductQuantizer.fit(vectors, (8,) * 10).part == 1


@pytest.mark.parametrize("n", [2, 4, 8, 40])
def test_fewer_items_than_dimensions(n: int):
    # faiss writes past its buffers here unless rows are repeated; it crashed for 4 x 12.
    rows = np.random.default_rng(0).normal(size=(n, 64)).astype(np.float32)
    for seed in range(3):
        quantizer = ProductQuantizer.fit(rows, (2, 2, 2), seed=seed)
        assert quantizer.rotation is not None
        assert quantizer.rotation.T @ quantizer.rotation == pytest.approx(np.eye(64), abs=1e-4)
        assert np.isfinite(quantizer.decode(quantizer.encode(rows))).all()


def test_balanced_parts(vectors: np.ndarray):
    quantizer = ProductQuantizer.fit(vectors**3, (8, 8), max_fill=1.25)
    codes = quantizer.encode(vectors**3)
    for level in range(2):
        assert np.bincount(codes[:, level]).max() <= math.ceil(1.25 * 400 / 8)
    plain = ProductQuantizer.fit(vectors**3, (8, 8)).encode(vectors**3)
    assert np.bincount(plain[:, 0]).max() > 1.25 * 400 / 8 + 1
