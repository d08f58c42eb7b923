"""Files of instruction rows: read back, they are what was written, byte for byte."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from genrec.tasks.families import FAMILIES, INTERACTION, ITEM, SEQUENTIAL
from genrec.tasks.instruction_rows import (
    COMMON,
    ITEM_LISTS,
    RENDERED,
    InstructionRows,
    RowWriter,
    gathered,
    schema,
)
from genrec.tasks.rows import interaction_rows, item_rows
from genrec.tasks.sequential import sequential_rows

NAMES = list(FAMILIES)


def all_rows(world) -> list[pl.DataFrame]:
    """Rendered rows of every family, in tables as the recipe makes them."""
    split = world.splits.train
    dtype = split.schema["user_id"]
    tables = [item_rows(f, world.sources, dtype) for f in FAMILIES.values() if f.unit == ITEM]
    tables.append(sequential_rows(split))
    tables += interaction_rows(split, NAMES, world.sources, {})
    return [world.render(table) for table in tables]


def written(world, folder, tables: list[pl.DataFrame], names: list[str] = NAMES):
    path = folder / "train.parquet"
    ids = world.semantic_ids.item_ids
    writer = RowWriter(path, names, ids, world.log.schema["user_id"])
    for table in tables:
        writer.write(table)
        assert not path.exists()  # it is there when it is whole
    writer.close()
    assert writer.rows == sum(len(table) for table in tables)
    return path


def read(world, path, n_templates=None) -> InstructionRows:
    sources = world.sources
    return InstructionRows.read(
        path, world.semantic_ids.item_ids, sources.texts, world.renderer, sources.seed, n_templates
    )


@pytest.fixture(scope="module", params=["integers", "strings", "hostile"])
def any_world(request, worlds):
    events = worlds.random_events(5, n_users=6)
    if request.param == "hostile":
        odd = ["<a_1>", "{{ x }}", "\n", "'\"", "שלום", "🧢", "", "x" * 100_000]
        ids = [f"{text}{i}" for i, text in enumerate(odd * 2)]
        odd = ["<a_1>", "{% x", "\n\0", "\u202e", "y" * 9999, ""]
        users = [f"{text}{i}" for i, text in enumerate(odd)]
        catalog, _ = worlds.catalogue(item_ids=ids)
        return worlds.of(events, catalog, item_ids=ids, users=users, seed=3)
    if request.param == "strings":
        return worlds.of(events, strings=True)
    return worlds.of(events, users=list(range(7, 13)))


def test_what_is_written_is_what_is_read(any_world, tmp_path):
    tables = all_rows(any_world)
    path = written(any_world, tmp_path, tables)
    file = pl.read_parquet(path)
    assert set(file["task"]) == set(FAMILIES)
    assert file["row_id"].n_unique() == len(file)
    assert dict(file.schema) == schema(
        NAMES, any_world.semantic_ids.item_ids.dtype, any_world.log.schema["user_id"]
    )
    ids = any_world.semantic_ids.item_ids
    made = pl.concat(tables, how="diagonal")
    for name in ITEM_LISTS:  # files hold the user's item ids
        expected = [None if x is None else [ids[i] for i in x] for x in made[name].to_list()]
        assert file[name].to_list() == expected
    rows = read(any_world, path)
    assert len(rows) == len(file) and rows.table["row_id"].to_list() == made["row_id"].to_list()
    for name in (*COMMON, *ITEM_LISTS, "rating", "history_ratings", "query", "step_intent"):
        assert rows.table[name].to_list() == made[name].to_list(), name
    assert not {*RENDERED, "steps", "text_origin"} & set(rows.table.columns)
    # Epoch 0 is the file, byte for byte.
    everything = np.arange(len(rows))
    again = rows.render(everything, np.zeros(len(rows), dtype=np.int64))
    assert again.equals(file.select(RENDERED))


def test_any_rows_of_any_epochs(world, tmp_path):
    rows = read(world, written(world, tmp_path, all_rows(world)))
    rng = np.random.default_rng(0)
    at, epochs = rng.integers(0, len(rows), 200), rng.integers(0, 4, 200)
    mixed = rows.render(at, epochs)
    assert len(mixed) == 200
    for epoch in range(4):
        whole = rows.render(np.arange(len(rows)), np.full(len(rows), epoch))
        mine = epochs == epoch
        assert mixed.filter(pl.Series(mine)).equals(whole[at[mine]])
    one, later = (rows.render(at, np.full(200, e)) for e in (0, 1))
    assert (one["template"] != later["template"]).all()
    assert one["completion"].equals(later["completion"])


def test_two_rows_that_share_a_prompt_keep_their_own_targets(world, tmp_path):
    split = world.splits.valid[:2].with_columns(
        history_item_index=pl.Series([[1, 2], [1, 2]], dtype=pl.List(pl.Int32)),
        supervise_from=pl.Series([2, 2], dtype=pl.Int32),
        target_item_index=pl.Series([3, 4], dtype=pl.Int32),
    )
    table = world.render(sequential_rows(split), template="sequential/seen/01")
    assert table["prompt"].n_unique() == 1
    file = pl.read_parquet(written(world, tmp_path, [table[::-1]], [SEQUENTIAL]))
    ids, sids = world.semantic_ids.item_ids, world.semantic_ids.sids()
    found = {r: (t, c) for r, t, c in file.select("row_id", "targets", "completion").rows()}
    assert found == {
        "valid-000000": ([ids[3]], sids[3]), "valid-000001": ([ids[4]], sids[4]),
    }  # fmt: skip


def test_as_trl_takes_it(world, tmp_path):
    """Plain Arrow types: text and lists that other libraries read, too."""
    path = written(world, tmp_path, all_rows(world))
    arrow = pq.read_schema(path)
    for name in ("prompt", "completion", "row_id"):
        assert str(arrow.field(name).type) in ("string", "large_string")
    assert not any("_view" in str(kind) for kind in arrow.types)
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "cache"
    loaded = datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(folder))["train"]
    file = pl.read_parquet(path)
    assert loaded[0]["prompt"] == file["prompt"][0] and len(loaded) == len(file)
    assert loaded[len(file) - 1]["targets"] == file["targets"].to_list()[-1]


def test_fewer_families_fewer_columns(world, tmp_path):
    table = world.render(sequential_rows(world.splits.train))
    file = pl.read_parquet(written(world, tmp_path, [table], [SEQUENTIAL]))
    assert file.columns == [*COMMON, *RENDERED]
    names = ["rating", "intention_search"]
    assert set(schema(names, pl.Int64(), pl.String())) == {
        *COMMON, *RENDERED, "rating", "history_ratings", "intention", "text_origin",
    }  # fmt: skip


def test_no_rows_make_a_file_all_the_same(world, tmp_path):
    path = written(world, tmp_path, [])
    assert len(pl.read_parquet(path)) == 0 and len(read(world, path)) == 0


def test_a_killed_writer_leaves_no_file(world, tmp_path):
    path = tmp_path / "train.parquet"
    writer = RowWriter(path, NAMES, world.semantic_ids.item_ids, pl.String())
    writer.write(world.render(sequential_rows(world.splits.train)))
    assert not path.exists()
    del writer
    assert not path.exists()
    again = written(world, tmp_path, all_rows(world))
    assert len(pl.read_parquet(again)) and [p.name for p in tmp_path.iterdir()] == ["train.parquet"]


def test_n_templates_are_those_of_the_file(world, tmp_path):
    tables = [world.render(t.drop(RENDERED), n_templates=2) for t in all_rows(world)]
    path = written(world, tmp_path, tables)
    rows = read(world, path, n_templates=2)
    made = rows.render(np.arange(len(rows)), np.zeros(len(rows), dtype=np.int64))
    assert made.equals(pl.read_parquet(path).select(RENDERED))
    later = rows.render(np.arange(len(rows)), np.full(len(rows), 5))
    assert set(later["template"].str.slice(-2)) == {"01", "02"}


def test_an_item_that_the_catalogue_lacks(world, tmp_path):
    path = written(
        world, tmp_path, [world.render(sequential_rows(world.splits.train))], [SEQUENTIAL]
    )
    ids = world.semantic_ids.item_ids
    with pytest.raises(ValueError, match="holds .* which is no item"):
        InstructionRows.read(path, ids[:5], world.sources.texts, world.renderer, 0, None)


def test_gathered():
    values = pl.Series(["a", "b", None])
    lists = pl.Series("x", [[1, 0], None, [], [2]], dtype=pl.List(pl.Int32))
    made = gathered(lists, values)
    assert made.to_list() == [["b", "a"], None, [], [None]] and made.name == "x"
    assert gathered(lists[:0], values).to_list() == []


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.unit == INTERACTION])
def test_a_family_alone(world, tmp_path, name: str):
    made = interaction_rows(world.splits.train[:6], [name], world.sources, {})
    path = written(world, tmp_path, [world.render(table) for table in made], [name])
    rows = read(world, path)
    made = rows.render(np.arange(len(rows)), np.zeros(len(rows), dtype=np.int64))
    assert len(made) and made.equals(pl.read_parquet(path).select(RENDERED))
