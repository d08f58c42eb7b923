"""Indexes without vectors: random, sequential, collaborative, independent, semantic, hybrid.

The P5 family (Geng et al. 2022, "Recommendation as Language Processing"; Hua et al. 2023, "How to
Index Item IDs for Recommendation Foundation Models"; Xu et al. 2023, "OpenP5"). Deviations: every
SID has the same length and its own tokens, where P5 lets a T5 tokenizer cut numbers into pieces.
New items get codes from `next_codes`, which moves no old one; `spare` is the room kept for them.
In collaborative, semantic and hybrid indexes code 0 on every level but the last means "unplaced".
One long file: each rule for new items must match how its index was built, so they stand together.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.cluster import SpectralClustering

from genrec.item_lists import ItemLists
from genrec.quantizers.neighbours import common_users
from genrec.quantizers.quality import row_ids, shared_rows
from genrec.quantizers.quantizer import CodeArray, check_codes

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]

_LINKS = 2**27  # of the co-occurrence graph that are kept: some 1.6 GB
Paths = Sequence[Sequence[str | None] | None]

RANDOM, SEQUENTIAL, COLLABORATIVE = "random", "sequential", "collaborative"
INDEPENDENT, SEMANTIC, HYBRID = "independent", "semantic", "hybrid"
KINDS = (RANDOM, SEQUENTIAL, COLLABORATIVE, INDEPENDENT, SEMANTIC, HYBRID)


@dataclass(frozen=True)
class ItemCodes:
    """What every index function returns.

    Attributes:
        codes: distinct rows, (n_items, n_levels) int32; row i is catalogue row i.
        codebook_sizes: number of codes per level, those for later items included.
    """

    codes: CodeArray
    codebook_sizes: tuple[int, ...]


def random_index(n_items: int, n_levels: int, codebook_size: int, seed: int) -> ItemCodes:
    """Distinct SIDs drawn uniformly, without replacement: P5's random indexing.

    It says nothing of the items, and is the control that other indexes must beat. The memory it
    takes grows with the items, not with the SIDs that there are.

    Raises:
        ValueError: there are fewer SIDs than items.
    """
    _check_items(n_items)
    sizes = _equal_sizes(n_levels, codebook_size)
    none_taken = np.empty((0, n_levels), dtype=np.int32)
    return ItemCodes(draw_free(np.random.default_rng(seed), n_items, sizes, none_taken), sizes)


def sequential_index(
    sequences: ItemLists,
    n_items: int,
    codebook_size: int = 256,
    n_levels: int | None = None,
    seed: int = 0,
    spare: float = 0.1,
) -> ItemCodes:
    """Items numbered as users' training histories first show them: P5's sequential indexing.

    The number is written in base `codebook_size`, so items of one history share their first codes.
    Consecutive numbers therefore leak the order in time: with held-out interactions among the
    sequences, as in P5's data, a target's SID could be guessed from its neighbours' (Rajput et al.
    2023, "TIGER", leave P5's figures out for that reason). Items that no training sequence shows
    follow in a seeded random order, since the catalogue's own order may tell the same.

    Args:
        sequences: item indices of TRAINING histories only, one list per user, oldest first.
        n_items: items of the catalogue.
        codebook_size: base of the number.
        n_levels: its digits; default: the fewest that hold the items and the spare ones.
        seed: of the order of unseen items.
        spare: numbers kept for later items, as a share of the items.

    Raises:
        ValueError: there are fewer SIDs than items, or a sequence names an unknown item.
    """
    _check_sequences(sequences, n_items)
    wanted = with_spare(n_items, spare)
    if n_levels is None:
        _equal_sizes(1, codebook_size)
        n_levels = 1
        while codebook_size**n_levels < wanted:
            n_levels += 1
    sizes = _equal_sizes(n_levels, codebook_size)
    _check_space(n_items, sizes, 0)
    shown, first = np.unique(sequences.values, return_index=True)
    unseen = np.setdiff1d(np.arange(n_items), shown)
    order = np.concatenate(
        [shown[np.argsort(first)], np.random.default_rng(seed).permutation(unseen)]
    )
    numbers = np.empty(n_items, dtype=np.int64)
    numbers[order] = np.arange(n_items)
    return ItemCodes(_digits(numbers, sizes), sizes)


def independent_index(n_items: int, spare: float = 0.1) -> ItemCodes:
    """One token an item, one level: P5's independent indexing.

    The vocabulary grows with the catalogue. `spare` tokens (a share of the items) are for later
    items: without them a new item needs a new token, and so a new embedding.
    """
    size = with_spare(n_items, spare)
    return ItemCodes(np.arange(n_items, dtype=np.int32)[:, None], (size,))


def collaborative_index(
    sequences: ItemLists,
    n_items: int,
    branching: int = 20,
    leaf_size: int = 256,
    max_levels: int = 4,
    seed: int = 0,
    spare: float = 0.1,
) -> ItemCodes:
    """Recursive spectral clusters of the co-occurrence graph: Hua et al.'s collaborative indexing.

    Two items are linked by the number of training sequences that hold both. A cluster larger than
    `leaf_size` is clustered again; the last token numbers the items inside their leaf. Clusters are
    coded 1 … `branching`; a path that ends early is padded with 0. Items with no link, and later
    ones, are the branch whose first code is 0, numbered over all the levels below it. Clustering is
    scikit-learn's `SpectralClustering` with `cluster_qr` (Damle et al. 2019), as in OpenP5, on a
    sparse graph and with LOBPCG, without which a large catalogue would need a dense decomposition.

    Args:
        sequences: item indices of TRAINING histories only.
        n_items: items of the catalogue.
        branching: clusters that a cluster is cut into.
        leaf_size: items that the last level numbers. The recursion stops at `max_levels`, and
            the last codebook is then as large as the largest leaf.
        max_levels: tokens of a SID at most, two at least; fewer where the leaves are reached early.
        seed: of the clustering and of the numbers inside the leaves.
        spare: room kept for later items in the branch 0, as a share of the items.

    Raises:
        ValueError: no two items occur together, or a sequence names an unknown item.
    """
    _check_sequences(sequences, n_items)
    if branching < 2 or leaf_size < 2 or max_levels < 2:
        raise ValueError(
            f"branching={branching}, leaf_size={leaf_size} and max_levels={max_levels} must be at "
            "least 2"
        )
    wanted = with_spare(n_items, spare)
    graph = _co_occurrence(sequences, n_items)
    linked = np.diff(graph.indptr) > 0
    if not linked.any():
        raise ValueError(
            "no two items occur in one training sequence, so there is nothing to cluster; use a "
            "random or a semantic index"
        )
    paths = _spectral_paths(graph, np.flatnonzero(linked), branching, leaf_size, max_levels, seed)
    paths = paths[:, : int(np.flatnonzero(paths.any(axis=0))[-1]) + 1]
    numbers = numbers_in_groups(row_ids(paths), _shuffled(n_items, seed))
    largest = int(numbers[linked].max()) + 1
    if largest > leaf_size:
        logger.warning(
            "a cluster of %d items exceeds leaf_size=%d at max_levels=%d: the last codebook has %d "
            "codes; raise max_levels or branching", largest, leaf_size, max_levels, largest,
        )  # fmt: skip
    unlinked = np.random.default_rng(seed).permutation(np.flatnonzero(~linked))
    to_hold = wanted - n_items + len(unlinked)
    middle = (branching + 1,) * (paths.shape[1] - 1)
    last = max(leaf_size, largest, -(-to_hold // math.prod(middle)))
    codes = np.column_stack([paths, numbers]).astype(np.int32)
    codes[unlinked, 1:] = _digits(np.arange(len(unlinked)), (*middle, last))
    return ItemCodes(codes, (branching + 1, *middle, last))


def semantic_index(
    categories: Paths,
    n_items: int,
    spare: float = 0.1,
    max_depth: int | None = None,
    seed: int = 0,
) -> ItemCodes:
    """One token per step of an item's category path, and one that numbers it there.

    Hua et al.'s semantic indexing. A level has a token per distinct category name (so a name means
    the same under every parent) in alphabetical order from 1, and 0 where the path has ended; an
    item without categories is all 0. A root that all items share costs a level that says nothing:
    leave it out of the paths.

    Args:
        categories: path of each item, root first, or None; a path ends at its first empty name.
        n_items: items of the catalogue.
        spare: numbers kept in the largest category for later items, as a share of its items; every
            smaller category has that many and more.
        max_depth: steps of a path that count; default: all of the longest.
        seed: of the numbers inside the categories.

    Raises:
        ValueError: no item has a category, or there isn't one path per item.
    """
    _check_items(n_items)
    if len(categories) != n_items:
        raise ValueError(f"{len(categories)} category paths were given for {n_items} items")
    if max_depth is not None and max_depth < 1:
        raise ValueError(f"max_depth={max_depth} must be at least 1, or None for whole paths")
    paths = [_clean_path(path)[:max_depth] for path in categories]
    depth = max(map(len, paths))
    if depth == 0:
        raise ValueError("no item has a category; use another index, such as a random one")
    prefix = np.zeros((n_items, depth), dtype=np.int32)
    sizes = []
    for level in range(depth):
        names = sorted({path[level] for path in paths if len(path) > level})
        code_of = {name: code for code, name in enumerate(names, start=1)}
        prefix[:, level] = [code_of[p[level]] if len(p) > level else 0 for p in paths]
        sizes.append(len(names) + 1)
    numbers = numbers_in_groups(row_ids(prefix), _shuffled(n_items, seed))
    sizes.append(with_spare(int(numbers.max()) + 1, spare))
    return ItemCodes(np.column_stack([prefix, numbers]).astype(np.int32), tuple(sizes))


def hybrid_index(prefix: ItemCodes, spare: float = 0.1) -> ItemCodes:
    """The clusters of another index, then one token that only this item has.

    Hua et al.'s hybrid indexing: the prefix says what items have in common, the last token is
    independent. It takes the place of the other index's number inside the cluster.

    Args:
        prefix: a collaborative or a semantic index.
        spare: item tokens kept for later items, as a share of the items.

    Raises:
        ValueError: the other index has one level only.
    """
    if len(prefix.codebook_sizes) < 2:
        raise ValueError(
            "the index has one level, so no prefix; give a collaborative or semantic one"
        )
    items = independent_index(len(prefix.codes), spare)
    codes = np.column_stack([prefix.codes[:, :-1], items.codes])
    return ItemCodes(codes.astype(np.int32), (*prefix.codebook_sizes[:-1], *items.codebook_sizes))


def next_codes(
    kind: str,
    codes: npt.NDArray[np.integer],
    codebook_sizes: tuple[int, ...],
    n_new: int,
    seed: int = 0,
    categories: Paths | None = None,
) -> CodeArray:
    """Codes for later items; they collide with nothing, and no old item moves.

    random draws free SIDs; sequential and independent count on; collaborative fills the branch 0
    (new items have no co-occurrences); semantic numbers on inside the item's category, where a
    category that the index doesn't know ends the path; hybrid takes the prefix of a semantic index
    if categories are given, else 0, and the next item token. Numbers that several items share a
    token of are dealt in a seeded order, not in that of the catalogue (see `numbers_in_groups`).

    Args:
        kind: one of `KINDS`, what `codes` were made by.
        codes: of all items so far, (n_items, n_levels).
        codebook_sizes: of that index.
        n_new: items to place.
        seed: of a random index's draw, and of the order in which numbers are dealt.
        categories: paths of all items, old ones first, (n_items + n_new).

    Returns:
        (n_new, n_levels) int32.

    Raises:
        ValueError: unknown kind, old codes repeat, or there is no room left.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is none of {KINDS}")
    check_codes(codes, codebook_sizes)
    old = codes.astype(np.int32)
    if n_new < 0 or len(old) == 0 or shared_rows(old).any():
        raise ValueError(f"n_new={n_new} must not be negative, and old codes be there and distinct")
    if kind == RANDOM:
        return draw_free(np.random.default_rng(seed), n_new, codebook_sizes, old)
    dealt = _shuffled(n_new, seed)
    if kind == INDEPENDENT:
        return _count_on(old, codebook_sizes, n_new)
    if kind == SEQUENTIAL:
        return _count_on(old, codebook_sizes, n_new)[dealt]
    if kind == COLLABORATIVE:
        unplaced = old[old[:, 0] == 0, 1:]
        rest = _count_on(unplaced, codebook_sizes[1:], n_new)[dealt]
        return np.column_stack([np.zeros(n_new, dtype=np.int32), rest])
    prefixes = np.zeros((n_new, old.shape[1] - 1), dtype=np.int32)
    if categories is not None:
        prefixes = _category_prefixes(old[:, :-1], categories, n_new)
    elif kind == SEMANTIC:
        raise ValueError("a semantic index needs `categories`, the paths of old and new items")
    if kind == HYBRID:
        return np.column_stack([prefixes, _count_on(old[:, -1:], codebook_sizes[-1:], n_new)])
    numbers = later_numbers(old, prefixes, seed)
    if (full := numbers >= codebook_sizes[-1]).any():
        raise ValueError(
            f"the category with codes {tuple(prefixes[full.argmax()].tolist())} has used its "
            f"{codebook_sizes[-1]} numbers; build the index anew with a larger `spare`"
        )
    return np.column_stack([prefixes, numbers]).astype(np.int32)


def draw_free(
    rng: np.random.Generator, n: int, codebook_sizes: Sequence[int], taken: CodeArray
) -> CodeArray:
    """Distinct codes that are not taken, drawn uniformly, (n, n_levels).

    Args:
        rng: source of the draw.
        n: how many.
        codebook_sizes: number of codes per level.
        taken: distinct codes, (n_taken, n_levels).

    Raises:
        ValueError: fewer than `n` are free.
    """
    sizes = tuple(codebook_sizes)
    _check_space(n, sizes, len(taken))
    if n == 0:
        return np.empty((0, len(sizes)), dtype=np.int32)
    if math.prod(sizes) <= 4 * (n + len(taken)):  # most would be drawn in vain: list the free ones
        free = np.setdiff1d(np.arange(math.prod(sizes)), _numbers(taken, sizes), assume_unique=True)
        return _digits(rng.choice(free, n, replace=False), sizes)
    rows = taken.astype(np.int32)
    while (missing := len(taken) + n - len(rows)) > 0:
        drawn = rng.integers(0, sizes, (missing, len(sizes)), dtype=np.int32)
        rows = np.concatenate([rows, drawn])
        rows = rows[np.sort(np.unique(rows, axis=0, return_index=True)[1])]
    return rows[len(taken) :]


def numbers_in_groups(groups: IntArray, order: IntArray) -> IntArray:
    """0, 1, … inside each group, given to its rows as they come in `order`.

    The order of the rows is the wrong one for codes: catalogues are often numbered by an item's
    first interaction, held out ones among them, and neighbouring codes would tell the model who was
    bought after whom.

    Args:
        groups: group of each row, from 0, (n,).
        order: a permutation of the rows, (n,).

    Returns:
        (n,).
    """
    by_group = order[np.argsort(groups[order], kind="stable")]
    counts = np.bincount(groups)
    numbers = np.empty(len(groups), dtype=np.int64)
    numbers[by_group] = np.arange(len(groups)) - np.repeat(np.cumsum(counts) - counts, counts)
    return numbers


def later_numbers(old: CodeArray, prefixes: CodeArray, seed: int) -> IntArray:
    """Numbers of new rows below their prefixes: after the largest in use, in a seeded order.

    Args:
        old: codes in use, their last column the number, (n_old, n_levels).
        prefixes: of the new rows, (n_new, n_levels - 1).
        seed: of the order among new rows of one prefix.

    Returns:
        (n_new,); whether the last level has room for them is the caller's to check.
    """
    groups = row_ids(np.concatenate([old[:, :-1], prefixes]))
    used, new = groups[: len(old)], groups[len(old) :]
    first = np.zeros(groups.max(initial=0) + 1, dtype=np.int64)
    np.maximum.at(first, used, old[:, -1] + 1)
    return first[new] + numbers_in_groups(new, _shuffled(len(new), seed))


def _shuffled(n: int, seed: int) -> IntArray:
    return np.random.default_rng(seed).permutation(n)


def with_spare(n: int, spare: float) -> int:
    """`n` and the share `spare` of it, rounded up."""
    _check_items(n)
    if not 0 <= spare < math.inf:
        raise ValueError(f"spare={spare} must be a share of the items such as 0.1, not negative")
    return n + math.ceil(round(n * spare, 6))


def _check_items(n_items: int) -> None:
    if n_items < 1:
        raise ValueError(f"n_items={n_items}; an index needs at least one item")


def _check_sequences(sequences: ItemLists, n_items: int) -> None:
    _check_items(n_items)
    items = sequences.values
    if len(items) and not 0 <= items.min() <= items.max() < n_items:
        raise ValueError(
            f"the sequences name items {items.min()}..{items.max()}; the catalogue has "
            f"0..{n_items - 1}"
        )


def _equal_sizes(n_levels: int, codebook_size: int) -> tuple[int, ...]:
    if n_levels < 1 or codebook_size < 2:
        raise ValueError(
            f"n_levels={n_levels} must be at least 1 and codebook_size={codebook_size} at least 2"
        )
    return (codebook_size,) * n_levels


def _check_space(n: int, sizes: tuple[int, ...], n_taken: int) -> None:
    space = math.prod(sizes)
    if n > space - n_taken:
        raise ValueError(
            f"{n} items don't fit into the {space - n_taken} free SIDs of codebooks {sizes} "
            f"({n_taken} are taken); build the index with more levels, larger codebooks or `spare`"
        )


def _digits(numbers: IntArray, sizes: tuple[int, ...]) -> CodeArray:
    """Numbers written with one digit per level, most significant first, (n, n_levels)."""
    codes = np.empty((len(numbers), len(sizes)), dtype=np.int32)
    for level in reversed(range(len(sizes))):
        numbers, codes[:, level] = np.divmod(numbers, sizes[level])
    return codes


def _numbers(codes: CodeArray, sizes: tuple[int, ...]) -> IntArray:
    """The inverse of `_digits`."""
    numbers = np.zeros(len(codes), dtype=np.int64)
    for level, size in enumerate(sizes):
        numbers = numbers * size + codes[:, level]
    return numbers


def _co_occurrence(sequences: ItemLists, n_items: int) -> sp.csr_matrix:
    """Number of sequences that hold both items, (n_items, n_items), without the diagonal.

    Where `_LINKS` links would not do, items keep their strongest ones, and what others keep of
    them: the graph's memory is bounded, whatever the sequences.
    """
    most = max(1, _LINKS // n_items)
    parts, cut = [], False
    for start, counts in common_users(sequences, n_items):
        rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        other = counts.indices != rows + start
        rows, columns, values = rows[other], counts.indices[other], counts.data[other]
        if len(rows) and np.bincount(rows).max() > most:
            order = np.lexsort((columns, -values, rows))
            kept = order[numbers_in_groups(rows, order)[order] < most]
            rows, columns, values, cut = rows[kept], columns[kept], values[kept], True
        parts.append(sp.csr_matrix((values.astype(np.float64), (rows, columns)), counts.shape))
    graph = sp.vstack(parts, format="csr")
    return graph.maximum(graph.T).tocsr() if cut else graph


def _spectral_paths(
    graph: sp.csr_matrix,
    items: IntArray,
    branching: int,
    leaf_size: int,
    max_levels: int,
    seed: int,
) -> CodeArray:
    """Clusters 1 … branching of each item from the root down, padded with 0."""
    paths = np.zeros((graph.shape[0], max_levels - 1), dtype=np.int32)
    pending = [(items, 0)]
    while pending:
        members, level = pending.pop()
        if len(members) <= leaf_size:
            if level == 0:  # the first code 0 is for unlinked items
                paths[members, 0] = 1
            continue
        labels = _spectral_clusters(graph[members][:, members], branching, seed)
        paths[members, level] = labels + 1
        if level + 1 < max_levels - 1 and labels.any():  # one cluster would stay one for ever
            pending += [(members[labels == c], level + 1) for c in range(int(labels.max()) + 1)]
    return paths


def _spectral_clusters(graph: sp.csr_matrix, branching: int, seed: int) -> IntArray:
    """Labels 0, 1, … of at most `branching` clusters, (n,)."""
    clustering = SpectralClustering(
        min(branching, graph.shape[0] - 1),
        affinity="precomputed",
        assign_labels="cluster_qr",
        eigen_solver="lobpcg",
        random_state=seed,
    )
    with warnings.catch_warnings():
        # A graph in several pieces is clustered by piece, and eigenvectors that are almost exact
        # do: both are expected here.
        warnings.simplefilter("ignore", UserWarning)
        labels = clustering.fit(graph).labels_
    return np.unique(labels, return_inverse=True)[1].ravel().astype(np.int64)


def _clean_path(path: Sequence[str | None] | None) -> list[str]:
    if isinstance(path, str):
        raise ValueError(f"{path!r} is text; a category path is a list of names, root first")
    names: list[str] = []
    for name in path if path is not None else ():
        if not name:
            break
        names.append(name)
    return names


def _count_on(old: CodeArray, sizes: tuple[int, ...], n_new: int) -> CodeArray:
    """The numbers after the largest that is taken."""
    first = int(_numbers(old, sizes).max()) + 1 if len(old) else 0
    _check_space(n_new, sizes, first)
    return _digits(np.arange(first, first + n_new), sizes)


def _category_prefixes(old: CodeArray, categories: Paths, n_new: int) -> CodeArray:
    """Prefix of each new item in a semantic index, read off the old items' names and codes."""
    if len(categories) != len(old) + n_new:
        raise ValueError(
            f"{len(categories)} category paths were given; {len(old)} old and {n_new} new items "
            "need one each, old ones first"
        )
    paths = [_clean_path(path) for path in categories]
    prefixes = np.zeros((n_new, old.shape[1]), dtype=np.int32)
    walking = np.ones(n_new, dtype=bool)
    for level in range(old.shape[1]):
        code_of: dict[str, int] = {}
        for path, code in zip(paths, old[:, level].tolist(), strict=False):
            # An old item may itself have come later, with a name that the index doesn't know.
            if code and (len(path) <= level or code_of.setdefault(path[level], code) != code):
                raise ValueError(
                    f"the path {path} doesn't belong to code {code} of level {level}; give the "
                    "categories that the semantic index was built from"
                )
        if len(set(code_of.values())) < len(code_of):
            raise ValueError(
                f"several names have one code on level {level}; give the categories that the "
                "semantic index was built from"
            )
        names = [path[level] if len(path) > level else "" for path in paths[len(old) :]]
        prefixes[:, level] = np.where(walking, [code_of.get(name, 0) for name in names], 0)
        walking &= prefixes[:, level] > 0
    return prefixes
