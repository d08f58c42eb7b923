"""Batch generation: lists for many users in shards that survive a kill at any moment.

A job is cut into shards of a fixed number of rows. A finished shard is never made again, an
unfinished one leaves nothing behind, so whatever interrupts the work, the same command goes on and
ends with the same files. Shards depend on their rows alone: several processes can each take a part.

Everything of a shard but the search is done for its users at once: prompts in Polars, item ids by
joins, the table from arrays. Only the hashes of prompts are made one by one.

Longer than other modules: what makes a job the same after a kill is read in one place.
"""

from __future__ import annotations

import fcntl
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec.artifacts import folder_fingerprint, read_json, write_json
from genrec.columns import CANDIDATES, HISTORY, SEEN, USER_ID
from genrec.decoding.beam import BeamResult
from genrec.decoding.trie import CatalogueView
from genrec.generation.history_prompts import PromptEncoder, prompts_of
from genrec.generation.memory import Memory, Permitted, Remembered
from genrec.generation.prompt_lengths import PromptLengths
from genrec.generation.shaping import ListMaker, ListRules
from genrec.generation.shards import (
    PREFIX,
    ShardInfo,
    enough_space,
    find_shard,
    read_info,
    shard_name,
    write_shard,
)
from genrec.generation.users import UNKNOWN, UserRows, count_allowed
from genrec.item_lists import ItemLists, no_items
from genrec.recommend import Recommender

logger = logging.getLogger(__name__)

CHECKED = "input_check.json"
PROGRESS = "progress"  # beginning of the names of the files that say how far the work is
WHOLE = (1, 1)


@dataclass(frozen=True)
class GenerationJob:
    """What is to be generated, for whom and where.

    Attributes:
        users: the rows; each gets one list.
        folder: where the shards go.
        k: items per list.
        beam_width: prefixes kept per level.
        fingerprint: of all settings and inputs that decide the result; a shard carries it.
        shard_size: rows per shard, the unit of resuming.
        allowed: catalogue rows that may be recommended at all, or None for all.
        rules: how lists are drawn or shaped; by default they are the search's.
        memory: speaks beside the model with the weight that the rules give it.
    """

    users: UserRows
    folder: Path
    k: int
    beam_width: int
    fingerprint: str
    shard_size: int = 2048
    allowed: np.ndarray | None = None
    rules: ListRules = ListRules()
    memory: Memory | None = None

    def __post_init__(self) -> None:
        """Reject sizes that can't work."""
        if (self.memory is not None) != (self.rules.memory_weight > 0):
            raise ValueError("a memory and its weight belong together")
        if self.shard_size < 1:
            raise ValueError(f"shard_size={self.shard_size} must be at least 1")
        if not 1 <= self.k <= self.beam_width:
            raise ValueError(f"k={self.k} must lie between 1 and beam_width={self.beam_width}")

    def starts(self, part: tuple[int, int] = WHOLE) -> range:
        """First rows of the shards of part ``(i, n)``, every n-th shard from the i-th on."""
        number, parts = part
        return range((number - 1) * self.shard_size, self.users.n_rows, parts * self.shard_size)

    def stop(self, start: int) -> int:
        """The row behind the last of the shard that begins at `start`."""
        return min(start + self.shard_size, self.users.n_rows)

    def path(self, start: int) -> Path:
        """File of the shard that begins at `start`."""
        return self.folder / shard_name(start, self.stop(start))

    def n_users(self, starts: Sequence[int] | range) -> int:
        """Rows of some shards."""
        return sum(self.stop(start) - start for start in starts)

    def find(self, start: int) -> ShardInfo | None:
        """See `genrec.generation.shards.find_shard`."""
        return find_shard(self.path(start), self.fingerprint, start, self.stop(start))

    def missing(self, part: tuple[int, int] = WHOLE) -> list[int]:
        """First rows of the shards of a part that are still to be made; the others are checked.

        Raises:
            ValueError: the folder holds a shard of another run, or of other rows.
        """
        own = {self.path(start).name for start in self.starts()}
        others = sorted(
            p.name for p in self.folder.glob(f"{PREFIX}-*.parquet") if p.name not in own
        )
        if others:
            raise ValueError(
                f"{self.folder} holds {others[0]}, which is no shard of this run "
                f"({len(others)} such files); move them away, or use another folder"
            )
        return [start for start in self.starts(part) if self.find(start) is None]

    def check_folder(self) -> None:
        """Raise ValueError if another run has taken the folder: its lists are not to be mixed."""
        found = folder_fingerprint(self.folder)
        if found not in (None, self.fingerprint):
            raise ValueError(
                f"{self.folder} now belongs to a run of other settings or inputs "
                f"({str(found)[:12]}, this one is {self.fingerprint[:12]}); finished shards of "
                f"this one lie in {self.folder.name}.old-…; use a folder for each"
            )

    def absent(self) -> list[int]:
        """First rows of all shards that have no file, whole or not."""
        return [start for start in self.starts() if not self.path(start).exists()]

    def totals(self) -> dict[str, int]:
        """The counts of all shards, summed from their metadata."""
        total: dict[str, int] = {}
        for start in self.starts():
            for name, count in read_info(self.path(start)).counts.items():
                total[name] = total.get(name, 0) + count
        return total


def parse_part(text: str) -> tuple[int, int]:
    """``"2/8"`` -> (2, 8).

    Raises:
        ValueError: another form, or a part that isn't one of the parts.
    """
    if not re.fullmatch(r"[0-9]+/[0-9]+", text):
        raise ValueError(f"shard={text!r} must have the form i/n, such as 1/4")
    number, parts = map(int, text.split("/"))
    if not 1 <= number <= parts:
        raise ValueError(f"shard={text!r}: the part must lie between 1 and {parts}")
    return number, parts


def check_users(
    job: GenerationJob,
    n_items: int,
    lengths: PromptLengths | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, int]:
    """Read all rows once, before anything is decoded.

    The result is kept in the folder, so that resuming and other parts needn't do it again.

    Args:
        job: the job.
        n_items: size of the catalogue.
        lengths: of prompts, which must fit into the context; None: they aren't looked at.
        progress: called with the number of rows that were read.

    Returns:
        Rows, rows without history, unknown items (dropped), and rows with them.

    Raises:
        ValueError: a row can't be read (see `UserRows`), has no item that it may get, or a prompt
            that is too long.
    """
    kept, context = job.folder / CHECKED, None if lengths is None else lengths.context
    if (found := _kept_counts(kept, job.fingerprint, context)) is not None:
        return found
    allowed = np.zeros(n_items, dtype=bool)
    allowed[slice(None) if job.allowed is None else job.allowed] = True
    counts = {"rows": job.users.n_rows, "without_history": 0, UNKNOWN: 0, "rows_with_unknown": 0}
    for start in job.starts():
        part = job.users.read(start, job.shard_size)
        exhausted = np.flatnonzero(count_allowed(part, allowed) == 0)
        if len(exhausted):
            at = int(exhausted[0])
            raise ValueError(
                f"user {part[USER_ID][at]!r} (row {start + at + 1}) has no allowed item left "
                f"({len(exhausted)} such users from there to row {job.stop(start)}): what is "
                "excluded for them is all that may be recommended; leave them out, exclude less, "
                "or allow more"
            )
        if lengths is not None:
            _check_lengths(job, start, part, lengths)
        counts["without_history"] += int((part[HISTORY].list.len() == 0).sum())
        counts[UNKNOWN] += int(part[UNKNOWN].sum())
        counts["rows_with_unknown"] += int((part[UNKNOWN] > 0).sum())
        if progress is not None:
            progress(part.height)
    with enough_space(kept):
        write_json(kept, {"fingerprint": job.fingerprint, "context": context, "counts": counts})
    return counts


def _check_lengths(
    job: GenerationJob, start: int, part: pl.DataFrame, lengths: PromptLengths
) -> None:
    if (found := lengths.first_too_long(ItemLists.from_column(part[HISTORY]))) is None:
        return
    at, tokens = found
    raise ValueError(
        f"the prompt of user {part[USER_ID][at]!r} (row {start + at + 1}) with its item needs "
        f"{tokens} tokens, the model's context holds {lengths.context}; shorten the history in the "
        "table, raise max_model_len where it is set, or use a model with a longer context"
    )


def _kept_counts(path: Path, fingerprint: str, context: int | None) -> dict[str, int] | None:
    """Counts of an earlier check of the same run; None if there are none, or damaged ones."""
    if not path.exists():
        return None
    try:
        found = read_json(path)
        same = (found["fingerprint"], found["context"]) == (fingerprint, context)
        return dict(found["counts"]) if same else None
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s); the users are checked again", path, error)
        return None


class ShardMaker:
    """Makes the shards of a job with one engine.

    Args:
        recommender: the run.
        job: what is to be made.

    Raises:
        ValueError: the allow-list is empty, or the rules don't fit the engine or the catalogue.
    """

    def __init__(self, recommender: Recommender, job: GenerationJob) -> None:
        self.recommender, self.job = recommender, job
        self._encoder = PromptEncoder(recommender)
        self._lists = ListMaker(recommender.engine, recommender.catalog, job.rules)
        self.view: CatalogueView | None = None
        self._allowed: np.ndarray | None = None
        if job.allowed is not None:
            self.view = recommender.engine.trie.allow(job.allowed)
            self._allowed = np.zeros(len(recommender.catalog), dtype=bool)
            self._allowed[job.allowed] = True

    def make(
        self, start: int, progress: Callable[[int], object] | None = None
    ) -> tuple[ShardInfo, float | None]:
        """Make the shard that begins at `start`; one that is there and whole is left alone.

        Args:
            start: its first row.
            progress: called with the number of users of each finished batch.

        Returns:
            What the shard says about itself, and the seconds that it took; None: it was there.

        Raises:
            ValueError: a user's prompt is too long or nothing is left for one, the disk is full, or
                the folder was taken by another run.
        """
        job, began = self.job, time.perf_counter()
        if (info := job.find(start)) is not None:
            return info, None
        part = job.users.read(start, job.shard_size)
        histories = ItemLists.from_column(part[HISTORY])
        prompts = prompts_of(self.recommender, histories).to_list()
        try:
            result = self._search(part, self._encoder.encode(histories, prompts), progress)
        except ValueError as error:
            raise ValueError(f"users of rows {start + 1} to {job.stop(start)}: {error}") from error
        found = (result.items >= 0).sum(1)
        counts = {
            "users": part.height,
            "items": int(found.sum()),
            "certified": int(result.certified.sum()),
            "short_lists": int((found < job.k).sum()),
            "without_history": int((histories.lengths == 0).sum()),
            UNKNOWN: int(part[UNKNOWN].sum()),
        }
        table = self.recommender.table(part, prompts, result)
        info = ShardInfo(job.fingerprint, start, job.stop(start), counts)
        with locked(job.folder.parent):
            job.check_folder()
            # Another process may have made it meanwhile, and a manifest may name it: it stays.
            if (there := job.find(start)) is not None:
                return there, None
            return write_shard(job.path(start), table, info), time.perf_counter() - began

    def _search(
        self,
        part: pl.DataFrame,
        prompts: list[list[int]],
        progress: Callable[[int], object] | None,
    ) -> BeamResult:
        options: dict[str, Any] = {}
        if CANDIDATES in part.columns:
            limited = part[CANDIDATES].is_not_null()
            lists = zip(_arrays(part[CANDIDATES]), limited, strict=True)
            options["candidates"] = [rows if own else None for rows, own in lists]
        if self.job.memory is not None:
            options["remembered"] = self._remembered(self.job.memory, part)
        return self._lists.search(
            prompts,
            self.job.k,
            self.job.beam_width,
            seen=_arrays(part[SEEN]) if SEEN in part.columns else None,
            view=self.view,
            progress=progress,
            **options,
        )

    def _remembered(self, memory: Memory, part: pl.DataFrame) -> Remembered:
        """What the memory knows of these users, under the filters of the search."""
        history = ItemLists.from_column(part[HISTORY])
        seen = ItemLists.from_column(part[SEEN]) if SEEN in part.columns else no_items(part.height)
        candidates, limited = None, None
        if CANDIDATES in part.columns:
            candidates = ItemLists.from_column(part[CANDIDATES])
            limited = part[CANDIDATES].is_not_null().to_numpy()
        return memory.best(history, seen, Permitted(self._allowed, candidates, limited))


def _arrays(column: pl.Series) -> list[np.ndarray]:
    """Lists of catalogue rows as the engines take them: views of one array."""
    lists = ItemLists.from_column(column)
    return np.split(lists.values, lists.offsets[1:-1])


def generate(
    recommender: Recommender,
    job: GenerationJob,
    starts: Sequence[int] | None = None,
    progress: Callable[[int], object] | None = None,
    finished: Callable[[ShardInfo, float | None], object] | None = None,
) -> int:
    """Make shards one after another in this process.

    Args:
        recommender: the run.
        job: what is to be made.
        starts: first rows of the shards; default: all that are missing.
        progress: called with the number of users of each finished batch.
        finished: called with what `ShardMaker.make` returns of each shard.

    Returns:
        Number of users whose lists were made.
    """
    maker = ShardMaker(recommender, job)
    starts = job.missing() if starts is None else starts
    for start in starts:
        info, seconds = maker.make(start, progress)
        if finished is not None:
            finished(info, seconds)
    return job.n_users(starts)


class ProgressFile:
    """Says in ``progress.json`` (of a part: ``progress-<i>of<n>.json``) how far the work is.

    It also keeps how many users were made in how many seconds, by this call and by earlier ones of
    the same run. Only shards are timed, not the loading of the model; those that several actors
    make at once count each with its own seconds, so the rate is that of one engine.

    Args:
        job: the job.
        part: the part of it.
        n_users: users of the part that are still to be done.
    """

    def __init__(self, job: GenerationJob, part: tuple[int, int], n_users: int) -> None:
        name = PROGRESS if part == WHOLE else f"{PROGRESS}-{part[0]}of{part[1]}"
        self.path = job.folder / f"{name}.json"
        self._facts = {"fingerprint": job.fingerprint, "part": f"{part[0]}/{part[1]}"}
        self.total = job.n_users(job.starts(part))
        self._to_do, self.made = n_users, 0
        self._timed_users, self._timed_seconds = _timed(self.path, job.fingerprint)
        self._started: float | None = None  # when the first shard was begun

    @property
    def users_per_s(self) -> float | None:
        """Users that this call has made, by all its engines, per second; None before the first."""
        if self._started is None:
            return None
        return self.made / (time.perf_counter() - self._started)

    def finished(self, info: ShardInfo, seconds: float | None) -> None:
        """Count a shard; the file is written while there is more to do.

        Args:
            info: of the shard.
            seconds: that it took; None: it was there already.
        """
        if self._started is None:
            self._started = time.perf_counter() - (seconds or 0.0)
        self.made += info.stop - info.start
        if seconds is not None:
            self._timed_users += info.stop - info.start
            self._timed_seconds += seconds
        if self.made < self._to_do:
            self.write()

    def write(self) -> None:
        """Write the file: users in all, done, made by this call, users/s, ETA in s, timings."""
        speed, left = self.users_per_s, self._to_do - self.made
        value = {
            **self._facts,
            "users": self.total,
            "done": self.total - left,
            "made_by_this_call": self.made,
            "users_per_s": None if speed is None else round(speed, 1),
            "eta_s": 0 if not left else None if speed is None else round(left / speed),
            "timed_users": self._timed_users,
            "timed_seconds": self._timed_seconds,
            "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with enough_space(self.path):
            write_json(self.path, value)


def _timed(path: Path, fingerprint: str) -> tuple[int, float]:
    """Users and the seconds that they took, of a progress file; zeros if it is of another run."""
    try:
        found = read_json(path)
        if found["fingerprint"] == fingerprint:
            return int(found["timed_users"]), float(found["timed_seconds"])
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or a damaged one: only timings
        pass
    return 0, 0.0


def measured_speed(job: GenerationJob) -> dict[str, Any]:
    """Users/s of one engine over all parts of a job, resumed or not, and how many users were timed.

    Users of shards that were finished right before a kill are not among them.
    """
    timed = [_timed(path, job.fingerprint) for path in job.folder.glob(f"{PROGRESS}*.json")]
    users, seconds = sum(u for u, _ in timed), sum(s for _, s in timed)
    speed = round(users / seconds, 1) if seconds else None
    return {"users_per_s": speed, "timed_users": users}


@contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Hold the lock of a run folder: one process at a time begins or ends a job or a shard."""
    path = Path(folder) / ".recommend.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as stream:  # a rerun leaves the file as it is
        try:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("another process begins or ends work on this job; waiting for it")
                fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            logger.warning(
                "%s can't be locked (%s): start parts of one job a few seconds apart", path, error
            )
        yield


def list_facts(job: GenerationJob) -> dict[str, Any]:
    """Counts of a finished job and the share of lists that are provably exact, for a manifest."""
    totals = job.totals()
    return {**totals, "certified_share": totals["certified"] / totals["users"]}
