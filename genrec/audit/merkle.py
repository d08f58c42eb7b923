"""Merkle trees as in RFC 6962, section 2.1 (certificate transparency), over SHA-256.

Leaves and inner nodes are hashed under different first bytes, so that no inner node can pass for a
leaf. All hashes travel as 64 hexadecimal digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


def leaf_hash(data: bytes) -> str:
    """Hash of one leaf's bytes."""
    return hashlib.sha256(b"\0" + data).hexdigest()


def _inner(left: str, right: str) -> str:
    return hashlib.sha256(b"\1" + bytes.fromhex(left) + bytes.fromhex(right)).hexdigest()


def root(leaves: Sequence[str]) -> str:
    """Root over leaf hashes; of none it is the hash of no bytes.

    Level by level: the last node of an odd level moves up unchanged, which is the tree of the RFC.
    """
    if not leaves:
        return hashlib.sha256(b"").hexdigest()
    level = list(leaves)
    while len(level) > 1:
        paired = [_inner(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = paired + level[len(paired) * 2 :]
    return level[0]


def path(leaves: Sequence[str], place: int) -> list[str]:
    """Hashes that lead from the leaf at `place` to the root, from below.

    Raises:
        ValueError: there is no such leaf.
    """
    if not 0 <= place < len(leaves):
        raise ValueError(f"place={place} is no leaf of a tree of {len(leaves)}")
    level, steps = list(leaves), []
    while len(level) > 1:
        if (place ^ 1) < len(level):
            steps.append(level[place ^ 1])
        paired = [_inner(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = paired + level[len(paired) * 2 :]
        place //= 2
    return steps


def root_from_path(leaf: str, place: int, size: int, steps: Sequence[str]) -> str:
    """Root that a leaf and its path give.

    Raises:
        ValueError: the place is outside the tree, or the path has another length than it must have.
    """
    if not 0 <= place < size:
        raise ValueError(f"place={place} is no leaf of a tree of {size}")
    rest, node = list(steps), leaf
    while size > 1:
        if (place ^ 1) < size:
            if not rest:
                raise ValueError("the path is too short for its tree")
            sibling = rest.pop(0)
            node = _inner(sibling, node) if place % 2 else _inner(node, sibling)
        place, size = place // 2, (size + 1) // 2
    if rest:
        raise ValueError("the path is too long for its tree")
    return node
