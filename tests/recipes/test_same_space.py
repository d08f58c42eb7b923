"""Extending a map: old items' vectors must be of the quantizer's space, also where codes moved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from genrec.quantizers.collisions import resolve_collisions
from genrec.quantizers.residual_kmeans import ResidualKMeans
from recipes.quantize import check_same_space


@pytest.mark.parametrize("crowd", [30, 45])  # of 60 items in a cluster that has 16 SIDs
def test_items_that_had_to_leave_a_full_cluster_are_of_the_same_space(crowd: int):
    rng = np.random.default_rng(0)
    own = np.repeat(np.arange(4), [crowd, *np.full(3, (60 - crowd) // 3)])
    vectors = (rng.normal(size=(4, 6))[own] * 9 + rng.normal(size=(60, 6))).astype(np.float32)
    quantizer = ResidualKMeans.fit(vectors, (4, 4, 4))
    codes, _, report = resolve_collisions(quantizer, vectors, quantizer.encode(vectors))
    assert report.spilled >= 0.2 * 60
    check_same_space(quantizer, vectors, codes, Path("runs/old"))
    with pytest.raises(ValueError, match=r"another space than those of runs/old"):
        check_same_space(quantizer, vectors[:, ::-1] * 7 + 20, codes, Path("runs/old"))
