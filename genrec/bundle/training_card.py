"""The model card beside a trained model: ``sft/model/README.md`` and ``grpo/model/README.md``.

Made from what the manifests hold, so its hashes are theirs. Names and paths come from users: all
that the template prints is escaped, and of paths only the last part is shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from genrec.artifacts import ABOUT, Manifest, Stage, read_json
from genrec.page import number
from genrec.semantic_ids import SemanticIds
from genrec.tasks.card_readme import escaped
from genrec.title_ids import ItemMap

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_STAGES = {
    "sft": "supervised fine-tuning",
    "grpo": "supervised fine-tuning and reinforcement learning (GRPO)",
}
_REFRESH = {
    "new_interactions": "Interactions that the earlier model's training part did not have",
    "new_items": "Items that are new, or have new texts",
    "new_rows": "Rows with something new in an epoch",
    "replayed_rows": "Old rows, drawn again, in an epoch",
    "gone_interactions": "Interactions that the earlier model learned and these data lack",
    "known_held_out": "Held-out interactions that the earlier model was trained on",
}


def shown_base(name_or_path: str) -> str:
    """A base model as others may see it: the name on the hub, or a local folder's own name."""
    path = Path(name_or_path)
    return path.resolve().name if path.exists() or path.is_absolute() else name_or_path


def hub_base(base: object) -> str | None:
    """The base model's name on the Hugging Face hub; None for one that isn't from there."""
    return str(base) if _HUB_NAME.fullmatch(str(base)) else None


def training_settings(
    training: Any, steps: int, lora: tuple[int, int] | None, four_bit: bool = False
) -> dict[str, str]:
    """What of a trainer's settings matters to a reader, in words.

    Args:
        training: TRL's SFTConfig or GRPOConfig.
        steps: optimizer steps that were made.
        lora: rank and alpha of adapters; None: all weights were trained.
        four_bit: the adapters were trained on a 4-bit base.
    """
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    schedule = training.lr_scheduler_type
    rate = f"{training.learning_rate:g}, {getattr(schedule, 'value', schedule)}"
    if training.warmup_steps:
        rate += f", warm-up {training.warmup_steps:g}"
    found = {
        "Optimizer steps": f"{steps:,}",
        "Rows per step": f"{rows * training.world_size:,}",
        "Learning rate": rate,
        "Weight decay": f"{training.weight_decay:g}",
        "Trained weights": "all"
        if lora is None
        else f"LoRA of rank {lora[0]}, alpha {lora[1]}, and the SID rows; "
        + ("on a 4-bit base, merged into the unquantised one" if four_bit else "merged"),
        "Precision": "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32",
        "Seed": str(training.seed),
    }
    if getattr(training, "num_generations", None) is not None:
        found["Answers per prompt"] = str(training.num_generations)
        found["KL penalty (beta)"] = f"{training.beta:g}"
    return found


def training_card(
    stage: Stage,
    semantic_ids: ItemMap,
    settings: Mapping[str, str],
    metrics: Mapping[str, Any],
    filter_seen: bool,
) -> str:
    """The card as Markdown with the front matter that the Hugging Face hub reads.

    Args:
        stage: sft or grpo, with its model saved; built from "prepare", "quantize" and
            "build_dataset" (grpo also from "sft").
        semantic_ids: the SID map.
        settings: see `training_settings`.
        metrics: of the stage: parameters, best, validation_rows, measurements, normalizer, for sft
            rows_per_epoch, and warm_start if it began with an earlier model.
        filter_seen: the rule of validation.
    """
    upstream, about = stage.upstream, read_json(stage.folder / "model" / ABOUT)
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            "recommendation",
            "generative-recommendation",
            "semantic-ids",
            "genrec",
            stage.name,
        ],
    }
    if base := hub_base(about["base"]):
        front["base_model"] = base
    best = metrics.get("best") or {}
    trained = upstream["sft"].metrics if stage.name == "grpo" else metrics
    refresh = metrics.get("warm_start") or {}
    return _template().render(
        front=Markup(yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)),
        name=stage.run_dir.resolve().name,
        stage=stage.name,
        stage_words=_STAGES[stage.name],
        items=f"{semantic_ids.n_items:,}",
        normalizer=about["normalizer"],
        normalizer_rule=metrics.get("normalizer", {}).get("rule"),
        model=_model(upstream, semantic_ids, about, metrics, trained),
        settings=list(settings.items()),
        lineage=about.get("lineage", []),
        refresh=[(label, f"{refresh[key]:,}") for key, label in _REFRESH.items() if key in refresh],
        data=_data(upstream["prepare"]),
        hashes=_hashes(upstream, semantic_ids),
        figures=[(name.upper(), number(v)) for name, v in best.items() if "@" in name],
        validation_rows=f"{metrics.get('validation_rows', 0):,}",
        measurements=_times(metrics.get("measurements", 0)),
        seed=settings["Seed"],
        seen_words="without the items that the user has"
        if filter_seen
        else "with the items that the user has",
    )


def _times(count: int) -> str:
    return "1 measurement" if count == 1 else f"{count:,} measurements"


def _model(
    upstream: Mapping[str, Manifest],
    semantic_ids: ItemMap,
    about: Mapping[str, Any],
    metrics: Mapping[str, Any],
    trained: Mapping[str, Any],
) -> list[tuple[str, str]]:
    shape = "titles of items, written out"
    if isinstance(semantic_ids, SemanticIds):
        sizes = " x ".join(str(size) for size in semantic_ids.codebook_sizes)
        shape = f"{semantic_ids.n_levels} levels of {sizes} codes"
    dataset = upstream["build_dataset"].metrics
    families = {name for epoch in trained.get("rows_per_epoch", []) for name in epoch}
    base = str(about["base"])
    words = base.removeprefix("scratch-")
    return [
        ("Base model", f"none, trained from scratch (size {words})" if base != words else base),
        ("Parameters", f"{metrics['parameters']:,}"),
        (
            "SID map",
            f"{shape}, version {semantic_ids.version}, "
            f"made by {upstream['quantize'].metrics['method']}",
        ),
        ("Serving prompt", str(dataset["serving_template"])),
        ("Task families", ", ".join(sorted(families)) or "not recorded"),
        ("Code", _code(upstream["build_dataset"])),
    ]


def _code(manifest: Manifest) -> str:
    version = f"genrec {manifest.versions.get('genrec')}"
    return f"{version}, commit {manifest.git_commit}" if manifest.git_commit else version


def _data(prepare: Manifest) -> list[tuple[str, str]]:
    metrics, config = prepare.metrics, prepare.config
    source = str(config.get("format", "not recorded"))
    if config.get("interactions"):  # the last part alone: paths tell of a machine
        source += f", {PureWindowsPath(config['interactions']).name}"
    facts = [("Source", source)]
    for key, label in (("users", "Users"), ("items", "Items"), ("interactions", "Interactions")):
        if key in metrics:
            facts.append((label, f"{metrics[key]:,}"))
    if "density" in metrics:
        facts.append(("Density", f"{100 * metrics['density']:.3g}%"))
    if "mean_length" in metrics:
        facts.append(("Interactions per user, mean", number(metrics["mean_length"], 1)))
    facts.append(("Split", str(metrics.get("protocol", "not recorded"))))
    for name, moment in (metrics.get("boundaries") or {}).items():
        facts.append((name.replace("_", " ").capitalize(), str(moment)))
    return facts


def _hashes(upstream: Mapping[str, Manifest], semantic_ids: ItemMap) -> list[tuple[str, str]]:
    prepare = upstream["prepare"]
    found = [
        ("Split rows", prepare.metrics.get("content_sha256")),
        ("Catalogue", prepare.outputs["catalog.parquet"]["sha256"]),
        ("Prepared data, content", prepare.content_hash),
        ("SID map", semantic_ids.sha256),
        ("Prompts", upstream["build_dataset"].metrics["prompts_sha256"]),
        ("Training rows, content", upstream["build_dataset"].content_hash),
    ]
    if "sft" in upstream:
        found.append(("Supervised fine-tuning, content", upstream["sft"].content_hash))
    return [(label, str(value)) for label, value in found if value]


@cache
def _template() -> Any:
    """The template; whatever it prints is made safe, unless it is marked as Markdown."""
    environment = Environment(
        loader=PackageLoader("genrec", "bundle"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else escaped(str(value)),
    )
    return environment.get_template("training_card.md.jinja")
