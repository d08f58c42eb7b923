"""Families as data: complete, consistent, and off where the data lack what they need."""

from __future__ import annotations

import pytest

from genrec.columns import HISTORY_ITEMS, TARGETS
from genrec.tasks.families import (
    FAMILIES,
    INTERACTION,
    ITEM,
    ITEM_DESCRIPTION,
    ITEM_TITLE,
    NEEDS,
    RATED_SIDS,
    SEQUENTIAL,
    SPLIT_ROW,
    STEP_TEXTS,
    TARGET_KINDS,
    TITLED_SIDS,
    TITLES,
    switched_off,
)

ASKED_FOR = """sequential titles_to_sid sids_to_title direct title_to_sid sid_to_title
description_to_sid sid_to_description text_to_sid sid_to_text fusion intention_search query_search
preference_inference preference_recommendation rating review_summary explanation denoising
history_reconstruction reasoning_evidence reasoning_preference reasoning_intent
reasoning_formulation reasoning_rewriting reasoning_recommendation"""
NEED_OF_FORM = {TITLES: "titles", TITLED_SIDS: "titles", ITEM_TITLE: "titles",
    ITEM_DESCRIPTION: "descriptions", RATED_SIDS: "ratings"}  # fmt: skip
NEED_OF_COLUMN = {"rating": "ratings", "review": "review texts", "summary": "review summaries",
    "query": "queries", "intention": "item intentions",
    "preference": "item attributes or review texts"}  # fmt: skip


def test_every_family_that_is_asked_for():
    assert set(FAMILIES) == set(ASKED_FOR.split())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_consistent(name: str):
    family = FAMILIES[name]
    assert family.name == name and family.target_kind in TARGET_KINDS
    assert family.unit in (SPLIT_ROW, INTERACTION, ITEM)
    assert (family.unit == SPLIT_ROW) == (name == SEQUENTIAL)
    assert set(family.needs) <= set(NEEDS)
    if family.unit == ITEM:  # it has a target and nothing else
        columns = {column for column, _ in (*family.prompt.values(), *family.completion.values())}
        assert columns == {TARGETS} and not set(family.prompt) & set(family.completion)
    else:
        assert HISTORY_ITEMS in {c for c, _ in family.prompt.values()} or family.prompt.keys() & {
            "query", "review", "shown",
        }  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_needs_what_it_shows(name: str):
    family = FAMILIES[name]
    fields = [*family.prompt.values(), *family.completion.values()]
    needed = {NEED_OF_FORM[form] for _, form in fields if form in NEED_OF_FORM}
    needed |= {NEED_OF_COLUMN[column] for column, _ in fields if column in NEED_OF_COLUMN}
    needed |= {"item attributes" for column, _ in fields if column in STEP_TEXTS}
    assert set(family.needs) == needed


def test_steps_and_columns():
    assert FAMILIES["reasoning_recommendation"].steps == STEP_TEXTS
    assert FAMILIES["reasoning_intent"].steps == ("step_intent",)
    assert FAMILIES[SEQUENTIAL].steps == FAMILIES[SEQUENTIAL].columns == ()
    assert FAMILIES["explanation"].columns == ("rating", "review")
    assert FAMILIES["denoising"].columns == ("set_aside", "shown")


def test_switched_off_with_a_reason():
    has = dict.fromkeys(NEEDS, True)
    assert switched_off(list(FAMILIES), has) == {}
    bare = dict.fromkeys(NEEDS, False)
    left = set(FAMILIES) - set(switched_off(list(FAMILIES), bare))
    assert left == {SEQUENTIAL, "direct", "denoising"}
    off = switched_off(["rating", "explanation", "direct"], {**has, "ratings": False})
    assert off == {
        "rating": "the data have no ratings", "explanation": "the data have no ratings",
    }  # fmt: skip
    off = switched_off(["explanation"], {**has, "ratings": False, "review texts": False})
    assert off["explanation"] == "the data have no review texts and no ratings"
