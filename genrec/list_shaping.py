"""Lists made to measure after the search: variants collapsed, items boosted, categories capped.

Each step is a function from candidate lists to candidate lists, so that they compose:

    lists = Candidates.of(result.items, result.scores)     # k = beam width: the wider, the better
    lists = boosted(lists, weight_of_item)
    lists = without_variants(lists, title_groups(catalog["title"]))
    lists = capped(lists, [Cap(category, 3)])
    top = lists.top(10)

They choose among the search's own candidates and can't reach past them: if the beam holds fewer
than k items that a cap lets through, the list is shorter than k, padded with −1. Search wider, or,
where items are not to be shown at all, filter them in the trie (a view), which costs no candidate.

Scores stay those of the search, log-probabilities under its normaliser. What a shaped list is
ordered by is a number of its own, `keys`. Ties go to the candidate that came first in the search,
whose own ties are broken by SID.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.metrics import EMPTY, check_catalogue, check_lists

IntArray = npt.NDArray[np.integer]
FloatArray = npt.NDArray[np.floating]
BoolArray = npt.NDArray[np.bool_]

_BLOCK_CELLS = 1 << 22  # cells of one block of pairs


@dataclass(frozen=True)
class Candidates:
    """Candidate lists of n rows and m places, each ordered by falling key, its padding at the end.

    Attributes:
        items: catalogue rows, −1 at padding. ``# (n, m)``
        scores: log-probabilities as the search gave them, −inf at padding. ``# (n, m)``
        keys: what the list is ordered by, −inf at padding. ``# (n, m)``
        places: where each item stood in the search's list (for its other columns, say the
            log-probability of each level), −1 at padding. ``# (n, m)``
    """

    items: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    keys: npt.NDArray[np.float64]
    places: npt.NDArray[np.int64]

    @classmethod
    def of(cls, items: IntArray, scores: FloatArray) -> Candidates:
        """Take a search's lists.

        Args:
            items: catalogue rows, distinct within a row; −1 where a list has no more. ``# (n, m)``
            scores: their log-probabilities; what stands at padding is not read. ``# (n, m)``

        Raises:
            ValueError: the shapes differ, a list has an item twice (draws with replacement do), or
                the score of an item is not finite.
        """
        check_lists(items)
        if scores.shape != items.shape:
            raise ValueError(
                f"scores has shape {scores.shape}, items {items.shape}; they must match"
            )
        real = items != EMPTY
        if (bad := real & ~np.isfinite(scores)).any():
            row, place = np.argwhere(bad)[0]
            raise ValueError(
                f"item {items[row, place]} of row {row} has score {scores[row, place]}; the score "
                "of an item must be finite"
            )
        place = np.broadcast_to(np.arange(items.shape[1]), items.shape)
        own = np.where(real, scores, -np.inf)
        return cls(
            items.astype(np.int64),
            own.astype(np.float32),
            own.astype(np.float64),
            np.where(real, place, EMPTY).astype(np.int64),
        )._ordered()

    def _ordered(self) -> Candidates:
        """By key descending, then by place in the search; padding last."""
        place = np.where(self.places == EMPTY, self.places.shape[1], self.places)
        order = np.lexsort((place, -self.keys), axis=1)
        return Candidates(
            np.take_along_axis(self.items, order, axis=1),
            np.take_along_axis(self.scores, order, axis=1),
            np.take_along_axis(self.keys, order, axis=1),
            np.take_along_axis(self.places, order, axis=1),
        )

    def keep(self, kept: BoolArray) -> Candidates:
        """Only the candidates for which `kept` is true, the others' places closed up. ``# (n, m)``.

        Raises:
            ValueError: another shape.
        """
        if kept.shape != self.items.shape:
            raise ValueError(f"kept has shape {kept.shape}; it must be {self.items.shape}")
        return Candidates(
            np.where(kept, self.items, EMPTY),
            np.where(kept, self.scores, -np.inf).astype(np.float32),
            np.where(kept, self.keys, -np.inf),
            np.where(kept, self.places, EMPTY),
        )._ordered()

    def top(self, k: int) -> Candidates:
        """The first `k`; shorter lists are padded.

        Raises:
            ValueError: `k` exceeds the candidates: the search was too narrow for it.
        """
        width = self.items.shape[1]
        if not 1 <= k <= width:
            raise ValueError(f"k={k} must lie between 1 and the {width} candidates of a list")
        return Candidates(self.items[:, :k], self.scores[:, :k], self.keys[:, :k],
            self.places[:, :k])  # fmt: skip


@dataclass(frozen=True)
class Cap:
    """At most `limit` items of one label in a list.

    Attributes:
        labels: number of each catalogue row's category, brand, …; −1: has none, never capped.
            ``# (n_items,)``
        limit: at least 1 (to show none, filter them in the trie).
    """

    labels: IntArray
    limit: int

    def __post_init__(self) -> None:
        """Reject a limit that shows nothing."""
        if isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 1:
            raise ValueError(
                f"limit={self.limit!r} must be an integer of at least 1; items that are not to be "
                "shown at all are filtered in the trie, by a catalogue view"
            )


def boosted(lists: Candidates, log_weights: FloatArray) -> Candidates:
    """Add a weight to each item's key: log 2 ranks it as if it were twice as probable.

    Args:
        lists: candidates.
        log_weights: of each catalogue row, finite; 0 leaves it where it is (see `label_weights`).
            ``# (n_items,)``

    Raises:
        ValueError: a weight is not finite, or a candidate has none.
    """
    weights = _of_catalogue("log_weights", log_weights, lists.items)
    if not np.issubdtype(weights.dtype, np.number) or not np.isfinite(weights).all():
        raise ValueError(
            "log_weights must be finite numbers; an item that is never or always to be shown is "
            "no matter of weights (filter it in the trie, or put it in front)"
        )
    real = lists.items != EMPTY
    added = np.where(real, weights[np.where(real, lists.items, 0)], 0.0)
    return replace(lists, keys=lists.keys + added)._ordered()


def ordered_by(lists: Candidates, keys: FloatArray) -> Candidates:
    """Order candidates by other keys than their scores.

    Args:
        lists: candidates.
        keys: one of each, in the places of `lists`; finite, but −inf at padding. ``# (n, m)``

    Raises:
        ValueError: another shape, or the key of a candidate is not finite.
    """
    if keys.shape != lists.items.shape:
        raise ValueError(f"keys has shape {keys.shape}; it must be {lists.items.shape}")
    real = lists.items != EMPTY
    if not np.isfinite(keys[real]).all():
        raise ValueError("keys must be finite numbers for every candidate")
    return replace(lists, keys=np.where(real, keys, -np.inf))._ordered()


def without_variants(lists: Candidates, groups: IntArray) -> Candidates:
    """Keep the best candidate of each group of variants (see `title_groups`).

    Args:
        lists: candidates.
        groups: number of each catalogue row's group; −1: in none, always kept. ``# (n_items,)``
    """
    return capped(lists, [Cap(groups, 1)])


def without_similar(lists: Candidates, vectors: npt.NDArray, max_cosine: float) -> Candidates:
    """Keep a candidate if its cosine with every better one that is kept is at most `max_cosine`.

    Similarity is not transitive, so "the best of each group" is read greedily from the top: what a
    dropped item resembles may stay. Zero vectors resemble nothing.

    Args:
        lists: candidates.
        vectors: one per catalogue row, any scale. ``# (n_items, dim)``
        max_cosine: in [−1, 1); what is above counts as a near-duplicate.

    Raises:
        ValueError: the threshold or the vectors are none.
    """
    if not -1 <= max_cosine < 1:
        raise ValueError(f"max_cosine={max_cosine} must lie in [-1, 1); above it is a duplicate")
    if vectors.ndim != 2:
        raise ValueError(f"vectors has shape {vectors.shape}; it must be (n_items, dim)")
    check_catalogue(lists.items, len(vectors))
    n, m = lists.items.shape
    kept = lists.items != EMPTY
    block = max(1, _BLOCK_CELLS // max(1, m * max(m, vectors.shape[1])))
    for start in range(0, n, block):
        rows = slice(start, start + block)
        own = vectors[np.where(kept[rows], lists.items[rows], 0)].astype(np.float32)
        if not np.isfinite(own).all():
            raise ValueError("vectors holds NaN or infinity for a candidate; mend the embeddings")
        unit = own / np.maximum(np.linalg.norm(own, axis=-1, keepdims=True), 1e-12)
        close = unit @ unit.transpose(0, 2, 1) > max_cosine  # (block, m, m)
        part = kept[rows]
        for place in range(1, m):
            part[:, place] &= ~(close[:, place, :place] & part[:, :place]).any(axis=1)
    return lists.keep(kept)


def capped(lists: Candidates, caps: Sequence[Cap]) -> Candidates:
    """Keep a candidate if no cap is full of better ones that are kept.

    Read from the top, all caps at once: an item that one cap drops takes no place in another. So
    the first k of the result obey every cap, whatever k.

    Raises:
        ValueError: a candidate has no label.
    """
    n, m = lists.items.shape
    real = lists.items != EMPTY
    kept = real.copy()
    labels = []
    for cap in caps:
        of_item = _of_catalogue("labels", cap.labels, lists.items)
        if not np.issubdtype(of_item.dtype, np.integer) or (
            of_item.size and int(of_item.min()) < EMPTY
        ):
            raise ValueError("labels must be integers from 0, or -1 for an item without a label")
        labels.append(np.where(real, of_item[np.where(real, lists.items, 0)], EMPTY))
    for place in range(m):
        for cap, label in zip(caps, labels, strict=True):
            own = label[:, place : place + 1]
            before = ((label[:, :place] == own) & kept[:, :place]).sum(axis=1)
            kept[:, place] &= (before < cap.limit) | (own[:, 0] == EMPTY)
    return lists.keep(kept)


def title_groups(titles: pl.Series, ignore: str | None = None) -> npt.NDArray[np.int64]:
    """Group of each catalogue row: those with the same title but for case, spaces and punctuation.

    Titles are compared after Unicode compatibility folding (NFKC) and lower-casing, letters and
    digits alone. Rows whose title is null or has neither are in no group (−1).

    Args:
        titles: one per catalogue row.
        ignore: regular expression of what else doesn't tell products apart, taken out of the
            lower-cased title first: ``",[^,]*$"`` where a last part names the colour or size.

    Raises:
        ValueError: `ignore` is no regular expression.
    """
    plain = titles.cast(pl.String).str.normalize("NFKC").str.to_lowercase()
    if ignore is not None:
        try:
            plain = plain.str.replace_all(ignore, " ")
        except pl.exceptions.ComputeError as error:
            raise ValueError(f"ignore={ignore!r} is no regular expression: {error}") from error
    plain = plain.str.replace_all(r"[^\p{L}\p{M}\p{N}]+", " ").str.strip_chars()
    return numbered(plain)[0]


def numbered(values: pl.Series) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Number labels in the order of their first occurrence.

    Args:
        values: one label per catalogue row; null or empty: it has none.

    Returns:
        Number of each row's label, −1 for none ``# (n_items,)``; and the labels by number.
    """
    known = values.cast(pl.String)
    known = known.set(known == "", None) if len(known) else known
    names = known.drop_nulls().unique(maintain_order=True)
    number = known.replace_strict(names, np.arange(len(names)), default=None, return_dtype=pl.Int64)
    return number.fill_null(EMPTY).to_numpy().astype(np.int64), names.to_list()


def category_at(categories: pl.Series, depth: int) -> pl.Series:
    """Category of each catalogue row at a depth of its path (`categories` of the catalogue).

    Args:
        categories: a path per row, general to specific.
        depth: 0 is the most general; a negative one counts from the end.

    Returns:
        Labels, null where a path is shorter.

    Raises:
        ValueError: no path is that long.
    """
    found = categories.list.get(depth, null_on_oob=True)
    if found.null_count() == len(found):
        lengths = categories.list.len().drop_nulls()
        longest = int(lengths.to_numpy().max(initial=0))
        raise ValueError(f"depth={depth} is beyond every category path (the longest has {longest})")
    return found


def label_weights(
    labels: IntArray, names: Sequence[str], weights: Mapping[str, float]
) -> npt.NDArray[np.float64]:
    """Log-weights of catalogue rows from those of their labels, for `boosted`.

    Args:
        labels: number of each row's label, −1 for none (see `numbered`). ``# (n_items,)``
        names: the labels by number.
        weights: log-weight of some labels; all others get 0.

    Raises:
        ValueError: a label that no item has, or a number without a name.
    """
    unknown = [name for name in weights if name not in set(names)]
    if unknown:
        raise ValueError(f"no item is labelled {unknown[0]!r}; labels are {sorted(names)[:10]}, …")
    if labels.size and not EMPTY <= int(labels.min()) <= int(labels.max()) < len(names):
        raise ValueError(
            f"labels lie in {int(labels.min())}..{int(labels.max())}; there are {len(names)} names"
        )
    by_number = np.zeros(len(names) + 1)
    for number, name in enumerate(names):
        by_number[number] = weights.get(name, 0.0)
    return by_number[labels]  # −1 reads the last entry, which is 0


def _of_catalogue(name: str, values: npt.NDArray, items: IntArray) -> npt.NDArray:
    """Check that an array has one entry for every candidate's catalogue row."""
    values = np.asarray(values)
    if values.ndim != 1:
        raise ValueError(f"{name} has shape {values.shape}; it must be (n_items,)")
    if items.size and int(items.max()) >= len(values):
        raise ValueError(
            f"{name} has {len(values)} entries, but a list holds catalogue row {int(items.max())}; "
            "give one per row of the catalogue"
        )
    return values
