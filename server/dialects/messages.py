"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's chat API."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from ..api import translation
from ..api.answers import ignored_header, refusals_counted
from ..api.chat import Chat
from ..api.translation import renamed, sse, without_effect
from ..api.whole_answers import json_of
from ..errors import anthropic_error_body, client_left, error_body
from ..http.body import read_json_object
from ..http.route_docs import (
    BODY_ERRORS,
    GENERATION_ERRORS,
    INTEGER,
    OBJECTS,
    AnthropicError,
    answers,
    errors,
    json_body,
    json_object,
)
from ..http.sse import EventStream, Pace, run_until_disconnect
from ..requests.state import state_of
from .messages_body import CountTokensBody, MessagesBody, names_of, read_body
from .messages_events import PING, MessageWriter

router = APIRouter(tags=["messages"], responses=errors(401, 429, 500, model=AnthropicError))

_MESSAGE = json_object("id", "type", "role", "content", "stop_reason", "usage", content=OBJECTS)


@router.post(
    "/v1/messages",
    response_model=None,
    openapi_extra=json_body(MessagesBody),
    responses={
        **answers(_MESSAGE, stream=True),
        **errors(*GENERATION_ERRORS, model=AnthropicError),
    },
)
async def create_message(request: Request) -> Response:
    """Answer a conversation, whole or as a stream of typed events."""
    state = state_of(request)
    request_id = request.state.request_id
    with refusals_counted(state.metrics):
        fields = await read_json_object(request)
        body, chat_body, ignored = await read_body(
            MessagesBody, fields, strict=state.settings.strict
        )
        state.check_model(body.model)
        message_id = f"msg_{uuid.uuid4().hex}"
        with renamed(names_of(body)):
            owner = state.keys.owner(request)
            capped = not state.settings.strict
            chat = await Chat.start(
                state, chat_body, message_id, request_id, owner, caps_max_tokens=capped
            )
    ignored.names += without_effect(chat, names_of(body))
    writer = MessageWriter(
        message_id, state.name_of(body.model), omits_thinking=body.omits_thinking
    )
    headers = ignored_header(ignored.names, chat.job.prompt_changes)
    if body.stream:
        return EventStream(
            _stream(writer, chat),
            on_failure=lambda error: [
                *map(sse, writer.close("incomplete")),  # so that sealed reasoning is not lost
                sse(anthropic_error_body(error_body(error, request_id))),
            ],
            on_close=chat.ticket.close,
            request_id=request_id,
            deadline=chat.job.deadline,
            pace=Pace.of(state.settings),
            headers=headers,
            end=b"",
            comment=sse(PING),
        )
    with chat.ticket:
        message = await run_until_disconnect(
            request.receive, _collect(writer, chat), chat.job.deadline
        )
    return client_left() if message is None else await json_of(message, headers)


@router.post(
    "/v1/messages/count_tokens",
    response_model=None,
    openapi_extra=json_body(CountTokensBody),
    responses={
        **answers(json_object("input_tokens", input_tokens=INTEGER)),
        **errors(*BODY_ERRORS, model=AnthropicError),
    },
)
async def count_tokens(request: Request) -> Response:
    """Count the tokens of a conversation as a prompt."""
    state = state_of(request)
    fields = await read_json_object(request)
    body, chat, ignored = await read_body(CountTokensBody, fields, strict=state.settings.strict)
    state.check_model(body.model)
    number, unread = await translation.count_tokens(state, chat, names_of(body))
    headers = ignored_header(ignored.names + unread)
    return JSONResponse({"input_tokens": number}, headers=headers)


async def _stream(writer: MessageWriter, chat: Chat) -> AsyncGenerator[bytes, None]:
    async with aclosing(writer.events(chat)) as events:
        async for event in events:
            yield sse(event)


async def _collect(writer: MessageWriter, chat: Chat) -> dict[str, Any]:
    async with aclosing(writer.events(chat)) as events:
        async for _ in events:
            pass
    return writer.message
