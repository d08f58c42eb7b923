"""The table: values, paired differences, and what is printed."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from rich.console import Console

from genrec.evaluation.comparison import compare, comparison_table, describe_difference

TARGET = np.tile(np.array([0, 1]), 100)
GOOD = np.column_stack([TARGET, TARGET + 2])  # always rank 1
POOR = np.column_stack([TARGET + 2, TARGET])  # always rank 2
MISS = np.full((200, 2), -1)


def comparison(reference="poor"):
    return compare({"good": GOOD, "poor": POOR, "miss": MISS}, TARGET, 10, [1, 2], reference)


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
    assert found.ranks["poor"].tolist() == [2] * 200
    difference = found.differences["good"]["NDCG@2"]
    assert difference.value == pytest.approx(1 / math.log2(3) - 1) == difference.high
    assert set(found.differences) == {"good", "miss"}
    assert comparison(None).differences == {}


def test_one_sentence_names_the_best_other_system():
    assert describe_difference(comparison(), "NDCG@2").startswith("poor − good, NDCG@2: -0.3691 [")
    assert describe_difference(comparison(), "NDCG@2").endswith("below 0")
    assert describe_difference(comparison("good"), "NDCG@2").endswith("above 0")
    assert describe_difference(comparison("good"), "HR@2").endswith("not distinguishable from 0")
    assert describe_difference(comparison(None), "HR@2") is None


def test_table_marks_the_best_values_and_the_reference():
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=True, color_system="standard")
    console.print(comparison_table(comparison(), ["HR@1", "HR@2", "coverage@2"], "shop, test"))
    lines = stream.getvalue().splitlines()
    good, poor = (next(line for line in lines if name in line) for name in ("good", "poor"))
    assert "\x1b[1m1.0000" in good and good.count("\x1b[1m") == 3
    assert poor.count("\x1b[1;36m") == 2  # HR@2 and coverage@2 are shared; HR@1 is not
    assert "\x1b[36m" in poor and "\x1b[36m" not in good
    assert "±.0000" in good and "shop, test" in stream.getvalue()
