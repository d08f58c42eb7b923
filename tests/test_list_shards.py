"""Shards that survive kills, damage and full disks."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from genrec.list_shards import (
    ShardInfo,
    enough_space,
    find_shard,
    read_info,
    shard_name,
    table_sha256,
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
    assert info == ShardInfo(INFO.fingerprint, 0, 2, {"users": 2}, table_sha256(small()))
    assert find(path) == read_info(path) == info
    assert_frame_equal(pl.read_parquet(path), small())
    first = path.read_bytes()
    write_shard(path, small(), INFO)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_hash_is_of_the_content(tmp_path: Path):
    table = small()
    halves = pl.concat([table[:1], table[1:]], rechunk=False)
    assert halves.n_chunks() == 2 and table_sha256(halves) == table_sha256(table)
    sliced = pl.concat([table, table])[2:]
    assert table_sha256(sliced) == table_sha256(table)
    changes = [
        pl.col("user_id") + "x", pl.col("rank") + 1, pl.col("rank").cast(pl.Int64),
        -pl.col("score"), pl.col("level_log_probs").list.head(1), pl.lit(True).alias("certified"),
        pl.col("user_id").reverse(),
    ]  # fmt: skip
    hashes = {table_sha256(table), *(table_sha256(table.with_columns(c)) for c in changes)}
    hashes |= {table_sha256(table.rename({"rank": "place"})), table_sha256(table[:1])}
    assert len(hashes) == 1 + len(changes) + 2
    # The same letters, and the same numbers, cut elsewhere.
    cut = [pl.DataFrame({"a": ["ab", "c"]}), pl.DataFrame({"a": ["a", "bc"]})]
    assert table_sha256(cut[0]) != table_sha256(cut[1])
    cut = [pl.DataFrame({"a": [[1, 2], [3]]}), pl.DataFrame({"a": [[1], [2, 3]]})]
    assert table_sha256(cut[0]) != table_sha256(cut[1])


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("shard") / shard_name(0, 2)
    write_shard(path, small(), INFO)
    return path, path.read_bytes()


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_cut_and_any_flipped_bit_is_noticed_or_harmless(written, data):
    """A damaged file is set aside; what still reads as whole holds the very same table."""
    path, good = written
    for old in path.parent.glob("damaged-*"):
        old.unlink()
    at = data.draw(st.integers(0, len(good) - 1))
    if data.draw(st.booleans()):
        bad = good[:at]
    else:
        bad = bytearray(good)
        bad[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(bad))
    try:
        info = find(path)
    except ValueError as error:  # the flip hit the fingerprint or the range themselves
        assert "is of another run" in str(error)
        return
    if info is None:
        assert not path.exists()
        assert (path.parent / f"damaged-1-{path.name}").read_bytes() == bytes(bad)
    else:
        assert_frame_equal(pl.read_parquet(path), small())


def test_what_is_set_aside_is_kept(tmp_path: Path, caplog):
    path = tmp_path / shard_name(0, 2)
    for number in (1, 2):
        path.write_bytes(b"PAR1 half")
        assert find(path) is None
        assert (tmp_path / f"damaged-{number}-{path.name}").read_bytes() == b"PAR1 half"
    assert f"{path.name} is damaged" in caplog.text and "made again" in caplog.text


def test_a_wrong_hash_is_damage_and_another_run_is_not(tmp_path: Path):
    path = tmp_path / shard_name(0, 2)
    info = write_shard(path, small(), INFO)
    other = small().with_columns(pl.col("rank") + 1).to_arrow(compat_level=pl.CompatLevel.oldest())
    text = json.dumps(info.__dict__)
    pq.write_table(other.replace_schema_metadata({b"genrec": text.encode()}), path)
    assert find(path) is None and (tmp_path / f"damaged-1-{path.name}").exists()
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
