"""Mixing: weights, curricula and caps by hand; every row before any comes back."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from genrec.tasks.mixing import OTHERS, check_weights, named_numbers, named_rows, plan


def tasks(**counts: int) -> pl.Series:
    """`a=3, b=2` -> a a a b b, mixed."""
    names = [name for name, n in counts.items() for _ in range(n)]
    order = np.random.default_rng(0).permutation(len(names))
    return pl.Series("task", [names[i] for i in order], dtype=pl.String)


def test_without_weights_an_epoch_is_every_row_once():
    made = plan(tasks(a=5, b=3), 3)
    assert made.length == 8 and made.n_epochs == 3
    for epoch in range(3):
        rows, rendered = made.slice(epoch)
        assert sorted(rows) == list(range(8))
        assert set(rendered) == {epoch}  # the next template in each epoch
    orders = {tuple(made.slice(e)[0]) for e in range(3)}
    assert len(orders) == 3  # each epoch has its own order


def test_weights_by_hand():
    table = tasks(a=8, b=4, c=6)
    made = plan(table, 2, {"a": [0.25], "b": [2], "c": [0]})
    assert made.counts(table) == [{"a": 2, "b": 8}, {"a": 2, "b": 8}]
    a = np.flatnonzero((table == "a").to_numpy())
    first, second = (set(made.slice(e)[0]) & set(a) for e in range(2))
    assert len(first) == len(second) == 2 and not first & second  # the next quarter
    b = np.flatnonzero((table == "b").to_numpy())
    for epoch in range(2):
        rows, rendered = made.slice(epoch)
        for row in b:  # twice, with two templates
            assert sorted(rendered[rows == row]) == [2 * epoch, 2 * epoch + 1]


def test_a_curriculum_by_hand():
    table = tasks(a=4, b=4)
    made = plan(table, 4, {"a": [1, 0.5, 0], "b": [0, 0.5, 1]})
    # Every epoch has four rows, so that slices are the epochs.
    assert made.counts(table) == [{"a": 4}, {"a": 2, "b": 2}, {"b": 4}, {"b": 4}]


def test_epochs_of_different_length_are_cut_into_equal_slices():
    table = tasks(a=6, b=6)
    made = plan(table, 2, {"b": [1, 0]})  # 12 rows, then 6
    assert made.length == 9
    assert sum(c.get("b", 0) for c in made.counts(table)) == 6
    assert sum(c["a"] for c in made.counts(table)) == 12
    assert (table.gather(made.rows[12:]) == "a").all()  # the second epoch is the plan's end
    odd = plan(tasks(a=3), 2, {"a": [1, 0.67]})  # 3 + 2 rows: the last one is dropped
    assert odd.length == 2 and len(odd.rows) == len(odd.epochs) == 4


def test_caps_by_hand():
    table = tasks(a=10, b=4)
    made = plan(table, 3, caps={"a": 4})
    assert made.counts(table) == [{"a": 4, "b": 4}] * 3
    seen = [set(made.slice(e)[0][np.isin(made.slice(e)[0], np.flatnonzero(table == "a"))])
            for e in range(3)]  # fmt: skip
    assert len(seen[0] | seen[1]) == 8 and len(seen[0] | seen[1] | seen[2]) == 10
    assert plan(table, 1, {"a": [0.1]}, {"a": 4}).counts(table) == [{"a": 1, "b": 4}]
    assert plan(table, 1, caps={"a": 0}).counts(table) == [{"b": 4}]


def test_others():
    table = tasks(a=4, b=4, c=4)
    assert plan(table, 1, {OTHERS: [0.5], "a": [1]}).counts(table) == [{"a": 4, "b": 2, "c": 2}]
    assert plan(table, 1, caps={OTHERS: 1, "b": 3}).counts(table) == [{"a": 1, "b": 3, "c": 1}]


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(0, 12),
    st.integers(1, 5),
    st.lists(st.floats(0, 3), min_size=1, max_size=4),
    st.integers(0, 9),
)
def test_every_row_is_seen_before_any_comes_back(n: int, m: int, n_epochs: int, weights, seed: int):
    table = tasks(a=n, b=m)
    course = [weights[min(e, len(weights) - 1)] for e in range(n_epochs)]
    assume(m or sum(round(w * n) for w in course) >= n_epochs)  # else there is nothing to plan
    made = plan(table, n_epochs, {"a": weights}, seed=seed)
    assert len(made.rows) == len(made.epochs) == made.length * n_epochs
    parts = [made.slice(e) for e in range(n_epochs)]
    assert {len(rows) for rows, _ in parts} == {made.length}
    assert np.array_equal(np.concatenate([rows for rows, _ in parts]), made.rows)
    # The template of a row that comes back is the next one: 0, 1, 2, …
    for row in set(made.rows):
        assert made.epochs[made.rows == row].tolist() == list(range((made.rows == row).sum()))
    for name in ("a", "b"):
        owned = np.flatnonzero((table == name).to_numpy())
        total = sum(round((w if name == "a" else 1) * len(owned)) for w in course)
        times = np.array([(made.rows == row).sum() for row in owned])
        dropped = n_epochs  # at most so many rows are cut off at the end
        assert total - dropped < times.sum() <= total or not len(owned)
        if len(owned):
            assert times.max() <= -(-total // len(owned))
            assert times.min() >= total // len(owned) - dropped


def test_a_plan_is_a_function_of_the_seed():
    table = tasks(a=50, b=50)
    one, two, other = plan(table, 2, seed=1), plan(table, 2, seed=1), plan(table, 2, seed=2)
    assert np.array_equal(one.rows, two.rows) and np.array_equal(one.epochs, two.epochs)
    assert not np.array_equal(one.rows, other.rows)


def test_families_lie_mixed():
    table = tasks(a=500, b=500)
    rows, _ = plan(table, 1).slice(0)
    is_a = (table.gather(rows) == "a").to_numpy()
    assert 30 < is_a[:100].sum() < 70


@pytest.mark.parametrize(
    ("weights", "caps", "match"),
    [
        ({"c": [1]}, {}, "weights name 'c', which the dataset doesn't have; it has a, b"),
        ({}, {"c": 3}, "weights name 'c'"),
        ({"a": [-1]}, {}, r"weights of 'a' are \[-1\]; they must be in \[0, 100\]"),
        ({"a": [-1]}, {"a": 3}, "weights of 'a'"),
        ({"a": [float("nan")]}, {}, "weights of 'a'"),
        ({"a": [1, 101]}, {}, "weights of 'a'"),
        ({"a": []}, {}, "weights of 'a'"),
        ({"a": [0], "b": [0]}, {}, "leave no rows to train on"),
        ({}, {"a": 0, "b": 0}, "leave no rows to train on"),
    ],
)
def test_what_cannot_make_a_plan(weights, caps, match: str):
    with pytest.raises(ValueError, match=match):
        plan(pl.Series("task", ["a", "b", "b"]), 1, weights, caps)
    if not caps and "no rows" not in match:
        with pytest.raises(ValueError, match=match):
            check_weights(weights, ["a", "b"])


def test_no_epochs():
    with pytest.raises(ValueError, match="n_epochs=0 must be at least 1"):
        plan(tasks(a=3), 0)


def test_settings():
    assert named_numbers("max_rows", []) == {}
    assert named_numbers("max_rows", ["title_to_sid=1000", "*=5"]) == {"title_to_sid": 1000, "*": 5}
    assert named_rows("weights", ["a=1", "b=1,0.5,0"]) == {"a": [1], "b": [1, 0.5, 0]}


@pytest.mark.parametrize(
    "values", [["a"], ["a="], ["a=x"], ["a=-1"], ["a=1", "a=2"], ["a=1,2"], ["a=nan"], ["a=inf"]]
)
def test_settings_that_say_nothing_clear(values: list[str]):
    with pytest.raises(ValueError, match="max_rows: .* should read family=number, each family"):
        named_numbers("max_rows", values)
    if "," not in values[0]:
        with pytest.raises(ValueError, match="family=number or family=number,number"):
            named_rows("max_rows", values)
