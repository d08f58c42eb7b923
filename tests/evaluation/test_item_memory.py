"""The item memory's lists against the baseline that it is, and by hand."""

import numpy as np
import polars as pl
import pytest

from genrec.columns import HISTORY, ROW_ID, SUPERVISE_FROM, TARGET, USER_ID
from genrec.evaluation import item_memory
from genrec.evaluation.item_memory import ItemMemory, memory_lists
from genrec.evaluation.knn import ItemKNN, KNNSettings
from genrec.evaluation.profiles import decayed_profiles
from genrec.item_lists import ItemLists, no_items

N_ITEMS = 30
ITEM_IDS = pl.Series([f"item {i}" for i in range(N_ITEMS)])


def rows_of(sequences) -> pl.DataFrame:
    return pl.DataFrame(
        {
            ROW_ID: [f"row-{i:03}" for i in range(len(sequences))],
            USER_ID: list(range(len(sequences))),
            HISTORY: [row[:-1] for row in sequences],
            TARGET: [row[-1] for row in sequences],
            SUPERVISE_FROM: [0] * len(sequences),
        },
        schema_overrides={HISTORY: pl.List(pl.Int32), TARGET: pl.Int32},
    )


@pytest.fixture
def shop():
    rng = np.random.default_rng(0)
    train = rows_of([rng.integers(0, N_ITEMS - 3, n).tolist() for n in rng.integers(2, 9, 60)])
    rows = rows_of([rng.integers(0, N_ITEMS - 3, n).tolist() for n in rng.integers(2, 9, 25)])
    settings = KNNSettings(lag_power=0.5, shrinkage=2.0, neighbours=12, self_weight=0.05)
    return ItemKNN(train, N_ITEMS, settings), rows


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("most", [4, 100])
def test_its_order_is_the_baseline_s(shop, filtered: bool, most: int, monkeypatch):
    memory, rows = shop
    monkeypatch.setattr(item_memory, "BATCH_ROWS", 7)
    monkeypatch.setattr(item_memory, "MOST", most)
    history = ItemLists.from_column(rows[HISTORY])
    seen = history if filtered else no_items(len(rows))
    found = memory_lists(ItemMemory(memory, 2.0), rows, seen, ITEM_IDS)
    lists = memory.recommend(history, seen, 10)
    profile = decayed_profiles(history, N_ITEMS, memory.settings.decay)
    scores = profile @ memory.similarity + memory.settings.self_weight * profile
    scores = np.asarray(scores.todense())
    scores[seen.rows, seen.values] = 0
    n_scored = (scores > 0).sum(1)
    for row in range(len(rows)):
        mine = found.filter(pl.col(ROW_ID) == f"row-{row:03}").sort("score", descending=True)
        assert mine["score"].exp().sum() == pytest.approx(1)
        assert mine["user_id"].unique().to_list() == [row]
        # The first so many of the baseline's list, ties at the end decided as it decides them;
        # which of equal scores comes first is left to the mixture.
        scored = min(len(mine), 10)
        assert scored == min(most, 10, n_scored[row])
        assert set(mine["item_id"][:scored]) == {f"item {i}" for i in lists[row][:scored]}
        assert mine["score"].is_sorted(descending=True)


def test_probabilities_go_by_the_power(shop):
    memory, rows = shop
    seen = no_items(len(rows))
    flat, steep = (memory_lists(ItemMemory(memory, p), rows, seen, ITEM_IDS) for p in (1.0, 3.0))
    both = flat.join(steep, on=[ROW_ID, "item_id"], validate="1:1").sort(ROW_ID, "score")
    for _, row in both.group_by(ROW_ID):
        apart = row["score"] - row["score"].max()
        np.testing.assert_allclose(row["score_right"] - row["score_right"].max(), 3 * apart)
    # Where a plain power of the scores would be 0.
    extreme = memory_lists(ItemMemory(memory, 4000.0), rows, seen, ITEM_IDS)
    assert extreme["score"].is_finite().all() and (extreme["score"] <= 1e-9).all()
    for power in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="memory_power="):
            ItemMemory(memory, power)


def test_rows_that_it_knows_nothing_of_have_no_line(shop):
    memory, _ = shop
    rows = rows_of([[N_ITEMS - 1, 0], [1], [3, 4, 5]])  # an item that nobody had; no history
    found = memory_lists(ItemMemory(memory), rows, no_items(3), ITEM_IDS)
    assert found.filter(pl.col(ROW_ID) == "row-001").is_empty()
    assert not found.filter(pl.col(ROW_ID) == "row-002").is_empty()
    nothing = memory_lists(ItemMemory(memory), rows.head(0), no_items(0), ITEM_IDS)
    assert nothing.is_empty() and nothing.columns == [ROW_ID, USER_ID, "item_id", "score"]
