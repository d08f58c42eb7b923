"""The files of a bundle: its manifest, and whether they are still what it says.

``manifest.json`` lists every file with its size and SHA-256. Loading checks all sizes, the content
of all files but the weights (hashing gigabytes would delay each start), and that no file was added;
`verify_bundle` hashes the weights, too. Only the model card may be edited: its licence is for the
user to fill in, and it decides nothing.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from genrec.artifacts import MANIFEST, read_json, sha256_file

KIND = "genrec-bundle"
SCHEMA_VERSION = 1
CARD, DECODING = "README.md", "decoding.json"
_WEIGHTS = ".safetensors"


def is_bundle(folder: Path | str) -> bool:
    """Whether a folder says that it is a bundle (a run folder has no manifest of its own)."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return False
    manifest = read_json(path)
    return isinstance(manifest, dict) and manifest.get("kind") == KIND


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """Manifest of a bundle.

    Raises:
        ValueError: the folder is no bundle, or one of another version or with a damaged manifest.
    """
    if not is_bundle(folder):
        raise ValueError(
            f"{folder} is no bundle: it has no {MANIFEST} of kind {KIND}; make one with: "
            "genrec export --run_dir <run> --output_dir <folder>"
        )
    manifest = read_json(Path(folder) / MANIFEST)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{folder} has schema_version {manifest.get('schema_version')}, this genrec reads "
            f"{SCHEMA_VERSION}; export it again"
        )
    listed = manifest.get("files")
    whole = isinstance(listed, dict) and all(
        isinstance(value, dict) and {"sha256", "bytes"} <= value.keys() for value in listed.values()
    )
    if not whole or not isinstance(manifest.get("sid_map_sha256"), str):
        raise ValueError(f"{folder}/{MANIFEST} is damaged; restore it or export again")
    return manifest


def list_files(folder: Path) -> list[str]:
    """Files of a bundle but its manifest, by relative path; hidden ones aren't part of it."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    return sorted(path.as_posix() for path in visible if path.as_posix() != MANIFEST)


def check_bundle(folder: Path | str) -> None:
    """Raise ValueError unless the bundle is whole; weights are checked by size alone."""
    problems = _problems(Path(folder), read_manifest(folder), weights=False)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(
            f"the bundle {folder} isn't what was exported: {problems[0]}{more}; restore it or "
            "export again"
        )


def verify_bundle(folder: Path | str) -> list[str]:
    """Hash every file of a bundle; what differs from the manifest, in words. Empty: nothing.

    Raises:
        ValueError: as `read_manifest`.
    """
    return _problems(Path(folder), read_manifest(folder), weights=True)


def card_was_edited(folder: Path | str) -> bool:
    """Whether the model card is another one than that which was exported."""
    stated = read_manifest(folder)["files"].get(CARD, {}).get("sha256")
    path = Path(folder) / CARD
    return not path.is_file() or sha256_file(path) != stated


def _problems(folder: Path, manifest: dict[str, Any], weights: bool) -> list[str]:
    listed = manifest["files"]
    present = set(list_files(folder))
    problems = [f"{name} is not one of its files" for name in sorted(present - listed.keys())]
    for name, stated in sorted(listed.items()):
        if name == CARD:
            continue
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            problems.append(f"its manifest names {name}, which lies outside")
            continue
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            problems.append(f"{name} is missing")
        elif size != stated["bytes"]:
            problems.append(f"{name} has {size} bytes, its manifest says {stated['bytes']}")
        elif (weights or path.suffix != _WEIGHTS) and sha256_file(path) != stated["sha256"]:
            problems.append(f"{name} was changed (same size, another SHA-256)")
    return problems
