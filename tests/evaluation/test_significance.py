"""Bootstrap intervals where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from genrec.evaluation.significance import (
    Interval,
    bootstrap_means,
    difference_interval,
    mean_interval,
)


def test_interval_has_the_width_of_the_normal_theory():
    values = (np.arange(4000) % 10 == 0).astype(float)  # mean .1
    found = mean_interval(values, samples=2000, seed=1)
    expected = 1.96 * np.sqrt(0.1 * 0.9 / 4000)
    assert found.value == pytest.approx(0.1)
    assert found.half_width == pytest.approx(expected, rel=0.08)
    assert found.low == pytest.approx(0.1 - expected, abs=0.001)


def test_intervals_cover_the_true_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        found = mean_interval(rng.exponential(2.0, 300), samples=300, seed=trial)
        covered += found.low <= 2.0 <= found.high
    assert 0.89 <= covered / 200 <= 0.99


def test_pairing_finds_a_small_steady_difference():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 500)  # shared by both systems
    ours, theirs = hard + 0.5 + rng.normal(0, 0.1, 500), hard
    found = difference_interval(ours, theirs)
    assert 0.45 < found.low < found.value < found.high < 0.55
    swapped = difference_interval(theirs, ours)
    assert swapped.high < 0 and swapped.value == pytest.approx(-found.value)
    apart = mean_interval(ours)
    assert apart.half_width > 0.5  # unpaired, the difference would drown


def test_same_seed_same_draws_for_every_column_and_block():
    values = np.random.default_rng(0).random((50, 2))
    draws = bootstrap_means(values, samples=64, seed=5)
    assert (draws == bootstrap_means(values, samples=64, seed=5)).all()
    np.testing.assert_allclose(draws[:, 1], bootstrap_means(values[:, 1:], 64, seed=5)[:, 0])
    assert (draws != bootstrap_means(values, samples=64, seed=6)).any()


def test_groups_are_drawn_whole():
    # Ten users with 20 equal rows each: as informative as ten rows, not as two hundred.
    per_user = np.arange(10, dtype=float)
    values = np.repeat(per_user, 20)[:, None]
    groups = np.repeat(np.arange(10), 20)
    grouped = bootstrap_means(values, 500, 0, groups)
    np.testing.assert_allclose(grouped, bootstrap_means(per_user[:, None], 500, 0))
    assert grouped.std() > 3 * bootstrap_means(values, 500, 0).std()


def test_wrong_input_raises():
    with pytest.raises(ValueError, match="n_rows >= 1"):
        bootstrap_means(np.empty((0, 1)))
    with pytest.raises(ValueError, match="samples=0"):
        bootstrap_means(np.ones((3, 1)), samples=0)
    with pytest.raises(ValueError, match="groups has shape"):
        bootstrap_means(np.ones((3, 1)), groups=np.zeros(2, dtype=int))
    with pytest.raises(ValueError, match="cannot be paired"):
        difference_interval(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="level=95"):
        mean_interval(np.ones(3), level=95)
    assert Interval(0.5).half_width is None
