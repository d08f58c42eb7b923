"""A bundle on vLLM: the lists of the torch engine; needs vLLM (CPU or GPU build)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

from genrec.bundle.writing import ExportSettings, write_bundle  # noqa: E402
from genrec.recommend import Recommender  # noqa: E402

TOLERANCE = 1e-3


def test_the_lists_are_those_of_torch(tiny, tmp_path: Path):
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    shop = tiny.shop()
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    for parameter in model.parameters():
        parameter.data *= 2.5 if parameter.ndim > 1 else 1
    tiny.save_run(tmp_path / "run", shop, model, tokenizer, normalizer="trie")
    bundle = write_bundle(tmp_path / "run", tmp_path / "b", ExportSettings(k=5, beam_width=20))
    ours, theirs = Recommender.load(bundle), Recommender.load(bundle, engine="vllm")
    assert theirs.engine.normalizer == "trie"
    ids = ours.catalog["item_id"].to_list()
    for history in ([], ids[:1], ids[3:9]):
        first, second = ours.recommend(history), theirs.recommend(history)
        assert [r.item_id for r in first] == [r.item_id for r in second]
        assert [r.score for r in first] == pytest.approx([r.score for r in second], abs=TOLERANCE)
