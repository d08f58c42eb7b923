"""A trie on a device: children, codes and filters of whole batches as tensors.

Children of several nodes are the rows of a rectangle, which is as wide as the longest of them.
Where a level's nodes have about as many children each, one rectangle takes all beams. Where they
don't (a few hundred clusters of items, a hub), it would be mostly padding, and `TrieTensors.blocks`
sorts the beams into a few rectangles by their number of children.

Shapes: U users, B beams, R rows (some beams of a batch), M children per row, L levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genrec.decoding.trie import CatalogueView, SidTrie

_CELLS_AT_ONCE = 1 << 22  # of one rectangle: bounds memory; some ten arrays of this size
# Rectangles up to this wide are not worth cutting: on a GPU, which would have to wait for the host,
# much wider ones (reckoned from memory traffic, not measured).
_NARROW = {"cpu": 256, "cuda": 1024}


@dataclass(frozen=True)
class LevelFilter:
    """What the users of a batch must not or may only get, at one level.

    Attributes:
        dead: sorted keys ``user * n_nodes + node`` that are closed to a user.
        only: such keys that are open to users with candidates of their own.
        restricted: which users have them, (U,) bool; None if nobody does.
    """

    dead: Tensor
    only: Tensor
    restricted: Tensor | None


class TrieTensors:
    """A trie and a view on it as tensors of one device, with lookups for whole batches."""

    def __init__(self, trie: SidTrie, view: CatalogueView | None, device: torch.device) -> None:
        """Put the arrays on `device` (on a CPU they are shared); no view allows every item."""
        self.trie, self.device = trie, device
        self._tokens = [torch.from_numpy(t).to(device) for t in trie.tokens]
        self._child_start = [torch.from_numpy(c).to(device) for c in trie.children]
        self._items = torch.from_numpy(trie.items).to(device)
        self.n_nodes = [len(tokens) for tokens in trie.tokens]
        narrow = _NARROW.get(device.type, _NARROW["cuda"])
        self._row_lengths = [_row_lengths(np.diff(start), narrow) for start in trie.children]
        self.widest = [lengths[-1] for lengths in self._row_lengths]
        self._look_through(view)

    def _look_through(self, view: CatalogueView | None) -> None:
        self.view = view or self.trie.everything()
        if self.view.trie is not self.trie:
            raise ValueError("the view belongs to another trie")
        self._dead: list[Tensor] | None = None  # per level and node 0, or −inf without a live item
        if not self.view.allows_all:
            zero, dead = np.float32(0), np.float32(-np.inf)
            self._dead = [
                torch.from_numpy(np.where(self.view.alive(level), zero, dead)).to(self.device)
                for level in range(self.trie.n_levels)
            ]

    def through(self, view: CatalogueView | None) -> TrieTensors:
        """The same tensors under another view."""
        if view is self.view or (view is None and self.view.allows_all):
            return self
        other = copy(self)
        other._look_through(view)
        return other

    def codes(self, level: int, nodes: Tensor) -> Tensor:
        """Codes of nodes of a level, int64."""
        return look_up(self._tokens[level], nodes).long()

    def ended(self, level: int, parents: Tensor) -> Tensor:
        """Where an item's end mark is behind, so that the code of `level` is forced padding.

        Args:
            level: of the padding.
            parents: nodes of the level above; any value at level 0.
        """
        if level == 0 or self.trie.end_code is None:
            return torch.zeros_like(parents, dtype=torch.bool)
        return self.codes(level - 1, parents) == self.trie.end_code

    def first_leaves(self, level: int, nodes: Tensor) -> Tensor:
        """The first leaf below each node of a level."""
        for below in range(level + 1, self.trie.n_levels):
            nodes = self._child_start[below][nodes].long()
        return nodes

    def items(self, leaves: Tensor) -> Tensor:
        """Catalogue rows of leaves, int64."""
        return self._items[leaves].long()

    def blocks(self, level: int, nodes: Tensor, live: Tensor) -> list[tuple[Tensor, int]]:
        """Which beams to expand together, so that the work follows their number of children.

        How long a node's row is depends on the node alone: what is summed over a row doesn't
        depend on who else is in the batch. A level that needs one rectangle is never counted, which
        would make a GPU wait; nor are its dead beams left out.

        Args:
            level: level of the children.
            nodes: parents, (R,).
            live: beams whose children are wanted, (R,) bool; the others may be left out.

        Returns:
            Rows and how long to make them (the ``length`` of `expand`), block by block; in order
            where there is one block of all rows.
        """
        lengths = self._row_lengths[level]
        if len(lengths) == 1:
            kinds = [torch.arange(len(nodes), device=self.device)]
        else:
            count = self._child_start[level][nodes + 1] - self._child_start[level][nodes]
            kind = torch.searchsorted(torch.tensor(lengths, device=self.device), count.long())
            kind = kind.masked_fill(~live, len(lengths))
            sizes = torch.bincount(kind, minlength=len(lengths) + 1).tolist()
            *kinds, _ = kind.argsort(stable=True).split(sizes)
        return [
            (rows, length)
            for kind_rows, length in zip(kinds, lengths, strict=True)
            if len(kind_rows)
            for rows in kind_rows.split(max(1, _CELLS_AT_ONCE // length))
        ]

    def expand(self, level: int, nodes: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Children of `nodes` in the unfiltered trie.

        Args:
            level: level of the children.
            nodes: parents, (...); any value where a beam is dead (its children are masked later).
            length: M, at least the most children that one of them has; None: the level's most.

        Returns:
            Child ids (..., M), ascending, and which of them exist (..., M).
        """
        length = self.widest[level] if length is None else length
        child, beyond = self._ranges(level, nodes.flatten(), length)
        shape = (*nodes.shape, length)
        return child.view(shape).long(), beyond.view(shape) == 0

    def children(self, level: int, nodes: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """`expand` for the search, which reads each cell of a rectangle several times.

        Args:
            level: level of the children.
            nodes: parents, (R,); any value where a beam is dead.
            length: M, at least the most children that one of them has.

        Returns:
            Child ids, ascending, and their codes, both of the narrow types of the trie's arrays;
            and what to add to scores: 0 where a child exists, −inf behind the last. (R, M) each.
        """
        child, beyond = self._ranges(level, nodes, length)
        return child, look_up(self._tokens[level], child), beyond

    def _ranges(self, level: int, nodes: Tensor, length: int) -> tuple[Tensor, Tensor]:
        start = look_up(self._child_start[level], nodes)
        count = look_up(self._child_start[level], nodes + 1) - start
        child = start.unsqueeze(1) + torch.arange(length, dtype=start.dtype, device=self.device)
        # Each row is a stretch of one line: copied whole, where a comparison goes cell by cell.
        line = torch.zeros(2 * length, device=self.device)
        line[length:] = -torch.inf
        beyond = line.unfold(0, length, 1).index_select(0, length - count)
        return child.clamp_(max=self.n_nodes[level] - 1), beyond

    def follow(self, level: int, nodes: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """One level down along given codes.

        Args:
            level: level of the children.
            nodes: parents, (...).
            codes: the code to follow from each, (...); one that is no child's is not found.

        Returns:
            The children's nodes, and whether they were found, (...) each.
        """
        low = self._child_start[level][nodes].long()
        end = self._child_start[level][nodes + 1].long()
        high, last = end, self.n_nodes[level] - 1
        for _ in range(self.widest[level].bit_length()):  # codes of one node's children ascend
            middle = (low + high) // 2
            below = (low < high) & (self.codes(level, middle.clamp(max=last)) < codes)
            low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
        child = low.clamp(max=last)
        return child, (low < end) & (self.codes(level, child) == codes)

    def siblings(
        self, level: int, parents: Tensor, nodes: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Given children among all of their parents', block by block as `blocks` cuts them.

        Args:
            level: of the children.
            parents: their parents, (R,).
            nodes: one child of each, (R,).

        Yields:
            Rows (r,), all in order where there is one block; codes of their parents' children
            (r, M), which of them exist (r, M), and where the given child is among them (r, 1).
        """
        for rows, length in self.blocks(level, parents, torch.ones_like(parents, dtype=torch.bool)):
            child, exists = self.expand(level, parents[rows], length)
            place = nodes[rows].unsqueeze(1) - child[:, :1]
            yield rows, self.codes(level, child), exists, place

    def allowed(
        self, level: int, child: Tensor, users: LevelFilter | None, user: Tensor | None = None
    ) -> Tensor:
        """Which children the view and the users' own filters leave.

        Args:
            level: level of the children.
            child: ids as `expand` gives them, (U, B, M) or (R, M).
            users: the users' filters at this level, or None.
            user: whose row each is, (R,); None: the first axis is that of users.

        Returns:
            The shape of `child`, bool.
        """
        rows = child.view(-1, child.shape[-1])
        if user is None:
            user = torch.arange(len(child), device=self.device)
            user = user.repeat_interleave(child[0, ..., 0].numel())
        closed = self.closed(level, rows, users, user)
        if closed is None:
            return torch.ones_like(child, dtype=torch.bool)
        return (closed == 0).view(child.shape)

    def closed(
        self, level: int, child: Tensor, users: LevelFilter | None, user: Tensor
    ) -> Tensor | None:
        """What to add to children's scores for the view and the users' own filters.

        On a CPU adding −inf takes a tenth of filling it in where a mask says so.

        Args:
            level: level of the children.
            child: ids as `children` gives them, (R, M).
            users: the users' filters at this level, or None.
            user: whose row each is, (R,).

        Returns:
            0 for a child that is left, −inf for the others, (R, M) float32; None if all are left.
        """
        closed = None
        if self._dead is not None:
            closed = look_up(self._dead[level], child)
        if users is None:
            return closed
        if len(users.dead):
            seen = self._marked(level, child, user, users.dead, others=0.0, marked=-torch.inf)
            closed = seen if closed is None else closed.add_(seen)
        if users.restricted is not None:
            # Opened again are candidates: `only` holds none that the view or `dead` excludes.
            own = self._marked(level, child, user, users.only, others=-torch.inf, marked=0.0)
            closed = torch.zeros_like(own) if closed is None else closed
            closed = torch.where(users.restricted[user].unsqueeze(1), own, closed)
        return closed

    def _marked(
        self, level: int, child: Tensor, user: Tensor, keys: Tensor, others: float, marked: float
    ) -> Tensor:
        """`marked` where a child is one of the keys' nodes of its user, else `others`, (R, M).

        Rows are ranges that overlap nowhere, or are the same (one node twice, or a dead beam's), so
        a key is looked up among the rows' beginnings and its place is the distance from there. Also
        marked may be some of what doesn't exist behind a row's end.

        Args:
            level: level of the children.
            child: ids, (R, M).
            user: whose row each is, (R,).
            keys: ``user * n_nodes + node``, sorted.
            others: value of what isn't marked.
            marked: value of what is.
        """
        n_rows, length = child.shape
        first = user * self.n_nodes[level] + child[:, 0]
        ordered, order = first.sort()
        at = (torch.searchsorted(ordered, keys, right=True) - 1).clamp_(min=0)
        place = keys - ordered[at]
        inside = (place >= 0) & (place < length)
        # What lies in no row goes to a spare place at the end: no look at the device is needed.
        spare = n_rows * length
        found = torch.full((spare + 1,), others, device=self.device)
        found[torch.where(inside, order[at] * length + place, spare)] = marked
        # Of equal rows the last one was found.
        last = order[torch.searchsorted(ordered, first, right=True) - 1]
        return found[:spare].view(n_rows, length).index_select(0, last)

    def exclusions(
        self,
        seen: list[np.ndarray] | None,
        candidates: Sequence[np.ndarray | None] | None = None,
    ) -> list[LevelFilter] | None:
        """Per level the filters of a batch of users.

        Args:
            seen: catalogue rows that each user must not get, or None.
            candidates: the only rows that a user may get; None (for one or all): no such limit.
        """
        restricted = None
        if candidates is not None and any(rows is not None for rows in candidates):
            restricted = torch.tensor([rows is not None for rows in candidates])
        if restricted is None and (seen is None or not any(len(items) for items in seen)):
            return None
        gone = _row_pairs(seen or [])
        dead: Sequence[np.ndarray] = self.view.exclude(*gone)
        only: Sequence[np.ndarray] = [np.zeros(0, dtype=np.int64)] * self.trie.n_levels
        if restricted is not None and candidates is not None:
            only = self.view.only(
                *_row_pairs([() if rows is None else rows for rows in candidates]), *gone
            )
            restricted = restricted.to(self.device)
        return [
            LevelFilter(
                torch.from_numpy(d).to(self.device), torch.from_numpy(o).to(self.device), restricted
            )
            for d, o in zip(dead, only, strict=True)
        ]


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """``table[index]`` of a flat table, which takes three times as long on a CPU."""
    return table.index_select(0, index.flatten()).view(index.shape)


def _row_pairs(lists: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """A list per user as (row, item) pairs."""
    rows = np.repeat(np.arange(len(lists)), [len(items) for items in lists])
    parts = [np.asarray(items, dtype=np.int64) for items in lists]
    return rows, np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _row_lengths(n_children: np.ndarray, narrow: int) -> list[int]:
    """How long the rows of a level's children are made, ascending, each half of the next.

    One length where rows would be half full on the mean, or are short. (Beams prefer nodes with
    many items, but a user's beams are at different ones.)

    Args:
        n_children: of each parent, (n_nodes of the level above,).
        narrow: what is short.
    """
    lengths = [int(n_children.max())]
    if lengths[0] > 2 * n_children.mean():
        while lengths[0] > narrow:
            lengths.insert(0, -(-lengths[0] // 2))
    return lengths
