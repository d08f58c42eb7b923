"""What the benchmarks that train share: stages run as commands, and settings that must stay.

from stages import config, genrec, keep_settings    # a script finds what lies beside it
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genrec.artifacts import read_json, write_json


def genrec(stage: str, *arguments: str) -> None:
    """Run a stage as a user would."""
    command = [sys.executable, "-c", "from genrec.cli import main; main()", stage, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"genrec {stage} {' '.join(arguments)}:\n{done.stderr[-3000:]}")


def config(configs: Path, stage: str) -> list[str]:
    """The stage's YAML in a folder of them, as a flag, where there is one."""
    path = configs / f"{stage}.yaml"
    return ["--config", str(path)] if path.exists() else []


def keep_settings(work_dir: Path, now: Mapping[str, Any]) -> None:
    """Refuse a work folder whose finished parts were made with other settings than these."""
    path = work_dir / "settings.json"
    then = read_json(path) if path.exists() else now
    if other := [name for name in now if now[name] != then.get(name)]:
        raise SystemExit(
            f"{work_dir} holds results of other {', '.join(other)}; name another --work_dir"
        )
    write_json(path, now)
