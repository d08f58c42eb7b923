"""Rules of batch generation: an item memory, drawn lists, variants, caps, boosts.

What can be had of `genrec.decoding.sampling` and `genrec.list_shaping` by settings alone. The
order of a shaped list is no longer that of its scores, and a drawn list is not the best one, so
such lists are made for users, not for a split whose lists are evaluated, explained and replayed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from genrec.columns import CATEGORIES, TITLE
from genrec.decoding.beam import BeamResult
from genrec.decoding.sampling import Sampler
from genrec.decoding.torch_engine import TorchEngine
from genrec.generation.memory import Remembered, beside, check_weight, log_mixture
from genrec.list_shaping import (
    Candidates,
    Cap,
    boosted,
    capped,
    category_at,
    label_weights,
    numbered,
    ordered_by,
    title_groups,
    without_similar,
)
from genrec.recommend import Engine


@dataclass(frozen=True)
class ListRules:
    """How lists are drawn or shaped; the default is the plain search.

    Attributes:
        sampler: draws the lists; then nothing else may be set.
        one_per_title: of items with the same title only the best is kept.
        title_variant: regular expression of the part of a title that only names a variant.
        max_per_category: most items of one category in a list.
        category_depth: which part of the category path that is; negative counts from the end.
        boosts: (category, factor): items rank as if they were so many times as probable.
        max_cosine: of two items whose vectors are nearer than that only the better one is kept.
        vectors: ``.npy`` of the catalogue's item vectors, (n_items, dim); `max_cosine` needs it.
        memory_weight: part of an item memory in what lists are ordered by; 0: there is none.
    """

    sampler: Sampler | None = None
    one_per_title: bool = False
    title_variant: str | None = None
    max_per_category: int | None = None
    category_depth: int = -1
    boosts: tuple[tuple[str, float], ...] = ()
    max_cosine: float | None = None
    vectors: Path | None = None
    memory_weight: float = 0.0

    def __post_init__(self) -> None:
        """Reject rules that can't work together."""
        if self.max_per_category is not None and self.max_per_category < 1:
            raise ValueError(f"max_per_category={self.max_per_category} must be at least 1")
        if bad := [pair for pair in self.boosts if not 0 < pair[1] < math.inf]:
            raise ValueError(
                f"boost {bad[0][0]}={bad[0][1]} must be a finite factor above 0; to show none or "
                "nothing else, use deny or allow"
            )
        if self.title_variant is not None and not self.one_per_title:
            raise ValueError("title_variant needs one_per_title: it says what titles may differ in")
        if self.max_cosine is not None and not -1 <= self.max_cosine < 1:
            raise ValueError(f"max_cosine={self.max_cosine} must lie in [-1, 1)")
        if (self.max_cosine is None) != (self.vectors is None):
            raise ValueError("max_cosine and the item vectors that it compares belong together")
        check_weight(self.memory_weight)
        if self.sampler is not None and self.shapes:
            raise ValueError(
                "lists are either drawn (sampler) or shaped, by a memory too; set one of them"
            )

    @property
    def shapes(self) -> bool:
        """Whether lists are shaped after the search."""
        limits = (self.max_per_category, self.max_cosine)
        rules = (self.one_per_title, self.boosts, self.memory_weight)
        return any(rules) or any(n is not None for n in limits)

    @property
    def plain(self) -> bool:
        """Whether the search is left as it is."""
        return self.sampler is None and not self.shapes


def caps_and_weights(
    catalog: pl.DataFrame, rules: ListRules
) -> tuple[list[Cap], np.ndarray | None]:
    """What the rules mean for a catalogue.

    Args:
        catalog: ``catalog.parquet``.
        rules: the rules.

    Returns:
        Caps, and the log-weight of each item, ``(n_items,)``, or None without boosts.

    Raises:
        ValueError: a pattern is none, or a depth or a category is not in the catalogue.
    """
    caps: list[Cap] = []
    weights: np.ndarray | None = None
    if rules.one_per_title:
        with _in_terms_of(f"title_variant={rules.title_variant!r}"):
            caps.append(Cap(title_groups(catalog[TITLE], rules.title_variant), 1))
    if rules.max_per_category is not None or rules.boosts:
        with _in_terms_of(f"category_depth={rules.category_depth}"):
            labels, names = numbered(category_at(catalog[CATEGORIES], rules.category_depth))
        if rules.max_per_category is not None:
            caps.append(Cap(labels, rules.max_per_category))
        if rules.boosts:
            logs = {name: math.log(factor) for name, factor in rules.boosts}
            with _in_terms_of(f"boosts, categories at category_depth={rules.category_depth}"):
                weights = label_weights(labels, names, logs)
    return caps, weights


@contextmanager
def _in_terms_of(setting: str) -> Iterator[None]:
    """Say which setting a ValueError is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from error


def parse_boosts(values: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """``["Hats=2", "A=B=0.5"]`` -> (("Hats", 2.0), ("A=B", 0.5)): the last "=" divides.

    Raises:
        ValueError: another form, or a category twice.
    """
    found: dict[str, float] = {}
    for value in values:
        name, _, text = value.rpartition("=")
        try:
            factor = float(text)
        except ValueError:
            factor = math.nan
        if not name or math.isnan(factor) or name in found:
            raise ValueError(
                f"boosts: {value!r} should read category=factor, such as Hats=2, each category once"
            )
        found[name] = factor
    return tuple(found.items())


class ListMaker:
    """A search under rules.

    Args:
        engine: of the search.
        catalog: ``catalog.parquet``, row for row with the engine's trie.
        rules: the rules.

    Raises:
        ValueError: the engine can't draw, or the catalogue lacks what a rule speaks of.
    """

    def __init__(self, engine: Engine, catalog: pl.DataFrame, rules: ListRules) -> None:
        self.engine, self.rules, self._n_items = engine, rules, len(catalog)
        if rules.sampler is not None and not isinstance(engine, TorchEngine):
            raise ValueError(
                f"lists are drawn in process, which {type(engine).__name__} doesn't offer; use "
                "engine='torch'"
            )
        self._caps, self._weights = caps_and_weights(catalog, rules)
        self._vectors = None if rules.vectors is None else np.load(rules.vectors, mmap_mode="r")
        if self._vectors is not None and len(self._vectors) != len(catalog):
            raise ValueError(
                f"{rules.vectors} has {len(self._vectors)} rows for {len(catalog)} items; embed "
                "this catalogue"
            )

    def search(
        self,
        prompts: Sequence[Sequence[int]],
        k: int,
        beam_width: int,
        remembered: Remembered | None = None,
        **options: Any,
    ) -> BeamResult:
        """Lists of at most `k` items; arguments as the engine's.

        A shaped list is chosen among the `beam_width` candidates of the search and, with a memory,
        `k` more. It keeps their scores, which are the model's, and is not `certified`.

        Args:
            prompts: of the users.
            k: length of the lists.
            beam_width: of the search.
            remembered: what the memory knows of the users, under the same filters; to be given
                where `memory_weight` is.
            options: further arguments of the engine's search.
        """
        if self.rules.sampler is not None:
            options["sampler"] = self.rules.sampler
        if not self.rules.shapes:
            return self.engine.search(prompts, k, beam_width, **options)
        found = self.engine.search(prompts, beam_width, beam_width, **options)
        if remembered is not None:
            found = beside(found, remembered, prompts, k, self._n_items, self._score)
        lists = Candidates.of(found.items, found.scores)
        if remembered is not None:
            weight = self.rules.memory_weight
            keys = log_mixture(lists.items, lists.scores, remembered, weight, self._n_items)
            lists = ordered_by(lists, keys)
        if self._weights is not None:
            lists = boosted(lists, self._weights)
        if self._vectors is not None and self.rules.max_cosine is not None:
            lists = without_similar(lists, self._vectors, self.rules.max_cosine)
        lists = capped(lists, self._caps).top(k)
        levels = np.take_along_axis(
            found.level_log_probs, np.maximum(lists.places, 0)[..., None], axis=1
        )
        levels = np.where(lists.places[..., None] >= 0, levels, -np.inf).astype(np.float32)
        return BeamResult(lists.items, lists.scores, levels, np.zeros(len(lists.items), dtype=bool))

    def _score(
        self,
        prompts: Sequence[Sequence[int]],
        k: int,
        beam_width: int,
        candidates: list[np.ndarray],
    ) -> BeamResult:
        """Scores of items that filters have passed already."""
        return self.engine.search(prompts, k, beam_width, candidates=candidates)
