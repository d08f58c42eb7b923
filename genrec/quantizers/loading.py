"""Reading a quantizer's file without knowing its kind."""

from __future__ import annotations

from pathlib import Path

from genrec.quantizers.hierarchical_kmeans import HierarchicalKMeans
from genrec.quantizers.product import ProductQuantizer
from genrec.quantizers.quantizer import Quantizer, read_about
from genrec.quantizers.residual_kmeans import ResidualKMeans


def load_quantizer(path: Path | str) -> Quantizer:
    """Read what any quantizer's `save` wrote.

    Raises:
        ValueError: the file is no quantizer's.
    """
    kind = read_about(path).get("kind")
    if kind == "rqvae":
        from genrec.quantizers.rqvae import RQVAE  # the only one that needs torch

        return RQVAE.load(path)
    for quantizer in (ResidualKMeans, HierarchicalKMeans, ProductQuantizer):
        if quantizer.kind == kind:
            return quantizer.load(path)
    raise ValueError(f"{path} holds no quantizer that is known (kind {kind!r})")
