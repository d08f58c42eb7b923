"""The files of a bundle: its manifest, and whether they are still what it says.

``manifest.json`` lists every file with its size and SHA-256. Loading checks all sizes, the content
of all files but the weights (hashing gigabytes would delay each start), and that no file was added;
`verify_bundle` hashes the weights, too. Only the model card may be edited: its licence is for the
user to fill in, and it decides nothing; it must be there.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from genrec.artifacts import MANIFEST, read_json, sha256_file
from genrec.bundle.decoding import DECODING as DECODING
from genrec.bundle.decoding import read_decoding
from genrec.title_ids import load_map

KIND = "genrec-bundle"
SCHEMA_VERSION = 1
CARD, SID_MAP = "README.md", "semantic_ids/semantic_ids.json"
NEEDED = (CARD, DECODING, SID_MAP, "semantic_ids/items.parquet", "catalog.parquet",
    "model/config.json")  # fmt: skip
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
        isinstance(value, dict)
        and isinstance(value.get("sha256"), str)
        and isinstance(value.get("bytes"), int)
        for value in listed.values()
    )
    missing = [] if whole else ["files"]
    texts = ("name", "model_stage", "sid_map_sha256")
    missing += [name for name in texts if not isinstance(manifest.get(name), str)]
    if missing:
        raise ValueError(
            f"{folder}/{MANIFEST} is damaged: {missing[0]} is missing or of another type; restore "
            "it or export again"
        )
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

    The settings of serving are read and the SID map is loaded, too: files with the right hashes may
    still have been made wrong.

    Raises:
        ValueError: as `read_manifest`.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    problems = _problems(folder, manifest, weights=True)
    if not problems:
        try:
            read_decoding(folder)
            loaded = load_map(folder / "semantic_ids").sha256
        except ValueError as error:
            return [str(error)]
        problems = _map_problems(manifest, loaded)
    return problems


def card_was_edited(folder: Path | str) -> bool:
    """Whether the model card is another one than that which was exported."""
    stated = read_manifest(folder)["files"].get(CARD, {}).get("sha256")
    return sha256_file(Path(folder) / CARD) != stated


def _problems(folder: Path, manifest: dict[str, Any], weights: bool) -> list[str]:
    listed = manifest["files"]
    present = set(list_files(folder))
    problems = [f"{name} is not one of its files" for name in sorted(present - listed.keys())]
    problems += [f"its manifest lacks {name}" for name in NEEDED if name not in listed]
    for name, stated in sorted(listed.items()):
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            problems.append(f"its manifest names {name}, which lies outside")
            continue
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            problems.append(f"{name} is missing")
        elif name == CARD:
            continue
        elif size != stated["bytes"]:
            problems.append(f"{name} has {size} bytes, its manifest says {stated['bytes']}")
        elif (weights or path.suffix != _WEIGHTS) and sha256_file(path) != stated["sha256"]:
            problems.append(f"{name} was changed (same size, another SHA-256)")
        elif path.suffix == _WEIGHTS and (why := _header_problem(path)):
            problems.append(f"{name} has a damaged header ({why})")
    if not problems:
        about = read_json(folder / SID_MAP)
        problems = _map_problems(manifest, about.get("sha256") if isinstance(about, dict) else None)
    return problems


def _header_problem(path: Path) -> str | None:
    """What is wrong with the header of a file of weights, which says what is where; None: nothing.

    Loading doesn't hash the weights, but without their header nothing in them can be found.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np"):
            return None
    except SafetensorError as error:
        return str(error)


def _map_problems(manifest: dict[str, Any], sha256: object) -> list[str]:
    """Whether the SID map is the one that the manifest names (loading it checks its own hash)."""
    stated = manifest["sid_map_sha256"]
    if sha256 == stated:
        return []
    return [
        f"{SID_MAP} is a map with SHA-256 {str(sha256)[:12]}, its manifest says {stated[:12]} "
        "(sid_map_sha256)"
    ]
