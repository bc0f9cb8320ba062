"""Conversations that the server keeps: their items grow by each response that names them.

They are kept like responses, in the same store and within the same bounds.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from starlette.exceptions import HTTPException

from ...engine.errors import InvalidRequestError
from ..api.answers import DELETED, ignored_header
from ..api.whole_answers import json_of, size_of
from ..http.body import read_json_object
from ..http.responses_store import Stored
from ..http.route_docs import BODY_ERRORS, OBJECTS, answers, errors, json_body, json_object
from ..json_text import encode_json
from ..requests.field_types import Fields
from ..requests.state import state_of
from .hints import Ignored
from .responses import key_of
from .responses_body import Metadata
from .responses_extra import page_of
from .responses_items import ItemReader, with_ids
from .responses_tools import Tools

router = APIRouter(tags=["responses"])

MAX_NEW_ITEMS = 20
"""Maximum items of one request."""
_PATH = "/v1/conversations"
_CONVERSATION = json_object("id", "object", "created_at", "metadata")
_LIST = json_object("object", "data", data=OBJECTS)

Items = Annotated[list[dict[str, Any]], Field(max_length=MAX_NEW_ITEMS, fail_fast=True)]


class ConversationUpdate(Fields):
    """The new metadata of a conversation."""

    metadata: Metadata = None


class NewConversation(ConversationUpdate):
    """The metadata and the first items of a conversation."""

    items: Items | None = None


class NewItems(Fields):
    """Items for the end of a conversation."""

    items: Items


@router.post(
    _PATH,
    response_model=None,
    openapi_extra=json_body(NewConversation),
    responses={**answers(_CONVERSATION), **errors(*BODY_ERRORS)},
)
async def create_conversation(request: Request) -> Response:
    """Begin a conversation, with items if they are given."""
    state = state_of(request)
    if not state.responses.enabled:
        raise InvalidRequestError("this server does not store conversations", None)
    ignored = Ignored(strict=state.settings.strict)
    body = ignored.check(NewConversation, await read_json_object(request))
    items = _checked(body.items or [], ignored)
    conversation = {
        "id": f"conv_{uuid.uuid4().hex}{state.siblings.suffix}",
        "object": "conversation",
        "created_at": int(time.time()),
        "metadata": body.metadata or {},
    }
    _keep(request, conversation, items, await size_of(conversation) + await size_of(items))
    return JSONResponse(conversation, headers=ignored_header(ignored.names))


@router.get(
    f"{_PATH}/{{conversation_id}}",
    response_model=None,
    responses={**answers(_CONVERSATION), **errors(404)},
)
async def get_conversation(request: Request, conversation_id: str) -> Response:
    """Return a conversation, without its items."""
    if (answer := state_of(request).siblings.forward(request, conversation_id)) is not None:
        return answer
    return JSONResponse(_found(request, conversation_id).response)


@router.post(
    f"{_PATH}/{{conversation_id}}",
    response_model=None,
    openapi_extra=json_body(ConversationUpdate),
    responses={**answers(_CONVERSATION), **errors(*BODY_ERRORS)},
)
async def update_conversation(request: Request, conversation_id: str) -> Response:
    """Replace the metadata of a conversation."""
    state = state_of(request)
    fields = await read_json_object(request)
    if (answer := state.siblings.forward(request, conversation_id)) is not None:
        return answer
    ignored = Ignored(strict=state.settings.strict)
    body = ignored.check(ConversationUpdate, fields)
    found = _found(request, conversation_id)
    changed = {**found.response, "metadata": body.metadata or {}}
    num_bytes = found.num_bytes + len(encode_json(changed)) - len(encode_json(found.response))
    _keep(request, changed, found.items, num_bytes)
    return JSONResponse(changed, headers=ignored_header(ignored.names))


@router.delete(
    f"{_PATH}/{{conversation_id}}",
    response_model=None,
    responses={**answers(DELETED), **errors(404)},
)
async def delete_conversation(request: Request, conversation_id: str) -> Response:
    """Forget a conversation. Responses that it led to stay."""
    state = state_of(request)
    if (answer := state.siblings.forward(request, conversation_id)) is not None:
        return answer
    _found(request, conversation_id)
    await state.responses.remove(key_of(request, conversation_id))
    deleted = {"id": conversation_id, "object": "conversation.deleted", "deleted": True}
    return JSONResponse(deleted)


@router.get(
    f"{_PATH}/{{conversation_id}}/items",
    response_model=None,
    responses={**answers(_LIST), **errors(400, 404)},
)
async def list_items(
    request: Request,
    conversation_id: str,
    limit: int = Query(20, ge=1, le=100),
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
) -> Response:
    """List the items of a conversation, the newest first unless asked otherwise."""
    if (answer := state_of(request).siblings.forward(request, conversation_id)) is not None:
        return answer
    items = _found(request, conversation_id).items
    return await json_of(page_of(items, limit=limit, order=order, after=after))


@router.post(
    f"{_PATH}/{{conversation_id}}/items",
    response_model=None,
    openapi_extra=json_body(NewItems),
    responses={**answers(_LIST), **errors(*BODY_ERRORS)},
)
async def add_items(request: Request, conversation_id: str) -> Response:
    """Add items to the end of a conversation."""
    state = state_of(request)
    fields = await read_json_object(request)
    if (answer := state.siblings.forward(request, conversation_id)) is not None:
        return answer
    ignored = Ignored(strict=state.settings.strict)
    new = _checked(ignored.check(NewItems, fields).items, ignored)
    added = await size_of(new)
    found = _found(request, conversation_id)
    _keep(request, found.response, [*found.items, *new], found.num_bytes + added)
    page = page_of(new, limit=len(new), order="asc", after=None)
    return await json_of(page, ignored_header(ignored.names))


@router.get(
    f"{_PATH}/{{conversation_id}}/items/{{item_id}}",
    response_model=None,
    responses={**answers(json_object("id", "type")), **errors(404)},
)
async def get_item(request: Request, conversation_id: str, item_id: str) -> Response:
    """Return one item of a conversation."""
    if (answer := state_of(request).siblings.forward(request, conversation_id)) is not None:
        return answer
    items = _found(request, conversation_id).items
    return await json_of(items[_place(items, item_id)])


@router.delete(
    f"{_PATH}/{{conversation_id}}/items/{{item_id}}",
    response_model=None,
    responses={**answers(_CONVERSATION), **errors(404)},
)
async def delete_item(request: Request, conversation_id: str, item_id: str) -> Response:
    """Take one item out of a conversation."""
    if (answer := state_of(request).siblings.forward(request, conversation_id)) is not None:
        return answer
    found = _found(request, conversation_id)
    freed = await size_of(found.items[_place(found.items, item_id)])
    found = _found(request, conversation_id)  # it may have changed meanwhile
    place = _place(found.items, item_id)
    left = [*found.items[:place], *found.items[place + 1 :]]
    _keep(request, found.response, left, found.num_bytes - freed)
    return JSONResponse(found.response)


def _checked(items: list[dict[str, Any]], ignored: Ignored) -> list[dict[str, Any]]:
    """Return new items as they are kept. Raises InvalidRequestError for one that a response could
    not read."""
    reader = ItemReader(Tools(ignored), ignored)
    for index, item in enumerate(items):
        reader.read(item, ("items", index))
    return with_ids(items)


def _found(request: Request, conversation_id: str) -> Stored:
    found = state_of(request).responses.find(key_of(request, conversation_id))
    if not isinstance(found, Stored) or found.response["object"] != "conversation":
        raise HTTPException(404, f"there is no conversation {ascii(conversation_id[:64])}")
    return found


def _keep(
    request: Request, conversation: dict[str, Any], items: list[dict[str, Any]], num_bytes: int
) -> None:
    key = key_of(request, conversation["id"])
    if not state_of(request).responses.add(key, conversation, items, num_bytes):
        raise InvalidRequestError(
            "items: the conversation is larger than --max-stored-response-bytes", "items"
        )


def _place(items: list[dict[str, Any]], item_id: str) -> int:
    for place, item in enumerate(items):
        if item["id"] == item_id:
            return place
    raise HTTPException(404, f"there is no item {ascii(item_id[:64])}")
