"""What goes over the wire: request and response models.

Types are strict (no "3" for 3, no true for 1) and unknown fields are refused. Limits that a server
sets itself are checked in `genrec.server.requests`, with the value in the message.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    field_validator,
    model_validator,
)

from genrec.prompts import escape_text
from genrec.server.messages import shorten

MAX_USER_ID = 256  # characters: it is echoed
MAX_QUERY = 1024  # characters, of which a prompt shows as many as in training
MAX_REQUESTS = 1024  # in one call, whatever a server allows: counted before they are looked at
_INT64 = 1 << 63


def _identifier(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"an id is a string or an integer, this is {_kind(value)}")
    if isinstance(value, int) and not -_INT64 <= value < _INT64:
        raise ValueError("an integer id must fit into 64 bits")
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                "a string id must be valid Unicode; this one has half a surrogate pair"
            ) from error
    return value


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {bool: "a boolean", float: "a number with a fraction", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


Identifier = Annotated[int | str, BeforeValidator(_identifier)]


# The first wrong id is reported: a list of a million wrong ones must not make a million errors.
Identifiers = Annotated[list[Identifier], Field(fail_fast=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, body: Any) -> Any:
        """Refuse unknown fields in one error, however many they are."""
        if isinstance(body, dict):
            unknown = [name for name in body if name not in cls.model_fields]
            if unknown:
                raise ValueError(
                    f"unknown field {shorten(unknown[:1])}; known: {', '.join(cls.model_fields)}"
                )
        return body


class RecommendRequest(_Strict):
    """One user."""

    history: Identifiers = Field(
        description="Item ids, oldest first; empty for a user nobody knows."
    )
    k: StrictInt = Field(10, ge=1, description="Length of the list.")
    user_id: Identifier | None = Field(None, description="Returned as it came.")
    filter_seen: StrictBool | None = Field(
        None, description="Leave out items of the history; default: as the model was validated."
    )
    exclude: Identifiers = Field([], description="Items that must not be in the list.")
    candidates: Identifiers | None = Field(
        None, description="The only items that may be in the list; default: all of the view."
    )
    query: StrictStr | None = Field(
        None,
        min_length=1,
        max_length=MAX_QUERY,
        description="What the user looks for, in words: beside the history, or alone where that is "
        "empty. Items of the history are then left in unless filter_seen is true.",
    )
    unknown_items: Literal["error", "drop"] = Field(
        "error", description="What to do with ids that the catalogue lacks."
    )

    @field_validator("query")
    @classmethod
    def _words(cls, value: str | None) -> str | None:
        if value is not None and not escape_text(value):
            raise ValueError("it says nothing; give some words")
        return value

    @field_validator("user_id")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        if isinstance(value, str) and len(value) > MAX_USER_ID:
            raise ValueError(f"{len(value)} characters are too many; at most {MAX_USER_ID}")
        return value


class RecommendRequests(_Strict):
    """Several users in one call; they are answered together or not at all."""

    requests: list[RecommendRequest] = Field(min_length=1, max_length=MAX_REQUESTS, fail_fast=True)


def _form(body: Any) -> str:
    many = isinstance(body, dict) and "requests" in body
    return "many" if many or isinstance(body, RecommendRequests) else "one"


RecommendBody = Annotated[
    Annotated[RecommendRequest, Tag("one")] | Annotated[RecommendRequests, Tag("many")],
    Discriminator(_form),
]


class ViewBody(_Strict):
    """Which items may be recommended: exactly one of the three."""

    allow: Identifiers | None = Field(None, description="Only these items.")
    deny: Identifiers | None = Field(None, description="All items but these.")
    all: Literal[True] | None = Field(None, description="The whole catalogue.")

    @model_validator(mode="after")
    def _one_of_three(self) -> ViewBody:
        if sum(value is not None for value in (self.allow, self.deny, self.all)) != 1:
            raise ValueError('give exactly one of "allow", "deny" and "all"')
        return self


class ModelBody(_Strict):
    """A run to serve from now on."""

    run_dir: StrictStr = Field(min_length=1, max_length=1024, description="Below the runs' root.")
    model_run: StrictStr | None = Field(
        None,
        min_length=1,
        max_length=1024,
        description="Run that the model comes from, if run_dir has only a later catalogue.",
    )
    view: ViewBody | None = Field(
        None, description="View to serve it with; default: the present one."
    )


class Item(BaseModel):
    """One recommended item; `score` is the sum of `level_log_probs`."""

    rank: int
    item_id: int | str
    title: str
    score: float
    sid: str
    level_log_probs: list[float]


class ItemList(BaseModel):
    """One user's list; `certified`: provably the exact top k under the model and the view."""

    user_id: int | str | None
    items: list[Item]
    certified: bool
    dropped_items: list[int | str]


class ServedModel(BaseModel):
    """The model that answered; `version` counts loads since the server started."""

    version: int
    sha256: str
    stage: str
    semantic_ids_sha256: str


class ServedView(BaseModel):
    """The view that answered; `version` counts swaps since the server started."""

    version: int
    sha256: str
    rule: Literal["all", "allow", "deny"]
    items: int


class RecommendResponse(ItemList):
    """Answer to one user."""

    model: ServedModel
    view: ServedView


class RecommendResponses(BaseModel):
    """Answers to several users, in their order."""

    results: list[ItemList]
    model: ServedModel
    view: ServedView


class SwapResponse(BaseModel):
    """What is served after a swap."""

    model: ServedModel
    view: ServedView
    catalogue_items: int


class Health(SwapResponse):
    """State of the server."""

    status: Literal["ready", "stopping", "failed"]
    uptime_s: float
    queued_users: int


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str
