"""`genrec compare`: hand-computed scores, what it refuses, and the settings that it points out."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from genrec.artifacts import Stage, read_json
from genrec.cli import recipes_folder, summaries
from genrec.evaluation.slices import Slicing, slices_of_rows

RECIPE = recipes_folder() / "compare.py"
GAIN = {1: 1.0, 2: 1 / np.log2(3)}  # of a hit at rank 1 and at rank 2
BASELINE = [2, 0, 0, 0]


@pytest.fixture(scope="module")
def module() -> dict[str, Any]:
    return runpy.run_path(str(RECIPE), run_name="compare")


@pytest.fixture
def compare(module, monkeypatch, tmp_path):
    """Runs the recipe as the command line does."""

    def run(*systems: str, output: str = "out", flags: str = "") -> Path:
        folder = tmp_path / output
        named = [str(RECIPE), "--systems", *systems, "--output_dir", str(folder)]
        small = ["--samples", "50", "--permutations", "100"]
        monkeypatch.setattr(sys, "argv", [*named, *small, *flags.split()])
        monkeypatch.chdir(tmp_path)
        module["main"]()
        return folder

    return run


@pytest.fixture
def evaluated(tmp_path):
    """Writes what evaluate leaves: the ranks of each seed, and of a baseline."""

    def write(
        name: str, *seeds: list[int], baseline=BASELINE, system="genrec", shuffle=False,
        stage_config: dict | None = None, flat=False, **changed: Any,
    ) -> Path:  # fmt: skip
        run = tmp_path / name
        folder = run if flat else run / "evaluation"
        folder.mkdir(parents=True)
        if stage_config is not None:
            stage = Stage(run, "sft", stage_config)
            stage.is_done()
            stage.finish(rows=1)
        lists = [(system, i, ranks) for i, ranks in enumerate(seeds)] + [("item-kNN", 0, baseline)]
        rows = [
            (f"r{row}", f"u{row // 2}", name, seed, rank)
            for name, seed, ranks in lists
            for row, rank in enumerate(ranks)
        ]
        schema = ["row_id", "user_id", "system", "seed", "target_rank"]
        table = pl.DataFrame(rows, schema=schema, orient="row")
        if shuffle:
            table = table.sample(fraction=1, shuffle=True, seed=1)
        table.write_parquet(folder / "per_user.parquet")
        coverage = {"value": 0.2, "low": None, "high": None, "seeds": [0.2]}
        own = {"coverage@2": coverage | {"value": 0.3, "seeds": [0.3]}, **changed.pop("more", {})}
        metrics = {
            "dataset": "Tiny", "split": "test", "split_sha256": "ab" * 32, "rows": 4, "users": 2,
            "items": 9, "filter_seen": True, "fit_on": "train", "ks": [1, 2], "depth": 3,
            "samples": 9, "permutations": 9, "seed": 0, "reference": system,
            "unknown_items": 5, "baselines": {"item-kNN": {"description": "neighbours=9"}},
            "systems": {system: own, "item-kNN": {"coverage@2": coverage}},
        }  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(metrics | changed))
        return run

    return write


def test_scores_by_hand(compare, evaluated, capsys):
    evaluated("a0", [1, 2, 0, 3], stage_config={"training": {"seed": 0}, "size": "tiny"})
    evaluated("a1", [1, 0, 2, 0], stage_config={"training": {"seed": 1}, "size": "tiny"})
    evaluated("b", [1, 1, 1, 0], stage_config={"training": {"seed": 0}, "size": "small"})
    folder = compare("A=a0", "A=a1", "B=b")
    found = read_json(folder / "comparison.json")
    a, b, knn = (found["systems"][name] for name in ("A", "B", "item-kNN"))
    assert a["HR@2"]["seeds"] == [0.5, 0.5] and a["HR@2"]["value"] == 0.5
    assert a["HR@1"]["value"] == 0.25 and b["HR@1"]["value"] == 0.75
    ndcg = [(1 + GAIN[2]) / 4, (1 + GAIN[2]) / 4]
    assert a["NDCG@2"]["seeds"] == pytest.approx(ndcg)
    assert knn["NDCG@2"]["value"] == pytest.approx(GAIN[2] / 4)
    assert found["differences"]["A - B"]["HR@1"]["value"] == pytest.approx(-0.5)
    assert set(found["differences"]) == {"A - B", "A - item-kNN"}
    assert found["curves"]["A"]["recall"] == pytest.approx([0.25, 0.5, 0.5 + 1 / 8])
    assert a["coverage@2"] == {"value": 0.3, "low": None, "high": None, "seeds": [0.3, 0.3]}
    assert [run["system"] for run in found["runs"]] == ["A", "A", "B"]
    assert [run["value"] for run in found["runs"]] == pytest.approx([*ndcg, 0.75])
    assert found["runs"][2]["reads"] is None
    names = {s["name"]: s["values"] for s in found["settings"]}
    assert names == {"sft: training.seed": ["0", "1", "0"], "sft: size": ["tiny", "tiny", "small"]}
    assert found["notes"] == [] and "unknown_items" not in found
    assert found["samples"] == 50 and found["reference"] == "A"

    table = pl.read_parquet(folder / "comparison.parquet")
    row = table.row(
        by_predicate=(pl.col("system") == "B") & (pl.col("metric") == "HR@1"), named=True
    )
    assert row["value"] == 0.75 and row["seeds"] == [0.75] and row["difference"] == -0.5
    own = table.filter(pl.col("system") == "A")
    assert own["difference"].null_count() == own.height
    assert "A (2 seeds)" in capsys.readouterr().out
    page = (folder / "comparison.html").read_text()
    assert "sft: size" in page and "4 systems" not in page and "3 systems from 3 runs" in page


def test_values_beyond_accuracy_are_paired_by_row(compare, evaluated):
    """Both runs' lists are as novel as their row lets them be, one by .5 bits more."""
    of_row = [1.0, 3.0, 5.0, 9.0]
    for name, more in (("a", 0.5), ("b", 0.0)):
        path = evaluated(name, [1, 2, 0, 3]) / "evaluation" / "per_user.parquet"
        table = pl.read_parquet(path)
        novelty = [*(value + more for value in of_row), 2.0, None, 2.0, 2.0]
        table.with_columns(
            pl.Series("novelty@2", novelty), pl.Series("popularity@2", [6.0] * 8),
            pl.Series("history_popularity", [4.0] * 8),
        ).write_parquet(path)  # fmt: skip
    found = read_json(compare("A=a", "B=b") / "comparison.json")
    own, apart = found["systems"]["A"]["novelty@2"], found["differences"]["A - B"]["novelty@2"]
    assert own["value"] == 5 and own["low"] < 5 < own["high"]
    assert apart["value"] == pytest.approx(0.5) == apart["low"] == apart["high"]
    assert found["systems"]["item-kNN"]["novelty@2"]["value"] == 2
    knn = found["differences"]["A - item-kNN"]["novelty@2"]["value"]
    assert knn == pytest.approx((1 + 5 + 9 + 3 * 0.5) / 3 - 2)  # row 1 has no list there
    assert found["systems"]["B"]["popularity_lift@2"]["value"] == pytest.approx(0.5)


def test_diversity_in_other_vectors_is_not_compared(compare, evaluated):
    for name in "ab":
        run = evaluated(name, [1, 2, 0, 3])
        path = run / "evaluation" / "per_user.parquet"
        pl.read_parquet(path).with_columns(
            pl.lit(0.5).alias("ild@2"), pl.lit(3.0).alias("novelty@2")
        ).write_parquet(path)
        stage = Stage(run, "embed", {"dim": 8 if name == "a" else 16})
        stage.is_done()
        stage.finish(rows=1)
    apart = read_json(compare("A=a", "B=b") / "comparison.json")["differences"]["A - B"]
    assert "novelty@2" in apart and "ild@2" not in apart


def test_slices_and_training_of_the_runs(compare, evaluated):
    slicing = Slicing("history length", ["short", "long"], np.array([1, 0, 0, -1]))
    rows = pl.DataFrame({"row_id": ["r3", "r2", "r1", "r0"]})  # in another order than the ranks
    for name, ranks in (("a0", [1, 1, 0, 1]), ("a1", [1, 1, 1, 1]), ("b", [0, 0, 0, 1])):
        run = evaluated(name, ranks, baseline=[0] * 4)
        slices_of_rows([slicing], rows).write_parquet(run / "evaluation" / "row_slices.parquet")
        (run / "sft").mkdir()
        measured = [{"step": 10, "ndcg@10": 0.1}, {"step": 20, "ndcg@10": 0.2, "hr@10": 0.3}]
        (run / "sft" / "validation.json").write_text(json.dumps(measured))
    folder = compare("A=a0", "A=a1", "B=b")
    table = pl.read_parquet(folder / "slices.parquet")
    hit = {
        (row["system"], row["slice"]): row["value"]
        for row in table.filter(metric="HR@2").iter_rows(named=True)
    }
    assert hit["A", "short"] == 0.75 and hit["A", "long"] == 1  # r1 and r2; r3
    assert hit["B", "short"] == 0 and hit["B", "long"] == 1
    runs = read_json(folder / "comparison.json")["runs"]
    assert runs[0]["training"] == {"sft": [[10, 0.1], [20, 0.2]]}
    page = (folder / "comparison.html").read_text()
    assert "By history length" in page and "validation NDCG@10 of each run" in page


def test_rows_with_several_targets(compare, evaluated):
    run = evaluated("a", [1, 2, 0, 3])
    path = run / "evaluation" / "per_user.parquet"
    table = pl.read_parquet(path).with_columns(
        pl.when(pl.col("target_rank") > 0).then(pl.concat_list("target_rank", 3)).otherwise([])
        .list.unique(maintain_order=True).alias("hit_ranks"),
        pl.lit(2, dtype=pl.Int32).alias("n_relevant"),
    )  # fmt: skip
    table.write_parquet(path)  # genrec hits at [1, 3], [2, 3], nothing, [3]
    found = read_json(compare("A=a") / "comparison.json")["systems"]["A"]
    assert found["HR@2"]["value"] == 0.5 and found["Recall@2"]["value"] == 0.25
    assert found["MAP@1"]["value"] == 0.125  # one row of four, with one of two items
    curve = read_json(compare("A=a", output="again") / "comparison.json")["curves"]["A"]
    assert curve["recall"] == pytest.approx([1 / 8, 2 / 8, 5 / 8])


def test_rows_are_matched_by_id_not_by_place(compare, evaluated):
    evaluated("a", [1, 2, 0, 3])
    evaluated("b", [2, 0, 1, 0])
    evaluated("c", [2, 0, 1, 0], shuffle=True)
    plain, mixed = compare("A=a", "B=b", output="x"), compare("A=a", "B=c", output="y")
    one, other = (read_json(f / "comparison.json") for f in (plain, mixed))
    assert one["systems"] == other["systems"] and one["differences"] == other["differences"]


def test_somebodys_lists_and_another_reference(compare, evaluated):
    evaluated("a", [1, 2, 0, 3])
    lists = evaluated("lists", [0, 0, 1, 0], system="SASRec", flat=True)
    (lists / "test_reads.jsonl").write_text("ab" * 32 + "\n" + "cd" * 32 + "\n")
    found = read_json(compare("A=a", f"S={lists}", flags="--reference S") / "comparison.json")
    assert found["reference"] == "S" and set(found["differences"]) == {"S - A", "S - item-kNN"}
    assert found["runs"][1]["reads"] == 1


def test_seeds_that_are_no_plain_repetitions_are_named(compare, evaluated, caplog):
    evaluated("a0", [1, 2, 0, 3], stage_config={"size": "tiny", "seed": 0})
    evaluated("a1", [1, 2, 0, 3], stage_config={"size": "small", "seed": 1})
    folder = compare("A=a0", "A=a1")
    first, second = read_json(folder / "comparison.json")["notes"]
    assert first == "runs of A differ in more than the seed: sft: size"
    assert second.startswith("two runs of A have the same lists")
    assert first in caplog.text and first in (folder / "comparison.html").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"split_sha256": "cd" * 32}, "a has split_sha256=abab.*b has split_sha256=cdcd"),
        ({"split": "valid"}, "a has split=test, b has split=valid"),
        ({"filter_seen": False}, "a has filter_seen=True, b has filter_seen=False"),
        ({"restricted": {"deny": "ef" * 32, "items": 7}}, "a has restricted=None, b has .*'deny'"),
        ({"ks": [1, 3]}, r"a has ks=\[1, 2\], b has ks=\[1, 3\]"),
    ],
)
def test_runs_under_other_rules_are_refused(compare, evaluated, tmp_path, changed, message):
    evaluated("a", [1, 2, 0, 3])
    evaluated("b", [1, 2, 0, 3], **changed)
    with pytest.raises(ValueError, match=message):
        compare("A=a", "B=b")
    assert not (tmp_path / "out").exists()


def test_runs_out_of_the_same_part_of_the_catalogue(compare, evaluated):
    part = {"restricted": {"allow": "ef" * 32, "items": 7}}
    evaluated("a", [1, 2, 0, 3], **part)
    evaluated("b", [1, 2, 0, 3], **part)
    page = (compare("A=a", "B=b") / "comparison.html").read_text()
    assert "7 of 9 items ranked" in page and "all 9 items" not in page


def test_a_baseline_that_is_not_the_same_in_all_runs_is_left_out(compare, evaluated):
    """As content-kNN is where runs have other vectors."""
    evaluated("a", [1, 2, 0, 3])
    evaluated("b", [1, 2, 0, 3], baseline=[1, 0, 0, 0])
    folder = compare("A=a", "B=b")
    found = read_json(folder / "comparison.json")
    assert set(found["systems"]) == {"A", "B"} and not found["baselines"]
    assert any(
        note.startswith("item-kNN is left out: its lists in a and b") for note in found["notes"]
    )
    with pytest.raises(ValueError, match="'item-kNN' is not among the systems A, B"):
        compare("A=a", "B=b", flags="--reference item-kNN", output="other")


def test_runs_on_other_rows_are_refused(compare, evaluated):
    evaluated("a", [1, 2, 0, 3])
    evaluated("b", [1, 2, 0], baseline=[2, 0, 0])
    with pytest.raises(ValueError, match="a was evaluated on 4 rows, b on 3"):
        compare("A=a", "B=b")
    evaluated("c", [1, 2, 0])  # the baseline has a row more
    with pytest.raises(ValueError, match="lacks rows of genrec; rerun evaluate"):
        compare("C=c")


@pytest.mark.parametrize(
    ("systems", "flags", "message"),
    [
        (["A"], "", "'A' must have the form NAME=FOLDER"),
        (["=a"], "", "must have the form NAME=FOLDER"),
        (["A=a"], "--reference B", "reference='B' is not among the systems A"),
        (["A=a"], "--samples 0", "samples=0 must be at least 1"),
        (["A=a", "B=./a"], "", "is named twice"),
        (["item-kNN=a"], "", "'item-kNN' is a baseline in a"),
        (["A=nowhere"], "", "nowhere holds no evaluation; run: genrec evaluate"),
    ],
)
def test_mistakes_of_the_command_line(compare, evaluated, tmp_path, systems, flags, message):
    evaluated("a", [1, 2, 0, 3])
    with pytest.raises(ValueError, match=message):
        compare(*systems, flags=flags)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_old_folders_are_refused(compare, evaluated, tmp_path):
    run = evaluated("a", [1, 2, 0, 3])
    (tmp_path / "out").mkdir()
    kept = tmp_path / "out" / "mine.txt"
    kept.write_text("mine")
    with pytest.raises(ValueError, match="out is not an empty folder"):
        compare("A=a")
    assert [p.name for p in kept.parent.iterdir()] == ["mine.txt"]
    path = run / "evaluation" / "per_user.parquet"
    pl.read_parquet(path).drop("seed").write_parquet(path)
    with pytest.raises(ValueError, match="written by an older genrec"):
        compare("A=a", output="new")


def test_the_command_lists_it():
    assert summaries(recipes_folder())["compare"].startswith("Compare: ")
