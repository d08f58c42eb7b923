"""Coordinate search over settings whose best values are known."""

from __future__ import annotations

from dataclasses import dataclass

from genrec.evaluation.tuning import coordinate_search


@dataclass(frozen=True)
class Settings:
    a: float = 0.0
    b: float = 0.0


GRID = {"a": [0.0, 1.0, 2.0], "b": [0.0, 1.0, 2.0]}


def search(score, passes: int = 3):
    asked = []

    def counted(settings: Settings) -> float:
        asked.append(settings)
        return score(settings)

    return (*coordinate_search(Settings(), GRID, counted, passes), asked)


def test_separate_settings_are_found_in_one_pass():
    best, trials, asked = search(lambda s: -((s.a - 2) ** 2) - (s.b - 1) ** 2)
    assert best == Settings(2, 1)
    assert len(set(asked)) == len(asked) == len(trials)  # none is scored twice
    assert [trial["settings"] for trial in trials[:3]] == [
        {"a": 0, "b": 0}, {"a": 1, "b": 0}, {"a": 2, "b": 0},
    ]  # fmt: skip
    assert max(trials, key=lambda t: t["ndcg"]) == {"settings": {"a": 2, "b": 1}, "ndcg": 0}


def test_settings_that_depend_on_each_other_need_another_pass():
    # From a = b = 0 only b = 1 helps; with b = 1, a = 2 does; with a = 2, b = 2.
    quality = {(0, 1): 1, (2, 1): 2, (2, 2): 3}

    def score(s: Settings) -> float:
        return quality.get((s.a, s.b), 0)

    assert search(score, passes=1)[0] == Settings(0, 1)
    assert search(score, passes=2)[0] == Settings(2, 2) == search(score)[0]


def test_the_first_of_equal_settings_stays():
    best, _, asked = search(lambda s: 1.0)
    assert best == Settings() and len(asked) == 5


def test_a_start_outside_the_grid_is_scored_and_left():
    best, trials = coordinate_search(Settings(a=9), {"a": [1.0, 2.0]}, lambda s: -s.a)
    assert best == Settings(a=1) and trials[0]["settings"]["a"] == 9
