"""Collision resolution: bijective always, and no more distortion than needed."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.quantizers import collisions as module
from genrec.quantizers import quantizer as quantizer_module
from genrec.quantizers.collisions import (
    METHODS,
    has_item_tokens,
    place_items,
    resolve_collisions,
    uniform_plan,
)
from genrec.quantizers.hierarchical_kmeans import HierarchicalKMeans
from genrec.quantizers.projection import Projection
from genrec.quantizers.quality import collision_rate, row_ids
from genrec.quantizers.residual_kmeans import ResidualKMeans


def quantizer_of(*books: np.ndarray) -> ResidualKMeans:
    """Residual codes with these codebooks, in the space of the vectors."""
    dim = books[0].shape[1]
    return ResidualKMeans(
        Projection(np.zeros(dim, np.float32), None, np.ones(dim, np.float32)),
        tuple(np.asarray(book, np.float32) for book in books),
        tuple(np.zeros(len(book), np.float32) for book in books),
        None,
        seed=0,
    )


def random_quantizer(sizes: tuple[int, ...], dim: int, seed: int) -> ResidualKMeans:
    rng = np.random.default_rng(seed)
    return quantizer_of(
        *(rng.normal(size=(size, dim)) / (level + 1) for level, size in enumerate(sizes))
    )


def with_norms(quantizer: ResidualKMeans, seed: int) -> ResidualKMeans:
    """As with `normalize_residuals`: lower levels see unit vectors, and keep mean lengths."""
    rng = np.random.default_rng(seed)
    lengths = [rng.uniform(0.2, 2, size) for size in quantizer.codebook_sizes[:-1]]
    return replace(quantizer, norms=tuple(length.astype(np.float32) for length in lengths))


def distortion(quantizer: ResidualKMeans, vectors: np.ndarray, codes: np.ndarray) -> float:
    made = quantizer.reconstruct(np.asarray(codes, np.int32))
    return float(((vectors - made) ** 2).sum(axis=1).mean())


def is_bijective(codes: np.ndarray) -> bool:
    return len(np.unique(codes, axis=0)) == len(codes)


@st.composite
def worlds(draw):
    sizes = tuple(draw(st.lists(st.integers(2, 4), min_size=1, max_size=3)))
    full = int(np.prod(sizes))
    n = draw(st.one_of(st.integers(1, full), st.just(full)))
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["random", "identical", "few distinct", "one prefix", "encoded"]))
    vectors = rng.normal(size=(n, 3)).astype(np.float32)
    if kind == "identical":
        vectors[:] = vectors[0]
    elif kind == "few distinct":
        vectors = vectors[rng.integers(0, min(n, 3), n)]
    quantizer = random_quantizer(sizes, 3, seed)
    if draw(st.booleans()):
        quantizer = with_norms(quantizer, seed)
    codes = np.column_stack([rng.integers(0, size, n) for size in sizes]).astype(np.int32)
    if kind in ("identical", "one prefix"):
        codes[:] = codes[0]
    elif kind == "encoded":
        codes = quantizer.encode(vectors)
    return quantizer, vectors, codes


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=120, deadline=None)
@given(world=worlds())
def test_always_bijective_and_in_range(method, world):
    quantizer, vectors, codes = world
    before = codes.copy()
    new, sizes, report = resolve_collisions(quantizer, vectors, codes, method)
    assert (codes == before).all()  # the input is left alone
    assert is_bijective(new) and new.dtype == np.int32
    assert new.shape == (len(codes), len(sizes))
    assert new.min() >= 0 and (new < sizes).all()
    kept = new[:, : codes.shape[1]]
    assert sizes[: codes.shape[1]] == quantizer.codebook_sizes
    assert report.method == method and report.rate_before == collision_rate(codes)
    assert report.moved == (kept != codes).any(axis=1).sum()
    assert report.spilled == (kept[:, :-1] != codes[:, :-1]).any(axis=1).sum()
    assert report.distortion_before == pytest.approx(
        distortion(quantizer, vectors, codes), rel=1e-3, abs=1e-5
    )
    assert report.distortion_after == pytest.approx(
        distortion(quantizer, vectors, kept), rel=1e-3, abs=1e-5
    )
    _, counts = np.unique(codes, axis=0, return_counts=True)
    assert (report.groups, report.largest_group) == ((counts > 1).sum(), counts.max())
    if method == "suffix":
        assert (kept == codes).all() and sizes[-1] == 2 * counts.max()
    elif report.rate_before == 0:
        assert report.moved == 0 and report.distortion_before == report.distortion_after
    again = resolve_collisions(quantizer, vectors, codes, method)[0]
    assert (again == new).all()


@pytest.mark.parametrize("method", ["minimal", "sinkhorn"])
def test_nothing_moves_without_a_collision(method):
    every = np.array(list(itertools.product(range(4), repeat=2)))  # every SID is taken
    codes = every[np.random.default_rng(0).permutation(16)]
    vectors = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
    new, sizes, report = resolve_collisions(random_quantizer((4, 4), 3, 0), vectors, codes, method)
    assert (new == codes).all() and sizes == (4, 4) and report.moved == report.spilled == 0


def test_prefixes_without_a_collision_stay_as_they_are():
    vectors = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    codes = np.array([[0, 0], [0, 0], [1, 2], [1, 3], [2, 0]])
    new, _, report = resolve_collisions(random_quantizer((4, 4), 3, 1), vectors, codes)
    assert (new[2:] == codes[2:]).all() and (new[:, 0] == codes[:, 0]).all()
    assert report.spilled == 0 and 1 <= report.moved <= 2


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [4, 9])  # 4 * 2 < 9: the way that looks at few columns, too
@pytest.mark.parametrize("normed", [False, True])
def test_least_distortion_within_each_prefix_against_brute_force(
    seed: int, size: int, normed: bool
):
    vectors = np.random.default_rng(seed).normal(size=(6, 2)).astype(np.float32)
    quantizer = random_quantizer((4, size), 2, seed)
    if normed:
        quantizer = with_norms(quantizer, seed)
    codes = np.array([[0, 1], [0, 1], [0, 1], [0, 2], [1, 0], [1, 0]])
    new, _, report = resolve_collisions(quantizer, vectors, codes)
    assert (new[:, 0] == codes[:, 0]).all()

    def best(rows: slice, n: int) -> float:
        return min(
            n * distortion(quantizer, vectors[rows], np.column_stack([codes[rows, 0], last]))
            for last in itertools.permutations(range(size), n)
        )

    assert 6 * report.distortion_after == pytest.approx(
        best(slice(4), 4) + best(slice(4, 6), 2), rel=1e-4
    )


def test_a_report_by_hand():
    # On a line: prefixes at 0 and 10, steps of 0, 1 and 2.
    quantizer = quantizer_of(np.array([[0.0], [10.0]]), np.array([[0.0], [1.0], [2.0]]))
    vectors = np.array([[0.0], [0.0], [0.5], [10.0], [12.0]], dtype=np.float32)
    codes = np.array([[0, 0], [0, 0], [0, 0], [1, 0], [1, 2]])
    new, sizes, report = resolve_collisions(quantizer, vectors, codes)
    # Three items share <0, 0>; 0, 0 and 0.5 take the steps 0, 1, 2 at the least sum of squares:
    # 0.5 at 2 costs 2.25 + 1 + 0, at 1 it costs 0.25 + 4 + 0. So 3.25 in all, before 0.25.
    assert sorted(new[:2, 1].tolist()) == [0, 1] and new[2:].tolist() == [[0, 2], [1, 0], [1, 2]]
    assert sizes == (2, 3)
    assert (report.rate_before, report.groups, report.largest_group) == (3 / 5, 1, 3)
    assert (report.moved, report.spilled) == (2, 0)
    assert report.distortion_before == pytest.approx(0.25 / 5)
    assert report.distortion_after == pytest.approx(3.25 / 5)


def test_a_prefix_over_capacity_spills_its_outermost_items_to_the_nearest_sibling():
    # Three codes a level: prefix 0 holds three items but has five. Its centroid is at 0, the
    # siblings' at 10 and -100; the two items nearest to 10 lose least by leaving.
    quantizer = quantizer_of(np.array([[0.0], [10.0], [-100.0]]), np.array([[-1.0], [0.0], [1.0]]))
    vectors = np.array([[0.0], [1.0], [-1.0], [4.0], [4.5]], dtype=np.float32)
    codes = np.array([[0, 1], [0, 2], [0, 0], [0, 2], [0, 2]])
    new, _, report = resolve_collisions(quantizer, vectors, codes)
    assert new[:3].tolist() == [[0, 1], [0, 2], [0, 0]]
    assert new[3:, 0].tolist() == [1, 1] and is_bijective(new)
    assert report.spilled == report.moved == 2


def test_spilling_goes_to_the_next_sibling_if_the_nearest_is_full():
    quantizer = quantizer_of(np.array([[0.0], [10.0], [40.0]]), np.array([[0.0], [1.0]]))
    vectors = np.array([[0.0], [0.0], [4.0], [10.0], [11.0]], dtype=np.float32)
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 0], [1, 1]])
    new, _, report = resolve_collisions(quantizer, vectors, codes)
    assert new[2, 0] == 2 and (new[3:] == codes[3:]).all() and report.spilled == 1


@pytest.mark.parametrize("method", METHODS)
def test_as_many_identical_items_as_there_are_sids(method):
    vectors, codes = np.zeros((27, 2), dtype=np.float32), np.zeros((27, 3), dtype=int)
    new, sizes, report = resolve_collisions(random_quantizer((3, 3, 3), 2, 0), vectors, codes, method)  # fmt: skip # noqa: E501
    assert is_bijective(new)
    assert report.rate_before == 1.0
    if method == "suffix":
        assert sizes == (3, 3, 3, 54) and sorted(new[:, 3].tolist()) == list(range(27))


def test_item_tokens_go_below_what_the_quantizer_says():
    quantizer = random_quantizer((2, 2), 2, 0)
    codes = np.array([[1, 1], [0, 0], [1, 1], [0, 1]])
    vectors = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    new, sizes, report = resolve_collisions(quantizer, vectors, codes, "item-token")
    assert (new[:, :2] == codes).all() and new[:, 2].tolist() == [0, 1, 2, 3]
    assert sizes[:2] == (2, 2) and sizes[2] > 4  # room for later items
    assert report.moved == 0 and report.distortion_after == report.distortion_before
    assert has_item_tokens(new, sizes)
    suffixed, suffix_sizes, _ = resolve_collisions(quantizer, vectors, codes, "suffix")
    assert not has_item_tokens(suffixed, suffix_sizes)
    later = vectors[:1] + 0.01
    placed = place_items(quantizer, later, new, sizes, item_tokens=True)
    assert placed.tolist() == [[*quantizer.encode(later)[0], 4]]
    full = np.tile(later, (sizes[2] - 3, 1))
    with pytest.raises(ValueError, match="2 items don't fit into the 1 free SIDs"):
        place_items(quantizer, full, new, sizes, item_tokens=True)


def test_suffixes_number_the_items_of_a_sid():
    quantizer = random_quantizer((2, 2), 2, 0)
    codes = np.array([[1, 1], [0, 0], [1, 1], [0, 1], [1, 1], [0, 0]])
    vectors = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    new, sizes, report = resolve_collisions(quantizer, vectors, codes, "suffix")
    of_sid = [sorted(new[rows, 2].tolist()) for rows in ([0, 2, 4], [1, 5], [3])]
    assert of_sid == [[0, 1, 2], [0, 1], [0]] and sizes == (2, 2, 6)
    assert report.moved == 0 and report.distortion_after == report.distortion_before


def test_suffixes_take_more_items_than_the_quantizer_has_sids():
    new, _, _ = resolve_collisions(
        random_quantizer((2,), 2, 0), np.zeros((9, 2), np.float32), np.zeros((9, 1), int), "suffix"
    )
    assert is_bijective(new)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_catalogue_does_not_matter(seed: int):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(40, 3)).astype(np.float32) ** 3
    quantizer = random_quantizer((4, 4, 4), 3, seed)
    codes = quantizer.encode(vectors)
    assert collision_rate(codes) > 0.2
    new = resolve_collisions(quantizer, vectors, codes)[0]
    order = rng.permutation(40)
    assert (resolve_collisions(quantizer, vectors[order], codes[order])[0] == new[order]).all()


def test_a_transport_plan_spreads_rows_uniformly():
    rng = np.random.default_rng(0)
    distances = rng.gamma(2, size=(30, 6)).astype(np.float32)
    plan = uniform_plan(distances, epsilon=0.1, steps=500)
    assert plan.sum(axis=1) == pytest.approx(np.ones(30), abs=1e-4)
    assert plan.sum(axis=0) == pytest.approx(np.full(6, 5.0), abs=1e-2)
    # The unit of the distances does not matter, nor does an offset.
    assert uniform_plan(7 * distances + 3, 0.1, 500) == pytest.approx(plan, abs=1e-3)
    # A small epsilon neither under- nor overflows, and its plan is nearly an assignment.
    sharp = uniform_plan(distances, epsilon=1e-4, steps=2000)
    assert np.isfinite(sharp).all() and (sharp.max(axis=1) > 0.9).mean() > 0.7
    assert (sharp * distances).sum() < (plan * distances).sum()
    # Items that are alike tie.
    assert uniform_plan(np.ones((4, 2), np.float32)) == pytest.approx(np.full((4, 2), 0.5))


def test_sinkhorn_parts_what_collides_and_leaves_the_rest():
    # 0 … 3 collide on the last level, whose codes are at 0 … 3: each item has one near by.
    quantizer = quantizer_of(np.array([[0.0], [100.0]]), np.arange(4, dtype=np.float32)[:, None])
    vectors = np.array([[0.1], [1.1], [1.9], [3.2], [100.0]], dtype=np.float32)
    codes = np.array([[0, 1]] * 4 + [[1, 3]])
    new, _, report = resolve_collisions(quantizer, vectors, codes, "sinkhorn")
    assert new.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 3]]
    assert report.moved == 3 and report.method == "sinkhorn"


def test_minimal_costs_less_than_the_others():
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(20, 4))[rng.integers(0, 20, 400)] * 3).astype(np.float32)
    vectors += rng.normal(size=vectors.shape).astype(np.float32) * 0.3
    quantizer = ResidualKMeans.fit(vectors, (8, 8, 16))
    codes = quantizer.encode(vectors)
    cost = {m: resolve_collisions(quantizer, vectors, codes, m)[2] for m in METHODS}
    assert cost["minimal"].rate_before > 0.1
    assert cost["minimal"].distortion_after <= cost["sinkhorn"].distortion_after * 1.0001
    assert cost["suffix"].distortion_after == cost["suffix"].distortion_before


@pytest.mark.parametrize("crowd", [False, True])
def test_small_blocks_change_nothing(crowd: bool, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 3)).astype(np.float32)
    quantizer = random_quantizer((4, 4, 5), 3, 0)
    codes = quantizer.encode(vectors)
    if crowd:  # prefixes that have to spill
        codes[:] = codes[0]
    expected = resolve_collisions(quantizer, vectors, codes)
    assert crowd == (expected[2].spilled > 30)
    costs, largest = type(quantizer).level_costs, []

    def watched(self, latents: np.ndarray, prefix: np.ndarray, level: int) -> np.ndarray:
        found = costs(self, latents, prefix, level)
        largest.append(found.size)
        return found

    monkeypatch.setattr(type(quantizer), "level_costs", watched)
    for holder in (module, quantizer_module):
        monkeypatch.setattr(holder, "BLOCK_CELLS", 15)
    found = resolve_collisions(quantizer, vectors, codes)
    assert (found[0] == expected[0]).all()
    assert found[2].distortion_after == pytest.approx(expected[2].distortion_after, rel=1e-5)
    assert max(largest) <= 25  # 15, or one prefix of five items to five codes


def test_bad_input():
    quantizer = random_quantizer((3, 3), 2, 0)
    vectors, codes = np.zeros((9, 2), np.float32), np.zeros((9, 2), int)
    many = np.zeros((10, 2))
    message = r"10 items exceed the 9 SIDs of 3 x 3 codes; use \d+ levels of 3 codes"
    with pytest.raises(ValueError, match=message):
        resolve_collisions(quantizer, many, many.astype(int))
    with pytest.raises(ValueError, match="collisions='maximal' is none of minimal, sinkhorn, suf"):
        resolve_collisions(quantizer, vectors, codes, "maximal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="8 rows of codes for 9 vectors"):
        resolve_collisions(quantizer, vectors, codes[:8])
    with pytest.raises(ValueError, match="vectors have 3 dimensions, the quantizer was fitted on"):
        resolve_collisions(quantizer, np.zeros((9, 3), np.float32), codes)
    with pytest.raises(ValueError, match="has 2 levels"):
        resolve_collisions(quantizer, vectors, np.zeros((9, 3), int))
    with pytest.raises(ValueError, match="outside its codebook"):
        resolve_collisions(quantizer, vectors, codes + 3)
    with pytest.raises(ValueError, match="non-empty"):
        resolve_collisions(quantizer, vectors[:0], codes[:0])


# New items.


@settings(max_examples=100, deadline=None)
@given(worlds(), st.integers(0, 30), st.booleans())
def test_placed_items_get_free_sids_and_nothing_moves(world, n_new: int, suffix: bool):
    quantizer, vectors, codes = world
    taken, sizes, _ = resolve_collisions(
        quantizer, vectors, codes, "suffix" if suffix else "minimal"
    )
    before = taken.copy()
    new = np.random.default_rng(n_new).normal(size=(n_new, 3)).astype(np.float32)
    if not suffix and len(taken) + n_new > np.prod(sizes):
        with pytest.raises(ValueError, match=r"items exceed the \d+ SIDs"):
            place_items(quantizer, new, taken, sizes)
        return
    try:
        placed = place_items(quantizer, new, taken, sizes)
    except ValueError as error:
        assert suffix and "new items have no suffix left among the" in str(error)
        return
    assert (taken == before).all()
    assert placed.shape == (n_new, len(sizes)) and placed.dtype == np.int32
    assert is_bijective(np.concatenate([taken, placed])) and (placed < sizes).all()
    if suffix and n_new:
        assert (placed[:, :-1] == quantizer.encode(new)).all()


def test_a_new_item_gets_its_own_codes_where_they_are_free():
    quantizer = random_quantizer((4, 4, 4), 3, 0)
    rng = np.random.default_rng(0)
    new = rng.normal(size=(1, 3)).astype(np.float32)
    taken = np.array([c for c in itertools.product(range(4), repeat=3)])
    own = quantizer.encode(new)
    taken = taken[(taken != own).any(axis=1)]
    assert (place_items(quantizer, new, taken, (4, 4, 4)) == own).all()  # the last one that is left
    free = taken[rng.permutation(63)[:20]]
    assert (place_items(quantizer, new, free, (4, 4, 4)) == own).all()
    assert (place_items(quantizer, new, free[:0], (4, 4, 4)) == own).all()


def test_placement_around_taken_codes_by_hand():
    quantizer = quantizer_of(np.array([[0.0], [10.0]]), np.array([[0.0], [1.0], [2.0]]))
    new = np.array([[0.1], [0.2]], dtype=np.float32)
    # <0, 0> is taken: the two share what is left of prefix 0.
    placed = place_items(quantizer, new, np.array([[0, 0]]), (2, 3))
    assert placed[:, 0].tolist() == [0, 0] and sorted(placed[:, 1].tolist()) == [1, 2]
    # With <0, 0> and <0, 2> taken one of them must go to the sibling: the one nearer to it.
    placed = place_items(quantizer, new, np.array([[0, 0], [0, 2]]), (2, 3))
    assert placed.tolist() == [[0, 1], [1, 0]]


def test_suffixes_of_new_items_go_on_after_the_highest():
    quantizer = quantizer_of(np.array([[0.0], [10.0]]))
    taken = np.array([[0, 3], [0, 1], [1, 0]])  # <0, 0> was given away and taken back, say
    new = np.array([[0.0], [10.0], [1.0]], dtype=np.float32)
    placed = place_items(quantizer, new, taken, (2, 6))
    assert placed[1].tolist() == [1, 1] and sorted(placed[[0, 2]].tolist()) == [[0, 4], [0, 5]]
    with pytest.raises(ValueError, match="1 new items have no suffix left among the 5 of their SID"):  # fmt: skip # noqa: E501
        place_items(quantizer, new, taken, (2, 5))


def test_a_full_map_takes_nobody():
    quantizer = quantizer_of(np.array([[0.0], [10.0]]), np.array([[0.0], [1.0]]))
    full = np.array(list(itertools.product(range(2), repeat=2)))
    with pytest.raises(ValueError, match="5 items exceed the 4 SIDs of 2 x 2 codes; use"):
        place_items(quantizer, np.zeros((1, 1), np.float32), full, (2, 2))
    assert place_items(quantizer, np.zeros((0, 1), np.float32), full, (2, 2)).shape == (0, 2)


def test_maps_and_vectors_that_do_not_belong_to_the_quantizer():
    quantizer = quantizer_of(np.array([[0.0], [10.0]]), np.array([[0.0], [1.0]]))
    new = np.zeros((1, 1), np.float32)
    with pytest.raises(ValueError, match="taken codes share a SID; resolve that map first"):
        place_items(quantizer, new, np.array([[0, 0], [0, 0]]), (2, 2))
    with pytest.raises(ValueError, match=r"codebooks of \(2, 3\), the quantizer of \(2, 2\)"):
        place_items(quantizer, new, np.array([[0, 0]]), (2, 3))
    with pytest.raises(ValueError, match="outside its codebook"):
        place_items(quantizer, new, np.array([[0, 2]]), (2, 2))
    with pytest.raises(ValueError, match="NaN or inf, the first is row 0"):
        place_items(quantizer, new * np.nan, np.array([[0, 0]]), (2, 2))
    with pytest.raises(ValueError, match="vectors have 2 dimensions"):
        place_items(quantizer, np.zeros((1, 2), np.float32), np.array([[0, 0]]), (2, 2))


@pytest.mark.parametrize("kind", [ResidualKMeans, HierarchicalKMeans])
def test_a_catalogue_that_grows_until_its_map_is_full(kind):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(64, 4)).astype(np.float32)
    quantizer = kind.fit(vectors[:30], (4, 4, 4))
    taken = resolve_collisions(quantizer, vectors[:30], quantizer.encode(vectors[:30]))[0]
    for start, stop in ((30, 31), (31, 50), (50, 64)):
        new = place_items(quantizer, vectors[start:stop], taken, (4, 4, 4))
        taken = np.concatenate([taken, new])
        assert is_bijective(taken)
    assert len(taken) == 64  # every SID


def test_ten_thousand_items_take_seconds():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(10_000, 16)).astype(np.float32)
    quantizer = random_quantizer((32, 32, 32, 32), 16, 0)
    codes = quantizer.encode(vectors)
    codes[:3000] = codes[:1]  # a crowd, too
    started = time.perf_counter()
    new, _, _ = resolve_collisions(quantizer, vectors, codes)
    assert time.perf_counter() - started < 20
    assert len(np.unique(row_ids(new))) == 10_000


@pytest.mark.parametrize("method", ["minimal", "suffix", "place", "place by suffix"])
def test_codes_of_equal_vectors_do_not_follow_the_catalogue(method: str):
    """Neither those of the first catalogue nor those of later items."""
    quantizer = random_quantizer((4, 100), 3, 0)
    vectors = np.zeros((300, 3), np.float32)  # three prefixes, full to the last code
    if method == "place":
        new = place_items(quantizer, vectors, np.empty((0, 2), int), (4, 100))
    elif method == "place by suffix":
        taken = np.array([[*quantizer.encode(vectors[:1])[0], 0]])
        new = place_items(quantizer, vectors, taken, (4, 100, 400))
    else:
        new = resolve_collisions(quantizer, vectors, quantizer.encode(vectors), method)[0]
    assert is_bijective(new)
    # By chance 1% of the rows follow the one before.
    assert (np.diff(new[:, -1]) == 1).mean() < 0.04
    assert abs(np.corrcoef(np.arange(300), row_ids(new))[0, 1]) < 0.2
