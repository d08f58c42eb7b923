"""Daily refresh: which training rows hold something that an earlier model has not learned.

A refresh trains an earlier model on. An epoch then has the rows that hold something new, supervised
from the first new item on, and a seeded sample of what is old (replay), so that the model doesn't
forget it. The old items of a row with something new are context there: were they supervised, too,
then a user with twenty old interactions and a new one would be almost all repetition, and how much
is repeated would follow from who was active, not from `replay_share`. They are in the pool of what
is replayed instead, as a row of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.columns import (
    DESCRIPTION,
    HISTORY,
    HISTORY_ITEMS,
    ITEM_ID,
    ITEM_INDEX,
    POSITION,
    ROW_ID,
    SUPERVISE_FROM,
    TARGET,
    TARGET_POSITION,
    TARGETS,
    TASK,
    TIMESTAMP,
    TITLE,
    USER_ID,
)
from genrec.tasks.families import FAMILIES, ITEM
from genrec.tasks.instruction_rows import InstructionRows
from genrec.tasks.mixing import OTHERS, Plan, Weights, check_weights, plan, times_drawn

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]

MOST_KNOWN = 0.1  # share of the held-out interactions that an earlier model may know

_PLACE, _NTH = "_place", "_nth"


@dataclass(frozen=True)
class Novelty:
    """What a run's training part has that an earlier one had not.

    Attributes:
        places: row_id (of the split row), `_place` (in history + target) and `is_new`, for each
            interaction that the split's training rows supervise.
        new_items: whether the item is new, or has another title or description. ``# (n_items,)``
        new_interactions: how many are new.
        gone_interactions: of the earlier training part, those that these data lack altogether.
        known_held_out: interactions that this run holds out, and the earlier one trained on.
        held_out: interactions that this run holds out (or drops) in all.
    """

    places: pl.DataFrame
    new_items: npt.NDArray[np.bool_]
    new_interactions: int
    gone_interactions: int
    known_held_out: int
    held_out: int

    def counts(self) -> dict[str, int]:
        """In numbers; whoever reads the log hears of what can't be mended by training on."""
        if self.gone_interactions:
            logger.warning(
                "%d interactions that the earlier model was trained on are not in these data; it "
                "still knows them: train anew if they were erased",
                self.gone_interactions,
            )
        if self.known_held_out:
            logger.warning(
                "%d of the %d held-out interactions were trained on by the earlier model: figures "
                "are a little too high",
                self.known_held_out,
                self.held_out,
            )
        return {
            "new_interactions": self.new_interactions,
            "new_items": int(self.new_items.sum()),
            "gone_interactions": self.gone_interactions,
            "known_held_out": self.known_held_out,
            "held_out": self.held_out,
        }


def supervised(train: pl.LazyFrame) -> pl.LazyFrame:
    """The interactions that split rows supervise: row_id, `_place`, user, position, item_index."""
    length = pl.col(HISTORY).list.len().cast(pl.Int64)
    start = pl.col(SUPERVISE_FROM).cast(pl.Int64)
    first = pl.col(TARGET_POSITION).cast(pl.Int64) - length
    return (
        train.select(
            ROW_ID,
            USER_ID,
            pl.concat_list(HISTORY, TARGET).list.slice(start).alias(ITEM_INDEX),
            pl.int_ranges(start, length + 1).alias(_PLACE),
            first.alias("_first"),
        )
        .explode(ITEM_INDEX, _PLACE)
        .with_columns((pl.col("_first") + pl.col(_PLACE)).cast(pl.Int32).alias(POSITION))
        .drop("_first")
    )


def compare(data: Path, earlier: Path) -> Novelty:
    """Compare the training parts of two prepared datasets.

    An interaction is known by its user, item and time (where both logs have times), the n-th of
    the same ones by its number; so it stays the same when others before it are dropped or come in,
    which moves all positions.

    Args:
        data: prepare's folder of this run.
        earlier: that of the run whose model is trained on.

    Raises:
        ValueError: user or item ids of another type, or more than `MOST_KNOWN` of what this run
            holds out was trained on by the earlier one: nothing that it measures would be true.
    """
    now, before = (_log(folder) for folder in (data, earlier))
    for name in (USER_ID, ITEM_ID):
        if now.schema[name] != before.schema[name]:
            raise ValueError(
                f"{name} is {now.schema[name]} in {data} and {before.schema[name]} in {earlier}; "
                "prepare both alike"
            )
    timed = all(log[TIMESTAMP].null_count() == 0 for log in (now, before))
    key = [USER_ID, ITEM_ID, *([TIMESTAMP] if timed else [])]
    nth = pl.int_range(pl.len()).over(key).alias(_NTH)
    trained = before.filter(pl.col(ROW_ID).is_not_null()).with_columns(nth).select(*key, _NTH)
    now = now.with_columns(nth)
    known = now.join(
        trained.with_columns(pl.lit(True).alias("_known")), [*key, _NTH], "left",
        maintain_order="left",
    )["_known"].fill_null(False)  # fmt: skip
    in_train = now[ROW_ID].is_not_null()
    held_out, known_held_out = int((~in_train).sum()), int((known & ~in_train).sum())
    if known_held_out > MOST_KNOWN * held_out:
        raise ValueError(
            f"{known_held_out:,} of the {held_out:,} interactions that {data} holds out were "
            f"trained on in {earlier}: nothing measured on them would be true; prepare this run "
            "with later boundaries, or train anew"
        )
    places = now.filter(in_train).select(ROW_ID, _PLACE, (~known.filter(in_train)).alias("is_new"))
    return Novelty(
        places=places,
        new_items=_new_items(data, earlier),
        new_interactions=int(places["is_new"].sum()),
        gone_interactions=trained.height - int(known.sum()),
        known_held_out=known_held_out,
        held_out=held_out,
    )


def _log(data: Path) -> pl.DataFrame:
    """The whole log, with row_id and `_place` where a training row supervises the interaction."""
    items = pl.scan_parquet(data / "catalog.parquet", glob=False).select(
        pl.col(ITEM_INDEX).cast(pl.Int32), ITEM_ID
    )
    train = supervised(pl.scan_parquet(data / "train.parquet", glob=False)).drop(ITEM_INDEX)
    log = pl.scan_parquet(data / "interactions.parquet", glob=False)
    return (
        log.select(
            USER_ID, pl.col(ITEM_INDEX).cast(pl.Int32), TIMESTAMP, pl.col(POSITION).cast(pl.Int32)
        )
        .join(train, [USER_ID, POSITION], "left", maintain_order="left")
        .join(items, ITEM_INDEX, "left", maintain_order="left")
        .drop(ITEM_INDEX)
        .collect()
    )


def _new_items(data: Path, earlier: Path) -> npt.NDArray[np.bool_]:
    now, before = (pl.read_parquet(f / "catalog.parquet", glob=False) for f in (data, earlier))
    texts = [name for name in (TITLE, DESCRIPTION) if name in now.columns]
    if any(name not in before.columns for name in texts):
        return np.ones(now.height, dtype=bool)  # none of them was told of with such a text
    key = [ITEM_ID, *texts]
    told = before.select(*key, pl.lit(True).alias("_told"))
    found = now.select(key).join(told, key, "left", nulls_equal=True, maintain_order="left")
    return found["_told"].is_null().to_numpy()


@dataclass(frozen=True)
class RefreshRows:
    """Instruction rows apart: what is new, and what can be replayed.

    Attributes:
        rows: the new rows, then the old ones; a row with both gives one of each.
        origin: row of the file that each comes from. ``# (len(rows),)``
        n_new: how many are new.
    """

    rows: InstructionRows
    origin: IntArray
    n_new: int


def apart(rows: InstructionRows, novelty: Novelty) -> RefreshRows:
    """Part instruction rows into new and old ones.

    Args:
        rows: of ``train.parquet`` of build_dataset, made of the split rows that were compared.
        novelty: see `compare`.

    Raises:
        ValueError: a row was made of a split row that isn't there, or nothing is new.
    """
    first = _first_new(rows.table, novelty)
    new, old = np.flatnonzero(first >= 0), np.flatnonzero(first != 0)
    if not len(new):
        raise ValueError(
            "no training row holds anything that the earlier model has not learned; there is "
            "nothing to train"
        )
    table = rows.table.with_columns(pl.Series("_first", first))
    items, start = pl.concat_list(HISTORY_ITEMS, TARGETS), pl.col(HISTORY_ITEMS).list.len()
    mixed = pl.col("_first") > 0
    fresh = table[new].with_columns(
        pl.when(mixed)
        .then(items.list.head(start + pl.col("_first").clip(0)))
        .otherwise(HISTORY_ITEMS)
        .alias(HISTORY_ITEMS),
        pl.when(mixed).then(pl.col(TARGETS).list.slice("_first")).otherwise(TARGETS).alias(TARGETS),
    )
    replayed = table[old].with_columns(
        pl.when(mixed)
        .then(pl.col(TARGETS).list.head(pl.col("_first").clip(0)))
        .otherwise(TARGETS)
        .alias(TARGETS)
    )
    both = pl.concat([fresh, replayed]).drop("_first")
    return RefreshRows(replace(rows, table=both), np.concatenate([new, old]), len(new))


def _first_new(table: pl.DataFrame, novelty: Novelty) -> IntArray:
    """First new target of each row; −1 where all is old."""
    of_items = {name for name, family in FAMILIES.items() if family.unit == ITEM}
    split_row = pl.col(ROW_ID).str.strip_prefix(pl.col(TASK) + ":").str.splitn("#", 2)
    frame = table.select(
        split_row.struct.field("field_0").alias(ROW_ID),
        split_row.struct.field("field_1").cast(pl.Int64, strict=False).alias("_single"),
        pl.col(TASK).is_in(sorted(of_items)).alias("_of_item"),
        pl.col(HISTORY_ITEMS).list.len().cast(pl.Int64).alias("_start"),
        pl.col(TARGETS).list.len().cast(pl.Int64).alias("_n"),
        pl.col(TARGETS).list.first().alias("_item"),
    ).with_row_index("_row")
    first = np.full(len(table), -1, dtype=np.int64)
    item = frame.filter("_of_item")
    is_new = novelty.new_items[item["_item"].to_numpy()]
    first[item["_row"].to_numpy()[is_new]] = 0
    begin = pl.coalesce("_single", "_start")
    end = pl.when(pl.col("_single").is_null()).then(begin + pl.col("_n")).otherwise(begin + 1)
    places = (
        frame.filter(~pl.col("_of_item"))
        .with_columns(pl.int_ranges(begin, end).alias(_PLACE), begin.alias("_begin"))
        .select("_row", ROW_ID, "_begin", _PLACE)
        .explode(_PLACE)
        .join(novelty.places, [ROW_ID, _PLACE], "left")
    )
    if places["is_new"].null_count():
        odd = places.filter(pl.col("is_new").is_null())[ROW_ID][0]
        raise ValueError(
            f"the row {odd!r} was made of a split row that isn't there; rerun build_dataset"
        )
    found = places.filter("is_new").group_by("_row").agg((pl.col(_PLACE) - pl.col("_begin")).min())
    first[found["_row"].to_numpy()] = found[_PLACE].to_numpy()
    return first


def refresh_plan(
    tasks: pl.Series,
    n_new: int,
    n_epochs: int,
    replay_share: float,
    weights: Weights | None = None,
    caps: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Plan:
    """Draw the rows of all epochs: the new ones as `plan` does, and replay on top of them.

    Args:
        tasks: family of each row, new ones first. ``# (n_rows,)``
        n_new: rows that are new.
        n_epochs: epochs, at least 1.
        replay_share: share of an epoch that old rows make, in [0, 1), to the nearest row. They are
            drawn among the families as an epoch over all old rows with these weights would have
            them, and none comes back before all of its family were seen.
        weights: see `plan`.
        caps: see `plan`; they count new rows alone.
        seed: of the draws.

    Raises:
        ValueError: as `plan`; or rows are to be replayed and none can be.
    """
    if not 0 <= replay_share < 1:
        raise ValueError(f"replay_share={replay_share} must lie in [0, 1)")
    weights, caps = dict(weights or {}), dict(caps or {})
    check_weights({**dict.fromkeys(caps, [1.0]), **weights}, tasks.unique().to_list())
    fresh = tasks.head(n_new)
    there = {*fresh.unique().to_list(), OTHERS}  # a day may bring nothing new of a family
    new = plan(
        fresh, n_epochs, {n: w for n, w in weights.items() if n in there},
        {n: c for n, c in caps.items() if n in there}, seed,
    )  # fmt: skip
    wanted = round(new.length * replay_share / (1 - replay_share))
    if not wanted:
        return new
    old = tasks.slice(n_new)
    pools = {
        name: n_new + (old == name).arg_true().to_numpy().astype(np.int64)
        for name in old.unique(maintain_order=True)
    }
    parts = []
    drawn: dict[str, int] = dict.fromkeys(pools, 0)
    for epoch in range(n_epochs):
        mass = np.array([_weight(weights, name, epoch) * len(pools[name]) for name in pools])
        if not mass.sum():
            raise ValueError(
                f"replay_share={replay_share}, and there is no old row that the weights leave to "
                "replay; set it to 0"
            )
        replayed = []
        for (i, name), count in zip(enumerate(pools), _shared_out(wanted, mass), strict=True):
            replayed.append(_draw(pools[name], drawn[name], count, [seed, 1, i]))
            drawn[name] += count
        rows = np.concatenate([new.slice(epoch)[0], *replayed])
        parts.append(np.random.default_rng([seed, 2, epoch]).permutation(rows))
    rows = np.concatenate(parts)
    return Plan(rows, times_drawn(rows), n_epochs)


def _weight(weights: Weights, name: str, epoch: int) -> float:
    row: Sequence[float] = weights.get(name, weights.get(OTHERS, [1.0]))
    return row[min(epoch, len(row) - 1)]


def _shared_out(total: int, mass: npt.NDArray[np.float64]) -> list[int]:
    """Whole numbers in proportion to `mass` that sum to `total`: largest remainders."""
    exact = total * mass / mass.sum()
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return [int(count) for count in counts]


def _draw(pool: IntArray, used: int, count: int, seed: list[int]) -> IntArray:
    """The next `count` rows of a pool that is gone through in random orders, one after another."""
    if not count:
        return pool[:0]
    rounds = range(used // len(pool), (used + count - 1) // len(pool) + 1)
    orders = [np.random.default_rng([*seed, r]).permutation(pool) for r in rounds]
    begin = used - rounds[0] * len(pool)
    return np.concatenate(orders)[begin : begin + count]


def replay_counts(mixture: Plan, n_new: int) -> dict[str, int]:
    """Rows of the first epoch that are new, and that are replayed."""
    fresh = int((mixture.slice(0)[0] < n_new).sum())
    return {"new_rows": fresh, "replayed_rows": mixture.length - fresh}
