"""Key files, pseudonyms, signatures, and places that a key must not lie in."""

from __future__ import annotations

import stat
import subprocess

import pytest

from genrec.audit.keys import AuditKey, PublicKey, check_outside, custody_folder, public_path


def test_signatures_need_the_secret_key():
    key, other = AuditKey(b"a" * 32), AuditKey(b"b" * 32)
    signature = key.sign(b"data")
    assert key.public.verifies(signature, b"data")
    assert not key.public.verifies(signature, b"Data")
    assert not other.public.verifies(signature, b"data")
    for broken in (None, 7, "", "zz", signature[:-2], signature + "00", "0" * 128):
        assert not key.public.verifies(broken, b"data")


def test_openssl_accepts_key_and_signature(tmp_path):
    key = AuditKey.create(tmp_path / "audit.key")
    (tmp_path / "data").write_bytes(b"head")
    (tmp_path / "signature").write_bytes(bytes.fromhex(key.sign(b"head")))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "audit.pub", "-rawin"]
    try:
        done = subprocess.run([*command, "-in", "data", "-sigfile", "signature"], cwd=tmp_path,
                              capture_output=True, text=True)  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no openssl on PATH")
    assert "Verified Successfully" in done.stdout, done.stderr


def test_pseudonyms_differ_by_user_and_key_and_give_nothing_away():
    key, other = AuditKey(b"a" * 32), AuditKey(b"b" * 32)
    assert key.pseudonym("u1") == key.pseudonym("u1") != key.pseudonym("u2")
    assert key.pseudonym("u1") != other.pseudonym("u1")
    assert key.pseudonym(7) == key.pseudonym("7")
    assert "a" * 8 not in repr(key) and key.key_id != other.key_id


def test_key_file_is_private_and_never_overwritten(tmp_path, caplog):
    path = tmp_path / "deep" / "audit.key"
    key = AuditKey.create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert AuditKey.load(path) == key and not caplog.records
    assert PublicKey.load(public_path(path)) == key.public
    assert key.secret.hex() not in public_path(path).read_text()
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
    with pytest.raises(ValueError, match="holds no public key"):
        PublicKey.load(path)
    with pytest.raises(ValueError, match="there is no public key"):
        PublicKey.load(tmp_path / "absent")


def test_a_key_inside_the_run_is_refused(tmp_path):
    run = tmp_path / "run"
    (run / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(run / "deep")
    for inside in (run / "audit.key", tmp_path / "link" / "k", run / "deep" / ".." / "k"):
        with pytest.raises(ValueError, match="lies inside the run folder .* forge its log"):
            check_outside(inside, run, "key_file")
    assert check_outside(tmp_path / "k", run, "key_file") == tmp_path / "k"
    assert check_outside(custody_folder(run) / "k", run, "key_file")
    assert custody_folder(run) == tmp_path / "run.custody"
