"""More endpoints of responses: the items of a response's input, the tokens of an input, and the
compaction of a conversation."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from ...engine.errors import InvalidRequestError
from ..api.answers import ignored_header, refusals_counted
from ..api.translation import count_tokens
from ..api.whole_answers import json_of
from ..errors import client_left
from ..http.body import read_json_object
from ..http.responses_store import Running
from ..http.route_docs import (
    BODY_ERRORS,
    GENERATION_ERRORS,
    INTEGER,
    OBJECTS,
    answers,
    errors,
    json_body,
    json_object,
)
from ..http.sse import run_until_disconnect
from ..requests.state import state_of
from .responses import ResponseRun, found_response, previous_items, resolve_references
from .responses_body import (
    NAMES,
    InputTokensBody,
    ResponseBody,
    items_of,
    read_body,
    read_chat,
)
from .responses_items import with_ids
from .sealed import seal

router = APIRouter(tags=["responses"])

SUMMARISE = (
    "Summarise this conversation for yourself, so that you can go on without it: what was asked, "
    "what was done and found, what was decided, and what is left to do. Keep names, paths, numbers "
    "and code that will be needed. Write only the summary."
)
"""The message by which a conversation is compacted."""
_KEPT_ROLES = ("system", "developer", "user")


@router.get(
    "/v1/responses/{response_id}/input_items",
    response_model=None,
    responses={**answers(json_object("object", "data", data=OBJECTS)), **errors(400, 404)},
)
async def list_input_items(
    request: Request,
    response_id: str,
    limit: int = Query(20, ge=1, le=100),
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """List the items of a response's input, those of the conversation before it included."""
    if (answer := state_of(request).siblings.forward(request, response_id)) is not None:
        return answer
    found = found_response(request, response_id)
    if isinstance(found, Running):
        raise InvalidRequestError("the response has not ended yet", "response_id")
    items = found.items[: len(found.items) - len(found.response["output"])]
    page = page_of(items, limit=limit, order=order, after=after)
    return await json_of({**page, "data": with_ids(page["data"])})


def page_of(
    items: Sequence[dict[str, Any]], *, limit: int, order: str, after: str | None
) -> dict[str, Any]:
    """Return a page of a list of items: up to `limit` of them, after the one with the id `after`.

    An item without an id gets one by its place, so that it has the same one in every page. Raises
    InvalidRequestError if there is no item `after`.
    """
    listed = range(len(items))
    listed = listed if order == "asc" else listed[::-1]
    start = 0
    if after is not None:
        found = (n for n, place in enumerate(listed, 1) if _id_at(items, place) == after)
        start = next(found, 0)
        if not start:
            raise InvalidRequestError(f"after: there is no item {ascii(after[:64])}", "after")
    chosen = listed[start : start + limit]
    page = [{**items[place], "id": _id_at(items, place)} for place in chosen]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": start + limit < len(listed),
    }


def _id_at(items: Sequence[dict[str, Any]], place: int) -> str:
    return items[place].get("id") or f"item_{place}"


@router.post(
    "/v1/responses/input_tokens",
    response_model=None,
    openapi_extra=json_body(InputTokensBody),
    responses={
        **answers(json_object("object", "input_tokens", input_tokens=INTEGER)),
        **errors(*BODY_ERRORS),
    },
)
async def count_input_tokens(request: Request) -> Response:
    """Count the tokens of an input as a prompt."""
    state = state_of(request)
    fields = await read_json_object(request)
    body, ignored = await read_body(InputTokensBody, fields, strict=state.settings.strict)
    state.check_model(body.model)
    if (answer := state.siblings.forward(request, body.continued)) is not None:
        return answer
    previous = previous_items(request, body)
    resolve_references(request, body)
    chat, _ = await read_chat(body, previous, ignored)
    number, unread = await count_tokens(state, chat, NAMES)
    answer_body = {"object": "response.input_tokens", "input_tokens": number}
    return JSONResponse(answer_body, headers=ignored_header(ignored.names + unread))


@router.post(
    "/v1/responses/compact",
    response_model=None,
    openapi_extra=json_body(InputTokensBody),
    responses={
        **answers(json_object("id", "object", "output", "usage", output=OBJECTS)),
        **errors(*GENERATION_ERRORS),
    },
)
async def compact(request: Request) -> Response:
    """Let the model summarise a conversation. What it returns takes the place of the conversation:
    the messages of everyone but the assistant, and an opaque item with the summary."""
    state = state_of(request)
    with refusals_counted(state.metrics):
        fields = await read_json_object(request)
        body, ignored = await read_body(InputTokensBody, fields, strict=state.settings.strict)
        state.check_model(body.model)
        if (answer := state.siblings.forward(request, body.continued)) is not None:
            return answer
        previous = previous_items(request, body)
        resolve_references(request, body)
        history = [*previous, *items_of(body)]
        asked = [*history, {"type": "message", "role": "user", "content": SUMMARISE}]
        whole = ResponseBody(
            **body.passed_on(),
            input=asked,
            instructions=body.instructions,
            reasoning=body.reasoning,
            store=False,
        )
        run = await ResponseRun.start(state, request, whole, ignored)
    with run.chat.ticket:
        response = await run_until_disconnect(request.receive, run.collect(), run.chat.job.deadline)
    if response is None:
        return client_left()
    messages = [item for item in response["output"] if item["type"] == "message"]
    summary = "\n".join(part["text"] for item in messages for part in item["content"])
    number = uuid.uuid4().hex
    kept = [item for item in history if item.get("role") in _KEPT_ROLES]
    compaction = {
        "id": f"cmp_{number}", "type": "compaction", "encrypted_content": seal(summary)
    }  # fmt: skip
    answer_body = {
        "id": f"resp_{number}",
        "object": "response.compaction",
        "created_at": int(time.time()),
        "output": [*with_ids(kept), compaction],
        "usage": response["usage"],
    }  # fmt: skip
    return await json_of(answer_body, ignored_header(ignored.names))
