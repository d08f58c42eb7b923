"""Control sets, replacements and erasure, against brute force and by their properties."""

from __future__ import annotations

import numpy as np
import pytest

from genrec.explain.erasure import (
    CHAIN,
    NEIGHBOURS,
    control_sets,
    erase,
    replacements,
)
from genrec.explain.evidence import item_log_probs, leave_one_out
from genrec.explain.thresholds import CONTROLS


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(20, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def measured(recommender, histories, items, vectors):
    evidence = leave_one_out(recommender, histories, items)
    cited = evidence.cited(2)
    lengths = np.array([len(h) for h in histories])
    popularity = [np.arange(len(h)) for h in histories]
    sets = {CHAIN: cited, **control_sets(cited, lengths, popularity, seed=0)}
    similar = replacements(vectors, histories, items, draws=2, seed=0)
    started: list[int] = []
    done: list[int] = []
    erased = erase(
        recommender, histories, items, evidence.log_probs, sets, similar, done.append,
        started.append,
    )  # fmt: skip
    assert sum(done) == started[0]
    return evidence, sets, similar, erased


def test_controls_choose_as_many_by_their_rule():
    cited = np.array(
        [[[0, 2, -1], [-1, -1, -1]], [[3, -1, -1], [1, 0, 3]], [[0, 1, -1], [0, -1, -1]]]
    )
    lengths = np.array([4, 5, 3])
    popularity = [np.array([5, 9, 5, 1]), np.array([1, 2, 3, 4, 5]), np.array([7, 7, 7])]
    sets = control_sets(cited, lengths, popularity, seed=3)
    for name in CONTROLS:
        assert ((sets[name] >= 0).sum(-1) == (cited >= 0).sum(-1)).all()
        assert (sets[name] < lengths[:, None, None]).all()
        for own in sets[name].reshape(-1, 3):
            own = own[own >= 0]
            assert len(set(own.tolist())) == len(own)
    assert sets["newest"][0, 0].tolist() == [3, 2, -1]
    assert sets["popular"][0, 0].tolist() == [1, 2, -1]  # of equal ones the newer
    assert sets["popular"][2, 0].tolist() == [2, 1, -1]
    again = control_sets(cited, lengths, popularity, seed=3)
    assert all(np.array_equal(sets[n], again[n]) for n in CONTROLS)
    many = [control_sets(cited, lengths, popularity, s)["random"] for s in range(20)]
    assert len({m.tobytes() for m in many}) > 5


def test_another_chain_is_moved_by_age():
    """Two lists: each gets the other's places, counted from the newest item."""
    cited = np.array([[[3, 0]], [[1, -1]]])
    sets = control_sets(cited, np.array([4, 2]), [np.zeros(4), np.zeros(2)], seed=0)
    # Of the second list the newest item is cited: age 0, so position 3 of the first.
    first = sets["other_chain"][0, 0].tolist()
    assert first[0] == 3 and first[1] in (0, 1, 2)  # filled up at random
    # Ages 0 and 3 of the first: 3 is older than the second history is.
    assert sets["other_chain"][1, 0].tolist() == [1, -1]


def test_replacements_are_near_and_new(vectors, histories, items):
    made = replacements(vectors, histories, items, draws=3, seed=0)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for history, listed, own in zip(histories, items, made, strict=True):
        assert own.shape == (len(history), 3)
        for item, drawn in zip(history, own, strict=True):
            free = np.setdiff1d(np.arange(20), [*history, *listed])
            order = free[np.argsort(-(unit[free] @ unit[item]))][:NEIGHBOURS]
            assert set(drawn.tolist()) <= set(order.tolist())
            assert len(set(drawn.tolist())) == 3  # drawn without repeating where there are enough
    again = replacements(vectors, histories, items, draws=3, seed=0)
    assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))


def test_nothing_left_to_put_in_its_place():
    vectors = np.eye(4, dtype=np.float32)
    made = replacements(vectors, [np.array([0, 1])], np.array([[2, 3]]), draws=2, seed=0)
    assert (made[0] == -1).all()


def test_erasure_is_brute_force(recommender, histories, items, measured):
    evidence, sets, similar, erased = measured
    compared = 0
    for name, chosen in sets.items():
        for row, place in zip(*np.nonzero((chosen >= 0).any(-1)), strict=True):
            history, picked = histories[row], chosen[row, place][chosen[row, place] >= 0]
            found = (
                erased[name].comprehensiveness[row, place],
                erased[name].sufficiency[row, place],
            )
            if len(picked) == len(history):
                assert np.isnan(found).all()
                continue
            if compared % 7 == 0:  # one by one is slow
                one = items[row : row + 1, place : place + 1]
                gone = np.isin(np.arange(len(history)), picked)
                for value, erase_these in zip(found, (gone, ~gone), strict=True):
                    scores = [
                        item_log_probs(
                            recommender, [np.where(erase_these, similar[row][:, d], history)], one
                        )[0, 0]
                        for d in range(2)
                    ]
                    fall = evidence.log_probs[row, place] - np.mean(scores)
                    assert value == pytest.approx(fall, abs=1e-4)
            compared += 1
    assert compared > 30


def test_nothing_cited_is_not_defined(recommender, histories, items, measured):
    evidence, sets, similar, erased = measured
    nothing = ~(sets[CHAIN] >= 0).any(-1)
    assert nothing.any()
    assert all(np.isnan(e.sufficiency[nothing]).all() for e in erased.values())
    none = erase(
        recommender, histories, items, evidence.log_probs,
        {CHAIN: np.full_like(sets[CHAIN], -1)}, similar,
    )  # fmt: skip
    assert np.isnan(none[CHAIN].comprehensiveness).all()


def test_an_item_without_replacement_is_left_out(recommender, histories, items):
    row = next(i for i, h in enumerate(histories) if len(h) >= 2)
    history, one = histories[row][:2], items[row : row + 1, :1]
    full = item_log_probs(recommender, [history], one)
    made = erase(
        recommender, [history], one, full, {CHAIN: np.array([[[1]]])}, [np.full((2, 1), -1)]
    )
    without = item_log_probs(recommender, [history[:1]], one)
    assert made[CHAIN].comprehensiveness[0, 0] == pytest.approx((full - without)[0, 0], abs=1e-5)
