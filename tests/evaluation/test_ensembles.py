"""Mixtures of lists against hand-computed probabilities."""

from __future__ import annotations

import math

import polars as pl
import pytest

from genrec.evaluation.ensembles import mixture


def lists(*rows: tuple[str, int, float]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "row_id": [r[0] for r in rows],
            "user_id": [1 if r[0] == "a" else 2 for r in rows],
            "item_id": [r[1] for r in rows],
            "score": [math.log(r[2]) for r in rows],
        },
        schema_overrides={"score": pl.Float32},
    )


def test_the_mean_probability_decides():
    one = lists(("a", 1, 0.5), ("a", 2, 0.2), ("b", 5, 0.3), ("b", 6, 0.1))
    two = lists(("b", 6, 0.3), ("b", 7, 0.1), ("a", 2, 0.4), ("a", 3, 0.1))
    mixed = mixture([one, two], 2)
    assert mixed.select("row_id", "user_id", "item_id", "rank").rows() == [
        ("a", 1, 2, 1), ("a", 1, 1, 2), ("b", 2, 6, 1), ("b", 2, 5, 2)
    ]  # fmt: skip
    assert mixed["score"].exp().to_list() == pytest.approx([0.3, 0.25, 0.2, 0.15], abs=1e-6)


def test_ties_go_to_the_lower_item_and_lists_can_be_shorter():
    one, two = lists(("a", 4, 0.25), ("b", 1, 0.1)), lists(("a", 3, 0.25), ("b", 1, 0.3))
    mixed = mixture([one, two], 5)
    places = mixed.select("row_id", "item_id", "rank").rows()
    assert places == [("a", 3, 1), ("a", 4, 2), ("b", 1, 1)]


def test_string_ids_are_kept():
    one = lists(("a", 4, 0.25)).with_columns(pl.lit("x9").alias("item_id"))
    assert mixture([one, one], 1)["item_id"].to_list() == ["x9"]
    assert mixture([one, one], 1)["score"].exp()[0] == pytest.approx(0.25)


def test_what_cannot_be_mixed():
    one = lists(("a", 1, 0.5), ("b", 2, 0.5))
    with pytest.raises(ValueError, match="at least two models"):
        mixture([one], 1)
    with pytest.raises(ValueError, match=r"other rows than model 0 \(1 and 2\)"):
        mixture([one, one.head(1)], 1)
    with pytest.raises(ValueError, match="model 1 lists an item twice"):
        mixture([one, pl.concat([one, one])], 1)
    with pytest.raises(ValueError, match="model 0 has scores above 0"):
        mixture([one.with_columns(pl.lit(0.7).alias("score")), one], 1)
    with pytest.raises(ValueError, match="k=0"):
        mixture([one, one], 0)


def test_a_memory_has_its_weight_where_it_knows_a_row():
    one = lists(("a", 1, 0.5), ("a", 2, 0.2), ("b", 5, 0.3))
    memory = lists(("a", 2, 0.95), ("a", 3, 0.05))
    mixed = mixture([one], 3, lambda rows: memory, 0.25)
    assert mixed.select("row_id", "item_id", "rank").rows() == [
        ("a", 2, 1), ("a", 1, 2), ("a", 3, 3), ("b", 5, 1)
    ]  # fmt: skip
    # Of row b the memory knows nothing: the model's probability stays whole.
    assert mixed["score"].exp().to_list() == pytest.approx([0.3875, 0.375, 0.0125, 0.3], abs=1e-6)
    two = mixture([one, one], 3, lambda rows: memory, 0.25)
    assert two["item_id"].to_list() == mixed["item_id"].to_list()
    # Without weight it is not even asked.
    assert mixture([one], 3, pytest.fail, 0.0)["item_id"].to_list() == [1, 2, 5]


def test_memories_that_cannot_be_mixed():
    one = lists(("a", 1, 0.5), ("b", 2, 0.5))
    with pytest.raises(ValueError, match="the memory has lists for other rows"):
        mixture([one], 1, lambda rows: lists(("c", 1, 0.5)), 0.5)
    with pytest.raises(ValueError, match="the memory lists an item twice"):
        mixture([one], 1, lambda rows: pl.concat([one, one]), 0.5)
    with pytest.raises(ValueError, match="memory_weight=1 must"):
        mixture([one], 1, lambda rows: one, 1)
    with pytest.raises(ValueError, match="at least one model, not 0"):
        mixture([], 1, lambda rows: one, 0.5)


def test_rows_are_mixed_in_blocks(monkeypatch):
    drawn = [(row, item, 0.3 / (1 + item + place)) for place, row in enumerate("gacbfed")
             for item in range(4)]  # fmt: skip
    one = lists(*drawn)
    two = lists(*[(row, 7 - item, p) for row, item, p in reversed(drawn)])
    asked = []

    def memory(rows: pl.Series) -> pl.DataFrame:
        asked.append(rows.to_list())
        return lists(*[(row, 9, 0.5) for row in rows if row != "c"])

    whole = mixture([one, two], 3, memory, 0.4)
    assert asked == [list("abcdefg")]
    asked.clear()
    monkeypatch.setattr("genrec.evaluation.ensembles._ROWS", 3)
    assert mixture([one, two], 3, memory, 0.4).equals(whole)
    assert asked == [list("abc"), list("def"), list("g")]


def test_scores_below_the_smallest_number_keep_their_rows():
    one = lists(("a", 1, 0.5)).with_columns(pl.lit(-800.0).alias("score"))
    assert mixture([one, one], 2)["item_id"].to_list() == [1]
