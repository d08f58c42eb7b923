"""The benchmarks of semantic ids: what their last lines say, on a small synthetic shop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from genrec.cli import recipes_folder


def last_line(name: str, *flags: str) -> dict[str, Any]:
    command = [sys.executable, str(recipes_folder() / "benchmarks" / name), "--quick", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_quantizer_is_measured(tmp_path):
    found = last_line("quantizers.py", "--output", str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == found
    assert found["letter"] is None  # no index of this shop is published
    table, n_items = found["quantizers"], found["items"]
    levels = {
        "residual-kmeans text": 3, "residual-kmeans": 3, "residual-kmeans balanced": 3,
        "residual-kmeans normalised": 3, "residual-kmeans whitened": 3,
        "residual-kmeans whitened 4 levels": 4, "residual-kmeans 1 level, item token": 2,
        "hierarchical-kmeans": 3, "hierarchical-kmeans balanced": 3, "pq": 4, "opq": 4,
        "rqvae": 3, "rqvae tiger": 3, "rqvae lc-rec": 4, "rqvae letter": 4, "rqvae grid-rvq": 3,
        "faiss RQ": 3, "random (P5)": 3, "sequential (P5)": 3, "independent (P5)": 1,
    }  # fmt: skip
    assert set(levels) | {"semantic (P5)", "collaborative (P5)", "hybrid (P5)"} == set(table)
    for name, row in table.items():
        assert row["fit_s"] >= 0 and 0 <= row["collisions_before"] <= 1, name
        assert row["collisions_after"] == 0, name
        assert len(row["perplexity"]) == levels.get(name, len(row["perplexity"])), name
        assert all(1 <= value <= n_items for value in row["perplexity"]), name
        for key in ("copurchase_neighbours", "vector_neighbours", "chance"):
            assert 0 <= row[key] <= 1, (name, key)
        assert -0.1 < row["ami"] <= 1, name
        if name.endswith("(P5)"):
            assert row["collisions_before"] == 0, name
    at = {name: row["collisions_before"] for name, row in table.items()}
    assert at["residual-kmeans normalised"] < at["residual-kmeans"]
    near = {name: row["vector_neighbours"] for name, row in table.items()}
    assert near["residual-kmeans"] > 2 * near["random (P5)"]
    (scale,) = found["scale"]
    assert (scale["items"], scale["collisions_after"]) == (100_000, 0)
    assert min(scale[name] for name in ("fit_s", "encode_s", "resolve_s", "peak_gb")) > 0
    (stages,) = found["stages"]
    assert stages["items"] == 20_000
    for stage in ("prepare", "embed", "quantize"):
        assert stages[stage]["seconds"] > 0 and stages[stage]["peak_gb"] > 0


@pytest.mark.slow
def test_indexes_are_compared_by_what_a_model_recommends():
    found = last_line("sid_downstream.py")
    assert (found["rows"], found["epochs"], found["seeds"]) == (200, 1, 1)
    assert set(found["indexes"]) == {"random", "residual-kmeans"}
    for row in found["indexes"].values():
        assert 0 <= row["ndcg@10"]["value"] <= 1 and row["hr@10"]["value"] > 0
        assert {"collisions", "vector_neighbours", "copurchase_neighbours"} < set(row)
