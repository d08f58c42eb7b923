"""Times as people write them: numbers in four units, dates, ISO-8601 text."""

from __future__ import annotations

import logging
from pathlib import Path

import polars as pl

from genrec.columns import TIMESTAMP
from genrec.data.readers.raw_data import SUBSECOND

logger = logging.getLogger(__name__)

# Name, the magnitude that it stays below, and how many make a second.
_UNITS = (("s", 1e11, 1), ("ms", 1e14, 10**3), ("us", 1e17, 10**6), ("ns", float("inf"), 10**9))
_LIMIT = 9 * 10**18  # what 64 bits hold
_ISO = (
    r"^\s*(?P<date>\d{4}-\d{2}-\d{2})"
    r"(?:[T ](?P<hm>\d{2}:\d{2})(?::(?P<s>\d{2})(?:[.,](?P<f>\d+))?)?)?"
    r"\s*(?P<zone>Z|z|UTC|[+-]\d{2}:?\d{2})?\s*$"
)


def times(column: pl.Series, path: Path | str) -> list[pl.Series]:
    """Times as seconds since the epoch, and the microseconds beyond them if there are any.

    Args:
        column: dates, ISO-8601 text (UTC unless it says otherwise), or numbers in s, ms, us or ns,
            told apart by the largest (the choice is logged).
        path: the file, for messages.

    Returns:
        `timestamp` (Int64) and, where a time has a fraction, `subsecond` (Int64).

    Raises:
        ValueError: a time that can't be read, units that are mixed, dates written as YYYYMMDD.
    """
    if column.dtype in (pl.Date, pl.Datetime):
        micros = column.cast(pl.Datetime("us")).cast(pl.Int64)
        refuse_times(column, micros.is_null(), path)
        parts, how = _parts(micros, 10**6), "dates"
    elif column.dtype.is_numeric():
        parts, how = _numeric_times(column, column, path)
    elif column.dtype == pl.String:
        whole = column.str.strip_chars().cast(pl.Int64, strict=False)
        real = column.str.strip_chars().cast(pl.Float64, strict=False)
        if 2 * real.null_count() <= len(column):
            parts, how = _numeric_times(real if whole.null_count() else whole, column, path)
        else:
            micros, how = _iso_times(column), "ISO-8601 text, UTC where no zone is given"
            refuse_times(column, micros.is_null(), path)
            parts = _parts(micros, 10**6)
    else:
        raise ValueError(
            f"{path}: {column.name!r} holds {column.dtype}; use numbers, dates or ISO-8601 text"
        )
    log_span(parts[0], path, column.name, how)
    return parts


def milliseconds(column: pl.Series) -> list[pl.Series]:
    """Int64 milliseconds since the epoch as `times` gives them."""
    return _parts(column, 10**3)


def log_span(seconds: pl.Series, path: Path | str, name: str, how: str) -> None:
    """Log how times were read, and the first and the last."""
    span = pl.Series([seconds.min(), seconds.max()]).cast(pl.Int64) * 1_000_000
    first, last = span.cast(pl.Datetime("us")).to_list()
    logger.info("%s: %r read as %s: %s to %s", path, name, how, first, last)


def refuse_times(
    column: pl.Series, bad: pl.Series, path: Path | str, fix: str = "", first_row: int = 1
) -> None:
    """Raise, naming the first bad time and its row, if any is bad."""
    if bad.any():
        row = int(bad.arg_true()[0])
        fix = fix or "use ISO-8601 text like 2024-01-31T12:00:00Z or numbers in s, ms or us"
        raise ValueError(
            f"{path} row {row + first_row}: {column.name} {column[row]!r} is not a time "
            f"({int(bad.sum())} such rows); {fix}"
        )


def _parts(units: pl.Series, per_second: int) -> list[pl.Series]:
    """Whole seconds of integer times, and the microseconds beyond if there are any."""
    if per_second == 1:
        return [units.alias(TIMESTAMP)]
    rest = units % per_second
    micros = rest // (per_second // 10**6) if per_second > 10**6 else rest * (10**6 // per_second)
    seconds = (units // per_second).alias(TIMESTAMP)
    return [seconds, micros.alias(SUBSECOND)] if (micros != 0).any() else [seconds]


def _numeric_times(
    numbers: pl.Series, shown: pl.Series, path: Path | str
) -> tuple[list[pl.Series], str]:
    # No whole-column temporaries beyond the results: this runs on 100M rows.
    usable = numbers.is_between(-_LIMIT, _LIMIT)  # false for NaN and infinities, null for null
    refuse_times(shown, ~usable.fill_null(False), path)
    if numbers.dtype.is_integer():
        numbers = numbers.cast(pl.Int64)
    low, high = float(numbers.min()), float(numbers.max())  # type: ignore[arg-type]
    top = int((numbers.arg_max() if high >= -low else numbers.arg_min()) or 0)
    size = max(high, -low)
    # YYYYMMDD would pass for seconds in 1970.
    if low >= 19_000_101 and high <= 21_001_231:
        whole = numbers.cast(pl.Int64)
        month, day = whole // 100 % 100, whole % 100
        if (month.is_between(1, 12) & day.is_between(1, 31)).all():
            raise ValueError(
                f"{path}: {shown.name!r} looks like YYYYMMDD ({shown[0]!r}); write dates as "
                "YYYY-MM-DD"
            )
    # Likewise YYYYMMDDHHMM for seconds or milliseconds, and YYYYMMDDHHMMSS for milliseconds.
    for unit_of_day, form in ((10_000, "YYYYMMDDHHMM"), (1_000_000, "YYYYMMDDHHMMSS")):
        if low >= 19_000_101 * unit_of_day and high < 21_001_232 * unit_of_day:
            whole = numbers.cast(pl.Int64)
            day, month = whole // unit_of_day % 100, whole // unit_of_day // 100 % 100
            hour = whole // (unit_of_day // 100) % 100
            rest = whole % (unit_of_day // 100)
            fits = month.is_between(1, 12) & day.is_between(1, 31) & (hour < 24)
            fits &= (rest % 100 < 60) & (rest // 100 < 60)
            if fits.all():
                raise ValueError(
                    f"{path}: {shown.name!r} looks like {form} ({shown[0]!r}); write times as "
                    "YYYY-MM-DDTHH:MM:SS"
                )
    number = next(i for i, (_, limit, _) in enumerate(_UNITS) if size < limit)
    unit, _, per_second = _UNITS[number]
    # Far below the unit's range, but not 0: written in the unit before it.
    floor = _UNITS[number - 1][1] / 10 if number else 0.0
    strays = numbers.is_between(-floor, floor, closed="none") & (numbers != 0)
    if strays.any():
        row = int(strays.arg_true()[0])
        raise ValueError(
            f"{path}: {shown.name!r} mixes units: the largest is {shown[top]!r} ({unit}), row "
            f"{row + 1} holds {shown[row]!r}; write all of them in seconds"
        )
    if numbers.dtype.is_float() and per_second <= 10**6:
        micros = (numbers.cast(pl.Float64) * (10**6 // per_second)).round().cast(pl.Int64)
        return _parts(micros, 10**6), unit
    return _parts(numbers.cast(pl.Int64), per_second), unit


def _iso_times(column: pl.Series) -> pl.Series:
    """Microseconds since the epoch of ISO-8601 text; null where it can't be read."""
    part = pl.col("text").str.extract_groups(_ISO).struct
    zone = part.field("zone").str.replace(r"^(?:Z|z|UTC)$", "+00:00").fill_null("+00:00")
    text = pl.format(
        "{}T{}:{}.{}{}",
        part.field("date"),
        part.field("hm").fill_null("00:00"),
        part.field("s").fill_null("00"),
        part.field("f").fill_null("0").str.slice(0, 6).str.pad_end(6, "0"),
        zone.str.replace(r"^([+-]\d{2})(\d{2})$", "${1}:${2}"),
    )
    parsed = text.str.to_datetime(
        "%Y-%m-%dT%H:%M:%S%.f%:z", time_unit="us", time_zone="UTC", strict=False
    )
    frame = pl.DataFrame({"text": column})
    return frame.select(parsed.cast(pl.Int64)).to_series()
