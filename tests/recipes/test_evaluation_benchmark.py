"""The evaluation benchmark: what its last line says, on few users."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from genrec.cli import recipes_folder


@pytest.mark.slow
def test_quick(tmp_path):
    command = [
        sys.executable, str(recipes_folder() / "benchmarks" / "evaluation.py"), "--quick",
        "--users", "300", "--items", "400", "--ranx_users", "100", "--folder", str(tmp_path),
    ]  # fmt: skip
    # ranx's loops as plain Python: compiling them takes a minute.
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["users"] == 300 and 0 < result["items"] <= 400 and result["k"] == 50
    assert result["seconds"] > 0 and 0.05 < result["peak_gb"] < 4
    assert set(result["differences"]) == {"ranx, 1 relevant", "ranx, 5 relevant"}
    assert result["max_abs_diff"] < 1e-9 and result["ranx_users"] == 100
    assert 0 < result["ranx_seconds"] and 0 <= result["same_metrics_seconds"]
    # The planted targets: a geometric rank with p = .03.
    shown = {line.split()[0]: line.split()[-1] for line in done.stdout.splitlines()[:4]}
    assert float(shown["HR@10"]) == pytest.approx(1 - 0.97**10, abs=0.1)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind
