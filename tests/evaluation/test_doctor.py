"""Measurements equal the engine's and hand-made ones; every check has a case in which it fails."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from genrec.artifacts import stage_folder, write_json, write_parquet
from genrec.decoding.torch_engine import TorchEngine
from genrec.decoding.trie import SidTrie
from genrec.evaluation import doctor
from genrec.evaluation.doctor import Check, Fit, LevelScores, Sample, SearchGap
from genrec.prompts import PromptRenderer
from genrec.recommend import Recommender
from genrec.semantic_ids import SemanticIds
from genrec.tasks.sequential import explode, sequential_rows

SERVING = "sequential/seen/01"


def make_run(tiny, run: Path, per_item: bool = False, template: str | None = SERVING) -> Path:
    """Stages prepare … sft with instruction rows, around a random model."""
    shop = tiny.shop(n_users=40, n_items=30)
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(run, shop, model, tokenizer)
    folder = stage_folder(run, "build_dataset")
    renderer = PromptRenderer(folder / "prompts")
    train = explode(shop.splits.train) if per_item else shop.splits.train
    for name, rows, chosen in (("train", train, template), ("valid", shop.splits.valid, SERVING)):
        made = sequential_rows(rows, shop.semantic_ids, renderer, chosen)
        write_parquet(folder / f"{name}.parquet", made)
    edit(folder / "manifest.json", metrics={"serving_template": SERVING,
         "prompts_sha256": renderer.sha256()})  # fmt: skip
    return run


def edit(path: Path, **changes) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A run, to be read only."""
    return make_run(tiny, tmp_path_factory.mktemp("doctor") / "run")


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def recommender(finished) -> Recommender:
    return Recommender.load(finished)


def drawn(recommender: Recommender, run: Path, split: str = "valid", filter_seen=True) -> Sample:
    rows = pl.read_parquet(run / "data" / f"{split}.parquet")
    rows = rows.filter(pl.col("history_item_index").list.len() > 0)
    return doctor.draw(recommender, rows, 12, 3, filter_seen)


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
    monkeypatch.setattr(doctor, "_LOGIT_CELLS", 1)  # the smallest blocks: several per level
    ids = tiny.sids({1: 90, 2: 90, 4: 150}[n_levels], n_levels, {1: 100, 2: 40, 4: 5}[n_levels])
    model, _, token_ids = tiny.sid_lm(ids, tied=n_levels != 2)
    engine = TorchEngine(model, SidTrie.build(ids.codes), token_ids, 0, normalizer)
    for prompt in random_prompts(2):
        scores = doctor.exhaustive_scores(engine, prompt)
        expected = engine.score([prompt], np.arange(ids.n_items)[None])[0].sum(-1)
        np.testing.assert_allclose(scores, expected, atol=2e-5)
    some = np.arange(0, ids.n_items, 2)
    sampled = doctor.sampled_scores(engine, prompt, some)
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
    gap = doctor.search_gap(engine, sample, 120, 0)
    assert (gap.exhaustive_rank == gap.beam_rank).all() and (gap.beam_rank > 0).all()
    assert gap.recall.tolist() == [1.0] * 6 and gap.equal.tolist() == [1.0] * 6
    assert gap.difference < 1e-4 and gap.scored == gap.n_items == 120
    assert doctor.check_search(gap, "R").status == "ok"


def test_a_narrow_beam_is_found_out(wide):
    engine, sample = wide
    gap = doctor.search_gap(engine, sample, 1, 0)
    assert (gap.recall <= 0.1).all() and not gap.equal.any()
    check = doctor.check_search(gap, "R")
    assert check.status == "bad" and "--beam_width 4" in check.advice


@pytest.mark.parametrize("width", [4, 8])
def test_recall_is_counted_by_hand(wide, width):
    engine, sample = wide
    gap = doctor.search_gap(engine, sample, width, 0)
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
    check = doctor.check_search(doctor.search_gap(wrong, sample, 120, 0), "R")
    assert check.status == "bad" and "scores differ by 1.0e-02" in check.value
    nan = replace(doctor.search_gap(engine, sample, 120, 0), difference=float("nan"))
    assert doctor.check_search(nan, "R").status == "bad"


def test_filtered_targets_are_named(wide):
    engine, sample = wide
    seen = [np.append(s, t) for s, t in zip(sample.seen, sample.targets, strict=True)]
    gap = doctor.search_gap(engine, replace(sample, seen=seen), 120, 0)
    assert gap.exhaustive_rank.tolist() == [0] * 6
    check = doctor.check_search(gap, "R")
    assert check.status == "look" and "filter removes 100%" in check.value


def test_a_large_catalogue_is_sampled_and_said_so(wide):
    engine, sample = wide
    gap = doctor.search_gap(engine, sample, 3, 0, limit=20)
    assert gap.scored == 20 and "20 sampled of 120 items" in doctor.check_search(gap, "R").value
    # The sample and the ten times wider beam show most of what a beam of 3 loses.
    assert gap.recall.mean() < doctor.RECALL_BAD
    exact = doctor.search_gap(engine, sample, 3, 0)
    assert (gap.exhaustive_rank <= exact.exhaustive_rank).all()


def gap_of(recall: float, equal: float = 1.0, beam=(1, 0), exhaustive=(1, 30)) -> SearchGap:
    return SearchGap(50, np.full(2, recall), np.full(2, equal), np.array(beam),
                     np.array(exhaustive), 0.0, 100, 100)  # fmt: skip


def test_search_verdicts():
    status = {r: doctor.check_search(gap_of(r), "R").status for r in (1.0, 0.9, 0.5)}
    assert status == {1.0: "ok", 0.9: "look", 0.5: "bad"}
    lost = doctor.check_search(gap_of(1.0, beam=(0, 0), exhaustive=(1, 30)), "R")
    assert lost.details["hits_lost"] == 1 and lost.details["hr@10_exhaustive"] == 0.5


# ------------------------------------------------------------------ levels, legality, fit


def test_teacher_forced_scores(recommender, finished):
    sample, engine = drawn(recommender, finished), doctor.torch_engine(recommender)
    count = recommender.catalog["train_count"].to_numpy()
    scores = doctor.teacher_forced(engine, sample, count)
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


def levels_of(gains, right=0.5, majority=0.2, n: int = 60, choices: int = 5) -> LevelScores:
    """Scores whose gain over the prior is `gains` per level, with some spread."""
    rng = np.random.default_rng(0)
    shape = (n, len(gains))
    prior = np.full(shape, -2.0)
    ours = prior + np.array(gains) + rng.normal(0, 0.1, shape)
    order = np.tile(np.arange(n)[:, None] / n, (1, len(gains)))
    return LevelScores(ours, (order < right) * 1.0, np.full(shape, 0.9), np.full(shape, 0.95),
                       np.full(shape, float(choices)), prior, (order < majority) * 1.0)  # fmt: skip


def test_levels_verdicts():
    good = levels_of([1.0, 0.5])
    assert doctor.check_levels(good, good, 0).status == "ok"
    weak = doctor.check_levels(levels_of([1.0, -0.3]), good, 0)
    assert weak.status == "look" and "level 2 is no surer" in weak.meaning
    dead = levels_of([1.0, -0.3], right=0.2)
    check = doctor.check_levels(dead, dead, 0)
    assert check.status == "bad" and "level 2 learned nothing" in check.meaning
    # A constant guess by the code frequencies is what "nothing" means.
    constant = replace(good, log_probs=good.prior_log_probs, correct=good.prior_correct)
    assert "level 1, 2 learned nothing" in doctor.check_levels(constant, constant, 0).meaning
    assert check.details["levels"][0]["valid"]["majority"][0] == pytest.approx(0.2)
    forced = levels_of([1.0], choices=1)
    assert doctor.check_levels(forced, forced, 0).status == "not run"


def test_a_random_model_learned_nothing(tiny, finished, recommender):
    sample, engine = drawn(recommender, finished, "train"), doctor.torch_engine(recommender)
    many = Sample(*(v * 4 if isinstance(v, list) else np.tile(v, 4) for v in vars(sample).values()))
    scores = doctor.teacher_forced(engine, many, recommender.catalog["train_count"].to_numpy())
    assert doctor.check_levels(scores, scores, 0).status == "bad"
    check = doctor.check_legality(scores)
    assert check.status == "bad" and "expects other tokens" in check.meaning


def test_legality_verdicts():
    scores = levels_of([1.0, 1.0])
    assert doctor.check_legality(scores).status == "ok"
    masses = np.array([[0.9, 0.7]] * 60)
    assert doctor.check_legality(replace(scores, legal_mass=masses)).status == "look"
    masses[:, 1] = 0.3
    check = doctor.check_legality(replace(scores, legal_mass=masses))
    assert check.status == "bad" and "which codes belong together" in check.meaning
    check = doctor.check_legality(replace(scores, legal_mass=masses, level_mass=masses))
    assert "expects other tokens" in check.meaning


def fit_of(gain: float, hit: float, popular: float = 0.0, n: int = 100, seed: int = 0) -> Fit:
    levels = np.random.default_rng(seed).normal(gain / 2, 0.2, (n, 2)) - 3
    place = np.arange(n) / n
    return Fit(levels, np.full(n, -6.0), (place < hit) * 1.0, (place < popular) * 1.0)


def test_fit_verdicts():
    def verdict(train: Fit, valid: Fit) -> tuple[str, str]:
        check = doctor.check_fit(train, valid, 0)
        return check.status, check.meaning.split(":")[0]

    assert verdict(fit_of(2, 0.3), fit_of(1.8, 0.2, seed=1))[0] == "ok"
    assert verdict(fit_of(2, 0.3), fit_of(0.5, 0.1, seed=1)) == ("look", "overfitting")
    assert verdict(fit_of(2, 0.3), fit_of(-1, 0.1, seed=1)) == ("bad", "overfitting")
    assert verdict(fit_of(0, 0.1), fit_of(0, 0.1, seed=1)) == ("bad", "underfitting")
    weak = fit_of(0.5, 0.1, popular=0.1)
    assert verdict(weak, weak) == ("look", "underfitting")
    gap = doctor.check_fit(fit_of(2, 0.3), fit_of(0.5, 0.1, seed=1), 0).details["gap"]
    assert gap["gain"][0] == pytest.approx(1.5, abs=0.1)
    assert gap["gain"][1] < gap["gain"][0] < gap["gain"][2]
    assert gap["hr@10"][0] == pytest.approx(0.2)


def test_popular_guess_obeys_the_filter():
    count = np.array([5, 9, 7, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    sample = sample_of([[1], [1]], [3, 1], [np.array([1, 2]), np.array([0])])
    scores = levels_of([0.0], n=2)
    items = np.array([[3, *range(4, 12), 0], [0, *range(2, 11)]])
    fit = doctor.measure_fit(sample, scores, items, count)
    assert fit.hits.tolist() == [1, 0]  # the model's lists
    # Row 0: without 1 and 2, the last of ten places is for the item that nobody had.
    assert fit.popular_hits.tolist() == [1, 1]
    unfiltered = doctor.measure_fit(replace(sample, seen=None), scores, items, count)
    assert unfiltered.popular_hits.tolist() == [0, 1]


def test_draw_is_seeded_and_renders_the_serving_prompt(recommender, finished):
    sample, again = drawn(recommender, finished), drawn(recommender, finished)
    assert sample.row_ids == again.row_ids and len(set(sample.row_ids)) == 12
    assert sample.prompts == recommender.prompts(sample.histories)
    train = drawn(recommender, finished, "train")
    assert [s.tolist() for s in train.seen] == train.histories
    assert drawn(recommender, finished, filter_seen=False).seen is None
    assert doctor.first_rows(sample, 5).row_ids == sample.row_ids[:5]
    with pytest.raises(ValueError, match="no rows"):
        doctor.draw(recommender, pl.DataFrame({"row_id": []}), 5, 0, True)


# ------------------------------------------------------------------ the validation curve


def curve(run: Path, values: list[float], grpo: list[float] | None = None) -> Check:
    for stage, course in (("sft", values), ("grpo", grpo)):
        if course is not None:
            path = stage_folder(run, stage) / "validation.json"
            write_json(path, [{"step": 10 * i, "ndcg@10": v} for i, v in enumerate(course, 1)])
    return doctor.check_curve(run)


@pytest.mark.parametrize(
    ("values", "status", "words"),
    [
        ([0.01, 0.03, 0.05, 0.05], "ok", "about where"),
        ([0.01, 0.03, 0.05, 0.0505], "ok", "about where"),  # last by a hair
        ([0.01, 0.03, 0.05, 0.07], "look", "still rising"),
        ([0.01, 0.09, 0.05, 0.04, 0.03], "look", "long past"),
        ([0.0, 0.0], "bad", "nothing was learned"),
        ([0.05], "look", "one measurement"),
    ],
)
def test_curve_verdicts(tmp_path, values, status, words):
    check = curve(tmp_path, values)
    assert check.status == status and words in check.meaning


def test_curve_of_grpo(tmp_path):
    assert doctor.check_curve(tmp_path).status == "not run"
    flat = [0.01, 0.05, 0.05]
    assert curve(tmp_path, flat, [0.05, 0.06]).status == "ok"
    check = curve(tmp_path, flat, [0.05, 0.0505])
    assert check.status == "look" and "no more than chance" in check.meaning


# ------------------------------------------------------------------ lists


def test_diversity_verdicts():
    rng = np.random.default_rng(0)
    count = np.full(1000, 5)
    varied = np.array([rng.permutation(1000)[:10] for _ in range(50)])
    check = doctor.check_diversity(varied, 50, count, "lists")
    shown = len(np.unique(varied))
    assert check.status == "ok" and check.details["coverage"] == shown / 1000
    assert check.details["top_10_share_training"] == pytest.approx(0.01)
    same = np.tile(np.arange(10), (50, 1))
    check = doctor.check_diversity(same, 50, count, "lists")
    assert check.status == "bad" and check.details["distinct"] == 1 / 50
    assert check.details["top_10_share"] == 1.0
    assert doctor.check_diversity(same, 1, count, "lists").status == "bad"  # by concentration alone
    # Popular items in another order: distinct lists, yet everybody gets the same.
    shuffled = np.array([rng.permutation(10) for _ in range(50)])
    assert doctor.check_diversity(shuffled, 50, count, "lists").status == "bad"
    # A catalogue of ten items can't do otherwise.
    assert doctor.check_diversity(shuffled, 50, np.full(10, 5), "lists").status == "ok"
    half = np.concatenate([varied[:15], same[:35]])
    assert doctor.check_diversity(half, 50, np.full(1000, 5), "lists").status == "bad"
    assert doctor.check_diversity(half[:20], 20, np.full(1000, 5), "lists").status == "look"


def test_lists_verdicts():
    full = np.full(100, 10)
    certified = np.arange(100) < 50
    assert doctor.check_lists(certified, full, 10, "lists").status == "ok"
    assert doctor.check_lists(certified & False, full, 10, "lists").status == "look"
    short = full.copy()
    short[0] = 9
    assert doctor.check_lists(certified, short, 10, "lists").status == "look"
    short[:10] = 0
    check = doctor.check_lists(certified, short, 10, "lists")
    assert check.status == "bad" and check.details["short"] == 0.1


def test_stored_lists_count_rows_without_a_list(tmp_path):
    folder = stage_folder(tmp_path, "recommend")
    write_parquet(folder / "rows.parquet", pl.DataFrame({"row_id": ["a", "b", "c"]}))
    table = pl.DataFrame(
        {
            "row_id": ["c", "c", "a"],
            "rank": [2, 1, 1],
            "item_index": [5, 6, 7],
            "certified": [True, True, False],
            "prompt_sha256": ["x", "x", "y"],
        }
    )
    write_parquet(folder / "recommendations-00000.parquet", table[:2])
    write_parquet(folder / "recommendations-00001.parquet", table[2:])
    items, lengths, certified, n_prompts = doctor.stored_lists(tmp_path, 2)
    assert items.shape == (3, 10) and n_prompts == 2
    assert items[:, :2].tolist() == [[7, -1], [-1, -1], [6, 5]]
    assert lengths.tolist() == [1, 0, 2] and certified.tolist() == [False, False, True]


# ------------------------------------------------------------------ prompts


def prompts_of(run: Path, recommender: Recommender | None = None) -> Check:
    recommender = recommender or Recommender.load(run)
    valid, train = (drawn(recommender, run, split) for split in ("valid", "train"))
    return doctor.check_prompts(run, recommender, valid, train)


def test_prompts_that_agree(finished, recommender):
    check = prompts_of(finished, recommender)
    assert check.status == "ok" and check.details["compared"] == 12
    assert check.details["serving_template_share"] == 1.0


def test_prompts_of_rows_per_item_and_of_several_templates(tiny, tmp_path):
    check = prompts_of(make_run(tiny, tmp_path / "run", per_item=True, template=None))
    assert check.status == "ok" and check.details["compared"] == 12
    assert 0 < check.details["serving_template_share"] < 1


def test_serving_template_that_was_never_trained(tiny, tmp_path):
    check = prompts_of(make_run(tiny, tmp_path / "run", template="sequential/seen/02"))
    assert check.status == "bad" and "no training rows use the serving template" in check.value


def test_changed_template(copied, recommender):
    path = copied / "dataset" / "prompts" / "sequential" / "seen" / "01.jinja"
    path.write_text(path.read_text().replace("oldest", "latest"))  # of the same length
    check = prompts_of(copied)
    assert check.status == "bad" and "templates were" in check.value
    # Found without a model, too, and found by its effect where no hash was recorded.
    assert doctor.check_prompts(copied, None, None, None).status == "bad"
    edit(copied / "dataset" / "manifest.json", metrics={"serving_template": SERVING})
    check = prompts_of(copied)
    assert check.status == "bad" and "12 prompts differ from the stored ones" in check.value
    assert "12 training rows don't go on" in check.value
    # Serving from another copy of the templates.
    shutil.copytree(recommender.renderer.folder, copied / "dataset" / "prompts", dirs_exist_ok=True)
    assert prompts_of(copied).status == "ok"
    path.write_text("Other words: {{ history }}")
    renderer = PromptRenderer(path.parents[2])
    shutil.copytree(recommender.renderer.folder, copied / "dataset" / "prompts", dirs_exist_ok=True)
    foreign = Recommender.load(copied)
    foreign.renderer = renderer
    assert "12 prompts differ" in prompts_of(copied, foreign).value


def test_training_row_of_another_history(copied, recommender):
    path = copied / "dataset" / "train.parquet"
    rows = pl.read_parquet(path)
    write_parquet(path, rows.with_columns(completion=pl.col("completion").reverse()))
    check = prompts_of(copied, recommender)
    assert check.status == "bad" and "training rows don't go on" in check.value
    write_parquet(path, rows.with_columns(row_id=pl.col("row_id") + "x"))
    assert "no training rows were found" in prompts_of(copied, recommender).value


def test_target_inside_the_prompt(finished, recommender):
    valid, train = (drawn(recommender, finished, split) for split in ("valid", "train"))
    row = next(i for i, t in enumerate(valid.targets) if t not in valid.histories[i])
    leaky = list(valid.prompts)
    leaky[row] += recommender.sids[valid.targets[row]]
    sample = replace(valid, prompts=leaky)
    check = doctor.check_prompts(finished, recommender, sample, train)
    assert check.status == "bad" and "1 prompts hold their target" in check.value
    # A repeated purchase is no leak.
    histories = list(valid.histories)
    histories[row] = [*histories[row], int(valid.targets[row])]
    sample = replace(sample, histories=histories)
    problems = doctor.check_prompts(finished, recommender, sample, train).details["problems"]
    assert problems["prompts hold their target"] == 0


def test_prompts_not_run(copied, recommender, tmp_path):
    assert doctor.check_prompts(copied, None, None, None).status == "not run"
    (copied / "dataset" / "train.parquet").unlink()
    check = prompts_of(copied, recommender)
    assert check.status == "not run" and "lacks train.parquet" in check.value
    assert doctor.check_prompts(tmp_path / "none", None, None, None).status == "not run"


# ------------------------------------------------------------------ semantic ids


def save_codes(run: Path, codes: np.ndarray, sizes=None) -> None:
    """Overwrite a run's map by one that is consistent in itself."""
    folder = stage_folder(run, "quantize")
    old = SemanticIds.load(folder)
    SemanticIds(old.item_ids[: len(codes)], codes, sizes or old.codebook_sizes).save(folder)


def test_semantic_ids_of_the_run(finished, tmp_path):
    check = doctor.check_semantic_ids(finished)
    assert check.status == "ok" and check.details["collision_rate"] == 0
    assert doctor.check_semantic_ids(tmp_path).status == "not run"


def test_shuffled_map_is_a_stranger(copied):
    codes = SemanticIds.load(copied / "semantic_ids").codes
    save_codes(copied, codes[::-1])
    check = doctor.check_semantic_ids(copied)
    assert check.status == "bad" and "not the map of sft" in check.value


def test_extended_map_is_none(tiny, copied):
    old = SemanticIds.load(copied / "semantic_ids")
    taken = {tuple(c) for c in old.codes.tolist()}
    free = next(c for c in np.ndindex(4, 4, 4) if c not in taken)
    old.extend(pl.Series([9999]), np.array([free])).save(copied / "semantic_ids")
    assert doctor.check_semantic_ids(copied).status == "ok"


def test_collisions_and_codes_without_a_token(copied):
    path = copied / "semantic_ids" / "items.parquet"
    table = pl.read_parquet(path)
    codes = table["codes"].to_numpy().copy()
    codes[1] = codes[0]
    column = pl.Series("codes", codes, dtype=pl.Array(pl.Int32, 3))
    write_parquet(path, table.with_columns(column))
    check = doctor.check_semantic_ids(copied)
    assert check.status == "bad" and check.details["collision_rate"] == pytest.approx(2 / 30)
    codes[1] = [99, 0, 0]
    column = pl.Series("codes", codes, dtype=pl.Array(pl.Int32, 3))
    write_parquet(path, table.with_columns(column))
    check = doctor.check_semantic_ids(copied)
    assert check.status == "bad" and "outside its codebook" in check.meaning


@pytest.mark.parametrize(("largest", "status"), [(0.9, "bad"), (0.2, "look"), (0.01, "ok")])
def test_collapse_of_the_first_level(tiny, tmp_path, largest, status):
    n = 200
    first = np.where(np.arange(n) < largest * n, 0, np.arange(n) % 100)
    codes = np.stack([first, np.arange(n)], axis=1)
    folder = stage_folder(tmp_path, "quantize")
    SemanticIds(pl.Series("item_id", np.arange(n)), codes, (100, n)).save(folder)
    assert doctor.check_semantic_ids(tmp_path).status == status


def test_unused_codes(tmp_path):
    codes = np.stack([np.arange(100) % 40, np.arange(100)], axis=1)
    folder = stage_folder(tmp_path, "quantize")
    SemanticIds(pl.Series("item_id", np.arange(100)), codes, (100, 100)).save(folder)
    assert doctor.check_semantic_ids(tmp_path).status == "look"


# ------------------------------------------------------------------ manifests


def test_manifests_of_a_whole_run(tiny, tmp_path):
    shop = tiny.shop()
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(tmp_path, shop, model, tokenizer)
    check = doctor.check_manifests(tmp_path)
    assert check.status == "ok" and "4 finished stages" in check.value


def test_changed_file_of_the_same_size(copied):
    path = copied / "sft" / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    check = doctor.check_manifests(copied)
    assert check.status == "bad" and list(check.details["broken"]) == ["sft"]
    assert "model/model.safetensors changed" in check.meaning


def test_rebuilt_stage_and_missing_file(copied):
    edit(copied / "semantic_ids" / "manifest.json", content_hash="0" * 64)
    check = doctor.check_manifests(copied)
    assert list(check.details["broken"]) == ["build_dataset", "sft"]
    assert "genrec build_dataset" in check.advice
    (copied / "data" / "train.parquet").unlink()
    assert doctor.check_manifests(copied).details["broken"]["prepare"].startswith(str(copied))
    (copied / "data" / "manifest.json").write_text("{")
    assert doctor.check_manifests(copied).status == "bad"


def test_mixed_versions_and_unfinished_stages(copied):
    path = copied / "sft" / "manifest.json"
    versions = json.loads(path.read_text())["versions"]
    edit(path, versions={**versions, "torch": "0.4.1"})
    check = doctor.check_manifests(copied)
    assert check.status == "look" and f"torch 0.4.1 and {versions['torch']} (now" in check.value
    edit(path, versions=versions)
    write_json(copied / "grpo" / "in_progress.json", {})
    check = doctor.check_manifests(copied)
    assert check.status == "look" and check.details["unfinished"] == ["grpo"]


# ------------------------------------------------------------------ the whole


def test_next_step_is_the_cause_not_the_symptom():
    def check(name: str, status: doctor.Status) -> Check:
        return Check(name, "", status, "", "" if status == "ok" else f"mend {name}")

    symptoms = [check("diversity", "bad"), check("fit", "look"), check("prompts", "bad")]
    assert doctor.next_step(symptoms) == "prompts: mend prompts"
    assert doctor.next_step([check("manifests", "look"), check("fit", "look")]) == "fit: mend fit"
    assert doctor.next_step([check("model", "not run"), check("fit", "ok")]) == "model: mend model"
    assert doctor.next_step([check("fit", "ok")]) == "nothing to mend"
    order = [c.status for c in doctor.worst_first([check("fit", "ok"), *symptoms])]
    assert order == ["bad", "bad", "look", "ok"]
    assert sorted(doctor.CAUSES) == sorted(doctor.WORTH)


def test_another_engine_is_refused(recommender):
    with pytest.raises(ValueError, match="teacher forcing"):
        doctor.torch_engine(
            Recommender(recommender.catalog, recommender.semantic_ids, recommender.renderer,
                        SERVING, recommender.tokenizer, object(), 6, "sft")
        )  # fmt: skip
