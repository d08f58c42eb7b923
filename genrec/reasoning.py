"""Reasoning mode: chains are sampled, then items are searched behind each chain, then merged.

A model that was trained on the family `reasoning_recommendation` writes a chain before it names an
item. So the items of one chain depend on what was sampled, and a list should rest on several:

1. `n_chains` chains per prompt are sampled as free text (`genrec.decoding.free_text`), up to the
   words behind which training rows put the item (`decision_marker`). Prompt and chain are then a
   token prefix of a training row, if the model writes what it was taught.
2. One constrained search over all (prompt, chain) pairs gives each chain its list. The chains of a
   prompt share what was computed of it, and `exact` scores behind the same states.
3. The lists of a prompt are merged: with C chains, an item's score is
   ``logsumexp_c log p(item | chain c) − log C``, the Monte Carlo estimate of the log-probability
   with the chain summed out (self-consistency, Wang et al. 2023, but of probabilities and not of
   votes). It is an estimate under the distribution that chains were drawn from: the model's own at
   temperature 1 and top_p 1.

A chain whose beam does not hold the item adds nothing to the sum, so the score is a lower bound of
that estimate; ``exact=True`` scores every item of the merged list under every chain instead. Which
items are candidates stays what the beams proposed.

Chains are sampled without constraints: a constraint to existing or to own items would make the
citation checks unable to fail, and would change the distribution that the scores average over. What
a chain cites and claims is read and looked up afterwards (`genrec.chain_reader`), and a chain with
false citations is kept and flagged. A chain that ends or reaches the limit before the marker gets
the marker appended and is searched like any other (as in budget forcing, Muennighoff et al. 2025);
its finish reason says so.

What a chain is worth: small models trained from scratch learn the wording of typed steps, and what
can be claimed for their chains is that citations and claims are true, as far as the checks say so.
That is faithfulness to the history, not quality of reasoning, and no chain is shown to be the cause
of an item; `genrec.explain` measures causes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from genrec.chain_reader import ChainReader
from genrec.chains import Chain, Check, ItemId, Step
from genrec.decoding.beam import default_beam_width
from genrec.decoding.free_text import FinishReason, SampledText, TextSampling, sample_texts
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import CatalogueView, SidTrie
from genrec.prompts import PromptRenderer
from genrec.tasks.families import FAMILIES, SIDS, TARGETS

REASONING = "reasoning_recommendation"
ORIGIN = "before"
"""Of every chain made here, in the terms of `genrec.chains`: written before the decision."""

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SampledChain:
    """A chain, and what is to be seen of it.

    Attributes:
        text: without the marker.
        token_ids: what the search saw behind the prompt, marker included.
        finish_reason: "stop" (the model wrote the marker), "eos" or "length" (it was appended).
        steps: the typed steps that the text holds, in the order of the curriculum.
        unread: parts of the text that are no step.
        checks: see `genrec.chain_reader.ChainReader.read`.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    steps: tuple[Step, ...]
    unread: tuple[str, ...]
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Merged:
    """The merged list of one prompt, best first; n items, L levels.

    Attributes:
        items: catalogue rows, (n,) int64, distinct.
        scores: estimated log-probabilities with the chain summed out, (n,) float64.
        level_log_probs: under the item's own chain, (n, L) float32. Their sum is the item's
            log-probability given that chain, not its score.
        chain: the chain under which the item scores best, (n,) int64.
        n_proposed: how many chains' beams held the item, (n,) int64.
    """

    items: IntArray
    scores: npt.NDArray[np.float64]
    level_log_probs: npt.NDArray[np.float32]
    chain: IntArray
    n_proposed: IntArray


@dataclass(frozen=True)
class ReasonedList:
    """A list in which each item keeps its chain.

    Attributes:
        item_ids: best first.
        merged: rows, scores and chain numbers of the same items.
        chains: all that were sampled; ``merged.chain`` numbers them.
        exact: whether every item was scored under every chain.
        trained_on_target: whether the chains that the model learned from saw the answer, as the run
            recorded it; None where it did not.
        rationale_origin: always `ORIGIN`.
    """

    item_ids: tuple[ItemId, ...]
    merged: Merged
    chains: tuple[SampledChain, ...]
    exact: bool
    trained_on_target: bool | None
    rationale_origin: str = ORIGIN

    def records(self, row_id: str) -> list[Chain]:
        """One chain per item in the form that is stored and audited.

        The last step is not the model's: it states where the item stands and what was measured.

        Args:
            row_id: of the split row that the list answers.

        Raises:
            ValueError: the run did not record what its chains were made of.
        """
        if self.trained_on_target is None:
            raise ValueError(
                "the run did not record whether its training chains saw the target; rebuild it "
                "from build_dataset on"
            )
        return [
            Chain(
                row_id,
                item,
                place + 1,
                (*self.chains[number].steps, self._decision(place)),
                self.rationale_origin,
                self.trained_on_target,
                self.chains[number].checks,
            )
            for place, (item, number) in enumerate(
                zip(self.item_ids, self.merged.chain.tolist(), strict=True)
            )
        ]

    def _decision(self, place: int) -> Step:
        merged = self.merged
        chain = self.chains[merged.chain[place]]
        score, n = float(merged.scores[place]), len(self.chains)
        own = [float(x) for x in merged.level_log_probs[place]]
        bound = "estimated" if self.exact else "at least"
        text = (
            f"Rank {place + 1} of a list merged from {n} sampled chains, {merged.n_proposed[place]}"
            f" of which proposed this item: log-probability {bound} {_nats(score)}, and "
            f"{_nats(sum(own))} given this chain."
        )
        measured: dict[str, Any] = {
            "rank": place + 1,
            "score": score,
            "exact": self.exact,
            "level_log_probs": own,
            "chain": int(merged.chain[place]),
            "n_chains": n,
            "n_proposed": int(merged.n_proposed[place]),
            "finish_reason": chain.finish_reason,
            "unread": list(chain.unread),
        }
        return Step("decision", text, measured=measured)


def _nats(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def decision_marker(renderer: PromptRenderer) -> str:
    """The words between the last step and the item in completions of `REASONING`.

    Raises:
        ValueError: the template does not end with the item, or has no words before it, so that
            nothing says where a chain ends.
    """
    template = f"{REASONING}/completion/01"
    fields = FAMILIES[REASONING].completion
    shown = {v: "\x01" if field == (TARGETS, SIDS) else "\x00" for v, field in fields.items()}
    chain, item, tail = renderer.render(template, sids=shown).partition("\x01")
    marker = chain.rpartition("\x00")[2]
    if not item or tail or not marker.strip():
        raise ValueError(
            f"template {template!r} must end with the item and have words of its own before it, "
            "such as 'Recommended item:'; else the end of a chain can't be told"
        )
    return marker


def sample_chains(
    engine: TorchEngine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    n_chains: int,
    marker: str,
    sampling: TextSampling,
    progress: Callable[[int], object] | None = None,
) -> list[list[SampledText]]:
    """Sample chains, each ending with the marker.

    Args:
        engine: of the run; its model writes.
        tokenizer: the model's.
        prompts: token ids.
        n_chains: per prompt.
        marker: of `decision_marker`.
        sampling: temperature, top_p, limit and seed.
        progress: called with the number of prompts of each finished batch.

    Returns:
        Per prompt `n_chains` texts, whose tokens end with the marker's: as sampled, or appended
        where the finish reason is not "stop".

    Raises:
        ValueError: `n_chains` below 1, a marker that the tokenizer joins with what is before it;
            and as `sample_texts`, so where a prompt leaves no room for a chain and an item.
    """
    if n_chains < 1:
        raise ValueError(f"n_chains={n_chains} must be at least 1")
    end = marker_ids(tokenizer, marker)
    # What the model writes is compared as text: sampled tokens may spell the marker otherwise.
    (stop_text,) = tokenizer.batch_decode([end], clean_up_tokenization_spaces=False)
    found = sample_texts(
        engine.model,
        tokenizer,
        prompts,
        n_chains,
        stop_text,
        sampling,
        len(end) + engine.trie.n_levels,
        engine.batch_size,
        progress,
    )
    return [
        [
            text
            if text.finish_reason == "stop"
            else SampledText((*text.token_ids, *end), text.text, text.finish_reason)
            for text in chains
        ]
        for chains in found
    ]


def marker_ids(tokenizer: PreTrainedTokenizerBase, marker: str) -> list[int]:
    """Tokens of the marker behind a full stop, as in a training row.

    Alone it may be encoded otherwise: some tokenizers put a space before every text.

    Raises:
        ValueError: the tokenizer joins the marker with what is before it.
    """
    stop, both = tokenizer([".", "." + marker], add_special_tokens=False)["input_ids"]
    if both[: len(stop)] != stop:
        raise ValueError(
            f"the tokenizer joins {marker!r} with a full stop before it, so nothing says where a "
            "chain ends; begin these words of the completion template with a space"
        )
    return both[len(stop) :]


def search_with_chains(
    engine: TorchEngine,
    prompts: Sequence[Sequence[int]],
    chains: Sequence[Sequence[SampledText]],
    k: int,
    beam_width: int | None = None,
    seen: Sequence[np.ndarray] | None = None,
    view: CatalogueView | None = None,
    exact: bool = False,
    items_per_chain: int | None = None,
) -> list[Merged]:
    """Search behind every chain of every prompt at once, and merge the lists of each prompt.

    Args:
        engine: of the run.
        prompts: token ids.
        chains: of `sample_chains`; the same number for each prompt.
        k: items per merged list, at most.
        beam_width: prefixes kept per level; default as in `Recommender.recommend`.
        seen: catalogue rows that each prompt's list must not hold, or None.
        view: catalogue view that holds for all, or None.
        exact: score each candidate under every chain, by teacher forcing.
        items_per_chain: length of each chain's list; default `k`. More of them make the lower
            bound tighter and leave fewer candidates out.

    Raises:
        ValueError: no chains or unequally many, `k` or `items_per_chain` out of range, or a prompt
            has no allowed item left.
    """
    if not len(prompts) and not len(chains):
        return []
    n_chains = len(chains[0]) if chains else 0
    if len(chains) != len(prompts) or any(len(own) != n_chains for own in chains) or not n_chains:
        raise ValueError(
            f"{[len(own) for own in chains]} chains for {len(prompts)} prompts; each prompt needs "
            "the same number of them, at least one"
        )
    per_chain = k if items_per_chain is None else items_per_chain
    if k < 1 or per_chain < k:
        raise ValueError(
            f"k={k} and items_per_chain={per_chain}: a list has at least one item, and each "
            "chain's list is at least as long as the merged one"
        )
    width = beam_width or default_beam_width(per_chain)
    merged: list[Merged | None] = [None] * len(prompts)
    texts = [[text.token_ids for text in own] for own in chains]
    for rows, whole, behind in engine.branches(prompts, texts, width):
        own = None if seen is None else [seen[row] for row in rows for _ in range(n_chains)]
        result = engine.search(whole, per_chain, width, own, view, prefilled=behind)
        shape = (len(rows), n_chains, per_chain)
        items, scores = result.items.reshape(shape), result.scores.reshape(shape)
        levels = result.level_log_probs.reshape(*shape, -1)
        proposed = items
        if exact:
            items = _candidates(items)
            scored = engine.score(whole, items.reshape(len(whole), -1), prefilled=behind)
            levels = scored.reshape(*items.shape, -1)
            scores = levels.astype(np.float64).sum(-1)
        for at, row in enumerate(rows):
            found = merge(items[at], scores[at], levels[at], engine.trie, k)
            holds = (found.items[:, None, None] == proposed[at]).any(-1)  # (items, chains)
            merged[row] = replace(found, n_proposed=holds.sum(-1).astype(np.int64))
    return [found for found in merged if found is not None]


def _candidates(items: IntArray) -> IntArray:
    """The items that any chain's beam holds, the same for all chains of a prompt.

    Args:
        items: of the beams, (U, C, n); −1 pads.

    Returns:
        (U, C, m); short ones repeat their last item, which `merge` counts once.
    """
    union = [np.unique(own[own >= 0]) for own in items]
    widest = max(map(len, union))
    padded = [np.pad(own, (0, widest - len(own)), mode="edge") for own in union]
    return np.repeat(np.stack(padded)[:, None], items.shape[1], axis=1)


def merge(
    items: npt.NDArray[np.integer],
    scores: npt.NDArray[np.floating],
    level_log_probs: npt.NDArray[np.floating],
    trie: SidTrie,
    k: int,
) -> Merged:
    """Merge the lists of C chains: logsumexp over the chains that hold an item, minus log C.

    Args:
        items: catalogue rows, (C, n); −1 pads. An item that a chain lists twice counts once.
        scores: log-probabilities given the chain, (C, n).
        level_log_probs: their summands, (C, n, L).
        trie: decides ties, by SID as the beam does.
        k: items kept.
    """
    n_chains = len(items)
    chain, place = np.nonzero(items >= 0)
    own = items[chain, place].astype(np.int64)
    _, once = np.unique(np.stack([chain, own]), axis=1, return_index=True)
    chain, place, own = chain[once], place[once], own[once]
    values = scores[chain, place].astype(np.float64)
    rows, group = np.unique(own, return_inverse=True)
    best = np.full(len(rows), -np.inf)
    np.maximum.at(best, group, values)
    total = np.zeros(len(rows))
    np.add.at(total, group, np.exp(values - best[group]))
    total = best + np.log(total) - np.log(n_chains)
    # Of each item the best chain; of equal ones the first.
    order = np.lexsort([chain, -values, group])
    first = order[np.unique(group[order], return_index=True)[1]]
    ranking = np.lexsort([trie.leaf_of_item[rows], -total])[:k]
    kept = first[ranking]
    return Merged(
        rows[ranking],
        total[ranking],
        level_log_probs[chain[kept], place[kept]].astype(np.float32),
        chain[kept].astype(np.int64),
        np.bincount(group, minlength=len(rows))[ranking].astype(np.int64),
    )


def read_lists(
    chains: Sequence[Sequence[SampledText]],
    merged: Sequence[Merged],
    histories: Sequence[Sequence[int]],
    reader: ChainReader,
    exact: bool,
    trained_on_target: bool | None,
) -> list[ReasonedList]:
    """Put lists and chains together; every chain is read and checked.

    Args:
        chains: of `sample_chains`.
        merged: of `search_with_chains`.
        histories: catalogue rows that each prompt showed.
        reader: of the run.
        exact: as `merged` was made.
        trained_on_target: as the run recorded it.
    """
    lists = []
    for texts, found, history in zip(chains, merged, histories, strict=True):
        sampled = read_texts(texts, history, reader)
        ids = tuple(reader.item_ids[int(item)] for item in found.items)
        lists.append(ReasonedList(ids, found, sampled, exact, trained_on_target))
    return lists


def read_texts(
    texts: Sequence[SampledText], history: Sequence[int], reader: ChainReader
) -> tuple[SampledChain, ...]:
    """The chains of one prompt, read and checked.

    Args:
        texts: of `sample_chains`.
        history: catalogue rows that the prompt showed.
        reader: of the run.
    """
    read = [reader.read(text.text, history) for text in texts]
    return tuple(
        SampledChain(text.text, text.token_ids, text.finish_reason, r.steps, r.unread, r.checks)
        for text, r in zip(texts, read, strict=True)
    )
