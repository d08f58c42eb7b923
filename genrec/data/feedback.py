"""Which interactions count as implicit feedback, and how much: event weights and rating rules.

Every rule looks at an interaction and at what its user did before, never at anything later, so that
no decision on a training interaction knows a held-out one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import polars as pl

from genrec.columns import EVENT, RATING, USER_ID, WEIGHT

ALL = "all"
AT_LEAST = "at-least"
ABOVE_USER_MEAN = "above-user-mean"
RATING_RULES = (ALL, AT_LEAST, ABOVE_USER_MEAN)
ANY_EVENT = "*"

_SHOWN = 8  # events that an error lists
_TOLERANCE = 1e-9  # of sums of ratings such as 4.1, which floats don't hold exactly


def parse_event_weights(pairs: Iterable[str]) -> dict[str, float]:
    """``["view=0.2", "purchase=1"]`` -> event -> weight.

    Raises:
        ValueError: no "=", an event twice, or a weight that isn't a number of at least 0.
    """
    weights: dict[str, float] = {}
    for pair in pairs:
        event, equals, text = pair.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not equals or not event.strip() or not 0 <= weight < math.inf:
            raise ValueError(
                f"event_weights holds {pair!r}; write event=weight with a weight of at least 0, "
                "such as view=0.2 (0 drops the event, *=1 stands for all others)"
            )
        if event.strip() in weights:
            raise ValueError(f"event_weights names {event.strip()!r} twice; keep one of them")
        weights[event.strip()] = weight
    return weights


def weigh_events(
    interactions: pl.DataFrame, weights: Mapping[str, float] | None = None
) -> pl.DataFrame:
    """Set `weight` from the events, and drop interactions whose weight is 0.

    A weight that the source gives is multiplied; one that is missing counts 1. Without `weights`
    the source's alone remain, and without those, too, the log is returned as it is.

    Args:
        interactions: the log, with `event` if `weights` are given.
        weights: event -> weight; ``"*"`` stands for all events that aren't named, and for none.

    Raises:
        ValueError: there are no events, some aren't named (they are listed with their counts), a
            name is no event of the data, a weight is negative or no number, or nothing is left.
    """
    if weights is None and WEIGHT not in interactions.columns:
        return interactions
    weight = pl.lit(1.0)
    if WEIGHT in interactions.columns:
        given = interactions[WEIGHT]
        if (bad := ~(given.is_finite() & (given >= 0)) & given.is_not_null()).any():
            row = int(bad.arg_true()[0])
            raise ValueError(
                f"weight {given[row]!r} of interaction {row + 1} is no number of at least 0; mend "
                "it, or leave the weight column unset"
            )
        weight = pl.col(WEIGHT).fill_null(1.0)
    if weights is not None:
        _check_events(interactions, weights)
        factor = pl.col(EVENT).replace_strict(
            weights, default=weights.get(ANY_EVENT), return_dtype=pl.Float64
        )
        weight = weight * factor
    kept = interactions.with_columns(weight.cast(pl.Float64).alias(WEIGHT)).filter(
        pl.col(WEIGHT) > 0
    )
    if kept.is_empty():
        raise ValueError(
            f"all weights are 0 (event_weights={dict(weights or {})}): nothing is left"
        )
    return kept


def _check_events(interactions: pl.DataFrame, weights: Mapping[str, float]) -> None:
    if EVENT not in interactions.columns:
        raise ValueError("event_weights needs events; name their column (event_column)")
    counts = interactions.group_by(EVENT).len().sort("len", EVENT, descending=[True, False])
    named = [event for event in weights if event != ANY_EVENT]
    known = counts[EVENT].to_list()
    if unused := [event for event in named if event not in known]:
        raise ValueError(
            f"event_weights names {unused[0]!r}, which is no event of the data; they have "
            + ", ".join(repr(event) for event in known[:_SHOWN])
        )
    unnamed = counts.filter(~pl.col(EVENT).is_in(named).fill_null(False))
    if unnamed.height and ANY_EVENT not in weights:
        listed = ", ".join(
            f"{'(none)' if event is None else event}: {count:,}"
            for event, count in unnamed.head(_SHOWN).iter_rows()
        )
        more = f" and {unnamed.height - _SHOWN} more" if unnamed.height > _SHOWN else ""
        raise ValueError(
            f"event_weights doesn't name these events: {listed}{more}; give each a weight (0 drops "
            "it), or *=1 for all others"
        )


def filter_rating(interactions: pl.DataFrame, min_rating: float | None) -> pl.DataFrame:
    """Keep interactions rated at least `min_rating` as implicit feedback; None keeps all.

    Raises:
        ValueError: a threshold is given, but interactions lack a rating, or none reaches it.
    """
    if min_rating is None:
        return interactions
    _require_ratings(interactions, f"min_rating={min_rating}", "min_rating")
    kept = interactions.filter(pl.col(RATING) >= min_rating)
    if kept.height == 0:
        raise ValueError(
            f"min_rating={min_rating} leaves no interactions; the highest rating is "
            f"{interactions[RATING].max()!r}"
        )
    return kept


def filter_above_user_mean(interactions: pl.DataFrame) -> pl.DataFrame:
    """Keep interactions rated at least the mean of the user's ratings up to and including them.

    The mean of *all* of a user's ratings would let a held-out rating decide whether an earlier
    interaction trains; this one is known when the interaction happens. A user's first interaction
    is always kept.

    Args:
        interactions: the log, each user's rows in their order.

    Raises:
        ValueError: interactions lack a rating.
    """
    _require_ratings(interactions, f"rating_rule={ABOVE_USER_MEAN!r}", "rating_rule")
    total = pl.col(RATING).cum_sum().over(USER_ID)
    count = pl.col(RATING).cum_count().over(USER_ID)
    return interactions.filter(pl.col(RATING) * count >= total - _TOLERANCE * count)


def effective_rating_rule(rating_rule: str | None, min_rating: float | None) -> str:
    """The rating rule that two settings name together.

    Raises:
        ValueError: they contradict each other.
    """
    if rating_rule is None:
        return ALL if min_rating is None else AT_LEAST
    if (rating_rule == AT_LEAST) != (min_rating is not None):
        raise ValueError(
            f"rating_rule={rating_rule!r} with min_rating={min_rating}: min_rating belongs to "
            f"rating_rule: {AT_LEAST}, and only to it"
        )
    return rating_rule


def rating_rule_text(rating_rule: str, min_rating: float | None) -> str:
    """The rule in words, as split.json states it."""
    if rating_rule == AT_LEAST:
        return f"interactions rated {min_rating:g} or more, as implicit feedback"
    if rating_rule == ABOVE_USER_MEAN:
        return (
            "interactions rated at least the mean of their user's ratings up to and including "
            "them, as implicit feedback"
        )
    return "all interactions"


def _require_ratings(interactions: pl.DataFrame, rule: str, setting: str) -> None:
    missing = interactions[RATING].null_count()
    if missing:
        raise ValueError(
            f"{rule} needs a rating on every interaction, {missing} of "
            f"{interactions.height} have none; name the rating column or leave {setting} unset"
        )
