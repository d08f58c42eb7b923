"""Counterfactual sets: they flip the list, nothing in them can be spared, and ranks are right."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from genrec.explain.counterfactuals import counterfactuals
from genrec.explain.evidence import (
    UNLISTED,
    Search,
    item_log_probs,
    leave_one_out,
    places,
    ranks_left_out,
)
from genrec.modeling import encode_prompts

K, BEAM = 6, 12


@pytest.fixture(scope="module")
def search(split_rows) -> Search:
    seen = [np.unique(np.array(s, dtype=np.int64)) for s in split_rows["seen_item_index"].to_list()]
    return Search(seen, None, BEAM)


def searched(recommender, history, seen) -> list[int]:
    prompt = encode_prompts(recommender.tokenizer, recommender.prompts([list(history)]))
    found = recommender.engine.search(prompt, BEAM, BEAM, [seen])
    return found.items[0].tolist()


def test_the_unchanged_history_gives_the_recorded_list(recommender, histories, items, search):
    rows = np.arange(len(histories))
    again = search.lists(recommender, rows, histories)
    np.testing.assert_array_equal(again[:, :K], items)


def test_places():
    lists = np.array([[5, 3, 9], [1, 2, -1]])
    items = np.array([[9, 5, -1], [7, 2, 1]])
    assert places(lists, items).tolist() == [[3, 1, UNLISTED], [UNLISTED, 2, 1]]


def test_ranks_are_those_of_single_searches(recommender, histories, items, search):
    ranks = ranks_left_out(recommender, histories, items, search)
    assert ranks.shape == (*items.shape, max(map(len, histories)))
    moved = 0
    for row in (0, 2, len(histories) - 1):
        history = histories[row]
        assert (ranks[row, :, len(history) :] == UNLISTED).all()
        for j in range(len(history)):
            found = searched(recommender, np.delete(history, j), search.seen[row])
            for place, item in enumerate(items[row].tolist()):
                expected = found.index(item) + 1 if item in found else UNLISTED
                assert ranks[row, place, j] == expected
                moved += expected != place + 1
    assert moved  # or leaving out changes nothing here


def test_sets_are_minimal_and_flip_the_list(recommender, histories, items, search):
    made = counterfactuals(recommender, histories, items, search, k=2, n_items=2)
    assert [(c.row, c.place) for c in made] == [
        (row, place) for row in range(len(histories)) for place in (0, 1)
    ]
    sizes = []
    for own in made:
        history, item = histories[own.row], int(items[own.row, own.place])
        kept = np.delete(history, own.positions)
        found = searched(recommender, kept, search.seen[own.row])
        rank = found.index(item) + 1 if item in found else UNLISTED
        assert own.rank == rank and own.replaced_by == found[0]
        score = item_log_probs(recommender, [kept], np.array([[item]]))[0, 0]
        assert own.log_prob == pytest.approx(score, abs=1e-4)
        assert own.found == (rank == UNLISTED or rank > 2)
        if not own.found:
            assert len(own.positions) == len(history)
            continue
        sizes.append(len(own.positions))
        for position in own.positions:  # with any one of them back it is listed
            fewer = [p for p in own.positions if p != position]
            listed = searched(recommender, np.delete(history, fewer), search.seen[own.row])
            assert item in listed[:2]
    assert sizes


def test_greedy_takes_the_costliest_first(recommender, histories, items, search):
    evidence = leave_one_out(recommender, histories, items)
    made = counterfactuals(recommender, histories, items, search, k=1)
    single = [c for c in made if c.found and len(c.positions) == 1 and c.searches == 1]
    assert single
    for own in single:
        deltas = evidence.deltas[own.row, own.place]
        assert deltas[own.positions[0]] == pytest.approx(np.nanmax(deltas), abs=1e-5)
    # Where the greedy set is of one item, no smaller one exists; of two, see by brute force.
    for own in (c for c in made if c.found and len(c.positions) == 2):
        item = int(items[own.row, 0])
        for position in range(len(histories[own.row])):
            kept = np.delete(histories[own.row], position)
            flips = searched(recommender, kept, search.seen[own.row])[0] != item
            # A single item that flips the list was missed only if another one costs more.
            assert not flips or position != int(np.nanargmax(evidence.deltas[own.row, 0]))


def test_limits_and_short_input(recommender, histories, items, search):
    few = counterfactuals(recommender, histories, items, search, k=K, most=1)
    assert all(len(c.positions) == 1 for c in few) and not all(c.found for c in few)
    empty = [np.zeros(0, dtype=np.int64), *histories[1:3]]
    part = items[:3].copy()
    part[2] = -1
    done: list[int] = []
    made = counterfactuals(
        recommender, empty, part, Search(None, None, BEAM), K, progress=done.append
    )
    assert [c.row for c in made] == [1] and sum(done) == 1
    assert counterfactuals(recommender, [], items[:0], search, K) == []


def test_a_view_holds_for_changed_histories_too(recommender, histories, items):
    view = recommender.engine.trie.deny(items[0, :1])
    lists = Search(None, view, BEAM).lists(recommender, np.array([0]), [histories[0][:-1]])
    assert items[0, 0] not in lists[0]
    assert list(itertools.filterfalse(lambda i: i >= 0, lists[0].tolist())) in ([], [-1])
