"""POST /v1/responses, and the endpoints of stored responses."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ...engine.errors import InvalidRequestError, RequestTimeoutError
from ..api.answers import DELETED, ignored_header, refusals_counted
from ..api.chat import Chat
from ..api.translation import Event, event_of, renamed, without_effect
from ..api.whole_answers import json_of, size_of
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
from ..http.sse import EventStream, Pace, log_failure, run_until_disconnect
from ..requests.state import ServerState, state_of
from .hints import Ignored
from .responses_body import (
    NAMES,
    InputTokensBody,
    ResponseBody,
    items_of,
    read_body,
    read_chat,
)
from .responses_events import ResponseWriter
from .responses_items import with_ids

router = APIRouter(tags=["responses"])
log = structlog.get_logger(__name__)

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
        body, ignored = await read_body(ResponseBody, fields, strict=state.settings.strict)
        state.check_model(body.model)
        if (answer := state.siblings.forward(request, body.continued)) is not None:
            return answer
        run = await ResponseRun.start(state, request, body, ignored)
    headers = ignored_header(ignored.names, run.chat.job.prompt_changes)
    if body.background:
        state.responses.run(run.key, run.writer.response, run.run_in_background())
        return await json_of(run.writer.response, headers)
    ticket, deadline = run.chat.ticket, run.chat.job.deadline
    if body.stream:
        return EventStream(
            run.stream(),
            on_failure=run.last_events,
            on_close=ticket.close,
            request_id=request.state.request_id,
            deadline=deadline,
            pace=Pace.of(state.settings),
            headers=headers,
            end=b"",
        )
    with ticket:
        response = await run_until_disconnect(request.receive, run.collect(), deadline)
    return client_left() if response is None else await json_of(response, headers)


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
    response = found_response(request, response_id).response
    # One that runs grows by whole items, also while this is encoded.
    return await json_of({**response, "output": list(response["output"])})


@router.post(
    "/v1/responses/{response_id}/cancel",
    response_model=None,
    responses={**answers(_RESPONSE), **errors(400, 404)},
)
async def cancel_response(request: Request, response_id: str) -> Response:
    """Cancel a response that runs in the background; one that has ended stays as it is."""
    if (answer := state_of(request).siblings.forward(request, response_id)) is not None:
        return answer
    response = found_response(request, response_id).response
    if not response["background"]:
        raise InvalidRequestError(
            "only a response that was created with `background` can be cancelled", "response_id"
        )
    await state_of(request).responses.cancel(key_of(request, response_id))
    return await json_of(response)


@router.delete(
    "/v1/responses/{response_id}",
    response_model=None,
    responses={**answers(DELETED), **errors(400, 404)},
)
async def delete_response(request: Request, response_id: str) -> Response:
    """Forget a response; if it runs in the background, cancel it."""
    if (answer := state_of(request).siblings.forward(request, response_id)) is not None:
        return answer
    found_response(request, response_id)
    await state_of(request).responses.remove(key_of(request, response_id))
    return JSONResponse({"id": response_id, "object": "response", "deleted": True})


def key_of(request: Request, response_id: str) -> Key:
    """Return the key of a response in the store."""
    return state_of(request).keys.owner(request), response_id


def found_response(request: Request, response_id: str) -> Stored | Running:
    """Return a response of this client. Raises HTTPException 404."""
    found = state_of(request).responses.find(key_of(request, response_id))
    if found is None or found.response["object"] != "response":
        raise HTTPException(404, f"there is no response {ascii(response_id[:64])}")
    return found


class ResponseRun:
    """One admitted response while it is generated."""

    def __init__(
        self,
        responses: ResponseStore,
        key: Key,
        chat: Chat,
        writer: ResponseWriter,
        items: list[dict[str, Any]],
        request_id: str,
    ) -> None:
        self.key = key
        self.chat = chat
        self.writer = writer
        self._responses = responses
        self._items = items
        self._request_id = request_id
        self._conversation: tuple[Key, list[dict[str, Any]]] | None = None
        """The conversation that grows by these items and by the output, if there is one."""

    @classmethod
    async def start(
        cls, state: ServerState, request: Request, body: ResponseBody, ignored: Ignored
    ) -> ResponseRun:
        """Admit the response. Raises QuireError if it is refused."""
        key = key_of(request, f"resp_{uuid.uuid4().hex}{state.siblings.suffix}")
        store = _is_stored(body, enabled=state.responses.enabled)
        previous = previous_items(request, body)
        resolve_references(request, body)
        chat_body, tools = await read_chat(body, previous, ignored)
        with renamed(NAMES):
            capped = not state.settings.strict
            chat = await Chat.start(
                state, chat_body, key[1], request.state.request_id, key[0], caps_max_tokens=capped
            )
        ignored.names += without_effect(chat, NAMES)
        writer = ResponseWriter(key[1], state.name_of(body.model), body, tools, store=store)
        given = items_of(body)
        run = cls(state.responses, key, chat, writer, [*previous, *given], request.state.request_id)
        if body.conversation is not None:
            run._conversation = (key[0], body.conversation), given
        return run

    async def _events(self) -> AsyncGenerator[Event, None]:
        """Yield all events, storing the response before the last one."""
        async with aclosing(self.writer.events(self.chat)) as events:
            async for event in events:
                if self.writer.ended:
                    await self._store()
                yield event

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Run to the end and yield all events, encoded. Raises QuireError."""
        async with aclosing(self._events()) as events:
            async for event in events:
                yield await event_of(event)

    async def collect(self) -> dict[str, Any]:
        """Run to the end and return the response. Raises QuireError."""
        async with aclosing(self._events()) as events:
            async for _ in events:
                pass
        return self.writer.response

    async def fail(self, error: Exception) -> list[Event]:
        """End the response as failed, store it, and return its last events."""
        events = list(self.writer.fail(error, self._request_id))
        await self._store()
        return events

    async def last_events(self, error: Exception) -> list[bytes]:
        """Do as `fail`, and return the events encoded."""
        return [await event_of(event) for event in await self.fail(error)]

    async def run_in_background(self) -> None:
        """Run to the end and store the response, whether it completes, fails or is cancelled."""
        deadline = self.chat.job.deadline
        left = None if deadline is None else deadline - time.monotonic()
        try:
            async with asyncio.timeout(left):
                await self.collect()
        except asyncio.CancelledError:
            self.writer.cancel()
            await self._store()
        except TimeoutError:
            await self.fail(RequestTimeoutError("the request took longer than its timeout"))
        except Exception as error:
            log_failure(error, self._request_id)
            await self.fail(error)
        finally:
            self.chat.ticket.close()

    async def _store(self) -> None:
        response = self.writer.response
        if response["store"]:
            items = self._items + response["output"]
            num_bytes = await size_of(response) + await size_of(items)
            self._responses.add(self.key, response, items, num_bytes)
        if self._conversation is not None and response["status"] in ("completed", "incomplete"):
            key, given = self._conversation
            new = [*with_ids(given), *response["output"]]
            added = await size_of(new)
            # From here on nothing waits, so that no other response's items are lost.
            found = self._responses.find(key)
            if isinstance(found, Stored):  # it may have been deleted meanwhile
                num_bytes = found.num_bytes + added
                if not self._responses.add(key, found.response, [*found.items, *new], num_bytes):
                    log.warning("conversation_full", conversation=key[1])


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


def resolve_references(request: Request, body: InputTokensBody) -> None:
    """Put the items that the input only refers to in their places. Raises InvalidRequestError."""
    state = state_of(request)
    references = dict(body.references())
    if not references:
        return
    found = state.responses.find_items(state.keys.owner(request), references.values())
    for place, item_id in references.items():
        if item_id not in found:
            param = f"input[{place}].id"
            raise InvalidRequestError(f"{param}: there is no item {ascii(item_id[:64])}", param)
    body.input = [
        found[references[place]] if place in references else item
        for place, item in enumerate(body.input)
    ]


def previous_items(request: Request, body: InputTokensBody) -> list[dict[str, Any]]:
    """Return the items of the response or conversation to continue. Raises InvalidRequestError."""
    resumed = body.conversation or body.previous_response_id
    if resumed is None:
        return []
    kind = "conversation" if body.conversation else "response"
    param = "conversation" if body.conversation else "previous_response_id"
    found = state_of(request).responses.find(key_of(request, resumed))
    if found is None or found.response["object"] != kind:
        raise InvalidRequestError(f"{param}: there is no {kind} {ascii(resumed[:64])}", param)
    if isinstance(found, Running):
        status = found.response["status"]
        raise InvalidRequestError(f"{param}: that response is {status}", param)
    return found.items
