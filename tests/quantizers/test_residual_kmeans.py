"""Residual k-means: plain, balanced and with normalised residuals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from genrec.quantizers.projection import Projection
from genrec.quantizers.residual_kmeans import ResidualKMeans


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 8)) * 3 + 5
    own = rng.choice(6, 400, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    return (centres[own] + rng.normal(size=(400, 8))).astype(np.float32)


def distortion(quantizer: ResidualKMeans, vectors: np.ndarray) -> float:
    return float(((vectors - quantizer.decode(quantizer.encode(vectors))) ** 2).sum(axis=1).mean())


def by_hand(norms: list[float] | None = None) -> ResidualKMeans:
    """Two levels of two codes in the plane: coarse (0, 0) and (10, 0), then a step along y."""
    return ResidualKMeans(
        Projection(np.zeros(2, np.float32), None, np.ones(2, np.float32)),
        (
            np.array([[0, 0], [10, 0]], np.float32),
            np.array([[0, 1], [0, -1]], np.float32),
        ),
        (np.zeros(2, np.float32), np.zeros(2, np.float32)),
        None if norms is None else (np.array(norms, np.float32),),
        seed=0,
    )


def test_two_levels_by_hand():
    quantizer = by_hand()
    rows = np.array([[1, 3], [9, -1]], dtype=np.float32)
    assert quantizer.encode(rows).tolist() == [[0, 0], [1, 1]]
    # Row 1 leaves (-1, -1): distances to (0, 1) and (0, -1) are 1 + 4 and 1 + 0.
    distances = quantizer.level_distances(rows[1:], np.array([[1]], np.int32), 1)
    assert distances.tolist() == [[5, 1]]
    assert quantizer.reconstruct(np.array([[0, 0], [1, 1]])).tolist() == [[0, 1], [10, -1]]


def test_normalised_residuals_by_hand():
    quantizer = by_hand(norms=[3.0, 0.5])
    rows = np.array([[0, 4], [10, -2], [10, 0]], dtype=np.float32)
    # What level 1 leaves is (0, 4), (0, -2) and (0, 0); of unit length (0, 1), (0, -1), and zero.
    distances = quantizer.level_distances(rows, np.array([[0], [1], [1]], np.int32), 1)
    assert distances.tolist() == [[0, 4], [4, 0], [1, 1]]
    assert quantizer.encode(rows).tolist() == [[0, 0], [1, 1], [1, 0]]
    # Decoding stretches by the mean length below the code: 3 below code 0, 1/2 below code 1.
    decoded = quantizer.decode(np.array([[0, 0], [1, 1]]))
    assert decoded.tolist() == [[0, 3], [10, -0.5]]


def test_norms_are_the_mean_lengths_below_each_code(vectors: np.ndarray):
    quantizer = ResidualKMeans.fit(vectors, (8, 8, 8))
    assert ResidualKMeans.fit(vectors, (8,)).norms is None  # no level below
    assert quantizer.norms is not None and len(quantizer.norms) == 2
    codes, residual = quantizer.encode(vectors), quantizer.project(vectors)
    for level in range(2):
        residual = residual - quantizer.codebooks[level][codes[:, level]]
        length = np.linalg.norm(residual, axis=1)
        for code in range(8):
            expected = length[codes[:, level] == code].mean()
            assert quantizer.norms[level][code] == pytest.approx(expected, rel=1e-4)
        residual = residual / length[:, None]


def test_normalised_residuals_keep_level_1_and_use_lower_codes_alike(vectors: np.ndarray):
    # Half of the catalogue is dense: its residuals are small, and plain codes are spent elsewhere.
    rows = vectors.copy()
    rows[:200] = rows[:1] + 0.05 * rows[:200]
    plain = ResidualKMeans.fit(rows, (8, 16), normalize_residuals=False)
    scaled = ResidualKMeans.fit(rows, (8, 16))
    assert (plain.codebooks[0] == scaled.codebooks[0]).all()
    assert (plain.encode(rows)[:, 0] == scaled.encode(rows)[:, 0]).all()

    def perplexity(quantizer: ResidualKMeans) -> float:
        p = np.bincount(quantizer.encode(rows)[:, 1], minlength=16) / len(rows)
        return float(2 ** -(p[p > 0] * np.log2(p[p > 0])).sum())

    assert perplexity(scaled) > 1.3 * perplexity(plain)


def test_distortion_falls_with_every_level(vectors: np.ndarray):
    variance = float(((vectors - vectors.mean(0)) ** 2).sum(axis=1).mean())
    values = [variance] + [
        distortion(ResidualKMeans.fit(vectors, (8,) * n), vectors) for n in (1, 2, 3, 4)
    ]
    pairs = zip(values, values[1:], strict=False)
    assert all(after < 0.9 * before for before, after in pairs), values


def test_upper_levels_do_not_depend_on_lower_ones(vectors: np.ndarray):
    short, long = ResidualKMeans.fit(vectors, (8, 4)), ResidualKMeans.fit(vectors, (8, 4, 16))
    assert (long.encode(vectors)[:, :2] == short.encode(vectors)).all()
    assert long.codebook_sizes == (8, 4, 16)


def test_one_centroid_per_distinct_vector_reconstructs_exactly(vectors: np.ndarray):
    few = np.repeat(vectors[:5], 3, axis=0)
    quantizer = ResidualKMeans.fit(few, (5,))
    assert distortion(quantizer, few) == pytest.approx(0.0, abs=1e-8)
    assert len(np.unique(quantizer.encode(few))) == 5


def test_each_level_takes_the_nearest_centroid(vectors: np.ndarray):
    quantizer = ResidualKMeans.fit(vectors, (8, 8), normalize_residuals=False)
    codes, residual = quantizer.encode(vectors), quantizer.project(vectors)
    for level in range(2):
        distance = ((residual[:, None] - quantizer.codebooks[level]) ** 2).sum(-1)
        assert (codes[:, level] == distance.argmin(1)).all()
        residual = residual - quantizer.codebooks[level][codes[:, level]]
        # What is left over is measured by the level's distances.
        left = distance[np.arange(len(codes)), codes[:, level]]
        assert left == pytest.approx((residual**2).sum(axis=1), rel=1e-3, abs=1e-4)
    made = quantizer.project(vectors) - quantizer.reconstruct(codes)
    assert made == pytest.approx(residual, abs=1e-4)


def test_scale_and_offset_of_the_input_do_not_matter(vectors: np.ndarray):
    # Raw unit-norm embeddings are tiny; without standardising they collapse other quantizers.
    a = ResidualKMeans.fit(vectors, (8, 8))
    for other in (vectors * 1e-4 + 3, vectors * 1e6):
        b = ResidualKMeans.fit(other, (8, 8))
        assert len(np.unique(b.encode(other)[:, 0])) == 8
        assert distortion(b, other) / other.var() == pytest.approx(
            distortion(a, vectors) / vectors.var(), rel=0.2
        )


@pytest.mark.parametrize("max_fill", [1.1, 1.2, 1.4])
@pytest.mark.parametrize("normalize", [False, True])
def test_balanced_codes_of_every_level_are_under_the_cap(vectors, max_fill, normalize):
    quantizer = ResidualKMeans.fit(
        vectors, (8, 16, 4), max_fill=max_fill, normalize_residuals=normalize
    )
    codes = quantizer.encode(vectors)
    for level, size in enumerate(quantizer.codebook_sizes):
        counts = np.bincount(codes[:, level], minlength=size)
        assert counts.max() <= 1.05 * max_fill * len(vectors) / size + 1
    assert quantizer.level_bias(0) is not None
    plain = ResidualKMeans.fit(vectors, (8, 16, 4)).encode(vectors)
    assert np.bincount(plain[:, 0]).max() > 1.5 * len(vectors) / 8  # or the cap says little


def test_a_balanced_code_is_that_of_the_vector_alone(vectors: np.ndarray, tmp_path: Path):
    quantizer = ResidualKMeans.fit(vectors[:300], (8, 8), max_fill=1.1)
    quantizer.save(tmp_path / "q.safetensors")
    back = ResidualKMeans.load(tmp_path / "q.safetensors")
    new = vectors[300:]
    one_by_one = np.concatenate([back.encode(row[None]) for row in new])
    assert (quantizer.encode(new) == one_by_one).all()


def test_plain_codes_have_no_bias(vectors: np.ndarray):
    assert ResidualKMeans.fit(vectors, (8, 8)).level_bias(1) is None


@pytest.mark.parametrize("normalize", [False, True])
def test_costs_are_the_squared_errors_of_what_codes_stand_for(normalize: bool):
    vectors = np.random.default_rng(0).gamma(1, size=(300, 6)).astype(np.float32)
    quantizer = ResidualKMeans.fit(vectors, (8, 6, 5), normalize_residuals=normalize)
    codes, latents = quantizer.encode(vectors), quantizer.project(vectors)
    costs = quantizer.level_costs(latents, codes[:, :2], 2)
    for code in range(5):
        made = quantizer.reconstruct(np.column_stack([codes[:, :2], np.full(300, code)]))
        assert costs[:, code] == pytest.approx(((latents - made) ** 2).sum(axis=1), abs=1e-4)
