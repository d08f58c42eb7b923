"""The tables that an evaluation leaves behind."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from genrec.evaluation import results
from genrec.evaluation.comparison import compare
from genrec.evaluation.lists import align
from genrec.evaluation.results import (
    curves_table,
    examples,
    long_table,
    per_user_table,
    scores,
    write_lists,
    write_results,
)
from genrec.evaluation.slices import score_slices
from genrec.item_lists import ItemLists
from genrec.metrics import RelevantRanks, find_relevant, gains, ndcg_at_k, recalls

ROWS = pl.DataFrame(
    {
        "row_id": ["test-0", "test-1", "test-2"],
        "user_id": [10, 20, 10],
        "history_item_index": pl.Series([[0, 1], [3], []], dtype=pl.List(pl.Int32)),
        "target_item_index": pl.Series([2, 0, 3], dtype=pl.Int32),
    }
)
CATALOG = pl.DataFrame(
    {
        "item_index": pl.Series(range(4), dtype=pl.Int32),
        "item_id": ["a", "b", "c", "d"],
        "title": ["A", "B", None, "D"],
        "categories": pl.Series([["x"], None, [], ["y", "z"]], dtype=pl.List(pl.String)),
    }
)
LISTS = np.array([[1, 2], [0, -1], [-1, -1]])
OTHER = np.array([[3, 1], [1, 0], [3, 2]])
RELEVANT = ItemLists.from_column(pl.Series([[2, 1], [0], [1, 3, 0]], dtype=pl.List(pl.Int64)))


def test_ranks_per_user_system_and_seed():
    ranks = {
        "ours": [RelevantRanks.of_targets(np.array(r)) for r in ([2, 1, 0], [1, 0, 0])],
        "theirs": [RelevantRanks.of_targets(np.array([0, 2, 1]))],
    }
    found = per_user_table(ROWS, ranks, {})
    assert found.columns == ["row_id", "user_id", "system", "seed", "target_rank"]
    assert found["row_id"].to_list() == ["test-0", "test-1", "test-2"] * 3
    assert found["user_id"].to_list() == [10, 20, 10] * 3
    assert found["system"].to_list() == ["ours"] * 6 + ["theirs"] * 3
    assert found["seed"].to_list() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert found["target_rank"].to_list() == [2, 1, 0, 1, 0, 0, 0, 2, 1]
    # A metric can be taken again from the table.
    rank = found.filter(system="ours", seed=0)["target_rank"].to_numpy()
    assert gains(rank, 2).mean() == ndcg_at_k(LISTS, np.array([2, 0, 1]), 2)


def test_what_lists_are_like_stands_beside_the_ranks():
    ranks = {"ours": [RelevantRanks.of_targets(np.array([2, 1, 0]))] * 2}
    values = {
        "ours": [{"novelty@2": np.array([1.5, np.nan, 2])}, {"novelty@2": np.array([0, 1, 2])}]
    }
    found = per_user_table(ROWS, ranks, values)
    assert found["novelty@2"].to_list() == [1.5, None, 2, 0, 1, 2]
    assert found["novelty@2"].dtype == pl.Float32


def test_lists_written_in_pieces_are_the_long_table(tmp_path, monkeypatch):
    for cells in (1, 2, 4, 100):  # a row at a time, …
        monkeypatch.setattr(results, "_LIST_ROWS", cells)
        write_lists(tmp_path / "lists.parquet", OTHER, ROWS, CATALOG)
        assert pl.read_parquet(tmp_path / "lists.parquet").equals(long_table(OTHER, ROWS, CATALOG))
    write_lists(tmp_path / "none.parquet", OTHER[:0], ROWS[:0], CATALOG)
    assert pl.read_parquet(tmp_path / "none.parquet").height == 0


def test_rows_with_several_relevant_items_say_where_all_stand():
    rows = ROWS.with_columns(
        pl.Series("relevant_item_index", [[2, 1], [0], [1, 3, 0]], dtype=pl.List(pl.Int32))
    )
    found = per_user_table(rows, {"ours": [find_relevant(LISTS, RELEVANT)]}, {})
    assert found["target_rank"].to_list() == [1, 1, 0]
    assert found["hit_ranks"].to_list() == [[1, 2], [1], []]
    assert found["n_relevant"].to_list() == [2, 1, 3]
    none = per_user_table(rows, {"ours": [find_relevant(np.full((3, 2), -1), RELEVANT)]}, {})
    assert none["hit_ranks"].to_list() == [[], [], []]
    assert none.schema == found.schema


def test_lists_of_many_rows_stay_with_their_rows():
    rng = np.random.default_rng(0)
    rank = rng.integers(0, 4, 5000)
    rows = pl.DataFrame(
        {
            "row_id": [f"test-{i}" for i in range(5000)],
            "user_id": np.arange(5000),
            "relevant_item_index": [[0]] * 5000,
        }
    )
    found = per_user_table(rows, {"ours": [RelevantRanks.of_targets(rank)]}, {})
    assert found["hit_ranks"].to_list() == [[r] if r else [] for r in rank.tolist()]


def test_curves_at_every_length():
    found = curves_table({"ours": [find_relevant(LISTS, RELEVANT)] * 2}, 2)
    assert found["k"].to_list() == [1, 2] and found["system"].unique().to_list() == ["ours"]
    assert found["recall"].to_list() == pytest.approx([(1 / 2 + 1) / 3, (1 + 1) / 3])
    assert found["ndcg"].to_list() == pytest.approx([2 / 3, 2 / 3])


def test_curves_equal_the_metrics_at_every_length():
    rng = np.random.default_rng(0)
    lists = rng.permuted(np.tile(np.arange(30), (50, 1)), axis=1)[:, :12]
    relevant = ItemLists.from_column(
        pl.Series([rng.permutation(30)[: rng.integers(1, 20)].tolist() for _ in range(50)])
    )
    found = find_relevant(lists, relevant)
    table = curves_table({"ours": [found]}, 12)
    for k, recall, ndcg in table.select("k", "recall", "ndcg").iter_rows():
        assert recall == pytest.approx(recalls(found, k).mean())
        assert ndcg == pytest.approx(gains(found, k).mean())


def test_long_tables_read_back_as_the_same_lists():
    for lists in (OTHER, np.array([[1, 2], [0, -1], [-1, -1]])):
        table = long_table(lists, ROWS, CATALOG)
        assert table.columns == ["row_id", "user_id", "rank", "item_id", "item_index"]
        assert align(table, ROWS, CATALOG, 2, ROWS).items.tolist() == lists.tolist()


def test_examples_show_titles_hits_and_all_targets():
    rows = ROWS.with_columns(
        pl.Series("relevant_item_index", [[2, 1], [0], [1, 3, 0]], dtype=pl.List(pl.Int32))
    )
    found = examples(rows, {"ours": LISTS, "theirs": OTHER}, CATALOG, seed=0)
    assert [example["row_id"] for example in found] == ["test-0", "test-1", "test-2"]
    first = found[0]
    assert [item["title"] for item in first["history"]] == ["A", "B"]
    assert [item["categories"] for item in first["history"]] == [["x"], []]
    assert [item["item_id"] for item in first["targets"]] == ["c", "b"]
    assert first["lists"]["ours"] == [
        {"item_id": "b", "title": "B", "hit": True},
        {"item_id": "c", "title": None, "hit": True},
    ]
    assert [item["hit"] for item in first["lists"]["theirs"]] == [False, True]
    assert found[2]["history"] == [] and found[2]["lists"]["ours"] == []
    single = examples(ROWS, {"ours": LISTS}, CATALOG, seed=0)
    assert [item["item_id"] for item in single[0]["targets"]] == ["c"]


def test_ten_examples_are_drawn_whether_hit_or_not():
    many = pl.concat([ROWS] * 20).with_columns(
        pl.int_range(pl.len()).cast(pl.String).alias("row_id")
    )
    many = many.with_columns(
        pl.lit(pl.Series([list(range(4)) * 4])).first().alias("history_item_index")
    )
    found = examples(many, {"ours": np.tile(LISTS, (20, 1))}, CATALOG, seed=1)
    drawn = [int(example["row_id"]) for example in found]
    assert len(set(drawn)) == 10 and drawn == sorted(drawn) and drawn != list(range(10))
    assert [len(example["history"]) for example in found] == [10] * 10
    other = examples(many, {"ours": np.tile(LISTS, (20, 1))}, CATALOG, seed=2)
    assert drawn != [int(example["row_id"]) for example in other]
    assert {bool(sum(i["hit"] for i in e["lists"]["ours"])) for e in found} == {True, False}


def test_everything_is_written_and_the_reference_is_not_written_again(tmp_path):
    target = ROWS["target_item_index"].to_numpy()
    lists = {"weak": [LISTS], "trained": [OTHER, OTHER[::-1].copy()], "ours": [OTHER]}
    comparison = compare(lists, target, 4, [1, 2], "ours", permutations=99, samples=20)
    slices = score_slices([], comparison.ranks, np.arange(3), 2)
    results = {"dataset": "shop", "depth": 2, "ks": [1, 2], "seed": 0}
    write_results(tmp_path, results, comparison, slices, [], lists, ROWS, CATALOG)
    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*"))
    assert names == [
        "baselines/trained-seed-0.parquet",
        "baselines/trained-seed-1.parquet",
        "baselines/weak.parquet",
        "curves.parquet",
        "examples.json",
        "metrics.json",
        "per_user.parquet",
        "row_slices.parquet",
        "slices.parquet",
    ]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["dataset"] == "shop" and list(metrics["systems"]) == ["weak", "trained", "ours"]
    assert metrics["systems"]["trained"]["HR@2"].keys() == {"value", "low", "high", "seeds"}
    assert len(metrics["systems"]["trained"]["HR@2"]["seeds"]) == 2
    assert set(metrics["differences"]) == {"ours - weak", "ours - trained"}
    assert set(metrics["differences"]["ours - weak"]["HR@2"]) == {
        "value", "low", "high", "p", "p_holm",
    }  # fmt: skip
    shown = json.loads((tmp_path / "examples.json").read_text())
    assert set(shown[0]["lists"]) == {"ours", "trained"}  # beside the best other system
    per_user = pl.read_parquet(tmp_path / "per_user.parquet")
    assert per_user.height == 3 * 4 and pl.read_parquet(tmp_path / "curves.parquet").height == 6


def test_a_system_by_itself_has_no_other_to_show(tmp_path):
    comparison = compare({"ours": [OTHER]}, np.array([2, 0, 3]), 4, [2], "ours", samples=20)
    assert scores(comparison)["differences"] == {}
    results = {"depth": 2, "ks": [2], "seed": 0}
    slices = score_slices([], comparison.ranks, np.arange(3), 2)
    write_results(tmp_path, results, comparison, slices, [], {"ours": [OTHER]}, ROWS, CATALOG)
    shown = json.loads((tmp_path / "examples.json").read_text())
    assert set(shown[0]["lists"]) == {"ours"} and not (tmp_path / "baselines").exists()
