"""Shared fixtures and tiny factories."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

# Read when NumPy and torch load. Two spinning OpenMP threads under contention cost far more than
# they bring on tiny tensors.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("GENREC_CACHE", None)  # tests keep their baselines beside their runs

import numpy as np  # noqa: E402
import polars as pl  # noqa: E402
import pytest  # noqa: E402

from genrec.columns import ITEM_ID  # noqa: E402
from genrec.data.splits import Splits, leave_one_out  # noqa: E402
from genrec.semantic_ids import SemanticIds  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def genrec_data() -> Path:
    """Folder of the real datasets; tests that need it are skipped where it is not set."""
    folder = os.environ.get("GENREC_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("GENREC_DATA is not set: this test reads real datasets")
    return Path(folder)


# Most of a minute each or more, largely in processes that import torch.
_LONGEST = (
    "test_readme", "test_two_processes", "test_resume", "test_build_dataset", "test_wheel",
    "test_recommend_recipe", "test_serve", "test_line",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: at the end no worker must be left alone with one of them."""
    items.sort(key=lambda item: item.path.stem not in _LONGEST)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Under GENREC_FORBID_SKIPS a skipped or missing test counts as a failure."""
    if not os.environ.get("GENREC_FORBID_SKIPS"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped, passed = reporter.stats.get("skipped", []), reporter.stats.get("passed", [])
    if exitstatus == 0 and (skipped or not passed):
        reporter.write_line(
            f"{len(skipped)} skipped, {len(passed)} passed: skips are failures here"
        )
        session.exitstatus = 1


# Tiny factories. A factory arrives as a fixture, since tests are no package to import from.

TITLES = ("red wool hat", "blue wool scarf", "steel tea pot", "oak tea tray", "cork yoga mat")


@dataclass(frozen=True)
class TinyShop:
    """A catalogue, its SID map and the split rows of a small log."""

    catalog: pl.DataFrame
    interactions: pl.DataFrame
    semantic_ids: SemanticIds
    splits: Splits


def _tiny_sids(
    n_items: int, n_levels: int = 3, size: int = 4, strings: bool = False
) -> SemanticIds:
    """Distinct SIDs in no order; item ids start at 100 (or "i100")."""
    every = np.array(list(itertools.product(range(size), repeat=n_levels)), dtype=np.int32)
    codes = every[np.random.default_rng(n_items).permutation(len(every))[:n_items]]
    ids = [f"i{100 + i}" if strings else 100 + i for i in range(n_items)]
    return SemanticIds(pl.Series(ITEM_ID, ids), codes, (size,) * n_levels)


def _tiny_shop(
    n_users: int = 30, n_items: int = 20, strings: bool = False, seed: int = 0, max_history: int = 6
) -> TinyShop:
    rng = np.random.default_rng(seed)
    semantic_ids = _tiny_sids(n_items, strings=strings)
    length = rng.integers(4, 14, n_users)
    index = rng.integers(0, n_items, length.sum()).astype(np.int32)
    log = pl.DataFrame(
        {
            "user_id": np.repeat([f"u{i}" for i in range(n_users)], length),
            "item_id": semantic_ids.item_ids.gather(index),
            "item_index": index,
            "timestamp": pl.Series([None] * len(index), dtype=pl.Int64),
            "rating": pl.Series([None] * len(index), dtype=pl.Float64),
            "position": np.concatenate([np.arange(n) for n in length]).astype(np.int32),
        }
    )
    splits = leave_one_out(log, n_items, max_history)
    catalog = pl.DataFrame(
        {
            "item_index": np.arange(n_items, dtype=np.int32),
            "item_id": semantic_ids.item_ids,
            "title": [f"{TITLES[i % len(TITLES)]} no {i}" for i in range(n_items)],
            "brand": ["Acme"] * n_items,
            "categories": [["Shop", f"Kind {i % 2}"] for i in range(n_items)],
            "price": [float(i) for i in range(n_items)],
            "description": pl.Series([None] * n_items, dtype=pl.String),
            "train_count": splits.train_count,
        }
    )
    return TinyShop(catalog, log, semantic_ids, splits)


def _tiny_tokenizer(bos: bool = False):
    """Fresh byte-level tokenizer, optionally one that begins every text with BOS."""
    from tokenizers.processors import TemplateProcessing

    from genrec.modeling import EOS, train_tokenizer

    tokenizer = train_tokenizer([*TITLES, "Bought so far, oldest first: "], 300)
    if bos:
        tokenizer.bos_token = EOS
        single = TemplateProcessing(
            single=f"{EOS} $A", special_tokens=[(EOS, tokenizer.eos_token_id)]
        )
        tokenizer.backend_tokenizer.post_processor = single
    return tokenizer


def _tiny_lm(vocab_size: int, tied: bool = True, seed: int = 0, context: int = 256):
    """Random decoder; the tied one is Qwen3, the untied one Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    shape = dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=context,
        initializer_range=0.1, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    if tied:
        return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16, tie_word_embeddings=True)).eval()
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)).eval()


def _save_run(
    run: Path,
    shop: TinyShop,
    model,
    tokenizer,
    max_history: int = 6,
    families: tuple = (),
    **about: object,
) -> None:
    """A finished run folder (prepare, quantize, build_dataset, sft) made by library calls.

    `families`: what its model claims to be trained on; by default it says nothing of that. `about`
    goes into the model's ``genrec.json``.
    """
    import shutil

    from genrec.artifacts import Stage, write_parquet
    from genrec.decoding.trie import FOLDER, SidTrie
    from genrec.modeling import save_model
    from genrec.prompts import default_folder

    stage = Stage(run, "prepare", {"max_history": max_history})
    assert not stage.is_done()
    write_parquet(stage.folder / "catalog.parquet", shop.catalog)
    write_parquet(stage.folder / "interactions.parquet", shop.interactions)
    for name in ("train", "valid", "test"):
        write_parquet(stage.folder / f"{name}.parquet", getattr(shop.splits, name))
    stage.finish(rows=len(shop.interactions))
    stage = Stage(run, "quantize", {}, ["prepare"])
    assert not stage.is_done()
    shop.semantic_ids.save(stage.folder)
    if isinstance(shop.semantic_ids, SemanticIds):
        codes, of_map = shop.semantic_ids.codes, shop.semantic_ids.sha256
        SidTrie.build(codes).save(stage.folder / FOLDER, of_map)
    stage.finish(rows=shop.semantic_ids.n_items)
    stage = Stage(run, "build_dataset", {}, ["prepare", "quantize"])
    assert not stage.is_done()
    shutil.copytree(default_folder(), stage.folder / "prompts")
    chains = {"trained_on_target": False} if families else {}
    stage.finish(rows=0, metrics={"serving_template": "sequential/seen/01", **chains})
    stage = Stage(run, "sft", {}, ["prepare", "quantize", "build_dataset"])
    assert not stage.is_done()
    about = {"stage": "sft", "base": "tiny", **about}
    save_model(model, tokenizer, shop.semantic_ids, stage.folder / "model", about)
    metrics = {"rows_per_epoch": [dict.fromkeys(families, 1)]} if families else {}
    stage.finish(rows=0, metrics=metrics)


class Tiny:
    """Bundle of the factories, so that a test needs one fixture."""

    sids = staticmethod(_tiny_sids)
    shop = staticmethod(_tiny_shop)
    tokenizer = staticmethod(_tiny_tokenizer)
    lm = staticmethod(_tiny_lm)
    save_run = staticmethod(_save_run)

    @staticmethod
    def sid_lm(semantic_ids: SemanticIds, tied: bool = True, seed: int = 0):
        """A tokenizer with SID tokens, a model of its size, and the ids of the tokens."""
        from genrec.modeling import add_sid_tokens

        tokenizer = _tiny_tokenizer()
        token_ids = add_sid_tokens(tokenizer, semantic_ids)
        return _tiny_lm(len(tokenizer), tied, seed), tokenizer, token_ids


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    """Factories of tiny catalogues, models and run folders."""
    return Tiny
