"""Item vectors that the user brings, aligned with the catalogue, and those of a finished run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from genrec.artifacts import read_json, require, stage_folder
from genrec.columns import ITEM_ID

logger = logging.getLogger(__name__)

VECTORS = "item_embeddings.npy"
TEXT_VECTORS = "text_embeddings.npy"  # beside fused ones: the text part alone
COLLABORATIVE_VECTORS = "collaborative_embeddings.npy"  # wherever behaviour has a part
_NAMED = 3  # ids that a message shows
_ROWS_AT_ONCE = 65_536


def load_vectors(
    path: Path | str, item_ids: pl.Series, ids_path: Path | str | None = None
) -> npt.NDArray[np.float32]:
    """Read vectors and bring them into the order of the catalogue.

    Args:
        path: ``.npy`` or ``.safetensors`` of shape (rows, dim), or ``.parquet`` with `item_id` and
            one list column. Any float or integer type, bfloat16 included.
        item_ids: item ids of the catalogue, in its order.
        ids_path: item id of each row of `path`: ``.npy``, ``.txt`` (one a line), ``.json`` (a list)
            or ``.parquet`` (column `item_id`, or the only one). Without it (and without ids in
            `path`) row i is taken for catalogue row i, with a warning.

    Returns:
        (n_items, dim) float32, row i = catalogue row i.

    Raises:
        ValueError: no readable matrix, ids that are missing, repeated or of another number than the
            rows, a row count other than the catalogue's where there are no ids, NaN or inf.
    """
    vectors, rows = _aligned(Path(path), item_ids, ids_path)
    found = np.empty((len(item_ids), vectors.shape[1]), dtype=np.float32)
    for block, part in _float32(vectors, rows, len(item_ids)):
        found[block] = part
    check_vectors(found, str(path))
    return found


def copy_vectors(
    path: Path | str, item_ids: pl.Series, copy: Path, ids_path: Path | str | None = None
) -> npt.NDArray[np.float32]:
    """`load_vectors` into a file of its own, block by block: more vectors than fit in memory.

    Args:
        path: as in `load_vectors`.
        item_ids: as in `load_vectors`.
        copy: ``.npy`` that is written; it appears when it is whole.
        ids_path: as in `load_vectors`.

    Returns:
        Memory map of `copy`, (n_items, dim) float32.

    Raises:
        ValueError: as in `load_vectors`.
    """
    vectors, rows = _aligned(Path(path), item_ids, ids_path)
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)),
        "fortran_order": False,
        "shape": (len(item_ids), vectors.shape[1]),
    }
    partial, bad, first = copy.with_suffix(".partial"), 0, None
    with partial.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block, part in _float32(vectors, rows, len(item_ids)):
            broken = ~np.isfinite(part).all(axis=1)
            if first is None and broken.any():
                first = block.start + int(broken.argmax())
            bad += int(broken.sum())
            part.tofile(file)
    if first is not None:
        partial.unlink()
        raise ValueError(_not_finite(str(path), bad, first))
    partial.replace(copy)
    return np.load(copy, mmap_mode="r")


def _aligned(
    path: Path, item_ids: pl.Series, ids_path: Path | str | None
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.integer] | None]:
    """The matrix of a file, and the row of each item; None: row i is item i."""
    vectors, ids = _read(path)
    if vectors.ndim != 2 or vectors.dtype.kind not in "fiu" or vectors.shape[1] == 0:
        raise ValueError(
            f"{path} has shape {vectors.shape} and dtype {vectors.dtype}; a float (items, dim) is "
            "needed"
        )
    if ids_path is not None:
        if ids is not None:
            raise ValueError(f"{path} brings its own ids; leave out the ids file {ids_path}")
        ids = read_ids(ids_path)
    if ids is not None:
        return vectors, _rows(path, len(vectors), ids, item_ids)
    if len(vectors) != len(item_ids):
        raise ValueError(
            f"{path} has {len(vectors)} rows, the catalogue has {len(item_ids)} items; row i must "
            "be catalogue row i, or give a file with the id of each row"
        )
    logger.warning(
        "%s has no item ids: its row order is trusted, with rows 0, 1, 2 … for the items %s … "
        "of the catalogue; give a file with the id of each row to be sure",
        path, _some(item_ids.cast(pl.String)),
    )  # fmt: skip
    return vectors, None


def _float32(
    vectors: npt.NDArray[np.generic], rows: npt.NDArray[np.integer] | None, n_items: int
) -> Iterator[tuple[slice, npt.NDArray[np.float32]]]:
    """Vectors of the items in blocks; what float32 can't hold is inf."""
    for block in _row_blocks(n_items):
        part = vectors[block if rows is None else rows[block]]
        with np.errstate(over="ignore"):
            yield block, np.ascontiguousarray(part, dtype=np.float32)


def check_vectors(vectors: npt.NDArray[np.floating], name: str) -> None:
    """Raise ValueError if a row holds NaN or inf, naming the first one."""
    bad = np.empty(len(vectors), dtype=bool)
    for block in _row_blocks(len(vectors)):
        bad[block] = ~np.isfinite(vectors[block]).all(axis=1)
    if bad.any():
        raise ValueError(_not_finite(name, int(bad.sum()), int(bad.argmax())))


def _not_finite(name: str, bad: int, first: int) -> str:
    return f"{name}: {bad} rows hold NaN or inf, the first is row {first}"


def content_file(run_dir: Path | str) -> str | None:
    """Name of the embed stage's file of vectors that hold no behaviour.

    Args:
        run_dir: a run whose embed stage is complete.

    Returns:
        The file of the text part of fused vectors, or of the run's only ones; None where the items
        were embedded by behaviour alone.

    Raises:
        ValueError: the embed stage is not complete.
    """
    manifest = require(run_dir, "embed")
    if TEXT_VECTORS in manifest.outputs:
        return TEXT_VECTORS
    return None if manifest.config.get("method") == "collaborative" else VECTORS


def content_vectors(run_dir: Path | str) -> npt.NDArray[np.float32] | None:
    """The vectors of `content_file`, (n_items, dim), for what is said of content alone."""
    name = content_file(run_dir)
    return None if name is None else np.load(stage_folder(run_dir, "embed") / name)


def read_ids(path: Path | str) -> pl.Series:
    """Item ids of a file as text, one per row of the vectors that it belongs to.

    Raises:
        ValueError: another kind of file, or ids that are empty or neither whole numbers nor text.
    """
    path = Path(path)
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        ids = pl.Series(ITEM_ID, [line.strip() for line in lines], dtype=pl.String)
    elif path.suffix == ".json":
        ids = _json_ids(path)
    elif path.suffix == ".parquet":
        table = _table(path)
        if ITEM_ID not in table.columns and table.width != 1:
            raise ValueError(f"{path} has the columns {table.columns}; {ITEM_ID} is needed")
        ids = table[ITEM_ID] if ITEM_ID in table.columns else table.to_series()
    elif path.suffix == ".npy":
        array = _npy(path)
        if array.ndim != 1 or array.dtype.kind not in "iuUS":
            raise ValueError(
                f"{path} has shape {array.shape} and dtype {array.dtype}; a flat array of integers "
                "or strings is needed"
            )
        ids = pl.Series(ITEM_ID, array.astype(str) if array.dtype.kind == "S" else array)
    else:
        raise ValueError(f"{path} must end in .npy, .txt, .json or .parquet to be read as ids")
    return _checked(ids, path)


def _read(path: Path) -> tuple[npt.NDArray[np.generic], pl.Series | None]:
    """The matrix of a file, and its ids if it has them."""
    if path.suffix == ".parquet":
        return _parquet_vectors(path)
    if path.suffix == ".safetensors":
        return _safetensors(path), None
    if path.suffix != ".npy":
        raise ValueError(f"{path} must end in .npy, .safetensors or .parquet to be read as vectors")
    array = _npy(path)
    if array.dtype.kind == "V" and array.dtype.itemsize == 2 and array.dtype.names is None:
        # NumPy has no bfloat16: the arrays of ml_dtypes come back as bare pairs of bytes, which are
        # the upper half of a float32.
        logger.info("%s: read as bfloat16", path)
        array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array, None


def _npy(path: Path) -> npt.NDArray[np.generic]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a plain .npy array: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is not a plain .npy array: it is an archive of several (.npz)")
    return array


def _safetensors(path: Path) -> npt.NDArray[np.generic]:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            shapes = {name: stored.get_slice(name).get_shape() for name in stored.keys()}
            tables = [name for name, shape in shapes.items() if len(shape) == 2]
            if len(tables) != 1:
                raise ValueError(f"{path} holds {shapes}; exactly one table (rows, dim) is needed")
            table = stored.get_tensor(tables[0])
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    return (table.float() if table.dtype == torch.bfloat16 else table).numpy()


def _parquet_vectors(path: Path) -> tuple[npt.NDArray[np.generic], pl.Series]:
    table = _table(path)
    lists = [name for name, kind in table.schema.items() if isinstance(kind, pl.List | pl.Array)]
    if ITEM_ID not in table.columns or len(lists) != 1:
        raise ValueError(
            f"{path} has the columns {table.columns}; {ITEM_ID} and one list column are needed"
        )
    column = table[lists[0]]
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    lengths = column.list.len()
    if lengths.null_count() or lengths.n_unique() != 1 or not lengths[0]:
        raise ValueError(f"{path}: the lists of {lists[0]} must all have the same length")
    values = column.explode().to_numpy()
    return values.reshape(len(column), -1), _checked(table[ITEM_ID], path)


def _table(path: Path) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, glob=False)
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error


def _json_ids(path: Path) -> pl.Series:
    found = read_json(path)
    if not isinstance(found, list) or not all(type(item) in (int, str) for item in found):
        raise ValueError(f"{path} must hold a list of item ids, whole numbers or text")
    return pl.Series(ITEM_ID, [str(item) for item in found], dtype=pl.String)


def _checked(ids: pl.Series, path: Path) -> pl.Series:
    if not (ids.dtype.is_integer() or ids.dtype == pl.String):
        raise ValueError(f"{path} has ids of type {ids.dtype}; whole numbers or text are needed")
    ids = ids.cast(pl.String)
    if empty := int((ids.fill_null("") == "").sum()):
        raise ValueError(f"{path} has {empty} rows without an item id")
    return ids


def _rows(path: Path, n_rows: int, ids: pl.Series, item_ids: pl.Series) -> npt.NDArray[np.integer]:
    """Row of the file for each item of the catalogue."""
    if len(ids) != n_rows:
        raise ValueError(f"{path} has {n_rows} rows, but {len(ids)} ids; one per row is needed")
    if len(repeated := ids.filter(ids.is_duplicated()).unique(maintain_order=True)):
        raise ValueError(
            f"{path}: {len(repeated)} ids name several rows, such as {_some(repeated)}; keep one "
            "row each"
        )
    # As text: the ids 12 and "12" are the same to the user, "0012" and 12 are not.
    catalog = pl.DataFrame({ITEM_ID: item_ids.cast(pl.String)})
    found = catalog.join(
        pl.DataFrame({ITEM_ID: ids}).with_row_index("row"),
        on=ITEM_ID,
        how="left",
        maintain_order="left",
    )
    missing = found.filter(pl.col("row").is_null())[ITEM_ID]
    if len(missing):
        raise ValueError(
            f"{path} has no vector for {len(missing)} of the {len(catalog)} items, such as "
            f"{_some(missing)} (it has vectors for {_some(ids)} …); bring them, or drop these "
            "items from the catalogue"
        )
    if extra := n_rows - len(catalog):
        logger.info("%s: %d rows of items that the catalogue lacks are ignored", path, extra)
    return found["row"].to_numpy()


def _row_blocks(n_rows: int) -> Iterator[slice]:
    for start in range(0, n_rows, _ROWS_AT_ONCE):
        yield slice(start, min(start + _ROWS_AT_ONCE, n_rows))


def _some(ids: pl.Series) -> str:
    return ", ".join(repr(item) for item in ids.head(_NAMED))
