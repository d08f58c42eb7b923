"""What stands for items in a prompt, made when it is asked for.

A string per item is 100 bytes and more each, in every process; their codes are there anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from genrec.semantic_ids import sid_token
from genrec.title_ids import ItemMap, TitleIds


class SidTexts:
    """The texts of `ItemMap.sids`, indexed as their array would be.

    Args:
        ids: the map.
    """

    def __init__(self, ids: ItemMap) -> None:
        if isinstance(ids, TitleIds):
            self._titles = ids.sids()  # one buffer, not an object each
            return
        self._codes = ids.codes
        self._levels = [
            np.array([sid_token(level, code) for code in range(size)], dtype=object)
            for level, size in enumerate(ids.codebook_sizes)
        ]

    def __getitem__(self, rows: Any) -> Any:
        """Texts of catalogue rows: of one row a string, of an array of rows an object array."""
        at = np.asarray(rows, dtype=np.int64)
        if hasattr(self, "_titles"):
            found = self._titles.gather(at.reshape(-1)).to_numpy().astype(object)
        else:
            codes = self._codes[at.reshape(-1)]
            found = self._levels[0][codes[:, 0]]
            for level, tokens in enumerate(self._levels[1:], start=1):
                found = found + tokens[codes[:, level]]
        return found[0] if at.ndim == 0 else found.reshape(at.shape)
