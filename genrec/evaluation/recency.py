"""Recent popularity: what other users took up in the days before a row's target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.columns import (
    HISTORY,
    ITEM_INDEX,
    POSITION,
    SUPERVISE_FROM,
    TARGET,
    TARGET_TIME,
    TIMESTAMP,
    USER_ID,
)
from genrec.evaluation.baselines import UnfitData, fill_from_order, popularity_order
from genrec.evaluation.lists import relevant_items
from genrec.evaluation.profiles import places
from genrec.evaluation.tuning import mean_ndcg
from genrec.item_lists import ItemLists
from genrec.metrics import EMPTY

IntArray = npt.NDArray[np.int64]

DAY = 86_400
WINDOWS_DAYS = [1, 3, 7, 30, 90, 365]
_STEPS = 2000  # moments at which the order is taken anew


@dataclass(frozen=True)
class WindowSettings:
    """The one setting of recent popularity.

    Attributes:
        window_days: how far back counts go.
    """

    window_days: float


def training_events(rows: pl.DataFrame, interactions: pl.DataFrame) -> tuple[IntArray, IntArray]:
    """Time and item of every training interaction, in the order of time.

    Args:
        rows: training split rows; they say which interactions are training.
        interactions: the cleaned log, which knows their times.

    Returns:
        Seconds and item indices. ``# (n_events,)`` each

    Raises:
        ValueError: the data have no timestamps.
    """
    if rows[TARGET_TIME].null_count() or rows.is_empty():
        raise UnfitData("recent popularity needs timestamps, and the data have none")
    supervised = pl.concat_list(HISTORY, TARGET).list.slice(pl.col(SUPERVISE_FROM))
    taken = rows.select(USER_ID, supervised.cast(pl.List(pl.Int32)).alias(ITEM_INDEX))
    taken = taken.explode(ITEM_INDEX).group_by(USER_ID, ITEM_INDEX).agg(pl.len().alias("taken"))
    # Training is the head of each user's log: of an item that stands there n times, the first n.
    log = interactions.select(USER_ID, pl.col(ITEM_INDEX).cast(pl.Int32), TIMESTAMP, POSITION)
    log = log.sort(USER_ID, POSITION).with_columns(
        pl.int_range(pl.len()).over(USER_ID, ITEM_INDEX).alias("meeting")
    )
    events = (
        log.join(taken, on=[USER_ID, ITEM_INDEX])
        .filter(pl.col("meeting") < pl.col("taken"))
        .sort(TIMESTAMP, USER_ID, POSITION)
    )
    return events[TIMESTAMP].to_numpy(), events[ITEM_INDEX].to_numpy().astype(np.int64)


def recent_popularity(
    events: tuple[IntArray, IntArray],
    n_items: int,
    time: IntArray,
    seen: ItemLists,
    k: int,
    window_days: float,
    seed: int = 0,
) -> IntArray:
    """The `k` items taken up most often in the `window_days` before each row's moment.

    Rows are served at up to 2,000 moments, each at or before its own time, so nothing later than a
    row counts. Before the first event everything is equally popular (in a seeded order).

    Args:
        events: result of `training_events`.
        n_items: size of the catalogue.
        time: moment of each row in seconds (its target's time). ``# (n_rows,)``
        seen: items to leave out, per row.
        k: list length.
        window_days: how far back counts go.
        seed: seed of the order of ties.

    Returns:
        Item indices, padded with `EMPTY`. ``# (n_rows, k)``
    """
    seconds, items = events
    latest = int(seconds[-1]) if len(seconds) else 0
    lists = np.full((len(time), k), EMPTY, dtype=np.int64)
    order = np.argsort(time, kind="stable")
    # Ties go to what was more popular ever, then to a seeded order: items are counted by their
    # place in it, so that the lower index wins.
    seeded = popularity_order(np.zeros(n_items, dtype=np.int64), seed)
    place = places(seeded)[items]
    count, ever = np.zeros((2, n_items), dtype=np.int64)
    first = last = 0  # `count` is of the events [first, last), `ever` of those before `last`
    for part in np.array_split(order, min(_STEPS, max(1, len(order)))):
        if not len(part):
            continue
        moment = time[part].min()
        # A split by time ends training before these rows: then the newest known window counts.
        end = min(moment, latest + 1)
        # Strictly before: an event of the same second may be the row's own.
        begin, stop = np.searchsorted(seconds, [end - window_days * DAY, end])
        np.add.at(ever, place[last:stop], 1)
        np.add.at(count, place[last:stop], 1)
        np.subtract.at(count, place[first:begin], 1)
        first, last = begin, stop
        banned = seen.take(part)
        needed = 2 * k + int(banned.lengths.max())  # what `fill_from_order` looks at
        by_count = seeded[_highest(count * (last + 1) + ever, needed)]
        lists[part] = fill_from_order(lists[part], by_count, banned)
    return lists


def _highest(scores: IntArray, n: int) -> IntArray:
    """Indices of the `n` highest scores, descending; the lower index wins a tie."""
    if n < len(scores):
        least = np.partition(scores, len(scores) - n)[len(scores) - n]
        above, tied = np.flatnonzero(scores > least), np.flatnonzero(scores == least)
        found = np.concatenate([above, tied[: n - len(above)]])
    else:
        found = np.arange(len(scores))
    return found[np.argsort(-scores[found], kind="stable")]


def tune_window(
    events: tuple[IntArray, IntArray],
    n_items: int,
    valid: pl.DataFrame,
    seen: ItemLists,
    k: int = 10,
    seed: int = 0,
) -> tuple[WindowSettings, list[dict[str, Any]]]:
    """The window with the best NDCG@k on validation rows, and every trial.

    Raises:
        ValueError: there are no validation rows.
    """
    if valid.is_empty():
        raise UnfitData("recent popularity is tuned on validation rows, and there are none")
    time = valid[TARGET_TIME].to_numpy()
    relevant = relevant_items(valid)
    trials: list[dict[str, Any]] = []
    for days in WINDOWS_DAYS:
        lists = recent_popularity(events, n_items, time, seen, k, days, seed)
        trials.append({"settings": {"window_days": days}, "ndcg": mean_ndcg(lists, relevant, k)})
    best = max(trials, key=lambda trial: trial["ndcg"])
    return WindowSettings(float(best["settings"]["window_days"])), trials
