"""What happens to vectors before they are quantized."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from genrec.quantizers import projection as module
from genrec.quantizers import quantizer as quantizer_module
from genrec.quantizers.projection import KINDS, Projection, sample_rows


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(100, 5)) @ rng.normal(size=(5, 5)) + 7).astype(np.float32)


def test_scale_by_hand():
    # Mean (2, 10); centred values -2, 0, 2, 0 and 0, -2, 0, 2: variance 16/8, deviation sqrt(2).
    vectors = np.array([[0, 10], [2, 8], [4, 10], [2, 12]], dtype=np.float32)
    projection = Projection.fit(vectors, "scale")
    assert projection.mean.tolist() == [2, 10] and projection.matrix is None
    assert projection.scale == pytest.approx([2**0.5, 2**0.5])
    assert projection.apply(vectors)[0] == pytest.approx([-(2**0.5), 0])


def test_standard_by_hand():
    vectors = np.array([[0, 5, 1], [4, 5, 3]], dtype=np.float32)
    projection = Projection.fit(vectors, "standard")
    assert projection.scale.tolist() == [2, 1, 1]  # the constant dimension stays as it is
    assert projection.apply(vectors).tolist() == [[-1, 0, -1], [1, 0, 1]]


def test_none_changes_nothing(vectors: np.ndarray):
    projection = Projection.fit(vectors, "none")
    assert (projection.apply(vectors) == vectors).all()
    assert (projection.invert(vectors) == vectors).all()


def test_whitened_axes_are_uncorrelated_and_of_unit_variance(vectors: np.ndarray):
    latents = Projection.fit(vectors, "whiten").apply(vectors)
    assert np.cov(latents.T, bias=True) == pytest.approx(np.eye(5), abs=1e-3)


@pytest.mark.parametrize("pca_dim", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_what_keeps_all_dimensions_inverts(vectors: np.ndarray, kind, pca_dim):
    projection = Projection.fit(vectors, kind, pca_dim)
    if projection.matrix is not None:
        assert projection.matrix.T @ projection.matrix == pytest.approx(np.eye(5), abs=1e-5)
    latents = projection.apply(vectors)
    assert latents.dtype == np.float32
    assert np.abs(projection.invert(latents) - vectors).max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_what_pca_drops_stays_at_the_mean(vectors: np.ndarray, kind):
    projection = Projection.fit(vectors, kind, pca_dim=2)
    latents = projection.apply(vectors)
    assert latents.shape == (100, 2)
    back = projection.invert(latents)
    assert projection.apply(back) == pytest.approx(latents, abs=1e-3)  # a projection, idempotent
    # What is lost are the three least principal variances.
    values = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False) ** 2
    assert ((vectors - back) ** 2).sum() == pytest.approx(values[2:].sum(), rel=1e-3)


def test_whitening_blows_up_no_dimension_without_variance():
    rng = np.random.default_rng(0)
    flat = (rng.normal(size=(300, 3)) @ rng.normal(size=(3, 20)) + 5).astype(np.float32)
    fewer = rng.normal(size=(10, 20)).astype(np.float32)  # ten items span nine dimensions
    constant = rng.normal(size=(300, 4)).astype(np.float32)
    constant[:, 2] = 0.1
    for vectors, rank in ((flat, 3), (fewer, 9), (constant, 3)):
        for kind in ("whiten", "standard"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                projection = Projection.fit(vectors, kind)
                deviation = projection.apply(vectors).std(axis=0)
            assert ((np.abs(deviation - 1) < 1e-2) | (deviation < 1e-4)).all()
            if kind == "whiten":
                assert (deviation > 0.5).sum() == rank
            assert projection.invert(projection.apply(vectors)) == pytest.approx(vectors, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_identical_items_are_projected_to_finite_values(kind):
    same = np.full((6, 3), 0.1, dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if kind != "whiten" else "ignore")  # scikit-learn's PCA
        projection = Projection.fit(same, kind)
    assert projection.scale.tolist() == [1, 1, 1]
    assert projection.invert(projection.apply(same)) == pytest.approx(same)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pca_dim", [None, 2])
def test_tensors_round_trip(vectors: np.ndarray, kind, pca_dim):
    projection = Projection.fit(vectors, kind, pca_dim)
    back = Projection.from_tensors({**projection.tensors(), "codebook.0": np.zeros(1, np.float32)})
    assert (back.apply(vectors) == projection.apply(vectors)).all()
    assert (back.matrix is None) == (projection.matrix is None)


def test_half_precision_gives_float32(vectors: np.ndarray):
    half = vectors.astype(np.float16)
    projection = Projection.fit(half)
    assert projection.mean.dtype == projection.scale.dtype == np.float32
    assert projection.apply(half).dtype == np.float32


def test_bad_input(vectors: np.ndarray):
    with pytest.raises(ValueError, match="standardize='l2' is none of none, scale, standard"):
        Projection.fit(vectors, "l2")
    for dims in (0, -1, 6):
        with pytest.raises(ValueError, match=f"pca_dim={dims} must lie between 1 and 5"):
            Projection.fit(vectors, pca_dim=dims)
    with pytest.raises(ValueError, match="pca_dim=4 must lie between 1 and 3"):
        Projection.fit(vectors[:3], pca_dim=4)
    with pytest.raises(ValueError, match="a non-empty float"):
        Projection.fit(vectors[0])


def test_a_large_catalogue_is_sampled(
    vectors: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    np.save(tmp_path / "v.npy", vectors)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    sample = sample_rows(mapped, 30, seed=3)
    assert sample.shape == (30, 5) and sample.dtype == np.float32
    rows = [int(np.flatnonzero((vectors == row).all(axis=1))[0]) for row in sample]
    assert rows == sorted(set(rows))  # distinct, in their order
    assert (sample_rows(vectors, 30, seed=3) == sample).all()
    assert (sample_rows(vectors, 30, seed=4) != sample).any()
    assert (sample_rows(vectors, 100, seed=3) == vectors).all()
    monkeypatch.setattr(module, "FIT_ROWS", 30)
    assert Projection.fit(mapped, seed=3).mean == pytest.approx(sample.mean(axis=0), rel=1e-5)


def test_a_bad_row_is_named_even_if_it_is_not_in_the_sample(
    vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(quantizer_module, "BLOCK_CELLS", 16 * vectors.shape[1])
    bad = vectors.copy()
    bad[77, 1] = np.nan
    for seed in range(5):
        with pytest.raises(ValueError, match="1 vectors hold NaN or inf, the first is row 77"):
            sample_rows(bad, 3, seed)


def test_whitening_blows_up_no_direction_that_holds_rounding_alone():
    """Of rank 60 in 100 float32 dimensions: 40 principal axes hold nothing but rounding."""
    rng = np.random.default_rng(0)
    low_rank = (rng.normal(size=(5000, 60)) @ rng.normal(size=(60, 100))).astype(np.float32)
    deviation = Projection.fit(low_rank, "whiten").apply(low_rank).std(axis=0)
    assert np.allclose(deviation[:60], 1, atol=1e-3)
    assert deviation[60:].max() < 1e-3
