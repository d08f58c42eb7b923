"""Datasets of the Hugging Face hub, or folders that `save_to_disk` wrote."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import polars as pl

from genrec.columns import ITEM_ID, USER_ID
from genrec.data.readers.files import (
    ENDINGS,
    collect,
    read_columns,
    require_columns,
    scan_file,
)
from genrec.data.readers.raw_data import RawData, checked, ids_alone
from genrec.data.readers.table import TableMapping, catalog_of, interactions_of, users_of

logger = logging.getLogger(__name__)


def read_huggingface(
    path_or_name: Path | str,
    split: str,
    subset: str | None = None,
    items_path: Path | str | None = None,
    users_path: Path | str | None = None,
    *,
    items_subset: str | None = None,
    unknown_items: str = "raise",
    **mapping: Any,
) -> RawData:
    """Read interactions from a Hugging Face dataset, a catalogue and users from that or a file.

    Args:
        path_or_name: a folder that `Dataset.save_to_disk` wrote, or what `datasets.load_dataset`
            takes: a name on the hub, or a folder of data files.
        split: for example "train" or "train[:10%]" (a slice only from `load_dataset`).
        subset: the configuration, where the dataset has several.
        items_path: the catalogue: a table file as in `read_table`, or a dataset (with the same
            split); None makes one of the item ids alone.
        users_path: the users, likewise; None for none.
        items_subset: configuration of the catalogue's dataset.
        unknown_items: "raise", or "drop" interactions with items that the catalogue lacks.
        **mapping: the column settings of `read_table` (user_column, time_column, ...) and id_type.

    Raises:
        ValueError: a dataset, subset or split that can't be had, or any fault named in
            `read_table`.
    """
    columns = TableMapping(**mapping)
    log = _columns(path_or_name, split, subset, columns.of_interactions())
    log = interactions_of(log, path_or_name, columns)
    if items_path is None:
        catalog = ids_alone(log[ITEM_ID])
    else:
        items = _columns(items_path, split, items_subset, columns.of_items())
        catalog = catalog_of(items, items_path, columns)
    users = None
    if users_path is not None:
        people = _columns(users_path, split, None, None)
        users = users_of(people, users_path, columns, log[USER_ID].dtype)
    return checked(log, catalog, users, unknown_items, path_or_name, items_path or path_or_name)


def _columns(
    source: Path | str, split: str, subset: str | None, wanted: dict[str, str | None] | None
) -> pl.DataFrame:
    """The named columns (None: all) of a table file or a dataset; Arrow's buffers are shared."""
    path = Path(source)
    if path.is_file() and any(path.name.endswith((e, f"{e}.gz")) for e in ENDINGS):
        scanned = scan_file(path)
        return collect(scanned, path) if wanted is None else read_columns(scanned, path, wanted)
    dataset = open_dataset(source, split, subset)
    if wanted is not None:
        require_columns(dataset.column_names, source, wanted)
        names = dict.fromkeys(name for name in wanted.values() if name is not None)
        dataset = dataset.select_columns(list(names))
    if len(dataset) == 0:
        raise ValueError(f"{source} is empty: split {split!r} has no rows")
    table: pl.DataFrame = dataset.to_polars(rechunk=False)
    return table


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return path.is_dir() and any(
        (path / name).is_file() for name in ("dataset_dict.json", "state.json")
    )


def open_dataset(source: Path | str, split: str, subset: str | None) -> Any:
    """A `datasets.Dataset`: saved in a folder, or by `datasets.load_dataset`.

    Raises:
        ValueError: it can't be had.
    """
    import datasets

    path = Path(source)
    if not is_saved_dataset(path):
        try:
            return datasets.load_dataset(str(source), subset, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{source} (subset {subset}, split {split!r}) can't be loaded: {reason}; check the "
                "name, the subset and the split, and the way to the hub"
            ) from error
    if subset is not None:
        raise ValueError(f"{source} is a saved dataset, which has no subsets; drop {subset!r}")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, IndexError) as error:  # IndexError: a split without rows
        raise ValueError(
            f"{source} can't be loaded ({error}); save it again with save_to_disk, and no empty "
            "split"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{source} has no split {split!r}; it has {', '.join(loaded)}")
        return loaded[split]
    if loaded.split is not None and str(loaded.split) != split:
        raise ValueError(f"{source} is the split {str(loaded.split)!r}, not {split!r}")
    return loaded
