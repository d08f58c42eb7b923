"""What is served now, and how it is exchanged while requests go on.

A `Snapshot` is a model, its catalogue and a view of it; it never changes. A request takes the
current snapshot when it arrives and is answered from it to the end, so a swap is one assignment:
requests before it finish on the old snapshot, requests after it start on the new one.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from genrec.artifacts import FOLDERS, load_manifest, sha256_json, stage_folder
from genrec.bundle.files import is_bundle, read_manifest
from genrec.decoding.trie import CatalogueView
from genrec.normalizers import Normalizer
from genrec.recommend import Recommender
from genrec.server.messages import shorten

logger = logging.getLogger(__name__)


class SwapRefused(ValueError):
    """The new model or view can't be served; what is served stays."""


class SwapInProgress(RuntimeError):
    """Another model is being loaded."""


@dataclass(frozen=True)
class LoadedModel:
    """A recommender and the content hash of the stage that its model came from."""

    recommender: Recommender
    sha256: str


Load = Callable[[str, str | None], LoadedModel]


def load_run(
    run_dir: str,
    model_run: str | None = None,
    stage: str | None = None,
    engine: str = "torch",
    normalizer: Normalizer | None = None,
    dtype: str = "float32",
    batch_size: int = 32,
    engine_options: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load a run or a bundle; arguments and errors as `Recommender.load`."""
    recommender = Recommender.load(
        run_dir, stage, engine, normalizer, dtype, batch_size, model_run, engine_options
    )
    if is_bundle(run_dir):
        return LoadedModel(recommender, sha256_json(read_manifest(Path(run_dir))["files"]))
    manifest = load_manifest(model_run or run_dir, recommender.model_stage)
    assert manifest is not None  # `Recommender.load` requires it
    return LoadedModel(recommender, manifest.content_hash)


@dataclass(frozen=True)
class ViewRule:
    """Which items may be recommended, by item id, so that it outlives a catalogue."""

    kind: Literal["all", "allow", "deny"] = "all"
    item_ids: tuple[Any, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """Hash of the rule; the order of its ids and repetitions don't matter.

        A rule may name every item: integers and strings are sorted apart, in NumPy and Polars.
        """
        texts = pl.Series([i for i in self.item_ids if isinstance(i, str)], dtype=pl.String)
        texts = texts.unique().sort()
        numbers = np.unique([i for i in self.item_ids if not isinstance(i, str)]).astype("<i8")
        digest = hashlib.sha256(f"{self.kind} {len(numbers)} {len(texts)} ".encode())
        digest.update(numbers.tobytes())
        # Their lengths tell ("ab", "c") from ("a", "bc").
        digest.update(texts.str.len_bytes().to_numpy().astype("<u8").tobytes())
        digest.update((texts.str.join("").item() if len(texts) else "").encode())
        return digest.hexdigest()

    def apply(self, recommender: Recommender) -> CatalogueView:
        """The view of a catalogue.

        Raises:
            SwapRefused: the catalogue lacks an item of the rule, or no item would be left.
        """
        trie = recommender.engine.trie
        if self.kind == "all":
            return trie.everything()
        rows, unknown = recommender.known_rows(self.item_ids)
        if unknown:
            raise SwapRefused(
                f"{len(unknown)} items of the {self.kind}-list are not in the catalogue, among "
                f"them {shorten(unknown)}; give a list without them"
            )
        allowed = np.zeros(trie.n_items, dtype=bool)
        allowed[rows] = True
        if self.kind == "deny":
            allowed = ~allowed
        if not allowed.any():
            raise SwapRefused(f"the {self.kind}-list leaves no item that could be recommended")
        return trie.view(allowed)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A model with its catalogue and a view of it, as one request sees them from begin to end.

    Attributes:
        model: the loaded model.
        model_version: counts the loads since the server started, from 1.
        semantic_ids_sha256: hash of the SID map.
        rule: the view, by item id.
        view: the view, of this catalogue.
        view_version: counts the rules since the server started, from 1.
        view_sha256: hash of the rule.
    """

    model: LoadedModel
    model_version: int
    semantic_ids_sha256: str
    rule: ViewRule
    view: CatalogueView
    view_version: int
    view_sha256: str

    @property
    def recommender(self) -> Recommender:
        """The model, its catalogue and engine."""
        return self.model.recommender

    @property
    def n_items(self) -> int:
        """Items in the catalogue."""
        return self.view.trie.n_items

    @property
    def n_allowed(self) -> int:
        """Items that the view allows."""
        return self.view.n_allowed

    def n_left(self, excluded: np.ndarray, candidates: np.ndarray | None = None) -> int:
        """Items that the view allows and a user may still get.

        Args:
            excluded: catalogue rows that they must not get.
            candidates: the only rows that they may get; None: all.
        """
        if candidates is not None:
            return self._n_allowed_of(np.setdiff1d(candidates, excluded))
        return self.n_allowed - self._n_allowed_of(np.unique(excluded))

    def _n_allowed_of(self, rows: np.ndarray) -> int:
        leaf = self.view.trie.leaf_of_item[rows]
        return int(self.view.count(self.view.trie.n_levels - 1, leaf).sum())


def path_below(root: Path, name: str) -> Path:
    """A run folder below `root`, with everything that would be read from it.

    Args:
        root: folder that holds the runs.
        name: path of a run, relative to `root` or absolute.

    Raises:
        SwapRefused: it doesn't exist, or it or a file that its model needs lies elsewhere, be it by
            ``..`` or by a symbolic link.
    """
    outside = SwapRefused(f"{shorten([name])} is no run folder below the runs' root of this server")
    try:
        root = root.resolve(strict=True)
        folder = (root / name).resolve(strict=True)
        if root not in folder.parents or not folder.is_dir():
            raise outside
        _check_links(root, folder)
    except SwapRefused:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a null byte
        raise outside from error
    return folder


def _check_links(root: Path, folder: Path) -> None:
    """Follow every symbolic link below a bundle, or a run's stages; none may leave `root`."""
    stages = [stage_folder(folder, stage) for stage in FOLDERS]
    todo = [folder] if is_bundle(folder) else [path for path in stages if path.exists()]
    done = set()
    while todo:
        path = todo.pop()
        place = path.resolve(strict=True)
        if root not in place.parents:
            raise SwapRefused(
                f"{path.relative_to(root)} links to a place outside of the runs' root; copy what "
                "it links to into the run"
            )
        if place in done or not place.is_dir():
            continue
        done.add(place)
        with os.scandir(place) as entries:
            todo += [Path(entry.path) for entry in entries if entry.is_symlink() or entry.is_dir()]


class Serving:
    """The current snapshot, and the two ways to exchange it.

    Args:
        load: loads a run (and a model of another run, or None).
        first: what to serve from the start.
        rule: the first view.

    Raises:
        ValueError: the view doesn't fit the catalogue, or the model can't recommend.
    """

    def __init__(self, load: Load, first: LoadedModel, rule: ViewRule | None = None) -> None:
        self._load = load
        _probe(first.recommender)
        rule = ViewRule() if rule is None else rule
        self.current = Snapshot(
            first,
            1,
            first.recommender.semantic_ids.sha256,
            rule,
            rule.apply(first.recommender),
            1,
            rule.sha256,
        )
        self._commit = asyncio.Lock()
        self._loading = False

    async def swap_view(self, rule: ViewRule) -> Snapshot:
        """Serve another view from now on.

        Raises:
            SwapRefused: it doesn't fit the catalogue; the old view stays.
        """
        async with self._commit:
            old = self.current
            view, digest = await asyncio.to_thread(
                lambda: (rule.apply(old.recommender), rule.sha256)
            )
            self.current = replace(
                old, rule=rule, view=view, view_version=old.view_version + 1, view_sha256=digest
            )
            new = self.current
        logger.info("view %d: %s, %d items", new.view_version, rule.kind, new.n_allowed)
        return new

    async def swap_model(
        self, run_dir: str, model_run: str | None, rule: ViewRule | None
    ) -> Snapshot:
        """Load a run in the background, then serve it from now on.

        Args:
            run_dir: the run.
            model_run: run that its model comes from, or None.
            rule: its view; None: the one that is served at that moment.

        Raises:
            SwapInProgress: another model is being loaded.
            SwapRefused: it can't be loaded, can't recommend, or the view doesn't fit its catalogue;
                the old model stays.
        """
        if self._loading:
            raise SwapInProgress("another model is being loaded; try again when it is served")
        self._loading = True
        try:
            loaded, digest = await asyncio.to_thread(self._load_checked, run_dir, model_run)
            # A view may be swapped while a model loads; the rule that holds now is the newest one.
            async with self._commit:
                old = self.current
                kept = old.rule if rule is None else rule
                view, rule_digest = await asyncio.to_thread(
                    lambda: (kept.apply(loaded.recommender), kept.sha256)
                )
                self.current = Snapshot(
                    loaded,
                    old.model_version + 1,
                    digest,
                    kept,
                    view,
                    old.view_version + (rule is not None),
                    rule_digest,
                )
                new = self.current
        finally:
            self._loading = False
        logger.info("model %d: %s of %s", new.model_version, loaded.sha256[:12], run_dir)
        return new

    def _load_checked(self, run_dir: str, model_run: str | None) -> tuple[LoadedModel, str]:
        try:
            loaded = self._load(run_dir, model_run)
            _probe(loaded.recommender)
            return loaded, loaded.recommender.semantic_ids.sha256
        except Exception as error:  # whatever is wrong with it, the old model stays
            logger.exception("%s can't be served", run_dir)
            raise SwapRefused(
                f"{run_dir} can't be served: {type(error).__name__}: {error}"
            ) from error


def _probe(recommender: Recommender) -> None:
    """Make a list for the longest history, so that a model that can't is refused at once.

    It also makes the first request as fast as the others.
    """
    length = recommender.max_history
    item_ids = recommender.semantic_ids.item_ids.head(length).to_list()
    history = list(islice(cycle(item_ids), length))
    recommender.recommend(history, k=1, filter_seen=False)
