"""Maps errors to HTTP: the one place where an exception becomes a status and an error body.

QuireError (engine/errors.py)         status, `type` in the body
├── InvalidRequestError               400 invalid_request_error   `param` names the field
│   ├── ContextLengthError            as above
│   ├── PoolTooSmallError             as above
│   ├── ModelNotFoundError            404 not_found_error
│   ├── StreamNotFoundError           404 not_found_error
│   └── StreamGoneError               410 not_found_error
├── AuthenticationError               401 authentication_error    WWW-Authenticate
├── OverloadedError
│   ├── QueueFullError                429 rate_limit_error        Retry-After: the error's own
│   ├── RateLimitError                429 rate_limit_error        Retry-After: the error's own
│   └── ShuttingDownError             503 overloaded_error        Retry-After: the error's own
├── RequestFailedError
│   ├── QueueTimeoutError             503 timeout_error           Retry-After
│   ├── RequestTimeoutError           504 timeout_error
│   ├── NonFiniteLogitsError          500 internal_error
│   ├── GrammarError                  500 internal_error
│   ├── StepFailedError               500 internal_error
│   └── DeviceMemoryError             503 overloaded_error        Retry-After
├── EngineError
│   ├── EngineDeadError               500 internal_error
│   └── EngineNotReadyError           503 overloaded_error        Retry-After
└── StartupError                      never reaches HTTP
HTTPException (Starlette)             404, 405, 413, 415: see `_OF_HTTP`
any other exception                   500 internal_error          its text stays in the log

Every answer of 4xx and 5xx has OpenAI's body `{"error": {"message", "type", "param", "code"}}`. A
stream that has begun carries the same body in a `data:` event instead. Under /v1/messages errors
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
from ..engine.errors import (
    ContextLengthError,
    InvalidRequestError,
    OverloadedError,
    QuireError,
)
from .validation import reason_of

log = structlog.get_logger(__name__)

RESTART_RETRY_AFTER = 5
"""Retry-After in seconds for a 503 whose error brings none: the engine starts, is out of memory, or
did not reach the request in time."""


class Answer(NamedTuple):
    """The HTTP status and the `type` in the error body."""

    status: int
    type: str


ANSWERS: dict[type[QuireError], Answer] = {
    tree.InvalidRequestError: Answer(400, "invalid_request_error"),
    tree.ModelNotFoundError: Answer(404, "not_found_error"),
    tree.StreamNotFoundError: Answer(404, "not_found_error"),
    tree.StreamGoneError: Answer(410, "not_found_error"),
    tree.AuthenticationError: Answer(401, "authentication_error"),
    tree.QueueFullError: Answer(429, "rate_limit_error"),
    tree.RateLimitError: Answer(429, "rate_limit_error"),
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
"""Answers by exception class. The nearest class in an error's ancestry decides."""

_OF_HTTP = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "body_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
}
"""Statuses of HTTP itself → `type` and `code` in the error body."""

ANTHROPIC_PATH = "/v1/messages"
_OF_ANTHROPIC = {"body_too_large": "request_too_large", "internal_error": "api_error"}
"""OpenAI's code or type → Anthropic's type, if they differ."""
_DETAILS_OF_ANTHROPIC = {
    "thread": {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
}
"""Refused field → details by which Anthropic's clients know to do without it."""


def answer_of(error: BaseException) -> Answer:
    """Return the status and `type` of an error: 500 `internal_error` if it is not in ANSWERS."""
    for ancestor in type(error).__mro__:
        if ancestor in ANSWERS:
            return ANSWERS[ancestor]
    return Answer(500, "internal_error")


def error_body(error: BaseException, request_id: str = "") -> dict[str, Any]:
    """Return OpenAI's error body. It does not contain the text of an unforeseen exception."""
    if isinstance(error, QuireError):
        message, code = error.message, error.code
    else:
        message, code = f"internal error; request {request_id}", "internal_error"
    param = error.param if isinstance(error, InvalidRequestError) else None
    return _body(message, answer_of(error).type, param, code)


def error_response(
    error: BaseException, request_id: str = "", scope: Scope | None = None
) -> JSONResponse:
    """Return the answer: status, body, Retry-After on 429 and 503, WWW-Authenticate on 401.

    The path in the request's `scope` decides whose shape the body has.
    """
    status = answer_of(error).status
    headers = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    elif status == 503:
        headers["Retry-After"] = str(RESTART_RETRY_AFTER)
    elif status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = error_body(error, request_id)
    if isinstance(error, ContextLengthError) and is_anthropic(scope):
        body["error"]["message"] = _of_long_prompt(error)
    return JSONResponse(_shaped(body, scope), status, headers)


def http_error_response(status: int, message: str, scope: Scope | None = None) -> JSONResponse:
    """Return the answer to an error of HTTP itself, such as 404, 405, 413 or 415."""
    kind, code = _OF_HTTP.get(status, ("invalid_request_error", "invalid_request"))
    return JSONResponse(_shaped(_body(message, kind, None, code), scope), status)


def anthropic_error_body(body: dict[str, Any]) -> dict[str, Any]:
    """Return the error in Anthropic's shape, with Anthropic's types."""
    error = body["error"]
    kind = _OF_ANTHROPIC.get(error["code"], _OF_ANTHROPIC.get(error["type"], error["type"]))
    shaped: dict[str, Any] = {"type": kind, "message": error["message"]}
    if error["param"] in _DETAILS_OF_ANTHROPIC:
        shaped["details"] = _DETAILS_OF_ANTHROPIC[error["param"]]
    return {"type": "error", "error": shaped}


def _of_long_prompt(error: ContextLengthError) -> str:
    """Return the message in the words by which Anthropic's clients know that they must shorten the
    conversation."""
    if error.num_tokens is None:
        return f"prompt is too long: {error.message}"
    return f"prompt is too long: {error.num_tokens} tokens > {error.max_model_len} maximum"


def is_anthropic(scope: Scope | None) -> bool:
    """Return whether the request of `scope` is one of Anthropic's API."""
    path = "" if scope is None else scope["path"].removeprefix(scope.get("root_path", ""))
    return bool(path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/"))


def _shaped(body: dict[str, Any], scope: Scope | None) -> dict[str, Any]:
    return anthropic_error_body(body) if is_anthropic(scope) else body


def client_left() -> Response:
    """Return an answer that no one will read. Proxies log 499 if the client closed its request."""
    return Response(status_code=499)


def _body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install_handlers(app: FastAPI) -> None:
    """Make `app` answer every failure with an error body."""

    async def on_quire_error(request: Request, error: Exception) -> JSONResponse:
        request_id = request.state.request_id
        assert isinstance(error, QuireError)
        request.state.error_code = error.code  # for the request's trace
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
        refusal = InvalidRequestError(f"{param}: {reason_of(first)}", param)
        return error_response(refusal, scope=request.scope)

    async def on_anything(request: Request, error: Exception) -> JSONResponse:
        request_id = request.state.request_id
        response = error_response(error, request_id, request.scope)
        # Starlette makes this answer outside the middleware that sets the header.
        response.headers["x-request-id"] = request_id
        return response

    async def on_client_left(request: Request, error: Exception) -> Response:
        return client_left()

    app.add_exception_handler(QuireError, on_quire_error)
    app.add_exception_handler(ClientDisconnect, on_client_left)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(Exception, on_anything)
