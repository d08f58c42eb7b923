"""Which score normaliser a trained model declares, decided on validation NDCG.

All three rank the same rows with the same weights, so their differences are paired. The full
vocabulary is the model's true conditional and the default: another normaliser has to be better by
more than chance explains, else every run would pick one by noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genrec.decoding.torch_engine import TorchEngine
from genrec.evaluation.significance import bootstrap_means, holm, interval, randomisation_test
from genrec.evaluation.validation import BeamValidation
from genrec.normalizers import NORMALIZERS, Normalizer

FloatArray = npt.NDArray[np.float64]

LEVEL = 0.05  # of the test
DEFAULT: Normalizer = "full"


@dataclass(frozen=True)
class NormalizerChoice:
    """What was declared, and why.

    Attributes:
        normalizer: the declared one.
        rule: how it was decided, in words.
        rows: validation rows that it was decided on; 0 where nothing was compared.
        measured: normaliser -> mean ``hr@k`` and ``ndcg@k``.
        against_default: normaliser -> its NDCG minus the default's: ``value``, the ends of a 95%
            bootstrap interval ``low`` and ``high``, and ``p_holm`` of the randomisation test.
    """

    normalizer: Normalizer
    rule: str
    rows: int
    measured: Mapping[str, Mapping[str, float]]
    against_default: Mapping[str, Mapping[str, float]]

    def __str__(self) -> str:
        """One line."""
        gains = [
            f"{name} {value:.4f}"
            for name, metrics in self.measured.items()
            for key, value in metrics.items()
            if key.startswith("ndcg")
        ]
        return f"{self.normalizer}: " + (f"NDCG {', '.join(gains)}" if gains else self.rule)


def measure_normalizers(
    validation: BeamValidation,
    make: Callable[..., TorchEngine],
    seed: int = 0,
    candidates: Sequence[Normalizer] = NORMALIZERS,
) -> NormalizerChoice:
    """Rank the validation sample under each normaliser and decide.

    Args:
        validation: the sample.
        make: an engine of the trained model, given `normalizer`.
        seed: of the test's and the bootstrap's draws.
        candidates: what the model was trained for; the first is the default.
    """
    found = {name: validation.per_row(make(normalizer=name)) for name in candidates}
    hits = {name: values[0] for name, values in found.items()}
    gains = {name: values[1] for name, values in found.items()}
    return choose_normalizer(hits, gains, validation.k, seed, validation.users)


def choose_normalizer(
    hits: Mapping[Normalizer, FloatArray],
    gains: Mapping[Normalizer, FloatArray],
    k: int,
    seed: int = 0,
    users: npt.NDArray[np.integer] | None = None,
) -> NormalizerChoice:
    """Decide between normalisers that ranked the same rows.

    The first, unless another one has a higher mean NDCG and the paired randomisation test tells the
    two apart (two-sided, Holm-adjusted for the comparisons, p ≤ `LEVEL`); of several such ones the
    best, on a tie the earlier.

    Args:
        hits: HR@k of each row. ``# (rows,)`` each
        gains: NDCG@k of each row, the default's first. ``# (rows,)`` each
        k: length of the lists.
        seed: of the draws.
        users: number of each row's user: a user's rows resemble each other. ``# (rows,)``

    Raises:
        ValueError: no rows.
    """
    default, *others = gains
    if len(gains[default]) == 0:
        raise ValueError(f"{default!r} must have ranked at least one row; it is the default")
    against: dict[str, dict[str, float]] = {}
    better: list[Normalizer] = []
    if others:
        differences = np.column_stack([gains[name] - gains[default] for name in others])
        p_values = holm(randomisation_test(differences, seed=seed, groups=users).tolist())
        draws = bootstrap_means(differences, seed=seed, groups=users)
        for column, name in enumerate(others):
            value = float(differences[:, column].mean())
            ends = interval(value, draws[:, column])
            assert ends.low is not None and ends.high is not None
            against[name] = {
                "value": value, "low": ends.low, "high": ends.high, "p_holm": p_values[column]
            }  # fmt: skip
            if value > 0 and p_values[column] <= LEVEL:
                better.append(name)
    chosen = max(better, key=lambda name: against[name]["value"], default=default)
    return NormalizerChoice(
        chosen,
        f"{default}, unless another one's NDCG@{k} on validation is higher and a paired "
        f"randomisation test (Holm-adjusted) gives p <= {LEVEL:g}",
        len(gains[default]),
        {
            name: {f"hr@{k}": float(np.mean(hits[name])), f"ndcg@{k}": float(np.mean(values))}
            for name, values in gains.items()
        },
        against,
    )


def declared_by_hand(normalizer: Normalizer) -> NormalizerChoice:
    """The record of a normaliser that the settings name: nothing is compared."""
    return NormalizerChoice(normalizer, f"named by the settings: {normalizer}", 0, {}, {})


def declared_unmeasured(default: Normalizer, reason: str) -> NormalizerChoice:
    """The record of the default where there is nothing to decide on."""
    return NormalizerChoice(default, f"{default}, since {reason}", 0, {}, {})
