"""What is done for many rows at once, against one row at a time."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.columns import HISTORY, ITEM_INDEX, POSITION, RATING, ROW_ID, TARGET_POSITION, USER_ID
from genrec.item_lists import ItemLists
from genrec.prompts import PromptRenderer
from genrec.tasks.instruction_rows import RowWriter
from genrec.tasks.rendering import joined
from genrec.tasks.rows import InteractionLog, _side_by_side, chunks, read_chunks

TEMPLATES = {
    "f/seen/01": "{{ a }} then {{ b }}",
    "f/seen/02": "before {{ a }}{{ b }} after ‹ü›",
    "f/seen/03": "{{ b }}-{{ a }}-{{ b }}",
    "f/seen/04": "{{ a }}",
    "f/seen/05": "nothing",
    "f/seen/06": "{% if a == 'x' %}yes {{ b }}{% else %}{{ a|upper }}{% endif %}",
    "f/unseen/01": "{{ a }}{{ other }}",
}


@pytest.fixture(scope="module")
def renderer(tmp_path_factory) -> PromptRenderer:
    folder = tmp_path_factory.mktemp("prompts")
    for name, text in TEMPLATES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jinja").write_text(text, encoding="utf-8")
    return PromptRenderer(folder)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([n for n in TEMPLATES if "/seen/" in n]),
            st.sampled_from(["x", "", "<a_1>", "ü‮ <b_2>"]),
            st.text(max_size=5),
        ),
        max_size=12,
    )
)
def test_each_row_gets_its_own_template(renderer, rows):
    names = pl.Series([row[0] for row in rows], dtype=pl.String)
    a = pl.Series([row[1] for row in rows], dtype=pl.String)
    b = pl.Series([row[2] for row in rows], dtype=pl.String)
    made = renderer.render_each(names, sids={"a": a}, texts={"b": b})
    one = [renderer.render(n, sids={"a": x}, texts={"b": y}) for n, x, y in rows]
    assert made.to_list() == one and made.dtype == pl.String


def test_what_can_not_be_rendered_is_said(renderer):
    a = pl.Series(["x", "y"])
    names = pl.Series(["f/seen/04", "f/unseen/01"])
    with pytest.raises(ValueError, match="f/unseen/01.*'other' is undefined"):
        renderer.render_each(names, sids={"a": a})
    with pytest.raises(ValueError, match="unknown template 'f/seen/99'"):
        renderer.render_each(pl.Series(["f/seen/04", "f/seen/99"]), sids={"a": a})
    with pytest.raises(ValueError, match="columns of"):
        renderer.render_each(names[:1], sids={"a": a})
    with pytest.raises(ValueError, match="'a' is null"):
        renderer.render_each(names, sids={"a": pl.Series(["x", None])})


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["", "a", "ü", "<a_1><b_22>", "; "]), max_size=4)),
    st.sampled_from(["", ", ", "; "]),
)
def test_lists_are_joined_like_python_joins_them(lists, separator):
    flat = pl.Series("text", [text for row in lists for text in row], dtype=pl.String)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in lists], dtype=np.int64)])
    places = ItemLists(np.arange(len(flat)), offsets.astype(np.int64))
    assert joined(flat, places, separator).to_list() == [separator.join(row) for row in lists]


def test_nulls_are_left_out_of_a_list():
    values = pl.Series(["a", None, "b", None], dtype=pl.String)
    lists = ItemLists(np.arange(4), np.array([0, 3, 4]))
    assert joined(values, lists, "; ").to_list() == ["a; b", ""]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_structs_side_by_side(n, rows):
    columns = [
        pl.DataFrame({"k": [f"{k}{i}" for i in range(rows)], "l": [[k, i] for i in range(rows)]})
        .cast({"k": pl.String, "l": pl.List(pl.Int64)})
        .select(pl.struct("k", "l").alias(str(k)))
        .to_series()
        for k in range(n)
    ]
    expected = [[{"k": f"{k}{i}", "l": [k, i]} for k in range(n)] for i in range(rows)]
    made = _side_by_side(columns)
    assert made.to_list() == expected and made.dtype == pl.List(columns[0].dtype)


def test_chunks_of_a_file_are_those_of_the_table(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, 200)
    split = pl.DataFrame(
        {
            ROW_ID: [f"train-{i:06d}" for i in range(200)],
            HISTORY: pl.Series([list(range(n)) for n in lengths], dtype=pl.List(pl.Int32)),
            "supervise_from": np.minimum(lengths, 2).astype(np.int32),
        }
    )
    path = tmp_path / "train.parquet"
    split.write_parquet(path, row_group_size=70)
    assert pl.concat(read_chunks(path, 40)).equals(split)
    assert [len(c) for c in read_chunks(path, 40)] == [len(c) for c in chunks(split, 40)]
    monkeypatch.setattr("genrec.tasks.rows._ROWS_READ", 32)
    parts = list(read_chunks(path, 40))
    assert pl.concat(parts).equals(split) and max(map(len, parts)) <= 32


@pytest.mark.parametrize("users", [[5, 3, 9], ["b", "a", "c"]])
def test_places_in_the_log(tmp_path, users):
    lengths = [3, 1, 2]
    log = pl.DataFrame(
        {
            USER_ID: [u for u, n in zip(users, lengths, strict=True) for _ in range(n)],
            ITEM_INDEX: list(range(6)),
            POSITION: [p for n in lengths for p in range(n)],
            RATING: [1.0, None, 3.0, 4.0, 5.0, 2.0],
        }
    )
    log.write_parquet(tmp_path / "log.parquet", row_group_size=2)
    found = InteractionLog.of(tmp_path / "log.parquet")
    asked = pl.DataFrame({USER_ID: [users[2], users[0], users[1]], TARGET_POSITION: [1, 2, 0]})
    places = found.places(asked)
    assert places.tolist() == [5, 2, 3] and found.columns == (RATING,)
    assert found.read(places, RATING).to_list() == [2.0, 3.0, 4.0]
    stranger = asked.with_columns(pl.Series(USER_ID, [type(users[0])(7)] * 3))
    with pytest.raises(AssertionError, match="no interactions"):
        found.places(stranger)


def test_what_fails_while_writing_is_raised(tmp_path, monkeypatch):
    path = tmp_path / "train.parquet"
    writer = RowWriter(path, ["sequential"], pl.Series(["x"]), pl.String())
    rows = pl.DataFrame(schema=writer.schema)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    writer.write(rows)
    with pytest.raises(OSError, match="no space"):
        writer.close()
    assert not path.exists()
