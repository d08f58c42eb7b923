"""The torch engine on a GPU: the lists and scores of the CPU, with everything that it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from genrec.decoding.sampling import LevelSampling
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.modeling import add_sid_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
N_ITEMS = 60


@pytest.fixture(scope="module")
def engines(tiny):
    """The same model on both, and prompts of unlike lengths."""
    sids, tokenizer = tiny.sids(N_ITEMS), tiny.tokenizer()
    trie, token_ids = SidTrie.build(sids.codes), add_sid_tokens(tokenizer, sids)
    found = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = tiny.lm(len(tokenizer)).to(device).eval()
        found[device] = lambda normalizer, model=model: TorchEngine(
            model, trie, token_ids, tokenizer.pad_token_id, normalizer
        )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(5, 60, n).tolist() for n in (3, 40, 11, 25)]
    return found, prompts, trie


@pytest.mark.parametrize("normalizer", ["full", "level", "trie"])
def test_lists_and_scores_are_those_of_the_cpu(engines, normalizer):
    made, prompts, trie = engines
    seen = [np.arange(n) for n in (0, 5, 30, 1)]
    view = trie.view(np.arange(N_ITEMS) % 3 > 0)
    for options in ({}, {"seen": seen}, {"seen": seen, "view": view}):
        cpu, gpu = (made[d](normalizer).search(prompts, 10, 20, **options) for d in made)
        np.testing.assert_allclose(cpu.scores, gpu.scores, rtol=1e-4, atol=1e-4)
        # Items may change places only where their scores are the same to rounding.
        for row in range(len(prompts)):
            ours = dict(zip(cpu.items[row].tolist(), cpu.scores[row], strict=True))
            for item, score in zip(gpu.items[row].tolist(), gpu.scores[row], strict=True):
                assert item in ours or score <= cpu.scores[row].min() + 1e-4
                assert item not in ours or abs(ours[item] - score) < 1e-4
    candidates = np.tile(np.arange(N_ITEMS), (len(prompts), 1))
    cpu, gpu = (made[d](normalizer).score(prompts, candidates) for d in made)
    np.testing.assert_allclose(cpu, gpu, rtol=1e-4, atol=1e-4)


def test_sixteen_bits_and_samples_run(engines):
    made, prompts, _ = engines
    engine = made["cuda"]("trie")
    drawn = engine.search(prompts, 8, 8, sampler=LevelSampling(replacement=True, seed=1))
    assert (drawn.items >= 0).all()
    engine.model.to(torch.bfloat16)
    found = made["cuda"]("trie").search(prompts, 10, 20)
    assert (found.items >= 0).all() and np.isfinite(found.scores).all()
