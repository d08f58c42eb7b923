"""MovieLens in every layout that GroupLens has published."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from genrec.columns import CATEGORIES, ITEM_ID, RATING, TIMESTAMP, TITLE, USER_ID
from genrec.data.readers.files import (
    blocks,
    collect,
    existing,
    first_existing,
    is_plain_text,
    reading,
    require_columns,
    require_files,
    text_source,
)
from genrec.data.readers.raw_data import RawData, checked

# The marks of ml-100k's u.item, in its order.
_GENRES = (
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|"
    "Film-Noir|Horror|Musical|Mystery|Romance|Sci-Fi|Thriller|War|Western"
).split("|")
# The codes of ml-1m's users.dat, as its README names them.
_AGES = {
    1: "Under 18", 18: "18-24", 25: "25-34", 35: "35-44", 45: "45-49", 50: "50-55", 56: "56+",
}  # fmt: skip
_OCCUPATIONS = (
    "other or not specified|academic/educator|artist|clerical/admin|college/grad student|"
    "customer service|doctor/health care|executive/managerial|farmer|homemaker|K-12 student|"
    "lawyer|programmer|retired|sales/marketing|scientist|self-employed|technician/engineer|"
    "tradesman/craftsman|unemployed|writer"
).split("|")
_NO_GENRES = "(no genres listed)"
_RATINGS = ("u.data", "ratings.dat", "ratings.csv")


def movielens_files(folder: Path | str) -> dict[str, Path]:
    """The files of a MovieLens folder that are read, by role: ratings, items and maybe users.

    Raises:
        ValueError: the folder holds no release, or lacks a file of the one it holds.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of a MovieLens release")
    ratings = first_existing(folder, _RATINGS)
    if ratings is None:
        raise ValueError(
            f"{folder} has none of {', '.join(_RATINGS)}; give the folder of an unpacked "
            "MovieLens release (100K, 1M, 10M, 20M, 25M, 32M or latest)"
        )
    if ratings.name == "u.data":
        names = {"ratings": "u.data", "items": "u.item", "users": "u.user"}
    else:
        names = {"ratings": ratings.name, "items": f"movies{ratings.suffix}"}
        if (folder / "users.dat").is_file() and ratings.suffix == ".dat":
            names["users"] = "users.dat"
    require_files(folder, names.values(), f"the MovieLens release with {ratings.name}")
    return {role: folder / name for role, name in names.items()}


def read_movielens(folder: Path | str, unknown_items: str = "raise") -> RawData:
    """Read a MovieLens release, recognised by its files.

    100K (u.data, u.item, u.user; also UTF-8 copies with header lines), 1M and 10M (.dat files with
    "::"), 20M, 25M, 32M and latest (.csv files). The genres are the categories, without "unknown"
    and "(no genres listed)"; they are a set, not a path. Users have age, gender and occupation
    where the release has them; 1M's codes are written out as in its README, so that its age is a
    band ("25-34"). Zip codes, tags and links are left out.

    Args:
        folder: of the unpacked release.
        unknown_items: "raise", or "drop" ratings of films that the catalogue lacks.

    Raises:
        ValueError: a file is missing, its rows have another number of fields, or a field can't be
            read.
    """
    files = movielens_files(folder)
    suffix = files["ratings"].suffix
    users: pl.DataFrame | None = None
    if suffix == ".data":
        log, catalog, users = _read_100k(files)
    elif suffix == ".dat":
        log, catalog, users = _read_dat(files)
    else:
        log, catalog = _read_csv(files)
    return checked(log, catalog, users, unknown_items, files["ratings"], files["items"])


def _read_100k(files: Mapping[str, Path]) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    release = "the ml-100k release"
    data = _rows(files["ratings"], "\t", 4, release)
    items = _rows(files["items"], "|", 5 + len(_GENRES), release)
    people = _rows(files["users"], "|", 5, release)
    with reading(files["ratings"]):
        log = data.select(
            pl.col("f0").cast(pl.Int64).alias(USER_ID),
            pl.col("f1").cast(pl.Int64).alias(ITEM_ID),
            pl.col("f3").cast(pl.Int64).alias(TIMESTAMP),
            pl.col("f2").cast(pl.Float64).alias(RATING),
        )
    genres = [
        pl.when(pl.col(f"f{5 + i}") == "1").then(pl.lit(name))
        for i, name in enumerate(_GENRES)
        if i > 0
    ]
    with reading(files["items"]):
        catalog = items.select(
            pl.col("f0").cast(pl.Int64).alias(ITEM_ID),
            pl.col("f1").str.strip_chars().alias(TITLE),
            pl.concat_list(genres).list.drop_nulls().alias(CATEGORIES),
        )
    with reading(files["users"]):
        users = people.select(
            pl.col("f0").cast(pl.Int64).alias(USER_ID),
            pl.col("f1").cast(pl.Int64).alias("age"),
            pl.col("f2").alias("gender"),
            pl.col("f3").alias("occupation"),
        )
    return log, catalog, users


def _read_dat(files: Mapping[str, Path]) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame | None]:
    # "::" taken as two separators leaves an empty column between the fields; ratings hold no ":".
    names = [USER_ID, "_1", ITEM_ID, "_2", RATING, "_3", TIMESTAMP]
    kinds = [pl.Int64, pl.String, pl.Int64, pl.String, pl.Float64, pl.String, pl.Int64]
    path = existing(files["ratings"])
    with reading(path):
        table = pl.scan_csv(
            path,
            separator=":",
            has_header=False,
            quote_char=None,
            schema=dict(zip(names, kinds, strict=True)),
            glob=False,
        )
        log = collect(table, path)
    odd = log.select(
        pl.any_horizontal(pl.col("_1", "_2", "_3").is_not_null(), pl.col(TIMESTAMP).is_null())
    ).to_series()
    if odd.any():
        raise ValueError(
            f"{path} row {int(odd.arg_true()[0]) + 1}: expected user::item::rating::timestamp; "
            "use the files of the ml-1m or ml-10m release"
        )
    release = "the ml-1m or ml-10m release"
    items = _rows(files["items"], "::", 3, release)
    with reading(files["items"]):
        catalog = _films(items["f0"].cast(pl.Int64), items["f1"], items["f2"])
    users = None
    if "users" in files:
        people = _rows(files["users"], "::", 5, release)
        users = people.select(
            pl.col("f0").cast(pl.Int64).alias(USER_ID),
            _named("f2", {str(code): name for code, name in _AGES.items()}, "age"),
            pl.col("f1").alias("gender"),
            _named("f3", {str(i): name for i, name in enumerate(_OCCUPATIONS)}, "occupation"),
        )
    return log.select(USER_ID, ITEM_ID, TIMESTAMP, RATING), catalog, users


def _named(column: str, names: Mapping[str, str], result: str) -> pl.Expr:
    """Codes written out; a code that the README doesn't know is null."""
    return pl.col(column).replace_strict(names, default=None, return_dtype=pl.String).alias(result)


def _read_csv(files: Mapping[str, Path]) -> tuple[pl.DataFrame, pl.DataFrame]:
    kinds = {"userId": pl.Int64, "movieId": pl.Int64, "rating": pl.Float64, "timestamp": pl.Int64}
    ratings, movies = existing(files["ratings"]), existing(files["items"])
    assert is_plain_text(ratings) and is_plain_text(movies)
    with reading(ratings):
        scanned = pl.scan_csv(ratings, schema_overrides=kinds, glob=False)
        names = scanned.collect_schema().names()
    require_columns(names, ratings, {name: name for name in kinds})
    log = collect(scanned, ratings, list(kinds)).rename(
        {"userId": USER_ID, "movieId": ITEM_ID, "rating": RATING, "timestamp": TIMESTAMP}
    )
    if log.select(pl.any_horizontal(pl.all().is_null()).any()).item():
        raise ValueError(f"{ratings} has empty fields; copy it again from the release")
    wanted = ["movieId", "title", "genres"]
    with reading(movies):
        films = pl.scan_csv(
            text_source(movies, "utf-8"),
            schema_overrides={"movieId": pl.Int64, "title": pl.String, "genres": pl.String},
            glob=False,
        )
        names = films.collect_schema().names()
    require_columns(names, movies, {name: name for name in wanted})
    table = collect(films, movies, wanted)
    catalog = _films(table["movieId"], table["title"], table["genres"])
    return log.select(USER_ID, ITEM_ID, TIMESTAMP, RATING), catalog


def _films(ids: pl.Series, titles: pl.Series, genres: pl.Series) -> pl.DataFrame:
    names = pl.element().filter((pl.element() != _NO_GENRES) & (pl.element() != ""))
    return pl.DataFrame(
        [ids.alias(ITEM_ID), titles.str.strip_chars().alias(TITLE), genres.alias(CATEGORIES)]
    ).with_columns(pl.col(CATEGORIES).str.split("|").list.eval(names))


def _rows(path: Path, separator: str, n_fields: int, release: str) -> pl.DataFrame:
    """Rows of one small file as text columns f0, f1, ...; a header line is left out."""
    data = b"".join(blocks(existing(path)))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # GroupLens' own files
    header = not text.split(separator, 1)[0].strip().isdigit()
    if len(separator) > 1:
        text, separator = text.replace(separator, "\x1f"), "\x1f"
    with reading(path):
        table = pl.read_csv(
            io.BytesIO(text.encode()),
            separator=separator,
            has_header=False,
            skip_rows=int(header),
            quote_char=None,
            infer_schema=False,
            glob=False,
        )
    if table.width != n_fields:
        raise ValueError(
            f"{path} has {table.width} fields a row, it should have {n_fields}; use the files of "
            f"{release}"
        )
    return table.rename({name: f"f{i}" for i, name in enumerate(table.columns)})
