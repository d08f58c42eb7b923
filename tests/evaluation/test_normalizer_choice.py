"""When a normaliser other than the full vocabulary is declared, and when chance explains it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.evaluation.normalizer_choice import (
    NormalizerChoice,
    choose_normalizer,
    declared_by_hand,
    declared_unmeasured,
    measure_normalizers,
)
from genrec.evaluation.validation import BeamValidation
from genrec.modeling import encode_prompts
from genrec.normalizers import NORMALIZERS


def choose(users: np.ndarray | None = None, **gains: list[float]) -> NormalizerChoice:
    """The choice for these NDCG values; a hit is whatever gained."""
    values = {name: np.array(row, dtype=np.float64) for name, row in gains.items()}
    hits = {name: (row > 0).astype(np.float64) for name, row in values.items()}
    return choose_normalizer(hits, values, 10, seed=0, users=users)


def ahead(rows: int, by: float, n: int = 30) -> list[float]:
    """`rows` rows that gain `by` more than .2, the others .2."""
    return [0.2 + by] * rows + [0.2] * (n - rows)


def test_what_is_better_by_more_than_chance_is_declared():
    choice = choose(full=ahead(0, 0), level=ahead(0, 0), trie=ahead(15, 0.3))
    assert choice.normalizer == "trie" and choice.rows == 30
    assert choice.measured["trie"] == {"hr@10": 1.0, "ndcg@10": pytest.approx(0.35)}
    against = choice.against_default["trie"]
    assert against["value"] == pytest.approx(0.15)
    assert 0 < against["low"] < 0.15 < against["high"] < 0.3
    # 15 equal signs: 2 of 2^15 draws of signs are as large, doubled by Holm.
    assert against["p_holm"] < 0.002
    assert choice.against_default["level"]["p_holm"] == 1.0
    assert "NDCG full 0.2000, level 0.2000, trie 0.3500" in str(choice)


def test_ties_and_differences_within_the_noise_go_to_full():
    assert choose(full=ahead(0, 0), level=ahead(0, 0), trie=ahead(0, 0)).normalizer == "full"
    # Higher on average, but by five rows alone: 2 of 2^5 draws, p = 1/16.
    few = choose(full=ahead(0, 0), trie=ahead(5, 0.5))
    assert few.measured["trie"]["ndcg@10"] > few.measured["full"]["ndcg@10"]
    assert few.normalizer == "full" and few.against_default["trie"]["p_holm"] > 0.05


def test_comparisons_are_paid_for():
    """Six rows: p = 2/64 is enough for one comparison, and not for one of two."""
    assert choose(full=ahead(0, 0), trie=ahead(6, 0.5)).normalizer == "trie"
    three = choose(full=ahead(0, 0), level=ahead(0, 0), trie=ahead(6, 0.5))
    assert three.normalizer == "full"
    assert three.against_default["trie"]["p_holm"] == pytest.approx(2 * 2 / 64, abs=0.01)


def test_what_is_worse_is_never_declared():
    choice = choose(full=ahead(20, 0.5), level=ahead(0, 0), trie=ahead(0, 0))
    assert choice.normalizer == "full" and choice.against_default["trie"]["p_holm"] < 0.01


def test_of_several_better_ones_the_best_and_on_a_tie_the_nearest_to_full():
    better = choose(full=ahead(0, 0), level=ahead(15, 0.1), trie=ahead(15, 0.3))
    assert better.normalizer == "trie"
    assert choose(full=ahead(0, 0), level=ahead(15, 0.3), trie=ahead(15, 0.3)).normalizer == "level"


def test_rows_of_one_user_are_no_independent_evidence():
    users = np.r_[np.zeros(15, dtype=np.int64), np.arange(1, 16)]
    gains = {"full": ahead(0, 0), "level": ahead(0, 0), "trie": ahead(15, 0.3)}
    assert choose(**gains).normalizer == "trie"
    alone = choose(users=users, **gains)
    assert alone.normalizer == "full" and alone.against_default["trie"]["p_holm"] == 1.0


def test_the_record_survives_json():
    choice = choose(full=ahead(0, 0), level=ahead(0, 0), trie=ahead(15, 0.3))
    again = json.loads(json.dumps(asdict(choice)))
    assert again == asdict(choice) and "randomisation test" in again["rule"]


def test_without_a_comparison_the_record_says_why():
    by_hand = declared_by_hand("level")
    assert by_hand.normalizer == "level" and by_hand.rows == 0 and "level" in by_hand.rule
    unmeasured = declared_unmeasured("full", "nothing was validated (eval_rows=0)")
    assert unmeasured.normalizer == "full" and "eval_rows=0" in str(unmeasured)
    assert not unmeasured.measured and not unmeasured.against_default


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least one row"):
        choose(full=[], level=[], trie=[])


def test_models_trained_over_a_level_default_to_it():
    """The first candidate is what the others must beat."""
    tied = choose(level=ahead(0, 0), trie=ahead(0, 0))
    assert tied.normalizer == "level" and tied.rule.startswith("level, unless")
    assert list(tied.measured) == ["level", "trie"]
    assert choose(level=ahead(0, 0), trie=ahead(15, 0.3)).normalizer == "trie"


def test_measuring_ranks_the_sample_under_each(tiny, tmp_path: Path):
    semantic_ids = tiny.sids(20)
    model, tokenizer, token_ids = tiny.sid_lm(semantic_ids)
    for parameter in model.parameters():  # sharper, so that the normalisers rank apart
        parameter.data *= 4 if parameter.ndim > 1 else 1
    trie = SidTrie.build(semantic_ids.codes)
    sids = semantic_ids.sids().to_list()
    prompts = encode_prompts(tokenizer, [f"Bought: {sid}" for sid in sids])

    def make(normalizer: str) -> TorchEngine:
        return TorchEngine(model, trie, token_ids, tokenizer.pad_token_id, normalizer)

    targets = make("trie").search(prompts, 1, 50).items[:, 0]  # what trie puts first
    validation = BeamValidation(tmp_path, lambda m: make("full"), prompts, targets, None)
    choice = measure_normalizers(validation, make)
    for name in NORMALIZERS:
        hits, gains = validation.per_row(make(name))
        assert hits.shape == gains.shape == (20,)
        assert choice.measured[name] == {"hr@10": hits.mean(), "ndcg@10": gains.mean()}
    assert choice.measured["trie"]["ndcg@10"] == 1.0
    assert choice.measured["full"]["ndcg@10"] < 0.95 and choice.normalizer == "trie"
    assert choice.measured["full"]["ndcg@10"] == validation.measure(model, 1, 1.0)["ndcg@10"]
