"""What every quantizer can do, and the greedy walk down the levels that they share.

A quantizer maps a vector into its own latent space and describes each level by distances: how far
what the prefix leaves over is from each code. Encoding, collision resolution and the placement of
new items need nothing else, so they work alike for residual, hierarchical, product and RQ-VAE
codes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.int32]

BLOCK_CELLS = 2**24  # of a matrix that is held at once, such as distances: 64 MB of float32
ROOM = 50  # SIDs an item below which a map is called tight
CROWDED = 0.05  # share of the items, below which tight first codes are not worth a word
LARGEST = 1e15  # of an input value: squares of larger ones overflow when they are summed
FINITE = float(np.finfo(np.float32).max)


class Levels(Protocol):
    """What the walk down the levels needs of a quantizer."""

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes per level."""
        ...

    @property
    def dim(self) -> int:
        """Dimensions of the vectors that it encodes."""
        ...

    def project(self, vectors: FloatArray) -> FloatArray:
        """Vectors (n, dim) in the space of the codebooks, (n, latent_dim) float32."""
        ...

    def level_distances(self, latents: FloatArray, prefix: CodeArray, level: int) -> FloatArray:
        """Squared distance of what a prefix leaves over to each code of the next level.

        Args:
            latents: from `project`, (n, latent_dim).
            prefix: codes of the levels before, (n, level).
            level: counted from 0.

        Returns:
            (n, codebook_sizes[level]) float32; inf for a code that may not follow this prefix.
        """
        ...

    def level_bias(self, level: int) -> FloatArray | None:
        """What a balanced quantizer adds to the distances when it encodes, (size,); else None."""
        ...


class Quantizer(Levels, Protocol):
    """A fitted quantizer; `fit` is a class method whose settings differ by kind."""

    kind: ClassVar[str]  # its name in files and configs

    @property
    def seed(self) -> int:
        """What it was fitted with."""
        ...

    def encode(self, vectors: npt.NDArray[np.floating]) -> CodeArray:
        """Codes of vectors (n, dim), (n, n_levels) int32; collisions are possible."""
        ...

    def level_costs(self, latents: FloatArray, prefix: CodeArray, level: int) -> FloatArray:
        """What each code of `level` costs in squared distance of the latents, (n, size).

        As `level_distances`, which encoding goes by, but always in the units of the latents: on the
        last level the squared error of `reconstruct`, up to a constant for each row.
        """
        ...

    def reconstruct(self, codes: CodeArray) -> FloatArray:
        """Latents (n, latent_dim) that codes (n, n_levels) stand for."""
        ...

    def decode(self, codes: CodeArray) -> FloatArray:
        """Reconstructed vectors (n, dim) in the space of the input."""
        ...

    def save(self, path: Path | str) -> None:
        """Write one safetensors file."""
        ...

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote."""
        ...


def encode_by_levels(quantizer: Levels, vectors: npt.NDArray[np.floating]) -> CodeArray:
    """Codes of the nearest code at each level in turn, in blocks of bounded memory.

    Args:
        quantizer: anything that has `project`, `level_distances` and `level_bias`.
        vectors: (n, dim), any float type; may be a memory map.

    Returns:
        (n, n_levels) int32; the lower code wins a tie.

    Raises:
        ValueError: wrong shape, or NaN or inf in a row.
    """
    check_input(vectors, quantizer.dim)
    sizes = quantizer.codebook_sizes
    codes = np.empty((len(vectors), len(sizes)), dtype=np.int32)
    for block in row_blocks(len(vectors), max(quantizer.dim, *sizes)):
        rows = np.asarray(vectors[block], dtype=np.float32)
        check_finite(rows, block.start, LARGEST)
        latents = quantizer.project(rows)
        for level in range(len(sizes)):
            distances = quantizer.level_distances(latents, codes[block, :level], level)
            bias = quantizer.level_bias(level)
            if bias is not None:
                distances = distances + bias
            codes[block, level] = distances.argmin(axis=1)
    return codes


def row_blocks(n_rows: int, width: int) -> Iterator[slice]:
    """Consecutive slices of rows, so that a matrix of that width holds at most `BLOCK_CELLS`."""
    rows = max(1, BLOCK_CELLS // width)
    for start in range(0, n_rows, rows):
        yield slice(start, min(start + rows, n_rows))


def squared_distances(rows: FloatArray, centroids: FloatArray) -> FloatArray:
    """Squared Euclidean distances (n, n_centroids) by one matrix product, never below zero."""
    distances = rows @ (-2.0 * centroids.T)
    distances += (rows**2).sum(axis=1, keepdims=True)
    distances += (centroids**2).sum(axis=1)
    return np.maximum(distances, 0.0, out=distances)


def check_input(vectors: npt.NDArray[np.floating], dim: int | None = None) -> None:
    """Raise ValueError unless vectors are a non-empty (n, dim) float array."""
    if vectors.ndim != 2 or 0 in vectors.shape or vectors.dtype.kind != "f":
        raise ValueError(
            f"vectors have shape {vectors.shape} and dtype {vectors.dtype}; a non-empty float "
            "(n_items, dim) is needed"
        )
    if dim is not None and vectors.shape[1] != dim:
        raise ValueError(
            f"vectors have {vectors.shape[1]} dimensions, the quantizer was fitted on {dim}; use "
            "vectors of the same encoder"
        )


def check_finite(rows: FloatArray, first_row: int = 0, largest: float = FINITE) -> None:
    """Raise ValueError naming the first row that holds NaN, inf or a value beyond `largest`."""
    # Without a temporary array of the rows' size; NaN makes both comparisons false.
    bad = ~((rows.max(axis=1) <= largest) & (rows.min(axis=1) >= -largest))
    if bad.any():
        first = int(bad.argmax())
        what = f"values beyond {largest:g}" if np.isfinite(rows[first]).all() else "NaN or inf"
        raise ValueError(
            f"{int(bad.sum())} vectors hold {what}, the first is row {first_row + first}; mend or "
            "drop those items"
        )


def check_codes(codes: npt.NDArray[np.integer], codebook_sizes: tuple[int, ...]) -> None:
    """Raise ValueError unless codes are (n, n_levels) and inside their codebooks."""
    if codes.dtype.kind not in "iu":
        raise ValueError(f"codes are {codes.dtype}; integers are needed")
    if codes.ndim != 2 or codes.shape[1] != len(codebook_sizes):
        raise ValueError(
            f"codes have shape {codes.shape}, the quantizer has {len(codebook_sizes)} levels; are "
            "they of another catalogue's quantizer?"
        )
    if len(codes) and (codes.min() < 0 or (codes >= np.array(codebook_sizes)).any()):
        raise ValueError(
            f"a code lies outside its codebook (sizes {codebook_sizes}); are the codes of another "
            "quantizer?"
        )


def check_settings(codebook_sizes: tuple[int, ...], n_init: int, max_fill: float | None) -> None:
    """Raise ValueError for settings that no k-means quantizer can be fitted with."""
    if not codebook_sizes or min(codebook_sizes) < 2:
        raise ValueError(
            f"codebook sizes {tuple(codebook_sizes)}: give at least one level, each of 2 codes or "
            "more"
        )
    if n_init < 1:
        raise ValueError(f"n_init={n_init} must be at least 1")
    if max_fill is not None and not 1 <= max_fill < math.inf:
        raise ValueError(
            f"max_fill={max_fill} must be a number of at least 1 (1: all codes equally full) or "
            "null (no cap)"
        )


def check_distinct(rows: FloatArray, codebook_sizes: tuple[int, ...]) -> None:
    """Raise ValueError if a codebook has more codes than there are distinct rows."""
    largest = max(codebook_sizes)
    if largest <= len(rows) and len(np.unique(rows[: 4 * largest], axis=0)) >= largest:
        return  # spares the sort of the whole sample
    distinct = len(np.unique(rows, axis=0))
    if largest > distinct:
        raise ValueError(
            f"codebook_size={largest} exceeds the {distinct} distinct item vectors; use at most "
            f"{distinct}"
        )


def check_capacity(n_items: int, codebook_sizes: tuple[int, ...]) -> str | None:
    """Advice if the SID space is tight for the catalogue, else None.

    Below some fifty SIDs an item the last levels fill up, items collide and are moved to codes that
    don't describe them.

    Raises:
        ValueError: there are fewer SIDs than items.
    """
    sids = math.prod(codebook_sizes)
    shape = " x ".join(map(str, codebook_sizes))
    if sids < n_items:
        raise ValueError(
            f"{n_items:,} items exceed the {sids:,} SIDs of {shape} codes; "
            f"{_roomier(n_items, codebook_sizes)}"
        )
    if sids >= ROOM * n_items:
        return None
    return (
        f"{shape} codes give {sids / n_items:.1f} SIDs an item, fewer than {ROOM}; expect "
        f"collisions that move items to unfitting codes: {_roomier(n_items, codebook_sizes)}"
    )


def check_crowding(codes: npt.NDArray[np.integer], codebook_sizes: tuple[int, ...]) -> str | None:
    """Advice if many items have first codes that the last levels are tight for, else None.

    A map that has room on the whole (`check_capacity`) may lack it where its items are: the codes
    of the levels below a first code are all that its items can be told apart by.

    Args:
        codes: as they were encoded, before collisions are resolved, (n_items, n_levels).
        codebook_sizes: number of codes per level.
    """
    if len(codebook_sizes) == 1:
        return None  # all that `check_capacity` looks at
    below = math.prod(codebook_sizes[1:])
    counts = np.bincount(codes[:, 0])
    tight = counts > min(below // ROOM, len(codes))
    share = float(counts[tight].sum()) / len(codes)
    if share <= CROWDED:
        return None
    fullest = int(counts.max())
    # As much room as if every first code were as full as the fullest.
    roomier = _roomier(len(codes), codebook_sizes, ROOM * fullest * codebook_sizes[0])
    return (
        f"{share:.0%} of the items have first codes with fewer than {ROOM} SIDs an item below them "
        f"(the fullest has {fullest:,} items and {below:,} SIDs); expect collisions that move "
        f"items to unfitting codes: {roomier}"
    )


def _roomier(n_items: int, codebook_sizes: tuple[int, ...], sids: int | None = None) -> str:
    """Settings that give so many SIDs; None: `ROOM` an item."""
    levels, size = len(codebook_sizes), max(2, *codebook_sizes)
    wanted = ROOM * n_items if sids is None else sids
    more = levels
    while size**more < wanted:
        more += 1
    larger = size
    while larger**levels < wanted:
        larger *= 2
    deeper = f"use {more} levels of {size} codes"
    # A codebook needs as many distinct items as it has codes.
    return deeper if larger > n_items else f"{deeper}, or {levels} levels of {larger}"


def read_about(path: Path | str) -> dict[str, Any]:
    """Description of a quantizer's file: its kind and settings; empty if it has none.

    Raises:
        ValueError: it is no safetensors file, or a damaged one.
    """
    try:
        with safe_open(path, framework="np") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {}).get("genrec", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a damaged one ({error})") from None
    return about


def read_tensors(path: Path | str, kind: str) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Arrays and description of a quantizer's file.

    Raises:
        ValueError: the file is of another kind of quantizer, or of none.
    """
    about = read_about(path)
    if about.get("kind") != kind:
        raise ValueError(f"{path} holds a quantizer of kind {about.get('kind')!r}, not {kind!r}")
    with safe_open(path, framework="np") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, about
