"""Measurements equal the engine's and hand-made ones, and lead to the verdict that they should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.evaluation import doctor, probes
from genrec.evaluation.probes import LevelScores, Sample
from genrec.recommend import Recommender


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A run around a random model, to be read only."""
    run = tmp_path_factory.mktemp("probes") / "run"
    shop = tiny.shop(n_users=40, n_items=30)
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(run, shop, model, tokenizer)
    return run


@pytest.fixture(scope="module")
def recommender(finished) -> Recommender:
    return Recommender.load(finished)


def drawn(recommender: Recommender, run: Path, split: str = "valid", filter_seen=True) -> Sample:
    rows = pl.read_parquet(run / "data" / f"{split}.parquet")
    rows = rows.filter(pl.col("history_item_index").list.len() > 0)
    return probes.draw(recommender, rows, 12, 3, filter_seen)


def random_prompts(n: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, 200, rng.integers(3, 30)).tolist() for _ in range(n)]


def sample_of(ids: list[list[int]], targets, seen=None) -> Sample:
    n = len(ids)
    return Sample([f"r{i}" for i in range(n)], [[]] * n, np.asarray(targets), seen, [""] * n, ids)


# ------------------------------------------------------------------ exhaustive scores


@pytest.mark.parametrize("normalizer", ["full", "level", "trie"])
@pytest.mark.parametrize("n_levels", [1, 2, 4])
def test_exhaustive_scores_are_the_engines(tiny, monkeypatch, normalizer, n_levels):
    monkeypatch.setattr(probes, "_LOGIT_CELLS", 1)  # the smallest blocks: several per level
    ids = tiny.sids({1: 90, 2: 90, 4: 150}[n_levels], n_levels, {1: 100, 2: 40, 4: 5}[n_levels])
    model, _, token_ids = tiny.sid_lm(ids, tied=n_levels != 2)
    engine = TorchEngine(model, SidTrie.build(ids.codes), token_ids, 0, normalizer)
    for prompt in random_prompts(2):
        scores = probes.exhaustive_scores(engine, prompt)
        expected = engine.score([prompt], np.arange(ids.n_items)[None])[0].sum(-1)
        np.testing.assert_allclose(scores, expected, atol=2e-5)
    some = np.arange(0, ids.n_items, 2)
    sampled = probes.sampled_scores(engine, prompt, some)
    np.testing.assert_allclose(sampled[some], expected[some], atol=2e-5)
    assert np.isneginf(np.delete(sampled, some)).all()


@pytest.fixture(scope="module")
def wide(tiny):
    """An engine over 120 items with 3 levels, prompts, targets and seen items."""
    ids = tiny.sids(120, 3, 6)
    model, _, token_ids = tiny.sid_lm(ids)
    engine = TorchEngine(model, SidTrie.build(ids.codes), token_ids, 0)
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 120, 6)
    seen = [rng.permutation(np.delete(np.arange(120), t))[:30] for t in targets]
    return engine, sample_of(random_prompts(6), targets, seen)


def test_ranks_equal_a_beam_as_wide_as_the_catalogue(wide):
    engine, sample = wide
    gap = probes.search_gap(engine, sample, 120, 0)
    assert (gap.exhaustive_rank == gap.beam_rank).all() and (gap.beam_rank > 0).all()
    assert gap.recall.tolist() == [1.0] * 6 and gap.equal.tolist() == [1.0] * 6
    assert gap.difference < 1e-4 and gap.scored == gap.n_items == 120
    assert doctor.check_search(gap, "R").status == "ok"


def test_a_narrow_beam_is_found_out(wide):
    engine, sample = wide
    gap = probes.search_gap(engine, sample, 1, 0)
    assert (gap.recall <= 0.1).all() and not gap.equal.any()
    check = doctor.check_search(gap, "R")
    assert check.status == "bad" and "--beam_width 4" in check.advice


@pytest.mark.parametrize("width", [4, 8])
def test_recall_is_counted_by_hand(wide, width):
    engine, sample = wide
    gap = probes.search_gap(engine, sample, width, 0)
    found = engine.search(sample.ids, width, width, sample.seen).items[:, :10]
    best = engine.search(sample.ids, 10, 120, sample.seen).items
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), best.tolist(), strict=True)]
    assert gap.recall.tolist() == pytest.approx(shared)
    assert not gap.equal.any() and 0 < gap.recall.mean() < width / 10


def test_scores_that_disagree_are_a_defect(wide):
    engine, sample = wide

    class Wrong(TorchEngine):
        def search(self, *args, **kwargs):
            found = super().search(*args, **kwargs)
            return replace(found, scores=found.scores + np.float32(0.01))

    wrong = Wrong(engine.model, engine.trie, [i.tolist() for i in engine.sid_ids], 0)
    check = doctor.check_search(probes.search_gap(wrong, sample, 120, 0), "R")
    assert check.status == "bad" and "scores differ by 1.0e-02" in check.value
    nan = replace(probes.search_gap(engine, sample, 120, 0), difference=float("nan"))
    assert doctor.check_search(nan, "R").status == "bad"


def test_filtered_targets_are_named(wide):
    engine, sample = wide
    seen = [np.append(s, t) for s, t in zip(sample.seen, sample.targets, strict=True)]
    gap = probes.search_gap(engine, replace(sample, seen=seen), 120, 0)
    assert gap.exhaustive_rank.tolist() == [0] * 6
    check = doctor.check_search(gap, "R")
    assert check.status == "look" and "filter removes 100%" in check.value


def test_a_large_catalogue_is_sampled_and_said_so(wide):
    engine, sample = wide
    gap = probes.search_gap(engine, sample, 3, 0, limit=20)
    assert gap.scored == 20 and "20 sampled of 120 items" in doctor.check_search(gap, "R").value
    # The sample and the ten times wider beam show most of what a beam of 3 loses.
    assert gap.recall.mean() < doctor.RECALL_BAD
    exact = probes.search_gap(engine, sample, 3, 0)
    assert (gap.exhaustive_rank <= exact.exhaustive_rank).all()


def test_another_engine_is_refused(recommender):
    with pytest.raises(ValueError, match="teacher forcing"):
        probes.torch_engine(
            Recommender(recommender.catalog, recommender.semantic_ids, recommender.renderer,
                        recommender.template, recommender.tokenizer, object(), 6, "sft")
        )  # fmt: skip


# ------------------------------------------------------------------ levels, fit, the sample


def test_teacher_forced_scores(recommender, finished):
    sample, engine = drawn(recommender, finished), probes.torch_engine(recommender)
    count = recommender.catalog["train_count"].to_numpy()
    scores = probes.teacher_forced(engine, sample, count)
    # Share of the whole vocabulary = share of the allowed codes x what these get.
    full = engine.score(sample.ids, sample.targets[:, None])[:, 0]
    np.testing.assert_allclose(scores.log_probs + np.log(scores.legal_mass), full, atol=2e-5)
    codes = recommender.semantic_ids.codes
    row, target = 4, codes[sample.targets[4]]
    with torch.no_grad():
        forced = [int(engine.sid_ids[level][target[level]]) for level in range(2)]
        logits = engine.model(torch.tensor([sample.ids[row] + forced])).logits[0, -3:]
    for level, probs in enumerate(logits.softmax(-1)):
        same = (codes[:, :level] == target[:level]).all(1)
        allowed = np.unique(codes[same, level])
        tokens = engine.sid_ids[level]
        assert scores.choices[row, level] == len(allowed)
        assert scores.legal_mass[row, level] == pytest.approx(
            float(probs[tokens[torch.from_numpy(allowed).long()]].sum()), rel=1e-4
        )
        assert scores.level_mass[row, level] == pytest.approx(float(probs[tokens].sum()), rel=1e-4)
        best = allowed[probs[tokens[torch.from_numpy(allowed).long()]].argmax()]
        assert scores.correct[row, level] == (best == target[level])
        frequency = {c: count[same & (codes[:, level] == c)].sum() + 1 for c in allowed}
        prior = np.log(frequency[target[level]] / sum(frequency.values()))
        assert scores.prior_log_probs[row, level] == pytest.approx(prior)
        most = max(frequency, key=lambda c: (frequency[c], -c))
        assert scores.prior_correct[row, level] == (most == target[level])


def test_a_random_model_learned_nothing(tiny, finished, recommender):
    sample, engine = drawn(recommender, finished, "train"), probes.torch_engine(recommender)
    many = Sample(*(v * 4 if isinstance(v, list) else np.tile(v, 4) for v in vars(sample).values()))
    scores = probes.teacher_forced(engine, many, recommender.catalog["train_count"].to_numpy())
    assert doctor.check_levels(scores, scores, 0).status == "bad"
    check = doctor.check_legality(scores)
    assert check.status == "bad" and "expects other tokens" in check.meaning


def test_popular_guess_obeys_the_filter():
    count = np.array([5, 9, 7, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    sample = sample_of([[1], [1]], [3, 1], [np.array([1, 2]), np.array([0])])
    scores = LevelScores(*np.zeros((7, 2, 1)))
    items = np.array([[3, *range(4, 12), 0], [0, *range(2, 11)]])
    fit = probes.measure_fit(sample, scores, items, count)
    assert fit.hits.tolist() == [1, 0]  # the model's lists
    # Row 0: without 1 and 2, the last of ten places is for the item that nobody had.
    assert fit.popular_hits.tolist() == [1, 1]
    unfiltered = probes.measure_fit(replace(sample, seen=None), scores, items, count)
    assert unfiltered.popular_hits.tolist() == [0, 1]


def test_draw_is_seeded_and_renders_the_serving_prompt(recommender, finished):
    sample, again = drawn(recommender, finished), drawn(recommender, finished)
    assert sample.row_ids == again.row_ids and len(set(sample.row_ids)) == 12
    assert sample.prompts == recommender.prompts(sample.histories)
    train = drawn(recommender, finished, "train")
    assert [s.tolist() for s in train.seen] == train.histories
    assert drawn(recommender, finished, filter_seen=False).seen is None
    assert probes.first_rows(sample, 5).row_ids == sample.row_ids[:5]
    with pytest.raises(ValueError, match="no rows"):
        probes.draw(recommender, pl.DataFrame({"row_id": []}), 5, 0, True)
