"""Keys, canonical bytes, chaining and the signed head."""

from __future__ import annotations

import json
import stat

import pytest

from genrec.audit.custody import (
    GENESIS,
    AuditKey,
    canonical,
    head_is_signed,
    make_head,
    record_hash,
    seal,
)


def test_canonical_bytes_do_not_depend_on_order_or_script():
    assert canonical({"b": 1, "a": "é\u2028"}) == b'{"a":"\\u00e9\\u2028","b":1}'
    with pytest.raises(ValueError):
        canonical({"a": float("nan")})


def test_seal_chains_and_numbers():
    sealed = seal([{"x": 1}, {"x": 2}, {"x": 1}])
    assert [r["record"] for r in sealed] == [0, 1, 2]
    assert sealed[0]["previous_sha256"] == GENESIS
    for before, after in zip(sealed, sealed[1:], strict=False):
        assert after["previous_sha256"] == before["sha256"] == record_hash(before)
    assert sealed[0]["sha256"] != sealed[2]["sha256"]
    again = json.loads(canonical(sealed[1]))
    assert record_hash(again) == sealed[1]["sha256"]


def test_head_needs_the_key():
    key, other = AuditKey(b"a" * 32), AuditKey(b"b" * 32)
    head = make_head(seal([{"x": 1}]), key)
    assert head["records"] == 1 and head_is_signed(head, key)
    assert not head_is_signed(head, other)
    assert not head_is_signed({**head, "records": 0}, key)
    assert not head_is_signed({**head, "signature": None}, key)
    assert make_head([], key)["last_sha256"] == GENESIS


def test_pseudonyms_differ_by_user_and_key_and_give_nothing_away():
    key, other = AuditKey(b"a" * 32), AuditKey(b"b" * 32)
    assert key.pseudonym("u1") == key.pseudonym("u1") != key.pseudonym("u2")
    assert key.pseudonym("u1") != other.pseudonym("u1")
    assert key.pseudonym(7) == key.pseudonym("7")
    assert key.sign(b"u1") != key.pseudonym("u1")
    assert "a" * 8 not in repr(key) and key.key_id != other.key_id


def test_key_file_is_private_and_never_overwritten(tmp_path, caplog):
    path = tmp_path / "deep" / "audit.key"
    key = AuditKey.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert AuditKey.load(path) == key and not caplog.records
    with pytest.raises(FileExistsError):
        AuditKey.create(path)
    assert AuditKey.load(path) == key
    path.chmod(0o644)
    AuditKey.load(path)
    assert "can be read by others" in caplog.text


@pytest.mark.parametrize("text", ["", "short", "z" * 64, "A" * 64, "a" * 63, "a" * 65])
def test_bad_key_files_are_refused(tmp_path, text):
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(ValueError, match="64 lower-case hexadecimal digits"):
        AuditKey.load(path)
    with pytest.raises(ValueError, match="there is no key"):
        AuditKey.load(tmp_path / "absent")
