"""Item-kNN: the baseline that a generative recommender has to beat first.

`ItemKNN` covers two baselines, chosen by `KNNSettings.lag_power`:

* None: cosine between the users of two items (Sarwar et al. 2001; binarised user-item matrix);
* a number: co-occurrence weighted by how far apart two items stand in a sequence,
  ``lag ** -lag_power``, forwards and (times `backward`) backwards, over the same norms. Two items
  bought one after the other count for more than two that merely share a user. Lags that a training
  row does not span do not count.

Both score ``sum over the history of decay ** age * similarity``, the last item having age 0.
Equal scores go to the more popular item, then to a seeded permutation: an order by item index
would leak wherever ids were numbered in order of appearance, as the Amazon benchmark files are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import scipy.sparse as sp

from genrec.columns import HISTORY, USER_ID
from genrec.evaluation.baselines import (
    BATCH_ROWS,
    UnfitData,
    item_counts,
    popularity_order,
    supervised_positions,
    training_sequences,
)
from genrec.evaluation.lists import relevant_items
from genrec.evaluation.profiles import best_entries, places, recommend_by_similarity
from genrec.evaluation.tuning import coordinate_search, mean_ndcg
from genrec.item_lists import ItemLists

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class KNNSettings:
    """Hyper-parameters of `ItemKNN`.

    Attributes:
        decay: weight of a history item is ``decay ** age``; 1 forgets the order.
        neighbours: most similar items kept per item.
        shrinkage: added to the similarity's denominator, so that rare pairs count for less.
        lag_power: None for the cosine over users; else pairs weigh ``lag ** -lag_power``.
        backward: weight of pairs against the order of time (only with `lag_power`).
        window: largest lag that counts (only with `lag_power`).
        self_weight: how much an item of the history speaks for itself; 0 leaves repeats to chance.
    """

    decay: float = 0.7
    neighbours: int = 100
    shrinkage: float = 0.0
    lag_power: float | None = None
    backward: float = 0.5
    window: int = 20
    self_weight: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        rules = {
            f"decay={self.decay} must lie in (0, 1]": 0 < self.decay <= 1,
            f"neighbours={self.neighbours} must be at least 1": self.neighbours >= 1,
            f"shrinkage={self.shrinkage} must not be negative": self.shrinkage >= 0,
            f"backward={self.backward} must not be negative": self.backward >= 0,
            f"window={self.window} must be at least 1": self.window >= 1,
            f"self_weight={self.self_weight} must not be negative": self.self_weight >= 0,
        }
        if broken := [rule for rule, holds in rules.items() if not holds]:
            raise ValueError("; ".join(broken))

    def describe(self) -> str:
        """The settings that count, in one line."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        if self.lag_power is None:
            values = {k: v for k, v in values.items() if k not in ("backward", "window")}
        return ", ".join(f"{key}={value:g}" for key, value in values.items())


class ItemKNN:
    """Item-based nearest neighbours with a recency-decayed profile.

    Args:
        rows: split rows to fit on.
        n_items: size of the catalogue.
        settings: hyper-parameters.
        seed: seed of the permutation that breaks ties.

    Raises:
        ValueError: there are no rows to fit on.
    """

    def __init__(
        self, rows: pl.DataFrame, n_items: int, settings: KNNSettings, seed: int = 0
    ) -> None:
        """Fit the similarities; memory is linear in the interactions (times `window`)."""
        if rows.is_empty():
            raise ValueError("item-kNN has no rows to fit on; prepare a split with training rows")
        self.n_items, self.settings = n_items, settings
        self.order = popularity_order(item_counts(rows, n_items), seed)
        self.tie = places(self.order)  # the smaller one wins
        self.similarity = self._fit(rows)  # csr (n_items, n_items): row = history item

    def _fit(self, rows: pl.DataFrame) -> sp.csr_matrix:
        sequences = training_sequences(rows)
        users = rows[USER_ID].rank("dense").to_numpy().astype(np.int64) - 1
        shape = (int(users.max()) + 1, self.n_items)
        ones = np.ones(len(sequences.values))
        matrix = sp.csr_matrix((ones, (users[sequences.rows], sequences.values)), shape=shape)
        matrix.data[:] = 1.0  # binarised: repeats and overlapping windows count once
        norm = np.sqrt(np.asarray(matrix.sum(axis=0)).ravel())  # (n_items,)
        if self.settings.lag_power is None:
            pairs = [(1.0, matrix.tocsc(), matrix)]
        else:
            before, after = self._lagged(sequences, supervised_positions(rows, sequences))
            pairs = [(1.0, before.tocsc(), after), (self.settings.backward, after.tocsc(), before)]
        blocks = []
        for start in range(0, self.n_items, BATCH_ROWS):
            stop = min(start + BATCH_ROWS, self.n_items)
            block = sum(weight * (left[:, start:stop].T @ right) for weight, left, right in pairs)
            blocks.append(self._normalise(block.tocoo(), start, norm))
        return sp.vstack(blocks, format="csr")

    def _lagged(
        self, sequences: ItemLists, supervised: IntArray
    ) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Per supervised interaction: the items before it, weighted by lag, and the item."""
        place = supervised - sequences.offsets[sequences.rows[supervised]]
        events, items, weights = [], [], []
        for lag in range(1, self.settings.window + 1):
            event = np.flatnonzero(place >= lag)
            events.append(event)
            items.append(sequences.values[supervised[event] - lag])
            weights.append(np.full(len(event), lag ** -float(self.settings.lag_power or 0.0)))
        shape = (len(supervised), self.n_items)
        cells = (np.concatenate(weights), (np.concatenate(events), np.concatenate(items)))
        after = (np.ones(shape[0]), (np.arange(shape[0]), sequences.values[supervised]))
        return sp.csr_matrix(cells, shape=shape), sp.csr_matrix(after, shape=shape)

    def _normalise(
        self, block: sp.coo_matrix, start: int, norm: npt.NDArray[np.float64]
    ) -> sp.csr_matrix:
        """Divide by the norms, drop the diagonal, keep the nearest neighbours."""
        keep = (block.row + start != block.col) & (block.data > 0)
        row, column, value = block.row[keep], block.col[keep], block.data[keep]
        value = value / (norm[row + start] * norm[column] + self.settings.shrinkage)
        scores = sp.csr_matrix((value, (row, column)), shape=block.shape)
        row, _, column, value = best_entries(scores, self.tie, self.settings.neighbours)
        return sp.csr_matrix((value, (row, column)), shape=block.shape)

    def recommend(
        self,
        history: ItemLists,
        seen: ItemLists,
        k: int,
        decay: float | None = None,
        self_weight: float | None = None,
    ) -> IntArray:
        """The `k` nearest items to each history, filled up by popularity.

        Args:
            history: items of each row, oldest first.
            seen: items to leave out, per row (`no_items` for none).
            k: list length.
            decay: used instead of the settings' (it does not enter the fit).
            self_weight: likewise.

        Returns:
            Item indices, padded with `EMPTY` where the catalogue is used up. ``# (n_rows, k)``
        """
        return recommend_by_similarity(
            self.similarity,
            self.order,
            history,
            seen,
            k,
            self.settings.decay if decay is None else decay,
            self.settings.self_weight if self_weight is None else self_weight,
        )


# Values tried per setting; `decay` comes last since it needs no new fit.
ITEM_KNN_GRID: dict[str, list[float]] = {
    "neighbours": [100, 400],
    "decay": [0.4, 0.5, 0.6, 0.7, 0.8, 1.0],
}
SEQUENTIAL_KNN_GRID: dict[str, list[float]] = {
    "shrinkage": [0, 5, 20, 50],
    "backward": [0, 0.2, 0.5, 0.8],
    "lag_power": [0.25, 0.5, 1.0],
    "neighbours": [100, 400],
    "decay": [0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
}
# Only where items that a user has are not left out: how much an item speaks for itself.
SELF_WEIGHTS = [0.0, 0.01, 0.03, 0.1, 0.3, 1.0]


def tune_knn(
    rows: pl.DataFrame,
    valid: pl.DataFrame,
    seen: ItemLists,
    n_items: int,
    start: KNNSettings,
    grid: Mapping[str, Sequence[float]],
    k: int = 10,
    seed: int = 0,
) -> tuple[KNNSettings, list[dict[str, Any]]]:
    """Choose hyper-parameters by NDCG@k on validation rows.

    Coordinate search: one setting after the other is set to its best value of `grid`, the others
    held, until a pass over all settings changes nothing (at most three passes).

    Args:
        rows: training rows; must not hold the validation targets.
        valid: validation rows.
        seen: items to leave out of the lists, per validation row.
        n_items: size of the catalogue.
        start: settings to start from.
        grid: setting -> the values to try.
        k: cut-off of the NDCG.
        seed: seed of the tie-breaking permutation.

    Returns:
        The best settings, and every trial as ``{"settings", "ndcg"}`` in the order tried.

    Raises:
        ValueError: there are no validation rows.
    """
    if valid.is_empty():
        raise UnfitData("item-kNN is tuned on validation rows, and there are none")
    history = ItemLists.from_column(valid[HISTORY])
    relevant = relevant_items(valid)
    fitted: dict[KNNSettings, ItemKNN] = {}

    def score(settings: KNNSettings) -> float:
        key = replace(settings, decay=1.0, self_weight=0.0)
        if key not in fitted:
            fitted.clear()  # one model at a time in memory
            fitted[key] = ItemKNN(rows, n_items, key, seed)
        lists = fitted[key].recommend(history, seen, k, settings.decay, settings.self_weight)
        return mean_ndcg(lists, relevant, k)

    return coordinate_search(start, grid, score)
