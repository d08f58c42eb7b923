"""Chains: why an item is in a list, as typed steps whose every claim can be looked up.

A chain belongs to one recommended item, not to a list. Each step cites items of the user's history
by id, claims catalogue attributes by item, and carries the values that were measured for it.
`rationale_origin` says where the wording came from: written by the model before the decision,
after it, or filled into a template.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genrec.artifacts import write_text

STEP_TYPES = (
    "evidence",
    "shared_attributes",
    "preference",
    "intent",
    "formulation",
    "rewriting",
    "decision",
    "set_aside",
    "counterfactual",
)
ORIGINS = ("before", "after", "template")

ItemId = int | str
Value = None | bool | int | float | str | list[Any] | dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        type: one of `STEP_TYPES`.
        text: what a reader sees.
        cited_item_ids: history items that the step rests on, in the order of the text.
        claimed_attributes: item id -> {attribute: value}; a list value claims each of its entries.
        measured: numbers behind the text, JSON values by name.

    Raises:
        ValueError: unknown type, no text, or a value that JSON can't hold exactly.
    """

    type: str
    text: str
    cited_item_ids: tuple[ItemId, ...] = ()
    claimed_attributes: Mapping[ItemId, Mapping[str, str | list[str]]] = field(default_factory=dict)
    measured: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the type, the text, the ids and the values."""
        if self.type not in STEP_TYPES:
            raise ValueError(f"step type {self.type!r} is not one of {', '.join(STEP_TYPES)}")
        if not isinstance(self.text, str) or not self.text.strip():
            raise ValueError(f"a step of type {self.type!r} has no text; say what was found")
        for item in (*self.cited_item_ids, *self.claimed_attributes):
            _check_item_id(item)
        _check_value(dict(self.measured), f"measured of step {self.type!r}")

    def to_json(self) -> dict[str, Any]:
        """JSON form; item ids keep their type, so attributes are a list and not an object."""
        claims = self.claimed_attributes.items()
        return {
            "type": self.type,
            "text": self.text,
            "cited_item_ids": list(self.cited_item_ids),
            "claimed_attributes": [{"item_id": i, "attributes": dict(a)} for i, a in claims],
            "measured": dict(self.measured),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Step:
        """Read what `to_json` wrote."""
        _check_keys(value, ("type", "text", *_STEP_LISTS), "step")
        claims = {claim["item_id"]: claim["attributes"] for claim in value["claimed_attributes"]}
        return cls(
            value["type"], value["text"], tuple(value["cited_item_ids"]), claims, value["measured"]
        )


_STEP_LISTS = ("cited_item_ids", "claimed_attributes", "measured")


@dataclass(frozen=True)
class Check:
    """Outcome of one check of a chain.

    Attributes:
        name: what was checked.
        value: the measured value; None where the check is not defined for this chain.
        passed: the verdict, None for a measurement that has no threshold.
    """

    name: str
    value: float | None
    passed: bool | None = None


@dataclass(frozen=True)
class Chain:
    """Why one item is in one list.

    Attributes:
        row_id: the split row that the list answers.
        item_id: the recommended item.
        rank: its place in the list, from 1.
        steps: in reading order.
        rationale_origin: "before" or "after" the decision by a model, or "template".
        trained_on_target: whether the chains that the writer learned from saw the answer.
        checks: outcomes, by name.

    Raises:
        ValueError: no steps, an unknown origin, a rank below 1, or two checks of one name.
    """

    row_id: str
    item_id: ItemId
    rank: int
    steps: tuple[Step, ...]
    rationale_origin: str
    trained_on_target: bool
    checks: tuple[Check, ...] = ()

    def __post_init__(self) -> None:
        """Check the invariants."""
        _check_item_id(self.item_id)
        if self.rationale_origin not in ORIGINS:
            raise ValueError(
                f"rationale_origin={self.rationale_origin!r} is not one of {', '.join(ORIGINS)}"
            )
        if not isinstance(self.trained_on_target, bool):
            raise ValueError(f"trained_on_target={self.trained_on_target!r} must be true or false")
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"rank={self.rank!r} must be a whole number of at least 1")
        if not self.steps:
            raise ValueError(f"the chain of {self.item_id!r} in {self.row_id} has no steps")
        names = [check.name for check in self.checks]
        if len(set(names)) < len(names):
            raise ValueError(f"checks {names} of one chain must have different names")

    def step(self, kind: str) -> Step | None:
        """The first step of a type, None if the chain has none."""
        return next((step for step in self.steps if step.type == kind), None)

    def check(self, name: str) -> Check | None:
        """A check by name, None if it was not made."""
        return next((check for check in self.checks if check.name == name), None)

    @property
    def cited_item_ids(self) -> tuple[ItemId, ...]:
        """All cited items, each once, in the order of the steps."""
        return tuple(dict.fromkeys(i for step in self.steps for i in step.cited_item_ids))

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "row_id": self.row_id,
            "item_id": self.item_id,
            "rank": self.rank,
            "rationale_origin": self.rationale_origin,
            "trained_on_target": self.trained_on_target,
            "steps": [step.to_json() for step in self.steps],
            "checks": [{"name": c.name, "value": c.value, "passed": c.passed} for c in self.checks],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Chain:
        """Read what `to_json` wrote.

        Raises:
            ValueError: a field is missing or unknown, or holds what a chain can't.
        """
        fields = ("row_id", "item_id", "rank", "rationale_origin", "trained_on_target")
        _check_keys(value, (*fields, "steps", "checks"), "chain")
        return cls(
            steps=tuple(Step.from_json(step) for step in value["steps"]),
            checks=tuple(Check(**check) for check in value["checks"]),
            **{name: value[name] for name in fields},
        )


def write_chains(path: Path | str, chains: Iterable[Chain]) -> None:
    """Write chains as JSON Lines, atomically."""
    lines = [json.dumps(c.to_json(), ensure_ascii=False, allow_nan=False) for c in chains]
    write_text(path, "".join(line + "\n" for line in lines))


def read_chains(path: Path | str) -> list[Chain]:
    """Read chains.

    Raises:
        ValueError: a line is no chain; names the file and the line.
    """
    chains = []
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                chains.append(Chain.from_json(json.loads(line)))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}, line {number} is no chain: {error}") from error
    return chains


def _check_item_id(item: object) -> None:
    if isinstance(item, bool) or not isinstance(item, int | str):
        raise ValueError(f"item id {item!r} must be a string or an integer")


def _check_value(value: object, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} holds {value}; leave out what was not measured")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_value(inner, f"{where}[{key!r}]")
    elif isinstance(value, list):
        for inner in value:
            _check_value(inner, where)
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise ValueError(f"{where} holds a {type(value).__name__}; use plain JSON values")


def _check_keys(value: Mapping[str, Any], names: Iterable[str], what: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"a {what} is an object, not a {type(value).__name__}")
    missing, unknown = set(names) - set(value), set(value) - set(names)
    if missing or unknown:
        raise ValueError(
            f"{what} lacks {sorted(missing)} and has unknown {sorted(unknown)}; "
            f"its fields are {', '.join(names)}"
        )
