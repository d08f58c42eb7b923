"""Collision resolution: bijective always, and no more distortion than needed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.quantizers.collisions import resolve_collisions
from genrec.quantizers.quality import collision_rate
from genrec.quantizers.residual_kmeans import ResidualKMeans


def distortion(vectors: np.ndarray, codes: np.ndarray, codebooks: np.ndarray) -> float:
    made = codebooks[np.arange(codes.shape[1]), codes].sum(axis=1)
    return float(((vectors - made) ** 2).sum(axis=1).mean())


@st.composite
def worlds(draw):
    levels, size = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    n = draw(st.integers(1, size**levels))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    codebooks = rng.normal(size=(levels, size, 3)).astype(np.float32)
    kind = draw(st.sampled_from(["random", "identical", "few distinct", "one prefix"]))
    vectors = rng.normal(size=(n, 3)).astype(np.float32)
    if kind == "identical":
        vectors[:] = vectors[0]
    elif kind == "few distinct":
        vectors = vectors[rng.integers(0, min(n, 3), n)]
    codes = rng.integers(0, size, (n, levels))
    if kind in ("identical", "one prefix"):
        codes[:] = codes[0]
    return vectors, codes, codebooks


@settings(max_examples=200, deadline=None)
@given(worlds())
def test_always_bijective_and_in_range(world):
    vectors, codes, codebooks = world
    given_codes = codes.copy()
    new, report = resolve_collisions(vectors, codes, codebooks)
    assert (codes == given_codes).all()
    assert new.shape == codes.shape and collision_rate(new) == 0.0
    assert new.min() >= 0 and new.max() < codebooks.shape[1]
    assert report.rate_before == collision_rate(codes)
    assert report.moved == (new != codes).any(axis=1).sum()
    assert report.spilled == (new[:, :-1] != codes[:, :-1]).any(axis=1).sum()
    assert report.distortion_before == pytest.approx(
        distortion(vectors, codes, codebooks), rel=1e-4
    )
    assert report.distortion_after == pytest.approx(distortion(vectors, new, codebooks), rel=1e-4)
    if report.rate_before == 0:
        assert report.moved == 0


def test_nothing_moves_without_a_collision():
    rng = np.random.default_rng(0)
    codebooks = rng.normal(size=(2, 4, 3))
    codes = np.array(list(itertools.product(range(4), repeat=2)))[
        rng.permutation(16)
    ]  # every SID is taken
    new, report = resolve_collisions(rng.normal(size=(16, 3)), codes, codebooks)
    assert (new == codes).all() and report.moved == report.spilled == 0
    assert report.distortion_before == report.distortion_after


def test_groups_without_a_collision_stay_as_they_are():
    rng = np.random.default_rng(1)
    codebooks = rng.normal(size=(2, 4, 3))
    codes = np.array([[0, 0], [0, 0], [1, 2], [1, 3], [2, 0]])
    new, report = resolve_collisions(rng.normal(size=(5, 3)), codes, codebooks)
    assert (new[2:] == codes[2:]).all() and (new[:, 0] == codes[:, 0]).all()
    assert report.spilled == 0 and 1 <= report.moved <= 2


@pytest.mark.parametrize("seed", range(8))
def test_least_distortion_within_each_prefix_against_brute_force(seed: int):
    rng = np.random.default_rng(seed)
    vectors, codebooks = rng.normal(size=(6, 2)), rng.normal(size=(2, 4, 2))
    codes = np.array([[0, 1], [0, 1], [0, 1], [0, 2], [1, 0], [1, 0]])
    new, report = resolve_collisions(vectors, codes, codebooks)
    best = min(
        distortion(vectors, np.column_stack([codes[:, 0], [*four, *two]]), codebooks)
        for four in itertools.permutations(range(4), 4)
        for two in itertools.permutations(range(4), 2)
    )
    assert report.distortion_after == pytest.approx(best, rel=1e-6)
    assert (new[:, 0] == codes[:, 0]).all()


def test_a_prefix_over_capacity_spills_its_outermost_items_to_the_nearest_sibling():
    # Three codes a level: prefix 0 holds three items but has five. Its centroid is at 0, the
    # siblings' at 10 and -100; the two items nearest to 10 lose least by leaving.
    codebooks = np.array([[[0.0], [10.0], [-100.0]], [[-1.0], [0.0], [1.0]]])
    vectors = np.array([[0.0], [1.0], [-1.0], [4.0], [4.5]])
    codes = np.array([[0, 1], [0, 2], [0, 0], [0, 2], [0, 2]])
    new, report = resolve_collisions(vectors, codes, codebooks)
    assert new[:3].tolist() == [[0, 1], [0, 2], [0, 0]]
    assert new[3:, 0].tolist() == [1, 1] and collision_rate(new) == 0
    assert report.spilled == report.moved == 2


def test_as_many_identical_items_as_there_are_sids():
    vectors = np.zeros((27, 2), dtype=np.float32)
    codebooks = np.random.default_rng(0).normal(size=(3, 3, 2))
    new, report = resolve_collisions(vectors, np.zeros((27, 3), dtype=int), codebooks)
    assert len(np.unique(new, axis=0)) == 27
    assert report.identical_vectors == 27 and report.rate_before == 1.0


def test_more_items_than_sids():
    with pytest.raises(
        ValueError, match="10 items exceed the 9 SIDs of 2 levels x 3 codes; add a level"
    ):
        resolve_collisions(np.zeros((10, 2)), np.zeros((10, 2), dtype=int), np.zeros((2, 3, 2)))


def test_identical_vectors_are_counted():
    vectors = np.array([[0.0], [0.0], [1.0], [2.0], [2.0], [2.0]])
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 0], [1, 0]])
    _, report = resolve_collisions(vectors, codes, np.random.default_rng(0).normal(size=(2, 3, 1)))
    assert report.identical_vectors == 5 and report.rate_before == pytest.approx(5 / 6)


def test_with_the_quantizer_on_a_crowded_catalogue():
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(60, 4)).astype(np.float32) ** 3  # skewed: some codes are crowded
    quantizer = ResidualKMeans.fit(vectors, 2, 16)
    codes = quantizer.encode(vectors)
    assert collision_rate(codes) > 0.1
    new, report = resolve_collisions(quantizer.standardize(vectors), codes, quantizer.codebooks)
    assert collision_rate(new) == 0
    assert report.distortion_after < 0.25 * vectors.shape[1]  # of the total variance
