"""One list out of several models': a mixture of their probabilities, item by item."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from genrec.columns import ITEM_ID, RANK, ROW_ID, SCORE, USER_ID

_ROUNDING = 1e-3  # a log-probability of 0 may come out a little above


def mixture(lists: Sequence[pl.DataFrame], k: int) -> pl.DataFrame:
    """The k items of highest mean probability over models.

    A model that doesn't list an item gives it no probability, though it has some below that of the
    last item it lists: make the lists longer than k (three to five times), and it matters little.
    Models are mixed by item id, so they may have different semantic ids.

    Args:
        lists: per model the columns row_id, user_id, item_id and score, a log-probability.
        k: length of the lists.

    Returns:
        Columns row_id, user_id, item_id, rank (1 … k) and score (log of the mean probability),
        sorted by row_id and rank; equal scores by item id.

    Raises:
        ValueError: fewer than two models, rows that differ between them, an item listed twice in
            one list, or scores that are no log-probabilities.
    """
    if len(lists) < 2:
        raise ValueError(f"a mixture needs at least two models, not {len(lists)}")
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    rows = lists[0][ROW_ID].unique()
    for number, one in enumerate(lists):
        if (~(one[SCORE] <= _ROUNDING)).any():  # also where a score is no number
            raise ValueError(f"model {number} has scores above 0: they are no log-probabilities")
        if one.select(ROW_ID, ITEM_ID).is_duplicated().any():
            raise ValueError(f"model {number} lists an item twice in one list")
        other = one[ROW_ID].unique()
        if len(other) != len(rows) or not other.is_in(rows.implode()).all():
            raise ValueError(
                f"model {number} has lists for other rows than model 0 ({len(other):,} and "
                f"{len(rows):,}); all must be of one split"
            )
    score = pl.col(SCORE).cast(pl.Float64)
    every = pl.concat([one.select(ROW_ID, USER_ID, ITEM_ID, score) for one in lists])
    share = pl.col(SCORE).exp().sum() / len(lists)
    return (
        every.group_by(ROW_ID, USER_ID, ITEM_ID)
        .agg(share.log().alias(SCORE))
        .sort([ROW_ID, SCORE, ITEM_ID], descending=[False, True, False])
        .with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int32).over(ROW_ID).alias(RANK))
        .filter(pl.col(RANK) <= k)
        .select(ROW_ID, USER_ID, ITEM_ID, RANK, SCORE)
    )
