"""The names behind the codes of a semantic index, by which later items find their category."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from genrec.artifacts import read_json, write_json
from genrec.columns import CATEGORIES
from genrec.quantizers.quantizer import CodeArray

NAMES_FILE = "categories.json"

Paths = list[list[str] | None]


@dataclass(frozen=True)
class CategoryNames:
    """Category names of each level of a semantic index.

    Attributes:
        root_steps: first steps of a path that all items shared; they have no level.
        names: per level, the name of code 1, 2, ….
    """

    root_steps: int
    names: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, paths: Paths, codes: CodeArray, root_steps: int) -> CategoryNames:
        """Names of the index that `item_indexes.semantic_index` made of these paths.

        Args:
            paths: of each item, without the shared root.
            codes: (n_items, n_levels); the last level numbers items and has no names.
            root_steps: length of the root that the paths lack.
        """
        levels = []
        for level in range(codes.shape[1] - 1):
            own = codes[:, level].tolist()
            name_of = {c: str(p[level]) for c, p in zip(own, paths, strict=True) if c and p}
            levels.append(tuple(name_of[code] for code in sorted(name_of)))
        return cls(root_steps, tuple(levels))

    def of_codes(self, codes: CodeArray) -> Paths:
        """Path that the codes of each item stand for."""
        return [
            [names[c - 1] for names, c in zip(self.names, row[:-1], strict=True) if c]
            for row in codes.tolist()
        ]

    def paths(self, catalog: pl.DataFrame) -> Paths:
        """Path of each item of a later catalogue, without the same root."""
        return _categories(catalog).list.slice(self.root_steps).to_list()

    def save(self, folder: Path) -> None:
        """Write `NAMES_FILE`."""
        names = [list(level) for level in self.names]
        write_json(folder / NAMES_FILE, {"root_steps": self.root_steps, "names": names})

    @classmethod
    def load(cls, folder: Path) -> CategoryNames:
        """Read what `save` wrote.

        Raises:
            ValueError: the folder has no such file.
        """
        if not (folder / NAMES_FILE).exists():
            raise ValueError(
                f"{folder} has no {NAMES_FILE}, so new items can't find their category: it was "
                "made before genrec kept the names; quantize that run again"
            )
        about = read_json(folder / NAMES_FILE)
        return cls(about["root_steps"], tuple(tuple(level) for level in about["names"]))


def rootless_paths(catalog: pl.DataFrame) -> tuple[Paths, int]:
    """Category path of each item without a root that all share, which would cost a token.

    Returns:
        The paths, and how many steps the root has.

    Raises:
        ValueError: the catalogue has no categories.
    """
    paths, steps = _categories(catalog), 0
    while paths.list.get(0, null_on_oob=True).drop_nulls().n_unique() == 1:
        paths, steps = paths.list.slice(1), steps + 1
    return paths.to_list(), steps


def _categories(catalog: pl.DataFrame) -> pl.Series:
    if CATEGORIES not in catalog.columns:
        raise ValueError("method=semantic needs categories; this catalogue has none")
    return catalog[CATEGORIES]
