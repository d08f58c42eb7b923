"""Users to make lists for: rows of a split, or anybody's table, read in parts.

A table of millions of users is never held whole: Parquet and Hugging Face datasets are read a
window of rows at a time, text files and large row groups are turned into small ones first. Item ids
become catalogue rows in a sorted index, so there is no work per row in Python. Longer than other
modules: each format of users' tables is checked by the same rules, which stand here together.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from genrec.artifacts import read_json, sha256_bytes, sha256_file, write_json
from genrec.columns import CANDIDATES, HISTORY, ITEM_ID, ROW_ID, SEEN, USER_ID
from genrec.data.readers.files import (
    ENDINGS,
    parquet_files,
    reading,
    require_columns,
    scan_file,
)
from genrec.data.readers.huggingface import is_saved_dataset, open_dataset
from genrec.data.readers.values import native_ids
from genrec.item_index import ItemIndex
from genrec.item_lists import ItemLists, list_series

logger = logging.getLogger(__name__)

UNKNOWN = "unknown_items"  # items of a row that are not in the catalogue
UNKNOWN_RULES = ("error", "drop")
WINDOW = 1 << 15  # rows of a table that are held at once
GROUP = 1 << 12  # rows of a row group of a copy: what is decoded to read a few
_COPY = ".users.parquet"
_HASH = ".users-hash.json"

Marks = tuple[tuple[str, int, int, int], ...]


class UserRows(Protocol):
    """Rows of users, each of which gets one list."""

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        ...

    def read(self, start: int, size: int) -> pl.DataFrame:
        """Rows ``start`` to ``start + size``, or fewer at the end.

        Returns:
            row_id, user_id, history_item_index (oldest first) and `unknown_items`; where they are
            to be followed also seen_item_index (rows not to be recommended) and candidates (the
            only rows that may be; null: all may). All lists hold catalogue rows.
        """
        ...


@dataclass(frozen=True)
class SplitRows:
    """Rows of a split, as `genrec.data.splits.read_split` gives them.

    Attributes:
        rows: the split rows.
        filter_seen: leave out what the user had before the target.
    """

    rows: pl.DataFrame
    filter_seen: bool

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.rows.height

    def read(self, start: int, size: int) -> pl.DataFrame:
        """See `UserRows.read`."""
        columns = [ROW_ID, USER_ID, HISTORY, *([SEEN] if self.filter_seen else [])]
        part = self.rows.slice(start, size).select(columns)
        return part.with_columns(pl.lit(0, pl.Int64).alias(UNKNOWN))


@dataclass(frozen=True)
class UserColumns:
    """What a table of users holds.

    Attributes:
        user: user id, a string or an integer; a user may have several rows.
        history: item ids, oldest first: a list, or text with `separator` between them. Null and
            empty: a user without history.
        exclude: further items that the user must not get, likewise; None: there is no such column.
        candidates: the only items that the user may get, likewise, but null (in a text file a field
            that is empty and not quoted): all of the catalogue. None: there is no such column.
        separator: between the ids of a list that is text.
    """

    user: str = USER_ID
    history: str = "history"
    exclude: str | None = None
    candidates: str | None = None
    separator: str = " "


class UserTable:
    """A table of users and the items that they had.

    Args:
        source: Parquet file, folder of them, CSV, TSV or JSON Lines (also gzipped), a folder that
            `Dataset.save_to_disk` wrote, or what `datasets.load_dataset` takes.
        catalog_ids: item ids of the catalogue, row for row.
        columns: which column is what.
        unknown_items: "error", or "drop" items that the catalogue lacks (counted per row).
        filter_seen: leave out the items of the history.
        scratch: folder for a Parquet copy in small row groups, made of text files (which need it)
            and of Parquet files with row groups of more than `WINDOW` rows.
        split: of a Hugging Face dataset.
        subset: configuration of one.
        marks: `source_marks` from before the source was hashed; default: from now.

    Raises:
        ValueError: no such source, no rows, a missing column, or one of another type, or the source
            changed since its marks were taken (so do reads of it).
    """

    def __init__(
        self,
        source: Path | str,
        catalog_ids: pl.Series,
        columns: UserColumns | None = None,
        unknown_items: str = "error",
        filter_seen: bool = True,
        scratch: Path | str | None = None,
        split: str = "train",
        subset: str | None = None,
        marks: Marks | None = None,
    ) -> None:
        self.source, self.columns = Path(source), columns or UserColumns()
        self._marks = source_marks(source) if marks is None else marks
        self.unknown_items, self.filter_seen = unknown_items, filter_seen
        if unknown_items not in UNKNOWN_RULES:
            raise ValueError(
                f"unknown_items={unknown_items!r} is not known; choose one of "
                f"{', '.join(UNKNOWN_RULES)}"
            )
        self._ids = catalog_ids
        self._indexes: dict[Any, ItemIndex] = {}  # by type: as they are, and as text
        c = self.columns
        self._wanted = {
            "user_column": c.user,
            "history_column": c.history,
            "exclude_column": c.exclude,
            "candidates_column": c.candidates,
        }
        self._files: list[Path] = []
        self._dataset: Any = None
        if is_table(source):
            self._files = _as_parquet(self.source, scratch, self._wanted, self.check_unchanged)
            frame = pl.scan_parquet(self._files, glob=False, hive_partitioning=False)
            with reading(self._files[0]):
                self._n_rows = int(frame.select(pl.len()).collect().item())
                names = frame.collect_schema().names()
        else:
            self._dataset = open_dataset(str(source), split, subset).with_format("arrow")
            self._n_rows, names = len(self._dataset), self._dataset.column_names
        require_columns(names, source, self._wanted)
        if not self._n_rows:
            raise ValueError(f"{source} is empty: it has no rows")
        self._window_start, self._window, self._next = -1, pl.DataFrame(), 0
        self.check_unchanged()

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self._n_rows

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: neither the window nor the indexes."""
        return {**self.__dict__, "_window_start": -1, "_window": pl.DataFrame(), "_indexes": {}}

    def _index(self, kind: Any) -> ItemIndex:
        if kind not in self._indexes:
            self._indexes[kind] = ItemIndex(self._ids.cast(kind))
        return self._indexes[kind]

    def read(self, start: int, size: int) -> pl.DataFrame:
        """See `UserRows.read`.

        Raises:
            ValueError: null ids, ids of another type than the catalogue's, or under "error" an
                item that the catalogue lacks; the message names the row.
        """
        stop = min(start + size, self.n_rows)
        ahead = start == self._next or start // WINDOW * WINDOW == self._window_start
        self._next = stop
        if not ahead:  # one shard of many: a whole window would be read for it alone
            return self._resolve(self._raw(start, stop - start), start)
        parts = []
        while start < stop:
            first = start // WINDOW * WINDOW
            if first != self._window_start:
                self._window = self._resolve(self._raw(first, WINDOW), first)
                self._window_start = first
            end = min(stop, first + WINDOW)
            parts.append(self._window.slice(start - first, end - start))
            start = end
        return pl.concat(parts)

    def check_unchanged(self) -> None:
        """Raise ValueError if the source's files aren't those that the marks were taken of.

        Rows that were read before a change and after it would be lists for two different tables.
        """
        if source_marks(self.source) != self._marks:
            raise ValueError(
                f"{self.source} was changed while it was read; start again with a file that stays"
            )

    def _raw(self, first: int, size: int) -> pl.DataFrame:
        """The named columns of some rows, as they lie in the source."""
        try:
            return self._scan(first, size)
        finally:  # also where a half-written file could not be read
            self.check_unchanged()

    def _scan(self, first: int, size: int) -> pl.DataFrame:
        names = _names(self._wanted)
        if self._dataset is not None:
            table = self._dataset[first : min(first + size, self.n_rows)]
            frame = pl.from_arrow(table.select(names))
            assert isinstance(frame, pl.DataFrame)
            return frame
        scanned = pl.scan_parquet(self._files, glob=False, hive_partitioning=False)
        try:
            with reading(self._files[0]):
                return scanned.select(names).slice(first, size).collect()
        except ValueError as error:
            if self._files[0].name != _COPY:
                raise
            self._files[0].unlink(missing_ok=True)
            raise ValueError(
                f"{error}; this copy of {self.source} is removed, start again to make another"
            ) from error

    def _resolve(self, raw: pl.DataFrame, first: int) -> pl.DataFrame:
        """Item ids -> catalogue rows."""
        c = self.columns
        # Text stays text: whether all of a column is numbers shows only at its end.
        users = native_ids(raw[c.user], self.source, first_row=first + 1).alias(USER_ID)
        number = pl.int_range(first, first + raw.height).cast(pl.String).str.zfill(10)
        row_ids = pl.select(("users-" + number).alias(ROW_ID))[ROW_ID]
        history, unknown = self._rows_of(raw[c.history], users, first)
        columns = [row_ids, users, history.alias(HISTORY)]
        seen = [history.alias("history")] if self.filter_seen else []
        if c.exclude is not None:
            excluded, more = self._rows_of(raw[c.exclude], users, first)
            seen, unknown = [*seen, excluded.alias("exclude")], unknown + more
        if seen:
            columns.append(pl.DataFrame(seen).select(pl.concat_list(pl.all()).alias(SEEN))[SEEN])
        if c.candidates is not None:
            candidates, more = self._rows_of(raw[c.candidates], users, first)
            limited = pl.when(raw[c.candidates].is_not_null()).then(candidates)
            columns.append(pl.select(limited.alias(CANDIDATES))[CANDIDATES])
            unknown = unknown + more
        return pl.DataFrame([*columns, pl.Series(UNKNOWN, unknown)])

    def _rows_of(
        self, lists: pl.Series, users: pl.Series, first: int
    ) -> tuple[pl.Series, np.ndarray]:
        """Lists of catalogue rows, and how many items of each list the catalogue lacks."""
        lists = self._item_lists(lists)
        lengths = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
        owner = np.repeat(np.arange(len(lists)), lengths)
        # Not `explode` alone: an empty list would become a null.
        items = lists.filter(pl.Series(lengths > 0)).explode().alias(ITEM_ID)
        if items.null_count():
            at = owner[int(items.is_null().arg_true()[0])]
            raise ValueError(
                f"{self.source} row {first + at + 1}: {lists.name!r} of user {users[int(at)]!r} "
                "holds a null item; remove it"
            )
        found = self._index(items.dtype).rows(items)
        known = found >= 0
        unknown = np.bincount(owner[~known], minlength=len(lists))
        if not known.all() and self.unknown_items == "error":
            at = int(np.flatnonzero(~known)[0])
            raise ValueError(
                f"{self.source} row {first + owner[at] + 1}: {lists.name!r} of user "
                f"{users[int(owner[at])]!r} holds {items[at]!r}, which is not in the catalogue "
                f"({int(unknown.sum())} such items in {int((unknown > 0).sum())} of the rows "
                f"{first + 1} to {first + len(lists)}; ids look like "
                f"{self._ids[0]!r}); leave them out, or set unknown_items: drop"
            )
        offsets = np.concatenate([[0], np.cumsum(lengths - unknown)])
        return list_series(pl.Series(lists.name, found[known]), offsets), unknown

    def _item_lists(self, column: pl.Series) -> pl.Series:
        """A column as lists of ids, of the catalogue's type or (split from text) of strings."""
        kind = self._ids.dtype
        inner = getattr(column.dtype, "inner", None)
        if column.dtype == pl.Null or inner == pl.Null:
            return column.cast(pl.List(kind))
        if column.dtype == pl.String:
            # Spaces at an end or twice in a row make no item.
            part = pl.element().str.strip_chars()
            return column.str.split(self.columns.separator).list.eval(part.filter(part != ""))
        if isinstance(column.dtype, pl.Array):
            column = column.arr.to_list()
        if inner is not None and inner.is_integer() and kind == pl.Int64:
            try:
                return column.cast(pl.List(pl.Int64))
            except pl.exceptions.InvalidOperationError as error:
                raise ValueError(
                    f"{self.source}: {column.name!r} ({column.dtype}) holds an id beyond 63 bits, "
                    "which no item of the catalogue has; remove it"
                ) from error
        if inner == pl.String and kind == pl.String:
            return column
        raise ValueError(
            f"{self.source}: {column.name!r} holds {column.dtype}; needed are lists of the "
            f"catalogue's item ids ({kind}, such as {self._ids[0]!r}), or text with "
            f"{self.columns.separator!r} between them"
        )


def is_table(source: Path | str) -> bool:
    """Whether a source of users is a table file or a folder of Parquet, not a dataset."""
    path = Path(source)
    if path.is_dir():
        return not is_saved_dataset(path) and any(path.rglob("*.parquet"))
    return any(path.name.lower().endswith((e, f"{e}.gz")) for e in ENDINGS)


def source_marks(source: Path | str) -> Marks:
    """What shows a change of a source's files: path, inode, size and time of change of each.

    A dataset that is no folder here has none: its cache is never written twice.
    """
    path = Path(source)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if path.is_dir() and is_table(path):  # what else lies there is not read
        files = parquet_files(path)
    marks = []
    for file in files:
        try:
            stat = file.stat()
        except FileNotFoundError:  # removed since it was listed: no mark is a change, too
            continue
        marks.append((str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(marks)


def source_sha256(source: Path | str, split: str = "train", subset: str | None = None) -> str:
    """Hash of the content of a source of users (of a dataset: its fingerprint)."""
    if not is_table(source):
        dataset = open_dataset(str(source), split, subset)
        return sha256_bytes(f"{dataset._fingerprint} {len(dataset)}".encode())
    path = Path(source)
    if path.is_dir():
        return sha256_bytes("".join(map(sha256_file, parquet_files(path))).encode())
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name a table of users or a dataset")
    return sha256_file(path)


def kept_sha256(
    source: Path | str, folder: Path | str, split: str = "train", subset: str | None = None
) -> str:
    """`source_sha256`, kept in a folder for other processes as long as the source stays the same.

    Args:
        source: as there.
        folder: of the job; it must exist.
        split: as there.
        subset: as there.
    """
    if not is_table(source):
        return source_sha256(source, split, subset)
    kept = Path(folder) / _HASH
    marks = [list(mark) for mark in source_marks(source)]
    try:
        found = read_json(kept)
        if marks and found["marks"] == marks:
            return str(found["sha256"])
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or a damaged one
        pass
    sha256 = source_sha256(source, split, subset)
    if marks == [list(mark) for mark in source_marks(source)]:
        write_json(kept, {"marks": marks, "sha256": sha256})
    return sha256


def _names(wanted: Mapping[str, str | None]) -> list[str]:
    """The columns that are read, each once."""
    return list(dict.fromkeys(name for name in wanted.values() if name is not None))


def _as_parquet(
    source: Path,
    scratch: Path | str | None,
    wanted: Mapping[str, str | None],
    check: Callable[[], None],
) -> list[Path]:
    """The Parquet files of a source, or a copy of its columns below `scratch`, made once.

    A row group is decoded whole whatever is read of it, so text and large row groups (pyarrow's
    default has a million rows) are copied into small ones. `check` raises if the source has
    changed; its copy is then not kept.
    """
    files: list[Path] = []
    if source.is_dir():
        files = parquet_files(source)
    elif source.suffix.lower() == ".parquet":
        scan_file(source)
        files = [source]
    if files and (scratch is None or _largest_group(files) <= WINDOW):
        return files
    if scratch is None:
        raise ValueError(f"{source} is text: name a folder for its Parquet copy")
    copy = Path(scratch) / _COPY
    if copy.exists() and not _is_parquet(copy):
        logger.warning("%s is damaged; %s is read again", copy, source)
        copy.unlink()
    if not copy.exists():
        partial = copy.with_name(f"{copy.name}.{os.getpid()}.partial")
        with reading(source):
            if files:
                frame = pl.scan_parquet(files, glob=False, hive_partitioning=False)
            else:
                frame = scan_file(source)
            require_columns(frame.collect_schema().names(), source, wanted)
            frame.select(_names(wanted)).sink_parquet(partial, row_group_size=GROUP)
        check()
        os.replace(partial, copy)
        logger.info("%s: read into %s", source, copy.name)
    return [copy]


def _largest_group(files: Sequence[Path]) -> int:
    """Rows of the largest row group of some Parquet files."""
    largest = 0
    for file in files:
        with reading(file):
            about = pq.read_metadata(file)
        groups = (about.row_group(i).num_rows for i in range(about.num_row_groups))
        largest = max(largest, *groups, 0)
    return largest


def _is_parquet(path: Path) -> bool:
    """Whether a file is a Parquet file with an end, that is, not cut short."""
    try:
        pl.scan_parquet(path, glob=False).collect_schema()
    except (pl.exceptions.PolarsError, OSError):
        return False
    return True


def remove_copy(scratch: Path | str) -> None:
    """Remove the Parquet copy of a source, when no process reads it any more."""
    (Path(scratch) / _COPY).unlink(missing_ok=True)


def count_allowed(part: pl.DataFrame, allowed: np.ndarray) -> np.ndarray:
    """How many items each row may get.

    Args:
        part: rows as `UserRows.read` gives them.
        allowed: whether the catalogue view allows each item. ``# (n_items,)``

    Returns:
        Number of items. ``# (rows,)``
    """
    n_items, n_rows = len(allowed), part.height
    counts = np.full(n_rows, int(allowed.sum()))
    candidates, limited = np.zeros(0, dtype=np.int64), np.zeros(n_rows, dtype=bool)
    if CANDIDATES in part.columns:
        limited = part[CANDIDATES].is_not_null().to_numpy()
        candidates = np.unique(ItemLists.from_column(part[CANDIDATES]).keys(n_items))
        candidates = candidates[allowed[candidates % n_items]]
        counts = np.where(limited, np.bincount(candidates // n_items, minlength=n_rows), counts)
    if SEEN in part.columns:
        gone = np.unique(ItemLists.from_column(part[SEEN]).keys(n_items))
        gone = gone[allowed[gone % n_items]]
        gone = gone[~limited[gone // n_items] | np.isin(gone, candidates)]
        counts = counts - np.bincount(gone // n_items, minlength=n_rows)
    return counts
