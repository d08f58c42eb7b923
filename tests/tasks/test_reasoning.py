"""The reasoning curriculum: slots by hand, true claims, and nothing of the target."""

from __future__ import annotations

import inspect

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.chains import STEP_TYPES, Chain
from genrec.tasks import reasoning
from genrec.tasks.attributes import AttributeIndex, item_attributes
from genrec.tasks.reasoning import (
    RATIONALE_ORIGIN,
    STEPS,
    TRAINED_ON_TARGET,
    chain_steps,
    reasoning_slots,
    step_texts,
)
from genrec.tasks.texts import written_renderer

CATALOG = pl.DataFrame(
    {
        "item_index": pl.Series(range(10), dtype=pl.Int32),
        "item_id": [f"i{n}" for n in range(10)],
        "title": [f"Thing <a_{n}>" for n in range(10)],
        "brand": ["Acme", "Acme", "Acme", "Zed", "Zed", None, None, None, None, None],
        "categories": [
            ["Tea"], ["Pots"], ["Cups"], ["Nail Polish"], ["Nail Art"], ["Solo"], ["Wool"],
            ["Wool"], [], [],
        ],
        "price": [None] * 10,
        "description": [None] * 10,
    },
    schema_overrides={"price": pl.Float64, "description": pl.String},
)  # fmt: skip
ATTRIBUTES = item_attributes(CATALOG, n_keywords=0)
INDEX = AttributeIndex.build(ATTRIBUTES, len(CATALOG))
RENDERER = written_renderer()
SIDS = pl.Series([f"<a_{n}><b_{n}>" for n in range(10)])


def slots(*rows: list[int]) -> pl.DataFrame:
    return reasoning_slots(pl.Series(rows, dtype=pl.List(pl.Int32)), INDEX)


def ids(n: int) -> pl.Series:
    return pl.Series([f"train-{i}" for i in range(n)])


def worded(table: pl.DataFrame, **more) -> pl.DataFrame:
    return step_texts(table, RENDERER, ids(len(table)), **(more or {"sids": SIDS}))


def test_slots_by_hand():
    row = slots([0, 5, 1, 2, 3, 4]).row(0, named=True)
    assert row == {
        "n_items": 6,
        # Acme: 3 · ln((3/6) / (3/10)) = 1.53; Zed: 2 · ln((2/6) / (2/10)) = 1.02.
        "preference_kind": "brand",
        "preference_value": "Acme",
        "preference_count": 3,
        "preference_lift": pytest.approx(5 / 3),
        "evidence_items": [2, 1, 0],
        # Of the newest four, 1 2 3 4: Zed 2 · ln(.5 / .2) = 1.83, Acme 2 · ln(.5 / .3) = 1.02.
        "intent_kind": "brand",
        "intent_value": "Zed",
        "intent_items": [4, 3],
        "query": "zed nail art acme",
        "kept_items": [0, 1, 2, 3, 4],
        "set_aside_items": [5],
    }


def test_a_history_that_says_nothing_has_empty_slots_and_no_text():
    table = slots([], [3], [8, 9], [0, 3, 5])
    for row in table.iter_rows(named=True):
        assert row["preference_kind"] is None and row["intent_value"] is None
        assert row["query"] is None and row["preference_lift"] is None
        assert row["evidence_items"] == [] == row["set_aside_items"]
    assert table["kept_items"].to_list() == [[], [3], [8, 9], [0, 3, 5]]
    assert worded(table).null_count().row(0) == (4,) * 5
    assert chain_steps({**table.row(0, named=True), **worded(table).row(0, named=True)}, SIDS) == ()
    assert reasoning_slots(pl.Series([], dtype=pl.List(pl.Int32)), INDEX).is_empty()


def test_evidence_is_bounded_and_kept_items_repeat_as_the_history_does():
    row = slots([0, 1, 0, 5, 2]).row(0, named=True)
    assert row["evidence_items"] == [2, 0, 1] and row["n_items"] == 4
    assert row["kept_items"] == [0, 1, 0, 2] and row["set_aside_items"] == [5]
    many = pl.DataFrame(
        [(i, "brand", "A") for i in range(6)], schema=ATTRIBUTES.schema, orient="row"
    )
    index = AttributeIndex.build(many, 30)
    row = reasoning_slots(pl.Series([[0, 1, 2, 3, 4, 5]]), index).row(0, named=True)
    assert row["evidence_items"] == [5, 4, 3, 2] and row["preference_count"] == 6


def test_texts_hold_the_slots():
    table = slots([0, 5, 1, 2, 3, 4], [6, 7])
    texts = worded(table)
    assert texts.columns == list(STEPS)
    first = texts.row(0, named=True)
    assert "".join(SIDS[i] for i in (2, 1, 0)) in first["evidence"]
    assert all(part in first["preference"] for part in ("the brand Acme", "3", "6", "1.7"))
    assert "the brand Zed" in first["intent"] and SIDS[4] + SIDS[3] in first["intent"]
    assert "zed nail art acme" in first["formulation"]
    assert SIDS[5] in first["rewriting"]
    assert "".join(SIDS[i] for i in range(5)) in first["rewriting"]
    second = texts.row(1, named=True)["rewriting"]
    assert SIDS[6] + SIDS[7] in second


def test_items_can_be_named_by_titles_which_are_escaped():
    texts = worded(slots([0, 5, 1, 2, 3, 4]), titles=CATALOG["title"])
    assert "“Thing ‹a_2›”, “Thing ‹a_1›” and “Thing ‹a_0›”" in texts["evidence"][0]
    assert not any("<" in text for text in texts.row(0))
    for names in ({}, {"sids": SIDS, "titles": CATALOG["title"]}):
        with pytest.raises(ValueError, match="one of the two"):
            step_texts(slots([0, 1]), RENDERER, ids(1), **names)


def test_the_wording_depends_on_row_id_seed_and_epoch_alone():
    table = slots(*[[0, 5, 1, 2, 3, 4]] * 8)
    texts = worded(table)
    assert texts["evidence"].n_unique() > 1
    assert texts.equals(step_texts(table, RENDERER, ids(8), sids=SIDS))
    assert not texts.equals(step_texts(table, RENDERER, ids(8), epoch=1, sids=SIDS))
    assert not texts.equals(step_texts(table, RENDERER, ids(8), seed=1, sids=SIDS))


histories = st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(histories)
def test_every_claim_holds_and_every_citation_is_in_the_history(rows):
    table = slots(*rows)
    named = {"categories": "category"}
    truth = {(CATALOG["item_id"][i], kind, value) for i, kind, value in ATTRIBUTES.iter_rows()}
    texts = worded(table).iter_rows(named=True)
    for items, row, text in zip(rows, table.iter_rows(named=True), texts, strict=True):
        seen = {CATALOG["item_id"][i] for i in items}
        steps = chain_steps({**row, **text}, CATALOG["item_id"])
        assert bool(steps) == (row["preference_kind"] is not None or row["query"] is not None)
        for step in steps:
            assert set(step.cited_item_ids) <= seen
            assert set(step.claimed_attributes) <= set(step.cited_item_ids)
            for item, claims in step.claimed_attributes.items():
                for name, value in claims.items():
                    values = value if isinstance(value, list) else [value]
                    assert all((item, named.get(name, name), v) in truth for v in values)
        kept, aside = row["kept_items"], row["set_aside_items"]
        assert sorted(kept + aside) == sorted(items) and not set(kept) & set(aside)
        assert kept == [i for i in items if i in set(kept)]


@settings(max_examples=60, deadline=None)
@given(histories, st.randoms(use_true_random=False))
def test_a_row_is_a_function_of_its_own_history(rows, random):
    table = slots(*rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    assert slots(*(rows[i] for i in order)).equals(table[order])
    for row, items in enumerate(rows):
        assert slots(items).equals(table[row])


@settings(max_examples=40, deadline=None)
@given(histories, st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_what_comes_after_the_history_changes_nothing(rows, later):
    """A user's sequence goes on in other ways: the prefix's slots and texts stay, byte for byte."""
    frame = pl.DataFrame({"items": [r + later for r in rows], "n": [len(r) for r in rows]})
    cut = frame.select(pl.col("items").list.head(pl.col("n")).cast(pl.List(pl.Int32)))["items"]
    table = reasoning_slots(cut, INDEX)
    assert table.equals(slots(*rows)) and worded(table).equals(worded(slots(*rows)))


def test_no_argument_can_carry_a_target():
    assert list(inspect.signature(reasoning_slots).parameters) == ["history", "index"]
    names = list(inspect.signature(step_texts).parameters)
    assert names == ["slots", "renderer", "row_ids", "seed", "epoch", "sids", "titles"]
    assert TRAINED_ON_TARGET is False and RATIONALE_ORIGIN == "template"


def test_blocks_of_rows_change_nothing(monkeypatch):
    rows = [[0, 5, 1, 2, 3, 4], [], [3, 4], [6, 7, 8], [1, 0]]
    whole = slots(*rows)
    monkeypatch.setattr(reasoning, "BLOCK_ROWS", 2)
    assert slots(*rows).equals(whole)


def test_the_steps_make_a_chain_that_survives_json():
    table = slots([0, 5, 1, 2, 3, 4])
    row = {**table.row(0, named=True), **worded(table).row(0, named=True)}
    steps = chain_steps(row, CATALOG["item_id"])
    assert [step.type for step in steps] == list(STEPS) and set(STEPS) <= set(STEP_TYPES)
    chain = Chain("train-0", "i9", 1, steps, RATIONALE_ORIGIN, TRAINED_ON_TARGET)
    assert Chain.from_json(chain.to_json()) == chain
    assert chain.step("preference").claimed_attributes == {
        item: {"brand": "Acme"} for item in ("i2", "i1", "i0")
    }
    assert chain.step("preference").measured["count"] == 3
    assert chain.step("rewriting").measured == {"set_aside_item_ids": ["i5"]}
