"""SIDs that others made: LC-Rec's ``index.json``, which LETTER and MiniOneRec share.

``{"0": ["<a_12>", "<b_7>", …], …}``: item key -> tokens, a letter per level. Published files repeat
SIDs, may count items from 0 where the catalogue counts from 1, and MiniOneRec's code can add a rank
token to items that share a SID. Nothing is guessed or merged: what doesn't fit raises, and
collisions are reported. `SemanticIds.export_index` writes such a file.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.quantizers.item_indexes import draw_free
from genrec.quantizers.quantizer import CodeArray

MAX_CODE = (1 << 20) - 1  # codebooks become rows of a model's embedding: none is larger
MAX_LEVELS = 64

_TOKEN = re.compile(r"<([a-z]{1,2})_(0|[1-9][0-9]{0,6})>")
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class ImportedIndex:
    """An index file, in the order of the catalogue.

    Attributes:
        codes: (n_items, n_levels) int32; rows may repeat. A missing item's row is all -1, which
            `SemanticIds` refuses.
        codebook_sizes: number of codes per level.
        shared_items: groups of item ids that have one SID, each in catalogue order.
        missing: item ids of the catalogue that the file lacks.
        extra: keys of the file that are no item of the catalogue.
        ranked: items that carried a rank token. Where there are any, it is the last level, on which
            items without one have code 0.
    """

    codes: CodeArray
    codebook_sizes: tuple[int, ...]
    shared_items: tuple[tuple[int | str, ...], ...]
    missing: tuple[int | str, ...]
    extra: tuple[str, ...]
    ranked: int


def read_index(
    path: Path | str,
    item_ids: pl.Series,
    offset: int | None = None,
    codebook_sizes: Sequence[int] | None = None,
) -> ImportedIndex:
    """Read an ``index.json`` for a catalogue.

    Args:
        path: the file.
        item_ids: identifiers in catalogue order, int or str; a key is an identifier's text.
        offset: identifiers are ``key + offset`` (both integers): 1 if the file counts from 0 and
            the catalogue from 1. By default keys are identifiers. Integers that don't agree one to
            one then raise, since most would match the wrong item; 0 says that they are meant so.
        codebook_sizes: number of codes per level; default: the largest code of the file + 1. Give
            the quantizer's own, so that items which come later may use all of its codes.

    Raises:
        ValueError: the file isn't such an index (the message names the item and the token), or its
            keys don't match the catalogue.
    """
    raw = _read_json(path)
    rows, ranked = _parse_rows(raw, path)
    rows_of = dict(zip(raw, rows, strict=True))
    keys = _keys_of(item_ids, rows_of, offset, path)
    wanted = set(keys)
    extra = tuple(key for key in rows_of if key not in wanted)
    if len(extra) == len(rows_of):
        raise ValueError(
            f"no key of {path} is an item of the catalogue: keys are such as {extra[:3]}, items "
            f"such as {item_ids.head(3).to_list()}"
        )
    no_codes = (-1,) * len(rows[0])
    codes = np.array([rows_of.get(key, no_codes) for key in keys], dtype=np.int32)
    found = codes[:, 0] >= 0
    largest = np.array(rows, dtype=np.int32).max(axis=0).tolist()
    sizes = tuple(codebook_sizes) if codebook_sizes is not None else tuple(c + 1 for c in largest)
    if len(sizes) != len(largest) or any(c >= s for c, s in zip(largest, sizes, strict=True)):
        raise ValueError(f"codebook_sizes={sizes} don't hold the codes of {path}, up to {largest}")
    ids = item_ids.to_list()
    return ImportedIndex(
        codes=codes,
        codebook_sizes=sizes,
        shared_items=tuple(
            tuple(ids[row] for row in group) for group in _shared_groups(codes) if found[group[0]]
        ),
        missing=tuple(ids[row] for row in np.flatnonzero(~found)),
        extra=extra,
        ranked=ranked,
    )


def resolve_shared(
    codes: npt.NDArray[np.integer],
    codebook_sizes: Sequence[int],
    vectors: npt.NDArray[np.floating] | None = None,
    seed: int = 0,
) -> CodeArray:
    """Codes in which no two items are alike, with the fewest items moved.

    One item of each group keeps its SID. The others take free codes of the last level under the
    same prefix, drawn at random since imported codes come without distances; where the prefix is
    full, free SIDs under the next shorter one. `genrec.quantizers.collisions` does better where the
    quantizer is at hand.

    Args:
        codes: (n_items, n_levels), none missing.
        codebook_sizes: number of codes per level.
        vectors: item vectors (n_items, dim); the item nearest to its group's mean then stays.
            Without them the first one of the catalogue does.
        seed: of the draw.

    Returns:
        (n_items, n_levels) int32.

    Raises:
        ValueError: there are fewer SIDs than items, or the codes are not of these codebooks.
    """
    sizes = tuple(codebook_sizes)
    new = np.array(codes, dtype=np.int32)
    _check_resolvable(new, sizes, vectors)
    moving = rows_to_move(new, vectors)
    rng = np.random.default_rng(seed)
    for level in reversed(range(len(sizes))):
        if not moving.any():
            break
        _place_under_prefixes(new, sizes, level, moving, rng)
    assert not moving.any(), "the root has room for every item"
    return new


def rows_to_move(
    codes: CodeArray, vectors: npt.NDArray[np.floating] | None = None
) -> npt.NDArray[np.bool_]:
    """Which items give up a shared SID, (n_items,): all of a group but one, see `resolve_shared`.

    Args:
        codes: (n_items, n_levels).
        vectors: item vectors, (n_items, dim), or None.
    """
    moving = np.zeros(len(codes), dtype=bool)
    for group in _shared_groups(codes):
        stays = 0
        if vectors is not None:
            rows = vectors[group].astype(np.float64)
            stays = int(((rows - rows.mean(axis=0)) ** 2).sum(axis=1).argmin())
        moving[np.delete(group, stays)] = True
    return moving


def _place_under_prefixes(
    codes: CodeArray,
    sizes: tuple[int, ...],
    level: int,
    moving: npt.NDArray[np.bool_],
    rng: np.random.Generator,
) -> None:
    """Give moving items free codes below their first `level` codes, while there are; in place."""
    for group in _groups(codes[:, :level]):
        movers = group[moving[group]]
        if len(movers) == 0:
            continue
        taken = codes[group[~moving[group]], level:]
        movers = movers[: math.prod(sizes[level:]) - len(taken)]
        codes[movers, level:] = draw_free(rng, len(movers), sizes[level:], taken)
        moving[movers] = False


def _check_resolvable(
    codes: CodeArray, sizes: tuple[int, ...], vectors: npt.NDArray[np.floating] | None
) -> None:
    if codes.ndim != 2 or len(codes) == 0 or codes.shape[1] != len(sizes):
        raise ValueError(f"codes have shape {codes.shape}, codebooks {sizes} need one code each")
    if codes.min() < 0 or (codes >= np.array(sizes)).any():
        raise ValueError(
            f"a code lies outside its codebook (sizes {sizes}); -1 marks items that an imported "
            "index lacks: place or drop those first"
        )
    if len(codes) > math.prod(sizes):
        raise ValueError(
            f"{len(codes)} items exceed the {math.prod(sizes)} SIDs of codebooks {sizes}; add a "
            "level or give larger codebook_sizes"
        )
    if vectors is not None and (vectors.ndim != 2 or len(vectors) != len(codes)):
        raise ValueError(f"vectors have shape {vectors.shape}; {len(codes)} items need a row each")


def _groups(prefix: CodeArray) -> list[npt.NDArray[np.int64]]:
    """Rows of each distinct prefix, ascending; one group if the prefix is empty."""
    if prefix.shape[1] == 0:
        return [np.arange(len(prefix))]
    _, group, counts = np.unique(prefix, axis=0, return_inverse=True, return_counts=True)
    return np.split(np.argsort(group.ravel(), kind="stable"), np.cumsum(counts)[:-1])


def _shared_groups(codes: CodeArray) -> list[npt.NDArray[np.int64]]:
    """Rows that have one SID, per SID that several have, in the order of their first rows."""
    groups = [group for group in _groups(codes) if len(group) > 1]
    return sorted(groups, key=lambda group: int(group[0]))


def _read_json(path: Path | str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        if len(counts) < len(pairs):
            repeated = [key for key, count in counts.items() if count > 1]
            raise ValueError(f"{path} has several entries for {repeated[:3]}; keep one of each")
        return dict(pairs)

    try:
        # Numbers stay text: a huge one costs nothing, and none is wanted.
        raw = json.loads(Path(path).read_bytes(), object_pairs_hook=unique, parse_int=str)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict) or not raw:
        raise ValueError(
            f"{path} must be a JSON object of item -> tokens that isn't empty, such as "
            '{"0": ["<a_12>", "<b_7>"]}'
        )
    return raw


def _parse_rows(raw: dict[str, Any], path: Path | str) -> tuple[list[tuple[int, ...]], int]:
    """Codes of each entry, all of one length, and how many carried a rank token."""
    rows = [_parse_tokens(key, tokens, path) for key, tokens in raw.items()]
    lengths = Counter(map(len, rows))
    if len(lengths) == 1:
        return rows, 0
    n_levels, longest = min(lengths), max(lengths)
    shared = Counter(row[:n_levels] for row in rows)
    stray = [
        key
        for key, row in zip(raw, rows, strict=True)
        if len(row) > n_levels and shared[row[:n_levels]] == 1
    ]
    if longest != n_levels + 1 or stray:
        raise ValueError(
            f"SIDs in {path} have different lengths ({dict(sorted(lengths.items()))}); a last "
            "token that only some have must rank items that share the tokens before"
            + (f", but item {stray[0]!r} shares them with none" if stray else "")
        )
    return [row if len(row) == longest else (*row, 0) for row in rows], lengths[longest]


def _parse_tokens(key: str, tokens: Any, path: Path | str) -> tuple[int, ...]:
    if not isinstance(tokens, list) or not 1 <= len(tokens) <= MAX_LEVELS:
        raise ValueError(
            f"item {key!r} of {path} has {str(tokens)[:80]!r}; 1 to {MAX_LEVELS} tokens in a list "
            "are needed"
        )
    codes = []
    for level, token in enumerate(tokens):
        match = _TOKEN.fullmatch(token) if isinstance(token, str) else None
        if match is None or _level_of(match[1]) != level or int(match[2]) > MAX_CODE:
            raise ValueError(
                f"item {key!r} of {path} has {str(token)[:80]!r} as token {level + 1}; such tokens "
                f"are <a_12> on level 1, <b_7> on level 2, …, with codes 0 to {MAX_CODE}"
            )
        codes.append(int(match[2]))
    return tuple(codes)


def _level_of(letters: str) -> int:
    """Level of its letters, counted from 0: a…z, then aa, ab, … (`semantic_ids.level_name`)."""
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter) - ord("a") + 1
    return number - 1


def _keys_of(
    item_ids: pl.Series, rows_of: dict[str, Any], offset: int | None, path: Path | str
) -> list[str]:
    """Key of each item in the file."""
    if item_ids.null_count() or item_ids.n_unique() != len(item_ids) or len(item_ids) == 0:
        raise ValueError("item ids must be there, not null and distinct")
    texts = [str(item) for item in item_ids.to_list()]
    integers = all(map(_INTEGER.fullmatch, texts)) and all(map(_INTEGER.fullmatch, rows_of))
    if offset is not None:
        if not integers:
            raise ValueError(f"offset={offset} needs integer item ids and keys; leave it out")
        return [str(int(text) - offset) for text in texts]
    if integers and set(texts) != set(rows_of):
        raise ValueError(_offset_advice(texts, rows_of, path))
    return texts


def _offset_advice(texts: list[str], rows_of: dict[str, Any], path: Path | str) -> str:
    """What to say when integer keys are not the integer identifiers."""
    items, keys = {int(text) for text in texts}, {int(key) for key in rows_of}
    missing = len(items - keys)
    message = (
        f"{missing} of {len(items)} items have no key in {path}, and {len(keys - items)} keys no "
        f"item (items {min(items)}..{max(items)}, keys {min(keys)}..{max(keys)})"
    )
    for offset in sorted({1, -1, min(items) - min(keys), max(items) - max(keys)} - {0}, key=abs):
        lacking = sum(item - offset not in keys for item in items)
        if lacking == 0:
            return (
                f"{message}; with offset={offset} (item id = key + {offset}) all items match: give "
                "it if the file counts so, else offset=0"
            )
    return f"{message}; give the offset between them, 0 if the numbers are meant as they are"
