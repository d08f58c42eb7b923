"""LC-Rec's index.json as LETTER and MiniOneRec publish it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.quantizers.collisions import collision_rate
from genrec.quantizers.index_files import read_index, resolve_shared
from genrec.semantic_ids import SemanticIds, level_name, sid_token

BC = ["<a_1>", "<b_2>"]


def write(folder: Path, index: dict | str) -> Path:
    path = folder / "index.json"
    path.write_text(index if isinstance(index, str) else json.dumps(index))
    return path


def ids(*items: int | str) -> pl.Series:
    return pl.Series("item_id", list(items))


# --- reading --------------------------------------------------------------------------------------


def test_rows_come_in_catalogue_order(tmp_path: Path):
    path = write(tmp_path, {"b": ["<a_3>", "<b_0>"], "a": BC, "z": BC, "x": BC})
    index = read_index(path, ids("a", "b", "c", "z"))
    assert index.codes.dtype == np.int32
    assert index.codes.tolist() == [[1, 2], [3, 0], [-1, -1], [1, 2]]
    assert index.codebook_sizes == (4, 3)
    assert index.shared_items == (("a", "z"),)
    assert (index.missing, index.extra, index.ranked) == (("c",), ("x",), 0)
    with pytest.raises(ValueError, match="outside its codebook"):
        SemanticIds(ids("a", "b", "c", "z"), index.codes, index.codebook_sizes)


def test_export_comes_back(tmp_path: Path):
    semantic_ids = SemanticIds(ids(7, 5, 9), np.array([[1, 2], [0, 2], [1, 0]]), (4, 4))
    semantic_ids.export_index(tmp_path / "index.json")
    index = read_index(tmp_path / "index.json", semantic_ids.item_ids, codebook_sizes=(4, 4))
    assert (index.codes == semantic_ids.codes).all() and index.codebook_sizes == (4, 4)
    assert (index.shared_items, index.missing, index.extra) == ((), (), ())
    with pytest.raises(ValueError, match=r"codebook_sizes=\(4, 2\) don't hold the codes"):
        read_index(tmp_path / "index.json", semantic_ids.item_ids, codebook_sizes=(4, 2))
    with pytest.raises(ValueError, match="don't hold"):
        read_index(tmp_path / "index.json", semantic_ids.item_ids, codebook_sizes=(4, 4, 4))


def test_letters_beyond_z(tmp_path: Path):
    codes = np.arange(60)[None, :] % 5
    tokens = [sid_token(level, int(code)) for level, code in enumerate(codes[0])]
    assert level_name(59) == "bh"
    path = write(tmp_path, {"1": tokens})
    assert (read_index(path, ids(1)).codes == codes).all()
    tokens[26] = "<a_1>"
    with pytest.raises(ValueError, match="has '<a_1>' as token 27"):
        read_index(write(tmp_path, {"1": tokens}), ids(1))


def test_an_offset_is_never_guessed(tmp_path: Path):
    path = write(tmp_path, {"0": ["<a_0>"], "1": ["<a_1>"], "2": ["<a_2>"]})
    # Two of three keys match the wrong item.
    with pytest.raises(ValueError, match=r"1 of 3 items have no key .*offset=1 .* all items match"):
        read_index(path, ids(1, 2, 3))
    # All match the wrong item, since the catalogue has lost its last one.
    with pytest.raises(ValueError, match=r"0 of 2 items have no key .*offset=1 "):
        read_index(path, ids(1, 2))
    with pytest.raises(ValueError, match="offset=1000 "):
        read_index(path, ids("1000", "1001", "1002"))
    with pytest.raises(ValueError, match="give the offset between them"):
        read_index(path, ids(0, 1, 7))
    assert read_index(path, ids(1, 2, 3), offset=1).codes.ravel().tolist() == [0, 1, 2]
    assert read_index(path, ids(2, 1, 0)).codes.ravel().tolist() == [2, 1, 0]
    as_they_are = read_index(path, ids(1, 2, 3), offset=0)
    assert as_they_are.codes.ravel().tolist() == [1, 2, -1]
    assert (as_they_are.missing, as_they_are.extra) == ((3,), ("0",))
    two_missing = read_index(path, ids(1, 8, 9), offset=0)
    assert (two_missing.missing, two_missing.shared_items) == ((8, 9), ())
    with pytest.raises(ValueError, match="needs integer item ids"):
        read_index(path, ids("a", "b"), offset=1)
    with pytest.raises(ValueError, match="no key of .* is an item"):
        read_index(path, ids(1, 2), offset=50)
    with pytest.raises(ValueError, match="no key of .* is an item"):
        read_index(path, ids("00", "01"))


def test_rank_tokens_of_shared_sids_become_a_level(tmp_path: Path):
    ranked = {"p": [*BC, "<c_0>"], "q": [*BC, "<c_1>"], "r": ["<a_0>", "<b_0>"]}
    index = read_index(write(tmp_path, ranked), ids("p", "q", "r"))
    assert index.codes.tolist() == [[1, 2, 0], [1, 2, 1], [0, 0, 0]]
    assert (index.codebook_sizes, index.ranked, index.shared_items) == ((2, 3, 2), 2, ())
    # The first of the group may have none; a rank 0 beside it is a collision, and reported.
    bare = {"p": BC, "q": [*BC, "<c_1>"]}
    assert read_index(write(tmp_path, bare), ids("p", "q")).shared_items == ()
    bare["q"][2] = "<c_0>"
    assert read_index(write(tmp_path, bare), ids("p", "q")).shared_items == (("p", "q"),)


HOSTILE = {
    "not JSON": ('{"1": ["<a_1>"]', "is not JSON"),
    "not UTF-8": (b'{"1": ["\xff\xfe"]}', "is not JSON"),
    "deep": ("[" * 200_000, "is not JSON"),
    "a list": ('[["<a_1>"]]', "must be a JSON object"),
    "empty": ("{}", "must be a JSON object"),
    "a repeated key": ('{"1": ["<a_1>"], "2": ["<a_2>"], "1": ["<a_3>"]}', r"several .*\['1'\]"),
    "a string": ('{"1": "<a_1>"}', "1 to 64 tokens in a list"),
    "no tokens": ('{"1": []}', "1 to 64 tokens"),
    "too many": (json.dumps({"1": ["<a_1>"] * 65}), "1 to 64 tokens"),
    "an object": ('{"1": {"a": 1}}', "1 to 64 tokens"),
    "a number": ('{"1": [1]}', "has '1' as token 1"),
    "a huge number": ('{"1": [' + "9" * 10_000 + "]}", "as token 1"),
    "null": ('{"1": [null]}', "has 'None' as token 1"),
    "a nested list": ('{"1": [["<a_1>"]]}', "as token 1"),
    "another level's letter": ('{"1": ["<b_1>"]}', "has '<b_1>' as token 1"),
    "upper case": ('{"1": ["<A_1>"]}', "as token 1"),
    "a leading zero": ('{"1": ["<a_01>"]}', "as token 1"),
    "a negative code": ('{"1": ["<a_-1>"]}', "as token 1"),
    "other digits": ('{"1": ["<a_\u0661>"]}', "as token 1"),
    "white space": ('{"1": ["<a_1> "]}', "as token 1"),
    "a line feed": ('{"1": ["<a_1>\\n"]}', "as token 1"),
    "a huge code": ('{"1": ["<a_1048576>"]}', "codes 0 to 1048575"),
    "two lengths too far": ('{"1": ["<a_1>"], "2": ["<a_1>", "<b_1>", "<c_1>"]}', "lengths"),
    "three lengths": ('{"1": ["<a_1>"], "2": ["<a_1>", "<b_1>"], "3": ["<a_1>", "<b_1>", "<c_1>"]}',
        "different lengths"),
    "a rank of nothing": ('{"1": ["<a_1>"], "2": ["<a_2>", "<b_1>"]}', "'2' shares them with none"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path: Path, case: str):
    text, message = HOSTILE[case]
    path = tmp_path / "index.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_index(path, ids("1", "2"), offset=0)


def test_hostile_catalogues(tmp_path: Path):
    path = write(tmp_path, {"1": BC})
    for items in (ids("1", "1"), pl.Series([1, None]), pl.Series([], dtype=pl.Int64)):
        with pytest.raises(ValueError, match="not null and distinct"):
            read_index(path, items)


# --- shared SIDs ----------------------------------------------------------------------------------


def test_only_the_surplus_moves_on_the_last_level():
    codes = np.array([[0, 1], [0, 1], [1, 1], [0, 1], [0, 0]])
    new = resolve_shared(codes, (2, 4))
    assert (new[[0, 2, 4]] == codes[[0, 2, 4]]).all()
    assert sorted(new[[1, 3]].tolist()) == [[0, 2], [0, 3]]
    vectors = np.array([[0.0], [2.0], [9.0], [3.0], [9.0]])  # mean of the group: 5/3
    new = resolve_shared(codes, (2, 4), vectors)
    assert (new[[1, 2, 4]] == codes[[1, 2, 4]]).all()
    assert sorted(new[[0, 3]].tolist()) == [[0, 2], [0, 3]]
    assert (resolve_shared(new, (2, 4), vectors) == new).all()


def test_a_full_prefix_spills_upwards_one_level_at_a_time():
    codes = np.array([[0, 0, 0]] * 5 + [[0, 0, 1], [1, 1, 1]])
    new = resolve_shared(codes, (2, 2, 2), seed=4)
    assert collision_rate(new) == 0
    assert (new[[0, 5, 6]] == codes[[0, 5, 6]]).all()
    # (0, 0, ·) is full, (0, 1, ·) takes two, and the last two find a place under 1.
    assert sorted(new[1:5, 0].tolist()) == [0, 0, 1, 1]
    assert sorted(new[1:5][new[1:5, 0] == 0].tolist()) == [[0, 1, 0], [0, 1, 1]]


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_resolved_codes_are_distinct_with_the_fewest_moves(data: st.DataObject):
    sizes = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    row = st.tuples(*[st.integers(0, size - 1) for size in sizes])
    most = int(np.prod(sizes))
    codes = np.array(data.draw(st.lists(row, min_size=1, max_size=most)))
    with_vectors = data.draw(st.booleans())
    vectors = np.random.default_rng(0).normal(size=(len(codes), 2)) if with_vectors else None
    before = codes.copy()
    new = resolve_shared(codes, sizes, vectors, seed=1)
    assert (codes == before).all()
    assert new.shape == codes.shape and (new >= 0).all() and (new < np.array(sizes)).all()
    assert len(np.unique(new, axis=0)) == len(new)
    moved = (new != codes).any(axis=1)
    assert moved.sum() == len(codes) - len(np.unique(codes, axis=0))
    # No prefix is left by an item while it has room: it is left only where it is full.
    for level in range(1, len(sizes)):
        for item in np.flatnonzero((new[:, :level] != codes[:, :level]).any(axis=1)):
            below = (new[:, :level] == codes[item, :level]).all(axis=1)
            assert below.sum() == np.prod(sizes[level:])


def test_resolve_refuses_hostile_input():
    codes = np.zeros((3, 2), dtype=np.int32)
    for wrong, sizes, vectors, message in [
        (codes, (1, 2), None, "3 items exceed the 2 SIDs"),
        (codes - 1, (4, 4), None, "-1 marks items"),
        (codes + 4, (4, 4), None, "outside its codebook"),
        (codes, (4, 4, 4), None, "shape"),
        (codes[:0], (4, 4), None, "shape"),
        (codes, (4, 4), np.ones((2, 3)), "3 items need a row each"),
    ]:
        with pytest.raises(ValueError, match=message):
            resolve_shared(wrong, sizes, vectors)


# --- the published files --------------------------------------------------------------------------


def test_letter_beauty(genrec_data: Path, tmp_path: Path):
    folder = genrec_data / "amazon2014-beauty"
    path, items = folder / "letter_sids.json", pl.Series("item_id", range(1, 12_102))
    with pytest.raises(ValueError, match="offset=1 "):
        read_index(path, items)
    index = read_index(path, items, offset=1)
    assert index.codes.shape == (12_101, 4)
    assert index.codes[0].tolist() == [183, 70, 232, 6]
    assert (len(index.missing), len(index.extra), index.ranked) == (0, 0, 0)
    assert (len(index.shared_items), sum(map(len, index.shared_items))) == (11, 24)
    vectors = np.load(folder / "minilm_embeddings.npy", mmap_mode="r")
    new = resolve_shared(index.codes, index.codebook_sizes, vectors)
    assert (new != index.codes).any(axis=1).sum() == 13
    assert (new[:, :3] == index.codes[:, :3]).all()
    semantic_ids = SemanticIds(items, new, index.codebook_sizes)
    semantic_ids.export_index(tmp_path / "index.json")
    back = read_index(tmp_path / "index.json", items)
    assert (back.codes == new).all() and back.shared_items == ()


def test_minionerec_industrial(genrec_data: Path):
    path = genrec_data / "amazon2018-industrial" / "minionerec_sids.json"
    index = read_index(path, pl.Series("item_id", range(3_686)))
    assert index.codes.shape == (3_686, 3)
    assert len(np.unique(index.codes[:, 0])) == 48
    assert sum(map(len, index.shared_items)) == 31
    assert index.ranked == 0  # the release repeats SIDs instead of ranking them
    surplus = 31 - len(index.shared_items)
    moved = (resolve_shared(index.codes, index.codebook_sizes) != index.codes).any(axis=1)
    assert moved.sum() == surplus
