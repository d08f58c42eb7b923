"""Reading chains back: what templates wrote is read as it was meant, what is false is flagged."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.chain_reader import CHECKS, ChainReader, ReadChain
from genrec.prompts import PromptRenderer
from genrec.tasks.attributes import AttributeIndex, item_attributes
from genrec.tasks.reasoning import STEPS, chain_steps, reasoning_slots, step_texts
from genrec.tasks.texts import written_renderer

N_ITEMS = 12


@pytest.fixture(scope="module")
def catalog() -> pl.DataFrame:
    """Brands and categories that read like the templates' own words."""
    brands = ["Acme", "St. Mary's: 3 of 4 items", "Zed", None]
    return pl.DataFrame(
        {
            "item_index": pl.Series(range(N_ITEMS), dtype=pl.Int32),
            "item_id": [f"i{n}" for n in range(N_ITEMS)],
            "title": [f"{('tea', 'wool')[n % 2]} thing {n}" for n in range(N_ITEMS)],
            "brand": [brands[n % 4] for n in range(N_ITEMS)],
            "categories": [["Shop", ("Pots & 2.5 Pans", "Hats")[n // 6]] for n in range(N_ITEMS)],
            "price": [float(1 + n) for n in range(N_ITEMS)],
            "description": pl.Series([None] * N_ITEMS, dtype=pl.String),
        }
    )


@pytest.fixture(scope="module")
def shop(tiny, catalog):
    """(SID map, attributes, reader)"""
    from dataclasses import replace

    semantic_ids = replace(tiny.sids(N_ITEMS), item_ids=catalog["item_id"])
    attributes = item_attributes(catalog)
    return semantic_ids, attributes, ChainReader(semantic_ids, attributes)


def taught(shop, histories: list[list[int]], epoch: int = 0) -> pl.DataFrame:
    """Slots and texts of histories, as training rows hold them."""
    semantic_ids, attributes, _ = shop
    index = AttributeIndex.build(attributes, N_ITEMS)
    slots = reasoning_slots(pl.Series(histories, dtype=pl.List(pl.Int32)), index)
    ids = pl.Series([f"row-{i}" for i in range(len(histories))])
    texts = step_texts(slots, written_renderer(), ids, 0, epoch, sids=semantic_ids.sids())
    return slots.hstack(texts)


def outcomes(read: ReadChain) -> dict[str, float | None]:
    assert [check.name for check in read.checks] == list(CHECKS)
    return {check.name: check.value for check in read.checks}


@pytest.mark.parametrize("epoch", range(3))
def test_what_was_taught_is_read_as_it_was_meant(shop, epoch):
    semantic_ids, _, reader = shop
    rng = np.random.default_rng(epoch)
    rows = [rng.integers(0, N_ITEMS, rng.integers(2, 10)).tolist() for _ in range(40)]
    n_whole = 0
    for history, row in zip(rows, taught(shop, rows, epoch).iter_rows(named=True), strict=True):
        meant = chain_steps(row, semantic_ids.item_ids)
        read = reader.read(" ".join(step.text for step in meant), history)
        assert read.unread == ()
        for own, other in zip(read.steps, meant, strict=True):
            assert (own.type, own.text) == (other.type, other.text)
            assert own.cited_item_ids == other.cited_item_ids
            assert own.claimed_attributes == other.claimed_attributes
            if own.type in ("formulation", "rewriting"):
                assert own.measured == other.measured
            if own.type == "preference":
                said = [own.measured[f"said_{name}"] for name in ("count", "items", "lift")]
                true = [other.measured[name] for name in ("count", "items", "lift")]
                assert said[:2] == true[:2] and said[2] == pytest.approx(true[2], rel=0.05)
        assert all(check.passed in (True, None) for check in read.checks[1:])
        assert read.checks[0].passed == (len(meant) == len(STEPS))
        n_whole += len(meant) == len(STEPS)
    assert n_whole > 10


@pytest.fixture(scope="module")
def example(shop):
    """(history, its true chain, SIDs, reader)"""
    semantic_ids, _, reader = shop
    history = [0, 4, 8, 1]  # three of brand Acme
    row = taught(shop, [history]).row(0, named=True)
    assert (row["preference_kind"], row["preference_value"]) == ("brand", "Acme")
    text = " ".join(row[step] for step in STEPS)
    return history, text, semantic_ids.sids().to_list(), reader


def test_a_true_chain_passes(example):
    history, text, _, reader = example
    read = reader.read(text, history)
    assert outcomes(read) == dict.fromkeys(CHECKS, 1.0)
    assert all(check.passed for check in read.checks)


def test_a_space_that_decoding_put_behind_a_sid_does_not_count(example):
    history, text, _, reader = example
    spaced = text.replace(">.", "> .").replace(">:", "> :").replace(">,", "> ,")
    assert spaced != text and reader.read(spaced, history) == reader.read(text, history)


def test_a_citation_outside_the_history_is_kept_and_flagged(example):
    history, text, sids, reader = example
    read = reader.read(text.replace(sids[0], sids[2]), history)
    evidence = read.steps[0]
    assert "i2" in evidence.cited_item_ids and "i0" not in evidence.cited_item_ids
    found = outcomes(read)
    assert found["citations_exist"] == 1 and 0 < found["citations_in_history"] < 1
    assert found["claims_true"] < 1  # i2 is of another brand
    assert not {c.name: c for c in read.checks}["citations_in_history"].passed
    assert found["steps_read"] == 1 and read.unread == ()


def test_items_that_do_not_exist_are_flagged_and_not_cited(example):
    history, text, sids, reader = example
    first, second, third = sids[0].replace("><", "> <").split()
    for broken in (f"{first}{second}<c_99>", f"{first}{second}", f"{third}{second}{first}"):
        read = reader.read(text.replace(sids[0], broken), history)
        found = outcomes(read)
        assert found["citations_exist"] < 1 and found["citations_in_history"] == 1
        assert "i0" not in read.steps[0].cited_item_ids
    alone = reader.read("nothing but <a_99>", history)
    assert outcomes(alone) == {
        "steps_read": 0, "citations_exist": 0, "citations_in_history": None, "claims_true": None,
        "counts_true": None,
    }  # fmt: skip
    assert alone.steps == () and alone.unread == ("nothing but <a_99>",)


def test_false_claims_and_counts(example):
    history, text, _, reader = example
    assert "the brand Acme" in text
    for said in ("the brand Zed", "the category “Acme”", "something without a kind"):
        found = outcomes(reader.read(text.replace("the brand Acme", said), history))
        assert found["claims_true"] < 1 and found["counts_true"] == 0
        assert found["citations_in_history"] == 1 and found["steps_read"] == 1
    shorter = reader.read(text, history[:-1])
    assert outcomes(shorter)["counts_true"] == 0  # "3 of 4" of a history of three
    # A history of the same items twice says the same.
    assert outcomes(reader.read(text, history * 2)) == dict.fromkeys(CHECKS, 1.0)


def test_missing_steps_wrong_order_and_other_text(example):
    history, text, _, reader = example
    steps = [step.text for step in reader.read(text, history).steps]
    without = reader.read(" ".join(steps[1:]), history)
    assert [s.type for s in without.steps] == list(STEPS[1:])
    assert without.steps[0].cited_item_ids == ()  # of evidence that isn't there
    assert not without.checks[0].passed and without.checks[0].value == 0.8
    chatty = reader.read(f"Well. {steps[0]} Hm! {' '.join(steps[1:])} The end.", history)
    assert chatty.unread == ("Well.", "Hm!", "The end.")
    assert chatty.checks[0].value == 1 and not chatty.checks[0].passed
    swapped = reader.read(" ".join([steps[1], steps[0], *steps[2:]]), history)
    assert not swapped.checks[0].passed and steps[1] in swapped.unread
    cut = reader.read(text[: len(steps[0]) + 10], history)
    assert len(cut.steps) == 1 and cut.unread == (text[len(steps[0]) + 1 : len(steps[0]) + 10],)


@pytest.mark.parametrize("text", ["", " \n", "�" * 40, "<a_1" * 50, "They share " * 300,
    "{{ sid }} {% raw %}", "<script>alert(1)</script>",
    "9" * 5000 + " of 2 items come with x"])  # fmt: skip
def test_any_text_is_read(example, text):
    history, _, _, reader = example
    read = reader.read(text, history)
    assert read.steps == () and outcomes(read)["steps_read"] == 0
    assert "".join(read.unread) == text.strip()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_cut_and_mixed_up_chains_are_read_without_errors(example, data):
    history, text, _, reader = example
    pieces = data.draw(st.lists(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    mixed = "".join(text[a:b] for a, b in pieces)
    read = reader.read(mixed, history)
    for step in read.steps:
        assert step.text in mixed
    # Each part of the text is a step or unread.
    parts = "".join([*(step.text for step in read.steps), *read.unread])
    assert sorted("".join(parts.split())) == sorted("".join(mixed.split()))


def test_wording_that_can_not_be_read_back(shop, tmp_path):
    import shutil

    from genrec.prompts import default_folder

    semantic_ids, attributes, _ = shop
    for words, told in (("{% if items %}x{% endif %}", "can't be read"), ("{{ x }}", "can't be")):
        folder = tmp_path / told.replace(" ", "") / str(len(words))
        shutil.copytree(default_folder() / "written", folder)
        (folder / "step_evidence" / "seen" / "01.jinja").write_text(words)
        with pytest.raises(ValueError, match=f"step_evidence/seen/01' {told}"):
            ChainReader(semantic_ids, attributes, PromptRenderer(folder))
