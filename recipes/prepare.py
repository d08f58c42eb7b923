"""Prepare: read interactions and a catalogue, clean them, split them into rows.

    genrec prepare --config recipes/configs/quickstart/prepare.yaml --run_dir runs/quickstart
    python recipes/prepare.py --config recipes/configs/own-csv/prepare.yaml --data_dir my/folder

Writes `<run_dir>/data/`: catalog, interactions, train, valid and test (and users, where the data
has them) as Parquet, split.json, and lint.json with what makes results look better or worse than
they are. CPU only; seconds for the datasets of the shipped configs.

What is held out, `protocol`: each user's last item for test and the last but one for validation
(leave-one-out), everything in the last shares of one global order by time (global-time), what
users did in the periods after `valid_from` and `test_from` (time-cutoff), or the rows that the
dataset brings (given). The rows are checked for leaks before they are written.

Users who opted out and items that must go: `erase_users` and `erase_items` name lists of ids, which
are removed before anything is computed. Nothing that is written names them.

Longer than other recipes, since a third of it is the settings of all formats.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from genrec.artifacts import Stage, write_json, write_parquet
from genrec.columns import ITEM_ID, TRAIN_COUNT, USER_ID
from genrec.config import check_choice, dataset_path, parse, run
from genrec.data import feedback, readers
from genrec.data.cleaning import TIE_RULE, TIE_RULE_WITHOUT_TIME, CleanData, clean, sample_users
from genrec.data.erasure import Erased, erase, read_ids
from genrec.data.given_splits import IMPLIED, given_splits
from genrec.data.leaks import check_splits
from genrec.data.lint import Finding, lint_run_tables, to_json, worst_first
from genrec.data.splits import (
    GIVEN,
    GLOBAL_TIME,
    PROTOCOLS,
    SPLITS,
    TIME_CUTOFF,
    Splits,
    leave_one_out,
)
from genrec.data.statistics import split_statistics
from genrec.data.synthetic import synthetic_shop
from genrec.data.time_splits import SHARES, check_shares, global_time, time_cutoff, unix_seconds

logger = logging.getLogger("genrec.prepare")

FORMATS = (
    "synthetic", "table", "sequences", "amazon", "movielens", "movielens-100k", "recbole", "mind",
    "lc-rec", "minionerec", "huggingface",
)  # fmt: skip
MAPPED = ("table", "huggingface")  # formats whose columns have names of their own
# Settings that only some formats read. Elsewhere they would do nothing, so they are refused.
READ_BY = {
    **dict.fromkeys([f.name for f in fields(readers.TableMapping)], MAPPED),
    "event_weights": MAPPED,
    "interactions": FORMATS[1:],
    "items": ("table", "sequences", "amazon", "lc-rec", "huggingface"),
    "users": MAPPED,
    "encoding": ("table",),
    "unknown_items": (*MAPPED, "sequences", "amazon", "recbole", "mind", "lc-rec"),
    "amazon_version": ("amazon",),
    "max_text_chars": ("amazon",),
    "hf_split": ("huggingface",),
    "hf_subset": ("huggingface",),
    "hf_items_subset": ("huggingface",),
    "train_rows": ("minionerec",),
    "n_users": ("synthetic",),
    "n_items": ("synthetic",),
}
# What changes rows, which given ones are not.
CLEANING = (
    "min_rating", "rating_rule", "event_weights", "collapse_repeats", "k_core_user", "k_core_item",
    "window_step",
)  # fmt: skip
FOLDERS: dict[str, Callable[[Path], dict[str, Path]]] = {
    "movielens": readers.movielens_files,
    "movielens-100k": readers.movielens_files,
    "recbole": readers.recbole_files,
    "mind": readers.mind_files,
}
OF_ITEMS = (
    "items_item_column", "title_column", "brand_column", "category_column", "category_separator",
    "price_column", "description_column",
)  # fmt: skip
PATHS = ("data_dir", "interactions", "items", "users", "train_rows", "erase_users", "erase_items")


@dataclass
class PrepareArgs:
    """Settings of the prepare stage; the shipped YAML files explain them by example."""

    run_dir: str = "runs/default"
    overwrite: bool = False
    format: str = "synthetic"  # one of FORMATS
    data_dir: str | None = None  # where relative paths start; else here, then $GENREC_DATA
    # A file, a folder (of Parquet files; movielens, recbole, mind, minionerec), or a Hub name
    interactions: str | None = None
    items: str | None = None
    users: str | None = None
    train_rows: str | None = None  # minionerec: the training rows, if not the folder's train file
    # Columns, for table and huggingface
    user_column: str = "user_id"
    item_column: str = "item_id"
    time_column: str | None = None
    rating_column: str | None = None
    event_column: str | None = None  # view, cart, purchase …
    weight_column: str | None = None
    summary_column: str | None = None  # headline of a review
    review_column: str | None = None  # its body
    query_column: str | None = None  # the search that led to the interaction
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
    amazon_version: str = "auto"
    max_text_chars: int = 2000  # amazon: reviews and descriptions are cut there
    hf_split: str = "train"
    hf_subset: str | None = None
    hf_items_subset: str | None = None  # of the dataset that `items` names
    # Who and what must not be in the data: .txt with an id a line, or .csv or .parquet
    erase_users: str | None = None
    erase_items: str | None = None
    # Feedback: weights of events as event=weight (0 drops the event, *=1: all others)
    event_weights: list[str] | None = None
    rating_rule: str | None = None  # one of RATING_RULES; None: at-least with min_rating, else all
    min_rating: float | None = None
    # Cleaning and split
    collapse_repeats: bool = False
    k_core_user: int = 1
    k_core_item: int = 1
    max_history: int = 20
    min_history: int = 1  # interactions that a user needs before a held-out target
    window_step: int | None = None  # between training windows; None: half of max_history
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
        check_choice("unknown_items", self.unknown_items, readers.UNKNOWN_ITEMS)
        check_choice("id_type", self.id_type, readers.ID_TYPES)
        check_choice("amazon_version", self.amazon_version, readers.AMAZON_VERSIONS)
        needed = ("interactions", "items") if self.format in ("sequences", "lc-rec") else ()
        for name in needed or ("interactions",)[self.format == "synthetic" :]:
            if getattr(self, name) is None:
                raise ValueError(f"format={self.format!r} needs {name}: <path>")
        for name, formats in READ_BY.items():
            if self.format not in formats and self._is_set(name):
                raise ValueError(
                    f"{name} is not read with format: {self.format}, only with "
                    f"{', '.join(formats)}; leave it out"
                )
        for name in OF_ITEMS if self.format == "table" and self.items is None else ():
            if self._is_set(name):
                raise ValueError(
                    f"{name} is a column of items, and no table of them is named; set items: <path>"
                )
        lengths = ("k_core_user", "k_core_item", "max_history", "min_history", "limit_users")
        for name in (*lengths, "window_step"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.rating_rule is not None:
            check_choice("rating_rule", self.rating_rule, feedback.RATING_RULES)
        feedback.effective_rating_rule(self.rating_rule, self.min_rating)
        if self.event_weights is not None:
            feedback.parse_event_weights(self.event_weights)
            if self.event_column is None:
                raise ValueError("event_weights needs event_column: <name>")
        self._check_protocol()

    def _check_protocol(self) -> None:
        """Settings of the other protocols are refused, since they would do nothing."""
        check_choice("protocol", self.protocol, PROTOCOLS)
        if (self.protocol == GIVEN) != (self.format == "minionerec"):
            raise ValueError(
                f"protocol={self.protocol!r} with format={self.format!r}: minionerec brings its "
                f"own split, protocol: {GIVEN}, and no other format does"
            )
        for name in CLEANING:
            if self.protocol == GIVEN and self._is_set(name):
                raise ValueError(f"{name} changes rows, and given ones stay as they are; unset it")
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

    def _is_set(self, name: str) -> bool:
        default = type(self).__dataclass_fields__[name].default
        return default is not MISSING and getattr(self, name) != default


def input_paths(args: PrepareArgs) -> dict[str, Path]:
    """The files and folders that the settings name, by role; a Hub name is none."""
    found = {}
    for role in PATHS[1:]:
        path = getattr(args, role)
        try:
            if path is not None:
                found[role] = dataset_path(path, args.data_dir)
        except ValueError:
            if args.format != "huggingface" or role.startswith("erase_"):
                raise
    return found


def hashed_files(args: PrepareArgs, paths: dict[str, Path]) -> dict[str, Path]:
    """Every file that is read, since the stage is known by their content; folders are unfolded."""
    files = dict(paths)
    if args.format == "minionerec":
        files |= readers.minionerec_files(
            files.pop("interactions"), train=files.pop("train_rows", None)
        )
    elif args.format in FOLDERS:
        files |= FOLDERS[args.format](files.pop("interactions"))
    for role in [role for role, path in files.items() if path.is_dir()]:
        folder = files.pop(role)
        inside = sorted(path for path in folder.rglob("*") if path.is_file())
        files |= {f"{role}/{path.relative_to(folder).as_posix()}": path for path in inside}
    return files


def read(args: PrepareArgs, paths: dict[str, Path]) -> readers.RawData:
    """Read the raw tables."""
    columns = {f.name: getattr(args, f.name) for f in fields(readers.TableMapping)}
    items, source = paths.get("items"), paths.get("interactions")
    if args.format == "synthetic":
        return synthetic_shop(args.n_users, args.n_items, args.seed)
    if args.format == "huggingface":
        return readers.read_huggingface(
            source or str(args.interactions), args.hf_split, args.hf_subset, items or args.items,
            paths.get("users") or args.users, items_subset=args.hf_items_subset,
            unknown_items=args.unknown_items, **columns,
        )  # fmt: skip
    assert source is not None, "checked by the settings"
    if args.format == "table":
        return readers.read_table(
            source, items, paths.get("users"), **columns,
            unknown_items=args.unknown_items, encoding=args.encoding,
        )  # fmt: skip
    if args.format == "amazon":
        return readers.read_amazon(
            source, items, version=args.amazon_version, unknown_items=args.unknown_items,
            max_text_chars=args.max_text_chars,
        )  # fmt: skip
    if args.format == "sequences":
        return readers.read_sequences(source, paths["items"], args.unknown_items)
    if args.format == "lc-rec":
        return readers.read_lcrec(source, paths["items"], args.unknown_items)
    if args.format == "minionerec":
        return readers.read_minionerec(source, train=paths.get("train_rows"))
    if args.format == "recbole":
        return readers.read_recbole(source, args.unknown_items)
    if args.format == "mind":
        return readers.read_mind(source, args.unknown_items)
    return readers.read_movielens(source)


def erase_listed(
    args: PrepareArgs, raw: readers.RawData, paths: dict[str, Path]
) -> tuple[readers.RawData, Any]:
    """Remove the users and items of the erasure lists."""
    lists = {}
    for kind, mine, field_name in (
        ("users", args.user_column, USER_ID),
        ("items", args.items_item_column or args.item_column, ITEM_ID),
    ):
        if path := paths.get(f"erase_{kind}"):
            lists[kind] = read_ids(path, [mine, field_name])
    return erase(raw, **lists)


def check_expected(args: PrepareArgs, data: CleanData, erased: Mapping[str, Erased]) -> None:
    """Raise if the cleaned data aren't the ones that the config was written for."""
    found = {
        "users": data.interactions[USER_ID].n_unique(),
        "items": data.catalog.height,
        "interactions": data.interactions.height,
    }
    for name, value in found.items():
        expected = getattr(args, f"expect_{name}")
        if expected is None or expected == value:
            continue
        if any(counts.matched for counts in erased.values()):
            logger.warning("expect_%s=%d, and %d are left after erasure", name, expected, value)
            continue
        raise ValueError(
            f"the data have {value} {name}, expect_{name}={expected}; this is another version "
            f"of the dataset or another cleaning: compare {found}, or unset expect_{name}"
        )


def split(args: PrepareArgs, data: CleanData) -> Splits:
    """Make the rows by the chosen protocol and check them."""
    log, n_items = data.interactions, data.catalog.height
    sizes: dict[str, Any] = {"max_history": args.max_history, "min_history": args.min_history}
    if data.given is not None:
        splits = given_splits(data.given, log, data.catalog, **sizes)
    else:
        sizes["window_step"] = args.window_step
        if args.protocol == GLOBAL_TIME:
            splits = global_time(log, n_items, shares=args.split_shares, **sizes)
        elif args.protocol == TIME_CUTOFF:
            moments = (args.valid_from, args.test_from, args.test_until)
            valid_from, test_from, test_until = (m if isinstance(m, int) else None for m in moments)
            assert valid_from is not None and test_from is not None, "checked by the settings"
            splits = time_cutoff(log, n_items, valid_from, test_from, test_until, **sizes)
        else:
            splits = leave_one_out(log, n_items, **sizes)
    if splits.test.height == 0:
        raise ValueError(
            f"no user has {args.min_history + 2} interactions, so there is nothing to test on; "
            "bring longer histories, or lower min_history, min_rating or the k-core"
        )
    check_splits(splits.train, splits.valid, splits.test, log, splits.protocol, n_items)
    return splits


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
            text = "not known"
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


def show_findings(findings: list[Finding]) -> None:
    """Print what the data linter found; what is well is counted only."""
    styles = {"bad": "bold red", "look": "yellow"}
    table = Table(title="what to know of these data", show_header=False)
    for finding in worst_first(findings):
        if finding.severity in styles:
            text = f"{finding.name}: {finding.text}"
            table.add_row(Text(finding.severity, styles[finding.severity]), Text(text))
    well = sum(finding.severity == "ok" for finding in findings)
    if table.row_count:
        Console().print(table)
    unchecked = sum(finding.severity == "not run" for finding in findings)
    Console(highlight=False).print(
        f"{well} of {len(findings)} checks are well, {unchecked} could not be made; "
        "see data/lint.json"
    )


def write(
    folder: Path, args: PrepareArgs, data: CleanData, splits: Splits, figures: dict[str, Any]
) -> list[Finding]:
    """Write the stage's tables, split.json and lint.json."""
    counts = pl.Series(TRAIN_COUNT, splits.train_count, dtype=pl.Int32)
    write_parquet(folder / "catalog.parquet", data.catalog.with_columns(counts))
    write_parquet(folder / "interactions.parquet", data.interactions)
    if data.users is not None:
        write_parquet(folder / "users.parquet", data.users)
    rows = {name: getattr(splits, name) for name in SPLITS}
    for name, table in rows.items():
        write_parquet(folder / f"{name}.parquet", table)
    timed = data.interactions["timestamp"].null_count() == 0
    tie_rule = TIE_RULE if timed else TIE_RULE_WITHOUT_TIME
    if splits.protocol == GIVEN:
        tie_rule = "that of whoever made the rows"
    elif splits.boundaries:
        tie_rule += "; the second that a boundary names belongs to the later period"
    rating_rule = feedback.effective_rating_rule(args.rating_rule, args.min_rating)
    write_json(
        folder / "split.json",
        {
            "protocol": splits.protocol,
            "tie_rule": tie_rule,
            "rating_rule": feedback.rating_rule_text(rating_rule, args.min_rating),
            "event_weights": args.event_weights,
            "log": IMPLIED if data.given is not None else "all interactions that are left",
            "max_history": args.max_history,
            "min_history": args.min_history,
            "dropped": data.dropped,
            **figures,
        },
    )
    log, catalog = data.interactions, data.catalog
    findings = lint_run_tables(log, catalog, **rows, protocol=splits.protocol)
    write_json(folder / "lint.json", to_json(findings))
    return findings


def main() -> None:
    """Read, clean, split, write."""
    args = parse(PrepareArgs)
    paths = input_paths(args)
    # Inputs are hashed by content, so where they lie is no setting that changes the result.
    # A dataset of the Hub is known by its name.
    hub = {role: getattr(args, role) for role in PATHS[1:] if role not in paths}
    stage = Stage(
        args.run_dir, "prepare", asdict(args), files=hashed_files(args, paths), ignore=PATHS,
        hashes={role: name for role, name in hub.items() if name},
    )  # fmt: skip
    if stage.is_done(args.overwrite):
        return
    if args.erase_users or args.erase_items:
        for copy in sorted(stage.run_dir.glob(f"{stage.folder.name}.old-*")):
            logger.warning("%s may hold what is erased now, and later stages, too: delete it", copy)
    raw, erased = erase_listed(args, read(args, paths), paths)
    data = clean(
        raw,
        min_rating=args.min_rating,
        min_user=args.k_core_user,
        min_item=args.k_core_item,
        collapse=args.collapse_repeats,
        rating_rule=args.rating_rule,
        event_weights=feedback.parse_event_weights(args.event_weights)
        if args.event_weights
        else None,
    )
    del raw  # as large as the cleaned log
    check_expected(args, data, erased)
    if args.limit_users is not None:
        data = sample_users(data, args.limit_users, args.seed)
    splits = split(args, data)
    figures = split_statistics(data, splits)
    figures |= {f"erased_{kind}": asdict(counts) for kind, counts in erased.items()}
    findings = write(stage.folder, args, data, splits, figures)
    sources = ("interactions", "items", "users", "train_rows")
    stage.finish(
        rows=data.interactions.height,
        seed=args.seed,
        metrics=figures,
        notes=[f"{name}: {getattr(args, name)}" for name in sources if getattr(args, name)],
    )
    show(figures)
    show_findings(findings)


if __name__ == "__main__":
    run(main)
