"""Benchmark: which semantic ids does a small model recommend best with?

    python recipes/benchmarks/sid_downstream.py --run_dir runs/beauty --work_dir runs/sid-downstream
    python recipes/benchmarks/sid_downstream.py --quick        # two indexes, a synthetic shop

Every index gets the same budget: the "tiny" decoder from scratch, the same rows, epochs, learning
rate and seeds, losses over the trie; SID rows start from the same fused vectors whatever the index
was made of. Scored on
a fixed sample of validation users, seen items left out, against the whole catalogue. Intervals are
over users and seeds, differences are paired by user.

`--run_dir` is a prepared run with text vectors (prepare and embed done). `letter` is LETTER's
published index (`--letter_index`, an index.json; left out if not given). What is finished in
`--work_dir` is not run again, and a folder of other settings is refused. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
from stages import genrec, keep_settings

from genrec.artifacts import (
    require,
    sha256_file,
    stage_folder,
    write_json,
    write_parquet,
)
from genrec.columns import RANK
from genrec.evaluation.rank_tables import compare_ranks, target_ranks
from genrec.metrics import gains, hits

K = 10
FUSED = ["--collaborative", "cooccurrence"]
WHITE = ["--standardize", "whiten", "--pca_dim", "128", "--normalize_residuals", "true"]
PLAIN = ["--normalize_residuals", "false"]
# name -> (vectors it is made of, arguments of quantize)
INDEXES: dict[str, tuple[str, list[str]]] = {
    "random": ("fused", ["--method", "random"]),
    "letter": ("fused", ["--method", "import", "--index_offset", "1"]),
    "residual-kmeans text": ("text", PLAIN),
    "residual-kmeans": ("fused", PLAIN),
    "residual-kmeans normalised": ("fused", ["--normalize_residuals", "true"]),
    "residual-kmeans whitened": ("fused", WHITE),
    "residual-kmeans whitened 4 levels": ("fused", [*WHITE, "--n_levels", "4"]),
    "hierarchical-kmeans balanced": (
        "fused",
        ["--method", "hierarchical-kmeans", "--codebook_size", "64", "--max_fill", "1.5"],
    ),
    "rqvae": ("fused", ["--method", "rqvae"]),
    "residual-kmeans 1 level, item token": (
        "fused",
        ["--n_levels", "1", "--collisions", "item-token"],
    ),
    "independent (P5)": ("fused", ["--method", "independent"]),
    "collaborative (P5)": (
        "fused",
        ["--method", "collaborative", "--branching", "64", "--leaf_size", "256"],
    ),
}
QUICK = ("random", "residual-kmeans")


def prepared(args: argparse.Namespace, vectors: str, folder: Path) -> Path:
    """A run folder with the tables of `--run_dir` and text or fused vectors."""
    run = folder / vectors
    if not (run / "embeddings" / "manifest.json").exists():
        source = stage_folder(args.run_dir, "prepare")
        shutil.copytree(source, stage_folder(run, "prepare"), dirs_exist_ok=True)
        npy = stage_folder(args.run_dir, "embed") / "item_embeddings.npy"
        more = FUSED if vectors == "fused" else []
        genrec("embed", "--run_dir", str(run), "--method", "npy", "--vectors", str(npy), *more)
    return run


def make_index(args: argparse.Namespace, name: str, folder: Path) -> Path:
    """The index.json of an index, made once; returns its stage folder."""
    vectors, options = INDEXES[name]
    if name == "letter":
        options = [*options, "--index", str(args.letter_index)]
    run = folder / "indexes" / name.replace(" ", "-")
    made = stage_folder(run, "quantize")
    if not (made / "manifest.json").exists():
        source = prepared(args, vectors, folder)
        for stage in ("prepare", "embed"):
            shutil.copytree(
                stage_folder(source, stage), stage_folder(run, stage), dirs_exist_ok=True
            )
        genrec("quantize", "--run_dir", str(run), "--report_map", "pca", *options)
    return made


def train_and_score(args: argparse.Namespace, name: str, seed: int, folder: Path) -> pl.DataFrame:
    """Rank of each sampled validation row's target (0: not in the list), from one training run."""
    ranks = folder / "ranks" / f"{name.replace(' ', '-')}-{seed}.parquet"
    if ranks.exists():
        return pl.read_parquet(ranks)
    index = make_index(args, name, folder) / "index.json"
    source = prepared(args, "fused", folder)
    run = folder / "runs" / f"{name.replace(' ', '-')}-{seed}"
    for stage in ("prepare", "embed"):
        shutil.copytree(stage_folder(source, stage), stage_folder(run, stage), dirs_exist_ok=True)
    at = ["--run_dir", str(run)]
    genrec("quantize", *at, "--method", "import", "--index", str(index), "--report_map", "pca")
    genrec("build_dataset", *at, "--tasks", "sequential", "--sequential_mode", "whole_history",
        "--n_templates", "1")  # fmt: skip
    genrec("sft", *at, "--size", "tiny", "--dropout", "0.1", "--eval_rows", "0",
        "--num_train_epochs", str(args.epochs), "--per_device_train_batch_size", "24",
        "--train_sampling_strategy", "group_by_length", "--learning_rate", "1.5e-3",
        "--loss_over", "trie", "--hidden_dropout", "0.1",
        "--lr_scheduler_type", "cosine", "--warmup_steps", "300", "--weight_decay", "0.05",
        "--use_cpu", str(args.device == "cpu").lower(), "--bf16", "false", "--report_to",
        "none", "--save_strategy", "no", "--gradient_checkpointing", "false",
        "--seed", str(seed))  # fmt: skip
    genrec("recommend", *at, "--split", "valid", "--max_rows", str(args.rows), "--beam_width", "30")
    scored = target_ranks(run, "valid")
    write_parquet(ranks, scored)
    shutil.rmtree(run)
    return scored


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--run_dir", type=Path, help="run with prepare and embed (text) done")
    parser.add_argument("--work_dir", type=Path, default=Path("runs/sid-downstream"))
    parser.add_argument("--letter_index", type=Path)
    parser.add_argument("--indexes", nargs="*", choices=list(INDEXES), default=list(INDEXES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=6000, help="validation rows that are scored")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


def check_settings(args: argparse.Namespace) -> None:
    """Refuse a work folder whose finished parts were made with other settings than these."""
    source = require(args.run_dir, "prepare").content_hash, require(args.run_dir, "embed")
    letter = None if args.letter_index is None else sha256_file(args.letter_index)
    now = {
        "epochs": args.epochs, "rows": args.rows, "data": source[0],
        "vectors": source[1].content_hash, "letter_index": letter,
    }  # fmt: skip
    keep_settings(args.work_dir, now)


def main() -> None:
    """Run what is missing, then summarise."""
    args = arguments()
    if args.quick:
        args.work_dir = Path(tempfile.mkdtemp())
        args.run_dir, args.indexes = args.work_dir / "shop", list(QUICK)
        args.seeds, args.epochs, args.rows = 1, 1, 200
        shape = ["--n_users", "400", "--n_items", "300"]
        genrec("prepare", "--run_dir", str(args.run_dir), "--format", "synthetic", *shape)
        genrec("embed", "--run_dir", str(args.run_dir), "--dim", "64")
        for name, (vectors, options) in list(INDEXES.items()):
            INDEXES[name] = (vectors, [*options, "--codebook_size", "64"])
    elif args.run_dir is None:
        raise SystemExit("--run_dir is needed: a run with prepare and embed done (or --quick)")
    if args.letter_index is None:
        args.indexes = [name for name in args.indexes if name != "letter"]
    check_settings(args)
    found: dict[str, list[np.ndarray]] = {name: [] for name in args.indexes}
    for seed in range(args.seeds):  # every index once before any twice
        for name in args.indexes:
            ranks = train_and_score(args, name, seed, args.work_dir)[RANK].to_numpy()
            found[name].append(ranks)
            ndcg, hit = gains(ranks, K).mean(), hits(ranks, K).mean()
            print(f"{name}, seed {seed}: NDCG@{K} {ndcg:.4f}, HR@{K} {hit:.4f}", flush=True)
    quality = {}
    for name in args.indexes:
        manifest = json.loads((make_index(args, name, args.work_dir) / "manifest.json").read_text())
        kept = ("collisions", "vector_neighbours", "copurchase_neighbours")
        quality[name] = {key: manifest["metrics"][key] for key in kept}
    reference = "letter" if "letter" in found else args.indexes[0]
    table = compare_ranks(found, reference, K)
    report = {
        "rows": len(next(iter(found.values()))[0]),
        "epochs": args.epochs,
        "seeds": args.seeds,
        "indexes": {name: {**row, **quality[name]} for name, row in table.items()},
    }
    write_json(args.work_dir / "downstream.json", report)
    if args.quick:
        shutil.rmtree(args.work_dir)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
