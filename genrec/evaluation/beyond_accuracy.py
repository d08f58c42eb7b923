"""What lists are like apart from being right: novel, diverse, popular, true to the user's tastes.

All functions return one value per row, so that intervals and slices work as for accuracy; rows
without an item have NaN. Work is done in blocks of rows, so memory does not grow with the rows.
Coverage and the Gini coefficient, which belong to all lists together: `genrec.metrics`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import polars as pl
import scipy.sparse as sp

from genrec.item_lists import ItemLists
from genrec.metrics import EMPTY, check_catalogue, check_k

IntArray = npt.NDArray[np.integer]
FloatArray = npt.NDArray[np.float64]

SMOOTHING = 0.01  # share of the history's distribution mixed into the list's (Steck 2018)
_BLOCK_CELLS = 1 << 23  # floats of one block of dense rows: 64 MiB


def _blocks(n_rows: int, width: int) -> Iterator[slice]:
    size = max(1, _BLOCK_CELLS // max(1, width))
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def _mean_of_items(recommended: IntArray, values: FloatArray, k: int) -> FloatArray:
    """Per row, the mean of a value over the items among the first `k`."""
    check_catalogue(recommended, len(values))
    check_k(k, recommended.shape[1])
    means = np.empty(len(recommended))
    padded = np.append(values, 0.0)  # EMPTY = -1 reads the last entry
    for block in _blocks(len(recommended), k):
        items = recommended[block, :k]
        count = (items != EMPTY).sum(axis=1)
        with np.errstate(invalid="ignore"):
            means[block] = padded[items].sum(axis=1) / np.where(count, count, np.nan)
    return means


def novelty(recommended: IntArray, train_users: IntArray, n_users: int, k: int) -> FloatArray:
    """Mean self-information of a row's items in bits (Zhou et al. 2010).

    ``-log2((users + 1) / (n_users + 1))``: an item that everybody has says 0 bits; the +1 gives
    items that nobody has in training a finite value.

    Args:
        recommended: item indices, best first. ``# (n_rows, k_max)``
        train_users: users who have each item in training, repeats counted once. ``# (n_items,)``
        n_users: users in training.
        k: list length that counts.
    """
    share = (train_users + 1.0) / (n_users + 1.0)
    return _mean_of_items(recommended, -np.log2(share), k)


def list_popularity(recommended: IntArray, train_count: IntArray, k: int) -> FloatArray:
    """Mean training count of a row's items. ``# (n_rows,)``."""
    return _mean_of_items(recommended, train_count.astype(np.float64), k)


def history_popularity(history: ItemLists, train_count: IntArray) -> FloatArray:
    """Mean training count of the items of a row's history. ``# (n_rows,)``.

    The popularity lift of a system is ``mean list popularity / mean history popularity - 1`` over
    the rows that have both (group average popularity, Abdollahpouri et al. 2020).
    """
    sums = np.bincount(history.rows, train_count[history.values], minlength=len(history))
    return sums / np.where(history.lengths, history.lengths, np.nan)


def intra_list_diversity(recommended: IntArray, vectors: npt.NDArray, k: int) -> FloatArray:
    """Mean cosine distance over the pairs of items of a row (Ziegler et al. 2005).

    Computed from the sum of a row's unit vectors, so no pair is ever formed. NaN for rows with
    fewer than two items.

    Args:
        recommended: item indices, best first. ``# (n_rows, k_max)``
        vectors: one vector per catalogue row; a zero vector is like no other item.
            ``# (n_items, dim)``
        k: list length that counts.
    """
    check_catalogue(recommended, len(vectors))
    check_k(k, recommended.shape[1])
    import torch  # its sums of rows are several times faster than SciPy's

    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    unit = np.ascontiguousarray(unit, dtype=np.float32)
    square = (unit.astype(np.float64) ** 2).sum(axis=1)  # 1, or 0 of a zero vector
    rows_of_unit = torch.from_numpy(unit)
    diversity = np.empty(len(recommended))
    for block in _blocks(len(recommended), max(k, unit.shape[1])):
        items = recommended[block, :k]
        shown = items != EMPTY
        count = shown.sum(axis=1)
        listed, starts = items[shown], np.concatenate([[0], np.cumsum(count)[:-1]])
        total = (
            torch.nn.functional.embedding_bag(
                torch.from_numpy(listed.astype(np.int64)),
                rows_of_unit,
                torch.from_numpy(starts),
                mode="sum",
            )
            .numpy()
            .astype(np.float64)
        )  # (rows, dim)
        own = np.bincount(np.nonzero(shown)[0], square[listed], minlength=len(items))
        pairs = np.where(count > 1, count * (count - 1.0), np.nan)
        similarity = ((total**2).sum(axis=1) - own) / pairs
        diversity[block] = 1.0 - similarity
    return diversity


def category_matrix(categories: pl.Series) -> sp.csr_matrix:
    """Distribution of each item over categories; an item's categories share its weight equally.

    Args:
        categories: a list of labels per item (null or empty: the item has none).

    Returns:
        Rows that sum to 1, or to 0 for items without a category. ``# (n_items, n_categories)``
    """
    items = pl.DataFrame({"categories": categories}).with_row_index("item")
    pairs = items.explode("categories").drop_nulls("categories").unique(maintain_order=True)
    labels = pairs["categories"].cast(pl.Categorical).to_physical().to_numpy()
    _, column = np.unique(labels, return_inverse=True)
    row = pairs["item"].to_numpy()
    count = np.bincount(row, minlength=len(categories))
    shape = (len(categories), int(column.max(initial=-1)) + 1)
    return sp.csr_matrix((1.0 / count[row], (row, column)), shape=shape)


def category_profile(history: ItemLists, categories: sp.csr_matrix) -> sp.csr_matrix:
    """Category mix of each row's history, for `calibration`.

    Args:
        history: items of each row.
        categories: result of `category_matrix`. ``# (n_items, n_categories)``

    Returns:
        Rows that sum to 1, or to 0 where no item has a category. ``# (n_rows, n_categories)``
    """
    profile = (history.matrix(categories.shape[0]) @ categories).tocsr()
    sums = np.asarray(profile.sum(axis=1)).ravel()
    profile.data /= np.repeat(sums, np.diff(profile.indptr))
    return profile


def calibration(
    recommended: IntArray, profile: sp.csr_matrix, categories: sp.csr_matrix, k: int
) -> FloatArray:
    """Divergence of a row's category mix from its history's, in nats; 0 is a perfect match.

    ``KL(p || (1 - a) q + a p)`` with p the history's and q the list's mean category distribution
    and ``a = 0.01`` (Steck 2018, eq. 6). NaN where history or list has no category.

    Args:
        recommended: item indices, best first. ``# (n_rows, k_max)``
        profile: p of each row: result of `category_profile`. ``# (n_rows, n_categories)``
        categories: result of `category_matrix`. ``# (n_items, n_categories)``
        k: list length that counts.
    """
    n_items, n_categories = categories.shape
    check_catalogue(recommended, n_items)
    check_k(k, recommended.shape[1])
    divergence = np.full(len(recommended), np.nan)
    for block in _blocks(len(recommended), max(k, n_categories)):
        items, own = recommended[block, :k], profile[block]
        shown = items != EMPTY
        offsets = np.concatenate([[0], np.cumsum(shown.sum(axis=1))])
        listed = sp.csr_matrix(
            (np.ones(int(offsets[-1])), items[shown], offsets), shape=(len(items), n_items)
        )
        mix = np.asarray((listed @ categories).todense())
        total = mix.sum(axis=1)
        known = (total > 0) & (np.diff(own.indptr) > 0)
        # Only where p is positive: a history has few of many categories.
        row, p = np.repeat(np.arange(len(items)), np.diff(own.indptr)), own.data
        q = mix[row, own.indices] / np.where(known, total, 1.0)[row]
        terms = p * np.log(p / ((1 - SMOOTHING) * q + SMOOTHING * p))
        found = np.bincount(row, terms, minlength=len(items))
        divergence[block] = np.where(known, found, np.nan)
    return divergence
