"""Splits: the protocols' names, leave-one-out, the hash of a split, and reading a run's split.

`genrec.data.time_splits` has the protocols that cut by time, `genrec.data.given_splits` that of
datasets which bring their rows, `genrec.data.leaks` the linter.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.artifacts import require, stage_folder
from genrec.columns import USER_ID
from genrec.data.split_rows import (
    UserSequences,
    check_history,
    held_out_rows,
    train_counts,
    train_rows,
)

logger = logging.getLogger(__name__)

LEAVE_ONE_OUT = "leave-one-out"
GLOBAL_TIME = "global-time"
TIME_CUTOFF = "time-cutoff"
GIVEN = "given"
PROTOCOLS = (LEAVE_ONE_OUT, GLOBAL_TIME, TIME_CUTOFF, GIVEN)
SPLITS = ("train", "valid", "test")
TEST_READS = "test_reads.jsonl"

_HASH_ROWS = 1 << 18  # rows that are hashed at once


@dataclass(frozen=True)
class Splits:
    """Split rows, and what the split says of the data.

    Attributes:
        train: row_id, user_id, history_item_index, target_item_index, supervise_from,
            target_timestamp, target_position.
        valid: the same columns, `seen_item_index`, and for time-cutoff `relevant_item_index`.
        test: the same columns as `valid`.
        train_count: interactions of each catalogue item in the training part, shape (n_items,).
        train_only_users: users who are in `train`, but neither in `valid` nor in `test`.
        protocol: one of `PROTOCOLS`.
        boundaries: "valid_from", "test_from" (and "test_until") as ISO times in UTC; a period
            starts with its first second. Empty for leave-one-out. Of given rows: the first
            target times, where they are known.
        shares: share of the interactions that lie in the part or period "train", "valid", "test"
            (of given rows: of the targets).
        dropped: interactions that are neither supervised nor evaluated, by reason.
        tied_test_targets: share of test rows where the tie rule, not the clock, says which of two
            interactions of the same second is the target; None without timestamps.
    """

    train: pl.DataFrame
    valid: pl.DataFrame
    test: pl.DataFrame
    train_count: npt.NDArray[np.int32]
    train_only_users: int
    protocol: str = LEAVE_ONE_OUT
    boundaries: dict[str, str] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    tied_test_targets: float | None = None

    def sha256(self) -> str:
        """Hash of the content of all rows (see `content_sha256`)."""
        return content_sha256({name: getattr(self, name) for name in SPLITS})


def leave_one_out(
    interactions: pl.DataFrame,
    n_items: int,
    max_history: int = 20,
    min_history: int = 1,
    window_step: int | None = None,
) -> Splits:
    """Hold out each user's last item for test and the last but one for validation.

    The rest is the training sequence (see `train_rows`). A valid or test row has the last
    `max_history` items before its target as history (for test: train and validation), and all
    earlier ones in `seen_item_index`. Users with fewer than ``min_history + 2`` interactions are in
    train only.

    Args:
        interactions: the cleaned log (`CleanData.interactions`): users in blocks, ordered by
            position.
        n_items: rows of the catalogue.
        max_history: items that a history holds at most.
        min_history: interactions that a user needs before a held-out target.
        window_step: see `train_rows`.

    Raises:
        ValueError: `max_history`, `min_history` or `window_step` out of range, or a log that isn't
            ordered.
    """
    check_history(max_history, min_history)
    log = UserSequences.of(interactions)
    evaluated = log.length >= min_history + 2  # one item to test, one to validate
    train_length = np.where(evaluated, log.length - 2, log.length)
    train_only = int((~evaluated).sum())
    if train_only:
        logger.info(
            "%d of %d users have fewer than %d interactions: train only",
            train_only, len(log.start), min_history + 2,
        )  # fmt: skip
    end = (log.start + log.length)[evaluated]
    total, held = max(len(log.items), 1), int(evaluated.sum())
    shares = {"train": 1 - 2 * held / total, "valid": held / total, "test": held / total}
    tied = None
    if log.moment is not None and held:
        tied = float((log.moment[end - 1] == log.moment[end - 2]).mean())
    return Splits(
        train_rows(log, train_length, max_history, window_step),
        held_out_rows("valid", log, end - 2, n_items, max_history),
        held_out_rows("test", log, end - 1, n_items, max_history),
        train_counts(log, train_length, n_items),
        train_only,
        shares=shares,
        tied_test_targets=tied,
    )


def content_sha256(tables: Mapping[str, pl.DataFrame]) -> str:
    """Hash of the content of tables, the same on every machine and for every Parquet writer.

    SHA-256 over the tables in the order given, of each its columns by name. A column adds the text
    ``table/column/kind/rows`` (kind: integer, text or list) and a line feed; then for all rows a
    byte, 1 for a value and 0 for null; then, for text and lists, each row's number of bytes or
    entries as int64 (0 for null); then the values: integers and entries of lists as int64 (0 for
    null), text as UTF-8. All numbers are little-endian. The order of rows counts.

    Raises:
        ValueError: a column of another type.
    """
    digest = hashlib.sha256()
    for table, frame in tables.items():
        for name in sorted(frame.columns):
            column = frame[name]
            kind = _kind(column)
            digest.update(f"{table}/{name}/{kind}/{len(column)}\n".encode())
            blocks = [column[i : i + _HASH_ROWS] for i in range(0, len(column), _HASH_ROWS)]
            for block in blocks:
                digest.update(block.is_not_null().cast(pl.UInt8).to_numpy().tobytes())
            if kind != "integer":
                for block in blocks:
                    size = block.str.len_bytes() if kind == "text" else block.list.len()
                    digest.update(size.fill_null(0).to_numpy().astype("<i8").tobytes())
            for block in blocks:
                digest.update(_values(block, kind))
    return digest.hexdigest()


def _kind(column: pl.Series) -> str:
    dtype = column.dtype
    if dtype.is_integer():
        return "integer"
    if dtype == pl.String:
        return "text"
    if isinstance(dtype, pl.List) and dtype.inner.is_integer():  # type: ignore[union-attr]
        return "list"
    raise ValueError(f"column {column.name!r} is {dtype}; splits hold integers, text and lists")


def _values(block: pl.Series, kind: str) -> bytes:
    if kind == "text":
        return "".join(block.drop_nulls().to_list()).encode()
    if kind == "list":
        block = block.drop_nulls().list.explode(keep_nulls=False, empty_as_null=False)
    return block.fill_null(0).to_numpy().astype("<i8").tobytes()


def read_split(run_dir: Path | str, split: str, stage: str, **details: Any) -> pl.DataFrame:
    """Read the rows of a split of a run; the one way in which a stage does.

    Reading test is noted in ``<run_dir>/test_reads.jsonl``: how often the test rows were looked at
    belongs to a result. A line holds time (UTC), stage, split, split_sha256 (of test.parquet, as
    in prepare's manifest), rows, and `details`.

    Args:
        run_dir: the run; its prepare stage must be complete.
        split: "train", "valid" or "test".
        stage: who reads.
        details: further facts for the line, such as the system that is scored.

    Raises:
        ValueError: an unknown split, prepare is not complete, or the line can't be written.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not known; choose one of {', '.join(SPLITS)}")
    prepare = require(run_dir, "prepare")
    rows = pl.read_parquet(stage_folder(run_dir, "prepare") / f"{split}.parquet", glob=False)
    if split == "test":
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "stage": stage,
            "split": split,
            "split_sha256": prepare.outputs["test.parquet"]["sha256"],
            "rows": rows.height,
            **details,
        }
        _append(Path(run_dir) / TEST_READS, json.dumps(line, default=str) + "\n")
    return rows


def rows_of_user(rows: pl.DataFrame, user: str, split: str) -> pl.DataFrame:
    """The rows of one user, by the user's id as text.

    Raises:
        ValueError: there is none.
    """
    users = rows[USER_ID].cast(pl.String)
    mine = rows.filter(users == user)
    if mine.is_empty():
        raise ValueError(
            f"user {user!r} has no row in the {split} split; users look like "
            f"{', '.join(users.head(3))}"
        )
    return mine


def _append(path: Path, line: str) -> None:
    """Append in a single write, so that lines of processes that read at once don't mix."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)
    except OSError as error:
        raise ValueError(
            f"{path} can't be written ({error.strerror}), and test rows are read only where that "
            "is noted; make the run folder writable, or copy it"
        ) from error
