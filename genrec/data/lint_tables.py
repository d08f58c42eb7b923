"""What the checks of the data linter share: findings, the tables as arrays, statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.columns import ITEM_ID, TARGET_TIME, TIMESTAMP, TITLE
from genrec.data.cleaning import missing_title
from genrec.data.split_rows import IntArray, UserSequences
from genrec.data.splits import GIVEN

Severity = Literal["bad", "look", "not run", "ok"]
FloatArray = npt.NDArray[np.float64]
AnyInt = npt.NDArray[np.integer]

SIGNIFICANT = 5.0  # |z| from which on chance is ruled out; some twenty checks look at one dataset
DAY = 86_400  # seconds


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: the check.
        severity: "bad" (results don't mean what they seem to), "look" (say so beside results),
            "ok", or "not run" where the data lack what the check needs.
        value: the statistic, None where there is none.
        threshold: the value from which on the check is no longer "ok", None where there is none.
        text: what the value is, what it means and, unless all is well, what to do.
        example: a case of it, None where there is none.
    """

    name: str
    severity: Severity
    value: float | None
    threshold: float | None
    text: str
    example: str | None = None


def graded(
    name: str,
    value: float,
    look: float,
    bad: float | None,
    text: str,
    advice: str,
    example: str | None = None,
    significant: bool = True,
) -> Finding:
    """A finding whose severity follows from its value; advice and example only if not "ok".

    What may be chance (not `significant`) is "ok" whatever its value.
    """
    if value < look or not significant:
        return Finding(name, "ok", value, look, text)
    severity: Severity = "bad" if bad is not None and value >= bad else "look"
    return Finding(name, severity, value, look, f"{text}. {advice}", example)


def not_run(name: str, why: str) -> Finding:
    """A check that the data don't allow."""
    return Finding(name, "not run", None, None, f"not checked: {why}")


@dataclass(frozen=True)
class LintTables:
    """The tables of a prepared run, and what several checks compute from them.

    Attributes:
        catalog: row i is item index i.
        train: split rows.
        valid: split rows.
        test: split rows.
        protocol: how the rows were split.
        log: the cleaned log as arrays.
        id_order: place of each catalogue item in the order of the item ids, shape (n_items,).
        id_kind: "numbers" or "text": what that order is one of.
        moment: number of the (user, moment) that an interaction belongs to, never falling, shape
            (interactions,); None without times.
        resolution: what the times tell apart: "day", "second", or "moment" where they are finer;
            None without times.
    """

    catalog: pl.DataFrame
    train: pl.DataFrame
    valid: pl.DataFrame
    test: pl.DataFrame
    protocol: str
    log: UserSequences
    id_order: IntArray
    id_kind: str
    moment: IntArray | None
    resolution: str | None

    @classmethod
    def of(
        cls,
        interactions: pl.DataFrame,
        catalog: pl.DataFrame,
        train: pl.DataFrame,
        valid: pl.DataFrame,
        test: pl.DataFrame,
        protocol: str,
    ) -> LintTables:
        """From the tables of a run; see `genrec.data.lint.lint_run_tables`."""
        log = UserSequences.of(interactions)
        order, kind = id_order(catalog[ITEM_ID])
        moment, times = None, log.time
        if log.moment is not None:
            new = np.ones(len(log.moment), dtype=bool)
            new[1:] = (np.diff(log.moment) != 0) | (np.diff(log.owner) != 0)
            moment = np.cumsum(new)
        elif protocol == GIVEN:  # its rows can have times where the log has some only
            rows = pl.concat([table[TARGET_TIME] for table in (train, valid, test)]).drop_nulls()
            times = rows.to_numpy().astype(np.int64)
        resolution = None
        if times is not None and len(times):
            resolution = "day" if ((times - times[0]) % DAY == 0).all() else "second"
            if log.moment is not log.time:
                resolution = "moment"
        return cls(catalog, train, valid, test, protocol, log, order, kind, moment, resolution)

    @property
    def n_items(self) -> int:
        """Rows of the catalogue."""
        return len(self.id_order)

    @property
    def pairs(self) -> IntArray:
        """Places of the first one of two neighbouring interactions of a user."""
        return np.flatnonzero(self.log.owner[1:] == self.log.owner[:-1])

    def item_name(self, index: int) -> str:
        """The id of a catalogue row, to be shown."""
        return shown(self.catalog[ITEM_ID][index])

    def user_name(self, owner: int) -> str:
        """The id of a user of the log, to be shown."""
        return shown(self.log.users[int(self.log.start[owner])])


def shown(value: object, max_chars: int = 80) -> str:
    """A value as Python writes it, cut; control characters can't reach a terminal unescaped."""
    text = repr(value)
    return text if len(text) <= max_chars else text[:max_chars] + "…"


def id_order(ids: pl.Series) -> tuple[IntArray, str]:
    """Place of each id in the order of the ids: by number where they are numbered, else as text.

    "u2" and "u10", or "B-002" and "B-010", are numbered: one number each, the same text around it.

    Returns:
        Places from 0 on (equal ids share one), shape (ids,), and "numbers" or "text".
    """
    if ids.dtype.is_integer():
        return _dense(ids), "numbers"
    text = ids.cast(pl.String)
    number = text.str.extract(r"^\D*(\d{1,18})\D*$").cast(pl.Int64)
    around = text.str.replace(r"\d+", "0")
    if len(ids) and number.null_count() == 0 and around.n_unique() == 1:
        return _dense(number), "numbers"
    return _dense(text), "text"


def _dense(column: pl.Series) -> IntArray:
    return (column.rank("dense").cast(pl.Int64) - 1).to_numpy()


def first_value(groups: AnyInt, values: AnyInt, n_groups: int) -> tuple[IntArray, IntArray]:
    """Groups that occur, and the least value of each.

    Args:
        groups: numbers below `n_groups`, shape (n,).
        values: shape (n,).
        n_groups: number of groups.
    """
    least = np.full(n_groups, np.iinfo(np.int64).max)
    np.minimum.at(least, groups, values)
    present = np.flatnonzero(np.bincount(groups, minlength=n_groups))
    return present, least[present]


def rank_correlation(x: IntArray, y: IntArray) -> tuple[float, float]:
    """Spearman's ρ (ties get average ranks), and z under independence: ρ·√(n − 1).

    Where x and y have nothing to do with each other, every order is as likely, ρ has mean 0 and
    variance 1 / (n − 1) exactly. A constant x or y gives 0.
    """
    if len(x) < 3:
        return 0.0, 0.0
    ranks = [pl.Series(values).rank("average").to_numpy() for values in (x, y)]
    spread = [float(r.std()) for r in ranks]
    if min(spread) == 0:
        return 0.0, 0.0
    rho = float(np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())))
    rho = float(np.clip(rho / (spread[0] * spread[1]), -1, 1))
    return rho, rho * float(np.sqrt(len(x) - 1))


def user_z(deviation: npt.NDArray[np.number]) -> float:
    """How far a sum of independent deviations of mean 0 is from 0, in standard deviations.

    The pairs of one user depend on each other, so users are the units and the spread is measured
    between them (a cluster-robust z); one user alone can't be significant.

    Args:
        deviation: what each user is above expectation, shape (users,).
    """
    spread = float(np.sqrt(np.square(deviation).sum()))
    return float(deviation.sum()) / spread if spread else 0.0


def near_by_chance(left: IntArray, right: IntArray, distance: int, n: int) -> float:
    """Chance that a random one of `left` and a random one of `right` are 1 … distance apart.

    Args:
        left: places below n.
        right: places below n.
        distance: at least 1.
        n: number of places.
    """
    if len(left) == 0 or len(right) == 0:
        return 0.0
    counts = np.bincount(right, minlength=n)
    below = np.concatenate([[0], np.cumsum(counts)])  # below[p]: how many are at places before p
    place = np.arange(n)
    near = below[np.minimum(n, place + distance + 1)] - below[np.maximum(0, place - distance)]
    total = (np.bincount(left, minlength=n) * (near - counts).astype(np.float64)).sum()
    return float(total) / (float(len(left)) * len(right))


def folded_titles(tables: LintTables) -> pl.Series:
    """Title of each catalogue row, folded for comparison; null where an item has none."""
    title = pl.col(TITLE).str.strip_chars()
    folded = title.str.to_lowercase().str.replace_all(r"\s+", " ")
    known = ~missing_title(tables.catalog)
    return tables.catalog.select(pl.when(known).then(folded).alias(TITLE)).to_series()


def times_missing(tables: LintTables) -> str | None:
    """Why a check that needs times can't be made, None where it can."""
    return f"not every interaction has a {TIMESTAMP}" if tables.log.time is None else None


def target_times_missing(tables: LintTables) -> str | None:
    """Why a check of test targets by time can't be made, None where it can."""
    if tables.test[TARGET_TIME].is_empty():
        return "there are no test rows"
    if tables.test[TARGET_TIME].null_count():
        return "not every test row has a time"
    return None if tables.protocol == GIVEN else times_missing(tables)
