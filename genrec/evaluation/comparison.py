"""Systems side by side on the same rows: metrics with intervals, paired differences, a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich import box
from rich.table import Table
from rich.text import Text

from genrec.evaluation.significance import Interval, bootstrap_means, interval
from genrec.metrics import coverage_at_k, gains, hits, reciprocal_ranks, target_rank

IntArray = npt.NDArray[np.int64]

_PER_ROW = {"HR": hits, "NDCG": gains, "MRR": reciprocal_ranks}


@dataclass(frozen=True)
class Comparison:
    """Scores of several systems on the same rows.

    Attributes:
        ranks: system -> rank of the target, 0 where it is absent. ``# (n_rows,)``
        metrics: system -> metric (``HR@10`` …) -> value and interval. Coverage has no interval:
            it is no mean over rows, and resampled rows cover less than all of them.
        differences: other system -> metric -> reference minus other, paired. Empty without a
            reference.
        reference: the system that the others are compared with.
    """

    ranks: dict[str, IntArray]
    metrics: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Interval]]
    reference: str | None


def compare(
    systems: Mapping[str, IntArray],
    target: IntArray,
    n_items: int,
    ks: Sequence[int],
    reference: str | None = None,
    samples: int = 1000,
    seed: int = 0,
    groups: IntArray | None = None,
) -> Comparison:
    """Score item lists of several systems on the same rows.

    Args:
        systems: name -> item lists, best first. ``# (n_rows, k_max)``
        target: the item that came next. ``# (n_rows,)``
        n_items: size of the catalogue.
        ks: cut-offs.
        reference: a name in `systems` whose paired differences to the others are wanted.
        samples: bootstrap samples.
        seed: seed of the bootstrap.
        groups: see `bootstrap_means`; hand in users where a user has several rows.

    Returns:
        The comparison; 95% percentile intervals.
    """
    ranks = {name: target_rank(lists, target) for name, lists in systems.items()}
    names = [f"{metric}@{k}" for k in ks for metric in _PER_ROW]
    columns = [
        per_row(rank, k) for rank in ranks.values() for k in ks for per_row in _PER_ROW.values()
    ]
    values = np.stack(columns, axis=1)  # (n_rows, systems * metrics)
    means, draws = values.mean(axis=0), bootstrap_means(values, samples, seed, groups)
    at = {name: slice(i * len(names), (i + 1) * len(names)) for i, name in enumerate(systems)}

    def intervals(mean: npt.NDArray, draw: npt.NDArray) -> dict[str, Interval]:
        return {m: interval(mean[i], draw[:, i]) for i, m in enumerate(names)}

    metrics = {name: intervals(means[s], draws[:, s]) for name, s in at.items()}
    for name, lists in systems.items():
        metrics[name] |= {f"coverage@{k}": Interval(coverage_at_k(lists, n_items, k)) for k in ks}
    differences = {}
    if reference is not None:
        ours = at[reference]
        differences = {
            name: intervals(means[ours] - means[s], draws[:, ours] - draws[:, s])
            for name, s in at.items()
            if name != reference
        }
    return Comparison(ranks, metrics, differences, reference)


def comparison_table(comparison: Comparison, columns: Sequence[str], title: str) -> Table:
    """A table to read: best value of each column in bold, the reference system highlighted.

    Args:
        comparison: result of `compare`.
        columns: metrics to show, for example ``["HR@10", "NDCG@10"]``.
        title: printed above the table.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("system", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    best = {c: max(m[c].value for m in comparison.metrics.values()) for c in columns}
    for system, metrics in comparison.metrics.items():
        cells = [Text(system)]
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
    assert found.low is not None and found.high is not None
    verdict = "not distinguishable from 0"
    if found.low > 0 or found.high < 0:
        verdict = "above 0" if found.low > 0 else "below 0"
    return (
        f"{comparison.reference} − {other}, {metric}: {found.value:+.4f} "
        f"[{found.low:+.4f}, {found.high:+.4f}], {verdict}"
    )
