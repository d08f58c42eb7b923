"""One list out of several models': a mixture of their probabilities, item by item.

An item memory may be among them (`genrec.evaluation.item_memory`).
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from genrec.columns import ITEM_ID, RANK, ROW_ID, SCORE, USER_ID

_ROUNDING = 1e-3  # a log-probability of 0 may come out a little above


def mixture(
    lists: Sequence[pl.DataFrame],
    k: int,
    memory: pl.DataFrame | None = None,
    memory_weight: float = 0.0,
) -> pl.DataFrame:
    """The k items of highest mean probability over models.

    A model that doesn't list an item gives it no probability, though it has some below that of the
    last item it lists: make the lists longer than k (three to five times), and it matters little.
    Models are mixed by item id, so they may have different semantic ids.

    Args:
        lists: per model the columns row_id, user_id, item_id and score, a log-probability.
        k: length of the lists.
        memory: lists of an item memory, of the same columns; it may know nothing of some rows,
            which are then the models' alone.
        memory_weight: its part of the mixture, in [0, 1); the models share the rest evenly.

    Returns:
        Columns row_id, user_id, item_id, rank (1 … k) and score (log of the mean probability),
        sorted by row_id and rank; equal scores by item id.

    Raises:
        ValueError: fewer than two models, or none and a memory; rows that differ between them, an
            item listed twice in one list, or scores that are no log-probabilities.
    """
    if len(lists) < (2 if memory is None else 1):
        fewest = "two models" if memory is None else "one model"
        raise ValueError(f"a mixture needs at least {fewest}, not {len(lists)}")
    if not 0 <= memory_weight < 1:
        raise ValueError(f"memory_weight={memory_weight} must be at least 0 and below 1")
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    rows = lists[0][ROW_ID].unique()
    known = [(f"model {number}", one) for number, one in enumerate(lists)]
    for name, one in [*known, *([("the memory", memory)] if memory is not None else [])]:
        if (~(one[SCORE] <= _ROUNDING)).any():  # also where a score is no number
            raise ValueError(f"{name} has scores above 0: they are no log-probabilities")
        if one.select(ROW_ID, ITEM_ID).is_duplicated().any():
            raise ValueError(f"{name} lists an item twice in one list")
        other = one[ROW_ID].unique()
        fewer = len(other) != len(rows) and one is not memory
        if fewer or not other.is_in(rows.implode()).all():
            raise ValueError(
                f"{name} has lists for other rows than model 0 ({len(other):,} and "
                f"{len(rows):,}); all must be of one split"
            )
    share = pl.lit(1 / len(lists))
    parts = [(one, share) for one in lists]
    if memory is not None:
        remembered = pl.col(ROW_ID).is_in(memory[ROW_ID].unique().implode())
        share = pl.when(remembered).then(1 - memory_weight).otherwise(1.0) / len(lists)
        parts = [*((one, share) for one in lists), (memory, pl.lit(memory_weight))]
    chance = pl.col(SCORE).cast(pl.Float64).exp()
    every = pl.concat(
        [one.select(ROW_ID, USER_ID, ITEM_ID, (chance * part).alias(SCORE)) for one, part in parts]
    )
    return (
        every.group_by(ROW_ID, USER_ID, ITEM_ID)
        .agg(pl.col(SCORE).sum().log())
        .filter(pl.col(SCORE) > -float("inf"))  # of a memory without weight
        .sort([ROW_ID, SCORE, ITEM_ID], descending=[False, True, False])
        .with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int32).over(ROW_ID).alias(RANK))
        .filter(pl.col(RANK) <= k)
        .select(ROW_ID, USER_ID, ITEM_ID, RANK, SCORE)
    )
