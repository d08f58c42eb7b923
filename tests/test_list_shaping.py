"""Shaping of candidate lists: by hand, by properties, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.list_shaping import (
    Candidates,
    Cap,
    boosted,
    capped,
    category_at,
    label_weights,
    numbered,
    title_groups,
    without_similar,
    without_variants,
)
from genrec.metrics import check_lists

ITEMS = np.array([[4, 0, 2, 5, 1], [3, 1, -1, -1, -1]])
SCORES = np.array([[-1.0, -2.0, -2.5, -3.0, -9.0], [-0.5, -0.75, 0, 0, 0]], dtype=np.float32)


@pytest.fixture
def lists() -> Candidates:
    return Candidates.of(ITEMS, SCORES)


def test_a_search_is_taken_as_it_is(lists: Candidates):
    assert (lists.items == ITEMS).all()
    assert lists.scores[1].tolist() == [-0.5, -0.75, *[-np.inf] * 3]  # padding holds no score
    assert (lists.keys == lists.scores).all()
    assert lists.places.tolist() == [[0, 1, 2, 3, 4], [0, 1, -1, -1, -1]]
    assert (lists.items.dtype, lists.scores.dtype) == (np.int64, np.float32)


def test_lists_in_another_order_are_sorted_and_ties_keep_their_places():
    got = Candidates.of(np.array([[7, -1, 3, 5]]), np.array([[-2.0, -np.inf, -1.0, -2.0]]))
    assert got.items.tolist() == [[3, 7, 5, -1]]
    assert got.places.tolist() == [[2, 0, 3, -1]]


def test_top_by_hand(lists: Candidates):
    top = lists.top(3)
    assert top.items.tolist() == [[4, 0, 2], [3, 1, -1]]
    assert top.scores[0].tolist() == [-1.0, -2.0, -2.5]
    assert lists.top(5).items.shape == (2, 5)


def test_boosts_by_hand(lists: Candidates):
    weights = np.array([0.0, 6.5, 0.5, 0.0, 0.0, 1.0])  # 2 ties with 0 and 5, all at −2
    got = boosted(lists, weights)
    assert got.items.tolist() == [[4, 0, 2, 5, 1], [1, 3, -1, -1, -1]]
    assert got.keys[0].tolist() == [-1.0, -2.0, -2.0, -2.0, -2.5]
    assert got.keys[1, :2].tolist() == [5.75, -0.5]
    # Scores go with their items, unchanged.
    assert got.scores[0].tolist() == [-1.0, -2.0, -2.5, -3.0, -9.0]
    assert got.scores[1, :2].tolist() == [-0.75, -0.5]
    assert got.places[1, :2].tolist() == [1, 0]
    assert (boosted(got, -weights).items == lists.items).all()


def test_caps_by_hand(lists: Candidates):
    kind = np.array([0, 1, 0, 1, 0, -1])  # 4 0 2 are of kind 0, 5 has none, 1 and 3 are of kind 1
    assert capped(lists, [Cap(kind, 2)]).items.tolist() == [[4, 0, 5, 1, -1], [3, 1, -1, -1, -1]]
    one = capped(lists, [Cap(kind, 1)])
    assert one.items.tolist() == [[4, 5, 1, -1, -1], [3, -1, -1, -1, -1]]
    assert one.scores[0, :3].tolist() == [-1.0, -3.0, -9.0]
    assert one.places[0].tolist() == [0, 3, 4, -1, -1]
    assert np.isneginf(one.keys[0, 3:]).all()


def test_an_item_that_one_cap_drops_takes_no_place_in_another():
    lists = Candidates.of(np.array([[0, 1, 2]]), np.array([[-1.0, -2.0, -3.0]]))
    kind, brand = np.array([0, 0, 1]), np.array([0, 1, 1])
    # 1 falls to the kind's cap, so 2 is the brand's first.
    both = capped(lists, [Cap(kind, 1), Cap(brand, 1)])
    assert both.items.tolist() == [[0, 2, -1]]
    assert capped(lists, [Cap(brand, 1), Cap(kind, 1)]).items.tolist() == [[0, 2, -1]]
    # One after the other it would be lost: the second cap sees what the first has left.
    assert capped(capped(lists, [Cap(brand, 1)]), [Cap(kind, 1)]).items.tolist() == [[0, -1, -1]]
    assert (capped(lists, []).items == lists.items).all()


def test_variants_by_title(lists: Candidates):
    titles = pl.Series(
        ["Red  Wool Hat", "tea pot", "red wool-hat!", None, "RED WOOL HAT (L)", "ＲＥＤ wool hat"]
    )
    groups = title_groups(titles)
    assert groups.tolist() == [0, 1, 0, -1, 2, 0]  # full-width letters fold, a size stays
    assert without_variants(lists, groups).items.tolist() == [
        [4, 0, 1, -1, -1],
        [3, 1, -1, -1, -1],
    ]
    assert title_groups(pl.Series(["", "!!!", None, "Ä b", "ä  B", "a b"])).tolist() == [
        -1, -1, -1, 0, 0, 1,
    ]  # fmt: skip
    assert title_groups(pl.Series(["한국", "日本", "日本。"])).tolist() == [0, 1, 1]
    assert title_groups(pl.Series([], dtype=pl.String)).tolist() == []
    assert title_groups(pl.Series([None, None])).tolist() == [-1, -1]


def test_what_a_title_says_of_the_variant_can_be_ignored():
    titles = pl.Series(["Acme Hat, Red", "acme hat , BLUE", "Acme Hat", "Hat, Acme, red", ", red"])
    assert title_groups(titles).tolist() == [0, 1, 2, 3, 4]
    assert title_groups(titles, ",[^,]*$").tolist() == [0, 0, 0, 1, -1]
    with pytest.raises(ValueError, match=r"ignore='\[' is no regular expression"):
        title_groups(titles, "[")


def test_similar_items_by_hand(lists: Candidates):
    angle = np.deg2rad([0, 90, 20, 90, 40, 60])
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.arange(1, 7)[:, None]
    # 4 (40°) drops 2 (20°) and 5 (60°) at cos 20° = .94; 0 (0°) and 1 (90°) are far from it.
    got = without_similar(lists, vectors, 0.93)
    assert got.items.tolist() == [[4, 0, 1, -1, -1], [3, -1, -1, -1, -1]]
    # Greedy from the top: 2 resembles 0 as well, and 5, which is dropped, drops nothing.
    assert without_similar(lists, vectors, 0.95).items.tolist() == [
        [4, 0, 2, 5, 1],
        [3, -1, -1, -1, -1],
    ]
    zero = without_similar(lists, np.zeros((6, 2)), 0.5)
    assert (zero.items == lists.items).all()


def test_what_is_dropped_drops_nothing():
    lists = Candidates.of(np.array([[0, 1, 2]]), np.array([[-1.0, -2.0, -3.0]]))
    angle = np.deg2rad([0, 30, 60])  # 1 is near both, 0 and 2 are apart
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    assert without_similar(lists, vectors, 0.8).items.tolist() == [[0, 2, -1]]


def test_many_rows_are_done_in_blocks(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    items = np.stack([rng.permutation(40)[:12] for _ in range(50)])
    lists = Candidates.of(items, rng.normal(size=items.shape))
    vectors = rng.normal(size=(40, 3))
    whole = without_similar(lists, vectors, 0.6)
    monkeypatch.setattr("genrec.list_shaping._BLOCK_CELLS", 12 * 12 * 7)
    assert (without_similar(lists, vectors, 0.6).items == whole.items).all()
    assert (whole.items == -1).any() and (whole.items[:, 1] >= 0).all()


def test_numbers_and_weights_of_labels():
    labels, names = numbered(pl.Series(["b", None, "a", "b", ""]))
    assert (labels.tolist(), names) == ([0, -1, 1, 0, -1], ["b", "a"])
    assert label_weights(labels, names, {"a": 0.7}).tolist() == [0, 0, 0.7, 0, 0]
    assert label_weights(labels, names, {"b": -1.0, "a": 0.5}).tolist() == [-1, 0, 0.5, -1, 0]
    assert numbered(pl.Series([3, 3, 1]))[1] == ["3", "1"]
    assert numbered(pl.Series([], dtype=pl.String))[1] == []
    categories = pl.Series([["Shop", "Tea"], ["Shop"], None, [], ["Shop", "Hats", "Wool"]])
    assert category_at(categories, 1).to_list() == ["Tea", None, None, None, "Hats"]
    assert category_at(categories, -1).to_list() == ["Tea", "Shop", None, None, "Wool"]


# Properties.


@st.composite
def problems(draw: st.DrawFn) -> tuple[Candidates, np.random.Generator, int]:
    n_items, n, m = draw(st.integers(1, 30)), draw(st.integers(1, 5)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    items = np.full((n, m), -1)
    for row in items:
        length = rng.integers(1, min(m, n_items) + 1)
        row[:length] = rng.permutation(n_items)[:length]
    scores = -rng.integers(0, 6, (n, m)) / 4.0  # ties abound
    return Candidates.of(items, scores), rng, n_items


def check(shaped: Candidates, source: Candidates) -> None:
    """What every step promises."""
    check_lists(shaped.items)
    real = shaped.items >= 0
    assert (np.diff(real.astype(int), axis=1) <= 0).all()  # padding at the end
    keys = np.where(real, shaped.keys, np.nan)
    assert not (np.diff(keys, axis=1) > 0).any()
    assert (np.isneginf(shaped.scores) == ~real).all()
    assert (np.isneginf(shaped.keys) == ~real).all()
    assert ((shaped.places == -1) == ~real).all()
    for row in range(len(real)):
        score = dict(zip(source.items[row], source.scores[row], strict=True))
        for item, own in zip(shaped.items[row][real[row]], shaped.scores[row], strict=False):
            assert own == score[item]


@given(problems(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None, max_examples=80)
def test_caps_hold_in_every_prefix_and_drop_no_more_than_they_must(
    problem: tuple, limit: int, other: int, kinds: int
):
    lists, rng, n_items = problem
    caps = [
        Cap(rng.integers(-1, kinds, n_items), limit),
        Cap(rng.integers(-1, kinds, n_items), other),
    ]
    got = capped(lists, caps)
    check(got, lists)
    for row in range(len(lists.items)):
        kept: list[int] = []
        for item in lists.items[row]:  # the rule, item by item
            full = [
                cap.labels[item] >= 0
                and sum(cap.labels[k] == cap.labels[item] for k in kept) >= cap.limit
                for cap in caps
            ]
            if item >= 0 and not any(full):
                kept.append(int(item))
        assert got.items[row][got.items[row] >= 0].tolist() == kept


@given(problems(), st.floats(-1, 0.99))
@settings(deadline=None, max_examples=60)
def test_no_two_similar_items_stay(problem: tuple, max_cosine: float):
    lists, rng, n_items = problem
    vectors = rng.normal(size=(n_items, 3)).astype(np.float32)
    got = without_similar(lists, vectors, max_cosine)
    check(got, lists)
    assert (got.items[:, 0] == lists.items[:, 0]).all()  # the best one always stays
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit.T
    for row in range(len(lists.items)):
        kept = got.items[row][got.items[row] >= 0]
        pairs = cosine[np.ix_(kept, kept)][np.triu_indices(len(kept), 1)]
        assert (pairs <= max_cosine + 1e-6).all()
        order = lists.items[row].tolist()
        for item in set(order) - set(kept) - {-1}:
            better = [k for k in kept if order.index(k) < order.index(item)]
            assert (cosine[item, better] > max_cosine - 1e-6).any()


@given(problems())
@settings(deadline=None, max_examples=60)
def test_boosts_order_by_score_and_weight(problem: tuple):
    lists, rng, n_items = problem
    weights = rng.integers(-3, 4, n_items) / 4.0
    got = boosted(lists, weights)
    check(got, lists)
    for row in range(len(lists.items)):
        real = lists.items[row] >= 0
        items, places = lists.items[row][real], lists.places[row][real]
        rank = sorted(
            range(len(items)),
            key=lambda i: (-(lists.scores[row][i] + weights[items[i]]), places[i]),
        )
        assert got.items[row][: len(items)].tolist() == [items[i] for i in rank]
    assert (boosted(lists, np.zeros(n_items)).items == lists.items).all()


def test_no_rows_and_no_candidates():
    none = Candidates.of(np.empty((0, 4), dtype=int), np.empty((0, 4)))
    assert capped(boosted(none, np.zeros(3)), [Cap(np.zeros(3, dtype=int), 1)]).top(
        2
    ).items.shape == (0, 2)
    assert without_similar(none, np.zeros((3, 2)), 0.5).items.shape == (0, 4)
    empty = Candidates.of(np.full((2, 3), -1), np.zeros((2, 3)))
    assert (without_similar(empty, np.ones((3, 2)), 0.5).items == -1).all()
    assert (capped(empty, [Cap(np.zeros(3, dtype=int), 1)]).items == -1).all()


# Refusals.


@pytest.mark.parametrize(
    ("items", "scores", "message"),
    [
        (np.array([[1, 1]]), np.zeros((1, 2)), "hold an item twice"),
        (np.array([[1, 2]]), np.zeros((1, 3)), r"scores has shape \(1, 3\), items \(1, 2\)"),
        (np.array([[1, 2]]), np.array([[0, np.nan]]), "item 2 of row 0 has score nan"),
        (np.array([[1, 2]]), np.array([[0, -np.inf]]), "item 2 of row 0 has score -inf"),
        (np.array([1, 2]), np.zeros(2), "must be an integer array"),
        (np.array([[1.0, 2.0]]), np.zeros((1, 2)), "must be an integer array"),
        (np.array([[1, -2]]), np.zeros((1, 2)), "holds -2"),
    ],
)
def test_lists_that_are_none(items: Any, scores: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Candidates.of(items, scores)


@pytest.mark.parametrize("k", [0, 6, -1])
def test_more_than_the_search_gave(lists: Candidates, k: int):
    with pytest.raises(ValueError, match=f"k={k} must lie between 1 and the 5 candidates"):
        lists.top(k)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, None])
def test_limits_that_are_none(limit: Any):
    with pytest.raises(ValueError, match="limit=.*filtered in the trie"):
        Cap(np.zeros(6, dtype=int), limit)


def test_arrays_that_do_not_fit_the_catalogue(lists: Candidates):
    with pytest.raises(ValueError, match="log_weights has 5 entries.*catalogue row 5"):
        boosted(lists, np.zeros(5))
    with pytest.raises(ValueError, match=r"log_weights has shape \(6, 1\)"):
        boosted(lists, np.zeros((6, 1)))
    for bad in (np.inf, -np.inf, np.nan):
        with pytest.raises(ValueError, match="log_weights must be finite"):
            boosted(lists, np.array([0, 0, 0, 0, bad, 0]))
    with pytest.raises(ValueError, match="log_weights must be finite numbers"):
        boosted(lists, np.array(["a"] * 6))
    with pytest.raises(ValueError, match="labels has 3 entries"):
        capped(lists, [Cap(np.zeros(3, dtype=int), 1)])
    with pytest.raises(ValueError, match="labels must be integers"):
        capped(lists, [Cap(np.zeros(6), 1)])
    with pytest.raises(ValueError, match="labels must be integers"):
        capped(lists, [Cap(np.full(6, -2), 1)])
    with pytest.raises(ValueError, match="recommended holds 5, but the catalogue has 4"):
        without_similar(lists, np.ones((4, 2)), 0.5)
    with pytest.raises(ValueError, match=r"vectors has shape \(6,\)"):
        without_similar(lists, np.ones(6), 0.5)
    with pytest.raises(ValueError, match="vectors holds NaN"):
        without_similar(lists, np.full((6, 2), np.nan), 0.5)
    for bad in (1.0, -1.5, np.nan):
        with pytest.raises(ValueError, match="max_cosine="):
            without_similar(lists, np.ones((6, 2)), bad)
    with pytest.raises(ValueError, match=r"kept has shape \(5,\)"):
        lists.keep(np.ones(5, dtype=bool))


def test_labels_that_do_not_exist():
    labels, names = numbered(pl.Series(["tea", "hats"]))
    with pytest.raises(ValueError, match="no item is labelled 'pots'"):
        label_weights(labels, names, {"pots": 1.0})
    with pytest.raises(ValueError, match=r"labels lie in 0..5; there are 2 names"):
        label_weights(np.array([0, 5]), names, {"tea": 1.0})
    with pytest.raises(ValueError, match="depth=3 is beyond every category path"):
        category_at(pl.Series([["a", "b"], None]), 3)
