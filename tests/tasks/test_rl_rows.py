"""RL rows at the end of the training part, and training rows that end before them."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from genrec.tasks.rl_rows import rl_rows, without_reserved
from genrec.tasks.sequential import explode

COLUMNS = ("history_item_index", "target_item_index", "target_position", "supervise_from")


def sequences(shop) -> dict[str, list[int]]:
    """What each user did in the training part: all but the last two interactions."""
    log = shop.interactions.group_by("user_id", maintain_order=True).agg("item_index")
    return {user: items[:-2] for user, items in log.iter_rows()}


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("max_history", [3, 50])
def test_rl_rows_and_what_is_left_of_training(tiny, tmp_path: Path, window: int, max_history: int):
    shop = tiny.shop(max_history=max_history)
    shop.interactions.write_parquet(tmp_path / "interactions.parquet")
    train, parts = shop.splits.train, sequences(shop)
    rl = rl_rows(train, tmp_path, window)
    assert len(rl) == sum(len(items) > 1 for items in parts.values())
    place = {}
    for row in rl.iter_rows(named=True):
        items = parts[row["user_id"]]
        at = place[row["user_id"]] = row["target_position"]
        assert row["future_item_index"] == items[at:] and len(items) - at <= window
        assert row["target_item_index"] == items[at] and row["supervise_from"] >= 1
        assert row["history_item_index"] == items[max(at - row["supervise_from"], 0) : at]
        assert row["seen_item_index"] == sorted(set(items[:at]))
        if len(items) > window and max_history > len(items):
            assert at == len(items) - window
    left = explode(without_reserved(train, rl))
    learned = [(row["user_id"], row["target_position"]) for row in left.iter_rows(named=True)]
    # Each interaction before the RL target is learned as often as before, and none from there on.
    expected = [
        (row["user_id"], row["target_position"])
        for row in explode(train).iter_rows(named=True)
        if row["target_position"] < place.get(row["user_id"], len(train) + 99)
    ]
    assert learned == expected
    for row in left.iter_rows(named=True):
        at, items = row["target_position"], parts[row["user_id"]]
        n = len(row["history_item_index"])
        assert (
            row["history_item_index"] == items[at - n : at]
            and row["target_item_index"] == items[at]
        )


def test_nothing_reserved_leaves_all_rows(tiny, tmp_path: Path):
    shop = tiny.shop()
    shop.interactions.write_parquet(tmp_path / "interactions.parquet")
    train = shop.splits.train
    nobody = rl_rows(train, tmp_path).head(0)
    kept = without_reserved(train, nobody)
    assert kept.select(COLUMNS).equals(train.select(COLUMNS))
    assert isinstance(kept, pl.DataFrame) and kept.columns == train.columns
