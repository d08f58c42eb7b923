"""Catalogue -> item vectors, one row per catalogue row.

    genrec embed --config recipes/configs/quickstart/embed.yaml --run_dir runs/quickstart

Reads ``data/catalog.parquet``; writes ``embeddings/item_embeddings.npy`` (n_items, dim) float32.
"""

from dataclasses import asdict, dataclass

import numpy as np
import polars as pl

from genrec.artifacts import Stage, stage_folder
from genrec.config import check_choice, dataset_path, parse, run

METHODS = ("lsa", "npy")


@dataclass
class EmbedArgs:
    """Settings of the embed stage."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    method: str = "lsa"  # lsa: TF-IDF + SVD over the catalogue's text; npy: vectors that you bring
    dim: int = 96  # lsa: components
    vectors: str | None = None  # npy: file of shape (n_items, dim), row i = catalogue row i
    data_dir: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_choice("method", self.method, METHODS)
        if self.method == "npy" and not self.vectors:
            raise ValueError(
                "method=npy needs `vectors`, a .npy file with a row per catalogue item"
            )
        if not isinstance(self.dim, int) or self.dim < 1:
            raise ValueError(f"dim={self.dim!r} must be a positive integer")


def main() -> None:
    """Run the stage."""
    args = parse(EmbedArgs)
    files = {}
    if args.method == "npy":
        files["vectors"] = dataset_path(args.vectors, args.data_dir)
    ignore = ["vectors", "data_dir"]
    stage = Stage(args.run_dir, "embed", asdict(args), ["prepare"], files, ignore)
    if stage.is_done(args.overwrite):
        return
    from genrec.embedding.lsa import item_texts, lsa_vectors
    from genrec.embedding.vectors import load_vectors

    catalog = pl.read_parquet(stage_folder(args.run_dir, "prepare") / "catalog.parquet")
    if args.method == "npy":
        vectors = load_vectors(files["vectors"], len(catalog))
    else:
        vectors = lsa_vectors(item_texts(catalog), args.dim, args.seed)
    np.save(stage.folder / "item_embeddings.npy", vectors)
    stage.finish(rows=len(vectors), seed=args.seed, metrics={"dim": vectors.shape[1]})
    print(f"{len(vectors):,} item vectors of {vectors.shape[1]} dimensions ({args.method})")


if __name__ == "__main__":
    run(main)
