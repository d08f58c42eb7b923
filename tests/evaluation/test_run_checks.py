"""Every check of a run's files has a case in which it fails."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from genrec.artifacts import stage_folder, write_json, write_parquet
from genrec.evaluation import probes, run_checks
from genrec.evaluation.doctor import Check
from genrec.evaluation.probes import Sample
from genrec.prompts import PromptRenderer
from genrec.recommend import Recommender
from genrec.semantic_ids import SemanticIds
from genrec.tasks.families import SEQUENTIAL
from genrec.tasks.instruction_rows import RowWriter
from genrec.tasks.rendering import ItemTexts, render_rows
from genrec.tasks.sequential import explode, sequential_rows

SERVING = "sequential/seen/01"


def make_run(tiny, run: Path, per_item: bool = False, template: str | None = SERVING) -> Path:
    """Stages prepare … sft with instruction rows, around a random model."""
    shop = tiny.shop(n_users=40, n_items=30)
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(run, shop, model, tokenizer)
    folder = stage_folder(run, "build_dataset")
    renderer = PromptRenderer(folder / "prompts")
    texts = ItemTexts.of(shop.catalog, shop.semantic_ids)
    train = explode(shop.splits.train) if per_item else shop.splits.train
    for name, rows, chosen in (("train", train, template), ("valid", shop.splits.valid, SERVING)):
        path = folder / f"{name}.parquet"
        writer = RowWriter(path, [SEQUENTIAL], shop.semantic_ids.item_ids, rows["user_id"].dtype)
        writer.write(render_rows(sequential_rows(rows), texts, renderer, template=chosen))
        writer.close()
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
    return probes.draw(recommender, rows, 12, 3, filter_seen)


# ------------------------------------------------------------------ the validation curve


def curve(run: Path, values: list[float], grpo: list[float] | None = None) -> Check:
    for stage, course in (("sft", values), ("grpo", grpo)):
        if course is not None:
            path = stage_folder(run, stage) / "validation.json"
            write_json(path, [{"step": 10 * i, "ndcg@10": v} for i, v in enumerate(course, 1)])
    return run_checks.check_curve(run)


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
    assert run_checks.check_curve(tmp_path).status == "not run"
    flat = [0.01, 0.05, 0.05]
    assert curve(tmp_path, flat, [0.05, 0.06]).status == "ok"
    check = curve(tmp_path, flat, [0.05, 0.0505])
    assert check.status == "look" and "no more than chance" in check.meaning


# ------------------------------------------------------------------ stored lists


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
    items, lengths, certified, n_prompts = run_checks.stored_lists(tmp_path, 2)
    assert items.shape == (3, 10) and n_prompts == 2
    assert items[:, :2].tolist() == [[7, -1], [-1, -1], [6, 5]]
    assert lengths.tolist() == [1, 0, 2] and certified.tolist() == [False, False, True]


# ------------------------------------------------------------------ prompts


def prompts_of(run: Path, recommender: Recommender | None = None) -> Check:
    recommender = recommender or Recommender.load(run)
    valid, train = (drawn(recommender, run, split) for split in ("valid", "train"))
    return run_checks.check_prompts(run, recommender, valid, train)


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
    assert run_checks.check_prompts(copied, None, None, None).status == "bad"
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
    check = run_checks.check_prompts(finished, recommender, sample, train)
    assert check.status == "bad" and "1 prompts hold their target" in check.value
    # A repeated purchase is no leak.
    histories = list(valid.histories)
    histories[row] = [*histories[row], int(valid.targets[row])]
    sample = replace(sample, histories=histories)
    problems = run_checks.check_prompts(finished, recommender, sample, train).details["problems"]
    assert problems["prompts hold their target"] == 0


def test_prompts_not_run(copied, recommender, tmp_path):
    assert run_checks.check_prompts(copied, None, None, None).status == "not run"
    (copied / "dataset" / "train.parquet").unlink()
    check = prompts_of(copied, recommender)
    assert check.status == "not run" and "lacks train.parquet" in check.value
    assert run_checks.check_prompts(tmp_path / "none", None, None, None).status == "not run"


# ------------------------------------------------------------------ semantic ids


def save_codes(run: Path, codes: np.ndarray, sizes=None) -> None:
    """Overwrite a run's map by one that is consistent in itself."""
    folder = stage_folder(run, "quantize")
    old = SemanticIds.load(folder)
    SemanticIds(old.item_ids[: len(codes)], codes, sizes or old.codebook_sizes).save(folder)


def test_semantic_ids_of_the_run(finished, tmp_path):
    check = run_checks.check_semantic_ids(finished)
    assert check.status == "ok" and check.details["collision_rate"] == 0
    assert run_checks.check_semantic_ids(tmp_path).status == "not run"


def test_shuffled_map_is_a_stranger(copied):
    codes = SemanticIds.load(copied / "semantic_ids").codes
    save_codes(copied, codes[::-1])
    check = run_checks.check_semantic_ids(copied)
    assert check.status == "bad" and "not the map of sft" in check.value


def test_extended_map_is_none(tiny, copied):
    old = SemanticIds.load(copied / "semantic_ids")
    taken = {tuple(c) for c in old.codes.tolist()}
    free = next(c for c in np.ndindex(4, 4, 4) if c not in taken)
    old.extend(pl.Series([9999]), np.array([free])).save(copied / "semantic_ids")
    assert run_checks.check_semantic_ids(copied).status == "ok"


def test_collisions_and_codes_without_a_token(copied):
    path = copied / "semantic_ids" / "items.parquet"
    table = pl.read_parquet(path)
    codes = table["codes"].to_numpy().copy()
    codes[1] = codes[0]
    column = pl.Series("codes", codes, dtype=pl.Array(pl.Int32, 3))
    write_parquet(path, table.with_columns(column))
    check = run_checks.check_semantic_ids(copied)
    assert check.status == "bad" and check.details["collision_rate"] == pytest.approx(2 / 30)
    codes[1] = [99, 0, 0]
    column = pl.Series("codes", codes, dtype=pl.Array(pl.Int32, 3))
    write_parquet(path, table.with_columns(column))
    check = run_checks.check_semantic_ids(copied)
    assert check.status == "bad" and "outside its codebook" in check.meaning


@pytest.mark.parametrize(("largest", "status"), [(0.9, "bad"), (0.2, "look"), (0.01, "ok")])
def test_collapse_of_the_first_level(tiny, tmp_path, largest, status):
    n = 200
    first = np.where(np.arange(n) < largest * n, 0, np.arange(n) % 100)
    codes = np.stack([first, np.arange(n)], axis=1)
    folder = stage_folder(tmp_path, "quantize")
    SemanticIds(pl.Series("item_id", np.arange(n)), codes, (100, n)).save(folder)
    assert run_checks.check_semantic_ids(tmp_path).status == status


def test_unused_codes(tmp_path):
    codes = np.stack([np.arange(100) % 40, np.arange(100)], axis=1)
    folder = stage_folder(tmp_path, "quantize")
    SemanticIds(pl.Series("item_id", np.arange(100)), codes, (100, 100)).save(folder)
    assert run_checks.check_semantic_ids(tmp_path).status == "look"


# ------------------------------------------------------------------ manifests


def test_manifests_of_a_whole_run(tiny, tmp_path):
    shop = tiny.shop()
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(tmp_path, shop, model, tokenizer)
    check = run_checks.check_manifests(tmp_path)
    assert check.status == "ok" and "4 finished stages" in check.value


def test_changed_file_of_the_same_size(copied):
    path = copied / "sft" / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    check = run_checks.check_manifests(copied)
    assert check.status == "bad" and list(check.details["broken"]) == ["sft"]
    assert "model/model.safetensors changed" in check.meaning


def test_rebuilt_stage_and_missing_file(copied):
    edit(copied / "semantic_ids" / "manifest.json", content_hash="0" * 64)
    check = run_checks.check_manifests(copied)
    assert list(check.details["broken"]) == ["build_dataset", "sft"]
    assert "genrec build_dataset" in check.advice
    (copied / "data" / "train.parquet").unlink()
    assert run_checks.check_manifests(copied).details["broken"]["prepare"].startswith(str(copied))
    (copied / "data" / "manifest.json").write_text("{")
    assert run_checks.check_manifests(copied).status == "bad"


def test_mixed_versions_and_unfinished_stages(copied):
    path = copied / "sft" / "manifest.json"
    versions = json.loads(path.read_text())["versions"]
    edit(path, versions={**versions, "torch": "0.4.1"})
    check = run_checks.check_manifests(copied)
    assert check.status == "look" and f"torch 0.4.1 and {versions['torch']} (now" in check.value
    edit(path, versions=versions)
    write_json(copied / "grpo" / "in_progress.json", {})
    check = run_checks.check_manifests(copied)
    assert check.status == "look" and check.details["unfinished"] == ["grpo"]
