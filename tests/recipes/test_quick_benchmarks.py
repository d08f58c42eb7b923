"""Benchmarks that need nothing but the package run with --quick and end with their figures."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from genrec.cli import recipes_folder

KEYS = {
    "audit": {"tampered", "detected", "records_per_s", "write_overhead"},
    "dataset": {"interactions", "rows_indexed_per_s", "rows_rendered_per_s", "peak_gb"},
    "decoding": {"users_per_s", "torch_vs_hf_prefix", "torch_vs_dict", "floor_fraction", "valid",
        "distinct"},
    "generation": {"output_mb"},
    "lora": {"table", "seeds", "rows", "pretraining_loss"},
    "memory": {"split", "rows", "memory", "tables"},
    "refresh": {"users", "seeds", "ways", "runs"},
    "rl": {"steps_per_s_ours", "steps_per_s_hf", "ratio"},
    "rl_quality": {"split", "rows", "seeds", "arms"},
    "serving": {"direct_p50_ms", "clients", "failed", "wrong"},
    "sft": {"items_per_s_ours", "items_per_s_trl_tuned", "ratio"},
    "sft_steps": {"rows", "seeds", "epochs", "arms"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", KEYS)
def test_quick(name, tmp_path):
    script = recipes_folder() / "benchmarks" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(script), "--quick"], capture_output=True, text=True, timeout=900,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert set(result) >= KEYS[name], sorted(result)
    if name == "decoding":
        assert result["valid"] == result["distinct"] == 1.0
    if name == "audit":
        assert result["detected"] == result["tampered"] > 0
    for key in ("ratio", "steps_per_s_ours", "steps_per_s_hf", "torch_vs_hf_prefix"):
        assert key not in result or result[key] > 0
