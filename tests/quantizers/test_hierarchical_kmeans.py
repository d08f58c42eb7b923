"""Hierarchical k-means: clusters of clusters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.quantizers import hierarchical_kmeans as module
from genrec.quantizers.collisions import resolve_collisions
from genrec.quantizers.hierarchical_kmeans import HierarchicalKMeans
from genrec.quantizers.projection import Projection


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 5)) * 5
    return (centres[rng.choice(4, 300, p=[0.7, 0.1, 0.1, 0.1])] + rng.normal(size=(300, 5))).astype(
        np.float32
    )


def by_hand() -> HierarchicalKMeans:
    """Root: 0 at 0 (children -1 and 2), 1 at 100 (one child, 100); up to three children each."""
    column = lambda *values: np.array(values, np.float32)[:, None]  # noqa: E731
    return HierarchicalKMeans(
        Projection(np.zeros(1, np.float32), None, np.ones(1, np.float32)),
        (2, 3),
        (column(0, 100), column(-1, 2, 100)),
        (np.zeros(2, np.float32), np.zeros(3, np.float32)),
        (np.array([0, 2]), np.array([0, 2, 3])),
        seed=0,
    )


def test_codes_by_hand():
    tree = by_hand()
    rows = np.array([[-2], [1], [90]], dtype=np.float32)
    assert tree.encode(rows).tolist() == [[0, 0], [0, 1], [1, 0]]
    assert tree.reconstruct(np.array([[0, 1], [1, 0]])).ravel().tolist() == [2, 100]


def test_codes_of_unused_children_by_hand():
    tree = by_hand()
    rows = np.array([[1], [97]], dtype=np.float32)
    distances = tree.level_distances(rows, np.array([[0], [1]], np.int32), 1)
    # Children at -1 and 2, or at 100: squares 4, 1 and 9. The others: twice the farthest, plus 1.
    assert distances.tolist() == [[4, 1, 9], [9, 19, 19]]
    # They stand for their parent.
    assert tree.reconstruct(np.array([[0, 2], [1, 2]])).ravel().tolist() == [0, 100]


def test_below_a_cluster_that_does_not_exist_all_codes_are_alike():
    column = lambda *values: np.array(values, np.float32)[:, None]  # noqa: E731
    tree = HierarchicalKMeans(
        Projection(np.zeros(1, np.float32), None, np.ones(1, np.float32)),
        (3, 2, 2),
        (column(0, 10), column(0, 10), column(0, 10)),
        tuple(np.zeros(2, np.float32) for _ in range(3)),
        (np.array([0, 2]), np.array([0, 1, 2]), np.array([0, 1, 2])),
        seed=0,
    )
    rows = np.array([[13], [13]], dtype=np.float32)
    # Below (1, 1) there is no cluster: the deepest that is there is 1, at 10, 9 away. Below (2,)
    # there is only the root, whose place is the origin of the latents.
    assert tree.level_distances(rows, np.array([[1, 1], [2, 0]], np.int32), 2).tolist() == [
        [9, 9],
        [169, 169],
    ]
    assert tree.reconstruct(np.array([[1, 1, 0], [2, 1, 1]])).ravel().tolist() == [10, 0]
    assert tree.encode(rows).tolist() == [[1, 0, 0], [1, 0, 0]]


def test_items_of_a_prefix_are_the_rows_of_its_cluster(vectors: np.ndarray):
    tree = HierarchicalKMeans.fit(vectors, (4, 4, 4))
    codes, latents = tree.encode(vectors), tree.project(vectors)
    for prefix in np.unique(codes[:, :2], axis=0):
        inside = (codes[:, :2] == prefix).all(axis=1)
        full = np.zeros((1, 3), np.int32)
        full[0, :2] = prefix
        full[0, 2] = 99
        centre = tree.reconstruct(np.minimum(full, [[99, 99, 3]]))
        assert np.isfinite(centre).all()
        # The cluster's centroid is the mean of its rows.
        level, node = tree._deepest(full[:, :2])
        assert level.tolist() == [1]
        mean = latents[inside].mean(axis=0)
        assert tree.centroids[1][node[0]] == pytest.approx(mean, abs=0.15)


def test_distortion_falls_with_every_level(vectors: np.ndarray):
    values = []
    for levels in (1, 2, 3):
        tree = HierarchicalKMeans.fit(vectors, (4,) * levels)
        values.append(float(((vectors - tree.decode(tree.encode(vectors))) ** 2).sum()))
    assert values[1] < 0.8 * values[0] and values[2] < 0.8 * values[1]


def test_few_items_each_get_a_leaf(vectors: np.ndarray):
    few = vectors[:30]
    tree = HierarchicalKMeans.fit(few, (8, 8, 8))
    codes = tree.encode(few)
    assert len(np.unique(codes, axis=0)) == 30
    assert tree.decode(codes) == pytest.approx(few, abs=1e-4)


@pytest.mark.parametrize("max_fill", [None, 1.2])
@pytest.mark.parametrize("distinct", [8, 9, 33])
def test_many_identical_items(vectors: np.ndarray, distinct: int, max_fill):
    # More codes than distinct vectors below a node, though not fewer rows: k-means leaves centroids
    # that nobody is nearest to.
    rows = np.tile(vectors[:distinct], (60, 1))
    tree = HierarchicalKMeans.fit(rows, (4, 8, 8), max_fill=max_fill)
    codes = tree.encode(rows)
    assert len(np.unique(codes, axis=0)) == distinct
    assert tree.decode(codes) == pytest.approx(rows, abs=1e-2)  # faiss shifts what it splits
    for level in range(3):
        assert (np.diff(tree.children[level]) >= 1).all()  # no parent without children


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(5, 60))
def test_any_catalogue_can_be_a_tree(seed: int, copies: int, n: int):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, 3)).astype(np.float32)
    rows = np.concatenate([rows] + [rows[rng.integers(0, n, n) % 5]] * (copies - 1))
    tree = HierarchicalKMeans.fit(rows, (3, 3, 3), seed=seed)
    codes = tree.encode(rows)
    depth, _ = tree._deepest(codes)
    assert (depth == 2).all()  # every item has a leaf that exists
    if len(rows) <= 27:
        new, _, _ = resolve_collisions(tree, rows, codes)
        assert len(np.unique(new, axis=0)) == len(rows)


def test_a_cap_bounds_each_clusters_share_of_its_parent(vectors: np.ndarray):
    tree = HierarchicalKMeans.fit(vectors, (4, 4), max_fill=1.2)
    codes = tree.encode(vectors)
    assert np.bincount(codes[:, 0]).max() <= math.ceil(1.2 * 300 / 4)
    for code in range(4):
        below = codes[codes[:, 0] == code, 1]
        assert np.bincount(below).max() <= math.ceil(1.2 * len(below) / 4)
    plain = HierarchicalKMeans.fit(vectors, (4, 4)).encode(vectors)
    assert np.bincount(plain[:, 0]).max() > 1.2 * 300 / 4 + 1  # or the cap says little


def test_spill_into_clusters_that_do_not_exist(vectors: np.ndarray):
    # 16 identical items in a space of 4 x 4: they fill their own leaf's parent, then siblings and
    # codes that have no cluster.
    rows = np.concatenate([vectors[:3], np.tile(vectors[3:4], (13, 1))])
    tree = HierarchicalKMeans.fit(rows, (4, 4))
    codes = tree.encode(rows)
    new, sizes, report = resolve_collisions(tree, rows, codes)
    assert sizes == (4, 4) and len(np.unique(new, axis=0)) == 16
    assert report.spilled >= 9 and math.isfinite(report.distortion_after)
    assert report.largest_group == 13


@pytest.mark.parametrize("max_fill", [None, 1.5])
def test_large_clusters_are_fitted_on_a_sample(
    vectors: np.ndarray, max_fill: float | None, monkeypatch: pytest.MonkeyPatch
):
    def error(tree: HierarchicalKMeans) -> float:
        return float(((vectors - tree.decode(tree.encode(vectors))) ** 2).sum())

    whole = HierarchicalKMeans.fit(vectors, (4, 4), max_fill=max_fill)
    held, apply = [], Projection.apply

    def watched(self: Projection, rows: np.ndarray) -> np.ndarray:
        held.append(len(rows))
        return apply(self, rows)

    monkeypatch.setattr(module, "fit_rows", lambda size: 60)
    monkeypatch.setattr(Projection, "apply", watched)
    sampled = HierarchicalKMeans.fit(vectors, (4, 4), max_fill=max_fill)
    assert max(held) == 60  # of 300
    # All items go down the tree: its lowest clusters are as many as with all of them.
    assert len(sampled.centroids[1]) == len(whole.centroids[1]) == 16
    assert error(sampled) < 1.3 * error(whole)
    again = HierarchicalKMeans.fit(vectors, (4, 4), max_fill=max_fill)
    assert (again.encode(vectors) == sampled.encode(vectors)).all()
