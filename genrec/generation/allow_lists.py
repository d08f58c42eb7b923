"""Allow- and deny-lists: files of item ids -> the catalogue rows that may be recommended.

They fail closed: an unknown id or an empty list is an error, never a list that filters nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from genrec.artifacts import Manifest, sha256_file
from genrec.columns import ITEM_ID
from genrec.data.readers.files import ENDINGS, collect, require_columns, scan_file, text_of


def read_ids(path: Path | str, column: str = ITEM_ID, what: str = "item") -> pl.Series:
    """Ids of a list: a text file with one a line, or a table's column.

    Args:
        path: .parquet, .csv, .tsv, .jsonl or .ndjson with the column `column`; any other file is
            read as lines. Text files may be gzipped (.gz).
        column: of a table.
        what: the ids name, for messages.

    Raises:
        ValueError: no such file, one that isn't UTF-8, or it names nothing.
    """
    return read_table(path, column, what)[column]


def read_table(
    path: Path | str, column: str, what: str, optional: str | None = None
) -> pl.DataFrame:
    """`read_ids` with a second column beside the ids.

    Args:
        path: as of `read_ids`.
        column: of the ids.
        what: the ids name, for messages.
        optional: a column that the table may have; null where it has none.

    Returns:
        The columns `column` and, if one was asked for, `optional`.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; name a list of {what} ids")
    plain = path.name.lower().removesuffix(".gz")
    if path.is_dir() or plain.endswith(tuple(ENDINGS)):
        frame = scan_file(path)
        names = frame.collect_schema().names()
        require_columns(names, path, {f"{what} column": column})
        wanted = [column, *([optional] if optional in names else [])]
        table = collect(frame, path, wanted).drop_nulls(column)
    else:
        lines = text_of(path).splitlines()
        ids = [line.strip() for line in lines if line.strip()]
        table = pl.DataFrame({column: ids}, schema={column: pl.String})
    if table.is_empty():
        raise ValueError(f"{path} names no {what}; an empty list would say nothing")
    if optional is not None and optional not in table.columns:
        table = table.with_columns(pl.lit(None, dtype=pl.String).alias(optional))
    return table


def catalogue_rows(ids: pl.Series, catalog_ids: pl.Series, path: Path | str) -> np.ndarray:
    """Catalogue rows of item ids.

    Text is compared with the ids as they are written, so that lists in text files work for integer
    ids, too.

    Args:
        ids: the ids. ``# (n,)``
        catalog_ids: ids of the catalogue, row for row. ``# (n_items,)``
        path: the file they come from, for messages.

    Returns:
        Rows, distinct and ascending.

    Raises:
        ValueError: an id is not in the catalogue.
    """
    known = catalog_ids
    if ids.dtype == pl.String and known.dtype != pl.String:
        known = known.cast(pl.String)
    elif ids.dtype.is_integer() and known.dtype.is_integer():
        try:
            ids = ids.cast(known.dtype)
        except pl.exceptions.InvalidOperationError as error:
            raise ValueError(
                f"{path} ({ids.dtype}) holds an id beyond 63 bits, which no item of the catalogue "
                "has; remove it"
            ) from error
    example = f"ids look like {catalog_ids[0]!r}"
    if ids.dtype != known.dtype:
        raise ValueError(
            f"{path} holds ids of type {ids.dtype}, the catalogue {known.dtype} ({example})"
        )
    index = pl.DataFrame([known.alias(ITEM_ID)]).with_row_index("_row")
    found = pl.DataFrame([ids.alias(ITEM_ID)]).join(
        index, on=ITEM_ID, how="left", maintain_order="left"
    )
    unknown = found.filter(pl.col("_row").is_null())
    if len(unknown):
        raise ValueError(
            f"{path}: {len(unknown)} items are not in the catalogue, the first is "
            f"{unknown[ITEM_ID][0]!r} ({example}); remove them"
        )
    return np.unique(found["_row"].to_numpy().astype(np.int64))


def allowed_rows(
    catalog_ids: pl.Series, allow: Path | str | None, deny: Path | str | None
) -> np.ndarray | None:
    """Catalogue rows that an allow-list names and a deny-list doesn't; None without lists.

    Raises:
        ValueError: an unknown id, or nothing is left.
    """
    if allow is None and deny is None:
        return None
    rows = np.arange(len(catalog_ids))
    if allow is not None:
        rows = catalogue_rows(read_ids(allow), catalog_ids, allow)
    if deny is not None:
        rows = np.setdiff1d(rows, catalogue_rows(read_ids(deny), catalog_ids, deny))
    if not len(rows):
        raise ValueError(f"{deny} denies every item that may be recommended; no list could be made")
    return rows


def restricted_by(recommended: Manifest) -> dict[str, str]:
    """Hashes of the allow- and deny-list that a finished recommend stage followed.

    Args:
        recommended: its manifest.

    Returns:
        "allow" and "deny" -> SHA-256 of the file; empty where every item could be recommended.
    """
    return {
        name: recommended.inputs[name]
        for name in ("allow", "deny")
        if recommended.config.get(name) is not None
    }


def rows_allowed_then(recommended: Manifest, catalog_ids: pl.Series) -> np.ndarray | None:
    """`allowed_rows` as a finished recommend stage had them; None without lists.

    Args:
        recommended: its manifest.
        catalog_ids: ids of the catalogue, row for row. ``# (n_items,)``

    Raises:
        ValueError: a list is gone, or holds something else than the stage read.
    """
    paths: dict[str, str] = {}
    for name, sha256 in restricted_by(recommended).items():
        paths[name] = path = str(recommended.config[name])
        if not Path(path).is_file():
            raise ValueError(f"--{name} {path} is no file any more")
        if sha256_file(path) != sha256:
            raise ValueError(f"--{name} {path} was changed since")
    return allowed_rows(catalog_ids, paths.get("allow"), paths.get("deny"))
