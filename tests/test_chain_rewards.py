"""Rewards of chains by hand."""

from __future__ import annotations

import pytest

from genrec.chain_rewards import CHAIN_REWARDS, citations_reward, claims_reward, format_reward
from genrec.chains import Check
from genrec.reasoning import SampledChain


def chain(reason: str = "stop", **checks: tuple[float | None, bool | None]) -> SampledChain:
    """A chain of which the reader found this; what isn't named was not defined."""
    names = ("steps_read", "citations_exist", "citations_in_history", "claims_true")
    found = tuple(Check(name, *checks.get(name, (None, None))) for name in names)
    return SampledChain("text", (1, 2), reason, (), (), found)


def test_form():
    whole, amid_noise = {"steps_read": (1.0, True)}, {"steps_read": (1.0, False)}
    got = format_reward(
        chain=[
            chain(**whole),
            chain("length", **whole),
            chain("eos", **whole),
            chain(**amid_noise),
            chain(steps_read=(0.6, False)),
            chain(steps_read=(0.0, False)),
        ]
    )
    assert got == pytest.approx([1, 0, 0, 0.5, 0.3, 0])


def test_citations():
    got = citations_reward(
        chain=[
            chain(citations_exist=(1.0, True), citations_in_history=(1.0, True)),
            # Of four SIDs three exist, and of the two items among them one is the user's.
            chain(citations_exist=(0.75, False), citations_in_history=(0.5, False)),
            chain(citations_exist=(0.0, False)),  # nothing that exists
            chain(),  # cites nothing
        ]
    )
    assert got == pytest.approx([1, 0.375, 0, 0])


def test_claims():
    got = claims_reward(chain=[chain(claims_true=(0.75, False)), chain(claims_true=(1.0, True)),
        chain()])  # fmt: skip
    assert got == [0.75, 1.0, 0.0]


def test_rewards_of_read_texts(tiny):
    """The same from texts, as the reader reads them."""
    from genrec.chain_reader import ChainReader
    from genrec.decoding.free_text import SampledText
    from genrec.reasoning import read_texts
    from genrec.tasks.attributes import item_attributes

    shop = tiny.shop()
    sids = shop.semantic_ids.sids().to_list()
    reader = ChainReader(shop.semantic_ids, item_attributes(shop.catalog))
    free = next(f"<a_{a}><b_{b}><c_{c}>" for a in range(4) for b in range(4) for c in range(4)
        if f"<a_{a}><b_{b}><c_{c}>" not in sids)  # fmt: skip
    evidence = f"Evidence from the history: {sids[0]}{sids[2]}."
    # Item 0 is of kind 0, and so is item 2.
    true = "They share the category “Kind 0”: 2 of 2 items have it, 2.0 times what the catalogue"
    true += " would give."
    false = true.replace("Kind 0", "Kind 1")
    texts = [
        f"{evidence} {true}",
        f"{evidence} {false}",
        f"Evidence from the history: {sids[0]}{sids[5]}{free}.",  # not the user's; no item
        evidence.replace(sids[2], sids[0]),  # the same one twice
    ]
    sampled = [SampledText((1,), text, "stop") for text in texts]
    read = list(read_texts(sampled, [0, 2], reader))
    assert format_reward(chain=read) == pytest.approx([0.2, 0.2, 0.1, 0.1])
    assert citations_reward(chain=read) == pytest.approx([1, 1, 2 / 3 * 1 / 2, 1])
    assert claims_reward(chain=read) == [1.0, 0.0, 0.0, 0.0]


def test_names_are_those_of_the_settings():
    assert set(CHAIN_REWARDS) == {"format", "citations", "claims"}
    assert [f.__name__ for f in CHAIN_REWARDS.values()] == [
        "format_reward", "citations_reward", "claims_reward",
    ]  # fmt: skip
