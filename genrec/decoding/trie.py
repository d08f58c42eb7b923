"""SidTrie: which codes may follow which, as sorted arrays (compressed sparse rows).

Items are sorted by their codes. A node of level l is a distinct prefix of l+1 codes, numbered in
that order, so the node's id is also the id of the edge that leads to it, a node's children are a
contiguous range of ids of the next level, its items a contiguous range of leaves, and comparing ids
compares SIDs. Nothing is stored per child.

A `CatalogueView` is the part of a trie that may be produced: one prefix sum over the leaves, from
which every node's number of allowed items follows. What single users must not or may only get is
expressed in keys ``user * n_nodes + node``, again per level.

Longer than other modules: views and keys are reckoned in the trie's own ranges, which stand here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from genrec.artifacts import read_json, sha256_file, write_json
from genrec.semantic_ids import SemanticIds

FOLDER = "trie"  # below the quantize stage
_ABOUT = "trie.json"
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class SidTrie:
    """The trie of a catalogue.

    Positions are int32 where the catalogue allows it, else int64.

    Attributes:
        tokens: per level, the code of each node, (n_nodes[l],) int32.
        children: per level l, the first child (of level l) of each node of level l-1 and an end
            mark, (n_nodes[l-1] + 1,); level 0 has the single root as parent.
        leaves: per level, the first leaf of each node and an end mark, (n_nodes[l] + 1,).
        items: catalogue row of each leaf, (n_items,).
        leaf_of_item: the inverse.
        end_code: for codes of unequal length, padded with it: the code of the end mark. What
            follows the first one is forced and costs nothing. None: all codes count.
    """

    tokens: tuple[np.ndarray, ...]
    children: tuple[np.ndarray, ...]
    leaves: tuple[np.ndarray, ...]
    items: np.ndarray
    leaf_of_item: np.ndarray
    end_code: int | None = None

    @classmethod
    def build(cls, codes: np.ndarray, end_code: int | None = None) -> SidTrie:
        """Trie of distinct codes, (n_items, n_levels).

        Args:
            codes: row i is catalogue row i.
            end_code: of a title index; see the class.

        Raises:
            ValueError: there are no items, a code is negative, two items share a SID, or something
                follows an end mark.
        """
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.size == 0:
            raise ValueError(
                f"codes have shape {codes.shape}; (n_items, n_levels) with items is needed"
            )
        if codes.min() < 0:
            raise ValueError(f"codes hold {codes.min()}; codes are 0 or more")
        if end_code is not None:
            ended = codes == end_code
            if (ended[:, :-1] & ~ended[:, 1:]).any() or not ended[:, -1].all():
                raise ValueError(
                    f"end_code={end_code} must end every row, and only itself may follow it"
                )
        n_items = len(codes)
        position = _position_type(n_items)
        order = _sid_order(codes)
        is_new = np.ones(n_items, dtype=bool)
        tokens, children, leaves = [], [], []
        above = np.array([0, n_items], dtype=position)
        changed = np.zeros(n_items - 1, dtype=bool)
        for level in range(codes.shape[1]):
            column = codes[order, level]
            changed |= column[1:] != column[:-1]
            is_new[1:] = changed
            starts = np.flatnonzero(is_new).astype(position)
            tokens.append(column[starts].astype(np.int32))
            starts = np.append(starts, position(n_items))
            children.append(np.searchsorted(starts, above).astype(position))
            leaves.append(starts)
            above = starts
        if len(tokens[-1]) != n_items:
            raise ValueError(f"{n_items - len(tokens[-1])} items repeat another item's SID")
        rows = order.astype(position)
        inverse = np.empty_like(rows)
        inverse[rows] = np.arange(n_items, dtype=position)
        return cls(tuple(tokens), tuple(children), tuple(leaves), rows, inverse, end_code)

    @property
    def n_levels(self) -> int:
        """Number of levels."""
        return len(self.tokens)

    @property
    def n_items(self) -> int:
        """Number of items (leaves)."""
        return len(self.items)

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        return sum(array.nbytes for _, array in self._arrays())

    def _arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        for level in range(self.n_levels):
            yield f"tokens-{level}", self.tokens[level]
            yield f"children-{level}", self.children[level]
            yield f"leaves-{level}", self.leaves[level]
        yield "items", self.items
        yield "leaf_of_item", self.leaf_of_item

    @property
    def sha256(self) -> str:
        """Hash over all arrays, the same for a trie that was built and one that was loaded."""
        digest = hashlib.sha256(f"{self.n_levels} {self.end_code}".encode())
        for name, array in self._arrays():
            digest.update(f"{name} {array.dtype.str} {array.size}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def save(self, folder: Path | str, sid_map_sha256: str) -> None:
        """Write the arrays as .npy files that `load` maps into memory; the folder appears whole.

        Args:
            folder: must not exist.
            sid_map_sha256: hash of the SID map that the codes belong to.

        Raises:
            FileExistsError: the folder exists; nothing is overwritten.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"{folder} exists; remove it or choose another folder")
        partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
        partial.mkdir(parents=True)
        try:
            for name, array in self._arrays():
                np.save(partial / f"{name}.npy", array)
            files = {
                name: {"size": len(array), "sha256": sha256_file(partial / f"{name}.npy")}
                for name, array in self._arrays()
            }
            about = {"format": _FORMAT, "n_levels": self.n_levels, "end_code": self.end_code}
            write_json(
                partial / _ABOUT, {**about, "sid_map_sha256": sid_map_sha256, "files": files}
            )
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path | str, sid_map_sha256: str) -> SidTrie:
        """Map a saved trie into memory, where all processes of a machine share it.

        Its files are read once, to compare their hashes.

        Args:
            folder: from `save`.
            sid_map_sha256: the SID map that the trie must belong to.

        Raises:
            ValueError: the folder holds no trie, a damaged one, or one of another SID map.
        """
        folder = Path(folder)
        if not (folder / _ABOUT).is_file():
            raise ValueError(f"{folder} has no {_ABOUT}: it holds no saved trie")
        about = read_json(folder / _ABOUT)
        if about.get("format") != _FORMAT:
            raise ValueError(f"{folder / _ABOUT} has format {about.get('format')}, not {_FORMAT}")
        if about["sid_map_sha256"] != sid_map_sha256:
            raise ValueError(
                f"{folder} is the trie of SID map {about['sid_map_sha256'][:12]}, not of "
                f"{sid_map_sha256[:12]}; run quantize again"
            )
        arrays = {}
        for name, stated in about["files"].items():
            path = folder / f"{name}.npy"
            if not path.is_file() or sha256_file(path) != stated["sha256"]:
                raise ValueError(f"{path} is missing or damaged; run quantize again")
            # Copy-on-write: torch wants writable memory, and nobody writes.
            array = np.load(path, mmap_mode="c", allow_pickle=False)
            if array.shape != (stated["size"],):
                raise ValueError(f"{path} has shape {array.shape}, not ({stated['size']},)")
            arrays[name] = np.asarray(array)
        tokens, children, leaves = (
            tuple(arrays[f"{kind}-{level}"] for level in range(about["n_levels"]))
            for kind in ("tokens", "children", "leaves")
        )
        end_code = about["end_code"]
        return cls(tokens, children, leaves, arrays["items"], arrays["leaf_of_item"], end_code)

    @classmethod
    def of_map(cls, semantic_ids: SemanticIds, stage: Path | str | None = None) -> SidTrie:
        """Trie of a SID map: mapped into memory where the quantize stage left it, else built.

        Args:
            semantic_ids: the map.
            stage: folder of the quantize stage.
        """
        folder = None if stage is None else Path(stage) / FOLDER
        if folder is not None and folder.is_dir():
            return cls.load(folder, semantic_ids.sha256)
        return cls.build(semantic_ids.codes)

    def max_children(self, level: int) -> int:
        """Largest number of nodes of `level` below one parent."""
        return int(np.diff(self.children[level]).max())

    def node_of_leaf(self, level: int, leaf: np.ndarray) -> np.ndarray:
        """Node of `level` on the way to each leaf, int64."""
        if level == self.n_levels - 1:
            return np.asarray(leaf, dtype=np.int64)
        # A key of another type would make NumPy convert the whole array.
        leaf = np.asarray(leaf).astype(self.leaves[level].dtype, copy=False)
        return np.searchsorted(self.leaves[level], leaf, side="right") - 1

    def codes(self) -> np.ndarray:
        """Codes of all items in catalogue order, (n_items, n_levels) int32, as given to `build`."""
        out = np.empty((self.n_items, self.n_levels), dtype=np.int32)
        for level, tokens in enumerate(self.tokens):
            out[self.items, level] = np.repeat(tokens, np.diff(self.leaves[level]))
        return out

    def path_lengths(self) -> np.ndarray:
        """Codes of each item without padding, its end mark included, (n_items,) int64."""
        lengths = np.full(self.n_items, self.n_levels, dtype=np.int64)
        if self.end_code is not None:
            lengths -= (self.codes() == self.end_code).sum(axis=1) - 1
        return lengths

    def clear_padding(self, items: np.ndarray, level_log_probs: np.ndarray) -> None:
        """Set to 0 what lies behind the items' end marks: padding is forced and costs nothing.

        Args:
            items: catalogue rows, any shape.
            level_log_probs: of these items, (…, n_levels); changed in place.
        """
        if self.end_code is not None:
            behind = np.arange(self.n_levels) >= self.path_lengths()[items][..., None]
            level_log_probs[behind] = 0

    def check_items(self, items: np.ndarray) -> None:
        """Raise ValueError if a catalogue row doesn't exist (NumPy would wrap a negative one)."""
        if items.size and (items.min() < 0 or items.max() >= self.n_items):
            raise ValueError(
                f"catalogue rows {items.min()}..{items.max()} were given; there are "
                f"0..{self.n_items - 1}"
            )

    def everything(self) -> CatalogueView:
        """The view that allows every item."""
        return CatalogueView(self, self.leaves[-1])

    def allow(self, items: np.ndarray) -> CatalogueView:
        """A view in which only these catalogue rows can be produced.

        Raises:
            ValueError: the list is empty or names a row outside the catalogue.
        """
        return self.view(self._mask(items, "the allow-list"))

    def deny(self, items: np.ndarray) -> CatalogueView:
        """A view in which these catalogue rows can't be produced.

        Raises:
            ValueError: nothing is left, or the list names a row outside the catalogue.
        """
        items = np.asarray(items, dtype=np.int64)
        denied = self._mask(items, "") if items.size else np.zeros(self.n_items, dtype=bool)
        return self.view(~denied)

    def _mask(self, items: np.ndarray, name: str) -> np.ndarray:
        items = np.asarray(items, dtype=np.int64)
        if items.size == 0:
            raise ValueError(f"{name} is empty: no item could be recommended")
        self.check_items(items)
        mask = np.zeros(self.n_items, dtype=bool)
        mask[items] = True
        return mask

    def view(self, mask: np.ndarray) -> CatalogueView:
        """A view of the catalogue rows for which a condition on price, stock, category, … holds.

        Args:
            mask: per catalogue row whether it may be produced, (n_items,) bool.

        Raises:
            ValueError: another shape or type, or no item is allowed.
        """
        mask = np.asarray(mask)
        if mask.shape != (self.n_items,) or mask.dtype != bool:
            raise ValueError(
                f"the mask is {mask.dtype} of shape {mask.shape}; bool ({self.n_items},) is needed"
            )
        if not mask.any():
            raise ValueError("the view allows no item: nothing could be recommended")
        before = np.zeros(self.n_items + 1, dtype=self.items.dtype)
        np.cumsum(mask[self.items], out=before[1:])
        return CatalogueView(self, before)


@dataclass(frozen=True, eq=False)
class CatalogueView:
    """The part of a trie that may be produced.

    Attributes:
        trie: the trie.
        before: number of allowed leaves before each leaf, and of all, (n_items + 1,).
    """

    trie: SidTrie
    before: np.ndarray

    @property
    def n_allowed(self) -> int:
        """Number of items that may be produced."""
        return int(self.before[-1])

    @property
    def allows_all(self) -> bool:
        """Whether nothing is filtered."""
        return self.n_allowed == self.trie.n_items

    def count(self, level: int, nodes: np.ndarray) -> np.ndarray:
        """Allowed items below nodes of a level."""
        leaves = self.trie.leaves[level]
        return self.before[leaves[nodes + 1]] - self.before[leaves[nodes]]

    def alive(self, level: int) -> np.ndarray:
        """Which nodes of a level lead to an allowed item, (n_nodes,) bool."""
        at = self.before[self.trie.leaves[level]]
        return at[1:] > at[:-1]

    def mask(self) -> np.ndarray:
        """Which catalogue rows may be produced, (n_items,) bool."""
        return (np.diff(self.before) > 0)[self.trie.leaf_of_item]

    def __and__(self, other: CatalogueView) -> CatalogueView:
        """The items that both views allow.

        Raises:
            ValueError: there are none, or the views are of different tries.
        """
        if self.trie is not other.trie:
            raise ValueError("the views belong to different tries")
        return self.trie.view(self.mask() & other.mask())

    def exclude(self, rows: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, ...]:
        """Nodes that are dead for some user because all their allowed items are excluded for them.

        Args:
            rows: user row of each exclusion, (n,).
            items: catalogue row of each exclusion, (n,); pairs may repeat.

        Returns:
            Per level the sorted keys ``row * n_nodes[level] + node`` of the dead nodes.
        """
        trie = self.trie
        rows, leaf = self._pairs(rows, items)
        dead = []
        for level in reversed(range(trie.n_levels)):
            n_nodes = len(trie.tokens[level])
            keys = rows * n_nodes + trie.node_of_leaf(level, leaf)
            unique, counts = _runs(keys)
            gone = counts == self.count(level, unique % n_nodes)
            dead.append(unique[gone])
            below = np.repeat(gone, counts)  # above, only what lies below a dead node matters
            rows, leaf = rows[below], leaf[below]
        return tuple(reversed(dead))

    def only(
        self,
        rows: np.ndarray,
        items: np.ndarray,
        without_rows: np.ndarray,
        without_items: np.ndarray,
    ) -> tuple[np.ndarray, ...]:
        """Nodes that are alive for users who may get some items only.

        Args:
            rows: user row of each candidate, (n,).
            items: catalogue row of each candidate, (n,); pairs may repeat.
            without_rows: user row of each exclusion, (m,).
            without_items: catalogue row of each exclusion, (m,).

        Returns:
            Per level the sorted keys ``row * n_nodes[level] + node`` of the nodes that lead to a
            candidate that the view allows and that is not excluded.
        """
        trie = self.trie
        rows, leaf = self._pairs(rows, items)
        gone_rows, gone_leaf = self._pairs(without_rows, without_items)
        keys = rows * trie.n_items + leaf
        keys = np.setdiff1d(keys, gone_rows * trie.n_items + gone_leaf, assume_unique=True)
        rows, leaf = keys // trie.n_items, keys % trie.n_items
        return tuple(
            _runs(rows * len(trie.tokens[level]) + trie.node_of_leaf(level, leaf))[0]
            for level in range(trie.n_levels)
        )

    def _pairs(self, rows: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distinct (row, leaf) pairs that the view allows, sorted; both int64."""
        trie = self.trie
        items = np.asarray(items, dtype=np.int64)
        trie.check_items(items)
        keys = np.unique(np.asarray(rows, dtype=np.int64) * trie.n_items + trie.leaf_of_item[items])
        rows, leaf = keys // trie.n_items, keys % trie.n_items
        allowed = self.before[leaf + 1] > self.before[leaf]
        return rows[allowed], leaf[allowed]


def _position_type(n_items: int) -> type[np.int32] | type[np.int64]:
    """Type of leaf and node positions."""
    return np.int32 if n_items < 1 << 30 else np.int64  # sums of two positions must fit


def _sid_order(codes: np.ndarray) -> np.ndarray:
    """Catalogue rows sorted by SID, (n_items,) int64."""
    bits = [max(1, int(column.max()).bit_length()) for column in codes.T]
    if sum(bits) > 63:
        return np.lexsort(codes.T[::-1])
    # One machine word per SID sorts several times faster than column by column.
    keys = np.zeros(len(codes), dtype=np.int64)
    for column, width in zip(codes.T, bits, strict=True):
        keys <<= width
        keys |= column.astype(np.int64)
    return np.argsort(keys)


def _runs(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values of sorted keys and how often each occurs.

    (row, leaf) pairs in order give (row, node) keys in order, so nothing is sorted again.
    """
    starts = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1))
    return keys[starts], np.diff(starts, append=len(keys))
