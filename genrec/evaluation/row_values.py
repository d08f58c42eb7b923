"""Metrics beyond accuracy, per row: measured on lists, then averaged and compared in pairs.

Evaluation stores the values of each row (`per_user.parquet`), so that several runs can be compared
in them as they are in ranks: with intervals, and row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from genrec.evaluation.beyond_accuracy import (
    calibration,
    category_profile,
    history_popularity,
    intra_list_diversity,
    list_popularity,
    novelty,
)
from genrec.evaluation.significance import (
    Difference,
    Interval,
    bootstrap_means,
    holm,
    interval,
    resample_seeds,
)
from genrec.item_lists import ItemLists
from genrec.metrics import shared_sid_credit

IntArray = npt.NDArray[np.integer]
FloatArray = npt.NDArray[np.floating]
RowValues = Mapping[str, npt.NDArray[np.floating]]  # metric -> a value per row, NaN: not defined

HISTORY_POPULARITY = "history_popularity"  # same for every system; the lift is measured against it
POPULARITY, LIFT = "popularity", "popularity_lift"
CREDIT, MATCH = "SID-credit", "SID-match"
COLUMNS = ("novelty", POPULARITY, "ild", "calibration", CREDIT)  # each @k


@dataclass(frozen=True)
class ItemFacts:
    """What metrics beyond accuracy need to know of items and rows.

    Attributes:
        train_count: training interactions of each item. ``# (n_items,)``
        train_users: distinct users of them. ``# (n_items,)``
        n_users: users in training.
        history: items of each row.
        vectors: item vectors for the diversity of a list, or None. ``# (n_items, dim)``
        categories: result of `category_matrix`, or None.
        sid_of_item: a number per semantic id for every item, where several items share some
            (`shared_sid_credit`), or None. ``# (n_items,)``
    """

    train_count: IntArray
    train_users: IntArray
    n_users: int
    history: ItemLists
    vectors: npt.NDArray | None = None
    categories: sp.csr_matrix | None = None
    sid_of_item: npt.NDArray[np.int64] | None = None


def row_values(
    systems: Mapping[str, Sequence[IntArray]],
    relevant: IntArray | ItemLists,
    facts: ItemFacts,
    ks: Sequence[int],
) -> dict[str, list[dict[str, npt.NDArray[np.float32]]]]:
    """Measure lists.

    Args:
        systems: name -> item lists of each seed, best first. ``# (n_rows, k_max)`` each
        relevant: the item that came next in each row, or all that count.
        facts: of items and rows.
        ks: cut-offs.

    Returns:
        name -> of each seed, ``novelty@10`` … -> a value per row.

    Raises:
        ValueError: credit for shared SIDs is asked for rows with several relevant items.
    """
    if facts.sid_of_item is not None and isinstance(relevant, ItemLists):
        raise ValueError("shared SID credit is defined for one relevant item a row")
    before = history_popularity(facts.history, facts.train_count).astype(np.float32)
    categories = facts.categories
    if categories is not None and not categories.shape[1]:
        categories = None
    profile = None if categories is None else category_profile(facts.history, categories)

    def measured(lists: IntArray) -> dict[str, npt.NDArray[np.float32]]:
        found = {HISTORY_POPULARITY: before}
        for k in ks:
            values = {
                "novelty": novelty(lists, facts.train_users, facts.n_users, k),
                POPULARITY: list_popularity(lists, facts.train_count, k),
            }
            if facts.vectors is not None and k > 1:
                values["ild"] = intra_list_diversity(lists, facts.vectors, k)
            if categories is not None:
                assert profile is not None
                values["calibration"] = calibration(lists, profile, categories, k)
            if facts.sid_of_item is not None:
                assert not isinstance(relevant, ItemLists)
                values[CREDIT] = shared_sid_credit(lists, relevant, facts.sid_of_item, k)
            found |= {f"{name}@{k}": value.astype(np.float32) for name, value in values.items()}
        return found

    return {name: [measured(lists) for lists in runs] for name, runs in systems.items()}


@dataclass(frozen=True)
class _Drawn:
    """A metric of one system over the rows where all its seeds have it.

    Attributes:
        per_seed: its value, for each seed.
        draws: that in every bootstrap sample. ``# (samples, n_seeds)``
        rows: where it is defined. ``# (n_rows,)``
    """

    per_seed: npt.NDArray[np.float64]
    draws: npt.NDArray[np.float64]
    rows: npt.NDArray[np.bool_]


def compare_values(
    values: Mapping[str, Sequence[RowValues]],
    reference: str | None = None,
    samples: int = 1000,
    seed: int = 0,
    groups: IntArray | None = None,
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Difference]]]:
    """Means of metrics beyond accuracy, and the reference's paired differences to the others.

    A metric counts over the rows for which it is defined (for a difference: for both systems), the
    popularity lift as the ratio of two such means. p is the bootstrap's: twice the smaller share of
    samples on one side of 0, not below ``2 / (samples + 1)``.

    Args:
        values: name -> of each seed, a value per row: result of `row_values`.
        reference: a name among them.
        samples: bootstrap samples.
        seed: of the draws.
        groups: see `bootstrap_means`.

    Returns:
        name -> metric -> mean and 95% interval; other name -> metric -> reference minus other.
    """
    tables = {
        (name, metric): table
        for name, runs in values.items()
        for metric, table in _tables(runs).items()
    }
    drawn = _drawn(tables, samples, seed, groups)
    place = {name: i for i, name in enumerate(values)}

    def over_seeds(name: str, found: _Drawn) -> npt.NDArray[np.float64]:
        # A seed of its own per system: training seeds of two systems are not paired.
        return resample_seeds(found.draws[:, :, None], seed + 1 + place[name])[:, 0]

    means: dict[str, dict[str, Interval]] = {name: {} for name in values}
    for (name, metric), found in drawn.items():
        means[name][metric] = interval(
            found.per_seed.mean(), over_seeds(name, found), seeds=found.per_seed.tolist()
        )
    if reference is None:
        return means, {}
    apart: dict[str, dict[str, tuple[float, npt.NDArray[np.float64]]]] = {}
    for name, metric in drawn:
        if name == reference or (reference, metric) not in drawn:
            continue
        pair = drawn[reference, metric], drawn[name, metric]
        if not np.array_equal(pair[0].rows, pair[1].rows):
            both = pair[0].rows & pair[1].rows
            if not both.any():
                continue
            part = {(n, metric): tables[n, metric][both] for n in (reference, name)}
            again = _drawn(part, samples, seed, None if groups is None else groups[both])
            if len(again) < 2:
                continue
            pair = again[reference, metric], again[name, metric]
        draws = over_seeds(reference, pair[0]) - over_seeds(name, pair[1])
        apart.setdefault(name, {})[metric] = (
            float(pair[0].per_seed.mean() - pair[1].per_seed.mean()),
            draws,
        )
    return means, _differences(apart)


def _differences(
    apart: Mapping[str, Mapping[str, tuple[float, npt.NDArray[np.float64]]]],
) -> dict[str, dict[str, Difference]]:
    """From values and draws to intervals and p-values, adjusted for the number of systems."""
    found: dict[str, dict[str, Difference]] = {name: {} for name in apart}
    for metric in dict.fromkeys(metric for metrics in apart.values() for metric in metrics):
        names = [name for name in apart if metric in apart[name]]
        p = []
        for name in names:
            draws = apart[name][metric][1]
            rarer = min((draws <= 0).sum(), (draws >= 0).sum())
            p.append(min(1.0, 2 * (1 + float(rarer)) / (1 + len(draws))))
        for name, one, adjusted in zip(names, p, holm(p), strict=True):
            value, draws = apart[name][metric]
            low, high = np.quantile(draws, [0.025, 0.975])
            found[name][metric] = Difference(value, float(low), float(high), one, adjusted)
    return found


def _tables(runs: Sequence[RowValues]) -> dict[str, FloatArray]:
    """Metrics as tables, a column per seed; of a lift also one of the histories' popularity."""
    found = {}
    for metric in runs[0]:
        base, _, k = metric.partition("@")
        if metric == HISTORY_POPULARITY or any(metric not in run for run in runs):
            continue
        columns = [run[metric] for run in runs]
        if base == POPULARITY:
            found[f"{LIFT}@{k}"] = np.stack([*columns, runs[0][HISTORY_POPULARITY]], axis=1)
            continue
        table = np.stack(columns, axis=1)
        if base == CREDIT:
            found[f"{MATCH}@{k}"] = (table > 0).astype(table.dtype)
        found[metric] = table
    return found


def _drawn(
    tables: Mapping[tuple[str, str], FloatArray], samples: int, seed: int, groups: IntArray | None
) -> dict[tuple[str, str], _Drawn]:
    """Value and bootstrap draws of each table, over the rows where it has no NaN.

    Tables that are defined for the same rows are drawn together: that pairs them, and with many
    rows the drawing, not the arithmetic, takes the time.
    """
    alike: dict[bytes, list[tuple[str, str]]] = {}
    defined: dict[tuple[str, str], npt.NDArray[np.bool_]] = {
        key: ~np.asarray(np.isnan(table).any(axis=1)) for key, table in tables.items()
    }
    for key, rows in defined.items():
        if rows.any():
            alike.setdefault(np.packbits(rows).tobytes(), []).append(key)
    found: dict[tuple[str, str], _Drawn] = {}
    for keys in alike.values():
        rows = defined[keys[0]]
        every = rows.all()
        stacked = np.concatenate([tables[k] if every else tables[k][rows] for k in keys], axis=1)
        own = groups if groups is None or every else groups[rows]
        draws, start = bootstrap_means(stacked, samples, seed, own), 0
        means = stacked.mean(axis=0, dtype=np.float64)
        for key in keys:
            stop = start + tables[key].shape[1]
            value, drawn, start = means[start:stop], draws[:, start:stop], stop
            if key[1].startswith(LIFT):  # a ratio of two means
                if value[-1] == 0:
                    continue
                value, drawn = value[:-1] / value[-1] - 1, drawn[:, :-1] / drawn[:, -1:] - 1
            found[key] = _Drawn(value, drawn, rows)
    return {key: found[key] for key in tables if key in found}
