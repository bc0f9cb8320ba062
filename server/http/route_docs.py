"""Arguments for FastAPI's route decorators that document what FastAPI cannot see.

Routes read their bodies themselves (see body.py) and answer with finished responses, so each one
states in its decorator what it takes and answers:

    @router.post(
        "/v1/things",
        openapi_extra=json_body(ThingBody),
        responses=answers(THING, stream=True) | errors(*BODY_ERRORS, 429, 504),
    )

Errors that a whole router shares (401 of all routes that need a key) stand at the router, and 500
at the application. FastAPI merges these dictionaries into the OpenAPI document.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

Schema = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]

_REF = "#/components/schemas/{model}"
_REASONS = {
    400: "The body or a parameter is wrong; `param` names it",
    401: "The API key is missing or wrong",
    404: "No such model, stream or stored object",
    410: "No longer kept",
    413: "The body is too large",
    415: "The content is not JSON",
    429: "Too many requests are waiting; see Retry-After",
    500: "The request failed in the engine",
    503: "Starting, draining or overloaded; see Retry-After",
    504: "The request took longer than its timeout",
}
BODY_ERRORS = (400, 404, 413, 415, 503)
"""Errors of every route that reads a body."""
GENERATION_ERRORS = (*BODY_ERRORS, 429, 504)
"""Errors of every route whose requests wait in the engine's queue."""

OBJECT: Schema = {"type": "object"}
OBJECTS: Schema = {"type": "array", "items": OBJECT}
STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
INTEGERS: Schema = {"type": "array", "items": INTEGER}

_EVENT_STREAM: Schema = {
    "text/event-stream": {
        # The schema of one event, not of the whole stream: a keyword of OpenAPI 3.2.
        "itemSchema": {
            "type": "object",
            "required": ["data"],
            "properties": {"data": STRING, "event": STRING, "id": STRING},
        }
    }
}
_models: set[type[BaseModel]] = set()
"""Every model that a route refers to. FastAPI would collect only the models that it validates, and
build a validator for each error of each route, which delays the start by 0.4 s."""


class ErrorDetail(BaseModel):
    """What went wrong; `param` names the field, if it is about one."""

    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    """The body of every error, in OpenAI's shape."""

    error: ErrorDetail


class AnthropicErrorDetail(BaseModel):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(BaseModel):
    """The body of every error under /v1/messages, in Anthropic's shape."""

    type: Literal["error"]
    error: AnthropicErrorDetail


def json_body(*models: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose JSON body is one of `models`."""
    refs = [_reference(model) for model in models]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    content = {"application/json": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}}


def _reference(model: type[BaseModel]) -> Schema:
    _models.add(model)
    return {"$ref": _REF.format(model=model.__name__)}


def schemas_by_name() -> dict[str, Schema]:
    """Return `components.schemas`: all bodies and errors, and their parts."""
    models = sorted(_models, key=lambda model: model.__name__)
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    definitions: dict[str, Schema] = schemas.get("$defs", {})
    return definitions


def json_object(*required: str, **properties: Schema) -> Schema:
    """The schema of an object with these `required` members; `properties` describes some."""
    return {"type": "object", "required": [*required], "properties": properties}


def answers(schema: Schema, *, stream: bool = False) -> Responses:
    """`responses` of a route that answers 200 with JSON, or with server-sent events if asked."""
    content = {"application/json": {"schema": schema}}
    return {200: {"content": content | _EVENT_STREAM if stream else content}}


def event_stream() -> Responses:
    """`responses` of a route that answers 200 with server-sent events only."""
    return {200: {"content": _EVENT_STREAM}}


def errors(*statuses: int, model: type[BaseModel] = Error) -> Responses:
    """`responses` for the errors that a route, a router or the application may answer."""
    content = {"application/json": {"schema": _reference(model)}}
    return {status: {"description": _REASONS[status], "content": content} for status in statuses}
