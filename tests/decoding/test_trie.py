"""SidTrie and CatalogueView."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.decoding.trie import SidTrie

CODES = np.array([[1, 0], [0, 2], [0, 0], [2, 1], [0, 1], [2, 0]])  # leaves: 2 4 1 0 5 3


def rebuild(trie: SidTrie) -> np.ndarray:
    """Codes of each catalogue row, read back by walking down from the root."""
    paths = [((), 0)]
    for level in range(trie.n_levels):
        start = trie.children[level]
        paths = [
            ((*path, trie.tokens[level][child]), child)
            for path, node in paths
            for child in range(start[node], start[node + 1])
        ]
    leaves = np.array([path for path, _ in paths])
    return leaves[trie.leaf_of_item]


@st.composite
def catalogues(draw: st.DrawFn) -> np.ndarray:
    n_levels = draw(st.integers(1, 4))
    rows = draw(st.sets(st.tuples(*[st.integers(0, 4)] * n_levels), min_size=1, max_size=40))
    return np.array(draw(st.permutations(sorted(rows))))


@given(catalogues())
@settings(deadline=None, max_examples=60)
def test_walking_down_gives_the_codes_back(codes: np.ndarray):
    trie = SidTrie.build(codes)
    assert (rebuild(trie) == codes).all()
    assert (trie.codes() == codes).all()
    assert (trie.n_items, trie.n_levels) == codes.shape
    assert (trie.items[trie.leaf_of_item] == np.arange(len(codes))).all()
    for level in range(trie.n_levels):
        assert len(trie.tokens[level]) == len(np.unique(codes[:, : level + 1], axis=0))
        assert trie.max_children(level) >= 1


@given(catalogues())
@settings(deadline=None, max_examples=30)
def test_comparing_ids_compares_sids(codes: np.ndarray):
    trie = SidTrie.build(codes)
    assert [tuple(row) for row in codes[trie.items]] == sorted(map(tuple, codes))


@given(catalogues(), st.data())
@settings(deadline=None, max_examples=60)
def test_views_and_exclusions_count_items(codes: np.ndarray, data: st.DataObject):
    trie = SidTrie.build(codes)
    rows = st.integers(0, len(codes) - 1)
    allowed = data.draw(st.lists(rows, min_size=1))
    seen = data.draw(st.lists(st.tuples(st.integers(0, 2), rows)))
    view = trie.allow(np.array(allowed))
    users, items = np.array(seen, dtype=int).reshape(-1, 2).T
    dead = view.exclude(users, items)
    for level in range(trie.n_levels):
        n_nodes = len(trie.tokens[level])
        node_of_item = trie.node_of_leaf(level, trie.leaf_of_item)
        expected = []
        for node in range(n_nodes):
            below = set(np.flatnonzero(node_of_item == node)) & set(allowed)
            assert view.count(level, np.array([node])).item() == len(below)
            for user in range(3):
                left = below - {item for u, item in seen if u == user}
                if below and not left:
                    expected.append(user * n_nodes + node)
        assert dead[level].tolist() == sorted(expected)


def test_arrays_by_hand():
    trie = SidTrie.build(CODES)
    assert [t.tolist() for t in trie.tokens] == [[0, 1, 2], [0, 1, 2, 0, 0, 1]]
    assert [c.tolist() for c in trie.children] == [[0, 3], [0, 3, 4, 6]]
    assert trie.items.tolist() == [2, 4, 1, 0, 5, 3]
    assert [trie.max_children(level) for level in (0, 1)] == [3, 3]
    assert trie.node_of_leaf(0, np.arange(6)).tolist() == [0, 0, 0, 1, 2, 2]


def test_exclusions_by_hand():
    trie = SidTrie.build(CODES)
    users, items = np.array([0, 0, 1, 1, 1, 1]), np.array([0, 3, 1, 2, 4, 4])
    top, bottom = trie.everything().exclude(users, items)
    assert top.tolist() == [1, 3 + 0]  # user 0 lost code 1's only item, user 1 all three of code 0
    assert bottom.tolist() == [3, 5, 6 + 0, 6 + 1, 6 + 2]
    # A view of items 3 and 5, both under code 2: losing 3 leaves the node alive, losing both not.
    view = trie.allow(np.array([3, 5]))
    assert [keys.tolist() for keys in view.exclude(np.array([0, 0]), np.array([3, 1]))] == [[], [5]]
    assert view.exclude(np.array([0, 0]), np.array([3, 5]))[0].tolist() == [2]


def test_ragged_branching():
    codes = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 2], [1, 1, 3]])
    trie = SidTrie.build(codes)
    assert [c.tolist() for c in trie.children] == [[0, 2], [0, 1, 3], [0, 1, 2, 6]]
    assert [trie.max_children(level) for level in range(3)] == [2, 2, 4]


def test_one_item():
    trie = SidTrie.build(np.array([[7, 0, 3]]))
    assert (rebuild(trie) == [[7, 0, 3]]).all()
    assert [keys.tolist() for keys in trie.everything().exclude(np.array([0]), np.array([0]))] == [
        [0]
    ] * 3


def test_many_levels_of_few_codes():
    codes = np.unique(np.random.default_rng(0).integers(0, 2, (50, 40)), axis=0)
    assert (rebuild(SidTrie.build(codes)) == codes).all()


def test_size_grows_with_items_not_with_codebooks():
    rng = np.random.default_rng(0)
    for size in (16, 4096):
        codes = np.unique(rng.integers(0, size, (20_000, 4)), axis=0)
        trie = SidTrie.build(codes)
        # 8 bytes of leaf maps per item, 12 per node, and no level has more nodes than items.
        assert trie.nbytes <= len(codes) * (8 + 12 * 4) + 4 * (2 * 4 + 2)


@given(catalogues(), st.data())
@settings(deadline=None, max_examples=60)
def test_candidates_count_items(codes: np.ndarray, data: st.DataObject):
    trie = SidTrie.build(codes)
    rows = st.integers(0, len(codes) - 1)
    pairs = st.lists(st.tuples(st.integers(0, 2), rows))
    view = trie.allow(np.array(data.draw(st.lists(rows, min_size=1))))
    wanted, seen = (np.array(data.draw(pairs), dtype=int).reshape(-1, 2) for _ in range(2))
    alive = view.only(*wanted.T, *seen.T)
    allowed = set(np.flatnonzero(view.mask()))
    for level in range(trie.n_levels):
        node_of_item = trie.node_of_leaf(level, trie.leaf_of_item)
        expected = {
            user * len(trie.tokens[level]) + node_of_item[item]
            for user, item in set(map(tuple, wanted)) - set(map(tuple, seen))
            if item in allowed
        }
        assert alive[level].tolist() == sorted(expected)


@given(catalogues(), st.data())
@settings(deadline=None, max_examples=40)
def test_views_are_masks(codes: np.ndarray, data: st.DataObject):
    trie = SidTrie.build(codes)
    masks = [
        np.array(data.draw(st.lists(st.booleans(), min_size=len(codes), max_size=len(codes))))
        for _ in range(2)
    ]
    if not all(mask.any() for mask in masks):
        with pytest.raises(ValueError, match="allows no item"):
            trie.view(masks[0] & masks[1] & False)
        return
    first, second = map(trie.view, masks)
    assert (first.mask() == masks[0]).all() and first.n_allowed == masks[0].sum()
    assert first.allows_all == masks[0].all()
    assert (trie.allow(np.flatnonzero(masks[0])).before == first.before).all()
    if not masks[0].all():
        assert (trie.deny(np.flatnonzero(~masks[0])).before == first.before).all()
    for level in range(trie.n_levels):
        node_of_item = trie.node_of_leaf(level, trie.leaf_of_item)
        below = np.bincount(node_of_item[masks[0]], minlength=len(trie.tokens[level]))
        assert (first.alive(level) == (below > 0)).all()
    if (masks[0] & masks[1]).any():
        assert ((first & second).mask() == (masks[0] & masks[1])).all()
    else:
        with pytest.raises(ValueError, match="allows no item"):
            first & second


@given(catalogues())
@settings(deadline=None, max_examples=25)
def test_sids_of_any_size_are_sorted_alike(codes: np.ndarray):
    """In one machine word, or column by column where one doesn't hold them."""
    expected = np.lexsort(codes.T[::-1])
    assert (SidTrie.build(codes).items == expected).all()
    wide = np.concatenate([codes * (1 << 20), codes, codes], axis=1)
    wide[:, 0] += 1 << 29  # with the other columns more than 63 bits
    assert (SidTrie.build(np.repeat(wide, 2, axis=1)).items == expected).all()


def test_saved_tries_are_mapped_and_belong_to_a_map(tmp_path):
    codes = np.unique(np.random.default_rng(1).integers(0, 30, (500, 3)), axis=0)
    trie = SidTrie.build(codes)
    trie.save(tmp_path / "trie", "abc")
    loaded = SidTrie.load(tmp_path / "trie", "abc")
    assert loaded.sha256 == trie.sha256
    assert (loaded.codes() == codes).all() and loaded.nbytes == trie.nbytes
    assert isinstance(loaded.items.base, np.memmap) and loaded.end_code is None
    assert (loaded.allow(np.array([3, 7])).mask() == trie.allow(np.array([7, 3])).mask()).all()
    with pytest.raises(FileExistsError, match="remove it"):
        trie.save(tmp_path / "trie", "abc")
    with pytest.raises(ValueError, match="trie of SID map abc, not of xyz"):
        SidTrie.load(tmp_path / "trie", "xyz")
    with pytest.raises(ValueError, match="no trie.json"):
        SidTrie.load(tmp_path, "abc")
    assert [path.name for path in tmp_path.iterdir()] == ["trie"]
    items = tmp_path / "trie" / "items.npy"
    items.write_bytes(items.read_bytes()[:-8])
    with pytest.raises(ValueError, match="items.npy is missing or damaged"):
        SidTrie.load(tmp_path / "trie", "abc")
    np.save(items, trie.items[::-1])  # of the right shape, but every SID would be another item's
    with pytest.raises(ValueError, match="items.npy is missing or damaged"):
        SidTrie.load(tmp_path / "trie", "abc")
    items.unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        SidTrie.load(tmp_path / "trie", "abc")


def test_the_trie_of_a_map_is_mapped_or_built(tiny, tmp_path):
    semantic_ids = tiny.sids(30)
    built = SidTrie.of_map(semantic_ids, tmp_path)  # nothing was left there
    assert (built.codes() == semantic_ids.codes).all() and not isinstance(
        built.items.base, np.memmap
    )
    built.save(tmp_path / "trie", semantic_ids.sha256)
    mapped = SidTrie.of_map(semantic_ids, tmp_path)
    assert (mapped.codes() == semantic_ids.codes).all()
    assert isinstance(mapped.items.base, np.memmap)
    with pytest.raises(ValueError, match="run quantize again"):  # a stranger's is never used
        SidTrie.of_map(tiny.sids(31), tmp_path)


def test_title_tries_keep_their_end_mark(tmp_path):
    SidTrie.build(np.array([[1, 9, 9], [1, 2, 9]]), end_code=9).save(tmp_path / "t", "s")
    assert SidTrie.load(tmp_path / "t", "s").end_code == 9


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((0, 3)), "with items is needed"),
        (np.zeros(3), "with items is needed"),
        (np.array([[1, 2], [0, 1], [1, 2]]), "1 items repeat"),
        (np.array([[1, 2], [0, -1]]), "codes hold -1"),
    ],
)
def test_unusable_codes_are_refused(codes: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        SidTrie.build(codes)


def test_unusable_lists_are_refused():
    trie = SidTrie.build(CODES)
    with pytest.raises(ValueError, match="empty"):
        trie.allow(np.array([], dtype=int))
    for wrong in (-1, 6):
        with pytest.raises(ValueError, match="there are 0..5"):
            trie.allow(np.array([0, wrong]))
        with pytest.raises(ValueError, match="there are 0..5"):
            trie.deny(np.array([wrong]))
        with pytest.raises(ValueError, match="there are 0..5"):
            trie.everything().exclude(np.array([0]), np.array([wrong]))


def test_unusable_masks_are_refused():
    trie = SidTrie.build(CODES)
    for mask in (np.ones(5, dtype=bool), np.ones(6, dtype=int)):
        with pytest.raises(ValueError, match=r"bool \(6,\) is needed"):
            trie.view(mask)
    with pytest.raises(ValueError, match="allows no item"):
        trie.deny(np.arange(6))
    assert trie.deny(np.array([], dtype=int)).allows_all
    with pytest.raises(ValueError, match="different tries"):
        trie.everything() & SidTrie.build(CODES).everything()


def test_end_marks_close_every_row():
    assert SidTrie.build(np.array([[1, 9, 9], [1, 2, 9]]), end_code=9).end_code == 9
    for codes in ([[1, 9, 2], [1, 2, 9]], [[1, 2, 3], [1, 9, 9]]):
        with pytest.raises(ValueError, match="end_code=9 must end every row"):
            SidTrie.build(np.array(codes), end_code=9)
