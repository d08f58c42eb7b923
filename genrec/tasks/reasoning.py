"""The reasoning curriculum in typed slots: evidence, preference, intent, formulation, rewriting.

GREAM (Hong et al. 2025, "Generative Reasoning Recommendation via LLMs") teaches a model to reason
along five steps, whose texts an LLM writes, before it recommends. Here each step is measured: slots
are filled from one history and the catalogue's attributes alone, and templates word them. There is
no target in any signature, so nothing that comes after the history can change a byte. Deviation:
GREAM's formulation describes the recommendation, which would need the target; ours is a short
search made of the intent and the preference.

What that costs: the steps explain the history, and whether they lead to the item that was taken
next is left to chance and training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from genrec.chains import ItemId, Step
from genrec.columns import BRAND
from genrec.prompts import PromptRenderer, escape_series
from genrec.tasks.attributes import (
    CATEGORY,
    KIND,
    PRICE_BAND,
    VALUE,
    AttributeIndex,
    Histories,
    MaskArray,
    Recurring,
    recurring,
)
from genrec.tasks.texts import BLOCK_ROWS, enumeration, fill, phrases, tokens

RATIONALE_ORIGIN = "template"
"""Of every chain made here: templates word what was measured."""
TRAINED_ON_TARGET = False
"""Of every chain made here. Provably so: `reasoning_slots` maps a history and the catalogue's
attributes to slots, and `step_texts` maps slots, row id, seed and epoch to texts; neither has an
argument that could carry a target, and the base rates behind a lift count catalogue items, not
interactions."""

STEPS = ("evidence", "preference", "intent", "formulation", "rewriting")
INTENT_ITEMS = 4  # newest interactions that speak for the intent
MAX_EVIDENCE = 4
_QUERY_WORDS = 6
_TITLE_CHARS = 60
CLAIM_NAMES = {CATEGORY: "categories", BRAND: "brand", PRICE_BAND: "price_band"}

_ITEMS = pl.List(pl.Int32)
SLOTS: dict[str, pl.DataType | type[pl.DataType]] = {
    "n_items": pl.Int32,
    "evidence_items": _ITEMS,
    "preference_kind": pl.String,
    "preference_value": pl.String,
    "preference_count": pl.Int32,
    "preference_lift": pl.Float64,
    "intent_items": _ITEMS,
    "intent_kind": pl.String,
    "intent_value": pl.String,
    "query": pl.String,
    "kept_items": _ITEMS,
    "set_aside_items": _ITEMS,
}


def reasoning_slots(history: pl.Series, index: AttributeIndex) -> pl.DataFrame:
    """Fill the slots of each history.

    Of a history the newest `MAX_ITEMS` interactions are looked at. An item that was taken more than
    once counts once.

    Args:
        history: lists of catalogue rows, oldest first: what came before the target.
        index: attributes of the catalogue.

    Returns:
        One row per history (`SLOTS`):
        n_items, the distinct items looked at;
        preference: the recurring attribute of the highest score (`recurring`), with the number of
        items that have it and its lift over the catalogue;
        evidence_items: the newest `MAX_EVIDENCE` of those items, newest first;
        intent: the attribute of the highest score among the newest `INTENT_ITEMS` interactions,
        which two of them share, and intent_items, newest first;
        query: words of the intent, then (if that is no category itself) of what its newest item is
        filed under, then of the preference;
        kept_items and set_aside_items, oldest first: an item that shares none of the history's
        recurring attributes is set aside. Where nothing recurs, all is kept.
        Null or empty where a history says nothing.
    """
    parts = [pl.DataFrame(schema=SLOTS)]
    for start in range(0, len(history), BLOCK_ROWS):
        parts.append(_slots(history.slice(start, BLOCK_ROWS), index))
    return pl.concat(parts)


def _slots(history: pl.Series, index: AttributeIndex) -> pl.DataFrame:
    histories = Histories.from_column(history, index.n_items)
    n_rows = len(history)
    found = recurring(histories, index)
    preference, at = _by_row(found.best(), n_rows)
    newest = Histories.from_column(history, index.n_items, INTENT_ITEMS)
    intent, intent_at = _by_row(recurring(newest, index).best(), n_rows)
    named = {
        **_names("preference", preference, at, index),
        **_names("intent", intent, intent_at, index),
    }
    evidence = _newest(histories, _masks(preference, n_rows))
    latest = _newest(newest, _masks(intent, n_rows))
    shared = np.zeros(n_rows, dtype=np.uint64)
    starts = np.flatnonzero(np.diff(found.rows, prepend=-1))
    if len(starts):
        shared[found.rows[starts]] = np.bitwise_or.reduceat(found.masks, starts)
    kept = histories.chosen(shared) | (shared == 0)[histories.rows]
    return pl.DataFrame(
        {
            "n_items": histories.lengths,
            "evidence_items": evidence,
            **named,
            "preference_count": _values(preference.counts, at),
            "preference_lift": _values(preference.lifts, at),
            "intent_items": latest,
            "query": _queries(pl.DataFrame(named), _leaf(latest, evidence, index)),
            "kept_items": histories.lists(kept, oldest_first=True),
            "set_aside_items": histories.lists(~kept, oldest_first=True),
        }
    ).select(pl.col(name).cast(dtype) for name, dtype in SLOTS.items())


def _by_row(best: Recurring, n_rows: int) -> tuple[Recurring, pl.Series]:
    """One entry a row at most -> its place per row, null where there is none."""
    place = np.full(n_rows, -1, dtype=np.int64)
    place[best.rows] = np.arange(len(best.rows))
    series = pl.Series(place)
    return best, series.set(series < 0, None)


def _values(values: np.ndarray, at: pl.Series) -> pl.Series:
    return pl.Series(values).gather(at)


def _names(
    step: str, best: Recurring, at: pl.Series, index: AttributeIndex
) -> dict[str, pl.Series]:
    attribute = _values(best.attributes, at)
    return {f"{step}_{name}": index.table[name].gather(attribute) for name in (KIND, VALUE)}


def _masks(best: Recurring, n_rows: int) -> MaskArray:
    masks = np.zeros(n_rows, dtype=np.uint64)
    masks[best.rows] = best.masks
    return masks


def _newest(histories: Histories, masks: MaskArray) -> pl.Series:
    """The newest `MAX_EVIDENCE` distinct items of each mask, newest first."""
    chosen = histories.chosen(masks) & (histories.ages == histories.first_ages)
    return histories.lists(chosen).list.head(MAX_EVIDENCE)


def _leaf(latest: pl.Series, evidence: pl.Series, index: AttributeIndex) -> pl.Series:
    """Category of the newest item that speaks for the intent, else for the preference."""
    item = latest.list.first().fill_null(evidence.list.first())
    leaf = pl.Series(index.leaves).gather(item)
    return index.table[VALUE].gather(leaf.set(leaf < 0, None))


def _queries(named: pl.DataFrame, leaf: pl.Series) -> pl.Series:
    """Words of the intent, the leaf category and the preference, each word once."""

    def words(step: str) -> pl.Expr:
        spoken = pl.col(f"{step}_kind") != PRICE_BAND
        return pl.when(spoken).then(pl.col(f"{step}_value"))

    filed = pl.when(pl.col("intent_kind").ne_missing(CATEGORY)).then(leaf)
    parts = (words("intent"), filed, words("preference"))
    text = pl.concat_str(parts, separator=" ", ignore_nulls=True)
    query = tokens(text).list.head(_QUERY_WORDS).list.join(" ")
    return named.select(pl.when(query != "").then(query).alias("query"))["query"]


def step_texts(
    slots: pl.DataFrame,
    renderer: PromptRenderer,
    row_ids: pl.Series,
    seed: int = 0,
    epoch: int = 0,
    *,
    sids: pl.Series | None = None,
    titles: pl.Series | None = None,
) -> pl.DataFrame:
    """Word the slots.

    Args:
        slots: of `reasoning_slots`.
        renderer: the templates of `genrec.tasks.texts.written_renderer`.
        row_ids: for the template draw.
        seed: of the template draw.
        epoch: of the training.
        sids: items are named by these, one per catalogue row (``SemanticIds.sids()``).
        titles: or by these, which are escaped, cut and quoted.

    Returns:
        One text column per step of `STEPS`; null where a history says nothing.

    Raises:
        ValueError: not exactly one of `sids` and `titles`.
    """
    if (sids is None) == (titles is None):
        raise ValueError("items are named by `sids` or by `titles`; give one of the two")
    if sids is None:
        assert titles is not None
        shown = escape_series(titles, _TITLE_CHARS).fill_null("")
        sids = pl.select(pl.concat_str(pl.lit("“"), shown, pl.lit("”")))[:, 0]
    spread = enumeration if titles is not None else lambda words: words.list.join("")
    ways = {
        name: _named(slots[name], sids).to_frame(name).select(spread(pl.col(name)))[name]
        for name, dtype in SLOTS.items()
        if dtype == _ITEMS
    }
    attributes = {step: _attribute_phrases(slots, step, renderer) for step in STEPS[1:3]}
    lift = slots.select(_rounded(pl.col("preference_lift")))[:, 0]
    kept = _said(ways["kept_items"])
    aside = _said(ways["set_aside_items"])
    numbers = {"count": slots["preference_count"], "total": slots["n_items"], "lift": lift}
    numbers = {name: column.cast(pl.String) for name, column in numbers.items()}

    def write(family: str, inserted: dict[str, pl.Series], **texts: pl.Series) -> pl.Series:
        return fill(renderer, f"step_{family}", row_ids, seed, epoch, inserted, texts)

    known = slots["preference_kind"].is_not_null()
    kept = pl.select(pl.when(known).then(kept)).to_series()  # else nothing was judged
    clean = pl.select(pl.when(aside.is_null()).then(kept)).to_series()
    rewriting = write("rewriting", {"kept": kept, "set_aside": aside})
    return pl.DataFrame(
        {
            "evidence": write("evidence", {"items": _said(ways["evidence_items"])}),
            "preference": write("preference", numbers, attribute=attributes["preference"]),
            "intent": write(
                "intent", {"items": _said(ways["intent_items"])}, attribute=attributes["intent"]
            ),
            "formulation": write("formulation", {}, query=slots["query"]),
            "rewriting": rewriting.zip_with(
                rewriting.is_not_null(), write("rewriting_nothing", {"kept": clean})
            ),
        }
    )


def _named(items: pl.Series, names: pl.Series) -> pl.Series:
    """Lists of catalogue rows -> lists of what the items are called."""
    offsets = np.concatenate([[0], np.cumsum(items.list.len().to_numpy())]).astype(np.int64)
    flat = names.gather(items.explode(empty_as_null=False))
    lists = pa.LargeListArray.from_arrays(pa.array(offsets), flat.to_arrow())
    return pl.Series(lists, dtype=pl.List(pl.String))


def _said(text: pl.Series) -> pl.Series:
    return text.set(text == "", None)


def _attribute_phrases(slots: pl.DataFrame, step: str, renderer: PromptRenderer) -> pl.Series:
    """The attribute of a step in words; each distinct one is rendered once."""
    own = slots.select(pl.col(f"{step}_kind").alias(KIND), pl.col(f"{step}_value").alias(VALUE))
    distinct = own.drop_nulls().unique()
    distinct = distinct.with_columns(phrases(distinct, renderer, "attribute").alias("phrase"))
    return own.join(distinct, on=[KIND, VALUE], how="left", maintain_order="left")["phrase"]


def _rounded(lift: pl.Expr) -> pl.Expr:
    """A factor as people say it: "1.4", from ten on without decimals."""
    whole = lift.round(0).cast(pl.Int64).cast(pl.String)
    return pl.when(lift >= 9.95).then(whole).otherwise(lift.round(1).cast(pl.String))


def chain_steps(row: Mapping[str, Any], item_ids: pl.Series) -> tuple[Step, ...]:
    """One row of slots and texts as typed steps.

    Claims are true by construction: they were looked up in the catalogue's attributes. Claimed
    values are the escaped ones of `item_attributes`.

    Args:
        row: the columns of `reasoning_slots` and of `step_texts` for one history.
        item_ids: identifier per catalogue row.

    Returns:
        The steps of `STEPS` that have a text, in that order.
    """

    def ids(name: str) -> tuple[ItemId, ...]:
        return tuple(item_ids[int(item)] for item in row[name])

    def claims(step: str, items: tuple[ItemId, ...]) -> dict[ItemId, dict[str, str | list[str]]]:
        kind, value = row[f"{step}_kind"], row[f"{step}_value"]
        name = CLAIM_NAMES.get(kind, kind)
        return {item: {name: [value] if kind == CATEGORY else value} for item in items}

    cited, latest = ids("evidence_items"), ids("intent_items")
    aside = list(ids("set_aside_items"))
    measured = {
        "count": row["preference_count"],
        "items": row["n_items"],
        "lift": row["preference_lift"],
    }
    fields: dict[str, dict[str, Any]] = {
        "evidence": {"cited_item_ids": cited},
        "preference": {
            "cited_item_ids": cited,
            "claimed_attributes": claims("preference", cited),
            "measured": measured,
        },
        "intent": {"cited_item_ids": latest, "claimed_attributes": claims("intent", latest)},
        "formulation": {"measured": {"query": row["query"]}},
        "rewriting": {
            "cited_item_ids": tuple(dict.fromkeys(ids("kept_items"))),
            "measured": {"set_aside_item_ids": aside},
        },
    }
    return tuple(Step(step, row[step], **fields[step]) for step in STEPS if row[step] is not None)
