"""Warm start: train the model of an earlier run on, over a SID map that grew out of its own.

The tokenizer is the earlier model's. SID rows that it has keep what they learned; rows of codes
that no item had before are set as at a first training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genrec.artifacts import ABOUT, Manifest, read_json, require, stage_folder
from genrec.bundle.files import is_bundle
from genrec.bundle.parts import MODEL_STAGES, ServedParts
from genrec.semantic_ids import SemanticIds
from genrec.title_ids import ItemMap, load_map

# What a model learned to tell apart, wide to narrow: losses of sft, and normalisers of grpo.
_SCOPES = {"vocabulary": 0, "full": 0, "level": 1, "trie": 2}


def learned_over(run_dir: Path | str, stage: str) -> str:
    """The narrowest of what a run's SID tokens competed with while it was trained.

    Args:
        run_dir: the run.
        stage: "sft" or "grpo": where its model comes from.
    """
    learned = [str(require(run_dir, "sft").config.get("loss_over", "vocabulary"))]
    if stage == "grpo":
        learned.append(str(require(run_dir, stage).config.get("normalizer", "full")))
    return max(learned, key=lambda name: _SCOPES.get(name, 0))


def check_scope(who: str, learned: str, loss_over: str) -> None:
    """Refuse a model that learned nothing of some tokens that are to compete now.

    Args:
        who: opens the message.
        learned: see `learned_over`.
        loss_over: of the training that is to begin.

    Raises:
        ValueError: it was trained over less.
    """
    if _SCOPES.get(learned, 0) > _SCOPES[loss_over]:
        raise ValueError(
            f"{who} was trained over {learned} and learned nothing of what lies outside, which "
            f"loss_over={loss_over} would rank beside it; use loss_over={learned}"
        )


@dataclass(frozen=True)
class EarlierModel:
    """The trained model of another run.

    Attributes:
        run_dir: of that run.
        stage: "sft" or "grpo": where the model comes from.
        model: its folder.
        about: its ``genrec.json``.
        manifests: of the run's stages "prepare", "quantize", "build_dataset", "sft" and `stage`.
    """

    run_dir: Path
    stage: str
    model: Path
    about: dict[str, Any]
    manifests: Mapping[str, Manifest]

    @classmethod
    def of_run(
        cls, previous: Path | str, run_dir: Path | str, stage: str | None = None
    ) -> EarlierModel:
        """Look at the model of a run, before anything long begins.

        Args:
            previous: the earlier run.
            run_dir: the run that is to be trained.
            stage: "sft" or "grpo"; None: grpo where it is complete, else sft.

        Raises:
            ValueError: it is this run, a bundle or unfinished, or this run's SID map did not grow
                out of its map.
        """
        if Path(previous).resolve() == Path(run_dir).resolve():
            raise ValueError(f"warm_start={previous} is this run itself; name an earlier one")
        if is_bundle(previous):
            raise ValueError(
                f"warm_start={previous} is a bundle, which doesn't say what its model was trained "
                "on; name the run that it was exported from"
            )
        parts = ServedParts.of_run(previous, stage)
        about = read_json(parts.model / ABOUT)
        ids = load_map(stage_folder(run_dir, "quantize"))
        trained_on = about["semantic_ids_sha256"]
        if not ids.descends_from(trained_on):
            raise ValueError(
                f"the SID map in {stage_folder(run_dir, 'quantize')} ({ids.sha256[:12]}) does not "
                f"extend the one that the model in {parts.model} was trained on "
                f"({trained_on[:12]}); its codes mean other things. Make it with: genrec embed "
                f"--run_dir {run_dir} --extend {previous} --overwrite true, then genrec quantize "
                f"--run_dir {run_dir} --extend {previous} --overwrite true"
            )
        stages = ("prepare", "quantize", "build_dataset", "sft", parts.model_stage)
        manifests = {name: require(previous, name) for name in stages}
        return cls(Path(previous), parts.model_stage, parts.model, about, manifests)

    @property
    def data(self) -> Path:
        """Prepare's folder: what the model was trained on."""
        return stage_folder(self.run_dir, "prepare")

    @property
    def semantic_ids(self) -> ItemMap:
        """The map of the run."""
        return load_map(stage_folder(self.run_dir, "quantize"))

    @property
    def hashes(self) -> dict[str, str]:
        """Content of all that is read of the run, for the fingerprint of what is trained on it."""
        read = ("prepare", "quantize", self.stage)
        return {f"warm_start/{name}": self.manifests[name].content_hash for name in read}

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """The models that come before, oldest first, this one last."""
        own = {
            "run": self.run_dir.resolve().name,  # the name alone: a path tells of a machine
            "stage": self.stage,
            "content_hash": self.manifests[self.stage].content_hash,
            "semantic_ids_sha256": self.about["semantic_ids_sha256"],
            "seed": self.manifests["sft"].seed,
        }
        return [*self.about.get("lineage", []), own]

    @property
    def learned_over(self) -> str:
        """See `learned_over`."""
        return learned_over(self.run_dir, self.stage)

    @property
    def first_seed(self) -> int:
        """Seed of the first training: its SID rows were turned into the model's space with it."""
        return int(self.lineage[0]["seed"] or 0)

    @property
    def prompts_sha256(self) -> str:
        """Hash of the templates that the model was trained with."""
        return str(self.manifests["build_dataset"].metrics["prompts_sha256"])


def unseen_codes(now: SemanticIds, before: SemanticIds) -> list[np.ndarray]:
    """Codes that an item has now and none had before, and codes that weren't there at all.

    Items that left count as having had theirs.

    Args:
        now: the grown map.
        before: its ancestor.

    Returns:
        Per level, (codebook_size,) booleans.
    """
    found = []
    for level, size in enumerate(now.codebook_sizes):
        used = np.zeros(size, dtype=bool)
        used[now.codes[:, level]] = True
        used[before.taken_codes()[:, level]] = False
        used[before.codebook_sizes[level] :] = True
        found.append(used)
    return found


def check_replay_share(share: float) -> None:
    """Raise ValueError unless a share of old rows can be."""
    if not 0 <= share < 1:
        raise ValueError(
            f"replay_share={share} must lie in [0, 1): the share of an epoch that old rows make"
        )


def check_stage(stage: str | None) -> None:
    """Raise ValueError unless a model can come from the stage."""
    if stage is not None and stage not in MODEL_STAGES:
        raise ValueError(
            f"warm_start_stage={stage!r} is not known; choose one of {', '.join(MODEL_STAGES)}"
        )
