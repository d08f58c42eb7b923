"""Shards of recommendation lists: Parquet files that say whose they are and whether they are whole.

A shard's name holds its rows, ``recommendations-<first>-<last>.parquet``. Its Parquet metadata
(key ``genrec``) hold the fingerprint of the settings and inputs it was made from, its row range,
some counts, and a hash of the table. Written whole under its final name, it is found again after
a kill and made only once; a cut or damaged one is noticed, and one of another run is refused.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from genrec.artifacts import write_bytes

logger = logging.getLogger(__name__)

PREFIX = "recommendations"
DAMAGED = "damaged"  # beginning of the names of shards that were set aside
_KEY = b"genrec"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ShardInfo:
    """What a shard says about itself.

    Attributes:
        fingerprint: of the settings and inputs.
        start: first row.
        stop: the row behind its last.
        counts: users, lists' items and what else was counted; see `genrec.generation`.
        sha256: of the table's content; see `table_sha256`.
    """

    fingerprint: str
    start: int
    stop: int
    counts: dict[str, int] = field(default_factory=dict)
    sha256: str = ""


def shard_name(start: int, stop: int) -> str:
    """File name of the shard of rows ``start`` to ``stop - 1``."""
    return f"{PREFIX}-{start:010d}-{stop - 1:010d}.parquet"


def table_sha256(table: pl.DataFrame) -> str:
    """Hex SHA-256 of a table's column names, types and values, however it lies in memory.

    Covers what such tables hold: numbers, booleans, strings, and lists of numbers; no nulls.
    """
    digest = hashlib.sha256()
    for column in table.get_columns():
        assert not column.null_count(), f"{column.name} has nulls"
        digest.update(f"{column.name}\0{column.dtype}\0{len(column)}\0".encode())
        if column.dtype == pl.String:
            digest.update(column.str.len_bytes().to_numpy().tobytes())
            digest.update(column.str.join("").item().encode())
            continue
        if isinstance(column.dtype, pl.List):
            digest.update(column.list.len().to_numpy().tobytes())
            column = column.explode()
        digest.update(column.to_numpy().tobytes())
    return digest.hexdigest()


def write_shard(path: Path | str, table: pl.DataFrame, info: ShardInfo) -> ShardInfo:
    """Write a shard atomically and durably.

    Args:
        path: where to; see `shard_name`.
        table: its rows.
        info: what is known but the hash.

    Returns:
        The info with the hash.

    Raises:
        ValueError: the disk is full (finished shards stay as they are).
    """
    info = ShardInfo(info.fingerprint, info.start, info.stop, info.counts, table_sha256(table))
    arrow = table.to_arrow(compat_level=pl.CompatLevel.oldest())
    text = json.dumps(asdict(info), sort_keys=True)
    arrow = arrow.replace_schema_metadata({_KEY: text.encode()})
    buffer = io.BytesIO()
    pq.write_table(arrow, buffer, compression="zstd")
    with enough_space(path):
        write_bytes(path, buffer.getvalue())
        _sync_folder(Path(path).parent)
    return info


def find_shard(path: Path | str, fingerprint: str, start: int, stop: int) -> ShardInfo | None:
    """The info of a shard that is there and whole; a damaged one is set aside.

    Args:
        path: its file.
        fingerprint: that it must have.
        start: first row it must have.
        stop: the row behind its last.

    Returns:
        None if there is none, or none any more.

    Raises:
        ValueError: it belongs to another run, or holds other rows.
    """
    path = Path(path)
    if not path.exists():
        return None
    fault = None
    try:
        table = pq.ParquetFile(path).read()
        text = (table.schema.metadata or {}).get(_KEY)
        info = None if text is None else ShardInfo(**json.loads(text))
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        if info is not None and table_sha256(frame) != info.sha256:
            fault = "its content does not have the hash that it names"
    except (pa.ArrowException, pl.exceptions.PolarsError, OSError, TypeError, ValueError) as error:
        fault = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if fault is not None:
        _set_aside(path, fault)
        return None
    if info is None or (info.fingerprint, info.start, info.stop) != (fingerprint, start, stop):
        made = "no genrec metadata" if info is None else (
            f"rows {info.start} to {info.stop - 1} of run {info.fingerprint[:12]}"
        )  # fmt: skip
        raise ValueError(
            f"{path} is of another run: it has {made}, this one needs rows {start} to {stop - 1} "
            f"of run {fingerprint[:12]}; move it away, or use another folder"
        )
    return info


def read_info(path: Path | str) -> ShardInfo:
    """The info of a shard that is known to be whole; reads its metadata alone."""
    return ShardInfo(**json.loads(pq.read_schema(path).metadata[_KEY]))


@contextmanager
def enough_space(path: Path | str) -> Iterator[None]:
    """Turn the error of a full disk, quota or file size limit into one that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise ValueError(
            f"{path} can't be written ({error.strerror}): the disk is full, or a quota or a limit "
            "is reached; make room and start the same command again, which keeps all finished "
            "shards"
        ) from error


def _set_aside(path: Path, fault: str) -> None:
    number = 1
    while (target := path.with_name(f"{DAMAGED}-{number}-{path.name}")).exists():
        number += 1
    os.replace(path, target)
    logger.warning("%s is damaged (%s); kept as %s and made again", path.name, fault, target.name)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
