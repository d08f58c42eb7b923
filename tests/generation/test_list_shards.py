"""Shards that survive kills, damage and full disks."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from genrec.artifacts import sha256_bytes
from genrec.generation.shards import (
    ShardInfo,
    enough_space,
    find_shard,
    read_info,
    shard_name,
    write_shard,
)

INFO = ShardInfo("f" * 64, 0, 2, {"users": 2})


def small() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "user_id": ["ü", "b\0c"],
            "rank": pl.Series([1, 2], dtype=pl.Int32),
            "score": pl.Series([-1.5, -2.25], dtype=pl.Float32),
            "level_log_probs": pl.Series([[-1.0, -0.5], [-2.25]], dtype=pl.List(pl.Float32)),
            "certified": [True, False],
        }
    )


def find(path: Path) -> ShardInfo | None:
    return find_shard(path, INFO.fingerprint, 0, 2)


def test_a_shard_comes_back_as_it_was_written(tmp_path: Path):
    path = tmp_path / shard_name(0, 2)
    assert path.name == "recommendations-0000000000-0000000001.parquet"
    assert find(path) is None
    info = write_shard(path, small(), INFO)
    data = path.read_bytes()
    blank = data.replace(info.sha256.encode(), b"0" * 64)
    assert info == replace(INFO, sha256=sha256_bytes(blank))
    assert find(path) == read_info(path) == info
    assert_frame_equal(pl.read_parquet(path), small())
    first = path.read_bytes()
    write_shard(path, small(), INFO)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("shard") / shard_name(0, 2)
    write_shard(path, small(), INFO)
    return path, path.read_bytes()


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_cut_and_any_flipped_bit_is_noticed(written, data):
    path, good = written
    for old in path.parent.glob("damaged-*"):
        old.unlink()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        bad = bad[:at]
    path.write_bytes(bytes(bad))
    assert find(path) is None
    assert not path.exists()
    assert (path.parent / f"damaged-1-{path.name}").read_bytes() == bytes(bad)


def test_text_in_the_table_is_not_taken_for_the_hash(tmp_path: Path):
    table = small().with_columns(user_id=pl.lit('"sha256": "' + "0" * 64))
    path = tmp_path / shard_name(0, 2)
    info = write_shard(path, table, INFO)
    assert find(path) == info
    assert_frame_equal(pl.read_parquet(path), table)


def test_what_is_set_aside_is_kept(tmp_path: Path, caplog):
    path = tmp_path / shard_name(0, 2)
    for number in (1, 2):
        path.write_bytes(b"PAR1 half")
        assert find(path) is None
        assert (tmp_path / f"damaged-{number}-{path.name}").read_bytes() == b"PAR1 half"
    assert f"{path.name} is damaged" in caplog.text and "made again" in caplog.text


def test_shards_of_another_run(tmp_path: Path):
    path = tmp_path / shard_name(0, 2)
    write_shard(path, small(), ShardInfo("e" * 64, 0, 2))
    with pytest.raises(ValueError, match="is of another run: it has rows 0 to 1 of run eeeeeeeeee"):
        find(path)
    write_shard(path, small(), ShardInfo(INFO.fingerprint, 2, 4))
    with pytest.raises(ValueError, match="rows 2 to 3 of run ffff.* this one needs rows 0 to 1"):
        find(path)
    small().write_parquet(path)
    with pytest.raises(ValueError, match="it has no genrec metadata"):
        find(path)
    assert path.exists()


def test_a_full_disk(tmp_path: Path):
    """A limit on the size of files stands for the full disk: the write fails half way."""
    first, second = tmp_path / shard_name(0, 2), tmp_path / shard_name(2, 4)
    info = write_shard(first, small(), INFO)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ValueError, match="can't be written .* the disk is full, or a quota"):
            write_shard(second, small(), ShardInfo(INFO.fingerprint, 2, 4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == [first.name]  # no half shard, no partial file
    assert find(first) == info
    write_shard(second, small(), ShardInfo(INFO.fingerprint, 2, 4))
    with pytest.raises(FileNotFoundError), enough_space(first):  # other errors stay what they are
        raise FileNotFoundError(2, "No such file")
