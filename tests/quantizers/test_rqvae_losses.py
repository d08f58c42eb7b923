"""Gradients, codebook updates, uniform mapping and LETTER's losses."""

import math

import numpy as np
import pytest
import torch

from genrec.quantizers.rqvae_losses import (
    MovingCodebook,
    code_clusters,
    code_distances,
    collaborative_loss,
    diversity_loss,
    nearest_codes,
    rotate_through,
    straight_through,
    uniform_codes,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(through, latents: torch.Tensor, quantized: torch.Tensor, upstream: torch.Tensor):
    latents = latents.clone().requires_grad_()
    (through(latents, quantized) * upstream).sum().backward()
    return latents.grad


@pytest.mark.parametrize("through", [straight_through, rotate_through])
def test_estimators_give_the_quantized_value(through):
    latents, quantized = normal(50, 6), normal(50, 6, seed=1)
    torch.testing.assert_close(through(latents, quantized), quantized)


def test_straight_through_copies_the_gradient():
    upstream = normal(5, 3, seed=2)
    found = gradient(straight_through, normal(5, 3), normal(5, 3, seed=1), upstream)
    torch.testing.assert_close(found, upstream)


def test_rotation_turns_the_gradient_with_the_vector():
    # (1, 0) onto (0, 2): a quarter turn and a factor 2. The map's transpose turns back.
    latents, quantized = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    found = gradient(rotate_through, latents, quantized, torch.tensor([[3.0, 5.0]]))
    torch.testing.assert_close(found, torch.tensor([[10.0, -6.0]]))


def test_rotation_keeps_the_angle_between_gradient_and_vector():
    latents, quantized, upstream = normal(40, 8), normal(40, 8, seed=1), normal(40, 8, seed=2)
    found = gradient(rotate_through, latents, quantized, upstream)
    before = torch.cosine_similarity(upstream, quantized)
    torch.testing.assert_close(torch.cosine_similarity(found, latents), before, atol=1e-5, rtol=0)
    ratio = quantized.norm(dim=1) / latents.norm(dim=1)
    torch.testing.assert_close(found.norm(dim=1), ratio * upstream.norm(dim=1))


@pytest.mark.parametrize(
    ("latent", "quantized"),
    [([0.0, 0.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 0.0]), ([1.0, 0.0], [-3.0, 0.0])],
)
def test_rotation_passes_straight_where_it_is_undefined(latent, quantized):
    upstream = torch.tensor([[3.0, 5.0]])
    latents, target = torch.tensor([latent]), torch.tensor([quantized])
    torch.testing.assert_close(rotate_through(latents, target), target)
    torch.testing.assert_close(gradient(rotate_through, latents, target, upstream), upstream)


def test_distances_and_nearest_codes():
    residuals, codebook = normal(30, 4), normal(7, 4, seed=1)
    expected = torch.cdist(residuals, codebook) ** 2
    torch.testing.assert_close(code_distances(residuals, codebook), expected)
    assert (nearest_codes(residuals, codebook) == expected.argmin(dim=1)).all()


def test_nearest_codes_in_blocks(monkeypatch):
    residuals, codebook = normal(30, 4), normal(7, 4, seed=1)
    whole = nearest_codes(residuals, codebook)
    monkeypatch.setattr("genrec.quantizers.rqvae_losses._HELD_DISTANCES", 20)
    assert (nearest_codes(residuals, codebook) == whole).all()


def test_uniform_codes_fill_every_code_alike():
    # All rows prefer code 0, by a margin that grows with the row: the last rows keep it.
    margins = torch.arange(8.0)[:, None]
    distances = torch.cat([torch.zeros(8, 1), 1 + margins], dim=1)
    codes = uniform_codes(distances, epsilon=0.05, iterations=200)
    assert codes.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert (distances.argmin(dim=1) == 0).all()


@pytest.mark.parametrize("epsilon", [0.003, 0.1, 10.0])
def test_uniform_codes_are_even_and_finite_at_any_epsilon(epsilon):
    residuals, codebook = normal(1024, 8) + 3, normal(32, 8, seed=1)
    distances = code_distances(residuals, codebook)
    nearest = torch.bincount(distances.argmin(dim=1), minlength=32)
    counts = torch.bincount(uniform_codes(distances, epsilon, 50), minlength=32)
    assert nearest.max() > 200 and (nearest == 0).any()
    assert counts.max() < 120 and (counts > 0).sum() >= 30


def test_uniform_codes_of_identical_distances():
    assert uniform_codes(torch.zeros(4, 3), 0.003, 50).tolist() == [0, 0, 0, 0]


def test_moving_codebook_by_hand():
    codebook = torch.tensor([[0.0, 0.0], [4.0, 4.0]])
    moving = MovingCodebook(codebook, decay=0.5)
    moving.update(torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 0]))
    # Code 0: counts (1 + 2) / 2, sums ((0, 0) + (6, 0)) / 2; code 1 has no items and stays.
    torch.testing.assert_close(moving.counts, torch.tensor([1.5, 0.5]))
    expected = torch.tensor([[2.0, 0.0], [4.0, 4.0]])
    torch.testing.assert_close(codebook, expected, atol=1e-3, rtol=1e-4)


def test_moving_codebook_ends_at_the_means():
    rows = torch.tensor([[1.0], [3.0], [10.0]])
    codebook = torch.tensor([[0.0], [9.0]])
    moving = MovingCodebook(codebook, decay=0.9)
    for _ in range(300):
        moving.update(rows, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(codebook, torch.tensor([[2.0], [10.0]]), atol=1e-3, rtol=0)
    codebook[1] = 50.0
    moving.restart(torch.tensor([1]))
    assert moving.counts[1] == 1 and moving.sums[1] == 50


def test_collaborative_loss_by_hand():
    quantized = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    collaborative = torch.tensor([[5.0, 0.0], [0.0, 0.1]])
    found = collaborative_loss(quantized, collaborative, temperature=0.5)
    assert found.item() == pytest.approx(math.log(1 + math.exp(-2)))
    swapped = collaborative_loss(quantized, collaborative.flip(0), temperature=0.5)
    assert swapped.item() == pytest.approx(math.log(1 + math.exp(2)))


def test_clusters_are_of_equal_size_and_near():
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [50, 0], [0, 50], [50, 50]], dtype=np.float32)
    codebook = torch.from_numpy(np.repeat(centres, 4, axis=0))
    codebook += torch.from_numpy(rng.normal(size=(16, 2)).astype(np.float32))
    clusters = code_clusters(codebook, 4, seed=0).reshape(4, 4)
    assert (clusters == clusters[:, :1]).all() and len(clusters[:, 0].unique()) == 4


def test_clusters_of_a_lopsided_codebook_are_capped():
    codebook = normal(64, 4) * torch.linspace(0.01, 3, 64)[:, None]
    counts = torch.bincount(code_clusters(codebook, 8, seed=0), minlength=8)
    assert counts.max() == 8 and counts.min() == 8


def test_diversity_loss_by_hand():
    # Code 0's only partner is 1: cross-entropy over codes 1 and 2 with inner products 2 and 3.
    codebook = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 1.0]])
    clusters = torch.tensor([0, 0, 1])
    generator = torch.Generator().manual_seed(0)
    found = diversity_loss(torch.tensor([0, 0]), codebook, clusters, generator)
    assert found.item() == pytest.approx(math.log(1 + math.exp(3 - 2)))


def test_diversity_loss_draws_each_partner_but_not_itself():
    codebook = torch.eye(4)[:, :3].clone()  # code 3 is the zero vector
    codebook[2] = torch.tensor([1.0, 0.0, 5.0])
    clusters = torch.tensor([0, 0, 0, 1])
    generator = torch.Generator().manual_seed(0)
    # From code 0 the logits of the others are 0 (code 1), 1 (code 2) and 0 (code 3).
    total = math.log(math.e + 2)
    seen = {
        round(diversity_loss(torch.tensor([0]), codebook, clusters, generator).item(), 4)
        for _ in range(30)
    }
    assert seen == {round(total, 4), round(total - 1, 4)}


def test_diversity_loss_without_partners_is_zero():
    codebook = normal(3, 2).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    loss = diversity_loss(torch.tensor([0, 2]), codebook, torch.tensor([0, 1, 2]), generator)
    loss.backward()
    assert loss.item() == 0 and not codebook.grad.any()
