"""A memory of the training rows that speaks beside a model: kNN-LM for items.

Khandelwal et al. 2020 ("Generalization through Memorization: Nearest Neighbor Language Models") mix
the predictions of a language model with what followed its nearest contexts in training. Here a
context is the items of a history, and the memory is sequential-kNN: a model whose regularisation
lets it forget rare items gains most where the memory is best.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import scipy.sparse as sp

from genrec.artifacts import stage_folder
from genrec.columns import HISTORY, ITEM_ID, ROW_ID, SCORE, USER_ID
from genrec.evaluation.baselines import BATCH_ROWS
from genrec.evaluation.knn import ItemKNN
from genrec.evaluation.profiles import best_entries, decayed_profiles
from genrec.evaluation.suite import cache_folder, load_split_data, tuned_memory
from genrec.generation.memory import POWER, Permitted, Remembered, check_power
from genrec.item_lists import ItemLists, contains

MOST = 100  # items of a row that the memory gives a probability


@dataclass(frozen=True)
class ItemMemory:
    """Sequential-kNN as a distribution over items; what batch generation takes as its memory.

    Attributes:
        knn: fitted on training rows.
        power: a probability goes by ``score ** power``: scores of neighbours are flat.

    Raises:
        ValueError: the power is not above 0, or infinite.
    """

    knn: ItemKNN
    power: float = POWER

    def __post_init__(self) -> None:
        """Check the power."""
        check_power(self.power)

    def best(
        self, history: ItemLists, seen: ItemLists, permitted: Permitted | None = None
    ) -> Remembered:
        """The `MOST` items of each row that the memory finds most probable.

        Probabilities are among the `MOST` best unseen items of a row, permitted or not, so they say
        the same under any filter, as the model's do.

        Args:
            history: items of each row, oldest first.
            seen: items to leave out, per row (`no_items` for none).
            permitted: what else may be listed; None: everything.

        Returns:
            Fewer items, or none, for a row of which the memory knows less.
        """
        parts = []
        for start in range(0, len(history), BATCH_ROWS):
            batch = np.arange(start, min(start + BATCH_ROWS, len(history)))
            scores = self._scores(history.take(batch), seen.take(batch))
            row, _, column, value = best_entries(scores, self.knn.tie, MOST)
            # Of the largest of a row, so that no power overflows or vanishes.
            log = self.power * np.log(value)
            largest = np.full(len(batch), -np.inf)
            np.maximum.at(largest, row, log)
            total = np.bincount(row, np.exp(log - largest[row]), minlength=len(batch))
            if permitted is not None:
                rows = start + np.repeat(np.arange(len(batch)), np.diff(scores.indptr))
                may = permitted.cells(rows, scores.indices, self.knn.n_items)
                scores.data[~may] = -np.inf
                row, _, column, value = best_entries(scores, self.knn.tie, MOST)
                log = self.power * np.log(value)
            parts.append((start + row, column, log - largest[row] - np.log(total[row])))
        if not parts:
            return Remembered(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
        return Remembered(*(np.concatenate(one) for one in zip(*parts, strict=True)))

    def _scores(self, history: ItemLists, seen: ItemLists) -> sp.csr_matrix:
        """Scores of unseen items, −inf where there are none."""
        n_items, settings = self.knn.n_items, self.knn.settings
        profile = decayed_profiles(history, n_items, settings.decay)
        scores = (profile @ self.knn.similarity + settings.self_weight * profile).tocsr()
        rows = np.repeat(np.arange(len(history)), np.diff(scores.indptr))
        banned = contains(seen.keys(n_items), rows * n_items + scores.indices)
        scores.data[banned | (scores.data <= 0)] = -np.inf
        return scores


def memory_of_run(
    run_dir: Path | str, filter_seen: bool, cache_dir: str | None = None, power: float = POWER
) -> tuple[ItemMemory, str]:
    """The memory of a run's training rows, tuned on its validation rows as the baseline is.

    Args:
        run_dir: a run with prepare done.
        filter_seen: whether lists leave out what a user has; a memory that may list it is tuned to.
        cache_dir: where the baseline's settings are kept; see `cache_folder`.
        power: see `ItemMemory`.

    Returns:
        It, and its settings with their NDCG@10 on validation rows, in words.

    Raises:
        ValueError: the run has no training or no validation rows.
    """
    valid = pl.read_parquet(stage_folder(run_dir, "prepare") / "valid.parquet", glob=False)
    data = load_split_data(run_dir, valid, "valid", 10, filter_seen)
    knn, told = tuned_memory(data, cache_folder(run_dir, cache_dir))
    quality = f"validation NDCG@10 {told['valid_ndcg@10']:.4f}"
    return ItemMemory(knn, power), f"{told['description']} ({quality})"


def memory_lists(
    memory: ItemMemory, rows: pl.DataFrame, seen: ItemLists, item_ids: pl.Series
) -> pl.DataFrame:
    """What the memory gives each row, as lists of a model.

    Args:
        memory: of the training rows.
        rows: split rows.
        seen: items to leave out, per row (`no_items` for none).
        item_ids: of the catalogue, in its order.

    Returns:
        Columns row_id, user_id, item_id and score, a log-probability: `MOST` items a row at most,
        and no line for a row of which the memory knows nothing.
    """
    found = memory.best(ItemLists.from_column(rows[HISTORY]), seen)
    at = found.rows.astype(np.uint32)
    return pl.DataFrame(
        [
            rows[ROW_ID].gather(at).alias(ROW_ID),
            rows[USER_ID].gather(at).alias(USER_ID),
            item_ids.gather(found.items.astype(np.uint32)).alias(ITEM_ID),
            pl.Series(SCORE, found.log_probs),
        ]
    )
