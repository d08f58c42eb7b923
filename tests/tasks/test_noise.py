"""Draws: functions of (row_id, seed), independent for each purpose, never of the target."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from genrec.tasks.noise import (
    CANDIDATE,
    KEEP,
    NOISE,
    TEXT_CHOICE,
    ItemDraw,
    add_candidates,
    add_noise,
    keep_about,
    uniform,
)

N_ITEMS = 12
PINNED = [[0.568169, 0.309111], [0.871912, 0.382174]]
HISTORIES = st.lists(
    st.lists(st.integers(0, N_ITEMS - 1), min_size=1, max_size=30), min_size=1, max_size=8
)


def table(histories: list[list[int]], targets: list[int] | None = None) -> pl.DataFrame:
    targets = [0] * len(histories) if targets is None else targets
    lists = pl.List(pl.Int32)
    return pl.DataFrame(
        {
            "row_id": [f"train-{i:06}#1" for i in range(len(histories))],
            "history": pl.Series(histories, dtype=lists),
            "targets": pl.Series([[t] for t in targets], dtype=lists),
        }
    )


def many(n: int) -> pl.Series:
    return pl.Series([f"train-{i:06}" for i in range(n)])


def test_uniform_numbers_are_pinned():
    """A change of the draw would change everybody's data."""
    numbers = uniform(pl.Series(["train-000000", "train-000001#2"]), 0, 2, KEEP)
    assert numbers.shape == (2, 2)
    assert numbers.round(6).tolist() == PINNED
    assert (uniform(pl.Series(["train-000001#2"]), 0, 3, KEEP)[0, :2] == numbers[1]).all()


def test_uniform_numbers_are_uniform_and_independent():
    n = 20_000
    columns = {
        (purpose, seed, k): uniform(many(n), seed, 2, purpose)[:, k]
        for purpose in (KEEP, TEXT_CHOICE, CANDIDATE, NOISE)
        for seed in (0, 1)
        for k in (0, 1)
    }
    for values in columns.values():
        assert ((values >= 0) & (values < 1)).all()
        assert stats.kstest(values, "uniform").pvalue > 1e-4
    every = np.corrcoef(np.stack(list(columns.values())))
    assert np.abs(every - np.eye(len(every))).max() < 5 / np.sqrt(n)


def test_keep_about():
    assert keep_about(many(20_000), 0, 0.3).mean() == pytest.approx(0.3, abs=0.02)
    assert not keep_about(many(50), 0, 0).any() and keep_about(many(50), 0, 1).all()
    few, more = keep_about(many(500), 3, 0.1), keep_about(many(500), 3, 0.4)
    assert (more | ~few).all()  # a larger share holds the smaller one


def test_items_by_popularity():
    draw = ItemDraw(np.array([0, 1, 16, 0]), power=0.5)  # weights 0, 1, 4, 0
    assert draw.items(np.array([[0.0, 0.19], [0.21, 0.999999]])).tolist() == [[1, 1], [2, 2]]
    assert ItemDraw(np.array([0, 5, 1]), power=0).items(np.array([0.49, 0.51])).tolist() == [1, 2]
    # Nothing was trained: all alike.
    assert ItemDraw(np.zeros(4, dtype=int)).items(np.array([0.1, 0.3, 0.6, 0.8])).tolist() == [
        0, 1, 2, 3,
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, N_ITEMS - 1), min_size=1, max_size=20), st.integers(1, 10))
def test_candidates_hold_the_target_once(targets: list[int], n: int):
    rows = table([[1]] * len(targets), targets)
    draw = ItemDraw(np.arange(N_ITEMS))
    made = add_candidates(rows, draw, n, 0)
    for target, candidates in zip(targets, made["candidates"].to_list(), strict=True):
        assert candidates.count(target) == 1
        assert len(set(candidates)) == len(candidates) <= n
        assert set(candidates) - {target} <= set(range(1, N_ITEMS))  # item 0 was never trained
    assert made.drop("candidates").equals(rows)


def test_the_target_stands_anywhere_among_the_candidates():
    n = 4_000
    rows = pl.DataFrame({"row_id": many(n), "targets": [[0]] * n})
    made = add_candidates(rows, ItemDraw(np.full(10_000, 1)), 5, 0)["candidates"]
    places = made.list.eval((pl.element() == 0).arg_true()).list.first()
    assert stats.chisquare(np.bincount(places, minlength=5)).pvalue > 1e-4


def test_other_candidates_do_not_depend_on_the_target():
    rows = table([[1]] * 200, [3] * 200)
    draw = ItemDraw(np.ones(1000, dtype=int))
    one = add_candidates(rows, draw, 6, 0)["candidates"].to_list()
    rows = table([[1]] * 200, [7] * 200)
    two = add_candidates(rows, draw, 6, 0)["candidates"].to_list()
    same = sum([x for x in a if x != 3] == [x for x in b if x != 7]
               for a, b in zip(one, two, strict=True))  # fmt: skip
    assert same >= 195  # but for rows that drew a 3 or a 7


@settings(max_examples=100, deadline=None)
@given(HISTORIES, st.integers(0, 5))
def test_noise_is_foreign_and_the_history_is_whole(histories: list[list[int]], seed: int):
    made = add_noise(table(histories), N_ITEMS, seed)
    for history, shown, aside in made.select("history", "shown", "set_aside").iter_rows():
        assert not set(aside) & set(history)
        assert len(set(aside)) == len(aside) <= min(4, max(1, round(0.2 * len(history))))
        assert [item for item in shown if item not in aside] == history
        assert [item for item in shown if item in aside] == aside
        assert set(aside) <= set(range(N_ITEMS))


def test_how_much_noise_and_where():
    n, length = 4_000, 10
    rows = pl.DataFrame({"row_id": many(n), "history": [list(range(length))] * n})
    made = add_noise(rows, 100_000, 0)
    assert (made["set_aside"].list.len() == 2).mean() > 0.99  # a fifth of ten
    place = made["shown"].list.eval((pl.element() >= length).arg_true()).list.first()
    own_before = np.bincount(place, minlength=length + 1)
    assert own_before[0] > 0 and own_before[length - 1] > 0  # from the beginning to the end
    last = made["shown"].list.last() >= length
    assert 0.1 < last.mean() < 0.25  # 1 - (10/11)^2 = 0.17
    items = made["set_aside"].explode().to_numpy()
    assert stats.kstest(items / 100_000, "uniform").pvalue > 1e-4  # all items alike
    long = pl.DataFrame({"row_id": ["a", "b"], "history": [list(range(100)), [1, 2, 3]]})
    assert add_noise(long, 100_000, 0)["set_aside"].list.len().to_list() == [4, 1]


def test_a_history_of_all_items_leaves_nothing_foreign():
    made = add_noise(table([list(range(N_ITEMS))]), N_ITEMS, 0)
    assert made["set_aside"].to_list() == [[]] and made["shown"].to_list() == [list(range(N_ITEMS))]


@settings(max_examples=30, deadline=None)
@given(HISTORIES, st.integers(0, 3), st.randoms(use_true_random=False))
def test_draws_depend_on_the_row_and_the_seed_alone(histories, seed: int, random):
    rows = table(histories, [h[0] for h in histories])
    draw = ItemDraw(np.arange(1, N_ITEMS + 1))

    def drawn(part: pl.DataFrame) -> pl.DataFrame:
        return add_noise(add_candidates(part, draw, 5, seed), N_ITEMS, seed)

    order = list(range(len(rows)))
    random.shuffle(order)
    assert drawn(rows[order]).equals(drawn(rows)[order])
    assert drawn(rows[1:]).equals(drawn(rows)[1:])
    assert drawn(rows[:1]).equals(drawn(rows)[:1])


def test_seeds_draw_anew():
    rows = table([[1, 2, 3]] * 50, [4] * 50)
    draw = ItemDraw(np.ones(N_ITEMS, dtype=int))
    for column in ("candidates", "shown"):
        one, two = (
            add_noise(add_candidates(rows, draw, 5, seed), N_ITEMS, seed)[column].to_list()
            for seed in (0, 1)
        )
        assert sum(a != b for a, b in zip(one, two, strict=True)) > 25


def test_no_rows():
    made = add_noise(add_candidates(table([]), ItemDraw(np.ones(3, dtype=int)), 5, 0), 3, 0)
    assert len(made) == 0 and made.schema["shown"] == made.schema["candidates"] == pl.List(pl.Int32)
