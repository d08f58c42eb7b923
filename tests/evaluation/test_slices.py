"""Slices of rows and gaps between groups of people."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest

from genrec.evaluation import slices
from genrec.evaluation.slices import (
    MAX_GROUPS,
    MIN_ROWS,
    Slicing,
    gaps,
    make_slices,
    read_slicings,
    score_slices,
    slice_values,
    slices_of_rows,
)
from genrec.metrics import RelevantRanks

HOUR = 3600


def rows_of(
    target: list[int],
    seen: list[int] | None = None,
    time: list[int | None] | None = None,
    users: list[int] | None = None,
) -> pl.DataFrame:
    n = len(target)
    return pl.DataFrame(
        {
            "user_id": list(range(n)) if users is None else users,
            "target_item_index": pl.Series(target, dtype=pl.Int32),
            "seen_item_index": pl.Series(
                [list(range(length)) for length in (seen or [1] * n)], dtype=pl.List(pl.Int32)
            ),
            "target_timestamp": pl.Series(time or [None] * n, dtype=pl.Int64),
        }
    )


def catalog_of(*count: int) -> pl.DataFrame:
    return pl.DataFrame({"train_count": pl.Series(count, dtype=pl.Int32)})


def slicing(rows: pl.DataFrame, catalog: pl.DataFrame, family: str, users=None) -> Slicing | None:
    found = [s for s in make_slices(rows, catalog, users) if s.family.startswith(family)]
    assert len(found) <= 1
    return found[0] if found else None


def members(found: Slicing) -> dict[str, list[int]]:
    """Label -> its rows."""
    return {x: np.flatnonzero(found.codes == i).tolist() for i, x in enumerate(found.labels)}


# Target popularity. -------------------------------------------------------------------------------


def test_thirds_of_the_interactions_and_cold_targets():
    # 30 interactions: 1+1+2+2+4 = 10 of items up to 4; 10 of one; 10 of one.
    catalog = catalog_of(0, 1, 1, 2, 2, 4, 10, 10)
    found = slicing(rows_of(list(range(8))), catalog, "target popularity")
    # Items are cut by training count, so both items with ten stay together.
    assert members(found) == {
        "cold (0)": [0],
        "tail (1–4)": [1, 2, 3, 4, 5],
        "middle (5–10)": [6, 7],
        "head (11 or more)": [],
    }
    assert not found.user_attribute


def test_many_rare_items_balance_few_popular_ones():
    count = [1] * 9 + [3] * 3 + [9]  # 27 interactions, nine in each third
    found = slicing(rows_of([0, 8, 9, 11, 12]), catalog_of(*count), "target popularity")
    assert members(found) == {
        "cold (0)": [], "tail (1)": [0, 1], "middle (2–3)": [2, 3], "head (4 or more)": [4],
    }  # fmt: skip


def test_one_item_with_most_interactions_leaves_two_slices():
    found = slicing(rows_of([0, 1, 2]), catalog_of(0, 1, 98), "target popularity")
    # Both thirds end at 98: there is no middle.
    assert members(found) == {"cold (0)": [0], "tail (1–98)": [1, 2], "head (99 or more)": []}


def test_nothing_trained_on_leaves_no_slicing():
    assert slicing(rows_of([0, 1]), catalog_of(0, 0), "target popularity") is None


@pytest.mark.parametrize("seed", range(4))
def test_thirds_against_a_loop(seed):
    count = np.random.default_rng(seed).zipf(1.6, 200).clip(0, 500) - 1
    found = slicing(rows_of(list(range(200))), catalog_of(*count.tolist()), "target popularity")
    total = count.sum()
    edges = []
    for part in (1 / 3, 2 / 3):
        running = 0
        for level in sorted(set(count[count > 0].tolist())):
            running += level * int((count == level).sum())
            if running >= total * part:
                edges.append(level)
                break
    expected = [
        0 if c == 0 else 1 if c <= edges[0] else 2 if c <= edges[1] else 3 for c in count.tolist()
    ]
    named = [found.labels[code].split(" ")[0] for code in found.codes]
    names = ("cold", "tail", "middle", "head")
    assert edges[0] < edges[1] and named == [names[e] for e in expected]


# Quantiles. ---------------------------------------------------------------------------------------


def test_quarters_of_the_history_length():
    found = slicing(rows_of([0] * 8, [8, 7, 6, 5, 4, 3, 2, 1]), catalog_of(1), "history length")
    assert members(found) == {"1 – 2": [6, 7], "3 – 4": [4, 5], "5 – 6": [2, 3], "7 – 8": [0, 1]}


def test_equal_values_stay_together():
    found = slicing(rows_of([0] * 8, [1, 1, 1, 1, 1, 2, 3, 4]), catalog_of(1), "history length")
    assert members(found) == {"1": [0, 1, 2, 3, 4], "2": [5], "3 – 4": [6, 7]}
    assert slicing(rows_of([0] * 4, [5] * 4), catalog_of(1), "history length") is None


def test_time_is_shown_as_dates_and_left_out_where_there_is_none():
    days = [0, 1, 10, 11, 20, 21, 30, 31]
    rows = rows_of([0] * 8, time=[day * 24 * HOUR for day in days])
    found = slicing(rows, catalog_of(1), "time")
    assert found.labels[0] == "1970-01-01 – 1970-01-02" and len(found.labels) == 4
    assert found.codes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    rows = rows_of([0] * 3, time=[1, None, 10])
    assert slicing(rows, catalog_of(1), "time") is None


# User attributes. ---------------------------------------------------------------------------------


def attribute(values: list, users: list[int] | None = None) -> Slicing | None:
    n = len(values)
    table = pl.DataFrame({"user_id": range(n), "of user": values}, strict=False)
    rows = rows_of([0] * (n if users is None else len(users)), users=users)
    return slicing(rows, catalog_of(1), "of user", table)


def test_attribute_of_few_values_and_users_without_one():
    found = attribute(["f", None, "m", "f"], users=[2, 0, 1, 7, 3])
    assert found.user_attribute
    assert members(found) == {"f": [1, 4], "m": [0]}
    assert found.codes[[2, 3]].tolist() == [-1, -1]  # null, and a user who is not in the table


def test_numbers_of_few_values_keep_their_order():
    found = attribute([10, 2, 1, 2, None])
    assert members(found) == {"1": [2], "2": [1, 3], "10": [0]}
    assert attribute([True, False, None]).labels == ["false", "true"]


def test_numbers_of_many_values_are_cut_into_quarters():
    ages = [*range(20, 60), None]
    found = attribute(ages)
    assert found.labels == ["20 – 29", "30 – 39", "40 – 49", "50 – 59"]
    assert found.codes.tolist() == [i // 10 for i in range(40)] + [-1]
    assert found.user_attribute
    unknown = attribute([*map(float, range(40)), math.nan])  # NaN is no value either
    assert len(unknown.labels) == 4 and unknown.codes[-1] == -1


def test_what_is_no_grouping_is_left_out():
    many = [f"town {i}" for i in range(MAX_GROUPS + 1)]
    assert attribute(many) is None
    assert len(attribute(many[:-1]).labels) == MAX_GROUPS
    assert attribute(["same"] * 5) is None
    assert attribute([None] * 5) is None
    assert attribute([["a", "b"], ["a"], []]) is None  # several values a user


# Scores. ------------------------------------------------------------------------------------------


def ranks_of(*runs: list[int]) -> list[RelevantRanks]:
    return [RelevantRanks.of_targets(np.array(run)) for run in runs]


def test_scores_of_slices_by_hand():
    halves = Slicing("half", ["first", "second", "none"], np.array([0, 0, 0, 1, -1]))
    ranks = {"ours": ranks_of([1, 2, 0, 3, 1], [1, 0, 0, 3, 1]), "theirs": ranks_of([0] * 5)}
    users = np.array([7, 7, 3, 3, 9])
    found = score_slices([halves], ranks, users, k=2, samples=400)
    assert found.height == 2 * 2 * 2  # the empty slice has no line
    assert found["place"].unique().sort().to_list() == [0, 1]
    first = found.filter(slice="first", system="ours")
    assert first["rows"].to_list() == [3, 3] and first["users"].to_list() == [2, 2]
    gain = 1 / math.log2(3)
    values = dict(first.select("metric", "value").iter_rows())
    assert values == pytest.approx({"HR@2": (2 + 1) / 6, "NDCG@2": (2 + gain) / 6})
    # Users are drawn whole: 7 twice gives (1 + .5) / 2, 3 twice gives 0.
    hit_rate = first.row(0, named=True)
    assert (hit_rate["low"], hit_rate["high"]) == pytest.approx((0, 0.75))
    second = found.filter(slice="second", system="ours", metric="HR@2").row(0, named=True)
    assert (second["value"], second["low"], second["high"], second["rows"]) == (0, 0, 0, 1)


def test_no_slicings_give_an_empty_table_of_the_same_columns():
    found = score_slices([], {"ours": ranks_of([1, 0])}, np.arange(2), 1)
    assert found.height == 0 and "family" in found.columns and found["value"].dtype == pl.Float64


def test_slice_values_are_means_over_seeds():
    values = slice_values({"ours": ranks_of([1, 2, 0], [2, 2, 0])}, 1)
    assert values["ours"]["HR@1"].tolist() == [0.5, 0, 0]
    assert values["ours"]["NDCG@1"].tolist() == [0.5, 0, 0]


# Gaps. --------------------------------------------------------------------------------------------


def people(codes: np.ndarray, labels: list[str]) -> Slicing:
    return Slicing("kind", labels, codes, user_attribute=True)


def test_a_planted_gap_is_found():
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], 200)
    rate = np.array([0.5, 0.3, 0.1])[codes]
    rank = (rng.random(600) < rate).astype(int)
    slicings = [people(codes, ["a", "b", "c"])]
    found = gaps(slicings, {"ours": ranks_of(rank)}, np.arange(600), 5, permutations=499)
    gap = found["kind"]["ours"]["HR@5"]
    means = [rank[codes == code].mean() for code in range(3)]
    assert (gap["best"], gap["worst"]) == ("a", "c")
    assert gap["value"] == pytest.approx(means[0] - means[2])
    assert gap["low"] < gap["value"] < gap["high"] and gap["p"] == pytest.approx(1 / 500)
    # The interval of a difference of two independent shares.
    error = math.sqrt(sum(m * (1 - m) / 200 for m in (means[0], means[2])))
    assert gap["high"] - gap["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert set(found["kind"]["ours"]) == {"HR@5", "NDCG@5"}


def test_p_is_uniform_where_groups_are_alike():
    rng = np.random.default_rng(1)
    p = []
    for seed in range(150):
        codes = rng.integers(0, 4, 120)
        ranks = {"ours": ranks_of(rng.integers(0, 3, 120))}
        found = gaps([people(codes, list("abcd"))], ranks, np.arange(120), 5, 99, 10, seed)
        p.append(found["kind"]["ours"]["NDCG@5"]["p"])
    for level in (0.1, 0.5, 0.9):
        error = 4 * math.sqrt(level * (1 - level) / 150)
        assert abs((np.array(p) <= level).mean() - level) < error


def test_a_users_rows_move_together(monkeypatch):
    # Two groups of 4 users with 30 equal rows each: were rows shuffled, nothing would come near;
    # of the 70 divisions of the people, 2 are as far apart.
    monkeypatch.setattr(slices, "MIN_ROWS", 4)
    user = np.repeat(np.arange(8), 30)
    rank = user < 4
    found = gaps(
        [people((user >= 4).astype(np.int64), ["a", "b"])],
        {"ours": ranks_of(rank.astype(int))},
        user,
        1,
        permutations=4000,
    )
    gap = found["kind"]["ours"]["HR@1"]
    assert gap["value"] == 1 and gap["p"] == pytest.approx(2 / 70, abs=0.01)


def test_small_groups_and_other_slicings_have_no_gap():
    few = MIN_ROWS - 1
    codes = np.repeat([0, 1, 2], [50, 60, few])
    rank = np.repeat([1, 0, 1], [50, 60, few])
    ranks, users = {"ours": ranks_of(rank)}, np.arange(len(codes))
    found = gaps([people(codes, ["a", "b", "few"])], ranks, users, 1, 50, 50)
    assert found["kind"]["ours"]["HR@1"]["best"] == "a"
    assert gaps([Slicing("time", ["a", "b"], codes)], ranks, users, 1, 50, 50) == {}
    # Many rows of few people are few people.
    assert gaps([people(codes, ["a", "b", "few"])], ranks, users // 6, 1, 50, 50) == {}
    # A single group that is large enough.
    alone = np.where(codes == 0, 0, np.where(codes == 2, 1, -1))
    assert gaps([people(alone, ["a", "few"])], ranks, users, 1, 50, 50) == {}


def test_unknown_groups_between_known_ones_do_not_shift_names():
    # Group 1 is too small: the names of the ones behind it must not move.
    codes = np.repeat([0, 1, 2, -1], [40, 3, 40, 40])
    rank = np.repeat([0, 1, 1, 1], [40, 3, 40, 40])
    found = gaps(
        [people(codes, ["a", "b", "c"])], {"ours": ranks_of(rank)}, np.arange(123), 1, 50, 50
    )
    gap = found["kind"]["ours"]["HR@1"]
    assert (gap["best"], gap["worst"], gap["value"]) == ("c", "a", 1)


def test_slices_of_one_day_keep_labels_of_their_own():
    """As in a test period of a day: dates alone would give all quarters one label."""
    noon = 1_573_819_200
    seconds = noon + np.arange(100) * 60
    rows = pl.DataFrame(
        {
            "user_id": np.arange(100),
            "target_item_index": np.zeros(100, np.int64),
            "target_timestamp": seconds,
            "seen_item_index": [[0]] * 100,
        }
    )
    (made,) = [
        s
        for s in make_slices(rows, pl.DataFrame({"train_count": [3]}))
        if s.family == "time of the target"
    ]
    assert len(set(made.labels)) == 4
    assert made.labels[0] == "2019-11-15 12:00:00 – 2019-11-15 12:24:00"


def test_rows_with_several_relevant_items_are_not_cut_by_the_first_ones_popularity():
    """A hit on the popular item would stand in the slice of the cold one."""
    rows = pl.DataFrame(
        {
            "user_id": [0, 1],
            "target_item_index": [0, 1],
            "relevant_item_index": [[0, 1], [1]],
            "target_timestamp": [1, 2],
            "seen_item_index": [[], [0]],
        },
        schema_overrides={"seen_item_index": pl.List(pl.Int64)},
    )
    made = make_slices(rows, pl.DataFrame({"train_count": [0, 9]}))
    assert not [s for s in made if s.family.startswith("target popularity")]


def test_slices_of_rows_read_back(tmp_path):
    slicings = [
        Slicing("time", ["b", "a.c", "z"], np.array([1, -1, 0, 1])),
        Slicing("age", ["18", "25"], np.array([0, 1, 1, -1]), user_attribute=True),
    ]
    rows = pl.DataFrame({"row_id": ["r0", "r1", "r2", "r3"]})
    slices_of_rows(slicings, rows).write_parquet(tmp_path / "t.parquet")
    found = read_slicings(pl.read_parquet(tmp_path / "t.parquet"))
    assert [(s.family, s.labels, s.user_attribute) for s in found] == [
        ("time", ["b", "a.c", "z"], False),
        ("age", ["18", "25"], True),
    ]
    assert [s.codes.tolist() for s in found] == [s.codes.tolist() for s in slicings]
    assert read_slicings(slices_of_rows([], rows)) == []
