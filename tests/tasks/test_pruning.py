"""Data pruning: influence against retraining, solvers against dense algebra, and the draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from torch import nn
from torch.nn import functional as F

from genrec.tasks.pruning import (
    METHODS,
    NegativeCurvature,
    budget_of,
    conjugate_gradients,
    coverage_selection,
    dealrec_score,
    hessian_vector,
    influence_direction,
    mean_gradient,
    score_samples,
    select,
    softmax_layer_norms,
    top_selection,
)

PENALTY = 0.05
NAMES = ["layer.weight", "layer.bias"]


class Softmax(nn.Module):
    """Softmax regression; forward gives one loss per sample."""

    def __init__(self, n_features: int, n_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(n_features, n_classes).double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.layer(x), y, reduction="none")


def data(n: int = 240, n_features: int = 4, n_classes: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n_features, generator=generator, dtype=torch.float64)
    truth = torch.randn(n_features, n_classes, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    return x, (x @ truth + noise).argmax(dim=1)


def fit(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> Softmax:
    """Minimise the weighted sum of the losses plus the L2 penalty, to the last digit."""
    model = Softmax(x.shape[1], 3)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )  # fmt: skip
    nn.init.zeros_(model.layer.weight)
    nn.init.zeros_(model.layer.bias)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        squared = sum((p**2).sum() for p in model.parameters())
        loss = (weight * model(x, y)).sum() + PENALTY / 2 * squared
        loss.backward()
        return loss

    optimizer.step(closure)
    return model.eval()


def in_batches(*tensors: torch.Tensor, size: int = 13):
    """A re-iterable of batches, the last one short."""
    return list(zip(*(t.split(size) for t in tensors), strict=True))


@pytest.fixture(scope="module")
def fitted():
    x, y = data()
    return fit(x, y, torch.full((len(x),), 1 / len(x), dtype=torch.float64)), x, y


@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def dense_hessian(model: Softmax, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    shapes = [p.shape for p in model.parameters()]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        weight, bias = flat.split([s.numel() for s in shapes])
        return F.cross_entropy(F.linear(x, weight.view(shapes[0]), bias), y)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    return torch.autograd.functional.hessian(loss, flat)


# Gradients and the Hessian. -----------------------------------------------------------------------


def test_influence_is_what_leaving_a_sample_out_does(fitted):
    model, x, y = fitted
    batches = in_batches(x, y)
    direction = influence_direction(model, batches, NAMES, PENALTY, tolerance=1e-10)
    found = score_samples(model, batches, NAMES, direction.vector).influence
    before, change = model(x, y).mean(), []
    for left_out in range(0, len(x), 3):
        weight = torch.full((len(x),), 1 / len(x))
        weight[left_out] = 0.0
        change.append((fit(x, y, weight)(x, y).mean() - before).item())
    found = found[::3]
    assert direction.damping == PENALTY
    assert spearmanr(found, change).statistic > 0.97
    assert pearsonr(found, change).statistic > 0.95
    # Not only the order: the size, and the sign of who helps and who harms.
    assert np.polyfit(change, found, 1)[0] == pytest.approx(1.0, abs=0.1)
    assert min(change) < 0 < max(change)
    clear = np.abs(change) > 2e-4
    assert clear.sum() > 10 and (np.sign(found) == np.sign(change))[clear].all()


def test_mean_gradient_and_products_equal_dense_ones(fitted):
    model, x, y = fitted
    batches = in_batches(x, y)
    slopes = torch.autograd.grad(model(x, y).mean(), list(model.parameters()))
    expected = torch.cat([s.flatten() for s in slopes])
    assert torch.allclose(mean_gradient(model, batches, NAMES), expected, atol=1e-12)
    vector = torch.randn(len(expected), generator=torch.Generator().manual_seed(1))
    product = hessian_vector(model, batches, NAMES, vector)
    assert torch.allclose(product, dense_hessian(model, x, y) @ vector, atol=1e-12)


def test_direction_equals_a_dense_solve(fitted):
    model, x, y = fitted
    batches = in_batches(x, y)
    direction = influence_direction(model, batches, NAMES, 0.01, tolerance=1e-12)
    gradient = mean_gradient(model, batches, NAMES)
    damped = dense_hessian(model, x, y) + 0.01 * torch.eye(len(gradient))
    assert torch.allclose(direction.vector, torch.linalg.solve(damped, gradient), atol=1e-9)
    assert direction.residual <= 1e-12 and direction.gradient_norm == float(gradient.norm())


def test_hessian_of_a_part_of_the_samples(fitted):
    model, x, y = fitted
    part = in_batches(x[:20], y[:20])
    found = influence_direction(model, in_batches(x, y), NAMES, 0.1, part, tolerance=1e-12)
    damped = dense_hessian(model, x[:20], y[:20]) + 0.1 * torch.eye(len(found.vector))
    whole = mean_gradient(model, in_batches(x, y), NAMES)
    assert torch.allclose(found.vector, torch.linalg.solve(damped, whole), atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10_000))
def test_conjugate_gradients_solve_in_as_many_steps_as_dimensions(size, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(size, dtype=torch.float64)
    target = torch.randn(size, generator=generator, dtype=torch.float64)
    x, iterations, residual = conjugate_gradients(lambda v: matrix @ v, target, 60, 1e-10)
    assert torch.allclose(matrix @ x, target, atol=1e-7)
    assert residual <= 1e-10 and iterations <= 2 * size


def test_conjugate_gradients_edges():
    x, iterations, residual = conjugate_gradients(lambda v: 2 * v, torch.zeros(3))
    assert not x.any() and iterations == 0 and residual == 0.0
    x, iterations, residual = conjugate_gradients(
        lambda v: torch.tensor([1.0, 100.0]) * v, torch.ones(2), max_iterations=1
    )
    assert iterations == 1 and residual > 0.5  # stopped early, and it says so
    with pytest.raises(NegativeCurvature):
        conjugate_gradients(lambda v: -v, torch.ones(2))
    with pytest.raises(NegativeCurvature):
        conjugate_gradients(lambda v: v * torch.nan, torch.ones(2))


class Saddle(nn.Module):
    """Losses with Hessian diag(1, -3)."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.tensor([1.0, 1.0]))

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        return scale * (self.point**2 * torch.tensor([0.5, -1.5])).sum()


def test_damping_grows_where_the_hessian_is_not_positive_definite():
    found = influence_direction(Saddle().eval(), [(torch.ones(4),)], ["point"], damping=0.5)
    assert found.damping == 5.0  # 0.5 leaves -2.5, 5 makes 6 and 2
    # Gradient (1, -3).
    assert found.vector.tolist() == pytest.approx([1 / 6, -3 / 2], rel=1e-2)
    with pytest.raises(ValueError, match="positive definite"):
        influence_direction(Saddle().eval(), [(torch.full((4,), 1e12),)], ["point"], 1e-3)


class Deep(nn.Module):
    """Two layers, of which a subset is scored."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(torch.tanh(self.first(x)))
        return F.cross_entropy(self.last(hidden), y, reduction="none")


def test_scores_equal_a_plain_loop():
    torch.manual_seed(0)
    model, (x, y) = Deep().eval(), data(20)
    names = ["last.bias", "first.weight"]  # in the order given, and not all
    direction = torch.randn(23)
    found = score_samples(model, in_batches(x, y, size=7), names, direction)
    chosen = [model.last.bias, model.first.weight]
    for i in range(20):
        loss = model(x[i : i + 1], y[i : i + 1])[0]
        slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, chosen)])
        assert found.loss[i] == pytest.approx(loss.item(), abs=1e-12)
        assert found.effort[i] == pytest.approx(slope.norm().item(), abs=1e-12)
        assert found.influence[i] == pytest.approx((slope @ direction).item() / 20, abs=1e-12)
    assert all(p.grad is None for p in model.parameters())


def test_softmax_layer_norms_equal_a_plain_loop():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(6, 4, 5, generator=generator)
    targets = torch.randint(0, 7, (6, 4), generator=generator)
    weights = torch.rand(6, 4, generator=generator) * (torch.arange(4) < 3)
    weights[5] = 0.0
    weight = torch.randn(7, 5, generator=generator, requires_grad=True)
    bias = torch.randn(7, generator=generator, requires_grad=True)
    errors = (F.linear(hidden, weight, bias).softmax(-1) - F.one_hot(targets, 7)).detach()
    found = softmax_layer_norms(hidden, errors * weights[:, :, None])
    for i in range(6):
        each = F.cross_entropy(F.linear(hidden[i], weight, bias), targets[i], reduction="none")
        slopes = torch.autograd.grad((weights[i] * each).sum(), (weight, bias))
        expected = torch.cat([s.flatten() for s in slopes]).norm().item()
        assert found[i].item() == pytest.approx(expected, abs=1e-10)
    assert found[5] == 0.0


def test_a_wrong_surrogate_is_refused():
    model, (x, y) = Deep(), data(5)
    batches = [(x, y)]
    with pytest.raises(ValueError, match=r"training mode.*\.eval\(\)"):
        mean_gradient(model, batches, ["last.bias"])
    model.eval()
    for names in (["last.nonsense"], []):
        with pytest.raises(ValueError, match="no parameters"):
            mean_gradient(model, batches, names)
    with pytest.raises(ValueError, match="no samples"):
        mean_gradient(model, [], ["last.bias"])
    with pytest.raises(ValueError, match="no samples"):
        score_samples(model, [], ["last.bias"], torch.zeros(3))
    for damping in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="damping"):
            influence_direction(model, batches, ["last.bias"], damping)


# Scores and selection. ----------------------------------------------------------------------------


def test_score_by_hand():
    influence, effort = np.array([-2.0, 0.0, 2.0]), np.array([5.0, 10.0, 15.0])
    assert dealrec_score(influence, effort, 0.5).tolist() == [0.0, 0.75, 1.5]
    assert dealrec_score(influence, np.full(3, 7.0), 0.5).tolist() == [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="effort_weight=-1"):
        dealrec_score(influence, effort, -1)
    with pytest.raises(ValueError, match="1 of 3 scores aren't finite"):
        dealrec_score(np.array([0.0, np.nan, 1.0]), effort)


def test_coverage_by_hand():
    """Groups of 1, 2 and 7 samples, budget 7: 1 of 7/3, then 2 of 6/2, then the other 4."""
    scores = np.array([0.9, 0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.5, 0.55, 0.06])
    kept = coverage_selection(scores, 7, groups=3)
    assert {0, 7, 8} <= set(kept.tolist())
    assert len(kept) == 7 and (np.diff(kept) > 0).all()
    # A group larger than its part gives just its part: 3 groups of 3, budget 3, one each.
    scores = np.repeat([0.0, 0.5, 1.0], 3)
    for seed in range(5):
        assert (coverage_selection(scores, 3, groups=3, seed=seed) // 3).tolist() == [0, 1, 2]


def test_draws_within_a_group_are_uniform():
    scores = np.array([0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    counts = sum(
        np.bincount(coverage_selection(scores, 2, 2, seed), minlength=6) for seed in range(2000)
    )
    # Expected 500 and 1000, standard deviation below 23.
    assert np.abs(counts - [500, 500, 500, 500, 1000, 1000]).max() < 100


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_coverage_keeps_the_budget_and_small_groups(data):
    scores = np.array(data.draw(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)))
    budget = data.draw(st.integers(1, len(scores)))
    groups = data.draw(st.integers(1, 20))
    kept = coverage_selection(scores, budget, groups, seed=1)
    assert len(kept) == budget == len(set(kept.tolist()))
    assert 0 <= kept.min() and kept.max() < len(scores)
    span = scores.max() - scores.min()
    unit = (scores - scores.min()) / span if span > 0 else np.zeros(len(scores))
    group = np.minimum((unit * groups).astype(int), groups - 1)
    size, taken = np.bincount(group), np.bincount(group[kept], minlength=group.max() + 1)
    fair = budget // (size > 0).sum()
    assert (taken >= np.minimum(size, fair)).all()


def test_top_draws_ties_and_nothing_else():
    scores = np.array([3.0, 1.0, 2.0, 2.0, 2.0, 0.0])
    drawn = {tuple(top_selection(scores, 2, seed)) for seed in range(40)}
    assert drawn == {(0, 2), (0, 3), (0, 4)}
    assert top_selection(scores, 4).tolist() == [0, 2, 3, 4]


COLUMNS = {
    "loss": np.arange(40.0),
    "effort": -np.arange(40.0),
    "influence": np.abs(np.arange(40.0) - 20),
    "score": np.linspace(0, 1, 40),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_keep_their_share_and_repeat(method):
    kept = select(method, COLUMNS, 0.25, seed=3, groups=5)
    assert len(kept) == 10 and (np.diff(kept) > 0).all()
    assert kept.tolist() == select(method, COLUMNS, 0.25, seed=3, groups=5).tolist()
    expected = {
        "loss": list(range(30, 40)),
        "effort": list(range(10)),
        "influence": [0, 1, 2, 3, 4, 36, 37, 38, 39],  # and one of the tied 5 and 35
    }
    if method in expected:
        assert set(expected[method]) <= set(kept.tolist())
    else:
        others = [select(method, COLUMNS, 0.25, seed=s, groups=5).tolist() for s in range(5)]
        assert kept.tolist() not in others[:3] and others[3] == kept.tolist()
    if method == "dealrec":
        assert np.bincount(kept // 8).tolist() == [2, 2, 2, 2, 2]


def test_budgets():
    assert [budget_of(s, 200) for s in (0.02, 0.001, 1.0)] == [4, 1, 200]
    for share in (0.0, 1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="share="):
            budget_of(share, 10)
    with pytest.raises(ValueError, match="best"):
        select("best", COLUMNS, 0.1)
    with pytest.raises(ValueError, match="groups=0"):
        coverage_selection(COLUMNS["score"], 3, groups=0)
    for budget in (0, 41):
        with pytest.raises(ValueError, match="budget"):
            coverage_selection(COLUMNS["score"], budget)
    with pytest.raises(ValueError, match="finite"):
        top_selection(np.array([1.0, np.inf]), 1)
