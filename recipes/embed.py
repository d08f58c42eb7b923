"""Catalogue -> item vectors, one row per catalogue row.

    genrec embed --config recipes/configs/quickstart/embed.yaml --run_dir runs/quickstart
    genrec embed --run_dir runs/mine --method sentence-transformers \
        --model_name_or_path sentence-transformers/all-MiniLM-L6-v2 --collaborative cooccurrence

Reads ``data/catalog.parquet``, and ``data/train.parquet`` where vectors learn from behaviour;
writes ``embeddings/item_embeddings.npy`` (n_items, dim) float32. With `collaborative` the vectors
of `method` are fused with vectors from the training rows, and the parts lie beside them:
``collaborative_embeddings.npy``, and ``text_embeddings.npy``, on which all is measured that is said
of content (content-kNN, the neighbours of a semantic id). What was fitted lies there, too
(lsa.safetensors, lsa.json, fusion.safetensors).

A catalogue lives: items come and go, and a model serves the new one without being retrained.

    genrec prepare   --run_dir runs/next ...                # the later tables
    genrec embed     --run_dir runs/next --extend runs/mine # vectors in the space of runs/mine
    genrec quantize  --run_dir runs/next --extend runs/mine # old SIDs stay, new items get free ones
    genrec recommend --run_dir runs/next --model_run runs/mine

With `extend` every setting that shapes vectors is the earlier run's. Items that it knows keep their
rows, also where their text changed; new ones are encoded with what it fitted and have no behaviour.

Encoding goes in shards: a killed run goes on with those that it finished, and SASRec from its last
measurement. Texts that were encoded stay so when other settings change (`--overwrite true` with
another `collaborative_weight`): their vectors are taken from the folder that was set aside. SASRec
learns from training rows alone; validation rows say when it stops.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.artifacts import Stage, read_json, require, sha256_json, stage_folder, write_json
from genrec.columns import ITEM_ID, SEEN, TRAIN_COUNT
from genrec.config import check_choice, dataset_path, parse, run
from genrec.data.splits import read_split
from genrec.item_lists import ItemLists

if TYPE_CHECKING:
    from genrec.embedding.extension import Extension

logger = logging.getLogger("genrec.embed")

METHODS = ("lsa", "sentence-transformers", "lm", "npy", "collaborative")
COLLABORATIVE = ("none", "cooccurrence", "sasrec", "file")
ENCODERS = ("sentence-transformers", "lm")
DTYPES = ("float32", "bfloat16", "float16")
# A local model's files are hashed, so that another model of the same name is another input.
MODEL_FILES = (".json", ".txt", ".model", ".safetensors", ".bin")
SASREC_STATE = "sasrec.pt"
ENCODED = "encoded.json"  # which texts, encoded how, are in which file

Vectors = npt.NDArray[np.float32]


@dataclass
class EmbedArgs:
    """Settings of the embed stage."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    # lsa: TF-IDF + SVD over the catalogue's text; sentence-transformers; lm: pooled states of any
    # language model; npy: a file that you bring; collaborative: no text at all
    method: str = "lsa"
    dim: int = 96  # lsa: components
    text_fields: list[str] = field(
        default_factory=lambda: ["title", "categories", "brand", "description"]
    )
    # npy: .npy or .safetensors (rows, dim), or .parquet of item_id and a list column
    vectors: str | None = None
    # Item id of each row (.npy, .txt, .json, .parquet); None: row order is trusted
    vector_ids: str | None = None
    data_dir: str | None = None
    # sentence-transformers, lm
    model_name_or_path: str | None = None
    pooling: str = "mean"  # lm: mean or last token
    prompt: str | None = None  # put before each text, as some encoders want: "passage: "
    max_length: int | None = None  # tokens read of a text; None: the model's limit (lm: 512)
    normalize: bool = True  # rows of unit length
    dtype: str = "float32"  # of the weights
    device: str | None = None
    batch_size: int = 32
    shard_size: int = 1024  # texts between two saves
    # Behaviour from the training rows, fused with the vectors of `method`; file: a table you bring
    collaborative: str = "none"
    collaborative_weight: float = 0.5  # share in the fused cosine; the text has the rest
    collaborative_dim: int | None = None  # None: 256 for cooccurrence, 128 for sasrec
    collaborative_window: int | None = 5  # cooccurrence: largest distance; None: any (slower)
    collaborative_epochs: int = 100  # sasrec: at most; it stops earlier by validation NDCG@10
    collaborative_vectors: str | None = None  # file: as `vectors`
    collaborative_ids: str | None = None
    fused_dim: int | None = None  # principal axes that are kept; None: all
    # A later catalogue: the run whose vectors stay and whose settings hold
    extend: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_choice("method", self.method, METHODS)
        check_choice("collaborative", self.collaborative, COLLABORATIVE)
        check_choice("pooling", self.pooling, ("mean", "last"))
        check_choice("dtype", self.dtype, DTYPES)
        if self.method == "npy" and not self.vectors:
            raise ValueError("method=npy needs `vectors`, a file with a row per catalogue item")
        if self.extend and Path(self.extend).resolve() == Path(self.run_dir).resolve():
            raise ValueError(f"extend={self.extend} is this run itself; name an earlier one")
        if (
            self.extend
            and self.method == "npy"
            and not (self.vector_ids or str(self.vectors).endswith(".parquet"))
        ):
            raise ValueError(
                "method=npy with `extend` needs `vector_ids`: new items are found by their ids"
            )
        if self.method in ENCODERS and not self.model_name_or_path:
            raise ValueError(
                f"method={self.method} needs `model_name_or_path`, a folder or Hub name"
            )
        if self.method == "collaborative" and self.collaborative == "none":
            raise ValueError(
                "method=collaborative needs `collaborative`: cooccurrence, sasrec or file"
            )
        if self.collaborative == "file" and not (self.collaborative_vectors or self.extend):
            raise ValueError("collaborative=file needs `collaborative_vectors`, a row per item")
        for name in ("dim", "batch_size", "shard_size", "max_length", "collaborative_dim",
            "collaborative_window", "collaborative_epochs", "fused_dim"):  # fmt: skip
            value = getattr(self, name)
            optional = type(self).__dataclass_fields__[name].default is None
            if not (isinstance(value, int) and value >= 1 or (optional and value is None)):
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if not 0 < self.collaborative_weight < 1:
            raise ValueError(
                f"collaborative_weight={self.collaborative_weight} must lie in (0, 1); "
                "collaborative: none or method: collaborative give one part alone"
            )


def input_files(args: EmbedArgs) -> dict[str, Path]:
    """Files that decide the result, by role: they are hashed, wherever they lie."""
    used = ["vectors", "vector_ids"] if args.method == "npy" else []
    if args.collaborative == "file" and not args.extend:
        used += ["collaborative_vectors", "collaborative_ids"]
    paths = [(name, getattr(args, name)) for name in used]
    files = {name: dataset_path(path, args.data_dir) for name, path in paths if path}
    if args.method in ENCODERS and (folder := Path(str(args.model_name_or_path))).is_dir():
        found = (p for p in sorted(folder.rglob("*")) if p.suffix in MODEL_FILES and p.is_file())
        files |= {f"model/{p.relative_to(folder).as_posix()}": p for p in found}
    if args.extend:
        before = stage_folder(args.extend, "embed")
        names = [name for name in require(args.extend, "embed").outputs if name != "config.yaml"]
        files |= {f"extended/{name}": before / name for name in names}
        files["extended/catalog.parquet"] = stage_folder(args.extend, "prepare") / "catalog.parquet"
    return files


def inherited(args: EmbedArgs) -> EmbedArgs:
    """The settings with those of the extended run, wherever they shape vectors."""
    then = require(str(args.extend), "embed").config
    now, default = asdict(args), asdict(EmbedArgs())
    then = {name: value for name, value in then.items() if name in now}
    unheard = [f"{n}={now[n]!r}" for n in then if now[n] not in (then[n], default[n])]
    text = ", ".join(f"{n}={value!r}" for n, value in then.items() if value != default[n])
    logger.info("extend: the settings of %s hold: %s", args.extend, text or "the defaults")
    if unheard:
        logger.warning("extend: not heard, since vectors share a space: %s", ", ".join(unheard))
    return replace(args, **then)


def check_same_model(args: EmbedArgs, stage: Stage) -> None:
    """Refuse a local model of other files than the one that made the extended run's vectors."""
    recorded = require(str(args.extend), "embed").inputs
    then, now = (
        {name: sha for name, sha in inputs.items() if name.startswith("model/")}
        for inputs in (recorded, stage.inputs)
    )
    if then != now:
        raise ValueError(
            f"model_name_or_path={args.model_name_or_path!r} is not the model that embedded "
            f"{args.extend}: its files differ; give the same one"
        )


def text_vectors(
    args: EmbedArgs,
    stage: Stage,
    files: dict[str, Path],
    catalog: pl.DataFrame,
    fitted: Path | None = None,
) -> Vectors:
    """Vectors of `method`; LSA is fitted here, unless a folder with a fitted one is given."""
    from genrec.embedding.lsa import LSA, fit_lsa, item_texts
    from genrec.embedding.vectors import copy_vectors

    if args.method in ENCODERS:
        texts = item_texts(catalog, args.text_fields, labelled=True)
        return encode(args, stage, texts, stage.folder / part_files(args)["text"])
    if args.method == "npy":
        copy = stage.folder / part_files(args)["text"]
        return copy_vectors(files["vectors"], catalog[ITEM_ID], copy, files.get("vector_ids"))
    texts = item_texts(catalog, args.text_fields)
    if fitted is not None:
        return LSA.load(fitted).encode(texts)
    lsa, vectors = fit_lsa(texts, args.dim, args.seed)
    lsa.save(stage.folder)
    return vectors


def encode(args: EmbedArgs, stage: Stage, texts: list[str], path: Path) -> Vectors:
    """Encode with a pretrained model, in shards beside `path`, unless this run did so before."""
    from genrec.embedding.lm_pooling import lm_vectors
    from genrec.embedding.shards import encode_in_shards
    from genrec.embedding.text_encoder import encode_texts

    names = ("model_name_or_path", "prompt", "max_length", "normalize", "dtype")
    settings = {name: getattr(args, name) for name in names}
    if args.method == "lm":
        settings["pooling"] = args.pooling
    # All that decides the vectors of a text, and nothing of what is done with them later.
    keyed = {"method": args.method, **settings}
    if model := {n: sha for n, sha in stage.inputs.items() if n.startswith("model/")}:
        keyed["model_name_or_path"] = model
    key = sha256_json({"texts": texts, "settings": keyed})
    before = set_aside(stage)
    if not args.extend and (done := encoded_before(before, key)):
        logger.info("%d texts were encoded before: %s", len(texts), done)
        shutil.copyfile(done, path)
    else:
        encoder = partial(lm_vectors if args.method == "lm" else encode_texts, **settings)
        encoder = partial(encoder, batch_size=args.batch_size, device=args.device)
        encode_in_shards(texts, encoder, path, keyed, args.shard_size, before)
    if not args.extend:  # whose file gets the rows of the earlier run, too
        write_json(stage.folder / ENCODED, {"key": key, "file": path.name})
    return np.load(path, mmap_mode="r")


def set_aside(stage: Stage) -> list[Path]:
    """Folders of earlier, overwritten or killed, embeddings of this run, the latest first."""
    found = stage.folder.parent.glob(f"{stage.folder.name}.old-*")
    return sorted(found, key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)


def encoded_before(folders: list[Path], key: str) -> Path | None:
    """Vectors of these texts by this encoder, whatever else the run was made with."""
    for folder in folders:
        if (folder / ENCODED).exists():
            about = read_json(folder / ENCODED)
            if about["key"] == key and (folder / about["file"]).exists():
                return folder / about["file"]
    return None


def behaviour_vectors(
    args: EmbedArgs, files: dict[str, Path], catalog: pl.DataFrame, checkpoint: Path
) -> Vectors:
    """Vectors from the training rows, zero for items that these lack."""
    from genrec.embedding.collaborative import (
        cooccurrence_vectors,
        item_table_vectors,
        training_histories,
    )
    from genrec.embedding.vectors import load_vectors

    trained = catalog[TRAIN_COUNT].to_numpy() > 0
    if args.collaborative == "file":
        ids = files.get("collaborative_ids")
        table = load_vectors(files["collaborative_vectors"], catalog[ITEM_ID], ids)
        return item_table_vectors(table, trained)
    if args.collaborative == "sasrec":
        return item_table_vectors(sasrec_table(args, len(catalog), checkpoint), trained)
    train = read_split(args.run_dir, "train", "embed")
    dim = args.collaborative_dim or min(256, len(catalog))
    return cooccurrence_vectors(
        training_histories(train), len(catalog), dim, args.seed, args.collaborative_window
    )


def sasrec_table(args: EmbedArgs, n_items: int, checkpoint: Path) -> Vectors:
    """Item embeddings of the SASRec that is a baseline, too."""
    from genrec.evaluation.sequential import SequentialSettings, train_sequential

    train, valid = (read_split(args.run_dir, name, "embed") for name in ("train", "valid"))
    settings = replace(
        SequentialSettings.of("SASRec"),
        dim=args.collaborative_dim or 128,
        max_epochs=args.collaborative_epochs,
    )
    seen = ItemLists.from_column(valid[SEEN])
    found = train_sequential(train, valid, seen, n_items, settings, args.seed, checkpoint)
    logger.info("SASRec: %s, stopped by %s", found.best, found.stopped)
    return found.model.items.weight[:n_items].detach().numpy()


def part_files(args: EmbedArgs) -> dict[str, str]:
    """File of each part of the vectors; the last part is what quantize reads."""
    from genrec.embedding.vectors import COLLABORATIVE_VECTORS, TEXT_VECTORS, VECTORS

    if args.collaborative == "none":
        return {"text": VECTORS}
    if args.method == "collaborative":
        return {"collaborative": COLLABORATIVE_VECTORS}
    return {"text": TEXT_VECTORS, "collaborative": COLLABORATIVE_VECTORS, "fused": VECTORS}


def fitted_parts(
    args: EmbedArgs, stage: Stage, files: dict[str, Path], catalog: pl.DataFrame
) -> dict[str, Vectors]:
    """Vectors of each part, fitted on this catalogue."""
    from genrec.embedding.fusion import Fusion

    parts: dict[str, Vectors] = {}
    if args.method != "collaborative":
        parts["text"] = text_vectors(args, stage, files, catalog)
    if args.collaborative != "none":
        state = stage.folder / SASREC_STATE
        parts["collaborative"] = behaviour_vectors(args, files, catalog, state)
    if len(parts) == 2:
        weight = args.collaborative_weight
        pairs = [(parts["text"], 1 - weight), (parts["collaborative"], weight)]
        fusion = Fusion.fit(pairs, args.fused_dim, args.seed)
        fusion.save(stage.folder)
        parts["fused"] = fusion.fuse([part for part, _ in pairs])
    return parts


def extended_parts(
    args: EmbedArgs, stage: Stage, files: dict[str, Path], catalog: pl.DataFrame, old: Extension
) -> dict[str, Vectors]:
    """Vectors of each part: the old rows of known items, and new ones by what was fitted then."""
    from genrec.embedding.fusion import FUSION_FILE, Fusion
    from genrec.embedding.lsa import LSA_FILES

    names, added = part_files(args), catalog.filter(pl.Series(old.is_new))
    pieces = [*(LSA_FILES if args.method == "lsa" else ()), *((FUSION_FILE,) * ("fused" in names))]
    old.carry(pieces, stage.folder)
    # New items have no behaviour, as any item that the training rows lack.
    new = {part: np.zeros((len(added), old.rows(n).shape[1]), "f4") for part, n in names.items()}
    if "text" in names and len(added):
        new["text"] = text_vectors(args, stage, files, added, old.folder)
    if "fused" in names and len(added):
        new["fused"] = Fusion.load(old.folder).fuse([new["text"], new["collaborative"]])
    return {part: old.grown(name, new[part]) for part, name in names.items()}


def what_changed(args: EmbedArgs, catalog: pl.DataFrame, old: Extension) -> dict[str, int]:
    """Items that stayed, came, left, and stayed under another text."""
    from genrec.embedding.lsa import item_texts

    new = int(old.is_new.sum())
    found = {"kept": len(catalog) - new, "new": new, "gone": old.n_gone}
    if args.method == "lsa" or args.method in ENCODERS:
        then, now = (item_texts(table, args.text_fields) for table in (old.catalog, catalog))
        found["text_changed"] = old.changed(then, now)
    return found


def main() -> None:
    """Run the stage."""
    args = parse(EmbedArgs)
    if args.extend:
        args = inherited(args)
    files = input_files(args)
    # Files are hashed, wherever they lie; the rest changes speed, but not what is computed.
    ignore = ["vectors", "vector_ids", "collaborative_vectors", "collaborative_ids", "data_dir"]
    ignore += ["device", "batch_size", "shard_size", "extend"]
    if any(name.startswith("model/") for name in files):
        ignore.append("model_name_or_path")
    stage = Stage(args.run_dir, "embed", asdict(args), ["prepare"], files, ignore)
    if args.extend:
        check_same_model(args, stage)
    if stage.is_done(args.overwrite):
        return
    from genrec.embedding.extension import Extension
    from genrec.embedding.shards import remove_shards
    from genrec.embedding.vectors import VECTORS

    catalog = pl.read_parquet(stage_folder(args.run_dir, "prepare") / "catalog.parquet", glob=False)
    changes: dict[str, int] = {}
    if args.extend:
        old = Extension.of(args.extend, catalog[ITEM_ID])
        parts = extended_parts(args, stage, files, catalog, old)
        changes = what_changed(args, catalog, old)
    else:
        parts = fitted_parts(args, stage, files, catalog)
    names = part_files(args)
    for part, rows in parts.items():
        if not isinstance(rows, np.memmap):  # of the file itself, which shards were put into
            np.save(stage.folder / names[part], rows)
    *_, vectors = parts.values()
    if VECTORS not in names.values():
        np.save(stage.folder / VECTORS, vectors)
    zero = {name: float((~part.any(axis=1)).mean()) for name, part in parts.items()}
    remove_shards(stage.folder / VECTORS)
    # SASRec's state: what is wanted of it is in the vectors.
    (stage.folder / SASREC_STATE).unlink(missing_ok=True)
    about = {"method": args.method, "collaborative": args.collaborative, "zero_rows": zero}
    about |= {"extended": changes} if changes else {}
    stage.finish(rows=len(vectors), seed=args.seed, metrics={"dim": vectors.shape[1], **about})
    name = args.method + (f" + {args.collaborative}" if "fused" in parts else "")
    print(f"{len(vectors):,} item vectors of {vectors.shape[1]} dimensions ({name})")
    if changes:
        text = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in changes.items())
        print(f"items against those of {args.extend}: {text}")
    for part, share in zero.items():
        if share:
            print(f"{share:.1%} of the items have a zero row ({part})")


if __name__ == "__main__":
    run(main)
