"""A serving base: the base model with the run's SID rows, and the LoRA adapter kept apart.

Trained SID rows can't ride in an adapter that vLLM loads, and the layers' LoRA can. So the rows are
written into the base, whose other weights stay as they were, and the adapter is stored without
them: base and adapter together are the run's merged model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from genrec.artifacts import read_json, write_json
from genrec.modeling import load_base, resize_embeddings

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NEAR = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative; half precision rounds the merger


def write_serving_base(merged: Path, adapter: Path, base: str, target: Path, apart: Path) -> None:
    """Write base and adapter.

    Args:
        merged: the run's model: what both together have to be.
        adapter: the run's adapter.
        base: folder or hub name of the model that the adapter was trained on.
        target: folder that gets the base's weights, beside the tokenizer that is there.
        apart: folder that gets the adapter, in PEFT's format.

    Raises:
        ValueError: the run has no adapter, one that vLLM can't load, or another base.
    """
    if not (adapter / _CONFIG).is_file():
        raise ValueError(
            f"{adapter} holds no adapter, since all weights were trained; leave serving_base out"
        )
    config = read_json(adapter / _CONFIG)
    if config.get("use_dora") or config.get("modules_to_save"):
        raise ValueError(
            f"{adapter} uses DoRA or trains whole modules, which vLLM doesn't load as an adapter; "
            "leave serving_base out: the merged model is exported"
        )
    served = load_base(str(merged), "auto")
    model = load_base(base, str(served.dtype).removeprefix("torch."))
    resize_embeddings(model, AutoTokenizer.from_pretrained(merged))
    _copy_rows(served, model, base)
    model.save_pretrained(str(target))
    apart.mkdir(parents=True)
    weights = load_file(adapter / _WEIGHTS)
    save_file({n: w for n, w in weights.items() if ".lora_" in n}, apart / _WEIGHTS)
    write_json(apart / _CONFIG, {**config, "trainable_token_indices": None})
    _check_same(with_adapter(model, apart), served, base)


def with_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with an adapter merged in, in place."""
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return merged.eval()


@torch.no_grad()
def _copy_rows(served: PreTrainedModel, model: PreTrainedModel, base: str) -> None:
    """Take over the embedding and the head, which no LoRA touches."""
    modules: list[tuple[Any, Any]] = [
        (model.get_input_embeddings(), served.get_input_embeddings()),
        (model.get_output_embeddings(), served.get_output_embeddings()),
    ]
    for ours, theirs in modules:
        if ours.weight.shape != theirs.weight.shape:
            raise ValueError(
                f"{base} has an embedding of {tuple(ours.weight.shape)}, the run's model one of "
                f"{tuple(theirs.weight.shape)}; name the model that the run was fine-tuned from"
            )
        ours.weight.copy_(theirs.weight)


def _check_same(made: PreTrainedModel, served: PreTrainedModel, base: str) -> None:
    """Raise ValueError unless base and adapter together are the served model."""
    true = served.state_dict()
    if made.state_dict().keys() != true.keys():
        raise ValueError(f"{base} is another kind of model than the run's; name its base")
    for name, weight in made.state_dict().items():
        near = _NEAR.get(weight.dtype, 2e-2) * float(true[name].abs().max())
        if weight.shape != true[name].shape or float((weight - true[name]).abs().max()) > near:
            raise ValueError(
                f"{base} with the adapter is not the run's model ({name} differs); name the model "
                "that the adapter was trained on: the run's --model_name_or_path, or for grpo the "
                "sft/model of its run"
            )
