"""SID tokens, their rows, encoded rows, and model folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from genrec import modeling
from genrec.modeling import (
    ABOUT,
    RESIZED,
    add_sid_tokens,
    base_tokenizer,
    encode_prompts,
    encode_rows,
    initialize_around_mean,
    initialize_from_codebooks,
    initialize_from_titles,
    load_base,
    load_model,
    resize_embeddings,
    save_model,
    sid_token_ids,
)


def flat(token_ids: list[list[int]]) -> list[int]:
    return [t for level in token_ids for t in level]


def logits_of(model, ids: list[int]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


# SID tokens


def test_sid_tokens_are_added_once_each_a_single_ordinary_id(tiny):
    semantic_ids, tokenizer = tiny.sids(10), tiny.tokenizer()
    n_old = len(tokenizer)
    token_ids = add_sid_tokens(tokenizer, semantic_ids)
    assert flat(token_ids) == list(range(n_old, n_old + 12))
    assert add_sid_tokens(tokenizer, semantic_ids) == token_ids and len(tokenizer) == n_old + 12
    for level, ids in enumerate(token_ids):
        for code, token in enumerate(ids):
            assert tokenizer.convert_ids_to_tokens(token) == f"<{'abc'[level]}_{code}>"
    assert not set(flat(token_ids)) & set(tokenizer.all_special_ids)
    sid = semantic_ids.sids()[0]
    ids = tokenizer(f"x {sid}y")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"x {sid}y"


def test_sid_tokens_survive_saving(tiny, tmp_path: Path):
    semantic_ids, tokenizer = tiny.sids(10), tiny.tokenizer()
    token_ids = add_sid_tokens(tokenizer, semantic_ids)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert sid_token_ids(loaded, semantic_ids) == token_ids
    text = f"red hat {semantic_ids.sids()[3]}{semantic_ids.sids()[0]} ‹a_1›"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_tokenizer_without_the_tokens_is_refused(tiny):
    tokenizer = tiny.tokenizer()
    with pytest.raises(ValueError, match=r"no token <a_0> \(12 of 12 SID tokens are missing\)"):
        sid_token_ids(tokenizer, tiny.sids(10))
    add_sid_tokens(tokenizer, tiny.sids(10))
    with pytest.raises(ValueError, match=r"no token <a_4> \(3 of 15 SID tokens"):
        sid_token_ids(tokenizer, tiny.sids(10, size=5))


def test_text_that_looks_like_a_sid_token_is_none(tiny):
    tokenizer = tiny.tokenizer()
    ids = set(flat(add_sid_tokens(tokenizer, tiny.sids(10))))
    for text in ("<A_1>", "<a_1 >", "< a_1>", "<a_01>", "<a_4>", "＜a_1＞", "<d_0>"):
        assert not ids & set(tokenizer(text)["input_ids"]), text


# Embedding size


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_grows_in_blocks_and_never_shrinks(tiny, tied: bool):
    tokenizer = tiny.tokenizer()
    n_old = len(tokenizer)
    small, large = tiny.lm(n_old, tied), tiny.lm(1000, tied)
    before = small.get_input_embeddings().weight.detach().clone()
    add_sid_tokens(tokenizer, tiny.sids(10))
    resize_embeddings(small, tokenizer)
    rows = -(-len(tokenizer) // 64) * 64
    assert small.get_input_embeddings().weight.shape[0] == rows == small.config.vocab_size
    assert small.get_output_embeddings().weight.shape[0] == rows
    assert torch.equal(small.get_input_embeddings().weight[:n_old], before)
    resize_embeddings(large, tokenizer)  # as Qwen's: more rows than the tokenizer has tokens
    assert large.get_input_embeddings().weight.shape[0] == 1000 == large.config.vocab_size
    tie = small.get_input_embeddings().weight is small.get_output_embeddings().weight
    assert tie == tied


# Initial rows


def initialised(tiny, how: str, tied: bool, size: int = 8):
    """A model with SID rows, its weights before, and the ids; codes 6 and 7 are of no item."""
    semantic_ids, tokenizer = tiny.sids(40, size=6), tiny.tokenizer()
    semantic_ids = type(semantic_ids)(semantic_ids.item_ids, semantic_ids.codes, (size,) * 3)
    n_old = len(tokenizer)
    model = tiny.lm(n_old, tied)
    with torch.no_grad():  # a mean and a spread that differ per dimension, as in real models
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight += 0.3 * torch.randn(weight.shape[1])
    token_ids = add_sid_tokens(tokenizer, semantic_ids)
    resize_embeddings(model, tokenizer)
    matrices = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    before = [m.detach().clone() for m in matrices]
    if how == "codebooks":
        # Far from centred, as centroids of a skewed catalogue are.
        codebooks = (np.random.default_rng(0).normal(size=(3, size, 8)) + 5).astype(np.float32)
        initialize_from_codebooks(model, token_ids, codebooks, n_old, seed=0)
    elif how == "random":
        initialize_around_mean(model, token_ids, n_old, seed=0)
    else:
        titles = [f"red wool hat {i}" if i % 2 else f"steel tea pot {i}" for i in range(40)]
        initialize_from_titles(model, tokenizer, token_ids, semantic_ids, titles, n_old, seed=0)
    return matrices, before, token_ids, n_old


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["codebooks", "titles", "random"])
def test_new_rows_differ_and_match_the_old_ones(tiny, how: str, tied: bool):
    matrices, before, token_ids, n_old = initialised(tiny, how, tied)
    for weight, was in zip(matrices, before, strict=True):
        assert torch.equal(weight[:n_old], was[:n_old])
        assert torch.equal(weight[n_old + 24 :], was[n_old + 24 :])
        old = was[:n_old]
        for ids in token_ids:
            rows = weight[ids].detach()
            assert torch.isfinite(rows).all()
            assert torch.pdist(rows).min() > 0.1 * torch.pdist(old).mean()
            assert (rows.mean(0) - old.mean(0)).abs().max() < 1e-4
            spread = (rows - rows.mean(0)).std() / (old - old.mean(0)).std()
            assert 0.8 < spread < 1.25
    assert (matrices[0] is matrices[1]) == tied


def test_no_title_row_is_louder_than_the_others(tiny):
    """Popular codes must not start with larger rows than rare ones."""
    semantic_ids = tiny.sids(40, size=6)
    codes = semantic_ids.codes.copy()
    every = np.array([c for c in np.ndindex(6, 6, 6) if c[0] == 0])[:35]
    codes[:35] = every  # code 0 has most of the items
    codes[35:] = [[1 + i, i, i] for i in range(5)]
    semantic_ids = type(semantic_ids)(semantic_ids.item_ids, codes, (6,) * 3)
    tokenizer = tiny.tokenizer()
    n_old = len(tokenizer)
    model = tiny.lm(n_old)
    token_ids = add_sid_tokens(tokenizer, semantic_ids)
    resize_embeddings(model, tokenizer)
    titles = [f"red wool hat no {i}" for i in range(40)]
    initialize_from_titles(model, tokenizer, token_ids, semantic_ids, titles, n_old, seed=0)
    norms = model.get_input_embeddings().weight[token_ids[0]].detach().norm(dim=1)
    assert norms.max() < 2 * norms.median()


def test_close_centroids_start_close(tiny):
    matrices, _, token_ids, n_old = initialised(tiny, "codebooks", True)
    codebooks = np.random.default_rng(0).normal(size=(3, 8, 8)) + 5
    for level, ids in enumerate(token_ids):
        made = torch.pdist(matrices[0][ids].detach())
        true = torch.pdist(torch.from_numpy(codebooks[level]))
        assert torch.corrcoef(torch.stack([made.double(), true]))[0, 1] > 0.99


def test_codes_whose_items_have_the_same_words_start_close(tiny):
    semantic_ids = tiny.sids(40, size=6)
    tokenizer = tiny.tokenizer()
    n_old = len(tokenizer)
    model = tiny.lm(n_old)
    token_ids = add_sid_tokens(tokenizer, semantic_ids)
    resize_embeddings(model, tokenizer)
    titles = ["red wool hat" if c < 3 else "steel tea pot" for c in semantic_ids.codes[:, 0]]
    initialize_from_titles(model, tokenizer, token_ids, semantic_ids, titles, n_old, seed=0)
    rows = model.get_input_embeddings().weight[token_ids[0]].detach()
    distance = torch.cdist(rows, rows)
    assert distance[:3, :3].max() < distance[:3, 3:].min()


def test_rows_as_transformers_resize_leaves_them(tiny):
    """What the other ways are compared with is what transformers does."""
    tokenizer, semantic_ids = tiny.tokenizer(), tiny.sids(40, size=8)
    n_old = len(tokenizer)
    theirs, ours = tiny.lm(n_old), tiny.lm(n_old)
    with torch.no_grad():
        for model in (theirs, ours):
            model.get_input_embeddings().weight += torch.linspace(0, 1, 1)
    token_ids = add_sid_tokens(tokenizer, semantic_ids)
    theirs.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    resize_embeddings(ours, tokenizer)
    initialize_around_mean(ours, token_ids, n_old, 0, RESIZED)
    flat = [token for level in token_ids for token in level]
    a, b = (m.get_input_embeddings().weight[flat].detach() for m in (theirs, ours))
    assert (a.mean(0) - b.mean(0)).abs().max() < 1e-4
    spread = (b - b.mean(0)).std() / (a - a.mean(0)).std()
    assert 0.5 < spread < 2
    assert torch.pdist(b).max() < 1e-3  # all alike


def test_a_model_that_is_nowhere_is_named(tiny, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for load in (lambda n: load_base(n, "float32"), lambda n: base_tokenizer(n, tiny.sids(10))):
        for name in (str(tmp_path / "qwen"), "Qwen/not-here"):
            with pytest.raises(ValueError, match=f"{name} can't be loaded"):
                load(name)


@pytest.mark.parametrize("how", ["codebooks", "titles"])
def test_initial_rows_are_a_function_of_the_seed(tiny, how: str):
    a, b = (initialised(tiny, how, True)[0][0] for _ in range(2))
    assert torch.equal(a, b)


def test_bfloat16_models_are_initialised_too(tiny):
    tokenizer, semantic_ids = tiny.tokenizer(), tiny.sids(10)
    n_old = len(tokenizer)
    model = tiny.lm(n_old).to(torch.bfloat16)
    token_ids = add_sid_tokens(tokenizer, semantic_ids)
    resize_embeddings(model, tokenizer)
    codebooks = (
        np.random.default_rng(0).normal(size=(3, 4, 200)).astype(np.float32)
    )  # wider than hidden
    initialize_from_codebooks(model, token_ids, codebooks, n_old, 0)
    rows = model.get_input_embeddings().weight[flat(token_ids)]
    assert rows.dtype == torch.bfloat16 and torch.isfinite(rows).all()


@pytest.mark.parametrize("tied", [True, False])
def test_codes_that_are_set_alone_get_what_a_first_training_gives_them(tiny, tied: bool):
    """Nothing else moves: a refresh must not lose what the other rows learned."""
    semantic_ids, tokenizer = tiny.sids(20), tiny.tokenizer()
    n_old = len(tokenizer)
    token_ids = add_sid_tokens(tokenizer, semantic_ids)
    sizes = semantic_ids.codebook_sizes
    model = tiny.lm(len(tokenizer), tied=tied)
    resize_embeddings(model, tokenizer)
    matrices = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    codebooks = [np.random.default_rng(1).normal(size=(n, 8)).astype(np.float32) for n in sizes]
    before = [weight.detach().clone() for weight in matrices]
    only = [np.arange(n) % 3 == level for level, n in enumerate(sizes)]
    initialize_from_codebooks(model, token_ids, codebooks, n_old, 4, only)
    chosen = [
        ids[c] for ids, codes in zip(token_ids, only, strict=True) for c in codes.nonzero()[0]
    ]
    partly = [weight.detach().clone() for weight in matrices]
    initialize_from_codebooks(model, token_ids, codebooks, n_old, 4)
    for was, part, whole in zip(before, partly, matrices, strict=True):
        assert (part != was).any(1).nonzero().flatten().tolist() == sorted(chosen)
        assert torch.equal(part[chosen], whole[chosen])
    all_set = [weight.detach().clone() for weight in matrices]
    nothing = [np.zeros(n, dtype=bool) for n in sizes]
    initialize_from_codebooks(model, token_ids, codebooks, n_old, 9, nothing)
    assert all(torch.equal(w, was) for w, was in zip(matrices, all_set, strict=True))


# Encoded rows


@pytest.mark.parametrize("bos", [False, True])
def test_encoded_rows(tiny, bos: bool):
    semantic_ids, tokenizer = tiny.sids(10), tiny.tokenizer(bos)
    token_ids = add_sid_tokens(tokenizer, semantic_ids)
    sid = semantic_ids.sids()[4]
    rows = encode_rows(
        tokenizer, ["red hat? ", "what? ", "empty"], [sid, "wool hat", ""], set(flat(token_ids))
    )
    codes = [token_ids[level][c] for level, c in enumerate(semantic_ids.codes[4])]
    text = tokenizer("wool hat", add_special_tokens=False)["input_ids"]
    ends = [codes, [*text, tokenizer.eos_token_id], [tokenizer.eos_token_id]]
    prompts = encode_prompts(tokenizer, ["red hat? ", "what? ", "empty"])
    for ids, labels, prompt, end in zip(
        rows["input_ids"], rows["labels"], prompts, ends, strict=True
    ):
        assert ids == prompt + end
        assert labels == [-100] * len(prompt) + end
        assert (prompt[0] == tokenizer.eos_token_id) == bos  # this tokenizer's BOS is its EOS
        assert prompt.count(tokenizer.eos_token_id) == int(bos)


def test_bos_that_exists_but_is_not_used_is_not_added(tiny):
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = modeling.EOS  # as GPT-2's and Qwen's kin
    assert modeling.bos_prefix(tokenizer) == []
    assert modeling.bos_prefix(tiny.tokenizer(bos=True)) == [tokenizer.eos_token_id]


def test_the_trained_tokenizer_loses_no_text(tiny):
    tokenizer = tiny.tokenizer()
    for text in ("red wool hat", "日本語 🧢 \x00 é", "x" * 1000, " two  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_from_scratch_is_a_function_of_its_seed():
    a, b, c = (modeling.from_scratch("tiny", 100, 64, seed) for seed in (0, 0, 1))
    weights = [m.get_input_embeddings().weight for m in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert a.config.max_position_embeddings == 64 and a.config.tie_word_embeddings


# Folders


def test_a_strangers_sid_map_is_refused_and_a_descendant_is_not(tiny, tmp_path: Path):
    semantic_ids = tiny.sids(10)
    model, tokenizer, token_ids = tiny.sid_lm(semantic_ids)
    save_model(model, tokenizer, semantic_ids, tmp_path, {"base": "tiny"})
    with pytest.raises(ValueError, match="trained on SID map .* does not extend it"):
        load_model(tmp_path, tiny.sids(11))
    free = [c for c in np.ndindex(4, 4, 4) if semantic_ids.index_of(c) is None][:1]
    more = semantic_ids.extend(semantic_ids.item_ids[:1] + 1000, np.array(free))
    loaded, loaded_tokenizer, _ = load_model(tmp_path, more)
    assert sid_token_ids(loaded_tokenizer, more) == token_ids
    ids = [5, 6, *flat(token_ids)[:3]]
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))


def test_a_folder_that_is_not_genrecs_is_refused(tiny, tmp_path: Path):
    semantic_ids = tiny.sids(10)
    model, _, _ = tiny.sid_lm(semantic_ids)
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(
            ValueError, match=f"has no {ABOUT}: it is not a model that genrec trained"
        ):
            load_model(folder, semantic_ids)
    (tmp_path / ABOUT).write_text(json.dumps({"semantic_ids_sha256": semantic_ids.sha256})[:-9])
    with pytest.raises(ValueError, match=f"{ABOUT} is not valid JSON"):
        load_model(tmp_path, semantic_ids)


def test_a_checkpoint_that_was_cut_off_is_not_the_last_one(tmp_path: Path):
    assert modeling.last_checkpoint(tmp_path / "absent") is None
    for step, state in ((8, "{}"), (10, "{}"), (12, ""), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x")
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert modeling.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
