"""Texts of items, made when they are asked for."""

from __future__ import annotations

import numpy as np
import polars as pl

from genrec.semantic_ids import SemanticIds
from genrec.sid_texts import SidTexts
from genrec.title_ids import TitleIds


def test_they_are_those_of_the_map(tiny):
    shop = tiny.shop()
    titles, _ = TitleIds.of_catalog(shop.catalog, 40)
    one = SemanticIds(pl.Series("item_id", [7, 5]), np.array([[3], [0]]), (4,))
    for ids in (shop.semantic_ids, titles, one):
        wanted, texts = ids.sids().to_list(), SidTexts(ids)
        last = ids.n_items - 1
        for row in (0, last, np.int32(last)):
            assert texts[row] == wanted[row] and type(texts[row]) is str
        for rows in ([0, last, 0], np.array([last, 0]), [], np.array([[0], [last]])):
            made = texts[rows]
            assert made.shape == np.shape(rows) and made.dtype == object
            assert made.ravel().tolist() == [wanted[row] for row in np.ravel(rows).astype(int)]
