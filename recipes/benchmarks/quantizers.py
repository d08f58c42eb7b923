"""Benchmark: every quantizer on one catalogue beside a published index, and their scale.

    python recipes/benchmarks/quantizers.py --run_dir runs/beauty --letter_index letter_sids.json
    python recipes/benchmarks/quantizers.py --scale 1000000 10000000
    python recipes/benchmarks/quantizers.py --stages 1000000
    python recipes/benchmarks/quantizers.py --quick          # a synthetic shop and 100,000 items

`--run_dir` is a run with prepare and embed done, embed with `collaborative`: quantizers get the
fused vectors (those marked "text" the text vectors, the letter preset the collaborative ones, too),
P5's indexes training rows or categories; neighbours by content are measured on the text
vectors, co-purchases on training rows, "held_out" on each user's last training item and validation
target. `--letter_index` is LETTER's published index.json of the same catalogue, measured by the
same code. "faiss RQ" is faiss's ResidualQuantizer, what one would otherwise take for residual
codes.

`--scale` draws clustered vectors of 256 dimensions (float16, on disk, memory-mapped) and times
fitting, encoding and resolving in a process of its own; its peak memory counts mapped pages.
`--stages` times prepare, embed (the same vectors, given) and quantize with its report, as commands
on so many items in as many histories of three. CPU only. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec.artifacts import stage_folder, write_json
from genrec.columns import HISTORY, ITEM_ID, TARGET
from genrec.data.splits import read_split
from genrec.embedding.collaborative import training_histories
from genrec.quantizers import item_indexes
from genrec.quantizers.category_names import rootless_paths
from genrec.quantizers.collisions import Method, resolve_collisions
from genrec.quantizers.hierarchical_kmeans import HierarchicalKMeans
from genrec.quantizers.index_files import read_index, resolve_shared
from genrec.quantizers.neighbours import (
    co_purchases,
    nearest_vectors,
    neighbour_preservation,
    pair_preservation,
)
from genrec.quantizers.presets import preset
from genrec.quantizers.product import ProductQuantizer
from genrec.quantizers.quality import attribute_agreement, collision_rate, level_usage
from genrec.quantizers.residual_kmeans import ResidualKMeans

WHITE: dict[str, Any] = {"standardize": "whiten", "normalize_residuals": True}
PLAIN: dict[str, Any] = {"normalize_residuals": False}
PAPERS = ("tiger", "lc-rec", "letter", "grid-rvq")  # presets named after them
DIM = 256  # of the vectors at scale


class Shop:
    """A run's vectors and what its indexes are measured by."""

    def __init__(self, run_dir: Path) -> None:
        data, embedded = stage_folder(run_dir, "prepare"), stage_folder(run_dir, "embed")
        self.catalog = pl.read_parquet(data / "catalog.parquet", glob=False)
        self.fused = np.load(embedded / "item_embeddings.npy")
        if not (embedded / "text_embeddings.npy").exists():
            raise SystemExit(f"{run_dir}: embed was run without `collaborative`; run it with")
        self.text = np.load(embedded / "text_embeddings.npy")
        self.behaviour = np.load(embedded / "collaborative_embeddings.npy")
        self.sequences = training_histories(read_split(run_dir, "train", "benchmark"))
        valid = read_split(run_dir, "valid", "benchmark").filter(pl.col(HISTORY).list.len() > 0)
        self.near = nearest_vectors(self.text, 10)
        self.bought = co_purchases(self.sequences, len(self.catalog), 10)
        self.pairs = (valid[HISTORY].list.last().to_numpy(), valid[TARGET].to_numpy())

    def measure(self, codes: np.ndarray, sizes: tuple[int, ...]) -> dict[str, Any]:
        """Quality of codes that no two items share."""
        near = neighbour_preservation(codes, self.near)
        agreement = attribute_agreement(codes, self.catalog)
        told = agreement.get("categories") or agreement.get("brand")
        ami = told["prefixes"][0]["adjusted_mutual_information"] if told else None
        found = {
            "collisions_after": collision_rate(codes),
            "perplexity": [round(u["perplexity"], 1) for u in level_usage(codes, sizes)],
            "copurchase_neighbours": neighbour_preservation(codes, self.bought)["same_code"][0],
            "held_out_pairs": pair_preservation(codes, *self.pairs)["same_code"][0],
            "vector_neighbours": near["same_code"][0],
            "chance": near["chance"][0],
            "ami": ami,
        }
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}


Fit = Callable[[np.ndarray], Any]
ONE_LEVEL = "residual-kmeans 1 level, item token"


def fits(shop: Shop, size: int, pca_dim: int, epochs: int) -> dict[str, tuple[bool, Fit]]:
    """Name -> (whether it gets the fused vectors, how it is fitted)."""
    white, levels = {**WHITE, "pca_dim": pca_dim}, (size,) * 3

    def rqvae(name: str) -> Fit:
        def fit(vectors: np.ndarray) -> Any:
            from genrec.quantizers.rqvae import RQVAE

            settings = preset(name, codebook_size=size, epochs=epochs)
            behaviour = shop.behaviour if settings.collaborative_weight else None
            return RQVAE.fit(vectors, settings, collaborative=behaviour, progress=False)

        return fit

    return {
        "residual-kmeans text": (False, lambda v: ResidualKMeans.fit(v, levels, **PLAIN)),
        "residual-kmeans": (True, lambda v: ResidualKMeans.fit(v, levels, **PLAIN)),
        "residual-kmeans balanced": (
            True,
            lambda v: ResidualKMeans.fit(v, levels, max_fill=1.5, **PLAIN),
        ),
        "residual-kmeans normalised": (True, lambda v: ResidualKMeans.fit(v, levels)),
        "residual-kmeans whitened": (True, lambda v: ResidualKMeans.fit(v, levels, **white)),
        "residual-kmeans whitened 4 levels": (
            True,
            lambda v: ResidualKMeans.fit(v, (size,) * 4, **white),
        ),
        ONE_LEVEL: (True, lambda v: ResidualKMeans.fit(v, (size,))),
        "hierarchical-kmeans": (
            True,
            lambda v: HierarchicalKMeans.fit(v, (size // 4,) * 3, progress=False),
        ),
        "hierarchical-kmeans balanced": (
            True,
            lambda v: HierarchicalKMeans.fit(v, (size // 4,) * 3, max_fill=1.5, progress=False),
        ),
        "pq": (True, lambda v: ProductQuantizer.fit(v, (size,) * 4, rotate=False)),
        "opq": (True, lambda v: ProductQuantizer.fit(v, (size,) * 4)),
        "rqvae": (True, rqvae("default")),
        **{f"rqvae {name}": (True, rqvae(name)) for name in PAPERS},
    }


def indexes(shop: Shop, size: int) -> dict[str, Callable[[], item_indexes.ItemCodes]]:
    """Name -> P5's and OpenP5's indexes, which need no vectors."""
    n_items, sequences = len(shop.catalog), shop.sequences

    def collaborative() -> item_indexes.ItemCodes:
        return item_indexes.collaborative_index(sequences, n_items, size // 4, size)

    return {
        "random (P5)": lambda: item_indexes.random_index(n_items, 3, size, seed=0),
        "sequential (P5)": lambda: item_indexes.sequential_index(
            sequences, n_items, codebook_size=size, n_levels=3
        ),
        "independent (P5)": lambda: item_indexes.independent_index(n_items),
        "semantic (P5)": lambda: item_indexes.semantic_index(
            rootless_paths(shop.catalog)[0], n_items
        ),
        "collaborative (P5)": collaborative,
        "hybrid (P5)": lambda: item_indexes.hybrid_index(collaborative()),
    }


def faiss_codes(vectors: np.ndarray, size: int) -> np.ndarray:
    """Codes of faiss's own residual quantizer."""
    import faiss

    bits = int(np.log2(size))
    quantizer = faiss.ResidualQuantizer(vectors.shape[1], 3, bits)
    quantizer.train(vectors)
    packed = quantizer.compute_codes(vectors)
    return unpack(packed, 3, bits)


def unpack(packed: np.ndarray, levels: int, bits: int) -> np.ndarray:
    """Little-endian bit strings -> one integer per level."""
    flat = np.unpackbits(packed, axis=1, bitorder="little")[:, : levels * bits]
    weights = 1 << np.arange(bits)
    return (flat.reshape(len(packed), levels, bits) * weights).sum(axis=2).astype(np.int32)


def on_catalogue(args: argparse.Namespace, size: int, pca_dim: int) -> dict[str, Any]:
    """Every quantizer and the published index on one catalogue."""
    shop = Shop(args.run_dir)
    found: dict[str, Any] = {}

    def wanted(name: str) -> bool:
        return not args.only or name in args.only

    def add(name: str, seconds: float, rate: float, codes: np.ndarray, sizes: Any) -> None:
        before = {"fit_s": round(seconds, 1), "collisions_before": round(rate, 4)}
        found[name] = before | shop.measure(codes, sizes)
        print(name, found[name], flush=True)

    for name, (fused, fit) in fits(shop, size, pca_dim, args.epochs).items():
        if not wanted(name):
            continue
        vectors = shop.fused if fused else shop.text
        started = time.perf_counter()
        quantizer = fit(vectors)
        seconds = time.perf_counter() - started
        codes = quantizer.encode(vectors)
        way: Method = "item-token" if name == ONE_LEVEL else "minimal"
        new, sizes, _ = resolve_collisions(quantizer, vectors, codes, way)
        add(name, seconds, collision_rate(codes), new, sizes)
    for name, make in indexes(shop, size).items():
        if wanted(name):
            started = time.perf_counter()
            made = make()
            seconds = time.perf_counter() - started
            add(name, seconds, collision_rate(made.codes), made.codes, made.codebook_sizes)
    if wanted("faiss RQ"):
        started = time.perf_counter()
        codes, sizes = faiss_codes(shop.fused, size), (size,) * 3
        seconds = time.perf_counter() - started
        distinct = resolve_shared(codes, sizes, shop.fused)
        add("faiss RQ", seconds, collision_rate(codes), distinct, sizes)
    report: dict[str, Any] = {"items": len(shop.catalog), "quantizers": found, "letter": None}
    if args.letter_index:
        index = read_index(args.letter_index, shop.catalog[ITEM_ID], args.index_offset)
        sizes = index.codebook_sizes
        distinct = resolve_shared(index.codes, sizes, shop.text)
        rate = {"collisions_before": round(collision_rate(index.codes), 4)}
        report["letter"] = rate | shop.measure(distinct, sizes)
        print("letter", report["letter"], flush=True)
    return report


def at_scale(n_items: int) -> dict[str, Any]:
    """Time and memory of fitting, encoding and resolving so many items; runs in its own process."""
    levels: tuple[int, ...] = (256,) * 3 if n_items <= 300_000 else (1024,) * 3
    if n_items > 5_000_000:
        levels = (256,) * 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        write_vectors(path, n_items)
        vectors = np.load(path, mmap_mode="r")
        seconds = {}
        started = time.perf_counter()
        quantizer = ResidualKMeans.fit(vectors, levels, pca_dim=128, **WHITE)
        seconds["fit_s"] = time.perf_counter() - started
        started = time.perf_counter()
        codes = quantizer.encode(vectors)
        seconds["encode_s"] = time.perf_counter() - started
        started = time.perf_counter()
        new, _, report = resolve_collisions(quantizer, vectors, codes)
        seconds["resolve_s"] = time.perf_counter() - started
        started = time.perf_counter()
        after = collision_rate(new)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {
        "items": n_items,
        "dims": DIM,
        "codebooks": list(levels),
        **{name: round(value, 1) for name, value in seconds.items()},
        "collisions_before": round(report.rate_before, 4),
        "collisions_after": after,
        "moved": report.moved,
        "peak_gb": round(peak, 2),
    }


def write_vectors(path: Path, n_items: int) -> None:
    """Clustered vectors: many small groups around centres that are themselves in groups."""
    rng = np.random.default_rng(0)
    out = np.lib.format.open_memmap(path, "w+", dtype=np.float16, shape=(n_items, DIM))
    broad = rng.normal(size=(500, DIM)).astype(np.float32)
    narrow = broad[rng.integers(0, 500, 50_000)] + 0.7 * rng.normal(size=(50_000, DIM))
    for start in range(0, n_items, 100_000):
        rows = min(100_000, n_items - start)
        centre = narrow[(50_000 * rng.random(rows) ** 2).astype(np.int64)]
        noise = rng.standard_normal((rows, DIM), dtype=np.float32)
        out[start : start + rows] = (centre + 0.5 * noise).astype(np.float16)
    out.flush()


def resident_peak(pid: int) -> int:
    """Most memory that a process has had so far, in kB; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(found[0]) if found else 0


def through_stages(n_items: int) -> dict[str, Any]:
    """Time and peak memory of each stage, up to a finished map and its report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        ids = np.arange(n_items)
        kinds = pl.Series("category", (n_items * rng.random(n_items) ** 2).astype(np.int64) % 500)
        pl.DataFrame({"item_id": ids, "category": kinds}).with_columns(
            pl.format("Product {}", "item_id").alias("title"),
            pl.format("Kind {}", "category").alias("category"),
        ).write_parquet(folder / "items.parquet")
        # Each item is bought, and popular ones again and again.
        bought = np.concatenate([ids, (n_items * rng.random(2 * n_items) ** 2).astype(np.int64)])
        rng.shuffle(bought)
        at = np.arange(3 * n_items)
        pl.DataFrame({"user_id": at // 3, "item_id": bought, "timestamp": at}).write_parquet(
            folder / "log.parquet"
        )
        write_vectors(folder / "vectors.npy", n_items)
        np.save(folder / "ids.npy", ids)
        levels = (256,) * (4 if n_items > 5_000_000 else 3)
        given = {
            "prepare": {
                "format": "table", "interactions": folder / "log.parquet",
                "items": folder / "items.parquet", "title_column": "title",
                "category_column": "category",
            },
            "embed": {
                "method": "npy", "vectors": folder / "vectors.npy",
                "vector_ids": folder / "ids.npy",
            },
            "quantize": {"n_levels": len(levels), "pca_dim": 128, "standardize": "whiten"},
        }  # fmt: skip
        found: dict[str, Any] = {"items": n_items, "dims": DIM, "codebooks": list(levels)}
        for stage, settings in given.items():
            flags = [str(x) for name, value in settings.items() for x in (f"--{name}", value)]
            command = [sys.executable, "-c", "from genrec.cli import main; main()", stage]
            started = time.perf_counter()
            log = folder / f"{stage}.log"
            with log.open("w") as out:
                child = subprocess.Popen(
                    [*command, "--run_dir", str(folder / "run"), *flags], stdout=out, stderr=out
                )
                peak = 0
                while child.poll() is None:
                    # Not rusage, which begins with what this process had when it forked.
                    peak = max(peak, resident_peak(child.pid))
                    time.sleep(0.2)
            if child.returncode:
                raise SystemExit(f"{stage} of {n_items:,} items: {log.read_text()[-3000:]}")
            seconds = round(time.perf_counter() - started, 1)
            found[stage] = {"seconds": seconds, "peak_gb": round(peak / 1e6, 2)}
            print(stage, found[stage], file=sys.stderr, flush=True)
    return found


def in_own_process(n_items: int) -> dict[str, Any]:
    """`at_scale`, with a peak that no earlier work has raised."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", str(n_items)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{n_items:,} items: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def quick_shop(folder: Path) -> Path:
    """A synthetic shop with fused vectors."""
    shape = ["--n_users", "2000", "--n_items", "1500"]
    for stage, more in (
        ("prepare", ["--format", "synthetic", *shape]),
        ("embed", ["--dim", "64", "--collaborative", "cooccurrence", "--collaborative_dim", "64"]),
    ):
        command = [sys.executable, "-c", "from genrec.cli import main; main()", stage]
        subprocess.run([*command, "--run_dir", str(folder), *more], check=True, capture_output=True)
    return folder


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run_dir", type=Path)
    parser.add_argument("--letter_index", type=Path)
    parser.add_argument("--index_offset", type=int, default=1, help="item id = key + offset")
    parser.add_argument("--epochs", type=int, default=50, help="of the RQ-VAEs")
    parser.add_argument("--only", nargs="*", help="names of quantizers")
    parser.add_argument("--scale", type=int, nargs="*", default=[], help="numbers of items")
    parser.add_argument("--stages", type=int, nargs="*", default=[], help="numbers of items")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(at_scale(args.one)))
        return
    report: dict[str, Any] = {}
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            args.run_dir, args.epochs = quick_shop(Path(folder) / "shop"), 5
            report = on_catalogue(args, 64, 64)
        args.scale, args.stages = [100_000], [20_000]
    elif args.run_dir:
        report = on_catalogue(args, 256, 128)
    report["scale"] = [in_own_process(n_items) for n_items in args.scale]
    report["stages"] = [through_stages(n_items) for n_items in args.stages]
    if args.output:
        write_json(args.output, report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
