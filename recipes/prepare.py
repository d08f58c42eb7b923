"""Prepare: read interactions and a catalogue, clean them, split them into rows.

    genrec prepare --config recipes/configs/quickstart/prepare.yaml --run_dir runs/quickstart
    python recipes/prepare.py --config recipes/configs/own-csv/prepare.yaml --data_dir my/folder

Writes `<run_dir>/data/`: catalog, interactions, train, valid and test (and users, where the data
has them) as Parquet, and split.json. CPU only; seconds for the datasets of the shipped configs.

What is held out, `protocol`: each user's last item for test and the last but one for validation
(leave-one-out), everything in the last shares of one global order by time (global-time), or what
users did in the periods after `valid_from` and `test_from` (time-cutoff). The rows are checked for
leaks before they are written.
"""

import logging
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from genrec.artifacts import Stage, write_json, write_parquet
from genrec.columns import ITEM_ID, RELEVANT, SEEN, TARGET, TRAIN_COUNT, USER_ID
from genrec.config import check_choice, dataset_path, parse, run
from genrec.data.cleaning import TIE_RULE, TIE_RULE_WITHOUT_TIME, CleanData, clean, sample_users
from genrec.data.leaks import check_splits
from genrec.data.readers import (
    ID_TYPES,
    UNKNOWN_ITEMS,
    RawData,
    read_movielens_100k,
    read_sequences,
    read_table,
)
from genrec.data.splits import (
    GLOBAL_TIME,
    PROTOCOLS,
    SPLITS,
    TIME_CUTOFF,
    Splits,
    leave_one_out,
)
from genrec.data.synthetic import synthetic_shop
from genrec.data.time_splits import SHARES, check_shares, global_time, time_cutoff, unix_seconds

logger = logging.getLogger("genrec.prepare")

FORMATS = ("synthetic", "sequences", "movielens-100k", "table")


@dataclass
class PrepareArgs:
    """Settings of the prepare stage; the shipped YAML files explain them by example."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    format: str = "synthetic"  # one of FORMATS
    data_dir: str | None = None  # where relative paths start; else here, then $GENREC_DATA
    interactions: str | None = None  # file (for movielens-100k: the folder)
    items: str | None = None
    users: str | None = None
    # Columns, for format: table
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str | None = None
    rating_column: str | None = None
    items_item_column: str | None = None  # None: as in the interactions
    title_column: str | None = "title"
    brand_column: str | None = None
    category_column: str | None = None
    category_separator: str | None = None  # None: found in the column (">" or "|") and logged
    price_column: str | None = None
    description_column: str | None = None
    users_user_column: str | None = None
    id_type: str = "auto"
    encoding: str = "utf-8"
    unknown_items: str = "raise"  # or "drop"
    # Cleaning and split
    min_rating: float | None = None
    collapse_repeats: bool = False
    k_core_user: int = 1
    k_core_item: int = 1
    max_history: int = 20
    protocol: str = "leave-one-out"  # one of PROTOCOLS
    # global-time: shares of the interactions that train, validate and test
    split_shares: list[float] = field(default_factory=lambda: list(SHARES))
    # time-cutoff: ISO dates or times (UTC where they name no zone), or unix seconds
    valid_from: date | str | int | None = None
    test_from: date | str | int | None = None
    test_until: date | str | int | None = None
    limit_users: int | None = None  # a sample for quick trials, drawn with `seed`
    # Synthetic shop
    n_users: int = 2000
    n_items: int = 600
    seed: int = 0
    # Raise if the cleaned data differ (checked before limit_users)
    expect_users: int | None = None
    expect_items: int | None = None
    expect_interactions: int | None = None

    def __post_init__(self) -> None:
        """Check values that the parser doesn't."""
        check_choice("format", self.format, FORMATS)
        check_choice("unknown_items", self.unknown_items, UNKNOWN_ITEMS)
        check_choice("id_type", self.id_type, ID_TYPES)
        needed = {"sequences": ("interactions", "items"), "synthetic": ()}.get(
            self.format, ("interactions",)
        )
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"format={self.format!r} needs {name}: <path>")
        for name in ("k_core_user", "k_core_item", "max_history", "limit_users"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self._check_protocol()

    def _check_protocol(self) -> None:
        """Settings of the other protocols are refused, since they would do nothing."""
        check_choice("protocol", self.protocol, PROTOCOLS)
        check_shares(self.split_shares)
        if self.protocol != GLOBAL_TIME and self.split_shares != list(SHARES):
            raise ValueError(f"split_shares belongs to protocol: {GLOBAL_TIME}, not to this one")
        cutoffs = {n: getattr(self, n) for n in ("valid_from", "test_from", "test_until")}
        for name, moment in cutoffs.items():
            if self.protocol != TIME_CUTOFF and moment is not None:
                raise ValueError(f"{name} belongs to protocol: {TIME_CUTOFF}, not to this one")
            if self.protocol == TIME_CUTOFF and moment is None and name != "test_until":
                raise ValueError(f"protocol={TIME_CUTOFF!r} needs {name}: <date>")
            # Two ways to write a moment are one setting.
            setattr(self, name, None if moment is None else unix_seconds(moment))


def input_files(args: PrepareArgs) -> dict[str, Path]:
    """The files that the chosen format reads, by role."""
    if args.format == "synthetic":
        return {}
    if args.format == "movielens-100k":
        folder = dataset_path(str(args.interactions), args.data_dir)
        return {name: dataset_path(str(folder / name)) for name in ("u.data", "u.item", "u.user")}
    given = {"interactions": args.interactions, "items": args.items, "users": args.users}
    return {name: dataset_path(path, args.data_dir) for name, path in given.items() if path}


def read(args: PrepareArgs, files: dict[str, Path]) -> RawData:
    """Read the raw tables."""
    if args.format == "synthetic":
        return synthetic_shop(args.n_users, args.n_items, args.seed)
    if args.format == "movielens-100k":
        return read_movielens_100k(files["u.data"].parent)
    if args.format == "sequences":
        return read_sequences(files["interactions"], files["items"], args.unknown_items)
    return read_table(
        files["interactions"],
        files.get("items"),
        files.get("users"),
        user_column=args.user_column,
        item_column=args.item_column,
        time_column=args.time_column,
        rating_column=args.rating_column,
        items_item_column=args.items_item_column,
        title_column=args.title_column,
        brand_column=args.brand_column,
        category_column=args.category_column,
        category_separator=args.category_separator,
        price_column=args.price_column,
        description_column=args.description_column,
        users_user_column=args.users_user_column,
        id_type=args.id_type,
        unknown_items=args.unknown_items,
        encoding=args.encoding,
    )


def check_expected(args: PrepareArgs, data: CleanData) -> None:
    """Raise if the cleaned data aren't the ones that the config was written for."""
    found = {
        "users": data.interactions[USER_ID].n_unique(),
        "items": data.catalog.height,
        "interactions": data.interactions.height,
    }
    for name, value in found.items():
        expected = getattr(args, f"expect_{name}")
        if expected is not None and expected != value:
            raise ValueError(
                f"the data have {value} {name}, expect_{name}={expected}; this is another version "
                f"of the dataset or another cleaning: compare {found}, or unset expect_{name}"
            )


def split(args: PrepareArgs, data: CleanData) -> Splits:
    """Make the rows by the chosen protocol and check them."""
    log, n_items = data.interactions, data.catalog.height
    if args.protocol == GLOBAL_TIME:
        splits = global_time(log, n_items, args.max_history, args.split_shares)
    elif args.protocol == TIME_CUTOFF:
        moments = (args.valid_from, args.test_from, args.test_until)
        valid_from, test_from, test_until = (m if isinstance(m, int) else None for m in moments)
        assert valid_from is not None and test_from is not None, "checked by the settings"
        splits = time_cutoff(log, n_items, valid_from, test_from, test_until, args.max_history)
    else:
        splits = leave_one_out(log, n_items, args.max_history)
    if splits.test.height == 0:
        raise ValueError(
            "no user has 3 interactions, so there is nothing to test on; bring longer histories, "
            "or lower min_rating or the k-core"
        )
    check_splits(splits.train, splits.valid, splits.test, log, splits.protocol, n_items)
    return splits


def statistics(data: CleanData, splits: Splits) -> dict[str, Any]:
    """Figures that say what the data are like; they go to the manifest and the screen."""
    lengths = data.interactions.group_by(USER_ID).len()["len"].to_numpy()
    targets = splits.test[TARGET].to_numpy()
    seen = splits.test.select(pl.col(SEEN).list.contains(pl.col(TARGET)).mean()).item()
    trained = splits.train[USER_ID].unique().implode()
    several = {}
    if RELEVANT in splits.test.columns:
        several["relevant_per_test_row"] = splits.test[RELEVANT].list.len().mean()
    return {
        "users": len(lengths),
        "items": data.catalog.height,
        "items_without_interactions": data.catalog.height - data.interactions[ITEM_ID].n_unique(),
        "interactions": data.interactions.height,
        "density": data.interactions.height / (len(lengths) * data.catalog.height),
        "mean_length": float(lengths.mean()),
        "median_length": float(np.median(lengths)),
        "protocol": splits.protocol,
        "boundaries": splits.boundaries,
        "shares": splits.shares,
        "dropped_by_split": splits.dropped,
        "train_only_users": splits.train_only_users,
        "train_rows": splits.train.height,
        "valid_rows": splits.valid.height,
        "test_rows": splits.test.height,
        "test_users": splits.test[USER_ID].n_unique(),
        "test_rows_of_untrained_users": splits.test.select(
            (~pl.col(USER_ID).is_in(trained)).mean()
        ).item(),
        **several,
        "cold_test_targets": float((splits.train_count[targets] == 0).mean()),
        "repeated_test_targets": seen,
        "tied_test_targets": splits.tied_test_targets,
        "tie_share_of_last_two": data.tie_share,
        "split_sha256": splits.sha256(),
    }


def show(figures: dict[str, Any]) -> None:
    """Print the statistics as a table."""
    table = Table(title="dataset", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    shares = (
        "test_rows_of_untrained_users", "cold_test_targets", "repeated_test_targets",
        "tied_test_targets", "tie_share_of_last_two",
    )  # fmt: skip
    for name, value in figures.items():
        if isinstance(value, dict):
            text = "\n".join(
                f"{key.replace('_', ' ')}: {f'{x:.2%}' if name == 'shares' else x}"
                for key, x in value.items()
            )
        elif value is None:
            text = "no timestamps"
        elif name == "density":
            text = f"{value:.4%}"
        elif name in shares:
            text = f"{value:.1%}"
        elif isinstance(value, str):
            text = value
        else:
            text = f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
        if text:
            table.add_row(name.replace("_", " "), text)
    Console().print(table)


def write(
    folder: Path, args: PrepareArgs, data: CleanData, splits: Splits, figures: dict[str, Any]
) -> None:
    """Write the stage's tables and split.json."""
    counts = pl.Series(TRAIN_COUNT, splits.train_count, dtype=pl.Int32)
    write_parquet(folder / "catalog.parquet", data.catalog.with_columns(counts))
    write_parquet(folder / "interactions.parquet", data.interactions)
    if data.users is not None:
        write_parquet(folder / "users.parquet", data.users)
    for name in SPLITS:
        write_parquet(folder / f"{name}.parquet", getattr(splits, name))
    timed = data.interactions["timestamp"].null_count() == 0
    tie_rule = TIE_RULE if timed else TIE_RULE_WITHOUT_TIME
    if splits.boundaries:
        tie_rule += "; the second that a boundary names belongs to the later period"
    write_json(
        folder / "split.json",
        {
            "protocol": splits.protocol,
            "tie_rule": tie_rule,
            "rating_rule": "all interactions"
            if args.min_rating is None
            else f"interactions rated {args.min_rating:g} or more, as implicit feedback",
            "max_history": args.max_history,
            "dropped": data.dropped,
            **figures,
        },
    )


def main() -> None:
    """Read, clean, split, write."""
    args = parse(PrepareArgs)
    files = input_files(args)
    # Inputs are hashed by content, so where they lie is no setting that changes the result.
    paths = ("data_dir", "interactions", "items", "users")
    stage = Stage(args.run_dir, "prepare", asdict(args), files=files, ignore=paths)
    if stage.is_done(args.overwrite):
        return
    data = clean(
        read(args, files),
        min_rating=args.min_rating,
        min_user=args.k_core_user,
        min_item=args.k_core_item,
        collapse=args.collapse_repeats,
    )
    check_expected(args, data)
    if args.limit_users is not None:
        data = sample_users(data, args.limit_users, args.seed)
    splits = split(args, data)
    figures = statistics(data, splits)
    write(stage.folder, args, data, splits, figures)
    stage.finish(
        rows=data.interactions.height,
        seed=args.seed,
        metrics=figures,
        notes=[f"{name}: {getattr(args, name)}" for name in paths[1:] if getattr(args, name)],
    )
    show(figures)


if __name__ == "__main__":
    run(main)
