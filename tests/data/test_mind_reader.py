"""MIND: clicks of the impressions, and the history before them."""

from __future__ import annotations

from pathlib import Path

import pytest

from genrec.data.cleaning import clean
from genrec.data.readers import read_mind

# U1's rows are out of order; its history is the same in both, as in the published files.
BEHAVIORS = [
    "1\tU1\t11/14/2019 1:00:00 PM\tN1 N2\tN3-0 N4-1 N5-1",
    "2\tU2\t11/11/2019 12:00:07 AM\t\tN1-1",
    "3\tU1\t11/13/2019 8:36:57 AM\tN1 N2\tN5-0 N3-1",
    "4\tU3\t11/12/2019 8:00:00 AM\tN2\tN5-0",
]
NEWS = [
    f'N{i}\tsports\tgolf\tA "title" {i}\t{"" if i == 2 else f"Text {i}"}\thttps://x\t[]\t[]'
    for i in range(1, 6)
]
NOV_11, NOV_13, NOV_14 = 1573430407, 1573634217, 1573736400


def part(folder: Path, behaviors: list[str] = BEHAVIORS, news: list[str] = NEWS) -> Path:
    (folder / "behaviors.tsv").write_text("\n".join(behaviors) + "\n")
    (folder / "news.tsv").write_text("\n".join(news) + "\n")
    return folder


def test_clicks_and_history(tmp_path):
    raw = read_mind(part(tmp_path))
    ordered = clean(raw).interactions
    by_user = {
        user: ordered.filter(user_id=user).select("item_id", "timestamp").rows()
        for user in ("U1", "U2", "U3")
    }
    assert by_user == {
        "U1": [("N1", NOV_13), ("N2", NOV_13), ("N3", NOV_13), ("N4", NOV_14), ("N5", NOV_14)],
        "U2": [("N1", NOV_11)],
        "U3": [("N2", 1573545600)],  # no click, but a history
    }
    assert raw.interactions["rating"].null_count() == raw.interactions.height == 7


def test_news(tmp_path):
    catalog = read_mind(part(tmp_path)).catalog
    assert catalog.columns == ["item_id", "title", "categories", "description"]
    assert catalog.row(0) == ("N1", 'A "title" 1', ["sports", "golf"], "Text 1")
    assert catalog.row(1)[3] is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "5\tU4\t2019-11-12 08:00\tN2\tN5-0",
            r"row 5: time '2019-11-12 08:00' is not a time .*MIND",
        ),
        ("5\tU4\t11/12/2019 8:00:00 AM\tN2\tN5 N1", r"row 5: impressions 'N5 N1' lack click marks"),
        ("5\tU4\t11/12/2019 8:00:00 AM\tN2\tN5-2", r"lack click marks"),
        ("5\t\t11/12/2019 8:00:00 AM\tN2\tN5-0", r"row 5: 'user_id' is null"),
        ("5\tU4\t11/12/2019 8:00:00 AM\tN9\tN5-1", r"1 interactions .* lacks: 'N9'"),
    ],
)
def test_behaviors_with_faults(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_mind(part(tmp_path, [*BEHAVIORS, row]))


def test_folders_with_faults(tmp_path):
    with pytest.raises(ValueError, match=r"lacks behaviors.tsv, news.tsv; an unpacked part"):
        read_mind(tmp_path)
    with pytest.raises(ValueError, match=r"behaviors.tsv has 4 fields a row, MIND has 5"):
        read_mind(part(tmp_path, [line.rsplit("\t", 1)[0] for line in BEHAVIORS]))
    with pytest.raises(ValueError, match="has no clicks"):
        read_mind(part(tmp_path, ["1\tU1\t11/14/2019 1:00:00 PM\t\tN3-0"]))
