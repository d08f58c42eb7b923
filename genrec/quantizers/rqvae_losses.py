"""What RQ-VAEs differ in while they train: gradients, codebook updates, uniform mapping, LETTER.

Straight-through gradients and moving-average codebooks: van den Oord et al. 2017; the rotation
trick: Fifty et al. 2024; uniform semantic mapping: LC-Rec (Zheng et al. 2024, section 3.1);
collaborative and diversity regularisation: LETTER (Wang et al. 2024, equations 4 and 5).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from genrec.quantizers.kmeans import kmeans
from genrec.quantizers.quantizer import squared_distances

_EMA_SMOOTHING = 1e-5  # Laplace smoothing of the counts
_HELD_DISTANCES = 2**26  # of a block of rows to the codes: 256 MB of float32


def straight_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` (batch, dim) in value; the gradient passes to `latents` unchanged."""
    return latents + (quantized - latents).detach()


def rotate_through(latents: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` in value; the gradient is rotated and scaled as `latents` is onto `quantized`.

    The rotation trick (Fifty et al. 2024): with unit vectors e, q and r = (e + q) / |e + q| the map
    is ``|quantized| / |latents| * (I - 2 r r' + 2 q e')``, held constant. Rows for which there is
    no such rotation (a zero vector, or opposite directions) pass straight through.

    Args:
        latents: (batch, dim).
        quantized: (batch, dim).
    """
    with torch.no_grad():
        latent_norm = latents.norm(dim=1, keepdim=True)  # (batch, 1)
        quantized_norm = quantized.norm(dim=1, keepdim=True)
        e = F.normalize(latents, dim=1)
        q = F.normalize(quantized, dim=1)
        middle = e + q
        defined = (
            (latent_norm > 0) & (quantized_norm > 0) & (middle.norm(dim=1, keepdim=True) > 1e-3)
        )
        r = F.normalize(middle, dim=1)
        scale = quantized_norm / torch.where(defined, latent_norm, torch.ones_like(latent_norm))
    along_r = (latents * r).sum(dim=1, keepdim=True)
    along_e = (latents * e).sum(dim=1, keepdim=True)
    rotated = scale * (latents - 2 * along_r * r + 2 * along_e * q)
    return torch.where(defined, rotated, straight_through(latents, quantized))


def code_distances(residuals: Tensor, codebook: Tensor) -> Tensor:
    """Squared distances (batch, size) of residuals (batch, dim) to codes (size, dim)."""
    cross = residuals @ codebook.T
    return (residuals**2).sum(dim=1, keepdim=True) - 2 * cross + (codebook**2).sum(dim=1)


@torch.no_grad()
def nearest_codes(residuals: Tensor, codebook: Tensor) -> Tensor:
    """Nearest code of each residual (n, dim), (n,), in blocks of bounded memory."""
    block = max(1, _HELD_DISTANCES // len(codebook))
    return torch.cat(
        [code_distances(rows, codebook).argmin(dim=1) for rows in residuals.split(block)]
    )


@torch.no_grad()
def uniform_codes(distances: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes that spread a batch evenly over the codebook at little added distance.

    Optimal transport with equal shares for all codes, by Sinkhorn's iterations on the logarithms,
    then the best code of each row. As in LC-Rec, distances are divided by half their range first,
    so that `epsilon` is on the same scale for every level and catalogue.

    Args:
        distances: (batch, size).
        epsilon: entropy weight; larger means more even and less near.
        iterations: of normalising rows and columns in turn.

    Returns:
        (batch,).
    """
    half_range = ((distances.max() - distances.min()) / 2).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    scores = -distances / (half_range * epsilon)
    columns = torch.zeros_like(scores[0])  # (size,)
    for _ in range(iterations):
        rows = -torch.logsumexp(scores + columns, dim=1, keepdim=True)  # (batch, 1)
        columns = -torch.logsumexp(scores + rows, dim=0)  # (size,)
    return (scores + columns).argmax(dim=1)


class MovingCodebook:
    """A codebook that follows the moving average of its residuals (van den Oord et al. 2017, A.1).

    Attributes:
        codebook: the codes, updated in place, (size, dim).
        counts: moving average of each code's residuals in a batch, (size,).
        sums: moving average of their sum, (size, dim).
    """

    def __init__(self, codebook: Tensor, decay: float) -> None:
        self.codebook = codebook
        self.decay = decay
        self.counts = torch.ones_like(codebook[:, 0])
        self.sums = codebook.detach().clone()

    @torch.no_grad()
    def update(self, residuals: Tensor, codes: Tensor) -> None:
        """Move towards the mean of each code's residuals.

        Args:
            residuals: (batch, dim).
            codes: (batch,).
        """
        counts = torch.bincount(codes, minlength=len(self.counts)).to(self.counts)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, residuals)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + _EMA_SMOOTHING) * (
            total / (total + len(self.counts) * _EMA_SMOOTHING)
        )
        self.codebook.copy_(self.sums / smoothed[:, None])

    @torch.no_grad()
    def restart(self, codes: Tensor) -> None:
        """Forget the averages of codes (n,) whose rows of the codebook were written anew."""
        self.counts[codes] = 1.0
        self.sums[codes] = self.codebook[codes]


def collaborative_loss(quantized: Tensor, collaborative: Tensor, temperature: float) -> Tensor:
    """LETTER's collaborative regularisation: each item finds its own vector among the batch's.

    Cross-entropy of the similarities between quantized latents and collaborative vectors. LETTER
    takes inner products at temperature 1, which binds the loss to the scale of the collaborative
    vectors; here they are cosines.

    Args:
        quantized: quantized latents with a gradient to the encoder, (batch, dim).
        collaborative: the same items' vectors, (batch, dim), none of them zero.
        temperature: divides the cosines.
    """
    cosines = F.normalize(quantized, dim=1) @ F.normalize(collaborative, dim=1).T  # (batch, batch)
    return F.cross_entropy(
        cosines / temperature, torch.arange(len(quantized), device=cosines.device)
    )


def code_clusters(codebook: Tensor, n_clusters: int, seed: int) -> Tensor:
    """Clusters of codes, of (nearly) equal size: LETTER's constrained k-means.

    Args:
        codebook: (size, dim).
        n_clusters: at most half the codes, so that a code has partners.
        seed: of the k-means++ start.

    Returns:
        Cluster of each code, (size,), on the codebook's device.
    """
    rows = codebook.detach().cpu().numpy()
    centroids, prices = kmeans(rows, n_clusters, seed, max_fill=1.0)
    clusters = (squared_distances(rows, centroids) + prices).argmin(axis=1)
    return torch.from_numpy(clusters).to(codebook.device)


def diversity_loss(
    codes: Tensor, codebook: Tensor, clusters: Tensor, generator: torch.Generator
) -> Tensor:
    """LETTER's diversity regularisation of one level.

    An item's code is pulled to a random other code of the same cluster and pushed from all others:
    cross-entropy over the inner products of its code with the rest of the codebook.

    Args:
        codes: of the batch, (batch,).
        codebook: with a gradient, (size, dim).
        clusters: from `code_clusters`, (size,).
        generator: draws the partners, on the codebook's device.

    Returns:
        The mean over items whose code has a partner; 0 if none has.
    """
    logits = F.embedding(codes, codebook) @ codebook.T  # (batch, size)
    own = F.one_hot(codes, len(codebook)).bool()
    partners = (clusters[codes, None] == clusters) & ~own
    draws = torch.rand(partners.shape, generator=generator, device=codebook.device)
    positives = draws.masked_fill(~partners, -1.0).argmax(dim=1)
    paired = partners.any(dim=1)
    if not paired.any():
        return logits.sum() * 0.0
    return F.cross_entropy(logits.masked_fill(own, -torch.inf)[paired], positives[paired])
