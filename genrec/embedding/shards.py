"""Encoding of many texts in shards on disk, so that a killed run goes on where it was.

A shard's file is named by its number and by a key over its texts and the encoder's settings:
a file that is there is right and whole, since it is written atomically, and anything that changes
its content changes its name.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from genrec.artifacts import sha256_json, write_bytes
from genrec.embedding.vectors import check_vectors

logger = logging.getLogger(__name__)

FOLDER = "shards"
Encode = Callable[[list[str]], npt.NDArray[np.floating]]


def encode_in_shards(
    texts: Sequence[str],
    encode: Encode,
    path: Path,
    settings: Mapping[str, Any],
    shard_size: int = 1024,
    earlier: Sequence[Path] = (),
) -> npt.NDArray[np.float32]:
    """Encode texts shard by shard, then put the shards together in one ``.npy`` file.

    Shards that an earlier call with the same texts and settings finished are not encoded again.
    They stay until `remove_shards`, since what comes after encoding may be killed, too.

    Args:
        texts: one per item.
        encode: gives (n, dim) for n texts.
        path: the file to write; shards go to the folder ``shards`` beside it.
        settings: all that decides what `encode` returns, as JSON values.
        shard_size: texts per shard; what is lost when a run is killed.
        earlier: folders in which earlier calls may have left shards beside their file; those that
            fit are read where they are.

    Returns:
        Read-only memory map of the file, (n_texts, dim) float32. Never more than a shard is held
        in memory.

    Raises:
        ValueError: no texts, or vectors that hold NaN or inf.
    """
    if not texts or shard_size < 1:
        raise ValueError(
            f"{len(texts)} texts in shards of {shard_size}; at least one of each is needed"
        )
    starts = range(0, len(texts), shard_size)
    parts = [list(texts[start : start + shard_size]) for start in starts]
    files = [_shard_file(path, number, part, settings) for number, part in enumerate(parts)]
    files = [_found(file, len(part), earlier) for file, part in zip(files, parts, strict=True)]
    have = [_complete(file, len(part)) for file, part in zip(files, parts, strict=True)]
    if any(have):
        logger.info("%d of %d shards were encoded before: they are kept", sum(have), len(have))
    with tqdm(total=len(texts), desc="encode", unit=" texts") as bar:
        for file, part, done in zip(files, parts, have, strict=True):
            if not done:
                _write_shard(file, part, encode)
            bar.update(len(part))
    _assemble(files, path, len(texts))
    return np.load(path, mmap_mode="r")


def remove_shards(path: Path) -> None:
    """Delete the shards of `path`, which holds all of their rows by now."""
    shutil.rmtree(path.parent / FOLDER, ignore_errors=True)


def _shard_file(path: Path, number: int, part: list[str], settings: Mapping[str, Any]) -> Path:
    key = sha256_json({"texts": part, "settings": dict(settings)})[:16]
    return path.parent / FOLDER / f"{number:05d}-{key}.npy"


def _found(file: Path, n_rows: int, earlier: Sequence[Path]) -> Path:
    """The shard's file, or a whole one of the same name that an earlier call left elsewhere."""
    places = [file, *(folder / FOLDER / file.name for folder in earlier)]
    return next((place for place in places if _complete(place, n_rows)), file)


def _complete(file: Path, n_rows: int) -> bool:
    try:
        return len(np.load(file, mmap_mode="r")) == n_rows
    except (FileNotFoundError, ValueError, EOFError):
        return False  # not there, or damaged from outside


def _write_shard(file: Path, part: list[str], encode: Encode) -> None:
    vectors = np.asarray(encode(part), dtype=np.float32)
    assert vectors.ndim == 2 and len(vectors) == len(part), vectors.shape
    check_vectors(vectors, f"vectors of shard {file.name[:5]}")
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    write_bytes(file, buffer.getvalue())


def _assemble(files: list[Path], path: Path, n_rows: int) -> None:
    """Copy shards through a memory map into one file, which takes its name when it is whole."""
    dim = np.load(files[0], mmap_mode="r").shape[1]
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        whole = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(n_rows, dim))
        start = 0
        for file in files:
            shard = np.load(file)
            whole[start : start + len(shard)] = shard
            start += len(shard)
        whole.flush()
        del whole
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
