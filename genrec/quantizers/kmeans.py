"""k-means by faiss, and codes of bounded size on top of it.

Balanced codes: each code carries a price that is added to its distance, so that cells become those
of a power diagram (Aurenhammer 1987). Prices rise, as in an auction (Bertsekas 1988), until no code
holds more than its cap; rows and centroids are then fitted in turn. A price is part of the
codebook: a new vector is encoded with it, without any look at the other items.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from genrec.quantizers.quantizer import FloatArray, row_blocks, squared_distances

logger = logging.getLogger(__name__)

_ITERATIONS = 25  # Lloyd's, or until the objective stands still
_BALANCED_ROUNDS = 8  # rows and centroids in turn
_PRICE_STEPS = 400
_HELD_DISTANCES = 2**28  # of a balanced fit: 1 GB of float32
_MIN_ROWS, _ROWS_PER_CODE = 262_144, 64


def fit_rows(codebook_size: int) -> int:
    """How many vectors k-means is fitted on at most; a larger catalogue is sampled."""
    return max(_MIN_ROWS, _ROWS_PER_CODE * codebook_size)


def kmeans(
    rows: FloatArray, codebook_size: int, seed: int, n_init: int = 1, max_fill: float | None = None
) -> tuple[FloatArray, FloatArray]:
    """Centroids, and the price of each.

    Args:
        rows: (n, dim) float32.
        codebook_size: number of centroids; at most n.
        seed: of the k-means++ start.
        n_init: restarts; the lowest inertia wins.
        max_fill: most distinct rows a code may hold, as a multiple of n / codebook_size (at least
            1). A cap of c bounds the codes' perplexity from below by codebook_size / c. None: plain
            k-means.

    Returns:
        Centroids (codebook_size, dim) and prices (codebook_size,), zero without `max_fill`.
    """
    import faiss

    rows = np.ascontiguousarray(rows)
    trained = faiss.Kmeans(
        rows.shape[1],
        codebook_size,
        niter=_ITERATIONS,
        nredo=n_init,
        seed=faiss_seed(seed),
        init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
        min_points_per_centroid=1,
        max_points_per_centroid=-(-len(rows) // codebook_size),
        early_stop_threshold=1e-4,
    )
    trained.train(rows)
    centroids = np.ascontiguousarray(trained.centroids, dtype=np.float32)
    if max_fill is None:
        return centroids, np.zeros(codebook_size, dtype=np.float32)
    # No price can part identical rows, and it would rise for ever: they count once.
    rows = rows[np.sort(np.unique(rows, axis=0, return_index=True)[1])]
    held = _HELD_DISTANCES // codebook_size
    if len(rows) > held:
        rows = rows[np.sort(np.random.default_rng(seed).choice(len(rows), held, replace=False))]
    if len(rows) < 8 * codebook_size and len(rows) == held:
        logger.warning(
            "balancing %d codes on %d vectors only; a smaller codebook would be balanced better",
            codebook_size,
            held,
        )
    return _balance(rows, centroids, max_fill)


def faiss_seed(seed: int) -> int:
    """A seed as faiss takes it: a 32-bit integer, and other rows for 0 than for 1."""
    return (seed + 1) % 2**31


def nearest_codes(
    rows: FloatArray, centroids: FloatArray, prices: FloatArray
) -> npt.NDArray[np.int64]:
    """Code of the least distance plus price of each row, (n,), in blocks of bounded memory."""
    codes = np.empty(len(rows), dtype=np.int64)
    for block in row_blocks(len(rows), max(len(centroids), rows.shape[1])):
        costs = squared_distances(rows[block], centroids)
        costs += prices
        codes[block] = costs.argmin(axis=1)
    return codes


def _balance(
    rows: FloatArray, centroids: FloatArray, max_fill: float
) -> tuple[FloatArray, FloatArray]:
    """Fit rows and centroids in turn under the cap; returns centroids and prices."""
    size = len(centroids)
    cap = max(int(max_fill * len(rows) / size), -(-len(rows) // size))
    prices = np.zeros(size, dtype=np.float32)
    distances = squared_distances(rows, centroids)
    for _ in range(_BALANCED_ROUNDS):
        prices, codes = capped_prices(distances, cap, prices)
        centroids = _means(rows, codes, centroids)
        distances = squared_distances(rows, centroids)
        prices *= 0.5  # prices only rise; the next round may need less
    prices, _ = capped_prices(distances, cap, prices)
    return centroids, prices - prices.min()


def capped_prices(
    distances: FloatArray, cap: int, prices: FloatArray
) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Raise prices until no code is the cheapest of more than `cap` rows.

    Each code above the cap raises its price to where its `count - cap` least attached rows prefer
    another. Rows that tie exactly (identical vectors) can't be parted by prices; they may stay. So
    may a few rows of a tight cap on few rows, whose bids have not come to rest in time.

    Args:
        distances: (n, size).
        cap: most rows a code may hold; ``cap * size >= n``.
        prices: start, (size,).

    Returns:
        Prices (size,) and the code of each row (n,).
    """
    prices = prices.astype(np.float32).copy()
    every = np.arange(len(distances))
    codes = np.empty(len(distances), dtype=np.int64)
    gaps = np.empty(len(distances), dtype=np.float32)
    stale = every
    smallest_step = 1e-5 * float(distances.mean())
    for _ in range(_PRICE_STEPS):
        # Only rows of codes that became dearer can have changed their mind.
        costs = distances[stale] + prices
        first, here = costs.argmin(axis=1), every[: len(stale)]
        least = costs[here, first]
        costs[here, first] = np.inf
        codes[stale], gaps[stale] = first, costs.min(axis=1) - least
        counts = np.bincount(codes, minlength=len(prices))
        full = counts > cap
        if not full.any():
            break
        stale = np.flatnonzero(full[codes])
        order = stale[np.lexsort((gaps[stale], codes[stale]))]
        owners, starts = np.unique(codes[order], return_index=True)
        leaving = starts + counts[owners] - cap - 1
        # The gap of the row that must stay next: half-way to it, or ties would come back.
        stays = gaps[order[np.minimum(leaving + 1, len(order) - 1)]]
        goes = gaps[order[leaving]]
        prices[owners] += np.maximum((goes + np.maximum(stays, goes)) / 2, smallest_step)
    else:
        codes = (distances + prices).argmin(axis=1)  # after the last rise
    return prices, codes


def _means(rows: FloatArray, codes: npt.NDArray[np.int64], fallback: FloatArray) -> FloatArray:
    """Mean of each code's rows; `fallback` where a code has none."""
    import scipy.sparse as sp

    counts = np.bincount(codes, minlength=len(fallback))
    member = sp.csr_matrix(
        (np.ones(len(rows), np.float32), (codes, np.arange(len(rows)))),
        shape=(len(fallback), len(rows)),
    )
    means = member @ rows / np.maximum(counts, 1)[:, None]
    return np.where(counts[:, None] > 0, means, fallback).astype(np.float32)
