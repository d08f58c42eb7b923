"""SidHead: columns of a level from hidden states, against the model's own logits."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel

from genrec.decoding import lm_head
from genrec.decoding.beam import NORMALIZERS, normalize
from genrec.decoding.lm_head import SidHead
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie

IDS = torch.tensor([[61, 7, 3], [5, 70, 80]])


def columns(model: Any, sid_ids: list[torch.Tensor], normalizer: Any, last: bool) -> torch.Tensor:
    """From a `SidHead`, (2, 1 or 3, codes)."""
    head = SidHead(model, sid_ids, normalizer)
    with torch.inference_mode():
        states = head.states(last=torch.tensor([2, 0]) if last else None, input_ids=IDS)
        return head.columns(1, states)


def expected(model: Any, sid_ids: list[torch.Tensor], normalizer: Any, last: bool) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(IDS).logits
    if last:
        logits = torch.stack([logits[0, 2], logits[1, 0]]).unsqueeze(1)
    return normalize(logits, sid_ids[1], normalizer)


def granite() -> PreTrainedModel:
    """A model that divides its logits by 8."""
    torch.manual_seed(0)
    return GraniteForCausalLM(
        GraniteConfig(
            vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3, logits_scaling=8.0,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def sid_ids(reference: Any) -> list[torch.Tensor]:
    return [torch.tensor(ids) for ids in reference.sid_token_ids(3)]


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("kind", ["qwen3", "llama", "granite"])
def test_columns_are_those_of_the_logits(
    reference: Any, sid_ids: list[torch.Tensor], kind: str, normalizer: Any, last: bool
):
    model = granite() if kind == "granite" else reference.tiny_model(kind).eval()
    assert SidHead(model, sid_ids, normalizer).split == (kind != "granite")
    made, true = (
        columns(model, sid_ids, normalizer, last),
        expected(model, sid_ids, normalizer, last),
    )
    torch.testing.assert_close(made, true, atol=2e-5, rtol=1e-5)


def test_the_vocabulary_is_summed_in_blocks(
    reference: Any, sid_ids: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    model = reference.tiny_model("llama").eval()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(96))
    whole = columns(model, sid_ids, "full", False)
    monkeypatch.setattr(lm_head, "_LOGITS_AT_ONCE", 100)  # a row at a time
    torch.testing.assert_close(columns(model, sid_ids, "full", False), whole)
    torch.testing.assert_close(whole, expected(model, sid_ids, "full", False))


@pytest.mark.parametrize(("head", "split"), [(False, True), (True, False)])
def test_adapters(reference: Any, sid_ids: list[torch.Tensor], head: bool, split: bool):
    """Adapters inside the layers leave the head alone; trained token rows wrap it."""
    model = deepcopy(reference.tiny_model())
    more = {"trainable_token_indices": [1, 5, 60]} if head else {}
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
            init_lora_weights=False, **more,
        ),
    ).eval()  # fmt: skip
    assert SidHead(adapted, sid_ids, "full").split == split
    plain = expected(reference.tiny_model(), sid_ids, "full", True)
    made = columns(adapted, sid_ids, "full", True)
    torch.testing.assert_close(made, expected(adapted, sid_ids, "full", True))
    assert (made - plain).abs().max() > 0.1  # the adapter counts


def test_half_precision_columns_do_not_tie(reference: Any, sid_ids: list[torch.Tensor]):
    model = deepcopy(reference.tiny_model()).bfloat16().eval()
    with torch.no_grad():  # rows that differ by less than bfloat16 logits can tell
        rows = model.get_input_embeddings().weight
        rows[sid_ids[1]] = rows[sid_ids[1][0]] + 0.004 * torch.randn(6, 32).bfloat16()
    made = columns(model, sid_ids, "level", True)
    halves = expected(model, sid_ids, "level", True)
    assert made.dtype == torch.float32 and len(made[0].unique()) == 6
    assert len(halves[0].unique()) < 6
    assert (made - halves).abs().max() < 0.3


@pytest.mark.parametrize("tokens", [10, 1000])
def test_half_precision_log_probabilities_are_none_above_zero(
    reference: Any, sid_ids: list[torch.Tensor], tokens: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lm_head, "_TOKENS_AT_ONCE", tokens)
    model = deepcopy(reference.tiny_model())
    with torch.no_grad():  # peaked: most of the mass on one code
        model.get_input_embeddings().weight.mul_(4)
    model = model.bfloat16().eval()
    head = SidHead(model, sid_ids, "full")
    ids = torch.randint(0, 96, (200, 5), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        states = head.states(last=torch.full((200,), 4), input_ids=ids)
        made = head.columns(1, states)
        true = (states.float() @ model.lm_head.weight.float().T).log_softmax(-1)[..., sid_ids[1]]
    assert head.split and float(made.max()) <= 1e-5
    torch.testing.assert_close(made, true, atol=1e-4, rtol=1e-5)


def test_scaled_logits_are_searched_right(reference: Any):
    model, ids = granite(), reference.sid_token_ids(3)
    codes = reference.random_codes(3, 30, 3)
    prompts = reference.random_prompts(3, 4)
    engine = TorchEngine(model, SidTrie.build(codes), ids, 0)
    result = engine.search(prompts, 5, len(codes))
    truth = reference.exhaustive(model, prompts, codes, ids, "full").sum(-1)
    reference.assert_same_lists(result.items, result.scores, truth, 5e-5)
    assert np.abs(engine.score(prompts, result.items).sum(-1) - result.scores).max() < 5e-5
