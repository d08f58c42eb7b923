"""Chains from measured evidence: the wording is filled into templates and says so.

The model writes none of this text. What is measured is the effect of leaving history items out
(`genrec.explain.evidence`); what is claimed is read from the catalogue. Shared attributes describe
the items that the measurement picked. They are not measured causes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from genrec.chains import Chain, ItemId, Step
from genrec.columns import (
    BRAND,
    CATEGORIES,
    CERTIFIED,
    ITEM_ID,
    ITEM_INDEX,
    LEVEL_LOG_PROBS,
    RANK,
    ROW_ID,
    SCORE,
    TITLE,
)
from genrec.explain.counterfactuals import Counterfactual
from genrec.explain.evidence import MIN_DELTA, UNLISTED, Evidence, FloatArray, IntArray
from genrec.prompts import escape_text

COMMON_SHARE = 0.5  # a value that more of the catalogue has says nothing about an item
_MOST_ASIDE = 3  # history items that are named as speaking against an item
_TITLE_CHARS = 80


@dataclass(frozen=True)
class Attributes:
    """What the catalogue says about each item, by catalogue row.

    Attributes:
        item_ids: identifiers.
        titles: escaped and cut, for texts.
        brands: null where unknown.
        categories: general to specific.
        shares: (attribute, value) -> share of the catalogue that has it.
        rows: item id -> catalogue row.
    """

    item_ids: list[ItemId]
    titles: list[str]
    brands: list[str | None]
    categories: list[list[str]]
    shares: dict[tuple[str, str], float]
    rows: dict[ItemId, int]

    @classmethod
    def from_catalog(cls, catalog: pl.DataFrame) -> Attributes:
        """Read ``catalog.parquet``."""
        brands = catalog[BRAND].to_list()
        categories = [list(dict.fromkeys(c or [])) for c in catalog[CATEGORIES].to_list()]
        counts = Counter(("brand", b) for b in brands if b)
        counts.update(("categories", c) for path in categories for c in path)
        ids = catalog[ITEM_ID].to_list()
        return cls(
            ids,
            [escape_text(t, _TITLE_CHARS) for t in catalog[TITLE].to_list()],
            brands,
            categories,
            {key: count / len(ids) for key, count in counts.items()},
            dict(zip(ids, range(len(ids)), strict=True)),
        )

    def shared(self, item: int, other: int) -> dict[str, str | list[str]]:
        """Attributes that two catalogue rows have in common and not most of the catalogue too."""
        found: dict[str, str | list[str]] = {}
        brand = self.brands[item]
        if brand and brand == self.brands[other] and self.shares["brand", brand] <= COMMON_SHARE:
            found["brand"] = brand
        common = [
            category
            for category in self.categories[item]
            if category in self.categories[other]
            and self.shares["categories", category] <= COMMON_SHARE
        ]
        return {**found, "categories": common} if common else found

    def has(self, item: int, attribute: str, value: str | list[str]) -> bool:
        """Whether the catalogue supports a claim (a list: each of its entries)."""
        if attribute == "brand":
            return value == self.brands[item]
        if attribute == "categories":
            return isinstance(value, list) and set(value) <= set(self.categories[item])
        return False

    def has_value(self, item: int, attribute: str, value: str) -> bool:
        """Whether the catalogue gives an item one value of an attribute."""
        return self.has(item, attribute, [value] if attribute == "categories" else value)


def _nats(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def evidence_step(
    attributes: Attributes,
    history: IntArray,
    cited: IntArray,
    deltas: np.ndarray,
    log_prob: float,
    joint: bool = False,
) -> Step:
    """What leaving out history items did to one recommended item.

    Args:
        attributes: of the catalogue.
        history: shown catalogue rows, (n,).
        cited: positions of the cited items, in the order in which they were chosen.
        deltas: what the log-probability falls by without each cited item, (len(cited),).
        log_prob: of the item with the whole history.
        joint: whether each Δ is that of losing the item beside those before it, and not alone.
    """
    measured: dict[str, Any] = {
        "log_prob": float(log_prob),
        "history_items": len(history),
        "min_delta": MIN_DELTA,
        "joint": joint,
        "positions": cited.tolist(),
        "deltas": [float(d) for d in deltas],
    }
    if len(history) == 0:
        return Step(
            "evidence",
            "The prompt showed no history, so no history item can support this item: it is what "
            "the model ranks high for a user of whom nothing is known.",
            measured=measured,
        )
    if len(cited) == 0:
        text = (
            "No single history item supports this item: leaving out any one of the "
            f"{len(history)} shown items does not lower its log-probability ({_nats(log_prob)}) "
            f"by more than {MIN_DELTA}."
        )
        return Step("evidence", text, measured=measured)
    titles = [f"“{attributes.titles[history[p]]}”" for p in cited]
    parts = [f"without {t} it falls by {d:.2f}" for t, d in zip(titles, deltas, strict=True)]
    if joint:
        parts[1:] = [
            f"without {t} as well by another {d:.2f}"
            for t, d in zip(titles[1:], deltas[1:], strict=True)
        ]
    text = (
        f"With all {len(history)} shown history items the log-probability of this item is "
        f"{_nats(log_prob)}; {'; '.join(parts)}."
    )
    ids = tuple(dict.fromkeys(attributes.item_ids[history[p]] for p in cited))
    return Step("evidence", text, ids, measured=measured)


def shared_attributes_step(
    attributes: Attributes, item: int, history: IntArray, cited: IntArray
) -> Step | None:
    """What the catalogue says that the item and the cited ones have in common; None if nothing."""
    others = list(dict.fromkeys(int(history[p]) for p in cited))
    found = {other: attributes.shared(item, other) for other in others}
    found = {other: values for other, values in found.items() if values}
    if not found:
        return None
    own: dict[str, str | list[str]] = {}
    parts = []
    for other, values in found.items():
        names = []
        for name, value in values.items():
            if isinstance(value, list):
                known = own.get(name, [])
                own[name] = [*known, *(v for v in value if v not in known)]
                names.append("category " + " / ".join(escape_text(v, _TITLE_CHARS) for v in value))
            else:
                own[name] = value
                names.append(f"brand {escape_text(value, _TITLE_CHARS)}")
        parts.append(f"with “{attributes.titles[other]}”: {', '.join(names)}")
    claims = {attributes.item_ids[other]: values for other, values in found.items()}
    single = [(n, v) for n, vs in own.items() for v in (vs if isinstance(vs, list) else [vs])]
    shares = [{"attribute": n, "value": v, "share": attributes.shares[n, v]} for n, v in single]
    return Step(
        "shared_attributes",
        f"By the catalogue, the item shares {'; '.join(parts)}.",
        tuple(claims),
        # An item that is recommended again is in its own history: both claims are the same then.
        {**claims, attributes.item_ids[item]: own},
        {"catalogue_shares": shares},
    )


def preference_step(attributes: Attributes, history: IntArray, deltas: np.ndarray) -> Step | None:
    """The attribute that most of the measured support comes from; None if no two items share one.

    Each history item's Δ (where it is above `MIN_DELTA`) counts for every attribute that the
    catalogue gives it. The attribute with the largest sum is named, of equal ones the rarer.

    Args:
        attributes: of the catalogue.
        history: shown catalogue rows, (n,).
        deltas: Δ of every position for one item, (n,).
    """
    support: dict[tuple[str, str], float] = {}
    holders: dict[tuple[str, str], list[int]] = {}
    for position in np.flatnonzero(deltas > MIN_DELTA):
        item, delta = int(history[position]), float(deltas[position])
        brand = attributes.brands[item]
        own = [("categories", value) for value in attributes.categories[item]]
        for key in own + ([("brand", brand)] if brand else []):
            if attributes.shares[key] <= COMMON_SHARE:
                support[key] = support.get(key, 0.0) + delta
                holders.setdefault(key, []).append(item)
    shared = {key: items for key, items in holders.items() if len(set(items)) > 1}
    if not shared:
        return None
    name, value = max(shared, key=lambda key: (support[key], -attributes.shares[key], key))
    items = list(dict.fromkeys(shared[name, value]))
    total = float(deltas[deltas > MIN_DELTA].sum())
    share = support[name, value] / total
    kind = "brand" if name == "brand" else "category"
    titles = ", ".join(f"“{attributes.titles[i]}”" for i in items)
    return Step(
        "preference",
        f"{share:.0%} of the measured support comes from history items of {kind} "
        f"{escape_text(value, _TITLE_CHARS)}, which {attributes.shares[name, value]:.1%} of the "
        f"catalogue has: {titles}.",
        tuple(attributes.item_ids[i] for i in items),
        {attributes.item_ids[i]: {name: value if name == "brand" else [value]} for i in items},
        {
            "support": support[name, value],
            "support_share": share,
            "catalogue_share": attributes.shares[name, value],
        },
    )


def set_aside_step(
    attributes: Attributes, history: IntArray, deltas: np.ndarray, cited: IntArray
) -> Step | None:
    """History items that speak against the item: without them it would be likelier.

    An item that was taken twice can speak for and against; where one copy of it supports, or is
    cited, it isn't set aside.

    Args:
        attributes: of the catalogue.
        history: shown catalogue rows, (n,).
        deltas: Δ of every position for one item, (n,).
        cited: positions that the evidence cites.
    """
    spared = np.concatenate([history[cited], history[deltas > MIN_DELTA]])
    against = np.flatnonzero((deltas < -MIN_DELTA) & ~np.isin(history, spared))
    against = against[np.argsort(deltas[against], kind="stable")][:_MOST_ASIDE]
    if len(against) == 0:
        return None
    parts = [
        f"without “{attributes.titles[history[p]]}” the log-probability would rise by "
        f"{-deltas[p]:.2f}"
        for p in against
    ]
    return Step(
        "set_aside",
        f"Recommended in spite of part of the history: {'; '.join(parts)}.",
        tuple(dict.fromkeys(attributes.item_ids[history[p]] for p in against)),
        measured={"positions": against.tolist(), "deltas": [float(deltas[p]) for p in against]},
    )


def counterfactual_step(
    attributes: Attributes, history: IntArray, found: Counterfactual, k: int
) -> Step:
    """What would have to be gone for the item to leave a list of k."""
    ids = [attributes.item_ids[history[p]] for p in found.positions]
    titles = " and ".join(f"“{attributes.titles[history[p]]}”" for p in found.positions)
    rank = None if found.rank == UNLISTED else found.rank
    where = f"at rank {rank}" if rank else "below everything that the search kept"
    text = (
        f"Without {titles} it would not be in the list of {k}: it would stand {where}. With any "
        "one of them back it would."
        if len(ids) > 1
        else f"Without {titles} it would not be in the list of {k}: it would stand {where}."
    )
    if not found.found:  # another set may exist, and even a smaller one
        most = f"{len(ids)} history item{'s' if len(ids) > 1 else ''}"
        text = (
            f"The greedy search found no set of at most {most} that carries it: even without "
            f"{titles} it stays in the list of {k}, at rank {rank}."
        )
    instead = None if found.replaced_by < 0 else attributes.item_ids[found.replaced_by]
    return Step(
        "counterfactual",
        text,
        tuple(dict.fromkeys(ids)),
        measured={
            "found": found.found,
            "positions": list(found.positions),
            "log_prob": found.log_prob,
            "rank": rank,
            "first_then": instead,
            "list_length": k,
        },
    )


def decision_step(rank: int, score: float, level_log_probs: list[float], certified: bool) -> Step:
    """Where the item stands in the list and why there."""
    levels = " + ".join(_nats(x) for x in level_log_probs)
    exact = (
        "the list is proven to be the exact top of the allowed catalogue"
        if certified
        else "the list is not proven to be exact: a pruned prefix could have led to a better item"
    )
    return Step(
        "decision",
        f"Rank {rank}: the list is ordered by log-probability alone, {_nats(score)} for this item, "
        f"the sum over its semantic-id levels ({levels}); {exact}.",
        measured={
            "rank": rank,
            "score": score,
            "level_log_probs": level_log_probs,
            "certified": certified,
        },
    )


def assemble(
    attributes: Attributes,
    lists: pl.DataFrame,
    histories: Sequence[IntArray],
    evidence: Evidence,
    cited: IntArray,
    found: Mapping[tuple[int, int], Counterfactual] | None = None,
    k: int = 10,
    joint: FloatArray | None = None,
) -> list[Chain]:
    """One chain per recommended item, unchecked.

    Args:
        attributes: of the catalogue.
        lists: recommendations, sorted by row then rank; its rows in the order of `histories`.
        histories: shown histories, one per list.
        evidence: of these lists.
        cited: positions, from `Evidence.cited` or `JointEvidence.positions`.
        found: counterfactuals, by number of the list and place.
        k: length of the list that they are about.
        joint: `JointEvidence.added` of the cited positions; None: they were chosen one by one.
    """
    columns = (ROW_ID, RANK, ITEM_ID, ITEM_INDEX, SCORE, LEVEL_LOG_PROBS, CERTIFIED)
    row = lists[ROW_ID].rle_id().to_list()
    place = pl.int_range(pl.len()).over(ROW_ID)
    places = lists.select(place.alias("place"))["place"].to_list()
    chains = []
    for r, j, values in zip(row, places, lists.select(columns).iter_rows(), strict=True):
        row_id, rank, item_id, item, score, level_log_probs, certified = values
        history, positions = histories[r], cited[r, j][cited[r, j] >= 0]
        deltas = evidence.deltas[r, j, : len(history)]
        changed = (found or {}).get((r, j))
        steps = [
            evidence_step(
                attributes,
                history,
                positions,
                deltas[positions] if joint is None else joint[r, j, : len(positions)],
                evidence.log_probs[r, j],
                joint is not None,
            ),
            preference_step(attributes, history, deltas),
            shared_attributes_step(attributes, item, history, positions),
            decision_step(rank, score, level_log_probs, certified),
            set_aside_step(attributes, history, deltas, positions),
            None if changed is None else counterfactual_step(attributes, history, changed, k),
        ]
        chains.append(
            Chain(
                row_id,
                item_id,
                rank,
                tuple(step for step in steps if step is not None),
                rationale_origin="template",
                trained_on_target=False,
            )
        )
    return chains
