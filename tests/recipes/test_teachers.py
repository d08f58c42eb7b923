"""Distillation end to end: a student taught by the trained model of another run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from recipe_calls import run

from genrec.artifacts import load_manifest, read_json, require

TRAIN = (
    "--use_cpu true --bf16 false --report_to none --disable_tqdm true --size tiny --vocab_size 400 "
    "--gradient_checkpointing false --eval_rows 30 --per_device_train_batch_size 16 "
    "--learning_rate 3e-3 --save_strategy no --logging_steps 1 --loss_over trie --max_steps 4"
).split()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    """A shop up to its rows."""
    folder = tmp_path_factory.mktemp("shop") / "run"
    run("prepare", folder, *"--format synthetic --n_users 120 --n_items 80".split())
    run("embed", folder, "--dim", 8)
    run("quantize", folder, *"--n_levels 2 --codebook_size 16 --report_map pca".split())
    run("build_dataset", folder)
    return folder


@pytest.fixture(scope="module")
def teacher(untrained: Path, tmp_path_factory) -> Path:
    folder = shutil.copytree(untrained, tmp_path_factory.mktemp("teacher") / "run")
    run("sft", folder, "--seed", 1, *TRAIN)
    return folder


@pytest.fixture
def student(untrained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(untrained, tmp_path / "student")


def test_a_taught_model_is_another_one(teacher: Path, student: Path, tmp_path: Path, capsys):
    alone = shutil.copytree(student, tmp_path / "alone")
    run("sft", student, "--seed", 0, "--teachers", teacher, "--teacher_weight", 0.9, *TRAIN)
    run("sft", alone, "--seed", 0, *TRAIN)
    made = require(student, "sft")
    assert made.inputs["teachers/0"] == require(teacher, "sft").content_hash
    assert made.config["teacher_weight"] == 0.9 and "teachers" not in made.config
    losses = [
        [entry["loss"] for entry in read_json(folder / "sft" / "log.json") if "loss" in entry]
        for folder in (student, alone)
    ]
    assert len(losses[0]) == len(losses[1]) == 4 and losses[0][0] != losses[1][0]
    moved = shutil.copytree(teacher, tmp_path / "moved")  # the same model elsewhere: done
    flags = "--seed", 0, "--teachers", moved, "--teacher_weight", 0.9, *TRAIN
    capsys.readouterr()
    run("sft", student, *flags)
    assert require(student, "sft").content_hash == made.content_hash
    with pytest.raises(ValueError, match="made with other input"):
        run("sft", student, "--seed", 0, "--teachers", alone, "--teacher_weight", 0.9, *TRAIN)
    assert "teacher_weight" not in require(alone, "sft").config
    told = {"run": teacher.name, "content_hash": require(teacher, "sft").content_hash}
    assert read_json(student / "sft" / "model" / "genrec.json")["teachers"] == [told]


def test_teachers_that_can_not_teach(untrained: Path, teacher: Path, student: Path, tmp_path: Path):
    for run_dir, message in (
        (student, "is this run itself"),
        (untrained, "stage 'sft' has not finished"),
        (tmp_path / "nothing", "stage 'sft' has not finished"),
    ):
        with pytest.raises(ValueError, match=message):
            run("sft", student, "--teachers", run_dir, *TRAIN)
    for wider in ("vocabulary", "level"):
        with pytest.raises(ValueError, match=f"was trained over trie.*loss_over={wider} would"):
            run("sft", student, "--teachers", teacher, *TRAIN, "--loss_over", wider)
    with pytest.raises(ValueError, match="has another vocabulary than the student"):
        run("sft", student, "--teachers", teacher, *TRAIN, "--vocab_size", 420)
    coarse = "--n_levels 2 --codebook_size 12 --report_map pca --overwrite true".split()
    run("quantize", student, *coarse)
    run("build_dataset", student, "--overwrite", "true")
    with pytest.raises(ValueError, match="is not the one that the teacher"):
        run("sft", student, "--teachers", teacher, *TRAIN)
    assert load_manifest(student, "sft") is None
