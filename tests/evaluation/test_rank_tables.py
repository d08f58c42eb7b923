"""Ranks of targets, and systems compared by them."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from genrec.artifacts import stage_folder
from genrec.evaluation.rank_tables import compare_ranks, target_ranks


def test_ranks_of_targets(tmp_path):
    prepared, made = stage_folder(tmp_path, "prepare"), stage_folder(tmp_path, "recommend")
    prepared.mkdir(parents=True)
    made.mkdir(parents=True)
    targets = {"row_id": ["c", "a", "b"], "target_item_index": [4, 1, 2]}
    pl.DataFrame(targets).write_parquet(prepared / "valid.parquet")
    pl.DataFrame({"row_id": ["a", "b"]}).write_parquet(made / "rows.parquet")
    pl.DataFrame(
        {"row_id": ["b", "b", "a", "a"], "item_index": [9, 2, 7, 8], "rank": [1, 2, 1, 2]}
    ).write_parquet(made / "recommendations-00000.parquet")
    # Row c was not asked for; a's target is in no list.
    assert target_ranks(tmp_path, "valid").rows() == [("a", 0), ("b", 2)]


def test_means_and_paired_differences():
    found = {
        "base": [np.array([1, 0, 3, 11]), np.array([0, 0, 1, 2])],
        "other": [np.array([1, 1, 3, 0]), np.array([0, 0, 1, 2]), np.array([1, 1, 1, 1])],
    }
    table = compare_ranks(found, "base", 10)
    base, other = table["base"], table["other"]
    assert base["hr@10"]["value"] == pytest.approx(0.5)  # 2 of 4, twice
    gain = 1 / np.log2(3)
    assert base["ndcg@10"]["seeds"] == pytest.approx([1.5 / 4, (1 + gain) / 4], abs=1e-5)
    # One row more in the first seed, none in the second; the third has no counterpart.
    assert other["ndcg@10 minus base"]["seeds"] == pytest.approx([0.25, 0.0])
    assert other["ndcg@10 minus base"]["value"] == pytest.approx(0.125)
    assert base["ndcg@10 minus base"]["low"] == base["ndcg@10 minus base"]["high"] == 0
    assert other["ndcg@10"]["low"] <= other["ndcg@10"]["value"] <= other["ndcg@10"]["high"]
