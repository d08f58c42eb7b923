"""Leave-one-out rows: hand-computed windows, the 'target exactly once' property, the hash."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.columns import (
    HISTORY,
    ITEM_INDEX,
    ROW_ID,
    SEEN,
    SUPERVISE_FROM,
    TARGET,
    TARGET_POSITION,
    TARGET_TIME,
    USER_ID,
)
from genrec.data.leaks import check_splits
from genrec.data.splits import content_sha256, leave_one_out


def log_of(sequences: dict[str, list[int]]) -> pl.DataFrame:
    rows = [
        {"user_id": user, "item_index": item, "timestamp": 100 * place + item, "position": place}
        for user, items in sequences.items()
        for place, item in enumerate(items)
    ]
    return pl.DataFrame(rows, schema_overrides={"item_index": pl.Int32, "position": pl.Int32})


def short(rows: pl.DataFrame) -> list[tuple[str, list[int], int, int]]:
    return list(rows.select(USER_ID, HISTORY, TARGET, SUPERVISE_FROM).iter_rows())


def test_windows_of_a_long_sequence_by_hand():
    # 12 items, so 10 in training; windows of at most 5 items, each ending 2 later.
    splits = leave_one_out(log_of({"u": list(range(12))}), n_items=12, max_history=4)
    assert short(splits.train) == [
        ("u", [0, 1, 2, 3], 4, 0),  # supervises 0 1 2 3 4
        ("u", [2, 3, 4, 5], 6, 3),  # supervises 5 6
        ("u", [4, 5, 6, 7], 8, 3),  # supervises 7 8
        ("u", [5, 6, 7, 8], 9, 4),  # supervises 9, the end
    ]
    assert short(splits.valid) == [("u", [6, 7, 8, 9], 10, 4)]
    assert short(splits.test) == [("u", [7, 8, 9, 10], 11, 4)]
    assert splits.valid[SEEN].to_list() == [list(range(10))]
    assert splits.test[SEEN].to_list() == [list(range(11))]
    assert splits.train[TARGET_TIME].to_list() == [404, 606, 808, 909]
    assert splits.test[TARGET_TIME].to_list() == [1111]
    assert splits.train[TARGET_POSITION].to_list() == [4, 6, 8, 9]
    assert splits.test[TARGET_POSITION].to_list() == [11]
    assert splits.shares == {"train": 10 / 12, "valid": 1 / 12, "test": 1 / 12}
    assert (splits.boundaries, splits.dropped, splits.tied_test_targets) == ({}, {}, 0.0)


def test_max_history_of_one_advances_one_item_at_a_time():
    splits = leave_one_out(log_of({"u": [3, 1, 2, 0, 4]}), n_items=5, max_history=1)
    assert short(splits.train) == [("u", [3], 1, 0), ("u", [1], 2, 1)]
    assert short(splits.test) == [("u", [0], 4, 1)]


def test_users_of_one_two_and_three_items():
    splits = leave_one_out(log_of({"a": [5], "b": [1, 2], "c": [2, 1, 0]}), 6, max_history=3)
    assert short(splits.train) == [("a", [], 5, 0), ("b", [1], 2, 0), ("c", [], 2, 0)]
    assert short(splits.valid) == [("c", [2], 1, 1)]
    assert short(splits.test) == [("c", [2, 1], 0, 2)]
    assert splits.train_only_users == 2
    assert splits.train_count.tolist() == [0, 1, 2, 0, 0, 1]
    assert splits.train[ROW_ID].to_list() == ["train-000000", "train-000001", "train-000002"]
    assert splits.test[ROW_ID].to_list() == ["test-000000"]


def test_seen_items_are_sorted_and_distinct():
    splits = leave_one_out(log_of({"u": [4, 1, 4, 0, 1, 3]}), n_items=5, max_history=2)
    assert splits.valid[SEEN].to_list() == [[0, 1, 4]]
    assert splits.test[SEEN].to_list() == [[0, 1, 4]]
    assert splits.test[HISTORY].to_list() == [[0, 1]]


def test_no_user_to_evaluate_gives_empty_tables_of_the_same_columns():
    splits = leave_one_out(log_of({"a": [1, 0]}), n_items=2)
    assert splits.valid.height == splits.test.height == 0
    assert splits.valid.columns == [*splits.train.columns, SEEN]
    assert splits.train.schema[HISTORY] == splits.test.schema[SEEN] == pl.List(pl.Int32)


def test_max_history_below_one_is_refused():
    with pytest.raises(ValueError, match="max_history=0 must be at least 1"):
        leave_one_out(log_of({"a": [1, 0]}), n_items=2, max_history=0)


def test_targets_that_the_tie_rule_decides_are_counted():
    log = log_of({"a": [0, 1, 2], "b": [3, 4, 5]})
    tied = log.with_columns(pl.Series("timestamp", [1, 2, 3, 1, 5, 5]))
    assert leave_one_out(tied, 6).tied_test_targets == 0.5
    finer = tied.with_columns(pl.Series("subsecond", [0, 0, 0, 0, 100_000, 200_000]))
    assert leave_one_out(finer, 6).tied_test_targets == 0  # the clock tells them apart
    unknown = log.with_columns(pl.lit(None, dtype=pl.Int64).alias("timestamp"))
    assert leave_one_out(unknown, 6).tied_test_targets is None


TABLE = pl.DataFrame(
    {
        "user_id": ["a", None, "ü"],
        "target_item_index": pl.Series([1, 2, None], dtype=pl.Int32),
        "history_item_index": pl.Series([[3, 4], [], None], dtype=pl.List(pl.Int32)),
    }
)


def test_content_hash_by_hand():
    """What the docstring says, byte for byte; the pinned value must hold on every machine."""
    data = b"test/history_item_index/list/3\n" + bytes([1, 1, 0]) + struct.pack("<3q", 2, 0, 0)
    data += struct.pack("<2q", 3, 4)
    data += b"test/target_item_index/integer/3\n" + bytes([1, 1, 0]) + struct.pack("<3q", 1, 2, 0)
    data += b"test/user_id/text/3\n" + bytes([1, 0, 1]) + struct.pack("<3q", 1, 0, 2)
    data += "aü".encode()
    assert hashlib.sha256(data).hexdigest() == content_sha256({"test": TABLE})
    pinned = "348a6d3ead09565203a74d26b18ffe305856d3e200d33b7654f757e60ce08cf8"
    assert content_sha256({"test": TABLE}) == pinned


def test_content_hash_is_of_the_content_alone(tmp_path: Path, monkeypatch):
    found = content_sha256({"test": TABLE})
    assert content_sha256({"test": TABLE.select(sorted(TABLE.columns, reverse=True))}) == found
    chunked = pl.concat([TABLE[:1], TABLE[1:]], rechunk=False)
    assert content_sha256({"test": chunked}) == found
    wider = TABLE.with_columns(pl.col("target_item_index").cast(pl.Int64))
    assert content_sha256({"test": wider}) == found
    for settings_ in (
        {"compression": "uncompressed"},
        {"compression": "gzip", "row_group_size": 1},
    ):
        TABLE.write_parquet(tmp_path / "t.parquet", **settings_)
        assert content_sha256({"test": pl.read_parquet(tmp_path / "t.parquet")}) == found
    monkeypatch.setattr("genrec.data.splits._HASH_ROWS", 2)
    assert content_sha256({"test": TABLE}) == found
    for other in (
        {"valid": TABLE},
        {"test": TABLE[::-1]},
        {"test": TABLE.with_columns(pl.col("target_item_index").fill_null(0))},
        {"test": TABLE.with_columns(pl.lit("aü").alias("user_id"))},
        {"test": TABLE[:2]},
    ):
        assert content_sha256(other) != found
    with pytest.raises(ValueError, match="column 'x' is Float64"):
        content_sha256({"test": pl.DataFrame({"x": [1.5]})})


def test_split_hash_covers_all_three_parts():
    log = log_of({"a": [5, 4, 3, 2], "b": [1, 2, 3]})
    pinned = leave_one_out(log, 6).sha256()
    assert pinned == "07c3a10b8fbee74b64cc3ab0a74edc130171a27408989cce221374c59250ba7b"
    assert leave_one_out(log, 6, max_history=1).sha256() != pinned  # only histories differ


@settings(max_examples=80, deadline=None)
@given(
    sequences=st.lists(
        st.lists(st.integers(0, 6), min_size=1, max_size=40), min_size=1, max_size=6
    ),
    max_history=st.integers(1, 12),
)
def test_every_interaction_is_a_target_exactly_once(sequences, max_history):
    log = log_of({f"u{i}": items for i, items in enumerate(sequences)})
    splits = leave_one_out(log, n_items=7, max_history=max_history)
    check_splits(splits.train, splits.valid, splits.test, log, "leave-one-out", 7)
    learned: dict[str, list[int]] = {user: [] for user in log[USER_ID].unique()}
    for user, history, target, start in short(splits.train):
        assert len(history) <= max_history
        window = [*history, target]
        assert start < len(window)
        # Context is exactly what came before: the supervised part goes on where it left off.
        done = learned[user]
        assert window[:start] == done[len(done) - start :]
        done.extend(window[start:])
    for row in (*short(splits.valid), *short(splits.test)):
        user, history, target, start = row
        assert start == len(history)
        assert history == learned[user][-max_history:]
        learned[user].append(target)
    for i, items in enumerate(sequences):
        assert learned[f"u{i}"] == items
    ids = pl.concat([s[ROW_ID] for s in (splits.train, splits.valid, splits.test)])
    assert ids.n_unique() == len(ids)
    trained = splits.train_count.sum() + splits.valid.height + splits.test.height
    assert trained == log[ITEM_INDEX].len()
