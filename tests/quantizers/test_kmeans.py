"""k-means, and codes of bounded size."""

from __future__ import annotations

import math

import numpy as np
import pytest

from genrec.quantizers import kmeans as module
from genrec.quantizers import quantizer as quantizer_module
from genrec.quantizers.kmeans import capped_prices, fit_rows, kmeans, nearest_codes
from genrec.quantizers.quantizer import squared_distances


def skewed(n: int = 600, dim: int = 6, seed: int = 0) -> np.ndarray:
    """Vectors of which plain k-means makes clusters of very different sizes."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, dim)) * 4
    share = np.array([2.0**-i for i in range(12)])
    own = rng.choice(12, n, p=share / share.sum())
    return (centres[own] + rng.normal(size=(n, dim))).astype(np.float32)


def counts(rows: np.ndarray, fitted: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return np.bincount(nearest_codes(rows, *fitted), minlength=len(fitted[0]))


def test_two_clusters_by_hand():
    rows = np.array([[0, 0], [0, 2], [10, 0], [10, 2]], dtype=np.float32)
    centroids, prices = kmeans(rows, 2, seed=0)
    assert sorted(centroids.tolist()) == [[0, 1], [10, 1]]
    assert prices.tolist() == [0, 0]


def test_as_many_codes_as_rows():
    rows = np.array([[0.0], [3.0], [7.0]], dtype=np.float32)
    assert sorted(kmeans(rows, 3, seed=0)[0].ravel().tolist()) == [0, 3, 7]


def test_restarts_never_raise_the_inertia():
    rows = skewed()

    def inertia(n_init: int) -> float:
        centroids, _ = kmeans(rows, 16, seed=1, n_init=n_init)
        return float(((rows[:, None] - centroids) ** 2).sum(-1).min(1).sum())

    assert inertia(8) <= inertia(1) * (1 + 1e-5)


def test_seeds_0_and_1_start_differently():
    rows = skewed()
    assert (kmeans(rows, 16, 0)[0] != kmeans(rows, 16, 1)[0]).any()
    assert (kmeans(rows, 16, 0)[0] == kmeans(rows, 16, 0)[0]).all()


def test_prices_by_hand():
    # Code 0 is nearest to all rows; rows prefer it to code 1 by 1, 2, 4 and 8. With a cap of 2 the
    # two least attached leave: the price lies between 2 and 4, half-way.
    distances = np.array([[0, 1], [0, 2], [0, 4], [0, 8]], dtype=np.float32)
    prices, codes = capped_prices(distances, 2, np.zeros(2, np.float32))
    assert codes.tolist() == [1, 1, 0, 0]
    assert prices.tolist() == [3, 0]
    # A cap that holds already changes nothing.
    prices, codes = capped_prices(distances, 4, np.zeros(2, np.float32))
    assert prices.tolist() == [0, 0] and codes.tolist() == [0, 0, 0, 0]
    # The start counts: code 1 is dear, so that code 0 must become dearer still.
    prices, codes = capped_prices(distances, 2, np.array([0, 5], np.float32))
    assert codes.tolist() == [1, 1, 0, 0] and prices.tolist() == [8, 5]


def test_prices_leave_their_start_alone():
    start = np.zeros(2, np.float32)
    capped_prices(np.array([[0, 1], [0, 2]], dtype=np.float32), 1, start)
    assert start.tolist() == [0, 0]


def test_prices_pass_a_surplus_on():
    # Rows leave code 0 for code 1, whose cap then makes one go on to code 2.
    distances = np.array([[0, 1, 9], [0, 4, 6], [0, 2, 9]], dtype=np.float32)
    prices, codes = capped_prices(distances, 1, np.zeros(3, np.float32))
    assert codes.tolist() == [1, 2, 0]  # in total 1 + 6 + 0, the least of all six assignments
    assert (codes == (distances + prices).argmin(axis=1)).all()


@pytest.mark.parametrize(("fill", "over"), [(1.2, 5), (2.0, 0)])
@pytest.mark.parametrize("seed", range(10))
def test_prices_keep_codes_under_their_cap(seed: int, fill: float, over: int):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(2, 12))
    n = 30 * size
    rows = skewed(n, seed=seed)
    distances = squared_distances(rows, rows[rng.choice(n, size, replace=False)])
    cap = math.ceil(fill * n / size)
    prices, codes = capped_prices(distances, cap, np.zeros(size, np.float32))
    # Bids among few rows may not have come to rest: then some rows too many are left.
    assert np.bincount(codes).max() <= cap + over
    assert (codes == (distances + prices).argmin(axis=1)).all()


@pytest.mark.parametrize(("max_fill", "slack"), [(1.0, 1.2), (1.2, 1.05), (1.6, 1.05)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_cap_holds_on_the_rows_and_bounds_the_perplexity(max_fill, slack, seed: int):
    rows, size = skewed(seed=seed), 16
    assert (
        counts(rows, kmeans(rows, size, seed)).max() > 1.8 * len(rows) / size
    )  # or it says little
    found = counts(rows, kmeans(rows, size, seed, max_fill=max_fill))
    assert found.max() <= slack * max_fill * len(rows) / size
    p = found[found > 0] / found.sum()
    assert 2 ** -(p * np.log2(p)).sum() >= 0.95 * size / max_fill


def test_prices_are_never_negative_and_one_is_zero():
    _, prices = kmeans(skewed(), 16, 0, max_fill=1.1)
    assert prices.min() == 0 and prices.max() > 0 and prices.dtype == np.float32


def test_balanced_codes_cost_little_distortion():
    rows = skewed()

    def distortion(**options: float) -> float:
        centroids, prices = kmeans(rows, 16, 0, **options)
        return float(((rows - centroids[nearest_codes(rows, centroids, prices)]) ** 2).sum())

    assert distortion(max_fill=1.2) < distortion(max_fill=1.0) * 1.02
    assert distortion(max_fill=1.2) < 2 * distortion()
    assert distortion(max_fill=1e9) < 1.01 * distortion()  # no cap, in effect


def test_identical_rows_do_not_drive_the_prices_up():
    # Items without a text share one vector. No price parts them, and they are more than a cap.
    rows = skewed(400)
    many = np.concatenate([rows, np.tile(rows[:1], (200, 1)), np.tile(rows[5:6], (100, 1))])
    fitted = kmeans(many, 16, 0, max_fill=1.2)
    alone = kmeans(rows, 16, 0, max_fill=1.2)
    assert fitted[1].max() < 3 * alone[1].max() + 1
    assert counts(rows, fitted).max() <= 1.05 * 1.2 * len(rows) / 16 + 1  # the others are spread
    codes = nearest_codes(rows, *fitted)
    spread = ((rows - rows.mean(axis=0)) ** 2).sum()
    assert ((rows - fitted[0][codes]) ** 2).sum() < 0.4 * spread


def test_a_sample_is_balanced_if_the_distances_would_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    rows = skewed(600)
    monkeypatch.setattr(module, "_HELD_DISTANCES", 300 * 16)
    found = counts(rows, kmeans(rows, 16, 0, max_fill=1.2))
    assert found.max() < 2 * 600 / 16 and not caplog.records  # nearly balanced
    monkeypatch.setattr(module, "_HELD_DISTANCES", 50 * 16)
    kmeans(rows, 16, 0, max_fill=1.2)
    assert "balancing 16 codes on 50 vectors only" in caplog.text


def test_nearest_codes_in_blocks(monkeypatch: pytest.MonkeyPatch):
    rows, centroids = skewed(100), skewed(5, seed=1)
    prices = np.array([0, 1, 2, 30, 4], np.float32)
    expected = (((rows[:, None] - centroids) ** 2).sum(-1) + prices).argmin(1)
    assert (nearest_codes(rows, centroids, prices) == expected).all()
    monkeypatch.setattr(quantizer_module, "BLOCK_CELLS", 35)
    assert (nearest_codes(rows, centroids, prices) == expected).all()


def test_how_many_rows_are_fitted_on():
    assert fit_rows(256) == 262_144  # the least
    assert fit_rows(8192) == 524_288  # 64 a code
