"""Indexes without vectors: random, sequential, collaborative, independent, semantic, hybrid."""

from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.item_lists import ItemLists
from genrec.quantizers import item_indexes as module
from genrec.quantizers import neighbours
from genrec.quantizers.item_indexes import (
    ItemCodes,
    _co_occurrence,
    collaborative_index,
    draw_free,
    hybrid_index,
    independent_index,
    next_codes,
    random_index,
    semantic_index,
    sequential_index,
    with_spare,
)

PATHS = [["Hats", "Wool"], ["Hats", "Felt"], ["Pots", "Wool"], None, ["Hats", "Wool"], ["Hats"]]


def lists(*rows: list[int]) -> ItemLists:
    return ItemLists.from_column(pl.Series(rows, dtype=pl.List(pl.Int32)))


def check(index: ItemCodes, n_items: int) -> None:
    """Distinct rows, inside their codebooks, of one length."""
    assert index.codes.dtype == np.int32
    assert index.codes.shape == (n_items, len(index.codebook_sizes))
    assert (index.codes >= 0).all() and (index.codes < np.array(index.codebook_sizes)).all()
    assert len(np.unique(index.codes, axis=0)) == n_items


def check_extended(index: ItemCodes, new: np.ndarray) -> ItemCodes:
    both = ItemCodes(np.concatenate([index.codes, new]), index.codebook_sizes)
    check(both, len(index.codes) + len(new))
    return both


# --- random ---------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 4), st.integers(2, 7), st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_random_sids_are_distinct_or_refused(n_items: int, n_levels: int, size: int, seed: int):
    if n_items > size**n_levels:
        with pytest.raises(ValueError, match=f"{n_items} items don't fit into the"):
            random_index(n_items, n_levels, size, seed)
        return
    index = random_index(n_items, n_levels, size, seed)
    check(index, n_items)
    n_new = min(3, size**n_levels - n_items)
    check_extended(index, next_codes("random", index.codes, index.codebook_sizes, n_new, seed))
    with pytest.raises(ValueError, match="don't fit"):
        next_codes("random", index.codes, index.codebook_sizes, size**n_levels - n_items + 1)


def test_random_sids_fill_a_whole_space_and_a_huge_one():
    assert (np.unique(random_index(64, 3, 4, 0).codes, axis=0) == list(np.ndindex(4, 4, 4))).all()
    for n_levels in (6, 64):  # 2^48 and 2^512 SIDs
        index = random_index(3_000, n_levels, 256, 1)
        check(index, 3_000)
        assert all(len(np.unique(index.codes[:, level])) == 256 for level in range(n_levels))
    assert (random_index(9, 6, 256, 1).codes != random_index(9, 6, 256, 2).codes).any()
    assert (random_index(9, 6, 256, 1).codes == random_index(9, 6, 256, 1).codes).all()


@pytest.mark.parametrize(("size", "n"), [(8, 3), (100, 20)])  # free SIDs listed; drawn and checked
def test_draws_are_uniform_over_the_free_sids(size: int, n: int):
    rng = np.random.default_rng(0)
    taken = np.array([[0], [2]], dtype=np.int32)
    counts = np.zeros(size)
    for _ in range(1_000):
        drawn = draw_free(rng, n, (size,), taken)
        assert len(np.unique(drawn)) == n
        counts[drawn.ravel()] += 1
    assert counts[0] == counts[2] == 0
    assert np.delete(counts, [0, 2]) == pytest.approx(1_000 * n / (size - 2), rel=0.3)


# --- sequential -----------------------------------------------------------------------------------


def test_sequential_numbers_items_as_histories_first_show_them():
    index = sequential_index(lists([3, 1, 3], [], [1, 0]), 6, codebook_size=2, spare=0)
    assert index.codebook_sizes == (2, 2, 2)  # 6 items need 3 binary digits
    assert index.codes[[3, 1, 0]].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert sorted(index.codes[[2, 4, 5]].tolist()) == [[0, 1, 1], [1, 0, 0], [1, 0, 1]]
    new = next_codes("sequential", index.codes, index.codebook_sizes, 2)
    assert sorted(new.tolist()) == [[1, 1, 0], [1, 1, 1]]
    with pytest.raises(ValueError, match=r"3 items don't fit into the 2 free SIDs.*`spare`"):
        next_codes("sequential", index.codes, index.codebook_sizes, 3)


def test_sequential_spare_adds_a_level_and_unseen_items_have_no_catalogue_order():
    assert sequential_index(lists([0]), 256, spare=0).codebook_sizes == (256,)
    assert sequential_index(lists([0]), 256, spare=0.1).codebook_sizes == (256, 256)
    numbers = sequential_index(lists([0]), 100, seed=3).codes[:, 0]
    assert numbers[0] == 0 and (np.diff(numbers[1:]) != 1).any()
    assert (numbers == sequential_index(lists([0]), 100, seed=3).codes[:, 0]).all()
    assert (numbers != sequential_index(lists([0]), 100, seed=4).codes[:, 0]).any()


def test_sequential_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="5 items don't fit into the 4 free SIDs"):
        sequential_index(lists([0]), 5, codebook_size=2, n_levels=2)
    with pytest.raises(ValueError, match=r"items 1\.\.7; the catalogue has 0\.\.5"):
        sequential_index(lists([1, 7]), 6)
    with pytest.raises(ValueError, match="codebook_size=1 at least 2"):
        sequential_index(lists([0]), 5, codebook_size=1)


# --- independent ----------------------------------------------------------------------------------


def test_independent_is_one_token_an_item():
    index = independent_index(30)
    assert index.codes.tolist() == [[i] for i in range(30)]
    assert index.codebook_sizes == (33,)
    new = next_codes("independent", index.codes, index.codebook_sizes, 3)
    assert new.tolist() == [[30], [31], [32]]
    with pytest.raises(ValueError, match=r"4 items don't fit into the 3 free .*`spare`"):
        next_codes("independent", index.codes, index.codebook_sizes, 4)


def test_spare_is_rounded_up_but_not_by_floating_point():
    assert [with_spare(n, 0.1) for n in (1, 10, 11, 70)] == [2, 11, 13, 77]
    assert with_spare(100, 0.07) == 107  # 100 * .07 = 7.000000000000001
    assert with_spare(5, 0) == 5
    for spare in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="spare="):
            with_spare(5, spare)
    with pytest.raises(ValueError, match="n_items=0"):
        independent_index(0)


# --- collaborative --------------------------------------------------------------------------------


def blocks(n_blocks: int, size: int) -> ItemLists:
    """Sequences of all pairs inside blocks of consecutive items, and one between neighbours."""
    pairs = [
        [b * size + i, b * size + j]
        for b in range(n_blocks)
        for i, j in itertools.combinations(range(size), 2)
    ] * 2
    return lists(*pairs, *([b * size, b * size + size] for b in range(n_blocks - 1)))


def test_collaborative_prefixes_are_the_blocks_of_the_graph():
    index = collaborative_index(blocks(4, 6), 26, branching=4, leaf_size=6, spare=0.5)
    check(index, 26)
    prefix = index.codes[:24, 0].reshape(4, 6)
    assert (prefix == prefix[:, :1]).all() and sorted(prefix[:, 0].tolist()) == [1, 2, 3, 4]
    assert (np.sort(index.codes[:24, 1].reshape(4, 6)) == np.arange(6)).all()
    # Items 24 and 25 are never bought: the branch 0, with 13 spare numbers for 26 items.
    assert index.codes[24:, 0].tolist() == [0, 0]
    assert index.codebook_sizes == (5, 15)
    new = next_codes("collaborative", index.codes, index.codebook_sizes, 13)
    check_extended(index, new)
    assert sorted(new.tolist()) == [[0, number] for number in range(2, 15)]
    with pytest.raises(ValueError, match="14 items don't fit into the 13 free SIDs"):
        next_codes("collaborative", index.codes, index.codebook_sizes, 14)


def test_collaborative_recurses_into_large_clusters_only():
    # Two far blocks: one of 12 items that is two blocks itself, one of 4.
    near = [[i, j] for b in (0, 6) for i, j in itertools.combinations(range(b, b + 6), 2)] * 4
    small = [[i, j] for i, j in itertools.combinations(range(12, 16), 2)] * 4
    bridge = [[i, i + 6] for i in range(4)]
    index = collaborative_index(lists(*near, *small, *bridge), 16, 2, 6, max_levels=3, spare=0)
    check(index, 16)
    assert index.codebook_sizes == (3, 3, 6)
    codes = index.codes
    assert len(np.unique(codes[:12, 0])) == 1 and codes[12, 0] != codes[0, 0]
    assert len(np.unique(codes[:6, 1])) == len(np.unique(codes[6:12, 1])) == 1
    assert {int(codes[0, 1]), int(codes[6, 1])} == {1, 2}
    assert (codes[12:, 1] == 0).all()  # small enough at once: padded


def test_links_count_sequences_not_purchases():
    graph = _co_occurrence(lists([0, 0, 1, 0], [1, 0], [2, 2], []), 3)
    assert graph.toarray().tolist() == [[0, 2, 0], [2, 0, 0], [0, 0, 0]]
    assert graph.nnz == 2


def test_the_graph_keeps_strong_links_where_all_would_be_too_many(monkeypatch: pytest.MonkeyPatch):
    # 0 and 1 meet three times, 0 and 2 twice, 2 and 3 once: with one link an item 0 keeps 1, and 2
    # keeps 0, which links 0 to it, too.
    sequences = lists([0, 1], [0, 1], [0, 1], [0, 2], [0, 2], [2, 3])
    monkeypatch.setattr(module, "_LINKS", 4)
    linked = _co_occurrence(sequences, 4).toarray()
    assert linked.tolist() == [[0, 3, 2, 0], [3, 0, 0, 0], [2, 0, 0, 1], [0, 0, 1, 0]]
    monkeypatch.setattr(module, "_LINKS", 8)
    for rows in (1, 65_536):  # blocks change nothing
        monkeypatch.setattr(neighbours, "_PAIR_ROWS", rows)
        assert (_co_occurrence(sequences, 4).toarray() == linked).all()
    dense = lists(*np.random.default_rng(0).integers(0, 30, (50, 8)).tolist())
    monkeypatch.setattr(module, "_LINKS", 30 * 4)
    graph = _co_occurrence(dense, 30)
    assert graph.nnz <= 2 * 30 * 4 and abs(graph - graph.T).nnz == 0
    assert (np.diff(graph.indptr) >= 4).all()


def test_collaborative_stops_at_max_levels_and_says_so(caplog: pytest.LogCaptureFixture):
    index = collaborative_index(blocks(1, 30), 30, branching=2, leaf_size=4, max_levels=2)
    check(index, 30)
    assert len(index.codebook_sizes) == 2 and index.codebook_sizes[1] > 4
    assert "raise max_levels" in caplog.text


@given(st.integers(0, 1_000))
@settings(deadline=None, max_examples=15)
def test_collaborative_on_any_graph(seed: int):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 40, rng.integers(1, 5)).tolist() for _ in range(rng.integers(5, 60))]
    sequences = lists(*rows, [0, 1])
    index = collaborative_index(sequences, 60, branching=3, leaf_size=5, max_levels=4, seed=seed)
    check(index, 60)
    again = collaborative_index(sequences, 60, branching=3, leaf_size=5, max_levels=4, seed=seed)
    assert (index.codes == again.codes).all()
    assert (index.codes[40:, 0] == 0).all() and (index.codes[:2, 0] > 0).all()
    new = next_codes("collaborative", index.codes, index.codebook_sizes, 6)
    both = check_extended(index, new)
    check_extended(both, next_codes("collaborative", both.codes, both.codebook_sizes, 0))
    hybrid = hybrid_index(index)
    check(hybrid, 60)
    check_extended(hybrid, next_codes("hybrid", hybrid.codes, hybrid.codebook_sizes, 6))


def test_collaborative_refuses_a_graph_without_links():
    with pytest.raises(ValueError, match="nothing to cluster"):
        collaborative_index(lists([0], [1, 1]), 3)
    with pytest.raises(ValueError, match="branching=1"):
        collaborative_index(lists([0, 1]), 3, branching=1)
    few = collaborative_index(lists([0, 1]), 3)  # fewer linked items than a leaf holds
    check(few, 3)
    assert few.codes[:, 0].tolist() == [1, 1, 0]


# --- semantic and hybrid --------------------------------------------------------------------------


def test_semantic_follows_the_category_tree():
    index = semantic_index(PATHS, 6, spare=0.5)
    # Hats 1, Pots 2; Felt 1, Wool 2 under either; the last token counts inside the category.
    assert index.codes[:, :2].tolist() == [[1, 2], [1, 1], [2, 2], [0, 0], [1, 2], [1, 0]]
    assert sorted(index.codes[[0, 4], 2].tolist()) == [0, 1]
    assert index.codes[[1, 2, 3, 5], 2].tolist() == [0, 0, 0, 0]
    assert index.codebook_sizes == (3, 3, 3)  # two in the largest category, and one spare
    check(index, 6)
    assert semantic_index(PATHS, 6, 0.5, max_depth=1).codes[:, 0].tolist() == [1, 1, 2, 0, 1, 1]


def test_semantic_places_new_items_in_their_category():
    index = semantic_index(PATHS, 6, spare=0.5)
    later = [["Hats", "Wool"], ["Pots", "Felt"], ["Hats", "Silk"], ["Lamps", "Wool"], ["", "Wool"]]
    paths = [*PATHS, *later]
    new = next_codes("semantic", index.codes, index.codebook_sizes, 5, categories=paths)
    # Silk is unknown, so the path ends at Hats; Lamps too, and what is below it doesn't count.
    assert new[:3].tolist() == [[1, 2, 2], [2, 1, 0], [1, 0, 1]]
    assert sorted(new[3:].tolist()) == [[0, 0, 1], [0, 0, 2]]
    both = check_extended(index, new)
    # The names that the index doesn't know stay unknown when it is extended again.
    more = [["Hats", "Silk"], ["Pots"]]
    again = next_codes("semantic", both.codes, both.codebook_sizes, 2, categories=[*paths, *more])
    assert again.tolist() == [[1, 0, 2], [2, 0, 0]]
    with pytest.raises(ValueError, match=r"\(0, 0\) has used its 3 numbers.*`spare`"):
        next_codes("semantic", both.codes, both.codebook_sizes, 1, categories=[*paths, None])


def test_semantic_refuses_other_categories_than_its_own():
    index = semantic_index(PATHS, 6)
    renamed = [["Pots", "Wool"], *PATHS[1:]]
    for wrong, message in [
        (None, "needs `categories`"),
        (PATHS, "6 category paths were given; 6 old and 1 new"),
        ([*renamed, None], "doesn't belong to code 2 of level 0"),
        ([["Caps", "Wool"], *PATHS[1:], None], "several names have one code on level 0"),
        ([["Hats"], *PATHS[1:], None], "doesn't belong to code 2 of level 1"),
        (["Hats", *PATHS[1:], None], "'Hats' is text"),
    ]:
        with pytest.raises(ValueError, match=message):
            next_codes("semantic", index.codes, index.codebook_sizes, 1, categories=wrong)
    with pytest.raises(ValueError, match="no item has a category"):
        semantic_index([None, [], [""]], 3)
    with pytest.raises(ValueError, match="6 category paths were given for 5"):
        semantic_index(PATHS, 5)
    with pytest.raises(ValueError, match="max_depth=0"):
        semantic_index(PATHS, 6, max_depth=0)


def test_hybrid_replaces_the_number_by_an_item_token():
    semantic = semantic_index(PATHS, 6)
    index = hybrid_index(semantic, spare=0.5)
    check(index, 6)
    assert index.codebook_sizes == (3, 3, 9)
    assert (index.codes[:, :2] == semantic.codes[:, :2]).all()
    assert index.codes[:, 2].tolist() == [0, 1, 2, 3, 4, 5]
    paths = [*PATHS, ["Pots", "Felt"], None]
    new = next_codes("hybrid", index.codes, index.codebook_sizes, 2, categories=paths)
    assert new.tolist() == [[2, 1, 6], [0, 0, 7]]
    assert next_codes("hybrid", index.codes, index.codebook_sizes, 1).tolist() == [[0, 0, 6]]
    with pytest.raises(ValueError, match=r"don't fit into the 3 free .*`spare`"):
        next_codes("hybrid", index.codes, index.codebook_sizes, 4)
    with pytest.raises(ValueError, match="one level"):
        hybrid_index(independent_index(4))


def test_next_codes_refuses_hostile_input():
    codes = np.array([[0, 0], [0, 0]])
    for kind, given_codes, n_new, message in [
        ("tiger", codes[:1], 1, "kind='tiger' is none of"),
        ("random", codes, 1, "old codes be there and distinct"),
        ("random", codes[:1], -1, "n_new=-1"),
        ("random", codes[:0], 1, "old codes be there"),
        ("random", codes[:1] + 5, 1, "outside its codebook"),
        ("random", codes[:1, :1], 1, "shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            next_codes(kind, given_codes, (2, 2), n_new)
    for kind in ("random", "sequential", "collaborative", "hybrid"):
        assert next_codes(kind, codes[:1], (2, 2), 0).shape == (0, 2)
    assert next_codes("semantic", codes[:1], (2, 2), 0, categories=[None]).shape == (0, 2)


def test_numbers_inside_a_group_do_not_follow_the_catalogue():
    """Catalogues are often numbered by first interaction, which would tell what comes next."""
    categories = [["a"]] * 400 + [["b"]] * 400
    codes = semantic_index(categories, 800).codes
    assert sorted(codes[:400, 1].tolist()) == list(range(400))
    neighbours = np.diff(codes[:, 1]) == 1  # .25% by chance
    assert neighbours.mean() < 0.02
    assert not (semantic_index(categories, 800, seed=1).codes == codes).all()


@pytest.mark.parametrize("kind", ["sequential", "collaborative", "semantic"])
def test_numbers_of_later_items_do_not_follow_their_catalogue(kind: str):
    old = np.array([[0, 1], [0, 0]], dtype=np.int32)
    categories = [None] * 402 if kind == "semantic" else None
    new = next_codes(kind, old, (9, 500), 400, categories=categories)
    assert (np.sort(new[:, 1]) == np.arange(2, 402)).all() and not new[:, 0].any()
    assert (np.diff(new[:, 1]) == 1).mean() < 0.02
    again = next_codes(kind, old, (9, 500), 400, categories=categories)
    assert (again == new).all()
    both = np.concatenate([old, new])
    last = next_codes(kind, both, (9, 500), 1, categories=categories and [*categories, None])
    assert last.tolist() == [[0, 402]]  # a batch after a batch: nothing moves
