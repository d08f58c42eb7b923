"""Extending a map: old items' vectors must be of the quantizer's space, also where codes moved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from genrec.map_extension import check_same_space, first_code_agreement
from genrec.quantizers.collisions import resolve_collisions
from genrec.quantizers.residual_kmeans import ResidualKMeans

OLD = Path("runs/old")


@pytest.mark.parametrize("crowd", [30, 45, 52])  # of 60 items in a cluster that has 16 SIDs
def test_items_that_had_to_leave_a_full_cluster_are_of_the_same_space(crowd: int):
    rng = np.random.default_rng(0)
    rest = (60 - crowd) // 3
    own = np.repeat(np.arange(4), [60 - 3 * rest, rest, rest, rest])
    vectors = (rng.normal(size=(4, 6))[own] * 9 + rng.normal(size=(60, 6))).astype(np.float32)
    quantizer = ResidualKMeans.fit(vectors, (4, 4, 4))
    encoded = quantizer.encode(vectors)
    codes, _, report = resolve_collisions(quantizer, vectors, encoded)
    assert report.spilled >= crowd - 16
    plain = (encoded[:, 0] == codes[:, 0]).mean()
    assert crowd < 52 or plain < 0.5
    assert first_code_agreement(encoded[:, 0], codes[:, 0]) == pytest.approx(1)
    check_same_space(quantizer, vectors, codes, OLD)
    # Those that are left of a catalogue, whichever they are.
    for left in (slice(0, 60, 2), slice(1, 60, 3), slice(30, 60)):
        check_same_space(quantizer, vectors[left], codes[left], OLD)
    for seed in range(5):
        other = np.random.default_rng(seed).permutation(60)  # the same cloud, other items
        with pytest.raises(ValueError, match="another space than those of runs/old"):
            check_same_space(quantizer, vectors[other], codes, OLD)
    with pytest.raises(ValueError, match="another space than those of runs/old"):
        check_same_space(quantizer, vectors[:, ::-1] * 7 + 20, codes, OLD)


def test_agreement_of_first_codes_by_hand():
    held = np.array([0, 0, 1, 1, 2, 2])
    assert first_code_agreement(held, held) == 1
    # Code 0 has room for two of its four; equal by chance: 4/6 * 2/6 + 2/6 * 2/6 = 12/36, at most
    # 2 + 2 of 6.
    assert first_code_agreement(np.array([0, 0, 1, 1, 0, 0]), held) == pytest.approx(1)
    assert first_code_agreement(np.array([0, 0, 1, 0, 1, 0]), held) == pytest.approx(
        (3 / 6 - 12 / 36) / (4 / 6 - 12 / 36)
    )
    assert first_code_agreement(np.array([1, 1, 0, 0, 0, 0]), held) < 0
    one = np.array([3])
    assert first_code_agreement(one, one) == 1 and first_code_agreement(one, one + 1) == 0
