"""Bootstrap intervals and the randomisation test where the answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from genrec.evaluation import significance
from genrec.evaluation.significance import (
    Interval,
    bootstrap_means,
    holm,
    interval,
    randomisation_test,
    resample_seeds,
)


def mean_interval(values: np.ndarray, samples: int = 1000, seed: int = 0) -> Interval:
    return interval(values.mean(), bootstrap_means(values[:, None], samples, seed)[:, 0])


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
    draws = bootstrap_means(np.column_stack([ours, theirs]))
    low, high = np.quantile(draws[:, 0] - draws[:, 1], [0.025, 0.975])
    assert 0.45 < low < 0.5 < high < 0.55
    assert mean_interval(ours).half_width > 0.5  # unpaired, the difference would drown


def plain_bootstrap(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    picked = rng.integers(0, len(values), (samples, len(values)))
    return values[picked].mean(axis=1)


@pytest.mark.parametrize("distinct", [2, 7, None])
def test_drawing_distinct_rows_equals_plain_resampling_in_distribution(distinct):
    rng = np.random.default_rng(0)
    values = rng.exponential(1.0, (200, 2))
    if distinct:  # multinomial counts of the distinct rows
        values = values[rng.integers(0, distinct, 200)]
    found, plain = bootstrap_means(values, 4000, 1), plain_bootstrap(values, 4000, 2)
    scale = plain.std(axis=0)
    # Standard errors: 1/sqrt(4000) = .016 of the spread for a mean, .011 for a spread.
    assert np.abs(found.mean(axis=0) - values.mean(axis=0)).max() < 4 * 0.016 * scale.max()
    np.testing.assert_allclose(found.std(axis=0), scale, rtol=0.07)
    for q in (0.025, 0.975):
        difference = np.quantile(found, q, axis=0) - np.quantile(plain, q, axis=0)
        assert np.abs(difference / scale).max() < 0.2
    correlation = np.corrcoef(values.T)[0, 1]  # rows are drawn whole: columns stay paired
    assert np.corrcoef(found.T)[0, 1] == pytest.approx(correlation, abs=0.07)


def test_only_how_often_a_row_occurs_matters():
    kinds = np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    sorted_rows = np.repeat(kinds, [30, 20, 10], axis=0)
    rest = np.repeat(kinds, [29, 19, 9], axis=0)
    mixed = np.concatenate([kinds, np.random.default_rng(0).permutation(rest)])
    np.testing.assert_array_equal(bootstrap_means(mixed, 50), bootstrap_means(sorted_rows, 50))


def test_same_seed_same_draws_for_every_column():
    values = np.random.default_rng(0).random((50, 2))
    draws = bootstrap_means(values, samples=64, seed=5)
    assert (draws == bootstrap_means(values, samples=64, seed=5)).all()
    np.testing.assert_allclose(draws[:, 1], bootstrap_means(values[:, 1:], 64, seed=5)[:, 0])
    assert (draws != bootstrap_means(values, samples=64, seed=6)).any()


@pytest.mark.parametrize("values", [np.arange(40.0)[:, None], (np.arange(40.0) % 3)[:, None]])
def test_blocks_of_draws_keep_the_spread(monkeypatch, values):
    whole = bootstrap_means(values, 2000, 3)
    monkeypatch.setattr(significance, "_BLOCK_CELLS", 100)
    blocks = bootstrap_means(values, 2000, 3)
    assert blocks.shape == whole.shape == (2000, 1)
    assert blocks.mean() == pytest.approx(whole.mean(), abs=4 * whole.std() / np.sqrt(1000))
    assert blocks.std() == pytest.approx(whole.std(), rel=0.08)
    assert len(np.unique(blocks)) > 30  # a block's draws are not those of the block before


def test_groups_are_drawn_whole():
    # Ten users with 20 equal rows each: as informative as ten rows, not as two hundred.
    per_user = np.arange(10, dtype=float)
    values = np.repeat(per_user, 20)[:, None]
    groups = np.repeat(np.arange(10), 20)
    grouped = bootstrap_means(values, 500, 0, groups)
    np.testing.assert_allclose(grouped, bootstrap_means(per_user[:, None], 500, 0))
    assert grouped.std() > 3 * bootstrap_means(values, 500, 0).std()


def test_groups_of_unequal_size_weigh_by_their_rows():
    values, groups = np.array([[1.0], [1.0], [1.0], [0.0]]), np.array([4, 4, 4, 9])  # with holes
    means = bootstrap_means(values, 3000, 0, groups)[:, 0]
    # Two users drawn from two: (3 + 3) / 6, (3 + 0) / 4 or (0 + 0) / 2.
    found, count = np.unique(means, return_counts=True)
    assert found.tolist() == [0, 0.75, 1]
    np.testing.assert_allclose(count / 3000, [0.25, 0.5, 0.25], atol=0.04)


def test_wrong_input_raises():
    with pytest.raises(ValueError, match="n_rows >= 1"):
        bootstrap_means(np.empty((0, 1)))
    with pytest.raises(ValueError, match="n_rows >= 1"):
        bootstrap_means(np.ones(3))
    with pytest.raises(ValueError, match="samples=0"):
        bootstrap_means(np.ones((3, 1)), samples=0)
    with pytest.raises(ValueError, match="groups has shape"):
        bootstrap_means(np.ones((3, 1)), groups=np.zeros(2, dtype=int))
    with pytest.raises(ValueError, match="holds NaN"):
        bootstrap_means(np.array([[1.0], [np.nan]]))
    with pytest.raises(ValueError, match="holds NaN"):
        randomisation_test(np.array([[1.0], [np.nan]]))
    with pytest.raises(ValueError, match="permutations=0"):
        randomisation_test(np.ones((3, 1)), 0)
    with pytest.raises(ValueError, match="level=95"):
        interval(1.0, np.ones(3), level=95)
    assert Interval(0.5).half_width is None


# Training seeds. ----------------------------------------------------------------------------------


def test_one_seed_is_left_as_it_is():
    draws = np.random.default_rng(0).random((20, 1, 3))
    np.testing.assert_array_equal(resample_seeds(draws, 0), draws[:, 0])


def test_seeds_are_drawn_with_replacement_per_sample():
    draws = np.tile(np.array([1.0, 2.0, 4.0])[None, :, None], (6000, 1, 2))
    found = resample_seeds(draws, 3)
    np.testing.assert_array_equal(found[:, 0], found[:, 1])  # the same seeds for all columns
    sums = {sum(c) / 3 for c in itertools.product((1.0, 2.0, 4.0), repeat=3)}
    assert {round(x, 9) for x in found[:, 0]} == {round(x, 9) for x in sums}
    # The variance of a mean of three draws from {1, 2, 4}.
    assert found[:, 0].var() == pytest.approx(np.var([1, 2, 4]) / 3, rel=0.06)


def test_variance_grows_with_the_spread_of_seeds():
    users = np.random.default_rng(0).normal(0, 1, (4000, 1, 1))
    widths = [
        resample_seeds(users + np.array([-s, 0, s])[None, :, None], 1).var() for s in (0, 1, 2)
    ]
    for s, width in enumerate(widths):
        expected = users.var() + np.var([-s, 0, s]) / 3
        assert width == pytest.approx(expected, rel=0.06)


# Randomisation test. ------------------------------------------------------------------------------


def exact_p(differences: np.ndarray) -> float:
    """Share of all sign flips whose sum is as far from 0 as the observed one."""
    observed = abs(differences.sum())
    signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    return float((np.abs(signs @ differences) >= observed - 1e-9).mean())


@pytest.mark.parametrize(
    "differences",
    [
        [0.9, 0.3, -0.2, 0.4, 0.1, -0.05, 0.6, 0.25],  # all distinct
        [1, 1, 1, -1, 1, 1, 1, -1],  # counted as two distinct rows; many ties
        [0.5, 0.5, -0.5, 0.25, 0, 0, 1, 0.5],
        [0.1, 0.2, -0.3, 0.1, 0.2, -0.3, 0.1, -0.1],  # the observed sum is 0 up to rounding
    ],
)
def test_p_value_equals_all_sign_flips(differences):
    values = np.array(differences, dtype=float)
    [found] = randomisation_test(values[:, None], 20_000, seed=1)
    exact = exact_p(values)
    assert found == pytest.approx(exact, abs=4 * np.sqrt(max(exact * (1 - exact), 1e-4) / 20_000))


def test_columns_are_tested_each_by_itself():
    rng = np.random.default_rng(0)
    table = np.column_stack([rng.normal(0.5, 1, 200), np.zeros(200), rng.normal(0, 1, 200)])
    p = randomisation_test(table, 2000)
    assert p[0] == pytest.approx(1 / 2001) and p[1] == 1 and p[2] > 0.01
    assert randomisation_test(np.zeros((5, 2)), 10).tolist() == [1, 1]
    np.testing.assert_array_equal(randomisation_test(-table, 2000), p)  # two-sided


def test_p_is_uniform_where_nothing_differs():
    rng = np.random.default_rng(0)
    # 300 data sets of 30 users; many equal values, as hits have.
    p = np.array(
        [
            randomisation_test(rng.integers(-3, 4, 30)[:, None] * 1.0, 199, seed)[0]
            for seed in range(300)
        ]
    )
    for level in (0.05, 0.2, 0.5, 0.8):
        error = 4 * np.sqrt(level * (1 - level) / 300)
        assert (p <= level).mean() <= level + error
        assert (p <= level).mean() >= level - error - 0.05  # ties make it a little conservative


def test_rows_of_a_group_flip_together():
    # 50 equal rows of each of 4 users, all positive: 2 of 16 flips are as large.
    values, groups = np.ones((200, 1)), np.repeat(np.arange(4), 50)
    assert randomisation_test(values, 20_000, 0, groups)[0] == pytest.approx(1 / 8, abs=0.01)
    assert randomisation_test(values, 20_000, 0)[0] == pytest.approx(1 / 20_001)
    # The same sums per user by another route.
    sums = np.full((4, 1), 50.0)
    np.testing.assert_allclose(
        randomisation_test(values, 500, 3, groups), randomisation_test(sums, 500, 3)
    )


def test_blocks_of_flips_keep_the_p_value(monkeypatch):
    values = np.array([0.9, 0.3, -0.2, 0.4, 0.1, -0.05, 0.6, 0.25])
    monkeypatch.setattr(significance, "_BLOCK_CELLS", 1000)
    found = randomisation_test(values[:, None], 20_000, seed=1)[0]
    assert found == pytest.approx(exact_p(values), abs=0.006)


def test_holm_by_hand():
    # Sorted .01, .02, .03, .04 times 4, 3, 2, 1: .04, .06, .06, .04 -> never below the one before.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1, 1])
    assert holm([0.02]) == [0.02] and holm([]) == []
    assert holm([0.01, 0.01, 1.0]) == pytest.approx([0.03, 0.03, 1.0])


def test_intervals_are_the_same_whether_or_not_rows_repeat():
    """Rows that repeat now and then are drawn one by one, those that repeat often are counted."""
    rng = np.random.default_rng(0)
    for repeated in (2, 100):  # below and above the border between the two ways
        values = np.repeat(rng.random(2000 // repeated), repeated)[:, None]
        means = bootstrap_means(values, samples=4000, seed=1)[:, 0]
        expected = values.std() / np.sqrt(len(values))
        assert abs(means.std() / expected - 1) < 0.05
        assert abs(means.mean() - values.mean()) < 4 * expected / np.sqrt(4000)


def test_many_users_are_drawn_independently_and_give_the_same_interval(monkeypatch):
    values = np.random.default_rng(3).gamma(2, 2, (4000, 2)) * [1, 10]
    exact = bootstrap_means(values, 2000, seed=1)
    monkeypatch.setattr(significance, "_MANY", 100)
    for cells in (significance._BLOCK_CELLS, 2000 * 37):
        monkeypatch.setattr(significance, "_BLOCK_CELLS", cells)
        found = bootstrap_means(values, 2000, seed=1)
        np.testing.assert_allclose(found.mean(0), values.mean(0), rtol=2e-3)
        np.testing.assert_allclose(found.std(0), exact.std(0), rtol=0.06)
        assert (found != exact).all()
    # Users weigh by their rows: a ratio of sums, not a mean of means.
    groups = np.repeat(np.arange(2000), 2)
    grouped = bootstrap_means(values, 2000, seed=1, groups=groups)
    np.testing.assert_allclose(grouped.std(0), exact.std(0), rtol=0.08)


def test_counts_of_independent_draws_are_poisson():
    counts = significance._poisson_counts()
    assert counts.mean() == pytest.approx(1, abs=1e-4)
    assert counts.var() == pytest.approx(1, abs=1e-4)
    assert (counts == 0).mean() == pytest.approx(np.exp(-1), abs=1e-4)
    assert (counts == 3).mean() == pytest.approx(np.exp(-1) / 6, abs=1e-4)
