"""Batch generation on a run folder made by library calls."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

import genrec.generation.jobs
from genrec.artifacts import sha256_bytes
from genrec.generation.jobs import (
    GenerationJob,
    ProgressFile,
    ShardMaker,
    check_users,
    generate,
    list_facts,
    locked,
    measured_speed,
    parse_part,
)
from genrec.generation.shards import ShardInfo
from genrec.generation.users import SplitRows, UserColumns, UserTable
from genrec.prompts import PromptRenderer
from genrec.recommend import Recommender

MAX_HISTORY = 6


@pytest.fixture(scope="module", params=[False, True], ids=["integer ids", "string ids"])
def world(request, tiny, tmp_path_factory):
    """(shop, recommender)"""
    run = tmp_path_factory.mktemp("run")
    shop = tiny.shop(strings=request.param, max_history=MAX_HISTORY)
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(run, shop, model, tokenizer, MAX_HISTORY)
    return shop, Recommender.load(run)


@pytest.fixture(scope="module")
def shop_of_integers(tiny):
    return tiny.shop(max_history=MAX_HISTORY)


def job_of(
    rows: pl.DataFrame, folder: Path, *sizes: int, seen: bool = True, **more
) -> GenerationJob:
    """A job over split rows; sizes are k, beam_width and shard_size."""
    return GenerationJob(
        SplitRows(rows, seen), folder, sizes[0], sizes[1], "f" * 64, *sizes[2:], **more
    )


def table_of(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "recommendations-*.parquet")


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("recommendations-*"))}


def with_lists(shop, lists: list[list[int]], column: str = "seen_item_index") -> pl.DataFrame:
    rows = shop.splits.test[: len(lists)]
    return rows.with_columns(pl.Series(column, lists, dtype=pl.List(pl.Int32)))


def test_shards_resume_and_nothing_is_doubled(world, tmp_path: Path):
    shop, recommender = world
    rows = shop.splits.test
    ticks: list[int] = []
    infos: list[ShardInfo] = []
    whole, cut = (
        job_of(rows, tmp_path / "whole", 4, 10, 7),
        job_of(rows, tmp_path / "cut", 4, 10, 7),
    )
    made = generate(recommender, whole, None, ticks.append, lambda info, _: infos.append(info))
    assert made == len(rows) == 30
    assert sum(ticks) == 30
    names = list(shards(whole.folder))
    ends = [(0, 6), (7, 13), (14, 20), (21, 27), (28, 29)]
    assert names == [f"recommendations-{a:010d}-{b:010d}.parquet" for a, b in ends]
    assert [(i.start, i.stop - 1) for i in infos] == ends
    generate(recommender, cut)
    (cut.folder / names[2]).unlink()
    kept = {n: (cut.folder / n).stat().st_mtime_ns for n in names if n != names[2]}
    assert cut.missing() == [14]
    assert generate(recommender, cut) == 7
    assert {n: (cut.folder / n).stat().st_mtime_ns for n in kept} == kept
    assert generate(recommender, cut) == 0
    assert shards(cut.folder) == shards(whole.folder)
    table = table_of(whole.folder)
    assert len(table) == 30 * 4 and table.select("row_id", "rank").is_duplicated().sum() == 0
    one = job_of(rows, tmp_path / "one", 4, 10)
    generate(recommender, one)  # one shard: the same table
    assert_frame_equal(table_of(one.folder), table, abs_tol=1e-5)


def test_a_shard_that_another_process_made_meanwhile_stays(world, tmp_path: Path, monkeypatch):
    """A scheduler may start a job again whose process still runs, with another batch size."""
    shop, recommender = world
    job = job_of(shop.splits.test, tmp_path / "job", 4, 10, 40)
    there, theirs = tmp_path / "theirs", job_of(shop.splits.test, tmp_path / "theirs", 4, 10, 40)
    generate(recommender, theirs)
    (name,) = shards(there)
    search = recommender.engine.search

    def meanwhile(*args, **options):
        found = search(*args, **options)
        job.folder.mkdir(exist_ok=True)
        (job.folder / name).write_bytes((there / name).read_bytes())
        return found

    monkeypatch.setattr(recommender.engine, "search", meanwhile)
    written = []
    monkeypatch.setattr(genrec.generation.jobs, "write_shard", lambda *args: written.append(args))
    assert generate(recommender, job) == 30
    assert not written and shards(job.folder) == shards(there)


def test_parts_of_a_job_make_the_same_shards(world, tmp_path: Path):
    shop, recommender = world
    whole = job_of(shop.splits.test, tmp_path / "whole", 3, 10, 4)
    parts = job_of(shop.splits.test, tmp_path / "parts", 3, 10, 4)
    generate(recommender, whole)
    assert [list(parts.starts((i, 3))) for i in (1, 2, 3)] == [[0, 12, 24], [4, 16, 28], [8, 20]]
    assert [parts.n_users(parts.starts((i, 3))) for i in (1, 2, 3)] == [12, 10, 8]
    for i in (3, 1):
        generate(recommender, parts, parts.missing((i, 3)))
        assert not parts.missing((i, 3))
    assert parts.absent() == parts.missing() == [4, 16, 28]
    generate(recommender, parts, parts.missing((2, 3)))
    assert shards(parts.folder) == shards(whole.folder)
    assert parts.totals() == whole.totals()
    assert list(parts.starts((40, 40))) == []  # more parts than shards


def test_the_table_says_what_was_recommended(world, tmp_path: Path):
    shop, recommender = world
    rows = shop.splits.test
    generate(recommender, job_of(rows, tmp_path, 4, 20, 16))
    table = table_of(tmp_path)
    assert table.columns == [
        "row_id", "user_id", "rank", "item_id", "item_index", "sid", "score", "level_log_probs",
        "certified", "prompt_sha256",
    ]  # fmt: skip
    assert table.schema["rank"] == pl.Int32 and table.schema["score"] == pl.Float32
    assert table.schema["level_log_probs"] == pl.List(pl.Float32)
    assert table.schema["item_id"] == shop.catalog.schema["item_id"]
    joined = table.join(shop.catalog, on="item_index", suffix="_true")
    assert (joined["item_id"] == joined["item_id_true"]).all()
    sids = shop.semantic_ids.sids()
    for row_id, user_id, history, seen in rows.select(
        "row_id", "user_id", "history_item_index", "seen_item_index"
    ).iter_rows():
        mine = table.filter(pl.col("row_id") == row_id)
        assert mine["rank"].to_list() == [1, 2, 3, 4] and set(mine["user_id"]) == {user_id}
        assert not set(mine["item_index"]) & set(seen)
        assert mine["sid"].to_list() == [sids[i] for i in mine["item_index"]]
        sums = [sum(x) for x in mine["level_log_probs"].to_list()]
        assert mine["score"].to_list() == pytest.approx(sums, abs=1e-4)
        (prompt,) = recommender.prompts([history])
        assert set(mine["prompt_sha256"]) == {sha256_bytes(prompt.encode())}
    # One by one, as the API serves it, gives the same lists.
    ids = shop.catalog["item_id"]
    history = rows["history_item_index"][0].to_list()
    served = recommender.recommend([ids[i] for i in history], 4, filter_seen=False, beam_width=20)
    unfiltered = job_of(rows[:1], tmp_path / "unfiltered", 4, 20, seen=False)
    generate(recommender, unfiltered)
    assert [r.item_id for r in served] == table_of(unfiltered.folder)["item_id"].to_list()


def test_short_lists_where_little_is_left(world, tmp_path: Path):
    shop, recommender = world
    rows = with_lists(shop, [list(range(18)), []])
    job = job_of(rows, tmp_path, 4, 20)
    generate(recommender, job)
    counts = dict(table_of(tmp_path).group_by("row_id").len().iter_rows())
    assert [counts[r] for r in rows["row_id"]] == [2, 4]
    facts = list_facts(job)
    assert facts["short_lists"] == 1 and facts["items"] == 6 and facts["users"] == 2
    assert facts["certified_share"] == facts["certified"] / 2


def test_a_view_holds_for_all_and_a_beam_may_be_wider(world, tmp_path: Path):
    shop, recommender = world
    rows = with_lists(shop, [[], [3], [3, 8, 11]])
    allowed = np.array([3, 8, 11, 15])
    job = job_of(rows, tmp_path, 4, 50, allowed=allowed)
    check_users(job, 20)
    generate(recommender, job)
    lists = table_of(tmp_path).group_by("row_id", maintain_order=True).agg("item_index", "score")
    assert [set(items) for items in lists["item_index"]] == [{3, 8, 11, 15}, {8, 11, 15}, {15}]
    assert job.totals()["short_lists"] == 2
    plain = job_of(rows, tmp_path / "plain", 20, 50, seen=False)
    generate(recommender, plain)
    scores = dict(table_of(plain.folder)[:20].select("item_index", "score").iter_rows())
    for item, score in zip(lists["item_index"][0], lists["score"][0], strict=True):
        assert score == pytest.approx(scores[item], abs=1e-5)  # a filter changes no score
    with pytest.raises(ValueError, match="the allow-list is empty"):
        ShardMaker(recommender, job_of(rows, tmp_path, 4, 5, allowed=np.array([], dtype=int)))


def test_users_with_nothing_left_are_named_before_decoding(world, tmp_path: Path):
    shop, recommender = world
    rows = with_lists(shop, [[1], list(range(20)), [0], list(range(20))])
    with pytest.raises(ValueError, match=r"has no allowed item left \(2 such users") as error:
        check_users(job_of(rows, tmp_path, 2, 5), 20)
    assert f"user {rows['user_id'][1]!r} (row 2)" in str(error.value)
    assert not (tmp_path / "input_check.json").exists()
    view = job_of(with_lists(shop, [[1], [2, 3]]), tmp_path, 2, 5, allowed=np.array([2, 3]))
    with pytest.raises(ValueError, match=r"\(1 such users from there to row 2\)"):
        check_users(view, 20)
    with pytest.raises(ValueError, match="users of rows 1 to 2: prompt 1 has no allowed item left"):
        generate(recommender, view)
    assert not shards(tmp_path)


def test_the_check_is_made_once_for_a_fingerprint(world, tmp_path: Path):
    shop, _ = world
    rows = with_lists(shop, [[], [1]], "history_item_index")
    job = job_of(rows, tmp_path, 2, 5, seen=False)
    found = {"rows": 2, "without_history": 1, "unknown_items": 0, "rows_with_unknown": 0}
    assert check_users(job, 20) == found
    kept = json.loads((tmp_path / "input_check.json").read_text())
    assert kept == {"fingerprint": "f" * 64, "context": None, "counts": found}
    kept["counts"]["rows"] = 7
    (tmp_path / "input_check.json").write_text(json.dumps(kept))
    assert check_users(job, 20)["rows"] == 7
    for damaged in ("{", "[]", "{}", '{"fingerprint": 1}', '"' + "f" * 64 + '"'):
        (tmp_path / "input_check.json").write_text(damaged)
        assert check_users(job, 20) == found
    kept["fingerprint"] = "another"
    (tmp_path / "input_check.json").write_text(json.dumps(kept))
    assert check_users(job, 20) == found


def test_a_prompt_longer_than_the_context(world, tmp_path: Path):
    shop, recommender = world
    rows = with_lists(shop, [[1], [1] * 200], "history_item_index")
    longer = Recommender(
        recommender.catalog, recommender.semantic_ids, recommender.renderer, recommender.template,
        recommender.tokenizer, recommender.engine, 200, "sft",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"rows 1 to 2: prompt 1 .* context holds 256; lower max_"):
        generate(longer, job_of(rows, tmp_path, 2, 5, seen=False))
    assert not shards(tmp_path)


def test_damaged_shards_are_made_again_and_strangers_refused(world, tmp_path: Path):
    shop, recommender = world
    job = job_of(shop.splits.test[:9], tmp_path / "lists", 2, 5, 3)
    generate(recommender, job)
    before = shards(job.folder)
    first, second, _ = map(job.path, job.starts())
    first.write_bytes(first.read_bytes()[:-30])
    second.write_bytes(b"")
    assert job.missing() == [0, 3]
    assert generate(recommender, job) == 6
    assert shards(job.folder) == before
    aside = sorted(p.name for p in job.folder.glob("damaged-*"))
    assert aside == [f"damaged-1-{first.name}", f"damaged-1-{second.name}"]
    other = GenerationJob(job.users, job.folder, 2, 5, "e" * 64, 3)
    with pytest.raises(ValueError, match="rows 0 to 2 of run ffffffffffff.* of run eeeeeeeeeeee"):
        other.missing()
    with pytest.raises(ValueError, match="rows 0 to 2 of run ffffffffffff"):
        ShardMaker(recommender, other).make(0)
    wider = GenerationJob(job.users, job.folder, 2, 5, job.fingerprint, 4)
    with pytest.raises(ValueError, match=r"which is no shard of this run \(3 such files\)"):
        wider.missing()
    assert shards(job.folder) == before


def test_candidates_are_passed_only_where_there_are_some(tiny, shop_of_integers, tmp_path: Path):
    """The engine gets each user's candidates, in the order of the prompts."""
    shop = shop_of_integers
    ids = shop.catalog["item_id"]
    pl.DataFrame(
        {
            "user_id": ["a", "b", "c"],
            "history": [[ids[1]], [], []],
            "pool": [[ids[4], ids[2]], [ids[5]], None],
            "stop": [[ids[2]], None, None],
        }
    ).write_parquet(tmp_path / "users.parquet")
    columns = UserColumns(exclude="stop", candidates="pool")
    users = UserTable(tmp_path / "users.parquet", ids, columns)
    job = GenerationJob(users, tmp_path, 1, 5, "f" * 64)
    check_users(job, 20)
    asked = {}

    class Asked(Exception):
        pass

    class Engine:
        trie = None

        def search(self, prompts, k, beam_width, **options):
            asked.update(options, n=len(prompts))
            raise Asked

    _, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    recommender = Recommender(
        shop.catalog, shop.semantic_ids, PromptRenderer(), "sequential/seen/01", tokenizer,
        Engine(), 3, "sft",
    )  # fmt: skip
    with pytest.raises(Asked):
        generate(recommender, job)
    assert asked["n"] == 3 and asked["candidates"][2] is None  # no limit for this one
    assert [c.tolist() for c in asked["candidates"][:2]] == [[4, 2], [5]]
    assert [s.tolist() for s in asked["seen"]] == [[1, 2], [], []]
    asked.clear()
    with pytest.raises(Asked):
        generate(recommender, job_of(shop.splits.test[:2], tmp_path / "x", 1, 5, seen=False))
    assert "candidates" not in asked and asked["seen"] is None


def test_sizes_and_parts_that_can_not_be(shop_of_integers, tmp_path: Path):
    rows = shop_of_integers.splits.test
    with pytest.raises(ValueError, match="k=10 must lie between 1 and beam_width=5"):
        job_of(rows, tmp_path, 10, 5)
    with pytest.raises(ValueError, match="shard_size=0 must be at least 1"):
        job_of(rows, tmp_path, 1, 5, 0)
    assert parse_part("1/1") == (1, 1) and parse_part("3/8") == (3, 8)
    for text in ("", "1", "1/", "/2", "a/b", "-1/2", "1/2/3", "1.0/2", "²/3", " 1/2"):
        with pytest.raises(ValueError, match="must have the form i/n"):
            parse_part(text)
    for text in ("0/4", "5/4", "0/0"):
        with pytest.raises(ValueError, match="the part must lie between 1 and"):
            parse_part(text)


def test_progress_of_a_part(shop_of_integers, tmp_path: Path):
    job = job_of(shop_of_integers.splits.test, tmp_path, 2, 5, 4)
    progress = ProgressFile(job, (2, 3), 8)  # 10 users, 2 are done
    assert progress.path.name == "progress-2of3.json" and progress.users_per_s is None
    progress.write()
    said = json.loads(progress.path.read_text())
    assert (said["users"], said["done"], said["users_per_s"], said["eta_s"]) == (10, 2, None, None)
    progress.finished(ShardInfo("f", 4, 8), 2.0)
    said = json.loads(progress.path.read_text())
    assert (said["done"], said["made_by_this_call"]) == (6, 4)
    assert said["users_per_s"] > 0 and said["eta_s"] >= 0 and said["part"] == "2/3"
    progress.finished(ShardInfo("f", 16, 20), 2.0)
    assert json.loads(progress.path.read_text()) == said  # the last is written by the recipe
    progress.write()
    said = json.loads(progress.path.read_text())
    assert (said["done"], said["eta_s"]) == (10, 0)
    assert ProgressFile(job, (1, 1), 0).path.name == "progress.json"


def test_the_rate_is_that_of_all_shards_whoever_made_them(
    shop_of_integers, tmp_path: Path, monkeypatch
):
    """Over parts, calls and actors; neither loading nor what was there already counts."""
    job = job_of(shop_of_integers.splits.test, tmp_path, 2, 5, 4)  # 30 users in 8 shards
    assert measured_speed(job) == {"users_per_s": None, "timed_users": 0}

    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(genrec.generation.jobs, "time", clock)

    def call(part: tuple[int, int], *made: tuple[int, float | None]) -> ProgressFile:
        progress = ProgressFile(job, part, 4 * len(made))
        now[0] += 50  # the model is loaded
        for start, seconds in made:
            now[0] += seconds or 0
            progress.finished(ShardInfo("f", start, job.stop(start)), seconds)
        progress.write()
        return progress

    whole = call((1, 2), (0, 1.0), (8, 1.0), (16, 2.0))
    assert whole.users_per_s == 3  # since the first shard was begun
    assert measured_speed(job) == {"users_per_s": 3.0, "timed_users": 12}
    call((1, 2), (24, 12.0))  # resumed after a kill
    assert measured_speed(job) == {"users_per_s": 1.0, "timed_users": 16}
    call((2, 2), (4, 0.5), (12, None), (20, 1.5))
    assert measured_speed(job) == {"users_per_s": 1.3, "timed_users": 24}  # 24 in 18 s
    call((1, 1), (28, 2.0))  # the rest without --shard
    assert measured_speed(job) == {"users_per_s": 1.3, "timed_users": 26}
    (tmp_path / "progress-1of2.json").write_text("{")
    assert measured_speed(job) == {"users_per_s": 2.5, "timed_users": 10}  # 8 in 2 s, 2 in 2 s
    other = GenerationJob(job.users, job.folder, 2, 5, "e" * 64, 4)
    assert measured_speed(other) == {"users_per_s": None, "timed_users": 0}


def test_only_one_process_holds_the_lock(tmp_path: Path):
    import fcntl

    with locked(tmp_path / "run"), open(tmp_path / "run" / ".recommend.lock") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(tmp_path / "run" / ".recommend.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
