"""What is measured of chains, and the rules that a run declares about it beforehand.

A rule is a sentence like ``comprehensiveness - comprehensiveness_random > 0``: it stands in the
config before the run, and the report shows every one. Over an interval it is "met" if the whole
interval satisfies it, "not met" if no end of it does, and "undecided" between.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from genrec.evaluation.significance import Interval

# Ways to cite that look neither at the item nor at the chain; see `genrec.explain.erasure`.
CONTROLS = ("random", "newest", "popular", "other_chain")
# Figure -> 1 if more of it is better, −1 if less is.
FIGURES = {
    "citations_in_history": 1,
    "attributes_match": 1,
    "evidence_agreement": 1,
    "comprehensiveness": 1,
    "sufficiency": -1,
    "stability": 1,
    "chain_support": 1,
}
TRUNCATED = "truncated"  # a control of `chain_support` alone: the first half of the chain
ALL_CONTROLS = (*CONTROLS, TRUNCATED)
VERDICTS = ("citations_in_history", "attributes_match", "score_difference", "target_leak",
            "contradictions")  # fmt: skip
# Of chains that a model wrote; the first five are those of `genrec.chain_reader`.
WRITTEN_VERDICTS = ("steps_read", "citations_exist", "citations_in_history", "claims_true",
                    "counts_true", "target_leak", "contradictions")  # fmt: skip
_WITH_CONTROLS = (f"{figure}_{name}" for figure in FIGURES for name in ALL_CONTROLS)
NAMES = tuple(dict.fromkeys((*VERDICTS, *WRITTEN_VERDICTS, *FIGURES, *_WITH_CONTROLS)))
THRESHOLDS = [
    "citations_in_history >= 1",
    "attributes_match >= 1",
    "score_difference <= 0.001",
    "target_leak <= 0",
    "contradictions <= 0",
    *(f"comprehensiveness - comprehensiveness_{name} > 0" for name in CONTROLS),
    *(f"sufficiency_{name} - sufficiency > 0" for name in CONTROLS),
]
WRITTEN_THRESHOLDS = [
    *(f"{name} >= 0.95" for name in WRITTEN_VERDICTS[:5]),
    "target_leak <= 0.01",
    "contradictions <= 0.01",
    *(f"comprehensiveness - comprehensiveness_{name} > 0" for name in CONTROLS),
    *(f"sufficiency_{name} - sufficiency > 0" for name in CONTROLS),
    "chain_support > 0",
    "chain_support - chain_support_other_chain > 0",
]
_NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"
_RULE = re.compile(rf"\s*(\w+)(?:\s+-\s+(\w+))?\s*(<=|>=|<|>)\s*({_NUMBER})\s*")


@dataclass(frozen=True)
class Threshold:
    """One rule: ``left [- right] op bound``, about means over chains."""

    rule: str
    left: str
    right: str | None
    op: str
    bound: float

    @classmethod
    def parse(cls, rule: str) -> Threshold:
        """Read a rule.

        Raises:
            ValueError: it is none, or names what isn't measured.
        """
        found = _RULE.fullmatch(rule)
        if found is None:
            raise ValueError(
                f"threshold {rule!r} is no rule; write e.g. 'citations_in_history >= 1' or "
                "'comprehensiveness - comprehensiveness_random > 0'"
            )
        left, right, op, bound = found.groups()
        for name in (left, right):
            if name is not None and name not in NAMES:
                raise ValueError(
                    f"threshold {rule!r} names {name!r}, which isn't measured; choose from "
                    f"{', '.join(NAMES)}"
                )
        return cls(rule, left, right, op, float(bound))

    def holds(self, value: float) -> bool:
        """Whether one value satisfies it."""
        compared = {
            "<": value < self.bound,
            "<=": value <= self.bound,
            ">": value > self.bound,
            ">=": value >= self.bound,
        }
        return compared[self.op]

    def verdict(self, measured: Interval | None) -> str:
        """met, not met, undecided; "not measured" where nothing was."""
        if measured is None or measured.low is None or measured.high is None:
            return "not measured"
        ends = {self.holds(measured.low), self.holds(measured.high)}
        return "undecided" if len(ends) == 2 else "met" if ends == {True} else "not met"
