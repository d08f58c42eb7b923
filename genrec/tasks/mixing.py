"""Mixing: which rows of which family an epoch trains on.

A family's weight says how often an epoch goes through its rows: 1 once, 0.25 a quarter of them (the
next quarter in the next epoch), 2 twice (with two templates each). A list of weights is a
curriculum, one for each epoch, the last one for all later epochs.

Trainers want epochs of equal length, curricula don't have them. So all epochs' rows stand in one
plan, epoch after epoch, which is cut into equal slices; with constant weights a slice is an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.columns import TASK

IntArray = npt.NDArray[np.int64]

Weights = Mapping[str, Sequence[float]]
OTHERS = "*"


@dataclass(frozen=True)
class Plan:
    """The rows of a whole training.

    Attributes:
        rows: row numbers, epoch after epoch. ``# (n_epochs * length,)``
        epochs: the epoch that a row is rendered for: it picks the template. As long as `rows`.
        n_epochs: slices of equal length.
    """

    rows: IntArray
    epochs: IntArray
    n_epochs: int

    @property
    def length(self) -> int:
        """Rows of a slice."""
        return len(self.rows) // self.n_epochs

    def slice(self, epoch: int) -> tuple[IntArray, IntArray]:
        """Row numbers and render epochs of the trainer's epoch."""
        part = slice(epoch * self.length, (epoch + 1) * self.length)
        return self.rows[part], self.epochs[part]

    def counts(self, tasks: pl.Series) -> list[dict[str, int]]:
        """Rows of each family in each slice.

        Args:
            tasks: family of each row.
        """
        return [
            dict(tasks.gather(self.slice(e)[0]).value_counts().sort(TASK).iter_rows())
            for e in range(self.n_epochs)
        ]


def named_numbers(setting: str, values: Sequence[str]) -> dict[str, float]:
    """Settings like ``["title_to_sid=1000", "*=5"]`` as a mapping.

    Raises:
        ValueError: a value is not of that form, negative or infinite, or a name comes twice.
    """
    return {name: row[0] for name, row in named_rows(setting, values, 1).items()}


def named_rows(
    setting: str, values: Sequence[str], longest: int | None = None
) -> dict[str, list[float]]:
    """Settings like ``["sequential=1", "title_to_sid=1,0.5,0"]`` as a mapping to lists.

    Raises:
        ValueError: as `named_numbers`; or more than `longest` numbers.
    """
    found: dict[str, list[float]] = {}
    for value in values:
        name, _, text = value.partition("=")
        try:
            row = [float(part) for part in text.split(",")]
        except ValueError:
            row = []
        valid = row and all(0 <= number < math.inf for number in row)
        if not valid or name in found or len(row) > (longest or len(row)):
            form = "family=number" if longest == 1 else "family=number or family=number,number,…"
            raise ValueError(f"{setting}: {value!r} should read {form}, each family once")
        found[name] = row
    return found


def check_weights(weights: Weights, families: Sequence[str]) -> None:
    """Raise ValueError if weights can't make a plan."""
    if unknown := sorted(set(weights) - {*families, OTHERS}):
        raise ValueError(
            f"weights name {unknown[0]!r}, which the dataset doesn't have; it has "
            f"{', '.join(families)}"
        )
    for name, values in weights.items():
        if not len(values) or any(not 0 <= value <= 100 for value in values):
            raise ValueError(f"weights of {name!r} are {list(values)}; they must be in [0, 100]")


def plan(
    tasks: pl.Series,
    n_epochs: int,
    weights: Weights | None = None,
    caps: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Plan:
    """Draw the rows of all epochs.

    Args:
        tasks: family of each row. ``# (n_rows,)``
        n_epochs: epochs, at least 1.
        weights: per family, for each epoch; `OTHERS` stands for those that are not named, else
            they have 1.
        caps: rows of a family in an epoch at most; `OTHERS` as above.
        seed: of the draw. An epoch's rows are random ones of the family, and none comes back
            before all of its rows were seen.

    Raises:
        ValueError: an unknown family, a weight out of range, or a plan without rows.
    """
    weights, caps = weights or {}, caps or {}
    names = tasks.unique(maintain_order=True).to_list()
    check_weights({**dict.fromkeys(caps, [1.0]), **weights}, names)
    if n_epochs < 1:
        raise ValueError(f"n_epochs={n_epochs} must be at least 1")
    number = pl.Series(names, dtype=pl.String)
    owner = tasks.cast(pl.Enum(number)).to_physical().to_numpy()
    parts: list[list[IntArray]] = [[] for _ in range(n_epochs)]
    for i, name in enumerate(names):
        rows = np.flatnonzero(owner == i)
        rng = np.random.default_rng([seed, i])
        of_family = weights.get(name, weights.get(OTHERS, [1.0]))
        cap = caps.get(name, caps.get(OTHERS))
        order, used = rng.permutation(len(rows)), 0
        for epoch in range(n_epochs):
            weight = of_family[min(epoch, len(of_family) - 1)]
            wanted = round(weight * len(rows))
            wanted = wanted if cap is None else min(wanted, cap)
            while wanted:
                if used == len(order):
                    order, used = rng.permutation(len(rows)), 0
                take = min(wanted, len(order) - used)
                parts[epoch].append(rows[order[used : used + take]])
                used, wanted = used + take, wanted - take
    drawn = [np.concatenate([np.empty(0, np.int64), *part]) for part in parts]
    total = sum(len(part) for part in drawn)
    if total < n_epochs:
        raise ValueError("the weights leave no rows to train on; raise one above 0")
    rows = np.concatenate(
        [np.random.default_rng([seed, e]).permutation(p) for e, p in enumerate(drawn)]
    )
    epochs = times_drawn(rows)
    kept = total - total % n_epochs  # a few rows at the very end, so that all slices are equal
    return Plan(rows[:kept], epochs[:kept], n_epochs)


def times_drawn(rows: IntArray) -> IntArray:
    """How often each row was drawn before: the epoch that it is rendered for.

    As long as `rows`. A row drawn again gets its next template, in whatever epoch it comes.
    """
    total = len(rows)
    order = np.argsort(rows, kind="stable")
    starts = np.flatnonzero(np.diff(rows[order], prepend=-1))
    times = np.arange(total) - np.repeat(starts, np.diff(np.append(starts, total)))
    epochs = np.empty(total, dtype=np.int64)
    epochs[order] = times
    return epochs
