"""Write a bundle from a run: checked copies, one manifest, atomic, never over anything.

The model is a plain Hugging Face checkpoint (training merged the adapters), so transformers and
vLLM load ``model/`` as it is; on request it is a base with the SID rows, and ``adapter/`` lies
beside it. No row of the interactions, no user and no history is in a bundle.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from genrec.artifacts import (
    ABOUT,
    FOLDERS,
    MANIFEST,
    Manifest,
    git_commit,
    load_manifest,
    package_versions,
    read_json,
    require,
    sha256_file,
    stage_folder,
    write_json,
    write_parquet,
    write_text,
)
from genrec.bundle.card import model_card
from genrec.bundle.files import CARD, DECODING, KIND, SCHEMA_VERSION, is_bundle, list_files
from genrec.bundle.parts import ADAPTER, DEFAULT_K, ServedParts
from genrec.bundle.serving_base import write_serving_base
from genrec.columns import BRAND, CATEGORIES, ITEM_ID, ITEM_INDEX, PRICE, TITLE, TRAIN_COUNT
from genrec.decoding.beam import default_beam_width
from genrec.decoding.trie import FOLDER as TRIE
from genrec.modeling import load_base, load_tokenizer
from genrec.normalizers import declared_normalizer
from genrec.prompts import PromptRenderer
from genrec.title_ids import load_map

# Of the catalogue: what lists show, filters ask for and reasons cite.
SERVING_COLUMNS = (ITEM_INDEX, ITEM_ID, TITLE, BRAND, CATEGORIES, PRICE, TRAIN_COUNT)
_REWRITTEN = ("config.json", "generation_config.json")  # with the weights, in another dtype


@dataclass(frozen=True)
class ExportSettings:
    """What a bundle is made of beside the run.

    Attributes:
        model_stage: "sft" or "grpo"; None: grpo where it is complete.
        model_run: run that the model comes from; None: the exported run.
        dtype: of the stored weights; None: as they were trained, byte for byte.
        k: length of lists that are asked for without one; None: recommend's, else 10.
        beam_width: their search width; None: recommend's, else by `k`.
        license: of the model, for its card; None: to be filled in.
        serving_base: the model that the run's adapter was trained on; the bundle then holds it with
            the run's SID rows, and the adapter apart. None: the merged model.
    """

    model_stage: str | None = None
    model_run: Path | str | None = None
    dtype: str | None = None
    k: int | None = None
    beam_width: int | None = None
    license: str | None = None
    serving_base: str | None = None


def write_bundle(run_dir: Path | str, target: Path | str, settings: ExportSettings) -> Path:
    """Write a bundle and return its folder.

    It is built in a hidden folder beside `target` and renamed when whole.

    Raises:
        ValueError: `target` exists or lies in a stage's folder or a bundle, a stage is missing or
            was changed, or the settings don't fit.
    """
    target = Path(target)
    if settings.serving_base is not None and settings.dtype is not None:
        raise ValueError(
            f"dtype={settings.dtype} would round base and adapter apart; leave dtype or "
            "serving_base out"
        )
    _refuse_existing(target)
    for run in {str(run_dir), str(settings.model_run or run_dir)}:
        _refuse_inside(target, Path(run))
    parts = ServedParts.of_run(run_dir, settings.model_stage, settings.model_run)
    semantic_ids = load_map(parts.semantic_ids)
    load_tokenizer(parts.model, semantic_ids)  # refuses a map that isn't the model's
    decoding = _decoding(run_dir, parts, settings)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        source = run_dir if settings.model_run is None else settings.model_run
        _copy(source, "build_dataset", "prompts/", partial / "prompts")
        for name in ("items.parquet", "semantic_ids.json", "reserved.parquet"):
            _copy(run_dir, "quantize", name, partial / "semantic_ids" / name)
        _copy(run_dir, "quantize", f"{TRIE}/", partial / "semantic_ids" / TRIE)
        stored = _write_model(source, parts, settings.dtype, partial / "model")
        if settings.serving_base is not None:
            _drop_weights(partial / "model")
            adapter = stage_folder(source, parts.model_stage) / "adapter"
            write_serving_base(
                parts.model,
                adapter,
                settings.serving_base,
                partial / "model",
                partial / ADAPTER,
            )
        catalog = pl.read_parquet(parts.catalog, glob=False)
        kept = [name for name in SERVING_COLUMNS if name in catalog.columns]
        write_parquet(partial / "catalog.parquet", catalog.select(kept))
        write_json(partial / DECODING, decoding)
        manifest = {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "name": Path(run_dir).resolve().name,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": package_versions(),
            "git_commit": git_commit(),
            "model_stage": parts.model_stage,
            "base": read_json(parts.model / ABOUT).get("base"),
            "dtype": stored,
            "adapter_apart": settings.serving_base is not None,
            "items": semantic_ids.n_items,
            "sid_map_sha256": semantic_ids.sha256,
            "prompts_sha256": PromptRenderer(partial / "prompts").sha256(),
            **_facts(run_dir, parts, settings),
        }
        write_text(partial / CARD, model_card(manifest, decoding, settings.license))
        manifest["files"] = {
            name: {"sha256": sha256_file(partial / name), "bytes": (partial / name).stat().st_size}
            for name in list_files(partial)
        }
        write_json(partial / MANIFEST, manifest)
        _refuse_existing(target)  # somebody else may have been faster
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise ValueError(
            f"{target} exists, and a bundle never overwrites anything; name another folder or move "
            "that one away"
        )


def _refuse_inside(target: Path, run_dir: Path) -> None:
    """Refuse a place where a bundle would be taken for a part of something else."""
    place = target.resolve()
    for stage in FOLDERS:
        folder = stage_folder(run_dir, stage)
        if folder.resolve() in (place, *place.parents):
            raise ValueError(
                f"{target} lies in {folder}, the folder of stage '{stage}', which holds nothing "
                "but that stage's output; name a folder outside of it"
            )
    for parent in place.parents:
        if is_bundle(parent):
            raise ValueError(
                f"{target} lies in the bundle {parent}, which would no longer be what was "
                "exported; name a folder outside of it"
            )


def _copy(run_dir: Path | str, stage: str, prefix: str, target: Path) -> list[str]:
    """Copy a stage's files that begin with `prefix`, checked against its manifest.

    Returns:
        Their names behind the prefix.
    """
    folder, outputs = stage_folder(run_dir, stage), require(run_dir, stage).outputs
    names = [name for name in outputs if name.startswith(prefix)]
    for name in names:
        copied = target / name.removeprefix(prefix) if prefix.endswith("/") else target
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, copied)
        if sha256_file(copied) != outputs[name]["sha256"]:
            raise ValueError(
                f"{folder / name} was changed since '{stage}' finished; restore it or rerun: "
                f"genrec {stage} --config <its yaml> --run_dir {run_dir} --overwrite true"
            )
    return [name.removeprefix(prefix) for name in names]


def _write_model(
    source: Path | str, parts: ServedParts, dtype: str | None, target: Path
) -> dict[str, str]:
    """Copy the model, or write it anew in another dtype; which one it had and has."""
    _copy(source, parts.model_stage, "model/", target)
    config = read_json(parts.model / "config.json")
    trained = str(config.get("dtype") or config.get("torch_dtype"))
    if dtype in (None, trained):
        return {"trained": trained, "stored": trained}
    _drop_weights(target)
    load_base(str(parts.model), str(dtype)).save_pretrained(str(target))
    return {"trained": trained, "stored": str(dtype)}


def _drop_weights(model: Path) -> None:
    for path in [*model.glob("*.safetensors*"), *(model / name for name in _REWRITTEN)]:
        path.unlink(missing_ok=True)


def _decoding(run_dir: Path | str, parts: ServedParts, settings: ExportSettings) -> dict[str, Any]:
    """Settings of serving; `k` and the width as recommend had them, if it served this model."""
    served = _recommended(run_dir, parts, settings)
    config = served.config if served is not None else {}
    k = settings.k or config.get("k", DEFAULT_K)
    # recommend's width was meant for lists of its length.
    fits = k <= config.get("k", 0)
    width = settings.beam_width or (config["beam_width"] if fits else default_beam_width(k))
    if not 1 <= k <= width:
        raise ValueError(f"k={k} must lie between 1 and beam_width={width}")
    return {
        "normalizer": declared_normalizer(parts.model),
        "k": k,
        "beam_width": width,
        "filter_seen": parts.filter_seen,
        "filter_rule": "items of the history are left out"
        if parts.filter_seen
        else "no item is left out",
        "max_history": parts.max_history,
        "serving_template": parts.template,
        "model_stage": parts.model_stage,
        "families": list(parts.families),
        "trained_on_target": parts.trained_on_target,
    }


def _recommended(
    run_dir: Path | str, parts: ServedParts, settings: ExportSettings
) -> Manifest | None:
    """Manifest of recommend, if its lists were made by this very model."""
    made = load_manifest(run_dir, "recommend")
    if made is None or made.config.get("model_stage") != parts.model_stage:
        return None
    source = run_dir if settings.model_run is None else settings.model_run
    label = parts.model_stage if settings.model_run is None else f"model_run/{parts.model_stage}"
    same = made.inputs.get(label) == require(source, parts.model_stage).content_hash
    return made if same else None


def _facts(run_dir: Path | str, parts: ServedParts, settings: ExportSettings) -> dict[str, Any]:
    """Sources by hash, and the figures that the run's manifests hold for this model."""
    source = run_dir if settings.model_run is None else settings.model_run
    runs = {"prepare": run_dir, "quantize": run_dir, "build_dataset": source}
    manifests = {stage: require(run, stage) for stage, run in runs.items()}
    trained = manifests[parts.model_stage] = require(source, parts.model_stage)
    return {
        "catalog_sha256": manifests["prepare"].outputs["catalog.parquet"]["sha256"],
        "sources": {
            stage: {"fingerprint": m.fingerprint, "content_hash": m.content_hash}
            for stage, m in manifests.items()
        },
        "parameters": trained.metrics.get("parameters"),
        "validation": trained.metrics.get("best"),
        "normalizer_choice": trained.metrics.get("normalizer"),
        "evaluation": _evaluation(run_dir, _recommended(run_dir, parts, settings)),
    }


def _evaluation(run_dir: Path | str, recommended: Manifest | None) -> dict[str, Any] | None:
    """Metrics of this model's lists, if evaluate ran on them."""
    made = load_manifest(run_dir, "evaluate")
    if made is None or recommended is None:
        return None
    if made.inputs.get("recommend") != recommended.content_hash:
        return None
    metrics = read_json(stage_folder(run_dir, "evaluate") / "metrics.json")
    ours = metrics["systems"][made.config["system"]]
    columns = [f"{metric}@{k}" for k in made.config["ks"] for metric in ("HR", "NDCG")]
    return {
        "split": metrics["split"],
        "rows": metrics["rows"],
        "items": metrics["items"],
        "filter_seen": metrics["filter_seen"],
        "normalizer": recommended.config["normalizer"],
        "metrics": {
            column: {end: ours[column].get(end) for end in ("value", "low", "high")}
            for column in columns
        },
    }
