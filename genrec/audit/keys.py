"""The two keys of a log: a secret one that signs and makes pseudonyms, a public one that verifies.

The secret key must lie outside the run folder, because whoever can write the run and read the key
can forge the log. Without another place by name it lies in ``<run folder>.custody``: a folder of
its own, which you can move, mount or protect by itself.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from genrec.artifacts import write_bytes

logger = logging.getLogger(__name__)

KEY, PUBLIC_KEY = "audit.key", "audit.pub"
_HEX_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 public key (32 bytes): verifies what the secret key signed."""

    raw: bytes

    @property
    def key_id(self) -> str:
        """First 16 hexadecimal digits of the key's SHA-256."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    def verifies(self, signature: object, data: bytes) -> bool:
        """Whether `signature` (hexadecimal) is this key's under `data`; any value may be asked."""
        try:
            signed = bytes.fromhex(signature) if isinstance(signature, str) else b""
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signed, data)
        except (InvalidSignature, ValueError):
            return False
        return True

    @classmethod
    def load(cls, path: Path | str) -> PublicKey:
        """Read a PEM file.

        Raises:
            ValueError: the file is absent or holds no Ed25519 public key.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there is no public key at {path}; name it with --public_key")
        try:
            key = load_pem_public_key(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} holds no public key in PEM form: {error}") from error
        if not isinstance(key, Ed25519PublicKey):
            raise ValueError(f"{path} holds a {type(key).__name__}; it must be an Ed25519 key")
        return cls(key.public_bytes(Encoding.Raw, PublicFormat.Raw))

    def write(self, path: Path | str) -> None:
        """Write the PEM file (SubjectPublicKeyInfo, which OpenSSL reads)."""
        key = Ed25519PublicKey.from_public_bytes(self.raw)
        write_bytes(path, key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


@dataclass(frozen=True)
class AuditKey:
    """A 256-bit secret; what is signed and what is pseudonymised never share a derivation."""

    secret: bytes = field(repr=False)

    def _mac(self, purpose: str, data: bytes = b"") -> bytes:
        return hmac.digest(self.secret, purpose.encode() + b"\0" + data, "sha256")

    @cached_property
    def _signer(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self._mac("genrec audit signing key"))

    @cached_property
    def public(self) -> PublicKey:
        """The key to hand out."""
        raw = self._signer.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return PublicKey(raw)

    @property
    def key_id(self) -> str:
        """Name of the key that gives nothing of the secret away."""
        return self.public.key_id

    def pseudonym(self, user_id: object) -> str:
        """HMAC-SHA256 of a user id: unlike a plain hash it can't be found by trying ids."""
        return self._mac("genrec audit pseudonym", str(user_id).encode()).hex()

    def sign(self, data: bytes) -> str:
        """Ed25519 signature, 128 hexadecimal digits."""
        return self._signer.sign(data).hex()

    @classmethod
    def load(cls, path: Path | str) -> AuditKey:
        """Read a key file (64 hexadecimal digits).

        Raises:
            ValueError: the file is absent or holds no key.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(
                f"there is no key at {path}; name the one that signed the log with --key_file, or "
                f"make one: genrec audit keygen --key_file {path}"
            )
        text = path.read_text(encoding="utf-8", errors="replace").strip()
        if not _HEX_KEY.fullmatch(text):
            raise ValueError(f"{path} holds no key: it must be 64 lower-case hexadecimal digits")
        if path.stat().st_mode & 0o077:
            logger.warning("%s can be read by others; run: chmod 600 %s", path, path)
        return cls(bytes.fromhex(text))

    @classmethod
    def create(cls, path: Path | str) -> AuditKey:
        """Make a key, readable by its owner alone, and its public half beside it.

        Raises:
            FileExistsError: there is a file already, which stays as it is.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        key = cls(secrets.token_bytes(32))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(key.secret.hex() + "\n")
        key.public.write(public_path(path))
        return key


def public_path(key_file: Path | str) -> Path:
    """Where the public half of a key file lies."""
    return Path(key_file).with_suffix(".pub")


def custody_folder(run_dir: Path | str) -> Path:
    """Default place of key and anchor: beside the run folder, never inside."""
    run = Path(run_dir).resolve()
    return run.with_name(f"{run.name}.custody")


def check_outside(path: Path | str, run_dir: Path | str, what: str) -> Path:
    """`path`, which must not lie in the run folder.

    Args:
        path: of a key or an anchor.
        run_dir: the run.
        what: "key_file" or "anchor_file", for the message.

    Raises:
        ValueError: it does, also by way of links.
    """
    if Path(path).resolve().is_relative_to(Path(run_dir).resolve()):
        raise ValueError(
            f"{what}={path} lies inside the run folder {run_dir}: whoever can write the run could "
            f"forge its log; use a place outside, e.g. {custody_folder(run_dir) / Path(path).name}"
        )
    return Path(path)
