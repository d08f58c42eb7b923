"""Ratings as the model gives them, and the review that it would write with them.

    genrec rate --run_dir runs/mine --user U01223 --item SKU10497
    genrec rate --run_dir runs/mine --rows 2000 --output_dir runs/mine-rated

Needs a model that was trained on the family `rating` (build_dataset --tasks sequential rating
explanation, on data with ratings). The first form prints how probable the model finds each rating
that training held, after the ratings of the user's history, and, where it was trained on the family
`explanation`, the review that it would write. That review is the model's invention: nothing in it
is checked, and a small model trained from scratch repeats phrases.

The second form predicts the ratings of a split's targets: RMSE and MAE with 95% intervals, beside
means and beside biases of users and items, which know what the prompts show: every rating before a
user's first target of the split. Writes ``ratings.parquet`` and ``ratings.json``. CPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from rich.table import Table
from rich.text import Text

from genrec.artifacts import stage_folder, write_json, write_parquet
from genrec.columns import (
    HISTORY,
    HISTORY_RATINGS,
    ITEM_ID,
    RATING,
    ROW_ID,
    TARGET,
    TITLE,
    USER_ID,
)
from genrec.config import check_choice, make_console, parse, run
from genrec.data.splits import read_split, rows_of_user
from genrec.prompts import escape_text

if TYPE_CHECKING:
    from genrec.rating import Rater


@dataclass
class RateArgs:
    """Settings of rate."""

    run_dir: str = "runs/default"
    user: str | None = None
    item: str | None = None  # default: the target of the user's row
    split: str = "test"
    model_stage: str | None = None  # sft or grpo; default: grpo where it is complete
    max_tokens: int = 64  # of a review
    temperature: float = 0.001  # of its words: near 0 the likeliest, 1 the model's own distribution
    seed: int = 0
    # Many rows, measured.
    rows: int | None = None  # a deterministic sample of so many rated rows
    output_dir: str | None = None  # where predictions and figures go; a new folder
    samples: int = 1000  # bootstrap samples of the 95% intervals

    def __post_init__(self) -> None:
        """Reject settings that can't work before anything is read."""
        check_choice("split", self.split, ("valid", "test"))
        if self.model_stage is not None:
            check_choice("model_stage", self.model_stage, ("sft", "grpo"))
        if (self.rows is None) != (self.output_dir is None):
            raise ValueError("rows and output_dir belong together; give both, or --user")
        if (self.rows is None) == (self.user is None):
            raise ValueError("give --user for one rating, or --rows and --output_dir for many")
        if self.item is not None and self.user is None:
            raise ValueError("--item needs the --user who would rate it")
        if self.output_dir is not None and Path(self.output_dir).exists():
            raise ValueError(f"output_dir={self.output_dir} exists; name a new folder")
        for name in ("rows", "max_tokens", "samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


def with_ratings(rater: Rater, rows: pl.DataFrame) -> pl.DataFrame:
    """Rows with a rating in their history, as the rater takes them, and their target's true one.

    Args:
        rater: of the run.
        rows: of a split.
    """
    shown = rater.rows(rows).with_columns(rater.log.read(rater.log.places(rows), RATING))
    return shown.filter(pl.col(HISTORY_RATINGS).list.drop_nulls().list.len() > 0)


def measure(args: RateArgs, rater: Rater) -> None:
    """Predict the targets' ratings; write and print how far they are off."""
    from genrec.evaluation.rating_errors import baselines, known_ratings, rating_errors

    split = read_split(args.run_dir, args.split, "rate")
    rows = with_ratings(rater, split).drop_nulls(RATING)
    if rows.is_empty():
        raise ValueError(
            f"no row of the {args.split} split has a rated target behind a rated history"
        )
    rows = rows.sample(min(args.rows or 1, len(rows)), seed=args.seed).sort(ROW_ID)
    chances = rater.probabilities(rows)
    data = stage_folder(args.run_dir, "prepare")
    before = ("train",) if args.split == "valid" else ("train", "valid")
    earlier = [pl.read_parquet(data / f"{name}.parquet", glob=False) for name in before]
    without = baselines(known_ratings(split, earlier, rater.log.path))
    predicted = {
        "model, mean of its distribution": rater.expected(chances),
        "model, likeliest rating": rater.values[chances.argmax(axis=1)],
        **{name: predict(rows) for name, predict in without.items()},
    }
    users = np.unique(rows[USER_ID].cast(pl.String).to_numpy(), return_inverse=True)[1]
    truth = rows[RATING].to_numpy().astype(np.float64)
    *_, against = without
    found = rating_errors(truth, predicted, users, against, args.samples, args.seed)
    folder = Path(str(args.output_dir))
    names = [f"p_{value:g}" for value in rater.values]
    ids = rater.recommender.catalog[ITEM_ID].gather(rows[TARGET].cast(pl.UInt32))
    table = rows.select(ROW_ID, USER_ID, ids.alias(ITEM_ID), RATING)
    table = table.with_columns(
        pl.Series("predicted", predicted["model, mean of its distribution"]),
        *(pl.Series(name, chances[:, at]) for at, name in enumerate(names)),
    )
    write_parquet(folder / "ratings.parquet", table)
    write_json(
        folder / "ratings.json",
        {"rows": len(rows), "against": against, "systems": found, "settings": asdict(args)},
    )
    console = make_console()
    console.print(f"{len(rows):,} rated targets of the {args.split} split")
    shown = Table(box=None, pad_edge=False)
    for name in ("system", "RMSE", "MAE", f"RMSE − {against}"):
        shown.add_column(name, justify="left" if name == "system" else "right")
    for name, own in found.items():
        cells = [f"{own[m]['value']:.4f}" for m in ("rmse", "mae")]
        less = own["rmse_minus"]
        interval = f"{less['value']:+.4f} [{less['low']:+.4f}, {less['high']:+.4f}]"
        shown.add_row(name, *cells, "" if name == against else interval)
    console.print(shown)
    console.print(f"predictions and figures in {folder}")


def one(args: RateArgs, rater: Rater) -> None:
    """Print a user's rating of an item, and the model's review."""
    from genrec.decoding.free_text import TextSampling
    from genrec.rating import EXPLANATION

    recommender = rater.recommender
    catalog = recommender.catalog
    mine = rows_of_user(read_split(args.run_dir, args.split, "rate"), str(args.user), args.split)
    row = mine.sort(pl.col(HISTORY).list.len(), descending=True, maintain_order=True).head(1)
    if args.item is not None:
        at = catalog.with_row_index("at").filter(pl.col(ITEM_ID).cast(pl.String) == args.item)
        if at.is_empty():
            raise ValueError(
                f"item {args.item!r} is not in the catalogue; ids look like "
                f"{', '.join(catalog[ITEM_ID].cast(pl.String).head(3))}"
            )
        row = row.with_columns(pl.Series(TARGET, [at["at"][0]], dtype=row.schema[TARGET]))
    rows = rater.rows(row)
    (chances,) = rater.probabilities(rows)
    console = make_console()
    item = int(row[TARGET][0])
    title = escape_text(catalog[TITLE][item], 60)
    console.print(Text(f"user {row[USER_ID][0]}, item {catalog[ITEM_ID][item]}: {title}"))
    mean = float(rater.expected(chances[None])[0])
    console.print(f"expected rating {mean:.2f} (of {rater.values[0]:g} to {rater.values[-1]:g})")
    for value, chance in zip(rater.values[::-1], chances[::-1], strict=True):
        console.print(Text(f"  {value:>5g}  {chance:6.1%}  {'█' * round(40 * chance)}"))
    if EXPLANATION in recommender.families:
        likeliest = rater.values[[int(chances.argmax())]]
        sampling = TextSampling(args.temperature, max_tokens=args.max_tokens, seed=args.seed)
        (review,) = rater.reviews(rows, likeliest, sampling)
        console.print(
            f"what the model would write with {likeliest[0]:g} (nothing in it is checked):"
        )
        console.print(Text(f"  {escape_text(review, 600)}"))


def main() -> None:
    """Rate one item, or measure many ratings."""
    args = parse(RateArgs)
    from genrec.rating import Rater, trained_ratings
    from genrec.recommend import Recommender
    from genrec.tasks.rows import InteractionLog

    recommender = Recommender.load(args.run_dir, args.model_stage)
    recommender.require_family("rating")  # before a reading of test rows is noted
    log = InteractionLog.of(stage_folder(args.run_dir, "prepare") / "interactions.parquet")
    rater = Rater(recommender, log, trained_ratings(args.run_dir))
    if args.rows is None:
        one(args, rater)
    else:
        measure(args, rater)


if __name__ == "__main__":
    run(main)
