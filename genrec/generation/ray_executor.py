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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import genrec
from genrec.generation.jobs import GenerationJob, ShardMaker
from genrec.generation.shards import ShardInfo
from genrec.recommend import Recommender

logger = logging.getLogger(__name__)

MAX_TASKS = 4096  # of Ray Data; with more shards than that a task makes several
MAX_RESTARTS = 3  # of an actor, and tries of a shard behind its first
STORE_BYTES = 100 << 20  # of the object store of a cluster started here: it carries row numbers


@dataclass(frozen=True)
class ActorShare:
    """What one actor gets of a cluster.

    Attributes:
        cpus: cores, and threads of its engine.
        gpus: GPUs; with 0 it sees none.
    """

    cpus: int
    gpus: float


def share_of(
    nodes: Sequence[Mapping[str, float]], n_actors: int, cpus: int | None, gpus: float | None
) -> ActorShare:
    """The share of each actor.

    Args:
        nodes: resources of each machine of the cluster, by Ray's names.
        n_actors: engines that work at once.
        cpus: that were asked for; None: as many as all actors can have.
        gpus: that were asked for; None: one where the cluster has any, else none.

    Raises:
        ValueError: the cluster is too small for these actors.
    """
    cores = [int(node.get("CPU", 0)) for node in nodes]
    devices = [float(node.get("GPU", 0)) for node in nodes]
    gpus = (1.0 if sum(devices) else 0.0) if gpus is None else gpus
    if gpus and _places(devices, gpus) < n_actors:
        raise ValueError(
            f"num_actors={n_actors} with {gpus:g} GPUs each need {n_actors * gpus:g} GPUs, the "
            f"cluster has {sum(devices):g}, which make {_places(devices, gpus)} actors; use fewer "
            "num_actors, or --gpus_per_actor 0 for engines on CPUs"
        )

    def places(cpus: int) -> int:
        by_node = [
            min(core // cpus, math.inf if not gpus else _places([device], gpus))
            for core, device in zip(cores, devices, strict=True)
        ]
        return int(sum(by_node))

    if cpus is None:
        fits = [n for n in range(max([1, *cores]), 0, -1) if places(n) >= n_actors]
        cpus = fits[0] if fits else 1
    if places(cpus) < n_actors:
        raise ValueError(
            f"num_actors={n_actors} with {cpus} CPUs each need {n_actors * cpus} CPUs, the cluster "
            f"has {sum(cores)}, which make {places(cpus)} actors; use fewer num_actors, or a "
            "smaller cpus_per_actor"
        )
    return ActorShare(cpus, gpus)


def _places(amounts: Sequence[float], each: float) -> int:
    """How many actors find what they need; none is split between machines."""
    return sum(math.floor(amount / each + 1e-9) for amount in amounts)


class ShardActor:
    """What runs in a Ray actor: an engine, and calls with the first rows of shards.

    Bad input comes back as a value: Ray restarts and retries what raises, and wraps the error.

    Args:
        load: makes the recommender; picklable, for example a `functools.partial`.
        job: what is to be made.
        folder: that relative paths start from, the driver's own; None leaves it as it is.
        share: of the machine, see `ActorShare`; None leaves it to Ray, which gives one thread.
    """

    def __init__(
        self,
        load: Callable[[], Recommender],
        job: GenerationJob,
        folder: str | None = None,
        share: ActorShare | None = None,
    ) -> None:
        if folder is not None:
            os.chdir(folder)
        if share is not None:
            torch.set_num_threads(share.cpus)
            if not share.gpus:  # Ray hides none from an actor that asks for none
                os.environ["CUDA_VISIBLE_DEVICES"] = ""
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
    gpus_per_actor: float | None = None,
    address: str | None = None,
    finished: Callable[[ShardInfo, float | None], object] | None = None,
    cpus_per_actor: int | None = None,
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
        gpus_per_actor: of each; None: one where the cluster has GPUs, else none.
        address: of a running cluster ("auto": the one of this machine), or None.
        finished: called with each finished shard and its seconds, in any order (see `generate`).
        cpus_per_actor: cores and threads of each; None: all cores, shared equally.

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
    n_actors = min(n_actors, len(starts))
    with _cluster(address, n_actors * (cpus_per_actor or 1)) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = share_of(nodes, n_actors, cpus_per_actor, gpus_per_actor)
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
                fn_constructor_args=(load, job, os.getcwd(), share),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=n_actors),
                num_gpus=share.gpus,
                num_cpus=share.cpus,
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
def _cluster(address: str | None, least_cpus: int) -> Iterator[Any]:
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
            # As many as were asked for, even where that is more than there are.
            cores = max(os.cpu_count() or 1, least_cpus)
            place = {"num_cpus": cores, "include_dashboard": False}
            place["object_store_memory"] = STORE_BYTES
        # Workers import genrec from where this process did, installed or not.
        root = str(Path(genrec.__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
        # Workers' stderr is shown: it is where a library or the system says why one died.
        ray.init(**place, runtime_env=env, log_to_driver=True, logging_level=logging.WARNING)
    try:
        yield ray
    finally:
        if own:
            ray.shutdown()
