"""Item vectors -> semantic ids, one distinct tuple of codes per item.

    genrec quantize --config recipes/configs/quickstart/quantize.yaml --run_dir runs/quickstart

Reads ``embeddings/``; writes ``semantic_ids/``: items.parquet, semantic_ids.json, index.json
(LC-Rec's form), quantizer.safetensors and quality.json.
"""

from dataclasses import asdict, dataclass

import numpy as np
import polars as pl

from genrec.artifacts import Stage, stage_folder, write_json
from genrec.columns import ITEM_ID
from genrec.config import parse, run


@dataclass
class QuantizeArgs:
    """Settings of the quantize stage (residual k-means)."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    n_levels: int = 3  # tokens per item
    codebook_size: int = 256  # codes per level; at most the number of distinct item vectors
    n_init: int = 1  # k-means restarts per level
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        for name, low in (("n_levels", 1), ("codebook_size", 2), ("n_init", 1)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < low:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be an integer of at least {low}"
                )


def main() -> None:
    """Run the stage."""
    args = parse(QuantizeArgs)
    stage = Stage(args.run_dir, "quantize", asdict(args), ["prepare", "embed"])
    if stage.is_done(args.overwrite):
        return
    from genrec.quantizers.collisions import resolve_collisions
    from genrec.quantizers.quality import level_usage
    from genrec.quantizers.residual_kmeans import ResidualKMeans
    from genrec.semantic_ids import SemanticIds

    catalog = pl.read_parquet(stage_folder(args.run_dir, "prepare") / "catalog.parquet")
    vectors = np.load(stage_folder(args.run_dir, "embed") / "item_embeddings.npy")
    quantizer = ResidualKMeans.fit(
        vectors, args.n_levels, args.codebook_size, args.seed, args.n_init
    )
    codes, report = resolve_collisions(
        quantizer.standardize(vectors), quantizer.encode(vectors), quantizer.codebooks
    )
    semantic_ids = SemanticIds(catalog[ITEM_ID], codes, (args.codebook_size,) * args.n_levels)
    semantic_ids.save(stage.folder)
    semantic_ids.export_index(stage.folder / "index.json")
    quantizer.save(stage.folder / "quantizer.safetensors")
    quality = {"levels": level_usage(codes, semantic_ids.codebook_sizes), **asdict(report)}
    write_json(stage.folder / "quality.json", quality)
    stage.finish(rows=semantic_ids.n_items, seed=args.seed, metrics=quality)
    perplexity = " / ".join(f"{level['perplexity']:.0f}" for level in quality["levels"])
    print(
        f"{semantic_ids.n_items:,} items, {args.n_levels} levels x {args.codebook_size} codes, "
        f"perplexity {perplexity}; {report.rate_before:.1%} of the items shared a SID, now none "
        f"({report.moved} moved, {report.spilled} above the last level), e.g. "
        f"{semantic_ids.sids()[0]}"
    )


if __name__ == "__main__":
    run(main)
