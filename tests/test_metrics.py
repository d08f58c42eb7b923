"""Ranking metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from genrec.metrics import (
    coverage_at_k,
    gains,
    hit_rate_at_k,
    hits,
    mrr_at_k,
    ndcg_at_k,
    reciprocal_ranks,
    target_rank,
)

# Targets stand at rank 1, rank 3, nowhere, and rank 2 behind an empty slot.
LISTS = np.array([[4, 5, 6], [1, 2, 3], [7, 8, -1], [-1, 9, 0]])
TARGET = np.array([4, 3, 9, 9])


def test_ranks_and_metrics_by_hand():
    assert target_rank(LISTS, TARGET).tolist() == [1, 3, 0, 2]
    assert hit_rate_at_k(LISTS, TARGET, 1) == 1 / 4
    assert hit_rate_at_k(LISTS, TARGET, 2) == 2 / 4
    assert hit_rate_at_k(LISTS, TARGET, 3) == 3 / 4
    assert ndcg_at_k(LISTS, TARGET, 3) == pytest.approx((1 + 1 / 2 + 1 / math.log2(3)) / 4)
    assert ndcg_at_k(LISTS, TARGET, 2) == pytest.approx((1 + 1 / math.log2(3)) / 4)
    assert mrr_at_k(LISTS, TARGET, 3) == pytest.approx((1 + 1 / 3 + 1 / 2) / 4)


def test_per_row_values():
    rank = target_rank(LISTS, TARGET)
    assert hits(rank, 2).tolist() == [1, 0, 0, 1]
    assert gains(rank, 3).tolist() == pytest.approx([1, 0.5, 0, 1 / math.log2(3)])
    assert reciprocal_ranks(rank, 2).tolist() == [1, 0, 0, 0.5]


def test_coverage_counts_distinct_items_and_no_empty_slots():
    assert coverage_at_k(LISTS, 20, 1) == 3 / 20  # 4, 1, 7
    assert coverage_at_k(LISTS, 20, 3) == 10 / 20
    assert coverage_at_k(np.full((3, 2), -1), 20, 2) == 0
    with pytest.raises(ValueError, match="holds 9, but the catalogue has 9 items"):
        coverage_at_k(LISTS, 9, 3)


def test_duplicates_are_refused_but_repeated_padding_is_not():
    with pytest.raises(
        ValueError, match=r"1 lists hold an item twice, the first in row 1 \(\[2, 1, 2"
    ):
        target_rank(np.array([[0, 1, -1], [2, 1, 2]]), np.array([0, 0]))
    assert target_rank(np.array([[0, -1, -1]]), np.array([0])).tolist() == [1]


@pytest.mark.parametrize(
    ("lists", "target", "message"),
    [
        (np.array([1, 2]), np.array([1]), "integer array"),
        (np.array([["a"]]), np.array([1]), "integer array"),
        (np.array([[1.0, 2.0]]), np.array([1]), "integer array"),
        (np.array([[1, 2]]), np.array([1, 2]), r"integer array \(1,\)"),
        (np.array([[1, 2]]), np.array([-1]), "in the catalogue"),
        (np.array([[1, -2]]), np.array([1]), "holds -2"),
    ],
)
def test_wrong_shapes_types_and_indices_raise(lists, target, message):
    with pytest.raises(ValueError, match=message):
        target_rank(lists, target)


def test_k_must_fit_the_list_and_rows_must_exist():
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k={k} must be between 1 and the list length 3"):
            ndcg_at_k(LISTS, TARGET, k)
    with pytest.raises(ValueError, match="no rows"):
        hit_rate_at_k(LISTS[:0], TARGET[:0], 1)


@given(
    hnp.arrays(np.int64, (7, 6), elements=st.integers(0, 9)),
    hnp.arrays(np.int64, 7, elements=st.integers(0, 9)),
)
def test_bounds_and_monotone_in_k(keys, target):
    lists = np.argsort(np.hstack([keys, keys[:, :4]]), axis=1, kind="stable")[:, :6]
    previous = (0.0, 0.0, 0.0)
    for k in range(1, 7):
        hit, gain = hit_rate_at_k(lists, target, k), ndcg_at_k(lists, target, k)
        reciprocal = mrr_at_k(lists, target, k)
        assert 0 <= reciprocal <= gain + 1e-12 and gain <= hit + 1e-12 and hit <= 1
        assert all(now >= then for now, then in zip((hit, gain, reciprocal), previous, strict=True))
        previous = (hit, gain, reciprocal)
    assert hit_rate_at_k(lists, target, 1) == ndcg_at_k(lists, target, 1)
