"""MIND, the Microsoft News Dataset (Wu et al. 2020): behaviors.tsv and news.tsv."""

from __future__ import annotations

import logging
from pathlib import Path

import polars as pl

from genrec.columns import CATEGORIES, DESCRIPTION, ITEM_ID, TIMESTAMP, TITLE, USER_ID
from genrec.data.readers.files import collect, existing, require_files, scan_text
from genrec.data.readers.raw_data import RawData, checked, interaction_table
from genrec.data.readers.times import log_span, refuse_times
from genrec.data.readers.values import native_ids, texts

logger = logging.getLogger(__name__)

_TIME = "%m/%d/%Y %I:%M:%S %p"  # 11/13/2019 8:36:57 AM
_BEHAVIORS, _NEWS = 5, 8  # fields a row


def mind_files(folder: Path | str) -> dict[str, Path]:
    """The files that are read, by role: behaviors and news."""
    folder = Path(folder)
    require_files(folder, ("behaviors.tsv", "news.tsv"), "an unpacked part of MIND")
    return {"behaviors": folder / "behaviors.tsv", "news": folder / "news.tsv"}


def read_mind(folder: Path | str, unknown_items: str = "raise") -> RawData:
    """Read one part of MIND (MINDsmall_train, MINDlarge_dev, ...): what users clicked on.

    A clicked impression is an interaction at the impression's time. The clicks of a user's history
    column came before the user's first impression, at times that nobody knows: they get that
    impression's time, and stand before its clicks in file order. The category path is [category,
    subcategory], the abstract is the description.

    What is lost: impressions that weren't clicked (the candidates beside a click), the order of
    several clicks of one impression, the true times of the history (a news item that occurs in it
    twice counts once after cleaning), entities and URLs.

    Args:
        folder: holds behaviors.tsv and news.tsv.
        unknown_items: "raise", or "drop" clicks on news that news.tsv lacks.

    Raises:
        ValueError: a missing file, another number of fields, a time that can't be read, or
            impressions without click marks (MIND's test part).
    """
    files = mind_files(folder)
    path = files["behaviors"]
    # impression id, user, time, history, impressions
    rows = _rows(path, _BEHAVIORS, (2, 3, 4, 5))
    moments = _seconds(rows["f3"], path)
    users = native_ids(rows["f2"].alias(USER_ID), path, "string")
    _check_marks(rows["f5"], path)
    table = pl.DataFrame([users, moments, rows["f4"], rows["f5"]])
    # The history is the same in all of a user's rows: it is that before the first.
    first = table.sort(TIMESTAMP, maintain_order=True).unique(
        USER_ID, keep="first", maintain_order=True
    )
    before = first.select(USER_ID, TIMESTAMP, pl.col("f4").str.extract_all(r"\S+").alias(ITEM_ID))
    clicked = pl.col("f5").str.extract_all(r"\S+-1(?:\s|$)")
    name = pl.element().str.strip_chars().str.strip_suffix("-1")
    clicks = table.select(USER_ID, TIMESTAMP, clicked.list.eval(name).alias(ITEM_ID))
    log = pl.concat([part.filter(pl.col(ITEM_ID).list.len() > 0) for part in (before, clicks)])
    if log.height == 0:
        raise ValueError(f"{path} has no clicks: no impression ends in -1 and no history is filled")
    log = log.explode(ITEM_ID)
    news = _rows(files["news"], _NEWS, (1, 2, 3, 4, 5))
    path_parts = pl.concat_list("f2", "f3").list.drop_nulls()
    catalog = news.select(
        native_ids(news["f1"].alias(ITEM_ID), files["news"], "string"),
        texts(news["f4"], TITLE),
        path_parts.alias(CATEGORIES),
        texts(news["f5"], DESCRIPTION),
    )
    log = interaction_table(log[USER_ID], log[ITEM_ID], [log[TIMESTAMP]])
    return checked(log, catalog, None, unknown_items, path, files["news"])


def _rows(path: Path, n_fields: int, chosen: tuple[int, ...]) -> pl.DataFrame:
    """Fields f1, f2, ... of a file without header; quotes in it are text."""
    scanned = scan_text(existing(path), "\t", header=False, quotes=False)
    names = scanned.collect_schema().names()
    if len(names) != n_fields:
        raise ValueError(
            f"{path} has {len(names)} fields a row, MIND has {n_fields}; use the published files"
        )
    table = collect(scanned, path, [names[i - 1] for i in chosen])
    return table.rename({names[i - 1]: f"f{i}" for i in chosen})


def _seconds(column: pl.Series, path: Path) -> pl.Series:
    parsed = column.alias("time").str.to_datetime(_TIME, time_unit="us", strict=False)
    fix = "MIND writes 11/13/2019 8:36:57 AM"
    refuse_times(column.alias("time"), parsed.is_null(), path, fix)
    seconds = (parsed.cast(pl.Int64) // 1_000_000).alias(TIMESTAMP)
    log_span(seconds, path, "time", "MIND's dates, taken as UTC")
    return seconds


def _check_marks(impressions: pl.Series, path: Path) -> None:
    good = impressions.str.contains(r"^\s*(?:\S+-[01]\s*)*$").fill_null(True)
    if not good.all():
        row = int((~good).arg_true()[0])
        raise ValueError(
            f"{path} row {row + 1}: impressions {impressions[row][:60]!r} lack click marks (-1, "
            "-0); MIND's test part has none, use the train or dev part"
        )
