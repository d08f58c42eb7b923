"""Bootstrap intervals for means over rows, and for paired differences of two systems.

Percentile bootstrap (Efron 1979): rows are drawn with replacement, the mean is taken, and the
interval is cut from the draws. The same draws serve all columns, so that the difference of two
columns is paired: what makes a row hard is hard for both systems and cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_BLOCK_CELLS = 1 << 23  # cells of one block of draw counts: 64 MiB of float64


@dataclass(frozen=True)
class Interval:
    """A value and its interval; `low` and `high` are None where no interval is defined."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width (what a table shows behind ±)."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def bootstrap_means(
    values: FloatArray,
    samples: int = 1000,
    seed: int = 0,
    groups: npt.NDArray[np.integer] | None = None,
) -> FloatArray:
    """Means of resampled rows.

    Args:
        values: one column per metric and system. ``# (n_rows, n_columns)``
        samples: number of bootstrap samples.
        seed: seed of the draws.
        groups: group of each row, 0 … n_groups-1, drawn as a whole: a user's rows resemble each
            other, so users are drawn where they have several. None draws rows. ``# (n_rows,)``

    Returns:
        The mean of every column in every sample. ``# (samples, n_columns)``

    Raises:
        ValueError: no rows, no samples, or shapes that do not fit.
    """
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"values has shape {values.shape}; it must be (n_rows >= 1, n_columns)")
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    sizes = np.ones(len(values))
    if groups is not None:
        if groups.shape != (len(values),):
            raise ValueError(f"groups has shape {groups.shape}; it must be ({len(values)},)")
        sizes = np.bincount(groups).astype(np.float64)
        columns = [np.bincount(groups, weights=column) for column in values.T]
        values = np.stack(columns, axis=1)  # sums per group: (n_groups, n_columns)
    rng = np.random.default_rng(seed)
    n_units = len(values)
    per_block = max(1, _BLOCK_CELLS // n_units)
    means = np.empty((samples, values.shape[1]))
    for start in range(0, samples, per_block):
        size = min(per_block, samples - start)
        counts = np.empty((size, n_units))
        for i in range(size):
            drawn = rng.integers(0, n_units, n_units)
            counts[i] = np.bincount(drawn, minlength=n_units)
        means[start : start + size] = (counts @ values) / (counts @ sizes)[:, None]
    return means


def interval(value: float, draws: FloatArray, level: float = 0.95) -> Interval:
    """Percentile interval of one column of `bootstrap_means`. ``draws # (samples,)``."""
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def mean_interval(
    values: FloatArray, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of one value per row and its bootstrap interval. ``values # (n_rows,)``."""
    draws = bootstrap_means(values[:, None], samples, seed)
    return interval(float(values.mean()), draws[:, 0], level)


def difference_interval(
    ours: FloatArray, theirs: FloatArray, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of ``ours - theirs`` over the same rows and its paired bootstrap interval.

    Args:
        ours: one value per row. ``# (n_rows,)``
        theirs: the other system's values for the same rows, in the same order. ``# (n_rows,)``
        samples: number of bootstrap samples.
        seed: seed of the draws.
        level: coverage of the interval.

    Raises:
        ValueError: the two have different lengths, so that rows cannot be paired.
    """
    if ours.shape != theirs.shape:
        raise ValueError(
            f"{ours.shape} and {theirs.shape} values cannot be paired; score both systems on "
            "the same rows"
        )
    return mean_interval(ours - theirs, samples, seed, level)
