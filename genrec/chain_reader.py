"""Reads what a model wrote as a chain: typed steps, cited items, claims, and whether they are true.

A model that learned the reasoning curriculum writes the sentences of ``prompts/written/step_*``.
They are read back by those templates: what stands in a field's place is the citation or the claim.
Text that is no step is kept apart, and nothing is guessed from it. Whether what was read is true is
looked up in the history and in the catalogue's attributes; a chain that fails is kept, and flagged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from genrec.chains import Check, ItemId, Step
from genrec.columns import ITEM_INDEX
from genrec.prompts import PromptRenderer
from genrec.semantic_ids import SemanticIds
from genrec.tasks.attributes import CATEGORY, KIND, KINDS, MAX_ITEMS, VALUE
from genrec.tasks.reasoning import CLAIM_NAMES, STEPS
from genrec.tasks.texts import written_renderer

CHECKS = ("steps_read", "citations_exist", "citations_in_history", "claims_true", "counts_true")
_SID = r"(?:<[a-z]+_\d+>)+"
_FIELDS = {
    "items": _SID, "kept": _SID, "set_aside": _SID, "count": r"\d{1,9}", "total": r"\d{1,9}",
    "lift": r"\d{1,9}(?:\.\d{1,9})?", "attribute": ".+?", "query": ".+?", "value": ".+",
}  # fmt: skip


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
        self._patterns = {
            step: [
                re.compile(_pattern(wording, name) + r"(?=\s|$)", re.DOTALL)
                for family in ((step, "rewriting_nothing") if step == STEPS[-1] else (step,))
                for name in wording.names(f"step_{family}")
            ]
            for step in STEPS
        }
        self._phrases = {
            kind: [
                re.compile(_pattern(wording, name), re.DOTALL)
                for name in wording.names(f"attribute_{kind}")
            ]
            for kind in KINDS
        }

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
        found, unread = self._matches(text)
        steps = [self._step(step, match, found) for step, match in found.items()]
        mentioned = [row for sid in re.findall(_SID, text) for row in self._rows(sid)]
        cited = {row for row in mentioned if row is not None}
        checks = (
            Check("steps_read", len(steps) / len(STEPS), len(steps) == len(STEPS) and not unread),
            _share("citations_exist", [row is not None for row in mentioned]),
            _share("citations_in_history", [row in set(history) for row in cited]),
            _share("claims_true", self._claims_true(found)),
            _share("counts_true", self._counts_true(found, history)),
        )
        return ReadChain(tuple(steps), tuple(unread), checks)

    def _matches(self, text: str) -> tuple[dict[str, re.Match[str]], list[str]]:
        """Where each step stands, and what lies between."""
        found: dict[str, re.Match[str]] = {}
        unread, at = [], 0
        for step in STEPS:
            matches = [m for p in self._patterns[step] if (m := p.search(text, at))]
            if matches:
                found[step] = min(matches, key=lambda m: (m.start(), -m.end()))
                unread.append(text[at : found[step].start()])
                at = found[step].end()
        unread.append(text[at:])
        return found, [part.strip() for part in unread if part.strip()]

    def _step(self, step: str, match: re.Match[str], found: Mapping[str, re.Match[str]]) -> Step:
        fields = match.groupdict()
        cited = self._ids(fields.get("items") or fields.get("kept"))
        measured: dict[str, Any] = {}
        if step == "preference":  # names no items: it speaks of the evidence's
            cited = self._ids(found["evidence"]["items"]) if "evidence" in found else ()
            # What the text says; what is true is in the check.
            measured = {
                "said_count": int(fields["count"]),
                "said_items": int(fields["total"]),
                "said_lift": float(fields["lift"]),
            }
        elif step == "formulation":
            measured = {"query": fields["query"]}
        elif step == "rewriting":
            measured = {"set_aside_item_ids": list(self._ids(fields.get("set_aside")))}
        claims: dict[ItemId, dict[str, str | list[str]]] = {}
        if "attribute" in fields and (named := self._attribute(fields["attribute"])):
            kind, value = named
            claim = [value] if kind == CATEGORY else value
            claims = {item: {CLAIM_NAMES.get(kind, kind): claim} for item in cited}
        return Step(step, match.group(), cited, claims, measured)

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
        for kind, patterns in self._phrases.items():
            for pattern in patterns:
                if match := pattern.fullmatch(phrase):
                    return kind, match["value"]
        return None

    def _has(self, row: int, kind: str, value: str) -> bool:
        own = self._attributes[self._starts[row] : self._starts[row + 1]]
        return bool(((own[KIND] == kind) & (own[VALUE] == value)).any())

    def _claims_true(self, found: Mapping[str, re.Match[str]]) -> list[bool]:
        """Of the preference and the intent, item by item; an unknown attribute is not true."""
        true = []
        for step, spoken_of in (("preference", "evidence"), ("intent", "intent")):
            if step in found and spoken_of in found:
                named = self._attribute(found[step]["attribute"])
                rows = [row for row in self._rows(found[spoken_of]["items"]) if row is not None]
                true += [named is not None and self._has(row, *named) for row in rows]
        return true

    def _counts_true(
        self, found: Mapping[str, re.Match[str]], history: Sequence[int]
    ) -> list[bool]:
        if "preference" not in found:
            return []
        match = found["preference"]
        named = self._attribute(match["attribute"])
        looked_at = set(list(history)[-MAX_ITEMS:])
        having = sum(named is not None and self._has(row, *named) for row in looked_at)
        return [(int(match["count"]), int(match["total"])) == (having, len(looked_at))]


def _share(name: str, outcomes: Sequence[bool]) -> Check:
    if not outcomes:
        return Check(name, None)
    share = sum(outcomes) / len(outcomes)
    return Check(name, share, share == 1)


def _pattern(wording: PromptRenderer, template: str) -> str:
    """Regular expression of what a template writes, with a group per field."""
    fields = wording.fields(template)
    if fields is None or not fields <= _FIELDS.keys():
        raise ValueError(
            f"template {template!r} can't be read back: a step's template only inserts "
            f"{', '.join(_FIELDS)}, without logic"
        )
    # Rendered with marks in the fields' places: what lies between two marks is the template's own.
    parts = wording.render(template, sids={f: f"\x00{f}\x00" for f in fields}).split("\x00")
    pattern = re.escape(parts[0])
    for i in range(1, len(parts), 2):
        field = parts[i]
        again = field in parts[1:i:2]
        pattern += f"(?P={field})" if again else f"(?P<{field}>{_FIELDS[field]})"
        pattern += re.escape(parts[i + 1])
    return pattern
