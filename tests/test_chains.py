"""Chains: what they hold, what they refuse, and their way through JSON."""

import json

import pytest

from genrec.chains import STEP_TYPES, Chain, Check, Step, read_chains, write_chains


def step(**changes) -> Step:
    values = {
        "type": "evidence",
        "text": "without “tent” it falls by 1.2",
        "cited_item_ids": (7, 9),
        "claimed_attributes": {7: {"brand": "Acme", "categories": ["Shop", "Tents"]}},
        "measured": {"deltas": [1.25, 0.5], "exact": True, "none": None},
    }
    return Step(**{**values, **changes})


def chain(**changes) -> Chain:
    values = {
        "row_id": "test-000001",
        "item_id": 3,
        "rank": 1,
        "steps": (step(), step(type="decision", text="rank 1", cited_item_ids=(9, 11))),
        "rationale_origin": "template",
        "trained_on_target": False,
        "checks": (Check("citations_in_history", 1.0, True), Check("sufficiency", None)),
    }
    return Chain(**{**values, **changes})


def test_json_keeps_everything_and_the_type_of_ids(tmp_path):
    odd = chain(item_id="3", steps=(step(cited_item_ids=("7",), text='\u2028 "x" ‹a›\n'),))
    write_chains(tmp_path / "chains.jsonl", [chain(), odd])
    again = read_chains(tmp_path / "chains.jsonl")
    assert again == [chain(), odd]
    assert again[0].item_id == 3 and again[1].item_id == "3"
    assert list(again[0].steps[0].claimed_attributes) == [7]


def test_look_ups():
    made = chain()
    assert made.cited_item_ids == (7, 9, 11)
    assert made.step("decision").text == "rank 1" and made.step("shared_attributes") is None
    assert made.check("citations_in_history").passed and made.check("nothing") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rationale_origin": "model"}, "'model' is not one of before, after, template"),
        ({"trained_on_target": None}, "must be true or false"),
        ({"rank": 0}, "at least 1"),
        ({"steps": ()}, "has no steps"),
        ({"item_id": 1.5}, "string or an integer"),
        ({"item_id": True}, "string or an integer"),
        ({"checks": (Check("a", 1.0), Check("a", 2.0))}, "different names"),
    ],
)
def test_a_bad_chain_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        chain(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "vibes"}, "'vibes' is not one of"),
        ({"text": "  "}, "has no text"),
        ({"cited_item_ids": (None,)}, "string or an integer"),
        ({"measured": {"delta": float("nan")}}, "leave out what was not measured"),
        ({"measured": {"a": {"b": [float("inf")]}}}, "holds inf"),
        ({"measured": {"a": object()}}, "plain JSON values"),
    ],
)
def test_a_bad_step_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        step(**changes)


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[1]",
        "not json",
        json.dumps({**chain().to_json(), "extra": 1}),
        json.dumps({**chain().to_json(), "steps": [{"type": "evidence"}]}),
        json.dumps({**chain().to_json(), "steps": [3]}),
        json.dumps({**chain().to_json(), "checks": [{"name": "a"}]}),
        json.dumps({**chain().to_json(), "rationale_origin": None}),
    ],
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "chains.jsonl"
    write_chains(path, [chain()])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="chains.jsonl, line 2 is no chain"):
        read_chains(path)


@pytest.mark.parametrize("kind", STEP_TYPES)
def test_every_kind_of_step_goes_through_json(kind):
    made = step(type=kind)
    assert Step.from_json(made.to_json()) == made


def test_the_reasoning_curriculum_has_its_step_types():
    assert {"evidence", "preference", "intent", "formulation", "rewriting"} <= set(STEP_TYPES)
