"""Checks of the data linter on ids and order: what ids give away, sorted histories, ties."""

from __future__ import annotations

import numpy as np
import polars as pl

from genrec.columns import HISTORY, TARGET, TARGET_POSITION, TARGET_TIME, USER_ID
from genrec.data.lint_tables import (
    DAY,
    SIGNIFICANT,
    Finding,
    LintTables,
    first_value,
    folded_titles,
    graded,
    id_order,
    near_by_chance,
    not_run,
    rank_correlation,
    shown,
    target_times_missing,
    times_missing,
    user_z,
)
from genrec.data.split_rows import IntArray
from genrec.data.splits import GIVEN

# |rank correlation| of ids with first appearance. Ids that a shop gives to new products follow it,
# too, but not exactly: beyond NUMBERED the log itself was numbered.
CORRELATED, NUMBERED = 0.3, 0.98
BEYOND_POPULARITY = 0.1  # more correlation than in the shuffled log
NEIGHBOURS = 5  # ids on either side of the last item's: a list of ten
STEP_SHARE = 0.001  # of the catalogue: what counts as a small step between two ids
STEP_RATIO = 1.5  # small steps, to what a shuffled history has
BESIDE = 0.01  # HR@10 of the ids beside the last item's
SORTED_LOOK, SORTED_BAD = 0.55, 0.75  # share of pairs that ascend, or that descend
TIES_LOOK, TIES_BAD = 0.05, 0.5


def check_order(tables: LintTables) -> list[Finding]:
    """All checks of this module."""
    titles = folded_titles(tables)
    by_title = np.where(titles.is_null(), -1, id_order(titles.fill_null(""))[0])
    return [
        item_ids_against_the_log(tables),
        small_id_steps(tables),
        targets_beside_the_last_id(tables),
        user_ids_against_time(tables),
        sorted_histories(tables, "item id", tables.id_order),
        sorted_histories(tables, "title", by_title),
        tied_targets(tables),
    ]


def item_ids_against_the_log(tables: LintTables) -> Finding:
    """Do item ids follow the items' first appearance, by time or reading user after user?

    P5's sequential indexing and files numbered like it give an item its number when the walk
    through the users first meets it, in a held-out interaction too. Popular items turn up early in
    any order, so ids that follow popularity are told apart by the same log, shuffled.
    """
    name, log = "item ids against first appearance", tables.log
    if len(log.items) == 0:
        return not_run(name, "there are no interactions")
    orders = {"reading user after user": np.arange(len(log.items))}
    if log.time is not None:
        orders["by time"] = log.time
    orders["in the shuffled log"] = np.random.default_rng(0).permutation(len(log.items))
    found = {}
    for order, values in orders.items():
        present, first = first_value(log.items, values, tables.n_items)
        found[order] = rank_correlation(tables.id_order[present], first)
    shuffled, _ = found.pop("in the shuffled log")
    rho, z = max(found.values(), key=lambda pair: abs(pair[0]))
    text = ", ".join(f"{r:+.3f} (z {z_of:+.0f}) {order}" for order, (r, z_of) in found.items())
    text = f"rank correlation {text}; {shuffled:+.3f} in the shuffled log, from popularity alone"
    _, first = first_value(log.items, orders["reading user after user"], tables.n_items)
    earliest = present[np.argsort(first)[:5]]
    return graded(
        name,
        abs(rho),
        CORRELATED,
        NUMBERED,
        text,
        "Ids say when, or beside whom, an item turned up, in held-out interactions too. Never let "
        "a model see ids or catalogue row numbers, nor break ties of scores by them; make a P5 "
        "index from the training rows",
        "the log begins with items " + ", ".join(tables.item_name(int(i)) for i in earliest),
        abs(z) >= SIGNIFICANT and abs(rho - shuffled) >= BEYOND_POPULARITY,
    )


def small_id_steps(tables: LintTables) -> Finding:
    """Are neighbours in a history closer by id than the same history shuffled?

    A step is small if the ids are 1 … w places apart, w a thousandth of the catalogue. Shuffling
    has an exact mean: a history of n items in which P pairs are close has 2P / n small steps.
    """
    name, log, pairs = "small steps between item ids", tables.log, tables.pairs
    if len(pairs) == 0:
        return not_run(name, "no user has two interactions")
    width = max(1, round(STEP_SHARE * tables.n_items))
    order = tables.id_order[log.items]
    step = np.abs(order[pairs + 1] - order[pairs])
    small = (step >= 1) & (step <= width)
    found = np.bincount(log.owner[pairs], weights=small, minlength=len(log.start))
    # Sorted within users, the ids that are up to `width` above one lie in one run behind it.
    span = tables.n_items + width + 1
    key = np.sort(log.owner * span + order)
    close = np.searchsorted(key, key + width, "right") - np.searchsorted(key, key, "right")
    expected = 2 * np.bincount(key // span, weights=close, minlength=len(log.start)) / log.length
    share, shuffled = found.sum() / len(pairs), expected.sum() / len(pairs)
    z = user_z(found - expected)
    chance = near_by_chance(order, order, width, tables.n_items)
    ratio = share / shuffled if shuffled else 1.0
    at = int(pairs[np.argmax(small)])
    return graded(
        name,
        float(ratio),
        STEP_RATIO,
        None,
        f"{share:.2%} of the steps are at most {width} ids wide, {shuffled:.2%} if each history is "
        f"shuffled (ratio {ratio:.2f}, z {z:+.0f}), {chance:.2%} between any two interactions",
        "The number of an item says what stands beside it in a history. Never let a model see ids "
        "or catalogue row numbers",
        f"user {tables.user_name(int(log.owner[at]))} goes from item "
        f"{tables.item_name(int(log.items[at]))} to {tables.item_name(int(log.items[at + 1]))}",
        z >= SIGNIFICANT,
    )


def targets_beside_the_last_id(tables: LintTables) -> Finding:
    """How good are the ten ids around the last item's as recommendations?

    Chance is exact: the same targets dealt out to the test rows at random.
    """
    name = "targets beside the last item's id"
    rows = tables.test.select(pl.col(HISTORY).list.last().alias("last"), TARGET, USER_ID)
    rows = rows.drop_nulls("last")
    if rows.is_empty():
        return not_run(name, "no test row has a history")
    last = tables.id_order[rows["last"].to_numpy()]
    target = tables.id_order[rows[TARGET].to_numpy()]
    step = np.abs(target - last)
    hit = (step >= 1) & (step <= NEIGHBOURS)
    rate = float(hit.mean())
    chance = near_by_chance(last, target, NEIGHBOURS, tables.n_items)
    spread = float(np.sqrt(max(chance * (1 - chance), 1e-12) / rows.height))
    z = (rate - chance) / spread
    row = rows.row(int(np.argmax(hit)), named=True)
    return graded(
        name,
        rate,
        BESIDE,
        None,
        f"recommending the ten ids around the last item's hits {rate:.2%} of the test targets, "
        f"{chance:.2%} by chance (z {z:+.0f})",
        "A model that sees ids or catalogue row numbers gets these hits for nothing; keep ids out "
        "of prompts, indexes and tie-breaks, and put this baseline beside any that uses them",
        f"user {shown(row[USER_ID])}: after item {tables.item_name(row['last'])} comes "
        f"{tables.item_name(row[TARGET])}",
        z >= SIGNIFICANT and rate >= 2 * chance,
    )


def user_ids_against_time(tables: LintTables) -> Finding:
    """Do user ids follow the users' first interaction?"""
    name, log = "user ids against time", tables.log
    if why := times_missing(tables):
        return not_run(name, why)
    assert log.time is not None
    order, kind = id_order(log.users.gather(log.start))
    rho, z = rank_correlation(order, log.time[log.start])
    return graded(
        name,
        abs(rho),
        CORRELATED,
        None,
        f"rank correlation {rho:+.3f} (z {z:+.0f}) of user ids (as {kind}) with users' first time",
        "A prompt that holds the user id tells when the user came; leave user ids out of prompts",
        significant=abs(z) >= SIGNIFICANT,
    )


def sorted_histories(tables: LintTables, by: str, key: IntArray) -> Finding:
    """Do interactions of one moment stand in the order of a catalogue column?

    If the order within a moment means nothing, a pair of neighbours with different keys ascends
    with probability 1/2.

    Args:
        tables: the tables.
        by: what the key is, for the text.
        key: place of each catalogue item in the order of that column, -1 where it has none; shape
            (n_items,).
    """
    name, log, pairs = f"histories sorted by {by}", tables.log, tables.pairs
    if (key < 0).all():
        return not_run(name, f"no item has a {by}")
    value = key[log.items]
    keep = (value[pairs] != value[pairs + 1]) & (np.minimum(value[pairs], value[pairs + 1]) >= 0)
    if tables.moment is not None:
        keep &= tables.moment[pairs] == tables.moment[pairs + 1]
    pairs = pairs[keep]
    if len(pairs) == 0:
        if tables.moment is not None:
            text = f"no user has two different ones within one {tables.resolution}"
            return Finding(name, "ok", None, None, text)
        return not_run(name, "no user has two different ones")
    up = value[pairs + 1] > value[pairs]
    share = float(up.mean())
    z = user_z(np.bincount(log.owner[pairs], weights=np.where(up, 0.5, -0.5)))
    counted = f"of {len(pairs):,} neighbouring pairs"
    at = int(pairs[np.argmax(up == (share > 0.5))])
    example = (
        f"user {tables.user_name(int(log.owner[at]))}: item "
        f"{tables.item_name(int(log.items[at]))}, then {tables.item_name(int(log.items[at + 1]))}"
    )
    if tables.moment is None:
        text = (
            f"{share:.1%} {counted} of whole histories ascend, 50% by chance (z {z:+.0f})"
            f"{_of_known_items(tables, pairs, up)}; without times it can't be told whether the "
            "file sorts the items of one moment (Amazon's 2014 files do, by product code), numbers "
            "them in this order, or people buy so; bring the times if you have them"
        )
        plain = max(share, 1 - share) < SORTED_LOOK or abs(z) < SIGNIFICANT
        if plain:
            return Finding(name, "not run", share, SORTED_LOOK, text)
        return Finding(name, "look", share, SORTED_LOOK, text, example)
    return graded(
        name,
        max(share, 1 - share),
        SORTED_LOOK,
        SORTED_BAD,
        f"{share:.1%} {counted} of one {tables.resolution} ascend, 50% by chance (z {z:+.0f})",
        "The order within a moment is the file's sorting, not what happened; say so beside "
        "results, and look at the ties at the target",
        example,
        abs(z) >= SIGNIFICANT,
    )


def _of_known_items(tables: LintTables, pairs: IntArray, up: np.ndarray) -> str:
    """The share among items that an earlier user had first: numbering can't have sorted those."""
    log = tables.log
    first = np.full(tables.n_items, len(log.items))
    np.minimum.at(first, log.items, np.arange(len(log.items)))
    begin = log.start[log.owner[pairs]]
    known = (first[log.items[pairs]] < begin) & (first[log.items[pairs + 1]] < begin)
    if not known.any():
        return ""
    return f"; {up[known].mean():.1%} where an earlier user of the file had both items first"


def tied_targets(tables: LintTables) -> Finding:
    """How often does the tie rule, not the clock, pick the test target?"""
    name = "ties at the test target"
    if why := target_times_missing(tables):
        return not_run(name, why)
    shares = [_tied_share(tables, unit) for unit in (1, DAY)]
    share = shares[1] if tables.resolution == "day" else shares[0]
    text = f"{share:.1%} of the test targets share their {tables.resolution} with another "
    text += "interaction of the user"
    if tables.resolution != "day":
        text += f", {shares[1]:.1%} their day"
    return graded(
        name,
        share,
        TIES_LOOK,
        TIES_BAD,
        text,
        "There the order of the file says which one is the target and which is history; keep the "
        "tie rule, state it and this share beside results",
    )


def _tied_share(tables: LintTables, unit: int) -> float:
    """Share of test targets that share a moment of `unit` seconds with something of the user."""
    log = tables.log
    # Users of the log come first, so that their numbers are the log's.
    parts = (tables.train, tables.valid, tables.test)
    users = [log.users.gather(log.start), *(table[USER_ID] for table in parts)]
    numbers = pl.DataFrame([pl.concat(users).unique(maintain_order=True)]).with_row_index("_user")

    def moments(rows: pl.DataFrame) -> tuple[IntArray, IntArray]:
        timed = rows.filter(pl.col(TARGET_TIME).is_not_null())
        owner = timed.join(numbers, on=USER_ID, how="left", maintain_order="left")["_user"]
        return owner.to_numpy().astype(np.int64), timed[TARGET_TIME].to_numpy() // unit

    if unit == 1 and tables.protocol != GIVEN:  # also what seconds don't tell apart
        assert tables.moment is not None
        user = tables.test.join(numbers, on=USER_ID, how="left", maintain_order="left")["_user"]
        place = log.start[user.to_numpy()] + tables.test[TARGET_POSITION].to_numpy()
        return float((np.bincount(tables.moment)[tables.moment[place]] >= 2).mean())
    if tables.protocol == GIVEN:  # the log lacks what is held out, and some times
        had = [moments(table) for table in parts]
    else:
        assert log.time is not None
        had = [(log.owner, log.time // unit)]
    low = min(int(times.min()) for _, times in had if len(times))
    span = max(int(times.max()) for _, times in had if len(times)) - low + 1
    keys = np.sort(np.concatenate([number * span + times - low for number, times in had]))
    owner, time = moments(tables.test)
    key = owner * span + time - low
    return float((np.searchsorted(keys, key, "right") - np.searchsorted(keys, key) >= 2).mean())
