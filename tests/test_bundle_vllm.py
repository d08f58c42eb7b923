"""A bundle on vLLM, also served: the lists of the torch engine; needs vLLM (CPU or GPU build)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

from fastapi.testclient import TestClient  # noqa: E402
from transformers import Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from genrec.bundle.writing import ExportSettings, write_bundle  # noqa: E402
from genrec.modeling import add_sid_tokens  # noqa: E402
from genrec.recommend import Recommender  # noqa: E402
from genrec.server.app import create_app  # noqa: E402
from genrec.server.serving import load_run  # noqa: E402
from genrec.server.settings import ServerSettings  # noqa: E402

TOLERANCE = 1e-3


def test_the_lists_are_those_of_torch(tiny, tmp_path: Path):
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    shop = tiny.shop()
    tokenizer = tiny.tokenizer()
    add_sid_tokens(tokenizer, shop.semantic_ids)
    torch.manual_seed(0)
    config = Qwen3Config(  # vLLM's CPU kernels need heads of 32
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        initializer_range=0.25, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    tiny.save_run(tmp_path / "run", shop, model, tokenizer, normalizer="trie")
    bundle = write_bundle(tmp_path / "run", tmp_path / "b", ExportSettings(k=5, beam_width=20))
    loaded = load_run(str(bundle), engine="vllm", engine_options={"max_model_len": 200})
    ours, theirs = Recommender.load(bundle), loaded.recommender
    assert theirs.engine.context == 200
    assert theirs.engine.normalizer == "trie"
    ids = ours.catalog["item_id"].to_list()
    for history in ([], ids[:1], ids[3:9]):
        first, second = ours.recommend(history), theirs.recommend(history)
        assert [r.item_id for r in first] == [r.item_id for r in second]
        assert [r.score for r in first] == pytest.approx([r.score for r in second], abs=TOLERANCE)
    # Served: the engine was made in this thread and is called from the batcher's.
    requests = [{"history": ids[:n], "k": 5, "candidates": ids[4:] if n else None} for n in (0, 3)]
    app = create_app(lambda run_dir, model_run: loaded, ServerSettings(str(bundle), timeout_s=60))
    with TestClient(app) as client:
        made = client.post("/recommend", json={"requests": requests}).json()["results"]
    lists = [[item["item_id"] for item in answer["items"]] for answer in made]
    assert lists[0] == [r.item_id for r in ours.recommend([], 5)]
    assert len(lists[1]) == 5 and set(lists[1]) <= set(ids[4:])
