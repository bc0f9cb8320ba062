"""POST /v1/responses, and the endpoints of stored responses."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ...engine.errors import InvalidRequestError, RequestTimeoutError
from ..api.answers import DELETED, ignored_header, refusals_counted
from ..api.chat import Chat
from ..api.translation import Event, renamed, sse, without_effect
from ..errors import client_left
from ..http.body import read_json_object
from ..http.responses_store import Key, ResponseStore, Running, Stored
from ..http.route_docs import (
    GENERATION_ERRORS,
    OBJECTS,
    answers,
    errors,
    json_body,
    json_object,
)
from ..http.sse import EventStream, log_failure, run_until_disconnect
from ..requests.state import ServerState, state_of
from .responses_body import NAMES, ResponseBody, chat_of, check_body, items_of
from .responses_events import ResponseWriter

router = APIRouter(tags=["responses"])

_RESPONSE = json_object("id", "object", "status", "output", "usage", output=OBJECTS)


@router.post(
    "/v1/responses",
    response_model=None,
    openapi_extra=json_body(ResponseBody),
    responses={**answers(_RESPONSE, stream=True), **errors(*GENERATION_ERRORS)},
)
async def create_response(request: Request) -> Response:
    """Answer a conversation, whole, as a stream of typed events, or in the background."""
    state = state_of(request)
    with refusals_counted(state.metrics):
        fields = await read_json_object(request)
        body, ignored = check_body(fields, strict=state.settings.strict)
        state.check_model(body.model)
        previous = body.previous_response_id or ""
        if (answer := state.siblings.forward(request, previous)) is not None:
            return answer
        run = await _ResponseRun.start(state, request, body)
    ignored += run.ignored + without_effect(run.chat, NAMES)
    headers = ignored_header(ignored, run.chat.job.prompt_changes)
    if body.background:
        state.responses.run(run.key, run.writer.response, run.run_in_background())
        return JSONResponse(run.writer.response, headers=headers)
    ticket, deadline = run.chat.ticket, run.chat.job.deadline
    if body.stream:
        return EventStream(
            run.stream(),
            on_failure=lambda error: [sse(event) for event in run.fail(error)],
            on_close=ticket.close,
            request_id=request.state.request_id,
            deadline=deadline,
            keepalive=state.settings.sse_keepalive_interval,
            write_timeout=state.settings.stream_stall_timeout,
            headers=headers,
            end=b"",
        )
    with ticket:
        response = await run_until_disconnect(request.receive, run.collect(), deadline)
    return client_left() if response is None else JSONResponse(response, headers=headers)


@router.get(
    "/v1/responses/{response_id}",
    response_model=None,
    responses={**answers(_RESPONSE), **errors(400, 404)},
)
async def get_response(request: Request, response_id: str) -> Response:
    """Return a stored response, or one that runs in the background."""
    if request.query_params.get("stream", "false") != "false":
        raise InvalidRequestError("stream: a stored response cannot be streamed", "stream")
    if (answer := state_of(request).siblings.forward(request, response_id)) is not None:
        return answer
    return JSONResponse(_found(request, response_id).response)


@router.post(
    "/v1/responses/{response_id}/cancel",
    response_model=None,
    responses={**answers(_RESPONSE), **errors(400, 404)},
)
async def cancel_response(request: Request, response_id: str) -> Response:
    """Cancel a response that runs in the background; one that has ended stays as it is."""
    if (answer := state_of(request).siblings.forward(request, response_id)) is not None:
        return answer
    response = _found(request, response_id).response
    if not response["background"]:
        raise InvalidRequestError(
            "only a response that was created with `background` can be cancelled", "response_id"
        )
    await state_of(request).responses.cancel(_key(request, response_id))
    return JSONResponse(response)


@router.delete(
    "/v1/responses/{response_id}",
    response_model=None,
    responses={**answers(DELETED), **errors(400, 404)},
)
async def delete_response(request: Request, response_id: str) -> Response:
    """Forget a response; if it runs in the background, cancel it."""
    if (answer := state_of(request).siblings.forward(request, response_id)) is not None:
        return answer
    _found(request, response_id)
    await state_of(request).responses.remove(_key(request, response_id))
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


def _key(request: Request, response_id: str) -> Key:
    return state_of(request).keys.owner(request), response_id


def _found(request: Request, response_id: str) -> Stored | Running:
    found = state_of(request).responses.find(_key(request, response_id))
    if found is None:
        raise HTTPException(404, f"there is no response {ascii(response_id[:64])}")
    return found


class _ResponseRun:
    """One admitted response while it is generated."""

    def __init__(
        self,
        responses: ResponseStore,
        key: Key,
        chat: Chat,
        writer: ResponseWriter,
        items: list[dict[str, Any]],
        ignored: list[str],
        request_id: str,
    ) -> None:
        self.key = key
        self.chat = chat
        self.writer = writer
        self.ignored = ignored
        self._responses = responses
        self._items = items
        self._request_id = request_id

    @classmethod
    async def start(cls, state: ServerState, request: Request, body: ResponseBody) -> _ResponseRun:
        """Admit the response. Raises QuireError if it is refused."""
        key = _key(request, f"resp_{uuid.uuid4().hex}{state.siblings.suffix}")
        store = _is_stored(body, enabled=state.responses.enabled)
        previous = _previous(request, body.previous_response_id)
        chat_body, ignored = chat_of(body, previous, strict=state.settings.strict)
        with renamed(NAMES):
            chat = await Chat.start(
                state,
                chat_body,
                key[1],
                request.state.request_id,
                key[0],
                caps_max_tokens=True,
            )
        writer = ResponseWriter(key[1], state.name_of(body.model), body, store=store)
        items = [*previous, *items_of(body)]
        return cls(state.responses, key, chat, writer, items, ignored, request.state.request_id)

    async def _events(self) -> AsyncGenerator[Event, None]:
        """Yield all events, storing the response before the last one."""
        async with aclosing(self.writer.events(self.chat)) as events:
            async for event in events:
                if self.writer.ended:
                    self._store()
                yield event

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Run to the end and yield all events, encoded. Raises QuireError."""
        async with aclosing(self._events()) as events:
            async for event in events:
                yield sse(event)

    async def collect(self) -> dict[str, Any]:
        """Run to the end and return the response. Raises QuireError."""
        async with aclosing(self._events()) as events:
            async for _ in events:
                pass
        return self.writer.response

    def fail(self, error: Exception) -> list[Event]:
        """End the response as failed, store it, and return its last events."""
        events = list(self.writer.fail(error, self._request_id))
        self._store()
        return events

    async def run_in_background(self) -> None:
        """Run to the end and store the response, whether it completes, fails or is cancelled."""
        deadline = self.chat.job.deadline
        left = None if deadline is None else deadline - time.monotonic()
        try:
            async with asyncio.timeout(left):
                await self.collect()
        except asyncio.CancelledError:
            self.writer.cancel()
            self._store()
        except TimeoutError:
            self.fail(RequestTimeoutError("the request took longer than its timeout"))
        except Exception as error:
            log_failure(error, self._request_id)
            self.fail(error)
        finally:
            self.chat.ticket.close()

    def _store(self) -> None:
        response = self.writer.response
        if response["store"]:
            self._responses.add(self.key, response, self._items + response["output"])


def _is_stored(body: ResponseBody, *, enabled: bool) -> bool:
    """Decide whether the response will be stored; `enabled` is whether the server stores any.

    Raises InvalidRequestError for combinations of fields that cannot be served.
    """
    if not enabled and (body.store or body.background):
        name = "background" if body.background else "store"
        raise InvalidRequestError(f"{name}: this server does not store responses", name)
    if body.background and body.store is False:
        raise InvalidRequestError("background: needs store", "background")
    if body.background and body.stream:
        raise InvalidRequestError("background: cannot be combined with stream", "background")
    return enabled and body.store is not False


def _previous(request: Request, response_id: str | None) -> list[dict[str, Any]]:
    """Return the items of the conversation to continue. Raises InvalidRequestError."""
    if response_id is None:
        return []
    found = state_of(request).responses.find(_key(request, response_id))
    param = "previous_response_id"
    if found is None:
        raise InvalidRequestError(f"{param}: there is no response {ascii(response_id[:64])}", param)
    if isinstance(found, Running) or found.response["status"] not in ("completed", "incomplete"):
        status = found.response["status"]
        raise InvalidRequestError(f"{param}: that response is {status}", param)
    return found.items
