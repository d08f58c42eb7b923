"""MiniOneRec's form (Kong et al. 2025): training, validation and test rows as they were split."""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from genrec.columns import ITEM_ID, TIMESTAMP, USER_ID
from genrec.data.readers.files import collect, existing, read_columns, scan_file
from genrec.data.readers.lcrec import items_of
from genrec.data.readers.raw_data import (
    PLAIN_INTEGER,
    RawData,
    checked,
    interaction_table,
    listed,
)
from genrec.data.readers.values import native_ids, text_ids

logger = logging.getLogger(__name__)

HISTORY = "history"
_WANTED = {
    "train": ("train.csv", "train.jsonl", "train_partial.jsonl", "train/*.csv"),
    "valid": ("valid.csv", "valid/*.csv"),
    "test": ("test.csv", "test/*.csv"),
    "items": ("items.json", "*.item.json", "index/*.item.json"),
}
_TIMES = "_times.csv"
_JSON_LIST = r"^\[\s*(?:(?:0|-?[1-9]\d*)\s*(?:,\s*(?:0|-?[1-9]\d*)\s*)*)?\]$"


def minionerec_files(
    folder: Path | str | None = None,
    *,
    train: Path | str | None = None,
    valid: Path | str | None = None,
    test: Path | str | None = None,
    items: Path | str | None = None,
) -> dict[str, Path]:
    """The files that are read, by role: train, valid, test, items and sidecars of times.

    Raises:
        ValueError: one is missing, or a folder holds several that could be it.
    """
    given = {"train": train, "valid": valid, "test": test, "items": items}
    files = {}
    for role, path in given.items():
        found = _found(Path(folder), role) if path is None and folder is not None else path
        if found is None:
            hint = (
                "MiniOneRec's training rows are not part of every copy: without them there is "
                "nothing to train on, and more than the held-out rows can't be rebuilt from them"
                if role == "train"
                else "it is part of MiniOneRec's release"
            )
            where = f"{folder} has none of {', '.join(_WANTED[role])}" if folder else "no folder"
            raise ValueError(f"the {role} file is missing ({where}); give {role}: <path>. {hint}")
        files[role] = existing(found)
    for role in ("train", "valid", "test"):
        times = files[role].with_name(files[role].stem + _TIMES)
        if files[role].suffix == ".csv" and times.is_file():
            files[f"{role}_times"] = times
    return files


def read_minionerec(
    folder: Path | str | None = None,
    *,
    train: Path | str | None = None,
    valid: Path | str | None = None,
    test: Path | str | None = None,
    items: Path | str | None = None,
) -> RawData:
    """Read MiniOneRec's rows, whose split is given, and their items.

    The CSV files have user_id, history_item_id (a list, oldest first) and item_id (the target);
    training rows may also be JSON Lines with user_id, history, target and timestamp. A file
    `<name>_times.csv` beside a CSV file holds the targets' times, row for row (columns user_id and
    timestamp).

    The interactions are those that the training rows imply: every target at its time, and what a
    history holds beyond the user's earlier targets, once, at the time of the first row that shows
    it and before that row's target in file order. Held-out rows add nothing to them.

    Args:
        folder: where the files are looked for under their usual names.
        train: the training rows, instead of the folder's.
        valid: the validation rows, instead of the folder's.
        test: the test rows, instead of the folder's.
        items: ``{"item": {title, description, brand, categories}}``, instead of the folder's.

    Raises:
        ValueError: a missing file, a list that can't be read, items that the catalogue lacks, or
            times that don't fit their rows.
    """
    files = minionerec_files(folder, train=train, valid=valid, test=test, items=items)
    catalog = items_of(files["items"])
    rows = {
        role: _rows(files[role], files.get(f"{role}_times")) for role in ("train", "valid", "test")
    }
    _check_items(rows, files, catalog[ITEM_ID])
    numbers = all(table[USER_ID].str.contains(PLAIN_INTEGER).all() for table in rows.values())
    kinds = {USER_ID: pl.Int64() if numbers else pl.String(), ITEM_ID: catalog[ITEM_ID].dtype}
    given = {
        role: table.with_columns(
            pl.col(USER_ID).cast(kinds[USER_ID]),
            pl.col(HISTORY).cast(pl.List(kinds[ITEM_ID])),
            pl.col(ITEM_ID).cast(kinds[ITEM_ID]),
        )
        for role, table in rows.items()
    }
    log = implied_interactions(given["train"])
    raw = checked(log, catalog, None, "raise", files["train"], files["items"])
    return RawData(raw.interactions, raw.catalog, None, given)


def implied_interactions(rows: pl.DataFrame) -> pl.DataFrame:
    """The interactions that training rows imply, in their order; see `read_minionerec`.

    Args:
        rows: user_id, history, item_id, timestamp.
    """
    rows = rows.with_row_index("row")
    targets = rows.select("row", USER_ID, ITEM_ID, TIMESTAMP, pl.lit(1).alias("part"))
    first = targets.group_by(USER_ID, ITEM_ID).agg(pl.col("row").min().alias("first"))
    shown = (
        rows.filter(pl.col(HISTORY).list.len() > 0)
        .select("row", USER_ID, pl.col(HISTORY).alias(ITEM_ID), TIMESTAMP, pl.lit(0).alias("part"))
        .explode(ITEM_ID)
        .join(first, on=[USER_ID, ITEM_ID], how="left", maintain_order="left")
        .filter(pl.col("first").is_null() | (pl.col("first") >= pl.col("row")))
        .unique([USER_ID, ITEM_ID], keep="first", maintain_order=True)
        .drop("first")
    )
    log = pl.concat([shown, targets]).sort("row", "part", maintain_order=True)
    again = pl.struct(USER_ID, ITEM_ID, TIMESTAMP).is_first_distinct()
    log = log.filter(again | pl.col(TIMESTAMP).is_null())
    return interaction_table(log[USER_ID], log[ITEM_ID], [log[TIMESTAMP]])


def _found(folder: Path, role: str) -> Path | None:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of MiniOneRec's files")
    for pattern in _WANTED[role]:
        found = [path for path in sorted(folder.glob(pattern)) if not path.name.endswith(_TIMES)]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"{folder} has several files for {role}: {names}; give {role}: <path>")
        if found:
            logger.info("%s rows are read from %s", role, found[0])
            return found[0]
    return None


def _rows(path: Path, times: Path | None) -> pl.DataFrame:
    """user_id, history and item_id as text, timestamp in seconds or null, in file order."""
    if path.suffix == ".csv":
        wanted = {"user": USER_ID, "history": "history_item_id", "target": ITEM_ID}
        table = read_columns(scan_file(path), path, wanted)
        history = _id_lists(table["history_item_id"], path)
        moments = _moments(times, table[USER_ID]) if times else None
        target = table[ITEM_ID]
    else:
        scanned = scan_file(path)
        wanted = {"user": USER_ID, "history": "history", "target": "target"}
        timed = "timestamp" in scanned.collect_schema().names()
        table = read_columns(scanned, path, wanted | ({"time": "timestamp"} if timed else {}))
        kind = table["history"].dtype
        if not isinstance(kind, pl.List):
            raise ValueError(f"{path}: 'history' holds {kind}; write a list of item ids")
        history = table["history"].cast(pl.List(pl.String))
        moments, target = table["timestamp"] if timed else None, table["target"]
    empty = history.is_null() | history.list.eval(pl.element().is_null()).list.any()
    if empty.any():
        row = int(empty.arg_true()[0]) + 1
        raise ValueError(f"{path} row {row}: the history is null or holds a null; correct it")
    if moments is not None and not (moments.dtype.is_integer() and moments.null_count() == 0):
        raise ValueError(f"{path}: timestamps must be whole seconds, one on every row")
    seconds = moments.cast(pl.Int64) if moments is not None else None
    return pl.DataFrame(
        [
            native_ids(table[USER_ID], path, "string").alias(USER_ID),
            history.alias(HISTORY),
            native_ids(target, path, "string").alias(ITEM_ID),
            pl.Series(TIMESTAMP, [None], dtype=pl.Int64).new_from_index(0, table.height)
            if seconds is None
            else seconds.alias(TIMESTAMP),
        ]
    )


def _id_lists(column: pl.Series, path: Path) -> pl.Series:
    """Lists of ids that were written as text, JSON or a Python literal, as lists of text."""
    if column.str.strip_chars().str.contains(_JSON_LIST).all():
        return column.str.json_decode(pl.List(pl.Int64)).cast(pl.List(pl.String))
    lists = []
    for number, cell in enumerate(column.to_list(), 1):
        try:
            lists.append(_id_list(cell))
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(
                f"{path} row {number}: {column.name} {str(cell)[:60]!r} is not a list of ids; "
                "write [12, 34] or ['a', 'b']"
            ) from error
    return pl.Series(column.name, lists, dtype=pl.List(pl.String))


def _id_list(cell: str | None) -> list[str]:
    try:
        value = ast.literal_eval(cell or "")
    except (ValueError, SyntaxError):
        value = json.loads(cell or "")
    if not isinstance(value, list) or not all(isinstance(i, int | str) for i in value):
        raise ValueError("not a list of ids")
    return [str(i) for i in value]


def _moments(path: Path, users: pl.Series) -> pl.Series:
    """Times of a sidecar, after checking that its rows are those of the file beside it."""
    table = collect(scan_file(path), path)
    for name in (USER_ID, "timestamp"):
        if name not in table.columns:
            raise ValueError(f"{path} has no column {name!r}; it needs user_id and timestamp")
    if table.height != len(users):
        raise ValueError(
            f"{path} has {table.height} rows, the file beside it {len(users)}; they must go row "
            "for row"
        )
    other = table[USER_ID] != users
    if other.any():
        row = int(other.arg_true()[0])
        raise ValueError(
            f"{path} row {row + 1} is of user {table[USER_ID][row]!r}, the file beside it has "
            f"{users[row]!r} there; they must go row for row"
        )
    moments = text_ids(table["timestamp"])
    if moments.dtype != pl.Int64 or moments.null_count():
        raise ValueError(f"{path}: timestamps must be whole seconds, one on every row")
    return moments


def _check_items(
    rows: Mapping[str, pl.DataFrame], files: Mapping[str, Path], items: pl.Series
) -> None:
    known = items.cast(pl.String).implode()
    for role, table in rows.items():
        used = pl.concat([table[ITEM_ID], table[HISTORY].explode().drop_nulls().alias(ITEM_ID)])
        unknown = used.filter(~used.is_in(known)).unique(maintain_order=True)
        if len(unknown):
            raise ValueError(
                f"{files[role]} has {len(unknown)} items that {files['items']} lacks: "
                f"{listed(unknown)}; use the files of one release"
            )
