"""Estimates against numbers computed by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from genrec.planning import (
    HARDWARE,
    LOGITS_AT_ONCE,
    SHAPES,
    Hardware,
    ModelShape,
    Workload,
    estimate,
    find_shape,
    normaliser_bytes,
    phases,
    shape_of_config,
    trie_bytes,
    user_bytes,
)

SMALL = ModelShape(2, 8, 4, 2, 3, 16, 100, True)
WORK = Workload(5, (4, 4, 4), 10, 60, 1000, dtype="float32")
DEVICE = Hardware(1e6, 1e6, {"float32": 1e9})


def test_parameters_of_a_small_model():
    # Per block: q 8*12, k and v 8*6 each, o 12*8, feed-forward 3*8*16.
    assert SMALL.block_parameters == 2 * (96 + 2 * 48 + 96 + 384) == 1344
    assert SMALL.parameters == 1344 + 800
    assert replace(SMALL, tied=False).parameters == 1344 + 1600
    assert SMALL.kv_numbers == 2 * 2 * 2 * 3 == 24


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-0.6b", 0.596), ("qwen3-1.7b", 1.720), ("qwen3-4b", 4.022), ("qwen3-8b", 8.190),
     ("qwen2.5-0.5b", 0.494), ("qwen2.5-1.5b", 1.543), ("llama-3.2-1b", 1.236),
     ("llama-3.1-8b", 8.030)],
)  # fmt: skip
def test_named_shapes_have_the_published_numbers_of_parameters(name, billions):
    assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def test_parameters_are_those_of_transformers(tiny):
    for tied in (True, False):
        model = tiny.lm(320, tied)
        shape = shape_of_config(model.config.to_dict())
        matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
        assert shape.parameters == matrices


def test_passes_of_one_user():
    first, second, third = phases(SMALL, WORK)
    # width = 2 layers * 4 heads * 3; head = 2 * 8 * 100 columns.
    assert first.flops == 2 * 1344 * 10 + 2 * 24 * 100 + 1600 and first.traffic == 0
    assert second.flops == 2 * 1344 * 4 + 4 * 24 * 4 * 14 + 1600 * 4  # 4 codes: 4 beams
    assert third.flops == 2 * 1344 * 5 + 4 * 24 * 5 * 19 + 1600 * 5
    assert (second.traffic, third.traffic) == (24 * 4 * 14, 24 * 4 * 19)


def test_of_a_wide_level_the_children_alone_are_computed():
    """256 clusters of 40 items: a beam looks at some 80 tokens, not at all 10,240 of them."""
    shape = dict(beam_width=5, prompt_tokens=10, n_items=10_240, n_users=1)
    trie = Workload(codebook_sizes=[256, 10_240], normalizer="trie", **shape)
    assert [trie.columns(level, 20_000) for level in (0, 1)] == [256, 80]
    assert user_bytes(SMALL, trie)["logits"] == 5 * 80 * 8
    for other, columns, held in (("level", 10_240, 10_240), ("full", 20_000, 80)):
        work = replace(trie, normalizer=other)
        assert work.columns(1, 20_000) == columns
        assert user_bytes(SMALL, work)["logits"] == 5 * held * 8
    single = Workload(codebook_sizes=[10_240], normalizer="trie", **shape)
    assert single.columns(0, 20_000) == 10_240  # each item is a child of the root


def test_a_level_needs_its_own_columns_alone():
    level = replace(WORK, normalizer="level")
    gap = [
        a.flops - b.flops for a, b in zip(phases(SMALL, WORK), phases(SMALL, level), strict=True)
    ]
    assert gap == [2 * 8 * 96 * n for n in (1, 4, 5)]
    every = phases(SMALL, replace(level, head_columns="all"))
    assert [p.flops for p in every] == [p.flops for p in phases(SMALL, WORK)]
    assert [p.in_float32 for p in every] == [0, 0, 0]
    assert user_bytes(SMALL, level)["logits"] == 5 * 4 * 8
    assert user_bytes(SMALL, replace(level, head_columns="all"))["logits"] == 5 * 100 * 8


def test_the_full_normaliser_is_summed_in_a_bounded_memory():
    from genrec.decoding import lm_head

    assert lm_head._LOGITS_AT_ONCE == LOGITS_AT_ONCE
    assert normaliser_bytes(SMALL, WORK, 3) == 3 * 5 * 100 * 8
    assert normaliser_bytes(SMALL, replace(WORK, dtype="bfloat16"), 10**9) == LOGITS_AT_ONCE * 6
    for other in ({"normalizer": "level"}, {"normalizer": "trie"}, {"head_columns": "all"}):
        assert normaliser_bytes(SMALL, replace(WORK, **other), 3) == 0
    # Far beyond the limit each user costs only its own bytes.
    big = replace(DEVICE, memory=10e9)
    made = estimate(SMALL, WORK, big, batch=1)
    room = 0.9 * 10e9 - made.weights - made.trie - LOGITS_AT_ONCE * 8
    assert made.largest_batch == int(room // sum(made.per_user.values()))
    assert made.normaliser == 4000
    last = estimate(SMALL, WORK, big, batch=made.largest_batch)
    assert last.normaliser == LOGITS_AT_ONCE * 8


def test_memory_of_a_user_and_of_the_trie():
    assert user_bytes(SMALL, WORK) == {
        "kv": 24 * 4 * (10 + 4 + 5), "logits": 5 * 4 * 8, "activations": 10 * (32 + 32) * 4,
        "mask": 5 * 19 * 4,
    }  # fmt: skip
    assert trie_bytes(WORK) == 9 * (4 + 16 + 60) + 4 * 60
    one = replace(WORK, codebook_sizes=(100,), n_items=60)
    assert user_bytes(SMALL, one)["kv"] == 24 * 4 * 10
    assert len(phases(SMALL, one)) == 1


def test_trie_estimate_bounds_the_arrays_on_the_device(tiny):
    import torch

    from genrec.decoding.trie import SidTrie
    from genrec.decoding.trie_tensors import TrieTensors

    codes = tiny.sids(60).codes
    held = TrieTensors(SidTrie.build(codes), None, torch.device("cpu"))
    arrays = [*held._tokens, *held._child_start, held._items]
    size = sum(a.numel() * a.element_size() for a in arrays)
    assert size <= trie_bytes(replace(WORK, n_items=60)) + 8 * 4 * WORK.levels


def test_a_roofline_by_hand():
    passes = phases(SMALL, WORK)
    made = estimate(SMALL, WORK, replace(DEVICE, price=3.0), 0.5, batch=10, devices=2)
    weights = 2144 * 4
    assert made.weights == weights and made.trie == trie_bytes(WORK)
    seconds = sum(max(10 * p.flops / 5e8, (weights + 10 * p.traffic) / 5e5) for p in passes)
    assert made.users_per_s == pytest.approx(10 / seconds)
    assert made.bound == "bandwidth"
    assert made.flops_per_user == sum(p.flops for p in passes)
    assert made.hours == pytest.approx(1000 * seconds / 10 / 2 / 3600)
    assert made.cost == pytest.approx(made.hours * 2 * 3.0)
    each = 24 * 4 * 19 + 160 + 2560 + 380 + 4000  # the last: of the normaliser
    assert made.largest_batch == int((0.9e6 - weights - trie_bytes(WORK)) // each)
    fast = estimate(SMALL, WORK, replace(DEVICE, bandwidth=1e12), 0.5, batch=10)
    assert fast.bound == "compute" and fast.cost is None
    assert fast.users_per_s == pytest.approx(5e8 / made.flops_per_user)
    assert estimate(SMALL, WORK, DEVICE).batch == 64


def test_the_head_runs_at_the_peak_of_float32():
    """The torch engine scores in it whatever the dtype; sixteen bits are no faster there."""
    half = replace(WORK, dtype="bfloat16")
    heads = [1600 * n for n in (1, 4, 5)]  # 2 * 8 * 100 columns a beam
    assert [p.in_float32 for p in phases(SMALL, half)] == heads
    fast = Hardware(1e6, 1e12, {"float32": 1e9, "bfloat16": 1e10})
    blocks = sum(p.flops for p in phases(SMALL, half)) - sum(heads)
    made = estimate(SMALL, half, fast, 0.5, batch=10)
    assert made.users_per_s == pytest.approx(1 / (blocks / 5e9 + sum(heads) / 5e8))
    other = estimate(SMALL, replace(half, head_columns="all"), fast, 0.5, batch=10)
    assert other.users_per_s == pytest.approx(1 / ((blocks + sum(heads)) / 5e9))
    with pytest.raises(ValueError, match=r"tflops_float32=0.0 must be above 0"):
        estimate(SMALL, half, replace(fast, flops={"bfloat16": 1e10}))


def test_a_known_shape():
    """The floor of `tokens = P + (L-1)·B` at 0.5B and 1.5B parameters, P = 300, B = 50, L = 3."""
    work = Workload(50, (256, 256, 256), 300, 1_000_000, 10)
    made = {n: estimate(SHAPES[n], work, HARDWARE["h200-141"]) for n in SHAPES}
    assert made["qwen2.5-0.5b"].flops_per_user / 1e9 == pytest.approx(320, rel=0.02)
    assert made["qwen2.5-1.5b"].flops_per_user / 1e9 == pytest.approx(1108, rel=0.02)
    assert made["qwen2.5-0.5b"].users_per_s == pytest.approx(565, rel=0.05)
    work = replace(work, head_columns="all")
    every = estimate(SHAPES["qwen2.5-0.5b"], work, HARDWARE["h200-141"])
    assert every.users_per_s == pytest.approx(1240, rel=0.05)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="exceed 90% of the device's 24 GB; take a larger device"):
        estimate(SHAPES["llama-3.1-8b"], replace(WORK, dtype="float32"), HARDWARE["l4-24"])
    largest = estimate(SMALL, WORK, DEVICE).largest_batch
    estimate(SMALL, WORK, DEVICE, batch=largest)
    for batch in (0, largest + 1):
        with pytest.raises(ValueError, match=f"batch={batch} must lie between 1 and the {largest}"):
            estimate(SMALL, WORK, DEVICE, batch=batch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beam_width": 0}, "beam_width=0 must be at least 1"),
        ({"prompt_tokens": 0}, "prompt_tokens=0 must be at least 1"),
        ({"prompt_tokens": float("nan")}, "prompt_tokens=nan must be at least 1"),
        ({"n_users": 0}, "n_users=0 must be"),
        ({"codebook_sizes": ()}, "codebook_sizes=0 must be at least 1"),
        ({"codebook_sizes": (4, 0)}, "codebook_sizes=0"),
        ({"prompt_tokens": float("inf")}, "prompt_tokens=inf must be at most 10,000,000"),
        ({"n_items": 10**400}, "must be at most 100,000,000,000"),
        ({"codebook_sizes": (4, 10**9)}, "codebook_sizes=1000000000 must be at most"),
        ({"n_items": 65}, "n_items=65 exceeds the 64 semantic ids"),
        ({"dtype": "int8"}, "dtype='int8' is not known"),
    ],
)
def test_workloads_that_can_not_be(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(WORK, **changes)


def test_other_settings_that_can_not_be():
    for share in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
            estimate(SMALL, WORK, DEVICE, share)
    with pytest.raises(ValueError, match="devices=0 must be at least 1"):
        estimate(SMALL, WORK, DEVICE, devices=0)
    with pytest.raises(ValueError, match="must be at most 1,000,000"):
        estimate(SMALL, WORK, DEVICE, devices=10**400)
    for changes, message in (
        ({"memory": float("inf")}, "memory=inf must lie between 1e-06 and"),
        ({"bandwidth": float("nan")}, "bandwidth=nan must be above 0"),
        ({"flops": {"float32": 1e-308}}, "tflops=.* must lie between 1e-06 and"),
        ({"flops": {}}, "tflops=0.0 must be above 0"),
        ({"price": float("inf")}, "price=inf of an hour must lie"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate(SMALL, WORK, replace(DEVICE, **changes))


def test_models_by_name_and_by_folder(tmp_path: Path, tiny):
    assert find_shape("Qwen3-0.6B") == SHAPES["qwen3-0.6b"]
    tiny.lm(320).config.save_pretrained(tmp_path)
    expected = ModelShape(2, 32, 2, 2, 16, 64, 320, True)
    assert find_shape(str(tmp_path)) == find_shape(str(tmp_path / "config.json")) == expected
    with pytest.raises(ValueError, match="model='gpt-9' is no known shape and no folder"):
        find_shape("gpt-9")
    file = tmp_path / "config.json"
    for text, message in (
        ("{", "is not valid JSON"),
        ("[]", "holds no JSON object"),
        (json.dumps({"hidden_size": 8, "num_attention_heads": 2}), "has no num_hidden_layers"),
        (json.dumps({"num_experts": 8}), "has experts"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            find_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size=None must be an integer of at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be"),
        ({"vocab_size": -5}, "vocab_size=-5 must be"),
        ({"intermediate_size": "64"}, "intermediate_size='64' must be"),
        ({"num_attention_heads": True}, "num_attention_heads=True must be"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be"),
        ({"hidden_size": 10**400}, "must be an integer .* below"),
        ({"head_dim": None, "num_attention_heads": 99}, "=99 exceeds hidden_size=32"),
        ({"text_config": None}, "text_config=None is no JSON object"),
    ],
)
def test_sizes_that_can_not_be(change, message):
    config = {
        "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 320,
        "intermediate_size": 64,
    }  # fmt: skip
    assert shape_of_config(config) == ModelShape(2, 32, 2, 2, 16, 64, 320, True)
    with pytest.raises(ValueError, match=f"own: .*{message}"):
        shape_of_config({**config, **change}, "own")
