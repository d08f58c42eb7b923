"""Item vectors -> semantic ids, one distinct tuple of codes per item.

    genrec quantize --config recipes/configs/quickstart/quantize.yaml --run_dir runs/quickstart
    genrec quantize --run_dir runs/next --extend runs/mine      # a later catalogue: old SIDs stay

With `extend` the map is that run's, grown: items keep their SIDs, those that left keep theirs
reserved and get them back if they return, new ones get SIDs that nobody had. Its model then serves
the later catalogue (see embed.py, which comes first, for the whole way).

Reads ``embeddings/`` and the training rows (for the quality report and the indexes that learn from
them); writes ``semantic_ids/``: items.parquet, semantic_ids.json, index.json (LC-Rec's form),
quantizer.safetensors, quality.json and report.html; for an RQ-VAE also history.json, a row per
epoch of its training. Items with equal vectors, or none, are reported first.

With ``method: title`` there are no codes: each item is named by its title, made unique, and the
model writes the title's own tokens and an end mark (ReRe, BIGRec). Nothing is added to a model's
vocabulary. The folder then holds items.parquet, semantic_ids.json and quality.json alone.

Longer than other recipes, since each kind of map is made here from its own inputs.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import yaml

from genrec.artifacts import Stage, load_manifest, sha256_file, stage_folder, write_json
from genrec.columns import HISTORY, ITEM_ID, TARGET
from genrec.config import check_choice, dataset_path, parse, run
from genrec.data.splits import read_split
from genrec.decoding.trie import FOLDER, SidTrie
from genrec.embedding.vectors import TEXT_VECTORS, VECTORS
from genrec.item_lists import ItemLists
from genrec.map_extension import IMPORTED, QUANTIZER_FILE, extended_map
from genrec.quantizers.category_names import CategoryNames, rootless_paths
from genrec.semantic_ids import TITLES, SemanticIds, map_kind
from genrec.title_ids import LEAST_BYTES, TitleIds

logger = logging.getLogger("genrec.quantize")

KMEANS = ("residual-kmeans", "hierarchical-kmeans", "product")
QUANTIZERS = (*KMEANS, "rqvae")
INDEXES = ("random", "sequential", "collaborative", "independent", "semantic", "hybrid")
COLLISIONS = ("minimal", "sinkhorn", "suffix", "item-token")
METHODS = (*QUANTIZERS, *INDEXES, "import", "title")
LISTED = 100  # groups of items that quality.json names
EVENER = {  # what evens the use of the codes
    **dict.fromkeys(KMEANS, "cap how full a code gets (max_fill: 1.5)"),
    "rqvae": "use standardize=standard, dead_code_reset=true and gradient=ema (rqvae_options)",
}
# Settings that only some methods read; of all others a value would be overlooked.
READ_BY = {
    "codebook_sizes": QUANTIZERS, "collisions": QUANTIZERS,
    "standardize": KMEANS, "pca_dim": KMEANS, "n_init": KMEANS, "max_fill": KMEANS,
    "normalize_residuals": ("residual-kmeans",), "rotate": ("product",),
    "preset": ("rqvae",), "epochs": ("rqvae",), "rqvae_options": ("rqvae",), "device": ("rqvae",),
    "branching": ("collaborative", "hybrid"), "leaf_size": ("collaborative", "hybrid"),
    "index": ("import",), "index_offset": ("import",),
    "import_collisions": ("import",), "import_missing": ("import",),
}  # fmt: skip


@dataclass
class QuantizeArgs:
    """Settings of the quantize stage."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    # residual-kmeans, hierarchical-kmeans, product, rqvae: from item vectors. random, sequential,
    # collaborative, independent, semantic, hybrid: P5's indexes. import: an index.json. title:
    # the items' own titles, unique; of the settings below only max_title_bytes matters then
    method: str = "residual-kmeans"
    n_levels: int = 3  # tokens per item
    codebook_size: int = 256  # codes per level; at most the number of distinct item vectors
    codebook_sizes: list[int] | None = None  # one per level, instead of the two above
    # What happens to vectors first: scale (one number), standard (each dimension), whiten, none
    standardize: str = "scale"
    pca_dim: int | None = None  # principal axes that are kept; null: all
    # How items get distinct SIDs: minimal, sinkhorn, suffix (a level that numbers the items of a
    # SID), item-token (a level on which every item has a token of its own)
    collisions: str = "minimal"
    # Room for later items where each needs a number of its own (item-token and all indexes but
    # random), as a share of the items; beyond it a later catalogue needs a new map and model
    spare: float = 0.1
    # k-means methods
    n_init: int = 1  # restarts per level
    max_fill: float | None = None  # balanced: cap on a code's items, in even shares; null: none
    # residual-kmeans: lower levels see unit vectors, as in GRID: they use their codes more evenly,
    # and far fewer items collide
    normalize_residuals: bool = True
    rotate: bool = True  # product: OPQ; false: plain PQ
    # rqvae
    preset: str = "default"  # default, tiger, lc-rec, letter, grid-rvq or mender
    epochs: int | None = None  # null: the preset's; published ones are thousands
    # Further fields of RQVAESettings as name=value: gradient=ema, dead_code_reset=true, patience=5
    rqvae_options: list[str] = field(default_factory=list)
    device: str | None = None  # that it trains on; null: a GPU where there is one
    # collaborative, hybrid: children of a cluster, and items of a cluster that is cut no further
    branching: int = 20
    leaf_size: int = 256
    # import
    index: str | None = None  # index.json
    index_offset: int | None = None  # item id = key + offset; 1 if the file counts from 0
    import_collisions: str = "resolve"  # items that share a SID: resolve, or refuse such a file
    import_missing: str = "refuse"  # items that it lacks: refuse, or place them by their vectors
    data_dir: str | None = None
    max_title_bytes: int = 120  # title: longer ones are cut; a byte is a token at most
    # A later catalogue: the run whose SIDs stay; new items are placed by its quantizer
    extend: str | None = None
    report_map: str = "tsne"  # the report's map of items: tsne, or pca (faster)
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_choice("method", self.method, METHODS)
        check_choice("collisions", self.collisions, COLLISIONS)
        check_choice("standardize", self.standardize, ("scale", "standard", "whiten", "none"))
        check_choice("import_collisions", self.import_collisions, ("resolve", "refuse"))
        check_choice("import_missing", self.import_missing, ("refuse", "place"))
        check_choice("report_map", self.report_map, ("tsne", "pca"))
        for name, low in (("n_levels", 1), ("codebook_size", 2), ("n_init", 1), ("branching", 2),
            ("leaf_size", 2), ("pca_dim", 1), ("epochs", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is None and name in ("pca_dim", "epochs"):
                continue
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name}={value!r} must be an integer of at least {low}")
        if self.extend and Path(self.extend).resolve() == Path(self.run_dir).resolve():
            raise ValueError(f"extend={self.extend} is this run itself; name an earlier one")
        if self.method == "import" and not self.index:
            raise ValueError("method=import needs `index`, the path of an index.json")
        if self.max_title_bytes < LEAST_BYTES:
            raise ValueError(
                f"max_title_bytes={self.max_title_bytes} must be at least {LEAST_BYTES}"
            )
        if self.method == "rqvae":
            rqvae_settings(self)
        if not self.extend:
            self._check_read()
        if self.extend or self.method != "residual-kmeans" or len(self.sizes) == 1:
            self.normalize_residuals = False  # not read, so it makes no other stage

    def _check_read(self) -> None:
        """Refuse settings that the method would overlook."""
        defaults = {f.name: f.default for f in fields(self)}
        for name, methods in READ_BY.items():
            value = getattr(self, name)
            if value not in (None, [], defaults[name]) and self.method not in methods:
                raise ValueError(
                    f"{name} is no setting of method={self.method}, but of {', '.join(methods)}; "
                    "leave it out"
                )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes per level."""
        return tuple(self.codebook_sizes or (self.codebook_size,) * self.n_levels)


def rqvae_settings(args: QuantizeArgs) -> Any:
    """The preset with what the settings say otherwise.

    A published preset keeps its levels and codes unless `codebook_sizes` gives others.

    Raises:
        ValueError: an option is no field of `RQVAESettings`, or out of range.
    """
    from genrec.quantizers.presets import preset

    changes: dict[str, Any] = {} if args.epochs is None else {"epochs": args.epochs}
    for option in args.rqvae_options:
        name, given, value = option.partition("=")
        if not given:
            raise ValueError(f"rqvae_options: {option!r} must read name=value, as patience=5")
        changes[name] = yaml.safe_load(value)
    if args.preset == "default" or args.codebook_sizes:
        changes |= {"n_levels": len(args.sizes), "codebook_size": args.sizes}
    return preset(args.preset, **changes)


def fit_quantizer(args: QuantizeArgs, vectors: np.ndarray, folder: Path) -> Any:
    """Fit the quantizer that the settings name."""
    if args.method == "rqvae":
        from genrec.quantizers.presets import PRESET_NOTES
        from genrec.quantizers.rqvae import RQVAE

        if note := PRESET_NOTES.get(args.preset):
            logger.warning("preset %s: %s", args.preset, note)
        settings, behaviour = rqvae_settings(args), None
        if settings.collaborative_weight > 0:
            path = folder / "collaborative_embeddings.npy"
            if not path.exists():
                raise ValueError(
                    f"preset={args.preset} needs collaborative vectors; rerun embed with "
                    "`collaborative: sasrec` (or cooccurrence)"
                )
            behaviour = np.load(path)
        return RQVAE.fit(vectors, settings, args.seed, args.device, behaviour)
    options: dict[str, Any] = {
        "seed": args.seed,
        "n_init": args.n_init,
        "max_fill": args.max_fill,
        "standardize": args.standardize,
        "pca_dim": args.pca_dim,
    }
    if args.method == "residual-kmeans":
        from genrec.quantizers.residual_kmeans import ResidualKMeans

        options["normalize_residuals"] = args.normalize_residuals
        return ResidualKMeans.fit(vectors, args.sizes, **options)
    if args.method == "hierarchical-kmeans":
        from genrec.quantizers.hierarchical_kmeans import HierarchicalKMeans

        return HierarchicalKMeans.fit(vectors, args.sizes, **options)
    from genrec.quantizers.product import ProductQuantizer

    return ProductQuantizer.fit(vectors, args.sizes, **options, rotate=args.rotate)


def index_codes(
    args: QuantizeArgs, catalog: pl.DataFrame, sequences: ItemLists
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Codes of one of P5's indexes."""
    from genrec.quantizers import item_indexes

    n_items, seed = len(catalog), args.seed
    if args.method == "random":
        found = item_indexes.random_index(n_items, args.n_levels, args.codebook_size, seed)
    elif args.method == "sequential":
        found = item_indexes.sequential_index(
            sequences,
            n_items,
            codebook_size=args.codebook_size,
            n_levels=args.n_levels,
            seed=seed,
            spare=args.spare,
        )
    elif args.method == "independent":
        found = item_indexes.independent_index(n_items, args.spare)
    elif args.method == "semantic":
        paths, _ = rootless_paths(catalog)
        found = item_indexes.semantic_index(paths, n_items, args.spare, seed=seed)
    else:
        found = item_indexes.collaborative_index(
            sequences, n_items, args.branching, args.leaf_size, seed=seed, spare=args.spare
        )
        if args.method == "hybrid":
            found = item_indexes.hybrid_index(found, args.spare)
    return found.codes, found.codebook_sizes


def imported_codes(
    args: QuantizeArgs, path: Path, catalog: pl.DataFrame, vectors: np.ndarray
) -> tuple[np.ndarray, tuple[int, ...], dict[str, Any]]:
    """Codes of an index.json; items that share one, or have none, get one that fits and is free."""
    from genrec.quantizers.code_vectors import quantizer_of_codes
    from genrec.quantizers.collisions import place_items
    from genrec.quantizers.index_files import read_index, rows_to_move

    found = read_index(path, catalog[ITEM_ID], args.index_offset)
    if found.missing and args.import_missing == "refuse":
        raise ValueError(
            f"{path} lacks {len(found.missing)} items of the catalogue, such as {found.missing[:3]}"
            "; with `import_missing: place` they get codes of the items that they are like"
        )
    if found.shared_items and args.import_collisions == "refuse":
        raise ValueError(
            f"{sum(map(len, found.shared_items))} items share a SID in {path}, such as "
            f"{found.shared_items[0]}; `import_collisions: resolve` moves all but one of each group"
        )
    codes, sizes = found.codes.copy(), found.codebook_sizes
    there = codes[:, 0] >= 0
    like = quantizer_of_codes(vectors[there], codes[there], sizes)
    moving = rows_to_move(codes, vectors) & there
    kept = there & ~moving
    rows = np.flatnonzero(~kept)
    if found.missing:
        codes[~there] = like.encode(vectors[~there])
    codes[rows] = place_items(
        like, vectors[rows], codes[kept], sizes, seed=args.seed, wanted=codes[rows]
    )
    report = {
        "method": "import",
        "rate_before": sum(map(len, found.shared_items)) / len(codes),
        "groups": len(found.shared_items),
        "shared_items": [list(group) for group in found.shared_items[:LISTED]],
        "moved": int(moving.sum()),
        "placed": len(found.missing),
        "unused_keys": len(found.extra),
    }
    return codes, sizes, report


def category_names(
    args: QuantizeArgs, catalog: pl.DataFrame, semantic_ids: SemanticIds
) -> CategoryNames:
    """Names behind the codes of a semantic index: those of the extended map, or its own."""
    if args.extend:
        return CategoryNames.load(stage_folder(args.extend, "quantize"))
    paths, root_steps = rootless_paths(catalog)
    return CategoryNames.of(paths, semantic_ids.codes, root_steps)


def make_map(
    args: QuantizeArgs,
    catalog: pl.DataFrame,
    vectors: np.ndarray,
    sequences: ItemLists,
    index: Path,
) -> tuple[SemanticIds, Any, dict[str, Any]]:
    """The map that the settings ask for.

    Returns:
        The map, the quantizer (None for an index without one), and what was done with collisions.
    """
    from genrec.quantizers.collisions import resolve_collisions
    from genrec.quantizers.quantizer import check_capacity, check_crowding

    quantizer = None
    if args.method in QUANTIZERS:
        sizes = rqvae_settings(args).codebook_sizes if args.method == "rqvae" else args.sizes
        appended = args.collisions in ("suffix", "item-token")
        # Before the fit, which may take hours.
        tight = None if appended else check_capacity(len(catalog), sizes)
        if tight:
            logger.warning(tight)
        quantizer = fit_quantizer(args, vectors, stage_folder(args.run_dir, "embed"))
        codes = quantizer.encode(vectors)
        if not appended and not tight and (advice := check_crowding(codes, sizes)):
            logger.warning("%s; or %s", advice, EVENER[args.method])
        codes, sizes, found = resolve_collisions(
            quantizer, vectors, codes, cast(Any, args.collisions), args.seed, args.spare
        )
        report = asdict(found)
    elif args.method == "import":
        codes, sizes, report = imported_codes(args, index, catalog, vectors)
    else:
        (codes, sizes), report = index_codes(args, catalog, sequences), {"method": "none"}
    return SemanticIds(catalog[ITEM_ID], codes, sizes), quantizer, report


def find_duplicates(run_dir: str, catalog: pl.DataFrame, vectors: np.ndarray) -> dict[str, Any]:
    """Items with equal vectors or none: of what is quantized, and of the text kept apart."""
    from genrec.quantizers.duplicates import duplicate_report

    found = {"vectors": duplicate_report(vectors, catalog)}
    text = stage_folder(run_dir, "embed") / TEXT_VECTORS
    if text.exists():
        found["text"] = duplicate_report(np.load(text, mmap_mode="r"), catalog)
    for part, one in found.items():
        if one["items"] or one["without_vector"]:
            of_title = "" if one["same_title"] is None else f", {one['same_title']:,} of one title"
            print(
                f"{part}: {one['items']:,} items equal another ({one['groups']:,} groups"
                f"{of_title}), {one['without_vector']:,} have none"
            )
    return found


def measure_quality(
    args: QuantizeArgs,
    semantic_ids: SemanticIds,
    quantizer: Any,
    catalog: pl.DataFrame,
    vectors: np.ndarray,
    sequences: ItemLists,
    **found: Any,
) -> dict[str, Any]:
    """The quality report; neighbours by content are those of the text, where it is kept apart."""
    from genrec.quantizers.quality import quality_report, reconstruction_error

    text = stage_folder(args.run_dir, "embed") / TEXT_VECTORS
    valid = read_split(args.run_dir, "valid", "quantize").filter(pl.col(HISTORY).list.len() > 0)
    held_out = (valid[HISTORY].list.last().to_numpy(), valid[TARGET].to_numpy())
    quality = quality_report(
        semantic_ids.codes,
        semantic_ids.codebook_sizes,
        np.load(text, mmap_mode="r") if text.exists() else vectors,
        catalog,
        sequences,
        held_out=held_out if len(valid) else None,
        seed=args.seed,
        map_method=cast(Any, args.report_map),
        **found,
    )
    if quantizer is not None:
        error = reconstruction_error(semantic_ids.codes, vectors, quantizer)
        quality["reconstruction"] = error
    return quality


def warn_of_uneven_levels(args: QuantizeArgs, quality: dict[str, Any], n_levels: int) -> None:
    """Say which of the quantizer's levels use their codes unevenly, and what to change."""
    from genrec.quantizers.quality_page import uneven_levels

    levels = quality["levels"]
    found = [
        f"level {at + 1} has the perplexity of {levels[at]['perplexity']:.0f} of its "
        f"{levels[at]['size']} codes"
        for at in uneven_levels(quality)
        if at < n_levels
    ]
    if found:
        evener = "lower max_fill" if args.max_fill else EVENER[args.method]
        advice = f"{evener}, or use a smaller codebook_size"
        if args.method == "residual-kmeans" and n_levels > 1 and not args.normalize_residuals:
            advice += ", or normalize_residuals: true"
        logger.warning("codes are used unevenly: %s; %s", ", ".join(found), advice)


def input_files(args: QuantizeArgs) -> dict[str, Path]:
    """Files that decide the result, by role: they are hashed, wherever they lie."""
    if not args.extend:
        return {"index": dataset_path(str(args.index), args.data_dir)} if args.index else {}
    folder = stage_folder(args.extend, "quantize")
    files = {"extended_map": folder / "semantic_ids.json"}
    if not files["extended_map"].exists():
        raise ValueError(f"extend={args.extend}: there is no {files['extended_map']}")
    if (folder / QUANTIZER_FILE).exists():
        files["extended_quantizer"] = folder / QUANTIZER_FILE
    return files


def main() -> None:
    """Run the stage."""
    args = parse(QuantizeArgs)
    files = input_files(args)
    ignore = ["index", "data_dir", "device", "extend"]
    if args.method != "title":
        ignore.append("max_title_bytes")
    if args.method != IMPORTED or args.extend:
        ignore += ["import_collisions", "import_missing"]
    stage = Stage(args.run_dir, "quantize", asdict(args), ["prepare", "embed"], files, ignore)
    if stage.is_done(args.overwrite):
        return
    catalog = pl.read_parquet(stage_folder(args.run_dir, "prepare") / "catalog.parquet", glob=False)
    titled = args.method == "title"
    if args.extend:
        titled = map_kind(stage_folder(args.extend, "quantize")) == TITLES
    if titled:
        name_by_titles(args, stage, catalog)
        return
    from genrec.embedding.collaborative import training_histories
    from genrec.quantizers.quality_page import write_quality_page

    vectors = np.load(stage_folder(args.run_dir, "embed") / VECTORS, mmap_mode="r")
    duplicates = find_duplicates(args.run_dir, catalog, vectors)
    sequences = training_histories(read_split(args.run_dir, "train", "quantize"))
    if args.extend:
        old_run = Path(args.extend)
        semantic_ids, quantizer, report = extended_map(old_run, catalog, vectors, args.seed)
    else:
        semantic_ids, quantizer, report = make_map(
            args, catalog, vectors, sequences, files.get("index", Path())
        )
    made = report.pop("index_method", args.method)
    if quantizer is not None:
        quantizer.save(stage.folder / QUANTIZER_FILE)
        digest = sha256_file(stage.folder / QUANTIZER_FILE)
        semantic_ids = semantic_ids.with_quantizer(digest)
    if made == "semantic":
        category_names(args, catalog, semantic_ids).save(stage.folder)
    semantic_ids.save(stage.folder)
    semantic_ids.export_index(stage.folder / "index.json")
    shutil.rmtree(stage.folder / FOLDER, ignore_errors=True)  # of a run that was killed
    SidTrie.build(semantic_ids.codes).save(stage.folder / FOLDER, semantic_ids.sha256)
    history = cast(Any, quantizer).history if made == "rqvae" else []
    if history:
        write_json(stage.folder / "history.json", history)
    quality = measure_quality(
        args, semantic_ids, quantizer, catalog, vectors, sequences,
        collisions=report, duplicates=duplicates, history=history,
    )  # fmt: skip
    write_json(stage.folder / "quality.json", quality)
    write_quality_page(stage.folder / "report.html", quality, Path(args.run_dir).name)
    names = ("levels", "collisions", "vector_neighbours", "copurchase_neighbours")
    metrics = {"method": made, **{name: quality[name] for name in names}}
    stage.finish(rows=semantic_ids.n_items, seed=args.seed, metrics=metrics)
    print_summary(semantic_ids, quality, stage.folder)
    if quantizer is not None and not args.extend:
        warn_of_uneven_levels(args, quality, len(quantizer.codebook_sizes))


def name_by_titles(args: QuantizeArgs, stage: Stage, catalog: pl.DataFrame) -> None:
    """Write a title index, new or grown, with an account of what was done to the titles."""
    done: dict[str, Any] = {}
    if args.extend:
        if load_manifest(args.extend, "quantize") is None:
            raise ValueError(f"extend={args.extend}: stage 'quantize' has not finished there")
        old = TitleIds.load(stage_folder(args.extend, "quantize"))
        ids, made, kept = old.successor(catalog)
        reserved = 0 if ids.reserved is None else len(ids.reserved)
        done = {"new": len(made.names), "kept": kept, "reserved": reserved}
    else:
        ids, made = TitleIds.of_catalog(catalog, args.max_title_bytes)
    sizes = ids.names.str.len_bytes()
    titles = {
        **{name: len(getattr(made, name)) for name in ("numbered", "shortened", "untitled")},
        "mean_bytes": sizes.mean(),
        "longest_bytes": sizes.max(),
        **done,
    }
    ids.save(stage.folder)
    write_json(stage.folder / "quality.json", {"items": ids.n_items, "titles": titles})
    stage.finish(ids.n_items, args.seed, {"method": "title", "titles": titles})
    print(
        f"{ids.n_items:,} items named by their titles, e.g. {ids.names[0]!r}; of those named now "
        f"{titles['numbered']:,} share a title and are numbered, {titles['shortened']:,} are cut, "
        f"{titles['untitled']:,} have none"
    )
    if args.extend:
        print(
            f"{done['kept']:,} items kept their titles, {done['new']:,} are new, "
            f"{done['reserved']:,} titles are reserved for items that left"
        )


def print_summary(semantic_ids: SemanticIds, quality: dict[str, Any], folder: Path) -> None:
    """What one wants to know at once."""
    shape = " x ".join(map(str, semantic_ids.codebook_sizes))
    perplexity = " / ".join(f"{level['perplexity']:.0f}" for level in quality["levels"])
    found = quality["collisions"]
    print(
        f"{semantic_ids.n_items:,} items, codes {shape}, perplexity {perplexity}, e.g. "
        f"{semantic_ids.sids()[0]}"
    )
    if found["method"] == "item-token":
        print("every item has a token of its own on the last level")
    elif "rate_before" in found:
        shared, moved = found["rate_before"], found["moved"]
        text = f"{shared:.1%} of the items shared a SID, now none; {moved:,} moved"
        if moved and found.get("distortion_before", 0) > 0:
            more = found["distortion_after"] / found["distortion_before"] - 1
            text += f", which adds {more:.2%} to the distortion"
        print(text)
    if "new" in found:
        print(
            f"{found['kept']:,} items kept their SIDs, {found['new']:,} are new, "
            f"{found['reserved']:,} SIDs are reserved for items that left"
        )
    by_vector, by_users = quality["vector_neighbours"], quality["copurchase_neighbours"]
    if by_vector is not None and by_users is not None:
        print(
            f"same first code: {by_vector:.3f} of the nearest by content, {by_users:.3f} of the "
            f"most co-purchased; report: {folder / 'report.html'}"
        )


if __name__ == "__main__":
    run(main)
