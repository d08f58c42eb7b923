"""Fusion of text and behaviour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from genrec.embedding.fusion import Fusion

A = np.array([[1.0, 0], [-1, 0], [0, 3], [0, -3]])  # centred already
B = np.array([[0.0, 5], [0, -5], [0, 0], [0, 0]])  # the last two items are unknown


def fuse(parts, dim: int | None = None, seed: int = 0) -> np.ndarray:
    return Fusion.fit(parts, dim, seed).fuse([vectors for vectors, _ in parts])


def test_cosines_mix_by_weight():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 4)) + 3, rng.normal(size=(20, 6)) - 1
    fused = fuse([(a, 3), (b, 1)])
    assert fused.shape == (20, 10) and fused.dtype == np.float32

    def cosine(v):
        v = v - v.mean(0)
        v /= np.linalg.norm(v, axis=1, keepdims=True)
        return v @ v.T

    assert fused @ fused.T == pytest.approx(0.75 * cosine(a) + 0.25 * cosine(b), abs=1e-5)


def test_an_unknown_part_stays_zero_and_the_others_fill_its_place():
    fused = fuse([(A, 0.5), (B, 0.5)])
    half = np.sqrt(0.5)
    expected = [[half, 0, 0, half], [-half, 0, 0, -half], [0, 1, 0, 0], [0, -1, 0, 0]]
    assert fused == pytest.approx(np.array(expected), abs=1e-6)


def test_zero_rows_do_not_move_the_mean():
    known = np.array([[4.0, 1], [4, -1], [0, 0], [0, 0], [0, 0]])
    fused = fuse([(known, 1.0)])
    assert fused == pytest.approx(np.array([[0, 1], [0, -1], [0, 0], [0, 0], [0, 0]]), abs=1e-6)


def test_rows_that_all_equal_the_mean_say_nothing():
    fused = fuse([(np.full((4, 2), 0.1), 0.5), (B, 0.5)])
    assert (fused[2:] == 0).all()
    assert np.linalg.norm(fused[:2], axis=1) == pytest.approx(1)
    assert (fused[:, :2] == 0).all()


def test_reduced_rows_keep_distances_and_zeros():
    rng = np.random.default_rng(1)
    low = rng.normal(size=(30, 3)) @ rng.normal(size=(3, 8))  # rank 3, and 3 of `other`
    low -= low.mean(0)
    low[:5] = 0
    other = np.where(np.arange(30)[:, None] < 4, 0, rng.normal(size=(30, 2)))
    whole, reduced = fuse([(low, 1), (other, 1)]), fuse([(low, 1), (other, 1)], dim=6, seed=3)
    assert reduced.shape == (30, 6) and (reduced[:4] == 0).all()
    assert reduced @ reduced.T == pytest.approx(whole @ whole.T, abs=1e-4)
    assert (reduced == fuse([(low, 1), (other, 1)], dim=6, seed=3)).all()


@pytest.mark.parametrize("dim", [None, 3])
def test_later_items_are_fused_by_the_means_and_axes_of_then(tmp_path: Path, dim: int | None):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 4)) + 3, rng.normal(size=(20, 6)) - 1
    b[:3] = 0
    fusion = Fusion.fit([(a, 0.7), (b, 0.3)], dim)
    whole = fusion.fuse([a, b])
    fusion.save(tmp_path)
    loaded = Fusion.load(tmp_path)
    assert loaded.fuse([a, b]).tolist() == whole.tolist()
    assert loaded.fuse([a[7:9], b[7:9]]) == pytest.approx(whole[7:9], abs=1e-6)
    # A new item without behaviour lies where a known one of the same text without any lies.
    assert loaded.fuse([a[[1]], b[[1]]]) == pytest.approx(whole[[1]], abs=1e-6)
    cold = loaded.fuse([a[[9]], np.zeros((1, 6))])[0]
    centred = np.append(a[9] - a.mean(0), np.zeros(6))
    expected = centred / np.linalg.norm(centred)
    if dim is not None:
        assert loaded.axes is not None and loaded.axes.shape == (3, 10)
        expected = loaded.axes @ expected
    assert cold == pytest.approx(expected, abs=1e-5)
    assert not loaded.fuse([np.zeros((2, 4)), np.zeros((2, 6))]).any()
    with pytest.raises(ValueError, match=r"parts have \[2, 1\] rows"):
        loaded.fuse([a[:2], b[:1]])


@pytest.mark.parametrize(
    ("parts", "dim", "message"),
    [
        ([], None, r"parts have \[\] rows"),
        ([(A, 1), (B[:3], 1)], None, r"parts have \[4, 3\] rows"),
        ([(A, 1), (B, 0)], None, "must be positive"),
        ([(A, 1), (B, np.nan)], None, "must be positive"),
        ([(A, 1)], 3, "fused_dim=3 must lie between 1 and 2"),
        ([(A, 1)], 0, "fused_dim=0 must lie between 1 and 2"),
    ],
)
def test_what_cannot_be_fused(parts, dim, message: str):
    with pytest.raises(ValueError, match=message):
        fuse(parts, dim)
