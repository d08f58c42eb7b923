"""The data linter: every check against hand-computed values, each defect found, no false alarm.

One long file: all checks are tested on the same few small logs.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.data.cleaning import CleanData, clean
from genrec.data.lint import Finding, lint_run_tables, to_json, worst_first
from genrec.data.lint_tables import (
    first_value,
    graded,
    id_order,
    near_by_chance,
    rank_correlation,
    shown,
    user_z,
)
from genrec.data.readers import read_movielens, read_sequences
from genrec.data.splits import leave_one_out
from genrec.data.time_splits import global_time, time_cutoff

NAMES = [
    "item ids against first appearance",
    "small steps between item ids",
    "targets beside the last item's id",
    "user ids against time",
    "histories sorted by item id",
    "histories sorted by title",
    "ties at the test target",
    "held-out items in user ids",
    "training after test targets",
    "test items never trained on",
    "repeated test targets",
    "duplicate interactions",
    "users with the same sequence",
    "users of extreme length",
    "titles shared by items",
    "missing titles",
    "token-like text in item text",
    "template marks in item text",
    "control or broken characters in item text",
    "markup in item text",
    "very long titles",
]
DAY = 86_400


@dataclass(frozen=True)
class Case:
    """Tables as the linter gets them."""

    interactions: pl.DataFrame
    catalog: pl.DataFrame
    train: pl.DataFrame
    valid: pl.DataFrame
    test: pl.DataFrame
    protocol: str

    def lint(self) -> dict[str, Finding]:
        findings = lint_run_tables(**vars(self))
        assert [finding.name for finding in findings] == NAMES
        for finding in findings:
            assert finding.severity in ("bad", "look", "not run", "ok") and finding.text
            assert (finding.severity == "not run") <= ("not checked" in finding.text) or (
                finding.value is not None
            )
        return {finding.name: finding for finding in findings}

    def titled(self, titles: Mapping[int, str | None], **columns: Sequence[str | None]) -> Case:
        """With other titles of some catalogue rows, and further columns."""
        column = [titles.get(i, t) for i, t in enumerate(self.catalog["title"])]
        more = [pl.Series(name, values, dtype=pl.String) for name, values in columns.items()]
        table = self.catalog.with_columns(pl.Series("title", column, dtype=pl.String), *more)
        return replace(self, catalog=table)


def case(
    sequences: Mapping[str | int, Sequence[int]],
    times: Mapping[str | int, Sequence[int]] | None = None,
    item_ids: Sequence[str | int] | None = None,
    protocol: str = "leave-one-out",
    **cut: int,
) -> Case:
    """Tables of a log: sequences of item indices (and times) by user, ids as catalogue order."""
    n_items = len(item_ids) if item_ids else 1 + max(i for s in sequences.values() for i in s)
    ids = list(item_ids) if item_ids else list(range(1, n_items + 1))
    log = pl.DataFrame(
        [
            (user, ids[item], item, times[user][place] if times else None, None, place)
            for user, items in sequences.items()
            for place, item in enumerate(items)
        ],
        schema={
            "user_id": pl.String if isinstance(next(iter(sequences)), str) else pl.Int64,
            "item_id": pl.String if isinstance(ids[0], str) else pl.Int64,
            "item_index": pl.Int32, "timestamp": pl.Int64, "rating": pl.Float64,
            "position": pl.Int32,
        },
        orient="row",
    )  # fmt: skip
    words = ("wool", "oak", "tea", "cork", "silk", "clay")
    catalog = pl.DataFrame(
        {
            "item_index": pl.Series(range(n_items), dtype=pl.Int32),
            "item_id": ids,
            "title": [
                f"{words[i * 7 % 6]} thing of kind {i * 37 % 101}.{i}" for i in range(n_items)
            ],
        }
    )
    if protocol == "leave-one-out":
        splits = leave_one_out(log, n_items, 4)
    elif protocol == "global-time":
        splits = global_time(log, n_items, 4)
    else:
        splits = time_cutoff(log, n_items, cut["valid_from"], cut["test_from"], max_history=4)
    return Case(log, catalog, splits.train, splits.valid, splits.test, protocol)


def as_given(made: Case) -> Case:
    """The same rows as a split that was given: the log holds what trains, without times."""
    held = made.valid.select("user_id", pl.col("target_position").alias("_held"))
    log = made.interactions.join(held, on="user_id", how="left", maintain_order="left")
    log = log.filter(pl.col("position") < pl.col("_held")).drop("_held")
    log = log.with_columns(pl.lit(None, dtype=pl.Int64).alias("timestamp"))
    return replace(made, interactions=log, protocol="given")


def neutral(seed: int = 0, users: int = 300, n_items: int = 150, **kwargs) -> Case:
    """A log in which ids, order and titles mean nothing."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(3, n_items + 3)
    weights = rng.permutation(weights / weights.sum())
    sequences = {
        f"user {u}": rng.choice(n_items, int(rng.integers(5, 15)), replace=False, p=weights)
        for u in rng.permutation(users).tolist()
    }
    times = {
        u: np.sort(rng.choice(10_000_000, len(s), replace=False)).tolist()
        for u, s in sequences.items()
    }
    return case({u: s.tolist() for u, s in sequences.items()}, times, **kwargs)


# No false alarms, whatever the protocol.


@pytest.mark.parametrize("seed", range(4))
def test_a_log_without_meaning_raises_no_alarm(seed):
    found = neutral(seed).lint()
    assert {finding.severity for finding in found.values()} == {"ok"}
    assert not any(finding.example for finding in found.values())


def test_protocols_by_time_have_no_training_after_the_cut():
    for protocol in ("global-time", "time-cutoff"):
        made = neutral(1, protocol=protocol, valid_from=8_000_000, test_from=9_000_000)
        assert made.protocol == protocol
        found = made.lint()
        assert found["training after test targets"].value == 0
        assert {f.severity for n, f in found.items() if n != "test items never trained on"} == {
            "ok"
        }


def test_the_same_tables_give_the_same_findings():
    made = neutral()
    first, again = made.lint(), made.lint()
    assert first == again
    plain = to_json(first.values())
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert set(plain[0]) == {"name", "severity", "value", "threshold", "text", "example"}


def test_a_given_split_is_checked_by_its_rows():
    made = neutral(2, protocol="leave-one-out")
    found = as_given(made).lint()
    assert found["user ids against time"].severity == "not run"
    assert found["ties at the test target"].value == 0
    late = (made.train["target_timestamp"] > made.test["target_timestamp"].min()).mean()
    assert found["training after test targets"].value == pytest.approx(late) and late > 0
    assert found["training after test targets"].severity == "bad"
    untimed = replace(
        as_given(made),
        test=made.test.with_columns(pl.lit(None, dtype=pl.Int64).alias("target_timestamp")),
    ).lint()
    for name in ("ties at the test target", "training after test targets"):
        assert untimed[name].severity == "not run" and untimed[name].value is None


def test_ties_of_given_rows_count_rows_of_every_part():
    rows = {
        "user_id": pl.String, "history_item_index": pl.List(pl.Int32),
        "target_item_index": pl.Int32, "target_timestamp": pl.Int64, "target_position": pl.Int32,
    }  # fmt: skip

    def table(*content: tuple) -> pl.DataFrame:
        return pl.DataFrame(content, schema=rows, orient="row")

    made = case({"a": [0, 1, 2], "b": [2, 1, 0]})
    made = replace(
        made,
        train=table(("a", [0], 1, 5 * DAY, 1), ("b", [2], 1, None, 1)),
        valid=table(("a", [0, 1], 2, 7 * DAY, 2)),
        # a's first two share their day with a training and a validation target, b's with none.
        test=table(
            ("a", [0], 2, 5 * DAY, 3), ("a", [0], 0, 7 * DAY, 4), ("a", [0], 0, 8 * DAY, 5),
            ("b", [0], 2, 5 * DAY, 3),
        ),
        protocol="given",
    )  # fmt: skip
    ties = made.lint()["ties at the test target"]
    assert ties.value == 0.5 and ties.severity == "bad" and "day" in ties.text


@pytest.mark.parametrize("protocol", ["leave-one-out", "given"])
def test_empty_tables_are_no_error(protocol):
    made = neutral()
    empty = Case(
        made.interactions.clear(), made.catalog.clear(), made.train.clear(), made.valid.clear(),
        made.test.clear(), protocol,
    )  # fmt: skip
    found = empty.lint()
    assert not {finding.severity for finding in found.values()} & {"bad", "look"}
    # Rows without held-out ones are checked as far as they go.
    found = replace(made, valid=made.valid.clear(), test=made.test.clear()).lint()
    assert found["test items never trained on"].severity == "not run"
    assert found["item ids against first appearance"].severity == "ok"


def test_a_log_out_of_order_is_refused():
    made = neutral()
    with pytest.raises(ValueError, match="one block per user"):
        replace(made, interactions=made.interactions.reverse()).lint()


# Ids and time.


def numbered(by_time: bool) -> Case:
    """A log whose items were numbered when first met, user after user or by the clock."""
    made = neutral(5)
    log = made.interactions.sort("timestamp") if by_time else made.interactions
    order = log["item_index"].unique(maintain_order=True).to_list()
    new = {item: number for number, item in enumerate(order)}
    rows = made.interactions.partition_by("user_id", maintain_order=True)
    return case(
        {r["user_id"][0]: [new[i] for i in r["item_index"]] for r in rows},
        {r["user_id"][0]: r["timestamp"].to_list() for r in rows},
    )


@pytest.mark.parametrize("by_time", [False, True])
def test_ids_numbered_by_the_log_are_bad(by_time):
    finding = numbered(by_time).lint()["item ids against first appearance"]
    assert finding.severity == "bad" and finding.value == pytest.approx(1)
    assert ("+1.000" in finding.text.split(" by time")[0].split("user,")[-1]) == by_time
    if not by_time:
        assert finding.example == "the log begins with items 1, 2, 3, 4, 5"


def test_ids_that_follow_popularity_are_told_apart():
    made = neutral(3, users=1500)
    counts = np.bincount(made.interactions["item_index"].to_numpy(), minlength=150)
    new = np.empty(150, dtype=int)
    new[np.argsort(-counts, kind="stable")] = np.arange(150)
    rows = made.interactions.partition_by("user_id", maintain_order=True)
    popular = case(
        {r["user_id"][0]: new[r["item_index"].to_numpy()].tolist() for r in rows},
        {r["user_id"][0]: r["timestamp"].to_list() for r in rows},
    )
    finding = popular.lint()["item ids against first appearance"]
    assert finding.value is not None and finding.value > 0.5 and finding.severity == "ok"


def test_user_ids_that_follow_time():
    sequences = {u: [u % 7, (u + 1) % 7, (u + 2) % 7] for u in range(60)}
    times = {u: [1000 * u, 1000 * u + 1, 90_000 + u] for u in range(60)}
    found = case(sequences, times).lint()["user ids against time"]
    assert found.severity == "look" and found.value == pytest.approx(1)
    few = {u: times[u] for u in range(20)}
    found = case({u: sequences[u] for u in few}, few).lint()["user ids against time"]
    assert found.severity == "ok" and found.value == pytest.approx(1)  # z = √19
    shuffled = {u: [(u * 37 % 60) * 1000, 70_000 + u, 90_000 + u] for u in range(60)}
    assert case(sequences, shuffled).lint()["user ids against time"].severity == "ok"


def test_small_steps_have_the_exact_mean_of_shuffled_histories():
    # Four histories over nine items (steps of one id count), by every order of each.
    sequences = {"a": [0, 1, 2, 8], "b": [5, 6, 5], "c": [7, 3], "d": [4, 4]}

    def small(items: Sequence[int]) -> int:
        return sum(abs(x - y) == 1 for x, y in itertools.pairwise(items))

    expected = sum(
        np.mean([small(order) for order in itertools.permutations(items)])
        for items in sequences.values()
    )
    finding = case(sequences).lint()["small steps between item ids"]
    assert finding.value == pytest.approx((2 + 2 + 0) / expected)
    assert "57.14% of the steps" in finding.text and f"{expected / 7:.2%}" in finding.text
    assert finding.severity == "ok"  # four users prove nothing


def test_targets_beside_the_last_id():
    # 40 users go up by one id at the end; shuffled targets would rarely be so near.
    rng = np.random.default_rng(0)
    last = rng.permutation(200)[:40] * 2
    sequences = {f"u{k}": [int(i) ^ 3, int(i) ^ 5, int(i), int(i) + 1] for k, i in enumerate(last)}
    made = case(sequences, item_ids=range(1000, 1410))
    finding = made.lint()["targets beside the last item's id"]
    assert finding.value == 1 and finding.severity == "look"
    near = sum(abs(a - (b + 1)) in range(1, 6) for a in last.tolist() for b in last.tolist())
    assert f"{near / 1600:.2%} by chance" in finding.text
    assert finding.example == f"user 'u0': after item {1000 + last[0]} comes {1001 + last[0]}"


def test_histories_sorted_within_a_day():
    made = neutral(4, users=200)
    rows = made.interactions.partition_by("user_id", maintain_order=True)
    times = {r["user_id"][0]: [DAY * (i // 4) for i in range(r.height)] for r in rows}
    sequences = {
        r["user_id"][0]: [
            i for k in range(0, r.height, 4) for i in sorted(r["item_index"].to_list()[k : k + 4])
        ]
        for r in rows
    }
    found = case(sequences, times).lint()
    finding = found["histories sorted by item id"]
    assert (finding.value, finding.severity) == (1, "bad") and "one day" in finding.text
    assert found["histories sorted by title"].severity == "ok"
    pairs = sum(min(4, r.height - k) - 1 for r in rows for k in range(0, r.height, 4))
    assert f"100.0% of {pairs:,} neighbouring pairs" in finding.text
    few = dict(itertools.islice(sequences.items(), 20))
    finding = case(few, {u: times[u] for u in few}).lint()["histories sorted by item id"]
    assert (finding.value, finding.severity) == (1, "ok")  # z = √20 at most
    # Pairs of different days don't count.
    apart = {u: [DAY * i for i in range(len(t))] for u, t in times.items()}
    finding = case(sequences, apart).lint()["histories sorted by item id"]
    assert finding.severity == "ok" and finding.value is None
    # Without times whole histories are looked at, and what can't be told is said.
    finding = case(sequences).lint()["histories sorted by item id"]
    assert finding.severity == "look" and "can't be told" in finding.text
    plain = case({r["user_id"][0]: r["item_index"].to_list() for r in rows})
    assert plain.lint()["histories sorted by item id"].severity == "not run"


def test_descending_and_missing_titles_count_too():
    sequences = {f"u{k}": [3, 2, 1, 0] for k in range(40)}
    times = {u: [0, 0, 0, 0] for u in sequences}
    made = case(sequences, times, item_ids=["a", "b", "c", "d"])
    made = made.titled({0: "Item a", 1: "oak", 2: "pine", 3: "  "})
    found = made.lint()
    assert found["histories sorted by item id"].value == 1
    assert "0.0% of 120" in found["histories sorted by item id"].text
    # Only pine → oak has two titles.
    assert "0.0% of 40" in found["histories sorted by title"].text
    assert found["missing titles"].value == 0.5
    assert found["ties at the test target"].severity == "bad"


def test_ties_at_the_target_by_second_and_day():
    sequences = {f"u{k}": [k % 5, (k + 1) % 5, (k + 2) % 5] for k in range(10)}
    times = {f"u{k}": [5, 90, 90 if k < 2 else (95 if k < 5 else 3 * DAY)] for k in range(10)}
    finding = case(sequences, times).lint()["ties at the test target"]
    assert finding.value == pytest.approx(0.2) and finding.severity == "look"
    assert "20.0%" in finding.text and "50.0% their day" in finding.text


# Held-out items in user ids.


@pytest.mark.parametrize("pattern", ["{}", "u-{}", "x{}y", "{}.pdf", "A{}"])
def test_targets_in_user_ids(pattern):
    rng = np.random.default_rng(0)
    targets = rng.permutation(np.arange(10, 90))
    sequences = {}
    for target in targets.tolist():
        rest = [i for i in rng.permutation(100)[:4].tolist() if i != target][:3]
        sequences[pattern.format(500 + target)] = [*rest, target]
    finding = case(sequences, item_ids=range(500, 600)).lint()["held-out items in user ids"]
    assert finding.severity == "bad" and finding.value == pytest.approx(0.5, abs=0.02)
    assert finding.example and str(int(targets[0]) + 500) in finding.example


def test_parts_of_tokens_and_chance_are_no_leak():
    rng = np.random.default_rng(0)
    # Longer numbers that hold the item's digits; and user numbers that meet items by chance.
    longer = {f"u9{100 + k}": [k % 7, 8, 9, k] for k in range(10, 60)}
    finding = case(longer, item_ids=range(100, 160)).lint()["held-out items in user ids"]
    assert finding.value == 0 and finding.severity == "ok"
    meets = {k: [*rng.permutation(20)[:4].tolist()] for k in range(1, 300)}
    assert case(meets).lint()["held-out items in user ids"].severity == "ok"
    words = {f"user {k}": [0, 1, 2, 3] for k in range(20)}
    nameless = case(words, item_ids=["-", "--", "…", "_"])
    assert nameless.lint()["held-out items in user ids"].value == 0


def test_ids_of_several_words_and_any_relevant_item():
    sequences = {f"ann/b-{k}/sku": [k, 20, 21, 22] for k in range(8)}
    times = {u: [1, 50, 70, 90] for u in sequences}
    ids = [f"B-{k}" for k in range(23)]
    made = case(sequences, times, ids, "time-cutoff", valid_from=40, test_from=60)
    assert made.lint()["held-out items in user ids"].value == 0
    # The item in the id is the second of those that answer the test row.
    rows = {u: [20, 21, 22, int(u.split("-")[1].split("/")[0])] for u in sequences}
    made = case(rows, times, ids, "time-cutoff", valid_from=40, test_from=60)
    finding = made.lint()["held-out items in user ids"]
    assert finding.severity == "bad" and finding.value == pytest.approx(8 / 24)


# The split and the log.


def test_training_after_the_test_targets():
    sequences = {"a": [0, 1, 2, 3, 4], "b": [1, 2, 3], "c": [4, 3, 2, 1], "d": [0, 1, 2] * 3}
    times = {"a": [1, 2, 3, 4, 5], "b": [10, 11, 12], "c": [5, 20, 30, 40], "d": [*range(100, 109)]}
    # Training: a at 1, 2, 3; b at 10; c at 5, 20; d at 100 … 106, in several windows. Test targets
    # at 5, 12, 40 and 108; their median is 26.
    finding = case(sequences, times).lint()["training after test targets"]
    assert finding.value == pytest.approx(7 / 13) and finding.severity == "look"
    assert "69.2%" in finding.text and "53.8%" in finding.text
    late = replace(case(sequences, times), protocol="global-time")
    finding = late.lint()["training after test targets"]
    assert finding.severity == "bad" and finding.value == pytest.approx(9 / 13)
    untimed = case(sequences).lint()["training after test targets"]
    assert untimed.severity == "not run" and untimed.value is None


def test_cold_and_repeated_targets():
    sequences = {"a": [0, 1, 2, 5], "b": [1, 2, 0, 1], "c": [0, 1, 2, 2], "d": [1, 0, 2, 3]}
    sequences["e"] = [1, 0, 2, 0, 2, 0, 1]  # the target lies before the row's four items
    found = case(sequences).lint()
    cold = found["test items never trained on"]  # training has items 0, 1 and 2
    assert cold.value == 0.4 and cold.severity == "bad" and cold.example == "item 6"
    assert "40.0% of the test rows, 50.0% of the 4 items tested" in cold.text
    repeated = found["repeated test targets"]
    assert repeated.value == 0.6 and "20.0% the very last one" in repeated.text
    assert repeated.severity == "look" and repeated.example == "user 'b', item 2"


def test_items_in_histories_alone_are_trained_on():
    made = case({"a": [0, 1, 2, 3], "b": [0, 1, 2, 3], "c": [3, 2, 1, 0]})
    assert made.lint()["test items never trained on"].value == 0
    without = made.train.with_columns(
        pl.lit([], dtype=pl.List(pl.Int32)).alias("history_item_index")
    )
    # Targets of the training rows: 1, 1 and 2; test targets: 3, 3 and 0.
    assert replace(made, train=without).lint()["test items never trained on"].value == 1


def test_duplicates_same_sequences_and_extremes():
    sequences = {f"u{k}": [k % 3, (k + 1) % 5, k % 7] for k in range(30)}
    made = case({**sequences, "x": [1, 2, 3], "y": [3, 2, 1], "z": [1, 2, 3, 1], "w": [9, 9]})
    repeats = sum(len(s) - len(set(s)) for s in sequences.values()) + 2
    found = made.lint()
    total = 90 + 3 + 3 + 4 + 2
    assert found["duplicate interactions"].value == pytest.approx(repeats / total)
    counts = [(*s,) for s in sequences.values()] + [(1, 2, 3), (3, 2, 1), (1, 2, 3, 1)]
    alike = sum(counts.count(s) > 1 for s in counts)
    same = found["users with the same sequence"]
    assert same.value == pytest.approx(alike / 33) and f"{alike} of 33 users" in same.text
    assert found["users of extreme length"].value == 0
    long = case({**sequences, "bot": [k % 8 for k in range(61)]}).lint()
    assert long["users of extreme length"].value == pytest.approx(61 / 151)
    assert long["users of extreme length"].example == "user 'bot'"
    just = case({**sequences, "bot": [k % 8 for k in range(60)]}).lint()
    assert just["users of extreme length"].value == 0


def test_duplicates_with_times_are_of_the_same_moment():
    sequences = {"a": [0, 1, 0, 2], "b": [1, 1, 2, 0]}
    found = case(sequences, {"a": [1, 2, 3, 4], "b": [5, 5, 6, 7]}).lint()
    finding = found["duplicate interactions"]
    assert finding.value == pytest.approx(1 / 8) and finding.severity == "look"
    assert finding.example == "user 'b', item 2"
    # An item of two users in the same second is none, nor is one that comes back later.
    apart = case({"a": [0, 1, 0], "b": [0, 2, 1]}, {"a": [5, 5, 6], "b": [6, 7, 8]}).lint()
    assert apart["duplicate interactions"].value == 0


# Titles.


def test_shared_and_missing_titles():
    made = case({"a": [0, 1, 2, 3], "b": [1, 2, 3, 4], "c": [3, 2, 0, 1]})
    made = made.titled({0: "Red  hat", 1: " red HAT", 2: "Item 3", 3: None, 4: "Item 9"})
    found = made.lint()
    shared = found["titles shared by items"]
    # Three items have a title; two of them share it. Of the test targets 3, 4, 1 one is of those.
    assert shared.value == pytest.approx(2 / 3) and "33.3% of the test targets" in shared.text
    assert shared.example == "items 1, 2: 'Red  hat'"
    assert found["missing titles"].value == pytest.approx(0.4)
    assert found["missing titles"].example == "item 3"
    nothing = made.titled(dict.fromkeys(range(5))).lint()
    assert nothing["missing titles"].value == 1
    assert nothing["titles shared by items"].severity == "not run"


ODD = {
    "token-like text in item text": ["<a_12>", "x <b_0>y", "<|im_end|>", "</s>", "[/INST]"],
    "template marks in item text": ["{{ history }}", "{% for %}", "a }} b", "{# note #}"],
    "control or broken characters in item text": ["a\x00b", "a\u202eb", "a\u200bb", "a\nb", "�"],
    "markup in item text": ["Salt &amp; pepper", "<b>Tea</b>", 'Science" />', "&#39;", "<br/>"],
}


@pytest.mark.parametrize(("kind", "text"), [(k, t) for k, ts in ODD.items() for t in ts])
def test_odd_titles_are_counted_by_kind(kind, text):
    found = neutral(users=40, n_items=20).titled({7: text}).lint()
    assert found[kind].value == 1 and found[kind].severity == "look"
    assert found[kind].example and found[kind].example.startswith("item 8, title: ")
    assert "\u202e" not in found[kind].example and "\x00" not in found[kind].example
    others = {name for name in ODD if name != kind and found[name].value}
    assert others <= {"token-like text in item text", "markup in item text"} - {kind}
    if text not in ("</s>",):
        assert not others


def test_plain_titles_are_not_odd():
    plain = ["R&B; the best", "5 < 6 and 7 > 3", "AT&T phone", "{a} set", "C#", "100% wool", "<3"]
    found = neutral(users=40, n_items=20).titled(dict(enumerate(plain))).lint()
    assert {found[name].value for name in ODD} <= {0, 1}
    assert [name for name in ODD if found[name].value] == ["markup in item text"]  # "&B;"


def test_brands_and_descriptions_are_read_and_long_titles_counted():
    made = neutral(users=40, n_items=20)
    brands = [None] * 18 + ["<c_3>", "Acme"]
    texts = ["fine"] * 19 + ["<d_1> and <a_2>"]
    found = made.titled({3: "x" * 201, 4: "y" * 200}, brand=brands, description=texts).lint()
    token = found["token-like text in item text"]
    assert token.value == 2 and "title 0, brand 1, description 1" in token.text
    assert token.example == "item 19, brand: '<c_3>'"
    long = found["very long titles"]
    assert long.value == pytest.approx(0.05) and "the longest has 201" in long.text
    assert long.example == "item 4"


# The statistics.


@given(
    st.lists(st.integers(0, 11), min_size=1, max_size=15),
    st.lists(st.integers(0, 11), min_size=1, max_size=15),
    st.integers(1, 13),
)
def test_chance_of_neighbours_is_that_of_all_pairs(left, right, distance):
    near = [1 <= abs(a - b) <= distance for a in left for b in right]
    got = near_by_chance(np.array(left), np.array(right), distance, 12)
    assert got == pytest.approx(np.mean(near))


def test_rank_correlation_by_hand():
    # Ranks 1 2 3 4 and 2 1 4 3: ρ = 1 - 6·4 / (4·15) = 0.6; z = 0.6·√3.
    rho, z = rank_correlation(np.array([10, 20, 30, 40]), np.array([5, -1, 99, 7]))
    assert rho == pytest.approx(0.6) and z == pytest.approx(0.6 * 3**0.5)
    # Ties: ranks 1.5 1.5 3 and 1 2 3: ρ = 1.5 / √(1.5·2).
    rho, _ = rank_correlation(np.array([4, 4, 5]), np.array([1, 2, 3]))
    assert rho == pytest.approx(1.5 / 3**0.5)
    assert rank_correlation(np.array([4, 4, 4]), np.array([1, 2, 3])) == (0, 0)
    assert rank_correlation(np.array([1, 2]), np.array([1, 2])) == (0, 0)


def test_one_user_proves_nothing():
    assert user_z(np.array([0.0, 50.0, 0.0])) == 1
    assert user_z(np.array([1.0, 1.0, 1.0, 1.0])) == 2
    assert user_z(np.array([3.0, -3.0])) == 0 == user_z(np.zeros(4))


@settings(max_examples=50)
@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_numbered_ids_are_ordered_by_number(numbers):
    expected = np.unique(numbers, return_inverse=True)[1].tolist()
    for ids in (pl.Series(numbers), pl.Series([f"sku-{n}x" for n in numbers])):
        order, kind = id_order(ids)
        assert (order.tolist(), kind) == (expected, "numbers")


@pytest.mark.parametrize(
    "ids", [["a1", "b2"], ["1", "a"], ["1-2", "1-3"], ["9" * 19, "1"], [f"{10**25}", "2"]]
)
def test_other_ids_are_ordered_as_text(ids):
    order, kind = id_order(pl.Series(ids))
    assert kind == "text" and order.tolist() == np.unique(ids, return_inverse=True)[1].tolist()


def test_first_value():
    groups, least = first_value(np.array([2, 0, 2, 0]), np.array([7, 5, 3, 9]), 4)
    assert (groups.tolist(), least.tolist()) == ([0, 2], [5, 3])


def test_severity_and_order():
    assert graded("n", 0.09, 0.1, 0.5, "t", "a", "e") == Finding("n", "ok", 0.09, 0.1, "t")
    look = graded("n", 0.1, 0.1, 0.5, "t", "a", "e")
    assert look == Finding("n", "look", 0.1, 0.1, "t. a", "e")
    assert graded("n", 0.5, 0.1, 0.5, "t", "a").severity == "bad"
    assert graded("n", 0.5, 0.1, None, "t", "a").severity == "look"
    assert graded("n", 0.5, 0.1, 0.5, "t", "a", "e", significant=False).severity == "ok"
    mixed = [Finding(str(i), s, None, None, "") for i, s in enumerate(("ok", "look", "bad", "ok"))]
    assert [finding.name for finding in worst_first(mixed)] == ["2", "1", "0", "3"]


def test_hostile_ids_are_shown_as_text():
    assert shown("a\x1b[31m\u202eb") == r"'a\x1b[31m\u202eb'"
    assert shown("x" * 500).endswith("…") and len(shown("x" * 500)) == 81


# Published datasets.


def linted(data: CleanData, by_time: bool = False) -> dict[str, Finding]:
    split = global_time if by_time else leave_one_out
    splits = split(data.interactions, data.catalog.height)
    made = Case(
        data.interactions, data.catalog, splits.train, splits.valid, splits.test, splits.protocol
    )
    return made.lint()


def test_beauty_was_numbered_by_its_log(genrec_data: Path):
    folder = genrec_data / "amazon2014-beauty"
    found = linted(clean(read_sequences(folder / "sequences.txt", folder / "items.jsonl")))
    numbered = found["item ids against first appearance"]
    assert numbered.severity == "bad" and numbered.value == pytest.approx(1)
    beside = found["targets beside the last item's id"]
    assert beside.severity == "look" and beside.value == pytest.approx(0.03407, abs=1e-5)
    assert {n for n, finding in found.items() if finding.severity == "not run"} == {
        "user ids against time",
        "histories sorted by item id",
        "histories sorted by title",
        "ties at the test target",
        "training after test targets",
    }
    assert found["histories sorted by item id"].value == pytest.approx(0.5239, abs=1e-4)


def test_movielens_ids_follow_popularity_and_seconds_tie(genrec_data: Path):
    data = clean(read_movielens(genrec_data / "movielens-100k"), min_rating=0)
    found = linted(data)
    assert found["item ids against first appearance"].severity == "ok"
    assert found["ties at the test target"].value == pytest.approx(415 / 943)
    assert found["training after test targets"].value == pytest.approx(0.3806, abs=1e-4)
    assert found["control or broken characters in item text"].value == 9
    assert "36 items" in found["titles shared by items"].text  # 18 duplicate titles
    by_time = linted(data, by_time=True)
    assert by_time["training after test targets"].value == 0
    assert by_time["ties at the test target"].severity == "bad"
