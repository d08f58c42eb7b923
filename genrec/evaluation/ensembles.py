"""One list out of several models': a mixture of their probabilities, item by item.

An item memory may be among them (`genrec.evaluation.item_memory`). Equal scores go by item id; a
memory has many, and on Beauty, where ids follow first appearance, other orders of ties gave the
same NDCG@10 to four digits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from genrec.artifacts import require
from genrec.columns import ITEM_ID, RANK, ROW_ID, SCORE, USER_ID
from genrec.generation.memory import check_weight

_ROUNDING = 1e-3  # a log-probability of 0 may come out a little above
_ROWS = 16_384  # rows mixed at once: bounds memory
# Settings of recommend whose promise a memory, which doesn't know them, would break.
_RULES = (
    "allow", "deny", "opt_out", "one_per_title", "max_cosine", "max_per_category", "boosts",
    "sampler",
)  # fmt: skip

Memory = Callable[[pl.Series], pl.DataFrame]


def check_runs(runs: Sequence[Path | str], with_memory: bool = False) -> list[Mapping[str, Any]]:
    """Refuse runs whose lists can't be mixed.

    Args:
        runs: run folders.
        with_memory: an item memory is to speak beside them.

    Returns:
        Their settings of recommend.

    Raises:
        ValueError: a run has no lists of a split of its own; data, split, the rule for seen items,
            normalisers or filters differ; or, with a memory, scores are no distribution over items,
            or lists follow rules that the memory doesn't know.
    """
    told = []
    for folder in runs:
        manifest = require(folder, "recommend")
        if "prepare" not in manifest.inputs or "split" not in manifest.config:
            raise ValueError(f"{folder} holds no lists of a split; those of --users can't be mixed")
        same = {
            **{name: manifest.config[name] for name in ("split", "filter_seen", "normalizer")},
            "data": manifest.inputs["prepare"],
            **{name: manifest.inputs.get(name) for name in ("allow", "deny")},
        }
        told.append((same, manifest.config))
    for folder, (same, _) in zip(runs[1:], told[1:], strict=True):
        for name, value in same.items():
            if value != told[0][0][name]:
                raise ValueError(
                    f"{folder} was made with {name}={value}, {runs[0]} with {told[0][0][name]}; "
                    "they can't be mixed"
                )
    for folder, (_, config) in zip(runs, told, strict=True) if with_memory else ():
        if config["normalizer"] != "trie":
            raise ValueError(
                f"{folder} has scores normalised over {config['normalizer']}: they are no "
                "distribution over items, and a memory would drown them; make its lists with "
                "recommend --normalizer trie"
            )
        if rules := [name for name in _RULES if config.get(name)]:
            raise ValueError(
                f"{folder} was made with {', '.join(rules)}, which a memory doesn't know and would "
                "break; mix lists without"
            )
    return [config for _, config in told]


def mixture(
    lists: Sequence[pl.DataFrame],
    k: int,
    memory: Memory | None = None,
    memory_weight: float = 0.0,
) -> pl.DataFrame:
    """The k items of highest mean probability over models.

    A model that doesn't list an item gives it no probability, though it has some below that of the
    last item it lists: make the lists longer than k (three to five times), and it matters little.
    Models are mixed by item id, so they may have different semantic ids.

    Args:
        lists: per model the columns row_id, user_id, item_id and score, a log-probability.
        k: length of the lists.
        memory: row ids -> lists of an item memory, of the same columns; it may know nothing of
            some rows, which are then the models' alone.
        memory_weight: its part of the mixture, in [0, 1); the models share the rest evenly.

    Returns:
        Columns row_id, user_id, item_id, rank (1 … k) and score (log of the mean probability),
        sorted by row_id and rank; equal scores by item id.

    Raises:
        ValueError: fewer than two models, or none and a memory; rows that differ between them, an
            item listed twice in one list, or scores that are no log-probabilities.
    """
    if len(lists) < (2 if memory is None else 1):
        fewest = "two models" if memory is None else "one model"
        raise ValueError(f"a mixture needs at least {fewest}, not {len(lists)}")
    check_weight(memory_weight)
    if k < 1:
        raise ValueError(f"k={k} must be at least 1")
    columns = [ROW_ID, USER_ID, ITEM_ID, SCORE]
    ordered = [one.select(columns).sort(ROW_ID) for one in lists]
    rows = ordered[0][ROW_ID].unique().sort()
    for number, one in enumerate(ordered):
        other = one[ROW_ID].unique().sort()
        if not other.equals(rows):
            raise ValueError(
                f"model {number} has lists for other rows than model 0 ({len(other):,} and "
                f"{len(rows):,}); all must be of one split"
            )
    if not memory_weight:
        memory = None
    parts = []
    for start in range(0, len(rows), _ROWS):
        block = rows[start : start + _ROWS]
        some = []
        for one in ordered:
            first = one[ROW_ID].search_sorted(block[0], "left")
            some.append(one[first : one[ROW_ID].search_sorted(block[-1], "right")])
        remembered = None if memory is None else memory(block)
        parts.append(_mixed(some, block, k, remembered, memory_weight))
    return pl.concat(parts) if parts else _mixed(ordered, rows, k, None, 0.0)


def _mixed(
    lists: Sequence[pl.DataFrame],
    rows: pl.Series,
    k: int,
    memory: pl.DataFrame | None,
    memory_weight: float,
) -> pl.DataFrame:
    """`mixture` of a block of rows."""
    known = [(f"model {number}", one) for number, one in enumerate(lists)]
    for name, one in [*known, *([("the memory", memory)] if memory is not None else [])]:
        if (~(one[SCORE] <= _ROUNDING)).any():  # also where a score is no number
            raise ValueError(f"{name} has scores above 0: they are no log-probabilities")
        if one.select(ROW_ID, ITEM_ID).is_duplicated().any():
            raise ValueError(f"{name} lists an item twice in one list")
        if not one[ROW_ID].is_in(rows.implode()).all():
            raise ValueError(f"{name} has lists for other rows than model 0")
    share = pl.lit(1 / len(lists))
    parts = [(one, share) for one in lists]
    if memory is not None:
        remembered = pl.col(ROW_ID).is_in(memory[ROW_ID].unique().implode())
        share = pl.when(remembered).then(1 - memory_weight).otherwise(1.0) / len(lists)
        parts = [*((one, share) for one in lists), (memory, pl.lit(memory_weight))]
    chance = pl.col(SCORE).cast(pl.Float64).exp()
    every = pl.concat(
        [one.select(ROW_ID, USER_ID, ITEM_ID, (chance * part).alias(SCORE)) for one, part in parts]
    )
    return (
        every.group_by(ROW_ID, USER_ID, ITEM_ID)
        .agg(pl.col(SCORE).sum().log())
        .sort([ROW_ID, SCORE, ITEM_ID], descending=[False, True, False])
        .with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int32).over(ROW_ID).alias(RANK))
        .filter(pl.col(RANK) <= k)
        .select(ROW_ID, USER_ID, ITEM_ID, RANK, SCORE)
    )
