"""Users from tables of every kind, in parts."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

import genrec.generation.users
from genrec.generation.users import (
    SplitRows,
    UserColumns,
    UserTable,
    count_allowed,
    remove_copy,
    source_marks,
    source_sha256,
)

NUMBERS = pl.Series("item_id", [30, 10, 20, 40])
NAMES = pl.Series("item_id", ["c", "a", "b", "d"])
USERS = pl.DataFrame(
    {
        "user_id": ["u1", "u2", "u3", "u1"],
        "history": [[10, 20, 10], [], None, [40]],
        "stop": [None, [30], [], [10, 10]],
        "pool": [[20, 30], [10], [40], [30]],
    }
)
ROWS = [[1, 2, 1], [], [], [3]]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    USERS.write_parquet(tmp_path / "users.parquet")
    return tmp_path / "users.parquet"


def histories(users: UserTable) -> list[list[int]]:
    return users.read(0, users.n_rows)["history_item_index"].to_list()


def test_a_parquet_file(parquet: Path):
    users = UserTable(parquet, NUMBERS, UserColumns(exclude="stop", candidates="pool"))
    assert users.n_rows == 4
    part = users.read(0, 10)
    assert part["row_id"].to_list() == [f"users-{i:010d}" for i in range(4)]
    assert part["user_id"].to_list() == USERS["user_id"].to_list()
    assert part["history_item_index"].to_list() == ROWS
    assert part["seen_item_index"].to_list() == [[1, 2, 1], [0], [], [3, 1, 1]]
    assert part["candidates"].to_list() == [[2, 0], [1], [3], [0]]
    assert part["unknown_items"].to_list() == [0] * 4
    assert_frame_equal(users.read(1, 2), part[1:3])
    plain = UserTable(parquet, NUMBERS, filter_seen=False).read(0, 4)
    assert plain.columns == ["row_id", "user_id", "history_item_index", "unknown_items"]
    seen = UserTable(parquet, NUMBERS).read(0, 4)["seen_item_index"]
    assert seen.to_list() == ROWS


def test_every_source_gives_the_same_rows(parquet: Path, tmp_path: Path):
    wanted = UserTable(parquet, NUMBERS).read(0, 4)
    plain = USERS.select("user_id", "history")
    joined = plain.with_columns(pl.col("history").cast(pl.List(pl.String)).list.join(" "))
    joined.write_csv(tmp_path / "users.csv")
    joined.write_csv(tmp_path / "users.tsv", separator="\t")
    plain.write_ndjson(tmp_path / "users.jsonl")
    (tmp_path / "zipped.csv.gz").write_bytes(gzip.compress((tmp_path / "users.csv").read_bytes()))
    joined.write_parquet(tmp_path / "joined.parquet")
    (tmp_path / "folder").mkdir()
    plain[:3].write_parquet(tmp_path / "folder" / "a.parquet")
    plain[3:].write_parquet(tmp_path / "folder" / "b.parquet")
    names = "users.csv users.tsv users.jsonl zipped.csv.gz joined.parquet folder".split()
    for name in names:
        scratch = tmp_path / f"scratch {name}"
        scratch.mkdir()
        users = UserTable(tmp_path / name, NUMBERS, scratch=scratch)
        assert_frame_equal(users.read(0, 4), wanted)
        copies = list(scratch.iterdir())
        assert len(copies) == (name not in ("joined.parquet", "folder"))
        again = UserTable(tmp_path / name, NUMBERS, scratch=scratch)
        assert_frame_equal(again.read(2, 1), wanted[2:3])
        remove_copy(scratch)
        remove_copy(scratch)
        assert not list(scratch.iterdir())
    with pytest.raises(ValueError, match="is text: name a folder for its Parquet copy"):
        UserTable(tmp_path / "users.csv", NUMBERS)


def test_a_hugging_face_dataset(parquet: Path, tmp_path: Path):
    import datasets

    saved = tmp_path / "saved"
    datasets.DatasetDict({"test": datasets.Dataset.from_polars(USERS)}).save_to_disk(saved)
    users = UserTable(saved, NUMBERS, split="test")
    assert_frame_equal(users.read(1, 3), UserTable(parquet, NUMBERS).read(1, 3))
    assert source_sha256(saved, "test") == source_sha256(saved, "test")
    with pytest.raises(ValueError, match="has no split 'train'"):
        UserTable(saved, NUMBERS)
    with pytest.raises(ValueError, match="no column 'items'"):
        UserTable(saved, NUMBERS, UserColumns(history="items"), split="test")


def test_candidates_of_some_users_alone(tmp_path: Path):
    """Null is no limit, as for the engine; an empty list, and one of unknown items, is nothing."""
    lists = [[20, 99], None, [], [99], [30, 10]]
    table = pl.DataFrame({"user_id": range(5), "history": [[10], [10, 20], [], [], [30]]})
    columns = UserColumns(candidates="pool")
    texts = pl.Series("pool", lists).list.eval(pl.element().cast(pl.String)).list.join(" ")
    arrays = pl.Series("pool", [[20], None, [30], [40], [10]], dtype=pl.Array(pl.Int64, 1))
    for name, pool, wanted in (
        ("lists", pl.Series("pool", lists), [[2], None, [], [], [0, 1]]),
        ("texts", texts, [[2], None, [], [], [0, 1]]),
        ("arrays", arrays, [[2], None, [0], [3], [1]]),
        ("nulls", pl.Series("pool", [None] * 5), [None] * 5),
    ):
        table.with_columns(pool).write_parquet(tmp_path / f"{name}.parquet")
        users = UserTable(tmp_path / f"{name}.parquet", NUMBERS, columns, unknown_items="drop")
        part = users.read(0, 5)
        assert part["candidates"].to_list() == wanted, name
        allowed, seen = np.array([True, True, True, False]), part["seen_item_index"].to_list()
        left = [
            len({0, 1, 2} & set(range(4) if own is None else own) - set(gone))
            for own, gone in zip(wanted, seen, strict=True)
        ]
        assert count_allowed(part, allowed).tolist() == left, name
    (tmp_path / "u.csv").write_text("user_id,history,pool\na,10,20 99\nb,,\n")
    users = UserTable(tmp_path / "u.csv", NUMBERS, columns, "drop", scratch=tmp_path)
    assert users.read(0, 2)["candidates"].to_list() == [[2], None]


def test_large_row_groups_are_copied_into_small_ones(monkeypatch, tmp_path: Path):
    """pyarrow's default group of a million rows would be decoded whole for every few of them."""
    monkeypatch.setattr(genrec.generation.users, "WINDOW", 4)
    monkeypatch.setattr(genrec.generation.users, "GROUP", 2)
    table = pl.DataFrame({"user_id": range(11), "history": [[10 * (i % 5)] for i in range(11)]})
    table = table.with_columns(much=pl.lit("text"))
    folder, scratch = tmp_path / "users", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    table[:9].write_parquet(folder / "a.parquet", row_group_size=9)
    table[9:].write_parquet(folder / "b.parquet", row_group_size=9)
    plain = UserTable(folder, NUMBERS, unknown_items="drop")  # read where it lies
    users = UserTable(folder, NUMBERS, unknown_items="drop", scratch=scratch)
    (copy,) = scratch.iterdir()
    about = pq.read_metadata(copy)
    assert [about.row_group(i).num_rows for i in range(about.num_row_groups)] == [2] * 5 + [1]
    assert about.schema.names[0] == "user_id" and "much" not in about.schema.names
    assert_frame_equal(users.read(0, 11), plain.read(0, 11))
    with pytest.raises(ValueError, match="no column 'h'"):
        UserTable(folder, NUMBERS, UserColumns(history="h"), scratch=tmp_path)
    table.write_parquet(tmp_path / "small.parquet", row_group_size=4)
    UserTable(tmp_path / "small.parquet", NUMBERS, unknown_items="drop", scratch=tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_rows_out_of_turn_are_read_alone(monkeypatch, tmp_path: Path):
    """Of one part of a job, or of an actor: no window for each of its shards."""
    monkeypatch.setattr(genrec.generation.users, "WINDOW", 8)
    table = pl.DataFrame({"user_id": range(40), "history": [[10 * (i % 4 + 1)] for i in range(40)]})
    table.write_parquet(tmp_path / "users.parquet", row_group_size=8)
    users = UserTable(tmp_path / "users.parquet", NUMBERS)
    whole, read, real = users.read(0, 40), [], users._scan
    monkeypatch.setattr(users, "_scan", lambda first, n: read.append((first, n)) or real(first, n))
    for start in (2, 14, 26, 38, 20):
        assert_frame_equal(users.read(start, 2), whole[start : start + 2])
    assert read == [(2, 2), (14, 2), (26, 2), (20, 2)]  # 38 lies in the last window
    read.clear()
    for start in range(0, 40, 2):  # in turn
        assert_frame_equal(users.read(start, 2), whole[start : start + 2])
    assert read == [(0, 2), (0, 8), (8, 8), (16, 8), (24, 8), (32, 8)]


def test_windows(monkeypatch, tmp_path: Path):
    """However the table is cut, the rows are the same; no more than a window is held."""
    monkeypatch.setattr(genrec.generation.users, "WINDOW", 4)
    rng = np.random.default_rng(0)
    lists = [rng.choice(NUMBERS.to_numpy(), rng.integers(0, 5)).tolist() for _ in range(23)]
    table = pl.DataFrame({"user_id": range(23), "history": lists})
    table.write_parquet(tmp_path / "a.parquet", row_group_size=7)
    users = UserTable(tmp_path / "a.parquet", NUMBERS)
    whole = users.read(0, 23)
    place = {item: i for i, item in enumerate(NUMBERS)}
    assert whole["history_item_index"].to_list() == [[place[i] for i in row] for row in lists]
    for size in (1, 3, 4, 5, 9, 23, 50):
        parts = [users.read(start, size) for start in range(0, 23, size)]
        assert_frame_equal(pl.concat(parts), whole)
    assert users._window.height <= 4
    copy = pickle.loads(pickle.dumps(users))
    assert copy._window.height == 0
    assert_frame_equal(copy.read(5, 9), whole[5:14])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", "d", "x", "y"]), max_size=6), min_size=1))
def test_dropping_unknown_items(tmp_path_factory, lists):
    path = tmp_path_factory.mktemp("t") / "users.parquet"
    table = pl.DataFrame(
        {"user_id": range(len(lists)), "history": lists},
        schema_overrides={"history": pl.List(pl.String)},
    )
    table.write_parquet(path)
    part = UserTable(path, NAMES, unknown_items="drop").read(0, len(lists))
    known = {item: i for i, item in enumerate(NAMES)}
    kept = [[known[i] for i in row if i in known] for row in lists]
    assert part["history_item_index"].to_list() == kept == part["seen_item_index"].to_list()
    lost = [len(a) - len(b) for a, b in zip(lists, kept, strict=True)]
    assert part["unknown_items"].to_list() == lost


def test_unknown_items_are_errors_by_default(tmp_path: Path):
    table = pl.DataFrame({"user_id": [5, 6, 7], "history": [[10], [11, 20, 12], [13]]})
    table.write_parquet(tmp_path / "u.parquet")
    with pytest.raises(ValueError, match="which is not in the catalogue") as error:
        histories(UserTable(tmp_path / "u.parquet", NUMBERS))
    said = str(error.value)
    assert "u.parquet row 2: 'history' of user 6 holds 11" in said
    assert "(3 such items in 2 of the rows 1 to 3; ids look like 30)" in said
    assert "unknown_items: drop" in said
    (tmp_path / "u.csv").write_text("user_id,history\na,10 x\nb,010\n")
    with pytest.raises(ValueError, match="row 1: 'history' of user 'a' holds 'x'"):
        histories(UserTable(tmp_path / "u.csv", NUMBERS, scratch=tmp_path))
    part = UserTable(tmp_path / "u.csv", NUMBERS, unknown_items="drop", scratch=tmp_path).read(0, 2)
    assert part["history_item_index"].to_list() == [[1], []]
    assert part["unknown_items"].to_list() == [1, 1]  # 010 is not 10
    with pytest.raises(ValueError, match="unknown_items='skip' is not known; choose one of error"):
        UserTable(tmp_path / "u.parquet", NUMBERS, unknown_items="skip")


def test_separators(tmp_path: Path):
    (tmp_path / "u.csv").write_text('user_id,history\na,"b b| a |"\nb,""\nc,||\n')
    names = pl.Series("item_id", ["a", "b b"])
    users = UserTable(tmp_path / "u.csv", names, UserColumns(separator="|"), scratch=tmp_path)
    assert histories(users) == [[1, 0], [], []]
    (tmp_path / "v.csv").write_text("user_id,history\na,  10   20 \n")
    assert histories(UserTable(tmp_path / "v.csv", NUMBERS, scratch=tmp_path / "..")) == [[1, 2]]
    remove_copy(tmp_path / "..")


def test_nobody_has_a_history(tmp_path: Path):
    for lists in ([None, None], [[], []]):
        table = pl.DataFrame({"user_id": [1, 2], "history": lists})
        table.write_parquet(tmp_path / "u.parquet")
        assert histories(UserTable(tmp_path / "u.parquet", NUMBERS)) == [[], []]


def bad(tmp_path: Path, catalog: pl.Series = NUMBERS, **columns) -> str:
    table = pl.DataFrame({"user_id": ["a", "b"], "history": [[10], [20]]}).with_columns(
        **{name: pl.Series(values) for name, values in columns.items()}
    )
    table.write_parquet(tmp_path / "u.parquet")
    with pytest.raises(ValueError) as error:
        histories(UserTable(tmp_path / "u.parquet", catalog))
    return str(error.value)


def test_bad_tables(tmp_path: Path):
    assert "row 2: 'user_id' is null" in bad(tmp_path, user_id=["a", None])
    assert "'user_id' holds Float64" in bad(tmp_path, user_id=[1.5, 2.5])
    said = bad(tmp_path, history=[[10, None], [20]])
    assert "row 1: 'history' of user 'a' holds a null item" in said
    assert "holds List(Float64); needed are lists" in bad(tmp_path, history=[[1.0], [2.0]])
    assert "holds Int64; needed are lists" in bad(tmp_path, history=[10, 20])
    assert "catalogue's item ids (String, such as 'c')" in bad(tmp_path, NAMES)
    assert "holds List(String)" in bad(tmp_path, history=[["10"], ["20"]])
    with pytest.raises(ValueError, match="has no column 'past'"):
        UserTable(tmp_path / "u.parquet", NUMBERS, UserColumns(history="past"))
    with pytest.raises(ValueError, match=r"no column 'stop' \(exclude_column\)"):
        UserTable(tmp_path / "u.parquet", NUMBERS, UserColumns(exclude="stop"))
    pl.DataFrame({"user_id": [], "history": []}).write_parquet(tmp_path / "u.parquet")
    with pytest.raises(ValueError, match="is empty: it has no rows"):
        UserTable(tmp_path / "u.parquet", NUMBERS)
    (tmp_path / "u.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="can't be read as parquet"):
        UserTable(tmp_path / "u.parquet", NUMBERS)
    for call in (source_sha256, lambda path: UserTable(path, NUMBERS)):
        with pytest.raises(ValueError, match="does not exist"):
            call(tmp_path / "missing.parquet")


def test_the_hash_of_a_source_is_of_its_content(parquet: Path, tmp_path: Path):
    first = source_sha256(parquet)
    folder = tmp_path / "folder"
    folder.mkdir()
    moved = parquet.rename(folder / "moved.parquet")
    assert source_sha256(moved) == first
    whole = source_sha256(folder)
    USERS[:1].write_parquet(folder / "more.parquet")
    assert source_sha256(folder) != whole
    USERS[:1].write_parquet(moved)
    assert source_sha256(moved) != first


def test_a_source_that_changes_is_noticed(monkeypatch, tmp_path: Path):
    """Before, while and after it is read: never rows of two tables."""
    monkeypatch.setattr(genrec.generation.users, "WINDOW", 2)
    path = tmp_path / "folder" / "users.parquet"
    path.parent.mkdir()
    plain = USERS.select("user_id", "history")
    for source in (path, path.parent):
        plain.write_parquet(path)
        marks = source_marks(source)
        users = UserTable(source, NUMBERS, marks=marks)
        users.read(0, 2)
        users.check_unchanged()
        plain.reverse().write_parquet(path)
        users.read(0, 2)  # held
        for call in (
            users.check_unchanged,
            lambda users=users: users.read(2, 2),
            lambda users=users: pickle.loads(pickle.dumps(users)).read(0, 1),
            lambda source=source, marks=marks: UserTable(source, NUMBERS, marks=marks),
        ):
            with pytest.raises(ValueError, match="was changed while it was read; start again"):
                call()
    users = UserTable(path.parent, NUMBERS)
    path.with_name("_SUCCESS").touch()
    users.check_unchanged()  # what isn't read may change
    plain.write_parquet(path.with_name("more.parquet"))
    with pytest.raises(ValueError, match="was changed while it was read"):
        users.check_unchanged()
    (tmp_path / "u.csv").write_text("user_id,history\na,10\n")
    marks = source_marks(tmp_path / "u.csv")
    (tmp_path / "u.csv").write_text("user_id,history\na,20\nb,20\n")
    with pytest.raises(ValueError, match="was changed while it was read"):
        UserTable(tmp_path / "u.csv", NUMBERS, scratch=tmp_path, marks=marks)
    assert not (tmp_path / ".users.parquet").exists()  # no copy of what wasn't hashed


def test_a_damaged_copy_is_made_again(tmp_path: Path):
    (tmp_path / "u.csv").write_text("user_id,history\na,10\nb,20\n")
    wanted = UserTable(tmp_path / "u.csv", NUMBERS, scratch=tmp_path).read(0, 2)
    copy = tmp_path / ".users.parquet"
    for damaged in (b"", copy.read_bytes()[:-9], b"PAR1"):
        copy.write_bytes(damaged)
        again = UserTable(tmp_path / "u.csv", NUMBERS, scratch=tmp_path)
        assert_frame_equal(again.read(0, 2), wanted)
    data = copy.read_bytes()
    copy.write_bytes(data[:4] + b"\xff" * 60 + data[64:])  # its end is whole
    with pytest.raises(ValueError, match="this copy of .*u.csv is removed, start again"):
        UserTable(tmp_path / "u.csv", NUMBERS, scratch=tmp_path).read(0, 2)
    assert_frame_equal(UserTable(tmp_path / "u.csv", NUMBERS, scratch=tmp_path).read(0, 2), wanted)


def test_numbers_beyond_63_bits(tmp_path: Path):
    wide = pl.Series([[1 << 63], [10]], dtype=pl.List(pl.UInt64))
    table = pl.DataFrame({"user_id": [1, 2], "history": wide})
    table.write_parquet(tmp_path / "u.parquet")
    with pytest.raises(ValueError, match="'history' .*holds an id beyond 63 bits"):
        histories(UserTable(tmp_path / "u.parquet", NUMBERS))
    users = pl.Series([1 << 63, 2], dtype=pl.UInt64)
    table = pl.DataFrame({"user_id": users, "history": [[10], [20]]})
    table.write_parquet(tmp_path / "u.parquet")
    with pytest.raises(ValueError, match="'user_id'"):
        histories(UserTable(tmp_path / "u.parquet", NUMBERS))


def test_rows_of_a_split(tiny):
    rows = tiny.shop().splits.test
    part = SplitRows(rows, True).read(3, 4)
    assert part["row_id"].to_list() == rows["row_id"][3:7].to_list()
    assert part["seen_item_index"].to_list() == rows["seen_item_index"][3:7].to_list()
    assert "seen_item_index" not in SplitRows(rows, False).read(0, 1).columns
    assert SplitRows(rows, False).n_rows == 30


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_how_many_items_a_row_may_get(data):
    items = st.lists(st.integers(0, 7), max_size=8)
    n = data.draw(st.integers(1, 4))
    allowed = data.draw(st.lists(st.booleans(), min_size=8, max_size=8))
    columns = {}
    if data.draw(st.booleans()):
        columns["seen_item_index"] = [data.draw(items) for _ in range(n)]
    if data.draw(st.booleans()):
        columns["candidates"] = [data.draw(items) for _ in range(n)]
    part = pl.DataFrame(
        {"row_id": [str(i) for i in range(n)], **columns},
        schema_overrides={name: pl.List(pl.Int64) for name in columns},
    )
    expected = []
    for row in range(n):
        left = {i for i, yes in enumerate(allowed) if yes}
        left &= set(columns["candidates"][row]) if "candidates" in columns else left
        left -= set(columns["seen_item_index"][row]) if "seen_item_index" in columns else set()
        expected.append(len(left))
    assert count_allowed(part, np.array(allowed)).tolist() == expected
