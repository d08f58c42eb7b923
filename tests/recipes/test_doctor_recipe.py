"""The doctor recipe as a user runs it."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import polars as pl
import pytest

from genrec.cli import recipes_folder, summaries

_shared = runpy.run_path(str(Path(__file__).resolve().parents[1] / "explain" / "conftest.py"))
make_listed_run, call = _shared["make_listed_run"], _shared["call_recipe"]
FEW = ("--rows", "10", "--exhaustive_rows", "4")
NAMES = {
    "manifests", "semantic ids", "model", "prompts", "legality", "levels", "fit",
    "validation curve", "search", "lists", "diversity",
}  # fmt: skip


@pytest.fixture(scope="module")
def listed(tiny, tmp_path_factory) -> Path:
    """Stages prepare … recommend around a random model, read only."""
    return make_listed_run(tiny, tmp_path_factory.mktemp("listed") / "run", strings=False)


@pytest.fixture
def copied(listed, tmp_path) -> Path:
    return shutil.copytree(listed, tmp_path / "run")


def examine(run: Path, *args: str, fails: bool = True) -> dict:
    """doctor.json of a run; `fails` says whether something must be bad."""
    if fails:
        with pytest.raises(SystemExit) as stop:
            call("doctor", "--run_dir", str(run), *FEW, *args)
        assert stop.value.code == 1
    else:
        call("doctor", "--run_dir", str(run), *FEW, *args)
    found = json.loads((run / "doctor.json").read_text())
    statuses = {check["status"] for check in found["checks"]}
    assert statuses <= {"ok", "look", "bad", "not run"} and ("bad" in statuses) == fails
    assert {check["name"] for check in found["checks"]} == NAMES == set(found["details"])
    assert all(set(c) == {"name", "value", "status", "meaning", "advice"} for c in found["checks"])
    assert all(c["advice"] for c in found["checks"] if c["status"] in ("look", "bad"))
    return found


def by_name(found: dict) -> dict[str, dict]:
    return {check["name"]: check for check in found["checks"]}


def test_a_random_model_is_no_healthy_run(copied, capsys):
    before = {path.name for path in copied.iterdir()}
    found = examine(copied)
    assert {path.name for path in copied.iterdir()} == before | {"doctor.json"}
    order = ["bad", "look", "not run", "ok"]
    places = [order.index(check["status"]) for check in found["checks"]]
    assert places == sorted(places) and found["rows"] == 10 and found["seed"] == 0
    checks = by_name(found)
    assert checks["legality"]["status"] == "bad"
    # What this run lacks is said, never passed over.
    assert checks["prompts"]["status"] == checks["validation curve"]["status"] == "not run"
    assert "lacks train, valid.parquet" in checks["prompts"]["value"]
    assert checks["diversity"]["value"].endswith("14 lists of recommend (test)")
    assert found["details"]["search"]["beam_width"] == 12
    out = capsys.readouterr().out
    last = [line for line in out.splitlines() if line][-1]
    assert last.startswith("next: legality: ") and "what was found" in out


def test_same_seed_same_figures_and_no_look_at_test_rows(copied):
    first = examine(copied)
    test = copied / "data" / "test.parquet"
    test.write_bytes(bytes(test.stat().st_size))  # whoever opens it fails
    again = examine(copied)
    assert by_name(again)["manifests"]["status"] == "bad"
    for name in NAMES - {"manifests"}:
        assert again["details"][name] == first["details"][name]
    other = examine(copied, "--seed", "1")
    assert other["details"]["legality"] != first["details"]["legality"]


def test_another_beam_looks_at_its_own_lists(copied):
    found = examine(copied, "--beam_width", "1")
    search = by_name(found)["search"]
    assert search["status"] == "bad" and search["advice"].endswith("--beam_width 4")
    assert found["details"]["diversity"]["source"] == "lists of the sample"
    wide = examine(copied, "--beam_width", "20", "--model_stage", "sft")
    search = wide["details"]["search"]
    assert search["beam_rank"] == search["exhaustive_rank"] and search["recall@10"] == 1
    # The shop's people buy things again.
    assert "the filter removes 25% of the targets" in by_name(wide)["search"]["value"]


def test_legality_asks_for_no_more_than_sft_trained(copied):
    path = copied / "sft" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["loss_over"] = "trie"
    path.write_text(json.dumps(manifest))
    found = examine(copied)  # other things are bad: the model is random
    legality = by_name(found)["legality"]
    assert legality["status"] == "not run" and "loss_over=trie" in legality["value"]
    assert len(found["details"]["legality"]["legal_mass"]) == 3
    manifest["config"]["loss_over"] = "level"
    path.write_text(json.dumps(manifest))
    assert "among the codes of the level" in by_name(examine(copied))["legality"]["value"]


def test_a_model_that_does_not_load(copied):
    weights = copied / "sft" / "model" / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    checks = by_name(examine(copied))
    assert checks["model"]["status"] == checks["manifests"]["status"] == "bad"
    missing = {"prompts", "legality", "levels", "fit", "search", "lists", "diversity"}
    assert {name for name, c in checks.items() if c["status"] == "not run"} >= missing
    assert checks["semantic ids"]["status"] == "ok"


@pytest.mark.parametrize(
    "name",
    [
        "sft/manifest.json",
        "dataset/manifest.json",
        "semantic_ids/semantic_ids.json",
        "semantic_ids/items.parquet",
        "data/valid.parquet",
        "data/catalog.parquet",
        "recommendations/recommendations-*.parquet",
    ],
)
def test_a_damaged_file_stops_no_other_check(copied, name):
    (path, *_) = sorted(copied.glob(name))
    path.write_bytes(b"x" * path.stat().st_size)
    checks = by_name(examine(copied))
    assert checks["manifests"]["status"] == "bad"


def test_a_run_without_validation_rows(copied):
    path = copied / "data" / "valid.parquet"
    pl.read_parquet(path).clear().write_parquet(path)
    manifest = copied / "data" / "manifest.json"
    found = json.loads(manifest.read_text())
    found["outputs"]["valid.parquet"]["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(found))
    checks = by_name(examine(copied))
    assert checks["manifests"]["status"] == "bad" and checks["semantic ids"]["status"] == "ok"
    assert checks["fit"]["status"] == checks["search"]["status"] == "not run"
    assert checks["fit"]["value"] == "no row of valid has a history"


def test_a_run_that_has_just_begun(copied, capsys):
    for folder in ("semantic_ids", "dataset", "sft", "recommendations"):
        shutil.rmtree(copied / folder)
    checks = by_name(examine(copied, fails=False))
    assert {name for name, c in checks.items() if c["status"] == "not run"} == NAMES - {"manifests"}
    assert "next: semantic ids: genrec quantize" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--run", "nowhere"), "nowhere holds no finished stage"),
        (("--rows", "0"), "rows=0 must be at least 1"),
        (("--beam_width", "-1"), "beam_width=-1"),
        (("--model_stage", "dpo"), "choose one of sft, grpo"),
    ],
)
def test_mistakes_end_with_one_line(capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        call("doctor", *flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and words in error and "Traceback" not in error


def test_the_command_lists_it():
    assert summaries(recipes_folder())["doctor"].startswith("Is this run healthy?")


def test_doctor_of_a_whole_run(copied_run):
    """Made by the recipes: the stages' files are what the checks expect."""
    run = copied_run("data", "embeddings", "semantic_ids", "dataset", "sft", "grpo",
                     "recommendations")  # fmt: skip
    with pytest.raises(SystemExit):  # twelve steps leave a model that knows little
        call("doctor", "--run", str(run), *FEW)
    found = json.loads((run / "doctor.json").read_text())
    checks = by_name(found)
    assert checks["prompts"]["status"] == checks["manifests"]["status"] == "ok"
    assert checks["model"]["value"].startswith("grpo")
    assert set(found["details"]["validation curve"]["ndcg"]) == {"sft", "grpo"}
    assert checks["legality"]["status"] == "bad"
    assert "not run" not in {c["status"] for n, c in checks.items() if n != "levels"}
