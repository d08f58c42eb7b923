"""What counts as new for an earlier model, and how much of the old is replayed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.columns import HISTORY_ITEMS, ROW_ID, TARGETS, TASK, USER_ID
from genrec.data.cleaning import clean
from genrec.data.readers import RawData
from genrec.data.splits import leave_one_out
from genrec.data.synthetic import DAYS, EPOCH, synthetic_shop
from genrec.data.time_splits import time_cutoff
from genrec.tasks.instruction_rows import InstructionRows
from genrec.tasks.refresh import apart, compare, refresh_plan
from genrec.tasks.sequential import explode, sequential_rows

DAY = 86_400


def write(folder: Path, catalog: pl.DataFrame, interactions: pl.DataFrame, train: pl.DataFrame):
    folder.mkdir(parents=True, exist_ok=True)
    catalog.write_parquet(folder / "catalog.parquet")
    interactions.write_parquet(folder / "interactions.parquet")
    train.write_parquet(folder / "train.parquet")
    return folder


def prepared(folder: Path, histories: dict[str, str], timed: bool = True, cut: int = 20) -> Path:
    """Users and the items that they had, a letter each, one a day; all of it trains but two."""
    rows = [
        {"user_id": user, "item_id": item, "timestamp": DAY * (day + 1) if timed else None}
        for user, items in histories.items()
        for day, item in enumerate(items)
        if item != "."  # a day without anything
    ]
    kinds = {
        "user_id": pl.String,
        "item_id": pl.String,
        "timestamp": pl.Int64,
        "rating": pl.Float64,
    }
    log = pl.DataFrame([{**row, "rating": None} for row in rows], schema=kinds)
    items = sorted({row["item_id"] for row in rows})
    catalog = pl.DataFrame({"item_id": items, "title": [f"title {i}" for i in items]})
    data = clean(RawData(interactions=log, catalog=catalog, users=None))
    splits = leave_one_out(data.interactions, data.catalog.height, max_history=cut)
    return write(folder, data.catalog, data.interactions, splits.train)


def instruction_rows(folder: Path, per_item: bool = False) -> InstructionRows:
    """The sequential rows, and a title row for each item, as build_dataset names them."""
    train = pl.read_parquet(folder / "train.parquet")
    sequential = sequential_rows(explode(train) if per_item else train)
    single = sequential_rows(explode(train)).with_columns(
        (pl.lit("titles_to_sid:") + pl.col(ROW_ID)).alias(ROW_ID),
        pl.lit("titles_to_sid").alias(TASK),
    )
    catalog = pl.read_parquet(folder / "catalog.parquet")
    item = pl.DataFrame(
        {
            ROW_ID: "title_to_sid:" + catalog["item_id"],
            USER_ID: pl.Series([None] * catalog.height, dtype=pl.String),
            TASK: ["title_to_sid"] * catalog.height,
            "target_kind": ["sids"] * catalog.height,
            TARGETS: [[i] for i in range(catalog.height)],
            HISTORY_ITEMS: pl.Series([[]] * catalog.height, dtype=pl.List(pl.Int32)),
        }
    ).cast({TARGETS: pl.List(pl.Int32)})
    table = pl.concat([sequential, single, item.select(sequential.columns)])
    return InstructionRows(table, None, None, 0, None)  # type: ignore[arg-type]


def letters(folder: Path, table: pl.DataFrame, task: str = "sequential") -> list[tuple]:
    """(user, history, targets) of the rows of a family, in letters."""
    items = pl.read_parquet(folder / "catalog.parquet")["item_id"].to_list()
    rows = table.filter(pl.col(TASK) == task).select(USER_ID, HISTORY_ITEMS, TARGETS)
    return sorted(
        (user or "", "".join(items[i] for i in had), "".join(items[i] for i in wanted))
        for user, had, wanted in rows.iter_rows()
    )


def test_the_new_part_of_a_row_is_supervised_and_the_old_part_can_be_replayed(tmp_path: Path):
    # Of each user the last two are held out: "ann" trained on abc before and on abcde now.
    before = prepared(tmp_path / "1", {"ann": "abcxy", "bob": "bcaxy", "cid": "abxy"})
    now = prepared(
        tmp_path / "2", {"ann": "abcxyde", "bob": "bcaxy", "eve": "dceab", "cid": "abxye"}
    )
    novelty = compare(now, before)
    assert novelty.new_interactions == 2 + 0 + 3 + 1
    assert (novelty.gone_interactions, novelty.known_held_out) == (0, 0)
    rows = instruction_rows(now)
    parts = apart(rows, novelty)
    new, old = parts.rows.table[: parts.n_new], parts.rows.table[parts.n_new :]
    assert letters(now, new) == [("ann", "abc", "xy"), ("cid", "ab", "x"), ("eve", "", "dce")]
    assert letters(now, old) == [("ann", "", "abc"), ("bob", "", "bca"), ("cid", "", "ab")]
    # Rows of one interaction are new or old as a whole; those of items by the catalogue.
    assert letters(now, new, "titles_to_sid") == [
        ("ann", "abc", "x"), ("ann", "abcx", "y"), ("cid", "ab", "x"), ("eve", "", "d"),
        ("eve", "d", "c"), ("eve", "dc", "e"),
    ]  # fmt: skip
    assert len(letters(now, old, "titles_to_sid")) == 8
    assert letters(now, new, "title_to_sid") == [("", "", "d"), ("", "", "e")]
    assert letters(now, old, "title_to_sid") == [("", "", item) for item in "abcxy"]
    assert all(
        rows.table[ROW_ID][int(origin)] == row_id
        for origin, row_id in zip(parts.origin, parts.rows.table[ROW_ID], strict=True)
    )


def test_rows_per_item_are_parted_as_a_whole(tmp_path: Path):
    before = prepared(tmp_path / "1", {"ann": "abcxy"})
    now = prepared(tmp_path / "2", {"ann": "abcxyde"})
    parts = apart(instruction_rows(now, per_item=True), compare(now, before))
    new, old = parts.rows.table[: parts.n_new], parts.rows.table[parts.n_new :]
    assert letters(now, new) == [("ann", "abc", "x"), ("ann", "abcx", "y")]
    assert letters(now, old) == [("ann", "", "a"), ("ann", "a", "b"), ("ann", "ab", "c")]


def test_known_interactions_stay_known_when_positions_move(tmp_path: Path):
    before = prepared(tmp_path / "1", {"ann": ".bcdxy", "bob": "abcxyz"})
    # An item that wasn't there comes before all of ann's; bob's first two were dropped.
    now = prepared(tmp_path / "2", {"ann": "abcdxyz", "bob": "..cxyzab"})
    novelty = compare(now, before)
    parts = apart(instruction_rows(now), novelty)
    new = parts.rows.table[: parts.n_new]
    assert novelty.new_interactions == 2 + 2 and novelty.gone_interactions == 2
    # From the first new one on: what lies behind it is repeated.
    assert letters(now, new) == [("ann", "", "abcdx"), ("bob", "cx", "yz")]


@pytest.mark.parametrize("timed", [True, False])
def test_the_same_item_again_is_new(tmp_path: Path, timed: bool):
    before = prepared(tmp_path / "1", {"ann": "abaxy"}, timed)
    now = prepared(tmp_path / "2", {"ann": "abaxyaab", "bob": "ab"}, timed)
    parts = apart(instruction_rows(now), compare(now, before))
    new = parts.rows.table[: parts.n_new]
    assert letters(now, new) == [("ann", "aba", "xya"), ("bob", "", "ab")]


def test_a_changed_title_is_new(tmp_path: Path):
    before = prepared(tmp_path / "1", {"ann": "abcxy"})
    now = prepared(tmp_path / "2", {"ann": "abcxy", "bob": "abc"})
    catalog = pl.read_parquet(now / "catalog.parquet")
    titles = ["title a", "another one", *catalog["title"].to_list()[2:]]
    catalog.with_columns(pl.Series("title", titles)).write_parquet(now / "catalog.parquet")
    assert compare(now, before).new_items.tolist() == [False, True, False, False, False]


def test_what_was_trained_on_must_not_be_held_out_now(tmp_path: Path):
    before = prepared(tmp_path / "1", {"ann": "abcdexy", "bob": "abcdexy"})
    now = prepared(tmp_path / "2", {"ann": "abcd", "bob": "abcdexyz"})
    with pytest.raises(ValueError, match="2 of the 4 interactions that .* holds out were trained"):
        compare(now, before)
    numbers = prepared(tmp_path / "3", {"ann": "abcd"})
    log = pl.read_parquet(numbers / "interactions.parquet")
    log.with_columns(pl.lit(7).alias("user_id")).write_parquet(numbers / "interactions.parquet")
    train = pl.read_parquet(numbers / "train.parquet")
    train.with_columns(pl.lit(7).alias("user_id")).write_parquet(numbers / "train.parquet")
    with pytest.raises(ValueError, match="user_id is Int32 .* String in .*; prepare both alike"):
        compare(numbers, before)


def test_nothing_new_is_refused(tmp_path: Path):
    before = prepared(tmp_path / "1", {"ann": "abcxy"})
    now = prepared(tmp_path / "2", {"ann": "abcxy"})
    with pytest.raises(ValueError, match="nothing to train"):
        apart(instruction_rows(now), compare(now, before))


def test_the_parts_of_a_shop_are_the_difference_of_its_training_parts(tmp_path: Path):
    """Nothing of the validation or test period is supervised, nothing new is left out."""
    shop = synthetic_shop(150, 60, 3)
    folders, splits = [], []
    for number, (valid, test, end) in enumerate([(0.6, 0.65, 0.7), (0.8, 0.85, 1.0)]):
        moments = [EPOCH + int(share * DAYS * DAY) for share in (valid, test, end)]
        raw = RawData(
            shop.interactions.filter(pl.col("timestamp") < moments[2]), shop.catalog, None
        )
        data = clean(raw)
        made = time_cutoff(
            data.interactions, data.catalog.height, moments[0], moments[1], max_history=5
        )
        folders.append(write(tmp_path / str(number), data.catalog, data.interactions, made.train))
        splits.append((data, made, moments))
    parts = apart(instruction_rows(folders[1]), compare(folders[1], folders[0]))
    names = pl.read_parquet(folders[1] / "catalog.parquet")["item_id"]

    def taught(table: pl.DataFrame) -> list[tuple[str, str]]:
        rows = table.filter(pl.col(TASK) == "sequential").select(USER_ID, TARGETS).explode(TARGETS)
        return sorted(zip(rows[USER_ID], names.gather(rows[TARGETS]), strict=True))

    def between(start: int, end: int) -> list[tuple[str, str]]:
        log = shop.interactions.filter(pl.col("timestamp").is_between(start, end, closed="left"))
        return sorted(zip(log[USER_ID], log["item_id"], strict=True))

    assert taught(parts.rows.table[: parts.n_new]) == between(splits[0][2][0], splits[1][2][0])
    assert taught(parts.rows.table[parts.n_new :]) == between(0, splits[0][2][0])
    # Histories only hold what came before: each row is a piece of its user's sequence.
    log = splits[1][0].interactions.group_by(USER_ID, maintain_order=True).agg("item_index")
    sequence = {user: list(items) for user, items in log.iter_rows()}
    rows = parts.rows.table.filter(pl.col(TASK) == "sequential")
    for user, had, wanted in rows.select(USER_ID, HISTORY_ITEMS, TARGETS).iter_rows():
        whole, piece = sequence[user], had + wanted
        assert any(whole[i : i + len(piece)] == piece for i in range(len(whole)))


def families(n_new: dict[str, int], n_old: dict[str, int]) -> tuple[pl.Series, int]:
    names = [n for n, c in n_new.items() for _ in range(c)]
    old = [n for n, c in n_old.items() for _ in range(c)]
    return pl.Series(TASK, names + old), len(names)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.9])
def test_replay_is_the_share_that_was_asked_for(share: float):
    tasks, n_new = families(
        {"sequential": 90, "title_to_sid": 10}, {"sequential": 300, "rating": 100}
    )
    made = refresh_plan(tasks, n_new, 3, share, seed=4)
    assert made.length == 100 + round(100 * share / (1 - share))
    seen: list[int] = []
    for epoch in range(3):
        rows = made.slice(epoch)[0]
        assert sorted(rows[rows < n_new]) == list(range(100))  # each new row once
        old = rows[rows >= n_new]
        assert len(old) == made.length - 100
        assert abs(len(old) / made.length - share) <= 0.5 / made.length
        if len(old):  # in proportion to the families: three of four are sequential
            assert abs((tasks.gather(old) == "sequential").sum() - 0.75 * len(old)) < 1
        seen += old.tolist()
    counts = np.bincount(np.array(seen, dtype=int), minlength=500)[n_new:]
    for part in (counts[:300], counts[300:]):
        assert part.max() - part.min() <= 1  # none comes back before all of its family were seen
    again = refresh_plan(tasks, n_new, 3, share, seed=4)
    assert (again.rows == made.rows).all() and (again.epochs == made.epochs).all()
    if share:
        other = refresh_plan(tasks, n_new, 3, share, seed=5)
        assert set(other.rows.tolist()) != set(made.rows.tolist()) or share > 0.8
    # A row drawn again is rendered with its next template.
    for row in (0, int(made.rows[-1])):
        assert made.epochs[made.rows == row].tolist() == list(range((made.rows == row).sum()))


def test_weights_hold_for_replay_too():
    tasks, n_new = families({"sequential": 50}, {"sequential": 100, "title_to_sid": 100})
    made = refresh_plan(tasks, n_new, 1, 0.5, {"title_to_sid": [0.0]})
    assert set(tasks.gather(made.rows)) == {"sequential"} and made.length == 100
    made = refresh_plan(tasks, n_new, 1, 0.5, {"title_to_sid": [3.0]})
    assert (
        tasks.gather(made.rows) == "title_to_sid"
    ).sum() == 37  # 37.5 of each: the first family gets the odd row
    with pytest.raises(ValueError, match="'rating', which the dataset doesn't have"):
        refresh_plan(tasks, n_new, 1, 0.5, {"rating": [1.0]})
    with pytest.raises(ValueError, match="no old row that the weights leave"):
        refresh_plan(*families({"sequential": 5}, {"rating": 5}), 1, 0.5, {"rating": [0.0]})
    with pytest.raises(ValueError, match=r"replay_share=1.0 must lie in \[0, 1\)"):
        refresh_plan(tasks, n_new, 1, 1.0)
