"""The finished stages that records are made from, read a shard of lists at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
from genrec.columns import HISTORY, ITEM_ID, ROW_ID, SEEN, TARGET, TARGET_POSITION
from genrec.data.splits import read_split
from genrec.generation.non_profiling import NON_PROFILING, SHOWN
from genrec.generation.shards import PREFIX, read_info
from genrec.generation.users import UserColumns, UserTable, source_sha256
from genrec.prompts import PromptRenderer

EARLIER = "earlier_interactions"  # that the user had before the list was made


@dataclass(frozen=True)
class ListShard:
    """Lists of one file of recommendations.

    Attributes:
        name: of the file.
        rows: whom they are for, in order: row_id, user_id, history_item_index (oldest first),
            seen_item_index (what the filter of seen items leaves out), `EARLIER`, and for a table
            that names them candidates (the only rows that the user may get).
        lists: recommended items, by row and rank.
    """

    name: str
    rows: pl.DataFrame
    lists: pl.DataFrame


@dataclass(frozen=True)
class RecordedRun:
    """The finished stages of a run.

    Lists are read by `shards` and never held all together, nor is a table of users.
    Split rows are held, as they are while lists are made, and so are the chains of explained lists,
    which are a sample.

    Attributes:
        run_dir: where the lists lie, and their log.
        source: the run that they were made from; `run_dir` unless they are for a table of users.
        manifests: of every stage on the way, by name; "explain" only where that stage has run.
        rows: split rows that lists were asked for, in the order of the lists; None: the lists are
            for a table of users.
        chains: row id -> item id -> chain.
        catalog: ``catalog.parquet``.
    """

    run_dir: Path
    source: Path
    manifests: Mapping[str, Manifest]
    rows: pl.DataFrame | None
    chains: Mapping[str, Mapping[Any, Chain]]
    catalog: pl.DataFrame

    @classmethod
    def load(cls, run_dir: Path | str, source_run: Path | str | None = None) -> RecordedRun:
        """Read a run; every stage up to recommend must be complete, and explain whole if begun.

        Args:
            run_dir: where the lists lie.
            source_run: the run that they were made from; for lists of a table of users.

        Raises:
            ValueError: a stage is missing, or the lists were made from another run.
        """
        recommend = require(run_dir, "recommend")
        source = source_of(run_dir, recommend, source_run)
        check_source(run_dir, recommend, source)
        stages = ["prepare", "quantize", "build_dataset", recommend.config["model_stage"]]
        manifests = {stage: require(source, stage) for stage in stages}
        manifests["recommend"] = recommend
        catalog = pl.read_parquet(stage_folder(source, "prepare") / "catalog.parquet", glob=False)
        if "users" in recommend.config:
            return cls(Path(run_dir), source, manifests, None, {}, catalog)
        chains: dict[str, dict[Any, Chain]] = {}
        if load_manifest(run_dir, "explain") is not None:
            manifests["explain"] = require(run_dir, "explain")
            for chain in read_chains(stage_folder(run_dir, "explain") / "chains.jsonl"):
                chains.setdefault(chain.row_id, {})[chain.item_id] = chain
        asked = pl.read_parquet(stage_folder(run_dir, "recommend") / "rows.parquet", glob=False)
        split = read_split(run_dir, recommend.config["split"], "audit").select(
            ROW_ID, HISTORY, SEEN, TARGET, pl.col(TARGET_POSITION).alias(EARLIER)
        )
        rows = asked.join(split, on=ROW_ID, how="left", maintain_order="left")
        return cls(Path(run_dir), source, manifests, rows, chains, catalog)

    @property
    def n_rows(self) -> int:
        """Number of rows with lists of the model."""
        if self.rows is not None:
            return len(self.rows)
        last = stage_folder(self.run_dir, "recommend") / self._shard_names()[-1]
        return read_info(last).stop

    def _shard_names(self) -> list[str]:
        """Files of lists, in order."""
        made = self.manifests["recommend"]
        names = sorted(name for name in made.outputs if name.startswith(f"{PREFIX}-"))
        if not names:
            folder = stage_folder(self.run_dir, "recommend")
            raise ValueError(f"{folder} holds no {PREFIX}-*.parquet; run its stage first")
        return names

    def shards(self) -> Iterator[ListShard]:
        """Lists with the rows that they are for, file by file.

        Raises:
            ValueError: a file is not the one that recommend wrote, or holds other rows, or the
                table of users is gone or changed.
        """
        if self.rows is not None:
            yield from self._shards(self.rows.drop(TARGET).slice)
            return
        with _table(self.manifests["recommend"], self.catalog) as table:
            yield from self._shards(table.read)

    def _shards(self, read: Callable[[int, int], pl.DataFrame]) -> Iterator[ListShard]:
        folder = stage_folder(self.run_dir, "recommend")
        for name in self._shard_names():
            lists, path = self._read(name), folder / name
            info = read_info(path)
            rows = read(info.start, info.stop - info.start)
            if lists[ROW_ID].unique(maintain_order=True).to_list() != rows[ROW_ID].to_list():
                raise ValueError(
                    f"{path} holds lists of other rows than were asked for; rerun: "
                    f"{rerun_command(self.run_dir, 'recommend')}"
                )
            if SEEN not in rows.columns:  # no filter leaves out what the user had
                rows = rows.with_columns(pl.col(HISTORY).alias(SEEN))
            if EARLIER not in rows.columns:  # a table has no more of a user than the history
                rows = rows.with_columns(pl.col(HISTORY).list.len().cast(pl.Int64).alias(EARLIER))
            yield ListShard(name, rows, lists)

    def non_profiling(self) -> pl.DataFrame | None:
        """Lists of users who opted out of profiling; None: recommend was told of no such user.

        Raises:
            ValueError: the file is not the one that recommend wrote.
        """
        if NON_PROFILING not in self.manifests["recommend"].outputs:
            return None
        lists = self._read(NON_PROFILING)
        if SHOWN not in lists.columns:  # made before there were lists by content
            lists = lists.with_columns(pl.lit(None, dtype=lists[ITEM_ID].dtype).alias(SHOWN))
        return lists

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
        """Split that the lists answer, or "users" for those of a table."""
        return str(self.manifests["recommend"].config.get("split", "users"))

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
        return PromptRenderer(stage_folder(self.source, "build_dataset") / "prompts")


def source_of(
    run_dir: Path | str, recommend: Manifest | None, source_run: Path | str | None = None
) -> Path:
    """The run that lists were made from.

    Args:
        run_dir: where the lists lie.
        recommend: their manifest; None: it is lost, and nothing is known of them.
        source_run: what the caller says it is; None: `run_dir`.

    Raises:
        ValueError: `source_run` is missing where it is needed, or named where it isn't.
    """
    if recommend is not None and "users" in recommend.config and source_run is None:
        raise ValueError(
            f"the lists of {run_dir} are for a table of users; name the run that they were made "
            "from: --source_run RUN"
        )
    if recommend is not None and "users" not in recommend.config and source_run is not None:
        raise ValueError(f"the lists of {run_dir} are those of its own split; drop --source_run")
    return Path(run_dir if source_run is None else source_run)


def check_source(run_dir: Path | str, recommend: Manifest, source: Path) -> None:
    """Refuse lists that were made from another run than `source`, or from several.

    Raises:
        ValueError: in words for the user.
    """
    if any(label.startswith("model_run/") for label in recommend.inputs):
        raise ValueError(
            f"the lists of {run_dir} were made by the model of {recommend.config['model_run']}; "
            "records name files of one run, by hash, and replay needs them there: audit lists of "
            "the model's own run, or train a model in the run of this catalogue"
        )
    for label, content in recommend.inputs.items():
        stage = label.removeprefix("run_dir/")
        if stage != label and require(source, stage).content_hash != content:
            raise ValueError(
                f"the lists of {run_dir} were not made from {source} as it is now: its stage "
                f"{stage} is another; name the right run with --source_run, or make the lists again"
            )


@contextmanager
def _table(recommend: Manifest, catalog: pl.DataFrame) -> Iterator[UserTable]:
    """The table of users that lists were made for; it must still be what it was.

    A text file's Parquet copy holds users, so it goes when the work is done.
    """
    made = recommend.config
    where, split, subset = made["users"], made["users_split"], made["users_subset"]
    if source_sha256(where, split, subset) != recommend.inputs["users"]:
        raise ValueError(
            f"{where} was changed since its lists were made; restore it, or make the lists again"
        )
    columns = UserColumns(
        made["user_column"], made["history_column"], made["exclude_column"],
        made["candidates_column"], made["list_separator"],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        yield UserTable(
            where, catalog[ITEM_ID], columns, made["unknown_items"], made["filter_seen"], scratch,
            split, subset,
        )  # fmt: skip
