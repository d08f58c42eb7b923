"""The FastAPI application over a run: recommend, health, metrics, and swaps for the admin."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from genrec import __version__
from genrec.recommend import Recommendation

try:
    from fastapi import Depends, FastAPI, HTTPException, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from fastapi.security import HTTPBearer
    from prometheus_client import CONTENT_TYPE_LATEST
    from starlette.exceptions import HTTPException as StarletteHTTPException
except ModuleNotFoundError as error:
    if error.name not in ("fastapi", "starlette", "prometheus_client"):
        raise
    raise ImportError(f'the server needs {error.name}; run: pip install "genrec[serve]"') from error

from genrec.server.batching import Answer, Batcher, Job, QueueFull
from genrec.server.gate import CLIENT_GONE, Gate, authorised
from genrec.server.messages import shorten, validation_message
from genrec.server.monitoring import Monitoring
from genrec.server.requests import Prepared, Refused, prepare, view_rule
from genrec.server.schema import (
    Health,
    ModelBody,
    Problem,
    RecommendBody,
    RecommendRequests,
    RecommendResponse,
    RecommendResponses,
    SwapResponse,
    ViewBody,
)
from genrec.server.serving import (
    Load,
    Serving,
    Snapshot,
    SwapInProgress,
    SwapRefused,
    ViewRule,
    path_below,
)
from genrec.server.settings import ServerSettings

logger = logging.getLogger(__name__)

MAX_DETAIL = 2000  # characters of an error message
RETRY_AFTER_S = 1
# Where the description of the API has a view; the body of /admin/model refers to it.
_VIEW_SCHEMA = "#/paths/~1admin~1view/post/requestBody/content/application~1json/schema"

Body = TypeVar("Body", bound=BaseModel)


def create_app(load: Load, settings: ServerSettings) -> FastAPI:
    """The application; the first model is loaded here, so that a broken run fails at once.

    Args:
        load: loads a run (and a model of another run, or None); see `genrec.server.serving`.
        settings: the run, limits and the admin's token.

    Raises:
        ValueError: the run can't be served, or the view doesn't fit its catalogue.
    """
    serving = Serving(load, load(settings.run_dir, settings.model_run), settings.view)
    endpoints = Endpoints(serving, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        endpoints.batcher.start()
        yield
        await endpoints.batcher.close()

    app = FastAPI(
        title="genrec",
        version=__version__,
        description="Recommendations by constrained decoding of semantic ids.",
        lifespan=lifespan,
    )
    app.add_middleware(Gate, settings=settings, monitoring=endpoints.monitoring)
    _add_error_handlers(app)
    _add_routes(app, endpoints)
    return app


def _add_routes(app: FastAPI, endpoints: Endpoints) -> None:
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": Problem, "description": text}
        for status, text in {
            400: "The body can't be read.",
            409: "The filters leave no item.",
            413: "The body is too large.",
            422: "A value is wrong, too large, or an item is unknown.",
            503: "Too many users wait; see Retry-After.",
            504: "The time is up.",
        }.items()
    }
    app.add_api_route("/", endpoints.index, include_in_schema=False)
    app.add_api_route(
        "/recommend",
        endpoints.recommend,
        methods=["POST"],
        response_model=None,
        responses={200: {"model": RecommendResponse | RecommendResponses}, **problems},
    )
    app.add_api_route("/health", endpoints.health, response_model=Health)
    app.add_api_route("/metrics", endpoints.metrics, response_class=Response)
    if endpoints.settings.admin_token is None:
        return
    guard = [Depends(HTTPBearer(auto_error=False)), Depends(endpoints.require_admin)]
    refused = {status: text for status, text in problems.items() if status not in (503, 504)}
    for path, function, body in (
        ("/admin/view", endpoints.swap_view, ViewBody),
        ("/admin/model", endpoints.swap_model, ModelBody),
    ):
        schema = body.model_json_schema(ref_template=_VIEW_SCHEMA)
        schema = schema.pop("$defs", {}).get(body.__name__, schema)
        app.add_api_route(
            path,
            function,
            methods=["POST"],
            dependencies=guard,
            response_model=SwapResponse,
            responses=refused,
            openapi_extra={
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": schema}},
                }
            },
        )


class Endpoints:
    """What the routes do.

    Args:
        serving: the model and view.
        settings: limits.
    """

    def __init__(self, serving: Serving, settings: ServerSettings) -> None:
        self.serving, self.settings = serving, settings
        self.monitoring = Monitoring(
            lambda: self.batcher.waiting, lambda: self.serving.current.n_allowed
        )
        self.batcher = Batcher(
            settings.max_batch,
            settings.max_wait_ms / 1000,
            settings.max_queue,
            self.monitoring.batch,
        )
        self._started = time.monotonic()

    async def index(self) -> dict[str, Any]:
        """What this server is."""
        return {
            "name": "genrec",
            "version": __version__,
            "endpoints": ["POST /recommend", "GET /health", "GET /metrics"],
            "docs": "/docs",
        }

    async def recommend(self, body: RecommendBody, request: Request) -> Response:
        """The k best items for one user, or for each of several."""
        many = isinstance(body, RecommendRequests)
        users = body.requests if isinstance(body, RecommendRequests) else [body]
        if len(users) > self.settings.max_requests:
            raise Refused(
                422,
                f"{len(users)} requests in one call exceed this server's limit of "
                f"{self.settings.max_requests}",
            )
        snapshot = self.serving.current
        prepared = [
            prepare(user, snapshot, self.settings, f"requests[{i}]." if many else "")
            for i, user in enumerate(users)
        ]
        answers = await self._answers([user.job for user in prepared], request)
        if answers is None:
            return Response(status_code=CLIENT_GONE)
        results = [_result(user, answer) for user, answer in zip(prepared, answers, strict=True)]
        state = served(snapshot)
        return JSONResponse({"results": results, **state} if many else {**results[0], **state})

    async def _answers(self, jobs: Sequence[Job], request: Request) -> list[Answer] | None:
        """Wait for the batcher; None if the client goes away meanwhile.

        Raises:
            QueueFull: there is no room.
            HTTPException: 504, the time is up.
        """
        self.batcher.submit(jobs)
        together = asyncio.create_task(_together(jobs))
        gone = asyncio.create_task(_gone(request))
        either: set[asyncio.Future[Any]] = {together, gone}
        try:
            await asyncio.wait(
                either, timeout=self.settings.timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if together.done():
                return together.result()
            if gone.done():
                return None
            raise HTTPException(
                504, f"no answer within {self.settings.timeout_s:g} s; the server is overloaded"
            )
        finally:
            gone.cancel()
            together.cancel()
            for job in jobs:  # those that still wait leave the queue
                job.answer.cancel()

    async def health(self, response: Response) -> dict[str, Any]:
        """Whether the server answers, and from what."""
        state = self.batcher.state
        response.status_code = 200 if state == "ready" else 503
        return {
            "status": state,
            "uptime_s": round(time.monotonic() - self._started, 3),
            "queued_users": self.batcher.waiting,
            **self._swapped(self.serving.current),
        }

    async def metrics(self) -> Response:
        """Prometheus' text format."""
        return Response(self.monitoring.text(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def require_admin(self, request: Request) -> None:
        """Refuse whoever lacks the token: the gate did already, but by the path it saw."""
        token = self.settings.admin_token
        if token is None or not authorised(request.headers.get("authorization"), token):
            raise HTTPException(401, "this endpoint needs the admin's bearer token")

    async def swap_view(self, request: Request) -> dict[str, Any]:
        """Serve another view of the catalogue from now on."""
        body = await request.body()
        # A view may name a million items: read on the loop, it would hold up every request.
        rule = await asyncio.to_thread(lambda: view_rule(_parsed(ViewBody, body)))
        try:
            new = await self.serving.swap_view(rule)
        except SwapRefused:
            self.monitoring.swap("view", done=False)
            raise
        self.monitoring.swap("view", done=True)
        return self._swapped(new)

    async def swap_model(self, request: Request) -> dict[str, Any]:
        """Load a run while the present one serves, then serve it."""
        content = await request.body()
        body, rule = await asyncio.to_thread(lambda: _model_and_rule(content))
        try:
            root = self.settings.runs_root
            if root is None:
                raise SwapRefused("this server was started without a root folder of runs")
            folders = [
                None if name is None else str(await asyncio.to_thread(path_below, root, name))
                for name in (body.run_dir, body.model_run)
            ]
            assert folders[0] is not None
            new = await self.serving.swap_model(folders[0], folders[1], rule)
        except (SwapRefused, SwapInProgress):
            self.monitoring.swap("model", done=False)
            raise
        self.monitoring.swap("model", done=True)
        return self._swapped(new)

    def _swapped(self, snapshot: Snapshot) -> dict[str, Any]:
        return {**served(snapshot), "catalogue_items": snapshot.n_items}


async def _together(jobs: Sequence[Job]) -> list[Answer]:
    """All answers; a coroutine, since asyncio logs a `gather` that was cancelled and not read."""
    return await asyncio.gather(*(job.answer for job in jobs))


def _parsed(kind: type[Body], content: bytes) -> Body:
    """A body read from JSON; what is wrong with it is told as FastAPI's own parsing is."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


def _model_and_rule(content: bytes) -> tuple[ModelBody, ViewRule | None]:
    body = _parsed(ModelBody, content)
    return body, None if body.view is None else view_rule(body.view)


async def _gone(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def served(snapshot: Snapshot) -> dict[str, Any]:
    """Model and view of an answer, as `ServedModel` and `ServedView`."""
    return {
        "model": {
            "version": snapshot.model_version,
            "sha256": snapshot.model.sha256,
            "stage": snapshot.recommender.model_stage,
            "semantic_ids_sha256": snapshot.semantic_ids_sha256,
        },
        "view": {
            "version": snapshot.view_version,
            "sha256": snapshot.view_sha256,
            "rule": snapshot.rule.kind,
            "items": snapshot.n_allowed,
        },
    }


def _result(user: Prepared, answer: Answer) -> dict[str, Any]:
    return {
        "user_id": user.user_id,
        "items": [_item(item) for item in answer.items],
        "certified": answer.certified,
        "dropped_items": user.dropped,
    }


def _item(item: Recommendation) -> dict[str, Any]:
    return {
        "rank": item.rank,
        "item_id": item.item_id,
        "title": item.title,
        "score": item.score,
        "sid": item.sid,
        "level_log_probs": item.level_log_probs,
    }


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    if len(detail) > MAX_DETAIL:
        detail = detail[: MAX_DETAIL - 1] + "…"
    return JSONResponse({"detail": detail}, status, headers)


def _add_error_handlers(app: FastAPI) -> None:
    """One shape for every error, and nothing of a request in it but bounded, printable pieces."""

    async def invalid(request: Request, error: Any) -> JSONResponse:
        return _problem(422, validation_message(error.errors()))

    async def http(request: Request, error: Any) -> JSONResponse:
        detail = str(error.detail)
        if error.status_code == 400 and error.__cause__ is not None:  # FastAPI's parsing of JSON
            detail = f"the body can't be read as JSON: {shorten([str(error.__cause__)])}"
        return _problem(error.status_code, detail, error.headers)

    async def refused(request: Request, error: Any) -> JSONResponse:
        return _problem(error.status, error.detail)

    async def full(request: Request, error: Any) -> JSONResponse:
        return _problem(503, str(error), {"retry-after": str(RETRY_AFTER_S)})

    async def swap_refused(request: Request, error: Any) -> JSONResponse:
        return _problem(422, str(error))

    async def swap_in_progress(request: Request, error: Any) -> JSONResponse:
        return _problem(409, str(error))

    async def unexpected(request: Request, error: Any) -> JSONResponse:
        return _problem(500, "internal error; the server's log says more")

    for kind, handler in (
        (RequestValidationError, invalid),
        (StarletteHTTPException, http),
        (Refused, refused),
        (QueueFull, full),
        (SwapRefused, swap_refused),
        (SwapInProgress, swap_in_progress),
        (Exception, unexpected),
    ):
        app.add_exception_handler(kind, handler)  # type: ignore[arg-type]
