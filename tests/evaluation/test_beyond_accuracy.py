"""Novelty, popularity, diversity and calibration of a few lists, by hand."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest

from genrec.evaluation import beyond_accuracy
from genrec.evaluation.beyond_accuracy import (
    calibration,
    category_matrix,
    category_profile,
    history_popularity,
    intra_list_diversity,
    list_popularity,
    novelty,
)
from genrec.item_lists import ItemLists

COUNT = np.array([7, 3, 1, 0])  # of 7 users
LISTS = np.array([[0, 3], [-1, 2], [1, 0], [-1, -1]])


def lists_of(*rows: list[int]) -> ItemLists:
    return ItemLists.from_column(pl.Series(rows, dtype=pl.List(pl.Int32)))


def same(found: np.ndarray, expected: list[float]) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)  # NaN equals NaN


def test_novelty_is_self_information_in_bits():
    # Shares of users, +1: 8/8, 4/8, 2/8, 1/8: 0, 1, 2 and 3 bits.
    same(novelty(LISTS, COUNT, 7, 1), [0, math.nan, 1, math.nan])
    same(novelty(LISTS, COUNT, 7, 2), [1.5, 2, 0.5, math.nan])


def test_popularity_of_lists_and_histories():
    same(list_popularity(LISTS, COUNT, 2), [3.5, 1, 5, math.nan])
    same(list_popularity(LISTS, COUNT, 1), [7, math.nan, 3, math.nan])
    history = lists_of([0, 1, 1], [], [3])
    same(history_popularity(history, COUNT), [13 / 3, math.nan, 0])


def test_diversity_of_four_vectors_by_hand():
    vectors = np.array([[1.0, 0], [0, 2], [-3, 0], [1, 1]])
    lists = np.array([[0, 1, 2], [0, -1, 3], [0, -1, -1], [-1, -1, -1]])
    # Distances 0-1: 1, 0-2: 2, 1-2: 1; 0-3: 1 - 1/sqrt(2); one item makes no pair.
    same(intra_list_diversity(lists, vectors, 3), [4 / 3, 1 - math.sqrt(0.5), math.nan, math.nan])
    same(intra_list_diversity(lists, vectors, 2), [1, math.nan, math.nan, math.nan])


def test_diversity_equals_the_mean_over_pairs():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(30, 5))
    vectors[[3, 8]] = 0  # items without text have no vector, and are like no other item
    lists = np.argsort(rng.random((40, 30)), axis=1)[:, :6]
    lists[rng.random(lists.shape) < 0.3] = -1
    lists[0] = [3, 8, 1, -1, -1, -1]
    expected = []
    for row in lists:
        items = [vectors[i] / max(np.linalg.norm(vectors[i]), 1e-12) for i in row if i >= 0]
        pairs = [1 - a @ b for n, a in enumerate(items) for b in items[:n]]
        expected.append(np.mean(pairs) if pairs else math.nan)
    assert expected[0] == pytest.approx(1)
    np.testing.assert_allclose(intra_list_diversity(lists, vectors, 6), expected, atol=1e-6)


CATEGORIES = pl.Series([["a"], ["b"], ["a", "b", "a"], None, []], dtype=pl.List(pl.String))


def test_category_matrix_shares_an_item_among_its_categories():
    found = category_matrix(CATEGORIES).toarray()
    assert found.shape == (5, 2)
    columns = sorted(found.T.tolist(), reverse=True)  # the order of categories is free
    assert columns == [[1, 0, 0.5, 0, 0], [0, 1, 0.5, 0, 0]]


def test_category_matrix_without_any_category():
    none = pl.Series([None, []], dtype=pl.List(pl.String))
    assert category_matrix(none).shape == (2, 0)
    assert category_matrix(pl.Series([None, None], dtype=pl.List(pl.Null))).shape == (2, 0)
    found = mix_apart(np.array([[0], [1]]), lists_of([0], [1]), category_matrix(none), 1)
    assert np.isnan(found).all()


def mix_apart(lists, history, categories, k):
    return calibration(lists, category_profile(history, categories), categories, k)


def test_a_profile_is_the_mix_of_the_history():
    found = category_profile(lists_of([0, 0, 1], [3], []), category_matrix(CATEGORIES)).toarray()
    assert sorted(found[0]) == pytest.approx([1 / 3, 2 / 3])
    assert not found[1:].any()  # an item without a category; no item


def kl(p: list[float], q: list[float]) -> float:
    smoothed = [0.99 * b + 0.01 * a for a, b in zip(p, q, strict=True)]
    return sum(a * math.log(a / b) for a, b in zip(p, smoothed, strict=True) if a)


def test_calibration_by_hand():
    lists = np.array([[0, 1], [1, -1], [2, 0], [3, 4], [-1, -1], [0, 1], [3, 1]])
    history = lists_of([0, 1], [0], [0, 0, 1], [0], [0], [], [3, 1])
    expected = [
        0,  # half and half, as the history
        kl([1, 0], [0, 1]),  # nothing of the user's category: log 100
        kl([2 / 3, 1 / 3], [3 / 4, 1 / 4]),
        *[math.nan] * 3,  # a list without category or item, a history without item
        0,  # items without category count for neither
    ]
    found = mix_apart(lists, history, category_matrix(CATEGORIES), 2)
    same(found, expected)
    assert found[1] == pytest.approx(math.log(100))
    # The first place alone.
    same(
        mix_apart(lists, history, category_matrix(CATEGORIES), 1)[:3],
        [kl([0.5, 0.5], [1, 0]), math.log(100), kl([2 / 3, 1 / 3], [0.5, 0.5])],
    )


def test_blocks_of_rows_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    lists = np.argsort(rng.random((57, 20)), axis=1)[:, :4]
    lists[rng.random(lists.shape) < 0.4] = -1
    history = lists_of(*[rng.integers(0, 20, n).tolist() for n in rng.integers(0, 5, 57)])
    count, vectors = rng.integers(0, 9, 20), rng.normal(size=(20, 3))
    kinds = pl.Series([[f"c{i % 4}"] if i % 5 else [] for i in range(20)])

    def values() -> np.ndarray:
        return np.stack(
            [
                novelty(lists, count, 9, 4),
                list_popularity(lists, count, 4),
                intra_list_diversity(lists, vectors, 4),
                mix_apart(lists, history, category_matrix(kinds), 4),
            ]
        )

    whole = values()
    assert np.isnan(whole).any(axis=1).all() and (~np.isnan(whole)).any(axis=1).all()
    for cells in (1, 4, 41):  # one row, one row, ten rows a block
        monkeypatch.setattr(beyond_accuracy, "_BLOCK_CELLS", cells)
        np.testing.assert_allclose(values(), whole, atol=1e-7)


def test_items_outside_the_catalogue_and_wrong_k_raise():
    history, vectors = lists_of([0], [0], [0], [0]), np.eye(3)
    for call in (
        lambda k: novelty(LISTS, COUNT[:3], 7, k),
        lambda k: list_popularity(LISTS, COUNT[:3], k),
        lambda k: intra_list_diversity(LISTS, vectors, k),
        lambda k: mix_apart(LISTS, history, category_matrix(CATEGORIES[:3]), k),
    ):
        with pytest.raises(ValueError, match="holds 3, but the catalogue has 3 items"):
            call(2)
    with pytest.raises(ValueError, match="k=3 must be between 1 and the list length 2"):
        novelty(LISTS, COUNT, 7, 3)
