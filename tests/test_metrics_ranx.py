"""The same numbers as ranx (Bassani 2022), an independent implementation."""

from __future__ import annotations

import os

import numpy as np
import polars as pl
import pytest

from genrec.item_lists import ItemLists
from genrec.metrics import (
    average_precisions,
    find_relevant,
    gains,
    hits,
    recalls,
    reciprocal_ranks,
)

N_ITEMS, K_MAX, KS = 40, 10, (1, 3, 10)


def draw(seed: int, n_rows: int = 300) -> tuple[np.ndarray, list[list[int]]]:
    """Lists of 1 to 10 items and 1 to 15 relevant items a row; the first row hits nothing."""
    rng = np.random.default_rng(seed)
    lists = np.full((n_rows, K_MAX), -1)
    relevant = []
    for row in range(n_rows):
        items = rng.permutation(N_ITEMS)
        lists[row, : rng.integers(1, K_MAX + 1)] = -2
        filled = lists[row] == -2
        lists[row, filled] = items[: filled.sum()]
        relevant.append(rng.permutation(N_ITEMS)[: rng.integers(1, 16)].tolist())
    relevant[0] = [N_ITEMS]
    return lists, relevant


@pytest.fixture(scope="module")
def ranx():
    """Imported by the test alone: collecting this file must not load numba, which vLLM trips over.

    Its loops run as plain Python: compiling them takes a minute, running these few rows none.
    """
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    return pytest.importorskip("ranx")


@pytest.mark.parametrize("seed", [0, 1])
def test_agreement_with_ranx(ranx, seed):
    lists, relevant = draw(seed)
    assert (lists == -1).any() and (lists[:, 0] >= 0).all()
    found = find_relevant(lists, ItemLists.from_column(pl.Series(relevant)))
    assert (found.first() == 0).sum() > 5  # rows without a hit
    qrels = ranx.Qrels({f"q{i}": {f"d{d}": 1 for d in items} for i, items in enumerate(relevant)})
    run = ranx.Run(
        {
            f"q{i}": {f"d{d}": 1.0 - place / 100 for place, d in enumerate(items) if d >= 0}
            for i, items in enumerate(lists.tolist())
        }
    )
    names = {"hit_rate": hits, "recall": recalls, "ndcg": gains, "mrr": reciprocal_ranks}
    n_relevant = np.array([len(items) for items in relevant])
    for k in KS:
        theirs = ranx.evaluate(qrels, run, [f"{m}@{k}" for m in (*names, "map")], return_mean=False)
        order = [int(query[1:]) for query in run.run]
        assert sorted(order) == list(range(len(lists)))
        for name, metric in names.items():
            np.testing.assert_allclose(metric(found, k)[order], theirs[f"{name}@{k}"], atol=1e-9)
        # Both divide by all relevant items, also by those that k places can't hold.
        ours = average_precisions(found, k)
        np.testing.assert_allclose(ours[order], theirs[f"map@{k}"], atol=1e-9)
        assert (n_relevant > k).any()
