"""What holds for every kind of quantizer, and the checks that they share."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.quantizers import quantizer as module
from genrec.quantizers.hierarchical_kmeans import HierarchicalKMeans, _Priced
from genrec.quantizers.loading import load_quantizer
from genrec.quantizers.presets import preset
from genrec.quantizers.product import ProductQuantizer
from genrec.quantizers.quantizer import (
    ROOM,
    Quantizer,
    check_capacity,
    check_codes,
    check_crowding,
    check_distinct,
    check_finite,
    check_input,
    check_settings,
    read_tensors,
    squared_distances,
)
from genrec.quantizers.residual_kmeans import ResidualKMeans
from genrec.quantizers.rqvae import RQVAE

SIZES = (8, 8, 4)
N, DIM = 200, 12


def fit_rqvae(vectors: np.ndarray, sizes: tuple[int, ...], seed: int = 0) -> RQVAE:
    small = preset(
        "default", n_levels=len(sizes), codebook_size=sizes, hidden_sizes=(16,), latent_dim=6,
        epochs=15, batch_size=64, lr=1e-2,
    )  # fmt: skip
    return RQVAE.fit(vectors, small, seed, device="cpu", progress=False)


FITS: dict[str, Callable[..., Quantizer]] = {
    "residual": ResidualKMeans.fit,
    "residual, balanced": lambda *a, **k: ResidualKMeans.fit(*a, **k, max_fill=1.2),
    "residual, normalised": lambda *a, **k: ResidualKMeans.fit(*a, **k, normalize_residuals=True),
    "residual, PCA": lambda *a, **k: ResidualKMeans.fit(*a, **k, pca_dim=5),
    "hierarchical": HierarchicalKMeans.fit,
    "hierarchical, balanced": lambda *a, **k: HierarchicalKMeans.fit(*a, **k, max_fill=1.2),
    "product, OPQ": ProductQuantizer.fit,
    "product": lambda *a, **k: ProductQuantizer.fit(*a, **k, rotate=False),
    "product, balanced": lambda *a, **k: ProductQuantizer.fit(*a, **k, max_fill=1.2),
    "rqvae": fit_rqvae,
}
each_kind = pytest.mark.parametrize("name", FITS)


@cache
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, DIM)) * 3 + 5
    return (centres[rng.integers(0, 6, N)] + rng.normal(size=(N, DIM))).astype(np.float32)


@cache
def fitted(name: str) -> Quantizer:
    return FITS[name](vectors(), SIZES)


@each_kind
def test_shapes_types_and_ranges(name: str):
    quantizer, rows = fitted(name), vectors()
    assert quantizer.codebook_sizes == SIZES and quantizer.dim == DIM and quantizer.seed == 0
    codes = quantizer.encode(rows)
    assert codes.shape == (N, 3) and codes.dtype == np.int32
    assert codes.min() >= 0 and (codes.max(axis=0) < SIZES).all()
    latents = quantizer.project(rows)
    assert latents.dtype == np.float32 and len(latents) == N
    assert quantizer.reconstruct(codes).shape == latents.shape
    assert quantizer.reconstruct(codes).dtype == np.float32
    assert quantizer.decode(codes).shape == rows.shape
    assert quantizer.decode(codes).dtype == np.float32
    for level, size in enumerate(SIZES):
        distances = quantizer.level_distances(latents, codes[:, :level], level)
        assert distances.shape == (N, size) and distances.dtype == np.float32
        assert (distances >= 0).all()
        bias = quantizer.level_bias(level)
        assert bias is None or bias.shape == (size,)


@each_kind
def test_codes_are_the_argmin_of_the_distances(name: str):
    quantizer = fitted(name)
    codes = quantizer.encode(vectors())
    latents = quantizer.project(vectors())
    # The prices of a balanced tree differ from parent to parent: they are in its own walk.
    walk = _Priced(quantizer) if isinstance(quantizer, HierarchicalKMeans) else quantizer
    for level in range(3):
        cost = walk.level_distances(latents, codes[:, :level], level)
        bias = walk.level_bias(level)
        assert (codes[:, level] == (cost if bias is None else cost + bias).argmin(axis=1)).all()


@each_kind
def test_the_codes_describe_the_vectors(name: str):
    rows = vectors()
    spread = ((rows - rows.mean(axis=0)) ** 2).sum()
    decoded = fitted(name).decode(fitted(name).encode(rows))
    assert ((rows - decoded) ** 2).sum() < 0.6 * spread


@each_kind
def test_a_seed_gives_the_same_quantizer_again(name: str):
    again = FITS[name](vectors(), SIZES, seed=0)
    codes = fitted(name).encode(vectors())
    assert (again.encode(vectors()) == codes).all()
    assert (again.reconstruct(codes) == fitted(name).reconstruct(codes)).all()
    other = FITS[name](vectors(), SIZES, seed=1)
    assert other.seed == 1
    assert (other.reconstruct(codes) != fitted(name).reconstruct(codes)).any()


@pytest.mark.parametrize("seed", [2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("name", ["residual", "hierarchical", "product, OPQ"])
def test_large_seeds(name: str, seed: int):
    assert FITS[name](vectors(), (4, 4), seed=seed).seed == seed


@each_kind
def test_saved_and_loaded_is_the_same(name: str, tmp_path: Path):
    quantizer, path = fitted(name), tmp_path / "quantizer.safetensors"
    quantizer.save(path)
    codes = quantizer.encode(vectors())
    for back in (type(quantizer).load(path), load_quantizer(path)):
        assert type(back) is type(quantizer)
        assert back.codebook_sizes == SIZES and back.dim == DIM and back.seed == quantizer.seed
        assert (back.encode(vectors()) == codes).all()
        assert (back.decode(codes) == quantizer.decode(codes)).all()
    again = tmp_path / "again.safetensors"
    load_quantizer(path).save(again)
    assert again.read_bytes() == path.read_bytes()


@each_kind
def test_a_memory_map_and_other_float_types_encode_alike(name: str, tmp_path: Path):
    np.save(tmp_path / "vectors.npy", vectors())
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    quantizer = fitted(name)
    codes = quantizer.encode(vectors())
    assert (quantizer.encode(mapped) == codes).all()
    assert (quantizer.encode(vectors().astype(np.float64)) == codes).all()
    assert (quantizer.encode(np.asfortranarray(vectors())) == codes).all()
    half = vectors().astype(np.float16)
    assert (quantizer.encode(half) == quantizer.encode(half.astype(np.float32))).all()
    assert (FITS[name](mapped, SIZES).encode(vectors()) == codes).all()


@each_kind
def test_blocks_give_the_codes_of_one_block(name: str, monkeypatch: pytest.MonkeyPatch):
    codes = fitted(name).encode(vectors())
    monkeypatch.setattr(module, "BLOCK_CELLS", 7 * DIM)
    assert (fitted(name).encode(vectors()) == codes).all()


@each_kind
def test_rows_are_encoded_one_by_one(name: str):
    order = np.random.default_rng(1).permutation(N)[:50]
    assert (fitted(name).encode(vectors()[order]) == fitted(name).encode(vectors())[order]).all()


@each_kind
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_values_that_are_no_numbers_name_the_row(name: str, bad: float):
    rows = vectors().copy()
    rows[[17, 40], 3] = bad
    what = "values beyond 1e" if math.isfinite(bad) else "NaN or inf"
    with pytest.raises(ValueError, match=f"2 vectors hold {what}.*the first is row 17"):
        FITS[name](rows, SIZES)
    with pytest.raises(ValueError, match=f"2 vectors hold {what}.*the first is row 17"):
        fitted(name).encode(rows)


def test_the_row_is_named_across_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK_CELLS", 7 * DIM)
    rows = vectors().copy()
    rows[100, 0] = np.nan
    with pytest.raises(ValueError, match="1 vectors hold NaN or inf, the first is row 100"):
        fitted("residual").encode(rows)


@each_kind
@pytest.mark.parametrize(
    "rows",
    [
        np.zeros(DIM, np.float32), np.zeros((0, DIM), np.float32), np.zeros((N, 0), np.float32),
        np.zeros((N, DIM), int), np.zeros((2, N, DIM), np.float32), np.zeros((N, DIM), complex),
    ],
)  # fmt: skip
def test_what_is_no_matrix_of_floats_is_refused(name: str, rows: np.ndarray):
    for call in (lambda: FITS[name](rows, SIZES), lambda: fitted(name).encode(rows)):
        with pytest.raises(ValueError, match=r"a non-empty float \(n_items, dim\) is needed"):
            call()


@each_kind
def test_vectors_of_another_encoder_are_refused(name: str):
    message = "vectors have 7 dimensions, the quantizer was fitted on 12; use vectors of the same"
    with pytest.raises(ValueError, match=message):
        fitted(name).encode(vectors()[:, :7])


@each_kind
def test_too_few_distinct_items(name: str):
    same = np.tile(vectors()[:1], (N, 1))
    message = "codebook_size=8 exceeds the {} distinct item vectors; use at most {}"
    with pytest.raises(ValueError, match=message.format(1, 1)):
        FITS[name](same, SIZES)
    few = np.tile(vectors()[:5], (40, 1))
    with pytest.raises(ValueError, match=message.format(5, 5)):
        FITS[name](few, SIZES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer = FITS[name](few, (5, 5))  # the advice is true
        assert quantizer.encode(few).shape == (N, 2)
        assert np.isfinite(quantizer.decode(quantizer.encode(few))).all()


@each_kind
def test_constant_dimensions_and_duplicates_do_no_harm(name: str):
    rows = vectors()[np.random.default_rng(0).integers(0, 40, N)]  # 40 distinct at most
    rows[:, 5:] = 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer = FITS[name](rows, SIZES)
        codes = quantizer.encode(rows)
        decoded = quantizer.decode(codes)
    assert np.isfinite(decoded).all()
    if name not in ("rqvae", "product, OPQ", "product, balanced"):  # rotations spread the error
        assert np.abs(decoded[:, 5:] - 0.1).max() < 1e-4
    spread = ((rows - rows.mean(axis=0)) ** 2).sum()
    assert ((rows - decoded) ** 2).sum() < 0.6 * spread


@each_kind
def test_codes_of_another_quantizer_are_refused(name: str):
    quantizer = fitted(name)
    for call in (quantizer.reconstruct, quantizer.decode):
        with pytest.raises(ValueError, match=r"shape \(5, 2\), the quantizer has 3 levels"):
            call(np.zeros((5, 2), dtype=np.int32))
        with pytest.raises(ValueError, match="shape"):
            call(np.zeros(3, dtype=np.int32))
        for bad in ([0, 0, 4], [8, 0, 0], [0, -1, 0]):
            with pytest.raises(ValueError, match=r"outside its codebook \(sizes \(8, 8, 4\)\)"):
                call(np.array([[0, 0, 0], bad], dtype=np.int32))
        with pytest.raises(ValueError, match="codes are float64; integers are needed"):
            call(np.zeros((5, 3)))
        assert len(call(np.zeros((0, 3), dtype=np.int32))) == 0


@pytest.mark.parametrize("name", [name for name in FITS if name != "rqvae"])
def test_settings_that_no_codebook_can_have(name: str):
    for sizes in ((), (1,), (8, 0), (8, -3)):
        with pytest.raises(ValueError, match="give at least one level, each of 2 codes or more"):
            FITS[name](vectors(), sizes)
    with pytest.raises(ValueError, match="n_init=0 must be at least 1"):
        FITS[name](vectors(), SIZES, n_init=0)
    with pytest.raises(ValueError, match="standardize='l2' is none of none, scale"):
        FITS[name](vectors(), SIZES, standardize="l2")
    if name != "residual, PCA":
        for dims in (0, 13):
            with pytest.raises(ValueError, match=f"pca_dim={dims} must lie between 1 and 12"):
                FITS[name](vectors(), SIZES, pca_dim=dims)


@pytest.mark.parametrize("max_fill", [0.99, 0, -1, math.nan, math.inf])
def test_caps_that_make_no_sense(max_fill: float):
    with pytest.raises(ValueError, match=f"max_fill={max_fill} must be a number of at least 1"):
        check_settings((8,), 1, max_fill)
    check_settings((8,), 1, 1)  # the boundary
    check_settings((8,), 1, None)


def test_squared_distances_by_hand():
    rows = np.array([[0, 0], [3, 4]], dtype=np.float32)
    centroids = np.array([[0, 0], [0, 4], [3, 4]], dtype=np.float32)
    assert squared_distances(rows, centroids).tolist() == [[0, 16, 25], [25, 9, 0]]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 1000))
def test_squared_distances_are_those_of_the_definition(seed: int, scale: float):
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(6, 3)) * scale).astype(np.float32)
    centroids = np.concatenate([rows[:2], (rng.normal(size=(3, 3)) * scale).astype(np.float32)])
    exact = ((rows[:, None].astype(float) - centroids[None]) ** 2).sum(axis=2)
    found = squared_distances(rows, centroids)
    assert (found >= 0).all()
    assert np.abs(found - exact).max() <= 1e-5 * float((rows**2).sum(axis=1).max() * 4)


def test_checks_let_good_input_pass():
    check_input(np.zeros((1, 1), np.float16), 1)
    check_finite(np.full((2, 2), -1e15, np.float32))
    check_codes(np.array([[0, 1]]), (1, 2))
    check_distinct(np.arange(8, dtype=np.float32)[:, None], (8, 2))


def test_distinct_rows_are_counted_beyond_the_first_ones():
    rows = np.zeros((100, 1), np.float32)
    rows[-4:, 0] = [1, 2, 3, -0.0]  # -0.0 is 0.0
    check_distinct(rows, (4,))
    with pytest.raises(ValueError, match="codebook_size=5 exceeds the 4 distinct item vectors"):
        check_distinct(rows, (5,))


def test_capacity_by_hand():
    assert check_capacity(10, (10, 50)) is None  # exactly 50 SIDs an item
    advice = check_capacity(11, (10, 50))
    assert advice is not None and advice.startswith("10 x 50 codes give 45.5 SIDs an item")
    with pytest.raises(ValueError, match=r"1,001 items exceed the 1,000 SIDs of 10 x 10 x 10"):
        check_capacity(1001, (10, 10, 10))
    assert check_capacity(1000, (10, 10, 10)) is not None  # tight, but there is room
    assert check_capacity(5, (2,) * 3000) is None  # more SIDs than a float can hold
    with pytest.raises(ValueError, match="use 9 levels of 2 codes$"):
        check_capacity(10, (1,))  # a degenerate map ends too


def test_crowded_first_codes_by_hand():
    # 40 items in 4 x 10 x 50 codes: 50 SIDs an item below a first code that has ten of them.
    even = np.zeros((40, 3), np.int32)
    even[:, 0] = np.arange(40) % 4
    assert check_capacity(40, (4, 10, 50)) is None
    assert check_crowding(even, (4, 10, 50)) is None  # exactly 50 SIDs an item
    even[:11, 0] = 0
    advice = check_crowding(even, (4, 10, 50))
    fullest = int((even[:, 0] == 0).sum())
    assert advice is not None and advice.startswith(
        f"{fullest / 40:.0%} of the items have first codes with fewer than 50 SIDs an item below "
        f"them (the fullest has {fullest} items and 500 SIDs)"
    )
    assert advice.endswith("use 3 levels of 50 codes")  # 50 * 50 are more than 50 * fullest
    crowded = np.repeat([0, *range(1, 51)], [10, *[1] * 50])[:, None].repeat(2, axis=1)
    assert check_crowding(crowded, (51, 60)) is not None  # 60 items: ten of them have six each
    crowded = np.repeat([0, *range(1, 451)], [10, *[1] * 450])[:, None].repeat(2, axis=1)
    assert check_crowding(crowded, (451, 460)) is None  # ten of 460 items are too few
    assert check_crowding(even[:, :1], (4,)) is None
    assert check_crowding(even[:, [0] * 3000], (4,) * 3000) is None


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 10**7), st.lists(st.integers(2, 5000), min_size=1, max_size=5).map(tuple)
)  # fmt: skip
def test_the_advice_is_true(n_items: int, sizes: tuple[int, ...]):
    try:
        advice = check_capacity(n_items, sizes)
    except ValueError as error:
        assert math.prod(sizes) < n_items
        advice = str(error)
    if advice is None:
        assert math.prod(sizes) >= ROOM * n_items
        return
    found = re.search(r"use (\d+) levels of (\d+) codes(?:, or (\d+) levels of (\d+))?$", advice)
    assert found
    deeper, same, levels, larger = found.groups()
    assert check_capacity(n_items, (int(same),) * int(deeper)) is None
    assert int(same) == max(sizes)
    if levels:
        assert check_capacity(n_items, (int(larger),) * int(levels)) is None
        assert int(levels) == len(sizes) and int(larger) <= n_items  # as many codes as items


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    path = tmp_path / "quantizer.safetensors"
    fitted("residual").save(path)
    with pytest.raises(ValueError, match="of kind 'residual-kmeans', not 'product'"):
        read_tensors(path, "product")
    with pytest.raises(ValueError, match="of kind 'residual-kmeans', not 'hierarchical-kmeans'"):
        HierarchicalKMeans.load(path)
