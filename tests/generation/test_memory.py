"""A memory beside the model, against the mixture over the whole catalogue."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from genrec.columns import HISTORY, ROW_ID, SUPERVISE_FROM, TARGET, USER_ID
from genrec.evaluation import item_memory
from genrec.evaluation.item_memory import ItemMemory
from genrec.evaluation.knn import ItemKNN, KNNSettings
from genrec.generation.jobs import GenerationJob, ShardMaker
from genrec.generation.memory import Permitted
from genrec.generation.shaping import ListRules
from genrec.generation.users import UserColumns, UserTable
from genrec.item_lists import ItemLists, no_items
from genrec.modeling import encode_prompts
from genrec.recommend import Recommender

N_USERS, WEIGHT = 14, 0.6


@pytest.fixture(scope="module")
def world(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recommender, ItemMemory]:
    run = tmp_path_factory.mktemp("run")
    shop = tiny.shop(strings=True)
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(run, shop, model, tokenizer)
    rng = np.random.default_rng(0)
    n_items = len(shop.catalog)
    walks = [rng.integers(0, n_items - 2, n).tolist() for n in rng.integers(2, 5, 12)]
    train = pl.DataFrame(
        {
            ROW_ID: [f"row-{i:03}" for i in range(len(walks))],
            USER_ID: list(range(len(walks))),
            HISTORY: [walk[:-1] for walk in walks],
            TARGET: [walk[-1] for walk in walks],
            SUPERVISE_FROM: [0] * len(walks),
        },
        schema_overrides={HISTORY: pl.List(pl.Int32), TARGET: pl.Int32},
    )
    knn = ItemKNN(train, n_items, KNNSettings(lag_power=0.5, neighbours=6))
    return Recommender.load(run, normalizer="trie"), ItemMemory(knn)


@pytest.fixture(scope="module")
def users(world: tuple[Recommender, ItemMemory], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users with 0 to 4 items, some of which may get some items alone."""
    ids = world[0].catalog["item_id"]
    histories = [[ids[(5 * u + 3 * i) % 20] for i in range(u % 5)] for u in range(N_USERS)]
    only = [[ids[i] for i in range(u % 7, 20, 2)] if u % 3 == 0 else None for u in range(N_USERS)]
    barred = [[ids[u], ids[19 - u]] for u in range(N_USERS)]
    path = tmp_path_factory.mktemp("users") / "users.parquet"
    table = {"user_id": [f"u{u}" for u in range(N_USERS)], "history": histories}
    pl.DataFrame({**table, "only": only, "barred": barred}).write_parquet(path)
    return path


def made(world, users: Path, folder: Path, width: int, allowed=None, rules=None, **columns: str):
    recommender, memory = world
    folder.mkdir()
    rows = UserTable(users, recommender.catalog["item_id"], UserColumns(**columns))
    rules = rules or ListRules(memory_weight=WEIGHT)
    job = GenerationJob(rows, folder, 5, width, "f", 8, allowed, rules, memory)
    maker = ShardMaker(recommender, pickle.loads(pickle.dumps(job)))  # as an actor gets it
    for start in job.starts():
        maker.make(start)
    return pl.read_parquet(folder / "*.parquet"), pl.concat([rows.read(0, 8), rows.read(8, 8)])


def by_hand(world, row: dict[str, Any], allowed: set[int]) -> tuple[list[int], np.ndarray, bool]:
    """The best five items of a user over the whole catalogue, the model's scores of all, and
    whether the memory knew anything."""
    recommender, memory = world
    history = row[HISTORY]
    prompts = encode_prompts(recommender.tokenizer, recommender.prompts([history]))
    whole = recommender.engine.search(prompts, 20, 20)
    model = np.full(20, -np.inf)
    model[whole.items[0]] = whole.scores[0]
    scores, knn = np.zeros(20), memory.knn
    for age, item in enumerate(reversed(history)):
        scores += knn.settings.decay**age * knn.similarity[item].toarray().ravel()
    scores[row["seen_item_index"]] = 0
    remembered = scores**memory.power
    mixed = np.exp(model)
    if remembered.sum():
        mixed = (1 - WEIGHT) * mixed + WEIGHT * remembered / remembered.sum()
    may = allowed - set(row["seen_item_index"])
    if row.get("candidates") is not None:
        may &= set(row["candidates"])
    order = sorted(may, key=lambda item: -mixed[item])
    return order[:5], model, bool(remembered.sum())


@pytest.mark.parametrize("width", [20, 5])
@pytest.mark.parametrize("filtered", [False, True])
def test_lists_are_the_mixture_s(world, users, tmp_path, filtered: bool, width: int):
    recommender, _ = world
    allowed = np.arange(1, 19) if filtered else None
    columns = {"exclude": "barred", "candidates": "only"} if filtered else {}
    lists, rows = made(world, users, tmp_path / "lists", width, allowed, **columns)
    found = {user: own for (user,), own in lists.group_by("user_id", maintain_order=True)}
    remembered, beyond = 0, 0
    for row in rows.iter_rows(named=True):
        mine = found[row["user_id"]]
        may = set(range(20)) if allowed is None else set(allowed.tolist())
        best, model, known = by_hand(world, row, may)
        items = mine["item_index"].to_list()
        # Scores are the model's own, whoever brought the item.
        assert mine["score"].to_list() == pytest.approx(model[items].tolist(), abs=1e-5)
        summed = mine["level_log_probs"].list.sum().to_list()
        assert summed == pytest.approx(mine["score"].to_list(), abs=1e-5)
        assert not set(items) & set(row["seen_item_index"]) and set(items) <= may
        assert not mine["certified"].any()
        if width == 20:
            assert items == best
        remembered += known
        # What a search of width 5 would not have found.
        beyond += len(set(items) - set(np.argsort(-model, kind="stable")[:5].tolist()))
    assert 0 < remembered < len(rows)  # the memory knows nothing of some histories
    assert beyond > len(rows)


def test_filters_change_no_probability(world, monkeypatch):
    monkeypatch.setattr(item_memory, "BATCH_ROWS", 3)
    monkeypatch.setattr(item_memory, "MOST", 4)
    memory = world[1]
    history = ItemLists(np.arange(16) % 18, np.arange(0, 17, 2))
    free = memory.best(history, no_items(8))
    allowed = np.arange(20) % 3 > 0
    only = ItemLists(np.arange(8), np.arange(9))
    limited = np.arange(8) % 2 == 0
    some = memory.best(history, no_items(8), Permitted(allowed, only, limited))
    known = dict(zip(zip(free.rows, free.items, strict=True), free.log_probs, strict=True))
    pairs = list(zip(some.rows, some.items, strict=True))
    assert pairs and all(allowed[item] for _, item in pairs)
    assert all(item == row for row, item in pairs if limited[row])
    shared = [pair for pair in pairs if pair in known]
    assert len(shared) < len(pairs)  # others stand behind the first four
    for pair, log in zip(pairs, some.log_probs, strict=True):
        if pair in known:
            assert log == pytest.approx(known[pair])
    assert sorted(some.rows) == some.rows.tolist()


def test_caps_and_boosts_follow_the_mixture(world, users, tmp_path):
    recommender, _ = world
    kinds = recommender.catalog["categories"].list.get(-1).to_numpy()
    rules = ListRules(memory_weight=WEIGHT, max_per_category=2)
    capped, rows = made(world, users, tmp_path / "capped", 20, rules=rules)
    for row in rows.iter_rows(named=True):
        recommended = capped.filter(pl.col("user_id") == row["user_id"])["item_index"].to_list()
        assert recommended[0] == by_hand(world, row, set(range(20)))[0][0]
        assert max(np.unique(kinds[recommended], return_counts=True)[1]) <= 2


def test_a_weight_without_a_memory(world, users, tmp_path):
    recommender, memory = world
    rows = UserTable(users, recommender.catalog["item_id"])
    with pytest.raises(ValueError, match="belong together"):
        GenerationJob(rows, tmp_path, 5, 10, "f", rules=ListRules(memory_weight=0.2))
    with pytest.raises(ValueError, match="belong together"):
        GenerationJob(rows, tmp_path, 5, 10, "f", memory=memory)
    with pytest.raises(ValueError, match="memory_weight=1 must"):
        ListRules(memory_weight=1)
