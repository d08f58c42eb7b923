"""SidTrie: which codes may follow which, as sorted arrays (compressed sparse rows).

Items are sorted by their codes. A node of level l is a distinct prefix of l+1 codes, numbered in
that order, so the node's id is also the id of the edge that leads to it, a node's children are a
contiguous range of ids of the next level, its items a contiguous range of leaves, and comparing ids
compares SIDs. Nothing is stored per child.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SidTrie:
    """The trie of a catalogue.

    Attributes:
        tokens: per level, the code of each node, (n_nodes[l],) int32.
        children: per level l, the first child (of level l) of each node of level l-1 and an end
            mark, (n_nodes[l-1] + 1,) int64; level 0 has the single root as parent.
        leaves: per level, the first leaf of each node and an end mark, (n_nodes[l] + 1,) int64.
        items: catalogue row of each leaf, (n_items,) int64.
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
            ValueError: there are no items, two share a SID, or something follows an end mark.
        """
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.size == 0:
            raise ValueError(
                f"codes have shape {codes.shape}; (n_items, n_levels) with items is needed"
            )
        if end_code is not None:
            ended = codes == end_code
            if (ended[:, :-1] & ~ended[:, 1:]).any() or not ended[:, -1].all():
                raise ValueError(
                    f"end_code={end_code} must end every row, and only itself may follow it"
                )
        order = np.lexsort(codes.T[::-1])
        ordered = codes[order]
        is_new = np.ones(len(codes), dtype=bool)
        changed = np.zeros(len(codes) - 1, dtype=bool)
        tokens, children, leaves = [], [], []
        above = np.array([0, len(codes)])
        for level in range(codes.shape[1]):
            changed |= ordered[1:, level] != ordered[:-1, level]
            is_new[1:] = changed
            starts = np.flatnonzero(is_new)
            tokens.append(ordered[starts, level].astype(np.int32))
            starts = np.append(starts, len(codes))
            children.append(np.searchsorted(starts, above))
            leaves.append(starts)
            above = starts
        if len(tokens[-1]) != len(codes):
            raise ValueError(f"{len(codes) - len(tokens[-1])} items repeat another item's SID")
        inverse = np.empty(len(order), dtype=np.int64)
        inverse[order] = np.arange(len(order))
        rows = order.astype(np.int64)
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
        """Memory of all arrays in bytes."""
        arrays = (*self.tokens, *self.children, *self.leaves, self.items, self.leaf_of_item)
        return sum(array.nbytes for array in arrays)

    def max_children(self, level: int) -> int:
        """Largest number of nodes of `level` below one parent."""
        return int(np.diff(self.children[level]).max())

    def node_of_leaf(self, level: int, leaf: np.ndarray) -> np.ndarray:
        """Node of `level` on the way to each leaf."""
        return np.searchsorted(self.leaves[level], leaf, side="right") - 1

    def codes(self) -> np.ndarray:
        """Codes of all items in catalogue order, (n_items, n_levels) int32, as given to `build`."""
        leaf, levels = self.leaf_of_item, range(self.n_levels)
        return np.stack([self.tokens[i][self.node_of_leaf(i, leaf)] for i in levels], axis=1)

    def allow(self, items: np.ndarray) -> CatalogueView:
        """A view in which only these catalogue rows can be produced.

        Raises:
            ValueError: the list is empty or names a row outside the catalogue.
        """
        items = np.asarray(items, dtype=np.int64)
        if items.size == 0:
            raise ValueError("the allow-list is empty: no item could be recommended")
        self.check_items(items)
        allowed = np.zeros(self.n_items, dtype=np.int64)
        allowed[self.leaf_of_item[items]] = 1
        before = np.concatenate([[0], np.cumsum(allowed)])
        counts = tuple(before[starts[1:]] - before[starts[:-1]] for starts in self.leaves)
        return CatalogueView(self, counts)

    def check_items(self, items: np.ndarray) -> None:
        """Raise ValueError if a catalogue row doesn't exist (NumPy would wrap a negative one)."""
        if items.size and (items.min() < 0 or items.max() >= self.n_items):
            raise ValueError(
                f"catalogue rows {items.min()}..{items.max()} were given; there are "
                f"0..{self.n_items - 1}"
            )

    def everything(self) -> CatalogueView:
        """The view that allows every item."""
        return CatalogueView(self, tuple(np.diff(starts) for starts in self.leaves))


@dataclass(frozen=True)
class CatalogueView:
    """The part of a trie that may be produced: allowed items below each node, per level."""

    trie: SidTrie
    counts: tuple[np.ndarray, ...]

    def exclude(self, rows: np.ndarray, items: np.ndarray) -> tuple[np.ndarray, ...]:
        """Nodes that are dead for some user because all their allowed items are excluded for them.

        Args:
            rows: user row of each exclusion, (n,).
            items: catalogue row of each exclusion, (n,); pairs may repeat.

        Returns:
            Per level the sorted keys ``row * n_nodes[level] + node`` of the dead nodes.
        """
        trie = self.trie
        items = np.asarray(items, dtype=np.int64)
        trie.check_items(items)
        leaf = trie.leaf_of_item[items]
        pairs = np.unique(np.asarray(rows, dtype=np.int64) * trie.n_items + leaf)
        rows, leaf = pairs // trie.n_items, pairs % trie.n_items
        gone = self.counts[-1][leaf] > 0  # what the view excludes anyway isn't counted twice
        rows, leaf = rows[gone], leaf[gone]
        dead = []
        for level in range(trie.n_levels):
            n_nodes = len(trie.tokens[level])
            keys = rows * n_nodes + trie.node_of_leaf(level, leaf)
            unique, counts = np.unique(keys, return_counts=True)
            dead.append(unique[counts == self.counts[level][unique % n_nodes]])
        return tuple(dead)
