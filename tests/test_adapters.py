"""LoRA, DoRA, rsLoRA and QLoRA beside trained SID rows, from training to what is served."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, SFTConfig, SFTTrainer

from genrec.adapters import (
    check_four_bit,
    expose_head_bias,
    keep_token_rows_in_fp32,
    load_four_bit,
    logit_gap,
    lora_config,
    merged_into_base,
)
from genrec.decoding.trie import SidTrie
from genrec.modeling import (
    add_sid_tokens,
    encode_rows,
    initialize_from_titles,
    load_base,
    load_model,
    resize_embeddings,
    save_model,
)
from genrec.rewards import prefix_reward
from genrec.rollouts import BeamGRPOTrainer

VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "dora-rslora-qv": {
        "use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "v_proj"],
    },
}  # fmt: skip
RANK, ALPHA = 4, 8


def flat(token_ids: list[list[int]]) -> list[int]:
    return [t for level in token_ids for t in level]


def logits_of(model, ids: list[int]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def extended(tiny, model):
    """A base model with initialised SID rows, its tokenizer, SID map and token ids."""
    semantic_ids, tokenizer = tiny.sids(20), tiny.tokenizer()
    n_old = len(tokenizer)
    token_ids = add_sid_tokens(tokenizer, semantic_ids)
    resize_embeddings(model, tokenizer)
    titles = [f"red wool hat {i}" for i in range(20)]
    initialize_from_titles(model, tokenizer, token_ids, semantic_ids, titles, n_old, 0)
    return semantic_ids, tokenizer, token_ids


def fitted(model, semantic_ids, tokenizer, token_ids, folder: Path, variant: str, **settings):
    """Train two steps, as recipes/sft.py does; the trainer and a row."""
    sids = semantic_ids.sids().to_list()
    prompts = [f"Bought so far, oldest first: {sids[i]}" for i in range(19)]
    rows = encode_rows(tokenizer, prompts, sids[1:], set(flat(token_ids)))
    training = SFTConfig(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", logging_steps=1, disable_tqdm=True, weight_decay=0.1,
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
        **{"learning_rate": 0.05, **settings},
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=lora_config(model, token_ids, RANK, ALPHA, **VARIANTS[variant]),
    )
    expose_head_bias(trainer.model)
    keep_token_rows_in_fp32(trainer.model)
    trainer.train()
    return trainer, rows["input_ids"][0]


def adapter_parameters(peft) -> dict[str, torch.Tensor]:
    return {n: p for n, p in peft.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_from_training_to_serving(tiny, tied: bool, variant: str, tmp_path: Path):
    model = tiny.lm(len(tiny.tokenizer()), tied)
    semantic_ids, tokenizer, token_ids = extended(tiny, model)
    base = {k: v.detach().clone() for k, v in model.state_dict().items()}
    trainer, ids = fitted(model, semantic_ids, tokenizer, token_ids, tmp_path / "run", variant)
    assert [e for e in trainer.state.log_history if "loss" in e]
    peft = trainer.model
    adapted = logits_of(peft, ids)

    # What is trained: adapters on the asked layers, the asked kind, and the SID rows.
    names = adapter_parameters(peft)
    assert any("lora_magnitude_vector" in n for n in names) == ("dora" in variant)
    layers = {n.split(".lora_A")[0].split(".")[-1] for n in names if ".lora_A" in n}
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert layers == ({"q_proj", "v_proj"} if variant.endswith("qv") else every)
    scale = next(m for m in peft.modules() if hasattr(m, "lora_A")).scaling
    assert scale["default"] == (ALPHA / RANK**0.5 if "rslora" in variant else ALPHA / RANK)
    if "dora" in variant:  # magnitudes start as norms of the weights, and learn
        weight = base["model.layers.0.self_attn.q_proj.weight"].norm(dim=1)
        (learnt,) = (p for n, p in names.items() if "0.self_attn.q_proj.lora_magnitude" in n)
        assert 0 < (learnt - weight).abs().max() < 0.5

    # Without the adapter it is the base model, byte for byte.
    reference = tiny.lm(len(tokenizer), tied)
    rows = base["model.embed_tokens.weight"].shape[0]
    reference.resize_token_embeddings(rows, mean_resizing=False)
    reference.load_state_dict(base)
    with peft.disable_adapter():
        off = logits_of(peft, ids)
    assert torch.equal(off, logits_of(reference, ids))
    assert (adapted - off).abs().max() > 1e-3

    # The adapter alone, saved and put on the base again, is the same model.
    peft.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(reference, tmp_path / "adapter")
    assert torch.equal(logits_of(again, ids), adapted)

    # Saved merged: the same logits; SID rows have moved, no other row has.
    about = {"stage": "sft", "base": "tiny"}
    save_model(peft, tokenizer, semantic_ids, tmp_path / "model", about)
    served, loaded_tokenizer, told = load_model(tmp_path / "model", semantic_ids)
    assert (logits_of(served, ids) - adapted).abs().max() < 1e-4
    assert told == {"semantic_ids_sha256": semantic_ids.sha256, **about}
    assert loaded_tokenizer("red hat")["input_ids"] == tokenizer("red hat")["input_ids"]
    sid_rows = torch.zeros(rows, dtype=torch.bool)
    sid_rows[flat(token_ids)] = True
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = (served.state_dict()[name] - base[name]).abs().amax(1)
        assert (moved[~sid_rows] == 0).all(), name
        # Codes that no row holds get no gradient as inputs, yet all of them do in the softmax.
        share = (moved[sid_rows] > 0).float().mean()
        assert share == 1.0 if tied or name == "lm_head.weight" else share > 0.5
    tie = served.get_input_embeddings().weight is served.get_output_embeddings().weight
    assert tie == tied
    # A plain checkpoint that transformers loads without genrec or PEFT.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    assert torch.equal(logits_of(plain, ids), logits_of(served, ids))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "lm_head"], "lora_target_modules='lm_head': its SID rows are trained as they"),
        (["embed_tokens"], "lora_target_modules='embed_tokens': its SID rows"),
        (["qkv"], "'qkv' is no linear layer of this model; choose of down_proj, gate_proj, k_proj"),
        (["all-linear", "q_proj"], "'all-linear' is no linear layer .* or all-linear alone"),
        ([], "lora_target_modules is empty"),
    ],
)
def test_targets_that_the_model_lacks_are_refused(tiny, targets, message: str):
    model = tiny.lm(len(tiny.tokenizer()))
    *_, token_ids = extended(tiny, model)
    with pytest.raises(ValueError, match=message):
        lora_config(model, token_ids, RANK, ALPHA, target_modules=targets)


def test_layers_of_gpt2_are_linear_too():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="choose of c_attn, c_fc, c_proj, or all-linear alone"):
        lora_config(model, [[60, 61]], 4, 8, target_modules=["q_proj"])
    found = get_peft_model(model, lora_config(model, [[60, 61]], 4, 8, target_modules=["c_attn"]))
    assert any("c_attn.lora_A" in name for name, _ in found.named_parameters())


# QLoRA


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def quantized(request, tiny, tmp_path_factory):
    """A 4-bit base with a trained adapter, and the folder of the unquantised base."""
    pytest.importorskip("bitsandbytes", reason="genrec[quant] is not installed")
    folder = tmp_path_factory.mktemp("qlora")
    plain = tiny.lm(len(tiny.tokenizer()), request.param)
    plain.save_pretrained(folder / "base")
    model = load_four_bit(str(folder / "base"), "float32", "cpu")
    made = extended(tiny, model)
    rows = model.get_input_embeddings().weight.detach().clone()
    trainer, ids = fitted(model, *made, folder / "run", "lora", learning_rate=5e-3)
    return trainer.model, made, rows, ids, folder / "base", request.param


def test_a_four_bit_base_keeps_its_rows_and_trains_sid_rows_in_fp32(quantized):
    peft, (_, _, token_ids), rows, _, _, tied = quantized
    layers = [m for m in peft.modules() if type(m).__module__.startswith("bitsandbytes")]
    assert len(layers) == 14  # seven a layer, of two layers; no head
    for layer in layers:
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
    # Evaluation leaves them as they are, on a CPU that could repack them for itself, too.
    before = [layer.weight.clone() for layer in layers]
    with torch.no_grad():
        peft.eval()(torch.tensor([[1, 2, 3]]))
    assert all(torch.equal(m.weight, b) for m, b in zip(layers, before, strict=True))
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in layers)
    trained = adapter_parameters(peft)
    deltas = [p for n, p in trained.items() if "trainable_tokens_delta" in n]
    assert len(deltas) == (1 if tied else 2)
    assert all(p.dtype == torch.float32 for p in deltas)
    assert all(p.dtype == torch.bfloat16 for n, p in trained.items() if "lora_" in n)
    # Finer than bfloat16: what is rounded to it would be another row.
    assert not torch.equal(deltas[0], deltas[0].to(torch.bfloat16).float())
    assert (deltas[0] - rows[flat(token_ids)]).abs().max() > 1e-4


def test_merging_a_four_bit_model_gives_a_plain_checkpoint_near_it(quantized, tmp_path: Path):
    peft, (semantic_ids, tokenizer, token_ids), rows, ids, base, tied = quantized
    adapted = logits_of(peft, ids)
    merged = merged_into_base(peft, tokenizer, str(base), "float32")
    assert torch.equal(logits_of(peft, ids), adapted)  # the trained one is left alone
    # No row but those of SID tokens has moved, those of no token included.
    weight = merged.get_input_embeddings().weight
    kept = torch.ones(len(rows), dtype=torch.bool)
    kept[flat(token_ids)] = False
    assert torch.equal(weight[kept], rows[kept])
    assert (weight is merged.get_output_embeddings().weight) == tied

    # Exactly base + adapter on the layers: computed here by hand.
    name = "model.layers.1.mlp.up_proj"
    plain = load_base(str(base), "float32").get_submodule(name).weight
    layer = peft.base_model.model.get_submodule(name)
    a, b = (getattr(layer, side)["default"].weight.float() for side in ("lora_A", "lora_B"))
    by_hand = plain + ALPHA / RANK * b @ a
    assert torch.allclose(merged.get_submodule(name).weight, by_hand, atol=1e-6)
    assert (by_hand - plain).abs().max() > 1e-4

    # Not the model that was trained, but nearer to it than the base without what was learnt.
    gap = logit_gap(peft, merged, [ids])
    assert 1e-4 < gap["mean_logit"] < gap["max_logit"]
    assert 0 < gap["kl"] < 0.1
    with peft.disable_adapter():
        untrained = logit_gap(peft, merged, [ids])
    assert gap["kl"] < 0.75 * untrained["kl"]
    assert logit_gap(merged, merged, [ids]) == {"max_logit": 0, "mean_logit": 0, "kl": 0, "top1": 1}

    save_model(merged, tokenizer, semantic_ids, tmp_path, {"base": "tiny"})
    served, _, _ = load_model(tmp_path, semantic_ids)
    assert not hasattr(served.config, "quantization_config")
    assert torch.equal(logits_of(served, ids), logits_of(merged, ids))


def test_a_four_bit_adapter_reloads_to_the_same_model(quantized, tmp_path: Path):
    peft, made, rows, ids, base, tied = quantized
    peft.save_pretrained(tmp_path)
    again = load_four_bit(str(base), "float32", "cpu")
    resize_embeddings(again, made[1])
    # Rows of no token are random in each; SID rows come with the adapter.
    n_tokens = len(made[1])
    peft_again = PeftModel.from_pretrained(again, tmp_path)
    for name, trained in adapter_parameters(peft).items():
        assert torch.equal(peft_again.get_parameter(name), trained.float()), name
    # PEFT reads it in fp32, TRL trains its matrices in bfloat16: they multiply a little otherwise.
    gap = logits_of(peft_again, ids)[:, :n_tokens] - logits_of(peft, ids)[:, :n_tokens]
    assert gap.abs().max() < 2e-3


def test_merging_in_place_would_stay_four_bit(quantized):
    """The reason for merging into the unquantised base; delete both when PEFT does otherwise."""
    from copy import deepcopy

    peft = deepcopy(quantized[0])
    merged = peft.merge_and_unload()
    assert any(type(m).__name__ == "Linear4bit" for m in merged.modules())


@pytest.mark.parametrize("lora", [True, False], ids=["new adapter", "all weights"])
@pytest.mark.parametrize("start", ["lora", "dora", "qlora"])
def test_rl_goes_on_from_the_merged_model(tiny, start: str, lora: bool, tmp_path: Path):
    """What sft saved is plain, whatever trained it; the reference of grpo's KL is just that."""
    plain = tiny.lm(len(tiny.tokenizer()))
    if start == "qlora":
        pytest.importorskip("bitsandbytes", reason="genrec[quant] is not installed")
        plain.save_pretrained(tmp_path / "base")
        plain = load_four_bit(str(tmp_path / "base"), "float32", "cpu")
    made = extended(tiny, plain)
    variant = "dora" if start == "dora" else "lora"
    sft, ids = fitted(plain, *made, tmp_path / "sft", variant)
    merged = sft.model
    if start == "qlora":
        merged = merged_into_base(sft.model, made[1], str(tmp_path / "base"), "float32")
    semantic_ids, _, token_ids = made
    save_model(merged, made[1], semantic_ids, tmp_path / "model", {"base": "tiny"})

    model, tokenizer, _ = load_model(tmp_path / "model", semantic_ids, "float32")
    served = logits_of(model, ids)
    sids = semantic_ids.sids().to_list()
    columns = {
        "prompt": [f"Bought so far, oldest first: {sids[i]}" for i in range(8)],
        "target_sid_ids": [
            [level[c] for level, c in zip(token_ids, codes, strict=True)]
            for codes in semantic_ids.codes[8:16].tolist()
        ],
    }
    settings = GRPOConfig(
        output_dir=str(tmp_path / "rl"), max_steps=2, per_device_train_batch_size=16,
        num_generations=4, beta=0.1, learning_rate=1e-2, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, max_completion_length=4,
    )  # fmt: skip
    trainer = BeamGRPOTrainer(
        trie=SidTrie.build(semantic_ids.codes), sid_token_ids=token_ids, beam_width=10,
        model=model, args=settings, reward_funcs=[prefix_reward],
        train_dataset=Dataset.from_dict(columns), processing_class=tokenizer,
        peft_config=lora_config(model, token_ids, RANK, ALPHA) if lora else None,
    )  # fmt: skip
    expose_head_bias(trainer.model)
    trainer.train()
    kl = [e["kl"] for e in trainer.state.log_history if "kl" in e]
    assert abs(kl[0]) < 1e-6 < kl[1]
    trained = logits_of(trainer.model, ids)
    assert (trained - served).abs().max() > 1e-3
    if lora:
        with trainer.model.disable_adapter():
            assert torch.equal(logits_of(trainer.model, ids), served)
    else:
        assert torch.equal(logits_of(trainer.ref_model, ids), served)
    save_model(trainer.model, tokenizer, semantic_ids, tmp_path / "out", {"base": "tiny"})
    again, _, _ = load_model(tmp_path / "out", semantic_ids)
    assert (logits_of(again, ids) - trained).abs().max() < 1e-4


def test_a_quantised_base_is_refused(tiny, tmp_path: Path):
    pytest.importorskip("bitsandbytes", reason="genrec[quant] is not installed")
    tiny.lm(320).save_pretrained(tmp_path / "base")
    load_four_bit(str(tmp_path / "base"), "float32", "cpu").save_pretrained(tmp_path / "nf4")
    with pytest.raises(ValueError, match="nf4 is quantised already; load_in_4bit needs the unquan"):
        load_four_bit(str(tmp_path / "nf4"), "float32", "cpu")


def test_four_bit_settings_that_cannot_work(monkeypatch):
    with pytest.raises(ValueError, match="load_in_4bit needs model_name_or_path"):
        check_four_bit(True, None)
    with pytest.raises(ValueError, match="load_in_4bit needs use_lora"):
        check_four_bit(False, "some/model")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "genrec\[quant\]"'):
        check_four_bit(True, "some/model")


@pytest.mark.parametrize("tied", [True, False])
def test_a_title_index_has_no_rows_of_its_own_to_train(tiny, tied: bool):
    model = get_peft_model(tiny.lm(90, tied), lora_config(tiny.lm(90, tied), [], 4, 8))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
