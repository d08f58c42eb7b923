"""The Ray executor: the same shards as in one process, also when a worker dies."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import genrec.generation.ray_executor
from genrec.generation.jobs import GenerationJob, generate
from genrec.generation.ray_executor import ActorShare, ShardActor, generate_with_ray, share_of
from genrec.generation.shards import ShardInfo
from genrec.generation.users import SplitRows, UserTable
from genrec.recommend import Recommender


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("tiny") / "run"
    shop = tiny.shop()
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(run, shop, model, tokenizer)
    return run


@pytest.fixture(scope="module")
def recommender(run_dir) -> Recommender:
    return Recommender.load(run_dir)


@pytest.fixture
def users(recommender, tmp_path: Path) -> UserTable:
    ids = recommender.catalog["item_id"]
    lists = [[ids[(3 * u + i) % 20] for i in range(u % 7)] for u in range(240)]
    table = pl.DataFrame({"user_id": range(240), "history": lists})
    table.write_parquet(tmp_path / "users.parquet")
    return UserTable(tmp_path / "users.parquet", ids)


def job_of(users, folder: Path, shard_size: int = 4) -> GenerationJob:
    return GenerationJob(users, folder, 4, 10, "f" * 64, shard_size)


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("recommendations-*.parquet")}


def test_an_actor_makes_the_shards_that_it_is_given(run_dir, recommender, tmp_path: Path):
    """What runs in a worker, without Ray: any order, again, and after a half-done task."""
    rows = pl.read_parquet(run_dir / "data" / "test.parquet")
    local = job_of(SplitRows(rows, True), tmp_path / "local", 7)
    generate(recommender, local)
    job = job_of(SplitRows(rows, True), tmp_path / "ray", 7)
    actor = ShardActor(lambda: recommender, job)
    said = actor({"start": [21, 0]})
    infos = [ShardInfo(**json.loads(text)) for text in said["info"]]
    assert [(i.start, i.stop) for i in infos] == [(21, 28), (0, 7)]
    assert infos == [local.find(21), local.find(0)]
    assert min(said["seconds"]) > 0
    times = {p: p.stat().st_mtime_ns for p in job.folder.iterdir()}
    again = actor({"start": [0, 21]})  # a task that is tried again
    assert again["info"] == said["info"][::-1] and np.isnan(again["seconds"]).all()
    assert {p: p.stat().st_mtime_ns for p in job.folder.iterdir()} == times
    assert said["fault"] == ["", ""]
    ShardActor(lambda: recommender, job)({"start": job.missing()})
    assert shards(job.folder) == shards(local.folder)


def test_bad_input_in_an_actor_comes_back_as_a_message(recommender, users, tmp_path: Path):
    job = job_of(users, tmp_path)
    actor = ShardActor(lambda: recommender, job)
    assert actor({"start": [0]})["fault"] == [""]
    other = ShardActor(lambda: recommender, GenerationJob(users, tmp_path, 4, 10, "e" * 64, 4))
    said = other({"start": [0, 4]})
    assert said["info"] == [""] and "is of another run" in said["fault"][0]
    assert list(shards(tmp_path)) == [job.path(0).name]  # and no more are made
    assert "is of another run" in other({"start": [4]})["fault"][0]

    def refuse() -> Recommender:
        raise ValueError("no such stage")

    said = ShardActor(refuse, job)({"start": [0]})
    assert said["info"] == [""] and said["fault"] == ["no such stage"]


def test_what_an_actor_gets():
    def share(nodes, *args):
        found = share_of([dict(zip(("CPU", "GPU"), n, strict=False)) for n in nodes], *args)
        return found.cpus, found.gpus

    assert share([(32,)], 2, None, None) == (16, 0)  # not one thread each
    assert share([(32,)], 3, None, None) == (10, 0)
    assert share([(32,), (7,)], 2, None, None) == (16, 0)  # the second would be slower
    assert share([(32,), (7,)], 6, None, None) == (6, 0)  # none is split between machines
    assert share([(32,)], 2, 4, None) == (4, 0)
    assert share([(32, 4)], 2, None, None) == (16, 1)  # GPUs are used unless refused
    assert share([(32, 4)], 2, None, 0) == (16, 0)
    assert share([(32, 4)], 2, None, 2) == (16, 2)
    assert share([(8, 2), (64, 1)], 3, None, None) == (4, 1)
    assert share([(4, 1)], 4, None, 0.25) == (1, 0.25)
    for nodes, args, message in (
        ([(8, 2)], (3, None, None), "need 3 GPUs, the cluster has 2, which make 2 actors"),
        ([(8, 1), (8, 1)], (1, None, 2), "need 2 GPUs, the cluster has 2, which make 0 actors"),
        ([(8,)], (3, 4, None), "need 12 CPUs, the cluster has 8, which make 2 actors"),
        ([(2,)], (3, None, None), "need 3 CPUs, the cluster has 2, which make 2 actors"),
    ):
        with pytest.raises(ValueError, match=message):
            share(nodes, *args)


def test_an_actor_uses_its_share(recommender, users, tmp_path: Path, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    seen = []

    def load() -> Recommender:
        seen.append((torch.get_num_threads(), os.environ["CUDA_VISIBLE_DEVICES"]))
        return recommender

    try:
        ShardActor(load, job_of(users, tmp_path), None, ActorShare(3, 1))
        ShardActor(load, job_of(users, tmp_path), None, ActorShare(2, 0))
    finally:
        torch.set_num_threads(threads)
    assert seen == [(3, "0"), (2, "")]


def test_without_ray(monkeypatch, users, tmp_path: Path):
    for name in [n for n in sys.modules if n == "ray" or n.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    real = __import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return real(name, *args, **kwargs)

    monkeypatch.setattr("builtins.__import__", missing)
    with pytest.raises(ImportError, match=r'pip install "genrec\[ray\]"'):
        generate_with_ray(lambda: None, job_of(users, tmp_path), [0], 1)
    with pytest.raises(ValueError, match="num_actors=0 must be at least 1"):
        generate_with_ray(lambda: None, job_of(users, tmp_path), [0], 0)
    assert generate_with_ray(lambda: None, job_of(users, tmp_path), [], 1) == 0


def workers_below(pid: int) -> dict[int, str]:
    """Ray's worker processes among the descendants of a process: pid -> title."""
    parents, titles = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                titles[int(entry.name)] = (entry / "cmdline").read_bytes().decode()
            except (OSError, UnicodeDecodeError):
                continue
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {}
    for child, title in titles.items():
        above = child
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and title.startswith("ray::"):
            found[child] = title.rstrip("\0")
    return found


@pytest.mark.slow
def test_workers_that_keep_dying(run_dir, users, tmp_path: Path, monkeypatch):
    """At load, and on a shard that kills whoever makes it: an error that says so, not a loop."""
    import ray

    ray.init(
        num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}},
    )  # fmt: skip
    monkeypatch.setattr(genrec.generation.ray_executor, "MAX_RESTARTS", 1)
    job, loads = job_of(users, tmp_path / "lists", 80), tmp_path / "loads"

    def die():
        with open(loads, "a") as stream:
            stream.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    def poisoned() -> Recommender:
        import genrec.generation.jobs

        real = genrec.generation.jobs.write_shard

        def write(path, table, info):
            if info.start == 160:
                die()
            return real(path, table, info)

        genrec.generation.jobs.write_shard = write
        return Recommender.load(run_dir)

    try:
        with pytest.raises(ValueError, match=r"died again and again, 2 times .*fewer num_actors"):
            generate_with_ray(die, job, job.missing(), 1)
        assert len(loads.read_text()) == 2 and not shards(job.folder)
        loads.unlink()
        with pytest.raises(ValueError, match="the same command goes on behind the finished"):
            generate_with_ray(poisoned, job, job.missing(), 1)
        assert len(loads.read_text()) == 2
        assert job.missing() == [160]
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_two_workers_one_killed(run_dir, recommender, users, tmp_path: Path):
    import ray

    local, job = job_of(users, tmp_path / "local"), job_of(users, tmp_path / "ray")
    generate(recommender, local)
    root = str(Path(__file__).resolve().parent.parent)
    ray.init(
        num_cpus=2, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
    )  # fmt: skip
    killed: list[int] = []

    def kill_one() -> None:
        """SIGKILL to one actor as soon as both work and a few shards are done."""
        while len(shards(job.folder)) < 6:
            time.sleep(0.01)
        busy = {p: t for p, t in workers_below(os.getpid()).items() if "MapWorker" in t}
        assert len(busy) == 2, busy
        os.kill(min(busy), signal.SIGKILL)
        killed.append(len(shards(job.folder)))

    infos: list[ShardInfo] = []
    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    try:
        load = partial(Recommender.load, run_dir)
        made = generate_with_ray(
            load, job, job.missing(), 2, finished=lambda info, _: infos.append(info)
        )
        # Bad input comes out as what it is, not as an error of Ray.
        bad = GenerationJob(users, job.folder, 4, 10, "e" * 64, 4)
        with pytest.raises(ValueError, match="is of another run: it has rows 0 to 3"):
            generate_with_ray(load, bad, [0], 1)
        with pytest.raises(ValueError, match="1 GPUs, the cluster has 0"):
            generate_with_ray(load, job, [0], 1, gpus_per_actor=1)
    finally:
        ray.shutdown()
    killer.join(5)
    assert killed and 6 <= killed[0] < 60
    assert made == 240
    assert sorted(i.start for i in infos) == list(job.starts())
    assert shards(job.folder) == shards(local.folder)
    assert not job.missing() and job.totals() == local.totals()
