"""Faithfulness of chains that the model wrote before the decision (`genrec.reasoning`).

What assembled chains have by construction has to be shown for written ones: that what they cite
exists and mattered, that what they claim is true, and that the item depends on the chain at all.
All scores are log p(item | history, chain) with the item's own chain held fixed, so an effect that
history items have through the chain alone isn't seen: it would need the chain sampled again.

`chain_support` = log p(item | history, chain) − log p(item | history, no chain): what the chain
adds. Beside it stand the same with the first half of the chain, and with another user's. An item's
chain is the best of those sampled for its user, so the other user's counts with its best as well.
Near 0, or no better than another user's, the chain is decoration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import polars as pl

from genrec.chains import Chain, Check
from genrec.explain import checks
from genrec.explain.erasure import CHAIN, Erased, others
from genrec.explain.evidence import FloatArray, IntArray, item_log_probs, leave_one_out
from genrec.explain.thresholds import TRUNCATED
from genrec.reasoning import ReasonedList, decision_marker, marker_ids
from genrec.recommend import Recommender
from genrec.tasks.attributes import KIND, VALUE, item_attributes
from genrec.tasks.reasoning import CLAIM_NAMES

_RESTS_ON = ("evidence", "preference", "intent")  # steps whose citations are its reasons


@dataclass(frozen=True)
class _Parts:
    """The lists of single chains: the items of one list that one of its chains is best for.

    Attributes:
        row: the list that each belongs to, (V,).
        chain: number of its chain, (V,).
        items: catalogue rows, (V, K); −1 pads.
        of_item: (list, place) -> (part, place in it).
        histories: shown, one per part.
        behind: token ids of the chain, marker included, one per part.
    """

    row: IntArray
    chain: IntArray
    items: IntArray
    of_item: dict[tuple[int, int], tuple[int, int]]
    histories: list[IntArray]
    behind: list[tuple[int, ...]]

    @classmethod
    def split(cls, made: Sequence[ReasonedList], histories: Sequence[IntArray]) -> _Parts:
        row: list[int] = []
        chain: list[int] = []
        items: list[IntArray] = []
        of_item: dict[tuple[int, int], tuple[int, int]] = {}
        widest = max((len(own.item_ids) for own in made), default=0)
        for number, own in enumerate(made):
            for c in np.unique(own.merged.chain):
                places = np.flatnonzero(own.merged.chain == c)
                for at, place in enumerate(places):
                    of_item[number, int(place)] = (len(row), at)
                row.append(number)
                chain.append(int(c))
                mine = own.merged.items[places]
                items.append(np.pad(mine, (0, widest - len(mine)), constant_values=-1))
        return cls(
            np.array(row, dtype=np.int64),
            np.array(chain, dtype=np.int64),
            np.array(items, dtype=np.int64).reshape(len(row), widest),
            of_item,
            [histories[r] for r in row],
            [made[r].chains[c].token_ids for r, c in zip(row, chain, strict=True)],
        )


def check_written(
    recommender: Recommender,
    row_ids: Sequence[str],
    histories: Sequence[IntArray],
    made: Sequence[ReasonedList],
    targets: Sequence[int | None],
    vectors: np.ndarray,
    counts: IntArray,
    draws: int = 3,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> list[Chain]:
    """One chain per listed item, with the reader's checks and what is measured here.

    Args:
        recommender: the run that made the lists.
        row_ids: split row of each list.
        histories: shown catalogue rows, one per list.
        made: of `Recommender.reason`.
        targets: catalogue row of each list's held-out item, None where there is none.
        vectors: of the catalogue, for similar items, (n_items, dim).
        counts: interactions per catalogue row, for the popular ones, (n_items,).
        draws: similar items that are tried in place of each erased one.
        seed: of the draws.
        progress: called with the number of prompts of each finished block.

    Returns:
        Chains in list order.
    """
    if not made:
        return []
    parts = _Parts.split(made, histories)
    evidence = leave_one_out(recommender, parts.histories, parts.items, progress, parts.behind)
    tested = checks.try_citations(
        recommender, parts.histories, parts.items, evidence, _cited(recommender, parts, made),
        counts, vectors, draws, seed, parts.row, parts.behind, progress,
    )  # fmt: skip
    support = _support(recommender, parts, made, evidence.log_probs, seed, progress)
    has, stability = _catalogue(recommender.catalog), _stability(made, histories, recommender, seed)
    ids = recommender.catalog["item_id"].to_list()
    records = [own.records(row_id) for own, row_id in zip(made, row_ids, strict=True)]
    other = others(np.arange(len(made)), np.random.default_rng(seed))
    found = []
    for number, chains in enumerate(records):
        shown = [ids[i] for i in histories[number]]
        for place, chain in enumerate(chains):
            at = parts.of_item[number, place]
            theirs = records[int(other[number])]
            foreign = theirs[min(place, len(theirs) - 1)] if other[number] != number else None
            share = None if foreign is None else checks.share_in(foreign, shown)[0]
            measured = {
                **_named("evidence_agreement", tested.agreement, at),
                **_erased(tested.erased, at),
                **_named("chain_support", support, at),
            }
            more = (
                checks.target_leak(chain, has, histories[number], targets[number]),
                checks.contradictions(chain),
                Check("citations_in_history_other_chain", share),
                *(Check(name, checks.defined(value)) for name, value in measured.items()),
                *(Check(name, checks.defined(v[number])) for name, v in stability.items()),
            )
            found.append(replace(chain, checks=(*chain.checks, *more)))
    return found


def _cited(recommender: Recommender, parts: _Parts, made: Sequence[ReasonedList]) -> IntArray:
    """History positions that each part's chain rests on, the newest copy of an item, (V, K, n)."""
    positions = [
        _positions(recommender, made[row], chain, history)
        for row, chain, history in zip(parts.row, parts.chain, parts.histories, strict=True)
    ]
    most = max(1, *(len(own) for own in positions))
    out = np.full((*parts.items.shape, most), -1, dtype=np.int64)
    for number, own in enumerate(positions):
        out[number, :, : len(own)] = own
    return out


def _positions(
    recommender: Recommender, made: ReasonedList, chain: int, history: IntArray
) -> list[int]:
    steps = [step for step in made.chains[chain].steps if step.type in _RESTS_ON]
    cited = dict.fromkeys(item for step in steps for item in step.cited_item_ids)
    newest = {int(item): position for position, item in enumerate(history)}
    rows, _ = recommender.known_rows(list(cited))
    return [newest[row] for row in rows if row in newest]


def _support(
    recommender: Recommender,
    parts: _Parts,
    made: Sequence[ReasonedList],
    log_probs: FloatArray,
    seed: int,
    progress: Callable[[int], object] | None,
) -> dict[str, FloatArray]:
    """`chain_support` of each way to reason, (V, K)."""
    end = tuple(marker_ids(recommender.tokenizer, decision_marker(recommender.renderer)))

    def score(rows: IntArray, behind: Sequence[Sequence[int]]) -> FloatArray:
        histories = [parts.histories[r] for r in rows]
        return item_log_probs(recommender, histories, parts.items[rows], progress, behind)

    everyone = np.arange(len(parts.row))
    none = score(everyone, [end] * len(parts.row))
    halves = [(*own[: max(0, len(own) - len(end)) // 2], *end) for own in parts.behind]
    # Another user's chains, all of them: the best one counts, as it does for an item's own.
    other = parts.row[others(parts.row, np.random.default_rng(seed))]
    pairs = [(v, c) for v in everyone for c in range(len(made[other[v]].chains))]
    rows = np.array([v for v, _ in pairs], dtype=np.int64)
    theirs = score(rows, [made[other[v]].chains[c].token_ids for v, c in pairs])
    best = np.full(parts.items.shape, -np.inf)
    np.maximum.at(best, rows, theirs)
    best[(other == parts.row)] = np.nan  # there is one user only
    return {
        CHAIN: log_probs - none,
        TRUNCATED: score(everyone, halves) - none,
        "other_chain": np.where(parts.items >= 0, best, np.nan) - none,
    }


def _catalogue(catalog: pl.DataFrame) -> Callable[[int, str, str], bool]:
    """Whether an item has a value, of the attributes that chains may claim."""
    table = item_attributes(catalog)
    known = {
        (item, CLAIM_NAMES.get(kind, kind), value)
        for item, kind, value in table.select("item_index", KIND, VALUE).iter_rows()
    }
    return lambda item, name, value: (item, name, value) in known


def _stability(
    made: Sequence[ReasonedList],
    histories: Sequence[IntArray],
    recommender: Recommender,
    seed: int,
) -> dict[str, FloatArray]:
    """Mean Jaccard index of what any two chains of a list cite; beside it of random such sets."""
    rng = np.random.default_rng(seed)
    values: dict[str, list[float]] = {"stability": [], "stability_random": []}
    for own, history in zip(made, histories, strict=True):
        cited = [set(_positions(recommender, own, c, history)) for c in range(len(own.chains))]
        drawn = [set(rng.choice(len(history), len(c), replace=False).tolist()) for c in cited]
        for name, sets in (("stability", cited), ("stability_random", drawn)):
            pairs = [len(a & b) / len(a | b) for a, b in combinations(sets, 2) if a | b]
            values[name].append(float(np.mean(pairs)) if pairs else np.nan)
    return {name: np.array(column) for name, column in values.items()}


def _named(figure: str, ways: Mapping[str, FloatArray], at: tuple[int, int]) -> dict[str, float]:
    return {figure if n == CHAIN else f"{figure}_{n}": v[at] for n, v in ways.items()}


def _erased(erased: Mapping[str, Erased], at: tuple[int, int]) -> dict[str, float]:
    comprehensiveness = {name: own.comprehensiveness for name, own in erased.items()}
    sufficiency = {name: own.sufficiency for name, own in erased.items()}
    return {
        **_named("comprehensiveness", comprehensiveness, at),
        **_named("sufficiency", sufficiency, at),
    }
