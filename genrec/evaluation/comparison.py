"""Systems side by side on the same rows: metrics with intervals, paired differences, a table.

A system is one run or several that differ in their training seed. Its value is the mean over seeds;
its interval is a bootstrap over users and, where there are several, over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from rich import box
from rich.table import Table
from rich.text import Text

from genrec.evaluation.row_values import ItemFacts, RowValues, compare_values, row_values
from genrec.evaluation.significance import (
    Difference,
    Interval,
    bootstrap_means,
    holm,
    interval,
    randomisation_test,
    resample_seeds,
)
from genrec.item_lists import ItemLists
from genrec.metrics import (
    RelevantRanks,
    average_precisions,
    coverage,
    exposures,
    find_relevant,
    gains,
    gini,
    hits,
    recalls,
    reciprocal_ranks,
    target_rank,
)

IntArray = npt.NDArray[np.integer]
FloatArray = npt.NDArray[np.float64]

_PER_ROW = {"HR": hits, "NDCG": gains, "MRR": reciprocal_ranks}
# They differ from HR and MRR only where a row has several relevant items.
_PER_ROW_OF_SEVERAL = {"Recall": recalls, "MAP": average_precisions}


@dataclass(frozen=True)
class Comparison:
    """Scores of several systems on the same rows.

    Attributes:
        ranks: system -> where the relevant items stand, one entry per seed.
        metrics: system -> metric (``HR@10`` …) -> value and interval. Coverage and Gini of all
            lists together have no interval: they are no means over rows.
        differences: other system -> metric -> reference minus other, paired. Empty without a
            reference.
        reference: the system that the others are compared with.
        values: system -> of each seed, what each row's list is like apart from being right; empty
            where that wasn't measured.
    """

    ranks: dict[str, list[RelevantRanks]]
    metrics: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Difference]]
    reference: str | None
    values: Mapping[str, Sequence[RowValues]] = field(default_factory=dict)


def compare(
    systems: Mapping[str, Sequence[IntArray]],
    relevant: IntArray | ItemLists,
    n_items: int,
    ks: Sequence[int],
    reference: str | None = None,
    samples: int = 1000,
    permutations: int = 10_000,
    seed: int = 0,
    groups: IntArray | None = None,
    facts: ItemFacts | None = None,
) -> Comparison:
    """Score item lists of several systems on the same rows.

    Args:
        systems: name -> item lists of each seed, best first. ``# (n_rows, k_max)`` each
        relevant: the item that came next ``# (n_rows,)``, or all that count, per row.
        n_items: size of the catalogue.
        ks: cut-offs.
        reference: a name in `systems` whose paired differences to the others are wanted.
        samples: bootstrap samples.
        permutations: draws of the randomisation test.
        seed: seed of both.
        groups: see `bootstrap_means`; hand in users where a user has several rows.
        facts: what metrics beyond accuracy need; None leaves all but coverage and Gini out.

    Returns:
        The comparison; 95% percentile intervals.
    """
    ranks = {
        name: [
            find_relevant(lists, relevant)
            if isinstance(relevant, ItemLists)
            else RelevantRanks.of_targets(target_rank(lists, relevant))
            for lists in runs
        ]
        for name, runs in systems.items()
    }
    found = compare_ranks(ranks, ks, reference, samples, permutations, seed, groups)
    for name, runs in systems.items():
        for k in ks:
            shown = [exposures(lists, n_items, k) for lists in runs]
            whole = {
                f"coverage@{k}": [coverage(one) for one in shown],
                f"gini@{k}": [gini(one) for one in shown],
            }
            # Gini is not defined where nothing is shown.
            found.metrics[name].update(
                {
                    m: Interval(float(np.mean(v)), seeds=tuple(v))
                    for m, v in whole.items()
                    if not np.isnan(v).any()
                }
            )
    if facts is None:
        return found
    values = row_values(systems, relevant, facts, ks)
    return with_values(found, values, samples, seed, groups)


def with_values(
    found: Comparison,
    values: Mapping[str, Sequence[RowValues]],
    samples: int = 1000,
    seed: int = 0,
    groups: IntArray | None = None,
) -> Comparison:
    """The comparison with metrics beyond accuracy (see `compare_values`)."""
    means, apart = compare_values(values, found.reference, samples, seed, groups)
    return replace(
        found,
        metrics={name: {**own, **means.get(name, {})} for name, own in found.metrics.items()},
        differences={n: {**own, **apart.get(n, {})} for n, own in found.differences.items()},
        values=values,
    )


def compare_ranks(
    ranks: Mapping[str, Sequence[RelevantRanks] | IntArray],
    ks: Sequence[int],
    reference: str | None = None,
    samples: int = 1000,
    permutations: int = 10_000,
    seed: int = 0,
    groups: IntArray | None = None,
) -> Comparison:
    """Accuracy metrics of systems whose hit ranks are known.

    Args:
        ranks: name -> hit ranks of each seed, or target ranks, 0 where absent.
            ``# (n_seeds, n_rows)``
        ks: cut-offs.
        reference: as in `compare`, like all that follow.
        samples: as above.
        permutations: as above.
        seed: as above.
        groups: as above.

    Raises:
        ValueError: there are no systems or no rows, or the systems have different rows.
    """
    runs = {
        name: [r if isinstance(r, RelevantRanks) else RelevantRanks.of_targets(r) for r in found]
        for name, found in ranks.items()
    }
    sizes = {name: {len(r.n_relevant) for r in found} for name, found in runs.items()}
    if len(set().union(*sizes.values())) != 1 or sizes == {}:
        raise ValueError(f"systems must be scored on the same rows; found numbers of rows: {sizes}")
    if {0} in sizes.values():
        raise ValueError("there are no rows to score; a mean over no rows is not defined")
    several = any((r.n_relevant > 1).any() for found in runs.values() for r in found)
    functions = {**_PER_ROW, **(_PER_ROW_OF_SEVERAL if several else {})}
    names = [f"{metric}@{k}" for k in ks for metric in functions]
    values = {  # (n_seeds, n_rows, n_metrics)
        name: np.stack(
            [np.stack([f(r, k) for k in ks for f in functions.values()], axis=1) for r in found]
        )
        for name, found in runs.items()
    }
    stacked = np.concatenate(
        [v.transpose(1, 0, 2).reshape(v.shape[1], -1) for v in values.values()], 1
    )
    draws = bootstrap_means(stacked, samples, seed, groups)
    metrics, drawn, start = {}, {}, 0
    for i, (name, v) in enumerate(values.items()):
        stop = start + v.shape[0] * len(names)
        own = draws[:, start:stop].reshape(samples, v.shape[0], len(names))
        # A seed of its own per system: training seeds of two systems are not paired.
        drawn[name] = resample_seeds(own, seed + 1 + i)
        per_seed = v.mean(axis=1)  # (n_seeds, n_metrics)
        metrics[name] = {
            m: interval(per_seed[:, j].mean(), drawn[name][:, j], seeds=per_seed[:, j])
            for j, m in enumerate(names)
        }
        start = stop
    differences = {}
    if reference is not None:
        means = {name: v.mean(axis=0) for name, v in values.items()}  # (n_rows, n_metrics)
        n_seeds = {name: len(v) for name, v in values.items()}
        differences = _differences(
            means, drawn, n_seeds, names, reference, permutations, seed, groups
        )
    return Comparison(runs, metrics, differences, reference)


def _differences(
    means: Mapping[str, FloatArray],
    draws: Mapping[str, FloatArray],
    n_seeds: Mapping[str, int],
    names: Sequence[str],
    reference: str,
    permutations: int,
    seed: int,
    groups: IntArray | None,
) -> dict[str, dict[str, Difference]]:
    """Reference minus each other system, with interval and p-value."""
    others = [name for name in means if name != reference]
    apart = {name: means[reference] - means[name] for name in others}
    p = {name: randomisation_test(apart[name], permutations, seed, groups) for name in others}
    for name in others:
        if n_seeds[reference] > 1 or n_seeds[name] > 1:
            # The test takes the trained models as given; the bootstrap also draws training seeds.
            drawn = draws[reference] - draws[name]
            below, above = (drawn <= 0).mean(axis=0), (drawn >= 0).mean(axis=0)
            p[name] = np.maximum(p[name], np.minimum(1.0, 2 * np.minimum(below, above)))
    adjusted = np.array([holm([p[name][j] for name in others]) for j in range(len(names))])
    result: dict[str, dict[str, Difference]] = {}
    for i, name in enumerate(others):
        low, high = np.quantile(draws[reference] - draws[name], [0.025, 0.975], axis=0)
        value = apart[name].mean(axis=0)
        result[name] = {
            m: Difference(
                float(value[j]), float(low[j]), float(high[j]), float(p[name][j]),
                float(adjusted[j, i]),
            )
            for j, m in enumerate(names)
        }  # fmt: skip
    return result


def comparison_table(comparison: Comparison, columns: Sequence[str], title: str) -> Table:
    """A table to read: best value of each column in bold, the reference system highlighted.

    Args:
        comparison: result of `compare`.
        columns: metrics to show, for example ``["HR@10", "NDCG@10"]``.
        title: printed above the table.
    """
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("system", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    best = {c: max(m[c].value for m in comparison.metrics.values()) for c in columns}
    for system, metrics in comparison.metrics.items():
        n_seeds = len(comparison.ranks[system])
        cells = [Text(system).append(f" ({n_seeds} seeds)" if n_seeds > 1 else "", "dim")]
        for column in columns:
            found = metrics[column]
            cell = Text(f"{found.value:.4f}", "bold" if found.value == best[column] else "")
            if found.half_width is not None:
                cell.append(f" ±{found.half_width:.4f}".replace("±0.", "±."), "dim")
            cells.append(cell)
        table.add_row(*cells, style="cyan" if system == comparison.reference else "")
    return table


def describe_difference(comparison: Comparison, metric: str) -> str | None:
    """One sentence on the reference system and the best other one; None without a reference."""
    if comparison.reference is None or not comparison.differences:
        return None
    other = max(comparison.differences, key=lambda name: comparison.metrics[name][metric].value)
    found = comparison.differences[other][metric]
    verdict = "not distinguishable from 0"
    if found.low > 0 or found.high < 0:
        verdict = "above 0" if found.low > 0 else "below 0"
    return (
        f"{comparison.reference} − {other}, {metric}: {found.value:+.4f} "
        f"[{found.low:+.4f}, {found.high:+.4f}], p = {found.p_holm:.2g} (Holm), {verdict}"
    )
