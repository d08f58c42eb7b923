"""EASE: a linear item-to-item model in closed form (Steck 2019)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import scipy.sparse as sp
from scipy.linalg import lapack

from genrec.columns import HISTORY, USER_ID
from genrec.evaluation.baselines import UnfitData, item_counts, popularity_order, training_sequences
from genrec.evaluation.lists import relevant_items
from genrec.evaluation.profiles import recommend_by_similarity
from genrec.evaluation.tuning import coordinate_search, mean_ndcg
from genrec.item_lists import ItemLists

IntArray = npt.NDArray[np.int64]

MAX_ITEMS = 30_000  # the dense inverse: 3.6 GB and some ten minutes of one core
EASE_GRID: dict[str, list[float]] = {
    "regularization": [100.0, 300.0, 1000.0],
    "decay": [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
}


@dataclass(frozen=True)
class EaseSettings:
    """Hyper-parameters of EASE.

    Attributes:
        regularization: L2 weight (lambda).
        decay: weight of a history item at serving is ``decay ** age``; the paper has 1.
        self_weight: how much an item of the history speaks for itself; the paper has 0.
    """

    regularization: float = 300.0
    decay: float = 0.7
    self_weight: float = 0.0

    def describe(self) -> str:
        """The settings in one line."""
        return ", ".join(f"{key}={value:g}" for key, value in asdict(self).items())


def user_item_matrix(rows: pl.DataFrame, n_items: int) -> sp.csr_matrix:
    """Which training user has which item, binarised. ``# (n_users, n_items)``."""
    sequences = training_sequences(rows)
    users = rows[USER_ID].rank("dense").to_numpy().astype(np.int64) - 1
    ones = np.ones(len(sequences.values), dtype=np.float32)
    shape = (int(users.max()) + 1, n_items)
    matrix = sp.csr_matrix((ones, (users[sequences.rows], sequences.values)), shape=shape)
    matrix.data[:] = 1.0  # repeats and overlapping windows count once
    return matrix


def ease_weights(matrix: sp.csr_matrix, regularization: float) -> npt.NDArray[np.float32]:
    """Item-to-item weights with a zero diagonal (eq. 8 of the paper).

    Args:
        matrix: users by items. ``# (n_users, n_items)``
        regularization: L2 weight.

    Returns:
        Weight of a history item (row) for an item (column). ``# (n_items, n_items)`` float32

    Raises:
        ValueError: more than `MAX_ITEMS` items: the dense inverse would not fit.
    """
    n_items = matrix.shape[1]
    if n_items > MAX_ITEMS:
        raise UnfitData(
            f"EASE inverts a dense matrix of {n_items} x {n_items}; it is meant for at most "
            f"{MAX_ITEMS} items: leave it out of --baselines"
        )
    gram = np.asfortranarray((matrix.T @ matrix).toarray(), dtype=np.float32)
    gram[np.diag_indices(n_items)] += regularization
    factor, failed = lapack.spotrf(gram, lower=True, overwrite_a=True)
    assert failed == 0, "a Gram matrix plus a positive diagonal is positive definite"
    inverse, failed = lapack.spotri(factor, lower=True, overwrite_c=True)
    assert failed == 0
    upper = np.triu_indices(1024, 1)
    for start in range(0, n_items, 1024):  # mirror the lower half, block by block
        stop = min(start + 1024, n_items)
        inverse[start:stop, stop:] = inverse[stop:, start:stop].T
        block = inverse[start:stop, start:stop]
        at = tuple(index[(upper[0] < len(block)) & (upper[1] < len(block))] for index in upper)
        block[at] = block.T[at]
    weights = np.divide(inverse, -np.diag(inverse)[None, :].copy(), out=inverse)
    weights[np.diag_indices(n_items)] = 0.0
    return weights


def tune_ease(
    rows: pl.DataFrame,
    valid: pl.DataFrame,
    seen: ItemLists,
    n_items: int,
    grid: dict[str, list[float]] | None = None,
    k: int = 10,
    seed: int = 0,
) -> tuple[EaseSettings, list[dict[str, Any]]]:
    """Choose the settings by NDCG@k on validation rows (see `tune_knn`).

    Returns:
        The best settings, and every trial.
    """
    if valid.is_empty():
        raise UnfitData("EASE is tuned on validation rows, and there are none")
    history = ItemLists.from_column(valid[HISTORY])
    relevant = relevant_items(valid)
    matrix = user_item_matrix(rows, n_items)
    order = popularity_order(item_counts(rows, n_items), seed)
    fitted: dict[float, npt.NDArray[np.float32]] = {}

    def score(settings: EaseSettings) -> float:
        if settings.regularization not in fitted:
            fitted.clear()  # one dense matrix at a time
            fitted[settings.regularization] = ease_weights(matrix, settings.regularization)
        weights = fitted[settings.regularization]
        lists = recommend_by_similarity(
            weights, order, history, seen, k, settings.decay, settings.self_weight
        )
        return mean_ndcg(lists, relevant, k)

    # One pass: another would invert again for a decay that hardly moves.
    return coordinate_search(EaseSettings(), grid or EASE_GRID, score, passes=1)
