"""Systems trained with several seeds, compared by the rank of each row's target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec.artifacts import read_shards, stage_folder
from genrec.columns import ITEM_INDEX, RANK, ROW_ID, TARGET
from genrec.evaluation.significance import bootstrap_means, interval, resample_seeds
from genrec.metrics import gains, hits


def target_ranks(run_dir: Path | str, split: str) -> pl.DataFrame:
    """Where each listed row's target stands in a run's recommendations.

    Args:
        run_dir: a run with recommendations for rows of `split`.
        split: "valid" or "test".

    Returns:
        Columns row_id and rank (1 is first, 0: not in the list), sorted by row_id.
    """
    folder = stage_folder(run_dir, "recommend")
    target = pl.col(TARGET).cast(pl.Int64)
    rows = pl.read_parquet(folder / "rows.parquet", glob=False).join(
        pl.read_parquet(stage_folder(run_dir, "prepare") / f"{split}.parquet", glob=False),
        ROW_ID,
        "left",
    )
    found = read_shards(folder, "recommendations").select(
        ROW_ID, pl.col(ITEM_INDEX).cast(pl.Int64).alias(TARGET), RANK
    )
    joined = rows.with_columns(target).join(found, [ROW_ID, TARGET], "left")
    return joined.select(ROW_ID, pl.col(RANK).fill_null(0)).sort(ROW_ID)


def compare_ranks(
    found: Mapping[str, Sequence[np.ndarray]], reference: str, k: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Means of each system over rows and seeds, and its paired difference from one of them.

    Args:
        found: system -> ranks of the same rows, (rows,), one array a seed; seeds that a system
            lacks are left out for all.
        reference: the system that others are compared with.
        k: length of the lists.

    Returns:
        system -> ``ndcg@k``, ``hr@k`` and ``ndcg@k minus <reference>`` -> value, ends of its 95%
        bootstrap interval over rows and seeds, and the seeds' own values.
    """
    n_seeds = min(len(seeds) for seeds in found.values())
    table = {}
    for name, seeds in found.items():
        columns = []
        for at in range(n_seeds):
            gain = gains(seeds[at], k)
            columns += [gain, hits(seeds[at], k), gain - gains(found[reference][at], k)]
        values = np.stack(columns, axis=1).astype(np.float64)
        means = values.mean(axis=0).reshape(n_seeds, 3)
        spread = resample_seeds(bootstrap_means(values).reshape(-1, n_seeds, 3), 0)
        ends = [interval(means[:, i].mean(), spread[:, i], seeds=means[:, i]) for i in range(3)]
        labels = (f"ndcg@{k}", f"hr@{k}", f"ndcg@{k} minus {reference}")
        table[name] = {
            label: {part: np.round(number, 5).tolist() for part, number in asdict(end).items()}
            for label, end in zip(labels, ends, strict=True)
        }
    return table
