"""The table: values, seeds, paired differences, metrics beyond accuracy, and what is printed."""

from __future__ import annotations

import io
import math

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from genrec.evaluation.beyond_accuracy import category_matrix
from genrec.evaluation.comparison import (
    compare,
    compare_ranks,
    comparison_table,
    describe_difference,
)
from genrec.evaluation.row_values import ItemFacts, compare_values
from genrec.item_lists import ItemLists
from genrec.metrics import RelevantRanks, find_relevant

TARGET = np.tile(np.array([0, 1]), 100)
GOOD = np.column_stack([TARGET, TARGET + 2])  # always rank 1
POOR = np.column_stack([TARGET + 2, TARGET])  # always rank 2
MISS = np.full((200, 2), -1)


def items_of(*rows: list[int]) -> ItemLists:
    return ItemLists.from_column(pl.Series(rows, dtype=pl.List(pl.Int64)))


def comparison(reference="poor", **more):
    systems = {"good": [GOOD], "poor": [POOR], "miss": [MISS]}
    return compare(systems, TARGET, 10, [1, 2], reference, permutations=999, **more)


def test_metrics_and_paired_differences():
    found = comparison()
    assert found.metrics["good"]["NDCG@2"].value == 1
    assert found.metrics["poor"]["HR@1"].value == 0
    assert found.metrics["poor"]["NDCG@2"].value == pytest.approx(1 / math.log2(3))
    assert found.metrics["poor"]["MRR@2"].value == 0.5
    assert found.metrics["good"]["coverage@1"].value == 0.2
    assert found.metrics["good"]["coverage@2"].value == 0.4
    assert found.metrics["good"]["coverage@2"].low is None
    assert found.metrics["miss"]["coverage@2"].value == 0
    assert found.metrics["good"]["gini@2"].value == pytest.approx(0.6)  # 4 of 10 items, evenly
    assert "gini@2" not in found.metrics["miss"]  # nothing is shown
    assert [run.first().tolist() for run in found.ranks["poor"]] == [[2] * 200]
    difference = found.differences["good"]["NDCG@2"]
    assert difference.value == pytest.approx(1 / math.log2(3) - 1) == difference.high
    assert difference.p == pytest.approx(1 / 1000)
    assert difference.p_holm == pytest.approx(2 / 1000)  # two systems are compared with it
    same = found.differences["miss"]["HR@1"]
    assert (same.value, same.low, same.high, same.p, same.p_holm) == (0, 0, 0, 1, 1)
    assert set(found.differences) == {"good", "miss"}
    assert comparison(None).differences == {}


def test_without_facts_there_is_accuracy_coverage_and_gini_alone():
    names = {"HR", "NDCG", "MRR", "coverage", "gini"}
    expected = {f"{name}@{k}" for name in names for k in (1, 2)}
    assert set(comparison().metrics["good"]) == expected


def test_recall_and_map_appear_with_several_relevant_items():
    lists = np.array([[0, 1, 2], [3, 4, 5]] * 20)
    relevant = items_of(*([[0, 2], [4]] * 20))
    found = compare({"one": [lists]}, relevant, 6, [2])
    metrics = found.metrics["one"]
    assert metrics["HR@2"].value == 1
    assert metrics["Recall@2"].value == pytest.approx((1 / 2 + 1) / 2)
    assert metrics["MAP@2"].value == pytest.approx((1 / 2 + 1 / 2) / 2)
    gain = 1 / (1 + 1 / math.log2(3))
    assert metrics["NDCG@2"].value == pytest.approx((gain + 1 / math.log2(3)) / 2)
    single = compare({"one": [lists]}, items_of(*([[0], [4]] * 20)), 6, [2])
    assert "Recall@2" not in single.metrics["one"] and "MAP@2" not in single.metrics["one"]


# Several training seeds. --------------------------------------------------------------------------


def runs_of(n_seeds: int, rates: list[float], n_rows: int = 400) -> list[np.ndarray]:
    """Lists that hit in the first `rate` of the rows."""
    target = np.zeros(n_rows, dtype=np.int64)
    return [np.where(np.arange(n_rows) < rate * n_rows, target, 1)[:, None] for rate in rates]


def test_the_value_is_the_mean_over_seeds_and_each_is_kept():
    found = compare({"ours": runs_of(3, [0.2, 0.3, 0.7])}, np.zeros(400, dtype=int), 2, [1])
    hit_rate = found.metrics["ours"]["HR@1"]
    assert hit_rate.value == pytest.approx(0.4)
    assert hit_rate.seeds == pytest.approx((0.2, 0.3, 0.7))
    assert found.metrics["ours"]["coverage@1"].seeds == (1, 1, 1)
    assert len(found.ranks["ours"]) == 3


def test_the_spread_of_seeds_widens_the_interval():
    target = np.zeros(400, dtype=int)
    systems = {"steady": runs_of(3, [0.4, 0.4, 0.4]), "shaky": runs_of(3, [0.2, 0.4, 0.6])}
    metrics = compare(systems, target, 2, [1]).metrics
    steady, shaky = (metrics[name]["HR@1"] for name in ("steady", "shaky"))
    assert steady.value == shaky.value == pytest.approx(0.4)
    assert steady.half_width == pytest.approx(1.96 * math.sqrt(0.24 / 400), rel=0.1)
    # Standard deviation of a mean of three seeds drawn from .2, .4, .6: .094.
    assert shaky.half_width > 3 * steady.half_width


def test_seeds_of_two_systems_are_not_paired():
    target = np.zeros(400, dtype=int)
    rates = [0.2, 0.4, 0.6]
    systems = {"ours": runs_of(3, rates), "theirs": runs_of(3, rates)}
    difference = compare(systems, target, 2, [1], "ours", permutations=99).differences["theirs"]
    # Were seed i compared with seed i, the interval would be a point.
    assert difference["HR@1"].value == 0 and difference["HR@1"].low < -0.15
    assert difference["HR@1"].high > 0.15 and difference["HR@1"].p == 1


def test_a_difference_that_hangs_on_the_seed_is_not_significant():
    """For the models at hand it is beyond doubt; another training might turn it round."""
    target = np.zeros(400, dtype=int)
    theirs = runs_of(1, [0.3])
    for rates, certain in (([0.35, 0.36, 0.37], True), ([0.05, 0.36, 0.67], False)):
        found = compare(
            {"ours": runs_of(3, rates), "theirs": theirs}, target, 2, [1], "ours", permutations=999
        ).differences["theirs"]["HR@1"]
        assert found.value == pytest.approx(0.06)
        assert (found.p < 0.01) == certain == (found.low > 0)


def test_users_of_two_systems_are_paired():
    rng = np.random.default_rng(0)
    target = np.zeros(2000, dtype=int)
    easy = rng.random(2000) < 0.5
    better = easy | (rng.random(2000) < 0.02)
    systems = {"ours": [np.where(better, 0, 1)[:, None]], "theirs": [np.where(easy, 0, 1)[:, None]]}
    found = compare(systems, target, 2, [1], "ours", permutations=999)
    difference = found.differences["theirs"]["HR@1"]
    assert difference.value == pytest.approx((better & ~easy).mean())
    assert 0 < difference.low < difference.value < difference.high and difference.p < 0.01
    assert found.metrics["ours"]["HR@1"].half_width > difference.value  # unpaired, it would drown


def test_rows_of_a_user_are_drawn_together():
    target = np.zeros(400, dtype=int)
    lists = np.repeat(np.arange(20) % 2, 20)[:, None]  # twenty users with twenty equal rows
    alone = compare({"ours": [lists]}, target, 2, [1]).metrics["ours"]["HR@1"]
    groups = np.repeat(np.arange(20), 20)
    together = compare({"ours": [lists]}, target, 2, [1], groups=groups).metrics["ours"]["HR@1"]
    assert together.value == alone.value == 0.5
    assert together.half_width > 3 * alone.half_width


def test_ranks_may_be_given_as_arrays_or_as_found_items():
    lists = np.array([[0, 1], [1, 0], [1, 2]])
    found = find_relevant(lists, items_of([0], [0], [0]))
    from_arrays = compare_ranks({"a": np.array([[1, 2, 0], [1, 2, 0]])}, [1, 2])
    from_found = compare_ranks(
        {"a": [found, RelevantRanks.of_targets(np.array([1, 2, 0]))]}, [1, 2]
    )
    assert from_arrays.metrics == from_found.metrics
    assert from_arrays.metrics["a"]["HR@1"].value == pytest.approx(1 / 3)


def test_systems_with_other_rows_are_refused():
    with pytest.raises(ValueError, match="scored on the same rows; found numbers of rows"):
        compare_ranks({"a": np.ones((1, 3), int), "b": np.ones((1, 4), int)}, [1])
    with pytest.raises(ValueError, match="same rows"):
        compare_ranks({"a": [RelevantRanks.of_targets(np.ones(n, int)) for n in (3, 4)]}, [1])
    with pytest.raises(ValueError, match="same rows"):
        compare_ranks({}, [1])
    with pytest.raises(ValueError, match="no rows to score"):
        compare_ranks({"a": np.ones((1, 0), int)}, [1])
    with pytest.raises(ValueError, match="integer array"):
        compare({"a": [GOOD], "b": [GOOD[:7]]}, TARGET, 10, [1])
    with pytest.raises(ValueError, match="k=3 must be between"):
        compare({"a": [GOOD]}, TARGET, 10, [3])


# Beyond accuracy. ---------------------------------------------------------------------------------

COUNT = np.array([6, 2, 1, 0])
USERS = np.array([3, 2, 1, 0])  # of 7; somebody had the first item again and again
KINDS = category_matrix(pl.Series([["x"], ["x"], ["y"], None], dtype=pl.List(pl.String)))


def facts(n_rows: int = 2, **more) -> ItemFacts:
    history = items_of(*([[0], [1, 2]] * (n_rows // 2)))
    return ItemFacts(train_count=COUNT, train_users=USERS, n_users=7, history=history, **more)


def test_metrics_beyond_accuracy_by_hand():
    vectors = np.array([[1.0, 0], [0, 1], [1, 1], [0, 1]])
    lists = np.array([[0, 1], [2, 3]] * 20)
    found = compare(
        {"ours": [lists]},
        np.zeros(40, dtype=int),
        4,
        [1, 2],
        facts=facts(40, vectors=vectors, categories=KINDS),
    ).metrics["ours"]
    bits = [-math.log2((n + 1) / 8) for n in USERS]
    assert found["novelty@2"].value == pytest.approx(np.mean(bits))
    assert found["novelty@1"].value == pytest.approx((bits[0] + bits[2]) / 2)
    # Lists: 4 and .5 interactions a mean; histories: 6 and 1.5.
    assert found["popularity_lift@2"].value == pytest.approx((4 + 0.5) / (6 + 1.5) - 1)
    assert found["ild@2"].value == pytest.approx((1 + 1 - math.sqrt(0.5)) / 2)
    assert "ild@1" not in found  # one item has no pair
    # Row 0: x for x. Row 1: y alone, for half x and half y.
    divergence = 0.5 * math.log(0.5 / 0.005) + 0.5 * math.log(0.5 / 0.995)
    assert found["calibration@2"].value == pytest.approx(divergence / 2)
    for name in ("novelty@2", "ild@2", "popularity_lift@2", "calibration@2"):
        assert found[name].low < found[name].value < found[name].high
        assert found[name].seeds == pytest.approx((found[name].value,))


def test_what_is_not_known_is_left_out():
    lists = np.array([[0, 1], [2, 3]])
    none = category_matrix(pl.Series([None] * 4, dtype=pl.List(pl.String)))
    for given in (facts(), facts(categories=none)):
        found = compare({"ours": [lists]}, np.zeros(2, int), 4, [2], facts=given).metrics["ours"]
        assert "novelty@2" in found and "popularity_lift@2" in found
        assert not {"ild@2", "calibration@2", "SID-credit@2"} & set(found)
    empty = ItemFacts(COUNT, USERS, 7, items_of([], []))  # nobody has a history
    found = compare({"ours": [lists]}, np.zeros(2, int), 4, [2], facts=empty).metrics["ours"]
    assert "novelty@2" in found and "popularity_lift@2" not in found
    found = compare({"miss": [MISS[:2]]}, np.zeros(2, int), 4, [2], facts=facts()).metrics["miss"]
    assert "novelty@2" not in found


def test_rows_without_a_value_are_left_out_of_the_mean_and_seeds_are_kept_apart():
    first, second = np.array([[0], [-1], [2], [3]]), np.array([[1], [0], [1], [3]])
    found = compare({"ours": [first, second]}, np.zeros(4, int), 4, [1], facts=facts(4)).metrics[
        "ours"
    ]
    bits = [-math.log2((n + 1) / 8) for n in USERS]
    # Row 1 is not defined for the first seed, and is left out for both.
    expected = (np.mean([bits[0], bits[2], bits[3]]), np.mean([bits[1], bits[1], bits[3]]))
    assert found["novelty@1"].seeds == pytest.approx(expected)
    assert found["novelty@1"].value == pytest.approx(np.mean(expected))
    before = (6 + 6 + 1.5) / 3
    expected = ((6 + 1 + 0) / 3 / before - 1, (2 + 2 + 0) / 3 / before - 1)
    assert found["popularity_lift@1"].seeds == pytest.approx(expected)


def test_credit_for_shared_semantic_ids():
    sids = np.array([0, 0, 1, 2])
    lists = np.array([[1, 2], [2, 3]] * 30)
    target = np.tile([0, 2], 30)
    found = compare(
        {"ours": [lists, lists[::-1].copy()]},
        target,
        4,
        [1],
        facts=facts(60, sid_of_item=sids),
        samples=200,
    ).metrics["ours"]
    # First seed: half the credit, then all of it. Second: neither list names the row's SID.
    assert found["SID-credit@1"].seeds == pytest.approx((0.75, 0))
    assert found["SID-credit@1"].value == pytest.approx(0.375)
    assert found["SID-credit@1"].low == 0 and 0.7 < found["SID-credit@1"].high < 0.85
    assert found["HR@1"].seeds == pytest.approx((0.5, 0))
    # Whoever compares SID strings counts the first list as a hit in full.
    assert found["SID-match@1"].seeds == pytest.approx((1, 0))
    with pytest.raises(ValueError, match="one relevant item a row"):
        relevant = items_of(*([[0, 1], [2]] * 30))
        compare({"ours": [lists]}, relevant, 4, [1], facts=facts(60, sid_of_item=sids))


# What is printed. ---------------------------------------------------------------------------------


def test_one_sentence_names_the_best_other_system():
    text = describe_difference(comparison(), "NDCG@2")
    assert text.startswith("poor − good, NDCG@2: -0.3691 [") and text.endswith("below 0")
    assert "p = 0.002 (Holm)," in text  # two systems are compared with it
    assert describe_difference(comparison("good"), "NDCG@2").endswith("above 0")
    assert describe_difference(comparison("good"), "HR@2").endswith("not distinguishable from 0")
    assert describe_difference(comparison(None), "HR@2") is None
    alone = compare({"good": [GOOD]}, TARGET, 10, [1], "good")
    assert alone.differences == {} and describe_difference(alone, "HR@1") is None


def rendered(table, **options) -> str:
    stream = io.StringIO()
    Console(file=stream, width=100, **options).print(table)
    return stream.getvalue()


def test_table_marks_the_best_values_and_the_reference():
    table = comparison_table(comparison(), ["HR@1", "HR@2", "coverage@2"], "shop, test")
    text = rendered(table, force_terminal=True, color_system="standard")
    good, poor = (next(x for x in text.splitlines() if name in x) for name in ("good", "poor"))
    assert "\x1b[1m1.0000" in good and good.count("\x1b[1m") == 3
    assert poor.count("\x1b[1;36m") == 2  # HR@2 and coverage@2 are shared; HR@1 is not
    assert "\x1b[36m" in poor and "\x1b[36m" not in good
    assert "±.0000" in good and "shop, test" in text


def test_table_says_how_many_seeds_a_system_has_and_takes_any_name():
    target = np.zeros(400, dtype=int)
    systems = {"ours [bold]": runs_of(2, [0.2, 0.3]), "theirs": runs_of(1, [0.5])}
    text = rendered(comparison_table(compare(systems, target, 2, [1]), ["HR@1"], "t"))
    assert "ours [bold] (2 seeds)" in text and "theirs  " in text and "(1 seed" not in text


def test_differences_beyond_accuracy_are_paired():
    """What makes a row's lists novel for both systems must not widen the interval."""
    rng = np.random.default_rng(0)
    of_row = rng.normal(5, 3, 300)
    values = {
        "ours": [{"novelty@1": of_row + 0.2 + rng.normal(0, 0.1, 300)}],
        "theirs": [{"novelty@1": of_row}],
        "others": [{"novelty@1": rng.permutation(of_row)}],
    }
    means, apart = compare_values(values, "ours", samples=500)
    assert means["ours"]["novelty@1"].half_width == pytest.approx(1.96 * 3 / 300**0.5, rel=0.15)
    found = apart["theirs"]["novelty@1"]
    assert found.value == pytest.approx(0.2, abs=0.02)
    assert found.value - found.low == pytest.approx(1.96 * 0.1 / 300**0.5, rel=0.2)
    assert found.p == pytest.approx(2 / 501) and found.p_holm == pytest.approx(4 / 501)
    unpaired = apart["others"]["novelty@1"]
    assert unpaired.low < 0 < unpaired.high and unpaired.p > 0.1


def test_a_difference_counts_rows_that_both_systems_have():
    nan = float("nan")
    values = {
        "ours": [{"ild@2": np.array([1.0, 2.0, nan, 4.0])}],
        "theirs": [{"ild@2": np.array([nan, 1.0, 1.0, 1.0])}],
        "nowhere": [{"ild@2": np.array([nan, nan, 9.0, nan])}],
    }
    means, apart = compare_values(values, "ours", samples=50)
    assert means["ours"]["ild@2"].value == pytest.approx(7 / 3)
    assert apart["theirs"]["ild@2"].value == pytest.approx(3 - 1)
    assert "nowhere" not in apart


def test_the_lift_is_compared_as_a_ratio():
    before = np.array([2.0, 4.0, 6.0])
    values = {
        "ours": [{"history_popularity": before, "popularity@2": np.array([2.0, 4.0, 12.0])}],
        "theirs": [{"history_popularity": before, "popularity@2": np.array([1.0, 2.0, 3.0])}],
    }
    means, apart = compare_values(values, "ours", samples=50)
    assert means["ours"]["popularity_lift@2"].value == pytest.approx(0.5)
    assert means["theirs"]["popularity_lift@2"].value == pytest.approx(-0.5)
    assert apart["theirs"]["popularity_lift@2"].value == pytest.approx(1)
    assert set(means["ours"]) == {"popularity_lift@2"}
