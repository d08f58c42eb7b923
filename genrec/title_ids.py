"""TitleIds: the map of a title index, in which every item is named by its own title.

BIGRec (Bao et al. 2023, "A Bi-Step Grounding Paradigm for LLMs in Recommendation") and ReRe let the
model write titles. Here each item has a title that no other has, and the tokens of that title, with
an end mark, are its codes (`genrec.title_index`): the same trie and the same beam produce them, and
no title that isn't in the catalogue can be written. The map itself knows no tokenizer, so any model
can be trained on it.

In prompts and completions an item reads ``[Red wool hat]``. Untrusted text is escaped and holds no
brackets, so no title, query or review can end an item early or forge one.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec.artifacts import read_json, write_json, write_parquet
from genrec.columns import ITEM_ID, ITEM_INDEX, SID, TITLE
from genrec.prompts import escape_series, escape_text
from genrec.semantic_ids import (
    MAP_FILE,
    TITLES,
    SemanticIds,
    check_lineage,
    lineage_digest,
    map_kind,
)

BRACKETS = "[]"  # around a name in a prompt; escaped text has none
LEAST_BYTES = 16  # of a title at most: room for a number behind what is left of it


@dataclass(frozen=True)
class UniqueTitles:
    """Titles as names.

    Attributes:
        names: escaped titles, distinct also without regard to case, (n,).
        numbered: rows whose title an earlier item has, so that " (2)", … was added.
        shortened: rows whose title was too long.
        untitled: rows without a title, which are called "Item <id>".
    """

    names: list[str]
    numbered: list[int]
    shortened: list[int]
    untitled: list[int]


def unique_titles(
    titles: pl.Series, item_ids: pl.Series, max_bytes: int, taken: Iterable[str] = ()
) -> UniqueTitles:
    """Make each item's title a name that no other item has.

    Items are handled in their order: the first of equal titles keeps it, and items that come later
    change no earlier name. Names that differ in case or in Unicode's compatibility forms alone are
    equal: some tokenizers can't tell them apart, nor can people.

    Args:
        titles: one per item; null and blank ones are replaced by "Item <id>".
        item_ids: identifiers, for those.
        max_bytes: UTF-8 bytes of a name at most; longer titles are cut between two characters. A
            byte is one token at most, so this bounds the depth of the trie.
        taken: names of other items.

    Raises:
        ValueError: lengths differ, or `max_bytes` leaves no room for a number.
    """
    if len(titles) != len(item_ids):
        raise ValueError(f"{len(titles)} titles for {len(item_ids)} items; each item has one")
    if max_bytes < LEAST_BYTES:
        raise ValueError(f"max_bytes={max_bytes} must be at least {LEAST_BYTES}")
    escaped = escape_series(titles).fill_null("").to_list()
    made = UniqueTitles([], [], [], [])
    known = {_key(name) for name in taken}
    last_number: dict[str, int] = {}
    for row, text in enumerate(escaped):
        if not text:
            made.untitled.append(row)
            text = escape_text(f"Item {item_ids[row]}")
        name = _cut(text, max_bytes)
        if name != text:
            made.shortened.append(row)
        first = key = _key(name)
        number = last_number.get(first, 1)
        while key in known:
            number += 1
            suffix = f" ({number})"
            name = _cut(text, max_bytes - len(suffix)) + suffix
            key = _key(name)
        if key != first:
            made.numbered.append(row)
            last_number[first] = number
        known.add(key)
        made.names.append(name)
    return made


def _key(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _cut(text: str, max_bytes: int) -> str:
    """The longest beginning of a text that fits; no character is left in pieces."""
    data = text.encode()
    if len(data) <= max_bytes:
        return text
    return data[:max_bytes].decode(errors="ignore").rstrip()


@dataclass(frozen=True)
class TitleIds:
    """Items <-> names. Row i of ``names`` is row i of the catalogue.

    Attributes:
        item_ids: the user's identifiers in catalogue order, (n_items,).
        names: see `unique_titles`, (n_items,).
        max_bytes: of a name at most, also of items that come later.
        version: 1 for a fresh map, +1 for each successor.
        ancestors: hashes of the maps that this one succeeds, oldest first.
        reserved: items that left the catalogue and keep their names: columns item_id and title.

    Raises:
        ValueError: there are no items, ids or names repeat, or a name isn't an escaped text.
    """

    item_ids: pl.Series
    names: pl.Series
    max_bytes: int
    version: int = 1
    ancestors: tuple[str, ...] = field(default=())
    reserved: pl.DataFrame | None = None

    def __post_init__(self) -> None:
        """Check the invariants: one name each, none of them twice, none that could forge."""
        if len(self.item_ids) == 0 or len(self.names) != len(self.item_ids):
            raise ValueError(
                f"{len(self.names)} names for {len(self.item_ids)} items; a map needs at least one "
                "item, and a name for each"
            )
        names, ids = self._every_name(), self._every_id()
        if ids.n_unique() != len(ids):
            raise ValueError("item ids repeat; each item has one name")
        if names.null_count() or names.n_unique() != len(names):
            raise ValueError("names repeat or are missing; each item has one of its own")
        if (odd := names.filter(escape_series(names) != names)).len() or (names == "").any():
            raise ValueError(
                f"the name {odd.to_list()[:1]} is empty or not escaped; make names with "
                "genrec.title_ids.unique_titles"
            )

    @classmethod
    def of_catalog(cls, catalog: pl.DataFrame, max_bytes: int) -> tuple[TitleIds, UniqueTitles]:
        """A first map, and what was done to the titles of ``catalog.parquet``."""
        made = unique_titles(catalog[TITLE], catalog[ITEM_ID], max_bytes)
        return cls(catalog[ITEM_ID], pl.Series(TITLE, made.names), max_bytes), made

    @property
    def n_items(self) -> int:
        """Number of items."""
        return len(self.names)

    @property
    def sha256(self) -> str:
        """Hash of the map: item ids and names, and the reserved ones."""
        content: list[Any] = [TITLES, self.item_ids.to_list(), self.names.to_list()]
        if self.reserved is not None:
            content += [self.reserved[ITEM_ID].to_list(), self.reserved[TITLE].to_list()]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def lineage_sha256(self) -> str:
        """Hash of the map and of where it comes from, see `lineage_digest`."""
        return lineage_digest(self.sha256, self.version, self.ancestors, None)

    def descends_from(self, sha256: str) -> bool:
        """Whether this map is the one with that hash, or an extension of it."""
        return sha256 == self.sha256 or sha256 in self.ancestors

    def sids(self) -> pl.Series:
        """What stands for each item in a prompt, in catalogue order: ``[Red wool hat]``."""
        around = [pl.lit(bracket) for bracket in BRACKETS]
        text = pl.concat_str(around[0], TITLE, around[1]).alias(SID)
        return pl.DataFrame({TITLE: self.names}).select(text)[SID]

    def _every_id(self) -> pl.Series:
        gone = [] if self.reserved is None else [self.reserved[ITEM_ID].alias(self.item_ids.name)]
        return pl.concat([self.item_ids, *gone])

    def _every_name(self) -> pl.Series:
        gone = [] if self.reserved is None else [self.reserved[TITLE].alias(self.names.name)]
        return pl.concat([self.names, *gone])

    def successor(self, catalog: pl.DataFrame) -> tuple[TitleIds, UniqueTitles, int]:
        """The map of a later catalogue, in that catalogue's order.

        Items that both have keep their names, whatever their titles are now; those that left keep
        theirs reserved and get them back if they return; new ones get names that nobody has or had.

        Returns:
            The map, what was done to the titles of new items (rows count among them), and how many
            items were known.

        Raises:
            ValueError: the identifiers are of another type than this map's.
        """
        item_ids = catalog[ITEM_ID]
        if item_ids.dtype != self.item_ids.dtype:
            raise ValueError(
                f"item ids are {item_ids.dtype}, the map's are {self.item_ids.dtype}; read both "
                "catalogues alike"
            )
        every = pl.DataFrame({ITEM_ID: self._every_id(), TITLE: self._every_name()})
        wanted = item_ids.to_frame(ITEM_ID)
        found = wanted.join(every, ITEM_ID, "left", maintain_order="left")[TITLE]
        new = found.is_null()
        fresh = catalog.filter(new)
        made = unique_titles(fresh[TITLE], fresh[ITEM_ID], self.max_bytes, every[TITLE])
        names = found.to_numpy().copy()
        names[new.to_numpy()] = made.names
        gone = every.join(wanted, ITEM_ID, "anti", maintain_order="left")
        grown = TitleIds(
            item_ids,
            pl.Series(TITLE, names.tolist(), dtype=pl.String),
            self.max_bytes,
            self.version + 1,
            (*self.ancestors, self.sha256),
            gone if len(gone) else None,
        )
        return grown, made, int((~new).sum())

    def save(self, folder: Path | str) -> None:
        """Write ``items.parquet`` (item_index, item_id, sid, title) and ``semantic_ids.json``.

        Reserved names go into ``reserved.parquet`` (item_id, title).
        """
        index = np.arange(self.n_items, dtype=np.int32)
        columns = {ITEM_INDEX: index, ITEM_ID: self.item_ids, SID: self.sids(), TITLE: self.names}
        write_parquet(Path(folder) / "items.parquet", pl.DataFrame(columns))
        if self.reserved is not None:
            write_parquet(Path(folder) / "reserved.parquet", self.reserved)
        about = {
            "kind": TITLES,
            "n_items": self.n_items,
            "max_bytes": self.max_bytes,
            "version": self.version,
            "ancestors": list(self.ancestors),
            "reserved": 0 if self.reserved is None else len(self.reserved),
            "sha256": self.sha256,
            "lineage_sha256": self.lineage_sha256,
        }
        write_json(Path(folder) / MAP_FILE, about)

    @classmethod
    def load(cls, folder: Path | str) -> TitleIds:
        """Read a saved map; one that was changed since it was saved raises ValueError."""
        about = read_json(Path(folder) / MAP_FILE)
        table = pl.read_parquet(Path(folder) / "items.parquet", glob=False).sort(ITEM_INDEX)
        reserved = None
        if about["reserved"]:
            reserved = pl.read_parquet(Path(folder) / "reserved.parquet", glob=False)
        ancestors = tuple(about["ancestors"])
        ids = cls(
            table[ITEM_ID], table[TITLE], about["max_bytes"], about["version"], ancestors, reserved
        )
        if ids.sha256 != about["sha256"]:
            raise ValueError(
                f"{folder}/items.parquet doesn't match {MAP_FILE} (hash {ids.sha256[:12]}, "
                f"recorded {about['sha256'][:12]}); restore both or rerun quantize"
            )
        check_lineage(folder, about, ids.lineage_sha256)
        return ids


ItemMap = SemanticIds | TitleIds


def load_map(folder: Path | str) -> ItemMap:
    """The map that quantize left, of either kind.

    Raises:
        ValueError: it was changed since it was saved.
    """
    return TitleIds.load(folder) if map_kind(folder) == TITLES else SemanticIds.load(folder)
