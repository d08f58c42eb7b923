"""Lists from item-to-item weights: dense and sparse weights against a plain loop."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.evaluation import profiles
from genrec.evaluation.profiles import (
    best_entries,
    decayed_profiles,
    places,
    recommend_by_similarity,
)
from genrec.item_lists import ItemLists, no_items


def lists_of(*rows: list[int]) -> ItemLists:
    return ItemLists.from_column(pl.Series(rows, dtype=pl.List(pl.Int32)))


def expected_list(
    weights: np.ndarray,
    order: np.ndarray,
    history: list[int],
    seen: list[int],
    k: int,
    decay: float,
    self_weight: float,
) -> list[int]:
    """The obvious way: score every item, sort all, the more popular one first among equals."""
    scores = np.zeros(len(order))
    for age, item in enumerate(reversed(history)):
        scores += decay**age * weights[item]
        scores[item] += decay**age * self_weight
    place = {item: i for i, item in enumerate(order.tolist())}
    free = [item for item in range(len(order)) if item not in seen]
    ranked = sorted(free, key=lambda item: (-scores[item], place[item]))[:k]
    return ranked + [-1] * (k - len(ranked))


items = st.lists(st.integers(0, 7), max_size=5)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(items, st.lists(st.integers(0, 7), unique=True)), min_size=1, max_size=4),
    st.integers(1, 9),
    st.sampled_from([0.5, 1.0]),
    st.sampled_from([0.0, 2.0]),
    st.integers(0, 99),
)
def test_dense_and_sparse_weights_equal_a_loop(rows, k, decay, self_weight, seed):
    rng = np.random.default_rng(seed)
    # Halves, quarters and zeros: sums are exact, and many are equal.
    weights = rng.choice([0, 0, 0, 0.25, 0.5, 1], (8, 8))
    order = rng.permutation(8)
    history, seen = lists_of(*[h for h, _ in rows]), lists_of(*[s for _, s in rows])
    expected = [expected_list(weights, order, h, s, k, decay, self_weight) for h, s in rows]
    for given_weights in (weights, sp.csr_matrix(weights)):
        found = recommend_by_similarity(given_weights, order, history, seen, k, decay, self_weight)
        assert found.tolist() == expected


def test_dense_and_sparse_agree_across_batches(monkeypatch):
    rng = np.random.default_rng(2)
    weights = rng.random((50, 50)) * (rng.random((50, 50)) < 0.2)
    history = lists_of(*[rng.integers(0, 50, n).tolist() for n in rng.integers(0, 6, 130)])
    order = rng.permutation(50)
    arguments = (order, history, history, 7, 0.8)
    dense = recommend_by_similarity(weights, *arguments)
    monkeypatch.setattr(profiles, "BATCH_ROWS", 32)
    for given_weights in (weights, sp.csr_matrix(weights), weights.astype(np.float64).copy()):
        assert (recommend_by_similarity(given_weights, *arguments) == dense).all()


def test_an_empty_history_gets_the_order_and_not_the_first_indices():
    order = np.random.default_rng(0).permutation(100)
    for weights in (np.zeros((100, 100)), sp.csr_matrix((100, 100))):
        found = recommend_by_similarity(weights, order, lists_of([], [3]), no_items(2), 5, 0.5)
        assert found.tolist() == [order[:5].tolist()] * 2


def test_negative_weights_rank_below_items_without_any():
    weights = np.array([[0, -1, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=np.float32)
    found = recommend_by_similarity(
        weights, np.array([1, 2, 0, 3]), lists_of([0]), lists_of([0]), 3, 1.0
    )
    assert found.tolist() == [[3, 2, 1]]


def test_profiles_decay_from_the_last_item_and_sum_repeats():
    found = decayed_profiles(lists_of([0, 1, 0], [], [2]), 3, 0.5).toarray()
    assert found.tolist() == [[1.25, 0.5, 0], [0, 0, 0], [0, 0, 1]]


def test_best_entries_keep_ties_at_the_edge_by_order():
    tie = places(np.array([3, 1, 0, 2]))
    assert tie.tolist() == [2, 1, 3, 0]
    scores = sp.csr_matrix(np.array([[1.0, 1, 1, 1], [0, 3, 0, 1], [0, 0, 0, 0]]))
    scores.data[-1] = -np.inf  # banned
    row, place, column, value = best_entries(scores, tie, 2)
    assert row.tolist() == [0, 0, 1] and place.tolist() == [0, 1, 0]
    assert column.tolist() == [3, 1, 1] and value.tolist() == [1, 1, 3]


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix])
def test_a_used_up_catalogue_leaves_empty_slots(kind):
    weights = kind(np.ones((3, 3)))
    found = recommend_by_similarity(
        weights, np.arange(3), lists_of([0], [1]), lists_of([0, 1, 2], [1]), 4, 1.0
    )
    assert found.tolist() == [[-1] * 4, [0, 2, -1, -1]]
