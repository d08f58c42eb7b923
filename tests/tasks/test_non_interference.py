"""Nothing that comes after a prompt's moment can change a byte of it, in any family.

A user's interactions from a moment on are replaced (items, ratings, reviews, headlines, queries),
and so are the held-out interactions of everybody else; then everything is made again.
"""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

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
    STEPS,
    SUMMARY,
    TARGETS,
)
from genrec.tasks.families import (
    FAMILIES,
    INTERACTION,
    ITEM,
    SEQUENTIAL,
    STEP_TEXTS,
    TEXT,
    TITLED_SIDS,
    Family,
)
from genrec.tasks.rendering import shown
from genrec.tasks.sequential import explode, sequential_rows

OF_TARGET = (TARGETS, CANDIDATES, INTENTION, QUERY, RATING, REVIEW, SUMMARY)
OF_HISTORY = (HISTORY_ITEMS, PREFERENCE, SHOWN, SET_ASIDE, STEPS, *STEP_TEXTS)
# Which rows there are may depend on whether the target has this.
OF_SOME_TARGETS = (*OF_TARGET[2:], "titles")
ITEMS, STARS = st.integers(0, 15), st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0])
TEXTS = [st.sampled_from(pool) for pool in (
    ("Lovely colour, very soft.", "Poor quality, itchy fabric.", "Easy and cheap.", None),
    ("Great", "Bad", None),
    ("warm hat", "tea for two", "gift", None),
)]  # fmt: skip
EVENT = st.tuples(ITEMS, STARS, *TEXTS)
MIX = [name for name, family in FAMILIES.items() if family.unit != ITEM]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_shows_the_target_is_declared(name: str):
    family = FAMILIES[name]
    assert family.shows_target <= set(family.prompt)
    for variable, (column, _) in family.prompt.items():
        assert (column in OF_TARGET) != (column in OF_HISTORY)  # no third kind
        assert (variable in family.shows_target) == (column in OF_TARGET)


def fields(world, rows: pl.DataFrame, family: Family) -> dict[str, list[str]]:
    """What each variable of the prompt says, row by row."""
    return {
        variable: (
            rows[column] if form == TEXT else shown(rows, column, form, world.sources.texts)
        ).to_list()
        for variable, (column, form) in family.prompt.items()
    }


def masked(world, rows: pl.DataFrame, family: Family) -> dict[str, str]:
    """Prompts by row id, the declared fields blanked out; whole, they are the rows' own."""
    said = fields(world, rows, family)
    texts = {variable for variable, (_, form) in family.prompt.items() if form == TEXT}
    prompts = {}
    for i, (row_id, template, prompt) in enumerate(
        rows.select("row_id", "template", "prompt").iter_rows()
    ):
        own = {v: said[v][i] for v in said if v not in texts}
        untrusted = {v: said[v][i] for v in texts}
        assert world.renderer.render(template, own, untrusted) == prompt
        blank = dict.fromkeys(family.shows_target, "*")
        prompts[row_id] = world.renderer.render(
            template, {**own, **blank}, {v: t for v, t in untrusted.items() if v not in blank}
        )
    return prompts


def exploded(world) -> pl.DataFrame:
    """Every position of every user: training, validation and test."""
    columns = world.splits.train.columns
    parts = (world.splits.train, world.splits.valid, world.splits.test)
    return pl.concat([part.select(columns) for part in parts])


def moments(world) -> dict[str, tuple[str, int]]:
    """Row id -> (user, position of the target)."""
    rows = explode(exploded(world))
    return {r: (u, p) for r, u, p in rows.select("row_id", "user_id", "target_position").rows()}


def by_id(rows: pl.DataFrame, columns: list[str]) -> dict[str, tuple]:
    return {row[0]: row[1:] for row in rows.select("row_id", *columns).iter_rows()}


def compare(before, after, user: str, cut: int, untouched: set[str]) -> int:
    """Check all rows of all families; how many prompts were compared.

    Args:
        before: world.
        after: the world where `user` did other things from position `cut` on.
        user: user id.
        cut: the first changed position of that user.
        untouched: rows of others whose own target was replaced by nothing.
    """
    when, compared = moments(before), 0
    assert moments(after) == when
    tables = [world.rows(exploded(world), [n for n in MIX if n != SEQUENTIAL])
              for world in (before, after)]  # fmt: skip
    for world, made in zip((before, after), tables, strict=True):
        made[SEQUENTIAL] = world.render(sequential_rows(explode(exploded(world))))
    for name in MIX:
        family = FAMILIES[name]
        rows = [made.get(name, pl.DataFrame({"row_id": []})) for made in tables]
        if not all(len(r) for r in rows):
            continue
        prompts = [masked(w, r, family) for w, r in zip((before, after), rows, strict=True)]
        kept = [c for c in OF_HISTORY if c in rows[0].columns]
        own = [c for c in (TARGETS, RATING, REVIEW, SUMMARY, QUERY) if c in rows[0].columns]
        history, target = ([by_id(r, c) for r in rows] for c in (kept, own))
        needs_target = {c for c, _ in (*family.prompt.values(), *family.completion.values())} & {
            *OF_SOME_TARGETS
        } or "title" in family.completion
        for row_id in prompts[0].keys() | prompts[1].keys():
            moment = row_id.removeprefix(name + ":")
            owner, position = when[moment]
            earlier = (owner == user and position < cut) or moment in untouched
            if not earlier and not (owner == user and position == cut):
                continue
            both = row_id in prompts[0] and row_id in prompts[1]
            assert both or (needs_target and not earlier), row_id
            if not both:
                continue
            assert prompts[0][row_id] == prompts[1][row_id], row_id
            assert history[0][row_id] == history[1][row_id], row_id
            if earlier:
                assert target[0][row_id] == target[1][row_id], row_id
            compared += 1
    return compared


# A counterexample is not made smaller: that takes minutes.
@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.data())
def test_what_comes_later_changes_nothing(worlds, data):
    seed = data.draw(st.integers(0, 50))
    events = worlds.random_events(seed, n_users=4)
    number = data.draw(st.integers(0, 3))
    cut = data.draw(st.integers(0, len(events[number]) - 1))
    others = [list(user) for user in events]
    tail = len(events[number]) - cut
    others[number][cut:] = data.draw(st.lists(EVENT, min_size=tail, max_size=tail))
    for i, sequence in enumerate(others):
        if i != number:
            sequence[-2:] = data.draw(st.lists(EVENT, min_size=2, max_size=2))
    # Without reviews preferences come from the history, without queries from the catalogue.
    columns = data.draw(st.sampled_from([("review", "summary", "query"), (), ("query",)]))
    before, after = (worlds.of(some, columns=columns) for some in (events, others))
    trained = {
        row_id
        for row_id, (user, position) in moments(before).items()
        if user != f"u{number}" and position < len(events[int(user[1:])]) - 2
    }
    assert compare(before, after, f"u{number}", cut, trained) > 20


def test_what_is_held_out_changes_no_byte_of_the_training_rows(worlds):
    events = worlds.random_events(7)
    others = [
        [*user[:-2], (15 - user[-2][0], 1.0, "Awful smell.", "No", "x"), (3, 5.0, "q", "w", "e")]
        for user in events
    ]
    before, after = worlds.of(events), worlds.of(others)
    assert not before.log.equals(after.log)
    first, second = (w.rows(w.splits.train) for w in (before, after))
    assert set(first) == set(second) == set(MIX)
    for name in MIX:
        assert first[name].equals(second[name]), name
    assert before.items("title_to_sid").equals(after.items("title_to_sid"))


def test_this_test_would_see_a_leak(worlds, monkeypatch):
    """A prompt that reads its target without saying so is found."""
    leaky = replace(FAMILIES["fusion"], prompt={"items": (TARGETS, TITLED_SIDS)})
    monkeypatch.setitem(FAMILIES, "fusion", leaky)
    events = worlds.random_events(1, n_users=4)
    others = [list(user) for user in events]
    others[0][3] = ((events[0][3][0] + 1) % 16, *events[0][3][1:])
    with pytest.raises(AssertionError):
        compare(worlds.of(events), worlds.of(others), "u0", 3, set())


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.unit == INTERACTION])
def test_the_history_is_what_came_before(world, name: str):
    """Each row's history is the user's interactions right before the target, oldest first."""
    rows = world.rows(world.splits.train, [name])[name]
    log = {u: part["item_index"].to_list() for (u,), part in world.log.group_by("user_id")}
    when = moments(world)
    for row_id, user, history, targets in rows.select(
        "row_id", "user_id", "history", "targets"
    ).iter_rows():
        owner, position = when[row_id.removeprefix(name + ":")]
        assert owner == user and targets == [log[user][position]]
        assert history == log[user][position - len(history) : position]
        assert len(history) >= min(position, FAMILIES[name].least_history)
