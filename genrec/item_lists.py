"""Lists of item indices, one per row, as flat arrays: what metrics, filters and baselines share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import scipy.sparse as sp

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ItemLists:
    """One list of item indices per row, flat.

    Attributes:
        values: the items of all lists, one list after the other. ``# (n_values,)``
        offsets: list `i` is ``values[offsets[i] : offsets[i + 1]]``. ``# (n_rows + 1,)``
    """

    values: IntArray
    offsets: IntArray

    @classmethod
    def from_column(cls, column: pl.Series) -> ItemLists:
        """Take the lists of a Polars list column (a null counts as an empty list)."""
        lengths = column.list.len().fill_null(0).to_numpy().astype(np.int64)
        values = column.explode().drop_nulls().to_numpy().astype(np.int64)
        assert len(values) == lengths.sum(), "a list holds null items"
        return cls(values, np.concatenate([[0], np.cumsum(lengths)]))

    def __len__(self) -> int:
        """Number of lists."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> IntArray:
        """Length of each list. ``# (n_rows,)``."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> IntArray:
        """Row of each value. ``# (n_values,)``."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, rows: IntArray) -> ItemLists:
        """The lists of `rows`, in that order."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        shift = np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return ItemLists(self.values[np.arange(offsets[-1]) + shift], offsets)

    def matrix(self, n_items: int) -> sp.csr_matrix:
        """How often each list holds each item. ``# (n_rows, n_items)``."""
        ones = np.ones(len(self.values))
        found = sp.csr_matrix((ones, self.values, self.offsets), shape=(len(self), n_items))
        found.sum_duplicates()
        return found

    def met_by(self, items: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Which rows of `items` hold an item of their list.

        Args:
            items: item indices, or -1. ``# (n_rows, k)``

        Returns:
            ``# (n_rows,)``
        """
        met = np.zeros(len(self), dtype=bool)
        order = np.argsort(-self.lengths, kind="stable")
        ascending = -self.lengths[order]
        items = items[order]
        # One pass over `items` per place of the longest list, over ever fewer rows.
        for place in range(int(self.lengths.max(initial=0))):
            n = int(np.searchsorted(ascending, -place, side="left"))
            wanted = self.values[self.offsets[order[:n]] + place].astype(items.dtype)
            met[:n] |= (items[:n] == wanted[:, None]).any(axis=1)
        found = np.empty_like(met)
        found[order] = met
        return found

    def keys(self, n_items: int) -> IntArray:
        """Sorted ``row * n_items + item``, for membership tests."""
        return np.sort(self.rows * n_items + self.values)


def list_series(values: pl.Series, offsets: IntArray) -> pl.Series:
    """List column whose row `i` is ``values[offsets[i] : offsets[i + 1]]``, without a loop.

    Args:
        values: the entries of all lists, one list after the other; nulls are kept.
        offsets: of the lists. ``# (n_rows + 1,)``
    """
    flat = values.to_arrow(compat_level=pl.CompatLevel.oldest())
    lists = pa.LargeListArray.from_arrays(pa.array(offsets.astype(np.int64)), flat)
    return pl.Series(values.name, lists, dtype=pl.List(values.dtype))


def no_items(n_rows: int) -> ItemLists:
    """`n_rows` empty lists: nothing is filtered."""
    return ItemLists(np.empty(0, dtype=np.int64), np.zeros(n_rows + 1, dtype=np.int64))


def contains(sorted_keys: IntArray, keys: IntArray) -> npt.NDArray[np.bool_]:
    """Which of `keys` are among `sorted_keys`, in the shape of `keys`."""
    if not len(sorted_keys):
        return np.zeros(keys.shape, dtype=bool)
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return sorted_keys[at] == keys
