"""The ``genrec`` command: ``genrec sft --config …`` runs ``recipes/sft.py --config …``.

A recipe is the one home of a stage's main, so the command adds nothing but the search for the file:
the recipes of a checkout, else those inside the installed package.
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

from genrec import __version__


def recipes_folder() -> Path:
    """Folder of the recipe files."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "recipes", package / "bundled" / "recipes"):
        if (folder / "pipeline.py").is_file():
            return folder
    raise FileNotFoundError(f"no recipes beside or inside {package}; reinstall genrec")


def summaries(folder: Path) -> dict[str, str]:
    """Recipe name -> first line of its docstring, read without importing it."""
    lines = {}
    for path in sorted(folder.glob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines[path.stem] = text.splitlines()[0] if text else ""
    return lines


def main() -> None:
    """Entry point of the console command."""
    folder = recipes_folder()
    known = summaries(folder)
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-V", "--version"):
        sys.stdout.write(f"genrec {__version__}\n")
    elif name in ("-h", "--help"):
        width = max(map(len, known))
        commands = "\n".join(f"  {stage:<{width}}  {line}" for stage, line in known.items())
        sys.stdout.write(
            f"usage: genrec <command> [--config FILE] [--setting VALUE …]\n\n{commands}\n\n"
            f"genrec <command> --help lists its settings. Recipes and configs: {folder}\n"
        )
    elif name not in known:
        sys.stderr.write(f"error: {name!r} is no command; known: {', '.join(known)}\n")
        raise SystemExit(2)
    else:
        path = folder / f"{name}.py"
        sys.argv = [str(path), *sys.argv[2:]]
        runpy.run_path(str(path), run_name="__main__")
