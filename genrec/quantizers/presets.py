"""Settings of an RQ-VAE, and those of published systems by name.

Epoch counts are the papers' (thousands, for a GPU): override them on a CPU, as in
``preset("tiger", epochs=300)``. Kept apart from the training, so that reading settings needs no
torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from genrec.quantizers.projection import KINDS, Kind

Gradient = Literal["straight-through", "ema", "rotation"]
GRADIENTS: tuple[Gradient, ...] = ("straight-through", "ema", "rotation")
Reduction = Literal["sum", "mean"]
REDUCTIONS: tuple[Reduction, ...] = ("sum", "mean")


@dataclass(frozen=True)
class RQVAESettings:
    """How an RQ-VAE is built and trained; `PRESETS` holds those of published systems.

    Attributes:
        n_levels: tokens per item.
        codebook_size: codes per level, or one number for each level.
        hidden_sizes: of the encoder from the input on; the decoder mirrors them.
        latent_dim: dimensions of the codebooks; None: no encoder and no decoder, the codebooks lie
            in the space of the projected vectors and `hidden_sizes` must be empty.
        lr: AdamW's learning rate.
        lr_schedule: "constant", or "linear" down to zero.
        weight_decay: AdamW's, on encoder and decoder; codebooks are centroids and don't decay.
        epochs: passes over the catalogue.
        batch_size: items per step.
        commitment: weight of the commitment loss (beta).
        reduction: "sum" adds squared errors over dimensions and losses over levels, as TIGER's
            equations do; "mean" averages both, as the code of LC-Rec, LETTER and Mender does. That
            decides how the reconstruction weighs against the codebooks, and both against LETTER's
            losses: by the input's dimensions in one case, by the latent ones in the other.
        gradient: how the encoder's gradient passes the codes. "ema" is straight-through with
            codebooks that follow a moving average instead of the codebook loss.
        ema_decay: of "ema".
        dead_code_reset: after each epoch, codes that are no item's nearest restart from what the
            levels above leave of real items, those far from every code first.
        sinkhorn_epsilon: above 0, codes are assigned evenly within each training batch (encoding
            stays by nearest code); one number for each level, or one for all.
        sinkhorn_iterations: of that assignment.
        standardize: see `Projection.fit`; raw text vectors collapse.
        pca_dim: see `Projection.fit`.
        patience: above 0, the best epoch is kept, and training stops after so many epochs without a
            better one. Better is a lower share of items, of the whole catalogue, that share a SID;
            if that is equal, a reconstruction that is better by 0.1%. 0 runs all epochs and keeps
            the last, as suits a learning rate that falls to zero over `epochs`.
        collaborative_weight: of LETTER's contrastive loss (alpha), see `collaborative_loss`.
        temperature: of that loss.
        diversity_weight: of LETTER's diversity loss (beta), in each level's loss.
        diversity_clusters: clusters of codes in each codebook.

    Raises:
        ValueError: a value is out of range, or two contradict each other.
    """

    n_levels: int = 3
    codebook_size: int | tuple[int, ...] = 256
    hidden_sizes: tuple[int, ...] = (512, 256)
    latent_dim: int | None = 64
    lr: float = 1e-3
    lr_schedule: Literal["constant", "linear"] = "linear"
    weight_decay: float = 1e-4
    epochs: int = 50
    batch_size: int = 512
    commitment: float = 0.25
    reduction: Reduction = "sum"
    gradient: Gradient = "ema"
    ema_decay: float = 0.99
    dead_code_reset: bool = True
    sinkhorn_epsilon: float | tuple[float, ...] = 0.0
    sinkhorn_iterations: int = 50
    standardize: Kind = "standard"
    pca_dim: int | None = None
    patience: int = 0
    collaborative_weight: float = 0.0
    temperature: float = 0.1
    diversity_weight: float = 0.0
    diversity_clusters: int = 10

    def __post_init__(self) -> None:
        """Turn lists (from YAML or JSON) into tuples and check the values."""
        for name in ("codebook_size", "hidden_sizes", "sinkhorn_epsilon"):
            value = getattr(self, name)
            if not isinstance(value, int | float):
                object.__setattr__(self, name, tuple(value))
        for choice, allowed in (
            ("gradient", GRADIENTS),
            ("reduction", REDUCTIONS),
            ("lr_schedule", ("constant", "linear")),
            ("standardize", KINDS),
        ):
            if getattr(self, choice) not in allowed:
                raise ValueError(
                    f"{choice}={getattr(self, choice)!r} is none of {', '.join(allowed)}"
                )
        for name, low in (
            ("n_levels", 1), ("epochs", 1), ("batch_size", 1), ("sinkhorn_iterations", 1),
            ("patience", 0), ("commitment", 0), ("weight_decay", 0), ("collaborative_weight", 0),
            ("diversity_weight", 0), ("diversity_clusters", 1),
        ):  # fmt: skip
            if not getattr(self, name) >= low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")
        if not (self.lr > 0 and self.temperature > 0 and 0 < self.ema_decay < 1):
            raise ValueError(
                f"lr={self.lr} and temperature={self.temperature} must be positive and ema_decay="
                f"{self.ema_decay} between 0 and 1"
            )
        self._check_levels()
        self._check_together()

    def _check_levels(self) -> None:
        for name in ("codebook_size", "sinkhorn_epsilon"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.n_levels:
                raise ValueError(
                    f"{name}={value} has {len(value)} values for n_levels={self.n_levels}; give "
                    "one for each level, or one number for all"
                )
        if any(not isinstance(size, int) or size < 2 for size in self.codebook_sizes):
            raise ValueError(
                f"codebook_size={self.codebook_size}: each level needs a whole number of codes, at "
                "least 2"
            )
        if min(self.sinkhorn_epsilons) < 0:
            raise ValueError(f"sinkhorn_epsilon={self.sinkhorn_epsilon} must not be negative")
        latent_dim = 1 if self.latent_dim is None else self.latent_dim
        if min(*self.hidden_sizes, latent_dim, 1) < 1:
            raise ValueError(
                f"hidden_sizes={self.hidden_sizes} and latent_dim={self.latent_dim} must be at "
                "least 1"
            )

    def _check_together(self) -> None:
        if self.latent_dim is None and self.hidden_sizes:
            raise ValueError(
                f"latent_dim=None means no encoder, but hidden_sizes={self.hidden_sizes}; give a "
                "latent_dim, or hidden_sizes=()"
            )
        if self.gradient != "straight-through" and self.latent_dim is None:
            raise ValueError(
                f"gradient={self.gradient!r} needs an encoder; give a latent_dim, or use "
                "gradient='straight-through' (codebooks only) or residual k-means"
            )
        if self.diversity_weight > 0:
            if self.gradient == "ema":
                raise ValueError(
                    "diversity_weight moves codebooks by gradients, which gradient='ema' doesn't; "
                    "use 'straight-through' or 'rotation'"
                )
            if min(self.codebook_sizes) < 2 * self.diversity_clusters:
                raise ValueError(
                    f"diversity_clusters={self.diversity_clusters} leaves codes of codebook_size="
                    f"{self.codebook_size} without a partner; use at most "
                    f"{min(self.codebook_sizes) // 2}"
                )

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes per level."""
        size = self.codebook_size
        return size if isinstance(size, tuple) else (size,) * self.n_levels

    @property
    def sinkhorn_epsilons(self) -> tuple[float, ...]:
        """Sinkhorn's epsilon per level; 0 is off."""
        epsilon = self.sinkhorn_epsilon
        return epsilon if isinstance(epsilon, tuple) else (epsilon,) * self.n_levels


PRESETS: dict[str, RQVAESettings] = {
    "default": RQVAESettings(),
    "tiger": RQVAESettings(
        hidden_sizes=(512, 256, 128),
        latent_dim=32,
        lr_schedule="constant",
        weight_decay=0.0,
        epochs=3000,
        batch_size=1024,
        gradient="straight-through",
        dead_code_reset=False,
        standardize="none",
    ),
    "lc-rec": RQVAESettings(
        n_levels=4,
        hidden_sizes=(2048, 1024, 512, 256, 128, 64),
        latent_dim=32,
        epochs=10_000,
        patience=10_000,  # never stops, but keeps the epoch of the fewest collisions, as they do
        batch_size=1024,
        reduction="mean",
        gradient="straight-through",
        dead_code_reset=False,
        sinkhorn_epsilon=(0.0, 0.0, 0.0, 0.003),
        standardize="none",
    ),
    "letter": RQVAESettings(
        n_levels=4,
        hidden_sizes=(2048, 1024, 512, 256, 128, 64),
        latent_dim=32,
        lr_schedule="constant",
        epochs=20_000,
        patience=20_000,  # as in lc-rec
        batch_size=1024,
        reduction="mean",
        gradient="straight-through",
        dead_code_reset=False,
        sinkhorn_epsilon=(0.0, 0.0, 0.0, 0.003),
        standardize="none",
        collaborative_weight=0.01,
        diversity_weight=1e-4,
    ),
    "grid-rvq": RQVAESettings(
        hidden_sizes=(),
        latent_dim=None,
        lr_schedule="constant",
        weight_decay=0.0,
        epochs=500,
        batch_size=2048,
        gradient="straight-through",
        dead_code_reset=False,
        standardize="none",
    ),
    "mender": RQVAESettings(
        hidden_sizes=(768, 512, 256),
        latent_dim=128,
        lr_schedule="constant",
        weight_decay=0.1,
        epochs=8000,
        batch_size=1024,
        reduction="mean",
        gradient="straight-through",
        dead_code_reset=False,
    ),
}

_RAW = (
    "raw text vectors: on unit-length vectors of one encoder the codebooks collapse or lose codes; "
    "standardize='standard', dead_code_reset=True and gradient='ema' prevent it"
)

# Measured on Amazon Beauty (12,101 items, MiniLM, unit length), all items in the k-means++ start.
PRESET_NOTES: dict[str, str] = {
    "tiger": (
        f"{_RAW} (after one epoch level 1 used 21 of 256 codes, after 100 epochs 130). The paper "
        "trains with Adagrad at 0.4 for 20,000 epochs; these are its re-implementations' settings."
    ),
    "lc-rec": (
        f"{_RAW} (after 12 epochs 6, 7 and 3 codes of the first levels were used and 95% of the "
        "items shared a SID). The published code starts from k-means of the first batch, decays "
        "codebooks, too, and lets no commitment loss but the first level's reach the encoder."
    ),
    "letter": (
        f"{_RAW}. The network is that of lc-rec, which collapsed. Needs collaborative vectors; the "
        "collaborative loss takes cosines at `temperature`, where the published one takes inner "
        "products, which depend on the vectors' scale."
    ),
    "grid-rvq": (
        "no encoder: codebooks alone, refined from residual k-means. The 3,000 steps are 500 "
        "epochs of six batches for 12,000 items; GRID's normalisation of residuals is left out."
    ),
    "mender": "the batch size is our choice; unused codes are not reset.",
}


def preset(name: str, **overrides: Any) -> RQVAESettings:
    """Settings of a published system, with some changed.

    Args:
        name: a key of `PRESETS`.
        overrides: fields of `RQVAESettings`, e.g. ``epochs=300``.

    Raises:
        ValueError: no such preset or field, or a value out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is none of {', '.join(PRESETS)}")
    fields = [f.name for f in dataclasses.fields(RQVAESettings)]
    if unknown := sorted(set(overrides) - set(fields)):
        raise ValueError(f"{', '.join(unknown)}: no such setting; there are {', '.join(fields)}")
    return dataclasses.replace(PRESETS[name], **overrides)
