"""A trie on a device: children, codes and filters of whole batches as tensors.

Shapes: U users, B beams, M children per beam, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genrec.decoding.trie import CatalogueView, SidTrie


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
        self.widest = [trie.max_children(level) for level in range(trie.n_levels)]
        self._look_through(view)

    def _look_through(self, view: CatalogueView | None) -> None:
        self.view = view or self.trie.everything()
        if self.view.trie is not self.trie:
            raise ValueError("the view belongs to another trie")
        self._alive: list[Tensor] | None = None
        if not self.view.allows_all:
            levels = range(self.trie.n_levels)
            self._alive = [
                torch.from_numpy(self.view.alive(level)).to(self.device) for level in levels
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
        return self._tokens[level][nodes].long()

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

    def expand(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Children of `nodes` in the unfiltered trie.

        Args:
            level: level of the children.
            nodes: parents, (U, B); any value where a beam is dead (its children are masked later).

        Returns:
            Child ids (U, B, M), ascending, and which of them exist (U, B, M).
        """
        start = self._child_start[level][nodes].long()  # (U, B)
        stop = self._child_start[level][nodes + 1].long()
        child = start.unsqueeze(-1) + torch.arange(self.widest[level], device=self.device)
        exists = child < stop.unsqueeze(-1)
        return child.clamp_(max=self.n_nodes[level] - 1), exists

    def follow(
        self, level: int, nodes: Tensor, codes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One level down along given codes.

        Args:
            level: level of the children.
            nodes: parents, (U, B).
            codes: the code to follow from each, (U, B); one that is no child's is not found.

        Returns:
            Codes of the children (U, B, M), which of them exist (U, B, M), the place of the given
            code among them (U, B, 1), its node (U, B), and whether it was found (U, B).
        """
        child, exists = self.expand(level, nodes)
        child_codes = self.codes(level, child)
        same = exists & (child_codes == codes.unsqueeze(-1))
        place = same.int().argmax(-1, keepdim=True)
        return child_codes, exists, place, child.gather(-1, place).squeeze(-1), same.any(-1)

    def allowed(
        self, level: int, child: Tensor, users: LevelFilter | None, first: int = 0
    ) -> Tensor:
        """Which children the view and the users' own filters leave, (U, B, M).

        Args:
            level: level of the children.
            child: ids, (U, B, M).
            users: the users' filters at this level, or None.
            first: row of the batch's first user within `users`.
        """
        if self._alive is None:
            allowed = torch.ones_like(child, dtype=torch.bool)
        else:
            allowed = self._alive[level][child]
        if users is None:
            return allowed
        if len(users.dead):
            allowed = self._marked(level, child, users.dead, first, allowed, False)
        if users.restricted is not None:
            restricted = users.restricted[first : first + len(child)].view(-1, 1, 1)
            nothing = allowed & ~restricted
            # Opened again are candidates: `only` holds none that the view or `dead` excludes.
            allowed = self._marked(level, child, users.only, first, nothing, True)
        return allowed

    def _marked(
        self, level: int, child: Tensor, keys: Tensor, first: int, mask: Tensor, value: bool
    ) -> Tensor:
        """`mask` with `value` where a child is one of the keys' nodes of its user, (U, B, M).

        Children are ranges, so each key's place is found by arithmetic, beam by beam. Where users
        have more keys than there are children, children are looked up among the keys instead.

        Args:
            level: level of the children.
            child: ids, (U, B, M).
            keys: ``user * n_nodes + node``.
            first: row of the batch's first user.
            mask: what to start from.
            value: what to set.
        """
        n_users, n_beams, n_child = child.shape
        if len(keys) > n_users * n_child:
            rows = torch.arange(first, first + n_users, device=self.device).view(-1, 1, 1)
            found = _holds(keys, rows * self.n_nodes[level] + child)
            return mask | found if value else mask & ~found
        row = keys // self.n_nodes[level] - first  # (K,)
        node = (keys % self.n_nodes[level]).unsqueeze(1)
        own = ((row >= 0) & (row < n_users)).unsqueeze(1)
        row = row.clamp(0, n_users - 1)
        place = node - child[row, :, 0]  # (K, B)
        inside = own & (place >= 0) & (place < n_child)
        place = place.clamp(0, n_child - 1)
        beam = torch.arange(n_beams, device=self.device)
        at = (row.unsqueeze(1) * n_beams + beam) * n_child + place
        # What lies below no beam goes to a spare place at the end: no look at the device is needed.
        spare = mask.numel()
        flat = torch.cat([mask.flatten(), mask.new_zeros(1)])
        flat[torch.where(inside, at, spare).flatten()] = value
        return flat[:spare].view(child.shape)

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


def _row_pairs(lists: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """A list per user as (row, item) pairs."""
    rows = np.repeat(np.arange(len(lists)), [len(items) for items in lists])
    parts = [np.asarray(items, dtype=np.int64) for items in lists]
    return rows, np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _holds(sorted_keys: Tensor, key: Tensor) -> Tensor:
    """Whether each key is among the sorted ones, of which there is one at least."""
    at = torch.searchsorted(sorted_keys, key).clamp_(max=len(sorted_keys) - 1)
    return sorted_keys[at] == key
