"""Data pruning: the training rows that are worth an LLM's time (DEALRec, Lin et al., SIGIR 2024).

A sample's score is its influence plus a weighted effort. *Influence* is how much the empirical risk
would rise if the sample were taken out (Koh and Liang 2017), *effort* the norm of the gradient that
it asks of the model. Both are measured on a small surrogate, not on the LLM. A coverage-enhanced
draw then spends the budget over the whole range of scores, so that more than the top is kept.

The surrogate comes as a module whose ``forward(*batch)`` gives one loss per sample, in eval mode,
together with the names of the parameters whose gradients count: gradients of all of them would be
too large to hold per sample, and the Hessian of a part is enough to rank by. `Batches` are iterated
several times, and only one batch is in memory at a time; a batch's per-sample gradients are too.

Deviations from the paper: the linear system is solved by conjugate gradients instead of a
stochastic series; where the surrogate's Hessian isn't positive definite the damping grows until it
is (Levenberg-Marquardt); the effort is the surrogate's, too, so no pass over the LLM is needed; and
no share of the highest scores is cut off before the draw, as the authors' code does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, vmap

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Batch = tuple[torch.Tensor, ...]
Batches = Iterable[Batch]  # re-iterable: a list, or an object that makes the batches anew
Parameters = dict[str, torch.Tensor]

METHODS = ("dealrec", "random", "loss", "effort", "influence")
_ATTEMPTS = 8  # times that the damping may grow tenfold


@dataclass(frozen=True)
class Direction:
    """What every sample's gradient is multiplied with to give its influence.

    Attributes:
        vector: ``(H + damping I)^-1 g``, flat over the chosen parameters. ``# (n_parameters,)``
        damping: what was added to the Hessian in the end.
        iterations: conjugate gradient steps.
        residual: what is left of the right-hand side, relative to it.
        gradient_norm: norm of g, the mean gradient. Near zero (a surrogate trained to the bottom of
            the very risk that is measured) there is no first-order influence to see.
    """

    vector: torch.Tensor
    damping: float
    iterations: int
    residual: float
    gradient_norm: float


@dataclass(frozen=True)
class SampleScores:
    """One value per sample, in the order of the batches.

    Attributes:
        loss: the sample's loss. ``# (n_samples,)``
        influence: mean loss without the sample minus with it, to first order: above 0 it helps.
        effort: norm of the sample's gradient over the chosen parameters.
    """

    loss: FloatArray
    influence: FloatArray
    effort: FloatArray


class NegativeCurvature(ArithmeticError):
    """Conjugate gradients met a direction along which the matrix isn't positive definite."""


# Gradients and the Hessian. -----------------------------------------------------------------------


def mean_gradient(losses: nn.Module, batches: Batches, names: Sequence[str]) -> torch.Tensor:
    """Gradient of the mean loss over all samples, flat over `names`. ``# (n_parameters,)``."""
    chosen = _chosen(losses, names)
    total, count = torch.zeros(_size(chosen)), 0
    for batch in batches:
        values = functional_call(losses, chosen, batch)
        total += _gradient(values.sum(), chosen)
        count += len(values)
    return total / _some(count)


def hessian_vector(
    losses: nn.Module, batches: Batches, names: Sequence[str], vector: torch.Tensor
) -> torch.Tensor:
    """Hessian of the mean loss times a vector, both flat over `names`; H is never formed.

    Args:
        losses: the surrogate, see the module's docstring.
        batches: the samples of the mean.
        names: parameters that the Hessian is about.
        vector: what it is multiplied with. ``# (n_parameters,)``

    Returns:
        The product. ``# (n_parameters,)``
    """
    chosen = _chosen(losses, names)
    total, count = torch.zeros_like(vector), 0
    for batch in batches:
        values = functional_call(losses, chosen, batch)
        slope = _gradient(values.sum(), chosen, keep=True)
        total += _gradient(slope @ vector, chosen)
        count += len(values)
    return total / _some(count)


def conjugate_gradients(
    product: Callable[[torch.Tensor], torch.Tensor],
    target: torch.Tensor,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
) -> tuple[torch.Tensor, int, float]:
    """Solve ``A x = target`` for a positive definite A that is known by its products only.

    Args:
        product: x -> A x.
        target: right-hand side. ``# (n,)``
        max_iterations: most products.
        tolerance: stop where the residual's norm is at most this share of the target's.

    Returns:
        x, the iterations, and the relative residual that is left.

    Raises:
        NegativeCurvature: A is not positive definite along a direction that was met.
    """
    solution, residual = torch.zeros_like(target), target.clone()
    direction, squared, scale = residual.clone(), residual @ residual, float(target.norm())
    iterations = 0
    while iterations < max_iterations and float(squared.sqrt()) > tolerance * scale:
        image = product(direction)
        curvature = direction @ image
        if not float(curvature) > 0:  # NaN, too
            raise NegativeCurvature(f"curvature {float(curvature):.3g} after {iterations} steps")
        step = squared / curvature
        solution += step * direction
        residual -= step * image
        before, squared = squared, residual @ residual
        direction = residual + squared / before * direction
        iterations += 1
    return solution, iterations, float(squared.sqrt()) / scale if scale else 0.0


def influence_direction(
    losses: nn.Module,
    batches: Batches,
    names: Sequence[str],
    damping: float = 0.01,
    curvature: Batches | None = None,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
) -> Direction:
    """``(H + damping I)^-1`` times the mean gradient: the part of influence that samples share.

    Args:
        losses: the surrogate, see the module's docstring.
        batches: all training samples.
        names: parameters whose gradients count.
        damping: added to the Hessian's diagonal; with an L2 penalty of ``c/2 |p|^2`` in training,
            c is exact. Grows tenfold while conjugate gradients meet negative curvature.
        curvature: the samples that H is estimated on; default: all. Every iteration passes over
            them twice, so a fixed part of some thousand saves most of the time.
        max_iterations: most conjugate gradient steps.
        tolerance: relative residual at which they stop.

    Raises:
        ValueError: `damping` isn't above 0, or even a large one doesn't make H positive definite.
    """
    if not damping > 0:
        raise ValueError(f"damping={damping} must be above 0: a Hessian without it is singular")
    gradient = mean_gradient(losses, batches, names)
    seen_by_hessian = batches if curvature is None else curvature
    for attempt in range(_ATTEMPTS):
        tried = damping * 10.0**attempt

        def product(x: torch.Tensor, tried: float = tried) -> torch.Tensor:
            return hessian_vector(losses, seen_by_hessian, names, x) + tried * x

        try:
            found = conjugate_gradients(product, gradient, max_iterations, tolerance)
        except NegativeCurvature as error:
            logger.info("damping %g is too small (%s); trying ten times that", tried, error)
        else:
            vector, iterations, residual = found
            return Direction(vector, tried, iterations, residual, float(gradient.norm()))
    raise ValueError(
        f"the surrogate's Hessian isn't positive definite even with damping {tried:g}; is a loss "
        "NaN, or the surrogate untrained? Train it longer, or choose fewer parameters"
    )


@torch.no_grad()  # torch.func differentiates all the same, and no second graph is kept
def score_samples(
    losses: nn.Module, batches: Batches, names: Sequence[str], direction: torch.Tensor
) -> SampleScores:
    """Loss, influence and effort of every sample, from its own gradient.

    Args:
        losses: the surrogate, see the module's docstring.
        batches: all training samples; one batch's gradients are held at once, so a batch should
            have at most some ten million divided by the number of parameters.
        names: parameters whose gradients count, as for `direction`.
        direction: `Direction.vector`. ``# (n_parameters,)``

    Returns:
        The scores; influence is ``g(s) @ direction / n_samples``.
    """
    chosen = {name: value.detach() for name, value in _chosen(losses, names).items()}

    def loss_of_one(parameters: Parameters, *sample: torch.Tensor) -> torch.Tensor:
        one = tuple(part[None] for part in sample)
        return functional_call(losses, parameters, one)[0]

    parts: list[tuple[torch.Tensor, ...]] = []
    for batch in batches:
        axes = (None, *(0 for _ in batch))
        slopes, values = vmap(grad_and_value(loss_of_one), in_dims=axes)(chosen, *batch)
        flat = torch.cat([slopes[name].flatten(1) for name in chosen], dim=1)  # (batch, parameters)
        parts.append((values, flat @ direction, flat.norm(dim=1)))
    count = _some(sum(len(values) for values, *_ in parts))
    loss, influence, effort = (
        torch.cat(column).double().numpy() for column in zip(*parts, strict=True)
    )
    return SampleScores(loss, influence / count, effort)


def softmax_layer_norms(hidden: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """Norm of each sample's gradient with respect to a softmax layer's weights and bias.

    The gradient is ``sum_t errors_t hidden_t^T``, a matrix as large as the layer; its norm needs
    the inner products of a sample's own positions alone.

    Args:
        hidden: what enters the layer at each position. ``# (n_samples, length, dim)``
        errors: derivative of the sample's loss by the logits, ``weight * (softmax - one-hot)``,
            zero where nothing is predicted. ``# (n_samples, length, n_classes)``

    Returns:
        ``# (n_samples,)``
    """
    alike = hidden @ hidden.mT + 1.0  # (n_samples, length, length); 1 is the bias' input
    return (alike * (errors @ errors.mT)).sum(dim=(1, 2)).clamp(min=0).sqrt()


def _chosen(losses: nn.Module, names: Sequence[str]) -> Parameters:
    """Copies of the named parameters, ready to be differentiated."""
    if losses.training:
        raise ValueError(
            "the surrogate is in training mode, where dropout makes every gradient a draw; "
            "call .eval() first"
        )
    known = dict(losses.named_parameters())
    if unknown := [name for name in names if name not in known] or not names:
        raise ValueError(f"names={unknown} are no parameters; the surrogate has {list(known)}")
    return {name: known[name].detach().clone().requires_grad_() for name in names}


def _size(parameters: Parameters) -> int:
    return sum(value.numel() for value in parameters.values())


def _some(count: int) -> int:
    if not count:
        raise ValueError("there are no samples to score; hand in at least one batch")
    return count


def _gradient(value: torch.Tensor, by: Parameters, keep: bool = False) -> torch.Tensor:
    parts = torch.autograd.grad(value, list(by.values()), create_graph=keep, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


# Scores and selection. ----------------------------------------------------------------------------


def dealrec_score(influence: FloatArray, effort: FloatArray, weight: float = 0.5) -> FloatArray:
    """Influence plus `weight` times effort, both brought to [0, 1] first (DEALRec).

    Args:
        influence: of each sample. ``# (n_samples,)``
        effort: of each sample. ``# (n_samples,)``
        weight: the paper's lambda, 0 or more.
    """
    if not weight >= 0:
        raise ValueError(f"effort_weight={weight} must be at least 0")
    return _unit_range(influence) + weight * _unit_range(effort)


def budget_of(share: float, n_samples: int) -> int:
    """Samples that a share is, at least one."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must lie in (0, 1]")
    return max(1, round(share * n_samples))


def coverage_selection(
    scores: FloatArray, budget: int, groups: int = 50, seed: int = 0
) -> IntArray:
    """Spend a budget over the whole range of scores (DEALRec; Zheng et al. 2023).

    The range is cut into `groups` intervals of equal width. Group by group, the smallest first,
    an equal part of what is left of the budget is drawn uniformly; a group smaller than its part is
    taken whole, and the larger ones share the rest.

    Args:
        scores: of each sample. ``# (n_samples,)``
        budget: samples to keep.
        groups: number of intervals.
        seed: of the draws.

    Returns:
        Places of the kept samples, ascending. ``# (budget,)``

    Raises:
        ValueError: no group, a budget that the samples can't fill, or a score that isn't finite.
    """
    if groups < 1:
        raise ValueError(f"groups={groups} must be at least 1")
    _check(scores, budget)
    rng = np.random.default_rng(seed)
    group = np.minimum((_unit_range(scores) * groups).astype(np.int64), groups - 1)
    size = np.bincount(group, minlength=groups)
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(size)[:-1])
    filled = [g for g in np.argsort(size, kind="stable") if size[g]]
    kept, left = [], budget
    for place, g in enumerate(filled):
        part = min(int(size[g]), left // (len(filled) - place))
        kept.append(rng.choice(members[g], part, replace=False))
        left -= part
    assert left == 0, "the last group is the largest, so it can take the rest"
    return np.sort(np.concatenate(kept))


def top_selection(scores: FloatArray, budget: int, seed: int = 0) -> IntArray:
    """Places of the `budget` highest scores, ascending; ties are drawn. ``# (budget,)``."""
    _check(scores, budget)
    lots = np.random.default_rng(seed).permutation(len(scores))
    return np.sort(np.lexsort((lots, -scores))[:budget])


def select(
    method: str,
    scores: dict[str, FloatArray],
    share: float,
    seed: int = 0,
    groups: int = 50,
) -> IntArray:
    """Places of the samples that a method keeps, ascending.

    Args:
        method: "dealrec" draws over the range of "score", "random" from all; "loss", "effort" and
            "influence" take the highest of that column.
        scores: "loss", "effort", "influence" and "score" (`dealrec_score`). ``# (n_samples,)``
        share: of the samples to keep, in (0, 1].
        seed: of the draws.
        groups: of `coverage_selection`.

    Raises:
        ValueError: an unknown method, or settings that the scores don't allow.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}")
    n_samples = len(scores["score"])
    budget = budget_of(share, n_samples)
    if method == "dealrec":
        return coverage_selection(scores["score"], budget, groups, seed)
    if method == "random":
        return np.sort(np.random.default_rng(seed).choice(n_samples, budget, replace=False))
    return top_selection(scores[method], budget, seed)


def _unit_range(values: FloatArray) -> FloatArray:
    """Min-max normalised; values that are all alike become 0."""
    _check(values, 1)
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else np.zeros(len(values))


def _check(scores: FloatArray, budget: int) -> None:
    if not 1 <= budget <= len(scores):
        raise ValueError(f"a budget of {budget} can't be met from {len(scores)} samples")
    if bad := int((~np.isfinite(scores)).sum()):
        raise ValueError(f"{bad} of {len(scores)} scores aren't finite; did the surrogate diverge?")
