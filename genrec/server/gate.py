"""What a request has to pass before anything reads it: token, size, time, type.

Plain ASGI, so that a body is counted as it arrives, with a Content-Length or in chunks, and never
held beyond its limit.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from genrec.server.monitoring import Monitoring
from genrec.server.settings import ServerSettings

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CLIENT_GONE = 499  # nginx's name for it; nobody gets to see the answer


def authorised(header: bytes | str | None, token: str) -> bool:
    """Whether an Authorization header carries the token; takes the same time for any wrong one."""
    given = header.encode("latin-1", "replace") if isinstance(header, str) else header or b""
    scheme, _, word = given.partition(b" ")
    # Of digests, so that lengths don't show either.
    same = hmac.compare_digest(
        hashlib.sha256(word.strip()).digest(), hashlib.sha256(token.encode()).digest()
    )
    return scheme.lower() == b"bearer" and same


class _Stop(Exception):
    """The request ends here."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Gate:
    """Middleware around the app; also counts every request.

    Args:
        app: what is behind it.
        settings: limits and token.
        monitoring: counts requests.
    """

    def __init__(self, app: Any, settings: ServerSettings, monitoring: Monitoring) -> None:
        self.app, self.settings, self.monitoring = app, settings, monitoring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its body read, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), CLIENT_GONE

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            behind = await self._admit(path, scope, receive)
            await self.app(scope, behind, watched_send)
        except _Stop as stop:
            if stop.status != CLIENT_GONE:
                # The rest of the body is not read, so the connection can't be used again.
                response = JSONResponse(
                    {"detail": stop.detail}, stop.status, {"connection": "close", **stop.headers}
                )
                await response(scope, receive, watched_send)
        except Exception:
            status = 500  # answered outside of this middleware
            raise
        finally:
            self.monitoring.request(path, status, time.monotonic() - started)

    async def _admit(self, path: str, scope: Scope, receive: Receive) -> Receive:
        """Check a request and read its body; returns what the app receives in place of it."""
        headers = dict(scope["headers"])
        limit = self.settings.max_body_bytes
        token = self.settings.admin_token
        if token is not None and (path == "/admin" or path.startswith("/admin/")):
            if not authorised(headers.get(b"authorization"), token):
                logger.warning("admin call without the right token, from %s", scope.get("client"))
                raise _Stop(
                    401, "this endpoint needs the admin's bearer token", www_authenticate="Bearer"
                )
            limit = self.settings.max_admin_body_bytes
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        media = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if media != b"application/json":
            raise _Stop(415, "send a JSON body with Content-Type: application/json")
        body = await self._read(headers.get(b"content-length"), limit, receive)
        return _replay(body, receive)

    async def _read(self, length: bytes | None, limit: int, receive: Receive) -> bytes:
        too_large = _Stop(413, f"the body is larger than this server's limit of {limit} bytes")
        if length is not None:
            if not length.isdigit():
                raise _Stop(400, "Content-Length is no number")
            if len(length) > 18 or int(length) > limit:
                raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Stop(CLIENT_GONE, "the client went away")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise _Stop(
                408, f"the body did not arrive within {self.settings.body_timeout_s:g} s"
            ) from error


def _replay(body: bytes, receive: Receive) -> Receive:
    """First the whole body, then whatever comes (the client's going away)."""
    told = False

    async def behind() -> Message:
        nonlocal told
        if not told:
            told = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return behind
