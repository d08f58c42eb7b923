"""Settings of the recipes: flat dataclasses, YAML gives defaults, flags win.

TRL's ``TrlParser`` parses; this module adds what it leaves out: types of values that come from
YAML, readable errors instead of tracebacks, and the place where datasets are looked for.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from trl import TrlParser

from genrec.artifacts import release_held

logger = logging.getLogger(__name__)


def check_types(settings: Any) -> None:
    """Raise ValueError if a field of a settings dataclass holds a value of another type.

    Covers what flat settings use: scalars, ``X | None`` and lists of scalars. An int is accepted
    where a float is declared.
    """
    hints = typing.get_type_hints(type(settings))
    for item in fields(settings):
        value = getattr(settings, item.name)
        if not _matches(value, hints[item.name]):
            raise ValueError(
                f"{item.name}={value!r} is a {type(value).__name__}; {item.name} takes {item.type}"
            )


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if origin is list:
        inner = typing.get_args(hint)[0]
        return isinstance(value, list) and all(_matches(v, inner) for v in value)
    if hint is Any:
        return True
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def check_choice(name: str, value: str, choices: typing.Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    options = list(choices)
    if value not in options:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(options)}")


def parse(*dataclass_types: type, args: list[str] | None = None) -> Any:
    """Parse the command line (and ``--config file.yaml``) into one instance per dataclass.

    Returns:
        The instance, or a tuple of them if several types are given.

    Raises:
        ValueError: an unknown key, a value of the wrong type, or a missing config file.
    """
    argv = list(sys.argv[1:] if args is None else args)
    # TrlParser knows only the two-word form.
    argv = [part for a in argv for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 >= len(argv):
            raise ValueError("--config needs a YAML file behind it")
        _check_keys(Path(argv[at + 1]), dataclass_types)
    parser = TrlParser(list(dataclass_types), allow_abbrev=False)  # type: ignore[arg-type]
    parsed = parser.parse_args_and_config(args=argv)
    for settings in parsed:
        if is_dataclass(settings) and _is_ours(type(settings)):
            check_types(settings)
    return parsed if len(parsed) > 1 else parsed[0]


def _check_keys(path: Path, dataclass_types: tuple[type, ...]) -> None:
    if not path.is_file():
        raise ValueError(f"--config {path} does not exist; examples lie in recipes/configs/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines")
    known = {item.name for kind in dataclass_types for item in fields(kind) if item.init} | {"env"}
    if unknown := sorted(set(values) - known):
        import difflib

        hints = [f"{key!r}" + _closest(difflib.get_close_matches(key, known, 1)) for key in unknown]
        raise ValueError(f"{path} has unknown keys: {', '.join(hints)}")
    # Before `__post_init__` compares the values with limits.
    for kind in filter(_is_ours, dataclass_types):
        hints_of = typing.get_type_hints(kind)
        for item in fields(kind):
            # Strings are converted by the parser, which also refuses what it can't convert.
            value = values.get(item.name, "")
            if not isinstance(value, str) and not _matches(value, hints_of[item.name]):
                raise ValueError(
                    f"{path}: {item.name}={value!r} is a {type(value).__name__}; {item.name} takes "
                    f"{item.type}"
                )


def _is_ours(kind: type) -> bool:
    """Whether a settings class is a recipe's own; TRL and Transformers check theirs."""
    return kind.__module__.split(".")[0] not in ("trl", "transformers")


def _closest(matches: list[str]) -> str:
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def training_fingerprint(training: Any) -> dict[str, Any]:
    """Settings of a Transformers/TRL training config that can change the trained weights."""
    volatile = (
        "dir", "report", "run_name", "tqdm", "logging", "log_", "push", "hub", "save_", "resume",
        "dataloader_", "ddp_", "debug", "skip_memory",
    )  # fmt: skip
    values = training.to_dict()
    dropped = {"dataloader_drop_last": True} if training.dataloader_drop_last else {}
    kept = {key: v for key, v in values.items() if not any(part in key for part in volatile)}
    return {**kept, **dropped, "world_size": training.world_size}  # a factor of the batch


def check_trainer(training: Any) -> None:
    """Refuse what would end or spoil a training only later; see the two functions behind it."""
    check_resuming(training)
    check_trackers(training)


def check_resuming(training: Any) -> None:
    """Refuse settings of a Transformers/TRL config that would break how a killed training goes on.

    Raises:
        ValueError: a checkpoint is named, or checkpoints would lack the optimizer.
    """
    if training.resume_from_checkpoint:
        raise ValueError(
            f"resume_from_checkpoint={training.resume_from_checkpoint}: a training that was killed "
            "goes on by itself at its last whole checkpoint; run the same command without it"
        )
    if training.save_only_model:
        raise ValueError(
            "save_only_model=true: checkpoints without optimizer and schedule would go on as "
            "another training; limit their number by save_total_limit instead"
        )


def check_trackers(training: Any) -> None:
    """Refuse trackers that aren't installed before a model is built.

    Raises:
        ValueError: a known tracker's package is missing.
    """
    from transformers.integrations import (  # slow to import
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    there = get_available_reporting_integrations()
    for name in training.report_to:
        if name in INTEGRATION_TO_CALLBACK and name not in there:
            raise ValueError(
                f"report_to={name}: its package is not installed here; install it, or choose of "
                f"{', '.join([*there, 'none'])}"
            )


def dataset_path(path: str, data_dir: str | None = None) -> Path:
    """Where an input file lies: absolute, below `data_dir`, here, or below ``$GENREC_DATA``.

    Raises:
        ValueError: none of them exists.
    """
    candidates = [Path(path)]
    if not candidates[0].is_absolute():
        roots = [data_dir] if data_dir else ["", os.environ.get("GENREC_DATA")]
        candidates = [Path(root) / path for root in roots if root is not None]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    looked = ", ".join(str(c) for c in candidates)
    raise ValueError(f"{path} not found (looked at {looked}); set --data_dir or GENREC_DATA")


def run(main: Callable[[], None]) -> None:
    """Run a recipe's main: set up logging, and end on the user's mistakes with a message.

    `ValueError`, files that can't be read or written, a full disk, and extras that aren't installed
    print one line and exit with status 2; anything else is a defect and keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "faiss", "filelock", "fsspec", "datasets", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        main()
    except Exception as error:
        message = _said_to_users(error)
        if message is None or os.environ.get("GENREC_DEBUG"):
            raise
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2) from error
    finally:
        release_held()  # where recipes run inside another program, it goes on


def make_console(width: int = 120, markup: bool = False) -> Console:
    """A console as wide as the terminal; elsewhere of a fixed width, since a log file has none.

    Args:
        width: columns, where there is no terminal.
        markup: whether ``[bold]`` and the like are read; not where texts of users are printed.
    """
    console = Console(highlight=False, markup=markup)
    return console if console.is_terminal else Console(highlight=False, markup=markup, width=width)


# Writers in C++ and Rust tell it in words alone; PyTorch's don't even say why they couldn't write.
_FULL = (
    "No space left on device", "Disk quota exceeded", "os error 28",
    "PytorchStreamWriter", "unexpected pos", "iostream error",
)  # fmt: skip


def _is_full_disk(error: Exception) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(words in str(error) for words in _FULL)


def _said_to_users(error: Exception) -> str | None:
    """What an error tells a user about their settings or files; None for a defect."""
    if _is_full_disk(error):
        return (
            f"the disk is full or can't be written to ({' '.join(str(error).split())[:200]}); free "
            "some space and run the same command again: what was complete is kept, and a training "
            "goes on at its last whole checkpoint"
        )
    if isinstance(error, ImportError):  # ours name an extra, others are broken installations
        return str(error) if "genrec[" in str(error) else None
    if isinstance(error, OSError) and error.filename is not None:
        path = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        return (
            f"{path} can't be read or written ({error.strerror}); check that it exists, what kind "
            "of file it is and whose, and that there is space"
        )
    # Other errors of the system (a network's, a pipe's) have a history that the traceback tells.
    return str(error) if isinstance(error, ValueError | FileNotFoundError) else None
