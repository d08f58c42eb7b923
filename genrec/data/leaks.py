"""The split linter: does any row know what it must not?

It looks at finished rows and the log only, not at how the rows were made, and stops at the first
kind of leak with an example.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import numpy as np
import polars as pl

from genrec.columns import (
    HISTORY,
    RELEVANT,
    ROW_ID,
    SEEN,
    SUPERVISE_FROM,
    TARGET,
    TARGET_POSITION,
    TARGET_TIME,
    USER_ID,
)
from genrec.data.split_rows import IntArray, UserSequences, places, row_blocks
from genrec.data.splits import GIVEN, LEAVE_ONE_OUT, PROTOCOLS, TIME_CUTOFF

_ITEM_COLUMNS = (TARGET, HISTORY, SEEN, RELEVANT)
_ROW_CONTENT = (USER_ID, HISTORY, TARGET, TARGET_TIME)


def check_splits(
    train: pl.DataFrame,
    valid: pl.DataFrame,
    test: pl.DataFrame,
    interactions: pl.DataFrame,
    protocol: str,
    n_items: int,
) -> None:
    """Raise ValueError with an example if the rows of a split leak.

    What is checked: row ids are unique; items are catalogue rows; each target stands in the log
    where its row says; a history is what came directly before the target, and seen items are
    exactly the distinct items before it; nothing that is held out is supervised, nor evaluated
    twice; and by protocol, leave-one-out holds out the last two places of a user, while for the
    others all of train is earlier than valid, and valid earlier than test. For time-cutoff,
    relevant items are the distinct items from the target to the end of its period at most. Given
    rows come without a log, so they are checked against each other (see `check_given`).

    Args:
        train: split rows, see `genrec.data.splits.Splits`.
        valid: split rows.
        test: split rows.
        interactions: the cleaned log; not read for given rows.
        protocol: one of `genrec.data.splits.PROTOCOLS`.
        n_items: rows of the catalogue.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(
            f"protocol={protocol!r} is not known; choose one of {', '.join(PROTOCOLS)}"
        )
    tables = {"train": train, "valid": valid, "test": test}
    ids = pl.concat([table[ROW_ID] for table in tables.values()])
    if (again := ids.filter(ids.is_duplicated())).len():
        raise ValueError(f"{again.len()} rows share a {ROW_ID}, for example {again[0]!r}")
    for name, table in tables.items():
        _check_catalogue(name, table, n_items)
    if protocol == GIVEN:
        check_given(tables)
        return
    log = UserSequences.of(interactions)
    place = {name: _target_places(name, table, log) for name, table in tables.items()}
    for name, table in tables.items():
        _check_history(name, table, place[name], log)
    for name in ("valid", "test"):
        _check_seen(name, tables[name], place[name], log, n_items)
        if (RELEVANT in tables[name].columns) != (protocol == TIME_CUTOFF):
            raise ValueError(f"{name}: the column {RELEVANT} belongs to {TIME_CUTOFF}, and only it")
    _check_held_out(tables, place, log)
    if protocol == LEAVE_ONE_OUT:
        _check_last_places(tables, place, log)
    else:
        _check_periods(tables)
    if protocol == TIME_CUTOFF:
        _check_relevant(tables, place, log, n_items)


def check_given(tables: Mapping[str, pl.DataFrame]) -> None:
    """Raise ValueError with an example if rows that a dataset brought leak.

    Without a log this is what rows can be asked: a training row supervises its target alone; seen
    items are distinct and hold the history; no training target is of the second in which
    validation starts or later, and no validation target later than the start of test (where times
    are known; a published cut between rows may lie within a second); and no training row has the
    user, history, target and time of a held-out one.

    Args:
        tables: split rows "train", "valid" and "test".
    """
    for name, table in tables.items():
        length, from_ = _lengths(table[HISTORY]), table[SUPERVISE_FROM].to_numpy()
        if (bad := from_ != length).any():
            row = int(np.flatnonzero(bad)[0])
            text = (
                f"it is supervised from {from_[row]}, but holds a history of {length[row]} items; "
                "given rows supervise their target alone"
            )
            _leak(name, table, row, text)
        if name == "train":
            continue
        history, seen = table[HISTORY], table[SEEN]
        if (bad := seen.list.n_unique() != seen.list.len()).any():
            row = int(bad.arg_true()[0])
            _leak(name, table, row, f"{SEEN} holds an item twice: {seen[row].to_list()}")
        if (bad := history.list.set_difference(seen).list.len() > 0).any():
            row = int(bad.arg_true()[0])
            item = next(i for i in history[row] if i not in set(seen[row]))
            _leak(name, table, row, f"{SEEN} lacks item {item} of its history")
    _check_given_times(tables)
    held = pl.concat([tables[name].select(*_ROW_CONTENT, ROW_ID) for name in ("valid", "test")])
    held = held.unique(_ROW_CONTENT, keep="first").rename({ROW_ID: "_held"})
    same = tables["train"].join(
        held, on=list(_ROW_CONTENT), how="left", nulls_equal=True, maintain_order="left"
    )["_held"]
    if (found := same.is_not_null()).any():
        row = int(found.arg_true()[0])
        text = f"row {same[row]!r} evaluates the same history and target; remove the training row"
        _leak("train", tables["train"], row, text)


def _check_given_times(tables: Mapping[str, pl.DataFrame]) -> None:
    """Parts follow each other, as far as times are known."""
    for earlier, later, slack in (
        ("train", "valid", 0),
        ("train", "test", 0),
        ("valid", "test", 1),
    ):
        start, time = tables[later][TARGET_TIME].min(), tables[earlier][TARGET_TIME]
        if start is None:
            continue
        assert isinstance(start, int)
        if (late := (time >= start + slack).fill_null(False)).any():
            row = int(late.arg_true()[0])
            text = (
                f"its target is of second {time[row]}, but {later} starts at second {start} "
                f"({int(late.sum())} such rows); remove them from {earlier}"
            )
            _leak(earlier, tables[earlier], row, text)


def _leak(name: str, table: pl.DataFrame, row: int, text: str) -> NoReturn:
    found = table.row(row, named=True)
    raise ValueError(f"{name} row {found[ROW_ID]!r} (user {found[USER_ID]!r}): {text}")


def _flat(column: pl.Series) -> IntArray:
    values = column.list.explode(keep_nulls=False, empty_as_null=False)
    return values.to_numpy().astype(np.int64)


def _lengths(column: pl.Series) -> IntArray:
    return column.list.len().fill_null(0).to_numpy().astype(np.int64)


def _check_catalogue(name: str, table: pl.DataFrame, n_items: int) -> None:
    for column in _ITEM_COLUMNS:
        if column not in table.columns:
            continue
        series = table[column]
        least = series.list.min() if column != TARGET else series
        most = series.list.max() if column != TARGET else series
        bad = (least < 0) | (most >= n_items) | (series.is_null())
        if bad.any():
            row = int(bad.arg_true()[0])
            value = table.row(row, named=True)[column]
            items = value if isinstance(value, list) else [value]
            item = next((i for i in items if i is None or not 0 <= i < n_items), None)
            text = f"{column} holds {item}, which is no row of the catalogue of {n_items} items"
            _leak(name, table, row, text)


def _target_places(name: str, table: pl.DataFrame, log: UserSequences) -> IntArray:
    """Place of each row's target in the log, once it is seen to be there."""
    users = pl.DataFrame({USER_ID: log.users.gather(log.start)}).with_row_index("_owner")
    owner = table.select(USER_ID).join(users, on=USER_ID, how="left", maintain_order="left")
    if (bad := owner["_owner"].is_null()).any():
        _leak(name, table, int(bad.arg_true()[0]), "the user is not in the interactions")
    number = owner["_owner"].to_numpy().astype(np.int64)
    position = table[TARGET_POSITION].to_numpy().astype(np.int64)
    outside = (position < 0) | (position >= log.length[number])
    if outside.any():
        row = int(np.flatnonzero(outside)[0])
        text = f"{TARGET_POSITION} {position[row]} is outside its {log.length[number[row]]} items"
        _leak(name, table, row, text)
    place = log.start[number] + position
    wrong = np.not_equal(log.items[place], table[TARGET].to_numpy())
    if log.time is not None:
        wrong |= np.not_equal(log.time[place], table[TARGET_TIME].fill_null(-1).to_numpy())
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        time = "" if log.time is None else f" at {log.time[place[row]]}"
        text = (
            f"its target is item {table[TARGET][row]} at {table[TARGET_TIME][row]}, the log has "
            f"item {log.items[place[row]]}{time} at position {position[row]}"
        )
        _leak(name, table, row, text)
    return place


def _check_history(name: str, table: pl.DataFrame, place: IntArray, log: UserSequences) -> None:
    """A history is what the user had directly before the target."""
    length = _lengths(table[HISTORY])
    position = place - log.start[log.owner[place]]
    from_ = table[SUPERVISE_FROM].to_numpy()
    if (bad := (length > position) | (from_ < 0) | (from_ > length)).any():
        row = int(np.flatnonzero(bad)[0])
        text = (
            f"its history holds {length[row]} items and is supervised from {from_[row]}, but the "
            f"target is the user's item number {position[row] + 1}"
        )
        _leak(name, table, row, text)
    for block in row_blocks(length):
        flat = _flat(table[HISTORY][block])
        expected = log.items[places(place[block] - length[block], place[block])]
        if (wrong := np.flatnonzero(flat != expected)).size:
            ends = np.cumsum(length[block])
            row = block.start + int(np.searchsorted(ends, wrong[0], side="right"))
            history = table[HISTORY][row].to_list()
            had = log.items[place[row] - position[row] : place[row]].tolist()
            if unknown := [item for item in history if item not in had]:
                text = f"its history holds item {unknown[0]}, which the user did not have before"
                _leak(name, table, row, text + _later(unknown[0], int(place[row]), log))
            text = f"the user's last items before the target are {had[-len(history) :]}"
            _leak(name, table, row, f"its history is {history}, but {text}")


def _later(item: int, place: int, log: UserSequences) -> str:
    """Says so if the user first met an item at a place or after it."""
    owner = log.owner[place]
    start, end = log.start[owner], log.start[owner] + log.length[owner]
    met = np.flatnonzero(log.items[start:end] == item)
    if met.size == 0:
        return "; the user never had it"
    if start + met[0] < place:
        return ""
    return f"; the user first had it at position {met[0]}, the target is at {place - start}"


def _check_seen(
    name: str, table: pl.DataFrame, place: IntArray, log: UserSequences, n_items: int
) -> None:
    """Seen items are exactly the distinct ones before the target.

    Both sets are compared by their sizes and by the sums of random 64-bit numbers drawn for the
    items, since comparing entry by entry would cost a sort of the largest column.
    """
    numbers = np.random.default_rng(0).integers(0, 2**64, n_items, dtype=np.uint64)
    first = log.first_meetings(n_items)
    count = np.concatenate([[0], np.cumsum(first)])
    met = np.where(first, numbers[log.items], np.uint64(0))
    zero = np.zeros(1, np.uint64)  # a plain 0 would make floats of the sums
    total = np.concatenate([zero, np.cumsum(met, dtype=np.uint64)])
    start = log.start[log.owner[place]]
    length = _lengths(table[SEEN])
    for block in row_blocks(length):
        flat = _flat(table[SEEN][block])
        ends = np.concatenate([[0], np.cumsum(length[block])])
        sums = np.concatenate([zero, np.cumsum(numbers[flat], dtype=np.uint64)])
        same = sums[ends[1:]] - sums[ends[:-1]] == total[place[block]] - total[start[block]]
        same &= length[block] == count[place[block]] - count[start[block]]
        if same.all():
            continue
        row = block.start + int(np.flatnonzero(~same)[0])
        had = set(log.items[start[row] : place[row]].tolist())
        seen = table[SEEN][row].to_list()
        if len(set(seen)) < len(seen):
            _leak(name, table, row, f"{SEEN} holds an item twice: {seen}")
        if more := sorted(set(seen) - had):
            text = f"{SEEN} holds item {more[0]}, which the user did not have before the target"
            _leak(name, table, row, text + _later(more[0], int(place[row]), log))
        text = f"{SEEN} lacks item {min(had - set(seen))}, which the user had before the target"
        _leak(name, table, row, text)


def _check_held_out(
    tables: dict[str, pl.DataFrame], place: dict[str, IntArray], log: UserSequences
) -> None:
    """No held-out target is evaluated twice, or lies at or before a supervised interaction."""
    held = np.concatenate([place["valid"], place["test"]])
    ids = pl.concat([tables["valid"][ROW_ID], tables["test"][ROW_ID]])
    order = np.argsort(held, kind="stable")
    if (twice := np.flatnonzero(np.diff(held[order]) == 0)).size:
        a, b = ids[int(order[twice[0]])], ids[int(order[twice[0] + 1])]
        raise ValueError(f"rows {a!r} and {b!r} evaluate the same interaction")
    first = np.full(len(log.start), len(log.items), dtype=np.int64)
    np.minimum.at(first, log.owner[held], held)
    late = place["train"] >= first[log.owner[place["train"]]]
    if late.any():
        row = int(np.flatnonzero(late)[0])
        held_place = first[log.owner[place["train"][row]]]
        other = ids[int(np.flatnonzero(held == held_place)[0])]
        text = (
            f"it supervises the user's interactions up to position "
            f"{tables['train'][TARGET_POSITION][row]}, but row {other!r} holds out position "
            f"{held_place - log.start[log.owner[held_place]]}"
        )
        _leak("train", tables["train"], row, text)


def _check_last_places(
    tables: dict[str, pl.DataFrame], place: dict[str, IntArray], log: UserSequences
) -> None:
    end = log.start + log.length
    for name, back in (("valid", 2), ("test", 1)):
        if (bad := place[name] != end[log.owner[place[name]]] - back).any():
            row = int(np.flatnonzero(bad)[0])
            which = "last" if back == 1 else "last but one"
            _leak(name, tables[name], row, f"its target is not the user's {which} interaction")


def _check_periods(tables: dict[str, pl.DataFrame]) -> None:
    """All of a part lies before the next one, whoever the user is."""
    for earlier, later in (("train", "valid"), ("train", "test"), ("valid", "test")):
        if tables[later].is_empty():
            continue
        start = int(tables[later][TARGET_TIME].to_numpy().min())
        time = tables[earlier][TARGET_TIME].to_numpy()
        if (late := np.flatnonzero(time >= start)).size:
            row = int(late[0])
            text = f"its target is of second {time[row]}, but {later} starts at second {start}"
            _leak(earlier, tables[earlier], row, text)


def _check_relevant(
    tables: dict[str, pl.DataFrame],
    place: dict[str, IntArray],
    log: UserSequences,
    n_items: int,
) -> None:
    """Relevant items: distinct, the target first, none from outside the row's period."""
    end = {name: (log.start + log.length)[log.owner[place[name]]] for name in ("valid", "test")}
    test_place = np.full(len(log.start), len(log.items), dtype=np.int64)
    test_place[log.owner[place["test"]]] = place["test"]
    end["valid"] = np.minimum(end["valid"], test_place[log.owner[place["valid"]]])
    for name, last in end.items():
        table, column = tables[name], tables[name][RELEVANT]
        if (several := table[USER_ID].is_duplicated()).any():
            text = f"{TIME_CUTOFF} has one row per user, and this user has several"
            _leak(name, table, int(several.arg_true()[0]), text)
        if (bad := column.list.first().ne_missing(table[TARGET])).any():
            text = f"{RELEVANT} must begin with the target"
            _leak(name, table, int(bad.arg_true()[0]), text)
        if (bad := column.list.n_unique() < column.list.len()).any():
            _leak(name, table, int(bad.arg_true()[0]), f"{RELEVANT} holds an item twice")
        owner = np.repeat(np.arange(table.height), last - place[name])
        inside = owner * n_items + log.items[places(place[name], last)]
        owner = np.repeat(np.arange(table.height), _lengths(column))
        flat = _flat(column)
        if (outside := np.flatnonzero(~np.isin(owner * n_items + flat, inside))).size:
            at = int(outside[0])
            text = f"{RELEVANT} holds item {flat[at]}, which is not of the row's period"
            _leak(name, table, int(owner[at]), text)
