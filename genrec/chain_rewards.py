"""Verifiable rewards of chains, for reasoning mode: form, citations and claims.

Plain functions in TRL's signature. They read the column `chain`, which the trainer adds: each
completion's chain with what `genrec.chain_reader` made of it. Completions that share a chain get
the same values, so such a reward moves the chain's tokens alone (see
`genrec.advantages.tree_advantages`).

What they pay for is that a chain is well-formed and true of the history and the catalogue. None of
them says that the reasoning is good or led to the item: keep a reward of the item beside them.
"""

from __future__ import annotations

from typing import Any

from genrec.reasoning import SampledChain

CHAIN = "chain"


def format_reward(chain: list[SampledChain], **kwargs: Any) -> list[float]:
    """1 for a chain that is all steps, in order, nothing else, and that the model ended itself.

    0 where the marker wasn't written (the chain ran into its limit, or ended before it). Else, with
    s of the 5 steps of the curriculum read in order: 1 if s = 5 and nothing else is in the text,
    and (s / 5) / 2 otherwise.

    Failure mode: form alone, so the same five sentences about anything earn it all, and it pays for
    chains short enough to end before `max_chain_tokens`. Where the model was trained well it is 1
    everywhere and teaches nothing.

    Args:
        chain: of each completion.
        **kwargs: other columns, unused.
    """
    return [
        0.0
        if own.finish_reason != "stop"
        else 1.0
        if _passed(own)
        else _value(own, "steps_read") / 2
        for own in chain
    ]


def citations_reward(chain: list[SampledChain], **kwargs: Any) -> list[float]:
    """How many citations are of items in the history: existing / cited · own / existing.

    The share of the SIDs in the text, steps or not, that are items, times the share of the distinct
    items among them that the history holds. What doesn't exist counts as 0, and so does a chain
    that cites nothing.

    Failure mode: one true citation is enough: a chain that names the same item of the history again
    and again, or a single one, earns 1. It says nothing of whether the cited items matter.

    Args:
        chain: of each completion.
        **kwargs: other columns, unused.
    """
    return [_value(own, "citations_exist") * _value(own, "citations_in_history") for own in chain]


def claims_reward(chain: list[SampledChain], **kwargs: Any) -> list[float]:
    """The share of the claimed attributes that the catalogue supports, item by item.

    0 for a chain that claims nothing that could be looked up.

    Failure mode: safe claims. An attribute that nearly every item has is always true and says
    nothing, and one claim is as good as ten. Claims about items that don't exist aren't counted:
    the reward of citations is for those.

    Args:
        chain: of each completion.
        **kwargs: other columns, unused.
    """
    return [_value(own, "claims_true") for own in chain]


CHAIN_REWARDS = {"format": format_reward, "citations": citations_reward, "claims": claims_reward}


def _check(chain: SampledChain, name: str) -> Any:
    return next(check for check in chain.checks if check.name == name)


def _value(chain: SampledChain, name: str) -> float:
    value = _check(chain, name).value
    return 0.0 if value is None else float(value)


def _passed(chain: SampledChain) -> bool:
    return bool(_check(chain, "steps_read").passed)
