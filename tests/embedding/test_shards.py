"""Encoding in shards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from genrec.embedding.shards import encode_in_shards, remove_shards

TEXTS = [f"text {i}" for i in range(10)]


class Encoder:
    """Encodes a text as its number and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.asked.append(texts)
        return np.array([[float(t.split()[1]), 1] for t in texts], dtype=np.float64)


def test_shards_make_one_file_and_go(tmp_path: Path):
    path, encoder = tmp_path / "item_embeddings.npy", Encoder()
    found = encode_in_shards(TEXTS, encoder, path, {"model": "a"}, shard_size=4)
    assert [len(part) for part in encoder.asked] == [4, 4, 2]
    assert isinstance(found, np.memmap) and found.dtype == np.float32
    assert found.tolist() == [[i, 1] for i in range(10)]
    assert np.load(path).tolist() == found.tolist()
    names = sorted(p.name[:6] for p in (tmp_path / "shards").iterdir())
    assert names == ["00000-", "00001-", "00002-"]
    remove_shards(path)
    remove_shards(path)  # nothing there: fine
    assert [p.name for p in tmp_path.iterdir()] == ["item_embeddings.npy"]


def test_a_second_call_encodes_only_what_is_missing(tmp_path: Path):
    path, encoder = tmp_path / "v.npy", Encoder()
    encode_in_shards(TEXTS, encoder, path, {"model": "a"}, 4)
    shards = sorted((tmp_path / "shards").iterdir())
    shards[0].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-3])  # damaged from outside
    path.unlink()
    encoder.asked.clear()
    found = encode_in_shards(TEXTS, encoder, path, {"model": "a"}, 4)
    assert encoder.asked == [TEXTS[:4], TEXTS[8:]]
    assert found.tolist() == [[i, 1] for i in range(10)]


def test_shards_of_an_earlier_place_are_read_there(tmp_path: Path):
    old, path, encoder = tmp_path / "old" / "v.npy", tmp_path / "new" / "v.npy", Encoder()
    encode_in_shards(TEXTS, encoder, old, {"model": "a"}, 4)
    shards = sorted((tmp_path / "old" / "shards").iterdir())
    shards[1].write_bytes(b"cut")
    encoder.asked.clear()
    places = [tmp_path / "nowhere", tmp_path / "old"]
    found = encode_in_shards(TEXTS, encoder, path, {"model": "a"}, 4, places)
    assert encoder.asked == [TEXTS[4:8]] and found.tolist() == [[i, 1] for i in range(10)]
    assert [p.name for p in (tmp_path / "new" / "shards").iterdir()] == [shards[1].name]
    encode_in_shards(TEXTS, encoder, path, {"model": "b"}, 4, places)
    assert len(encoder.asked) == 4


def test_other_texts_or_settings_are_encoded_anew(tmp_path: Path):
    path, encoder = tmp_path / "v.npy", Encoder()
    encode_in_shards(TEXTS, encoder, path, {"model": "a"}, 4)
    encoder.asked.clear()
    changed = [*TEXTS[:5], "text 99", *TEXTS[6:]]
    found = encode_in_shards(changed, encoder, path, {"model": "a"}, 4)
    assert encoder.asked == [changed[4:8]] and found[5, 0] == 99
    encoder.asked.clear()
    encode_in_shards(TEXTS, encoder, path, {"model": "b"}, 4)
    assert len(encoder.asked) == 3


def test_bad_vectors_and_bad_sizes_are_refused(tmp_path: Path):
    def nan(texts: list[str]) -> np.ndarray:
        return np.full((len(texts), 2), np.nan)

    with pytest.raises(ValueError, match="shard 00000: 4 rows hold NaN"):
        encode_in_shards(TEXTS, nan, tmp_path / "v.npy", {}, 4)
    assert not (tmp_path / "v.npy").exists() and not list((tmp_path).glob("shards/*"))
    for texts, size in (([], 4), (TEXTS, 0)):
        with pytest.raises(ValueError, match="at least one of each"):
            encode_in_shards(texts, Encoder(), tmp_path / "v.npy", {}, size)


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from genrec.embedding.shards import encode_in_shards
calls = []
def encode(texts):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return np.array([[float(t.split()[1]), 1] for t in texts])
encode_in_shards([f"text {i}" for i in range(10)], encode, Path(sys.argv[1]), {}, 2)
"""


def test_a_killed_run_goes_on_with_the_shards_that_it_finished(tmp_path: Path):
    path = tmp_path / "v.npy"
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=env, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not path.exists()
    encoder = Encoder()
    found = encode_in_shards(TEXTS, encoder, path, {}, 2)
    assert encoder.asked == [TEXTS[4:6], TEXTS[6:8], TEXTS[8:]]
    assert found.tolist() == [[i, 1] for i in range(10)]
