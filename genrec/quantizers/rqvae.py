"""RQ-VAE: an autoencoder with residual codes as latents (Lee et al. 2022; Rajput et al. 2023).

Loss per item: squared reconstruction error, plus at each level the codebook loss and `commitment`
times the commitment loss; summed or averaged over dimensions and levels (`reduction`). The file is
long because network, training and quantizer are meant to be read, and copied, as one; settings are
in `presets.py`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from genrec.quantizers.kmeans import fit_rows, kmeans
from genrec.quantizers.presets import RQVAESettings
from genrec.quantizers.projection import Projection, sample_rows
from genrec.quantizers.quantizer import (
    CodeArray,
    FloatArray,
    check_codes,
    check_distinct,
    check_finite,
    check_input,
    encode_by_levels,
    read_tensors,
    row_blocks,
    squared_distances,
)
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

logger = logging.getLogger(__name__)

_NETWORK_ROWS = 8_192  # vectors that pass through the encoder or decoder at once after training
_FIT_ITEMS = 2**20  # items that are trained on at most
_RESET_ROWS = 2**20  # items that unused codes are re-seeded from at most
_IMPROVEMENT = 1e-3  # relative change that counts for early stopping


class _Network(nn.Module):
    """Encoder, codebooks and decoder; weights are drawn from `seed` alone."""

    def __init__(self, input_dim: int, settings: RQVAESettings, seed: int = 0) -> None:
        super().__init__()
        latent_dim = input_dim if settings.latent_dim is None else settings.latent_dim
        sizes = [input_dim, *settings.hidden_sizes, latent_dim]
        if settings.latent_dim is None:
            sizes = []
        generator = torch.Generator().manual_seed(seed)
        self.encoder = _mlp(sizes, generator)
        self.decoder = _mlp(sizes[::-1], generator)
        self.codebooks = nn.ParameterList(
            nn.Parameter(torch.zeros(size, latent_dim), settings.gradient != "ema")
            for size in settings.codebook_sizes
        )


def _mlp(sizes: list[int], generator: torch.Generator) -> nn.Sequential:
    """Linear layers with ReLU between them; the identity if there are no sizes."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        # skip_init, because the usual initialisation would draw from the global generator.
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
        nn.init.xavier_normal_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True, eq=False)
class RQVAE:
    """A trained RQ-VAE. It encodes on the CPU, so that its codes don't depend on the machine.

    Attributes:
        settings: what it was trained with.
        projection: what happens to vectors before the encoder.
        network: encoder, codebooks and decoder.
        seed: of initialisation, batches and re-seeding.
        history: one row per epoch: mean loss parts per item; over all items trained on, the share
            of those that share a SID and, per level, perplexity and codes used; and whether its
            weights are the ones kept. JSON can hold it (the quantize recipe keeps it as
            ``history.json``). `save` leaves it out; empty after `load`.
    """

    kind: ClassVar[str] = "rqvae"

    settings: RQVAESettings
    projection: Projection
    network: _Network = field(repr=False)
    seed: int
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @classmethod
    def fit(
        cls,
        vectors: npt.NDArray[np.floating],
        settings: RQVAESettings,
        seed: int = 0,
        device: str | None = None,
        collaborative: npt.NDArray[np.floating] | None = None,
        progress: bool = True,
    ) -> RQVAE:
        """Train on all items, or a seeded sample of `_FIT_ITEMS`; one seed, one result on a CPU.

        Their vectors are held on the device. The global random state is neither used nor changed.

        Args:
            vectors: item vectors, (n_items, dim), finite; may be a memory map.
            settings: see `RQVAESettings`.
            seed: of initialisation, batches and re-seeding.
            device: "cpu", "cuda", …; None takes a GPU if there is one.
            collaborative: row i is item i's collaborative vector from training interactions,
                (n_items, any dim); a row of zeros (an item without interactions) is left out of
                the collaborative loss. Needed if `collaborative_weight` is above 0.
            progress: show a progress bar.

        Raises:
            ValueError: wrong shapes, NaN or inf, fewer distinct items than codes, collaborative
                vectors missing or not asked for, or the training diverged.
        """
        check_input(vectors)
        _check_collaborative(collaborative, len(vectors), settings.collaborative_weight)
        rows = sample_rows(vectors, fit_rows(max(settings.codebook_sizes)), seed)
        check_distinct(rows, settings.codebook_sizes)
        projection = Projection.fit(vectors, settings.standardize, settings.pca_dim, seed)
        items = np.arange(len(vectors))
        if len(items) > _FIT_ITEMS:
            items = np.random.default_rng(seed).choice(len(vectors), _FIT_ITEMS, replace=False)
            items.sort()  # a memory map is then read forwards
            collaborative = collaborative if collaborative is None else collaborative[items]
        projected = np.empty((len(items), len(projection.scale)), dtype=np.float32)
        for block in row_blocks(len(items), vectors.shape[1]):
            projected[block] = projection.apply(np.asarray(vectors[items[block]], np.float32))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        network = _Network(projected.shape[1], settings, seed).to(device)
        training = _Training(network, settings, torch.from_numpy(projected), collaborative, seed)
        history = training.run(progress)
        kept = next(row for row in history if row["kept"])
        _warn_of_collapse(kept["perplexity"], settings.codebook_sizes)
        return cls(settings, projection, network.to("cpu").requires_grad_(False), seed, history)

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Number of codes per level."""
        return self.settings.codebook_sizes

    @property
    def dim(self) -> int:
        """Dimensions of the vectors that it encodes."""
        return len(self.projection.mean)

    @property
    def codebooks(self) -> tuple[FloatArray, ...]:
        """Per level (codebook_size, latent_dim)."""
        return tuple(codebook.detach().numpy() for codebook in self.network.codebooks)

    def project(self, vectors: npt.NDArray[np.floating]) -> FloatArray:
        """Latents of vectors (n, dim), (n, latent_dim) float32."""
        return _through(self.network.encoder, self.projection.apply(vectors))

    def level_distances(self, latents: FloatArray, prefix: CodeArray, level: int) -> FloatArray:
        """Squared distances in latent space of what the prefix leaves over, (n, codebook_size)."""
        books = self.codebooks
        residual = latents
        for upper in range(level):
            residual = residual - books[upper][prefix[:, upper]]
        return squared_distances(residual, books[level])

    def level_costs(self, latents: FloatArray, prefix: CodeArray, level: int) -> FloatArray:
        """`level_distances`, which are in the units of the latents, (n, codebook_size)."""
        return self.level_distances(latents, prefix, level)

    def level_bias(self, level: int) -> FloatArray | None:
        """None: codes are the nearest ones."""
        return None

    def encode(self, vectors: npt.NDArray[np.floating]) -> CodeArray:
        """Codes of vectors (n, dim), (n, n_levels) int32."""
        return encode_by_levels(self, vectors)

    def reconstruct(self, codes: CodeArray) -> FloatArray:
        """Sums of the codes' vectors, (n, latent_dim)."""
        check_codes(codes, self.codebook_sizes)
        latents = np.zeros((len(codes), self.codebooks[0].shape[1]), dtype=np.float32)
        for level, codebook in enumerate(self.codebooks):
            latents += codebook[codes[:, level]]
        return latents

    def decode(self, codes: CodeArray) -> FloatArray:
        """Reconstructed vectors, (n, dim), in the space of the input."""
        return self.projection.invert(_through(self.network.decoder, self.reconstruct(codes)))

    def save(self, path: Path | str) -> None:
        """Write one safetensors file."""
        tensors: dict[str, npt.NDArray[np.generic]] = dict(self.projection.tensors())
        for name, value in self.network.state_dict().items():
            tensors[f"network.{name}"] = np.ascontiguousarray(value.numpy())
        about = {"kind": self.kind, "seed": self.seed, "settings": asdict(self.settings)}
        save_file(tensors, path, {"genrec": json.dumps(about)})

    @classmethod
    def load(cls, path: Path | str) -> RQVAE:
        """Read what `save` wrote."""
        tensors, about = read_tensors(path, cls.kind)
        settings = RQVAESettings(**about["settings"])
        projection = Projection.from_tensors(tensors)
        network = _Network(len(projection.scale), settings).requires_grad_(False)
        prefix = "network."
        network.load_state_dict(
            {
                name.removeprefix(prefix): torch.from_numpy(value)
                for name, value in tensors.items()
                if name.startswith(prefix)
            }
        )
        return cls(settings, projection, network, about["seed"])


class _Training:
    """One run of training: the tensors on the device, the optimizer and the epochs."""

    def __init__(
        self,
        network: _Network,
        settings: RQVAESettings,
        projected: Tensor,
        collaborative: npt.NDArray[np.floating] | None,
        seed: int,
    ) -> None:
        self.network, self.settings, self.seed = network, settings, seed
        device = network.codebooks[0].device
        self.vectors = projected.to(device)  # (n_items, projected dim)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.collaborative: Tensor | None = None
        self.clusters: list[Tensor] = []
        weights = [*network.encoder.parameters(), *network.decoder.parameters()]
        latent_dim = network.codebooks[0].shape[1]
        self.head: nn.Module = nn.Identity()
        if collaborative is not None:
            self.collaborative = torch.from_numpy(collaborative.astype(np.float32)).to(device)
            if collaborative.shape[1] != latent_dim:
                # LETTER's vectors have as many dimensions as its latents; others need a map.
                sizes = [latent_dim, collaborative.shape[1]]
                self.head = _mlp(sizes, torch.Generator().manual_seed(seed)).to(device)
                weights += self.head.parameters()
        self._start_codebooks()
        self.moving = [MovingCodebook(book, settings.ema_decay) for book in network.codebooks]
        groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": settings.weight_decay}]
        if settings.gradient != "ema":
            groups.append({"params": list(network.codebooks), "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr)

    def run(self, progress: bool) -> list[dict[str, Any]]:
        """Train; returns one row per epoch. With `patience` the best epoch's weights are kept."""
        patience = self.settings.patience
        history: list[dict[str, Any]] = []
        best, fewest, least = -1, float("inf"), float("inf")
        weights: dict[str, Tensor] = {}
        latents, used = self._measure()[:2]
        bar = tqdm(range(self.settings.epochs), desc="RQ-VAE", unit="epoch", disable=not progress)
        for epoch in bar:
            reset = self._reset_dead_codes(latents, used) if self.settings.dead_code_reset else 0
            parts = self._epoch(epoch)
            if not np.isfinite(parts["total"]):
                raise ValueError(
                    f"the loss is {parts['total']} in epoch {epoch + 1}: training diverged; lower "
                    f"lr={self.settings.lr} or use standardize='standard'"
                )
            latents, used, usage = self._measure()
            history.append({"epoch": epoch + 1, **parts, "codes_reset": reset, **usage})
            error, shared = parts["reconstruction"], usage["collision_rate"]
            bar.set_postfix(error=f"{error:.3g}", collisions=f"{shared:.1%}")
            if shared < fewest or (shared == fewest and error < least * (1 - _IMPROVEMENT)):
                best, fewest, least = epoch, shared, error
                if patience:
                    weights = {k: v.clone() for k, v in self.network.state_dict().items()}
            elif patience and epoch - best >= patience:
                logger.info("RQ-VAE stopped after epoch %d: no improvement", epoch + 1)
                break
        if patience:
            self.network.load_state_dict(weights)
        for row in history:
            row["kept"] = row["epoch"] == (best + 1 if patience else len(history))
        return history

    def _start_codebooks(self) -> None:
        """k-means++ and Lloyd's iterations on all items' residuals, level by level."""
        residuals = self._encode_all()
        for level, codebook in enumerate(self.network.codebooks):
            rows = sample_rows(residuals.cpu().numpy(), fit_rows(len(codebook)), self.seed)
            centroids, _ = kmeans(rows, len(codebook), self.seed + 7919 * level)
            with torch.no_grad():
                codebook.copy_(torch.from_numpy(centroids))
            residuals = residuals - codebook.detach()[nearest_codes(residuals, codebook)]

    def _epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the items; mean loss parts per item."""
        settings = self.settings
        if settings.diversity_weight > 0:
            self.clusters = [
                code_clusters(codebook, settings.diversity_clusters, self.seed)
                for codebook in self.network.codebooks
            ]
        device, n_items = self.vectors.device, len(self.vectors)
        order = torch.randperm(n_items, generator=self.generator, device=device)
        batches = order.tensor_split(-(-n_items // settings.batch_size))  # of nearly equal size
        sums: dict[str, Tensor] = {}
        for step, rows in enumerate(batches):
            if settings.lr_schedule == "linear":
                done = (epoch + step / len(batches)) / settings.epochs
                for group in self.optimizer.param_groups:
                    group["lr"] = settings.lr * (1 - done)
            parts = self._losses(rows)
            self.optimizer.zero_grad(set_to_none=True)
            parts["total"].backward()
            self.optimizer.step()
            for name, value in parts.items():  # summed on the device: no wait for it at each step
                sums[name] = sums.get(name, torch.zeros((), device=device)) + (
                    value.detach() * len(rows)
                )
        return {name: float(value) / n_items for name, value in sums.items()}

    def _losses(self, rows: Tensor) -> dict[str, Tensor]:
        """Loss parts of a batch (row numbers), unweighted, and their weighted total."""
        settings, network = self.settings, self.network
        batch = self.vectors[rows]  # (batch, projected dim)
        latents = network.encoder(batch)  # (batch, latent_dim)
        residual, quantized = latents, torch.zeros_like(latents)
        parts: dict[str, Tensor] = {}
        for level, codebook in enumerate(network.codebooks):
            codes = self._assign(residual.detach(), level)
            chosen = F.embedding(codes, codebook)  # (batch, latent_dim)
            losses = {
                "codebook": self._error(chosen, residual.detach()),
                "commitment": self._error(residual, chosen.detach()),
            }
            if self.clusters:
                losses["diversity"] = diversity_loss(
                    codes, codebook, self.clusters[level], self.generator
                )
            for name, loss in losses.items():
                if settings.reduction == "mean":
                    loss = loss / settings.n_levels
                parts[name] = parts[name] + loss if level else loss
            quantized = quantized + chosen.detach()
            if settings.gradient == "ema":
                self.moving[level].update(residual.detach(), codes)
            residual = residual - chosen.detach()
        through = rotate_through if settings.gradient == "rotation" else straight_through
        quantized = through(latents, quantized)
        parts["reconstruction"] = self._error(network.decoder(quantized), batch)
        total = parts["reconstruction"] + settings.commitment * parts["commitment"]
        if settings.gradient != "ema":
            total = total + parts["codebook"]
        if self.clusters:
            total = total + settings.diversity_weight * parts["diversity"]
        if self.collaborative is not None:
            parts["collaborative"] = self._collaborative(quantized, rows)
            total = total + settings.collaborative_weight * parts["collaborative"]
        return {**parts, "total": total}

    def _error(self, rows: Tensor, targets: Tensor) -> Tensor:
        """Squared error, summed or averaged over dimensions, mean over rows."""
        errors = (rows - targets) ** 2
        return errors.mean() if self.settings.reduction == "mean" else errors.sum(dim=1).mean()

    def _assign(self, residual: Tensor, level: int) -> Tensor:
        codebook = self.network.codebooks[level].detach()
        epsilon = self.settings.sinkhorn_epsilons[level]
        if epsilon > 0:
            distances = code_distances(residual, codebook)
            return uniform_codes(distances, epsilon, self.settings.sinkhorn_iterations)
        return nearest_codes(residual, codebook)

    def _collaborative(self, quantized: Tensor, rows: Tensor) -> Tensor:
        assert self.collaborative is not None
        targets = self.collaborative[rows]
        known = targets.any(dim=1)
        if not known.any():
            return quantized.sum() * 0.0
        return collaborative_loss(
            self.head(quantized[known]), targets[known], self.settings.temperature
        )

    @torch.no_grad()
    def _encode_all(self) -> Tensor:
        """Latents of all items, (n_items, latent_dim)."""
        return torch.cat([self.network.encoder(v) for v in self.vectors.split(_NETWORK_ROWS)])

    @torch.no_grad()
    def _measure(self) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
        """Latents of all items, which codes of each level are used, and figures of the usage."""
        latents = self._encode_all()
        residuals, used, perplexity = latents, [], []
        sids = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)
        for codebook in self.network.codebooks:
            codes = nearest_codes(residuals, codebook)
            counts = torch.bincount(codes, minlength=len(codebook))
            residuals = residuals - codebook[codes]
            share = counts[counts > 0].double() / len(codes)
            used.append(counts > 0)
            perplexity.append(float(torch.exp(-(share * share.log()).sum())))
            sids = torch.unique(sids * len(codebook) + codes, return_inverse=True)[1]
        return (
            latents,
            used,
            {
                "collision_rate": float((torch.bincount(sids)[sids] > 1).double().mean()),
                "perplexity": perplexity,
                "codes_used": [int(level.sum()) for level in used],
            },
        )

    @torch.no_grad()
    def _reset_dead_codes(self, residuals: Tensor, used: list[Tensor]) -> int:
        """Restart unused codes from items' residuals (n_items, latent_dim); returns how many.

        Residuals are drawn in proportion to their squared distance to the nearest code, as
        k-means++ does. A reset changes what the levels below see; their usage is counted anew.
        """
        if all(level.all() for level in used):
            return 0
        n_reset = 0
        for level, codebook in enumerate(self.network.codebooks):
            codes = nearest_codes(residuals, codebook)
            dead = torch.bincount(codes, minlength=len(codebook)) == 0
            rows = torch.arange(len(residuals), device=residuals.device)[:_RESET_ROWS]
            if len(residuals) > _RESET_ROWS:
                drawn = torch.rand(
                    len(residuals), generator=self.generator, device=residuals.device
                )
                rows = drawn.topk(_RESET_ROWS).indices
            distances = ((residuals[rows] - codebook[codes[rows]]) ** 2).sum(dim=1)
            n_dead = min(int(dead.sum()), int((distances > 0).sum()))
            if n_dead > 0:
                chosen = rows[torch.multinomial(distances, n_dead, generator=self.generator)]
                restarted = dead.nonzero()[:n_dead, 0]
                codebook[restarted] = residuals[chosen]
                self._forget(level, restarted)
                codes = nearest_codes(residuals, codebook)
                n_reset += n_dead
            residuals = residuals - codebook[codes]
        return n_reset

    def _forget(self, level: int, codes: Tensor) -> None:
        """Drop what the optimizer and the moving averages remember of restarted codes."""
        self.moving[level].restart(codes)
        for value in self.optimizer.state.get(self.network.codebooks[level], {}).values():
            if value.dim() == 2:
                value[codes] = 0.0


@torch.inference_mode()
def _through(module: nn.Module, rows: FloatArray) -> FloatArray:
    """Rows (n, dim_in) through the encoder or decoder, (n, dim_out) float32, in blocks."""
    blocks = torch.from_numpy(np.ascontiguousarray(rows)).split(_NETWORK_ROWS)
    return torch.cat([module(block) for block in blocks]).numpy()


def _check_collaborative(
    collaborative: npt.NDArray[np.floating] | None, n_items: int, weight: float
) -> None:
    if collaborative is None:
        if weight > 0:
            raise ValueError(
                f"collaborative_weight={weight} needs collaborative vectors, a row per item; give "
                "them, or set the weight to 0"
            )
        return
    if weight == 0:
        raise ValueError(
            "collaborative vectors are given but collaborative_weight=0; set it, or leave them out"
        )
    check_input(collaborative)
    if len(collaborative) != n_items:
        raise ValueError(
            f"there are {len(collaborative)} collaborative vectors for {n_items} items; row i must "
            "be item i's (zeros for an item without training interactions)"
        )
    check_finite(collaborative.astype(np.float32))
    unknown = int((~collaborative.any(axis=1)).sum())
    if unknown == n_items:
        raise ValueError("all collaborative vectors are zero; compute them from interactions")
    if unknown:
        logger.info("%d of %d items have no collaborative vector", unknown, n_items)


def _warn_of_collapse(perplexity: list[float], codebook_sizes: tuple[int, ...]) -> None:
    low = [
        f"level {level + 1}: {value:.0f} of {size}"
        for level, (value, size) in enumerate(zip(perplexity, codebook_sizes, strict=True))
        if value < size / 4
    ]
    if low:
        logger.warning(
            "codebooks have collapsed (perplexity below a quarter of the codes; %s): use "
            "standardize='standard' and dead_code_reset=True, a smaller codebook_size, or residual "
            "k-means",
            "; ".join(low),
        )
