"""Vectors pooled from a language model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from genrec.embedding.lm_pooling import lm_vectors, pool

TEXTS = ["red wool hat", "a", "", "steel tea pot and a very long oak tea tray", "  ", "cork mat"]


@pytest.fixture(scope="module", params=["causal", "encoder"])
def model_folder(request, tiny, tmp_path_factory) -> Path:
    """A tiny Qwen3, or a tiny BERT, with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = tiny.tokenizer()
    if request.param == "causal":
        tiny.lm(len(tokenizer)).save_pretrained(folder)
    else:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        config = BertConfig(
            vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=256,
            initializer_range=0.5, **shape,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
    # A tokenizer that prefers the left must not matter.
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    return folder


def one_by_one(folder: Path, pooling: str, prompt: str = "", limit: int = 512) -> np.ndarray:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    rows = []
    for text in TEXTS:
        ids = tokenizer(prompt + text)["input_ids"][:limit]
        if not text.strip():
            rows.append(np.zeros(32))
            continue
        with torch.no_grad():
            states = model.eval()(input_ids=torch.tensor([ids])).last_hidden_state[0]
        rows.append((states.mean(0) if pooling == "mean" else states[-1]).numpy())
    return np.array(rows)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_equal_to_a_loop_without_batches(model_folder: Path, pooling: str):
    expected = one_by_one(model_folder, pooling)
    for batch_size in (1, 2, 16):
        found = lm_vectors(
            TEXTS, str(model_folder), pooling, batch_size, device="cpu", normalize=False
        )
        assert found.dtype == np.float32
        assert found == pytest.approx(expected, abs=2e-5)
    assert np.abs(expected[0] - expected[3]).max() > 0.01  # texts do differ
    unit = lm_vectors(TEXTS, str(model_folder), pooling, device="cpu")
    length = np.linalg.norm(unit, axis=1)
    assert length == pytest.approx(np.array([1, 1, 0, 1, 0, 1]), abs=1e-5)


def test_prompt_and_limit_change_what_is_read(model_folder: Path):
    kwargs = {"device": "cpu", "normalize": False}
    found = lm_vectors(TEXTS, str(model_folder), "last", prompt="item: ", max_length=9, **kwargs)
    assert found == pytest.approx(one_by_one(model_folder, "last", "item: ", 9), abs=2e-5)
    half = lm_vectors(TEXTS, str(model_folder), dtype="bfloat16", **kwargs)
    assert half.dtype == np.float32
    whole = lm_vectors(TEXTS, str(model_folder), **kwargs)
    assert 0 < np.abs(half - whole).max() < 0.3


def test_padding_on_either_side_is_left_out():
    states = torch.arange(12.0).reshape(2, 3, 2)
    states[0, 0] = states[1, 2] = torch.nan  # padding
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    assert pool(states, mask, "mean").tolist() == [[3, 4], [7, 8]]
    assert pool(states, mask, "last").tolist() == [[4, 5], [8, 9]]
    assert pool(states.bfloat16(), mask, "mean").dtype == torch.float32


def test_mistakes_are_named(model_folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="pooling='max' is not known"):
        lm_vectors(TEXTS, str(model_folder), "max")
    with pytest.raises(ValueError, match="max_length=300 exceeds the 256 tokens"):
        lm_vectors(TEXTS, str(model_folder), max_length=300, device="cpu")
    with pytest.raises(ValueError, match="absent' can't be loaded"):
        lm_vectors(TEXTS, str(tmp_path / "absent"), device="cpu")
