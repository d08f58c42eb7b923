"""Content-kNN: neighbours by item vectors, so that items without an interaction can be reached."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import scipy.sparse as sp
from tqdm import trange

from genrec.columns import HISTORY
from genrec.evaluation.baselines import BATCH_ROWS, UnfitData, item_counts, popularity_order
from genrec.evaluation.lists import relevant_items
from genrec.evaluation.profiles import recommend_by_similarity
from genrec.evaluation.tuning import coordinate_search, mean_ndcg
from genrec.item_lists import ItemLists

_BLOCK_CELLS = 1 << 25  # similarities held at once: 128 MiB, and twice that to sort them
MAX_ITEMS = 200_000  # all pairs are compared: some ten minutes of one core

CONTENT_KNN_GRID: dict[str, list[float]] = {
    "power": [1, 4, 8, 16],
    "decay": [0.2, 0.4, 0.6, 0.8, 1.0],
}


@dataclass(frozen=True)
class ContentSettings:
    """Hyper-parameters of content-kNN.

    Attributes:
        neighbours: most similar items kept per item.
        power: exponent of the cosine; the higher, the more the nearest count.
        decay: weight of a history item is ``decay ** age``.
        self_weight: how much an item of the history speaks for itself.
    """

    neighbours: int = 200
    power: float = 4.0
    decay: float = 0.6
    self_weight: float = 0.0

    def describe(self) -> str:
        """The settings in one line."""
        return ", ".join(f"{key}={value:g}" for key, value in asdict(self).items())


def nearest_items(vectors: npt.NDArray, neighbours: int) -> sp.csr_matrix:
    """Cosine of each item with its nearest other items; only positive ones.

    Args:
        vectors: one vector per catalogue row. ``# (n_items, dim)``
        neighbours: items kept per row.

    Returns:
        ``# (n_items, n_items)``

    Raises:
        UnfitData: more than `MAX_ITEMS` items.
    """
    if len(vectors) > MAX_ITEMS:
        raise UnfitData(
            f"content-kNN compares all pairs of {len(vectors)} items; it is meant for at most "
            f"{MAX_ITEMS}: leave it out of --baselines"
        )
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    unit = np.ascontiguousarray(unit, dtype=np.float32)
    n_items, keep = len(unit), min(neighbours, len(unit) - 1)
    rows, columns, values = [], [], []
    if keep < 1:
        return sp.csr_matrix((n_items, n_items))
    batch = min(BATCH_ROWS, max(16, _BLOCK_CELLS // n_items))
    for start in trange(0, n_items, batch, desc="nearest items", unit="block", leave=False):
        block = unit[start : start + batch] @ unit.T  # (batch, n_items)
        own = np.arange(len(block))
        block[own, start + own] = -np.inf
        nearest = np.argpartition(block, -keep, axis=1)[:, -keep:]
        rows.append(np.repeat(start + own, keep))
        columns.append(nearest.ravel())
        values.append(np.take_along_axis(block, nearest, axis=1).ravel())
    row, column, value = (np.concatenate(parts) for parts in (rows, columns, values))
    kept = value > 0
    cells = (value[kept].astype(np.float64), (row[kept], column[kept]))
    return sp.csr_matrix(cells, shape=(n_items, n_items))


def tune_content_knn(
    similarity: sp.csr_matrix,
    rows: pl.DataFrame,
    valid: pl.DataFrame,
    seen: ItemLists,
    grid: dict[str, list[float]] | None = None,
    k: int = 10,
    seed: int = 0,
) -> tuple[ContentSettings, list[dict[str, Any]]]:
    """Choose the settings by NDCG@k on validation rows (see `tune_knn`).

    Args:
        similarity: `nearest_items`, as many as `ContentSettings.neighbours` says.
            ``# (n_items, n_items)``
        rows: training rows.
        valid: validation rows.
        seen: items to leave out of the lists, per validation row.
        grid: setting -> the values to try.
        k: cut-off of the NDCG.
        seed: seed of the tie-breaking permutation.

    Raises:
        UnfitData: there are no validation rows.
    """
    if valid.is_empty():
        raise UnfitData("content-kNN is tuned on validation rows, and there are none")
    history = ItemLists.from_column(valid[HISTORY])
    relevant = relevant_items(valid)
    order = popularity_order(item_counts(rows, similarity.shape[0]), seed)

    def score(settings: ContentSettings) -> float:
        weights = similarity.power(settings.power)
        lists = recommend_by_similarity(
            weights, order, history, seen, k, settings.decay, settings.self_weight
        )
        return mean_ndcg(lists, relevant, k)

    return coordinate_search(ContentSettings(), grid or CONTENT_KNN_GRID, score)
