"""Figures that say what a prepared dataset and its split are like."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from genrec.columns import EVENT, ITEM_ID, RELEVANT, REVIEW, SEEN, TARGET, USER_ID, WEIGHT
from genrec.data.cleaning import CleanData
from genrec.data.splits import Splits


def split_statistics(data: CleanData, splits: Splits) -> dict[str, Any]:
    """Sizes, shares and the hash of the split, by name; they go to split.json and the manifest.

    Args:
        data: the cleaned tables.
        splits: rows made of them.
    """
    lengths = data.interactions.group_by(USER_ID).len()["len"].to_numpy()
    targets = splits.test[TARGET].to_numpy()
    seen = splits.test.select(pl.col(SEEN).list.contains(pl.col(TARGET)).mean()).item()
    trained = splits.train[USER_ID].unique().implode()
    several = {}
    if RELEVANT in splits.test.columns:
        several["relevant_per_test_row"] = splits.test[RELEVANT].list.len().mean()
    return {
        "users": len(lengths),
        "items": data.catalog.height,
        "items_without_interactions": data.catalog.height - data.interactions[ITEM_ID].n_unique(),
        "interactions": data.interactions.height,
        "density": data.interactions.height / (len(lengths) * data.catalog.height),
        "mean_length": float(lengths.mean()),
        "median_length": float(np.median(lengths)),
        **_feedback(data.interactions),
        "protocol": splits.protocol,
        "boundaries": splits.boundaries,
        "shares": splits.shares,
        "dropped_by_split": splits.dropped,
        "train_only_users": splits.train_only_users,
        "train_rows": splits.train.height,
        "valid_rows": splits.valid.height,
        "test_rows": splits.test.height,
        "test_users": splits.test[USER_ID].n_unique(),
        "test_rows_of_untrained_users": splits.test.select(
            (~pl.col(USER_ID).is_in(trained)).mean()
        ).item(),
        **several,
        "cold_test_targets": float((splits.train_count[targets] == 0).mean()),
        "repeated_test_targets": seen,
        "tied_test_targets": splits.tied_test_targets,
        "tie_share_of_last_two": data.tie_share,
        "content_sha256": splits.sha256(),
    }


def _feedback(log: pl.DataFrame) -> dict[str, Any]:
    """What the optional columns of the log hold."""
    figures: dict[str, Any] = {}
    if EVENT in log.columns:
        counts = log.group_by(EVENT).len().sort("len", EVENT, descending=[True, False])
        figures["events"] = {e or "(none)": count for e, count in counts.iter_rows()}
    if WEIGHT in log.columns:
        figures["mean_weight"] = log[WEIGHT].mean()
    if REVIEW in log.columns:
        figures["interactions_with_review"] = log.height - log[REVIEW].null_count()
    return figures
