"""From a parsed body to users who wait for a list: limits, item ids to rows, filters."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from genrec.server.batching import Job
from genrec.server.messages import shorten, validation_message
from genrec.server.schema import RecommendRequest, ViewBody
from genrec.server.serving import Snapshot, ViewRule
from genrec.server.settings import ServerSettings


class Refused(ValueError):
    """A request that can't be answered, with the HTTP status that says so."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


@dataclass(frozen=True)
class Prepared:
    """A user ready for the queue, and what the answer repeats."""

    job: Job
    user_id: int | str | None
    dropped: list[Any]


def prepare(
    request: RecommendRequest, snapshot: Snapshot, settings: ServerSettings, where: str = ""
) -> Prepared:
    """One user's request as catalogue rows; call it on the event loop.

    Args:
        request: as it came.
        snapshot: what it is answered from.
        settings: the limits.
        where: how messages call the request, ``requests[3].`` or nothing.

    Raises:
        Refused: 422 where a limit is passed, an item is unknown, or the model can't search, 409
            where the filters leave no item of the view.
    """
    for name, value, limit in (
        ("k", request.k, settings.max_k),
        ("history", len(request.history), settings.max_history),
        ("exclude", len(request.exclude), settings.max_exclude),
        ("candidates", len(request.candidates or []), settings.max_candidates),
    ):
        if value > limit:
            what = (
                f"k={shorten([value])} exceeds"
                if name == "k"
                else f"{name} has {value} items, more than"
            )
            raise Refused(422, f"{where}{what} this server's limit of {limit}")
    recommender = snapshot.recommender
    rows, dropped = _known(snapshot, request.history, request.unknown_items, f"{where}history")
    more, others = _known(snapshot, request.exclude, request.unknown_items, f"{where}exclude")
    candidates: np.ndarray | None = None
    if request.candidates is not None:
        only, unknown = _known(
            snapshot, request.candidates, request.unknown_items, f"{where}candidates"
        )
        candidates, others = np.array(only, dtype=np.int64), others + unknown
    if request.query is not None:
        try:
            recommender.require_family(recommender.search_family(rows))
        except ValueError as error:
            raise Refused(422, f"{where}query: {error}") from error
        # Within its characters a query may still have more tokens than the model holds.
        if why := recommender.too_long(recommender.search_prompt(request.query, rows)):
            raise Refused(422, f"{where}query: beside the history {why}; shorten it")
    filter_seen = request.filter_seen
    if filter_seen is None:  # a searcher may look for what they have
        filter_seen = recommender.filter_seen and request.query is None
    excluded = np.array([*(rows if filter_seen else []), *more], dtype=np.int64)
    if snapshot.n_left(excluded, candidates) == 0:
        names = "history and exclude leave" if candidates is None else "the candidates leave"
        raise Refused(
            409,
            f"{where}{names} none of the {snapshot.n_allowed} items that may be "
            "recommended now; exclude fewer, or set filter_seen to false",
        )
    job = Job(
        snapshot,
        rows,
        excluded,
        request.k,
        settings.beam_width or recommender.width_of(request.k),
        asyncio.get_running_loop().create_future(),
        candidates,
        request.query,
    )
    return Prepared(job, request.user_id, dropped + others)


def _known(
    snapshot: Snapshot, item_ids: list[Any], unknown_items: str, where: str
) -> tuple[list[int], list[Any]]:
    rows, unknown = snapshot.recommender.known_rows(item_ids)
    if unknown and unknown_items == "error":
        example = snapshot.recommender.semantic_ids.item_ids[0]
        raise Refused(
            422,
            f"{where}: {len(unknown)} items are not in the catalogue, among them "
            f"{shorten(unknown)} (ids look like {shorten([example])}); leave them out, or set "
            'unknown_items to "drop"',
        )
    return rows, unknown


def view_rule(body: ViewBody) -> ViewRule:
    """The rule that an admin call or a view file states."""
    if body.allow is not None:
        return ViewRule("allow", tuple(body.allow))
    return ViewRule("deny", tuple(body.deny)) if body.deny is not None else ViewRule()


def read_view(path: Path | str) -> ViewRule:
    """The rule of a JSON file that holds what ``/admin/view`` takes.

    Raises:
        ValueError: it is missing, no JSON, or no rule.
    """
    if not Path(path).is_file():
        raise ValueError(f"view file {path} does not exist")
    try:
        return view_rule(ViewBody.model_validate_json(Path(path).read_bytes()))
    except ValidationError as error:
        raise ValueError(f"{path}: {validation_message(error.errors())}") from error
