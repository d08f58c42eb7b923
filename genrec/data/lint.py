"""The data linter: what in the data or its split makes results look better or worse than they are.

`genrec.data.leaks` stops at rows that leak. Here nothing stops: each check measures a property and
says what it means, also when all is well. Statistics come with what chance would give, exact where
that is known (`genrec.data.lint_order`, `genrec.data.lint_tables`), else from seeded permutations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, get_args

import numpy as np
import polars as pl

from genrec.columns import (
    HISTORY,
    ITEM_ID,
    RELEVANT,
    SEEN,
    TARGET,
    TARGET_POSITION,
    TARGET_TIME,
    USER_ID,
)
from genrec.data.lint_order import check_order
from genrec.data.lint_tables import (
    Finding,
    LintTables,
    Severity,
    graded,
    not_run,
    shown,
    target_times_missing,
)
from genrec.data.lint_text import check_text
from genrec.data.split_rows import row_blocks
from genrec.data.splits import GIVEN, LEAVE_ONE_OUT

__all__ = ["Finding", "lint_run_tables", "to_json", "worst_first"]

PERMUTATIONS, PERMUTED_ROWS = 10, 100_000  # of held-out items over users, for targets in user ids
MIN_HITS = 3  # held-out items inside user ids: fewer are chance
COLD_LOOK, COLD_BAD = 0.05, 0.3
UNTIMED_DUPLICATES = 0.01
AFTER_CUT = 0.1  # leave-one-out; for other protocols, any
SAME_SEQUENCES, MIN_SEQUENCE = 0.001, 3
EXTREME, EXTREME_SHARE = 20, 0.01  # times the median length; share of the interactions
REPEATED = 0.01


def lint_run_tables(
    interactions: pl.DataFrame,
    catalog: pl.DataFrame,
    train: pl.DataFrame,
    valid: pl.DataFrame,
    test: pl.DataFrame,
    protocol: str,
) -> list[Finding]:
    """Every check on the tables of a prepared run, in a fixed order; the same findings every time.

    Args:
        interactions: the cleaned log, users in blocks ordered by position; where the splits were
            given, what the training rows imply.
        catalog: row i is item index i; item_id and title are read, brand and description if there.
        train: split rows, see `genrec.data.splits.Splits`.
        valid: split rows.
        test: split rows.
        protocol: how they were split: "leave-one-out", "global-time", "time-cutoff" or "given".

    Raises:
        ValueError: interactions that aren't ordered.
    """
    tables = LintTables.of(interactions, catalog, train, valid, test, protocol)
    return [
        *check_order(tables),
        targets_in_user_ids(tables),
        train_after_the_cut(tables),
        cold_targets(tables),
        repeated_targets(tables),
        duplicate_interactions(tables),
        same_sequences(tables),
        extreme_users(tables),
        *check_text(tables),
    ]


def to_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Findings as plain values, for a JSON file."""
    return [asdict(finding) for finding in findings]


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Findings ordered by severity, those of one severity as they were."""
    order = get_args(Severity)
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def targets_in_user_ids(tables: LintTables) -> Finding:
    """Does a user's id contain the id of an item that is held out for that user?

    Ids are compared as words and runs of digits, so that "7" is in "u-7" and "u7", but not in
    "u77". Chance: the same held-out items dealt out to the users at random, ten times.
    """
    name = "held-out items in user ids"
    columns = [USER_ID, RELEVANT if RELEVANT in tables.test.columns else TARGET]
    held = pl.concat([tables.valid.select(columns), tables.test.select(columns)])
    held = held.select(USER_ID, pl.col(columns[1]).alias(TARGET))
    if columns[1] == RELEVANT:
        held = held.explode(TARGET)
    held = held.drop_nulls()
    if held.is_empty():
        return not_run(name, "nothing is held out")
    items = tables.catalog.select(_words(ITEM_ID))[ITEM_ID]
    users = held.select(_words(USER_ID))[USER_ID]
    targets = held[TARGET].to_numpy()
    hits = _contained(users, items.gather(targets))
    rng = np.random.default_rng(0)
    rows = np.arange(held.height)
    if held.height > PERMUTED_ROWS:
        rows = rng.choice(held.height, PERMUTED_ROWS, replace=False)
    dealt = [
        _contained(users.gather(rows), items.gather(rng.permutation(targets[rows]))).mean()
        for _ in range(PERMUTATIONS)
    ]
    chance = float(np.mean(dealt))
    enough = hits.sum() >= MIN_HITS
    expected = chance * held.height
    excess = hits.sum() > expected + 5 * np.sqrt(expected + 1)  # counts spread like Poisson's
    row = int(np.argmax(hits))
    return graded(
        name,
        float(hits.mean()),
        chance,
        chance,
        f"{hits.sum():,} of {held.height:,} held-out items stand in their user's id, "
        f"{expected:,.1f} by chance",
        "The answer is in the question wherever a prompt holds the user id; give users other ids",
        f"user {shown(held[USER_ID][row])} holds item {tables.item_name(int(targets[row]))}",
        bool(enough and excess),
    )


def _words(column: str) -> pl.Expr:
    """Text of ids as words and runs of digits, with a space around each; null if there are none."""
    text = pl.col(column).cast(pl.String).str.to_lowercase().str.replace_all(r"\d+", " ${0} ")
    text = text.str.replace_all(r"[^\p{L}\p{N}]+", " ").str.strip_chars()
    return pl.when(text != "").then(pl.format(" {} ", text)).alias(column)


def _contained(texts: pl.Series, parts: pl.Series) -> np.ndarray:
    frame = pl.DataFrame([texts.alias("text"), parts.alias("part")])
    inside = pl.col("text").str.contains(pl.col("part"), literal=True)
    return frame.select(inside.fill_null(False)).to_series().to_numpy()


def train_after_the_cut(tables: LintTables) -> Finding:
    """How much of the training part lies after test targets in time?"""
    name, log = "training after test targets", tables.log
    if why := target_times_missing(tables):
        return not_run(name, why)
    test = tables.test[TARGET_TIME].to_numpy()
    if tables.protocol == GIVEN:  # a row supervises its target alone
        time = tables.train[TARGET_TIME].drop_nulls().to_numpy()
    else:
        assert log.time is not None
        ends = tables.train.group_by(USER_ID).agg(pl.col(TARGET_POSITION).max())
        users = pl.DataFrame([log.users.gather(log.start).alias(USER_ID)])
        last = users.join(ends, on=USER_ID, how="left", maintain_order="left")[TARGET_POSITION]
        end = log.start + last.cast(pl.Int64).fill_null(-1).to_numpy()
        time = log.time[np.arange(len(log.items)) <= end[log.owner]]
    if len(time) == 0:
        return not_run(name, "no training interaction has a time")
    moments = {"earliest": int(test.min()), "median": int(np.median(test))}
    after = {which: float((time > moment).mean()) for which, moment in moments.items()}
    text = (
        f"{after['earliest']:.1%} of the training interactions are later than the earliest test "
        f"target, {after['median']:.1%} later than the median one"
    )
    if tables.protocol == LEAVE_ONE_OUT:
        advice = (
            "Leave-one-out has this by design: a model knows what was popular after the moment it "
            "is tested on. Say so, and check conclusions under global-time or time-cutoff"
        )
        return graded(name, after["median"], AFTER_CUT, None, text, advice)
    advice = "Under this protocol none may be; the split is not what its name says: rebuild it"
    return graded(name, after["earliest"], 1 / len(time), 1 / len(time), text, advice)


def cold_targets(tables: LintTables) -> Finding:
    """How many test targets were never seen in training?"""
    name = "test items never trained on"
    if tables.test.is_empty():
        return not_run(name, "there are no test rows")
    seen = np.zeros(tables.n_items, dtype=bool)
    seen[tables.train[TARGET].to_numpy()] = True
    history = tables.train[HISTORY]
    for block in row_blocks(history.list.len().fill_null(0).to_numpy().astype(np.int64)):
        seen[history[block].list.explode(keep_nulls=False, empty_as_null=False).to_numpy()] = True
    targets = tables.test[TARGET].to_numpy()
    cold = ~seen[targets]
    items = np.unique(targets)
    return graded(
        name,
        float(cold.mean()),
        COLD_LOOK,
        COLD_BAD,
        f"{cold.mean():.1%} of the test rows, {(~seen[items]).mean():.1%} of the "
        f"{len(items):,} items tested",
        "Methods that know items by their ids alone can't hit these; report warm and cold rows "
        "apart",
        f"item {tables.item_name(int(targets[np.argmax(cold)]))}",
    )


def repeated_targets(tables: LintTables) -> Finding:
    """How many test targets did the user have before?"""
    name = "repeated test targets"
    rows = tables.test
    if rows.is_empty():
        return not_run(name, "there are no test rows")
    had = SEEN if SEEN in rows.columns else HISTORY
    last = (rows[HISTORY].list.last() == rows[TARGET]).fill_null(False).to_numpy()
    contained = pl.col(had).list.contains(pl.col(TARGET)).fill_null(False)
    before = rows.select(contained).to_series().to_numpy()
    share, row = float(before.mean()), int(np.argmax(before))
    return graded(
        name,
        share,
        REPEATED,
        None,
        f"{share:.1%} of the test targets are items that the user had before, {last.mean():.1%} "
        "the very last one",
        "A filter of seen items makes these impossible, and without it repeating the last item is "
        "a baseline; state the rule, and show the other one beside it",
        f"user {shown(rows[USER_ID][row])}, item {tables.item_name(int(rows[TARGET][row]))}",
    )


def duplicate_interactions(tables: LintTables) -> Finding:
    """Are there interactions of the same user, item and moment (without times: user and item)?"""
    name, log = "duplicate interactions", tables.log
    if len(log.items) == 0:
        return not_run(name, "there are no interactions")
    group = log.owner if tables.moment is None else tables.moment
    key = np.sort(group * tables.n_items + log.items)
    again = key[1:][key[1:] == key[:-1]]
    share = len(again) / len(log.items)
    example = None
    if len(again):
        place = int(np.searchsorted(group, again[0] // tables.n_items))
        user = tables.user_name(int(log.owner[place]))
        example = f"user {user}, item {tables.item_name(int(again[0] % tables.n_items))}"
    if tables.moment is None:
        text = f"{share:.2%} of the interactions repeat a user's earlier item (no times to compare)"
        look = UNTIMED_DUPLICATES
        advice = "They may be second purchases or double entries; find out which"
    else:
        text = f"{share:.2%} of the interactions repeat the same user, item and {tables.resolution}"
        look = 1 / len(log.items)
        advice = "prepare drops these from a log, but rows that were given keep them; say so"
    return graded(name, share, look, None, text, advice, example)


def same_sequences(tables: LintTables) -> Finding:
    """Which users have the same whole sequence as another one?

    Sequences are compared by a 64-bit polynomial hash with random coefficients for the items.
    """
    name, log = "users with the same sequence", tables.log
    if len(log.start) == 0:
        return not_run(name, "there are no interactions")
    numbers = np.random.default_rng(0).integers(0, 2**64, tables.n_items, dtype=np.uint64)
    powers = np.full(int(log.length.max()), 0x9E3779B97F4A7C15, dtype=np.uint64)  # odd
    powers = np.cumprod(powers, dtype=np.uint64)
    position = np.arange(len(log.items)) - log.start[log.owner]
    digest = np.add.reduceat(numbers[log.items] * powers[position], log.start)
    users = np.flatnonzero(log.length >= MIN_SEQUENCE)
    if len(users) == 0:
        return not_run(name, f"no user has {MIN_SEQUENCE} interactions")
    _, group, counts = np.unique(digest[users], return_inverse=True, return_counts=True)
    shared = counts[group] > 1
    example = None
    if shared.any():
        alike = users[group == group[np.argmax(shared)]]
        names = ", ".join(tables.user_name(int(user)) for user in alike[:3])
        example = f"users {names}: the same {log.length[alike[0]]} items"
    return graded(
        name,
        float(shared.mean()),
        SAME_SEQUENCES,
        None,
        f"{shared.sum():,} of {len(users):,} users with at least {MIN_SEQUENCE} interactions have "
        "another's whole sequence",
        "One person under two ids, or copied data: one's held-out items may stand in the other's "
        "training part; keep one of them",
        example,
    )


def extreme_users(tables: LintTables) -> Finding:
    """Do a few users far beyond the median make much of the data?"""
    name, length = "users of extreme length", tables.log.length
    if len(length) == 0:
        return not_run(name, "there are no interactions")
    median = float(np.median(length))
    extreme = length > EXTREME * median
    share = float(length[extreme].sum() / length.sum())
    most = int(np.argmax(length))
    return graded(
        name,
        share,
        EXTREME_SHARE,
        None,
        f"{extreme.sum():,} users have more than {EXTREME} times the median of {median:g} "
        f"interactions and make {share:.1%} of all; the longest has {length[most]:,}",
        "Bots, shops or shared accounts; look at them, and drop or cut them before the split",
        f"user {tables.user_name(most)}",
    )
