"""Shards of recommendation lists: Parquet files that say whose they are and whether they are whole.

A shard's name holds its rows, ``recommendations-<first>-<last>.parquet``. Its Parquet metadata
(key ``genrec``) hold the fingerprint of the settings and inputs it was made from, its row range,
some counts, and a hash of all its bytes. Written whole under its final name, it is found again
after a kill and made only once; a cut or damaged one is noticed, one of another run is refused.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from genrec.artifacts import sha256_bytes, write_bytes

logger = logging.getLogger(__name__)

PREFIX = "recommendations"
DAMAGED = "damaged"  # beginning of the names of shards that were set aside
_KEY = b"genrec"
_NAMED = b'"sha256": "'  # what stands before the hash
_ZEROS = "0" * 64
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class ShardInfo:
    """What a shard says about itself.

    Attributes:
        fingerprint: of the settings and inputs.
        start: first row.
        stop: the row behind its last.
        counts: users, lists' items and what else was counted; see `genrec.generation.jobs`.
        sha256: of the file's bytes, with zeros in the place of this hash.
    """

    fingerprint: str
    start: int
    stop: int
    counts: dict[str, int] = field(default_factory=dict)
    sha256: str = ""


def shard_name(start: int, stop: int) -> str:
    """File name of the shard of rows ``start`` to ``stop - 1``."""
    return f"{PREFIX}-{start:010d}-{stop - 1:010d}.parquet"


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
    text = json.dumps(asdict(replace(info, sha256=_ZEROS)), sort_keys=True)
    arrow = table.to_arrow(compat_level=pl.CompatLevel.oldest())
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, arrow.schema, compression="zstd") as writer:
        writer.write_table(arrow)
        writer.add_key_value_metadata({_KEY: text.encode()})
    data = buffer.getvalue()
    digest, place = sha256_bytes(data), _place_of_hash(data)
    data = data[:place] + digest.encode() + data[place + len(digest) :]
    with enough_space(path):
        write_bytes(path, data)
        _sync_folder(Path(path).parent)
    return replace(info, sha256=digest)


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
    data = path.read_bytes()
    info, place = None, _place_of_hash(data)
    if place >= 0:
        named = data[place : place + len(_ZEROS)]
        blank = data[:place] + _ZEROS.encode() + data[place + len(_ZEROS) :]
        if sha256_bytes(blank).encode() != named:
            _set_aside(path, "its bytes don't have the hash that it names")
            return None
        info = read_info(path)
    elif fault := _fault_of_stranger(path, data):
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
    return ShardInfo(**json.loads(pq.read_metadata(path).metadata[_KEY]))


def _fault_of_stranger(path: Path, data: bytes) -> str:
    """What is wrong with a file without a hash; empty for a whole one that somebody else made."""
    if b'"fingerprint": "' in data:
        return "its metadata are damaged"
    try:
        pq.read_metadata(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        return str(error).strip().splitlines()[0]
    return ""


def _place_of_hash(data: bytes) -> int:
    """Where the hash stands in a shard's bytes, -1 if nowhere: in the metadata, behind all data."""
    found = data.rfind(_NAMED)
    return found if found < 0 else found + len(_NAMED)


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
