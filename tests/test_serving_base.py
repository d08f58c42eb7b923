"""A base with SID rows and an adapter apart: the same model as the merged one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from genrec.adapters import lora_config
from genrec.bundle.writing import ExportSettings, write_bundle
from genrec.modeling import add_sid_tokens, resize_embeddings
from genrec.recommend import Recommender

TOLERANCE = 1e-3


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def trained(request, tiny, tmp_path_factory) -> tuple[Path, Path]:
    """A run whose model is base and adapter merged, and the base."""
    folder = tmp_path_factory.mktemp("lora")
    shop, tokenizer = tiny.shop(), tiny.tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(  # vLLM's CPU kernels need heads of 32
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        initializer_range=0.25, tie_word_embeddings=request.param, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32")
    token_ids = add_sid_tokens(tokenizer, shop.semantic_ids)
    resize_embeddings(model, tokenizer)
    adapted = get_peft_model(model, lora_config(model, token_ids, 4, 8))
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # LoRA and SID rows, as if they had learned much
            parameter.data += 0.3 * torch.randn_like(parameter)
    (folder / "run").mkdir()
    adapted.save_pretrained(folder / "adapter")
    merged = adapted.merge_and_unload()
    tiny.save_run(folder / "run", shop, merged, tokenizer, normalizer="trie")
    (folder / "adapter").rename(folder / "run" / "sft" / "adapter")
    return folder / "run", folder / "base"


def assert_same_lists(ours: Recommender, theirs: Recommender) -> None:
    ids = ours.catalog["item_id"].to_list()
    for history in ([], ids[:1], ids[3:9]):
        first, second = ours.recommend(history), theirs.recommend(history)
        assert [r.item_id for r in first] == [r.item_id for r in second]
        assert [r.score for r in first] == pytest.approx([r.score for r in second], abs=TOLERANCE)


def test_base_and_adapter_are_the_merged_model(trained, tmp_path: Path):
    run, base = trained
    bundle = write_bundle(run, tmp_path / "b", ExportSettings(serving_base=str(base)))
    assert_same_lists(Recommender.load(run), Recommender.load(bundle))
    stored = AutoModelForCausalLM.from_pretrained(bundle / "model").state_dict()
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    without = Recommender.load(bundle)
    without.engine.model.load_state_dict(stored)
    assert "adapter/" in (bundle / "README.md").read_text()
    with pytest.raises(AssertionError):  # the adapter does say something
        assert_same_lists(Recommender.load(run), without)
    layers = [name for name in plain if ".layers." in name]
    assert layers and all(torch.equal(stored[name], plain[name]) for name in layers)
    with pytest.raises(ValueError, match="keeps its adapter apart"):
        Recommender.load(bundle, engine="vllm-inworker")


def test_what_a_serving_base_refuses(trained, tmp_path: Path):
    run, base = trained
    other = AutoModelForCausalLM.from_pretrained(base)
    other.model.layers[0].mlp.up_proj.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"not the run's model \(.*up_proj.*differs"):
        write_bundle(run, tmp_path / "b", ExportSettings(serving_base=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="leave dtype or serving_base out"):
        write_bundle(run, tmp_path / "b", ExportSettings(dtype="bfloat16", serving_base=str(base)))
    (run / "sft" / "adapter").rename(tmp_path / "away")
    try:
        with pytest.raises(ValueError, match="holds no adapter"):
            write_bundle(run, tmp_path / "b", ExportSettings(serving_base=str(base)))
    finally:
        (tmp_path / "away").rename(run / "sft" / "adapter")
    assert not (tmp_path / "b").exists()


@pytest.mark.vllm
def test_vllm_puts_the_adapter_on_its_base(trained, tmp_path: Path):
    pytest.importorskip("vllm")
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    run, base = trained
    bundle = write_bundle(run, tmp_path / "b", ExportSettings(serving_base=str(base)))
    theirs = Recommender.load(bundle, engine="vllm", engine_options={"enforce_eager": True})
    try:
        assert_same_lists(Recommender.load(run), theirs)
    finally:
        theirs.engine.llm.llm_engine.engine_core.shutdown()
