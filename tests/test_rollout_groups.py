"""Groups of rollouts: what dynamic sampling keeps, order, seeds, refused choices."""

from __future__ import annotations

import numpy as np
import pytest

from genrec.decoding.sampling import GumbelTopK, LevelSampling
from genrec.rollout_groups import (
    batch_seed,
    best_first,
    check_rollouts,
    chosen,
    n_drawn,
    sampler_of,
)


def test_dynamic_sampling_keeps_the_hit_then_distinct_items_then_repeats():
    items = np.array([[5, 5, 7, 5, 9, 3], [1, 1, 1, 2, 1, 1], [4, -1, 4, -1, 6, -1]])
    places = chosen(items, np.array([3, 8, 6]), 3)
    assert np.take_along_axis(items, places, 1).tolist() == [[3, 5, 7], [1, 2, 1], [6, 4, 4]]
    # A hit that was drawn twice is kept once, as long as there are others.
    again = chosen(np.array([[3, 3, 3, 5, 7]]), np.array([3]), 3)
    assert again.tolist() == [[0, 3, 4]]


def test_groups_are_sorted_by_score():
    items, scores = np.array([[1, 2, 3, 4]]), np.array([[-3.0, -1.0, -2.0, -1.0]])
    assert best_first(items, scores).tolist() == [[2, 4, 3, 1]]
    assert best_first(items, scores, np.array([[0, 2]])).tolist() == [[3, 1]]


def test_what_draws():
    assert sampler_of("beam", 1) is None
    assert sampler_of("gumbel", 1) == GumbelTopK(1)
    assert sampler_of("sample", 1) == LevelSampling(replacement=True, seed=1)
    assert (n_drawn("dynamic", 5, 1.5), n_drawn("sample", 5, 1.5)) == (8, 5)
    seeds = {batch_seed(0, s, p, a) for s in range(5) for p in range(2) for a in range(3)}
    assert len(seeds) == 30 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert batch_seed(3, 2, 1, 0) == batch_seed(3, 2, 1, 0)


def test_choices_that_cannot_be_drawn():
    with pytest.raises(ValueError, match="gumbel with normalizer full"):
        check_rollouts("gumbel", "full", 1.5)
    with pytest.raises(ValueError, match="oversample=1.0 must be above 1"):
        check_rollouts("dynamic", "trie", 1.0)
    check_rollouts("sample", "full", 1.5)
