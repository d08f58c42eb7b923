"""RecTools' metrics of lists in a file: run by evaluation.py in an environment that has RecTools.

    python rectools_metrics.py lists.npz metrics.npz

Reads `lists` ``(n_rows, k)``, `relevant` ``(n_rows, n_relevant)`` and `ks`; writes one array per
metric and cut-off, ``(n_rows,)`` each. Imports nothing of genrec: RecTools pins NumPy and pandas.
"""

from __future__ import annotations

import sys
from importlib import metadata
from typing import Any

import numpy as np
import pandas as pd
from rectools.metrics import MAP, MRR, NDCG, HitRate, Recall, calc_metrics


def long(ids: np.ndarray) -> pd.DataFrame:
    """One row per item, with its rank."""
    row, place = np.indices(ids.shape)
    columns = {"user_id": row.ravel(), "item_id": ids.ravel(), "rank": place.ravel() + 1}
    return pd.DataFrame(columns)


def main() -> None:
    """Score every user; say which RecTools did."""
    given = np.load(sys.argv[1])
    reco, interactions = long(given["lists"]), long(given["relevant"]).drop(columns="rank")
    metrics: dict[str, Any] = {}
    for k in given["ks"].tolist():
        metrics |= {
            f"hit_rate@{k}": HitRate(k),
            f"recall@{k}": Recall(k),
            f"ndcg@{k}": NDCG(k, divide_by_achievable=True),
            f"mrr@{k}": MRR(k),
            f"map@{k}": MAP(k),
        }
    found = {name: m.calc_per_user(reco, interactions) for name, m in metrics.items()}
    means = calc_metrics(metrics, reco, interactions)
    for name, values in found.items():
        assert np.array_equal(values.index, np.arange(len(given["lists"])))
        assert abs(values.mean() - means[name]) < 1e-9
    np.savez(sys.argv[2], **{name: values.to_numpy() for name, values in found.items()})
    print(metadata.version("rectools"))  # noqa: T201


if __name__ == "__main__":
    main()
