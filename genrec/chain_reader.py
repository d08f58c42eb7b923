"""Reads what a model wrote as a chain: typed steps, cited items, claims, and whether they are true.

A model that learned the reasoning curriculum writes the sentences of ``prompts/written/step_*``.
They are read back by those templates: what stands in a field's place is the citation or the claim.
Text that is no step is kept apart, and nothing is guessed from it. Whether what was read is true is
looked up in the history and in the catalogue's attributes; a chain that fails is kept, and flagged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec.chains import Check, ItemId, Step
from genrec.columns import ITEM_INDEX
from genrec.prompts import PromptRenderer
from genrec.semantic_ids import SemanticIds
from genrec.tasks.attributes import CATEGORY, KIND, KINDS, MAX_ITEMS, VALUE, item_attributes
from genrec.tasks.reasoning import CLAIM_NAMES, STEPS
from genrec.tasks.texts import run_wording, written_renderer

CHECKS = ("steps_read", "citations_exist", "citations_in_history", "claims_true", "counts_true")
_SID = r"(?:<[a-z]+_\d+>)+"
_SPACED = re.compile(r"(?<=>)\s+(?=[.,:;])")  # some tokenizers decode a space behind added tokens
_FIELDS = {
    "items": _SID, "kept": _SID, "set_aside": _SID, "count": r"\d{1,9}", "total": r"\d{1,9}",
    "lift": r"\d{1,9}(?:\.\d{1,9})?",
}  # fmt: skip
_OPEN_FIELDS = ("attribute", "query", "value")  # any text


@dataclass(frozen=True)
class _Sentence:
    """What one template writes: `head`, the text of `open_field`, `tail`; or `head` alone.

    Only the end of an open field is ambiguous: "the brand Dr. Bach." may end behind "Dr.".
    """

    head: re.Pattern[str]
    open_field: str | None
    tail: re.Pattern[str]

    def found(self, text: str, at: int) -> Iterator[_Found]:
        """The first place from `at` on where it stands, with each of its possible ends."""
        for head in self.head.finditer(text, at):
            ends = [self.tail.match(text, head.end())]
            if self.open_field is not None:
                ends = [*self.tail.finditer(text, head.end() + 1)]
            for tail in ends:
                if tail is not None:
                    fields = {**head.groupdict(), **tail.groupdict()}
                    if self.open_field is not None:
                        fields[self.open_field] = text[head.end() : tail.start()]
                    yield _Found(head.start(), tail.end(), text[head.start() : tail.end()], fields)
            if any(ends):
                return


@dataclass(frozen=True)
class _Found:
    """A step in a text: from where to where, and what its template's fields hold."""

    start: int
    end: int
    text: str
    fields: Mapping[str, str]


@dataclass(frozen=True)
class ReadChain:
    """What a text holds: its steps, the rest of it, and the outcomes of `CHECKS`."""

    steps: tuple[Step, ...]
    unread: tuple[str, ...]
    checks: tuple[Check, ...]


class ChainReader:
    """Reads chains of one run.

    Args:
        semantic_ids: the SID map.
        attributes: of `genrec.tasks.attributes.item_attributes`, by item.
        wording: the templates that steps are worded by; default: genrec's own.

    Raises:
        ValueError: a step's template has logic in it, or a field that no step has.
    """

    def __init__(
        self,
        semantic_ids: SemanticIds,
        attributes: pl.DataFrame,
        wording: PromptRenderer | None = None,
    ) -> None:
        wording = wording or written_renderer()
        self.item_ids = semantic_ids.item_ids
        self._n_levels = semantic_ids.n_levels
        self._row_of_sid = {sid: row for row, sid in enumerate(semantic_ids.sids().to_list())}
        self._attributes = attributes
        index = attributes[ITEM_INDEX].to_numpy()
        self._starts = np.searchsorted(index, np.arange(semantic_ids.n_items + 1))
        self._sentences = {
            step: [
                _sentence(wording, name)
                for family in ((step, "rewriting_nothing") if step == STEPS[-1] else (step,))
                for name in wording.names(f"step_{family}")
            ]
            for step in STEPS
        }
        self._phrases = {
            kind: [_sentence(wording, name) for name in wording.names(f"attribute_{kind}")]
            for kind in KINDS
        }

    @classmethod
    def of_run(cls, semantic_ids: SemanticIds, catalog: pl.DataFrame, prompts: Path) -> ChainReader:
        """The reader of a run's chains.

        Args:
            semantic_ids: the SID map.
            catalog: ``catalog.parquet``.
            prompts: the run's copy of the templates, whose wording is read back.
        """
        return cls(semantic_ids, item_attributes(catalog), run_wording(prompts))

    def read(self, text: str, history: Sequence[int]) -> ReadChain:
        """Read one chain.

        Args:
            text: what the model wrote.
            history: catalogue rows that its prompt showed, oldest first.

        Returns:
            Steps in the order of the curriculum. An item that does not exist is not cited by any
            step. The checks, each None where the text gives nothing to check:

            - steps_read: share of the curriculum's steps found; passed if all are there, in order,
              and nothing else is;
            - citations_exist: share of the SIDs in the text, steps or not, that are items;
            - citations_in_history: share of the cited items that the history holds;
            - claims_true: share of the claimed attributes that the catalogue supports;
            - counts_true: whether "… of … items" is right for this history, 0 or 1.
        """
        text = _SPACED.sub("", text)
        found, unread = self._matches(text)
        steps = [self._step(step, at, found) for step, at in found.items()]
        mentioned = [row for sid in re.findall(_SID, text) for row in self._rows(sid)]
        cited = {row for row in mentioned if row is not None}
        own = set(history)
        checks = (
            Check("steps_read", len(steps) / len(STEPS), len(steps) == len(STEPS) and not unread),
            _share("citations_exist", [row is not None for row in mentioned]),
            _share("citations_in_history", [row in own for row in cited]),
            _share("claims_true", self._claims_true(found)),
            _share("counts_true", self._counts_true(found, history)),
        )
        return ReadChain(tuple(steps), tuple(unread), checks)

    def _matches(self, text: str) -> tuple[dict[str, _Found], list[str]]:
        """Where each step stands, and what lies between."""
        found: dict[str, _Found] = {}
        unread, at = [], 0
        for number, step in enumerate(STEPS):
            candidates = [f for s in self._sentences[step] for f in s.found(text, at)]
            if candidates:
                start = min(f.start for f in candidates)
                candidates = [f for f in candidates if f.start == start]
                # The end behind which the chain goes on as it should, else the first one.
                fitting = [f for f in candidates if self._goes_on(text, f.end, number)]
                found[step] = (fitting or candidates)[0]
                unread.append(text[at:start])
                at = found[step].end
        unread.append(text[at:])
        return found, [part.strip() for part in unread if part.strip()]

    def _goes_on(self, text: str, at: int, number: int) -> bool:
        """Whether a later step than that one begins at a place, or nothing but space is left."""
        at += len(text) - at - len(text[at:].lstrip())
        later = (s for step in STEPS[number + 1 :] for s in self._sentences[step])
        return at == len(text) or any(s.head.match(text, at) for s in later)

    def _step(self, step: str, own: _Found, found: Mapping[str, _Found]) -> Step:
        fields = own.fields
        cited = self._ids(fields.get("items") or fields.get("kept"))
        measured: dict[str, Any] = {}
        if step == "preference":  # names no items: it speaks of the evidence's
            cited = self._ids(found["evidence"].fields["items"]) if "evidence" in found else ()
            # What the text says; what is true is in the check.
            measured = {
                "said_count": int(fields["count"]),
                "said_items": int(fields["total"]),
                "said_lift": float(fields["lift"]),
            }
        elif step == "formulation":
            measured = {"query": fields["query"]}
        elif step == "rewriting":
            aside = self._rows(fields.get("set_aside") or "")
            named = [self.item_ids[row] for row in aside if row is not None]
            measured = {"set_aside_item_ids": named}
        claims: dict[ItemId, dict[str, str | list[str]]] = {}
        if "attribute" in fields and (claim_made := self._attribute(fields["attribute"])):
            kind, value = claim_made
            claim = [value] if kind == CATEGORY else value
            claims = {item: {CLAIM_NAMES.get(kind, kind): claim} for item in cited}
        return Step(step, own.text, cited, claims, measured)

    def _rows(self, sids: str) -> list[int | None]:
        """Catalogue rows of a run of SID tokens, None for what is no item."""
        tokens = re.findall(r"<[a-z]+_\d+>", sids)
        runs = range(0, len(tokens), self._n_levels)
        return [self._row_of_sid.get("".join(tokens[i : i + self._n_levels])) for i in runs]

    def _ids(self, sids: str | None) -> tuple[ItemId, ...]:
        rows = [row for row in self._rows(sids or "") if row is not None]
        return tuple(dict.fromkeys(self.item_ids[row] for row in rows))

    def _attribute(self, phrase: str) -> tuple[str, str] | None:
        """Kind and value of "the brand Acme"."""
        for kind, sentences in self._phrases.items():
            for sentence in sentences:
                for own in sentence.found(phrase, 0):
                    if own.text == phrase:
                        return kind, own.fields["value"]
        return None

    def _has(self, row: int, kind: str, value: str) -> bool:
        own = self._attributes[self._starts[row] : self._starts[row + 1]]
        return bool(((own[KIND] == kind) & (own[VALUE] == value)).any())

    def _claims_true(self, found: Mapping[str, _Found]) -> list[bool]:
        """Of the preference and the intent, item by item; an unknown attribute is not true."""
        true = []
        for step, spoken_of in (("preference", "evidence"), ("intent", "intent")):
            if step in found and spoken_of in found:
                named = self._attribute(found[step].fields["attribute"])
                rows = [
                    row for row in self._rows(found[spoken_of].fields["items"]) if row is not None
                ]
                true += [named is not None and self._has(row, *named) for row in rows]
        return true

    def _counts_true(self, found: Mapping[str, _Found], history: Sequence[int]) -> list[bool]:
        if "preference" not in found:
            return []
        said = found["preference"].fields
        named = self._attribute(said["attribute"])
        looked_at = set(list(history)[-MAX_ITEMS:])
        having = sum(named is not None and self._has(row, *named) for row in looked_at)
        return [(int(said["count"]), int(said["total"])) == (having, len(looked_at))]


def _share(name: str, outcomes: Sequence[bool]) -> Check:
    if not outcomes:
        return Check(name, None)
    share = sum(outcomes) / len(outcomes)
    return Check(name, share, share == 1)


def _sentence(wording: PromptRenderer, template: str) -> _Sentence:
    """Regular expressions of what a template writes, with a group per field."""
    fields = wording.fields(template)
    known = {*_FIELDS, *_OPEN_FIELDS}
    if fields is None or not fields <= known:
        raise ValueError(
            f"template {template!r} can't be read back: a step's template only inserts "
            f"{', '.join(sorted(known))}, without logic"
        )
    # Rendered with marks in the fields' places: what lies between two marks is the template's own.
    parts = wording.render(template, sids={f: f"\x00{f}\x00" for f in fields}).split("\x00")
    order = parts[1::2]
    opened = [field for field in order if field in _OPEN_FIELDS]
    if len(opened) > 1 or len(set(order)) < len(order):
        raise ValueError(
            f"template {template!r} can't be read back: it inserts {', '.join(order)}; each field "
            f"may come once, and one of {', '.join(_OPEN_FIELDS)} at most"
        )
    halves, here = ["", ""], 0
    for i, part in enumerate(parts):
        if i % 2 == 0:
            halves[here] += re.escape(part)
        elif part in _OPEN_FIELDS:
            here = 1
        else:
            halves[here] += f"(?P<{part}>{_FIELDS[part]})"
    # A sentence ends where a word does.
    tail = re.compile(halves[1] + r"(?=\s|$)", re.DOTALL)
    return _Sentence(re.compile(halves[0], re.DOTALL), opened[0] if opened else None, tail)
