"""Batch generation over Ray Data: an actor per engine, the same shards as in one process.

The driver sends the first rows of the missing shards through Ray Data to a pool of actors, each of
which holds an engine and writes shards itself (`genrec.generation.ShardMaker`). A shard appears
whole or not at all and is made once, so an actor that dies is started again and its shards are
retried without loss or doubles, a few times: one that keeps dying ends the job. The run folder, the
model and the users' table must be at the same place on all machines (a shared file system).
"""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import genrec
from genrec.generation.jobs import GenerationJob, ShardMaker
from genrec.generation.shards import ShardInfo
from genrec.recommend import Recommender

logger = logging.getLogger(__name__)

MAX_TASKS = 4096  # of Ray Data; with more shards than that a task makes several
MAX_RESTARTS = 3  # of an actor, and tries of a shard behind its first
STORE_BYTES = 100 << 20  # of the object store of a cluster started here: it carries row numbers


class ShardActor:
    """What runs in a Ray actor: an engine, and calls with the first rows of shards.

    Bad input comes back as a value: Ray restarts and retries what raises, and wraps the error.

    Args:
        load: makes the recommender; picklable, for example a `functools.partial`.
        job: what is to be made.
        folder: that relative paths start from, the driver's own; None leaves it as it is.
    """

    def __init__(
        self, load: Callable[[], Recommender], job: GenerationJob, folder: str | None = None
    ) -> None:
        if folder is not None:
            os.chdir(folder)
        self._fault, self._maker = "", None
        try:
            self._maker = ShardMaker(load(), job)
        except ValueError as error:
            self._fault = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Make the shards of a batch; after bad input no more are made.

        Args:
            batch: ``start``, the first rows.

        Returns:
            ``info``, what each shard says about itself, as JSON, ``seconds``, that it took (nan: it
            was there already), and ``fault``, the message of a ValueError (else empty).
        """
        infos: list[str] = []
        took: list[float] = []
        for start in batch["start"]:
            if self._maker is None or self._fault:
                break
            try:
                info, seconds = self._maker.make(int(start))
            except ValueError as error:
                self._fault = str(error)
            else:
                infos.append(json.dumps(asdict(info), sort_keys=True))
                took.append(math.nan if seconds is None else seconds)
        if self._fault:
            infos.append("")
            took.append(math.nan)
        faults = [self._fault if not info else "" for info in infos]
        return {"info": infos, "seconds": took, "fault": faults}


def generate_with_ray(
    load: Callable[[], Recommender],
    job: GenerationJob,
    starts: Sequence[int],
    n_actors: int,
    gpus_per_actor: float = 0,
    address: str | None = None,
    finished: Callable[[ShardInfo, float | None], object] | None = None,
) -> int:
    """Make shards on a Ray cluster.

    An actor that dies is started again `MAX_RESTARTS` times, and its shards are retried. A cluster
    that this process is connected to is used as it is; else one is joined (`address`) or started
    on this machine, and what its actors write to stderr is shown.

    Args:
        load: makes a recommender in each actor.
        job: what is to be made.
        starts: first rows of the shards.
        n_actors: engines that work at once.
        gpus_per_actor: of each.
        address: of a running cluster ("auto": the one of this machine), or None.
        finished: called with each finished shard and its seconds, in any order (see `generate`).

    Returns:
        Number of users whose lists were made.

    Raises:
        ImportError: Ray is not installed.
        ValueError: bad input, as `ShardMaker` raises it in an actor, the cluster is too small, or
            an actor keeps dying.
    """
    if n_actors < 1:
        raise ValueError(f"num_actors={n_actors} must be at least 1")
    if not starts:
        return 0
    with _cluster(address, n_actors, gpus_per_actor) as ray:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # `finished` tells
        # Ray would replace an actor whose restarts are used up by another one, without end.
        context.max_consecutive_actor_init_deaths = 0
        rows = ray.data.from_items(
            [{"start": start} for start in starts],
            override_num_blocks=min(len(starts), MAX_TASKS),
        )
        with warnings.catch_warnings():
            # Ray 2.60 warns of these two arguments, up to 2.63 it has no other way to bound deaths.
            warnings.filterwarnings("ignore", message=".*ray_remote_args")
            made = rows.map_batches(
                ShardActor,
                fn_constructor_args=(load, job, os.getcwd()),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(n_actors, len(starts))),
                num_gpus=gpus_per_actor,
                num_cpus=0 if gpus_per_actor else 1,
                max_restarts=MAX_RESTARTS,
                max_task_retries=MAX_RESTARTS,
            )
        try:
            for row in made.iter_rows():
                if row["fault"]:
                    raise ValueError(row["fault"])
                if finished is not None:
                    seconds = None if math.isnan(row["seconds"]) else row["seconds"]
                    finished(ShardInfo(**json.loads(row["info"])), seconds)
        except ray.exceptions.RayActorError as error:
            raise ValueError(
                f"a Ray actor died again and again, {MAX_RESTARTS + 1} times on one shard or in "
                f"all ({str(error).strip().splitlines()[-1]}); a model or a batch that doesn't fit "
                "into memory does that: use fewer num_actors or a smaller batch_size, or look at "
                "the actors' stderr above; the same command goes on behind the finished shards"
            ) from error
    return job.n_users(starts)


@contextmanager
def _cluster(address: str | None, n_actors: int, gpus_per_actor: float) -> Iterator[Any]:
    """The `ray` module, connected to a cluster; one that was started here is stopped again."""
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ModuleNotFoundError as error:
        if error.name not in ("ray", "pandas"):
            raise
        raise ImportError('the ray executor needs Ray: pip install "genrec[ray]"') from error
    own = not ray.is_initialized()
    if own:
        place: dict[str, Any] = {"address": address}
        if address is None:
            cores = os.cpu_count() or 1
            if not gpus_per_actor:  # a core per actor, even where that is more than there are
                cores = max(cores, n_actors)
            place = {"num_cpus": cores, "include_dashboard": False}
            place["object_store_memory"] = STORE_BYTES
        # Workers import genrec from where this process did, installed or not.
        root = str(Path(genrec.__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
        # Workers' stderr is shown: it is where a library or the system says why one died.
        ray.init(**place, runtime_env=env, log_to_driver=True, logging_level=logging.WARNING)
    try:
        gpus = float(ray.cluster_resources().get("GPU", 0))
        if gpus < n_actors * gpus_per_actor:
            raise ValueError(
                f"num_actors={n_actors} with {gpus_per_actor:g} GPUs each need "
                f"{n_actors * gpus_per_actor:g} GPUs, the cluster has {gpus:g}"
            )
        yield ray
    finally:
        if own:
            ray.shutdown()
