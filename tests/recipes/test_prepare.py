"""The prepare recipe, run as users run it."""

from __future__ import annotations

import json
import logging
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
import yaml

from genrec.artifacts import sha256_file
from genrec.data.splits import content_sha256

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs"

LOG = "customer,sku,ordered_at,stars\n" + "".join(
    f"c{user},A{(user + place) % 6},2024-01-{place + 1:02d}T12:00:00Z,{3 + place % 3}\n"
    for user in range(8)
    for place in range(6)
)
ITEMS = "sku,name,maker,category,price,text\n" + "".join(
    f'A{i},Thing {i},Maker,Shop > Kind {i % 2},"$1,{i}00.00",About thing {i}\n' for i in range(7)
)
OWN = ["--config", str(CONFIGS / "own-csv" / "prepare.yaml")]


@dataclass
class Done:
    """How a run of the recipe ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def prepare(monkeypatch, capsys, caplog) -> Callable[..., Done]:
    """Runs the recipe as its command line does, in this process: ``prepare(*flags, **env)``."""
    script = str(ROOT / "recipes" / "prepare.py")
    caplog.set_level(logging.INFO)

    def call(*args: str, **env: str) -> Done:
        monkeypatch.setattr(sys, "argv", [script, *args])
        monkeypatch.delenv("GENREC_DEBUG", raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        caplog.clear()
        status = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stopped:
            assert isinstance(stopped.code, int)
            status = stopped.code
        said = capsys.readouterr()
        return Done(status, said.out, said.err + caplog.text)

    return call


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "orders.csv").write_text(LOG)
    (folder / "products.csv").write_text(ITEMS)
    return folder


def test_own_csv_from_start_to_rerun(prepare, shop: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    base = [*OWN, "--data_dir", str(shop), "--run_dir", str(run_dir)]
    first = prepare(*base)
    assert first.returncode == 0, first.stderr
    assert "interactions" in first.stdout and "48" in first.stdout
    data = run_dir / "data"
    catalog = pl.read_parquet(data / "catalog.parquet")
    assert catalog.columns == [
        "item_index", "item_id", "title", "brand", "categories", "price", "description",
        "train_count",
    ]  # fmt: skip
    assert catalog["item_index"].to_list() == list(range(7))
    assert catalog["price"].to_list() == [1000.0 + 100 * i for i in range(7)]
    assert catalog["categories"][1].to_list() == ["Shop", "Kind 1"]
    assert catalog["train_count"].sum() == 32
    log = pl.read_parquet(data / "interactions.parquet")
    assert log.row(0) == ("c0", "A0", 0, 1704110400, 3.0, 0)
    splits = {n: pl.read_parquet(data / f"{n}.parquet") for n in ("train", "valid", "test")}
    assert {n: t.height for n, t in splits.items()} == {"train": 8, "valid": 8, "test": 8}
    assert splits["test"].schema["seen_item_index"] == pl.List(pl.Int32)
    assert splits["test"].row(0, named=True)["history_item_index"] == [0, 1, 2, 3, 4]
    split = json.loads((data / "split.json").read_text())
    assert split["protocol"] == "leave-one-out"
    assert split["tie_rule"] == "timestamp, then file order"
    assert split["rating_rule"] == "interactions rated 1 or more, as implicit feedback"
    assert (split["users"], split["items"], split["interactions"]) == (8, 7, 48)
    assert split["tie_share_of_last_two"] == 0.0
    assert split["boundaries"] == split["dropped_by_split"] == {}
    assert split["log"] == "all interactions that are left" and split["min_history"] == 1
    findings = json.loads((data / "lint.json").read_text())
    assert {"name", "severity", "value", "threshold", "text", "example"} == set(findings[0])
    assert f"of {len(findings)} checks are well" in first.stdout
    metrics = json.loads((data / "manifest.json").read_text())["metrics"]
    assert split["content_sha256"] == metrics["content_sha256"] == content_sha256(splits)

    manifest = (data / "manifest.json").read_bytes()
    again = prepare(*base)
    assert again.returncode == 0
    assert "skipped" in again.stderr
    assert (data / "manifest.json").read_bytes() == manifest

    other = prepare(*base, "--max_history", "3")
    assert other.returncode == 2
    assert "made with other max_history=20 (now 3)" in other.stderr
    assert (data / "manifest.json").read_bytes() == manifest

    forced = prepare(*base, "--max_history", "3", "--overwrite", "true")
    assert forced.returncode == 0, forced.stderr
    assert (run_dir / "data.old-1" / "manifest.json").read_bytes() == manifest
    assert pl.read_parquet(data / "test.parquet")["history_item_index"].list.len().max() == 3

    # Where the files lie is no setting: moved ones with the same content are the same data.
    moved = shop.rename(tmp_path / "moved")
    elsewhere = [*OWN, "--data_dir", str(moved), "--run_dir", str(run_dir), "--max_history", "3"]
    assert "skipped" in prepare(*elsewhere).stderr


def test_bad_input_ends_with_one_line_and_loses_nothing(prepare, shop: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    base = [*OWN, "--data_dir", str(shop), "--run_dir", str(run_dir)]
    assert prepare(*base).returncode == 0
    before = {p.name: p.read_bytes() for p in (run_dir / "data").iterdir()}

    (shop / "orders.csv").write_text(LOG + "c9,NOPE,2024-02-01,5\n")
    refused = prepare(*base)
    assert refused.returncode == 2
    assert "input 'interactions'" in refused.stderr
    assert {p.name: p.read_bytes() for p in (run_dir / "data").iterdir()} == before

    bad = prepare(*base, "--overwrite", "true")
    assert bad.returncode == 2
    error = [line for line in bad.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert "lacks: 'NOPE'" in error[0] and "unknown_items: drop" in error[0]
    assert "Traceback" not in bad.stderr
    kept = [f for f in run_dir.iterdir() if (f / "manifest.json").exists()]
    assert any({p.name: p.read_bytes() for p in folder.iterdir()} == before for folder in kept)

    dropped = prepare(*base, "--overwrite", "true", "--unknown_items", "drop")
    assert dropped.returncode == 0, dropped.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--format", "csv"],
            "format='csv' is not known; choose one of synthetic, table, sequences",
        ),
        (["--format", "table"], "format='table' needs interactions: <path>"),
        (["--max_history", "0"], "max_history=0 must be at least 1"),
        (["--min_history", "0"], "min_history=0 must be at least 1"),
        (["--window_step", "21"], "window_step=21 must lie in 1..max_history=20"),
        (["--format", "lc-rec", "--interactions", "i"], "format='lc-rec' needs items: <path>"),
        (["--time_column", "t"], "time_column is not read with format: synthetic, only with table"),
        (["--items", "x"], "items is not read with format: synthetic, only with table, sequences"),
        (
            ["--format", "mind", "--interactions", "m", "--encoding", "latin-1"],
            "encoding is not read with format: mind, only with table; leave it out",
        ),
        (
            ["--format", "movielens", "--interactions", "m", "--n_users", "9"],
            "n_users is not read with format: movielens, only with synthetic",
        ),
        (
            ["--format", "table", "--interactions", "i", "--event_weights", "view"],
            "event_weights holds 'view'; write event=weight",
        ),
        (
            ["--format", "table", "--interactions", "i", "--event_weights", "view=1"],
            "event_weights needs event_column",
        ),
        (["--rating_rule", "liked"], "rating_rule='liked' is not known; choose one of all, at-le"),
        (["--rating_rule", "all", "--min_rating", "3"], "min_rating belongs to rating_rule: at-le"),
        (["--protocol", "given"], "minionerec brings its own split, protocol: given, and no other"),
        (
            ["--format", "minionerec", "--interactions", "i"],
            "protocol='leave-one-out' with format='minionerec'",
        ),
        (
            [
                "--format",
                "minionerec",
                "--interactions",
                "i",
                "--protocol",
                "given",
                "--k_core_user",
                "5",
            ],
            "k_core_user changes rows, and given ones stay as they are",
        ),
        (["--erase_items", "none.txt"], "none.txt not found"),
        (["--n_users", "50", "--expect_users", "51"], "the data have 50 users, expect_users=51"),
        (["--format", "table", "--interactions", "none.csv"], "none.csv not found"),
        (["--protocol", "random"], "protocol='random' is not known; choose one of leave-one-out"),
        (
            ["--protocol", "global-time", "--split_shares", "0.9", "0.2", "0.1"],
            "split_shares=[0.9, 0.2, 0.1] must be three positive numbers",
        ),
        (["--split_shares", "0.6", "0.2", "0.2"], "split_shares belongs to protocol: global-time"),
        (["--test_from", "2022-01-01"], "test_from belongs to protocol: time-cutoff"),
        (["--protocol", "time-cutoff"], "protocol='time-cutoff' needs valid_from: <date>"),
        (
            ["--protocol", "time-cutoff", "--valid_from", "May", "--test_from", "2023-01-01"],
            "'May' is no time; give an ISO date",
        ),
    ],
)
def test_settings_that_cannot_be_used(prepare, tmp_path: Path, args: list[str], message: str):
    result = prepare("--run_dir", str(tmp_path / "run"), *args)
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "run" / "data" / "manifest.json").exists()


def test_own_csv_in_one_order_by_time(prepare, shop: Path, tmp_path: Path):
    """Eight users buy at noon on six days: 48 interactions, and each day is one second."""
    run_dir = tmp_path / "run"
    base = [*OWN, "--data_dir", str(shop), "--run_dir", str(run_dir), "--protocol", "global-time"]
    made = prepare(*base)
    assert made.returncode == 0, made.stderr
    split = json.loads((run_dir / "data" / "split.json").read_text())
    assert split["protocol"] == "global-time"
    # 80% end within day 5, 90% within day 6: both boundaries move to the start of their day.
    assert split["boundaries"] == {
        "valid_from": "2024-01-05T12:00:00+00:00",
        "test_from": "2024-01-06T12:00:00+00:00",
    }
    assert split["shares"] == {"train": 4 / 6, "valid": 1 / 6, "test": 1 / 6}
    assert "the second that a boundary names belongs to the later period" in split["tie_rule"]
    assert split["dropped_by_split"] == {"valid_without_history": 0, "test_without_history": 0}
    assert (split["test_rows"], split["test_users"]) == (8, 8)
    # The fifth and sixth of items (user + place) % 6: nobody bought one before.
    assert split["repeated_test_targets"] == split["cold_test_targets"] == 0.0
    for text in ("2024-01-05T12:00:00+00:00", "66.67%", split["content_sha256"][:40]):
        assert text in made.stdout

    other = prepare(*base, "--split_shares", "0.6", "0.2", "0.2")
    assert other.returncode == 2
    assert "split_shares=[0.8, 0.1, 0.1] (now [0.6, 0.2, 0.2])" in other.stderr


def test_own_csv_with_cutoff_dates(prepare, shop: Path, tmp_path: Path):
    config = tmp_path / "prepare.yaml"
    text = (CONFIGS / "own-csv" / "prepare.yaml").read_text()
    # A bare date is a date to YAML, not text.
    dates = "valid_from: 2024-01-04\ntest_from: 2024-01-05T00:00:00\ntest_until: '2024-01-07'\n"
    config.write_text(text + "protocol: time-cutoff\n" + dates)
    run_dir = tmp_path / "run"
    base = ["--config", str(config), "--data_dir", str(shop), "--run_dir", str(run_dir)]
    made = prepare(*base)
    assert made.returncode == 0, made.stderr
    split = json.loads((run_dir / "data" / "split.json").read_text())
    assert split["boundaries"] == {
        "valid_from": "2024-01-04T00:00:00+00:00",
        "test_from": "2024-01-05T00:00:00+00:00",
        "test_until": "2024-01-07T00:00:00+00:00",
    }
    assert split["relevant_per_test_row"] == 2.0
    test = pl.read_parquet(run_dir / "data" / "test.parquet")
    assert test["relevant_item_index"].to_list()[0] == [4, 5]
    assert test["history_item_index"].to_list()[0] == [0, 1, 2, 3]
    # The same moments written otherwise are the same settings.
    same = prepare(*base, "--valid_from", "1704326400", "--test_from", "2024-01-05T01:00:00+01:00")
    assert "skipped" in same.stderr, same.stderr


def test_data_without_times_are_not_split_by_time(prepare, tmp_path: Path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id\n" + "".join(f"u{i % 3},{i}\n" for i in range(12)))
    files = ["--format", "table", "--interactions", str(path), "--run_dir", str(tmp_path / "r")]
    result = prepare(*files, "--protocol", "global-time")
    assert result.returncode == 2
    assert "protocol='global-time' needs timestamps" in result.stderr
    assert "use protocol: leave-one-out" in result.stderr


def test_nothing_to_test_on_is_refused(prepare, tmp_path: Path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id\na,1\na,2\nb,1\n")
    result = prepare(
        "--format", "table", "--interactions", str(path), "--run_dir", str(tmp_path / "r")
    )
    assert result.returncode == 2
    assert "no user has 3 interactions" in result.stderr


def test_nobody_who_opted_out_is_in_any_file(prepare, shop: Path, tmp_path: Path):
    """c3 and A2 are gone from everything below data/, whether as text or in compressed columns."""
    log, items = (shop / "orders.csv").read_text(), (shop / "products.csv").read_text()
    (shop / "orders.csv").write_text(log.replace("c3,", "Gone-3,").replace(",A2,", ",GoneItem,"))
    (shop / "products.csv").write_text(items.replace("A2,", "GoneItem,"))
    people = "customer,city\n" + "".join(f"{u},X\n" for u in ("c0", "c1", "Gone-3"))
    (shop / "people.csv").write_text(people)
    (shop / "optout.txt").write_text("Gone-3\nNobody-9\n")
    (shop / "recall.csv").write_text("sku,why\nGoneItem,recalled\n")
    run_dir = tmp_path / "run"
    base = [*OWN, "--data_dir", str(shop), "--run_dir", str(run_dir), "--users", "people.csv"]
    base += ["--expect_users", "8"]
    assert prepare(*base).returncode == 0
    held = [p for p in (run_dir / "data").iterdir() if "Gone" in content(p)]
    assert {p.name for p in held} >= {"interactions.parquet", "catalog.parquet", "users.parquet"}

    lists = ["--erase_users", "optout.txt", "--erase_items", "recall.csv", "--overwrite", "true"]
    made = prepare(*base, *lists)
    assert made.returncode == 0, made.stderr
    for path in (run_dir / "data").iterdir():
        assert "Gone" not in content(path), path
        assert "Nobody-9" not in content(path), path
    assert "Gone-3" not in made.stdout + made.stderr
    assert "Nobody-9" not in made.stdout + made.stderr
    assert "erase_users: 1 of 2 ids match nothing in the data" in made.stderr
    assert "data.old-1 may hold what is erased now" in made.stderr
    assert "expect_users=8, and 7 are left after erasure" in made.stderr
    manifest = json.loads((run_dir / "data" / "manifest.json").read_text())
    # c3 bought six items, once the recalled one; seven others bought it once or twice.
    recalled = sum(line.endswith("Z") or ",A2," in line for line in log.splitlines())
    mine = sum(",A2," in line for line in log.splitlines() if line.startswith("c3,"))
    assert manifest["metrics"]["erased_users"] == {"listed": 2, "matched": 1, "interactions": 6}
    assert manifest["metrics"]["erased_items"] == {
        "listed": 1, "matched": 1, "interactions": recalled - mine,
    }  # fmt: skip
    assert manifest["inputs"]["erase_users"] == sha256_file(shop / "optout.txt")
    assert "erase_users" not in manifest["config"]

    (shop / "optout.txt").write_text("Gone-3\n")
    again = prepare(*base, *lists[:4])
    assert again.returncode == 2
    assert "input 'erase_users'" in again.stderr


def content(path: Path) -> str:
    """What a file of a stage holds, columns of Parquet written out."""
    if path.suffix != ".parquet":
        return path.read_text()
    return path.read_bytes().decode("latin-1") + json.dumps(
        pl.read_parquet(path).to_dict(as_series=False), default=str
    )


def test_events_weights_and_reviews_reach_the_log(prepare, tmp_path: Path):
    path = tmp_path / "log.csv"
    rows = [
        f"u{user},{(user + place) % 5},{1000 + place},{'buy' if place % 2 else 'view'},text {place}"
        for user in range(6)
        for place in range(6)
    ]
    path.write_text("user_id,item_id,at,kind,words\n" + "\n".join([*rows, "u0,1,900,hover,x\n"]))
    base = ["--format", "table", "--interactions", str(path), "--run_dir", str(tmp_path / "r")]
    base += ["--time_column", "at", "--event_column", "kind", "--review_column", "words"]
    refused = prepare(*base, "--event_weights", "view=0.5", "buy=1")
    assert refused.returncode == 2
    assert "event_weights doesn't name these events: hover: 1;" in refused.stderr
    config = tmp_path / "prepare.yaml"
    config.write_text("event_weights: [view=0.5, hover=0, '*=1']\nmin_history: 3\n")
    made = prepare("--config", str(config), *base)
    assert made.returncode == 0, made.stderr
    log = pl.read_parquet(tmp_path / "r" / "data" / "interactions.parquet")
    assert log.filter(user_id="u0").select("event", "weight", "review").rows() == [
        ("view" if place % 2 == 0 else "buy", 1.0 if place % 2 else 0.5, f"text {place}")
        for place in range(6)
    ]
    split = json.loads((tmp_path / "r" / "data" / "split.json").read_text())
    assert split["events"] == {"buy": 18, "view": 18}
    assert split["mean_weight"] == 0.75
    assert split["dropped"] == {"zero_weight": 1}
    assert split["event_weights"] == ["view=0.5", "hover=0", "*=1"]
    # Six interactions: four before the validation target, so min_history lets all users be tested.
    assert (split["test_rows"], split["min_history"]) == (6, 3)
    fewer = prepare("--config", str(config), *base, "--min_history", "5", "--overwrite", "true")
    assert "no user has 7 interactions" in fewer.stderr


def test_a_rating_rule_is_stated(prepare, shop: Path, tmp_path: Path):
    """Stars are 3, 4, 5, 3, 4, 5; the means so far 3, 3.5, 4, 3.75, 3.8, 4."""
    config = tmp_path / "prepare.yaml"
    text = (CONFIGS / "own-csv" / "prepare.yaml").read_text()
    config.write_text(text.replace("min_rating: 1", "rating_rule: above-user-mean"))
    run_dir = tmp_path / "run"
    made = prepare("--config", str(config), "--data_dir", str(shop), "--run_dir", str(run_dir))
    assert made.returncode == 0, made.stderr
    log = pl.read_parquet(run_dir / "data" / "interactions.parquet")
    assert log.filter(user_id="c0")["rating"].to_list() == [3.0, 4.0, 5.0, 4.0, 5.0]
    split = json.loads((run_dir / "data" / "split.json").read_text())
    assert split["dropped"] == {"below_user_mean": 8}
    assert "at least the mean of their user's ratings up to and including" in split["rating_rule"]


def test_given_rows_from_files_to_rows(prepare, tmp_path: Path):
    folder = tmp_path / "files"
    folder.mkdir()
    items = {str(i): {"title": f"T{i}", "description": "", "brand": "B", "categories": ""}
             for i in range(4)}  # fmt: skip
    (folder / "items.json").write_text(json.dumps(items))
    head = "user_id,history_item_id,item_id\n"
    (folder / "train.csv").write_text(head + 'u,[0],1\nu,"[0, 1]",2\nv,[2],0\n')
    (folder / "valid.csv").write_text(head + 'u,"[0, 1, 2]",3\n')
    (folder / "test.csv").write_text(head + 'u,"[0, 1, 2, 3]",0\nv,"[2, 0]",1\n')
    run_dir = tmp_path / "run"
    base = ["--format", "minionerec", "--interactions", str(folder), "--protocol", "given"]
    base += ["--run_dir", str(run_dir), "--max_history", "3"]
    made = prepare(*base)
    assert made.returncode == 0, made.stderr
    test = pl.read_parquet(run_dir / "data" / "test.parquet")
    assert test["history_item_index"].to_list() == [[1, 2, 3], [2, 0]]
    assert test["seen_item_index"].to_list() == [[0, 1, 2, 3], [0, 2]]
    log = pl.read_parquet(run_dir / "data" / "interactions.parquet")
    assert log.select("user_id", "item_id", "position").rows() == [
        ("u", 0, 0), ("u", 1, 1), ("u", 2, 2), ("v", 2, 0), ("v", 0, 1),
    ]  # fmt: skip
    split = json.loads((run_dir / "data" / "split.json").read_text())
    assert split["log"] == "implied by the training rows"
    assert split["tie_rule"] == "that of whoever made the rows"
    inputs = json.loads((run_dir / "data" / "manifest.json").read_text())["inputs"]
    assert set(inputs) == {"train", "valid", "test", "items"}

    # A validation row among the training rows is found.
    (folder / "train.csv").write_text(head + 'u,[0],1\nu,"[0, 1, 2]",3\n')
    leaking = prepare(*base, "--overwrite", "true")
    assert leaking.returncode == 2
    assert "row 'valid-000000' evaluates the same history and target" in leaking.stderr


def amazon_files(folder: Path) -> list[str]:
    lines = [
        json.dumps({"reviewerID": f"u{u}", "asin": f"B{(u + t) % 5}", "overall": 4.0,
                    "reviewText": "fine", "unixReviewTime": 1_500_000_000 + 86_400 * t})
        for u in range(4) for t in range(4)
    ]  # fmt: skip
    (folder / "reviews.json").write_text("\n".join(lines))
    return ["--interactions", str(folder / "reviews.json"), "--amazon_version", "2018"]


def movielens_files(folder: Path) -> list[str]:
    ratings = [
        f"{u + 1}::{(u + t) % 5 + 1}::4::{978_300_000 + t}" for u in range(4) for t in range(4)
    ]
    (folder / "ratings.dat").write_text("\n".join(ratings) + "\n")
    (folder / "movies.dat").write_text(
        "".join(f"{i}::Film {i} (1990)::Drama\n" for i in range(1, 6))
    )
    (folder / "users.dat").write_text("".join(f"{u}::F::25::4::12345\n" for u in range(1, 5)))
    return ["--interactions", str(folder)]


def recbole_files(folder: Path) -> list[str]:
    rows = [f"u{u}\ti{(u + t) % 5}\t{t}" for u in range(4) for t in range(4)]
    head = "user_id:token\titem_id:token\ttimestamp:float\n"
    (folder / "shop.inter").write_text(head + "\n".join(rows) + "\n")
    return ["--interactions", str(folder)]


def mind_files(folder: Path) -> list[str]:
    news = [f"N{i}\tsports\tgolf\tTitle {i}\tAbstract\thttp://x\t[]\t[]" for i in range(6)]
    (folder / "news.tsv").write_text("\n".join(news) + "\n")
    clicks = [
        f"{4 * u + t}\tU{u}\t11/1{t}/2019 9:05:58 AM\tN5\tN{(u + t) % 5}-1 N5-0"
        for u in range(4) for t in range(3)
    ]  # fmt: skip
    (folder / "behaviors.tsv").write_text("\n".join(clicks) + "\n")
    return ["--interactions", str(folder)]


def lcrec_files(folder: Path) -> list[str]:
    inter = {str(u): [(u + t) % 5 for t in range(4)] for u in range(4)}
    items = {str(i): {"title": f"T{i}", "description": "", "brand": "B", "categories": "A,B"}
             for i in range(5)}  # fmt: skip
    (folder / "x.inter.json").write_text(json.dumps(inter))
    (folder / "x.item.json").write_text(json.dumps(items))
    return ["--interactions", str(folder / "x.inter.json"), "--items", str(folder / "x.item.json")]


def huggingface_files(folder: Path) -> list[str]:
    import datasets

    rows = {"who": [f"u{u}" for u in range(4) for _ in range(4)],
            "what": [(u + t) % 5 for u in range(4) for t in range(4)]}  # fmt: skip
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder / "saved"))
    return [
        "--interactions",
        str(folder / "saved"),
        "--user_column",
        "who",
        "--item_column",
        "what",
    ]


@pytest.mark.parametrize(
    ("name", "make", "inputs"),
    [
        ("amazon", amazon_files, {"interactions"}),
        ("movielens", movielens_files, {"ratings", "items", "users"}),
        ("movielens-100k", movielens_files, {"ratings", "items", "users"}),
        ("recbole", recbole_files, {"interactions"}),
        ("mind", mind_files, {"behaviors", "news"}),
        ("lc-rec", lcrec_files, {"interactions", "items"}),
        ("huggingface", huggingface_files, None),
    ],
)
def test_every_format_is_read(prepare, name: str, make, inputs, tmp_path: Path):
    """Four users with four items each; every file that was read is known by its content."""
    files = tmp_path / "files"
    files.mkdir()
    run_dir = tmp_path / "run"
    made = prepare("--format", name, *make(files), "--run_dir", str(run_dir))
    assert made.returncode == 0, made.stderr
    manifest = json.loads((run_dir / "data" / "manifest.json").read_text())
    if inputs is None:
        assert all(role.startswith("interactions/") for role in manifest["inputs"])
    else:
        assert set(manifest["inputs"]) == inputs
    log = pl.read_parquet(run_dir / "data" / "interactions.parquet")
    assert log.group_by("user_id").len()["len"].to_list() == [4] * 4
    assert pl.read_parquet(run_dir / "data" / "test.parquet").height == 4


def test_a_folder_of_parquet_files_is_known_by_their_content(prepare, tmp_path: Path):
    folder = tmp_path / "log"
    for part in range(2):
        (folder / f"day={part}").mkdir(parents=True)
        rows = {"user_id": [1, 2] * 2, "item_id": [part, part, 2 + part, 2 + part]}
        pl.DataFrame(rows).write_parquet(folder / f"day={part}" / "0.parquet")
    base = ["--format", "table", "--interactions", str(folder), "--run_dir", str(tmp_path / "r")]
    made = prepare(*base)
    assert made.returncode == 0, made.stderr
    inputs = json.loads((tmp_path / "r" / "data" / "manifest.json").read_text())["inputs"]
    assert set(inputs) == {"interactions/day=0/0.parquet", "interactions/day=1/0.parquet"}
    assert "skipped" in prepare(*base).stderr
    pl.DataFrame({"user_id": [1], "item_id": [9]}).write_parquet(folder / "more.parquet")
    assert prepare(*base).returncode == 2


def test_quickstart_and_a_sample_of_its_users(prepare, tmp_path: Path):
    config = ["--config", str(CONFIGS / "quickstart" / "prepare.yaml")]
    result = prepare(*config, "--run_dir", str(tmp_path), "--limit_users", "100")
    assert result.returncode == 0, result.stderr
    log = pl.read_parquet(tmp_path / "data" / "interactions.parquet")
    assert log["user_id"].n_unique() == 100
    assert pl.read_parquet(tmp_path / "data" / "catalog.parquet").height == 600


@pytest.mark.parametrize("name", ["beauty", "movielens-100k", "industrial", "fashion"])
def test_published_datasets(prepare, name: str, genrec_data: Path, tmp_path: Path):
    config = CONFIGS / name / "prepare.yaml"
    result = prepare(
        "--config", str(config), "--run_dir", str(tmp_path), GENREC_DATA=str(genrec_data)
    )
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "data" / "manifest.json").read_text())["metrics"]
    expected = yaml.safe_load(config.read_text())
    for key in ("users", "items", "interactions"):
        assert metrics[key] == expected[f"expect_{key}"]


def test_every_config_opens_with_its_command():
    configs = sorted(CONFIGS.glob("*/prepare.yaml"))
    assert len(configs) >= 7
    for config in configs:
        relative = config.relative_to(ROOT).as_posix()
        assert f"genrec prepare --config {relative}" in config.read_text().splitlines()[0]


def test_columns_of_items_need_a_table_of_items(prepare, tmp_path):
    (tmp_path / "log.csv").write_text(LOG)
    flags = ["--format", "table", "--interactions", str(tmp_path / "log.csv"), "--user_column",
             "customer", "--item_column", "sku", "--run_dir", str(tmp_path / "run")]  # fmt: skip
    done = prepare(*flags, "--title_column", "nonsense")
    assert done.returncode == 2
    assert "title_column is a column of items, and no table of them is named" in done.stderr
    assert prepare(*flags).returncode == 0


def test_files_in_the_folder_of_the_stage_stay_there(prepare, tmp_path):
    """``<project>/data`` is where many keep their files."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "orders.csv").write_text(LOG)
    (data / "products.csv").write_text(ITEMS)
    for _ in range(2):
        done = prepare(*OWN, "--run_dir", str(tmp_path), "--data_dir", str(data), "--interactions",
                       "orders.csv", "--items", "products.csv")  # fmt: skip
        assert done.returncode == 2
        assert "holds orders.csv, which no stage wrote; move it away" in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"data"} and len(list(data.iterdir())) == 2
