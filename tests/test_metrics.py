"""Ranking metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from genrec.item_lists import ItemLists
from genrec.metrics import (
    RelevantRanks,
    average_precisions,
    coverage_at_k,
    exposures,
    find_relevant,
    gains,
    gini_at_k,
    hit_rate_at_k,
    hits,
    mrr_at_k,
    ndcg_at_k,
    recalls,
    reciprocal_ranks,
    shared_sid_credit,
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


# Several relevant items a row. --------------------------------------------------------------------


def items_of(*rows: list[int]) -> ItemLists:
    return ItemLists.from_column(pl.Series(rows, dtype=pl.List(pl.Int64)))


# Relevant at ranks 1 and 4; at 2 and 3 of three; nowhere; at 3, and more of them than places.
SEVERAL = np.array([[5, 1, 2, 6], [9, 3, 4, 8], [1, 2, 3, -1], [8, -1, 0, 9]])
RELEVANT = items_of([6, 5], [3, 7, 4], [9], [0, 1, 2, 3, 4, 5])


def gain(*ranks: int) -> float:
    return sum(1 / math.log2(rank + 1) for rank in ranks)


def test_several_relevant_items_by_hand():
    found = find_relevant(SEVERAL, RELEVANT)
    assert found.row.tolist() == [0, 0, 1, 1, 3]
    assert found.rank.tolist() == [1, 4, 2, 3, 3]
    assert found.n_relevant.tolist() == [2, 3, 1, 6]
    assert found.first().tolist() == [1, 2, 0, 3]
    assert hits(found, 2).tolist() == [1, 1, 0, 0]
    assert recalls(found, 3).tolist() == pytest.approx([1 / 2, 2 / 3, 0, 1 / 6])
    assert reciprocal_ranks(found, 2).tolist() == [1, 1 / 2, 0, 0]
    # The best list of k items has min(k, relevant) of them at its head.
    ideal = [gain(1, 2), gain(1, 2, 3), gain(1), gain(1, 2, 3, 4)]
    expected = [gain(1, 4) / ideal[0], gain(2, 3) / ideal[1], 0, gain(3) / ideal[3]]
    assert gains(found, 4).tolist() == pytest.approx(expected)
    assert gains(found, 2).tolist() == pytest.approx([1 / gain(1, 2), gain(2) / gain(1, 2), 0, 0])
    # Precision at each hit: 1/1 and 2/4; 1/2 and 2/3; none; 1/3.
    expected = [(1 + 2 / 4) / 2, (1 / 2 + 2 / 3) / 3, 0, (1 / 3) / 6]
    assert average_precisions(found, 4).tolist() == pytest.approx(expected)
    expected = [1 / 2, (1 / 2) / 3, 0, 0]
    assert average_precisions(found, 2).tolist() == pytest.approx(expected)


def test_a_perfect_list_scores_one_but_map_and_recall_count_all_that_is_relevant():
    lists = np.array([[1, 2, 3], [4, 5, 6]])
    found = find_relevant(lists, items_of([3, 2, 1, 7, 8], [4]))
    for k in (1, 2, 3):
        assert gains(found, k).tolist() == pytest.approx([1, 1])
        assert average_precisions(found, k).tolist() == pytest.approx([k / 5, 1])
    assert recalls(found, 3).tolist() == pytest.approx([3 / 5, 1])


@given(
    hnp.arrays(np.int64, (7, 6), elements=st.integers(0, 9)),
    hnp.arrays(np.int64, 7, elements=st.integers(0, 9)),
    st.integers(1, 6),
)
def test_one_relevant_item_equals_the_metrics_of_a_target(keys, target, k):
    lists = np.argsort(np.hstack([keys, keys[:, :4]]), axis=1, kind="stable")[:, :6]
    rank, found = (
        target_rank(lists, target),
        find_relevant(lists, items_of(*target[:, None].tolist())),
    )
    single = RelevantRanks.of_targets(rank)
    for name in ("row", "rank", "n_relevant"):
        assert getattr(found, name).tolist() == getattr(single, name).tolist()
    assert found.first().tolist() == rank.tolist()
    for metric in (hits, gains, reciprocal_ranks, recalls, average_precisions):
        assert metric(found, k).tolist() == metric(rank, k).tolist()
    assert recalls(rank, k).tolist() == hits(rank, k).tolist()
    assert average_precisions(rank, k) == pytest.approx(reciprocal_ranks(rank, k))
    expected = [1 / math.log2(r + 1) if 0 < r <= k else 0 for r in rank.tolist()]
    assert gains(rank, k) == pytest.approx(expected)


distinct = st.lists(st.integers(0, 8), unique=True, max_size=4)


@given(st.lists(st.tuples(distinct, distinct.filter(bool)), min_size=1, max_size=5), st.data())
def test_find_relevant_equals_a_loop(rows, data):
    lists, expected = np.full((len(rows), 5), -1), []
    for i, (items, relevant) in enumerate(rows):
        places = sorted(data.draw(st.permutations(range(5)))[: len(items)])
        lists[i, places] = items  # gaps are unknown items
        expected += [(i, j + 1) for j, item in zip(places, items, strict=True) if item in relevant]
    found = find_relevant(lists, items_of(*[relevant for _, relevant in rows]))
    assert list(zip(found.row.tolist(), found.rank.tolist(), strict=True)) == expected
    assert found.n_relevant.tolist() == [len(relevant) for _, relevant in rows]


@pytest.mark.parametrize(
    ("relevant", "message"),
    [
        ([[1]], "2 lists, but relevant items for 1 rows"),
        ([[1], []], "row 1 has no relevant item"),
        ([[1], [2, -1]], "outside the catalogue"),
        ([[1], [2, 3, 2]], "a relevant item twice"),
    ],
)
def test_wrong_relevant_items_raise(relevant, message):
    with pytest.raises(ValueError, match=message):
        find_relevant(np.array([[1, 2], [3, 4]]), items_of(*relevant))
    with pytest.raises(ValueError, match="hold an item twice"):
        find_relevant(np.array([[1, 1]]), items_of([1]))


# Semantic ids shared by items. --------------------------------------------------------------------

SIDS = np.array([0, 0, 1, 2, 2, 2])  # items 0 and 1 share one, 3, 4 and 5 another


def credit(lists: list[list[int]], target: list[int], k: int) -> list[float]:
    return shared_sid_credit(np.array(lists), np.array(target), SIDS, k).tolist()


def test_shared_sid_credit_by_hand():
    # The item itself; another item of its SID; a SID of its own; a SID that was not named.
    lists = [[0, 2], [0, 2], [2, 0], [2, 0]]
    assert credit(lists, [0, 1, 2, 4], 1) == [1 / 2, 1 / 2, 1, 0]
    assert credit([[2, 5]], [3], 1) == [0] and credit([[2, 5]], [3], 2) == [1 / 3]


def test_a_repeated_sid_takes_one_place_and_an_empty_slot_takes_its_own():
    # Distinct SIDs of the list: 2, 0, 1.
    assert credit([[3, 4, 5, 1, 2]], [0], 1) == [0]
    assert credit([[3, 4, 5, 1, 2]], [0], 2) == [1 / 2]
    assert credit([[3, 4, 5, 1, 2]], [2], 2) == [0]
    assert credit([[3, 4, 5, 1, 2]], [2], 3) == [1]
    assert credit([[-1, 1, -1, 2]], [2], 3) == [0]
    assert credit([[-1, 1, -1, 2]], [2], 4) == [1]


@given(hnp.arrays(np.int64, (5, 6), elements=st.integers(0, 9)), st.integers(1, 6), st.data())
def test_with_a_sid_per_item_the_credit_is_the_hit_rate(keys, k, data):
    lists = np.argsort(keys, axis=1, kind="stable")
    lists[data.draw(hnp.arrays(bool, lists.shape))] = -1
    target = data.draw(hnp.arrays(np.int64, 5, elements=st.integers(0, 5)))
    sids = np.array(data.draw(st.permutations(range(6))))
    expected = hits(target_rank(lists, target), k)
    assert shared_sid_credit(lists, target, sids, k).tolist() == expected.tolist()


def test_shared_sid_credit_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="holds 6, but the catalogue has 6 items"):
        credit([[6]], [0], 1)
    with pytest.raises(ValueError, match="k=2 must be between"):
        credit([[1]], [0], 2)
    with pytest.raises(ValueError, match="hold an item twice"):
        credit([[1, 1]], [0], 1)


# How exposure spreads. ----------------------------------------------------------------------------


def test_gini_by_hand():
    assert exposures(LISTS, 10, 2).tolist() == [0, 1, 1, 0, 1, 1, 0, 1, 1, 1]
    uniform = np.array([[0, 1], [2, 3]])
    assert gini_at_k(uniform, 4, 2) == pytest.approx(0)
    assert gini_at_k(np.array([[2], [2], [2]]), 4, 1) == pytest.approx(3 / 4)
    # Exposure 0, 1, 3: mean absolute difference over all ordered pairs, over twice the mean.
    lists = np.array([[2, -1], [2, 1], [2, -1]])
    pairs = sum(abs(a - b) for a in (0, 1, 3) for b in (0, 1, 3))
    assert gini_at_k(lists, 3, 2) == pytest.approx(pairs / (2 * 3**2 * (4 / 3)))
    assert gini_at_k(lists, 3, 1) == pytest.approx(2 / 3)  # k counts
    assert math.isnan(gini_at_k(np.full((2, 2), -1), 3, 2))
    with pytest.raises(ValueError, match="k=3 must be"):
        gini_at_k(lists, 3, 3)
    with pytest.raises(ValueError, match="n_items=0"):
        gini_at_k(np.full((2, 2), -1), 0, 2)
