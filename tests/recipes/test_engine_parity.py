"""The comparison of two engines' lists: what counts as equal and as explained."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

from genrec.decoding.beam import BeamResult

_FILE = Path(__file__).resolve().parents[2] / "recipes" / "benchmarks" / "engine_parity.py"


@pytest.fixture(scope="module")
def agreement():
    return runpy.run_path(str(_FILE), run_name="engine_parity")["agreement"]


def lists(items: list[list[int]], scores: list[list[float]]) -> BeamResult:
    n, k = len(items), len(items[0])
    return BeamResult(
        np.array(items),
        np.array(scores, dtype=np.float32),
        np.zeros((n, k, 1), dtype=np.float32),
        np.ones(n, dtype=bool),
    )


def test_other_items_of_equal_scores_are_not_explained(agreement):
    found = agreement(lists([[1, 2]], [[-1.0, -2.0]]), lists([[7, 8]], [[-1.0, -2.0]]), 2)
    assert found == {"equal": 0.0, "explained": 0.0, "max_abs_diff": 0.0}


def test_swaps_are_explained_by_near_ties_alone(agreement):
    ours = lists([[1, 2], [1, 2]], [[-1.0, -1.0005], [-1.0, -1.5]])
    theirs = lists([[2, 1], [2, 1]], [[-1.0, -1.0005], [-1.0, -1.5]])
    found = agreement(ours, theirs, 2)
    assert (found["equal"], found["explained"]) == (0.0, 0.5)
    assert found["max_abs_diff"] == pytest.approx(0.5)


def test_an_item_that_a_tie_moved_past_the_end_is_found_behind_it(agreement):
    ours = lists([[1, 2, 3]], [[-1.0, -1.5, -1.5005]])
    theirs = lists([[1, 3, 2]], [[-1.0, -1.5, -1.5]])
    found = agreement(ours, theirs, 2)
    assert (found["equal"], found["explained"]) == (0.0, 1.0)
    # The same places under another's score are a difference of the engines.
    assert agreement(ours, lists([[1, 2, 3]], [[-1.0, -1.51, -1.52]]), 2)["explained"] == 0.0


def test_short_lists_are_compared_without_their_padding(agreement):
    short = lists([[1, -1]], [[-1.0, -np.inf]])
    assert agreement(short, short, 2) == {"equal": 1.0, "explained": 1.0, "max_abs_diff": 0.0}
    longer = lists([[1, 2]], [[-1.0, -2.0]])
    assert agreement(short, longer, 2) == {"equal": 0.0, "explained": 0.0, "max_abs_diff": 0.0}
