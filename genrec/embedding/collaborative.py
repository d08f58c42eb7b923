"""Item vectors from behaviour alone: co-occurrence in training sequences, or a trained item table.

Only training rows may be given: a vector that has seen a validation or test interaction carries the
answer into the semantic ids.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import polars as pl
import scipy.sparse as sp
from sklearn.utils.extmath import randomized_svd

from genrec.columns import HISTORY, ITEM_INDEX, SUPERVISE_FROM, TARGET, TARGET_POSITION, USER_ID
from genrec.item_lists import ItemLists

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]

_BLOCK_PAIRS = 1 << 24  # pairs that are held before they are summed
_FAINT = 1e-3  # share of an item's PPMI row that the kept components must describe


def training_histories(rows: pl.DataFrame) -> ItemLists:
    """Each user's whole training sequence, oldest first, from the overlapping windows of a split.

    A row supervises the part of its window that no earlier one did, so these parts, in the order of
    their targets, are the sequence, with every interaction once. Rows of given splits supervise
    their target alone; what stands before the first one belongs to the sequence, too.

    Args:
        rows: training rows of any protocol.
    """
    start = pl.when(pl.col(USER_ID).is_first_distinct()).then(0).otherwise(SUPERVISE_FROM)
    window = pl.concat_list(HISTORY, TARGET).list.slice(start)
    sequences = (
        rows.sort(TARGET_POSITION, maintain_order=True)
        .select(USER_ID, window.alias(ITEM_INDEX))
        .group_by(USER_ID, maintain_order=True)
        .agg(pl.col(ITEM_INDEX).list.explode(keep_nulls=False, empty_as_null=False))
    )
    return ItemLists.from_column(sequences[ITEM_INDEX])


def cooccurrence_vectors(
    sequences: ItemLists,
    n_items: int,
    dim: int = 256,
    seed: int = 0,
    window: int | None = None,
    smoothing: float = 0.75,
) -> FloatArray:
    """Truncated SVD of the items' PPMI matrix: rows of ``U sqrt(S)``, of unit length.

    Levy and Goldberg, "Neural Word Embedding as Implicit Matrix Factorization", 2014, with the
    context smoothing and the symmetric factor of Levy, Goldberg and Dagan 2015 (eq. 3 and 6).
    Deviation: a pair at distance d counts 1/d, as in GloVe, rather than 1.

    Args:
        sequences: training sequences, see `training_histories`.
        n_items: size of the catalogue.
        dim: components.
        seed: of the randomised SVD.
        window: largest distance at which two items of a sequence count as together; None: any. The
            work grows with the interactions times this (or the longest sequence).
        smoothing: exponent of the context counts; below 1, rare contexts weigh less.

    Returns:
        (n_items, dim) float32; zero for items that never stand beside another one, and for those
        that the kept components hardly describe.

    Raises:
        ValueError: `dim` is above `n_items`, a setting is out of range, or no items stand together.
    """
    if not 1 <= dim <= n_items:
        raise ValueError(f"collaborative_dim={dim} must lie between 1 and the {n_items} items")
    if not 0 < smoothing <= 1:
        raise ValueError(f"smoothing={smoothing} must lie in (0, 1]")
    matrix = ppmi(cooccurrence(sequences, n_items, window), smoothing)
    if matrix.nnz == 0:
        raise ValueError(
            "no two different items stand together in a training sequence more often than chance, "
            "so there is nothing collaborative to learn; use collaborative: none"
        )
    left, values, _ = randomized_svd(matrix, dim, random_state=seed)
    vectors = (left * np.sqrt(values)).astype(np.float32)
    kept = np.linalg.norm(left * values, axis=1)
    whole = np.sqrt(matrix.multiply(matrix).sum(axis=1, dtype=np.float64))
    whole = np.asarray(whole).ravel()
    alone = whole == 0
    # What an item has outside of the kept components is rounding there; scaled up, it would be a
    # random direction.
    faint = ~alone & (kept < _FAINT * whole)
    vectors[alone | faint] = 0
    logger.info("%d items have no co-occurrence, %d too faint a one", alone.sum(), faint.sum())
    return _unit(vectors)


def cooccurrence(sequences: ItemLists, n_items: int, window: int | None = None) -> sp.csr_matrix:
    """How often two different items stand together, each pair of places weighted by 1/distance.

    Args:
        sequences: lists of item indices.
        n_items: size of the catalogue.
        window: largest distance; None: any.

    Returns:
        Symmetric, zero diagonal, float32. ``# (n_items, n_items)``

    Raises:
        ValueError: a window below 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"collaborative_window={window} must be at least 1")
    ends = sequences.offsets[sequences.rows + 1]  # where each value's list ends
    place = np.arange(len(sequences.values))
    total = sp.csr_matrix((n_items, n_items), dtype=np.float32)
    pending: list[sp.coo_matrix] = []
    held = 0
    longest = int(sequences.lengths.max(initial=0)) - 1
    for distance in range(1, min(longest, window or longest) + 1):
        place = place[place + distance < ends[place]]
        # Blocks, so that neither a long log nor a long sequence takes memory for all its pairs.
        for start in range(0, len(place), _BLOCK_PAIRS):
            first = place[start : start + _BLOCK_PAIRS]
            left, right = sequences.values[first], sequences.values[first + distance]
            other = left != right
            weight = np.full(int(other.sum()), 1 / distance, dtype=np.float32)
            shape = (n_items, n_items)
            pending.append(sp.coo_matrix((weight, (left[other], right[other])), shape=shape))
            held += len(weight)
            if held >= _BLOCK_PAIRS:
                total, pending, held = total + _summed(pending), [], 0
    if pending:
        total = total + _summed(pending)
    return (total + total.T).tocsr()


def _summed(parts: list[sp.coo_matrix]) -> sp.csr_matrix:
    data, rows, columns = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("data", "row", "col")
    )
    return sp.coo_matrix((data, (rows, columns)), shape=parts[0].shape).tocsr()


def ppmi(counts: sp.csr_matrix, smoothing: float = 0.75) -> sp.csr_matrix:
    """Positive pointwise mutual information ``max(0, log P(i, c) / (P(i) P_s(c)))``.

    ``P_s(c)`` is proportional to the count of context c to the power of `smoothing`.

    Args:
        counts: non-negative. ``# (n_items, n_items)``
        smoothing: in (0, 1]; 1 is plain PMI.

    Returns:
        Sparse, float32; the entries that are not positive are dropped. ``# (n_items, n_items)``
    """
    cells = counts.tocoo()
    of_item = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    of_context = np.asarray(counts.sum(axis=0, dtype=np.float64)).ravel() ** smoothing
    expected = of_item[cells.row] * of_context[cells.col] / max(of_context.sum(), 1e-12)
    value = np.log(cells.data / expected)
    kept = value > 0
    data = value[kept].astype(np.float32)
    return sp.csr_matrix((data, (cells.row[kept], cells.col[kept])), shape=counts.shape)


def item_table_vectors(
    table: npt.NDArray[np.floating], trained: npt.NDArray[np.bool_]
) -> FloatArray:
    """Item vectors from the embedding table of a trained recommender, such as SASRec.

    Args:
        table: (n_items, dim), row i = catalogue row i.
        trained: which items occur in training. The rows of the others hold their random start and
            what being a negative did to it: nothing about the item. ``# (n_items,)``

    Returns:
        (n_items, dim) float32 rows of unit length; zero where not trained.

    Raises:
        ValueError: the table has not one row per item.
    """
    if table.ndim != 2 or len(table) != len(trained):
        raise ValueError(
            f"the item table has shape {table.shape}, the catalogue has {len(trained)} items; a "
            "row per item is needed"
        )
    return _unit(np.where(trained[:, None], table, 0).astype(np.float32))


def _unit(vectors: FloatArray) -> FloatArray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
