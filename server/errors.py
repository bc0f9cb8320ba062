"""Errors to HTTP, once: the exception tree of engine/errors.py and OpenAI's error body.

Every answer of 4xx and 5xx has the body `{"error": {"message", "type", "param", "code"}}`. A
stream that has begun carries the same body in a `data:` event instead. Under /v1/messages, errors
have Anthropic's shape, `{"type": "error", "error": {"type", "message"}}`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from ..engine import errors as tree
from ..engine.errors import InvalidRequestError, OverloadedError, QuireError

log = structlog.get_logger(__name__)

RESTART_RETRY_AFTER = 5
"""Seconds that a client is asked to wait while the engine starts, or its deadline was missed."""


class Answer(NamedTuple):
    status: int
    type: str


ANSWERS: dict[type[QuireError], Answer] = {
    tree.InvalidRequestError: Answer(400, "invalid_request_error"),
    tree.ModelNotFoundError: Answer(404, "not_found_error"),
    tree.StreamNotFoundError: Answer(404, "not_found_error"),
    tree.StreamGoneError: Answer(410, "not_found_error"),
    tree.AuthenticationError: Answer(401, "authentication_error"),
    tree.QueueFullError: Answer(429, "rate_limit_error"),
    tree.ShuttingDownError: Answer(503, "overloaded_error"),
    tree.QueueTimeoutError: Answer(503, "timeout_error"),
    tree.RequestTimeoutError: Answer(504, "timeout_error"),
    tree.NonFiniteLogitsError: Answer(500, "internal_error"),
    tree.GrammarError: Answer(500, "internal_error"),
    tree.StepFailedError: Answer(500, "internal_error"),
    tree.DeviceMemoryError: Answer(503, "overloaded_error"),
    tree.EngineDeadError: Answer(500, "internal_error"),
    tree.EngineNotReadyError: Answer(503, "overloaded_error"),
}
"""The nearest class of an error's ancestry counts. StartupError never reaches HTTP."""

_OF_HTTP = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "body_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
}

ANTHROPIC_PATH = "/v1/messages"
_OF_ANTHROPIC = {"body_too_large": "request_too_large", "internal_error": "api_error"}
"""Code or type here → type there, where they differ."""
_DETAILS_OF_ANTHROPIC = {
    "thread": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
}
"""The refused field → what tells Anthropic's clients to do without it."""


def answer_of(error: BaseException) -> Answer:
    """Status and `type` of an error; whatever is not in the table is 500 `internal_error`."""
    for ancestor in type(error).__mro__:
        if ancestor in ANSWERS:
            return ANSWERS[ancestor]
    return Answer(500, "internal_error")


def error_body(error: BaseException, request_id: str = "") -> dict[str, Any]:
    """OpenAI's error body. The text of an unforeseen exception stays in the log."""
    if isinstance(error, QuireError):
        message, code = error.message, error.code
    else:
        message, code = f"internal error; request {request_id}", "internal_error"
    param = error.param if isinstance(error, InvalidRequestError) else None
    return _body(message, answer_of(error).type, param, code)


def error_response(
    error: BaseException, request_id: str = "", scope: Scope | None = None
) -> JSONResponse:
    """The whole answer: status, body, Retry-After on 429 and 503, the challenge on 401.

    `scope` is the request's; its path decides the shape.
    """
    status = answer_of(error).status
    headers = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    elif status == 503:
        headers["Retry-After"] = str(RESTART_RETRY_AFTER)
    elif status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(_shaped(error_body(error, request_id), scope), status, headers)


def http_error_response(status: int, message: str, scope: Scope | None = None) -> JSONResponse:
    """An answer that stems from HTTP itself: 404, 405, 413, 415."""
    kind, code = _OF_HTTP.get(status, ("invalid_request_error", "invalid_request"))
    return JSONResponse(_shaped(_body(message, kind, None, code), scope), status)


def anthropic_error_body(body: dict[str, Any]) -> dict[str, Any]:
    """The same error in Anthropic's shape, with Anthropic's types."""
    error = body["error"]
    kind = _OF_ANTHROPIC.get(error["code"], _OF_ANTHROPIC.get(error["type"], error["type"]))
    shaped: dict[str, Any] = {"type": kind, "message": error["message"]}
    if error["param"] in _DETAILS_OF_ANTHROPIC:
        shaped["details"] = _DETAILS_OF_ANTHROPIC[error["param"]]
    return {"type": "error", "error": shaped}


def _shaped(body: dict[str, Any], scope: Scope | None) -> dict[str, Any]:
    path = "" if scope is None else scope["path"].removeprefix(scope.get("root_path", ""))
    if path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/"):
        return anthropic_error_body(body)
    return body


def client_left() -> Response:
    """Nobody reads it; 499 is what proxies log for a client that closed its request."""
    return Response(status_code=499)


def _body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install_handlers(app: FastAPI) -> None:
    """Give every failure of `app` the one shape."""

    async def on_quire_error(request: Request, error: Exception) -> JSONResponse:
        request_id = request.state.request_id
        if answer_of(error).status == 500:
            log.warning("request_failed", request_id=request_id, error=repr(error))
        return error_response(error, request_id, request.scope)

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        response = http_error_response(error.status_code, str(error.detail), request.scope)
        response.headers.update(error.headers or {})
        return response

    async def on_validation_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:])
        refusal = InvalidRequestError(f"{param}: {first['msg']}", param)
        return error_response(refusal, scope=request.scope)

    async def on_anything(request: Request, error: Exception) -> JSONResponse:
        request_id = request.state.request_id
        response = error_response(error, request_id, request.scope)
        # This one answer is made outside of the middleware that sets the header.
        response.headers["x-request-id"] = request_id
        return response

    async def on_client_left(request: Request, error: Exception) -> Response:
        return client_left()

    app.add_exception_handler(QuireError, on_quire_error)
    app.add_exception_handler(ClientDisconnect, on_client_left)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(Exception, on_anything)
