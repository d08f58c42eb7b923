"""EASE against the formula of the paper, and its tuning."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp

from genrec.evaluation import linear
from genrec.evaluation.baselines import item_counts, popularity_order
from genrec.evaluation.linear import (
    EASE_GRID,
    EaseSettings,
    ease_weights,
    tune_ease,
    user_item_matrix,
)
from genrec.evaluation.profiles import recommend_by_similarity
from genrec.item_lists import ItemLists, no_items
from genrec.metrics import ndcg_at_k


def rows_of(*rows: tuple[str, list[int], int]) -> pl.DataFrame:
    return pl.DataFrame(
        [(user, history, target, 0) for user, history, target in rows],
        schema={
            "user_id": pl.String,
            "history_item_index": pl.List(pl.Int32),
            "target_item_index": pl.Int32,
            "supervise_from": pl.Int32,
        },
        orient="row",
    )


def textbook(matrix: np.ndarray, regularization: float) -> np.ndarray:
    """Steck 2019, eq. 8: B = I - P diag(1 / diag P), P the inverse of X'X + lambda I."""
    p = np.linalg.inv(matrix.T @ matrix + regularization * np.eye(matrix.shape[1]))
    return np.eye(len(p)) - p / np.diag(p)


@pytest.mark.parametrize("regularization", [0.5, 100.0])
def test_weights_equal_the_textbook_formula(regularization):
    matrix = (np.random.default_rng(0).random((60, 25)) < 0.3).astype(float)
    matrix[:, 7] = 0  # an item that nobody has
    found = ease_weights(sp.csr_matrix(matrix, dtype=np.float32), regularization)
    expected = textbook(matrix, regularization)
    assert found.dtype == np.float32 and (np.diag(found) == 0).all()
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert not found[7].any() and not found[:, 7].any()
    assert np.abs(found - found.T).max() > 1e-3  # columns are divided, not rows


def test_blocks_of_more_than_a_thousand_items():
    rng = np.random.default_rng(1)
    matrix = sp.random(300, 1500, density=0.02, random_state=rng, dtype=np.float32)
    matrix.data[:] = 1
    found = ease_weights(matrix.tocsr(), 20.0)
    np.testing.assert_allclose(found, textbook(matrix.toarray().astype(float), 20.0), atol=1e-4)


def test_weights_minimise_the_regularised_error():
    """Without its own column, each item's weights solve a ridge regression."""
    matrix = (np.random.default_rng(2).random((40, 6)) < 0.5).astype(float)
    found = ease_weights(sp.csr_matrix(matrix, dtype=np.float32), 3.0)
    for item in range(6):
        others = [i for i in range(6) if i != item]
        x = matrix[:, others]
        ridge = np.linalg.solve(x.T @ x + 3.0 * np.eye(5), x.T @ matrix[:, item])
        np.testing.assert_allclose(found[others, item], ridge, atol=1e-5)


def test_too_many_items_are_refused_before_anything_is_inverted(monkeypatch):
    monkeypatch.setattr(linear, "MAX_ITEMS", 5)
    with pytest.raises(ValueError, match="matrix of 6 x 6; it is meant for at most 5 items"):
        ease_weights(sp.csr_matrix((2, 6), dtype=np.float32), 1.0)


def test_users_by_items_counts_repeats_and_windows_once():
    rows = rows_of(("b", [0, 1, 0], 2), ("b", [1, 2], 3), ("a", [], 4))
    assert user_item_matrix(rows, 6).toarray().tolist() == [[0, 0, 0, 0, 1, 0], [1, 1, 1, 1, 0, 0]]


def test_tuning_picks_the_best_trial_and_inverts_once_per_regularization(monkeypatch):
    rng = np.random.default_rng(0)
    rows = rows_of(
        *[(f"u{i}", [i % 5, (i + 1) % 5, int(rng.integers(10))], 5 + i % 5) for i in range(60)]
    )
    valid = rows_of(*[(f"u{i}", [i % 5, (i + 1) % 5], 5 + i % 5) for i in range(60)])
    seen = ItemLists.from_column(valid["history_item_index"])
    inverted: list[float] = []

    def counting(matrix, regularization):
        inverted.append(regularization)
        return ease_weights(matrix, regularization)

    monkeypatch.setattr(linear, "ease_weights", counting)
    best, trials = tune_ease(rows, valid, seen, 10, k=2)
    tried = [tuple(trial["settings"].items()) for trial in trials]
    assert len(set(tried)) == len(tried) and len(inverted) <= len(EASE_GRID["regularization"]) + 1
    top = max(trial["ndcg"] for trial in trials)
    assert [t["ndcg"] for t in trials if EaseSettings(**t["settings"]) == best] == [top]
    lists = recommend_by_similarity(
        ease_weights(user_item_matrix(rows, 10), best.regularization),
        popularity_order(item_counts(rows, 10)),
        seen, seen, 2, best.decay,
    )  # fmt: skip
    assert ndcg_at_k(lists, valid["target_item_index"].to_numpy(), 2) == top > 0.5
    with pytest.raises(ValueError, match="tuned on validation rows, and there are none"):
        tune_ease(rows, valid[:0], seen, 10)
    assert EaseSettings(100, 0.5).describe() == "regularization=100, decay=0.5, self_weight=0"


def test_where_repeats_are_allowed_the_self_weight_is_tuned_too():
    """The next item is always the one before: without a weight on itself EASE cannot say so."""
    rows = rows_of(*[(f"u{i}", [i % 6, (i * 5 + 1) % 6], (i * 2 + 3) % 6) for i in range(60)])
    valid = rows_of(*[(f"u{i}", [(i + 1) % 6, i % 6], i % 6) for i in range(30)])
    seen = no_items(30)
    for grid, ndcg in (({"decay": [0.5]}, None), ({"self_weight": [0.0, 5.0]}, 1)):
        best, trials = tune_ease(rows, valid, seen, 6, grid, k=1)
        top = max(trial["ndcg"] for trial in trials)
        assert top < 1 if ndcg is None else top == 1 and best.self_weight == 5
