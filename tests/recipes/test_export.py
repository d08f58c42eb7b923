"""The export recipe as a user runs it, on a run around a random model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import polars as pl
import pytest

from genrec.artifacts import Stage, read_shards, write_json
from genrec.recommend import Recommender

_shared = runpy.run_path(str(Path(__file__).resolve().parents[1] / "explain" / "conftest.py"))
make_listed_run, K, BEAM = _shared["make_listed_run"], _shared["K"], _shared["BEAM"]


@pytest.fixture(scope="module")
def listed(tiny, tmp_path_factory) -> Path:
    """Stages prepare … evaluate, with hostile titles; read only."""
    run = make_listed_run(tiny, tmp_path_factory.mktemp("listed") / "run", strings=False)
    stage = Stage(run, "evaluate", {"system": "genrec", "ks": [5]}, ["prepare", "recommend"])
    assert not stage.is_done()
    value = {"value": 0.1234, "low": 0.1, "high": 0.2, "seeds": []}
    write_json(
        stage.folder / "metrics.json",
        {
            "split": "test", "rows": 14, "items": 20, "filter_seen": True,
            "systems": {"genrec": {"HR@5": value, "NDCG@5": value}},
        },
    )  # fmt: skip
    stage.finish(rows=14)
    return run


def test_a_bundle_serves_the_lists_that_recommend_made(in_process, listed: Path, tmp_path: Path):
    target = tmp_path / "deep" / "bundle"
    said = in_process("export", listed, "--output_dir", str(target))
    assert str(target) in said and "fill in the licence" in said and "weights in float32" in said
    decoding = json.loads((target / "decoding.json").read_text())
    assert (decoding["k"], decoding["beam_width"]) == (K, BEAM)  # recommend's
    recommender = Recommender.load(target)
    table = read_shards(listed / "recommendations", "recommendations")
    ids = recommender.catalog["item_id"]
    rows = pl.read_parquet(listed / "data" / "test.parquet")
    alike = 0
    for row_id, history, seen in rows.select(
        "row_id", "history_item_index", "seen_item_index"
    ).iter_rows():
        if set(seen) != set(history):
            continue  # the recipe leaves out what a prompt doesn't show, too
        made = recommender.recommend([ids[i] for i in history])
        mine = table.filter(pl.col("row_id") == row_id)
        assert [r.item_id for r in made] == mine["item_id"].to_list()
        assert [r.score for r in made] == pytest.approx(mine["score"].to_list(), abs=1e-5)
        alike += 1
    assert alike > 2
    text = (target / "README.md").read_text()
    assert "0.1234" in text and "0.1000 to 0.2000" in text and "14; 20 items" in text


def test_verify(in_process, listed: Path, tmp_path: Path, monkeypatch, capsys):
    target = tmp_path / "b"
    in_process("export", listed, "--output_dir", str(target))
    assert "OK: " in in_process("export", listed, "--verify", str(target))
    with (target / "README.md").open("a") as card:
        card.write("\nmine\n")
    assert "README.md was edited" in in_process("export", listed, "--verify", str(target))
    weights = target / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(SystemExit) as stopped:
        in_process("export", listed, "--verify", str(target))
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert "model.safetensors was changed" in said and "NOT verified: 1" in said
    assert "is no bundle" in in_process("export", listed, "--verify", str(listed), fails=True)


def test_the_default_place_and_what_is_refused(in_process, listed: Path, tmp_path: Path):
    said = in_process("export", tmp_path / "none", fails=True)
    assert "stage 'sft' has not finished" in said and not (tmp_path / "none").exists()
    for flags, message in (
        (["--model_stage", "quantize"], "model_stage='quantize' is not known"),
        (["--dtype", "int8"], "dtype='int8' is not known"),
        (["--k", "0"], "k=0 must be at least 1"),
        (["--model_stage", "grpo"], "stage 'grpo' has not finished"),
        (["--output_dir", str(listed)], "never overwrites"),
        (["--output_dir", ""], "output_dir is empty"),
        (["--verify", ""], "verify is empty"),
        (["--output_dir", str(listed / "sft" / "b")], "the folder of stage 'sft'"),
    ):
        assert message in in_process("export", listed, *flags, fails=True)
    assert not (listed / "bundle").exists()
    in_process("export", listed, "--k", "2")
    assert Recommender.load(listed / "bundle").k == 2
    assert "never overwrites" in in_process("export", listed, fails=True)
    again = ("--output_dir", str(tmp_path / "again"))
    assert "this command needs a run" in in_process("export", listed / "bundle", *again, fails=True)
