"""Opening, decoding and scanning table files; every failure says which file and what to do.

Text and Parquet files are scanned lazily: only the columns that are asked for are ever held.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import polars as pl

logger = logging.getLogger(__name__)

ENDINGS = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": "", ".parquet": ""}
BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 20


def existing(path: Path | str) -> Path:
    """The path of a file that is there and not empty."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is not a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    return path


def first_existing(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of `names` that the folder holds as a file."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def require_files(folder: Path, names: Iterable[str], what: str) -> None:
    """Raise naming the files that a folder of some format lacks."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that holds {what}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; {what} has them")


def is_plain_text(path: Path | str) -> bool:
    """Whether the file's columns are text whatever they hold (CSV and TSV)."""
    return _ending(Path(path)) in (".csv", ".tsv")


def blocks(path: Path, size: int = _BLOCK) -> Iterator[bytes]:
    """The file's bytes in blocks, unzipped if it ends in .gz."""
    try:
        with _open(path) as stream:
            while block := stream.read(size):
                yield block
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}); copy it again") from error


def text_of(path: Path, encoding: str = "utf-8") -> str:
    """A whole file as text, for files that are small by their nature."""
    source = text_source(path, encoding, in_memory=True)
    assert isinstance(source, bytes), "asked for"
    return source.removeprefix(BOM).decode()


def text_source(path: Path, encoding: str, in_memory: bool = False) -> Path | bytes:
    """The file itself if it is UTF-8 (Polars reads it in pieces), else its text as UTF-8 bytes.

    Args:
        path: the file; .gz is unzipped.
        encoding: of its text.
        in_memory: return bytes in any case.

    Raises:
        ValueError: an encoding that isn't known, bytes that aren't it, NUL bytes.
    """
    try:
        codec = codecs.lookup(encoding)
    except LookupError as error:
        raise ValueError(
            f"encoding={encoding!r} is not known; try utf-8, latin-1 or cp1252"
        ) from error
    decoder, place = codec.incrementaldecoder(), 0
    keep = in_memory or codec.name != "utf-8"
    text: list[str] = []
    pending = 0
    try:
        for block in blocks(path):
            pending = len(decoder.getstate()[0])
            decoded = decoder.decode(block)
            if "\0" in decoded:
                raise ValueError(
                    f"{path} holds a NUL byte within offsets {place} to {place + len(block)}; if "
                    "it is UTF-16, set encoding: utf-16, else copy or export the file again"
                )
            if keep:
                text.append(decoded)
            place += len(block)
        pending = len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        where = place - pending + error.start
        raise ValueError(
            f"{path} is not {encoding}: byte 0x{error.object[error.start]:02x} at offset {where}; "
            "save it as UTF-8, or name its encoding, for example encoding: latin-1"
        ) from error
    return "".join(text).encode() if keep else path


def scan_file(path: Path | str, encoding: str = "utf-8") -> pl.LazyFrame:
    """Scan a table by its file ending; a folder is its Parquet files, in order of name.

    Text columns of CSV and TSV stay text. Nothing but the header (for JSON Lines: the schema) is
    read yet, except that text files are checked for bytes that aren't `encoding`.

    Raises:
        ValueError: no such file, an empty one, an ending that isn't known, wrong bytes.
    """
    path = Path(path)
    if path.is_dir():
        return _scan_parquet(path, parquet_files(path))
    existing(path)
    ending = _ending(path)
    if ending not in ENDINGS or (ending == ".parquet" and path.suffix.lower() == ".gz"):
        raise ValueError(
            f"{path} has an ending that is not known; use .csv, .tsv, .jsonl or .ndjson (also "
            "with .gz), .parquet, or a folder of .parquet files"
        )
    if ending == ".parquet":
        return _scan_parquet(path, [path])
    marked = next(blocks(path, len(BOM)), b"") == BOM
    if ENDINGS[ending]:
        return scan_text(path, ENDINGS[ending], encoding)
    source = text_source(path, encoding, in_memory=marked)
    if isinstance(source, bytes):
        source = source.removeprefix(BOM)
    with reading(path):
        frame = pl.scan_ndjson(source, infer_schema_length=None)
        frame.collect_schema()
    return frame


def scan_text(
    path: Path, separator: str, encoding: str = "utf-8", header: bool = True, quotes: bool = True
) -> pl.LazyFrame:
    """Scan a text table whose columns all stay text; without a header Polars numbers them."""
    source = text_source(path, encoding)
    if not source:
        raise ValueError(f"{path} is empty: it has no rows")
    with reading(path):
        frame = pl.scan_csv(
            source,
            separator=separator,
            infer_schema=False,
            has_header=header,
            quote_char='"' if quotes else None,
            glob=False,
        )
        frame.collect_schema()
    return frame


def parquet_files(folder: Path) -> list[Path]:
    """All Parquet files below a folder in order of name; hidden and `_` files don't count."""
    found = sorted(
        path
        for path in folder.rglob("*.parquet")
        if path.is_file()
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    )
    if not found:
        raise ValueError(f"{folder} has no .parquet files; give a table file or such a folder")
    return found


def collect(
    frame: pl.LazyFrame, path: Path | str, columns: Sequence[str] | None = None
) -> pl.DataFrame:
    """Read the named columns (None: all) of a scanned file; raises if it has no rows."""
    with reading(path):
        # A column asked for twice is read once.
        chosen = frame if columns is None else frame.select(list(dict.fromkeys(columns)))
        table = chosen.collect(engine="streaming")
    if table.height == 0:
        raise ValueError(f"{path} is empty: it has no rows")
    return table


def read_columns(
    frame: pl.LazyFrame, path: Path | str, wanted: Mapping[str, str | None]
) -> pl.DataFrame:
    """Read the columns that settings name (setting -> column), after checking that they exist."""
    require_columns(frame.collect_schema().names(), path, wanted)
    return collect(frame, path, [name for name in wanted.values() if name is not None])


def require_columns(
    names: Sequence[str], path: Path | str, wanted: Mapping[str, str | None]
) -> None:
    """Raise if a column is missing, naming its setting and the closest name."""
    for setting, name in wanted.items():
        if name is not None and name not in names:
            close = difflib.get_close_matches(name, names, 1, cutoff=0.4)
            hint = f"; did you mean {setting}: {close[0]}?" if close else f"; set {setting}"
            if len(names) == 1 and (found := set(names[0]) & set(";|\t")):
                hint = (
                    f"; the file looks separated by {found.pop()!r}: save it with commas, or with "
                    "tabs as .tsv"
                )
            raise ValueError(
                f"{path} has no column {name!r} ({setting}); it has {', '.join(names)}{hint}"
            )


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn what Polars raises on a file into a ValueError that names the file and the fault."""
    path = Path(path)
    ending = ".parquet" if path.is_dir() else _ending(path)
    try:
        yield
    except pl.exceptions.NoDataError as error:
        raise ValueError(f"{path} is empty: it has no rows") from error
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        if ending in (".jsonl", ".ndjson"):
            reason = bad_json_line(path) or reason
        elif ending != ".parquet":
            reason += "; look for a stray quote or separator there"
        elif path.is_dir():
            reason += "; all files of the folder need the same columns and types"
        raise ValueError(f"{path} can't be read as {ending[1:]}: {reason}") from error


def bad_json_line(path: Path) -> str | None:
    """Say which line of a JSON Lines file isn't a JSON object; None if each is one."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON value")

    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                text = line.removeprefix(BOM) if number == 1 else line
                if text.strip() and not isinstance(json.loads(text, parse_constant=refuse), dict):
                    raise ValueError("it is no object")
            except (ValueError, RecursionError) as error:
                shown = line[:80].decode("utf-8", "replace").rstrip()
                return f"line {number} is not a JSON object ({error}): {shown!r}"
    return None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _ending(path: Path) -> str:
    endings = [suffix.lower() for suffix in path.suffixes]
    zipped = endings[-1:] == [".gz"] and len(endings) > 1
    return endings[-2] if zipped else "".join(endings[-1:])


def _scan_parquet(path: Path, files: Sequence[Path]) -> pl.LazyFrame:
    # Folder names like date=2024-01-31 are columns.
    keyed = any("=" in part for file in files for part in file.relative_to(path).parts[:-1])
    with reading(path):
        frame = pl.scan_parquet(list(files), glob=False, hive_partitioning=keyed)
        frame.collect_schema()
    return frame
