"""Teachers of a student: trained models of other runs, over the same SID map and vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from genrec.artifacts import ABOUT, read_json, require, stage_folder
from genrec.bundle.parts import ServedParts
from genrec.modeling import load_base
from genrec.supervised_head import LossOver, Teachers
from genrec.title_ids import load_map
from genrec.warm_start import check_scope, learned_over


@dataclass(frozen=True)
class TeacherRun:
    """The trained model of a run that teaches.

    Attributes:
        run_dir: the run.
        model: folder of its model.
        content_hash: of the stage that made it.
    """

    run_dir: Path
    model: Path
    content_hash: str

    @classmethod
    def of_run(cls, teacher: Path | str, run_dir: Path | str, loss_over: LossOver) -> TeacherRun:
        """Look at the model of a run, before anything long begins.

        Args:
            teacher: the run that teaches; its grpo model where that is complete, else sft's.
            run_dir: the run that is to be trained.
            loss_over: what the student's SID tokens compete with.

        Raises:
            ValueError: it is this run, unfinished, its SID map is another one, or it learned
                nothing of some tokens that the student's compete with.
        """
        if Path(teacher).resolve() == Path(run_dir).resolve():
            raise ValueError(f"teacher {teacher} is this run itself; name other runs")
        parts = ServedParts.of_run(teacher)
        of_teacher = read_json(parts.model / ABOUT)["semantic_ids_sha256"]
        own = load_map(stage_folder(run_dir, "quantize")).sha256
        if of_teacher != own:
            raise ValueError(
                f"the SID map of {run_dir} ({own[:12]}) is not the one that the teacher {teacher} "
                f"was trained on ({of_teacher[:12]}): its codes mean other things. Quantize both "
                "with the same vectors, settings and seed"
            )
        learned = learned_over(teacher, parts.model_stage)
        check_scope(f"the teacher {teacher}", learned, loss_over)
        content_hash = require(teacher, parts.model_stage).content_hash
        return cls(Path(teacher), parts.model, content_hash)

    def told(self) -> dict[str, str]:
        """What a student's ``genrec.json`` says of it."""
        return {"run": self.run_dir.resolve().name, "content_hash": self.content_hash}


def load_teachers(
    runs: Sequence[TeacherRun],
    weight: float,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    dtype: str,
    device: torch.device | str,
) -> Teachers:
    """The models, frozen.

    Args:
        runs: that teach.
        weight: of their mean distribution in the target.
        tokenizer: of the student, with its SID tokens.
        longest: tokens of the longest training row.
        dtype: of the teachers' weights.
        device: of the student.

    Raises:
        ValueError: a teacher numbers its tokens in another way, or its context is too short.
    """
    models = []
    for run in runs:
        theirs = type(tokenizer).from_pretrained(run.model)
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"the teacher {run.run_dir} has another vocabulary than the student; train both "
                "from the same base, or from scratch with one vocab_size, catalogue and dataset"
            )
        model: Any = load_base(str(run.model), dtype)  # transformers wraps `to`
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise ValueError(
                f"the longest row has {longest} tokens, the teacher {run.run_dir} holds {limit}"
            )
        models.append(model.to(device).eval().requires_grad_(False))
    return Teachers(models, weight)
