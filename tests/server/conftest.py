"""Tiny runs and apps over them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from genrec.recommend import Recommender
from genrec.server.app import create_app
from genrec.server.serving import load_run
from genrec.server.settings import ServerSettings


@dataclass(frozen=True)
class World:
    """Runs below `root`: "a" and "b" (another model of the same catalogue), "strings" (its own)."""

    root: Path
    ids: list[Any]  # of a and b
    recommenders: dict[str, Recommender]
    token = "0123456789abcdef0123"
    admin = {"authorization": f"Bearer {token}"}

    def settings(self, run: str = "a", **settings: Any) -> ServerSettings:
        values = {"admin_token": self.token, "runs_root": self.root, "timeout_s": 60.0} | settings
        return ServerSettings(run_dir=str(self.root / run), **values)

    def app(self, run: str = "a", **settings: Any) -> FastAPI:
        return create_app(load_run, self.settings(run, **settings))


@pytest.fixture(scope="session")
def world(tiny, tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("runs")
    shop = tiny.shop(n_items=60)
    for seed, name in enumerate("ab"):
        model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids, seed=seed)
        tiny.save_run(root / name, shop, model, tokenizer)
    strings = tiny.shop(strings=True)
    model, tokenizer, _ = tiny.sid_lm(strings.semantic_ids)
    tiny.save_run(root / "strings", strings, model, tokenizer)
    recommenders = {name: Recommender.load(root / name) for name in ("a", "b", "strings")}
    return World(root, shop.catalog["item_id"].to_list(), recommenders)


@pytest.fixture
def copy_run(world) -> Iterator[Callable[[str], Path]]:
    """A copy of run "a" below the root under another name, gone after the test."""
    made = []

    def copy(name: str) -> Path:
        made.append(world.root / name)
        return Path(shutil.copytree(world.root / "a", made[-1]))

    yield copy
    for path in made:
        shutil.rmtree(path, ignore_errors=True)
