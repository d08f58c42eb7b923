"""Event weights and rating rules: what counts as feedback, and that nothing later decides it."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data import feedback


def log_of(rows: list[tuple], *names: str) -> pl.DataFrame:
    kinds = {"rating": pl.Float64, "weight": pl.Float64}
    return pl.DataFrame(
        rows, schema=[(n, kinds.get(n, pl.String)) for n in ("user_id", "item_id", *names)],
        orient="row",
    )  # fmt: skip


SEEN = [("u", "a", "view"), ("u", "b", "buy"), ("v", "a", "view"), ("v", "c", "cart")]
EVENTS = log_of([*SEEN, ("v", "d", None)], "event")


def test_event_weights_are_read_from_pairs():
    pairs = ["view=0.2", " buy = 1", "a=b=3", "*=0"]
    expected = {"view": 0.2, "buy": 1.0, "a=b": 3.0, "*": 0.0}
    assert feedback.parse_event_weights(pairs) == expected


@pytest.mark.parametrize("pair", ["view", "view=", "=1", "view=-1", "view=nan", "view=inf", " =2"])
def test_pairs_that_are_none(pair: str):
    with pytest.raises(ValueError, match="event_weights holds .*; write event=weight"):
        feedback.parse_event_weights([pair])


def test_an_event_is_named_once():
    with pytest.raises(ValueError, match="names 'view' twice"):
        feedback.parse_event_weights(["view=1", "view=2"])


def test_weights_follow_the_event_and_zero_drops():
    weighed = feedback.weigh_events(EVENTS, {"view": 0.2, "buy": 1.0, "*": 0.5})
    assert weighed["weight"].to_list() == [0.2, 1.0, 0.2, 0.5, 0.5]
    weighed = feedback.weigh_events(EVENTS, {"view": 0.0, "*": 2.0})
    assert weighed["item_id"].to_list() == ["b", "c", "d"]
    assert weighed["weight"].to_list() == [2.0, 2.0, 2.0]


def test_a_source_weight_is_multiplied_and_counts_one_where_it_is_missing():
    log = EVENTS.with_columns(pl.Series("weight", [3.0, None, 0.5, 0.0, 1.0]))
    assert feedback.weigh_events(log)["weight"].to_list() == [3.0, 1.0, 0.5, 1.0]
    weighed = feedback.weigh_events(log, {"view": 0.5, "*": 1.0})
    assert weighed["weight"].to_list() == [1.5, 1.0, 0.25, 1.0]
    assert feedback.weigh_events(EVENTS) is EVENTS


def test_events_without_a_weight_are_listed_with_their_counts():
    with pytest.raises(ValueError, match=r"these events: view: 2, \(none\): 1, cart: 1; give each"):
        feedback.weigh_events(EVENTS, {"buy": 1.0})
    with pytest.raises(ValueError, match=r"these events: \(none\): 1;"):
        feedback.weigh_events(EVENTS, {"buy": 1.0, "view": 1.0, "cart": 0.0})
    many = log_of([("u", "a", f"e{i}") for i in range(11)], "event")
    with pytest.raises(ValueError, match="e6: 1 and 2 more; give each"):
        feedback.weigh_events(many, {"e9": 1.0})


@pytest.mark.parametrize(
    ("log", "weights", "message"),
    [
        (EVENTS, {"vieuw": 1.0, "*": 1.0}, "names 'vieuw', which is no event.*'view'"),
        (EVENTS, {"*": 0.0}, "all weights are 0"),
        (EVENTS.drop("event"), {"view": 1.0}, "needs events; name their column"),
        (EVENTS.with_columns(weight=pl.lit(-0.5)), None, "weight -0.5 of interaction 1 is no"),
        (EVENTS.with_columns(weight=pl.lit(float("nan"))), None, "weight nan of interaction 1"),
    ],
)
def test_weights_that_cannot_be_used(log: pl.DataFrame, weights, message: str):
    with pytest.raises(ValueError, match=message):
        feedback.weigh_events(log, weights)


def rated(rows: list[tuple[str, float]]) -> pl.DataFrame:
    return log_of([(u, f"i{n}", r) for n, (u, r) in enumerate(rows)], "rating")


def test_above_the_mean_of_what_the_user_rated_so_far():
    # u: 4 (mean 4) kept, 2 (3) not, 3 (3) kept, 3 (3) kept, 5 (3.4) kept, 3 (3.33) not; v: 1 kept.
    log = rated([("u", 4), ("u", 2), ("v", 1), ("u", 3), ("u", 3), ("u", 5), ("u", 3)])
    assert feedback.filter_above_user_mean(log)["item_id"].to_list() == [
        "i0",
        "i2",
        "i3",
        "i4",
        "i5",
    ]


def test_equal_ratings_are_all_kept_whatever_floats_make_of_their_sum():
    log = rated([("u", 4.1)] * 50)
    assert feedback.filter_above_user_mean(log).height == 50


RATED = st.lists(
    st.tuples(st.sampled_from("uvw"), st.sampled_from([0.5, 1, 2.5, 3, 4.1, 5])), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(RATED, RATED)
def test_later_ratings_change_nothing(now, later):
    """A training interaction is kept or not whatever its user rates afterwards."""
    kept = feedback.filter_above_user_mean(rated(now))
    after = feedback.filter_above_user_mean(rated(now + later))
    known = after.filter(pl.col("item_id").is_in([f"i{n}" for n in range(len(now))]))
    assert known.equals(kept)
    for user in "uvw":  # the definition, one interaction at a time
        so_far, expected = [], []
        for n, (who, rating) in enumerate(now):
            if who == user:
                so_far.append(rating)
                if rating >= sum(so_far) / len(so_far) - 1e-9:
                    expected.append(f"i{n}")
        assert kept.filter(pl.col("user_id") == user)["item_id"].to_list() == expected


def test_a_rule_of_ratings_needs_ratings():
    log = rated([("u", 4), ("u", 2)]).with_columns(pl.lit(None, dtype=pl.Float64).alias("rating"))
    with pytest.raises(ValueError, match="rating_rule='above-user-mean' needs a rating.*2 of 2"):
        feedback.filter_above_user_mean(log)
    with pytest.raises(ValueError, match="min_rating=1 needs a rating.*2 of 2 have none"):
        feedback.filter_rating(log, 1)


def test_min_rating_keeps_the_threshold_itself():
    log = rated([("u", 3.0), ("u", 4.0), ("u", 5.0)])
    assert feedback.filter_rating(log, 4)["item_id"].to_list() == ["i1", "i2"]
    assert feedback.filter_rating(log, None).height == 3
    with pytest.raises(ValueError, match=r"min_rating=6 leaves no interactions.*5\.0"):
        feedback.filter_rating(log, 6)


@pytest.mark.parametrize(
    ("rule", "least", "expected"),
    [(None, None, "all"), (None, 0.0, "at-least"), ("at-least", 4.0, "at-least"),
     ("above-user-mean", None, "above-user-mean"), ("all", None, "all")],
)  # fmt: skip
def test_two_settings_name_one_rule(rule, least, expected):
    assert feedback.effective_rating_rule(rule, least) == expected
    text = feedback.rating_rule_text(expected, least)
    assert text.startswith(
        {"all": "all inter", "at-least": "interactions rated ", "above-user-mean": "interactions "}[
            expected
        ]
    )


@pytest.mark.parametrize(
    ("rule", "least"), [("at-least", None), ("all", 3.0), ("above-user-mean", 3)]
)
def test_settings_that_contradict_each_other(rule, least):
    with pytest.raises(ValueError, match="min_rating belongs to rating_rule: at-least"):
        feedback.effective_rating_rule(rule, least)
