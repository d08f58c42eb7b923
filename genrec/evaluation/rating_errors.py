"""How far predicted ratings are off, beside predictions that need no model.

The strongest of them, biases of users and items under ridge regression, is what rating prediction
is measured against since the Netflix prize (Koren 2009), and on sparse data hard to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.sparse import csr_matrix
from sklearn.linear_model import Ridge

from genrec.columns import ITEM_INDEX, POSITION, RATING, TARGET, TARGET_POSITION, USER_ID
from genrec.evaluation.significance import bootstrap_means, interval

FloatArray = npt.NDArray[np.float64]
Predictor = Callable[[pl.DataFrame], FloatArray]  # rows with user_id and the target -> (n,)

SHRINKAGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def known_ratings(
    rows: pl.DataFrame, earlier: Sequence[pl.DataFrame], interactions: Path | str
) -> pl.DataFrame:
    """Rated interactions before what is predicted: user_id, position, target_item_index, rating.

    Of a user with such rows all before the first target, as the model's prompts show them: for a
    test row the validation item, too. Of others what the earlier parts hold.

    Args:
        rows: all rows of the split whose targets are predicted.
        earlier: rows of the parts before it; a user's part ends with their last target.
        interactions: ``interactions.parquet``.

    Raises:
        ValueError: there are none.
    """
    position = pl.col(TARGET_POSITION).cast(pl.Int64)
    parts = [part.select(USER_ID, TARGET_POSITION) for part in earlier]
    ends = [
        rows.group_by(USER_ID).agg(position.min().alias("_end") - 1),
        pl.concat(parts).group_by(USER_ID).agg(position.max().alias("_end")),
    ]
    ends_of_all = pl.concat(ends).unique(USER_ID, keep="first", maintain_order=True)
    log = pl.scan_parquet(interactions, glob=False).drop_nulls(RATING)
    rated = log.join(ends_of_all.lazy(), on=USER_ID).filter(pl.col(POSITION) <= pl.col("_end"))
    found = rated.select(USER_ID, POSITION, pl.col(ITEM_INDEX).alias(TARGET), RATING).collect()
    if found.is_empty():
        raise ValueError(f"no interaction of {interactions} before the targets has a rating")
    return found


def mean_rating(train: pl.DataFrame, by: str | None = None) -> Predictor:
    """The mean rating of all, or of each value of a column (of all, where it is new)."""
    overall = float(np.mean(train[RATING].to_numpy()))
    if by is None:
        return lambda rows: np.full(len(rows), overall)
    means = train.group_by(by).agg(pl.col(RATING).mean())

    def predict(rows: pl.DataFrame) -> FloatArray:
        found = rows.select(by).join(means, on=by, how="left", maintain_order="left")
        return found[RATING].fill_null(overall).to_numpy().astype(np.float64)

    return predict


def biases(train: pl.DataFrame, shrinkage: float) -> Predictor:
    """A mean, and what each user and each item adds to it; those that are new add nothing.

    Args:
        train: from `known_ratings`.
        shrinkage: ridge penalty.
    """
    users, items = train[USER_ID].unique(), train[TARGET].unique()
    width = len(users) + len(items)

    def one_hot(rows: pl.DataFrame) -> csr_matrix:
        at = [
            rows.select(name)
            .join(known.to_frame(name).with_row_index("at"), on=name, how="left",
                  maintain_order="left")["at"]
            for name, known in ((USER_ID, users), (TARGET, items))
        ]  # fmt: skip
        parts = [(column.is_not_null().to_numpy(), column.fill_null(0).to_numpy()) for column in at]
        row = np.concatenate([np.flatnonzero(there) for there, _ in parts])
        place = [own[there] + shift for (there, own), shift in zip(parts, (0, len(users)),
                                                                   strict=True)]  # fmt: skip
        ones = np.ones(len(row))
        return csr_matrix((ones, (row, np.concatenate(place))), shape=(len(rows), width))

    fitted = Ridge(alpha=shrinkage, solver="sparse_cg").fit(one_hot(train), train[RATING])
    return lambda rows: np.asarray(fitted.predict(one_hot(rows)), dtype=np.float64)


def baselines(
    known: pl.DataFrame, shrinkages: Sequence[float] = SHRINKAGES
) -> dict[str, Predictor]:
    """Predictions without a model; predictions are cut to the range of the known ratings.

    The shrinkage of the biases is chosen on each user's newest known rating, fitted to those before
    it, so that nothing is chosen on what is predicted; without any such rating it is the middle
    one. Then they are fitted to all.

    Args:
        known: from `known_ratings`.
        shrinkages: of the biases.
    """
    low, high = float(np.min(known[RATING].to_numpy())), float(np.max(known[RATING].to_numpy()))

    def cut(predict: Predictor) -> Predictor:
        return lambda rows: predict(rows).clip(low, high)

    newest = (pl.col(POSITION) == pl.col(POSITION).max().over(USER_ID)) & (
        pl.len().over(USER_ID) > 1  # of one rating nothing would be left to go by
    )
    held, rest = known.filter(newest), known.filter(~newest)
    best, least = shrinkages[len(shrinkages) // 2], np.inf
    for shrinkage in shrinkages if len(held) else ():
        errors = cut(biases(rest, shrinkage))(held) - held[RATING].to_numpy()
        if (error := float((errors**2).mean())) < least:
            best, least = shrinkage, error
    return {
        "mean": mean_rating(known),
        "user's mean": mean_rating(known, USER_ID),
        "item's mean": mean_rating(known, TARGET),
        f"biases, ridge {best:g}": cut(biases(known, best)),
    }


def rating_errors(
    truth: FloatArray,
    predicted: Mapping[str, FloatArray],
    users: npt.NDArray[np.integer],
    against: str,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """RMSE and MAE of each system with 95% intervals, and their differences from one of them.

    Args:
        truth: ratings, (n,).
        predicted: system -> predictions, (n,).
        users: whose row each is, (n,); users are drawn as a whole, for all systems together.
        against: the system whose errors are taken off.
        samples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        System -> {"rmse": interval, "mae": interval, "rmse_minus": …, "mae_minus": …}, where an
        interval is {"value", "low", "high"}.
    """
    names = list(predicted)
    off = np.stack([predicted[name] - truth for name in names], axis=1)
    both = np.concatenate([off**2, np.abs(off)], axis=1)
    draws, means = bootstrap_means(both, samples, seed, users), both.mean(axis=0)
    n = len(names)
    values = {"rmse": np.sqrt(means[:n]), "mae": means[n:]}
    drawn = {"rmse": np.sqrt(draws[:, :n]), "mae": draws[:, n:]}
    base = names.index(against)
    found: dict[str, dict[str, Any]] = {}
    for at, name in enumerate(names):
        found[name] = {}
        for metric, value in values.items():
            sampled = drawn[metric]
            less = interval(value[at] - value[base], sampled[:, at] - sampled[:, base])
            own = interval(value[at], sampled[:, at])
            for key, one in ((metric, own), (f"{metric}_minus", less)):
                found[name][key] = {"value": one.value, "low": one.low, "high": one.high}
    return found
