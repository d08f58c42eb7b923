"""What can be read off codes alone: collisions, codes used, perplexity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def shared_rows(codes: np.ndarray) -> np.ndarray:
    """Boolean (n_items,): which rows of `codes` occur more than once."""
    _, inverse, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return counts[inverse.ravel()] > 1


def collision_rate(codes: np.ndarray) -> float:
    """Share of items whose SID is shared with another item: items that share a SID / items."""
    return float(shared_rows(np.asarray(codes)).mean())


def level_usage(codes: np.ndarray, codebook_sizes: Sequence[int]) -> list[dict[str, float]]:
    """Codes used and perplexity (2 to the entropy in bits) of each level's code distribution."""
    report = []
    for level, size in enumerate(codebook_sizes):
        counts = np.bincount(codes[:, level], minlength=size)
        p = counts[counts > 0] / counts.sum()
        report.append(
            {
                "size": size,
                "used": int((counts > 0).sum()),
                "perplexity": float(2 ** -(p * np.log2(p)).sum()),
            }
        )
    return report
