"""The finished stages that records are made from, read a shard of lists at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from genrec.artifacts import (
    Manifest,
    load_manifest,
    require,
    rerun_command,
    sha256_file,
    stage_folder,
)
from genrec.chains import Chain, read_chains
from genrec.columns import HISTORY, ROW_ID, SEEN, TARGET, TARGET_POSITION
from genrec.data.splits import read_split
from genrec.generation.non_profiling import NON_PROFILING
from genrec.generation.shards import PREFIX, read_info
from genrec.prompts import PromptRenderer

EARLIER = "earlier_interactions"  # that the user had before the list was made


@dataclass(frozen=True)
class ListShard:
    """Lists of one file of recommendations.

    Attributes:
        name: of the file.
        rows: whom they are for, in order: row_id, user_id, history_item_index (oldest first),
            seen_item_index (all that the user had before) and `EARLIER`.
        lists: recommended items, by row and rank.
    """

    name: str
    rows: pl.DataFrame
    lists: pl.DataFrame


@dataclass(frozen=True)
class RecordedRun:
    """The finished stages of a run.

    Lists are read by `shards` and never held all together. Split rows are held, as they are while
    lists are made, and so are the chains of explained lists, which are a sample.

    Attributes:
        run_dir: the run.
        manifests: of every stage on the way, by name; "explain" only where that stage has run.
        rows: split rows that lists were asked for, in the order of the lists.
        chains: row id -> item id -> chain.
        catalog: ``catalog.parquet``.
    """

    run_dir: Path
    manifests: Mapping[str, Manifest]
    rows: pl.DataFrame
    chains: Mapping[str, Mapping[Any, Chain]]
    catalog: pl.DataFrame

    @classmethod
    def load(cls, run_dir: Path | str) -> RecordedRun:
        """Read a run; every stage up to recommend must be complete, and explain whole if begun."""
        recommend = require(run_dir, "recommend")
        stages = ["prepare", "quantize", "build_dataset", recommend.config["model_stage"]]
        manifests = {stage: require(run_dir, stage) for stage in stages}
        manifests["recommend"] = recommend
        chains: dict[str, dict[Any, Chain]] = {}
        if load_manifest(run_dir, "explain") is not None:
            manifests["explain"] = require(run_dir, "explain")
            for chain in read_chains(stage_folder(run_dir, "explain") / "chains.jsonl"):
                chains.setdefault(chain.row_id, {})[chain.item_id] = chain
        asked = pl.read_parquet(stage_folder(run_dir, "recommend") / "rows.parquet", glob=False)
        split = read_split(run_dir, recommend.config["split"], "audit").select(
            ROW_ID, HISTORY, SEEN, TARGET, pl.col(TARGET_POSITION).alias(EARLIER)
        )
        return cls(
            Path(run_dir),
            manifests,
            asked.join(split, on=ROW_ID, how="left", maintain_order="left"),
            chains,
            pl.read_parquet(stage_folder(run_dir, "prepare") / "catalog.parquet", glob=False),
        )

    def shards(self) -> Iterator[ListShard]:
        """Lists with the rows that they are for, file by file.

        Raises:
            ValueError: a file is not the one that recommend wrote, or holds other rows.
        """
        made, folder = self.manifests["recommend"], stage_folder(self.run_dir, "recommend")
        names = sorted(name for name in made.outputs if name.startswith(f"{PREFIX}-"))
        if not names:
            raise ValueError(f"{folder} holds no {PREFIX}-*.parquet; run its stage first")
        for name in names:
            lists, path = self._read(name), folder / name
            info = read_info(path)
            rows = self.rows.slice(info.start, info.stop - info.start)
            if lists[ROW_ID].unique(maintain_order=True).to_list() != rows[ROW_ID].to_list():
                raise ValueError(
                    f"{path} holds lists of other rows than rows.parquet names; rerun: "
                    f"{rerun_command(self.run_dir, 'recommend')}"
                )
            yield ListShard(name, rows.drop(TARGET), lists)

    def non_profiling(self) -> pl.DataFrame | None:
        """Lists of users who opted out of profiling; None: recommend was told of no such user.

        Raises:
            ValueError: the file is not the one that recommend wrote.
        """
        if NON_PROFILING not in self.manifests["recommend"].outputs:
            return None
        return self._read(NON_PROFILING)

    def _read(self, name: str) -> pl.DataFrame:
        """A file of lists, which must be the one that recommend wrote."""
        path = stage_folder(self.run_dir, "recommend") / name
        if sha256_file(path) != self.manifests["recommend"].outputs[name]["sha256"]:
            raise ValueError(
                f"{path} was changed since its lists were made; restore it or rerun: "
                f"{rerun_command(self.run_dir, 'recommend')}"
            )
        return pl.read_parquet(path, glob=False)

    @property
    def split(self) -> str:
        """Split that the lists answer."""
        return str(self.manifests["recommend"].config["split"])

    @property
    def model_stage(self) -> str:
        """Stage that the model came from."""
        return str(self.manifests["recommend"].config["model_stage"])

    @property
    def template(self) -> str:
        """Serving template."""
        return str(self.manifests["build_dataset"].metrics["serving_template"])

    def prompts(self) -> PromptRenderer:
        """The run's own copy of the templates."""
        return PromptRenderer(stage_folder(self.run_dir, "build_dataset") / "prompts")
