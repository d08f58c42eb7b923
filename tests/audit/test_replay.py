"""Replay reproduces what was recorded and says how far it falls short of what was not."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from genrec.audit.records import opened, read_opened
from genrec.audit.replay import EPSILON, LEVELS, load_replayer, replay
from genrec.audit.verify import hashes_now, named_files
from genrec.decoding.beam import BeamResult


@pytest.fixture(scope="module")
def world(audited_run):
    """(records, replayer, current hashes)"""
    records = list(read_opened(audited_run / "audit"))
    replayer = load_replayer(audited_run, records[0])
    return records, replayer, hashes_now(audited_run, named_files(records[0]))


@pytest.fixture
def record(world):
    return copy.deepcopy(world[0][2])


def test_every_record_is_reproduced(world):
    records, replayer, current = world
    for record in records:
        found = replay(record, replayer, current)
        assert found.made_by == found.engine == "torch" and "replayed on" not in str(found)
        assert found.passed and found.level in LEVELS[:2], str(found)
        assert found.search_difference <= EPSILON and found.forced_difference <= EPSILON
        assert f"record {record['record']}: reproduced, {found.level}" in str(found)


def test_integer_ids_are_reproduced(other_run):
    records = list(read_opened(other_run / "audit"))
    replayer = load_replayer(other_run, records[0])
    current = hashes_now(other_run, named_files(records[0]))
    assert isinstance(records[0]["items"][0]["item_id"], int)
    assert all(replay(record, replayer, current).passed for record in records)


def test_another_history_is_another_prompt(world, record):
    record["input"]["history"].reverse()
    if [e["item_id"] for e in record["input"]["history"]] == [
        e["item_id"] for e in world[0][2]["input"]["history"]
    ]:
        record["input"]["history"].pop()
    found = replay(record, world[1], world[2])
    assert not found.prompt_matches and not found.passed
    assert "the prompt differs" in str(found)


def test_an_invented_score_is_found_by_teacher_forcing(world, record):
    record["items"][0]["level_log_probs"][1] += 0.01
    found = replay(record, world[1], world[2])
    assert found.level == "same ordered list" and not found.passed
    assert found.forced_difference == pytest.approx(0.01, abs=1e-4)
    assert found.search_difference == pytest.approx(0.01, abs=1e-4)


def test_an_invented_item(world, record):
    listed = {item["item_id"] for item in record["items"]}
    before = listed | {e["item_id"] for e in record["input"]["history"]}
    before |= set(record["input"]["set_aside_item_ids"])
    record["items"][-1]["item_id"] = next(
        i for i in world[1].recommender.catalog["item_id"] if i not in before
    )
    found = replay(record, world[1], world[2])
    assert found.level == "different" and not found.passed


def test_a_reordered_list(world, record):
    items = record["items"]
    items[0], items[-1] = items[-1], items[0]
    found = replay(record, world[1], world[2])
    assert found.level == "same set" and not found.passed
    assert found.forced_difference <= EPSILON  # the scores themselves are honest


def test_a_swap_inside_epsilon_passes(world, record, monkeypatch):
    engine = world[1].recommender.engine
    real = engine.search

    def swapped(*args, **kwargs) -> BeamResult:
        """As if two items of nearly the same score had changed places."""
        made = real(*args, **kwargs)
        order = np.array([1, 0, *range(2, made.items.shape[1])])
        return BeamResult(
            made.items[:, order], made.scores, made.level_log_probs[:, order], made.certified
        )

    monkeypatch.setattr(engine, "search", swapped)
    found = replay(record, world[1], world[2])
    assert found.level == "same set" and found.swaps_within_epsilon and found.passed


def test_an_ignored_filter_shows(world, record):
    record["input"]["set_aside_item_ids"] = [item["item_id"] for item in record["items"][:2]]
    found = replay(record, world[1], world[2])
    assert found.level == "within epsilon" and not found.passed


def test_changed_files_are_named(world, record):
    record["artefacts"]["files"]["sft/model/model.safetensors"] = "0" * 64
    found = replay(record, world[1], world[2])
    assert found.changed_files == ["sft/model/model.safetensors"] and not found.passed
    assert "changed since: sft/model/model.safetensors" in str(found)


def test_what_can_not_be_replayed_is_refused(world, record):
    with pytest.raises(ValueError, match="record 2: erased: its payload is gone"):
        replay(opened(record, None), world[1], world[2])
    filtered = {**record, "filters": [{"name": "deny"}]}
    with pytest.raises(ValueError, match=r"under the rules \['deny'\]"):
        replay(filtered, world[1], world[2])
    record["items"][0]["item_id"] = "no such item"
    with pytest.raises(ValueError, match="not in the catalogue"):
        replay(record, world[1], world[2])
    del record["decoding"]["beam_width"]
    with pytest.raises(ValueError, match="record 2 lacks what replay needs"):
        replay(record, world[1], world[2])


def test_the_engine_that_made_a_list_is_said(world, record):
    record["decoding"]["engine"] = "vllm"
    found = replay(record, world[1], world[2])
    assert found.passed and found.made_by == "vllm" and found.engine == "torch"
    assert "; made by vllm, replayed on torch" in str(found)
