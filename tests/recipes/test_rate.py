"""Ratings as the model gives them, against whole forward passes, and without a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from genrec.artifacts import read_json, stage_folder, write_parquet
from genrec.columns import HISTORY_ITEMS
from genrec.data.splits import read_split
from genrec.decoding.free_text import TextSampling
from genrec.evaluation.rating_errors import (
    baselines,
    biases,
    known_ratings,
    mean_rating,
    rating_errors,
)
from genrec.modeling import encode_text
from genrec.rating import Rater, trained_ratings
from genrec.recommend import Recommender
from genrec.tasks.rows import InteractionLog

SCALE = [1.0, 4.0, 4.5, 5.0]  # "4" begins "4.5"


def rated_run(tiny: Any, folder: Path, families: tuple[str, ...]) -> Path:
    shop = tiny.shop()
    rng = np.random.default_rng(0)
    ratings = pl.Series(rng.choice(SCALE, len(shop.interactions)))
    missing = pl.Series(rng.random(len(ratings)) < 0.2)
    log = shop.interactions.with_columns(rating=ratings.set(missing, None))
    shop = type(shop)(shop.catalog, log, shop.semantic_ids, shop.splits)
    model, tokenizer, _ = tiny.sid_lm(shop.semantic_ids)
    tiny.save_run(folder, shop, tiny.lm(len(tokenizer), context=512), tokenizer, 6, families)
    rows = pl.DataFrame({"task": ["rating"] * 5 + ["sequential"],
                         "rating": [5.0, 1.0, 4.5, 4.0, 5.0, 3.0]})  # fmt: skip
    write_parquet(stage_folder(folder, "build_dataset") / "train.parquet", rows)
    return folder


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    families = ("sequential", "rating", "explanation")
    return rated_run(tiny, tmp_path_factory.mktemp("rated") / "run", families)


@pytest.fixture(scope="module")
def rater(run: Path) -> Rater:
    log = InteractionLog.of(run / "data" / "interactions.parquet")
    return Rater(Recommender.load(run), log, trained_ratings(run))


def test_prompts_show_the_ratings_that_there_are(run, rater):
    split = read_split(run, "test", "test")
    rows = rater.rows(split)
    log = pl.read_parquet(run / "data" / "interactions.parquet")
    sids = rater.recommender.sids
    shown = 0
    for row in rows.iter_rows(named=True):
        own = log.filter(pl.col("user_id") == row["user_id"]).sort("position")
        before = own.filter(pl.col("position") < row["target_position"]).tail(6)
        assert before["item_index"].to_list() == row[HISTORY_ITEMS]
        assert before["rating"].to_list() == row["history_ratings"]
        pairs = [
            f"{sids[i]} {rating:g}"
            for i, rating in zip(before["item_index"], before["rating"], strict=True)
            if rating is not None
        ]
        if not pairs:
            continue
        one = rows.filter(pl.col("row_id") == row["row_id"])
        (ids,) = rater._prompts(one, "rating")
        text = rater.recommender.tokenizer.decode(ids)
        target = sids[row["target_item_index"]]
        assert f"Ratings given so far: {'; '.join(pairs)}. Rating for {target}: " == text
        shown += 1
    assert shown > 20


def test_probabilities_are_the_models_over_the_scale(run, rater):
    rows = rater.rows(read_split(run, "test", "test"))
    rows = rows.filter(pl.col("history_ratings").list.drop_nulls().list.len() > 0).head(6)
    found = rater.probabilities(rows)
    assert rater.values.tolist() == SCALE
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    tokenizer, model = rater.recommender.tokenizer, rater._own.model
    labels = [
        (*ids, tokenizer.eos_token_id)
        for ids in encode_text(tokenizer, [f"{value:g}" for value in SCALE])
    ]
    assert labels[2][: len(labels[1]) - 1] == labels[1][:-1]  # one begins the other
    for at, prompt in enumerate(rater._prompts(rows, "rating")):
        for place, label in enumerate(labels):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *label]])).logits[0].double()
            total = 0.0
            for step in range(len(label)):
                rivals = sorted({own[step] for own in labels
                                 if len(own) > step and own[:step] == label[:step]})  # fmt: skip
                chances = logits[len(prompt) - 1 + step, rivals].log_softmax(-1)
                total += float(chances[rivals.index(label[step])])
            assert found[at, place] == pytest.approx(np.exp(total), abs=1e-5)
    expected = rater.expected(found)
    assert expected == pytest.approx(found @ np.array(SCALE)) and (expected > 1).all()


def test_a_review_is_written_for_a_rating(run, rater):
    rows = rater.rows(read_split(run, "test", "test")).head(2)
    sampling = TextSampling(0.001, max_tokens=8)
    high, low = (rater.reviews(rows, np.array([r, r]), sampling) for r in (5.0, 1.0))
    assert len(high) == 2 and all(isinstance(text, str) for text in high)
    prompts = rater._prompts(rows.with_columns(rating=pl.lit(5.0)), "explanation")
    assert "rated" in rater.recommender.tokenizer.decode(prompts[0])
    assert high == rater.reviews(rows, np.array([5.0, 5.0]), sampling)
    assert len(low) == 2


def test_what_cannot_be_rated_is_refused(tiny, run, rater, tmp_path):
    rows = rater.rows(read_split(run, "test", "test")).head(1)
    empty = rows.with_columns(pl.Series("history_ratings", [[None]], dtype=pl.List(pl.Float64)))
    with pytest.raises(ValueError, match="holds no rating"):
        rater.probabilities(empty)
    other = rated_run(tiny, tmp_path / "run", ("sequential",))
    with pytest.raises(ValueError, match="was not trained on 'rating'"):
        Rater(Recommender.load(other), rater.log, SCALE)
    path = stage_folder(other, "build_dataset") / "train.parquet"
    write_parquet(path, pl.DataFrame({"task": ["rating"] * 300, "rating": np.arange(300) / 7}))
    with pytest.raises(ValueError, match="300 different ratings"):
        trained_ratings(other)
    write_parquet(path, pl.DataFrame({"task": ["sequential"], "rating": [1.0]}))
    with pytest.raises(ValueError, match="has no row of the family rating"):
        trained_ratings(other)
    write_parquet(path, pl.DataFrame({"task": ["sequential"]}))
    with pytest.raises(ValueError, match="holds no ratings"):
        trained_ratings(other)


def test_known_ratings_are_all_before_a_users_target(run):
    path = run / "data" / "interactions.parquet"
    log = pl.read_parquet(path)
    last = log.group_by("user_id").agg(n=pl.len())
    log = log.join(last, on="user_id")
    train, valid, test = (
        pl.read_parquet(run / "data" / f"{name}.parquet") for name in ("train", "valid", "test")
    )

    def wanted(held_out: int, of: pl.DataFrame = log) -> list[tuple]:
        mine = of.filter(pl.col("position") < pl.col("n") - held_out).drop_nulls("rating")
        return sorted(mine.select("user_id", "position", "item_index", "rating").rows())

    assert sorted(known_ratings(valid, [train], path).rows()) == wanted(2)
    # A test row's prompt shows the validation item and its rating, too.
    assert sorted(known_ratings(test, [train, valid], path).rows()) == wanted(1)
    # Of who has no such row: the parts before.
    one = test["user_id"][0]
    found = known_ratings(test.filter(pl.col("user_id") != one), [train], path)
    own = log.filter(pl.col("user_id") == one)
    assert sorted(found.filter(pl.col("user_id") == one).rows()) == wanted(2, own)
    unrated = run / "data" / "unrated.parquet"
    log.drop("n").with_columns(rating=pl.lit(None, dtype=pl.Float64)).write_parquet(unrated)
    with pytest.raises(ValueError, match="before the targets has a rating"):
        known_ratings(test, [train], unrated)
    unrated.unlink()


def test_the_shrinkage_is_chosen_on_each_users_newest_known_rating():
    """Where older ratings say all of the newest, little shrinkage; where nothing, much."""
    users = np.repeat(np.arange(60), 4)
    position = np.tile(np.arange(4), 60)
    taste = np.where(users % 2, 5.0, 1.0)
    table = {"user_id": users, "position": position, "target_item_index": position * 60 + users}
    steady = pl.DataFrame({**table, "rating": taste})
    fickle = pl.DataFrame({**table, "rating": np.where(position == 3, 6.0 - taste, taste)})
    for shuffled in (False, True):  # by position, not by the order of rows
        for known, shrinkage in ((steady, "0.01"), (fickle, "30")):
            found = baselines(known.sample(fraction=1, shuffle=shuffled, seed=0))
            assert list(found)[-1] == f"biases, ridge {shrinkage}"
    middle = baselines(steady.filter(position=3))  # one rating a user
    assert list(middle)[-1] == "biases, ridge 1"
    rows = pl.DataFrame({"user_id": [0], "target_item_index": [999]})
    # Fitted to all ratings, the newest as well.
    assert baselines(fickle)["user's mean"](rows) == pytest.approx((1 + 1 + 1 + 5) / 4)


def test_biases_find_what_users_and_items_add():
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 200, 8000), rng.integers(0, 50, 8000)
    of_user, of_item = rng.normal(size=200), rng.normal(size=50)
    rating = 3 + of_user[users] + of_item[items] + 0.1 * rng.normal(size=8000)
    table = pl.DataFrame({"user_id": users, "target_item_index": items, "rating": rating})
    train, rows = table[:6000], table[6000:]
    truth = rows["rating"].to_numpy()

    def rmse(values: np.ndarray) -> float:
        return float(np.sqrt(((values - truth) ** 2).mean()))

    assert rmse(biases(train, 0.3)(rows)) < 0.15
    assert rmse(mean_rating(train)(rows)) > 1.2
    for by in ("user_id", "target_item_index"):
        assert 0.8 < rmse(mean_rating(train, by)(rows)) < 1.2
    stranger = pl.DataFrame({"user_id": [999], "target_item_index": [999]})
    mean = train["rating"].mean()
    for predict in (mean_rating(train, "user_id"), biases(train, 1.0)):
        assert predict(stranger)[0] == pytest.approx(mean, abs=0.2)
    order = pl.int_range(pl.len()).over("user_id")
    chosen = baselines(train.with_columns(position=order))
    assert list(chosen)[-1].startswith("biases, ridge 0.")
    for predict in chosen.values():
        values = predict(rows)
        assert values.min() >= train["rating"].min() and values.max() <= train["rating"].max()


def test_errors_by_hand():
    truth = np.array([1.0, 2.0, 5.0, 4.0])
    systems = {"good": truth + [0.0, 1.0, 0.0, -1.0], "bad": truth + [2.0, 2.0, -2.0, -2.0]}
    found = rating_errors(truth, systems, np.array([0, 0, 1, 2]), "bad", samples=200)
    assert found["good"]["rmse"]["value"] == pytest.approx(np.sqrt(0.5))
    assert found["good"]["mae"]["value"] == pytest.approx(0.5)
    assert found["bad"]["rmse"] == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert found["bad"]["mae_minus"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    less = found["good"]["mae_minus"]
    assert less["value"] == pytest.approx(-1.5) and less["low"] <= -1.5 <= less["high"] < 0


def test_the_command(run, in_process, tmp_path):
    split = read_split(run, "test", "test")
    user = split["user_id"][0]
    said = in_process("rate", run, "--user", user, "--item", "105", "--max_tokens", "5")
    assert f"user {user}, item 105:" in said and "expected rating" in said
    assert "(of 1 to 5)" in said and "nothing in it is checked" in said
    shares = [float(share) for share in re.findall(r"^ +[\d.]+ +([\d.]+)%", said, re.MULTILINE)]
    assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=0.3)
    out = tmp_path / "rated"
    said = in_process("rate", run, "--rows", "12", "--output_dir", str(out), "--samples", "50")
    assert "12 rated targets of the test split" in said and "biases, ridge" in said
    table, figures = pl.read_parquet(out / "ratings.parquet"), read_json(out / "ratings.json")
    assert len(table) == figures["rows"] == 12 and table["rating"].null_count() == 0
    assert table["predicted"].is_between(1, 5).all() and "p_4.5" in table.columns
    off = table["predicted"] - table["rating"]
    model = figures["systems"]["model, mean of its distribution"]
    assert model["mae"]["value"] == pytest.approx(float(off.abs().to_numpy().mean()))
    assert "ids look like" in in_process("rate", run, "--user", user, "--item", "x", fails=True)
    for flags, message in (
        ([], "give --user for one rating"),
        (["--rows", "3"], "rows and output_dir belong together"),
        (["--rows", "3", "--output_dir", str(out)], "exists; name a new folder"),
        (["--rows", "3", "--output_dir", "o", "--item", "105"], "needs the --user"),
        (["--user", "nobody"], "has no row in the test split"),
    ):
        assert message in in_process("rate", run, *flags, fails=True)
