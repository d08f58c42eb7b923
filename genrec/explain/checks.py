"""Faithfulness checks of single chains, some with a verdict, some measured only.

A check is named after what it measures; the same with ``_random``, ``_newest``, ``_popular`` or
``_other_chain`` behind it is a control, which has to do worse (see `genrec.explain.erasure` and
`genrec.explain.faithfulness`). What a check can't see stands in its docstring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from genrec.chains import Chain, Check, ItemId
from genrec.explain.assemble import Attributes
from genrec.explain.erasure import CHAIN, Erased, control_sets, erase, replacements
from genrec.explain.evidence import Evidence, FloatArray, IntArray
from genrec.recommend import Recommender

MAX_SCORE_DIFFERENCE = 1e-3  # |stored score − score measured again|, in float32
_SINGLE_VALUED = ("brand", "price_band")


def claims(chain: Chain) -> Iterator[tuple[ItemId, str, str | list[str]]]:
    """All claims of a chain: item, attribute, value."""
    for step in chain.steps:
        for item, values in step.claimed_attributes.items():
            for name, value in values.items():
                yield item, name, value


def citations_in_history(chain: Chain, history_item_ids: Sequence[Any]) -> Check:
    """Share of cited items that lie in the shown history; it must be 1 (None: nothing is cited).

    Citing anything from the history passes: whether it mattered is what erasure measures.
    """
    return Check("citations_in_history", *share_in(chain, history_item_ids))


def share_in(chain: Chain, history_item_ids: Sequence[Any]) -> tuple[float | None, bool | None]:
    """Share of a chain's citations that are in a history, and whether all are."""
    cited = chain.cited_item_ids
    if not cited:
        return None, None
    known = set(history_item_ids)
    share = sum(item in known for item in cited) / len(cited)
    return share, share == 1


def attributes_match(chain: Chain, attributes: Attributes) -> Check:
    """Share of claimed attributes that the catalogue supports; it must be 1 (None: no claims).

    A true claim need not be a reason, and a catalogue that is wrong makes it wrong.
    """
    made = list(claims(chain))
    if not made:
        return Check("attributes_match", None)
    rows = attributes.rows
    right = sum(i in rows and attributes.has(rows[i], name, value) for i, name, value in made)
    return Check("attributes_match", right / len(made), right == len(made))


def target_leak(
    chain: Chain, has: Callable[[int, str, str], bool], history: IntArray, target: int | None
) -> Check:
    """Share of claimed values that the held-out target has and no shown history item; must be 0.

    A chain can't know them from its input. None without claims, or where no target is held out. A
    leak of values that the history happens to share isn't seen.

    Args:
        chain: to check.
        has: whether the catalogue gives a row an attribute's value.
        history: shown catalogue rows.
        target: catalogue row of the held-out item, None if there is none.
    """
    values = {
        (name, single)
        for _, name, value in claims(chain)
        for single in (value if isinstance(value, list) else [value])
    }
    if target is None or not values:
        return Check("target_leak", None)
    shown = set(history.tolist())
    leaked = sum(
        has(target, *value) and not any(has(item, *value) for item in shown) for value in values
    )
    return Check("target_leak", leaked / len(values), leaked == 0)


def contradictions(chain: Chain) -> Check:
    """How often a chain contradicts itself; must be 0.

    Counted are items that it both rests on and sets aside, and items of which it claims two values
    of an attribute that has one. Contradictions in free wording aren't read.
    """
    rests: set[ItemId] = set()
    aside: set[ItemId] = set()
    stated: dict[tuple[ItemId, str], set[str]] = {}
    for step in chain.steps:
        mine = set(step.measured.get("set_aside_item_ids", []) or [])  # type: ignore[arg-type]
        aside |= mine | (set(step.cited_item_ids) if step.type == "set_aside" else set())
        if step.type in ("evidence", "preference", "intent"):
            rests |= set(step.cited_item_ids)
    for item, name, value in claims(chain):
        if name in _SINGLE_VALUED:
            stated.setdefault((item, name), set()).add(str(value))
    found = len(rests & aside) + sum(len(values) > 1 for values in stated.values())
    return Check("contradictions", float(found), found == 0)


def score_reproduced(stored: float, measured: float) -> Check:
    """|stored score − score measured again|; at most `MAX_SCORE_DIFFERENCE`."""
    difference = abs(stored - measured)
    return Check("score_difference", difference, difference <= MAX_SCORE_DIFFERENCE)


def agreement(chosen: IntArray, deltas: FloatArray) -> FloatArray:
    """Share of chosen positions that are among as many with the largest leave-one-out Δ.

    1 by construction for chains that were assembled from these Δ; there it is of use for the
    controls alone.

    Args:
        chosen: positions, (R, K, n); −1 pads.
        deltas: of every position, (R, K, H), NaN behind a history's end.

    Returns:
        (R, K), NaN where nothing is chosen.
    """
    size = (chosen >= 0).sum(-1)
    # Of equal Δ the newer counts, as in `Evidence.cited`.
    values = np.nan_to_num(deltas, nan=-np.inf)[..., ::-1]
    order = values.shape[-1] - 1 - np.argsort(-values, axis=-1, kind="stable")
    top = np.where(np.arange(order.shape[-1]) < size[..., None], order, -2)
    same = (chosen[..., :, None] == top[..., None, :]).any(-1) & (chosen >= 0)
    return np.divide(
        same.sum(-1), size, out=np.full(size.shape, np.nan), where=size > 0, casting="unsafe"
    )


def overlap(first: IntArray, second: IntArray) -> FloatArray:
    """Jaccard index of two sets of positions, (R, K); NaN where both are empty.

    Args:
        first: positions, (R, K, n); −1 pads.
        second: the same, (R, K, m).
    """
    common = ((first[..., :, None] == second[..., None, :]) & (first[..., :, None] >= 0)).any(-1)
    both = common.sum(-1)
    either = (first >= 0).sum(-1) + (second >= 0).sum(-1) - both
    return np.divide(
        both, either, out=np.full(both.shape, np.nan), where=either > 0, casting="unsafe"
    )


@dataclass(frozen=True)
class TriedCitations:
    """Ways to cite, the chain's (`CHAIN`) and the controls', and what each is worth.

    Attributes:
        sets: positions of each way, (R, K, n).
        erased: erasure by replacement.
        agreement: with leave-one-out, (R, K).
    """

    sets: Mapping[str, IntArray]
    erased: Mapping[str, Erased]
    agreement: Mapping[str, FloatArray]


def try_citations(
    recommender: Recommender,
    histories: Sequence[IntArray],
    items: IntArray,
    evidence: Evidence,
    cited: IntArray,
    counts: IntArray,
    vectors: np.ndarray,
    draws: int,
    seed: int,
    users: IntArray | None = None,
    behind: Sequence[Sequence[int]] | None = None,
    progress: Callable[[int], object] | None = None,
    start: Callable[[int], object] | None = None,
) -> TriedCitations:
    """Test citations beside the controls.

    Args:
        recommender: the run.
        histories: shown histories.
        items: recommended catalogue rows, (R, K); −1 pads.
        evidence: of these lists.
        cited: positions, (R, K, n); −1 pads.
        counts: interactions per catalogue row, for the popular ones, (n_items,).
        vectors: of the catalogue, for similar items, (n_items, dim).
        draws: similar items that are tried in place of each erased one.
        seed: of the controls and the draws.
        users: see `genrec.explain.erasure.control_sets`.
        behind: token ids of each list's chain, which stays as it is.
        progress: called with the number of prompts of each finished block.
        start: called with the number of prompts before the first.
    """
    lengths = np.array([len(h) for h in histories], dtype=np.int64)
    popularity = [counts[h] for h in histories]
    sets = {CHAIN: cited, **control_sets(cited, lengths, popularity, seed, users)}
    similar = replacements(vectors, histories, items, draws, seed)
    erased = erase(
        recommender, histories, items, evidence.log_probs, sets, similar, progress, start, behind
    )
    return TriedCitations(
        sets, erased, {name: agreement(own, evidence.deltas) for name, own in sets.items()}
    )


def check_all(
    chains: Sequence[Chain],
    attributes: Attributes,
    histories: Sequence[IntArray],
    targets: Sequence[int | None],
    log_probs: FloatArray,
    tested: TriedCitations,
    stability: Mapping[str, FloatArray],
    scores: Sequence[float],
) -> list[Chain]:
    """Chains with the outcomes of all checks.

    Args:
        chains: in list order, as `genrec.explain.assemble.assemble` gives them.
        attributes: of the catalogue.
        histories: shown histories, one per list.
        targets: catalogue row of each list's held-out item, None where there is none.
        log_probs: log p(item | shown history), (R, K).
        tested: citations of the same lists.
        stability: Jaccard of what each way cites with what another wording of the prompt makes one
            cite, (R, K) each; NaN where it was not measured.
        scores: stored score of each chain's item.
    """
    ids = attributes.item_ids
    own = [[ids[i] for i in history] for history in histories]
    where = _places(chains)
    at = {place: number for number, place in enumerate(where)}
    checked = []
    for number, (chain, (row, place), score) in enumerate(zip(chains, where, scores, strict=True)):
        other = chains[at.get(((row + 1) % len(histories), place), number)]
        values: dict[str, FloatArray] = {}
        for figure, ways in (
            ("evidence_agreement", tested.agreement),
            ("comprehensiveness", {n: e.comprehensiveness for n, e in tested.erased.items()}),
            ("sufficiency", {n: e.sufficiency for n, e in tested.erased.items()}),
            ("stability", stability),
        ):
            values |= {figure if n == CHAIN else f"{figure}_{n}": v for n, v in ways.items()}
        checks = (
            citations_in_history(chain, own[row]),
            attributes_match(chain, attributes),
            score_reproduced(score, float(log_probs[row, place])),
            target_leak(chain, attributes.has_value, histories[row], targets[row]),
            contradictions(chain),
            *_of_another(chain, other, own[row], attributes),
            *(Check(name, defined(v[row, place])) for name, v in values.items()),
        )
        checked.append(replace(chain, checks=checks))
    return checked


def _places(chains: Sequence[Chain]) -> list[tuple[int, int]]:
    """Number of the list, and place in it, of each chain."""
    row, place, current = -1, 0, None
    found = []
    for chain in chains:
        row, place = (row, place + 1) if chain.row_id == current else (row + 1, 0)
        current = chain.row_id
        found.append((row, place))
    return found


def _of_another(
    chain: Chain, other: Chain, history_item_ids: Sequence[Any], attributes: Attributes
) -> tuple[Check, Check]:
    """What another list's chain would score here: its citations, and what it says of its item."""
    if other is chain:  # there is one list only
        return Check("citations_in_history_other_chain", None), Check(
            "attributes_match_other_chain", None
        )
    said = [(name, value) for item, name, value in claims(other) if item == other.item_id]
    rows = attributes.rows
    right = [
        chain.item_id in rows and attributes.has(rows[chain.item_id], name, value)
        for name, value in said
    ]
    return (
        Check("citations_in_history_other_chain", share_in(other, history_item_ids)[0]),
        Check("attributes_match_other_chain", float(np.mean(right)) if right else None),
    )


def defined(value: float) -> float | None:
    """NaN is written as None."""
    return None if np.isnan(value) else float(value)
