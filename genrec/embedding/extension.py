"""Vectors of a later catalogue in the space of an earlier run.

Items that both catalogues have keep their rows, whatever became of their text: a semantic id does
not move, so neither does what it was made from. Rows of new items are made with what the earlier
run fitted and stored.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.artifacts import Manifest, require, stage_folder
from genrec.columns import ITEM_ID

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Extension:
    """An earlier run, and where the items of a later catalogue stand in it.

    Attributes:
        folder: the earlier run's ``embeddings/``.
        manifest: of its embed stage.
        catalog: its catalogue.
        row_of: row in it of each item of the later catalogue, −1 for new ones. ``# (n_items,)``
    """

    folder: Path
    manifest: Manifest
    catalog: pl.DataFrame
    row_of: npt.NDArray[np.int64]

    @classmethod
    def of(cls, run_dir: Path | str, item_ids: pl.Series) -> Extension:
        """Read an earlier run.

        Args:
            run_dir: the run; its embed stage must be complete.
            item_ids: item ids of the later catalogue, in its order.

        Raises:
            ValueError: the stage is not complete, or the two catalogues' ids are of two types.
        """
        manifest = require(run_dir, "embed")
        path = stage_folder(run_dir, "prepare") / "catalog.parquet"
        catalog = pl.read_parquet(path, glob=False)
        if catalog[ITEM_ID].dtype != item_ids.dtype:
            raise ValueError(
                f"item ids are {item_ids.dtype}, those of {path} are {catalog[ITEM_ID].dtype}; "
                "prepare both catalogues with the same id_type"
            )
        rows = catalog.select(ITEM_ID).with_row_index("row")
        found = item_ids.alias(ITEM_ID).to_frame().join(
            rows, ITEM_ID, "left", maintain_order="left"
        )  # fmt: skip
        row_of = found["row"].cast(pl.Int64).fill_null(-1).to_numpy()
        return cls(stage_folder(run_dir, "embed"), manifest, catalog, row_of)

    @property
    def is_new(self) -> npt.NDArray[np.bool_]:
        """Which items the earlier catalogue lacks, (n_items,)."""
        return self.row_of < 0

    @property
    def n_gone(self) -> int:
        """Items of the earlier catalogue that the later one lacks."""
        return len(self.catalog) - int((~self.is_new).sum())

    def rows(self, name: str) -> FloatArray:
        """Memory map of one of the earlier run's tables of vectors, (n_old_items, dim).

        Raises:
            ValueError: the run has no such file.
        """
        self._check(name)
        return np.load(self.folder / name, mmap_mode="r")

    def grown(self, name: str, new: npt.NDArray[np.floating]) -> FloatArray:
        """Rows of all items of the later catalogue.

        Args:
            name: the earlier run's table.
            new: rows of the new items, in the order of the later catalogue, (n_new, dim).

        Raises:
            ValueError: the run has no such file, or the new rows are of another width.
        """
        old = self.rows(name)
        if new.shape[1] != old.shape[1]:
            raise ValueError(
                f"the new items' vectors have {new.shape[1]} dimensions, {self.folder / name} has "
                f"{old.shape[1]}; bring vectors of the same encoder"
            )
        table = np.empty((len(self.row_of), old.shape[1]), dtype=np.float32)
        table[~self.is_new] = old[self.row_of[~self.is_new]]
        table[self.is_new] = new
        return table

    def changed(self, then: Sequence[str], now: Sequence[str]) -> int:
        """Number of known items whose text is another one.

        Args:
            then: texts of the earlier catalogue.
            now: texts of the later one.
        """
        old_row = self.row_of.tolist()
        return sum(at >= 0 and then[at] != text for at, text in zip(old_row, now, strict=True))

    def carry(self, names: Sequence[str], folder: Path) -> None:
        """Copy fitted pieces into a later run, so that it can be extended in its turn.

        Raises:
            ValueError: the earlier run lacks one.
        """
        for name in names:
            self._check(name)
            shutil.copyfile(self.folder / name, folder / name)

    def _check(self, name: str) -> None:
        if name not in self.manifest.outputs:
            raise ValueError(
                f"{self.folder} has no {name}: it was embedded before genrec kept what embed fits; "
                "embed that run again (the same settings give the same vectors)"
            )
