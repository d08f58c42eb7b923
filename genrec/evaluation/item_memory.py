"""A memory of the training rows that speaks beside a model: kNN-LM for items.

Khandelwal et al. 2020 ("Generalization through Memorization: Nearest Neighbor Language Models") mix
the predictions of a language model with what followed its nearest contexts in training. Here a
context is the items of a history, and the memory is sequential-kNN: a model whose regularisation
lets it forget rare items gains most where the memory is best.
"""

from __future__ import annotations

import math

import numpy as np
import polars as pl

from genrec.columns import HISTORY, ITEM_ID, ROW_ID, SCORE, USER_ID
from genrec.evaluation.baselines import BATCH_ROWS
from genrec.evaluation.knn import ItemKNN
from genrec.evaluation.profiles import best_entries, decayed_profiles
from genrec.item_lists import ItemLists, contains

POWER = 2.0  # of scores, by default
MOST = 100  # items of a row that the memory gives a probability


def check_power(power: float) -> None:
    """Raise ValueError where no probabilities come of a power."""
    if not 0 < power < math.inf:
        raise ValueError(f"memory_power={power} must be above 0, and finite")


def memory_lists(
    memory: ItemKNN, rows: pl.DataFrame, seen: ItemLists, item_ids: pl.Series, power: float
) -> pl.DataFrame:
    """What the memory gives each row, as lists of a model.

    Args:
        memory: fitted on training rows.
        rows: split rows.
        seen: items to leave out, per row (`no_items` for none).
        item_ids: of the catalogue, in its order.
        power: a probability goes by ``score ** power``: scores of neighbours are flat.

    Returns:
        Columns row_id, user_id, item_id and score, a log-probability: `MOST` items a row at most,
        and no line for a row of which the memory knows nothing.

    Raises:
        ValueError: the power is not above 0, or infinite.
    """
    check_power(power)
    n_items, settings = memory.n_items, memory.settings
    history = ItemLists.from_column(rows[HISTORY])
    parts = []
    for start in range(0, len(rows), BATCH_ROWS):
        batch = np.arange(start, min(start + BATCH_ROWS, len(rows)))
        profile = decayed_profiles(history.take(batch), n_items, settings.decay)
        scores = (profile @ memory.similarity + settings.self_weight * profile).tocsr()
        cells = np.repeat(np.arange(len(batch)), np.diff(scores.indptr)) * n_items + scores.indices
        banned = contains(seen.take(batch).keys(n_items), cells)
        scores.data[banned | (scores.data <= 0)] = -np.inf
        row, _, column, value = best_entries(scores, memory.tie, MOST)
        # Of the largest of a row, so that no power overflows or vanishes.
        log = power * np.log(value)
        largest = np.full(len(batch), -np.inf)
        np.maximum.at(largest, row, log)
        total = np.bincount(row, np.exp(log - largest[row]), minlength=len(batch))
        score = log - largest[row] - np.log(total[row])
        parts.append(
            pl.DataFrame({"row": start + row, ITEM_ID: column, SCORE: score}).cast(
                {"row": pl.UInt32, ITEM_ID: pl.UInt32, SCORE: pl.Float64}
            )
        )
    schema = {"row": pl.UInt32, ITEM_ID: pl.UInt32, SCORE: pl.Float64}
    found = pl.concat(parts) if parts else pl.DataFrame(schema=schema)
    return pl.DataFrame(
        [
            rows[ROW_ID].gather(found["row"]).alias(ROW_ID),
            rows[USER_ID].gather(found["row"]).alias(USER_ID),
            item_ids.gather(found[ITEM_ID]).alias(ITEM_ID),
            found[SCORE],
        ]
    )
