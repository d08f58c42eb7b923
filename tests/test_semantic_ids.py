"""SemanticIds: names, round trips, bijectivity, lineage and the exported form."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.quantizers.quality import collision_rate, level_usage
from genrec.semantic_ids import SemanticIds, level_name, sid_token


@st.composite
def maps(draw) -> SemanticIds:
    levels, size = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    every = list(itertools.product(range(size), repeat=levels))
    rows = draw(st.lists(st.sampled_from(every), min_size=1, max_size=40, unique=True))
    ids: list = draw(st.lists(st.integers(), min_size=len(rows), max_size=len(rows), unique=True))
    ids = [i % 2**62 for i in ids]
    if len(set(ids)) < len(ids):
        ids = list(range(len(ids)))
    if draw(st.booleans()):
        ids = [f"id {i}" for i in ids]
    return SemanticIds(pl.Series("item_id", ids), np.array(rows), (size,) * levels)


def test_level_names_go_on_after_z():
    names = [level_name(i) for i in range(26 + 26 * 26 + 1)]
    assert (names[0], names[25], names[26], names[27], names[51], names[52]) == (
        "a", "z", "aa", "ab", "az", "ba",
    )  # fmt: skip
    assert (names[701], names[702]) == ("zz", "aaa")
    assert len(set(names)) == len(names)
    assert sid_token(0, 12) == "<a_12>" and sid_token(26, 0) == "<aa_0>"


def test_a_map_of_thirty_levels_round_trips():
    codes = np.random.default_rng(0).integers(0, 3, (5, 30))
    ids = SemanticIds(pl.Series("item_id", range(5)), codes, (3,) * 30)
    assert [ids.parse(sid) for sid in ids.sids()] == [tuple(row) for row in codes.tolist()]
    assert len(set(ids.tokens())) == 90


@settings(max_examples=60, deadline=None)
@given(maps())
def test_items_codes_and_tokens_round_trip(ids: SemanticIds):
    sids = ids.sids()
    assert sids.n_unique() == ids.n_items
    tokens = set(ids.tokens())
    for row, sid in enumerate(sids):
        codes = ids.parse(sid)
        assert codes == tuple(ids.codes[row].tolist())
        assert ids.index_of(codes) == row
        parts = [sid_token(level, code) for level, code in enumerate(codes)]
        assert "".join(parts) == sid and set(parts) <= tokens


def test_index_of_codes_that_no_item_has():
    ids = SemanticIds(pl.Series("item_id", [5, 6]), np.array([[0, 1], [1, 0]]), (2, 2))
    assert ids.index_of((0, 0)) is None and ids.index_of((1, 0)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "", "<a_0>", "<a_0><b_1><c_0>", "<b_1><a_0>", "<a_0> <b_1>", " <a_0><b_1>", "<a_0><b_1>x",
        "<a_0><b_-1>", "<a_0><b_2>", "<a_00><b_1>", "<a_0><b_01>", "<a_٠><b_1>", "<A_0><b_1>",
        "<a_0><b_1>\n",
    ],
)  # fmt: skip
def test_what_is_no_sid_of_the_map_is_refused(text: str):
    ids = SemanticIds(pl.Series("item_id", [5, 6]), np.array([[0, 1], [1, 0]]), (2, 2))
    with pytest.raises(ValueError, match="is not a SID of 2 levels such as <a_0><b_1>"):
        ids.parse(text)


@pytest.mark.parametrize(
    ("item_ids", "codes", "sizes", "message"),
    [
        ([1, 2], [[0, 1], [0, 1]], (2, 2), r"2 items share a SID \(first: \[1, 2\]\)"),
        ([1, 1], [[0, 1], [1, 1]], (2, 2), "item ids repeat"),
        ([1, 2], [[0, 1], [0, 2]], (2, 2), "outside its codebook"),
        ([1, 2], [[0, 1], [0, -1]], (2, 2), "outside its codebook"),
        ([1, 2], [[0, 1], [1, 1]], (2, 2, 2), r"need \(2, 3\)"),
        ([1], [[0, 1], [1, 1]], (2, 2), r"need \(1, 2\)"),
        ([1, 2], [0, 1], (2,), "shape"),
        ([], np.zeros((0, 2)), (2, 2), "no items"),
    ],
)
def test_invariants_are_checked_when_built(item_ids, codes, sizes, message: str):
    with pytest.raises(ValueError, match=message):
        SemanticIds(pl.Series("item_id", item_ids, dtype=pl.Int64), np.array(codes), sizes)


@settings(max_examples=25, deadline=None)
@given(maps())
def test_saved_and_loaded_is_the_same_map(tmp_path_factory, ids: SemanticIds):
    folder = tmp_path_factory.mktemp("map")
    ids.save(folder)
    back = SemanticIds.load(folder)
    assert back.sha256 == ids.sha256
    assert back.item_ids.to_list() == ids.item_ids.to_list()  # 7 stays 7 and "7" stays "7"
    assert back.item_ids.dtype == ids.item_ids.dtype
    assert (back.codes == ids.codes).all() and back.codebook_sizes == ids.codebook_sizes
    assert back.sids().to_list() == ids.sids().to_list()


def tamper(folder: Path, change: str) -> None:
    path, about = folder / "items.parquet", folder / "semantic_ids.json"
    table = pl.read_parquet(path)
    if change == "swap":
        table = table.with_columns(pl.col("codes").reverse())
    elif change == "collide":
        table = table.with_columns(
            codes=pl.Series([[0, 0, 0]] * len(table), dtype=pl.Array(pl.Int32, 3))
        )
    elif change == "drop":
        table = table[1:]
    elif change == "rename":
        table = table.with_columns(pl.col("item_id") + 1000)
    elif change == "sizes":
        value = json.loads(about.read_text())
        about.write_text(json.dumps({**value, "codebook_sizes": [9, 9, 9]}))
    table.write_parquet(path)


@pytest.mark.parametrize("change", ["swap", "collide", "drop", "rename", "sizes"])
def test_a_tampered_map_is_refused(tmp_path: Path, tiny, change: str):
    tiny.sids(10).save(tmp_path)
    SemanticIds.load(tmp_path)
    tamper(tmp_path, change)
    with pytest.raises(ValueError, match="doesn't match semantic_ids.json|share a SID"):
        SemanticIds.load(tmp_path)


@pytest.mark.parametrize(
    "change", [{"ancestors": ["0" * 64]}, {"version": 7}, {"quantizer_sha256": "0" * 64}]
)
def test_a_tampered_lineage_is_refused(tmp_path: Path, tiny, change: dict):
    """Models accept a map by its ancestors, so a stranger's hash there must not pass."""
    tiny.sids(10).save(tmp_path)
    about = tmp_path / "semantic_ids.json"
    value = json.loads(about.read_text())
    about.write_text(json.dumps(value | change))
    with pytest.raises(ValueError, match="version, ancestors or quantizer_sha256 of"):
        SemanticIds.load(tmp_path)
    value.pop("lineage_sha256")  # of before it was kept
    about.write_text(json.dumps(value))
    assert SemanticIds.load(tmp_path).sha256 == value["sha256"]
    about.write_text(json.dumps(value | {"version": 2, "ancestors": ["0" * 64]}))
    with pytest.raises(ValueError, match="names ancestors without lineage_sha256"):
        SemanticIds.load(tmp_path)


def test_shuffled_rows_are_the_same_map(tmp_path: Path, tiny):
    ids = tiny.sids(10)
    ids.save(tmp_path)
    table = pl.read_parquet(tmp_path / "items.parquet")
    table.sample(fraction=1.0, shuffle=True, seed=1).write_parquet(tmp_path / "items.parquet")
    assert (SemanticIds.load(tmp_path).codes == ids.codes).all()


def test_an_extension_keeps_old_codes_and_descends(tmp_path: Path, tiny):
    ids = tiny.sids(10)
    free = [c for c in itertools.product(range(4), repeat=3) if ids.index_of(c) is None]
    more = ids.extend(pl.Series("anything", [900, 901]), np.array(free[:2]))
    most = more.extend(pl.Series("item_id", [902]), np.array(free[2:3]))
    assert (most.codes[:10] == ids.codes).all() and most.version == 3
    assert most.item_ids.to_list() == [*ids.item_ids, 900, 901, 902]
    assert all(most.descends_from(a.sha256) for a in (ids, more, most))
    assert not ids.descends_from(more.sha256)
    assert not most.descends_from(tiny.sids(11).sha256)
    most.save(tmp_path)
    back = SemanticIds.load(tmp_path)
    assert back.descends_from(ids.sha256) and back.version == 3
    with pytest.raises(ValueError, match="share a SID"):
        ids.extend(pl.Series("item_id", [900]), ids.codes[:1])
    with pytest.raises(ValueError, match="item ids repeat"):
        ids.extend(ids.item_ids[:1], np.array(free[:1]))


def small_map(ids=(1, 2, 3), codes=((0, 0), (0, 1), (1, 1))) -> SemanticIds:
    return SemanticIds(pl.Series("item_id", list(ids)), np.array(codes), (3, 3))


def test_an_item_leaves_and_returns():
    first = small_map()
    second = first.successor(pl.Series([3, 1]), np.array([[1, 1], [0, 0]]))  # 2 left, order changed
    assert second.item_ids.to_list() == [3, 1] and second.version == 2
    assert second.reserved is not None
    assert second.reserved.to_dict(as_series=False) == {"item_id": [2], "codes": [[0, 1]]}
    assert second.descends_from(first.sha256) and not first.descends_from(second.sha256)
    codes, known = second.known_codes(pl.Series([9, 2, 1]))
    assert codes.tolist() == [[-1, -1], [0, 1], [0, 0]] and known.tolist() == [False, True, True]
    assert codes.dtype == np.int32
    assert second.taken_codes().tolist() == [[1, 1], [0, 0], [0, 1]]
    # Its SID is not given away, whoever asks.
    with pytest.raises(ValueError, match="a SID is used twice among items and reserved ones"):
        second.extend(pl.Series([9]), np.array([[0, 1]]))
    with pytest.raises(ValueError, match="1 items changed their SID, the first is 2; a map only"):
        second.extend(pl.Series([2]), np.array([[2, 2]]))
    third = second.extend(pl.Series([2, 9]), np.array([[0, 1], [2, 2]]))
    assert third.reserved is None and third.item_ids.to_list() == [3, 1, 2, 9]
    assert third.version == 3 and third.ancestors == (first.sha256, second.sha256)
    assert third.descends_from(first.sha256) and third.descends_from(third.sha256)


def test_a_successor_needs_codes_that_fit():
    ids = small_map()
    with pytest.raises(ValueError, match="1 items changed their SID, the first is 2; a map only"):
        ids.successor(pl.Series([1, 2]), np.array([[0, 0], [2, 2]]))
    with pytest.raises(ValueError, match=r"codes have shape \(1, 2\), \(2, 2\) is needed"):
        ids.successor(pl.Series([1, 2]), np.array([[0, 0]]))
    with pytest.raises(ValueError, match="2 items share a SID"):
        ids.successor(pl.Series([1, 7]), np.array([[0, 0], [0, 0]]))
    with pytest.raises(ValueError, match="item ids repeat"):
        ids.successor(pl.Series([1, 1]), np.array([[0, 0], [0, 0]]))
    with pytest.raises(ValueError, match="outside its codebook"):
        ids.successor(pl.Series([1, 7]), np.array([[0, 0], [3, 0]]))
    with pytest.raises(ValueError, match="no items"):
        ids.successor(pl.Series([], dtype=pl.Int64), np.zeros((0, 2)))


@pytest.mark.parametrize("other", [pl.Series(["1", "2"]), pl.Series([1, 2], dtype=pl.Int32)])
def test_ids_of_another_type_are_refused_rather_than_unknown(other: pl.Series):
    for call in (lambda: small_map().known_codes(other),
                 lambda: small_map().successor(other, np.array([[0, 0], [0, 1]]))):  # fmt: skip
        with pytest.raises(ValueError, match="item ids are .*, the map's are Int64; read both"):
            call()


def test_codes_of_known_items_come_in_the_order_asked_for():
    ids = small_map(("b", "a", "c"))
    codes, known = ids.known_codes(pl.Series(["c", "x", "b", "c"]))
    assert codes.tolist() == [[1, 1], [-1, -1], [0, 0], [1, 1]]
    assert known.tolist() == [True, False, True, True]
    codes, known = ids.known_codes(pl.Series([], dtype=pl.String))
    assert codes.shape == (0, 2) and known.shape == (0,)


def reserved(ids: list, codes: list, n_levels: int = 2) -> pl.DataFrame:
    rows = np.array(codes, dtype=np.int32).reshape(-1, n_levels)
    return pl.DataFrame({"item_id": ids, "codes": pl.Series(rows, dtype=pl.Array(pl.Int32, n_levels))})  # fmt: skip # noqa: E501


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (reserved([9], [[0, 0]]), "a SID is used twice among items and reserved ones"),
        (reserved([8, 9], [[2, 2], [2, 2]]), "a SID is used twice"),
        (reserved([1], [[2, 2]]), "both in the catalogue and among the reserved ones"),
        (reserved([9], [[2, 3]]), "a reserved code lies outside its codebook"),
        (reserved([9], [[2, -1]]), "a reserved code lies outside its codebook"),
        (reserved([9], [[2, 2, 2]], 3), r"reserved codes have shape \(1, 3\); 2 levels are needed"),
        (reserved(["9"], [[2, 2]]), "reserved item ids are String, the catalogue's are Int64"),
        (reserved([9, 9], [[2, 2], [2, 1]]), "reserved item ids repeat"),
    ],
)
def test_reserved_sids_are_checked(frame: pl.DataFrame, message: str):
    ids = small_map()
    with pytest.raises(ValueError, match=message):
        SemanticIds(ids.item_ids, ids.codes, (3, 3), reserved=frame)


@pytest.mark.parametrize("strings", [False, True])
def test_a_map_with_reserved_sids_is_saved_and_loaded(tmp_path: Path, tiny, strings: bool):
    first = tiny.sids(10, strings=strings)
    second = first.successor(first.item_ids[3:], first.codes[3:]).with_quantizer("abc")
    second.save(tmp_path)
    back = SemanticIds.load(tmp_path)
    assert back.sha256 == second.sha256 and back.quantizer_sha256 == "abc"
    assert back.version == 2 and back.ancestors == second.ancestors
    assert back.reserved is not None and back.reserved.equals(second.reserved)
    returned = back.successor(first.item_ids, first.codes)
    assert returned.reserved is None and returned.version == 3
    assert returned.sha256 == first.sha256  # the same map again


@pytest.mark.parametrize("change", ["codes", "ids", "drop", "forget", "file"])
def test_tampered_reserved_sids_are_refused(tmp_path: Path, tiny, change: str):
    first = tiny.sids(10)
    first.successor(first.item_ids[3:], first.codes[3:]).save(tmp_path)
    path, about = tmp_path / "reserved.parquet", tmp_path / "semantic_ids.json"
    table = pl.read_parquet(path)
    if change == "codes":
        table.with_columns(pl.col("codes").reverse()).write_parquet(path)
    elif change == "ids":
        table.with_columns(pl.col("item_id") + 1000).write_parquet(path)
    elif change == "drop":
        table[1:].write_parquet(path)
    elif change == "forget":
        about.write_text(json.dumps({**json.loads(about.read_text()), "reserved": 0}))
    else:
        path.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="match semantic_ids.json|reserved"):
        SemanticIds.load(tmp_path)


def test_the_quantizer_is_named_and_inherited(tmp_path: Path):
    plain = small_map()
    named = plain.with_quantizer("abc")
    assert plain.quantizer_sha256 is None and named.quantizer_sha256 == "abc"
    assert named.sha256 == plain.sha256 and named.descends_from(plain.sha256)
    assert named.extend(pl.Series([9]), np.array([[2, 2]])).quantizer_sha256 == "abc"
    named.save(tmp_path)
    assert SemanticIds.load(tmp_path).quantizer_sha256 == "abc"


def test_the_hash_of_a_map_without_reserved_sids_stays_what_it_was(tmp_path: Path):
    # By hand, from the definition that the first release had: what trained models refer to.
    ids = small_map()
    text = json.dumps([[3, 3], [1, 2, 3]]).encode()
    codes = np.array([[0, 0], [0, 1], [1, 1]], dtype="<i4").tobytes()
    assert ids.sha256 == hashlib.sha256(text + codes).hexdigest()
    ids.save(tmp_path)  # and files of that release, without the newer fields, can be read
    about = json.loads((tmp_path / "semantic_ids.json").read_text())
    for name in ("reserved", "quantizer_sha256"):
        del about[name]
    (tmp_path / "semantic_ids.json").write_text(json.dumps(about))
    back = SemanticIds.load(tmp_path)
    assert back.sha256 == ids.sha256 and back.reserved is None and back.quantizer_sha256 is None


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, 14), min_size=1, max_size=10, unique=True), min_size=1, max_size=7
    ),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_no_sid_ever_changes_hands(tmp_path_factory, catalogues, strings: bool, random):
    """Catalogues of any items in any order, one after the other."""
    name = (lambda i: f"item {i}") if strings else (lambda i: i)
    every = list(itertools.product(range(4), repeat=2))
    owner: dict[tuple, object] = {}  # who ever had a SID, kept apart from the code under test
    ids: SemanticIds | None = None
    for catalogue in catalogues:
        items = pl.Series("item_id", [name(i) for i in catalogue])
        free = [sid for sid in every if sid not in owner]
        random.shuffle(free)
        if ids is None:
            codes = np.array(free[: len(items)])
            ids = SemanticIds(items, codes, (4, 4))
        else:
            before, known = ids.known_codes(items)
            assert known.tolist() == [item in owner.values() for item in items]
            assert not set(map(tuple, ids.taken_codes().tolist())) & set(free)
            codes = before.copy()
            codes[~known] = np.array(free[: (~known).sum()], dtype=np.int32).reshape(-1, 2)
            last = ids.sha256
            ids = ids.successor(items, codes)
            assert ids.descends_from(last)
        for item, sid in zip(items, map(tuple, ids.codes.tolist()), strict=True):
            assert owner.setdefault(sid, item) == item
        assert {tuple(row) for row in ids.taken_codes().tolist()} == set(owner)
        assert ids.item_ids.to_list() == items.to_list()
        folder = tmp_path_factory.mktemp("map")
        ids.save(folder)
        ids = SemanticIds.load(folder)
    assert ids is not None and ids.version == len(catalogues)


def test_hash_covers_ids_order_codes_and_sizes():
    def made(item_ids=(1, 2), codes=((0, 1), (1, 1)), sizes=(2, 2)) -> str:
        return SemanticIds(pl.Series("item_id", list(item_ids)), np.array(codes), sizes).sha256

    others = [
        made(item_ids=(2, 1)), made(item_ids=("1", "2")), made(codes=((1, 1), (0, 1))),
        made(sizes=(2, 3)), made(item_ids=(1, 3)),
    ]  # fmt: skip
    assert made() == made()
    assert len({made(), *others}) == 6


def test_index_json_has_the_form_of_lc_rec(tmp_path: Path):
    ids = SemanticIds(pl.Series("item_id", [7, 30]), np.array([[0, 1], [1, 0]]), (2, 2))
    ids.export_index(tmp_path / "index.json")
    assert json.loads((tmp_path / "index.json").read_text()) == {
        "7": ["<a_0>", "<b_1>"],
        "30": ["<a_1>", "<b_0>"],
    }


def test_collision_rate_and_perplexity_by_hand():
    # Items 0, 1, 2 share one SID, items 3, 4 another, 5, 6, 7 are alone: 5 of 8 share.
    codes = np.array([[0, 0]] * 3 + [[0, 1]] * 2 + [[1, 0], [1, 1], [2, 0]])
    assert collision_rate(codes) == 5 / 8
    assert collision_rate(codes[5:]) == 0.0
    first, second = level_usage(codes, (4, 2))
    # Level 0: 5/8, 2/8, 1/8 of the items; 2 ** 1.298795 (bits) = 2.460.
    assert (first["size"], first["used"]) == (4, 3)
    assert first["perplexity"] == pytest.approx(2.46018, abs=1e-4)
    # Level 1: 5 and 3 of 8; 2 ** 0.954434 = 1.93782.
    assert second["perplexity"] == pytest.approx(1.93782, abs=1e-4)
    assert level_usage(np.arange(8)[:, None], (8,))[0]["perplexity"] == pytest.approx(8.0)
