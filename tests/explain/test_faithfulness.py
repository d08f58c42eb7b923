"""Summaries equal hand counts, thresholds are judged by their intervals."""

from __future__ import annotations

import pytest

from genrec.chains import Chain, Check, Step
from genrec.evaluation.significance import Interval
from genrec.explain.faithfulness import summarize
from genrec.explain.thresholds import THRESHOLDS, Threshold

ERASED = ("comprehensiveness", "comprehensiveness_random", "sufficiency", "sufficiency_random")


def one(row: str, rank: int, values: tuple[float | None, ...], passed: bool = True) -> Chain:
    made = [Check(n, v) for n, v in zip(ERASED, values, strict=True)]
    cites = values[0] is not None
    step = Step("evidence", "x", (1,) if cites else ())
    share = (1.0 if passed else 0.5) if cites else None
    verdict = Check("citations_in_history", share, passed if cites else None)
    return Chain(row, 5, rank, (step,), "template", False, (verdict, *made))


CHAINS = [
    one("a", 1, (3.0, 1.0, 0.5, 2.0)),
    one("a", 2, (1.0, 0.0, 0.5, 1.0)),
    one("b", 1, (2.0, None, 0.0, None)),
    one("b", 2, (None,) * 4),
    one("c", 1, (2.0, 2.0, 0.2, 0.2)),
]


def test_summary_is_the_hand_count():
    report = summarize(CHAINS, samples=200)
    counts = ("chains", "lists", "chains_without_support")
    assert [report[name] for name in counts] == [5, 3, 1]
    assert report["verdicts"]["citations_in_history"] == {"share": 1.0, "checked": 4}
    assert report["verdicts"]["attributes_match"] == {"share": None, "checked": 0}
    figure = report["figures"]["comprehensiveness"]
    assert figure["n"] == 4 and figure["chain"]["value"] == pytest.approx(2.0)
    control = figure["controls"]["random"]
    assert control["n"] == 3 and control["value"]["value"] == pytest.approx(1.0)
    assert control["gain"]["value"] == pytest.approx(1.0)
    # A list at a time: from c alone (0) to a alone ((2 + 1) / 2).
    assert control["gain"]["low"] == pytest.approx(0) and control["gain"]["high"] == 1.5
    # Less is better: the gain is the control's minus the chain's.
    gain = report["figures"]["sufficiency"]["controls"]["random"]["gain"]
    assert gain["value"] == pytest.approx((1.5 + 0.5 + 0.0) / 3)
    assert "stability" not in report["figures"]
    assert "by 1.00" in report["sentence"] and "not distinguishable from 0" in report["sentence"]


def test_every_declared_threshold_is_reported():
    rules = [*THRESHOLDS, "comprehensiveness - comprehensiveness_random >= -1"]
    found = {t["rule"]: t for t in summarize(CHAINS, rules, samples=200)["thresholds"]}
    assert list(found) == rules
    assert found["citations_in_history >= 1"]["verdict"] == "met"
    assert found["attributes_match >= 1"] == {
        "rule": "attributes_match >= 1",
        "n": 0,
        "verdict": "not measured",
    }
    straddles = found["comprehensiveness - comprehensiveness_random > 0"]
    assert straddles["verdict"] == "undecided" and straddles["n"] == 3
    assert found[rules[-1]]["verdict"] == "met"
    failing = [*CHAINS, one("d", 1, (1.0, 0.0, 0.0, 1.0), passed=False)]
    verdict = summarize(failing, ["citations_in_history >= 1"])["thresholds"][0]["verdict"]
    assert verdict == "undecided"  # some draws leave the failing list out
    all_fail = [one("d", 1, (1.0, 0.0, 0.0, 1.0), passed=False)]
    report = summarize(all_fail, ["citations_in_history >= 1"])
    assert report["thresholds"][0]["verdict"] == "not met"
    assert report["slices"][0] == {
        "slice": "rank 1", "chains": 1, "failed": 1, "compared": 1,
        "gain": {"value": 1.0, "low": 1.0, "high": 1.0, "seeds": ()},
    }  # fmt: skip


def test_slices_split_by_rank_and_history():
    report = summarize(CHAINS, history_lengths={"a": 3, "b": 7, "c": 12}, samples=50)
    found = {s["slice"]: s for s in report["slices"]}
    assert {name: s["chains"] for name, s in found.items()} == {
        "rank 1": 3, "rank 2 to 5": 2, "1 to 4 history items": 2, "5 to 9 history items": 2,
        "10 or more history items": 1,
    }  # fmt: skip
    assert found["rank 1"]["gain"]["value"] == 1.0 and found["rank 1"]["compared"] == 2
    assert found["5 to 9 history items"]["gain"] is None


def test_nothing_to_compare_is_said():
    report = summarize([one("a", 1, (None,) * 4)])
    assert "comprehensiveness" not in report["figures"] and report["chains_without_support"] == 1
    assert "nothing was compared" in report["sentence"]


@pytest.mark.parametrize(
    ("rule", "interval", "verdict"),
    [
        ("comprehensiveness > 0.5", (0.6, 0.9), "met"),
        ("comprehensiveness > 0.5", (0.5, 0.9), "undecided"),
        ("comprehensiveness > 0.5", (0.1, 0.5), "not met"),
        ("target_leak <= 0", (0.0, 0.0), "met"),
        ("target_leak <= 0", (0.0, 0.1), "undecided"),
        ("sufficiency < -1e-1", (-0.5, -0.2), "met"),
        ("sufficiency_random - sufficiency>=0", (-0.2, -0.1), "not met"),
    ],
)
def test_verdicts(rule, interval, verdict):
    assert Threshold.parse(rule).verdict(Interval(0.0, *interval)) == verdict
    assert Threshold.parse(rule).verdict(None) == "not measured"


@pytest.mark.parametrize("rule", ["", "comprehensiveness", "x > 0", "comprehensiveness = 1",
                                  "comprehensiveness - nothing > 0", "comprehensiveness > many",
                                  "__import__('os') > 0"])  # fmt: skip
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(ValueError, match="threshold"):
        Threshold.parse(rule)
