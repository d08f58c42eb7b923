"""Task families: what a row of each shows, what it asks for, and what data it needs.

A family is data: which columns its prompt and its completion may read, and in which form. All rows
of all families are made into text by one function (`genrec.tasks.rendering.render_rows`), and a
prompt can only show what its family lists here. So a prompt knows its target only where the
definition says so (`shows_target`).

The families are those of P5 (Geng et al. 2022), LC-Rec (Zheng et al. 2024), GREAM, Mender (Paischer
et al. 2024), LLM4DSR (Wang et al. 2024) and of joint search and recommendation (Penha et al. 2025).
The wording, in ``prompts/<family>/``, is genrec's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from genrec.columns import (
    CANDIDATES,
    HISTORY_ITEMS,
    INTENTION,
    PREFERENCE,
    QUERY,
    RATING,
    REVIEW,
    SET_ASIDE,
    SHOWN,
    SUMMARY,
    TARGETS,
)

# How a column is written. Lists of items: SIDs one after the other; SIDs or titles as an
# enumeration; titles, each with its SID; SIDs, each with the user's rating. The (first) item's
# title or description. Text as it is, escaped; text that genrec made itself, as it is. A number.
SIDS, LISTED_SIDS, TITLES, TITLED_SIDS, RATED_SIDS = (
    "sids", "listed sids", "titles", "titled sids", "rated sids",
)  # fmt: skip
ITEM_TITLE, ITEM_DESCRIPTION, TEXT, NUMBER = "title", "description", "text", "number"
OWN_TEXT = "own text"

TARGET_KINDS = ("sids", "title", "description", "title and description", "history", "text",
    "rating", "sid and title", "chain", "chain and sid")  # fmt: skip

# What rows are made of: split rows as they are (a whole history in one causal pass, or one
# interaction), one interaction each, or one catalogue item each.
SPLIT_ROW, INTERACTION, ITEM = "split row", "interaction", "item"

# What the data must have.
HAS_TITLES, HAS_DESCRIPTIONS, HAS_RATINGS = "titles", "descriptions", "ratings"
HAS_REVIEWS, HAS_SUMMARIES, HAS_QUERIES = "review texts", "review summaries", "queries"
HAS_INTENTIONS = "item intentions"
HAS_ATTRIBUTES, HAS_PREFERENCES = "item attributes", "item attributes or review texts"
NEEDS = (HAS_TITLES, HAS_DESCRIPTIONS, HAS_RATINGS, HAS_REVIEWS, HAS_SUMMARIES, HAS_QUERIES,
    HAS_INTENTIONS, HAS_ATTRIBUTES, HAS_PREFERENCES)  # fmt: skip

# Texts of reasoning steps; see genrec.tasks.reasoning.
STEP_TEXTS = ("step_evidence", "step_preference", "step_intent", "step_formulation",
    "step_rewriting")  # fmt: skip

Fields = Mapping[str, tuple[str, str]]  # variable of a template -> (column, form)


@dataclass(frozen=True)
class Family:
    """One task family.

    Attributes:
        name: also the folder of its templates.
        unit: what a row is made of: `SPLIT_ROW`, `INTERACTION` or `ITEM`.
        target_kind: what the completion is.
        prompt: what the prompt's templates may show.
        completion: what the completion's template may show.
        shows_target: prompt variables that show something of the target, by definition.
        needs: what the data must have.
        least_history: earlier items that a row needs.
    """

    name: str
    unit: str
    target_kind: str
    prompt: Fields
    completion: Fields
    shows_target: frozenset[str] = frozenset()
    needs: tuple[str, ...] = ()
    least_history: int = field(default=0)

    @property
    def steps(self) -> tuple[str, ...]:
        """Reasoning steps that the completion holds, in order."""
        asked = {column for column, _ in self.completion.values()}
        return tuple(column for column in STEP_TEXTS if column in asked)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns beyond the common ones that a row must hold."""
        used = {column for column, _ in (*self.prompt.values(), *self.completion.values())}
        return tuple(sorted(used - {HISTORY_ITEMS, TARGETS}))


_HISTORY: Fields = {"history": (HISTORY_ITEMS, SIDS)}
_SID: Fields = {"sid": (TARGETS, SIDS)}
_TITLE: Fields = {"title": (TARGETS, ITEM_TITLE)}
_DESCRIPTION: Fields = {"description": (TARGETS, ITEM_DESCRIPTION)}


def _of_item(name: str, shown: Fields, asked: Fields, kind: str) -> Family:
    """One direction between an item's SID and its texts."""
    needs = tuple(
        need
        for variable, need in (("title", HAS_TITLES), ("description", HAS_DESCRIPTIONS))
        if variable in (*shown, *asked)
    )
    return Family(name, ITEM, kind, shown, asked, frozenset(shown), needs)


def _step(name: str, column: str) -> Family:
    """One step of the reasoning curriculum, learned by itself."""
    history: Fields = {"history": (HISTORY_ITEMS, SIDS)}
    asked: Fields = {"step": (column, OWN_TEXT)}
    return Family(name, INTERACTION, "chain", history, asked, needs=(HAS_ATTRIBUTES,),
        least_history=2)  # fmt: skip


SEQUENTIAL = "sequential"
TITLE_TO_SID, SID_TO_TITLE = "title_to_sid", "sid_to_title"

_ALL = (
    Family(SEQUENTIAL, SPLIT_ROW, "sids", _HISTORY, {"targets": (TARGETS, SIDS)}),
    Family("titles_to_sid", INTERACTION, "sids", {"titles": (HISTORY_ITEMS, TITLES)}, _SID,
        needs=(HAS_TITLES,), least_history=1),
    Family("sids_to_title", INTERACTION, "title", _HISTORY, _TITLE, needs=(HAS_TITLES,),
        least_history=1),
    Family("fusion", INTERACTION, "sid and title", {"items": (HISTORY_ITEMS, TITLED_SIDS)},
        {**_SID, **_TITLE}, needs=(HAS_TITLES,), least_history=1),
    Family("direct", INTERACTION, "sids", {**_HISTORY, "candidates": (CANDIDATES, LISTED_SIDS)},
        _SID, frozenset({"candidates"})),
    _of_item(TITLE_TO_SID, _TITLE, _SID, "sids"),
    _of_item("description_to_sid", _DESCRIPTION, _SID, "sids"),
    _of_item("text_to_sid", {**_TITLE, **_DESCRIPTION}, _SID, "sids"),
    _of_item(SID_TO_TITLE, _SID, _TITLE, "title"),
    _of_item("sid_to_description", _SID, _DESCRIPTION, "description"),
    _of_item("sid_to_text", _SID, {**_TITLE, **_DESCRIPTION}, "title and description"),
    Family("intention_search", INTERACTION, "sids",
        {**_HISTORY, "intention": (INTENTION, TEXT)}, _SID, frozenset({"intention"}),
        (HAS_INTENTIONS,)),
    Family("query_search", INTERACTION, "sids", {"query": (QUERY, TEXT)}, _SID,
        frozenset({"query"}), (HAS_QUERIES,)),
    Family("preference_inference", INTERACTION, "text", _HISTORY,
        {"preference": (PREFERENCE, TEXT)}, needs=(HAS_PREFERENCES,), least_history=2),
    Family("preference_recommendation", INTERACTION, "sids",
        {**_HISTORY, "preference": (PREFERENCE, TEXT)}, _SID, needs=(HAS_PREFERENCES,),
        least_history=2),
    Family("rating", INTERACTION, "rating",
        {"rated": (HISTORY_ITEMS, RATED_SIDS), **_SID}, {"rating": (RATING, NUMBER)},
        frozenset({"sid"}), (HAS_RATINGS,), least_history=1),
    Family("review_summary", INTERACTION, "text", {**_SID, "review": (REVIEW, TEXT)},
        {"summary": (SUMMARY, TEXT)}, frozenset({"sid", "review"}),
        (HAS_REVIEWS, HAS_SUMMARIES)),
    Family("explanation", INTERACTION, "text",
        {**_HISTORY, **_SID, "rating": (RATING, NUMBER)}, {"review": (REVIEW, TEXT)},
        frozenset({"sid", "rating"}), (HAS_REVIEWS, HAS_RATINGS)),
    Family("denoising", INTERACTION, "history", {"shown": (SHOWN, SIDS)},
        {"history": (HISTORY_ITEMS, SIDS), "set_aside": (SET_ASIDE, SIDS)}, least_history=3),
    Family("history_reconstruction", INTERACTION, "history",
        {"titles": (HISTORY_ITEMS, TITLES)}, {"history": (HISTORY_ITEMS, SIDS)},
        needs=(HAS_TITLES,), least_history=2),
    _step("reasoning_evidence", "step_evidence"),
    _step("reasoning_preference", "step_preference"),
    _step("reasoning_intent", "step_intent"),
    _step("reasoning_formulation", "step_formulation"),
    _step("reasoning_rewriting", "step_rewriting"),
    Family("reasoning_recommendation", INTERACTION, "chain and sid", _HISTORY,
        {**{column.removeprefix("step_"): (column, OWN_TEXT) for column in STEP_TEXTS}, **_SID},
        needs=(HAS_ATTRIBUTES,), least_history=2),
)  # fmt: skip

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}


def switched_off(names: list[str], has: Mapping[str, bool]) -> dict[str, str]:
    """Families that the data don't allow, each with the reason.

    Args:
        names: of families.
        has: for each of `NEEDS`, whether the data have it.
    """
    missing = {name: [need for need in FAMILIES[name].needs if not has[need]] for name in names}
    return {name: f"the data have no {' and no '.join(m)}" for name, m in missing.items() if m}
