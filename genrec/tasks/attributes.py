"""Attributes of items in long form, and which of them recur in a history.

Everything here is a function of the catalogue and, for `recurring`, of one history at a time. No
target, no later interaction and no other user can change it: the signatures have no place for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from genrec.columns import BRAND, CATEGORIES, DESCRIPTION, ITEM_INDEX, PRICE, TITLE
from genrec.data.cleaning import missing_title
from genrec.prompts import escape_series

IntArray = npt.NDArray[np.int64]
MaskArray = npt.NDArray[np.uint64]

KIND, VALUE = "kind", "value"
CATEGORY, PRICE_BAND, KEYWORD = "category", "price_band", "keyword"
KINDS = (CATEGORY, BRAND, PRICE_BAND, KEYWORD)
SCHEMA = {ITEM_INDEX: pl.Int32, KIND: pl.String, VALUE: pl.String}

COMMON_SHARE = 0.8  # a category or word that more of the catalogue has tells no item from another
MAX_VALUE_CHARS = 60
MIN_COUNT = 2  # items of a history that must share an attribute before it is said to recur
MIN_LIFT = 1.2  # how much more often than in the catalogue
MAX_ITEMS = 64  # newest interactions of a history that are looked at: the bits of a mask

# Words that fill titles without describing: articles, prepositions, units, pack sizes.
STOP_WORDS = frozenset(
    """a about after all also an and any are as at be been before but by can for from get had has
    have her him his how i in inc into is it its just like made make makes me more most my new no
    not of off on one only or other our out over own part per plus she so some such than that the
    their them then there these they this to too two under up use used very vol was we were what
    when which while who will with without would you your
    oz ounce ounces fl fluid ml liter liters litre litres gram grams lb lbs pound pounds inch inches
    cm mm ft feet pack packs packaging pk pc pcs piece pieces count ct set sets size sizes pair box
    mr mrs ms dr jr ii iii iv la le les de du des el der die das und et
    bottle bottles case item items product products quantity type types model original edition each
    great best quality brand genuine authentic free buy sale""".split()
)
_NO_BRAND = frozenset({"unknown", "generic", "unbranded", "no brand", "none", "n/a", "na", "other"})
_WORD = r"\p{L}[\p{L}\p{M}'’-]*[\p{L}\p{M}]"


def item_attributes(
    catalog: pl.DataFrame,
    n_keywords: int = 3,
    min_keyword_items: int = 2,
    n_price_bands: int = 4,
) -> pl.DataFrame:
    """What can be said of each item, one row per statement.

    Values are escaped and at most `MAX_VALUE_CHARS` long. A "brand" that is the name of a category
    of the catalogue (a shop's filler) is left out, and so are categories and words that more than
    `COMMON_SHARE` of the items have.

    Args:
        catalog: ``catalog.parquet``; row i is item i. Columns may be missing.
        n_keywords: words of the title per item (of the description, where there is no title): those
            of the highest TF-IDF that neither the brand nor the categories hold already.
        min_keyword_items: items that must share a word.
        n_price_bands: prices are told apart by quantiles.

    Returns:
        item_index, kind (of `KINDS`), value; by item, in the order of `KINDS`, categories general
        to specific and keywords best first. Each statement once.
    """
    items = catalog.with_row_index("_row").select(pl.col("_row").cast(pl.Int32).alias(ITEM_INDEX))
    paths = _categories(catalog, items)
    brands = _brands(catalog, items, paths)
    shown = paths.filter(_rare_enough(VALUE, len(catalog)))
    words = _keywords(catalog, items, pl.concat([paths, brands]), n_keywords, min_keyword_items)
    parts = [shown, brands, _price_bands(catalog, items, n_price_bands), words]
    ranked = [part.with_columns(_kind=pl.lit(i, pl.Int8)) for i, part in enumerate(parts)]
    table = pl.concat(ranked).sort(ITEM_INDEX, "_kind", maintain_order=True)
    return table.select(*SCHEMA).unique(maintain_order=True)


def field(catalog: pl.DataFrame, name: str, dtype: pl.DataType | type[pl.DataType]) -> pl.Series:
    """A column of the catalogue as `dtype`, nulls where the catalogue has no such column."""
    if name in catalog.columns:
        return catalog[name].cast(dtype)
    return pl.Series(name, [None] * len(catalog), dtype=dtype)


def _rare_enough(column: str, n_items: int) -> pl.Expr:
    return pl.col(ITEM_INDEX).n_unique().over(column) <= COMMON_SHARE * n_items


def _long(items: pl.DataFrame, kind: str, values: pl.Series) -> pl.DataFrame:
    """Rows of one kind from a value (or a list of values) per item."""
    frame = items.with_columns(pl.lit(kind).alias(KIND), values.alias(VALUE))
    if values.dtype == pl.List:
        frame = frame.explode(VALUE)
    frame = frame.with_columns(escape_series(frame[VALUE], MAX_VALUE_CHARS).alias(VALUE))
    return frame.filter(pl.col(VALUE).is_not_null() & (pl.col(VALUE) != "")).select(*SCHEMA)


def _categories(catalog: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    return _long(items, CATEGORY, field(catalog, CATEGORIES, pl.List(pl.String)))


def _brands(catalog: pl.DataFrame, items: pl.DataFrame, paths: pl.DataFrame) -> pl.DataFrame:
    table = _long(items, BRAND, field(catalog, BRAND, pl.String))
    filler = {*_NO_BRAND, *paths[VALUE].unique().str.to_lowercase()}
    return table.filter(~pl.col(VALUE).str.to_lowercase().is_in(filler))


def _price_bands(catalog: pl.DataFrame, items: pl.DataFrame, n_bands: int) -> pl.DataFrame:
    prices = field(catalog, PRICE, pl.Float64).fill_null(np.nan).to_numpy()
    known = np.isfinite(prices) & (prices > 0)
    edges = np.quantile(prices[known], np.arange(1, n_bands) / n_bands) if known.any() else []
    edges = np.unique(np.round(edges, 2))
    edges = edges[edges > np.min(prices[known], initial=np.inf)]  # else a band would be empty
    if not len(edges):
        return pl.DataFrame(schema=SCHEMA)
    between = [f"{a:.2f} to {b:.2f}" for a, b in zip(edges[:-1], edges[1:], strict=True)]
    names = [f"under {edges[0]:.2f}", *between, f"{edges[-1]:.2f} and over"]
    band = np.searchsorted(edges, prices[known], side="right")
    return _long(items.filter(pl.Series(known)), PRICE_BAND, pl.Series(names).gather(band))


def _keywords(
    catalog: pl.DataFrame, items: pl.DataFrame, named: pl.DataFrame, keep: int, min_items: int
) -> pl.DataFrame:
    """The `keep` words per item of the highest TF-IDF, best first (ties: the earlier one)."""
    titles, descriptions = (field(catalog, name, pl.String) for name in (TITLE, DESCRIPTION))
    text = escape_series(titles.zip_with(~missing_title(catalog), descriptions))
    words = items.with_columns(text.str.to_lowercase().str.extract_all(_WORD).alias(VALUE))
    words = words.explode(VALUE).with_row_index("place")
    words = words.filter((pl.col(VALUE).str.len_chars() > 2) & ~pl.col(VALUE).is_in(STOP_WORDS))
    stem = pl.col(VALUE).str.strip_suffix("s").alias("stem")
    said = named.with_columns(pl.col(VALUE).str.to_lowercase().str.extract_all(_WORD))
    said = said.explode(VALUE).select(ITEM_INDEX, stem)
    words = words.with_columns(stem).join(said, on=[ITEM_INDEX, "stem"], how="anti")
    counts = words.group_by(ITEM_INDEX, VALUE).agg(pl.len().alias("tf"), pl.col("place").min())
    df = pl.len().over(VALUE)
    counts = counts.with_columns(
        weight=(1 + pl.col("tf").log()) * (((1 + len(items)) / (1 + df)).log() + 1), df=df
    )
    counts = counts.filter(pl.col("df") >= min_items, pl.col("df") <= COMMON_SHARE * len(items))
    best = counts.sort(ITEM_INDEX, -pl.col("weight"), "place").group_by(
        ITEM_INDEX, maintain_order=True
    )
    return best.head(keep).with_columns(pl.lit(KEYWORD).alias(KIND)).select(*SCHEMA)


@dataclass(frozen=True)
class AttributeIndex:
    """`item_attributes`, indexed for lookups by item.

    Attributes:
        n_items: rows of the catalogue.
        table: one row per distinct attribute: kind, value, items (that have it), share (of the
            catalogue; base rates come from the catalogue alone, so no interaction moves them).
        offsets: attributes of item i are ``values[offsets[i] : offsets[i + 1]]``.
            ``# (n_items + 1,)``
        values: rows of `table`. ``# (n_attributes_of_all_items,)``
        leaves: each item's rarest category (ties: the last) as a row of `table`, −1 for none.
            ``# (n_items,)``
    """

    n_items: int
    table: pl.DataFrame
    offsets: IntArray
    values: IntArray
    leaves: IntArray

    @classmethod
    def build(cls, attributes: pl.DataFrame, n_items: int) -> AttributeIndex:
        """Index `item_attributes` of a catalogue of `n_items` rows."""
        share = (pl.col("items") / n_items).alias("share")
        table = attributes.group_by(KIND, VALUE).agg(pl.len().alias("items")).sort(KIND, VALUE)
        table = table.with_columns(share)
        numbered = table.select(KIND, VALUE).with_row_index("attribute")
        flat = attributes.join(numbered, on=[KIND, VALUE], how="left").sort(
            ITEM_INDEX, maintain_order=True
        )
        counts = np.bincount(flat[ITEM_INDEX].to_numpy(), minlength=n_items)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        leaves = np.full(n_items, -1, dtype=np.int64)
        filed = flat.filter(pl.col(KIND) == CATEGORY).with_columns(
            table["items"].gather(flat.filter(pl.col(KIND) == CATEGORY)["attribute"])
        )
        rarest = filed.reverse().sort("items", maintain_order=True).unique(ITEM_INDEX, keep="first")
        leaves[rarest[ITEM_INDEX].to_numpy()] = rarest["attribute"].to_numpy()
        values = flat["attribute"].to_numpy().astype(np.int64)
        return cls(n_items, table, offsets, values, leaves)

    def of(self, items: IntArray) -> tuple[IntArray, IntArray]:
        """Attributes of many items: (place in `items`, attribute), flat."""
        counts = self.offsets[items + 1] - self.offsets[items]
        ends = np.cumsum(counts)
        shift = np.repeat(self.offsets[items] - (ends - counts), counts)
        return np.repeat(np.arange(len(items)), counts), self.values[
            np.arange(int(counts.sum())) + shift
        ]


@dataclass(frozen=True)
class Histories:
    """The newest interactions of each history, flat, newest first.

    Attributes:
        rows: the history. ``# (n,)``
        items: catalogue row. ``# (n,)``
        ages: 0 for the newest interaction of the history, below `MAX_ITEMS`. ``# (n,)``
        first_ages: age of the same item's newest occurrence in this history: it names the item in
            masks, so that an item that was taken twice counts once. ``# (n,)``
        lengths: distinct items of each history. ``# (n_rows,)``
    """

    rows: IntArray
    items: IntArray
    ages: IntArray
    first_ages: IntArray
    lengths: IntArray

    @classmethod
    def from_column(cls, history: pl.Series, n_items: int, newest: int = MAX_ITEMS) -> Histories:
        """Take the `newest` interactions (at most `MAX_ITEMS`) of a list column, oldest first."""
        assert newest <= MAX_ITEMS
        lists = history.fill_null([]).list.tail(newest).list.reverse()
        lengths = lists.list.len().to_numpy().astype(np.int64)
        items = lists.explode(empty_as_null=False).to_numpy().astype(np.int64)
        assert not len(items) or (items.min() >= 0 and items.max() < n_items), "no catalogue row"
        rows = np.repeat(np.arange(len(lists)), lengths)
        ages = np.arange(len(items)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        keys = rows * n_items + items
        order = np.sort(keys * MAX_ITEMS + ages)
        distinct = order // MAX_ITEMS
        first = np.flatnonzero(np.diff(distinct, prepend=-1))
        at = np.searchsorted(distinct[first], keys)
        counts = np.bincount(distinct[first] // n_items, minlength=len(lists))
        return cls(rows, items, ages, order[first][at] % MAX_ITEMS, counts)

    @property
    def bits(self) -> MaskArray:
        """The bit of each interaction's item in a mask of its history."""
        return np.uint64(1) << self.first_ages.astype(np.uint64)

    def chosen(self, masks: MaskArray) -> npt.NDArray[np.bool_]:
        """Which interactions are of an item that the history's mask has. Masks: ``# (n_rows,)``."""
        return (masks[self.rows] & self.bits) != 0

    def lists(self, chosen: npt.NDArray[np.bool_], oldest_first: bool = False) -> pl.Series:
        """The chosen interactions' items as List(Int32), one list per history."""
        where = np.flatnonzero(chosen)
        counts = np.bincount(self.rows[where], minlength=len(self.lengths))
        if oldest_first:
            where = where[np.lexsort((-self.ages[where], self.rows[where]))]
        offsets = np.concatenate([[0], np.cumsum(counts)])
        flat = pa.array(self.items[where].astype(np.int32))
        lists = pa.LargeListArray.from_arrays(pa.array(offsets.astype(np.int64)), flat)
        return pl.Series(lists, dtype=pl.List(pl.Int32))


@dataclass(frozen=True)
class Recurring:
    """Attributes that recur in histories, flat; sorted by row, then attribute.

    Attributes:
        rows: the history. ``# (n,)``
        attributes: row of `AttributeIndex.table`. ``# (n,)``
        masks: which items have it: bit a is the item whose newest age is a. ``# (n,)``
        counts: how many distinct items have it. ``# (n,)``
        lifts: (count / items of the history) / share of the catalogue. ``# (n,)``
        scores: count · ln lift, the attribute's part of the history's log-likelihood ratio against
            the catalogue: it weighs how often against how telling. ``# (n,)``
    """

    rows: IntArray
    attributes: IntArray
    masks: MaskArray
    counts: IntArray
    lifts: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]

    def filter(self, keep: npt.NDArray[np.bool_]) -> Recurring:
        """The entries for which `keep` is true."""
        return Recurring(
            self.rows[keep],
            self.attributes[keep],
            self.masks[keep],
            self.counts[keep],
            self.lifts[keep],
            self.scores[keep],
        )

    def best(self) -> Recurring:
        """The entry of the highest score of each row that has any (ties: the first attribute)."""
        order = np.lexsort((self.attributes, -self.scores, self.rows))
        first = order[np.flatnonzero(np.diff(self.rows[order], prepend=-1))]
        keep = np.zeros(len(self.rows), dtype=bool)
        keep[first] = True
        return self.filter(keep)


def recurring(histories: Histories, index: AttributeIndex) -> Recurring:
    """Attributes that `MIN_COUNT` items of a history share, and `MIN_LIFT` times what chance gives.

    Args:
        histories: flat histories; memory grows with their items times attributes per item, so
            callers hand in blocks of rows.
        index: of the catalogue's attributes.
    """
    once = histories.ages == histories.first_ages
    rows, ages = histories.rows[once], histories.ages[once]
    place, attribute = index.of(histories.items[once])
    n_attributes = max(len(index.table), 1)
    packed = np.sort((rows[place] * n_attributes + attribute) * MAX_ITEMS + ages[place])
    keys, bits = packed // MAX_ITEMS, np.uint64(1) << (packed % MAX_ITEMS).astype(np.uint64)
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    counts = np.diff(starts, append=len(keys))
    masks = np.add.reduceat(bits, starts) if len(starts) else bits
    rows, attributes = keys[starts] // n_attributes, keys[starts] % n_attributes
    share = index.table["share"].to_numpy()
    lifts = counts / np.maximum(histories.lengths[rows], 1) / share[attributes]
    found = Recurring(rows, attributes, masks, counts, lifts, counts * np.log(lifts))
    return found.filter((counts >= MIN_COUNT) & (lifts >= MIN_LIFT))
