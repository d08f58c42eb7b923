"""Who is served well and who isn't: metrics by slice of rows, and gaps between user groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.columns import RELEVANT, ROW_ID, SEEN, TARGET, TARGET_TIME, TRAIN_COUNT, USER_ID
from genrec.evaluation.significance import bootstrap_means, interval
from genrec.metrics import RelevantRanks, gains, hits

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.integer]

MIN_ROWS = 20  # smaller slices say nothing: they are left out of gaps
MAX_GROUPS = 30  # an attribute with more values than this is no grouping
_QUANTILES = 4


@dataclass(frozen=True)
class Slicing:
    """One way to cut rows into slices.

    Attributes:
        family: what the rows are cut by.
        labels: names of the slices, in order, no two alike.
        codes: slice of each row, -1 for none. ``# (n_rows,)``
        user_attribute: whether the slices are groups of people, between whom gaps matter.
    """

    family: str
    labels: list[str]
    codes: npt.NDArray[np.int64]
    user_attribute: bool = False


def make_slices(
    rows: pl.DataFrame, catalog: pl.DataFrame, users: pl.DataFrame | None = None
) -> list[Slicing]:
    """All slicings that the data allow; those with a single slice are left out.

    By popularity only rows with one target are cut.

    Args:
        rows: split rows.
        catalog: with the training count of each item, in the order of `item_index`.
        users: attributes per user, or None.
    """
    count = catalog[TRAIN_COUNT].to_numpy()
    found = []
    # A row with several relevant items has no one popularity: a hit on a popular one would count
    # for the slice of the rare one that happens to stand first.
    if RELEVANT not in rows.columns:
        found.append(_by_popularity(rows[TARGET].to_numpy(), count))
    found += [
        _by_quantile("history length", rows[SEEN].list.len().to_numpy().astype(np.int64)),
    ]
    if not rows[TARGET_TIME].null_count():
        time = rows[TARGET_TIME].to_numpy()
        found.append(_by_quantile("time of the target", time, _date, _moment))
    if users is not None:
        ours = rows.select(USER_ID).join(users, on=USER_ID, how="left", maintain_order="left")
        found += [_by_attribute(ours[c]) for c in ours.columns if c != USER_ID]
    return [s for s in found if s.labels and len(np.unique(s.codes[s.codes >= 0])) > 1]


def _by_popularity(target: IntArray, count: IntArray) -> Slicing:
    """Cold targets, and thirds of the training interactions: few items are the head, many the tail.

    Items are cut by training count, so that equally popular ones stay together.
    """
    total, levels = int(count.sum()), np.unique(count[count > 0])
    mass = np.array([count[count <= level].sum() for level in levels])  # from the rarest up
    edges = [int(levels[np.searchsorted(mass, total * part)]) for part in (1 / 3, 2 / 3) if total]
    labels, bounds, low = ["cold (0)"], [0], 1
    for name, high in zip(("tail", "middle"), edges, strict=False):
        if high >= low:
            labels.append(f"{name} ({low}–{high})" if high > low else f"{name} ({low})")
            bounds.append(high)
            low = high + 1
    labels.append(f"head ({low} or more)")
    return Slicing(
        "target popularity (training count)",
        labels,
        np.searchsorted(np.array(bounds), count[target], side="left").astype(np.int64),
    )


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _short(value: float) -> str:
    return f"{value:g}"


def _by_quantile(
    family: str,
    values: IntArray,
    name: Callable[[float], str] = _short,
    exact: Callable[[float], str] = str,
) -> Slicing:
    """Slices of about equal size; equal values stay together.

    Labels are written by `name`, or by `exact` where that would give two slices the same one, as
    dates do for slices of one day.
    """
    cuts = np.quantile(values, np.arange(1, _QUANTILES) / _QUANTILES, method="lower")
    codes = np.searchsorted(np.unique(cuts), values, side="left")
    found, dense = np.unique(codes, return_inverse=True)
    bounds = [(part.min(), part.max()) for part in (values[codes == code] for code in found)]
    for write in (name, exact):
        ends = [(write(low), write(high)) for low, high in bounds]
        labels = [low if low == high else f"{low} – {high}" for low, high in ends]
        if len(set(labels)) == len(labels):
            break
    return Slicing(family, labels, dense.astype(np.int64))


def _by_attribute(column: pl.Series) -> Slicing:
    if column.dtype.is_nested():  # several values a user are no grouping
        return Slicing(column.name, [], np.full(len(column), -1, dtype=np.int64))
    if column.dtype.is_float():
        column = column.fill_nan(None)
    if column.dtype.is_numeric() and column.n_unique() > 12:
        known = column.is_not_null().to_numpy()
        codes = np.full(len(column), -1, dtype=np.int64)
        part = _by_quantile(column.name, column.drop_nulls().to_numpy())
        codes[known] = part.codes
        return Slicing(column.name, part.labels, codes, user_attribute=True)
    values = column.cast(pl.String)
    # Numbers in their order: 2 comes before 10.
    names = column.drop_nulls().unique().sort().cast(pl.String).to_list()
    if len(names) > MAX_GROUPS:
        return Slicing(column.name, [], np.full(len(column), -1, dtype=np.int64))
    numbers = pl.DataFrame({"v": pl.Series(names, dtype=pl.String)}).with_row_index("n")
    joined = values.to_frame("v").join(numbers, on="v", how="left", maintain_order="left")
    numbered = joined["n"].cast(pl.Int64).fill_null(-1).to_numpy()
    return Slicing(column.name, names, numbered, user_attribute=True)


def slices_of_rows(slicings: Sequence[Slicing], rows: pl.DataFrame) -> pl.DataFrame:
    """Which slices each row is in, as a table that `read_slicings` takes back.

    Returns:
        row_id, and a column of labels per slicing, null where a row is in none.
    """
    columns = []
    for number, slicing in enumerate(slicings):
        kind = "user attribute" if slicing.user_attribute else "rows"
        inside = pl.DataFrame({"place": slicing.codes}).select(
            pl.when(pl.col("place") >= 0).then(pl.col("place")).cast(pl.UInt32)
        )
        labels = pl.Series(slicing.labels, dtype=pl.Enum(slicing.labels))
        columns.append(labels.gather(inside["place"]).alias(f"{number}.{kind}.{slicing.family}"))
    return rows.select(ROW_ID).with_columns(columns)


def read_slicings(table: pl.DataFrame) -> list[Slicing]:
    """The slicings of `slices_of_rows`."""
    found = []
    for column in table.drop(ROW_ID):
        _, kind, family = column.name.split(".", 2)
        assert isinstance(column.dtype, pl.Enum)
        labels = column.dtype.categories.to_list()
        codes = column.to_physical().cast(pl.Int64).fill_null(-1).to_numpy()
        found.append(Slicing(family, labels, codes, kind == "user attribute"))
    return found


def score_slices(
    slicings: Sequence[Slicing],
    ranks: Mapping[str, Sequence[RelevantRanks]],
    users: IntArray,
    k: int,
    samples: int = 1000,
    seed: int = 0,
) -> pl.DataFrame:
    """HR@k and NDCG@k of every system in every slice, means over seeds, with 95% intervals.

    Args:
        slicings: result of `make_slices`.
        ranks: system -> hit ranks of each seed.
        users: user of each row, drawn as a whole. ``# (n_rows,)``
        k: cut-off.
        samples: bootstrap samples.
        seed: of the bootstrap.

    Returns:
        family, slice, place, rows, users, system, metric, value, low, high.
    """
    values = slice_values(ranks, k)
    records = []
    for slicing in slicings:
        for place, label in enumerate(slicing.labels):
            inside = slicing.codes == place
            if not inside.any():
                continue
            names = [(system, metric) for system in values for metric in values[system]]
            table = np.stack([values[s][m][inside] for s, m in names], axis=1)
            _, groups = np.unique(users[inside], return_inverse=True)
            draws, means = bootstrap_means(table, samples, seed, groups), table.mean(axis=0)
            for i, (system, metric) in enumerate(names):
                at = interval(means[i], draws[:, i])
                records.append(
                    {
                        "family": slicing.family, "slice": label, "place": place,
                        "rows": int(inside.sum()), "users": int(groups.max()) + 1,
                        "system": system, "metric": metric,
                        "value": at.value, "low": at.low, "high": at.high,
                    }
                )  # fmt: skip
    return pl.DataFrame(records, schema=_SCHEMA)


_SCHEMA = {
    "family": pl.String, "slice": pl.String, "place": pl.Int32, "rows": pl.Int64,
    "users": pl.Int64, "system": pl.String, "metric": pl.String,
    "value": pl.Float64, "low": pl.Float64, "high": pl.Float64,
}  # fmt: skip


def slice_values(
    ranks: Mapping[str, Sequence[RelevantRanks]], k: int
) -> dict[str, dict[str, FloatArray]]:
    """Per system, HR@k and NDCG@k of each row, mean over seeds. ``# (n_rows,)`` each."""
    return {
        system: {
            f"HR@{k}": np.mean([hits(run, k) for run in runs], axis=0),
            f"NDCG@{k}": np.mean([gains(run, k) for run in runs], axis=0),
        }
        for system, runs in ranks.items()
    }


def gaps(
    slicings: Sequence[Slicing],
    ranks: Mapping[str, Sequence[RelevantRanks]],
    users: IntArray,
    k: int,
    permutations: int = 1000,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Between groups of people: the best served group's mean minus the worst served one's.

    A range is above 0 by chance alone, the more so the more groups there are. `p` says how often
    groups of the same sizes, with the people shuffled among them, differ as much. Groups of fewer
    than `MIN_ROWS` people are left out.

    Returns:
        family -> system -> metric -> value, low, high, best, worst, p. The interval is that of the
        difference of the two groups found.
    """
    found: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    values = slice_values(ranks, k)
    _, user = np.unique(users, return_inverse=True)
    n_users = int(user.max()) + 1
    for slicing in slicings:
        if not slicing.user_attribute:
            continue
        grouped = slicing.codes >= 0
        people = np.unique(np.stack([slicing.codes[grouped], user[grouped]]), axis=1)[0]
        large = np.flatnonzero(np.bincount(people, minlength=len(slicing.labels)) >= MIN_ROWS)
        if len(large) < 2:
            continue
        inside = np.isin(slicing.codes, large)
        codes = np.searchsorted(large, slicing.codes[inside])
        of_user = np.full(n_users, -1, dtype=np.int64)
        of_user[user[inside]] = codes  # an attribute is the same in all rows of a user
        known = np.flatnonzero(of_user >= 0)
        group = of_user[known]
        weight = np.bincount(user[inside], minlength=n_users)[known].astype(np.float64)
        names = [(system, metric) for system in values for metric in values[system]]
        sums = [
            np.bincount(user[inside], values[s][m][inside], minlength=n_users)[known]
            for s, m in names
        ]
        means = _group_means(group, sums, weight, len(large))  # (n_metrics, n_groups)
        rng = np.random.default_rng(seed)
        larger = np.zeros(len(names))
        for _ in range(permutations):
            shuffled = _group_means(rng.permutation(group), sums, weight, len(large))
            larger += np.ptp(shuffled, axis=1) >= np.ptp(means, axis=1) - 1e-12
        for i, (system, metric) in enumerate(names):
            best, worst = int(means[i].argmax()), int(means[i].argmin())
            low, high = _apart(group, sums[i], weight, best, worst, samples, seed)
            found.setdefault(slicing.family, {}).setdefault(system, {})[metric] = {
                "value": float(means[i, best] - means[i, worst]), "low": low, "high": high,
                "best": slicing.labels[large[best]], "worst": slicing.labels[large[worst]],
                "p": float((1.0 + larger[i]) / (1.0 + permutations)),
            }  # fmt: skip
    return found


def _group_means(
    group: IntArray, sums: Sequence[npt.NDArray], weight: npt.NDArray, n: int
) -> FloatArray:
    """Mean of every metric in every group. ``# (n_metrics, n_groups)``."""
    totals = np.stack([np.bincount(group, column, minlength=n) for column in sums])
    return totals / np.bincount(group, weight, minlength=n)


def _apart(
    group: IntArray,
    sums: npt.NDArray,
    weight: npt.NDArray,
    best: int,
    worst: int,
    samples: int,
    seed: int,
) -> tuple[float, float]:
    """95% bootstrap interval of the difference of two groups, people drawn in each."""
    draws = []
    for place, one in enumerate((best, worst)):
        inside = group == one
        table = np.stack([sums[inside], weight[inside]], axis=1)
        means = bootstrap_means(table, samples, seed + place)
        draws.append(means[:, 0] / means[:, 1])
    low, high = np.quantile(draws[0] - draws[1], [0.025, 0.975])
    return float(low), float(high)
