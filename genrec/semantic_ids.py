"""SemanticIds: the bijective, append-only map between items, codes and tokens.

Tokens follow the convention that LC-Rec, LETTER and MiniOneRec share: ``<a_12><b_7><c_99>``, a
letter per level. Row i of ``codes`` is row i of the catalogue.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec.artifacts import read_json, write_json, write_parquet
from genrec.columns import ITEM_ID, ITEM_INDEX, SID
from genrec.quantizers.quality import shared_rows

SID_TOKEN = re.compile(r"<([a-z]+)_(\d+)>")
MAP_FILE = "semantic_ids.json"
TITLES = "titles"  # the kind of map that `genrec.title_ids` holds


def level_name(level: int) -> str:
    """Letter(s) of a level, counted from 0: a…z, then aa, ab, … like spreadsheet columns."""
    name = ""
    number = level + 1
    while number > 0:
        number, rest = divmod(number - 1, 26)
        name = chr(ord("a") + rest) + name
    return name


def sid_token(level: int, code: int) -> str:
    """Token of one code, e.g. ``sid_token(0, 12) == "<a_12>"``."""
    return f"<{level_name(level)}_{code}>"


@dataclass(frozen=True)
class SemanticIds:
    """Items <-> codes <-> tokens.

    Attributes:
        item_ids: the user's identifiers in catalogue order, (n_items,).
        codes: integer codes, (n_items, n_levels); every row distinct, fixed length.
        codebook_sizes: number of codes per level; level l holds codes 0 … size-1.
        version: 1 for a fresh map, +1 for each successor.
        ancestors: hashes of the maps that this one succeeds, oldest first.
        reserved: items that left the catalogue and keep their SIDs: columns item_id and codes.
        quantizer_sha256: hash of the quantizer's file that gave the codes; None if none did.

    Raises:
        ValueError: shapes disagree, a code is outside its codebook, or two items share a SID.
    """

    item_ids: pl.Series
    codes: np.ndarray
    codebook_sizes: tuple[int, ...]
    version: int = 1
    ancestors: tuple[str, ...] = field(default=())
    reserved: pl.DataFrame | None = None
    quantizer_sha256: str | None = None

    def __post_init__(self) -> None:
        """Check the invariants: shape, range, bijection."""
        codes = np.ascontiguousarray(self.codes, dtype=np.int32)
        object.__setattr__(self, "codes", codes)
        if codes.ndim != 2 or codes.shape != (len(self.item_ids), len(self.codebook_sizes)):
            raise ValueError(
                f"codes have shape {codes.shape}; {len(self.item_ids)} items and "
                f"{len(self.codebook_sizes)} levels need ({len(self.item_ids)}, "
                f"{len(self.codebook_sizes)})"
            )
        if len(codes) == 0:
            raise ValueError("there are no items; a SID map needs at least one")
        if codes.min() < 0 or (codes >= np.array(self.codebook_sizes)).any():
            raise ValueError(f"a code lies outside its codebook (sizes {self.codebook_sizes})")
        if self.item_ids.n_unique() != len(self.item_ids):
            raise ValueError("item ids repeat; each item has one SID")
        if (shared := shared_rows(codes)).any():
            first = self.item_ids.gather(np.flatnonzero(shared)[:4].tolist()).to_list()
            raise ValueError(
                f"{int(shared.sum())} items share a SID (first: {first}); resolve collisions first "
                "(genrec.quantizers.collisions.resolve_collisions)"
            )
        if self.reserved is not None:
            _check_reserved(self)

    @property
    def n_items(self) -> int:
        """Number of items."""
        return len(self.codes)

    @property
    def n_levels(self) -> int:
        """Number of tokens per item."""
        return self.codes.shape[1]

    @property
    def sha256(self) -> str:
        """Hash of the map: item ids, codes, codebook sizes and reserved SIDs."""
        digest = hashlib.sha256(
            json.dumps([list(self.codebook_sizes), self.item_ids.to_list()]).encode()
        )
        digest.update(self.codes.astype("<i4").tobytes())
        if self.reserved is not None:
            digest.update(json.dumps(self.reserved[ITEM_ID].to_list()).encode())
            digest.update(self.reserved["codes"].to_numpy().astype("<i4").tobytes())
        return digest.hexdigest()

    @property
    def lineage_sha256(self) -> str:
        """Hash of the map and of where it comes from, see `lineage_digest`."""
        return lineage_digest(self.sha256, self.version, self.ancestors, self.quantizer_sha256)

    def descends_from(self, sha256: str) -> bool:
        """Whether this map is the one with that hash, or an extension of it."""
        return sha256 == self.sha256 or sha256 in self.ancestors

    def tokens(self) -> list[str]:
        """Every SID token, level by level: the tokens a model's vocabulary must hold."""
        return [
            sid_token(level, c)
            for level, size in enumerate(self.codebook_sizes)
            for c in range(size)
        ]

    def sids(self) -> pl.Series:
        """SID strings of all items in catalogue order, e.g. ``<a_1><b_7><c_0>``."""
        parts: list[pl.Expr] = []
        for level in range(self.n_levels):
            parts += [pl.lit(f"<{level_name(level)}_"), pl.col(str(level)), pl.lit(">")]
        frame = pl.DataFrame({str(level): self.codes[:, level] for level in range(self.n_levels)})
        return frame.select(pl.concat_str(parts).alias(SID))[SID]

    def parse(self, sid: str) -> tuple[int, ...]:
        """Codes of a SID string.

        Raises:
            ValueError: the string is not exactly one well-formed SID of this map's shape.
        """
        codes = tuple(int(code) for _, code in SID_TOKEN.findall(sid))
        # Written again, so that "<a_01>" and digits of other scripts don't pass.
        exact = "".join(sid_token(level, code) for level, code in enumerate(codes)) == sid
        in_range = all(c < size for c, size in zip(codes, self.codebook_sizes, strict=False))
        if not exact or not in_range or len(codes) != self.n_levels:
            raise ValueError(
                f"{sid!r} is not a SID of {self.n_levels} levels such as {self.sids()[0]}"
            )
        return codes

    def index_of(self, codes: Sequence[int]) -> int | None:
        """Catalogue row that has these codes, None if no item has."""
        match = np.flatnonzero((self.codes == np.asarray(codes)).all(axis=1))
        return int(match[0]) if len(match) else None

    def known_codes(self, item_ids: pl.Series) -> tuple[np.ndarray, np.ndarray]:
        """SIDs that items have or had here.

        Args:
            item_ids: identifiers, (n,).

        Returns:
            Codes (n, n_levels), −1 for unknown items, and which are known (n,).

        Raises:
            ValueError: the identifiers are of another type than this map's.
        """
        if item_ids.dtype != self.item_ids.dtype:
            raise ValueError(
                f"item ids are {item_ids.dtype}, the map's are {self.item_ids.dtype}; read both "
                "catalogues alike"
            )
        every = pl.concat([self.item_ids, *self._reserved_ids()])
        codes = self.taken_codes()
        rows = pl.DataFrame({ITEM_ID: every, "row": np.arange(len(every))})
        found = (
            item_ids.alias(ITEM_ID).to_frame().join(rows, ITEM_ID, "left", maintain_order="left")
        )
        row = found["row"].fill_null(-1).to_numpy()
        known = row >= 0
        return np.where(known[:, None], codes[row], -1).astype(np.int32), known

    def taken_codes(self) -> np.ndarray:
        """Every SID that no new item may get: of the items, then of the reserved ones."""
        if self.reserved is None:
            return self.codes
        return np.concatenate([self.codes, self.reserved["codes"].to_numpy()])

    def _reserved_ids(self) -> list[pl.Series]:
        return [] if self.reserved is None else [self.reserved[ITEM_ID].alias(self.item_ids.name)]

    def successor(self, item_ids: pl.Series, codes: np.ndarray) -> SemanticIds:
        """The map of a later catalogue, in that catalogue's order.

        Items that both have keep their SIDs; those that left keep theirs reserved and get them back
        if they return; new ones must have SIDs that nobody has or had. (Which ones is the
        business of `genrec.quantizers.collisions.place_items`.)

        Args:
            item_ids: identifiers of the later catalogue, (n,).
            codes: their codes, (n, n_levels).

        Raises:
            ValueError: a known item's codes changed, or a new item got a SID that is taken.
        """
        codes = np.asarray(codes, dtype=np.int32)
        if item_ids.n_unique() != len(item_ids):
            raise ValueError("item ids repeat; each item has one SID")
        before, known = self.known_codes(item_ids)
        if codes.shape != before.shape:
            raise ValueError(f"codes have shape {codes.shape}, {before.shape} is needed")
        if (moved := (codes != before).any(axis=1) & known).any():
            raise ValueError(
                f"{int(moved.sum())} items changed their SID, the first is "
                f"{item_ids[int(moved.argmax())]!r}; a map only grows"
            )
        every = pl.DataFrame(
            {
                ITEM_ID: pl.concat([self.item_ids, *self._reserved_ids()]),
                "codes": pl.Series(self.taken_codes(), dtype=_codes_type(self.n_levels)),
            }
        )
        gone = every.join(
            item_ids.alias(ITEM_ID).to_frame(), ITEM_ID, "anti", maintain_order="left"
        )
        return SemanticIds(
            item_ids.alias(self.item_ids.name),
            codes,
            self.codebook_sizes,
            self.version + 1,
            (*self.ancestors, self.sha256),
            gone if len(gone) else None,
            self.quantizer_sha256,
        )

    def with_quantizer(self, sha256: str) -> SemanticIds:
        """The same map, naming the hash of the quantizer's file that gave its codes."""
        return replace(self, quantizer_sha256=sha256)

    def extend(self, item_ids: pl.Series, codes: np.ndarray) -> SemanticIds:
        """A successor with more items behind the ones that are there.

        Args:
            item_ids: identifiers of the new items, (n_new,).
            codes: their codes, (n_new, n_levels), none of them taken.
        """
        return self.successor(
            pl.concat([self.item_ids, item_ids.alias(self.item_ids.name)]),
            np.concatenate([self.codes, np.asarray(codes, dtype=np.int32)]),
        )

    def save(self, folder: Path | str) -> None:
        """Write ``items.parquet`` (item_index, item_id, sid, codes) and ``semantic_ids.json``.

        Reserved SIDs go into ``reserved.parquet`` (item_id, codes).
        """
        table = pl.DataFrame(
            {
                ITEM_INDEX: np.arange(self.n_items, dtype=np.int32),
                ITEM_ID: self.item_ids,
                SID: self.sids(),
                "codes": pl.Series(self.codes, dtype=_codes_type(self.n_levels)),
            }
        )
        write_parquet(Path(folder) / "items.parquet", table)
        if self.reserved is not None:
            write_parquet(Path(folder) / "reserved.parquet", self.reserved)
        about = {
            "codebook_sizes": list(self.codebook_sizes),
            "n_items": self.n_items,
            "version": self.version,
            "ancestors": list(self.ancestors),
            "reserved": 0 if self.reserved is None else len(self.reserved),
            "quantizer_sha256": self.quantizer_sha256,
            "sha256": self.sha256,
            "lineage_sha256": self.lineage_sha256,
        }
        write_json(Path(folder) / MAP_FILE, about)

    @classmethod
    def load(cls, folder: Path | str) -> SemanticIds:
        """Read a saved map.

        Raises:
            ValueError: it was changed since it was saved, or names its items by titles.
        """
        require_codes(folder)
        about = read_json(Path(folder) / MAP_FILE)
        table = pl.read_parquet(Path(folder) / "items.parquet", glob=False).sort(ITEM_INDEX)
        ids = cls(
            table[ITEM_ID],
            table["codes"].to_numpy(),
            tuple(about["codebook_sizes"]),
            about["version"],
            tuple(about["ancestors"]),
            pl.read_parquet(Path(folder) / "reserved.parquet", glob=False)
            if about.get("reserved")
            else None,
            about.get("quantizer_sha256"),
        )
        if ids.sha256 != about["sha256"]:
            raise ValueError(
                f"{folder}/items.parquet doesn't match semantic_ids.json (hash {ids.sha256[:12]}, "
                "recorded "
                f"{about['sha256'][:12]}); restore both or rerun quantize"
            )
        check_lineage(folder, about, ids.lineage_sha256)
        return ids

    def export_index(self, path: Path | str) -> None:
        """Write LC-Rec's ``index.json``: item id -> list of tokens."""
        rows = zip(self.item_ids.to_list(), self.codes.tolist(), strict=True)
        index = {str(i): [sid_token(level, c) for level, c in enumerate(row)] for i, row in rows}
        write_json(path, index)


def lineage_digest(
    sha256: str, version: int, ancestors: Sequence[str], quantizer_sha256: str | None
) -> str:
    """Hash of a map's hash and of where the map comes from.

    A model accepts a map by its ancestors, so a slip of the pen there must show. Whoever forges a
    map can compute this hash as well.
    """
    about = [sha256, version, list(ancestors), quantizer_sha256]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def check_lineage(folder: Path | str, about: dict[str, Any], digest: str) -> None:
    """Raise ValueError unless a saved map's version, ancestors and quantizer are as saved.

    Maps of before this hash was kept have none. A first map is read all the same: it claims no
    ancestors, and its own hash says what it is. What it says of its ancestors can't be checked in
    an extended one, which is refused.

    Args:
        folder: of the map.
        about: its `MAP_FILE`.
        digest: `lineage_digest` of what was read.
    """
    recorded = about.get("lineage_sha256")
    if recorded is None and about["version"] == 1 and not about["ancestors"]:
        return
    if recorded is None:
        raise ValueError(
            f"{folder}/{MAP_FILE} names ancestors without lineage_sha256, the hash that vouches "
            "for them (an earlier genrec kept none, or it was deleted); restore it, or extend the "
            "first map anew: genrec quantize --extend"
        )
    if recorded != digest:
        raise ValueError(
            f"version, ancestors or quantizer_sha256 of {folder}/{MAP_FILE} were changed since it "
            "was saved; restore it or rerun quantize"
        )


def map_kind(folder: Path | str) -> str | None:
    """`TITLES` where a saved map names items by titles, None where by codes."""
    kind: str | None = read_json(Path(folder) / MAP_FILE).get("kind")
    return kind


def require_codes(folder: Path | str) -> None:
    """Raise ValueError where a saved map names items by titles, and codes are needed."""
    if map_kind(folder) == TITLES:
        raise ValueError(
            f"{folder} names items by their titles (method: title), and this can't be done with "
            "titles yet, only with semantic ids; make some with: genrec quantize --method "
            "residual-kmeans (or another method), then build_dataset and sft anew"
        )


def _codes_type(n_levels: int) -> pl.Array:
    return pl.Array(pl.Int32, n_levels)


def _check_reserved(ids: SemanticIds) -> None:
    """Raise ValueError unless reserved items and SIDs are apart from the catalogue's."""
    assert ids.reserved is not None
    codes = ids.reserved["codes"].to_numpy()
    if codes.shape[1:] != (ids.n_levels,):
        raise ValueError(
            f"reserved codes have shape {codes.shape}; {ids.n_levels} levels are needed"
        )
    if (codes < 0).any() or (codes >= np.array(ids.codebook_sizes)).any():
        raise ValueError(f"a reserved code lies outside its codebook (sizes {ids.codebook_sizes})")
    if ids.reserved[ITEM_ID].dtype != ids.item_ids.dtype:
        raise ValueError(
            f"reserved item ids are {ids.reserved[ITEM_ID].dtype}, the catalogue's are "
            f"{ids.item_ids.dtype}; both must be alike"
        )
    if ids.reserved[ITEM_ID].n_unique() != len(ids.reserved):
        raise ValueError("reserved item ids repeat; each item has one SID")
    if shared_rows(ids.taken_codes()).any():
        raise ValueError(
            "a SID is used twice among items and reserved ones; SIDs of items that left are not "
            "given away"
        )
    if ids.reserved[ITEM_ID].is_in(ids.item_ids.implode()).any():
        raise ValueError("an item is both in the catalogue and among the reserved ones")
