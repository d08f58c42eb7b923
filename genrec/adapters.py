"""Adapters: LoRA and its variants beside trainable SID rows, on full or 4-bit base models.

Only the SID rows of the embedding (and of an untied head) are trained, never the whole matrix, so
an adapter stays small and every text token keeps its row. What is served is always a plain
checkpoint: an adapter is merged into the base in place, or, where the base was quantised for
training, into the base as it was before (merging into 4-bit weights would round the result).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, cast

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from genrec.modeling import load_base, resize_embeddings

ALL_LINEAR = "all-linear"
QUANTIZATION = "nf4"  # 4-bit normal floats, the quantisation constants quantised once more


def lora_config(
    model: PreTrainedModel,
    token_ids: list[list[int]],
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    *,
    use_dora: bool = False,
    use_rslora: bool = False,
    target_modules: Sequence[str] = (ALL_LINEAR,),
) -> LoraConfig:
    """LoRA on linear layers plus the SID rows themselves as trainable tokens.

    Args:
        model: with the SID tokens, plain or 4-bit.
        token_ids: of the SID tokens, per level (codebook_size,); none for a title index.
        rank: of the adapters.
        alpha: scale; updates are multiplied by alpha / rank.
        dropout: on the adapters' inputs.
        use_dora: learn a magnitude per output beside the direction (Liu et al. 2024, DoRA).
        use_rslora: scale by alpha / √rank instead (Kalajdzievski 2023), for high ranks.
        target_modules: last parts of the layers' names (q_proj, v_proj, …), or all-linear alone.

    Raises:
        ValueError: a target that the model doesn't have, or one whose rows are trained already.
    """
    flat = [token for ids in token_ids for token in ids]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name.split(".")[-1] for name, module in model.named_modules()}
    rows = {names[id(embedding)], names[id(head)]}
    tied = head.weight is embedding.weight
    trained = flat if tied else {names[id(embedding)]: flat, names[id(head)]: flat}
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=use_dora,
        use_rslora=use_rslora,
        target_modules=_targets(model, list(target_modules), rows),
        trainable_token_indices=trained if flat else None,
        task_type="CAUSAL_LM",
    )


def _targets(model: PreTrainedModel, asked: list[str], rows: set[str]) -> str | list[str]:
    """`asked` in PEFT's form, if the model has such layers."""
    if asked == [ALL_LINEAR]:
        return ALL_LINEAR
    kinds = (nn.Linear, Conv1D)  # GPT-2's layers are the latter
    linear = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, kinds)}
    linear -= rows
    for name in asked:
        if name in rows:
            raise ValueError(
                f"lora_target_modules={name!r}: its SID rows are trained as they are; leave it out"
            )
        if name not in linear:
            raise ValueError(
                f"lora_target_modules={name!r} is no linear layer of this model; choose of "
                f"{', '.join(sorted(linear))}, or {ALL_LINEAR} alone"
            )
    if not asked:
        raise ValueError(f"lora_target_modules is empty; name layers, or {ALL_LINEAR}")
    return asked


def expose_head_bias(model: Any) -> None:
    """Give a wrapped LM head the ``bias`` attribute that TRL's fused head reads directly.

    PEFT's token wrapper has none. Call it once the trainer is built; without a wrapper it does
    nothing.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias") and hasattr(head, "original_module"):
        head.bias = getattr(head.original_module, "bias", None)


def keep_token_rows_in_fp32(model: nn.Module) -> None:
    """Put trainable SID rows of a fresh adapter back to what they start as, in fp32.

    TRL casts all that is trained on a quantised base to bfloat16. A row is a weight and no small
    update of one: with three digits, most of Adam's steps on it would be rounded away. Call it once
    the trainer is built, before it trains or resumes.
    """
    for module in model.modules():
        deltas = getattr(module, "trainable_tokens_delta", None)
        if isinstance(deltas, nn.ParameterDict):
            originals = cast(Any, module).trainable_tokens_original
            for name, row in deltas.items():
                row.data = originals[name].to(row.device, torch.float32, copy=True)


# 4-bit bases


def check_four_bit(use_lora: bool, model_name_or_path: str | None) -> None:
    """Refuse 4-bit training that can't work, before anything is read.

    Raises:
        ValueError: without a pretrained model or without adapters.
        ImportError: bitsandbytes is missing.
    """
    if not model_name_or_path:
        raise ValueError(
            "load_in_4bit needs model_name_or_path: a model from scratch has no weights to quantise"
        )
    if not use_lora:
        raise ValueError("load_in_4bit needs use_lora: 4-bit weights can't be trained themselves")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            'load_in_4bit needs bitsandbytes, which is not installed; run: pip install "genrec['
            'quant]"'
        )


def load_four_bit(name_or_path: str, dtype: str, device: str) -> PreTrainedModel:
    """A causal LM with its linear layers in NF4, double quantised; embeddings and head stay.

    QLoRA's base (Dettmers et al. 2023).

    Args:
        name_or_path: folder or hub name of an unquantised model.
        dtype: "float32", "bfloat16", "float16" or "auto": of the parts that stay, and what 4-bit
            weights are expanded to for computing.
        device: where it goes, "cuda:0", "cpu", …

    Raises:
        ValueError: the model is quantised already.
    """
    config = AutoConfig.from_pretrained(name_or_path)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{name_or_path} is quantised already; load_in_4bit needs the unquantised model, which "
            "the adapter is merged into at the end"
        )
    compute = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=QUANTIZATION,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    model = load_base(
        name_or_path, dtype, quantization_config=quantization, device_map={"": device}
    )
    for module in model.modules():
        # On CPUs with AVX512-BF16 the first pass in eval mode, such as a validation, would repack
        # the weights: rounded once more, without gradients from then on, and not for all shapes.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast(Any, module).support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def merged_into_base(
    trained: PeftModel, tokenizer: PreTrainedTokenizerBase, name_or_path: str, dtype: str
) -> PreTrainedModel:
    """The adapter of a quantised base, merged into a fresh copy of the base without quantisation.

    The result is no exact copy of what was trained: the adapter learned beside 4-bit weights and
    now sits on those that they were made of. Measure both (see `logit_gap`).

    Args:
        trained: adapter on `load_four_bit`'s model; left as it is.
        tokenizer: with the SID tokens.
        name_or_path: the same model.
        dtype: of the result, as `load_four_bit` takes it.
    """
    base = load_base(name_or_path, dtype).to(cast(Any, trained.device))
    resize_embeddings(base, tokenizer)
    # Rows of no token (padding) are random in either model, yet count in the full softmax.
    for ours, theirs in (
        (base.get_input_embeddings(), trained.get_input_embeddings()),
        (base.get_output_embeddings(), trained.get_output_embeddings()),
    ):
        ours.weight.copy_(getattr(theirs, "original_module", theirs).weight)
    config = deepcopy(trained.peft_config["default"])
    target = get_peft_model(base, config)
    state = get_peft_model_state_dict(trained, save_embedding_layers=False)
    set_peft_model_state_dict(target, state)
    return cast(PreTrainedModel, target.merge_and_unload()).eval()


@torch.no_grad()
def logit_gap(
    trained: nn.Module, merged: nn.Module, prompts: Sequence[Sequence[int]]
) -> dict[str, float]:
    """How far two models' next-token distributions lie apart.

    Args:
        trained: adapter on a quantised base.
        merged: what is served.
        prompts: token ids, one or more each.

    Returns:
        Over all positions of the prompts: ``max_logit`` and ``mean_logit``, absolute differences;
        ``kl``, mean KL(trained ‖ merged) in nats; ``top1``, the share with the same best token.
    """
    worst, total, kl, same, logits, positions = 0.0, 0.0, 0.0, 0, 0, 0
    modes = [(model, model.training) for model in (trained, merged)]
    for model, _ in modes:
        model.eval()
    for ids in prompts:
        a, b = (
            model(torch.tensor([list(ids)], device=next(model.parameters()).device))
            .logits[0]
            .float()
            .cpu()
            for model, _ in modes
        )  # (T, V) each
        gap = (a - b).abs()
        worst, total = max(worst, float(gap.max())), total + float(gap.sum())
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        kl += float((log_a.exp() * (log_a - log_b)).sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        logits, positions = logits + gap.numel(), positions + len(a)
    for model, was_training in modes:
        model.train(was_training)
    return {
        "max_logit": worst,
        "mean_logit": total / logits,
        "kl": kl / positions,
        "top1": same / positions,
    }
