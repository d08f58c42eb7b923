"""Big files of JSON objects, read in pieces into text columns.

Four forms are told apart by the first record: JSON Lines, lines that are Python literals (Amazon
2014's metadata), objects one after another however they are broken into lines, and one JSON array.
Every value arrives as text: a string as it is, a number as written, a list or object as JSON, so
that a field whose type changes from line to line can't stop the reading.
"""

from __future__ import annotations

import ast
import codecs
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from genrec.data.readers.files import BOM, bad_json_line, blocks, existing

_CHUNK = 32 << 20  # bytes of text held at a time
_BATCH = 20_000  # decoded objects held at a time

LINES, LITERALS, OBJECTS = "lines", "literals", "objects"


@dataclass(frozen=True)
class JsonForm:
    """What a file of records looks like.

    Attributes:
        kind: LINES, LITERALS or OBJECTS.
        first: the first record.
    """

    kind: str
    first: dict[str, Any]


def json_form(path: Path | str) -> JsonForm:
    """Tell the form of a file by its first record.

    Raises:
        ValueError: there is none, or it can't be read.
    """
    path = existing(path)
    number, line = next(_numbered(path), (0, b""))
    if not line:
        raise ValueError(f"{path} is empty: it has no records")
    if not line.startswith(b"["):
        for kind, parse in ((LINES, _from_json), (LITERALS, _from_literal)):
            try:
                return JsonForm(kind, parse(line))
            except ValueError:
                continue
    for record in _objects(path):
        return JsonForm(OBJECTS, record)
    raise ValueError(f"{path} line {number}: it has no records")


def json_chunks(
    path: Path | str, form: JsonForm, fields: Sequence[str], chunk_bytes: int = _CHUNK
) -> Iterator[pl.DataFrame]:
    """Yield the records piece by piece as frames of text columns `fields`; absent values are null.

    Args:
        path: the file; .gz is unzipped on the way.
        form: from `json_form`.
        fields: names of the fields to keep.
        chunk_bytes: text that is parsed at once.

    Raises:
        ValueError: a record that can't be read, with its line; a gzip file that is cut short.
    """
    path = Path(path)
    if form.kind == LINES:
        for chunk in _whole_lines(path, chunk_bytes):
            if chunk.strip():
                yield _frame(chunk, path, fields)
        return
    records = _objects(path) if form.kind == OBJECTS else _literals(path)
    for batch in _batches(records):
        chosen = [{name: record.get(name) for name in fields} for record in batch]
        yield _frame("\n".join(json.dumps(record) for record in chosen).encode(), path, fields)


def _frame(lines: bytes, path: Path, fields: Sequence[str]) -> pl.DataFrame:
    try:
        return pl.read_ndjson(lines, schema=dict.fromkeys(fields, pl.String))
    except pl.exceptions.PolarsError as error:
        # Looking for the line reads the file once more, which only a failure pays for.
        reason = bad_json_line(path) or str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: {reason}; correct or remove it") from error


def _whole_lines(path: Path, chunk_bytes: int) -> Iterator[bytes]:
    """Blocks that end where a line ends, without the byte order mark."""
    rest: list[bytes] = []
    for number, block in enumerate(blocks(path, chunk_bytes)):
        if number == 0:
            block = block.removeprefix(BOM)
        end = block.rfind(b"\n") + 1
        if end:
            yield b"".join([*rest, block[:end]])
            rest = [block[end:]]
        else:
            rest.append(block)
    yield b"".join(rest)


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that aren't blank, with their numbers."""
    number = 0
    for chunk in _whole_lines(path, 1 << 20):
        for line in chunk.split(b"\n")[: None if not chunk.endswith(b"\n") else -1]:
            number += 1
            if line := line.strip():
                yield number, line


def _literals(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in _numbered(path):
        try:
            yield _either(line, _from_literal, _from_json)
        except ValueError as error:
            shown = line[:80].decode("utf-8", "replace")
            raise ValueError(
                f"{path} line {number} is neither a Python literal nor a JSON object ({error}): "
                f"{shown!r}; correct or remove it"
            ) from error


def _either(line: bytes, *parsers: Callable[[bytes], dict[str, Any]]) -> dict[str, Any]:
    """What the first parser that can reads; raises what the first one raised."""
    errors = []
    for parse in parsers:
        try:
            return parse(line)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _from_json(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError("it is no object")
    return record


def _from_literal(line: bytes) -> dict[str, Any]:
    try:
        record = ast.literal_eval(line.decode("utf-8"))
    except (SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError(str(error).splitlines()[0] if str(error) else "too deep") from error
    if not isinstance(record, dict):
        raise ValueError("it is no object")
    return record


def _objects(path: Path) -> Iterator[dict[str, Any]]:
    """Objects one after another, or in one array, however they are laid out."""
    decoder = json.JSONDecoder()
    text, at, line, wanted = "", 0, 1, 1 << 16
    stream = _decoded(path)
    while True:
        while at < len(text) and text[at] in " \t\r\n,[]\ufeff":
            line += text[at] == "\n"
            at += 1
        if at < len(text):
            try:
                record, end = decoder.raw_decode(text, at)
                failure = "" if isinstance(record, dict) else "it is no object"
            except (ValueError, RecursionError) as error:
                record, end, failure = None, at, str(error)
            if record is not None and not failure:
                yield record
                line += text.count("\n", at, end)
                at = end
                continue
        # Not a whole object yet: more text, twice as much each time, so that one long object
        # isn't parsed over and over.
        more = "".join(_taken(stream, wanted))
        if not more:
            if at < len(text):
                raise ValueError(
                    f"{path}: the record that begins on line {line} is not a JSON object "
                    f"({failure}): {text[at : at + 80]!r}; correct or remove it"
                )
            return
        text, at = text[at:] + more, 0
        wanted = max(1 << 16, len(text))


def _decoded(path: Path) -> Iterator[str]:
    decoder, place = codecs.getincrementaldecoder("utf-8")(), 0
    for block in blocks(path, 1 << 16):
        try:
            yield decoder.decode(block)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not utf-8 near offset {place}: {error.reason}; save it as UTF-8"
            ) from error
        place += len(block)


def _taken(stream: Iterator[str], wanted: int) -> Iterator[str]:
    for piece in stream:
        yield piece
        wanted -= len(piece)
        if wanted <= 0:
            return


def _batches(records: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for record in records:
        batch.append(record)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
