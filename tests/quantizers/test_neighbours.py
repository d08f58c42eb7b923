"""Neighbours by vector and by users in common, and how much of them prefixes keep."""

from __future__ import annotations

import numpy as np
import pytest

from genrec.item_lists import ItemLists, no_items
from genrec.metrics import EMPTY
from genrec.quantizers import neighbours as module
from genrec.quantizers.neighbours import (
    Neighbours,
    co_purchases,
    nearest_vectors,
    neighbour_preservation,
    pair_preservation,
    prefix_groups,
)


def lists(*rows: list[int]) -> ItemLists:
    return ItemLists(
        np.array([i for row in rows for i in row], dtype=np.int64),
        np.cumsum([0, *map(len, rows)]),
    )


def by_sorting(vectors: np.ndarray, k: int) -> np.ndarray:
    """The same by one dense matrix."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    return np.argsort(-cosine, axis=1)[:, :k]


def test_nearest_vectors_equal_a_dense_search_across_blocks(monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(200, 8))
    whole = nearest_vectors(vectors, 5)
    np.testing.assert_array_equal(whole.nearest, by_sorting(vectors, 5))
    np.testing.assert_array_equal(whole.items, np.arange(200))
    monkeypatch.setattr(module, "_INDEX_ROWS", 7)  # the last block holds fewer than k
    monkeypatch.setattr(module, "_QUERY_ROWS", 11)
    np.testing.assert_array_equal(nearest_vectors(vectors, 5).nearest, whole.nearest)


def test_cosine_ignores_length_and_zero_vectors():
    vectors = np.array([[1, 0], [100, 1], [0, 0], [1e-30, 2e-30], [0, 1e30]], dtype=np.float32)
    found = nearest_vectors(vectors, 2)
    assert found.items.tolist() == [0, 1, 3, 4]
    assert found.nearest.tolist() == [[1, 3], [0, 3], [4, 1], [3, 1]]


def test_fewer_items_than_neighbours_are_padded():
    found = nearest_vectors(np.eye(3, dtype=np.float32) + 0.1, 4)
    assert (found.nearest == EMPTY).sum(axis=1).tolist() == [2, 2, 2]
    assert nearest_vectors(np.zeros((3, 2)), 2).items.tolist() == []
    alone = nearest_vectors(np.ones((1, 2)), 2)
    assert alone.nearest.tolist() == [[EMPTY, EMPTY]]


def test_equal_vectors_are_neighbours_and_an_item_is_never_its_own():
    vectors = np.ones((30, 4), dtype=np.float32)
    found = nearest_vectors(vectors, 5)
    assert not (found.nearest == found.items[:, None]).any()
    assert (found.nearest != EMPTY).all()
    assert all(len(set(row)) == 5 for row in found.nearest.tolist())


def test_large_catalogues_are_sampled(monkeypatch):
    vectors = np.random.default_rng(1).normal(size=(60, 6))
    monkeypatch.setattr(module, "ALL_QUERIES_ITEMS", 50)
    monkeypatch.setattr(module, "SAMPLED_QUERIES", 20)
    found, again = nearest_vectors(vectors, 3, seed=4), nearest_vectors(vectors, 3, seed=4)
    assert found.sampled and len(found.items) == 20
    np.testing.assert_array_equal(found.items, again.items)
    assert found.items.tolist() != nearest_vectors(vectors, 3, seed=5).items.tolist()
    np.testing.assert_array_equal(found.nearest, by_sorting(vectors, 3)[found.items])
    asked = nearest_vectors(vectors, 3, queries=np.array([7, 2]))
    assert asked.items.tolist() == [2, 7] and not asked.sampled


@pytest.mark.parametrize(
    ("vectors", "settings", "words"),
    [
        (np.ones((3, 2)), {"k": 0}, "k=0 must be at least 1"),
        (np.ones((3, 2)), {"queries": np.array([1, 3])}, "between 1 and 3; they are rows of the 3"),
        (np.array([[1.0, 1.0], [1.0, np.nan]]), {}, "the first is row 1"),
        (np.ones(3), {}, "shape"),
    ],
)
def test_bad_input_is_named(vectors, settings, words):
    with pytest.raises(ValueError, match=words):
        nearest_vectors(vectors, **settings)


def test_co_purchases_by_hand():
    # Users in common: 0-1: 2, 0-2: 2 (user 3's item 2 counts once), 1-2: 1, 2-3: 1; 4 is alone.
    found = co_purchases(lists([0, 1], [0, 1, 2], [], [2, 2, 0], [2, 3], [4]), 6, k=2)
    assert found.items.tolist() == [0, 1, 2, 3]
    assert found.nearest.tolist() == [[1, 2], [0, 2], [0, 1], [2, EMPTY]]  # ties: the lower index


def test_co_purchases_in_blocks_equal_the_dense_product(monkeypatch):
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, 40, rng.integers(0, 9)).tolist() for _ in range(80)]
    sequences = lists(*rows)
    held = (sequences.matrix(41).toarray() > 0).astype(int)
    counts = held.T @ held
    np.fill_diagonal(counts, 0)
    expected = [
        sorted((i for i in range(41) if row[i]), key=lambda i, row=row: (-row[i], i))[:4]
        for row in counts
    ]
    for pairs, block in ((20_000_000, 65_536), (30, 65_536), (20_000_000, 3)):
        monkeypatch.setattr(module, "_PAIRS", pairs)
        monkeypatch.setattr(module, "_PAIR_ROWS", block)
        found = co_purchases(sequences, 41, k=4)
        known = [[i for i in row if i != EMPTY] for row in found.nearest.tolist()]
        assert found.items.tolist() == [i for i, best in enumerate(expected) if best]
        assert known == [best for best in expected if best]


def test_nothing_was_bought_together():
    assert len(co_purchases(no_items(3), 5).items) == 0
    assert co_purchases(lists([1], [2]), 5, k=3).nearest.shape == (0, 3)
    with pytest.raises(ValueError, match="items 1 to 5; the catalogue's rows are 0 to 4"):
        co_purchases(lists([1, 5]), 5)
    with pytest.raises(ValueError, match="k=0"):
        co_purchases(lists([1, 2]), 5, k=0)


def test_prefix_groups_split_and_never_join():
    codes = np.array([[1, 5], [0, 5], [1, 5], [1, 7]])
    assert prefix_groups(codes).T.tolist() == [[1, 0, 1, 1], [1, 0, 1, 2]]
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 3, (50, 6))
    for level, group in enumerate(prefix_groups(codes).T):
        same = (codes[:, None, : level + 1] == codes[None, :, : level + 1]).all(axis=2)
        np.testing.assert_array_equal(group[:, None] == group[None], same)
    wide = np.array([[2**31 - 1] * 3, [0] * 3, [2**31 - 1, 0, 1]])  # no overflow
    assert prefix_groups(wide).T.tolist() == [[1, 0, 1], [2, 0, 1], [2, 0, 1]]


def test_preservation_by_hand():
    codes = np.array([[0, 0], [0, 1], [0, 0], [1, 0]])
    neighbours = Neighbours(
        np.array([0, 1, 3]), np.array([[2, 3], [0, EMPTY], [EMPTY, EMPTY]]), sampled=True
    )
    found = neighbour_preservation(codes, neighbours)
    # Item 0: 1 of 2 and 1 of 2; item 1: 1 of 1 and 0 of 1; item 3 has none.
    assert found["same_code"] == [0.75, 0.25]
    assert found["items"] == 2
    # 3 of 6 pairs share the first code, 1 of 6 both.
    assert found["chance"] == [0.5, pytest.approx(1 / 6)]
    assert found["lift"] == [1.5, pytest.approx(1.5)]


def test_chance_is_what_random_neighbours_reach():
    rng = np.random.default_rng(5)
    codes = np.stack([rng.zipf(1.6, 400) % 9, rng.integers(0, 3, 400)], axis=1)
    shift = rng.integers(1, 400, (400, 50))
    random = Neighbours(np.arange(400), (np.arange(400)[:, None] + shift) % 400)
    found = neighbour_preservation(codes, random)
    assert found["same_code"] == pytest.approx(found["chance"], abs=0.02)


def test_no_neighbours_and_no_pairs_give_none():
    empty = Neighbours(np.empty(0, np.int64), np.empty((0, 10), np.int64))
    found = neighbour_preservation(np.array([[0, 1]]), empty)
    assert found["same_code"] == [None, None] and found["chance"] == [0.0, 0.0]
    assert found["lift"] == [None, None]
    distinct = neighbour_preservation(
        np.array([[0], [1]]), Neighbours(np.arange(2), np.array([[1], [0]]))
    )
    assert distinct["same_code"] == [0.0] and distinct["lift"] == [None]
    assert pair_preservation(np.array([[0]]), [], [])["same_code"] == [None]


def test_pairs_by_hand():
    codes = np.array([[0, 0], [0, 1], [1, 0]])
    found = pair_preservation(codes, [0, 0, 2, 1], [1, 2, 2, 0])
    # The pair (2, 2) is left out: of (0, 1), (0, 2), (1, 0) two share the first code.
    assert found["pairs"] == 3
    assert found["same_code"] == [pytest.approx(2 / 3), 0.0]
    # Of the 9 combinations of {0, 0, 1} and {1, 2, 0}, three are of an item with itself;
    # of the 6 others 3 share the first code: 0-1 twice and 1-0.
    assert found["chance"] == [0.5, 0.0]
    assert found["lift"] == [pytest.approx(4 / 3), None]
    with pytest.raises(ValueError, match="items 0 to 3"):
        pair_preservation(codes, [0], [3])
    with pytest.raises(ValueError, match="shapes"):
        pair_preservation(codes, [0, 1], [1])


def test_the_published_index_of_letter(genrec_data):
    """LETTER's Beauty index keeps .395 of the cosine and .141 of the co-purchase neighbours."""
    import json
    import re

    folder = genrec_data / "amazon2014-beauty"
    index = json.loads((folder / "letter_sids.json").read_text())
    codes = np.array([[int(re.sub(r"\D", "", t)) for t in index[str(i)]] for i in range(12_101)])
    vectors = np.load(folder / "minilm_embeddings.npy")
    users = [line.split()[1:] for line in (folder / "sequences.txt").read_text().splitlines()]
    train = lists(*[[int(item) - 1 for item in items[:-2]] for items in users])
    near = neighbour_preservation(codes, nearest_vectors(vectors))
    bought = neighbour_preservation(codes, co_purchases(train, len(codes)))
    assert near["same_code"][0] == pytest.approx(0.395, abs=0.001)
    assert bought["same_code"][0] == pytest.approx(0.141, abs=0.001)
