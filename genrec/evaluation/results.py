"""What an evaluation leaves behind: tables beside ``metrics.json``, and ten users to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.artifacts import write_json, write_parquet, write_parquet_parts
from genrec.columns import (
    CATEGORIES,
    HISTORY,
    ITEM_ID,
    ITEM_INDEX,
    RANK,
    RELEVANT,
    ROW_ID,
    TARGET,
    TITLE,
    USER_ID,
)
from genrec.evaluation.comparison import Comparison
from genrec.evaluation.row_values import RowValues
from genrec.evaluation.slices import Slicing, slices_of_rows
from genrec.metrics import EMPTY, RelevantRanks

IntArray = npt.NDArray[np.integer]

ROW_SLICES = "row_slices.parquet"  # which slices each row is in
EXAMPLES = 10
EXAMPLE_HISTORY = 10
_LIST_ROWS = 1 << 22  # recommendations written at once


def scores(comparison: Comparison) -> dict[str, Any]:
    """Systems and differences of a comparison as plain values for ``metrics.json``."""
    return {
        "systems": {
            name: {metric: asdict(value) for metric, value in metrics.items()}
            for name, metrics in comparison.metrics.items()
        },
        "differences": {
            f"{comparison.reference} - {name}": {m: asdict(v) for m, v in metrics.items()}
            for name, metrics in comparison.differences.items()
        },
    }


def per_user_table(
    rows: pl.DataFrame,
    ranks: Mapping[str, Sequence[RelevantRanks]],
    values: Mapping[str, Sequence[RowValues]],
) -> pl.DataFrame:
    """Rank of every row's target, per system and training seed; 0 where it isn't in the list.

    Behind it what the row's list is like apart from being right (``novelty@10`` …), null where that
    is not defined.

    Where rows have several relevant items, `target_rank` is that of the best placed one, and the
    columns `hit_ranks` and `n_relevant` say the rest.
    """
    several = RELEVANT in rows.columns
    parts = []
    for system, runs in ranks.items():
        for seed, run in enumerate(runs):
            part = rows.select(ROW_ID, USER_ID).with_columns(
                pl.lit(system).alias("system"),
                pl.lit(seed, dtype=pl.Int32).alias("seed"),
                pl.Series("target_rank", run.first(), dtype=pl.Int32),
            )
            if several:
                found = pl.DataFrame({"row": run.row, "hit_ranks": run.rank.astype(np.int32)})
                lists = pl.DataFrame({"row": np.arange(len(rows))}).join(
                    found.group_by("row", maintain_order=True).agg("hit_ranks"),
                    on="row",
                    how="left",
                    maintain_order="left",
                )
                part = part.with_columns(
                    lists["hit_ranks"].fill_null([]),
                    pl.Series("n_relevant", run.n_relevant, dtype=pl.Int32),
                )
            if system in values:
                part = part.with_columns(
                    pl.Series(name, value, dtype=pl.Float32).fill_nan(None)
                    for name, value in values[system][seed].items()
                )
            parts.append(part)
    return pl.concat(parts)


def curves_table(ranks: Mapping[str, Sequence[RelevantRanks]], depth: int) -> pl.DataFrame:
    """Mean recall and NDCG at every list length up to `depth`, over rows and seeds."""
    parts = []
    for system, runs in ranks.items():
        found = np.mean([_curves(run, depth) for run in runs], axis=0)  # (2, depth)
        parts.append(
            pl.DataFrame(
                {"k": np.arange(1, depth + 1), "recall": found[0], "ndcg": found[1]}
            ).select(pl.lit(system).alias("system"), pl.all())
        )
    return pl.concat(parts)


def _curves(run: RelevantRanks, depth: int) -> npt.NDArray[np.float64]:
    """Mean recall and NDCG at every length. ``# (2, depth)``.

    From how many hits have each rank, by the row's number of relevant items: one pass over them.
    """
    kept = run.within(depth)
    rank, relevant = run.rank[kept], run.n_relevant[run.row[kept]]
    recall = np.bincount(rank, 1.0 / relevant, minlength=depth + 1)[1:].cumsum()
    counts, kind = np.unique(relevant, return_inverse=True)
    ideal = np.cumsum(1.0 / np.log2(np.arange(depth) + 2.0))
    ndcg = np.zeros(depth)
    for number, count in enumerate(counts.tolist()):
        gained = np.bincount(rank[kind == number], minlength=depth + 1)[1:]
        gained = (gained / np.log2(np.arange(depth) + 2.0)).cumsum()
        ndcg += gained / ideal[np.minimum(count, np.arange(1, depth + 1)) - 1]
    return np.stack([recall, ndcg]) / len(run.n_relevant)


def long_table(lists: IntArray, rows: pl.DataFrame, catalog: pl.DataFrame) -> pl.DataFrame:
    """Item lists as one row per recommended item."""
    row, place = np.nonzero(lists >= 0)
    index = lists[row, place]
    return rows.select(ROW_ID, USER_ID)[row].with_columns(  # first the columns: histories are long
        pl.Series(RANK, place + 1, dtype=pl.Int32),
        catalog[ITEM_ID].gather(index),
        pl.Series(ITEM_INDEX, index, dtype=pl.Int32),
    )


def write_lists(path: Path, lists: IntArray, rows: pl.DataFrame, catalog: pl.DataFrame) -> None:
    """Write `long_table` piece by piece: of a million users it takes gigabytes."""
    ids = rows.select(ROW_ID, USER_ID)
    size = max(1, _LIST_ROWS // max(1, lists.shape[1]))
    starts = range(0, max(1, len(lists)), size)
    parts = (long_table(lists[s : s + size], ids[s : s + size], catalog) for s in starts)
    write_parquet_parts(path, parts, repeated=[ROW_ID, USER_ID])


def examples(
    rows: pl.DataFrame, lists: Mapping[str, IntArray], catalog: pl.DataFrame, seed: int
) -> list[dict[str, Any]]:
    """Ten rows drawn at random, hits or not, with histories and lists in titles.

    Args:
        rows: split rows.
        lists: system -> item lists to show. ``# (n_rows, k)``
        catalog: ids, titles and categories.
        seed: of the draw.
    """
    drawn = np.random.default_rng(seed).permutation(len(rows))[:EXAMPLES]
    titles, ids = catalog[TITLE].to_list(), catalog[ITEM_ID].to_list()
    categories = catalog[CATEGORIES].to_list()
    found = []
    for at in np.sort(drawn).tolist():
        row = rows.row(at, named=True)
        relevant = set(row.get(RELEVANT) or [row[TARGET]])

        def item(i: int) -> dict[str, Any]:
            return {"item_id": ids[i], "title": titles[i]}

        found.append(
            {
                "row_id": row[ROW_ID],
                "user_id": row[USER_ID],
                "history": [
                    {**item(i), "categories": categories[i] or []}
                    for i in row[HISTORY][-EXAMPLE_HISTORY:]
                ],
                "targets": [item(i) for i in (row.get(RELEVANT) or [row[TARGET]])],
                "lists": {
                    name: [
                        {**item(i), "hit": i in relevant} for i in items[at].tolist() if i != EMPTY
                    ]
                    for name, items in lists.items()
                },
            }
        )
    return found


def write_results(
    folder: Path,
    results: dict[str, Any],
    comparison: Comparison,
    slices: pl.DataFrame,
    slicings: Sequence[Slicing],
    lists: Mapping[str, Sequence[IntArray]],
    rows: pl.DataFrame,
    catalog: pl.DataFrame,
) -> None:
    """Write every table of an evaluation; ``metrics.json`` comes last.

    Args:
        folder: where to.
        results: what ``metrics.json`` says besides the scores.
        comparison: the scores.
        slices: result of `score_slices`.
        slicings: of which it holds the scores.
        lists: lists of each system per seed; those of the reference are not written again.
        rows: evaluated rows.
        catalog: the catalogue.
    """
    reference = comparison.reference
    for name, runs in lists.items():
        if name == reference:
            continue
        for seed, items in enumerate(runs):
            label = name if len(runs) == 1 else f"{name}-seed-{seed}"
            write_lists(folder / "baselines" / f"{label}.parquet", items, rows, catalog)
    per_user = per_user_table(rows, comparison.ranks, comparison.values)
    write_parquet(folder / "per_user.parquet", per_user)
    write_parquet(folder / "curves.parquet", curves_table(comparison.ranks, results["depth"]))
    write_parquet(folder / "slices.parquet", slices)
    write_parquet(folder / ROW_SLICES, slices_of_rows(slicings, rows))
    best = max(
        (name for name in lists if name != reference),
        key=lambda name: comparison.metrics[name][f"NDCG@{max(results['ks'])}"].value,
        default=None,
    )
    k = max(results["ks"])
    shown = {n: lists[n][0][:, :k] for n in (reference, best) if n is not None}
    write_json(folder / "examples.json", examples(rows, shown, catalog, results["seed"]))
    write_json(folder / "metrics.json", {**results, **scores(comparison)})
