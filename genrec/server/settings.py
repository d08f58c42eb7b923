"""Settings of the server: limits, batching, and who may swap the model or the view."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from genrec.server.schema import MAX_REQUESTS
from genrec.server.serving import ViewRule

TOKEN_VARIABLE = "GENREC_ADMIN_TOKEN"
MIN_TOKEN_LENGTH = 16


@dataclass(frozen=True)
class ServerSettings:
    """Limits and batching of one server.

    Attributes:
        run_dir: run to serve from the start.
        model_run: run that its model comes from, if not `run_dir`.
        view: the first view.
        max_batch: users decoded together; 1 turns batching off.
        max_wait_ms: how long the oldest waiting user is kept for others to join the batch; below
            `timeout_s`.
        max_queue: users that may wait; more are refused with 503.
        timeout_s: from a request's arrival to its answer; then 504.
        beam_width: prefixes kept per level; None: by k, as `Recommender.recommend` does.
        max_k: longest list.
        max_history: longest history of a request, in items (the model reads the newest ones).
        max_exclude: most items that a request may exclude beside its history.
        max_candidates: most items that a request may name as the only ones.
        max_requests: most users in one call.
        max_body_bytes: largest body.
        max_admin_body_bytes: largest body of an authorised admin call: a view may name every item.
        body_timeout_s: for a body to arrive; then 408.
        admin_token: bearer token of ``/admin``; None: there is no ``/admin``.
        runs_root: folder that holds every run that ``/admin/model`` may load.

    Raises:
        ValueError: a limit isn't positive, or limits contradict each other.
    """

    run_dir: str
    model_run: str | None = None
    view: ViewRule = field(default_factory=ViewRule)
    max_batch: int = 32
    max_wait_ms: float = 2.0
    max_queue: int = 1024
    timeout_s: float = 10.0
    beam_width: int | None = None
    max_k: int = 100
    max_history: int = 1000
    max_exclude: int = 1000
    max_candidates: int = 1000
    max_requests: int = 64
    max_body_bytes: int = 256 << 10
    max_admin_body_bytes: int = 64 << 20
    body_timeout_s: float = 10.0
    admin_token: str | None = field(default=None, repr=False)
    runs_root: Path | None = None

    def __post_init__(self) -> None:
        """Reject limits that can't work before a model is loaded."""
        for name in (
            "max_batch", "max_queue", "timeout_s", "max_k", "max_requests", "max_body_bytes",
            "max_admin_body_bytes", "body_timeout_s",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if self.max_wait_ms / 1000 >= self.timeout_s:  # infinity, too
            raise ValueError(
                f"max_wait_ms={self.max_wait_ms} must be below timeout_s={self.timeout_s:g} "
                f"({1000 * self.timeout_s:g} ms): nobody would be answered in time; lower it"
            )
        if not math.isfinite(self.max_wait_ms):
            raise ValueError(f"max_wait_ms={self.max_wait_ms} must be finite")
        for name in ("max_wait_ms", "max_history", "max_exclude", "max_candidates"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if self.max_requests > MAX_REQUESTS:
            raise ValueError(f"max_requests={self.max_requests} exceeds {MAX_REQUESTS}")
        if self.max_requests > self.max_queue:
            raise ValueError(
                f"max_requests={self.max_requests} exceeds max_queue={self.max_queue}: such a call "
                "could never be taken; raise max_queue"
            )
        if self.beam_width is not None and self.beam_width < self.max_k:
            raise ValueError(
                f"beam_width={self.beam_width} must be at least max_k={self.max_k}; lower max_k"
            )
        if self.admin_token is not None:
            _check_token(self.admin_token)


def _check_token(token: str) -> None:
    if len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable():
        raise ValueError(
            f"the admin token has {len(token)} characters; it needs at least {MIN_TOKEN_LENGTH}, "
            "all of them printable ASCII (make one with: openssl rand -hex 32)"
        )
    if " " in token:
        raise ValueError("the admin token holds a space; a bearer token has none")


def read_admin_token(file: Path | str | None = None) -> str | None:
    """The admin token: the content of `file`, else ``$GENREC_ADMIN_TOKEN``; None: neither is set.

    Raises:
        ValueError: the file is missing or empty, or the token is too short or no plain word.
    """
    if file is not None:
        if not Path(file).is_file():
            raise ValueError(f"admin token file {file} does not exist")
        token = Path(file).read_text(encoding="utf-8").strip()
    else:
        # An empty variable is how a shell or a compose file says "not set".
        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        if not token:
            return None
    _check_token(token)
    return token
