"""RQ-VAE: training, and the quantizer that comes out of it."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from genrec.quantizers.presets import RQVAESettings, preset
from genrec.quantizers.quality import collision_rate
from genrec.quantizers.residual_kmeans import ResidualKMeans
from genrec.quantizers.rqvae import RQVAE, _Network, _Training
from genrec.quantizers.rqvae_losses import collaborative_loss

TINY = RQVAESettings(
    n_levels=3, codebook_size=(8, 8, 4), hidden_sizes=(16,), latent_dim=6, epochs=8, batch_size=64,
    lr=3e-3,
)  # fmt: skip
CODEBOOKS_ONLY = replace(TINY, hidden_sizes=(), latent_dim=None, gradient="straight-through")


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(8, 12)) * 2 + 3
    return (centres[rng.integers(0, 8, 300)] + rng.normal(size=(300, 12))).astype(np.float32)


@pytest.fixture(scope="module")
def halves() -> np.ndarray:
    """Which half of the catalogue an item belongs to, by interactions."""
    return np.arange(300) % 2


@pytest.fixture(scope="module")
def collaborative(halves) -> np.ndarray:
    rows = np.zeros((300, 6), dtype=np.float32)
    rows[:, 0] = 2 * halves - 1
    return rows


def fit(vectors: np.ndarray, settings: RQVAESettings = TINY, **options) -> RQVAE:
    return RQVAE.fit(vectors, settings, device="cpu", progress=False, **options)


def one_code_for_all(rows: np.ndarray, size: int, seed: int):
    """In place of k-means: a start in which all codes but the first are far from every item."""
    return np.full((size, rows.shape[1]), 1e3, np.float32) * (np.arange(size) > 0)[:, None], None


def unexplained(quantizer: RQVAE, vectors: np.ndarray) -> float:
    error = ((vectors - quantizer.decode(quantizer.encode(vectors))) ** 2).sum()
    return float(error / ((vectors - vectors.mean(0)) ** 2).sum())


def test_shapes_and_ranges(vectors):
    quantizer = fit(vectors)
    codes = quantizer.encode(vectors)
    assert codes.shape == (300, 3) and codes.dtype == np.int32
    assert (codes.max(axis=0) < (8, 8, 4)).all() and (codes.min(axis=0) >= 0).all()
    assert quantizer.codebook_sizes == (8, 8, 4) and quantizer.dim == 12
    assert quantizer.project(vectors).shape == (300, 6)
    assert (
        quantizer.decode(codes).shape == (300, 12) and quantizer.decode(codes).dtype == np.float32
    )
    assert quantizer.level_bias(0) is None


@pytest.mark.parametrize("gradient", ["straight-through", "ema", "rotation"])
def test_training_lowers_the_error(vectors, gradient):
    quantizer = fit(vectors, replace(TINY, gradient=gradient, epochs=30, lr=1e-2))
    history = quantizer.history
    assert history[-1]["reconstruction"] < 0.7 * history[0]["reconstruction"]
    assert unexplained(quantizer, vectors) < 0.6


def test_codes_are_the_nearest_at_each_level(vectors):
    quantizer = fit(vectors)
    codes, residual = quantizer.encode(vectors), quantizer.project(vectors)
    for level, codebook in enumerate(quantizer.codebooks):
        expected = ((residual[:, None] - codebook[None]) ** 2).sum(axis=2)
        found = quantizer.level_distances(quantizer.project(vectors), codes[:, :level], level)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
        assert (codes[:, level] == expected.argmin(axis=1)).mean() > 0.99
        residual = residual - codebook[codes[:, level]]
    np.testing.assert_allclose(
        quantizer.reconstruct(codes), quantizer.project(vectors) - residual, atol=1e-4
    )


def test_deterministic_and_leaves_the_global_random_state(vectors):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002 - the legacy state must not be disturbed either
    expected = torch.rand(1).item(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    one = fit(vectors, seed=3)
    assert (torch.rand(1).item(), np.random.rand()) == expected  # noqa: NPY002
    torch.manual_seed(7)
    two = fit(vectors, seed=3)
    assert (one.encode(vectors) == two.encode(vectors)).all() and one.history == two.history
    assert all((a == b).all() for a, b in zip(one.codebooks, two.codebooks, strict=True))
    assert (fit(vectors, seed=4).encode(vectors) != one.encode(vectors)).any()


@pytest.mark.parametrize("settings", [replace(TINY, pca_dim=5), CODEBOOKS_ONLY])
def test_save_and_load(tmp_path, vectors, settings):
    quantizer = fit(vectors, settings, seed=2)
    quantizer.save(tmp_path / "rqvae.safetensors")
    loaded = RQVAE.load(tmp_path / "rqvae.safetensors")
    codes = quantizer.encode(vectors)
    assert loaded.settings == quantizer.settings and loaded.seed == 2
    assert (loaded.encode(vectors) == codes).all()
    assert (loaded.decode(codes) == quantizer.decode(codes)).all()


def test_file_of_another_quantizer_is_refused(tmp_path, vectors):
    ResidualKMeans.fit(vectors, (8, 8)).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not 'rqvae'"):
        RQVAE.load(tmp_path / "other.safetensors")


def test_without_encoder_latents_are_the_projected_vectors(vectors):
    quantizer = fit(vectors, CODEBOOKS_ONLY)
    np.testing.assert_array_equal(quantizer.project(vectors), quantizer.projection.apply(vectors))
    assert list(quantizer.network.encoder.parameters()) == []
    assert unexplained(quantizer, vectors) < 0.5


def test_codebooks_start_from_k_means_of_all_items():
    # Eight separate points, one of them a single item: any batch's k-means could miss it.
    points = np.eye(8, dtype=np.float32) * 10
    rows = np.concatenate([np.repeat(points[:7], 40, axis=0), points[7:]])
    settings = replace(
        CODEBOOKS_ONLY, codebook_size=8, n_levels=1, epochs=1, lr=1e-9, standardize="none"
    )
    quantizer = fit(rows, settings)
    assert len(np.unique(quantizer.encode(rows))) == 8
    assert unexplained(quantizer, rows) < 1e-6


def test_as_many_codes_as_items(vectors):
    """Level 1 takes each item exactly; the levels below are left with nothing to code."""
    rows = vectors[:8]
    codes = fit(rows, replace(CODEBOOKS_ONLY, codebook_size=8)).encode(rows)
    assert len(np.unique(codes[:, 0])) == 8
    assert fit(rows, replace(TINY, codebook_size=8)).encode(rows).shape == (8, 3)


def test_dead_codes_are_reset(vectors, monkeypatch):
    def collapsed(rows, size, seed):
        """A start that uses one code only."""
        return np.full((size, rows.shape[1]), 1e3, np.float32) * (np.arange(size) > 0)[
            :, None
        ], None

    monkeypatch.setattr("genrec.quantizers.rqvae.kmeans", collapsed)
    settings = replace(TINY, epochs=3)
    kept = fit(vectors, replace(settings, dead_code_reset=False)).history
    assert kept[-1]["codes_used"] == [1, 1, 1] and kept[-1]["codes_reset"] == 0
    mended = fit(vectors, settings).history
    assert mended[0]["codes_reset"] == 7 + 7 + 3
    assert sum(mended[-1]["codes_used"]) >= 18
    assert sum(fit(vectors, replace(settings, gradient="rotation")).history[-1]["codes_used"]) >= 16


def test_history_counts_the_catalogue(vectors):
    settings = replace(TINY, dead_code_reset=False, gradient="straight-through")
    quantizer = fit(vectors, settings)
    row, codes = quantizer.history[-1], quantizer.encode(vectors)
    assert [r["epoch"] for r in quantizer.history] == list(range(1, 9))
    for level in range(3):
        counts = np.bincount(codes[:, level])
        share = counts[counts > 0] / 300
        assert row["perplexity"][level] == pytest.approx(
            np.exp(-(share * np.log(share)).sum()), 1e-3
        )
        assert row["codes_used"][level] == (counts > 0).sum()
    parts = row["reconstruction"] + row["codebook"] + 0.25 * row["commitment"]
    assert row["total"] == pytest.approx(parts, 1e-4)


def test_reconstruction_is_summed_over_dimensions(vectors):
    """Doubling every dimension doubles the error of codebooks that see both halves alike."""
    settings = replace(CODEBOOKS_ONLY, epochs=1, lr=1e-9, standardize="none")
    once = fit(vectors, settings).history[0]["reconstruction"]
    twice = fit(np.hstack([vectors, vectors]), settings).history[0]["reconstruction"]
    assert twice == pytest.approx(2 * once, rel=0.2)


def test_patience_stops_early(vectors):
    still = replace(CODEBOOKS_ONLY, epochs=30, lr=1e-9, patience=4, dead_code_reset=False)
    assert len(fit(vectors, still).history) == 5  # the first epoch counts as an improvement
    assert len(fit(vectors, replace(still, patience=0, epochs=7)).history) == 7


def test_patience_keeps_the_best_epoch(vectors):
    """Steps that are far too long ruin codebooks that start from k-means."""
    wild = replace(CODEBOOKS_ONLY, epochs=30, lr=0.5, lr_schedule="constant", patience=6,
        dead_code_reset=False)  # fmt: skip
    quantizer = fit(vectors, wild)
    rates = [row["collision_rate"] for row in quantizer.history]
    assert collision_rate(quantizer.encode(vectors)) == min(rates) < rates[-1]
    kept = [row["epoch"] for row in quantizer.history if row["kept"]]
    assert [rates[epoch - 1] for epoch in kept] == [min(rates)] and len(rates) == kept[0] + 6
    last = fit(vectors, replace(wild, patience=0))
    assert collision_rate(last.encode(vectors)) == last.history[-1]["collision_rate"] > min(rates)
    assert [row["epoch"] for row in last.history if row["kept"]] == [30]
    json.dumps(quantizer.history)  # a caller can store it


def test_preset_losses_weigh_as_in_the_published_code(vectors, collaborative):
    """LETTER's total, written out as its code has it: means over dimensions and over levels."""
    settings = preset("letter", n_levels=2, codebook_size=8, hidden_sizes=(16,), latent_dim=6,
        diversity_clusters=4, sinkhorn_epsilon=0.0)  # fmt: skip
    assert settings.collaborative_weight == 0.01 and settings.diversity_weight == 1e-4
    network = _Network(12, settings)
    training = _Training(network, settings, torch.from_numpy(vectors), collaborative, seed=0)
    training.clusters = [torch.arange(8) // 2] * 2  # pairs, so that partners aren't drawn
    rows = torch.arange(64)
    training._losses(rows)["total"].backward()
    found = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()

    x = torch.from_numpy(vectors[:64])
    latents = network.encoder(x)
    residual, quantized, level_losses = latents, 0, []
    for book in network.codebooks:
        codes = torch.cdist(residual, book).argmin(dim=1)
        code = book[codes]
        similar = (code @ book.T).scatter(1, codes[:, None], -torch.inf)
        diversity = F.cross_entropy(similar, codes ^ 1)
        commitment = F.mse_loss(code.detach(), residual)
        codebook = F.mse_loss(code, residual.detach())
        level_losses.append(codebook + 0.25 * commitment + 1e-4 * diversity)
        residual, quantized = residual - code.detach(), quantized + code.detach()
    quantized = latents + (quantized - latents).detach()
    total = F.mse_loss(network.decoder(quantized), x) + torch.stack(level_losses).mean()
    behaviour = torch.from_numpy(collaborative[:64])
    total = total + 0.01 * collaborative_loss(quantized, behaviour, settings.temperature)
    assert training._losses(rows)["total"].item() == pytest.approx(total.item(), rel=1e-5)
    total.backward()
    for ours, parameter in zip(found, network.parameters(), strict=True):
        assert torch.allclose(ours, parameter.grad, rtol=1e-3, atol=1e-7)


def test_a_large_catalogue_is_sampled(vectors, collaborative, monkeypatch):
    guided = replace(TINY, collaborative_weight=1.0)
    whole = fit(vectors, guided, collaborative=collaborative)
    monkeypatch.setattr("genrec.quantizers.rqvae._FIT_ITEMS", 120)
    seen = []
    run = _Training.run

    def watched(self, progress):
        seen.append((self.vectors.numpy(), self.collaborative.numpy()))
        return run(self, progress)

    monkeypatch.setattr(_Training, "run", watched)
    sampled = fit(vectors, guided, collaborative=collaborative)
    rows, behaviour = seen[0]
    assert rows.shape == (120, 12)
    # Row by row the same items: each one's own behaviour beside its vector.
    every = whole.projection.apply(vectors)
    items = (rows[:, None] == every).all(-1).argmax(1)
    assert (np.diff(items) > 0).all() and (collaborative[items] == behaviour).all()
    assert unexplained(sampled, vectors) < unexplained(whole, vectors) + 0.2
    assert (fit(vectors, guided, collaborative=collaborative).encode(vectors) == sampled.encode(vectors)).all()  # fmt: skip # noqa: E501


def test_uniform_mapping_spreads_the_codes_of_skewed_items():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(8, 12)) * 2
    which = np.where(rng.random(400) < 0.9, 0, rng.integers(0, 8, 400))  # k-means gives them a code
    rows = (centres[which] + rng.normal(size=(400, 12)) * 0.5).astype(np.float32)
    settings = replace(
        CODEBOOKS_ONLY, codebook_size=8, n_levels=1, lr=3e-2, epochs=40, standardize="none"
    )
    plain = fit(rows, settings).history[-1]["perplexity"][0]
    uniform = fit(rows, replace(settings, sinkhorn_epsilon=0.003)).history[-1]["perplexity"][0]
    assert plain < 4.6 and uniform > 5.4


@pytest.mark.parametrize("dim", [6, 3])
def test_collaborative_loss_shapes_the_codes(vectors, halves, collaborative, dim):
    faint = np.hstack([vectors, halves[:, None]]).astype(np.float32)  # one of 13 dimensions
    settings = replace(TINY, codebook_size=4, n_levels=2, epochs=50, lr=1e-2)

    def purity(quantizer: RQVAE) -> float:
        """Share of items that are of the same half as most items of their SID."""
        _, sid = np.unique(quantizer.encode(faint), axis=0, return_inverse=True)
        counts, ones = np.bincount(sid.ravel()), np.bincount(sid.ravel(), weights=halves)
        return float(np.maximum(ones, counts - ones).sum() / 300)

    assert purity(fit(faint, settings)) < 0.8
    guided = replace(settings, collaborative_weight=30.0)
    assert purity(fit(faint, guided, collaborative=collaborative[:, :dim])) > 0.95


def test_items_without_collaborative_vector_are_left_out(vectors, collaborative):
    guided = replace(TINY, collaborative_weight=1.0)
    some = collaborative.copy()
    some[::3] = 0
    quantizer = fit(vectors, guided, collaborative=some)
    assert np.isfinite(quantizer.history[-1]["collaborative"])
    one = np.zeros_like(collaborative)
    one[0] = 1
    assert np.isfinite(fit(vectors, guided, collaborative=one).history[-1]["total"])


def test_diversity_loss_falls(vectors):
    diverse = replace(
        TINY, codebook_size=8, diversity_weight=1.0, diversity_clusters=2, epochs=15,
        gradient="straight-through",
    )  # fmt: skip
    history = fit(vectors, diverse).history
    plain = fit(vectors, replace(diverse, diversity_weight=1e-9)).history
    assert history[-1]["diversity"] < plain[-1]["diversity"]
    assert "diversity" not in fit(vectors).history[0]


def test_collapse_is_warned_of(vectors, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING, "genrec.quantizers.rqvae"):
        fit(vectors)
        assert not caplog.records
        monkeypatch.setattr("genrec.quantizers.rqvae.kmeans", one_code_for_all)
        fit(vectors, replace(TINY, dead_code_reset=False, epochs=1))
    assert "level 1: 1 of 8" in caplog.text and "dead_code_reset=True" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v: v[0], "shape"),
        (lambda v: v[:0], "shape"),
        (lambda v: v.astype(int), "dtype"),
        (lambda v: np.where(np.arange(300)[:, None] == 7, np.nan, v), "row 7"),
        (lambda v: np.where(np.arange(300)[:, None] == 7, np.inf, v), "row 7"),
        (lambda v: np.repeat(v[:5], 60, axis=0), "exceeds the 5 distinct"),
        (lambda v: v[:6], "exceeds the 6 distinct"),
    ],
)
def test_bad_vectors_are_refused(vectors, spoil, message):
    with pytest.raises(ValueError, match=message):
        fit(spoil(vectors))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: None, "needs collaborative vectors"),
        (lambda c: c[:299], "299 collaborative vectors for 300 items"),
        (lambda c: np.where(np.arange(300)[:, None] == 9, np.nan, c), "row 9"),
        (lambda c: c * 0, "all collaborative vectors are zero"),
        (lambda c: c[:, 0], "shape"),
    ],
)
def test_bad_collaborative_vectors_are_refused(vectors, collaborative, spoil, message):
    with pytest.raises(ValueError, match=message):
        fit(vectors, replace(TINY, collaborative_weight=0.1), collaborative=spoil(collaborative))


def test_collaborative_vectors_without_weight_are_refused(vectors, collaborative):
    with pytest.raises(ValueError, match="collaborative_weight=0"):
        fit(vectors, collaborative=collaborative)


def test_divergence_is_reported(vectors):
    with pytest.raises(ValueError, match="diverged"):
        fit(vectors * 1e14, replace(TINY, standardize="none", lr=1e9))


def test_vectors_of_another_encoder_are_refused(vectors):
    quantizer = fit(vectors)
    with pytest.raises(ValueError, match="fitted on 12"):
        quantizer.encode(vectors[:, :11])
    with pytest.raises(ValueError, match="outside its codebook"):
        quantizer.decode(np.full((1, 3), 7, dtype=np.int32))


def test_half_precision_and_memory_maps(tmp_path, vectors):
    np.save(tmp_path / "v.npy", vectors.astype(np.float16))
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    assert fit(mapped).encode(mapped).shape == (300, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_trains_on_a_gpu(vectors):
    quantizer = RQVAE.fit(vectors, replace(TINY, epochs=60), device="cuda", progress=False)
    assert not quantizer.network.codebooks[0].is_cuda
    assert unexplained(quantizer, vectors) < 0.6
