"""Weights split over processes (FSDP, DeepSpeed's ZeRO-3): what works there and what does not.

Validation, SID rows of adapters, and merging read whole weights; on a shard they would measure and
write garbage. Full fine-tuning works on shards: its weights are gathered once, to be saved. DDP and
ZeRO-2 keep all weights on each process, and everything works there as on one. No training of this
kind has been run yet: the refusals are tested, and what is gathered, on one process.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config


def sharding_of(training: Any) -> str | None:
    """How a training's settings, or its launcher's, split weights: "FSDP", "ZeRO-3" or None.

    Args:
        training: a Transformers or TRL training config.
    """
    plugin = getattr(training, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        return "ZeRO-3"
    launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1", "yes")
    return "FSDP" if launched or getattr(training, "fsdp", None) else None


def check_sft(
    training: Any,
    use_lora: bool,
    eval_rows: int,
    loss_over: str,
    taught: bool = False,
    averaged: bool = False,
) -> None:
    """Refuse settings of sft that need whole weights where there are none, before anything is read.

    Raises:
        ValueError: adapters or validation on split weights; a loss whose head ZeRO-3 would not
            gather; teachers, who would be split as well; an average of the weights.
    """
    kind = sharding_of(training)
    if kind and averaged:
        raise ValueError(
            f"ema_decay under {kind}: each process holds shards alone, whose average nothing puts "
            "together; leave it out, or launch with ddp.yaml or deepspeed-zero2.yaml"
        )
    if kind and taught:
        raise ValueError(
            f"teachers under {kind}: their weights are read whole; launch with ddp.yaml or "
            "deepspeed-zero2.yaml"
        )
    if kind == "ZeRO-3" and loss_over != "vocabulary":
        raise ValueError(
            f"loss_over={loss_over} under ZeRO-3: the head is split there and only TRL's own loss "
            "gathers it; use loss_over=vocabulary, or FSDP2"
        )
    if kind and use_lora:
        raise ValueError(
            f"use_lora under {kind}: SID rows are trained as single rows of the embedding, which "
            "is split there; launch with ddp.yaml or deepspeed-zero2.yaml (4-bit bases save more "
            "memory than splitting), or fine-tune all weights"
        )
    if kind and eval_rows:
        raise ValueError(
            f"eval_rows={eval_rows} under {kind}: validation searches on one process, which holds "
            "only a part of the weights; set eval_rows to 0 and evaluate the saved model"
        )


def check_grpo(training: Any) -> None:
    """Refuse reinforcement learning on split weights: rollouts search on whole ones.

    Raises:
        ValueError: the weights would be split.
    """
    if kind := sharding_of(training):
        raise ValueError(
            f"grpo under {kind}: rollouts search with whole weights, which no process holds there; "
            "launch with ddp.yaml or deepspeed-zero2.yaml"
        )


def load_whole(training: Any) -> None:
    """Have models built whole from here on, although ZeRO-3 splits them: SID rows are written."""
    if sharding_of(training) == "ZeRO-3":
        unset_hf_deepspeed_config()


def split_again(training: Any) -> None:
    """Undo `load_whole`, before the trainer is built."""
    if sharding_of(training) == "ZeRO-3":
        set_hf_deepspeed_config(training.deepspeed_plugin.dschf)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether this process holds only a part of some parameter."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def require_whole(model: torch.nn.Module, what: str) -> None:
    """Raise ValueError on a model whose weights are split over processes.

    Args:
        model: any.
        what: needs them whole; opens the message.
    """
    if is_sharded(model):
        raise ValueError(
            f"{what} needs whole weights, and this model's are split over processes (FSDP or "
            "ZeRO-3); launch with ddp.yaml or deepspeed-zero2.yaml"
        )


def gathered(trainer: Any) -> dict[str, torch.Tensor] | None:
    """Whole weights of a trainer's model for the main process; None where they are whole anyway.

    All processes have to call it.
    """
    if not is_sharded(trainer.model):
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)
