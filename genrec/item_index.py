"""Item ids -> catalogue rows, without a Python object per item."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

_MANY = 1 << 16  # ids from which on a hash join, which reads the whole catalogue, is faster


class ItemIndex:
    """Finds the catalogue rows of item ids.

    Args:
        ids: of the catalogue, row for row, strings or integers, none twice. ``# (n_items,)``
    """

    def __init__(self, ids: pl.Series) -> None:
        self._ids = ids.alias("id")

    @cached_property
    def _sorted(self) -> tuple[pl.Series, np.ndarray]:
        order = self._ids.arg_sort()
        return self._ids.gather(order), order.to_numpy().astype(np.int64)

    def rows(self, ids: pl.Series) -> np.ndarray:
        """Catalogue rows of ids of the same type, -1 where the catalogue lacks one; ``(n,)``."""
        assert ids.dtype == self._ids.dtype and not ids.null_count()
        if ids.is_empty():
            return np.zeros(0, dtype=np.int64)
        if len(ids) >= _MANY:
            catalogue = pl.DataFrame([self._ids]).with_row_index("row")
            asked = pl.DataFrame([ids.alias("id")])
            found = asked.join(catalogue, on="id", how="left", maintain_order="left")["row"]
            return found.cast(pl.Int64).fill_null(-1).to_numpy()
        in_order, order = self._sorted
        place = np.minimum(in_order.search_sorted(ids).to_numpy(), len(order) - 1)
        known = (in_order.gather(place) == ids).to_numpy()
        return np.where(known, order[place], -1)

    def rows_of_values(self, values: Sequence[Any]) -> np.ndarray:
        """`rows` of Python values; one of another type is an unknown item; ``(n,)``.

        Raises:
            ValueError: a single id in the place of a list of them.
        """
        if isinstance(values, str | bytes):
            raise ValueError(f"{values!r} is one id; items are given as a list of ids")
        kind = str if self._ids.dtype == pl.String else int
        if all(type(value) is kind for value in values):
            try:
                return self.rows(pl.Series(values=list(values), dtype=self._ids.dtype))
            except (OverflowError, TypeError, UnicodeEncodeError):  # of one value
                pass
        return np.array([self._row(value) for value in values], dtype=np.int64)

    def _row(self, value: Any) -> int:
        """As a dictionary of the ids would find it: 3, 3.0 and NumPy's 3 are equal, "3" is not."""
        if (self._ids.dtype == pl.String) != isinstance(value, str):
            return -1
        try:
            key = str(value) if isinstance(value, str) else int(value)
            row = int(self.rows(pl.Series([key], dtype=self._ids.dtype))[0])
        except (OverflowError, TypeError, ValueError):  # no number, or one beyond 64 bits
            return -1
        return row if key == value else -1
