"""How sure a mean or a difference is: bootstrap intervals and a randomisation test.

Percentile bootstrap (Efron 1979): users are drawn with replacement, the mean is taken, and the
interval is cut from the draws. The same draws serve all columns, so that the difference of two
columns is paired: what makes a user hard is hard for both systems and cancels.

Rows with equal values are interchangeable, so both methods work on the distinct rows and how often
each occurs. Where they are few, as with hit ranks of one or two systems, the draws are multinomial
and binomial, and a million users take no longer than a thousand. A table of many systems or of
averages over seeds has few equal rows, and takes a draw per user; of many users the draws are
independent Poisson counts of mean 1, whose sum isn't exactly the number of users: a mean is the
ratio of two sums then (Chamandy et al. 2012, "Estimating uncertainty for massive data streams").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.integer]

_FEW = 8  # equal rows per distinct one from which on multinomial draws are the faster ones
_MANY = 1 << 16  # users from which on their draws may be independent of each other
_BLOCK_CELLS = 1 << 23  # cells of one block of draws: 64 MiB


@dataclass(frozen=True)
class Interval:
    """A value and its interval.

    Attributes:
        value: the mean (over seeds, where there are several).
        low: lower end, None where no interval is defined.
        high: upper end.
        seeds: the value of every training seed; one entry for a single run.
    """

    value: float
    low: float | None = None
    high: float | None = None
    seeds: tuple[float, ...] = ()

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width (what a table shows behind ±)."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Difference:
    """A paired difference of two systems.

    Attributes:
        value: mean difference.
        low: lower end of its bootstrap interval.
        high: upper end.
        p: two-sided p-value of the randomisation test; with several training seeds the larger of it
            and that of the bootstrap over users and seeds.
        p_holm: the same, adjusted for the number of systems compared (Holm 1979).
    """

    value: float
    low: float
    high: float
    p: float
    p_holm: float


def _units(values: FloatArray, groups: IntArray | None) -> tuple[FloatArray, FloatArray]:
    """Sums and sizes of what is drawn: groups, or single rows. ``# (n_units, n_columns)``."""
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"values has shape {values.shape}; it must be (n_rows >= 1, n_columns)")
    if np.isnan(values).any():
        raise ValueError("values holds NaN; leave out the rows for which a metric is not defined")
    if groups is None:
        return values, np.ones(len(values))
    if groups.shape != (len(values),):
        raise ValueError(f"groups has shape {groups.shape}; it must be ({len(values)},)")
    sizes = np.bincount(groups).astype(np.float64)
    if sizes.max() == 1:
        return values, np.ones(len(values))
    columns = [np.bincount(groups, weights=column) for column in values.T]
    sums = np.stack(columns, axis=1).astype(np.float64)
    there = sizes > 0  # group numbers may have holes
    return sums[there], sizes[there]


def _distinct(rows: FloatArray) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Distinct rows in the order of their first occurrence, and how often each occurs."""
    table = pl.DataFrame(np.ascontiguousarray(rows), orient="row")
    counted = table.group_by(table.columns, maintain_order=True).len(name="_rows")
    return counted.drop("_rows").to_numpy(), counted["_rows"].to_numpy().astype(np.int64)


def bootstrap_means(
    values: FloatArray, samples: int = 1000, seed: int = 0, groups: IntArray | None = None
) -> FloatArray:
    """Means of resampled rows.

    Args:
        values: one column per metric and system, without NaN. ``# (n_rows, n_columns)``
        samples: number of bootstrap samples.
        seed: seed of the draws.
        groups: group of each row, drawn as a whole: a user's rows resemble each other, so users are
            drawn where they have several. None draws rows. ``# (n_rows,)``

    Returns:
        The mean of every column in every sample. ``# (samples, n_columns)``

    Raises:
        ValueError: no rows, no samples, NaN, or shapes that do not fit.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    sums, sizes = _units(values, groups)
    n_units = len(sizes)
    if n_units > _MANY:  # a look at some spares the rest a sort that would find all distinct
        _, count = _distinct(np.column_stack([sums[:_MANY], sizes[:_MANY]]))
        if 2 * len(count) > _MANY:
            return _poisson_means(sums, sizes, samples, seed)
    distinct, count = _distinct(np.column_stack([sums, sizes]))
    if n_units > _MANY and _FEW * len(count) > n_units:
        return _poisson_means(sums, sizes, samples, seed)
    sums, sizes = distinct[:, :-1], distinct[:, -1]
    owner = np.repeat(np.arange(len(count), dtype=np.int32), count)  # distinct row of each unit
    rng = np.random.default_rng(seed)
    per_block = max(1, _BLOCK_CELLS // len(count))
    means = np.empty((samples, values.shape[1]))
    for start in range(0, samples, per_block):
        size = min(per_block, samples - start)
        if _FEW * len(count) > n_units:  # drawing rows is faster than a multinomial over them
            drawn = np.empty((size, len(count)))
            for i in range(size):
                units = rng.integers(0, n_units, n_units, dtype=np.int32)
                drawn[i] = np.bincount(owner[units], minlength=len(count))
        else:
            drawn = rng.multinomial(n_units, count / n_units, size=size).astype(np.float64)
        means[start : start + size] = (drawn @ sums) / (drawn @ sizes)[:, None]
    return means


def _poisson_counts() -> npt.NDArray[np.float32]:
    """Poisson(1) quantiles of the 65,536 values of two random bytes; mean and variance to 1e-4."""
    upper = np.cumsum(np.exp(-1.0) / np.cumprod([1.0, *range(1, 20)]))  # P(count <= 0, 1, 2, …)
    middle = (np.arange(1 << 16) + 0.5) / (1 << 16)
    return np.searchsorted(upper, middle).astype(np.float32)


def _poisson_means(
    sums: FloatArray, sizes: FloatArray, samples: int, seed: int
) -> npt.NDArray[np.float64]:
    """Means of resampled units, each drawn a Poisson number of times. ``# (samples, n_columns)``.

    Single precision serves for products of one block: values are centred first, so what is lost is
    a millionth of their spread, far below the noise of the draws.
    """
    centre = sums.sum(axis=0, dtype=np.float64) / sizes.sum()
    rng, counts = np.random.default_rng(seed), _poisson_counts()
    rows = max(1, _BLOCK_CELLS // samples)
    total = np.zeros((samples, sums.shape[1] + 1))
    for start in range(0, len(sums), rows):
        size = sizes[start : start + rows, None]
        away = sums[start : start + rows] - size * centre
        drawn = counts[rng.integers(0, 1 << 16, (samples, len(size)), dtype=np.uint16)]
        total += drawn @ np.hstack([away, size]).astype(np.float32)
    return centre + total[:, :-1] / total[:, -1:]


def resample_seeds(draws: FloatArray, seed: int) -> FloatArray:
    """Mean over seeds drawn with replacement, in every bootstrap sample.

    Adds the spread of training runs to that of users. With the usual three to five seeds it is
    still too small (a bootstrap of n values has ``(n - 1) / n`` of their variance).

    Args:
        draws: bootstrap means of each seed's run. ``# (samples, n_seeds, n_columns)``
        seed: seed of the draws.

    Returns:
        ``# (samples, n_columns)``
    """
    samples, n_seeds, _ = draws.shape
    picked = np.random.default_rng(seed).integers(0, n_seeds, (samples, n_seeds))
    return np.take_along_axis(draws, picked[:, :, None], axis=1).mean(axis=1)


def interval(
    value: float, draws: FloatArray, level: float = 0.95, seeds: Sequence[float] = ()
) -> Interval:
    """Percentile interval of one column of `bootstrap_means`. ``draws # (samples,)``."""
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1")
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high), tuple(float(s) for s in seeds))


def randomisation_test(
    differences: FloatArray,
    permutations: int = 10_000,
    seed: int = 0,
    groups: IntArray | None = None,
) -> FloatArray:
    """Paired randomisation test: how often chance alone makes a mean difference as large.

    If two systems are alike, each user's difference might as well have the other sign (Fisher 1935;
    Smucker et al. 2007). The signs are drawn, per user for all columns together.

    Args:
        differences: system minus other system, one column per metric. ``# (n_rows, n_columns)``
        permutations: draws; the smallest p-value is ``1 / (permutations + 1)``.
        seed: seed of the draws.
        groups: see `bootstrap_means`.

    Returns:
        Two-sided p-value of each column. ``# (n_columns,)``
    """
    if permutations < 1:
        raise ValueError(f"permutations={permutations} must be at least 1")
    sums, _ = _units(differences, groups)
    sums = sums[(sums != 0).any(axis=1)]
    if not len(sums):
        return np.ones(differences.shape[1])
    sums, count = _distinct(sums)
    # The largest rounding error that a sum of these terms can carry: ties count as "as large".
    observed = np.abs(count @ sums) - 1e-12 * (count @ np.abs(sums))
    rng = np.random.default_rng(seed)
    single = count == 1
    per_block = max(1, _BLOCK_CELLS // len(count))
    larger = np.zeros(differences.shape[1])
    for start in range(0, permutations, per_block):
        size = min(per_block, permutations - start)
        signs = np.empty((size, len(count)))
        signs[:, single] = rng.integers(0, 2, (size, int(single.sum())), dtype=np.int8) * 2.0 - 1.0
        plus = rng.binomial(count[~single], 0.5, (size, int((~single).sum())))
        signs[:, ~single] = 2.0 * plus - count[~single]
        larger += (np.abs(signs @ sums) >= observed).sum(axis=0)
    return (1.0 + larger) / (1.0 + permutations)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted so that the chance of any false discovery stays bounded (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    raised = np.minimum(1.0, np.asarray(p_values, dtype=np.float64)[order] * factors)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(raised)
    return adjusted.tolist()
