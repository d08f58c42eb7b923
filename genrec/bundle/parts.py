"""Where everything lies that serving needs: in the stages of a run folder, or in a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from genrec.artifacts import load_manifest, require, stage_folder
from genrec.bundle.decoding import MODEL_STAGES as MODEL_STAGES
from genrec.bundle.decoding import read_decoding
from genrec.bundle.files import check_bundle, is_bundle

DEFAULT_K = 10
ADAPTER = "adapter"  # folder of a bundle whose model is a serving base


@dataclass(frozen=True)
class ServedParts:
    """Paths and settings of what is served.

    Attributes:
        catalog: ``catalog.parquet``.
        semantic_ids: folder of the SID map, row for row with the catalogue.
        prompts: folder of the templates that the model was trained with.
        model: folder of the model and its tokenizer.
        template: the serving template.
        max_history: items of a history that a prompt keeps (the newest).
        model_stage: "sft" or "grpo".
        filter_seen: the rule under which the model was validated.
        k: length of lists that are asked for without one.
        beam_width: the search width of such lists; None: by their length.
        families: task families that sft trained the model on.
        trained_on_target: whether its reasoning chains saw the answer; None: not recorded.
        adapter: folder of the LoRA adapter that belongs on `model`; None: it is merged.
    """

    catalog: Path
    semantic_ids: Path
    prompts: Path
    model: Path
    template: str
    max_history: int
    model_stage: str
    filter_seen: bool
    k: int = DEFAULT_K
    beam_width: int | None = None
    families: tuple[str, ...] = ()
    trained_on_target: bool | None = None
    adapter: Path | None = None

    @classmethod
    def of_run(
        cls, run_dir: Path | str, stage: str | None = None, model_run: Path | str | None = None
    ) -> ServedParts:
        """The parts of a run.

        Args:
            run_dir: the run.
            stage: "sft" or "grpo"; by default grpo where it is complete, else sft.
            model_run: run that the model comes from, with its tokenizer, templates and length of
                histories; `run_dir` then gives the catalogue and a SID map that extends the
                model's. None: `run_dir`.

        Raises:
            ValueError: a stage is missing, broken, or was built from other inputs.
        """
        if stage is not None and stage not in MODEL_STAGES:
            raise ValueError(
                f"stage={stage!r} is not known; choose one of {', '.join(MODEL_STAGES)}"
            )
        source = run_dir if model_run is None else model_run
        if model_run is not None and is_bundle(model_run):
            raise ValueError(
                f"model_run={model_run} is a bundle; a later catalogue needs the run that it was "
                "exported from"
            )
        stage = stage or ("grpo" if load_manifest(source, "grpo") else "sft")
        trained = require(source, stage)
        data = require(source, "prepare")
        dataset = require(source, "build_dataset")
        require(run_dir, "quantize")
        return cls(
            catalog=stage_folder(run_dir, "prepare") / "catalog.parquet",
            semantic_ids=stage_folder(run_dir, "quantize"),
            prompts=stage_folder(source, "build_dataset") / "prompts",
            model=stage_folder(source, stage) / "model",
            template=dataset.metrics["serving_template"],
            max_history=data.config["max_history"],
            model_stage=stage,
            filter_seen=trained.config.get("filter_seen", True),
            families=tuple(sorted(trained_families(source))),
            trained_on_target=dataset.metrics.get("trained_on_target"),
        )

    @classmethod
    def of_bundle(cls, folder: Path | str, stage: str | None = None) -> ServedParts:
        """The parts of a bundle, after its files were checked (see `check_bundle`).

        Args:
            folder: the bundle.
            stage: None, or the stage that the bundle's model came from.

        Raises:
            ValueError: a file is missing, cut short, changed or not the bundle's, a setting of
                ``decoding.json`` can't be, or its model came from another stage.
        """
        folder = Path(folder)
        check_bundle(folder)
        decoding = read_decoding(folder)
        if stage not in (None, decoding["model_stage"]):
            raise ValueError(
                f"stage={stage!r}: the bundle {folder} holds the model of "
                f"{decoding['model_stage']!r}; leave stage out"
            )
        return cls(
            catalog=folder / "catalog.parquet",
            semantic_ids=folder / "semantic_ids",
            prompts=folder / "prompts",
            model=folder / "model",
            template=decoding["serving_template"],
            max_history=decoding["max_history"],
            model_stage=decoding["model_stage"],
            filter_seen=decoding["filter_seen"],
            k=decoding["k"],
            beam_width=decoding["beam_width"],
            families=tuple(decoding["families"]),
            trained_on_target=decoding["trained_on_target"],
            adapter=folder / ADAPTER if (folder / ADAPTER).is_dir() else None,
        )


def trained_families(run_dir: Path | str) -> frozenset[str]:
    """Task families that a run's sft stage has seen rows of, in any epoch.

    Raises:
        ValueError: the stage is missing, broken, or was built from other inputs.
    """
    # With weights an epoch may leave families out that the dataset has.
    epochs = require(run_dir, "sft").metrics.get("rows_per_epoch", [])
    return frozenset(name for epoch in epochs for name, rows in epoch.items() if rows)
